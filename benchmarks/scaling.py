"""How time and memory of pixcell_min grow with batch, rank, latent size and number of tiles.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --figure docs/scaling.png
    python benchmarks/scaling.py --size full --precision bf16 --out scaling_full.json

Each point is a process of its own (`sides.py`), whose first turn warms up: the lowest CPU time of
--repeats more and the peak memory, less what importing took. The figure shows both, each over its
value at the smallest point, beside the straight line through zero (grey) that the first one sets.
What is in the result file with the same settings is not measured again.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare import SIZES, Side, prepare  # noqa: E402
from first_run import machine  # noqa: E402
from pixcell_min.checkpoint import write_bytes, write_text  # noqa: E402
from pixcell_min.images import curve_panel, png_bytes  # noqa: E402

INK = {"CPU time": "#1f5fbf", "memory above import": "#d95f02", "proportional": "#bbbbbb"}
TRAIN = {"kind": "train", "batch": 1}
GROWTH = {  # what grows: (its values, the case at a value, what the work is proportional to)
    "batch": ((1, 2, 4, 8), lambda n: TRAIN | {"batch": n}, lambda n: n),
    "rank": ((1, 4, 16, 64), lambda n: TRAIN | {"rank": n}, lambda n: n),
    "latent side": ((32, 64, 128), lambda n: {"kind": "forward", "batch": 1, "latent_side": n},
                    lambda n: n * n),
    "tiles": ((250, 500, 1000, 2000), lambda n: {"kind": "cache", "count": n}, lambda n: n),
}


def measure(case: dict, repeats: int) -> dict:
    """Lowest CPU seconds and peak MB of one point."""
    side = Side("ours", case)
    turns = [side.ask("run") for _ in range(repeats + 1)][1:]
    side.close()
    return {"cpu_seconds": min(turn["cpu_seconds"] for turn in turns),
            "seconds": min(turn["seconds"] for turn in turns),
            "mb": max(turn["peak_mb"] for turn in turns) - side.memory["imported_mb"]}


def figure(points: dict) -> Image.Image:
    """A panel for each thing that grows."""
    panels = []
    for what, its in points.items():
        work = GROWTH[what][2]
        values = [int(value) for value in its]
        first = its[str(values[0])]
        curves = {"proportional": [(work(n), work(n) / work(values[0])) for n in values]}
        for name, key in (("CPU time", "cpu_seconds"), ("memory above import", "mb")):
            curves[name] = [(work(n), its[str(n)][key] / first[key]) for n in values]
        title = {"latent side": "latent cells"}.get(what, what)
        if what == "rank":  # the frozen network is nearly all of the work, whatever the rank
            del curves["proportional"]
        panels.append(curve_panel(title, curves, INK, 300, 220, base=0))
    picture = Image.new("RGB", (2 * panels[0].width, 2 * panels[0].height + 24), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, (name, colour) in enumerate(INK.items()):  # below the panels, whose curves fill them
        x, y = 20 + 190 * i, picture.height - 14
        draw.line((x, y, x + 30, y), colour, 3)
        draw.text((x + 38, y), name, "black", font, anchor="lm")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % 2 * panel.width, i // 2 * panel.height))
    return picture


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("nano", *SIZES), default="nano")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--growth", nargs="+", choices=GROWTH, default=[*GROWTH])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="for networks, kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write and to go on from")
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    args = parser.parse_args(argv)
    common = {"precision": args.precision, "device": "cpu", "threads": args.threads,
              "base": str(prepare(args.work, args.size))}
    settings = {"size": args.size, "precision": args.precision, "threads": args.threads,
                "repeats": args.repeats}
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "machine": machine(), "points": {}}
    missing = [(what, n) for what in args.growth for n in GROWTH[what][0]
               if str(n) not in results["points"].get(what, {})]
    for what, n in tqdm(missing, unit="point", disable=None):
        case = GROWTH[what][1](n) | common
        results["points"].setdefault(what, {})[str(n)] = measure(case, args.repeats)
        write_text(args.out, json.dumps(results, indent=1) + "\n")
    for what, its in results["points"].items():
        print(what, *(f"{n}: {point['cpu_seconds']:.3g} s, {point['mb']:.0f} MB;"
                      for n, point in its.items()))
    if args.figure:
        write_bytes(args.figure, png_bytes(figure(results["points"])))


if __name__ == "__main__":
    main()
