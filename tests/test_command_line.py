"""Flags: their defaults, their checks, and what --from accepts beside it."""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, load_script  # puts common on the path

import common

ADAM = dict(lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, latent_dim=100)
WGAN = dict(lr_g=1e-4, lr_d=1e-4, beta1=0, beta2=0.9, latent_dim=100, gp_weight=10, n_critic=5)
NORMAL = dict(noise="normal", generator_loss="non-saturating")
TEXT = {  # the text's constants
    ("01_vanilla_gan", "bce"): dict(**ADAM, **NORMAL, batch_size=64),
    ("01_vanilla_gan", "two-logit"): dict(epochs=500, batch_size=300, lr_g=1e-4, lr_d=4e-5, beta1=0.9, beta2=0.999,
                                          latent_dim=100, noise="uniform", generator_loss="non-saturating"),
    ("01_vanilla_gan", "keras"): dict(**ADAM, **NORMAL, epochs=16, batch_size=32),
    ("02_dcgan", "dcgan"): dict(**ADAM, batch_size=64),
    ("03_wgan_gp", "mlp"): dict(**WGAN, epochs=300, batch_size=300, noise="uniform"),
    ("03_wgan_gp", "conv"): dict(**WGAN, noise="normal"),
    ("04_cgan", "cgan"): dict(**WGAN, epochs=300, batch_size=300),
    ("05_sn_label_smoothing", "dcgan"): dict(**ADAM, batch_size=64, n_critic=1, spectral_norm="on", ttur="off",
                                             label_smoothing="none", minibatch_discrimination="off"),
    ("06_stylegan_blocks", "stylegan"): dict(beta1=0, beta2=0.99, style_mixing_prob=0.1, progressive="on")}


class Reached(Exception):
    """A script has come as far as its run."""


@pytest.fixture
def options(monkeypatch):
    """Call a script's main; returns the options that reach its run."""
    def stop(args, *rest, **state):
        raise Reached(vars(args))

    def call(script, *arguments):
        monkeypatch.setattr(common, "Run", stop)
        with pytest.raises(Reached) as reached:
            load_script(script).main(list(map(str, arguments)))
        return reached.value.args[0]
    return call


@pytest.fixture
def refused(capsys):
    """Call a script's main, which must end with code 2; returns its one line on stderr."""
    def call(script, *arguments):
        with pytest.raises(SystemExit) as stop:
            load_script(script).main(list(map(str, arguments)))
        assert stop.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.count("error: ") == 1
        return line
    return call


@pytest.mark.parametrize("script, variant", TEXT)
def test_defaults_are_the_constants_of_the_text(options, script, variant):
    flag = {"01_vanilla_gan": ["--variant", variant], "03_wgan_gp": ["--critic", variant]}.get(script, [])
    found = options(script, *flag)
    expected = {"variant": variant, "seed": 0, "dataset": "auto", "data_dir": "data", **TEXT[script, variant]}
    assert {name: found[name] for name in expected} == expected
    if variant in ("bce", "mlp"):
        assert options(script) == found, "the first row is the default"


@pytest.mark.parametrize("script, dataset", [("01_vanilla_gan", "gaussians"), ("03_wgan_gp", "ring"),
                                             ("05_sn_label_smoothing", "grid")])
def test_points_choose_their_own_row(options, script, dataset):
    found = options(script, "--dataset", dataset, "--lr-g", 0.5)
    assert found == {**found, **load_script(script).CONSTANTS["points"], "variant": "points", "lr_g": 0.5}


@pytest.mark.parametrize("usable, expected", [("cuda mps", "cuda"), ("mps", "mps"), ("", "cpu")])
def test_auto_takes_the_best_device(monkeypatch, usable, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in usable)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in usable)
    assert common.pick_device("auto") == expected


@pytest.mark.parametrize("flag, values", {
    "--epochs": ["0", "1.5", "many", ""], "--batch-size": ["1"], "--lr-g": ["-1e-4", "nan", "inf"], "--beta1": ["1"],
    "--latent-dim": ["0", "9999999999"], "--seed": ["-1", "4294967296"], "--eval-interval": ["-1"],
    "--ema-decay": ["1"], "--lr-decay": ["1.1"], "--explore": ["-1"], "--generate": ["0"],
    "--dataset": ["cifar", "folder"], "--critic": ["points"]}.items())
def test_wrong_values_are_refused_before_any_work(tmp_path, refused, flag, values):
    for value in values:
        assert f"argument {flag}" in refused("03_wgan_gp", flag, value, "--output-dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, flags, key", [
    ("02_dcgan", ["--dataset", "gaussians"], "argument --dataset"), ("04_cgan", ["--class", 10], "argument --class"),
    ("03_wgan_gp", ["--dataset", "gaussians", "--critic", "conv"], "--critic is for images"),
    ("06_stylegan_blocks", ["--image-size", 28], "argument --image-size"),
    ("05_sn_label_smoothing", ["--ttur", "on", "--lr-g", 0.1], "--ttur"), ("01_vanilla_gan", ["--epoch", 3], "--epoch"),
    ("01_vanilla_gan", ["--generate", 9], "with --from"), ("04_cgan", ["--class", 3], "with --from"),
    ("06_stylegan_blocks", ["--styles"], "with --from"), ("01_vanilla_gan", ["--from", "no/such/run"], "no/such/run"),
    ("02_dcgan", ["--dataset", "folder", "--eval-interval", 1], "images of your own"),
    ("01_vanilla_gan", ["--device", "cuda"], "--device cuda"),
    ("03_wgan_gp", ["--dataset", "gaussians", "--batch-size", 60001], "60000 training samples")])
def test_refusals(tmp_path, refused, monkeypatch, script, flags, key):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert key in refused(script, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of 03 to draw from."""
    parent = tmp_path_factory.mktemp("runs")
    load_script("03_wgan_gp").main(["--dataset", "ring", "--epochs", "1", "--max-batches", "1", "--batch-size", "16",
                                    "--eval-interval", "0", "--latent-dim", "7", "--output-dir", str(parent)])
    return parent / "03_wgan_gp-ring-0001"


@pytest.mark.parametrize("flags, key", [
    (["--critic", "conv"], "--critic"), (["--latent-dim", 7], "--latent-dim"), (["--epochs", 5], "--epochs"),
    (["--explore", 7], "0 to 6"), (["--class", 3], "--class"), (["--resume"], "--resume")])
def test_what_from_refuses(run, refused, flags, key):
    before = sorted(run.rglob("*"))
    assert key in refused("03_wgan_gp", "--from", run, *flags)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("flags, names", [
    ([], ["generated-64-seed0"]), (["--seed", 4, "--generate", 9], ["generated-9-seed4"]),
    (["--explore", 6, "--interpolate"], ["interpolation-seed0", "latent_walk-dim6-seed0"])])
def test_from_draws_what_is_asked_for(run, tmp_path, capsys, flags, names):
    """Beside the checkpoint, wherever that was copied to."""
    path = shutil.copy(run / "checkpoint.pt", tmp_path / "a.pt")
    load_script("03_wgan_gp").main(["--from", str(path), *map(str, flags)])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "samples" / f"{name}.png") for name in names]
    assert sorted(path.stem for path in tmp_path.rglob("*.png")) == names


def test_help_prints_in_any_encoding_and_imports_nothing_slow():
    """torchvision, matplotlib and torch.compile's machinery take longer than torch itself: only a run needs them."""
    program = """import runpy, sys
sys.argv = ["03_wgan_gp.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print(stop.code, sorted({"torchvision", "matplotlib", "torch._dynamo"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
                             check=False)
    assert "--gp-weight X" in process.stdout and process.stdout.endswith("\n0 []\n"), process.stderr
