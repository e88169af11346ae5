// marlin_sm90.cu: C = A @ dequant(B) on Hopper by wgmma, with the weights dequantised in registers. FP16.
//
// Depends on marlin.h and layout.h; bindings.cpp calls choose_config_sm90 and run_sm90. Compile it for sm_90a; a plain C++
// compiler sees only the host part that needs no CUDA (choose_config_sm90), so that its tests run anywhere.
//
// The product is computed transposed, C^T = B^T A^T: the weights are the left operand of wgmma.m64nTk16 (64 features, from
// registers: the packed words are such operands already), the tokens its right operand, from shared memory, in steps of 8.
//
//   CTA        one producer warpgroup, kGroups x kTeams consumer warpgroups, one ring of stages in shared memory
//   producer   warp 0 copies weights and scales by tensor maps, warp 1 the activations, as far ahead as the ring is deep
//   group      kGroups warpgroups side by side own 64 kBlocks features each, and all kTokens tokens of the tile
//   team       kTeams of these take the stages in turn; their sums meet when a tile of C ends
//   cluster    one CTA; two that take the stages of a tile in turn and send each other half of their sums; or two with tiles
//              side by side, each of which copies half of the activations into the shared memory of both
//   stripe     tiles of C that do not fill a round of all clusters form one line of stages, cut into equal stripes, one per
//              cluster; a tile cut by the border of a stripe is summed in FP32, always in the same order, by the cluster that
//              comes last to the end of its part. Whole tiles come after the stripes.
#include <initializer_list>

#include "marlin.h"

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Configurations
// ---------------------------------------------------------------------------------------------------------------------

constexpr int STEPS = 8;                 // k16 steps in a stage
constexpr int STAGE_K = TILE_K * STEPS;  // rows of the weight in it
constexpr int STAGES = 8;                // of the ring at most, but for the multiple of the teams
constexpr int ENOUGH_STAGES = 6;         // to hide what a copy takes
constexpr int FIRST_STAGES = 4;          // asked for at once at the start: more only delay the first
constexpr int MIN_GROUP = 32;            // rows that certainly share a scale
constexpr int SMEM_BYTES = 232448;       // that a CTA may use on sm_90
constexpr int MAX_K = 1 << 22;           // up to which `quotient` is exact
constexpr int BAND = 16;                 // token tiles that are worked off together
constexpr int RESERVED = 2048;  // bytes of shared memory for barriers, and for the ring to begin at a multiple of 1024
constexpr int MOST_EXCHANGE = 24576;  // bytes of the teams' exchange, at a time, where the ring must make room for it
constexpr int PATCH_PITCH = 144;  // bytes of 64 features of C on their way, and 16 that spread tokens over all banks

constexpr int PAIR = -2;  // see Tile::cluster

struct Tile {
  int blocks;  // m64 blocks of a warpgroup: 1, 2 or 4
  int tokens;
  int groups;
  int teams;
  int cluster;  // CTAs: 1, 2 that take the stages of a tile in turn, or PAIR: two tiles side by side, with the same tokens

  MARLIN_HD constexpr int ctas() const { return cluster == 1 ? 1 : 2; }
  MARLIN_HD constexpr int split() const { return cluster == 2 ? 2 : 1; }
  MARLIN_HD constexpr int pair() const { return cluster == PAIR ? 2 : 1; }

  MARLIN_HD constexpr int features() const { return 64 * blocks * groups; }
  MARLIN_HD constexpr int cluster_features() const { return features() * pair(); }
  MARLIN_HD constexpr int consumers() const { return 128 * groups * teams; }
  MARLIN_HD constexpr int accumulators() const { return blocks * tokens / 2; }  // of a thread
  // Few tokens: the sums of a group are scaled, not its weights, 9 instructions a word instead of 13. Not those of short groups,
  // each of which would wait for its products.
  MARLIN_HD constexpr bool scales_sums() const { return blocks == 4 && tokens <= 32; }
  // Groups of which a stage has several have a kernel of their own. With more tokens and blocks the products hide what they cost.
  MARLIN_HD constexpr bool parts_short_groups() const { return tokens < 128 || blocks == 1; }
  // Launches of one tile a CTA have a kernel of their own, but where the compiler makes a slower loop of it.
  MARLIN_HD constexpr bool parts_one() const { return tokens > 16 || blocks > 1; }
  // Small scales make dequantisation shorter by 4 instructions of 13, which pays up to here: with 128 tokens it costs 1 to 5%
  // where power decides. The other tiles of 96 lack the registers.
  MARLIN_HD constexpr bool wants_small() const {
    return !scales_sums() && tokens <= (blocks == 1 && groups == 1 ? 96 : 64);
  }
  MARLIN_HD constexpr int token_blocks() const { return tokens / 8; }
  MARLIN_HD constexpr int own_blocks() const { return (token_blocks() + teams - 1) / teams; }  // after the teams' sum
  MARLIN_HD constexpr int mine_blocks() const { return (own_blocks() + split() - 1) / split(); }  // after the cluster's
  MARLIN_HD constexpr int vectors() const { return mine_blocks() * blocks; }  // of four sums that a thread ends up with
  MARLIN_HD constexpr int inbox_bytes() const { return split() == 1 ? 0 : vectors() * consumers() * 16; }
  MARLIN_HD constexpr int a_bytes() const { return tokens * STAGE_K * 2; }
  MARLIN_HD constexpr int b_bytes() const { return features() * STAGE_K / 2; }
  MARLIN_HD constexpr int s_bytes() const { return features() * STAGE_K / MIN_GROUP * 2; }
  MARLIN_HD constexpr int stage_bytes() const { return a_bytes() + b_bytes() + s_bytes(); }
  // Warps that share a chunk (64 features) and the patch of shared memory through which it goes to C.
  MARLIN_HD constexpr int mates() const { return 4 / blocks; }
  // For the teams' sums, so many vectors of each thread at a time, and the patches, so many tokens at a time.
  MARLIN_HD constexpr int exchange_bytes(int at_once) const { return teams * (teams - 1) * groups * at_once * 2048; }
  MARLIN_HD constexpr int patches_bytes(int tokens) const { return consumers() / 32 / mates() * tokens * PATCH_PITCH; }
  MARLIN_HD constexpr int least_scratch_bytes() const {
    int at_once = blocks;
    while (at_once > 1 && exchange_bytes(at_once) > MOST_EXCHANGE) at_once /= 2;
    return exchange_bytes(at_once) > patches_bytes(8) ? exchange_bytes(at_once) : patches_bytes(8);
  }
  // A multiple of the teams: each place of the ring is then one team's. Two that take turns at it would be two phases of its
  // barrier apart when data come late, and a parity cannot tell the next phase from the one before the last.
  MARLIN_HD constexpr int stages_beside(int scratch) const {
    const int fit = (SMEM_BYTES - RESERVED - scratch - inbox_bytes()) / stage_bytes() / teams;
    const int turns = (STAGES + teams - 1) / teams;
    return teams * (fit < turns ? fit : turns);
  }
  // What is on its way from memory must outweigh what the teams are working on; more than STAGES only delay the first. Where
  // ENOUGH_STAGES do, the teams' sums are exchanged in one round.
  MARLIN_HD constexpr int stages() const {
    const int exchange = exchange_bytes(own_blocks() * blocks);
    const int with_room = stages_beside(exchange > patches_bytes(8) ? exchange : patches_bytes(8));
    return with_room >= ENOUGH_STAGES ? with_room : stages_beside(least_scratch_bytes());
  }
  // What the ring leaves: the fewer rounds, the fewer barriers at a tile's end.
  MARLIN_HD constexpr int spare_bytes() const {
    return SMEM_BYTES - RESERVED - inbox_bytes() - stages() * stage_bytes();
  }
  MARLIN_HD constexpr int exchange_at_once() const {
    int at_once = own_blocks() * blocks;
    while (own_blocks() * blocks % at_once != 0 || exchange_bytes(at_once) > spare_bytes()) --at_once;
    return at_once;
  }
  MARLIN_HD constexpr int patch_tokens() const {
    int tokens = 8 * mine_blocks();
    while (patches_bytes(tokens) > spare_bytes()) tokens -= 8;
    return tokens;
  }
  // Patches behind what the teams exchange, where there is room for both: one barrier less.
  MARLIN_HD constexpr int patches_at() const {
    const int exchange = exchange_bytes(exchange_at_once());
    return exchange + patches_bytes(patch_tokens()) <= spare_bytes() ? exchange : 0;
  }
  MARLIN_HD constexpr int scratch_bytes() const {
    const int exchange = exchange_bytes(exchange_at_once()), patches = patches_at() + patches_bytes(patch_tokens());
    return exchange > patches ? exchange : patches;
  }
  // Registers of a thread: what the launch gives all alike, and what producer and consumers have where that is too little.
  MARLIN_HD constexpr int launch_registers() const { return 512 / (consumers() / 128 + 1) / 8 * 8; }
  MARLIN_HD constexpr bool moves_registers() const {
    return accumulators() * (scales_sums() ? 2 : 1) + 12 * blocks + 44 > launch_registers();
  }
  MARLIN_HD constexpr int producer_registers() const { return 24; }
  MARLIN_HD constexpr int consumer_registers() const {
    return (launch_registers() * (consumers() / 128 + 1) - producer_registers()) / (consumers() / 128) / 8 * 8;
  }
  // Of the vectors of a partial: as many as there are registers for.
  MARLIN_HD constexpr int partials_at_once() const {
    return (moves_registers() ? consumer_registers() : launch_registers()) - accumulators() < 73 ? 2 : 4;
  }
  MARLIN_HD constexpr int smem_bytes() const {
    return 1024 + stages() * stage_bytes() + scratch_bytes() + inbox_bytes();
  }
};

// The measured ones: microseconds on an H200 of a stage, of a tile's end, of a tile that several clusters share, for each of
// them, and of a launch; fitted to the times of Llama's and smaller shapes at 1 to 8192 tokens (docs/kernel.md).
struct TileCost {
  Tile tile;
  float stage_us, tile_us, sharer_us, start_us;
};

constexpr TileCost kTiles[] = {
    // 16 tokens
    {{4, 16, 1, 2, 1}, 0.5229f, 0.59f, 1.77f, 0.98f},
    {{2, 16, 1, 2, 2}, 0.2483f, 1.06f, 0.28f, 2.03f},
    {{1, 16, 1, 3, 2}, 0.1317f, 1.31f, 0.61f, 1.65f},
    // 32
    {{4, 32, 1, 2, PAIR}, 0.6169f, 0.29f, 1.60f, 0.60f},
    {{2, 32, 1, 2, 2}, 0.3167f, 1.51f, 0.52f, 0.53f},
    {{1, 32, 1, 3, 2}, 0.1704f, 0.60f, 0.82f, 1.80f},
    // 48
    {{4, 48, 1, 2, PAIR}, 0.7044f, 0.23f, 3.49f, 0.00f},
    {{2, 48, 1, 2, 2}, 0.3616f, 1.70f, 0.83f, 0.48f},
    {{1, 48, 1, 3, 2}, 0.1939f, 0.98f, 0.77f, 1.49f},
    // 64
    {{4, 64, 1, 2, 1}, 0.8562f, 0.12f, 2.39f, 0.00f},
    {{2, 64, 1, 2, 2}, 0.4152f, 2.24f, 1.94f, 0.00f},
    {{1, 64, 1, 2, 2}, 0.2339f, 1.45f, 0.80f, 0.88f},
    {{1, 64, 1, 3, 1}, 0.2513f, 1.14f, 0.52f, 0.75f},
    // 96
    {{2, 96, 2, 1, PAIR}, 1.2295f, 0.03f, 5.74f, 0.01f},
    {{1, 96, 1, 2, 1}, 0.3150f, 1.57f, 0.57f, 0.05f},
    {{1, 96, 1, 2, 2}, 0.3014f, 2.26f, 0.69f, 0.16f},
    // 128
    {{2, 128, 2, 1, PAIR}, 1.6062f, 0.30f, 6.80f, 0.00f},
    {{1, 128, 2, 1, PAIR}, 0.8328f, 0.41f, 2.45f, 0.45f},
    {{1, 128, 4, 1, PAIR}, 1.6182f, 0.23f, 3.02f, 1.96f},
    {{1, 128, 3, 1, PAIR}, 1.2214f, 0.29f, 3.34f, 0.75f},
    {{1, 128, 3, 1, 2}, 1.2705f, 1.93f, 1.72f, 0.15f},
    {{2, 128, 1, 2, 1}, 0.8313f, 1.19f, 1.46f, 0.00f},
    {{1, 128, 1, 2, 1}, 0.4317f, 0.51f, 1.01f, 0.00f},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr bool takes(const Problem& p) {
  if (p.K > MAX_K) return false;
  if (p.group == p.K || p.group % STAGE_K == 0) return true;
  return p.group >= MIN_GROUP && STAGE_K % p.group == 0;
}

// The products that a tile's constants were fitted to (bench/tiles.cu).
constexpr bool is_measured(const Tile& tile, int64_t M) {
  if (M > 128) return tile.tokens >= (M > 512 ? 128 : 64);
  return 2 * tile.tokens >= M && (tile.tokens < 2 * M || tile.tokens == 16);
}

// A tile, the clusters of the grid, and those of them that get a stripe, with the time that the fit predicts.
Config make_config(const Problem& p, int tile_idx, int clusters, int stripes) {
  constexpr float kBytesPerUs = 4.3e6f;  // of the same fit
  const TileCost& cost = kTiles[tile_idx];
  const Tile& tile = cost.tile;
  const int64_t tiles = ceil_div(p.N, tile.cluster_features()) * ceil_div(p.M, tile.tokens);
  const int64_t stages = ceil_div(p.K, STAGE_K * tile.split());
  const int64_t rounds = tiles / clusters, striped = tiles % clusters;
  if (stripes > striped * stages) stripes = static_cast<int>(striped * stages);
  const bool shared = stripes != striped;  // else a stripe is a whole tile

  Config config;
  config.tile_idx = tile_idx;
  config.features = tile.features();
  config.tokens = tile.tokens;
  config.grid = clusters * tile.ctas();
  config.stripes = shared ? stripes : 0;
  config.num_locks = 2 * config.stripes * tile.ctas();
  config.num_partials = int64_t{2} * config.stripes * tile.ctas() * tile.consumers() * tile.vectors() * 4;

  // clusters that meet in a tile: one, several that each have an equal part of it, or a number more that cut it anywhere
  int64_t sharers = 0, units = rounds * stages, ends = rounds;
  if (striped > 0) {
    sharers = !shared ? 0 : stripes % striped == 0 ? stripes / striped : ceil_div(stripes, striped) + 1;
    units += ceil_div(striped * stages, stripes);
    ends += stripes % striped == 0 ? 1 : 2;
  }
  const float compute_us = static_cast<float>(units) * cost.stage_us + static_cast<float>(ends) * cost.tile_us;
  const float memory_us = static_cast<float>(p.K * p.N / 2) / kBytesPerUs;
  config.us =
      cost.start_us + (compute_us > memory_us ? compute_us : memory_us) + static_cast<float>(sharers) * cost.sharer_us;
  return config;
}

// The ways to deal `tiles` out that are worth a look, as use(clusters, stripes): whole tiles only, if possible the same number
// for each of fewer clusters, or stripes that end where tiles do; and a stripe for every cluster.
template <typename Use>
void for_each_way(int64_t tiles, int clusters, Use use) {
  const int64_t rounds = ceil_div(tiles, clusters);
  const int striped = static_cast<int>(tiles % clusters);
  const int even = striped == 0 ? 0 : clusters / striped * striped;
  if (rounds > 1 && even == striped && tiles % rounds == 0) {
    use(static_cast<int>(tiles / rounds), 0);
  } else {
    use(clusters, even);
  }
  if (even < clusters && striped > 0) use(clusters, clusters);
}

}  // namespace

Config choose_config_sm90(const Problem& p, const Device& device, const Hints& hints) {
  Config best;
  if (p.dtype != DType::f16 || device.capability != 90) return best;
  const int sms = hints.num_sms > 0 && hints.num_sms < device.num_sms ? hints.num_sms : device.num_sms;
  for (int i = 0; i < kNumTiles; ++i) {
    const Tile& tile = kTiles[i].tile;
    const int clusters = sms / tile.ctas();
    if (clusters == 0 || tile.smem_bytes() > device.smem_bytes || !takes(p)) continue;
    if ((hints.tile_n > 0 && hints.tile_n != tile.features()) || (hints.tile_idx >= 0 && hints.tile_idx != i)) continue;
    if (hints.tile_idx < 0 && hints.tile_n <= 0 && !is_measured(tile, p.M)) continue;
    const int64_t tiles = ceil_div(p.N, tile.cluster_features()) * ceil_div(p.M, tile.tokens);
    for_each_way(tiles, clusters, [&](int used_clusters, int stripes) {
      const Config config = make_config(p, i, used_clusters, stripes);
      if (best.tile_idx < 0 || config.us < best.us) best = config;
    });
  }
  return best;
}

}  // namespace marlin

#ifdef __CUDACC__
#include <climits>
#include <type_traits>
#include <utility>

namespace marlin {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Dequantise
// ---------------------------------------------------------------------------------------------------------------------

// The eight weights of a word as a left operand: registers 0 and 2 are feature g (k 2t, 2t + 1, and the same + 8), 1 and 3
// feature g + 8; exactly q - 8, or that times the scales, rounded once: that of g lies below that of g + 8.
// 0x6400 is fp16 1024 with a unit of 1 in its lowest bit, so 0x6400 | q is 1024 + q and 0x6400 | q << 4 is 1024 + 16 q.
template <bool kScaled>
__device__ inline void dequantise(uint32_t (&left)[4], uint32_t word, uint32_t scales) {
  const half2 k1032 = as_half2(0x64086408), kSixteenth = as_half2(0x2c002c00), kMinus72 = as_half2(0xd480d480);
#pragma unroll
  for (int r = 0; r < 2; ++r, word >>= 8) {
    half2 lower = __hsub2(as_half2(and_or<0x000f000f, 0x64006400>(word)), k1032);
    half2 upper = __hfma2(as_half2(and_or<0x00f000f0, 0x64006400>(word)), kSixteenth, kMinus72);
    if constexpr (kScaled) {
      const half2 scale = r == 0 ? __low2half2(as_half2(scales)) : __high2half2(as_half2(scales));
      lower = __hmul2(lower, scale);
      upper = __hmul2(upper, scale);
    }
    left[r] = as_bits(lower);
    left[r + 2] = as_bits(upper);
  }
}

// An eighth of the same in 9 instructions instead of 13, for scales from 2^-11 to below 2^-5; bit for bit, as an eighth of a
// normal FP16 number is exact. A subnormal one is its bits times 2^-24: q is q 2^-24 and q << 4 is q 2^-20. One FMA makes
// (s q - 8 s) / 8 of it, rounded once as s (q - 8) is; 2^21 s must not overflow.
struct SmallScales {
  static constexpr float LEAST = 0x1p-11f;
  static constexpr float LIMIT = 0x1p-5f;
  static constexpr float INVERSE = 8;
  half2 s, times21, times17;  // of features g and g + 8: s, 2^21 s, 2^17 s
  __device__ void set(uint32_t scales) {
    s = as_half2(scales);
    times21 = as_half2(scales + 0x54005400);  // 21 more in both exponents, which are 4 to 9
    times17 = as_half2(scales + 0x44004400);
  }
};
__device__ inline void dequantise_small(uint32_t (&left)[4], uint32_t word, const SmallScales& s) {
#pragma unroll
  for (int r = 0; r < 2; ++r, word >>= 8) {
    auto of_r = [&](half2 pair) { return r == 0 ? __low2half2(pair) : __high2half2(pair); };
    left[r] = as_bits(__hfma2(as_half2(word & 0x000f000f), of_r(s.times21), __hneg2(of_r(s.s))));
    left[r + 2] = as_bits(__hfma2(as_half2(word & 0x00f000f0), of_r(s.times17), __hneg2(of_r(s.s))));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

struct Args {
  CUtensorMap a_map, b_map, s_map;
  // What the first copies need, 64 bytes: they come from memory with every launch.
  int k_stages;                                              // stages in a tile of C
  int token_tiles;                                           // tiles of C along the tokens
  int slices;                                                // and along the features
  int whole_tiles;                                           // dealt out in rounds
  int stripes;                                               // clusters that have one
  int stripe;                                                // stages of it ...
  int longer;                                                // ... and one more for this many first ones
  int clusters;                                              // of the grid
  int group_shift;                                           // rows of scales: STAGE_K >> shift in a stage, or ...
  int group_stages;                                          // ... one in this many stages; 0 for channelwise
  uint64_t per_k_stages, per_token_tiles, per_group_stages;  // see `quotient`
  Problem p;
  int scale_rows;  // of s
  bool wide_c;     // C takes 16-byte stores
  int32_t* locks;
  float* partials;
};

// n / d, d given as ceil(2^kBits / d): exact as long as n d < 2^kBits and n / d < 2^(64 - kBits). The first copies would wait for three divisions.
template <int kBits>
__device__ inline int quotient(int n, uint64_t per_d) {
  return static_cast<int>(static_cast<uint32_t>(n) * per_d >> kBits);
}

// Stages [begin, end) of a tile of C.
struct Segment {
  int tile, begin, end;
};

// How tiles are dealt out. What a launch does not need is not in its kernel: instructions come from memory, too.
enum class Deal {
  stripes,  // as above
  rounds,   // whole tiles
  one,      // to each cluster, at most; without a bias, and in a single band
};

// What a CTA works off, in order: its stripe, then its whole tiles. Producer and consumers walk alike.
template <Deal kDeal>
struct Walk {
  int unit;  // the next stage of the stripe, counted from the first striped tile
  int tile;  // the next whole tile

  __device__ Walk(const Args& args, int cluster) : unit(first_unit(args, cluster)), tile(cluster) {}

  __device__ static int first_unit(const Args& args, int cluster) {
    if (kDeal != Deal::stripes) return 0;
    const int before = min(cluster, args.stripes);
    return before * args.stripe + min(before, args.longer);
  }

  __device__ int left(const Args& args, int cluster) const { return first_unit(args, cluster + 1) - unit; }

  // After the first segment.
  __device__ bool more(const Args& args, int cluster) const {
    return kDeal != Deal::one && (left(args, cluster) > 0 || tile < args.whole_tiles);
  }

  __device__ bool next(const Args& args, int cluster, int clusters, Segment& segment) {
    const int left = this->left(args, cluster);
    if (left > 0) {
      const int striped_tile = quotient<56>(unit, args.per_k_stages), begin = unit - striped_tile * args.k_stages;
      segment = {args.whole_tiles + striped_tile, begin, min(args.k_stages, begin + left)};
      unit += segment.end - begin;
      return true;
    }
    if (tile >= args.whole_tiles) return false;
    segment = {tile, 0, args.k_stages};
    tile += clusters;
    return true;
  }
};

struct Corner {
  int n0;
  int m0;
};

// Tiles in bands of tokens, in a band slice by slice: what runs at once shares weights and activations in L2.
template <Deal kDeal>
__device__ inline Corner corner_of(const Args& args, int tile, int features, int tokens) {
  if (kDeal != Deal::one && __builtin_expect(args.token_tiles > BAND, false)) {
    const int band_tiles = BAND * args.slices, band = tile / band_tiles, rest = tile - band * band_tiles;
    const int width = min(BAND, args.token_tiles - band * BAND);
    return {rest / width * features, (band * BAND + rest % width) * tokens};
  }
  const int slice = quotient<32>(tile, args.per_token_tiles);
  return {slice * features, (tile - slice * args.token_tiles) * tokens};
}

// kShortGroups: takes groups of which a stage has several, too.
template <int kBlocks, int kTokens, int kGroups, int kTeams, int kCluster, bool kShortGroups, Deal kDeal>
__global__ void __cluster_dims__(kCluster == 1 ? 1 : 2) __launch_bounds__(128 * (kGroups * kTeams + 1), 1)
    marlin_kernel(const __grid_constant__ Args args) {
  constexpr Tile kTile{kBlocks, kTokens, kGroups, kTeams, kCluster};
  constexpr int kFeatures = kTile.features(), kConsumers = kTile.consumers();
  constexpr int kCtas = kTile.ctas(), kSplit = kTile.split(), kPair = kTile.pair();
  constexpr int kABytes = kTile.a_bytes(), kBBytes = kTile.b_bytes(), kABox = kTokens * 128;
  constexpr int kWarpgroups = kGroups * kTeams, kStages = kTile.stages();
  static_assert(kTokens % 8 == 0 && kStages > kTeams && kStages % kTeams == 0 && kTile.patch_tokens() > 0);
  static_assert(kPair == 1 || STEPS == 8, "each CTA copies one box");

  extern __shared__ unsigned char smem[];
  __shared__ __align__(8) uint64_t full_barriers[kStages], empty_barriers[kStages];
  __shared__ __align__(8) uint64_t inbox_barriers[2];  // it is full; the other CTA's is free
  __shared__ int ticket_smem;
  const uint32_t ring = (smem_address(smem) + 1023) / 1024 * 1024;  // the swizzle counts from multiples of 1024
  const uint32_t scales = ring + kStages * (kABytes + kBBytes);
  const uint32_t scratch = scales + kStages * kTile.s_bytes();
  const uint32_t inbox = scratch + kTile.scratch_bytes();
  const uint32_t inbox_full = smem_address(inbox_barriers), inbox_free = inbox_full + 8;
  const uint32_t full = smem_address(full_barriers), empty = smem_address(empty_barriers);
  const Problem& p = args.p;
  const bool biased = kDeal != Deal::one && p.bias != nullptr;
  // shfl: for the compiler, the warp's index is then uniform, and with it all that follows from it
  const int warp_index = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int warpgroup = warp_index / 4, warp = warp_index % 4, lane = threadIdx.x % 32;

  const int cluster = blockIdx.x / kCtas, rank = blockIdx.x % kCtas;
  // The warps that copy set up the barriers, each half of them, and go on at once.
  constexpr int kProducer = 4 * kWarpgroups;
  constexpr int kStarters = kConsumers + 64;  // that meet before the first stage
  if (warp_index == kProducer || warp_index == kProducer + 1) {
    if (elected()) {
      const bool first = warp_index == kProducer;
#pragma unroll
      for (int i = 0; i < kStages; ++i) barrier_init((first ? full : empty) + 8 * i, first ? 2 : 4 * kGroups * kPair);
      if (kSplit > 1 && !first) {
        barrier_init(inbox_full, 1);
        barrier_init(inbox_free, kConsumers / 32);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("bar.arrive 0, %0;" ::"n"(kStarters) : "memory");
  } else if (warp_index == kProducer + 2 && elected()) {
    prefetch_map(args.b_map);
    prefetch_map(args.s_map);
    prefetch_map(args.a_map);
  }
  if constexpr (kCtas > 1) cluster_arrive();
  launch_dependents();

  const int clusters = args.clusters;
  Segment segment{};
  auto corner_of_segment = [&] {
    Corner corner = corner_of<kDeal>(args, segment.tile, kFeatures * kPair, kTokens);
    if (kPair > 1) corner.n0 += rank * kFeatures;
    return corner;
  };

  // ---- issue next loads ----------------------------------------------------------------------------------------------
  if (warpgroup == kWarpgroups) {
    if constexpr (kTile.moves_registers())
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kTile.producer_registers()));
    Walk<kDeal> walk(args, made(cluster));
    int stage = 0, parity = 1;
    Corner corner;
    auto next_segment = [&](bool first = false) {
      if ((!first && kDeal == Deal::one) || !walk.next(args, cluster, clusters, segment)) return false;
      corner = corner_of_segment();
      return true;
    };
    bool more = next_segment(true);
    if (warp < 2) named_barrier(2, 64);  // the barriers are set up
    if (warp == 3 && elected()) {        // what is read when C is written: else that waits for DRAM
      for (; more; more = next_segment()) {
#pragma unroll
        for (int n = corner.n0; n < corner.n0 + kFeatures; n += 64) {
          if (args.group_stages == 0 && n < p.N) prefetch(static_cast<const half*>(p.s) + n);
          if (biased && n < p.N_C) prefetch(static_cast<const half*>(p.bias) + n);
        }
      }
    }
    if (warp > 1 || !elected()) return;
    int num_copied = 0;
    auto produce = [&](auto copy_stage) {
      for (; more; more = next_segment()) {
#pragma unroll(kBlocks > 1 && kTeams == 2 ? 1 : 4)  // measured: 1 to 3% either way
        for (int k = segment.begin * kSplit + (kSplit > 1 ? rank : 0); k < segment.end * kSplit; k += kSplit) {
          barrier_wait(empty + 8 * stage, parity);
          if (kStages > FIRST_STAGES && num_copied++ == FIRST_STAGES) barrier_wait(full, 0);
          copy_stage(k, ring + stage * (kABytes + kBBytes), full + 8 * stage);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    };
    if (warp == 0) {
      const int scale_bytes = args.group_stages == 0 ? 0 : kFeatures * 2 * (STAGE_K >> args.group_shift);
      produce([&](int k, uint32_t a_smem, uint32_t done) {
        barrier_expect(done, kBBytes + scale_bytes);
        copy_box(a_smem + kABytes, args.b_map, corner.n0, k * STEPS, done);
        if (scale_bytes > 0) {
          const int row = quotient<32>(k * (STAGE_K >> args.group_shift), args.per_group_stages);
          copy_box(scales + stage * kTile.s_bytes(), args.s_map, corner.n0, row, done);
        }
      });
    } else {
      if (kPair > 1) cluster_wait();  // the other CTA's barriers are set up, too
      bool first = true;
      produce([&](int k, uint32_t a_smem, uint32_t done) {
        barrier_expect(done, kABytes);
        if (first) wait_for_previous_kernel();  // A may be its output; weights never are
        first = false;
        if constexpr (kPair > 1) {
          copy_box_to_both(a_smem + rank * kABox, args.a_map, k * STAGE_K + 64 * rank, corner.m0, done);
        } else {
#pragma unroll
          for (int i = 0; i < STEPS / 4; ++i)
            copy_box(a_smem + i * kABox, args.a_map, k * STAGE_K + 64 * i, corner.m0, done);
        }
      });
    }
    return;
  }

  // ---- consumers -----------------------------------------------------------------------------------------------------
  if constexpr (kTile.moves_registers())
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kTile.consumer_registers()));
  Walk<kDeal> walk(args, made(cluster));
  const int team = kTeams == 1 ? 0 : warpgroup / kGroups, group = warpgroup % kGroups, g = lane / 4;
  auto feature_of = [&](uint32_t thread) {  // of the warp's rows of the tile, the first
    return group * 64 * kBlocks + static_cast<int>(thread / 32 % 4) * 16 * kBlocks;
  };
  const int feature = feature_of(threadIdx.x);
  const uint32_t b_rd = kABytes + feature / 64 * 512 + lane * 16 + feature % 64 / 16 * 4;
  const uint32_t s_rd = scales + feature / 64 * 128 + g * 16 + feature % 64 / 16 * 4;
  const bool grouped = args.group_stages != 0;

  float acc[kBlocks][kTokens / 2];  // (m64 blocks, n8 blocks x (features g, g + 8) x (tokens 2t, 2t + 1))
  constexpr bool kScalesSums = kTile.scales_sums() && !kShortGroups;
  float sums[kScalesSums ? kBlocks : 1][kTokens / 2];  // of one group, not yet scaled
  // Steps dequantised and multiplied at once: two where that makes fewer instructions; elsewhere it costs registers.
  constexpr int kPack = kBlocks == 2 && kTokens <= 64 ? 2 : 1;
  uint32_t left[2][kPack][kBlocks][4];  // (buffers, steps, m64 blocks, registers)
  // Words are read for so many steps at once: several where a step has several products of few tokens, or the compiler has
  // them wait for the read.
  constexpr int kWordSteps = kTokens > 64 || kBlocks == 1 ? 1 : 8 / kBlocks;
  constexpr int kWordsAhead = kWordSteps == 1 ? 2 : kWordSteps;  // steps from the read to the first use
  uint32_t words[2][kWordSteps][kBlocks];
  uint32_t s_frag[kBlocks];  // scales of 32 rows: pairs for features g and g + 8

  int stage = team, parity = 0;  // this team's next one
  int behind = team;             // and how many stages it lies behind the segment's begin
  uint32_t to_release = 0;       // the barrier of the stage before, for one lane of a warp
  // A place of the ring is free for the copies of both CTAs of a pair: lane 1 tells the other one.
  const uint32_t my_full = made(full), my_empty = made(kPair > 1 ? in_cta(empty, rank ^ (lane & 1)) : empty);

  auto release = [](uint32_t barrier) {
    if constexpr (kPair > 1) {
      barrier_arrive_in_cluster_unless_0(barrier);
    } else {
      barrier_arrive_unless_0(barrier);
    }
  };

  auto words_of = [&](int step) -> auto& { return words[step / kWordSteps % 2][step % kWordSteps]; };
  auto load_words = [&](int at, int step) {
    load_smem(words_of(step), ring + at * (kABytes + kBBytes) + step * (kFeatures * 8) + b_rd);
  };
  const auto scales_of = [&](int half_step) {  // where those of a stage's 32 rows lie
    return made(static_cast<uint32_t>((half_step * MIN_GROUP >> args.group_shift) * (kFeatures * 2)));
  };
  const uint32_t scales_at[4] = {0, scales_of(1), scales_of(2), scales_of(3)};
  auto load_scales = [&](int at, int half_step) {
    if (grouped) load_smem(s_frag, s_rd + at * kTile.s_bytes() + scales_at[half_step]);
  };
  auto keep_ones = [&] {  // channelwise: 1 (or 2^-6, which is small) here, the scales when C is written
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) s_frag[i] = kScalesSums ? 0x3c003c00 : 0x24002400;
  };
  keep_ones();
  // Touched only between wgmmas: hidden, so that the compiler moves nothing of it in between, which would put them in line.
  auto hide = [](auto& sums) {
    for (auto& block : sums) {
#pragma unroll
      for (float& v : block) asm volatile("" : "+f"(v));
    }
  };
  auto zero = [&](auto& sums) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < kTokens / 2; ++e) sums[i][e] = 0;
    }
    hide(sums);
  };
  auto add_scaled = [&] {
    wgmma_wait<0>();
    hide(sums);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const float2 scale = __half22float2(as_half2(s_frag[i]));
#pragma unroll
      for (int e = 0; e < kTokens / 2; ++e) acc[i][e] += sums[i][e] * (e % 4 < 2 ? scale.x : scale.y);
    }
  };
  // Whether the rows up to this step's are the end of a group, or of the stage.
  const bool of_32 = args.group_shift <= 5, of_64 = args.group_shift <= 6;
  auto ends_group = [&](int step) {
    return (step + 1) % STEPS == 0 || (kShortGroups && ((step % 4 == 3 && of_64) || (step % 2 == 1 && of_32)));
  };

  // ---- one stage ---------------------------------------------------------------------------------------------------------
  auto multiply_stage = [&](auto small_scales, int next_stage, int next_parity, bool last) {
    constexpr bool kSmall = decltype(small_scales)::value;
    // shfl as above; added to as a whole, or each step's descriptor costs two moves of uniform registers
    const uint64_t tokens = tokens_descriptor(__shfl_sync(0xffffffff, (ring + stage * (kABytes + kBBytes)) >> 4, 0));
    bool there = last;  // the next stage, as far as there is one
    SmallScales small[kBlocks];
    auto set_small = [&] {
#pragma unroll
      for (int i = 0; i < kBlocks && kSmall; ++i) small[i].set(s_frag[i]);
    };
    set_small();
#pragma unroll
    for (int step = 0; step < STEPS; step += kPack) {
      auto& now = left[step / kPack % 2];
#pragma unroll
      for (int u = 0; u < kPack; ++u) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          if constexpr (kSmall) {
            dequantise_small(now[u][i], words_of(step + u)[i], small[i]);
          } else {
            dequantise<!kScalesSums>(now[u][i], words_of(step + u)[i], s_frag[i]);
          }
        }
      }
      if (kScalesSums && step == 0) add_scaled();  // of the stage before
      wgmma_fence();
#pragma unroll
      for (int u = 0; u < kPack; ++u) {
        const uint64_t right = tokens + (2 * ((step + u) % 4) + (step + u) / 4 * (kABox / 16));
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          if constexpr (!kScalesSums) {
            wgmma<kTokens, true>(acc[i], now[u][i], right);
          } else if (step == 0) {
            wgmma<kTokens, false>(sums[i], now[u][i], right);
          } else {
            wgmma<kTokens, true>(sums[i], now[u][i], right);
          }
        }
      }
      wgmma_commit();
      if (kScalesSums && step + kPack == STEPS) load_scales(stage, 0);
      // Asked a step ahead, so that the answer is there. What is read behind the last stage is not used.
      if (step + kWordsAhead + kPack == STEPS) there |= barrier_test(my_full + 8 * next_stage, next_parity);
      if (step % kWordSteps == 0) {
        const int first = step + kWordsAhead;
        if (first == STEPS) barrier_wait(my_full + 8 * next_stage, next_parity, there);
#pragma unroll
        for (int i = 0; i < kWordSteps; ++i) load_words(first < STEPS ? stage : next_stage, (first + i) % STEPS);
      }
      if (!kScalesSums && ends_group(step + kPack - 1)) {
        if (step + kPack < STEPS) {
          load_scales(stage, (step + kPack) / 2);
          set_small();
        } else {
          load_scales(next_stage, 0);
        }
      }
      wgmma_wait<1>();
      if (step == 0) release(to_release);
    }
  };

  // ---- reduce in the CTA and in the cluster -----------------------------------------------------------------------------
  // Team r gets the teams' sums of token blocks r kOwn ... Of these the first CTA of a cluster keeps kMine, the other one the
  // rest, in its first ones.
  constexpr int kOwn = kTile.own_blocks(), kTokenBlocks = kTile.token_blocks(), kMine = kTile.mine_blocks();
  const int mine_first = kSplit > 1 ? rank * kMine : 0;  // of a team's
  const int mine_blocks = kSplit == 1 || rank == 0 ? kMine : kOwn - kMine;
  int inbox_parity = 0;
  bool first_tile = true;
  auto reduce = [&](float unscale) {
    const int peer = rank ^ 1, me = made(team);
    const uint32_t thread = made(threadIdx.x);
    const uint32_t mail = inbox + thread * 16;
    uint32_t peer_mail = 0, peer_full = 0;
    if constexpr (kSplit > 1) {
      peer_mail = in_cta(mail, peer);
      peer_full = in_cta(inbox_full, peer);
      if (threadIdx.x == 0) barrier_expect(inbox_full, mine_blocks * kBlocks * kConsumers * 16);
      if (first_tile) {
        cluster_wait();                    // the other CTA has set up its barriers
      } else if (kOwn > 1 || rank == 1) {  // there is something to send
        barrier_wait(inbox_free, inbox_parity ^ 1);
      }
    }
    // Of this team's token block j, m64 block i. What is sent first is on its way while the rest is added up.
    auto keep_or_send = [&](int j, int i, float* sum) {
#pragma unroll
      for (int e = 0; e < 4 && kTile.wants_small(); ++e) sum[e] *= unscale;
      if (kSplit > 1 && (j < kMine) != (rank == 0)) {
        send(peer_mail + (j % kMine * kBlocks + i) * (kConsumers * 16), sum, peer_full);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][4 * (j % kMine) + e] = sum[e];
      }
    };
    if constexpr (kTeams == 1) {
#pragma unroll
      for (int v = 0; v < kOwn * kBlocks; ++v)
        keep_or_send(v / kBlocks, v % kBlocks, acc[v % kBlocks] + v / kBlocks * 4);
    } else {
      // `count` of each thread's vectors, from the first on, by memory at `base`: (owners, other teams, groups, vectors, threads)
      // float4.
      auto exchange = [&](int first, int count, uint32_t base) {
        const int end = first + count;
        auto slot = [&](int owner, int writer, int v) {
          const int other = writer - (writer > owner);
          return base +
                 ((((owner * (kTeams - 1) + other) * kGroups + group) * count + v - first) * 128 + thread % 128) * 16;
        };
#pragma unroll
        for (int r = 0; r < kTeams; ++r) {
          if (me == r) continue;
#pragma unroll
          for (int v = first; v < end; ++v) {
            const int block = r * kOwn + v / kBlocks;
            if (block < kTokenBlocks) store_smem(slot(r, me, v), acc[v % kBlocks] + 4 * block);
          }
        }
        named_barrier(1, kConsumers);
#pragma unroll
        for (int r = 0; r < kTeams; ++r) {
          if (me != r) continue;
#pragma unroll
          for (int v = first; v < end; ++v) {
            const int j = v / kBlocks, i = v % kBlocks, block = r * kOwn + j;
            float sum[4];  // of a block that there is not, anything: the other CTA counts it, too
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e] = acc[i][4 * (block < kTokenBlocks ? block : j) + e];
#pragma unroll
            for (int other = 0; other < kTeams; ++other) {
              if (other != r && block < kTokenBlocks) add_smem(sum, slot(r, other, v));
            }
            keep_or_send(j, i, sum);
          }
        }
      };
      constexpr int kAtOnce = kTile.exchange_at_once(), kAll = kOwn * kBlocks;
      if (!first_tile) named_barrier(1, kConsumers);  // what was there has been read
      exchange(0, kAtOnce, scratch);
      if (kAtOnce < kAll && !walk.more(args, cluster)) {  // nobody needs the ring any more
        exchange(kAtOnce, kAll - kAtOnce, ring);
      } else {
#pragma unroll
        for (int v = kAtOnce; v < kAll; v += kAtOnce) {
          named_barrier(1, kConsumers);
          exchange(v, kAtOnce, scratch);
        }
      }
    }
    if constexpr (kSplit > 1) {
      barrier_wait(inbox_full, inbox_parity);
      inbox_parity ^= 1;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        if (j >= mine_blocks) break;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) add_smem(acc[i] + 4 * j, mail + (j * kBlocks + i) * (kConsumers * 16));
      }
      __syncwarp();  // this warp has read its mail: there is room for more, if more will come
      if (lane == 0 && mine_blocks > 0 && walk.more(args, cluster)) barrier_arrive_remote(in_cta(inbox_free, peer));
    }
    first_tile = false;
  };

  // ---- reduce across clusters ----------------------------------------------------------------------------------------------
  auto cluster_of = [&](int unit) {
    const int by_longer = unit / (args.stripe + 1);
    return by_longer < args.longer ? by_longer : (unit - args.longer) / args.stripe;
  };
  auto partial_of = [&](int owner, bool begins_tile) {  // (token blocks x m64 blocks, threads) float4
    const int index = (2 * owner + begins_tile) * kCtas + rank;
    return reinterpret_cast<float4*>(args.partials) + int64_t{index} * kTile.vectors() * kConsumers + threadIdx.x;
  };

  // ---- write -------------------------------------------------------------------------------------------------------------
  // Channelwise scales and the bias, of features g + 8 i; ahead of the sums over teams and clusters where registers are left.
  constexpr bool kLoadsEarly = kBlocks == 1 && kTokens <= 96;
  const bool for_c = !grouped || biased;
  half scales_c[2 * kBlocks], bias_c[2 * kBlocks];
  auto load_for_c = [&](const Corner& corner) {
    const uint32_t thread = made(threadIdx.x);
    const int n0 = corner.n0 + feature_of(thread) + static_cast<int>(thread % 32 / 4);
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int n = min(n0 + 8 * i, static_cast<int>(p.N_C) - 1);
      scales_c[i] = grouped ? __float2half(1.f) : static_cast<const half*>(p.s)[scale_of_channelwise(n)];
      bias_c[i] = biased ? static_cast<const half*>(p.bias)[n] : __float2half(0.f);
    }
  };
  // The warps of a chunk leave it in a patch, tokens as rows, and write it to C, 128 bytes of a token at a time.
  constexpr int kMates = kTile.mates(), kChunkThreads = 32 * kMates, kPatchTokens = kTile.patch_tokens();
  constexpr int kPatchesAt = kTile.patches_at();
  auto meet_mates = [&](uint32_t chunk) {
    if constexpr (kMates == 1) {
      __syncwarp();
    } else {
      named_barrier(3 + static_cast<int>(chunk), kChunkThreads);
    }
  };
  auto write = [&](const Corner& corner) {
    if (!kLoadsEarly && for_c) load_for_c(corner);
    if (for_c) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const float scale = (grouped || kScalesSums ? 1 : 64) * __half2float(scales_c[i]),
                    bias = __half2float(bias_c[i]);
#pragma unroll
        for (int e = 0; e < 2 * kMine; ++e) {
          float& v = acc[i / 2][e / 2 * 4 + i % 2 * 2 + e % 2];
          v = v * scale + bias;
        }
      }
    }
    if constexpr (kTeams > 1 && kPatchesAt == 0) named_barrier(1, kConsumers);  // the scratch has been read
    const uint32_t thread = made(threadIdx.x), chunk = thread / kChunkThreads, piece = thread % 8;
    const uint32_t patch = scratch + kPatchesAt + chunk * (kPatchTokens * PATCH_PITCH);
    const uint32_t patch_wr =
        patch + thread % 8 * PATCH_PITCH + thread / 8 % 2 * 16 + thread / 32 % kMates * (32 * kBlocks);
    const int n = corner.n0 + group * 64 * kBlocks + static_cast<int>(thread % 128 / kChunkThreads * 64 + piece * 8);
    const int first_token = static_cast<int>(thread % kChunkThreads / 8);
#pragma unroll
    for (int j0 = 0; j0 < kMine; j0 += kPatchTokens / 8) {
      const int first = team * kOwn + mine_first + j0;  // token block of the tile
      const int m = corner.m0 + 8 * first;
      const int blocks_here = min(kPatchTokens / 8, min(mine_blocks - j0, kTokenBlocks - first));
      const int tokens_here = static_cast<int>(min(int64_t{8} * blocks_here, p.M - m));
      if (kTeams == 1 && tokens_here <= 0) break;
      // Another team's sums come only after a barrier of all.
      const bool meets_again = kTeams == 1 || j0 + kPatchTokens / 8 < kMine;
      // Warps that have nothing to write meet all the same: racecheck tells them apart by the barriers that they have met.
      if (tokens_here <= 0) {
        meet_mates(chunk);
        if (meets_again) meet_mates(chunk);
        continue;
      }
#pragma unroll
      for (int j = j0; j < min(kMine, j0 + kPatchTokens / 8); ++j) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          const float* v = acc[i] + 4 * j;
          store_transposed(patch_wr + 8 * (j - j0) * PATCH_PITCH + i * 32, as_bits(__floats2half2_rn(v[0], v[1])),
                           as_bits(__floats2half2_rn(v[2], v[3])));
        }
      }
      meet_mates(chunk);
      auto write_piece = [&](int token, bool wide) {
        if (token >= tokens_here || n >= p.N_C) return;
        uint32_t v[4];
        load_smem(v, patch + token * PATCH_PITCH + piece * 16);
        half* c = static_cast<half*>(p.C) + (int64_t{m} + token) * p.N_C + n;
        if (wide) {
          *reinterpret_cast<uint4*>(c) = make_uint4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            if (n + e < p.N_C) c[e] = __ushort_as_half(static_cast<unsigned short>(v[e / 2] >> 16 * (e % 2)));
          }
        }
      };
      if (args.wide_c) {
#pragma unroll
        for (int token = 0; token < kPatchTokens; token += kChunkThreads / 8) write_piece(first_token + token, true);
      } else {
#pragma unroll 1
        for (int token = 0; token < kPatchTokens; token += kChunkThreads / 8) write_piece(first_token + token, false);
      }
      if (meets_again) meet_mates(chunk);
    }
  };

  // ---- main loop -----------------------------------------------------------------------------------------------------------
  // Of the segment's scales this thread's share: whether they are small. Each is asked for at once: it comes from memory.
  auto has_small_scales = [&](const Corner& corner) {
    constexpr int kPieces = kFeatures / 8,
                  kRows = kConsumers / kPieces;    // 16 bytes each, in a row; that all threads take
    constexpr int kAtOnce = 8;                     // rows of a thread
    const int rows = STAGE_K >> args.group_shift;  // in a stage
    const uint32_t end =
        min(args.scale_rows, quotient<32>((segment.end * kSplit - 1) * rows, args.per_group_stages) + rows);
    const int n = corner.n0 + static_cast<int>(threadIdx.x) % kPieces * 8;
    const char* const from = reinterpret_cast<const char*>(static_cast<const half*>(p.s) + n);
    const uint32_t pitch = 2 * static_cast<uint32_t>(p.N);
    // Of CTAs that take the stages in turn, each its own rows, if they have rows of their own.
    const uint32_t shift = kSplit > 1 && rows == 1 && args.group_stages == 1 ? 1 : 0;
    const uint32_t first = quotient<32>(segment.begin * kSplit * rows, args.per_group_stages) + rank * shift;
    half2 least = as_half2(0x24002400), most = least;  // 2^-6
#pragma unroll 1
    for (uint32_t row = first + (threadIdx.x / kPieces << shift); grouped && n < p.N && row < end;
         row += kRows * kAtOnce << shift) {
      uint4 v[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)  // behind the last one, that again
        v[i] = *reinterpret_cast<const uint4*>(from + uint64_t{min(row + (i * kRows << shift), end - 1)} * pitch);
#pragma unroll
      for (int i = 0; i < 4 * kAtOnce; ++i) {
        const half2 pair = __habs2(as_half2(reinterpret_cast<const uint32_t*>(v)[i]));
        least = __hmin2(least, pair);
        most = __hmax2(most, pair);
      }
    }
    return __low2float(least) >= SmallScales::LEAST && __high2float(least) >= SmallScales::LEAST &&
           __low2float(most) < SmallScales::LIMIT && __high2float(most) < SmallScales::LIMIT;
  };
  named_barrier(0, kStarters);  // the producer has set up the barriers
  for (bool more = walk.next(args, cluster, clusters, segment); more;
       more = kDeal != Deal::one && walk.next(args, cluster, clusters, segment)) {
    const Corner corner = corner_of_segment();
    bool small = false;
    if constexpr (kTile.wants_small()) {
      // Groups of 32 have so many that looking at them costs more than it saves.
      if (!of_32) small = !named_barrier_any(1, kConsumers, !has_small_scales(corner));
    }
    if (first_tile) wait_for_previous_kernel();  // which may use the locks, the partials, or C
    const int count = segment.end - segment.begin;
    const bool shared = kDeal == Deal::stripes && count < args.k_stages;
    const int unit0 = (segment.tile - args.whole_tiles) * args.k_stages;  // of the tile, if it is shared
    const int lock = 2 * (shared ? cluster_of(unit0) * kCtas + rank : 0);
    // Who comes last to the end of his part, bar two of thread 0's stages, sums them all: it waits for those that came before,
    // which wait for nobody. Drawn that early, the ticket is there when it is needed.
    const int own = (count - behind + kTeams - 1) / kTeams;  // stages of this team
    const int draws_at = behind + max(own - 2, 0) * kTeams;
    int ticket = 0;

    zero(acc);
    if constexpr (kScalesSums) {
      zero(sums);
      keep_ones();
    }
    if (behind < count) {
      barrier_wait(my_full + 8 * stage, parity);
#pragma unroll
      for (int step = 0; step < kWordsAhead; ++step) load_words(stage, step);
      if (!kScalesSums) load_scales(stage, 0);
    }
    auto multiply_stages = [&](auto small_scales) {
#pragma unroll 1
      for (int round = shared ? 0 : 1; round < 2; ++round) {  // so that the inner loop knows nothing of tickets
        const int end = round == 0 ? draws_at : count;
#pragma unroll 1
        for (; behind < end; behind += kTeams) {
          int next_stage = stage + kTeams, next_parity = parity;
          if (next_stage >= kStages) next_stage -= kStages, next_parity ^= 1;
          multiply_stage(small_scales, next_stage, next_parity, behind + kTeams >= count);
          to_release = lane < kPair ? my_empty + 8 * stage : 0;
          stage = next_stage;
          parity = next_parity;
        }
        if (round == 0 && threadIdx.x == 0) ticket = atomicAdd(args.locks + lock, 1);
      }
    };
    // for the compiler, REDUX gives a uniform value
    if (kTile.wants_small() && __reduce_or_sync(0xffffffff, small) != 0) {
      if constexpr (kTile.wants_small()) multiply_stages(std::true_type());
    } else {
      multiply_stages(std::false_type());
    }
    if constexpr (kScalesSums) add_scaled();
    wgmma_wait<0>();
    hide(acc);  // not read before the wait
    release(to_release);
    to_release = 0;
    behind -= count;
    if (kLoadsEarly && for_c) load_for_c(corner);
    reduce(small ? SmallScales::INVERSE : 1);
    if (shared) {
      if (threadIdx.x == 0) ticket_smem = ticket;
      named_barrier(1, kConsumers);
      const int sharers_first = cluster_of(unit0), sharers = cluster_of(unit0 + args.k_stages - 1) - sharers_first + 1;
      if (ticket_smem < sharers - 1) {
        float4* partial = partial_of(cluster, cluster == sharers_first);
#pragma unroll
        for (int j = 0; j < kMine; ++j) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i)
            __stcg(partial + (j * kBlocks + i) * kConsumers,
                   make_float4(acc[i][4 * j], acc[i][4 * j + 1], acc[i][4 * j + 2], acc[i][4 * j + 3]));
        }
        named_barrier(1, kConsumers);  // the stores of all threads come before thread 0's release
        if (threadIdx.x == 0) add_release(args.locks + lock + 1, 1);
        continue;
      }
      if (threadIdx.x == 0) {
        while (load_acquire(args.locks + lock + 1) < sharers - 1) {
        }
        args.locks[lock] = 0;
        args.locks[lock + 1] = 0;
      }
      named_barrier(1, kConsumers);
      // In the order of the clusters: what lies before this one, its own sums, what lies behind.
      constexpr int kVectors = kTile.vectors(), kMost = kTile.partials_at_once();
      constexpr int kBatch = kVectors < kMost ? kVectors : kMost;
      constexpr int kOwners = kTile.accumulators() < 64 ? 3 : 1;  // at once: a load takes most of a microsecond
#pragma unroll
      for (int base = 0; base < kVectors; base += kBatch) {
        float sum[kBatch][4] = {};
        int offset = base * kConsumers;
        // hidden, so that addresses are made here, not ahead of the loops above, where registers are dear
        asm volatile("" : "+r"(offset));
        auto add_partials = [&](int begin, int end) {
#pragma unroll 1
          for (int owner0 = begin; owner0 < end; owner0 += kOwners) {
            float4 v[kOwners][kBatch];
#pragma unroll
            for (int o = 0; o < kOwners; ++o) {
              const float4* partial = partial_of(owner0 + o, owner0 + o == sharers_first) + offset;
#pragma unroll
              for (int i = 0; i < kBatch && base + i < kVectors; ++i) {
                v[o][i] = make_float4(0, 0, 0, 0);
                if (owner0 + o < end) v[o][i] = __ldcg(partial + i * kConsumers);
              }
            }
#pragma unroll
            for (int o = 0; o < kOwners; ++o) {
#pragma unroll
              for (int i = 0; i < kBatch && base + i < kVectors; ++i) {
                sum[i][0] += v[o][i].x;
                sum[i][1] += v[o][i].y;
                sum[i][2] += v[o][i].z;
                sum[i][3] += v[o][i].w;
              }
            }
          }
        };
        add_partials(sharers_first, cluster);
#pragma unroll
        for (int i = 0; i < kBatch && base + i < kVectors; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][e] += acc[(base + i) % kBlocks][4 * ((base + i) / kBlocks) + e];
        }
        add_partials(cluster + 1, sharers_first + sharers);
#pragma unroll
        for (int i = 0; i < kBatch && base + i < kVectors; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[(base + i) % kBlocks][4 * ((base + i) / kBlocks) + e] = sum[i][e];
        }
      }
    }
    write(corner);
  }
  if constexpr (kPair > 1) {  // the other CTA may still tell this one's barriers that a place is free
    cluster_wait();           // the arrival at the start
    cluster_arrive();
    cluster_wait();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host
// ---------------------------------------------------------------------------------------------------------------------

template <int kIdx, bool kShortGroups, Deal kDeal>
Status launch(const Args& args, int grid, bool overlap, cudaStream_t stream) {
  constexpr Tile kTile = kTiles[kIdx].tile;
  const auto kernel =
      marlin_kernel<kTile.blocks, kTile.tokens, kTile.groups, kTile.teams, kTile.cluster, kShortGroups, kDeal>;
  constexpr int kSmem = kTile.smem_bytes();
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem) != cudaSuccess)
    return Status::launch_failed;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = kTile.consumers() + 128;
  config.dynamicSmemBytes = kSmem;
  config.stream = stream;
  cudaLaunchAttribute attribute;  // the kernel itself says how many CTAs a cluster has
  config.attrs = &attribute;
  if (overlap) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess ? Status::ok : Status::launch_failed;
}

template <int kIdx, bool kShortGroups>
Status launch(const Args& args, int grid, bool overlap, cudaStream_t stream) {
  if (args.stripes > 0) return launch<kIdx, kShortGroups, Deal::stripes>(args, grid, overlap, stream);
  if constexpr (kTiles[kIdx].tile.parts_one()) {
    if (args.whole_tiles <= args.clusters && args.token_tiles <= BAND && args.p.bias == nullptr)
      return launch<kIdx, kShortGroups, Deal::one>(args, grid, overlap, stream);
  }
  return launch<kIdx, kShortGroups, Deal::rounds>(args, grid, overlap, stream);
}

template <int kIdx>
Status launch(const Args& args, int grid, bool overlap, cudaStream_t stream) {
  if constexpr (kTiles[kIdx].tile.parts_short_groups()) {
    if (STAGE_K >> args.group_shift <= 1) return launch<kIdx, false>(args, grid, overlap, stream);
  }
  return launch<kIdx, true>(args, grid, overlap, stream);
}

template <int... kIdx>
Status launch_any(const Args& args, int grid, bool overlap, int tile_idx, cudaStream_t stream,
                  std::integer_sequence<int, kIdx...>) {
  Status status = Status::no_config;
  ((tile_idx == kIdx && (status = launch<kIdx>(args, grid, overlap, stream), true)) || ...);
  return status;
}

}  // namespace

Status run_sm90(const Problem& p, const Config& config, bool overlap, int32_t* locks, float* partials, void* stream) {
  const Status status = check_for_cuda(p);
  if (status != Status::ok || p.M == 0) return status;
  if (config.tile_idx < 0 || config.tile_idx >= kNumTiles || config.grid < 1) return Status::no_config;

  const Tile& tile = kTiles[config.tile_idx].tile;
  const int64_t stages = ceil_div(p.K, STAGE_K * tile.split()), slices = ceil_div(p.N, tile.cluster_features());
  const int64_t token_tiles = ceil_div(p.M, tile.tokens), tiles = slices * token_tiles;
  if (!takes(p) || tiles * stages > INT_MAX / 2 || p.M > INT_MAX / 2 || p.N > INT_MAX / 2) return Status::bad_shape;
  const bool grouped = p.group != p.K;
  Args args{};
  args.p = p;
  args.k_stages = static_cast<int>(stages);
  args.token_tiles = static_cast<int>(token_tiles);
  args.slices = static_cast<int>(slices);
  args.per_k_stages = ceil_div(int64_t{1} << 56, stages);
  args.per_token_tiles = ceil_div(int64_t{1} << 32, token_tiles);
  args.stripes = config.stripes;
  args.clusters = config.grid / tile.ctas();
  args.whole_tiles = static_cast<int>(config.stripes == 0 ? tiles : tiles / args.clusters * args.clusters);
  if (config.stripes > 0) {
    const int64_t units = (tiles - args.whole_tiles) * stages;
    args.stripe = static_cast<int>(units / config.stripes);
    args.longer = static_cast<int>(units % config.stripes);
  }
  int rows = 1;  // of scales in a stage
  args.group_shift = 30;
  if (grouped) {
    rows = static_cast<int>(p.group < STAGE_K ? STAGE_K / p.group : 1);
    args.group_shift = 0;
    while (STAGE_K >> args.group_shift > rows) ++args.group_shift;
    args.group_stages = static_cast<int>(p.group < STAGE_K ? 1 : p.group / STAGE_K);
    args.per_group_stages = ceil_div(int64_t{1} << 32, args.group_stages);
  }
  args.scale_rows = static_cast<int>(p.K / p.group);
  args.wide_c = p.N_C % 8 == 0 && is_aligned(p.C, 16);
  args.locks = locks;
  args.partials = partials;

  const bool encoded = encode_map(&args.a_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p.A, p.M, p.K_A, pitch_of_a(p),
                                  tile.tokens, 64, CU_TENSOR_MAP_SWIZZLE_128B) &&
                       encode_map(&args.b_map, CU_TENSOR_MAP_DATA_TYPE_INT64, p.B, p.K / TILE_K, p.N, 8 * p.N, STEPS,
                                  tile.features(), CU_TENSOR_MAP_SWIZZLE_NONE) &&
                       encode_map(&args.s_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p.s, p.K / p.group, p.N, 2 * p.N, rows,
                                  tile.features(), CU_TENSOR_MAP_SWIZZLE_NONE);
  if (!encoded) return Status::launch_failed;
  return launch_any(args, config.grid, overlap, config.tile_idx, static_cast<cudaStream_t>(stream),
                    std::make_integer_sequence<int, kNumTiles>());
}

}  // namespace marlin
#endif
