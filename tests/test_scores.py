"""Scores: each formula against an oracle that nobody here wrote, planted sets, and the way from a run to its table."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import prdc
import pytest
import scipy
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchvision.utils import save_image

import common
from conftest import ROOT, load_script, snapshot, unchanged

QUICK = ["--dataset", "digits", "--max-batches", "2", "--batch-size", "16", "--device", "cpu"]


def features(count, dimensions, seed):
    """Correlated features away from the origin."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=rng)
    return torch.randn(count, dimensions, generator=rng) @ mix + torch.randn(dimensions, generator=rng)


class Given(nn.Module):
    """A feature network for torchmetrics that returns what it is given."""

    num_features = 8

    def forward(self, images):
        return images.flatten(1).float()


# --------------------------------------------------------------------------------------- formulas

@pytest.mark.parametrize("count", [500, 100, 5], ids=["more than features", "more", "fewer than features"])
def test_frechet_distance_against_scipy(count):
    for a, b in [(features(count, 8, 1), features(400, 8, 2)), (features(count, 8, 1), features(count, 8, 1) * 1.5),
                 (torch.ones(count, 8), features(400, 8, 2)), (torch.ones(count, 8), torch.zeros(9, 8))]:
        a, b = a.double(), b.double()
        s1, s2 = np.cov(a.numpy().T), np.cov(b.numpy().T)
        with np.errstate(all="ignore"):
            root = scipy.linalg.sqrtm(s1 @ s2 + 1e-12 * np.eye(8))  # scipy's root of a singular matrix is not defined
        expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * root).real
        assert common.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_frechet_distance_against_torchmetrics():
    a, b = features(300, 8, 1), features(200, 8, 2)
    metric = FrechetInceptionDistance(Given(), normalize=True, input_img_size=(1, 1, 8))
    metric.set_dtype(torch.float64)
    metric.update(a.view(-1, 1, 1, 8), real=False)
    metric.update(b.view(-1, 1, 1, 8), real=True)
    assert common.frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_frechet_distance_of_gaussians():
    """N(m, diag(s^2)) and N(0, I): |m|^2 + sum (s - 1)^2; samples with exactly these moments."""
    raw = features(1000, 4, 3).double()
    white = (raw - raw.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    m, s = torch.tensor([1.0, -2.0, 0.0, 0.5]).double(), torch.tensor([1.0, 2.0, 0.5, 0.0]).double()
    assert common.frechet_distance(white * s + m, white) == pytest.approx((m.square() + (s - 1).square()).sum().item())
    assert common.frechet_distance(white, white) == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
def test_inception_score_against_torchmetrics():
    logits = features(500, 10, 4)
    metric = InceptionScore(Given(), splits=1)
    metric.update(logits.view(-1, 1, 1, 10))
    assert common.inception_score(logits.softmax(1)) == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_inception_score_closed_forms():
    sure = torch.eye(10).repeat(7, 1)
    assert common.inception_score(sure) == pytest.approx(10)
    assert common.inception_score(torch.eye(10)[[1, 7] * 50]) == pytest.approx(2), "two classes of ten"
    assert common.inception_score(torch.eye(10)[[3] * 50]) == common.inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1)


@pytest.mark.parametrize("count, spread", [(700, 1.0), (1200, 0.3), (40, 3.0)])
def test_precision_and_recall_against_prdc(count, spread):
    """More samples than a block of 500 holds, in both sets."""
    base = features(1200, 8, 5)
    real, fake = base[:1100], base[:count] * spread + 0.1 * features(count, 8, 6)
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=common.NEIGHBOURS)
    assert common.precision_recall(fake, real) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)


def test_precision_and_recall_closed_forms():
    line = torch.arange(20.0)[:, None]
    assert common.precision_recall(line, line) == (1, 1)
    assert common.precision_recall(line + 100, line) == (0, 0)
    few = torch.tensor([[10.0]]).expand(20, 1)  # one sample, twenty times: precise, and covers nothing but itself
    assert common.precision_recall(few, line) == (1, 1 / 20)


def test_divergence_against_scipy():
    counts, shares = torch.tensor([5, 0, 3, 2]), torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert common.divergence(counts, shares) == pytest.approx(scipy.stats.entropy(counts, shares), rel=1e-6)
    assert common.divergence(torch.zeros(4), shares) is None
    assert common.divergence(counts, torch.tensor([0.5, 0.5, 0.0, 0.0])) is None
    assert common.divergence(torch.tensor([5, 5, 0]), torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("score", [
    common.inception_score, lambda samples: common.frechet_distance(samples, torch.rand(9, 2)),
    lambda samples: common.precision_recall(samples, torch.rand(9, 2)),
    lambda samples: common.mixture_scores(samples, *common.MIXTURES["ring"]),
    lambda samples: common.ImageScorer.read(None, [samples.view(1, 1, 3, 6)])],
    ids=["IS", "FD", "precision", "points", "images"])
def test_what_is_not_finite_has_no_score(score, value, capsys):
    """One such number is enough, whichever score comes first: one line, exit code 1."""
    samples = torch.rand(9, 2)
    samples[4, 1] = value
    with pytest.raises(SystemExit) as stop:
        score(samples)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.endswith("samples are not finite numbers: there is nothing to score")


# ----------------------------------------------------------------------------------------- points

@pytest.mark.parametrize("name, modes", [("gaussians", 8), ("ring", 8), ("grid", 25)])
def test_mixtures(name, modes):
    """As many distinct centres as announced, whose 3-sigma discs do not touch; a perfect sampler scores what it must."""
    centres, sigma = common.MIXTURES[name]
    assert centres.shape == (modes, 2) and nn.functional.pdist(centres).min() > 6 * sigma
    data = common.load_data(name, "unused")
    assert len(data.samples) == (60_000 if name == "gaussians" else 100_000)
    offsets = (data.samples - centres[data.labels]) / sigma
    assert offsets.mean(0).abs().max() < 0.02 and (offsets.std(0) - 1).abs().max() < 0.02
    floor = common.PointScorer(Namespace(dataset=name)).floor
    assert floor["modes"] == modes
    assert floor["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.001), "chi-squared of two dimensions at 3 sigma"
    assert floor["KL"] == pytest.approx((modes - 1) / (2 * 2500), rel=0.2), "the bias of a plug-in estimate"


def test_ring_and_grid_are_pacgans():
    ring, sigma = common.MIXTURES["ring"]
    assert torch.allclose(ring.norm(dim=1), torch.ones(8)) and sigma == 0.01
    grid, sigma = common.MIXTURES["grid"]
    grid, sigma = 4 * grid, 4 * sigma
    assert {tuple(point) for point in grid.tolist()} == {(x, y) for x in (-4, -2, 0, 2, 4) for y in (-4, -2, 0, 2, 4)}
    assert sigma == 0.05


@pytest.mark.parametrize("name", common.MIXTURES)
def test_planted_collapse_of_points(name):
    centres, sigma = common.MIXTURES[name]
    kept = centres[:len(centres) // 2].repeat(50, 1)
    scores = common.mixture_scores(kept, centres, sigma)
    assert scores["modes"] == len(centres) // 2 and scores["high_quality"] == 1
    assert scores["KL"] == pytest.approx(math.log(len(centres) / (len(centres) // 2)), rel=1e-6)
    one = torch.cat([kept, centres[-1:]])  # a single point captures a mode
    assert common.mixture_scores(one, centres, sigma)["modes"] == len(centres) // 2 + 1
    edge = centres[:1] + torch.tensor([[2.99 * sigma, 0], [3.01 * sigma, 0], [2.2 * sigma, 2.2 * sigma]])
    scores = common.mixture_scores(edge, centres, sigma)  # a disc, no square
    assert scores["counts"][0] == 1 and scores["high_quality"] == pytest.approx(1 / 3)
    nowhere = common.mixture_scores(torch.full((10, 2), 99.0), centres, sigma)
    assert (nowhere["modes"], nowhere["high_quality"], nowhere["KL"]) == (0, 0, None)


# ------------------------------------------------------------------------------------- classifier

@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def few_digits(monkeypatch, cache):
    """12,000 training and 1,000 test digits, and a cache of classifiers of our own."""
    draw = common.draw_digits
    count = {"train": 12_000, "test": 1_000}
    monkeypatch.setattr(common, "draw_digits", lambda split: tuple(part[:count[split]].clone() for part in draw(split)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def scorer(few_digits):
    return common.make_scorer(Namespace(dataset="digits", data_dir="unused", channels=1, classes=10, eval_interval=1))


@pytest.mark.slow
def test_classifier_reads_99_percent(monkeypatch, tmp_path, capsys):
    """On all drawn digits; trained once, the same again, without a random number of the training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = Namespace(dataset="digits", data_dir="unused", channels=1, classes=0, eval_interval=None)
    random = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", None)  # it would seed the GPU's random numbers as well
    first = common.make_scorer(args)
    assert capsys.readouterr().out == "", "trained when it is needed"
    assert first.about["classifier"]["accuracy"] >= 0.99
    assert torch.equal(random, torch.get_rng_state())
    assert "training a classifier of digits, once" in capsys.readouterr().out
    assert common.make_scorer(args).about == first.about
    assert capsys.readouterr().out == ""
    assert first.floor["IS"] > 9.5 and first.floor["classes"] == 10 and first.floor["KL"] < 0.01
    assert min(first.floor["precision"], first.floor["recall"]) > 0.8


def test_cache_of_classifiers(few_digits, monkeypatch, tmp_path, capsys):
    trained = []
    network = common.make_classifier().eval()

    def train(images, labels):
        trained.append(len(images))
        torch.manual_seed(0)
        return network

    monkeypatch.setattr(common, "train_classifier", train)
    monkeypatch.setattr(common.inspect, "getsource", lambda function: recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, recipe = common.load_data("digits", "unused"), "one"
    torch.manual_seed(1)
    random = torch.get_rng_state()
    for _ in range(2):
        common.load_classifier(data)
    assert len(trained) == 1 and torch.equal(random, torch.get_rng_state()), "a training keeps its random numbers"
    recipe = "two"
    common.load_classifier(data)
    data.samples[5] += 1
    common.load_classifier(data)
    data.labels[5] += 1
    common.load_classifier(data)
    assert len(trained) == 4, "another recipe, other images, other labels: another classifier"
    files = sorted((tmp_path / "cache" / "gan-scripts").iterdir())
    assert len(files) == 4 and all(path.suffix == ".pt" for path in files)
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # a single bit of a weight
        path.write_bytes(content)
    capsys.readouterr()
    common.load_classifier(data)
    assert len(trained) == 5 and "training a classifier of digits" in capsys.readouterr().out
    common.load_classifier(data)
    assert len(trained) == 5
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    common.load_classifier(data)
    assert "the classifier cannot be kept in" in capsys.readouterr().out


def test_held_out_images_are_a_sixth_that_the_classifier_has_not_seen(few_digits, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "load_classifier", lambda data: seen.append(data) or common.make_classifier().eval())
    scorer = common.make_scorer(Namespace(dataset="digits", data_dir="unused", channels=1, classes=0, eval_interval=None))
    images, _ = common.draw_digits("train")
    assert not seen and scorer.classifier
    assert torch.equal(scorer.held_out.samples, images[5::6]) and len(seen[0].samples) == 10_000
    rest = torch.cat([images[start::6] for start in range(5)])
    assert torch.equal(seen[0].samples.flatten(1).sum(1).sort()[0], rest.flatten(1).sum(1).sort()[0])


@pytest.mark.parametrize("size, channels", [(32, 1), (64, 1), (128, 3), (28, 3)])
def test_larger_images_are_read_as_they_were(few_digits, size, channels):
    """At the size of 02's ladder and of 06: the classifier sees the 28x28 pixels again, or nearly."""
    plain, large = (common.make_scorer(Namespace(dataset="digits", data_dir="unused", classes=0, eval_interval=None, **shape))
                    for shape in (dict(channels=1), dict(image_size=size, channels=channels)))
    if size <= 32:
        torch.testing.assert_close(large.reference, plain.reference)
    assert next(large.real(large.test)).shape == (250, channels, size, size)
    assert abs(large.about["classifier"]["accuracy"] - plain.about["classifier"]["accuracy"]) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_read_as_a_file_would_hold_them(scorer, channels):
    """Rounded to 256 levels and cut off at black and white: nothing finer or beyond reaches the classifier."""
    images = torch.arange(256, dtype=torch.uint8).repeat(49).view(16, 1, 28, 28)
    rest = torch.linspace(-0.45, 0.45, images.numel()).view(images.shape)
    samples = ((images + rest) / 127.5 - 1).expand(-1, channels, -1, -1)
    features, probabilities = scorer.read([torch.where(images == 255, 2, torch.where(images == 0, -2, samples))])
    torch.testing.assert_close(features, scorer.classifier[:-1](images / 255))
    torch.testing.assert_close(probabilities, scorer.classifier(images / 255).softmax(1))


# ---------------------------------------------------------------------------------- planted sets

def score(scorer, images, labels=None):
    return scorer.compare(*scorer.read((images.float() / 127.5 - 1).split(250)), labels)


def test_planted_sets(scorer):
    """Ones and sevens; one image per class; noise; one grey image: what each score sees, and what it does not."""
    images, labels, floor = scorer.held_out.samples[:1000], scorer.held_out.labels[:1000], scorer.floor
    scorer.args.classes = 0
    real = score(scorer, images)
    two = score(scorer, torch.cat([images[(labels == 1) | (labels == 7)].repeat(6, 1, 1, 1)[:995], images[labels == 3][:5]]))
    assert two["classes"] == 2 and two["counts"][3] >= 4, "five threes are less than a tenth of their share"
    assert 1.8 < two["IS"] < 2.4, "exercise 2"
    assert two["KL"] == pytest.approx(math.log(5), abs=0.15) and two["FD"] > 10 * floor["FD"]
    assert two["precision"] > 0.8 and two["recall"] < 0.4
    clearest = scorer.held_out_features[1][:1000].argmax(0)
    ten = score(scorer, images[clearest].repeat(100, 1, 1, 1))
    assert ten["IS"] > 0.95 * real["IS"] and ten["classes"] == 10, "the Inception Score does not see it"
    assert ten["FD"] > 5 * real["FD"] and ten["recall"] < 0.1
    noise = score(scorer, torch.randint(256, (1000, 1, 28, 28)))
    grey = score(scorer, torch.full((1000, 1, 28, 28), 128))
    for scores in (noise, grey):
        assert scores["FD"] > 20 * real["FD"] and scores["precision"] < 0.5 and scores["recall"] < 0.1
        assert all(math.isfinite(value) for name, value in scores.items() if name != "counts")
    assert grey["IS"] == pytest.approx(1) and grey["classes"] == 1


class Principal(nn.Module):
    """A conditional generator trained by least squares: the principal components of each class, z their weights."""

    def __init__(self, images, labels, count=60):
        super().__init__()
        points = images.float().flatten(1) / 127.5 - 1
        means, components = [], []
        for digit in range(10):
            members = points[labels == digit]
            means.append(members.mean(0))
            _, sizes, directions = torch.linalg.svd(members - means[-1], full_matrices=False)
            components.append(sizes[:count, None] * directions[:count] / len(members)**0.5)
        self.means, self.components = nn.Parameter(torch.stack(means)), nn.Parameter(torch.stack(components))

    def forward(self, z, labels):
        pixels = self.means[labels] + torch.einsum("nk,nkp->np", z, self.components[labels])
        return pixels.view(-1, 1, 28, 28)


def pipeline_of(scorer):
    args = Namespace(latent_dim=60, classes=10, seed=0, dataset="digits")
    return common.Pipeline(Principal(*common.draw_digits("train")), load_script("02_dcgan").generate_noise, args)


def test_damage_shows_in_every_score(scorer):
    """Noise on the weights of a trained generator makes every score worse, step by step."""
    pipeline = pipeline_of(scorer)
    clean = [part.detach().clone() for part in pipeline.generator.parameters()]
    series = []
    for amount in (0, 0.05, 0.1, 0.2):
        torch.manual_seed(0)
        for part, value in zip(pipeline.generator.parameters(), clean):
            part.data = value + amount * torch.randn_like(value)
        series.append(scorer(pipeline))
    for worse, better in zip(series[1:], series):
        for name in ("IS", "precision", "recall", "as_asked"):
            assert worse[name] < better[name], name
        for name in ("FD", "FD_held_out", "KL"):
            assert worse[name] > better[name], name
    assert series[0]["as_asked"] > 0.95 and series[0]["classes"] == 10 > series[-1]["classes"]
    assert series[0]["FD"] > scorer.floor["FD"] and series[0]["recall"] < scorer.floor["recall"]


def test_another_reference_shows(scorer):
    """Zeros to fours as the reference for all ten digits; labels asked for that the samples do not have."""
    pipeline = pipeline_of(scorer)
    before = scorer(pipeline)
    low = scorer.test.labels < 5
    fingerprint = scorer.about["classifier"]["fingerprint"]
    scorer.reference = tuple(part[low] for part in scorer.reference)
    half = scorer(pipeline)
    assert half["recall"] != before["recall"]
    assert half["FD"] > 1.5 * before["FD"] and half["precision"] < 0.8 * before["precision"]
    assert half["FD_held_out"] == before["FD_held_out"] and half["IS"] == before["IS"], "these have no part in it"
    scorer.held_out_features = scorer.reference
    assert scorer(pipeline)["FD_held_out"] == half["FD"], "best.pt is chosen by held-out images"
    asked = scorer.test.labels
    scorer.test = common.Data("", scorer.test.samples, asked % 5)
    samples = [pipeline(pipeline.noise(1000), asked)]
    shares = scorer.compare(*scorer.read(samples), asked % 5)
    with pytest.MonkeyPatch.context() as patch:  # another classifier, labels that are wrong
        digits = common.draw_digits
        patch.setattr(common, "draw_digits", lambda split: (digits(split)[0], (digits(split)[1] + 1) % 10))
        patch.setattr(common, "load_classifier", lambda data: common.make_classifier().eval())
        about = common.make_scorer(scorer.args).about["classifier"]
        assert about["fingerprint"] != fingerprint and about["accuracy"] < 0.5
    assert shares["KL"] is None and shares["classes"] == 5 and shares["as_asked"] < 0.6


# ------------------------------------------------------------------------------------------- runs

@pytest.fixture
def train(tmp_path, few_digits, monkeypatch):
    """Run a script on few digits in this process, without drawing its curves; returns its folder."""
    monkeypatch.setattr(common, "save_curves", lambda history, plots, path: path.touch())

    def call(script, *arguments):
        load_script(script).main([*QUICK, *map(str, arguments), "--output-dir", str(tmp_path)])
        return max(tmp_path.glob(f"{script}*"))
    call.folder = tmp_path
    return call


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def table(output):
    """The rows of the last table on the terminal: {title: cells}."""
    rows = {}
    for line in output[output.rindex("samples against"):].splitlines():
        for title, form, best in common.SCORES.values():
            if line.startswith(title):
                rows[title] = line.removeprefix(title).removesuffix(best).split()
    return rows


def test_scores_of_a_run(train, capsys):
    """Every other epoch and at the end: log, table, metrics.json, best.pt; --evaluate repeats them to the digit."""
    folder = train("04_cgan", "--epochs", 5, "--eval-interval", 2)
    output = capsys.readouterr().out
    assert "data    2000 training samples are held out to choose best.pt" in output
    assert "data    digits, 10000 samples of [1, 28, 28], batch 16" in output
    log = read_log(folder)
    scored = [row for row in log if "FD" in row]
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5] and [row["epoch"] for row in scored] == [2, 4, 5]
    assert output.count("\nscores  IS") == 2
    best = min(scored, key=lambda row: row["FD_held_out"])
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, row in [("checkpoint.pt", log[-1]), ("best.pt", best)]:
        assert {key: row[key] for key in metrics[name]} == metrics[name] and metrics[name]["epoch"] == row["epoch"]
        assert torch.load(folder / name, weights_only=True)["epoch"] == row["epoch"]
    assert metrics["samples"] == 1000 and metrics["seed"] == 0 and len(metrics["classifier"]["fingerprint"]) == 8
    assert set(metrics["real images"]) == {"IS", "FD", "FD_held_out", "precision", "recall", "classes", "KL", "as_asked", "counts"}
    rows = table(output)
    for name, (title, form, _) in common.SCORES.items():
        columns = [metrics["checkpoint.pt"], metrics["best.pt"], metrics["real images"]]
        expected = [format(column[name], form) if name in column else "-" for column in columns] if name in columns[0] else None
        assert rows.get(title) == expected
    assert metrics["classifier"]["fingerprint"] in output

    before = (folder / "metrics.json").read_bytes()
    load_script("04_cgan").main(["--device", "cpu", "--from", str(folder), "--evaluate"])
    again = capsys.readouterr().out
    assert table(again) == rows and (folder / "metrics.json").read_bytes() == before
    assert str(folder / "metrics.json") in again
    load_script("04_cgan").main(["--device", "cpu", "--from", str(folder / "best.pt"), "--evaluate", "--seed", "1", "--data-dir", "elsewhere"])
    other = json.loads((folder / "metrics-best.json").read_text())
    assert "checkpoint.pt" not in other and other["seed"] == 1
    assert other["best.pt"]["FD"] != metrics["best.pt"]["FD"] == pytest.approx(other["best.pt"]["FD"], rel=0.2)
    assert not list(folder.glob("*.tmp")) and not list((folder / "samples").glob("generated*"))
    load_script("04_cgan").main(["--device", "cpu", "--from", str(folder / "best.pt"), "--evaluate", "--class", "3"])
    assert [path.name for path in (folder / "samples").glob("generated*")] == ["generated-64-class3-seed0-best.png"]
    assert (folder / "metrics.json").read_bytes() == before
    (folder / "best.pt").write_bytes(b"damaged")
    assert "best.pt does not fit its own options" in refuse(capsys, "04_cgan", "--from", folder, "--evaluate")
    assert (folder / "metrics.json").read_bytes() == before
    assert "--data-dir elsewhere contradicts the run" in refuse(capsys, "04_cgan", "--from", folder, "--data-dir", "elsewhere")


def test_curves_hold_the_trajectory(train, monkeypatch):
    drawn = []
    save = common.save_curves
    monkeypatch.setattr(common, "save_curves", lambda history, plots, path: (drawn.append(plots), save(history, plots, path)))
    train("03_wgan_gp", "--epochs", 2)
    assert [plot[0] for plot in drawn[-1]][-1] == "loss", "one point is no trajectory"
    train("03_wgan_gp", "--epochs", 2, "--eval-interval", 1)
    title, names, guides = drawn[-1][-3]
    assert (title, names) == ("Frechet distance", ["FD"]) and guides["FD, real images"] > 0
    assert len(drawn[-1]) == 7


def test_scoring_leaves_the_training_alone(train):
    """No scores, or scores after each epoch, train the same; so does a moving average, which is what is scored."""
    names = ["W", "penalty", "grad_norm", "loss_C", "loss_G"]
    for data, settings in [("digits", ([], ["--eval-interval", 0], ["--ema-decay", 0.9])),
                           ("ring", (["--eval-interval", 0], ["--eval-interval", 1]))]:
        logs = [read_log(train("03_wgan_gp", "--epochs", 2, "--dataset", data, *flags)) for flags in settings]
        rows = [[{name: row[name] for name in names} for row in log] for log in logs]
        assert all(row == rows[0] for row in rows)


def test_best_is_chosen_by_held_out_images_alone(train, monkeypatch):
    """Of FD_held_out 3, 1, 2 the second epoch's is best.pt, though its distance to the test images is the largest."""
    values = iter([(3, 1), (1, 3), (2, 2)])
    compare, held_out = common.ImageScorer.compare, []

    def faked(scorer, pipeline):
        held_out.append(scorer.held_out)
        chosen, shown = next(values)
        return {**compare(scorer, *scorer.reference, scorer.test.labels), "FD": shown, "FD_held_out": chosen}

    seen = []
    batches = common.Data.batches
    monkeypatch.setattr(common.Data, "batches", lambda data, size: seen.append(data) or batches(data, size))
    monkeypatch.setattr(common.ImageScorer, "__call__", faked)
    folder = train("03_wgan_gp", "--epochs", 3, "--eval-interval", 1)
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == 2
    assert json.loads((folder / "metrics.json").read_text())["best.pt"]["epoch"] == 2
    kept, trained = ({image.numpy().tobytes() for image in data.samples} for data in (held_out[0], seen[0]))
    assert len(kept) > 1900 and not kept & trained, "what chooses was not trained on"


def test_moving_average(train, tmp_path):
    """After every step the mean of all so far, with weights 1, 0.9, 0.81, ... back from it; it is what is scored, drawn and kept."""
    followed, seen = [], []
    update = common.update_average

    def follow(average, generator, decay, step):
        update(average, generator, decay, step)
        seen.append(snapshot(generator.state_dict().items()))
        assert step == len(seen)
        weights = [0.9**age for age in reversed(range(step))]
        for name, value in average.state_dict().items():
            mean = sum(weight * state[name] for weight, state in zip(weights, seen)) / sum(weights)
            torch.testing.assert_close(value, mean if value.is_floating_point() else seen[-1][name])
        followed.append(average)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "update_average", follow)
        folder = train("03_wgan_gp", "--epochs", 2, "--ema-decay", 0.9, "--lr-g", 0.01)
    assert len(followed) == 4 and len(set(map(id, followed))) == 1
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, checkpoint["average"][name]) for name, value in followed[0].state_dict().items())
    assert unchanged(seen[-1], checkpoint["generator"]), "taken after the step, not before"
    assert not torch.equal(checkpoint["average"]["model.0.weight"], checkpoint["generator"]["model.0.weight"])
    plain = train("03_wgan_gp", "--epochs", 2, "--lr-g", 0.01)
    assert (folder / "samples" / "final.png").read_bytes() != (plain / "samples" / "final.png").read_bytes()
    assert read_log(folder)[-1]["FD"] != read_log(plain)[-1]["FD"]
    assert "average" not in torch.load(plain / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("decay, expected", [(1, [1, 3 / 4, 2 / 4, 1 / 4]), (0.5, [1, 1, 1, 0.5]), (0, [1, 1, 1, 1])])
def test_learning_rates_fall_to_0(train, monkeypatch, decay, expected):
    """Linearly over the last part of the training, every optimizer from its own rate."""
    module, rates = load_script("03_wgan_gp"), []
    step = module.generator_step
    monkeypatch.setattr(module, "generator_step", lambda generator, critic, optimizer, z: (
        rates.append(optimizer.param_groups[0]["lr"]), step(generator, critic, optimizer, z))[1])
    critic_rates = []
    critic_step = module.critic_step
    monkeypatch.setattr(module, "critic_step", lambda generator, critic, optimizer, *rest: (
        critic_rates.append(optimizer.param_groups[0]["lr"]), critic_step(generator, critic, optimizer, *rest))[1])
    train("03_wgan_gp", "--epochs", 2, "--lr-decay", decay, "--lr-g", 0.01, "--lr-d", 0.02, "--eval-interval", 0)
    assert rates == pytest.approx([0.01 * part for part in expected])
    assert critic_rates[::5] == pytest.approx([0.02 * part for part in expected])


def test_points_are_scored(train, capsys):
    folder = train("05_sn_label_smoothing", "--dataset", "ring", "--epochs", 2, "--eval-interval", 1)
    output = capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["against"] == "the 8 Gaussians of ring" and metrics["samples"] == 2500 and not (folder / "best.pt").exists()
    assert metrics["perfect sampler"]["modes"] == 8 and sum(metrics["checkpoint.pt"]["counts"]) <= 2500
    assert table(output)["modes captured"][1] == "8"
    assert [set(row) >= {"modes", "high_quality", "KL"} for row in read_log(folder)] == [True, True]


def test_ctrl_c_keeps_the_scores(train, monkeypatch, capsys):
    """While the curves are drawn after the second scores: they are in the log, and in metrics.json beside the floor."""
    def interrupted(run):
        if len(run.history) == 2 and "FD" in run.history[-1] and not drawn:
            drawn.append(run)
            raise KeyboardInterrupt

    drawn = []
    monkeypatch.setattr(common.Run, "_curves", interrupted)
    with pytest.raises(SystemExit) as stop:
        train("03_wgan_gp", "--epochs", 3, "--eval-interval", 1)
    folder = next(iter(Path(capsys.readouterr().out.partition("output  ")[2].partition(":")[0]).parent.iterdir()))
    assert stop.value.code == 130 and read_log(folder)[-1]["epoch"] == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["checkpoint.pt"]["epoch"] == 2 and metrics["checkpoint.pt"]["FD"] == read_log(folder)[-1]["FD"]


def test_scores_come_when_all_else_is_safe(train, monkeypatch):
    """The classifier is trained for the first score; at the end that is after checkpoint, log and pictures."""
    seen, load = [], common.load_classifier

    def spy(data):
        folder = max(train.folder.glob("03_wgan_gp*"))
        seen.append({path.name for path in (folder / "samples").iterdir()} | {path.name for path in folder.iterdir()})
        return load(data)

    monkeypatch.setattr(common, "load_classifier", spy)
    train("03_wgan_gp", "--epochs", 2)
    assert len(seen) == 1 and seen[0] >= {"checkpoint.pt", "log.jsonl", "curves.png", "final.png", "progress.gif", "latent_walk.png"}


def refuse(capsys, script, *arguments, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_script(script).main([str(argument) for argument in arguments])
    assert stop.value.code == code
    line, = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_scored_says_so(few_digits, monkeypatch, tmp_path, capsys):
    module = load_script("03_wgan_gp")
    draw = common.draw_digits
    monkeypatch.setattr(common, "draw_digits", lambda split: tuple(part[:100] for part in draw(split)))
    line = refuse(capsys, "03_wgan_gp", *QUICK, "--epochs", 1, "--output-dir", tmp_path)
    assert "100 training and 100 test images are too few to score samples with; --eval-interval 0" in line
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(common, "draw_digits", lambda split: tuple(part[:{"train": 600, "test": 50}[split]] for part in draw(split)))
    module.main([*QUICK, "--epochs", "1", "--output-dir", str(tmp_path)])
    folder = tmp_path / "03_wgan_gp-digits-0001"
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["generator"]["model.0.bias"][:] = math.nan
    torch.save(checkpoint, folder / "checkpoint.pt")
    before = (folder / "metrics.json").read_bytes()
    assert "weights that are no finite numbers" in refuse(capsys, "03_wgan_gp", "--from", folder, "--evaluate")
    assert (folder / "metrics.json").read_bytes() == before


def test_images_of_your_own_have_no_scores(few_digits, tmp_path, capsys):
    for index, image in enumerate(common.draw_digits("test")[0][:20]):
        save_image(image / 255, tmp_path / f"{index}.png")
    load_script("02_dcgan").main(["--dataset", "folder", "--data-dir", str(tmp_path), "--epochs", "1", "--batch-size", "8",
                                  "--max-batches", "1", "--output-dir", str(tmp_path / "runs")])
    assert "scores  none: images of your own have no test images" in capsys.readouterr().out
    folder = tmp_path / "runs" / "02_dcgan-folder-0001"
    assert "images of your own have no test images" in refuse(capsys, "02_dcgan", "--from", folder, "--evaluate")
    assert "--eval-interval: images of your own have no test images" in refuse(
        capsys, "02_dcgan", "--dataset", "folder", "--data-dir", tmp_path, "--eval-interval", 5, "--batch-size", 8, "--output-dir", tmp_path / "no")
    assert not list((tmp_path / "no").iterdir())


def test_the_code_of_exercise_2_runs(few_digits, monkeypatch, tmp_path, capsys):
    """As printed in docs/exercises.md, but on drawn digits."""
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count('"mnist"') == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"mnist"', '"digits"').replace("repeat(1000", "repeat(100"), "exercise 2", "exec"), {})  # noqa: S102
    output = capsys.readouterr().out.splitlines()
    real, two = (eval(line.partition("{")[2].join("{}").replace("}}", "}")) for line in output if line.startswith(("real", "ones")))
    assert (real["classes"], two["classes"]) == (10, 2) and two["IS"] < 2.5 and real["IS"] > 9
    clusters = [json.loads(line.partition(":")[2]) for line in output if line.startswith("k-means")]
    assert len(clusters) == 2 and all(len(sizes) == 10 and sizes[0] > 0 for sizes in clusters), "k-means does not tell"
    assert (tmp_path / "ones_and_sevens.png").exists()
