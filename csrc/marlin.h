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
