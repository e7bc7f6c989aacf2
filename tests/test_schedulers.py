"""Noise schedule and samplers without any reference library: their own maths, an oracle, failures.

"trap N" in a name is the number in SCHEDULERS.md, the list of mistakes that other libraries make.
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from pixcell_min.schedulers import (
    DDIM, DDPM, SCHEDULER_NAMES, DPMSolverPP2M, EulerAncestral, NoiseSchedule, build_scheduler,
    split_learned_variance,
)

SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULE = NoiseSchedule.linear()
SAMPLERS = (DDPM, DDIM, EulerAncestral, DPMSolverPP2M)
# One float32 operation on numbers around 1 is off by 6e-8; a formula is a handful of them.
FLOAT32 = dict(atol=1e-6, rtol=1e-6)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=7):
    return torch.Generator().manual_seed(seed)


def samplers(prediction_type="epsilon"):
    """Every sampler with every spacing, DDIM deterministic and not."""
    schedule = NoiseSchedule.linear(prediction_type=prediction_type)
    for spacing in SPACINGS:
        for sampler in SAMPLERS:
            yield sampler(schedule, timestep_spacing=spacing)
        yield DDIM(schedule, timestep_spacing=spacing, eta=0.6)


def oracle(prediction_type, x0, x, row):
    """What a network that knows x0 says of x, computed in float64."""
    epsilon = (x.double() - row.alpha * x0) / row.sigma
    velocity = (row.alpha * epsilon - row.sigma * x0) / row.scale
    return {"epsilon": epsilon, "v_prediction": velocity, "sample": x0}[prediction_type].float()


def run(sampler, count, say, start, generator=None):
    """The loop of the pipeline: `say(x, row)` plays the network."""
    latents, x0 = start, None
    for row in sampler.steps(count):
        latents, x0 = sampler.step(say(latents, row), latents, row, generator, x0)
    return latents, x0


# --- noise schedule


def test_tables_of_pixcell():
    assert SCHEDULE.betas.shape == SCHEDULE.alphas_cumprod.shape == SCHEDULE.sigmas.shape == (1000,)
    for table in (SCHEDULE.betas, SCHEDULE.alphas_cumprod, SCHEDULE.sigmas):
        assert table.dtype == torch.float32 and table.device.type == "cpu"
    assert SCHEDULE.num_train_timesteps == 1000 and SCHEDULE.prediction_type == "epsilon"
    assert SCHEDULE.snr(torch.tensor([999])).item() == pytest.approx(4.04e-5, rel=1e-3)
    assert SCHEDULE.sigmas[[0, 999]].tolist() == pytest.approx([0.0100013, 157.407], rel=1e-5)
    assert (SCHEDULE.sigmas.diff() > 0).all()


def test_trap_1_products_are_float32():
    exact = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    difference = (SCHEDULE.alphas_cumprod.double() - exact).abs().max().item()
    assert 1e-7 < difference < 1e-6  # 3.6e-7: a float64 table would differ by 3e-8, rounding once


def test_tables_are_float32_whatever_comes_in_and_whatever_the_default_is():
    exact = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = NoiseSchedule(exact)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float32
    assert torch.equal(schedule.betas, exact.float())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(NoiseSchedule.linear().betas, SCHEDULE.betas)
    finally:
        torch.set_default_dtype(torch.float32)


def test_schedules_are_compared_as_things_not_number_by_number():
    assert SCHEDULE == SCHEDULE and SCHEDULE != NoiseSchedule.linear()


def test_three_levels_by_hand():
    betas = torch.tensor([0.1, 0.2, 0.3])  # ᾱ = 0.9, 0.72, 0.504
    x0, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 3.0)
    t = torch.tensor([1, 2])
    a = [math.sqrt(0.72), math.sqrt(0.504)]
    s = [math.sqrt(0.28), math.sqrt(0.496)]
    schedule = NoiseSchedule(betas)
    noisy = schedule.add_noise(x0, noise, t).flatten()
    torch.testing.assert_close(noisy, torch.tensor([2 * a[0] + 3 * s[0], 2 * a[1] + 3 * s[1]]))
    velocity = schedule.velocity(x0, noise, t).flatten()
    torch.testing.assert_close(velocity, torch.tensor([3 * a[0] - 2 * s[0], 3 * a[1] - 2 * s[1]]))
    torch.testing.assert_close(schedule.snr(t), torch.tensor([0.72 / 0.28, 0.504 / 0.496]))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_predictions_invert_the_target(prediction_type):
    schedule = NoiseSchedule.linear(prediction_type=prediction_type)
    x0, noise, t = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1), torch.tensor([0, 10, 500, 900])
    noisy, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    # At t = 0, ε is (x − x0)/0.01 in float32, at t = 900 x0 is (x − ε)/0.016: errors grow by 100.
    tolerance = dict(atol=1e-4, rtol=0)
    torch.testing.assert_close(schedule.predict_x0(target, noisy, t), x0, **tolerance)
    torch.testing.assert_close(schedule.predict_epsilon(target, noisy, t), noise, **tolerance)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": schedule.velocity(x0, noise, t)}
    assert torch.equal(target, expected[prediction_type])


def test_trap_11_add_noise_is_float32_in_fp16():
    x0, noise, t = randn(2, 3, 2, 2).half(), randn(2, 3, 2, 2, seed=1).half(), torch.tensor([0, 1])
    noisy = SCHEDULE.add_noise(x0, noise, t)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, SCHEDULE.add_noise(x0.float(), noise.float(), t))
    assert ((noisy - x0.float()).abs() > 1e-4).any(dim=(1, 2, 3)).all()  # both images got noise
    for method in (SCHEDULE.velocity, SCHEDULE.target, SCHEDULE.predict_x0, SCHEDULE.predict_epsilon):
        assert method(x0, noise, t).dtype == torch.float32


def test_trap_11_timestep_is_not_flipped():
    x0, noise = torch.ones(2, 1, 1, 1), -torch.ones(2, 1, 1, 1)
    clean, noisy = SCHEDULE.add_noise(x0, noise, torch.tensor([0, 999])).flatten().tolist()
    assert clean > 0.98 and noisy < -0.98


def test_add_noise_takes_any_rank():
    for shape in ((3,), (3, 5), (3, 2, 2, 2, 2)):
        x0, noise, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 500, 999])
        noisy = SCHEDULE.add_noise(x0, noise, t)
        for i in range(3):
            alone = SCHEDULE.add_noise(x0[i : i + 1], noise[i : i + 1], t[i : i + 1])
            assert torch.equal(noisy[i : i + 1], alone)


def test_timesteps_out_of_place_raise():
    x = randn(2, 1, 1, 1)
    for bad in ([0, -1], [0, 1000], [0.0, 1.5]):
        with pytest.raises((IndexError, RuntimeError)):
            SCHEDULE.add_noise(x, x, torch.tensor(bad))
    for bad in ([0], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"expected \(2,\)"):
            SCHEDULE.add_noise(x, x, torch.tensor(bad))


# --- reading a scheduler_config.json


PIXCELL_CONFIG = """{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.32.2",
 "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
 "euler_at_final": false, "final_sigmas_type": "zero", "lambda_min_clipped": -Infinity,
 "lower_order_final": true, "num_train_timesteps": 1000, "prediction_type": "epsilon",
 "rescale_betas_zero_snr": false, "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0,
 "thresholding": false, "timestep_spacing": "linspace", "trained_betas": null,
 "use_karras_sigmas": false, "variance_type": null}"""


def test_config_of_pixcell():
    schedule = NoiseSchedule.from_config(json.loads(PIXCELL_CONFIG))
    assert torch.equal(schedule.betas, SCHEDULE.betas) and schedule.prediction_type == "epsilon"


def test_config_without_numbers_takes_diffusers_own():
    assert torch.equal(NoiseSchedule.from_config({"beta_schedule": "linear"}).betas, SCHEDULE.betas)
    one = NoiseSchedule.from_config({"beta_schedule": "linear", "num_train_timesteps": 1})
    assert one.betas.tolist() == pytest.approx([1e-4])


def test_config_of_stable_diffusion():
    config = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"})
    assert schedule.prediction_type == "v_prediction"
    betas = schedule.betas
    torch.testing.assert_close(betas.sqrt().diff().mean(), betas.sqrt().diff().max(), rtol=1e-3, atol=0)
    assert betas[[0, -1]].tolist() == pytest.approx([0.00085, 0.012], rel=1e-6)


def test_config_trained_betas_and_prediction_type():
    config = dict(trained_betas=[0.1, 0.2], num_train_timesteps=2, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_config(config)
    assert schedule.prediction_type == "v_prediction" and schedule.num_train_timesteps == 2
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.72]))


def test_config_keys_of_the_samplers_are_ignored():
    extra = dict(timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=False, clip_sample=True)
    config = json.loads(PIXCELL_CONFIG) | extra | dict(variance_type="learned_range", unknown=3)
    assert torch.equal(NoiseSchedule.from_config(config).betas, SCHEDULE.betas)


@pytest.mark.parametrize("change", [
    dict(rescale_betas_zero_snr=True), dict(use_karras_sigmas=True), dict(thresholding=True),
    dict(use_exponential_sigmas=True), dict(use_beta_sigmas=True), dict(use_lu_lambdas=True),
    dict(use_flow_sigmas=True), dict(use_dynamic_shifting=True), dict(euler_at_final=True),
    dict(algorithm_type="sde-dpmsolver++"), dict(solver_type="heun"), dict(solver_order=3),
    dict(final_sigmas_type="sigma_min"), dict(lambda_min_clipped=-5.1), dict(beta_schedule="sigmoid"),
    dict(beta_schedule=None), dict(prediction_type="flow_prediction"), dict(trained_betas=[0.1]), dict(trained_betas=3),
    dict(num_train_timesteps=0), dict(num_train_timesteps=-1), dict(num_train_timesteps="1000"), dict(beta_start="0.1"),
    dict(beta_start=-0.1), dict(beta_end=1.5), dict(beta_end=math.nan),
], ids=str)  # fmt: skip
def test_config_that_changes_results_is_refused(change):
    with pytest.raises(ValueError) as error:
        NoiseSchedule.from_config(json.loads(PIXCELL_CONFIG) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(beta_schedule="sigmoid"), "^beta_schedule is 'sigmoid', expected one of linear, scaled_linear"),
    (dict(prediction_type="x"), "^prediction_type is 'x', expected one of epsilon, v_prediction"),
    (dict(beta_start=0.0), r"\[1000, 0.0, 0.02\], expected 1 to 1000000 and two fractions")])
def test_a_refused_config_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        NoiseSchedule.from_config(json.loads(PIXCELL_CONFIG) | change)


def test_trap_13_zero_terminal_snr_is_refused():
    for betas in ([0.1, 1.0], [0.9] * 50):  # 1e-50 is 0 in float32
        with pytest.raises(ValueError, match="zero terminal SNR needs v-prediction"):
            NoiseSchedule(torch.tensor(betas))
    for betas in ([], [0.0, 0.1], [math.nan], [1.5, 1.5], [0.1, -0.1]):
        with pytest.raises(ValueError, match="betas"):
            NoiseSchedule(torch.tensor(betas))


# --- tables


@pytest.mark.parametrize("count", [1, 2, 5, 20, 50])
def test_every_row_lands_on_the_level_of_the_next(count):
    """A step from alpha·x0 + sigma·ε must end at alpha'·x0 + sigma'·noise: weights and variances."""
    for sampler in samplers():
        rows = sampler.steps(count)
        last = (1.0, 0.0)  # clean latents, in VP and in VE coordinates
        levels = [(row.alpha, row.sigma) for row in rows[1:]] + [last]
        for row, (alpha, sigma) in zip(rows, levels):
            signal = row.x_weight * row.alpha + row.x0_weight
            noise = math.hypot(row.x_weight * row.sigma + row.epsilon_weight, row.noise_std)
            # β = 1 − ᾱ/ᾱ' in float32 is off by 6e-8, and is divided by 1 − ᾱ, 1e-3 at small t.
            assert signal == pytest.approx(alpha, abs=1e-4), (sampler, row)
            assert noise == pytest.approx(sigma, rel=1e-4, abs=1e-6), (sampler, row)


def test_rows_are_plain_float32_numbers():
    for sampler in samplers():
        rows = sampler.steps(7)
        assert [row.is_last for row in rows] == [False] * 6 + [True]
        for row in rows:
            assert 0 <= row.timestep < 1000
            assert isinstance(row.timestep, float if isinstance(sampler, EulerAncestral) else int)
            values = [v for v in dataclasses.astuple(row)[2:] if not isinstance(v, bool)]
            assert torch.tensor(values, dtype=torch.float32).double().tolist() == values
            assert row.scale == pytest.approx(math.hypot(row.alpha, row.sigma), rel=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_variances_add_up(spacing):
    rows = EulerAncestral(SCHEDULE, timestep_spacing=spacing).steps(30)
    for row, after in zip(rows, rows[1:]):
        down, up = row.sigma + row.epsilon_weight, row.noise_std
        assert down**2 + up**2 == pytest.approx(after.sigma**2, rel=1e-5)
        assert 0 < down < after.sigma and 0 < up < after.sigma
    assert rows[-1].noise_std == 0 and rows[-1].epsilon_weight == -rows[-1].sigma


def timesteps(sampler, count, spacing, **options):
    return [row.timestep for row in sampler(SCHEDULE, timestep_spacing=spacing, **options).steps(count)]


def test_trap_2_spacings_of_twenty_steps():
    def ends(sampler, spacing):
        values = timesteps(sampler, 20, spacing)
        assert len(values) == 20 and values == sorted(values, reverse=True)
        return values[:2] + values[-2:]

    for sampler in (DDPM, DDIM):
        assert ends(sampler, "linspace") == [999, 946, 53, 0]
        assert ends(sampler, "leading") == [950, 900, 50, 0]
    assert ends(EulerAncestral, "linspace") == pytest.approx([999.0, 946.421, 52.579, 0.0], abs=1e-3)
    assert ends(EulerAncestral, "leading") == [950.0, 900.0, 50.0, 0.0]
    assert ends(DPMSolverPP2M, "linspace") == [999, 949, 100, 50]
    assert ends(DPMSolverPP2M, "leading") == [940, 893, 94, 47]
    for sampler in SAMPLERS:
        assert ends(sampler, "trailing") == [999, 949, 99, 49]


def test_euler_sigmas_are_linear_between_timesteps():
    row = EulerAncestral(SCHEDULE).steps(20)[1]
    low, high = SCHEDULE.sigmas[946:948].tolist()
    assert row.timestep == pytest.approx(18 * 999 / 19)
    assert row.sigma == pytest.approx(low + (high - low) * (row.timestep - 946), rel=1e-6)


def test_ddim_noise_is_proportional_to_eta():
    full, half = (DDIM(SCHEDULE, eta=eta).steps(10) for eta in (1.0, 0.5))
    assert all(b.noise_std == pytest.approx(a.noise_std / 2) for a, b in zip(full, half))


def test_trap_3_trailing_gives_the_asked_number_of_steps():
    for count in range(1, 1001):
        values = DDPM(SCHEDULE, "trailing")._timesteps(count)
        assert len(values) == count and values[0] == 999 and values[-1] >= 0
    for sampler, count in itertools.product(SAMPLERS, (61, 103, 121)):
        values = timesteps(sampler, count, "trailing")
        assert len(values) == count and values[-1] >= 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_trap_4_ddim_steps_to_the_next_entry(spacing):
    rows = DDIM(SCHEDULE, timestep_spacing=spacing).steps(30)
    for row, after in zip(rows, rows[1:]):
        assert (row.x0_weight, row.epsilon_weight) == pytest.approx((after.alpha, after.sigma))


@pytest.mark.parametrize("count", [1, 2, 14, 15, 20])
def test_trap_5_the_last_step_is_exactly_x0(count):
    for sampler in samplers():
        row = sampler.steps(count)[-1]
        x, output = randn(2, 3, 2, 2) * row.scale, randn(2, 3, 2, 2, seed=1)
        latents, x0 = sampler.step(output, x, row, generator(), x)
        # Euler subtracts σ·(x − x0)/σ from x: rounding of x, which is of size σ.
        tolerance = dict(atol=1e-6 * row.scale, rtol=1e-6) if row.scale > 1 else dict(atol=0, rtol=0)
        torch.testing.assert_close(latents, x0, **tolerance)


def test_trap_5_without_alpha_to_one_the_last_step_keeps_the_noise_of_timestep_0():
    row = DDIM(SCHEDULE, set_alpha_to_one=False).steps(20)[-1]
    assert row.x0_weight == pytest.approx(math.sqrt(0.9999)), row
    assert row.epsilon_weight == pytest.approx(math.sqrt(0.0001), rel=1e-3)


def test_trap_6_x0_is_clamped_on_request_only():
    x, say = randn(1, 3, 2, 2), torch.full((1, 3, 2, 2), -5.0)
    schedule = NoiseSchedule.linear(prediction_type="sample")
    for sampler in SAMPLERS:
        for clip, expected in ((False, -5.0), (True, -1.0)):
            clipping = sampler(schedule, clip_sample=clip)
            row = clipping.steps(5)[0]
            assert clipping.step(say, x, row, generator()).x0.unique().item() == expected
        assert sampler(schedule) == sampler(schedule, clip_sample=False)


def test_trap_7_variances_that_give_nan_are_refused():
    for kind in ("fixed_large_log", "learned", "fixed_small_log", ""):
        with pytest.raises(ValueError, match="^variance_type is .*, expected one of fixed_small, fixed_large, learned_range"):
            DDPM(SCHEDULE, variance_type=kind)


def test_trap_8_learned_variance_is_split_at_the_latent_channels():
    output = randn(2, 32, 4, 4)
    epsilon, variance = split_learned_variance(output, 16)
    assert torch.equal(epsilon, output[:, :16]) and torch.equal(variance, output[:, 16:])
    epsilon, variance = split_learned_variance(output, 32)
    assert torch.equal(epsilon, output) and variance is None
    for channels in (3, 8, 64):
        with pytest.raises(ValueError, match=f"32 channels, expected {channels} or {2 * channels}"):
            split_learned_variance(output, channels)
    for sampler in samplers():  # every sampler takes PixCell's 32 channels and reads the first 16
        row, x = sampler.steps(5)[0], randn(2, 16, 4, 4, seed=1)
        one = sampler.step(output, x, row, generator())
        two = sampler.step(output[:, :16], x, row, generator())
        assert torch.equal(one.latents, two.latents) and torch.equal(one.x0, two.x0)


def draws(sampler, count):
    """How many times a run of `count` steps draws latents."""
    used, x = generator(), randn(1, 16, 2, 2)
    run(sampler, count, lambda x, row: 0.5 * x, x, used)
    counter = generator()
    for number in range(count + 2):
        if torch.equal(used.get_state(), counter.get_state()):
            return number
        torch.randn(x.shape, generator=counter)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_trap_9_number_of_draws_in_ten_steps(spacing):
    ends_at_0 = spacing != "trailing"
    assert draws(DDPM(SCHEDULE, spacing), 10) == (9 if ends_at_0 else 10)
    assert draws(DDIM(SCHEDULE, spacing), 10) == 0
    assert draws(DDIM(SCHEDULE, spacing, eta=0.5), 10) == 10
    assert draws(EulerAncestral(SCHEDULE, spacing), 10) == 10
    assert draws(DPMSolverPP2M(SCHEDULE, spacing), 10) == 0


def test_trap_9_one_generator_per_image_makes_images_independent_of_the_batch():
    start = randn(3, 4, 2, 2)
    for sampler in samplers():
        say = lambda x, row: 0.7 * sampler.scale_model_input(x, row)  # noqa: E731
        together, _ = run(sampler, 6, say, start, [generator(seed) for seed in range(3)])
        for seed in range(3):
            alone, _ = run(sampler, 6, say, start[seed : seed + 1], generator(seed))
            assert torch.equal(together[seed : seed + 1], alone)


def test_trap_10_half_inputs_are_computed_in_float32():
    for sampler in samplers():
        for row in sampler.steps(3):
            x, output = randn(2, 3, 2, 2).half(), randn(2, 3, 2, 2, seed=1).half()
            half = sampler.step(output, x, row, generator(), x.float())
            full = sampler.step(output.float(), x.float(), row, generator(), x.float())
            assert half.latents.dtype == half.x0.dtype == torch.float32
            assert torch.equal(half.latents, full.latents) and torch.equal(half.x0, full.x0)


def test_trap_12_scales_of_euler():
    for spacing, sigma in (("linspace", 157.40727), ("trailing", 157.40727), ("leading", None)):
        sampler = EulerAncestral(SCHEDULE, timestep_spacing=spacing)
        row = sampler.steps(20)[0]
        if sigma is None:  # leading starts lower, and includes the variance of the clean latents
            assert row.sigma < 130
            sigma = math.sqrt(row.sigma**2 + 1)
        assert sampler.init_noise_sigma(20) == pytest.approx(sigma, rel=1e-6)
        x = randn(1, 2, 2, 2)
        scaled = x / math.sqrt(row.sigma**2 + 1)
        torch.testing.assert_close(sampler.scale_model_input(x, row), scaled, **FLOAT32)


def test_vp_samplers_start_at_one_and_leave_the_input_alone():
    x = randn(1, 2, 2, 2)
    for sampler in (DDPM(SCHEDULE), DDIM(SCHEDULE), DPMSolverPP2M(SCHEDULE)):
        assert sampler.init_noise_sigma(20) == 1.0
        assert torch.equal(sampler.scale_model_input(x, sampler.steps(20)[0]), x)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [1, 2, 5, 14, 15, 20, 999])
def test_trap_14_dpm_orders(spacing, count):
    rows = DPMSolverPP2M(SCHEDULE, timestep_spacing=spacing).steps(count)
    assert rows[0].extrapolation == rows[-1].extrapolation == 0  # first order
    assert all(row.extrapolation > 0 for row in rows[1:-1])  # second order
    assert (rows[-1].x_weight, rows[-1].x0_weight) == (0.0, 1.0)  # h = ∞


def test_trap_14_dpm_step_by_hand():
    """Algorithm 2 of Lu et al. in float64, on the second of five steps."""
    sampler = DPMSolverPP2M(SCHEDULE)
    before, row, after = sampler.steps(5)[:3]
    lambdas = [math.log(r.alpha / r.sigma) for r in (before, row, after)]
    h, r = lambdas[2] - lambdas[1], (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    x, epsilon, previous = randn(1, 2, 2, 2), randn(1, 2, 2, 2, seed=1), randn(1, 2, 2, 2, seed=2)
    x0 = (x.double() - row.sigma * epsilon) / row.alpha
    blend = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
    expected = after.sigma / row.sigma * x - after.alpha * math.expm1(-h) * blend
    result = sampler.step(epsilon, x, row, None, previous).latents
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)  # |x0| is 50 here


def test_trap_14_dpm_survives_a_repeated_timestep():
    rows = DPMSolverPP2M(SCHEDULE).steps(1000)
    assert len({row.timestep for row in rows}) == 999
    assert all(math.isfinite(value) for row in rows for value in dataclasses.astuple(row))
    repeat = next(i for i in range(999) if rows[i].timestep == rows[i + 1].timestep)
    assert (rows[repeat].x_weight, rows[repeat].x0_weight) == (1.0, 0.0)  # stands still
    assert rows[repeat + 1].extrapolation == 0  # and starts anew


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trap_15_counts_and_offsets_out_of_range(sampler):
    for spacing, count in itertools.product(SPACINGS, (0, -1, 1001, 2.5, "5", None)):
        with pytest.raises(ValueError, match="num_inference_steps is .*, expected 1 to 1000"):
            sampler(SCHEDULE, timestep_spacing=spacing).steps(count)
    for offset in (1, 2):
        shifted = sampler(SCHEDULE, timestep_spacing="leading", steps_offset=offset)
        with pytest.raises(ValueError, match="do not fit 1000 timesteps"):
            shifted.steps(1000)
        plain = timesteps(sampler, 20, "leading")
        assert [row.timestep for row in shifted.steps(20)] == [t + offset for t in plain]
    for spacing, offset in (("linspace", 1), ("trailing", 1), ("leading", -1)):
        with pytest.raises(ValueError, match="steps_offset"):
            sampler(SCHEDULE, timestep_spacing=spacing, steps_offset=offset)
    with pytest.raises(ValueError, match="linspace, leading, trailing"):
        sampler(SCHEDULE, timestep_spacing="karras")


def test_trap_15_the_largest_offset_that_fits():
    assert [row.timestep for row in DDIM(SCHEDULE, steps_offset=333).steps(3)] == [999, 666, 333]
    with pytest.raises(ValueError, match=r"3 leading steps \+ offset 334 do not fit 1000 timesteps"):
        DDIM(SCHEDULE, steps_offset=334).steps(3)
    with pytest.raises(ValueError, match="^timestep_spacing is 'even', expected one of linspace, lead"):
        DDIM(SCHEDULE, timestep_spacing="even")


def test_trap_15_leading_dpm_has_no_room_for_as_many_steps_as_timesteps():
    with pytest.raises(ValueError, match="expected fewer or another spacing"):
        DPMSolverPP2M(SCHEDULE, timestep_spacing="leading").steps(1000)
    assert len(DPMSolverPP2M(SCHEDULE, timestep_spacing="leading").steps(999)) == 999


def test_one_step_starts_at_zero_except_where_said():
    for sampler, spacing in itertools.product(SAMPLERS, SPACINGS):
        low = spacing != "trailing" and sampler is not DPMSolverPP2M
        start = timesteps(sampler, 1, spacing)[0]
        assert start == 0 if low else start >= 500, (sampler, spacing)


# --- an oracle that knows x0: no reference library needed


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("count", [1, 2, 30])
def test_oracle_recovers_x0(prediction_type, count):
    x0 = randn(2, 4, 2, 2)
    for sampler in samplers(prediction_type):
        first = sampler.steps(count)[0]
        start = first.alpha * x0 + first.sigma * randn(2, 4, 2, 2, seed=1)
        say = lambda x, row: oracle(prediction_type, x0, x, row)  # noqa: E731
        latents, final = run(sampler, count, say, start, generator())
        # One rounding of x (1e-7 of it) divided by alpha = 0.0064 at the noisiest timestep.
        torch.testing.assert_close(latents, x0, atol=1e-4, rtol=0, msg=str(sampler))
        torch.testing.assert_close(final, x0, atol=1e-4, rtol=0, msg=str(sampler))


def final_std(sampler, count, data_std):
    """Standard deviation of the samples when x0 ~ N(0, data_std²) and the network is ideal.

    Everything is linear then: x0 = k·x; propagate the variance, or the gain where nothing is drawn.
    """
    rows = sampler.steps(count)
    variance, gain, previous = None, None, 0.0
    for row in rows:
        total = (row.alpha * data_std) ** 2 + row.sigma**2
        variance = total if variance is None else variance
        gain = math.sqrt(variance) if gain is None else gain
        k = row.alpha * data_std**2 / total
        weight = row.x_weight + row.x0_weight * k + row.epsilon_weight * row.sigma / total
        x0 = k * gain
        gain = weight * gain + row.x0_weight * row.extrapolation * (x0 - previous)
        variance = weight**2 * variance + row.noise_std**2
        previous = x0
    return math.sqrt(variance) if rows[0].draws else abs(gain)


@pytest.mark.parametrize("data_std", [0.3, 1.0, 2.0])
def test_ideal_network_gives_the_spread_of_the_data(data_std):
    for sampler in samplers():
        assert final_std(sampler, 900, data_std) == pytest.approx(data_std, rel=0.03), sampler


def test_dpm_is_of_second_order_and_ddim_of_first():
    errors = {}
    for sampler in (DDIM, DPMSolverPP2M):
        trailing = sampler(SCHEDULE, timestep_spacing="trailing")
        errors[sampler] = [abs(final_std(trailing, n, 0.5) - final_std(trailing, 2 * n, 0.5))
                           for n in (50, 100)]
    ratio = {sampler: coarse / fine for sampler, (coarse, fine) in errors.items()}
    assert ratio[DDIM] == pytest.approx(2, abs=0.5)  # twice the steps, half the error
    assert errors[DPMSolverPP2M][0] < errors[DDIM][0] / 5


# --- identities between the samplers


def test_ddim_with_eta_1_is_ddpm():
    for spacing in SPACINGS:
        ddpm, ddim = DDPM(SCHEDULE, spacing), DDIM(SCHEDULE, spacing, eta=1.0)
        for one, two in zip(ddpm.steps(30)[:-1], ddim.steps(30)):
            x, epsilon = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
            a, b = (s.step(epsilon, x, row, generator()) for s, row in ((ddpm, one), (ddim, two)))
            torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=0)  # |x0| reaches 300


def test_first_step_of_dpm_is_ddim():
    dpm, ddim = (s(SCHEDULE, timestep_spacing="trailing") for s in (DPMSolverPP2M, DDIM))
    x, epsilon = randn(1, 4, 2, 2), randn(1, 4, 2, 2, seed=1)
    a, b = (s.step(epsilon, x, s.steps(20)[0]).latents for s in (dpm, ddim))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_learned_range_moves_between_small_and_large():
    x, epsilon = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    kinds = ("learned_range", "fixed_small", "fixed_large")
    learned, small, large = (DDPM(SCHEDULE, variance_type=kind) for kind in kinds)
    for i in range(9):
        deviation = []
        for sampler, variance in ((small, 0), (large, 0), (learned, -1), (learned, 1), (learned, 0)):
            output = torch.cat([epsilon, torch.full_like(epsilon, variance)], dim=1)
            row = sampler.steps(10)[i]
            mean = sampler.step(output, x, dataclasses.replace(row, draws=False)).latents
            noisy = sampler.step(output, x, row, generator()).latents
            deviation.append((noisy - mean).norm() / torch.randn(x.shape, generator=generator()).norm())
        lowest, highest, at_minus_1, at_1, middle = torch.stack(deviation).tolist()
        assert lowest < middle < highest
        assert (at_minus_1, at_1) == pytest.approx((lowest, highest), rel=1e-4)
        assert middle == pytest.approx(math.sqrt(lowest * highest), rel=1e-4)
    with pytest.raises(ValueError, match="2C channels"):
        learned.step(epsilon, x, learned.steps(10)[0], generator())
    row = learned.steps(10)[-1]
    assert row.is_last and row.noise_std == row.max_noise_std == 0


def test_ddpm_adds_no_noise_at_the_last_step():
    for kind, spacing in itertools.product(("fixed_small", "fixed_large", "learned_range"), SPACINGS):
        row = DDPM(SCHEDULE, spacing, variance_type=kind).steps(20)[-1]
        assert row.noise_std == row.max_noise_std == 0.0
        assert (row.x_weight, row.x0_weight) == (0.0, 1.0)
    large, small = (DDPM(SCHEDULE, variance_type=k).steps(20) for k in ("fixed_large", "fixed_small"))
    assert all(a.noise_std > b.noise_std for a, b in zip(large[:-1], small[:-1]))


# --- no hidden state


def test_samplers_and_tables_are_frozen():
    for sampler in samplers():
        for thing in (sampler, sampler.schedule, sampler.steps(3)[0]):
            name = dataclasses.fields(thing)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, name, None)


def test_two_runs_interleaved_equal_two_runs_apart():
    starts = [randn(1, 4, 2, 2, seed=seed) for seed in (3, 4)]
    for sampler in samplers():
        say = lambda x, row: torch.sin(sampler.scale_model_input(x, row))  # noqa: E731
        apart = [run(sampler, 8, say, start, generator(5))[0] for start in starts]
        state = [(start, None) for start in starts]
        sources = [generator(5), generator(5)]
        for row in sampler.steps(8):
            for i, (x, x0) in enumerate(state):
                kept = x.clone()
                state[i] = sampler.step(say(x, row), x, row, sources[i], x0)
                assert torch.equal(x, kept)  # inputs are left alone
        assert all(torch.equal(state[i][0], apart[i]) for i in (0, 1))


# --- failures of a step, and the names


def test_step_says_what_is_missing():
    x = randn(2, 4, 2, 2)
    ddpm = DDPM(SCHEDULE)
    row = ddpm.steps(5)[0]
    with pytest.raises(ValueError, match="generator is None"):
        ddpm.step(x, x, row)
    for wrong in ([], [generator()], [generator()] * 3):
        with pytest.raises(ValueError, match=f"{len(wrong)} generators for 2 images"):
            ddpm.step(x, x, row, wrong)
    for shape in ((2, 4, 2, 1), (1, 4, 2, 2), (2, 4, 1, 1)):
        with pytest.raises(ValueError, match="expected .2, 4, 2, 2."):
            ddpm.step(randn(*shape), x, row, generator())
    with pytest.raises(ValueError, match="5 channels, expected 4 or 8"):
        ddpm.step(randn(2, 5, 2, 2), x, row, generator())
    dpm = DPMSolverPP2M(SCHEDULE)
    with pytest.raises(ValueError, match="previous_x0 is None"):
        dpm.step(x, x, dpm.steps(5)[1])


def test_build_scheduler():
    assert set(SCHEDULER_NAMES) == {"ddim", "euler_ancestral", "ddpm", "dpmpp_2m"}
    defaults = {name: build_scheduler(name, SCHEDULE).timestep_spacing for name in SCHEDULER_NAMES}
    assert defaults == dict(ddim="leading", ddpm="leading", euler_ancestral="linspace",
                            dpmpp_2m="linspace")
    assert build_scheduler("ddim", SCHEDULE, "trailing", 0.3) == DDIM(SCHEDULE, "trailing", eta=0.3)
    assert build_scheduler("dpmpp_2m", SCHEDULE, "leading") == DPMSolverPP2M(SCHEDULE, "leading")
    with pytest.raises(ValueError, match="^scheduler is 'euler', expected one of ddim, euler_ancestral"):
        build_scheduler("euler", SCHEDULE)
    with pytest.raises(ValueError, match="linspace, leading, trailing"):
        build_scheduler("ddim", SCHEDULE, spacing="")
    with pytest.raises(ValueError, match="eta is 0.5 with ddpm"):
        build_scheduler("ddpm", SCHEDULE, eta=0.5)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            build_scheduler("ddim", SCHEDULE, eta=eta)
