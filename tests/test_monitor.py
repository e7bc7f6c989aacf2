"""monitor.py: what a run shows changes nothing in it; the estimate; the curve's pixels."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

import train
from conftest import assert_same_weights, metrics, weights
from pixcell_min import monitor
from pixcell_min.images import curve_panel, read_settings
from pixcell_min.config import read_yaml


def test_grids_every_so_many_steps_change_no_weight(arguments, tmp_path):
    run = tmp_path / "run"
    dropout = [*arguments, "--lora-dropout", "0.2"]  # which follows train and eval modes
    assert train.main([*dropout, "--out", str(tmp_path / "plain")]) == 0
    assert train.main([*dropout, "--sample-count", "2", "--sample-every", "2"]) == 0
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "grid.png", "step-00000002.png"]
    assert_same_weights(weights(run), weights(tmp_path / "plain"))
    assert len(read_settings(run / "samples" / "step-00000002.png")["tiles"]) == 2
    first, last = (Image.open(run / "samples" / name) for name in ("step-00000002.png", "grid.png"))
    assert first.size == last.size and first.tobytes() != last.tobytes()
    assert train.main([*dropout, "--overwrite"]) == 0
    assert not list((run / "samples").iterdir())  # of the run before


def test_the_curve_is_in_the_run_folder_and_shows_training_and_validation(arguments, tmp_path):
    assert train.main([*arguments, "--ema-decay", "0.9", "--validate-every", "1"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "run" / "loss.png").convert("RGB")).reshape(-1, 3)
    for name, colour in monitor.INK.items():
        rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - np.array(rgb)).sum(1) < 20).any(), name


def test_curves_lie_where_their_points_are():
    panel = np.asarray(curve_panel("t", {"a": [(0, 1.0), (1, 1.0), (2, 3.0)]}, {"a": "#ff0000"},
                                   200, 120))
    red = (panel[:, :, 0] > 200) & (panel[:, :, 1] < 90)
    rows = [np.flatnonzero(red[:, x]).mean() for x in (40, 90, 178)]
    assert rows[0] == rows[1] == pytest.approx(90, abs=2) and rows[2] == pytest.approx(35, abs=4)
    assert curve_panel("t", {}, {}, 200, 120).size == (200, 120)
    curve_panel("t", {"a": [(5, 2.0)]}, {"a": "#ff0000"}, 200, 120)  # one point: no range


def test_the_smoothed_curve_is_the_mean_of_a_tenth_of_the_steps(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(monitor, "curve_panel", lambda title, curves, *rest, **more: (
        seen.update(curves), curve_panel(title, curves, *rest, **more))[1])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": i + 1, "attempt": i + 1, "loss": float(i), "skipped": False}) + "\n"
        for i in range(20)))
    monitor.draw_curve(tmp_path)
    assert seen["training, smoothed"] == [(1, 0.0), *((i + 1, i - 0.5) for i in range(1, 20))]


def test_without_finite_losses_there_is_no_curve(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "attempt": 1, "loss": null, "skipped": true}\n')
    monitor.draw_curve(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_tensorboard_gets_the_numbers_where_it_is_installed(arguments, tmp_path, monkeypatch, capsys):
    scalars, made = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *_):  # or the last numbers would stay in memory
            scalars.append(("closed", None, None))

        def add_scalar(self, *entry):
            scalars.append(entry)

    found = monitor.importlib.util.find_spec
    monkeypatch.setattr(monitor.importlib.util, "find_spec",
                        lambda name: name == "tensorboard" or found(name))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=Writer))
    assert train.main(arguments) == 0
    run = tmp_path / "run"
    assert made == [(run / "tensorboard", 1)] and scalars[-1][0] == "closed"
    losses = [(line["loss"], line["step"]) for line in metrics(run) if "loss" in line]
    assert [entry[1:] for entry in scalars if entry[0] == "loss"] == losses
    assert [entry[2] for entry in scalars if entry[0] == "validation_loss"] == [0, 4]
    bands = [line["validation_bands"] for line in metrics(run) if "validation_bands" in line]
    assert [entry[1] for entry in scalars if entry[0].startswith("validation_bands/")] == [
        loss for its in bands for loss in its if loss is not None]
    assert ("validation_bands/7", bands[1][7], 4) in scalars
    assert train.main(["--resume", "--out", str(run)]) == 0
    assert made[1][1] == 5

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "add_scalar", full)
    capsys.readouterr()
    assert train.main([*arguments, "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "tensorboard cannot be written (No space left on device)" in error and "step 0 is kept" in error
    monkeypatch.setattr(Writer, "add_scalar", lambda *_: None)
    monkeypatch.setattr(Writer, "__exit__", full)  # it writes what it still holds
    assert train.main([*arguments, "--overwrite"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and "step 4 is kept" in error
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: None)
    assert monitor.open_tensorboard(run, 0) is None


def test_dry_run_estimates_time_and_memory_and_is_still_yaml(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--dry-run", "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "out.yaml").write_text(out)
    assert read_yaml(tmp_path / "out.yaml")["lora_rank"] == 2
    assert "# trainable: LoRA 1,536 + adapter 148" in out and ": 5 steps of" in out
    assert "features of 8 tiles, 8 variant(s) each, 1 MB; 2 saved states of 0.0 MB" in out
    assert "2 validations of" in out and "MB at the peak" in out
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert train.main([*arguments, "--dry-run", "--data", "nowhere"]) == 2


def test_the_estimate_counts_what_it_says(arguments, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(monitor.time, "monotonic", lambda: float(next(clock)))  # all takes 1 s
    config = train.parse_train(arguments)[0]
    pipeline = train.load_pixcell_base(config.base, "cpu", "no")
    state = train.make_trainable(config, pipeline)
    lines = monitor.estimate(pipeline, state, 10, 4, 2, (3, 5), 100, 8, 2)
    # 10 · 4 micro-steps, 3 · ⌈5 · 8 / 2⌉ forwards; latents (16, 8, 8), tokens (1, 16)
    assert "time 0:01:40: 10 steps of 4 s, and 3 validations of 20 s" in lines[1]
    assert f"{100 * 8 * 4 * (2 * 1024 + 16) / 1e6:.0f} MB" in lines[2]
    assert json.dumps(lines)
