"""Weights: what is there and whole, what is missing and where to ask for it, what fits here.

    python -m pixcell_min.tools.doctor
    python -m pixcell_min.tools.doctor --base weights/pixcell-256 --hash --json

Reads headers, sizes and configurations, no weights (with `--hash` every byte of what
`tools.download` fetched); asks no network. A broken base is a line of the table, not an error.
"""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pixcell_min.base import (NANO, REPOSITORY, encoder_folder, find_base, read_schedule,
                              read_vae_config, vae_weights)
from pixcell_min.checkpoint import BROKEN_PICKLE, read_json
from pixcell_min.checks import OneLineParser, one_line
from pixcell_min.loading import build_on_meta
from pixcell_min.precision import DTYPES, choose_device, choose_dtype
from pixcell_min.released import RELEASES, how_to_get
from pixcell_min.tools.download import RECORD, damaged
from pixcell_min.transformer import WEIGHTS_NAME, PixCellTransformer, TransformerConfig
from pixcell_min.uni import TileEncoder, read_encoder
from pixcell_min.vae import AutoencoderKL

PACKAGES = ("torch", "timm", "safetensors", "einops", "numpy", "pillow", "tqdm", "pyyaml",
            "huggingface_hub")
FLOAT32 = 4  # bytes; in memory VAE and encoder are float32, the transformer in autocast's dtype
ROOM = 0.8  # share of free memory that weights may take; activations need the rest


def parse_doctor(argv=None):
    """Command line → options. Raises: SystemExit(2) after one line for a wrong flag or folder."""
    parser = OneLineParser(prog="doctor", description="Say what weights are here and what fits.")
    parser.add_argument("--base", help="this base alone; default: nano and the released ones")
    parser.add_argument("--hash", action="store_true",
                        help="also read every downloaded byte and compare hashes")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args(argv)
    if options.base is not None:
        try:
            find_base(options.base)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    return options


def main(argv=None) -> int:
    """Run the command line; 0: a base can be run, 1: none can, 2: bad input, after one line."""
    options = parse_doctor(argv)
    report = examine(options.base, options.hash)
    print(json.dumps(report, indent=1) if options.json else "\n".join(table(report)))
    return 0 if any(base["runs"] for base in report["bases"]) else 1


def examine(base=None, hashes=False) -> dict:
    """Everything the table says, as JSON: bases, releases, machine, packages."""
    names = [base] if base else [NANO, "weights/pixcell-256", "weights/pixcell-1024"]
    weights = find_base(base).parent if base else REPOSITORY / "weights"
    return {"bases": [examine_base(name) for name in names],
            "releases": [examine_release(name, weights / name, hashes) for name in RELEASES],
            "machine": machine(weights), "packages": packages()}


def examine_base(name) -> dict:
    """One base: each part's state ("whole", "broken or missing: …") and size; does it fit."""
    try:
        folder = find_base(name)
    except ValueError:
        return {"base": str(name), "folder": None, "runs": False, "parts": {}, "fit": []}
    parts = {part: _state(check, folder) for part, check in
             (("scheduler", check_scheduler), ("transformer", check_transformer),
              ("vae", check_vae), ("encoder", check_encoder))}
    whole = all(part["state"] == "whole" for part in parts.values())
    count = sum(part["parameters"] for part in parts.values())
    denoiser = parts["transformer"]["parameters"]
    return {"base": str(name), "folder": str(folder), "runs": whole, "parts": parts,
            "fit": fit(denoiser, count - denoiser, folder) if whole else []}


def _state(check, folder):
    try:
        return {"state": "whole", "parameters": check(folder)}
    except ValueError as error:
        return {"state": f"broken or missing: {one_line(error)}", "parameters": 0}


def check_scheduler(base: Path) -> int:
    """The schedule can be built. Returns 0 parameters. Raises: ValueError."""
    read_schedule(base)
    return 0


def check_transformer(base: Path) -> int:
    """Names and shapes in the file are those of its configuration. → parameters; ValueError."""
    path = base / "transformer" / "config.json"
    config = TransformerConfig.from_dict(read_json(path), path)
    model = build_on_meta(lambda: PixCellTransformer(config), path)
    return compare(model, base / "transformer" / WEIGHTS_NAME)


def check_vae(base: Path) -> int:
    """As `check_transformer`, of the VAE's configuration here and its weights wherever they lie."""
    config = read_vae_config(base)
    model = build_on_meta(lambda: AutoencoderKL(config), base / "vae" / "config.json")
    return compare(model, vae_weights(base))


def check_encoder(base: Path) -> int:
    """As `check_transformer`, of the tile encoder wherever it lies."""
    config, path = read_encoder(encoder_folder(base))
    model = build_on_meta(lambda: TileEncoder(config.get("model_args")).vit,
                          path.with_name("config.json"))
    return compare(model, path)


def compare(model: torch.nn.Module, path: Path) -> int:
    """How many values a file holds that fits the model. Raises: ValueError naming a difference."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = stored_shapes(path)
    for key in sorted(wanted.keys() ^ found.keys()):
        where = "is missing" if key in wanted else "does not belong"
        raise ValueError(f"{path}: {len(found)} tensors, expected {len(wanted)}; {key} {where}")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ValueError(f"{path}: {key} has shape {found[key]}, expected {shape}")
    return sum(value.numel() for value in model.state_dict().values())


def stored_shapes(path: Path) -> dict[str, tuple]:
    """Tensor names and shapes of a file, without its values. Raises: ValueError: missing, cut."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":  # its header must account for every byte of the file
            with safe_open(path, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        content = torch.load(path, map_location="meta", weights_only=True)
        return {key: tuple(value.shape) for key, value in content.items()}
    except (SafetensorError, *BROKEN_PICKLE) as error:
        first = (str(error).splitlines() or ["damaged"])[0][:100]
        raise ValueError(f"{path}: truncated or damaged ({first}); fetch it again") from None


def examine_release(name: str, folder: Path, hashes: bool) -> dict:
    """A release in its folder: there or not, as it was fetched or not, terms and where to ask."""
    release = RELEASES[name]
    there = [file for file in release.files if (folder / file).is_file()]
    if not there:
        state = "half fetched" if list(folder.rglob(".*.part")) else "missing"
    elif len(there) < len(release.files):
        state = f"incomplete: no {', '.join(f for f in release.files if f not in there)}"
    else:
        state = _compare_with_record(folder, hashes)
    return {"release": name, "state": state, "folder": str(folder), "licence": release.licence,
            "licence_read_at": release.source, "gated": release.gated, "page": release.page,
            "gigabytes": release.gigabytes, "get": how_to_get(name)}


def _compare_with_record(folder, hashes):
    if not (folder / RECORD).is_file():
        return "there, not by tools.download: hashes unknown"
    try:
        files = read_json(folder / RECORD).get("files", {})
        wrong = [file for file, entry in files.items()
                 if (folder / file).stat().st_size != entry["size"]]
        wrong = wrong or (damaged(folder) if hashes else [])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"there, but {RECORD} cannot be used ({error})"
    if wrong:
        return f"damaged: {', '.join(wrong)} is not what was fetched; fetch it again"
    return "whole, hashes agree" if hashes else "whole, sizes agree"


def fit(denoiser: int, others: int, folder: Path) -> list[dict]:
    """For float32, fp16 and bf16: do so many weights fit here, and is it advised?"""
    here = machine(folder)
    memory = {"cpu": here["memory_free"], "cuda": here["gpu_memory_free"]}
    device = choose_device("auto")
    advised = choose_dtype("auto", device)
    needs = {name: denoiser * (dtype.itemsize if dtype else FLOAT32) + others * FLOAT32
             for name, dtype in DTYPES.items()}
    return [{"precision": {"no": "float32"}.get(name, name), "weights_bytes": need,
             "cpu": _fits(need, memory["cpu"]), "cuda": _fits(need, memory["cuda"]),
             "advised_on": device.type if DTYPES[name] == advised else None}
            for name, need in needs.items()]


def _fits(need, free):
    return None if free is None else need <= ROOM * free


def machine(place: Path) -> dict:
    """Cores, memory, GPU, and the disk of `place`, in bytes; None: not known or not there."""
    gpu = torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if gpu else (None, None)
    disk = shutil.disk_usage(place if place.is_dir() else Path.cwd())
    return {"python": platform.python_version(), "system": platform.platform(),
            "cores": os.cpu_count(), "memory_free": free_memory(), "disk_free": disk.free,
            "gpu": torch.cuda.get_device_name() if gpu else None, "gpu_memory_free": free,
            "gpu_memory": total}


def free_memory() -> int | None:
    """Bytes that a process can still take without swapping, as Linux tells; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines
                 if line.startswith("MemAvailable:")), None)


def packages() -> dict:
    """Installed version of each package that is used; None: not installed."""
    def find(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    return {name: find(name) for name in PACKAGES}


def fit_line(row: dict) -> str:
    """One line of `fit`."""
    places = [f"{place} {'fits' if row[key] else 'DOES NOT FIT'}"
              for place, key in (("memory:", "cpu"), ("GPU:", "cuda")) if row[key] is not None]
    advice = f"; advised on {row['advised_on']}" if row["advised_on"] else ""
    size = f"{row['weights_bytes'] / 1e9:.2f} GB"
    return (f"    {row['precision']:<12}weights {size}, {', '.join(places) or 'memory unknown'}"
            f"{advice}")


def table(report: dict) -> list[str]:
    """The lines to print."""
    lines = []
    for base in report["bases"]:
        state = "ready" if base["runs"] else "not ready" if base["folder"] else "not there"
        lines.append(f"{base['base']}: {state}")
        for name, part in base["parts"].items():
            size = f", {part['parameters'] / 1e6:.1f} M values" if part["parameters"] else ""
            lines.append(f"    {name:<12}{part['state']}{size}")
        lines += [fit_line(row) for row in base["fit"]]
    for release in report["releases"]:
        gate = "gated: ask at" if release["gated"] else "open:"
        size = f"{release['gigabytes']:.2f} GB"
        lines += [f"{release['release']}: {release['state']}",
                  f"    {gate} {release['page']}; {size}; {release['get']}",
                  f"    licence: {release['licence']}"]
    here = report["machine"]
    memory, gpu = here["memory_free"], here["gpu"]
    lines.append("in memory come on top: activations (`train.py --dry-run` measures them)")
    gpu = f"{gpu}, {here['gpu_memory_free'] / 1e9:.1f} GB free" if gpu else "no CUDA GPU"
    lines.append(f"machine: {here['cores']} cores, "
                 f"memory free {f'{memory / 1e9:.1f} GB' if memory else 'unknown'}, "
                 f"disk free {here['disk_free'] / 1e9:.1f} GB, {gpu}")
    missing = sum(release["gigabytes"] for release in report["releases"]
                  if release["state"] == "missing")
    lines.append(f"what is missing takes {missing:.1f} GB: "
                 f"{'fits' if missing * 1e9 <= here['disk_free'] else 'DOES NOT FIT'} on the disk")
    lines.append(f"python {here['python']}: " + ", ".join(
        f"{name} {found or 'NOT INSTALLED'}" for name, found in report["packages"].items()))
    return lines


if __name__ == "__main__":
    sys.exit(main())
