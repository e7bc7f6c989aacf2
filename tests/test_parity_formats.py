"""LoRA files with the real peft and diffusers in the loop, both ways, and what each does with a bad one."""

import json
import logging
import re
import warnings

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin, SD3LoraLoaderMixin
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from pixcell_min.checkpoint import read_json, read_tensors
from pixcell_min.exports import write_lora
from pixcell_min.formats import DIFFUSERS_CONFIG, load_lora, read_lora, stack
from pixcell_min.lora import inject_lora, lora_layers, save_lora
from pixcell_min.peft_config import check_selected
from references import call, error, pixart
from test_parity_lora import OPTIONS, SAME_MATHS, generator

for name in ("diffusers", "peft"):
    logging.getLogger(name).setLevel(logging.ERROR)
CASES = [*OPTIONS, {"blocks": [1]}, {"within": ("attn2",), "targets": ("to_v", "to_out.0")},
         {"rank": 3, "use_rslora": True, "rank_pattern": {"to_q": 1}, "dropout": 0.25}]


def ours(**options):
    """Our network with LoRA of B not zero, in eval mode."""
    net = pixart()
    inject_lora(net, **{"rank": 4, "alpha": 6.0, **options}, generator=generator(2))
    with torch.no_grad():
        for layer in lora_layers(net).values():
            layer.lora_B.normal_(0, 0.25, generator=generator(3))
    return net


def file_of(net, folder, **header):
    """The network's LoRA in our own file, read again."""
    save_lora(net, folder / "own.safetensors", header)
    return read_lora(folder / "own.safetensors")


def in_peft(folder):
    return PeftModel.from_pretrained(pixart(), folder).eval()


class PixArt(PixArtTransformer2DModel, PeftAdapterMixin):
    """diffusers has no LoRA loader of PixArt's own; this is the one its other transformers have."""


def in_diffusers(path):
    net = pixart()
    net.__class__ = PixArt
    net.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    return net.eval()


def in_ours(path, **options):
    net = pixart()
    load_lora(net, path, **options)
    return net


# ours → theirs


@pytest.mark.parametrize("options", CASES)
def test_peft_reads_our_folder(options, tmp_path):
    net = ours(**options)
    write_lora(file_of(net, tmp_path), tmp_path / "peft", "peft")
    assert error(call(in_peft(tmp_path / "peft")), call(net)) <= SAME_MATHS
    assert torch.equal(call(in_ours(tmp_path / "peft")), call(net)) or options.get("use_rslora")
    assert error(call(in_ours(tmp_path / "peft")), call(net)) <= SAME_MATHS


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("options", CASES)
def test_diffusers_reads_our_file_with_and_without_metadata(options, metadata, tmp_path):
    net, path = ours(**options), tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(file_of(net, tmp_path), path, "diffusers")
    if not metadata:
        save_file(load_file(path), path, metadata={"format": "pt"})
    assert error(call(in_diffusers(path)), call(net)) <= SAME_MATHS
    if metadata:
        assert error(call(in_ours(path)), call(net)) <= SAME_MATHS


def test_both_read_a_sum_whose_rank_passes_the_layers_size(tmp_path):
    net = ours(rank=16, alpha=16.0)
    lora = file_of(net, tmp_path)
    whole = stack([(lora, 0.25), (lora, 0.75)])
    assert {its["rank"] for its in whole.layers.values()} == {32}  # min(in, out) is 16
    write_lora(whole, tmp_path / "peft", "peft")
    write_lora(whole, tmp_path / "d.safetensors", "diffusers")
    for theirs in (in_peft(tmp_path / "peft"), in_diffusers(tmp_path / "d.safetensors")):
        assert error(call(theirs), call(net)) <= SAME_MATHS


# theirs → ours


def peft_twin(dtype=torch.float32, **config):
    """peft's LoRA on the network, B not zero."""
    theirs = get_peft_model(pixart(), LoraConfig(**{
        "r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "to_out.0"], **config})).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.25, generator=generator(3))
            if "lora_" in name:
                parameter.copy_(parameter.to(dtype))  # a rounding that a file of `dtype` keeps
    return theirs


THEIRS = [{}, {"use_rslora": True}, {"r": 1, "lora_alpha": 1}, {"r": 20, "lora_alpha": 3},
          {"target_modules": r".*attn2\.to_(q|v)"}, {"init_lora_weights": "gaussian"},
          {"rank_pattern": {"attn2.to_v": 2, "to_q": 7}, "alpha_pattern": {"^transformer_blocks.1.*to_v": 9}},
          {"alpha_pattern": {"to_out": 9, "o_v": 9, "attn1.to_q": 3, "to_q": 12}}]  # whole parts, the first that matches


@pytest.mark.parametrize("config", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_read_what_peft_writes(config, dtype, tmp_path):
    theirs = peft_twin(dtype, **config)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    assert error(call(in_ours(tmp_path)), call(theirs)) <= SAME_MATHS
    assert error(call(in_ours(path)), call(theirs)) <= SAME_MATHS  # the file with its configuration beside


@pytest.mark.parametrize("config", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_read_what_diffusers_writes(config, dtype, tmp_path):
    theirs = peft_twin(dtype, **config)
    fields = theirs.peft_config["default"].to_dict()
    fields["target_modules"] = (sorted(fields["target_modules"]) if isinstance(fields["target_modules"], set)
                                else fields["target_modules"])
    state = {key.removeprefix("base_model.model."): tensor.to(dtype)
             for key, tensor in get_peft_model_state_dict(theirs).items()}
    SD3LoraLoaderMixin.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=fields)
    assert error(call(in_ours(tmp_path)), call(theirs)) <= SAME_MATHS


def test_a_file_of_the_authors_layout(tmp_path):
    """The whole state dict of an injected network; peft's own names; r = alpha."""
    theirs = peft_twin(lora_alpha=4, target_modules=r".*attn2\.to_(q|k|v|out\.0)")
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in theirs.state_dict().items()}
    assert "transformer_blocks.0.attn2.to_q.lora_A.default.weight" in state
    torch.save(state, tmp_path / "staining.pth")
    assert error(call(in_ours(tmp_path / "staining.pth")), call(theirs)) <= SAME_MATHS


# the tables of what goes wrong elsewhere


def spoilt_peft(folder, change_config=lambda c: None, rename=lambda key: key):
    peft_twin(lora_alpha=8).save_pretrained(folder)
    config = read_json(folder / "adapter_config.json")
    change_config(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path)
    return folder


@pytest.mark.parametrize("change, words", [
    (lambda c: c.pop("peft_type"), "peft_type is None"),
    (lambda c: c.pop("r"), "'r' is missing"),
    (lambda c: c.pop("target_modules"), "'target_modules' is missing"),
    (lambda c: c.pop("lora_alpha"), "'lora_alpha' is missing"),  # peft: silently 8
    (lambda c: c.update(rank=8), "rank = 8 is not supported"),  # peft: a warning
    (lambda c: c.update(r=5), "(4, 16), expected (5, 16)"),
    (lambda c: c.update(use_dora=True), "use_dora = True"),
    (lambda c: c.update(bias="all"), "bias = 'all'"),
    (lambda c: c.update(fan_in_fan_out=True), "fan_in_fan_out"),
    (lambda c: c.update(modules_to_save=["proj_out"]), "modules_to_save"),
    (lambda c: c.update(init_lora_weights="pissa"), "'pissa' also changes the base"),
    (lambda c: c.update(lora_alpha=0), "alpha must be finite and above 0"),
    (lambda c: c.update(lora_alpha="8"), "alpha must be finite"),
    (lambda c: c.update(r="4"), "expected ('4', 16)"),
    (lambda c: c.update(rank_pattern={"(": 2}), "rank_pattern"),
    (lambda c: c.update(alpha_pattern=[1]), "alpha_pattern"),
    (lambda c: c.update(layers_to_transform=[0], layers_pattern=5), "cannot be read as peft's"),
    (lambda c: c.update(exclude_modules="a{99999999999}"), "cannot be read as peft's"),
    (lambda c: c.update(rank_pattern={"a{99999999999}": 2}), "rank_pattern"),
    (lambda c: c.update(exclude_modules=5), "cannot be read as peft's"),
    (lambda c: c.update(target_modules=5), "cannot be read as peft's"),
    (lambda c: c.update(target_modules="("), "cannot be read as peft's"),
    (lambda c: c.update(layers_to_transform="ab", layers_pattern="transformer_blocks"), "cannot be read as peft's"),
])
def test_a_wrong_configuration_is_named(change, words, tmp_path):
    refused(spoilt_peft(tmp_path, change), words)


@pytest.mark.parametrize("fields, left_out", [
    ({"target_modules": ["to_q"]}, "transformer_blocks.0.attn1.to_out.0"),
    ({"target_modules": r".*attn1\.to_(q|v|out\.0)"}, "transformer_blocks.0.attn2.to_out.0"),
    ({"target_modules": ["o_q", "to_v", "to_out.0"]}, "transformer_blocks.0.attn1.to_q"),  # whole parts
    ({"exclude_modules": ["attn2.to_v"]}, "transformer_blocks.0.attn2.to_v"),
    ({"exclude_modules": r".*\.1\.attn1.*"}, "transformer_blocks.1.attn1.to_out.0"),
    ({"layers_to_transform": [0], "layers_pattern": "transformer_blocks"}, "transformer_blocks.1.attn1.to_out.0"),
    ({"layers_to_transform": 1, "layers_pattern": ["x", "transformer_blocks"]}, "transformer_blocks.0.attn1.to_out.0"),
])
def test_tensors_that_peft_passes_over_are_named(fields, left_out, tmp_path):
    folder = spoilt_peft(tmp_path, lambda config: config.update(fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = {name for name, module in in_peft(folder).base_model.model.named_modules()
                   if hasattr(module, "lora_A")}
    held = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for key in load_file(folder / "adapter_model.safetensors") if "lora_A" in key}
    assert left_out in held - adapted  # in silence
    refused(folder, f"leaves out {left_out!r}")


NESTED = ("a.blocks.1.experts.0.proj", "blocks.1.ff.net.0.proj", "blocks.0.ff.net.2", "blocks.0.attn1.to_q",
          "a.blocks.0.attn2.to_q", "proj")


@pytest.mark.parametrize("fields", [
    {"layers_to_transform": [0]}, {"layers_to_transform": 1}, {"layers_to_transform": [0], "layers_pattern": "blocks"},
    {"layers_to_transform": [0], "layers_pattern": ["blocks", "net"]}, {"layers_to_transform": [0], "layers_pattern": []},
    {"layers_to_transform": [0], "layers_pattern": ["net", "blocks"]}, {"exclude_modules": ["net.2", "attn1"]},
    {"layers_to_transform": [2], "layers_pattern": "net"}, {"target_modules": ["blocks.0.attn1.to_q", "2"],
                                                            "layers_to_transform": [1], "layers_pattern": "blocks"}])
def test_layers_are_selected_as_by_peft(fields):
    config = {"target_modules": ["proj", "to_q", "net.2"], **fields}
    theirs = LoraConfig(**config)
    for name in NESTED:
        try:
            check_selected([name], config, "c.json")
            taken = True
        except ValueError as error:
            assert f"c.json: leaves out {name!r}" in str(error)
            taken = False
        their = check_target_module_exists(theirs, name)
        assert taken == bool(their and "Excluded" not in type(their).__name__), name


@pytest.mark.parametrize("fields", [
    {"layers_to_transform": [0, 1], "layers_pattern": "transformer_blocks"}, {"exclude_modules": ["attn2.to_k"]},
    {"layers_to_transform": [0, 1], "layers_pattern": "(transformer_)?blocks"},
    {"exclude_modules": "x"}, {"layers_to_transform": []}, {"target_modules": "all-linear"}])
def test_a_selection_that_leaves_no_tensor_out_is_taken(fields, tmp_path):
    plain, folder = spoilt_peft(tmp_path / "plain"), spoilt_peft(tmp_path / "x", lambda c: c.update(fields))
    assert error(call(in_ours(folder)), call(in_ours(plain))) == 0


def test_a_start_that_left_the_base_alone_is_taken(tmp_path):
    def eva(config):  # its own settings say how A began, no more
        config.update(init_lora_weights="eva", eva_config={"rho": 2.0})
    plain, started = tmp_path / "plain", tmp_path / "eva"
    assert error(call(in_ours(spoilt_peft(started, eva))),
                 call(in_ours(spoilt_peft(plain, lambda config: None)))) == 0


@pytest.mark.parametrize("form", ["peft", "diffusers"])
@pytest.mark.parametrize("spoil, words", [
    (lambda t, a: t.update({a: t[a] * float("nan")}), "holds NaN"),
    (lambda t, a: t.pop(a), "missing LoRA key 'transformer_blocks.0.attn1.to_q.lora_A.weight'"),
    (lambda t, a: t.update({a: t[a][:, :3].contiguous()}), "lora_A.weight is (4, 3), expected (4, 16)"),
    (lambda t, a: t.update({a.replace("to_q", "to_query"): t[a].clone()}), "to_query"),
])
def test_wrong_tensors_are_named(form, spoil, words, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    if form == "peft":
        spoilt_peft(tmp_path)
    else:
        path = write_diffusers(tmp_path, GOOD)[1]
    tensors, header = read_tensors(path)
    spoil(tensors, next(key for key in tensors if "0.attn1.to_q.lora_A" in key))
    save_file(tensors, path, metadata=header)
    refused(path, words)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model."])
def test_a_wrong_prefix_in_a_peft_folder_is_named(prefix, tmp_path):
    """peft loads nothing of it, with a warning."""
    folder = spoilt_peft(tmp_path, rename=lambda key: prefix + key.removeprefix("base_model.model."))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any(p.any() for n, p in in_peft(folder).named_parameters() if "lora_B" in n)
    refused(folder, "does not begin with 'base_model.model.'")


def diffusers_scale(path):
    net = in_diffusers(path)
    return {module.scaling["default_0"] for module in net.modules() if hasattr(module, "lora_A")}


def write_diffusers(folder, metadata, alpha_tensors=False, prefix="transformer."):
    """A file of scale 2, B not folded."""
    net = ours(rank=4, alpha=8.0)
    tensors = {prefix + key: tensor for key, tensor in file_of(net, folder).state.items()}
    if alpha_tensors:
        tensors |= {key.replace("lora_A.weight", "alpha"): torch.tensor(8.0) for key in tensors if "lora_A" in key}
    path = folder / "d.safetensors"
    save_file(tensors, path, metadata=None if metadata is None else {
        "format": "pt", DIFFUSERS_CONFIG: json.dumps(metadata)})
    return net, path


GOOD = {"transformer.r": 4, "transformer.lora_alpha": 8.0,
        "transformer.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def test_diffusers_metadata_with_the_prefix_is_right_everywhere(tmp_path):
    net, path = write_diffusers(tmp_path, GOOD)
    assert diffusers_scale(path) == {2.0} and torch.equal(call(in_ours(path)), call(net))


def test_a_diffusers_file_without_alpha_is_not_guessed(tmp_path):
    net, path = write_diffusers(tmp_path, None)
    assert diffusers_scale(path) == {1.0}  # wrong, and not a word
    refused(path, "names no alpha (no lora_adapter_metadata in its header)")
    named = read_lora(path, alpha=8.0)
    assert {named.scaling(layer) for layer in named.layers} == {2.0}


def test_alpha_tensors_of_a_diffusers_file_are_read(tmp_path):
    net, path = write_diffusers(tmp_path, None, alpha_tensors=True)
    assert diffusers_scale(path) == {1.0}  # wrong, and not a word
    assert torch.equal(call(in_ours(path)), call(net))
    with pytest.raises(ValueError, match="names its own alpha"):
        read_lora(path, alpha=8.0)
    tensors, key = load_file(path), "transformer.transformer_blocks.0.attn1.to_q"
    for change, words in (({f"{key}.alpha": None}, "has alpha tensors, but none for 'transformer_blocks.0.attn1.to_q'"),
                          ({f"{key}.alpha": torch.ones(2)}, "to_q.alpha is (2,), expected one number"),
                          ({f"{key}.alpha": torch.tensor(0.0)}, "alpha must be finite and above 0"),
                          ({f"{key}.lora_A.weight": None, f"{key}.lora_B.weight": None}, "has no other tensor")):
        save_file({k: t for k, t in (tensors | change).items() if t is not None}, path)
        refused(path, words)
    save_file(tensors, path, metadata={"format": "pt", DIFFUSERS_CONFIG: json.dumps(GOOD)})
    refused(path, "unexpected LoRA key 'transformer_blocks.0.attn1.to_k.alpha'")  # said twice


@pytest.mark.parametrize("metadata, words", [
    ({key.removeprefix("transformer."): value for key, value in GOOD.items()}, "'r' does not begin with 'transformer.'"),
    ({**GOOD, "transformer.colour": "red"}, "colour = 'red' is not supported"),
    ({key: value for key, value in GOOD.items() if "alpha" not in key}, "'lora_alpha' is missing"),
    ([1, 2], "no JSON object"), ({**GOOD, "transformer.use_dora": True}, "use_dora"),
])
def test_wrong_diffusers_metadata_is_named(metadata, words, tmp_path):
    refused(write_diffusers(tmp_path, metadata)[1], words)


def test_unprefixed_diffusers_keys_are_named(tmp_path):
    _, path = write_diffusers(tmp_path, GOOD, prefix="")
    assert not diffusers_scale(path)  # nothing is loaded, with a warning
    refused(path, "does not begin with 'transformer.'")
    _, path = write_diffusers(tmp_path, None, prefix="")
    refused(path, "no LoRA file known here, its first key is 'transformer_blocks.")


def refused(path, words):
    """One line that names the file, and an untouched network."""
    net = pixart()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load_lora(net, path)
    assert "\n" not in str(caught.value)
    assert not lora_layers(net) and all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
