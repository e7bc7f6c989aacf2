"""Make the embedded base `weights/pixcell-nano`: VAE, then tile encoder and transformer jointly.

    python -m pixcell_min.tools.pretrain --open-tiles ../shared/data/open --work runs/pretrain
    python -m pixcell_min.tools.pretrain --help

Trained on procedural tiles of the first laboratory and on openly licensed H&E images. The encoder
sees its tile under another stain and another flip than the transformer must draw: its embedding can
only speak of morphology, as UNI2-h's does, and the palette becomes the base's own. Running the same
command again continues from the last saved state. A state is refused under other settings that its
result depends on, but for its stage's numbers of steps, which may grow.
"""

import argparse
import json
import math
import multiprocessing
import operator
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from pixcell_min import checkpoint
from pixcell_min.checks import DEVICE, OneLineParser, nonnegative_int, one_line, positive_int
from pixcell_min.data import (find_tiles, fit_tile, image_to_tensor, read_tile,
                              tensor_to_image)
from pixcell_min.embeddings import PatchEmbed, sincos_grid
from pixcell_min.precision import choose_device, refusal
from pixcell_min.released import SCHEDULER
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.signals import StopSignals, Terminated, sigterm_interrupts
from pixcell_min.tools.metrics import RUIFROK
from pixcell_min.tools.synthetic import FIRST, render_tile
from pixcell_min.training import timestep_weights
from pixcell_min.transformer import PixCellTransformer, TransformerConfig
from pixcell_min.uni import IMAGENET_MEAN, IMAGENET_STD, TileEncoder
from pixcell_min.vae import AutoencoderKL, VAEConfig

TILE = 256  # px
MIN_CROP, MAX_CROP = 192, 512  # px of an open image
CROP_TRIES = 1000  # a crop with a tenth of tissue is kept once in six
BANK = "tiles.safetensors"  # in the work folder
# Crops give more steps for the time. But group norm and attention see a whole tile otherwise than a
# part (29.9 dB where the parts alone have 32.9), so that each stage ends on whole tiles.
CROP = 128  # px
VAE_BATCH_128, VAE_BATCH_256 = 4, 2
BASIS_TILES = 400
COMPONENT_WEIGHT = 1.0  # against absolute plus squared error per pixel value
POSTERIOR_LOGVAR = -7.0  # the posterior's standard deviation: 0.03 of the latents'
LOSS_WEIGHTING = "debiased"  # 300 more steps: cosine 0.185 to the condition, 0.153 with min_snr
ENCODER_WEIGHT, TEMPERATURE = 0.05, 0.1  # of each of the encoder's own two losses; of its cosines
EMA_DECAY, CONDITION_DROPOUT = 0.998, 0.1
MUON_FACTOR = 2.0  # its rate over AdamW's
WARMUP, DECAY_SHARE = 50, 0.3  # rate: linear rise in steps, constant, linear fall over the share
SAVE_SECONDS = 300
NANO_VAE = VAEConfig(block_out_channels=(32, 64, 128, 128), layers_per_block=1, norm_num_groups=8)
NANO_ENCODER = {"img_size": 112, "patch_size": 14, "depth": 5, "num_heads": 4, "embed_dim": 288,
                "init_values": 0.1, "mlp_ratio": 2.66667 * 2, "reg_tokens": 4}
NANO_TRANSFORMER = TransformerConfig(
    num_layers=8, num_attention_heads=4, attention_head_dim=64, caption_channels=288)


def generator_for(seed, step):
    """A generator from (seed, step) alone: a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def on_device(tensor, device):
    """A tensor drawn on the CPU, on `device`: CUDA goes on with its work meanwhile."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # only from there does a copy not wait
    return tensor.to(device, non_blocking=True)


def layout(device):
    """Memory format of a VAE's pixels: a CPU convolves faster in channels last."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def stain_jitter(images, generator):
    """Images (B, 3, H, W) in [0, 1] → the same tissue as other laboratories would have stained it.

    In optical density: each stain's amount × exp(N(0, 0.35)), each stain vector tilted by
    N(0, 0.12) per channel, a little flat density added; differentiability is not needed, not kept.
    """
    B, device = images.shape[0], images.device
    density = -torch.log(images.clamp(min=1 / 255))                          # (B, 3, H, W)
    stains = F.normalize(torch.tensor(RUIFROK, dtype=torch.float32), dim=1)
    unmix = on_device(torch.linalg.inv(stains), device)
    amounts = torch.einsum("bchw,cs->bshw", density, unmix)                  # (B, stains, H, W)
    gains = torch.exp(0.35 * torch.randn(B, 3, 1, 1, generator=generator))
    tilted = F.normalize(
        (stains + 0.12 * torch.randn(B, 3, 3, generator=generator)).clamp(min=0.01), dim=2)
    flat = 0.05 * torch.randn(B, 3, 1, 1, generator=generator)
    gains, tilted, flat = (on_device(drawn, device) for drawn in (gains, tilted, flat))
    jittered = torch.einsum("bshw,bsc->bchw", amounts * gains, tilted)
    return torch.exp(-(jittered + flat)).clamp(0, 1)


def dihedral(images, element):
    """One of the 8 symmetries of the square (element 0..7) applied to (..., H, W)."""
    images = torch.rot90(images, element % 4, dims=(-2, -1))
    return images.flip(-1) if element >= 4 else images


def dihedral_each(images, elements):
    """Row i of square images (B, C, H, H) under symmetry elements[i], without a loop over rows."""
    for part in (1, 2, 4):  # a quarter turn, a half turn, a flip: an element's bits, in this order
        chosen = (elements & part).bool()[:, None, None, None]
        images = torch.where(chosen, dihedral(images, part), images)
    return images


def random_crops(tiles, count, side, generator):
    """`count` crops (count, 3, side, side) of a list of (3, H, W) tiles, uint8, any symmetry."""
    crops = []
    for _ in range(count):
        tile = tiles[int(torch.randint(len(tiles), (), generator=generator))]
        top, left = (int(torch.randint(n - side + 1, (), generator=generator))
                     for n in tile.shape[1:])
        element = int(torch.randint(8, (), generator=generator))
        crops.append(dihedral(tile[:, top:top + side, left:left + side], element))
    return torch.stack(crops)


def to_uint8(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def procedural_tile(seed):
    """A tile of the first laboratory, (3, 256, 256) uint8, an array: it goes between processes."""
    return to_uint8(render_tile(seed, laboratory=FIRST)).numpy()


def open_paths(folder):
    """Image files below `folder`, sorted. Raises: ValueError if there is none."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in
             {".png", ".jpg", ".jpeg", ".tif", ".tiff"}]
    if not paths:
        raise ValueError(f"{folder}: no image to train on; expected .png, .jpg or .tif files")
    return paths


@lru_cache(maxsize=1)
def open_images(folder):
    """All images below `folder`, and how often each is drawn: by its side, as they sum to 1.

    Raises: ValueError naming an image that cannot be read or is too small for a crop.
    """
    paths = open_paths(folder)
    images = [read_tile(path) for path in paths]
    for path, image in zip(paths, images):
        if min(image.size) < MIN_CROP:
            raise ValueError(f"{path}: {image.width}×{image.height} px; a crop takes {MIN_CROP} px "
                             "or more of either side")
    sides = np.array([math.sqrt(image.width * image.height) for image in images])
    return images, sides / sides.sum()


def open_crop(folder, seed, index):
    """Random crop `index` from below `folder`: side 192 to 512 px resized to 256, some tissue.

    (3, 256, 256) uint8. It depends on its arguments alone, so not on which process draws it.
    Raises: ValueError if there seems to be no tissue at all.
    """
    images, shares = open_images(folder)
    rng = np.random.default_rng([seed, index])
    for _ in range(CROP_TRIES):
        image = images[rng.choice(len(images), p=shares)]
        side = int(np.exp(rng.uniform(np.log(MIN_CROP), np.log(min(MAX_CROP, *image.size)))))
        left, top = rng.integers(image.width - side + 1), rng.integers(image.height - side + 1)
        crop = image.resize((TILE, TILE), Image.Resampling.LANCZOS,
                            box=(left, top, left + side, top + side))
        tissue = (np.asarray(crop).min(axis=2) < 200).mean()
        if tissue > rng.uniform(0, 0.6):  # empty glass is easy: keep only some of it
            return dihedral(to_uint8(crop), int(rng.integers(8))).numpy()
    raise ValueError(f"{folder}: no tissue in {CROP_TRIES} tries at a crop; expected H&E images, "
                     "not empty glass")


def run_jobs(jobs, workers):
    """What the jobs return, in their order, (N, 3, 256, 256) uint8; made by `workers` processes."""
    bank = torch.empty(len(jobs), 3, TILE, TILE, dtype=torch.uint8)

    def fill(results):
        for i, tile in enumerate(tqdm(results, total=len(jobs), desc="tiles")):
            bank[i] = torch.from_numpy(tile)

    if workers == 1:
        fill(map(operator.call, jobs))
        return bank
    # Spawned: a fork would inherit locks of threads that it lacks. One thread each: no more cores.
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                                 torch.set_num_threads, (1,)) as pool:
            # A terminal's Ctrl-C goes to the workers, too: they are born deaf to it.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                results = pool.map(operator.call, jobs, chunksize=4)
            finally:
                signal.signal(signal.SIGINT, handler)
            fill(results)
    except BrokenProcessPool:
        raise ValueError("a process that makes tiles was ended, for want of memory perhaps; take "
                         "fewer --workers") from None
    return bank


def training_tiles(args, work):
    """The bank of training tiles, (N, 3, 256, 256) uint8, made once and kept in the work folder.

    Raises: ValueError if the folder holds a bank made with other settings or of other images, or if
    an image cannot be cropped.
    """
    path, crops = work / BANK, args.open_crops if args.open_tiles else 0
    # In the order in which crops draw from them: their place and names do not count.
    images = [checkpoint.file_hash(its) for its in open_paths(args.open_tiles)] if crops else []
    made_with = json.dumps({
        "seed": args.seed, "procedural": args.procedural, "open_crops": crops,
        "open_images": checkpoint.content_hash(images)[:16], "seeds": "one per tile"})
    if path.exists():
        tensors, header = checkpoint.read_tensors(path)
        if header.get("made_with") != made_with:
            raise ValueError(f"{path}: made with {header.get('made_with')}, asked for {made_with}; "
                             "give the same settings or another --work")
        return tensors["tiles"].to(args.device)
    jobs = [partial(procedural_tile, args.seed * 10_000_000 + i) for i in range(args.procedural)]
    if crops:
        open_images(args.open_tiles)  # refuses one that is of no use before the work begins
        jobs += [partial(open_crop, args.open_tiles, args.seed, i) for i in range(crops)]
    if args.workers > 1:
        open_images.cache_clear()  # each worker has its own
    tiles = run_jobs(jobs, args.workers)
    open_images.cache_clear()
    checkpoint.save_tensors(path, {"tiles": tiles}, {"made_with": made_with})
    return tiles.to(args.device)


def rate_factor(step, total):
    """Warm-up, plateau, linear fall to 0: the plateau lets a later run go on from a saved state."""
    return min(1.0, (step + 1) / WARMUP, max((total - step) / (DECAY_SHARE * total), 0.0))


def is_hidden_matrix(name, parameter):
    """Whether it maps features to features: no table, token, position, first or last layer."""
    special = ("table", "token", "pos_embed", "patch_embed", "conv_in", "conv_out", "proj_out",
               "uncond")
    return parameter.ndim >= 2 and not any(word in name for word in special)


def stage_settings(args, names, modules, frozen=()):
    """{name: value} that a stage's result depends on, but for numbers of steps, which may grow.

    names: the options that count in this stage; modules, frozen: the networks as --start-from gave
    them, trained and not.
    """
    if args.start_from and args.out.resolve() == args.start_from.resolve():
        modules = ()  # the run itself writes over them: the same command would find others
    start = [module.state_dict() for module in (*modules, *frozen)]
    return {**{name: getattr(args, name) for name in ("seed", "bf16", "bank", *names)},
            "start_from": checkpoint.content_hash(start)[:16] if args.start_from else None}


class Trainer:
    """Parameters, optimizers, exponential moving average and resumable step counter of a stage.

    settings: what a saved state must agree in. Raises: ValueError, by name, if it does not.
    """

    def __init__(self, modules, rate, path, settings):
        named = [(f"{name}.{key}", p) for name, m in modules.items()
                 for key, p in m.named_parameters()]
        self.matrices = [p for n, p in named if is_hidden_matrix(n, p)]
        chosen = {id(p) for p in self.matrices}
        others = [p for _, p in named if id(p) not in chosen]
        # Orthogonalised momentum (Jordan et al. 2024): after 120 VAE steps 23.2 dB against AdamW's
        # 19.3. It takes matrices alone, so a convolution goes in as a view of its weight,
        # out × (in·3·3), on the same memory.
        self.views = [torch.nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.matrices]
        self.optimizers = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
            torch.optim.Muon(self.views, lr=rate * MUON_FACTOR, weight_decay=0.01,
                             adjust_lr_fn="match_rms_adamw", ns_steps=3)]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        self.parameters, self.path, self.step, self.settings = dict(named), path, 0, settings
        self.ema = {name: p.detach().clone() for name, p in named}
        if path.exists():
            self.load()

    def load(self):
        """Put the saved state back. Raises: ValueError if it was begun with other settings."""
        state = checkpoint.load_object(self.path)
        if "settings" not in state:
            raise ValueError(f"{self.path}: saved by another version of this code; give another "
                             "--work")
        begun = state["settings"]
        if changed := [f"{name} was {begun.get(name)}, is {value}"
                       for name, value in self.settings.items() if begun.get(name) != value]:
            raise ValueError(f"{self.path}: cannot go on: {'; '.join(changed)}; give the same "
                             "settings or another --work")
        self.step = state["step"]
        with torch.no_grad():  # copied: the state is read to the CPU, wherever it was saved
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])
                self.ema[name].copy_(state["ema"][name])
        for optimizer, values in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        print(f"{self.path}: continuing at step {self.step}")

    def update(self, loss, total):
        """One optimizer step at clipped gradient; returns the gradient norm."""
        for p in self.parameters.values():
            p.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters.values() if p.grad is not None], 1.0)
        for p, view in zip(self.matrices, self.views):
            view.grad = None if p.grad is None else p.grad.reshape(view.shape)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(self.step, total)
            optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        names = list(self.ema)
        torch._foreach_lerp_([self.ema[n] for n in names],
                             [self.parameters[n].detach() for n in names], 1 - decay)
        return norm

    def save(self):
        checkpoint.save_object(self.path, {
            "step": self.step, "settings": self.settings, "ema": self.ema,
            "parameters": {n: p.detach() for n, p in self.parameters.items()},
            "optimizers": [o.state_dict() for o in self.optimizers]})

    def averaged(self, name):
        """The moving average of one module's parameters, names as in its state dict."""
        return {key.removeprefix(name + "."): value for key, value in self.ema.items()
                if key.startswith(name + ".")}


def check_finite(trainer, losses, stage):
    """Raises: ValueError if one of the losses, or a weight as it is now, is NaN or infinite.

    A gradient's NaN is in a weight after its step, for good, so that none need be asked for.
    """
    values = [*losses, *trainer.parameters.values()]
    if not torch.stack([value.detach().isfinite().all() for value in values]).all():
        raise ValueError(f"{stage}: a loss or weight is NaN or infinite by step {trainer.step}; "
                         "what was saved before is intact, but would go the same way: begin in "
                         "another --work with a lower --vae-learning-rate or --learning-rate")


def run_stage(trainer, total, loss_at, description, seed):
    """Steps until `total`: bar, log line every 50, saved state every few minutes and at the end.

    Raises: ValueError, with the earlier state intact, if a loss or weight is not finite;
    KeyboardInterrupt, after the step under way and with the state saved, at SIGINT or SIGTERM.
    """
    saved, smooth, recent = time.monotonic(), None, []
    with StopSignals() as stop, tqdm(
            total=total, initial=trainer.step, desc=description, mininterval=5) as bar:
        while trainer.step < total and not stop.received:
            loss = loss_at(generator_for(seed, trainer.step))
            trainer.update(loss, total)
            recent.append(loss.detach())
            bar.update()
            if trainer.step % 50 == 0:
                # Asked for at once: each question makes the CPU wait for a GPU.
                check_finite(trainer, recent, description)
                for value in torch.stack(recent).tolist():
                    smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
                recent.clear()
                bar.set_postfix(loss=f"{smooth:.4f}")
                with open(trainer.path.with_suffix(".jsonl"), "a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": trainer.step, "loss": smooth,
                                          "stage": description}) + "\n")
            if time.monotonic() - saved > SAVE_SECONDS:
                check_finite(trainer, recent, description)
                trainer.save()
                saved = time.monotonic()
        check_finite(trainer, recent, description)
        trainer.save()
    if stop.received:
        raise Terminated if stop.received == signal.SIGTERM else KeyboardInterrupt


def patch_basis(tiles, generator):
    """Principal components of 8×8-px patches: their mean (192,) and a matrix (192, C) to latents.

    A component of variance v is divided by v^¼: halfway to white, so that colour still leads and
    detail follows when a denoiser goes from noise to image. Overall the latents have variance 1.
    Computed on the CPU: elsewhere components might change their signs, and a resumed run its aim.
    """
    chosen = torch.randperm(len(tiles), generator=generator)[:BASIS_TILES]
    tiles = tiles[chosen.to(tiles.device)].cpu().float() / 255
    half = len(tiles) // 2
    patches = to_patches(torch.cat([tiles[:half], stain_jitter(tiles[half:], generator)]) * 2 - 1)
    patches = patches.reshape(-1, patches.shape[-1])
    variances, vectors = torch.linalg.eigh(torch.cov(patches.T))
    top = slice(-NANO_VAE.latent_channels, None)
    spread = variances[top].sqrt().mean().sqrt()
    return patches.mean(0), vectors[:, top] * variances[top] ** -0.25 / spread


def to_patches(pixels):
    """Pixels (B, 3, H, W) → (B, H/8, W/8, 192)."""
    return rearrange(pixels, "b c (h i) (w j) -> b h w (c i j)", i=8, j=8)


@torch.no_grad()
def initialise_vae(vae):
    """Variance kept, biases 0, residual branches silent: starts nearly linear."""
    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if hasattr(module, "conv2"):
            torch.nn.init.zeros_(module.conv2.weight)


def train_vae(args, work, tiles):
    """VAE stage: rebuild crops of any stain through latents held to the patches' components.

    Left to itself so small a VAE ends below its own linear bound (28.6 against about 31 dB after
    1,900 steps), and its latents are rough; held to the components it starts from the bound. The
    posterior's width is a constant.
    """
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        VAEConfig(**{**NANO_VAE.__dict__, "scaling_factor": 1.0, "shift_factor": 0.0}))
    initialise_vae(vae)
    if args.start_from:
        checkpoint.load_strict(vae, AutoencoderKL.from_pretrained(
            args.start_from / "vae").state_dict(), args.start_from)
    settings = stage_settings(args, ("vae_learning_rate",), [vae])
    vae.to(args.device)
    trainer = Trainer({"vae": vae}, args.vae_learning_rate, work / "vae.pt", settings)
    center, matrix = (part.to(args.device)
                      for part in patch_basis(tiles, generator_for(args.seed, 0)))

    def loss_at(generator):
        batch, side = ((VAE_BATCH_128, CROP) if trainer.step < args.vae_half_steps
                       else (VAE_BATCH_256, TILE))
        pixels, half = random_crops(tiles, batch, side, generator).float() / 255, batch // 2
        pixels = torch.cat([pixels[:half], stain_jitter(pixels[half:], generator)]) * 2 - 1
        components = rearrange((to_patches(pixels) - center) @ matrix, "b h w c -> b c h w")
        pixels = pixels.contiguous(memory_format=layout(args.device))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            mean = vae.encode(pixels)[0].float()
            noise = on_device(torch.randn(mean.shape, generator=generator), args.device)
            rebuilt = vae.decode(mean + math.exp(POSTERIOR_LOGVAR / 2) * noise).float()
        return (F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)
                + COMPONENT_WEIGHT * F.mse_loss(mean, components))

    run_stage(trainer, args.vae_half_steps + args.vae_steps, loss_at, "vae", args.seed)
    checkpoint.load_strict(vae, trainer.averaged("vae"), "moving average")
    vae.eval()
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.encoder.conv_out.weight[channels:] = 0.0
        vae.encoder.conv_out.bias[channels:] = POSTERIOR_LOGVAR
    latents = (to_patches(tiles[::40].float() / 127.5 - 1) - center) @ matrix
    config = {"scaling_factor": round(1 / latents.std().item(), 4),
              "shift_factor": round(latents.mean().item(), 4)}
    write_vae(args.out / "vae", vae, config)
    return AutoencoderKL.from_pretrained(args.out / "vae")


def latent_bank(args, work, tiles, vae):
    """Posterior means of all tiles, (N, 16, 32, 32) float16, made once for this VAE and bank."""
    vae.to(args.device)
    path = work / "latents.safetensors"
    args.vae = checkpoint.file_hash(args.out / "vae" / "diffusion_pytorch_model.safetensors")[:16]
    made_from = {"vae": args.vae, "tiles": args.bank, "bf16": str(args.bf16)}
    if path.exists():
        tensors, header = checkpoint.read_tensors(path)
        if header.items() >= made_from.items():
            return tensors["latents"].to(args.device)
    latents = []
    at_once = 8 if args.device.type == "cpu" else 64
    with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        for part in tqdm(tiles.split(at_once), desc="latents"):
            pixels = (part.float() / 127.5 - 1).contiguous(memory_format=layout(args.device))
            latents.append(vae.encode(pixels)[0].half().contiguous())
    latents = torch.cat(latents)
    checkpoint.save_tensors(path, {"latents": latents}, made_from)
    return latents


def initialise(transformer):
    """adaLN-Zero (Peebles & Xie 2023): silent blocks and output; Xavier matrices elsewhere."""
    for name, p in transformer.named_parameters():
        if p.ndim == 2 and "table" not in name:
            torch.nn.init.xavier_uniform_(p)
    for p in (transformer.proj_out.weight, transformer.proj_out.bias,
              transformer.adaln_single.linear.weight, transformer.adaln_single.linear.bias):
        torch.nn.init.zeros_(p)
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.scale_shift_table)
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)


class WindowPatchEmbed(PatchEmbed):
    """Patch embedding of a window of the full grid: tokens keep their positions in the whole tile.

    The released rule would stretch a small grid over the whole range, and what half tiles taught
    about neighbours would be wrong for whole ones.
    """

    origin = (0, 0)  # row and column of the window's first token

    def forward(self, latents):
        """latents (B, C, h, w) → (B, N, D); as PatchEmbed for a whole tile at origin (0, 0)."""
        patches, base = self.proj(latents), self.base_size
        code = sincos_grid(base, base, patches.shape[1], base, self.interpolation_scale, 0.0,
                           patches.device, torch.float32).view(base, base, -1)
        (top, left), (height, width) = self.origin, patches.shape[2:]
        part = code[top:top + height, left:left + width].flatten(0, 1)
        return rearrange(patches, "b d h w -> b (h w) d") + part


def latent_moments(latents):
    """Mean and standard deviation of each channel: (B, C, H, W) → (B, 2·C)."""
    return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], dim=1)


def contrastive_loss(first, second):
    """InfoNCE (van den Oord et al. 2018), both ways: row i of one view knows row i of the other."""
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / TEMPERATURE
    labels = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(cosines, labels) + F.cross_entropy(cosines.T, labels)) / 2


def draw_crops(tiles, latents, batch, side, generator):
    """`batch` tiles at one random window of `side` latent cells, half or all of a tile.

    → their latents (B, C, side, side), what the encoder is shown of them (B, 3, h, h) in [0, 1],
    and the window's (row, column) in patches.
    """
    rows = on_device(torch.randint(len(tiles), (batch,), generator=generator), tiles.device)
    top, left = (  # in latent cells
        2 * torch.randint(17 - side // 2, (2,), generator=generator)).tolist()
    x0 = latents[:, :, top:top + side, left:left + side][rows].float()
    pixels = [slice(8 * start, 8 * (start + side)) for start in (top, left)]
    seen = tiles[:, :, pixels[0], pixels[1]][rows].float() / 255
    seen = F.interpolate(seen, NANO_ENCODER["img_size"] * side // 32, mode="bilinear",
                         antialias=True)
    return x0, seen, (top // 2, left // 2)


def train_transformer(args, work, tiles, latents):
    """Joint stage: the encoder learns what the denoiser needs; half tiles (128 px), then whole."""
    device = args.device
    torch.manual_seed(args.seed)
    transformer, encoder = PixCellTransformer(NANO_TRANSFORMER), TileEncoder(NANO_ENCODER)
    initialise(transformer)
    if args.start_from:
        checkpoint.load_strict(transformer, PixCellTransformer.from_pretrained(
            args.start_from / "transformer").state_dict(), args.start_from)
        checkpoint.load_strict(encoder, TileEncoder.from_pretrained(
            args.start_from / "uni").state_dict(), args.start_from)
    modules = ([transformer], [encoder]) if args.freeze_encoder else ([transformer, encoder],)
    settings = stage_settings(
        args, ("vae", "learning_rate", "half_batch", "batch", "freeze_encoder"), *modules)
    transformer.to(device), encoder.to(device)
    window = WindowPatchEmbed(NANO_TRANSFORMER, transformer.proj_out.in_features)
    window.proj = transformer.pos_embed.proj
    transformer.pos_embed = window
    schedule, C = NoiseSchedule.linear(), NANO_TRANSFORMER.in_channels
    head = torch.nn.Linear(NANO_ENCODER["embed_dim"], 2 * C).to(device)  # for training alone
    trained = {"transformer": transformer}
    if not args.freeze_encoder:
        trained |= {"encoder": encoder, "head": head}
    trainer = Trainer(trained, args.learning_rate, work / "joint.pt", settings)
    moments = latent_moments(latents[::max(1, len(latents) // 1000)].float())
    center, spread = moments.mean(0), moments.std(0)
    mean, std = (torch.tensor(v, device=device)[:, None, None]
                 for v in (IMAGENET_MEAN, IMAGENET_STD))

    def view(crops, generator):
        """Crops as the encoder sees them: another stain, another symmetry each. → tokens (B, E)"""
        crops = stain_jitter(crops, generator)
        elements = torch.randint(8, (len(crops),), generator=generator)
        return encoder.vit((dihedral_each(crops, on_device(elements, device)) - mean) / std)

    def loss_at(generator):
        half = trainer.step < args.half_steps
        batch, side = (args.half_batch, 16) if half else (args.batch, 32)
        x0, seen, window.origin = draw_crops(tiles, latents, batch, side, generator)
        noise = on_device(torch.randn(x0.shape, generator=generator), device)
        # Stratified timesteps, one from each of `batch` ranges: batches differ less in difficulty.
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * 1000
             ).long().clamp(max=999)
        drop = torch.rand(batch, 1, 1, generator=generator) < CONDITION_DROPOUT
        weights, drop, t = (on_device(drawn, device) for drawn in (
            timestep_weights(schedule, t, LOSS_WEIGHTING), drop, t))
        noisy = schedule.add_noise(x0, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            with torch.set_grad_enabled(not args.freeze_encoder):
                first = view(seen, generator)
            tokens = torch.where(drop, transformer.uncond_embedding, first[:, None].float())
            predicted = transformer(noisy, t, tokens)[:, :C].float()
        loss = (weights * (predicted - noise).pow(2).mean(dim=(1, 2, 3))).mean()
        if args.freeze_encoder:
            return loss
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            second, guessed = view(seen, generator), head(first).float()
        # What the denoiser asks of one token comes through slowly: the encoder is also to tell a
        # tile from the others of the batch, and to know its latents' mean and spread.
        return (loss + ENCODER_WEIGHT * contrastive_loss(first.float(), second.float())
                + ENCODER_WEIGHT * F.mse_loss(guessed, (latent_moments(x0) - center) / spread))

    run_stage(trainer, args.half_steps + args.steps, loss_at, "joint", args.seed + 1)
    averaged = trainer.averaged("transformer")
    averaged["caption_projection.uncond_embedding"] = transformer.uncond_embedding
    write_transformer(args.out / "transformer", averaged)
    if not args.freeze_encoder:
        write_encoder(args.out / "uni", {k.removeprefix("vit."): v
                                         for k, v in trainer.averaged("encoder").items()})


def write_vae(folder, vae, factors):
    """Write `vae/`: float16 weights and a diffusers config with the latent factors."""
    config = {"_class_name": "AutoencoderKL", "act_fn": "silu",
              "down_block_types": ["DownEncoderBlock2D"] * 4,
              "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": TILE,
              "use_quant_conv": False, "use_post_quant_conv": False,
              "mid_block_add_attention": True, **NANO_VAE.__dict__, **factors}
    checkpoint.save_tensors(folder / "diffusion_pytorch_model.safetensors",
                            {k: v.half() for k, v in vae.state_dict().items()})
    checkpoint.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_transformer(folder, tensors):
    """Write `transformer/` in float16, and `scheduler/` beside it, in the released layout."""
    config = {"_class_name": "PixCellTransformer2DModel", "activation_fn": "gelu-approximate",
              "attention_bias": True, "attention_type": "default", "dropout": 0.0,
              "norm_elementwise_affine": False, "norm_type": "ada_norm_single",
              "use_additional_conditions": False, **NANO_TRANSFORMER.__dict__}
    checkpoint.save_tensors(folder / "diffusion_pytorch_model.safetensors",
                            {k: v.half() for k, v in tensors.items()})
    checkpoint.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    checkpoint.write_text(folder.parent / "scheduler" / "scheduler_config.json",
                          json.dumps(SCHEDULER, indent=2) + "\n")


def write_encoder(folder, tensors):
    """Write `uni/` in float16, its sizes as `model_args`."""
    size = NANO_ENCODER["img_size"]
    config = {"architecture": "vit_giant_patch14_224", "num_classes": 0,
              "num_features": NANO_ENCODER["embed_dim"], "model_args": NANO_ENCODER,
              "pretrained_cfg": {"input_size": [3, size, size], "mean": IMAGENET_MEAN,
                                 "std": IMAGENET_STD, "interpolation": "bilinear"}}
    checkpoint.save_tensors(folder / "model.safetensors", {k: v.half() for k, v in tensors.items()})
    checkpoint.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def round_trip_psnr(vae, images) -> float:
    """PSNR in dB of encode → decode, of the mean squared error of all images: RGB, sides 8·n px."""
    errors, device = [], next(vae.parameters()).device
    for image in images:
        with torch.no_grad():
            rebuilt = vae.decode(vae.encode(image_to_tensor(image)[None].to(device))[0])[0]
        difference = np.asarray(tensor_to_image(rebuilt), float) - np.asarray(image, float)
        errors.append((difference**2).mean())
    return 10 * math.log10(255**2 / np.mean(errors))


def parse_pretrain(arguments=None):
    """Command line → options. Raises: SystemExit(2) after one line for a wrong flag or value."""
    parser = OneLineParser(prog="pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("weights/pixcell-nano"),
                        help="base folder to write")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"),
                        help="resumable state and tile bank")
    parser.add_argument("--open-tiles", type=Path, help="folder of openly licensed H&E images")
    parser.add_argument("--measure", type=Path,
                        help="folder of tiles never trained on, for the VAE's PSNR")
    parser.add_argument("--start-from", type=Path,
                        help="base folder to begin from; a state in --work that began elsewhere "
                        "is refused")
    parser.add_argument("--stage", choices=("all", "vae", "joint"), default="all")
    parser.add_argument("--freeze-encoder", action="store_true",
                        help="train the transformer alone, the encoder as --start-from has it")
    parser.add_argument("--procedural", type=nonnegative_int, default=4000,
                        help="procedural tiles in the bank")
    parser.add_argument("--open-crops", type=nonnegative_int, default=4000,
                        help="crops of open images in the bank")
    parser.add_argument("--vae-half-steps", type=int, default=2600,
                        help="VAE steps on 128-px crops, batch 4")
    parser.add_argument("--vae-steps", type=int, default=400,
                        help="VAE steps on 256-px tiles, batch 2")
    parser.add_argument("--half-steps", type=int, default=2000,
                        help="joint steps on 128-px windows")
    parser.add_argument("--steps", type=int, default=1500,
                        help="joint steps on 256-px tiles")
    parser.add_argument("--half-batch", type=positive_int, default=64,
                        help="windows in a joint step of --half-steps")
    parser.add_argument("--batch", type=positive_int, default=16,
                        help="tiles in a joint step of --steps")
    parser.add_argument("--vae-learning-rate", type=float, default=1e-3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True,
                        help="bfloat16 autocast")
    parser.add_argument("--device", type=DEVICE, default="auto",
                        help="auto: cuda where there is one, else cpu")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count(),
                        help="processes that make the tile bank")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.freeze_encoder and not args.start_from:
        parser.error("--freeze-encoder keeps the encoder of --start-from; name that base")
    if (tiles := args.procedural + (args.open_crops if args.open_tiles else 0)) < 2:
        parser.error(f"expected 2 tiles or more to train on, got {tiles}; raise --procedural, or "
                     "give --open-tiles and --open-crops")
    return args


def pretrain(args):
    """Make the base's parts that --stage names, each from where the work folder's state stands.

    Raises: ValueError or OSError for whatever the caller can mend.
    """
    args.device = choose_device(args.device)
    tiles = training_tiles(args, args.work)
    args.bank = checkpoint.file_hash(args.work / BANK)[:16]
    if args.stage in ("all", "vae"):
        vae = train_vae(args, args.work, tiles)
    else:
        vae = AutoencoderKL.from_pretrained(args.out / "vae")
    if args.measure:
        images = [fit_tile(read_tile(t.path), TILE, "resize") for t in find_tiles(args.measure)]
        vae.to(args.device)
        print(f"VAE round trip on {len(images)} tiles of {args.measure}: "
              f"{round_trip_psnr(vae, images):.2f} dB")
    if args.stage in ("all", "joint"):
        train_transformer(args, args.work, tiles, latent_bank(args, args.work, tiles, vae))


def main(arguments=None):
    """Run the command line; → exit code: 0, 2 after a one-line error, 128 + a signal's number."""
    args = parse_pretrain(arguments)
    torch.set_flush_denormal(True)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with sigterm_interrupts():
            pretrain(args)
    except (ValueError, OSError) as error:
        line = error
    except (RuntimeError, MemoryError) as error:
        if not (line := refusal(error, "take a smaller --batch and --half-batch")):
            raise  # a fault of ours: with its traceback
    except KeyboardInterrupt as stop:
        print("pretrain: interrupted; the same command goes on from the state last saved",
              file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    else:
        return 0
    finally:
        torch.set_flush_denormal(False)  # it is the process's, so a caller's, too
    print(f"pretrain: error: {one_line(line)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
