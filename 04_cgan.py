"""Conditional GAN (CGAN): WGAN-GP whose generator and critic receive the class label (条件).

Text: chapter 11, section 11.4 (the idea: 11.4.1); document 003. 11.4 calls the result CWGAN-gp: 03
with the label c added to both networks and all steps (erratum 19). Lines that the label adds or
changes end with 11.4 or 11.4.2; the text marks its own with 「WGAN-gpからここを変更」.

    Q = mean(C(G(z, c), c) - C(x, c) + lambda (||g(x_hat, c)||_2 - 1)^2)    critic's cost
    P = -mean(C(G(z, c), c))                                                generator's cost
    g(x, c) = dC(x, c) / dx                         the critic's gradient (勾配) at its input
    x_hat = epsilon x + (1 - epsilon) G(z, c)       a point between real and fake (補間点)
    epsilon ~ U(0, 1)                               uniform (一様分布)

The text writes D for the critic C. W = mean(C(x, c)) - mean(C(G(z, c), c)) estimates the
Wasserstein distance (ワッサースタイン距離) between real and generated images of a class, averaged
over the classes. As in 03 it is a lower bound where the slope of C is at most 1 everywhere.

    python 04_cgan.py                                   grids: a row per class, a column per z
    python 04_cgan.py --from runs/04_cgan-mnist-0001 --class 3
                                                        64 images of the digit 3 by that run
    python 04_cgan.py --kernels reference               the penalty by the formula alone

Differs from the text: every critic step draws a real batch of its own (erratum 10), so an epoch
reads the data n_critic times; the epoch line shows means over the epoch (11.4.2 prints the last
batch); gradient_penalty is without the factor lambda, which critic_step has. Where 11.4's preview
writes the class into the corner of one image, the pictures here have a row per class.
"Erratum N" is a row of docs/errata.md.
"""

import common

import torch
import torch.nn.functional as F                                                         # 11.4
from torch import nn

# ------------------------------------------------------------------------------- hyperparameters
# All of 11.4.2; the names are 03's. An epoch is N // batch generator steps, each after n_critic
# critic steps; a last, smaller batch is left out.
NUM_CLASSES, EMBED_DIM = 10, 64                                                         # 11.4
CONSTANTS = {
    "cgan": dict(epochs=300, batch_size=300, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9, # erratum 7
                 latent_dim=100, gp_weight=10.0, n_critic=5,
                 classes=NUM_CLASSES),                                                  # 11.4
}

FLAGS = [
    ("training", "--gp-weight", "lambda of the gradient penalty", common.WEIGHT),
    ("training", "--n-critic", "critic steps per generator step", common.COUNT),
    (common.SAMPLING, "--class", "draw this class alone",                                # 11.4
     dict(dest="label", type=int, choices=range(NUM_CLASSES))),                         # 11.4
]


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """11.4.2 (生成器): z [N, latent_dim], c [N] -> images [N, 1, 28, 28]; 156,688 parameters."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.label_embedding = nn.Embedding(NUM_CLASSES, EMBED_DIM)                     # 11.4
        self.model = nn.Sequential(
            nn.Linear(latent_dim + EMBED_DIM, 128), nn.LeakyReLU(0.3), nn.BatchNorm1d(128),  # 11.4
            nn.Linear(128, 128), nn.LeakyReLU(0.3), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), nn.BatchNorm1d(128),
            nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))

    def forward(self, z, c):                                                            # 11.4
        return self.model(torch.cat([z, self.label_embedding(c)], dim=1))               # 11.4


class Critic(nn.Module):
    """11.4.2: images [N, 1, 28, 28], c [N] -> scores [N, 1], unbounded; 142,465 parameters."""

    def __init__(self):
        super().__init__()
        self.label_embedding = nn.Embedding(NUM_CLASSES, EMBED_DIM)   # a table of its own, 11.4
        self.model = nn.Sequential(
            # common.Dropout is nn.Dropout, faster on the CPU.
            nn.Linear(784 + EMBED_DIM, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),        # 11.4
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(0.5),
            nn.Linear(128, 1))

    def forward(self, x, c):                                                            # 11.4
        return self.model(torch.cat([x.flatten(1), self.label_embedding(c)], dim=1))    # 11.4


def generate_noise(count, args, device, rng=None):
    """Noise z (潜在変数) [count, latent_dim] ~ U(-1, 1).

    rng: a torch.Generator, PyTorch's source of random numbers.
    """
    return torch.rand(count, args.latent_dim, device=device, generator=rng) * 2 - 1


def generate_condition(count, device):                                                  # 11.4
    """Random labels c (条件) [count], each class equally likely."""
    return torch.randint(NUM_CLASSES, (count,), device=device)                          # 11.4


# ---------------------------------------------------------------------------------------- losses
# The formula below is the reference, and complete. Where csrc/ can be compiled, @common.fused
# computes the same numbers in less time (--kernels, docs/performance.md), for a critic of Linear,
# LeakyReLU and Dropout layers; any other gets the formula.
@common.fused("gradient_penalty")
def gradient_penalty(critic, real, fake, c):                                          # 11.4.2
    """mean((||g||_2 - 1)^2) at x_hat (勾配ペナルティ) and the mean norm; real, fake: [N, ...]."""
    # epsilon: one number per sample; [N, 1, 1, 1] for images
    epsilon = torch.rand((len(real),) + (1,) * (real.dim() - 1), device=real.device)
    x_hat = epsilon * real + (1 - epsilon) * fake
    x_hat.requires_grad_()                      # the gradient is wanted at the critic's input
    scores = critic(x_hat, c)                                                           # 11.4
    gradients = torch.autograd.grad(
        outputs=scores, inputs=x_hat,
        # Ones: the sum of the scores is differentiated. A score depends on its own sample alone,
        # so the sum's gradient at a sample is that of its score: g(x_hat). BatchNorm breaks this.
        grad_outputs=torch.ones_like(scores),
        create_graph=True)[0]                   # [N, ...]; loss.backward() differentiates it again
    norms = gradients.flatten(1).norm(2, dim=1)
    return (norms - 1).square().mean(), norms.mean()


# --------------------------------------------------------------------------------- training step
def critic_step(generator, critic, optimizer, real, c, z, gp_weight):                 # 11.4.2
    """One optimizer step that lowers Q; real: [N, 1, 28, 28], c: [N], z: [N, latent_dim].

    Returns what to log.
    """
    with torch.no_grad():                           # the text's .detach(): G is not trained here
        fake = generator(z, c)                          # of the classes of the real batch, 11.4
    wasserstein = critic(real, c).mean() - critic(fake, c).mean()                       # 11.4
    penalty, norm = gradient_penalty(critic, real, fake, c)                             # 11.4
    loss = -wasserstein + gp_weight * penalty           # Q
    optimizer.zero_grad()
    loss.backward(inputs=list(critic.parameters()))     # gradients for C only, none for x_hat
    optimizer.step()
    return {"W": wasserstein, "penalty": penalty, "grad_norm": norm, "loss_C": loss}


def generator_step(generator, critic, optimizer, z, c):                                 # 11.4
    """One optimizer step that lowers P (11.4.2); z: [N, latent_dim], c: [N].

    Returns what to log.
    """
    loss = -critic(generator(z, c), c).mean()           # P, 11.4
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))  # gradients for G only; C is not updated
    optimizer.step()
    return {"loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = common.Parser(__file__, __doc__, CONSTANTS, FLAGS, kernels=True).options(argv)
    generator = Generator(args.latent_dim).to(args.device)
    if args.run:                                    # --from RUN: draw from it, no training
        return common.sample(args, generator, generate_noise)

    critic = Critic().to(args.device)
    betas = args.beta1, args.beta2
    # fused=True: a faster Adam, no kernel of csrc/
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas, fused=True)
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, betas, fused=True)

    plots = [("Wasserstein estimate", ["W"], {}), ("gradient norm", ["grad_norm"], {"target 1": 1}),
             ("gradient penalty", ["penalty"], {}), ("loss", ["loss_C", "loss_G"], {})]
    run = common.Run(args, generate_noise, plots, generator=generator, critic=critic,
                     optimizer_g=optimizer_g, optimizer_c=optimizer_c)
    for batches in run.epochs():
        for _ in run.steps():
            # Critic, n_critic times: scores up for real, down for fake, slope towards 1.
            for _ in range(args.n_critic):
                # A new batch per critic step (erratum 10), with its labels (11.4)
                real, c = next(batches)
                z = generate_noise(args.batch_size, args, args.device)
                run.record(critic_step(generator, critic, optimizer_c, real, c, z,      # 11.4
                                       args.gp_weight))
            # Generator, once: the critic's scores of its samples up.
            z = generate_noise(args.batch_size, args, args.device)
            c = generate_condition(args.batch_size, args.device)    # any classes, 11.4
            run.record(generator_step(generator, critic, optimizer_g, z, c))        # 11.4


if __name__ == "__main__":
    common.guarded(main)
