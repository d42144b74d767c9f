"""StyleGAN: a style from the mapping network (マッピングネットワーク) enters at every resolution.

Text: chapter 3, section 3.5 (example 7), exercise 4.

    w = f(z)                                                     mapping network: 8 layers
    AdaIN(x, w) = (1 + scale(w)) (x - mu) / sigma + bias(w)      mu, sigma: of each channel of each sample
    x <- LeakyReLU(AdaIN(conv(x) + strength noise, w))           twice per block, the order of the listing
    L_D = mean(softplus(D(G(z))) + softplus(-D(x))) + r1_weight / 2 mean(||grad_x D(x)||^2)
    L_G = mean(softplus(-D(G(z))))                               softplus(-l) = -log sigmoid(l): non-saturating

    python 06_stylegan_blocks.py                                            MNIST at 32x32, thin enough for a CPU
    python 06_stylegan_blocks.py --width 256 --latent-dim 512               the text's widths: block 128 -> 64, 8 x 512
    python 06_stylegan_blocks.py --image-size 64 --channels 3 --dataset folder --data-dir DIR    your own images
    python 06_stylegan_blocks.py --from RUN --styles                        mixing, truncation, noise

The text has the mapping network and one block. Ours besides them: the generator and discriminator around
the block, the loss and the growing, after ProGAN (arXiv 1710.10196) and StyleGAN (arXiv 1812.04948).
Differs from the text: the styles act from the start (erratum 38); a noise per layer, not at 0 (erratum 37).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import common

# ------------------------------------------------------------------------------- hyperparameters
# The slope is the text's, the betas and the mixing are StyleGAN's, the rest is ours: what showed digits within an
# hour on two cores. The text's 512 latent dimensions learned worse in that time. D learns faster than G (TTUR, see
# 05): at equal rates G collapsed in short trials, all with 512. The mapping network learns slower than the rest,
# as in StyleGAN, where it does so at a hundredth: too slow for a training as short as this.
CONSTANTS = {
    "stylegan": dict(epochs=8, batch_size=32, lr_g=1e-3, lr_d=4e-3, beta1=0.0, beta2=0.99, latent_dim=64, slope=0.2,
                     image_size=32, channels=1, width=64, progressive="on", style_mixing_prob=0.9, r1_weight=1.0,
                     ema_decay=0.998),  # samples are of a moving average of G: half-life 10,000 images, as StyleGAN's
}
MAPPING_RATE = 0.1      # the mapping network's learning rate, in parts of lr_g
W_DECAY = 0.995         # per step, of the moving average of w (StyleGAN's code)
NOISE_START = 0.1       # of the noises' strengths (erratum 37)
GROWTH = 0.5            # the part of the training in which the networks grow


# -------------------------------------------------------------------------------------- networks
class Scale(nn.Module):
    """A parametrization: the weight times a constant."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return weight * self.factor


def scaled(layer, gain=2**0.5):
    """Runtime weight scaling (ProGAN, 4.1): weights from N(0, 1), in use times gain / sqrt(inputs of a neuron)."""
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return register_parametrization(layer, "weight", Scale(gain / math.sqrt(layer.weight[0].numel())))


class MappingNetwork(nn.Sequential):
    """Example 7: z [N, latent_dim] -> w [N, latent_dim]; 2,101,248 parameters at 512."""

    def __init__(self, latent_dim=512, num_layers=8, slope=0.2):
        layers = [(scaled(nn.Linear(latent_dim, latent_dim)), nn.LeakyReLU(slope)) for _ in range(num_layers)]
        super().__init__(*(part for layer in layers for part in layer))

    def forward(self, z):
        return super().forward(F.normalize(z) * math.sqrt(z.size(1)))  # z on a sphere (ProGAN, appendix A)


@common.fused("adain")
def adain(x, scale, bias, noise=None, strength=None, slope_before=1.0, slope_after=1.0):
    """x [N, C, H, W] plus noise, normalised per sample and channel to a new scale and mean [N, C], activated.

    noise: [N or 1, 1, H, W], its strength [1] or [C]. A slope of 1 is no LeakyReLU; the listing has one after the
    normalisation, StyleGAN before it (erratum 36).
    """
    if noise is not None:
        x = x + strength[:, None, None] * noise
    if slope_before != 1:
        x = F.leaky_relu(x, slope_before)
    x = scale[:, :, None, None] * F.instance_norm(x) + bias[:, :, None, None]
    return x if slope_after == 1 else F.leaky_relu(x, slope_after)


class AdaptiveInstanceNorm(nn.Module):
    """Example 7: normalises x [N, C, H, W] per sample and channel; w [N, w_dim] gives the new scale and mean."""

    def __init__(self, num_features, w_dim=512):
        super().__init__()
        self.style_scale = scaled(nn.Linear(w_dim, num_features), gain=1)
        self.style_bias = scaled(nn.Linear(w_dim, num_features), gain=1)

    def forward(self, x, w, noise=None, strength=None, slope=1.0):
        scale = 1 + self.style_scale(w)                         # 1 +: StyleGAN's code, erratum 38
        return adain(x, scale, self.style_bias(w), noise, strength, slope_after=slope)


class StyleGANGeneratorBlock(nn.Module):
    """Example 7: x [N, in, H, W], w [N, w_dim], noise [N or 1, 2, H, W] -> [N, out, H, W].

    242,050 parameters from 128 to 64 channels (erratum 30). conv, noise, AdaIN, LeakyReLU: the listing's order,
    neither that of its comments nor the paper's, which has LeakyReLU before AdaIN (erratum 36).
    """

    def __init__(self, in_channels, out_channels, w_dim=512, slope=0.2):
        super().__init__()
        self.conv1 = scaled(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.noise1 = nn.Parameter(torch.full((1,), NOISE_START))
        self.adain1 = AdaptiveInstanceNorm(out_channels, w_dim)
        self.conv2 = scaled(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.noise2 = nn.Parameter(torch.full((1,), NOISE_START))
        self.adain2 = AdaptiveInstanceNorm(out_channels, w_dim)
        self.slope = slope

    def forward(self, x, w, noise):
        x = self.adain1(self.conv1(x), w, noise[:, :1], self.noise1, self.slope)
        return self.adain2(self.conv2(x), w, noise[:, 1:], self.noise2, self.slope)


def channels_at(image_size, width):
    """Channels at 4x4, 8x8, ..., image_size: `width` at 4 and 8, halved with every doubling from there."""
    return [width // 2**max(0, k - 1) for k in range(int(math.log2(image_size)) - 1)]


class Generator(nn.Module):
    """z [N, latent_dim] -> images [N, channels, S, S], about in [-1, 1] (there is no Tanh), S = image_size.

    `level` says how far it has grown: at level k the blocks 0 to k are in use, the last one at 4 * 2^k pixels;
    between k and k + 1 block k + 1 fades in. Images of a lower level are enlarged to S.
    """

    def __init__(self, latent_dim=512, slope=0.2, image_size=32, channels=1, width=256):
        super().__init__()
        outputs = channels_at(image_size, width)
        self.mapping = MappingNetwork(latent_dim, slope=slope)
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))           # exercise 4's constant_input; start: ours
        self.blocks = nn.ModuleList(StyleGANGeneratorBlock(inputs, o, latent_dim, slope)
                                    for inputs, o in zip([width, *outputs], outputs))
        self.to_rgb = nn.ModuleList(scaled(nn.Conv2d(o, channels, 1), gain=1) for o in outputs)
        self.register_buffer("w_mean", torch.zeros(latent_dim))             # moving average, for truncation
        self.image_size, self.level = image_size, float(len(outputs) - 1)

    def get_extra_state(self):
        return torch.tensor(self.level)                         # a checkpoint holds the level, too

    def set_extra_state(self, state):
        self.level = state.item()

    def forward(self, z):
        return self.synthesis(self.styles(z), noise_seed=None if self.training else 0)

    def styles(self, z):
        """The same w for every block: [N, blocks, latent_dim]."""
        return self.mapping(z)[:, None].expand(-1, len(self.blocks), -1)

    def synthesis(self, styles, noise_seed=None):
        """Styles [N, blocks, latent_dim] -> images; noise new for each sample, or from a seed and the same for all."""
        top, rng = math.ceil(self.level), None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        x = self.constant.expand(len(styles), -1, -1, -1)
        for k, block in enumerate(self.blocks[:top + 1]):
            if k > 0:                                           # bilinear: StyleGAN, section 2
                below, x = x, F.interpolate(x, scale_factor=2, mode="bilinear")
            if rng:                                             # on the CPU: every device draws the same picture
                noise = torch.randn(1, 2, *x.shape[2:], generator=rng).to(x.device)
            else:
                noise = torch.randn(len(x), 2, *x.shape[2:], device=x.device)
            x = block(x, styles[:, k], noise)
        image = self.to_rgb[top](x)                             # [N, channels, 4 * 2^top, 4 * 2^top]
        if self.level < top:                                    # fade-in: ProGAN, figure 2
            coarse = F.interpolate(self.to_rgb[top - 1](below), scale_factor=2)
            image = torch.lerp(coarse, image, self.level - top + 1)
        return F.interpolate(image, self.image_size)


class Discriminator(nn.Module):
    """The mirror of the generator, with its level: images [N, channels, S, S] -> logits [N, 1]."""

    def __init__(self, slope=0.2, image_size=32, channels=1, width=256):
        super().__init__()
        inputs = channels_at(image_size, width)

        def block(i, o):
            return nn.Sequential(scaled(nn.Conv2d(i, i, 3, padding=1)), nn.LeakyReLU(slope),
                                 scaled(nn.Conv2d(i, o, 3, padding=1)), nn.LeakyReLU(slope), nn.AvgPool2d(2))

        self.from_rgb = nn.ModuleList(nn.Sequential(scaled(nn.Conv2d(channels, i, 1)), nn.LeakyReLU(slope))
                                      for i in inputs)
        self.blocks = nn.ModuleList(block(i, o) for i, o in zip(inputs[1:], inputs))
        self.last = nn.Sequential(
            scaled(nn.Conv2d(width + 1, width, 3, padding=1)), nn.LeakyReLU(slope), nn.Flatten(),
            scaled(nn.Linear(width * 4 * 4, width)), nn.LeakyReLU(slope), scaled(nn.Linear(width, 1), gain=1))
        self.level = float(len(inputs) - 1)

    def forward(self, image):
        top = math.ceil(self.level)
        image = F.adaptive_avg_pool2d(image, 4 * 2**top)
        x = self.from_rgb[top](image)
        for k in reversed(range(top)):
            x = self.blocks[k](x)                               # [N, C, 4 * 2^k, 4 * 2^k]
            if k == top - 1 and self.level < top:
                coarse = self.from_rgb[k](F.avg_pool2d(image, 2))
                x = torch.lerp(coarse, x, self.level - top + 1)
        deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()         # minibatch deviation: ProGAN, 3
        return self.last(torch.cat([x, deviation.expand(len(x), 1, 4, 4)], 1))


def level_at(progress, top):
    """The level after a part `progress` of the training, 0 to 1: each resolution stands, then the next one fades in."""
    stage, part = divmod(progress / GROWTH * top, 1)
    return min(stage + max(0.0, 2 * part - 1), top)


def with_detail_of(level, images):
    """Real images [N, C, S, S] with no more detail than the generator has at `level` (ProGAN, figure 2)."""
    def at(k):
        return F.interpolate(F.adaptive_avg_pool2d(images, 4 * 2**k), images.size(3))

    top = math.ceil(level)
    return at(top) if level == top else torch.lerp(at(top - 1), at(top), level - top + 1)


def generate_noise(count, args, device, generator=None):
    """z [count, latent_dim] ~ N(0, I)."""
    return torch.randn(count, args.latent_dim, device=device, generator=generator)


# ---------------------------------------------------------------------------------------- losses
def discriminator_loss(real_logits, fake_logits):
    """L_D without its penalty; the logits are [N, 1]."""
    return (F.softplus(fake_logits) + F.softplus(-real_logits)).mean()


def generator_loss(fake_logits):
    """L_G; the logits are [N, 1]."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits, real):
    """R1 (arXiv 1801.04406): mean ||grad_x D(x)||^2 over the real images, which must require gradients."""
    gradient, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


# --------------------------------------------------------------------------------- training step
def mixed_styles(generator, z, probability):
    """Mixing regularisation (StyleGAN, 3.1): styles [N, blocks, latent_dim] of z, from some block on of another z."""
    styles, active = generator.styles(z), math.ceil(generator.level) + 1
    if active > 1 and torch.rand(()) < probability:
        crossing = torch.randint(1, active, ()).item()
        styles = torch.cat([styles[:, :crossing], generator.styles(torch.randn_like(z))[:, crossing:]], 1)
    return styles


def discriminator_step(generator, discriminator, optimizer, real, z, style_mixing_prob, r1_weight):
    """One step down L_D; real: [N, C, S, S], z: [N, latent_dim]. Returns what the epoch line reports."""
    with torch.no_grad():                                       # G is not trained here
        fake = generator.synthesis(mixed_styles(generator, z, style_mixing_prob))
    real = with_detail_of(generator.level, real).requires_grad_()
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    penalty = r1_penalty(real_logits, real)
    loss = discriminator_loss(real_logits, fake_logits) + r1_weight / 2 * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"D(x)": real_logits.sigmoid().mean(), "D(G(z))": fake_logits.sigmoid().mean(),
            "penalty": penalty, "loss_D": loss}


def generator_step(generator, discriminator, optimizer, z, style_mixing_prob):
    """One step down L_G; z: [N, latent_dim]. Moves the average of w on."""
    styles = mixed_styles(generator, z, style_mixing_prob)
    loss = generator_loss(discriminator(generator.synthesis(styles)))
    optimizer.zero_grad()
    loss.backward(inputs=list(generator.parameters()))          # D passes the gradient on and stays as it is
    optimizer.step()
    generator.w_mean.lerp_(styles[:, 0].detach().mean(0), 1 - W_DECAY)
    return {"loss_G": loss}


# -------------------------------------------------------------------------------- style pictures
@torch.no_grad()
def mix(generator, z_a, z_b, crossing):
    """Exercise 4 (erratum 41): images [B, A, C, S, S] under two styles each.

    Blocks before number `crossing` have the style of z_a [A, latent_dim], the others that of z_b [B, latent_dim].
    """
    w_a, w_b = generator.styles(z_a)[None], generator.styles(z_b)[:, None]
    from_a = torch.arange(len(generator.blocks), device=z_a.device)[:, None] < crossing
    return generator.synthesis(torch.where(from_a, w_a, w_b).flatten(0, 1), noise_seed=0).unflatten(0, (-1, len(z_a)))


@torch.no_grad()
def truncate(generator, z, psi):
    """Images [N, C, S, S] of the styles w_mean + psi (w - w_mean): all alike at psi 0 (StyleGAN, appendix B)."""
    return generator.synthesis(torch.lerp(generator.w_mean, generator.styles(z), psi), noise_seed=0)


@torch.no_grad()
def renoise(generator, z, count):
    """Images [N, count, C, S, S] of the same styles under `count` noises."""
    return torch.stack([generator.synthesis(generator.styles(z), noise_seed=seed) for seed in range(count)], 1)


@torch.no_grad()
def draw_style_mixing(pipeline, path):
    """style_mixing.png: sources A across the top, B down the side; a panel for coarse, middle and fine crossing."""
    generator = pipeline.generator
    crossings = [k for k in (1, 2, len(generator.blocks) - 1) if k <= math.ceil(generator.level)]
    if not crossings:
        common.fail("--styles mixes the styles of two resolutions; this run was interrupted at its first, 4x4")
    z_a, z_b = pipeline.noise(12).to(pipeline.device).split([7, 5])
    a, b = (generator.synthesis(generator.styles(z), noise_seed=0) for z in (z_a, z_b))
    panels = {}
    for crossing in crossings:
        rows = torch.cat([b[:, None], mix(generator, z_a, z_b, crossing)], 1)
        top = torch.cat([torch.ones_like(a[:1]), a])
        last, size = 2 * 2**crossing, 4 * 2**crossing
        panels[f"A to {last}x{last}, B from {size}x{size} on"] = torch.cat([top, rows.flatten(0, 1)]).cpu(), 8
    common.save_panels(panels, path)


def draw_truncation(pipeline, path):
    """truncation.png: a latent vector per row, psi from 0 to 1."""
    z = pipeline.noise(8).to(pipeline.device)
    images = torch.stack([truncate(pipeline.generator, z, psi / 10) for psi in range(11)], 1)
    common.save_panels({"psi = 0, 0.1, ..., 1": (images.flatten(0, 1).cpu(), 11)}, path)


def draw_noise(pipeline, path):
    """noise.png: a style per row under eight noises; in the last column each pixel's deviation over 100 noises."""
    images = renoise(pipeline.generator, pipeline.noise(6).to(pipeline.device), 100).cpu()
    deviation = images.std(1, keepdim=True)
    rows = torch.cat([images[:, :8], deviation / deviation.max() * 2 - 1], 1)
    common.save_panels({f"eight noises; last, their standard deviation (white: {deviation.max():.2f})":
                        (rows.flatten(0, 1), 9)}, path)


STYLES = {"style_mixing": draw_style_mixing, "truncation": draw_truncation, "noise": draw_noise}


# ------------------------------------------------------------------------------------------ main
def main(argv=None):
    parser = common.Parser(__file__, __doc__, CONSTANTS, image_sizes=(32, 64, 128), kernels="generator")
    parser.option("--width", "channels at 4x4 and 8x8; halved with every doubling from there",
                  type=common.number(int, at_least=32, below=10_000), metavar="N")
    parser.option("--progressive", "grow from 4x4 on, or train at full size throughout", choices=["on", "off"])
    parser.option("--style-mixing-prob", "share of the steps that mix the styles of two z",
                  type=common.number(float, at_least=0, at_most=1), metavar="P")
    parser.option("--r1-weight", "weight of the R1 penalty", type=common.number(float, at_least=0), metavar="X")
    parser.option("--styles", "with --from: style mixing, truncation and noise", action="store_const", const=True)
    parser.option("--compare-kernels", "check and time the fused kernels", action="store_const", const=True)
    args = parser.options(argv)
    shape = dict(slope=args.slope, image_size=args.image_size, channels=args.channels, width=args.width)
    if args.run:
        return common.sample_run(Generator(args.latent_dim, **shape), generate_noise, args, STYLES)

    data = common.prepare(args)
    generator = Generator(args.latent_dim, **shape).to(args.device)
    discriminator = Discriminator(**shape).to(args.device)
    top = float(len(generator.blocks) - 1)
    generator.level = discriminator.level = 0.0 if args.progressive == "on" else top
    synthesis = [generator.constant, *generator.blocks.parameters(), *generator.to_rgb.parameters()]
    groups = [{"params": synthesis}, {"params": generator.mapping.parameters(), "lr": args.lr_g * MAPPING_RATE}]
    optimizer_g = torch.optim.Adam(groups, args.lr_g, (args.beta1, args.beta2))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, (args.beta1, args.beta2))

    if "compare_kernels" in args:
        generator.level = discriminator.level = top             # where AdaIN costs most
        return common.compare_kernels(args, "adain", adain, lambda: generator_step(
            generator, discriminator, optimizer_g, generate_noise(args.batch_size, args, args.device),
            args.style_mixing_prob))

    plots = [("discriminator's probability", ["D(x)", "D(G(z))"], {"equilibrium 0.5": 0.5}),
             ("loss", ["loss_D", "loss_G"], {"equilibrium 2 ln 2": 2 * math.log(2), "equilibrium ln 2": math.log(2)}),
             ("penalty", ["penalty"], {}), ("level", ["level"], {})]
    with common.Run(args, data, generate_noise, plots, STYLES, generator=generator,
                    discriminator=discriminator, optimizer_g=optimizer_g, optimizer_d=optimizer_d) as run:
        for batches in run.epochs():
            for _ in run.steps():
                if args.progressive == "on":
                    level = level_at((run.step + 1) / (args.epochs * run.steps_per_epoch), top)
                    generator.level = discriminator.level = level
                real, _ = next(batches)
                z = generate_noise(args.batch_size, args, args.device)
                run.record(discriminator_step(generator, discriminator, optimizer_d, real, z,
                                              args.style_mixing_prob, args.r1_weight))
                z = generate_noise(args.batch_size, args, args.device)
                run.record(generator_step(generator, discriminator, optimizer_g, z, args.style_mixing_prob))
                run.record({"level": torch.tensor(generator.level)})


if __name__ == "__main__":
    main()
