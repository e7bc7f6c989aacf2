"""Random weights in the released layout, to try full-size runs without the gated files.

    python -m pixcell_min.tools.make_random_snapshot pixcell-256 weights/random
    python -m pixcell_min.tools.make_random_snapshot pixcell-1024 weights/random --dtype bfloat16

writes OUT/pixcell-256 (or -1024), OUT/sd3-vae and OUT/uni2-h, laid out as `weights/README.md` says:
5.5 GB in float32, names, shapes and file formats as released. What they draw is noise. One tensor
at a time is drawn and written; files appear whole. Weights that are there already are kept, with a
note.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pixcell_min import transformer, vae
from pixcell_min.checkpoint import read_tensors, replace_file, write_text
from pixcell_min.checks import OneLineParser, nonnegative_int, one_line, one_of
from pixcell_min.released import SCHEDULER
from pixcell_min.transformer import PixCellTransformer, TransformerConfig
from pixcell_min.uni import ARCHITECTURE, IMAGENET_MEAN, IMAGENET_STD, UNI2H_ARGS, TileEncoder
from pixcell_min.vae import AutoencoderKL, VAEConfig

TRANSFORMERS = {
    "pixcell-256": TransformerConfig(),
    "pixcell-1024": TransformerConfig(
        sample_size=128, caption_num_tokens=16, interpolation_scale=2)}
DTYPES = {"float32": ("F32", torch.float32), "float16": ("F16", torch.float16),
          "bfloat16": ("BF16", torch.bfloat16)}
BIAS = 0.02  # standard deviation of biases


def main(argv=None) -> int:
    """Run the command line; → exit code: 0, 2 after a one-line error, 130 after Ctrl-C."""
    parser = OneLineParser(prog="make_random_snapshot", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=one_of(*TRANSFORMERS), help=" or ".join(TRANSFORMERS))
    parser.add_argument("out", type=Path, help="folder to write the three folders to")
    parser.add_argument("--dtype", type=one_of(*DTYPES), default="float32",
                        help="of the numbers; default float32, as released")
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="of the numbers; default 0")
    args = parser.parse_args(argv)
    try:
        base = write_snapshot(args.out, args.model, TRANSFORMERS[args.model], VAEConfig(), None,
                              args.dtype, args.seed)
    except (ValueError, OSError) as error:
        print(f"make_random_snapshot: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_random_snapshot: interrupted; finished files are kept, the same command writes "
              "the others", file=sys.stderr)
        return 130
    print(f"random weights; use them with --base {base}")
    return 0


def write_snapshot(out, name: str, sizes: TransformerConfig, vae_sizes: VAEConfig, encoder_args,
                   dtype: str = "float32", seed: int = 0) -> Path:
    """Write the three folders; → the base's, `out/name`. encoder_args: None for UNI2-h's own.

    Raises: ValueError if something cannot be written.
    """
    out = Path(out)
    base, uni = out / name, out / "uni2-h"
    # As released, without its arguments, where they are UNI2-h's.
    sized = {"model_args": UNI2H_ARGS | encoder_args} if encoder_args else {}
    with torch.device("meta"):
        parts = [  # weights, network, {configuration file: content}
            (base / "transformer" / transformer.WEIGHTS_NAME, PixCellTransformer(sizes), {
                base / "transformer" / "config.json": transformer.FIXED | asdict(sizes),
                base / "vae" / "config.json": vae.FIXED | asdict(vae_sizes),
                base / "scheduler" / "scheduler_config.json": SCHEDULER}),
            (out / "sd3-vae" / vae.WEIGHTS_NAME, AutoencoderKL(vae_sizes), {}),
            (uni / "pytorch_model.bin", TileEncoder(encoder_args).vit, {
                uni / "config.json": {
                    "architecture": ARCHITECTURE, "num_classes": 0, **sized,
                    "pretrained_cfg": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}}})]
    for path, network, configs in parts:
        if path.exists():
            print(f"kept: {path}")  # shared by two snapshots, or not ours
            continue
        for file, content in configs.items():
            write_text(file, json.dumps(content, indent=2) + "\n")
        write = write_safetensors if path.suffix == ".safetensors" else write_pickle
        replace_file(path, partial(write, network.state_dict(), dtype, seed, path.name))
    return base


def random_tensor(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """A float32 tensor of the shape of `like`, drawn from (seed, name) alone.

    Weights N(0, 1/fan-in), so that activations keep their size; scales of norms and layers 1, other
    vectors N(0, BIAS²). What a network computes itself (y_pos_embed) is taken from it.
    """
    if not like.is_meta:
        return like.float()
    if like.ndim == 1 and name.endswith((".weight", ".gamma")):
        return torch.ones(like.shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    size = BIAS if like.ndim == 1 else like[0].numel() ** -0.5
    return torch.randn(like.shape, generator=generator) * size


def write_safetensors(like: dict, dtype: str, seed: int, label: str, path) -> None:
    """A safetensors file of random tensors like these, written one by one."""
    code, kind = DTYPES[dtype]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in like.items():
        end = at + tensor.numel() * kind.itemsize
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # numbers start at a multiple of 8 bytes
    with open(path, "wb") as file, tqdm(
            total=at, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in like.items():
            drawn = random_tensor(name, tensor, seed).to(kind).contiguous()
            file.write(drawn.flatten().view(torch.uint8).numpy())
            bar.update(drawn.nbytes)


def write_pickle(like: dict, dtype: str, seed: int, label: str, path) -> None:
    """The same as `torch.save` writes it, from a safetensors file that is memory-mapped."""
    mapped = Path(path).with_suffix(".safetensors")
    try:
        write_safetensors(like, dtype, seed, label, mapped)
        with open(path, "wb") as file:  # given a path, torch writes its random name into the file
            torch.save(read_tensors(mapped)[0], file)
    finally:
        mapped.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
