"""Low-rank adaptation (LoRA) of the linear layers of any loaded network, found by name.

    y = W·x + b + s·B·A·x      A (R, in), B (out, R), s = alpha / R   (alpha / √R with rsLoRA)

B is zero at the start: the first output is the base's. A and B are float32 whatever the base is.
Knows no architecture, wraps only `nn.Linear`, converts no foreign files. The start is drawn from a
generator given; dropout from torch's global one, the only one that gradient checkpointing replays.
Sources: Hu et al. 2021, eq. 3; Kalajdzievski 2023 (rsLoRA). Must match peft 0.21.
"""

import json
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from pixcell_min.checkpoint import save_tensors

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PEFT_PREFIX = "base_model.model."  # without it peft loads nothing, with only a warning
SETTINGS = ("rank", "alpha", "dropout", "use_rslora")  # lora_config in a file: {layer: these}


class LoRALinear(nn.Module):
    """A frozen `nn.Linear`, the very one given, plus a trainable low-rank term."""

    def __init__(self, base, rank, alpha, dropout=0.0, init="kaiming", use_rslora=False,
                 generator=None):
        """`init` of A: kaiming U(±1/√in), gaussian N(0, std 1/R).

        Raises: ValueError as check_settings.
        """
        super().__init__()
        check_settings(type(base).__name__, rank, alpha, dropout, init)
        # Drawn where the generator lives: a CPU generator gives one start for every device.
        drawn_on = getattr(generator, "device", "cpu")
        lora_A = torch.empty(rank, base.in_features, dtype=torch.float32, device=drawn_on)
        if init == "kaiming":
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(lora_A, std=1 / rank, generator=generator)
        lora_A, lora_B = lora_A.to(base.weight.device), lora_A.new_zeros(base.out_features, rank)
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(lora_A)                                   # (R, in)
        self.lora_B = nn.Parameter(lora_B.to(base.weight.device))            # (out, R)
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, use_rslora
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.scale, self.enabled = 1.0, True  # `scale` multiplies `scaling` at use, is never saved
        self.train(base.training)  # or dropout would act in a model already set to eval()

    @property
    def merged(self) -> bool:
        """Whether `base.weight` now holds W + s·B·A."""
        return self.unmerged_weight is not None

    def forward(self, x):
        """x (…, in) → (…, out), dtype of base(x). Raises: ValueError if merged while training."""
        if self.merged and self.training:
            raise ValueError("LoRA is merged, it cannot train: unmerge_lora(model), or eval()")
        out = self.base(x)                                                   # (…, out)
        if self.merged or not self.enabled:
            return out
        if not torch.is_autocast_enabled(x.device.type):  # it would only cast x back down
            x = x.to(self.lora_A.dtype)
        x = F.dropout(x, self.dropout, self.training)                        # (…, in)
        low = self.scale * self.scaling * F.linear(x, self.lora_A)           # (…, R)
        return (out + F.linear(low, self.lora_B)).to(out.dtype)              # (…, out)

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + s·B·A, summed in float32, cast once; the old W is kept: twice the memory.

        Raises: ValueError if merged or disabled.
        """
        if self.merged or not self.enabled:
            raise ValueError("LoRA is merged or disabled: call unmerge_lora or enable_lora first")
        weight = self.base.weight
        with torch.autocast(weight.device.type, enabled=False):
            delta = self.scale * self.scaling * (self.lora_B @ self.lora_A)  # (out, in), float32
        self.unmerged_weight, weight.data = weight.data, (weight + delta).to(weight.dtype)

    def unmerge(self) -> None:
        """Put the kept W back, bit for bit. Raises: ValueError if not merged."""
        if not self.merged:
            raise ValueError("LoRA is not merged: there is nothing to unmerge")
        self.base.weight.data = self.unmerged_weight.to(self.base.weight.dtype)
        self.unmerged_weight = None

    def _apply(self, fn, recurse=True):
        # `.half()` on the network must not reach A and B: GradScaler refuses float16 gradients.
        def at_least_float32(tensor):
            converted = fn(tensor)
            return tensor.to(converted.device) if converted.dtype.itemsize == 2 else converted
        if recurse:
            self.base._apply(fn)
        return super()._apply(at_least_float32, recurse=False)


def inject_lora(model, rank, alpha, targets=DEFAULT_TARGETS, within=("attn1", "attn2"),
                blocks=None, exclude=(), dropout=0.0, init="kaiming", use_rslora=False,
                rank_pattern=None, alpha_pattern=None, generator=None) -> list[str]:
    """Wrap the linear layers named by `targets`, freeze the rest; → their names, in module order.

    targets: full names of layers or their ends. within: path components, one of which a layer must
    have (None: anywhere). blocks: values allowed for the first number in a path (None: any).
    exclude: full names to leave alone. rank_pattern, alpha_pattern: {full name or its end: value}
    that overrule rank and alpha, the longest match first. Raises: ValueError, with the model
    untouched, if something named matches nothing, LoRA is there already, or check_settings refuses.
    """
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    linears = plain_linears(model)
    block = {n: next((int(p) for p in n.split(".") if p.isdigit()), None) for n in linears}
    found = [name for name in linears if any(_ends(name, target) for target in targets)
             and (within is None or any(place in name.split(".") for place in within))
             and (blocks is None or block[name] in blocks)]
    names = [name for name in found if name not in exclude]
    unmatched = [e for e in targets if not any(_ends(n, e) for n in found)]
    unmatched += [p for p in within or () if not any(p in n.split(".") for n in linears)]
    unmatched += [b for b in blocks or () if b not in [block[n] for n in found]]
    unmatched += [name for name in exclude if name not in linears]
    unmatched += [e for e in rank_pattern | alpha_pattern if not any(_ends(n, e) for n in names)]
    if unmatched:
        raise ValueError(f"LoRA: {unmatched[0]!r} matches no layer (within={within}, blocks="
                         f"{blocks}); linear layers: {', '.join([*linears][:3])}, …")
    if not names:
        raise ValueError(f"LoRA has nothing to wrap: {len(found)} layers match, all are excluded")

    def value(pattern, name, default):
        end = max((end for end in pattern if _ends(name, end)), key=len, default=None)
        return pattern.get(end, default)

    ranks = {name: value(rank_pattern, name, rank) for name in names}
    for name, its in ranks.items():  # here alone: a file may hold more, peft and stacks do
        largest = min(linears[name].in_features, linears[name].out_features)
        if type(its) is not int or not 1 <= its <= largest:
            raise ValueError(f"{name}: LoRA rank must be 1 to min(in, out) = {largest}, "
                             f"got {its!r}")
    _install(model, {name: (ranks[name], value(alpha_pattern, name, alpha), dropout, init,
                            use_rslora, generator) for name in names})
    return names


def plain_linears(model) -> dict[str, nn.Linear]:
    """{name: layer} that LoRA could wrap, in module order. Raises: ValueError if LoRA is there."""
    if layers := lora_layers(model):
        raise ValueError(f"the model holds {len(layers)} LoRA layers: remove_lora(model) first")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _ends(name, end):
    return name == end or name.endswith("." + end)


def _install(model, arguments):
    """Wrap {name: LoRALinear's arguments}; checked first, so that a refusal leaves no trace."""
    for name, (rank, alpha, dropout, init, *_) in arguments.items():
        check_settings(name, rank, alpha, dropout, init)
    model.requires_grad_(False)
    for name, values in arguments.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), *values))


def check_settings(name, rank, alpha, dropout, init) -> None:
    """Raises: ValueError naming the layer `name` and what is no rank, alpha, dropout or init."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{name}: LoRA rank must be an integer from 1, got {rank!r}")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"{name}: LoRA alpha must be finite and above 0, got {alpha!r}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{name}: LoRA dropout must be 0 or more, below 1, got {dropout!r}")
    if init not in ("kaiming", "gaussian"):
        raise ValueError(f"{name}: LoRA init must be 'kaiming' or 'gaussian', got {init!r}")


def _layers(model, unmerged_for=None):
    if not (layers := lora_layers(model)):
        raise ValueError("the model holds no LoRA layer: call inject_lora or load_lora first")
    if unmerged_for and any(layer.merged for layer in layers.values()):
        raise ValueError(f"LoRA is merged: call unmerge_lora(model) before {unmerged_for}")
    return layers


def lora_layers(model) -> dict[str, LoRALinear]:
    """{name: layer} of the wrapped layers, in module order; empty for a plain model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model) -> list[nn.Parameter]:
    """A and B of every wrapped layer, in module order. Raises: ValueError if there is none."""
    return [tensor for layer in _layers(model).values() for tensor in (layer.lora_A, layer.lora_B)]


def count_parameters(model) -> tuple[int, int]:
    """(trainable, total) numbers of parameters; total includes LoRA's own, not buffers."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def set_lora_scale(model, scale: float) -> None:
    """Set the factor of `scaling`: 1 as trained, 0 the base. Raises: ValueError if merged."""
    if not math.isfinite(scale):
        raise ValueError(f"LoRA scale must be a finite number, got {scale!r}")
    for layer in _layers(model, unmerged_for="changing its scale").values():
        layer.scale = scale


def enable_lora(model, enabled=True) -> None:
    """Switch every LoRA layer on or off. Raises: ValueError if LoRA is absent or merged."""
    for layer in _layers(model, unmerged_for="switching it").values():
        layer.enabled = enabled


def disable_lora(model) -> None:
    """Switch every LoRA layer off: the base, bit for bit. Raises: as enable_lora."""
    enable_lora(model, enabled=False)


@contextmanager
def lora_disabled(model):
    """Within the block the model is its base, then as before. Raises: ValueError if merged."""
    before = [(layer, layer.enabled) for layer in lora_layers(model).values()]
    try:
        if before:  # a plain model is its base already
            disable_lora(model)
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def merge_lora(model) -> None:
    """Merge every layer. Raises: ValueError if LoRA is absent, merged or disabled."""
    for layer in _layers(model).values():
        layer.merge()


def unmerge_lora(model) -> None:
    """Restore every base weight's bits. Raises: ValueError if LoRA is absent or not merged."""
    for layer in _layers(model).values():
        layer.unmerge()


def fold_lora(model) -> None:
    """Merge every layer for good, in place: plain layers, no copy of W, no LoRA left.

    Whatever shares W's memory (a state_dict taken before) sees it; a mapped file does not change.
    Raises: ValueError, with nothing folded, if LoRA is absent, merged or disabled.
    """
    layers = _layers(model, unmerged_for="folding it")
    if not all(layer.enabled for layer in layers.values()):
        raise ValueError("LoRA is disabled: call enable_lora before folding it")
    for name, layer in layers.items():
        weight = layer.base.weight.data
        layer.merge()
        # Into the old place: a mapped file's page then gives way to the new one, not a second one.
        layer.base.weight.data = weight.copy_(layer.base.weight)
        model.set_submodule(name, layer.base)


def remove_lora(model) -> None:
    """Put the plain layers back, frozen; merged ones keep the merged weight, for good."""
    for name, layer in _layers(model).items():
        model.set_submodule(name, layer.base)


def lora_state_dict(model) -> dict[str, torch.Tensor]:
    """{"<layer>.lora_A.weight": (R, in), "….lora_B.weight": (out, R)}: float32 CPU copies."""
    return {f"{name}.{key}.weight": getattr(layer, key).detach().clone().cpu().float()
            for name, layer in _layers(model).items() for key in ("lora_A", "lora_B")}


@torch.no_grad()
def load_lora_state_dict(model, state, source="LoRA state") -> None:
    """Copy what lora_state_dict gave. Raises: ValueError, with nothing copied, if it misfits."""
    layers = _layers(model, unmerged_for="loading weights")
    check_state(state, {name: (layer.base.in_features, layer.base.out_features, layer.rank)
                        for name, layer in layers.items()}, source)
    for name, layer in layers.items():
        layer.lora_A.copy_(state[f"{name}.lora_A.weight"])
        layer.lora_B.copy_(state[f"{name}.lora_B.weight"])


def check_state(state, expected, source) -> None:
    """Raises: ValueError unless `state` is a finite A, B of each {layer: (in, out, rank)} alone."""
    shapes = {f"{name}.lora_{part}.weight": shape for name, (ins, outs, rank) in expected.items()
              for part, shape in zip("AB", ((rank, ins), (outs, rank)))}
    if wrong := sorted(state.keys() ^ shapes.keys()):
        raise ValueError(f"{source}: {'missing' if wrong[0] in shapes else 'unexpected'} LoRA key "
                         f"{wrong[0]!r}, {len(wrong)} such keys; it was made for other layers")
    for key, tensor in state.items():
        if tensor.shape != shapes[key]:
            raise ValueError(f"{source}: {key} is {tuple(tensor.shape)}, expected {shapes[key]}")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"{source}: {key} holds NaN, infinity or no floating-point numbers")


def save_lora(model, path, metadata: dict[str, str] | None = None) -> None:
    """Write PEFT's keys; header: `metadata`, `lora_config`. Raises: ValueError on the ending."""
    if not str(path).endswith(".safetensors"):
        raise ValueError(f"{path}: a LoRA file must end in .safetensors, whose header holds alpha")
    config = {name: {key: getattr(layer, key) for key in SETTINGS}
              for name, layer in _layers(model).items()}
    tensors = {PEFT_PREFIX + key: tensor for key, tensor in lora_state_dict(model).items()}
    save_tensors(path, tensors, {**(metadata or {}), "lora_config": json.dumps(config)})


def install_lora(model, layers, state, source="LoRA", scale=1.0) -> None:
    """Wrap the layers of a plain `model` that `layers` {name: SETTINGS} names, with `state`'s A, B.

    Raises: ValueError, with the model untouched, if it holds LoRA or any layer or tensor misfits.
    """
    linears = plain_linears(model)
    known = {name: [its[key] for key in SETTINGS]
             for name, its in layers.items() if name in linears}
    check_state(state, {name: (linears[name].in_features, linears[name].out_features, its[0])
                        for name, its in known.items()}, source)
    _install(model, {name: (*three, "kaiming", rs) for name, (*three, rs) in known.items()})
    load_lora_state_dict(model, state, source)
    set_lora_scale(model, scale)
