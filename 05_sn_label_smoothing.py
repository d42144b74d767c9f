"""Spectral normalisation, label smoothing and the text's other remedies.

Text: chapter 3, section 3.4 (実装例6 and label smoothing), the causes and cures (原因と対策) of
3.2, 演習問題2 and 3; chapter 11, 11.2.1 (real labels from 0.8 to 1.2).

    W <- W / sigma(W),  sigma(W) = max_h ||W h|| / ||h||
        スペクトルノルム (arXiv 1802.05957): the largest singular value (最大特異値), found by power
        iteration: one step per forward pass in training (演習問題3)
    L_D = mean(BCE(D(x), a) + BCE(D(G(z)), b)) / 2,  BCE(D, t) = -t log D - (1 - t) log(1 - D)
    L_G = mean(BCE(D(G(z)), 1))
        non-saturating, never smoothed

    --spectral-norm on | off                 every layer of D divided by its largest singular value
    --label-smoothing none                   a = 1, b = 0
                      two-sided              a = 0.9, b = 0.1         3.4's table
                      one-sided              a = 0.9, b = 0           3.4's table
                      random                 a ~ U(0.8, 1.2) per sample, b = 0    11.2.1
    --minibatch-discrimination on | off      D sees how close the samples of its batch are
    --ttur on | off                          two learning rates: 4e-4 for D, 1e-4 for G
    --n-critic N                             N updates of D for one of G (演習問題2's D_steps)

    python 05_sn_label_smoothing.py                         spectral normalisation, no other cure
    python 05_sn_label_smoothing.py --spectral-norm off     all off: the loss of 02, another D
    python 05_sn_label_smoothing.py --dataset gaussians --minibatch-discrimination on
        実装例3's 8 Gaussians, coordinates divided by 2

At the equilibrium D = (a + b) / 2: 0.5, but 0.45 with one-sided labels, where L_G is 0.799
(erratum 42). sigma is that of the kernel as a matrix; the convolution as a map may stretch further
(erratum 32). Differs from the text: 実装例6 has a discriminator alone, so G is 実装例4's and the
step is 3.2's, with its own z for each update; spectral_norm is the parametrization (erratum 33);
TTUR means learning rates (erratum 35); random labels may make L_D negative.
"Erratum N" is a row of docs/errata.md.
"""

import math

import common

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# ------------------------------------------------------------------------------- hyperparameters
# The constants of 02 and, for points, of 01. For images D is 実装例6's, not 02's: to see what one
# cure does, compare two runs of this script, not one with a run of 02. An epoch is N // batch
# steps of G, each after n_critic of D; a last, smaller batch is left out.
CONSTANTS = {
    "dcgan": dict(epochs=5, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                  latent_dim=100, spectral_norm="on", label_smoothing="none",
                  minibatch_discrimination="off", ttur="off", n_critic=1),
    "points": dict(epochs=50, batch_size=256, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                   latent_dim=100, spectral_norm="on", label_smoothing="none",
                   minibatch_discrimination="off", ttur="off", n_critic=1),
}
TTUR = dict(lr_g=1e-4, lr_d=4e-4)   # 演習問題2, arXiv 1706.08500; values: arXiv 1805.08318
LABELS = {"none": (1.0, 1.0, 0.0), "two-sided": (0.9, 0.9, 0.1), "one-sided": (0.9, 0.9, 0.0),
          "random": (0.8, 1.2, 0.0)}    # lowest a, highest a, b
ROWS, ROW_DIM = 16, 5               # of minibatch discrimination; ours, the paper leaves them open

SWITCH = dict(choices=["on", "off"])
FLAGS = [
    ("training", "--spectral-norm", "divide D's layers by their largest singular values", SWITCH),
    ("training", "--label-smoothing", "D's labels; random: the loss may be negative",
     dict(choices=list(LABELS))),
    ("training", "--minibatch-discrimination", "let D compare the samples of a batch", SWITCH),
    ("training", "--ttur", "learning rates 4e-4 for D and 1e-4 for G", SWITCH),
    ("training", "--n-critic", "updates of D per update of G", common.COUNT),
]


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """実装例4's generator, as in 02: z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 128 * 7 * 7), nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),                                    # [N, 128, 14, 14]
            nn.Conv2d(128, 128, 3, stride=1, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Upsample(scale_factor=2),                                    # [N, 128, 28, 28]
            nn.Conv2d(128, 64, 3, stride=1, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 1, 3, stride=1, padding=1), nn.Tanh())


class Discriminator(nn.Sequential):
    """実装例6 (識別器, SpectralNormDiscriminator): images [N, 1, 28, 28] -> logits [N, 1].

    2,755,009 parameters (erratum 30). normalise: spectral_norm, or nn.Identity(), which returns
    the layer as it is.
    """

    def __init__(self, normalise=spectral_norm, minibatch=False):
        super().__init__(
            normalise(nn.Conv2d(1, 64, 4, stride=2, padding=1)),            # [N, 64, 14, 14]
            nn.LeakyReLU(0.2),
            normalise(nn.Conv2d(64, 128, 4, stride=2, padding=1)),          # [N, 128, 7, 7]
            nn.LeakyReLU(0.2),
            normalise(nn.Conv2d(128, 256, 4, stride=2, padding=1)),         # [N, 256, 3, 3]
            nn.LeakyReLU(0.2),
            normalise(nn.Conv2d(256, 512, 4, stride=2, padding=1)),         # [N, 512, 1, 1]
            nn.LeakyReLU(0.2),
            nn.Flatten(), *last_layers(512, normalise, minibatch))


class PointsDiscriminator(nn.Sequential):
    """For points: points [N, 2] -> logits [N, 1]."""

    def __init__(self, normalise=spectral_norm, minibatch=False):
        super().__init__(*common.points_layers(2, normalise),
                         *last_layers(128, normalise, minibatch))


class MinibatchDiscrimination(nn.Module):
    """Features f [N, A] -> [N, A + ROWS]: ROWS numbers per sample say how close the others are.

    Sec. 3.2 of arXiv 1606.03498: M = T(f) has ROWS rows of ROW_DIM numbers; for sample i and row b
    o_b(x_i) = mean_j exp(-||M_ib - M_jb||_1). The paper sums over j; the mean differs by a factor
    and keeps o in (0, 1]. It stands between layers, not at D's input as in 演習問題2 (erratum 34).
    """

    def __init__(self, features, normalise):
        super().__init__()
        self.project = normalise(nn.Linear(features, ROWS * ROW_DIM, bias=False))

    def forward(self, features):
        m = self.project(features).view(-1, ROWS, ROW_DIM).transpose(0, 1)  # [ROWS, N, ROW_DIM]
        closeness = torch.exp(-torch.cdist(m, m, p=1)).mean(2)              # [ROWS, N]
        return torch.cat([features, closeness.T], 1)


def last_layers(features, normalise, minibatch):
    """The end of both discriminators: features [N, features] -> logits [N, 1]."""
    if minibatch:
        return (MinibatchDiscrimination(features, normalise),
                normalise(nn.Linear(features + ROWS, 1)))
    return (normalise(nn.Linear(features, 1)),)


NETWORKS = {"dcgan": (Generator, Discriminator),
            "points": (common.points_generator, PointsDiscriminator)}


def generate_noise(count, args, device, rng=None):
    """Noise z (潜在変数) [count, latent_dim] ~ N(0, I).

    rng: a torch.Generator, PyTorch's source of random numbers.
    """
    return torch.randn(count, args.latent_dim, device=device, generator=rng)


@torch.no_grad()
def spectral_table(discriminator):
    """Per layer of D, by its name: three numbers that differ (erratum 31).

    実装例6 prints frobenius and calls it the spectral norm.

    sigma: the true largest singular value of the weight in use;
    estimate: by power iteration, of the weight as trained; None without spectral_norm;
    frobenius: the norm of the weight in use that torch.norm(weight, p=2) returns.
    """
    discriminator.eval()            # in train mode each access runs a power-iteration step
    table = {}
    for name, layer in discriminator.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            used, estimate = layer.weight.flatten(1).cpu(), None    # [outputs, inputs * kernel]
            if hasattr(layer, "parametrizations"):
                # The weight in use is the trained one divided by the estimate.
                trained = layer.parametrizations.weight.original.cpu()
                estimate = (trained.norm() / used.norm()).item()
            sigma = torch.linalg.matrix_norm(used, 2).item()
            table[name] = {"sigma": sigma, "estimate": estimate, "frobenius": used.norm().item()}
    discriminator.train()
    return table


# ---------------------------------------------------------------------------------------- losses
def discriminator_loss(real_logits, fake_logits, smoothing):
    """L_D with the labels (正解ラベル; 3.4, 11.2.1) of `smoothing`; the logits are [N, 1]."""
    low, high, b = LABELS[smoothing]
    real_label = torch.full_like(real_logits, low)
    if low < high:
        real_label.uniform_(low, high)          # BCE of logits takes labels above 1: erratum 23
    real = F.binary_cross_entropy_with_logits(real_logits, real_label)
    fake_label = torch.full_like(fake_logits, b)
    fake = F.binary_cross_entropy_with_logits(fake_logits, fake_label)
    return (real + fake) / 2


def generator_loss(fake_logits):
    """L_G of 3.2; the logits are [N, 1]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# --------------------------------------------------------------------------------- training step
def discriminator_step(generator, discriminator, optimizer, real, z, smoothing):
    """One optimizer step that lowers L_D; real: [N, 1, 28, 28] or [N, 2], z: [N, latent_dim].

    Returns what to log.
    """
    with torch.no_grad():                           # the text's .detach(): G is not trained here
        fake = generator(z)
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    loss = discriminator_loss(real_logits, fake_logits, smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    d_real, d_fake = real_logits.sigmoid(), fake_logits.sigmoid()
    return {"D(x)": d_real.mean(), "D(G(z))": d_fake.mean(), "loss_D": loss}


def generator_step(generator, discriminator, optimizer, z):
    """One optimizer step that lowers L_G; z: [N, latent_dim]. Returns what to log."""
    loss = generator_loss(discriminator(generator(z)))
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))  # gradients for G only; D is not updated
    optimizer.step()
    return {"loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    parser = common.Parser(__file__, __doc__, CONSTANTS, FLAGS)
    args = parser.options(argv)
    make_generator, make_discriminator = NETWORKS[args.variant]
    if args.ttur == "on":
        if parser.given.keys() & TTUR.keys():
            common.fail("--ttur on sets both learning rates; leave out --lr-g, --lr-d or --ttur")
        vars(args).update(TTUR)

    normalise = spectral_norm if args.spectral_norm == "on" else nn.Identity()
    minibatch = args.minibatch_discrimination == "on"
    layout = dict(device=args.device, memory_format=torch.channels_last)    # faster convolutions
    generator = make_generator(args.latent_dim).to(**layout)
    if args.run:                                    # --from RUN: draw from it, no training
        return common.sample(args, generator, generate_noise)

    discriminator = make_discriminator(normalise, minibatch).to(**layout)
    betas = args.beta1, args.beta2
    # fused=True: a faster Adam
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas, fused=True)

    low, high, b = LABELS[args.label_smoothing]
    d = ((low + high) / 2 + b) / 2                      # D at the equilibrium
    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {f"equilibrium {d}": d}),
             ("loss", ["loss_D", "loss_G"], {f"equilibrium of G {-math.log(d):.3f}": -math.log(d)}),
             ("largest singular value", ["sigma"],
              {"normalised: 1": 1} if args.spectral_norm == "on" else {})]
    run = common.Run(args, generate_noise, plots, generator=generator, discriminator=discriminator,
                     optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    for batches in run.epochs():
        for _ in run.steps():
            # Discriminator, n_critic times: D towards a for real, towards b for fake.
            for _ in range(args.n_critic):
                real, _ = next(batches)
                z = generate_noise(args.batch_size, args, args.device)
                run.record(discriminator_step(generator, discriminator, optimizer_d, real, z,
                                              args.label_smoothing))
            # Generator: D of its samples towards 1.
            z = generate_noise(args.batch_size, args, args.device)
            run.record(generator_step(generator, discriminator, optimizer_g, z))
        table = spectral_table(discriminator)
        run.record({"sigma": torch.tensor(max(row["sigma"] for row in table.values()))})
    print(f"{'layer':12}{'sigma':>12}{'estimate':>12}{'frobenius':>12}")
    for name, row in table.items():
        print(f"{name:12}" + "".join(f"{'-' if value is None else f'{value:.4f}':>12}"
                                     for value in row.values()))


if __name__ == "__main__":
    common.guarded(main)
