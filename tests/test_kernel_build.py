"""Compiling the kernels on first use: what is compiled when, and what is said where it cannot be done."""

import importlib.util
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from conftest import ROOT, load_script
from csrc import build, ops

PROGRAM = "import torch; from csrc import ops; print(ops.choose('auto', 'cpu')); print(ops.KERNELS)"


@pytest.fixture
def quick(tmp_path_factory):
    """A compiler that does not optimise, and a program before it, as in "ccache g++"."""
    return "env " + str(script(tmp_path_factory.mktemp("bin") / "quick", 'exec c++ "$@" -O0'))


def start(cache, program=PROGRAM, **environment):
    """A process that chooses kernels with an empty or an earlier cache."""
    return subprocess.Popen([sys.executable, "-c", program], cwd=environment.pop("cwd", ROOT), text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(Path(cache).parent), **environment})


def finish(process):
    with process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output.splitlines()


def libraries(cache):
    return sorted(path.name for path in Path(cache, "gan-scripts").glob("*.so"))


def script(path, text):
    """An executable shell script in the place of a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def nothing_cached(tmp_path, monkeypatch):
    """This process as one that never had kernels, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "registered", lambda device: False)
    return tmp_path / "cache"


def test_compiled_once_then_cached_then_again_for_another_source(tmp_path, quick):
    """One line the first time; none later; a changed header or a damaged file is compiled anew."""
    sources = tmp_path / "copy" / "csrc"
    sources.mkdir(parents=True)
    for path in (ROOT / "csrc").glob("*.*"):
        (sources / path.name).write_bytes(path.read_bytes())
    cache, here = tmp_path / "cache", {"cwd": sources.parent, "CXX": quick}
    first = finish(start(cache, **here))
    assert first[:2] == ["kernels compiling csrc/ for cpu, once", "fused, for cpu"] and "gan_cpu" in first[2]
    assert finish(start(cache, **here)) == first[1:], "cached: says nothing"
    kept = libraries(cache)
    assert len(kept) == 1
    with open(sources / "kernels.h", "a") as file:
        file.write("// changed\n")
    assert finish(start(cache, **here)) == first and len(libraries(cache)) == 2
    for path in Path(cache, "gan-scripts").glob("*.so"):
        path.write_bytes(path.read_bytes()[:5000])
    assert finish(start(cache, **here)) == first, "a damaged library is compiled anew"


CHANGES = {  # what changes -> how, and whether the keys for the CPU and for CUDA change with it
    "nothing": (lambda folder, patch: None, False, False),
    "torch": (lambda folder, patch: patch.setattr(torch, "__version__", "2.99"), True, True),
    "torch's CUDA": (lambda folder, patch: patch.setattr(torch.version, "cuda", "99.9"), True, True),
    "CXX": (lambda folder, patch: patch.setenv("CXX", "another"), True, True),
    "another variable": (lambda folder, patch: patch.setenv("CXXX", "another"), False, False),
    "flags": (lambda folder, patch: patch.setattr(build, "flags", lambda device: ["-O1"]), True, True),
    "machine": (lambda folder, patch: patch.setattr(build.platform, "machine", lambda: "another"), True, True),
    "processor": (lambda folder, patch: change(folder / "cpuinfo", "sse", "avx"), True, False),
    "clock": (lambda folder, patch: change(folder / "cpuinfo", "1000", "2000"), False, False),
    "GPU": (lambda folder, patch: patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0"), False, True),
    "header": (lambda folder, patch: change(folder / "kernels.h", "int", "long"), True, True),
    "C++ source": (lambda folder, patch: change(folder / "cpu.cpp", "int", "long"), True, True),
    "CUDA source": (lambda folder, patch: change(folder / "cuda.cu", "int", "long"), True, True),
    "Python source": (lambda folder, patch: change(folder / "ops.py", "int", "long"), False, False),
}


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("what", CHANGES)
def test_a_library_is_kept_for_what_it_depends_on(what, tmp_path, monkeypatch):
    """Its key in the cache changes with all that it is compiled from and for, and with nothing else."""
    for name in ("kernels.h", "cpu.cpp", "cuda.cu", "ops.py"):
        (tmp_path / name).write_text("int")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\ncpu MHz\t: 1000\nflags\t: fpu sse\n")
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "open", lambda path: io.StringIO((tmp_path / "cpuinfo").read_text()), raising=False)
    monkeypatch.setattr(build, "flags", lambda device: ["-O3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu, cuda = build.fingerprint("cpu"), build.fingerprint("cuda")
    alter, *expected = CHANGES[what]
    alter(tmp_path, monkeypatch)
    assert [build.fingerprint("cpu") != cpu, build.fingerprint("cuda") != cuda] == expected
    assert cpu != cuda


def test_a_killed_build_hinders_nobody(tmp_path, quick):
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        process = start(tmp_path, CXX=quick)
        assert process.stdout.readline().startswith("kernels compiling")
        time.sleep(1)
        os.killpg(process.pid, signal_number)
        process.communicate()
        assert libraries(tmp_path) == []
    assert list(tmp_path.glob("gan-scripts/*.build"))
    output = finish(start(tmp_path, CXX=quick))
    assert output[:2] == ["kernels compiling csrc/ for cpu, once", "fused, for cpu"]
    assert {path.suffix for path in tmp_path.glob("gan-scripts/*")} == {".lock", ".so"}
    assert not list(tmp_path.parent.glob("gan-kernels-*"))


@pytest.mark.slow
def test_eight_at_once_compile_once(tmp_path, quick):
    outputs = [finish(process) for process in [start(tmp_path, CXX=quick, OMP_NUM_THREADS="1") for _ in range(8)]]
    assert sum("kernels compiling csrc/ for cpu, once" in output for output in outputs) == 1
    assert all(output[-2] == "fused, for cpu" for output in outputs) and len(libraries(tmp_path)) == 1


def test_a_stopped_builder_is_not_waited_for_forever(tmp_path, quick):
    builder = start(tmp_path, CXX=quick)
    assert builder.stdout.readline().startswith("kernels compiling")
    os.killpg(builder.pid, signal.SIGSTOP)
    try:
        program = "from csrc import build; build.WAIT = 1\n" + PROGRAM
        output = finish(start(tmp_path, program, CXX=quick))
        assert output[:3] == ["kernels waiting for another process that compiles them",
                              "kernels compiling csrc/ for cpu, once", "fused, for cpu"]
    finally:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.communicate()


@pytest.fixture
def compiled(nothing_cached, monkeypatch):
    """Compiling takes no time and gives an empty file. Returns what the compiler said, each time."""
    said = []

    def load(name, sources, build_directory, **_):
        assert "room" not in os.listdir(build_directory)
        said.append(subprocess.run([os.environ["CXX"], "a b"], text=True, capture_output=True, check=False).stdout)
        Path(build_directory, f"{name}.so").touch()

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    return said


@pytest.mark.parametrize("spoil, reason", [
    (lambda cache: cache.write_text("a file where the folder should be"), "Not a directory"),
    (lambda cache: (cache / "gan-scripts").symlink_to("/proc/self/fdinfo") if not cache.mkdir() else None, "")])
def test_a_cache_that_takes_nothing(nothing_cached, compiled, capsys, spoil, reason):
    """Root may write into read-only folders: here are ones that even root cannot write into."""
    spoil(nothing_cached)
    build.load("cpu")
    compiling, kept = capsys.readouterr().out.splitlines()
    assert compiling == "kernels compiling csrc/ for cpu, once" and len(compiled) == 1
    assert kept.startswith(f"kernels cannot be kept in {nothing_cached / 'gan-scripts'} (") and reason in kept


def test_a_full_disk_keeps_no_part(nothing_cached, compiled, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        write(path, b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    build.load("cpu")
    assert [path.suffix for path in Path(nothing_cached, "gan-scripts").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_looked_into(compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("long" * 75)))
    build.load("cpu")
    assert "kernels cannot be kept in " in capsys.readouterr().out and len(compiled) == 1


def test_nothing_is_kept_for_a_user_without_a_home(compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    build.load("cpu")
    assert "kernels cannot be kept in /dev/null/no-home/gan-scripts (" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_removed_loses_no_kernels(nothing_cached, compiled, monkeypatch):
    """As on NFS, which keeps the files of a loaded library."""
    def not_empty(path, **_):
        raise OSError(39, "Directory not empty", path)

    monkeypatch.setattr(os, "rmdir", not_empty)
    build.load("cpu")
    assert len(compiled) == 1


def test_a_compiler_of_several_words(compiled, tmp_path, monkeypatch):
    """cpp_extension takes one: it gets a script that runs them all."""
    launcher = script(tmp_path / "a launcher", 'echo "$@"')
    monkeypatch.setenv("CXX", f"'{launcher}' g++ -O0")
    build.load("cpu")
    assert compiled == ["g++ -O0 a b\n"] and "TORCH_NO_COMPILER_WRAPPER" not in os.environ


def test_a_killed_build_and_a_damaged_library_are_removed(nothing_cached, compiled):
    folder, name = nothing_cached / "gan-scripts", f"gan_cpu-{build.fingerprint('cpu')}"
    (folder / f"{name}.killed.build" / "objects").mkdir(parents=True)
    (folder / f"{name}-0123456789abcdef.so").write_bytes(b"half a library")
    build.load("cpu")
    assert {path.name for path in folder.iterdir()} == {f"{name}.lock", f"{name}-{build.digest(b'')}.so"}


def test_what_was_long_unused_is_removed(nothing_cached, compiled, monkeypatch):
    """What other sources or another torch still use stays, and so do classifiers. To load a library is to use it."""
    folder, name = nothing_cached / "gan-scripts", f"gan_cpu-{build.fingerprint('cpu')}"
    (folder / "gan_cpu-1.killed.build" / "objects").mkdir(parents=True)
    unused = ["gan_cpu-1-2.so", "gan_cpu-1-2.so.3.tmp", "gan_cpu-1.lock", "gan_cuda-1.log"]
    kept = ["classifier-1.pt", f"gan_cpu-4-{build.digest(b'')}.so", "gan_cuda-5-6.so", "gan_cuda-5.lock"]
    for file in unused + kept:
        (folder / file).touch()
    for path in folder.iterdir():
        days = 29 if path.name.startswith("gan_cuda-5") else 31
        os.utime(path, (time.time() - days * 24 * 60 * 60,) * 2)
    monkeypatch.setattr(torch.ops, "load_library", Path)
    assert build.loaded("gan_cpu-4")
    build.load("cpu")
    assert {path.name for path in folder.iterdir()} == {*kept, f"{name}.lock", f"{name}-{build.digest(b'')}.so"}


def causes(tmp_path):
    """Why there are no kernels: device, changes to the environment, what is said."""
    nvcc = 'case $1 in -dryrun) echo "#$ TOP=/opt/other/bin/.." >&2;; *) echo "Cuda compilation tools, release 9.2, V9.2";; esac'
    other = script(tmp_path / "other" / "bin" / "nvcc", nvcc).parent.parent
    silent = script(tmp_path / "silent" / "bin" / "nvcc", "exit 1").parent.parent
    compilers = {name: script(tmp_path / "bin" / name, "exec /usr/bin/c++ \"$@\"").parent for name in ("c++", "ninja-is-absent")}
    failing = script(tmp_path / "failing", "case $1 in *version*) exec c++ $1;; esac; echo 'boom, it never works' >&2; exit 1")
    empty = tmp_path / "empty"
    empty.mkdir()
    return {
        "no compiler": ("cpu", {"PATH": str(empty)}, r"no C\+\+ compiler: c\+\+ is not on the PATH; install g\+\+ or clang"),
        "no such compiler": ("cpu", {"CXX": "/no/such/compiler"}, r"no C\+\+ compiler: /no/such/compiler is not on the PATH"),
        "no such launcher": ("cpu", {"CXX": "/no/such/ccache g++"}, "compiler: /no/such/ccache is not on the PATH"),
        "an open quote": ("cpu", {"CXX": "g++ '-w"}, r"CXX=g\+\+ '-w is no command"),
        "no ninja": ("cpu", {"PATH": str(compilers["c++"])}, "no ninja on the PATH; pip install ninja"),
        "build error": ("cpu", {"CXX": str(failing)}, r"the build failed; see (.*\.log)"),
        "no nvcc": ("cuda", {"PATH": str(compilers["c++"]), "CUDA_HOME": str(empty), "ninja": "here"},
                    r"no nvcc; install the CUDA toolkit 13\.0 or set CUDA_HOME to its folder"),
        "toolkit mismatch": ("cuda", {"CUDA_HOME": str(other)},
                             r"the CUDA toolkit in /opt/other has version 9\.2, torch needs 13\.0; set CUDA_HOME"),
        "broken nvcc": ("cuda", {"CUDA_HOME": str(silent)}, "does not say what it is"),
        "another device": ("mps", {}, "there are none for mps"),
    }


CAUSES = ["no compiler", "no such compiler", "no such launcher", "an open quote", "no ninja", "build error", "no nvcc",
          "toolkit mismatch", "broken nvcc", "another device"]


@pytest.mark.parametrize("cause", CAUSES)
def test_auto_falls_back_and_says_why(cause, nothing_cached, tmp_path, monkeypatch):
    device, environment, reason = causes(tmp_path)[cause]
    which = build.shutil.which
    hidden = {"no ninja": ["ninja"], "no nvcc": ["/usr/local"]}.get(cause, [])  # a ninja of this Python, a toolkit here

    def found(name, path=None):
        if name in hidden or any(str(path).startswith(prefix) for prefix in hidden):
            return None
        return "ninja" if name == "ninja" and cause == "no nvcc" else which(name, path=path)

    monkeypatch.setattr(build.shutil, "which", found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = ops.choose("auto", device)
    assert line.startswith("reference: PyTorch's own operations, no fused ones (") and "\n" not in line
    assert ops.KERNELS == {}
    with pytest.raises(build.Unavailable, match=reason) as failure:
        ops.choose("fused", device)
    assert str(failure.value) in line
    if cause == "build error":
        assert "boom, it never works" in Path(line.split("see ")[1].rstrip(")")).read_text()


def test_kernels_that_do_not_run(monkeypatch):
    """Compiled, but for another GPU, or under an old driver."""
    def penalty(gradient):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(build, "load", lambda device: None)
    monkeypatch.setattr(ops, "describe", lambda device: Namespace(penalty=penalty))
    assert ops.choose("auto", "cpu").endswith("no fused ones (they do not run: no kernel image is available)") and ops.KERNELS == {}
    with pytest.raises(build.Unavailable, match="they do not run"):
        ops.choose("fused", "cpu")


def test_a_script_falls_back_or_leaves(nothing_cached, tmp_path, monkeypatch, capsys):
    """auto trains on with one line; fused leaves with exit code 2 and nothing written; reference does not try."""
    def run(*flags):
        load_script("03_wgan_gp").main([*flags, "--dataset", "gaussians", "--epochs", "1", "--max-batches", "1", "--eval-interval", "0",
                                        "--device", "cpu", "--output-dir", str(tmp_path / "runs")])
        return capsys.readouterr().out.splitlines()[3]

    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(SystemExit) as stop:
        run("--kernels", "fused")
    assert (stop.value.code, os.path.exists(nothing_cached / "gan-scripts")) == (2, False)
    assert capsys.readouterr().err.endswith(": error: no fused kernels: no C++ compiler: /no/such/compiler is not on the PATH; "
                                            "install g++ or clang\n")
    assert not list(tmp_path.glob("runs/*"))
    assert run() == ("kernels reference: PyTorch's own operations, no fused ones (no C++ compiler: "
                     "/no/such/compiler is not on the PATH; install g++ or clang)")
    assert run("--kernels", "reference") == "kernels reference: PyTorch's own operations, as asked"
    for path in tmp_path.glob("runs/*/options.json"):
        assert json.loads(path.read_text())["kernels"] == "reference"


def test_cuda_sources_compile_link_and_load_where_nvcc_is(tmp_path):
    """The real extension, with the toolkit that the build finds by itself; it runs nowhere here."""
    if not build.shutil.which("nvcc"):
        pytest.skip("no nvcc on the PATH")
    program = ("import torch; from csrc import build; build.load('cuda')\n"
               "print(torch.ops.gan_cuda.penalty, torch.ops.gan_cuda.adain_backward)")
    environment = {name: "" for name in ("CUDA_HOME", "CUDA_PATH")}
    output = finish(start(tmp_path, program, **environment))
    assert output == ["kernels compiling csrc/ for cuda, once", "gan_cuda.penalty gan_cuda.adain_backward"]
    library, = libraries(tmp_path)
    check_the_c_plus_plus_library(tmp_path / "gan-scripts" / library)


def check_the_c_plus_plus_library(path):
    """Not a copy in ours, not the parts of one in libc10: with two copies in one process an error message crashed."""
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    used = re.findall(r" ([A-Z]) (?:_ZN[KRO]*S|_ZS|__cxa_)\w*(@?)", symbols)
    assert len(used) > 5 and {*used} <= {("U", "@"), ("W", "@"), ("W", "")}, "undefined, of a version; inline functions are ours"


@pytest.mark.slow
def test_another_c_plus_plus_library(tmp_path):
    """Where the compiler has no libstdc++.so.6 it is not asked for."""
    other = script(tmp_path / "bin" / "other", 'case "$*" in *-print-file-name*) echo libstdc++.so.6;; '
                   '*libstdc++.so.6*) exit 1;; *) exec c++ "$@" -O0;; esac')
    assert finish(start(tmp_path / "cache", CXX=str(other)))[1] == "fused, for cpu"


@pytest.mark.skipif(sys.platform != "linux" or not build.shutil.which("nm"), reason="of Linux's linker, read with nm")
def test_the_c_plus_plus_library_is_the_system_s():
    ops.choose("fused", "cpu")
    check_the_c_plus_plus_library(next(build.cache_folder().glob(f"gan_cpu-{build.fingerprint('cpu')}-*.so")))


TARGETS = ["sm_90", "sm_100"]


def instructions(code):
    """Of a disassembled kernel: text, barrier that the result opens (7: none), mask of the barriers waited for."""
    word = r"/\* (0x[0-9a-f]{16}) \*/"
    for text, _, high in re.findall(rf"/\*[0-9a-f]{{4,}}\*/\s+(.*?)\s*;?\s*{word}\s+{word}", code):
        control = int(high, 16) >> 41
        yield text, control >> 5 & 7, control >> 11 & 63


def loads_at_once(code):
    """Numbers of 16-byte loads under way, each time that the first of them is waited for."""
    runs, barriers = [0], 0
    for text, opens, waits_for in instructions(code):
        if waits_for & barriers:
            barriers = 0
            runs.append(0)
        if re.search(r"\bLDG\S*\.128", text):
            barriers |= 1 << opens
            runs[-1] += 1
    return [run for run in runs if run]


def check_what_nvcc_makes(nvcc, architecture, folder):
    """No register spilled, no local memory; 16 bytes per access, all loads of a tile before the first is waited for."""
    cubin = folder / architecture
    report = subprocess.run([nvcc, "-std=c++20", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", cubin,
                             ROOT / "csrc" / "cuda.cu"], capture_output=True, text=True, check=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                         r"(\d+) bytes spill loads.*?Used (\d+) registers", report, re.DOTALL)
    assert len(kernels) == 2 * (11 + 10 + 10) + 3 * 3 * 2 + 1  # AdaIN's layouts per dtype; the penalty's; the norms
    spilled = [kernel for kernel in kernels if kernel[1:4] != ("0", "0", "0")]
    assert not spilled, (architecture, spilled)
    rows = [int(kernel[4]) for kernel in kernels if re.search(r"(square_sums|scaled_rows)IfLi[14]ELi256E", kernel[0])]
    assert len(rows) == 4 and (max(rows) <= 32 or architecture not in TARGETS), "eight blocks per multiprocessor, as kernels.h has it"
    disassembler = build.shutil.which("cuobjdump") or Path(
        importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([disassembler, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    codes = dict(part.split("\n", 1) for part in listing.split("Function : ")[1:])
    assert len(codes) == len(kernels)
    assert not any(re.search(r"\b(LDL|STL)\b", code) for code in codes.values())
    checked = 0
    for name, code in codes.items():
        layout = re.search(r"LayoutI(?:f|6__half|13__nv_bfloat16)Li([48])ELi(\d+)ELi(\d+)ELb([01])EEELb([01])", name)
        if layout:
            vector, threads, items, _, backward = map(int, layout.groups())
            least = items * (2 + backward)  # of x, the noise, dy
            if fewer := (vector, threads, items, backward) == (4, 512, 8, 0):  # 64 registers: x, half of the noise
                least = 12 if architecture in TARGETS else 9  # or less of it
        elif rows := re.search(r"(?:square_sums|scaled_rows)I\w+Li[48]ELi(32|256)E", name):
            least, fewer = {"32": 7, "256": 4}[rows[1]], False
        else:
            continue
        checked += 1
        runs = loads_at_once(code)
        assert runs[0] >= least and (fewer or min(runs) >= least), (architecture, name, runs)
        assert "square_sums" in name or re.search(r"\bSTG\S*\.128", code)
        assert not re.search(r"\b(LDG|STG)\S*\.64\b", code)
    assert checked == 2 * (9 + 8 + 8) + 3 * 2 * 2


@pytest.mark.parametrize("architecture", TARGETS)
def test_what_nvcc_makes_of_the_cuda_source(architecture, tmp_path):
    nvcc = build.shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on the PATH")
    check_what_nvcc_makes(nvcc, architecture, tmp_path)


@pytest.mark.slow
def test_what_nvcc_makes_for_all_architectures(tmp_path):
    nvcc = build.shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on the PATH")
    offered = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    assert "sm_90" in offered
    for architecture in offered:
        check_what_nvcc_makes(nvcc, architecture, tmp_path)


def test_nothing_is_compiled_for_a_run_that_cannot_begin(nothing_cached, tmp_path, capsys):
    """Data and batch size are checked before the kernels are compiled."""
    for flags, complaint in [(["--dataset", "mnist", "--data-dir", tmp_path], "--dataset mnist"),
                             (["--dataset", "gaussians", "--batch-size", "99999"], "--batch-size 99999 exceeds")]:
        with pytest.raises(SystemExit) as stop:
            load_script("03_wgan_gp").main([*map(str, flags), "--output-dir", str(tmp_path)])
        said = capsys.readouterr()
        assert stop.value.code == 2 and complaint in said.err and "kernels" not in said.out and not nothing_cached.exists()
