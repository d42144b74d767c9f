"""Conditional GAN: WGAN-GP whose generator and critic are told the class.

Text: chapter 11, section 11.4. It calls the result CWGAN-gp: 03 with the label c
added to both networks and all steps (erratum 19).

    Q = mean(C(G(z, c), c) - C(x, c) + lambda (||g(xhat, c)||_2 - 1)^2)       critic's cost
    P = -mean(C(G(z, c), c))                                                  generator's cost
    g(x, c) = dC(x, c) / dx                                                   gradient of the critic at its input
    xhat = epsilon x + (1 - epsilon) G(z, c),  epsilon ~ U(0, 1)              a point between real and fake

The text writes D for the critic C. mean(C(x, c)) - mean(C(G(z, c), c)), logged as W, estimates the
Wasserstein distance while ||g|| stays near 1.

    python 04_cgan.py                                   sample grids: one row per class, one column per z
    python 04_cgan.py --from runs/04_cgan-mnist-0001 --class 3

Differs from the text: every critic step draws a real batch of its own (erratum 10).
"""

import torch
from torch import nn

import common

# ------------------------------------------------------------------------------- hyperparameters
# All of 11.4.2. An epoch is N // batch generator steps, each after n_critic critic steps.
CONSTANTS = {
    "cgan": dict(epochs=300, batch_size=300, lr_g=1e-4, lr_d=1e-4, beta1=0.0, beta2=0.9,        # erratum 7
                 latent_dim=100, slope=0.3, gp_weight=10.0, n_critic=5),
}
NUM_CLASSES, EMBED_DIM = 10, 64


# -------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """11.4.2: z [N, latent_dim], labels [N] -> images [N, 1, 28, 28] in [-1, 1]; 156,688 parameters."""

    def __init__(self, latent_dim=100, slope=0.3):
        super().__init__()
        self.label_embedding = nn.Embedding(NUM_CLASSES, EMBED_DIM)
        self.model = nn.Sequential(
            nn.Linear(latent_dim + EMBED_DIM, 128), nn.LeakyReLU(slope), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.BatchNorm1d(128),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.BatchNorm1d(128),
            nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))

    def forward(self, z, labels):
        return self.model(torch.cat([z, self.label_embedding(labels)], dim=1))              # [N, 100 + 64] in


class Critic(nn.Module):
    """11.4.2: images [N, 1, 28, 28], labels [N] -> scores [N, 1], unbounded; 142,465 parameters."""

    def __init__(self, slope=0.3):
        super().__init__()
        self.label_embedding = nn.Embedding(NUM_CLASSES, EMBED_DIM)     # a table of its own
        self.model = nn.Sequential(
            nn.Linear(784 + EMBED_DIM, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 128), nn.LeakyReLU(slope), nn.Dropout(0.5),
            nn.Linear(128, 1))

    def forward(self, x, labels):
        return self.model(torch.cat([x.flatten(1), self.label_embedding(labels)], dim=1))   # [N, 784 + 64] in


def generate_noise(count, args, device, generator=None):
    """z [count, latent_dim] ~ U(-1, 1)."""
    return torch.rand(count, args.latent_dim, device=device, generator=generator) * 2 - 1


def generate_condition(count, device):
    """Labels [count], each class equally likely."""
    return torch.randint(NUM_CLASSES, (count,), device=device)


# ---------------------------------------------------------------------------------------- losses
@common.fused("penalty")
def penalty_of(gradient):
    """mean((||g||_2 - 1)^2) over the samples' gradients [N, ...], and the norms [N]."""
    norm = gradient.flatten(1).norm(2, dim=1)
    return (norm - 1).square().mean(), norm


def gradient_penalty(critic, real, fake, labels):
    """mean((||g(xhat, c)||_2 - 1)^2), the third term of Q, and the mean norm; real and fake: [N, 1, 28, 28]."""
    epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)                            # one per sample
    xhat = torch.lerp(fake, real, epsilon).requires_grad_()
    gradient, = torch.autograd.grad(critic(xhat, labels).sum(), xhat, create_graph=True)    # [N, 1, 28, 28]
    penalty, norm = penalty_of(gradient)
    return penalty, norm.mean()


# --------------------------------------------------------------------------------- training step
def critic_step(generator, critic, optimizer, real, labels, z, gp_weight):
    """One step down Q; real: [N, 1, 28, 28], labels: [N], z: [N, latent_dim]. Returns what the epoch line reports."""
    with torch.no_grad():                                       # G is not trained here
        fake = generator(z, labels)                             # of the classes of the real batch
    wasserstein = critic(real, labels).mean() - critic(fake, labels).mean()
    penalty, norm = gradient_penalty(critic, real, fake, labels)
    loss = -wasserstein + gp_weight * penalty                   # Q
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"W": wasserstein, "penalty": penalty, "grad_norm": norm, "loss_C": loss}


def generator_step(generator, critic, optimizer, z, labels):
    """One step down P; z: [N, latent_dim], labels: [N]."""
    loss = -critic(generator(z, labels), labels).mean()         # P
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))          # the critic passes the gradient on and stays as it is
    optimizer.step()
    return {"loss_G": loss}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    parser = common.Parser(__file__, __doc__, CONSTANTS, kernels="critic")
    parser.option("--gp-weight", "lambda of the gradient penalty", type=common.number(float, at_least=0), metavar="X")
    parser.option("--n-critic", "critic steps per generator step", type=common.number(int, at_least=1), metavar="N")
    parser.option("--class", "with --from: draw this class alone", dest="label", type=int, choices=range(NUM_CLASSES))
    args = parser.options(argv)
    if args.run:
        return common.sample_run(Generator(args.latent_dim, args.slope), generate_noise, args)

    data = common.prepare(args, classes=NUM_CLASSES)
    generator = Generator(args.latent_dim, args.slope).to(args.device)
    critic = Critic(args.slope).to(args.device)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, (args.beta1, args.beta2))

    plots = [("Wasserstein estimate", ["W"], {}), ("gradient norm", ["grad_norm"], {"target 1": 1}),
             ("gradient penalty", ["penalty"], {}), ("loss", ["loss_C", "loss_G"], {})]
    with common.Run(args, data, generate_noise, plots, generator=generator, critic=critic,
                    optimizer_g=optimizer_g, optimizer_c=optimizer_c) as run:
        for batches in run.epochs():
            for _ in run.steps():
                for _ in range(args.n_critic):
                    real, labels = next(batches)                # new ones for every critic step: erratum 10
                    z = generate_noise(args.batch_size, args, args.device)
                    run.record(critic_step(generator, critic, optimizer_c, real, labels, z, args.gp_weight))
                z = generate_noise(args.batch_size, args, args.device)
                labels = generate_condition(args.batch_size, args.device)
                run.record(generator_step(generator, critic, optimizer_g, z, labels))


if __name__ == "__main__":
    main()
