"""The tile encoder: timm's network, UNI2-h's preprocessing, one tile or many, safe loading."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_ENCODER
from PIL import Image
from timm.layers import SwiGLUPacked
from torchvision import transforms

from pixcell_min.checkpoint import save_tensors
from pixcell_min.uni import IMAGENET_MEAN, IMAGENET_STD, TileEncoder, crop_boxes

ROUNDING = 1e-6  # float32: the order of a division and a subtraction
RESIZE_ROUNDING = 1.5 / 255  # PIL rounds to whole levels after each of two passes, tensors do not
TIMM_ARGS = {
    "img_size": 28, "patch_size": 14, "depth": 1, "num_heads": 2, "init_values": 1.0,
    "embed_dim": 16, "mlp_ratio": 4.0, "num_classes": 0, "no_embed_class": True,
    "mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "reg_tokens": 2,
    "dynamic_img_size": True,
}


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return TileEncoder.from_pretrained(tiny_base / "uni")


def close(result, expected, bound=ROUNDING):
    torch.testing.assert_close(result, expected, atol=bound, rtol=0)


def tile(seed=0, size=(40, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def seen_by_network(encoder, image):
    """What the vision transformer is given for a tile."""
    pixels = []
    hook = encoder.vit.register_forward_pre_hook(lambda vit, args: pixels.append(args[0]))
    encoder(image)
    hook.remove()
    return pixels[0]


# The network

def test_same_output_as_timm(encoder):
    reference = timm.create_model("vit_giant_patch14_224", pretrained=False, **TIMM_ARGS).eval()
    reference.load_state_dict(encoder.vit.state_dict(), strict=True)
    images = [tile(1), tile(2)]
    transform = transforms.Compose([transforms.Resize(28), transforms.ToTensor(),
                                    transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    expected = reference(torch.stack([transform(image) for image in images]))[:, None]
    close(encoder(images), expected)
    assert expected.shape == (2, 1, 16) and (expected[0] - expected[1]).abs().max() > 1e-3


def test_a_config_without_arguments_is_uni2h():
    with torch.device("meta"):
        encoder = TileEncoder(None)
    rows = [line.split("\t") for line in
            (Path(__file__).parent / "data" / "uni2-h.tsv").read_text().splitlines()[1:]]
    expected = {key: tuple(int(n) for n in shape.split(",")) for key, shape in rows}
    assert {key: tuple(t.shape) for key, t in encoder.vit.state_dict().items()} == expected
    assert (encoder.embedding_dim, encoder.input_size) == (1536, 224)
    assert sum(p.numel() for p in encoder.vit.parameters()) == 681_394_176
    assert isinstance(encoder.vit.blocks[0].mlp.act, torch.nn.SiLU)


def test_frozen_and_evaluating(encoder):
    assert not encoder.training and not encoder.vit.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(tile()).requires_grad


def test_differentiable_in_tensors(encoder):
    pixels = as_tensor(tile()).requires_grad_()
    encoder(pixels)[0, 0, 0].backward()  # one number: the sum of normalised ones is constant
    assert pixels.grad.isfinite().all() and pixels.grad.abs().max() > 1e-6


# Preprocessing

@pytest.mark.parametrize("side", [224, 256, 300, 64])
def test_same_preprocessing_as_torchvision(side):
    torch.manual_seed(0)
    encoder = TileEncoder({**TINY_ENCODER, "img_size": 224}).eval()
    transform = transforms.Compose([
        transforms.Resize(224, transforms.InterpolationMode.BILINEAR, antialias=True),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])
    image = tile(size=(side, side))
    close(seen_by_network(encoder, image)[0], transform(image))


@pytest.mark.parametrize("size", [(28, 28), (40, 40), (56, 56), (20, 20), (60, 40)])
def test_tensors_are_resized_as_pictures_are(encoder, size):
    image = tile(size=size)
    picture, tensor = (seen_by_network(encoder, form) for form in (image, as_tensor(image)))
    levels = (picture - tensor).abs() * torch.tensor(IMAGENET_STD)[:, None, None]
    assert levels.max() < (ROUNDING if size == (28, 28) else RESIZE_ROUNDING)


def test_mean_and_deviation_of_the_config(encoder):
    other = TileEncoder(TINY_ENCODER, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    pixels = as_tensor(tile(size=(28, 28)))
    close(seen_by_network(other, pixels)[0], (pixels - 0.5) * 4)


def test_the_centred_square_of_other_shapes(encoder):
    wide, tall = tile(size=(61, 40)), tile(size=(40, 57))
    assert torch.equal(encoder(wide), encoder(wide.crop((10, 0, 50, 40))))
    assert torch.equal(encoder(tall), encoder(tall.crop((0, 8, 40, 48))))
    assert torch.equal(encoder(as_tensor(wide)), encoder(as_tensor(wide)[:, :, 10:50]))


def test_grey_and_transparent_pictures_are_taken_as_rgb(encoder):
    grey = tile().convert("L")
    assert torch.equal(encoder(grey), encoder(grey.convert("RGB")))
    assert torch.equal(encoder(tile().convert("RGBA")), encoder(tile()))


# One or many

def test_one_or_many(encoder):
    images = [tile(i) for i in range(3)]
    tensors = [as_tensor(image) for image in images]
    together = encoder(images)
    assert together.shape == (3, 1, 16) and together.dtype == torch.float32
    assert torch.equal(encoder(tuple(images)), together)
    assert torch.equal(encoder(torch.stack(tensors)), encoder(tensors))
    for i in range(3):
        assert encoder(images[i]).shape == encoder(tensors[i]).shape == (1, 1, 16)
        close(encoder(images[i])[0], together[i])
        close(encoder(tensors[i])[0], encoder(tensors)[i])
    mixed = encoder([images[0], tensors[1], tile(2, (28, 30))])  # pictures and tensors of any size
    close(mixed[0], together[0])


@pytest.mark.parametrize("form", [lambda image: image, as_tensor])
@pytest.mark.parametrize("side", [1024, 128])
def test_sixteen_crops_in_row_order(tiny_base, encoder, form, side):
    many, crop = TileEncoder.from_pretrained(tiny_base / "uni", tokens=16), side // 4
    image = tile(size=(side, side))
    embeddings = many([form(image), form(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))])
    assert embeddings.shape == (2, 16, 16) and encoder(form(image)).shape == (1, 1, 16)
    for row in range(4):
        for column in range(4):
            box = (crop * column, crop * row, crop * column + crop, crop * row + crop)
            alone = encoder(form(image.crop(box)))
            close(embeddings[0, 4 * row + column], alone[0, 0])
    assert len(embeddings[0].unique(dim=0)) == 16


def test_crop_boxes_by_hand():
    boxes = crop_boxes(1024, 1024, 16)
    assert len(boxes) == 16 and boxes[:2] == [(0, 0, 256, 256), (256, 0, 512, 256)]
    assert boxes[4] == (0, 256, 256, 512) and boxes[15] == (768, 768, 1024, 1024)
    assert crop_boxes(1024, 1000, 1) == [(12, 0, 1012, 1000)]
    assert crop_boxes(5, 8, 1) == [(0, 1, 5, 6)]
    assert crop_boxes(5, 8, 4) == [(0, 2, 2, 4), (2, 2, 4, 4), (0, 4, 2, 6), (2, 4, 4, 6)]


# Refusals

@pytest.mark.parametrize("images, message", [
    ([], "no tile given"), (torch.zeros(0, 3, 28, 28), "no tile given"), (["tile.png"], "got str"),
    ([np.zeros((28, 28, 3))], "got ndarray"), (torch.zeros(1, 28, 28), r"\(1, 28, 28\)"),
    (torch.zeros(3, 28, 28, dtype=torch.uint8), "torch.uint8"),
    (torch.zeros(2, 1, 28, 28), r"\(1, 28, 28\)"),
    (torch.zeros(28, 28), r"\(28,\)"),
])
def test_other_inputs_are_refused(encoder, images, message):
    with pytest.raises(ValueError, match=message):
        encoder(images)


def test_tiles_of_any_size_share_a_call(tiny_base):
    many = TileEncoder.from_pretrained(tiny_base / "uni", tokens=4)
    assert many([torch.zeros(3, 1024, 1024), torch.zeros(3, 28, 30)]).shape == (2, 4, 16)


@pytest.mark.parametrize("tokens", [0, 2, 15, -4])
def test_crops_that_make_no_grid_are_refused(tokens):
    with pytest.raises(ValueError, match=f"square number, got {tokens}"):
        TileEncoder(TINY_ENCODER, tokens=tokens)


def test_a_tile_of_fewer_pixels_than_crops_is_refused(tiny_base):
    many = TileEncoder.from_pretrained(tiny_base / "uni", tokens=16)
    with pytest.raises(ValueError, match="3×40 px is too small for 4×4 crops"):
        many(torch.zeros(3, 40, 3))


@pytest.mark.parametrize("args, message", [
    (["depth"], "must be a table"), (7, "must be a table"), ({**TINY_ENCODER, "num_heads": 3}, "timm refuses"),
    ({**TINY_ENCODER, "depth": "two"}, "timm refuses"),
    ({**TINY_ENCODER, "embed_dim": 0}, "timm refuses"),
])
def test_wrong_arguments_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        TileEncoder(args)


def test_a_config_that_names_some_arguments_leaves_the_others_as_uni2h_has_them():
    with torch.device("meta"):
        partial = TileEncoder({"img_size": 224, "num_classes": 0, "dynamic_img_size": True})
        whole = TileEncoder()
    shapes = [{k: v.shape for k, v in encoder.vit.state_dict().items()}
              for encoder in (partial, whole)]
    assert shapes[0] == shapes[1] and len(partial.vit.blocks) == 24


@pytest.mark.parametrize("pretrained", [[1], {"mean": 0.5}, {"std": [1.0, None, 1.0]}])
def test_a_broken_normalisation_is_refused(tiny_base, tmp_path, pretrained):
    shutil.copytree(tiny_base / "uni", tmp_path / "uni")
    config = json.loads((tmp_path / "uni" / "config.json").read_text())
    (tmp_path / "uni" / "config.json").write_text(
        json.dumps({**config, "pretrained_cfg": pretrained}))
    with pytest.raises(ValueError, match="config.json"):
        TileEncoder.from_pretrained(tmp_path / "uni")
    config["pretrained_cfg"] = {"mean": [0, 0, 0], "std": [1, 1, 1]}  # numbers, whole ones too
    (tmp_path / "uni" / "config.json").write_text(json.dumps(config))
    assert TileEncoder.from_pretrained(tmp_path / "uni").std == (1, 1, 1)


# Loading

class Payload:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write(folder, encoder, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_args": TINY_ENCODER}))
    return {name: tensor.clone() for name, tensor in encoder.vit.state_dict().items()}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_from_either_file(encoder, tmp_path, name, dtype):
    save_tensors(tmp_path / name, write(tmp_path, encoder))
    loaded = TileEncoder.from_pretrained(tmp_path, dtype)
    pairs = list(zip(encoder.parameters(), loaded.parameters(), strict=True))
    assert all(torch.equal(a.to(dtype), b) and not b.requires_grad for a, b in pairs)
    embedding = loaded(tile())
    assert embedding.dtype == dtype and not loaded.training
    if dtype == torch.float32:
        assert torch.equal(embedding, encoder(tile()))


def test_a_pickle_with_code_is_refused_and_not_run(encoder, tmp_path):
    write(tmp_path, encoder)
    marker = tmp_path / "ran"
    content = {"cls_token": Payload(marker)}
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin: refused"):
        TileEncoder.from_pretrained(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: refused"):
        TileEncoder.from_pretrained(tmp_path)
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the file was dangerous


def test_missing_and_misfitting_files_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        TileEncoder.from_pretrained(tmp_path)
    tensors = write(tmp_path, encoder)
    with pytest.raises(ValueError, match="no model.safetensors or pytorch_model.bin"):
        TileEncoder.from_pretrained(tmp_path)
    tensors["cls_tokn"] = tensors.pop("cls_token")
    save_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="'cls_tokn' is nearest to 'cls_token'"):
        TileEncoder.from_pretrained(tmp_path)
    write(tmp_path, encoder, {"architecture": "resnet50"})
    with pytest.raises(ValueError,
                       match="architecture 'resnet50', expected 'vit_giant_patch14_224'"):
        TileEncoder.from_pretrained(tmp_path)


def test_the_config_names_mean_and_deviation(encoder, tmp_path):
    normalise = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"architecture": "vit_giant_patch14_224", "model_args": TINY_ENCODER,
              "pretrained_cfg": normalise}
    save_tensors(tmp_path / "model.safetensors", write(tmp_path, encoder, config))
    loaded = TileEncoder.from_pretrained(tmp_path)
    assert (loaded.mean, loaded.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
