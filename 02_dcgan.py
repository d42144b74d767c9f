"""DCGAN: a convolutional generator and discriminator.

Text: chapter 3, section 3.3 (example 4).

    min_G max_D V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]       the game of 3.1, as in 01
    L_D = -(mean(log D(x)) + mean(log(1 - D(G(z))))) / 2              binary cross-entropy of 3.2
    L_G = -mean(log D(G(z)))                                          non-saturating

    python 02_dcgan.py

The networks are those of the example, which follows only some of the guidelines above it (erratum 21).
Differs from the text: the discriminator's last layer takes the 512 numbers that its convolutions leave
(erratum 2) and returns logits (erratum 6). The example stops before the training; the step is that of 3.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import common

# ------------------------------------------------------------------------------- hyperparameters
# Rates, betas and batch are those of 3.2 and of the text's table of recommended values; the epochs are ours.
CONSTANTS = {
    "dcgan": dict(epochs=20, batch_size=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.999,
                  latent_dim=100, slope=0.2),
}


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """Example 4: z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]; 856,065 parameters (erratum 1)."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 128 * 7 * 7), nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),                                            # [N, 128, 14, 14]
            nn.Conv2d(128, 128, 3, stride=1, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Upsample(scale_factor=2),                                            # [N, 128, 28, 28]
            nn.Conv2d(128, 64, 3, stride=1, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 1, 3, stride=1, padding=1), nn.Tanh())


class Discriminator(nn.Sequential):
    """Example 4: images [N, 1, 28, 28] -> logits [N, 1]; 98,113 parameters (erratum 1)."""

    def __init__(self, slope=0.2):
        def block(inputs, outputs, norm=True):
            layers = [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(slope), nn.Dropout2d(0.25)]
            return layers + [nn.BatchNorm2d(outputs)] * norm

        super().__init__(
            *block(1, 16, norm=False),                                              # [N, 16, 14, 14]
            *block(16, 32),                                                         # [N, 32, 7, 7]
            *block(32, 64),                                                         # [N, 64, 4, 4]
            *block(64, 128),                                                        # [N, 128, 2, 2]
            nn.Flatten(), nn.Linear(128 * 2 * 2, 1))                                # erratum 2, erratum 6


def generate_noise(count, args, device, generator=None):
    """z [count, latent_dim] ~ N(0, I)."""
    return torch.randn(count, args.latent_dim, device=device, generator=generator)


# ---------------------------------------------------------------------------------------- losses
def discriminator_loss(real_logits, fake_logits):
    """L_D of 3.2; the logits are [N, 1]."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return (real + fake) / 2


def generator_loss(fake_logits):
    """L_G of 3.2; the logits are [N, 1]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# --------------------------------------------------------------------------------- training step
def discriminator_step(generator, discriminator, optimizer, real, z):
    """One step down L_D; real: [N, 1, 28, 28], z: [N, latent_dim]. Returns what the epoch line reports."""
    with torch.no_grad():                                       # the text's .detach(): G is not trained here
        fake = generator(z)
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    loss = discriminator_loss(real_logits, fake_logits)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"D(x)": real_logits.sigmoid().mean(), "D(G(z))": fake_logits.sigmoid().mean(), "loss_D": loss}


def generator_step(generator, discriminator, optimizer, z):
    """One step down L_G; z: [N, latent_dim]."""
    loss = generator_loss(discriminator(generator(z)))
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))          # D passes the gradient on and stays as it is
    optimizer.step()
    return {"loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = common.Parser(__file__, __doc__, CONSTANTS).options(argv)
    if args.run:
        return common.sample_run(Generator(args.latent_dim), generate_noise, args)

    data = common.prepare(args)
    generator = Generator(args.latent_dim).to(args.device)
    discriminator = Discriminator(args.slope).to(args.device)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, (args.beta1, args.beta2))

    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {"equilibrium 0.5": 0.5}),
             ("loss", ["loss_D", "loss_G"], {"equilibrium ln 2": math.log(2)})]
    with common.Run(args, data, generate_noise, plots, generator=generator, discriminator=discriminator,
                    optimizer_g=optimizer_g, optimizer_d=optimizer_d) as run:
        for batches in run.epochs():
            for _ in run.steps():
                real, _ = next(batches)
                z = generate_noise(args.batch_size, args, args.device)
                run.record(discriminator_step(generator, discriminator, optimizer_d, real, z))
                z = generate_noise(args.batch_size, args, args.device)
                run.record(generator_step(generator, discriminator, optimizer_g, z))


if __name__ == "__main__":
    main()
