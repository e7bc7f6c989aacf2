"""LoRA written for other tools: a PEFT folder, diffusers, kohya, or this package's own file.

    folded: B ← s·B, alpha = R        so that a reader that ignores alpha is right as well

Whatever was read by `formats.py` can be written; where it came from is kept in the safetensors
header and in a JSON file of our own, never in PEFT's configuration. What one call writes appears
whole or not at all, but for a kill between two moves. Must be read alike by peft 0.21 and
diffusers 0.42.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch

from pixcell_min.checkpoint import read_json, save_tensors, write_text
from pixcell_min.formats import (DIFFUSERS_CONFIG, DIFFUSERS_PREFIX, KOHYA_PREFIX, PEFT_CONFIG,
                                 PEFT_WEIGHTS, LoRAFile)
from pixcell_min.lora import PEFT_PREFIX

FORMATS = ("peft", "diffusers", "kohya", "native")
PROVENANCE = "pixcell_min.json"  # in a PEFT folder; beside FILE.safetensors it is FILE.json
# What diffusers passes on to LoraConfig, whose every version since 0.6 knows these.
DIFFUSERS_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
PASSED_OVER = ("scheduler", "optimizer", "checkpoint")  # diffusers skips files named so


def write_lora(lora: LoRAFile, path, form: str, overwrite=False) -> list[tuple]:
    """Write one of FORMATS; → [(key, shape, scale a reader applies to its layer's B·A)].

    path: a new folder for peft, else a file ending in .safetensors. Tensors are written in float32.
    Raises: ValueError on another ending or name, an existing path without `overwrite`, no space.
    """
    path = Path(path)
    targets = [path] if form == "peft" else [path, path.with_suffix(".json")]
    if form != "peft" and path.suffix != ".safetensors":
        raise ValueError(f"{path}: a {form} file must end in .safetensors")
    if form == "diffusers" and any(word in path.name for word in PASSED_OVER):
        raise ValueError(f"{path}: diffusers passes over files named {', '.join(PASSED_OVER)}; "
                         "choose another name")
    for target in targets:
        if target.exists() and not (overwrite and _replaceable(target, form)):
            raise ValueError(f"{target}: exists; --overwrite replaces files and PEFT folders as "
                             "written here, that hold nothing else; or choose another name")
    tensors, own, scales = _encode(lora, form)
    provenance = json.dumps({**lora.header, "written_as": form, "read_from": lora.format}, indent=1)
    header = {**lora.header, **own}
    if form == "peft":
        write_folder(path, lambda folder: (
            save_tensors(folder / PEFT_WEIGHTS[0], tensors, header),
            write_text(folder / PEFT_CONFIG, json.dumps(peft_config(lora), indent=1) + "\n"),
            write_text(folder / PROVENANCE, provenance + "\n")))
    else:
        write_together(targets, lambda folder: (
            save_tensors(folder / path.name, tensors, header),
            write_text((folder / path.name).with_suffix(".json"), provenance + "\n")))
    return [(key, tuple(tensor.shape), scales[key]) for key, tensor in tensors.items()]


def _replaceable(target, form):
    """Whether nothing but a LoRA and what this module writes beside it would be lost."""
    if form == "peft":
        return target.is_dir() and {PEFT_CONFIG} <= {path.name for path in target.iterdir()} <= {
            *PEFT_WEIGHTS, PEFT_CONFIG, PROVENANCE}
    return target.is_file() and (
        target.suffix == ".safetensors" or "written_as" in read_json(target))


def peft_config(lora: LoRAFile) -> dict:
    """PEFT's adapter_config.json: fields that peft has had since 0.6, layers by their full names.

    rsLoRA is said where every layer has it; where some have, alpha is what scales them alike.
    """
    rslora = all(its["use_rslora"] for its in lora.layers.values())
    ranks = {name: its["rank"] for name, its in lora.layers.items()}
    alphas = {name: its["alpha"] if rslora else lora.scaling(name) * its["rank"]
              for name, its in lora.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {"peft_type": "LORA", "task_type": None, "auto_mapping": None,
            "base_model_name_or_path": lora.header.get("base"), "revision": None,
            "inference_mode": True, "r": rank, "lora_alpha": alpha,
            "lora_dropout": max(its["dropout"] for its in lora.layers.values()),
            # Full names: the end to_q alone would name self- and cross-attention of every block.
            "target_modules": list(lora.layers),
            "rank_pattern": {name: its for name, its in ranks.items() if its != rank},
            "alpha_pattern": {name: its for name, its in alphas.items() if its != alpha},
            "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None,
            **({"use_rslora": True} if rslora else {})}


def folded(lora: LoRAFile) -> LoRAFile:
    """The same update with alpha = R in every layer: the scaling goes into B, in float32."""
    state = {key: tensor.float() * (lora.scaling(key.removesuffix(".lora_B.weight"))
                                    if key.endswith(".lora_B.weight") else 1)
             for key, tensor in lora.state.items()}
    layers = {name: {**its, "alpha": its["rank"], "use_rslora": False}
              for name, its in lora.layers.items()}
    return LoRAFile(lora.format, layers, state, lora.header)


def _encode(lora, form):
    """(tensors, the format's own header entries, {key: scale of its layer when read})."""
    lora = folded(lora) if form == "diffusers" else lora
    tensors, scales, own = {}, {}, {}
    for key, tensor in lora.state.items():
        name, _, part = key.rpartition(".lora_")
        if form == "kohya":
            short = KOHYA_PREFIX + name.replace(".", "_")
            key = f"{short}.lora_{'down' if part == 'A.weight' else 'up'}.weight"
            alpha = lora.scaling(name) * lora.layers[name]["rank"]
            tensors[f"{short}.alpha"] = torch.tensor(alpha)
            scales[f"{short}.alpha"] = lora.scaling(name)
        else:
            key = (DIFFUSERS_PREFIX if form == "diffusers" else PEFT_PREFIX) + key
        tensors[key], scales[key] = tensor.float(), lora.scaling(name)
    if form == "native":
        own = {"lora_config": json.dumps(lora.layers)}
    elif form == "diffusers":
        config = peft_config(lora)
        own = {DIFFUSERS_CONFIG: json.dumps({DIFFUSERS_PREFIX + key: config[key]
                                             for key in DIFFUSERS_FIELDS})}
    return tensors, own, scales


def write_folder(path: Path, write) -> None:
    """Call `write(new folder)` beside `path`, then rename it; a folder there is replaced.

    Raises: as write_together.
    """
    write_together([path], lambda folder: write(folder / path.name))


def write_together(paths: list[Path], write) -> None:
    """Call `write(folder)`, which makes what `paths` name there; then move all into place, or none.

    paths: of files or folders, all of one folder. Raises: ValueError, with what was there in its
    place, if they cannot be written.
    """
    parent, old, moved, done = paths[0].parent, None, [], False
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{paths[0].name}.", suffix=".tmp"))
        new, old = temporary / "new", temporary / "old"
        try:
            new.mkdir(), old.mkdir()
            write(new)
            for path in paths:
                moved.append(path)
                if path.is_dir():  # no one call replaces a folder that holds files
                    os.replace(path, old / path.name)
                elif path.exists():  # a copy: a kill leaves the old file or the new one
                    shutil.copy2(path, old / path.name)
                os.replace(new / path.name, path)
            done = True
        finally:  # interrupted, too
            for path in () if done else moved:
                if not (new / path.name).exists():  # it is in place already
                    os.replace(path, new / path.name)
                if (old / path.name).exists() and not path.exists():  # else the copy may be cut
                    os.replace(old / path.name, path)
            shutil.rmtree(temporary, ignore_errors=done)
    except OSError as error:
        left = f"; what was there is in {old}" if old and old.exists() else ""
        raise ValueError(f"{paths[0]}: cannot be written ({error}){left}; free space or choose "
                         "another place") from None
