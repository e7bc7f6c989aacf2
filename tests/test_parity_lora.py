"""LoRA against peft, on tiny diffusers networks: same weights, same output, gradients, merge and files."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from references import call, error, gradient_error, lora_twins, pixart, unet
from torch import nn

from pixcell_min.formats import load_lora
from pixcell_min.lora import (
    PEFT_PREFIX, LoRALinear, count_parameters, inject_lora, load_lora_state_dict,
    lora_disabled, lora_layers, lora_parameters, lora_state_dict, merge_lora, remove_lora, save_lora, unmerge_lora,
)

SAME_MATHS = 1e-6  # of the largest value, float32: s multiplies A·x here, B·(A·x) there
SAME_MATHS_FLOAT64 = 1e-12  # rounding that piles up through a network is about 1e-14 there, in float32 up to 4e-6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


OPTIONS = [{}, {"use_rslora": True}, {"rank": 1, "alpha": 1.0},
           {"rank_pattern": {"attn2.to_v": 2, "to_q": 7}, "alpha_pattern": {"to_k": 1.5}}]


@pytest.mark.parametrize("build", [pixart, unet])
@pytest.mark.parametrize("options, dtype, gradient_tolerance", [
    ({"alpha": 8.0}, torch.float32, SAME_MATHS),  # alpha / R a power of two: no rounding differs
    ({"rank": 1, "alpha": 1.0}, torch.float32, SAME_MATHS),
    *((options, torch.float64, SAME_MATHS_FLOAT64) for options in OPTIONS),
    *((options, torch.float32, None) for options in OPTIONS),  # output and merge alone
])
def test_output_gradients_and_merge(build, options, dtype, gradient_tolerance):
    ours, theirs = (net.to(dtype) for net in lora_twins(build, **options))
    mine, peer = call(ours, dtype), call(theirs, dtype)
    with lora_disabled(ours):
        assert error(call(ours, dtype), mine) > 0.01  # LoRA matters
    tolerance = SAME_MATHS if dtype == torch.float32 else SAME_MATHS_FLOAT64
    measured = {"output": (error(mine, peer), tolerance)}
    if gradient_tolerance:
        mine.square().mean().backward()
        peer.square().mean().backward()
        measured["gradient"] = gradient_error(ours, theirs), gradient_tolerance
    merge_lora(ours)
    merged = theirs.merge_and_unload()
    measured["merged output"] = error(call(ours, dtype), call(merged, dtype)), tolerance
    measured["merged weight"] = max(error(layer.base.weight, merged.get_submodule(name).weight)
                                    for name, layer in lora_layers(ours).items()), tolerance
    for what, (value, limit) in measured.items():
        assert value < limit, measured


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_of_one_layer_in_float32(use_rslora):
    layer, theirs = one_layer(6.0, use_rslora)
    x = torch.randn(64, 32, generator=generator(2))
    mine, peer = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(mine).square().mean().backward()
    theirs(peer).square().mean().backward()
    for what, got, expected in (("A", layer.lora_A, theirs.lora_A.default.weight), ("x", mine, peer),
                                ("B", layer.lora_B, theirs.lora_B.default.weight)):
        assert error(got.grad, expected.grad) < SAME_MATHS


def one_layer(alpha, use_rslora=False):
    """The same single layer of rank 5, ours and theirs."""
    layer = LoRALinear(nn.Linear(32, 24), 5, alpha, use_rslora=use_rslora, generator=generator())
    nn.init.normal_(layer.lora_B, generator=generator(1))
    net = nn.Sequential(nn.Linear(32, 24))
    net[0].load_state_dict(layer.base.state_dict())
    config = LoraConfig(r=5, lora_alpha=alpha, target_modules=["0"], use_rslora=use_rslora)
    theirs = get_peft_model(net, config).base_model.model[0]
    with torch.no_grad():
        theirs.lora_A.default.weight.copy_(layer.lora_A)
        theirs.lora_B.default.weight.copy_(layer.lora_B)
    return layer, theirs


def test_bfloat16_base():
    ours, theirs = lora_twins(pixart, torch.bfloat16, alpha=8.0)
    assert {p.dtype for name, p in theirs.named_parameters() if "lora" in name} == {torch.float32}
    mine, peer = call(ours, torch.bfloat16), call(theirs, torch.bfloat16)
    assert mine.dtype == peer.dtype == torch.bfloat16
    assert error(mine, peer) < SAME_MATHS  # the same casts at the same places, so the same roundings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, theirs = one_layer(alpha=10.0)
    x = torch.randn(64, 32, generator=generator(2))
    with torch.autocast("cpu", dtype=dtype):
        mine, peer = layer(x), theirs(x)
    assert mine.dtype == peer.dtype == dtype and error(mine, peer) < SAME_MATHS


def test_dropout_draws_the_same_numbers():
    ours, theirs = lora_twins(pixart, dropout=0.5)
    ours.train(), theirs.train()
    torch.manual_seed(5)
    mine = call(ours)
    torch.manual_seed(5)
    assert error(mine, call(theirs)) < SAME_MATHS


@pytest.mark.parametrize("init, peer", [("kaiming", True), ("gaussian", "gaussian")])
def test_start_has_the_same_distribution(init, peer):
    """Quantiles of 51,200 draws each; the standard error of a quantile is under 1 % of the spread."""
    net = nn.Sequential(nn.Linear(3200, 100))
    ours = LoRALinear(net[0], 16, 16, init=init, generator=generator()).lora_A.flatten()
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["0"], init_lora_weights=peer)
    theirs = get_peft_model(net, config).base_model.model[0]
    levels = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
    mine, other = (values.detach().quantile(levels) for values in (ours, theirs.lora_A.default.weight.flatten()))
    assert (mine - other).abs().max() < 0.03 * other.max()
    assert not theirs.lora_B.default.weight.any()


@pytest.mark.parametrize("options", OPTIONS)
def test_peft_loads_our_file(options, tmp_path):
    ours, _ = lora_twins(pixart, **options)
    save_lora(ours, tmp_path / "adapter_model.safetensors", {"base_hash": "abc"})
    layers = lora_layers(ours)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "target_modules": list(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items()},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items()}}
    if options.get("use_rslora"):
        config["use_rslora"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = PeftModel.from_pretrained(pixart(), tmp_path).eval()
    assert error(call(ours), call(theirs)) < SAME_MATHS
    twin = pixart()
    load_lora(twin, tmp_path / "adapter_model.safetensors", expected_base_hash="abc")
    assert torch.equal(call(twin), call(ours))


def test_we_load_what_peft_holds():
    ours, theirs = lora_twins(pixart)
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in get_peft_model_state_dict(theirs).items()}
    assert state.keys() == lora_state_dict(ours).keys()
    twin = pixart()
    inject_lora(twin, 4, 6.0)
    load_lora_state_dict(twin, state)
    assert error(call(twin), call(theirs)) < SAME_MATHS


def test_unet_is_wrapped_trained_and_restored():
    """A U-Net of convolutions, nested blocks and attention: the layers are found by name alone."""
    net = unet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    base_output = call(net)
    wrapped = inject_lora(net, 2, 4, generator=generator())
    places = {name.rsplit(".to_", 1)[0] for name in wrapped}
    assert {place.rsplit(".", 1)[1] for place in places} == {"attn1", "attn2"}
    assert {place.split(".")[0] for place in places} == {"down_blocks", "mid_block", "up_blocks"}
    assert len(wrapped) == 4 * len(places) and torch.equal(call(net), base_output)
    assert count_parameters(net)[0] == sum(p.numel() for p in lora_parameters(net))
    optimizer = torch.optim.AdamW(lora_parameters(net), lr=1e-2)
    for _ in range(2):  # B first, then A
        optimizer.zero_grad()
        call(net).square().mean().backward()
        optimizer.step()
    adapted = call(net)
    assert all(layer.lora_B.any() for layer in lora_layers(net).values()) and error(adapted, base_output) > 1e-3
    merge_lora(net)
    assert error(call(net), adapted) < SAME_MATHS
    unmerge_lora(net)
    remove_lora(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("options", [{"within": ("attn2",)}, {"blocks": [1]}])
def test_unet_subsets(options):
    everything = inject_lora(unet(), 2, 4)
    wanted = [name for name in everything if (".attn2." in name if "within" in options else ".1.attentions" in name)]
    assert inject_lora(unet(), 2, 4, **options) == wanted and 0 < len(wanted) < len(everything)
