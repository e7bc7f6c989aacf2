"""The denoising loop against one written by hand over diffusers' schedulers, with guidance."""

import pytest
import torch
from references import AS_OURS, BETAS, by_hand

from pixcell_min.base import load_pixcell_base
from pixcell_min.pipeline import denoise
from pixcell_min.schedulers import build_scheduler

# Of the largest value: ten float32 steps, rounded at other places. A random network is no denoiser:
# each step divides what it got wrong by √ᾱ, and latents reach hundreds.
LOOP = 3e-6


@pytest.mark.parametrize("name, eta", [
    ("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0), ("euler_ancestral", 0), ("dpmpp_2m", 0)])
@pytest.mark.parametrize("guidance_scale", [1.5, 4.0])
def test_same_latents_as_a_loop_over_diffusers(tiny_base, name, eta, guidance_scale):
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    condition = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2))
    generators = [torch.Generator().manual_seed(11) for _ in range(2)]
    sampler, network = build_scheduler(name, pipeline.schedule, eta=eta), pipeline.transformer
    ours = denoise(network, sampler, condition, generators[0],
                   num_inference_steps=10, guidance_scale=guidance_scale)
    kind, options = AS_OURS[name]
    reference = kind(**BETAS, **options)
    theirs = by_hand(network, reference, condition, generators[1], 10, guidance_scale, eta)
    assert (ours - theirs).abs().max() < LOOP * theirs.abs().max()
    # As many draws.
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
