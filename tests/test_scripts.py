"""Each script as a user runs it: what it prints, what it writes, that a seed repeats, that sampling disturbs nothing."""

import contextlib
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

import common
from conftest import ROOT, SCRIPTS, load_script, run_script, snapshot, unchanged

QUICK = ["--dataset", "digits", "--epochs", "2", "--max-batches", "3", "--batch-size", "16", "--device", "cpu", "--eval-interval", "0"]
QUANTITIES = {"01_vanilla_gan": ["D(x)", "D(G(z))", "acc_D", "loss_D", "acc_G", "loss_G"],
              "02_dcgan": ["D(x)", "D(G(z))", "loss_D", "loss_G"],
              "03_wgan_gp": ["W", "penalty", "grad_norm", "loss_C", "loss_G"],
              "04_cgan": ["W", "penalty", "grad_norm", "loss_C", "loss_G"],
              "05_sn_label_smoothing": ["D(x)", "D(G(z))", "loss_D", "loss_G", "sigma"],
              "06_stylegan_blocks": ["D(x)", "D(G(z))", "r1", "loss_D", "loss_G", "level"]}
FUSED = {"03_wgan_gp", "04_cgan", "06_stylegan_blocks"}
THIN = {"06_stylegan_blocks": ["--width", "32", "--latent-dim", "8"]}  # for speed
THINNER = {**THIN, "05_sn_label_smoothing": ["--dataset", "gaussians"]}
RUNS = [(script, "digits", []) for script in SCRIPTS] + [(script, "gaussians", ["--dataset", "gaussians"])
                                                         for script in ("01_vanilla_gan", "03_wgan_gp", "05_sn_label_smoothing")]
"""(script, data set, flags) of the runs that every output is checked on. The first is started as a user does."""


@pytest.fixture(scope="module", params=RUNS, ids=lambda case: f"{case[0]}-{case[1]}")
def finished(request, tmp_path_factory):
    script, dataset, flags = request.param
    parent, printed, errors = tmp_path_factory.mktemp("runs"), io.StringIO(), io.StringIO()
    arguments = [*QUICK, *THIN.get(script, []), *flags, "--output-dir", str(parent)]
    if request.param is RUNS[0]:
        process = run_script(script, *arguments)
        assert process.returncode == 0, process.stderr
    else:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            load_script(script).main(arguments)
        process = Namespace(stdout=printed.getvalue(), stderr=errors.getvalue())
    return script, dataset, parent / f"{script}-{dataset}-0001", process


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_terminal(finished):
    script, dataset, folder, process = finished
    kernels = [line for line in process.stdout.splitlines() if line.startswith("kernels")]
    assert [line for line in kernels if "compiling" not in line] == ["kernels fused, for cpu"] * (script in FUSED)
    lines = [line for line in process.stdout.splitlines() if line not in kernels]
    assert re.match(rf"{script}, [\w-]+, seed 0$", lines[0])
    assert re.match(rf"device  cpu, \d+ threads, torch {re.escape(torch.__version__)}$", lines[1])
    shape = [2] if dataset == "gaussians" else [1, 32, 32] if script == "06_stylegan_blocks" else [1, 28, 28]
    assert lines[2] == f"data    {dataset}, 60000 samples of {shape}, batch 16"
    assert lines[3] == f"output  {folder}: 2 epochs of 3 generator steps"
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:9] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert len({len(line) for line in epochs}) == 1, "the columns are aligned"
    assert re.findall(r"(\S+) +-?\d+\.\d{4}", epochs[0]) == QUANTITIES[script] and epochs[0].endswith(" s")
    done = next(index for index, line in enumerate(lines) if line.startswith("done"))
    assert lines[done] == f"done    look at {folder / 'samples' / 'final.png'} and {folder / 'curves.png'}"
    assert lines[done + 1] == f"more    python {script}.py --from {folder}"
    assert len(lines[done + 2:]) == (0 if script != "05_sn_label_smoothing" else 6 if dataset == "digits" else 5)   # its table
    assert process.stderr == ""


def test_a_film_of_many_epochs_is_in_order(tmp_path):
    epochs = [0, 2000, 9000, 10_000, 12_000]
    for epoch in epochs:
        Image.new("L", (8, 8), 20 + epoch // 100).save(tmp_path / f"epoch_{epoch:04d}.png")
    common.save_film(tmp_path, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        shades = [(film.seek(frame), film.convert("L").getpixel((0, 0)))[1] for frame in range(film.n_frames)]
    assert shades == [20 + epoch // 100 for epoch in epochs]


def test_log_and_options(finished):
    script, dataset, folder, process = finished
    log = read_log(folder)
    assert [row["epoch"] for row in log] == [1, 2] and [row["step"] for row in log] == [3, 6]
    for row, line in zip(log, [line for line in process.stdout.splitlines() if line.startswith("epoch")]):
        assert list(row) == ["epoch", "step", "seconds", *QUANTITIES[script], *["layers"] * (script == "05_sn_label_smoothing")]
        assert all(math.isfinite(row[name]) for name in QUANTITIES[script]) and row["seconds"] > 0
        for name in QUANTITIES[script]:
            assert f"{name} {row[name]:9.4f}" in line
    options = json.loads((folder / "options.json").read_text())
    assert options["dataset"] == dataset and options["epochs"] == 2 and options["script"] == script
    assert options["versions"]["torch"] == torch.__version__ and options["threads"] >= 1
    assert options.get("kernels") == ("fused" if script in FUSED else None), "those in use, not those asked for"


def test_pictures(finished):
    script, dataset, folder, _ = finished
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {"real.png", "epoch_0000.png", "epoch_0001.png", "epoch_0002.png", "progress.gif", "final.png",
                     "interpolation.png", "latent_walk.png",
                     *["style_mixing.png", "truncation.png", "noise.png"] * (script == "06_stylegan_blocks")}
    assert {path.name for path in folder.iterdir()} == {"options.json", "log.jsonl", "checkpoint.pt", "curves.png", "samples"}
    classes = 10 if script == "04_cgan" else 0
    pixels = 32 if script == "06_stylegan_blocks" else 28
    cell = lambda count: count * (2 * pixels + 4) + 4  # shown doubled, 4 of padding
    size = {"real.png": (cell(8), cell(classes or 8)), "final.png": (cell(16), cell(classes or 16)),
            "interpolation.png": (cell(10), cell(classes or 8)), "latent_walk.png": (cell(10), cell(classes or 8))}
    for name in names:
        image = picture(folder / "samples" / name)
        assert len(np.unique(image)) > 5, f"{name} shows nothing"
        if name in size and dataset != "gaussians":
            assert image.shape[1::-1] == size[name]
    epochs = [picture(folder / "samples" / f"epoch_000{epoch}.png") for epoch in range(3)]
    with Image.open(folder / "samples" / "progress.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for frame, epoch in enumerate(epochs):
            film.seek(frame)
            differences = [np.abs(np.asarray(film.convert("RGB")).astype(int) - other).mean() for other in epochs]
            assert np.argmin(differences) == frame, "the film runs forwards"
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert picture(folder / "curves.png").shape[0] > 200


def test_grid_maps_minus_one_to_black_and_one_to_white(tmp_path):
    """The same scale in every picture, whatever is in it: epochs can be compared."""
    for values in ([-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-3.0, 0.5, 3.0]):
        common.save_picture(torch.tensor(values).view(3, 1, 1, 1).expand(3, 1, 28, 28), 3, tmp_path / "grid.png")
        shown = picture(tmp_path / "grid.png")[30, [30, 90, 150], 0]
        assert np.abs(shown - (np.clip(values, -1, 1) + 1) * 127.5).max() <= 1


@pytest.mark.parametrize("script, flags, expected", [
    ("01_vanilla_gan", "", [0.5, 0.5, math.log(2)]),
    ("01_vanilla_gan", "--variant two-logit", [0.5, 0.5, 2 * math.log(2), math.log(2)]),
    ("01_vanilla_gan", "--generator-loss saturating", [0.5, 0.5, math.log(2), -math.log(2)]),
    ("02_dcgan", "", [0.5, math.log(2)]), ("03_wgan_gp", "", [1]), ("04_cgan", "", [1]),
    ("05_sn_label_smoothing", "", [0.5, math.log(2), math.log(2), 1]),
    ("05_sn_label_smoothing", "--label-smoothing two-sided", [0.5, math.log(2), math.log(2), 1]),
    ("05_sn_label_smoothing", "--label-smoothing one-sided", [0.45, 0.6881388, 0.7985077, 1]),
    ("06_stylegan_blocks", "", [0.5, 2 * math.log(2), math.log(2)])])
def test_curves_draw_the_equilibrium(train, monkeypatch, script, flags, expected):
    drawn = []
    axhline = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **style: (drawn.append(y), axhline(axes, y, **style)))
    train(script, "--epochs", 1, "--max-batches", 1, *flags.split())
    assert drawn == pytest.approx(expected)


def test_curves_of_orders_of_magnitude(monkeypatch, tmp_path):
    """A logarithmic axis where a quantity falls by more than a factor of 20, linear around 0 where it is not positive."""
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: figures.append(figure))
    falling = [40.0, 9.0, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7]
    history = [{"epoch": epoch, "W": value, "loss": 10 - value, "fell": value - 1, "KL": None} for epoch, value in enumerate(falling, 1)]
    common.save_curves(history, [(name, [name], {"floor": 0.1}) for name in ("W", "loss", "fell", "KL")], tmp_path / "curves.png")
    assert [axes.get_yscale() for axes in figures[0].axes] == ["log", "linear", "symlog", "linear"]
    assert figures[0].axes[2].yaxis.get_transform().linthresh == 1


def test_checkpoint(finished):
    script, dataset, folder, _ = finished
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    names = ["critic", "optimizer_c"] if script in ("03_wgan_gp", "04_cgan") else ["discriminator", "optimizer_d"]
    average = ["average"] * ((script, dataset) in [("06_stylegan_blocks", "digits"), ("03_wgan_gp", "gaussians")])
    assert set(checkpoint) == {"options", "epoch", "step", "generator", "optimizer_g", "history", "scores", "places", *names, *average}
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 6)
    rate, betas = (1e-4, (0.0, 0.9)) if script in ("03_wgan_gp", "04_cgan") else (2e-4, (0.5, 0.999))
    for name in ("optimizer_g", names[1]):
        if dataset == "digits" and script != "06_stylegan_blocks":                 # 06: test_stylegan.py
            group, = checkpoint[name]["param_groups"]
            assert group["lr"] == rate
            assert tuple(group["betas"]) == betas


def test_from_draws_what_the_training_drew(finished):
    """The seed fixes the latents: --generate with the run's seed repeats the last epoch's picture, bit for bit."""
    script, dataset, folder, _ = finished
    module, drawing = load_script(script), ["--device", "cpu"]
    log = (folder / "log.jsonl").read_bytes()
    count = {"gaussians": 2500}.get(dataset, 80 if script == "04_cgan" else 64)
    module.main([*drawing, "--from", str(folder), "--generate", str(count), "--interpolate", "--explore", "5"])
    drawn = picture(folder / "samples" / f"generated-{count}-seed0.png")
    assert np.array_equal(drawn, picture(folder / "samples" / "epoch_0002.png"))
    module.main([*drawing, "--from", str(folder / "checkpoint.pt"), "--generate", str(count), "--seed", "1"])
    assert not np.array_equal(drawn, picture(folder / "samples" / f"generated-{count}-seed1.png"))
    names = [f"generated-{count}-seed0.png", "interpolation-seed0.png", "latent_walk-dim5-seed0.png"]
    before = [picture(folder / "samples" / name) for name in names]
    for wish in (["--interpolate"], ["--explore", "5"], ["--generate", str(count)]):
        module.main([*drawing, "--from", str(folder), *wish])
    assert all(map(np.array_equal, before, [picture(folder / "samples" / name) for name in names])), "a seed repeats"
    assert np.array_equal(before[1], picture(folder / "samples" / "interpolation.png"))
    assert (folder / "log.jsonl").read_bytes() == log
    for path in (folder / "samples").glob("*-*.png"):
        path.unlink()


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_train_draw_and_go_on_on_a_gpu(script, tmp_path):
    module, folder = load_script(script), tmp_path / f"{script}-digits-0001"
    quick = [*QUICK, *THIN.get(script, []), "--device", "cuda", "--output-dir", str(tmp_path)]
    module.main(quick)
    drawn = []
    for _ in range(2):
        module.main(["--from", str(folder), "--device", "cuda", "--generate", "80" if script == "04_cgan" else "64"])
        path, = (folder / "samples").glob("generated-*.png")
        drawn.append(picture(path).astype(int))
    assert np.array_equal(*drawn)
    assert np.abs(drawn[0] - picture(folder / "samples" / "epoch_0002.png")).max() <= 2
    module.main(["--resume", str(folder), "--epochs", "3"])
    assert [row["epoch"] for row in read_log(folder)] == [1, 2, 3]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run a script in this process, without the pictures of its end; returns its log without `seconds`."""
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)
    monkeypatch.setattr(common, "save_figure", lambda figure, path: None)

    def call(script, *arguments):
        load_script(script).main([*QUICK, *THINNER.get(script, []), *map(str, arguments), "--output-dir", str(tmp_path)])
        folder = max(tmp_path.iterdir())                   # the highest number
        rows = read_log(folder)
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_optimizer_gets_its_rate(train, script, tmp_path):
    train(script, "--epochs", 1, "--max-batches", 1, "--lr-g", 0.003, "--lr-d", 0.007)
    checkpoint = torch.load(max(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    rates = {name: state["param_groups"][0]["lr"] for name, state in checkpoint.items() if name.startswith("optimizer")}
    assert rates.pop("optimizer_g") == 0.003 and list(rates.values()) == [0.007]


def test_means_steps_and_seconds_of_an_epoch(tmp_path, monkeypatch):
    """Means by name; N // batch steps, or fewer with --max-batches; seconds without those of pictures and curves."""
    clock = [0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def slowly(draw):
        def call(*arguments, **settings):
            clock[0] += 100
            draw(*arguments, **settings)
        return call

    for name in ("save_picture", "save_curves"):
        monkeypatch.setattr(common, name, slowly(getattr(common, name)))
    monkeypatch.setattr(common, "replace_file", slowly(common.replace_file))
    data = common.Data("test", torch.zeros(10, 2), torch.zeros(10))
    for limit, steps in [(None, 2), (5, 2), (1, 1)]:
        args = Namespace(script="00_test", dataset="test", batch_size=4, max_batches=limit, output_dir=str(tmp_path), epochs=2,
                         noise="normal", seed=0, classes=0, latent_dim=2, sample_interval=1,
                         eval_interval=0, ema_decay=0, lr_decay=0, device="cpu", resume=None)
        with common.Run(args, data, load_script("03_wgan_gp").generate_noise, [("once", ["once"], {})],
                        generator=torch.nn.Linear(2, 2)) as run:
            for batches in run.epochs():
                for index, _ in enumerate(run.steps()):
                    clock[0] += 1
                    assert next(batches)[0].shape == (4, 2)
                    for value in (1.0, 2.0, 6.0):
                        run.record({"thrice": torch.tensor(value)})
                    run.record({"once": torch.tensor(float(index))})
        for epoch, row in enumerate(read_log(run.folder), start=1):
            assert row == {"epoch": epoch, "step": epoch * steps, "seconds": steps, "thrice": 3, "once": (steps - 1) / 2}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_repeats(train, script, tmp_path):
    first = train(script)
    assert train(script, "--sample-interval", 2) == first, "sampling disturbs the training"
    assert train(script, "--seed", 1) != first
    assert [path.name[-4:] for path in sorted(tmp_path.iterdir())] == ["0001", "0002", "0003"]


SHARED = ["--lr-decay 1", "--beta1 0.7", "--latent-dim 9"]     # the others are seen in other tests
OWN = {"01_vanilla_gan": ["--variant two-logit", "--variant keras", "--generator-loss saturating"], "02_dcgan": [],
       "03_wgan_gp": ["--critic conv", "--gp-weight 1", "--n-critic 2", "--penalty autograd"],
       "04_cgan": ["--gp-weight 1", "--n-critic 2", "--penalty autograd"],
       "05_sn_label_smoothing": [],     # test_training_techniques.py
       "06_stylegan_blocks": ["--width 48", "--progressive off", "--style-mixing-prob 0", "--r1-weight 9"]}


baselines = {}


@pytest.mark.parametrize("script, flag", [(script, flag) for script in SCRIPTS for flag in SHARED + OWN[script]])
def test_every_flag_changes_the_training(train, script, flag):
    if script not in baselines:
        baselines[script] = train(script)
    assert train(script, *flag.split()) != baselines[script]


def test_intervals(train, tmp_path, monkeypatch):
    """Pictures as often as asked; checkpoints at the start, after each epoch's steps, at the end, and when time is up."""
    saved = []
    save = common.Run.save_checkpoint
    monkeypatch.setattr(common.Run, "save_checkpoint", lambda run: (saved.append((run.epoch, run.step)), save(run)))
    train("03_wgan_gp", "--epochs", 5, "--sample-interval", 2)
    samples = max(tmp_path.iterdir()) / "samples"
    assert sorted(path.name for path in samples.glob("epoch*")) == [f"epoch_000{epoch}.png" for epoch in (0, 2, 4, 5)]
    assert saved == [(0, 0), (0, 3), (1, 6), (2, 9), (3, 12), (4, 15), (5, 15)]
    saved.clear()
    monkeypatch.setattr(common.Run, "SAVE_SECONDS", 0)
    train("03_wgan_gp", "--epochs", 1)
    assert saved == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 3), (1, 3)]


def test_sampling_leaves_the_training_state_untouched():
    module = load_script("04_cgan")
    args = Namespace(**module.CONSTANTS["cgan"], seed=0, dataset="digits")
    generator = module.Generator()
    state, random = snapshot(generator.state_dict().items()), torch.get_rng_state()
    pipeline = common.Pipeline(generator, module.generate_noise, args)
    samples = pipeline(*pipeline.latents(30))
    assert samples.shape == (30, 1, 28, 28) and not samples.requires_grad
    assert all(part.training for part in generator.modules())
    assert unchanged(state, generator.state_dict()) and torch.equal(random, torch.get_rng_state())
    generator.eval()
    with torch.no_grad():
        expected = generator(*common.Pipeline(generator, module.generate_noise, args).latents(30))
    torch.testing.assert_close(samples, expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_latents_are_not_made_of_the_numbers_of_the_weights(script):
    """A z that equals a row of the first layer is no sample of the prior: 06 drew broken digits from such z."""
    module = load_script(script)
    args = Namespace(**{"classes": 0, **next(iter(module.CONSTANTS.values()))}, seed=0, dataset="digits")
    torch.manual_seed(0)
    shape = (32, 1, 64) if script == "06_stylegan_blocks" else ()
    generator = module.Generator(args.latent_dim, *shape)
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


def test_pipeline_walks_as_the_text_says(monkeypatch, tmp_path):
    """Interpolation: (1 - t) z1 + t z2 in 10 steps. Exploration: base + (-3 ... 3) in one dimension only."""
    drawn = []
    monkeypatch.setattr(common, "save_picture", lambda samples, columns, path, paths=False: drawn.append((samples, columns)))
    args = Namespace(latent_dim=6, classes=0, seed=3, noise="normal", dataset="digits")
    pipeline = common.Pipeline(Recorder(), load_script("02_dcgan").generate_noise, args)
    pipeline.interpolate(tmp_path)
    pipeline.explore([4] * 8, tmp_path)
    pipeline.explore(range(6), tmp_path, one_base=True)
    (lines, columns), (walk, _), (walks, _) = drawn
    assert columns == 10
    lines = lines.view(8, 10, 6)
    ends = pipeline.noise(16)
    torch.testing.assert_close(lines[:, 0], ends[:8])
    torch.testing.assert_close(lines[:, -1], ends[8:])
    steps = lines.diff(dim=1)
    torch.testing.assert_close(steps, (lines[:, -1:] - lines[:, :1]).expand(-1, 9, -1) / 9)
    assert len(lines[:, 0].unique(dim=0)) == 8
    walk, offsets = walk.view(8, 10, 6), torch.linspace(-3, 3, 10)
    others = [0, 1, 2, 3, 5]
    assert torch.equal(walk[:, :, others], walk[:, :1, others].expand(-1, 10, -1))
    torch.testing.assert_close(walk[:, :, 4] - walk[:, :, 4].mean(1, keepdim=True), offsets.expand(8, -1))
    walks = walks.view(6, 10, 6)
    moved = walks - walks.mean(1).diagonal()
    torch.testing.assert_close(moved, torch.eye(6)[:, None] * offsets[None, :, None])


class Labelled(Recorder):
    """A conditional generator that paints its label, and the sign of its latent vector."""

    def forward(self, z, labels):
        return (labels / 10 + 0.05 * z[:, 0].sign()).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


@pytest.mark.parametrize("label", [None, 3])
def test_from_draws_the_class_that_was_asked_for(tmp_path, monkeypatch, label):
    """--class K: that class in every cell of every picture; without it, row r is class r."""
    drawn = []
    monkeypatch.setattr(common, "save_picture", lambda samples, *rest, **more: drawn.append(samples))
    torch.save({"generator": Labelled().state_dict(), "epoch": 1}, tmp_path / "checkpoint.pt")
    args = Namespace(run=str(tmp_path / "checkpoint.pt"), device="cpu", generate=30, interpolate=True, explore=2, label=label, styles=None,
                     evaluate=None, dataset="digits", latent_dim=6, classes=10, seed=3)
    common.sample_run(Labelled, (), load_script("04_cgan").generate_noise, args)
    assert len(drawn) == 3
    for samples in drawn:
        shown = (samples[:, 0, 0, 0] * 10).view(-1, 3 if len(samples) == 30 else 10)
        expected = torch.arange(10)[:, None].expand_as(shown) if label is None else torch.full_like(shown, label)
        torch.testing.assert_close(shown, expected.float(), atol=0.51, rtol=0)


def test_conditional_grid_has_one_row_per_class(tmp_path, monkeypatch):
    """Cell (row, column) is class `row` under the z of its column; the count is rounded up to full columns."""
    drawn = []
    monkeypatch.setattr(common, "save_picture", lambda samples, columns, path, paths=False: drawn.append((samples, columns)))
    pipeline = common.Pipeline(Labelled(), load_script("04_cgan").generate_noise, Namespace(latent_dim=6, classes=10, seed=3, dataset="digits"))
    z, labels = pipeline.latents(24)
    pipeline.generate(z, labels, tmp_path)
    samples, columns = drawn[0]
    grid = samples[:, 0, 0, 0].view(10, columns)
    assert columns == 3
    assert torch.equal(z[:3], z[27:]) and len(z.unique(dim=0)) == 3
    torch.testing.assert_close(grid, torch.arange(10)[:, None] / 10 + 0.05 * z[:3, 0].sign())
    z, labels = pipeline.latents(5, label=3)
    assert labels.tolist() == [3] * 5 and len(z.unique(dim=0)) == 5


def test_divergence_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script("03_wgan_gp").main(["--dataset", "gaussians", "--gp-weight", "1e39", "--max-batches", "3", "--output-dir", str(tmp_path)])
    assert stop.value.code == 1
    line, = capsys.readouterr().err.splitlines()
    assert "is no longer finite in step 3, epoch 1; try a smaller --gp-weight (the last good checkpoint, of step 0, is in" in line
    assert not (tmp_path / "03_wgan_gp-gaussians-0001" / "log.jsonl").exists(), "NaN is no JSON"


@pytest.mark.parametrize("normalisation", ["on", "off"])
def test_divergence_reaches_the_table_of_singular_values(tmp_path, capsys, monkeypatch, normalisation):
    """The table of 05 must not break on NaN before the run says what happened."""
    module = load_script("05_sn_label_smoothing")
    monkeypatch.setattr(module, "discriminator_loss", lambda real, fake, smoothing: real.mean() * math.nan)
    with pytest.raises(SystemExit) as stop:
        module.main(["--dataset", "gaussians", "--spectral-norm", normalisation, "--max-batches", "2", "--output-dir", str(tmp_path)])
    assert stop.value.code == 1 and "is no longer finite" in capsys.readouterr().err


def test_progress_bar_and_ctrl_c_on_a_terminal(tmp_path):
    """The bar shows rate and time left; in a pipe it stays silent (test_terminal: no stderr). Ctrl-C keeps a checkpoint."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))    # rows, columns
    with open(tmp_path / "printed.txt", "w") as printed:
        process = subprocess.Popen([sys.executable, "03_wgan_gp.py", "--dataset", "gaussians", "--max-batches", "2", "--epochs", "100000",
                                    "--output-dir", str(tmp_path)], cwd=ROOT, stdout=printed, stderr=theirs,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # noqa: PLW1509  ignored in background jobs
    os.close(theirs)
    shown, asked = b"", False
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # it has ended
            break
        steps = re.findall(rb"\d+%\|.*?(\d+)/200000 \[\d\d:\d\d<[\d:]+, +[\d.]+(?:step/s|s/step)", shown)
        if not asked and any(int(step) > 6 for step in steps):  # three epochs
            process.send_signal(signal.SIGINT)
            asked = True
    os.close(ours)
    folder = tmp_path / "03_wgan_gp-gaussians-0001"
    assert process.wait(timeout=60) == 130 and b"Traceback" not in shown
    assert re.search(rf"interrupted after \d+ epochs; to go on: python 03_wgan_gp.py --resume {folder}\n$", (tmp_path / "printed.txt").read_text())
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] - len(read_log(folder)) in (0, 1)
    assert (folder / "curves.png").exists()
    assert not list(folder.glob("*.tmp"))
