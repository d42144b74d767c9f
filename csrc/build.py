"""Compiles the kernels on first use, with torch.utils.cpp_extension, and keeps them in the user's cache folder."""

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = {"cpu": ["binding.cpp", "cpu.cpp"], "cuda": ["binding.cpp", "cuda.cu"]}
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it says which GPUs it compiles for


class Unavailable(OSError):
    """Why there are no kernels here, in one line."""


def cache_folder():
    """The user's, for what takes long to make; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gan-scripts")


def load(device):
    """Register the operators of binding.cpp for `device`, torch.ops.gan_cpu or torch.ops.gan_cuda.

    Raises Unavailable, for whatever reason they cannot be had here.
    """
    if device not in SOURCES or device == "cuda" and torch.version.hip or os.name == "nt":
        raise Unavailable(f"there are none for {device} on {platform.system()}")
    if hasattr(getattr(torch.ops, f"gan_{device}"), "penalty"):  # loaded by this process; twice would crash it
        return
    try:
        name = f"gan_{device}-{fingerprint(device)}"
        for library in cache_folder().glob(f"{name}-*.so"):
            if library.stem == f"{name}-{digest(library.read_bytes())}":  # half a library would crash Python
                return torch.ops.load_library(library)
        compile_and_load(device, name)
    except Exception as error:  # whatever a compiler, ninja, the loader or the disk leads to
        raise Unavailable(" ".join(str(error).split())[:300]) from error


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def flags(device):
    """The compiler's and linker's, as cpp_extension.load takes them."""
    target = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11
    # The shared C++ library, before PyTorch's. Otherwise the linker may copy a static one into ours, or take functions
    # from the copy that libc10 contains; with two copies in one process, making an error message crashed.
    linker = {"extra_ldflags": ["-l:libstdc++.so.6"]} if sys.platform == "linux" else {}
    if device == "cuda":
        return {"extra_cflags": [*target, "-DUSE_CUDA"], "extra_cuda_cflags": ["-O3"], **linker}
    # All instructions of this processor, but in the compiler's usual order, which was faster; whole AVX-512 vectors; no
    # detours for errno and traps, which nobody asks for.
    native = ["-march=native", "-mtune=generic", "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    return {"extra_cflags": [*target, "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", *native], **linker}


def fingerprint(device):
    """Sixteen digits of what the library is compiled from and for: sources, flags, torch, processor or GPU."""
    parts = [flags(device), torch.__version__, torch.version.cuda, os.environ.get("CXX"), platform.machine()]
    if device == "cuda":
        here = torch.cuda.is_available()
        parts.append(torch.cuda.get_device_capability() if here else os.environ.get("TORCH_CUDA_ARCH_LIST"))
    elif os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    parts += [path.read_bytes() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp", ".cu")]
    return digest(repr(parts).encode())


def compile_and_load(device, name):
    """Compile in a fresh folder, where no lock of a killed build can be stale, load the library and keep it."""
    from torch.utils import cpp_extension  # slow to import

    if not shutil.which("ninja"):  # it may lie beside the Python of an environment that is not activated
        os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)
    for program, package in [(os.environ.get("CXX", "c++"), "a C++ compiler, or set CXX to one program"),
                             ("ninja", "it (pip install ninja)")]:
        if not shutil.which(program):
            raise Unavailable(f"{program} is not on the PATH; install {package}")
    if not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and os.path.exists("/usr/local/cuda/bin/nvcc"):
        cpp_extension.CUDA_HOME = "/usr/local/cuda"  # the nvcc on the PATH, its guess, may be a script elsewhere
    print(f"kernels compiling csrc/ for {device}, once", flush=True)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as build:
        try:
            sources = [str(HERE / source) for source in SOURCES[device]]
            cpp_extension.load(f"gan_{device}", sources, build_directory=build, with_cuda=device == "cuda",
                               is_python_module=False, **flags(device))
        except Exception as error:
            log = folder / f"{name}.log"
            log.write_text(f"{error}\n{error.__cause__}", encoding="utf-8", errors="backslashreplace")
            raise Unavailable(f"the build failed; see {log}") from error
        built = next(Path(build).glob("*.so"))
        with open(built, "rb+") as file:
            content = file.read()
            os.fsync(file)
        os.replace(built, folder / f"{name}-{digest(content)}.so")  # whole, or not at all
