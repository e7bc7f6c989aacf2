"""Measure the feature cache: decoding threads, first and second pass, memory, training with it.

    python benchmarks/features.py --out benchmarks/results/features.json
    python benchmarks/features.py --memory-of 1000 20000      (only MB that are not page cache)

Times are those of a machine that may be shared: compare those of one file with each other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from first_run import machine  # noqa: E402

from pixcell_min.adapter import EmbeddingAdapter  # noqa: E402
from pixcell_min.base import load_pixcell_base  # noqa: E402
from pixcell_min.batches import draw_batch, generator_for  # noqa: E402
from pixcell_min.checkpoint import write_text  # noqa: E402
from pixcell_min.data import Tile, fit_tile, load_tiles, read_tile  # noqa: E402
from pixcell_min.features import cached_features, encode_images, encode_tiles  # noqa: E402
from pixcell_min.lora import inject_lora, lora_parameters  # noqa: E402
from pixcell_min.training import (build_optimizer, build_scaler, diffusion_loss,  # noqa: E402
                                  optimizer_step)
from sides import memory_mb  # noqa: E402

BATCH, SIZE = 4, 256
DECODED, ENCODED, STEPS = 200, 16, 3  # tiles, tiles, optimizer steps
BMP_HEADER = 54  # bytes


def memory_of(counts) -> dict:
    """{tiles: MB} after caching so many tiny tiles as features of real size, and reading them."""
    noise = torch.randn(64, 16, 32, 32), torch.randn(64, 1, 1536)
    used, result = 0, {}

    def encode(images):  # as fast as copying, and no two tiles alike
        nonlocal used
        start, used = used % 40, used + len(images)
        chosen = slice(start, start + len(images))
        return noise[0][chosen] + used, noise[0][chosen].abs(), noise[1][chosen] + used

    def compute(tiles):
        return encode_tiles(load_tiles(tiles, 16, "pad", True, print, 2), encode, 16)

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i:05}.bmp" for i in range(max(counts))]
        Image.new("RGB", (16, 16)).save(paths[0])
        header = paths[0].read_bytes()[:BMP_HEADER]
        for path in paths:
            path.write_bytes(header + os.urandom(16 * 16 * 3))
        for count in counts:
            features = cached_features(
                Path(folder) / "cache", [Tile(path) for path in paths[:count]], compute,
                settings={}, report=lambda line: None, workers=2)
            for step in range(50):
                rows = torch.randint(count, (16,), generator=generator_for(0, step))
                features.sample_latents(rows, generator_for(1, step)), features.embeddings[rows]
            for part in torch.arange(count).split(64):
                features.embeddings[part]
            result[count] = round(memory_mb("RssAnon"))  # without page cache
    return result


def write_tiles(folder, count) -> list[Tile]:
    """Different 224-px TIFF tiles, as NCT-CRC-HE's."""
    image = Image.open(ROOT / "docs" / "tile.png").convert("RGB").resize((224, 224))
    paths = [Path(folder) / f"{i:04}.tif" for i in range(count)]
    for i, path in enumerate(paths):
        image.putpixel((0, 0), (i % 256, i // 256, 0))
        image.save(path)
    return [Tile(path) for path in paths]


def seconds(action) -> float:
    """Wall seconds of one call."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _read(tile):
    return fit_tile(read_tile(tile.path), SIZE, "resize")


def decode_rates(tiles) -> dict:
    """Tiles per second that are read, decoded and resized, by threads; by processes to compare."""
    def drain(workers):
        for _ in load_tiles(tiles, SIZE, "resize", True, print, workers):
            pass

    rates = {f"{n} thread(s)": len(tiles) / seconds(partial(drain, n)) for n in (1, 2, 4)}
    for n in (1, 2):
        with ProcessPoolExecutor(n) as pool:
            list(pool.map(_read, tiles[:n]))  # started
            rates[f"{n} process(es)"] = len(tiles) / seconds(
                lambda: list(pool.map(_read, tiles, chunksize=4)))
    return {name: round(rate, 1) for name, rate in rates.items()}


def passes(pipeline, tiles, cache) -> tuple[dict, object]:
    """(tiles per second of the first pass by threads, seconds of the second), and the features."""
    def run(workers, encode=lambda images: encode_images(images, pipeline.vae, pipeline.encoder)):
        return cached_features(
            cache / str(workers), tiles, lambda missing: encode_tiles(
                load_tiles(missing, SIZE, "resize", True, print, workers), encode, BATCH),
            settings={}, report=print, workers=workers)

    encode_images([_read(tiles[0])], pipeline.vae, pipeline.encoder)  # warm
    first = {f"{n} thread(s)": round(len(tiles) / seconds(lambda: run(n)), 2) for n in (1, 2)}
    return {"first_pass_tiles_per_second": first,
            "second_pass_seconds": round(seconds(lambda: run(1)), 3)}, run(1)


def training_rates(pipeline, tiles, features) -> dict:
    """Tiles per second of optimizer steps on cached features, and encoding each batch anew."""
    transformer = pipeline.transformer
    inject_lora(transformer, 8, 16, exclude=transformer.inert_layers())
    adapter = EmbeddingAdapter(transformer.config.caption_channels)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 1e-4, 1e-4, 0)
    scaler = build_scaler("cpu", pipeline.dtype)

    def step(number, again):
        rows = torch.arange(number * BATCH, (number + 1) * BATCH) % len(tiles)
        if again:
            encode_images([_read(tiles[row]) for row in rows.tolist()], pipeline.vae,
                          pipeline.encoder)
        batch = draw_batch(features, rows, pipeline.schedule, 0.1, generator_for(0, number))
        optimizer_step(lambda batch: diffusion_loss(transformer, adapter, pipeline.schedule, batch,
                                                    pipeline.dtype), [batch], BATCH, optimizer,
                       scaler, 1.0)

    step(0, False)
    taken = {False: 0.0, True: 0.0}
    for number in range(STEPS):  # in turn, so that both see the same neighbours on the machine
        for again in taken:
            taken[again] += seconds(partial(step, number, again))
    rates = {name: round(STEPS * BATCH / taken[again], 2)
             for name, again in (("cached", False), ("encoded_at_each_step", True))}
    return {**rates, "ratio": round(taken[True] / taken[False], 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", type=int, nargs="+", metavar="TILES", help="measure this alone")
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of)))
        return
    result = {"machine": machine(), "load_average": os.getloadavg(), "batch_size": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        tiles = write_tiles(folder, DECODED)
        result["decoded_tiles_per_second"] = decode_rates(tiles)
        pipeline = load_pixcell_base(device="cpu")
        measured, features = passes(pipeline, tiles[:ENCODED], Path(folder) / "cache")
        result |= measured
        result["training_tiles_per_second"] = training_rates(pipeline, tiles[:ENCODED], features)
    done = subprocess.run([sys.executable, __file__, "--memory-of", "1000", "20000"], check=True,
                          capture_output=True, text=True)
    result["megabytes_not_page_cache_after_tiles"] = json.loads(done.stdout)
    if args.out:
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
