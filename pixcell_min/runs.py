"""What a run keeps on disk, and how it goes on: record, settings, tiles, log, states, shared files.

A kill at any moment leaves a folder that `--resume` continues bit for bit: every file but the log
is written whole or not at all, a state before the files to share, and older states go last. Knows
no setting by name and no network.
"""

import hashlib
import json
import math
import os
import platform
import shlex
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from pixcell_min import checkpoint
from pixcell_min.adapter import save_adapter
from pixcell_min.ema import averaged
from pixcell_min.lora import save_lora
from pixcell_min.training import Diverged, Progress, TrainingState

RECORD, SETTINGS, TILES, LOCK = "run.json", "config.yaml", "tiles.json", ".lock"
STATES, METRICS, GRID = "states", "metrics.jsonl", "samples/grid.png"
LORA, ADAPTER = "lora_weights.safetensors", "adapter.safetensors"
LORA_EMA, ADAPTER_EMA = "lora_weights_ema.safetensors", "adapter_ema.safetensors"
OWN_FILES = (METRICS, LORA, ADAPTER, LORA_EMA, ADAPTER_EMA, GRID, f"{STATES}/step-*.pt", "loss.png",
             "samples/step-*.png", "tensorboard/events.*")  # what --overwrite deletes
PACKAGES = ("torch", "numpy", "timm", "safetensors", "einops", "pillow")


# ---------------------------------------------------------------- may this folder be used?


def check_new(run: Path, overwrite: bool) -> None:
    """Refuse a folder not writable or in use, but by a run to be replaced. Raises: ValueError."""
    if run.is_file() or (run.is_dir() and any(not _is_temporary(path) for path in run.iterdir())):
        resume = f"go on with {resume_command(run)}, " if state_files(run) else ""
        if not overwrite:
            raise ValueError(f"{run}: exists; {resume}replace it with --overwrite, or choose "
                             "another --out")
        if not (run / RECORD).is_file() and not all(
                (run / name).is_file() for name in (SETTINGS, METRICS)):
            raise ValueError(f"{run}: holds no {RECORD}, nor {SETTINGS} and {METRICS}, so it is no "
                             "run; --overwrite replaces runs only")
    check_writable(run)


def check_writable(run: Path, mend="choose another --out") -> None:
    """Raises: ValueError if nothing can be written there, before anything long is begun."""
    folder = run
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{run}: cannot be written, {folder.absolute()} is read-only; {mend}")


def require_state(run: Path) -> None:
    """Raises: ValueError unless there is a run to resume."""
    if not state_files(run):
        raise ValueError(f"{run}: no {STATES}/step-*.pt to resume from; start the run without "
                         "--resume")


def check_resumable(run: Path) -> None:
    """Raises: ValueError unless the folder holds a run that can go on; nothing is written yet."""
    require_state(run)
    check_writable(run, "make it writable; what was saved in it stays")
    read_sessions(run)


def resume_command(run: Path) -> str:
    """What to type to go on."""
    return f"python train.py --resume --out {shlex.quote(str(run))}"


def _is_temporary(path):
    return path.name == LOCK or path.name.startswith(".") and path.suffix == ".tmp"


_locks = {}  # run → open file: a lock ends with its file, at the latest with the process


def lock(run: Path) -> None:
    """Make the folder and keep other processes out until `unlock`. Raises: ValueError if one is in.

    On POSIX alone; a file system without locks keeps nobody out.
    """
    run.mkdir(parents=True, exist_ok=True)
    if os.name == "posix" and run not in _locks:
        import fcntl  # which other systems lack
        _locks[run] = file = open(run / LOCK, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run}: another process trains in it; wait for its end, stop it, or "
                             "choose another --out") from None
        except OSError:
            pass


def unlock() -> None:
    """Let other processes in again."""
    while _locks:
        _locks.popitem()[1].close()


# ---------------------------------------------------------------- record


def describe_session(command, hashes: dict, code, **facts) -> dict:
    """What one process of a run was: when, where, by which versions, threads and code.

    code: the source files whose contents `code` is the hash of; facts: further entries.
    """
    digest = hashlib.sha256("".join(checkpoint.file_hash(path) for path in sorted(code)).encode())
    return {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(command), **facts,
            "hashes": {**hashes, "code": digest.hexdigest()},
            "versions": {"python": platform.python_version(),
                         **{name: version(name) for name in PACKAGES}},
            "threads": torch.get_num_threads(), "system": platform.platform(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def start_run(run: Path, overwrite: bool, session: dict, settings: str, training,
              validation) -> None:
    """Record, tiles, settings; --overwrite deletes a run's own files, now that all else is good.

    The record comes first: a folder that has it may be overwritten. tiles.json names what was
    trained on and what held out, by path and SHA-256, so that whoever measures the run can keep
    apart what it has seen. Raises: ValueError, with nothing deleted, if a tile cannot be hashed.
    """
    if (run / RECORD).is_file():  # perhaps since it was checked, by another process
        check_new(run, overwrite)
    named = {name: [{"path": str(tile.path.resolve()), "hash": checkpoint.file_hash(tile.path)}
                    for tile in tiles]
             for name, tiles in (("training", training), ("validation", validation))}
    remove_temporary(run)  # only now: a tile that could not be hashed has raised
    for pattern in OWN_FILES:
        for path in run.glob(pattern):
            path.unlink()
    _write_json(run / RECORD, {"sessions": [{"from_step": 0, **session}]})
    _write_json(run / TILES, named)
    checkpoint.write_text(run / SETTINGS, settings)
    checkpoint.write_text(run / METRICS, "")


def _write_json(path, content):
    checkpoint.write_text(path, json.dumps(content, indent=1) + "\n")


def remove_temporary(run: Path) -> None:
    """Delete what a kill within a write has left."""
    for folder in (run, run / STATES, (run / GRID).parent):
        for path in folder.glob(".*.tmp"):
            path.unlink()


# ---------------------------------------------------------------- log


def log(run: Path, board, progress, values: dict) -> None:
    """Append a line to metrics.jsonl: steps made, attempts at steps, values. Raises: ValueError.

    board: a TensorBoard writer that gets the finite numbers too, bands as KEY/0…, or None.
    """
    finite = _finite({"step": progress.step, "attempt": progress.attempt, **values})
    try:
        with open(run / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        for key, value in finite.items() if board else ():
            bands = value if isinstance(value, list) else [value]
            for band, number in enumerate(bands):
                if isinstance(number, float):
                    name = f"{key}/{band}" if bands is value else key
                    board.add_scalar(name, number, progress.step)
    except OSError as error:
        raise ValueError(f"{run}: {METRICS} or tensorboard cannot be written ({error.strerror})"
                         ) from None


def _finite(value):
    """The same with None for what is not finite, at any depth: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(its) for key, its in value.items()}
    if isinstance(value, list):
        return [_finite(its) for its in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, but for one cut short by a kill. Raises: ValueError."""
    try:
        lines = [json.loads(line) for line in
                 checkpoint.read_text(run / METRICS).splitlines(keepends=True) if line[-1] == "\n"]
        [line["attempt"] + line["step"] for line in lines]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ValueError) and METRICS in str(error):
            raise
        raise ValueError(f"{run / METRICS}: a line is no log entry; mend or remove it") from None
    return lines


# ---------------------------------------------------------------- states


def state_files(run: Path) -> list[Path]:
    """The saved states, the newest first."""
    return checkpoint.state_files(run / STATES)


def save_state(run: Path, identity: dict, state: TrainingState, keep: int) -> None:
    """Write what is needed to go on from here; the `keep` newest states stay.

    identity: what a process must agree in to go on, {name: text}. Raises: ValueError, with the
    earlier states intact, if it cannot be written.
    """
    checkpoint.save_state(
        run / STATES, state.progress.step, {**identity, **state.state_dict()}, keep)


def load_state(run: Path, identity: dict, state: TrainingState, report) -> None:
    """Put the newest intact state back and drop what was logged after it; `report(line)` the loss.

    Raises: ValueError, with nothing changed, if none is intact or it is of another run.
    """
    saved, path, failures = checkpoint.load_newest_state(
        run / STATES, {*identity, *state.state_dict()})
    if changed := [f"{key} was {saved[key]}, is {value}" for key, value in identity.items()
                   if str(saved[key]) != value]:
        raise ValueError(f"{run}: cannot resume: {'; '.join(changed)}")
    kinds = {key: type(value) for key, value in vars(Progress()).items()}
    if not isinstance(its := saved["progress"], dict) or kinds != {k: type(its[k]) for k in its}:
        raise ValueError(f"{path}: its progress is {its}, expected "
                         f"{', '.join(vars(Progress()))}: of another version of this code?")
    kept = [line for line in read_log(run) if line["attempt"] <= saved["progress"]["attempt"]]
    state.load_state_dict(saved, path)
    if not state.progress.attempt:  # saved before the first validation, which is made anew
        kept, state.progress = [], Progress()
    for failed, error in failures:
        lost = checkpoint.state_step(failed) - state.progress.step
        report(f"{error}; {lost} steps are lost: going on from {path.name}")
    checkpoint.write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def read_sessions(run: Path) -> list[dict]:
    """What run.json tells of the sessions so far. Raises: ValueError: missing, or not a run's."""
    sessions = checkpoint.read_json(run / RECORD).get("sessions")
    if not isinstance(sessions, list) or not sessions or not all(
            isinstance(its, dict) and isinstance(its.get("versions"), dict)
            and isinstance(its.get("hashes"), dict) for its in sessions):
        raise ValueError(f'{run / RECORD}: expected {{"sessions": […]}}, as train.py writes it')
    return sessions


def resume_run(run: Path, session: dict, settings: str, state: TrainingState, report) -> None:
    """Note the session and the settings of a run that goes on; `report(line)` other versions.

    Raises: ValueError if the run's record is not what `train.py` writes.
    """
    sessions = read_sessions(run)
    then, now = ({**its["versions"], "pixcell_min's code": str(its["hashes"].get("code"))[:8],
                  "threads": its.get("threads"), "processes": its.get("processes", 1)}
                 for its in (sessions[-1], session))
    changed = [f"{key} {then.get(key)} → {its}" for key, its in now.items() if then.get(key) != its]
    if changed:
        report(f"changed since the run began: {', '.join(changed)}; it may differ from an "
               "uninterrupted one in its last bits")
    remove_temporary(run)
    sessions.append({"from_step": state.progress.step, **session})
    _write_json(run / RECORD, {"sessions": sessions})
    checkpoint.write_text(run / SETTINGS, settings)


def kept(run: Path, error=None) -> str:
    """What is left after an error, and how to go on, or after `Diverged`, how to start anew."""
    if not state_files(run):
        return "nothing was saved yet"
    newest = checkpoint.newest_intact(run / STATES)
    step = f"step {checkpoint.state_step(newest)}" if newest else "no step"
    if isinstance(error, Diverged):  # a resume refuses other settings and would repeat these
        return ("start anew so, with another --out or with --overwrite; what was saved at "
                f"{step} stays in {run}")
    return (f"{step} is kept: {resume_command(run)}" if newest else
            f"no state in {run} can be read: start again with --overwrite")


# ---------------------------------------------------------------- files to share


def save_shared(run: Path, state: TrainingState, identity: dict, provenance: dict) -> None:
    """Write LoRA and adapter, and the pair of their averages.

    Headers hold `provenance`, the hashes of base and data, step, and the newest session's versions.
    """
    versions = checkpoint.read_json(run / RECORD)["sessions"][-1]["versions"]
    header = {**provenance, "base_hash": identity["base_hash"], "data_hash": identity["tiles"],
              "step": state.progress.step, "versions": versions}
    header = {key: value if isinstance(value, str) else json.dumps(value)
              for key, value in header.items()}  # a header holds texts alone
    save_lora(state.transformer, run / LORA, header)
    save_adapter(state.adapter, run / ADAPTER, header)
    if state.averages:
        with averaged(state.parameters, state.averages):
            save_lora(state.transformer, run / LORA_EMA, {**header, "averaged": "true"})
            save_adapter(state.adapter, run / ADAPTER_EMA, {**header, "averaged": "true"})


def shared_files(run: Path, ema: bool = False) -> tuple[Path, Path]:
    """(LoRA file, adapter file) of a run, `ema`: of its averaged weights.

    Raises: ValueError if they are missing, or of different steps.
    """
    paths = (run / LORA_EMA, run / ADAPTER_EMA) if ema else (run / LORA, run / ADAPTER)
    if ema and run.is_dir() and not paths[0].exists():
        raise ValueError(f"{run}: no {LORA_EMA}; averages are kept by train.py --ema-decay 0.999")
    steps = [checkpoint.read_tensors(path)[1].get("step") for path in paths]
    if steps[0] != steps[1]:
        raise ValueError(f"{run}: {paths[0].name} is of step {steps[0]}, {paths[1].name} of step "
                         f"{steps[1]}: the run was killed while it wrote them; mend it by "
                         f"{resume_command(run)}")
    return paths
