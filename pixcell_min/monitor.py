"""What a run shows of itself: sample grids, a loss curve, TensorBoard; and what it will cost.

Draws from arguments and from metrics.jsonl, changes no weight and no random state of the training.
"""

import importlib.util
import math
import re
import time
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

import torch

from pixcell_min.batches import Batch
from pixcell_min.checkpoint import write_bytes
from pixcell_min.data import fit_tile, read_tile
from pixcell_min.images import curve_panel, image_grid, png_bytes, save_png
from pixcell_min.lora import lora_disabled
from pixcell_min.runs import read_log
from pixcell_min.training import VALIDATION_TIMESTEPS, diffusion_loss, optimizer_step

GRID_STEPS = 20  # of DPM-Solver++ 2M, for the sample grids
CURVE = "loss.png"
LONGEST = 1e13  # seconds that an estimate tells; a timedelta holds no ten times as many
INK = {"training": "#b8c8e0", "training, smoothed": "#1f5fbf", "validation": "#d95f02",
       "validation, averaged weights": "#2a8a4a"}


def draw_grid(path, pipeline, adapter, features, tiles, guidance_scale, seed, tile_fit) -> None:
    """Tiles beside what base and adapted model draw from them, a row each, as PNG.

    tile_fit None: there are no images, and what the VAE makes of the latents stands for them.
    """
    training = pipeline.transformer.training, adapter.training
    pipeline.transformer.eval(), adapter.eval()
    embeddings = features.embeddings[features.rows(tiles)].to(pipeline.device)
    settings = {"num_inference_steps": GRID_STEPS, "scheduler": "dpmpp_2m", "seed": seed,
                "guidance_scale": guidance_scale}
    with torch.no_grad():
        adapted = pipeline(adapter(embeddings), **settings).images
        with lora_disabled(pipeline.transformer):
            base = pipeline(embeddings, **settings).images
    if tile_fit is None:
        real = [pipeline.decode(features.mean[row][None].to(pipeline.device))
                for row in features.rows(tiles)]
    else:
        size = pipeline.transformer.config.sample_size * pipeline.vae.downscale
        real = [fit_tile(read_tile(tile.path), size, tile_fit) for tile in tiles]
    grid = image_grid(list(zip(real, base, adapted)), ("real, held out", "base", "adapted"))
    save_png(path, grid, {**settings, "tiles": [tile.path.name for tile in tiles]})
    pipeline.release()  # training goes on without the VAE
    pipeline.transformer.train(training[0]), adapter.train(training[1])


def draw_curve(run: Path) -> None:
    """Draw loss.png: every step's loss, a running mean over a tenth of them, validation's."""
    lines = read_log(run)
    losses = [(line["step"], line["loss"]) for line in lines
              if line.get("loss") is not None and not line["skipped"]]
    if not losses:
        return
    width, sums = math.ceil(len(losses) / 10), [0, *accumulate(loss for _, loss in losses)]
    smooth = [(step, (sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width))
              for i, (step, _) in enumerate(losses)]
    curves = {"training": losses, "training, smoothed": smooth}
    for name, key in (("validation", "validation_loss"),
                      ("validation, averaged weights", "validation_loss_ema")):
        curves[name] = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    curves = {name: points for name, points in curves.items() if points}
    write_bytes(run / CURVE, png_bytes(curve_panel("loss by step", curves, INK, 760, 400,
                                                   legend=True)))


def open_tensorboard(run: Path, step: int):
    """A writer into RUN/tensorboard, steps after `step` dropped; None if it isn't installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(run / "tensorboard", purge_step=step + 1)


def estimate(pipeline, state, steps, micro_batches, batch_size, validations, num_tiles, variants,
             keep_states) -> list[str]:
    """What a run will take, from one micro-step of random tiles, as lines for people.

    The state given is spent. validations: (how many, tiles in each); variants: of a tile.
    """
    config, device = pipeline.transformer.config, pipeline.device
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    latents = (config.in_channels, config.sample_size, config.sample_size)
    tokens = (config.caption_num_tokens, config.caption_channels)
    batch = Batch(draw(batch_size, *latents), draw(batch_size, *tokens), draw(batch_size, *latents),
                  torch.randint(pipeline.schedule.num_train_timesteps, (batch_size,),
                                generator=generator),
                  torch.zeros(batch_size, dtype=torch.bool)).to(device)
    state.transformer.train(), state.adapter.train()
    for _ in range(2):  # the first warms up
        began = time.monotonic()
        optimizer_step(lambda batch: diffusion_loss(
            state.transformer, state.adapter, pipeline.schedule, batch, pipeline.dtype), [batch],
            batch_size, state.optimizer, state.scaler, 1.0)
        micro = time.monotonic() - began
    began = time.monotonic()
    with torch.no_grad():
        diffusion_loss(state.transformer, state.adapter, pipeline.schedule, batch, pipeline.dtype)
    forward = time.monotonic() - began
    per_step = micro * micro_batches
    count, tiles = validations
    validating = count * math.ceil(tiles * VALIDATION_TIMESTEPS / batch_size) * forward
    features = num_tiles * variants * 4 * (2 * math.prod(latents) + math.prod(tokens))
    saved = (16 if state.averages else 12) * sum(p.numel() for p in state.parameters)
    return [
        "estimate from one micro-step of random tiles, on this machine as busy as it is now:",
        f"time {_clock(steps * per_step + validating)}: {steps} steps of {per_step:.3g} s, and "
        f"{count} validations of {validating / max(count, 1):.3g} s; features and grids not "
        "counted",
        f"memory {_peak_memory(device)} at the peak; on disk: features of {num_tiles} tiles, "
        f"{variants} variant(s) each, {features / 1e6:.0f} MB; {keep_states} saved states of "
        f"{saved / 1e6:.1f} MB"]


def _clock(seconds):
    return str(timedelta(seconds=round(min(seconds, LONGEST))))


def _peak_memory(device):
    status = Path("/proc/self/status")
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB of GPU memory"
    if not status.exists():  # Linux alone tells it there
        return "unknown"
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return f"{kibibytes * 1024 / 1e6:.0f} MB"
