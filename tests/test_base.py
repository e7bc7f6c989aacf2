"""Where a base is looked for, what it needs, and what identifies it."""

import shutil

import pytest
import torch
from conftest import write_base
from PIL import Image

import pixcell_min
from pixcell_min import base as module
from pixcell_min.base import (
    encoder_folder, features_hash, find_base, load_encoder, load_pixcell_base, read_vae_config,
    vae_weights,
)
from pixcell_min.checkpoint import file_hash, read_tensors, save_tensors
from pixcell_min.pipeline import PixCellPipeline
from pixcell_min.transformer import WEIGHTS_NAME


pytestmark = pytest.mark.usefixtures("nothing_downloaded")


def refusal(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Which folder

def test_a_path_wins_over_the_environment_over_the_embedded_one(tmp_path, monkeypatch):
    for name in ("given", "environment", "repository/weights/pixcell-nano"):
        (tmp_path / name / "transformer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "REPOSITORY", tmp_path / "repository")
    monkeypatch.setenv("PIXCELL_BASE", str(tmp_path / "environment"))
    assert find_base(tmp_path / "given") == find_base("given") == tmp_path / "given"
    assert find_base() == find_base(None) == find_base("") == tmp_path / "environment"
    monkeypatch.delenv("PIXCELL_BASE")
    assert find_base() == tmp_path / "repository" / "weights" / "pixcell-nano"
    # What lies here wins over what lies in the repository.
    (tmp_path / "weights" / "pixcell-nano" / "transformer").mkdir(parents=True)
    assert find_base() == tmp_path / "weights" / "pixcell-nano"


def test_no_base(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        text = refusal(find_base, path)
        assert text.startswith(f"{path}: no base model; expected a folder with transformer/")
    monkeypatch.setenv("PIXCELL_BASE", str(tmp_path / "none"))
    assert refusal(load_pixcell_base).startswith(f"{tmp_path / 'none'}: no base model")


def test_a_relative_base_stays_the_same_after_a_change_of_folder(own_base, tmp_path, monkeypatch):
    monkeypatch.chdir(own_base.parent)
    pipeline = load_pixcell_base("own")
    monkeypatch.chdir(tmp_path)
    assert pipeline.encoder.embedding_dim == 16  # loaded only now


# What it needs

@pytest.mark.parametrize("part", [
    "transformer/config.json", f"transformer/{WEIGHTS_NAME}", "vae/config.json",
    "scheduler/scheduler_config.json"])
def test_a_missing_part_is_named(own_base, part):
    (own_base / part).unlink()
    assert refusal(lambda: load_pixcell_base(own_base).vae).startswith(str(own_base / part))


def test_vae_sizes_without_weights(own_base):
    (own_base / "vae" / WEIGHTS_NAME).unlink()
    config = read_vae_config(own_base)
    assert (config.scaling_factor, config.shift_factor, config.downscale) == (1.5305, 0.0609, 8)


def test_missing_vae_weights_name_every_place(own_base):
    (own_base / "vae" / WEIGHTS_NAME).unlink()
    pipeline = load_pixcell_base(own_base)  # training from precomputed features needs no VAE
    text = refusal(lambda: pipeline.vae)
    assert refusal(pipeline, torch.zeros(16)) == text  # before drawing
    assert text.startswith(f"{own_base}: no VAE weights; looked for")
    for folder in (own_base / "vae", own_base.parent / "sd3-vae",
                   own_base.parent / "sd3-vae" / "vae"):
        assert str(folder / WEIGHTS_NAME) in text


@pytest.mark.parametrize("beside", ["sd3-vae", "sd3-vae/vae"])
def test_vae_weights_beside_a_snapshot(own_base, beside):
    expected = load_pixcell_base(own_base).vae.state_dict()
    folder = own_base.parent / beside
    folder.mkdir(parents=True)
    shutil.move(own_base / "vae" / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    assert vae_weights(own_base) == folder / WEIGHTS_NAME
    vae = load_pixcell_base(own_base).vae
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())


def test_what_was_downloaded_into_the_repository_serves_a_base_elsewhere(own_base, monkeypatch):
    repository = own_base.parent.parent / "repository"
    monkeypatch.setattr(module, "REPOSITORY", repository)
    for part, place in (("uni", "weights/uni2-h"), (f"vae/{WEIGHTS_NAME}",
                                                    f"weights/sd3-vae/vae/{WEIGHTS_NAME}")):
        (repository / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(own_base / part, repository / place)
    assert encoder_folder(own_base) == repository / "weights" / "uni2-h"
    assert vae_weights(own_base) == repository / "weights" / "sd3-vae" / "vae" / WEIGHTS_NAME


def test_the_encoder_beside_a_snapshot(own_base):
    assert encoder_folder(own_base) == own_base / "uni"
    shutil.move(own_base / "uni", own_base.parent / "uni2-h")
    assert encoder_folder(own_base) == own_base.parent / "uni2-h"
    assert load_encoder(own_base).embedding_dim == 16
    shutil.rmtree(own_base.parent / "uni2-h")
    text = refusal(load_encoder, own_base)
    assert text.startswith(f"{own_base}: no tile encoder")
    assert str(own_base.parent / "uni2-h" / "config.json") in text


def test_the_encoder_is_loaded_when_first_used(own_base):
    shutil.rmtree(own_base / "uni")
    pipeline = load_pixcell_base(own_base)
    assert "no tile encoder" in refusal(lambda: pipeline.encoder)


# What it gives

def test_a_loaded_base(tiny_base):
    pipeline = load_pixcell_base(tiny_base, device="cpu", mixed_precision="no")
    assert pipeline.base_hash == file_hash(tiny_base / "transformer" / WEIGHTS_NAME)
    assert (pipeline.device, pipeline.dtype) == (torch.device("cpu"), None)
    for network in (pipeline.transformer, pipeline.vae, pipeline.encoder):
        assert not network.training
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in network.parameters())
    assert pipeline.encoder is pipeline.encoder
    assert pipeline.schedule.num_train_timesteps == 1000
    assert pipeline.schedule.betas[-1].item() == pytest.approx(0.02)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_inert_layers_stay_in_the_file_whatever_the_device(
        own_base, stored, device, precision):
    path = own_base / "transformer" / WEIGHTS_NAME
    save_tensors(path, {name: t.to(stored) for name, t in read_tensors(path)[0].items()})
    transformer = load_pixcell_base(own_base, device, precision).transformer
    inert, usual = transformer.inert_layers(), {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    assert inert
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            wanted, place = (stored, "cpu") if name in inert else (usual, device)
            assert layer.weight.dtype == layer.bias.dtype == wanted, name
            assert layer.weight.device.type == layer.bias.device.type == place, name
    others = [*transformer.buffers(), transformer.scale_shift_table, transformer.uncond_embedding]
    assert {tensor.device.type for tensor in others} == {device}


@pytest.mark.parametrize("mixed_precision, dtype",
                         [("no", None), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_float32_attention_comes_with_float16_alone(tiny_base, mixed_precision, dtype):
    pipeline = load_pixcell_base(tiny_base, "cpu", mixed_precision)
    assert pipeline.dtype == dtype
    attention = pipeline.transformer.transformer_blocks[0].attn1
    assert attention.float32_attention == (mixed_precision == "fp16")
    on_a_gpu = PixCellPipeline(pipeline.transformer, None, None, pipeline.schedule, base_hash="",
                               device="cuda", dtype=dtype)
    assert not on_a_gpu.transformer.transformer_blocks[0].attn1.float32_attention


def test_unknown_device_and_precision(tiny_base):
    assert "device 'abacus'" in refusal(load_pixcell_base, tiny_base, "abacus")
    assert "mixed_precision is 'fp8'" in refusal(load_pixcell_base, tiny_base, "cpu", "fp8")


@pytest.mark.parametrize("part, changes", [
    ("transformer/config.json", False), (f"transformer/{WEIGHTS_NAME}", False),
    ("vae/config.json", True),
    (f"vae/{WEIGHTS_NAME}", True), ("uni/config.json", True), ("uni/model.safetensors", True)])
def test_what_features_depend_on(own_base, part, changes):
    before = features_hash(own_base)
    assert before == features_hash(own_base)
    (own_base / part).write_bytes((own_base / part).read_bytes() + b" ")
    assert (features_hash(own_base) != before) == changes


def test_output_channels_are_those_of_the_latents_or_twice_as_many(tmp_path):
    """One channel would be broadcast over sixteen by the loss, and refused at the first image."""
    base = write_base(tmp_path / "plain", out_channels=16)
    load_pixcell_base(base, "cpu")
    path = base / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"out_channels": 16', '"out_channels": 1'))
    assert refusal(load_pixcell_base, base, "cpu").endswith(
        "out_channels must be 16 as in_channels, or 32 with a learned variance, got 1")


def test_the_default_encoder_is_the_default_bases(tiny_base, tmp_path, monkeypatch):
    image = Image.new("RGB", (28, 28), (200, 120, 180))
    monkeypatch.setenv("PIXCELL_BASE", str(tiny_base))
    first = pixcell_min.uni2h_encoder(image)
    assert torch.equal(first, load_encoder(tiny_base)(image)) and first.shape == (1, 1, 16)
    loads = []
    monkeypatch.setattr(module.TileEncoder, "from_pretrained", lambda *given, **_: loads.append(given))
    both = pixcell_min.uni2h_encoder([image] * 2)
    torch.testing.assert_close(both, first.expand(2, -1, -1))  # another batch may round otherwise
    assert not loads  # it was loaded once
    monkeypatch.undo()
    monkeypatch.setenv("PIXCELL_BASE", str(write_base(tmp_path / "other", seed=1)))
    assert not torch.equal(pixcell_min.uni2h_encoder(image), first)
