"""Vanilla GAN: generator (生成器) against discriminator (識別器).

Text: chapter 3, sections 3.1-3.2 (実装例1 to 3); chapter 11, sections 11.1-11.2; documents 000 and
002 (README.md lists the documents). "Erratum N" is a row of docs/errata.md.

    min_G max_D V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]     minimax game, 3.1, 11.1.1
    Q = -mean(log D(x) + log(1 - D(G(z))))        discriminator's cost (コスト関数), 11.1.1
    P = mean(log(1 - D(G(z))))                    generator's cost, 11.1.1; "saturating": its
                                                  gradient vanishes (勾配消失) where D(G(z))
                                                  is near 0
    P = -mean(log D(G(z)))                        generator's cost in the listings;
                                                  "non-saturating": there its gradient is large
                                                  (erratum 9)

At the equilibrium (Nash均衡) D(x) = D(G(z)) = 0.5: a cross-entropy of ln 2 per term.

    python 01_vanilla_gan.py                            chapter 3: one logit, binary cross-entropy
    python 01_vanilla_gan.py --variant two-logit        chapter 11: two logits, dropout
    python 01_vanilla_gan.py --variant keras            the networks of document 002
    python 01_vanilla_gan.py --dataset gaussians        実装例3's 8 Gaussians, coordinates divided
                                                        by 2; or ring, grid

Differs from the text: the real images are MNIST's, where 実装例2 has noise (erratum 5); the
discriminator returns logits l, numbers before the sigmoid: D = sigmoid(l) (erratum 6); each update
draws its own z (3.2 and 11.2 reuse one); the epoch line shows means over the epoch (実装例2 prints
the losses of one batch); 実装例3 draws 1,000 points anew, here 60,000 stay the same. --variant
keras has the networks and constants of document 002, nothing else of it: 002 samples its batches
with replacement, updates D twice per step, on real and then on fake, generates its fakes in
inference mode, has one Adam for D and the whole model (erratum 15), and has Keras' initial weights
and 1e-7 as Adam's eps.
"""

import common

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------- hyperparameters
# An epoch is N // batch steps: a last, smaller batch is left out.
CONSTANTS = {
    # 実装例2 (3.2). Its 3 epochs are 30 steps on noise; the 50 are ours.
    "bce": dict(epochs=50, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                latent_dim=100, noise="normal", generator_loss="non-saturating"),
    # 11.2.2: NoiseSize, MiniBatchSize, MaxEpoch. lr_d is smaller because D learns better than G.
    # The text names no betas: Adam's defaults.
    "two-logit": dict(epochs=500, batch_size=300, lr_g=1e-4, lr_d=4e-5, beta1=0.9, beta2=0.999,
                      latent_dim=100, noise="uniform", generator_loss="non-saturating"),
    # 002. The 30,000 steps of 32 that it calls epochs are 16 epochs (erratum 12).
    "keras": dict(epochs=16, batch_size=32, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                  latent_dim=100, noise="normal", generator_loss="non-saturating"),
    # For --dataset gaussians, ring and grid; ours.
    "points": dict(epochs=50, batch_size=256, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                   latent_dim=100, noise="normal", generator_loss="non-saturating"),
}

FLAGS = [
    ("training", "--variant", "networks, loss and constants (default: bce)",
     dict(choices=["bce", "two-logit", "keras"])),
    ("training", "--generator-loss", "P of the listings or of the formula",
     dict(choices=["non-saturating", "saturating"])),
]


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """実装例1 (生成器): z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1].

    581,264 parameters (erratum 1).
    """

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(0.2),
            nn.Linear(128, 256), nn.BatchNorm1d(256), nn.LeakyReLU(0.2),
            nn.Linear(256, 512), nn.BatchNorm1d(512), nn.LeakyReLU(0.2),
            nn.Linear(512, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class Discriminator(nn.Sequential):
    """実装例1 and 002 (識別器): images [N, 1, 28, 28] -> logits [N, 1]; 533,505 parameters."""

    def __init__(self):
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 256), nn.LeakyReLU(0.2),
            nn.Linear(256, 1))                              # no Sigmoid: erratum 6


class Chapter11Generator(nn.Sequential):
    """11.2.2: z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]; 294,160 parameters."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 256), nn.LeakyReLU(0.3), nn.BatchNorm1d(256),
            nn.Linear(256, 256), nn.LeakyReLU(0.3), nn.BatchNorm1d(256),
            nn.Linear(256, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))   # erratum 24


class Chapter11Discriminator(nn.Sequential):
    """11.2.2: images [N, 1, 28, 28] -> logits [N, 2], fake (偽物) and real (本物).

    133,762 parameters.
    """

    def __init__(self):
        super().__init__(
            nn.Flatten(),
            # common.Dropout is nn.Dropout, faster on the CPU.
            nn.Linear(784, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 2))


class KerasGenerator(nn.Sequential):
    """Document 002 (erratum 15): z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1].

    1,489,936 parameters.
    """

    def __init__(self, latent_dim=100):
        def block(inputs, outputs):     # Keras' momentum 0.8 is PyTorch's 0.2; Keras' eps is 1e-3
            return (nn.Linear(inputs, outputs), nn.LeakyReLU(0.2),
                    nn.BatchNorm1d(outputs, eps=1e-3, momentum=0.2))

        super().__init__(
            *block(latent_dim, 256), *block(256, 512), *block(512, 1024),
            nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


NETWORKS = {"bce": (Generator, Discriminator), "keras": (KerasGenerator, Discriminator),
            "two-logit": (Chapter11Generator, Chapter11Discriminator),
            "points": (common.points_generator, common.points_critic)}


def generate_noise(count, args, device, rng=None):
    """Noise z (潜在変数) [count, latent_dim]: N(0, I) in chapter 3 and 002, U(-1, 1) in 11.2.2.

    rng: a torch.Generator, PyTorch's source of random numbers.
    """
    if args.noise == "normal":
        return torch.randn(count, args.latent_dim, device=device, generator=rng)
    return torch.rand(count, args.latent_dim, device=device, generator=rng) * 2 - 1


# ---------------------------------------------------------------------------------------- losses
def discriminator_loss(real_logits, fake_logits):
    """Half of Q (識別器のコスト関数, 11.1.1), as in 3.2; the logits are [N, 1]."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return (real + fake) / 2


def generator_loss(fake_logits, kind="non-saturating"):
    """P (生成器のコスト関数) of 実装例2, -mean(log D(G(z))); the logits are [N, 1].

    kind "saturating": P of 11.1.1's formula, mean(log(1 - D(G(z)))). Erratum 9.
    """
    if kind == "saturating":
        return -F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def probability(logits):
    """D's probability that its input is real (本物), [N], from logits [N, 1]."""
    return logits.sigmoid().squeeze(1)


# The same for the two logits [N, 2] of 11.2.2: class 0 is fake (偽物), class 1 real (本物).
def chapter11_discriminator_loss(real_logits, fake_logits):
    """Q of 11.2.2, the sum of its terms."""
    real_labels = torch.ones(len(real_logits), dtype=torch.long, device=real_logits.device)
    fake_labels = torch.zeros(len(fake_logits), dtype=torch.long, device=fake_logits.device)
    return F.cross_entropy(real_logits, real_labels) + F.cross_entropy(fake_logits, fake_labels)


def chapter11_generator_loss(fake_logits, kind="non-saturating"):
    """P of 11.2.2's listing; kind "saturating": of 11.1.1's formula."""
    labels = torch.ones(len(fake_logits), dtype=torch.long, device=fake_logits.device)
    if kind == "saturating":
        return -F.cross_entropy(fake_logits, 1 - labels)
    return F.cross_entropy(fake_logits, labels)


def chapter11_probability(logits):
    """D's probability that its input is real, [N]."""
    return logits.softmax(1)[:, 1]


ONE_LOGIT = discriminator_loss, generator_loss, probability                         # Q, P, D
TWO_LOGITS = chapter11_discriminator_loss, chapter11_generator_loss, chapter11_probability


# --------------------------------------------------------------------------------- training step
# The steps of 11.2.1, 11.2.2 and 実装例2. D first, then G: the listings' order (erratum 22).
def discriminator_step(generator, discriminator, optimizer, real, z, q, probability):
    """One optimizer step that lowers Q; q computes it from logits. Returns what to log.

    real: [N, 1, 28, 28] or [N, 2]; z: [N, latent_dim]; probability: from logits, too.
    """
    with torch.no_grad():                           # the text's .detach(): G is not trained here
        fake = generator(z)
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    loss = q(real_logits, fake_logits)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    d_real, d_fake = probability(real_logits), probability(fake_logits)
    # acc_D: the fraction of real and fake images that D classifies correctly. acc_G, in
    # generator_step: the fraction of fakes that D calls real, after D's update (erratum 25).
    accuracy = ((d_real > 0.5).float().mean() + (d_fake <= 0.5).float().mean()) / 2
    return {"D(x)": d_real.mean(), "D(G(z))": d_fake.mean(), "acc_D": accuracy, "loss_D": loss}


def generator_step(generator, discriminator, optimizer, z, p, probability, kind="non-saturating"):
    """One optimizer step that lowers P (11.2.1, 11.2.2, 実装例2). Returns what to log.

    z: [N, latent_dim]; p computes P from logits, kind says which P.
    """
    logits = discriminator(generator(z))
    loss = p(logits, kind)
    optimizer.zero_grad()
    # Gradients for G only, 11.1.1's 生成器だけ; 002 sets D's trainable = False for this.
    loss.backward(inputs=list(generator.parameters()))
    optimizer.step()
    return {"acc_G": (probability(logits) > 0.5).float().mean(), "loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = common.Parser(__file__, __doc__, CONSTANTS, FLAGS).options(argv)
    make_generator, make_discriminator = NETWORKS[args.variant]
    generator = make_generator(args.latent_dim).to(args.device)
    if args.run:                                    # --from RUN: draw from it, no training
        return common.sample(args, generator, generate_noise)

    q, p, probability = TWO_LOGITS if args.variant == "two-logit" else ONE_LOGIT
    discriminator = make_discriminator().to(args.device)
    betas = args.beta1, args.beta2
    # fused=True: a faster Adam
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas, fused=True)

    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {"equilibrium 0.5": 0.5}),
             ("accuracy", ["acc_D", "acc_G"], {"equilibrium 0.5": 0.5}),
             ("loss", ["loss_D", "loss_G"], {})]
    run = common.Run(args, generate_noise, plots, generator=generator, discriminator=discriminator,
                     optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    for batches in run.epochs():
        for _ in run.steps():
            # Discriminator: its probability D towards 1 for real, towards 0 for fake.
            real, _ = next(batches)
            z = generate_noise(args.batch_size, args, args.device)
            run.record(discriminator_step(generator, discriminator, optimizer_d, real, z,
                                          q, probability))
            # Generator: D of its samples towards 1.
            z = generate_noise(args.batch_size, args, args.device)
            run.record(generator_step(generator, discriminator, optimizer_g, z, p, probability,
                                      args.generator_loss))


if __name__ == "__main__":
    common.guarded(main)
