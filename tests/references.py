"""The other side of every comparison: diffusers and peft with our weights, and steps mended where
ours differ on purpose. Used by test_parity_*.py and by the certificate (certificate.py)."""

import logging

import torch
from diffusers import (
    AutoencoderKL as DiffusersVAE, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler, PixArtTransformer2DModel, UNet2DConditionModel,
)
from peft import LoraConfig, PeftModel, get_peft_model

from pixcell_min.lora import DEFAULT_TARGETS, inject_lora, lora_layers
from pixcell_min.schedulers import DDIM, DDPM, DPMSolverPP2M, EulerAncestral
from pixcell_min.transformer import PixCellTransformer, TransformerConfig
from pixcell_min.vae import AutoencoderKL, VAEConfig

logging.getLogger("diffusers").setLevel(logging.ERROR)  # it warns of every .to()
OUTSIDE_PIXART = {"caption_projection.uncond_embedding", "y_pos_embed.y_pos_embed"}
LATENT_SHIFT, LATENT_SCALE = 0.0609, 1.5305  # diffusers leaves them to the caller
REFERENCE = {
    DDPM: DDPMScheduler, DDIM: DDIMScheduler, EulerAncestral: EulerAncestralDiscreteScheduler,
    DPMSolverPP2M: DPMSolverMultistepScheduler,
}  # fmt: skip
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
         "beta_schedule": "linear"}
# diffusers' schedulers, set as ours are where nothing is chosen.
AS_OURS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "leading"}),
    "ddpm": (DDPMScheduler, {"clip_sample": False, "timestep_spacing": "leading"}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got, expected):
    """Largest difference over the largest value."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# --- networks


def transformer_twins(tokens, sample_size, interpolation_scale):
    """Our network and PixArt's with the same random weights."""
    torch.manual_seed(0)
    shared = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12,
              "caption_channels": 20, "sample_size": sample_size,
              "interpolation_scale": interpolation_scale}
    ours = PixCellTransformer(TransformerConfig(caption_num_tokens=tokens, **shared)).eval()
    return ours, pixart_of(ours)


def pixart_of(ours):
    """diffusers' PixArt with the sizes and weights of our network; it has no token positions."""
    config = ours.config
    theirs = PixArtTransformer2DModel(
        num_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim, caption_channels=config.caption_channels,
        sample_size=config.sample_size, interpolation_scale=config.interpolation_scale,
        cross_attention_dim=config.num_attention_heads * config.attention_head_dim,
        in_channels=config.in_channels, out_channels=config.out_channels,
        use_additional_conditions=False).eval()
    theirs.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if k not in OUTSIDE_PIXART}, strict=True)
    return theirs


def vae_twins(layers, widths=(8, 8, 16, 16), groups=4):
    """Our VAE and diffusers' with the same random weights."""
    torch.manual_seed(0)
    ours = AutoencoderKL(VAEConfig(
        block_out_channels=widths, layers_per_block=layers, norm_num_groups=groups)).eval()
    return ours, diffusers_vae_of(ours)


def diffusers_vae_of(ours):
    """diffusers' autoencoder with the sizes and weights of ours."""
    config = ours.config
    count = len(config.block_out_channels)
    theirs = DiffusersVAE(
        latent_channels=config.latent_channels, block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block, norm_num_groups=config.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * count, use_quant_conv=False,
        up_block_types=("UpDecoderBlock2D",) * count, use_post_quant_conv=False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


# --- LoRA


def pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, caption_channels=12, norm_type="ada_norm_single",
        use_additional_conditions=False).eval()


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def call(net, dtype=torch.float32):
    """A forward of either network with 3 condition tokens, so that every LoRA layer takes part."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randn(2, 3, 12, generator=generator)
    network = net.base_model.model if isinstance(net, PeftModel) else net
    extra = {} if isinstance(network, UNet2DConditionModel) else {
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return net(latents.to(dtype), encoder_hidden_states=tokens.to(dtype),
               timestep=torch.tensor([10, 700]), **extra).sample


def lora_twins(build, dtype=torch.float32, **options):
    """The same network with our LoRA and with peft's, equal weights, B not zero."""
    ours, base = build().to(dtype), build().to(dtype)
    defaults = {"rank": 4, "alpha": 6.0, "use_rslora": False, "rank_pattern": {},
                "alpha_pattern": {}, "dropout": 0.0}
    options = {**defaults, **options}
    inject_lora(ours, **options, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 4)
    config = LoraConfig(
        r=options["rank"], lora_alpha=options["alpha"], target_modules=list(DEFAULT_TARGETS),
        use_rslora=options["use_rslora"], rank_pattern=options["rank_pattern"],
        alpha_pattern=options["alpha_pattern"], lora_dropout=options["dropout"])
    theirs = get_peft_model(base, config).eval()
    copy_lora(ours, theirs)
    return ours, theirs


@torch.no_grad()
def copy_lora(ours, theirs) -> None:
    """Our A and B into peft's model, which must wrap the same layers."""
    parameters = dict(theirs.named_parameters())
    assert sum("lora" in name for name in parameters) == 2 * len(lora_layers(ours))
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            peft_parameter(parameters, name, part).copy_(getattr(layer, part))


def peft_parameter(parameters, name, part):
    """lora_A or lora_B of a layer, out of dict(peft_model.named_parameters())."""
    return parameters[f"base_model.model.{name}.{part}.default.weight"]


def gradient_error(ours, theirs):
    parameters = dict(theirs.named_parameters())
    pairs = [(getattr(layer, part).grad, peft_parameter(parameters, name, part).grad)
             for name, layer in lora_layers(ours).items() for part in ("lora_A", "lora_B")]
    largest = max(expected.abs().max() for _, expected in pairs)
    # Every layer is compared in earnest.
    assert all(expected.abs().max() > 1e-5 * largest for _, expected in pairs)
    return max(error(got, expected) for got, expected in pairs)


# --- adapter


def adapter_by_hand(x, weights):
    """The adapter's equation in plain torch; weights: its four tensors by name."""
    size = (x**2).mean(-1, keepdim=True) ** 0.5
    hidden = torch.nn.functional.gelu(x / size @ weights["fc1.weight"].T + weights["fc1.bias"])
    return x + size * (hidden @ weights["fc2.weight"].T + weights["fc2.bias"])


# --- schedulers


def reference(sampler, count, spacing="leading", **options):
    """diffusers' scheduler with traps 3 (a step at t = −1) and 6 (clipping by default) mended."""
    if sampler in (DDPM, DDIM):
        options = {"clip_sample": False} | options
    scheduler = REFERENCE[sampler](timestep_spacing=spacing, **options)
    scheduler.set_timesteps(count)
    scheduler.timesteps = scheduler.timesteps[:count]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:count], torch.zeros(1)])
    return scheduler


def reference_step(scheduler, i, output, x, generator=None, eta=0.0):
    """diffusers' step i, with trap 4 (DDIM's previous timestep) mended."""
    t, arguments = scheduler.timesteps[i], {"generator": generator}
    if isinstance(scheduler, DDIMScheduler):
        arguments["eta"] = eta
        after = scheduler.timesteps[i + 1] if i + 1 < len(scheduler.timesteps) else -1
        if scheduler.config.timestep_spacing != "leading":
            scheduler.register_to_config(num_train_timesteps=int(t - after))
            scheduler.num_inference_steps = 1  # previous timestep = t − (t − after) // 1
    return scheduler.step(output, t, x, **arguments).prev_sample


@torch.no_grad()
def by_hand(network, scheduler, condition, generator, steps, guidance_scale, eta):
    """Latents drawn with a scheduler of diffusers; float32."""
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 16, 8, 8, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator}
    if isinstance(scheduler, DDIMScheduler):
        options["eta"] = eta
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t)
        conditional = network(given, t, condition)[:, :16]
        unconditional = network(given, t, network.uncond_embedding[None])[:, :16]
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents, **options).prev_sample
    return latents
