"""tools/evaluate.py, comparison.py and report.py on a tiny random base: what they draw, measure, refuse."""

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import train
from conftest import write_base
from pixcell_min.adapter import EmbeddingAdapter, load_adapter, save_adapter
from pixcell_min.base import load_pixcell_base
from pixcell_min.checkpoint import file_hash
from pixcell_min.config import Config, to_yaml
from pixcell_min.data import Tile, find_tiles, fit_tile, read_tile
from pixcell_min.images import read_settings
from pixcell_min.lora import inject_lora, lora_parameters, save_lora
from pixcell_min.tools import comparison, evaluate, metrics, report

DISTANCES = ("frechet", "kernel", "overlap")
FAST = ["--steps", "2", "--mixed-precision", "no", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    """Intervals of 4 repeats: their values are metrics.py's matter, and 200 take seconds."""
    monkeypatch.setattr(metrics, "bootstrap", functools.partial(metrics.bootstrap, repeats=4))
    monkeypatch.setattr(comparison, "FLOOR_SPLITS", 2)


def write_tiles(folder, count, seed=0, size=64):
    """Two classes of `count` purple noise tiles each, some darker than others."""
    generator = np.random.default_rng(seed)
    for label in ("STR", "TUM"):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 90, (size, size, 3)) + (90 + 5 * i, 60, 110)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


def write_run(run, base, trained, **settings):
    """A run folder as train.py leaves it, of random LoRA and adapter, trained on these files."""
    pipeline = load_pixcell_base(base, "cpu", "no")
    generator = torch.Generator().manual_seed(1)
    inject_lora(pipeline.transformer, 2, 4.0, generator=generator)
    adapter = EmbeddingAdapter(16, generator=generator)
    with torch.no_grad():
        for parameter in (*lora_parameters(pipeline.transformer), *adapter.parameters()):
            parameter.normal_(0, 0.3, generator=generator)
    run.mkdir(parents=True)
    header = {"base_hash": pipeline.base_hash}
    save_lora(pipeline.transformer, run / "lora_weights.safetensors", header)
    save_adapter(adapter, run / "adapter.safetensors", header)
    (run / "config.yaml").write_text(to_yaml(Config(base=str(base), **settings)))
    (run / "tiles.json").write_text(json.dumps({
        "training": [{"path": str(p), "hash": file_hash(p)} for p in trained], "validation": []}))
    return run


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """(tiles, run, report of an evaluation of 4 of the 8 held-out tiles, 2 images each)."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiles = write_tiles(folder / "tiles", 6)
    trained = [tiles / label / f"{i}.png" for label in ("STR", "TUM") for i in range(2)]
    run = write_run(folder / "run", tiny_base, trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "bootstrap", functools.partial(metrics.bootstrap, repeats=4))
        assert evaluate.main([*command(tiles, run), "--count", "4", "--seeds", "2"]) == 0
    return tiles, run, json.loads((run / "evaluation" / "report.json").read_text())


def command(tiles, run, *more):
    return ["--data", str(tiles), "--run", str(run), *FAST, *map(str, more)]


def drawn(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")
            if path.parent.parent.name == "images"}


def refused(arguments, capsys):
    """The one line of a refusal with exit code 2."""
    capsys.readouterr()
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("evaluate: error: ")
    return error


# ---------------------------------------------------------------- the whole


def test_draws_held_out_tiles_alone_evenly_and_every_arm_from_the_same_seeds(made):
    tiles, run, result = made
    assert result["tiles"] | {"names": 0} == {
        "found": 12, "trained_on": 4, "held_out": 8, "used": 4, "images_per_tile": 2, "dataset": 0,
        "names": 0}
    assert [name[:5] for name in result["tiles"]["names"]] == ["STR_2", "STR_4", "TUM_2", "TUM_4"]
    images = run / "evaluation" / "images"
    seeds = {arm: {path.name: read_settings(path)["seed"] for path in (images / arm).iterdir()}
             for arm in evaluate.ARMS}
    assert all(its == seeds["base"] and len(its) == 8 for its in seeds.values())
    assert len(set(seeds["base"].values())) == 8
    first = sorted(seeds["base"])[0]
    assert len({(images / arm / first).read_bytes() for arm in evaluate.ARMS}) == 4


def test_an_arm_is_the_pipeline_with_adapter_and_lora_or_without(made, tiny_base):
    tiles, run, result = made
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    tile = fit_tile(read_tile(tiles / "STR" / "2.png"), 64, "resize")
    embedding = pipeline.encoder(tile)
    name = result["tiles"]["names"][0]
    for arm in evaluate.ARMS:
        if arm == "lora":
            pipeline.load_lora_weights(run / "lora_weights.safetensors")
        condition = embedding
        if arm in ("adapter", "both"):
            condition = load_adapter(run / "adapter.safetensors")(embedding).detach()
        path = run / "evaluation" / "images" / arm / f"{name}_1.png"
        settings = read_settings(path)
        image = pipeline(condition, 2, scheduler="dpmpp_2m", seed=settings["seed"]).images[0]
        assert image.tobytes() == Image.open(path).tobytes(), arm
        assert bool(settings["lora_hash"]) == (arm in ("lora", "both"))
        assert bool(settings["adapter_hash"]) == (arm in ("adapter", "both"))


def test_every_number_has_its_n_and_every_column_its_groups(made):
    results, notes = made[2]["results"], made[2]["notes"]
    assert list(results) == [*evaluate.ARMS, "real_real", "vae", "colour_only", "copies"]
    for column, n in [("both", 8), ("base", 8), ("colour_only", 8), ("vae", 4), ("real_real", 2)]:
        assert {group["n"] for name, group in results[column].items()
                if not name.startswith(DISTANCES)} == {n}
        assert {group["n"] for name, group in results[column].items()
                if name.startswith(DISTANCES)} <= {min(n, 4)}  # the first image of each tile
    both = results["both"]
    assert {"colour", "frechet:own", "kernel:own", "overlap:own", "fidelity:own",
            "centred:own", "memorisation:own", "nuclei"} == both.keys()
    low, high = both["colour"]["intervals"]["lab_mean"]
    assert low <= high and both["colour"]["values"]["lab_mean"] > 0
    assert -1 <= both["fidelity:own"]["values"]["shuffled"] <= 1
    assert results["vae"]["fidelity:own"]["values"]["cosine"] <= 1
    # 4 tiles are too few for k = 5 and for the screen: a reason each, and the rest is there.
    assert "reason" in both["overlap:own"] and "reason" in both["memorisation:own"]
    assert any("overlap:own (base, adapter, lora, both" in note for note in notes)
    key = made[2]["key"]
    ratio = both["colour"]["values"]["lab_mean"] / results["base"]["colour"]["values"]["lab_mean"]
    assert key["colour_percent"]["values"]["value"] == pytest.approx(100 * ratio)
    gain = (both["fidelity:own"]["values"]["cosine"]
            - results["base"]["fidelity:own"]["values"]["cosine"])
    assert key["gain:own"]["values"]["value"] == pytest.approx(gain)


def noise_images(count, seed):
    return [*np.random.default_rng(seed).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)]


def test_distances_of_features_compare_equal_numbers():
    generator, count = np.random.default_rng(0), 12
    real, drawn = generator.normal(size=(count, 3)), generator.normal(size=(2 * count, 3))
    results = comparison.compare(noise_images(count, 1), noise_images(2 * count, 2),
                                 {"own": real}, {"own": drawn}, intervals=False)
    first = drawn[[2 * i for i in range(count)]]
    assert results["frechet:own"]["values"]["frechet_distance"] == pytest.approx(
        metrics.frechet_distance(real, first))
    assert results["kernel:own"]["values"]["kernel_distance"] == pytest.approx(
        metrics.kernel_distance(real, first, paired=True))
    assert results["overlap:own"]["values"] == pytest.approx(
        metrics.precision_recall_density_coverage(real, first))
    assert results["colour"]["n"] == 2 * count and results["overlap:own"]["n"] == count


def test_pairs_of_several_images_a_tile_are_that_tiles():
    generator, count = np.random.default_rng(0), 24
    conditions, training = generator.normal(size=(2, count, 8))
    drawn = np.repeat(conditions, 2, 0) + 0.1 * generator.normal(size=(2 * count, 8))
    drawn[:2] = training[0]  # both images of the first tile are copies
    results = comparison.compare_pairs(
        noise_images(count, 1), noise_images(2 * count, 2), {"own": conditions}, {"own": drawn},
        {"own": [*training]})
    fidelity, screen = results["fidelity:own"], results["memorisation:own"]
    assert fidelity["values"]["cosine"] > 0.9 and abs(fidelity["values"]["shuffled"]) < 0.15
    assert fidelity["values"]["margin"] == pytest.approx(
        fidelity["values"]["cosine"] - fidelity["values"]["shuffled"])
    assert fidelity["intervals"]["cosine"][0] > 0.7  # resampled tiles keep their own images
    assert screen["values"] == metrics.memorisation_screen(drawn, conditions, training)
    assert screen["values"]["closer_share"] >= 2 / (2 * count)
    assert screen["n"] == fidelity["n"] == 2 * count
    # The threshold is a quantile of the tiles', so resampled with them.
    assert all(low < high for low, high in screen["intervals"].values())


def test_intervals_hold_their_values_and_no_share_above_1():
    """Thinned images are far from these: half of them differ in a corner that hardly counts."""
    generator, count = np.random.default_rng(0), 24
    real = [np.full((64, 64, 3), (200, 120, 180), np.uint8) + i.astype(np.uint8) % 40
            for i in generator.integers(0, 255, (count, 64, 64, 3))]
    other = [np.flip(image, 1).copy() for image in real]
    for image in other[::2]:
        image[:3] = (120, 60, 140)
    features = generator.normal(size=(count, 8))
    results = comparison.compare(
        real, other, {"own": features, "second": features},
        {"own": generator.normal(size=(count, 8)), "second": features + 0.01})
    thinned = metrics.colour_shift(*(metrics.thin(its, comparison.INTERVAL_PIXELS)
                                     for its in (real, other)))["lab_mean"]
    colour = results["colour"]
    assert abs(thinned - colour["values"]["lab_mean"]) > 1e-3  # what they are made of, less exactly
    for name in ("lab_mean", "reinhard_mean"):  # far from 0, where they are cut off
        assert np.mean(colour["intervals"][name]) == pytest.approx(colour["values"][name])
    for group in ("frechet:own", "kernel:own", "overlap:own", "kernel:second"):
        for name, (low, high) in results[group]["intervals"].items():
            assert low <= results[group]["values"][name] <= high, (group, name)
    shares = results["overlap:own"]["intervals"]
    assert max(high for name, (_, high) in shares.items() if name != "density") == 1
    assert shares["density"][1] > 1


def test_report_is_one_readable_file_without_scripts_or_links(made):
    out = made[1] / "evaluation"
    text = (out / "report.html").read_text()
    assert "<script" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert text.count("data:image/png;base64,") == 2
    for words in ("Colour shift left over, of the base&#x27;s: ", "real–real floor",
                  "base recoloured by mean and deviation ", "Macenko angles, ",
                  "VAE round trip", "n 8", made[2]["hashes"]["lora"], "Notes of this evaluation"):
        assert words in text
    # real | VAE | four arms of 64 px; five panels and a legend
    assert Image.open(out / "grid.png").size == (6 * 68 - 4, 4 * 68 - 4 + 20)
    assert Image.open(out / "histograms.png").size == (3 * 380, 2 * 240)
    assert made[2]["hashes"]["adapter"] == file_hash(made[1] / "adapter.safetensors")
    assert made[2]["versions"]["torch"] == torch.__version__


def test_rerun_draws_nothing_again_and_bytes_do_not_depend_on_other_tiles(made, tmp_path):
    tiles, run, _ = made
    before = drawn(run / "evaluation")
    lost = sorted(before)[3]
    (run / "evaluation" / lost).unlink()
    times = {path: path.stat().st_mtime_ns for path in (run / "evaluation").rglob("images/*/*")}
    evaluate.evaluate(evaluate.parse_evaluate([*command(tiles, run), "--count", "4",
                                               "--seeds", "2"]))
    assert drawn(run / "evaluation") == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert evaluate.main(command(tiles / "TUM", run, "--count", 2, "--arms", "both", "--out",
                                 tmp_path / "other")) == 0
    shared = {name.replace("both/", "both/TUM_"): content
              for name, content in drawn(tmp_path / "other").items()}
    assert len(shared) == 2 and any(before.get(name) == content for name, content in shared.items())


def test_too_little_memory_is_one_line_and_a_fault_of_ours_a_traceback(made, monkeypatch, capsys):
    def fail(*given):
        raise errors.pop()
    errors = [RuntimeError("shape '[2]' is invalid"), MemoryError()]
    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert "out of memory; free some, or draw where there is more" in refused(
        command("tiles", "run"), capsys)
    with pytest.raises(RuntimeError, match="shape"):
        evaluate.main(command("tiles", "run"))


def test_other_settings_in_the_same_folder_are_refused_by_name(made, capsys):
    tiles, run, _ = made
    before = drawn(run / "evaluation")
    error = refused(command(tiles, run, "--steps", 3, "--guidance-scale", 2), capsys)
    assert "num_inference_steps 2 → 3" in error and "guidance_scale 1.5 → 2.0" in error
    assert "evaluation_seed 0 → 7" in refused(command(tiles, run, "--seed", 7), capsys)
    assert drawn(run / "evaluation") == before


def test_a_foreign_file_among_the_images_is_refused(made, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "holiday.png")
    assert "holiday.png" in refused(command(*made[:2], "--out", tmp_path), capsys)


def test_a_second_encoder_measures_too(made, tmp_path):
    other = write_base(tmp_path / "other", seed=5) / "uni"
    (other / "backup.bin").write_bytes(b"not what is read")
    result = evaluate.evaluate(evaluate.parse_evaluate(
        command(*made[:2], "--count", 3, "--arms", "base,both", "--out", tmp_path / "out",
                "--second-encoder", other)))
    own, second = (result["results"]["both"][f"fidelity:{name}"]["values"]["cosine"]
                   for name in ("own", "second"))
    assert own != second and result["hashes"]["second"] == file_hash(other / "model.safetensors")
    assert "second encoder" in (tmp_path / "out" / "report.html").read_text()
    assert list(result["results"]) == ["base", "both", "real_real", "vae", "colour_only", "copies"]


def test_a_run_of_train_py_is_evaluated_on_its_own_held_out_tiles(tiny_base, tiles, tmp_path):
    run = tmp_path / "run"
    assert train.main(["--rank", "2", "--base", str(tiny_base), "--data", str(tiles), "--out",
                       str(run), "--cache", str(tmp_path / "cache"), "--max-train-steps", "1",
                       "--mixed-precision", "no", "--sample-count", "0", "--no-dihedral",
                       "--validation-fraction", "0.5"]) == 0
    result = evaluate.evaluate(evaluate.parse_evaluate(command(tiles, run, "--arms", "both")))
    assert (result["tiles"]["trained_on"], result["tiles"]["used"]) == (4, 4)
    assert result["key"] == {} and "colour_only" not in result["results"]


# ---------------------------------------------------------------- bad input


def test_background_only_tiles_have_no_colour_and_the_rest_is_there(made, tmp_path):
    (tmp_path / "white").mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (255 - i, 255, 255)).save(tmp_path / "white" / f"{i}.png")
    result = evaluate.evaluate(evaluate.parse_evaluate(
        command(tmp_path / "white", made[1], "--out", tmp_path / "out")))
    both = result["results"]["both"]
    assert "background" in both["colour"]["reason"] and "values" in both["overlap:own"]
    assert "density" in both["nuclei"]["reason"] and "values" in both["kernel:own"]
    assert "classes" in result["colour_classifier"]["reason"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "background" in text and "not measured" in text


def test_odd_tiles_are_fitted_or_skipped_and_said(made, tmp_path, capsys):
    tiles = write_tiles(tmp_path / "tiles", 2, seed=3)
    large = write_tiles(tmp_path / "large", 1, seed=4, size=100)
    shutil.copy(large / "STR" / "0.png", tiles / "STR" / "large.png")
    (tiles / "TUM" / "broken.png").write_bytes(b"no image")
    assert evaluate.main(command(tiles, made[1], "--arms", "base", "--out", tmp_path / "o")) == 0
    out = capsys.readouterr().out
    assert "1 of 5 tiles were not 64×64 px; fitted by resize" in out
    assert "skipped" in out and "broken.png" in out


def test_one_tile_is_enough_for_an_image_and_reasons(made, tmp_path):
    tiles = tmp_path / "one"
    tiles.mkdir()
    shutil.copy(made[0] / "TUM" / "5.png", tiles)
    result = evaluate.evaluate(evaluate.parse_evaluate(
        command(tiles, made[1], "--out", tmp_path / "out")))
    both = result["results"]["both"]
    assert "values" in both["colour"] and "needs n >= 2" in both["colour"]["reason"]
    assert "shuffle" in both["fidelity:own"]["reason"]
    assert "reason" in result["results"]["real_real"]["colour"]


def test_training_tiles_that_are_gone_are_named(tiny_base, made, tmp_path):
    gone = write_tiles(tmp_path / "gone", 1, seed=8)
    run = write_run(tmp_path / "run", tiny_base, [gone / "STR" / "0.png", gone / "TUM" / "0.png"])
    (gone / "STR" / "0.png").unlink()
    Image.new("RGB", (64, 64)).save(gone / "TUM" / "0.png")  # changed since
    record = json.loads((run / "tiles.json").read_text())
    record["training"][0]["path"] = "x" * 5000  # longer than a system allows
    (run / "tiles.json").write_text(json.dumps(record))
    result = evaluate.evaluate(evaluate.parse_evaluate(
        command(made[0], run, "--count", 3, "--arms", "base,both")))
    assert any("2 of 2 training tiles are gone or changed" in note for note in result["notes"])
    assert "training tile" in result["results"]["both"]["memorisation:own"]["reason"]
    assert "training tile" in result["results"]["colour_only"]["colour"]["reason"]
    assert "values" in result["results"]["both"]["colour"]


def test_faults_of_the_caller_are_one_line(tiny_base, made, tmp_path, capsys):
    tiles, run, _ = made
    (tmp_path / "empty").mkdir()
    assert "no image" in refused(command(tmp_path / "empty", run), capsys)
    assert "nowhere" in refused(command(tmp_path / "nowhere", run), capsys)
    assert "config.yaml" in refused(command(tiles, tmp_path / "nowhere"), capsys)
    every = [tile.path for tile in find_tiles(tiles)]
    all_seen = write_run(tmp_path / "all", tiny_base, every)
    assert "trained on all of its 12" in refused(command(tiles, all_seen), capsys)
    (all_seen / "tiles.json").write_text('{"training": ["a.png"]}')
    assert "as train.py writes it" in refused(command(tiles, all_seen), capsys)
    (all_seen / "tiles.json").write_text('{"training": [{"path": "a_sd3_vae.npy", "hash": "0"}]}')
    assert "trained on precomputed features" in refused(command(tiles, all_seen), capsys)
    (all_seen / "tiles.json").unlink()
    assert "tiles.json" in refused(command(tiles, all_seen), capsys)
    other = write_base(tmp_path / "other", seed=9)
    assert "LoRA of base" in refused(command(tiles, run, "--base", other), capsys)
    (all_seen / "adapter.safetensors").unlink()
    (all_seen / "tiles.json").write_text('{"training": []}')
    assert "adapter.safetensors" in refused(command(tiles, all_seen), capsys)


@pytest.mark.parametrize("extra", [
    ["--count", "0"], ["--seeds", "0"], ["--steps", "0"], ["--arms", "base,better"],
    ["--arms", "base,base"], ["--seed", "-1"], ["--save-dataset", "x"], ["--per-class", "3"]])
def test_flags_out_of_range_exit_2(extra, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--data", "d", "--run", "r", *extra])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- the dataset


def test_dataset_has_n_per_class_goes_on_and_grows_without_changing(made, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    base = command(*made[:2], "--arms", "both", "--count", 1, "--out", out, "--save-dataset", data)
    assert evaluate.main([*base, "--per-class", "2"]) == 0
    small = {path: path.read_bytes() for path in data.rglob("*.png")}
    assert sorted(str(path.relative_to(data)) for path in small) == [
        f"{label}/{label}_0000{i}.png" for label in ("STR", "TUM") for i in range(2)]
    assert {tile.label for tile in find_tiles(data)} == {"STR", "TUM"}
    (data / "STR" / "STR_00001.png").unlink()
    assert evaluate.main([*base, "--per-class", "5"]) == 0  # 4 held-out tiles: one comes twice
    large = {path: path.read_bytes() for path in data.rglob("*.png")}
    assert len(large) == len(set(large.values())) == 10
    assert all(large[path] == content for path, content in small.items())
    settings = [read_settings(data / "STR" / f"STR_0000{i}.png") for i in range(5)]
    assert settings[0]["tile_hash"] == settings[4]["tile_hash"] != settings[1]["tile_hash"]
    assert settings[0]["arm"] == "both" and len({s["seed"] for s in settings}) == 5
    error = refused([*base, "--per-class", "4"], capsys)
    assert "STR_00004.png: more than is asked for now" in error
    (data / "STR" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused([*base, "--per-class", "5"], capsys)


def test_a_dataset_grows_without_changing_where_a_tile_is_unreadable(made, tmp_path):
    tiles, data = shutil.copytree(made[0], tmp_path / "tiles"), tmp_path / "data"
    (tiles / "TUM" / "2.png").write_bytes(b"no image")  # the first one held out
    (tiles / "TUM" / "lost.png").symlink_to(tmp_path / "nowhere")
    base = command(tiles, made[1], "--arms", "both", "--count", 1, "--out", tmp_path / "out",
                   "--save-dataset", data)
    assert evaluate.main([*base, "--per-class", "2"]) == 0
    small = {path: path.read_bytes() for path in data.rglob("*.png")}
    assert evaluate.main([*base, "--per-class", "3"]) == 0
    assert all(path.read_bytes() == content for path, content in small.items())
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    for name in ("2.png", "lost.png"):
        assert any(note.startswith(f"skipped {tiles / 'TUM' / name}: ") for note in notes)


def test_the_first_unreadable_tile_that_is_named_is_a_held_out_one(made, tmp_path, capsys):
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "a.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "tiles" / "b.png").write_bytes(b"no image")
    assert f"among 1 held-out ones; first skipped {tmp_path / 'tiles' / 'b.png'}: " in refused(
        command(tmp_path / "tiles", made[1]), capsys)


def test_tiles_none_of_which_can_be_opened_are_one_line(made, tmp_path, capsys):
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "a.png").symlink_to(tmp_path / "nowhere")
    assert "none of 1 tiles can be opened; first skipped" in refused(
        command(tmp_path / "tiles", made[1]), capsys)


def test_a_class_without_held_out_tiles_takes_its_training_tiles_and_says_so(
        tiny_base, made, tmp_path):
    run = write_run(tmp_path / "run", tiny_base, sorted((made[0] / "TUM").iterdir()))
    result = evaluate.evaluate(evaluate.parse_evaluate(command(
        made[0], run, "--arms", "both", "--count", 1, "--save-dataset", tmp_path / "data",
        "--per-class", 1)))
    assert (tmp_path / "data" / "TUM" / "TUM_00000.png").exists()
    assert any("TUM has no held-out tile" in note for note in result["notes"])


# ---------------------------------------------------------------- parts


def test_spread_is_even_over_classes_then_files():
    tiles = {f"{label}{i}": Tile(Path(f"{i}.png"), label)
             for label, count in (("A", 1), ("B", 9), ("C", 9)) for i in range(count)}
    assert list(evaluate.spread(tiles, 7)) == ["A0", "B0", "B3", "B6", "C0", "C3", "C6"]
    assert list(evaluate.spread(tiles, 2)) == ["A0", "B0"]
    assert list(evaluate.spread(tiles, 99)) == list(tiles)


def test_image_seed_depends_on_seed_tile_and_number_alone():
    seeds = {evaluate.image_seed(*key)
             for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]}
    assert len(seeds) == 4 and all(0 <= seed < 2**56 for seed in seeds)


def test_correlations_equal_scipy_ties_included():
    x, y = np.random.default_rng(0).integers(0, 5, (2, 40)).astype(float)
    assert comparison.correlations(x, y) == pytest.approx(
        [scipy.stats.pearsonr(x, y)[0], scipy.stats.spearmanr(x, y)[0]])
    assert comparison.correlations(x, x * 0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="variation"):
        comparison.varied(x, x * 0)


def test_tile_cosines_are_own_others_and_their_difference():
    conditions, images = np.random.default_rng(0).normal(size=(2, 6, 5))
    conditions = conditions[:3]
    own, others, margin = comparison.tile_cosines(conditions, images, 2)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (conditions, images)]
    table = (unit[0] @ unit[1].T).reshape(3, 3, 2).mean(2)  # condition, tile of the image
    assert own == pytest.approx(np.diag(table))
    assert others == pytest.approx((table.sum(0) - np.diag(table)) / 2)
    assert margin == pytest.approx(own - others)


def test_centred_takes_the_conditions_mean_off_both():
    conditions, images = comparison.centred(np.array([[1., 2.], [3., 6.]]), np.array([[2., 5.]]))
    assert conditions.tolist() == [[-1, -2], [1, 2]] and images.tolist() == [[0, 1]]


def test_colour_classifier_leaves_the_tile_itself_out():
    def sample(label, level):
        return evaluate.Sample(Tile(Path("x.png"), label), "", np.full((2, 2, 3), level), None)

    apart = [sample("A", 10), sample("A", 12), sample("B", 90), sample("B", 92)]
    assert comparison.classify_by_colour(apart) == {"accuracy": 1, "largest_class": 0.5}
    alone = [sample("A", 10), sample("A", 80), sample("B", 20), sample("B", 21)]
    assert comparison.classify_by_colour(alone)["accuracy"] == 0.5  # each A is nearer to B's centroid


def test_noise_floor_halves_every_class():
    generator = np.random.default_rng(0)
    samples = [evaluate.Sample(Tile(Path("x.png"), label), "", (generator.integers(
        0, 40, (16, 16, 3)) + level).astype(np.uint8), None)
        for label, level in (("A", 20), ("B", 150)) for _ in range(4)]
    floor = comparison.noise_floor(samples, {"own": generator.normal(size=(8, 3))}, 0)
    assert floor["colour"]["n"] == 4 and floor["colour"]["values"]["lab_l"] < 2  # classes: 50 apart
    assert "values" in floor["kernel:own"] and "needs >= 6" in floor["overlap:own"]["reason"]


def test_copies_of_training_tiles_are_caught_by_the_screen(monkeypatch):
    generator = np.random.default_rng(0)
    monkeypatch.setattr(comparison, "round_trip", lambda pipeline, image: np.asarray(image))

    def encoder(image):
        return torch.tensor(np.asarray(image)).float().reshape(1, 1, -1) - 127

    held_out, training = np.split(generator.integers(0, 255, (26, 8, 8, 3), np.uint8), [20])
    models = SimpleNamespace(pipeline=None, encoders={"own": encoder})
    features, trained = (comparison.embed(encoder, its) for its in (held_out, training))
    entry = comparison.control(models, {"own": features}, {"own": trained}, training)
    assert entry["memorisation:own"]["values"]["closer_share"] == 1
    gone = comparison.control(models, {"own": features}, {"own": []}, training)
    assert "reason" in gone["memorisation:own"]


def test_recolour_takes_on_the_mean_colour_of_the_training_tiles():
    generator = np.random.default_rng(0)
    images, target = (list((generator.integers(0, 60, (3, 16, 16, 3)) + np.array(level)).astype(
        np.uint8)) for level in ((100, 60, 120), (60, 90, 90)))
    moved = comparison.recolour(images, target)
    assert (metrics.colour_shift(target, moved)["reinhard_mean"]
            < 0.1 * metrics.colour_shift(target, images)["reinhard_mean"])


def test_texts_of_the_report_are_escaped(made):
    result = made[2] | {"notes": ["<b>bold</b>"], "run": "<run>"}
    text = report.page(result, b"", b"")
    assert "<b>" not in text and "&lt;b&gt;bold" in text and "<run>" not in text


def test_histograms_leave_out_what_has_no_tissue():
    white = [np.full((8, 8, 3), 255, np.uint8)]
    purple = [np.random.default_rng(0).integers(60, 160, (8, 8, 3)).astype(np.uint8)]
    empty, one = (np.array(report.histogram_figure({"real": real, "base": white}))
                  for real in (white, purple))
    assert empty.shape == one.shape and not (one == empty).all()
    base = np.array([0xd9, 0x5f, 0x02])
    assert not (one == base).all(-1).any()
    both = np.array(report.histogram_figure({"real": purple, "base": purple}))
    assert (both == base).all(-1).any()
