"""variational.py against the definition, in float64, and as an option of a run."""

import json
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import train
from conftest import metrics, write_base
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.training import condition_tokens, diffusion_loss
from pixcell_min.variational import variational_bound
from test_train import random_batch, small_problem

T = torch.tensor([0, 1, 400, 999])


def inputs(seed=0, timesteps=T):
    schedule, generator = NoiseSchedule.linear(), torch.Generator().manual_seed(seed)
    count = len(timesteps)
    latents, noise = torch.randn(2, count, 3, 2, 2, generator=generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    return schedule, torch.randn(count, 6, 2, 2, generator=generator), latents, noisy, noise


def bits(schedule, output, latents, noisy, t):
    """The term of one t by its definition, for one sample, in float64."""
    betas, bars = schedule.betas.double(), schedule.alphas_cumprod.double()
    beta, bar, before = betas[t], bars[t], bars[t - 1] if t else torch.tensor(1.0).double()
    tilde = beta * (1 - before) / (1 - bar) if t else betas[1] * (1 - bars[0]) / (1 - bars[1])

    def mean(x0):
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - bar)

    x0 = (noisy.double() - (1 - bar).sqrt() * output[:3]) / bar.sqrt()
    fraction = (output[3:].double() + 1) / 2
    sigma = (fraction * beta.log() + (1 - fraction) * tilde.log()).exp().sqrt()
    return kl_divergence(Normal(mean(latents.double()), tilde.sqrt().expand_as(sigma)),
                         Normal(mean(x0), sigma)).mean().item() / math.log(2)


def test_it_is_t_times_the_kl_of_two_gaussians_in_bits():
    schedule, output, latents, noisy, _ = inputs()
    output[:, :3] *= 0.01
    found = variational_bound(schedule, output, latents, noisy, T)
    for i, t in enumerate(T.tolist()):
        # float32 tables and x0 at t = 999, whose alpha is 0.006
        assert found[i].item() == pytest.approx(
            1000 * bits(schedule, output[i], latents[i], noisy[i], t), rel=2e-3)


def test_its_mean_over_all_timesteps_is_the_whole_bound_their_sum():
    schedule, output, latents, noisy, _ = inputs(1, every := torch.arange(1000))
    whole = sum(bits(schedule, output[t], latents[t], noisy[t], t) for t in range(1000))
    estimate = variational_bound(schedule, output, latents, noisy, every).mean().item()
    assert estimate == pytest.approx(whole, rel=1e-3)


def test_a_perfect_mean_with_the_posteriors_variance_costs_nothing():
    schedule, output, latents, noisy, noise = inputs()
    output = torch.cat([noise, -torch.ones_like(noise)], 1)
    bound = variational_bound(schedule, output, latents, noisy, T)
    torch.testing.assert_close(bound, torch.zeros(4), rtol=0, atol=0.1)  # of T terms
    wider = torch.cat([noise, torch.ones_like(noise)], 1)
    assert (variational_bound(schedule, wider, latents, noisy, T)[1:3] > bound[1:3] - 1e-3).all()


def test_only_the_variance_half_learns_from_it():
    schedule, output, latents, noisy, _ = inputs()
    output.requires_grad_()
    variational_bound(schedule, output, latents, noisy, T).sum().backward()
    assert (output.grad[:, :3] == 0).all() and (output.grad[:, 3:] != 0).all()


def test_the_loss_adds_it_by_its_weight(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    batch = random_batch(3, 2)
    plain = diffusion_loss(transformer, adapter, schedule, batch)
    assert torch.equal(diffusion_loss(transformer, adapter, schedule, batch, vlb_weight=0.0), plain)
    extra = diffusion_loss(transformer, adapter, schedule, batch, vlb_weight=2.0) - plain
    half = diffusion_loss(transformer, adapter, schedule, batch, vlb_weight=1.0) - plain
    torch.testing.assert_close(extra, 2 * half, rtol=1e-3, atol=1e-5)
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    output = transformer(noisy, batch.timesteps, condition_tokens(
        adapter, batch.embeddings, batch.dropped, transformer.uncond_embedding))
    bound = variational_bound(schedule, output, batch.latents, noisy, batch.timesteps)
    torch.testing.assert_close(half, bound, rtol=1e-3, atol=1e-5)
    assert (extra > 0).all()


def test_a_run_trains_with_it_and_refuses_a_base_without_learned_variance(
        arguments, tmp_path, capsys):
    assert train.main([*arguments, "--vlb-weight", "0.001"]) == 0
    with_it = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert train.main([*arguments, "--overwrite"]) == 0
    assert with_it != [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    base = write_base(tmp_path / "base")
    from pixcell_min.checkpoint import read_tensors, save_tensors
    path = base / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "out_channels": 16}))
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(weights)[0]
    for name in ("proj_out.weight", "proj_out.bias"):
        tensors[name] = tensors[name].reshape(4, 32, -1)[:, :16].reshape(64, -1).squeeze(-1)
    save_tensors(weights, tensors)
    capsys.readouterr()
    assert train.main([*arguments, "--base", str(base), "--vlb-weight", "0.001", "--out",
                       str(tmp_path / "other")]) == 2
    assert "learns no variance (16 output channels of 16 latents)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
