"""The VAE by itself: scale and shift, posterior, tiles, refusals, strict loading."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VAE
from safetensors.torch import load_file, save_file

from pixcell_min.vae import (
    FIXED, WEIGHTS_NAME, AutoencoderKL, VAEConfig, ramp, tile_starts,
)

ROUNDING = 1e-5  # float32: a few sums and quotients of values of order 1
SCALE, SHIFT = 1.5305, 0.0609


def close(result, expected, bound=ROUNDING):
    torch.testing.assert_close(result, expected, atol=bound, rtol=0)


def tiny(**changes):
    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig.from_dict({**TINY_VAE, **changes})).eval()


@torch.no_grad()
def test_scale_and_shift_live_inside():
    vae, plain = tiny(), tiny(scaling_factor=1.0, shift_factor=0.0)
    pixels, z = torch.rand(1, 3, 16, 24) * 2 - 1, torch.randn(1, 16, 2, 3)
    (mean, logvar), (raw_mean, raw_logvar) = vae.encode(pixels), plain.encode(pixels)
    close(mean, (raw_mean - SHIFT) * SCALE)
    close(logvar, raw_logvar + math.log(SCALE**2))
    close(vae.decode((z - SHIFT) * SCALE), plain.decode(z))


@torch.no_grad()
def test_shapes():
    vae = tiny()
    assert vae.downscale == 8
    mean, logvar = vae.encode(torch.zeros(2, 3, 16, 40))
    assert mean.shape == logvar.shape == (2, 16, 2, 5)
    assert vae.decode(mean).shape == (2, 3, 16, 40)
    assert VAEConfig() == VAEConfig(3, 3, 16, (128, 256, 512, 512), 2, 32, 1.5305, 0.0609)


@torch.no_grad()
def test_log_variance_is_clamped_before_it_is_scaled():
    vae = tiny()
    vae.encoder.conv_out.weight.zero_()
    vae.encoder.conv_out.bias.copy_(torch.cat([torch.zeros(16), torch.tensor([100.0, -100.0] * 8)]))
    logvar = vae.encode(torch.zeros(1, 3, 8, 8))[1].flatten()
    expected = torch.tensor([20.0, -30.0] * 8) + 2 * math.log(SCALE)
    close(logvar, expected)


@torch.no_grad()
def test_down_sampling_pads_below_and_right():
    conv = tiny().encoder.down_blocks[0].downsamplers[0]
    x = torch.randn(1, 4, 6, 6)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.conv.weight, conv.conv.bias, stride=2)
    assert torch.equal(conv(x), expected) and expected.shape == (1, 4, 3, 3)


# Tiles

def pointwise(vae, monkeypatch):
    """A decoder that looks at one latent cell alone: tiles of it must join without a trace."""
    monkeypatch.setattr(vae, "decode",
                        lambda z: F.interpolate(z[:, :3] + z[:, 3:6], scale_factor=8.0))
    return vae


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 21), (17, 13), (25, 5)])
@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 4), (7, 3)])
def test_tiles_of_a_local_decoder_join_without_a_trace(size, tile, overlap, monkeypatch):
    vae, latents = pointwise(tiny(), monkeypatch), torch.randn(2, 16, *size)
    tiled = vae.decode_tiled(latents, tile, overlap)
    close(tiled, vae.decode(latents))
    constant = vae.decode_tiled(torch.ones(1, 16, *size), tile, overlap)
    close(constant, torch.full_like(constant, 2.0))


@torch.no_grad()
def test_an_image_of_one_tile_is_decoded_whole():
    vae, latents = tiny(), torch.randn(1, 16, 8, 6)
    assert torch.equal(vae.decode_tiled(latents, 8, 2), vae.decode(latents))
    assert not torch.equal(vae.decode_tiled(latents, 6, 2), vae.decode(latents))


@torch.no_grad()
def test_in_half_precision_tiles_are_joined_in_float32(monkeypatch):
    vae, latents = tiny(), torch.randn(1, 16, 70, 66)
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: decode(z).bfloat16())
    tiled = vae.decode_tiled(latents, 64, 16)
    assert tiled.dtype == torch.float32 and tiled.isfinite().all()
    monkeypatch.setattr(vae, "decode", lambda z: decode(z).bfloat16().float())
    assert torch.equal(tiled, vae.decode_tiled(latents, 64, 16))


@pytest.mark.parametrize("overlap", [2, 6])
def test_tiles_of_other_brightness_are_cross_faded(overlap, monkeypatch):
    # Group norms see one tile, so neighbours differ in brightness: here by 1, black beside white.
    vae, count = tiny(), iter(range(100))

    def decode(z):
        return torch.full((1, 3, 8 * z.shape[2], 8 * z.shape[3]), float(next(count) % 2))

    monkeypatch.setattr(vae, "decode", decode)
    image = vae.decode_tiled(torch.zeros(1, 16, 12, 33), 12, overlap)
    assert next(count) > 2 and image.min() == 0 and image.max() > 0.9
    # Linear over the overlap; the last tile may overlap two others, at most double the slope.
    assert image.diff(dim=3).abs().max() <= 2 / (8 * overlap + 1) + ROUNDING
    assert image.diff(dim=2).abs().max() < ROUNDING


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 23, 128])
@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 2), (8, 4)])
def test_tile_starts_cover(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    covered = {at for start in starts for at in range(start, start + tile)}
    assert covered >= set(range(size)) and starts[0] == 0
    if size > tile:
        assert max(covered) == size - 1
        assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:]))
    else:
        assert starts == [0]


def test_ramp_by_hand():
    like = torch.zeros(1)
    assert torch.equal(ramp(8, 3, like) * 4, torch.tensor([1.0, 2, 3, 4, 4, 3, 2, 1]))
    assert torch.equal(ramp(5, 0, like), torch.ones(5))
    assert (ramp(16, 8, like) > 0).all()


# Refusals

@pytest.mark.parametrize("tile, overlap", [(8, 5), (8, -1)])
def test_an_overlap_beyond_half_a_tile_is_refused(tile, overlap):
    with pytest.raises(ValueError, match=f"got overlap {overlap}, tile {tile}"):
        tiny().decode_tiled(torch.zeros(1, 16, 20, 20), tile, overlap)


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 16, 17), (3, 16, 16)])
def test_pixels_off_the_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"multiples of 8, got \("):
        tiny().encode(torch.zeros(shape))


@pytest.mark.parametrize("key", sorted(FIXED))
def test_a_config_of_another_network_is_refused(key):
    with pytest.raises(ValueError, match=f"here: {key} is 'other', only"):
        VAEConfig.from_dict({**TINY_VAE, key: "other"}, "here")


@pytest.mark.parametrize("key", ["use_quant_conv", "use_post_quant_conv"])
def test_an_absent_quant_switch_means_another_network(key):
    with pytest.raises(ValueError, match=f"{key} is True, only False"):
        VAEConfig.from_dict({k: v for k, v in TINY_VAE.items() if k != key})


def test_other_absent_switches_mean_this_network():
    optional = ("act_fn", "mid_block_add_attention", "_class_name")
    kept = {key: value for key, value in TINY_VAE.items() if key not in optional}
    assert VAEConfig.from_dict(kept) == VAEConfig.from_dict(TINY_VAE)


@pytest.mark.parametrize("key", sorted(VAEConfig.__dataclass_fields__))
def test_a_missing_or_mistyped_field_is_named(key):
    with pytest.raises(ValueError, match=f"here: .*'{key}' is missing"):
        VAEConfig.from_dict({k: v for k, v in TINY_VAE.items() if k != key}, "here")
    wrong = [True, "2", None, {}]
    wrong += [] if key.endswith("_factor") else [0, -1, 2.5]
    wrong += [[], [4, 0], [4, True], 8] if key == "block_out_channels" else [[4]]
    for value in wrong:
        with pytest.raises(ValueError, match=f"here: {key} must be"):
            VAEConfig.from_dict({**TINY_VAE, key: value}, "here")


@pytest.mark.parametrize("wrong", [0, -1.5])
def test_a_scale_must_be_positive_a_shift_need_not(wrong):
    with pytest.raises(ValueError, match="scaling_factor must be a positive number"):
        VAEConfig.from_dict({**TINY_VAE, "scaling_factor": wrong})
    assert VAEConfig.from_dict({**TINY_VAE, "shift_factor": wrong}).shift_factor == wrong


# Loading

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_pretrained(tiny_base, tmp_path, dtype):
    stored = load_file(tiny_base / "vae" / WEIGHTS_NAME)
    vae = AutoencoderKL.from_pretrained(tiny_base / "vae", dtype=dtype)
    assert not vae.training
    loaded = vae.state_dict()
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in stored.items())
    # A snapshot with the configuration alone, its weights elsewhere.
    (tmp_path / "config.json").write_text(json.dumps(TINY_VAE))
    elsewhere = AutoencoderKL.from_pretrained(tmp_path, tiny_base / "vae" / WEIGHTS_NAME, dtype)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), elsewhere.parameters()))


def test_weights_that_do_not_fit_are_refused(tiny_base, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_VAE))
    with pytest.raises(ValueError, match="no such file"):
        AutoencoderKL.from_pretrained(tmp_path)
    tensors = load_file(tiny_base / "vae" / WEIGHTS_NAME)
    tensors["quant_conv.weight"] = tensors.pop("decoder.conv_in.weight")
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError,
                       match="1 missing .decoder.conv_in.weight.*1 unexpected .quant_conv.weight"):
        AutoencoderKL.from_pretrained(tmp_path)
