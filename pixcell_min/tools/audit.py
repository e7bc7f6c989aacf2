"""What is in a base and a run, number by number: for whoever must check it, not for training.

    python -m pixcell_min.tools.audit --base weights/pixcell-nano
    python -m pixcell_min.tools.audit --run runs/lora --figure runs/lora/audit.png

Every module with parameters; each LoRA update ΔW = s·B·A beside its W; whether a gradient ever
arrived; how far the adapter is from the identity; what cross-attention's projections can do; files,
hashes, record and licences. It reads and changes nothing; it judges no image (that is `evaluate`).
    effective rank = exp(−Σ p·log p),  p = σ / Σσ over ΔW's singular values   Roy & Vetterli 2007
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from pixcell_min.adapter import load_adapter
from pixcell_min.base import (REPOSITORY, encoder_folder, feature_files, find_base, load_encoder,
                              load_pixcell_base, load_vae, read_vae_config)
from pixcell_min.checkpoint import file_hash, load_newest_state, read_json, read_tensors, read_text
from pixcell_min.checks import OneLineParser, one_line
from pixcell_min.config import Config, read_yaml
from pixcell_min.data import fit_tile, read_tile
from pixcell_min.images import save_png
from pixcell_min.lora import lora_layers
from pixcell_min.runs import RECORD, SETTINGS, STATES, TILES, shared_files, state_files
from pixcell_min.tools.audit_report import heat_map, text
from pixcell_min.transformer import WEIGHTS_NAME

PROJECTIONS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "attn1.to_q")
RANDOM_EMBEDDINGS = 256  # N(0, 1), on which the adapter is tried
MAX_TILES = 8  # held-out tiles on which it is tried, too
TIMESTEP = 500.0  # at which projections are perturbed


def parse_audit(argv=None):
    """Command line → options. Raises: SystemExit(2) after one line for a wrong flag or value."""
    parser = OneLineParser(prog="audit", description="List what is in a base and a run: "
                           "parameters, updates, gradients, files, hashes, licences.")
    parser.add_argument("--base",
                        help="base folder; default: the run's, else $PIXCELL_BASE, else nano")
    parser.add_argument("--run", type=Path, help="run folder of train.py")
    parser.add_argument("--ema", action="store_true",
                        help="the run's averaged weights (train.py --ema-decay)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--figure", type=Path, metavar="FILE.png",
                        help="also draw the updates' relative norms, block by projection")
    options = parser.parse_args(argv)
    if options.run is None and (options.figure or options.ema):
        parser.error("--figure and --ema are of a run's updates; give --run")
    if options.figure and options.figure.suffix != ".png":
        parser.error(f"--figure: expected a name ending in .png, got {options.figure}")
    return options


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    options = parse_audit(argv)
    try:
        result = audit(options.base, options.run, options.ema)
        if options.figure:
            save_png(options.figure, heat_map(result["lora"]["layers"], result["blocks"],
                                              f"LoRA updates of {options.run}"),
                     {"audit": str(options.run), "lora_hash": result["files"][-2]["sha256"]})
    except (ValueError, OSError) as error:
        print(f"audit: error: {one_line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) if options.json
          else text(result))
    if options.figure:
        print(f"figure: {options.figure}", file=sys.stderr)
    return 0


def audit(base=None, run: Path | None = None, ema: bool = False) -> dict:
    """All that is known of a base and, if given, a run: what `--json` prints.

    Raises: ValueError if transformer, run, state or a file to share is missing, broken or misfits.
    """
    settings = vars(Config(**read_yaml(run / SETTINGS))) if run else {}
    base = find_base(base or settings.get("base"))
    pipeline = load_pixcell_base(base, "cpu", "no")
    transformer, notes = pipeline.transformer, []
    parts = {"transformer": transformer}
    for name, load in (("vae", load_vae), ("encoder", load_encoder)):
        try:
            parts[name] = load(base, "cpu")
        except ValueError as error:  # two of the released parts are gated: the rest can be audited
            notes.append(f"{name} not audited: {error}")
    result = {"base": str(base), "run": run and str(run), "blocks": transformer.config.num_layers,
              "tokens": transformer.config.caption_num_tokens,
              "effects": measure_effects(transformer)}
    paths = [base / "transformer" / WEIGHTS_NAME]
    paths += feature_files(base) if {"vae", "encoder"} <= parts.keys() else []
    if run:
        shared = shared_files(run, ema)
        pipeline.load_lora_weights(shared[0])
        adapter = parts["adapter"] = load_adapter(shared[1], pipeline.base_hash)
        seen, step = {}, None
        try:
            seen, step = gradients_seen(run)
        except ValueError as error:  # of another version of the code: all else can be told
            notes.append(f"gradients unknown: {error}")
        record, held_out = read_record(run)
        size = transformer.config.sample_size * read_vae_config(base).downscale
        result |= {
            "lora": {"layers": [{"name": name, **update_of(layer), "gradient_seen": {
                        part: seen.get(f"{name}.lora_{part}.weight") for part in "AB"}}
                        for name, layer in lora_layers(transformer).items()],
                     "inert": transformer.inert_layers()},
            "adapter": {**distance_from_identity(adapter, held_out_embeddings(
                            held_out, parts.get("encoder"), size, settings["tile_fit"])),
                        "gradient_seen": {name: seen.get(name) for name in adapter.state_dict()}},
            "state_step": step, "settings": settings, **record}
        paths += [*state_files(run)[:1], *shared]
    return result | {
        "modules": [row for part, network in parts.items() for row in modules_of(part, network)],
        "totals": {part: totals_of(network) for part, network in parts.items()},
        "files": [describe_file(path) for path in paths],
        "licences": licences(base, parts), "notes": notes}


# ---------------------------------------------------------------- parameters


def modules_of(part: str, network) -> list[dict]:
    """A row for each module that has parameters of its own, in module order.

    A wrapped layer has two: `NAME` is LoRA's A and B, `NAME.base` the layer itself.
    """
    rows = []
    for name, module in network.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            rows.append({"part": part, "name": name, "kind": type(module).__name__,
                         "parameters": sum(p.numel() for p in own),
                         "trainable": any(p.requires_grad for p in own),
                         "dtype": _names(p.dtype for p in own)})
    return rows


def totals_of(network) -> dict:
    """Numbers of parameters, of trainable ones, and of numbers in saved buffers."""
    names = dict(network.named_parameters())
    return {"parameters": sum(p.numel() for p in names.values()),
            "trainable": sum(p.numel() for p in names.values() if p.requires_grad),
            "buffers": sum(t.numel() for name, t in network.state_dict().items()
                           if name not in names)}


def _names(dtypes):
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


# ---------------------------------------------------------------- LoRA


@torch.no_grad()
def update_of(layer) -> dict:
    """Rank, alpha, scale of a LoRALinear; Frobenius norms of ΔW, W and their ratio; effective rank.

    The effective rank is 0 for ΔW = 0, else 1 to R.
    """
    sigmas = layer.scaling * singular_values(layer.lora_A, layer.lora_B)                 # (R,)
    norm, base_norm = sigmas.square().sum().sqrt(), layer.base.weight.double().norm()
    shares = sigmas[sigmas > 0] / sigmas.sum()
    return {"rank": layer.rank, "alpha": layer.alpha, "scaling": layer.scaling,
            "norm": norm.item(), "base_norm": base_norm.item(),
            "relative_norm": (norm / base_norm).item() if base_norm else None,
            "effective_rank": math.exp(-(shares * shares.log()).sum()) if len(shares) else 0.0}


def singular_values(lora_A, lora_B) -> torch.Tensor:
    """Those of B·A, (R,) float64, largest first, from an R×R matrix.

    With B = Q₁·R₁ and Aᵀ = Q₂·R₂, B·A = Q₁·(R₁·R₂ᵀ)·Q₂ᵀ, and the Qs change no singular value.
    """
    right = torch.linalg.qr(lora_A.double().T).R                                       # (R, R)
    left = torch.linalg.qr(lora_B.double()).R                                          # (R, R)
    return torch.linalg.svdvals(left @ right.T)


def gradients_seen(run: Path) -> tuple[dict[str, float], int]:
    """({parameter: share of its numbers that ever got a gradient}, step) of the newest state.

    AdamW's second moment is a moving average of squared gradients, so it is 0 where each of them
    was 0 (or below 1e-21, whose square float32 loses). ({}, step) if no step was made yet.
    Raises: ValueError if there is no intact state.
    """
    state, path, _ = load_newest_state(run / STATES, None)
    try:
        moments = state["optimizer"]["state"]
        names = [*state["lora"], *state["adapter"]]  # the optimizer's order
        seen = {name: (moments[i]["exp_avg_sq"] > 0).double().mean().item() if i in moments else 0.0
                for i, name in enumerate(names)}
        return seen if moments else {}, int(state["progress"]["step"])
    except (LookupError, TypeError, AttributeError, RuntimeError):
        raise ValueError(f"{path}: not the state of a run of train.py") from None


# ---------------------------------------------------------------- cross-attention with one token


@torch.no_grad()
def measure_effects(transformer) -> dict[str, float]:
    """{projection: largest change of the output, relative to its largest value}.

    In all blocks at once, noise as large as the weights is added to a projection's weights, at one
    fixed random input; the weights are then put back. For one token alone: "whole softmax" is what
    to_q's noise changes in the first block's attn2 without the short cut that the network takes,
    "short cut" how far the short cut is from the whole softmax.
    """
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    latents, tokens = (torch.randn(1, *shape, generator=generator) for shape in (
        (config.in_channels, config.sample_size, config.sample_size),
        (config.caption_num_tokens, config.caption_channels)))

    def perturbed(weight):
        return weight + weight.std() * torch.randn(weight.shape, generator=generator)

    def run():
        return transformer(latents, torch.tensor(TIMESTEP), tokens)

    expected, effects = run(), {}
    for name in PROJECTIONS:
        layers = [block.get_submodule(name) for block in transformer.transformer_blocks]
        kept = [layer.weight.data for layer in layers]
        for layer in layers:
            layer.weight.data = perturbed(layer.weight.data)
        effects[name] = _difference(run(), expected)
        for layer, weight in zip(layers, kept):
            layer.weight.data = weight
    if config.caption_num_tokens == 1:
        attention = transformer.transformer_blocks[0].attn2
        context = transformer.caption_projection(tokens)
        h = torch.randn(1, 64, context.shape[-1], generator=generator)
        whole, other = (_whole_attention(attention, weight, h, context) for weight in (
            attention.to_q.weight, perturbed(attention.to_q.weight)))
        effects["whole softmax"] = _difference(other, whole)
        effects["short cut"] = _difference(attention(h, context).expand_as(whole), whole)
    return effects


def _whole_attention(attention, query_weight, h, context):
    """softmax(q·kᵀ/√d)·v of h (1, N, D) over context (1, S, D), with the query weight given."""
    q = F.linear(h, query_weight, attention.to_q.bias)                       # (1, N, D)
    q, k, v = (rearrange(x, "b n (m d) -> b m n d", m=attention.heads)
               for x in (q, attention.to_k(context), attention.to_v(context)))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)  # (1, m, N, S)
    return attention.to_out[0](rearrange(weights @ v, "b m n d -> b n (m d)"))


def _difference(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- adapter


@torch.no_grad()
def distance_from_identity(adapter, embeddings) -> dict:
    """Sizes, and |adapter(x) − x| / |x| on random and on held-out embeddings, (n, S, E) or None."""
    width = adapter.fc1.in_features
    random = torch.randn(RANDOM_EMBEDDINGS, 1, width, generator=torch.Generator().manual_seed(0))
    distances = {}
    for name, x in (("random", random), ("held_out", embeddings)):
        if x is not None:
            moved = (adapter(x) - x).norm(dim=-1) / x.norm(dim=-1)
            distances[name] = {"n": len(x), "mean": moved.mean().item(), "max": moved.max().item()}
    return {"embedding": width, "hidden": adapter.fc1.out_features, "distance": distances,
            "norms": {name: p.norm().item() for name, p in adapter.named_parameters()}}


def held_out_embeddings(held_out, encoder, size: int, how: str):
    """Embeddings (n, S, E) of the first MAX_TILES held-out tiles, without those that are gone or
    changed; None: of none. held_out: [{path, hash}] of tiles.json."""
    paths = [Path(entry["path"]) for entry in held_out[:MAX_TILES]
             if Path(entry["path"]).is_file() and Path(entry["path"]).suffix != ".npy"
             and file_hash(entry["path"]) == entry["hash"]]
    if encoder is None or not paths:
        return None
    return torch.cat([encoder(fit_tile(read_tile(path), size, how)) for path in paths])


# ---------------------------------------------------------------- files, record, licences


def describe_file(path: Path) -> dict:
    """Path, bytes, SHA-256 and, of a file of weights, {dtype: number of tensors} as stored."""
    weights = path.suffix != ".json" and path.parent.name != STATES
    stored = Counter(_names([t.dtype]) for t in read_tensors(path)[0].values()) if weights else {}
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": file_hash(path),
            "stored": dict(stored)}


def read_record(run: Path) -> tuple[dict, list[dict]]:
    """(sessions of run.json, numbers of tiles; tiles.json's held-out tiles). Raises: ValueError."""
    record, tiles = read_json(run / RECORD), read_json(run / TILES)
    try:
        sessions = [{key: session[key] for key in (
            "from_step", "started", "command", "seed", "precision", "hashes", "versions")}
            for session in record["sessions"]]
        named = {name: [{key: str(entry[key]) for key in ("path", "hash")} for entry in entries]
                 for name, entries in tiles.items()}
        sound = sessions and named.keys() == {"training", "validation"} and all(
            isinstance(its[key], dict) for its in sessions for key in ("hashes", "versions"))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{run}: {RECORD} or {TILES} is not as train.py writes it")
    return {"sessions": sessions, "tiles": {name: len(its) for name, its in named.items()}}, (
        named["validation"])


def licences(base: Path, parts) -> list[dict]:
    """[{of, folder, licence}]: what a folder's own files say, word for word; it is never guessed.

    A licence is what README.md's header names (as on the Hugging Face hub), else the first line of
    a LICENSE file, else None.
    """
    folders = {"code": REPOSITORY, "base": base}
    if {"vae", "encoder"} <= parts.keys():
        folders |= {"VAE": feature_files(base)[0].parent, "encoder": encoder_folder(base)}
    return [{"of": of, "folder": str(folder), "licence": _stated(folder)}
            for of, folder in folders.items()]


def _stated(folder):
    readme = folder / "README.md"
    header = re.match(r"---\n(.*?)\n---\n", read_text(readme) if readme.is_file() else "", re.S)
    named = re.findall(r"^license(?:_name|_link)?: *(.+)$", header[1], re.M) if header else []
    if named:
        return ", ".join(named)
    path = next((path for path in sorted(folder.glob("LICENSE*")) if path.is_file()), None)
    return next(iter(read_text(path).strip().splitlines()), None) if path else None


if __name__ == "__main__":
    sys.exit(main())
