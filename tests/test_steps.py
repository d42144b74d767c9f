"""What each training step may touch: parameters, gradients, buffers; and which data it gets."""

import pytest
import torch

from conftest import load_script, snapshot, unchanged

CASES = [("01_vanilla_gan", variant) for variant in ("bce", "two-logit", "keras", "points")] + [("02_dcgan", "dcgan")]
CASES += [("03_wgan_gp", variant) for variant in ("mlp", "conv", "points")] + [("04_cgan", "cgan")]


class Setting:
    """Networks, optimizers and one batch of a script's variant, and its two steps with the right arguments."""

    def __init__(self, script, variant):
        torch.manual_seed(0)
        self.module = module = load_script(script)
        networks = getattr(module, "NETWORKS", {}).get(variant) or (
            module.Generator, getattr(module, "Critic", None) or module.Discriminator)
        self.generator, self.critic = (network() for network in networks)
        self.optimizer_g, self.optimizer_c = (torch.optim.Adam(net.parameters(), 1e-3) for net in (self.generator, self.critic))
        self.real = torch.rand(6, *((2,) if variant == "points" else (1, 28, 28))) * 2 - 1
        self.z = torch.randn(6, 100)
        self.labels = (torch.arange(6),) if script == "04_cgan" else ()
        self.wasserstein = script in ("03_wgan_gp", "04_cgan")

    def critic_step(self):
        step = self.module.critic_step if self.wasserstein else self.module.discriminator_step
        weight = (10.0,) if self.wasserstein else ()
        return step(self.generator, self.critic, self.optimizer_c, self.real, *self.labels, self.z, *weight)

    def generator_step(self, *kind):
        if hasattr(self.module, "KerasGenerator"):
            kind = kind or ("non-saturating",)
        return self.module.generator_step(self.generator, self.critic, self.optimizer_g, self.z, *self.labels, *kind)


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
    """BatchNorm's running statistics: the generator's follow its fakes in both steps, as in the text."""
    for step in (setting.critic_step, setting.generator_step):
        for network in (setting.generator, setting.critic):
            counters = {name: value.item() for name, value in network.named_buffers() if name.endswith("num_batches_tracked")}
            step_was_critic = step == setting.critic_step
            step()
            expected = 1 if network is setting.generator else (2 if step_was_critic else 1)
            assert all(dict(network.named_buffers())[name].item() == value + expected for name, value in counters.items())


def test_critic_loss_is_the_text_s(setting):
    """loss_C = -W + 10 penalty; D's loss from D's own probabilities at the first step."""
    quantities = setting.critic_step()
    if setting.wasserstein:
        torch.testing.assert_close(quantities["loss_C"], -quantities["W"] + 10 * quantities["penalty"])
    else:
        assert 0 < quantities["D(x)"] < 1 and 0 < quantities["D(G(z))"] < 1


def test_reported_wasserstein_estimate():
    setting = Setting("03_wgan_gp", "points")
    expected = setting.critic(setting.real).mean() - setting.critic(setting.generator(setting.z)).mean()
    torch.testing.assert_close(setting.critic_step()["W"], expected)


def test_reported_accuracies():
    """D right on all real and no fakes: D-ACC 0.5, and G fools it every time."""
    setting = Setting("01_vanilla_gan", "bce")
    torch.nn.init.zeros_(setting.critic[-1].weight)
    torch.nn.init.constant_(setting.critic[-1].bias, 3.0)
    quantities = setting.generator_step()
    assert quantities["acc_G"] == 1
    quantities = setting.critic_step()
    assert quantities["acc_D"] == 0.5
    torch.testing.assert_close(quantities["D(x)"], torch.tensor(3.0).sigmoid())


def test_saturating_gradient_is_smaller_when_fakes_are_found_out():
    gradients = {}
    for kind in ("saturating", "non-saturating"):
        setting = Setting("01_vanilla_gan", "bce")
        torch.nn.init.constant_(setting.critic[-1].bias, -6.0)      # D(G(z)) is about 0.0025
        setting.generator_step(kind)
        gradients[kind] = setting.generator[-3].weight.grad.norm()
    assert 300 < gradients["non-saturating"] / gradients["saturating"] < 500     # (1 - D) / D = 403


@pytest.mark.parametrize("script", ["03_wgan_gp", "04_cgan"])
def test_every_critic_step_has_its_own_batch_and_noise(script, monkeypatch, tmp_path, cached_digits):
    """Erratum 10: five critic steps per generator step, five real batches, five z."""
    module = load_script(script)
    calls, generator_noise = [], []
    critic_step, generator_step = module.critic_step, module.generator_step

    def recording_critic_step(generator, critic, optimizer, real, *rest):
        calls.append((real.clone(), rest[-2].clone()))
        return critic_step(generator, critic, optimizer, real, *rest)

    def recording_generator_step(generator, critic, optimizer, z, *rest):
        generator_noise.append(z.clone())
        return generator_step(generator, critic, optimizer, z, *rest)

    monkeypatch.setattr(module, "critic_step", recording_critic_step)
    monkeypatch.setattr(module, "generator_step", recording_generator_step)
    module.main(["--dataset", "digits", "--epochs", "1", "--max-batches", "2", "--batch-size", "8",
                 "--output-dir", str(tmp_path)])
    assert (len(calls), len(generator_noise)) == (10, 2)
    for batches in ([real for real, _ in calls], [z for _, z in calls] + generator_noise):
        assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
