"""Benchmarks: adaptation.py's variants and medians; what the others measure, on a tiny base."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from PIL import Image

from conftest import ROOT
from pixcell_min.lora import LoRALinear
from pixcell_min.config import parse_train
from pixcell_min.data import image_to_tensor, tensor_to_image
from pixcell_min.tools import evaluate
from pixcell_min.tools.synthetic import FIRST, SECOND, write_dataset

sys.path.insert(0, str(ROOT / "benchmarks"))  # where they find each other


def benchmark(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


adaptation = benchmark("adaptation")


@pytest.mark.parametrize("name", adaptation.VARIANTS)
def test_each_variant_changes_what_its_name_says(name):
    config, _ = parse_train(adaptation.VARIANTS[name])
    if name.startswith("rank"):
        assert name == f"rank {config.lora_rank}, alpha {config.lora_alpha:g}"
    elif "trained alone" in name:
        assert [config.learning_rate == 0, config.adapter_learning_rate == 0] == [
            name.startswith("adapter"), name.startswith("LoRA")]
        assert config.adapter_learning_rate == 3e-3 or "3e-3" not in name
    else:
        assert config.lora_attention == {"default": ("attn1", "attn2"),
                                         "self-attention alone": ("attn1",),
                                         "cross-attention alone": ("attn2",)}[name]


def report_of(colour, cosine, steps=20):
    column = {"colour": {"values": {"lab_mean": colour}},
              "fidelity:own": {"values": {"cosine": cosine}}, "nuclei": {"reason": "too few"}}
    return {"results": {"base": column, "both": column}, "key": {"colour_percent": {
        "values": {"value": 10 * colour}, "intervals": {"value": [colour, 90]}}}, "data": "d", "tiles": {}, "settings": {"steps": steps},
        "training_settings": {}, "versions": {}, "machine": {}, "date": "", "file_bytes": {},
        "hashes": {"base": "b"}}


def test_results_are_medians_over_the_seeds(tmp_path):
    for seed, colour in enumerate((3.0, 9.0, 4.0)):
        folder = adaptation.folder_of(tmp_path, "rank 4, alpha 8", seed)
        (folder / "evaluation").mkdir(parents=True)
        (folder / "evaluation" / "report.json").write_text(json.dumps(report_of(colour, 0.5)))
        (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 7.0}\n{"step": 1}\n')
    options = type("Options", (), {"name": "try", "train": ""})
    results = adaptation.collect(tmp_path, options)
    variant = results["variants"]["rank 4, alpha 8"]
    assert results["commit"] and variant["seeds"] == 3 and list(results["variants"]) == ["rank 4, alpha 8"]
    assert variant["columns"]["both"]["colour W1"] == {"median": 4.0, "values": [3.0, 9.0, 4.0]}
    assert variant["columns"]["both"]["nuclei r"] is None
    assert variant["colour, % of base"]["median"] == 40
    assert variant["value, low, high"] == {
        "colour, % of base": [[30, 3, 90], [90, 9, 90], [40, 4, 90]],
        "gain in cosine": [None] * 3, "gain in cosine, centred": [None] * 3}
    assert variant["training_seconds"]["median"] == 7
    lines = adaptation.table(results).splitlines()
    assert len(lines) == 4
    assert "| 3 | 40 (30…90) | 4 (3…9) |" in lines[3] and "| 3 | – | 4 (3…9) |" in lines[2]
    (folder / "evaluation" / "report.json").write_text(json.dumps(report_of(4.0, 0.5, steps=50)))
    with pytest.raises(SystemExit, match="other settings"):  # two recipes in one folder
        adaptation.collect(tmp_path, options)


def test_averaged_weights_are_trained_then_evaluated(tmp_path, monkeypatch):
    def call(command, folder, options):
        commands.append(command)
        (folder / "evaluation/images/base").mkdir(parents=True, exist_ok=True)
    commands = []
    monkeypatch.setattr(adaptation, "call", call)
    monkeypatch.setattr(sys, "argv", ["adaptation.py", "--name", "x", "--data", "d", "--variants",
                                      "default", "--seeds", "1", "--work", str(tmp_path),
                                      "--train", "--ema-decay 0.9", "--ema"])
    monkeypatch.setattr(adaptation, "collect", lambda work, options: sys.exit(0))
    with pytest.raises(SystemExit):
        adaptation.main()
    report = adaptation.folder_of(tmp_path / "x", "default", 0) / "evaluation" / "report.json"
    report.write_text('{"settings": {"ema": false}}')
    with pytest.raises(SystemExit, match="with --ema or without"):
        adaptation.main()
    monkeypatch.setattr(sys, "argv", ["adaptation.py", "--name", "x", "--ema"])
    with pytest.raises(SystemExit, match="2"):  # and no hour of training before that
        adaptation.main()
    trained, evaluated = commands
    config, _ = parse_train(trained[2:])
    options = evaluate.parse_evaluate(evaluated[3:])
    assert config.ema_decay == 0.9 and options.ema
    assert options.out == adaptation.folder_of(tmp_path / "x", "default", 0) / "evaluation"


def test_a_linear_codes_psnr_is_that_of_what_16_components_leave_out(rng=torch.Generator()):
    quality = benchmark("base_quality")
    basis = torch.linalg.qr(torch.randn(192, 192, generator=rng.manual_seed(0)))[0]
    scale = torch.cat([torch.full((16,), 0.3), torch.full((176,), 0.02)])
    patches = torch.randn(4, 24, 24, 192, generator=rng) * scale @ basis.T
    images = rearrange(patches, "b h w (c i j) -> b c (h i) (w j)", i=8, j=8)
    assert images.abs().max() < 1
    images = [tensor_to_image(image) for image in images]
    left_out = 176 * 0.02**2 / 192  # of each pixel value, of ±1
    assert quality.linear_psnr(images) == pytest.approx(10 * math.log10(4 / left_out), abs=0.2)
    assert quality.may_stay_as_stored(images)
    assert not quality.may_stay_as_stored([*images, images[0].resize((64, 64))])
    assert not quality.may_stay_as_stored([images[0].resize((150, 150))])


def test_true_shift_is_that_of_the_stain_alone(tmp_path):
    for laboratory in (FIRST, SECOND):
        write_dataset(tmp_path / laboratory.name, 4, laboratory, 5)
    same, other = (adaptation.true_shift(tmp_path / name) for name in (FIRST.name, SECOND.name))
    assert set(same) == {"colour W1", "H angle °", "E angle °"} == set(other)
    assert all(value == 0 for value in same.values()) and all(value > 2 for value in other.values())


def test_the_first_run_is_that_of_the_readmes_command(tiny_base, tiles, tmp_path, monkeypatch):
    first_run, real, commands = benchmark("first_run"), subprocess.run, []

    def shortened(command, **options):
        if "train.py" in str(command[1]):
            commands.append(list(map(str, command)))
            command = [*command, "--max-train-steps", "3", "--batch-size", "2", "--sample-count", "1"]
        return real(command, **options)
    monkeypatch.setattr(first_run.subprocess, "run", shortened)
    monkeypatch.setenv("PIXCELL_BASE", str(tiny_base))
    out, work = tmp_path / "first.json", tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["first_run.py", "--data", str(tiles), "--out", str(out),
                                      "--work", str(work)])
    first_run.main()
    result = json.loads(out.read_text())
    assert commands == [[sys.executable, str(ROOT / "train.py"), "--rank", "8", "--alpha", "16", "--out",
                         str(work / "run"), "--cache", str(work / "cache"), "--data", str(tiles)]]
    assert result["tiles"] == 8 and list(result["validation_loss"]) == ["0", "3"]
    assert result["file_bytes"] == {
        name: (work / "run" / name).stat().st_size
        for name in ("lora_weights.safetensors", "adapter.safetensors")}
    clock = [json.loads(line).get("seconds") for line in open(work / "run" / "metrics.jsonl")
             if "grad_norm" in line]
    assert result["seconds_per_optimizer_step"] == pytest.approx((clock[2] - clock[0]) / 2, abs=6e-4)
    assert 0 < result["seconds_per_image_50_steps_ddim_guided"] < result["wall_seconds_of_train_py"]
    assert result["printed"][0].startswith("trainable: LoRA") and result["machine"]["torch"]


def test_the_cost_of_saving_is_that_of_files_which_resume(tiny_base, tmp_path):
    result = benchmark("resume").measure(tiny_base, 1, tmp_path)
    assert result["state_bytes"] == (tmp_path / "states/step-00000000.pt").stat().st_size > 0
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "lora_weights.safetensors", "adapter.safetensors"}
    assert min(result[f"{name}_seconds"] for name in ("step", "save", "load")) > 0
    assert 0 < result["share_of_time_saving"] < 1


def test_the_backward_by_hand_is_that_of_autograd():
    levers, results = benchmark("levers"), []
    layer = LoRALinear(torch.nn.Linear(6, 5), 2, 5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    given = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    for way in (LoRALinear.forward, levers.by_hand):
        x = given.clone().requires_grad_()
        layer.zero_grad()
        out = way(layer, x)
        out.square().sum().backward()
        results.append([out, x.grad, layer.lora_A.grad, layer.lora_B.grad])
    for ours, other in zip(*results):
        torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-5)


def test_a_lever_is_the_other_ways_time_over_ours_after_a_turn_to_warm_up(monkeypatch):
    levers, clock = benchmark("levers"), iter([0, 1, 1, 9, 0, 2, 2, 6])
    monkeypatch.setattr(levers.time, "process_time", clock.__next__)
    result = levers.ratio(lambda: [torch.tensor(2.0)], lambda: [torch.tensor(3.0)], 1)
    assert result == {"ratio": {"median": 2, "min": 2, "max": 2}, "seconds": 2, "difference": 0.5}


def test_rows_of_a_guided_image_are_counted_by_the_pipelines_rule():
    interval = benchmark("guidance_interval")
    assert {name: interval.rows(its) for name, its in interval.INTERVALS.items()} == {
        "everywhere": 40, "0.4 to 3": 27, "below 3": 29}


def test_retrieval_counts_the_copies_whose_nearest_tile_is_their_original():
    quality, seen = benchmark("base_quality"), []
    images = [Image.new("RGB", (32, 32), colour) for colour in ("white", "gray", "black", "red")]
    for image in images:
        image.paste("blue", (0, 0, 16, 4))  # a corner, so that a turn is seen

    def by_colour(images):
        images = images if isinstance(images, list) else [images]
        seen.extend(images)
        pixels = torch.stack([image_to_tensor(image) for image in images])
        return torch.cat([pixels.mean((2, 3)), torch.ones(len(pixels), 1)], dim=1)[:, None]

    def blind(images):
        return torch.ones(len(images) if isinstance(images, list) else 1, 1, 4)
    found = quality.retrieval(by_colour, images, by_colour(images)[:, 0])
    lost = quality.retrieval(blind, images, blind(images)[:, 0])
    assert found["chance"] == lost["chance"] == lost["turned"] == lost["restained"] == 0.25
    assert found["turned"] == 1 and found["restained"] == found["turned and restained"]
    plain, turned, restained, both = ([image.tobytes() for image in seen[i:i + 4]] for i in range(0, 16, 4))
    for one, other in ((plain, turned), (plain, restained), (restained, both)):
        assert all(a != b for a, b in zip(one, other))


def test_a_samples_cosine_to_its_condition_and_to_others_by_guidance():
    quality = benchmark("base_quality")
    conditions = torch.eye(4)[:, None]                                       # (4, 1, E)

    class Stub:  # at scale 2 a sample is its condition, else the next one's
        def __call__(self, condition, steps, scale, scheduler, seed, progress):
            drawn = condition if scale == 2 else conditions[(seed + 1) % 4]
            return type("Output", (), {"images": [drawn]})

        def encoder(self, images):
            return torch.stack(images)
    result, images = quality.guidance(Stub(), None, conditions)
    assert list(images) == list(quality.SCALES) and len(images[2.0]) == 4
    assert result["2"] == {"cosine": 1, "interval": [1, 1], "shuffled": 0}
    assert result["3"]["cosine"] == 0 and result["3"]["shuffled"] == pytest.approx(1 / 3)
