"""Data sets: MNIST whole, damaged and missing; drawn digits; mixtures; larger images; batches and epochs."""

import gzip
import hashlib
import math
import os
import socket
import struct
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import datasets

from conftest import load_script  # puts common on the path

import common

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def load(dataset, folder="unused", split="train"):
    args = Namespace(dataset=dataset, data_dir=str(folder), channels=1, image_size=28, batch_size=4)
    return common.load_data(args, split)


def refusal(capsys, dataset, folder):
    """The one line with which it is refused."""
    with pytest.raises(SystemExit) as stop:
        load(dataset, folder)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


# ------------------------------------------------------------------------------------------ MNIST

def idx(array):
    """A file as MNIST's: magic number, sizes, bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def small_mnist():
    """30 training and 20 test images with their labels."""
    rng = np.random.default_rng(0)
    return {f"{split}-{kind}-ubyte": rng.integers(0, high, (count, *shape), np.uint8)
            for split, count in (("train", 30), ("t10k", 20))
            for kind, high, shape in (("images-idx3", 256, (28, 28)), ("labels-idx1", 10, ()))}


@pytest.fixture
def raw(tmp_path):
    """The folder that holds the four files, where --data-dir is tmp_path."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in small_mnist().items():
        (folder / name).write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read(raw, tmp_path, monkeypatch, capsys, packed):
    """Raw files, or .gz with the right checksum, which are unpacked."""
    if packed:
        resources = []
        for path in sorted(raw.iterdir()):
            content = gzip.compress(path.read_bytes())
            path.with_name(f"{path.name}.gz").write_bytes(content)
            path.unlink()
            resources.append((f"{path.name}.gz", hashlib.md5(content).hexdigest()))
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
    files = small_mnist()
    for dataset in ("auto", "mnist"):
        for split, name in (("train", "train"), ("test", "t10k")):
            data = load(dataset, tmp_path, split)
            assert data.name == "mnist" and data.samples.dtype == torch.uint8 and data.labels.dtype == torch.int64
            assert np.array_equal(data.samples[:, 0].numpy(), files[f"{name}-images-idx3-ubyte"])
            assert np.array_equal(data.labels.numpy(), files[f"{name}-labels-idx1-ubyte"])
    assert capsys.readouterr().out == ""


def test_fashion_mnist_has_a_folder_of_its_own(raw, tmp_path, capsys):
    assert "FashionMNIST" in refusal(capsys, "fashion-mnist", tmp_path)
    (tmp_path / "other").mkdir()
    raw.parent.rename(tmp_path / "other" / "FashionMNIST")
    data = load("fashion-mnist", tmp_path / "other")
    assert data.name == "fashion-mnist" and np.array_equal(data.samples[:, 0].numpy(), small_mnist()[IMAGES])


BAD_FILES = {  # what is done to which file
    "truncated": (IMAGES, lambda good: good[:-5]),
    "empty": (LABELS, lambda good: b""),
    "too long": (IMAGES, lambda good: good + b"x"),
    "a web page": (IMAGES, lambda good: b"<!DOCTYPE html><html>moved</html>"),
    "labels as images": (IMAGES, lambda good: idx(small_mnist()[LABELS])),
    "labels of other images": (LABELS, lambda good: idx(small_mnist()["t10k-labels-idx1-ubyte"])),
    "label 10": (LABELS, lambda good: good[:-1] + b"\x0a"),
    "images of another size": (IMAGES, lambda good: idx(np.zeros((30, 32, 32), np.uint8))),
    "missing": (LABELS, None),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_never_replaced(raw, tmp_path, capsys, case):
    """A damaged file is an error even for auto: digits in its place would be a silent substitution."""
    name, damage = BAD_FILES[case]
    content = (raw / name).read_bytes()
    (raw / name).unlink() if damage is None else (raw / name).write_bytes(damage(content))
    for dataset in ("auto", "mnist"):
        assert str(raw) in refusal(capsys, dataset, tmp_path)


def test_other_bad_files(raw, tmp_path, capsys):
    """A .gz with another checksum; a folder or a pipe in the place of a file."""
    (raw / IMAGES).rename(raw / f"{IMAGES}.gz")
    assert str(raw) in refusal(capsys, "auto", tmp_path)
    for replace in (os.mkdir, os.mkfifo):
        replace(raw / IMAGES)
        assert str(raw) in refusal(capsys, "auto", tmp_path)
        (raw / IMAGES).rename(raw / replace.__name__)


def test_auto_says_that_it_trains_on_digits(tmp_path, capsys, few_digits):
    assert load("auto", tmp_path).name == "digits"
    out, err = capsys.readouterr()
    line, = out.splitlines()
    assert err == "" and "digits" in line and "Connection refused" in line, "why"
    assert str(tmp_path / "MNIST" / "raw") in line and datasets.MNIST.mirrors[0] in line, "how to get MNIST"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert str(tmp_path) in refusal(capsys, "mnist", tmp_path), "by its name it is never replaced"


@pytest.mark.slow
def test_a_silent_server_is_given_up(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        assert "timed out" in refusal(capsys, "mnist", tmp_path)


# ----------------------------------------------------------------------------------- drawn digits

def test_digits_are_always_the_same():
    """Whatever the random numbers of the training, which they leave alone."""
    before, random = common.draw_digits("test"), torch.get_rng_state()
    after = common.draw_digits.__wrapped__("test")  # not from its cache
    assert all(map(torch.equal, before, after)) and torch.equal(torch.get_rng_state(), random)


def test_digits_are_varied_and_readable():
    """No two alike, black background and full white; a linear classifier learns them: the labels are right."""
    (train, train_labels), (test, test_labels) = common.draw_digits("train"), common.draw_digits("test")
    assert train.shape == (60_000, 1, 28, 28) and test.shape == (10_000, 1, 28, 28) and train.dtype == torch.uint8
    assert train_labels.bincount().tolist() == [6000] * 10
    assert len({image.tobytes() for image in (*train.numpy(), *test.numpy())}) == 70_000
    assert (test[:, 0, 0, 0] == 0).float().mean() > 0.99 and (test.amax((1, 2, 3)) == 255).float().mean() > 0.9
    assert 0.08 < test.float().mean() / 255 < 0.18  # MNIST: 0.13
    features = train[:10_000].flatten(1).double() / 255
    one_hot = nn.functional.one_hot(train_labels[:10_000]).double()
    weights = torch.linalg.solve(features.T @ features + torch.eye(784), features.T @ one_hot)
    read = (test.flatten(1).double() / 255 @ weights).argmax(1)
    assert (read == test_labels).double().mean() > 0.8


def test_every_font_draws_every_digit():
    glyphs = common.draw_glyphs()
    assert glyphs.shape == (10, len(common.FONTS), 1, 64, 64)
    assert glyphs.flatten(2).mean(2).min() > 0.02
    assert len(glyphs.flatten(0, 1).flatten(1).unique(dim=0)) == 10 * len(common.FONTS)
    assert glyphs[:, :, 0, :3].max() == 0 and glyphs[:, :, 0, -3:].max() == 0, "a glyph is cut off"


# --------------------------------------------------------------------------------------- mixtures

FOUR, FIVE = (0.5, -0.5), (-1, -0.5, 0, 0.5, 1)
CENTRES = {  # closed forms: 実装例3's halved; PacGAN's ring, and its grid at a quarter of the size
    "gaussians": ([(x, y) for x in FOUR for y in FOUR] + [(1, 0), (-1, 0), (0, 1), (0, -1)], 0.05, 60_000),
    "ring": ([(math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)) for turn in range(8)], 0.01, 100_000),
    "grid": ([(x, y) for x in FIVE for y in FIVE], 0.05 / 4, 100_000),
}


@pytest.mark.parametrize("name", CENTRES)
def test_mixtures(name):
    """Gaussians around the centres of the papers, each as often as chance allows."""
    expected, sigma, count = CENTRES[name]
    data, test = load(name), load(name, split="test")
    assert data.samples.shape == (count, 2) and test.samples.shape == (10_000, 2)
    means = torch.stack([data.samples[data.labels == mode].mean(0) for mode in range(len(expected))])
    distances = torch.cdist(means, torch.tensor(expected, dtype=torch.float))
    assert distances.min(1).values.max() < 0.1 * sigma and distances.min(0).values.max() < 0.1 * sigma
    offsets = (data.samples - means[data.labels]) / sigma
    assert (offsets.std(0) - 1).abs().max() < 0.02 and offsets.T.corrcoef()[0, 1].abs() < 0.02
    shares = data.labels.bincount() * len(expected) / count
    assert shares.min() > 0.9 and shares.max() < 1.1


# ------------------------------------------------------------------ larger images, batches, epochs

@pytest.mark.parametrize("size, channels", [(28, 1), (28, 3), (32, 1), (64, 1), (128, 3)])
def test_images_for_larger_networks(size, channels):
    """A black margin up to 32x32, then bilinear interpolation, as Pillow computes it, rounded to 8 bits; -1 to 1."""
    images = torch.randint(256, (9, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = common.Data("test", images, torch.arange(9), (channels, size, size), 4)
    index = torch.tensor([5, 0, 8])
    margin = 2 if size > 28 else 0
    padded = np.pad(images[index, 0].numpy(), ((0, 0), (margin, margin), (margin, margin))).astype(np.float32)
    expected = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in padded]
    expected = torch.from_numpy(np.stack(expected).round() / 127.5 - 1)[:, None].expand(-1, channels, -1, -1)
    torch.testing.assert_close(data.scaled(index), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [8, 10])
def test_batches(count):
    """A pass gives each sample once at most, scaled, with its label; the next one has another order."""
    torch.manual_seed(0)
    samples = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, 28, 28)
    data, passes = common.Data("test", samples, torch.arange(count), (1, 28, 28), 4), []
    for _ in range(20):
        batches = [next(data), next(data)]
        for images, labels in batches:
            assert images.shape == (4, 1, 28, 28) and images.dtype == torch.float32
            torch.testing.assert_close(images[:, 0, 0, 0], labels / 127.5 - 1)
        passes.append(tuple(torch.cat([labels for _, labels in batches]).tolist()))
    assert all(len(set(order)) == 8 for order in passes) and len(set(passes)) == 20


def test_each_epoch_has_a_new_order(monkeypatch, tmp_path):
    """Within an epoch no sample comes twice: after one that --max-batches cut short the old order does not go on."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 28, 28)
    monkeypatch.setattr(common, "draw_digits", lambda split: (images, torch.arange(50) % 10))
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    module, seen = load_script("01_vanilla_gan"), []
    step = module.discriminator_step

    def watch(generator, discriminator, optimizer, real, *rest):
        seen.extend(((real[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
        return step(generator, discriminator, optimizer, real, *rest)

    monkeypatch.setattr(module, "discriminator_step", watch)
    module.main(["--dataset", "digits", "--epochs", "6", "--batch-size", "16", "--max-batches", "2",
                 "--eval-interval", "0", "--sample-interval", "9", "--device", "cpu",
                 "--output-dir", str(tmp_path)])
    epochs = [seen[start:start + 32] for start in range(0, len(seen), 32)]
    assert len(epochs) == 6 and all(len(set(epoch)) == 32 for epoch in epochs)
