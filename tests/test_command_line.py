"""Flags: their defaults, their checks, and what --from accepts beside it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import common
from conftest import ROOT, load_script, run_script

TRAINED = ["--dataset", "digits", "--epochs", "1", "--max-batches", "2", "--batch-size", "16", "--eval-interval", "0"]
TEXT = {  # the text's constants; (ours) where it has none
    ("01_vanilla_gan", "bce"): dict(epochs=50, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, latent_dim=100,
                                    noise="normal", generator_loss="non-saturating"),      # epochs: ours
    ("01_vanilla_gan", "two-logit"): dict(epochs=500, batch_size=300, lr_g=1e-4, lr_d=4e-5, beta1=0.9, beta2=0.999,
                                          latent_dim=100, noise="uniform", generator_loss="non-saturating"),
    ("01_vanilla_gan", "keras"): dict(epochs=16, batch_size=32, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, latent_dim=100,
                                      noise="normal", generator_loss="non-saturating"),
    ("02_dcgan", "dcgan"): dict(epochs=5, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, latent_dim=100),  # epochs: ours
    ("03_wgan_gp", "mlp"): dict(epochs=300, batch_size=300, lr_g=1e-4, lr_d=1e-4, beta1=0, beta2=0.9, latent_dim=100,
                                noise="uniform", gp_weight=10, n_critic=5, penalty="explicit"),
    ("03_wgan_gp", "conv"): dict(batch_size=64, lr_g=1e-4, lr_d=1e-4, beta1=0, beta2=0.9, latent_dim=100,
                                 noise="normal", gp_weight=10, n_critic=5, penalty="autograd"),                # batch: ours
    ("04_cgan", "cgan"): dict(epochs=300, batch_size=300, lr_g=1e-4, lr_d=1e-4, beta1=0, beta2=0.9, latent_dim=100, gp_weight=10, n_critic=5),
    ("05_sn_label_smoothing", "dcgan"): dict(batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, latent_dim=100,
                                             spectral_norm="on", label_smoothing="none", minibatch_discrimination="off",
                                             ttur="off", n_critic=1),
    ("06_stylegan_blocks", "stylegan"): dict(epochs=8, batch_size=32, lr_g=4e-3, lr_d=2e-3, beta1=0, beta2=0.99, latent_dim=128, width=64, style_mixing_prob=0.1, ema_decay=0.998,
                                               progressive="on", r1_weight=3)}         # ours
POINTS = {  # ours; 05 has 01's
    "01_vanilla_gan": dict(epochs=50, batch_size=256, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999, latent_dim=100, noise="normal"),
    "03_wgan_gp": dict(epochs=40, batch_size=256, lr_g=1e-3, lr_d=1e-3, beta1=0.5, beta2=0.9, latent_dim=100, noise="normal",
                       gp_weight=1, n_critic=5, penalty="autograd", lr_decay=1, ema_decay=0.999)}
POINTS["05_sn_label_smoothing"] = {name: value for name, value in POINTS["01_vanilla_gan"].items() if name != "noise"}


@pytest.fixture
def options(monkeypatch):
    """Call a script's main and return the options that reach its preparation."""
    def call(script, *arguments):
        class Reached(Exception):
            pass

        def prepare(args, **settings):
            raise Reached(vars(args))

        module = load_script(script)
        monkeypatch.setattr(module.common, "prepare", prepare)
        with pytest.raises(Reached) as reached:
            module.main(list(map(str, arguments)))
        return reached.value.args[0]
    return call


def one_line(capsys):
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("script, variant", TEXT)
def test_defaults_are_the_constants_of_the_text(options, script, variant):
    flag = {"01_vanilla_gan": ["--variant", variant], "03_wgan_gp": ["--critic", variant]}.get(script, [])
    found = options(script, *flag)
    expected = {"variant": variant, "seed": 0, "device": "auto", "dataset": "auto", "data_dir": "data", "output_dir": "runs",
                "max_batches": None, "eval_interval": None, "sample_interval": None, "ema_decay": 0, "lr_decay": 0, **TEXT[script, variant]}
    assert {name: found[name] for name in expected} == expected
    if variant in ("bce", "mlp"):
        assert options(script) == found, "the first row is the default"
    assert options(script, *flag, "--lr-g", 0.5)["lr_g"] == 0.5


@pytest.mark.parametrize("usable, expected", [("cuda mps", "cuda"), ("mps", "mps"), ("", "cpu")])
def test_auto_takes_the_best_device(monkeypatch, usable, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in usable)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in usable)
    assert common.pick_device("auto") == expected


@pytest.mark.parametrize("script", POINTS)
@pytest.mark.parametrize("dataset", ["gaussians", "ring", "grid"])
def test_points_choose_their_own_row(options, script, dataset):
    found = options(script, "--dataset", dataset)
    assert found == {**found, "variant": "points", **POINTS[script]}


@pytest.mark.parametrize("flag, values", {
    "--epochs": ["0", "-1", "1.5", "many", ""], "--batch-size": ["0", "1"], "--lr-g": ["0", "-1e-4", "nan", "inf", "1e30", "x"],
    "--lr-d": ["0", "nan"], "--beta1": ["1", "-0.1", "nan"], "--latent-dim": ["0", "9999999999"], "--seed": ["-1", "4294967296"],
    "--sample-interval": ["0"], "--eval-interval": ["-1", "x"],
    "--ema-decay": ["1", "-0.1", "nan"], "--lr-decay": ["1.1", "-0.1", "nan"], "--max-batches": ["0"], "--gp-weight": ["-1", "nan"],
    "--n-critic": ["0"], "--explore": ["-1"], "--generate": ["0", "1000000"], "--device": ["gpu"], "--dataset": ["cifar"],
    "--critic": ["gaussians"]}.items())
def test_wrong_values_are_refused_before_any_work(tmp_path, capsys, flag, values):
    for value in values:
        with pytest.raises(SystemExit) as stop:
            load_script("03_wgan_gp").main([flag, value, "--output-dir", str(tmp_path)])
        assert stop.value.code == 2
        assert f"argument {flag}" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, arguments, message", [
    ("02_dcgan", ["--dataset", "gaussians"], "argument --dataset: invalid choice"),
    ("04_cgan", ["--dataset", "gaussians"], "argument --dataset: invalid choice"),
    ("03_wgan_gp", ["--dataset", "gaussians", "--critic", "conv"], "--critic conv is for images"),
    ("01_vanilla_gan", ["--dataset", "gaussians", "--variant", "keras"], "--variant keras is for images"),
    ("01_vanilla_gan", ["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ("01_vanilla_gan", ["--generate", "9"], "--generate needs a trained generator"),
    ("03_wgan_gp", ["--dataset", "ring", "--critic", "mlp"], "--dataset ring has its own networks"),
    ("03_wgan_gp", ["--dataset", "folder"], "argument --dataset: invalid choice"),
    ("04_cgan", ["--dataset", "stacked-mnist"], "argument --dataset: invalid choice"),
    ("04_cgan", ["--evaluate"], "--evaluate needs a trained generator"),
    ("03_wgan_gp", ["--critic", "conv", "--penalty", "explicit"], "--penalty explicit is for the critic of 11.3"),
    ("03_wgan_gp", ["--dataset", "ring", "--penalty", "explicit"], "--penalty explicit is for the critic of 11.3"),
    ("02_dcgan", ["--image-size", "32"], "argument --image-size: invalid choice"),
    ("06_stylegan_blocks", ["--image-size", "28"], "argument --image-size: invalid choice"),
    ("06_stylegan_blocks", ["--channels", "2"], "argument --channels: invalid choice"),
    ("06_stylegan_blocks", ["--width", "31"], "argument --width: expected a whole number of at least 32"),
    ("06_stylegan_blocks", ["--style-mixing-prob", "1.1"], "expected a number of at least 0 and at most 1, got '1.1'"),
    ("06_stylegan_blocks", ["--styles"], "--styles needs a trained generator"),
    ("01_vanilla_gan", ["--interpolate"], "--interpolate needs a trained generator"),
    ("01_vanilla_gan", ["--explore", "3"], "--explore needs a trained generator"),
    ("04_cgan", ["--class", "3"], "--class needs a trained generator"),
    ("04_cgan", ["--class", "10"], "argument --class: invalid choice"),
    ("01_vanilla_gan", ["--from", "no/such/run"], "no/such/run does not exist"),
    ("01_vanilla_gan", ["--device", "cuda"], "--device cuda: this torch"),
    ("01_vanilla_gan", ["--dataset", "digits", "--batch-size", "60001"], "--batch-size 60001 exceeds the 60000 training samples")])
def test_refusals(tmp_path, capsys, monkeypatch, script, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        load_script(script).main([*arguments, "--output-dir", str(tmp_path)])
    assert stop.value.code == 2
    line = one_line(capsys)
    assert line.count("error:") == 1 and message in line
    assert list(tmp_path.iterdir()) == []


def test_output_dir_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        load_script("02_dcgan").main([*TRAINED, "--output-dir", str(tmp_path / "file")])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "--output-dir" in captured.err, "refused before any work"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of 03 to draw from."""
    parent = tmp_path_factory.mktemp("runs")
    load_script("03_wgan_gp").main([*TRAINED, "--latent-dim", "7", "--output-dir", str(parent)])
    return parent / "03_wgan_gp-digits-0001"


@pytest.mark.parametrize("arguments, message", [
    (["--critic", "conv"], "--critic conv contradicts the run, which has mlp"),
    (["--latent-dim", "8"], "--latent-dim 8 contradicts the run, which has 7"),
    (["--dataset", "mnist"], "--dataset mnist contradicts the run, which has digits"),
    (["--epochs", "5"], "--epochs 5 contradicts the run, which has 1; --from trains nothing"),
    (["--explore", "7"], "--explore 7: the run's latent dimensions are 0 to 6"),
    (["--class", "3"], "unrecognized arguments: --class 3")])
def test_from_refuses_what_contradicts_the_run(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        load_script("03_wgan_gp").main(["--from", str(run), *arguments])
    assert stop.value.code == 2 and message in one_line(capsys)


def test_from_accepts_what_agrees_with_the_run(run, capsys):
    load_script("03_wgan_gp").main(["--from", str(run), "--critic", "mlp", "--latent-dim", "7", "--seed", "4"])
    assert capsys.readouterr().out.strip() == str(run / "samples" / "generated-64-seed4.png")


def test_from_refuses_other_files(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script("04_cgan").main(["--from", str(run)])
    assert stop.value.code == 2 and "was trained by 03_wgan_gp.py; give it to that script" in one_line(capsys)
    content = (run / "checkpoint.pt").read_bytes()
    for damaged in (b"", b"no checkpoint", content[:1000], json.dumps({}).encode()):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(SystemExit) as stop:
            load_script("03_wgan_gp").main(["--from", str(tmp_path)])
        assert stop.value.code == 2 and "is not a checkpoint of these scripts" in one_line(capsys)
    good = torch.load(run / "checkpoint.pt")
    for change, message in [({"options": {"script": "03_wgan_gp"}}, "has options that this script cannot have (variant)"),
                            ({"generator": 3}, "does not fit its own options"),
                            ({"generator": {}}, "does not fit its own options")]:
        torch.save({**good, **change}, tmp_path / "checkpoint.pt")
        with pytest.raises(SystemExit) as stop:
            load_script("03_wgan_gp").main(["--from", str(tmp_path)])
        assert stop.value.code == 2 and message in one_line(capsys)


class Intruder:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_from_runs_no_code_of_the_checkpoint(run, tmp_path, capsys):
    torch.save({**torch.load(run / "checkpoint.pt"), "epoch": Intruder(tmp_path / "written")}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        load_script("03_wgan_gp").main(["--from", str(tmp_path)])
    assert stop.value.code == 2 and "is not a checkpoint of these scripts" in one_line(capsys)
    assert not (tmp_path / "written").exists()


def test_help_prints_in_any_encoding():
    process = run_script("03_wgan_gp", "--help", env={**os.environ, "PYTHONIOENCODING": "cp1252", "WORLD_SIZE": ""})  # not by torchrun
    assert process.returncode == 0 and "--gp-weight X" in process.stdout


def test_a_script_without_its_docstring():
    """As under python -OO."""
    constants = {"row": dict(epochs=1)}
    assert common.Parser("03_wgan_gp.py", None, constants).options(["--seed", "4"]).seed == 4


def test_help_imports_nothing_slow():
    """torchvision, matplotlib and torch.compile's machinery take longer than torch itself: only a run needs them."""
    program = "import sys, common; print(sorted({'torchvision', 'matplotlib', 'torch._dynamo'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
