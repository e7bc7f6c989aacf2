"""train.py end to end on a tiny random base: what it writes and refuses, resuming, one step."""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import ROOT, assert_same_weights, metrics, weights, write_base
from pixcell_min import base as base_module
from pixcell_min import training
from pixcell_min.adapter import EmbeddingAdapter, load_adapter
from pixcell_min.base import load_pixcell_base
from pixcell_min.batches import Batch, draw_micro_batches
from pixcell_min.checkpoint import read_json, read_tensors, save_tensors
from pixcell_min.config import Config, read_yaml
from pixcell_min.data import find_tiles, fit_tile, read_tile
from pixcell_min.features import DIHEDRAL, ENCODE_BATCH, Features, encode_images
from pixcell_min.formats import load_lora
from pixcell_min.images import read_settings
from pixcell_min.lora import inject_lora, lora_layers, lora_parameters
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.tools.synthetic import PROCEDURAL_SEED, second_laboratory
from pixcell_min.training import (build_optimizer, build_scaler, diffusion_loss, optimizer_step,
                                  timestep_weights)

RUN_FILES = {"config.yaml", "lora_weights.safetensors", "adapter.safetensors", "metrics.jsonl",
             "states", "tiles.json", "run.json"}


def test_a_run_writes_its_files_and_they_load_again(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--sample-count", "2"]) == 0
    run = tmp_path / "run"
    assert RUN_FILES <= {path.name for path in run.iterdir()}
    assert Config(**read_yaml(run / "config.yaml")).lora_rank == 2
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4]
    header = read_tensors(run / "lora_weights.safetensors")[1]
    assert header["base_hash"] == load_pixcell_base(train_base(arguments)).base_hash
    session = read_json(run / "run.json")["sessions"][0]
    assert json.loads(header["versions"]) == session["versions"] and header["step"] == "4"
    assert header["data_hash"] == session["hashes"]["tiles"]
    settings, folders = read_yaml(run / "config.yaml"), {"data", "features", "base", "out", "cache"}
    assert json.loads(header["settings"]) == json.loads(json.dumps({
        key: value for key, value in settings.items() if key not in folders}))  # lists for tuples
    assert load_adapter(run / "adapter.safetensors").fc1.in_features == 16
    grid = run / "samples" / "grid.png"
    assert read_settings(grid)["scheduler"] == "dpmpp_2m"
    out = capsys.readouterr().out
    # Two blocks: attn1 4 layers, attn2 to_v, to_out.0, each 2·2·32; adapter 16·4 + 4 + 4·16 + 16.
    assert "LoRA 1,536 + adapter 148 = 1,684 parameters, 2.84 %" in out
    assert "not adapted: 4 query and key layers" in out


def train_base(arguments):
    return arguments[arguments.index("--base") + 1]


def test_training_lowers_the_validation_loss(arguments, tmp_path):
    assert train.main(
        [*arguments, "--max-train-steps", "40", "--adapter-learning-rate", "0.01"]) == 0
    losses = [line["validation_loss"] for line in metrics(tmp_path / "run")
              if "validation_loss" in line]
    assert losses[-1] < losses[0]


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(arguments, tmp_path, monkeypatch):
    assert train.main([*arguments, "--save-every", "2", "--lora-dropout", "0.2"]) == 0
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")

    def stop_at(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, *rest)

    original = train.rate_factor
    monkeypatch.setattr(train, "rate_factor", stop_at)
    assert train.main([*arguments, "--save-every", "2", "--lora-dropout", "0.2"]) == 130
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0  # settings: the folder's
    assert_same_weights(weights(tmp_path / "run"), whole)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]


def test_resume_refuses_other_settings_and_names_them(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    assert train.main([*arguments, "--max-train-steps", "1", "--seed", "7", "--resume"]) == 2
    assert "seed 0 → 7" in capsys.readouterr().err


def test_existing_run_is_refused_and_overwritten_only_when_all_else_is_good(
        arguments, tmp_path, capsys):
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    before = weights(tmp_path / "run")
    assert train.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert train.main([*arguments, "--data", str(tmp_path / "nowhere"), "--overwrite"]) == 2
    assert_same_weights(weights(tmp_path / "run"), before)  # a failing --overwrite deletes nothing
    assert train.main([*arguments, "--overwrite", "--seed", "3"]) == 0
    assert Config(**read_yaml(tmp_path / "run" / "config.yaml")).seed == 3


def test_overwrite_does_not_delete_a_folder_that_is_no_run(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    assert train.main([*arguments, "--overwrite"]) == 2
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_a_runs_own_files_and_leaves_all_others(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("lora_rank: 2")  # as in the repository's own root
    (run / "precious").write_text("kept")
    assert train.main([*arguments, "--overwrite"]) == 2
    assert "it is no run" in capsys.readouterr().err
    for name in ("config.yaml", "precious"):
        assert (run / name).exists()
    (run / "metrics.jsonl").write_text("")
    (run / "states").mkdir()
    (run / "states" / "step-00000009.pt").write_text("old")
    assert train.main([*arguments, "--overwrite", "--max-train-steps", "1"]) == 0
    assert (run / "precious").read_text() == "kept" and [
        path.name for path in sorted((run / "states").iterdir())] == [
        "step-00000000.pt", "step-00000001.pt"]


def test_a_cache_and_tiles_inside_the_run_folder_survive(arguments, tmp_path, tiles):
    run = tmp_path / "run"
    inside = [*arguments, "--cache", str(run / "cache"), "--max-train-steps", "1"]
    assert train.main(inside) == 0
    assert train.main([*inside, "--overwrite"]) == 0
    assert list((run / "cache").glob("features-*/shard-*.safetensors"))


RESUME_DAMAGE = {
    "another base": "base_hash was",
    "another base's settings": "base_settings was",
    "another base's noise": "base_settings was",
    "other tiles": "tiles was",
    "another VAE": "tiles was",
    "another class": "tiles was",
    "another held-out tile": "held_out was",
    "other precision": "dtype was",
    "no state": "not the state of a run",
    "no metrics": "metrics.jsonl: cannot be read",
    "broken metrics": "metrics.jsonl: a line is no log entry",
}
CHANGED_BASE = {
    "another base's settings": ("transformer/config.json", {"num_attention_heads": 2, "attention_head_dim": 16}),
    "another base's noise": ("scheduler/scheduler_config.json", {"beta_end": 0.03}),
}


@pytest.mark.parametrize("damage", RESUME_DAMAGE)
def test_resume_refuses_what_would_mix_runs(damage, arguments, tiles, tmp_path, monkeypatch, capsys):
    run, base = tmp_path / "run", tmp_path / "base"
    write_base(base)
    flags = [*arguments, "--base", str(base), "--mixed-precision", "auto", "--save-every", "2"]
    monkeypatch.setattr(base_module, "choose_dtype", lambda name, device: None)
    assert train.main(flags) == 0
    before = weights(run)
    if damage == "another base":
        shutil.rmtree(base)
        write_base(base, seed=5)
    elif damage in CHANGED_BASE:  # the weights fit as before
        name, changes = CHANGED_BASE[damage]
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | changes))
    elif damage == "other tiles":
        (tiles / "TUM" / "TUM_0.png").unlink()
    elif damage == "another VAE":
        vae = base / "vae" / "diffusion_pytorch_model.safetensors"
        tensors, _ = read_tensors(vae)
        save_tensors(vae, tensors | {"decoder.conv_out.bias": torch.ones(3)})
    elif damage == "another class":
        (tiles / "STR").rename(tiles / "NORM")
    elif damage == "another held-out tile":
        held_out = json.loads((run / "tiles.json").read_text())["validation"][0]["path"]
        Image.new("RGB", (64, 64)).save(held_out)
    elif damage == "other precision":
        monkeypatch.setattr(base_module, "choose_dtype", lambda name, device: torch.bfloat16)
    elif damage == "no state":
        for path in (run / "states").iterdir():
            torch.save({"weight": torch.zeros(2)}, path)
    elif damage == "no metrics":
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text("[1]\n")
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert RESUME_DAMAGE[damage] in error
    assert damage != "another VAE" or "; held_out was" in error  # each difference is named
    assert_same_weights(weights(run), before)


def test_a_validation_lost_to_an_interrupt_is_made_up(arguments, tmp_path, monkeypatch, capsys):
    losses = iter([(1.0, [1.0])])  # before the run; the next call, after its last step, is interrupted

    def stop_at_the_last(*args, **kwargs):
        try:
            return next(losses)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(train, "validation_loss", stop_at_the_last)
    assert train.main([*arguments, "--save-every", "3"]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    steps = [line["step"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert steps == [0, 4]


def test_an_interrupt_before_any_save_does_not_offer_to_resume(arguments, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_pixcell_base", stop)
    assert train.main(arguments) == 130
    assert "before any save" in capsys.readouterr().err


def test_sigterm_before_the_first_step_is_said(arguments, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    encode = train.encode_images

    def terminated(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(*given)

    monkeypatch.setattr(train, "encode_images", terminated)
    assert train.main(arguments) == 143
    assert "interrupted before any save; the cache keeps encoded tiles" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_overflows_in_every_step_stops(arguments, monkeypatch, capsys):
    monkeypatch.setattr(train, "optimizer_step", lambda *_: training.StepReport(1.0, math.inf, True))
    assert train.main([*arguments, "--max-train-steps", "50", "--mixed-precision", "fp16"]) == 2
    assert "float16 overflowed in 20 steps in a row" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*arguments, "--out", str(tmp_path / "file" / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: error: ")
    assert train.main([*arguments, "--out", "x" * 300]) == 2


def test_dry_run_prints_settings_and_writes_nothing(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--dry-run"]) == 0
    assert "lora_rank: 2" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_without_data_it_trains_on_procedural_tiles(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "second_laboratory", lambda cache: second_laboratory(cache, 9))
    at = arguments.index("--data")
    assert train.main([*arguments[:at], *arguments[at + 2:], "--max-train-steps", "1",
                       "--no-dihedral"]) == 0
    assert len(list((tmp_path / "cache" / f"procedural-second-9-{PROCEDURAL_SEED}").rglob("*.png"))) == 9


def test_vae_and_encoder_are_gone_while_training_and_the_vae_is_back_for_a_grid_alone(
        arguments, tmp_path, monkeypatch):
    pipelines, held = [], []
    load, step = train.load_pixcell_base, train.optimizer_step
    monkeypatch.setattr(train, "load_pixcell_base",
                        lambda *args: pipelines.append(load(*args)) or pipelines[0])
    monkeypatch.setattr(train, "optimizer_step", lambda *args: held.extend(
        {"vae", "encoder"} & set(vars(pipelines[0]))) or step(*args))
    assert train.main([*arguments, "--sample-count", "1", "--max-train-steps", "1"]) == 0
    assert held == [] and (tmp_path / "run" / "samples" / "grid.png").exists()
    monkeypatch.setattr(pipelines[0], "_load_encoder", lambda: pytest.fail("loaded"))
    assert not {"vae", "encoder"} & set(vars(pipelines[0]))
    monkeypatch.setattr(pipelines[0], "_load_vae", lambda: pytest.fail("loaded"))
    config = train.parse_train(arguments)[0]
    train.load_features(config, pipelines[0], find_tiles(config.data))  # all is in the cache


def test_cached_training_equals_uncached_bit_for_bit(arguments, tmp_path, tiny_base):
    """What a micro-step draws is what VAE and encoder give, to the last bit: nothing is rounded."""
    config = train.parse_train(arguments)[0]
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    features, training, _ = train.load_features(config, pipeline, find_tiles(config.data))
    images = [fit_tile(read_tile(tile.path), 64, "resize") for tile in features.tiles]
    direct = [encode_images([image if turn is None else image.transpose(turn) for turn in part],
                            pipeline.vae, pipeline.encoder)
              for image in images
              for part in (DIHEDRAL[i:i + ENCODE_BATCH] for i in range(0, 8, ENCODE_BATCH))]
    plain = Features(*(torch.cat(column) for column in zip(*direct)), tiles=features.tiles)
    for step in range(3):
        drawn = [list(draw_micro_batches(source, source.rows(training), pipeline.schedule, 2, 2, 0.1,
                                         None, config.seed, "cpu", 0, 1, step))
                 for source in (features, plain)]
        for first, second in zip(*drawn, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values()))


@pytest.fixture
def without_gates(arguments, tiles, tiny_base, tmp_path):
    """Flags of a run on precomputed files, on a base without encoder and VAE weights."""
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    config = pipeline.vae.config
    for tile in find_tiles(tiles):
        mean, std, embedding = encode_images([read_tile(tile.path)], pipeline.vae, pipeline.encoder)
        moments = torch.cat([mean / config.scaling_factor + config.shift_factor,
                             std / config.scaling_factor], dim=1)[0]
        folder = tmp_path / "files" / tile.label
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{tile.path.stem}_sd3_vae.npy", moments.numpy().astype(np.float16))
        np.save(folder / f"{tile.path.stem}_uni.npy", embedding[0].numpy().astype(np.float16))
    base = write_base(tmp_path / "bases" / "base")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(base / "uni")
    flags = [*arguments, "--base", str(base), "--features", str(tmp_path / "files")]
    at = flags.index("--data")
    return flags[:at] + flags[at + 2:]


def test_precomputed_files_train_without_encoder_and_vae(
        without_gates, tmp_path, tiny_base, capsys, nothing_downloaded):
    assert train.main(without_gates) == 0
    assert "6 to train on, 2 held out; latents and embeddings in 1 variant" in capsys.readouterr().out
    named = json.loads((tmp_path / "run" / "tiles.json").read_text())
    assert named["training"][0]["path"].endswith("_sd3_vae.npy")
    # With a grid the VAE is needed: that is said before the training, not after it.
    assert train.main([*without_gates, "--overwrite", "--sample-count", "1"]) == 2
    error = capsys.readouterr().err
    assert "no VAE weights" in error and "--sample-count 0" in error and error.count("\n") == 1
    with_vae = [*without_gates, "--base", str(tiny_base), "--overwrite", "--sample-count", "1"]
    assert train.main(with_vae) == 0 and (tmp_path / "run" / "samples" / "grid.png").exists()


def test_precomputed_files_of_another_base_stop_the_run(without_gates, tmp_path, capsys):
    path = sorted((tmp_path / "files").rglob("*_uni.npy"))[0]
    np.save(path, np.zeros((1, 1536), np.float16))
    assert train.main(without_gates) == 2
    error = capsys.readouterr().err
    assert f"{path}: shape (1, 1536), expected (1, 16)" in error and error.count("\n") == 1


BAD_INPUT = {
    "missing data folder": (["--data", "nowhere"], "nowhere"),
    "rank above min(in, out)": (["--rank", "33"], "32"),
    "target that matches nothing": (["--target-modules", "to_x"], "to_x"),
    "images and precomputed files": (["--features", "somewhere"], "both given"),
    "missing base": (["--base", "nowhere"], "nowhere"),
    "block out of range": (["--blocks", "7"], "7"),
    "no device": (["--device", "cuda:63"], "cuda:63"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(name, arguments, tmp_path, capsys):
    flags, named = BAD_INPUT[name]
    assert train.main([*arguments, *flags]) == 2
    captured = capsys.readouterr().err
    assert (captured.count("\n") == 1 and captured.startswith("train.py: error: ")
            and named in captured)
    assert not (tmp_path / "run").exists()


def test_an_unreadable_tile_is_named_and_skipped_or_stops_the_run(arguments, tiles, capsys, tmp_path):
    (tiles / "TUM" / "broken.png").write_bytes(b"no image")
    assert train.main([*arguments, "--strict-data"]) == 2
    assert not (tmp_path / "run").exists()
    assert "broken.png" in capsys.readouterr().err
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    captured = capsys.readouterr()
    assert "broken.png" in captured.err and "6 to train on, 2 held out" in captured.out


def test_held_out_tiles_are_never_trained_on(arguments, tiny_base):
    config = train.parse_train(arguments)[0]
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    features, tiles_in, held_out = train.load_features(
        config, pipeline, find_tiles(config.data))
    assert len(tiles_in) == 6 and len(held_out) == 2 and not set(tiles_in) & set(held_out)
    seen = torch.cat([batch.embeddings for step in range(4) for batch in draw_micro_batches(
        features, features.rows(tiles_in), pipeline.schedule, 2, 2, 0.1, None, 0, "cpu", 0, 1, step)])
    for row in features.rows(held_out):
        for variant in range(features.variants):
            assert not (seen == features.embeddings[row + variant]).all(dim=(1, 2)).any()


def test_folder_of_unreadable_tiles_is_one_line(arguments, tmp_path, capsys):
    bad = tmp_path / "bad" / "TUM"
    bad.mkdir(parents=True)
    for i in range(3):
        (bad / f"{i}.png").write_bytes(b"no image")
    assert train.main([*arguments, "--data", str(bad.parent)]) == 2
    assert "no readable tile" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ("truncated", "missing key", "other shape"))
def test_broken_base_is_named(damage, arguments, tmp_path, capsys):
    base = write_base(tmp_path / "broken")
    path = base / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value.clone() for key, value in read_tensors(path)[0].items()}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        if damage == "missing key":
            del tensors["proj_out.weight"]
        else:
            tensors["proj_out.weight"] = torch.zeros(3, 3)
        from safetensors.torch import save_file
        save_file(tensors, path)
    assert train.main([*arguments, "--base", str(base)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    assert damage == "truncated" or "proj_out.weight" in error


def test_a_wrong_flag_ends_the_process_with_code_2_and_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--rank", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--rank" in done.stderr


# --- one optimizer step ---------------------------------------------------------------------------

def small_problem(tiny_base, dtype=torch.float32):
    transformer = load_pixcell_base(tiny_base, "cpu", "no").transformer.to(dtype)
    inject_lora(transformer, 2, 4, exclude=transformer.inert_layers(),
                generator=torch.Generator().manual_seed(0))
    adapter = EmbeddingAdapter(16, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # B = 0 would hide A's gradients
        for parameter in [*lora_parameters(transformer), *adapter.parameters()]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return transformer.to(dtype), adapter.to(dtype), NoiseSchedule.linear()


def random_batch(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return Batch(draw(count, 16, 8, 8), draw(count, 1, 16), draw(count, 16, 8, 8),
                 torch.randint(1000, (count,), generator=generator), torch.arange(count) % 3 == 2)


def cut(batch, sizes):
    parts = [getattr(batch, f.name).split(sizes) for f in dataclasses.fields(batch)]
    return [Batch(*columns) for columns in zip(*parts)]


def test_accumulated_gradients_equal_the_full_batch_ragged_batches_included(tiny_base):
    gradients = []
    for sizes in ([7], [3, 3, 1]):
        transformer, adapter, _ = small_problem(tiny_base, torch.float64)
        optimizer = build_optimizer(
            lora_parameters(transformer), adapter.parameters(), 1e-4, 1e-3, 0.0)

        def loss_of(batch):  # diffusion_loss is float32; float64 shows the sums to be the same
            epsilon = transformer(batch.latents, batch.timesteps, adapter(batch.embeddings))[:, :16]
            return (epsilon - batch.noise).square().mean((1, 2, 3))

        report = optimizer_step(loss_of, cut(random_batch(7, 5, torch.float64), sizes), 7, optimizer,
                                build_scaler("cpu", None), 1e9)
        gradients.append([p.grad for group in optimizer.param_groups for p in group["params"]] + [
            torch.tensor(report.loss)])
    for full, accumulated in zip(*gradients):
        # float64, sums in another order
        torch.testing.assert_close(full, accumulated, rtol=1e-9, atol=1e-15)
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_base_stays_bit_equal_and_only_lora_and_adapter_move(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 1e-2, 1e-2, 0.0)
    frozen = {n: p.clone() for n, p in transformer.state_dict().items() if "lora_" not in n}
    moving = [p.clone() for p in [*lora_parameters(transformer), *adapter.parameters()]]
    optimizer_step(lambda batch: diffusion_loss(transformer, adapter, schedule, batch),
                   [random_batch(4, 1)], 4, optimizer, build_scaler("cpu", None), 1.0)
    assert all(torch.equal(value, transformer.state_dict()[n]) for n, value in frozen.items())
    assert all(not torch.equal(a, b) for a, b in
               zip(moving, [*lora_parameters(transformer), *adapter.parameters()]))


def test_loss_is_the_mean_squared_error_of_epsilon_and_ignores_the_variance_channels(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    batch = random_batch(3, 2)
    losses = diffusion_loss(transformer, adapter, schedule, batch)
    alpha_bar = schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * batch.noise
    tokens = torch.stack([transformer.uncond_embedding if dropped else adapter(embedding)
                          for dropped, embedding in zip(batch.dropped, batch.embeddings)])
    epsilon = transformer(noisy, batch.timesteps, tokens)[:, :16]
    torch.testing.assert_close(losses, (epsilon - batch.noise).square().mean((1, 2, 3)), rtol=1e-5,
                               atol=1e-6)
    assert batch.dropped.any() and not batch.dropped.all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting, times", [
    ("min_snr", lambda snr: snr.clamp(max=5)), ("debiased", lambda snr: snr.sqrt())])
def test_weights_count_the_error_of_x0_as_often_as_they_say(prediction_type, weighting, times):
    schedule = dataclasses.replace(NoiseSchedule.linear(), prediction_type=prediction_type)
    timesteps = torch.tensor([1, 100, 500, 670])
    x0, noise, wrong = torch.randn(3, 4, 2, 5, 5, dtype=torch.float64).unbind()
    noisy = schedule.add_noise(x0, noise, timesteps)
    alpha_bar = schedule.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    epsilon = (noisy - alpha_bar.sqrt() * wrong) / (1 - alpha_bar).sqrt()
    guess = {"sample": wrong, "epsilon": epsilon,
             "v_prediction": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * wrong}
    error = (guess[prediction_type] - schedule.target(x0, noise, timesteps)).square()
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    torch.testing.assert_close(  # 1e-4: the tables are float32
        timestep_weights(schedule, timesteps, weighting, 5.0) * error.mean((1, 2, 3)),
        times(snr) * (wrong - x0).square().mean((1, 2, 3)), rtol=1e-4, atol=0)


def test_debiased_weights_end_at_ten_and_uniform_ones_are_one():
    schedule, timesteps = NoiseSchedule.linear(), torch.arange(1000)
    weights = timestep_weights(schedule, timesteps, "debiased")
    assert (weights[:674].diff() > 0).all() and weights[673] < 9.99
    torch.testing.assert_close(weights[674:], torch.full((326,), 10.0))
    assert (timestep_weights(schedule, timesteps, "uniform") == 1).all()
    with pytest.raises(ValueError, match="uniform, min_snr, debiased, got 'p2'"):
        timestep_weights(schedule, timesteps, "p2")


def test_weighting_weights_the_loss_and_uniform_leaves_it(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    batch = dataclasses.replace(random_batch(3, 2), timesteps=torch.tensor([5, 300, 900]))
    plain = diffusion_loss(transformer, adapter, schedule, batch)
    for weighting, gamma in (("min_snr", 3.0), ("debiased", 5.0)):
        weights = timestep_weights(schedule, batch.timesteps, weighting, gamma)
        assert (weights != 1).any() and torch.equal(
            diffusion_loss(transformer, adapter, schedule, batch, None, weighting, gamma),
            plain * weights)
    assert torch.equal(
        diffusion_loss(transformer, adapter, schedule, batch, None, "uniform"), plain)


def test_a_run_names_the_tiles_it_trained_on_and_held_out(arguments, tmp_path, tiles):
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    named = json.loads((tmp_path / "run" / "tiles.json").read_text())
    paths = [Path(tile["path"]) for tile in named["training"] + named["validation"]]
    assert sorted(paths) == sorted(tile.path.resolve() for tile in find_tiles(tiles))
    assert len(named["validation"]) >= 1
    for tile in named["training"] + named["validation"]:
        assert tile["hash"] == hashlib.sha256(Path(tile["path"]).read_bytes()).hexdigest()


def test_dropped_condition_gives_the_adapter_no_gradient(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    batch = dataclasses.replace(random_batch(2, 2), dropped=torch.tensor([True, True]))
    diffusion_loss(transformer, adapter, schedule, batch).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in adapter.parameters())


def test_fp16_step_unscales_before_clipping_and_skips_infinities(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    transformer.set_float32_attention(True)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 1e-3, 1e-3, 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss_of = lambda batch: diffusion_loss(  # noqa: E731
        transformer, adapter, schedule, batch, torch.float16)
    report = optimizer_step(loss_of, [random_batch(2, 3)], 2, optimizer, scaler, 0.5)
    norm = torch.stack([p.grad.norm() for g in optimizer.param_groups
                        for p in g["params"]]).norm().item()
    assert not report.skipped and norm == pytest.approx(min(0.5, report.grad_norm), rel=1e-3)

    before = [p.clone() for g in optimizer.param_groups for p in g["params"]]
    report = optimizer_step(lambda batch: loss_of(batch) * torch.inf, [random_batch(2, 4)], 2,
                            optimizer, scaler, 0.5)
    assert report.skipped and scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in
               zip(before, [p for g in optimizer.param_groups for p in g["params"]]))


def test_a_gradient_that_is_not_finite_stops_a_run_without_scaler_once_it_is_logged(
        arguments, tmp_path, monkeypatch, capsys):
    loss, calls = train.diffusion_loss, iter(range(99))
    monkeypatch.setattr(train, "diffusion_loss", lambda *inputs: loss(*inputs) * (
        torch.inf if next(calls) == 4 else 1))  # two micro-steps: in step 3
    assert train.main([*arguments, "--save-every", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the gradient of step 3 is not finite (loss inf)" in error and "start anew" in error
    last = metrics(tmp_path / "run")[-1]
    assert (last["step"], last["attempt"], last["skipped"], last["loss"]) == (2, 3, True, None)


def test_the_adapter_trains_in_float32_whatever_autocast_says(tiny_base):
    transformer, adapter, schedule = small_problem(tiny_base)
    seen = {}
    adapter.fc1.register_forward_hook(lambda module, inputs, out: seen.update(adapter=out.dtype))
    transformer.proj_out.register_forward_hook(
        lambda module, inputs, out: seen.update(transformer=out.dtype))
    losses = diffusion_loss(transformer, adapter, schedule, random_batch(2, 3), torch.bfloat16)
    assert seen == {"adapter": torch.float32, "transformer": torch.bfloat16}
    assert losses.dtype == torch.float32


def test_lora_and_adapter_have_rates_of_their_own(tiny_base):
    transformer, adapter, _ = small_problem(tiny_base)
    optimizer = build_optimizer(
        lora_parameters(transformer), adapter.parameters(), 1e-4, 1e-3, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-3]
    assert len(optimizer.param_groups[1]["params"]) == 4


@pytest.mark.parametrize("step, schedule, factor", [
    (0, "cosine", 0.1), (9, "cosine", 1.0), (10, "cosine", 1.0), (60, "cosine", 0.5),
    (110, "cosine", 0.0), (4, "constant", 0.5), (90, "constant", 1.0)])
def test_rate_factor(step, schedule, factor):
    assert training.rate_factor(step, 10, 110, schedule) == pytest.approx(factor, abs=1e-12)


def test_validation_is_the_same_each_time_and_restores_the_mode(arguments, tiny_base, tmp_path):
    config = train.parse_train(arguments)[0]
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    adapter = train.make_trainable(config, pipeline).adapter
    features, _, held_out = train.load_features(config, pipeline, find_tiles(config.data))
    pipeline.transformer.train()

    def measure(batch_size):
        return training.validation_loss(pipeline.transformer, adapter, pipeline.schedule, features,
                                        features.rows(held_out), batch_size, 0)[0]

    values = {measure(size) for size in (2, 2)}
    assert len(values) == 1 and pipeline.transformer.training
    other = measure(5)
    assert other == pytest.approx(values.pop(), rel=1e-5)  # whatever the micro-batch size


def test_validation_draws_no_timestep_beyond_the_last(arguments, tiny_base, monkeypatch):
    config = train.parse_train(arguments)[0]
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    adapter = train.make_trainable(config, pipeline).adapter
    features, _, held_out = train.load_features(config, pipeline, find_tiles(config.data))
    largest = torch.tensor(1 - 2**-24)  # that torch.rand gives: added to 7 it is 8 in float32
    monkeypatch.setattr(training.torch, "rand", lambda count, generator: largest.expand(count))
    loss, bands = training.validation_loss(pipeline.transformer, adapter, pipeline.schedule, features,
                                           features.rows(held_out), 4, 0)
    assert math.isfinite(loss) and len(bands) == training.VALIDATION_TIMESTEPS


def test_saved_lora_reloads_to_the_same_forward(arguments, tiny_base, tmp_path):
    assert train.main(arguments) == 0
    saved = read_tensors(tmp_path / "run" / "lora_weights.safetensors")[0]
    transformer = load_pixcell_base(tiny_base, "cpu", "no").transformer
    load_lora(transformer, tmp_path / "run" / "lora_weights.safetensors")
    assert len(lora_layers(transformer)) == 12 and len(saved) == 24


def test_pickled_code_in_a_state_file_is_refused_and_not_run(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    capsys.readouterr()

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    for path in (tmp_path / "run" / "states").iterdir():
        path.write_bytes(pickle.dumps(Payload()))
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "pwned").exists() and capsys.readouterr().err.count("\n") == 1
