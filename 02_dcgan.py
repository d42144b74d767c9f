"""DCGAN: a convolutional (畳み込み) generator and discriminator.

Text: chapter 3, section 3.3 (実装例4); document 000, whose discriminator is convolutional.

    min_G max_D V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]     the game of 3.1, as in 01
    L_D = -(mean(log D(x)) + mean(log(1 - D(G(z))))) / 2            binary cross-entropy of 3.2
    L_G = -mean(log D(G(z)))                                        non-saturating

    python 02_dcgan.py                                  the networks of 実装例4, 28x28
    python 02_dcgan.py --image-size 64                  the figure of 3.3, 4x4 to 64x64
    python 02_dcgan.py --image-size 64 --channels 3 --dataset folder --data-dir DIR  your own images

実装例4 follows only some of the guidelines above it (erratum 21). The 64x64 networks follow them.
Exceptions: G's first layer and D's last are Linear (the figure has G's, too); D's first layer has
no BatchNorm, as in the DCGAN paper.
Differs from the text: the discriminator's last layer has 128 * 2 * 2 = 512 inputs, not 128
(erratum 2), and returns logits (erratum 6). 実装例4 stops before the training; the step is that of
3.2, with its own z for each update.
"Erratum N" is a row of docs/errata.md.
"""

import math

import common

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------- hyperparameters
# Rates, betas and batch are those of 3.2 and of the table of recommended values in 3.6; the epochs
# are ours. An epoch is N // batch steps: a last, smaller batch is left out.
CONSTANTS = {
    "dcgan": dict(epochs=5, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                  latent_dim=100, image_size=28, channels=1),
}


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """実装例4 (生成器, DCGANGenerator): z [N, latent_dim] -> images [N, channels, 28, 28].

    Images in [-1, 1]; 856,065 parameters (erratum 1).
    """

    def __init__(self, latent_dim=100, channels=1):
        super().__init__(
            nn.Linear(latent_dim, 128 * 7 * 7), nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),                            # no ReLU, as in the listing: erratum 21
            nn.Upsample(scale_factor=2),                                    # [N, 128, 14, 14]
            nn.Conv2d(128, 128, 3, stride=1, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Upsample(scale_factor=2),                                    # [N, 128, 28, 28]
            nn.Conv2d(128, 64, 3, stride=1, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, channels, 3, stride=1, padding=1), nn.Tanh())


class Discriminator(nn.Sequential):
    """実装例4 (識別器, DCGANDiscriminator): images [N, channels, 28, 28] -> logits [N, 1].

    98,113 parameters, with the last layer of erratum 2 (erratum 1).
    """

    def __init__(self, channels=1):
        def block(inputs, outputs, norm=True):
            layers = [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                      nn.LeakyReLU(0.2), nn.Dropout2d(0.25)]
            if norm:
                layers.append(nn.BatchNorm2d(outputs))      # last, as in the listing: erratum 21
            return layers

        super().__init__(
            *block(channels, 16, norm=False),                               # [N, 16, 14, 14]
            *block(16, 32),                                                 # [N, 32, 7, 7]
            *block(32, 64),                                                 # [N, 64, 4, 4]
            *block(64, 128),                                                # [N, 128, 2, 2]
            # 512 inputs, not 128: erratum 2; no Sigmoid: erratum 6
            nn.Flatten(), nn.Linear(128 * 2 * 2, 1))


def initialise(network):
    """The DCGAN paper's initial weights, for the 64x64 networks; the 28x28 ones keep PyTorch's.

    Weights from N(0, 0.02^2) (sec. 4 of arXiv 1511.06434), BatchNorm's from N(1, 0.02^2), as its
    code has it.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            mean = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
            nn.init.normal_(layer.weight, mean, 0.02)
            nn.init.zeros_(layer.bias)


class Generator64(nn.Sequential):
    """The figure of 3.3: z [N, latent_dim] -> images [N, channels, 64, 64] in [-1, 1].

    12.7 million parameters; 転置畳み込み (transposed convolutions).
    """

    def __init__(self, latent_dim=100, channels=1):
        def block(inputs, outputs):
            return (nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1),
                    nn.BatchNorm2d(outputs), nn.ReLU())

        super().__init__(
            nn.Linear(latent_dim, 1024 * 4 * 4), nn.Unflatten(1, (1024, 4, 4)),
            nn.BatchNorm2d(1024), nn.ReLU(),
            *block(1024, 512),                                              # [N, 512, 8, 8]
            *block(512, 256),                                               # [N, 256, 16, 16]
            *block(256, 128),                                               # [N, 128, 32, 32]
            nn.ConvTranspose2d(128, channels, 4, stride=2, padding=1), nn.Tanh())
        initialise(self)


class Discriminator64(nn.Sequential):
    """Ours, Generator64 mirrored: images [N, channels, 64, 64] -> logits [N, 1].

    11 million parameters. The text's figure shows the generator alone.
    """

    def __init__(self, channels=1):
        def block(inputs, outputs):
            return (nn.Conv2d(inputs, outputs, 4, stride=2, padding=1),
                    nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))

        super().__init__(
            nn.Conv2d(channels, 128, 4, stride=2, padding=1), nn.LeakyReLU(0.2),  # [N, 128, 32, 32]
            *block(128, 256),                                               # [N, 256, 16, 16]
            *block(256, 512),                                               # [N, 512, 8, 8]
            *block(512, 1024),                                              # [N, 1024, 4, 4]
            nn.Flatten(), nn.Linear(1024 * 4 * 4, 1))                       # logits: erratum 6
        initialise(self)


NETWORKS = {28: (Generator, Discriminator), 64: (Generator64, Discriminator64)}


def generate_noise(count, args, device, rng=None):
    """Noise z (潜在変数) [count, latent_dim] ~ N(0, I).

    rng: a torch.Generator, PyTorch's source of random numbers.
    """
    return torch.randn(count, args.latent_dim, device=device, generator=rng)


# ---------------------------------------------------------------------------------------- losses
def discriminator_loss(real_logits, fake_logits):
    """L_D of 3.2, the mean of its two terms; the logits are [N, 1]."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return (real + fake) / 2


def generator_loss(fake_logits):
    """L_G of 3.2; the logits are [N, 1]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# --------------------------------------------------------------------------------- training step
def discriminator_step(generator, discriminator, optimizer, real, z):
    """One optimizer step that lowers L_D; real: [N, channels, H, W], z: [N, latent_dim].

    Returns what to log.
    """
    with torch.no_grad():                           # the text's .detach(): G is not trained here
        fake = generator(z)
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    loss = discriminator_loss(real_logits, fake_logits)
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
    args = common.Parser(__file__, __doc__, CONSTANTS, image_sizes=tuple(NETWORKS)).options(argv)
    make_generator, make_discriminator = NETWORKS[args.image_size]
    layout = dict(device=args.device, memory_format=torch.channels_last)    # faster convolutions
    generator = make_generator(args.latent_dim, args.channels).to(**layout)
    if args.run:                                    # --from RUN: draw from it, no training
        return common.sample(args, generator, generate_noise)

    discriminator = make_discriminator(args.channels).to(**layout)
    betas = args.beta1, args.beta2
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas, fused=True)

    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {"equilibrium 0.5": 0.5}),
             ("loss", ["loss_D", "loss_G"], {"equilibrium ln 2": math.log(2)})]
    run = common.Run(args, generate_noise, plots, generator=generator, discriminator=discriminator,
                     optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    for batches in run.epochs():
        for _ in run.steps():
            # Discriminator: its probability D towards 1 for real, towards 0 for fake.
            real, _ = next(batches)
            z = generate_noise(args.batch_size, args, args.device)
            run.record(discriminator_step(generator, discriminator, optimizer_d, real, z))
            # Generator: D of its samples towards 1.
            z = generate_noise(args.batch_size, args, args.device)
            run.record(generator_step(generator, discriminator, optimizer_g, z))


if __name__ == "__main__":
    common.guarded(main)
