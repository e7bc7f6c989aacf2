"""Noise schedule and four samplers: DDPM, DDIM, Euler-ancestral, DPM-Solver++ 2M.

Noisy latents are x = alpha·x0 + sigma·ε: alpha = √ᾱ, sigma = √(1−ᾱ) in VP coordinates, alpha = 1,
sigma = √((1−ᾱ)/ᾱ) in VE (Euler-ancestral). A sampler is a table, and one formula applies any row:
    x0, ε = what the network's output means at x;    D = x0 + extrapolation·(x0 − previous x0)
    x ← x_weight·x + x0_weight·D + epsilon_weight·ε + noise_std·z,    z ~ N(0, I)
All is float32, and no object remembers a call. Not here: guidance, the loop over rows, decoding.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# What is done here, in the words of diffusers' scheduler_config.json: another value is refused.
_OFF = """thresholding rescale_betas_zero_snr use_karras_sigmas use_exponential_sigmas
    use_beta_sigmas use_lu_lambdas use_flow_sigmas use_dynamic_shifting euler_at_final"""
MAX_TIMESTEPS = 10**6  # far above any released schedule's
_FIXED = dict.fromkeys(_OFF.split(), False) | dict(
    algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2,
    final_sigmas_type="zero", lambda_min_clipped=-math.inf)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels of training: `betas` and `alphas_cumprod` (T,) float32 on the CPU.

    Raises: ValueError for an unknown prediction_type, or betas outside (0, 1) or ending at ᾱ = 0.
    """

    betas: Tensor
    prediction_type: str = "epsilon"
    alphas_cumprod: Tensor = field(init=False)

    def __post_init__(self):
        _choice("prediction_type", self.prediction_type, ("epsilon", "v_prediction", "sample"))
        betas = self.betas.to("cpu", torch.float32)
        # Multiplied in float32, as when the weights were trained: float64 differs by 3.6e-7.
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if not len(betas) or not ((betas > 0) & (alphas_cumprod > 0)).all():
            raise ValueError("noise schedule: expected betas in (0, 1) that leave some signal; "
                             "zero terminal SNR needs v-prediction and is not implemented")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    @classmethod
    def linear(cls, num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02,
               prediction_type="epsilon") -> "NoiseSchedule":
        """PixCell's schedule: betas in equal steps (Ho et al. 2020, section 4)."""
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
        return cls(betas, prediction_type)

    @classmethod
    def from_config(cls, config: dict) -> "NoiseSchedule":
        """Read a diffusers `scheduler_config.json`; absent numbers take diffusers' defaults.

        Not read, being arguments of the samplers below: timestep_spacing, steps_offset,
        set_alpha_to_one, variance_type, clip_sample. Raises: ValueError for what is not done here.
        """
        for key, ours in _FIXED.items():
            if config.get(key) not in (None, ours):
                raise ValueError(f"scheduler config: {key} is {config[key]!r}, expected {ours!r}")
        prediction_type = config.get("prediction_type", "epsilon")
        count, trained = config.get("num_train_timesteps", 1000), config.get("trained_betas")
        if trained is not None:
            if not isinstance(trained, list) or (
                    [type(b) for b in trained] != [float] * len(trained)):
                raise ValueError("scheduler config: trained_betas, expected a list of fractions")
            if len(trained) != count:
                raise ValueError(f"scheduler config: trained_betas, expected a list of {count}")
            return cls(torch.tensor(trained), prediction_type)
        # No default: a flow-matching config has no beta_schedule, and is not linear for that.
        kind = _choice("beta_schedule", config.get("beta_schedule"), ("linear", "scaled_linear"))
        ends = [config.get("beta_start", 1e-4), config.get("beta_end", 0.02)]
        fractions = all(type(beta) is float and beta > 0 for beta in ends)
        if type(count) is not int or not 1 <= count <= MAX_TIMESTEPS or not fractions:
            raise ValueError("scheduler config: num_train_timesteps, beta_start, beta_end are "
                             f"{[count, *ends]}, expected 1 to {MAX_TIMESTEPS} and two fractions")
        if kind == "linear":
            return cls.linear(count, *ends, prediction_type)
        # Stable Diffusion's: square roots of beta in equal steps.
        roots = cls.linear(count, ends[0] ** 0.5, ends[1] ** 0.5).betas
        return cls(roots**2, prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels."""
        return len(self.betas)

    @property
    def sigmas(self) -> Tensor:
        """The VE noise levels √((1−ᾱ)/ᾱ), (T,) float32, increasing."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """VP latents x_t (Ho et al. eq. 4) from (B, ...), (B, ...), integers (B,) → float32."""
        # Differs from diffusers: float32 whatever comes in, as ᾱ rounds to 1 in fp16 for t = 0, 1
        # (no noise); and t is t, where a fresh DPMSolverMultistepScheduler takes T − 1 − t.
        alpha, sigma = self._levels(latents, timesteps)
        return alpha * latents.float() + sigma * noise.float()

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = √ᾱ·ε − √(1−ᾱ)·x0 (Salimans & Ho 2022, section 4), shapes as in add_noise."""
        alpha, sigma = self._levels(latents, timesteps)
        return alpha * noise.float() - sigma * latents.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network learns to say: ε, v or x0 by prediction_type; shapes as add_noise."""
        if self.prediction_type == "v_prediction":
            return self.velocity(latents, noise, timesteps)
        return noise.float() if self.prediction_type == "epsilon" else latents.float()

    def predict_x0(self, model_output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The x0 that model_output means at VP latents (eq. 15), shapes as in add_noise."""
        levels = self._levels(latents, timesteps)
        return self._read(model_output.float(), latents.float(), *levels)[0]

    def predict_epsilon(self, model_output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The ε that model_output means at VP latents, shapes as in add_noise."""
        levels = self._levels(latents, timesteps)
        return self._read(model_output.float(), latents.float(), *levels)[1]

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ/(1−ᾱ) at integer timesteps (B,) in [0, T) → (B,) float32."""
        alpha, sigma = self._levels(timesteps, timesteps)
        return (alpha / sigma) ** 2

    def _read(self, output: Tensor, x: Tensor, alpha, sigma, scale=1.0) -> tuple[Tensor, Tensor]:
        """x0 and ε at x = alpha·x0 + sigma·ε; v belongs to x / scale, which the network saw."""
        if self.prediction_type == "epsilon":
            return (x - sigma * output) / alpha, output
        if self.prediction_type == "sample":
            return output, (x - alpha * output) / sigma
        x0 = alpha / scale**2 * x - sigma / scale * output
        return x0, alpha * output + sigma * x  # of scale 1: `step` takes VE's from x0

    def _levels(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1−ᾱ) of timesteps (B,), each (B, 1, ...) to multiply `like` (B, ...)."""
        if timesteps.shape != like.shape[:1]:
            got, expected = tuple(timesteps.shape), tuple(like.shape[:1])
            raise ValueError(f"noise schedule: timesteps are {got}, expected {expected} (batch)")
        # index_select refuses −1, which plain indexing would wrap, and fractions.
        bars = self.alphas_cumprod.to(like.device).index_select(0, timesteps.to(like.device))
        bars = bars.reshape(-1, *[1] * (like.ndim - 1))
        return bars**0.5, (1 - bars) ** 0.5


@dataclass(frozen=True)
class Step:
    """One row of a sampler's table: the numbers of the formula above, each a float32 value."""

    timestep: int | float  # what the network is given, in [0, T); fractional for Euler-ancestral
    is_last: bool
    alpha: float  # x = alpha·x0 + sigma·ε before the step
    sigma: float
    scale: float = 1.0  # √(alpha² + sigma²): the network is given x / scale
    x_weight: float = 0.0
    x0_weight: float = 0.0
    extrapolation: float = 0.0
    epsilon_weight: float = 0.0
    noise_std: float = 0.0
    max_noise_std: float = 0.0  # the other end of a learned range; 0 where there is none
    draws: bool = False  # z is drawn, even where noise_std is 0


class StepResult(NamedTuple):
    """The latents after a row and the x0 that the network meant, both (B, C, H, W) float32."""

    latents: Tensor
    x0: Tensor


@dataclass(frozen=True)
class _Sampler:
    """All but the table; Raises: ValueError for an unknown spacing or an offset out of place."""

    schedule: NoiseSchedule
    timestep_spacing: str = "leading"
    steps_offset: int = 0  # added to every timestep of leading spacing
    # Differs from diffusers: x0 is clamped to [−1, 1] on request only, as latents reach beyond.
    clip_sample: bool = False

    def __post_init__(self):
        _choice("timestep_spacing", self.timestep_spacing, ("linspace", "leading", "trailing"))
        if self.steps_offset < 0 or (self.steps_offset and self.timestep_spacing != "leading"):
            raise ValueError(f"scheduler: steps_offset is {self.steps_offset} with spacing "
                             f"{self.timestep_spacing}, expected 0 (or more, with leading)")

    def init_noise_sigma(self, num_inference_steps: int) -> float:
        """The standard deviation of the first latents: 1 in VP coordinates."""
        return 1.0

    def scale_model_input(self, latents: Tensor, step: Step) -> Tensor:
        """What the network is given for latents (B, C, H, W): themselves in VP coordinates."""
        return latents / step.scale

    def step(self, model_output, latents, step, generator=None, previous_x0=None) -> StepResult:
        """Apply a row to latents (B, C, H, W); model_output has C channels, or 2C with a variance,
        which acts with learned_range alone; any float dtype.

        generator: where the row draws, a torch.Generator, or a list of one per image, which makes
        an image the same in any batch. previous_x0: x0 of the row before, for DPM-Solver++ 2M.
        Raises: ValueError for other shapes, or if one of these two is needed and missing.
        """
        output, variance = split_learned_variance(model_output.float(), latents.shape[1])
        if output.shape != latents.shape:
            got, expected = tuple(output.shape), tuple(latents.shape)
            raise ValueError(f"scheduler: model_output is {got}, expected {expected} as latents")
        x = latents.float()
        x0, epsilon = self.schedule._read(output, x, step.alpha, step.sigma, step.scale)
        if self.clip_sample:
            x0 = x0.clamp(-1.0, 1.0)
        if step.scale != 1.0:  # in VE coordinates ε is the derivative of Karras et al.
            epsilon = (x - x0) / step.sigma
        x = step.x_weight * x + step.x0_weight * x0 + step.epsilon_weight * epsilon
        if step.extrapolation:
            if previous_x0 is None:
                raise ValueError("scheduler: previous_x0 is None, expected x0 of the row before")
            x = x + step.x0_weight * (step.extrapolation * (x0 - previous_x0))
        if step.draws:
            x = x + _noise_std(step, variance) * _draw(x, generator)
        return StepResult(x, x0)

    def _timesteps(self, count: int, spare: int = 0) -> list[float]:
        """`count` timesteps, descending: to 0 but for the `spare` lowest; trailing: from T − 1."""
        total, offset = self.schedule.num_train_timesteps, self.steps_offset
        if not isinstance(count, int) or not 1 <= count <= total:
            raise ValueError(f"scheduler: num_inference_steps is {count!r}, expected 1 to {total}")
        if self.timestep_spacing == "trailing":
            # Differs from diffusers: always `count`; np.arange's rounding adds a t = −1 for 62 of
            # 1000 counts. The width is np.arange's still, because halves must round alike.
            width = total - (total - total / count)
            return [round(total - i * width) - 1 for i in range(count)]
        rungs = count + spare
        if self.timestep_spacing == "linspace":
            width = (total - 1) / max(rungs - 1, 1)
        else:
            width = total // rungs
            if not width or (rungs - 1) * width + offset >= total:
                raise ValueError(f"scheduler: {count} leading steps + offset {offset} do not fit "
                                 f"{total} timesteps, expected fewer or another spacing")
        return [i * width + offset for i in reversed(range(rungs))][:count]


@dataclass(frozen=True)
class DDPM(_Sampler):
    """Ancestral sampling (Ho et al. 2020, eq. 6 and 7), VP; draws wherever t > 0.

    variance_type: fixed_small is β̃, fixed_large is β; with learned_range the network's variance
    moves the log variance from β̃ at −1 to β at 1 (Nichol & Dhariwal 2021, eq. 15).
    Raises: ValueError for any other, diffusers' fixed_large_log and learned (NaN) among them.
    """

    variance_type: str = "fixed_small"

    def __post_init__(self):
        super().__post_init__()
        known = ("fixed_small", "fixed_large", "learned_range")
        _choice("variance_type", self.variance_type, known)

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The table, a row per step; Raises: ValueError unless 1 <= num_inference_steps <= T."""
        timesteps = [round(t) for t in self._timesteps(num_inference_steps)]
        now = self.schedule.alphas_cumprod[timesteps]  # ᾱ before and after each step
        after = torch.cat([now[1:], torch.ones(1)])
        beta = 1 - now / after
        variance = (1 - after) / (1 - now) * beta
        if self.variance_type == "fixed_large":
            variance = beta
        # Differs from diffusers: no noise at the last step (Ho et al. alg. 2), even where t > 0.
        inner = torch.arange(len(now)) < len(now) - 1
        return _rows(
            timesteps, alpha=now**0.5, sigma=(1 - now) ** 0.5,
            x_weight=(now / after) ** 0.5 * (1 - after) / (1 - now),
            x0_weight=after**0.5 * beta / (1 - now),
            noise_std=inner * variance**0.5,
            max_noise_std=inner * beta**0.5 * (self.variance_type == "learned_range"),
            draws=torch.tensor(timesteps) > 0)


@dataclass(frozen=True)
class DDIM(_Sampler):
    """Song et al. 2020, eq. 12 and 16, VP; eta 0 is deterministic, eta 1 has DDPM's variance.

    set_alpha_to_one: the last step ends at ᾱ = 1, exactly x0; if not, at the level of t = 0.
    Draws at every step if eta > 0. Raises: ValueError for eta outside [0, 1].
    """

    eta: float = 0.0
    set_alpha_to_one: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"scheduler: eta is {self.eta}, expected 0 to 1")

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The table, a row per step; Raises: ValueError unless 1 <= num_inference_steps <= T."""
        timesteps = [round(t) for t in self._timesteps(num_inference_steps)]
        now = self.schedule.alphas_cumprod[timesteps]
        final = torch.ones(1) if self.set_alpha_to_one else self.schedule.alphas_cumprod[:1]
        # Differs from diffusers: a step ends at the table's next timestep; there at t − T // N,
        # which is the same with leading spacing but not with linspace, nor always with trailing.
        after = torch.cat([now[1:], final])
        std = self.eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        return _rows(
            timesteps, alpha=now**0.5, sigma=(1 - now) ** 0.5, x0_weight=after**0.5,
            epsilon_weight=(1 - after - std**2) ** 0.5, noise_std=std, draws=self.eta > 0)


@dataclass(frozen=True)
class EulerAncestral(_Sampler):
    """Euler steps to σ_down, then fresh noise σ_up: σ_down² + σ_up² = σ_to²; VE; always draws.

    The derivative (x − x0)/σ is Karras et al. 2022, alg. 1; the ancestral split is k-diffusion's.
    """

    timestep_spacing: str = "linspace"

    def init_noise_sigma(self, num_inference_steps: int) -> float:
        """The first σ; √(σ² + 1) with leading spacing."""
        first = self.steps(num_inference_steps)[0]
        return first.scale if self.timestep_spacing == "leading" else first.sigma

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The table, a row per step; Raises: ValueError unless 1 <= num_inference_steps <= T."""
        timesteps = torch.tensor(self._timesteps(num_inference_steps), dtype=torch.float32)
        levels, below = self.schedule.sigmas.double(), timesteps.long()
        rise = levels.diff(append=levels[-1:])[below]  # linear between two levels
        sigma = (levels[below] + rise * (timesteps.double() - below)).float()
        to = torch.cat([sigma[1:], torch.zeros(1)])
        up = (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5
        down = (to**2 - up**2) ** 0.5
        return _rows(
            timesteps.tolist(), alpha=1.0, sigma=sigma, scale=(sigma**2 + 1) ** 0.5,
            x_weight=1.0, epsilon_weight=down - sigma, noise_std=up, draws=True)


@dataclass(frozen=True)
class DPMSolverPP2M(_Sampler):
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, alg. 2), VP: the released pipeline's; no draws.

    λ = log(alpha/sigma), h = λ_to − λ, r = h_before/h, extrapolation = 1/(2r). The first step and
    the last, which ends at x0 exactly, are of first order (whatever lower_order_final says).
    """

    timestep_spacing: str = "linspace"

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The table, a row per step; Raises: ValueError unless 1 <= num_inference_steps <= T."""
        timesteps = [round(t) for t in self._timesteps(num_inference_steps, spare=1)]
        ratio = torch.cat([self.schedule.sigmas[timesteps], torch.zeros(1)])  # sigma / alpha
        alpha = 1 / (ratio**2 + 1) ** 0.5
        sigma = ratio * alpha
        lambdas = alpha.log() - sigma.log()  # +∞ at the end
        h = lambdas[1:] - lambdas[:-1]
        extrapolation = torch.zeros_like(h)
        # Differs from diffusers: first order after a step of length h = 0, which linspace has at
        # N = T, where a timestep comes twice; there 0/0 follows.
        extrapolation[1:-1] = torch.where(h[:-2] > 0, 0.5 / (h[:-2] / h[1:-1]), 0.0)
        return _rows(
            timesteps, alpha=alpha[:-1], sigma=sigma[:-1], x_weight=sigma[1:] / sigma[:-1],
            x0_weight=-alpha[1:] * (torch.exp(-h) - 1.0), extrapolation=extrapolation)


_SAMPLERS = dict(ddim=DDIM, euler_ancestral=EulerAncestral, ddpm=DDPM, dpmpp_2m=DPMSolverPP2M)
SCHEDULER_NAMES = tuple(_SAMPLERS)


def build_scheduler(name: str, noise: NoiseSchedule, spacing: str | None = None, eta: float = 0.0):
    """The sampler of that name; spacing None: leading for ddim and ddpm, linspace for the others.

    One step of leading or linspace is t = 0, but for dpmpp_2m: take trailing. Raises: ValueError
    for an unknown name or spacing, or an eta for a sampler that has none.
    """
    sampler = _SAMPLERS[_choice("scheduler", name, SCHEDULER_NAMES)]
    if eta and name != "ddim":
        raise ValueError(f"scheduler: eta is {eta} with {name}, expected 0 (only ddim has it)")
    options = {"eta": eta} if name == "ddim" else {}
    return sampler(noise, sampler.timestep_spacing if spacing is None else spacing, **options)


def split_learned_variance(model_output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(B, C or 2C, H, W) → prediction (B, C, H, W), and learned variance (B, C, H, W) or None.

    Raises: ValueError unless there are C = `channels` channels, or 2C as in PixCell (16 + 16).
    """
    got = model_output.shape[1]
    if got not in (channels, 2 * channels):
        expected = f"{channels} or {2 * channels}"
        raise ValueError(f"scheduler: model_output has {got} channels, expected {expected}")
    return model_output[:, :channels], model_output[:, channels:] if got > channels else None


def _noise_std(step: Step, variance: Tensor | None) -> float | Tensor:
    if not step.max_noise_std:
        return step.noise_std
    if variance is None:
        raise ValueError("scheduler: learned_range expected 2C channels of model_output, got C")
    fraction = (variance + 1) / 2
    return step.noise_std ** (1 - fraction) * step.max_noise_std**fraction


def _draw(like: Tensor, generator) -> Tensor:
    """N(0, I) in the shape of `like`, float32, drawn on the generator's own device."""
    if generator is None:
        raise ValueError("scheduler: generator is None, expected one, or a list of one per image")
    if isinstance(generator, list):
        if len(generator) != len(like):
            raise ValueError(f"scheduler: {len(generator)} generators for {len(like)} images, "
                             "expected one each")
        return torch.cat([_draw(image, one) for image, one in zip(like.split(1), generator)])
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def _rows(timesteps: list, **columns) -> list[Step]:
    """A Step per timestep, from columns (N,) or a value for all rows."""
    count = len(timesteps)
    values = [c.tolist() if isinstance(c, Tensor) else [c] * count for c in columns.values()]
    rows = [dict(zip(columns, row)) for row in zip(*values)]
    return [Step(t, i == count - 1, **row) for i, (t, row) in enumerate(zip(timesteps, rows))]


def _choice(name: str, value: str, choices: tuple) -> str:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    return value
