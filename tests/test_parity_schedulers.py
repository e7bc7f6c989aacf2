"""Schedulers against diffusers: tables exact, steps within one rounding, generators in the same state.

Where ours differs on purpose the reference is mended and the difference has a test of its own, which
also shows that diffusers still does it: when that fails, the difference may go.
"""

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
)
from references import REFERENCE, randn, reference, reference_step

from pixcell_min.schedulers import (
    DDIM, DDPM, DPMSolverPP2M, EulerAncestral, NoiseSchedule, build_scheduler,
)

# diffusers hands tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SPACINGS = ("linspace", "leading", "trailing")
COUNTS = (1, 2, 5, 14, 15, 20, 30, 50, 61, 999, 1000)
SCHEDULE = NoiseSchedule.linear()
CASES = ((DDPM, {}), (DDIM, {}), (DDIM, {"eta": 0.5}), (EulerAncestral, {}), (DPMSolverPP2M, {}))
# Both sides do the same float32 operations in the same order, except one product in Euler's v: one
# rounding, 6e-8 of the latents' size, doubled for safety.
STEP = dict(atol=1e-6, rtol=1.2e-7)
# A thousand such roundings, each damped by the toy network.
LOOP = dict(atol=5e-6, rtol=0)


def generator():
    return torch.Generator().manual_seed(7)


def reference_levels(scheduler):
    """alpha and sigma of x = alpha·x0 + sigma·ε at every step of diffusers' table."""
    if isinstance(scheduler, EulerAncestralDiscreteScheduler):
        return [(1.0, sigma) for sigma in scheduler.sigmas[:-1].tolist()]
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        levels = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[:-1])
    else:
        alphas_cumprod = scheduler.alphas_cumprod[scheduler.timesteps]
        levels = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
    return list(zip(*(level.tolist() for level in levels)))


def toy(x, t, prediction_type):
    """A fixed network: what it means by x0 stays near x, as a trained one's does."""
    alphas_cumprod = SCHEDULE.alphas_cumprod[int(t)].item()
    v = 0.3 * torch.sin(2 * x + float(t) / 300)
    epsilon = math.sqrt(1 - alphas_cumprod) * x + math.sqrt(alphas_cumprod) * v
    return epsilon if prediction_type == "epsilon" else v


# --- the matrix


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler, options", CASES, ids=str)
def test_matrix(sampler, options, spacing, prediction_type):
    """Per count: timesteps and sigmas equal; one step from the reference's state; a loop; generators."""
    schedule = NoiseSchedule.linear(prediction_type=prediction_type)
    ours = sampler(schedule, timestep_spacing=spacing, **options)
    for count in COUNTS:
        if sampler is DPMSolverPP2M and count == 1000 and spacing != "trailing":
            continue  # diffusers gives NaN: test_dpm_at_as_many_steps_as_timesteps
        rows = ours.steps(count)
        theirs = reference(sampler, count, spacing, prediction_type=prediction_type)
        assert [row.timestep for row in rows] == theirs.timesteps.tolist()
        assert [(row.alpha, row.sigma) for row in rows] == reference_levels(theirs)
        start = randn(1, 2, 2, 2) * ours.init_noise_sigma(count)
        assert ours.init_noise_sigma(count) == float(theirs.init_noise_sigma)
        if count == (999 if prediction_type == "epsilon" else 1000):
            continue  # one loop of that length is enough
        x, own, x0, own_x0 = start, start, None, None
        g, g_own, g_step = generator(), generator(), generator()
        for i, row in enumerate(rows):
            seen = theirs.scale_model_input(x, theirs.timesteps[i])
            output = toy(seen, row.timestep, prediction_type)
            state = g.get_state()
            after = reference_step(theirs, i, output, x, g, **options)
            if count < 100:  # from the same state; beyond that the loop alone says enough
                g_step.set_state(state)
                assert torch.equal(seen, ours.scale_model_input(x, row))
                one = ours.step(output, x, row, g_step, x0)
                torch.testing.assert_close(one.latents, after, **STEP)
                x0 = one.x0
            x = after
            said = toy(ours.scale_model_input(own, row), row.timestep, prediction_type)
            own, own_x0 = ours.step(said, own, row, g_own, own_x0)
        torch.testing.assert_close(own, x, **LOOP)
        assert torch.equal(g.get_state(), g_own.get_state())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", [DDPM, EulerAncestral, DPMSolverPP2M])
def test_timesteps_of_many_counts(sampler, spacing):
    ours = sampler(SCHEDULE, timestep_spacing=spacing)
    theirs = REFERENCE[sampler](timestep_spacing=spacing)
    spare = 1 if sampler is DPMSolverPP2M else 0
    # 48, 96, 112 ...: the counts whose trailing timesteps fall on halves are multiples of 16.
    for count in (*range(1, 1000, 9), *range(16, 1000, 16)):
        theirs.set_timesteps(count)
        timesteps = torch.tensor(ours._timesteps(count, spare), dtype=torch.float64)
        if sampler is not EulerAncestral:
            timesteps = timesteps.round()
        assert torch.equal(timesteps.float(), theirs.timesteps[:count].float()), count


@pytest.mark.parametrize("sampler, options", CASES, ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_from_states_without_sense(sampler, options, spacing):
    """Pure noise for every tensor, so that x0 reaches hundreds; every step of 20."""
    ours, theirs = sampler(SCHEDULE, timestep_spacing=spacing, **options), reference(sampler, 20, spacing)
    previous_x0 = None
    for i, row in enumerate(ours.steps(20)):
        x, output = randn(2, 16, 4, 4, seed=i) * row.scale, randn(2, 16, 4, 4, seed=100 + i)
        theirs.scale_model_input(x, theirs.timesteps[i])
        after = reference_step(theirs, i, output, x, generator(), **options)
        result = ours.step(output, x, row, generator(), previous_x0)
        torch.testing.assert_close(result.latents, after, atol=1e-6, rtol=0)
        previous_x0 = result.x0


# --- noise schedules, and what training needs of them


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("config", [
    {}, dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    dict(num_train_timesteps=250, beta_start=0.001), dict(prediction_type="v_prediction"),
    dict(trained_betas=[0.1, 0.3, 0.5], num_train_timesteps=3),
], ids=str)  # fmt: skip
def test_from_config_reads_what_diffusers_writes(name, config, tmp_path):
    theirs = REFERENCE[name](**config)
    theirs.save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    ours = NoiseSchedule.from_config(saved)
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.prediction_type == theirs.config.prediction_type


def test_add_noise_and_velocity():
    theirs, t = DDPMScheduler(), torch.tensor([0, 1, 500, 999])
    x0, noise = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    assert torch.equal(SCHEDULE.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    assert torch.equal(SCHEDULE.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t))


# --- options


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_variances(kind, spacing):
    ours = DDPM(SCHEDULE, spacing, variance_type=kind)
    theirs = reference(DDPM, 20, spacing, variance_type=kind)
    channels = 32 if kind == "learned_range" else 16
    for i, row in enumerate(ours.steps(20)[:-1]):
        x, output = randn(2, 16, 4, 4, seed=i), randn(2, channels, 4, 4, seed=i + 50)
        # diffusers draws noise of the shape of the split output, so that the draws agree.
        after = reference_step(theirs, i, output, x, generator())
        # exp(log) against a power: 1e-6 of a deviation, which is 1 at most.
        torch.testing.assert_close(ours.step(output, x, row, generator()).latents, after, atol=2e-6, rtol=0)


@pytest.mark.parametrize("sampler, options", CASES, ids=str)
def test_offset_and_scaled_linear(sampler, options):
    config = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = sampler(NoiseSchedule.from_config(config), "leading", steps_offset=1, **options)
    theirs = reference(sampler, 30, "leading", steps_offset=1, **config)
    x = own = randn(1, 4, 2, 2) * ours.init_noise_sigma(30)
    g, g_own, x0 = generator(), generator(), None
    for i, row in enumerate(ours.steps(30)):
        assert row.timestep == theirs.timesteps[i]
        output = toy(theirs.scale_model_input(x, theirs.timesteps[i]), row.timestep, "epsilon")
        x = reference_step(theirs, i, output, x, g, **options)
        own, x0 = ours.step(output, own, row, g_own, x0)
    torch.testing.assert_close(own, x, **LOOP)


def test_ddim_without_alpha_to_one():
    ours = DDIM(SCHEDULE, set_alpha_to_one=False)
    theirs = reference(DDIM, 20, set_alpha_to_one=False)
    x, output = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    for i, row in enumerate(ours.steps(20)):
        after = reference_step(theirs, i, output, x)
        torch.testing.assert_close(ours.step(output, x, row).latents, after, **STEP)


@pytest.mark.parametrize("count", [2, 3, 14, 15, 20])
def test_dpm_lower_order_final_changes_nothing(count):
    """Trap 14: with final sigma 0 the last step is of first order either way."""
    ours, results = DPMSolverPP2M(SCHEDULE), []
    for lower in (True, False):
        theirs = reference(DPMSolverPP2M, count, "linspace", lower_order_final=lower)
        x = own = randn(1, 4, 2, 2)
        x0 = None
        for i, row in enumerate(ours.steps(count)):
            output = toy(x, row.timestep, "epsilon")
            x = reference_step(theirs, i, output, x)
            own, x0 = ours.step(output, own, row, None, x0)
        torch.testing.assert_close(own, x, **LOOP)
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("sampler, options", [CASES[0], CASES[2], CASES[3]], ids=str)
def test_trap_9_one_generator_per_image(sampler, options):
    ours, theirs = sampler(SCHEDULE, **options), reference(sampler, 10, sampler.timestep_spacing)
    generators = [[torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2)]
    x, output = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    for i, row in enumerate(ours.steps(10)):
        theirs.scale_model_input(x, theirs.timesteps[i])
        after = reference_step(theirs, i, output, x, generators[0], **options)
        result = ours.step(output, x, row, generators[1])
        torch.testing.assert_close(result.latents, after, **STEP)
    for one, two in zip(*generators):
        assert torch.equal(one.get_state(), two.get_state())


# --- where ours differs on purpose: each test shows both sides


def test_differs_trap_3_diffusers_adds_a_step_at_minus_one():
    theirs = DDPMScheduler(timestep_spacing="trailing")
    extra = []
    for count in range(1, 1001):
        theirs.set_timesteps(count)
        if len(theirs.timesteps) != count:
            assert len(theirs.timesteps) == count + 1 and theirs.timesteps[-1] == -1
            extra.append(count)
    assert len(extra) == 62 and extra[:4] == [61, 103, 121, 122]
    assert all(len(build_scheduler("ddpm", SCHEDULE, "trailing").steps(n)) == n for n in extra[:4])


def test_differs_trap_4_diffusers_ddim_leaves_the_table():
    for spacing, wrong in (("linspace", 29), ("leading", 0), ("trailing", 10)):
        theirs = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
        theirs.set_timesteps(30)
        rows = DDIM(SCHEDULE, spacing).steps(30)
        x, output, different = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1), 0
        for row, after in zip(rows, rows[1:]):
            skipped = row.timestep - 1000 // 30 != after.timestep
            a, b = theirs.step(output, row.timestep, x).prev_sample, DDIM(SCHEDULE).step(output, x, row)
            assert torch.allclose(a, b.latents, atol=1e-6) != skipped
            different += skipped
        assert different == wrong


def test_differs_trap_6_diffusers_clips_by_default():
    x, output = 3 * randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    for sampler in (DDPM, DDIM):
        row = sampler(SCHEDULE).steps(20)[-5]
        for clip in (True, False):
            theirs = reference(sampler, 20, clip_sample=clip)
            after = theirs.step(output, row.timestep, x, generator=generator()).prev_sample
            same = sampler(SCHEDULE, clip_sample=clip).step(output, x, row, generator())
            other = sampler(SCHEDULE, clip_sample=not clip).step(output, x, row, generator())
            torch.testing.assert_close(same.latents, after, **STEP)
            assert (other.latents - after).abs().max() > 0.1
        assert REFERENCE[sampler]().config.clip_sample and not sampler(SCHEDULE).clip_sample


def test_differs_trap_11_diffusers_adds_noise_in_half_precision_and_upside_down():
    x0, noise, t = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1), torch.tensor([0, 1])
    assert torch.equal(DDPMScheduler().add_noise(x0.half(), noise.half(), t), x0.half())  # no noise
    ours = SCHEDULE.add_noise(x0.half(), noise.half(), t)
    torch.testing.assert_close(ours, DDPMScheduler().add_noise(x0, noise, t), atol=2e-3, rtol=0)
    flipped = DPMSolverMultistepScheduler().add_noise(x0, noise, 999 - t)
    torch.testing.assert_close(flipped, SCHEDULE.add_noise(x0, noise, t), atol=1e-6, rtol=0)


def test_differs_diffusers_ddpm_adds_noise_at_a_last_step_above_0():
    x, output = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    for kind, least in (("fixed_small", 0.0), ("fixed_large", 0.1)):
        ours, theirs = (f(variance_type=kind) for f in (
            lambda **options: DDPM(SCHEDULE, "trailing", **options),
            lambda **options: reference(DDPM, 20, "trailing", **options)))
        row = ours.steps(20)[-1]
        after = theirs.step(output, row.timestep, x, generator=generator())
        result = ours.step(output, x, row, generator())
        assert torch.equal(result.x0, after.pred_original_sample) and torch.equal(*result)
        assert (after.prev_sample - result.latents).abs().max() >= least
        torch.testing.assert_close(result.latents, after.prev_sample, atol=1e-9 if not least else 9, rtol=0)


def test_differs_dpm_at_as_many_steps_as_timesteps():
    """linspace repeats t = 500: diffusers divides 0 by 0; ours stays on the loop of 999 steps."""
    finals = {}
    for count in (999, 1000):
        ours, theirs = DPMSolverPP2M(SCHEDULE), reference(DPMSolverPP2M, count, "linspace")
        x = own = randn(1, 4, 2, 2)
        x0 = None
        for i, row in enumerate(ours.steps(count)):
            x = reference_step(theirs, i, toy(x, row.timestep, "epsilon"), x)
            own, x0 = ours.step(toy(own, row.timestep, "epsilon"), own, row, None, x0)
        finals[count] = own
        assert torch.isfinite(x).all() == (count == 999)
        assert count == 1000 or torch.allclose(own, x, **LOOP)
    torch.testing.assert_close(finals[1000], finals[999], atol=1e-3, rtol=0)  # other timesteps
    theirs = reference(DPMSolverPP2M, 1000, "leading")
    assert theirs.timesteps.unique().tolist() == [0]  # ours refuses: test_schedulers.py


def test_trap_7_diffusers_variances_that_give_nan():
    x = randn(1, 4, 2, 2)
    for kind in ("fixed_large_log", "learned"):
        theirs = reference(DDPM, 20, variance_type=kind)
        output = randn(1, 8 if kind == "learned" else 4, 2, 2, seed=1)
        assert theirs.step(output, 500, x, generator=generator()).prev_sample.isnan().any()


def test_trap_15_diffusers_offset_leaves_the_table():
    theirs = DDPMScheduler(steps_offset=1)
    theirs.set_timesteps(1000)
    assert theirs.timesteps[0] == 1000  # ours refuses: test_schedulers.py
