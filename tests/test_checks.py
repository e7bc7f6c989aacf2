"""What flags accept, and command lines whose errors are one line."""

import argparse
import importlib

import pytest

from pixcell_min.checks import (OneLineParser, fraction, integer, nonnegative_float,
                                nonnegative_int, number, one_of, positive_float, positive_int,
                                words)


def test_parser_for_other_scripts_is_one_line_too(capsys):
    parser = OneLineParser(prog="sample.py")
    parser.add_argument("--steps", type=integer(1, 1000))
    assert parser.parse_args(["--steps", "1000"]).steps == 1000
    for text in ("0", "1001", "x"):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(["--steps", text])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == (
            f"sample.py: error: argument --steps: expected an integer from 1 to 1000, got '{text}'\n")


@pytest.mark.parametrize("program, command", [
    ("sample", "--image x --lora NAME:0.5 --run NAME"), ("train", "--data NAME"),
    ("audit", "--base NAME"), ("doctor", "--base NAME"), ("convert", "NAME y --format peft"),
    ("original", "NAME y"), ("synthetic", "--count 1 --out NAME"), ("pretrain", "--work NAME")])
def test_a_name_too_long_for_the_system_is_one_line(program, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "a" * 300
    module = program if program in ("sample", "train") else f"pixcell_min.tools.{program}"
    try:
        code = importlib.import_module(module).main(command.replace("NAME", name).split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and name[:20] in error, error


# --------------------------------------------------------------------------- argparse types

@pytest.mark.parametrize("check, good, bad", [
    (positive_int, {"1": 1, "12": 12}, ["0", "-1", "1.0", "", "nan"]),
    (nonnegative_int, {"0": 0, "3": 3}, ["-1", "0.5"]),
    (positive_float, {"1e-9": 1e-9, "2": 2.0}, ["0", "-1", "nan", "inf", "x"]),
    (nonnegative_float, {"0": 0.0, "1.5": 1.5}, ["-1e-9", "nan", "-inf"]),
    (fraction, {"0": 0.0, "1": 1.0, "0.5": 0.5}, ["-0.1", "1.1", "nan"]),
    (integer(2, 4), {"2": 2, "4": 4}, ["1", "5"]),
    (number(0, 1, above=True, below=True), {"0.5": 0.5}, ["0", "1"]),
    (number(-2, 2), {"-2": -2.0, "2": 2.0}, ["2.1", "-2.1"]),
    (one_of("a", "no"), {"a": "a", "no": "no"}, ["b", "False"]),
])
def test_argparse_types(check, good, bad):
    for text, value in good.items():
        assert check(text) == value and type(check(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="expected .*, got "):
            check(text)


def test_words_limit_their_choice_and_keep_the_order():
    assert words("a", "b").accept(["b", "a"]) == ("b", "a")
    with pytest.raises(argparse.ArgumentTypeError, match="out of a, b"):
        words("a", "b")(["c"])
