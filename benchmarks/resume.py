"""What it costs to save a run so that it can be resumed, and to take it up again.

    python benchmarks/resume.py --out benchmarks/results/resume.json
    python benchmarks/resume.py --base weights/pixcell-256

LoRA of rank 8 on all attention and the adapter, after one optimizer step of random gradients, so
that AdamW has its moments. Medians; a step's time is measured beside them, in the same process.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from first_run import machine  # noqa: E402

import train  # noqa: E402
from pixcell_min import runs  # noqa: E402
from pixcell_min.base import load_pixcell_base  # noqa: E402
from pixcell_min.batches import Batch  # noqa: E402
from pixcell_min.config import Config  # noqa: E402
from pixcell_min.training import diffusion_loss, optimizer_step  # noqa: E402

IDENTITY = {"base_hash": "", "dtype": "", "tiles": "", "held_out": ""}


def median_seconds(repeats, action) -> float:
    """Median wall seconds of one call."""
    taken = []
    for _ in range(repeats):
        began = time.monotonic()
        action()
        taken.append(time.monotonic() - began)
    return round(statistics.median(taken), 4)


def measure(base, repeats, folder) -> dict:
    """Seconds of a step, a save of all files, a load of the newest state; bytes of one state."""
    config = Config(base=str(base))
    pipeline = load_pixcell_base(base)
    state, sizes = train.make_trainable(config, pipeline), pipeline.transformer.config
    generator, size = torch.Generator().manual_seed(0), config.batch_size
    latents = size, sizes.in_channels, sizes.sample_size, sizes.sample_size
    batch = Batch(torch.randn(latents, generator=generator),
                  torch.randn(size, sizes.caption_num_tokens, sizes.caption_channels,
                              generator=generator),
                  torch.randn(latents, generator=generator), torch.full((size,), 500),
                  torch.zeros(size, dtype=torch.bool)).to(pipeline.device)
    batches = [batch] * config.gradient_accumulation_steps

    def step():
        optimizer_step(lambda batch: diffusion_loss(
            pipeline.transformer, state.adapter, pipeline.schedule, batch, pipeline.dtype), batches,
            size * len(batches), state.optimizer, state.scaler, 1.0)

    def save():
        runs.save_state(folder, IDENTITY, state, 2)
        runs.save_shared(folder, state, IDENTITY, {})

    step()
    (folder / runs.METRICS).write_text("")
    (folder / runs.RECORD).write_text(json.dumps({"sessions": [{"versions": machine()}]}))
    result = {"step_seconds": median_seconds(min(repeats, 5), step),
              "save_seconds": median_seconds(repeats, save)}
    result["load_seconds"] = median_seconds(
        repeats, lambda: runs.load_state(folder, IDENTITY, state, print))
    result["state_bytes"] = runs.state_files(folder)[0].stat().st_size
    every = Config().save_every
    result["share_of_time_saving"] = round(
        result["save_seconds"] / (every * result["step_seconds"] + result["save_seconds"]), 6)
    return {"save_every": every, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=ROOT / "weights/pixcell-nano")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"base": options.base.name, "machine": machine(), "load_average": os.getloadavg(),
                  **measure(options.base, options.repeats, Path(folder))}
    print(text := json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
