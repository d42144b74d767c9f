"""What each training step of 01 to 05 computes, what it may touch, and which data it gets (06 has tests of its own)."""

import pytest
import torch

from conftest import SCRIPTS, load_script, snapshot, unchanged  # puts common on the path

import common

CASES = [("01_vanilla_gan", variant) for variant in ("bce", "two-logit", "keras", "points")] + [("02_dcgan", "dcgan")]
CASES += [("03_wgan_gp", variant) for variant in ("mlp", "conv", "points")] + [("04_cgan", "cgan")]
CASES += [("05_sn_label_smoothing", variant) for variant in ("dcgan", "points")]


class Setting:
    """Networks, optimizers and one batch of a script's variant, and its two steps with the right arguments."""

    def __init__(self, script, variant):
        torch.manual_seed(0)
        self.module = module = load_script(script)
        if script != "02_dcgan" and hasattr(module, "NETWORKS"):
            make_generator, make_critic = module.NETWORKS[variant]
            self.generator, self.critic = make_generator(100), make_critic()
        else:
            self.generator = module.Generator()
            self.critic = module.Critic() if script == "04_cgan" else module.Discriminator()
        self.optimizer_g, self.optimizer_c = (torch.optim.Adam(net.parameters(), 1e-3) for net in (self.generator, self.critic))
        self.real = torch.rand(6, *((2,) if variant == "points" else (1, 28, 28))) * 2 - 1
        self.z = torch.randn(6, 100)
        self.labels = (torch.arange(6),) if script == "04_cgan" else ()
        self.wasserstein = script in ("03_wgan_gp", "04_cgan")
        self.losses = (lambda kind: module.losses(variant, kind)) if script == "01_vanilla_gan" else None

    def critic_step(self, explicit=False):
        step = self.module.critic_step if self.wasserstein else self.module.discriminator_step
        last = (10.0, explicit) if self.wasserstein else ("none",) if hasattr(self.module, "LABELS") else ()
        if self.losses:
            q, _, probability = self.losses("non-saturating")
            last = q, probability
        return step(self.generator, self.critic, self.optimizer_c, self.real, *self.labels, self.z, *last)

    def generator_step(self, kind="non-saturating"):
        last = self.losses(kind)[1:] if self.losses else ()
        return self.module.generator_step(self.generator, self.critic, self.optimizer_g, self.z, *self.labels, *last)


@pytest.fixture(params=CASES, ids="-".join)
def setting(request):
    return Setting(*request.param)


def test_critic_step_trains_the_critic_alone(setting):
    generator, critic = snapshot(setting.generator.named_parameters()), snapshot(setting.critic.named_parameters())
    quantities = setting.critic_step()
    assert unchanged(generator, dict(setting.generator.named_parameters()))
    assert all(parameter.grad is None for parameter in setting.generator.parameters())
    after = dict(setting.critic.named_parameters())
    same = [name for name in critic if torch.equal(critic[name], after[name])]
    assert same == list(critic)[-1:] * setting.wasserstein      # its last bias cancels in C(x) - C(G(z))
    assert all(value.dim() == 0 and value.isfinite() for value in quantities.values())


def test_generator_step_trains_the_generator_alone(setting):
    setting.critic_step()
    generator, critic = snapshot(setting.generator.named_parameters()), snapshot(setting.critic.named_parameters())
    gradients = snapshot((name, parameter.grad) for name, parameter in setting.critic.named_parameters())
    quantities = setting.generator_step()
    assert unchanged(critic, dict(setting.critic.named_parameters()))
    assert unchanged(gradients, {name: parameter.grad for name, parameter in setting.critic.named_parameters()})
    after = dict(setting.generator.named_parameters())
    changed = {name for name in generator if not torch.equal(generator[name], after[name])}
    # a bias before BatchNorm has no effect, so its gradient is rounding noise and need not move it
    assert changed >= {name for name in generator if name.endswith("weight") and "embedding" not in name}
    assert all(value.dim() == 0 and value.isfinite() for value in quantities.values())


def test_buffers_move_only_by_forward_passes(setting):
    """BatchNorm's running statistics follow every forward pass in training mode, and nothing else."""
    for step in (setting.critic_step, setting.generator_step):
        for network in (setting.generator, setting.critic):
            counters = {name: value.item() for name, value in network.named_buffers() if name.endswith("num_batches_tracked")}
            step_was_critic = step == setting.critic_step
            step()
            expected = 1 if network is setting.generator else (2 if step_was_critic else 1)
            assert all(dict(network.named_buffers())[name].item() == value + expected for name, value in counters.items())


def expected_of_critic(setting):
    """What its step logs, the text's Q last, written down anew, from the same random numbers as the step's."""
    s, fake = setting, setting.generator(setting.z, *setting.labels).detach()
    real_score, fake_score = s.critic(s.real, *s.labels), s.critic(fake, *s.labels)
    if s.wasserstein:
        torch.manual_seed(7)
        epsilon = torch.rand(len(s.real), *[1] * (s.real.dim() - 1))
        xhat = (epsilon * s.real + (1 - epsilon) * fake).requires_grad_()
        slopes, = torch.autograd.grad(s.critic(xhat, *s.labels).sum(), xhat, create_graph=True)
        norms, w = slopes.flatten(1).square().sum(1).sqrt(), real_score.mean() - fake_score.mean()
        penalty = ((norms - 1) ** 2).mean()
        return {"W": w, "penalty": penalty, "grad_norm": norms.mean(), "loss_C": -w + 10 * penalty}
    real, fake = (score.softmax(1)[:, 1] if score.size(1) == 2 else score.sigmoid() for score in (real_score, fake_score))
    right = {"acc_D": ((real > 0.5).float().mean() + (fake <= 0.5).float().mean()) / 2} if s.losses else {}
    loss = -(real.log().mean() + (1 - fake).log().mean()) / (3 - real_score.size(1))     # two logits: the sum
    return {"D(x)": real.mean(), "D(G(z))": fake.mean(), **right, "loss_D": loss}


def expected_of_generator(setting, kind="non-saturating"):
    """The same of its step and the text's P."""
    score = setting.critic(setting.generator(setting.z, *setting.labels), *setting.labels)
    if setting.wasserstein:
        return {"loss_G": -score.mean()}
    real = score.softmax(1)[:, 1] if score.size(1) == 2 else score.sigmoid()
    fooled = {"acc_G": (real > 0.5).float().mean()} if setting.losses else {}
    return {**fooled, "loss_G": (1 - real).log().mean() if kind == "saturating" else -real.log().mean()}


def check_step(network, expected, step):
    """The step returns what is expected and leaves the gradient of the loss, which comes last, in the network."""
    gradients = torch.autograd.grad([*expected.values()][-1], list(network.parameters()), allow_unused=True)
    torch.manual_seed(7)
    torch.testing.assert_close(step(), expected)
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_critic_step_descends_the_text_s_cost(setting):
    setting.generator.eval(), setting.critic.eval()        # without dropout and batch statistics both are functions
    for explicit in [False, True] if hasattr(setting.module, "explicit_terms") and hasattr(setting.critic, "model") else [False]:
        check_step(setting.critic, expected_of_critic(setting), lambda explicit=explicit: setting.critic_step(explicit))


def test_generator_step_descends_the_text_s_cost(setting):
    setting.generator.eval(), setting.critic.eval()
    kinds = [("non-saturating",), ("saturating",)] if setting.losses else [()]
    for kind in kinds:
        check_step(setting.generator, expected_of_generator(setting, *kind), lambda kind=kind: setting.generator_step(*kind))


def test_conditions_cover_every_class():
    labels = load_script("04_cgan").generate_condition(10_000, "cpu")
    assert labels.dtype == torch.int64 and 900 < torch.bincount(labels, minlength=10).min() and labels.max() == 9


def test_reported_accuracies():
    """A constant D is right on one half: D-ACC 0.5; it is fooled always or never, as it leans."""
    setting = Setting("01_vanilla_gan", "bce")
    torch.nn.init.zeros_(setting.critic[-1].weight)
    for bias, fooled in [(0.2, 1), (-0.2, 0)]:
        torch.nn.init.constant_(setting.critic[-1].bias, bias)
        assert setting.generator_step()["acc_G"] == fooled
    quantities = setting.critic_step()
    assert quantities["acc_D"] == 0.5
    torch.testing.assert_close(quantities["D(x)"], torch.tensor(-0.2).sigmoid())


def test_saturating_gradient_is_smaller_when_fakes_are_found_out():
    gradients = {}
    for kind in ("saturating", "non-saturating"):
        setting = Setting("01_vanilla_gan", "bce")
        torch.nn.init.constant_(setting.critic[-1].bias, -6.0)      # D(G(z)) is about 0.0025
        setting.generator_step(kind)
        gradients[kind] = setting.generator[-3].weight.grad.norm()
    assert 300 < gradients["non-saturating"] / gradients["saturating"] < 500     # (1 - D) / D = 403


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_step_has_its_own_batch_and_noise(script, monkeypatch, tmp_path):
    """Erratum 10: five critic steps, then one of G, five real batches, five z; and a new z for G in all scripts."""
    module = load_script(script)
    seen, order = {"real": [], "z": [], "critic labels": [], "generator labels": []}, []
    labels = torch.arange(1000) % 10
    images = torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8)
    images[:, 0, 0, 0] = labels                             # of each image, to be seen in it
    monkeypatch.setattr(common, "draw_digits", lambda split: (images, labels))
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)

    def recorded(step, *names):
        def call(*arguments):
            order.append(step.__name__)
            for name, value in zip(names, arguments[3:], strict=False):
                seen[name].append(value.clone())
            return step(*arguments)
        return call

    conditional = script == "04_cgan"
    name = "critic_step" if script in ("03_wgan_gp", "04_cgan") else "discriminator_step"
    of_critic, of_generator = ["real", *["critic labels"] * conditional, "z"], ["z", *["generator labels"] * conditional]
    monkeypatch.setattr(module, name, recorded(getattr(module, name), *of_critic))
    monkeypatch.setattr(module, "generator_step", recorded(module.generator_step, *of_generator))
    module.main(["--dataset", "digits", "--epochs", "1", "--max-batches", "2", "--batch-size", "8", "--eval-interval", "0",
                 *["--width", "32", "--latent-dim", "8"] * (script == "06_stylegan_blocks"), "--output-dir", str(tmp_path)])
    critic_steps = 10 if name == "critic_step" else 2
    assert order == [*[name] * (critic_steps // 2), "generator_step"] * 2
    assert len(seen["real"]) == critic_steps and len(seen["z"]) == critic_steps + 2
    for values in (seen["real"], seen["z"], seen["critic labels"] + seen["generator labels"]):
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert len(seen["generator labels"]) == 2 * conditional and len(seen["critic labels"]) == critic_steps * conditional
    for real, c in zip(seen["real"], seen["critic labels"]):
        assert torch.equal(((real[:, 0, 0, 0] + 1) * 127.5).round().long(), c), "each image has its own label"
