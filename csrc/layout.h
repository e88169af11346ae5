// layout.h: the packed weight format, as constants and constexpr index maps.
//
// Depends on nothing; host and device code include it. Its Python twin is marlin/layout.py; a test compares the two over
// every element. The format is the published Marlin one, byte for byte.
//
//   q     (K, N)  unsigned 4-bit values 0..15; the weight is (q - 8) * s, or (q - z) * s
//   B     (K / 16, 2 N) int32, the values packed
//   s     (K / group, N) fp16, the columns of each row permuted; one group: "channelwise", another permutation
//
// Extensions, absent from the published format:
//
//   s     may be bf16
//   z     (K / group, N) zero points, beside s: same shape, dtype and permutation, so that whoever loads the scales of its
//         features for a group (16 bytes for a lane) loads their zero points with the same index. Any finite value; the
//         integers 0..15 are exact. The weight is (q - z) * s, the difference before the product.
//   perm  (K) int32, act-order: the rows of the weight are sorted by group, row k multiplies column perm[k] of A. A
//         permutation of 0 .. K-1; entries that are no column of A (it has K_A <= K) are padding and count as zeros.
//         Drawn with groups of 4, K_A = 6:
//
//             column of A          0  1  2  3  4  5             row of B    0  1  2  3 | 4  5  6  7
//             its group (g_idx)    1  0  1  0  0  0             perm        1  3  4  5 | 0  2  6  7
//
// One row of B is one k16 row of the weight. In it, every 64 features are one chunk of 128 words (512 bytes), in which
// lane l of a warp owns the four words 4l .. 4l+3, i.e. one 16-byte load:
//
//        chunk of 64 features x k16              word j of lane l = 4g + t: its part of the 16x16 block at feature 16j
//   word 0      4      8            124
//        +------+------+-- ... --+------+        bits   31..28  27..24  23..20  19..16 | 15..12  11..8   7..4    3..0
//        |lane 0|lane 1|         |lane31|        k       2t+9    2t+1    2t+9    2t+1  |  2t+8    2t     2t+8    2t
//        +------+------+-- ... --+------+        feature g+8     g+8     g       g     |  g+8     g+8    g       g
//         4 words, j = 0..3
//
// The two halves of a word differ by one in k, so that (w >> 4i) & 0x000f000f is a pair (k, k + 1) of one feature: the
// register i of the left operand of mma.m16n8k16 (rows = features, columns = k) in the order 0, 2, 1, 3.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MARLIN_HD __host__ __device__
#else
#define MARLIN_HD
#endif

namespace marlin {

constexpr int TILE_K = 16;                        // rows of the weight in one row of B
constexpr int TILE_N = 64;                        // features in one chunk
constexpr int ZERO_POINT = 8;                     // the stored value that means 0
constexpr int CHUNK_WORDS = TILE_K * TILE_N / 8;  // 8 values in a word
constexpr int SCALE_RUN = 64;                     // grouped scales are permuted inside runs of 64 features
constexpr int SCALE_RUN_CHANNELWISE = 32;         // one group: inside runs of 32

struct Nibble {
  int64_t word;  // index into B, counted in int32 over the whole tensor
  int shift;     // bits below the value in that word
};

// Where B holds the value of row k, column n of a weight with N columns.
MARLIN_HD constexpr Nibble nibble_of(int64_t k, int64_t n, int64_t N) {
  const int k16 = static_cast<int>(k % TILE_K), n64 = static_cast<int>(n % TILE_N);
  const int j = n64 / 16, g = n64 % 8, upper = n64 / 8 % 2;  // block, lane group, feature g or g + 8
  const int t = k16 % 8 / 2, odd = k16 % 2, far = k16 / 8;   // lane in group, second of the pair, k or k + 8
  const int lane = 4 * g + t;
  return {k / TILE_K * 2 * N + n / TILE_N * CHUNK_WORDS + 4 * lane + j, 4 * (4 * odd + 2 * upper + far)};
}

// Position of column n in a row of grouped scales: 8i + j holds column i + 8j, so that lane group g finds the scales of its
// eight features of a chunk (g, g + 8, ..., g + 56) in one 16-byte load.
MARLIN_HD constexpr int64_t scale_of(int64_t n) {
  const int c = static_cast<int>(n % SCALE_RUN);
  return n - c + 8 * (c % 8) + c / 8;
}

// The same for a single group: 8i + 2b + e holds column 2i + e + 8b.
MARLIN_HD constexpr int64_t scale_of_channelwise(int64_t n) {
  const int c = static_cast<int>(n % SCALE_RUN_CHANNELWISE);
  return n - c + 8 * (c % 8 / 2) + 2 * (c / 8) + c % 2;
}

}  // namespace marlin
