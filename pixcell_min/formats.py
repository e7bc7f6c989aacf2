"""LoRA files of this package, PEFT, diffusers, kohya and PixCell's authors: recognised and read.

A file becomes {layer: rank, alpha, dropout, use_rslora} and {"<layer>.lora_A.weight": tensor}, its
format told by what it holds, never by its name. Several files become one of stacked ranks:
    ΔW = Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁s₁B₁ w₂s₂B₂ …]·[A₁; A₂; …]
What other readers pass over in silence (a missing alpha, a wrong prefix) is an error here. Knows
no network. `exports.py` writes. Checked against peft 0.21 and diffusers 0.42.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pixcell_min.checkpoint import read_json, read_tensors
from pixcell_min.lora import (PEFT_PREFIX, SETTINGS, check_settings, check_state, install_lora,
                              plain_linears)
from pixcell_min.peft_config import check_selected, peft_layers

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_NAME, DIFFUSERS_PREFIX = "pytorch_lora_weights.safetensors", "transformer."
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # header key of JSON, its fields prefixed as the tensors
KOHYA_PREFIX = "lora_unet_"
KOHYA_PARTS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class LoRAFile:
    """What one file says, or several stacked."""

    format: str  # native, peft, diffusers, kohya, authors or stack
    layers: dict[str, dict]  # {layer: {rank, alpha, dropout, use_rslora}}
    state: dict[str, torch.Tensor]  # "<layer>.lora_A.weight": (R, in), "….lora_B.weight": (out, R)
    header: dict[str, str]  # provenance: base_hash and whatever else a safetensors header says

    def scaling(self, layer: str) -> float:
        """What B·A of this layer is multiplied by: alpha / R, with rsLoRA alpha / √R."""
        its = self.layers[layer]
        return its["alpha"] / (math.sqrt(its["rank"]) if its["use_rslora"] else its["rank"])


def lora_files(path) -> list[Path]:
    """The files of one LoRA: its tensors, then a PEFT folder's configuration. Raises: ValueError.

    path: a file, or a folder of PEFT or diffusers.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (*PEFT_WEIGHTS, DIFFUSERS_NAME) if (path / name).is_file()]
        if len(found) != 1:
            raise ValueError(f"{path}: expected one of {', '.join(PEFT_WEIGHTS)}, {DIFFUSERS_NAME} "
                             f"in this folder, found {len(found)}; name the file")
        path = found[0]
    config = path.parent / PEFT_CONFIG
    return [path, config] if path.name in PEFT_WEIGHTS and config.is_file() else [path]


def read_lora(path, model=None, alpha=None) -> LoRAFile:
    """Read any of the formats, on the CPU, in the file's own dtype.

    model: the plain base, needed to name kohya's layers and to compare the base tensors of the
    authors' files with. alpha: for files that name none, diffusers' without metadata or tensors of
    it, kohya's and the authors' (default of these two: the rank). Raises: ValueError: missing,
    broken, ambiguous, unpaired, not finite, of another base, or changing the network in a way not
    read here.
    """
    path, *config = lora_files(path)
    tensors, header = read_tensors(path)
    if alpha is not None and (config or header.keys() & {"lora_config", DIFFUSERS_CONFIG} or any(
            key.endswith(".alpha") for key in tensors)):
        raise ValueError(f"{path}: names its own alpha; leave out --alpha")
    if config:
        state, settings = _strip(tensors, PEFT_PREFIX, path), read_json(config[0])
        if settings.get("peft_type") != "LORA":
            raise ValueError(f"{config[0]}: peft_type is {settings.get('peft_type')!r}, "
                             "expected 'LORA'")
        form, layers = "peft", peft_layers(_names(state), settings, config[0])
        check_selected(layers, settings, config[0])
    elif "lora_config" in header:
        form, state = "native", _strip(tensors, PEFT_PREFIX, path)
        layers = _native_layers(header.pop("lora_config"), path)
    elif any(key.startswith(KOHYA_PREFIX) for key in tensors):
        form, (state, layers) = "kohya", _read_kohya(tensors, model, alpha, path)
    elif any(".base_layer." in key for key in tensors):
        form, state = "authors", _read_authors(tensors, model, path)
        layers = _equal_layers(state, alpha)
    elif DIFFUSERS_CONFIG in header or any(key.startswith(DIFFUSERS_PREFIX) for key in tensors):
        form, state = "diffusers", _strip(tensors, DIFFUSERS_PREFIX, path)
        layers = _diffusers_layers(state, header.pop(DIFFUSERS_CONFIG, None), alpha, path)
    elif any(key.startswith(PEFT_PREFIX) for key in tensors):
        raise ValueError(f"{path}: unknown alpha: no readable lora_config in its header, and it is "
                         f"no {PEFT_WEIGHTS[0]} with {PEFT_CONFIG} beside it; copy the whole "
                         "folder")
    else:
        raise ValueError(f"{path}: no LoRA file known here, its first key is "
                         f"{next(iter(tensors))!r}; expected {PEFT_PREFIX}…, {DIFFUSERS_PREFIX}… "
                         f"or {KOHYA_PREFIX}…")
    _check(layers, state, model, path)
    return LoRAFile(form, layers, state, header)


def stack(files: list[tuple[LoRAFile, float]]) -> LoRAFile:
    """One LoRA equal to the weighted sum of several; weights and scalings go into B, float32.

    The header keeps what all of them say alike. Raises: ValueError if two are of different bases.
    """
    bases = {file.header["base_hash"] for file, _ in files if "base_hash" in file.header}
    if len(bases) > 1:
        raise ValueError("LoRA files of different bases cannot be combined: "
                         f"{', '.join(sorted(bases))}")
    layers, state = {}, {}
    for name in dict.fromkeys(name for file, _ in files for name in file.layers):
        parts = [(file, weight) for file, weight in files if name in file.layers]
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        state[key_a] = torch.cat([file.state[key_a].float() for file, _ in parts])  # (ΣR, in)
        state[key_b] = torch.cat([weight * file.scaling(name) * file.state[key_b].float()
                                  for file, weight in parts], dim=1)             # (out, ΣR)
        rank = len(state[key_a])
        layers[name] = {"rank": rank, "alpha": rank, "dropout": 0.0, "use_rslora": False}
    first = files[0][0].header
    common = {key: value for key, value in first.items()
              if all(file.header.get(key) == value for file, _ in files)}
    return LoRAFile("stack", layers, state, common)


def load_loras(model, files, scale=1.0, expected_base_hash=None) -> list[dict[str, str]]:
    """Wrap the layers of a plain `model` that [(path, weight)] name; → each file's header.

    A single file keeps its own rank and alpha, several are stacked. expected_base_hash: what a
    header that names its `base_hash` must say; one that names none is accepted. Raises: ValueError,
    with the model untouched, as read_lora and install_lora.
    """
    read = [(read_lora(path, model), weight) for path, weight in files]
    for (path, _), (file, _) in zip(files, read):
        made_for = file.header.get("base_hash", expected_base_hash)
        if expected_base_hash not in (None, made_for):
            raise ValueError(f"{path}: LoRA of base {made_for}, the loaded base is "
                             f"{expected_base_hash}; load the base it was trained on")
        if file.format == "authors" and expected_base_hash:  # its base tensors were compared
            file.header["base_hash"] = expected_base_hash
    (file, weight), *others = read
    if others:
        file, weight = stack(read), 1.0
    source = " + ".join(str(path) for path, _ in files)
    install_lora(model, file.layers, file.state, source, weight * scale)
    return [file.header for file, _ in read]


def load_lora(model, path, scale=1.0, expected_base_hash=None) -> dict[str, str]:
    """`load_loras` of one file or folder; → its header."""
    return load_loras(model, [(path, 1.0)], scale, expected_base_hash)[0]


# ---------------------------------------------------------------- each format's own


def _strip(tensors, prefix, path):
    for key in tensors:
        if not key.startswith(prefix):
            raise ValueError(f"{path}: LoRA key {key!r} does not begin with {prefix!r}, as the "
                             "others or the file's header say it should")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _names(state):
    """Layers with an A or a B, in the file's order; other keys are refused later, by name."""
    found = (re.fullmatch(r"(.+)\.lora_[AB]\.weight", key) for key in state)
    return list(dict.fromkeys(match[1] for match in found if match))


def _check(layers, state, model, path):
    """Pairs, shapes, numbers: against the model's layers, without a model one against another."""
    def size(key, dim):
        return state[key].shape[dim] if key in state and state[key].ndim == 2 else "?"

    if model is None:
        sizes = {name: (size(f"{name}.lora_A.weight", 1), size(f"{name}.lora_B.weight", 0))
                 for name in layers}
    else:
        linears = plain_linears(model)
        sizes = {name: (linears[name].in_features, linears[name].out_features)
                 for name in layers if name in linears}
    check_state(state, {name: (*its, layers[name]["rank"]) for name, its in sizes.items()}, path)
    for name, its in layers.items():
        check_settings(f"{path}: {name}", its["rank"], its["alpha"], its["dropout"], "kaiming")


def _rank(state, name):
    """Rows of A; of B the columns where A is missing, which is refused later, by name."""
    for part, dim in (("A", 0), ("B", -1)):
        if len(shape := getattr(state.get(f"{name}.lora_{part}.weight"), "shape", ())) == 2:
            return shape[dim]
    return "?"


def _equal_layers(state, alpha=None):
    """Settings of a file that holds none: alpha, or the rank."""
    return {name: {"rank": (rank := _rank(state, name)), "alpha": alpha or rank, "dropout": 0.0,
                   "use_rslora": False} for name in _names(state)}


def _native_layers(text, path):
    try:
        return {name: {key: its[key] for key in SETTINGS} for name, its in json.loads(text).items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: no readable lora_config in its header: unknown alpha") from None


def _diffusers_layers(state, text, alpha, path):
    if text is None:  # others write a tensor per layer, which diffusers does not read
        alphas = {key.removesuffix(".alpha"): _number(state.pop(key), key, path)
                  for key in [*state] if key.endswith(".alpha")}
        layers = _equal_layers(state, alpha)
        if not alphas and alpha is None:
            raise ValueError(f"{path}: names no alpha (no {DIFFUSERS_CONFIG} in its header): "
                             "diffusers takes alpha = rank, whatever it was; name it by "
                             "pixcell_min.tools.convert --alpha")
        _check_alphas(alphas, layers, path)
        if unsaid := [name for name in layers if alphas and name not in alphas]:
            raise ValueError(f"{path}: has alpha tensors, but none for {unsaid[0]!r}")
        return {name: its | {"alpha": alphas.get(name, its["alpha"])}
                for name, its in layers.items()}
    try:
        config = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: {DIFFUSERS_CONFIG} in its header is no JSON object") from None
    return peft_layers(_names(state), _strip(config, DIFFUSERS_PREFIX, path), path)


def _number(tensor, key, path):
    if tensor.numel() != 1:
        raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, expected one number")
    return tensor.item()


def _check_alphas(alphas, layers, path):
    if unpaired := sorted(alphas.keys() - layers.keys()):
        raise ValueError(f"{path}: alpha of {unpaired[0]!r}, which has no other tensor")


def _read_kohya(tensors, model, alpha, path):
    if model is None:
        raise ValueError(f"{path}: kohya's names hold underscores for dots; the base is needed to "
                         "tell them apart: give --base")
    full = {name.replace(".", "_"): name for name in plain_linears(model)}
    state, alphas = {}, {}
    for key, tensor in tensors.items():
        short, _, part = key.removeprefix(KOHYA_PREFIX).partition(".")
        if (not key.startswith(KOHYA_PREFIX) or short not in full
                or part not in (*KOHYA_PARTS, "alpha")):
            raise ValueError(f"{path}: LoRA key {key!r} names no linear layer of the base, or is "
                             f"none of {', '.join(KOHYA_PARTS)}, alpha")
        if part == "alpha":
            alphas[full[short]] = _number(tensor, key, path)
        else:
            state[f"{full[short]}.{KOHYA_PARTS[part]}"] = tensor
    layers = _equal_layers(state, alpha)
    _check_alphas(alphas, layers, path)
    for name, its in layers.items():
        its["alpha"] = alphas.get(name) or its["alpha"]  # missing or 0 means the rank
    return state, layers


def _read_authors(tensors, model, path):
    """The LoRA pairs of a whole state dict; the rest is compared with the base."""
    if model is None:
        raise ValueError(f"{path}: names no base, but holds its tensors; they are compared with "
                         "the base it was made for: give --base")
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    state = {key.replace(".default.", "."): tensor for key, tensor in tensors.items()
             if re.search(r"\.lora_[AB]\.default\.weight$", key)}
    rest = {key.replace(".base_layer.", "."): tensor for key, tensor in tensors.items()
            if ".lora_" not in key}
    if not state or len(state) + len(rest) != len(tensors):
        raise ValueError(f"{path}: a state dict with .base_layer. but no LoRA pairs, or with "
                         "others than .lora_A.default.weight and .lora_B.default.weight")
    base = model.state_dict()
    if wrong := sorted(base.keys() ^ rest.keys()):
        raise ValueError(f"{path}: {len(wrong)} tensors are not both in it and in the loaded "
                         f"base, the first is {wrong[0]!r}; it was trained on another base")
    for key, tensor in rest.items():
        its = base[key].cpu()  # compared in the coarser dtype: a base may be held in half
        dtype = min(its.dtype, tensor.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(its.to(dtype), tensor.to(dtype)):
            raise ValueError(f"{path}: {key} differs from the loaded base's; load the base it "
                             "was trained on")
    return state
