"""The story of a run: adapt a frozen PixCell to a folder of tiles with LoRA and an adapter.

    python train.py --rank 8 --alpha 16
    python train.py --data tiles --base weights/pixcell-256 --out runs/nct --config config.yaml

Without --data it trains on procedural tiles of a second "laboratory", whose stain the embedded base
has never seen.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pixcell_min import checkpoint
from pixcell_min.adapter import EmbeddingAdapter, save_adapter
from pixcell_min.base import features_hash, load_pixcell_base, read_vae_config, vae_weights
from pixcell_min.config import Config, parse_train, read_yaml, to_yaml
from pixcell_min.data import batch_indices, find_tiles, fit_tile, read_tile, split_tiles
from pixcell_min.features import cached_images, encode_images
from pixcell_min.images import image_grid, save_png
from pixcell_min.lora import (count_parameters, inject_lora, load_lora_state_dict, lora_disabled,
                              lora_parameters, lora_state_dict, save_lora)
from pixcell_min.precomputed import cached_precomputed, find_precomputed
from pixcell_min.tools.synthetic import SECOND, write_dataset
from pixcell_min.training import (build_optimizer, build_scaler, diffusion_loss, draw_batch,
                                  generator_for, optimizer_step, rate_factor, validation_loss)

PROCEDURAL_TILES = 72  # 8 of each tissue
PROCEDURAL_SEED = 10**9  # the base's pretraining used lower ones: the same tissue in another stain
MAX_VALIDATION_TILES = 64  # spread over the held-out tiles; more would take longer than training
MAX_SKIPPED_STEPS = 20  # in a row; float16 overflows now and then, not always
GRID_STEPS = 20  # of DPM-Solver++ 2M, for the sample grid
STATE, LORA, ADAPTER = "state.pt", "lora_weights.safetensors", "adapter.safetensors"
SETTINGS, TILES = "config.yaml", "tiles.json"
METRICS, GRID = "metrics.jsonl", "samples/grid.png"
# Settings that a resumed run may change: they touch neither a drawn number nor a weight.
FREE_ON_RESUME = {"out", "cache", "decode_workers", "save_every", "validate_every", "sample_count",
                  "guidance_scale"}


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    argv, config = sys.argv[1:] if argv is None else list(argv), None
    try:
        config, options = parse_train(argv)
        if options.resume and options.config is None:  # its own settings, then this call's flags
            require_state(Path(config.out))
            config, options = parse_train([*argv, "--config", str(Path(config.out) / SETTINGS)])
        if options.dry_run:
            print(to_yaml(config), end="")
        else:
            train(config, options)
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = config is not None and (Path(config.out) / STATE).is_file()
        print("train.py: interrupted" + (f"; go on from the last save: python train.py --resume "
                                         f"--out {config.out}" if saved else " before any save"),
              file=sys.stderr)
        return 130
    return 0


def train(config: Config, options) -> None:
    """One run, from tiles to a run folder. Raises: ValueError for whatever the caller can mend."""
    run = Path(config.out)
    check_run_folder(run, config, options)
    tiles = (find_precomputed(config.features) if config.features else
             find_tiles(config.data or procedural_tiles(config)))
    pipeline = load_pixcell_base(config.base, config.device, config.mixed_precision)
    transformer, schedule, dtype = pipeline.transformer, pipeline.schedule, pipeline.dtype
    adapter = make_trainable(config, pipeline)
    features, training, validation = load_features(config, pipeline, tiles)
    training_rows = features.rows(training)
    validation = spread(validation, MAX_VALIDATION_TILES)
    optimizer = build_optimizer(
        lora_parameters(transformer), adapter.parameters(), config.learning_rate,
        config.adapter_learning_rate, config.weight_decay)
    scaler, start, skipped = build_scaler(pipeline.device, dtype), 0, 0
    # What a saved state must agree with to be continued.
    identity = {"base_hash": pipeline.base_hash, "dtype": str(dtype),
                "tiles": features.fingerprint(training_rows)}
    if options.resume:
        start = load_state(run, identity, transformer, adapter, optimizer, scaler)
    else:
        make_run_folder(run, config, training, validation)

    def validate(step):
        loss = validation_loss(transformer, adapter, schedule, features,
                               features.rows(validation), config.batch_size, config.seed, dtype)
        log(run, {"step": step, "validation_loss": loss})
        tqdm.write(f"validation loss at step {step}: {loss:.5f}")

    if start == 0:
        validate(0)
    transformer.train(), adapter.train()
    began = time.monotonic()
    with tqdm(total=config.max_train_steps, initial=start, desc="training", unit="step") as bar:
        for step in range(start, config.max_train_steps):
            factor = rate_factor(step, config.warmup_steps, config.max_train_steps,
                                 config.lr_schedule)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            report = optimizer_step(
                lambda batch: diffusion_loss(transformer, adapter, schedule, batch, dtype,
                                             config.loss_weighting, config.min_snr_gamma),
                draw_micro_batches(config, features, training_rows, schedule, step, pipeline.device),
                config.batch_size * config.gradient_accumulation_steps, optimizer, scaler,
                config.max_grad_norm)
            skipped = skipped + 1 if report.skipped else 0
            if skipped == MAX_SKIPPED_STEPS:
                raise ValueError(f"float16 overflowed in {skipped} steps in a row; the last save is "
                                 "kept; use --mixed-precision bf16 or no, or lower rates")
            done, rates = step + 1, [group["lr"] for group in optimizer.param_groups]
            log(run, {"step": done, "loss": report.loss, "grad_norm": report.grad_norm,
                      "lora_rate": rates[0], "adapter_rate": rates[1], "skipped": report.skipped,
                      "seconds": round(time.monotonic() - began, 3)})
            bar.set_postfix(loss=f"{report.loss:.4f}", lora=f"{rates[0]:.1e}",
                            adapter=f"{rates[1]:.1e}")
            bar.update()
            last = done == config.max_train_steps
            if is_due(done, config.validate_every) or last:
                validate(done)  # before saving: a resumed run drops what was logged after its save
            if is_due(done, config.save_every) or last:
                save_state(run, done, config, identity, pipeline, adapter, optimizer, scaler)
    if config.sample_count:
        draw_grid(run, config, pipeline, adapter, features, validation)
    print(f"done: {run}\nnext: python sample.py --run {run} --image TILE --compare")


def require_state(run: Path) -> None:
    """Raises: ValueError unless there is a run to resume."""
    if not (run / STATE).is_file():
        raise ValueError(f"{run}: no {STATE} to resume from; start the run without --resume")


def check_run_folder(run: Path, config: Config, options) -> None:
    """Before any loading or deleting, refuse to lose or mix up runs. Raises: ValueError."""
    if options.resume:
        require_state(run)
        then = Config(**read_yaml(run / SETTINGS))
        names = [name for name in vars(config) if name not in FREE_ON_RESUME]
        changed = [f"{name} {getattr(then, name)} → {getattr(config, name)}" for name in names
                   if getattr(then, name) != getattr(config, name)]
        if changed:
            raise ValueError(f"{run}: cannot resume with other settings: {'; '.join(changed)}")
    elif run.is_file() or (run.is_dir() and any(run.iterdir())):
        if not options.overwrite:
            raise ValueError(f"{run}: exists; go on with --resume, replace it with --overwrite, "
                             "or choose another --out")
        if not ((run / SETTINGS).is_file() and (run / METRICS).is_file()):
            raise ValueError(f"{run}: holds no {SETTINGS} and {METRICS}, so it is no run; "
                             "--overwrite replaces runs only")


def make_run_folder(run: Path, config: Config, training, validation) -> None:
    """Settings and tiles; --overwrite deletes a run's own files, now that base and tiles are good.

    tiles.json names what was trained on and what held out, by path and SHA-256, so that whoever
    measures the run can keep apart what it has seen.
    """
    for name in (STATE, LORA, ADAPTER, METRICS, GRID):
        (run / name).unlink(missing_ok=True)
    checkpoint.write_text(run / SETTINGS, to_yaml(config))
    checkpoint.write_text(run / TILES, json.dumps(
        {name: [{"path": str(tile.path.resolve()), "hash": checkpoint.file_hash(tile.path)}
                for tile in tiles]
         for name, tiles in (("training", training), ("validation", validation))}, indent=1))


def make_trainable(config: Config, pipeline) -> EmbeddingAdapter:
    """Wrap with LoRA, make the adapter, say what is trainable. Raises: ValueError: bad targets."""
    transformer = pipeline.transformer
    inert = set(transformer.inert_layers()) if "attn2" in config.lora_attention else set()
    inject_lora(transformer, config.lora_rank, config.lora_alpha, config.lora_target_modules,
                config.lora_attention, config.lora_blocks, inert, config.lora_dropout,
                config.lora_init, config.use_rslora, generator=generator_for(config.seed, "lora"))
    adapter = EmbeddingAdapter(transformer.config.caption_channels,
                               generator=generator_for(config.seed, "adapter"))
    adapter.to(pipeline.device)
    transformer.gradient_checkpointing = config.gradient_checkpointing
    (lora, inside), (outside, _) = count_parameters(transformer), count_parameters(adapter)
    print(f"trainable: LoRA {lora:,} + adapter {outside:,} = {lora + outside:,} parameters, "
          f"{100 * (lora + outside) / (inside + outside):.2f} % of {inside + outside:,}")
    if inert:
        print(f"not adapted: {len(inert)} query and key layers of cross-attention, which with one "
              "condition token cannot change the image (softmax over one key is 1)")
    print(f"device {pipeline.device}, autocast {pipeline.dtype or 'off'}, "
          f"base {pipeline.base_hash[:12]}")
    return adapter


def load_features(config: Config, pipeline, tiles):
    """(features of all readable tiles, from the cache where it has them; training, held-out tiles).

    Cached before they are split: another seed or share finds its features in the cache. VAE and
    encoder are loaded on a miss only, and let go of afterwards.
    """
    sizes, vae = pipeline.transformer.config, read_vae_config(config.base)
    common = {"strict": config.strict_data, "workers": config.decode_workers,
              "report": lambda line: print(line, file=sys.stderr)}
    if config.features:
        if config.sample_count:  # said now, not after the training: the grid decodes
            vae_weights(config.base, "; or choose --sample-count 0")
        features = cached_precomputed(config.cache, tiles, sizes, vae, **common)
    else:
        features = cached_images(
            config.cache, tiles, lambda images: encode_images(
                images, pipeline.vae, pipeline.encoder, pipeline.device),
            base_hash=features_hash(config.base), size=sizes.sample_size * vae.downscale,
            how=config.tile_fit, dihedral=config.dihedral, batch_size=config.batch_size, **common)
    pipeline.release()
    training, validation = split_tiles(features.tiles, config.validation_fraction, config.seed)
    print(f"tiles: {len(training)} to train on, {len(validation)} held out; latents and embeddings "
          f"in {features.variants} variant(s) each, {features.nbytes / 1e6:.0f} MB, memory-mapped")
    return features, training, validation


def procedural_tiles(config: Config) -> Path:
    """Folder of the second laboratory's procedural tiles, drawn once; appears when complete."""
    folder = Path(config.cache) / f"procedural-second-{PROCEDURAL_TILES}-{PROCEDURAL_SEED}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        write_dataset(partial, PROCEDURAL_TILES, SECOND, PROCEDURAL_SEED)
        os.replace(partial, folder)
    return folder


def draw_micro_batches(config: Config, features, rows, schedule, step: int, device):
    """The batches of optimizer step `step`; each depends on the seed and its own number alone."""
    for micro in range(config.gradient_accumulation_steps):
        micro_step = step * config.gradient_accumulation_steps + micro
        generator = generator_for(config.seed, "train", micro_step)
        # LoRA dropout draws from the global generator: seeded apart from the noise of the batch.
        torch.manual_seed(generator_for(config.seed, "dropout", micro_step).initial_seed())
        chosen = rows[batch_indices(len(rows), config.batch_size, micro_step, config.seed)]
        yield draw_batch(
            features, chosen, schedule, config.condition_dropout, generator).to(device)


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is to be done after step `step`."""
    return every > 0 and step % every == 0


def log(run: Path, values: dict) -> None:
    """Append a line to metrics.jsonl."""
    with open(run / METRICS, "a", encoding="utf-8") as file:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}  # JSON knows no NaN
        file.write(json.dumps(finite) + "\n")


def spread(items: list, count: int) -> list:
    """At most `count` of a list, evenly spaced, in order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def save_state(run, step, config, identity, pipeline, adapter, optimizer, scaler) -> None:
    """Write the two files to share, then the state to resume from, each whole or not at all."""
    provenance = {"base_hash": pipeline.base_hash, "base": str(config.base), "step": str(step)}
    save_lora(pipeline.transformer, run / LORA, provenance)
    save_adapter(adapter, run / ADAPTER, provenance)
    checkpoint.save_object(run / STATE, {
        **identity, "step": step, "lora": lora_state_dict(pipeline.transformer),
        "adapter": adapter.state_dict(), "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict()})


def load_state(run, identity, transformer, adapter, optimizer, scaler) -> int:
    """Put a saved state back; → optimizer steps done. Raises: ValueError if it does not fit."""
    state = checkpoint.load_object(run / STATE)
    expected = {*identity, "step", "lora", "adapter", "optimizer", "scaler"}
    if not isinstance(state, dict) or state.keys() != expected:
        raise ValueError(f"{run / STATE}: not the state of a run; expected {sorted(expected)}")
    for key, value in identity.items():
        if state[key] != value:
            raise ValueError(f"{run}: cannot resume: {key} was {state[key]}, is {value}")
    kept = logged_until(run, state["step"])
    load_lora_state_dict(transformer, state["lora"], run / STATE)
    checkpoint.load_strict(adapter, state["adapter"], run / STATE)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    checkpoint.write_text(run / METRICS, kept)
    return state["step"]


def logged_until(run: Path, step: int) -> str:
    """The lines of metrics.jsonl up to a step; later ones are logged again. Raises: ValueError."""
    lines = checkpoint.read_text(run / METRICS).splitlines(keepends=True)
    try:
        return "".join(line for line in lines
                       if line.endswith("\n") and json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{run / METRICS}: a line is no log entry; mend or remove it") from None


def draw_grid(run, config, pipeline, adapter, features, validation) -> None:
    """samples/grid.png: held-out tiles beside what base and adapted model draw from them."""
    pipeline.transformer.eval(), adapter.eval()
    chosen = spread(validation, config.sample_count)  # over the classes
    embeddings = features.embeddings[features.rows(chosen)].to(pipeline.device)
    settings = {"num_inference_steps": GRID_STEPS, "scheduler": "dpmpp_2m", "seed": config.seed,
                "guidance_scale": config.guidance_scale}
    with torch.no_grad():
        adapted = pipeline(adapter(embeddings), **settings).images
        with lora_disabled(pipeline.transformer):
            base = pipeline(embeddings, **settings).images
    if config.features:  # no image at hand: what the VAE makes of the tile's latents
        real = [pipeline.decode(features.mean[row][None].to(pipeline.device))
                for row in features.rows(chosen)]
    else:
        size = pipeline.transformer.config.sample_size * pipeline.vae.downscale
        real = [fit_tile(read_tile(tile.path), size, config.tile_fit) for tile in chosen]
    grid = image_grid(list(zip(real, base, adapted)), ("real, held out", "base", "adapted"))
    save_png(run / GRID, grid,
             {**settings, "tiles": [tile.path.name for tile in chosen]})


if __name__ == "__main__":
    sys.exit(main())
