// marlin_cpu.cpp: C = A @ dequant(B) + bias on a CPU, in FP32.
//
// Depends on marlin.h, layout.h and the C++17 library. bindings.cpp calls it and owns the threads: the product is cut
// into tasks (tokens x one chunk of features) that depend on the Problem alone, cpu_run computes a range of them.
//
// The walk is the same for every instruction set; a table of functions (struct Kernels) is what differs:
//
//   for each run of features whose sums stay in cache         run_slice
//     for each block of kBlockK rows of the weight
//       bring the block of A to FP32, its columns in order    load_A (once before, if there are several slices)
//       for each panel of features
//         unpack the block of the panel to FP32, scaled       unpack
//         for each tile of tokens: sums += A block x panel    multiply
//         (few tokens: both in one, weights in registers      direct)
//     undo the order of the panel, add the bias, round        store_row
#include "marlin.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MARLIN_X86 1
#include <cpuid.h>
#include <immintrin.h>
#if !defined(__clang__)  // GCC 12 takes the deliberately undefined operands of its own AVX-512 headers for mistakes
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
// The file is built for the oldest x86-64; these functions alone may use more, and run only where the processor can.
// Aligned to cache lines: how a loop lies in them is worth 5%, and would change with any edit anywhere.
#define MARLIN_AVX2 __attribute__((aligned(64), target("avx2,fma,f16c")))
#define MARLIN_AVX512 __attribute__((aligned(64), target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define MARLIN_AVX2_INLINE MARLIN_AVX2 inline __attribute__((always_inline))
#define MARLIN_AVX512_INLINE MARLIN_AVX512 inline __attribute__((always_inline))
#endif

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Constants
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kBlockK = 128;  // rows of the weight between two visits to the sums, and the row stride of A in FP32
constexpr int kMaxRuns = kBlockK / TILE_K;  // of rows of one group in a block
constexpr int kMaxTile = 14;                // tokens whose sums fit into registers, of any instruction set
constexpr int kMaxTokens = 256;             // of a task: a panel is unpacked once for that many
constexpr int kMinTokens = 32;              // of a task, where tokens are cut finer because features are few
constexpr int kEnoughTasks = 64;            // tokens are cut finer until there are so many
constexpr int kSumsFloats = 131072;         // FP32 sums of a slice: 512 KB, half of a usual L2
constexpr int kHeldFloats = 1 << 22;        // of A, converted once for several slices: 16 MB

// One block of rows of one panel of features. Both B and s keep the features of a panel adjacent.
struct Panel {
  const int32_t* B;       // (num_k16 rows b_stride apart, 2 words a feature)
  const int32_t* B_next;  // the same of the next panel, to be fetched meanwhile; further ahead evicts lines from L1
  int64_t b_stride;       // in int32
  const uint16_t* s;      // s_dtype in grouped order, of the group of the first row; the next group is s_stride on
  const uint16_t* z;      // the same of the zero points, or null
  int64_t s_stride;       // in elements
  DType s_dtype;          // f16 or bf16
  int num_k16;            // k16 rows in the block
  int group_k16_left;     // k16 rows until the group of the first row ends
  int group_k16;          // k16 rows in a group
};

struct Kernels {
  int features;           // of a panel
  int max_tokens;         // of a tile of multiply
  int max_tokens_direct;  // of a product that goes through direct, in one tile; 0: none
  // count elements of dtype <-> FP32
  void (*load_row)(const void* src, DType dtype, int64_t count, float* dst);
  void (*store_row)(const float* src, DType dtype, int64_t count, void* dst);
  // W (16 num_k16, features) = the weights of the panel; features in the order of unpacked_feature
  void (*unpack[2])(const Panel& panel, float* W);  // (has zero points)
  // sums (tokens, features) += A (tokens, num_k of kBlockK) W (num_k, features). The block is summed on its own before:
  // a chain of 128 sums and one of K / 128 lose less than one of K (at K = 4096 a third of the error).
  void (*multiply[kMaxTile])(const float* A, const float* W, int num_k, float* sums);  // (tokens - 1)
  // Both in one for few tokens: the weights live in registers only, a group's sums are scaled instead of its weights.
  // With zero points, sum a (q - z) = sum a (q - 8) - (z - 8) sum a: A_sums (tokens, kMaxRuns) has -sum a of each run of
  // rows of one group. A subtraction for each weight takes 1.22 x the time at M = 1. (has zero points, tokens - 1)
  void (*direct[2][kMaxTile])(const Panel& panel, const float* A, const float* A_sums, float* sums);
};

// Panels hold features in the order in which words unpack: of 2V features, position V upper + 4 (g - g_begin) + j is
// the feature 16 j + 8 upper + g of its chunk (letters as in layout.h).
constexpr int unpacked_feature(int panel_features, int position) {
  const int lanes = panel_features / 2, panel_begin = position / panel_features;
  const int upper = position % panel_features / lanes, v = position % lanes;
  return 16 * (v % 4) + 8 * upper + panel_begin * lanes / 4 + v / 4;
}

// ---------------------------------------------------------------------------------------------------------------------
// Portable kernels
// ---------------------------------------------------------------------------------------------------------------------

template <class To, class From>
To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
float float_of(uint32_t bits) { return bit_cast<float>(bits); }

// Masks, as GCC makes branches of choices, and signed, as SSE2 compares: loops become vectors, of 64 in 40 ns, not 120.
float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const int32_t magnitude = (h & 0x7fff) << 13;
  const int32_t subnormal = -(magnitude < 0x400 << 13), infinite = -(magnitude >= 0x7c00 << 13);  // or NaN
  // The exponent is rebased by 127 - 15 = 112, the largest by as much again; that of a subnormal becomes 2^-14, which
  // brings a leading one that is to go again.
  const float x = float_of(magnitude + (112 << 23) + (subnormal & 1 << 23) + (infinite & 112 << 23));
  return float_of(sign | bits_of(x - float_of(subnormal & 113 << 23)));
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

// Begins to load cache lines.
template <int kLines>
inline void fetch(const void* begin) {
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(static_cast<const char*>(begin) + 64 * line);
}

// Scales or zero points of 64 features, by upper: it is the upper half of each pair (of a little-endian machine).
// Begins to load those of the next panel: rows of them are too far apart for the processor to foresee.
void scales_portable(const uint16_t* s, DType dtype, float scale[2][TILE_N / 2]) {
  constexpr int kLanes = TILE_N / 2;
  fetch<2>(s + TILE_N);
  uint32_t pairs[kLanes];
  std::memcpy(pairs, s, sizeof pairs);
  if (dtype == DType::bf16) {
    for (int v = 0; v < kLanes; ++v) scale[0][v] = float_of(pairs[v] << 16), scale[1][v] = from_bfloat(pairs[v] >> 16);
  } else {
    for (int v = 0; v < kLanes; ++v)
      scale[0][v] = from_half(pairs[v] & 0xffff), scale[1][v] = from_half(pairs[v] >> 16);
  }
}

template <bool kZeros>
void unpack_portable(const Panel& panel, float* W) {
  constexpr int kLanes = TILE_N / 2;
  float scale[2][kLanes], zero[2][kLanes];  // (upper, v)
  std::fill_n(*zero, TILE_N, static_cast<float>(ZERO_POINT));
  int64_t s_idx = 0;
  for (int k16 = 0, left = 0; k16 < panel.num_k16; ++k16, --left) {
    if (left == 0) {
      scales_portable(panel.s + s_idx, panel.s_dtype, scale);
      if (kZeros) scales_portable(panel.z + s_idx, panel.s_dtype, zero);
      s_idx += panel.s_stride, left = k16 == 0 ? panel.group_k16_left : panel.group_k16;
    }
    for (int t = 0; t < 4; ++t) {
      const int32_t* words = panel.B + k16 * panel.b_stride + 4 * t;
      int32_t by_v[kLanes];
      for (int g = 0; g < 8; ++g) std::copy_n(words + 16 * g, 4, by_v + 4 * g);
      for (int upper = 0; upper < 2; ++upper) {
        float* w = W + (TILE_K * k16 + 2 * t) * TILE_N + upper * kLanes;
        for (int v = 0; v < kLanes; ++v) {
          const int word = by_v[v] >> 8 * upper;
          const auto value = [&](int q) { return (static_cast<float>(q & 15) - zero[upper][v]) * scale[upper][v]; };
          w[v] = value(word), w[v + 8 * TILE_N] = value(word >> 4);                  // far
          w[v + TILE_N] = value(word >> 16), w[v + 9 * TILE_N] = value(word >> 20);  // odd; odd and far
        }
      }
    }
  }
}

template <int kTokens>
void multiply_portable(const float* A, const float* W, int num_k, float* sums) {
  for (int m = 0; m < kTokens; ++m) {
    float acc[TILE_N] = {};
    for (int k = 0; k < num_k; ++k) {
      const float a = A[m * kBlockK + k];
      for (int n = 0; n < TILE_N; ++n) acc[n] += a * W[k * TILE_N + n];
    }
    for (int n = 0; n < TILE_N; ++n) sums[m * TILE_N + n] += acc[n];
  }
}

constexpr Kernels kPortable = {
    TILE_N,
    4,
    0,
    load_row_portable,
    store_row_portable,
    {unpack_portable<false>, unpack_portable<true>},
    {multiply_portable<1>, multiply_portable<2>, multiply_portable<3>, multiply_portable<4>}};

// ---------------------------------------------------------------------------------------------------------------------
// AVX2, FMA, F16C
// ---------------------------------------------------------------------------------------------------------------------

#if MARLIN_X86

constexpr int kLanesAvx2 = 8;  // of 16 features: 2 vectors

// Of FP16 alone: what the portable loops of the others become is as good.
MARLIN_AVX2 void load_row_avx2(const void* src, DType dtype, int64_t count, float* dst) {
  if (dtype != DType::f16) return load_row_portable(src, dtype, count, dst);
  const auto* halves = static_cast<const uint16_t*>(src);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
  }
  load_row_portable(halves + i, dtype, count - i, dst + i);
}

MARLIN_AVX2 void store_row_avx2(const float* src, DType dtype, int64_t count, void* dst) {
  if (dtype != DType::f16) return store_row_portable(src, dtype, count, dst);
  auto* halves = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), h);
  }
  store_row_portable(src + i, dtype, count - i, halves + i);
}

// The words of lanes with one t, of two lane groups: 4 of each.
MARLIN_AVX2_INLINE __m256i words_avx2(const int32_t* words, int t) {
  const __m128i* quads = reinterpret_cast<const __m128i*>(words);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(quads + t)), _mm_loadu_si128(quads + 4 + t), 1);
}

// Nibble i of each word, as FP32 q - 8. Under the exponent of 2^(23 - 4i) bits 4i .. 4i+3 of the mantissa count ones, so
// that `magic | nibble` is 2^(23 - 4i) + q. Two logical operations and a subtraction run on three ports, a shift and a
// conversion would crowd two. The mantissa has 23 bits: nibbles 5..7 come from the word shifted by 12.
MARLIN_AVX2_INLINE __m256 nibble_avx2(__m256i w, __m256i w12, int i) {
  const int place = i < 5 ? i : i - 3;
  const __m256i mask = _mm256_set1_epi32(15 << 4 * place);
  const __m256i magic = _mm256_set1_epi32((127 + 23 - 4 * place) << 23);
  const __m256 offset = _mm256_set1_ps(static_cast<float>((1 << (23 - 4 * place)) + ZERO_POINT));
  const __m256i q = _mm256_or_si256(_mm256_and_si256(i < 5 ? w : w12, mask), magic);
  return _mm256_sub_ps(_mm256_castsi256_ps(q), offset);
}

// Scales, or zero points less 8 as the nibbles are, of 16 features, by upper: it is the upper half of each pair.
MARLIN_AVX2_INLINE void scales_avx2(const uint16_t* s, DType dtype, int offset, __m256 scale[2]) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
  const __m256i upper = _mm256_srli_epi32(pairs, 16);
  if (dtype == DType::bf16) {
    scale[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    scale[1] = _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16));
  } else {
    const __m256i mixed = _mm256_packus_epi32(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)), upper);
    const __m256i halves = _mm256_permute4x64_epi64(mixed, 0xd8);  // packus leaves the middle quarters swapped
    scale[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    scale[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
  for (int upper = 0; upper < 2; ++upper) scale[upper] = _mm256_sub_ps(scale[upper], _mm256_set1_ps(offset));
}

template <bool kZeros>
MARLIN_AVX2 void unpack_avx2(const Panel& panel, float* W) {
  __m256 scale[2], zero[2];  // (upper)
  int64_t s_idx = 0;
  for (int k16 = 0, left = 0; k16 < panel.num_k16; ++k16, --left) {
    if (left == 0) {
      scales_avx2(panel.s + s_idx, panel.s_dtype, 0, scale);
      if (kZeros) scales_avx2(panel.z + s_idx, panel.s_dtype, ZERO_POINT, zero);
      s_idx += panel.s_stride, left = k16 == 0 ? panel.group_k16_left : panel.group_k16;
    }
    const int32_t* words = panel.B + k16 * panel.b_stride;
    fetch<2>(panel.B_next + k16 * panel.b_stride);
    for (int t = 0; t < 4; ++t) {
      const __m256i w = words_avx2(words, t), w12 = _mm256_srli_epi32(w, 12);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {  // nibbles: bit 0 is far, bit 1 upper, bit 2 odd
        const int k = TILE_K * k16 + 2 * t + 8 * (i & 1) + (i >> 2), upper = i >> 1 & 1;
        __m256 value = nibble_avx2(w, w12, i);
        if (kZeros) value = _mm256_sub_ps(value, zero[upper]);
        _mm256_storeu_ps(W + (2 * k + upper) * kLanesAvx2, _mm256_mul_ps(value, scale[upper]));
      }
    }
  }
}

template <int kTokens>
MARLIN_AVX2 void multiply_avx2(const float* A, const float* W, int num_k, float* sums) {
  __m256 acc[kTokens][2] = {};  // (tokens, upper)
  for (int k = 0; k < num_k; ++k) {
    const __m256 w0 = _mm256_loadu_ps(W + 2 * k * kLanesAvx2), w1 = _mm256_loadu_ps(W + (2 * k + 1) * kLanesAvx2);
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
      const __m256 a = _mm256_broadcast_ss(A + m * kBlockK + k);
      acc[m][0] = _mm256_fmadd_ps(a, w0, acc[m][0]), acc[m][1] = _mm256_fmadd_ps(a, w1, acc[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kTokens; ++i) {
    float* sum = sums + i * kLanesAvx2;
    _mm256_storeu_ps(sum, _mm256_add_ps(acc[i / 2][i % 2], _mm256_loadu_ps(sum)));
  }
}

template <int kTokens, bool kZeros>
MARLIN_AVX2 void direct_avx2(const Panel& panel, const float* A, const float* A_sums, float* sums) {
  constexpr int kChains = kTokens <= 2 ? 2 : 1;  // an FMA takes 4 cycles, two start in each
  int64_t s_idx = 0;
  int left = panel.group_k16_left;
  for (int k16 = 0, run = 0; k16 < panel.num_k16; ++run) {
    const int k16_end = std::min(panel.num_k16, k16 + left);
    __m256 acc[kTokens][2][kChains] = {}, scale[2], zero[2];  // (tokens, upper, chains), (upper)
    // Zero points first or last, groups of 16: 1.10 or 1.16 x the plain time with 3 tokens, 1.22 or 1.09 with 4.
    if (kZeros && kTokens < 4) {
      scales_avx2(panel.z + s_idx, panel.s_dtype, ZERO_POINT, zero);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * kTokens; ++i) {
        acc[i / 2][i % 2][0] = _mm256_mul_ps(_mm256_set1_ps(A_sums[i / 2 * kMaxRuns + run]), zero[i % 2]);
      }
    }
    fetch<1>(panel.s + s_idx + 2 * kLanesAvx2);
    if (kZeros) fetch<1>(panel.z + s_idx + 2 * kLanesAvx2);
    for (; k16 < k16_end; ++k16) {
      const int32_t* words = panel.B + k16 * panel.b_stride;
      fetch<2>(panel.B_next + k16 * panel.b_stride);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const __m256i w = words_avx2(words, t), w12 = _mm256_srli_epi32(w, 12);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // k: bit 0 is far, bit 1 odd
          const float* a_k = A + TILE_K * k16 + 2 * t + 8 * (i & 1) + (i >> 1);
          const int lower = (i & 1) + 4 * (i >> 1), chain = i % kChains;
          const __m256 w0 = nibble_avx2(w, w12, lower);
          const __m256 w1 = nibble_avx2(w, w12, lower + 2);
#pragma GCC unroll 8
          for (int m = 0; m < kTokens; ++m) {
            const __m256 a = _mm256_broadcast_ss(a_k + m * kBlockK);
            acc[m][0][chain] = _mm256_fmadd_ps(a, w0, acc[m][0][chain]);
            acc[m][1][chain] = _mm256_fmadd_ps(a, w1, acc[m][1][chain]);
          }
        }
      }
    }
    scales_avx2(panel.s + s_idx, panel.s_dtype, 0, scale);
    if (kZeros && kTokens > 3) scales_avx2(panel.z + s_idx, panel.s_dtype, ZERO_POINT, zero);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kTokens; ++i) {
      const int m = i / 2, upper = i % 2;
      float* sum = sums + i * kLanesAvx2;
      __m256 acc_all = acc[m][upper][0];
      if (kChains == 2) acc_all = _mm256_add_ps(acc_all, acc[m][upper][kChains - 1]);
      if (kZeros && kTokens > 3)
        acc_all = _mm256_fmadd_ps(_mm256_set1_ps(A_sums[m * kMaxRuns + run]), zero[upper], acc_all);
      _mm256_storeu_ps(sum, _mm256_fmadd_ps(acc_all, scale[upper], _mm256_loadu_ps(sum)));
    }
    s_idx += panel.s_stride, left = panel.group_k16;
  }
}

template <size_t... m, size_t... d>
constexpr Kernels kernels_avx2(std::index_sequence<m...>, std::index_sequence<d...>) {
  return {2 * kLanesAvx2,
          sizeof...(m),
          sizeof...(d),
          load_row_avx2,
          store_row_avx2,
          {unpack_avx2<false>, unpack_avx2<true>},
          {multiply_avx2<m + 1>...},
          {{direct_avx2<d + 1, false>...}, {direct_avx2<d + 1, true>...}}};
}

// 6 x 2 accumulators, 2 weights and an activation are 15 of 16 registers. direct has its weights and masks besides:
// with 5 tokens it is slower than unpack and multiply (2.55 against 2.2 ms).
constexpr Kernels kAvx2 = kernels_avx2(std::make_index_sequence<6>(), std::make_index_sequence<4>());

// ---------------------------------------------------------------------------------------------------------------------
// AVX-512
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kLanesAvx512 = 16;  // of 32 features: 2 vectors

// The words of four lane groups, each with one t: 4x4 transpose of 128-bit quarters.
MARLIN_AVX512_INLINE void words_avx512(const int32_t* words, __m512i by_t[4]) {
  const __m512i g0 = _mm512_loadu_si512(words), g1 = _mm512_loadu_si512(words + 16);
  const __m512i g2 = _mm512_loadu_si512(words + 32), g3 = _mm512_loadu_si512(words + 48);
  const __m512i t01_g01 = _mm512_shuffle_i32x4(g0, g1, 0x44), t23_g01 = _mm512_shuffle_i32x4(g0, g1, 0xee);
  const __m512i t01_g23 = _mm512_shuffle_i32x4(g2, g3, 0x44), t23_g23 = _mm512_shuffle_i32x4(g2, g3, 0xee);
  by_t[0] = _mm512_shuffle_i32x4(t01_g01, t01_g23, 0x88), by_t[1] = _mm512_shuffle_i32x4(t01_g01, t01_g23, 0xdd);
  by_t[2] = _mm512_shuffle_i32x4(t23_g01, t23_g23, 0x88), by_t[3] = _mm512_shuffle_i32x4(t23_g01, t23_g23, 0xdd);
}

// Nibble i of each word, as FP32 q - 8: vpermps looks at four bits of each index, so that no mask is needed.
MARLIN_AVX512_INLINE __m512 nibble_avx512(__m512i w, int i) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(i == 0 ? w : _mm512_srli_epi32(w, 4 * i), values);
}

// Scales, or zero points less 8 as the nibbles are, of 32 features, by upper: it is the upper half of each pair.
MARLIN_AVX512_INLINE void scales_avx512(const uint16_t* s, DType dtype, int offset, __m512 scale[2]) {
  const __m512i pairs = _mm512_loadu_si512(s), upper = _mm512_srli_epi32(pairs, 16);
  if (dtype == DType::bf16) {
    scale[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    scale[1] = _mm512_castsi512_ps(_mm512_slli_epi32(upper, 16));
  } else {
    scale[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    scale[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(upper));
  }
  for (int upper = 0; upper < 2; ++upper) scale[upper] = _mm512_sub_ps(scale[upper], _mm512_set1_ps(offset));
}

template <bool kZeros>
MARLIN_AVX512 void unpack_avx512(const Panel& panel, float* W) {
  __m512 scale[2], zero[2];  // (upper)
  int64_t s_idx = 0;
  for (int k16 = 0, left = 0; k16 < panel.num_k16; ++k16, --left) {
    if (left == 0) {
      scales_avx512(panel.s + s_idx, panel.s_dtype, 0, scale);
      if (kZeros) scales_avx512(panel.z + s_idx, panel.s_dtype, ZERO_POINT, zero);
      s_idx += panel.s_stride, left = k16 == 0 ? panel.group_k16_left : panel.group_k16;
    }
    __m512i by_t[4];
    const int32_t* words = panel.B + k16 * panel.b_stride;
    fetch<4>(panel.B_next + k16 * panel.b_stride);
    words_avx512(words, by_t);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {  // nibbles: bit 0 is far, bit 1 upper, bit 2 odd
        const int k = TILE_K * k16 + 2 * t + 8 * (i & 1) + (i >> 2), upper = i >> 1 & 1;
        __m512 value = nibble_avx512(by_t[t], i);
        if (kZeros) value = _mm512_sub_ps(value, zero[upper]);
        _mm512_storeu_ps(W + (2 * k + upper) * kLanesAvx512, _mm512_mul_ps(value, scale[upper]));
      }
    }
  }
}

template <int kTokens>
MARLIN_AVX512 void multiply_avx512(const float* A, const float* W, int num_k, float* sums) {
  __m512 acc[kTokens][2] = {};  // (tokens, upper)
  for (int k = 0; k < num_k; ++k) {
    // Of the next tile and of the sums, each in time for all of it: 95% of the multipliers' rate become 97%.
    fetch<1>(A + kTokens * kBlockK + 16 * k);
    fetch<1>(sums + 4 * k);
    const __m512 w0 = _mm512_loadu_ps(W + 2 * k * kLanesAvx512), w1 = _mm512_loadu_ps(W + (2 * k + 1) * kLanesAvx512);
#pragma GCC unroll 16
    for (int m = 0; m < kTokens; ++m) {
      const __m512 a = _mm512_set1_ps(A[m * kBlockK + k]);
      acc[m][0] = _mm512_fmadd_ps(a, w0, acc[m][0]), acc[m][1] = _mm512_fmadd_ps(a, w1, acc[m][1]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < 2 * kTokens; ++i) {
    float* sum = sums + i * kLanesAvx512;
    _mm512_storeu_ps(sum, _mm512_add_ps(acc[i / 2][i % 2], _mm512_loadu_ps(sum)));
  }
}

template <int kTokens, bool kZeros>
MARLIN_AVX512 void direct_avx512(const Panel& panel, const float* A, const float* A_sums, float* sums) {
  constexpr int kChains = kTokens <= 3 ? 2 : 1;  // an FMA takes 4 cycles, two start in each
  int64_t s_idx = 0;
  int left = panel.group_k16_left;
  for (int k16 = 0, run = 0; k16 < panel.num_k16; ++run) {
    const int k16_end = std::min(panel.num_k16, k16 + left);
    __m512 acc[kTokens][2][kChains] = {}, scale[2], zero[2];  // (tokens, upper, chains), (upper)
    if (kZeros) {
      scales_avx512(panel.z + s_idx, panel.s_dtype, ZERO_POINT, zero);
#pragma GCC unroll 32
      for (int i = 0; i < 2 * kTokens; ++i) {
        acc[i / 2][i % 2][0] = _mm512_mul_ps(_mm512_set1_ps(A_sums[i / 2 * kMaxRuns + run]), zero[i % 2]);
      }
    }
    fetch<1>(panel.s + s_idx + 2 * kLanesAvx512);
    if (kZeros) fetch<1>(panel.z + s_idx + 2 * kLanesAvx512);
    for (; k16 < k16_end; ++k16) {
      const int32_t* words = panel.B + k16 * panel.b_stride;
      fetch<4>(panel.B_next + k16 * panel.b_stride);
      __m512i by_t[4];
      words_avx512(words, by_t);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // k: bit 0 is far, bit 1 odd
          const float* a_k = A + TILE_K * k16 + 2 * t + 8 * (i & 1) + (i >> 1);
          const int lower = (i & 1) + 4 * (i >> 1), chain = i % kChains;
          const __m512 w0 = nibble_avx512(by_t[t], lower);
          const __m512 w1 = nibble_avx512(by_t[t], lower + 2);
#pragma GCC unroll 16
          for (int m = 0; m < kTokens; ++m) {
            const __m512 a = _mm512_set1_ps(a_k[m * kBlockK]);
            acc[m][0][chain] = _mm512_fmadd_ps(a, w0, acc[m][0][chain]);
            acc[m][1][chain] = _mm512_fmadd_ps(a, w1, acc[m][1][chain]);
          }
        }
      }
    }
    scales_avx512(panel.s + s_idx, panel.s_dtype, 0, scale);
#pragma GCC unroll 32
    for (int i = 0; i < 2 * kTokens; ++i) {
      const int m = i / 2, upper = i % 2;
      float* sum = sums + i * kLanesAvx512;
      __m512 acc_all = acc[m][upper][0];
      if (kChains == 2) acc_all = _mm512_add_ps(acc_all, acc[m][upper][kChains - 1]);
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(acc_all, scale[upper], _mm512_loadu_ps(sum)));
    }
    s_idx += panel.s_stride, left = panel.group_k16;
  }
}

template <size_t... m, size_t... d>
constexpr Kernels kernels_avx512(std::index_sequence<m...>, std::index_sequence<d...>) {
  return {2 * kLanesAvx512,
          sizeof...(m),
          sizeof...(d),
          load_row_avx2,
          store_row_avx2,
          {unpack_avx512<false>, unpack_avx512<true>},
          {multiply_avx512<m + 1>...},
          {{direct_avx512<d + 1, false>...}, {direct_avx512<d + 1, true>...}}};
}

// 14 x 2 accumulators of 32 registers reach 97% of what the multipliers can do. direct wins up to one tile of 10 tokens
// (1.73 against 1.9 ms) and loses with a second one, which unpacks all again.
constexpr Kernels kAvx512 = kernels_avx512(std::make_index_sequence<kMaxTile>(), std::make_index_sequence<10>());

#endif  // MARLIN_X86

// ---------------------------------------------------------------------------------------------------------------------
// The walk
// ---------------------------------------------------------------------------------------------------------------------

const Kernels& kernels_of([[maybe_unused]] Isa isa) {
#if MARLIN_X86
  if (isa != Isa::portable) return isa == Isa::avx512 ? kAvx512 : kAvx2;
#endif
  return kPortable;
}

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Token blocks of the task grid: at most kMaxTokens tokens each, finer where the chunks alone are too few to share out, or
// where all of A, which is gathered once if its columns are permuted, would take much memory.
int64_t num_token_blocks(const Problem& p) {
  const int64_t chunks = p.N / TILE_N;
  int64_t tokens = kMaxTokens;
  while (tokens > kMinTokens && chunks * ((p.M + tokens - 1) / tokens) < kEnoughTasks) tokens /= 2;
  while (tokens > kMinTokens && p.perm && tokens * p.K > kHeldFloats) tokens /= 2;
  return (p.M + tokens - 1) / tokens;
}

// Memory of one thread, kept for the next call: fresh pages would cost more than a product with one token.
struct Scratch {
  float *A, *W, *sums, *bias, *row;
  uint16_t *s, *z;

  Scratch(int64_t tokens, int64_t K_held, int64_t features, int64_t K_row) {
    const int64_t sizes[] = {tokens * K_held, int64_t{kBlockK} * TILE_N, tokens * features, features, K_row, features};
    float** parts[] = {&A, &W, &sums, &bias, &row};
    int64_t total = 16;  // floats; room to align to a cache line
    for (int64_t size : sizes) total += (size + 15) / 16 * 16;
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t capacity = 0;
    if (total > capacity) memory.reset(), memory.reset(new float[total]), capacity = total;
    float* next = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(float);
    for (int i = 0; i < 5; ++i) *parts[i] = next, next += (sizes[i] + 15) / 16 * 16;
    s = reinterpret_cast<uint16_t*>(next), z = s + features;
  }
};

// C of the tokens [m_begin, m_end) and a run of features, slice by slice.
struct Walk {
  const Problem& p;
  const Kernels& kernels;
  bool direct;
  int64_t m_begin, m_end;

  int64_t tokens() const { return m_end - m_begin; }
  // Rows of the weight that meet more than zeros: what A does not have counts as such.
  int64_t K_used() const { return p.perm ? p.K : (p.K_A + TILE_K - 1) / TILE_K * TILE_K; }

  // A of the rows [k_begin, k_end) of the weight in FP32: (blocks of kBlockK rows, tokens, kBlockK).
  void load_A(int64_t k_begin, int64_t k_end, const Scratch& scratch) const {
    const int64_t bytes = element_bytes(p.dtype);
    for (int64_t m = 0; m < tokens(); ++m) {
      const char* A = static_cast<const char*>(p.A) + (m_begin + m) * p.lda * bytes;
      float* dst = scratch.A + m * kBlockK;
      if (p.perm) kernels.load_row(A, p.dtype, p.K_A, scratch.row), scratch.row[p.K_A] = 0.0f;
      for (int64_t k = k_begin; k < k_end; k += kBlockK, dst += tokens() * kBlockK) {
        const int64_t num_k = std::min<int64_t>(kBlockK, k_end - k);
        if (p.perm) {  // whatever is no column of A, negative ones too, reads the zero behind the last one
          const auto K_A = static_cast<uint32_t>(p.K_A);
          for (int64_t i = 0; i < num_k; ++i) {
            dst[i] = scratch.row[std::min(static_cast<uint32_t>(p.perm[k + i]), K_A)];
          }
        } else {
          const int64_t num_k_A = std::min(num_k, p.K_A - k);
          kernels.load_row(A + k * bytes, p.dtype, num_k_A, dst);
          std::fill(dst + num_k_A, dst + num_k, 0.0f);
        }
      }
    }
  }

  // A_sums (tokens, kMaxRuns) of a block as direct wants them. Returns a bit for each token that has a value which a sum of
  // the block's rows might not survive: 2^100 or more, Inf, NaN.
  unsigned sum_runs(const Panel& panel, const float* A, float* A_sums) const {
    unsigned extreme = 0;
    for (int64_t m = 0; m < tokens(); ++m) {
      int left = panel.group_k16_left;
      float* sum = A_sums + m * kMaxRuns;
      *sum = 0.0f;
      for (int k16 = 0; k16 < panel.num_k16; ++k16, --left) {
        if (left == 0) *++sum = 0.0f, left = panel.group_k16;
        const float* a = A + m * kBlockK + k16 * TILE_K;
        float part[4] = {};  // four chains of additions instead of one
        bool far = false;
        for (int i = 0; i < TILE_K; ++i) part[i % 4] += a[i], far |= !(std::abs(a[i]) < 0x1p100f);
        *sum -= (part[0] + part[1]) + (part[2] + part[3]), extreme |= unsigned{far} << m;
      }
    }
    return extreme;
  }

  // The features [n_begin, n_end), both on chunks. If A_held, scratch.A has all of A. Returns what sum_runs does.
  unsigned run_slice(const Scratch& scratch, bool A_held, int64_t n_begin, int64_t n_end) const {
    const int64_t features = n_end - n_begin;
    const int64_t max_tokens = direct ? tokens() : kernels.max_tokens;
    unsigned extreme = 0;
    float A_sums[kMaxTile * kMaxRuns];
    const int64_t num_tiles = (tokens() + max_tokens - 1) / max_tokens;
    const int tile_small = static_cast<int>(tokens() / num_tiles), num_larger = static_cast<int>(tokens() % num_tiles);

    // Scales: one group comes in another order, which is brought to the usual one; then both are read alike.
    const bool zeros = p.z != nullptr, channelwise = p.group == p.K;
    const auto* s = static_cast<const uint16_t*>(p.s) + n_begin;
    const auto* z = zeros ? static_cast<const uint16_t*>(p.z) + n_begin : nullptr;
    if (channelwise) {
      for (int64_t n = 0; n < features; ++n) {
        scratch.s[scale_of(n)] = s[scale_of_channelwise(n)];
        if (zeros) scratch.z[scale_of(n)] = z[scale_of_channelwise(n)];
      }
      s = scratch.s, z = zeros ? scratch.z : nullptr;
    }

    std::fill_n(scratch.sums, tokens() * features, 0.0f);
    for (int64_t k = 0; k < K_used(); k += kBlockK) {
      const int64_t num_k = std::min<int64_t>(kBlockK, K_used() - k);
      const float* A_block = scratch.A + (A_held ? k * tokens() : 0);
      if (!A_held) load_A(k, k + num_k, scratch);
      Panel panel;
      const int32_t* block_B = static_cast<const int32_t*>(p.B) + k / TILE_K * 2 * p.N + 2 * n_begin;
      const int32_t* next_block_B = k + kBlockK < K_used() ? block_B + kBlockK / TILE_K * 2 * p.N : block_B;
      panel.B = block_B, panel.b_stride = 2 * p.N;
      panel.s = s + k / p.group * p.N, panel.s_stride = p.N, panel.s_dtype = p.scale_dtype;
      panel.z = zeros ? z + k / p.group * p.N : nullptr;
      panel.num_k16 = static_cast<int>(num_k / TILE_K), panel.group_k16 = static_cast<int>(p.group / TILE_K);
      panel.group_k16_left = static_cast<int>((p.group - k % p.group) / TILE_K);
      if (direct && zeros) extreme |= sum_runs(panel, A_block, A_sums);
      for (int64_t n = 0; n < features; n += kernels.features) {
        // What comes after the last panel is the next block of the first one.
        panel.B_next = n + kernels.features < features ? panel.B + 2 * kernels.features : next_block_B;
        if (!direct) kernels.unpack[zeros](panel, scratch.W);
        const float* A = A_block;
        float* sums = scratch.sums + n * tokens();
        for (int64_t tile_idx = 0; tile_idx < num_tiles; ++tile_idx) {
          const int tile = tile_small + (tile_idx < num_larger);
          if (direct) {
            kernels.direct[zeros][tile - 1](panel, A, A_sums, sums);
          } else {
            kernels.multiply[tile - 1](A, scratch.W, static_cast<int>(num_k), sums);
          }
          A += tile * kBlockK, sums += tile * kernels.features;
        }
        panel.B += 2 * kernels.features, panel.s += kernels.features;
        if (zeros) panel.z += kernels.features;
      }
    }
    store_slice(scratch, n_begin, n_end);
    return extreme;
  }

  void store_slice(const Scratch& scratch, int64_t n_begin, int64_t n_end) const {
    const int64_t bytes = element_bytes(p.dtype), n_stop = std::min(n_end, p.N_C);  // features beyond are padding
    std::fill_n(scratch.bias, n_end - n_begin, 0.0f);
    if (p.bias && n_begin < n_stop) {
      kernels.load_row(static_cast<const char*>(p.bias) + n_begin * bytes, p.dtype, n_stop - n_begin, scratch.bias);
    }
    int64_t source[TILE_N];  // where the sum of a feature of a chunk is, from that of the first one
    for (int u = 0; u < TILE_N; ++u) {
      const int panel_begin = u / kernels.features * kernels.features;
      source[unpacked_feature(kernels.features, u)] = panel_begin * tokens() + u - panel_begin;
    }
    // Token by token: rows of C are often a power of two apart, and their lines push each other out of the caches.
    for (int64_t m = 0; m < tokens(); ++m) {
      char* C = static_cast<char*>(p.C) + (m_begin + m) * p.N_C * bytes;
      for (int64_t n = n_begin; n < n_stop; n += TILE_N) {
        const float* sums = scratch.sums + (n - n_begin) * tokens() + m * kernels.features;
        float row[TILE_N];
        for (int i = 0; i < TILE_N; ++i) row[i] = sums[source[i]] + scratch.bias[n - n_begin + i];
        kernels.store_row(row, p.dtype, std::min<int64_t>(TILE_N, n_stop - n), C + n * bytes);
      }
    }
  }

  // The features [n_begin, n_end), cut into slices whose sums stay in cache. Where there are several, A is brought to FP32
  // once for all of them if it does not take too much memory; where its columns are permuted, always: see
  // num_token_blocks.
  void run(int64_t n_begin, int64_t n_end) const {
    const int64_t most = std::max<int64_t>(1, kSumsFloats / tokens() / TILE_N) * TILE_N;
    const bool several = n_end - n_begin > most && tokens() * K_used() <= kHeldFloats, A_held = several || p.perm;
    const Scratch scratch(tokens(), A_held ? (K_used() + kBlockK - 1) / kBlockK * kBlockK : kBlockK,
                          std::min(most, n_end - n_begin), p.perm ? p.K_A + 1 : 0);
    if (A_held) load_A(0, K_used(), scratch);
    unsigned extreme = 0;
    for (int64_t n = n_begin; n < n_end; n += most) {
      extreme |= run_slice(scratch, A_held, n, std::min(n + most, n_end));
    }
    // Inf (q - 8) + (8 - z) Inf is NaN where Inf (q - z) may be Inf: such tokens once more, by themselves and without it.
    for (int64_t m = m_begin; extreme != 0; ++m, extreme >>= 1) {
      if (extreme & 1) Walk{p, kernels, false, m, m + 1}.run(n_begin, n_end);
    }
  }
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Entry points
// ---------------------------------------------------------------------------------------------------------------------

Isa cpu_best_isa() {
#if MARLIN_X86
  static const Isa best = [] {  // once: in a virtual machine cpuid costs microseconds
    // The builtin asks the operating system too; not every compiler's knows F16C: bit 29 of ecx of leaf 1.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return !avx2 ? Isa::portable : avx512 ? Isa::avx512 : Isa::avx2;
  }();
  return best;
#endif
  return Isa::portable;
}

int64_t cpu_num_tasks(const Problem& p) { return num_token_blocks(p) * (p.N / TILE_N); }

Status cpu_run(const Problem& p, Isa isa, int64_t begin, int64_t end) {
  if (const Status status = check_shape(p); status != Status::ok) return status;
  if (p.dtype != DType::f16 && p.dtype != DType::bf16 && p.dtype != DType::f32) return Status::bad_dtype;
  if (p.scale_dtype != DType::f16 && p.scale_dtype != DType::bf16) return Status::bad_dtype;
  if (isa > cpu_best_isa()) return Status::no_config;
  const Kernels& kernels = kernels_of(isa);
  const int64_t chunks = p.N / TILE_N, blocks = num_token_blocks(p);
  end = std::min(end, blocks * chunks);
  // Neighbouring tasks of one token block go together, so that A is converted once for all of them. No sum depends on how
  // features are sliced, so that the bits do not either.
  while (begin < end) {
    const int64_t block = begin / chunks, chunk = begin % chunks;
    const int64_t m_begin = p.M * block / blocks, m_end = p.M * (block + 1) / blocks;
    const int64_t num_chunks = std::min(end - begin, chunks - chunk);
    const bool direct = p.M <= kernels.max_tokens_direct;
    Walk{p, kernels, direct, m_begin, m_end}.run(chunk * TILE_N, (chunk + num_chunks) * TILE_N);
    begin += num_chunks;
  }
  return Status::ok;
}

}  // namespace marlin
