"""The network by itself: condition tokens, precision, position codes, refusals, strict loading."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TRANSFORMER
from safetensors.torch import load_file, save_file

from pixcell_min import transformer as module
from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.embeddings import normal_start, sincos_grid, timestep_sinusoid
from pixcell_min.lora import count_parameters, inject_lora, lora_disabled, lora_parameters
from pixcell_min.transformer import (
    FIXED, WEIGHTS_NAME, Attention, Block, PixCellTransformer, TransformerConfig, attend,
)

ROUNDING = 1e-6  # float32, values of order 1, the same sums in another order
HALF_ROUNDING = 2e-3  # float16 keeps 11 bits: 4.9e-4 of each value, a few of them summed
BF16_ROUNDING = 2e-2  # bfloat16 keeps 8 bits: 3.9e-3 of each value, a few of them summed


def close(result, expected, bound=ROUNDING):
    torch.testing.assert_close(result, expected, atol=bound, rtol=0)


def tiny(tokens=1, **changes):
    torch.manual_seed(0)
    config = {**TINY_TRANSFORMER, "caption_num_tokens": tokens, **changes}
    return PixCellTransformer(TransformerConfig.from_dict(config)).eval()


def inputs(tokens=1, size=(8, 8), batch=2):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 16, *size, generator=g), torch.tensor([3, 700])[:batch],
            torch.randn(batch, tokens, 16, generator=g))


# One condition token

def test_cross_attention_to_one_token_is_exactly_its_projected_value():
    torch.manual_seed(0)
    attention, h, context = Attention(24, 3), torch.randn(2, 10, 24), torch.randn(2, 1, 24)
    assert torch.equal(attention(h, context), attention.to_out[0](attention.to_v(context)))
    # The general path, by hand: one key, so every softmax is 1.
    q, k, v = (x.reshape(2, -1, 3, 8).transpose(1, 2)
               for x in (attention.to_q(h), attention.to_k(context), attention.to_v(context)))
    weights = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)
    assert torch.equal(weights, torch.ones(2, 3, 10, 1))
    general = attention.to_out[0]((weights @ v).transpose(1, 2).reshape(2, 10, 24))
    close(attention(h, context).expand(2, 10, 24), general)


def test_attention_to_many_tokens_is_a_softmax():
    torch.manual_seed(0)
    attention, h, context = Attention(24, 3), torch.randn(2, 10, 24), torch.randn(2, 5, 24)
    for source in (context, h):
        q, k, v = (x.reshape(2, -1, 3, 8).transpose(1, 2)
                   for x in (attention.to_q(h), attention.to_k(source), attention.to_v(source)))
        weights = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)
        expected = attention.to_out[0]((weights @ v).transpose(1, 2).reshape(2, 10, 24))
        result = attention(h) if source is h else attention(h, source)
        close(result, expected)


def test_inert_layers_are_exactly_those_without_effect():
    model, given = tiny(), inputs()
    before = model(*given)
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    inert = []
    for name in names:
        layer, kept = model.get_submodule(name), model.get_submodule(name).weight.data.clone()
        layer.weight.data += 1.0
        if torch.equal(model(*given), before):
            inert.append(name)
        layer.weight.data = kept
    assert inert == model.inert_layers()
    assert inert == [f"transformer_blocks.{i}.attn2.{n}" for i in range(2)
                     for n in ("to_q", "to_k")]


def test_no_layer_is_inert_with_many_tokens():
    model, given = tiny(16), inputs(16)
    before = model(*given)
    assert model.inert_layers() == []
    for layer in (model.transformer_blocks[0].attn2.to_q, model.transformer_blocks[1].attn2.to_k):
        layer.weight.data *= 2.0
        assert not torch.equal(model(*given), before)


def test_lora_share_of_pixcell_256():
    with torch.device("meta"):
        model, everywhere = (PixCellTransformer(TransformerConfig()) for _ in range(2))
    inject_lora(model, 8, 16, exclude=model.inert_layers())
    trainable, total = count_parameters(model)
    adapter = sum(p.numel() for p in EmbeddingAdapter(1536).parameters())
    assert (trainable, total) == (3_096_576, 608_072_960 + 3_096_576)
    assert (trainable + adapter) / (total + adapter) < 0.01
    names = inject_lora(everywhere, 8, 16)
    assert (2 * len(names), count_parameters(everywhere)[0]) == (448, 4_128_768)


# Memory and precision

@pytest.mark.parametrize("tokens", [1, 4])
def test_gradient_checkpointing_changes_no_bit(tokens, monkeypatch):
    calls, counts, results = [], [], []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    for enabled in (False, True):
        model, given = tiny(tokens), inputs(tokens)
        model.gradient_checkpointing = enabled
        output = model(*given)
        output.square().mean().backward()
        results.append([output, *(p.grad for p in model.parameters() if p.grad is not None)])
        counts.append(len(calls))
    assert counts == [2, 2 + 4]  # checkpointed, both blocks run again in the backward pass
    assert len(results[0]) == len(results[1]) and all(torch.equal(a, b) for a, b in zip(*results))
    with torch.no_grad():
        model(*given)
    assert len(calls) == 8  # nothing is recomputed without gradients


@pytest.mark.parametrize("dtype, bound",
                         [(torch.float16, HALF_ROUNDING), (torch.bfloat16, BF16_ROUNDING)])
@pytest.mark.parametrize("context", [None, 4])
def test_float32_attention_survives_products_beyond_float16(dtype, bound, context, monkeypatch):
    torch.manual_seed(0)
    attention, h = Attention(16, 1), torch.randn(2, 6, 16)
    context = context and torch.randn(2, context, 16)
    for layer in (attention.to_q, attention.to_k):
        layer.weight.data = torch.eye(16) * 200.0
    source = h if context is None else context
    q, k = attention.to_q(h), attention.to_k(source)
    assert q.abs().max() < 65504 and (q @ k.transpose(1, 2)).abs().max() > 65504
    assert not (q.half() @ k.half().transpose(1, 2)).isfinite().all()  # hence the switch
    seen = []
    monkeypatch.setattr(module, "attend", lambda *qkv: seen.append(
        ({x.dtype for x in qkv}, torch.is_autocast_enabled("cpu"))) or attend(*qkv))
    attention.float32_attention = True
    with torch.autocast("cpu", dtype=dtype):
        result = attention(h, context)
        # The same projections, in half precision.
        q, k, v = attention.to_q(h), attention.to_k(source), attention.to_v(source)
    assert seen == [({torch.float32}, False)]
    weights = (q.float() @ k.float().transpose(1, 2) / 4).softmax(-1)
    expected = attention.to_out[0](weights @ v.float())
    assert result.dtype == dtype and result.isfinite().all()
    torch.testing.assert_close(result.float(), expected, atol=bound, rtol=bound)


def test_float32_attention_switch_reaches_every_layer_and_changes_nothing_in_float32():
    model, given = tiny(4), inputs(4)
    before = model(*given)
    model.set_float32_attention(True)
    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    assert len(layers) == 4 and all(layer.float32_attention for layer in layers)
    assert torch.equal(model(*given), before)
    model.set_float32_attention(False)
    assert not any(layer.float32_attention for layer in layers)


@pytest.mark.parametrize("dtype, bound",
                         [(torch.float16, HALF_ROUNDING), (torch.bfloat16, BF16_ROUNDING)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_autocast_stays_near_float32(dtype, bound, tokens):
    model, given = tiny(tokens), inputs(tokens)
    expected = model(*given)
    with torch.autocast("cpu", dtype=dtype):
        output = model(*given)
    # Two blocks: twice the bound, of the largest value.
    assert (output.float() - expected).abs().max() < 2 * bound * expected.abs().max()


def test_residual_stream_is_float32_under_autocast():
    model, seen = tiny(), []
    block = model.transformer_blocks[0]
    block.register_forward_pre_hook(lambda block, given: seen.append(given[0].dtype))
    block.attn1.to_q.register_forward_pre_hook(lambda layer, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs())
    assert seen == [torch.float32, torch.bfloat16]  # cast once, for q, k, v and their LoRA


@pytest.mark.parametrize("key, largest", [
    ("num_layers", 256), ("sample_size", 1024), ("patch_size", 65536)])
def test_a_configuration_beyond_any_network_is_refused(key, largest):
    assert getattr(TransformerConfig.from_dict({**TINY_TRANSFORMER, key: largest}), key) == largest
    with pytest.raises(ValueError, match=f"{key} must be a positive integer, .*{largest} at most"):
        TransformerConfig.from_dict({**TINY_TRANSFORMER, key: largest + 1})


def test_output_channels_are_those_of_the_latents_once_or_twice():
    for channels in (16, 32):
        TransformerConfig.from_dict({**TINY_TRANSFORMER, "out_channels": channels})
    for channels in (1, 15, 17, 31, 48):
        with pytest.raises(ValueError, match="out_channels must be 16"):
            TransformerConfig.from_dict({**TINY_TRANSFORMER, "out_channels": channels})


def test_bfloat16_attention_is_plain_and_agrees_with_float32():
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 10, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    trained, expected = attend(*leaves), F.scaled_dot_product_attention(*exact)
    direction = torch.randn_like(expected)
    trained.backward(direction.bfloat16()), expected.backward(direction)
    assert "Attention" not in type(trained.grad_fn).__name__  # plain products, no fused kernel
    with torch.no_grad():
        assert torch.equal(attend(*leaves), trained)  # in sampling, too
    for result, reference in [(trained, expected),
                              *((a.grad, b.grad) for a, b in zip(leaves, exact))]:
        assert result.dtype == torch.bfloat16
        assert (result.float() - reference).abs().max() < BF16_ROUNDING * reference.abs().max()


# Position codes

def test_position_code_by_hand():
    code = sincos_grid(2, 3, 8, base_size=4, interpolation_scale=0.5)
    assert code.shape == (6, 8) and code.dtype == torch.float64
    x, y = 2 / (3 / 4) / 0.5, 1 / (2 / 4) / 0.5  # the token in row 1, column 2
    # Width before height, sines before cosines, frequencies 1 and 1/100.
    expected = [f(at * w) for at in (x, y) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    close(code[1 * 3 + 2], torch.tensor(expected, dtype=torch.float64), 1e-15)
    close(code[0], torch.tensor([0, 0, 1, 1] * 2, dtype=torch.float64), 0)
    shifted = sincos_grid(2, 3, 8, 4, 0.5, phase=2)[0]
    close(shifted[:2], torch.tensor([2, 0.02], dtype=torch.float64).sin(), 1e-15)


def test_position_code_is_numbers_after_a_model_on_the_meta_device():
    with torch.device("meta"):
        sincos_grid(1, 5, 8, 3, 0.7)
    assert sincos_grid(1, 5, 8, 3, 0.7).device.type == "cpu"


def test_position_code_is_made_once_for_a_device_and_dtype():
    code = sincos_grid(2, 3, 8, 4, 0.5)
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float64)):
        other = sincos_grid(2, 3, 8, 4, 0.5, 0.0, device, dtype)
        assert other is sincos_grid(2, 3, 8, 4, 0.5, 0.0, device, dtype)  # a GPU would wait for a copy
        assert (other.device.type, other.dtype) == (device, dtype)
    assert torch.equal(sincos_grid(2, 3, 8, 4, 0.5, 0.0, "cpu", torch.float32), code.float())


def test_position_code_distinguishes_places_of_a_grid_that_is_not_square():
    model = tiny()
    codes = model.pos_embed(torch.zeros(1, 16, 4, 12))[0]
    assert codes.shape == (12, 32) and len({tuple(row) for row in codes.tolist()}) == 12


@pytest.mark.parametrize("sample_size, scale, expected",
                         [(32, None, 1), (128, None, 2), (128, 0.5, 0.5)])
def test_interpolation_scale_null_follows_sample_size(sample_size, scale, expected):
    model = tiny(sample_size=sample_size, interpolation_scale=scale)
    assert model.pos_embed.interpolation_scale == expected
    optional = ("interpolation_scale", "norm_eps")
    config = TransformerConfig.from_dict(
        {key: value for key, value in TINY_TRANSFORMER.items() if key not in optional})
    assert (config.interpolation_scale, config.norm_eps) == (None, 1e-6)


def test_timestep_sinusoid_has_cosines_first():
    code = timestep_sinusoid(torch.tensor([0, 10]))
    assert code.shape == (2, 256) and code.dtype == torch.float32
    assert torch.equal(code[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    slowest = 10 * 10000 ** (-127 / 128)
    expected = torch.tensor([math.cos(10), math.cos(slowest), math.sin(10), math.sin(slowest)])
    close(code[1, [0, 127, 128, 255]], expected)
    between = timestep_sinusoid(torch.tensor([0.5]))
    assert not torch.equal(between, code[:1])


@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(7), torch.tensor(7.5)])
def test_a_scalar_timestep_is_that_of_every_image(timestep):
    model, (latents, _, tokens) = tiny(), inputs()
    expected = model(latents, torch.tensor([float(timestep)] * 2), tokens)
    assert torch.equal(model(latents, timestep, tokens), expected)


def test_a_new_network_has_small_tables_and_every_switch_off():
    torch.manual_seed(0)
    model = PixCellTransformer(TransformerConfig(num_layers=1, attention_head_dim=64))  # D = 1024
    block = model.transformer_blocks[0]
    for table in (block.scale_shift_table, model.scale_shift_table):  # N(0, 1/D)
        assert table.std().item() == pytest.approx(1 / 32, rel=0.05)
    assert not (model.gradient_checkpointing or block.attn1.float32_attention
                or block.attn2.float32_attention)


def test_null_embedding_is_a_buffer_in_input_space():
    model = tiny(4)
    assert model.uncond_embedding.shape == (4, 16) and not model.uncond_embedding.requires_grad
    assert "caption_projection.uncond_embedding" in dict(model.named_buffers())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_patches_of_another_size_and_tensors_on_another_device():
    latents, timesteps, tokens = inputs()
    model = tiny(patch_size=4)
    assert model.proj_out.out_features == 4 * 4 * 32
    assert model(latents, timesteps, tokens).shape == (2, 32, 8, 8)
    elsewhere = tiny().to("meta")
    elsewhere.transformer_blocks = torch.nn.ModuleList()  # their autocast knows no meta device
    output = elsewhere(latents.to("meta"), timesteps, tokens.to("meta"))
    assert output.device.type == "meta"  # timesteps follow the latents


def test_images_of_a_batch_are_independent():
    model, (latents, timesteps, tokens) = tiny(4), inputs(4, size=(4, 6))
    both = model(latents, timesteps, tokens)
    assert both.shape == (2, 32, 4, 6)
    for i in range(2):
        alone = model(latents[i:i + 1], timesteps[i:i + 1], tokens[i:i + 1])
        close(alone[0], both[i])


# Refusals

@pytest.mark.parametrize("latents, tokens, named", [
    ((2, 16, 7, 8), (2, 1, 16), "(2, 16, 7, 8)"), ((2, 16, 8, 9), (2, 1, 16), "(2, 16, 8, 9)"),
    ((2, 4, 8, 8), (2, 1, 16), "(2, 4, 8, 8)"), ((16, 8, 8), (2, 1, 16), "(16, 8, 8)"),
    ((2, 16, 0, 8), (2, 1, 16), "(2, 16, 0, 8)"), ((2, 16, 8, 8), (2, 4, 16), "(2, 4, 16)"),
    ((2, 16, 8, 8), (2, 16), "(2, 16)"), ((2, 16, 8, 8), (1, 1, 16), "(1, 1, 16)"),
    ((2, 16, 8, 8), (2, 1, 15), "(2, 1, 15)"),
])
def test_wrong_shapes_are_refused(latents, tokens, named):
    with pytest.raises(ValueError, match="must be") as error:
        tiny()(torch.zeros(latents), 0, torch.zeros(tokens))
    assert f"got {named}" in str(error.value) and "\n" not in str(error.value)


UNREAD = TINY_TRANSFORMER.keys() - TransformerConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("key", sorted(UNREAD))
def test_a_config_of_another_network_is_refused(key):
    assert FIXED.keys() == UNREAD  # all that a released config says is read or must be so
    with pytest.raises(ValueError, match=f"here: {key} is 'other', only"):
        TransformerConfig.from_dict({**TINY_TRANSFORMER, key: "other"}, "here")


REQUIRED = sorted(TransformerConfig.__dataclass_fields__.keys()
                  - {"norm_eps", "interpolation_scale"})


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_or_mistyped_field_is_named(key):
    with pytest.raises(ValueError, match=f"here: .*'{key}' is missing"):
        TransformerConfig.from_dict({k: v for k, v in TINY_TRANSFORMER.items() if k != key}, "here")
    for wrong in (True, 0, -2, 1.0, "2", None):
        with pytest.raises(ValueError,
                           match=f"here: {key} must be a positive integer, got {wrong!r}"):
            TransformerConfig.from_dict({**TINY_TRANSFORMER, key: wrong}, "here")


@pytest.mark.parametrize("key, wrong", [
    ("norm_eps", "1e-6"), ("norm_eps", True), ("norm_eps", None), ("interpolation_scale", [1]),
    ("interpolation_scale", False), ("interpolation_scale", 0), ("interpolation_scale", -0.5),
])
def test_a_mistyped_number_is_named(key, wrong):
    with pytest.raises(ValueError, match=f"here: {key} must be a positive number, got"):
        TransformerConfig.from_dict({**TINY_TRANSFORMER, key: wrong}, "here")


def test_defaults_are_those_of_pixcell_256_and_unknown_keys_are_left_alone():
    changes = {"_diffusers_version": "0.32.2", "num_layers": 5}
    config = TransformerConfig.from_dict({**TINY_TRANSFORMER, **changes})
    assert config.num_layers == 5 and config.norm_eps == 1e-6
    assert TransformerConfig() == TransformerConfig(28, 16, 72, 16, 32, 2, 32, 1536, 1, 0.5, 1e-6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 6
    with pytest.raises(ValueError, match="^config: not a PixCell transformer configuration"):
        TransformerConfig.from_dict({})


@pytest.mark.parametrize("changes, message", [
    ({"caption_num_tokens": 3}, "square"),
    ({"attention_head_dim": 3, "num_attention_heads": 2}, "multiples of 4"),
    ({"caption_num_tokens": 4, "caption_channels": 18}, "multiples of 4"),
])
def test_sizes_without_a_position_code_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    assert tiny(caption_channels=18).config.caption_channels == 18  # one token has no place


# Loading

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_from_pretrained_converts_once(tiny_base, dtype):
    stored = load_file(tiny_base / "transformer" / WEIGHTS_NAME)
    model = PixCellTransformer.from_pretrained(tiny_base / "transformer", dtype)
    assert not model.training and {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in stored.items()}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in stored.items())
    latents, timesteps, tokens = inputs()
    assert model(latents.to(dtype), timesteps, tokens.to(dtype)).dtype == dtype


def test_loading_draws_nothing_and_lets_dtypes_be_changed_before_the_weights_are_read(tiny_base):
    stored = load_file(tiny_base / "transformer" / WEIGHTS_NAME)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = PixCellTransformer.from_pretrained(  # a folder's name will do
        str(tiny_base / "transformer"), prepare=lambda network: network.proj_out.double())
    assert torch.equal(torch.rand(3), expected)
    weight = model.proj_out.weight
    assert weight.dtype == torch.float64 and torch.equal(weight, stored["proj_out.weight"].double())
    assert model.scale_shift_table.dtype == torch.float32


def test_a_wrong_config_is_named_by_its_file(own_base):
    path = own_base / "transformer" / "config.json"
    path.write_text(json.dumps({**TINY_TRANSFORMER, "num_layers": 0}))
    with pytest.raises(ValueError, match=f"^{path}: num_layers must be a positive integer, got 0"):
        PixCellTransformer.from_pretrained(path.parent)


def rename(tensors):
    tensors["proj_outt.weight"] = tensors.pop("proj_out.weight")


def reshape(tensors):
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1].clone()


def quantise(tensors):
    tensors["proj_out.bias"] = tensors["proj_out.bias"].to(torch.int8)


@pytest.mark.parametrize("damage, named", [
    (lambda t: t.pop("scale_shift_table"), ["1 missing (scale_shift_table)", "0 unexpected"]),
    (lambda t: t.update({"ema.decay": torch.zeros(1)}), ["0 missing", "1 unexpected (ema.decay)"]),
    (rename, ["1 missing (proj_out.weight)", "'proj_outt.weight' is nearest to 'proj_out.weight'"]),
    (reshape, ["proj_out.bias has shape (127,), expected (128,)"]),
    (quantise, ["proj_out.bias is torch.int8"]),
])
def test_weights_that_do_not_fit_are_refused_by_name(tiny_base, tmp_path, damage, named):
    tensors = load_file(tiny_base / "transformer" / WEIGHTS_NAME)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / "config.json").write_text(json.dumps(TINY_TRANSFORMER))
    with pytest.raises(ValueError) as error:
        PixCellTransformer.from_pretrained(tmp_path)
    assert str(tmp_path / WEIGHTS_NAME) in str(error.value) and "\n" not in str(error.value)
    assert all(text in str(error.value) for text in named), error.value


def test_truncated_or_absent_files_are_refused(tiny_base, tmp_path):
    content = (tiny_base / "transformer" / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        PixCellTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY_TRANSFORMER))
    with pytest.raises(ValueError, match="no such file"):
        PixCellTransformer.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(content[:-100])
    with pytest.raises(ValueError, match="truncated"):
        PixCellTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("tokens", [4, 5, 6])
def test_bf16_attention_is_the_fused_one_above_some_tokens(tokens, monkeypatch):
    assert module.PLAIN_ATTENTION_UP_TO == (512 // 8 // 2) ** 2  # pixels, latent cells, tokens
    monkeypatch.setattr(module, "PLAIN_ATTENTION_UP_TO", 5)
    fused = []
    monkeypatch.setattr(module.F, "scaled_dot_product_attention",
                        lambda q, k, v: fused.append(q.shape[2]) or v)
    module.attend(*torch.randn(3, 1, 2, tokens, 8, dtype=torch.bfloat16))
    assert fused == [6] * (tokens == 6)


# torch.compile

compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
COMPILED = 1e-5  # float32, values of order 1, sums in another order through all blocks


@compiler
def test_compiled_blocks_give_the_same_numbers():
    model, plain = tiny(num_layers=4), tiny(num_layers=4)
    model.compile_blocks()
    with torch.no_grad():
        close(model(*inputs()), plain(*inputs()), COMPILED)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 4  # one program for all, and the check's


def test_without_a_compiler_the_reason_is_one_line(monkeypatch):
    import torch._inductor.config as inductor
    torch._dynamo.reset()  # or what was compiled before would be taken
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    model = tiny()
    with pytest.raises(ValueError, match="does not work here .*no-such-compiler.*--compile") as error:
        model.compile_blocks()
    assert "\n" not in str(error.value)
    assert all(block._compiled_call_impl is None for block in model.transformer_blocks)


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_alike_and_follow_lora_on_and_off(checkpointing):
    """Gradients, other batch sizes, LoRA switched off: a program is made anew where it must be."""
    torch._dynamo.reset()
    models = [tiny(num_layers=4), tiny(num_layers=4)]
    for model in models:
        inject_lora(model, 2, 4, exclude=model.inert_layers(), generator=torch.Generator().manual_seed(0))
        for i, parameter in enumerate(lora_parameters(model)):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
        model.gradient_checkpointing = checkpointing
        model.train()
    models[0].compile_blocks()
    for batch in (2, 1, 2):
        for model in models:
            model.zero_grad()
            model(*inputs(batch=batch)).square().mean().backward()
        for ours, theirs in zip(*map(lora_parameters, models), strict=True):
            close(ours.grad, theirs.grad, COMPILED)
    with torch.no_grad(), lora_disabled(models[0]), lora_disabled(models[1]):
        off = models[0](*inputs())
        close(off, models[1](*inputs()), COMPILED)
    with torch.no_grad():
        assert (models[0](*inputs()) - off).abs().max() > 100 * COMPILED


def test_tables_start_normal_with_one_over_the_root_of_their_width():
    torch.manual_seed(0)
    tables = [normal_start(6, 400), PixCellTransformer(TransformerConfig(num_layers=1)).uncond_embedding]
    for table in tables:
        deviations = table.flatten() * table.shape[1] ** 0.5
        assert abs(deviations.std() - 1) < 0.05 and abs(deviations.mean()) < 0.1
        assert abs((deviations.abs() < 1).float().mean() - 0.683) < 0.05  # as a normal one's
