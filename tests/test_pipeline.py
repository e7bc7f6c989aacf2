"""From embedding to image: the user's snippet, seeds, guidance, samplers, LoRA, refusals."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT, write_base
from PIL import Image

from pixcell_min.adapter import EmbeddingAdapter, save_adapter
from pixcell_min.base import NANO, load_encoder, load_pixcell_base, load_vae
from pixcell_min.data import image_to_tensor
from pixcell_min.lora import (disable_lora, inject_lora, lora_disabled, lora_layers, lora_parameters,
                              save_lora)
from pixcell_min.pipeline import GUIDANCE_SCALE, PixCellPipeline, denoise
from pixcell_min.precision import autocast
from pixcell_min.schedulers import DDPM, SCHEDULER_NAMES, NoiseSchedule, build_scheduler

ROUNDING = 1e-5  # float32, values of order 10: one product and two sums
FUSED = 1e-4  # (W + s·B·A)·x rounds once, W·x + s·B·(A·x) thrice; over ten steps


def close(result, expected, bound=ROUNDING):
    torch.testing.assert_close(result, expected, atol=bound, rtol=0)


def loaded(folder, mixed_precision="no"):
    return load_pixcell_base(folder, "cpu", mixed_precision)


@pytest.fixture
def pipeline(tiny_base):
    return loaded(tiny_base)


def embeddings(count=1, tokens=1):
    return torch.randn(count, tokens, 16, generator=torch.Generator().manual_seed(5))


def latents_of(pipeline, scheduler="ddim", seed=0, condition=None, **options):
    if isinstance(scheduler, str):
        scheduler = build_scheduler(scheduler, pipeline.schedule)
    condition = embeddings() if condition is None else condition
    return denoise(pipeline.transformer, scheduler, condition, torch.Generator().manual_seed(seed),
                   **{"num_inference_steps": 6, **options})


def trained_lora(base, path, base_hash=None, rank=2, std=0.3):
    """A LoRA file whose update is not zero."""
    pipeline = loaded(base)
    torch.manual_seed(3)
    inject_lora(pipeline.transformer, rank, 2 * rank, exclude=pipeline.transformer.inert_layers())
    for parameter in lora_parameters(pipeline.transformer):
        torch.nn.init.normal_(parameter, std=std)
    save_lora(pipeline.transformer, path, {"base_hash": base_hash or pipeline.base_hash})
    return path


@pytest.fixture(scope="module")
def lora_file(tiny_base, tmp_path_factory):
    return trained_lora(tiny_base, tmp_path_factory.mktemp("lora") / "lora_weights.safetensors")


# The user's snippet

SNIPPET = """
from pixcell_min import load_pixcell_base, load_adapter, uni2h_encoder
pipeline = load_pixcell_base()
pipeline.load_lora_weights("path/to/lora_weights.safetensors")
adapter = load_adapter("path/to/adapter.pth")
embedding = adapter(uni2h_encoder(input_image))
image = pipeline(embedding, num_inference_steps=50).images[0]
"""


def test_the_users_snippet_runs_as_it_stands(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "path" / "to").mkdir(parents=True)
    trained_lora(tiny_base, tmp_path / "path" / "to" / "lora_weights.safetensors")
    save_adapter(EmbeddingAdapter(16), tmp_path / "path" / "to" / "adapter.pth")
    monkeypatch.setenv("PIXCELL_BASE", str(tiny_base))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    names = {"input_image": Image.fromarray(pixels)}
    exec(SNIPPET, names)
    assert isinstance(names["image"], Image.Image) and names["image"].size == (64, 64)
    assert names["image"].mode == "RGB" and np.asarray(names["image"]).std() > 0


# What an image depends on

@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
def test_the_same_seed_gives_the_same_bytes_whatever_else_is_drawn(pipeline, scheduler):
    three = embeddings(3)
    options = {"num_inference_steps": 3, "scheduler": scheduler}
    together = pipeline(three, seed=[7, 8, 9], **options).images
    counted = pipeline(three, seed=7, **options).images  # image i uses seed + i
    torch.manual_seed(1)  # the global generator takes no part
    alone = [pipeline(three[i:i + 1], seed=7 + i, **options).images[0] for i in range(3)]
    together, counted, alone = ([i.tobytes() for i in each] for each in (together, counted, alone))
    assert together == counted == alone
    seeds = pipeline(three[:1].expand(3, 1, 16), seed=7, **options).images
    assert len({image.tobytes() for image in seeds}) == 3


def test_the_image_depends_on_its_embedding(pipeline):
    first, second = pipeline(embeddings(2), num_inference_steps=4, seed=[0, 0]).images
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16)])
def test_one_embedding_in_any_form(pipeline, shape):
    expected = pipeline(embeddings(), num_inference_steps=2).images
    given = embeddings().reshape(shape)
    for form in (given, given.double(), given.numpy(), given.clone().requires_grad_()):
        images = pipeline(form, num_inference_steps=2).images
        assert len(images) == 1 and images[0].tobytes() == expected[0].tobytes()


def test_defaults_are_ddim_fifty_steps_and_the_released_guidance(pipeline):
    seen = []
    images = pipeline(embeddings(), progress=lambda steps: seen.append(len(steps)) or steps).images
    assert seen == [50] and GUIDANCE_SCALE == 1.5
    explicit = pipeline(embeddings(), 50, 1.5, "ddim", 0.0, 0).images[0]
    assert images[0].tobytes() == explicit.tobytes()


# Guidance

class Recorder(torch.nn.Module):
    """A network that notes what it is given, and answers the condition's mean in every place."""

    def __init__(self, network):
        super().__init__()
        self.config, self.calls = network.config, []
        self.scale_shift_table = network.scale_shift_table
        self.uncond_embedding = network.uncond_embedding

    def forward(self, latents, timesteps, encoder_hidden_states):
        self.calls.append((latents, timesteps, encoder_hidden_states))
        means = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        epsilon = means.expand(latents.shape)
        return torch.cat([epsilon, torch.full_like(epsilon, 0.25)], dim=1)


def test_guidance_moves_from_the_null_embedding_past_the_condition(pipeline):
    network, condition = Recorder(pipeline.transformer), torch.full((1, 1, 16), 2.0)
    given = []

    class Sampler(type(build_scheduler("ddim", pipeline.schedule))):
        def step(self, model_output, *rest):
            given.append(model_output)
            return super().step(model_output, *rest)

    denoise(network, Sampler(pipeline.schedule), condition, torch.Generator(),
            num_inference_steps=2, guidance_scale=3.0)
    null = network.uncond_embedding.mean()
    for latents, _, tokens in network.calls:
        assert torch.equal(latents[0], latents[1])
        assert torch.equal(tokens, torch.stack([network.uncond_embedding, condition[0]]))
    for output in given:
        assert output.shape == (1, 32, 8, 8)
        expected = (null + 3.0 * (2.0 - null)).expand(1, 16, 8, 8)
        close(output[:, :16], expected)
        assert (output[:, 16:] == 0.25).all()  # a learned variance is not guided


def test_guidance_one_is_the_condition_alone(pipeline):
    network = Recorder(pipeline.transformer)
    denoise(network, build_scheduler("ddim", pipeline.schedule), embeddings(), torch.Generator(),
            num_inference_steps=3, guidance_scale=1)
    assert len(network.calls) == 3
    assert all(torch.equal(tokens, embeddings()) for _, _, tokens in network.calls)
    # The limit of the general formula, and guidance 0 the null embedding's.
    near = latents_of(pipeline, guidance_scale=1 + 1e-6)
    close(latents_of(pipeline, guidance_scale=1), near, FUSED)
    null = latents_of(pipeline, condition=pipeline.transformer.uncond_embedding[None],
                      guidance_scale=1)
    close(latents_of(pipeline, guidance_scale=0), null, FUSED)
    assert not torch.equal(latents_of(pipeline, guidance_scale=2.0),
                           latents_of(pipeline, guidance_scale=1))


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
def test_guidance_acts_within_its_interval_of_noise_levels_alone(pipeline, scheduler):
    sampler = build_scheduler(scheduler, pipeline.schedule)
    # Noise per signal, whatever the coordinates: of the whole timesteps, √((1−ᾱ)/ᾱ) itself.
    levels = [step.sigma / step.alpha for step in sampler.steps(6)]
    for level, step in zip(levels, sampler.steps(6)):
        if step.timestep == int(step.timestep):
            assert level == pytest.approx(pipeline.schedule.sigmas[int(step.timestep)].item(), rel=1e-4)
    network = Recorder(pipeline.transformer)
    denoise(network, sampler, embeddings(), torch.Generator(), num_inference_steps=6,
            guidance_scale=3.0, guidance_interval=(levels[3], levels[1]))  # its ends are in it
    assert [len(tokens) for _, _, tokens in network.calls] == [1, 2, 2, 2, 1, 1]
    assert torch.equal(network.calls[0][2], embeddings())
    wide = latents_of(pipeline, sampler, guidance_scale=3.0, guidance_interval=(0, 1e9))
    assert torch.equal(wide, latents_of(pipeline, sampler, guidance_scale=3.0))
    narrow = latents_of(pipeline, sampler, guidance_scale=3.0, guidance_interval=(1e8, 1e9))
    assert torch.equal(narrow, latents_of(pipeline, sampler, guidance_scale=1))
    some = latents_of(pipeline, sampler, guidance_scale=3.0, guidance_interval=(levels[3], levels[1]))
    assert not torch.equal(some, wide) and not torch.equal(some, narrow)


def test_the_pipeline_passes_the_interval_on(pipeline):
    plain = pipeline(embeddings(), 4, 1.0).images[0].tobytes()
    assert pipeline(embeddings(), 4, 3.0).images[0].tobytes() != plain
    assert pipeline(embeddings(), 4, 3.0, guidance_interval=(1e8, 1e9)).images[0].tobytes() == plain


# Samplers, sizes, precision

@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
@pytest.mark.parametrize("size", [None, (4, 10)])
def test_each_sampler_runs_at_any_size(pipeline, scheduler, size):
    latents = latents_of(pipeline, scheduler, size=size)
    assert latents.shape == (1, 16, *(size or (8, 8))) and latents.dtype == torch.float32
    assert latents.isfinite().all() and not latents.requires_grad
    image = pipeline.decode(latents)
    assert image.size == (8 * latents.shape[3], 8 * latents.shape[2])
    assert torch.equal(latents_of(pipeline, scheduler, size=size), latents)


def test_the_network_is_given_the_samplers_timesteps(pipeline):
    for name in SCHEDULER_NAMES:
        network, sampler = Recorder(pipeline.transformer), build_scheduler(name, pipeline.schedule)
        denoise(network, sampler, embeddings(), torch.Generator(), num_inference_steps=7)
        assert [t for _, t, _ in network.calls] == [step.timestep for step in sampler.steps(7)]


def test_learned_variance_steers_ddpm(pipeline):
    noise = NoiseSchedule.linear()
    learned = latents_of(pipeline, DDPM(noise, variance_type="learned_range"))
    with torch.no_grad():  # of each patch cell's 32 columns the last 16 are the variance
        kept = pipeline.transformer.proj_out.bias.clone()
        pipeline.transformer.proj_out.bias.view(4, 32)[:, 16:] += 3.0
    assert not torch.equal(latents_of(pipeline, DDPM(noise, variance_type="learned_range")),
                           learned)
    fixed = latents_of(pipeline, DDPM(noise))
    pipeline.transformer.proj_out.bias.data = kept
    assert torch.equal(latents_of(pipeline, DDPM(noise)), fixed)  # which the others do not look at
    assert learned.isfinite().all() and not torch.equal(learned, fixed)


def test_eta_belongs_to_ddim(pipeline):
    plain, noisy = (pipeline(embeddings(), 4, eta=eta).images[0] for eta in (0.0, 1.0))
    assert plain.tobytes() != noisy.tobytes()
    with pytest.raises(ValueError, match="eta is 1.0 with ddpm"):
        pipeline(embeddings(), 4, scheduler="ddpm", eta=1.0)


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_autocast_wraps_the_network_and_in_bfloat16_the_decoder(tiny_base, mixed_precision):
    exact, cast = loaded(tiny_base), loaded(tiny_base, mixed_precision)
    inside, linear = [], cast.transformer.transformer_blocks[0].ff.net[2]
    linear.register_forward_hook(lambda layer, given, out: inside.append(out.dtype))
    decoder = cast.vae.decoder.conv_in
    decoder.register_forward_hook(lambda layer, given, out: inside.append(out.dtype))
    image = cast(embeddings(), num_inference_steps=2).images[0]
    decoded_in = {"fp16": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    assert inside == [cast.dtype, cast.dtype, decoded_in]
    expected = exact(embeddings(), num_inference_steps=2).images[0]
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 4  # of 255


def test_sixteen_tokens(tmp_path, monkeypatch):
    changes = {"caption_num_tokens": 16}
    import conftest
    monkeypatch.setattr(conftest, "TINY_TRANSFORMER", {**conftest.TINY_TRANSFORMER, **changes})
    pipeline = loaded(write_base(tmp_path / "base"))
    images = pipeline(embeddings(2, 16), num_inference_steps=2).images
    assert len(images) == 2
    alone = pipeline(embeddings(2, 16)[0], num_inference_steps=2).images
    assert len(alone) == 1 and alone[0].tobytes() == images[0].tobytes()
    with pytest.raises(ValueError, match=r"must be \(B, 16, 16\), got \(2, 1, 16\)"):
        pipeline(embeddings(2))


def test_decoding_in_bfloat16_moves_pixels_by_two_levels_at_most():
    """The embedded base's decoder, which is trained, on the latents of the README's tile."""
    exact, cast = (load_pixcell_base(NANO, "cpu", precision) for precision in ("no", "bf16"))
    tile = image_to_tensor(Image.open(ROOT / "docs" / "tile.png").convert("RGB"))
    with torch.no_grad():
        latents = exact.vae.encode(tile[None])[0]
    expected, pixels = (np.asarray(p.decode(latents), int) for p in (exact, cast))
    distance = np.abs(pixels - expected)
    assert 0 < distance.mean() < 0.5 and distance.max() <= 2


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_the_decoder_is_held_in_the_dtype_it_computes_in(mixed_precision):
    """With the bits that autocast gives to float32 weights; the encoder stays float32."""
    cast, plain = load_pixcell_base(NANO, "cpu", mixed_precision).vae, load_vae(NANO, "cpu")
    held = {"fp16": torch.float32, "bf16": torch.bfloat16}[mixed_precision]
    assert cast.decoder.conv_in.weight.dtype == held
    assert cast.decoder.mid_block.attentions[0].to_q.weight.dtype == held
    assert cast.decoder.conv_norm_out.weight.dtype == torch.float32
    assert {p.dtype for p in cast.encoder.parameters()} == {torch.float32}
    for vae in (cast, plain):
        assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    elsewhere = load_vae(NANO, "meta").decoder.conv_in.weight  # as on a GPU
    assert elsewhere.is_contiguous()
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), autocast(torch.device("cpu"), held if held != torch.float32 else None):
        inside = cast.decode(latents)
        assert torch.equal(inside, plain.decode(latents))
    with torch.no_grad():  # whoever decodes without the pipeline need not know
        assert torch.equal(cast.decode(latents), inside)


def test_large_latents_are_decoded_in_tiles(pipeline, monkeypatch):
    calls = []
    black = torch.full((1, 3, 8, 8), -1.0)
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: calls.append("decode") or black)
    monkeypatch.setattr(pipeline.vae, "decode_tiled", lambda z: calls.append("tiled") or black)
    for side in (64, 66):
        pipeline.decode(torch.zeros(1, 16, 8, side))
    assert calls == ["decode", "tiled"]


# LoRA

def test_lora_scale_zero_and_disabled_are_the_base(pipeline, lora_file):
    base = latents_of(pipeline)
    assert not pipeline.has_lora
    header = pipeline.load_lora_weights(lora_file)
    assert pipeline.has_lora and header["base_hash"] == pipeline.base_hash
    adapted = latents_of(pipeline)
    assert (adapted - base).abs().max() > 0.01
    with lora_disabled(pipeline.transformer):
        assert torch.equal(latents_of(pipeline), base)
    pipeline.set_lora_scale(0.0)
    assert torch.equal(latents_of(pipeline), base)
    pipeline.set_lora_scale(1.0)
    assert torch.equal(latents_of(pipeline), adapted)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_fused_lora_equals_active_lora_and_comes_out_bit_for_bit(tiny_base, lora_file, scale):
    active, fused = loaded(tiny_base), loaded(tiny_base)
    before = {name: tensor.clone() for name, tensor in fused.transformer.state_dict().items()}
    active.load_lora_weights(lora_file, scale)
    fused.load_lora_weights(lora_file, scale, fuse=True)
    assert all(layer.merged for layer in lora_layers(fused.transformer).values())
    close(*(latents_of(each, num_inference_steps=10) for each in (fused, active)), FUSED)
    with pytest.raises(ValueError, match="LoRA is merged"):
        fused.set_lora_scale(0.5)
    fused.unfuse_lora()
    after = fused.transformer.state_dict()
    after = {name.replace(".base.", "."): tensor for name, tensor in after.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(latents_of(fused), latents_of(active))


# Grey levels, the largest and the mean. Measured over ten steps: tiny base 0 and 0 in float32, 1 and
# 0.05 in bf16, whose weights are rounded after merging; pixcell-nano 1 and 4e-5, 3 and 0.28, where
# the LoRA moves pixels by 4.5 levels on average. It grows with the LoRA: one ten times as large, 17.
FUSED_IMAGE = {"no": (1, 0.01), "bf16": (4, 0.5)}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("folder, width, size", [
    (None, 16, {}),
    pytest.param("weights/pixcell-nano", 288, {"rank": 8, "std": 0.05}, marks=pytest.mark.slow)])
def test_image_of_fused_and_active_lora_and_switching_without_reloading(
        folder, width, size, precision, tiny_base, tmp_path):
    folder = folder or tiny_base
    condition = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(5))

    def image(pipeline):
        return pipeline(condition, num_inference_steps=10, seed=1).images[0]

    pipeline = loaded(folder, precision)
    base = image(pipeline).tobytes()  # a base that never held LoRA
    pipeline.load_lora_weights(trained_lora(folder, tmp_path / "a.safetensors", **size))
    active = image(pipeline)
    with lora_disabled(pipeline.transformer):
        assert image(pipeline).tobytes() == base
    pipeline.set_lora_scale(0.0)
    assert image(pipeline).tobytes() == base
    pipeline.set_lora_scale(1.0)
    assert image(pipeline).tobytes() == active.tobytes() != base
    pipeline.fuse_lora()
    difference = abs(np.asarray(image(pipeline), int) - np.asarray(active, int))
    assert difference.max() <= FUSED_IMAGE[precision][0]
    assert difference.mean() <= FUSED_IMAGE[precision][1]
    pipeline.unfuse_lora()
    assert image(pipeline).tobytes() == active.tobytes()
    disable_lora(pipeline.transformer)
    assert image(pipeline).tobytes() == base


def test_lora_fused_for_good_is_the_fused_network_without_lora(pipeline, tiny_base, lora_file):
    kept = loaded(tiny_base)
    for each in (pipeline, kept):
        each.load_lora_weights(lora_file)
    kept.fuse_lora()
    weights = tiny_base / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    pipeline.fuse_lora(for_good=True)
    assert weights.read_bytes() == before  # though the weights that changed were mapped from it
    assert not pipeline.has_lora
    assert torch.equal(latents_of(pipeline), latents_of(kept))


def test_several_files_are_one_lora_in_the_pipeline(pipeline, tiny_base, lora_file):
    whole = loaded(tiny_base)
    whole.load_lora_weights(lora_file)
    headers = pipeline.combine_lora_weights([(lora_file, 0.5), (lora_file, 0.5)], fuse=True)
    assert [header["base_hash"] for header in headers] == [pipeline.base_hash] * 2
    assert all(layer.merged for layer in lora_layers(pipeline.transformer).values())
    close(latents_of(pipeline), latents_of(whole), FUSED)


def test_lora_of_another_base_is_refused(tmp_path, tiny_base, lora_file):
    other = loaded(write_base(tmp_path / "other", seed=1))
    before = latents_of(other)
    with pytest.raises(ValueError, match=f"LoRA of base .*the loaded base is {other.base_hash}"):
        other.load_lora_weights(lora_file)
    assert not other.has_lora and torch.equal(latents_of(other), before)


def test_a_second_lora_is_refused(pipeline, lora_file):
    pipeline.load_lora_weights(lora_file)
    with pytest.raises(ValueError, match="remove_lora"):
        pipeline.load_lora_weights(lora_file)
    assert pipeline.has_lora


def test_scale_and_fusing_need_a_lora(pipeline):
    for call in (pipeline.fuse_lora, pipeline.unfuse_lora, lambda: pipeline.set_lora_scale(1.0)):
        with pytest.raises(ValueError, match="no LoRA layer"):
            call()


# Refusals

@pytest.mark.parametrize("embedding, message", [
    (torch.zeros(1, 1, 15), r"must be \(B, 1, 16\), got \(1, 1, 15\)"),
    (torch.zeros(3, 16), r"got \(3, 16\)"),
    (torch.zeros(1, 2, 16), r"got \(1, 2, 16\)"),
    (torch.zeros(1, 1, 1, 16), r"got \(1, 1, 1, 16\)"),
    (torch.tensor(1.0), r"got \(\)"), (torch.zeros(0), r"got \(0,\)"), 
    (torch.full((1, 1, 16), float("nan")), "NaN or infinity"),
    (torch.full((1, 1, 16), float("inf")), "NaN or infinity"),
])
def test_wrong_embeddings_are_refused(pipeline, embedding, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(embedding)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
    ({"num_inference_steps": -1}, "is -1"),
    ({"num_inference_steps": 2.5}, "is 2.5"),
    ({"scheduler": "plms"}, "scheduler is 'plms', expected one of ddim"),
    ({"eta": 1.5}, "eta is 1.5"), ({"seed": [1, 2]}, "2 seeds for 1 embeddings"),
    ({"seed": []}, "0 seeds for 1"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ({"guidance_interval": (2.0, 1.0)}, r"guidance_interval is \(2.0, 1.0\), expected two"),
    ({"guidance_interval": (-1.0, 1.0)}, "guidance_interval is"),
    ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval is"),
])
def test_wrong_options_are_refused_before_any_work(pipeline, monkeypatch, options, message):
    for part in (pipeline.transformer, pipeline.vae):
        monkeypatch.setattr(part, "forward", None)
    for name in SCHEDULER_NAMES if "num_inference_steps" in options else ("ddim",):
        with pytest.raises(ValueError, match=message) as error:
            pipeline(embeddings(), **{"scheduler": name, **options})
        assert "\n" not in str(error.value)


def test_an_image_that_is_not_finite_is_refused(pipeline):
    with pytest.raises(ValueError, match="decoded image is not finite"):
        pipeline.decode(torch.full((1, 16, 2, 2), float("nan")))


def test_pixels_are_rounded_and_clamped(pipeline, monkeypatch):
    levels = torch.tensor([-3.0, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1, 3])
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: levels.expand(1, 3, 1, 6))
    pixels = np.asarray(pipeline.decode(torch.zeros(1, 16, 1, 1)))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 0, 255, 255]


def test_vae_and_encoder_are_loaded_once_and_late_and_let_go_of(tiny_base, pipeline):
    calls = []
    lazy = PixCellPipeline(
        pipeline.transformer, lambda: calls.append("vae") or load_vae(tiny_base, "cpu"),
        lambda: calls.append("encoder") or load_encoder(tiny_base, "cpu"), pipeline.schedule,
        base_hash="", device="cpu")
    lazy.release()
    assert not calls
    assert lazy.encoder is lazy.encoder and lazy.vae is lazy.vae and calls == ["encoder", "vae"]
    held = [weakref.ref(parameter) for part in (lazy.vae, lazy.encoder) for parameter in part.parameters()]
    lazy.release()
    gc.collect()
    assert held and not any(reference() is not None for reference in held)
    lazy.decode(torch.zeros(1, 16, 1, 1))
    assert calls == ["encoder", "vae", "vae"]
