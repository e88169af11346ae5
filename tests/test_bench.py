"""What bench/ computes without a GPU, and that the committed results are those of the sources.

Depends on bench/method.py, bench/bench.py, bench/plot.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import marlin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import method  # noqa: E402
import plot  # noqa: E402

import bench  # noqa: E402


def make_row(K: int = 4096, N: int = 4096, M: int = 1, group: int = 128, **times: float) -> Any:
    row = {"K": K, "N": N, "M": M, "group": group}
    return row | {"cublas": 12.0, "stream": 3.0, "limit": 3.0, "marlin": 6.0, "err": 3e-4} | times


def make_results(rows: list[Any] | None = None, **fields: Any) -> dict[str, Any]:
    results = {
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "cuda": "13.0",
        "torch": "2.11.0",
        "date": "2026-01-01 00:00 UTC",
        "command": "python bench/bench.py",
        "csrc_sha256": method.csrc_sha256(),
        "backend": "auto",
        "tflops": 800,
        "group": [128],
        "rows": rows or [make_row(M=M) for M in (1, 16)],
    }
    return results | fields


# --------------------------------------------------------------------------------------------------
# Committed files
# --------------------------------------------------------------------------------------------------


def test_committed_results_are_of_these_sources_or_say_why_not() -> None:
    for path in sorted(method.RESULTS.glob("*.json")):
        results = method.load(path)
        assert method.check(results) == [], path.name
        assert results["csrc_sha256"] == method.csrc_sha256() or results.get("stale"), (
            f"{path.name} was measured with other sources: measure again (make gpu-check), or "
            'python bench/bench.py --stale "why the figures still stand, or not"'
        )


def test_the_peers_file_covers_the_whole_table() -> None:
    peers = method.load(method.PEERS / "nvidia-h200.json")
    expected = {(K, N, method.GROUP, M) for K, N in method.SHAPES for M in method.TOKENS}
    assert set(method.peer_speedups(peers)) == expected
    for row in peers["rows"]:
        assert 0 < row["best"] <= row["ist"]


# --------------------------------------------------------------------------------------------------
# Sizes and figures
# --------------------------------------------------------------------------------------------------


def test_a_round_over_the_copies_is_larger_than_any_cache() -> None:
    for K, N in [*method.SHAPES, (16, 64), (1040, 192)]:
        for size in (method.marlin_bytes(K, N, -1), method.dense_bytes(K, N)):
            copies = method.num_copies(size)
            assert copies >= 2
            assert copies * size >= method.COLD_BYTES
            assert copies == 2 or (copies - 1) * size < method.COLD_BYTES


def test_bytes_count_weights_and_scales() -> None:
    # 4096 x 4096 in 4 bits: 8 MiB; 32 groups of 4096 scales of 2 bytes
    assert method.marlin_bytes(4096, 4096, 128) == 8 * 2**20 + 32 * 4096 * 2
    assert method.marlin_bytes(4096, 4096, -1) == 8 * 2**20 + 4096 * 2
    with pytest.raises(ValueError, match="group is 96, but should be -1 or divide K=4096"):
        method.marlin_bytes(4096, 4096, 96)


@pytest.mark.parametrize("copies", [2, 7, 30])
@pytest.mark.parametrize("guess", [0.001, 1.0, 5.0, 33.0, 700.0, 9600.0, 1e6])
def test_a_graph_has_whole_rounds_and_a_sensible_length(copies: int, guess: float) -> None:
    launches = method.num_launches(copies, guess)
    assert launches % copies == 0
    assert launches <= 200  # no graph of thousands of nodes, whatever the guess
    if launches > copies:  # more than one round: because one is too short
        assert (launches - copies) * max(guess, 1.5) <= 20_000
    if guess * 8 <= 20_000:
        assert launches >= 8
        assert launches * max(guess, 1.5) >= 200


def test_the_limit_is_reading_or_computing_whichever_takes_longer() -> None:
    assert method.limit_us(3.5, 1, 4096, 4096, 800) == 3.5
    # 2 * 8192^3 / 800e12 s = 1374.4 us
    assert math.isclose(method.limit_us(9.5, 8192, 8192, 8192, 800), 1374.39, rel_tol=1e-5)
    assert math.isclose(method.limit_us(9.5, 8192, 8192, 8192, 400), 2748.78, rel_tol=1e-5)


def test_speedup_and_frac_are_ratios_of_the_row() -> None:
    row = make_row(cublas=12.0, limit=3.0, marlin=4.0)
    assert method.speedup(row) == 3.0
    assert method.frac(row) == 0.75


def test_geomean_of_reciprocals_is_one() -> None:
    assert math.isclose(method.geomean([4.0, 0.25, 3.0, 1 / 3]), 1.0)
    assert math.isclose(method.geomean([2.0, 8.0]), 4.0)
    with pytest.raises(ValueError, match="values is empty"):
        method.geomean([])


def test_means_are_over_the_shapes_of_each_M() -> None:
    rows = [make_row(M=1, marlin=3.0), make_row(N=6144, M=1, marlin=12.0), make_row(M=8)]
    assert method.means(rows, method.speedup) == pytest.approx({1: 2.0, 8: 2.0})


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [("NVIDIA H200", 800), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("other", 800)],
)
def test_the_peak_goes_by_the_whole_name_of_the_gpu(gpu: str, tflops: float) -> None:
    assert method.tflops_of(gpu) == tflops


# --------------------------------------------------------------------------------------------------
# Names, options, files
# --------------------------------------------------------------------------------------------------


def test_the_file_is_named_after_gpu_and_backend() -> None:
    path = method.results_path
    assert path("NVIDIA H200", "auto", True) == method.RESULTS / "nvidia-h200.json"
    assert path("NVIDIA H200", "sm80", True) == method.RESULTS / "nvidia-h200-sm80.json"
    assert path("NVIDIA H200", "sm80", False).parent == ROOT / "build" / "bench"
    assert method.slug("NVIDIA A100-SXM4-80GB (x2)") == "nvidia-a100-sxm4-80gb-x2"


def test_shapes_are_parsed_or_refused_with_the_reason() -> None:
    assert method.parse_shapes("4096x4096, 16x64") == [(4096, 4096), (16, 64)]
    for text in ("4096", "4096x", "4096x4096x2", "x", "", "17x64", "16x65", "0x64"):
        with pytest.raises(ValueError, match="shapes has"):
            method.parse_shapes(text)
    assert method.parse_ints("1,-1, 33") == [1, -1, 33]
    with pytest.raises(ValueError, match="whole numbers"):
        method.parse_ints("1,x")


def test_only_a_whole_run_counts_as_complete() -> None:
    assert bench.parse_args([]).complete
    assert bench.parse_args(["--host", "--backend", "sm80", "--group", "128,-1"]).complete
    for argv in (["--quick"], ["--M", "1"], ["--shapes", "4096x4096"], ["--group", "64"]):
        assert not bench.parse_args(argv).complete


@pytest.mark.parametrize(
    "argv",
    [
        ["--M", "0"],
        ["--shapes", "10x10"],
        ["--group", "100"],
        ["--replays", "0"],
        ["--seconds", "0"],
    ],
)
def test_wrong_options_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.parse_args(argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_the_hash_sees_names_contents_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("x")
    (tmp_path / "b.h").write_text("y")
    first = method.csrc_sha256(tmp_path)
    (tmp_path / "note.txt").write_text("not a source")
    assert method.csrc_sha256(tmp_path) == first
    (tmp_path / "b.h").write_text("z")
    second = method.csrc_sha256(tmp_path)
    (tmp_path / "b.h").rename(tmp_path / "c.h")
    assert len({first, second, method.csrc_sha256(tmp_path)}) == 3


def test_saved_results_load_as_they_were_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.json"
    results = make_results(host=[{"K": 256, "N": 256, "M": 1, "matmul": 5.0}])
    method.save(path, results)
    assert method.load(path) == results
    lines = path.read_text().splitlines()
    assert sum('"marlin":' in line for line in lines) == len(results["rows"])
    assert list(path.parent.iterdir()) == [path]


def test_merge_replaces_rows_by_their_key_and_keeps_the_order_of_the_tables() -> None:
    old = make_results([make_row(M=16), make_row(M=1), make_row(N=6144)])
    new = make_results([make_row(M=1, marlin=5.0), make_row(M=8)], command="again")
    merged = method.merge(old, new)
    rows = [(r["N"], r["M"], r["marlin"]) for r in merged["rows"]]
    assert rows == [(4096, 1, 5.0), (4096, 8, 6.0), (4096, 16, 6.0), (6144, 1, 6.0)]
    assert "stale" not in merged
    assert merged["command"] == "python bench/bench.py; again"
    assert method.check(merged) == []


def test_merged_rows_of_other_sources_make_the_file_stale() -> None:
    old = make_results([make_row(M=1), make_row(M=16)], csrc_sha256="0" * 64)
    merged = method.merge(old, make_results([make_row(M=1)]))
    assert "1 rows were measured with csrc 000000000000" in merged["stale"]
    whole = method.merge(old, make_results([make_row(M=1), make_row(M=16)]))
    assert "stale" not in whole


def test_results_of_different_machines_do_not_merge() -> None:
    for field in ("gpu", "backend", "tflops"):
        with pytest.raises(ValueError, match=f"merge: {field} is"):
            method.merge(make_results(), make_results(**{field: "other"}))


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (make_results([make_row(err=6e-4)]), "err is 0.0006"),
        (make_results([make_row(err=math.nan)]), "err is nan"),
        (make_results([make_row(marlin=0.0)]), "marlin is 0.0"),
        (make_results([make_row(), make_row()]), "two rows have the same"),
        (make_results([{"K": 1}]), "limit is missing"),
        ({"rows": []}, "csrc_sha256 is missing"),
        ({"rows": []}, "rows is empty"),
        (make_results(stale=" "), "stale is empty"),
    ],
)
def test_check_finds_what_is_wrong(results: dict[str, Any], sentence: str) -> None:
    assert any(sentence in found for found in method.check(results))
    assert method.check(make_results()) == []


def test_stale_marks_only_results_of_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "RESULTS", tmp_path)
    method.save(tmp_path / "now.json", make_results())
    method.save(tmp_path / "then.json", make_results(csrc_sha256="0" * 64))
    assert bench.main(["--stale", "comments only"]) == 0
    assert "stale" not in method.load(tmp_path / "now.json")
    assert method.load(tmp_path / "then.json")["stale"] == "comments only"


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------


def test_the_report_marks_the_rows_that_lose_to_a_peer() -> None:
    fast, slow, slower = make_row(M=1), make_row(M=8, marlin=9.0), make_row(M=16, marlin=20.0)
    peers = {
        "rows": [
            {"K": 4096, "N": 4096, "M": M, "cublas": 10.0, "ist": 10.0, "best": 6.0}
            for M in (1, 8, 16)
        ]
    }
    text = method.report(make_results([fast, slow, slower]), peers)
    line = next(line for line in text.splitlines() if line.startswith("4096x4096"))
    assert line.split() == ["4096x4096", "2.00", "1.33+", "0.60*"]
    assert "below the original Marlin (*): 1 of 3 rows" in text
    assert "(* or +): 2" in text
    assert "geomean" in text


def test_the_report_of_a_table_with_holes_leaves_them_open() -> None:
    rows = [make_row(M=1), make_row(N=6144, M=16), make_row(M=16, group=-1)]
    text = method.report(make_results(rows))
    assert "group 128" in text
    assert "group -1" in text
    line = next(line for line in text.splitlines() if line.startswith("4096x6144"))
    assert line.split() == ["4096x6144", "-", "2.00"]


def test_the_tables_of_a_file_can_be_shown_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    method.save(path, make_results())
    assert bench.main(["--show", str(path)]) == 0
    assert "x cublas" in capsys.readouterr().out


def test_without_a_gpu_the_bench_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    with caplog.at_level("ERROR"):
        assert bench.main([]) == 1
    assert "torch sees no CUDA device" in caplog.text


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of a GPU: graphs run their calls again, events read a clock."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.seconds = 0.0

        def record(self) -> None:
            self.seconds = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.seconds - self.seconds)

    def capture(launch: bench.Launch, copies: int, launches: int) -> Any:
        return SimpleNamespace(replay=lambda: [launch(i % copies) for i in range(launches)])

    def marlin_stream(p: int, num_bytes: int, sink: int, num_ctas: int, stream: int) -> int:
        assert p % 16 == 0
        assert num_bytes % 16 == 0
        assert num_ctas in (132, 264, 528, 1056)
        return 0

    for name, value in {
        "Event": Event,
        "Stream": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: SimpleNamespace(cuda_stream=0),
        "synchronize": lambda: None,
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H200",
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
    }.items():
        monkeypatch.setattr(bench.torch.cuda, name, value)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "capture", capture)
    monkeypatch.setattr(
        bench, "build_stream", lambda arch: SimpleNamespace(marlin_stream=marlin_stream)
    )
    monkeypatch.setattr(bench, "HOST_SHAPES", [(128, 128)])
    monkeypatch.setattr(method, "COLD_BYTES", 50_000)
    monkeypatch.setattr(marlin._C, "has_cuda", lambda: True)
    monkeypatch.setenv("MARLIN_BACKEND", "auto")


QUICK = ["--shapes", "128x64,64x128", "--M", "1,3", "--seconds", "0.001", "--replays", "1"]


@pytest.mark.usefixtures("simulated_gpu")
def test_a_run_writes_a_sound_file_with_small_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    argv = [*QUICK, "--out", str(path)]
    assert bench.main([*argv, "--group", "64,-1", "--host"]) == 0
    results = method.load(path)
    assert method.check(results) == []
    assert len(results["rows"]) == 8
    assert "csrc_sha256" in results
    assert len(results["host"]) == len(bench.HOST_TOKENS)
    assert "x cublas" in capsys.readouterr().out
    assert bench.main([*argv, "--group", "64", "--M", "2", "--merge"]) == 0
    assert len(method.load(path)["rows"]) == 10


@pytest.mark.usefixtures("simulated_gpu")
def test_a_kernel_that_is_wrong_in_one_element_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = marlin.mul

    def wrong(A: Any, B: Any, C: Any, s: Any, workspace: Any) -> None:
        last = C[-1, -1].clone()
        right(A, B, C, s, workspace)
        C[-1, -1] = last  # never written

    monkeypatch.setattr(marlin, "mul", wrong)
    path = tmp_path / "gpu.json"
    assert bench.main([*QUICK, "--out", str(path), "--group", "64"]) == 1
    assert all(not row["err"] <= method.ERR_LIMIT for row in method.load(path)["rows"])


def test_the_stream_kernel_compiles_and_refuses_sizes_it_cannot_read() -> None:
    try:
        bench.find_nvcc()
    except bench.BenchError:
        pytest.skip("there is no nvcc")
    invalid_value = 1  # cudaErrorInvalidValue
    assert bench.build_stream("80").marlin_stream(16, 15, 16, 1, None) == invalid_value


def test_plots_are_drawn_from_a_result_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        make_row(K, N, M, cublas=10.0 + M / 8, marlin=4.0 + M / 6)
        for K, N in method.SHAPES
        for M in method.TOKENS
    ]
    path = tmp_path / "nvidia-h200-sm80.json"
    method.save(path, make_results(rows, backend="sm80"))
    written = plot.main([str(path), "--out", str(tmp_path / "img")])
    names = {p.name for p in (tmp_path / "img").iterdir()}
    assert written == 0
    assert names == {"nvidia-h200-sm80-speedup.png", "nvidia-h200-sm80-limit.png"}
    assert json.loads(path.read_text())["rows"] == rows


# Backend, its file of times, the M it is chosen for, what the choice may take over the best
# (docs/kernel.md). Hopper's two kernels are chosen between; layers of small models are timed too.
CHOICES = [
    ("sm80", "nvidia-h200.csv", method.TOKENS, 1.004, 1.08),
    ("sm90", "nvidia-h200-sm90.csv", method.TOKENS, 1.005, 1.08),
]
# What deals a tile out: in the times, and in a Config.
DEALT = {"sm80": ("ctas", "grid"), "sm90": ("stripes", "stripes"), "sm90_few": ("ctas", "grid")}


@pytest.mark.parametrize(("backend", "file", "tokens", "mean", "worst"), CHOICES)
def test_the_choice_of_tiles_loses_little_against_the_best_that_was_measured(
    backend: str, file: str, tokens: list[int], mean: float, worst: float
) -> None:
    pytest.importorskip("scipy")
    import tiles

    tables = {kernel: tiles.table(kernel) for kernel in tiles.KERNELS[backend]}
    constants = {tile: row for table in tables.values() for tile, row in table.items()}
    times = tiles.parse((method.RESULTS / "tiles" / file).read_text(), backend)
    sizes = {(time.K, time.N, time.M) for time in times}
    assert sizes >= {(K, N, M) for (K, N), M in itertools.product(method.SHAPES, tokens)}
    lost = tiles.losses(times, constants)
    assert len(lost) == len(sizes)
    assert method.geomean(lost) < mean
    assert max(lost) < worst

    # The kernel files have the models a second time, in C++: what they pick is as good.
    measured = {
        (time.K, time.N, time.M, time.tile, getattr(time, dealt)): time.us
        for time in times
        for dealt, _ in [DEALT[tiles.kernel_of(time.tile, backend)]]
    }
    picked = []
    for K, N, M in sizes:
        configs = {}
        for kernel in tables:
            choose = getattr(marlin._C, f"choose_config_{kernel}")
            config = choose(M, N, K, method.GROUP, 90, 132, 232448)
            if config["tile_idx"] >= 0:
                configs[kernel] = config
        kernel, config = min(configs.items(), key=lambda item: item[1]["us"])
        tile = list(tables[kernel])[config["tile_idx"]]
        us = measured[K, N, M, tile, config[DEALT[kernel][1]]]
        picked.append(us / min(t for (*size, _, _), t in measured.items() if size == [K, N, M]))
    assert method.geomean(picked) < mean
    assert max(picked) < worst
