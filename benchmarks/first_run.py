"""Measure the README's first command on this machine and write the figures the README quotes.

    python benchmarks/first_run.py --out benchmarks/results/first_run.json
    python benchmarks/first_run.py --data ../shared/data/target_nct --out first_run_nct.json

Times are those of one run on a machine that may be shared; they are figures, not promises.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pixcell_min.base import load_pixcell_base  # noqa: E402
from pixcell_min.checkpoint import write_text  # noqa: E402
from pixcell_min.data import find_tiles, fit_tile, read_tile  # noqa: E402
from pixcell_min.tools.pretrain import round_trip_psnr  # noqa: E402


def commit() -> str:
    """What was measured: the commit, with a + where files differ from it."""
    return subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout.strip()


def machine() -> dict:
    """What the figures were measured on."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor()
               ) if os.path.exists("/proc/cpuinfo") else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **{name: version(name) for name in ("torch", "timm", "safetensors", "numpy", "pillow")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="as in train.py; default: its procedural tiles")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder for run and cache, kept; default: none")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        command = [sys.executable, ROOT / "train.py", "--rank", "8", "--alpha", "16",
                   "--out", work / "run", "--cache", work / "cache",
                   *(["--data", args.data.resolve()] if args.data else [])]
        began = time.monotonic()
        printed = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        train_seconds = time.monotonic() - began
        lines = [json.loads(line) for line in open(work / "run" / "metrics.jsonl")]
        clock = [line["seconds"] for line in lines if "loss" in line]
        tiles = find_tiles(args.data or next((work / "cache").glob("procedural*")))
        pipeline, image_seconds = load_pixcell_base(), []
        images = [fit_tile(read_tile(tile.path), 256, "resize") for tile in tiles]
        embedding = pipeline.encoder(images[0])
        for _ in range(3):
            began = time.monotonic()
            pipeline(embedding, num_inference_steps=50)
            image_seconds.append(time.monotonic() - began)
        result = {
            "machine": machine(), "tiles": len(tiles), "printed": printed.strip().splitlines(),
            "precision": str(pipeline.dtype or "float32"),
            "wall_seconds_of_train_py": round(train_seconds, 1),
            "seconds_per_optimizer_step": round(statistics.median(np.diff(clock)), 3),
            "seconds_per_image_50_steps_ddim_guided": round(statistics.median(image_seconds), 2),
            "validation_loss": {line["step"]: line["validation_loss"]
                                for line in lines if "validation_loss" in line},
            "vae_round_trip_psnr_db": round(round_trip_psnr(pipeline.vae, images), 2),
            "file_bytes": {name: os.path.getsize(work / "run" / name) for name in
                           ("lora_weights.safetensors", "adapter.safetensors")},
        }
    write_text(args.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
