"""What peft's `adapter_config.json` says of a LoRA's layers; diffusers' metadata has its fields, too.

Source: LoraConfig of peft 0.21. `exports.py` writes such a configuration.
"""

import re

REQUIRED = ("r", "lora_alpha", "target_modules")
READ = (*REQUIRED, "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
# Fields of peft's LoraConfig that do not change what given A and B compute. Any other must be off.
HARMLESS = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
            "revision", "inference_mode", "exclude_modules", "layers_to_transform",
            "layers_pattern", "megatron_core", "qalora_group_size", "eva_config")
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
    except (re.error, AttributeError):
        raise ValueError(f"{source}: rank_pattern or alpha_pattern is no {{expression: number}}"
                         ) from None

    def of(patterns, name, default):  # the first that matches, as peft has it
        return next((value for end, value in patterns if end.fullmatch(name)), default)

    return {name: {"rank": of(ranks, name, config["r"]),
                   "alpha": of(alphas, name, config["lora_alpha"]),
                   "dropout": config.get("lora_dropout", 0.0),
                   "use_rslora": bool(config.get("use_rslora"))} for name in names}
