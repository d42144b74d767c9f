import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import datasets

ROOT = Path(__file__).parent.parent
SCRIPTS = ["01_vanilla_gan", "02_dcgan", "03_wgan_gp", "04_cgan", "05_sn_label_smoothing", "06_stylegan_blocks"]
sys.path.insert(0, str(ROOT))
import common
from csrc import ops


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("no GPU"))


@functools.cache
def load_script(name):
    """The numbered script as a module; a name that starts with a digit cannot be imported by statement."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks it up
    spec.loader.exec_module(module)
    return module


def run_script(name, *arguments, **settings):
    """The script as a user starts it; settings go to subprocess.run."""
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300, **settings}
    return subprocess.run([sys.executable, f"{name}.py", *map(str, arguments)], check=False, **settings)


def unchanged(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def snapshot(state):
    return {name: value.clone() for name, value in state}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test leaves this machine: the download servers are a closed local port."""
    for kind in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setitem(os.environ, "no_proxy", "127.0.0.1")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    """A test that chooses kernels or trains leaves neither kernels nor a run to the next one."""
    monkeypatch.setattr(ops, "KERNELS", {})
    monkeypatch.setattr(common.Run, "current", None)


@pytest.fixture
def few_digits(monkeypatch):
    """In place of drawn digits, which take seconds: 1,000 of random pixels, but for the first, which is the label."""
    labels = torch.arange(1000) % 10
    images = torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = labels
    monkeypatch.setattr(common, "draw_digits", lambda split: (images, labels))
