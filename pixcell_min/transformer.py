"""PixCell's denoiser: a PixArt-Sigma transformer over SD 3.5 latents, given tile embeddings.

Parameter names are those of the released checkpoint. Knows nothing of LoRA, schedules or guidance.
With τ = t-MLP(sinusoid(t)), m = W·SiLU(τ) ∈ ℝ^{6×D} shared by all blocks, c = projected condition:
    h ← h + g₁ · attn1(LN(h)·(1+s₁) + b₁)        (b₁, s₁, g₁, b₂, s₂, g₂) = table_block + m
    h ← h + attn2(h, c)                          no norm before it
    h ← h + g₂ · ff(LN(h)·(1+s₂) + b₂)
Sources: Peebles & Xie 2023; Chen et al. 2023, 2024 (PixArt); Yellapragada et al. 2025 (PixCell).
"""

import math
import reprlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from pixcell_min.checkpoint import read_json
from pixcell_min.embeddings import (CaptionProjection, PatchEmbed, TimestepModulation,
                                    TokenPositions, normal_start)
from pixcell_min.loading import build_on_meta, load_weights

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PLAIN_ATTENTION_UP_TO = 1024  # tokens: a 512-px tile; its N×N products are kept for the backward
# What this text implements; a config that says otherwise describes another network.
FIXED = {"_class_name": "PixCellTransformer2DModel", "activation_fn": "gelu-approximate",
         "attention_bias": True, "attention_type": "default", "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "use_additional_conditions": False, "dropout": 0.0}
# Far above any released network's; a broken configuration would be built for hours.
MAX_SIZES, MAX_SIZE = {"num_layers": 256, "sample_size": 1024}, 2**16


@dataclass(frozen=True)
class TransformerConfig:
    """The fields of `transformer/config.json` that shape the network; defaults: PixCell-256's."""

    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 16
    out_channels: int = 32  # epsilon and learned variance, in_channels each
    patch_size: int = 2
    sample_size: int = 32  # latent side of the training resolution; positions are relative to it
    caption_channels: int = 1536  # E, width of a condition token
    caption_num_tokens: int = 1  # S, a square number
    interpolation_scale: float | None = 0.5  # None: max(sample_size // 64, 1)
    norm_eps: float = 1e-6

    @classmethod
    def from_dict(cls, config: dict, source="config"):
        """Pick the known fields. Raises: ValueError naming a missing, wrong or unsupported one."""
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{source}: {key} is {config[key]!r}, only {value!r} is supported")
        names = {field.name for field in fields(cls)}
        optional = {"norm_eps", "interpolation_scale"}
        if missing := sorted(names - optional - config.keys()):
            raise ValueError(f"{source}: not a PixCell transformer configuration, "
                             f"{missing[0]!r} is missing")
        values = {key: config[key] for key in names & config.keys()}
        for key in sorted(values):
            positive = type(values[key]) in (int, float) and 0 < values[key] < math.inf
            if key in optional and not positive and (
                    (key, values[key]) != ("interpolation_scale", None)):
                raise ValueError(f"{source}: {key} must be a positive number, got {values[key]!r}")
            largest = MAX_SIZES.get(key, MAX_SIZE)
            if key not in optional and not (
                    type(values[key]) is int and 1 <= values[key] <= largest):
                raise ValueError(f"{source}: {key} must be a positive integer, got "
                                 f"{reprlib.repr(values[key])}; {largest} at most")
        latent, out = values["in_channels"], values["out_channels"]
        if out not in (latent, 2 * latent):
            raise ValueError(f"{source}: out_channels must be {latent} as in_channels, or "
                             f"{2 * latent} with a learned variance, got {out}")
        values.setdefault("interpolation_scale", None)
        return cls(**values)


class Attention(nn.Module):
    """Multi-head attention, biased; keys and values from `context` (cross) or from `h` (self)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # the checkpoint says to_out.0
        self.float32_attention = False

    def forward(self, h, context=None):
        """h (B, N, D), context (B, S, D) or None → (B, N, D); if S = 1 (B, 1, D), to broadcast."""
        if context is not None and context.shape[1] == 1:
            # One key: its softmax is 1 for every query, so the result is exactly to_out(to_v(c)).
            return self.to_out[0](self.to_v(context))
        if torch.is_autocast_enabled(h.device.type):
            # Cast once: each projection and its LoRA would cast, and keep, a copy of their own.
            h = h.to(torch.get_autocast_dtype(h.device.type))
        context = h if context is None else context
        q, k, v = (rearrange(x, "b n (m d) -> b m n d", m=self.heads)
                   for x in (self.to_q(h), self.to_k(context), self.to_v(context)))
        if self.float32_attention:  # q·k can pass 65504, the largest float16
            with torch.autocast(h.device.type, enabled=False):
                out = attend(q.float(), k.float(), v.float()).to(v.dtype)
        else:
            out = attend(q, k, v)
        return self.to_out[0](rearrange(out, "b m n d -> b n (m d)"))


def attend(q, k, v):
    """softmax(q·kᵀ / √d)·v over (B, heads, N, d), in the dtype of q."""
    if (q.device.type == "cpu" and q.dtype == torch.bfloat16
            and q.shape[2] <= PLAIN_ATTENTION_UP_TO):
        # The fused kernel does not use the CPU's bfloat16 unit: with its backward this takes half.
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class GELUProjection(nn.Module):
    """Linear, then tanh-approximated GELU; a class because the checkpoint says `net.0.proj`."""

    def __init__(self, width, hidden):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, h):
        return F.gelu(self.proj(h), approximate="tanh")


class FeedForward(nn.Module):
    """D → 4D → D; `net.1`, a dropout in the reference, holds no weight and is the identity here."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList(
            [GELUProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, h):
        return self.net[2](self.net[0](h))


class Block(nn.Module):
    """Self- and cross-attention, feed-forward; modulated (adaLN-single) by shared m + own table."""

    def __init__(self, width, heads, eps):
        super().__init__()
        self.eps = eps
        self.scale_shift_table = nn.Parameter(normal_start(6, width))
        self.attn1, self.attn2, self.ff = (
            Attention(width, heads), Attention(width, heads), FeedForward(width))

    def forward(self, h, context, modulation):
        """h (B, N, D), context (B, S, D), modulation (B, 6, D) → (B, N, D); chunks (B, 1, D)."""
        table = self.scale_shift_table + modulation                                 # (B, 6, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        h = h + gate_msa * self.attn1(modulate(h, shift_msa, scale_msa, self.eps))  # (B, N, D)
        h = h + self.attn2(h, context)                                              # (B, N, D)
        return h + gate_mlp * self.ff(modulate(h, shift_mlp, scale_mlp, self.eps))  # (B, N, D)


def modulate(h, shift, scale, eps):
    """LayerNorm without weights over D, then h·(1 + scale) + shift."""
    # In place: with a frozen table the backward needs neither the norm's output nor the product.
    return F.layer_norm(h, h.shape[-1:], eps=eps).mul_(1 + scale).add_(shift)


class PixCellTransformer(nn.Module):
    """The whole network: `model(latents=…, timesteps=…, encoder_hidden_states=…)`, see forward."""

    def __init__(self, config: TransformerConfig):
        """Raises: ValueError if the token count is no square, or a width no multiple of 4."""
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        if math.isqrt(config.caption_num_tokens) ** 2 != config.caption_num_tokens:
            raise ValueError("caption_num_tokens must be a square number, "
                             f"got {config.caption_num_tokens}")
        if width % 4 or (config.caption_num_tokens > 1 and config.caption_channels % 4):
            raise ValueError(
                f"widths must be multiples of 4, got {width} and {config.caption_channels}")
        self.config, self.gradient_checkpointing = config, False
        self.scale_shift_table = nn.Parameter(normal_start(2, width))
        self.pos_embed = PatchEmbed(config, width)
        self.transformer_blocks = nn.ModuleList(Block(
            width, config.num_attention_heads, config.norm_eps) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaln_single = TimestepModulation(width)
        if config.caption_num_tokens > 1:
            self.y_pos_embed = TokenPositions(config)
        self.caption_projection = CaptionProjection(config, width)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, prepare=lambda network: None,
                        leave_inert=False):
        """Read `config.json` and safetensors, strictly. Raises: ValueError if they do not fit.

        `prepare(network)` may still change dtypes: what is read is converted to them, once.
        leave_inert: leave inert layers in the file, in its dtype; no forward ever reads them there.
        """
        folder = Path(folder)
        path = folder / "config.json"
        config = TransformerConfig.from_dict(read_json(path), path)
        model = build_on_meta(lambda: cls(config).to(dtype), path)
        prepare(model)
        load_weights(model, folder / WEIGHTS_NAME, model.inert_layers() if leave_inert else ())
        return model.eval()

    @property
    def uncond_embedding(self):
        """The null embedding (S, E), in the input space of the caption projection."""
        return self.caption_projection.uncond_embedding

    def set_float32_attention(self, enabled: bool) -> None:
        """Compute q·k, softmax and ·v in float32 whatever autocast says (for float16)."""
        for block in self.transformer_blocks:
            block.attn1.float32_attention = block.attn2.float32_attention = enabled

    def compile_blocks(self) -> None:
        """Let torch.compile work on each block, at first use; a few programs serve all blocks.

        Raises: ValueError if there is no compiler that works.
        """
        try:
            torch.compile(lambda x: x + 1)(self.scale_shift_table.detach())
        except (RuntimeError, OSError, ImportError) as error:  # no compiler, Triton, headers, cache
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"torch.compile does not work here ({reason}); "
                             "run without --compile") from None
        for block in self.transformer_blocks:
            block.compile()

    def inert_layers(self) -> list[str]:
        """Projections that cannot affect the output: cross-attention's query and key if S = 1."""
        if self.config.caption_num_tokens > 1:
            return []
        return [f"transformer_blocks.{i}.attn2.{name}"
                for i in range(self.config.num_layers) for name in ("to_q", "to_k")]

    def forward(self, latents, timesteps, encoder_hidden_states):
        """latents (B, in, H, W), timesteps (B,) or scalar, condition (B, S, E) → (B, out, H, W).

        H and W are multiples of the patch size. Raises: ValueError on other sizes or token shapes.
        """
        c, p = self.config, self.config.patch_size
        self._check(latents, encoder_hidden_states)
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(latents.shape[0])
        tokens = encoder_hidden_states
        if c.caption_num_tokens > 1:
            tokens = tokens + self.y_pos_embed.y_pos_embed
        h = self.pos_embed(latents).to(self.scale_shift_table.dtype)         # (B, N, D)
        embedded, modulation = self.adaln_single(timesteps)                  # (B, D), (B, 6, D)
        context = self.caption_projection(tokens)                            # (B, S, D)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, context, modulation, use_reentrant=False)  # (B, N, D)
            else:
                h = block(h, context, modulation)                            # (B, N, D)
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)  # (B, 1, D)
        h = self.proj_out(modulate(h, shift, scale, c.norm_eps))             # (B, N, p·p·out)
        return rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=latents.shape[2] // p, p=p, q=p)

    def _check(self, latents, tokens):
        c = self.config
        if latents.ndim != 4 or latents.shape[1] != c.in_channels or any(
                n % c.patch_size or not n for n in latents.shape[2:]):
            raise ValueError(f"latents must be (B, {c.in_channels}, H, W) with H and W multiples "
                             f"of {c.patch_size}, got {tuple(latents.shape)}")
        expected = (latents.shape[0], c.caption_num_tokens, c.caption_channels)
        if tokens.shape != expected:
            raise ValueError(f"encoder_hidden_states must be {expected}, got {tuple(tokens.shape)}")
