"""WGAN-GP: a critic (クリティック) under a gradient penalty (勾配ペナルティ).

Text: chapter 11, section 11.3; chapter 3, section 3.4 (example 5).

    Q = mean(C(G(z)) - C(x) + lambda (||g(xhat)||_2 - 1)^2)           critic's cost, 11.3.1; L_D of 3.4
    P = -mean(C(G(z)))                                                generator's cost, 11.3.1; L_G of 3.4
    g(x) = dC(x) / dx                                                 gradient of the critic at its input
    xhat = epsilon x + (1 - epsilon) G(z),  epsilon ~ U(0, 1)         a point between real and fake

The text writes D for the critic C. mean(C(x)) - mean(C(G(z))), logged as W, estimates the Wasserstein
distance while ||g|| stays near 1.

    python 03_wgan_gp.py --epochs 5                     chapter 11: fully connected networks
    python 03_wgan_gp.py --critic conv                  chapter 3: convolutional networks
    python 03_wgan_gp.py --dataset gaussians            the eight Gaussians of example 3; also ring, grid

Differs from the text: every critic step draws a real batch of its own (erratum 10); example 5 reuses one z
as well, here every step draws its own. 3.4's critic has no BatchNorm (erratum 3), its betas are those of
11.3 (erratum 4), and it trains on images, not on noise (erratum 5).
"""

import torch
from torch import nn

import common

# ------------------------------------------------------------------------------- hyperparameters
# mlp: 11.3.2. conv: 3.4 with the recommended batch of 64; its epochs are ours (the example makes 3 steps of 32).
# gaussians: ours, for --dataset gaussians; with lambda = 10 the generator had not settled after 40 epochs.
# An epoch is N // batch generator steps, each after n_critic critic steps.
CONSTANTS = {
    "mlp": dict(epochs=300, batch_size=300, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9,         # erratum 7
                latent_dim=100, noise="uniform", slope=0.3, gp_weight=10.0, n_critic=5),
    "conv": dict(epochs=25, batch_size=64, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9,          # erratum 4
                 latent_dim=100, noise="normal", slope=0.2, gp_weight=10.0, n_critic=5),
    "gaussians": dict(epochs=40, batch_size=256, lr_g=1e-3, lr_d=1e-3, beta1=0.5, beta2=0.9,
                      latent_dim=100, noise="normal", slope=0.2, gp_weight=1.0, n_critic=5),
}


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """11.3.2: z [N, latent_dim] -> images [N, 1, 28, 28] in [-1, 1]; 147,856 parameters."""

    def __init__(self, latent_dim=100, slope=0.3):
        super().__init__(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(slope), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.BatchNorm1d(128),
            nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class Critic(nn.Sequential):
    """11.3.2: images [N, 1, 28, 28] -> scores [N, 1], unbounded; 133,633 parameters."""

    def __init__(self, slope=0.3):
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 1))


class ConvGenerator(nn.Sequential):
    """Example 4's, as example 5 has it: z [N, latent_dim] -> images [N, channels, 28, 28]; 856,065 parameters."""

    def __init__(self, latent_dim=100, channels=1):
        super().__init__(
            nn.Linear(latent_dim, 128 * 7 * 7), nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),                                            # [N, 128, 14, 14]
            nn.Conv2d(128, 128, 3, stride=1, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Upsample(scale_factor=2),                                            # [N, 128, 28, 28]
            nn.Conv2d(128, 64, 3, stride=1, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, channels, 3, stride=1, padding=1), nn.Tanh())


class ConvCritic(nn.Sequential):
    """Example 5 without its BatchNorm (erratum 3): images [N, channels, 28, 28] -> scores [N, 1]; 97,665 parameters."""

    def __init__(self, slope=0.2, channels=1):
        def block(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(slope), nn.Dropout2d(0.25)

        super().__init__(
            *block(channels, 16),                                                   # [N, 16, 14, 14]
            *block(16, 32),                                                         # [N, 32, 7, 7]
            *block(32, 64),                                                         # [N, 64, 4, 4]
            *block(64, 128),                                                        # [N, 128, 2, 2]
            nn.Flatten(), nn.Linear(128 * 2 * 2, 1))                                # erratum 2


class PointsGenerator(nn.Sequential):
    """For the eight Gaussians, where the text has no network: z [N, latent_dim] -> points [N, 2], unbounded."""

    def __init__(self, latent_dim=100, slope=0.2):
        super().__init__(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 2))                                  # no Tanh: it cannot reach points beyond 1


class PointsCritic(nn.Sequential):
    """For the eight Gaussians: points [N, 2] -> scores [N, 1]."""

    def __init__(self, slope=0.2):
        super().__init__(
            nn.Linear(2, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 128), nn.LeakyReLU(slope),
            nn.Linear(128, 1))


NETWORKS = {"mlp": (Generator, Critic),
            "conv": (lambda latent_dim, slope, **shape: ConvGenerator(latent_dim, **shape), ConvCritic),
            "gaussians": (PointsGenerator, PointsCritic)}


def generate_noise(count, args, device, generator=None):
    """z [count, latent_dim]: U(-1, 1) in 11.3.2, N(0, I) in 3.4."""
    if args.noise == "uniform":
        return torch.rand(count, args.latent_dim, device=device, generator=generator) * 2 - 1
    return torch.randn(count, args.latent_dim, device=device, generator=generator)


# ---------------------------------------------------------------------------------------- losses
@common.fused("penalty")
def penalty_of(gradient):
    """mean((||g||_2 - 1)^2) over the samples' gradients [N, ...], and the norms [N]."""
    norm = gradient.flatten(1).norm(2, dim=1)
    return (norm - 1).square().mean(), norm


def gradient_penalty(critic, real, fake):
    """mean((||g(xhat)||_2 - 1)^2), the third term of Q, and the mean norm; real and fake: [N, ...]."""
    epsilon = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)    # one per sample
    xhat = torch.lerp(fake, real, epsilon).requires_grad_()
    gradient, = torch.autograd.grad(critic(xhat).sum(), xhat, create_graph=True)    # g(xhat), [N, ...]
    penalty, norm = penalty_of(gradient)
    return penalty, norm.mean()


# --------------------------------------------------------------------------------- training step
def critic_step(generator, critic, optimizer, real, z, gp_weight):
    """One step down Q; real: [N, 1, 28, 28] or [N, 2], z: [N, latent_dim]. Returns what the epoch line reports."""
    with torch.no_grad():                                       # G is not trained here
        fake = generator(z)
    wasserstein = critic(real).mean() - critic(fake).mean()
    penalty, norm = gradient_penalty(critic, real, fake)
    loss = -wasserstein + gp_weight * penalty                   # Q
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"W": wasserstein, "penalty": penalty, "grad_norm": norm, "loss_C": loss}


def generator_step(generator, critic, optimizer, z):
    """One step down P; z: [N, latent_dim]."""
    loss = -critic(generator(z)).mean()                         # P, erratum 14
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))          # the critic passes the gradient on and stays as it is
    optimizer.step()
    return {"loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    parser = common.Parser(__file__, __doc__, CONSTANTS, stacked=True, kernels="critic")
    parser.option("--critic", "networks and constants (default: mlp)", dest="variant", choices=["mlp", "conv"])
    parser.option("--gp-weight", "lambda of the gradient penalty", type=common.number(float, at_least=0), metavar="X")
    parser.option("--n-critic", "critic steps per generator step", type=common.number(int, at_least=1), metavar="N")
    parser.option("--compare-kernels", "check and time the fused kernels", action="store_const", const=True)
    args = parser.options(argv)
    if args.dataset == "stacked-mnist" and args.variant == "mlp":
        common.fail("--dataset stacked-mnist needs --critic conv: the fully connected networks make one channel")
    make_generator, make_critic = NETWORKS[args.variant]
    shape = {"channels": args.channels} if args.variant == "conv" else {}
    if args.run:
        return common.sample_run(make_generator(args.latent_dim, args.slope, **shape), generate_noise, args)

    data = common.prepare(args)
    generator = make_generator(args.latent_dim, args.slope, **shape).to(args.device)
    critic = make_critic(args.slope, **shape).to(args.device)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, (args.beta1, args.beta2))

    if "compare_kernels" in args:
        batches = data.batches(args.batch_size)
        return common.compare_kernels(args, "penalty", penalty_of, lambda: critic_step(
            generator, critic, optimizer_c, next(batches)[0],
            generate_noise(args.batch_size, args, args.device), args.gp_weight))

    plots = [("Wasserstein estimate", ["W"], {}), ("gradient norm", ["grad_norm"], {"target 1": 1}),
             ("gradient penalty", ["penalty"], {}), ("loss", ["loss_C", "loss_G"], {})]
    with common.Run(args, data, generate_noise, plots, generator=generator, critic=critic,
                    optimizer_g=optimizer_g, optimizer_c=optimizer_c) as run:
        for batches in run.epochs():
            for _ in run.steps():
                for _ in range(args.n_critic):
                    real, _ = next(batches)                     # a new one for every critic step: erratum 10
                    z = generate_noise(args.batch_size, args, args.device)
                    run.record(critic_step(generator, critic, optimizer_c, real, z, args.gp_weight))
                z = generate_noise(args.batch_size, args, args.device)
                run.record(generator_step(generator, critic, optimizer_g, z))


if __name__ == "__main__":
    main()
