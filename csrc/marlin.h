// marlin.h: the torch-free interface of the kernels: what a product is, how one is configured, one entry point a backend.
//
// Depends on layout.h. Each kernel file includes it and nothing else of the project, so that marlin.h, layout.h and one
// kernel file can be lifted into another engine. bindings.cpp is the caller here.
#pragma once
#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace marlin {

// ---------------------------------------------------------------------------------------------------------------------
// Problem
// ---------------------------------------------------------------------------------------------------------------------

enum class DType : int { f16 = 0, bf16 = 1, f32 = 2 };

// C = A @ dequant(B) + bias. All pointers are to memory of the device that computes.
struct Problem {
  const void* A;     // (M, K_A) dtype, rows lda elements apart, elements of a row adjacent
  const void* B;     // (K / 16, 2 N) int32, packed as in layout.h
  const void* s;     // (K / group, N) scale_dtype, permuted as in layout.h
  const void* bias;  // (N_C) dtype, or null
  void* C;           // (M, N_C) dtype, contiguous
  int64_t M;         // tokens, any number
  int64_t N;         // packed output features, a multiple of TILE_N
  int64_t K;         // packed input features, a multiple of TILE_K
  int64_t K_A;       // columns that A has: K, or fewer; the missing ones count as zeros
  int64_t N_C;       // columns that C has: N, or fewer; the others are not written
  int64_t lda;       // in elements
  int64_t group;     // rows of the weight that share a scale; K for channelwise
  DType dtype;       // of A, C and bias
  // What not every backend takes; the defaults are the published format.
  DType scale_dtype = DType::f16;  // of s and z
  const void* z = nullptr;         // (K / group, N) scale_dtype, permuted as s; null: all are ZERO_POINT
  const int32_t* perm = nullptr;   // (K): row k of the weight multiplies column perm[k] of A, zeros if that is no
                                   // column below K_A; null: column k
};

enum class Status : int {
  ok = 0,
  bad_shape,      // N, K, group or the sizes of A and C against them
  bad_alignment,  // A, B or s not 16-byte aligned, or lda not a multiple of 8
  bad_dtype,      // the backend has no kernel for dtype
  bad_option,     // zero points, or an order of the rows, that the backend does not take
  no_config,      // nothing in the backend's table fits the device
  launch_failed,  // the CUDA runtime refused the launch
};

constexpr const char* status_text(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::bad_shape: return "the sizes do not fit the packed format";
    case Status::bad_alignment: return "a pointer or row stride is not 16-byte aligned";
    case Status::bad_dtype: return "this backend has no kernel for the dtype";
    case Status::bad_option: return "this backend takes neither zero points nor an order of the rows";
    case Status::no_config: return "no configuration fits this device";
    case Status::launch_failed: return "the CUDA runtime refused the launch";
  }
  return "unknown status";
}

constexpr Status check_shape(const Problem& p) {
  const bool sizes = p.M >= 0 && p.N > 0 && p.K > 0 && p.N % TILE_N == 0 && p.K % TILE_K == 0;
  const bool group = p.group > 0 && p.group % TILE_K == 0 && p.K % p.group == 0;
  const bool edges = p.K_A > 0 && p.K_A <= p.K && p.lda >= p.K_A && p.N_C > 0 && p.N_C <= p.N;
  return sizes && group && edges ? Status::ok : Status::bad_shape;
}

// ---------------------------------------------------------------------------------------------------------------------
// CPU
// ---------------------------------------------------------------------------------------------------------------------

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

Isa cpu_best_isa();                       // the best one that this processor runs
int64_t cpu_num_tasks(const Problem& p);  // independent pieces of the product
// Computes the tasks [begin, end): the caller spreads them over its threads. Same bits whatever the spreading.
Status cpu_run(const Problem& p, Isa isa, int64_t begin, int64_t end);

// ---------------------------------------------------------------------------------------------------------------------
// CUDA
// ---------------------------------------------------------------------------------------------------------------------

struct Device {
  int capability;  // 80 for 8.0
  int num_sms;
  int smem_bytes;  // shared memory that one CTA may use
};

// Wishes of the caller; -1 is none.
struct Hints {
  int tile_n = -1;    // features per CTA
  int num_sms = -1;   // CTAs to launch
  int tile_idx = -1;  // into the backend's table
};

struct Config {
  int tile_idx = -1;  // into the backend's table; -1: nothing fits
  int features = 0;   // of a CTA's tile
  int tokens = 0;
  int grid = 0;              // CTAs
  int num_locks = 0;         // int32 counters that must be zero before, and are zero after
  int64_t num_partials = 0;  // float32 scratch for tiles that several CTAs share
  int stripes = 0;           // clusters that share tiles (Hopper)
  float us = 0;              // that an H200 is expected to take
};

Config choose_config_sm80(const Problem& p, const Device& device, const Hints& hints);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What every kernel asks of a problem.
inline Status check_for_cuda(const Problem& p) {
  if (check_shape(p) != Status::ok) return Status::bad_shape;
  if (p.dtype != DType::f16 || p.scale_dtype != DType::f16) return Status::bad_dtype;
  if (p.z != nullptr || p.perm != nullptr) return Status::bad_option;
  const bool operands = is_aligned(p.A, 16) && is_aligned(p.B, 16) && is_aligned(p.s, 16) && is_aligned(p.C, 2);
  return p.M == 0 || (operands && (p.lda % 8 == 0 || p.M == 1)) ? Status::ok : Status::bad_alignment;
}

// Ampere, Ada, and anything newer. FP16. Asynchronous; stream is a cudaStream_t of the current device. overlap, for Hopper and
// newer: the kernel may begin while the one before it in the stream still runs (programmatic dependent launch); it reads and
// writes only when that one has finished.
Status run_sm80(const Problem& p, const Config& config, bool overlap, int32_t* locks, float* partials, void* stream);

Config choose_config_sm90(const Problem& p, const Device& device, const Hints& hints);

// Hopper. FP16. The same; overlap: the kernel may begin while the one before it in the stream still runs (programmatic
// dependent launch): it reads weights and scales then, and all else when that one has finished.
Status run_sm90(const Problem& p, const Config& config, bool overlap, int32_t* locks, float* partials, void* stream);

// Hopper, at most 16 tokens. FP16. The same; locks are counters and words of sums, all zero before and after.
Config choose_config_sm90_few(const Problem& p, const Device& device, const Hints& hints);
Status run_sm90_few(const Problem& p, const Config& config, bool overlap, int32_t* locks, void* stream);

}  // namespace marlin

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// What the kernel files use of PTX and of the driver.
namespace marlin {

__device__ inline uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// x in a register for good: the compiler would rather make it anew, in every turn of the loop.
template <typename T>
__device__ inline T made(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

__device__ inline half2 as_half2(uint32_t bits) { return *reinterpret_cast<half2*>(&bits); }
__device__ inline uint32_t as_bits(half2 h) { return *reinterpret_cast<uint32_t*>(&h); }

// (word & mask) | bits in one instruction: 0xea is the truth table of (a & b) | c.
template <uint32_t kMask, uint32_t kBits>
__device__ inline uint32_t and_or(uint32_t word) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "n"(kMask), "n"(kBits));
  return r;
}

// .cg: past L1, nothing here is read twice by an SM. src_bytes < 16 fills the rest with zeros.
__device__ inline void cp_async16(uint32_t smem, const void* gmem, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(src_bytes) : "memory");
}

__device__ inline void cp_async16(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(gmem) : "memory");
}

// Into L2.
__device__ inline void prefetch(const void* gmem) { asm volatile("prefetch.global.L2 [%0];" ::"l"(gmem)); }

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <int kWords>
__device__ inline void load_smem(uint32_t (&v)[kWords], uint32_t smem) {
  if constexpr (kWords == 4) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(smem)
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(smem) : "memory");
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(smem) : "memory");
  }
}

__device__ inline void load_smem(uint32_t& v, uint32_t smem) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(smem) : "memory");
}

__device__ inline void store_smem16(uint32_t smem, uint32_t word) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(smem), "r"(word) : "memory");
}

// Two right operands: 8 tokens x k32.
__device__ inline void ldmatrix_x4(uint32_t (&first)[2], uint32_t (&second)[2], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first[0]), "=r"(first[1]), "=r"(second[0]), "=r"(second[1])
               : "r"(smem)
               : "memory");
}

// Not volatile: registers in, registers out, free to move.
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- from Hopper on -------------------------------------------------------------------------------------------------

// Let the next kernel of the stream begin; wait until all of the previous one is done and its memory seen.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// True in one lane of a whole warp. The compiler knows that what follows runs once, which it does not of `lane == 0`: it would
// put each instruction of a copy or a barrier into a loop over the lanes.
__device__ inline bool elected() {
  uint32_t is_elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is_elected));
  return is_elected != 0;
}

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_unless_0(uint32_t barrier) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p mbarrier.arrive.shared.b64 _, [%0]; }" ::"r"(barrier)
               : "memory");
}

// The same at a barrier of any CTA of the cluster. Nothing is published that way: reads have been made, that is all.
__device__ inline void barrier_arrive_in_cluster_unless_0(uint32_t barrier) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p mbarrier.arrive.shared::cluster.b64 _, [%0]; }" ::"r"(barrier)
               : "memory");
}

// Arrives, and makes the barrier wait for that many bytes of copies too.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline bool barrier_test(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

// In PTX down to the loop: of one in C++ the compiler assumes that lanes leave it one by one. Does nothing if `done`.
__device__ inline void barrier_wait(uint32_t barrier, int parity, bool done = false) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p bra DONE;\n"
      "WAIT: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra WAIT;\n"
      "DONE: }" ::"r"(barrier),
      "r"(parity), "r"(static_cast<uint32_t>(done))
      : "memory");
}

#if CUDART_VERSION >= 12000

// The map itself comes from memory, too: ahead of its first use.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of a matrix, its corner at column x, row y; what lies outside of the matrix arrives as zeros.
__device__ inline void copy_box(uint32_t smem, const CUtensorMap& map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(smem),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same, to the same place of both CTAs of a cluster of two, each counted by its CTA's barrier.
__device__ inline void copy_box_to_both(uint32_t smem, const CUtensorMap& map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Whole warps; nothing is published that way.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// Until all CTAs of the cluster have arrived there.
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ inline void store_smem(uint32_t smem, const float* v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

__device__ inline void add_smem(float* sum, uint32_t smem) {
  float v[4];
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(smem)
               : "memory");
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] += v[e];
}

// Two 8x8 matrices, each held as in the accumulators, stored transposed; lanes 0..15 give the addresses of the rows.
__device__ inline void store_transposed(uint32_t smem, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem), "r"(first), "r"(second)
               : "memory");
}

__device__ inline void named_barrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// The same, and whether it holds for any of these threads.
__device__ inline bool named_barrier_any(int id, int num_threads, bool holds) {
  uint32_t any;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; bar.red.or.pred p, %2, %3, p; selp.u32 %0, 1, 0, p; }"
               : "=r"(any)
               : "r"(static_cast<uint32_t>(holds)), "r"(id), "r"(num_threads)
               : "memory");
  return any != 0;
}

// The address of the same place in the shared memory of another CTA of the cluster.
__device__ inline uint32_t in_cta(uint32_t smem, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem), "r"(rank));
  return address;
}

// Four values into another CTA's shared memory; its barrier counts the bytes.
__device__ inline void send(uint32_t address, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

__device__ inline void barrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void add_release(int32_t* gmem, int value) {
  asm volatile("red.add.release.gpu.s32 [%0], %1;" ::"l"(gmem), "r"(value) : "memory");
}

__device__ inline int load_acquire(const int32_t* gmem) {
  int value;
  asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(value) : "l"(gmem) : "memory");
  return value;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The operands of the instruction, four accumulators (eight tokens) at a time.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define TEXT4 "%0, %1, %2, %3"
#define TEXT8 TEXT4 ", %4, %5, %6, %7"
#define TEXT16 TEXT8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TEXT24 TEXT16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TEXT32 TEXT24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TEXT48 TEXT32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TEXT64 TEXT48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(TOKENS, DS, A, B, ADD, ...)                                                                     \
  if constexpr (kTokens == TOKENS) {                                                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32.f16.f16 {" DS "}, {" A "}, " B ", " ADD \
                 ", 1, 1, 0;"                                                                                 \
                 : __VA_ARGS__                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0));                    \
  }

// d += a b, or d = a b: 64 features x kTokens tokens; a from registers, b a descriptor of shared memory.
template <int kTokens, bool kAdd>
__device__ inline void wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b) {
  WGMMA(16, TEXT8, "%8, %9, %10, %11", "%12", "%13", D8(0));
  WGMMA(32, TEXT16, "%16, %17, %18, %19", "%20", "%21", D16(0));
  WGMMA(48, TEXT24, "%24, %25, %26, %27", "%28", "%29", D16(0), D8(16));
  WGMMA(64, TEXT32, "%32, %33, %34, %35", "%36", "%37", D32(0));
  WGMMA(96, TEXT48, "%48, %49, %50, %51", "%52", "%53", D32(0), D16(32));
  WGMMA(128, TEXT64, "%64, %65, %66, %67", "%68", "%69", D32(0), D32(32));
}

#undef WGMMA
#undef D4
#undef D8
#undef D16
#undef D32
#undef TEXT4
#undef TEXT8
#undef TEXT16
#undef TEXT24
#undef TEXT32
#undef TEXT48
#undef TEXT64

// The right operand: rows (tokens) of 128 bytes, 16-byte pieces permuted as the tensor map's 128-byte swizzle does, eight
// rows every 1024 bytes. A k16 step further is 32 bytes on: 2 in the descriptor's unit.
__device__ inline uint64_t tokens_descriptor(uint32_t smem_in_16s) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(1 << 16 | smem_in_16s), "n"(0x40000040));
  return descriptor;
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime: nothing more to link.
inline Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// A row-major matrix whose rows lie `pitch` bytes apart, copied in boxes of box_rows x box_columns.
inline bool encode_map(CUtensorMap* map, CUtensorMapDataType type, const void* data, int64_t rows, int64_t columns,
                       int64_t pitch, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  static const Encode kEncode = find_encode();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitches[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t strides[2] = {1, 1};
  return kEncode != nullptr &&
         kEncode(map, type, 2, const_cast<void*>(data), sizes, pitches, box, strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Of the rows of A in bytes, as tensor maps want it; a single row has none.
inline int64_t pitch_of_a(const Problem& p) { return 2 * (p.M == 1 ? ceil_div(p.lda, 8) * 8 : p.lda); }

#endif  // CUDA 12

}  // namespace marlin
#endif
