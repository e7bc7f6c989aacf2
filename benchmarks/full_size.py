"""Load, train, sample and embed at full size with random weights: seconds and peak memory of each.

    python benchmarks/full_size.py

writes benchmarks/results/full_size_CPU.json. PixCell-256, PixCell-1024, the SD 3.5 VAE and UNI2-h
are first written at random in the released layout under --work (7.9 GB, `make_random_snapshot`) and
deleted at the end. Each measure runs in a process of its own: one call to warm up, then --repeats
timed ones. What an interrupted run has measured lies under --work and is not measured again. Times
are figures of one machine, as busy as `load_average` says. Linux alone tells the peak memory.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import train  # noqa: E402
from first_run import commit, machine  # noqa: E402
from pixcell_min.base import (encoder_folder, load_encoder, load_pixcell_base, load_vae,  # noqa: E402
                              vae_weights)
from pixcell_min.batches import Batch  # noqa: E402
from pixcell_min.checkpoint import read_json, write_text  # noqa: E402
from pixcell_min.config import Config  # noqa: E402
from pixcell_min.features import encode_images  # noqa: E402
from pixcell_min.precision import autocast  # noqa: E402
from pixcell_min.tools.make_random_snapshot import TRANSFORMERS, write_snapshot  # noqa: E402
from pixcell_min.training import diffusion_loss, optimizer_step  # noqa: E402
from pixcell_min.transformer import PixCellTransformer, TransformerConfig  # noqa: E402
from pixcell_min.uni import TileEncoder  # noqa: E402
from pixcell_min.vae import AutoencoderKL, VAEConfig  # noqa: E402
from sides import memory_mb  # noqa: E402

SMALL, LARGE = "pixcell-256", "pixcell-1024"
STEPS, RANK = 20, 8
# For the tests: seconds instead of an hour. The large one's tiles are decoded in parts, too.
TINY = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_channels": 16}
TINY_SIZES = {SMALL: TransformerConfig(sample_size=8, **TINY),
              LARGE: TransformerConfig(sample_size=72, caption_num_tokens=16, **TINY)}
TINY_VAE = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
TINY_ENCODER = {"img_size": 28, "depth": 1, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 4.0,
                "reg_tokens": 2}


# ---------------------------------------------------------------- what is measured
# Each takes the folder of weights, prepares, and gives what is timed.


def loading(part: str, dtype: torch.dtype, weights: Path):
    """One network from its file, in a dtype, every number of it read once."""
    base = weights / SMALL
    load = {"transformer": lambda: PixCellTransformer.from_pretrained(base / "transformer", dtype),
            "vae": lambda: AutoencoderKL.from_pretrained(base / "vae", vae_weights(base), dtype),
            "encoder": lambda: TileEncoder.from_pretrained(encoder_folder(base), dtype)}[part]
    return lambda: [tensor.sum() for tensor in load().state_dict().values()]


def opening(weights: Path):
    """PixCell-256 as the scripts open it: mapped, not yet read by the network, its file hashed."""
    return lambda: load_pixcell_base(weights / SMALL, "cpu", "no")


def training(name: str, precision: str, batch_size: int, checkpointing: bool, weights: Path):
    """An optimizer step of LoRA and adapter, one micro-batch."""
    pipeline = load_pixcell_base(weights / name, "cpu", precision)
    state = train.make_trainable(Config(
        base=str(weights / name), lora_rank=RANK, gradient_checkpointing=checkpointing), pipeline,
        report=lambda line: None)
    config, generator = pipeline.transformer.config, torch.Generator().manual_seed(0)
    shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
    batch = Batch(torch.randn(shape, generator=generator),
                  torch.randn(batch_size, config.caption_num_tokens, config.caption_channels,
                              generator=generator),
                  torch.randn(shape, generator=generator),
                  torch.randint(1000, (batch_size,), generator=generator),
                  torch.zeros(batch_size, dtype=torch.bool))
    state.transformer.train(), state.adapter.train()

    def step():
        report = optimizer_step(
            lambda its: diffusion_loss(state.transformer, state.adapter, pipeline.schedule, its,
                                       pipeline.dtype),
            [batch], batch_size, state.optimizer, state.scaler, 1.0)
        assert torch.isfinite(torch.tensor(report.loss)), report

    return step


def sampling(precision: str, weights: Path):
    """A guided image of PixCell-256, decoding included."""
    pipeline = load_pixcell_base(weights / SMALL, "cpu", precision)
    embedding = torch.randn(pipeline.transformer.config.caption_channels,
                            generator=torch.Generator().manual_seed(0))
    return lambda: pipeline(embedding, num_inference_steps=STEPS, scheduler="dpmpp_2m")


def forward(precision: str, weights: Path):
    """A forward of PixCell-1024 for one image and one condition of sixteen tokens."""
    pipeline = load_pixcell_base(weights / LARGE, "cpu", precision)
    config, generator = pipeline.transformer.config, torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size,
                          generator=generator)
    tokens = torch.randn(1, config.caption_num_tokens, config.caption_channels, generator=generator)

    @torch.no_grad()
    def run():
        with autocast(pipeline.device, pipeline.dtype):
            output = pipeline.transformer(latents, 500, tokens)
        assert output.isfinite().all()

    return run


def encoding(name: str, weights: Path):
    """Latents of one tile, in float32 as features are."""
    vae, images = load_vae(weights / name, "cpu"), [_tile(name, weights)]
    return lambda: encode_images(images, vae, lambda its: torch.zeros(1))


def decoding(name: str, weights: Path):
    """One image from its latents, in float32; a large one in overlapping parts."""
    pipeline = load_pixcell_base(weights / name, "cpu", "no")
    config = pipeline.transformer.config
    latents = torch.randn(1, config.in_channels, config.sample_size, config.sample_size,
                          generator=torch.Generator().manual_seed(0))
    return lambda: pipeline.decode(latents)


def embedding(name: str, weights: Path):
    """The tokens of one tile, in float32 as features are."""
    encoder, tile = load_encoder(weights / name, "cpu"), _tile(name, weights)
    return lambda: encoder(tile)


def _tile(name, weights):
    """A tile of noise, of the side that the base takes."""
    side = 8 * read_json(weights / name / "transformer" / "config.json")["sample_size"]
    pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


WORDS = {"float32": ("no", torch.float32), "bf16": ("bf16", torch.bfloat16)}
MEASURES = {
    **{f"load {part}, {word}": partial(loading, part, dtype)
       for part in ("transformer", "vae", "encoder") for word, (_, dtype) in WORDS.items()},
    "open base 256, float32": opening,
    **{f"train 256, batch {batch}, {word}": partial(training, SMALL, precision, batch, False)
       for word, (precision, _) in WORDS.items() for batch in (1, 4)},
    **{f"sample 256, {STEPS} steps, {word}": partial(sampling, precision)
       for word, (precision, _) in WORDS.items()},
    **{f"vae {what} {name.removeprefix('pixcell-')}, float32": partial(function, name)
       for name in (SMALL, LARGE) for what, function in (("encode", encoding), ("decode", decoding))},
    **{f"embed {name.removeprefix('pixcell-')}, float32": partial(embedding, name)
       for name in (SMALL, LARGE)},
    **{f"forward 1024, {word}": partial(forward, precision)
       for word, (precision, _) in WORDS.items()},
    "train 1024, batch 1, checkpointing, bf16": partial(training, LARGE, "bf16", 1, True),
}


def measure(name: str, weights: Path, repeats: int) -> dict:
    """Seconds of each timed call, and how far memory grew above that of the imports, in MB.

    repeats 0: of the first call, not warmed up.
    """
    imported, seconds = memory_mb("VmRSS"), []
    run = MEASURES[name](weights)
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:] or seconds), "all_seconds": seconds[1:],
            "first_seconds": seconds[0], "peak_mb": memory_mb("VmHWM") - imported,
            "imported_mb": imported}


# ---------------------------------------------------------------- all of them


def write_weights(weights: Path, tiny: bool) -> dict[str, int]:
    """Both snapshots, where they are not there yet; → bytes of each file of weights."""
    for name, sizes in (TINY_SIZES if tiny else TRANSFORMERS).items():
        write_snapshot(weights, name, sizes, TINY_VAE if tiny else VAEConfig(),
                       TINY_ENCODER if tiny else None)
    return {str(path.relative_to(weights)): path.stat().st_size
            for ending in ("*.safetensors", "*.bin") for path in sorted(weights.rglob(ending))}


def measure_apart(name: str, options) -> dict:
    """`measure` in a process of its own, or why it failed, in a line."""
    load = os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, "--work", options.work,
         "--repeats", str(options.repeats)], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1]}
    return {**json.loads(done.stdout.splitlines()[-1]), "load_average": load}


def table(result: dict) -> str:
    """The measures as a Markdown table, as the README has it."""
    lines = ["| measure | seconds | peak memory, GB |", "|---|---|---|"]
    return "\n".join(lines + [
        f"| {name} | {its['seconds']:.3g} | {its['peak_mb'] / 1e3:.2f} |"
        for name, its in result["measures"].items() if "failed" not in its]) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "full_size",
                        help="folder for weights and unfinished results")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: by the CPU's name")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each measure; 0: the first alone")
    parser.add_argument("--only", nargs="+", choices=MEASURES, metavar="MEASURE", default=MEASURES)
    parser.add_argument("--note", help="a sentence for the file, e.g. what else ran meanwhile")
    parser.add_argument("--keep", action="store_true", help="do not delete the weights at the end")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: does it run at all?")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    weights, finished = options.work / "random_weights", options.work / "full_size.json"
    if options.measure:
        print(json.dumps(measure(options.measure, weights, options.repeats)))
        return 0
    file_bytes = write_weights(weights, options.tiny)
    # Unfinished results of other settings are none of these.
    settings = {"machine": machine(), "commit": commit(), "tiny": options.tiny,
                "repeats": options.repeats, "file_bytes": file_bytes}
    stored = read_json(finished) if finished.exists() else {}
    results = stored.get("measures", {}) if stored.get("settings") == settings else {}
    for name in tqdm([name for name in options.only if name not in results], unit="measure"):
        tqdm.write(name)
        results[name] = measure_apart(name, options)
        tqdm.write(json.dumps(results[name]))
        if "failed" not in results[name]:
            write_text(finished, json.dumps({"settings": settings, "measures": {
                key: its for key, its in results.items() if "failed" not in its}}))
    cpu = re.sub(r"\W+", "_", settings["machine"]["cpu"]).strip("_").lower()
    out = options.out or ROOT / "benchmarks" / "results" / f"full_size_{cpu}.json"
    result = {**settings, "note": options.note, "measures": {
        name: results[name] for name in MEASURES if name in results}}
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"{table(result)}\n{out}")
    if any("failed" in its for its in results.values()):
        return 1
    finished.unlink(missing_ok=True)
    if not options.keep:
        shutil.rmtree(weights)
    return 0


if __name__ == "__main__":
    sys.exit(main())
