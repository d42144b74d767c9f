"""Damaged and foreign checkpoints: one line and exit code 2, or the checkpoint as it was; nothing in them is run."""

import io
import random

import pytest
import torch

from conftest import load_script  # puts common on the path

import common


def packed(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


GOOD = {"options": {"script": "03_wgan_gp", "latent_dim": 5}, "epoch": 1, "history": [{"epoch": 1, "W": 0.5}],
        "generator": {"0.weight": torch.arange(450.0).view(90, 5), "0.bias": torch.arange(90.0)}}


def of_bytes(good, rng):
    """A bit flipped, bytes cut off, overwritten."""
    content = bytearray(good)
    at = rng.randrange(len(content))
    match rng.randrange(3):
        case 0:
            content[at] ^= 1 << rng.randrange(8)
        case 1:
            del content[at:]
        case 2:
            content[at:at + 50] = rng.randbytes(50)
    return bytes(content)


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_bytes_that_change_are_noticed(count, tmp_path, capsys):
    """What is not refused is what was saved: the change fell on what no reader looks at."""
    rng, path, refused = random.Random(count), tmp_path / "checkpoint.pt", 0
    path.write_bytes(packed(GOOD))
    whole = packed(common.load_checkpoint(path))
    for _ in range(count):
        path.write_bytes(of_bytes(packed(GOOD), rng))
        try:
            assert packed(common.load_checkpoint(path)) == whole
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1
            refused += 1
    assert refused > count / 2


class Intruder:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("flag", ["--from", "--resume"])
def test_foreign_files_are_refused_and_run_no_code(flag, tmp_path, capsys):
    foreign = {**GOOD, "epoch": Intruder(tmp_path / "written")}, {"weight": torch.zeros(2)}, [1, 2]
    for content in (b"", b"no checkpoint", packed(GOOD)[:1000], *map(packed, foreign)):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            load_script("03_wgan_gp").main([flag, str(tmp_path)])
        line, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and str(tmp_path / "checkpoint.pt") in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"], "nothing was run, nothing drawn"
