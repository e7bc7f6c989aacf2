"""The SD 3.5 AutoencoderKL: pixels (B, 3, 8h, 8w) in [−1, 1] ↔ latents (B, C, h, w).

Latents have about unit variance. Tensor names are diffusers'; there are no quant convolutions.
Shift and scale live inside `encode` and `decode`, so nobody else can forget them:
    latents = (z − shift)·scale,  z = latents / scale + shift
Sources: Rombach et al. 2022 (the architecture), Esser et al. 2024 (16 channels). Must match
diffusers.AutoencoderKL.
"""

import math
import reprlib
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from pixcell_min.checkpoint import read_json
from pixcell_min.loading import build_on_meta, load_weights

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # of the unscaled posterior
# Far above any released network's; a broken configuration would be built for hours.
MAX_SIZE, MAX_STAGES, MAX_LAYERS = 2**16, 8, 16
FIXED = {"_class_name": "AutoencoderKL", "act_fn": "silu", "use_quant_conv": False,
         "use_post_quant_conv": False, "mid_block_add_attention": True}


@dataclass(frozen=True)
class VAEConfig:
    """The fields of `vae/config.json` that shape the network; defaults: Stable Diffusion 3.5's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    @classmethod
    def from_dict(cls, config: dict, source="config"):
        """Pick the known fields. Raises: ValueError naming a missing, wrong or unsupported one."""
        for key, value in FIXED.items():
            # Absent quant-convolution switches mean True in diffusers; that is another network.
            if config.get(key, True if key.startswith("use_") else value) != value:
                raise ValueError(f"{source}: {key} is {config.get(key, True)!r}, "
                                 f"only {value!r} is supported")
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in config]:
            raise ValueError(
                f"{source}: not an SD 3.5 VAE configuration, {missing[0]!r} is missing")
        values = {name: config[name] for name in names}
        for name, value in values.items():
            numbers = value if name == "block_out_channels" else [value]
            kind = (int, float) if name.endswith("_factor") else int
            if not isinstance(numbers, list) or not numbers or any(
                    isinstance(n, bool) or not isinstance(n, kind)
                    or not abs(n) <= MAX_SIZE or (n <= 0 and name != "shift_factor")
                    for n in numbers):
                raise ValueError(f"{source}: {name} must be a positive number, {MAX_SIZE} at most, "
                                 f"got {reprlib.repr(value)}")
        layers, widths = values["layers_per_block"], values["block_out_channels"]
        if layers > MAX_LAYERS or len(widths) > MAX_STAGES:
            raise ValueError(f"{source}: expected at most {MAX_STAGES} block_out_channels and "
                             f"layers_per_block {MAX_LAYERS}")
        groups = values["norm_num_groups"]
        if any(width % groups for width in widths):
            raise ValueError(f"{source}: block_out_channels {widths} must be multiples of "
                             f"norm_num_groups {groups}")
        return cls(**{**values, "block_out_channels": tuple(widths)})

    @property
    def downscale(self) -> int:
        """Pixels per latent cell and side: 8."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a 1×1 shortcut where the width changes."""

    def __init__(self, width_in, width_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.conv_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                                # (B, out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                                # (B, out, H, W)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class SpatialAttention(nn.Module):
    """One-head self-attention over all positions of the lowest resolution."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")          # (B, 1, HW, C)
        out = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))  # as h
        return x + rearrange(self.to_out[0](out), "b 1 (h w) c -> b c h w", h=x.shape[2])


class MidBlock(nn.Module):
    """Residual block, self-attention, residual block at the lowest resolution."""

    def __init__(self, width, groups):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Halve by a strided convolution padded below and right, or double (nearest) and convolve."""

    def __init__(self, width, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        return self.conv(
            F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Stage(nn.Module):
    """Residual blocks at one resolution, then a change of it (in all stages but the last)."""

    def __init__(self, width_in, width_out, layers, groups, down, resample):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width_in if i == 0 else width_out, width_out, groups)
            for i in range(layers))
        self.samplers = "downsamplers" if down else "upsamplers"
        if resample:
            self.add_module(self.samplers, nn.ModuleList([Resample(width_out, down)]))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in getattr(self, self.samplers, ()):
            x = sampler(x)
        return x


class Encoder(nn.Module):
    """Pixels → posterior moments (B, 2C, h, w), unscaled."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = c.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], width, c.layers_per_block, c.norm_num_groups, True,
                  i + 1 < len(widths)) for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], c.norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, pixels):
        h = self.conv_in(pixels)
        for stage in self.down_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Unscaled latents (B, C, h, w) → pixels; one residual block more per stage than Encoder."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = c.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], c.norm_num_groups)
        self.up_blocks = nn.ModuleList(
            Stage(widths[max(i - 1, 0)], width, c.layers_per_block + 1, c.norm_num_groups, False,
                  i + 1 < len(widths)) for i, width in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """Variational autoencoder with a diagonal Gaussian posterior over scaled latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.downscale = config.downscale

    @classmethod
    def from_pretrained(cls, folder, weights=None, dtype=torch.float32,
                        prepare=lambda network: None):
        """Read `config.json` and the weights (beside it, or the file `weights`), strictly.

        `prepare(network)` may still change dtypes and layouts: what is read is converted to them,
        once. Raises: ValueError if a file is missing or does not fit.
        """
        folder = Path(folder)
        path = folder / "config.json"
        config = VAEConfig.from_dict(read_json(path), path)
        model = build_on_meta(lambda: cls(config).to(dtype), path)
        prepare(model)
        load_weights(model, Path(weights) if weights else folder / WEIGHTS_NAME)
        return model.eval()

    def encode(self, pixels):
        """pixels (B, 3, H, W) in [−1, 1] → (mean, logvar) of the *scaled* latents.

        Both are (B, C, H/8, W/8). Raises: ValueError if H or W is no multiple of 8.
        """
        if pixels.ndim != 4 or any(n % self.downscale for n in pixels.shape[2:]):
            raise ValueError(f"pixels must be (B, 3, H, W), multiples of {self.downscale}, "
                             f"got {tuple(pixels.shape)}")
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        scale, shift = self.config.scaling_factor, self.config.shift_factor
        return (mean - shift) * scale, logvar.clamp(*LOGVAR_RANGE) + 2 * math.log(scale)

    def decode(self, latents):
        """Scaled latents (B, C, h, w) → pixels (B, 3, 8h, 8w), about [−1, 1], not clamped.

        Where the decoder's products are held in half of the latents' precision, so are the pixels.
        """
        held = self.decoder.conv_in.weight.dtype
        with (torch.autocast(latents.device.type, held) if held.itemsize < latents.dtype.itemsize
              else nullcontext()):
            return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)

    def decode_tiled(self, latents, tile=64, overlap=16):
        """`decode` of large images in latent tiles of side `tile`, cross-faded over `overlap`.

        Memory follows the tile, not the image. Differs from `decode`: group norms and attention
        see one tile at a time. Raises: ValueError unless 0 <= 2·overlap <= tile.
        """
        if not 0 <= 2 * overlap <= tile:
            raise ValueError(f"overlap must lie in [0, tile/2], got overlap {overlap}, tile {tile}")
        height, width = latents.shape[2:]
        if max(height, width) <= tile:
            return self.decode(latents)
        total, weights = None, None
        for top in tile_starts(height, tile, overlap):
            for left in tile_starts(width, tile, overlap):
                # float32: in half precision the window's own sums and ends would round.
                part = self.decode(latents[..., top:top + tile, left:left + tile]).float()
                fade = [ramp(n, overlap * self.downscale, part) for n in part.shape[2:]]
                window = fade[0][:, None] * fade[1]
                if total is None:
                    total = part.new_zeros(
                        *part.shape[:2], height * self.downscale, width * self.downscale)
                    weights = torch.zeros_like(total[0, 0])
                rows, columns = (slice(at * self.downscale, at * self.downscale + n)
                                 for at, n in zip((top, left), part.shape[2:]))
                total[..., rows, columns] += part * window
                weights[rows, columns] += window
        return total / weights


def tile_starts(size, tile, overlap):
    """Offsets of tiles of side `tile` that cover `size`; neighbours share at least `overlap`."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def ramp(size, overlap, like):
    """Window (size,) above 0: rises over the first `overlap` cells, falls over the last."""
    at = torch.arange(size, device=like.device, dtype=like.dtype)
    return ((torch.minimum(at, size - 1 - at) + 1) / (overlap + 1)).clamp(max=1)
