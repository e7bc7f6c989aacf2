"""Settings of a training run: defaults < YAML file < command-line flags, all through one check.

The dataclass `Config` is the only list: flags, `--help`, YAML keys, ranges and the example
config.yaml come from its fields. It reads nothing but the YAML file and never looks at weights or
tiles. Below the scripts functions receive values, never a Config.
"""

import argparse
import dataclasses
import difflib
import math
import re
import reprlib

import yaml

from pixcell_min.checks import (BELOW_ONE, BLOCKS, DEVICE, FLAG, INT_OR_NULL, SEED, SHARE, TEXT,
                                TEXT_OR_NULL, WRONG, OneLineParser, expected_got, fraction, integer,
                                nonnegative_float, nonnegative_int, one_of, positive_float,
                                positive_int, words)

# Settings that a resumed run may change: they touch neither a drawn number nor a weight.
FREE_ON_RESUME = {"out", "cache", "decode_workers", "save_every", "validate_every", "sample_count",
                  "guidance_scale", "keep_states", "sample_every"}
YAML_HEAD = """\
# All settings of a run: python train.py --config config.yaml
# A line that is left out keeps its default; flags win over this file (python train.py --help).
"""


def _setting(default, check, unit, help, flag=None):
    return dataclasses.field(
        default=default, metadata={"check": check, "unit": unit, "help": help, "flag": flag})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; every field is checked on construction. Raises: ValueError."""

    data: str | None = _setting(
        None, TEXT_OR_NULL, "path", "folder of class folders or of images; null: procedural tiles")
    features: str | None = _setting(
        None, TEXT_OR_NULL, "path",
        "folder of precomputed *_sd3_vae.npy, *_uni.npy instead of data")
    base: str = _setting(
        "weights/pixcell-nano", TEXT, "path", "base model: transformer/ vae/ scheduler/ uni/")
    out: str = _setting("runs/lora", TEXT, "path", "run folder")
    cache: str = _setting("runs/cache", TEXT, "path", "latents and embeddings, shared by runs")
    lora_rank: int = _setting(8, positive_int, "dimensions", "inner size R of an update", "--rank")
    lora_alpha: float = _setting(
        16.0, positive_float, "factor", "updates are scaled by alpha / rank", "--alpha")
    lora_target_modules: tuple[str, ...] = _setting(
        ("to_q", "to_k", "to_v", "to_out.0"), words(), "layer names",
        "linear layers to wrap", "--target-modules")
    lora_attention: tuple[str, ...] = _setting(
        ("attn1", "attn2"), words("attn1", "attn2"), "module names",
        "attn1: self, attn2: cross", "--attention")
    lora_blocks: tuple[int, ...] | None = _setting(
        None, BLOCKS, "numbers from 0", "blocks to adapt", "--blocks")
    lora_dropout: float = _setting(0.0, BELOW_ONE, "probability", "dropout on the input of updates")
    lora_init: str = _setting(
        "kaiming", one_of("kaiming", "gaussian"), "name", "start of lora_A; lora_B starts at 0")
    use_rslora: bool = _setting(False, FLAG, "switch", "scale by alpha / sqrt(rank) instead")
    learning_rate: float = _setting(
        6e-3, nonnegative_float, "per step", "peak AdamW rate of LoRA; 0: not trained")
    adapter_learning_rate: float = _setting(
        5e-4, nonnegative_float, "per step", "peak AdamW rate of the adapter; 0: not trained")
    weight_decay: float = _setting(0.01, nonnegative_float, "factor", "weight decay of AdamW")
    max_grad_norm: float = _setting(1.0, positive_float, "L2 norm", "longer gradients are clipped")
    lr_schedule: str = _setting(
        "cosine", one_of("cosine", "constant"), "name", "both rates after the warm-up")
    warmup_steps: int = _setting(20, nonnegative_int, "steps", "linear rise of both rates")
    max_train_steps: int = _setting(300, positive_int, "steps", "optimizer steps of the run")
    epochs: int | None = _setting(
        None, INT_OR_NULL, "passes", "over the training tiles; overrules max_train_steps")
    early_stop: int = _setting(
        0, nonnegative_int, "validations", "without a new lowest loss that end a run; 0: never")
    batch_size: int = _setting(4, positive_int, "tiles", "size of a micro-batch")
    gradient_accumulation_steps: int = _setting(4, positive_int, "micro-batches", "in each step")
    mixed_precision: str = _setting(
        "auto", one_of("auto", "no", "fp16", "bf16"), "name",
        "autocast; auto: fp16 on CUDA, bf16 on a CPU fast at it, else no")
    condition_dropout: float = _setting(
        0.2, fraction, "probability", "condition replaced by the null embedding")
    loss_weighting: str = _setting(
        "debiased", one_of("uniform", "min_snr", "debiased"), "name",
        "of timesteps: 1, min(SNR, gamma)/SNR, SNR^-0.5")
    min_snr_gamma: float = _setting(
        5.0, positive_float, "factor", "min_snr's: an error of x0 counts so often at most")
    vlb_weight: float = _setting(
        0.0, nonnegative_float, "factor",
        "of the learned variance's bound, summed over t (paper: 0.001); 0: none")
    class_balanced: bool = _setting(False, FLAG, "switch", "draw every class equally often")
    ema_decay: float = _setting(
        0.0, BELOW_ONE, "factor", "also keep averaged weights (0.999 usual); 0: none")
    seed: int = _setting(0, SEED, "number", "start of every random draw")
    save_every: int = _setting(100, nonnegative_int, "steps", "between saves; 0: at the end only")
    keep_states: int = _setting(2, integer(2), "states", "newest saved states that are kept")
    validate_every: int = _setting(
        100, nonnegative_int, "steps", "between validations; 0: before and after only")
    validation_fraction: float = _setting(0.1, SHARE, "share", "tiles held out, of every class")
    sample_count: int = _setting(4, nonnegative_int, "tiles", "in the sample grid; 0: no grid")
    sample_every: int = _setting(
        0, nonnegative_int, "steps", "between sample grids; 0: at the end only")
    guidance_scale: float = _setting(
        1.5, nonnegative_float, "factor", "guidance of the sample grid; 1: none")
    tile_fit: str = _setting(
        "resize", one_of("resize", "pad"), "name",
        "tiles of another size; pad: mirrored margins, scale kept")
    decode_workers: int = _setting(2, positive_int, "threads", "that read and decode tiles ahead")
    strict_data: bool = _setting(False, FLAG, "switch", "stop at an unreadable tile, else skip it")
    dihedral: bool = _setting(True, FLAG, "switch", "train on all 8 turns and mirrorings")
    gradient_checkpointing: bool = _setting(False, FLAG, "switch", "less memory for more time")
    deterministic: bool = _setting(False, FLAG, "switch", "refuse what two runs may round apart")
    compile: bool = _setting(
        False, FLAG, "switch", "torch.compile of the blocks; a minute at the start")
    device: str = _setting("auto", DEVICE, "name", "auto: cuda where there is one, else cpu")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _checked(field, getattr(self, field.name), "Config")
            object.__setattr__(self, field.name, value)
        if self.data is not None and self.features is not None:
            raise ValueError("Config: data and features are both given; expected one of the two")
        if self.early_stop and not self.validate_every:
            raise ValueError("Config: early_stop without validations; set validate_every above 0")
        if self.learning_rate == self.adapter_learning_rate == 0:
            raise ValueError("Config: learning_rate and adapter_learning_rate are both 0: nothing "
                             "would be trained")


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def _checked(field, value, where, parse=lambda value: value):
    check = field.metadata["check"]
    try:
        return check.accept(parse(value))
    except WRONG:
        raise ValueError(f"{where}: {field.name}: {expected_got(check, value)}") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value]
        for i, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:i]]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes the texts which `_Loader` would read as numbers."""


# Trap: PyYAML follows YAML 1.1, where 1e-4 and 1.5e3 (no dot, or no sign) are texts.
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_yaml(path) -> dict:
    """YAML file → {field name: checked value} of the keys it gives.

    Raises: ValueError if it is missing, no YAML, no mapping, or has an unknown key or wrong value.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, *WRONG, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())  # all but the first come out of tags such as !!int x
        raise ValueError(f"{path}: not valid YAML ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines 'key: value', got {type(content).__name__}")
    for key in content:
        if key not in FIELDS:
            near = difflib.get_close_matches(str(key), FIELDS, 1, cutoff=0)[0]
            raise ValueError(f"{path}: unknown key {reprlib.repr(key)}; the nearest is {near}")
    return {key: _checked(FIELDS[key], value, path) for key, value in content.items()}


def to_yaml(config: Config) -> str:
    """All settings as commented YAML; `read_yaml` of it gives the same Config."""
    lines = [YAML_HEAD]
    for name, field in FIELDS.items():
        value = getattr(config, name)
        value = list(value) if isinstance(value, tuple) else value
        # A list of one, because a bare scalar is written with an end-of-document mark.
        text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=math.inf)
        lines.append(f"# {_described(field)}\n{name}: {text.strip()[1:-1]}\n")
    return "".join(lines)


def changes(then: Config, now: Config) -> tuple[list[str], list[str]]:
    """What differs, as "name old → new": (what a resumed run must not change, what it may)."""
    free = FREE_ON_RESUME - ({"validate_every"} if now.early_stop else set())  # it decides the end
    changed = [name for name in FIELDS if getattr(then, name) != getattr(now, name)]
    lines = {name: f"{name} {getattr(then, name)} → {getattr(now, name)}" for name in changed}
    return ([lines[name] for name in changed if name not in free],
            [lines[name] for name in changed if name in free])


def provenance(config: Config) -> dict:
    """What a file to share tells of the settings: `base`, and {name: value} of all but folders."""
    values = {name: getattr(config, name) for name, field in FIELDS.items()
              if field.metadata["unit"] != "path"}
    return {"base": config.base, "settings": values}


def _described(field):
    return "{help} [{unit}]; {check.expected}".format(**field.metadata)


def parse_train(argv=None) -> tuple[Config, argparse.Namespace]:
    """argv (default: sys.argv[1:]) → (settings, options: config, resume, overwrite, dry_run).

    Raises: ValueError for a wrong value in the file or a flag; SystemExit(2) for an unknown flag,
    a flag without value, or --resume together with --overwrite.
    """
    options = _train_parser().parse_args(argv)
    values = read_yaml(options.config) if options.config is not None else {}
    for name, field in FIELDS.items():
        if hasattr(options, name):
            parse = field.metadata["check"].parse
            values[name] = _checked(field, getattr(options, name), _flag(field), parse)
            delattr(options, name)
    return Config(**values), options


def _flag(field):
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


def _train_parser():
    parser = OneLineParser(prog="train.py", description="Adapt PixCell to a folder of tiles with "
                           "LoRA and an embedding adapter. Defaults < --config file < flags.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, as config.yaml")
    run = parser.add_mutually_exclusive_group()
    run.add_argument("--resume", action="store_true", help="continue the run in --out")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the settings and what the run would take, and stop")
    for name, field in FIELDS.items():
        is_switch = field.metadata["check"] is FLAG
        kind = {"action": argparse.BooleanOptionalAction} if is_switch else {"metavar": "VALUE"}
        if isinstance(field.default, tuple):
            kind["nargs"] = "+"
        help = f"{_described(field)}; default {field.default}"
        # Absent flags leave no attribute, so that they cannot shadow the file.
        parser.add_argument(_flag(field), dest=name, default=argparse.SUPPRESS, help=help, **kind)
    return parser
