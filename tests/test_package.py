"""What the build decides with made-up environments, what the package ships, how both fail."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_tools
import marlin
from build_tools import BuildError, Torch, choose, gencode, kernel_archs, parse_archs

ROOT = Path(__file__).parents[1]
CPU_TORCH = Torch("2.13.0+cpu", None)
CUDA_TORCH = Torch("2.11.0+cu130", "13.0")


# --------------------------------------------------------------------------------------------------
# Which backends
# --------------------------------------------------------------------------------------------------


def test_cuda_is_built_when_nvcc_and_a_cuda_torch_are_there():
    plan = choose({}, CUDA_TORCH, "/usr/bin/nvcc", "13.2")
    assert plan.with_cuda and plan.archs == ("8.0", "8.6", "8.9", "9.0+PTX")
    assert "CPU and CUDA" in plan.note


@pytest.mark.parametrize(
    "torch, nvcc, note",
    [
        (CPU_TORCH, None, "CPU backend only: torch 2.13.0+cpu is a CPU build"),
        (CPU_TORCH, "/usr/bin/nvcc", "CPU backend only: torch 2.13.0+cpu is a CPU build"),
        (
            CUDA_TORCH,
            None,
            "CPU backend only: torch 2.11.0+cu130 is for CUDA 13.0 but there is no nvcc",
        ),
    ],
)
def test_else_the_cpu_backend_is_built_and_the_note_says_why(torch, nvcc, note):
    plan = choose({"MARLIN_BUILD_CUDA": "auto"}, torch, nvcc, nvcc and "13.0")
    assert not plan.with_cuda and note in plan.note
    with pytest.raises(
        BuildError, match="MARLIN_BUILD_CUDA=1 needs nvcc and a CUDA build of torch"
    ):
        choose({"MARLIN_BUILD_CUDA": "1"}, torch, nvcc, nvcc and "13.0")


def test_cuda_is_left_out_on_demand():
    assert not choose({"MARLIN_BUILD_CUDA": "0"}, CUDA_TORCH, "/usr/bin/nvcc", "13.0").with_cuda


def test_an_unknown_wish_is_named():
    with pytest.raises(BuildError, match="MARLIN_BUILD_CUDA is 'yes' but should be 0, 1 or auto"):
        choose({"MARLIN_BUILD_CUDA": "yes"}, CUDA_TORCH, None, None)


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_another_major_cuda_than_torchs_is_refused(wish):
    message = r"nvcc is CUDA 12.8 but torch 2.11.0\+cu130 is for CUDA 13.0: the major versions"
    with pytest.raises(BuildError, match=message):
        choose({"MARLIN_BUILD_CUDA": wish}, CUDA_TORCH, "/usr/bin/nvcc", "12.8")
    choose({"MARLIN_BUILD_CUDA": "0"}, CUDA_TORCH, "/usr/bin/nvcc", "12.8")


def test_an_old_torch_is_refused():
    with pytest.raises(BuildError, match="torch is 2.3.1 but should be 2.4 or newer"):
        build_tools.check_torch(Torch("2.3.1", None))
    build_tools.check_torch(Torch("2.4.0a0+git123", None))


def test_nvcc_is_found_where_cuda_home_says(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.77'\n")
    nvcc.chmod(0o755)
    assert build_tools.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": "/nowhere"}) == str(nvcc)
    assert build_tools.find_nvcc({"PATH": str(nvcc.parent)}) == str(nvcc)
    assert build_tools.nvcc_release(str(nvcc)) == "12.6"
    # it does not say where it lies, so the folder above bin/ is it
    assert build_tools.cuda_home(str(nvcc)) == tmp_path


# --------------------------------------------------------------------------------------------------
# For which GPUs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, archs",
    [
        ("8.0;9.0", ("8.0", "9.0+PTX")),
        ("9.0 8.6,8.0", ("8.0", "8.6", "9.0+PTX")),
        ("8.0+PTX;9.0", ("8.0+PTX", "9.0")),
        ("7.5;8.6", ("8.6+PTX",)),
        ("Ampere;Hopper", ("8.0", "8.6", "9.0+PTX")),
        ("10.0;9.0", ("9.0", "10.0+PTX")),
        ("9.0a", ("9.0a",)),
    ],
)
def test_the_arch_list_is_read_as_torch_reads_it(text, archs):
    assert parse_archs(text) == archs
    assert choose({"TORCH_CUDA_ARCH_LIST": text}, CUDA_TORCH, "nvcc", "13.0").archs == archs


@pytest.mark.parametrize("text, message", [("sm_80", "holds 'sm_80'"), ("7.0;7.5", "is '7.0;7.5'")])
def test_a_wrong_arch_list_is_named(text, message):
    with pytest.raises(BuildError, match=f"TORCH_CUDA_ARCH_LIST {message} but should hold"):
        parse_archs(text)


def test_machine_code_for_each_arch_and_ptx_of_the_newest():
    assert gencode(("8.0", "9.0+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert gencode(("9.0a",)) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_a_kernel_of_one_arch_is_built_for_that_alone(monkeypatch):
    monkeypatch.setitem(build_tools.KERNELS, "hopper.cu", ("9.0a",))
    assert kernel_archs("hopper.cu", ("8.0", "9.0+PTX")) == ("9.0a",)
    assert kernel_archs("hopper.cu", ("8.0", "8.6+PTX")) == ()
    assert kernel_archs("marlin_sm80.cu", ("8.0", "9.0+PTX")) == ("8.0", "9.0+PTX")


# --------------------------------------------------------------------------------------------------
# The compiler, and what is compiled again
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, standard, fine",
    [("8", "c++17", False), ("9", "c++17", True), ("10", "c++20", False), ("11", "c++20", True)],
)
def test_an_old_gcc_is_refused(tmp_path, version, standard, fine):
    cxx = tmp_path / "g++"
    cxx.write_text(f"#!/bin/sh\necho {version} __clang__\n")
    cxx.chmod(0o755)
    if fine:
        build_tools.check_compiler(str(cxx), standard)
        return
    with pytest.raises(BuildError, match=f"is GCC {version} but should be .* or newer"):
        build_tools.check_compiler(str(cxx), standard)


def test_clang_is_not_taken_for_an_old_gcc():
    build_tools.check_gcc_version("clang++", ["4", "1"], "c++20")  # clang says it is GCC 4


def test_a_missing_compiler_is_named():
    with pytest.raises(BuildError, match="the C\\+\\+ compiler 'nonesuch' is not there"):
        build_tools.check_compiler("nonesuch", "c++17")


def test_only_what_changed_is_compiled_again(tmp_path):
    source, output = tmp_path / "a.cpp", tmp_path / "a.o"
    source.write_text("")
    command = ["g++", "-c", "a.cpp"]
    assert build_tools.stale(output, [source], command)
    output.write_text("")
    output.with_name("a.o.cmd").write_text("\n".join(command))
    assert not build_tools.stale(output, [source], command)
    assert build_tools.stale(output, [source], [*command, "-O3"])
    later = output.stat().st_mtime + 1
    os.utime(source, (later, later))
    assert build_tools.stale(output, [source], command)


# --------------------------------------------------------------------------------------------------
# The package
# --------------------------------------------------------------------------------------------------


def build(tmp_path, **environment):
    """Run setup.py build_ext into tmp_path; only for builds that fail before they compile."""
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_build_without_torch_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    run = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "building needs torch in this environment: install torch first" in run.stderr


def test_a_build_without_a_compiler_says_so(tmp_path):
    run = build(tmp_path, CXX="nonesuch")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "marlin: the C++ compiler 'nonesuch' is not there" in run.stderr


def test_an_unbuilt_package_says_how_to_build_it(tmp_path):
    copy = tmp_path / "marlin"
    shutil.copytree(ROOT / "marlin", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = subprocess.run(
        [sys.executable, "-c", "import marlin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={},
    )
    assert run.returncode != 0
    assert (
        "the extension marlin._C is not built; run pip install --no-build-isolation ." in run.stderr
    )


def test_version_is_the_same_everywhere():
    in_project = re.search(
        r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert marlin.__version__ == in_project[1]
    assert f"## {marlin.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_quick_start_runs():
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    x, linear = names["x"], names["linear"]
    dense = x.double() @ linear.weight.double().t()
    # A uniform weight within +-m in steps of m / 8: errors of m / 8 / sqrt(12) on weights of
    # m / sqrt(3), 6% norm-wise.
    assert ((names["y"].double() - dense).norm() / dense.norm()).item() < 0.1


def test_every_public_name_is_documented():
    for name in marlin.__all__:
        if not name.startswith("_"):
            assert getattr(marlin, name).__doc__, name


def test_the_sdist_holds_all_that_a_build_needs(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "egg_info",
            "--egg-base",
            tmp_path,
            "sdist",
            "--dist-dir",
            tmp_path,
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir() if path.is_file()
    }
    needed |= {"setup.py", "build_tools.py", "pyproject.toml", "LICENSE", "README.md"}
    needed |= {"marlin/__init__.py", "marlin/py.typed", "marlin/_C.pyi"}
    assert needed <= names
    assert not any(name.endswith((".so", ".o")) for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="names the library as Linux does")
def test_the_extension_shares_torchs_cxx_runtime():
    # with a second one, linked statically, an exception that comes from torch crashes the process
    assert b"libstdc++.so.6" in Path(marlin._C.__file__).read_bytes()
