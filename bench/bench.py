"""Speed of `marlin.mul` against cuBLAS and against the hardware: `bench/results/<gpu>.json`.

One process measures everything that it compares. Weights are cold: the launches of one CUDA graph
rotate through copies that together are larger than any cache (method.COLD_BYTES). Everything is
random. A figure is the median over replays of the graph's time divided by its launches; the graphs
that are compared are replayed in turn. The output of the timed graph is checked, every element,
against the product with the dequantised weights.

    python bench/bench.py            # all shapes, all M, group 128: about three minutes on an H200
    python bench/bench.py --quick --shapes 4096x4096 --M 1,16,64
    python bench/bench.py --host     # host time of a call besides
    python bench/bench.py --stale "reason"   # marks the committed files, measures nothing

Depends on torch with CUDA, nvcc (for stream.cu), the built package, and method.py.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import hashlib
import logging
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import method
import torch

if str(method.ROOT) not in sys.path:
    sys.path.append(str(method.ROOT))

log = logging.getLogger("bench")

Launch = Callable[[int], Any]  # enqueues one call on copy number i of the weights

PER_SM_CTAS = (1, 2, 4, 8)  # grids of the stream kernel
MIN_REPLAYS = 5
DEVICE = "cuda"
HOST_SHAPES = [(256, 256), (1024, 1024), (4096, 4096)]
HOST_TOKENS = [1, 16]


class BenchError(Exception):
    """What stops the bench: one sentence for the user."""


# --------------------------------------------------------------------------------------------------
# Clock
# --------------------------------------------------------------------------------------------------


def capture(launch: Launch, copies: int, launches: int) -> torch.cuda.CUDAGraph:
    """A graph of calls that take the copies in turn; the current stream is not the default one."""
    launch(0)  # a first call loads the kernel and allocates: neither may fall into the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for i in range(launches):
            launch(i % copies)
    finally:
        graph.capture_end()
    return graph


def replay_ms(graphs: list[torch.cuda.CUDAGraph], replays: int) -> list[list[float]]:
    """Milliseconds of each replay of each graph, the graphs taken in turn.

    The queue never runs dry between replays, so the host's launch time stays out of the figures.
    """
    events = [
        [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for _ in graphs
    ]
    for graph in graphs:
        graph.replay()
    for i in range(replays):
        for graph, times in zip(graphs, events, strict=True):
            times[i][0].record()
            graph.replay()
            times[i][1].record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in times] for times in events]


def launch_us(
    calls: list[tuple[Launch, int, float]], replays: int, seconds: float
) -> list[tuple[float, torch.cuda.CUDAGraph]]:
    """Median microseconds of one launch of each call, and the graphs.

    Args:
        calls: (launch, copies of its weights, a guess of the microseconds of one launch).
        replays: of each graph at most.
        seconds: that all of them may take together; MIN_REPLAYS are made in any case.
    """
    sizes = [method.num_launches(copies, guess) for _, copies, guess in calls]
    graphs = [
        capture(launch, copies, size)
        for (launch, copies, _), size in zip(calls, sizes, strict=True)
    ]
    probe = sum(min(times) for times in replay_ms(graphs, 2))
    num_replays = max(MIN_REPLAYS, min(replays, int(1e3 * seconds / max(probe, 1e-3))))
    times = replay_ms(graphs, num_replays)
    return [
        (1e3 * statistics.median(t) / size, graph)
        for t, size, graph in zip(times, sizes, graphs, strict=True)
    ]


# --------------------------------------------------------------------------------------------------
# stream
# --------------------------------------------------------------------------------------------------


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        BenchError: there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("nvcc")] + [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    for nvcc in found:
        if nvcc and Path(nvcc).exists():
            return nvcc
    raise BenchError("bench: nvcc was not found, and bench/stream.cu needs it: set CUDA_HOME")


def build_stream(arch: str) -> ctypes.CDLL:
    """The compiled stream.cu for `arch`, e.g. `90`; compiled once into build/bench."""
    source = method.ROOT / "bench" / "stream.cu"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    library = method.ROOT / "build" / "bench" / f"stream-sm{arch}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        aside = library.with_suffix(f".{os.getpid()}.tmp")
        command = [find_nvcc(), "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(aside), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"bench: {shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
        os.replace(aside, library)
    loaded = ctypes.CDLL(str(library))
    loaded.marlin_stream.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
    ]  # fmt: skip
    loaded.marlin_stream.restype = ctypes.c_int
    return loaded


def stream_us(library: ctypes.CDLL, B: torch.Tensor, replays: int, seconds: float) -> float:
    """Microseconds to read a copy of B (copies, K / 16, 2N) and do nothing else; best of grids."""
    sink = torch.zeros(1, dtype=torch.int32, device=B.device)
    num_bytes = B[0].numel() * B.element_size()
    stream = torch.cuda.current_stream().cuda_stream
    num_sms = torch.cuda.get_device_properties(B.device).multi_processor_count

    def launch(i: int, num_ctas: int) -> None:
        status = library.marlin_stream(
            B[i].data_ptr(), num_bytes, sink.data_ptr(), num_ctas, stream
        )
        if status:
            raise BenchError(f"bench: the stream kernel was refused with CUDA error {status}")

    guess = num_bytes / 4.5e6  # 4.5 TB/s
    calls: list[tuple[Launch, int, float]] = [
        (functools.partial(launch, num_ctas=n * num_sms), len(B), guess) for n in PER_SM_CTAS
    ]
    return min(us for us, _ in launch_us(calls, replays, seconds))


# --------------------------------------------------------------------------------------------------
# Operands
# --------------------------------------------------------------------------------------------------


class Slabs:
    """Random data for all shapes, drawn once; each shape takes views of it."""

    def __init__(self, shapes: list[tuple[int, int]], tokens: list[int], groups: list[int]):
        def largest(count: Callable[[int, int, int], int]) -> int:
            return max(count(K, N, group) for K, N in shapes for group in groups)

        self.words = torch.randint(
            -(2**31),
            2**31,
            (largest(lambda K, N, g: self.copies(K, N, g) * K * N // 8),),
            dtype=torch.int32,
            device=DEVICE,
        )
        num_scales = largest(lambda K, N, g: self.copies(K, N, g) * method.num_groups(K, g) * N)
        self.scales = (0.002 + 0.01 * torch.rand(num_scales, device=DEVICE)).half()
        num_dense = largest(lambda K, N, g: self.dense_copies(K, N) * K * N)
        self.dense = torch.empty(num_dense, dtype=torch.half, device=DEVICE).normal_(std=0.03)
        num_A = largest(lambda K, N, g: max(tokens) * K)
        self.A = torch.empty(num_A, dtype=torch.half, device=DEVICE).normal_()
        num_C = largest(lambda K, N, g: max(tokens) * N)
        self.C = torch.empty(num_C, dtype=torch.half, device=DEVICE)
        num_reference = largest(lambda K, N, g: K * N)
        self.reference = torch.empty(num_reference, dtype=reference_dtype(), device=DEVICE)

    @staticmethod
    def copies(K: int, N: int, group: int) -> int:
        """Copies of a packed weight."""
        return method.num_copies(method.marlin_bytes(K, N, group))

    @staticmethod
    def dense_copies(K: int, N: int) -> int:
        """Copies of an FP16 weight."""
        return method.num_copies(method.dense_bytes(K, N))


def view(slab: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The first elements of a slab as a contiguous tensor of these sizes."""
    return slab[: math.prod(sizes)].view(*sizes)


def reference_dtype() -> torch.dtype:
    """float64 where it is fast; FP32 (errors of 1e-6) elsewhere."""
    fast = torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0))
    return torch.float64 if fast else torch.float32


def dequantise(B: torch.Tensor, s: torch.Tensor, group: int, out: torch.Tensor) -> torch.Tensor:
    """The weight (K, N) that B and s stand for, rounded to FP16 as the format means it."""
    from marlin import layout

    K = len(out)
    s = layout.unpermute_scales(s)
    rows = K // s.shape[0]
    for k in range(0, K, 1024):  # in blocks, for the memory of the unpacking
        end = min(k + 1024, K)
        q = layout.unpack_weights(B[k // 16 : end // 16])
        group_idx = torch.arange(k, end, device=B.device) // rows
        out[k:end] = (q.half() - 8) * s[group_idx]
    return out


def relative_error(A: torch.Tensor, W: torch.Tensor, C: torch.Tensor) -> float:
    """Frobenius norm of C - A @ W over that of A @ W; not finite if an element of C is not."""
    off = norm = torch.zeros((), dtype=torch.float64, device=C.device)
    for m in range(0, len(A), 1024):
        exact = A[m : m + 1024].to(W.dtype) @ W
        off = off + (C[m : m + 1024].to(W.dtype) - exact).square().sum(dtype=torch.float64)
        norm = norm + exact.square().sum(dtype=torch.float64)
    return math.sqrt(off.item() / norm.item())


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


def measure_shape(
    K: int, N: int, group: int, slabs: Slabs, library: ctypes.CDLL, args: argparse.Namespace
) -> list[method.Row]:
    """The rows of one shape: cuBLAS and ours for each M, the limit, the error."""
    import marlin
    from marlin import _C

    copies, dense_copies = slabs.copies(K, N, group), slabs.dense_copies(K, N)
    B = view(slabs.words, copies, K // 16, 2 * N)
    s = view(slabs.scales, copies, method.num_groups(K, group), N)
    W = view(slabs.dense, dense_copies, N, K)
    reference = dequantise(B[-1], s[-1], group, view(slabs.reference, K, N))
    workspace = torch.zeros(max(1, N // 128 * 16), dtype=torch.int32, device=DEVICE)
    stream = stream_us(library, B, args.replays, args.seconds)
    overlaps = torch.cuda.get_device_capability() >= (9, 0)  # programmatic dependent launch
    ticks = torch.zeros(1, device=DEVICE)
    rows = []
    for M in args.M:
        A, C = view(slabs.A, M, K), view(slabs.C, M, N)

        def cublas(i: int, A: torch.Tensor = A, C: torch.Tensor = C) -> None:
            torch.matmul(A, W[i].t(), out=C)

        def ours(i: int, A: torch.Tensor = A, C: torch.Tensor = C) -> None:
            marlin.mul(A, B[i], C, s[i], workspace)

        def without_overlap(i: int, call: Launch = ours) -> None:
            before = _C.set_cuda_options(backend=args.backend, overlap=False, tile_idx=-1)
            call(i)
            _C.set_cuda_options(*before)

        # A small kernel between the calls, which overlaps with neither.
        def tick(i: int) -> None:
            ticks.add_(1)

        def isolated(i: int, call: Launch) -> None:
            call(i)
            tick(i)

        # Guesses of the times, only to size the graphs: 4.5 TB/s, or half of the peak.
        compute = 2 * method.math_us(M, N, K, args.tflops)
        calls: list[tuple[Launch, int, float]] = [
            (cublas, dense_copies, max(compute, method.dense_bytes(K, N) / 4.5e6)),
            (ours, copies, max(compute, method.marlin_bytes(K, N, group) / 4.5e6)),
        ]
        if overlaps:
            _, copies_, guess = calls[1]
            calls += [(without_overlap, copies_, guess), (tick, copies_, 1.5)]
            for call in (ours, without_overlap):
                calls.append((functools.partial(isolated, call=call), copies_, guess))
        (cublas_time, _), (our_time, graph), *others = launch_us(calls, args.replays, args.seconds)

        C.fill_(float("nan"))
        graph.replay()  # its last launch used the last copy
        err = relative_error(A, reference, C)
        limit = method.limit_us(stream, M, N, K, args.tflops)
        row = {"K": K, "N": N, "M": M, "group": group}
        times = {"cublas": cublas_time, "stream": stream, "limit": limit, "marlin": our_time}
        if overlaps:
            nopdl, tick_time, alone, alone_nopdl = (time for time, _ in others)
            times |= {"marlin_nopdl": nopdl, "isolated": alone - tick_time}
            times["isolated_nopdl"] = alone_nopdl - tick_time
        row |= {name: round(value, 3) for name, value in times.items()}
        row["err"] = float(f"{err:.3g}")
        rows.append(row)
        log.info(
            f"{K}x{N} M={M:<5d} cublas {cublas_time:9.2f}  marlin {our_time:9.2f}  "
            f"x{method.speedup(row):5.2f}  frac {method.frac(row):.2f}  err {err:.1e}"
            + ("" if err <= method.ERR_LIMIT else "  WRONG")
        )
    return rows


def host_rows(calls: int = 200, batches: int = 25) -> list[dict[str, Any]]:
    """Host microseconds of one call of torch.matmul, marlin.mul and marlin.linear.

    The median over batches. Nothing is waited for within a batch, and 200 launches fit into the
    queue of a stream, so that the GPU never holds up the host.
    """
    import marlin

    rows = []
    for K, N in HOST_SHAPES:
        for M in HOST_TOKENS:
            A = torch.randn(M, K, dtype=torch.half, device=DEVICE)
            W_t = torch.randn(N, K, dtype=torch.half, device=DEVICE).t()
            B = torch.randint(-(2**31), 2**31, (K // 16, 2 * N), dtype=torch.int32, device=DEVICE)
            s = torch.rand(K // 128, N, device=DEVICE).half()
            C = torch.empty(M, N, dtype=torch.half, device=DEVICE)
            workspace = torch.zeros(N // 128 * 16, dtype=torch.int32, device=DEVICE)
            functions: dict[str, Callable[[], Any]] = {
                "matmul": functools.partial(torch.matmul, A, W_t),
                "mul": functools.partial(marlin.mul, A, B, C, s, workspace),
                "linear": functools.partial(marlin.linear, A, B, s),
            }
            row: dict[str, Any] = {"K": K, "N": N, "M": M}
            for name, function in functions.items():
                times = []
                for _ in range(batches):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(calls):
                        function()
                    times.append(time.perf_counter() - start)
                row[name] = round(1e6 * statistics.median(times) / calls, 3)
            torch.cuda.synchronize()
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--shapes", type=method.parse_shapes, default=method.SHAPES, help="KxN,KxN")
    add("--M", type=method.parse_ints, default=method.TOKENS, help="as 1,16,64")
    add("--group", type=method.parse_ints, default=[method.GROUP], help="as 128,-1 (default 128)")
    add(
        "--backend",
        choices=["auto", "sm80", "sm90", "sm90_few"],
        default="auto",
        help="kernel to force",
    )
    add("--replays", type=int, default=40, help="of each graph at most (default 40)")
    add("--seconds", type=float, default=0.6, help="for the replays of a row (default 0.6)")
    add("--quick", action="store_true", help="at most 9 replays and 0.15 s a row")
    add("--tflops", type=float, help="dense FP16 rate in `limit` (default by GPU, see method.py)")
    add("--host", action="store_true", help="measure the host time of a call too")
    add("--out", type=Path, help="file to write (default bench/results/<gpu>.json, or build/bench)")
    add("--merge", action="store_true", help="keep the rows of the file that this run lacks")
    add("--peers", type=Path, help="file to compare with (default bench/peers/<gpu>.json if there)")
    add("--show", type=Path, metavar="FILE", help="print the tables of a file, measure nothing")
    add("--stale", metavar="REASON", help="mark the committed files stale, measure nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.replays, args.seconds = min(args.replays, 9), min(args.seconds, 0.15)
    if min(args.M) < 1 or args.replays < 1 or not args.seconds > 0:
        parser.error("--M, --replays and --seconds should be above 0")
    for group in args.group:
        for K, _ in args.shapes:
            try:
                method.num_groups(K, group)
            except ValueError as error:
                parser.error(str(error))
    args.complete = (
        not args.quick
        and set(args.shapes) >= set(method.SHAPES)
        and set(args.M) >= set(method.TOKENS)
        and method.GROUP in args.group
    )
    return args


def driver_version() -> str:
    """Of the NVIDIA driver, as nvidia-smi has it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"


def header(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the rows were measured."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "bench/bench.py", *args.argv]),
        "csrc_sha256": method.csrc_sha256(),
        "backend": args.backend,
        "tflops": args.tflops,
        "group": args.group,
    }


def mark_stale(reason: str) -> None:
    """Write the reason into every committed result whose hash is not that of csrc/."""
    for path in sorted(method.RESULTS.glob("*.json")):
        results = method.load(path)
        if results["csrc_sha256"] != method.csrc_sha256():
            method.save(path, {**results, "stale": reason})
            log.info(f"{path} marked stale")


def show(results: dict[str, Any], peers: Path | None) -> None:
    """Print the tables."""
    path = peers or method.PEERS / f"{method.slug(results['gpu'])}.json"
    print(method.report(results, method.load(path) if peers or path.exists() else None))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows; the file is written after each shape: a run cut short leaves what it had."""
    try:
        from marlin import _C
    except ImportError as error:
        raise BenchError(f"bench: {error}") from None
    if not _C.has_cuda():
        raise BenchError("bench: marlin was built without CUDA: build it again with nvcc at hand")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    gpu = torch.cuda.get_device_name()
    args.tflops = args.tflops or method.tflops_of(gpu)
    out = args.out or method.results_path(gpu, args.backend, args.complete or args.merge)
    old = method.load(out) if args.merge and out.exists() else None
    results = header(args) | {"rows": []}
    if old:
        try:
            method.merge(old, results)
        except ValueError as error:
            raise BenchError(f"bench: {out}: {error}") from None
    library = build_stream("".join(map(str, torch.cuda.get_device_capability())))
    start = time.perf_counter()
    with torch.cuda.stream(torch.cuda.Stream()):
        if args.host:
            results["host"] = host_rows()
        slabs = Slabs(args.shapes, args.M, args.group)
        for group in args.group:
            for K, N in args.shapes:
                results["rows"] += measure_shape(K, N, group, slabs, library, args)
                written = method.merge(old, results) if old else results
                method.save(out, written)
    log.info(f"{out} written after {time.perf_counter() - start:.0f} s")
    return written


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something is missing or a timed call was wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args = parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        if args.stale is not None:
            mark_stale(args.stale)
            return 0
        if args.show:
            show(method.load(args.show), args.peers)
            return 0
        if not torch.cuda.is_available():
            raise BenchError("bench: torch sees no CUDA device")
        os.environ["MARLIN_BACKEND"] = args.backend  # read when the extension is first called
        results = measure(args)
    except BenchError as failure:
        log.error(str(failure))
        return 1
    show(results, args.peers)
    wrong = method.check(results)
    for sentence in wrong:
        log.error(sentence)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
