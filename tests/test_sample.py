"""sample.py end to end on a tiny random base: what it writes, repeats bit for bit, refuses."""

import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from conftest import ROOT, SHARED, write_base
from pixcell_min.adapter import load_adapter, save_adapter
from pixcell_min.data import Tile
from pixcell_min.exports import write_lora
from pixcell_min.formats import read_lora
from pixcell_min.images import read_settings
from pixcell_min.transformer import PixCellTransformer


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """A run of two steps on noise tiles, at a rate that visibly changes the images."""
    folder = tmp_path_factory.mktemp("sample")
    for i in range(4):
        tile = Image.effect_noise((64, 64), 80).convert("RGB")
        (folder / "tiles" / "TUM").mkdir(parents=True, exist_ok=True)
        tile.save(folder / "tiles" / "TUM" / f"{i}.png")
    assert train.main(["--rank", "2", "--base", str(tiny_base), "--data", str(folder / "tiles"),
                       "--out", str(folder / "run"), "--cache", str(folder / "cache"),
                       "--max-train-steps", "2", "--mixed-precision", "no", "--sample-count", "0",
                       "--warmup-steps", "0", "--no-dihedral", "--learning-rate", "0.05",
                       "--adapter-learning-rate", "0.05", "--batch-size", "2"]) == 0
    return folder / "run"


@pytest.fixture
def flags(run, tmp_path):
    return ["--image", str(run.parent / "tiles" / "TUM" / "0.png"), "--run", str(run),
            "--steps", "3", "--out", str(tmp_path / "out"), "--mixed-precision", "no"]


def test_writes_png_with_its_settings(flags, tmp_path):
    assert sample.main([*flags, "--num-images", "2", "--seed", "5", "--scheduler", "ddpm"]) == 0
    assert (sorted(path.name for path in (tmp_path / "out").iterdir())
            == ["0_seed5.png", "0_seed6.png"])
    settings = read_settings(tmp_path / "out" / "0_seed6.png")
    assert (settings["seed"] == 6 and settings["scheduler"] == "ddpm"
            and settings["num_inference_steps"] == 3)
    assert len(settings["lora_hash"]) == len(settings["base_hash"]) == 64
    assert Image.open(tmp_path / "out" / "0_seed5.png").size == (64, 64)


def test_same_bytes_for_the_same_seed_however_many_images_and_tiles(flags, run, tmp_path):
    assert sample.main([*flags, "--seed", "1"]) == 0
    alone = (tmp_path / "out" / "0_seed1.png").read_bytes()
    tiles = str(run.parent / "tiles" / "TUM")
    assert sample.main(
        [*flags, "--image", tiles, "--num-images", "3", "--out", str(tmp_path / "many")]) == 0
    assert (tmp_path / "many" / "0_seed1.png").read_bytes() == alone
    assert (tmp_path / "many" / "0_seed0.png").read_bytes() != alone


def test_the_two_shared_files_give_the_same_bytes_elsewhere(flags, run, tiny_base, tmp_path):
    assert sample.main(flags) == 0
    for name in ("lora_weights.safetensors", "adapter.safetensors"):  # no run folder, no settings
        shutil.copy(run / name, tmp_path / name)
    subprocess.run(  # another process, which has trained nothing
        [sys.executable, ROOT / "sample.py", *flags[:2], "--base", tiny_base, "--steps", "3",
         "--lora", tmp_path / "lora_weights.safetensors", "--mixed-precision", "no",
         "--adapter", tmp_path / "adapter.safetensors", "--out", tmp_path / "elsewhere"], check=True)
    assert ((tmp_path / "elsewhere" / "0_seed0.png").read_bytes()
            == (tmp_path / "out" / "0_seed0.png").read_bytes())


def test_guidance_interval_and_fusing_reach_the_image(flags, tmp_path):
    def image(*extra):
        assert sample.main([*flags, *extra]) == 0
        path = tmp_path / "out" / "0_seed0.png"
        settings = read_settings(path)
        assert settings["lora_fused"] == ("--fuse-lora" in extra)
        return np.asarray(Image.open(path), int), settings["guidance_interval"]

    plain, guided = image("--guidance-scale", "1"), image("--guidance-scale", "4")
    within = image("--guidance-scale", "4", "--guidance-interval", "0.5", "5")
    nowhere = image("--guidance-scale", "4", "--guidance-interval", "900", "1000")
    assert within[1] == [0.5, 5] and guided[1] is None
    assert (nowhere[0] == plain[0]).all()
    assert (within[0] != plain[0]).any() and (within[0] != guided[0]).any()
    assert abs(image("--guidance-scale", "1", "--fuse-lora")[0] - plain[0]).max() <= 1


def test_an_interval_that_is_none_is_one_line(flags, tmp_path, capsys):
    assert sample.main([*flags, "--guidance-interval", "2", "1"]) == 2
    error = capsys.readouterr().err
    assert "guidance_interval is [2.0, 1.0]" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [["--fuse-lora"], ["--lora-scale", "0.5"]])
def test_what_needs_a_lora_is_refused_without_one(extra, flags, run, capsys):
    bare = [flag for flag in flags if flag not in ("--run", str(run))]
    with pytest.raises(SystemExit) as stop:
        sample.main([*bare, *extra])
    assert stop.value.code == 2 and "need a LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sample", "train"])
def test_compile_compiles_the_blocks_or_says_why_not(script, flags, run, tmp_path, monkeypatch, capsys):
    argv = flags if script == "sample" else [
        "--base", train_base(run), "--data", str(run.parent / "tiles"), "--max-train-steps", "1",
        "--out", str(tmp_path / "out"), "--cache", str(run.parent / "cache"), "--sample-count", "0"]
    main = {"sample": sample, "train": train}[script].main
    called = []
    monkeypatch.setattr(PixCellTransformer, "compile_blocks", lambda self: called.append(self))
    assert main(argv) == 0 and not called
    shutil.rmtree(tmp_path / "out")
    assert main([*argv, "--compile"]) == 0 and len(called) == 1
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()

    def without(self):
        raise ValueError("torch.compile does not work here (no compiler); run without --compile")
    monkeypatch.setattr(PixCellTransformer, "compile_blocks", without)
    assert main([*argv, "--compile"]) == 2
    error = capsys.readouterr().err
    assert error == f"{script}.py: error: torch.compile does not work here (no compiler); run without --compile\n"
    assert not (tmp_path / "out").exists()


def test_compare_puts_real_base_and_adapted_side_by_side(flags, run, tmp_path):
    for extra in ([], ["--fuse-lora"]):
        assert sample.main([*flags, "--compare", *extra]) == 0
        grid = Image.open(tmp_path / "out" / "0_compare.png")
        assert grid.size == (3 * 64 + 2 * 4, 64 + 20)
        real, base, adapted = (grid.crop((68 * i, 20, 68 * i + 64, 84)) for i in range(3))
        assert real.tobytes() == Image.open(flags[1]).convert("RGB").tobytes()
        assert adapted.tobytes() == Image.open(tmp_path / "out" / "0_seed0.png").tobytes()
        assert base.tobytes() != adapted.tobytes()
    no_run = [flag for flag in flags if flag not in ("--run", str(run))]
    assert sample.main(
        [*no_run, "--base", train_base(run), "--compare", "--out", str(tmp_path / "plain")]) == 0
    assert Image.open(tmp_path / "plain" / "0_compare.png").size == (2 * 64 + 4, 84)
    assert Image.open(tmp_path / "plain" / "0_seed0.png").tobytes() == base.tobytes()


def train_base(run):
    from pixcell_min.config import read_yaml
    return read_yaml(run / "config.yaml")["base"]


def test_lora_scale_zero_without_adapter_is_the_base(flags, run, tmp_path):
    lora = ["--lora", str(run / "lora_weights.safetensors"), "--base", train_base(run)]
    no_run = [flag for flag in flags if flag not in ("--run", str(run))]
    images = []
    for name, extra in (("off", [*lora, "--lora-scale", "0"]), ("on", lora),
                        ("base", ["--base", train_base(run)])):
        assert sample.main([*no_run, *extra, "--out", str(tmp_path / name)]) == 0
        images.append(Image.open(tmp_path / name / "0_seed0.png").tobytes())
    assert images[0] == images[2] != images[1]


def test_weighted_files_of_any_format_beside_a_run(flags, run, tmp_path, capsys):
    """0.75 + 0.25 of one LoRA is that LoRA, up to rounding; --run still brings adapter and base."""
    own = run / "lora_weights.safetensors"
    write_lora(read_lora(own), tmp_path / "a:b", "peft")  # a colon of its own
    write_lora(read_lora(own), tmp_path / "d.safetensors", "diffusers")
    assert sample.main(flags) == 0
    assert sample.main([*flags, "--lora", f"{tmp_path / 'a:b'}:0.75", "--lora",
                        f"{tmp_path / 'd.safetensors'}:.25", "--out", str(tmp_path / "sum")]) == 0
    assert sample.main([*flags, "--lora", f"{own}:0.75", "--out", str(tmp_path / "part")]) == 0
    whole, summed, part = (np.asarray(Image.open(tmp_path / name / "0_seed0.png"), int)
                           for name in ("out", "sum", "part"))
    assert abs(whole - summed).max() <= 1 and abs(whole - part).max() > 1
    settings = read_settings(tmp_path / "sum" / "0_seed0.png")
    assert settings["lora_weights"] == [0.75, 0.25] and len(settings["lora_hash"]) == 3 * 64 + 2
    assert capsys.readouterr().err.count("note:") == 0
    bare = read_lora(own)
    bare.header.clear()
    write_lora(bare, tmp_path / "bare.safetensors", "native")
    assert sample.main([*flags, "--lora", str(tmp_path / "bare.safetensors")]) == 0
    assert "note: " in (error := capsys.readouterr().err) and "names no base_hash" in error
    assert Image.open(tmp_path / "out" / "0_seed0.png").tobytes() == whole.astype("uint8").tobytes()


@pytest.mark.parametrize("text, path, weight", [
    ("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.7", "a.safetensors", 0.7),
    ("a:-1", "a", -1.0), ("x:y:1e-1", "x:y", 0.1), (r"C:\a.safetensors", r"C:\a.safetensors", 1.0),
    ("here:2", "here:2", 1.0), ("here:2:0.5", "here:2", 0.5), (":2", ":2", 1.0), ("a:", "a:", 1.0)])
def test_path_and_weight(text, path, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here:2").write_text("")  # it exists as a whole
    assert sample.weighted_path(text) == (Path(path), weight)


def test_a_folder_keeps_its_class_folders(flags, run, tmp_path):
    assert sample.main([*flags, "--image", str(run.parent / "tiles")]) == 0
    assert (tmp_path / "out" / "TUM" / "3_seed0.png").exists()


def test_the_adapter_may_be_a_pth(flags, run, tmp_path):
    save_adapter(load_adapter(run / "adapter.safetensors"), tmp_path / "adapter.pth")
    assert sample.main(flags) == 0
    assert sample.main([*flags, "--adapter", str(tmp_path / "adapter.pth"),
                        "--out", str(tmp_path / "pth")]) == 0
    assert (Image.open(tmp_path / "pth" / "0_seed0.png").tobytes()
            == Image.open(tmp_path / "out" / "0_seed0.png").tobytes())


class Payload:
    """Pickles to a call of open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickle_with_code_as_adapter_is_refused_and_not_run(flags, tmp_path, capsys):
    (tmp_path / "adapter.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "pwned"))))
    assert sample.main([*flags, "--adapter", str(tmp_path / "adapter.pth")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "adapter.pth" in error
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


def test_lora_and_adapter_of_another_base_are_refused(flags, run, tmp_path, capsys):
    other = ["--base", str(write_base(tmp_path / "other", seed=9))]
    assert sample.main([*flags, *other]) == 2
    assert "adapter of base" in capsys.readouterr().err
    save_adapter(load_adapter(run / "adapter.safetensors"), tmp_path / "a.pth")
    assert sample.main([*flags, *other, "--adapter", str(tmp_path / "a.pth")]) == 2
    error = capsys.readouterr().err
    assert "LoRA of base" in error and error.count("\n") == 1


def test_too_little_memory_is_one_line_and_a_fault_of_ours_a_traceback(flags, monkeypatch, capsys):
    def fail(*given):
        raise errors.pop()
    errors = [RuntimeError("shape '[2]' is invalid"), torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), MemoryError()]
    monkeypatch.setattr(sample, "load_pixcell_base", fail)
    for beginning in ("out of memory", "CUDA out of memory. Tried to allocate 2.00 GiB"):
        assert sample.main(flags) == 2
        assert capsys.readouterr().err == (
            f"sample.py: error: {beginning}; free some, or draw where there is more\n")
    with pytest.raises(RuntimeError, match="shape"):
        sample.main(flags)


@pytest.mark.parametrize("extra, named", [
    (["--image", "nowhere.png"], "nowhere.png"), (["--run", "nowhere"], "nowhere"),
    (["--lora", "nowhere.safetensors"], "nowhere.safetensors"), (["--base", "nowhere"], "nowhere")])
def test_missing_files_are_one_line(extra, named, flags, tmp_path, capsys):
    assert sample.main([*flags, *extra]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("sample.py: error: ") and named in error
    assert not (tmp_path / "out").exists()


def test_truncated_lora_and_unreadable_tile_are_one_line(flags, run, tmp_path, capsys):
    whole = (run / "lora_weights.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[:len(whole) // 2])
    assert sample.main([*flags, "--lora", str(tmp_path / "half.safetensors")]) == 2
    assert "half.safetensors" in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert sample.main([*flags, "--image", str(tmp_path / "broken.png")]) == 2
    assert "broken.png" in capsys.readouterr().err


def test_two_tiles_of_one_name_are_refused(flags, run, tmp_path, capsys):
    twin = tmp_path / "0.png"
    Image.new("RGB", (64, 64)).save(twin)
    assert sample.main([*flags, "--image", flags[1], str(twin)]) == 2
    assert f"{flags[1]} and {twin} would both be written as 0" in capsys.readouterr().err


def test_names_of_many_tiles_are_found_in_linear_time(tmp_path, monkeypatch):
    many = [Tile(tmp_path / f"{i}.png") for i in range(100_000)]
    monkeypatch.setattr(sample, "find_tiles", lambda folder: many)
    began = time.process_time()
    assert len(sample.output_names([tmp_path])) == len(many)
    assert time.process_time() - began < 30  # each beside each other one: many minutes


@pytest.mark.parametrize("extra", [
    ["--steps", "0"], ["--steps", "1001"], ["--num-images", "0"], ["--seed", "-1"],
    ["--scheduler", "heun"], ["--lora-scale", "nan"], ["--guidance-scale", "-1"],
    ["--lora", "a.safetensors:11"], ["--lora", "a.safetensors:nan"], ["--compile", "1"],
    ["--guidance-interval", "1"], ["--guidance-interval", "-1", "1"]])
def test_flags_out_of_range_exit_2(extra, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main([*flags, *extra])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not (SHARED / "data" / "target_nct").is_dir(),
                    reason="no ../shared with real tiles")
def test_a_real_tile_is_sampled(flags, tmp_path):
    tile = next((SHARED / "data" / "target_nct" / "TUM").iterdir())
    assert sample.main([*flags, "--image", str(tile)]) == 0
    assert Image.open(tmp_path / "out" / f"{tile.stem}_seed0.png").size == (64, 64)
