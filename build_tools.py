"""What setup.py decides before it compiles: which backends, for which GPUs, with which flags.

Depends on the standard library alone, and compiles nothing, so that tests call it with made-up
environments (tests/test_package.py). Called by setup.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path("csrc")
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0"

# The GPUs that a kernel file is compiled for: all that are asked for, unless it is named here.
# A kernel that uses instructions of one architecture alone names that one ("9.0a").
KERNELS: dict[str, tuple[str, ...] | None] = {
    "marlin_sm80.cu": None,
    "marlin_sm90.cu": ("9.0a",),
    "marlin_sm90_few.cu": ("9.0a",),
}


class BuildError(Exception):
    """A reason, in one sentence, why the extension cannot be built."""


@dataclass(frozen=True)
class Torch:
    """What the build needs to know of the installed torch; cuda is None for a CPU build of it."""

    version: str
    cuda: str | None

    @property
    def number(self) -> tuple[int, int]:
        match = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def cxx_standard(self) -> str:
        # torch's own headers ask for C++20 from 2.12 on; 2.4 to 2.11 are content with 17.
        return "c++20" if self.number >= (2, 12) else "c++17"


@dataclass(frozen=True)
class Plan:
    """with_cuda: build the CUDA kernels; note: what to tell the user about that choice."""

    with_cuda: bool
    note: str
    archs: tuple[str, ...] = field(default=())


def check_torch(torch: Torch) -> None:
    """Raise BuildError if torch is older than the library supports."""
    if torch.number < (2, 4):
        raise BuildError(f"marlin: torch is {torch.version} but should be 2.4 or newer")


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """Return the path of nvcc, looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda."""
    for home in (env.get("CUDA_HOME"), env.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc", path=env.get("PATH")) or (str(usual) if usual.exists() else None)


def nvcc_release(nvcc: str) -> str:
    """Return the release of nvcc, as '13.0'."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if not match:
        raise BuildError(f"marlin: {nvcc} --version does not say its release")
    return match[1]


def cuda_home(nvcc: str) -> Path:
    """Return the folder that holds include/cuda_runtime.h for nvcc, asking nvcc itself.

    The nvcc on PATH may be a script in another folder, so its own path does not tell.
    """
    run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    match = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else Path(nvcc).resolve().parent.parent


def choose(
    env: Mapping[str, str], torch: Torch, nvcc: str | None, nvcc_version: str | None
) -> Plan:
    """Decide whether to build the CUDA kernels, and for which GPUs.

    Args:
        env: the environment: MARLIN_BUILD_CUDA 0, 1 or auto; TORCH_CUDA_ARCH_LIST as for torch.
        torch: the torch that the extension is built against.
        nvcc: path of nvcc, or None.
        nvcc_version: its release, or None.

    Raises:
        BuildError: a wrong setting, or one that cannot be met.
    """
    wish = env.get("MARLIN_BUILD_CUDA", "auto").strip().lower() or "auto"
    if wish not in ("0", "1", "auto"):
        raise BuildError(f"marlin: MARLIN_BUILD_CUDA is {wish!r} but should be 0, 1 or auto")
    if wish == "0":
        return Plan(False, "marlin: CPU backend only, as MARLIN_BUILD_CUDA=0 asks")
    if torch.cuda is None:
        why = f"torch {torch.version} is a CPU build"
    elif nvcc is None:
        why = f"torch {torch.version} is for CUDA {torch.cuda} but there is no nvcc"
    else:
        why = ""
    if why and wish == "1":
        raise BuildError(
            f"marlin: MARLIN_BUILD_CUDA=1 needs nvcc and a CUDA build of torch, but {why}"
        )
    if why:
        return Plan(False, f"marlin: CPU backend only: {why}")
    assert nvcc_version is not None and torch.cuda is not None
    if nvcc_version.split(".")[0] != torch.cuda.split(".")[0]:
        raise BuildError(
            f"marlin: {nvcc} is CUDA {nvcc_version} but torch {torch.version} "
            f"is for CUDA {torch.cuda}: "
            "the major versions must agree (or set MARLIN_BUILD_CUDA=0 for the CPU backend)"
        )
    archs = parse_archs(env.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    return Plan(True, f"marlin: CPU and CUDA backends, for {' '.join(archs)}", archs)


NAMED_ARCHS = {"ampere": "8.0;8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0;12.0"}


def parse_archs(text: str) -> tuple[str, ...]:
    """Return the architectures of a TORCH_CUDA_ARCH_LIST, each as '8.0', '9.0a' or '9.0+PTX'.

    Those below 8.0 are left out, since the kernels cannot run there; PTX of the newest is added if
    none is asked for.

    Raises:
        BuildError: an entry that is no architecture, or none that the kernels run on.
    """
    entries: list[str] = []
    for word in re.split(r"[;,\s]+", text.strip()):
        named = NAMED_ARCHS.get(word.lower().removesuffix("+ptx"))
        entries += named.split(";") if named else [word]
    archs: list[str] = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry, re.IGNORECASE)
        if not match:
            raise BuildError(
                f"marlin: TORCH_CUDA_ARCH_LIST holds {entry!r} "
                "but should hold architectures as 8.0 or 9.0+PTX"
            )
        if int(match[1]) >= 8 and entry not in archs:
            archs.append(entry)
    if not archs:
        raise BuildError(
            f"marlin: TORCH_CUDA_ARCH_LIST is {text!r} "
            "but should hold 8.0 or newer, which the kernels need"
        )
    archs.sort(key=lambda arch: [int(x) for x in re.findall(r"\d+", arch)])
    if not any("+" in arch for arch in archs) and archs[-1][-1].isdigit():
        archs[-1] += "+PTX"
    return tuple(archs)


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Return nvcc's -gencode flags: machine code for each, and PTX where it is asked for."""
    flags = []
    for arch in archs:
        number = arch.upper().removesuffix("+PTX").replace(".", "").lower()
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if "+" in arch:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def kernel_archs(kernel: str, archs: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a kernel file is compiled for; empty if none of archs is its own."""
    own = KERNELS.get(kernel)
    if own is None:
        return tuple(arch for arch in archs if arch.replace("+PTX", "")[-1].isdigit()) or archs
    asked = {re.sub(r"[^\d.]", "", arch) for arch in archs}
    return tuple(arch for arch in own if re.sub(r"[^\d.]", "", arch) in asked)


def check_compiler(cxx: str, standard: str) -> None:
    """Raise BuildError if the C++ compiler is missing or is a GCC too old for the standard."""
    path = shutil.which(cxx.split()[0])
    if path is None:
        raise BuildError(f"marlin: the C++ compiler {cxx!r} is not there; install g++ (or set CXX)")
    # Only GCC calls its major version __GNUC__ and has no __clang__.
    text = subprocess.run(
        [*cxx.split(), "-E", "-P", "-x", "c++", "-"],
        input="__GNUC__ __clang__\n",
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    check_gcc_version(cxx, text, standard)


def check_gcc_version(cxx: str, macros: list[str], standard: str) -> None:
    """Raise BuildError if the values of __GNUC__ and __clang__ tell of a GCC that is too old."""
    needed = 11 if standard == "c++20" else 9
    if (
        len(macros) == 2
        and macros[1] == "__clang__"
        and macros[0].isdigit()
        and int(macros[0]) < needed
    ):
        raise BuildError(
            f"marlin: the C++ compiler {cxx} is GCC {macros[0]} "
            f"but should be {needed} or newer for {standard}"
        )


def shared_cxx_runtime(cxx: str) -> list[str]:
    """Return the shared libstdc++ of a compiler as a linker's argument, or nothing if it has none.

    There are compilers set up to link libstdc++ statically. With two of them in one process, the
    first exception that passes from torch to the extension crashes. The library that is named
    first is the one that is taken.
    """
    command = [cxx, "-print-file-name=libstdc++.so.6"]
    path = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return [path] if Path(path).is_absolute() else []


def stale(output: Path, inputs: list[Path], command: list[str]) -> bool:
    """Return whether output is missing, older than an input, or made by another command."""
    stamp = output.with_name(output.name + ".cmd")
    if not output.exists() or not stamp.exists() or stamp.read_text() != "\n".join(command):
        return True
    made = output.stat().st_mtime
    return any(path.stat().st_mtime > made for path in inputs)
