"""Vanilla GAN: generator (生成器) against discriminator (識別器).

Text: chapter 3, sections 3.1-3.2 (examples 1-3); chapter 11, sections 11.1-11.2; document 002.

    min_G max_D V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]               minimax game, 3.1, 11.1.1
    Q = -mean(log D(x) + log(1 - D(G(z))))                                    discriminator's cost, 11.1.1
    P = mean(log(1 - D(G(z))))     the saturating loss of the formula         generator's cost, 11.1.1
    P = -mean(log D(G(z)))         the non-saturating loss of the listings    (erratum 9)

At the equilibrium D(x) = D(G(z)) = 0.5: a cross-entropy of ln 2 per term. curves.png draws both.

    python 01_vanilla_gan.py                            chapter 3: one logit, binary cross-entropy
    python 01_vanilla_gan.py --variant two-logit        chapter 11: two logits, cross-entropy, dropout
    python 01_vanilla_gan.py --variant keras            the networks of document 002
    python 01_vanilla_gan.py --dataset gaussians        the eight Gaussians of example 3, really trained on

Differs from the text: chapter 3 trains on noise, here on images (erratum 5); the discriminator returns
logits, not probabilities (erratum 6); each update draws its own noise (3.2 and 11.2 reuse one z). Document
002 updates the discriminator twice per step, on the real and then on the fake batch, generates its fakes
in inference mode and initialises as Keras does; --variant keras takes its networks and constants alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import common

# ------------------------------------------------------------------------------- hyperparameters
# Chapter 3's 3 epochs are 30 steps on noise; 50 show good samples. The 16 of keras are the 30,000
# steps of 32 that document 002 calls epochs (erratum 12). gaussians: ours, for --dataset gaussians.
CONSTANTS = {
    "bce": dict(epochs=50, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                latent_dim=100, noise="normal", slope=0.2, generator_loss="non-saturating"),
    "two-logit": dict(epochs=500, batch_size=300, lr_g=1e-4, lr_d=4e-5, beta1=0.9, beta2=0.999,
                      latent_dim=100, noise="uniform", slope=0.3, generator_loss="non-saturating"),
    "keras": dict(epochs=16, batch_size=32, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                  latent_dim=100, noise="normal", slope=0.2, generator_loss="non-saturating"),
    "gaussians": dict(epochs=50, batch_size=256, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                      latent_dim=100, noise="normal", slope=0.2, generator_loss="non-saturating"),
}


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """Example 1: z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]; 581,264 parameters (erratum 1)."""

    def __init__(self, latent_dim=100, slope=0.2):
        super().__init__(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 256), nn.BatchNorm1d(256), nn.LeakyReLU(slope),
            nn.Linear(256, 512), nn.BatchNorm1d(512), nn.LeakyReLU(slope),
            nn.Linear(512, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class Discriminator(nn.Sequential):
    """Example 1 and document 002: images [N, 1, 28, 28] -> logits [N, 1]; 533,505 parameters."""

    def __init__(self, slope=0.2):
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 512), nn.LeakyReLU(slope),
            nn.Linear(512, 256), nn.LeakyReLU(slope),
            nn.Linear(256, 1))                                  # no Sigmoid: erratum 6


class TwoLogitGenerator(nn.Sequential):
    """11.2.2: z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]; 294,160 parameters."""

    def __init__(self, latent_dim=100, slope=0.3):
        super().__init__(
            nn.Linear(latent_dim, 256), nn.LeakyReLU(slope), nn.BatchNorm1d(256),
            nn.Linear(256, 256), nn.LeakyReLU(slope), nn.BatchNorm1d(256),
            nn.Linear(256, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))      # erratum 24


class TwoLogitDiscriminator(nn.Sequential):
    """11.2.2: images [N, 1, 28, 28] -> logits [N, 2] of the classes 0 fake, 1 real; 133,762 parameters."""

    def __init__(self, slope=0.3):
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 2))


class KerasGenerator(nn.Sequential):
    """Document 002 (erratum 15): z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]; 1,489,936 parameters."""

    def __init__(self, latent_dim=100, slope=0.2):
        def block(inputs, outputs):  # Keras' momentum 0.8 is 0.2 here, and its eps is 1e-3
            return nn.Linear(inputs, outputs), nn.LeakyReLU(slope), nn.BatchNorm1d(outputs, eps=1e-3, momentum=0.2)

        super().__init__(*block(latent_dim, 256), *block(256, 512), *block(512, 1024),
                         nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class PointsGenerator(nn.Sequential):
    """For the eight Gaussians, where the text has no network: z [N, latent_dim] -> points [N, 2], unbounded."""

    def __init__(self, latent_dim=100, slope=0.2):
        super().__init__(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 2))                                  # no Tanh: it cannot reach points beyond 1


class PointsDiscriminator(nn.Sequential):
    """For the eight Gaussians: points [N, 2] -> logits [N, 1]."""

    def __init__(self, slope=0.2):
        super().__init__(
            nn.Linear(2, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 1))


NETWORKS = {"bce": (Generator, Discriminator), "two-logit": (TwoLogitGenerator, TwoLogitDiscriminator),
            "keras": (KerasGenerator, Discriminator), "gaussians": (PointsGenerator, PointsDiscriminator)}


def generate_noise(count, args, device, generator=None):
    """z [count, latent_dim]: N(0, I) in chapter 3 and document 002, U(-1, 1) in 11.2.2."""
    if args.noise == "uniform":
        return torch.rand(count, args.latent_dim, device=device, generator=generator) * 2 - 1
    return torch.randn(count, args.latent_dim, device=device, generator=generator)


# ---------------------------------------------------------------------------------------- losses
def cross_entropy(output, label):
    """Mean cross-entropy of D's output, [N, 1] or [N, 2] logits, against one label: 1 real, 0 fake."""
    if output.size(1) == 2:                                     # 11.2.2
        return F.cross_entropy(output, output.new_full((len(output),), label, dtype=torch.long))
    return F.binary_cross_entropy_with_logits(output, torch.full_like(output, label))       # 3.2


def discriminator_loss(real_output, fake_output):
    """Q of 11.1.1: chapter 11 adds its two terms, chapter 3 takes their mean."""
    total = cross_entropy(real_output, 1) + cross_entropy(fake_output, 0)
    return total if real_output.size(1) == 2 else total / 2


def generator_loss(fake_output, kind):
    """P of 11.1.1, as its listing has it (non-saturating) or as its formula has it (saturating); erratum 9."""
    if kind == "non-saturating":
        return cross_entropy(fake_output, 1)                    # -mean(log D(G(z)))
    return -cross_entropy(fake_output, 0)                       # mean(log(1 - D(G(z))))


def probability(output):
    """D's probability that its input is real, [N]."""
    return output.softmax(1)[:, 1] if output.size(1) == 2 else output.sigmoid().squeeze(1)


# --------------------------------------------------------------------------------- training step
# D first, then G: the order of the listings (erratum 22).
def discriminator_step(generator, discriminator, optimizer, real, z):
    """One step down Q; real: [N, 1, 28, 28] or [N, 2], z: [N, latent_dim]. Returns what the epoch line reports."""
    with torch.no_grad():                                       # the text's .detach(): G is not trained here
        fake = generator(z)
    real_output, fake_output = discriminator(real), discriminator(fake)
    loss = discriminator_loss(real_output, fake_output)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    d_real, d_fake = probability(real_output), probability(fake_output)
    # acc_G looks at fakes from the other side, after this update: erratum 25.
    accuracy = ((d_real > 0.5).float().mean() + (d_fake <= 0.5).float().mean()) / 2
    return {"D(x)": d_real.mean(), "D(G(z))": d_fake.mean(), "acc_D": accuracy, "loss_D": loss}


def generator_step(generator, discriminator, optimizer, z, kind):
    """One step down P of the given kind; z: [N, latent_dim]."""
    output = discriminator(generator(z))
    loss = generator_loss(output, kind)
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))          # D passes the gradient on and stays as it is
    optimizer.step()
    return {"acc_G": (probability(output) > 0.5).float().mean(), "loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    parser = common.Parser(__file__, __doc__, CONSTANTS)
    parser.option("--variant", "networks, loss and constants (default: bce)", choices=["bce", "two-logit", "keras"])
    parser.option("--generator-loss", "P of the listings or of the formula", choices=["non-saturating", "saturating"])
    args = parser.options(argv)
    make_generator, make_discriminator = NETWORKS[args.variant]
    if args.run:
        return common.sample_run(make_generator(args.latent_dim, args.slope), generate_noise, args)

    data = common.prepare(args)
    generator = make_generator(args.latent_dim, args.slope).to(args.device)
    discriminator = make_discriminator(args.slope).to(args.device)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, (args.beta1, args.beta2))

    ln2 = math.log(2)
    guides = {"equilibrium 2 ln 2": 2 * ln2} if args.variant == "two-logit" else {"equilibrium ln 2": ln2}
    guides |= {"equilibrium -ln 2": -ln2} if args.generator_loss == "saturating" else {"equilibrium ln 2": ln2}
    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {"equilibrium 0.5": 0.5}),
             ("accuracy", ["acc_D", "acc_G"], {"equilibrium 0.5": 0.5}),
             ("loss", ["loss_D", "loss_G"], guides)]
    with common.Run(args, data, generate_noise, plots, generator=generator, discriminator=discriminator,
                    optimizer_g=optimizer_g, optimizer_d=optimizer_d) as run:
        for batches in run.epochs():
            for _ in run.steps():
                real, _ = next(batches)
                z = generate_noise(args.batch_size, args, args.device)
                run.record(discriminator_step(generator, discriminator, optimizer_d, real, z))
                z = generate_noise(args.batch_size, args, args.device)
                run.record(generator_step(generator, discriminator, optimizer_g, z, args.generator_loss))


if __name__ == "__main__":
    main()
