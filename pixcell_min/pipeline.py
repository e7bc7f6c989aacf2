"""From embedding to image: guided epsilon, the denoising loop, decoding; LoRA files on and off.

Takes its models as arguments. Every image has a generator and a forward of its own, so its bytes
depend on its embedding, seed and settings, never on what else is drawn in the same call.
    guided ε = ε(∅) + g·(ε(c) − ε(∅))            Ho & Salimans 2022, on all latent channels
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from tqdm import tqdm

from pixcell_min.data import tensor_to_image
from pixcell_min.formats import load_loras
from pixcell_min.lora import (fold_lora, lora_layers, merge_lora, set_lora_scale,
                              unmerge_lora)
from pixcell_min.precision import autocast, decoding_dtype
from pixcell_min.schedulers import NoiseSchedule, build_scheduler

GUIDANCE_SCALE = 1.5  # the released pipeline's
TILED_DECODE_ABOVE = 64  # latent cells: 1024-px tiles are decoded in parts


@dataclass(frozen=True)
class PipelineOutput:
    """What one call drew: PIL images (RGB, rounded to uint8), one per embedding."""

    images: list[Image.Image]


@torch.no_grad()
def denoise(transformer, sampler, condition, generator, *, num_inference_steps=50,
            guidance_scale=GUIDANCE_SCALE, guidance_interval=None, size=None, dtype=None,
            progress=lambda steps: steps):
    """One condition (1, S, E) → latents (1, C, H, W) float32.

    `generator` draws the start and every step's noise. size: latent (H, W), default the training
    size; guidance_scale, guidance_interval: as is_guided takes them; dtype: of autocast.
    """
    config, device = transformer.config, condition.device
    height, width = size or (config.sample_size, config.sample_size)
    channels, steps = config.in_channels, sampler.steps(num_inference_steps)
    noise = torch.randn(1, channels, height, width, generator=generator, device=generator.device)
    latents, x0 = noise.to(device) * sampler.init_noise_sigma(num_inference_steps), None
    null = transformer.uncond_embedding[None].to(condition)                  # (1, S, E)
    for step in progress(steps):
        guided_here = is_guided(step, guidance_scale, guidance_interval)
        tokens = torch.cat([null, condition]) if guided_here else condition  # (2 or 1, S, E)
        model_input = sampler.scale_model_input(latents, step).expand(len(tokens), -1, -1, -1)
        with autocast(device, dtype):
            output = transformer(model_input.to(transformer.scale_shift_table.dtype),
                                 step.timestep, tokens).float()
        guided = output[-1:]                                                 # (1, C or 2C, H, W)
        if guided_here:
            # Epsilon is guided; a learned variance, where the sampler uses it, is the condition's.
            epsilon = output[:1, :channels] + guidance_scale * (
                output[1:, :channels] - output[:1, :channels])
            guided = torch.cat([epsilon, guided[:, channels:]], dim=1)
        latents, x0 = sampler.step(guided, latents, step, generator, x0)
    return latents


def is_guided(step, guidance_scale, guidance_interval) -> bool:
    """Whether a sampler's step takes an unconditional half: not at scale 1.

    Nor where the noise level √((1−ᾱ)/ᾱ) lies outside guidance_interval (low, high), ends included,
    if there is one (Kynkäänniemi et al. 2024).
    """
    low, high = guidance_interval or (0.0, math.inf)
    return guidance_scale != 1 and low <= step.sigma / step.alpha <= high


class PixCellPipeline:
    """A loaded base: transformer, schedule, base_hash; vae and encoder are loaded at first use."""

    def __init__(self, transformer, load_vae: Callable, load_encoder: Callable,
                 schedule: NoiseSchedule, *, base_hash, device, dtype=None):
        """base_hash: SHA-256 of the transformer file, named by LoRAs; dtype: autocast's or None."""
        self.transformer, self.schedule = transformer, schedule
        self.base_hash, self.device, self.dtype = base_hash, torch.device(device), dtype
        self._load_vae, self._load_encoder = load_vae, load_encoder
        # q·k may pass the largest float16; CUDA's attention keeps it in float32 by itself.
        transformer.set_float32_attention(
            dtype == torch.float16 and self.device.type != "cuda")

    @cached_property
    def vae(self):
        """The frozen autoencoder: pixels ↔ latents."""
        return self._load_vae()

    @cached_property
    def encoder(self):
        """The frozen tile encoder: PIL image(s) or tensors → embeddings (B, S, E)."""
        return self._load_encoder()

    def release(self) -> None:
        """Let go of vae and encoder, which training does not need; the next use loads them anew."""
        for name in ("vae", "encoder"):
            self.__dict__.pop(name, None)  # where cached_property keeps it

    def load_lora_weights(self, path, scale=1.0, fuse=False) -> dict[str, str]:
        """Wrap the base with a LoRA file or folder of any format of `formats.py`; → its header.

        fuse: merge it into the weights. Raises: ValueError if it is broken or was made for another
        base, or a LoRA is loaded already; one that names no `base_hash` is accepted.
        """
        return self.combine_lora_weights([(path, 1.0)], scale, fuse)[0]

    def combine_lora_weights(self, files, scale=1.0, fuse=False) -> list[dict[str, str]]:
        """The same of the weighted sum of several, [(path, weight)]; → each file's header."""
        headers = load_loras(self.transformer, files, scale, expected_base_hash=self.base_hash)
        if fuse:
            self.fuse_lora()
        return headers

    def set_lora_scale(self, scale: float) -> None:
        """Weight of the update: 1 as trained, 0 the base. Raises: ValueError if absent or fused."""
        set_lora_scale(self.transformer, scale)

    def fuse_lora(self, for_good=False) -> None:
        """Merge updates into the weights: a little faster; `unfuse_lora` restores their bits.

        for_good: without the copy that this takes; what is left is a plain network.
        """
        (fold_lora if for_good else merge_lora)(self.transformer)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`, bit for bit."""
        unmerge_lora(self.transformer)

    @property
    def has_lora(self) -> bool:
        """Whether LoRA layers are in the transformer."""
        return bool(lora_layers(self.transformer))

    @torch.no_grad()
    def __call__(self, embedding, num_inference_steps=50, guidance_scale=GUIDANCE_SCALE,
                 scheduler="ddim", eta=0.0, seed=0, progress=None,
                 guidance_interval=None) -> PipelineOutput:
        """Draw one image per embedding.

        embedding: (E,), (S, E) or (B, S, E), from `encoder` or adapter; scheduler: ddim,
        euler_ancestral, ddpm or dpmpp_2m; seed: an int (image i uses seed + i) or one int per
        image; progress: wraps the list of steps, default a bar on a terminal; guidance_interval:
        as in `is_guided`. Raises: ValueError for wrong shapes, names, counts, an interval that is
        none, or values that are not finite.
        """
        embedding = self._conditions(embedding)
        seeds = [seed + i for i in range(len(embedding))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(embedding):
            raise ValueError(f"got {len(seeds)} seeds for {len(embedding)} embeddings; "
                             "give one each, or one int")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}, expected a finite number")
        if guidance_interval and not 0 <= guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(f"guidance_interval is {guidance_interval}, expected two noise "
                             "levels, 0 <= low <= high")
        sampler = build_scheduler(scheduler, self.schedule, eta=eta)
        _ = self.vae  # loaded now: that its file is missing should not be said after the drawing
        progress = progress or (
            lambda steps: tqdm(steps, "denoising", unit="step", leave=False, disable=None))
        images = []
        for condition, number in zip(embedding, seeds):
            # Drawn on the CPU: the same noise on every device.
            generator = torch.Generator().manual_seed(number)
            latents = denoise(
                self.transformer, sampler, condition[None], generator, progress=progress,
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                guidance_interval=guidance_interval, dtype=self.dtype)
            images.append(self.decode(latents))
        return PipelineOutput(images)

    def _conditions(self, embedding):
        config = self.transformer.config
        embedding = torch.as_tensor(embedding, dtype=torch.float32, device=self.device)
        shape = tuple(embedding.shape)
        if embedding.ndim < 3:  # (E,), (S, E): one image; B single tokens must come as (B, 1, E)
            embedding = embedding[(None,) * (3 - embedding.ndim)]
        if embedding.ndim != 3 or embedding.shape[1:] != (
                config.caption_num_tokens, config.caption_channels):
            raise ValueError(f"embedding must be (B, {config.caption_num_tokens}, "
                             f"{config.caption_channels}), got {shape}")
        if not embedding.isfinite().all():
            raise ValueError("embedding holds NaN or infinity; check the tile and the adapter")
        return embedding.to(self.transformer.scale_shift_table.dtype)

    @property
    def decoding_dtype(self) -> torch.dtype | None:
        """What the products of the loaded decoder are held in, and computed; None: float32."""
        return decoding_dtype(self.dtype)

    @torch.no_grad()
    def decode(self, latents) -> Image.Image:
        """Latents (1, C, H, W) → one PIL image; in bfloat16 if the pipeline is, else in float32.

        Raises: ValueError if a pixel is not finite.
        """
        latents = latents.to(self.device, torch.float32)  # as scale and shift are undone in it
        large = max(latents.shape[2:]) > TILED_DECODE_ABOVE
        pixels = (self.vae.decode_tiled if large else self.vae.decode)(latents)
        if not pixels.isfinite().all():
            raise ValueError("the decoded image is not finite: weights or LoRA are broken, "
                             "or float16 overflowed")
        return tensor_to_image(pixels[0].float().cpu())
