"""LoRA without any peer: what is wrapped, the equation, precision, merging, gradients, files, refusals."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from pixcell_min.checkpoint import read_tensors
from pixcell_min.formats import load_lora
from pixcell_min.lora import (
    DEFAULT_TARGETS, PEFT_PREFIX, LoRALinear, count_parameters, disable_lora, enable_lora, fold_lora, inject_lora,
    install_lora, load_lora_state_dict, lora_disabled, lora_layers, lora_parameters, lora_state_dict, merge_lora,
    remove_lora, save_lora, set_lora_scale, unmerge_lora,
)

FLOAT32_ROUNDING = 1e-6  # of the largest output: W + s·B·A is rounded once, base + s·B·A·x once more
WIDTH, CONTEXT, DEPTH = 12, 8, 3


class Attention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, h, context):
        return self.to_out[0](torch.tanh(self.to_q(h)) * torch.tanh(self.to_k(context)) + self.to_v(context))


class Block(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(width, width), Attention(width, context), nn.Linear(width, width)

    def forward(self, h, context):
        h = h + self.attn1(h, h)
        return h + self.ff(torch.tanh(h + self.attn2(h, context)))


class Net(nn.Module):
    """The names of a denoiser, the sizes of a toy."""

    def __init__(self, width=WIDTH, context=CONTEXT, depth=DEPTH):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, context) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)
        self.register_buffer("null", torch.zeros(context))

    def forward(self, h, context):
        for block in self.blocks:
            h = block(h, context + self.null)
        return self.proj_out(h)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(dtype=torch.float32, **options):
    """A seeded network with LoRA whose B is not zero, in eval mode, and inputs."""
    torch.manual_seed(1)
    net = Net().to(dtype).eval()
    inject_lora(net, **{"rank": 4, "alpha": 8, "generator": generator(2), **options})
    randomize(net)
    return net, inputs(dtype)


def randomize(net, seed=3):
    g = generator(seed)
    with torch.no_grad():
        for layer in lora_layers(net).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) / 10)


def inputs(dtype=torch.float32):
    g = generator(4)
    return torch.randn(2, 5, WIDTH, generator=g).to(dtype), torch.randn(2, 5, CONTEXT, generator=g).to(dtype)


def bits(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_bits(net, before):
    after = net.state_dict()
    assert after.keys() == before.keys()
    for key in before:
        assert torch.equal(after[key], before[key]), key


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def names(depth=range(DEPTH), places=("attn1", "attn2"), targets=DEFAULT_TARGETS):
    return [f"blocks.{i}.{place}.{target}" for i in depth for place in places for target in targets]


# what is wrapped


@pytest.mark.parametrize("options, expected", [
    ({}, names()),
    ({"within": ("attn1",)}, names(places=("attn1",))),
    ({"within": ("attn2",)}, names(places=("attn2",))),
    ({"blocks": range(1, 3)}, names(depth=(1, 2))),
    ({"targets": ("to_out.0", "to_q")}, names(targets=("to_q", "to_out.0"))),
    ({"targets": ("ff", "proj_out"), "within": None}, ["blocks.0.ff", "blocks.1.ff", "blocks.2.ff", "proj_out"]),
    ({"targets": ("blocks.1.attn2.to_v",)}, ["blocks.1.attn2.to_v"]),
    ({"targets": ("to_q",), "exclude": ["blocks.0.attn2.to_q"]},
     [name for name in names(targets=("to_q",)) if name != "blocks.0.attn2.to_q"]),
])
def test_wraps_exactly_the_named_layers_in_order(options, expected):
    net = Net()
    linears = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    assert inject_lora(net, 4, 8, **options) == expected
    assert list(lora_layers(net)) == expected
    for name, layer in lora_layers(net).items():
        assert net.get_submodule(name) is layer
        assert layer.base is linears[name]  # wrapped, not re-created


def test_a_full_name_does_not_match_a_longer_name():
    net = nn.ModuleDict({"attn1": Attention(WIDTH, WIDTH), "mid": nn.ModuleDict({"attn1": Attention(WIDTH, WIDTH)})})
    path_names = inject_lora(net, 2, 2, targets=("mid.attn1.to_q", "to_v"), within=None)
    assert path_names == ["attn1.to_v", "mid.attn1.to_q", "mid.attn1.to_v"]
    remove_lora(net)
    with pytest.raises(ValueError, match="'o_q' matches no layer"):  # the end of a word is not the end of a path
        inject_lora(net, 2, 2, targets=("o_q",), within=None)


def test_everything_else_is_frozen():
    net, _ = make()
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{key}" for name in names() for key in ("lora_A", "lora_B")}
    assert [id(p) for p in lora_parameters(net)] == [id(p) for p in net.parameters() if p.requires_grad]


def test_start_is_the_base_bit_for_bit():
    torch.manual_seed(1)
    net = Net()
    expected = net(*inputs())
    inject_lora(net, 4, 8, generator=generator())
    assert torch.equal(net(*inputs()), expected)


def test_published_count_of_the_full_size_network():
    """FACTS: rank 8 on all attention of PixCell-256 is 4,128,768 parameters in 448 tensors, a quarter of them inert."""
    with torch.device("meta"):
        net = Net(width=1152, context=1152, depth=28)
    inert = names(depth=range(28), places=("attn2",), targets=("to_q", "to_k"))
    base = sum(p.numel() for p in net.parameters())
    inject_lora(net, 8, 16)
    assert count_parameters(net) == (4_128_768, base + 4_128_768)
    assert len(lora_parameters(net)) == 448
    remove_lora(net)
    inject_lora(net, 8, 16, exclude=inert)
    assert count_parameters(net)[0] == 4_128_768 * 3 // 4
    assert len(lora_parameters(net)) == 336


# the start


def test_kaiming_is_uniform_between_plus_minus_one_over_root_in():
    layer = LoRALinear(nn.Linear(400, 300), 64, 64, init="kaiming", generator=generator())
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(layer.lora_A.mean().item()) < 0.02 * bound


@pytest.mark.parametrize("rank", [4, 64])
def test_gaussian_has_standard_deviation_one_over_rank(rank):
    layer = LoRALinear(nn.Linear(6400, 300), rank, 64, init="gaussian", generator=generator())
    assert layer.lora_A.std().item() == pytest.approx(1 / rank, rel=0.02)
    assert (layer.lora_A.abs() > 2 / rank).float().mean().item() == pytest.approx(0.0455, abs=0.005)  # normal tails


def test_shapes_and_zero_B():
    layer = LoRALinear(nn.Linear(7, 5), 3, 6)
    assert layer.lora_A.shape == (3, 7) and layer.lora_B.shape == (5, 3)
    assert not layer.lora_B.any() and layer.scaling == 2
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_start_depends_on_the_generator_alone(init):
    def draw(global_seed, seed):
        torch.manual_seed(global_seed)
        layer = LoRALinear(base, 4, 4, init=init, generator=generator(seed))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=generator(global_seed)))  # global stream untouched
        return layer.lora_A

    base = nn.Linear(8, 8)
    assert torch.equal(draw(0, 5), draw(1, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6))
    start = draw(0, 5)
    with torch.device("meta"):  # nor does it depend on what the caller makes elsewhere
        assert torch.equal(LoRALinear(base, 4, 4, init=init, generator=generator(5)).lora_A, start)


def test_parameters_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        layer = LoRALinear(nn.Linear(8, 8), 4, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.base.weight.dtype == torch.float64
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


# the equation


def test_equation_by_hand():
    layer = LoRALinear(nn.Linear(2, 2), rank=1, alpha=3)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.base.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [2.0]]))
    # x = (5, 1): W·x + b = (17, 39); A·x = 4; s·B·A·x = 3·(4, 8)
    assert layer(torch.tensor([5.0, 1.0])).tolist() == [29.0, 63.0]


@pytest.mark.parametrize("use_rslora, scaling", [(False, 2.0), (True, 4.0)])
def test_scaling(use_rslora, scaling):
    layer = LoRALinear(nn.Linear(8, 8), 4, 8, use_rslora=use_rslora)
    assert layer.scaling == scaling
    nn.init.ones_(layer.lora_B)
    x = torch.randn(3, 8, generator=generator())
    torch.testing.assert_close(layer(x) - layer.base(x), scaling * (x @ layer.lora_A.T @ layer.lora_B.T))


def test_longest_pattern_decides():
    net, _ = make(rank=2, alpha=2, rank_pattern={"to_q": 3, "attn2.to_q": 5, "blocks.1.attn2.to_q": 7},
                  alpha_pattern={"blocks.0.attn1.to_v": 9.0})
    layers = lora_layers(net)
    ranks = {name: layer.rank for name, layer in layers.items()}
    assert (ranks["blocks.1.attn2.to_q"], ranks["blocks.0.attn2.to_q"], ranks["blocks.1.attn1.to_q"]) == (7, 5, 3)
    assert {ranks[name] for name in names(targets=("to_k", "to_v", "to_out.0"))} == {2}
    assert layers["blocks.0.attn1.to_v"].scaling == 4.5 and layers["blocks.1.attn1.to_v"].scaling == 1
    assert layers["blocks.1.attn2.to_q"].lora_A.shape == (7, WIDTH)


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 4, 12)])
def test_any_leading_shape(shape):
    layer = LoRALinear(nn.Linear(12, 5), 2, 2)
    assert layer(torch.zeros(shape)).shape == (*shape[:-1], 5)


# dropout


def test_dropout_acts_on_the_low_rank_input_alone_and_only_in_training():
    net, x = make(dropout=0.5)
    assert all(not layer.training for layer in lora_layers(net).values())  # wrapped into a network set to eval()
    assert torch.equal(net(*x), net(*x))
    layer = LoRALinear(nn.Linear(8, 8), 8, 8, dropout=0.25)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(8))
        layer.lora_B.copy_(torch.eye(8))
    x = torch.ones(4000, 8)
    torch.manual_seed(0)
    extra = layer(x) - layer.base(x)
    kept = extra.abs() > 0.5
    torch.testing.assert_close(extra[kept], torch.full_like(extra[kept], 4 / 3))  # kept ones grow by 1/(1 - p)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.manual_seed(0)
    assert torch.equal(layer(x) - layer.base(x), extra)  # the global generator decides


def test_gradient_checkpointing_replays_dropout():
    def gradients(call):
        net, x = make(dropout=0.3)
        net.train()
        torch.manual_seed(0)
        call(net, x).square().sum().backward()
        return [p.grad for p in lora_parameters(net)]

    plain = gradients(lambda net, x: net(*x))
    replayed = gradients(lambda net, x: checkpoint(net, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed))


# precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_base_keeps_float32_lora(dtype):
    net, x = make(dtype)
    assert all(p.dtype == torch.float32 for p in lora_parameters(net))
    out = net(*x)
    assert out.dtype == dtype and torch.isfinite(out).all()
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in lora_parameters(net))
    layer = LoRALinear(nn.Linear(WIDTH, 6).to(dtype), 4, 8)
    nn.init.normal_(layer.lora_B)
    low = layer.scaling * (x[0].float() @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.equal(layer(x[0]), (layer.base(x[0]) + low).to(dtype))  # summed in float32, rounded once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converting_the_network_spares_lora(dtype):
    net, _ = make()
    before = lora_state_dict(net)
    weight = net.blocks[0].attn1.to_q.base.weight.clone()
    net.to(dtype)
    assert torch.equal(net.blocks[0].attn1.to_q.base.weight, weight.to(dtype))
    assert net.proj_out.weight.dtype == dtype
    for key, tensor in lora_state_dict(net).items():
        assert torch.equal(tensor, before[key])
    assert net(*inputs(dtype)).dtype == dtype
    assert all(p.dtype == torch.float64 for p in lora_parameters(net.double()))  # wider is allowed


def test_autocast_decides_the_precision():
    layer = LoRALinear(nn.Linear(WIDTH, 6), 4, 8)
    nn.init.normal_(layer.lora_B)
    x = inputs()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        low = torch.nn.functional.linear(x, layer.lora_A) * layer.scaling
        assert torch.equal(out, layer.base(x) + torch.nn.functional.linear(low, layer.lora_B))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_float16_training_step_with_gradscaler():
    net, x = make()
    net.train()
    optimizer, scaler = torch.optim.AdamW(lora_parameters(net), lr=1e-2), torch.amp.GradScaler("cpu")
    before = lora_state_dict(net)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = net(*x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # raises on float16 gradients
    scaler.step(optimizer)
    assert all(not torch.equal(after, before[key]) for key, after in lora_state_dict(net).items())


# on and off


def test_disable_and_enable():
    net, x = make()
    with torch.no_grad():
        adapted = net(*x)
        disable_lora(net)
        base = net(*x)
        enable_lora(net)
        assert torch.equal(net(*x), adapted) and not torch.equal(base, adapted)
        with lora_disabled(net):
            assert torch.equal(net(*x), base)
            with lora_disabled(net):
                pass
            assert torch.equal(net(*x), base)  # the inner block restores "off"
        assert torch.equal(net(*x), adapted)
        with pytest.raises(KeyError), lora_disabled(net):
            raise KeyError
        assert torch.equal(net(*x), adapted)
        remove_lora(net)
        with lora_disabled(net):  # a plain network is its base already
            assert torch.equal(net(*x), base)


def test_scale_is_absolute_and_zero_is_the_base():
    net, x = make()
    layer = net.blocks[0].attn1.to_q
    delta = layer(x[0]) - layer.base(x[0])
    for scale in (0.5, 0.5, -1, 0):
        set_lora_scale(net, scale)
        torch.testing.assert_close(layer(x[0]) - layer.base(x[0]), scale * delta, rtol=1e-4, atol=1e-6)
    with lora_disabled(net):
        base = net(*x)
    assert torch.equal(net(*x), base)


def test_eval_and_train_change_no_bit():
    net, _ = make()
    before = bits(net)
    for mode in (False, True, False):
        net.train(mode)
        assert_bits(net, before)


# merging


@pytest.mark.parametrize("use_rslora, scale", [(False, 1.0), (True, 0.7)])
def test_merged_equals_wrapped(use_rslora, scale):
    net, x = make(use_rslora=use_rslora)
    set_lora_scale(net, scale)
    with torch.no_grad():
        wrapped = net(*x)
        with lora_disabled(net):
            base = net(*x)
        merge_lora(net)
        assert all(layer.merged for layer in lora_layers(net).values())
        assert relative(net(*x), wrapped) < FLOAT32_ROUNDING
        assert relative(base, wrapped) > 0.01  # and that is not because nothing happens
        unmerge_lora(net)
        assert torch.equal(net(*x), wrapped)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_merge_rounds_once_and_unmerge_restores_the_bits(dtype):
    net, _ = make(dtype)
    before = bits(net)
    pointers = {name: layer.base.weight.data_ptr() for name, layer in lora_layers(net).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the product
        merge_lora(net)
    for name, layer in lora_layers(net).items():
        old = before[f"{name}.base.weight"]
        expected = (old.to(torch.promote_types(dtype, torch.float32)) + 2.0 * (layer.lora_B @ layer.lora_A)).to(dtype)
        assert torch.equal(layer.base.weight, expected) and layer.base.weight.dtype == dtype
        assert not torch.equal(layer.base.weight, old)
        assert layer.unmerged_weight.numel() == old.numel()  # the stated memory: one second W
    assert net.state_dict().keys() == before.keys()  # the kept copy is in no file
    unmerge_lora(net)
    assert_bits(net, before)
    assert {name: layer.base.weight.data_ptr() for name, layer in lora_layers(net).items()} == pointers
    assert all(layer.unmerged_weight is None for layer in lora_layers(net).values())


def test_merged_network_may_be_converted_and_copied():
    net, _ = make()
    expected = {key: value.half() for key, value in bits(net).items() if "base" in key}
    merge_lora(net)
    twin = copy.deepcopy(net).half()
    unmerge_lora(twin)
    for key, value in expected.items():
        assert torch.equal(twin.state_dict()[key], value)
    assert all(layer.merged for layer in lora_layers(net).values())


def test_merged_refuses_what_would_be_wrong():
    net, x = make()
    state = lora_state_dict(net)
    with pytest.raises(ValueError, match="not merged"):
        unmerge_lora(net)
    disable_lora(net)
    with pytest.raises(ValueError, match="disabled"):
        merge_lora(net)
    enable_lora(net)
    merge_lora(net)
    merged = bits(net)
    for call in (merge_lora, enable_lora, disable_lora, lambda n: set_lora_scale(n, 2.0),
                 lambda n: load_lora_state_dict(n, state), lambda n: lora_disabled(n).__enter__()):
        with pytest.raises(ValueError, match="merged"):
            call(net)
        assert_bits(net, merged)
    net(*x)  # in eval mode it may sample
    for layer in list(lora_layers(net).values())[1:]:
        layer.unmerge()  # one merged layer is enough
    for call, purpose in ((lambda n: set_lora_scale(n, 2.0), "changing its scale"),
                          (enable_lora, "switching it"),
                          (lambda n: load_lora_state_dict(n, state), "loading weights")):
        with pytest.raises(ValueError, match=rf"call unmerge_lora\(model\) before {purpose}"):
            call(net)
    net.train()
    with pytest.raises(ValueError, match="cannot train"):
        net(*x)


def test_fold_leaves_a_plain_network_of_merged_weights_and_no_copy():
    net, x = make()
    twin = copy.deepcopy(net)
    merge_lora(twin)
    places = {name: layer.base.weight.data_ptr() for name, layer in lora_layers(net).items()}
    fold_lora(net)
    for name, place in places.items():  # no second one: the page of a mapped file is replaced
        assert net.get_submodule(name).weight.data_ptr() == place
    assert not lora_layers(net) and type(net) is type(twin)
    with torch.no_grad():
        assert torch.equal(net(*x), twin(*x))
    plain = {name.replace(".base.", "."): tensor for name, tensor in bits(twin).items() if "lora" not in name}
    assert_bits(net, plain)  # the names too
    disabled, merged = make()[0], make()[0]  # the last layer alone: the others stay, too
    [*lora_layers(disabled).values()][-1].enabled = False
    [*lora_layers(merged).values()][-1].merge()
    for wrong, message in ((net, "no LoRA layer"), (merged, "LoRA is merged: .* before folding it"),
                           (disabled, "LoRA is disabled: call enable_lora before")):
        before = bits(wrong)
        with pytest.raises(ValueError, match=message):
            fold_lora(wrong)
        assert_bits(wrong, before)


def test_remove():
    net, x = make()
    with torch.no_grad(), lora_disabled(net):
        base = net(*x)
    plain = copy.deepcopy(net)
    remove_lora(plain)
    assert torch.equal(plain(*x), base) and not lora_layers(plain) and type(plain.blocks[0].attn1.to_q) is nn.Linear
    merge_lora(net)
    merged = net(*x)
    remove_lora(net)
    assert torch.equal(net(*x), merged) and not any(p.requires_grad for p in net.parameters())
    inject_lora(net, 2, 2)  # and LoRA may be injected again
    assert torch.equal(net(*x), merged)


# gradients


def test_only_lora_moves():
    net, x = make()
    net.train()
    before = bits(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    net(*x).square().mean().backward()
    optimizer.step()
    for key, after in net.state_dict().items():
        assert torch.equal(after, before[key]) == ("lora" not in key), key
    assert all(p.grad is None for name, p in net.named_parameters() if "lora" not in name)


def test_first_gradients_reach_B_alone():
    net, x = make()
    for layer in lora_layers(net).values():
        nn.init.zeros_(layer.lora_B)
    net(*x).square().mean().backward()
    for layer in lora_layers(net).values():
        assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_gradients_are_those_of_the_merged_formula():
    net, x = make(torch.float64, use_rslora=True)
    net.double()
    x = [value.double() for value in x]
    net(*x).square().sum().backward()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters() if "lora" in name}
    weights = {f"{name}.base.weight": layer.base.weight
               + layer.alpha / math.sqrt(layer.rank) * parameters[f"{name}.lora_B"] @ parameters[f"{name}.lora_A"]
               for name, layer in lora_layers(net).items()}
    disable_lora(net)
    torch.func.functional_call(net, weights, tuple(x)).square().sum().backward()
    for name, p in net.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(p.grad, parameters[name].grad, rtol=1e-10, atol=1e-12)  # float64


def test_gradcheck():
    layer = LoRALinear(nn.Linear(4, 3), 2, 5, generator=generator()).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True, generator=generator(1))

    def call(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.lora_A, layer.lora_B))


# refusals of inject_lora


@pytest.mark.parametrize("options, words", [
    ({"targets": ("to_q", "to_query")}, ["'to_query' matches no layer", "blocks.0.attn1.to_q"]),
    ({"targets": ("attn1",)}, ["'attn1' matches no layer"]),  # a place is no linear layer
    ({"targets": ()}, ["nothing to wrap"]),
    ({"within": ("attn1", "attn3")}, ["'attn3' matches no layer"]),
    ({"blocks": range(1, 5)}, ["3 matches no layer"]),
    ({"exclude": ["blocks.0.attn2.to_query"]}, ["'blocks.0.attn2.to_query' matches no layer"]),
    ({"within": ("attn2",), "targets": ("to_q",), "exclude": names(places=("attn2",), targets=("to_q",))},
     ["3 layers match, all are excluded"]),
    ({"rank_pattern": {"to_query": 2}}, ["'to_query' matches no layer"]),
    ({"alpha_pattern": {"proj_out": 2}}, ["'proj_out' matches no layer"]),  # there, but not wrapped
    ({"rank": 0}, ["blocks.0.attn1.to_q", "1 to min(in, out) = 12", "got 0"]),
    ({"rank": 9}, ["blocks.0.attn2.to_k", "1 to min(in, out) = 8", "got 9"]),
    ({"rank_pattern": {"blocks.2.attn2.to_v": 9}}, ["blocks.2.attn2.to_v", "got 9"]),
    ({"rank": 2.0}, ["got 2.0"]), ({"rank": True}, ["got True"]), ({"rank": -1}, ["got -1"]),
    ({"alpha": 0}, ["alpha", "got 0"]), ({"alpha": -1.0}, ["alpha"]), ({"alpha": math.nan}, ["alpha", "nan"]),
    ({"alpha": math.inf}, ["alpha", "inf"]), ({"alpha_pattern": {"blocks.2.attn2.to_v": 0}}, ["blocks.2.attn2.to_v"]),
    ({"alpha": "8"}, ["alpha", "'8'"]),
    ({"dropout": 1.0}, ["dropout", "got 1.0"]), ({"dropout": -0.1}, ["dropout"]), ({"dropout": math.nan}, ["dropout"]),
    ({"init": "xavier"}, ["'kaiming' or 'gaussian'", "'xavier'"]),
])
def test_refusals_leave_no_trace(options, words):
    net = Net()
    before = bits(net)
    with pytest.raises(ValueError) as caught:
        inject_lora(net, **{"rank": 4, "alpha": 8, **options})
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert_bits(net, before)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "2"])
def test_a_layer_refuses_a_rank_that_is_no_count_and_takes_any_other(rank):
    with pytest.raises(ValueError, match=f"Linear: LoRA rank must be an integer from 1, got {rank!r}"):
        LoRALinear(nn.Linear(4, 4), rank, 1)
    assert LoRALinear(nn.Linear(4, 4), 5, 1).rank == 5  # as files of peft may hold
    net = Net()
    inject_lora(net, 8, 8, targets=("to_k",), within=("attn2",))  # min(in, out), the largest
    assert {layer.rank for layer in lora_layers(net).values()} == {8}


def test_second_injection_and_missing_lora_are_refused(tmp_path):
    net, _ = make()
    save_lora(net, tmp_path / "lora_weights.safetensors")
    for call in (lambda: inject_lora(net, 4, 8, targets=("proj_out",), within=None),
                 lambda: load_lora(net, tmp_path / "lora_weights.safetensors")):
        with pytest.raises(ValueError, match="holds 24 LoRA layers"):
            call()
    for call in (lora_parameters, enable_lora, disable_lora, merge_lora, unmerge_lora, remove_lora, lora_state_dict,
                 lambda n: set_lora_scale(n, 1.0), lambda n: load_lora_state_dict(n, {}),
                 lambda n: save_lora(n, tmp_path / "x.safetensors")):
        with pytest.raises(ValueError, match="no LoRA layer"):
            call(Net())


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_must_be_finite(scale):
    net, _ = make()
    with pytest.raises(ValueError, match="finite"):
        set_lora_scale(net, scale)


# state and files


def test_state_round_trip():
    net, x = make()
    state = lora_state_dict(net)
    assert list(state) == [f"{name}.{key}.weight" for name in names() for key in ("lora_A", "lora_B")]
    assert state["blocks.1.attn2.to_k.lora_A.weight"].shape == (4, CONTEXT)
    assert state["blocks.1.attn2.to_k.lora_B.weight"].shape == (WIDTH, 4)
    expected = net(*x)
    kept = {key: value.clone() for key, value in state.items()}
    for p in lora_parameters(net):
        nn.init.ones_(p)
    assert all(torch.equal(state[key], kept[key]) for key in state)  # copies: training on does not alter them
    load_lora_state_dict(net, state)
    assert torch.equal(net(*x), expected)


def edit(key, change):
    def apply(state):
        state[key] = change(state[key])
    return apply


KEY_A, KEY_B = "blocks.1.attn2.to_k.lora_A.weight", "blocks.1.attn2.to_k.lora_B.weight"
WRONG = {
    "missing partner": (lambda s: s.pop(KEY_A), ["missing", KEY_A]),
    "missing pair": (lambda s: (s.pop(KEY_A), s.pop(KEY_B)), ["missing", KEY_A, "2 such"]),
    "unknown key": (lambda s: s.update(extra=torch.zeros(1)), ["unexpected", "extra"]),
    "renamed": (lambda s: s.update({"blocks.9.attn2.to_k.lora_A.weight": s.pop(KEY_A)}), ["LoRA key", "2 such"]),
    "shape of A": (edit(KEY_A, lambda t: t[:, 1:]), [KEY_A, "(4, 7)", "(4, 8)"]),
    "shape of B": (edit(KEY_B, lambda t: t.T), [KEY_B, "(4, 12)", "(12, 4)"]),
    "rank": (edit(KEY_A, lambda t: t[:3]), [KEY_A, "(3, 8)", "(4, 8)"]),
    "scalar": (edit(KEY_A, lambda t: t[0, 0]), [KEY_A, "()"]),
    "NaN": (edit(KEY_B, lambda t: t * math.nan), [KEY_B, "NaN"]),
    "infinity": (edit(KEY_A, lambda t: t / 0), [KEY_A, "infinity"]),
    "whole numbers": (edit(KEY_A, lambda t: t.long()), [KEY_A, "floating"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_state_is_refused_and_nothing_copied(case):
    spoil, words = WRONG[case]
    net, _ = make()
    state = lora_state_dict(make(generator=generator(7))[0])
    before = bits(net)
    spoil(state)
    with pytest.raises(ValueError) as caught:
        load_lora_state_dict(net, state, "some file")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in ["some file", *words]), message
    assert_bits(net, before)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_refused_and_the_network_untouched(case, tmp_path):
    spoil, words = WRONG[case]
    net, _ = make()
    path = write_spoiled(net, tmp_path, spoil)
    refuse(path, words)


def test_install_wraps_what_fits_whole_and_nothing_else():
    net, x = make()
    state, plain = lora_state_dict(net), copy.deepcopy(net)
    remove_lora(plain)
    layers = {name: dict(rank=4, alpha=8, dropout=0.0, use_rslora=False) for name in names()}
    less = {key: tensor for key, tensor in state.items() if key != KEY_A}
    with pytest.raises(ValueError, match=f"^LoRA: missing LoRA key '{KEY_A}'"):
        install_lora(plain, layers, less)
    assert not lora_layers(plain)
    install_lora(plain, layers, state)
    assert torch.equal(plain(*x), net(*x))
    with pytest.raises(ValueError, match=f"^LoRA state: missing LoRA key '{KEY_A}'"):
        load_lora_state_dict(plain, less)


def write_spoiled(net, folder, spoil, header=None):
    path = folder / "lora_weights.safetensors"
    save_lora(net, path)
    tensors, metadata = read_tensors(path)
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    spoil(state)
    state = {PEFT_PREFIX + key: value.contiguous() for key, value in state.items()}
    save_file(state, path, metadata=metadata if header is None else header(metadata))
    return path


def refuse(path, words, **options):
    plain = Net()
    before = bits(plain)
    with pytest.raises(ValueError) as caught:
        load_lora(plain, path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [str(path), *words]), message
    assert_bits(plain, before)
    assert all(p.requires_grad for p in plain.parameters())


def config_edit(change):
    def header(metadata):
        config = json.loads(metadata["lora_config"])
        changed = change(config)
        config = config if changed is None else changed
        return {**metadata, "lora_config": json.dumps(config)}
    return header


@pytest.mark.parametrize("header, words", [
    (lambda m: {"format": "pt"}, ["no readable lora_config"]),
    (lambda m: {**m, "lora_config": "{"}, ["no readable lora_config"]),
    (config_edit(lambda c: [1, 2]), ["no readable lora_config"]),
    (config_edit(lambda c: c["blocks.0.attn1.to_q"].pop("alpha") and None), ["no readable lora_config"]),
    (config_edit(lambda c: c.update({"blocks.0.attn1.to_q": 3})), ["no readable lora_config"]),
    (config_edit(lambda c: c["blocks.0.attn1.to_q"].update(rank=3)), ["blocks.0.attn1.to_q", "(4, 12)", "(3, 12)"]),
    (config_edit(lambda c: c.pop("blocks.0.attn1.to_q") and None), ["unexpected", "blocks.0.attn1.to_q"]),
    (config_edit(lambda c: {}), ["unexpected"]),
])
def test_wrong_header_is_refused(header, words, tmp_path):
    refuse(write_spoiled(make()[0], tmp_path, lambda s: None, header), words)


@pytest.mark.parametrize("value", [0, -1, "8", math.nan, None])
def test_wrong_alpha_in_the_header_is_refused(value, tmp_path):
    header = config_edit(lambda c: c["blocks.0.attn1.to_q"].update(alpha=value))
    path = write_spoiled(make()[0], tmp_path, lambda s: None, header)
    plain = Net()
    with pytest.raises(ValueError, match="blocks.0.attn1.to_q: LoRA alpha"):
        load_lora(plain, path)
    assert not lora_layers(plain)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model."])
def test_another_prefix_is_refused(prefix, tmp_path):
    net, _ = make()
    save_lora(net, tmp_path / "a.safetensors")
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    save_file({prefix + key.removeprefix(PEFT_PREFIX): t for key, t in tensors.items()}, tmp_path / "b.safetensors",
              metadata=metadata)
    refuse(tmp_path / "b.safetensors", ["LoRA key"])


def test_truncated_missing_and_empty_files_are_refused(tmp_path):
    net, _ = make()
    path = tmp_path / "lora_weights.safetensors"
    refuse(path, ["no such file"])
    save_lora(net, path)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 4, 0):
        path.write_bytes(whole[:length])
        refuse(path, [])


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True, "dropout": 0.25}, {"within": ("attn2",), "blocks": [0, 2]},
    {"rank_pattern": {"to_q": 1, "blocks.1.attn1.to_v": 12}, "alpha_pattern": {"to_k": 3.5}},
])
def test_file_round_trip(options, tmp_path):
    net, x = make(**options)
    set_lora_scale(net, 0.5)  # how it is used here, not what was trained: not saved
    path = tmp_path / "lora_weights.safetensors"
    save_lora(net, path, {"base_hash": "abc", "note": "ä"})
    set_lora_scale(net, 1.0)
    twin = Net().eval()
    remove_lora(net_base := copy.deepcopy(net))
    twin.load_state_dict(net_base.state_dict())
    metadata = load_lora(twin, path, expected_base_hash="abc")
    assert metadata["base_hash"] == "abc" and metadata["note"] == "ä" and metadata["format"] == "pt"
    assert torch.equal(twin(*x), net(*x))
    for name, layer in lora_layers(net).items():
        other = twin.get_submodule(name)
        for setting in ("rank", "alpha", "dropout", "use_rslora", "scaling"):
            assert getattr(other, setting) == getattr(layer, setting)
    assert count_parameters(twin) == count_parameters(net)
    remove_lora(twin)
    load_lora(twin, path, scale=0.5)
    set_lora_scale(net, 0.5)
    assert torch.equal(twin(*x), net(*x))


def test_file_layout(tmp_path):
    net, _ = make(alpha=16, rank_pattern={"blocks.0.attn1.to_q": 2})
    save_lora(net, tmp_path / "lora_weights.safetensors", {"base_hash": "abc"})
    tensors, metadata = read_tensors(tmp_path / "lora_weights.safetensors")
    assert set(tensors) == {f"base_model.model.{name}.lora_{part}.weight" for name in names() for part in "AB"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    config = json.loads(metadata["lora_config"])
    assert list(config) == names() and metadata.keys() == {"format", "base_hash", "lora_config"}
    assert config["blocks.0.attn1.to_q"] == {"rank": 2, "alpha": 16, "dropout": 0.0, "use_rslora": False}
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_lora(net, tmp_path / "lora_weights.pth")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_in_a_file_become_float32(dtype, tmp_path):
    net, _ = make()
    path = write_spoiled(net, tmp_path, lambda s: s.update({key: value.to(dtype) for key, value in s.items()}))
    plain = Net()
    load_lora(plain, path)
    for name, layer in lora_layers(plain).items():
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert torch.equal(layer.lora_B, net.get_submodule(name).lora_B.to(dtype).float())


def test_base_hash(tmp_path):
    net, _ = make()
    path = tmp_path / "lora_weights.safetensors"
    save_lora(net, path, {"base_hash": "abc"})
    refuse(path, ["abc", "def"], expected_base_hash="def")
    load_lora(Net(), path)  # not asked, not compared
    save_lora(net, path)
    assert "base_hash" not in load_lora(Net(), path, expected_base_hash="def")  # names none: accepted


def test_lora_of_a_larger_network_is_refused(tmp_path):
    torch.manual_seed(0)
    deep = Net(depth=DEPTH + 1)
    inject_lora(deep, 4, 4)
    save_lora(deep, tmp_path / "a.safetensors")
    refuse(tmp_path / "a.safetensors", ["16 such keys", "blocks.3.attn1.to_k.lora_A.weight"])
