"""Compiling the kernels on first use: what is compiled when, and what is said where it cannot be done."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from conftest import ROOT, load_script, run_script
from csrc import build, ops

COMPILING, FUSED = "kernels compiling csrc/ for cpu, once", "kernels fused, for cpu: nothing"


def executable(path, text):
    """A shell script in the place of a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def library():
    """That of this machine, the only one of these tests that takes a compiler's time."""
    build.load("cpu")
    return next(build.cache_folder().glob(f"gan_cpu-{build.fingerprint('cpu')}-*.so"))


def compiler(path, library, before_linking=":"):
    """One that copies the library instead of linking its own."""
    return executable(path, f"""for last; do :; done
case $last in *.so) {before_linking}; exec cp '{library}' "$last";; *.o) touch "$last";; *) exec c++ "$@";; esac""")


def start(cache, cxx, program="from csrc import ops; ops.choose('auto', 'cpu')", folder=ROOT):
    """A process that chooses kernels with an empty or an earlier cache."""
    return subprocess.Popen([sys.executable, "-c", program], cwd=folder, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(cxx)})


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output.splitlines()


def kept(cache):
    """The libraries in a cache; each of them is whole."""
    paths = sorted(Path(cache, "gan-scripts").glob("*.so"))
    assert all(path.stem.endswith(build.digest(path.read_bytes())) for path in paths)
    return paths


def test_compiled_once_and_again_when_damaged_or_changed(tmp_path, library):
    """One line the first time, none later; a library cut off and a changed header are compiled anew."""
    cache, cxx = tmp_path / "cache", compiler(tmp_path / "c++", library)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert finish(start(cache, cxx, folder=tmp_path)) == [COMPILING, FUSED]
    first, = kept(cache)
    assert finish(start(cache, cxx, folder=tmp_path)) == [FUSED]
    first.write_bytes(first.read_bytes()[:5000])
    assert finish(start(cache, cxx, folder=tmp_path)) == [COMPILING, FUSED]
    assert kept(cache) == [first]
    with open(tmp_path / "csrc" / "kernels.h", "a") as file:
        file.write("// changed\n")
    assert finish(start(cache, cxx, folder=tmp_path)) == [COMPILING, FUSED]
    assert len(kept(cache)) == 2


def test_a_killed_build_hinders_nobody(tmp_path, library):
    """It is killed while it links."""
    hold, cache = tmp_path / "hold", tmp_path / "cache"
    hold.touch()
    cxx = compiler(tmp_path / "c++", library, f"touch '{tmp_path}/links'; while [ -e '{hold}' ]; do sleep 0.1; done")
    process = start(cache, cxx)
    while not (tmp_path / "links").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    hold.unlink()
    assert kept(cache) == []
    assert finish(start(cache, cxx)) == [COMPILING, FUSED] and len(kept(cache)) == 1


def test_two_processes_at_once(tmp_path, library):
    """Both link at the same moment: each waits for the other one to come so far."""
    (tmp_path / "links").mkdir()
    both = f"cd '{tmp_path}/links'; touch $$; while [ $(ls | wc -l) -lt 2 ]; do sleep 0.1; done; cd - > /dev/null"
    processes = [start(tmp_path / "cache", compiler(tmp_path / "c++", library, both)) for _ in range(2)]
    assert [finish(process) for process in processes] == [[COMPILING, FUSED]] * 2
    assert len(kept(tmp_path / "cache")) == 1


@pytest.fixture
def nothing_cached(tmp_path, monkeypatch):
    """This process as one that never had kernels, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("gan_cpu", "gan_cuda"):
        monkeypatch.setattr(torch.ops, name, Namespace())
    return tmp_path / "cache"


@pytest.mark.parametrize("cause, reason", [
    ("no compiler", r"c\+\+ is not on the PATH"), ("no such compiler", "/no/such/c is not on the PATH"),
    ("no ninja", "ninja is not on the PATH"), ("broken compiler", r"see (.*\.log)"), ("no nvcc", r"see (.*\.log)"),
    ("cache is a file", "Not a directory"), ("another device", "mps")])
def test_auto_is_never_fatal_and_says_why(cause, reason, nothing_cached, tmp_path, monkeypatch, capsys):
    device = {"no nvcc": "cuda", "another device": "mps"}.get(cause, "cpu")
    fails = 'case $1 in *version*) exec c++ "$@";; esac; echo "boom, it never works" >&2; exit 1'
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "empty" / "python"))  # beside it there may be a ninja
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    environment = {
        "no compiler": {"PATH": tmp_path / "empty"}, "no such compiler": {"CXX": "/no/such/c"},
        "no ninja": {"PATH": executable(tmp_path / "bin" / "c++", "exit 1").parent},
        "broken compiler": {"CXX": executable(tmp_path / "broken", fails)}, "another device": {},
        "no nvcc": {"CUDA_HOME": tmp_path / "empty"}, "cache is a file": {"XDG_CACHE_HOME": tmp_path / "file"}}[cause]
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert ops.choose("auto", device) == "reference" and ops.KERNELS == {}
    line = capsys.readouterr().out.splitlines()[-1]
    said = re.search(reason, line)
    assert line.startswith("kernels reference") and said
    if cause == "broken compiler":
        assert "boom, it never works" in Path(said[1]).read_text()
    with pytest.raises(build.Unavailable, match=reason):
        ops.choose("fused", device)


def test_kernels_that_do_not_run(monkeypatch, capsys):
    """Compiled, but for another GPU, or under an old driver."""
    def penalty(u, v):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(torch.ops, "gan_cpu", Namespace(penalty=penalty))
    assert ops.choose("auto", "cpu") == "reference" and ops.KERNELS == {}
    assert capsys.readouterr().out.endswith("no kernel image is available)\n")


TRAIN = ["--dataset", "gaussians", "--epochs", "1", "--max-batches", "1", "--eval-interval", "0", "--device", "cpu"]


@pytest.mark.parametrize("flags", [["--kernels", "fused", *TRAIN], ["--compare-kernels", "--device", "cpu"]])
def test_a_script_that_must_have_kernels_ends_in_one_line(flags, tmp_path):
    """With exit code 2 and nothing written."""
    environment = {**os.environ, "CXX": "/no/such/c", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    finished = run_script("03_wgan_gp", *flags, "--output-dir", tmp_path / "runs", env=environment)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "no fused kernels" in finished.stderr and "/no/such/c is not on the PATH" in finished.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", ["auto", "reference"])
def test_a_script_trains_without_kernels(wanted, nothing_cached, tmp_path, monkeypatch, capsys):
    """With "reference" it does not try to get any."""
    monkeypatch.setenv("CXX", "/no/such/c")
    load_script("03_wgan_gp").main([*TRAIN, "--kernels", wanted, "--output-dir", str(tmp_path / "runs")])
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels")]
    assert line.startswith("kernels reference") and ("/no/such/c" in line) == (wanted == "auto")
    options, = tmp_path.glob("runs/*/options.json")
    assert json.loads(options.read_text())["kernels"] == "reference" and not list(nothing_cached.glob("gan*"))


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="of Linux's linker, read with nm")
def test_the_c_plus_plus_library_is_the_system_s(library):
    """Not a copy in ours, not the parts of one in libc10: with two copies in one process an error message crashed."""
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    used = re.findall(r" ([A-Z]) (?:_ZN[KRO]*S|_ZS|__cxa_)\w*(@?)", symbols)
    assert len(used) > 5 and {*used} <= {("U", "@"), ("W", "@"), ("W", "")}, "undefined, of a version; or inline"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH")
def test_cuda_sources_compile_link_and_load(tmp_path, monkeypatch):
    """The real extension, with the toolkit that the build finds by itself; it runs nowhere here."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # where there is no GPU to ask
    program = ("import torch; from csrc import build; build.load('cuda')\n"
               "print(torch.ops.gan_cuda.penalty, torch.ops.gan_cuda.adain_backward)")
    output = finish(start(tmp_path, os.environ.get("CXX", "c++"), program))
    assert output == ["kernels compiling csrc/ for cuda, once", "gan_cuda.penalty gan_cuda.adain_backward"]
    test_the_c_plus_plus_library_is_the_system_s(*kept(tmp_path))
