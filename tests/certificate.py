"""The parity certificate: every component beside its reference, in one table.

    python -m pixcell_min.tools.parity            prints it
    python -m pixcell_min.tools.parity --write    writes tests/parity.md and tests/parity.json

It stands here, not in the package, because the references (diffusers, peft, accelerate) are
imported by tests and benchmarks alone. Networks are tiny and random; only the rows from embedding
to image use the embedded base, a trained denoiser. Errors vary in their last digits with machine
and threads; `facts` is what does not: test_certificate.py fails when it differs from the file.
"""

import json
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from diffusers import PixArtSigmaPipeline
from peft import LoraConfig, get_peft_model
from references import (
    AS_OURS, BETAS, LATENT_SCALE, LATENT_SHIFT, adapter_by_hand, by_hand, call, copy_lora,
    diffusers_vae_of, gradient_error, lora_twins, pixart, pixart_of, randn, transformer_twins,
    vae_twins,
)
from safetensors.torch import load_file
from test_uni import TIMM_ARGS
from torchvision import transforms
from training_parity import STEPS, both

from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.base import NANO, REPOSITORY, load_pixcell_base
from pixcell_min.checkpoint import write_text
from pixcell_min.checks import OneLineParser
from pixcell_min.data import read_tile
from pixcell_min.lora import inject_lora, lora_layers, merge_lora
from pixcell_min.pipeline import denoise
from pixcell_min.schedulers import NoiseSchedule, build_scheduler
from pixcell_min.transformer import PixCellTransformer
from pixcell_min.uni import IMAGENET_MEAN, IMAGENET_STD, TileEncoder

HERE = Path(__file__).resolve().parent
MARKDOWN, JSON = HERE / "parity.md", HERE / "parity.json"
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "timm", "torchvision")
SAMPLERS = ("ddim", "euler_ancestral", "ddpm", "dpmpp_2m")
FLOAT32 = 1e-5  # values of order 1 through some layers, sums in another order
SAME_MATHS = 1e-6  # of the largest value: the same few float32 operations
LOOP = 3e-6  # of the largest value: ten steps of a random network, whose latents reach hundreds
HEADERS = ("component", "case", "reference", "max abs error", "max relative error", "tolerance",
           "verdict")


class Row(NamedTuple):
    """One comparison. relative: the largest error over the reference's largest value."""

    component: str
    case: str
    reference: str  # package version class, version as major.minor
    absolute: float
    relative: float
    tolerance: float
    kind: str  # of the tolerance: absolute or relative
    verdict: str  # passes or FAILS


def compare(component, case, reference, pairs, tolerance, kind) -> Row:
    """Row of [(ours, the reference's)]; tolerance 0 asks for equality."""
    pairs = [(ours.detach().double(), its.detach().double()) for ours, its in pairs]
    assert pairs and all(ours.shape == its.shape for ours, its in pairs), f"{component}: {case}"
    absolute = max((ours - its).abs().max().item() for ours, its in pairs)
    relative = max(((ours - its).abs().max() / its.abs().max()).item() for ours, its in pairs)
    return judge(component, case, reference, absolute, relative, tolerance, kind)


def judge(component, case, reference, absolute, relative, tolerance, kind) -> Row:
    """Row of errors already measured; one that is not a number fails."""
    verdict = "passes" if (absolute if kind == "absolute" else relative) <= tolerance else "FAILS"
    return Row(component, case, reference, absolute, relative, tolerance, kind, verdict)


def of(package, what) -> str:
    """"diffusers 0.42 PixArtTransformer2DModel": patch releases do not make the file stale."""
    return f"{package} {'.'.join(version(package).split('.')[:2])} {what}"


# --- networks


def transformer_rows():
    """Outputs for 1 and 16 tokens, square and not; gradients; the released class's, recorded."""
    reference = of("diffusers", "PixArtTransformer2DModel")
    for tokens in (1, 16):
        for size in ((8, 8), (4, 10)):
            ours, theirs = transformer_twins(tokens, 8, 0.5)
            latents, embeddings = randn(3, 16, *size), randn(3, tokens, 20, seed=1)
            timesteps = torch.tensor([0.0, 946.421, 17.5])
            given = with_positions(ours, embeddings)  # which PixArt lacks
            with torch.no_grad():
                pair = ours(latents, timesteps, embeddings), theirs(
                    latents, given, timestep=timesteps).sample
            yield compare("transformer", f"output, {plural(tokens, 'token')}, latents "
                          f"{size[0]}×{size[1]}", reference, [pair], FLOAT32, "absolute")
    ours(latents, timesteps, embeddings).square().sum().backward()
    theirs(latents, given, timestep=timesteps).sample.square().sum().backward()
    expected = dict(theirs.named_parameters())
    # Over the largest of all: a softmax does not feel its keys' bias, whose gradient is rounding.
    yield compare("transformer", "gradients of all parameters, 16 tokens", reference, [[
        torch.cat([p.grad.flatten() for p in parameters]) for parameters in zip(*(
            (p, expected[name]) for name, p in ours.named_parameters()))]], FLOAT32, "relative")
    for tokens in (1, 16):
        folder = HERE / "data" / "golden" / f"pixcell-tiny-{tokens}tok"
        case = load_file(folder / "io.safetensors")
        with torch.no_grad():
            output = PixCellTransformer.from_pretrained(folder / "transformer")(
                case["latents"], case["timesteps"], case["embeddings"])
        yield compare("transformer", f"output, {plural(tokens, 'token')}",
                      "recorded, the released PixCellTransformer2DModel",
                      [(output, case["output"])], 2 * FLOAT32, "absolute")


def plural(count, noun):
    return f"{count} {noun}{'s' * (count > 1)}"


def with_positions(ours, embeddings):
    """Embeddings (B, S, E) plus our token positions, where there are several tokens."""
    several = ours.config.caption_num_tokens > 1
    return embeddings + ours.y_pos_embed.y_pos_embed if several else embeddings


@torch.no_grad()
def vae_rows():
    """Mean and log variance of scaled latents, decoded pixels."""
    reference = of("diffusers", "AutoencoderKL")
    for size in ((32, 32), (16, 40)):
        ours, theirs = vae_twins(2)
        pixels, where = randn(2, 3, *size).clamp(-1, 1), f"pixels {size[0]}×{size[1]}"
        mean, logvar = ours.encode(pixels)
        posterior = theirs.encode(pixels).latent_dist
        pairs = [(mean, (posterior.mean - LATENT_SHIFT) * LATENT_SCALE),
                 (logvar, posterior.logvar + 2 * np.log(LATENT_SCALE))]
        yield compare("VAE", f"encode, {where}", reference, pairs, FLOAT32, "absolute")
        latents = randn(*mean.shape, seed=1)
        yield compare("VAE", f"decode, {where}", reference, [(
            ours.decode(latents), theirs.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample)],
            FLOAT32, "absolute")


@torch.no_grad()
def encoder_rows():
    """Tile → embedding: arguments and preprocessing; timm's network on both sides."""
    torch.manual_seed(0)
    reference = timm.create_model("vit_giant_patch14_224", pretrained=False, **TIMM_ARGS).eval()
    own = {key: value for key, value in TIMM_ARGS.items()
           if key not in ("num_classes", "no_embed_class", "mlp_layer", "act_layer",
                          "dynamic_img_size")}
    encoder = TileEncoder(own).eval()  # it adds UNI2-h's fixed arguments itself
    reference.load_state_dict(encoder.vit.state_dict(), strict=True)
    tile = read_tile(REPOSITORY / "docs" / "tile.png")
    prepare = transforms.Compose([transforms.Resize(28), transforms.ToTensor(),
                                  transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    yield compare("UNI2-h", "embedding of a tile, tiny size", of("timm", "vit_giant_patch14_224"),
                  [(encoder(tile)[:, 0], reference(prepare(tile)[None]))], SAME_MATHS, "absolute")


def lora_rows():
    """Output, gradients, merge, on all attention of a PixArt."""
    reference = of("peft", "LoRA")
    # At a scale that is no power of two s·(A·x) and s·(B·(A·x)) round apart, in layer after layer.
    for options, what, tolerance in (
            ({"alpha": 8.0}, "r 4, alpha 8", SAME_MATHS), ({"alpha": 6.0}, "r 4, alpha 6", FLOAT32),
            ({"alpha": 8.0, "use_rslora": True, "rank": 4}, "r 4, alpha 8, rsLoRA", SAME_MATHS)):
        ours, theirs = lora_twins(pixart, **options)
        mine, peer = call(ours), call(theirs)
        yield compare("LoRA", f"output, {what}", reference, [(mine, peer)], SAME_MATHS, "relative")
        mine.square().mean().backward()
        peer.square().mean().backward()
        parameters = dict(theirs.named_parameters())
        absolute = max((getattr(layer, part).grad - parameters[
            f"base_model.model.{name}.{part}.default.weight"].grad).abs().max().item()
            for name, layer in lora_layers(ours).items() for part in ("lora_A", "lora_B"))
        yield judge("LoRA", f"gradients of A and B, {what}", reference, absolute,
                    gradient_error(ours, theirs), tolerance, "relative")
        merge_lora(ours)
        merged = theirs.merge_and_unload()
        yield compare("LoRA", f"merged weights, {what}", reference, [
            (layer.base.weight, merged.get_submodule(name).weight)
            for name, layer in lora_layers(ours).items()], SAME_MATHS, "relative")
        yield compare("LoRA", f"output after merging, {what}", reference,
                      [(call(ours), call(merged))], SAME_MATHS, "relative")


def random_adapter(width):
    """An adapter that is no longer the identity."""
    adapter = EmbeddingAdapter(width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for seed, parameter in enumerate(adapter.parameters(), 1):
            parameter.copy_(randn(*parameter.shape, seed=seed) / width**0.5)
    return adapter


def adapter_rows():
    """Output and gradients."""
    adapter, x = random_adapter(24), 5 * randn(6, 1, 24)
    weights = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    pair = adapter(x), adapter_by_hand(x, weights)
    reference = "its equation in plain torch"
    yield compare("adapter", "output", reference, [pair], SAME_MATHS, "relative")
    for output in pair:
        output.square().mean().backward()
    yield compare("adapter", "gradients", reference,
                  [(p.grad, weights[name].grad) for name, p in adapter.named_parameters()],
                  SAME_MATHS, "relative")


# --- sampling


def scheduler_rows():
    """Timesteps, and a loop of 20 steps with one fixed output a step; noise of training."""
    for name, eta in (*((name, 0.0) for name in SAMPLERS), ("ddim", 0.5)):
        kind, options = AS_OURS[name]
        theirs = kind(**BETAS, **options)
        ours = build_scheduler(name, NoiseSchedule.linear(), eta=eta)
        theirs.set_timesteps(20)
        what, reference = f"{name}{f', eta {eta}' if eta else ''}", of("diffusers", kind.__name__)
        rows, x0 = ours.steps(20), None
        yield compare("scheduler", f"{what}: timesteps of 20 steps", reference, [(
            torch.tensor([row.timestep for row in rows]), theirs.timesteps)], 0, "absolute")
        mine = peer = randn(1, 16, 8, 8) * ours.init_noise_sigma(20)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        extra = {"eta": eta} if name == "ddim" else {}
        for i, row in enumerate(rows):
            output = randn(1, 16, 8, 8, seed=10 + i)
            mine, x0 = ours.step(output, mine, row, generators[0], x0)
            theirs.scale_model_input(peer, theirs.timesteps[i])
            peer = theirs.step(output, theirs.timesteps[i], peer, generator=generators[1],
                               **extra).prev_sample
        yield compare("scheduler", f"{what}: latents after 20 steps", reference, [(mine, peer)],
                      SAME_MATHS, "relative")
    latents, noise, timesteps = randn(4, 16, 4, 4), randn(4, 16, 4, 4, seed=1), torch.tensor(
        [0, 1, 500, 999])
    kind, _ = AS_OURS["ddpm"]
    yield compare("scheduler", "noise added in training", of("diffusers", kind.__name__), [(
        NoiseSchedule.linear().add_noise(latents, noise, timesteps),
        kind(**BETAS).add_noise(latents, noise, timesteps))], 0, "absolute")


def guidance_rows():
    """Ten guided steps of a random network, guided by hand over a scheduler of diffusers."""
    ours, theirs = transformer_twins(1, 8, 0.5)
    network, (kind, options) = as_pixcell(theirs, ours.uncond_embedding), AS_OURS["ddim"]
    for scale in (1.5, 4.0):
        generators = [torch.Generator().manual_seed(11) for _ in range(2)]
        condition = randn(1, 1, 20, seed=2)
        mine = denoise(ours, build_scheduler("ddim", NoiseSchedule.linear()), condition,
                       generators[0], num_inference_steps=10, guidance_scale=scale)
        peer = by_hand(network, kind(**BETAS, **options), condition, generators[1], 10, scale, 0)
        yield compare("guidance", f"scale {scale}, ddim, latents after 10 steps",
                      of("diffusers", "PixArtTransformer2DModel, DDIMScheduler"), [(mine, peer)],
                      LOOP, "relative")


def as_pixcell(network, uncond_embedding):
    """PixArt called as our network is: (latents, timestep, tokens) → output."""
    def forward(latents, t, tokens):
        return network(latents, tokens, timestep=torch.as_tensor(t).expand(len(latents))).sample
    forward.uncond_embedding = uncond_embedding
    return forward


def diffusers_pipeline(transformer, pixart_with_lora, vae, name):
    """diffusers' own pipeline as a function: condition, steps, scale, seed → latents."""
    kind, options = AS_OURS[name]
    pipeline = PixArtSigmaPipeline(None, None, vae, pixart_with_lora, kind(**BETAS, **options))
    pipeline.set_progress_bar_config(disable=True)
    uncond = transformer.uncond_embedding[None]

    def draw(condition, steps, scale, seed):
        mask = torch.ones(condition.shape[:2])
        return pipeline(
            None, None, num_inference_steps=steps, guidance_scale=scale,
            generator=torch.Generator().manual_seed(seed), output_type="latent",
            prompt_embeds=with_positions(transformer, condition), prompt_attention_mask=mask,
            negative_prompt_embeds=with_positions(transformer, uncond),
            negative_prompt_attention_mask=mask, use_resolution_binning=False).images
    return draw


def pipeline_rows():
    """diffusers' own pipeline, ten guided steps of a random network; 1 and 16 tokens."""
    _, vae = vae_twins(1)
    for tokens in (1, 16):
        ours, theirs = transformer_twins(tokens, 8, 0.5)
        for name in SAMPLERS:
            condition = randn(1, tokens, 20, seed=2)
            mine = denoise(ours, build_scheduler(name, NoiseSchedule.linear()), condition,
                           torch.Generator().manual_seed(11), num_inference_steps=10)
            peer = diffusers_pipeline(ours, theirs, vae, name)(condition, 10, 1.5, 11)
            yield compare("pipeline", f"{name}, {plural(tokens, 'token')}, latents after 10 steps",
                          of("diffusers", "PixArtSigmaPipeline"), [(mine, peer)], LOOP, "relative")


# --- the whole


def training_rows():
    """50 optimizer steps of 4 × 2 samples, cosine rates from 6e-3 (LoRA) and 5e-4 (adapter)."""
    (losses, lora, adapter), (their_losses, their_lora, their_adapter) = both(6e-3, 5e-4)
    reference = f"{of('diffusers', '+')} {of('peft', '+')} {of('accelerate', '')}".strip()
    errors = (losses - their_losses).abs()
    yield judge("training", f"loss at each of {STEPS} steps, accumulation 4", reference,
                errors.max().item(), (errors / their_losses).max().item(), 1e-6, "relative")
    for what, mine, peer in (("LoRA", lora, their_lora), ("adapter", adapter, their_adapter)):
        assert mine.keys() == peer.keys()
        yield compare("training", f"{what} weights after {STEPS} steps", reference,
                      [(mine[name], peer[name]) for name in mine], 1e-5, "absolute")


@torch.no_grad()
def image_rows():
    """Embedding → adapter → LoRA'd denoiser → pixels of the embedded base; the same seeds."""
    pipeline = load_pixcell_base(REPOSITORY / NANO, "cpu", "no")
    ours, vae = pipeline.transformer, diffusers_vae_of(pipeline.vae)
    peer = pixart_of(ours)
    inject_lora(ours, 4, 4, exclude=ours.inert_layers(), generator=torch.Generator().manual_seed(1))
    for seed, layer in enumerate(lora_layers(ours).values()):
        layer.lora_B.copy_(0.02 * randn(*layer.lora_B.shape, seed=seed))
    model = get_peft_model(peer, LoraConfig(r=4, lora_alpha=4, target_modules=[*lora_layers(ours)]))
    copy_lora(ours, model.eval())
    embedding = pipeline.encoder(read_tile(REPOSITORY / "docs" / "tile.png"))
    adapter = EmbeddingAdapter(embedding.shape[-1])
    adapter.fc2.bias.copy_(0.3 * randn(*adapter.fc2.bias.shape))
    condition, theirs = adapter(embedding), adapter_by_hand(embedding, adapter.state_dict())
    for name in SAMPLERS:
        image = pipeline(condition, 10, scheduler=name, seed=5, progress=list).images[0]
        latents = diffusers_pipeline(ours, model.base_model.model, vae, name)(theirs, 10, 1.5, 5)
        sizes = pipeline.vae.config
        pixels = vae.decode(latents / sizes.scaling_factor + sizes.shift_factor).sample
        expected = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
        got = torch.from_numpy(np.array(image)).float()
        assert expected.std() > 10  # a picture, not a plain
        yield compare("embedding to image", f"{name}, 10 steps, adapter and LoRA, grey levels",
                      of("diffusers", "PixArtSigmaPipeline") + ", " + of("peft", "LoRA"),
                      [(got, expected)], 1, "absolute")


# --- the table


def certificate() -> dict:
    """{versions, rows}: every row, measured now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers hands tensors to numpy in the old way
        rows = [row for measure in (
            transformer_rows, vae_rows, encoder_rows, lora_rows, adapter_rows, scheduler_rows,
            guidance_rows, pipeline_rows, training_rows, image_rows) for row in measure()]
    return {"versions": {"python": platform.python_version(),
                         **{name: version(name) for name in PACKAGES}},
            "rows": [row._asdict() for row in rows]}


def facts(result) -> list[tuple]:
    """What must not change unseen: all of each row but its errors."""
    return [tuple(value for key, value in row.items() if key not in ("absolute", "relative"))
            for row in result["rows"]]


def markdown(result) -> str:
    """The table, for people."""
    versions = ", ".join(f"{name} {its}" for name, its in result["versions"].items())
    failed = sum(row["verdict"] == "FAILS" for row in result["rows"])
    lines = ["# Parity certificate", "",
             "Written by `python -m pixcell_min.tools.parity --write`; a test fails when it is "
             "stale.",
             f"float32 on a CPU, {versions}.", "",
             f"{len(result['rows'])} rows, {failed} of them fail. Relative: the largest error over "
             "the reference's largest value.", "",
             f"| {' | '.join(HEADERS)} |", "|" + "---|" * len(HEADERS)]
    for its in result["rows"]:
        bound = "equal" if its["tolerance"] == 0 else f"{its['tolerance']:g} {its['kind']}"
        lines.append("| {component} | {case} | {reference} | {absolute:.1e} | {relative:.1e} | "
                     "{bound} | {verdict} |".format(bound=bound, **its))
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 1 if a row fails."""
    parser = OneLineParser(prog="parity", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--write", action="store_true",
                        help=f"also write {MARKDOWN.name} and {JSON.name} beside the tests")
    options = parser.parse_args(argv)
    result = certificate()
    as_json = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    print(as_json if options.json else markdown(result), end="")
    if options.write:
        write_text(JSON, as_json)
        write_text(MARKDOWN, markdown(result))
    return int(any(row["verdict"] == "FAILS" for row in result["rows"]))
