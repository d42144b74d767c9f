"""Images of your own: --dataset folder."""

import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from conftest import load_script  # puts common on the path

import common


def paint(path, size=(28, 28), mode="RGB", seed=0):
    """A smooth random picture; returns its pixels."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(path)
    return np.asarray(image.convert("RGB"))


def load(folder, size=28, channels=1):
    args = Namespace(dataset="folder", data_dir=str(folder), image_size=size, channels=channels, batch_size=1)
    return common.load_data(args)


def refusal(capsys, action):
    """The one line with which it is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        action()
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def test_images_arrive_pixel_by_pixel(tmp_path):
    """At any depth, in the order of their paths, whatever their format; what is no image is passed over."""
    names = ["a.png", "ants/9.bmp", "b.PNG", "cats/1.tiff", "cats/old/2.webp"]
    pixels = [paint(tmp_path / name, (64, 64), seed=seed) for seed, name in enumerate(names[:4])]
    paint(tmp_path / names[4], (64, 64), seed=4)  # its format changes the pixels
    (tmp_path / "notes.txt").write_text("no image")
    data = load(tmp_path, 64, 3)
    assert data.samples.shape == (5, 3, 64, 64) and data.samples.dtype == torch.uint8 and data.samples.is_contiguous()
    assert torch.equal(data.samples[:4].permute(0, 2, 3, 1), torch.from_numpy(np.stack(pixels)))
    assert data.labels.tolist() == [0] * 5 and data.name == "folder"
    expected = torch.from_numpy(pixels[2] / 127.5 - 1).float().permute(2, 0, 1)
    torch.testing.assert_close(data.scaled(torch.tensor([2]))[0], expected)


def test_grey_and_colour(tmp_path):
    """Channels 1: the luminance 0.299 R + 0.587 G + 0.114 B; grey and palette images fit into both."""
    pixels = paint(tmp_path / "a.png")
    for mode in ("L", "P", "RGBA"):
        paint(tmp_path / f"b{mode}.png", mode=mode)
    grey, colour = load(tmp_path, 28, 1).samples, load(tmp_path, 28, 3).samples
    assert grey.shape == (4, 1, 28, 28) and np.abs(pixels @ [0.299, 0.587, 0.114] - grey[0, 0].numpy()).max() < 1
    assert colour.shape == (4, 3, 28, 28) and torch.equal(colour[1, 0], colour[1, 1])


def test_sixteen_bits_and_transparency(tmp_path):
    """16-bit grey keeps its range; transparent pixels are white, whatever colour lies below them."""
    deep = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    Image.fromarray(deep).save(tmp_path / "a.png")
    layer = np.zeros((28, 28, 4), np.uint8)
    layer[:, 14:] = [255, 0, 0, 255]
    Image.fromarray(layer).save(tmp_path / "b.png")
    grey, clear = load(tmp_path, 28, 3).samples
    assert np.array_equal(grey[0].numpy(), deep // 256)
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
    image.paste(255, (0, 0, 32, 8))  # a bar at the top
    exif = image.getexif()
    exif[0x0112] = 3  # orientation: upside down
    image.save(tmp_path / "a.png", exif=exif)
    sample = load(tmp_path, 32).samples[0, 0]
    assert (sample[-8:] == 255).all() and (sample[:-8] == 0).all()


def test_what_cannot_be_read_is_left_out_by_reason(tmp_path, capsys):
    kept = [paint(tmp_path / name, seed=seed) for seed, name in enumerate(["a.png", "z.png"])]
    paint(tmp_path / "x" / "cut.png")
    content = (tmp_path / "x" / "cut.png").read_bytes()
    (tmp_path / "x" / "cut.png").write_bytes(content[:len(content) // 2])
    for index in range(7):
        (tmp_path / f"page{index}.png").write_text("<html>")
    for name, values in [("float.tiff", np.float32([[0, 1]])), ("long.tiff", np.int32([[0, 65536]])),
                         ("signed.tiff", np.int32([[-1000, 3000]])), ("twelve.png", np.uint16([[0, 4095]]))]:
        Image.fromarray(values).save(tmp_path / name)  # what is white in it?
    data = load(tmp_path, 28, 3)
    assert torch.equal(data.samples.permute(0, 2, 3, 1), torch.from_numpy(np.stack(kept))) and len(data.labels) == 2
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("data    2 of 14 pictures")
    ranges, pages = (next(line for line in others if word in line) for word in ("no known range", "cannot identify"))
    assert ranges.startswith("data    4 left out") and ranges.endswith("float.tiff, long.tiff, signed.tiff, twelve.png")
    assert pages.startswith("data    7 left out") and pages.endswith("page4.png, ...") and "page5" not in pages
    assert len(others) == 3 and any("cut.png" in line for line in others)


def test_only_regular_files_are_read(tmp_path, capsys):
    """A pipe or a device might be read without end; a link to a file is as good as the file."""
    paint(tmp_path / "good.png")
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to("nowhere")
    assert len(load(tmp_path).samples) == 2
    assert capsys.readouterr().out.splitlines()[1].endswith(": a.png, c.png, d.png")


def test_what_is_hidden_is_passed_over_and_linked_folders_are_followed_once(tmp_path, capsys):
    for name in ["a.png", ".b.png", "._c.png", ".ipynb_checkpoints/d.png", "@eaDir/e.png", "__MACOSX/f.png", "sub/g.png"]:
        paint(tmp_path / "here" / name)
    paint(tmp_path / "elsewhere" / "h.png")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "sub" / "up").symlink_to(tmp_path / "here")
    assert len(load(tmp_path / "here").samples) == 3
    assert "3 of 3 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("suffix, kind", [("jfif", "JPEG"), ("gif", None), ("jp2", "JPEG2000"), ("tga", None), ("avif", None)])
def test_every_kind_that_pillow_reads(tmp_path, suffix, kind):
    Image.init()
    if (kind or suffix.upper()) not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    Image.new("RGB", (40, 40), (200, 200, 200)).save(tmp_path / f"a.{suffix}", format=kind)
    assert abs(load(tmp_path).samples.float().mean().item() - 200) < 3


def test_prompts_in_the_metadata_and_large_scans(tmp_path, monkeypatch, recwarn):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", "x" * 2**21, zip=True)
    Image.new("L", (40, 40), 99).save(tmp_path / "a.png", pnginfo=info)
    Image.new("L", (10_000, 10_000), 99).save(tmp_path / "b.png")  # more than Pillow reads without a warning
    assert (load(tmp_path).samples == 99).all() and len(load(tmp_path).samples) == 2
    assert not [warning for warning in recwarn if "DecompressionBomb" in warning.category.__name__]


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "notes.txt"):
        line = refusal(capsys, lambda folder=folder: load(folder))
        assert str(folder) in line and "--data-dir" in line
    (tmp_path / "bad.png").write_bytes(b"x")
    assert str(tmp_path) in refusal(capsys, lambda: load(tmp_path))


@pytest.mark.parametrize("script, flags, size, channels", [
    ("02_dcgan", ["--channels", "3"], 28, 3),
    pytest.param("02_dcgan", ["--image-size", "64"], 64, 1, marks=pytest.mark.slow),
    pytest.param("06_stylegan_blocks", ["--image-size", "128", "--width", "32", "--latent-dim", "8"], 128, 1,
                 marks=pytest.mark.slow)])
def test_end_to_end(tmp_path, capsys, monkeypatch, script, flags, size, channels):
    """Trains, has no scores, and is drawn from."""
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)  # for speed
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    for seed in range(9):
        paint(tmp_path / "images" / f"{seed % 2}" / f"{seed}.png", (70, 90), seed=seed)
    (tmp_path / "images" / "bad.png").write_bytes(b"x")
    module = load_script(script)
    command = ["--dataset", "folder", "--data-dir", str(tmp_path / "images"), "--epochs", "1", "--max-batches", "2",
               "--batch-size", "4", "--device", "cpu", *flags, "--output-dir", str(tmp_path / "runs")]
    assert "no test images" in refusal(capsys, lambda: module.main([*command, "--eval-interval", "5"]))
    assert not (tmp_path / "runs").exists()
    module.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("data    9 of 10 pictures") for line in lines) and "data    folder, 9 samples, batch 4" in lines
    folder = tmp_path / "runs" / f"{script}-folder-0001"
    options = json.loads((folder / "options.json").read_text())
    assert (options["image_size"], options["channels"], options["samples"]) == (size, channels, 9)
    cell = size * max(1, 64 // size) + 4
    with Image.open(folder / "samples" / "real.png") as image:
        assert image.size[0] == 8 * cell + 4
        assert (np.ptp(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=1).max() > 20) == (channels == 3)
    module.main(["--from", str(folder), "--generate", "4", "--device", "cpu"])
    with Image.open(folder / "samples" / "generated-4-seed0.png") as image:
        assert image.size == (2 * cell + 4, 2 * cell + 4)
    assert "no test images" in refusal(capsys, lambda: module.main(["--from", str(folder), "--evaluate"]))
