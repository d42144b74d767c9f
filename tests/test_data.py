"""The data sets: readers on good and bad files, the probe and download, the digits, the Gaussians."""

import gzip
import hashlib
import http.server
import os
import random
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import common

FILES = {"train-images-idx3-ubyte": 3, "train-labels-idx1-ubyte": 1, "t10k-images-idx3-ubyte": 3, "t10k-labels-idx1-ubyte": 1}


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def contents(seed=0):
    """The four files of a small MNIST: 30 training and 20 test images."""
    rng = np.random.default_rng(seed)
    return {name: idx(rng.integers(0, 256, (size, 28, 28), np.uint8) if dims == 3 else rng.integers(0, 10, size, np.uint8))
            for (name, dims), size in zip(FILES.items(), (30, 30, 20, 20))}


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in contents().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reader_agrees_with_torchvision(raw, tmp_path, zipped, split):
    expected = torchvision.datasets.MNIST(tmp_path, train=split == "train")
    if zipped:
        for name in FILES:
            (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
            (raw / name).unlink()
    data = common.load_data("mnist", tmp_path, split)
    assert data.samples.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert torch.equal(data.samples[:, 0], expected.data) and torch.equal(data.labels, expected.targets)
    assert common.load_data("auto", tmp_path, split).name == "mnist"


def test_fashion_mnist_has_a_folder_of_its_own(raw, tmp_path, capsys):
    with pytest.raises(SystemExit):
        common.load_data("fashion-mnist", tmp_path)
    raw.parent.rename(tmp_path / "FashionMNIST")
    assert common.load_data("fashion-mnist", tmp_path).name == "fashion-mnist"


def test_no_room_for_unpacking_is_no_damage(raw, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert " cannot be written (" in expect_failure(capsys, "No space left on device", lambda: common.load_data("mnist", tmp_path))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BAD_FILES = {  # what is done to which file -> what the line must say beside its name
    "truncated": (IMAGES, lambda good: good[:-5], "23515"),
    "header only in part": (LABELS, lambda good: good[:6], ""),
    "empty": (LABELS, lambda good: b"", ""),
    "too long": (IMAGES, lambda good: good + b"x", "23521"),
    "a web page": (IMAGES, lambda good: b"<!DOCTYPE html><html>moved</html>", ""),
    "labels as images": (IMAGES, lambda good: contents()[LABELS], "should have 3 dimension"),
    "images as labels": (LABELS, lambda good: contents()[IMAGES], "should have 1 dimension"),
    "missing": (LABELS, None, "No such file"),
}
BAD_PAIRS = {
    "other labels": (LABELS, lambda good: contents()["t10k-labels-idx1-ubyte"], "images [30, 28, 28] and labels [20]"),
    "label 10": (LABELS, lambda good: good[:-1] + b"\x0a", "up to 10, expected one label from 0 to 9"),
    "other size": (IMAGES, lambda good: idx(np.zeros((30, 32, 32), np.uint8)), "images [30, 32, 32] and labels [30]"),
}


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
@pytest.mark.parametrize("case", BAD_FILES | BAD_PAIRS)
def test_bad_files_are_named(raw, tmp_path, capsys, dataset, case):
    """A damaged file is an error even for auto: other data in its place would be a silent substitution."""
    name, damage, message = (BAD_FILES | BAD_PAIRS)[case]
    folder = str(raw / name) if case in BAD_FILES else f"{raw}: its train files hold"
    if damage is None:
        (raw / name).unlink()
    else:
        (raw / name).write_bytes(damage((raw / name).read_bytes()))
    assert folder in expect_failure(capsys, message, lambda: common.load_data(dataset, tmp_path))


@pytest.mark.parametrize("damage, message", [
    (lambda good: good[:-20], "end-of-stream marker"),
    (lambda good: good[:200] + bytes([good[200] ^ 255]) + good[201:], "error:"),
    (lambda good: good[:-8] + b"\0\0\0\0" + good[-4:], "CRC check failed"),
    (lambda good: b"not gzip", "Not a gzipped file")])
def test_bad_gzip_is_named(raw, tmp_path, capsys, damage, message):
    (raw / IMAGES).unlink()
    (raw / f"{IMAGES}.gz").write_bytes(damage(gzip.compress(contents()[IMAGES])))
    expect_failure(capsys, message, lambda: common.load_data("mnist", tmp_path))


@pytest.mark.parametrize("name", [IMAGES, f"{LABELS}.gz"])
@pytest.mark.parametrize("replace, message", [
    (os.mkfifo, "not a regular file"),
    (os.mkdir, "not a regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error")])  # to read it is an error even for root
def test_only_regular_files_are_read(raw, tmp_path, capsys, name, replace, message):
    (raw / name.removesuffix(".gz")).unlink()
    replace(raw / name)
    assert f"{raw / name} is missing" in expect_failure(capsys, message, lambda: common.load_data("auto", tmp_path))


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_small_gz_that_unpacks_to_much_more(raw, tmp_path, monkeypatch, capsys, name):
    """No more is unpacked than MNIST has, and a byte to see that there is more."""
    unpacked = {}

    class Counted(gzip.GzipFile):
        def read(self, *size):
            content = super().read(*size)
            unpacked[Path(self.name).name] = self.tell()
            return content

    (raw / f"{name}.gz").write_bytes(gzip.compress(contents()[name] + bytes(2**26), 1))
    (raw / name).unlink()
    monkeypatch.setattr(gzip, "open", Counted)
    expect_failure(capsys, f"{name}.gz is missing, damaged", lambda: common.load_data("mnist", tmp_path))
    assert unpacked == {f"{name}.gz": 60_000 * (28 * 28 if name == IMAGES else 1) + 17}


def unlistable(folder):
    """Links in a circle, which even root cannot list."""
    folder.symlink_to(folder)
    return folder


BAD_FOLDERS = {  # a folder for --data-dir -> why it cannot be used
    "a file": (lambda path: path.touch() or path, "Not a directory"),
    "not to be listed": (unlistable, "Too many levels of symbolic links"),
    "too long": (lambda path: path.with_name("x" * 300), "File name too long"),
}


@pytest.mark.parametrize("dataset", ["auto", "mnist", "folder"])
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named(tmp_path, capsys, dataset, case):
    make, message = BAD_FOLDERS[case]
    folder = make(tmp_path / "data")
    line = expect_failure(capsys, f"({message}); name ", lambda: common.load_data(dataset, folder))
    assert str(folder) in line and "--data-dir" in line


def mutant(rng, content, dimensions):
    """An IDX file of that many dimensions, raw or packed, with a random fault."""
    content = bytearray(content)
    fault, packed = rng.choice(["bytes", "cut", "longer", "header", "size"]), rng.choice([None, "before", "after"])
    if packed == "after":  # the fault is in the .gz
        content = bytearray(gzip.compress(content, 1))
    if fault == "bytes":
        for _ in range(rng.choice([1, 10, 100])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif fault == "cut":
        del content[rng.choice([rng.randrange(len(content)), rng.randrange(20)]):]
    elif fault == "longer":
        content += rng.choice([bytes(rng.randrange(1, 2000)), rng.randbytes(784), bytes(content), content * 9])
    elif fault == "header":
        content[rng.randrange(4 + 4 * dimensions)] = rng.choice([0, 1, 8, 13, 127, 255, rng.randrange(256)])
    else:
        sizes = rng.choices([0, 1, 10, 28, 300, 784, 60_000, 2**31, 2**32 - 1], k=rng.randrange(1, 5))
        content[:4 + 4 * dimensions] = struct.pack(f">{1 + len(sizes)}I", 0x800 + len(sizes), *sizes)
    return gzip.compress(content, 1) if packed == "before" else bytes(content), bool(packed)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_sound(tmp_path, capsys, count):
    """Each gives one line or a data set that can be trained on."""
    folder, rng, refused = tmp_path / "MNIST" / "raw", random.Random(count), 0
    folder.mkdir(parents=True)
    good = {IMAGES: idx(np.tile(np.arange(28, dtype=np.uint8), (300, 28, 1))),
            LABELS: idx(np.arange(300, dtype=np.uint8) % 10)}
    for _ in range(count):
        name = rng.choice([IMAGES, LABELS])
        content, packed = mutant(rng, good[name], FILES[name])
        (folder / IMAGES).write_bytes(good[IMAGES])
        (folder / LABELS).write_bytes(good[LABELS])
        (folder / name).unlink()
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(content)
        try:
            images, labels = common.load_data("mnist", tmp_path)[1:]
        except SystemExit as stop:
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            refused += 1
        else:
            assert images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28) and len(images) == len(labels) > 0
            assert labels.dtype == torch.int64 and 0 <= labels.min() and labels.max() <= 9
        path.unlink()
    assert 0.5 * count < refused < count


def expect_failure(capsys, message, action):
    with pytest.raises(SystemExit) as stop:
        action()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    return lines[0]


def test_auto_says_that_it_trains_on_digits(tmp_path, capsys):
    assert common.load_data("auto", tmp_path).name == "digits"
    line, = capsys.readouterr().out.splitlines()
    assert "no download server answered within 3 s" in line and str(tmp_path / "MNIST" / "raw") in line
    assert torchvision.datasets.MNIST.mirrors[0] in line, "how to get MNIST"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_named_data_set_is_never_replaced(tmp_path, capsys, name):
    expect_failure(capsys, f"--dataset {name}: it is not in", lambda: common.load_data(name, tmp_path))


def test_a_silent_server_is_given_up(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        expect_failure(capsys, "no download server answered", lambda: common.load_data("mnist", tmp_path))


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A download server on this machine with the small MNIST; returns the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    resources = []
    for name, content in contents().items():
        packed = gzip.compress(content)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{web.server_port}/"])
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        yield folder
        web.shutdown()
        thread.join()


def test_download(server, tmp_path, capsys):
    data = common.load_data("auto", tmp_path / "data")
    assert data.name == "mnist" and len(data.samples) == 30
    assert {path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*")} == {
        "MNIST", "MNIST/raw", *(f"MNIST/raw/{name}" for name in FILES)}
    assert common.load_data("mnist", tmp_path / "data", "test").labels.shape == (20,)


def test_a_failed_download_leaves_nothing_behind(server, tmp_path, capsys):
    with open(server / f"{LABELS}.gz", "ab") as file:
        file.write(b"noise")
    assert common.load_data("auto", tmp_path / "data").name == "digits"
    line, = [line for line in capsys.readouterr().out.splitlines() if "the download failed" in line]
    assert "raining on digits" in line
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_a_silent_mirror_does_not_hide_another(server, tmp_path, monkeypatch):
    """Nor does an existing, empty folder stand in the way of the download."""
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirrors = [f"http://127.0.0.1:{silent.getsockname()[1]}/", *torchvision.datasets.MNIST.mirrors]
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
        assert common.load_data("mnist", tmp_path / "data").name == "mnist"


def test_digits_are_always_the_same():
    images, labels = common.draw_digits("train")
    again, labels_again = common.draw_digits.__wrapped__("train")
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [6000] * 10


def test_digits_are_varied_and_readable():
    """No two alike, black background and full white; a linear classifier learns them: the labels are right."""
    (train, train_labels), (test, test_labels) = common.draw_digits("train"), common.draw_digits("test")
    assert test.shape == (10_000, 1, 28, 28)
    both = torch.cat([train, test]).flatten(1)
    assert len(both[:, ::3].unique(dim=0)) == 70_000
    assert (both[:, 0] == 0).float().mean() > 0.99 and (both.amax(1) == 255).float().mean() > 0.9
    assert 0.08 < both.float().mean() / 255 < 0.18           # MNIST: 0.13
    features = train.flatten(1).double() / 255
    one_hot = torch.nn.functional.one_hot(train_labels).double()
    weights = torch.linalg.solve(features.T @ features + torch.eye(784), features.T @ one_hot)
    accuracy = ((test.flatten(1).double() / 255 @ weights).argmax(1) == test_labels).double().mean()
    assert accuracy > 0.8


def test_every_font_draws_every_digit():
    glyphs = common.draw_glyphs()
    assert glyphs.shape == (10, len(common.FONTS), 1, 64, 64)
    assert glyphs.flatten(2).mean(2).min() > 0.02
    assert len(glyphs.flatten(0, 1).flatten(1).unique(dim=0)) == 10 * len(common.FONTS)
    assert glyphs[:, :, 0, :3].max() == 0 and glyphs[:, :, 0, -3:].max() == 0, "a glyph is cut off"


def test_gaussians():
    """Eight distinct centres, as many points each as chance allows, sigma 0.05 after halving."""
    data = common.load_data("gaussians", "unused")
    assert data.samples.shape == (60_000, 2)
    means = torch.stack([data.samples[data.labels == mode].mean(0) for mode in range(8)])
    expected = [[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5], [1, 0], [-1, 0], [0, 1], [0, -1]]
    torch.testing.assert_close(means, torch.tensor(expected), atol=0.004, rtol=0)
    spread = (data.samples - means[data.labels]).std()
    assert abs(spread - 0.05) < 0.001
    assert 7100 < torch.bincount(data.labels).min()


def test_batches():
    """A pass gives each sample once at most, scaled; the next one has another order, and leaves others out."""
    samples = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 28, 28) * 28
    data = common.Data("test", samples, torch.arange(10))
    torch.manual_seed(0)
    batches = data.batches(4)
    passes = [[next(batches) for _ in range(2)] for _ in range(20)]
    orders = [torch.cat([labels for _, labels in group]).tolist() for group in passes]
    assert all(len(set(order)) == 8 for order in orders) and len(set(map(tuple, orders))) == 20
    assert {label for order in orders for label in order} == set(range(10)), "none is left out for ever"
    halves = data.batches(5)
    assert all(sorted([*next(halves)[1].tolist(), *next(halves)[1].tolist()]) == list(range(10)) for _ in range(3))
    for images, labels in passes[0]:
        torch.testing.assert_close(images[:, 0, 0, 0], labels * 28 / 127.5 - 1)
        assert images.dtype == torch.float32 and images.shape == (4, 1, 28, 28)
    black_and_white = common.Data("test", torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.zeros(1))
    assert black_and_white.scaled(torch.tensor([0])).flatten().tolist() == [-1, 1]
