"""The story of a run: adapt a frozen PixCell to a folder of tiles with LoRA and an adapter.

    python train.py --rank 8 --alpha 16
    python train.py --data tiles --base weights/pixcell-256 --out runs/nct --config config.yaml

Without --data it trains on procedural tiles of a second "laboratory", whose stain the embedded base
has never seen.
"""

import hashlib
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.base import features_hash, load_pixcell_base
from pixcell_min.config import Config, parse_train, read_yaml, to_yaml
from pixcell_min.data import (batch_indices, cached_features, find_tiles, fit_tile, read_tile,
                              split_tiles)
from pixcell_min.images import image_grid, save_png
from pixcell_min.lora import count_parameters, inject_lora, lora_disabled, lora_parameters
from pixcell_min.precision import make_deterministic
from pixcell_min.runs import (GRID, SETTINGS, StopSignals, check_new, check_writable,
                              describe_session, kept, load_state, log, read_log, require_state,
                              resume_command, resume_run, save_shared, save_state, start_run,
                              state_files)
from pixcell_min.tools.synthetic import SECOND, write_dataset
from pixcell_min.training import (Progress, TrainingState, build_optimizer, build_scaler,
                                  count_attempt, diffusion_loss, draw_batch, generator_for,
                                  optimizer_step, rate_factor, validation_loss)

PACKAGE = Path(__file__).resolve().parent / "pixcell_min"
PROCEDURAL_TILES = 72  # 8 of each tissue
PROCEDURAL_SEED = 10**9  # the base's pretraining used lower ones: the same tissue in another stain
MAX_VALIDATION_TILES = 64  # spread over the held-out tiles; more would take longer than training
GRID_STEPS = 20  # of DPM-Solver++ 2M, for the sample grid
# Settings that a resumed run may change: they touch neither a drawn number nor a weight.
FREE_ON_RESUME = {"out", "cache", "save_every", "validate_every", "sample_count", "guidance_scale",
                  "keep_states"}


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
            return 0
        return train(config, options, ["python", "train.py", *argv])
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        run = Path(config.out) if config else None
        go_on = f"; {kept(run)}" if run and state_files(run) else " before any save"
        print(f"train.py: interrupted{go_on}", file=sys.stderr)
        return 130


def train(config: Config, options, command) -> int:
    """One run, from tiles to a run folder; → exit code: 0, or 128 + the signal that stopped it.

    Raises: ValueError for whatever the caller can mend.
    """
    run = Path(config.out)
    check_run_folder(run, config, options)
    if config.deterministic:
        make_deterministic()
    tiles = find_tiles(config.data or procedural_tiles(config))
    pipeline = load_pixcell_base(config.base, config.device, config.mixed_precision)
    transformer, schedule, dtype = pipeline.transformer, pipeline.schedule, pipeline.dtype
    state = make_trainable(config, pipeline)
    features, training, validation = load_features(config, pipeline, tiles)
    training_rows = features.rows(training)
    # What a saved state must agree with to be continued.
    identity = {"base_hash": pipeline.base_hash, "dtype": str(dtype),
                "tiles": fingerprint(features.embeddings[training_rows])}
    begin(run, config, options, command, identity, state, training, validation)
    validation = spread(validation, MAX_VALIDATION_TILES)

    def loss_of(batch):
        return diffusion_loss(transformer, state.adapter, schedule, batch, dtype,
                              config.loss_weighting, config.min_snr_gamma)

    def batches_of(attempt):
        return draw_micro_batches(
            config, features, training_rows, schedule, attempt, pipeline.device)

    def validate():
        loss = validation_loss(transformer, state.adapter, schedule, features,
                               features.rows(validation), config.batch_size, config.seed, dtype)
        log(run, state.progress, {"validation_loss": loss})
        tqdm.write(f"validation loss at step {state.progress.step}: {loss:.5f}")

    def save():
        save_state(run, identity, state, config.keep_states)
        save_shared(run, state, {"base_hash": pipeline.base_hash, "base": str(config.base)})

    with StopSignals() as stop:
        try:
            fit(run, config, state, loss_of, batches_of, validate, save, stop)
        except ValueError as error:
            raise ValueError(f"{error}; {kept(run)}") from None
    if stop.received:
        print(f"train.py: stopped by {signal.Signals(stop.received).name} after step "
              f"{state.progress.step}, saved; go on with: {resume_command(run)}", file=sys.stderr)
        return 128 + stop.received
    if config.sample_count:
        draw_grid(run, config, pipeline, state.adapter, features, validation)
    print(f"done: {run}\nnext: python sample.py --run {run} --image TILE --compare")
    return 0


def begin(run: Path, config: Config, options, command, identity, state, training,
          validation) -> None:
    """Make the run's folder, or take it up where it was saved; either way note this session."""
    session = describe_session(
        command, {"base": identity["base_hash"], "embeddings": identity["tiles"]},
        [Path(__file__), *PACKAGE.glob("*.py")], seed=config.seed,
        precision=identity["dtype"], deterministic=config.deterministic)
    if not options.resume:
        start_run(run, session, to_yaml(config), training, validation)
        save_state(run, identity, state, config.keep_states)  # so that --resume works from now on
        return
    note = partial(print, "train.py: note:", file=sys.stderr)
    load_state(run, identity, state, note)
    resume_run(run, session, to_yaml(config), state, note)
    if state.progress.step:  # a kill between the two files may have left them of different steps
        save_shared(run, state, {"base_hash": identity["base_hash"], "base": str(config.base)})


def fit(run: Path, config: Config, state: TrainingState, loss_of, batches_of, validate, save,
        stop) -> None:
    """Optimizer steps until max_train_steps are made or a signal came; then all is saved."""
    if not read_log(run):
        validate()
    state.transformer.train(), state.adapter.train()
    progress, total, began = state.progress, config.max_train_steps, time.monotonic()
    with tqdm(total=total, initial=progress.step, desc="training", unit="step") as bar:
        while progress.step < total and not stop.received:
            factor = rate_factor(progress.step, config.warmup_steps, total, config.lr_schedule)
            for group in state.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            report = optimizer_step(
                loss_of, batches_of(progress.attempt),
                config.batch_size * config.gradient_accumulation_steps, state.optimizer,
                state.scaler, config.max_grad_norm)
            count_attempt(state, report)
            rates = [group["lr"] for group in state.optimizer.param_groups]
            log(run, progress, {
                "loss": report.loss, "grad_norm": report.grad_norm, "lora_rate": rates[0],
                "adapter_rate": rates[1], "loss_scale": report.loss_scale,
                "skipped": report.skipped, "skipped_so_far": progress.skipped,
                "seconds": round(time.monotonic() - began, 3)})
            if report.skipped:
                tqdm.write(f"step {progress.step + 1} skipped: float16 overflowed; the loss scale "
                           f"is {report.loss_scale:g} now ({progress.skipped} skipped so far)")
                continue
            bar.set_postfix(loss=f"{report.loss:.4f}", lora=f"{rates[0]:.1e}",
                            adapter=f"{rates[1]:.1e}")
            bar.update()
            last = progress.step == total
            if is_due(progress.step, config.validate_every) or last:
                validate()  # before saving: a resumed run drops what was logged after its save
            if is_due(progress.step, config.save_every) or last:
                save()
        if stop.received:
            save()


def check_run_folder(run: Path, config: Config, options) -> None:
    """Before any loading or deleting, refuse to lose or mix up runs. Raises: ValueError."""
    if not options.resume:
        check_new(run, options.overwrite)
        return
    require_state(run)
    check_writable(run)
    then = Config(**read_yaml(run / SETTINGS))
    changed = {name: f"{name} {getattr(then, name)} → {getattr(config, name)}"
               for name in vars(config) if getattr(then, name) != getattr(config, name)}
    if refused := [line for name, line in changed.items() if name not in FREE_ON_RESUME]:
        raise ValueError(f"{run}: cannot resume with other settings: {'; '.join(refused)}")
    if changed:
        print(f"train.py: note: other settings, of no effect on the result: "
              f"{'; '.join(changed.values())}", file=sys.stderr)


def make_trainable(config: Config, pipeline) -> TrainingState:
    """Wrap with LoRA, make adapter and optimizer, say what is trainable. Raises: ValueError."""
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
    optimizer = build_optimizer(
        lora_parameters(transformer), adapter.parameters(), config.learning_rate,
        config.adapter_learning_rate, config.weight_decay)
    return TrainingState(transformer, adapter, optimizer,
                         build_scaler(pipeline.device, pipeline.dtype), Progress())


def load_features(config: Config, pipeline, tiles):
    """(features of all readable tiles, from the cache where it has them; training, held-out tiles).

    Cached before they are split: another seed or share finds its features in the cache.
    """
    features = cached_features(
        config.cache, tiles, pipeline.vae,
        lambda images: pipeline.encoder(images),  # loaded on a miss only
        base_hash=features_hash(config.base),
        size=pipeline.transformer.config.sample_size * pipeline.vae.downscale,
        how=config.tile_fit, dihedral=config.dihedral, strict=config.strict_data,
        batch_size=config.batch_size, device=pipeline.device,
        report=lambda line: print(line, file=sys.stderr))
    training, validation = split_tiles(features.tiles, config.validation_fraction, config.seed)
    held = sum(t.nbytes for t in (features.mean, features.std, features.embeddings))
    print(f"tiles: {len(training)} to train on, {len(validation)} held out; latents and embeddings "
          f"of {features.variants} variants each hold {held / 1e6:.0f} MB of memory")
    return features, training, validation


def procedural_tiles(config: Config) -> Path:
    """Folder of the second laboratory's procedural tiles, drawn once; appears when complete."""
    folder = Path(config.cache) / f"procedural-second-{PROCEDURAL_TILES}-{PROCEDURAL_SEED}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        write_dataset(partial, PROCEDURAL_TILES, SECOND, PROCEDURAL_SEED)
        os.replace(partial, folder)
    return folder


def draw_micro_batches(config: Config, features, rows, schedule, attempt: int, device):
    """The batches of an attempt at a step; each depends on the seed and its own number alone."""
    for micro in range(config.gradient_accumulation_steps):
        micro_step = attempt * config.gradient_accumulation_steps + micro
        generator = generator_for(config.seed, "train", micro_step)
        # LoRA dropout draws from the global generator: seeded apart from the noise of the batch.
        torch.manual_seed(generator_for(config.seed, "dropout", micro_step).initial_seed())
        chosen = rows[batch_indices(len(rows), config.batch_size, micro_step, config.seed)]
        yield draw_batch(
            features, chosen, schedule, config.condition_dropout, generator).to(device)


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is to be done after step `step`."""
    return every > 0 and step % every == 0


def fingerprint(tensor) -> str:
    """SHA-256 of a float32 CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def spread(items: list, count: int) -> list:
    """At most `count` of a list, evenly spaced, in order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def draw_grid(run, config, pipeline, adapter, features, validation) -> None:
    """samples/grid.png: held-out tiles beside what base and adapted model draw from them."""
    pipeline.transformer.eval(), adapter.eval()
    chosen = spread(validation, config.sample_count)  # over the classes
    embeddings = features.embeddings[features.rows(chosen)].to(pipeline.device)
    size = pipeline.transformer.config.sample_size * pipeline.vae.downscale
    settings = {"num_inference_steps": GRID_STEPS, "scheduler": "dpmpp_2m", "seed": config.seed,
                "guidance_scale": config.guidance_scale}
    with torch.no_grad():
        adapted = pipeline(adapter(embeddings), **settings).images
        with lora_disabled(pipeline.transformer):
            base = pipeline(embeddings, **settings).images
    real = [fit_tile(read_tile(tile.path), size, config.tile_fit) for tile in chosen]
    grid = image_grid(list(zip(real, base, adapted)), ("real, held out", "base", "adapted"))
    save_png(run / GRID, grid,
             {**settings, "tiles": [tile.path.name for tile in chosen]})


if __name__ == "__main__":
    sys.exit(main())
