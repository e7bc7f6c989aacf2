"""What the doctor says of whole, broken, missing and half-fetched weights, and of what fits."""

import csv
import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, SCHEDULER

from pixcell_min import base as base_module
from pixcell_min.base import load_pixcell_base
from pixcell_min.checkpoint import file_hash
from pixcell_min.released import RELEASES
from pixcell_min.tools import doctor
from pixcell_min.tools.download import RECORD

WEIGHTS = "diffusion_pytorch_model.safetensors"
TSV = ROOT / "tests" / "data"


pytestmark = pytest.mark.usefixtures("nothing_downloaded")


def examined(capsys, *arguments):
    """(exit code, the report) of the command line with --json."""
    code = doctor.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


# Whole

def test_a_whole_base(own_base, capsys):
    code, report = examined(capsys, "--base", own_base)
    base, = report["bases"]
    assert code == 0 and base["runs"] and base["folder"] == str(own_base)
    assert {part["state"] for part in base["parts"].values()} == {"whole"}
    pipeline = load_pixcell_base(own_base)
    for name, module in (("transformer", pipeline.transformer), ("vae", pipeline.vae),
                         ("encoder", pipeline.encoder.vit)):
        count = sum(value.numel() for value in module.state_dict().values())
        assert base["parts"][name]["parameters"] == count


def test_the_table_names_every_release_its_gate_and_its_licence(own_base, capsys):
    assert doctor.main(["--base", str(own_base)]) == 0
    text = capsys.readouterr().out
    assert f"{own_base}: ready" in text
    for name, release in RELEASES.items():
        assert f"{name}: missing" in text and release.licence in text
        assert f"tools.download {name}" in text
        assert (f"gated: ask at {release.page}" in text) == release.gated
    assert f"torch {torch.__version__.split('+')[0]}" in text and "disk free" in text
    missing = sum(release.gigabytes for release in RELEASES.values())
    assert f"what is missing takes {missing:.1f} GB: " in text


def test_without_arguments_it_looks_at_the_embedded_base_and_both_released_ones(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base_module, "REPOSITORY", tmp_path)
    monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    code, report = examined(capsys)
    assert code == 0 and [base["base"] for base in report["bases"]] == [
        "weights/pixcell-nano", "weights/pixcell-256", "weights/pixcell-1024"]
    assert report["bases"][0]["runs"]


def test_with_no_base_at_all_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert doctor.main([]) == 1
    assert "weights/pixcell-256: not there" in capsys.readouterr().out


def sparse(path, tensors, tail=0):
    """A safetensors file of zeros of the released size that takes no room on disk."""
    with open(TSV / tensors) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    header, end = {}, 0
    for row in rows:
        shape = [int(n) for n in row["shape"].split(",")]
        header[row["key"]] = {"dtype": "F32", "shape": shape,
                              "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end + tail)
    return end // 4


def released_layout(folder, tail=0):
    """PixCell-256, VAE and UNI2-h as they are released, in full size. → how many values."""
    base = folder / "pixcell-256"
    shutil.copytree(ROOT / "weights" / "pixcell-nano" / "vae", base / "vae",
                    ignore=lambda *_: [WEIGHTS])
    count = sparse(base / "transformer" / WEIGHTS, "pixcell-256.tsv", tail)
    count += sparse(folder / "sd3-vae" / "vae" / WEIGHTS, "sd3-vae.tsv")
    count += sparse(folder / "uni2-h" / "model.safetensors", "uni2-h.tsv")
    nano = json.loads((ROOT / "weights/pixcell-nano/transformer/config.json").read_text())
    vae = json.loads((base / "vae" / "config.json").read_text())
    for path, config in (
            (base / "transformer", {**nano, "num_layers": 28, "num_attention_heads": 16,
                                    "attention_head_dim": 72, "caption_channels": 1536}),
            (base / "vae", {**vae, "block_out_channels": [128, 256, 512, 512],
                            "layers_per_block": 2, "norm_num_groups": 32}),
            (folder / "uni2-h", {"architecture": "vit_giant_patch14_224"})):
        (path / "config.json").write_text(json.dumps(config))
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return count


def test_the_released_sizes(tmp_path, capsys):
    count = released_layout(tmp_path)
    code, report = examined(capsys, "--base", tmp_path / "pixcell-256")
    base, = report["bases"]
    assert code == 0 and base["runs"], base["parts"]
    assert sum(part["parameters"] for part in base["parts"].values()) == count
    sizes = [row["weights_bytes"] for row in base["fit"]]
    assert sizes[0] == 4 * count and 5.4e9 < 4 * count < 5.6e9
    half = sizes[0] - 2 * base["parts"]["transformer"]["parameters"]
    assert sizes[1:] == [half, half] and 4.2e9 < half < 4.4e9


def test_one_byte_less_than_released(tmp_path, capsys):
    released_layout(tmp_path, tail=-1)
    code, report = examined(capsys, "--base", tmp_path / "pixcell-256")
    state = report["bases"][0]["parts"]["transformer"]["state"]
    assert code == 1 and "truncated or damaged" in state and WEIGHTS in state


# Broken

def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("part, damage, words", [
    ("transformer", lambda b: cut(b / "transformer" / WEIGHTS), "truncated or damaged"),
    ("transformer", lambda b: (b / "transformer" / WEIGHTS).unlink(), "no such file"),
    ("transformer", lambda b: change(b / "transformer/config.json", num_layers=3), "is missing"),
    ("transformer", lambda b: change(b / "transformer/config.json", num_layers=1), "not belong"),
    ("transformer", lambda b: change(b / "transformer/config.json", caption_channels=24),
     "expected ("),
    ("transformer", lambda b: cut(b / "transformer/config.json"), "not valid JSON"),
    ("scheduler", lambda b: shutil.rmtree(b / "scheduler"), "cannot be read"),
    ("vae", lambda b: cut(b / "vae" / WEIGHTS), "truncated or damaged"),
    ("vae", lambda b: (b / "vae" / WEIGHTS).unlink(), "tools.download sd3-vae"),
    ("vae", lambda b: change(b / "vae/config.json", act_fn="relu"), "only 'silu' is supported"),
    ("encoder", lambda b: shutil.rmtree(b / "uni"), "tools.download uni2-h"),
    ("encoder", lambda b: (b / "uni/model.safetensors").unlink(), "no model.safetensors or"),
    ("encoder", lambda b: change(b / "uni/config.json", model_args={"depth": "x"}), "refuses"),
    ("encoder", lambda b: change(b / "uni/config.json", architecture="vit_tiny"), "'vit_tiny', expected"),
])
def test_a_broken_part_is_a_line_of_the_table(own_base, capsys, part, damage, words):
    damage(own_base)
    code, report = examined(capsys, "--base", own_base)
    states = {name: value["state"] for name, value in report["bases"][0]["parts"].items()}
    assert code == 1 and words in states.pop(part) and set(states.values()) == {"whole"}
    assert doctor.main(["--base", str(own_base)]) == 1
    assert f"{own_base}: not ready" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_a_broken_pickle(own_base, capsys, content):
    tensors = load_pixcell_base(own_base).encoder.vit.state_dict()
    (own_base / "uni" / "model.safetensors").unlink()
    file = own_base / "uni" / "pytorch_model.bin"
    torch.save(tensors, file)
    assert examined(capsys, "--base", own_base)[0] == 0
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    code, report = examined(capsys, "--base", own_base)
    assert code == 1
    assert "truncated or damaged" in report["bases"][0]["parts"]["encoder"]["state"]


def test_bad_input(tmp_path, capsys):
    for arguments in (["--base", str(tmp_path / "none")], ["--bass", "x"]):
        with pytest.raises(SystemExit) as stop:
            doctor.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "doctor: error" in error


# Downloaded or not

def test_what_was_fetched(tmp_path):
    release, folder = RELEASES["uni2-h"], tmp_path / "uni2-h"

    def state(hashes=False):
        return doctor.examine_release("uni2-h", folder, hashes)["state"]

    assert state() == "missing"
    folder.mkdir()
    (folder / ".config.json.abc.part").write_text("{")
    assert state() == "half fetched"
    (folder / "config.json").write_text("{}")
    assert state() == "incomplete: no pytorch_model.bin"
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    assert "hashes unknown" in state()
    (folder / RECORD).write_text(json.dumps({"files": {
        name: {"size": (folder / name).stat().st_size, "hash": file_hash(folder / name)}
        for name in release.files}}))
    assert state() == "whole, sizes agree" and state(hashes=True) == "whole, hashes agree"
    (folder / "pytorch_model.bin").write_bytes(b"Weights")
    assert state() == "whole, sizes agree"
    assert state(hashes=True).startswith("damaged: pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"weight")
    assert state().startswith("damaged: pytorch_model.bin")
    (folder / RECORD).write_text("[]")
    assert f"{RECORD} cannot be used" in state()


# What fits

def test_what_fits(own_base, monkeypatch, capsys):
    here = doctor.machine(own_base)
    monkeypatch.setattr(doctor, "machine", lambda place: {
        **here, "memory_free": 1000, "gpu": "a GPU", "gpu_memory_free": 10**9})
    rows = examined(capsys, "--base", own_base)[1]["bases"][0]["fit"]
    assert [row["precision"] for row in rows] == ["float32", "fp16", "bf16"]
    assert {(row["cpu"], row["cuda"]) for row in rows} == {(False, True)}
    assert len([row for row in rows if row["advised_on"]]) == 1
    doctor.main(["--base", str(own_base)])
    text = capsys.readouterr().out
    assert "memory: DOES NOT FIT, GPU: fits" in text and "a GPU, 1.0 GB free" in text


@pytest.mark.parametrize("free, fits", [(None, None), (125, True), (124, False)])
def test_weights_may_take_four_fifths_of_free_memory(free, fits):
    assert doctor._fits(100, free) is fits
