"""Builds the extension module marlin._C; build_tools.py decides what goes in, pyproject.toml says
the rest.

MARLIN_BUILD_CUDA=0|1|auto   CUDA kernels: never, always, or if nvcc and a CUDA torch are there
TORCH_CUDA_ARCH_LIST         the GPUs to build for, as torch reads it
MAX_JOBS                     compilers at a time; default: the number of CPUs
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # PEP 517 front ends do not put it there

import build_tools as tools  # noqa: E402


def max_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class BuildExtension(build_ext):
    """Compiles csrc/ with g++ and nvcc side by side, and only what has changed."""

    def run(self) -> None:
        try:
            super().run()
        except tools.BuildError as error:
            raise SystemExit(str(error)) from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"marlin: this command failed, see above: {' '.join(error.cmd)}"
            ) from None

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError:
            raise tools.BuildError(
                "marlin: building needs torch in this environment: install torch first, "
                "then run pip with --no-build-isolation"
            ) from None
        found = tools.Torch(torch.__version__, torch.version.cuda)
        tools.check_torch(found)
        nvcc = tools.find_nvcc(os.environ)
        plan = tools.choose(os.environ, found, nvcc, tools.nvcc_release(nvcc) if nvcc else None)
        cxx = os.environ.get("CXX", "g++")
        tools.check_compiler(cxx, found.cxx_standard)
        print(plan.note, file=sys.stderr, flush=True)

        # The objects of one torch are not those of another.
        build_dir = Path(self.build_temp) / f"{'cuda' if plan.with_cuda else 'cpu'}-{found.version}"
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        headers = [*tools.CSRC.glob("*.h")]
        common = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{tools.CSRC}"]
        root = Path(torch.__file__).parent
        includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
        includes.append(Path(sysconfig.get_paths()["include"]))
        macros = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
        libraries += tools.shared_cxx_runtime(cxx)

        jobs: list[tuple[Path, list[Path], list[str]]] = []

        def add(source: str, command: list[str]) -> None:
            target = build_dir / f"{source}.o"
            path = tools.CSRC / source
            jobs.append((target, [path, *headers], [*command, "-c", str(path), "-o", str(target)]))

        # The kernels come first, since they take longest.
        if plan.with_cuda:
            assert nvcc is not None
            home = tools.cuda_home(nvcc)
            macros.append("-DMARLIN_WITH_CUDA")
            includes.append(home / "include")
            libraries += [f"-L{home / name}" for name in ("lib64", "lib")]
            libraries += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
            # One compiler for each architecture, so many at a time.
            flags = ["-std=c++17", "-O3", "--threads", str(max_jobs())]
            flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{tools.CSRC}"]
            for kernel in tools.KERNELS:
                archs = tools.gencode(tools.kernel_archs(kernel, plan.archs))
                if archs:
                    add(kernel, [nvcc, *flags, *archs])
                    macros.append(
                        f"-DMARLIN_WITH_{Path(kernel).stem.removeprefix('marlin_').upper()}"
                    )
                else:  # its choice of configurations alone
                    add(kernel, [cxx, "-x", "c++", "-std=c++17", *common])
        else:
            # What a kernel file holds without nvcc is its choice of configurations.
            for kernel in tools.KERNELS:
                add(kernel, [cxx, "-x", "c++", "-std=c++17", *common])
        from_torch = [f"-isystem{path}" for path in includes]
        # at::parallel_for is inlined and runs serially without OpenMP. At link it comes from torch.
        threads = ["-fopenmp"] if sys.platform.startswith("linux") else []
        standard = f"-std={found.cxx_standard}"
        add("bindings.cpp", [cxx, standard, *threads, *common, *macros, *from_torch])
        add("marlin_cpu.cpp", [cxx, "-std=c++17", *common])

        self.run_jobs(jobs)
        objects = [target for target, _, _ in jobs]
        library = build_dir / output.name
        link = [cxx, "-shared", *map(str, objects), *libraries, "-o", str(library)]
        self.run_jobs([(library, objects, link)])
        shutil.copy2(library, output)

    def copy_extensions_to_source(self) -> None:
        """Put the module into the source tree (--inplace) by renaming: who runs the old one keeps
        it whole."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            in_source = Path(self.get_ext_filename(ext.name))
            beside = in_source.with_name(f".{in_source.name}.new")
            shutil.copy2(built, beside)
            beside.replace(in_source)

    def run_jobs(self, jobs: list[tuple[Path, list[Path], list[str]]]) -> None:
        """Run the commands whose output is stale, MAX_JOBS at a time."""

        def run(job: tuple[Path, list[Path], list[str]]) -> None:
            target, inputs, command = job
            if not tools.stale(target, inputs, command):
                return
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            target.with_name(target.name + ".cmd").write_text("\n".join(command))

        with ThreadPoolExecutor(max_jobs()) as pool:
            list(pool.map(run, jobs))


setup(
    license="Apache-2.0",
    ext_modules=[Extension("marlin._C", sources=[], depends=["csrc/marlin.h", "csrc/layout.h"])],
    cmdclass={"build_ext": BuildExtension},
)
