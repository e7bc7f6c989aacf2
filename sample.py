"""The story of an image: tile → embedding → adapter → guided denoising → PNG.

    python sample.py --image tile.png --run runs/lora --compare --scheduler euler_ancestral
    python sample.py --image tiles/ --lora a.safetensors:0.7 --lora b-peft/:0.3 --adapter a.pth
"""

import os
import sys
from pathlib import Path

from tqdm import tqdm

from pixcell_min.adapter import load_adapter
from pixcell_min.base import load_pixcell_base
from pixcell_min.checkpoint import file_hash
from pixcell_min.checks import (DEVICE, OneLineParser, integer, nonnegative_float, number, one_line,
                                one_of, positive_int)
from pixcell_min.config import read_yaml
from pixcell_min.data import find_tiles, fit_tile, read_tile
from pixcell_min.formats import lora_files
from pixcell_min.images import image_grid, save_png
from pixcell_min.lora import lora_disabled
from pixcell_min.pipeline import GUIDANCE_SCALE
from pixcell_min.precision import refusal
from pixcell_min.runs import shared_files
from pixcell_min.schedulers import SCHEDULER_NAMES

WEIGHT = number(-10, 10)  # of a LoRA


def parse_sample(argv=None):
    """Command line → options. Raises: SystemExit(2) after one line for a wrong flag or value."""
    parser = OneLineParser(prog="sample.py",
                           description="Draw tiles that look like the given ones.")
    parser.add_argument("--image", nargs="+", required=True, type=Path,
                        help="tile, several tiles, or a folder of tiles")
    parser.add_argument("--base",
                        help="base folder; default: the run's, else $PIXCELL_BASE, else nano")
    parser.add_argument("--run", type=Path,
                        help="run folder of train.py: its LoRA, adapter and base")
    parser.add_argument("--ema", action="store_true",
                        help="the run's averaged weights (train.py --ema-decay)")
    parser.add_argument("--lora", type=weighted_path, action="append",
                        help="LoRA file or folder, PATH or PATH:WEIGHT, instead of the run's; "
                             "given several times: their weighted sum")
    parser.add_argument("--adapter", type=Path,
                        help="adapter file (.safetensors, .pth), instead of the run's")
    parser.add_argument("--lora-scale", type=WEIGHT, default=1.0,
                        help="of all LoRA; 1: as trained, 0: off [factor, -10 to 10]")
    parser.add_argument("--fuse-lora", action="store_true",
                        help="merge LoRA into the weights: faster, equal up to rounding")
    parser.add_argument("--scheduler", choices=SCHEDULER_NAMES, default="ddim", help="default ddim")
    parser.add_argument("--steps", type=integer(1, 1000), default=50,
                        help="denoising steps, 1 to 1000; 1 serves with dpmpp_2m alone; default 50")
    parser.add_argument("--eta", type=number(0, 1), default=0.0,
                        help="noise of ddim, 0: deterministic, 1: as ddpm")
    parser.add_argument("--guidance-scale", type=nonnegative_float, default=GUIDANCE_SCALE,
                        help=f"1: none [factor]; default {GUIDANCE_SCALE}")
    parser.add_argument("--guidance-interval", type=nonnegative_float, nargs=2,
                        metavar=("LOW", "HIGH"),
                        help="noise levels sqrt((1 - a) / a), a: alphas_cumprod, at which to "
                             "guide; default all")
    parser.add_argument("--seed", type=integer(0, 2**62), default=0,
                        help="of the first image; the next ones count up")
    parser.add_argument("--num-images", type=positive_int, default=1, help="images per tile")
    parser.add_argument("--compare", action="store_true",
                        help="also write real | base | adapted side by side")
    parser.add_argument("--tile-fit", type=one_of("resize", "pad"),
                        help="tiles of another size; default: the run's, else resize")
    parser.add_argument("--mixed-precision", type=one_of("auto", "no", "fp16", "bf16"),
                        default="auto", help="as in train.py")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile of the blocks; a minute at the start")
    parser.add_argument("--device", type=DEVICE, default="auto",
                        help="auto: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder to write to")
    options = parser.parse_args(argv)
    if options.ema and (options.run is None or options.lora and options.adapter):
        parser.error("--ema chooses among a run's files; give --run, not both --lora and --adapter")
    if (options.fuse_lora or options.lora_scale != 1) and not (options.run or options.lora):
        parser.error("--fuse-lora and --lora-scale need a LoRA; give --run or --lora")
    return options


def weighted_path(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT → (path, weight, 1 if none). Raises: ArgumentTypeError, out of range.

    What exists as a whole is a path, whatever colons it holds; else a number after the last colon
    is the weight.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or not path or os.path.exists(text):  # False for a name too long to be one
        return Path(text), 1.0
    try:
        float(weight)
    except ValueError:  # C:\lora.safetensors
        return Path(text), 1.0
    return Path(path), WEIGHT(weight)


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    options = parse_sample(argv)
    try:
        sample(options)
        return 0
    except (ValueError, OSError) as error:
        line = error
    except (RuntimeError, MemoryError) as error:
        if not (line := refusal(error, "draw where there is more")):
            raise  # a fault of ours: with its traceback
    except KeyboardInterrupt:
        print("sample.py: interrupted; the images finished so far are kept", file=sys.stderr)
        return 130
    print(f"sample.py: error: {one_line(line)}", file=sys.stderr)
    return 2


def sample(options) -> None:
    """Draw and write all images. Raises: ValueError for whatever the caller can mend."""
    run_settings = read_run(options)
    tiles = output_names(options.image)
    for path in tiles:  # all of them, before the first is drawn: hours later would be too late
        read_tile(path)
    pipeline = load_pixcell_base(options.base or run_settings.get("base"), options.device,
                                 options.mixed_precision)
    adapter = None
    if options.adapter:
        adapter = load_adapter(options.adapter, pipeline.base_hash).to(pipeline.device)
    if options.lora:
        headers = pipeline.combine_lora_weights(options.lora, options.lora_scale)
        if options.fuse_lora:
            pipeline.fuse_lora(for_good=not options.compare)
        for (path, _), header in zip(options.lora, headers):
            if "base_hash" not in header:
                print(f"sample.py: note: {path} names no base_hash: that it was made for "
                      "this base is not checked", file=sys.stderr)
    if options.compile:
        pipeline.transformer.compile_blocks()
    size = pipeline.transformer.config.sample_size * pipeline.vae.downscale
    fit = options.tile_fit or run_settings.get("tile_fit", "resize")
    settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale,
                "scheduler": options.scheduler, "eta": options.eta,
                "guidance_interval": options.guidance_interval}
    made_by = {**settings, "base_hash": pipeline.base_hash, "tile_fit": fit,
               "lora_scale": options.lora_scale,
               "lora_fused": bool(options.fuse_lora and options.lora),
               "precision": str(pipeline.dtype or "float32"),
               "decoded_in": str(pipeline.decoding_dtype or "float32"),
               "device": pipeline.device.type, "compiled": options.compile,
               "lora_hash": "-".join(file_hash(file) for path, _ in options.lora or ()
                                     for file in lora_files(path)) or None,
               "lora_weights": [weight for _, weight in options.lora or ()],
               "adapter_hash": file_hash(options.adapter) if options.adapter else None}
    seeds = [options.seed + i for i in range(options.num_images)]

    for path, name in tqdm(tiles.items(), "sampling", unit="tile", disable=len(tiles) == 1 or None):
        tile = fit_tile(read_tile(path), size, fit)
        embedding = pipeline.encoder(tile)                                   # (1, S, E)
        # Adapted before it is repeated: a matrix product over n rows may round otherwise than one.
        adapted = adapter(embedding) if adapter else embedding
        images = pipeline(adapted.expand(len(seeds), -1, -1), seed=seeds, **settings).images
        for image, seed in zip(images, seeds):
            target = options.out / f"{name}_seed{seed}.png"
            save_png(target, image, {**made_by, "seed": seed, "tile": path.name,
                                     "tile_hash": file_hash(path)})
            tqdm.write(str(target))
        if options.compare:
            target = options.out / f"{name}_compare.png"
            save_png(
                target, comparison(pipeline, tile, embedding, images, seeds, settings, options),
                {**made_by, "seeds": seeds, "tile": path.name, "tile_hash": file_hash(path)})
            tqdm.write(str(target))


def comparison(pipeline, tile, embedding, images, seeds, settings, options):
    """real | base | adapted, a row per seed; real | base without LoRA and adapter."""
    embedding = embedding.expand(len(seeds), -1, -1)                         # (n, S, E)
    if not (options.lora or options.adapter):  # then the images are the base's
        return image_grid([(tile, image) for image in images], ("real", "base"))
    if options.fuse_lora and options.lora:
        pipeline.unfuse_lora()
    with lora_disabled(pipeline.transformer):
        base = pipeline(embedding, seed=seeds, **settings).images
    if options.fuse_lora and options.lora:
        pipeline.fuse_lora()
    return image_grid([(tile, *pair) for pair in zip(base, images)], ("real", "base", "adapted"))


def read_run(options) -> dict:
    """Fill in --run's LoRA and adapter where not given; → its settings, {} without a run."""
    if options.run is None:
        return {}
    settings = read_yaml(options.run / "config.yaml")
    if not (options.lora and options.adapter):
        lora, adapter = shared_files(options.run, options.ema)
        options.lora = options.lora or [(lora, 1.0)]
        options.adapter = options.adapter or adapter
    return settings


def output_names(inputs) -> dict[Path, str]:
    """{tile path: output name without ending}; class folders are kept. Raises: ValueError."""
    names = {}
    for entry in inputs:
        if entry.is_dir():
            names |= {tile.path: str(tile.path.relative_to(entry).with_suffix(""))
                      for tile in find_tiles(entry)}
        elif entry.is_file():
            names[entry] = entry.stem
        else:
            raise ValueError(f"{entry}: no such tile or folder")
    first = {}
    for path, name in names.items():
        if (twin := first.setdefault(name, path)) != path:
            raise ValueError(f"{twin} and {path} would both be written as {name}; "
                             "sample them into two --out folders")
    return names


if __name__ == "__main__":
    sys.exit(main())
