"""The story of a run: adapt a frozen PixCell to a folder of tiles with LoRA and an adapter.

    python train.py --rank 8 --alpha 16
    python train.py --data tiles --base weights/pixcell-256 --out runs/nct --config config.yaml

Without --data it trains on procedural tiles of a second "laboratory", whose stain the embedded base
has never seen.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.base import features_hash, load_pixcell_base, read_vae_config, vae_weights
from pixcell_min.config import Config, parse_train, provenance, read_yaml, to_yaml
from pixcell_min.data import find_tiles, split_tiles, spread
from pixcell_min.ema import averaged, update_averages
from pixcell_min.features import cached_images, encode_images
from pixcell_min.lora import count_parameters, inject_lora, lora_parameters
from pixcell_min.monitor import draw_curve, draw_grid, estimate, open_tensorboard
from pixcell_min.precision import make_deterministic, refusal
from pixcell_min.precomputed import cached_precomputed, find_precomputed
from pixcell_min.runs import (GRID, SETTINGS, StopSignals, check_new, check_writable,
                              describe_session, kept, load_state, lock, log, require_state,
                              resume_command, resume_run, save_shared, save_state, start_run,
                              state_files, unlock)
from pixcell_min.tools.synthetic import SECOND, drawn_once
from pixcell_min.training import (Progress, TrainingState, build_optimizer, build_scaler,
                                  check_attempt, count_attempt, count_validation,
                                  diffusion_loss, draw_micro_batches, generator_for, group_by_class,
                                  is_due, optimizer_step, rate_factor, validation_loss)

PACKAGE = Path(__file__).resolve().parent / "pixcell_min"
PROCEDURAL_TILES = 72  # 8 of each tissue
PROCEDURAL_SEED = 10**9  # the base's pretraining used lower ones: the same tissue in another stain
MAX_VALIDATION_TILES = 64  # spread over the held-out tiles; more would take longer than training
# Settings that a resumed run may change: they touch neither a drawn number nor a weight.
FREE_ON_RESUME = {"out", "cache", "decode_workers", "save_every", "validate_every", "sample_count",
                  "guidance_scale", "keep_states", "sample_every"}


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    argv, config = sys.argv[1:] if argv is None else list(argv), None
    try:
        config, options = parse_train(argv)
        if options.resume and options.config is None:  # its own settings, then this call's flags
            require_state(Path(config.out))
            config, options = parse_train([*argv, "--config", str(Path(config.out) / SETTINGS)])
        if options.dry_run:
            preview(config)
            return 0
        return train(config, options, ["python", "train.py", *argv])
    except (ValueError, OSError) as error:
        line = error
    except (RuntimeError, MemoryError) as error:
        if not (line := refusal(error)):
            raise  # a fault of ours: with its traceback
        line = f"{line}; {kept(Path(config.out))}"
    except KeyboardInterrupt:
        saved = config and state_files(run := Path(config.out))
        go_on = f"; {kept(run)}" if saved else " before any save"
        print(f"train.py: interrupted{go_on}", file=sys.stderr)
        return 130
    finally:
        unlock()
    print(f"train.py: error: {line}", file=sys.stderr)
    return 2


def train(config: Config, options, command) -> int:
    """One run, from tiles to a run folder; → exit code: 0, or 128 + the signal that stopped it.

    Raises: ValueError for whatever the caller can mend.
    """
    run = Path(config.out)
    check_run_folder(run, config, options)
    if config.deterministic:
        make_deterministic()
    tiles = (find_precomputed(config.features) if config.features else
             find_tiles(config.data or procedural_tiles(config)))
    pipeline = load_pixcell_base(config.base, config.device, config.mixed_precision)
    transformer, schedule, dtype = pipeline.transformer, pipeline.schedule, pipeline.dtype
    state = make_trainable(config, pipeline)
    features, training, validation = load_features(config, pipeline, tiles)
    training_rows = features.rows(training)
    # What a saved state must agree with to be continued.
    identity = {"base_hash": pipeline.base_hash, "dtype": str(dtype),
                "tiles": features.fingerprint(training_rows)}
    total = total_steps(config, len(training))
    classes = group_by_class(training) if config.class_balanced else None
    batches_of = partial(draw_micro_batches, features, training_rows, schedule, config.batch_size,
                         config.gradient_accumulation_steps, config.condition_dropout, classes,
                         config.seed, pipeline.device)
    begin(run, config, options, command, identity, state, training, validation)
    validation = spread(validation, MAX_VALIDATION_TILES)
    note = partial(log, run, board := open_tensorboard(run, state.progress.step))

    def loss_of(batch):
        return diffusion_loss(transformer, state.adapter, schedule, batch, dtype,
                              config.loss_weighting, config.min_snr_gamma, config.vlb_weight)

    measure = partial(validation_loss, transformer, state.adapter, schedule, features,
                      features.rows(validation), config.batch_size, config.seed, dtype)

    def validate():
        loss, bands = measure()
        values = {"validation_loss": loss, "validation_bands": bands}
        if state.averages:
            with averaged(state.parameters, state.averages):
                values["validation_loss_ema"] = measure()[0]
        count_validation(state.progress, loss)
        note(state.progress, values)
        tqdm.write(f"validation loss at step {state.progress.step}: {loss:.5f}")

    def draw(name):
        draw_grid(run / name, pipeline, state.adapter, features,
                  spread(validation, config.sample_count), config.guidance_scale, config.seed,
                  None if config.features else config.tile_fit)

    def save():
        save_state(run, identity, state, config.keep_states)
        save_shared(run, state, identity, provenance(config))
        draw_curve(run)

    with StopSignals() as stop, board or nullcontext():
        try:
            if state.progress.attempt == 0:  # so a resumed run validates again, and as a new one
                validate()
            fit(config, total, state, loss_of, batches_of, note, validate, draw, save, stop)
        except ValueError as error:
            raise ValueError(f"{error}; {kept(run, error)}") from None
    if stop.received:
        print(f"train.py: stopped by {signal.Signals(stop.received).name} after step "
              f"{state.progress.step}, saved; go on with: {resume_command(run)}", file=sys.stderr)
        return 128 + stop.received
    if config.sample_count:
        draw(GRID)
    print(f"done: {run}\nnext: python sample.py --run {run} --image TILE --compare")
    return 0


def begin(run: Path, config: Config, options, command, identity, state, training,
          validation) -> None:
    """Make the run's folder, or take it up where it was saved; either way note this session."""
    session = describe_session(
        command, {"base": identity["base_hash"], "embeddings": identity["tiles"]},
        [Path(__file__), *PACKAGE.glob("*.py")], seed=config.seed,
        precision=identity["dtype"], deterministic=config.deterministic)
    lock(run)
    if not options.resume:
        start_run(run, options.overwrite, session, to_yaml(config), training, validation)
        save_state(run, identity, state, config.keep_states)  # so that --resume works from now on
        return
    note = partial(print, "train.py: note:", file=sys.stderr)
    load_state(run, identity, state, note)
    resume_run(run, session, to_yaml(config), state, note)
    if state.progress.step:  # a kill between the two files may have left them of different steps
        save_shared(run, state, identity, provenance(config))


def fit(config: Config, total: int, state: TrainingState, loss_of, batches_of, note, validate, draw,
        save, stop) -> None:
    """Steps until `total` are made, a signal comes or validation stops improving; then all is saved."""
    state.transformer.train(), state.adapter.train()
    progress, began = state.progress, time.monotonic()

    def exhausted():
        return 0 < config.early_stop <= progress.validations_since_best

    with tqdm(total=total, initial=progress.step, desc="training", unit="step") as bar:
        while progress.step < total and not stop.received and not exhausted():
            factor = rate_factor(progress.step, config.warmup_steps, total, config.lr_schedule)
            for group in state.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            report = optimizer_step(
                loss_of, batches_of(progress.attempt),
                config.batch_size * config.gradient_accumulation_steps, state.optimizer,
                state.scaler, config.max_grad_norm)
            count_attempt(progress, report)
            rates = [group["lr"] for group in state.optimizer.param_groups]
            note(progress, {
                "loss": report.loss, "grad_norm": report.grad_norm, "lora_rate": rates[0],
                "adapter_rate": rates[1], "loss_scale": report.loss_scale,
                "skipped": report.skipped, "skipped_so_far": progress.skipped,
                "seconds": round(time.monotonic() - began, 3)})
            check_attempt(state, report)  # once it is logged
            if state.averages and not report.skipped:
                update_averages(state.averages, state.parameters, config.ema_decay, progress.step)
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
            if config.sample_count and is_due(progress.step, config.sample_every) and not last:
                draw(f"samples/step-{progress.step:08d}.png")
            if is_due(progress.step, config.save_every) or last or exhausted():
                save()
        if exhausted():
            tqdm.write(f"stopped early at step {progress.step}: no lower validation loss than "
                       f"{progress.best_loss:.5f} in {config.early_stop} validations")
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
    free = FREE_ON_RESUME - ({"validate_every"} if config.early_stop else set())  # it decides the end
    if refused := [line for name, line in changed.items() if name not in free]:
        raise ValueError(f"{run}: cannot resume with other settings: {'; '.join(refused)}")
    if changed:
        print(f"train.py: note: other settings, of no effect on the result: "
              f"{'; '.join(changed.values())}", file=sys.stderr)


def preview(config: Config) -> None:
    """--dry-run: print the settings as YAML and, as its comments, what the run would take."""
    comment = partial(print, "#")
    count = (len(find_precomputed(config.features)) if config.features else
             len(find_tiles(config.data)) if config.data else PROCEDURAL_TILES)
    pipeline = load_pixcell_base(config.base, config.device, config.mixed_precision)
    state = make_trainable(config, pipeline, comment)
    held_out = min(max(round(count * config.validation_fraction), 1), count - 1)
    steps = total_steps(config, count - held_out)
    every = config.validate_every or steps
    for line in estimate(
            pipeline, state, steps, config.gradient_accumulation_steps, config.batch_size,
            (1 + math.ceil(steps / every), min(held_out, MAX_VALIDATION_TILES)), count,
            8 if config.dihedral and not config.features else 1, config.keep_states):
        comment(line)
    print(to_yaml(config), end="")


def total_steps(config: Config, num_tiles: int) -> int:
    """How many optimizer steps the run makes with so many training tiles."""
    if config.epochs is None:
        return config.max_train_steps
    return math.ceil(
        config.epochs * num_tiles / (config.batch_size * config.gradient_accumulation_steps))


def make_trainable(config: Config, pipeline, report=print) -> TrainingState:
    """Wrap with LoRA, make adapter and optimizer, say what is trainable. Raises: ValueError."""
    transformer, shape = pipeline.transformer, pipeline.transformer.config
    if config.vlb_weight and shape.out_channels != 2 * shape.in_channels:
        raise ValueError(f"vlb_weight {config.vlb_weight:g}: {config.base} learns no variance "
                         f"({shape.out_channels} output channels of {shape.in_channels} latents)")
    inert = set(transformer.inert_layers()) if "attn2" in config.lora_attention else set()
    inject_lora(transformer, config.lora_rank, config.lora_alpha, config.lora_target_modules,
                config.lora_attention, config.lora_blocks, inert, config.lora_dropout,
                config.lora_init, config.use_rslora, generator=generator_for(config.seed, "lora"))
    adapter = EmbeddingAdapter(transformer.config.caption_channels,
                               generator=generator_for(config.seed, "adapter"))
    adapter.to(pipeline.device)
    transformer.gradient_checkpointing = config.gradient_checkpointing
    (lora, inside), (outside, _) = count_parameters(transformer), count_parameters(adapter)
    report(f"trainable: LoRA {lora:,} + adapter {outside:,} = {lora + outside:,} parameters, "
           f"{100 * (lora + outside) / (inside + outside):.2f} % of {inside + outside:,}")
    if inert:
        report(f"not adapted: {len(inert)} query and key layers of cross-attention, which with one "
              "condition token cannot change the image (softmax over one key is 1)")
    report(f"device {pipeline.device}, autocast {pipeline.dtype or 'off'}, "
           f"base {pipeline.base_hash[:12]}")
    optimizer = build_optimizer(
        lora_parameters(transformer), adapter.parameters(), config.learning_rate,
        config.adapter_learning_rate, config.weight_decay)
    state = TrainingState(transformer, adapter, optimizer,
                          build_scaler(pipeline.device, pipeline.dtype), Progress())
    if config.ema_decay:
        state.averages = [parameter.detach().clone() for parameter in state.parameters]
    return state


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
            how=config.tile_fit, dihedral=config.dihedral, device=pipeline.device, **common)
    pipeline.release()
    training, validation = split_tiles(features.tiles, config.validation_fraction, config.seed)
    print(f"tiles: {len(training)} to train on, {len(validation)} held out; latents and embeddings "
          f"in {features.variants} variant(s) each, {features.nbytes / 1e6:.0f} MB, memory-mapped")
    return features, training, validation


def procedural_tiles(config: Config) -> Path:
    """Folder of the second laboratory's procedural tiles, drawn once; appears when complete."""
    folder = Path(config.cache) / f"procedural-second-{PROCEDURAL_TILES}-{PROCEDURAL_SEED}"
    return drawn_once(folder, PROCEDURAL_TILES, SECOND, PROCEDURAL_SEED)


if __name__ == "__main__":
    sys.exit(main())
