"""What each training step of 01 to 05 computes, what it may touch, and which data it gets (06 has tests of its own)."""

import pytest
import torch

from conftest import SCRIPTS, load_script, snapshot, unchanged

CASES = [("01_vanilla_gan", "bce"), ("01_vanilla_gan", "two-logit"), ("02_dcgan", "dcgan"), ("03_wgan_gp", "mlp"),
         ("03_wgan_gp", "conv"), ("03_wgan_gp", "points"), ("04_cgan", "cgan"), ("05_sn_label_smoothing", "dcgan")]


class Setting:
    """Networks, optimizers and one batch of a script's variant, and its two steps with the right arguments."""

    def __init__(self, script, variant):
        torch.manual_seed(0)
        self.module = module = load_script(script)
        self.wasserstein = script in ("03_wgan_gp", "04_cgan")
        if script in ("01_vanilla_gan", "03_wgan_gp"):
            self.generator, self.critic = (make() for make in module.NETWORKS[variant])
        else:
            self.generator = module.Generator()
            self.critic = module.Critic() if self.wasserstein else module.Discriminator()
        self.optimizer_g, self.optimizer_c = (torch.optim.Adam(network.parameters(), 1e-3)
                                              for network in (self.generator, self.critic))
        self.real = torch.rand(6, *((2,) if variant == "points" else (1, 28, 28))) * 2 - 1
        self.z, self.labels = torch.randn(6, 100), (torch.arange(6),) if script == "04_cgan" else ()
        self.losses = None
        if script == "01_vanilla_gan":
            self.losses = module.TWO_LOGITS if variant == "two-logit" else module.ONE_LOGIT

    def critic_step(self):
        step = self.module.critic_step if self.wasserstein else self.module.discriminator_step
        last = (10.0,) if self.wasserstein else ("none",) if hasattr(self.module, "LABELS") else ()
        if self.losses:
            last = self.losses[0], self.losses[2]
        return step(self.generator, self.critic, self.optimizer_c, self.real, *self.labels, self.z, *last)

    def generator_step(self, kind="non-saturating"):
        last = (*self.losses[1:], kind) if self.losses else ()
        return self.module.generator_step(self.generator, self.critic, self.optimizer_g, self.z, *self.labels, *last)


@pytest.fixture(params=CASES, ids="-".join)
def setting(request):
    return Setting(*request.param)


def test_each_step_trains_one_network_alone(setting):
    generator, critic = setting.generator, setting.critic
    before = snapshot(generator.named_parameters()), snapshot(critic.named_parameters())
    setting.critic_step()
    assert unchanged(before[0], dict(generator.named_parameters()))
    assert all(parameter.grad is None for parameter in generator.parameters())
    same = [name for name, parameter in critic.named_parameters() if torch.equal(before[1][name], parameter)]
    assert same == list(before[1])[-1:] * setting.wasserstein  # its last bias cancels in C(x) - C(G(z))

    after = snapshot(critic.named_parameters())
    gradients = snapshot((name, parameter.grad) for name, parameter in critic.named_parameters())
    setting.generator_step()
    assert unchanged(after, dict(critic.named_parameters()))
    assert unchanged(gradients, {name: parameter.grad for name, parameter in critic.named_parameters()})
    for name, parameter in generator.named_parameters():  # a bias before BatchNorm has no effect and need not move
        assert not torch.equal(before[0][name], parameter) or name.endswith("bias") or "embedding" in name


def expected_of_critic(setting):
    """What its step logs, the text's Q last, written down anew, from the same random numbers as the step's."""
    s, fake = setting, setting.generator(setting.z, *setting.labels).detach()
    real_score, fake_score = s.critic(s.real, *s.labels), s.critic(fake, *s.labels)
    if s.wasserstein:
        torch.manual_seed(7)
        epsilon = torch.rand(len(s.real), *[1] * (s.real.dim() - 1))
        x_hat = (epsilon * s.real + (1 - epsilon) * fake).requires_grad_()
        slopes, = torch.autograd.grad(s.critic(x_hat, *s.labels).sum(), x_hat, create_graph=True)
        norms, w = slopes.flatten(1).square().sum(1).sqrt(), real_score.mean() - fake_score.mean()
        penalty = ((norms - 1) ** 2).mean()
        return {"W": w, "penalty": penalty, "grad_norm": norms.mean(), "loss_C": -w + 10 * penalty}
    real, fake = (probability(score) for score in (real_score, fake_score))
    right = {"acc_D": ((real > 0.5).float().mean() + (fake <= 0.5).float().mean()) / 2} if s.losses else {}
    loss = -(real.log().mean() + (1 - fake).log().mean()) / (3 - real_score.size(1))  # two logits: the sum
    return {"D(x)": real.mean(), "D(G(z))": fake.mean(), **right, "loss_D": loss}


def probability(score):
    return score.softmax(1)[:, 1] if score.size(1) == 2 else score.sigmoid()


def expected_of_generator(setting, kind):
    """The same of its step and the text's P."""
    score = setting.critic(setting.generator(setting.z, *setting.labels), *setting.labels)
    if setting.wasserstein:
        return {"loss_G": -score.mean()}
    real = probability(score)
    fooled = {"acc_G": (real > 0.5).float().mean()} if setting.losses else {}
    return {**fooled, "loss_G": (1 - real).log().mean() if kind == "saturating" else -real.log().mean()}


def check_step(network, expected, step, *arguments):
    """The step returns what is expected and leaves the gradient of the loss, which comes last, in the network."""
    gradients = torch.autograd.grad([*expected.values()][-1], list(network.parameters()), allow_unused=True)
    torch.manual_seed(7)
    torch.testing.assert_close(step(*arguments), expected)
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_steps_descend_the_costs_of_the_text(setting):
    setting.generator.eval(), setting.critic.eval()  # without dropout and batch statistics both are functions
    check_step(setting.critic, expected_of_critic(setting), setting.critic_step)
    for kind in ["non-saturating", "saturating"][:2 if setting.losses else 1]:
        check_step(setting.generator, expected_of_generator(setting, kind), setting.generator_step, kind)


def test_conditions_cover_every_class():
    labels = load_script("04_cgan").generate_condition(10_000, "cpu")
    assert labels.dtype == torch.int64 and 900 < torch.bincount(labels, minlength=10).min() and labels.max() == 9


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_step_has_its_own_batch_and_noise(script, monkeypatch, tmp_path, few_digits):
    """Erratum 10: five critic steps, then one of G, with five real batches and six z; in all scripts a new z for G."""
    module, order, seen = load_script(script), [], {"real": [], "z": [], "c": []}
    conditional = script == "04_cgan"

    def watch(name, *arguments_seen):
        step = getattr(module, name)

        def call(*arguments):
            order.append(name)
            for what, value in zip(arguments_seen, arguments[3:], strict=False):
                seen[what].append(value.clone())
            if conditional and name == "critic_step":
                real, c = arguments[3:5]
                assert torch.equal(((real[:, 0, 0, 0] + 1) * 127.5).round().long(), c), "each image has its own label"
            return step(*arguments)
        monkeypatch.setattr(module, name, call)

    critic_step = "critic_step" if hasattr(module, "critic_step") else "discriminator_step"
    watch(critic_step, "real", *["c"] * conditional, "z")
    watch("generator_step", "z", *["c"] * conditional)
    small = {"05_sn_label_smoothing": ["--dataset", "gaussians", "--n-critic", "5"],
             "06_stylegan_blocks": ["--width", "32", "--latent-dim", "8"]}.get(script, [])
    monkeypatch.setattr("common.Run._final_pictures", lambda run: None)
    module.main(["--dataset", "digits", "--epochs", "1", "--max-batches", "2", "--batch-size", "8", "--device", "cpu",
                 "--eval-interval", "0", "--output-dir", str(tmp_path), *small])
    count = 5 if script in ("03_wgan_gp", "04_cgan", "05_sn_label_smoothing") else 1
    assert order == [*[critic_step] * count, "generator_step"] * 2
    assert [len(values) for values in seen.values()] == [2 * count, 2 * count + 2, (2 * count + 2) * conditional]
    for values in seen.values():
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
