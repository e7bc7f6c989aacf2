"""LoRA files without any peer: kohya's and the authors', sums of files, what is written, refusals."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixcell_min import exports
from pixcell_min.checkpoint import file_hash, read_json, read_tensors, save_tensors
from pixcell_min.exports import FORMATS, PROVENANCE, write_lora
from pixcell_min.formats import load_lora, load_loras, lora_files, read_lora, stack
from pixcell_min.lora import inject_lora, lora_layers, remove_lora, save_lora
from pixcell_min.precision import hold_products_in
from pixcell_min.tools.convert import main as convert_main
from pixcell_min.transformer import WEIGHTS_NAME, PixCellTransformer

SUM = 1e-6  # of the largest weight: each product is rounded once more in float32
HEADER = {"data_hash": "d1", "versions": '{"torch": "2"}', "step": "4"}


@pytest.fixture
def base(tiny_base):
    return PixCellTransformer.from_pretrained(tiny_base / "transformer")


def adapted(tiny_base, seed=0, **options):
    """The base with LoRA of B not zero."""
    net = PixCellTransformer.from_pretrained(tiny_base / "transformer")
    g = torch.Generator().manual_seed(seed)
    inject_lora(net, **{"rank": 3, "alpha": 6.0, "generator": g, **options})
    with torch.no_grad():
        for layer in lora_layers(net).values():
            layer.lora_B.normal_(0, 0.3, generator=g)
    return net


def deltas(net):
    """{layer: s·B·A in float64}."""
    return {name: layer.scale * layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
            for name, layer in lora_layers(net).items()}


def assert_sum(net, parts):
    """net's updates are Σ weight·update of [(net, weight)], and of no other layer."""
    expected = {}
    for part, weight in parts:
        for name, delta in deltas(part).items():
            expected[name] = expected.get(name, 0) + weight * delta
    got = deltas(net)
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        assert (got[name] - delta).abs().max() <= SUM * delta.abs().max().clamp_min(1e-3), name


def own_file(net, path, tiny_base, **header):
    save_lora(net, path, {"base_hash": file_hash(tiny_base / "transformer" / WEIGHTS_NAME), **header})
    return path


@pytest.fixture
def own(tiny_base, tmp_path):
    """Our file of a mixed LoRA: ranks, alphas, rsLoRA."""
    net = adapted(tiny_base, rank_pattern={"to_q": 1, "1.attn2.to_v": 7}, alpha_pattern={"to_k": 2.5},
                  use_rslora=True, dropout=0.1)
    return own_file(net, tmp_path / "own.safetensors", tiny_base, **HEADER)


def target(folder, form):
    return folder / ("peft" if form == "peft" else f"{form}.safetensors")


# every format written and read


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_holds_the_same_update_and_where_it_came_from(form, own, base, tiny_base, tmp_path):
    source = PixCellTransformer.from_pretrained(tiny_base / "transformer")
    load_lora(source, own)
    out = target(tmp_path, form)
    write_lora(read_lora(own), out, form)
    assert read_lora(out, base).format == form
    base_hash = file_hash(tiny_base / "transformer" / WEIGHTS_NAME)
    header = load_lora(base, out, expected_base_hash=base_hash)
    assert_sum(base, [(source, 1)])
    assert header.items() >= {"base_hash": base_hash, **HEADER}.items()
    provenance = read_json(out / PROVENANCE if form == "peft" else out.with_suffix(".json"))
    assert provenance.items() >= {"base_hash": base_hash, **HEADER, "written_as": form,
                                  "read_from": "native"}.items()
    other = PixCellTransformer.from_pretrained(tiny_base / "transformer")
    with pytest.raises(ValueError, match="LoRA of base .* the loaded base is def"):
        load_lora(other, out, expected_base_hash="def")
    assert not lora_layers(other)


def test_peft_configuration_is_exactly_the_listed_fields(own, tmp_path):
    """FORMATS: all since peft 0.6; provenance elsewhere; use_rslora only when true."""
    listed = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r",
              "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "bias",
              "fan_in_fan_out", "init_lora_weights", "layers_to_transform", "layers_pattern", "modules_to_save"}
    lora = read_lora(own)
    write_lora(lora, tmp_path / "peft", "peft")
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert config.keys() == listed | {"use_rslora"} and config["use_rslora"] is True
    assert config["target_modules"] == list(lora.layers)  # full names
    assert config["inference_mode"] is True and config["bias"] == "none"
    assert config["rank_pattern"]["transformer_blocks.1.attn2.to_v"] == 7
    write_lora(exports.folded(lora), tmp_path / "plain", "peft")
    assert read_json(tmp_path / "plain" / "adapter_config.json").keys() == listed
    tensors, header = read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert header["format"] == "pt" and all(key.startswith("base_model.model.transformer_blocks.") for key in tensors)


def test_some_layers_with_rslora_are_written_by_their_alpha(own, tmp_path):
    lora = read_lora(own)
    first = next(iter(lora.layers))
    lora.layers[first]["use_rslora"] = False
    write_lora(lora, tmp_path / "peft", "peft")
    again = read_lora(tmp_path / "peft")
    assert "use_rslora" not in read_json(tmp_path / "peft" / "adapter_config.json")
    for name in lora.layers:
        assert again.scaling(name) == pytest.approx(lora.scaling(name), rel=1e-12)


def test_diffusers_file_is_folded_with_prefixed_metadata(own, tmp_path):
    lora = read_lora(own)
    write_lora(lora, tmp_path / "d.safetensors", "diffusers")
    header = read_tensors(tmp_path / "d.safetensors")[1]
    metadata = json.loads(header["lora_adapter_metadata"])
    assert metadata.keys() == {f"transformer.{key}" for key in (
        "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")}
    again = read_lora(tmp_path / "d.safetensors")
    assert all(again.scaling(name) == 1 for name in again.layers)
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"]


@pytest.mark.parametrize("word", ["scheduler", "optimizer", "checkpoint"])
def test_names_that_diffusers_passes_over_are_refused(word, own, tmp_path):
    with pytest.raises(ValueError, match="passes over"):
        write_lora(read_lora(own), tmp_path / f"my-{word}-1.safetensors", "diffusers")


# kohya


def test_kohya_layout(own, tmp_path):
    lora = read_lora(own)
    write_lora(lora, tmp_path / "k.safetensors", "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    stem = "lora_unet_transformer_blocks_1_attn2_to_v"
    assert tensors[f"{stem}.lora_down.weight"].shape == (7, 32) and tensors[f"{stem}.lora_up.weight"].shape == (32, 7)
    assert tensors[f"{stem}.alpha"].shape == () and len(tensors) == 3 * len(lora.layers)
    assert tensors[f"{stem}.alpha"].item() == pytest.approx(6.0 * math.sqrt(7))  # 6/√7 = alpha/7


def spoilt_kohya(own, folder, spoil):
    write_lora(read_lora(own), folder / "k.safetensors", "kohya", overwrite=True)
    tensors = load_file(folder / "k.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "k.safetensors")
    return folder / "k.safetensors"


STEM = "lora_unet_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize("spoil", [
    lambda t: t.pop(f"{STEM}.alpha"), lambda t: t.update({f"{STEM}.alpha": torch.tensor(0.0)})])
def test_kohya_without_alpha_is_alpha_equal_to_the_rank(spoil, own, base, tmp_path):
    lora = read_lora(spoilt_kohya(own, tmp_path, spoil), base)
    assert lora.scaling("transformer_blocks.0.attn1.to_out.0") == 1
    assert lora.scaling("transformer_blocks.0.attn1.to_v") == pytest.approx(6 / math.sqrt(3))


@pytest.mark.parametrize("spoil, words", [
    (lambda t: t.pop(f"{STEM}.lora_up.weight"), "missing LoRA key 'transformer_blocks.0.attn1.to_out.0.lora_B"),
    (lambda t: t.update({f"{STEM}.lora_mid.weight": torch.zeros(1)}), f"{STEM}.lora_mid.weight' names no"),
    (lambda t: t.update({f"{STEM}_1.lora_up.weight": torch.zeros(1)}), f"{STEM}_1.lora_up.weight' names no"),
    (lambda t: t.update({f"{STEM.removeprefix('lora_unet_')}.lora_up.weight": t.pop(f"{STEM}.lora_up.weight")}),
     "transformer_blocks_0_attn1_to_out_0.lora_up.weight' names no"),
    (lambda t: t.update({"lora_te_mlp.lora_up.weight": torch.zeros(1)}), "'lora_te_mlp.lora_up.weight' names no"),
    (lambda t: t.update({f"{STEM}.alpha": torch.tensor(math.nan)}), "alpha must be finite"),
    (lambda t: t.update({f"{STEM}.alpha": torch.tensor([1.0, 2.0])}), f"{STEM}.alpha"),
    (lambda t: (t.pop(f"{STEM}.lora_up.weight"), t.pop(f"{STEM}.lora_down.weight")), "which has no other tensor"),
])
def test_a_wrong_kohya_file_is_named(spoil, words, own, base, tmp_path):
    refused(base, spoilt_kohya(own, tmp_path, spoil), words)


def test_kohya_needs_the_base_to_tell_underscores_from_dots(own, tmp_path):
    with pytest.raises(ValueError, match="give --base"):
        read_lora(spoilt_kohya(own, tmp_path, lambda t: None))


def refused(net, path, words):
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_lora(net, path)
    message = str(caught.value)
    assert words in message and str(path.name) in message and "\n" not in message, message
    assert not lora_layers(net) and all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


# the authors' .pth


def authors_file(net, path, spoil=lambda state: None, dtype=None):
    """The layout of their whole state dict, from our network."""
    state = {}
    for key, tensor in net.state_dict().items():
        key = key.replace(".base.", ".base_layer.")
        key = f"{key}.default.weight" if key.endswith((".lora_A", ".lora_B")) else key
        state[key] = tensor.to(dtype) if dtype else tensor
    spoil(state)
    torch.save(state, path)
    return path


def of_attn2(tiny_base):
    return adapted(tiny_base, rank=4, alpha=4, within=("attn2",), init="gaussian")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_authors_file(dtype, base, tiny_base, tmp_path):
    path = authors_file(of_attn2(tiny_base), tmp_path / "staining.pth", dtype=dtype)
    lora = read_lora(path, base)
    assert lora.format == "authors" and len(lora.layers) == 8
    assert {lora.scaling(name) for name in lora.layers} == {1.0}  # r = alpha
    load_lora(base, path)
    if dtype is None:
        assert_sum(base, [(of_attn2(tiny_base), 1)])


def test_the_authors_file_fits_a_base_held_in_half_precision(base, tiny_base, tmp_path):
    path = authors_file(of_attn2(tiny_base), tmp_path / "staining.pth")
    hold_products_in(base.requires_grad_(False), torch.bfloat16)
    assert len(read_lora(path, base).layers) == 8
    base.proj_out.bias.add_(1)
    refused(base, path, "proj_out.bias differs")


KEY = "transformer_blocks.0.attn2.to_q"


@pytest.mark.parametrize("spoil, words", [
    (lambda s: s.update({"proj_out.bias": s["proj_out.bias"] + 1e-6}), "proj_out.bias differs from the loaded base"),
    (lambda s: s.update({f"{KEY}.base_layer.weight": s[f"{KEY}.base_layer.weight"] * 2}), f"{KEY}.weight differs"),
    (lambda s: s.update({"proj_out.bias": s["proj_out.bias"][:1]}), "proj_out.bias differs"),
    (lambda s: s.pop("proj_out.bias"), "'proj_out.bias'; it was trained on another base"),
    (lambda s: s.update(more=torch.zeros(1)), "'more'; it was trained on another base"),
    (lambda s: s.pop(f"{KEY}.lora_A.default.weight"), "missing LoRA key"),
    (lambda s: s.update({f"{KEY}.lora_A.other.weight": torch.zeros(1)}), "or with others than"),
    (lambda s: [s.pop(key) for key in list(s) if "lora_" in key], "no LoRA pairs"),
])
def test_a_wrong_file_of_the_authors_is_named(spoil, words, base, tiny_base, tmp_path):
    refused(base, authors_file(of_attn2(tiny_base), tmp_path / "staining.pth", spoil), words)


# sums of files


def test_files_are_summed_exactly_in_all_formats(base, tiny_base, own, tmp_path):
    nets = [adapted(tiny_base, seed=seed, **options) for seed, options in enumerate((
        {}, {"within": ("attn2",), "rank": 5, "use_rslora": True}, {"blocks": [1], "alpha": 1.0}, {"rank": 1}))]
    parts = []
    for net, form, weight in zip(nets, FORMATS, (0.7, 0.3, -1.5, 2.0)):
        path = own_file(net, tmp_path / "part.safetensors", tiny_base)
        write_lora(read_lora(path), target(tmp_path, form), form)
        parts.append((target(tmp_path, form), weight))
    base_hash = file_hash(tiny_base / "transformer" / WEIGHTS_NAME)
    headers = load_loras(base, parts, scale=0.5, expected_base_hash=base_hash)
    assert [header["base_hash"] for header in headers] == [base_hash] * 4
    assert_sum(base, [(net, 0.5 * weight) for net, (_, weight) in zip(nets, parts)])
    assert lora_layers(base)["transformer_blocks.1.attn2.to_v"].rank == 3 + 5 + 3 + 1


def test_a_rank_above_the_layers_size_is_read_and_summed(base, tiny_base, tmp_path):
    full = adapted(tiny_base, rank=32)
    path = own_file(full, tmp_path / "a.safetensors", tiny_base)
    load_loras(base, [(path, 0.5), (path, 0.25)])
    assert {layer.rank for layer in lora_layers(base).values()} == {64}  # min(in, out) is 32
    assert_sum(base, [(full, 0.75)])
    summed = own_file(base, tmp_path / "b.safetensors", tiny_base)
    remove_lora(base)
    load_lora(base, summed)
    assert_sum(base, [(full, 0.75)])


def test_one_file_with_a_weight_keeps_its_tensors(base, own):
    load_loras(base, [(own, 0.25)], scale=2.0)
    tensors, _ = read_tensors(own)
    for name, layer in lora_layers(base).items():
        assert torch.equal(layer.lora_B, tensors[f"base_model.model.{name}.lora_B.weight"]) and layer.scale == 0.5


def test_files_of_two_bases_are_not_summed(base, tiny_base, own, tmp_path):
    save_lora(adapted(tiny_base), tmp_path / "b.safetensors", {"base_hash": "other"})
    with pytest.raises(ValueError, match="different bases"):
        load_loras(base, [(own, 1.0), (tmp_path / "b.safetensors", 1.0)])
    assert not lora_layers(base)


def test_a_sum_keeps_what_all_headers_say(tiny_base, own, tmp_path):
    twin = own_file(adapted(tiny_base), tmp_path / "b.safetensors", tiny_base, **{**HEADER, "data_hash": "d2"})
    header = stack([(read_lora(own), 1.0), (read_lora(twin), 1.0)]).header
    assert header["step"] == "4" and "data_hash" not in header and len(header["base_hash"]) == 64


# what is no LoRA file, and folders


def test_a_folder_without_or_with_two_candidates_is_refused(own, tmp_path):
    with pytest.raises(ValueError, match="found 0"):
        read_lora(tmp_path)
    write_lora(read_lora(own), tmp_path / "peft", "peft")
    write_lora(read_lora(own), tmp_path / "peft" / "pytorch_lora_weights.safetensors", "diffusers")
    with pytest.raises(ValueError, match="found 2"):
        read_lora(tmp_path / "peft")
    assert lora_files(tmp_path / "peft" / "adapter_model.safetensors")[1].name == "adapter_config.json"


def test_peft_tensors_without_their_configuration_are_refused(own, base, tmp_path):
    write_lora(read_lora(own), tmp_path / "peft", "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="unknown alpha"):
        read_lora(tmp_path / "peft")


@pytest.mark.parametrize("change, words", [
    (lambda t: t * math.nan, "NaN"), (lambda t: t[:, 1:], "expected"), (lambda t: t.long(), "floating-point")])
def test_wrong_tensors_are_named_without_a_base_too(change, words, own, tmp_path):
    tensors, header = read_tensors(own)
    key = "base_model.model.transformer_blocks.0.attn1.to_v.lora_B.weight"
    save_tensors(own, {**tensors, key: change(tensors[key])}, header)
    with pytest.raises(ValueError, match=words):
        read_lora(own)


def test_no_tensor_and_no_lora_is_refused(base, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    refused(base, tmp_path / "empty.safetensors", "holds no tensor")
    save_file({"proj_out.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    refused(base, tmp_path / "base.safetensors", "no LoRA file known here, its first key is 'proj_out.weight'")


# the command


def test_convert_reports_every_key_with_its_scale(own, tmp_path, capsys):
    assert convert_main([str(own), str(tmp_path / "d.safetensors"), "--format", "diffusers"]) == 0
    out = capsys.readouterr().out
    for key, tensor in load_file(tmp_path / "d.safetensors").items():
        assert f"{key}  {tuple(tensor.shape)}  scale 1\n" in out
    assert "native, 16 layers" in out
    assert "note:" not in out
    assert convert_main([str(own), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert f"attn1.to_v.lora_B.weight  (32, 3)  scale {6 / math.sqrt(3):g}\n" in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMATS)
def test_convert_replaces_only_with_the_flag_and_leaves_nothing_half_written(form, own, tmp_path, monkeypatch, capsys):
    out, arguments = target(tmp_path, form), [str(own), str(target(tmp_path, form)), "--format", form]
    assert convert_main(arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert convert_main(arguments) == 2
    error = capsys.readouterr().err
    assert "exists" in error and error.count("\n") == 1 and "convert: error" in error

    def full(source, destination):
        raise OSError(28, "No space left on device")

    def stopped(source, destination):
        raise KeyboardInterrupt

    other = out if form == "peft" else out.with_suffix(".json")
    for failing in {out, other}:  # whichever move into place does not end
        for end, code, words in ((full, 2, "No space"), (stopped, 130, "was not written")):
            with monkeypatch.context() as patch:
                replace = os.replace
                patch.setattr(os, "replace", lambda a, b: end(a, b) if Path(b) == failing and "/old" not in str(a)
                              else replace(a, b))
                assert convert_main([*arguments, "--overwrite"]) == code
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
            with monkeypatch.context() as patch:  # where nothing was before
                new = tmp_path / "new" / out.name
                patch.setattr(os, "replace", lambda a, b: end(a, b) if Path(b) == new.with_suffix(failing.suffix)
                              else replace(a, b))
                assert convert_main([str(own), str(new), "--format", form]) == code
            assert words in capsys.readouterr().err and not [*new.parent.iterdir()]
    assert convert_main([*arguments, "--overwrite"]) == 0
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before.keys()


def test_a_copy_cut_by_a_full_disk_does_not_replace_what_it_was_made_of(own, tmp_path, monkeypatch, capsys):
    arguments = [str(own), str(tmp_path / "n.safetensors"), "--format", "kohya"]
    assert convert_main(arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def cut(source, destination):
        Path(destination).write_bytes(Path(source).read_bytes()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports.shutil, "copy2", cut)
    assert convert_main([*arguments, "--overwrite"]) == 2
    assert "No space" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_convert_replaces_no_folder_but_pefts(own, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    assert convert_main([str(own), str(tmp_path / "precious"), "--format", "peft", "--overwrite"]) == 2
    assert (tmp_path / "precious" / "thesis.txt").exists()
    assert convert_main([str(own), str(own), "--format", "native", "--overwrite"]) == 2
    assert convert_main([str(own), str(tmp_path / "a.pth"), "--format", "native"]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_convert_from_kohya_with_a_base_and_of_another_base(own, tiny_base, tmp_path, capsys):
    kohya = spoilt_kohya(own, tmp_path, lambda t: None)  # saved again: its header is gone
    arguments = [str(kohya), str(tmp_path / "n.safetensors"), "--format", "native"]
    assert convert_main(arguments) == 2 and "give --base" in capsys.readouterr().err
    assert convert_main([*arguments, "--base", str(tiny_base)]) == 0
    assert "names no base_hash" in capsys.readouterr().out
    save_lora(adapted(tiny_base), tmp_path / "o.safetensors", {"base_hash": "other"})
    assert convert_main([str(tmp_path / "o.safetensors"), str(tmp_path / "p"), "--format", "peft",
                         "--base", str(tiny_base)]) == 2
    assert "LoRA of base other" in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_convert_takes_alpha_for_a_file_that_names_none(own, tmp_path, capsys):
    write_lora(read_lora(own), tmp_path / "d.safetensors", "diffusers")
    save_file(load_file(tmp_path / "d.safetensors"), tmp_path / "bare.safetensors")
    arguments = [str(tmp_path / "bare.safetensors"), str(tmp_path / "n.safetensors"), "--format", "native"]
    assert convert_main(arguments) == 2 and "names no alpha" in capsys.readouterr().err
    assert convert_main([*arguments, "--alpha", "6"]) == 0
    assert read_lora(tmp_path / "n.safetensors").scaling("transformer_blocks.0.attn1.to_v") == 2


def test_an_alpha_beside_the_files_own_is_refused(own, base, tmp_path):
    kohya, diffusers, peft = (tmp_path / name for name in ("k.safetensors", "d.safetensors", "p"))
    for path, form in ((kohya, "kohya"), (diffusers, "diffusers"), (peft, "peft")):
        write_lora(read_lora(own), path, form)
    for path in (own, kohya, diffusers, peft):
        with pytest.raises(ValueError, match="names its own alpha; leave out --alpha"):
            read_lora(path, base, 6.0)
    bare = spoilt_kohya(own, tmp_path, lambda t: [t.pop(k) for k in list(t) if k.endswith(".alpha")])
    assert read_lora(bare, base, 6.0).scaling("transformer_blocks.0.attn1.to_v") == 2  # rank 3


def test_kohyas_report_says_the_scale_not_alpha(own, tmp_path):
    lora = read_lora(own)
    report = write_lora(lora, tmp_path / "k.safetensors", "kohya")
    assert {scale for key, _, scale in report if "0_attn1_to_v." in key} == {
        lora.scaling("transformer_blocks.0.attn1.to_v")}


@pytest.mark.parametrize("form, other", [("peft", "p/checkpoint-500"), ("native", "n.json")])
def test_overwrite_loses_nothing_that_was_not_written_here(form, other, own, tmp_path):
    target = tmp_path / ("p" if form == "peft" else "n.safetensors")
    write_lora(read_lora(own), target, form)
    write_lora(read_lora(own), target, form, overwrite=True)
    (tmp_path / other).unlink(missing_ok=True)
    (tmp_path / other).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="that hold nothing else"):
        write_lora(read_lora(own), target, form, overwrite=True)
    assert (tmp_path / other).read_text() == '{"mine": 1}'


def test_the_authors_file_once_compared_names_its_base(base, tiny_base, tmp_path, capsys):
    path = authors_file(of_attn2(tiny_base), tmp_path / "staining.pth")
    assert convert_main([str(path), str(tmp_path / "n.safetensors"), "--format", "native"]) == 2
    assert "give --base" in capsys.readouterr().err and not (tmp_path / "n.safetensors").exists()
    assert load_lora(base, path, expected_base_hash="h")["base_hash"] == "h"
    target = tmp_path / "n.safetensors"
    assert convert_main([str(path), str(target), "--format", "native", "--base", str(tiny_base)]) == 0
    assert "names no base_hash" not in capsys.readouterr().out
    assert read_lora(target).header["base_hash"] == file_hash(tiny_base / "transformer" / WEIGHTS_NAME)
