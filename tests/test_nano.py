"""The embedded base: small enough, loaded by the released code, and doing what it is there for."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, SHARED
from pixcell_min import load_pixcell_base
from pixcell_min.data import fit_tile, image_to_tensor, read_tile, tensor_to_image
from pixcell_min.tools.audit import licences
from pixcell_min.tools.pretrain import dihedral, round_trip_psnr, stain_jitter
from pixcell_min.tools.synthetic import render_tile

NANO = ROOT / "weights" / "pixcell-nano"
UNSEEN = 10**9  # seeds from here on were not in its training


@pytest.fixture(scope="module")
def nano():
    return load_pixcell_base(NANO, "cpu", "no")


def test_it_has_the_layout_of_a_snapshot_and_at_most_40_mb():
    assert {path.name for path in NANO.iterdir()} == {"transformer", "vae", "scheduler", "uni",
                                                      "README.md"}
    assert sum(path.stat().st_size for path in NANO.rglob("*") if path.is_file()) <= 40e6
    config = json.loads((NANO / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "PixCellTransformer2DModel" and config["sample_size"] == 32


def test_the_vae_rebuilds_tiles_it_has_not_seen(nano):
    # Measured 33 dB; the 16 principal components of 8×8 patches, which are linear, give 30.
    assert round_trip_psnr(nano.vae, [render_tile(UNSEEN + i, "NORM") for i in range(3)]) > 30


@pytest.mark.skipif(not (SHARED / "data" / "target_nct").is_dir(), reason="no ../shared")
def test_the_vae_rebuilds_real_tiles(nano):
    tiles = sorted((SHARED / "data" / "target_nct").rglob("*.*"))
    images = [fit_tile(read_tile(tile), 256, "resize") for tile in tiles[::4]]
    assert round_trip_psnr(nano.vae, images) >= 30


def test_latents_have_about_unit_variance(nano):
    with torch.no_grad():
        pixels = torch.stack([image_to_tensor(render_tile(UNSEEN + i)) for i in range(9)])
        latents, logvar = nano.vae.encode(pixels)
    assert logvar.max() - logvar.min() < 1e-5  # the posterior's width is a constant
    assert 0.6 < latents.std() < 1.6 and latents.mean().abs() < 0.3


def test_a_turned_and_restained_tile_is_nearest_to_its_original(nano):
    generator = torch.Generator().manual_seed(0)
    tiles = [render_tile(UNSEEN + 200 + i) for i in range(24)]
    pixels = torch.stack([(image_to_tensor(tile) + 1) / 2 for tile in tiles])
    views = dihedral(stain_jitter(pixels, generator), 5)
    with torch.no_grad():
        first, second = (F.normalize(nano.encoder(images)[:, 0], dim=1)
                         for images in (tiles, [tensor_to_image(2 * view - 1) for view in views]))
    nearest = (second @ first.T).argmax(1)
    assert (nearest == torch.arange(24)).float().mean() > 0.9  # by chance 0.04


def test_the_denoiser_uses_its_condition(nano):
    # With its own tile's embedding it predicts noise better than with another tissue's or none.
    kinds = ("LYM", "ADI", "MUS", "TUM")
    tiles = [render_tile(UNSEEN + 50 + i, kind) for i, kind in enumerate(kinds)]
    with torch.no_grad():
        x0 = nano.vae.encode(torch.stack([image_to_tensor(tile) for tile in tiles]))[0]
        own = nano.encoder(tiles)
        t = torch.full((len(tiles),), 700)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        noisy = nano.schedule.add_noise(x0, noise, t)
        null = nano.transformer.uncond_embedding.expand_as(own)
        loss = {name: (nano.transformer(noisy, t, tokens)[:, :16] - noise).square().mean().item()
                for name, tokens in (("own", own), ("other", own.roll(1, 0)), ("null", null))}
    assert loss["own"] < loss["null"] < 1 and loss["own"] < loss["other"]


def test_a_sample_is_a_coloured_tile_of_tissue(nano):
    images = nano(nano.encoder([render_tile(UNSEEN + 7, "LYM"), render_tile(UNSEEN + 7, "ADI")]),
                  num_inference_steps=8, scheduler="dpmpp_2m", seed=[0, 0]).images
    lymph, fat = (np.asarray(image, float) for image in images)
    assert lymph.shape == (256, 256, 3) and lymph.std() > 10
    assert fat.mean() > lymph.mean() + 20  # fat is pale, lymphocytes are dark


def test_each_part_says_its_licence():
    stated = {its["of"]: its["licence"] for its in licences(NANO, {"vae": 1, "encoder": 1})}
    assert stated.keys() == {"code", "base", "VAE", "encoder"}
    assert [stated[of] for of in ("base", "VAE", "encoder")] == ["mit"] * 3
