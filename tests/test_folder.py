"""Larger and own images: --dataset folder, --image-size, --channels."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from conftest import load_script


def paint(path, size=(40, 40), mode="RGB", seed=0, **settings):
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(path, **settings)
    return np.asarray(image.convert("RGB"))


def load(folder, size=28, channels=1):
    return common.load_data("folder", folder, image_size=size, channels=channels)


def test_flat_folder(tmp_path):
    """Images of the right size arrive pixel by pixel, in the order of their names, whatever their format."""
    pixels = [paint(tmp_path / name, (64, 64), seed=seed) for seed, name in enumerate(["a.png", "b.PNG", "c.bmp", "d.tiff"])]
    (tmp_path / "notes.txt").write_text("no image")
    data = load(tmp_path, 64, 3)
    assert data.samples.shape == (4, 3, 64, 64) and data.samples.dtype == torch.uint8 and data.samples.is_contiguous()
    assert torch.equal(data.samples.permute(0, 2, 3, 1), torch.from_numpy(np.stack(pixels)))
    assert data.labels.tolist() == [0] * 4 and data.name == "folder"
    assert data.scaled(torch.arange(4)).abs().max() <= 1


def test_subfolders(tmp_path):
    """Images at any depth, in the order of their paths."""
    pixels = [paint(tmp_path / name, (28, 28), seed=seed) for seed, name in enumerate(["ants/9.bmp", "cats/1.png", "cats/old/2.png"])]
    assert torch.equal(load(tmp_path, 28, 3).samples.permute(0, 2, 3, 1), torch.from_numpy(np.stack(pixels)))


def test_grey_and_colour(tmp_path):
    """Channels 1: the luminance 0.299 R + 0.587 G + 0.114 B; grey and palette images fit into both."""
    pixels = paint(tmp_path / "a.png", (28, 28))
    grey = load(tmp_path, 28, 1).samples[0, 0].numpy()
    assert np.abs(pixels @ [0.299, 0.587, 0.114] - grey).max() < 1
    paint(tmp_path / "b.png", mode="L"), paint(tmp_path / "c.png", mode="P"), paint(tmp_path / "d.png", mode="RGBA")
    assert load(tmp_path, 28, 1).samples.shape == (4, 1, 28, 28)
    colour = load(tmp_path, 28, 3).samples
    assert colour.shape == (4, 3, 28, 28) and torch.equal(colour[1, 0], colour[1, 1])


def test_sixteen_bits_and_transparency(tmp_path):
    """16-bit grey keeps its range; transparent pixels are white, whatever colour lies below them."""
    Image.fromarray(np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)).save(tmp_path / "a.png")
    layer = np.zeros((28, 28, 4), np.uint8)
    layer[:, 14:] = [255, 0, 0, 255]
    Image.fromarray(layer).save(tmp_path / "b.png")
    deep, clear = load(tmp_path, 28, 3).samples
    assert torch.equal(deep[0].flatten(), torch.linspace(0, 65535, 28 * 28).int().div(256, rounding_mode="floor").byte())
    assert (clear[:, :, :14] == 255).all() and clear[:, :, 14:].amin((1, 2)).tolist() == [255, 0, 0]


def test_the_centred_square_is_taken(tmp_path):
    """A wide image loses its sides, a tall one its ends; nothing is stretched."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "b.png")
    assert (load(tmp_path, 32).samples == 255).all()


def test_upright_as_the_camera_says(tmp_path):
    image = Image.new("L", (32, 32))
    image.paste(255, (0, 0, 32, 8))                        # a bar at the top
    exif = image.getexif()
    exif[0x0112] = 3                                       # orientation: upside down
    image.save(tmp_path / "a.png", exif=exif)
    sample = load(tmp_path, 32).samples[0, 0]
    assert (sample[-8:] == 255).all() and (sample[:-8] == 0).all()


def test_unreadable_files_are_named_once_and_left_out(tmp_path, capsys):
    kept = [paint(tmp_path / name, (28, 28), seed=seed) for seed, name in enumerate(["a.png", "z.png"])]
    paint(tmp_path / "x" / "cut.png")
    content = (tmp_path / "x" / "cut.png").read_bytes()
    (tmp_path / "x" / "cut.png").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.png").write_text("<html>")
    for name, values in [("float.tiff", np.float32([[0, 1]])), ("long.tiff", np.int32([[0, 65536]]))]:
        Image.fromarray(values).save(tmp_path / name)       # what is white in it?
    data = load(tmp_path, 28, 3)
    assert torch.equal(data.samples.permute(0, 2, 3, 1), torch.from_numpy(np.stack(kept)))
    line, = capsys.readouterr().out.splitlines()
    assert line == f"data    5 unreadable files left out: empty.jpg, float.tiff, long.tiff, page.png, {Path('x', 'cut.png')}"
    assert len(data.labels) == 2


def test_only_regular_files_are_read(tmp_path, capsys):
    """A pipe or a device might be read without end; a link to a file is as good as the file."""
    paint(tmp_path / "elsewhere", format="PNG")
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to("nowhere")
    (tmp_path / "e.png").mkdir()
    assert len(load(tmp_path).samples) == 1
    line, = capsys.readouterr().out.splitlines()
    assert line == "data    3 unreadable files left out: a.png, c.png, d.png"


def test_folders_that_cannot_be_listed_are_named_too(tmp_path, capsys, monkeypatch):
    paint(tmp_path / "a" / "1.png"), paint(tmp_path / "b" / "2.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root could list any
    assert len(load(tmp_path).samples) == 1
    assert capsys.readouterr().out == "data    1 unreadable files left out: a\n"


def test_refusals(tmp_path, capsys, monkeypatch):
    def refused(folder, message):
        with pytest.raises(SystemExit) as stop:
            load(folder)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

    refused(tmp_path, "no image (.jpg .jpeg .png")
    refused(tmp_path / "missing", "missing' (No such file or directory); name your folder with --data-dir")
    refused("", "in '' (No such file or directory)")       # not the current folder
    (tmp_path / "bad.png").write_bytes(b"x")
    refused(tmp_path, "none of the 1 images in")
    paint(tmp_path / "good.png")
    monkeypatch.setattr(common, "free_memory", lambda: 2 * 28 * 28 - 1)
    monkeypatch.setattr(Image, "open", None)               # refused before anything is read
    refused(tmp_path, "2 images of 28x28 with 1 channels take 0.0 GiB")


def test_memory_is_checked_for_enlarged_digits_too(monkeypatch, capsys):
    monkeypatch.setattr(common, "free_memory", lambda: 60_000 * 128 * 128 * 3 - 1)
    with pytest.raises(SystemExit):
        common.load_data("digits", "", image_size=128, channels=3)
    assert "60000 images of 128x128 with 3 channels take 2.7 GiB of memory, 2.7 GiB are free" in capsys.readouterr().err


def test_free_memory_is_what_the_system_says():
    free = common.free_memory()
    assert 2**26 < free
    with open("/proc/meminfo") as file:
        found = int(re.search(r"MemAvailable: +(\d+) kB", file.read())[1]) * 1024
    assert abs(free - found) < 0.2 * found


@pytest.mark.parametrize("size, channels", [(32, 1), (64, 1), (128, 3), (28, 3)])
def test_digits_are_enlarged(size, channels):
    """A margin up to 32x32, then whole multiples; the strokes keep their share of the picture."""
    images, _ = digits_of(200)
    large = common.enlarge(images, size, channels, "cpu")
    assert large.shape == (200, channels, size, size) and large.dtype == torch.uint8
    assert torch.equal(large[:, 0], large[:, -1])
    padded = images if size == 28 else F.pad(images, (2, 2, 2, 2))
    if size == padded.size(3):
        assert torch.equal(large[:, :1], padded)
    else:
        back = F.avg_pool2d(large[:, :1].float(), size // 32)
        assert (back - padded).abs().mean() < 6 and back.mean() == pytest.approx(padded.float().mean().item(), rel=0.02)


def digits_of(count):
    images, labels = common.draw_digits("test")
    return images[:count], labels[:count]


@pytest.mark.parametrize("script, flags, size, channels", [
    pytest.param("02_dcgan", ["--image-size", "64", "--channels", "3"], 64, 3, marks=pytest.mark.slow),
    ("02_dcgan", [], 28, 1),
    ("06_stylegan_blocks", ["--image-size", "64", "--channels", "3", "--width", "32", "--latent-dim", "8"], 64, 3),
    pytest.param("06_stylegan_blocks", ["--image-size", "128", "--width", "32", "--latent-dim", "8"], 128, 1, marks=pytest.mark.slow)])
def test_end_to_end(tmp_path, capsys, monkeypatch, script, flags, size, channels):
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)  # for speed
    for seed in range(9):
        paint(tmp_path / "images" / f"{seed % 2}" / f"{seed}.png", (70, 90), seed=seed)
    (tmp_path / "images" / "bad.png").write_bytes(b"x")
    module = load_script(script)
    module.main(["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--epochs", "2", "--max-batches", "2",
                 "--batch-size", "4", "--device", "cpu", *flags, "--output-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "data    1 unreadable files left out: bad.png" in lines
    assert f"data    folder, 9 samples of [{channels}, {size}, {size}], batch 4" in lines
    folder = tmp_path / f"{script}-folder-0001"
    options = json.loads((folder / "options.json").read_text())
    assert (options["image_size"], options["channels"]) == (size, channels)
    with Image.open(folder / "samples" / "real.png") as image:
        cell = size * max(1, 64 // size) + 4
        assert image.size[0] == 8 * cell + 4
        assert (np.ptp(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=1).max() > 20) == (channels == 3)
    module.main(["--from", str(folder), "--generate", "4"])
    with Image.open(folder / "samples" / "generated-4-seed0.png") as image:
        assert image.size == (2 * cell + 4, 2 * cell + 4)
