"""The experiment: what adapter and LoRA change on held-out tiles, by rank, alpha and place.

    python benchmarks/adaptation.py --data ../shared/data/target_nct --name nct
    python benchmarks/adaptation.py --name procedural --variants default
    python benchmarks/adaptation.py --name ema --variants default --train "--ema-decay 0.999" --ema

Each variant is trained and evaluated (`train.py`, `pixcell_min.tools.evaluate`) once per seed; the
seed changes the split, the start of LoRA and adapter, and every drawn number. Without --data the
tiles are the procedural second laboratory's. What is finished is kept in --work and not run again.
Writes benchmarks/results/adaptation_NAME.json and prints its table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from first_run import commit  # of this collecting; a run is of it or an earlier one
from pixcell_min.data import find_tiles, read_tile
from pixcell_min.tools.metrics import colour_shift
from pixcell_min.tools.synthetic import FIRST, render_tile, second_laboratory

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {  # name → what differs from train.py's defaults, rank 8, alpha 16, all attention
    "default": [],
    "rank 4, alpha 4": ["--rank", "4", "--alpha", "4"],
    "rank 4, alpha 8": ["--rank", "4", "--alpha", "8"],
    "rank 4, alpha 16": ["--rank", "4", "--alpha", "16"],
    "rank 4, alpha 32": ["--rank", "4", "--alpha", "32"],
    "rank 8, alpha 4": ["--rank", "8", "--alpha", "4"],
    "rank 8, alpha 8": ["--rank", "8", "--alpha", "8"],
    "rank 8, alpha 32": ["--rank", "8", "--alpha", "32"],
    "self-attention alone": ["--attention", "attn1"],
    "cross-attention alone": ["--attention", "attn2"],
    "LoRA trained alone": ["--adapter-learning-rate", "0"],
    "adapter trained alone": ["--learning-rate", "0"],
    "adapter trained alone, 3e-3": ["--learning-rate", "0", "--adapter-learning-rate", "3e-3"],
}
VARIED = {"seed", "out", "lora_rank", "lora_alpha", "lora_attention", "learning_rate",
          "adapter_learning_rate"}  # by seeds and variants
MEASURES = {  # heading → where report.json holds it, for the arm
    "colour W1": ("colour", "lab_mean"),
    "H angle °": ("colour", "macenko_angle_h"),
    "E angle °": ("colour", "macenko_angle_e"),
    "cosine": ("fidelity:own", "cosine"),
    "over shuffled": ("fidelity:own", "margin"),
    "nuclei r": ("nuclei", "spearman"),
    "nearer than 5 %": ("memorisation:own", "closer_share"),
    "KID": ("kernel:own", "kernel_distance"),
}
GAINS = {"colour, % of base": "colour_percent", "gain in cosine": "gain:own",
         "gain in cosine, centred": "gain_centred:own"}  # of both over base, with 95 % intervals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="of the results file")
    parser.add_argument("--data", type=Path, help="folder of tiles; none: procedural ones")
    parser.add_argument("--variants", default=",".join(VARIANTS).replace(", ", "+"),
                        help="comma-separated, + for a comma within a name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=34, help="held-out tiles at most")
    parser.add_argument("--images", type=int, default=1, help="per held-out tile and arm")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="of the evaluation")
    parser.add_argument("--arms", default="base,adapter,lora,both")
    parser.add_argument("--ema", action="store_true",
                        help="evaluate averaged weights (needs --train '--ema-decay 0.999')")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/adaptation")
    parser.add_argument("--train", default="", help="further flags of train.py, for all variants")
    options = parser.parse_args()
    if options.ema and "--ema-decay" not in options.train:
        parser.error("--ema needs --train '--ema-decay 0.999': without it no averages are kept")
    if options.data is None:  # once, before jobs side by side would each make them
        options.data = second_laboratory(options.work / "cache")
    names = [name.replace("+", ", ") for name in options.variants.split(",")]
    work = options.work / options.name
    jobs = [(name, seed) for seed in range(options.seeds) for name in names]
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for future in [pool.submit(run, work, name, seed, options) for name, seed in jobs]:
            try:
                future.result()
            except BaseException:  # SystemExit of a failed command too: start no other run
                pool.shutdown(cancel_futures=True)
                raise
            bar.update()
    results = collect(work, options)
    if options.data.name.startswith("procedural-second"):
        results["true_shift"] = true_shift(options.data)
    path = ROOT / "benchmarks/results" / f"adaptation_{options.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results), path, sep="\n\n")


def folder_of(work, name, seed) -> Path:
    return work / f"{name.replace(', ', '_').replace(' ', '-')}_seed{seed}"


def run(work, name, seed, options) -> None:
    """Train and evaluate one variant at one seed, unless both are done."""
    folder, images = folder_of(work, name, seed), Path("evaluation/images/base")
    if (report := folder / "evaluation/report.json").exists():
        if json.loads(report.read_text())["settings"].get("ema", False) != options.ema:
            sys.exit(f"{report}: with --ema or without; give each a --name or --work of its own")
        return
    started = ["--resume"] if any(folder.glob("states/step-*.pt")) else ["--overwrite"]
    call([sys.executable, "train.py", "--data", str(options.data), "--out", str(folder),
          "--seed", str(seed), "--cache", str(work.parent / "cache"), "--validation-fraction", "0.5",
          "--sample-count", "0", *options.train.split(), *VARIANTS[name], *started],
         folder, options)
    # Base images depend on the tile and the seed alone: what another variant drew is taken over.
    shared = work / f"base_seed{seed}"
    if shared.exists():
        shutil.copytree(shared, folder / images, dirs_exist_ok=True)
    call([sys.executable, "-m", "pixcell_min.tools.evaluate", "--data", str(options.data),
          "--run", str(folder), "--seed", str(seed), "--count", str(options.count),
          "--seeds", str(options.images), "--guidance-scale", str(options.guidance_scale),
          "--arms", options.arms, "--out", str(folder / "evaluation"),
          *["--ema"] * options.ema], folder, options)
    if not shared.exists():  # appears whole: a run beside this one may be copying from it
        partial = shared.with_name(f"{shared.name}.{folder.name}")
        shutil.copytree(folder / images, partial)
        partial.rename(shared)


def true_shift(folder) -> dict:
    """How far the second laboratory lies from the first: the same tissue drawn in either stain."""
    tiles = find_tiles(folder)
    first = [np.array(render_tile(int(tile.path.stem.rpartition("_")[2]), tile.label, FIRST))
             for tile in tiles]
    shift = colour_shift([np.array(read_tile(tile.path)) for tile in tiles], first)
    return {heading: shift[key] for heading, (group, key) in MEASURES.items() if group == "colour"}


def call(command, folder, options) -> None:
    """Run a command of the repository; its output goes beside the run's folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, os.cpu_count() // options.jobs))
    with open(folder.with_suffix(".log"), "a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                              env={**os.environ, "OMP_NUM_THREADS": threads})
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}; see {log.name}")


def collect(work, options) -> dict:
    """All finished runs of the folder: variant → arm → measure → each seed's value, and median."""
    variants, last, common = {}, None, None
    for name in VARIANTS:
        paths = sorted(work.glob(f"{folder_of(work, name, '*').name}/evaluation/report.json"))
        reports = [json.loads(path.read_text()) for path in paths]
        if not reports:
            continue
        last = reports[-1]
        for path, report in zip(paths, reports):  # never two recipes under one heading
            recipe = [report["data"], report["settings"] | {"seed": None}, report["hashes"]["base"],
                      {key: value for key, value in report["training_settings"].items()
                       if key not in VARIED}]
            common = common or recipe
            if recipe != common:
                sys.exit(f"{path}: made with other settings than the first report; give each "
                         "recipe a --work of its own")
        columns = {}
        for column in last["results"]:
            values = [values_of(report, column) for report in reports]
            columns[column] = {heading: summary([its[heading] for its in values])
                               for heading in MEASURES}
        variants[name] = {
            "flags": VARIANTS[name], "seeds": len(reports), "columns": columns,
            "colour, % of base": summary([
                report["key"].get("colour_percent", {}).get("values", {}).get("value")
                for report in reports]),
            "value, low, high": {name: [interval_of(report["key"].get(key, {})) for report in reports]
                                 for name, key in GAINS.items()},
            "file_bytes": last["file_bytes"],
            "training_seconds": summary([seconds(path.parent.parent) for path in paths])}
    return {"name": options.name, "train_flags": options.train, "commit": commit(),
            **{key: last[key] for key in ("data", "tiles", "settings", "training_settings",
                                          "versions", "machine", "date")},
            "base_hash": last["hashes"]["base"], "variants": variants}


def values_of(report, column) -> dict:
    """heading → value in a column of a report, None where it has none."""
    return {heading: report["results"][column].get(group, {}).get("values", {}).get(key)
            for heading, (group, key) in MEASURES.items()}


def interval_of(group) -> list | None:
    """[value, low, high] of a group of report.json's key numbers; None where it has no value."""
    return [group["values"]["value"], *group["intervals"]["value"]] if "values" in group else None


def seconds(run) -> float | None:
    """How long the training steps took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max((line.get("seconds", 0) for line in lines), default=None)


def summary(values) -> dict | None:
    """{"median": …, "values": one per seed}; None where a seed has no value."""
    if any(value is None for value in values):
        return None
    return {"median": statistics.median(values), "values": values}


def table(results) -> str:
    """Markdown: a line per variant and column, medians over the seeds."""
    lines = [f"| {results['name']} | n seeds | % of base | " + " | ".join(MEASURES) + " |",
             "|---" * (len(MEASURES) + 3) + "|"]
    for name, variant in results["variants"].items():
        for column, measures in variant["columns"].items():
            percent = variant["colour, % of base"] if column == "both" else None
            cells = [f"{value['median']:.3g} ({min(value['values']):.3g}…{max(value['values']):.3g})"
                     if value else "–" for value in (percent, *measures.values())]
            lines.append(f"| {name}: {column} | {variant['seeds']} | {' | '.join(cells)} |")
    if shift := results.get("true_shift"):
        cells = [f"{shift[heading]:.3g}" if heading in shift else "–" for heading in MEASURES]
        lines.append(f"| first laboratory, same tissue | – | – | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
