"""WGAN-GP: a critic (クリティック) trained with a gradient penalty (勾配ペナルティ).

Text: chapter 11, section 11.3 (WGAN-gp); chapter 3, section 3.4 (実装例5).

    Q = mean(C(G(z)) - C(x) + lambda (||g(x_hat)||_2 - 1)^2)  critic's cost (コスト関数), 11.3.1
    P = -mean(C(G(z)))                                        generator's cost, 11.3.1
    g(x) = dC(x) / dx                                         gradient (勾配) at C's input
    x_hat = epsilon x + (1 - epsilon) G(z)                    a point between real and fake (補間点)
    epsilon ~ U(0, 1)                                         uniform (一様分布)

The text writes D for the critic C; in 3.4 Q is L_D and P is L_G. W = mean(C(x)) - mean(C(G(z)))
estimates the Wasserstein distance (ワッサースタイン距離). For a C whose slope is at most 1
everywhere (1-Lipschitz) it is a lower bound, tight for the best such C; ours is far below:
docs/runs.md.

    python 03_wgan_gp.py                                chapter 11: fully connected networks
    python 03_wgan_gp.py --critic conv                  chapter 3: convolutional networks
    python 03_wgan_gp.py --dataset gaussians            実装例3's 8 Gaussians, coordinates divided
                                                        by 2; or ring, grid
    python 03_wgan_gp.py --kernels reference            the penalty by the formula alone
    python 03_wgan_gp.py --compare-kernels              check and time the fused one against it

Differs from the text: every critic step draws a real batch of its own (erratum 10), so an epoch
reads the data n_critic times; every step draws its own z (実装例5 reuses one). The epoch line shows
means over the epoch (11.3.2 prints the last batch). --critic conv leaves out 実装例5's BatchNorm
(erratum 3); its last layer has 128 * 2 * 2 = 512 inputs, not 128 (erratum 2); it has 11.3's betas
(erratum 4), a batch of 64 (実装例5: 32), and leaves out an epoch's last, smaller batch; its real
images are MNIST's, not noise (erratum 5).
"Erratum N" is a row of docs/errata.md.
"""

import common

import torch
from torch import nn

# ------------------------------------------------------------------------------- hyperparameters
# mlp: 11.3.2. conv: 3.4 with the batch of 64 that 3.6 recommends; its epochs are ours (実装例5
# makes 3 steps of 32). points: ours, for --dataset gaussians, ring and grid; with lambda = 10 or at
# constant learning rates fewer samples come to narrow modes (docs/results.md). An epoch is
# N // batch generator steps, each after n_critic critic steps; a last, smaller batch is left out.
# gp_weight is lambda (11.3.2: GradientPenaltyCoefficient, 実装例5: lambda_gp), n_critic 11.3.2's
# CriticLearningNumber, lr_d the critic's rate. lr_decay=1.0: the rates fall to 0 over the whole
# training. ema_decay: samples come from a moving average of G.
CONSTANTS = {
    "mlp": dict(epochs=300, batch_size=300, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9,  # erratum 7
                latent_dim=100, noise="uniform", gp_weight=10.0, n_critic=5),
    "conv": dict(epochs=5, batch_size=64, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9,    # erratum 4
                 latent_dim=100, noise="normal", gp_weight=10.0, n_critic=5),
    "points": dict(epochs=40, batch_size=256, lr_g=1e-3, lr_d=1e-3, beta1=0.5, beta2=0.9,
                   latent_dim=100, noise="normal", gp_weight=1.0, n_critic=5, lr_decay=1.0,
                   ema_decay=0.999),
}

FLAGS = [
    ("training", "--critic", "networks and constants (default: mlp)",
     dict(dest="variant", choices=["mlp", "conv"])),
    ("training", "--gp-weight", "lambda of the gradient penalty", common.WEIGHT),
    ("training", "--n-critic", "critic steps per generator step", common.COUNT),
    ("training", "--compare-kernels", "check and time the fused kernel", common.SWITCH),
]


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """11.3.2 (生成器): z [N, latent_dim] -> images [N, 1, 28, 28], -1 to 1; 147,856 parameters."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.LeakyReLU(0.3), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), nn.BatchNorm1d(128),
            nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))

    def forward(self, z):
        return self.model(z)


class Critic(nn.Module):
    """11.3.2: images [N, 1, 28, 28] -> scores [N, 1], unbounded; 133,633 parameters."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            # common.Dropout is nn.Dropout, faster on the CPU.
            nn.Linear(784, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 1))

    def forward(self, x):
        return self.model(x.flatten(1))                                             # x as [N, 784]


class ConvGenerator(nn.Sequential):
    """実装例4's generator, as in 02; 実装例5 trains it: z -> images [N, 1, 28, 28]."""

    def __init__(self, latent_dim=100):
        super().__init__(
            nn.Linear(latent_dim, 128 * 7 * 7), nn.Unflatten(1, (128, 7, 7)),
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),                                    # [N, 128, 14, 14]
            nn.Conv2d(128, 128, 3, stride=1, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Upsample(scale_factor=2),                                    # [N, 128, 28, 28]
            nn.Conv2d(128, 64, 3, stride=1, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 1, 3, stride=1, padding=1), nn.Tanh())


class ConvCritic(nn.Sequential):
    """実装例5's WGANDiscriminator without its BatchNorm (erratum 3): images -> scores [N, 1].

    Images: [N, 1, 28, 28]. 97,665 parameters.
    """

    def __init__(self):
        def block(inputs, outputs):
            return (nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                    nn.LeakyReLU(0.2), nn.Dropout2d(0.25))

        super().__init__(
            *block(1, 16),                                                  # [N, 16, 14, 14]
            *block(16, 32),                                                 # [N, 32, 7, 7]
            *block(32, 64),                                                 # [N, 64, 4, 4]
            *block(64, 128),                                                # [N, 128, 2, 2]
            nn.Flatten(), nn.Linear(128 * 2 * 2, 1))            # 512 inputs, not 128: erratum 2


NETWORKS = {"mlp": (Generator, Critic), "conv": (ConvGenerator, ConvCritic),
            "points": (common.points_generator, common.points_critic)}


def generate_noise(count, args, device, rng=None):
    """Noise z (潜在変数) [count, latent_dim]: U(-1, 1) in 11.3.2, N(0, I) in 3.4.

    rng: a torch.Generator, PyTorch's source of random numbers.
    """
    if args.noise == "normal":
        return torch.randn(count, args.latent_dim, device=device, generator=rng)
    return torch.rand(count, args.latent_dim, device=device, generator=rng) * 2 - 1


# ---------------------------------------------------------------------------------------- losses
# 11.3.2's calculate_gradient_penalty and 実装例5's compute_gradient_penalty, without the factor
# lambda, which 11.3.2's includes. epsilon is 実装例5's alpha.
#
# The formula below is the reference, and complete. Where csrc/ can be compiled, @common.fused
# computes the same numbers in less time (--kernels, docs/performance.md), for a critic of Linear,
# LeakyReLU and Dropout layers; any other gets the formula.
@common.fused("gradient_penalty")
def gradient_penalty(critic, real, fake):
    """mean((||g||_2 - 1)^2) at x_hat (勾配ペナルティ) and the mean norm; real, fake: [N, ...]."""
    # epsilon: one number per sample; [N, 1, 1, 1] for images
    epsilon = torch.rand((len(real),) + (1,) * (real.dim() - 1), device=real.device)
    x_hat = epsilon * real + (1 - epsilon) * fake
    x_hat.requires_grad_()                      # the gradient is wanted at the critic's input
    scores = critic(x_hat)
    gradients = torch.autograd.grad(
        outputs=scores, inputs=x_hat,
        # Ones: the sum of the scores is differentiated. A score depends on its own sample alone,
        # so the sum's gradient at a sample is that of its score: g(x_hat). BatchNorm breaks this.
        grad_outputs=torch.ones_like(scores),
        create_graph=True)[0]                   # [N, ...]; loss.backward() differentiates it again
    norms = gradients.flatten(1).norm(2, dim=1)
    return (norms - 1).square().mean(), norms.mean()


# --------------------------------------------------------------------------------- training step
# The costs of 11.3.1, the steps of 11.3.2 and 実装例5.
def critic_step(generator, critic, optimizer, real, z, gp_weight):
    """One optimizer step that lowers Q; real: [N, 1, 28, 28] or [N, 2], z: [N, latent_dim].

    Returns what to log.
    """
    with torch.no_grad():                           # the text's .detach(): G is not trained here
        fake = generator(z)
    wasserstein = critic(real).mean() - critic(fake).mean()
    penalty, norm = gradient_penalty(critic, real, fake)
    loss = -wasserstein + gp_weight * penalty           # Q
    optimizer.zero_grad()
    loss.backward(inputs=list(critic.parameters()))     # gradients for C only, none for x_hat
    optimizer.step()
    return {"W": wasserstein, "penalty": penalty, "grad_norm": norm, "loss_C": loss}


def generator_step(generator, critic, optimizer, z):
    """One optimizer step that lowers P (11.3.2, 実装例5); z: [N, latent_dim].

    Returns what to log.
    """
    loss = -critic(generator(z)).mean()                 # P
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))  # gradients for G only; C is not updated
    optimizer.step()
    return {"loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = common.Parser(__file__, __doc__, CONSTANTS, FLAGS, kernels=True).options(argv)
    make_generator, make_critic = NETWORKS[args.variant]
    generator = make_generator(args.latent_dim).to(args.device)
    if args.run:                                    # --from RUN: draw from it, no training
        return common.sample(args, generator, generate_noise)

    critic = make_critic().to(args.device)
    betas = args.beta1, args.beta2
    # fused=True: a faster Adam, no kernel of csrc/
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas, fused=True)
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, betas, fused=True)

    if args.compare_kernels:
        real = generator(generate_noise(args.batch_size, args, args.device)).detach()
        return common.compare_kernels(args, gradient_penalty, lambda: critic_step(
            generator, critic, optimizer_c, real, generate_noise(len(real), args, args.device),
            args.gp_weight), critic, real)

    plots = [("Wasserstein estimate", ["W"], {}), ("gradient norm", ["grad_norm"], {"target 1": 1}),
             ("gradient penalty", ["penalty"], {}), ("loss", ["loss_C", "loss_G"], {})]
    run = common.Run(args, generate_noise, plots, generator=generator, critic=critic,
                     optimizer_g=optimizer_g, optimizer_c=optimizer_c)
    for batches in run.epochs():
        for _ in run.steps():
            # Critic, n_critic times: scores up for real, down for fake, slope towards 1.
            for _ in range(args.n_critic):
                real, _ = next(batches)             # new for every critic step: erratum 10
                z = generate_noise(args.batch_size, args, args.device)
                run.record(critic_step(generator, critic, optimizer_c, real, z, args.gp_weight))
            # Generator, once: the critic's scores of its samples up.
            z = generate_noise(args.batch_size, args, args.device)
            run.record(generator_step(generator, critic, optimizer_g, z))


if __name__ == "__main__":
    common.guarded(main)
