// marlin_sm80.cu: C = A @ dequant(B) on tensor cores by mma.sync and cp.async: Ampere, Ada, and anything newer. FP16.
//
// Depends on marlin.h and layout.h; bindings.cpp calls choose_config_sm80 and run_sm80. A plain C++ compiler sees only the
// host part that needs no CUDA (choose_config_sm80), so that its tests run anywhere.
//
// The product is computed transposed, C^T = B^T A^T: the weights are the left operand of mma.m16n8k16 (16 features), the
// tokens its n dimension in steps of 8, so that one token costs one n8 block. The packed words are left operands already.
//
//   CTA      kTeams teams; each team runs through every kTeams-th stage (64 rows of the weight) of the CTA's stripe, with its
//            own ring of stages in shared memory, and meets the others only when a tile of C ends
//   team     kWarpsN x kWarpsM warps, 16 kBlocksN features x 8 kBlocksM tokens each; they share the stages
//   stripe   all tiles of C, each K / 64 stages long, form one line, cut into equal stripes, one per CTA; a tile cut by the
//            border of a stripe is summed in FP32 scratch by the CTA that finishes it last, always in the same order
#include <initializer_list>

#include "marlin.h"

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Configurations
// ---------------------------------------------------------------------------------------------------------------------

constexpr int STAGE_K = 64;                    // rows of the weight in a pipeline stage
constexpr int STEPS = STAGE_K / TILE_K;        // k16 steps in it
constexpr int SCALE_K = 32;                    // rows that certainly share a scale; groups are multiples of it
constexpr int SCALE_ROWS = STAGE_K / SCALE_K;  // rows of scales in a stage

struct Tile {
  int blocks_n;  // m16 feature blocks of a warp: 4, 2 for half a chunk, or 3 for three quarters, which may lie in two
  int blocks_m;  // n8 token blocks of a warp: 1 or an even number
  int warps_n;   // warps of a team along the features
  int warps_m;   // along the tokens
  int teams;
  int stages;  // in each team's ring

  MARLIN_HD constexpr int features() const { return 16 * blocks_n * warps_n; }
  // Of the chunks that the tile lies in: 96 begin at a chunk, or in its middle, and take two either way.
  MARLIN_HD constexpr int span() const { return (features() + 63) / 64 * 64; }
  MARLIN_HD constexpr int tokens() const { return 8 * blocks_m * warps_m; }
  MARLIN_HD constexpr int warps() const { return warps_n * warps_m * teams; }
  MARLIN_HD constexpr int b_bytes() const { return span() * STAGE_K / 2; }
  MARLIN_HD constexpr int s_bytes() const { return span() * SCALE_ROWS * 2; }
  MARLIN_HD constexpr int a_bytes() const { return tokens() * STAGE_K * 2; }
  MARLIN_HD constexpr int stage_bytes() const { return b_bytes() + a_bytes() + s_bytes(); }
  MARLIN_HD constexpr int patch_pitch() const { return 16 * blocks_n + 4; }  // + 4 spreads four tokens over all banks
  // A warp's patch, in which it lays out accumulators as rows of C, a few tokens x its features at a time.
  MARLIN_HD constexpr int patch_tokens() const { return blocks_m < 4 ? 8 : blocks_n == 2 && teams > 1 ? 32 : 16; }
  MARLIN_HD constexpr int patch_floats() const { return patch_tokens() * patch_pitch(); }
  MARLIN_HD constexpr int smem_bytes() const { return teams * stages * stage_bytes() + warps() * patch_floats() * 4; }
};

// The measured ones: microseconds on an H200 of one stage, of a tile's end, and of a tile's end that is shared with another
// CTA, fitted to the times of seven Llama shapes at 1 to 8192 tokens (docs/kernel.md).
struct TileCost {
  Tile tile;
  float stage_us, tile_us, shared_us;
};

constexpr TileCost kTiles[] = {
    // 8 tokens
    {{4, 1, 1, 1, 8, 4}, 0.0788f, 0.55f, 1.59f},
    {{4, 1, 4, 1, 4, 3}, 0.2600f, 0.20f, 8.00f},
    {{4, 1, 1, 1, 8, 3}, 0.0798f, 0.43f, 1.67f},
    // 16
    {{4, 2, 1, 1, 8, 4}, 0.0907f, 0.61f, 2.05f},
    {{4, 2, 4, 1, 3, 3}, 0.3395f, 0.32f, 3.35f},
    {{4, 2, 1, 1, 8, 2}, 0.1136f, 0.32f, 2.12f},
    // 32
    {{4, 4, 1, 1, 8, 3}, 0.1067f, 1.18f, 1.94f},
    {{4, 4, 4, 1, 3, 4}, 0.4346f, 0.51f, 3.57f},
    {{4, 4, 1, 1, 4, 3}, 0.1319f, 0.76f, 1.75f},
    // 48, 64
    {{4, 6, 2, 1, 4, 3}, 0.2946f, 0.39f, 3.21f},
    {{4, 6, 4, 1, 2, 4}, 0.5857f, 0.01f, 4.53f},
    {{4, 8, 2, 1, 4, 3}, 0.3606f, 1.67f, 3.24f},
    {{4, 8, 4, 1, 2, 4}, 0.7356f, 0.13f, 5.01f},
    {{4, 8, 2, 1, 2, 3}, 0.4527f, 0.92f, 3.23f},
    {{4, 6, 1, 1, 8, 2}, 0.1523f, 1.37f, 2.71f},
    {{4, 8, 1, 1, 8, 2}, 0.1766f, 2.53f, 2.78f},
    // 96, 128
    {{2, 16, 2, 1, 4, 2}, 0.3802f, 0.67f, 1.75f},
    {{2, 12, 2, 1, 4, 3}, 0.2721f, 2.40f, 0.01f},
    {{2, 12, 8, 1, 1, 4}, 1.0348f, 0.01f, 6.54f},
    {{2, 12, 4, 1, 2, 4}, 0.5293f, 0.33f, 3.56f},
    {{2, 16, 4, 1, 2, 4}, 0.6780f, 1.55f, 2.91f},
    {{2, 16, 8, 1, 1, 4}, 1.3331f, 0.01f, 5.75f},
    {{2, 16, 4, 1, 1, 4}, 0.7263f, 1.34f, 4.02f},
    // 96, 64, 128, by 96 features
    {{3, 6, 2, 1, 4, 3}, 0.2371f, 0.98f, 2.70f},
    {{3, 8, 2, 1, 4, 3}, 0.2886f, 0.92f, 3.68f},
    {{3, 8, 2, 2, 2, 3}, 0.5593f, 1.87f, 2.01f},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

// A tile, and CTAs that divide the tiles of C among them, with the time that the fit predicts.
Config make_config(const Problem& p, int tile_idx, int grid) {
  constexpr float kStartUs = 2.2f, kBytesPerUs = 4.3e6f;  // of the same fit
  const TileCost& cost = kTiles[tile_idx];
  const int features = cost.tile.features(), tokens = cost.tile.tokens();
  const int64_t stages = ceil_div(p.K, STAGE_K), tiles = ceil_div(p.N, features) * ceil_div(p.M, tokens);
  const int64_t total = stages * tiles;
  grid = static_cast<int>(total < grid ? total : grid);
  const int64_t stripe = ceil_div(total, grid);
  // the tiles that a CTA shares with others: none, one if every tile is cut alike, else that of either end of its stripe
  const int shared = tiles % grid == 0 ? 0 : grid % tiles == 0 ? 1 : 2;

  Config config;
  config.tile_idx = tile_idx;
  config.features = features;
  config.tokens = tokens;
  config.grid = grid;
  config.num_locks = shared == 0 ? 0 : grid;
  config.num_partials = shared == 0 ? 0 : int64_t{2} * grid * features * tokens;

  const float rounds = static_cast<float>(ceil_div(stripe, cost.tile.teams) * cost.tile.teams);
  const float ends = static_cast<float>(shared == 0 ? stripe / stages : shared + (stripe - 1) / stages);
  const float compute_us = rounds * cost.stage_us + ends * cost.tile_us;
  const float memory_us = static_cast<float>(p.K * p.N / 2) / kBytesPerUs;
  config.us = kStartUs + (compute_us > memory_us ? compute_us : memory_us) + shared * cost.shared_us;
  return config;
}

}  // namespace

Config choose_config_sm80(const Problem& p, const Device& device, const Hints& hints) {
  Config best;
  if (p.M == 0) return best;
  const bool wished = hints.num_sms != -1;
  const int most = wished && hints.num_sms < device.num_sms ? hints.num_sms : device.num_sms;
  for (int i = 0; i < kNumTiles; ++i) {
    const Tile& tile = kTiles[i].tile;
    if (tile.smem_bytes() > device.smem_bytes) continue;
    if (hints.tile_n != -1 && tile.features() != hints.tile_n) continue;
    if (hints.tile_idx != -1 && hints.tile_idx != i) continue;
    const int64_t tiles = ceil_div(p.N, tile.features()) * ceil_div(p.M, tile.tokens());
    int even = most;  // the most CTAs of which each has whole tiles, or each tile the same number of CTAs
    while (!wished && tiles % even != 0 && even % tiles != 0) --even;
    for (const int grid : {even, most}) {
      const Config config = make_config(p, i, grid);
      if (best.tile_idx == -1 || config.us < best.us) best = config;
    }
  }
  return best;
}

}  // namespace marlin

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <utility>

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// PTX
// ---------------------------------------------------------------------------------------------------------------------

// Counts up, publishes what the CTA wrote before, and sees what those wrote who counted before.
__device__ inline int fetch_add_acq_rel(int32_t* gmem, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.s32 %0, [%1], %2;" : "=r"(old) : "l"(gmem), "r"(value) : "memory");
  return old;
}

// The count so far. Does not order what is read later: fence_acq_rel does.
__device__ inline int load_relaxed(const int32_t* gmem) {
  int value;
  asm volatile("ld.relaxed.gpu.s32 %0, [%1];" : "=r"(value) : "l"(gmem) : "memory");
  return value;
}

__device__ inline void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// x in a register for good: the compiler would rather make it anew, from the thread's index, in every turn of the loop. It
// cannot see through a shuffle.
__device__ inline uint32_t keep(uint32_t x) { return __shfl_sync(0xffffffff, x, threadIdx.x % 32); }

// threadIdx.x, read anew: what a tile's end makes of it is not kept in registers through the main loop.
__device__ inline int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// A barrier among a warp, or so many threads of the CTA. id 0 is __syncthreads'.
template <int kThreads>
__device__ inline void barrier(int id) {
  if constexpr (kThreads == 32) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Dequantise
// ---------------------------------------------------------------------------------------------------------------------

// One register of a left operand: two of a word's eight values as q - 8, exactly. Register 0: features g, k 2t and 2t + 1;
// 1: features g + 8; 2 and 3: the same at k + 8.
// 0x6400 is fp16 1024 with a unit of 1 in its lowest bit, so 0x6400 | q is 1024 + q and 0x6400 | q << 4 is 1024 + 16 q.
__device__ inline half2 dequantise(uint32_t word, int r) {  // r is a constant after unrolling
  if (r % 2 == 1) word >>= 8;
  if (r < 2) return __hsub2(as_half2(and_or<0x000f000f, 0x64006400>(word)), as_half2(0x64086408));  // - 1032
  const half2 kSixteenth = as_half2(0x2c002c00), kMinus72 = as_half2(0xd480d480);                   // -1024 / 16 - 8
  return __hfma2(as_half2(and_or<0x00f000f0, 0x64006400>(word)), kSixteenth, kMinus72);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

__device__ inline float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

template <int kI, int kJ>
__device__ inline void clear(float (&v)[kI][kJ][4]) {
#pragma unroll
  for (int i = 0; i < kI * kJ * 4; ++i) v[i / (4 * kJ)][i / 4 % kJ][i % 4] = 0;
}

struct Args {
  Problem p;
  int k_stages;          // stages in a tile of C: ceil(K / 64)
  int token_tiles;       // tiles of C along the tokens, the fastest in the line
  int stripe;            // stages of a CTA, floor(all / gridDim.x) ...
  int longer;            // ... and one more for this many first CTAs
  int n, k_a, lda;       // p.N, p.K_A, p.lda
  int whole_stages;      // stages that are full: min(K, K_A) / 64
  int k16_rows;          // K / 16
  uint32_t group_magic;  // ceil(2^32 / (group / 16)), which divides by __umulhi; 0 for channelwise
  bool wide_c;           // C takes 8-byte stores
  int32_t* locks;
  float* partials;
};

// kShares: CTAs may share tiles; without that there is less code to fetch.
template <int kBlocksN, int kBlocksM, int kWarpsN, int kWarpsM, int kTeams, int kStages, bool kShares>
__global__ void __launch_bounds__(32 * kWarpsN * kWarpsM * kTeams, 1) marlin_kernel(const Args args) {
  constexpr Tile kTile{kBlocksN, kBlocksM, kWarpsN, kWarpsM, kTeams, kStages};
  constexpr int kFeatures = kTile.features(), kSpan = kTile.span(), kTokens = kTile.tokens();
  constexpr int kTeamWarps = kWarpsN * kWarpsM, kTeamThreads = 32 * kTeamWarps, kThreads = kTeamThreads * kTeams;
  constexpr bool kFew = kBlocksM <= 2;  // tokens: another inner loop
  static_assert(!kFew || (kBlocksN == 4 && kWarpsM == 1), "the loop for few tokens knows whole chunks only");
  static_assert(kFew || kBlocksM % 2 == 0, "ldmatrix brings two blocks");

  const Problem& p = args.p;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform: scalar registers
  const int team = kTeams == 1 ? 0 : warp / kTeamWarps, team_thread = threadIdx.x % kTeamThreads;
  const int warp_n = warp % kTeamWarps % kWarpsN, warp_m = warp % kTeamWarps / kWarpsN;
  const bool grouped = args.group_magic != 0;

  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ int is_last;
  const uint32_t ring = smem_address(smem) + team * kStages * kTile.stage_bytes();
  float* const patches = reinterpret_cast<float*>(smem + kTeams * kStages * kTile.stage_bytes());
  constexpr int kPatch = kTile.patch_floats(), kPitch = kTile.patch_pitch();
  constexpr uint32_t kAOffset = kTile.b_bytes(), kSOffset = kTile.b_bytes() + kTile.a_bytes();

  const int cta = blockIdx.x;
  const int stripe_begin = cta * args.stripe + min(cta, args.longer);
  const int stripe_end = stripe_begin + args.stripe + (cta < args.longer);

  auto team_barrier = [&] { barrier<kTeamThreads>(kTeams == 1 ? 0 : 1 + team); };

  // ---- issue next loads: a cursor that runs ahead of the products, over the borders of tiles -------------------------
  // In a stage, a thread copies every (kTeamThreads / kPiecesB)-th k16 row of one column of 16-byte pieces of B, the same
  // of A, and at most one piece of s, so that only three pointers move from stage to stage.
  constexpr int kPiecesB = kSpan / 2, kPiecesA = STAGE_K / 8, kPiecesS = kSpan / 8;  // in a row
  static_assert(kTeamThreads % kPiecesB == 0 && kTeamThreads % kPiecesA == 0 && kTeamThreads >= SCALE_ROWS * kPiecesS);
  constexpr int kRowsB = kTeamThreads / kPiecesB, kRowsA = kTeamThreads / kPiecesA;  // that the team copies at once
  const int b_row = team_thread / kPiecesB, b_piece = team_thread % kPiecesB;
  const int a_copy_row = team_thread / kPiecesA, a_piece = team_thread % kPiecesA;
  const int s_k16 = keep(team_thread / kPiecesS * (SCALE_K / TILE_K)), s_piece = team_thread % kPiecesS;
  const uint32_t a_wr = keep(ring + kAOffset + a_copy_row * 128 + ((a_piece ^ (a_copy_row & 7)) << 4));
  const uint32_t b_wr = keep(ring + team_thread * 16);  // and where it puts s, behind kSOffset
  const uint32_t b_row_bytes = 8 * args.n, a_row_bytes = 2 * args.lda, s_row_bytes = 2 * args.n;
  constexpr uint32_t kStageBytes = kTile.stage_bytes(), kLastStage = (kStages - 1) * kStageBytes;
  auto next_stage = [](uint32_t stage) { return stage == kLastStage ? 0 : stage + kStageBytes; };

  int load_tile, load_k;        // the stage to load next
  int load_k_plain;             // where this tile ends, or the stripe, or the first stage that is not full
  uint32_t stage_wr = 0;        // where it goes, from the start of the ring
  const char *b_gmem, *a_gmem;  // where the stage before the next came from
  uint32_t s_column;            // its first byte in a row of s
  int a_rows;                   // this thread has in the tile, counted from its first one
  int b_rows;                   // the same in the whole of K
  bool s_mine;                  // whether it copies scales

  auto load_k_end = [&] { return min(args.k_stages, stripe_end - load_tile * args.k_stages); };
  auto aim_loads = [&](int unit) {
    load_tile = unit / args.k_stages;
    load_k = unit - load_tile * args.k_stages;
    if (unit < stripe_end) {
      const int n0 = load_tile / args.token_tiles * kFeatures / 64 * 64;  // of the first chunk
      const int64_t m0 = static_cast<int64_t>(load_tile % args.token_tiles) * kTokens + a_copy_row;
      const int64_t before = load_k - kTeams;
      b_gmem = static_cast<const char*>(p.B) + (before * STEPS + b_row) * b_row_bytes + (n0 * 8 + b_piece * 16);
      a_gmem = static_cast<const char*>(p.A) + m0 * a_row_bytes + (before * STAGE_K + a_piece * 8) * 2;
      s_column = (n0 + s_piece * 8) * 2;
      a_rows = static_cast<int>(min(int64_t{kTokens - a_copy_row}, p.M - m0));
      b_rows = n0 + 2 * b_piece < args.n ? args.k16_rows - b_row : 0;
      s_mine = grouped && thread_anew() % kTeamThreads < SCALE_ROWS * kPiecesS && n0 + 8 * s_piece < args.n;
      load_k_plain = min(args.whole_stages, load_k_end());
    } else {  // nothing more to load
      a_rows = 0, b_rows = 0, s_mine = false, load_k_plain = INT_MAX / 2;
    }
  };

  // kRowsA is 4 only for single warps; then rows i + 4 sit in the other half of the eight permuted rows
  auto swizzle_of = [](int row) { return kRowsA % 8 == 0 ? 0 : (row & 4) << 4; };

  // What is rare: the next tile; and stages that are not full, which are copied here.
  auto prepare_loads = [&] {
    if (load_k < load_k_plain) return;
    if (load_k >= load_k_end()) aim_loads(load_tile * args.k_stages + load_k);
    if (load_k < load_k_plain) return;
#pragma unroll 1
    for (int i = 0; i < min(STEPS, b_rows - load_k * STEPS); i += kRowsB) {
      cp_async16(b_wr + stage_wr + i * kPiecesB * 16, b_gmem + kTeams * STEPS * b_row_bytes + i * b_row_bytes);
    }
    const int bytes = 2 * max(0, min(8, args.k_a - load_k * STAGE_K - a_piece * 8));  // zeros behind the last column
#pragma unroll 1
    for (int i = 0; i < min(a_rows, kTokens); i += kRowsA) {
      const char* from = bytes > 0 ? a_gmem + kTeams * STAGE_K * 2 + i * a_row_bytes : static_cast<const char*>(p.A);
      cp_async16(((a_wr + stage_wr) ^ swizzle_of(i)) + i * 128, from, bytes);
    }
  };

  // In two parts, to be issued between the products of a stage: no branches.
  auto issue_loads = [&](int part) {
    const bool whole = load_k < args.whole_stages;  // neither K nor the columns of A end in it
    if (part == 0) {
      b_gmem += kTeams * STEPS * b_row_bytes;
      a_gmem += kTeams * STAGE_K * 2;
      const uint32_t b_dst = made(b_wr + stage_wr);
#pragma unroll
      for (int i = 0; i < STEPS; i += kRowsB) {
        if (b_rows > 0 && whole) cp_async16(b_dst + i * kPiecesB * 16, b_gmem + i * b_row_bytes);
      }
      if (s_mine) {  // past the end of K the last row, whose products are zero
        const uint32_t k16 = min(load_k * STEPS + s_k16, args.k16_rows - 1);
        const uint32_t s_byte = __umulhi(k16, args.group_magic) * s_row_bytes + s_column;
        cp_async16(b_dst + kSOffset, static_cast<const char*>(p.s) + s_byte);
      }
    }
    if (part == 1) {
      const int rows = whole ? a_rows : 0;
      const uint32_t first_dst = made(a_wr + stage_wr);
#pragma unroll
      for (int i = 0; i < kTokens; i += kRowsA) {
        if (i < rows) cp_async16((first_dst ^ swizzle_of(i)) + i * 128, a_gmem + i * a_row_bytes);
      }
      cp_async_commit();  // also when empty: the count of groups is the clock of the ring
      stage_wr = next_stage(stage_wr);
      load_k += kTeams;
    }
  };

  // ---- wait for stage: the next one has landed ------------------------------------------------------------------------
  uint32_t stage_rd = kLastStage;  // the stage that is read; the first one comes next
  auto wait_for_stage = [&] {
    cp_async_wait<kStages - 2>();
    team_barrier();  // ... in every warp, and every warp has read the one before: its place is free for new loads
    stage_rd = next_stage(stage_rd);
  };

  // Where the warp's words and scales are. Three blocks take a load each: from which of a chunk's four on, and how many of them
  // lie in the next chunk, depends on the tile and the warp.
  static_assert(kBlocksN != 3 || kWarpsN == 2, "span() knows no other tiles that begin inside of a chunk");
  constexpr int kReads = kBlocksN == 3 ? 3 : 1;
  uint32_t b_rd[kReads], s_rd[kReads];
  auto aim_reads = [&](int tile) {
    const int first = kBlocksN == 3 ? tile / args.token_tiles * kFeatures / 16 % 4 : 0;
    const int block = first + warp_n * kBlocksN;  // from the stage's first
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int chunk = (block + i) / 4, word = (block + i) % 4;
      b_rd[i] = keep(ring + chunk * 512 + lane * 16 + word * 4);
      s_rd[i] = keep(ring + kSOffset + chunk * 128 + lane / 4 * 16 + word * 4);
    }
  };
  aim_reads(0);
  float acc[kBlocksN][kBlocksM][4];  // (m16 blocks, n8 blocks, features g and g + 8 x tokens 2t and 2t + 1)

  // ---- load fragments, dequantise, multiply: few tokens ------------------------------------------------------------
  // The issue slots decide: the sums of a group are scaled, not its weights, which takes 9 instructions a word instead of
  // 13. In between a warp just waits: there are up to four to a scheduler.
  auto multiply_few = [&] {
    wait_for_stage();
    uint32_t b_frag[STEPS][4], a_frag[STEPS][kBlocksM][2], s_frag[4];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) load_smem(b_frag[step], stage_rd + b_rd[0] + step * kSpan * 8);
    const uint32_t a_row_rd = ring + stage_rd + kAOffset + lane % 8 * 128;
#pragma unroll
    for (int i = 0; i < kBlocksM * STEPS / 2; ++i) {  // an n8 block, two steps
      const int step = i % 2 * 2, j = i / 2;
      const int piece = (lane / 8 + 2 * step) ^ (lane % 8);
      ldmatrix_x4(a_frag[step][j], a_frag[step + 1][j], a_row_rd + j * 1024 + (piece << 4));
    }
    load_smem(s_frag, stage_rd + s_rd[0] + kSpan * 2);
    prepare_loads();
#pragma unroll
    for (int part = 0; part < 2; ++part) issue_loads(part);

    float sums[4][kBlocksM][4];  // of one group, not yet scaled; shape as acc
    auto add_scaled = [&](const uint32_t (&scales)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale = __half22float2(as_half2(scales[i]));
#pragma unroll
        for (int j = 0; j < kBlocksM; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] += sums[i][j][e] * (e < 2 ? scale.x : scale.y);
        }
      }
    };
    clear(sums);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step == 2 && p.group % STAGE_K != 0) {  // two groups
        uint32_t first[4];
        load_smem(first, stage_rd + s_rd[0]);
        add_scaled(first);
        clear(sums);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t left[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) left[r] = as_bits(dequantise(b_frag[step][i], r));
#pragma unroll
        for (int j = 0; j < kBlocksM; ++j) mma_m16n8k16(sums[i][j], left, a_frag[step][j]);
      }
    }
    add_scaled(s_frag);
  };

  // ---- the same: many tokens -------------------------------------------------------------------------------------------
  // A step is worked off in chunks of token blocks, in which the left operand changes last. A warp reads ahead of its
  // products: the A of the next chunk, the words of the next step. These words are dequantised between the products of this
  // step, a register at a time: with two warps a scheduler, a run of conversions would leave the tensor cores idle.
  constexpr int kChunks = kBlocksM > 12 && kTeams > 1 ? 2 : 1, kChunkBlocks = kFew ? 2 : kBlocksM / kChunks;
  constexpr int kPairs = kFew ? 1 : kBlocksM / 2, kChunkPairs = kChunkBlocks / 2;  // ldmatrix brings two n8 blocks
  constexpr int kBuffers = 2 * kChunkPairs;
  uint32_t a_frag[kBuffers][2][2];  // (buffers, n8 blocks, k halves)
  uint32_t b_frag[kBlocksN];        // (m16 blocks), of the next step
  uint32_t s_frag[2][kBlocksN];     // (halves of a stage, m16 blocks), pairs of scales: features g and g + 8
  uint32_t left[2][kBlocksN][4];    // (buffers, m16 blocks, registers): left operands of this and the next step

  // ldmatrix: lane l points at row l % 8 of matrix l / 8; matrices: k 0-7, k 8-15, then the next n8 block
  const int a_row = warp_m * 8 * kBlocksM + lane / 16 * 8 + lane % 8;
  const uint32_t a_rd = keep(ring + kAOffset + a_row * 128 + (((lane / 8 % 2) ^ (lane % 8)) << 4));
  auto load_a = [&](int index) {  // counted from the stage's first
    const int buffer = index % kBuffers, step = index / kPairs % STEPS, pair = index % kPairs;
    ldmatrix_x4(a_frag[buffer][0], a_frag[buffer][1], ((a_rd + stage_rd) ^ (step << 5)) + pair * 2048);
  };
  auto load_blocks = [&](uint32_t (&v)[kBlocksN], const uint32_t (&rd)[kReads], uint32_t from) {
    if constexpr (kBlocksN == 3) {
#pragma unroll
      for (int i = 0; i < kBlocksN; ++i) load_smem(v[i], rd[i] + from);
    } else {
      load_smem(v, rd[0] + from);
    }
  };
  auto load_b = [&](int step) { load_blocks(b_frag, b_rd, stage_rd + step * kSpan * 8); };
  auto load_s = [&](int half) { load_blocks(s_frag[half], s_rd, stage_rd + half * kSpan * 2); };
  auto dequantise_part = [&](int step, int part) {  // register part % 4 of word part / 4 of a step
    const int i = part / 4, r = part % 4;
    const half2 scales = as_half2(s_frag[step / 2][i]);
    left[step % 2][i][r] =
        as_bits(__hmul2(dequantise(b_frag[i], r), r % 2 == 0 ? __low2half2(scales) : __high2half2(scales)));
  };

  auto multiply_many = [&](int step) {
    const int next = (step + 1) % STEPS;
    constexpr int kProducts = kBlocksN * kChunkBlocks, kParts = 4 * kBlocksN;
    const int first_chunk = step + 1 == STEPS ? kChunks - 1 : 0;  // from which on the words of the next step are there
    int part = 0;
    if (step + 1 < STEPS) {
      if (step < 2) issue_loads(step);  // into the place that the last wait_for_stage set free
      load_b(next);
    }
    if (step == 1) load_s(1);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (step + 1 == STEPS && chunk + 1 == kChunks) {  // A's next chunk is the next stage's
        wait_for_stage();
        load_b(0);
        load_s(0);
      }
      const int pair0 = step * kPairs + chunk * kChunkPairs;
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
        const int i = product / kChunkBlocks;
        const int j = i % 2 == 0 ? product % kChunkBlocks : kChunkBlocks - 1 - product % kChunkBlocks;  // to and fro
        if (product % (2 * kBlocksN) == 0) load_a(pair0 + kChunkPairs + product / (2 * kBlocksN));
        mma_m16n8k16(acc[i][chunk * kChunkBlocks + j], left[step % 2][i], a_frag[(pair0 + j / 2) % kBuffers][j % 2]);
        // the share of the conversions that is due after this product
        const int done = (chunk - first_chunk) * kProducts + product + 1;
#pragma unroll
        for (; part < kParts && part * (kChunks - first_chunk) * kProducts < done * kParts; ++part) {
          dequantise_part(next, part);
        }
      }
    }
  };

  // ---- write: sum over the teams, through the patches to rows of C ---------------------------------------------------
  // Rolled up: unrolled over all accumulators these were 7000 instructions, run twice a launch, and most of the time at a
  // tile's end went into fetching them (docs/tried.md).
  auto write_tile = [&](int n0, int64_t m0) {
    // float4 of a patch: a row, all; threads for a row
    constexpr int kRow = 4 * kBlocksN, kLanes = kBlocksN == 3 ? 16 : kRow, kVectors = kTile.patch_tokens() * kLanes;
    constexpr int kBlocks = kTile.patch_tokens() / 8, kRounds = kBlocksM / kBlocks;
    static_assert(kBlocksM % kBlocks == 0);
    constexpr int kMeeting = kTeams == 1 ? 32 : kThreads;  // a single team's warps read back their own patches
    const int thread = thread_anew(), lane = thread % 32, g = lane / 4, t = lane % 4;
    // The warps at the same place of all teams read that place's patches: a thread stays at its four features.
    const int reader = team * 32 + lane, member = warp % kTeamWarps;
    const bool idle = reader % kLanes >= kRow;
    const int column = idle ? 0 : reader % kLanes * 4, n = n0 + warp_n * 16 * kBlocksN + column;
    float scale[4], bias[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool here = n + e < p.N_C;
      scale[e] = here && !grouped ? __half2float(static_cast<const half*>(p.s)[scale_of_channelwise(n + e)]) : 1.0f;
      bias[e] = here && p.bias != nullptr ? __half2float(static_cast<const half*>(p.bias)[n + e]) : 0.0f;
    }
    const int64_t m = m0 + warp_m * 8 * kBlocksM;
    const int tokens_here = n < p.N_C && !idle ? static_cast<int>(min(int64_t{8 * kBlocksM}, p.M - m)) : 0;
    half* const c_gmem = static_cast<half*>(p.C) + m * p.N_C + n;
    float* const patch_wr = patches + warp * kPatch + 2 * t * kPitch + g;
    const float* const patch_rd = patches + member * kPatch + column;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int f = 0; f < kRounds * kBlocks * kBlocksN; ++f) {
        const int j = f / kBlocksN, i = f % kBlocksN;
        if (j / kBlocks != round) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) patch_wr[(j % kBlocks * 8 + e % 2) * kPitch + 16 * i + 8 * (e / 2)] = acc[i][j][e];
      }
      barrier<kMeeting>(0);
#pragma unroll
      for (int v = reader; v < kVectors; v += 32 * kTeams) {
        float4 sum = *reinterpret_cast<const float4*>(patch_rd + v / kLanes * kPitch);
#pragma unroll
        for (int r = 1; r < kTeams; ++r) {
          sum = add(sum, *reinterpret_cast<const float4*>(patch_rd + r * kTeamWarps * kPatch + v / kLanes * kPitch));
        }
        const int token = round * kTile.patch_tokens() + v / kLanes;
        if (token >= tokens_here) continue;
        const half2 lower = __floats2half2_rn(sum.x * scale[0] + bias[0], sum.y * scale[1] + bias[1]);
        const half2 upper = __floats2half2_rn(sum.z * scale[2] + bias[2], sum.w * scale[3] + bias[3]);
        half* const c = c_gmem + token * p.N_C;
        if (args.wide_c) {
          *reinterpret_cast<uint2*>(c) = make_uint2(as_bits(lower), as_bits(upper));
        } else {
          c[0] = __low2half(lower);
          if (n + 1 < p.N_C) c[1] = __high2half(lower);
          if (n + 2 < p.N_C) c[2] = __low2half(upper);
          if (n + 3 < p.N_C) c[3] = __high2half(upper);
        }
      }
      barrier<kMeeting>(0);
    }
  };

  // ---- reduce across CTAs: fragments as they are, 16 bytes a lane ----------------------------------------------------
  auto cta_of = [&](int unit) {
    const int by_longer = unit / (args.stripe + 1);
    return by_longer < args.longer ? by_longer : (unit - args.longer) / args.stripe;
  };
  constexpr int kFragments = kBlocksN * kBlocksM, kOwn = (kFragments + kTeams - 1) / kTeams;
  auto fragment = [&](int f) {
    const float (&c)[4] = acc[f % kBlocksN][f / kBlocksN];
    return make_float4(c[0], c[1], c[2], c[3]);
  };
  // The sums over the teams: a thread of team r owns every kTeams-th fragment from r on.
  auto reduce_teams = [&](float4(&own)[kOwn]) {
    // fragments that fit into a patch; its float4
    constexpr int kRound = kPatch >= 1024 ? 8 : kBlocksN == 3 ? 6 : 4, kSlot = kPatch / 4;
    static_assert(kRound * 128 <= kPatch && kFragments % kRound == 0);
    float4* const slots = reinterpret_cast<float4*>(patches) + thread_anew() % 32;
#pragma unroll
    for (int f0 = 0; f0 < kFragments; f0 += kRound) {
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        if ((f0 + i) % kTeams != team) slots[warp * kSlot + i * 32] = fragment(f0 + i);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        if ((f0 + i) % kTeams != team) continue;
        float4& sum = own[(f0 + i) / kTeams];
#pragma unroll
        for (int r = 0; r < kTeams; ++r) {
          const float4 part =
              r == team ? fragment(f0 + i) : slots[(r * kTeamWarps + warp % kTeamWarps) * kSlot + i * 32];
          sum = r == 0 ? part : add(sum, part);
        }
      }
      __syncthreads();
    }
  };
  // A CTA shares at most two tiles with others: that of its first stage, and that of its last.
  auto partial_of = [&](int cta, bool begins_tile) {
    return reinterpret_cast<float4*>(args.partials) +
           (2 * static_cast<int64_t>(cta) + begins_tile) * (kFragments * kTeamThreads) + thread_anew();
  };
  // Whether this CTA is the last to count, after all of its threads have written their parts.
  auto count = [&](int first, int last) {
    // The barrier puts the stores of all threads before thread 0's release, and its acquire before their loads.
    __syncthreads();
    if (threadIdx.x == 0) is_last = fetch_add_acq_rel(args.locks + first, 1) == last - first;
    __syncthreads();
    return is_last != 0;
  };
  // Sums a tile that the CTAs from first to last share, in this order; false if that is left to one of the others. By a single
  // team: in the accumulators, since no registers are left for other sums.
  auto reduce_in_place = [&](int first, int last, int64_t tokens_here) {
    const int blocks_here = static_cast<int>(min(int64_t{kTokens}, tokens_here) + 7) / 8 - warp_m * kBlocksM;
    if (threadIdx.x == 0) {  // have all others counted already? As a rule, the first has its part last
      is_last = cta == first && load_relaxed(args.locks + first) == last - first;
      if (is_last) fence_acq_rel();
    }
    __syncthreads();
    int other = first + 1;
    if (!is_last) {
      float4* const partial = partial_of(cta, cta == first);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        if (f / kBlocksN < blocks_here) __stcg(partial + f * kThreads, fragment(f));
      }
      if (!count(first, last)) return false;
      clear(acc);
      other = first;
    }
#pragma unroll 1
    for (; other <= last; ++other) {
      const float4* const partial = partial_of(other, other == first);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {  // no batches: as many loads in flight as the compiler finds registers for
        if (f / kBlocksN >= blocks_here) continue;
        const float4 sum = add(fragment(f), __ldcg(partial + f * kThreads));
        float (&c)[4] = acc[f % kBlocksN][f / kBlocksN];
        c[0] = sum.x, c[1] = sum.y, c[2] = sum.z, c[3] = sum.w;
      }
    }
    if (threadIdx.x == 0) args.locks[first] = 0;
    return true;
  };
  // The same by several teams.
  auto reduce_across_ctas = [&](int first, int last, int64_t tokens_here) {
    // Have all others counted already? The answer arrives while the teams' sums are added up.
    int counted = 0;
    if (threadIdx.x == 0) counted = load_relaxed(args.locks + first);
    float4 own[kOwn];
    reduce_teams(own);
    const int blocks_here = static_cast<int>(min(int64_t{kTokens}, tokens_here) + 7) / 8 - warp_m * kBlocksM;
    auto needed = [&](int k) {
      const int f = k * kTeams + team;
      return (kFragments % kTeams == 0 || f < kFragments) && f / kBlocksN < blocks_here;
    };
    if (threadIdx.x == 0) {
      is_last = counted == last - first;
      if (is_last) fence_acq_rel();
    }
    __syncthreads();
    if (!is_last) {
      float4* partial = partial_of(cta, cta == first);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        if (needed(k)) __stcg(partial + k * kThreads, own[k]);
      }
      if (!count(first, last)) return false;
    }
    // Loads in flight: a round trip to L2 takes most of a microsecond.
    constexpr int kBatch = kTeams == 2 ? 4 : kOwn < 8 ? kOwn : 8;
#pragma unroll
    for (int k0 = 0; k0 < kOwn; k0 += kBatch) {
      float4 sum[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
      for (int other = first; other <= last; ++other) {
        const float4* partial = partial_of(other, other == first);
        float4 v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          v[i] = own[k0 + i];
          if (needed(k0 + i) && other != cta) v[i] = __ldcg(partial + (k0 + i) * kThreads);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) sum[i] = add(sum[i], v[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) own[k0 + i] = sum[i];
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const bool mine = f % kTeams == team;
      const float4 sum = own[f / kTeams];
      float (&c)[4] = acc[f % kBlocksN][f / kBlocksN];
      c[0] = mine ? sum.x : 0, c[1] = mine ? sum.y : 0, c[2] = mine ? sum.z : 0, c[3] = mine ? sum.w : 0;
    }
    if (threadIdx.x == 0) args.locks[first] = 0;
    return true;
  };
  auto finish_tile = [&](int tile) {
    const int n0 = tile / args.token_tiles * kFeatures;
    const int64_t m0 = static_cast<int64_t>(tile % args.token_tiles) * kTokens;
    const int first = kShares ? cta_of(tile * args.k_stages) : cta;
    const int last = kShares ? cta_of((tile + 1) * args.k_stages - 1) : cta;
    if (first != last) {
      if constexpr (kShares && kTeams == 1) {
        if (!reduce_in_place(first, last, p.M - m0)) return;
      } else if constexpr (kShares) {
        if (!reduce_across_ctas(first, last, p.M - m0)) return;
      }
    }
    write_tile(n0, m0);
  };

  // ---- main loop -----------------------------------------------------------------------------------------------------
  if (!grouped && team_thread < SCALE_ROWS * kPiecesS) {  // channelwise: ones here, the scales when C is written
    for (uint32_t stage = 0; stage <= kLastStage; stage += kStageBytes) {
      store_smem16(ring + stage + kSOffset + team_thread * 16, 0x3c003c00);
    }
  }
  aim_loads(stripe_begin + team);
  launch_dependents();
  wait_for_previous_kernel();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    prepare_loads();
#pragma unroll
    for (int part = 0; part < 2; ++part) issue_loads(part);
  }
  if constexpr (!kFew) wait_for_stage();

  int unit = stripe_begin + team;  // this team's next stage in the line
  int begin = stripe_begin;        // of this CTA's part of the tile
  for (int tile = begin / args.k_stages; begin < stripe_end; ++tile) {
    const int tile_end = min(stripe_end, (tile + 1) * args.k_stages);
    const int most = (tile_end - begin + kTeams - 1) / kTeams;
    begin = tile_end;
    const int rounds = (tile_end - unit + kTeams - 1) / kTeams;  // this team's, most or one less
    clear(acc);
    if constexpr (kBlocksN == 3) aim_reads(tile);
    unit += rounds * kTeams;
    if constexpr (kFew) {
#pragma unroll 1
      for (int round = 0; round < rounds; ++round) multiply_few();
    } else {
      load_b(0);
      load_s(0);
#pragma unroll
      for (int i = 0; i < kChunkPairs; ++i) load_a(i);
#pragma unroll
      for (int part = 0; part < 4 * kBlocksN; ++part) dequantise_part(0, part);
      for (int left_rounds = rounds; left_rounds > 0;) {
        prepare_loads();
        int plain_rounds = min(left_rounds, max(1, (load_k_plain - load_k + kTeams - 1) / kTeams));
        left_rounds -= plain_rounds;
#pragma unroll 1
        for (; plain_rounds > 0; --plain_rounds) {
#pragma unroll
          for (int step = 0; step < STEPS; ++step) multiply_many(step);
        }
      }
    }
    // A team with a stage less meets its own barrier as often as the others do theirs: racecheck compares the counts.
    if (kTeams > 1 && kTeamWarps > 1 && rounds < most) team_barrier();
    finish_tile(tile);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host
// ---------------------------------------------------------------------------------------------------------------------

template <int kIdx, bool kShares>
Status launch(const Args& args, int grid, bool overlap, int least_smem, cudaStream_t stream) {
  constexpr Tile kTile = kTiles[kIdx].tile;
  const auto kernel =
      marlin_kernel<kTile.blocks_n, kTile.blocks_m, kTile.warps_n, kTile.warps_m, kTile.teams, kTile.stages, kShares>;
  if (overlap) {  // made for older GPUs and translated for this one, the kernel would not wait
    static const int kPtxVersion = [kernel] {
      cudaFuncAttributes attributes;
      return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? attributes.ptxVersion : 0;
    }();
    overlap = kPtxVersion >= 90;
  }
  const int smem = overlap && kTile.smem_bytes() < least_smem ? least_smem : kTile.smem_bytes();
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem) != cudaSuccess) {
    return Status::launch_failed;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = 32 * kTile.warps();
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess ? Status::ok : Status::launch_failed;
}

template <int kIdx>
Status launch_tile(const Args& args, int grid, bool overlap, int least_smem, bool shares, cudaStream_t stream) {
  if constexpr (kTiles[kIdx].tile.tokens() <= 64) {  // beyond that it makes no difference
    if (!shares) return launch<kIdx, false>(args, grid, overlap, least_smem, stream);
  }
  return launch<kIdx, true>(args, grid, overlap, least_smem, stream);
}

template <int... kIdx>
Status launch_any(const Args& args, int grid, bool overlap, int least_smem, int tile_idx, bool shares,
                  cudaStream_t stream, std::integer_sequence<int, kIdx...>) {
  Status status = Status::no_config;
  ((tile_idx == kIdx && (status = launch_tile<kIdx>(args, grid, overlap, least_smem, shares, stream), true)) || ...);
  return status;
}

}  // namespace

Status run_sm80(const Problem& p, const Config& config, bool overlap, int32_t* locks, float* partials, void* stream) {
  // Offsets inside a tile, and of scales, are 32-bit; the index of a stage in the line is an int.
  constexpr int64_t kMaxSize = int64_t{1} << 22, kMaxTotal = INT_MAX / 2;
  const Status status = check_for_cuda(p);
  if (status != Status::ok || p.M == 0) return status;
  if (p.group != p.K && p.group % SCALE_K != 0) return Status::bad_shape;
  if (p.N > kMaxSize || p.K > kMaxSize || p.lda > kMaxSize || p.K / p.group * p.N > UINT_MAX / 2)
    return Status::bad_shape;
  if (config.tile_idx < 0 || config.tile_idx >= kNumTiles || config.grid < 1) return Status::no_config;

  const Tile& tile = kTiles[config.tile_idx].tile;
  const int64_t stages = ceil_div(p.K, STAGE_K), slices = ceil_div(p.N, tile.features());
  const int64_t token_tiles = ceil_div(p.M, tile.tokens()), most = kMaxTotal / (stages * slices);
  if (token_tiles > most) {  // too long a line: one launch after the other, which share tiles only if the whole would
    const int64_t head = (most - most % config.grid) * tile.tokens();
    if (head == 0) return Status::bad_shape;
    Problem first = p, rest = p;
    first.M = head;
    rest.M = p.M - head;
    rest.A = static_cast<const half*>(p.A) + head * p.lda;
    rest.C = static_cast<half*>(p.C) + head * p.N_C;
    const Status head_status = run_sm80(first, config, overlap, locks, partials, stream);
    return head_status != Status::ok ? head_status : run_sm80(rest, config, overlap, locks, partials, stream);
  }
  const int64_t total = stages * slices * token_tiles;
  const int grid = static_cast<int>(total < config.grid ? total : config.grid);
  Args args{p};
  args.k_stages = static_cast<int>(stages);
  args.whole_stages = static_cast<int>(p.K_A / STAGE_K);
  args.k16_rows = static_cast<int>(p.K / TILE_K);
  args.token_tiles = static_cast<int>(token_tiles);
  args.stripe = static_cast<int>(total / grid);
  args.longer = static_cast<int>(total % grid);
  args.n = static_cast<int>(p.N);
  args.k_a = static_cast<int>(p.K_A);
  args.lda = static_cast<int>(p.lda);
  args.group_magic = p.group == p.K ? 0 : static_cast<uint32_t>(ceil_div(int64_t{1} << 32, p.group / 16));
  args.wide_c = p.N_C % 4 == 0 && is_aligned(p.C, 8);
  args.locks = locks;
  args.partials = partials;
  // CTAs that begin early go where there is room: without so much shared memory that only one fits on a multiprocessor, they
  // pile up on some (docs/tried.md).
  int device = 0, sm_bytes = 0;
  const auto kPerSm = cudaDevAttrMaxSharedMemoryPerMultiprocessor;
  if (overlap &&
      (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&sm_bytes, kPerSm, device) != cudaSuccess)) {
    return Status::launch_failed;
  }
  return launch_any(args, grid, overlap, sm_bytes / 2, config.tile_idx, config.num_locks > 0,
                    static_cast<cudaStream_t>(stream), std::make_integer_sequence<int, kNumTiles>());
}

}  // namespace marlin
#endif
