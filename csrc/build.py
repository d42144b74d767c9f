"""Compiles the kernels on first use, with torch.utils.cpp_extension, and keeps them in the user's cache folder."""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = {"cpu": ["binding.cpp", "cpu.cpp"], "cuda": ["binding.cpp", "cuda.cu"]}
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its guess at CUDA_HOME, which is not used
WAIT = 120  # seconds at most for another process that compiles the same
# NFS keeps the files of a loaded library, and so the folder.
temporary_folder = functools.partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)


class Unavailable(Exception):
    """Why there are no kernels here, in one line."""


def load(device):
    """Register the operators of binding.cpp for `device`: torch.ops.gan_cpu or torch.ops.gan_cuda.

    Raises Unavailable if they cannot be compiled here.
    """
    if device not in SOURCES or device == "cuda" and torch.version.hip:
        raise Unavailable(f"there are none for {'ROCm' if torch.version.hip else device}")
    if os.name == "nt":
        raise Unavailable("they are compiled on Linux and macOS only")
    if registered(device):  # by this process; twice would crash it
        return
    name = f"gan_{device}-{fingerprint(device)}"
    if loaded(name):
        return
    try:
        settings = tools(device)
        with only_one(name) as folder:
            if not loaded(name):  # another process may have been faster
                print(f"kernels compiling csrc/ for {device}, once", flush=True)
                compile_and_load(device, settings, name, folder)
    except (OSError, subprocess.SubprocessError) as error:  # no temporary folder, an nvcc that cannot be run
        raise Unavailable(str(error)) from error


def registered(device):
    return hasattr(getattr(torch.ops, f"gan_{device}"), "penalty")


def cache_folder():
    """The user's, for what takes long to make; it may not exist yet. None can be made for a user without a home."""
    home = os.path.expanduser("~/.cache")
    folder = os.environ.get("XDG_CACHE_HOME") or (f"{os.devnull}/no-home" if home[0] == "~" else home)
    return Path(folder, "gan-scripts")


def kept(pattern):
    """The files of this name in the cache folder; none where it may not be looked into."""
    with contextlib.suppress(OSError):
        return list(cache_folder().glob(pattern))
    return []


def loaded(name):
    """Load a kept library; False if there is none. A damaged one is removed: half a library would crash Python."""
    for path in kept(f"{name}-*.so"):
        with contextlib.suppress(OSError, RuntimeError):
            if path.stem == f"{name}-{digest(path.read_bytes())}":
                torch.ops.load_library(path)
                with contextlib.suppress(OSError):  # a cache of someone else's
                    os.utime(path)  # see remove_unused
                return True
            path.unlink()
    return False


def remove_unused():
    """Remove what was compiled of other sources or for another torch, unless it was used in the last 30 days."""
    for path in kept("gan_*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 30 * 24 * 60 * 60:
                shutil.rmtree(path) if path.is_dir() else path.unlink()  # a process that has it loaded keeps it


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
    parts = [device, flags(device), os.environ.get("CXX"), torch.__version__, torch.version.cuda, platform.machine()]
    if device == "cuda":
        parts.append(architecture())
    else:
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            parts += [line for line in file if line.startswith(("flags", "Features"))][:1]
    parts += [(path.name, path.read_bytes()) for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp", ".cu")]
    return digest(repr(parts).encode())


def architecture():
    """What nvcc compiles for: the GPU here; without one TORCH_CUDA_ARCH_LIST, else Hopper."""
    if torch.cuda.is_available():
        return "{}.{}".format(*torch.cuda.get_device_capability())
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0"


def tools(device):
    """Environment variables under which cpp_extension finds what it needs. Raises Unavailable where something lacks."""
    # ninja may lie beside the Python of a virtual environment that is not activated
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    compiler = os.environ.get("CXX", "").strip() or "c++"
    try:
        program = shlex.split(compiler)[0]  # others may follow: "ccache g++"
    except ValueError as error:
        raise Unavailable(f"CXX={compiler} is no command ({error})") from error
    if not shutil.which(program):
        raise Unavailable(f"no C++ compiler: {program} is not on the PATH; install g++ or clang")
    if not shutil.which("ninja", path=path):
        raise Unavailable("no ninja on the PATH; pip install ninja")
    if device == "cpu":
        return {"PATH": path, "CXX": compiler}
    root, version = toolkit()
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(f"the CUDA toolkit in {root} has version {version}, torch needs {torch.version.cuda}; "
                          "set CUDA_HOME to one of the same major version")
    return {"PATH": path, "CXX": compiler, "CUDA_HOME": root, "TORCH_CUDA_ARCH_LIST": architecture()}


def toolkit():
    """Folder and version of the CUDA toolkit. The compiler itself is asked: the nvcc on the PATH may be a script."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [shutil.which("nvcc", path=Path(home, "bin")) for home in homes if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    nvcc = next(filter(None, candidates), None)
    if not nvcc:
        raise Unavailable(f"no nvcc; install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME to its folder")
    text = "".join(subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  check=False, timeout=60).stdout
                   for arguments in (["-dryrun", "-x", "cu", os.devnull], ["--version"]))
    top, release = re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE), re.search(r"release ([\d.]+)", text)
    if not top or not release:
        raise Unavailable(f"{nvcc} does not say what it is (nvcc --version)")
    return os.path.realpath(top[1]), release[1]


@contextlib.contextmanager
def only_one(name):
    """A fresh folder for the one process that compiles the library `name`: in the cache folder, which it locks.

    The system releases the lock when a process ends in whatever way. What a killed one leaves, the next one removes.
    Where the cache folder is full or cannot be written, or after WAIT seconds, it is a temporary folder.
    """
    import fcntl  # not on Windows

    with contextlib.ExitStack() as stack:
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            file, end = stack.enter_context(open(cache_folder() / f"{name}.lock", "w")), None
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if end is None:
                        print("kernels waiting for another process that compiles them", flush=True)
                        end = time.monotonic() + WAIT
                    elif time.monotonic() > end:
                        raise
                    time.sleep(0.1)
            for left in kept(f"{name}.*.build"):
                shutil.rmtree(left, ignore_errors=True)
            folder = stack.enter_context(temporary_folder(".build", f"{name}.", cache_folder()))
            room = Path(folder, "room")
            room.write_bytes(bytes(2**23))  # what compiling takes, and more
            room.unlink()
        except OSError:
            folder = stack.enter_context(temporary_folder(prefix="gan-kernels-"))
        yield Path(folder)


def compile_and_load(device, settings, name, folder):
    """Compile in a fresh folder, where no lock of torch can be stale, load the library and keep it."""
    from torch.utils import cpp_extension  # slow to import

    options, asked = flags(device), [*shlex.split(settings["CXX"]), "-print-file-name=libstdc++.so.6"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    if not os.path.isfile(found):  # another C++ library: the name alone comes back
        options.pop("extra_ldflags", None)
    if not shutil.which(settings["CXX"]):  # cpp_extension takes the name of a program, nothing more
        script = folder / "compiler"
        script.write_text(f'#!/bin/sh\nexec {settings["CXX"]} "$@"\n')
        script.chmod(0o700)
        settings |= {"CXX": str(script.absolute()), "TORCH_NO_COMPILER_WRAPPER": "1"}  # no ccache before the script
    try:
        with environment(settings, cpp_extension):
            cpp_extension.load(f"gan_{device}", [str(HERE / source) for source in SOURCES[device]],
                               build_directory=str(folder), with_cuda=device == "cuda", is_python_module=False,
                               **options)
        content = next(folder.glob("*.so")).read_bytes()
    except Exception as error:  # whatever a compiler, ninja or the loader leads to
        raise Unavailable(f"the build failed; {keep_log(name, error)}") from error
    path = cache_folder() / f"{name}-{digest(content)}.so"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
        remove_unused()
    except OSError as error:
        print(f"kernels cannot be kept in {path.parent} ({error.strerror}): the next run compiles them again")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def environment(settings, cpp_extension):
    """The environment variables `settings`, and cpp_extension's idea of CUDA_HOME, for a while."""
    before, home = {name: os.environ.get(name) for name in settings}, cpp_extension.CUDA_HOME
    os.environ.update(settings)
    cpp_extension.CUDA_HOME = settings.get("CUDA_HOME", home)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def keep_log(name, error):
    """Write what the compiler said into the cache or the temporary folder; say where."""
    for folder in (cache_folder(), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            log = folder / f"{name}.log"
            log.write_text("\n".join(map(str, filter(None, [error, error.__cause__]))))
            return f"see {log}"
    return " ".join(str(error).split())[:300]
