"""What peft's `adapter_config.json` says of layers; diffusers' metadata has the same fields.

Source: LoraConfig of peft 0.21. `exports.py` writes such a configuration.
"""

import re

REQUIRED = ("r", "lora_alpha", "target_modules")
READ = (*REQUIRED, "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # target_modules, too
# Fields of peft's LoraConfig that do not change what given A and B compute. Any other must be off.
HARMLESS = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
            "revision", "inference_mode", *SELECTING, "megatron_core", "qalora_group_size",
            "eva_config")
# Other starts of peft's (pissa, olora, loftq, corda, …) change the base's weights as well.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
OFF = (None, False, "none", {}, [])


def peft_layers(names, config, source) -> dict[str, dict]:
    """{layer: {rank, alpha, dropout, use_rslora}} that peft makes of the layers `names`.

    Raises: ValueError naming a field that is missing, or that may change the network otherwise.
    """
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        raise ValueError(f"{source}: {missing[0]!r} is missing; peft would fail or silently take 8")
    for key, value in config.items():
        if key == "init_lora_weights":
            if value not in STARTS:
                raise ValueError(f"{source}: init_lora_weights {value!r} also changes the base's "
                                 "weights, which this file does not hold; convert it with peft")
        elif key not in READ + HARMLESS and value not in OFF:
            raise ValueError(f"{source}: {key} = {value!r} is not supported, it may change the "
                             "network; only plain LoRA is read")

    try:
        ranks, alphas = ([(re.compile(rf"(.*\.)?({end})"), value)
                          for end, value in (config.get(key) or {}).items()]
                         for key in ("rank_pattern", "alpha_pattern"))
    except (re.error, AttributeError, OverflowError):
        raise ValueError(f"{source}: rank_pattern or alpha_pattern is no {{expression: number}}"
                         ) from None

    def of(patterns, name, default):  # the first that matches, as peft has it
        return next((value for end, value in patterns if end.fullmatch(name)), default)

    return {name: {"rank": of(ranks, name, config["r"]),
                   "alpha": of(alphas, name, config["lora_alpha"]),
                   "dropout": config.get("lora_dropout", 0.0),
                   "use_rslora": bool(config.get("use_rslora"))} for name in names}


def check_selected(names, config, source) -> None:
    """Refuse a layer of `names` that the configuration leaves out: peft passes over its tensors.

    Source: check_target_module_exists of peft 0.21. Raises: ValueError naming the layer, or that
    the fields are of other types.
    """
    targets, blocks = config["target_modules"], config.get("layers_to_transform")
    numbers = [blocks] if isinstance(blocks, int) else blocks
    before = config.get("layers_pattern") or []  # what stands before a block's number
    before = [before] if isinstance(before, str) else before

    def matches(ends, name):  # a string is an expression, a list holds names or their ends
        if isinstance(ends, str):
            return re.fullmatch(ends, name) is not None
        return any(name == end or name.endswith(f".{end}") for end in ends or ())

    def selected(name):
        if matches(config.get("exclude_modules"), name) or not (
                targets == "all-linear" or matches(targets, name)):
            return False
        if isinstance(targets, str) or name in targets or not numbers:
            return True
        found = next(filter(None, (re.match(place, name) for place in places)), None)
        return found is not None and int(found["number"]) in numbers

    try:
        places = [rf"(?:^|.*?\.){end}\.(?P<number>\d+)\." for end in before] or [
            r".*?\.[^.]*\.(?P<number>\d+)\."]
        wrong = next((name for name in names if not selected(name)), None)
    except (re.error, TypeError, OverflowError):
        raise ValueError(f"{source}: target_modules, exclude_modules, layers_to_transform or "
                         "layers_pattern cannot be read as peft's") from None
    if wrong:
        raise ValueError(f"{source}: leaves out {wrong!r}, whose tensors are there: peft would "
                         "pass them over; mend target_modules, exclude_modules or "
                         "layers_to_transform")
