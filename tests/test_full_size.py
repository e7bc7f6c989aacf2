"""benchmarks/full_size.py still runs, with tiny networks; its committed figures are what it writes."""

import importlib.util
import json
import subprocess

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("full_size", ROOT / "benchmarks" / "full_size.py")
full_size = importlib.util.module_from_spec(spec)
spec.loader.exec_module(full_size)
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("full_size_*.json"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size")
    full_size.write_weights(folder, tiny=True)
    return folder


@pytest.mark.parametrize("name", full_size.MEASURES)
def test_each_measure_runs(weights, name):
    result = full_size.measure(name, weights, repeats=1)
    assert result["all_seconds"] == [result["seconds"]] and result["seconds"] > 0 and result["peak_mb"] >= 0


def test_without_repeats_the_first_call_counts(weights):
    result = full_size.measure("load vae, bf16", weights, repeats=0)
    assert result["seconds"] == result["first_seconds"] > 0 and result["all_seconds"] == []


def test_a_run_is_one_file_and_leaves_no_weights(tmp_path, monkeypatch):
    only = ["load vae, bf16", "vae decode 1024, float32"]
    out, asked, apart = tmp_path / "out.json", [], full_size.measure_apart
    monkeypatch.setattr(full_size, "measure_apart", lambda name, options: asked.append(name) or (
        apart(name, options) if name == only[0] else {"failed": "no memory"}))
    command = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(out), "--repeats", "2",
               "--note", "quiet", "--only", *only]
    assert full_size.main(command) == 1  # one failed: weights stay, for another try
    assert json.loads(out.read_text())["measures"][only[1]] == {"failed": "no memory"}
    monkeypatch.setattr(full_size, "measure_apart", lambda name, options: asked.append(name) or {
        "seconds": 1.0, "peak_mb": 1.0})
    assert full_size.main(command) == 0 and asked == [*only, only[1]]  # the first is not run again
    result = json.loads(out.read_text())
    assert list(result["measures"]) == only and len(result["measures"][only[0]]["all_seconds"]) == 2
    assert result["note"] == "quiet" and {"cpu", "threads", "torch"} <= result["machine"].keys()
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    assert not (tmp_path / "work" / "full_size.json").exists()


@pytest.mark.parametrize("code, said, line", [
    (1, "Traceback\nValueError: no base model\n", "ValueError: no base model"),
    (-9, "", "exit code -9")])
def test_a_measure_that_dies_is_a_line(tmp_path, monkeypatch, code, said, line):
    monkeypatch.setattr(full_size.subprocess, "run", lambda command, **_: (
        subprocess.CompletedProcess(command, code, "", said)))
    options = type("Options", (), {"work": tmp_path, "repeats": 1})
    assert full_size.measure_apart("embed 256, float32", options) == {"failed": line}


def test_table_by_hand():
    measures = {"a": {"seconds": 1.2345, "peak_mb": 2345.6}, "b": {"failed": "no memory"}}
    assert full_size.table({"measures": measures}).splitlines()[2:] == ["| a | 1.23 | 2.35 |"]


def test_the_readme_has_a_committed_table():
    readme = (ROOT / "README.md").read_text()
    assert not RESULTS or any(
        full_size.table(json.loads(path.read_text())) in readme for path in RESULTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_figures_keep_the_promise_of_loading(path):
    result = json.loads(path.read_text())
    assert not result["tiny"]
    assert result["measures"].keys() >= full_size.MEASURES.keys() - {
        "train 1024, batch 1, checkpointing, bf16"}  # more than a CPU ends in minutes
    assert list(result["measures"]) == [n for n in full_size.MEASURES if n in result["measures"]]
    assert not [name for name, its in result["measures"].items() if "failed" in its]
    files = {"transformer": "pixcell-256/transformer/diffusion_pytorch_model.safetensors",
             "vae": "sd3-vae/diffusion_pytorch_model.safetensors",
             "encoder": "uni2-h/pytorch_model.bin"}
    for part, file in files.items():
        for word in ("float32", "bf16"):
            peak = result["measures"][f"load {part}, {word}"]["peak_mb"]
            assert peak < 1.3 * result["file_bytes"][file] / 1e6, (part, word)
