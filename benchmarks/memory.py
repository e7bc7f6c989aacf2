"""What a training step's memory is made of, full size; and how much of it is freed, yet still held.

    python benchmarks/memory.py --work runs/compare --out benchmarks/results/memory.json

Each case is measured in a process of its own, as `compare.py` does, once with glibc's defaults and
once with every large block given back to the system when freed. Not all parts are there at once:
gradients come when what the backward needs goes. Linux with glibc alone.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sides  # noqa: E402
from compare import cases, prepare  # noqa: E402

STEPS = 3  # timed, after one to warm up
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # bytes: larger blocks are mapped and unmapped
CASES = {name: cases()[name] for name in (
    "train-1-bf16", "train-4-bf16", "train-1-float32", "train-4-float32")}


def parts(case: dict) -> dict:
    """MB of a training step's peak by what it is for, and a step's processor seconds."""
    torch.set_num_threads(case["threads"])
    imported = sides.memory_mb("VmRSS")
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # any optimizer imports torch's compiler
    compiler = sides.memory_mb("VmRSS") - imported
    run = sides.our_train(case)
    transformer, inert = run.transformer, run.transformer.inert_layers()
    run()
    sides.forget_peak("cpu")
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    peak = sides.memory_mb("VmHWM")
    parameters = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    weights = sum(p.nbytes for name, p in transformer.named_parameters()
                  if not p.requires_grad and not name.startswith(tuple(inert)))
    trained = sum(p.nbytes for p in transformer.parameters() if p.requires_grad)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    found = {"imported": imported, "compiler": compiler, "weights": weights / 1e6,
             "trained": 4 * trained / 1e6,  # themselves, their gradients, AdamW's two moments
             "kept": sum(kept.values()) / 1e6}
    return found | {"rest": peak - sum(found.values()), "peak": peak,
                    "cpu_seconds": statistics.median(seconds)}


def alone(function, argument, variables: dict):
    """function(argument) in a new process that starts with these new variables of the environment."""
    os.environ.update(variables)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, (argument,))
    finally:
        for name in variables:
            del os.environ[name]


def main(argv=None) -> None:
    from first_run import commit, machine
    from pixcell_min.checkpoint import write_text
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="full", help="of compare.py")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="for networks, kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    base = str(prepare(args.work, args.size))
    results = {}
    for name, case in tqdm(CASES.items(), unit="case", disable=None):
        case = case | {"base": base, "device": "cpu", "threads": args.threads}
        results[name] = {"usual": alone(parts, case, {}),
                         "given back at once": alone(parts, case, AT_ONCE)}
    write_text(args.out, json.dumps({
        "size": args.size, "threads": args.threads, "commit": commit(), "machine": machine(),
        "cases": results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
