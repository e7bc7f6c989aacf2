"""The VAE against diffusers' AutoencoderKL: random twins; the list of SD 3.5's tensors."""

import math
from pathlib import Path

import pytest
import torch
from references import LATENT_SCALE as SCALE
from references import LATENT_SHIFT as SHIFT
from references import vae_twins

from pixcell_min.vae import AutoencoderKL, VAEConfig

TWIN = 1e-5  # float32; values of order 1, the same kernels, latents shifted and scaled once more


def close(result, expected, bound=TWIN):
    torch.testing.assert_close(result, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
@torch.no_grad()
def test_same_moments_and_pixels_as_diffusers(layers, size):
    ours, theirs = vae_twins(layers)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    mean, logvar = ours.encode(pixels)
    posterior = theirs.encode(pixels).latent_dist
    close(mean, (posterior.mean - SHIFT) * SCALE)
    # Ours is the log variance of the scaled latents, diffusers' of the unscaled.
    close(logvar - 2 * math.log(SCALE), posterior.logvar)
    latents = torch.randn_like(mean)
    close(ours.decode(latents), theirs.decode(latents / SCALE + SHIFT).sample)
    assert mean.std() > 0.1 and ours.decode(latents).std() > 0.1


@torch.no_grad()
def test_same_maths_in_float64():
    ours, theirs = (vae.double() for vae in vae_twins(2))
    pixels, latents = torch.rand(1, 3, 16, 24).double() * 2 - 1, torch.randn(1, 16, 2, 3).double()
    mean = (theirs.encode(pixels).latent_dist.mean - SHIFT) * SCALE
    close(ours.encode(pixels)[0], mean, 1e-12)
    close(
        ours.decode(latents), theirs.decode(latents / SCALE + SHIFT).sample, 1e-12)


def test_names_and_shapes_are_those_of_stable_diffusion_3_5():
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    rows = [line.split("\t") for line in
            (Path(__file__).parent / "data" / "sd3-vae.tsv").read_text().splitlines()[1:]]
    expected = {key: tuple(int(n) for n in shape.split(",")) for key, shape in rows}
    assert {key: tuple(t.shape) for key, t in vae.state_dict().items()} == expected
    assert len(expected) == 244 and sum(p.numel() for p in vae.parameters()) == 83_819_683
