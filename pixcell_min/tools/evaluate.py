"""What does a run change? Held-out tiles against what base, adapter, LoRA and both draw from them.

    python -m pixcell_min.tools.evaluate --data ../shared/data/target_nct --run runs/nct
    python -m pixcell_min.tools.evaluate --data nct --run runs/nct --save-dataset new --per-class 5

It draws every image once (`OUT/images/ARM/`, a re-run goes on), measures with `comparison`, writes
`report.json`, `report.html`, `grid.png`, `histograms.png`. For a number it cannot give it names the
reason. It trains nothing and fetches nothing.
"""

import os
import platform
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pixcell_min.adapter import load_adapter
from pixcell_min.base import features_hash, load_pixcell_base
from pixcell_min.checkpoint import file_hash, read_json
from pixcell_min.checks import (DEVICE, OneLineParser, integer, nonnegative_float, one_line,
                                one_of, positive_int, words)
from pixcell_min.config import Config, read_yaml
from pixcell_min.data import Tile, find_tiles, fit_tile, read_tile
from pixcell_min.images import read_settings, save_png
from pixcell_min.lora import lora_disabled
from pixcell_min.pipeline import GUIDANCE_SCALE
from pixcell_min.precision import refusal
from pixcell_min.runs import shared_files
from pixcell_min.schedulers import SCHEDULER_NAMES
from pixcell_min.tools import report
from pixcell_min.tools.comparison import embed, measure
from pixcell_min.uni import TileEncoder, read_encoder

ARMS = {"base": (), "adapter": ("adapter",), "lora": ("lora",), "both": ("adapter", "lora")}
COLOUR_TILES = 256  # training tiles whose colour the colour-only baseline takes on
OWN, SECOND = "own", "second"  # encoders: the base's, and that of --second-encoder


def parse_evaluate(argv=None):
    """Command line → options. Raises: SystemExit(2) after one line for a wrong flag or value."""
    parser = OneLineParser(prog="evaluate", description="Measure a run of train.py on tiles it "
                           "was not trained on, and write a report.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="tiles; those of the run's training are left out")
    add("--run", type=Path, required=True, help="run folder of train.py")
    add("--ema", action="store_true", help="the run's averaged weights (train.py --ema-decay)")
    add("--out", type=Path,
        help="folder to write to; default RUN/evaluation, with --ema RUN/evaluation_ema")
    add("--count", type=positive_int, default=32, help="tiles at most; default 32")
    add("--seed", type=integer(0, 2**62), default=0, help="of images and splits; default 0")
    add("--seeds", type=positive_int, default=1, help="images per tile and arm; default 1")
    add("--steps", type=integer(1, 1000), default=20, help="denoising steps; default 20")
    add("--scheduler", choices=SCHEDULER_NAMES, default="dpmpp_2m", help="default dpmpp_2m")
    add("--guidance-scale", type=nonnegative_float, default=GUIDANCE_SCALE,
        help=f"1: none [factor]; default {GUIDANCE_SCALE}")
    add("--guidance-interval", type=nonnegative_float, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels at which to guide, as in sample.py; default all")
    add("--arms", type=words(*ARMS)._replace(parse=lambda text: tuple(text.split(","))),
        default=tuple(ARMS), help=f"out of {','.join(ARMS)}; default all")
    add("--base", help="base folder; default: the run's")
    add("--second-encoder", type=Path, help="folder like a base's uni/, to measure features with")
    add("--save-dataset", type=Path, help="also write a synthetic dataset of class folders there")
    add("--per-class", type=positive_int, help="its images per class")
    add("--device", type=DEVICE, default="auto", help="auto: cuda where there is one, else cpu")
    add("--mixed-precision", type=one_of("auto", "no", "fp16", "bf16"), default="auto",
        help="as in train.py")
    options = parser.parse_args(argv)
    if (options.save_dataset is None) != (options.per_class is None):
        parser.error("--save-dataset and --per-class go together")
    options.out = options.out or options.run / ("evaluation_ema" if options.ema else "evaluation")
    return options


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    options = parse_evaluate(argv)
    try:
        result = evaluate(options)
    except (ValueError, OSError) as error:
        line = error
    except (RuntimeError, MemoryError) as error:
        if not (line := refusal(error, "draw where there is more")):
            raise  # a fault of ours: with its traceback
    except KeyboardInterrupt:
        print("evaluate: interrupted; the images drawn so far are kept, the same command goes on",
              file=sys.stderr)
        return 130
    else:
        print("\n".join(report.summary(result)), f"report: {options.out / 'report.html'}", sep="\n")
        return 0
    print(f"evaluate: error: {one_line(line)}", file=sys.stderr)
    return 2


def evaluate(options) -> dict:
    """Draw, measure, write; → what report.json holds. options: of `parse_evaluate`.

    Raises: ValueError for whatever the caller can mend; nothing is drawn then.
    """
    notes, settings = [], vars(Config(**read_yaml(options.run / "config.yaml")))
    record = read_record(options.run)
    trained = {entry["hash"] for entry in record}
    found = readable(find_tiles(options.data), notes)
    held_out = {key: tile for key, tile in found.items() if key not in trained}
    if not held_out:
        raise ValueError(f"{options.data}: the run trained on all of its {len(found)} tiles; give "
                         "a folder with others")
    models = load_models(options, settings)
    fit = partial(fit_tile, size=models.size, how=settings["tile_fit"])
    samples = read_samples(spread(held_out, options.count), models, fit, notes)
    shared = image_settings(options, settings, models)
    jobs = [Job(options.out / "images" / arm / f"{sample.name}_{number}.png", arm, sample,
                image_seed(options.seed, sample.hash, number), number)
            for sample in samples for number in range(options.seeds) for arm in options.arms]
    made = plan_dataset(options, found, held_out, models, fit, notes) if options.per_class else []
    check_folder(options.out / "images", jobs, shared)
    check_folder(options.save_dataset, made, shared, only_planned=True)
    draw(jobs, models, shared, "drawing")
    drawn = {arm: [np.array(read_tile(job.path)) for job in jobs if job.arm == arm]
             for arm in options.arms}
    result = describe(options, settings, models, notes, {
        "found": len(found), "trained_on": len(found) - len(held_out), "held_out": len(held_out),
        "used": len(samples), "images_per_tile": options.seeds, "dataset": len(made),
        "names": [sample.name for sample in samples]})
    images = measure(result, options.seed, models, samples, drawn,
                     *read_training(record, models, fit, notes))
    report.write(options.out, result, images)
    draw(made, models, shared, "dataset")
    return result


# ---------------------------------------------------------------- what goes in


@dataclass(frozen=True)
class Models:
    """What a run needs to draw and measure; hashes as in the report."""

    pipeline: object
    adapter: object
    encoders: dict  # name → encoder
    size: int  # px of a tile
    hashes: dict


@dataclass(frozen=True)
class Sample:
    """A tile as the models see it."""

    tile: Tile
    hash: str
    image: object  # PIL, RGB
    condition: torch.Tensor  # (1, S, E)

    @property
    def name(self):
        """CLASS_NAME_HASH: one file name for one content."""
        return "_".join(filter(None, (self.tile.label, self.tile.path.stem, self.hash[:8])))


@dataclass(frozen=True)
class Job:
    """An image to draw."""

    path: Path
    arm: str
    sample: Sample
    seed: int
    number: int


def read_record(run) -> list[dict]:
    """tiles.json of a run: which files it trained on. Raises: ValueError: missing or no such."""
    entries = read_json(run / "tiles.json").get("training")
    if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get(key), str)
            for entry in entries for key in ("path", "hash")):
        raise ValueError(f'{run / "tiles.json"}: expected {{"training": [{{"path": …, "hash": …}}, '
                         "…]}, as train.py writes it")
    if any(Path(entry["path"]).suffix == ".npy" for entry in entries):
        raise ValueError(f"{run}: trained on precomputed features; which images it has seen, and "
                         "which would be held out, is not known")
    return entries


def readable(tiles, notes) -> dict:
    """[tile] → {hash: tile}; a file that cannot be opened is noted. Raises: ValueError: if none."""
    found = {}
    for tile in tiles:
        try:
            found[file_hash(tile.path)] = tile
        except ValueError as error:
            notes.append(f"skipped {error}")
    if not found:
        raise ValueError(f"none of {len(tiles)} tiles can be opened; first {notes[0]}")
    return found


def spread(tiles: dict, count: int) -> dict:
    """At most `count` of {hash: tile}: as even over classes as can be, then over their files."""
    classes, chosen = defaultdict(list), {}
    for key, tile in tiles.items():
        classes[tile.label].append(key)
    for left, keys in zip(range(len(classes), 0, -1), sorted(classes.values(), key=len)):
        share = min(len(keys), -(-(count - len(chosen)) // left))
        chosen |= {(key := keys[i * len(keys) // share]): tiles[key] for i in range(share)}
    return {key: tile for key, tile in tiles.items() if key in chosen}


def shared_paths(options) -> dict:
    """The two files that are measured: {"lora": path, "adapter": path}. Raises: ValueError."""
    return dict(zip(("lora", "adapter"), shared_files(options.run, options.ema)))


def load_models(options, settings) -> Models:
    """Base, the run's adapter and LoRA, encoders. Raises: ValueError: missing, of another base."""
    base = options.base or settings["base"]
    paths = shared_paths(options)
    hashes = {name: file_hash(path) for name, path in paths.items()}
    pipeline = load_pixcell_base(base, options.device, options.mixed_precision)
    pipeline.load_lora_weights(paths["lora"])
    adapter = load_adapter(paths["adapter"], pipeline.base_hash).to(pipeline.device)
    encoders = {OWN: pipeline.encoder}
    if options.second_encoder:
        encoders[SECOND] = TileEncoder.from_pretrained(options.second_encoder).to(pipeline.device)
        hashes[SECOND] = file_hash(read_encoder(options.second_encoder)[1])
    size = pipeline.transformer.config.sample_size * pipeline.vae.downscale
    return Models(pipeline, adapter, encoders, size,
                  {"base": pipeline.base_hash, "features": features_hash(base), **hashes})


def read_samples(tiles, models, fit, notes, count=None) -> list[Sample]:
    """{hash: tile} → its samples, or the first `count`; unreadable ones and other sizes are noted.

    Raises: ValueError if there is none.
    """
    samples, refitted, before = [], 0, len(notes)
    for key, tile in tqdm(tiles.items(), "reading tiles", unit="tile", disable=None):
        if len(samples) == count:
            break
        try:
            image = read_tile(tile.path)
        except ValueError as error:
            notes.append(f"skipped {error}")
            continue
        refitted += image.size != (models.size, models.size)
        # One by one: a product over n rows may round otherwise, and bytes would depend on n.
        samples.append(Sample(tile, key, fit(image), models.encoders[OWN](fit(image))))
    if not samples:
        raise ValueError(f"no readable tile among {len(tiles)} held-out ones; first "
                         f"{notes[before]}")
    if refitted:
        notes.append(f"{refitted} of {len(samples)} tiles were not {models.size}×{models.size} px; "
                     f"fitted by {fit.keywords['how']}, as the run's settings say")
    return samples


def read_training(record, models, fit, notes):
    """(features {encoder: (n, d)} of the training tiles still there unchanged, images of some)."""
    paths = [Path(entry["path"]) for entry in record]
    kept = [path for path, entry in zip(paths, record)
            if os.path.isfile(path) and file_hash(path) == entry["hash"]]
    if len(kept) < len(paths):
        notes.append(f"{len(paths) - len(kept)} of {len(paths)} training tiles are gone or changed "
                     f"(first looked for: {next(p for p in paths if p not in kept)}); the "
                     "memorisation screen and the colour-only baseline do without them")
    features, every = {name: [] for name in models.encoders}, -(-len(kept) // COLOUR_TILES) or 1
    images = []
    for i, path in enumerate(tqdm(kept, "training tiles", unit="tile", disable=None)):
        image = np.array(fit(read_tile(path)))
        for name, encoder in models.encoders.items():
            features[name] += embed(encoder, [image])
        images += [image] if i % every == 0 else []
    return features, images


# ---------------------------------------------------------------- drawing


def image_seed(seed: int, tile_hash: str, number) -> int:
    """The seed of image `number` of a tile: of the tile alone, so that every arm starts alike."""
    return int.from_bytes(sha256(repr((seed, tile_hash, number)).encode()).digest()[:7])


def image_settings(options, settings, models):
    """arm → what its images were made with, as their PNG says."""
    common = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale,
              "guidance_interval": options.guidance_interval,
              "scheduler": options.scheduler, "evaluation_seed": options.seed,
              "tile_fit": settings["tile_fit"], "device": models.pipeline.device.type,
              "precision": str(models.pipeline.dtype or "float32"),
              "decoded_in": str(models.pipeline.decoding_dtype or "float32"),
              "base_hash": models.hashes["base"], "features_hash": models.hashes["features"]}
    return lambda arm: {**common, "arm": arm, **{
        f"{part}_hash": models.hashes[part] if part in ARMS[arm] else None
        for part in ("adapter", "lora")}}


def check_folder(folder, jobs, shared, only_planned=False) -> None:
    """Raises: ValueError if a folder holds other files, or images made with other settings.

    only_planned: it is to hold the images of these jobs, and no more.
    """
    planned = {job.path: {"seed": job.seed, "tile_hash": job.sample.hash} for job in jobs}
    files = sorted(folder.rglob("*")) if folder and folder.is_dir() else []
    for path in (path for path in files if path.is_file() and not path.name.startswith(".")):
        try:
            then = read_settings(path)
        except ValueError:
            then = {}
        if str(then.get("arm")) not in ARMS:
            raise ValueError(f"{path}: not drawn by evaluate; give it a folder of its own")
        changed = [f"{key} {then.get(key)} → {value}"
                   for key, value in {**shared(then["arm"]), **planned.get(path, {})}.items()
                   if then.get(key) != value]
        if changed:
            raise ValueError(f"{path}: made with other settings: {'; '.join(changed)}; choose "
                             f"another folder or delete {folder}")
        if only_planned and path not in planned:
            raise ValueError(f"{path}: more than is asked for now; choose another folder or delete "
                             "what is too much")


@torch.no_grad()
def draw(jobs, models, shared, title) -> None:
    """Draw and save what is not there yet; an image's bytes depend on its own job alone."""
    missing = [job for job in jobs if not job.path.exists()]
    for job in tqdm(missing, title, unit="image", disable=None if missing else True):
        parts, made_by = ARMS[job.arm], shared(job.arm)
        condition = job.sample.condition
        if "adapter" in parts:
            condition = models.adapter(condition)
        transformer = models.pipeline.transformer
        with nullcontext() if "lora" in parts else lora_disabled(transformer):
            image = models.pipeline(
                condition, made_by["num_inference_steps"], made_by["guidance_scale"],
                made_by["scheduler"], seed=job.seed, progress=lambda steps: steps,
                guidance_interval=made_by["guidance_interval"]).images[0]
        save_png(job.path, image, {**made_by, "seed": job.seed, "number": job.number,
                                   "tile": job.sample.tile.path.name, "tile_hash": job.sample.hash})


def plan_dataset(options, found, held_out, models, fit, notes) -> list[Job]:
    """Jobs of --save-dataset: --per-class images of every class, cycling over its tiles."""
    jobs = []
    for label in sorted({tile.label for tile in found.values()}, key=str):
        mine = {key: tile for key, tile in held_out.items() if tile.label == label}
        if not mine:
            mine = {key: tile for key, tile in found.items() if tile.label == label}
            notes.append(f"dataset: {label} has no held-out tile; drawn from its training tiles")
        # The first ones, not spread: image i must not change when --per-class grows.
        samples = read_samples(mine, models, fit, notes, options.per_class)
        for i in range(options.per_class):
            sample = samples[i % len(samples)]
            path = options.save_dataset / (label or "") / f"{label or 'tile'}_{i:05d}.png"
            seed = image_seed(options.seed, sample.hash, f"dataset {i}")
            jobs.append(Job(path, "both", sample, seed, i))
    return jobs


def describe(options, settings, models, notes, tiles) -> dict:
    """What was measured, on what, by what."""
    return {
        "data": str(options.data), "run": str(options.run), "tiles": tiles, "notes": notes,
        "settings": {"seed": options.seed, "count": options.count, "steps": options.steps,
                     "scheduler": options.scheduler, "guidance_scale": options.guidance_scale,
                     "guidance_interval": options.guidance_interval,
                     "arms": ",".join(options.arms), "ema": options.ema,
                     "base": str(options.base or settings["base"]),
                     "precision": str(models.pipeline.dtype or "float32")},
        "training_settings": settings, "hashes": models.hashes,
        "file_bytes": {name: os.path.getsize(path) for name, path in shared_paths(options).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "device": str(
            torch.cuda.get_device_name() if models.pipeline.device.type == "cuda" else "cpu")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


if __name__ == "__main__":
    sys.exit(main())
