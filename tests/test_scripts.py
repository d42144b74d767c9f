"""Each script as a user runs it: what it prints and writes, that a seed repeats, that sampling disturbs nothing."""

import contextlib
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from conftest import ROOT, SCRIPTS, load_script  # puts common on the path

import common

QUICK = ["--dataset", "digits", "--epochs", "2", "--max-batches", "2", "--batch-size", "8", "--device", "cpu",
         "--eval-interval", "0"]
FUSED = {"03_wgan_gp", "04_cgan", "06_stylegan_blocks"}
THIN = {"06_stylegan_blocks": ["--width", "32", "--latent-dim", "8"]}  # for speed


@pytest.fixture(scope="module", autouse=True)
def quick_digits():
    """60,000 images in no time; test_data.py looks at the real ones."""
    images = torch.arange(256, dtype=torch.uint8).repeat(60_000 * 784 // 256).view(60_000, 1, 28, 28)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "draw_digits", lambda split: (images, torch.arange(60_000) % 10))
        yield


@pytest.fixture(scope="module", params=[*((script, "digits") for script in SCRIPTS), ("03_wgan_gp", "gaussians")],
                ids=lambda case: f"{case[0]}-{case[1]}")
def finished(request, tmp_path_factory):
    """A script, a data set, the folder of their run, its output. Curves are drawn for points only: they take long."""
    script, dataset = request.param
    parent, printed, errors = tmp_path_factory.mktemp("runs"), io.StringIO(), io.StringIO()
    arguments = [*QUICK, "--dataset", dataset, *THIN.get(script, []), "--output-dir", str(parent)]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        if dataset == "digits":
            patch.setattr(Figure, "savefig", lambda figure, file, format: Image.new("L", (300, 300)).save(file, format))
        load_script(script).main(arguments)
    assert errors.getvalue() == "", "no progress bar where there is no terminal"
    return script, dataset, parent / f"{script}-{dataset}-0001", printed.getvalue().splitlines()


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_terminal(finished):
    script, dataset, folder, lines = finished
    assert len([line for line in lines if line.startswith("kernels")]) == (script in FUSED)
    assert re.match(rf"{script}, [\w-]+, seed 0$", lines[0])
    assert re.match(rf"device  cpu, \d+ threads, torch {re.escape(torch.__version__)}$", lines[1])
    assert lines[2] == f"data    {dataset}, 60000 samples, batch 8"
    assert f"output  {folder}: 2 epochs of 2 generator steps" in lines
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert len({len(line) for line in epochs}) == 1, "the columns are aligned"
    done = next(index for index, line in enumerate(lines) if line.startswith("done"))
    assert lines[done] == f"done    look at {folder / 'samples' / 'final.png'} and {folder / 'curves.png'}"
    assert re.match(rf"more    python \S*{script}.py --from", lines[done + 1])
    assert bool(lines[done + 2:]) == (script == "05_sn_label_smoothing"), "its table"


def test_log_and_options(finished):
    script, dataset, folder, lines = finished
    log = read_log(folder)
    assert [(row.pop("epoch"), row.pop("step")) for row in log] == [(1, 2), (2, 4)]
    for row, line in zip(log, [line for line in lines if line.startswith("epoch")], strict=True):
        assert row.pop("seconds") > 0 and len(row) >= 4 and all(map(math.isfinite, row.values()))
        assert re.findall(r"(\S+) +(-?\d+\.\d{4})", line) == [(name, f"{value:.4f}") for name, value in row.items()]
    options = json.loads((folder / "options.json").read_text())
    assert options == {**options, "dataset": dataset, "epochs": 2, "script": script, "torch": torch.__version__}
    assert (options["kernels"] in ("fused", "reference")) == (script in FUSED), "those in use, not those asked for"


def test_pictures(finished):
    script, dataset, folder, _ = finished
    styles = ["style_mixing.png", "truncation.png", "noise.png"] * (script == "06_stylegan_blocks")
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {"real.png", "epoch_0000.png", "epoch_0001.png", "epoch_0002.png", "progress.gif", "final.png",
                     "interpolation.png", "latent_walk.png", *styles}
    assert {path.name for path in folder.iterdir()} == {"options.json", "log.jsonl", "checkpoint.pt", "curves.png",
                                                        "samples"}
    assert all(len(np.unique(picture(folder / "samples" / name))) > 5 for name in names), "one shows nothing"
    epochs = [picture(folder / "samples" / f"epoch_000{epoch}.png") for epoch in range(3)]
    with Image.open(folder / "samples" / "progress.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert picture(folder / "curves.png").shape[0] > 200


def test_from_draws_what_the_training_drew(finished):
    """The seed fixes the latents: --generate with the run's seed repeats the last epoch's picture, bit for bit.

    But for 06, whose picture the training drew with its kernel: a pixel may be a level of grey apart.
    """
    script, dataset, folder, _ = finished
    before, samples = {path: path.read_bytes() for path in folder.rglob("*.*")}, folder / "samples"
    count = {"gaussians": 2500}.get(dataset, 80 if script == "04_cgan" else 64)
    draw = ["--device", "cpu", "--from", str(folder)]
    load_script(script).main([*draw, "--generate", str(count), "--interpolate"])
    drawn = picture(samples / f"generated-{count}-seed0.png")
    for name, trained in ((f"generated-{count}", "epoch_0002"), ("interpolation", "interpolation")):
        apart = picture(samples / f"{name}-seed0.png").astype(int) - picture(samples / f"{trained}.png")
        assert np.abs(apart).max() <= (script == "06_stylegan_blocks")
    load_script(script).main([*draw, "--generate", str(count), "--seed", "1"])
    assert not np.array_equal(drawn, picture(samples / f"generated-{count}-seed1.png"))
    for path in samples.glob("*-seed*.png"):
        path.unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_train_draw_and_go_on_on_a_gpu(script, tmp_path):
    module, folder = load_script(script), tmp_path / f"{script}-digits-0001"
    module.main([*QUICK, *THIN.get(script, []), "--device", "cuda", "--output-dir", str(tmp_path)])
    module.main(["--from", str(folder), "--device", "cuda", "--generate", "80" if script == "04_cgan" else "64"])
    drawn, = (folder / "samples").glob("generated-*.png")
    assert np.abs(picture(drawn).astype(int) - picture(folder / "samples" / "epoch_0002.png")).max() <= 2
    module.main(["--resume", str(folder), "--epochs", "3"])
    assert [row["epoch"] for row in read_log(folder)] == [1, 2, 3]


def test_a_film_of_many_epochs_is_in_order(tmp_path):
    epochs = [0, 2000, 9000, 10_000, 12_000]
    for epoch in epochs:
        Image.new("L", (8, 8), 20 + epoch // 100).save(tmp_path / f"epoch_{epoch:04d}.png")
    common.save_film(tmp_path, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        shades = [(film.seek(frame), film.convert("L").getpixel((0, 0)))[1] for frame in range(film.n_frames)]
    assert shades == [20 + epoch // 100 for epoch in epochs]


def test_grid_maps_minus_one_to_black_and_one_to_white(tmp_path):
    """The same scale in every picture, whatever is in it: epochs can be compared."""
    for values in ([-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-3.0, 0.5, 3.0]):
        common.save_picture(torch.tensor(values).view(3, 1, 1, 1).expand(3, 1, 28, 28), 3, tmp_path / "grid.png")
        shown = picture(tmp_path / "grid.png")[30, [30, 90, 150], 0]
        assert np.abs(shown - (np.clip(values, -1, 1) + 1) * 127.5).max() <= 1


@pytest.mark.parametrize("script, flags, expected", [
    ("01_vanilla_gan", "", [0.5, 0.5]), ("02_dcgan", "", [0.5, math.log(2)]), ("03_wgan_gp", "", [1]),
    ("05_sn_label_smoothing", "", [0.5, math.log(2), 1]),
    ("05_sn_label_smoothing", "--label-smoothing one-sided --spectral-norm off", [0.45, -math.log(0.45)]),
    ("06_stylegan_blocks", "", [0.5, 2 * math.log(2), math.log(2)])])
def test_curves_draw_the_equilibrium(train, monkeypatch, script, flags, expected):
    """The closed forms of 3.1: D = a / (a + b) where it is shown a for real and b for fake."""
    panels = []
    monkeypatch.setattr(common, "save_curves", lambda history, plots, path: panels.extend(plots))
    train(script, "--epochs", 1, "--max-batches", 1, *flags.split())
    assert [value for _, _, guides in panels for value in guides.values()] == pytest.approx(expected)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run a script in this process, without pictures; returns its log without `seconds`."""
    for place, name in ((common, "save_picture"), (common, "save_curves"), (common.Run, "_final_pictures")):
        monkeypatch.setattr(place, name, lambda *arguments, **options: None)

    def call(script, *flags):
        thin = ["--dataset", "gaussians"] if script == "05_sn_label_smoothing" else THIN.get(script, [])
        load_script(script).main([*QUICK, *thin, *map(str, flags), "--output-dir", str(tmp_path)])
        rows = read_log(max(tmp_path.iterdir()))  # the highest number
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_repeats(train, script, tmp_path):
    first = train(script)
    assert train(script, "--sample-interval", 2) == first, "sampling disturbs the training"
    assert train(script, "--seed", 1) != first
    assert [path.name[-4:] for path in sorted(tmp_path.iterdir())] == ["0001", "0002", "0003"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_optimizer_gets_its_settings(train, script, tmp_path):
    train(script, "--epochs", 1, "--max-batches", 1, "--lr-g", 0.003, "--lr-d", 0.007, "--beta1", 0.7)
    checkpoint = torch.load(max(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    groups = {name: part["param_groups"][0] for name, part in checkpoint.items() if name.startswith("optimizer")}
    beta2 = load_script(script).CONSTANTS[checkpoint["options"]["variant"]]["beta2"]
    assert all(tuple(group["betas"]) == (0.7, beta2) for group in groups.values())
    assert groups.pop("optimizer_g")["lr"] == 0.003 and [group["lr"] for group in groups.values()] == [0.007]


OWN = {"01_vanilla_gan": ["--variant two-logit", "--variant keras", "--generator-loss saturating", "--lr-decay 1"],
       "03_wgan_gp": ["--critic conv", "--gp-weight 1", "--n-critic 2"],
       "04_cgan": ["--gp-weight 1", "--n-critic 2"],
       "06_stylegan_blocks": ["--width 48", "--progressive off", "--style-mixing-prob 1", "--r1-weight 9"]}


@pytest.mark.parametrize("script", OWN)  # 05: test_training_techniques.py
def test_every_flag_changes_the_training(train, script):
    short = ["--epochs", 1, "--max-batches", 3]
    plain = train(script, *short)
    assert [flag for flag in OWN[script] if train(script, *short, *flag.split()) == plain] == []


def test_means_steps_and_seconds_of_an_epoch(tmp_path, monkeypatch):
    """Means by name; N // batch steps, or fewer with --max-batches; seconds without those of pictures and curves."""
    clock = [0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    for name in ("save_picture", "save_curves", "save_film"):
        monkeypatch.setattr(common, name, lambda *arguments, **options: clock.append(clock.pop() + 100))
    data = torch.zeros(10, 2), torch.zeros(10), ()
    monkeypatch.setattr(common, "load_data", lambda *_: common.Data("test", *data, 4))
    for limit, steps in [(None, 2), (5, 2), (1, 1)]:
        options = dict(script="00_test", variant="", batch_size=4, latent_dim=2, noise="normal", device="cpu",
                       eval_interval=0, kernels=None, max_batches=limit, output_dir=str(tmp_path))
        args = Namespace(**common.DEFAULTS | options)
        for args.epochs in (2, 3):  # the third after --resume
            run = common.Run(args, load_script("01_vanilla_gan").generate_noise, [], generator=torch.nn.Linear(2, 2))
            for batches in run.epochs():
                for index, _ in enumerate(run.steps()):
                    clock[0] += 1
                    next(batches)
                    for value in (1.0, 2.0, 6.0):
                        run.record({"thrice": torch.tensor(value)})
                    run.record({"once": torch.tensor(float(index))})
            args.resume = str(run.folder / "checkpoint.pt")
        assert read_log(run.folder) == [{"epoch": epoch, "step": epoch * steps, "seconds": steps, "thrice": 3,
                                         "once": (steps - 1) / 2} for epoch in (1, 2, 3)]


def test_intervals(train, tmp_path, monkeypatch):
    """Pictures as often as asked; checkpoints at the start, after each epoch's steps, at the end."""
    saved, drawn, save = [], [], common.Run.save
    monkeypatch.setattr(common.Run, "save", lambda run: (saved.append((run.epoch, run.step)), save(run)))
    monkeypatch.setattr(common, "save_picture", lambda samples, columns, path, **more: drawn.append(path.name))
    train("03_wgan_gp", "--epochs", 5, "--sample-interval", 2)
    assert [name for name in drawn if name.startswith("epoch")] == [f"epoch_000{epoch}.png" for epoch in (0, 2, 4, 5)]
    assert saved == [(0, 0), (0, 2), (1, 4), (2, 6), (3, 8), (4, 10), (5, 10)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_latents_are_not_made_of_the_numbers_of_the_weights(script):
    """A z that equals a row of the first layer is no sample of the prior: 06 drew broken digits from such z."""
    module = load_script(script)
    args = Namespace(**{"classes": 0, **next(iter(module.CONSTANTS.values()))}, seed=0, dataset="digits")
    torch.manual_seed(0)
    generator = module.Generator(args.latent_dim, *((32, 1, 64) if script == "06_stylegan_blocks" else ()))
    z = common.Pipeline(generator, module.generate_noise, args).noise(600)
    first = next(layer for layer in generator.modules() if isinstance(layer, torch.nn.Linear))
    weight = first.weight.detach()[:, -args.latent_dim:]
    likeness = torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(weight).T
    assert likeness.abs().max() < 6 / args.latent_dim**0.5


class Recorder(torch.nn.Module):
    """A generator that returns its latents as points, so that a test sees what the pipeline asks for."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return z


class Labelled(Recorder):
    """A conditional generator that paints its label, and the sign of its latent vector."""

    def forward(self, z, labels):
        return (labels / 10 + 0.05 * z[:, 0].sign()).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


@pytest.fixture
def drawn(monkeypatch):
    """(samples, columns) of each picture that would be saved."""
    pictures = []
    monkeypatch.setattr(common, "save_picture", lambda *arguments, **options: pictures.append(arguments[:2]))
    return pictures


def test_pipeline_walks_as_the_text_says(drawn, tmp_path):
    """Interpolation: (1 - t) z1 + t z2 in 10 steps. Exploration: base + (-3 ... 3) in one dimension only."""
    args = Namespace(latent_dim=6, classes=0, seed=3, noise="normal", dataset="digits", label=None)
    pipeline = common.Pipeline(Recorder(), load_script("02_dcgan").generate_noise, args)
    pipeline.interpolate(tmp_path)
    pipeline.explore([4] * 8, tmp_path)
    (lines, columns), (walk, _) = drawn
    assert columns == 10
    lines = lines.view(8, 10, 6)
    ends = pipeline.noise(16)
    torch.testing.assert_close(lines[:, 0], ends[:8])
    torch.testing.assert_close(lines[:, -1], ends[8:])
    torch.testing.assert_close(lines.diff(dim=1), (lines[:, -1:] - lines[:, :1]).expand(-1, 9, -1) / 9)
    walk, offsets = walk.view(8, 10, 6), torch.linspace(-3, 3, 10)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(walk[:, :, others], walk[:, :1, others].expand(-1, 10, -1))
    assert len(walk[:, 0].unique(dim=0)) == 8, "each row walks from another place"
    torch.testing.assert_close(walk[:, :, 4] - walk[:, :, 4].mean(1, keepdim=True), offsets.expand(8, -1))


@pytest.mark.parametrize("label", [None, 3])
def test_from_draws_the_class_that_was_asked_for(drawn, tmp_path, label):
    """--class K: that class in every cell of every picture; without it, row r is class r, each column one z."""
    torch.save({"options": {"script": "04_cgan"}, "generator": Labelled().state_dict()}, tmp_path / "checkpoint.pt")
    options = dict(run=str(tmp_path / "checkpoint.pt"), device="cpu", generate=24, interpolate=True, explore=2,
                   label=label, dataset="digits", latent_dim=6, classes=10)
    args = Namespace(**common.DEFAULTS | options)
    common.sample(args, Labelled(), load_script("04_cgan").generate_noise)
    assert [columns for _, columns in drawn] == [3 if label is None else 5, 10, 10], "full columns of 10 classes"
    for samples, columns in drawn:
        shown = (samples[:, 0, 0, 0] * 10).view(-1, columns if label is None else len(samples))
        expected = torch.arange(10)[:, None].expand_as(shown) if label is None else torch.full_like(shown, label)
        torch.testing.assert_close(shown, expected.float(), atol=0.51, rtol=0)
    if label is None:
        signs = drawn[0][0][:, 0, 0, 0].view(10, 3) - torch.arange(10)[:, None] / 10
        torch.testing.assert_close(signs, signs[:1].expand(10, -1))


def test_progress_bar_on_a_terminal(tmp_path):
    """It shows rate and time left."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows, columns
    flags = ["--dataset", "gaussians", "--max-batches", "2", "--epochs", "4", "--output-dir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "03_wgan_gp.py", *flags], cwd=ROOT, stderr=theirs,
                               stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # when it has ended
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"\d+%\|.*?[1-8]/8 \[\d\d:\d\d<[\d:]+, +[\d.]+(?:step/s|s/step)", shown)
