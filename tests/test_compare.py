"""compare.py, scaling.py, memory.py of benchmarks/: both sides compute the same; turns, ratios, parts."""

import json
import os
import sys

import pytest
from PIL import Image
from safetensors import safe_open

from conftest import ROOT, case_of

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import memory  # noqa: E402
import scaling  # noqa: E402
import sides  # noqa: E402

FLOAT32 = 1e-5  # of the largest value: output and every gradient of LoRA
BF16 = 0.1  # eight bits, on both sides


@pytest.mark.parametrize("settings", [
    {"kind": "train", "batch": 3}, {"kind": "train", "batch": 2, "checkpointing": True},
    {"kind": "train", "batch": 2, "precision": "bf16"},
    {"kind": "forward", "batch": 2, "merged": True}, {"kind": "forward", "batch": 2},
    {"kind": "sample", "scheduler": "ddim", "steps": 5},
    {"kind": "sample", "scheduler": "dpmpp_2m", "steps": 5, "merged": True},
    {"kind": "encode"}, {"kind": "decode"}, {"kind": "encoder"}, {"kind": "load"},
    pytest.param({"kind": "train", "batch": 2, "compiled": True}, marks=pytest.mark.slow),
    pytest.param({"kind": "forward", "batch": 2, "compiled": True}, marks=pytest.mark.slow),
], ids=lambda settings: " ".join(str(value) for value in settings.values()))
def test_both_sides_compute_the_same(compared_base, settings):
    case = case_of(compared_base, **settings)
    ours, peer = (kinds[case["kind"]](case)() for kinds in (sides.OURS, sides.PEER))
    assert compare.largest_difference(ours, peer) < (BF16 if case["precision"] == "bf16" else FLOAT32)
    if case["kind"] == "train":  # a wrong gradient is seen
        name = next(name for name in ours if name.endswith("attn1.to_v.lora_A"))
        ours[name] = ours[name] + 0.2 * peer[name].abs().max()
        assert compare.largest_difference(ours, peer) > 0.1


def test_an_epoch_with_cached_features_and_with_vae_and_encoder_in_every_step(compared_base):
    case = case_of(compared_base, kind="epoch", batch=2)
    sides.OURS["first pass"](case)()
    for kinds in (sides.OURS, sides.PEER):
        assert kinds["epoch"](case)()["loss"] > 0


def test_every_case_is_known_to_both_sides():
    for case in compare.cases().values():
        assert case["kind"] in sides.OURS.keys() & sides.PEER.keys()


def test_a_ratio_is_ours_over_the_peers_of_the_same_turn():
    assert compare.ratios_of({"ours": [1.0, 2.0, 9.0], "peer": [2.0, 2.0, 3.0]}) == {
        "median": 1.0, "min": 0.5, "max": 3.0}


def test_turns_ratios_and_table_and_nothing_twice(compared_base, tmp_path, capsys, monkeypatch):
    work, out = compared_base.parent, tmp_path / "results.json"
    arguments = ["--size", "tiny", "--cases", "encoder-float32", "--repeats", "2", "--threads", "1",
                 "--work", str(work), "--out", str(out)]
    compare.main(arguments)
    (key, result), = json.loads(out.read_text()).items()
    assert key == "tiny encoder-float32"
    assert 0 < result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    assert all(0 < result["imported_mb"] < peak for peak in result["peak_mb"].values())
    assert "| encoder-float32 |" in capsys.readouterr().out
    monkeypatch.setattr(compare, "measure", None)  # measured already
    compare.main(arguments)


def test_growth_is_measured_once_and_drawn(compared_base, tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    monkeypatch.setattr(scaling, "GROWTH", {"batch": (
        (1, 3), lambda n: {"kind": "forward", "batch": n}, lambda n: n)})
    arguments = ["--size", "tiny", "--growth", "batch", "--repeats", "1", "--threads", "1",
                 "--work", str(compared_base.parent), "--out", str(out), "--figure", str(picture)]
    scaling.main(arguments)
    points = json.loads(out.read_text())["points"]["batch"]
    assert [*points] == ["1", "3"] and all(p["cpu_seconds"] > 0 < p["mb"] for p in points.values())
    assert Image.open(picture).size == (600, 464) and "batch 1:" in capsys.readouterr().out
    monkeypatch.setattr(scaling, "measure", None)
    scaling.main(arguments)


def test_a_cache_of_features_is_opened_and_read(compared_base):
    case = case_of(compared_base, kind="cache", count=5)
    made, read = (sides.OURS["cache"](case)()["embeddings"] for _ in range(2))
    assert made.shape == (4, 1, 1536) and made.equal(read)


def test_the_parts_of_a_training_steps_memory(compared_base):
    with safe_open(compared_base / "transformer" / sides.WEIGHTS, "pt") as file:
        read = sum(file.get_tensor(key).nbytes / 1e6 for key in file.keys()  # noqa: SIM118
                   if "attn2.to_q" not in key and "attn2.to_k" not in key and "uncond" not in key)
    width, blocks, layers = 16, 2, 6  # q, k, v and out of one attention, v and out of the other
    found = {}
    for name, case in memory.CASES.items():
        found[name] = its = memory.parts(case_of(compared_base, **case))
        assert its["cpu_seconds"] > 0
        assert its["trained"] == pytest.approx(4 * 4 * 2 * sides.RANK * width * blocks * layers / 1e6)
        share = its["weights"] / read
        assert share == pytest.approx(1) if "float32" in name else 0.5 < share < 0.6  # but tables
    for precision in ("bf16", "float32"):
        one, four = (found[f"train-{batch}-{precision}"] for batch in (1, 4))
        assert one["weights"] == four["weights"] and 3.4 < four["kept"] / one["kept"] <= 4


def test_memory_is_measured_in_processes_of_its_own(compared_base, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CASES", {"one": memory.CASES["train-1-bf16"]})
    memory.main(["--size", "tiny", "--work", str(compared_base.parent), "--threads", "1",
                 "--out", str(tmp_path / "memory.json")])
    its = json.loads((tmp_path / "memory.json").read_text())["cases"]["one"]
    assert its.keys() == {"usual", "given back at once"}
    for parts in its.values():
        assert parts["imported"] > 50 and 0 < parts["rest"] < parts["peak"] - parts["imported"]
    (name, value), = memory.AT_ONCE.items()
    assert memory.alone(os.getenv, name, memory.AT_ONCE) == value and name not in os.environ
