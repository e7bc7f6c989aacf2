"""The story of a run: adapt a frozen PixCell to a folder of tiles with LoRA and an adapter.

    python train.py --rank 8 --alpha 16
    python train.py --data tiles --base weights/pixcell-256 --out runs/nct --config config.yaml
    torchrun --nproc-per-node=2 train.py --data tiles --out runs/nct

Without --data it trains on procedural tiles of a second "laboratory", whose stain the embedded base
has never seen.
"""

import math
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.base import (feature_files, features_hash, load_pixcell_base, read_vae_config,
                              settings_hash, vae_weights)
from pixcell_min.batches import draw_micro_batches, generator_for, group_by_class
from pixcell_min.checks import one_line
from pixcell_min.config import Config, changes, parse_train, provenance, read_yaml, to_yaml
from pixcell_min.data import find_tiles, split_tiles, spread
from pixcell_min.distributed import Processes, joined, lost
from pixcell_min.ema import averaged, update_averages
from pixcell_min.features import cached_images, encode_images
from pixcell_min.lora import count_parameters, inject_lora, lora_parameters
from pixcell_min.monitor import draw_curve, draw_grid, estimate, open_tensorboard
from pixcell_min.precision import make_deterministic, refusal
from pixcell_min.precomputed import cached_precomputed, find_precomputed
from pixcell_min.runs import (GRID, RECORD, SETTINGS, check_new, check_resumable, describe_session,
                              kept, load_state, lock, log, require_state, resume_command,
                              resume_run, save_shared, save_state, start_run, state_files, unlock)
from pixcell_min.signals import StopSignals, Terminated, sigterm_interrupts
from pixcell_min.tools.synthetic import PROCEDURAL_TILES, second_laboratory
from pixcell_min.training import (Progress, TrainingState, build_optimizer, build_scaler,
                                  check_attempt, count_attempt, count_validation,
                                  diffusion_loss, is_due, optimizer_step, rate_factor,
                                  validation_loss)

PACKAGE = Path(__file__).resolve().parent / "pixcell_min"
MAX_VALIDATION_TILES = 64  # spread over the held-out tiles; more would take longer than training


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    argv, config = sys.argv[1:] if argv is None else list(argv), None
    try:
        config, options = parse_train(argv)
        if options.resume and options.config is None:  # its own settings, then this call's flags
            require_state(Path(config.out))
            config, options = parse_train([*argv, "--config", str(Path(config.out) / SETTINGS)])
        with (sigterm_interrupts(), joined(config.device) as processes,
              open(os.devnull, "w") as silence,
              nullcontext() if processes.is_first else redirect_stdout(silence)):
            if options.dry_run:
                preview(config, processes)
                return 0
            return train(config, options, ["python", "train.py", *argv], processes)
    except (ValueError, OSError) as error:
        line = error
    except (RuntimeError, MemoryError) as error:
        if lost(error):
            line = "another process of this run has ended; see its message"
        elif line := refusal(error):
            line = f"{line}; {kept(Path(config.out))}"
        else:
            raise  # a fault of ours: with its traceback
    except KeyboardInterrupt as stop:
        saved = config and state_files(run := Path(config.out))
        go_on = f"; {kept(run)}" if saved else " before any save; the cache keeps encoded tiles"
        print(f"train.py: interrupted{go_on}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    finally:
        unlock()
    print(f"train.py: error: {one_line(line)}", file=sys.stderr)
    return 2


def train(config: Config, options, command, processes=Processes()) -> int:
    """One run, from tiles to a run folder; → exit code: 0, or 128 + the signal that stopped it.

    Of several processes the first one writes. Raises: ValueError for whatever the caller can mend.
    """
    run = Path(config.out)
    if processes.is_first:
        check_run_folder(run, config, options)
    check_shares(config, processes)
    if config.deterministic:
        make_deterministic()
    with processes.one_first():
        tiles = (find_precomputed(config.features) if config.features else
                 find_tiles(config.data or second_laboratory(config.cache)))
    if config.class_balanced:
        group_by_class(tiles)  # refused now, not after hours of encoding
    pipeline = load_pixcell_base(
        config.base, processes.device(config.device), config.mixed_precision)
    transformer, schedule, dtype = pipeline.transformer, pipeline.schedule, pipeline.dtype
    state = make_trainable(config, pipeline)
    with processes.one_first():
        features, training, validation = load_features(config, pipeline, tiles)
    training_rows = features.rows(training)
    # What a saved state must agree with to be continued.
    identity = {"base_hash": pipeline.base_hash, "base_settings": settings_hash(config.base),
                "dtype": str(dtype), "tiles": features.fingerprint(training),
                "held_out": features.fingerprint(validation)}
    total = total_steps(config, len(training))
    classes = group_by_class(training) if config.class_balanced else None
    batches_of = partial(draw_micro_batches, features, training_rows, schedule, config.batch_size,
                         config.gradient_accumulation_steps, config.condition_dropout, classes,
                         config.seed, pipeline.device, processes.rank, processes.size)
    begin(run, config, options, command, identity, state, features.settings, training, validation,
          processes)
    validation = spread(validation, MAX_VALIDATION_TILES)
    board = open_tensorboard(run, state.progress.step) if processes.is_first else None
    note = processes.by_first(partial(log, run, board))
    loss_of = processes.parallel(
        lambda batch: diffusion_loss(transformer, state.adapter, schedule, batch, dtype,
                                     config.loss_weighting, config.min_snr_gamma,
                                     config.vlb_weight), state.parameters)
    measure = partial(validation_loss, transformer, state.adapter, schedule, features,
                      features.rows(validation), config.batch_size, config.seed, dtype)
    draw = processes.by_first(lambda name: draw_grid(
        run / name, pipeline, state.adapter, features, spread(validation, config.sample_count),
        config.guidance_scale, config.seed, None if config.features else config.tile_fit))
    save = processes.by_first(partial(save_run, run, config, identity, state))
    check = partial(validate, state, partial(processes.from_first, measure), note)

    try:
        with StopSignals() as stop, board or nullcontext():  # whose end writes, too
            if state.progress.attempt == 0:  # so a resumed run validates again, and as a new one
                check()
            fit(config, total, state, loss_of, batches_of, note, check, draw, save, stop, processes)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {kept(run, error)}") from None
    if stop.received and processes.is_first:
        print(f"train.py: stopped by {signal.Signals(stop.received).name} after step "
              f"{state.progress.step}, saved; go on with: {resume_command(run)}"
              f"{' (or torchrun … train.py …)' * (processes.size > 1)}", file=sys.stderr)
    if stop.received:
        return 128 + stop.received
    if config.sample_count:
        draw(GRID)
    print(f"done: {run}\nnext: python sample.py --run {run} --image TILE --compare")
    return 0


def begin(run: Path, config: Config, options, command, identity, state, features, training,
          validation, processes) -> None:
    """Make the run's folder, or take it up where it was saved; either way note this session.

    Afterwards all processes are in the state of the first, which did it. Raises: ValueError.
    """
    processes.require_equal(identity)

    def by_first():
        session = describe_session(
            command, {"base": identity["base_hash"],
                      **{key: identity[key] for key in ("base_settings", "tiles", "held_out")}},
            [Path(__file__), *PACKAGE.glob("*.py")], seed=config.seed, features=features,
            precision=identity["dtype"], deterministic=config.deterministic,
            processes=processes.size)
        lock(run)
        if options.resume:
            note = partial(print, "train.py: note:", file=sys.stderr)
            load_state(run, identity, state, note)
            resume_run(run, session, to_yaml(config), state, note)
            if state.progress.step:  # a kill between two files may have left them of two steps
                save_shared(run, state, identity, provenance(config))
        else:
            start_run(run, options.overwrite, session, to_yaml(config), training, validation)
            save_state(run, identity, state, config.keep_states)  # from now on --resume works
        return state.state_dict()

    content = processes.from_first(by_first)
    if not processes.is_first:
        state.load_state_dict(content, "process 0")


def save_run(run: Path, config: Config, identity, state) -> None:
    """State, files to share and loss curve."""
    save_state(run, identity, state, config.keep_states)
    save_shared(run, state, identity, provenance(config))
    draw_curve(run)


def validate(state: TrainingState, measure, note) -> None:
    """Note the validation loss, of the averaged weights too, where there are any."""
    loss, bands = measure()
    values = {"validation_loss": loss, "validation_bands": bands}
    if state.averages:
        with averaged(state.parameters, state.averages):
            values["validation_loss_ema"] = measure()[0]
    count_validation(state.progress, loss)
    note(state.progress, values)
    tqdm.write(f"validation loss at step {state.progress.step}: {loss:.5f}")


def fit(config: Config, total: int, state: TrainingState, loss_of, batches_of, note, check, draw,
        save, stop, processes) -> None:
    """Steps until `total` are made, a signal comes or validation no longer improves; then save."""
    state.transformer.train(), state.adapter.train()
    progress, began = state.progress, time.monotonic()

    def exhausted():
        return 0 < config.early_stop <= progress.validations_since_best

    def stopped():  # all processes stop at the step at which one got a signal
        received = processes.highest(stop.received or 0)
        stop.received = received or stop.received  # which may have come meanwhile
        return received

    with tqdm(total=total, initial=progress.step, desc="training", unit="step",
              disable=not processes.is_first) as bar:
        while progress.step < total and not exhausted() and not stopped():
            factor = rate_factor(progress.step, config.warmup_steps, total, config.lr_schedule)
            for group in state.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            report = optimizer_step(
                loss_of, batches_of(progress.attempt),
                config.batch_size * config.gradient_accumulation_steps, state.optimizer,
                state.scaler, config.max_grad_norm, processes)
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
                check()  # before saving: a resumed run drops what was logged after its save
            if config.sample_count and is_due(progress.step, config.sample_every) and not last:
                draw(f"samples/step-{progress.step:08d}.png")
            if is_due(progress.step, config.save_every) or last or exhausted():
                save()
        if exhausted():
            tqdm.write(f"stopped early at step {progress.step}: no lower validation loss than "
                       f"{progress.best_loss:.5f} in {config.early_stop} validations")
        if stopped():
            save()


def check_run_folder(run: Path, config: Config, options) -> None:
    """Before any loading or deleting, refuse to lose or mix up runs. Raises: ValueError."""
    if options.resume:
        check_resumable(run)
    else:
        check_new(run, options.overwrite)
    if (run / RECORD).is_file():  # now, not after hours of encoding
        lock(run)
    if not options.resume:
        return
    refused, free = changes(Config(**read_yaml(run / SETTINGS)), config)
    note = f"other settings, of no effect on the result: {'; '.join(free)}"
    if refused:
        raise ValueError(f"{run}: cannot resume with other settings: {'; '.join(refused)}"
                         f"{f'; {note}' if free else ''}")
    if free:
        print(f"train.py: note: {note}", file=sys.stderr)


def check_shares(config: Config, processes: Processes) -> None:
    """Raises: ValueError unless each process gets as many micro-batches of a step."""
    if config.gradient_accumulation_steps % processes.size:
        raise ValueError(
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps}: cannot be shared "
            f"evenly by {processes.size} processes; give a multiple of {processes.size}")


def preview(config: Config, processes=Processes()) -> None:
    """--dry-run: print the settings as YAML and, as its comments, what the run would take."""
    check_shares(config, processes)
    comment = partial(print, "#")
    count = (len(find_precomputed(config.features)) if config.features else
             len(find_tiles(config.data)) if config.data else PROCEDURAL_TILES)
    pipeline = load_pixcell_base(
        config.base, processes.device(config.device), config.mixed_precision)
    state = make_trainable(config, pipeline, comment)
    held_out = min(max(round(count * config.validation_fraction), 1), count - 1)
    steps = total_steps(config, count - held_out)
    every = config.validate_every or steps
    for line in estimate(
            pipeline, state, steps, config.gradient_accumulation_steps // processes.size,
            config.batch_size, (1 + math.ceil(steps / every), min(held_out, MAX_VALIDATION_TILES)),
            count, 8 if config.dihedral and not config.features else 1, config.keep_states):
        comment(line)
    if not config.features:
        size = sum(path.stat().st_size for path in feature_files(config.base))
        comment(f"encoding tiles that are not in the cache: {size / 1e6:.0f} MB of VAE and "
                "encoder, let go before training starts")
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
    if config.compile:
        transformer.compile_blocks()
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
              "report": lambda line: print(one_line(line), file=sys.stderr)}
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


if __name__ == "__main__":
    sys.exit(main())
