"""How far do float16 and bfloat16 losses lie from float32's? The same steps, drawn from the same seed.

    python benchmarks/precision.py --out benchmarks/results/precision.json

Trains the embedded base on procedural tiles with `train.py`, once per precision, and compares the
loss of every step with float32's of the same step: same tiles, noise and timesteps. What is left is
rounding, and what it has done to the weights since the start.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from first_run import machine  # noqa: E402
from pixcell_min.checkpoint import write_text  # noqa: E402
from pixcell_min.tools.synthetic import SECOND, write_dataset  # noqa: E402

BAND = 0.02  # of float32's loss at the same step, whatever the step
TILES, TILES_SEED = 9, 4 * 10**9
FLAGS = ["--batch-size", "2", "--gradient-accumulation-steps", "1", "--no-dihedral", "--warmup-steps",
         "20", "--learning-rate", "1e-3", "--adapter-learning-rate", "1e-3", "--lr-schedule",
         "constant", "--min-snr-gamma", "5", "--sample-count", "0", "--save-every", "0",
         "--validate-every", "0", "--validation-fraction", "0.25", "--seed", "0"]


def losses(work: Path, precision: str, steps: int) -> list[dict]:
    """The log of one run."""
    run = work / precision
    subprocess.run([sys.executable, ROOT / "train.py", *FLAGS, "--data", work / "tiles", "--cache",
                    work / "cache", "--out", run, "--max-train-steps", str(steps),
                    "--mixed-precision", precision], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(work: Path, steps: int, precisions=("bf16", "fp16")) -> dict:
    """{precision: how far from float32's losses, step by step, and in validation}."""
    if not (work / "tiles").exists():
        write_dataset(work / "tiles", TILES, SECOND, TILES_SEED)
    logs = {name: losses(work, name, steps) for name in ("no", *precisions)}
    curves = {name: [line["loss"] for line in log if "loss" in line and not line["skipped"]]
              for name, log in logs.items()}
    ends = {name: [line["validation_loss"] for line in log if "validation_loss" in line]
            for name, log in logs.items()}
    result = {"float32": {"validation_loss": ends["no"], "loss": curves["no"]}}
    for name in precisions:
        apart = [abs(loss - reference) / reference
                 for loss, reference in zip(curves[name], curves["no"], strict=True)]
        result[name] = {
            "largest": max(apart), "median": statistics.median(apart),
            "largest_of_last_quarter": max(apart[-steps // 4:]),
            "validation": abs(ends[name][-1] - ends["no"][-1]) / ends["no"][-1],
            "skipped": sum(line.get("skipped", False) for line in logs[name]),
            "validation_loss": ends[name], "loss": curves[name]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), args.steps)
    for curve in result.values():
        curve["loss"] = [round(loss, 6) for loss in curve["loss"]]
    write_text(args.out, json.dumps({
        "steps": args.steps, "flags": " ".join(FLAGS), "band": BAND, "machine": machine(),
        "threads_of_runs": os.environ.get("OMP_NUM_THREADS"), "relative_to_float32": result}) + "\n")
    print({name: {key: value for key, value in its.items() if "loss" not in key}
           for name, its in result.items()})


if __name__ == "__main__":
    main()
