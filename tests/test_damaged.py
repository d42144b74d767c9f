"""Damaged and edited checkpoints: a line and exit code 2, or a sound load; never a traceback, never slow."""

import io
import random
import time
import zipfile

import pytest
import torch

from conftest import load_script  # puts common on the path

import common

VALUES = [None, True, 0, -1, 3, 10**30, 99_999, 1.5, float("nan"), float("inf"), "", "x", "points", "conv", "敵", [], [1], {}, {"a": 1},
          torch.zeros(2), b"x"]


def packed(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def of_bytes(good, rng):
    """Bits flipped, bytes cut off, doubled, overwritten."""
    content = bytearray(good)
    at = rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            content[at] ^= 1 << rng.randrange(8)
        case 1:
            del content[at:]
        case 2:
            content[at:at] = content[:rng.randrange(200)]
        case 3:
            content[at:at + 50] = rng.randbytes(50)
    return bytes(content)


def of_members(good, rng):
    """Members of the zip left out, exchanged, shortened or filled with other bytes, all with right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(file, "w") as target:
        names = source.namelist()
        chosen, other, kind = rng.choice(names), rng.choice(names), rng.randrange(4)
        for name in names:
            content = source.read(other if name == chosen and kind == 0 else name)
            if name == chosen and kind == 1:
                continue
            if name == chosen and kind == 2:
                content = content[:rng.randrange(len(content) + 1)]
            if name == chosen and kind == 3:
                content = of_bytes(content, rng) if content else b"x"
            target.writestr(name, content)
    return file.getvalue()


def of_options(good, rng):
    """An option, or one of the other entries, removed, renamed, or replaced by anything."""
    content = torch.load(io.BytesIO(good), weights_only=True)
    entries = content["options"] if rng.random() < 0.8 else content
    name = rng.choice(sorted(entries))
    value = entries.pop(name)
    if rng.random() < 0.8:
        entries[name] = rng.choice(VALUES)
    elif rng.random() < 0.5:
        entries[rng.choice([name + "x", 7, ""])] = value
    return packed(content)


def of_weights(good, rng):
    """A tensor of the generator removed, renamed, or of another shape, type, size or layout."""
    content = torch.load(io.BytesIO(good), weights_only=True)
    state = content.get("average", content["generator"])
    name = rng.choice(sorted(state))
    value = state.pop(name)
    other = rng.choice([lambda: value.double(), lambda: value.half(), lambda: value.flatten()[:1], lambda: value.flatten(), lambda: value + torch.nan,
                        lambda: value * 1e30, lambda: value.to(torch.complex64), lambda: value.to_sparse(), lambda: value.bool(),
                        lambda: value.expand(3, *value.shape), lambda: torch.empty(0), lambda: rng.choice(VALUES), lambda: torch.zeros(()),
                        lambda: value.clone().requires_grad_() if value.is_floating_point() else value])
    if rng.random() < 0.85:
        state[rng.choice([name, name, name, "", name + ".x"])] = other()
    return packed(content)


@pytest.fixture(scope="module", params=["03_wgan_gp", "06_stylegan_blocks"])
def good(request, tmp_path_factory):
    """A script and a checkpoint of it."""
    parent, small = tmp_path_factory.mktemp("runs"), ["--latent-dim", "5"]
    if request.param == "06_stylegan_blocks":
        small += ["--width", "32"]
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)
    load_script(request.param).main(["--dataset", "digits", "--epochs", "1", "--max-batches", "1", "--batch-size", "4",
                                     "--eval-interval", "0", "--output-dir", str(parent), *small])
    monkeypatch.undo()
    return request.param, next(parent.rglob("checkpoint.pt")).read_bytes()


@pytest.mark.parametrize("mutate", [of_bytes, of_members, of_options, of_weights])
@pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.slow)])
def test_mutants(good, mutate, count, tmp_path, capsys, monkeypatch):
    script, content = good
    module, rng, path, loads = load_script(script), random.Random(count), tmp_path / "checkpoint.pt", 0
    monkeypatch.setattr(module.common, "draw_digits", lambda split: pytest.fail("a complete run has nothing to train"))
    for index in range(count):
        path.write_bytes(mutate(content, rng))
        start = time.process_time()
        try:
            module.main(["--from", str(path), "--device", "cpu", "--generate", "4"])
            loads += 1
        except SystemExit as stop:
            assert stop.code == 2
            line, = capsys.readouterr().err.splitlines()
            assert "error: --from: " in line
        except BaseException:
            (tmp_path.parent / f"{script}-{mutate.__name__}-{index}.pt").write_bytes(path.read_bytes())
            raise
        assert time.process_time() - start < 20, "one that keeps it busy"
    print(f"{loads} of {count} loaded")
    assert loads < count * 0.6
