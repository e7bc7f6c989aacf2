"""A checkpoint of the authors' training code → a base folder, PixArt's names → released ones.

    python -m pixcell_min.tools.original pixcell_256.ckpt weights/pixcell-256

A folder is written once instead of a second way to load being kept: a base has one layout, and the
hash that LoRA files name is that of its transformer file. VAE and encoder are not in it.
"""

import json
import re
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from pixcell_min import transformer, vae
from pixcell_min.checkpoint import BROKEN_PICKLE, load_strict, save_tensors, write_text
from pixcell_min.checks import OneLineParser, one_line
from pixcell_min.exports import write_folder
from pixcell_min.released import SCHEDULER

TIMESTEP = "adaln_single.emb.timestep_embedder"
# {module or table: its new names}; several: rows are split among them, in this order.
NAMES = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": (f"{TIMESTEP}.linear_1",), "t_embedder.mlp.2": (f"{TIMESTEP}.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "y_embedder.y_embedding": ("caption_projection.uncond_embedding",),
    "final_layer.linear": ("proj_out",), "final_layer.scale_shift_table": ("scale_shift_table",),
}
BLOCK_NAMES = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
}
RECOMPUTED = "pos_embed"  # PixArt's saved position code: the released files leave it out, as we do


def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PixArt's names → the released ones; fused qkv and kv are split by rows, as views.

    Raises: ValueError naming a key that has no new name, or rows that cannot be split evenly.
    """
    renamed = {}
    for key, tensor in tensors.items():
        if key == RECOMPUTED:
            continue
        block, module, leaf = re.fullmatch(
            r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", key, re.DOTALL).groups("")
        names = (BLOCK_NAMES if block else NAMES).get(module)
        if names is None:
            raise ValueError(f"{key!r} is no name of PixArt's that is known here; expected "
                             "blocks.N.attn.qkv.weight and the like")
        if tensor.ndim == 0 or tensor.shape[0] % len(names):
            raise ValueError(f"{key}: {tuple(tensor.shape)} cannot be split into {len(names)}")
        for name, part in zip(names, tensor.chunk(len(names))):
            renamed[f"{'transformer_' if block else ''}{block}{name}{leaf}"] = part
    return renamed


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .ckpt, memory-mapped; flat, or under `state_dict`. Raises: ValueError: code."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file; expected one of torch.save")
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile
        content = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise ValueError(f"{path}: truncated or no checkpoint file; expected one of torch.save"
                         ) from None
    except BROKEN_PICKLE:
        raise ValueError(f"{path}: refused, broken or more than tensors and numbers") from None
    if isinstance(content, dict) and "state_dict_ema" in content:
        print(f"original: note: {path} also holds averaged weights (state_dict_ema), which are not "
              "taken", file=sys.stderr)
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(
            isinstance(key, str) and isinstance(tensor, torch.Tensor)
            for key, tensor in content.items()):
        raise ValueError(f"{path}: expected a dict of tensors, or one under 'state_dict'")
    return content


def write_base(path, folder, config=transformer.TransformerConfig()) -> None:
    """Write transformer/, vae/config.json and scheduler/ of a .ckpt, PixCell-256's unless `config`.

    Raises: ValueError if the folder exists or the tensors are not all that the network has.
    """
    path, folder = Path(path), Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: exists; name a new folder")
    with torch.device("meta"):
        model = transformer.PixCellTransformer(config)
    try:
        tensors = rename(read_checkpoint(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    load_strict(model, tensors, path)
    write_folder(folder, lambda new: (
        save_tensors(new / "transformer" / transformer.WEIGHTS_NAME, model.state_dict()),
        *(write_text(new / name, json.dumps(content, indent=2) + "\n") for name, content in {
            "transformer/config.json": {**transformer.FIXED, **asdict(config)},
            "vae/config.json": {**vae.FIXED, **asdict(vae.VAEConfig())},
            "scheduler/scheduler_config.json": SCHEDULER}.items())))


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    parser = OneLineParser(prog="original", description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="pixcell_256.ckpt")
    parser.add_argument("folder", type=Path, help="new base folder, such as weights/pixcell-256")
    options = parser.parse_args(argv)
    try:
        write_base(options.checkpoint, options.folder)
    except (ValueError, OSError) as error:
        print(f"original: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"original: interrupted; {options.folder} was not written", file=sys.stderr)
        return 130
    print(f"{options.folder}: written; put VAE and encoder beside it, see weights/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
