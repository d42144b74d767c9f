"""Conditional GAN (CGAN): WGAN-GP whose generator and critic receive the class label (条件).

Text: chapter 11, section 11.4 (the idea: 11.4.1); document 003. 11.4 calls the result CWGAN-gp: 03
with the label c added to both networks and all steps (erratum 19). Lines that the label adds or
changes end with 11.4 or 11.4.2; the text marks its own with 「WGAN-gpからここを変更」.

    Q = mean(C(G(z, c), c) - C(x, c) + lambda (||g(x_hat, c)||_2 - 1)^2)    critic's cost
    P = -mean(C(G(z, c), c))                                                generator's cost
    g(x, c) = dC(x, c) / dx                         the critic's gradient (勾配) at its input
    x_hat = epsilon x + (1 - epsilon) G(z, c)       a point between real and fake (補間点)
    epsilon ~ U(0, 1)                               uniform (一様分布)

The text writes D for the critic C. mean(C(x, c)) - mean(C(G(z, c), c)), logged as W, is at most the
Wasserstein distance (ワッサースタイン距離) between the real and the generated images of a class,
averaged over the classes, where ||g|| is at most 1 everywhere.

    python 04_cgan.py                                   grids: a row per class, a column per z
    python 04_cgan.py --from runs/04_cgan-mnist-0001 --class 3
                                                        64 images of the digit 3 by that run
    python 04_cgan.py --kernels reference               the penalty by PyTorch's operations alone

Differs from the text: every critic step draws a real batch of its own (erratum 10), so an epoch
reads the data n_critic times; the epoch line shows means over the epoch (11.4.2 prints the last
batch); the penalty is computed in a faster way, explicit_terms. --penalty autograd is the text's
way, gradient_penalty, here without the factor lambda, which critic_step has.
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
                 latent_dim=100, gp_weight=10.0, n_critic=5, penalty="explicit",
                 classes=NUM_CLASSES),                                                  # 11.4
}

FLAGS = [
    ("training", "--gp-weight", "lambda of the gradient penalty", common.WEIGHT),
    ("training", "--penalty", "by second-order autograd, as in the text; or as a matrix product",
     dict(choices=["autograd", "explicit"])),
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
            # common.Dropout is nn.Dropout(0.5), faster on the CPU.
            nn.Linear(784 + EMBED_DIM, 128), nn.LeakyReLU(0.3), common.Dropout(),        # 11.4
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(),
            nn.Linear(128, 128), nn.LeakyReLU(0.3), common.Dropout(),
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
def gradient_penalty(critic, real, fake, c):                                          # 11.4.2
    """mean((||g||_2 - 1)^2) at x_hat (勾配ペナルティ) and the mean norm; real, fake: [N, ...]."""
    # epsilon: one number per sample; [N, 1, 1, 1] for images
    epsilon = torch.rand((len(real),) + (1,) * (real.dim() - 1), device=real.device)
    x_hat = torch.lerp(fake, real, epsilon)     # epsilon real + (1 - epsilon) fake
    x_hat.requires_grad_()                      # the gradient is wanted at the critic's input
    scores = critic(x_hat, c)                                                           # 11.4
    gradients = torch.autograd.grad(
        outputs=scores, inputs=x_hat,
        # Ones: the sum of the scores is differentiated. A score depends on its own sample alone,
        # so the sum's gradient at a sample is that of its score: g(x_hat). BatchNorm breaks this.
        grad_outputs=torch.ones_like(scores),
        create_graph=True)[0]                   # [N, ...]; loss.backward() differentiates it again
    penalty, norms = penalty_of(gradients)
    return penalty, norms.mean()


# The formula below is the reference. Where csrc/ can be compiled, one fused kernel computes it
# instead (--kernels, docs/kernels.md); nothing else changes.
@common.fused("penalty")
def penalty_of(gradients):
    """mean((||g||_2 - 1)^2) over the samples' gradients [N, ...], and the norms [N]."""
    norms = gradients.flatten(1).norm(2, dim=1)
    return (norms - 1).square().mean(), norms


# --------------------------------------------------------------------------------- training step
def critic_step(generator, critic, optimizer, real, c, z, gp_weight, explicit=False):  # 11.4.2
    """One step down Q; real: [N, 1, 28, 28], c: [N], z: [N, latent_dim]. Returns what to log."""
    with torch.no_grad():                           # the text's .detach(): G is not trained here
        fake = generator(z, c)                          # of the classes of the real batch, 11.4
    if explicit:
        wasserstein, penalty, norm = explicit_terms(critic, real, fake, c)              # 11.4
    else:
        wasserstein = critic(real, c).mean() - critic(fake, c).mean()                   # 11.4
        penalty, norm = gradient_penalty(critic, real, fake, c)                         # 11.4
    loss = -wasserstein + gp_weight * penalty           # Q
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"W": wasserstein, "penalty": penalty, "grad_norm": norm, "loss_C": loss}


def generator_step(generator, critic, optimizer, z, c):                                 # 11.4
    """One step down P (11.4.2); z: [N, latent_dim], c: [N]. Returns what to log."""
    loss = -critic(generator(z, c), c).mean()           # P, 11.4
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))  # gradients for G only; C is not updated
    optimizer.step()
    return {"loss_G": loss}


# ---------------------------------------------------------------------------------- same, faster
# What critic_step takes from the critic, without a second-order derivative (--penalty explicit).
# Near any x the critic is linear: C(x, c) = w4 S3 W3 S2 W2 S1 W1 x + ..., where W1 is the part of
# the first layer that reads the image (the label's part only shifts the layer's output) and S is
# diagonal: each unit's slope of LeakyReLU (1 or 0.3) times its mask of Dropout (0 or 2). So the
# gradient is a product, g = w4 S3 W3 S2 W2 S1 W1, and backward() differentiates it with respect to
# the W. A small change of the weights leaves S as it is, so that its derivative is 0. Further, the
# first layer's output at x_hat lies between those at real and fake, which their scores need anyway.
# docs/performance.md derives it.
def explicit_terms(critic, real, fake, c):                                            # 11.4
    """W, the penalty and the mean norm of critic_step; real, fake: [N, 1, 28, 28]."""
    layer1, layer2, layer3, layer4 = critic.model[::3]  # between them LeakyReLU and Dropout
    dropout, n = critic.model[2], len(real)
    w1, w_label = layer1.weight.split([784, EMBED_DIM], dim=1)                          # 11.4
    label = F.linear(critic.label_embedding(c), w_label, layer1.bias)   # W_label c + b1, 11.4
    a = F.linear(torch.cat([real, fake]).flatten(1), w1) + label.repeat(2, 1)   # [2N, 128], 11.4
    scores = critic.model[1:](a)                        # [2N, 1]

    def slope(a):                                       # S of one layer, [N, 128]
        return torch.where(a > 0, 1.0, 0.3) * dropout.mask(a)

    with torch.no_grad():
        # The first layer's output at x_hat: W1 x_hat + W_label c + b1 (11.4)
        a1 = torch.lerp(a[n:], a[:n], torch.rand(n, 1, device=a.device))
        s1 = slope(a1)
        s2 = slope(a2 := layer2(a1 * s1))   # a1 * s1: what LeakyReLU and Dropout make of a1
        s3 = slope(layer3(a2 * s2))
    # g(x_hat), [N, 784]: only here does autograd follow the weights.
    g = (((layer4.weight * s3) @ layer3.weight * s2) @ layer2.weight * s1) @ w1       # 11.4
    penalty, norms = penalty_of(g)
    return scores[:n].mean() - scores[n:].mean(), penalty, norms.mean()


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
                real, c = next(batches)             # both new: erratum 10, 11.4
                z = generate_noise(args.batch_size, args, args.device)
                run.record(critic_step(generator, critic, optimizer_c, real, c, z,  # 11.4
                                       args.gp_weight, args.penalty == "explicit"))
            # Generator, once: the critic's scores of its samples up.
            z = generate_noise(args.batch_size, args, args.device)
            c = generate_condition(args.batch_size, args.device)    # any classes, 11.4
            run.record(generator_step(generator, critic, optimizer_g, z, c))        # 11.4


if __name__ == "__main__":
    common.guarded(main)
