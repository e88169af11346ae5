// marlin_sm90_few.cu: C = A @ dequant(B) on Hopper for at most 16 tokens, where the time to read B counts most. FP16.
//
// Depends on marlin.h and layout.h; bindings.cpp calls choose_config_sm90_few and run_sm90_few. A plain C++ compiler sees
// only the host part that needs no CUDA (choose_config_sm90_few), so that its tests run anywhere.
//
// The product is computed transposed, C^T = B^T A^T: the weights are the left operand of mma.m16n8k16 (16 features), the
// tokens its n dimension. The packed words are left operands already.
//
//   warp     takes every kWarps-th stage (64 rows of the weight) of its CTA's stripe and has a ring of stages of its own,
//            which it fills by cp.async: warps meet only where a tile of C ends
//   tile     64 features, all tokens
//   stripe   all tiles, each K / 64 stages long, form one line, cut into equal stripes, one per CTA; a tile cut by the border
//            of a stripe is summed in FP32, always in the order of the line, by the CTA that comes last to the end of its part
//
// A launch overlaps with the one before it (programmatic dependent launch): the first weights are on their way before that
// one ends.
#include <initializer_list>

#include "marlin.h"

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Configurations
// ---------------------------------------------------------------------------------------------------------------------

constexpr int STAGE_K = 64;                    // rows of the weight in a stage
constexpr int STEPS = STAGE_K / TILE_K;        // k16 steps in it
constexpr int SCALE_K = 32;                    // rows that certainly share a scale; groups are multiples of it
constexpr int SCALE_ROWS = STAGE_K / SCALE_K;  // rows of scales in a stage, at most
constexpr int B_BYTES = TILE_N * STAGE_K / 2, S_BYTES = TILE_N * SCALE_ROWS * 2;  // of a stage
// Of a warp's patch, in which it lays out its sums as rows of C; + 4 spreads four tokens over all banks.
constexpr int PATCH_PITCH = TILE_N + 4;

struct Tile {
  int tokens;  // 1, 8 or 16
  int warps;
  int stages;  // in each warp's ring
  int per_sm;  // CTAs on a multiprocessor: 1, or 2 of which one reads while the other finishes a tile

  MARLIN_HD constexpr int a_bytes() const { return tokens * STAGE_K * 2; }
  // 16 tokens come by a tensor map, one copy a stage, into a ring apart: its swizzle counts from multiples of 1024 bytes.
  MARLIN_HD constexpr bool maps_a() const { return tokens == 16; }
  MARLIN_HD constexpr int mapped_bytes() const { return maps_a() ? stages * a_bytes() : 0; }
  MARLIN_HD constexpr int stage_bytes() const { return B_BYTES + S_BYTES + (maps_a() ? 0 : a_bytes()); }
  MARLIN_HD constexpr int patch_bytes() const { return tokens * PATCH_PITCH * 4; }
  // Where there is room for two patches a warp, a tile's sums are added up only when the next one ends.
  MARLIN_HD constexpr int patches() const { return tokens <= 8 ? 2 : 1; }
  MARLIN_HD constexpr int smem_bytes() const {
    return warps * (mapped_bytes() + stages * stage_bytes() + patches() * patch_bytes());
  }
};

// The measured ones: microseconds on an H200 of a stage, of a tile's end, of a tile that several CTAs share, for each of
// them, and of a launch; fitted to the times of Llama's and smaller shapes (docs/kernel.md).
struct TileCost {
  Tile tile;
  float stage_us, tile_us, sharer_us, start_us;
};

constexpr TileCost kTiles[] = {
    // 1 token
    {{1, 16, 3, 1}, 0.0606f, 0.45f, 0.33f, 0.65f},
    {{1, 8, 3, 2}, 0.0044f, 0.45f, 0.33f, 2.76f},
    // 8
    {{8, 16, 3, 1}, 0.0637f, 0.48f, 0.27f, 1.13f},
    {{8, 8, 3, 2}, 0.0055f, 0.47f, 3.10f, 1.07f},
    // 16
    {{16, 12, 3, 1}, 0.1019f, 0.96f, 0.64f, 0.70f},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

// Groups that a stage has one or two of; offsets that fit 32 bits, and divisors that __umulhi divides by exactly.
constexpr bool takes(const Problem& p) {
  constexpr int64_t kMaxSize = int64_t{1} << 22, kMaxProduct = int64_t{1} << 32;
  const int64_t stages = ceil_div(p.K, STAGE_K);
  return stages > 1 && (p.group == p.K || p.group % SCALE_K == 0) && p.N <= kMaxSize && p.K <= kMaxSize &&
         p.lda <= kMaxSize && ceil_div(p.N, TILE_N) * stages * stages < kMaxProduct;
}

// Of the tiles that hold so many tokens, those with the fewest.
constexpr bool is_measured(const Tile& tile, int64_t M) { return tile.tokens == (M == 1 ? 1 : M <= 8 ? 8 : 16); }

constexpr uint32_t magic_of(int64_t divisor) { return static_cast<uint32_t>(ceil_div(int64_t{1} << 32, divisor)); }

// A tile, and the CTAs that get a stripe, with the time that the fit predicts.
Config make_config(const Problem& p, int tile_idx, int stripes) {
  constexpr int kSms = 132;
  constexpr float kBytesPerUs = 4.3e6f / kSms;  // of one of them; of the same fit
  const TileCost& cost = kTiles[tile_idx];
  const Tile& tile = cost.tile;
  const int64_t stages = ceil_div(p.K, STAGE_K), tiles = ceil_div(p.N, TILE_N), total = stages * tiles;
  stripes = static_cast<int>(total < stripes ? total : stripes);
  const int64_t stripe = ceil_div(total, stripes);
  // the CTAs that share a tile: one, several that each have an equal part, or a number more that cut it anywhere
  const bool even = stripes % tiles == 0;
  const int64_t sharers = tiles % stripes == 0 ? 0 : even ? stripes / tiles : ceil_div(stripes, tiles) + 1;
  const int64_t ends = sharers == 0 ? tiles / stripes : even ? 1 : ceil_div(stripe, stages) + 1;

  Config config;
  config.tile_idx = tile_idx;
  config.features = TILE_N;
  config.tokens = tile.tokens;
  config.grid = stripes;
  // a counter, and the words of two parts of tiles, for each CTA
  config.num_locks = sharers == 0 ? 0 : stripes * (1 + 2 * TILE_N * tile.tokens);

  const float rounds = static_cast<float>(ceil_div(stripe, tile.warps) * tile.warps);
  const float compute_us = rounds * cost.stage_us + static_cast<float>(ends) * cost.tile_us;
  const float memory_us = static_cast<float>(ceil_div(stripes, kSms) * stripe * B_BYTES) / kBytesPerUs;
  config.us =
      cost.start_us + (compute_us > memory_us ? compute_us : memory_us) + static_cast<float>(sharers) * cost.sharer_us;
  return config;
}

// The most CTAs, up to as many, of which each has whole tiles, or each tile the same number of CTAs.
constexpr int even_stripes(int64_t tiles, int most) {
  while (tiles % most != 0 && most % tiles != 0) --most;
  return most;
}

}  // namespace

Config choose_config_sm90_few(const Problem& p, const Device& device, const Hints& hints) {
  Config best;
  if (p.dtype != DType::f16 || device.capability != 90 || p.M == 0 || !takes(p)) return best;
  const bool wished = hints.num_sms > 0;
  for (int i = 0; i < kNumTiles; ++i) {
    const Tile& tile = kTiles[i].tile;
    if (p.M > tile.tokens || tile.smem_bytes() > device.smem_bytes) continue;
    if ((hints.tile_n > 0 && hints.tile_n != TILE_N) || (hints.tile_idx >= 0 && hints.tile_idx != i)) continue;
    if (hints.tile_idx < 0 && !is_measured(tile, p.M)) continue;
    const int all = device.num_sms * tile.per_sm, most = wished && hints.num_sms < all ? hints.num_sms : all;
    for (const int stripes : {even_stripes(ceil_div(p.N, TILE_N), most), most}) {
      const Config config = make_config(p, i, stripes);
      if (best.tile_idx < 0 || config.us < best.us) best = config;
    }
  }
  return best;
}

}  // namespace marlin

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// PTX
// ---------------------------------------------------------------------------------------------------------------------

// Two values that another CTA may write or read at the same time; each arrives whole.
__device__ inline void store_relaxed(uint2* gmem, uint2 v) {
  asm volatile("st.relaxed.gpu.v2.u32 [%0], {%1, %2};" ::"l"(gmem), "r"(v.x), "r"(v.y) : "memory");
}

__device__ inline uint2 load_relaxed(const uint2* gmem) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(gmem) : "memory");
  return v;
}

__device__ inline int fetch_add(int32_t* gmem, int value) {
  int old;
  asm volatile("atom.relaxed.gpu.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(gmem), "r"(value) : "memory");
  return old;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dequantise
// ---------------------------------------------------------------------------------------------------------------------

// A left operand, exactly q - 8: register 0: features g, k 2t and 2t + 1; 1: features g + 8; 2 and 3: the same at k + 8.
// 0x6400 is fp16 1024 with a unit of 1 in its lowest bit, so 0x6400 | q is 1024 + q and 0x6400 | q << 4 is 1024 + 16 q.
__device__ inline void dequantise(uint32_t word, uint32_t (&left)[4]) {
  const half2 k1032 = as_half2(0x64086408), kSixteenth = as_half2(0x2c002c00), kMinus72 = as_half2(0xd480d480);
#pragma unroll
  for (int r = 0; r < 2; ++r, word >>= 8) {
    left[r] = as_bits(__hsub2(as_half2(and_or<0x000f000f, 0x64006400>(word)), k1032));
    left[r + 2] = as_bits(__hfma2(as_half2(and_or<0x00f000f0, 0x64006400>(word)), kSixteenth, kMinus72));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

struct Args {
  // What the first copies need comes first: the parameters come from memory too, 64 bytes at a time.
  const void *B, *s, *A;
  int stripe;                                      // stages of a CTA, floor(all / gridDim.x) ...
  int longer;                                      // ... and one more for this many first CTAs
  int k_stages;                                    // stages in a tile of C: ceil(K / 64)
  uint32_t k_magic;                                // ceil(2^32 / k_stages), which divides by __umulhi
  uint32_t group_magic;                            // the same for group / 16, if not channelwise
  int k16_rows;                                    // K / 16
  uint32_t b_row_bytes, s_row_bytes, a_row_bytes;  // of a k16 row of B, of a row of s, of A
  int tokens, whole_stages;                        // M, stages of A that are full: K_A / 64
  uint32_t b_step_bytes;                           // of B from a stage to the warp's next
  int k_a;                                         // K_A
  bool wide_c;                                     // C takes 4-byte stores
  int32_t* counters;                               // of the shared tiles, by the first CTA of each
  uint2* parts;                                    // two for each CTA: of the tile of its first stage, and of its last
  const half* bias;                                // or null
  half* C;
  int64_t n_c;  // its row length
  CUtensorMap a_map;
};

enum class Scales {
  channelwise,  // one a feature
  whole,        // a stage has one row
  halves,       // or two
};

// kShares: CTAs share tiles; without that there is less code to fetch.
template <int kTokens, int kWarps, int kStages, int kPerSm, Scales kScales, bool kShares>
__global__ void __launch_bounds__(32 * kWarps, kPerSm) marlin_kernel(const __grid_constant__ Args args) {
  constexpr Tile kTile{kTokens, kWarps, kStages, kPerSm};
  constexpr int kThreads = 32 * kWarps;
  constexpr uint32_t kStageBytes = kTile.stage_bytes(), kRingBytes = kStages * kStageBytes;
  constexpr uint32_t kSOffset = B_BYTES, kAOffset = B_BYTES + S_BYTES;  // in a stage

  launch_dependents();
  const int cta = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform: scalar registers
  constexpr bool kGrouped = kScales != Scales::channelwise, kHalves = kScales == Scales::halves;

  constexpr bool kMapsA = kTile.maps_a();
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ int ticket_smem[2];
  __shared__ uint64_t barriers[2 + (kMapsA ? kWarps * kStages : 0)];
  const uint32_t patches_full = smem_address(barriers), patches_free = smem_address(barriers + 1);
  const uint32_t a_full = smem_address(barriers + 2) + warp * (kStages * 8);  // of the ring for mapped activations
  const uint32_t a_ring = smem_address(smem) + warp * kTile.mapped_bytes();
  const uint32_t ring = smem_address(smem) + kWarps * kTile.mapped_bytes() + warp * kRingBytes;
  float* const patches = reinterpret_cast<float*>(smem + kWarps * (kTile.mapped_bytes() + kRingBytes));

  // A CTA that shares no tile takes every gridDim.x-th: so CTAs side by side read rows of B side by side.
  auto begin_of = [&](int of) { return kShares ? of * args.stripe + min(of, args.longer) : 0; };
  const int stripe_begin = begin_of(cta), stripe_end = kShares ? begin_of(cta + 1) : args.stripe;
  auto column_of = [&](int tile) { return (kShares ? tile : tile * static_cast<int>(gridDim.x) + cta) * TILE_N; };
  int begin = stripe_begin;        // of this CTA's next part of a tile
  int unit = stripe_begin + warp;  // this warp's next stage in the line

  // ---- issue next loads: a cursor that runs ahead of the products, over the borders of tiles -------------------------
  // Of a stage a lane copies 16 bytes of each k16 row of B, of rows `row` and `row` + 4 of A, and of row `row` of s.
  const int piece = lane % 8, row = lane / 8;
  const uint32_t b_wr = made(ring + lane * 16);  // and where it puts s, behind kSOffset
  const uint32_t a_wr = made(ring + kAOffset + row * 128 + ((piece ^ row) << 4));
  const uint32_t a_wr4 = (a_wr ^ 64) + 512;  // row + 4
  const bool s_mine = kGrouped && row < (kHalves ? 2 : 1);
  int load_unit = unit;         // this warp's first stage that is not in the plan
  int easy = 0;                 // the plan: so many whole stages, one after the other down a tile
  int load_k16;                 // the first k16 row of the next
  const char *b_gmem, *a_gmem;  // where it lies
  const char* s_column;         // where the first row of scales has this lane's piece

  auto plan_loads = [&] {
    const int tile = __umulhi(load_unit, args.k_magic), k = load_unit - tile * args.k_stages;
    const int n0 = column_of(tile);
    load_k16 = k * STEPS;
    b_gmem =
        static_cast<const char*>(args.B) + static_cast<uint64_t>(load_k16) * args.b_row_bytes + (n0 * 8 + lane * 16);
    a_gmem = static_cast<const char*>(args.A) + static_cast<uint64_t>(row) * args.a_row_bytes +
             (k * STAGE_K + piece * 8) * 2;
    s_column = static_cast<const char*>(args.s) + (n0 + piece * 8) * 2;
    easy = static_cast<uint32_t>(max(0, min(args.whole_stages - k, stripe_end - load_unit)) + kWarps - 1) / kWarps;
    load_unit += easy * kWarps;
    // What is read when C is written, 128 bytes each: else that waits for DRAM.
    if (lane == 0 && !kGrouped) prefetch(s_column);
    if (lane == 0 && args.bias != nullptr && n0 < args.n_c) prefetch(args.bias + n0);
  };
  auto load_scales = [&](uint32_t to, int k16) {
    const uint64_t at = static_cast<uint64_t>(__umulhi(k16, args.group_magic)) * args.s_row_bytes;
    if (s_mine) cp_async16(to + kSOffset, s_column + at);
  };
  auto load_weights = [&](int slot) {
    const uint32_t to = b_wr + slot * kStageBytes;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) cp_async16(to + i * 512, b_gmem + static_cast<uint64_t>(i) * args.b_row_bytes);
    load_scales(to, load_k16 + (kHalves ? row * (SCALE_K / TILE_K) : 0));
  };
  auto load_box = [&](int slot) {
    if (elected()) {
      barrier_expect(a_full + 8 * slot, kTile.a_bytes());
      copy_box(a_ring + slot * kTile.a_bytes(), args.a_map, load_k16 * TILE_K, 0, a_full + 8 * slot);
    }
  };
  auto load_activations = [&](int slot) {
    if constexpr (kMapsA) {
      load_box(slot);
    } else {
      if (row < args.tokens) cp_async16(a_wr + slot * kStageBytes, a_gmem);
      if (kTokens > 4 && row + 4 < args.tokens) {
        cp_async16(a_wr4 + slot * kStageBytes, a_gmem + static_cast<uint64_t>(4) * args.a_row_bytes);
      }
    }
  };
  auto step_loads = [&] {
    --easy;
    load_k16 += kWarps * STEPS;
    b_gmem += args.b_step_bytes;
    a_gmem += kWarps * STAGE_K * 2;
  };
  // The stage at the end of K: rows behind it keep what they are, with zeros for activations.
  auto load_last = [&](int slot) {
    const uint32_t to = b_wr + slot * kStageBytes;
    const int rows = args.k16_rows - load_k16;
#pragma unroll 1
    for (int i = 0; i < min(rows, STEPS); ++i) {
      cp_async16(to + i * 512, b_gmem + static_cast<uint64_t>(i) * args.b_row_bytes);
    }
    load_scales(to, load_k16 + (kHalves ? min(row * (SCALE_K / TILE_K), rows - 1) : 0));
    if constexpr (kMapsA) {
      load_box(slot);
    } else {
      const int bytes = max(0, min(16, 2 * (args.k_a - load_k16 * TILE_K - piece * 8)));
#pragma unroll 1
      for (int i = 0; row + 4 * i < args.tokens; ++i) {
        const char* const from = a_gmem + static_cast<uint64_t>(4 * i) * args.a_row_bytes;
        cp_async16((i == 0 ? a_wr : a_wr4) + slot * kStageBytes, bytes > 0 ? from : static_cast<const char*>(args.A),
                   bytes);
      }
    }
    load_unit += kWarps;
  };
  auto load_stage = [&](int slot) {
    if (easy == 0 && load_unit < stripe_end) {
      plan_loads();
      if (easy == 0) load_last(slot);
    }
    if (easy > 0) {
      load_weights(slot);
      load_activations(slot);
      step_loads();
    }
    cp_async_commit();  // also when empty: the count of groups is the clock of the ring
  };

  // ---- load fragments, dequantise, multiply --------------------------------------------------------------------------
  // Sums of a group are scaled, not its weights: 9 instructions a word instead of 13.
  constexpr int kBlocks = (kTokens + 7) / 8;  // of tokens
  float acc[4][kBlocks][4];                   // (m16 blocks, n8 blocks, features g and g + 8 x tokens 2t and 2t + 1)
  int slot_rd = 0, slot_wr = kStages - 1, parity = 0;
  const uint32_t s_rd = made(ring + kSOffset + lane / 4 * 16);
  // ldmatrix: lane l points at row l % 8 of piece l / 8: two steps of k16. A single token is read eight times.
  const int a_rd_row = kTokens == 1 ? 0 : lane % 8;
  const uint32_t a_rd0 = (kMapsA ? a_ring : ring + kAOffset) + a_rd_row * 128;
  const uint32_t a_rd[2] = {made(a_rd0 + ((lane / 8 ^ a_rd_row) << 4)),
                            made(a_rd0 + (((lane / 8 + 4) ^ a_rd_row) << 4))};

  auto multiply_stage = [&] {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // ... for every lane, and every lane has read the stage before: its place is free for new loads
    const uint32_t at = slot_rd * kStageBytes, a_at = kMapsA ? slot_rd * kTile.a_bytes() : at;
    if constexpr (kMapsA) {
      barrier_wait(a_full + 8 * slot_rd, parity);
      parity ^= slot_rd == kStages - 1;
    }
    uint32_t words[STEPS][4], right[STEPS][kBlocks][2], scales[SCALE_ROWS][4];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) load_smem(words[i], b_wr + at + i * 512);
#pragma unroll
    for (int i = 0; i < STEPS; i += 2) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) ldmatrix_x4(right[i][j], right[i + 1][j], a_rd[i / 2] + a_at + j * 1024);
    }
    if (kGrouped) load_smem(scales[0], s_rd + at);
    if (kHalves) load_smem(scales[1], s_rd + at + S_BYTES / 2);
    load_stage(slot_wr);
    slot_wr = slot_rd;
    slot_rd = slot_rd == kStages - 1 ? 0 : slot_rd + 1;

    float sums[4][kBlocks][4] = {};  // of one group, not yet scaled
    auto add_scaled = [&](const uint32_t (&pairs)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale = kGrouped ? __half22float2(as_half2(pairs[i])) : make_float2(1, 1);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] += sums[i][j][e] * (e < 2 ? scale.x : scale.y);
        }
      }
    };
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (kHalves && step == STEPS / 2) {
        add_scaled(scales[0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int v = 0; v < 4 * kBlocks; ++v) sums[i][v / 4][v % 4] = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t left[4];
        dequantise(words[step][i], left);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) mma_m16n8k16(sums[i][j], left, right[step][j]);
      }
    }
    add_scaled(scales[kHalves]);
  };

  // ---- finish a tile: sum over the warps, over the CTAs that share it, write --------------------------------------------
  constexpr int kPatch = kTokens * PATCH_PITCH, kPatches = kTile.patches();
  constexpr int kPairs = TILE_N / 2, kPartPairs = kTokens * kPairs;  // of features, in a row and in all
  // A CTA shares at most two tiles with others: that of its first stage, and that of its last.
  auto part_of = [&](int owner, int first) { return args.parts + (2 * owner + (owner == first)) * kPartPairs; };

  // What a part's words in memory say: its sums' complements, so that a word that is still zero is one that has not arrived:
  // no arithmetic makes a float of 32 ones. Who reads them makes them zero again.
  auto take_part = [&](uint2* part) {
    uint2 words;
    do words = load_relaxed(part);
    while (words.x == 0 || words.y == 0);
    *part = make_uint2(0, 0);
    return make_float2(__uint_as_float(~words.x), __uint_as_float(~words.y));
  };

  // Adds up the pairs of sums that a tile's end left, over the warps and over the CTAs from first to last, which share the
  // tile, and writes them; a CTA that drew another ticket than the last one leaves its sums to that one. Other threads each time.
  // Features that a thread adds up, of any tile and token, and what scales channelwise sums there: asked for ahead of a wait.
  static_assert(kPairs == 32 && kThreads % 32 == 0);
  auto feature_of = [&](int tile) { return column_of(tile) + lane * 2; };
  auto scales_of = [&](int tile) {
    if constexpr (kGrouped) return make_float2(1, 1);
    const half* const s = static_cast<const half*>(args.s);
    const int n = feature_of(tile);
    return make_float2(__half2float(s[scale_of_channelwise(n)]), __half2float(s[scale_of_channelwise(n + 1)]));
  };
  auto write_tile = [&](int end, int tile, int first, int last, float2 scales) {
    const float* const patches_rd = patches + end % kPatches * (kWarps * kPatch);
    const bool mine = !kShares || ticket_smem[end % 2] == last - first;
#pragma unroll 1
    for (int v = (threadIdx.x + end * kPartPairs) % kThreads; v < args.tokens * kPairs; v += kThreads) {
      const int m = v / kPairs, n = feature_of(tile);
      const float* const patch_rd = patches_rd + m * PATCH_PITCH + lane * 2;
      float2 sum = make_float2(0, 0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(patch_rd + w * kPatch);
        sum.x += part.x, sum.y += part.y;
      }
      if (!mine) {
        store_relaxed(part_of(cta, first) + v, make_uint2(~__float_as_uint(sum.x), ~__float_as_uint(sum.y)));
        continue;
      }
      if (first != last) {
        const float2 own = sum;
        sum = make_float2(0, 0);
#pragma unroll 1
        for (int other = first; other <= last; ++other) {
          const float2 part = other == cta ? own : take_part(part_of(other, first) + v);
          sum.x += part.x, sum.y += part.y;
        }
      }
      if (n >= args.n_c) continue;
      const bool both = n + 1 < args.n_c;
      if (!kGrouped) sum.x *= scales.x, sum.y *= scales.y;
      if (args.bias != nullptr) {
        sum.x += __half2float(args.bias[n]);
        if (both) sum.y += __half2float(args.bias[n + 1]);
      }
      const half2 c = __floats2half2_rn(sum.x, sum.y);
      half* const c_gmem = args.C + m * args.n_c + n;
      if (args.wide_c) {
        *reinterpret_cast<half2*>(c_gmem) = c;
      } else {
        c_gmem[0] = __low2half(c);
        if (both) c_gmem[1] = __high2half(c);
      }
    }
  };

  // A warp leaves its sums in its patch. With two of them it goes on then, if the tile is this CTA's alone and not its last, and
  // adds up its share when the next one ends: nobody has to be waited for. Whoever has left the sums of an end has added up
  // those of the end before, so that the patches of that one may be written.
  int ends = 0, put_off = -1;  // a tile
  auto finish_tile = [&](int tile, int first, int last, int ticket) {
    if (kPatches == 1 && ends > 0) barrier_wait(patches_free, (ends - 1) % 2);
    if (put_off >= 0) {
      const float2 scales = scales_of(put_off);
      barrier_wait(patches_full, (ends - 1) % 2);
      write_tile(ends - 1, put_off, cta, cta, scales);
    }
    if (kShares && threadIdx.x == 0) ticket_smem[ends % 2] = ticket;
    float* const patch_wr =
        patches + (ends % kPatches * kWarps + warp) * kPatch + lane % 4 * 2 * PATCH_PITCH + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (kTokens > 1 || (e % 2 == 0 && lane % 4 == 0)) {
            patch_wr[(8 * j + e % 2) * PATCH_PITCH + 16 * i + 8 * (e / 2)] = acc[i][j][e];
          }
        }
      }
    }
    barrier_arrive(patches_full);
    put_off = kPatches == 2 && first == last && begin < stripe_end ? tile : -1;
    if (put_off < 0) {
      const float2 scales = scales_of(tile);
      barrier_wait(patches_full, ends % 2);
      write_tile(ends, tile, first, last, scales);
      if (kPatches == 1) barrier_arrive(patches_free);
    }
    ++ends;
    if (threadIdx.x == 0 && first != last && ticket == last - first) args.counters[first] = 0;
  };

  // ---- main loop -----------------------------------------------------------------------------------------------------
  // Weights and scales do not depend on the kernel before. Only the first stage is ahead of the activations: groups of copies
  // are waited for in order. The code up to here is short on purpose: instructions come from memory too.
  if (load_unit < stripe_end) plan_loads();
  const bool ahead = easy > 0;
  if (ahead) load_weights(0);
  if constexpr (kMapsA) {
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) barrier_init(a_full + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      prefetch_map(args.a_map);
    }
    __syncwarp();
  }
  wait_for_previous_kernel();
  if (ahead) {
    load_activations(0);
    step_loads();
    cp_async_commit();
  }
#pragma unroll 1
  for (int slot = ahead; slot < kStages - 1; ++slot) load_stage(slot);
  if (threadIdx.x == 0) {
    barrier_init(patches_full, kThreads);
    if (kPatches == 1) barrier_init(patches_free, kThreads);
  }
  __syncthreads();

#pragma unroll 1
  for (int tile = __umulhi(begin, args.k_magic); begin < stripe_end; ++tile) {
    const int tile_begin = tile * args.k_stages, tile_end = tile_begin + args.k_stages;
    int first = cta, last = cta;  // the CTAs that share it
    while (kShares && begin_of(first) > tile_begin) --first;
    while (kShares && begin_of(last + 1) < tile_end) ++last;
    begin = min(stripe_end, tile_end);
    int rounds = (begin - unit + kWarps - 1) / kWarps;
    unit += rounds * kWarps;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int v = 0; v < 4 * kBlocks; ++v) acc[i][v / 4][v % 4] = 0;
    }
    // The ticket is drawn ahead of the end, so that the answer is there in time. Who draws the last one knows that all others
    // are running, and waits for their sums: nobody waits for a CTA that may not have started.
    int ticket = 0;
#pragma unroll 1
    for (int left = 1; left >= 0; --left) {
#pragma unroll 1
      for (; rounds > left; --rounds) multiply_stage();
      if (left == 1 && first != last && threadIdx.x == 0) ticket = fetch_add(args.counters + first, 1);
    }
    finish_tile(tile, first, last, ticket);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host
// ---------------------------------------------------------------------------------------------------------------------

template <int kIdx, Scales kScales, bool kShares>
Status launch(const Args& args, int grid, bool overlap, cudaStream_t stream) {
  constexpr Tile kTile = kTiles[kIdx].tile;
  const auto kernel = marlin_kernel<kTile.tokens, kTile.warps, kTile.stages, kTile.per_sm, kScales, kShares>;
  constexpr int kSmem = kTile.smem_bytes();
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem) != cudaSuccess) {
    return Status::launch_failed;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = 32 * kTile.warps;
  config.dynamicSmemBytes = kSmem;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess ? Status::ok : Status::launch_failed;
}

template <int kIdx>
Status launch_tile(const Args& args, int grid, bool overlap, Scales scales, bool shares, cudaStream_t stream) {
  auto launch_it = [&](auto value) {
    constexpr Scales kScales = decltype(value)::value;
    return shares ? launch<kIdx, kScales, true>(args, grid, overlap, stream)
                  : launch<kIdx, kScales, false>(args, grid, overlap, stream);
  };
  switch (scales) {
    case Scales::channelwise: return launch_it(std::integral_constant<Scales, Scales::channelwise>());
    case Scales::whole: return launch_it(std::integral_constant<Scales, Scales::whole>());
    case Scales::halves: return launch_it(std::integral_constant<Scales, Scales::halves>());
  }
  return Status::no_config;
}

template <int... kIdx>
Status launch_any(const Args& args, int grid, bool overlap, int tile_idx, Scales scales, bool shares,
                  cudaStream_t stream, std::integer_sequence<int, kIdx...>) {
  Status status = Status::no_config;
  ((tile_idx == kIdx && (status = launch_tile<kIdx>(args, grid, overlap, scales, shares, stream), true)) || ...);
  return status;
}

}  // namespace

Status run_sm90_few(const Problem& p, const Config& config, bool overlap, int32_t* locks, void* stream) {
  const Status status = check_for_cuda(p);
  if (status != Status::ok || p.M == 0) return status;
  if (config.tile_idx < 0 || config.tile_idx >= kNumTiles || config.grid < 1) return Status::no_config;
  const Tile& tile = kTiles[config.tile_idx].tile;
  const int64_t stages = ceil_div(p.K, STAGE_K), total = stages * ceil_div(p.N, TILE_N);
  if (!takes(p) || p.M > tile.tokens) return Status::bad_shape;

  const int grid = static_cast<int>(total < config.grid ? total : config.grid);
  Args args{p.B, p.s, p.A};
  args.stripe = static_cast<int>(total / grid);
  args.longer = static_cast<int>(total % grid);
  args.k_stages = static_cast<int>(stages);
  args.k_magic = magic_of(stages);
  args.group_magic = magic_of(p.group / TILE_K);
  args.k16_rows = static_cast<int>(p.K / TILE_K);
  args.b_row_bytes = static_cast<uint32_t>(8 * p.N);
  args.s_row_bytes = static_cast<uint32_t>(2 * p.N);
  args.a_row_bytes = static_cast<uint32_t>(2 * p.lda);
  args.tokens = static_cast<int>(p.M);
  args.whole_stages = static_cast<int>(p.K_A / STAGE_K);
  args.b_step_bytes = args.b_row_bytes * STEPS * tile.warps;
  args.k_a = static_cast<int>(p.K_A);
  args.wide_c = p.N_C % 2 == 0 && is_aligned(p.C, 4);
  args.bias = static_cast<const half*>(p.bias);
  args.C = static_cast<half*>(p.C);
  args.n_c = p.N_C;
  args.parts = reinterpret_cast<uint2*>(locks);
  args.counters = locks + int64_t{2} * grid * TILE_N * tile.tokens;
  if (tile.maps_a() && !encode_map(&args.a_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p.A, p.M, p.K_A, pitch_of_a(p),
                                   tile.tokens, STAGE_K, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return Status::launch_failed;
  }
  const Scales scales = p.group == p.K ? Scales::channelwise : p.group % STAGE_K == 0 ? Scales::whole : Scales::halves;
  const bool shares = config.num_locks > 0;
  return launch_any(args, grid, overlap, config.tile_idx, scales, shares, static_cast<cudaStream_t>(stream),
                    std::make_integer_sequence<int, kNumTiles>());
}

}  // namespace marlin
#endif
