"""--compare-kernels: the table, its file, and the exit code where a kernel is wrong."""

import json
from argparse import Namespace

import pytest
import torch

import common
from conftest import load_script, run_script
from csrc import compare, ops

SCRIPTS = {"gradient_penalty": "03_wgan_gp", "adain": "06_stylegan_blocks"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Two small shapes, three rounds, and a compiler that is done at once."""
    monkeypatch.setattr(compare, "SHAPES", {"gradient_penalty": [(5,), (7,)], "adain": [(2, 3, 4, 4), (7, 3, 8, 8)]})
    monkeypatch.setattr(compare, "ROUNDS", 3)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    return request.param


@pytest.mark.parametrize("kind", SCRIPTS)
def test_table_and_file(kind, device, tmp_path, capsys):
    steps, script = [], SCRIPTS[kind]
    module, args = load_script(script), Namespace(script=script, device=device, output_dir=tmp_path / "new")
    of_critic = (module.Critic().to(device), torch.rand(3, 1, 28, 28)) if kind == "gradient_penalty" else ()
    common.compare_kernels(args, getattr(module, kind), lambda: steps.append(bool(ops.KERNELS)), *of_critic)
    assert set(steps) == {True, False}, "with kernels and without"
    table = json.loads((tmp_path / "new" / f"{script}-kernels.json").read_text())
    assert table["kernel"] == kind and table["torch"] == torch.__version__ and len(table["rows"]) == 2
    for row in table["rows"]:
        assert row["seconds"].keys() == row["errors"].keys() == {"reference", "fused", "torch.compile"}
        assert all(0 <= error < 1e-4 for error in row["errors"].values())
        assert all(seconds > 0 and spread >= 0 for seconds, spread in row["seconds"].values())
        moved = 5 * 4 * torch.Size(row["shape"]).numel()
        assert kind != "adain" or row["bandwidth"] == pytest.approx(moved / row["seconds"]["fused"][0])
    assert table["training_step"].keys() == {"reference", "fused"}
    shown = capsys.readouterr().out
    assert all("x".join(map(str, row["shape"])) in shown for row in table["rows"]) and "training step" in shown


@pytest.mark.parametrize("wrong", [
    lambda y: y * 1.001, lambda y: y * torch.nan, lambda y: y + 0.001 * (y - y.detach())  # the gradient alone
], ids=["values", "NaN", "gradients"])
def test_a_wrong_kernel_ends_with_exit_code_1(wrong, device, tmp_path):
    """After the table and its file."""
    formula = load_script("06_stylegan_blocks").adain.formula

    def fused(*tensors, **options):
        return wrong(formula(*tensors, **options))

    fused.formula, fused.kernel = formula, "adain"
    with pytest.raises(SystemExit, match="wrong") as stop:
        common.compare_kernels(Namespace(script="06", device=device, output_dir=tmp_path), fused, lambda: None)
    assert isinstance(stop.value.code, str)  # Python prints it on stderr and exits with code 1
    rows = json.loads((tmp_path / "06-kernels.json").read_text())["rows"]
    assert all(not row["errors"]["fused"] <= 1e-4 and row["errors"]["reference"] < 1e-4 for row in rows)


def test_the_training_step_is_the_whole_one(monkeypatch, tmp_path):
    """Of 06 at full size, where a training that grows does not begin."""
    seen, forward = [], ops.AdaIN.forward
    monkeypatch.setattr(ops.AdaIN, "forward", lambda ctx, x, *rest: seen.append((*x.shape,)) or forward(ctx, x, *rest))
    monkeypatch.setattr(common, "compare_kernels", lambda args, formula, step: (ops.choose("fused", "cpu"), step()))
    load_script("06_stylegan_blocks").main(["--compare-kernels", "--device", "cpu", "--output-dir", str(tmp_path)])
    assert seen == [(32, c, s, s) for c, s in [(64, 4), (64, 8), (32, 16), (16, 32)] for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS.values())
def test_all_shapes_with_torch_compile(script, tmp_path):
    finished = run_script(script, "--compare-kernels", "--output-dir", tmp_path, timeout=1500)
    assert finished.returncode == 0, finished.stderr
    table = json.loads((tmp_path / f"{script}-kernels.json").read_text())
    assert len(table["rows"]) >= 3 and len(finished.stdout.splitlines()) == len(table["rows"]) + 5
