"""The two sides of `compare.py`, each in a process of its own: pixcell_min, and diffusers + peft + timm.

`serve` builds one side of one case, then runs it as often as it is told and reports seconds and
peak memory. Only what a side needs is imported in its process, so that memory is that side's own.
A case is a dict: kind, precision (no | bf16 | fp16, autocast of the peer's float32 weights: bf16
autocast | fp16 autocast), device, and what its kind reads below. Inputs lie on the case's device.
"""

import gc
import json
import time
from functools import partial
from pathlib import Path

import torch

RANK, ALPHA, RATE, CLIP = 8, 16, 1e-4, 1.0
GUIDANCE = 1.5
COUNTED_STEPS = 2
WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = {"bf16": torch.bfloat16, "bf16 autocast": torch.bfloat16, "fp16": torch.float16,
        "fp16 autocast": torch.float16}


def serve(connection, side, case) -> None:
    """The process of one side: build, say what memory was before, obey "run", "output", "work"."""
    torch.set_num_threads(case["threads"])
    imported = memory_mb("VmRSS")
    run = (OURS if side == "ours" else PEER)[case["kind"]](case)
    gc.collect()
    connection.send({"imported_mb": imported, "built_mb": memory_mb("VmRSS")})
    output = None
    while (order := connection.recv()) != "end":
        if order == "output":
            connection.send({name: t.detach().float().cpu() for name, t in output.items()})
            continue
        if order == "work":
            connection.send(work_of(run, case))
            continue
        del output
        wait_for(case["device"])
        forget_peak(case["device"])
        began, worked = time.perf_counter(), time.process_time()
        output = run()
        wait_for(case["device"])
        connection.send({"seconds": time.perf_counter() - began,
                         "cpu_seconds": time.process_time() - worked,  # without waiting for others
                         "peak_mb": peak_mb(case["device"])})


def wait_for(device) -> None:
    """Until a GPU has done what it was given; the first call starts it."""
    if device == "cuda":
        torch.cuda.synchronize()


def work_of(run, case) -> dict:
    """FLOP of the products, convolutions and attention of a run, and the device's rate of products.

    The rate is in the precision that autocast has in the case. What is computed twice
    (checkpointing) counts twice; compiled blocks are counted uncompiled. Of a GPU also how many
    kernels and copies a run starts and how many seconds these take, as torch's profiler sees them.
    Sampling is counted in COUNTED_STEPS steps, for it is slow to count, and scaled to all.
    """
    from pixcell_min.precision import choose_dtype
    from torch.utils.flop_counter import FlopCounterMode
    scale = 1
    if case["kind"] == "sample":
        scale, run = case["steps"] / COUNTED_STEPS, partial(run, COUNTED_STEPS)
    # Kernels first: torch runs nothing compiled while FLOP are counted, and not always after it.
    counted = kernels_of(run) if case["device"] == "cuda" else {}
    with FlopCounterMode(display=False) as counter:
        run()
    counted["flop"] = counter.get_total_flops()
    dtype = choose_dtype(case["precision"].removesuffix(" autocast"), torch.device(case["device"]))
    return {what: scale * its for what, its in counted.items()} | {
        "matrix_flop_per_second": matrix_rate(case["device"], dtype or torch.float32)}


def kernels_of(run) -> dict:
    """Number of a GPU's kernels and copies in a run, and the seconds that they take together."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        wait_for("cuda")
    found = [event for event in profiled.events() if "cuda" in str(event.device_type).lower()]
    return {"kernels": len(found),
            "kernel_seconds": sum(event.self_device_time_total for event in found) / 1e6}


def matrix_rate(device, dtype, side=8192, repeats=20) -> float:
    """FLOP per second of the fastest of `repeats` square products, after three to warm up."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        wait_for(device)
        began = time.perf_counter()
        a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[3:])


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MB (Linux)."""
    return next(int(line.split()[1]) * 1024 / 1e6 for line in open("/proc/self/status")
                if line.startswith(field))


def forget_peak(device) -> None:
    """Start the peak anew from what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device) -> float:
    """Most memory held since `forget_peak`: of the GPU, else of the process."""
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else memory_mb("VmHWM")


def draw(*shape, seed=0):
    """The same normal numbers on both sides."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config_of(case, part="transformer") -> dict:
    return json.loads((Path(case["base"]) / part / "config.json").read_text())


def draw_inputs(case, seed=0) -> dict:
    """Latents, noise, embeddings and timesteps of a batch, on the case's device."""
    config, batch = config_of(case), case.get("batch", 1)
    side = case.get("latent_side", config["sample_size"])
    latents = batch, config["in_channels"], side, side
    inputs = {"latents": draw(*latents, seed=seed), "noise": draw(*latents, seed=seed + 1),
              "embeddings": draw(
                  batch, config["caption_num_tokens"], config["caption_channels"], seed=seed + 2),
              "timesteps": torch.linspace(50, 950, batch).long()}
    return {name: t.to(case["device"]) for name, t in inputs.items()}


def draw_lora(name: str, shape) -> torch.Tensor:
    """A and B of a layer, neither zero, from its name alone: equal on both sides."""
    seed = sum(i * ord(letter) for i, letter in enumerate(name, 1))
    return draw(*shape, seed=seed) / (shape[1] ** 0.5 if name.endswith("lora_A") else 50)


def every_page(model) -> dict:
    """Something of each 4 KB of float32 parameters: mapped files are read at a touch."""
    return {"sum": sum(p.detach().flatten()[::1024].double().sum() for p in model.parameters())}


# --- ours ---------------------------------------------------------------------------------------

def our_pipeline(case):
    from pixcell_min.base import load_pixcell_base
    return load_pixcell_base(case["base"], case["device"], case["precision"])


def our_pipeline_with_lora(case):
    """A pipeline with LoRA in it, drawn by name."""
    from pixcell_min.lora import inject_lora, lora_layers
    pipeline = our_pipeline(case)
    transformer = pipeline.transformer
    rank = case.get("rank", RANK)
    inject_lora(transformer, rank, 2 * rank, exclude=transformer.inert_layers())
    with torch.no_grad():
        for name, layer in lora_layers(transformer).items():
            for part in ("lora_A", "lora_B"):
                tensor = getattr(layer, part)
                tensor.copy_(draw_lora(f"{name}.{part}", tensor.shape))
    if case.get("compiled"):
        transformer.compile_blocks()
    return pipeline


def our_trainable(case):
    """As `make_trainable` of train.py: (pipeline, adapter, optimizer, scaler).

    No adapter on either side: the peer has none, and to import ours would burden its memory.
    """
    from pixcell_min.lora import lora_parameters
    from pixcell_min.training import build_optimizer, build_scaler
    pipeline = our_pipeline_with_lora(case)
    transformer = pipeline.transformer
    transformer.gradient_checkpointing = case.get("checkpointing", False)
    transformer.train()
    optimizer = build_optimizer(lora_parameters(transformer), [], RATE, RATE, 0.01)
    scaler = build_scaler(pipeline.device, pipeline.dtype)
    return pipeline, torch.nn.Identity(), optimizer, scaler


def our_train(case):
    from pixcell_min.lora import lora_layers
    from pixcell_min.training import Batch, diffusion_loss, optimizer_step
    pipeline, adapter, optimizer, scaler = our_trainable(case)
    transformer, inputs = pipeline.transformer, draw_inputs(case)
    batch = Batch(inputs["latents"], inputs["embeddings"], inputs["noise"], inputs["timesteps"],
                  torch.zeros(len(inputs["latents"]), dtype=torch.bool)).to(pipeline.device)

    def loss_of(batch):
        return diffusion_loss(transformer, adapter, pipeline.schedule, batch, pipeline.dtype)

    def run():
        report = optimizer_step(loss_of, [batch], len(batch.latents), optimizer, scaler, CLIP)
        return {"loss": torch.tensor(report.loss)} | {
            f"{name}.{part}": getattr(layer, part).grad
            for name, layer in lora_layers(transformer).items() for part in ("lora_A", "lora_B")}
    run.transformer = transformer  # memory.py asks what it holds
    return run


def our_adapted(case):
    """The same, merged where the case says so."""
    pipeline = our_pipeline_with_lora(case)
    if case.get("merged"):
        pipeline.fuse_lora(for_good=True)  # as merge_and_unload of the peer
    return pipeline


@torch.no_grad()
def our_forward(case):
    from pixcell_min.precision import autocast
    pipeline, inputs = our_adapted(case), draw_inputs(case)

    @torch.no_grad()
    def run():
        with autocast(pipeline.device, pipeline.dtype):
            return {"output": pipeline.transformer(
                inputs["latents"], inputs["timesteps"], inputs["embeddings"])}
    return run


def our_sample(case):
    from pixcell_min.pipeline import denoise
    from pixcell_min.schedulers import build_scheduler
    pipeline = our_adapted(case)
    sampler = build_scheduler(case["scheduler"], pipeline.schedule)
    condition = draw_inputs(case)["embeddings"]

    def run(steps=case["steps"]):
        return {"latents": denoise(
            pipeline.transformer, sampler, condition, torch.Generator().manual_seed(0),
            num_inference_steps=steps, guidance_scale=GUIDANCE, dtype=pipeline.dtype)}
    return run


def our_vae(case):
    from pixcell_min.base import load_vae
    from pixcell_min.precision import autocast, choose_dtype
    device = torch.device(case["device"])
    dtype = choose_dtype(case["precision"], device)
    vae, (latents, pixels) = load_vae(case["base"], device, dtype), vae_inputs(case)

    @torch.no_grad()
    def run():
        with autocast(device, dtype):
            if case["kind"] == "decode":
                return {"pixels": vae.decode(latents)}
            return {"mean": vae.encode(pixels)[0]}
    return run


def vae_inputs(case):
    side = config_of(case)["sample_size"]
    latents = draw(case.get("batch", 1), 16, side, side)
    pixels = draw(case.get("batch", 1), 3, 8 * side, 8 * side, seed=1).clamp(-1, 1)
    return latents.to(case["device"]), pixels.to(case["device"])


def tile_of(case):
    size = config_of(case, "uni").get("model_args", {}).get("img_size", 224)
    return draw(case.get("batch", 1), 3, size, size).sigmoid().to(case["device"])


def our_encoder(case):
    from pixcell_min.base import load_encoder
    encoder, tiles = load_encoder(case["base"], case["device"]), tile_of(case)

    @torch.no_grad()
    def run():
        return {"embedding": encoder(tiles)[:, 0]}
    return run


def our_load(case):
    def run():  # the first one imports, as the peer's
        from pixcell_min.transformer import PixCellTransformer
        model = PixCellTransformer.from_pretrained(Path(case["base"]) / "transformer")
        return every_page(model.to(case["device"]))
    return run


def our_features(case, pipeline, base_hash):
    """The tiles' features as train.py keeps them: computed at the first call, then read."""
    from pixcell_min.data import find_tiles
    from pixcell_min.features import cached_images, encode_images
    tiles = find_tiles(case["tiles"])
    return cached_images(
        case["cache"], tiles,
        lambda images: encode_images(images, pipeline.vae, pipeline.encoder, pipeline.device),
        base_hash=base_hash, how="resize", dihedral=False, strict=True,
        size=8 * pipeline.transformer.config.sample_size, report=print, device=pipeline.device)


def our_first_pass(case):
    from pixcell_min.base import features_hash

    def run():
        features = our_features(case, our_pipeline(case), features_hash(case["base"]))
        return {"embeddings": features.embeddings[torch.arange(len(features.tiles))]}
    return run


def our_epoch(case):
    from pixcell_min.base import features_hash
    from pixcell_min.batches import draw_micro_batches
    from pixcell_min.training import diffusion_loss, optimizer_step
    pipeline, adapter, optimizer, scaler = our_trainable(case)
    base_hash = features_hash(case["base"])  # of gigabytes, once in a run of train.py, not per epoch

    def loss_of(batch):
        return diffusion_loss(
            pipeline.transformer, adapter, pipeline.schedule, batch, pipeline.dtype)

    def run():  # the tiles are hashed and the cache is opened in it, too
        features = our_features(case, pipeline, base_hash)
        count = len(features.tiles)
        for attempt in range(count // case["batch"]):
            batches = draw_micro_batches(
                features, torch.arange(count), pipeline.schedule, case["batch"], 1, 0.0, None, 0,
                pipeline.device, 0, 1, attempt)
            report = optimizer_step(loss_of, batches, case["batch"], optimizer, scaler, CLIP)
        return {"loss": torch.tensor(report.loss)}
    return run


def our_cache(case):
    """Opening a cache of `count` tiles, as train.py does at each start, and drawing 16 batches of 16.

    Features of real size, made of noise at the first call: opening checks every shard's checksum.
    """
    from PIL import Image
    from pixcell_min.data import Tile
    from pixcell_min.features import cached_features
    folder, count = Path(case["base"]) / f"tiles-{case['count']}", case["count"]
    folder.mkdir(exist_ok=True)
    tiles = [Tile(folder / f"{i:05}.bmp") for i in range(count)]
    for i, tile in enumerate(tiles):
        if not tile.path.exists():
            Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(tile.path)

    def compute(missing):
        for tile in missing:
            yield [tile], (draw(1, 16, 32, 32), draw(1, 16, 32, 32).abs(), draw(1, 1, 1536))

    def run():
        features = cached_features(folder / "cache", tiles, compute, settings={}, report=print)
        for step in range(16):
            generator = torch.Generator().manual_seed(step)
            features.sample_latents(torch.randint(count, (16,), generator=generator), generator)
        return {"embeddings": features.embeddings[torch.arange(4)]}
    return run


# --- the peer -----------------------------------------------------------------------------------

def peer_base(case):
    """diffusers' PixArt, whose attention layout and names PixCell's are, with the same weights."""
    from diffusers import PixArtTransformer2DModel
    from diffusers.utils import logging
    logging.set_verbosity_error()  # it warns of the null embedding, which it has no place for
    half = None if "autocast" in case["precision"] else HALF.get(case["precision"])
    return PixArtTransformer2DModel.from_pretrained(
        Path(case["base"]) / "pixart", torch_dtype=half or torch.float32).to(case["device"])


def peer_autocast(case):
    dtype = HALF.get(case["precision"])
    return torch.autocast(case["device"], dtype=dtype, enabled=dtype is not None)


def peer_adapted(case):
    """The same with peft's LoRA on all attention."""
    from peft import LoraConfig, get_peft_model
    rank = case.get("rank", RANK)
    model = get_peft_model(peer_base(case), LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora" in name:
                plain = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                tensor.copy_(draw_lora(plain, tensor.shape))
    if case.get("merged"):
        model = model.merge_and_unload()
    if case.get("compiled"):  # block by block, as ours
        blocks = model if case.get("merged") else model.base_model.model
        for block in blocks.transformer_blocks:
            block.compile()
    return model


def peer_train(case):
    model = peer_adapted(case)
    step = peer_step(case, model)
    inputs = draw_inputs(case)

    def run():
        loss = step(**inputs)
        gradients = {
            name.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad
            for name, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss} | gradients
    return run


def peer_step(case, model):
    """The usual training loop's step."""
    from diffusers import DDPMScheduler
    model.train()
    inner = model.base_model.model
    if case.get("checkpointing"):
        inner.enable_gradient_checkpointing()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    scaler = torch.amp.GradScaler(
        case["device"], enabled=HALF.get(case["precision"]) == torch.float16)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)

    def step(latents, noise, embeddings, timesteps):
        optimizer.zero_grad(set_to_none=True)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with peer_autocast(case):
            output = model(noisy, encoder_hidden_states=embeddings,
                           timestep=timesteps).sample.chunk(2, dim=1)[0]
        loss = torch.nn.functional.mse_loss(output.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach().cpu()
    return step


def peer_forward(case):
    model, inputs = peer_adapted(case).eval(), draw_inputs(case)

    @torch.no_grad()
    def run():
        with peer_autocast(case):
            return {"output": model(inputs["latents"], encoder_hidden_states=inputs["embeddings"],
                                    timestep=inputs["timesteps"]).sample}
    return run


def peer_sample(case):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    from safetensors import safe_open
    model, config = peer_adapted(case).eval(), config_of(case)
    dtype, device = next(model.parameters()).dtype, case["device"]
    with safe_open(Path(case["base"]) / "transformer" / WEIGHTS, "pt") as file:
        null = file.get_tensor("caption_projection.uncond_embedding")[None]
    tokens = torch.cat([null.to(device), draw_inputs(case)["embeddings"]]).to(dtype)
    kind = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}[case["scheduler"]]
    options = {"ddim": {"clip_sample": False, "timestep_spacing": "leading"},
               "dpmpp_2m": {"timestep_spacing": "linspace"}}[case["scheduler"]]
    schedule = kind(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, **options)

    @torch.no_grad()
    def run(steps=case["steps"]):
        schedule.set_timesteps(steps, device=device)
        side = config["sample_size"]
        latents = draw(1, config["in_channels"], side, side).to(device)
        for t in schedule.timesteps:
            with peer_autocast(case):
                output = model(latents.expand(2, -1, -1, -1).to(dtype), timestep=t.expand(2),
                               encoder_hidden_states=tokens).sample.float()
            without, given = output[:, :config["in_channels"]].chunk(2)
            latents = schedule.step(
                without + GUIDANCE * (given - without), t, latents).prev_sample
        return {"latents": latents}
    return run


def peer_vae_model(case):
    from diffusers import AutoencoderKL
    weights = Path(case["base"]) / "vae"
    return AutoencoderKL.from_pretrained(
        weights, torch_dtype=HALF.get(case["precision"], torch.float32)).to(case["device"])


def peer_vae(case):
    vae, (latents, pixels) = peer_vae_model(case), vae_inputs(case)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    @torch.no_grad()
    def run():
        if case["kind"] == "decode":
            return {"pixels": vae.decode((latents / scale + shift).to(vae.dtype)).sample}
        mean = vae.encode(pixels.to(vae.dtype)).latent_dist.mean
        return {"mean": (mean - shift) * scale}
    return run


def peer_encoder_model(case):
    """timm's UNI2-h, as its page says to build it."""
    import timm
    from safetensors.torch import load_file
    folder = Path(case["base"]) / "uni"
    sizes = {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5,
             "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "reg_tokens": 8}
    model = timm.create_model(
        "vit_giant_patch14_224", pretrained=False, num_classes=0, no_embed_class=True,
        mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU, dynamic_img_size=True,
        **sizes | config_of(case, "uni").get("model_args", {}))
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model.eval().to(case["device"], HALF.get(case["precision"], torch.float32))


def normalised(case, tiles):
    own = config_of(case, "uni").get("pretrained_cfg", {})
    mean, std = (tiles.new_tensor(own.get(name, default))[:, None, None] for name, default in (
        ("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])))
    return ((tiles - mean) / std).to(case["device"], HALF.get(case["precision"], torch.float32))


def peer_encoder(case):
    encoder, tiles = peer_encoder_model(case), tile_of(case)

    @torch.no_grad()
    def run():
        return {"embedding": encoder(normalised(case, tiles))}
    return run


def peer_load(case):
    def run():
        return every_page(peer_base(case))
    return run


def peer_epoch(case):
    """The authors' way: UNI2-h and the VAE are at work in every step."""
    import numpy
    from PIL import Image
    vae, encoder = peer_vae_model(case), peer_encoder_model(case)
    step = peer_step(case, peer_adapted(case))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    paths = sorted(Path(case["tiles"]).rglob("*.png"))
    side, input_side = 8 * config_of(case)["sample_size"], tile_of(case).shape[-1]

    def run():
        for start in range(0, len(paths), case["batch"]):
            tiles = torch.stack([torch.from_numpy(numpy.array(
                Image.open(path).convert("RGB").resize((side, side)))).permute(2, 0, 1) / 255
                for path in paths[start:start + case["batch"]]])
            with torch.no_grad():
                small = torch.nn.functional.interpolate(
                    tiles, (input_side, input_side), mode="bilinear", antialias=True)
                embeddings = encoder(normalised(case, small))[:, None].float()
                pixels = (2 * tiles - 1).to(case["device"], vae.dtype)
                latents = ((vae.encode(pixels).latent_dist.sample() - shift) * scale).float()
            loss = step(latents, torch.randn_like(latents), embeddings,
                        torch.randint(1000, (len(latents),), device=case["device"]))
        return {"loss": loss}
    return run


OURS = {"train": our_train, "forward": our_forward, "sample": our_sample, "encode": our_vae,
        "decode": our_vae, "encoder": our_encoder, "load": our_load, "epoch": our_epoch,
        "first pass": our_first_pass, "cache": our_cache}
PEER = {"train": peer_train, "forward": peer_forward, "sample": peer_sample, "encode": peer_vae,
        "decode": peer_vae, "encoder": peer_encoder, "load": peer_load, "epoch": peer_epoch}
