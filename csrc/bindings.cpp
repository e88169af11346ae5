// bindings.cpp: torch's view of the kernels: checks, dispatch by device, scratch memory, and the operators themselves.
//
// Depends on torch and marlin.h; the only file of the library that knows torch. marlin/ops.py is the caller. Everything
// that can be wrong with an argument is refused here, before anything is launched or written, by one sentence that names
// the argument, what it is and what it should be. Built with MARLIN_WITH_CUDA if the CUDA kernels are there.
#include <ATen/Parallel.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#ifdef MARLIN_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "marlin.h"

namespace marlin {
namespace {

using at::Tensor;
using c10::ScalarType;

// ---------------------------------------------------------------------------------------------------------------------
// Words for messages; called on failure only
// ---------------------------------------------------------------------------------------------------------------------

std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return c10::toString(t.scalar_type());
  }
}

std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks
// ---------------------------------------------------------------------------------------------------------------------

void check_device(const char* op, const char* name, const Tensor& t, const char* first_name, const Tensor& first) {
  TORCH_CHECK_VALUE(t.device() == first.device(), op, ": ", name, " is on ", t.device(), " but ", first_name, " is on ",
                    first.device(), ": all should be on one device");
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype, const char* should) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype, op, ": ", name, " is ", dtype_name(t), " but should be ", should);
}

void check_contiguous(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, " has strides ", shape_text(t.strides()),
                    " but should be contiguous");
}

void check_aligned(const char* op, const char* name, const Tensor& t) {
  const auto offset = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16;
  TORCH_CHECK_VALUE(offset == 0, op, ": ", name, " starts ", offset,
                    " bytes after a multiple of 16 but should be 16-byte aligned on a GPU");
}

// B (K / 16, 2 N) int32 and s (K / group, N) fp16 or, on a CPU, bf16, both contiguous and on the device of x: fills their
// part of the problem.
void set_weights(const char* op, const char* x_name, const Tensor& x, const Tensor& B, const Tensor& s, Problem& p) {
  check_device(op, "B", B, x_name, x);
  check_device(op, "s", s, x_name, x);
  check_dtype(op, "B", B, ScalarType::Int, "int32");
  const bool bf16 = s.scalar_type() == ScalarType::BFloat16 && s.is_cpu();
  if (!bf16) check_dtype(op, "s", s, ScalarType::Half, s.is_cpu() ? "float16 or bfloat16" : "float16 on a GPU");
  TORCH_CHECK_VALUE(B.dim() == 2, op, ": B has shape ", shape_text(B.sizes()), " but should be (K / 16, 2 N)");
  TORCH_CHECK_VALUE(s.dim() == 2, op, ": s has shape ", shape_text(s.sizes()), " but should be (K / group, N)");
  TORCH_CHECK_VALUE(B.size(0) > 0 && B.size(1) > 0 && B.size(1) % (2 * TILE_N) == 0, op, ": B has shape ",
                    shape_text(B.sizes()), " but should be (K / 16, 2 N) with N a multiple of ", TILE_N);
  p.K = B.size(0) * TILE_K;
  p.N = B.size(1) / 2;
  TORCH_CHECK_VALUE(s.size(1) == p.N, op, ": s has N=", s.size(1), " but B is packed for N=", p.N);
  const int64_t num_groups = s.size(0);
  TORCH_CHECK_VALUE(num_groups > 0 && p.K % num_groups == 0 && p.K / num_groups % TILE_K == 0, op, ": s has ",
                    num_groups, " groups but should have a number that cuts K=", p.K, " into multiples of ", TILE_K);
  p.group = p.K / num_groups;
  check_contiguous(op, "B", B);
  check_contiguous(op, "s", s);
  p.B = B.const_data_ptr();
  p.s = s.const_data_ptr();
  p.scale_dtype = bf16 ? DType::bf16 : DType::f16;
}

// Zero points z as s is, or none; perm (K) int32, or none. After set_weights.
void set_extensions(const char* op, const Tensor& s, const std::optional<Tensor>& z, const std::optional<Tensor>& perm,
                    Problem& p) {
  if (z.has_value()) {
    TORCH_CHECK_VALUE(s.is_cpu(), op, ": z is given but should not be on a GPU, whose kernels take no zero points yet");
    check_device(op, "z", *z, "s", s);
    check_dtype(op, "z", *z, s.scalar_type(), ("of the dtype of s, " + dtype_name(s)).c_str());
    TORCH_CHECK_VALUE(z->sizes() == s.sizes(), op, ": z has shape ", shape_text(z->sizes()),
                      " but should be that of s, ", shape_text(s.sizes()));
    check_contiguous(op, "z", *z);
    p.z = z->const_data_ptr();
  }
  if (perm.has_value()) {
    TORCH_CHECK_VALUE(s.is_cpu(), op, ": perm is given but should not be on a GPU, whose kernels take no order yet");
    check_device(op, "perm", *perm, "s", s);
    check_dtype(op, "perm", *perm, ScalarType::Int, "int32");
    TORCH_CHECK_VALUE(perm->dim() == 1 && perm->size(0) == p.K, op, ": perm has shape ", shape_text(perm->sizes()),
                      " but should be ", shape_text({p.K}));
    check_contiguous(op, "perm", *perm);
    p.perm = static_cast<const int32_t*>(perm->const_data_ptr());
  }
}

DType check_float(const char* op, const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  if (dtype == ScalarType::Half) return DType::f16;
  TORCH_CHECK_VALUE(t.is_cpu() && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Float), op, ": ", name, " is ",
                    dtype_name(t), " but should be ", t.is_cpu() ? "float16, bfloat16 or float32" : "float16 on a GPU");
  return dtype == ScalarType::BFloat16 ? DType::bf16 : DType::f32;
}

// x as (M, K_A) rows that the kernels can read, copied only if they cannot as it is; fills A, M, K_A, lda of the problem.
// The result must outlive the launch's enqueueing.
Tensor set_activations(const Tensor& x, Problem& p) {
  const int64_t K_A = x.size(-1);
  Tensor rows = x.dim() == 2 ? x : x.reshape({-1, K_A});
  p.M = rows.size(0);
  p.K_A = K_A;
  int64_t lda = p.M == 1 ? K_A : rows.stride(0);
  bool readable = (rows.stride(1) == 1 || K_A == 1) && lda >= K_A;
  if (x.is_cuda()) {
    // 16-byte loads: rows start at multiples of 8 halves, and the last one may not reach past its row.
    if (K_A % 8 != 0) {
      rows = at::constant_pad_nd(rows, {0, 8 - K_A % 8});
      lda = rows.size(1);
      readable = true;
    }
    readable = readable && lda % 8 == 0 && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  }
  if (!readable) {
    rows = rows.clone(at::MemoryFormat::Contiguous);
    lda = K_A;
  }
  p.A = rows.const_data_ptr();
  p.lda = lda;
  return rows;
}

// Bytes from the first to one past the last element.
std::pair<uintptr_t, uintptr_t> span_of(const Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + (last + 1) * t.element_size()};
}

void check_no_overlap(const char* op, const Tensor& C, const char* name, const Tensor& t) {
  const auto [c_begin, c_end] = span_of(C);
  const auto [begin, end] = span_of(t);
  TORCH_CHECK_VALUE(c_end <= begin || end <= c_begin, op, ": C shares memory with ", name, " but should not");
}

// ---------------------------------------------------------------------------------------------------------------------
// CPU
// ---------------------------------------------------------------------------------------------------------------------

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512"};

Isa isa_of(const std::string& name, const char* what) {
  const Isa best = cpu_best_isa();
  if (name == "auto") return best;
  for (int i = 0; i < 3; ++i) {
    if (name != kIsaNames[i]) continue;
    TORCH_CHECK_VALUE(i <= static_cast<int>(best), what, " is ", name, " but this processor runs ",
                      kIsaNames[static_cast<int>(best)], " at best");
    return static_cast<Isa>(i);
  }
  TORCH_CHECK_VALUE(false, what, " is '", name, "' but should be portable, avx2, avx512 or auto");
}

// The instruction set in use: MARLIN_CPU_ISA, read once, until set_cpu_isa says otherwise.
std::atomic<int>& current_isa() {
  static std::atomic<int> isa = [] {
    const char* name = std::getenv("MARLIN_CPU_ISA");
    return static_cast<int>(isa_of(name && *name ? name : "auto", "marlin: MARLIN_CPU_ISA"));
  }();
  return isa;
}

void run_on_cpu(const char* op, const Problem& p) {
  const Isa isa = static_cast<Isa>(current_isa().load(std::memory_order_relaxed));
  std::atomic<Status> status{Status::ok};
  at::parallel_for(0, cpu_num_tasks(p), 1, [&](int64_t begin, int64_t end) {
    const Status here = cpu_run(p, isa, begin, end);
    if (here != Status::ok) status = here;
  });
  TORCH_CHECK(status == Status::ok, op, ": the CPU backend failed: ", status_text(status));
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA
// ---------------------------------------------------------------------------------------------------------------------

// What the environment and tests say about the kernels. Read by every call, so that one process can compare.
enum class Backend : int { automatic, sm80, sm90, sm90_few };

struct CudaOptions {
  std::atomic<Backend> backend{Backend::automatic};
  std::atomic<bool> overlap{true};  // programmatic dependent launch, on Hopper and newer
  std::atomic<int> tile_idx{-1};    // of the backend's table: for tests of each; -1 leaves the choice
};

constexpr std::pair<const char*, Backend> kBackends[] = {
    {"auto", Backend::automatic}, {"sm80", Backend::sm80}, {"sm90", Backend::sm90}, {"sm90_few", Backend::sm90_few}};

Backend backend_of(const std::string& name, const char* what) {
  for (const auto& [known, backend] : kBackends)
    if (name == known) return backend;
  TORCH_CHECK_VALUE(false, what, " is '", name, "' but should be auto, sm80, sm90 or sm90_few");
}

const char* backend_name(Backend backend) {
  return std::find_if(std::begin(kBackends), std::end(kBackends), [&](auto& b) { return b.second == backend; })->first;
}

CudaOptions& cuda_options() {
  static CudaOptions options;
  return options;
}

void read_environment() {
  const auto text = [](const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return std::string(value != nullptr && *value != 0 ? value : otherwise);
  };
  cuda_options().backend = backend_of(text("MARLIN_BACKEND", "auto"), "marlin: MARLIN_BACKEND");
  const std::string overlap = text("MARLIN_PDL", "1");
  TORCH_CHECK_VALUE(overlap == "0" || overlap == "1", "marlin: MARLIN_PDL is '", overlap, "' but should be 0 or 1");
  cuda_options().overlap = overlap == "1";
}

#ifdef MARLIN_WITH_CUDA

const Device& device_info(int index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const Device>> devices;
  const std::lock_guard<std::mutex> guard(mutex);
  if (static_cast<size_t>(index) >= devices.size()) devices.resize(index + 1);
  if (!devices[index]) {
    const auto attribute = [index](cudaDeviceAttr which) {
      int value = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
      return value;
    };
    devices[index] = std::make_unique<const Device>(
        Device{attribute(cudaDevAttrComputeCapabilityMajor) * 10 + attribute(cudaDevAttrComputeCapabilityMinor),
               attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)});
  }
  return *devices[index];
}

// Zeroed int32 words for the kernels, counters most of them, which leave them zeroed. The caller's workspace is not used:
// frameworks re-create such buffers uninitialised, and one that is not zero would spoil the result.
//
// Launches of one stream follow one another, so one set of counters serves them all; two streams never share one. A launch
// that is captured into a graph may be replayed at any time and on any stream, so it must not share with eager launches
// either: each (stream, capture) has a set of its own, two streams forked inside one capture have two. The sets are cut from
// blocks of CUDA's own allocator, zeroed once and never given back, since nobody tells when the last replay is over: 1 KB
// for each capture, about 1 MB if a product of at most 16 tokens is in it. Torch's allocator would not do: under capture it
// serves from the graph's private pool, where torch.compile's graphs tolerate nothing that outlives the call, and a set
// zeroed in each call costs a launch.
class LockPool {
 public:
  int32_t* get(int device, cudaStream_t stream, int num_locks) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long capture = 0;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
    if (status != cudaStreamCaptureStatusActive) capture = kEager;

    const std::lock_guard<std::mutex> guard(mutex_);
    // The list is in order of use, so that the usual caller is found at once.
    const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) {
      return e.device == device && e.stream == stream && e.capture == capture && e.num_locks >= num_locks;
    });
    if (entry != entries_.end()) {
      entries_.splice(entries_.begin(), entries_, entry);
      return entry->locks;
    }
    const int rounded = (num_locks + kGranule - 1) / kGranule * kGranule;
    entries_.push_front({device, stream, capture, rounded, cut(device, rounded)});
    // What is forgotten is not reused. A capture under way, and a stream in use, are among the newest.
    if (entries_.size() > kMaxEntries) entries_.pop_back();
    return entries_.front().locks;
  }

 private:
  static constexpr unsigned long long kEager = 0;  // no capture has this id
  static constexpr int kGranule = 256;             // counters: 1 KB
  static constexpr int kBlock = 1 << 18;           // counters: 1 MB
  static constexpr size_t kMaxEntries = 256;
  struct Entry {
    int device;
    cudaStream_t stream;
    unsigned long long capture;
    int num_locks;
    int32_t* locks;
  };
  struct Block {
    int device;
    int num_left;
    int32_t* next;
  };

  int32_t* cut(int device, int num_locks) {
    auto block = std::find_if(blocks_.begin(), blocks_.end(),
                              [&](const Block& b) { return b.device == device && b.num_left >= num_locks; });
    if (block == blocks_.end()) {
      const int size = std::max(num_locks, kBlock);
      int32_t* memory = nullptr;
      // Allowed beside a capture by the relaxed mode, and zeroed on a stream that the capture does not know.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
      cudaStream_t side = nullptr;
      cudaError_t error = cudaMalloc(&memory, size * sizeof(int32_t));
      if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
      if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, size * sizeof(int32_t), side);
      if (error == cudaSuccess) error = cudaStreamSynchronize(side);
      if (side != nullptr) (void)cudaStreamDestroy(side);
      C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
      C10_CUDA_CHECK(error);
      block = blocks_.insert(blocks_.end(), {device, size, memory});
    }
    int32_t* const locks = block->next;
    block->next += num_locks;
    block->num_left -= num_locks;
    return locks;
  }

  std::mutex mutex_;
  std::list<Entry> entries_;
  std::list<Block> blocks_;
};

LockPool& lock_pool() {
  // Never destroyed: at exit the CUDA context may be gone before static objects are.
  static LockPool* pool = new LockPool;
  return *pool;
}

// A kernel file, and its configuration.
struct Choice {
  Backend backend;
  Config config;
};

// Of Hopper's own two kernels the one that is expected to be faster; that for Ampere where neither takes the problem.
Choice choose(const Problem& p, const Device& device, const Hints& hints, Backend wish) {
  const auto try_backend = [&](Backend backend, auto choose_config) -> Choice {
    Config config = choose_config(p, device, hints);
    // the caller's hints are wishes only
    if (config.tile_idx < 0 && hints.tile_idx < 0) config = choose_config(p, device, Hints{});
    return {backend, config};
  };
  Choice choice{wish, {}};
  const auto consider = [&](Backend backend, auto choose_config) {
    if (wish != backend && wish != Backend::automatic) return;
    const Choice other = try_backend(backend, choose_config);
    if (other.config.tile_idx >= 0 && (choice.config.tile_idx < 0 || other.config.us < choice.config.us))
      choice = other;
  };
#ifdef MARLIN_WITH_SM90
  consider(Backend::sm90_few, choose_config_sm90_few);
  consider(Backend::sm90, choose_config_sm90);
#endif
  if (choice.config.tile_idx < 0) consider(Backend::sm80, choose_config_sm80);
  return choice;
}

// The choice tries every tile, which takes longer than a launch: what it said is kept, by thread.
const Choice& choice_for(const Problem& p, const Device& device, int index, const Hints& hints, Backend wish) {
  struct Entry {
    std::array<int64_t, 9> key{-1};
    Choice choice;
  };
  thread_local std::array<Entry, 512> cache;
  const std::array<int64_t, 9> key{
      p.M, p.N, p.K, p.group, index, hints.tile_n, hints.num_sms, hints.tile_idx, static_cast<int64_t>(wish)};
  const auto mixed = static_cast<uint64_t>(p.M * 0x9e3779b1 + p.N * 0x85ebca77 + p.K * 0xc2b2ae3d + index);
  Entry& entry = cache[mixed / 64 % cache.size()];
  if (entry.key != key) entry = {key, choose(p, device, hints, wish)};
  return entry.choice;
}

void run_on_cuda(const char* op, const Problem& p, const Hints& hints, const Tensor& x) {
  const auto index = static_cast<c10::DeviceIndex>(x.get_device());
  const c10::cuda::CUDAGuard device_guard(index);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(index).stream();
  const Device& device = device_info(index);
  TORCH_CHECK(device.capability >= 80, op, ": ", x.device(), " has compute capability ", device.capability / 10, ".",
              device.capability % 10, " but should have 8.0 (Ampere) or newer");
  Hints wishes = hints;
  wishes.tile_idx = cuda_options().tile_idx;
  const Choice choice = choice_for(p, device, index, wishes, cuda_options().backend);
  const Config& config = choice.config;
  TORCH_CHECK(config.tile_idx >= 0, op, ": ", status_text(Status::no_config), ", ", x.device(), ", for M=", p.M,
              ", N=", p.N, ", K=", p.K, ", group=", p.group);
  int32_t* locks = config.num_locks > 0 ? lock_pool().get(index, stream, config.num_locks) : nullptr;
  Tensor partials;
  if (config.num_partials > 0) partials = at::empty({config.num_partials}, x.options().dtype(at::kFloat));
  float* const scratch = partials.defined() ? partials.data_ptr<float>() : nullptr;
  const bool overlap = cuda_options().overlap;
  Status status = Status::no_config;
  switch (choice.backend) {
#ifdef MARLIN_WITH_SM90
    case Backend::sm90_few: status = run_sm90_few(p, config, overlap, locks, stream); break;
    case Backend::sm90: status = run_sm90(p, config, overlap, locks, scratch, stream); break;
#endif
    default: status = run_sm80(p, config, overlap && device.capability >= 90, locks, scratch, stream);
  }
  TORCH_CHECK(status == Status::ok, op, ": ", status_text(status),
              status == Status::launch_failed ? std::string(": ") + cudaGetErrorString(cudaGetLastError()) : "");
}

#endif  // MARLIN_WITH_CUDA

void check_cuda(const char* op, const char* x_name, const Tensor& x, const Tensor& B, const Tensor& s,
                const Problem& p) {
#ifdef MARLIN_WITH_CUDA
  TORCH_CHECK_VALUE(p.group == p.K || p.group == 128 || p.group == 64 || p.group == 32, op, ": s cuts K=", p.K,
                    " into groups of ", p.group, " but a GPU takes groups of 32, 64, 128 or one group");
  check_aligned(op, "B", B);
  check_aligned(op, "s", s);
#else
  TORCH_CHECK(false, op, ": ", x_name, " is on ", x.device(), " but this build of marlin has no CUDA kernels");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators
// ---------------------------------------------------------------------------------------------------------------------

void run(const char* op, const Problem& p, const Hints& hints, const Tensor& x) {
  if (p.M == 0) return;
#ifdef MARLIN_WITH_CUDA
  if (x.is_cuda()) return run_on_cuda(op, p, hints, x);
#endif
  run_on_cpu(op, p);
}

// C = A @ dequant(B), as the published Marlin: A (M, K), C (M, N) of one dtype, both given. workspace is checked as there,
// but not used (see LockPool). thread_k, thread_n, sms are hints; max_par is part of the workspace's size alone.
void mul(const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& s, const Tensor& workspace, int64_t thread_k,
         int64_t thread_n, int64_t sms, int64_t max_par) {
  constexpr const char* op = "marlin.mul";
  Problem p{};
  p.dtype = check_float(op, "A", A);
  TORCH_CHECK_VALUE(A.dim() == 2, op, ": A has shape ", shape_text(A.sizes()), " but should be (M, K)");
  set_weights(op, "A", A, B, s, p);
  TORCH_CHECK_VALUE(A.size(1) == p.K, op, ": A has K=", A.size(1), " but B is packed for K=", p.K);
  check_device(op, "C", C, "A", A);
  check_dtype(op, "C", C, A.scalar_type(), "of the dtype of A");
  TORCH_CHECK_VALUE(C.dim() == 2 && C.size(0) == A.size(0) && C.size(1) == p.N, op, ": C has shape ",
                    shape_text(C.sizes()), " but should be ", shape_text({A.size(0), p.N}));
  check_contiguous(op, "C", C);
  check_device(op, "workspace", workspace, "A", A);
  TORCH_CHECK_VALUE(max_par >= 1, op, ": max_par is ", max_par, " but should be at least 1");
  const int64_t workspace_bytes = 4 * (p.N / 128 * max_par);
  const int64_t has_bytes = workspace.numel() * static_cast<int64_t>(workspace.element_size());
  TORCH_CHECK_VALUE(has_bytes >= workspace_bytes, op, ": workspace has ", has_bytes, " bytes but should have at least ",
                    workspace_bytes, ", N / 128 * max_par int32");
  const auto is_tile = [](int64_t size) { return size == -1 || size == 64 || size == 128 || size == 256; };
  TORCH_CHECK_VALUE(is_tile(thread_k), op, ": thread_k is ", thread_k, " but should be -1, 64, 128 or 256");
  TORCH_CHECK_VALUE(is_tile(thread_n), op, ": thread_n is ", thread_n, " but should be -1, 64, 128 or 256");
  TORCH_CHECK_VALUE(sms == -1 || sms >= 1, op, ": sms is ", sms, " but should be -1 or at least 1");
  if (A.is_cuda()) {
    check_cuda(op, "A", A, B, s, p);
    check_aligned(op, "C", C);
  }
  check_no_overlap(op, C, "A", A);
  check_no_overlap(op, C, "B", B);
  check_no_overlap(op, C, "s", s);

  const Tensor rows = set_activations(A, p);
  p.bias = nullptr;
  p.C = C.data_ptr();
  p.N_C = p.N;
  run(op, p, {static_cast<int>(thread_n), static_cast<int>(std::min<int64_t>(sms, 1 << 20))}, A);
}

// x (..., in_features) -> (..., out_features) of x's dtype; bias (out_features) of that dtype or none. in_features and
// out_features default to the K and N of B; smaller ones tell that the weight was padded when it was packed. z: zero
// points, as s; perm (K): the column of x that each row of the weight multiplies.
Tensor linear(const Tensor& x, const Tensor& B, const Tensor& s, const std::optional<Tensor>& bias,
              std::optional<int64_t> in_features, std::optional<int64_t> out_features, const std::optional<Tensor>& z,
              const std::optional<Tensor>& perm) {
  constexpr const char* op = "marlin.linear";
  Problem p{};
  p.dtype = check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has no dimensions but should have (..., in_features)");
  set_weights(op, "x", x, B, s, p);
  set_extensions(op, s, z, perm, p);
  const int64_t K_A = in_features.value_or(p.K);
  p.N_C = out_features.value_or(p.N);
  TORCH_CHECK_VALUE(K_A >= 1 && K_A <= p.K, op, ": in_features is ", K_A, " but should be 1 to K=", p.K, " of B");
  TORCH_CHECK_VALUE(p.N_C >= 1 && p.N_C <= p.N, op, ": out_features is ", p.N_C, " but should be 1 to N=", p.N,
                    " of B");
  TORCH_CHECK_VALUE(x.size(-1) == K_A, op, ": x has K=", x.size(-1), " but B is packed for K=", K_A);
  if (bias.has_value()) {
    check_device(op, "bias", *bias, "x", x);
    check_dtype(op, "bias", *bias, x.scalar_type(), "of the dtype of x");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == p.N_C, op, ": bias has shape ", shape_text(bias->sizes()),
                      " but should be ", shape_text({p.N_C}));
    check_contiguous(op, "bias", *bias);
    p.bias = bias->const_data_ptr();
  }
  if (x.is_cuda()) check_cuda(op, "x", x, B, s, p);

  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = p.N_C;
  Tensor C = at::empty(sizes, x.options());
  if (C.numel() == 0) return C;
  const Tensor rows = set_activations(x, p);
  p.C = C.data_ptr();
  run(op, p, {}, x);
  return C;
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd: neither operator has a derivative
// ---------------------------------------------------------------------------------------------------------------------

const auto& mul_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("marlin::mul", "").typed<decltype(mul)>();
  return op;
}

const auto& linear_op() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("marlin::linear", "").typed<decltype(linear)>();
  return op;
}

// Whatever writes into C tells autograd, which may have saved C for something else.
void mul_counted(const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& s, const Tensor& workspace,
                 int64_t thread_k, int64_t thread_n, int64_t sms, int64_t max_par) {
  C.unsafeGetTensorImpl()->bump_version();
  const at::AutoDispatchBelowADInplaceOrView guard;
  mul_op().call(A, B, C, s, workspace, thread_k, thread_n, sms, max_par);
}

// mul writes into an argument, so it refuses gradients at once, as torch's own functions with out= do.
void mul_autograd(const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& s, const Tensor& workspace,
                  int64_t thread_k, int64_t thread_n, int64_t sms, int64_t max_par) {
  if (at::GradMode::is_enabled()) {
    const auto refuse = [](const char* name, const Tensor& t) {
      TORCH_CHECK(!t.requires_grad(), "marlin.mul: ", name, " requires grad but should not, for marlin.mul has no ",
                  "derivative; call it under torch.no_grad()");
    };
    refuse("A", A);
    refuse("C", C);
    refuse("s", s);
  }
  mul_counted(A, B, C, s, workspace, thread_k, thread_n, sms, max_par);
}

// linear runs forward in a model that trains something before it, and says so if the gradient is asked for.
struct LinearWithoutDerivative : torch::autograd::Function<LinearWithoutDerivative> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& x, const Tensor& B, const Tensor& s,
                        const std::optional<Tensor>& bias, std::optional<int64_t> in_features,
                        std::optional<int64_t> out_features, const std::optional<Tensor>& z,
                        const std::optional<Tensor>& perm) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return linear_op().call(x, B, s, bias, in_features, out_features, z, perm);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext*, const torch::autograd::tensor_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "marlin.linear: has no derivative, for it is made for inference; detach x or ",
                                "call it under torch.no_grad()");
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& B, const Tensor& s, const std::optional<Tensor>& bias,
                       std::optional<int64_t> in_features, std::optional<int64_t> out_features,
                       const std::optional<Tensor>& z, const std::optional<Tensor>& perm) {
  const auto has_grad = [](const std::optional<Tensor>& t) { return t.has_value() && t->requires_grad(); };
  if (at::GradMode::is_enabled() && (x.requires_grad() || s.requires_grad() || has_grad(bias) || has_grad(z))) {
    return LinearWithoutDerivative::apply(x, B, s, bias, in_features, out_features, z, perm);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linear_op().call(x, B, s, bias, in_features, out_features, z, perm);
}

// ---------------------------------------------------------------------------------------------------------------------
// Plain functions
// ---------------------------------------------------------------------------------------------------------------------

// layout.h as tensors, for the test that compares it with marlin/layout.py: word and shift (K, N), scale and
// scale_channelwise (N), all int64.
std::tuple<Tensor, Tensor, Tensor, Tensor> layout_tables(int64_t K, int64_t N) {
  TORCH_CHECK_VALUE(K > 0 && K % TILE_K == 0 && N > 0 && N % TILE_N == 0, "marlin: layout_tables got K=", K, ", N=", N,
                    " but should get multiples of ", TILE_K, " and ", TILE_N);
  Tensor word = at::empty({K, N}, at::kLong), shift = at::empty({K, N}, at::kLong);
  Tensor scale = at::empty({N}, at::kLong), scale_channelwise = at::empty({N}, at::kLong);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < N; ++n) {
      const Nibble nibble = nibble_of(k, n, N);
      word.data_ptr<int64_t>()[k * N + n] = nibble.word;
      shift.data_ptr<int64_t>()[k * N + n] = nibble.shift;
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    scale.data_ptr<int64_t>()[n] = scale_of(n);
    scale_channelwise.data_ptr<int64_t>()[n] = scale_of_channelwise(n);
  }
  return {word, shift, scale, scale_channelwise};
}

template <Config (*kChoose)(const Problem&, const Device&, const Hints&)>
pybind11::dict choose_config(int64_t M, int64_t N, int64_t K, int64_t group, int capability, int num_sms,
                             int smem_bytes, int tile_n, int num_sms_hint, int tile_idx) {
  Problem p{};
  p.M = M;
  p.N = p.N_C = N;
  p.K = p.K_A = p.lda = K;
  p.group = group == -1 ? K : group;
  p.dtype = DType::f16;
  const Status status = check_shape(p);
  TORCH_CHECK_VALUE(status == Status::ok, "marlin: choose_config got M=", M, ", N=", N, ", K=", K, ", group=", group,
                    ": ", status_text(status));
  const Config config = kChoose(p, {capability, num_sms, smem_bytes}, {tile_n, num_sms_hint, tile_idx});
  pybind11::dict result;
  result["tile_idx"] = config.tile_idx;
  result["features"] = config.features;
  result["tokens"] = config.tokens;
  result["grid"] = config.grid;
  result["stripes"] = config.stripes;
  result["num_locks"] = config.num_locks;
  result["num_partials"] = config.num_partials;
  result["us"] = config.us;
  return result;
}

constexpr bool kWithCuda =
#ifdef MARLIN_WITH_CUDA
    true;
#else
    false;
#endif

TORCH_LIBRARY(marlin, m) {
  m.def(
      "mul(Tensor A, Tensor B, Tensor(a!) C, Tensor s, Tensor workspace, int thread_k=-1, int thread_n=-1, int sms=-1, "
      "int max_par=16) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear(Tensor x, Tensor B, Tensor s, Tensor? bias=None, int? in_features=None, int? out_features=None, "
      "Tensor? z=None, Tensor? perm=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(marlin, CPU, m) {
  m.impl("mul", mul);
  m.impl("linear", linear);
}

// Registered in every build, so that one without the kernels says so in one sentence.
TORCH_LIBRARY_IMPL(marlin, CUDA, m) {
  m.impl("mul", mul);
  m.impl("linear", linear);
}

TORCH_LIBRARY_IMPL(marlin, Autograd, m) {
  m.impl("mul", mul_autograd);
  m.impl("linear", linear_autograd);
}

// Where autograd is off but versions count: inference mode with a C that was made outside it.
TORCH_LIBRARY_IMPL(marlin, ADInplaceOrView, m) { m.impl("mul", mul_counted); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  read_environment();
  // The operators once more, without torch.ops' generic reading of arguments, which takes longer than a small product.
  m.def(
      "mul",
      [](const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& s, const Tensor& workspace, int64_t thread_k,
         int64_t thread_n, int64_t sms,
         int64_t max_par) { mul_op().call(A, B, C, s, workspace, thread_k, thread_n, sms, max_par); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear",
      [](const Tensor& x, const Tensor& B, const Tensor& s, const std::optional<Tensor>& bias,
         std::optional<int64_t> in_features, std::optional<int64_t> out_features, const std::optional<Tensor>& z,
         const std::optional<Tensor>& perm) {
        return linear_op().call(x, B, s, bias, in_features, out_features, z, perm);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("layout_tables", &layout_tables, py::arg("K"), py::arg("N"));
  const auto def_choose = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("group"), py::arg("capability"),
          py::arg("num_sms"), py::arg("smem_bytes"), py::arg("tile_n") = -1, py::arg("num_sms_hint") = -1,
          py::arg("tile_idx") = -1);
  };
  def_choose("choose_config_sm80", &choose_config<choose_config_sm80>);
  def_choose("choose_config_sm90", &choose_config<choose_config_sm90>);
  def_choose("choose_config_sm90_few", &choose_config<choose_config_sm90_few>);
  // Returns what it replaces, in the order of its arguments.
  m.def(
      "set_cuda_options",
      [](const std::string& backend, bool overlap, int tile_idx) {
        CudaOptions& options = cuda_options();
        const Backend before = options.backend.exchange(backend_of(backend, "marlin.set_cuda_options: backend"));
        return std::make_tuple(backend_name(before), options.overlap.exchange(overlap),
                               options.tile_idx.exchange(tile_idx));
      },
      py::arg("backend"), py::arg("overlap"), py::arg("tile_idx"));
  m.def("has_cuda", [] { return kWithCuda; });
  m.def("cpu_isa", [] { return kIsaNames[current_isa().load()]; });
  m.def(
      "set_cpu_isa",
      [](const std::string& name) { current_isa() = static_cast<int>(isa_of(name, "marlin.set_cpu_isa: name")); },
      py::arg("name"));
}

}  // namespace marlin
