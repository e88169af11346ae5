// tiles.cu: the time of every tile of a kernel file at every shape: what its choose_config's constants are fitted to.
//
// Includes csrc/marlin_sm90.cu with -DSM90, csrc/marlin_sm90_few.cu with -DSM90_FEW, else csrc/marlin_sm80.cu, to reach all of
// its table. bench/tiles.py compiles it, runs it, and fits. Prints a line for each K, N, M, tile and way to deal it out:
// K,N,M,tile, the columns that print_tile writes, us. Weights are cold: a graph of launches goes round copies of 256 MB or
// more in all. Of each timed product 1024 elements are compared with float64. With arguments, K,N,M or K,N,M,tile_idx each,
// only these are timed: for variants of a kernel file, whose path -DSOURCE="file.cu" gives.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef SOURCE
#include SOURCE
#elif defined(SM90)
#include "../csrc/marlin_sm90.cu"
#elif defined(SM90_FEW)
#include "../csrc/marlin_sm90_few.cu"
#else
#include "../csrc/marlin_sm80.cu"
#endif

namespace marlin {
namespace {

constexpr int kGroup = 128;
constexpr int kSamples = 1024;
constexpr size_t kColdBytes = size_t{256} << 20;
constexpr float kTurnsMs = 60;      // for each tile beyond 64 tokens
constexpr float kBusyMs = 100;      // and more for each of the better ones beyond 128
constexpr double kErrLimit = 5e-4;  // relative, as everywhere: FP16's rounding alone is 2.8e-4

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "tiles: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__host__ __device__ uint32_t random_word(uint64_t i, uint32_t seed) {
  uint32_t x = static_cast<uint32_t>(i) * 2654435761u + static_cast<uint32_t>(i >> 32) * 977u + seed;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

__global__ void fill_words(uint32_t* p, size_t count) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    p[i] = random_word(i, 1);
  }
}

__global__ void fill_halves(half* p, size_t count, uint32_t seed, float low, float high) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += gridDim.x * size_t{256}) {
    p[i] = __float2half(low + (high - low) * (random_word(i, seed) >> 8) / 16777216.0f);
  }
}

// sums[0] += |C - exact|^2, sums[1] += |exact|^2 over one element of C a block.
__global__ void compare(Problem p, double* sums) {
  const int64_t m = random_word(2 * blockIdx.x, 7) % p.M, n = random_word(2 * blockIdx.x + 1, 7) % p.N;
  __shared__ double parts[128];
  double part = 0;
  for (int64_t k = threadIdx.x; k < p.K; k += 128) {
    const Nibble nibble = nibble_of(k, n, p.N);
    const int q = static_cast<const uint32_t*>(p.B)[nibble.word] >> nibble.shift & 15;
    const float s = __half2float(static_cast<const half*>(p.s)[k / p.group * p.N + scale_of(n)]);
    part += static_cast<double>(__half2float(static_cast<const half*>(p.A)[m * p.lda + k])) * ((q - ZERO_POINT) * s);
  }
  parts[threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double exact = 0;
  for (const double each : parts) exact += each;
  const double difference = __half2float(static_cast<const half*>(p.C)[m * p.N + n]) - exact;
  atomicAdd(&sums[0], difference * difference);
  atomicAdd(&sums[1], exact * exact);
}

#ifdef SM90

constexpr bool kOverlap = true;  // as shipped

bool fits(const Tile& tile, int M) { return is_measured(tile, M); }

std::vector<Config> ways(const Problem& p, int tile_idx, int num_sms) {
  const Tile& tile = kTiles[tile_idx].tile;
  std::vector<Config> configs;
  for_each_way(ceil_div(p.N, tile.cluster_features()) * ceil_div(p.M, tile.tokens), num_sms / tile.ctas(),
               [&](int clusters, int stripes) { configs.push_back(make_config(p, tile_idx, clusters, stripes)); });
  return configs;
}

Status run_tile(const Problem& p, const Config& config, int32_t* locks, float* partials, cudaStream_t stream) {
  return run_sm90(p, config, kOverlap, locks, partials, stream);
}

// tile, features, tokens, rows of K that a cluster takes at once, clusters, stripes
void print_tile(const Tile& tile, const Config& config) {
  std::printf("%dx%dx%dx%dx%d,%d,%d,%d,%d,%d", tile.blocks, tile.tokens, tile.groups, tile.teams, tile.cluster,
              tile.cluster_features(), tile.tokens, STAGE_K * tile.split(), config.grid / tile.ctas(), config.stripes);
}

#elif defined(SM90_FEW)

constexpr bool kOverlap = true;  // as shipped

bool fits(const Tile& tile, int M) { return M <= tile.tokens && is_measured(tile, M); }

// Numbers of CTAs: the most of which each has whole tiles, or each tile an equal part, and all.
std::vector<Config> ways(const Problem& p, int tile_idx, int num_sms) {
  const Tile& tile = kTiles[tile_idx].tile;
  const int all = num_sms * tile.per_sm, even = even_stripes(ceil_div(p.N, TILE_N), all);
  std::vector<Config> configs = {make_config(p, tile_idx, even)};
  if (even < all) configs.push_back(make_config(p, tile_idx, all));
  return configs;
}

Status run_tile(const Problem& p, const Config& config, int32_t* locks, float*, cudaStream_t stream) {
  return run_sm90_few(p, config, kOverlap, locks, stream);
}

// tile, features, tokens, warps, CTAs
void print_tile(const Tile& tile, const Config& config) {
  std::printf("%dx%dx%dx%d,%d,%d,%d,%d", tile.tokens, tile.warps, tile.stages, tile.per_sm, TILE_N, tile.tokens,
              tile.warps, config.grid);
}

#else

constexpr bool kOverlap = false;  // as its constants were fitted

bool fits(const Tile& tile, int M) {
  const int tokens = tile.tokens();
  return M > 128 ? tokens >= 64 : 2 * tokens >= M && (tokens < 2 * M || tokens <= 16);
}

// Numbers of CTAs: one that divides the tiles or the other way round, and all.
std::vector<Config> ways(const Problem& p, int tile_idx, int num_sms) {
  const Tile& tile = kTiles[tile_idx].tile;
  const int64_t tiles = ceil_div(p.N, tile.features()) * ceil_div(p.M, tile.tokens());
  int even = num_sms;
  while (tiles % even != 0 && even % tiles != 0) --even;
  std::vector<Config> configs = {make_config(p, tile_idx, even)};
  if (even < num_sms) configs.push_back(make_config(p, tile_idx, num_sms));
  return configs;
}

Status run_tile(const Problem& p, const Config& config, int32_t* locks, float* partials, cudaStream_t stream) {
  return run_sm80(p, config, kOverlap, locks, partials, stream);
}

// tile, features, tokens, teams, CTAs
void print_tile(const Tile& tile, const Config& config) {
  std::printf("%dx%dx%dx%dx%dx%d,%d,%d,%d,%d", tile.blocks_n, tile.blocks_m, tile.warps_n, tile.warps_m, tile.teams,
              tile.stages, tile.features(), tile.tokens(), tile.teams, config.grid);
}

#endif

template <typename T>
T* allocate(size_t count) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)));
  return memory;
}

// A tile at a shape, dealt out in one way.
struct Timed {
  int tile_idx;
  Config config;
  cudaGraphExec_t replay = nullptr;
  float ms = 0;  // of its first replay
  std::vector<float> us;
};

struct Size {
  int K, N, M;
  int tile_idx = -1;  // -1: all that fit
};

// What the arguments ask for, or all that the constants are fitted to.
std::vector<Size> sizes_of(int argc, char** argv) {
  constexpr int kShapes[][2] = {{4096, 4096},  {4096, 6144}, {4096, 28672}, {14336, 4096}, {8192, 8192}, {8192, 57344},
                                {28672, 8192}, {1024, 1024}, {1024, 4096},  {4096, 1024},  {2048, 2048}};
  constexpr int kTokens[] = {1, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192};
  std::vector<Size> sizes;
  for (int i = 1; i < argc; ++i) {
    Size size;
    const int num_read = std::sscanf(argv[i], "%d,%d,%d,%d", &size.K, &size.N, &size.M, &size.tile_idx);
    if (num_read < 3 || std::min({size.K, size.N, size.M}) < 1 || size.tile_idx >= kNumTiles) {
      std::fprintf(stderr, "tiles: %s is neither K,N,M nor K,N,M,tile_idx of %d tiles\n", argv[i], kNumTiles);
      std::exit(2);
    }
    sizes.push_back(size);
  }
  if (argc > 1) return sizes;
  for (const auto& [K, N] : kShapes) {
    for (const int M : kTokens) {
      // Small layers tell the two Hopper kernels apart; few tokens will do.
      if (K * N >= 4096 * 4096 || (kOverlap && M <= 128)) sizes.push_back({K, N, M});
    }
  }
  // Few tokens first: after many the chip is hot, and they take up to a third longer.
  std::stable_sort(sizes.begin(), sizes.end(), [](const Size& a, const Size& b) { return a.M < b.M; });
  return sizes;
}

int run(const std::vector<Size>& sizes) {
  constexpr size_t kWords = size_t{200} << 20, kScales = size_t{32} << 20, kLocks = size_t{1} << 20;
  constexpr size_t kPartials = size_t{64} << 20, kSizeA = size_t{8192} * 28672, kSizeC = size_t{8192} * 57344;
  int num_sms = 0, smem_bytes = 0;
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  check(cudaDeviceGetAttribute(&smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  cudaStream_t stream;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream));
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  uint32_t* const words = allocate<uint32_t>(kWords);
  half* const scales = allocate<half>(kScales);
  half* const A = allocate<half>(kSizeA);
  half* const C = allocate<half>(kSizeC);
  int32_t* const locks = allocate<int32_t>(kLocks);
  float* const partials = allocate<float>(kPartials);
  double* const sums = allocate<double>(2);
  check(cudaMemsetAsync(locks, 0, kLocks * sizeof(int32_t), stream));
  fill_words<<<1024, 256, 0, stream>>>(words, kWords);
  fill_halves<<<1024, 256, 0, stream>>>(scales, kScales, 2, 0.002f, 0.012f);
  fill_halves<<<1024, 256, 0, stream>>>(A, kSizeA, 3, -1.0f, 1.0f);

  for (const auto& [K, N, M, tile_idx] : sizes) {
    const size_t copy_words = size_t{1} * K * N / 8, copy_scales = size_t{1} * K / kGroup * N;
    const int launches = M >= 1024 ? 2 : static_cast<int>(std::max<size_t>(2, kColdBytes / (4 * copy_words) + 1));
    if (size_t{1} * M * K > kSizeA || size_t{1} * M * N > kSizeC || launches * copy_words > kWords) {
      std::fprintf(stderr, "tiles: K=%d, N=%d, M=%d is more than there is memory set aside for\n", K, N, M);
      return 1;
    }
    std::vector<Timed> timed;
    for (int i = 0; i < kNumTiles; ++i) {
      const Tile& tile = kTiles[i].tile;
      if (tile_idx >= 0 ? i != tile_idx : !fits(tile, M)) continue;
      if (tile.smem_bytes() > smem_bytes) continue;
      Problem p{A, words, scales, nullptr, C, M, N, K, K, N, K, kGroup, DType::f16};
      Config before;
      for (const Config& config : ways(p, i, num_sms)) {
        if (config.grid == before.grid && config.stripes == before.stripes) continue;  // small layers have one way
        before = config;
        if (config.num_locks > static_cast<int>(kLocks) || config.num_partials > static_cast<int64_t>(kPartials)) {
          std::fprintf(stderr, "tiles: tile %d at K=%d, N=%d, M=%d wants more scratch than there is\n", i, K, N, M);
          return 1;
        }
        check(cudaMemsetAsync(C, 0xff, size_t{2} * M * N, stream));  // NaN
        cudaGraph_t graph;
        Timed each{i, config};
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        for (int copy = 0; copy < launches; ++copy) {
          p.B = words + copy * copy_words;
          p.s = scales + copy * copy_scales;
          const Status status = run_tile(p, config, locks, partials, stream);
          if (status != Status::ok) {
            std::fprintf(stderr, "tiles: tile %d at K=%d, N=%d, M=%d: %s\n", i, K, N, M, status_text(status));
            return 1;
          }
        }
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&each.replay, graph, 0));
        check(cudaGraphDestroy(graph));
        check(cudaEventRecord(begin, stream));
        check(cudaGraphLaunch(each.replay, stream));
        check(cudaEventRecord(end, stream));
        double host_sums[2];
        check(cudaMemsetAsync(sums, 0, sizeof(host_sums), stream));
        compare<<<kSamples, 128, 0, stream>>>(p, sums);
        check(cudaMemcpyAsync(host_sums, sums, sizeof(host_sums), cudaMemcpyDeviceToHost, stream));
        check(cudaStreamSynchronize(stream));
        check(cudaEventElapsedTime(&each.ms, begin, end));
        if (!(std::sqrt(host_sums[0] / host_sums[1]) <= kErrLimit)) {
          std::fprintf(stderr, "tiles: tile %d is wrong at K=%d, N=%d, M=%d, %d CTAs\n", i, K, N, M, config.grid);
          return 1;
        }
        timed.push_back(each);
      }
    }
    auto time = [&](Timed& each, const Timed& before) {
      float ms;
      check(cudaGraphLaunch(before.replay, stream));
      check(cudaEventRecord(begin, stream));
      check(cudaGraphLaunch(each.replay, stream));
      check(cudaEventRecord(end, stream));
      check(cudaStreamSynchronize(stream));
      check(cudaEventElapsedTime(&ms, begin, end));
      each.us.push_back(ms * 1e3f / launches);
    };
    if (timed.empty()) continue;
    auto median = [](const Timed& each) {
      std::vector<float> us = each.us;
      std::nth_element(us.begin(), us.begin() + us.size() / 2, us.end());
      return us[us.size() / 2];
    };
    // The second half of the turns: the first one only warms the chip.
    auto forget_half = [](Timed& each, int turns) { each.us.erase(each.us.begin(), each.us.begin() + turns / 2); };
    if (M <= 64) {
      for (int turn = 0; turn < 9; ++turn) {
        for (Timed& each : timed) time(each, each);
      }
    } else {
      // Power decides, and what ran before decides that by more than the tiles differ: each comes after the same one.
      float ms = 0;
      for (const Timed& each : timed) ms += each.ms + timed.front().ms;
      const int turns = std::max(4, static_cast<int>(kTurnsMs * static_cast<float>(timed.size()) / ms));
      for (int turn = 0; turn < turns; ++turn) {
        for (Timed& each : timed) time(each, timed.front());
      }
      for (Timed& each : timed) forget_half(each, turns);
    }
    if (M > 128) {
      // The better ones again, each for a while beside the best one, for that is how they are used: among slower tiles, which
      // draw less, some are 10% faster.
      const Timed& best = *std::min_element(timed.begin(), timed.end(),
                                            [&](const Timed& a, const Timed& b) { return median(a) < median(b); });
      const float limit = 1.1f * median(best);
      for (Timed& each : timed) {
        if (median(each) > limit) continue;
        const int turns = std::max(4, static_cast<int>(kBusyMs / (each.ms + best.ms)));
        Timed again = each;
        again.us.clear();
        for (int turn = 0; turn < turns; ++turn) time(again, best);
        forget_half(again, turns);
        again.us.swap(each.us);
      }
    }
    for (Timed& each : timed) {
      check(cudaGraphExecDestroy(each.replay));
      std::printf("%d,%d,%d,", K, N, M);
      print_tile(kTiles[each.tile_idx].tile, each.config);
      std::printf(",%.2f\n", median(each));
    }
  }
  return 0;
}

}  // namespace
}  // namespace marlin

int main(int argc, char** argv) { return marlin::run(marlin::sizes_of(argc, argv)); }
