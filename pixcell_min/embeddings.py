"""What enters PixCell's blocks: patches with their positions, the timestep, the condition tokens.

Parameter names are those of the released checkpoint. `config` is a TransformerConfig throughout.
Sources: Chen et al. 2023, 2024 (PixArt); Yellapragada et al. 2025 (PixCell).
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

TIMESTEP_CHANNELS = 256  # width of the sinusoid that enters the timestep MLP
MAX_PERIOD = 10000.0


@lru_cache(maxsize=8)
def sincos_grid(height, width, channels, base_size, interpolation_scale, phase=0.0, device="cpu",
                dtype=torch.float64):
    """2-D sine-cosine position code (height·width, channels), row by row; kept for the next call.

    Computed in float64 on the CPU, so alike for every `device` and `dtype`.
    """
    def axis(count):  # positions in units of the training grid, (count, channels / 2)
        # The device is named, or under `torch.device("meta")` the cached table holds no numbers.
        steps = torch.arange(max(count, channels // 4), dtype=torch.float64, device="cpu")
        positions = steps[:count] / (count / base_size) / interpolation_scale + phase
        frequencies = MAX_PERIOD ** -(steps[:channels // 4] / (channels / 4))
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    # The column's code comes first (w before h), then the row's; each is sines, then cosines.
    columns = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    code = torch.cat([columns, rows], dim=2).reshape(height * width, channels)
    return code.to(device, dtype)


def timestep_sinusoid(timesteps):
    """(B,) timesteps, whole or not → (B, 256) float32: cosines, then sines, no frequency shift."""
    half = TIMESTEP_CHANNELS // 2
    frequencies = torch.exp(
        -math.log(MAX_PERIOD) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def normal_start(rows, width):
    """(rows, width), normal with standard deviation 1/√width, within ±2: how a table starts."""
    # randn and division would, on the meta device, import torch's compiler: 1 s and 150 MB.
    return nn.init.trunc_normal_(torch.empty(rows, width), std=width**-0.5)


class PatchEmbed(nn.Module):
    """p×p latent patches → tokens, plus the position code of the actual grid (not saved)."""

    def __init__(self, config, width):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, width, kernel_size=p, stride=p)
        self.base_size = config.sample_size // p
        scale = config.interpolation_scale
        self.interpolation_scale = max(config.sample_size // 64, 1) if scale is None else scale

    def forward(self, latents):
        patches = self.proj(latents)                                         # (B, D, H/p, W/p)
        height, width = patches.shape[2:]
        # At least float32: half-precision patches must not set the residual stream's precision.
        dtype = torch.promote_types(torch.float32, patches.dtype)
        code = sincos_grid(height, width, patches.shape[1], self.base_size,
                           self.interpolation_scale, 0.0, patches.device, dtype)  # (N, D)
        return rearrange(patches, "b d h w -> b (h w) d") + code


class TimestepModulation(nn.Module):
    """Timestep → (τ (B, D), modulation (B, 6, D)); nesting mirrors the released names."""

    def __init__(self, width):
        super().__init__()
        embedder = {"linear_1": nn.Linear(TIMESTEP_CHANNELS, width),
                    "linear_2": nn.Linear(width, width)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedder)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timesteps):
        mlp = self.emb["timestep_embedder"]
        sinusoid = timestep_sinusoid(timesteps).to(self.linear.weight.dtype)  # (B, 256)
        embedded = mlp["linear_2"](F.silu(mlp["linear_1"](sinusoid)))        # (B, D)
        return embedded, rearrange(self.linear(F.silu(embedded)), "b (m d) -> b m d", m=6)


class CaptionProjection(nn.Module):
    """Condition tokens E → D by a two-layer MLP; holds the null embedding of guidance."""

    def __init__(self, config, width):
        super().__init__()
        # A buffer; the released class's is a Parameter, which requires_grad_(False) misses.
        self.register_buffer(
            "uncond_embedding", normal_start(config.caption_num_tokens, config.caption_channels))
        self.linear_1, self.linear_2 = (
            nn.Linear(config.caption_channels, width), nn.Linear(width, width))

    def forward(self, tokens):
        return self.linear_2(F.gelu(self.linear_1(tokens), approximate="tanh"))


class TokenPositions(nn.Module):
    """Saved position code of S > 1 condition tokens, a √S×√S grid in the pixel frame."""

    def __init__(self, config):
        super().__init__()
        side, base_size = (
            math.isqrt(config.caption_num_tokens), config.sample_size // config.patch_size)
        code = sincos_grid(side, side, config.caption_channels, base_size, 2.0,
                           base_size // config.caption_num_tokens)
        self.register_buffer("y_pos_embed", code.to(torch.get_default_dtype())[None])  # (1, S, E)
