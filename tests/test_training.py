"""training.py: what float16 may and may not do to a step, accumulation and counts in whole runs."""

import contextlib
import dataclasses
import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import ROOT, assert_same_weights, metrics, weights
from pixcell_min import batches, training
from pixcell_min.checkpoint import load_object
from pixcell_min.lora import lora_parameters
from pixcell_min.training import (Diverged, Progress, StepReport, TrainingState, build_optimizer,
                                  build_scaler, check_attempt, count_attempt, diffusion_loss,
                                  optimizer_step)
from test_train import random_batch, small_problem


def scaler_of(scale, growth_interval=2000):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)


def fp16_flags(arguments, scale, monkeypatch, **options):
    """Flags of a float16 run whose loss scale starts at `scale`."""
    monkeypatch.setattr(train, "build_scaler", lambda device, dtype: scaler_of(scale, **options))
    return [*arguments, "--mixed-precision", "fp16"]


def overflow_at(monkeypatch, *attempts):
    """Make the losses of these attempts of a run infinite; → the list of attempts, as they come."""
    seen, draw, loss = [], train.draw_micro_batches, train.diffusion_loss

    def draw_and_note(*inputs):
        seen.append(inputs[-1])
        return draw(*inputs)

    monkeypatch.setattr(train, "draw_micro_batches", draw_and_note)
    monkeypatch.setattr(train, "diffusion_loss", lambda *inputs: loss(*inputs) * (
        torch.inf if seen[-1] in attempts else 1))
    return seen


# ------------------------------------------------------------------------- one step in float16

@pytest.fixture
def problem(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 1e-2, 1e-2, 0.0)

    def run(seeds, scaler=None, dtype=None, factor=lambda seed: 1.0):
        scaler, report = scaler or build_scaler("cpu", None), None
        state = TrainingState(transformer, adapter, optimizer, scaler, Progress())
        for seed in seeds:
            report = optimizer_step(
                lambda batch: diffusion_loss(transformer, adapter, schedule, batch, dtype)
                * factor(seed), [random_batch(2, seed)], 2, optimizer, scaler, 1.0)
            count_attempt(state.progress, report)
        return state, report

    return run


def copies(state):
    return [p.detach().clone() for p in state.parameters]


@pytest.mark.parametrize("still", [0, 1], ids=["LoRA", "adapter"])
def test_a_rate_of_zero_trains_the_other_part_alone(problem, still):
    state, _ = problem([])
    for group in state.optimizer.param_groups:
        group["weight_decay"] = 0.1
    state.optimizer.param_groups[still]["lr"] = 0.0
    before = copies(state)
    problem([1, 2])
    moved = [not torch.equal(a, b) for a, b in zip(before, state.parameters)]
    lora = len(state.optimizer.param_groups[0]["params"])
    parts = [moved[:lora], moved[lora:]]
    assert not any(parts[still]) and all(parts[1 - still])


def test_a_skipped_step_is_as_if_it_had_never_been(tiny_base, problem):
    whole, _ = problem([1, 3], scaler_of(2.0**10))
    expected, moments = copies(whole), whole.optimizer.state_dict()["state"]
    transformer, adapter, schedule = small_problem(tiny_base)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 1e-2, 1e-2, 0.0)
    state = TrainingState(transformer, adapter, optimizer, scaler_of(2.0**10), Progress())
    for seed in (1, 2, 3):  # 2 overflows; scales are powers of two: exact in a float32 forward
        count_attempt(state.progress, optimizer_step(
            lambda batch: diffusion_loss(transformer, adapter, schedule, batch)
            * (math.inf if seed == 2 else 1), [random_batch(2, seed)], 2, optimizer, state.scaler, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(expected, state.parameters, strict=True))
    for index, its in optimizer.state_dict()["state"].items():
        assert all(torch.equal(its[key], moments[index][key]) for key in its)
    assert state.progress == Progress(step=2, attempt=3, skipped_in_a_row=0)
    assert state.progress.skipped == 1 and state.scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinity_or_nan_in_any_gradient_skips_the_step(problem, bad):
    state, _ = problem([1], scaler_of(2.0**10))
    before, parameters = copies(state), state.parameters
    hook = parameters[-1].register_hook(lambda gradient: gradient.index_fill(
        0, torch.tensor([0]), bad))
    _, report = problem([2], state.scaler)
    hook.remove()
    assert report.skipped and not math.isfinite(report.grad_norm) and math.isfinite(report.loss)
    assert report.loss_scale == state.scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_finite_gradients_of_infinite_norm_are_skipped_not_set_to_zero(problem):
    state, _ = problem([1], scaler_of(1.0))
    before, steps = copies(state), state.optimizer.state_dict()["state"][0]["step"].clone()
    hooks = [p.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
             for p in state.parameters[-2:]]
    _, report = problem([2], state.scaler)
    [hook.remove() for hook in hooks]
    assert report.skipped and report.grad_norm == math.inf
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert state.optimizer.state_dict()["state"][0]["step"] == steps


def test_the_loss_scale_grows_after_good_steps_and_is_reported(problem):
    scaler, scales = scaler_of(2.0**8, growth_interval=2), []
    for seed in range(4):
        _, report = problem([seed], scaler, torch.float16)
        assert not report.skipped
        scales.append(report.loss_scale)
    assert scales == [2.0**8, 2.0**9, 2.0**9, 2.0**10]


def test_trained_parameters_gradients_and_moments_are_float32_under_float16(problem):
    state, _ = problem([1, 2], scaler_of(2.0**8), torch.float16)
    tensors = [t for p in state.parameters for t in (p, p.grad, *(
        state.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")))]
    assert len(tensors) == 4 * len(state.parameters) and {t.dtype for t in tensors} == {torch.float32}


def test_autocast_covers_the_forward_alone_and_attention_runs_in_float32(tiny_base, monkeypatch):
    transformer, adapter, schedule = small_problem(tiny_base)
    seen, attention = set(), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **more: (
        seen.update((q.dtype, k.dtype, v.dtype)), attention(q, k, v, **more))[1])
    mse = training.F.mse_loss
    monkeypatch.setattr(training.F, "mse_loss", lambda a, b, **more: (
        seen.update(("loss", a.dtype, b.dtype)),
        seen.add(("autocast", torch.is_autocast_enabled("cpu"))), mse(a, b, **more))[2])
    transformer.set_float32_attention(True)
    diffusion_loss(transformer, adapter, schedule, random_batch(2, 1), torch.float16)
    assert seen == {torch.float32, "loss", ("autocast", False)}


def test_twenty_skips_in_a_row_and_nan_weights_end_a_run_with_the_cause(problem):
    state, _ = problem([1], scaler_of(2.0**8))
    for loss, where in ((math.nan, "the forward"), (1.0, "gradients")):
        state.progress.skipped_in_a_row = training.MAX_SKIPPED_STEPS - 2
        report = StepReport(loss, math.inf, True, 0.5)
        count_attempt(state.progress, report)
        check_attempt(state, report)
        count_attempt(state.progress, report)
        with pytest.raises(Diverged, match=rf"in 20 steps in a row \({where}; .*loss scale 0.5"):
            check_attempt(state, report)
    good = StepReport(1.0, 1.0, False)
    count_attempt(state.progress, good)
    assert state.progress.skipped_in_a_row == 0  # in a row: one good step, and it counts anew
    check_attempt(state, good)
    with torch.no_grad():
        state.parameters[3].view(-1)[0] = math.nan
    count_attempt(state.progress, good)
    with pytest.raises(Diverged, match="NaN or infinite after step 3"):
        check_attempt(state, good)


# ---------------------------------------------------------------------- whole runs in float16

def test_overflow_at_the_start_costs_attempts_and_no_steps(arguments, tmp_path, monkeypatch, capsys):
    seen = overflow_at(monkeypatch)
    flags = [*fp16_flags(arguments, 2.0**38, monkeypatch), "--loss-weighting", "uniform"]
    assert train.main(flags) == 0
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    good, skipped = ([line for line in lines if line["skipped"] is which] for which in (False, True))
    assert 3 < len(skipped) < 20 and lines[:4] == skipped[:4]
    assert [line["step"] for line in good] == [1, 2, 3, 4]
    assert seen == list(range(len(lines)))  # each attempt has data of its own
    assert [line["skipped_so_far"] for line in skipped] == list(range(1, len(skipped) + 1))
    assert [line["loss_scale"] for line in skipped] == [2.0**(37 - i) for i in range(len(skipped))]
    for at, line in enumerate(lines):  # a skipped attempt leaves the number of steps as it was
        assert line["step"] == sum(not earlier["skipped"] for earlier in lines[:at + 1])
    peak = [0.01 * train.rate_factor(step, 1, 4, "cosine") for step in range(4)]
    assert [line["lora_rate"] for line in good] == peak  # rates follow the steps made
    state = load_object(tmp_path / "run" / "states" / "step-00000004.pt")["content"]
    assert state["progress"]["step"] == 4 == state["optimizer"]["state"][0]["step"]
    assert "step 1 skipped: float16 overflowed" in "".join(capsys.readouterr())


def test_a_run_with_a_skipped_step_resumes_bit_for_bit(arguments, tmp_path, monkeypatch):
    flags = [*fp16_flags(arguments, 2.0**8, monkeypatch, growth_interval=2),
             "--max-train-steps", "6", "--save-every", "2"]
    with monkeypatch.context() as patch:
        overflow_at(patch, 1, 4)
        assert train.main(flags) == 0
    whole, logged = weights(tmp_path / "run"), metrics(tmp_path / "run")
    with monkeypatch.context() as patch:
        overflow_at(patch, 1, 4)
        patch.setattr(train, "rate_factor", interrupt_at(3))
        assert train.main([*flags, "--overwrite"]) == 130
    assert load_object(tmp_path / "run/states/step-00000002.pt")["content"]["scaler"]["scale"] == 2.0**7
    with monkeypatch.context() as patch:
        seen = overflow_at(patch, 1, 4)
        assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert seen == [3, 4, 5, 6, 7]  # step 2 was saved after attempt 2; attempt 4 overflows again
    assert_same_weights(weights(tmp_path / "run"), whole)
    timeless = [[{**line, "seconds": 0} for line in lines]
                for lines in (logged, metrics(tmp_path / "run"))]
    assert timeless[0] == timeless[1] and timeless[0][-2]["skipped_so_far"] == 2


def interrupt_at(step):
    original = train.rate_factor

    def rate_factor(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return original(now, *rest)

    return rate_factor


@pytest.mark.parametrize("cause", ["overflow in every step", "NaN in the weights"])
def test_a_run_that_cannot_go_on_names_the_cause_and_keeps_the_last_good_state(
        cause, arguments, tmp_path, monkeypatch, capsys):
    flags = [*fp16_flags(arguments, 2.0**8, monkeypatch), "--save-every", "2"]
    assert train.main([*flags, "--max-train-steps", "6"]) == 0
    whole = weights(tmp_path / "run")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        if cause == "overflow in every step":
            overflow_at(patch, *range(3, 99))
        else:
            patch.setattr(train, "optimizer_step", spoil_weights_after(3))
        assert train.main([*flags, "--max-train-steps", "6", "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: ") and (
        "overflowed in 20 steps in a row" in error if "overflow" in cause
        else "NaN or infinite after step 4" in error)
    run = tmp_path / "run"  # no advice to resume with what a resume refuses
    assert error.endswith("start anew so, with another --out or with --overwrite; what was saved "
                          f"at step 2 stays in {run}") and "--resume" not in error
    last = metrics(run)[-1]  # logged before the run ended
    assert (last["attempt"], last["skipped"]) == ((23, True) if "overflow" in cause else (4, False))
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert_same_weights(weights(tmp_path / "run"), whole)


def spoil_weights_after(count):
    steps = []

    def step(loss_of, batches, num_samples, optimizer, *rest):
        report = optimizer_step(loss_of, batches, num_samples, optimizer, *rest)
        steps.append(report)
        if len(steps) > count:
            optimizer.param_groups[1]["params"][0].data[0] = math.nan
        return report

    return step


# ------------------------------------------------------------------------------ accumulation

@pytest.fixture
def by_hand():
    """Two numbers to train, the loss w·x of a sample x, and a step on micro-batches of them."""
    weight, other = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(2))
    optimizer = build_optimizer([weight], [other], 0.1, 0.1, 0.0)

    def step(trained, parts, count, *more):
        parts = (SimpleNamespace(timesteps=torch.zeros(len(x)), x=torch.tensor(x)) for x in parts)
        return optimizer_step(lambda batch: trained * batch.x, parts, count, optimizer,
                              build_scaler("cpu", None), *more)

    return weight, other, step


def test_a_step_by_hand(by_hand):
    weight, other, step = by_hand
    assert step(weight, [[1.0, 2.0], [6.0]], 3, 1e9) == StepReport(6.0, 3.0, False, 1.0)
    assert weight.grad.item() == 3 and weight.item() == pytest.approx(1.9)  # AdamW's first: the rate
    assert other.grad is None
    report = step(other, [[1.0, 2.0], [6.0]], 3, 1.5)
    assert report.grad_norm == 3 and other.grad.item() == pytest.approx(1.5)  # told, then clipped
    assert weight.grad is None and weight.item() == pytest.approx(1.9)  # no gradient: it stays
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loss = 0.0


def test_a_process_divides_by_its_own_samples_and_shares_at_its_last_batch(by_hand):
    apart, sums = [], []

    @contextlib.contextmanager
    def note(loss_of):
        apart.append("apart")
        yield

    processes = SimpleNamespace(size=2, apart=note, mean=lambda total: sums.append(total) or 7.0)
    report = by_hand[2](by_hand[0], [[1.0], [2.0], [3.0]], 6, 1e9, processes)
    assert apart == ["apart"] * 2 and sums == [pytest.approx(4.0)]  # 2·(1 + 2 + 3)/3
    assert report.loss == 7.0 and by_hand[0].grad.item() == pytest.approx(2.0)


def test_rates_count_optimizer_steps_not_micro_steps(arguments, tmp_path):
    flags = [*arguments, "--gradient-accumulation-steps", "3", "--warmup-steps", "2"]
    assert train.main(flags) == 0
    rates = [line["lora_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005], rel=1e-12)


# --------------------------------------------------- classes, bands, epochs, stopping early

def test_a_balanced_run_evens_out_its_classes_and_needs_two(arguments, tiles, tmp_path, capsys):
    for path in sorted((tiles / "STR").iterdir())[1:]:
        path.unlink()
    seen, loss = [], batches.draw_batch
    flags = [*arguments, "--no-dihedral", "--class-balanced", "--max-train-steps", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "draw_batch", lambda features, rows, *rest: (
            seen.extend(features.tiles[row].label for row in rows), loss(features, rows, *rest))[1])
        assert train.main(flags) == 0
    assert seen.count("STR") == seen.count("TUM") == 6
    capsys.readouterr()
    assert train.main([*flags, "--data", str(tiles / "TUM"), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "class-balanced sampling" in error and not (tmp_path / "o").exists()
    with pytest.MonkeyPatch.context() as patch:  # refused before anything is loaded or encoded
        patch.setattr(train, "load_pixcell_base", None)
        assert train.main([*flags, "--data", str(tiles / "TUM"), "--out", str(tmp_path / "o")]) == 2


def test_bands_part_the_validation_loss_by_timestep(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "diffusion_loss",  # the timestep itself as loss
                        lambda *inputs: inputs[3].timesteps.float())
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    line = metrics(tmp_path / "run")[0]
    assert len(line["validation_bands"]) == 8
    for band, mean in enumerate(line["validation_bands"]):
        assert 125 * band <= mean < 125 * (band + 1)
    assert sum(line["validation_bands"]) / 8 == pytest.approx(line["validation_loss"], rel=1e-6)


def test_epochs_overrule_steps_and_are_whole_passes(arguments, tmp_path):
    assert train.main([*arguments, "--epochs", "3"]) == 0  # 6 tiles · 3 / (2 · 2) = 4.5
    assert metrics(tmp_path / "run")[-1]["step"] == 5
    assert train.total_steps(train.Config(epochs=2, batch_size=4, gradient_accumulation_steps=4),
                             72) == 9


def test_a_run_stops_early_where_validation_no_longer_improves_and_stays_stopped(
        arguments, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.0, 9.0, 9.0])
    monkeypatch.setattr(train, "validation_loss", lambda *_: (next(losses), [0.0] * 8))
    flags = [*arguments, "--max-train-steps", "50", "--validate-every", "2", "--early-stop", "2",
             "--save-every", "0"]
    assert train.main(flags) == 0
    run = tmp_path / "run"
    assert metrics(run)[-1]["step"] == 6  # lowest at step 2, not lower at 4 and 6
    assert "stopped early at step 6: no lower validation loss than 2.00000" in "".join(
        capsys.readouterr())
    assert load_object(run / "states" / "step-00000006.pt")["content"]["progress"]["best_loss"] == 2
    before = weights(run)
    assert train.main(["--resume", "--out", str(run)]) == 0
    assert metrics(run)[-1]["step"] == 6
    assert_same_weights(weights(run), before)


# ---------------------------------------------------------------- validation and counts, alone

def test_min_snr_counts_to_five_unless_told(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    timesteps, batch = torch.arange(1000), random_batch(3, 2)
    batch = dataclasses.replace(batch, timesteps=torch.tensor([5, 20, 40]))  # all above SNR 10
    assert torch.equal(training.timestep_weights(schedule, timesteps, "min_snr"),
                       training.timestep_weights(schedule, timesteps, "min_snr", 5.0))
    losses = [diffusion_loss(transformer, adapter, schedule, batch, None, "min_snr", *gamma)
              for gamma in ((), (5.0,), (10.0,))]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_validation_sees_each_row_once_in_each_of_eight_bands(trains, tiny_base, monkeypatch):
    transformer, adapter, schedule = small_problem(tiny_base)
    transformer.train(trains[0]), adapter.train(trains[1])
    rows = torch.arange(5.0)
    features = SimpleNamespace(mean=rows.view(5, 1, 1, 1).expand(5, 16, 8, 8),
                               embeddings=rows.view(5, 1, 1).expand(5, 1, 16))
    seen = []

    def loss(network, its, given, batch, dtype):
        assert (network, its, given, dtype) == (transformer, adapter, schedule, torch.bfloat16)
        assert not network.training and not its.training and not torch.is_grad_enabled()
        seen.append(batch)
        return batch.timesteps + 1000 * batch.latents[:, 0, 0, 0]

    def measure(seed):
        seen.clear()
        found = training.validation_loss(transformer, adapter, schedule, features,
                                         torch.tensor([4, 1, 2]), 5, seed, torch.bfloat16)
        assert [len(batch.timesteps) for batch in seen] == [5, 5, 5, 5, 4]
        return *found, batches.Batch(*(torch.cat([getattr(batch, name) for batch in seen])
                                       for name in seen[0].__dataclass_fields__))

    monkeypatch.setattr(training, "diffusion_loss", loss)
    mean, bands, batch = measure(0)
    assert (transformer.training, adapter.training) == trains
    assert batch.latents[:, 3, 2, 1].tolist() == [4.0] * 8 + [1.0] * 8 + [2.0] * 8
    assert batch.embeddings[:, 0, 5].tolist() == [4.0] * 8 + [1.0] * 8 + [2.0] * 8
    assert batch.dropped.dtype == torch.bool and not batch.dropped.any()
    timesteps, starts = batch.timesteps.view(3, 8), 125 * torch.arange(8)
    assert ((timesteps >= starts) & (timesteps < starts + 125)).all()
    drawn = batches.generator_for(0, "validation")  # with any other the numbers of old runs move
    assert torch.equal(timesteps, (starts + 125 * torch.rand(24, generator=drawn).view(3, 8)).long())
    assert torch.equal(batch.noise[:5], torch.randn(5, 16, 8, 8, generator=drawn))
    assert batch.noise.shape == (24, 16, 8, 8) and batch.noise.std() == pytest.approx(1, abs=0.01)
    assert len(batch.noise[:, 0, 0, 0].unique()) == 24
    losses = timesteps + torch.tensor([[4000.0], [1000.0], [2000.0]])
    assert mean == pytest.approx(losses.mean().item(), rel=1e-6)
    assert bands == pytest.approx(losses.mean(0).tolist(), rel=1e-6)
    again, other = measure(0)[2], measure(1)[2]
    assert torch.equal(again.noise, batch.noise) and torch.equal(again.timesteps, batch.timesteps)
    assert not torch.equal(other.noise, batch.noise)


@pytest.mark.parametrize("step, warmup, last, factor", [
    (0, 0, 10, 1.0), (5, 0, 10, 0.5), (10, 0, 10, 0.0), (99, 0, 10, 0.0), (10, 10, 10, 1.0),
    (11, 10, 10, 0.0), (0, 2, 10, 0.5), (1, 2, 10, 1.0), (3, 1, 9, 0.8535533905932737)])
def test_rates_at_the_ends_of_warmup_and_run(step, warmup, last, factor):
    assert training.rate_factor(step, warmup, last, "cosine") == pytest.approx(factor, abs=1e-12)


def test_what_is_due_and_when():
    assert [step for step in range(1, 8) if training.is_due(step, 3)] == [3, 6]
    assert [step for step in range(1, 8) if training.is_due(step, 1)] == [*range(1, 8)]
    assert not any(training.is_due(step, 0) for step in range(8))


def test_the_scaler_acts_in_float16_alone_and_on_its_device():
    for device, dtype, active in (("cpu", torch.float16, True), ("cpu", torch.bfloat16, False),
                                  ("cpu", None, False), (torch.device("cpu"), torch.float16, True)):
        assert build_scaler(device, dtype).is_enabled() == active


def test_the_optimizer_is_fused_adamw_of_two_groups_with_their_peaks():
    one, two = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_optimizer(iter([one]), iter([two]), 1e-3, 2e-3, 0.25)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert [(group["params"], group["lr"], group["initial_lr"], group["weight_decay"])
            for group in optimizer.param_groups] == [
                ([one], 1e-3, 1e-3, 0.25), ([two], 2e-3, 2e-3, 0.25)]


def test_counts_of_validations_and_attempts_by_hand():
    progress = Progress()
    assert progress == Progress(0, 0, 0, math.inf, 0)
    for loss, best, since in ((3.0, 3.0, 0), (3.0, 3.0, 1), (4.0, 3.0, 2), (2.5, 2.5, 0)):
        training.count_validation(progress, loss)
        assert (progress.best_loss, progress.validations_since_best) == (best, since)
    for skipped, counts in ((False, (1, 1, 0)), (True, (2, 1, 1)), (True, (3, 1, 2)), (False, (4, 2, 0))):
        count_attempt(progress, StepReport(1.0, 1.0, skipped))
        assert (progress.attempt, progress.step, progress.skipped_in_a_row) == counts
    assert progress.skipped == 2 and StepReport(1.0, 1.0, False).loss_scale == 1.0


def test_a_skip_without_a_scaler_ends_the_run_at_once(problem):
    state, _ = problem([1, 2])
    with pytest.raises(Diverged, match=r"gradient of step 3 is not finite \(loss 0.5\); lower the"):
        check_attempt(state, StepReport(0.5, math.inf, True))
    check_attempt(state, StepReport(0.5, math.inf, False))


def test_a_state_goes_back_whole_into_another_model(tiny_base, problem):
    state, _ = problem([1, 2], scaler_of(2.0**8))
    state.averages = [p.detach() + 1 for p in state.parameters]
    saved = state.state_dict()
    assert saved.keys() == {"progress", "lora", "adapter", "optimizer", "scaler", "averages"}
    transformer, adapter, _ = small_problem(tiny_base)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 1.0, 1.0, 0.5)
    other = TrainingState(transformer, adapter, optimizer, scaler_of(2.0), Progress())
    assert other.averages == ()
    other.averages = [torch.zeros_like(p) for p in other.parameters]
    other.load_state_dict(saved, "a state")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, state.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other.averages, state.averages, strict=True))
    assert other.progress == state.progress == Progress(2, 2)
    assert other.scaler.get_scale() == 2.0**8
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    moments = state.optimizer.state_dict()["state"]
    for index, its in optimizer.state_dict()["state"].items():
        assert all(torch.equal(its[key], moments[index][key]) for key in its)
    other.averages = other.averages[:-1]
    with pytest.raises(ValueError):
        other.load_state_dict(saved, "a state")


# ------------------------------------------------------------------ precisions side by side

@pytest.fixture
def benchmark():
    """benchmarks/precision.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "precision_benchmark", ROOT / "benchmarks" / "precision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_losses_stay_in_their_band_of_float32s_over_200_steps(
        precision, benchmark, arguments, tmp_path):
    curves = {}
    for name in ("no", precision):
        run = tmp_path / name
        assert train.main([*arguments, "--max-train-steps", "200", "--save-every", "0", "--out",
                           str(run), "--mixed-precision", name]) == 0
        curves[name] = [line["loss"] for line in metrics(run) if "loss" in line
                        and not line["skipped"]]
    assert len(curves["no"]) == 200 and curves["no"] != curves[precision]
    assert max(benchmark.relative_distances(curves[precision], curves["no"])) <= benchmark.BAND


def test_the_band_is_of_block_means(benchmark):
    apart = benchmark.relative_distances([1.0] * 10 + [2.0, 4.0] * 5, [1.0] * 10 + [3.0] * 9 + [4.0])
    assert apart == [0, pytest.approx(1 / 31)]
