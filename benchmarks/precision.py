"""How far do float16 and bfloat16 losses lie from float32's? The same steps, drawn from the same seed.

    python benchmarks/precision.py --out benchmarks/results/precision.json
    python benchmarks/precision.py --precisions bf16 --work runs/precision --out precision.json

Trains the embedded base on procedural tiles with `train.py`, once per precision, and compares the
loss of every step with float32's of the same step: same tiles, noise and timesteps. What is left is
rounding, and what it has done to the weights since the start. What is in --work is not run again; a
run that was stopped goes on. float16 is slow on a CPU without fast float16 products.
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

BLOCK = 10  # steps whose mean loss is compared: single ones may be next to nothing
BAND = 0.005  # of float32's mean loss over the same steps
TILES, TILES_SEED = 9, 4 * 10**9
FLAGS = ["--batch-size", "2", "--gradient-accumulation-steps", "1", "--no-dihedral", "--warmup-steps",
         "20", "--learning-rate", "1e-3", "--adapter-learning-rate", "1e-3", "--lr-schedule",
         "constant", "--loss-weighting", "min_snr", "--min-snr-gamma", "5", "--sample-count", "0",
         "--save-every", "0", "--validate-every", "0", "--validation-fraction", "0.25", "--seed", "0"]


def losses(work: Path, precision: str, steps: int) -> list[dict]:
    """The log of one run."""
    run, log = work / precision, work / precision / "metrics.jsonl"
    command = ["--resume", "--out", run] if any(run.glob("states/step-*.pt")) else [
        *FLAGS, "--data", work / "tiles", "--cache", work / "cache", "--out", run,
        "--max-train-steps", str(steps), "--mixed-precision", precision]
    if not (run / f"states/step-{steps:08d}.pt").exists():
        subprocess.run([sys.executable, ROOT / "train.py", *command], check=True, cwd=ROOT,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in log.read_text().splitlines()]


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
        apart = relative_distances(curves[name], curves["no"])
        result[name] = {
            "largest": max(apart), "median": statistics.median(apart),
            "within_band": max(apart) <= BAND, "validation": abs(ends[name][-1] - ends["no"][-1]) / ends["no"][-1],
            "skipped": sum(line.get("skipped", False) for line in logs[name]),
            "validation_loss": ends[name], "loss": curves[name]}
    return result


def relative_distances(losses, reference) -> list[float]:
    """How far the mean loss of each BLOCK of steps lies from the reference's, in parts of it."""
    assert len(losses) == len(reference)
    blocks = [[sum(curve[i:i + BLOCK]) for curve in (losses, reference)]
              for i in range(0, len(losses), BLOCK)]
    return [abs(own - other) / other for own, other in blocks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"])
    parser.add_argument("--work", type=Path, help="folder for runs and cache, kept; default: none")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare((args.work or Path(folder)).resolve(), args.steps, args.precisions)
    for curve in result.values():
        curve["loss"] = [round(loss, 6) for loss in curve["loss"]]
    write_text(args.out, json.dumps({
        "steps": args.steps, "flags": " ".join(FLAGS), "band": BAND, "machine": machine(),
        "threads_of_runs": os.environ.get("OMP_NUM_THREADS"), "relative_to_float32": result}) + "\n")
    print({name: {key: value for key, value in its.items() if "loss" not in key}
           for name, its in result.items()})


if __name__ == "__main__":
    main()
