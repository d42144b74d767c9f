"""What people meet elsewhere: notebooks, their own matplotlib settings, full memory, odd paths, proxies."""

import http.server
import os
import runpy
import signal
import struct
import subprocess
import sys
import threading
import urllib.request

import pytest
import torch
from torchvision import datasets

from conftest import ROOT, load_script, run_script  # puts common on the path

import common

QUICK = ["--dataset", "ring", "--epochs", "1", "--max-batches", "2", "--eval-interval", "0", "--device", "cpu"]


def refused(capsys, arguments, script="01_vanilla_gan"):
    """The one line on stderr with which a script refuses, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: load_script(script).main([str(argument) for argument in arguments]))
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


# ------------------------------------------------------------------------- notebooks, matplotlib
@pytest.mark.parametrize("backend, style", [("module://not_installed.backend", ""), ("", "text.usetex: True"),
                                            ("", "font.family: No Such Font\nfigure.dpi: 300\nsavefig.dpi: 300")])
def test_pictures_owe_nothing_to_the_users_matplotlib(tmp_path, backend, style):
    environment = {**os.environ, **({"MPLBACKEND": backend} if backend else {})}
    (tmp_path / "matplotlibrc").write_text(style)
    done = subprocess.run([sys.executable, ROOT / "01_vanilla_gan.py", *QUICK], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "findfont" not in done.stderr, done.stderr
    final, = tmp_path.glob("runs/*/samples/final.png")
    assert struct.unpack(">II", final.read_bytes()[16:24]) == (500, 500), "5 inches at matplotlib's own 100 dpi"


def test_matplotlib_is_the_users_again(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(matplotlib.rcParams, "figure.dpi", 33)
    common.save_picture(torch.zeros(4, 2), 2, tmp_path / "points.png")
    assert matplotlib.rcParams["figure.dpi"] == 33 and os.environ["MPLBACKEND"] == "agg"


def test_a_script_run_inside_python_leaves_the_process_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["01_vanilla_gan.py", *QUICK, "--output-dir", str(tmp_path)])
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    runpy.run_path(str(ROOT / "01_vanilla_gan.py"), run_name="__main__")
    assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_main_can_be_called_and_its_generator_loaded(tmp_path):
    """The README's lines."""
    gan = load_script("03_wgan_gp")
    gan.main([*QUICK[2:], "--dataset", "digits", "--output-dir", str(tmp_path)])
    generator = gan.Generator(latent_dim=100).eval()
    checkpoint = tmp_path / "03_wgan_gp-digits-0001" / "checkpoint.pt"
    generator.load_state_dict(torch.load(checkpoint, weights_only=True)["generator"])
    images = generator(torch.rand(16, 100) * 2 - 1)
    assert images.shape == (16, 1, 28, 28) and images.abs().max() <= 1


# ---------------------------------------------------------------------------- memory, GPUs, builds
@pytest.mark.parametrize("error, words", [
    (RuntimeError("CUDA error: out of memory"), "GPU has too little memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "nvidia-smi"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU has too little memory"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "GPU has too little memory"),
    (RuntimeError("std::bad_alloc"), "too little memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "too little memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "too little memory"),
    (OSError(12, "Cannot allocate memory"), "too little memory"), (MemoryError(), "too little memory"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device"), torch.__version__),
    (RuntimeError("operator torchvision::nms does not exist"), "different builds"),
    (OSError(28, "No space left on device", "{braces}.pt"), "{braces}.pt"),
])
def test_the_line_for_an_error(capsys, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit):
        common.guarded(main)
    line, = capsys.readouterr().err.splitlines()
    assert words in line


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        common.guarded(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


# ------------------------------------------------------------------------------- the network, MNIST
class Proxy(http.server.BaseHTTPRequestHandler):
    def do_CONNECT(self):
        self.send_response(407)
        self.end_headers()

    do_GET = do_HEAD = do_CONNECT

    def log_message(self, *_):
        pass


def test_a_proxys_refusal_is_in_the_message(tmp_path, monkeypatch, capsys):
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://mnist.invalid/"])
        monkeypatch.setattr(urllib.request, "_opener", None)  # the one that an earlier download has left
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        line = refused(capsys, [*QUICK[2:], "--dataset", "mnist", "--data-dir", tmp_path])
        server.shutdown()
    assert "407" in line and "--data-dir" in line


@pytest.mark.parametrize("name", ["MNIST/raw/train-images.idx3-ubyte", "train-images-idx3-ubyte", "raw/train-images-idx3-ubyte.gz",
                                  "mnist/raw/train-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte/train-images-idx3-ubyte"])
def test_mnist_that_is_nearly_there_is_no_reason_for_fonts(tmp_path, capsys, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345678")
    line = refused(capsys, [*QUICK[2:], "--dataset", "auto", "--data-dir", tmp_path])
    assert str(path) in line and str(tmp_path / "MNIST" / "raw") in line and "t10k-labels-idx1-ubyte" in line


def test_fashion_mnist_beside_it_is_not_mnist(tmp_path, capsys):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"12345678")
    load_script("01_vanilla_gan").main([*QUICK[2:], "--dataset", "auto", "--data-dir", str(tmp_path), "--output-dir", str(tmp_path)])
    assert "training on digits" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- paths, ways out
def test_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    load_script("01_vanilla_gan").main([*QUICK, "--output-dir=~/there"])
    assert (tmp_path / "there").is_dir() and not (tmp_path / "~").exists()
    load_script("01_vanilla_gan").main(["--from=~/there/01_vanilla_gan-ring-0001", "--generate", "4", "--output-dir=~/pictures"])
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["generated-4-seed0.png"]


def test_a_dangling_link_among_the_runs_hinders_nobody(tmp_path):
    main = load_script("01_vanilla_gan").main
    main([*QUICK, "--output-dir", str(tmp_path)])
    gone = tmp_path / "01_vanilla_gan-mnist-0001"
    gone.mkdir()
    (gone / "checkpoint.pt").symlink_to(tmp_path / "nowhere")
    main(["--resume", "--output-dir", str(tmp_path), "--epochs", "2"])
    assert len((tmp_path / "01_vanilla_gan-ring-0001" / "log.jsonl").read_text().splitlines()) == 2


def test_another_gpu_is_chosen_by_its_variable(capsys):
    assert "CUDA_VISIBLE_DEVICES" in refused(capsys, [*QUICK[:-1], "cuda:1"])


def test_a_compiler_that_speaks_japanese_under_a_c_locale(tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\necho "エラー" >&2; echo "エラー"; exit 1\n', encoding="utf-8")
    compiler.chmod(0o755)
    done = run_script("03_wgan_gp", *QUICK, "--output-dir", tmp_path / "出力",
                      env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler), "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "kernels reference" in done.stdout, done.stderr
