"""One optimizer step: diffusion loss, autocast, GradScaler, accumulation, clipping; validation.

Takes models, schedule and drawn batches as arguments. A step that float16 overflow voids is an
attempt: it uses up its data, but is no step for rates, averages or counts.
    t ~ U{0…T−1},  ε ~ N(0, I),  x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε
    loss = mean (ε_θ(x_t, t, c) − ε)²                              Ho et al. 2020, eq. 14
    c = adapter(embedding), or with probability p the null embedding, which bypasses the adapter
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from pixcell_min.batches import Batch, generator_for
from pixcell_min.checkpoint import load_strict
from pixcell_min.distributed import Processes
from pixcell_min.lora import load_lora_state_dict, lora_state_dict
from pixcell_min.precision import autocast
from pixcell_min.variational import variational_bound

DEBIASED_MAX = 10.0  # largest weight of an epsilon: that of SNR 0.01 (t = 674)
VALIDATION_TIMESTEPS = 8  # per tile, one from each of that many equal ranges of t
MAX_SKIPPED_STEPS = 20  # in a row; float16 overflows now and then, not always


def condition_tokens(adapter, embeddings, dropped, uncond_embedding):
    """Embeddings (B, S, E) → tokens (B, S, E): adapted, or null embedding where `dropped` (B,)."""
    return torch.where(dropped[:, None, None], uncond_embedding, adapter(embeddings))


def timestep_weights(schedule, timesteps, weighting: str, min_snr_gamma=5.0):
    """Weight of each sample's error, (B,) float32; said as how often x0's error counts:

    "uniform": as often as plain errors say (an error of epsilon is SNR times that of x0, one of v
    SNR + 1 times); "min_snr": min(SNR, gamma), so that nearly clean inputs count less (Hang et al.
    2023, section 3.4); "debiased": √SNR, so that very noisy inputs, which decide colour and layout,
    count more too (Yu et al. 2023, "Debias the training of diffusion models").
    Raises: ValueError for another name.
    """
    snr = schedule.snr(timesteps)
    plain = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[
        schedule.prediction_type]
    # Differs from Yu et al.: 1/√SNR reaches 157 at t = 999, and few samples would be all of a step.
    of_x0 = {"uniform": plain, "min_snr": snr.clamp(max=min_snr_gamma),
             "debiased": torch.minimum(snr.sqrt(), DEBIASED_MAX * snr)}
    if weighting not in of_x0:
        raise ValueError(f"weighting must be one of {', '.join(of_x0)}, got {weighting!r}")
    return of_x0[weighting] / plain


def diffusion_loss(transformer, adapter, schedule, batch: Batch, dtype=None, weighting="uniform",
                   min_snr_gamma=5.0, vlb_weight=0.0):
    """Squared error of the predicted target per sample, (B,) float32, by `timestep_weights`.

    Only the forward runs in autocast `dtype`. The network's further output channels (learned
    variance) take no part, as in the authors' LoRA training, unless `variational_bound` is added
    with a vlb_weight.
    """
    device = batch.latents.device
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    # The adapter stays outside: it is trained in the precision in which it will sample.
    tokens = condition_tokens(
        adapter, batch.embeddings, batch.dropped, transformer.uncond_embedding)
    with autocast(device, dtype):
        output = transformer(latents=noisy, timesteps=batch.timesteps, encoder_hidden_states=tokens)
    predicted = output[:, :noisy.shape[1]].float()
    error = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    loss = error * timestep_weights(schedule, batch.timesteps, weighting, min_snr_gamma)
    if vlb_weight:
        loss = loss + vlb_weight * variational_bound(
            schedule, output, batch.latents, noisy, batch.timesteps)
    return loss


def build_optimizer(lora_parameters, adapter_parameters, learning_rate, adapter_learning_rate,
                    weight_decay):
    """AdamW with two parameter groups, LoRA and adapter; each one's peak rate in `initial_lr`."""
    groups = [{"params": list(lora_parameters), "lr": learning_rate, "initial_lr": learning_rate},
              {"params": list(adapter_parameters), "lr": adapter_learning_rate,
               "initial_lr": adapter_learning_rate}]
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def rate_factor(step: int, warmup_steps: int, max_train_steps: int, lr_schedule: str) -> float:
    """Factor on both peak rates at `step` >= 0: linear rise, then 1 or half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if lr_schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(max_train_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is to be done after step `step`."""
    return every > 0 and step % every == 0


def build_scaler(device, dtype) -> torch.amp.GradScaler:
    """A loss scaler, active in float16 alone: gradients underflow below 6e-8, not in bfloat16."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    loss: float  # mean over all samples of the step
    grad_norm: float  # L2, before clipping; not finite in a skipped step
    skipped: bool  # the gradients' norm was not finite: no weight changed
    loss_scale: float = 1.0  # by which the next step's loss is multiplied, in float16


@dataclass
class Progress:
    """How far a run is; saved with its weights."""

    step: int = 0  # optimizer steps made; rates and averages follow it
    attempt: int = 0  # optimizer steps tried, the skipped ones too; the data's position follows it
    skipped_in_a_row: int = 0
    best_loss: float = math.inf  # lowest validation loss so far
    validations_since_best: int = 0

    @property
    def skipped(self) -> int:
        """Optimizer steps skipped since the run began."""
        return self.attempt - self.step


def optimizer_step(loss_of, batches, num_samples, optimizer, scaler, max_grad_norm: float,
                   processes=Processes()) -> StepReport:
    """One optimizer step from micro-batches: gradients of the mean over all `num_samples` samples.

    loss_of: Batch → per-sample losses (B,); batches, perhaps of different sizes, are drawn one by
    one. Gradients are unscaled before they are clipped. A gradient that is not finite changes no
    weight: the step is skipped. Of several processes each has its own batches, of num_samples / W
    samples, and `loss_of` from `Processes.parallel`; all report the same.
    """
    total, seen, own = 0.0, 0, num_samples / processes.size
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        seen += len(batch.timesteps)
        with processes.apart(loss_of) if seen < own else nullcontext():
            loss = loss_of(batch).sum() / own
            scaler.scale(loss).backward()
        total += loss.item()
    total = processes.mean(total)
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    skipped = not math.isfinite(norm)
    if not skipped:  # one judge: clipping by an infinite norm would make finite gradients zero
        scaler.step(optimizer)
    scaler.update()
    return StepReport(total, norm, skipped, scaler.get_scale())


@dataclass
class TrainingState:
    """All that a step changes: what a resumed run needs, what is saved."""

    transformer: torch.nn.Module  # with LoRA
    adapter: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    averages: list[torch.Tensor] | tuple = ()  # of the parameters, in their order; empty: none

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained ones, in the optimizer's order: LoRA's, then the adapter's."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict:
        """Nested dicts of tensors and numbers; `load_state_dict` of it goes on bit for bit."""
        return {"progress": asdict(self.progress), "lora": lora_state_dict(self.transformer),
                "adapter": self.adapter.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "averages": [average.cpu() for average in self.averages]}

    def load_state_dict(self, state: dict, source) -> None:
        """Put back what `state_dict` gave. Raises: ValueError if it fits another model."""
        try:
            load_lora_state_dict(self.transformer, state["lora"], source)
            load_strict(self.adapter, state["adapter"], source)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            for average, saved in zip(self.averages, state["averages"], strict=True):
                average.copy_(saved)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            told = str(error) if str(source) in str(error) else f"{source}: {error!r}"
            raise ValueError(f"{told}; is it of another version of this code?") from None


def count_validation(progress: Progress, loss: float) -> None:
    """Note whether a validation loss is the lowest so far."""
    progress.validations_since_best += 1
    if loss < progress.best_loss:
        progress.best_loss, progress.validations_since_best = loss, 0


class Diverged(ValueError):
    """A run that no resume can help, only other settings or tiles; says which."""


def count_attempt(progress: Progress, report: StepReport) -> None:
    """Count a step, or a skipped one."""
    progress.attempt += 1
    progress.step += not report.skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if report.skipped else 0


def check_attempt(state: TrainingState, report: StepReport) -> None:
    """Raises: Diverged where the run cannot go on after the step just counted, with the cause.

    The causes: a gradient that is not finite without a scaler (float32, bf16), MAX_SKIPPED_STEPS
    skips in a row with one, or a parameter that is no longer finite.
    """
    progress = state.progress
    if report.skipped and not state.scaler.is_enabled():
        raise Diverged(f"the gradient of step {progress.step + 1} is not finite (loss "
                       f"{report.loss:g}); lower the learning rates or check the tiles")
    if progress.skipped_in_a_row >= MAX_SKIPPED_STEPS:
        where = "gradients" if math.isfinite(report.loss) else "the forward"
        raise Diverged(
            f"float16 overflowed in {progress.skipped_in_a_row} steps in a row ({where}; loss "
            f"{report.loss:g}, loss scale {report.loss_scale:g}); use --mixed-precision bf16 "
            "or no, or lower the learning rates")
    if not torch.stack([p.isfinite().all() for p in state.parameters]).all():
        raise Diverged(f"LoRA or adapter weights are NaN or infinite after step {progress.step} "
                       f"(gradient norm {report.grad_norm:g}); lower the learning rates")


@torch.no_grad()
def validation_loss(transformer, adapter, schedule, features, rows, batch_size: int, seed: int,
                    dtype=None) -> tuple[float, list[float]]:
    """(mean loss, mean of each band) over held-out feature rows (N,), at fixed noise and timesteps.

    Each row is seen at VALIDATION_TIMESTEPS timesteps, one per band, that is per equal range of
    [0, T), in order; no dropout. Noise and timesteps depend on the seed alone.
    """
    training = transformer.training, adapter.training
    transformer.eval(), adapter.eval()
    device = transformer.proj_out.weight.device
    ranges = torch.arange(VALIDATION_TIMESTEPS).repeat(len(rows))
    rows = rows.repeat_interleave(VALIDATION_TIMESTEPS)
    generator = generator_for(seed, "validation")
    width = schedule.num_train_timesteps / VALIDATION_TIMESTEPS
    timesteps = ((ranges + torch.rand(len(rows), generator=generator)) * width).long()
    timesteps.clamp_(max=schedule.num_train_timesteps - 1)  # 7 + 0.99999999 rounds to 8
    total, bands = 0.0, torch.zeros(VALIDATION_TIMESTEPS, dtype=torch.float64)
    for part in torch.arange(len(rows)).split(batch_size):
        chosen = rows[part]
        noise = torch.randn(len(part), *features.mean.shape[1:], generator=generator)
        batch = Batch(features.mean[chosen], features.embeddings[chosen], noise,
                      timesteps[part], torch.zeros(len(part), dtype=torch.bool)).to(device)
        losses = diffusion_loss(transformer, adapter, schedule, batch, dtype)
        total += losses.sum().item()
        bands.index_add_(0, ranges[part], losses.double().cpu())
    transformer.train(training[0]), adapter.train(training[1])
    return total / len(rows), (bands * VALIDATION_TIMESTEPS / len(rows)).tolist()
