"""What each way of saving time gives by itself, and how near to the matrix rate we are.

    python benchmarks/levers.py --out benchmarks/results/levers.json

Four blocks of PixCell-256 at full width, random weights, LoRA of rank 8 on all attention; one
thread. Both ways of a pair take turns, and a ratio is of the processor's time, which other work on
the machine disturbs less: other / ours, above 1 where ours is the faster. Ours is what pixcell_min
does; the others were tried and left out, or are what it did before.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from first_run import commit, machine  # noqa: E402
from pixcell_min import transformer  # noqa: E402
from pixcell_min.checkpoint import write_text  # noqa: E402
from pixcell_min.lora import LoRALinear, fold_lora, inject_lora, lora_parameters  # noqa: E402
from pixcell_min.precision import autocast, hold_products_in  # noqa: E402
from pixcell_min.training import build_optimizer  # noqa: E402
from pixcell_min.transformer import (  # noqa: E402
    Attention, PixCellTransformer, TransformerConfig, attend)
from pixcell_min.vae import AutoencoderKL, VAEConfig  # noqa: E402

CPU, BLOCKS, WIDTH, TOKENS = torch.device("cpu"), 4, 1152, 256
HALF = {"bf16": torch.bfloat16, "float32": None}
KINDS = {  # where time goes: torch's operators by the beginnings of their names
    "products and attention": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product",
                               "aten::mkldnn_convolution", "aten::_slow_conv2d"),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::fill_"),
    "point-wise": ("aten::gelu", "aten::silu", "aten::add", "aten::mul", "aten::_softmax", "aten::sum",
                   "aten::native_layer_norm", "aten::native_group_norm", "aten::sub", "aten::div"),
}


def build(precision, compiled=False):
    """Blocks with LoRA, neither A nor B zero, in training mode."""
    torch.manual_seed(0)
    model = PixCellTransformer(TransformerConfig(num_layers=BLOCKS)).eval()
    hold_products_in(model, HALF[precision])
    inject_lora(model, 8, 16, exclude=model.inert_layers(), generator=torch.Generator().manual_seed(0))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    if compiled:
        model.compile_blocks()
    return model.train()


def inputs(batch):
    g = torch.Generator().manual_seed(2)
    return (torch.randn(batch, 16, 32, 32, generator=g), torch.linspace(50, 950, batch).long(),
            torch.randn(batch, 1, 1536, generator=g))


def train(model, precision, batch=1):
    """Forward and backward; → (output, LoRA's gradients)."""
    model.zero_grad()
    with autocast(CPU, HALF[precision]):
        output = model(*inputs(batch))
    output[:, :16].float().square().mean().backward()
    return output.detach().float(), torch.cat([p.grad.flatten() for p in lora_parameters(model)])


@torch.no_grad()
def forward(model, precision, batch=2):
    with autocast(CPU, HALF[precision]):
        return (model(*inputs(batch)).float(),)


class LoRAProduct(torch.autograd.Function):
    """W·x + b + s·B·A·x with a backward by hand that keeps x and A·x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        low = scale * F.linear(x, A)
        ctx.save_for_backward(x, weight, A, B, low)
        ctx.scale = scale
        out = F.linear(x, weight, bias)
        out.flatten(0, -2).addmm_(low.flatten(0, -2), B.T)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, low = ctx.saved_tensors
        grad, flat, low = grad.flatten(0, -2), x.flatten(0, -2), low.flatten(0, -2)
        grad_low = ctx.scale * (grad @ B)
        grad_x = (grad @ weight).addmm_(grad_low, A).view(x.shape)
        return grad_x, None, None, grad_low.T @ flat, grad.T @ low, None


def by_hand(self, x):
    dtype = self.base.weight.dtype
    return LoRAProduct.apply(x.to(dtype), self.base.weight, self.base.bias, self.lora_A.to(dtype),
                             self.lora_B.to(dtype), self.scale * self.scaling)


def cast_by_each(self, h, context=None):
    """Attention's forward with its cast undone: each projection casts for itself."""
    if context is not None:
        return self.to_out[0](self.to_v(context))
    q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
               for x in (self.to_q(h), self.to_k(h), self.to_v(h)))
    return self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))


def fused_kernel(q, k, v):
    """Attention as torch offers it, in bf16 too."""
    return F.scaled_dot_product_attention(q, k, v)


def not_in_place(h, shift, scale, eps):
    """The transformer's `modulate` with three tensors instead of one."""
    return F.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale) + shift


def stacked(self, h, context=None):
    """Attention's forward with one product for q, k, v and one for their three A."""
    if context is not None:
        return self.to_out[0](self.to_v(context))
    layers = self.to_q, self.to_k, self.to_v
    if not hasattr(self, "whole"):
        self.whole = [torch.cat([getattr(layer.base, part).detach() for layer in layers])
                      for part in ("weight", "bias")]
    h = h.to(self.whole[0].dtype)
    low = F.linear(h, torch.cat([layer.lora_A for layer in layers])).chunk(3, dim=-1)
    q, k, v = (
        (x + layer.scaling * F.linear(r, layer.lora_B)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for x, r, layer in zip(F.linear(h, *self.whole).chunk(3, dim=-1), low, layers))
    return self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))


def packed(self, x):
    """A frozen layer by oneDNN's own operator, which torch keeps private and cannot differentiate."""
    if not hasattr(self, "blocked"):
        self.blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), TOKENS)
    return torch.ops.mkldnn._linear_pointwise(
        x.to(self.weight.dtype), self.blocked, self.bias, "none", [], "")


@contextmanager
def replaced(owner, method, name="forward"):
    kept = getattr(owner, name)
    setattr(owner, name, method)
    yield
    setattr(owner, name, kept)


def ratio(ours, other, turns) -> dict:
    """Median, lowest and highest of other / ours over turns; largest difference of results."""
    ratios, seconds = [], []
    for turn in range(turns + 1):
        times, results = [], []
        for way in (ours, other):
            began = time.process_time()
            results.append(way())
            times.append(time.process_time() - began)
        if turn:
            ratios.append(times[1] / times[0])
            seconds.append(times[0])
    differences = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results)]
    return {"ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "seconds": statistics.median(seconds), "difference": max(differences)}


def saved_mb(model, precision, batch) -> float:
    """What the forward keeps for the backward, weights aside."""
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, total = [], 0

    def keep(tensor):
        nonlocal total
        if (storage := tensor.untyped_storage()).data_ptr() not in held:
            held.add(storage.data_ptr())
            total += storage.nbytes()
        kept.append(tensor)  # or the next one may lie where it lay
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            autocast(CPU, HALF[precision]):
        model(*inputs(batch))
    return total / 1e6


@torch.no_grad()
def fused_qkv(precision, turns):
    """Three projections by one product, against three; forward alone."""
    dtype = HALF[precision] or torch.float32
    x, *weights = (torch.randn(TOKENS * 2, WIDTH).to(dtype), *torch.randn(3, WIDTH, WIDTH).to(dtype))
    whole = torch.cat(weights)
    return ratio(lambda: [torch.cat([F.linear(x, w) for w in weights], dim=1).float()],
                 lambda: [F.linear(x, whole).float()], turns)


@torch.no_grad()
def constants(precision, turns):
    """Share of a guided forward, at 28 blocks, that is the same in all steps, or all conditions."""
    model, (latents, timesteps, tokens) = build(precision).eval(), inputs(2)
    layers, times = len(model.transformer_blocks), {}
    with autocast(CPU, HALF[precision]):
        context = model.caption_projection(tokens)
        ways = {"all": lambda: model(latents, timesteps, tokens),
                "modulation and condition": lambda: (model.adaln_single(timesteps),
                                                     model.caption_projection(tokens)),
                "cross-attention": lambda: [b.attn2(tokens, context) for b in model.transformer_blocks]}
        for _ in range(turns + 1):
            for name, way in ways.items():
                began = time.process_time()
                way()
                times.setdefault(name, []).append(time.process_time() - began)
    whole, once, cross = (statistics.median(its[1:]) for its in times.values())
    full = once + (whole - once) * 28 / layers
    return {"modulation and condition": once / full, "cross-attention": cross * 28 / layers / full}


def matrix_rate(precision, turns=15) -> float:
    """FLOP per second of this network's products, by themselves."""
    dtype, times = HALF[precision] or torch.float32, []
    x, weight = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(4 * WIDTH, WIDTH).to(dtype)
    for _ in range(turns):
        began = time.process_time()
        F.linear(x, weight)
        times.append(time.process_time() - began)
    return 2 * TOKENS * WIDTH * 4 * WIDTH / statistics.median(times[1:])


def shares(work) -> dict:
    """Where a call's time goes: share of each of KINDS, and of the rest."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    times = {e.key: e.self_cpu_time_total for e in seen.key_averages()}
    kinds = {key: next((kind for kind, names in KINDS.items() if key.startswith(names)), "rest")
             for key in times}  # the first that fits: aten::add is how aten::addmm begins, too
    return {kind: sum(time for key, time in times.items() if kinds[key] == kind) / sum(times.values())
            for kind in (*KINDS, "rest")}


def half_residual(precision, turns):
    """The residual stream in bf16, tables too, as diffusers has it; ours adds up in float32."""
    ours, other = build(precision).eval(), build(precision).eval().to(HALF[precision])
    latents, timesteps, tokens = inputs(2)

    @torch.no_grad()
    def run(model, dtype):
        with autocast(CPU, HALF[precision]):
            return (model(latents.to(dtype), timesteps, tokens.to(dtype)).float(),)
    with torch.no_grad(), autocast(CPU, None):
        exact = build("float32").eval()(latents, timesteps, tokens)
    return ratio(lambda: run(ours, torch.float32), lambda: run(other, HALF[precision]), turns) | {
        "from float32": {name: ((run(model, dtype)[0] - exact).norm() / exact.norm()).item() for
                         name, model, dtype in (("ours", ours, torch.float32),
                                                ("other", other, HALF[precision]))}}


def at_medium(model, turns):
    """float32 with products that torch may round to bf16: not exact, so it would be an option."""
    def medium():
        torch.set_float32_matmul_precision("medium")
        result = train(model, "float32")
        torch.set_float32_matmul_precision("highest")
        return result
    return ratio(lambda: train(model, "float32"), medium, turns)


def optimizer(turns):
    """AdamW's step on LoRA of all 28 blocks: ours is fused."""
    def parameters():
        g = torch.Generator().manual_seed(3)
        found = [torch.randn(8, WIDTH, generator=g).requires_grad_() for _ in range(28 * 12)]
        for parameter in found:
            parameter.grad = torch.randn(parameter.shape, generator=g)
        return found
    ours, other = parameters(), parameters()
    ways = build_optimizer(ours, [], 1e-4, 1e-4, 0.01), torch.optim.AdamW(other, 1e-4, weight_decay=0.01)

    def step(optimizer, its):
        optimizer.step()
        return [torch.cat([p.detach() for p in its])]
    return ratio(lambda: step(ways[0], ours), lambda: step(ways[1], other), turns)


@torch.no_grad()
def convolutions(precision, turns, note):
    """The VAE as loaded, channels last, against its plain layout; where its time goes."""
    dtype, networks = HALF[precision] or torch.float32, []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        networks.append(AutoencoderKL(VAEConfig()).to(dtype).to(memory_format=layout))
    pixels, latents = torch.randn(1, 3, 256, 256).clamp(-1, 1), torch.randn(1, 16, 32, 32)

    def encode(vae):
        with autocast(CPU, HALF[precision]):
            return [vae.encode(pixels)[0].float()]

    def decode(vae):
        with autocast(CPU, HALF[precision]):
            return [vae.decode(latents).float()]
    for name, way in (("encode", encode), ("decode", decode)):
        note(f"plain layout of the VAE, {name}",
             ratio(lambda: way(networks[0]), lambda: way(networks[1]), turns))
        note(f"shares of a VAE {name}", shares(lambda: way(networks[0])))


def measure(precision, turns, bar) -> dict:
    """All levers at one precision."""
    model = build(precision)
    result = {}

    def note(name, value):
        result[name] = value
        bar.update()

    for batch in (1, 4):
        def step(*other, batch=batch):
            with replaced(*other) if other else nullcontext():
                return train(model, precision, batch)

        note(f"backward of LoRA by hand, batch {batch}",
             ratio(step, lambda: step(LoRALinear, by_hand), turns))
        if HALF[precision]:
            with replaced(Attention, cast_by_each):
                before = saved_mb(model, precision, batch)
            note(f"each projection casts, batch {batch}", ratio(
                step, lambda: step(Attention, cast_by_each), turns) | {
                "saved_mb": {"ours": saved_mb(model, precision, batch), "other": before}})
            note(f"fused attention kernel, batch {batch}", ratio(
                step, lambda: step(transformer, fused_kernel, "attend"), turns))
        note(f"modulation not in place, batch {batch}", ratio(
            step, lambda: step(transformer, not_in_place, "modulate"), turns))
        note(f"q, k, v and their LoRA stacked, batch {batch}",
             ratio(step, lambda: step(Attention, stacked), turns))
    note("one product for q, k, v", fused_qkv(precision, turns))
    note("the same in all steps, share", constants(precision, turns))
    active, folded = build(precision).eval(), build(precision).eval()
    fold_lora(folded)
    note("LoRA active, not fused, forward",
         ratio(lambda: forward(folded, precision), lambda: forward(active, precision), turns))

    def by_onednn():
        with replaced(nn.Linear, packed):
            return forward(folded, precision)
    note("weights packed, forward", ratio(lambda: forward(folded, precision), by_onednn, turns))
    if HALF[precision]:
        note("residual stream in bf16, forward", half_residual(precision, turns))
    else:
        note("float32 products at medium precision", at_medium(model, turns))
    pointwise = torch.compile(transformer.modulate), torch.compile(transformer.GELUProjection.forward)

    def parts_compiled():
        with (replaced(transformer, pointwise[0], "modulate"),
              replaced(transformer.GELUProjection, pointwise[1])):
            return train(model, precision)
    note("point-wise parts compiled, train", ratio(lambda: train(model, precision), parts_compiled, turns))
    compiled = build(precision, compiled=True)
    began = time.perf_counter()
    train(compiled, precision), forward(compiled, precision)
    first = time.perf_counter() - began
    note("compiled, train", ratio(lambda: train(model, precision), lambda: train(compiled, precision),
                                  turns) | {"compiling_seconds": first})
    model.eval(), compiled.eval()
    note("compiled, forward", ratio(lambda: forward(model, precision),
                                    lambda: forward(compiled, precision), turns))
    model.train()
    note("matrix products, flop per second", matrix_rate(precision))
    note("shares of a training step", shares(lambda: train(model, precision)))
    note("shares of a forward", shares(lambda: forward(folded, precision)))
    convolutions(precision, turns, note)
    note("AdamW not fused", optimizer(turns))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tqdm(unit="measure", total=44, disable=None) as bar:
        results = {precision: measure(precision, options.turns, bar) for precision in HALF}
    write_text(options.out, json.dumps(results | {
        "turns": options.turns, "blocks": BLOCKS, "commit": commit(), "machine": machine()}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
