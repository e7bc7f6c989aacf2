"""The parity certificate: every row passes, and tests/parity.md says what is true today."""

import copy
import json
import math
import sys

import pytest
import torch
from certificate import (
    JSON, MARKDOWN, certificate, compare, facts, judge, main, markdown, of,
)

from pixcell_min.tools import parity

STALE = ("tests/parity.md is stale; look at what differs, then write it anew with "
         "python -m pixcell_min.tools.parity --write")
COMPONENTS = ["transformer", "VAE", "UNI2-h", "LoRA", "adapter", "scheduler", "guidance",
              "pipeline", "training", "embedding to image"]


@pytest.fixture(scope="module")
def result():
    return certificate()


@pytest.fixture
def saved():
    return json.loads(JSON.read_text(encoding="utf-8"))


def test_every_row_passes(result):
    assert [row for row in result["rows"] if row["verdict"] != "passes"] == []
    assert list(dict.fromkeys(row["component"] for row in result["rows"])) == COMPONENTS


def test_the_committed_certificate_is_current(result, saved):
    assert facts(saved) == facts(result), STALE
    assert MARKDOWN.read_text(encoding="utf-8") == markdown(saved), STALE


def test_what_makes_it_stale(saved):
    for key, value in (("case", "another"), ("reference", "diffusers 0.99 DDIMScheduler"),
                       ("tolerance", 2.0), ("kind", "of another kind"), ("verdict", "FAILS"),
                       ("absolute", 1e-9), ("relative", 1e-9)):
        other = copy.deepcopy(saved)
        other["rows"][-1][key] = value
        assert (facts(other) == facts(saved)) == (key in ("absolute", "relative"))
    assert facts({"rows": saved["rows"][1:]}) != facts(saved)


def test_a_patch_release_does_not_make_it_stale(monkeypatch):
    names = set()
    for number in ("0.42.1", "0.42.9", "0.43.0"):
        monkeypatch.setattr("certificate.version", lambda name: number)
        names.add(of("diffusers", "X"))
    assert names == {"diffusers 0.42 X", "diffusers 0.43 X"}


def test_an_error_is_judged_by_its_kind_of_tolerance():
    pair = torch.tensor([100.0, 2.0]), torch.tensor([100.5, 2.0])
    row = compare("a", "b", "c", [pair, (pair[1], pair[1])], 0.4, "absolute")
    assert (row.absolute, row.verdict) == (0.5, "FAILS")
    assert row.relative == pytest.approx(0.5 / 100.5)
    assert compare("a", "b", "c", [pair], 0.01, "relative").verdict == "passes"
    assert compare("a", "b", "c", [pair[:1] * 2], 0, "absolute").verdict == "passes"
    assert judge("a", "b", "c", math.nan, math.nan, 1, "absolute").verdict == "FAILS"
    with pytest.raises(AssertionError):  # never by broadcasting
        compare("a", "b", "c", [(pair[0], pair[1][:1])], 1, "absolute")


@pytest.mark.parametrize("fails", [False, True])
def test_the_command_writes_both_files_and_returns_whether_a_row_fails(
        fails, saved, monkeypatch, tmp_path, capsys):
    saved["rows"][0]["verdict"] = "FAILS" if fails else "passes"
    monkeypatch.setattr("certificate.certificate", lambda: saved)
    monkeypatch.setattr("certificate.JSON", tmp_path / "parity.json")
    monkeypatch.setattr("certificate.MARKDOWN", tmp_path / "parity.md")
    assert main(["--write"]) == fails
    assert json.loads((tmp_path / "parity.json").read_text()) == saved
    assert (tmp_path / "parity.md").read_text() == markdown(saved) == capsys.readouterr().out
    assert main(["--json"]) == fails and json.loads(capsys.readouterr().out) == saved


def test_the_tool_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parity, "find_spec", lambda name: None if name == "peft" else name)
    assert parity.main([]) == 2
    assert "peft not installed; run pip install -e '.[test]'" in capsys.readouterr().err
    monkeypatch.setattr(parity, "CERTIFICATE", tmp_path / "certificate.py")
    assert parity.main([]) == 2
    line = capsys.readouterr().err
    assert "needs a checkout" in line and line.count("\n") == 1


def test_the_tool_runs_the_certificate_and_hands_its_flags_on(monkeypatch, tmp_path):
    (tmp_path / "certificate.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(parity, "CERTIFICATE", tmp_path / "certificate.py")
    monkeypatch.setattr("sys.path", ["first"])
    assert parity.main(["--write", "--json"]) == 2 and sys.path[0] == str(tmp_path)
