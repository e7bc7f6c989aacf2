"""tools/pretrain: its augmentations, exact resuming, and a miniature base from start to end."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_min import checkpoint
from pixcell_min.base import load_pixcell_base
from pixcell_min.checkpoint import file_hash, load_object
from pixcell_min.tools import pretrain
from pixcell_min.tools.synthetic import render_tile

WEIGHTS = "diffusion_pytorch_model.safetensors"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dihedral_elements_are_the_eight_symmetries():
    image = torch.arange(9).view(3, 3)
    turned = {tuple(pretrain.dihedral(image, element).flatten().tolist()) for element in range(8)}
    assert len(turned) == 8
    assert torch.equal(pretrain.dihedral(image, 0), image)


def test_each_image_of_a_batch_is_turned_by_its_own_element():
    images, elements = torch.randn(16, 3, 5, 5, generator=generator()), torch.arange(16) % 8
    one_by_one = [pretrain.dihedral(image, int(e)) for image, e in zip(images, elements)]
    assert torch.equal(pretrain.dihedral_each(images, elements), torch.stack(one_by_one))


def test_stain_jitter_changes_colour_but_not_where_things_are():
    tile = pretrain.to_uint8(render_tile(3, "TUM")).float()[None] / 255
    jittered = pretrain.stain_jitter(tile, generator())
    assert jittered.shape == tile.shape and jittered.min() >= 0 and jittered.max() <= 1
    means = (jittered - tile).mean(dim=(0, 2, 3))
    assert means.abs().max() > 0.02  # a visible change of colour
    grey = torch.stack([tile.mean(1).flatten(), jittered.mean(1).flatten()])
    assert torch.corrcoef(grey)[0, 1] > 0.9  # dark stays dark
    assert not torch.equal(jittered, pretrain.stain_jitter(tile, generator(1)))
    assert torch.equal(jittered, pretrain.stain_jitter(tile, generator()))


def test_random_crops_are_windows_of_their_tile():
    tiles = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).to(torch.float32)
    crops = pretrain.random_crops(tiles, 20, 8, generator())
    assert crops.shape == (20, 3, 8, 8)
    assert all(torch.isin(crop, tiles).all() for crop in crops)
    assert torch.equal(crops, pretrain.random_crops(tiles, 20, 8, generator()))


@pytest.mark.parametrize("step, factor", [
    (0, 1 / 50), (49, 1.0), (699, 1.0), (850, 0.5), (1000, 0.0)])
def test_rate_rises_stays_and_falls(step, factor):
    assert pretrain.rate_factor(step, 1000) == pytest.approx(factor)


def test_matrices_go_to_muon_and_all_other_weights_to_adamw(tmp_path):
    module = torch.nn.ModuleDict(
        {"inner": torch.nn.Conv2d(4, 4, 3), "conv_in": torch.nn.Conv2d(3, 4, 3)})
    trainer = pretrain.Trainer({"m": module}, 1e-3, tmp_path / "state.pt", {})
    assert [view.shape for view in trainer.views] == [(4, 36)]
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 3  # 2 biases, conv_in's weight
    before = [p.detach().clone() for p in module.parameters()]
    trainer.update(sum(p.square().sum() for p in module.parameters()), 100)
    # The views share memory.
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters()))


def test_the_logged_loss_is_a_moving_average_of_every_step(tmp_path, monkeypatch):
    losses = [1 / (step + 1) for step in range(100)]
    trainer = SimpleNamespace(
        step=0, path=tmp_path / "s.pt", save=lambda: None, parameters={"p": torch.zeros(2)})

    def update(loss, total):
        trainer.step += 1

    check, asked = pretrain.check_finite, []

    def count(trainer, *its):
        asked.append(trainer.step)
        check(trainer, *its)

    monkeypatch.setattr(pretrain, "check_finite", count)
    trainer.update = update
    pretrain.run_stage(trainer, 100, lambda _: torch.tensor(losses[trainer.step]), "stage", 0)
    smooth, expected = None, []
    for step, loss in enumerate(torch.tensor(losses).tolist(), 1):
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if step % 50 == 0:
            expected.append({"step": step, "loss": smooth, "stage": "stage"})
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert asked == [50, 100, 100]  # each makes the CPU wait for a GPU: for the log, for the state


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("at, total, save_seconds, found", [
    (98, 120, 300, 100), (3, 60, -1, 4), (1, 49, 300, 49)], ids=["log", "timed save", "last save"])
def test_what_is_not_finite_stops_the_stage_and_leaves_the_state(
        tmp_path, monkeypatch, fault, at, total, save_seconds, found):
    """Found at the next question for numbers, at the latest before the state is written over."""
    monkeypatch.setattr(pretrain, "SAVE_SECONDS", save_seconds)
    module, path = torch.nn.Linear(4, 4), tmp_path / "state.pt"
    trainer = pretrain.Trainer({"m": module}, 1e-2, path, {})
    trainer.save()

    def loss_at(generator):
        loss = module(torch.ones(4)).square().mean()
        if trainer.step != at:
            return loss
        # The root of 0 is 0, and its slope infinite.
        return loss * math.inf if fault == "loss" else loss + (module.weight * 0).sum().sqrt()

    with pytest.raises(ValueError) as error:
        pretrain.run_stage(trainer, total, loss_at, "joint", 0)
    assert str(error.value).startswith(f"joint: a loss or weight is NaN or infinite by step {found};")
    assert "\n" not in str(error.value) and "--learning-rate" in str(error.value)
    state = load_object(path)
    assert state["step"] == (at if save_seconds < 0 else 0)
    assert all(p.isfinite().all() for p in state["parameters"].values())


def test_a_resumed_stage_equals_an_uninterrupted_one(tmp_path):
    def run(path, totals):
        for total in totals:
            module = torch.nn.Linear(4, 4)
            trainer = pretrain.Trainer({"m": module}, 1e-2, path, {})
            if not path.exists():
                torch.nn.init.eye_(module.weight), torch.nn.init.zeros_(module.bias)
                trainer.ema = {name: p.detach().clone() for name, p in trainer.parameters.items()}
            while trainer.step < total:  # the schedule's length stays 6
                x = torch.randn(8, 4, generator=pretrain.generator_for(0, trainer.step))
                trainer.update(module(x).square().mean(), 6)
            trainer.save()
        return load_object(path)

    whole, resumed = run(tmp_path / "a.pt", [6]), run(tmp_path / "b.pt", [3, 6])
    for kind in ("parameters", "ema"):
        for name in whole[kind]:
            assert torch.equal(whole[kind][name], resumed[kind][name]), (kind, name)


def test_patch_basis_rebuilds_as_well_as_principal_components_can():
    tiles = torch.stack([pretrain.to_uint8(render_tile(i, k)) for i, k in enumerate(
        ("TUM", "NORM", "STR", "LYM", "MUS", "ADI", "MUC", "DEB"))])
    center, matrix = pretrain.patch_basis(tiles, generator())
    patches = pretrain.to_patches(tiles.float() / 127.5 - 1).reshape(-1, 192)
    latents = (patches - center) @ matrix
    rebuilt = latents @ torch.linalg.pinv(matrix) + center
    assert latents.shape[1] == 16
    assert 10 * math.log10(4 / (rebuilt - patches).square().mean()) > 28  # of ±1, in dB
    assert 0.6 < latents.var() < 1.6  # 1 where half of the tiles are restained
    # Whiter than the components, not white: colour's channel still leads.
    spread = latents.std(0)
    assert 2 < spread.max() / spread.min() < 10


def test_patches_are_8_by_8_blocks_in_reading_order():
    pixels = torch.arange(3 * 16 * 24.0).view(1, 3, 16, 24)
    patches = pretrain.to_patches(pixels)
    assert patches.shape == (1, 2, 3, 192)
    assert torch.equal(patches[0, 1, 2].view(3, 8, 8), pixels[0, :, 8:, 16:])


def test_contrastive_loss_is_low_only_for_the_right_pairs():
    rows = torch.randn(16, 32, generator=generator())
    near = rows + 0.1 * torch.randn(16, 32, generator=generator(1))
    assert pretrain.contrastive_loss(rows, near) < 0.05
    assert pretrain.contrastive_loss(rows, near.roll(1, 0)) > 5
    # Nothing told apart: the entropy of a guess among 16.
    torch.testing.assert_close(
        pretrain.contrastive_loss(torch.ones(16, 8), torch.ones(16, 8)), torch.tensor(16.0).log())


def test_latent_moments():
    latents = torch.randn(2, 3, 4, 4, generator=generator())
    moments = pretrain.latent_moments(latents)
    assert moments.shape == (2, 6)
    torch.testing.assert_close(moments[1, 2], latents[1, 2].mean())
    torch.testing.assert_close(moments[0, 4], latents[0, 1].std())


@pytest.fixture
def miniature(monkeypatch):
    """Networks of a few thousand parameters, batches of two."""
    from conftest import TINY_ENCODER
    monkeypatch.setattr(pretrain, "NANO_VAE", dataclasses.replace(
        pretrain.NANO_VAE, block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
    monkeypatch.setattr(pretrain, "NANO_ENCODER", {**TINY_ENCODER, "img_size": 56})
    monkeypatch.setattr(pretrain, "NANO_TRANSFORMER", dataclasses.replace(
        pretrain.NANO_TRANSFORMER, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        caption_channels=16))
    for name in ("VAE_BATCH_128", "VAE_BATCH_256"):
        monkeypatch.setattr(pretrain, name, 2)


def miniature_flags(folder, device="cpu"):
    """The command of a base of a few steps in `folder`/base; state and tiles in `folder`/work."""
    return ["--out", str(folder / "base"), "--work", str(folder / "work"), "--procedural", "3",
            "--vae-half-steps", "1", "--vae-steps", "1", "--half-steps", "2", "--steps", "2",
            "--half-batch", "2", "--batch", "2", "--workers", "1", "--device", device,
            *(["--no-bf16"] if device == "cpu" else [])]


@pytest.fixture
def open_folder(tmp_path):
    """Two images of tissue to cut crops from."""
    folder = tmp_path / "open"
    folder.mkdir()
    for i, kind in enumerate(("TUM", "LYM")):
        render_tile(i, kind).resize((300 + 80 * i, 300)).save(folder / f"{kind}.png")
    return folder


def test_the_bank_does_not_depend_on_the_number_of_processes(tmp_path, open_folder):
    def bank(workers, crops):
        return pretrain.training_tiles(SimpleNamespace(
            seed=3, procedural=2, open_tiles=open_folder, open_crops=crops, workers=workers,
            device=torch.device("cpu")), tmp_path / f"{workers}-{crops}")

    alone = bank(1, 20)  # two chunks of jobs
    assert alone.shape == (22, 3, 256, 256) and alone.dtype == torch.uint8
    assert len({tile.numpy().tobytes() for tile in alone}) == 22
    assert torch.equal(alone[1], pretrain.to_uint8(render_tile(30_000_001)))
    assert torch.equal(bank(2, 20), alone)
    assert torch.equal(bank(1, 5), alone[:7])  # a crop knows its number, not the others
    assert torch.equal(bank(1, 20), alone)  # read back


def test_a_bank_of_other_images_is_refused(tmp_path, open_folder):
    def bank(folder):
        return pretrain.training_tiles(SimpleNamespace(
            seed=3, procedural=0, open_tiles=folder, open_crops=2, workers=1,
            device=torch.device("cpu")), tmp_path / "work")

    made = bank(open_folder)
    moved = shutil.copytree(open_folder, tmp_path / "moved")
    assert torch.equal(bank(moved), made)
    render_tile(7, "STR").save(moved / "TUM.png")
    with pytest.raises(ValueError, match="another --work"):
        bank(moved)


@pytest.mark.parametrize("change", ["vae", "bank", "bf16"])
def test_latents_are_made_anew_for_another_vae_bank_or_precision(tmp_path, change):
    class VAE(torch.nn.Module):
        def encode(self, pixels):
            return pixels[:, :1].repeat(1, 16, 1, 1)[..., :32, :32], None

    def latents(colour):
        return pretrain.latent_bank(args, tmp_path, torch.full(
            (2, 3, 256, 256), colour, dtype=torch.uint8), VAE())

    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, out=tmp_path, bank="a")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / WEIGHTS).write_bytes(b"a")
    first = latents(0)
    assert torch.equal(latents(255), first)  # read back
    if change == "vae":
        (tmp_path / "vae" / WEIGHTS).write_bytes(b"b")
    else:
        setattr(args, change, "b" if change == "bank" else True)
    assert torch.equal(latents(255), -first)


def test_an_image_too_small_for_a_crop_is_refused_before_any_work(
        tmp_path, open_folder, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "run_jobs", None)
    render_tile(0).crop((0, 0, 256, 191)).save(open_folder / "small.png")
    assert pretrain.main(["--work", str(tmp_path / "work"), "--open-tiles", str(open_folder)]) == 2
    error = capsys.readouterr().err
    assert "small.png: 256×191 px; a crop takes 192 px or more" in error


def test_the_smallest_image_gives_a_crop_and_glass_alone_is_refused(tmp_path):
    for name, image in {"tissue": render_tile(0, "TUM").crop((0, 0, 192, 192)),
                        "glass": Image.new("RGB", (256, 256), "white")}.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "tile.png")
    assert pretrain.open_crop(tmp_path / "tissue", 0, 0).shape == (3, 256, 256)
    with pytest.raises(ValueError, match="glass: no tissue in 1000 tries"):
        pretrain.open_crop(tmp_path / "glass", 0, 0)


@pytest.mark.parametrize("flags", [
    ["--procedural", "0"], ["--procedural", "1"], ["--procedural", "0", "--open-crops", "9"],
    ["--procedural", "0", "--open-crops", "0", "--open-tiles", "."], ["--open-crops", "-1"]])
def test_too_few_tiles_are_one_line_before_any_work(tmp_path, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--work", str(tmp_path / "work"), *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain: error: ") and "--open-crops" in line
    assert not (tmp_path / "work").exists()


def test_an_unreadable_image_is_one_line_whatever_the_number_of_processes(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for workers in ("1", "2"):
        assert pretrain.main(["--work", str(tmp_path / "work"), "--open-tiles", str(tmp_path),
                              "--procedural", "0", "--workers", workers]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "pretrain: error: " in error and "broken.png" in error
    assert not (tmp_path / "work" / "tiles.safetensors").exists()


@pytest.mark.parametrize("stage, flags", [
    ("vae", {}), ("joint", {}), ("joint", {"freeze_encoder": True})])
def test_a_step_lies_on_the_chosen_device_and_asks_it_for_no_number(
        tmp_path, monkeypatch, miniature, stage, flags):
    """On "meta", which has no numbers, and whose tensors mix with a CPU's in no operation."""
    args = SimpleNamespace(
        **({"freeze_encoder": False} | flags), device=torch.device("meta"), seed=0, start_from=None,
        vae_learning_rate=1e-3, learning_rate=1e-3, half_steps=1, steps=1, vae_half_steps=1,
        vae_steps=1, half_batch=4, batch=3, bf16=False, out=tmp_path, bank="", vae="")
    tiles = torch.zeros(5, 3, 256, 256, dtype=torch.uint8, device="meta")
    latents = torch.zeros(5, 16, 32, 32, dtype=torch.float16, device="meta")
    trainers, devices = [], []

    def one_step_each(trainer, total, loss_at, description, seed):
        for trainer.step in (0, 1):
            loss = loss_at(generator())
            loss.backward()
            devices.append(loss.device.type)
        raise InterruptedError  # nothing to write

    def trainer(modules, rate, path, settings):
        trainers.append(modules)
        return SimpleNamespace(step=0)

    monkeypatch.setattr(pretrain, "Trainer", trainer)
    monkeypatch.setattr(pretrain, "run_stage", one_step_each)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # "meta" has no autocast
    monkeypatch.setattr(pretrain, "patch_basis", lambda *_: (torch.zeros(192), torch.ones(192, 16)))
    with pytest.raises(InterruptedError):
        if stage == "vae":
            pretrain.train_vae(args, tmp_path, tiles)
        else:
            pretrain.train_transformer(args, tmp_path, tiles, latents)
    assert devices == ["meta", "meta"]
    parameters = [p for module in trainers[0].values() for p in module.parameters()]
    assert parameters and all(p.device.type == "meta" for p in parameters)
    # Cross-attention to a single token has no use for queries and keys.
    assert sum(p.grad is not None for p in parameters) > 0.8 * len(parameters)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")])])
def test_a_miniature_base_is_made_and_loads_like_any_other(tmp_path, miniature, capsys, device):
    flags = miniature_flags(tmp_path, device)
    assert pretrain.main(flags) == 0
    pipeline = load_pixcell_base(tmp_path / "base", "cpu", "no")
    image = pipeline(pipeline.encoder(render_tile(1)), num_inference_steps=2).images[0]
    assert image.size == (256, 256)
    assert pretrain.main(flags) == 0  # again: continues at the end, writes the same
    assert "continuing at step 4" in capsys.readouterr().out
    assert pretrain.main(flags + ["--device", "cpu"]) == 0  # and so on any device
    assert "continuing at step 4" in capsys.readouterr().out

    # The transformer alone goes on, on other tiles: the encoder, and so every embedding, stays.
    weights = {name: tmp_path / "base" / name for name in (
        "uni/model.safetensors", "transformer/diffusion_pytorch_model.safetensors")}
    before = {name: file_hash(path) for name, path in weights.items()}
    more = flags + ["--stage", "joint", "--freeze-encoder", "--seed", "1", "--half-steps", "0"]
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(more)
    assert "--start-from" in capsys.readouterr().err
    more += ["--start-from", str(tmp_path / "base")]
    assert pretrain.main(more) == 2  # the work folder holds tiles of seed 0
    assert 'made with {"seed": 0' in capsys.readouterr().err
    assert pretrain.main(more + ["--work", str(tmp_path / "work2")]) == 0
    changed = {name for name, path in weights.items() if file_hash(path) != before[name]}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors"}


def test_a_state_begun_with_other_settings_is_refused_by_name(tmp_path, miniature, capsys):
    flags, other = miniature_flags(tmp_path), tmp_path / "other"
    base, work = tmp_path / "base", tmp_path / "work"
    assert pretrain.main(flags) == 0
    shutil.copytree(base, other)
    start = ["--start-from", str(other)]
    vae, joint = flags + ["--stage", "vae"], flags + ["--stage", "joint"]
    thawed = joint + ["--work", str(tmp_path / "frozen")]
    frozen = thawed + ["--freeze-encoder"]
    assert pretrain.main(frozen + start) == 0
    states = {path: file_hash(path) for path in tmp_path.rglob("*.pt")}
    assert sorted(path.stem for path in states) == ["joint", "joint", "vae"]
    capsys.readouterr()

    def refused(command, words):
        assert pretrain.main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "cannot go on: " + words in line and "another --work" in line
        assert states == {path: file_hash(path) for path in states}

    refused(vae + ["--vae-learning-rate", "1e-2"], "vae_learning_rate was 0.001, is 0.01; give")
    refused(vae + ["--bf16"], "bf16 was False, is True; give")
    refused(vae + start, "start_from was None, is ")
    refused(joint + ["--learning-rate", "1e-2"], "learning_rate was 0.001, is 0.01; give")
    refused(joint + ["--batch", "3", "--half-batch", "4"],
            "half_batch was 2, is 4; batch was 2, is 3; give")
    refused(joint + start + ["--freeze-encoder"],
            "freeze_encoder was False, is True; start_from was None, is ")
    refused(thawed, "freeze_encoder was True, is False; start_from was ")
    made_with = checkpoint.read_tensors(work / pretrain.BANK)[1]["made_with"]
    checkpoint.save_tensors(work / pretrain.BANK, {"tiles": torch.zeros(
        3, 3, 256, 256, dtype=torch.uint8)}, {"made_with": made_with})
    refused(vae, "bank was ")
    # The weights of --start-from count, the frozen encoder's too, not its name.
    again = shutil.copytree(other, tmp_path / "again")
    for path in (again / "transformer" / WEIGHTS, again / "uni" / "model.safetensors"):
        weights = path.read_bytes()
        checkpoint.save_tensors(
            path, {name: value / 2 for name, value in checkpoint.read_tensors(path)[0].items()})
        refused(frozen + ["--start-from", str(again)], "start_from was ")
        path.write_bytes(weights)
    assert pretrain.main(frozen + ["--start-from", str(again)]) == 0


def test_a_base_made_with_stops_is_that_of_one_go_to_the_byte(
        tmp_path, miniature, monkeypatch, capsys):
    """Stopped by signals within each stage, on parts and whole tiles; gone on by the same command."""
    whole, parts = (miniature_flags(tmp_path / name) + ["--vae-half-steps", "2", "--vae-steps", "2"]
                    for name in ("whole", "parts"))
    assert pretrain.main(whole) == 0
    update = pretrain.Trainer.update
    for stop in [("vae", 1, signal.SIGINT), ("vae", 3, signal.SIGTERM),
                 ("joint", 1, signal.SIGTERM), ("joint", 3, signal.SIGINT)]:
        def update_and_stop(trainer, *its, stop=stop):
            if (trainer.path.stem, trainer.step + 1) == stop[:2]:
                signal.raise_signal(stop[2])  # within a step, which is made whole all the same
            update(trainer, *its)

        monkeypatch.setattr(pretrain.Trainer, "update", update_and_stop)
        assert pretrain.main(parts) == 128 + stop[2]
        assert "\npretrain: interrupted; the same command" in capsys.readouterr().err
        assert load_object(tmp_path / "parts" / "work" / f"{stop[0]}.pt")["step"] == stop[1]
    monkeypatch.setattr(pretrain.Trainer, "update", update)
    assert pretrain.main(parts) == 0
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "base").rglob(
        "*.*")}
    assert len(files) == 7  # weights and settings of three networks, the scheduler's settings
    for path in files:
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_a_state_goes_on_with_more_steps_and_over_the_base_it_began_from(
        tmp_path, miniature, capsys):
    flags = miniature_flags(tmp_path)
    assert pretrain.main(flags) == 0
    assert pretrain.main(flags + ["--half-steps", "3"]) == 0
    more = flags + ["--vae-half-steps", "2", "--vae-steps", "2", "--half-steps", "3"]
    assert pretrain.main(more) == 2  # what the transformer has learnt are another VAE's latents
    assert re.search(r"joint.pt: cannot go on: vae was \w{16}, is \w{16}; ", capsys.readouterr().err)
    assert [load_object(tmp_path / "work" / f"{stage}.pt")["step"] for stage in ("vae", "joint")
            ] == [4, 5]
    for extra in ([], ["--freeze-encoder"]):
        over = flags + ["--start-from", str(tmp_path / "base"), *extra,
                        "--work", str(tmp_path / f"over{len(extra)}")]
        assert pretrain.main(over) == 0
        assert pretrain.main(over) == 0


def test_a_state_of_older_code_is_refused_in_a_line(tmp_path):
    module = torch.nn.Linear(4, 4)
    trainer = pretrain.Trainer({"m": module}, 1e-2, tmp_path / "state.pt", {})
    trainer.save()
    older = load_object(trainer.path)
    del older["settings"]
    checkpoint.save_object(trainer.path, older)
    with pytest.raises(ValueError, match="state.pt: saved by another version of this code"):
        pretrain.Trainer({"m": module}, 1e-2, trainer.path, {})


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hears_ctrl_c():
    return np.full((3, 256, 256), signal.getsignal(signal.SIGINT) != signal.SIG_IGN, np.uint8)


def test_ctrl_c_is_the_parents_and_not_the_workers():
    handler = signal.getsignal(signal.SIGINT)
    assert not pretrain.run_jobs([hears_ctrl_c], 2).any()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(ValueError, match="fewer --workers"):
        pretrain.run_jobs([die], 2)


def test_missing_images_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert pretrain.main(["--out", str(tmp_path / "b"), "--work", str(tmp_path / "w"),
                          "--procedural", "1", "--open-tiles", str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.rstrip().endswith("expected .png, .jpg or .tif files")


def test_window_patch_embedding_is_a_part_of_the_whole_tiles():
    config = pretrain.NANO_TRANSFORMER
    whole = pretrain.PatchEmbed(config, 16)
    window = pretrain.WindowPatchEmbed(config, 16)
    window.load_state_dict(whole.state_dict())
    latents = torch.randn(1, 16, 32, 32, generator=generator())
    full = whole(latents).view(1, 16, 16, 16)
    torch.testing.assert_close(window(latents).view(1, 16, 16, 16), full, rtol=0, atol=1e-6)
    window.origin = (3, 5)
    part = window(latents[:, :, 6:22, 10:26]).view(1, 8, 8, 16)
    torch.testing.assert_close(part, full[:, 3:11, 5:13], rtol=0, atol=1e-6)


@pytest.mark.parametrize("error, code, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), 2,
     "pretrain: error: CUDA out of memory. Tried to allocate 2.00 GiB; free some, or take a smaller --batch"),
    (MemoryError(), 2, "pretrain: error: out of memory; free some"),
    (KeyboardInterrupt(), 130, "pretrain: interrupted; the same command goes on")])
def test_what_stops_it_is_one_line_and_the_caller_keeps_its_smallest_numbers(
        tmp_path, monkeypatch, capsys, error, code, words):
    def fail(args, work):
        assert (torch.tensor([1e-39]) * 1).item() == 0  # such numbers are 0 while it runs
        raise error
    monkeypatch.setattr(pretrain, "training_tiles", fail)
    assert pretrain.main(["--work", str(tmp_path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words) and (torch.tensor([1e-39]) * 1).item() > 0


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(args, work):
        raise RuntimeError("shape '[2]' is invalid")
    monkeypatch.setattr(pretrain, "training_tiles", fail)
    with pytest.raises(RuntimeError, match="shape"):
        pretrain.main(["--work", str(tmp_path)])
