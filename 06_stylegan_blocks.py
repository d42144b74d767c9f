"""StyleGAN: a style from the mapping network enters at every resolution.

Text: chapter 3, section 3.5 (実装例7), 演習問題4.

    w = f(z)
        mapping network: 8 layers (中間潜在空間 w)
    AdaIN(x, w) = (1 + scale(w)) (x - mu) / sigma + bias(w)
        mu, sigma: per channel of each sample
    x <- LeakyReLU(AdaIN(conv(x) + strength noise, w))
        twice per block, the order of the listing
    L_D = mean(softplus(D(G(z))) + softplus(-D(x))) + r1_weight / 2 mean(||grad_x D(x)||^2)
    L_G = mean(softplus(-D(G(z))))
        D is here the logit l, not a probability; softplus(-l) = -log sigmoid(l), so L_G is that of
        02; L_D is the sum of two terms, in 02 their mean. The epoch line shows sigmoid(l) as D.

    python 06_stylegan_blocks.py                        MNIST at 32x32, few channels, for a CPU
    python 06_stylegan_blocks.py --width 256 --latent-dim 512
                                                        the text's sizes: 512 latents, last block
                                                        128 to 64
    python 06_stylegan_blocks.py --image-size 64 --channels 3 --dataset folder --data-dir DIR
                                                        your own images
    python 06_stylegan_blocks.py --kernels reference    AdaIN by PyTorch's operations alone
    python 06_stylegan_blocks.py --compare-kernels      check and time its fused kernel against them

The text has the mapping network and one block. We add: the generator and discriminator around the
block, the loss and the growing, after ProGAN (arXiv 1710.10196) and StyleGAN (arXiv 1812.04948).
Differs from the text: 128 latent dimensions and width 64 by default, for a CPU; z is normalised,
weights are scaled at run time, AdaIN has 1 + scale, so that the styles act from the start (erratum
38); separate noise per layer, strengths start at 0.1 (erratum 37); the mapping network ends with a
BatchNorm.
"Erratum N" is a row of docs/errata.md.
"""

import math

import common

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

# ------------------------------------------------------------------------------- hyperparameters
# From StyleGAN: the betas, the mapping network's rate and, nearly, the half-life of the moving
# average of G that is sampled (ema_decay): 346 steps or 11,000 images, there 10,000. The rest is
# ours, chosen for varied digits (docs/results.md). In short trainings G learned more slowly with
# the text's 512 latent dimensions. With a higher rate of the mapping network the w of different z
# soon differ in one or two directions only. An epoch is N // batch steps; a last, smaller batch is
# left out.
CONSTANTS = {
    "stylegan": dict(epochs=8, batch_size=32, lr_g=4e-3, lr_d=2e-3, beta1=0.0, beta2=0.99,
                     latent_dim=128, image_size=32, channels=1, width=64, progressive="on",
                     style_mixing_prob=0.1, r1_weight=3.0, ema_decay=0.998),
}
MAPPING_RATE = 0.01     # the mapping network's learning rate, as a fraction of lr_g
NOISE_START = 0.1       # of the noises' strengths (erratum 37)
GROWTH = 0.5            # the fraction of the training in which the networks grow

FLAGS = [
    ("training", "--width", "channels at 4x4 and 8x8; halved with every doubling from there",
     dict(type=common.number(int, 32, 10_000), metavar="N")),
    ("training", "--progressive", "grow from 4x4 on, or train at full size throughout",
     dict(choices=["on", "off"])),
    ("training", "--style-mixing-prob", "share of the steps that mix the styles of two z",
     common.SHARE),
    ("training", "--r1-weight", "weight of the R1 penalty", common.WEIGHT),
    ("training", "--compare-kernels", "check and time the fused kernel", common.SWITCH),
    (common.SAMPLING, "--styles", "style mixing, truncation and noise", common.SWITCH),
]


# -------------------------------------------------------------------------------------- networks
class Scale(nn.Module):
    """A parametrization: the weight times a constant."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return weight * self.factor


def scaled(layer, gain=2**0.5):
    """Runtime weight scaling (sec. 4.1 of ProGAN).

    Weights start from N(0, 1); the layer uses them times gain / sqrt(inputs of a neuron). A gain of
    sqrt(2) makes up for LeakyReLU; it is 1 where none follows.
    """
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    factor = gain / math.sqrt(layer.weight[0].numel())
    return register_parametrization(layer, "weight", Scale(factor))


class MappingNetwork(nn.Sequential):
    """実装例7: z [N, latent_dim] -> w [N, latent_dim]; 2,101,248 parameters at 512."""

    def __init__(self, latent_dim=512, num_layers=8):
        layers = []
        for _ in range(num_layers):
            layers += [scaled(nn.Linear(latent_dim, latent_dim)), nn.LeakyReLU(0.2)]
        # Ours. LeakyReLU's outputs have a positive mean: after eight of them the w of different z
        # have a cosine similarity of 0.7. A step of Adam then changes mostly what all w share,
        # until every z gives the same image. BatchNorm subtracts that: w has mean 0, deviation 1.
        layers.append(nn.BatchNorm1d(latent_dim, affine=False))
        super().__init__(*layers)

    def forward(self, z):
        z = F.normalize(z) * math.sqrt(z.size(1))   # z on a sphere (ProGAN, appendix A)
        return super().forward(z)


# The formula below is the reference. Where csrc/ can be compiled, one fused kernel computes it
# instead (--kernels, docs/kernels.md); nothing else changes.
@common.fused("adain")
def adain(x, scale, bias, noise=None, strength=None, slope=1.0):
    """LeakyReLU(scale (x' - mu) / sigma + bias), x' = x + strength noise; shaped as x.

    x: [N, C, H, W]; scale (with its "1 +"), bias: [N, C]; noise: [N or 1, 1, H, W], its strength
    [1] or [C]. A slope of 1 means no LeakyReLU. 実装例7 has it after the normalisation, StyleGAN
    before (erratum 36).
    """
    if noise is not None:
        x = x + strength[:, None, None] * noise     # [N, C, H, W]: one map for all channels
    x = scale[:, :, None, None] * F.instance_norm(x) + bias[:, :, None, None]   # [N, C, 1, 1]
    return x if slope == 1 else F.leaky_relu(x, slope)


class AdaptiveInstanceNorm(nn.Module):
    """実装例7 (AdaIN層): x [N, C, H, W] normalised, then scale and bias from w [N, w_dim].

    The listing's block adds the noise before it and applies LeakyReLU after it; here the function
    adain does both, because one fused kernel can then compute all three.
    """

    def __init__(self, num_features, w_dim=512):
        super().__init__()
        self.style_scale = scaled(nn.Linear(w_dim, num_features), gain=1)
        self.style_bias = scaled(nn.Linear(w_dim, num_features), gain=1)

    def forward(self, x, w, noise=None, strength=None, slope=1.0):
        scale = 1 + self.style_scale(w)             # 1 +: StyleGAN's code, erratum 38
        return adain(x, scale, self.style_bias(w), noise, strength, slope)


class StyleGANGeneratorBlock(nn.Module):
    """実装例7: x [N, in, H, W], w [N, w_dim], noise [N or 1, 2, H, W] -> [N, out, H, W].

    242,050 parameters from 128 to 64 channels (erratum 30). conv, noise, AdaIN, LeakyReLU: the
    listing's order, neither that of its comments nor the paper's, which has LeakyReLU before AdaIN
    (erratum 36).
    """

    def __init__(self, in_channels, out_channels, w_dim=512):
        super().__init__()
        self.conv1 = scaled(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.noise1 = nn.Parameter(torch.full((1,), NOISE_START))
        self.adain1 = AdaptiveInstanceNorm(out_channels, w_dim)
        self.conv2 = scaled(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.noise2 = nn.Parameter(torch.full((1,), NOISE_START))
        self.adain2 = AdaptiveInstanceNorm(out_channels, w_dim)

    def forward(self, x, w, noise):
        x = self.adain1(self.conv1(x), w, noise[:, :1], self.noise1, slope=0.2)
        return self.adain2(self.conv2(x), w, noise[:, 1:], self.noise2, slope=0.2)


def channels_at(image_size, width):
    """Channels at 4x4, 8x8, ..., image_size: `width` at 4 and 8, then halved at every doubling."""
    return [width // 2**max(0, k - 1) for k in range(int(math.log2(image_size)) - 1)]


class Generator(nn.Module):
    """z [N, latent_dim] -> images [N, channels, S, S], about -1 to 1 (no Tanh), S = image_size.

    `level` says how far it has grown: at level k the blocks 0 to k are in use, the last one at
    4 * 2^k pixels; between k and k + 1 block k + 1 fades in. Images of a lower level are enlarged
    to S.
    """

    def __init__(self, latent_dim, image_size, channels, width):
        super().__init__()
        widths = channels_at(image_size, width)     # [channels at 4x4, at 8x8, ...]
        self.mapping = MappingNetwork(latent_dim)
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))   # 演習問題4's constant_input
        blocks, inputs = [], width
        for outputs in widths:
            blocks.append(StyleGANGeneratorBlock(inputs, outputs, latent_dim))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.to_rgb = nn.ModuleList(                # features -> image, at each resolution
            scaled(nn.Conv2d(inputs, channels, 1), gain=1) for inputs in widths)
        self.image_size, self.level = image_size, float(len(widths) - 1)

    def get_extra_state(self):
        return torch.tensor(self.level, dtype=torch.float64)    # a checkpoint holds the level, too

    def set_extra_state(self, state):
        self.level = state.item()

    def forward(self, z):
        return self.synthesis(self.styles(z), noise_seed=None if self.training else 0)

    def styles(self, z):
        """The same w for every block: [N, blocks, latent_dim]."""
        return self.mapping(z)[:, None].expand(-1, len(self.blocks), -1)

    def synthesis(self, styles, noise_seed=None):
        """Styles [N, blocks, latent_dim] -> images.

        The noise is new for each sample, or comes from a seed and is the same for all.
        """
        top = math.ceil(self.level)
        rng = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        x = self.constant.expand(len(styles), -1, -1, -1)
        for k, block in enumerate(self.blocks[:top + 1]):
            if k > 0:                               # bilinear: sec. 2 of StyleGAN
                below, x = x, F.interpolate(x, scale_factor=2, mode="bilinear")
            if rng:                                 # on the CPU: all devices draw the same
                noise = torch.randn(1, 2, *x.shape[2:], generator=rng).to(x.device)
            else:
                noise = torch.randn(len(x), 2, *x.shape[2:], device=x.device)
            x = block(x, styles[:, k], noise)
        image = self.to_rgb[top](x)                 # [N, channels, 4 * 2^top, 4 * 2^top]
        if self.level < top:                        # fade-in: ProGAN, figure 2
            coarse = F.interpolate(self.to_rgb[top - 1](below), scale_factor=2)
            image = torch.lerp(coarse, image, self.level - top + 1)
        return F.interpolate(image, self.image_size)


class Discriminator(nn.Module):
    """The mirror of the generator, with its level: images [N, channels, S, S] -> logits [N, 1]."""

    def __init__(self, image_size, channels, width):
        super().__init__()
        widths = channels_at(image_size, width)

        def block(inputs, outputs):
            return nn.Sequential(
                scaled(nn.Conv2d(inputs, inputs, 3, padding=1)), nn.LeakyReLU(0.2),
                scaled(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.LeakyReLU(0.2),
                nn.AvgPool2d(2))

        self.from_rgb = nn.ModuleList(              # image -> features, at each resolution
            nn.Sequential(scaled(nn.Conv2d(channels, outputs, 1)), nn.LeakyReLU(0.2))
            for outputs in widths)
        # Block k leads from 8 * 2^k pixels down to 4 * 2^k.
        self.blocks = nn.ModuleList(block(widths[k + 1], widths[k]) for k in range(len(widths) - 1))
        self.last = nn.Sequential(
            scaled(nn.Conv2d(width + 1, width, 3, padding=1)), nn.LeakyReLU(0.2), nn.Flatten(),
            scaled(nn.Linear(width * 4 * 4, width)), nn.LeakyReLU(0.2),
            scaled(nn.Linear(width, 1), gain=1))
        self.level = float(len(widths) - 1)

    def forward(self, image):
        top = math.ceil(self.level)
        image = F.adaptive_avg_pool2d(image, 4 * 2**top)
        x = self.from_rgb[top](image)
        for k in reversed(range(top)):
            x = self.blocks[k](x)                   # [N, C, 4 * 2^k, 4 * 2^k]
            if k == top - 1 and self.level < top:
                coarse = self.from_rgb[k](F.avg_pool2d(image, 2))   # fade-in, as in the generator
                x = torch.lerp(coarse, x, self.level - top + 1)
        # Minibatch deviation, sec. 3 of ProGAN: one number for the batch, as one more channel.
        deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
        return self.last(torch.cat([x, deviation.expand(len(x), 1, 4, 4)], 1))


def level_at(progress, top):
    """The level at training fraction `progress` (Progressive Growing of 3.5's table).

    During the first half of a stage the level stands still; in the second the next resolution fades
    in. With top = 3 a stage is a sixth of the training: at progress 1/12 the level is still 0, at
    1/8 it is 0.5, at 1/6 it is 1.
    """
    stage, part = divmod(progress / GROWTH * top, 1)
    return min(stage + max(0.0, 2 * part - 1), top)


def with_detail_of(level, images):
    """Images [N, C, S, S] with no more detail than G has at `level` (ProGAN, figure 2)."""
    def at(k):
        return F.interpolate(F.adaptive_avg_pool2d(images, 4 * 2**k), images.size(3))

    top = math.ceil(level)
    return at(top) if level == top else torch.lerp(at(top - 1), at(top), level - top + 1)


def generate_noise(count, args, device, rng=None):
    """Noise z (潜在変数) [count, latent_dim] ~ N(0, I).

    rng: a torch.Generator, PyTorch's source of random numbers.
    """
    return torch.randn(count, args.latent_dim, device=device, generator=rng)


# ---------------------------------------------------------------------------------------- losses
def discriminator_loss(real_logits, fake_logits):
    """L_D without its penalty; the logits are [N, 1]."""
    return (F.softplus(fake_logits) + F.softplus(-real_logits)).mean()


def generator_loss(fake_logits):
    """L_G; the logits are [N, 1]."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits, real):
    """R1 (arXiv 1801.04406): mean ||grad_x D(x)||^2; the images must require gradients.

    It pulls D's slope at real images to 0; 03's penalty pulls it to 1 between real and fake.
    """
    # The sum, as in 03. The minibatch deviation makes a logit depend slightly on the other samples,
    # so that this is R1 only approximately.
    gradient = torch.autograd.grad(real_logits.sum(), real, create_graph=True)[0]
    return gradient.square().sum((1, 2, 3)).mean()


# --------------------------------------------------------------------------------- training step
def mixed_styles(generator, z, probability):
    """Mixing regularisation (3.5, スタイル混合): styles [N, blocks, latent_dim].

    Sec. 3.1 of StyleGAN. The style of z for every block; with this probability, drawn once per
    batch, the blocks from a random one on get the style of another z.
    """
    styles, active = generator.styles(z), math.ceil(generator.level) + 1
    if active > 1 and torch.rand(()) < probability:
        crossing = torch.randint(1, active, ()).item()
        other = generator.styles(torch.randn_like(z))
        styles = torch.cat([styles[:, :crossing], other[:, crossing:]], 1)
    return styles


def discriminator_step(generator, discriminator, optimizer, real, z, style_mixing_prob, r1_weight):
    """One optimizer step that lowers L_D; real: [N, C, S, S], z: [N, latent_dim].

    Returns what to log.
    """
    with torch.no_grad():                           # G is not trained here
        fake = generator.synthesis(mixed_styles(generator, z, style_mixing_prob))
    real = with_detail_of(generator.level, real).requires_grad_()
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    r1 = r1_penalty(real_logits, real)
    loss = discriminator_loss(real_logits, fake_logits) + r1_weight / 2 * r1
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    d_real, d_fake = real_logits.sigmoid(), fake_logits.sigmoid()
    return {"D(x)": d_real.mean(), "D(G(z))": d_fake.mean(), "r1": r1, "loss_D": loss}


def generator_step(generator, discriminator, optimizer, z, style_mixing_prob):
    """One optimizer step that lowers L_G; z: [N, latent_dim]. Returns what to log."""
    fake = generator.synthesis(mixed_styles(generator, z, style_mixing_prob))
    loss = generator_loss(discriminator(fake))
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))  # gradients for G only; D is not updated
    optimizer.step()
    return {"loss_G": loss}


# -------------------------------------------------------------------------------- style pictures
@torch.no_grad()
def mix(generator, z_a, z_b, crossing):
    """演習問題4 (erratum 41): images [B, A, C, S, S] under two styles each.

    Blocks before number `crossing` have the style of z_a [A, latent_dim], the others that of
    z_b [B, latent_dim]. The exercise's own, B from 16x16 on, is crossing 2.
    """
    w_a = generator.styles(z_a)[None]               # [1, A, blocks, latent_dim]
    w_b = generator.styles(z_b)[:, None]            # [B, 1, blocks, latent_dim]
    from_a = torch.arange(len(generator.blocks), device=z_a.device)[:, None] < crossing
    styles = torch.where(from_a, w_a, w_b)          # [B, A, blocks, latent_dim]
    return generator.synthesis(styles.flatten(0, 1), noise_seed=0).unflatten(0, styles.shape[:2])


@torch.no_grad()
def truncate(generator, z, psi):
    """Images [N, C, S, S] of the styles psi w (StyleGAN, appendix B; the mean of w is 0).

    All are alike at psi 0.
    """
    return generator.synthesis(psi * generator.styles(z), noise_seed=0)


@torch.no_grad()
def renoise(generator, z, count):
    """Images [N, count, C, S, S] of the same styles under `count` noises."""
    styles = generator.styles(z)
    images = [generator.synthesis(styles, noise_seed=seed) for seed in range(count)]
    return torch.stack(images, 1)


@torch.no_grad()
def draw_style_mixing(pipeline, path):
    """style_mixing.png: sources A across the top, B down the side; eight columns per crossing."""
    generator = pipeline.generator
    crossings = 1, 2, len(generator.blocks) - 1
    z_a, z_b = pipeline.noise(12).to(pipeline.device).split([7, 5])
    a, b = (generator.synthesis(generator.styles(z), noise_seed=0) for z in (z_a, z_b))
    top = torch.cat([torch.ones_like(a[:1]), a])[None]      # [1, 8, C, S, S]: a corner, then A
    panels = [torch.cat([top, torch.cat([b[:, None], mix(generator, z_a, z_b, crossing)], 1)])
              for crossing in crossings]                    # [6, 8, C, S, S] each
    last = ", ".join(f"{2 * 2**crossing}x{2 * 2**crossing}" for crossing in crossings)
    title = f"A (across the top) up to {last}, B (down the side) at the finer resolutions"
    images = torch.cat(panels, 1).flatten(0, 1).cpu()
    common.save_picture(images, 8 * len(panels), path, title=title)


def draw_truncation(pipeline, path):
    """truncation.png: a latent vector per row, psi from 0 to 1."""
    z = pipeline.noise(8).to(pipeline.device)
    images = [truncate(pipeline.generator, z, psi / 10) for psi in range(11)]
    rows = torch.stack(images, 1)                   # [8, 11, C, S, S]
    common.save_picture(rows.flatten(0, 1).cpu(), 11, path, title="psi = 0, 0.1, ..., 1")


def draw_noise(pipeline, path):
    """noise.png: a style per row under eight noises, then each pixel's deviation over 100."""
    images = renoise(pipeline.generator, pipeline.noise(6).to(pipeline.device), 100).cpu()
    deviation = images.std(1, keepdim=True)
    rows = torch.cat([images[:, :8], deviation / deviation.max() * 2 - 1], 1)   # [6, 9, C, S, S]
    title = f"eight of 100 noises; last, their deviation (white: {deviation.max():.2f})"
    common.save_picture(rows.flatten(0, 1), 9, path, title=title)


STYLES = {"style_mixing": draw_style_mixing, "truncation": draw_truncation, "noise": draw_noise}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    sizes = 32, 64, 128
    args = common.Parser(__file__, __doc__, CONSTANTS, FLAGS, sizes, kernels=True).options(argv)
    shape = args.image_size, args.channels, args.width
    generator = Generator(args.latent_dim, *shape).to(args.device)
    if args.run:                                    # --from RUN: draw from it, no training
        return common.sample(args, generator, generate_noise, STYLES)

    discriminator = Discriminator(*shape).to(args.device, memory_format=torch.channels_last)
    top = float(len(generator.blocks) - 1)
    generator.level = discriminator.level = 0.0 if args.progressive == "on" else top
    synthesis = [generator.constant, *generator.blocks.parameters(),
                 *generator.to_rgb.parameters()]
    groups = [{"params": synthesis},
              {"params": generator.mapping.parameters(), "lr": args.lr_g * MAPPING_RATE}]
    betas = args.beta1, args.beta2
    # fused=True: a faster Adam, no kernel of csrc/
    optimizer_g = torch.optim.Adam(groups, args.lr_g, betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas, fused=True)

    if args.compare_kernels:
        generator.level = discriminator.level = top     # where AdaIN costs most
        return common.compare_kernels(args, adain, lambda: generator_step(
            generator, discriminator, optimizer_g,
            generate_noise(args.batch_size, args, args.device), args.style_mixing_prob))

    equilibrium = {"equilibrium of D: 2 ln 2": 2 * math.log(2), "of G: ln 2": math.log(2)}
    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {"equilibrium 0.5": 0.5}),
             ("loss", ["loss_D", "loss_G"], equilibrium),
             ("R1 penalty", ["r1"], {}), ("level", ["level"], {})]
    run = common.Run(args, generate_noise, plots, STYLES, generator=generator,
                     discriminator=discriminator, optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    for batches in run.epochs():
        for _ in run.steps():       # after each step the average of G is updated (ema_decay)
            if args.progressive == "on":
                progress = (run.step + 1) / (args.epochs * run.steps_per_epoch)
                generator.level = discriminator.level = level_at(progress, top)
            # Discriminator: D towards 1 for real, towards 0 for fake.
            real, _ = next(batches)
            z = generate_noise(args.batch_size, args, args.device)
            run.record(discriminator_step(generator, discriminator, optimizer_d, real, z,
                                          args.style_mixing_prob, args.r1_weight))
            # Generator: D of its samples towards 1.
            z = generate_noise(args.batch_size, args, args.device)
            run.record(generator_step(generator, discriminator, optimizer_g, z,
                                      args.style_mixing_prob))
            run.record({"level": torch.tensor(generator.level)})


if __name__ == "__main__":
    common.guarded(main)
