// marlin_cpu.cpp: C = A @ dequant(B) + bias on a CPU, in FP32.
//
// Depends on marlin.h, layout.h and the C++17 library. bindings.cpp calls it and owns the threads: the product is cut into
// tasks (tokens x one chunk of features) that depend on the Problem alone, cpu_run computes a range of them.
//
// The walk is the same for every instruction set; a table of four functions (struct Kernels) is what differs:
//
//   for each run of features whose sums stay in cache         run_slice
//     for each block of kBlockK rows of the weight
//       bring the block of A to FP32                          load_row
//       for each panel of features
//         unpack the block of the panel to FP32, scaled       unpack
//         for each tile of tokens: sums += A block x panel    multiply
//     undo the order of the panel, add the bias, round        store_row
#include "marlin.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Constants
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kBlockK = 128;      // rows of the weight between two visits to the sums, and the row stride of A in FP32
constexpr int kMaxTokens = 256;   // of a task: a panel is unpacked once for that many
constexpr int kMinTokens = 32;    // of a task, where tokens are cut finer because features are few
constexpr int kEnoughTasks = 64;  // tokens are cut finer until there are so many
constexpr int kSumsFloats = 131072;  // FP32 sums of a slice: 512 KB, half of a usual L2

// One block of rows of one panel of features. Word w and half h below are where the panel begins: both B and s keep the
// features of a panel adjacent, at 2 words and 1 half a feature.
struct Panel {
  const int32_t* B;    // (num_k16 rows b_stride apart, 2 words a feature)
  int64_t b_stride;    // in int32
  const uint16_t* s;   // fp16 in grouped order, of the group of the first row; the next group is s_stride on
  int64_t s_stride;    // in fp16
  int num_k16;         // k16 rows in the block
  int group_k16_left;  // k16 rows until the group of the first row ends
  int group_k16;       // k16 rows in a group
};

struct Kernels {
  int features;    // of a panel
  int max_tokens;  // of a tile
  // count elements of dtype <-> FP32
  void (*load_row)(const void* src, DType dtype, int64_t count, float* dst);
  void (*store_row)(const float* src, DType dtype, int64_t count, void* dst);
  // W (16 num_k16, features) = the weights of the panel; features in the order of unpacked_feature
  void (*unpack)(const Panel& panel, float* W);
  // sums (tokens, features) += A (tokens, num_k of kBlockK) W (num_k, features)
  void (*multiply)(const float* A, const float* W, int tokens, int num_k, float* sums);
};

// Panels hold features in the order in which words unpack: of 2V features, position V upper + 4 (g - g_begin) + j is the
// feature 16 j + 8 upper + g of its chunk (letters as in layout.h).
constexpr int unpacked_feature(int panel_features, int position) {
  const int lanes = panel_features / 2, panel_begin = position / panel_features;
  const int upper = position % panel_features / lanes, v = position % lanes;
  return 16 * (v % 4) + 8 * upper + panel_begin * lanes / 4 + v / 4;
}

// ---------------------------------------------------------------------------------------------------------------------
// Portable kernels
// ---------------------------------------------------------------------------------------------------------------------

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  // Subnormals count in 2^-24. The others rebase the exponent: 127 - 15 = 112.
  const float x =
      magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24f : float_of((magnitude << 13) + (112u << 23));
  return sign ? -x : x;
}

// To nearest, ties to even.
uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on: Inf
  // Below 2^-14: the last place of 0.5 is 2^-24, so that adding 0.5 rounds to a subnormal.
  if (magnitude < 0x38800000)
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

float from_bfloat(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// To nearest, ties to even.
uint16_t to_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN, made quiet
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void load_row_portable(const void* src, DType dtype, int64_t count, float* dst) {
  const auto* halves = static_cast<const uint16_t*>(src);
  if (dtype == DType::f32) std::memcpy(dst, src, count * sizeof(float));
  if (dtype == DType::f16) std::transform(halves, halves + count, dst, from_half);
  if (dtype == DType::bf16) std::transform(halves, halves + count, dst, from_bfloat);
}

void store_row_portable(const float* src, DType dtype, int64_t count, void* dst) {
  auto* halves = static_cast<uint16_t*>(dst);
  if (dtype == DType::f32) std::memcpy(dst, src, count * sizeof(float));
  if (dtype == DType::f16) std::transform(src, src + count, halves, to_half);
  if (dtype == DType::bf16) std::transform(src, src + count, halves, to_bfloat);
}

void unpack_portable(const Panel& panel, float* W) {
  constexpr int kLanes = TILE_N / 2;
  const uint16_t* s = panel.s;
  int left = panel.group_k16_left;
  for (int k16 = 0; k16 < panel.num_k16; ++k16, --left) {
    if (left == 0) s += panel.s_stride, left = panel.group_k16;
    float scale[2][kLanes];  // (upper, v)
    for (int v = 0; v < kLanes; ++v) {
      for (int upper = 0; upper < 2; ++upper) scale[upper][v] = from_half(s[2 * v + upper]);
    }
    const int32_t* words = panel.B + k16 * panel.b_stride;
    for (int t = 0; t < 4; ++t) {
      for (int i = 0; i < 8; ++i) {  // nibbles: bit 0 is far, bit 1 upper, bit 2 odd
        const int k = TILE_K * k16 + 2 * t + 8 * (i & 1) + (i >> 2), upper = i >> 1 & 1;
        float* w = W + k * TILE_N + upper * kLanes;
        for (int v = 0; v < kLanes; ++v) {
          const int q = words[16 * (v / 4) + 4 * t + v % 4] >> 4 * i & 15;
          w[v] = static_cast<float>(q - ZERO_POINT) * scale[upper][v];
        }
      }
    }
  }
}

void multiply_portable(const float* A, const float* W, int tokens, int num_k, float* sums) {
  for (int m = 0; m < tokens; ++m) {
    float acc[TILE_N];
    std::memcpy(acc, sums + m * TILE_N, sizeof acc);
    for (int k = 0; k < num_k; ++k) {
      const float a = A[m * kBlockK + k];
      for (int n = 0; n < TILE_N; ++n) acc[n] += a * W[k * TILE_N + n];
    }
    std::memcpy(sums + m * TILE_N, acc, sizeof acc);
  }
}

constexpr Kernels kPortable = {TILE_N, 8, load_row_portable, store_row_portable, unpack_portable, multiply_portable};

// ---------------------------------------------------------------------------------------------------------------------
// The walk
// ---------------------------------------------------------------------------------------------------------------------

const Kernels& kernels_of(Isa) { return kPortable; }

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Token blocks of the task grid: at most kMaxTokens tokens each, finer where the chunks alone are too few to share out.
int64_t num_token_blocks(const Problem& p) {
  const int64_t chunks = p.N / TILE_N;
  int64_t tokens = kMaxTokens;
  while (tokens > kMinTokens && chunks * ((p.M + tokens - 1) / tokens) < kEnoughTasks) tokens /= 2;
  return (p.M + tokens - 1) / tokens;
}

// Memory of one thread, kept for the next call: fresh pages would cost more than a product with one token.
struct Scratch {
  float *A, *W, *sums, *bias;
  uint16_t* s;

  Scratch(int64_t tokens, int64_t features) {
    const int64_t sizes[] = {tokens * kBlockK, int64_t{kBlockK} * TILE_N, tokens * features, features, features / 2};
    float** parts[] = {&A, &W, &sums, &bias};
    int64_t total = 16;  // floats; room to align to a cache line
    for (int64_t size : sizes) total += (size + 15) / 16 * 16;
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t capacity = 0;
    if (total > capacity) memory.reset(), memory.reset(new float[total]), capacity = total;
    float* next = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(float);
    for (int i = 0; i < 4; ++i) *parts[i] = next, next += (sizes[i] + 15) / 16 * 16;
    s = reinterpret_cast<uint16_t*>(next);
  }
};

// C of the tokens [m_begin, m_end) and the features [n_begin, n_end), both ends on chunks.
void run_slice(const Problem& p, const Kernels& kernels, int64_t m_begin, int64_t m_end, int64_t n_begin,
               int64_t n_end) {
  const int64_t tokens = m_end - m_begin, features = n_end - n_begin, bytes = element_bytes(p.dtype);
  const int64_t num_tiles = (tokens + kernels.max_tokens - 1) / kernels.max_tokens;
  const auto tile_begin = [&](int64_t tile_idx) { return tokens * tile_idx / num_tiles; };
  const Scratch scratch(tokens, features);

  // Scales: one group comes in another order, which is brought to the usual one; then both are read alike.
  const bool channelwise = p.group == p.K;
  const auto* s = static_cast<const uint16_t*>(p.s) + n_begin;
  if (channelwise) {
    for (int64_t n = 0; n < features; ++n) scratch.s[scale_of(n)] = s[scale_of_channelwise(n)];
    s = scratch.s;
  }

  std::fill_n(scratch.sums, tokens * features, 0.0f);
  const int64_t K_used = (p.K_A + TILE_K - 1) / TILE_K * TILE_K;  // what A does not have counts as zeros
  for (int64_t k = 0; k < K_used; k += kBlockK) {
    const int64_t num_k = std::min<int64_t>(kBlockK, K_used - k), num_k_A = std::min(num_k, p.K_A - k);
    for (int64_t m = 0; m < tokens; ++m) {
      float* row = scratch.A + m * kBlockK;
      kernels.load_row(static_cast<const char*>(p.A) + ((m_begin + m) * p.lda + k) * bytes, p.dtype, num_k_A, row);
      std::fill(row + num_k_A, row + num_k, 0.0f);
    }
    for (int64_t n = 0; n < features; n += kernels.features) {
      Panel panel;
      panel.B = static_cast<const int32_t*>(p.B) + k / TILE_K * 2 * p.N + 2 * (n_begin + n);
      panel.b_stride = 2 * p.N;
      panel.s = s + k / p.group * p.N + n;
      panel.s_stride = p.N;
      panel.num_k16 = static_cast<int>(num_k / TILE_K);
      panel.group_k16 = static_cast<int>(p.group / TILE_K);
      panel.group_k16_left = static_cast<int>((p.group - k % p.group) / TILE_K);
      kernels.unpack(panel, scratch.W);
      for (int64_t tile_idx = 0; tile_idx < num_tiles; ++tile_idx) {
        const int64_t m = tile_begin(tile_idx), m_next = tile_begin(tile_idx + 1);
        kernels.multiply(scratch.A + m * kBlockK, scratch.W, static_cast<int>(m_next - m), static_cast<int>(num_k),
                         scratch.sums + n * tokens + m * kernels.features);
      }
    }
  }

  const int64_t n_stop = std::min(n_end, p.N_C);  // features beyond are padding
  std::fill_n(scratch.bias, features, 0.0f);
  if (p.bias && n_begin < n_stop) {
    kernels.load_row(static_cast<const char*>(p.bias) + n_begin * bytes, p.dtype, n_stop - n_begin, scratch.bias);
  }
  for (int64_t n = n_begin; n < n_stop; n += TILE_N) {
    for (int64_t m = 0; m < tokens; ++m) {
      float row[TILE_N];
      for (int u = 0; u < TILE_N; ++u) {
        const int panel_begin = u / kernels.features * kernels.features,
                  feature = unpacked_feature(kernels.features, u);
        row[feature] = scratch.sums[(n - n_begin + panel_begin) * tokens + m * kernels.features + u - panel_begin] +
                       scratch.bias[n - n_begin + feature];
      }
      kernels.store_row(row, p.dtype, std::min<int64_t>(TILE_N, n_stop - n),
                        static_cast<char*>(p.C) + ((m_begin + m) * p.N_C + n) * bytes);
    }
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Entry points
// ---------------------------------------------------------------------------------------------------------------------

Isa cpu_best_isa() { return Isa::portable; }

int64_t cpu_num_tasks(const Problem& p) { return num_token_blocks(p) * (p.N / TILE_N); }

Status cpu_run(const Problem& p, Isa isa, int64_t begin, int64_t end) {
  if (const Status status = check_shape(p); status != Status::ok) return status;
  if (p.dtype != DType::f16 && p.dtype != DType::bf16 && p.dtype != DType::f32) return Status::bad_dtype;
  if (isa > cpu_best_isa()) return Status::no_config;
  const int64_t chunks = p.N / TILE_N, blocks = num_token_blocks(p);
  end = std::min(end, blocks * chunks);
  // Neighbouring tasks of one token block become one slice, so that A is converted once for all of them. No sum depends on
  // how features are sliced, so that the bits do not either.
  while (begin < end) {
    const int64_t block = begin / chunks, chunk = begin % chunks;
    const int64_t m_begin = p.M * block / blocks, m_end = p.M * (block + 1) / blocks;
    const int64_t most = std::max<int64_t>(1, kSumsFloats / (m_end - m_begin) / TILE_N);
    const int64_t num_chunks = std::min({end - begin, chunks - chunk, most});
    run_slice(p, kernels_of(isa), m_begin, m_end, chunk * TILE_N, (chunk + num_chunks) * TILE_N);
    begin += num_chunks;
  }
  return Status::ok;
}

}  // namespace marlin
