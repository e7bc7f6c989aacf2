"""What a run keeps on disk, and how it goes on: settings, tiles, log, state, the files to share.

Every file but the log is written whole or not at all. Knows no setting by name and no network.
"""

import json
import math
from pathlib import Path

from pixcell_min import checkpoint
from pixcell_min.adapter import save_adapter
from pixcell_min.lora import save_lora
from pixcell_min.training import TrainingState

STATE, LORA, ADAPTER = "state.pt", "lora_weights.safetensors", "adapter.safetensors"
SETTINGS, TILES = "config.yaml", "tiles.json"
METRICS, GRID = "metrics.jsonl", "samples/grid.png"


def require_state(run: Path) -> None:
    """Raises: ValueError unless there is a run to resume."""
    if not (run / STATE).is_file():
        raise ValueError(f"{run}: no {STATE} to resume from; start the run without --resume")


def check_free(run: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is a run to be replaced. Raises: ValueError."""
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        if not overwrite:
            raise ValueError(f"{run}: exists; go on with --resume, replace it with --overwrite, "
                             "or choose another --out")
        if not ((run / SETTINGS).is_file() and (run / METRICS).is_file()):
            raise ValueError(f"{run}: holds no {SETTINGS} and {METRICS}, so it is no run; "
                             "--overwrite replaces runs only")


def make_run_folder(run: Path, settings: str, training, validation) -> None:
    """Settings and tiles; --overwrite deletes a run's own files, now that base and tiles are good.

    tiles.json names what was trained on and what held out, by path and SHA-256, so that whoever
    measures the run can keep apart what it has seen.
    """
    for name in (STATE, LORA, ADAPTER, METRICS, GRID):
        (run / name).unlink(missing_ok=True)
    checkpoint.write_text(run / SETTINGS, settings)
    checkpoint.write_text(run / TILES, json.dumps(
        {name: [{"path": str(tile.path.resolve()), "hash": checkpoint.file_hash(tile.path)}
                for tile in tiles]
         for name, tiles in (("training", training), ("validation", validation))}, indent=1))


def log(run: Path, progress, values: dict) -> None:
    """Append a line to metrics.jsonl: steps made, attempts at steps, values."""
    values = {"step": progress.step, "attempt": progress.attempt, **values}
    with open(run / METRICS, "a", encoding="utf-8") as file:
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}  # JSON knows no NaN
        file.write(json.dumps(finite) + "\n")


def save_state(run: Path, identity: dict, base, state: TrainingState) -> None:
    """Write the two files to share, then the state to resume from, each whole or not at all."""
    provenance = {"base_hash": identity["base_hash"], "base": str(base),
                  "step": str(state.progress.step)}
    save_lora(state.transformer, run / LORA, provenance)
    save_adapter(state.adapter, run / ADAPTER, provenance)
    checkpoint.save_object(run / STATE, {**identity, **state.state_dict()})


def load_state(run: Path, identity: dict, state: TrainingState) -> None:
    """Put a saved state back. Raises: ValueError if it does not fit."""
    saved = checkpoint.load_object(run / STATE)
    expected = {*identity, *state.state_dict()}
    if not isinstance(saved, dict) or saved.keys() != expected:
        raise ValueError(f"{run / STATE}: not the state of a run; expected {sorted(expected)}")
    for key, value in identity.items():
        if saved[key] != value:
            raise ValueError(f"{run}: cannot resume: {key} was {saved[key]}, is {value}")
    kept = logged_until(run, saved["progress"]["attempt"])
    state.load_state_dict(saved, run / STATE)
    checkpoint.write_text(run / METRICS, kept)


def logged_until(run: Path, attempt: int) -> str:
    """The lines of metrics.jsonl up to an attempt; later ones are logged again. Raises: ValueError."""
    lines = checkpoint.read_text(run / METRICS).splitlines(keepends=True)
    try:
        return "".join(line for line in lines
                       if line.endswith("\n") and json.loads(line)["attempt"] <= attempt)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{run / METRICS}: a line is no log entry; mend or remove it") from None
