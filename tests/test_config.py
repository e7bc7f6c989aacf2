"""config.py: one list of settings; defaults < YAML < flags; every wrong value is named in one line."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from pixcell_min import checks
from pixcell_min import config as module
from pixcell_min.config import FIELDS, Config, parse_train, read_yaml, to_yaml

EXAMPLE = Path(__file__).parent.parent / "config.yaml"
SEED_KEYS = {"mixed_precision", "gradient_accumulation_steps", "learning_rate", "lora_rank",
             "lora_alpha", "lora_target_modules"}
ISSUE_FLAGS = {
    "--data", "--base", "--out", "--config", "--rank", "--alpha", "--max-train-steps", "--batch-size",
    "--gradient-accumulation-steps", "--learning-rate", "--adapter-learning-rate",
    "--mixed-precision", "--seed", "--save-every", "--resume", "--overwrite", "--dry-run"}

# field: (flag and its words, text in YAML, value): none of the values is the default
OTHER = {
    "data": (["--data", "tiles dir"], "tiles dir", "tiles dir"),
    "features": (["--features", "f"], "f", "f"),
    "base": (["--base", "b"], "b", "b"),
    "out": (["--out", "2026"], "'2026'", "2026"),
    "cache": (["--cache", "c, d: #e"], '"c, d: #e"', "c, d: #e"),
    "lora_rank": (["--rank", "4"], "4", 4),
    "lora_alpha": (["--alpha", "8"], "8", 8.0),
    "lora_target_modules": (["--target-modules", "to_q", "ff.net.0.proj"], "[to_q, ff.net.0.proj]",
                            ("to_q", "ff.net.0.proj")),
    "lora_attention": (["--attention", "attn2"], "[attn2]", ("attn2",)),
    "lora_blocks": (["--blocks", "2-4"], "2-4", (2, 3, 4)),
    "lora_dropout": (["--lora-dropout", "0.5"], "0.5", 0.5),
    "lora_init": (["--lora-init", "gaussian"], "gaussian", "gaussian"),
    "use_rslora": (["--use-rslora"], "true", True),
    "learning_rate": (["--learning-rate", "3e-5"], "3e-5", 3e-5),
    "adapter_learning_rate": (["--adapter-learning-rate", "1"], "1", 1.0),
    "weight_decay": (["--weight-decay", "0"], "0", 0.0),
    "max_grad_norm": (["--max-grad-norm", ".5"], ".5", 0.5),
    "lr_schedule": (["--lr-schedule", "constant"], "constant", "constant"),
    "warmup_steps": (["--warmup-steps", "0"], "0", 0),
    "max_train_steps": (["--max-train-steps", "7"], "7", 7),
    "epochs": (["--epochs", "3"], "3", 3),
    "early_stop": (["--early-stop", "2"], "2", 2),
    "batch_size": (["--batch-size", "2"], "2", 2),
    "gradient_accumulation_steps": (["--gradient-accumulation-steps", "1"], "1", 1),
    "mixed_precision": (["--mixed-precision", "no"], "no", "no"),  # a bare no is false in YAML
    "condition_dropout": (["--condition-dropout", "1"], "1", 1.0),
    "loss_weighting": (["--loss-weighting", "min_snr"], "min_snr", "min_snr"),
    "min_snr_gamma": (["--min-snr-gamma", "3"], "3", 3.0),
    "vlb_weight": (["--vlb-weight", "1e-3"], "1e-3", 1e-3),
    "class_balanced": (["--class-balanced"], "true", True),
    "ema_decay": (["--ema-decay", "0.999"], "0.999", 0.999),
    "seed": (["--seed", str(2**63 - 1)], str(2**63 - 1), 2**63 - 1),
    "save_every": (["--save-every", "0"], "0", 0),
    "keep_states": (["--keep-states", "5"], "5", 5),
    "validate_every": (["--validate-every", "5"], "5", 5),
    "validation_fraction": (["--validation-fraction", "0.5"], "0.5", 0.5),
    "sample_count": (["--sample-count", "0"], "0", 0),
    "sample_every": (["--sample-every", "9"], "9", 9),
    "guidance_scale": (["--guidance-scale", "0"], "0", 0.0),
    "tile_fit": (["--tile-fit", "pad"], "pad", "pad"),
    "decode_workers": (["--decode-workers", "3"], "3", 3),
    "strict_data": (["--strict-data"], "true", True),
    "dihedral": (["--no-dihedral"], "false", False),
    "gradient_checkpointing": (["--gradient-checkpointing"], "true", True),
    "deterministic": (["--deterministic"], "true", True),
    "compile": (["--compile"], "true", True),
    "device": (["--device", "cuda:1"], "cuda:1", "cuda:1"),
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "my.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refused(call, *words):
    """The one line of the ValueError that `call` raises."""
    with pytest.raises(ValueError, match=".") as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


# ------------------------------------------------------------------------ the list of fields

def test_every_field_says_help_unit_and_range():
    for name, field in FIELDS.items():
        assert {"help", "unit", "check", "flag"} == set(field.metadata), name
        assert len(field.metadata["help"]) > 7 and field.metadata["unit"]
        assert field.metadata["check"].accept(field.default) == field.default


def test_the_table_of_these_tests_is_complete():
    assert list(OTHER) == list(FIELDS)
    assert all(value != FIELDS[name].default for name, (_, _, value) in OTHER.items())


def test_defaults_are_the_seeds():
    config = Config()
    assert (config.lora_rank, config.lora_alpha, config.gradient_accumulation_steps) == (8, 16.0, 4)
    assert config.max_grad_norm == 1.0
    assert config.lora_target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert config.lora_attention == ("attn1", "attn2") and config.lora_blocks is None
    assert config.data is None and config.mixed_precision == "auto"
    assert SEED_KEYS <= set(FIELDS)


def test_config_is_frozen_and_checked_on_construction():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
    assert Config(lora_alpha=8, lora_target_modules=["to_q"]) == Config(
        lora_alpha=8.0, lora_target_modules=("to_q",))
    assert type(Config(lora_alpha=8).lora_alpha) is float
    refused(lambda: Config(lora_rank=0), "lora_rank", "an integer >= 1", "got 0")
    refused(lambda: dataclasses.replace(Config(), seed=-1), "seed")


# -------------------------------------------------------------------------------- config.yaml

def test_example_file_is_what_to_yaml_writes_of_the_defaults():
    """After a change of defaults: python -c "from pixcell_min.config import *;
    print(to_yaml(Config()), end='')" > config.yaml"""
    assert EXAMPLE.read_text(encoding="utf-8") == to_yaml(Config())
    assert parse_train(["--config", str(EXAMPLE)])[0] == Config()


def test_example_comments_every_key_with_its_unit():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for name, field in FIELDS.items():
        row = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        assert lines[row - 1].startswith("# ") and f"[{field.metadata['unit']}]" in lines[row - 1]
    assert set(yaml.safe_load("\n".join(lines))) == set(FIELDS)  # a plain YAML reader agrees
    assert all(len(line) < 105 for line in lines)


def test_to_yaml_round_trips(write):
    other = Config(**{name: value for name, (_, _, value) in OTHER.items() if name != "features"})
    for config in (Config(), other, Config(out="no"), Config(out="1e-4"), Config(out="a\n'b\" é {}")):
        assert Config(**read_yaml(write(to_yaml(config)))) == config
    assert read_yaml(write(to_yaml(other))) == dataclasses.asdict(other)


# -------------------------------------------------------------------- defaults < YAML < flags

@pytest.mark.parametrize("name", OTHER)
def test_yaml_beats_default_and_flag_beats_yaml(write, name):
    flags, text, value = OTHER[name]
    path, defaults = write(f"{name}: {text}\n"), Config()
    from_yaml, _ = parse_train(["--config", path])
    from_flag, _ = parse_train(flags)
    expected = dataclasses.replace(defaults, **{name: value})
    assert from_yaml == from_flag == expected and expected != defaults
    assert type(getattr(from_flag, name)) is type(getattr(from_yaml, name)) is type(value)
    default = getattr(defaults, name)
    with_default = yaml.safe_dump({name: list(default) if isinstance(default, tuple) else default})
    assert parse_train(["--config", write(with_default), *flags])[0] == expected


def test_images_and_precomputed_features_exclude_each_other():
    refused(lambda: parse_train(["--data", "d", "--features", "f"]), "data and features are both")


def test_an_early_stop_needs_validations():
    with pytest.raises(ValueError, match="early_stop without validations"):
        parse_train(["--early-stop", "3", "--validate-every", "0"])


def test_one_of_the_two_rates_may_be_zero():
    assert parse_train(["--learning-rate", "0"])[0].learning_rate == 0
    assert parse_train(["--adapter-learning-rate", "0"])[0].adapter_learning_rate == 0
    with pytest.raises(ValueError, match="both 0: nothing would be trained"):
        parse_train(["--learning-rate", "0", "--adapter-learning-rate", "0"])


def test_switches_can_be_turned_off_again(write):
    path = write("use_rslora: true\ndihedral: false\n")
    config, _ = parse_train(["--config", path, "--no-use-rslora", "--dihedral"])
    assert config == Config()


def test_options_beside_the_settings():
    config, options = parse_train([])
    assert config == Config()
    assert vars(options) == {"config": None, "resume": False, "overwrite": False, "dry_run": False}
    _, options = parse_train(["--resume", "--dry-run", "--rank", "4"])
    assert set(vars(options)) == {"config", "resume", "overwrite", "dry_run"}  # settings are gone
    assert options.resume and options.dry_run and not options.overwrite
    assert parse_train(["--overwrite"])[1].overwrite


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--rank", "3"])
    assert parse_train()[0].lora_rank == 3


# ------------------------------------------------------------------------------- wrong values

@pytest.mark.parametrize("name, flag, text, yaml_text, expected", [
    ("lora_rank", "--rank", "0", "0", "an integer >= 1"),
    ("lora_rank", "--rank", "-3", "-3", "an integer >= 1"),
    ("lora_rank", "--rank", "8.0", "8.0", "an integer >= 1"),
    ("lora_rank", "--rank", "eight", "eight", "an integer >= 1"),
    ("lora_alpha", "--alpha", "0", "0", "a number > 0"),
    ("lora_alpha", "--alpha", "nan", ".nan", "a number > 0"),
    ("learning_rate", "--learning-rate", "inf", ".inf", "a number >= 0"),
    ("lora_target_modules", "--target-modules", "to_q to_q", "[to_q, to_q]", "different words"),
    ("lora_attention", "--attention", "attn3", "[attn3]", "out of attn1, attn2"),
    ("lora_blocks", "--blocks", "5-2", "5-2", "0-13"),
    ("lora_blocks", "--blocks", "7,5-2", "'7,5-2'", "0-13"),
    ("lora_blocks", "--blocks", "a-b", "a-b", "0-13"),
    ("lora_blocks", "--blocks", "0-1000", "0-1000", "0-13"),
    ("lora_dropout", "--lora-dropout", "1", "1", "a number >= 0 and < 1"),
    ("condition_dropout", "--condition-dropout", "1.01", "1.01", "a number >= 0 and <= 1"),
    ("validation_fraction", "--validation-fraction", "0", "0", "a number > 0 and < 1"),
    ("validation_fraction", "--validation-fraction", "1", "1", "a number > 0 and < 1"),
    ("lora_init", "--lora-init", "xavier", "xavier", "one of kaiming, gaussian"),
    ("tile_fit", "--tile-fit", "False", "false", "one of resize, pad"),
    ("mixed_precision", "--mixed-precision", "fp8", "fp8", "one of auto, no, fp16, bf16"),
    ("seed", "--seed", "-1", "-1", "an integer from 0 to"),
    ("seed", "--seed", str(2**63), str(2**63), "an integer from 0 to"),
    ("max_train_steps", "--max-train-steps", "1e3", "1e3", "an integer >= 1"),
    ("epochs", "--epochs", "0", "0", "null or an integer >= 1"),
    ("ema_decay", "--ema-decay", "1", "1", "a number >= 0 and < 1"),
    ("warmup_steps", "--warmup-steps", "-1", "-1", "an integer >= 0"),
    ("out", "--out", "", "''", "text"),
    ("device", "--device", "gpu", "gpu", "cuda:N"),
    ("weight_decay", "--weight-decay", "1" + "0" * 400, "1" + "0" * 400, "a number >= 0"),
])
def test_wrong_values_by_flag_and_by_yaml(write, name, flag, text, yaml_text, expected):
    words = text.split(" ") if name == "lora_target_modules" else [text]
    by_flag = refused(lambda: parse_train([flag, *words]), f"{flag}: {name}: ", expected, "got ")
    path = write(f"seed: 3\n{name}: {yaml_text}\n" if name != "seed" else f"seed: {yaml_text}\n")
    by_yaml = refused(lambda: parse_train(["--config", path]), f"{path}: {name}: ", expected, "got ")
    assert max(len(by_flag), len(by_yaml) - len(path)) < 200


@pytest.mark.parametrize("line", [
    'lora_rank: "8"', "lora_rank: true", "lora_rank: 8.0", "lora_rank: null", "lora_rank: [8]",
    "lora_alpha: '16'", "lora_alpha: yes", 'learning_rate: "1e-4"', "learning_rate: 1e-4 per step",
    "use_rslora: 1", "use_rslora: 'true'", "use_rslora: null", "data: 3", "data: [a]", "out: null",
    "out: 2026-01-01", "lora_target_modules: to_q", "lora_target_modules: []",
    "lora_target_modules: [1]", "lora_target_modules: ['']", "lora_target_modules: [[to_q]]",
    "lora_target_modules: {to_q: 1}", "lora_attention: attn1", "lora_blocks: []",
    "lora_blocks: [true]", "lora_blocks: [1.0]", "lora_blocks: ['1']", "lora_blocks: {1: 2}",
    "lora_blocks: -1", "lora_blocks: true", "lora_blocks: [1000]", "mixed_precision: yes",
    "device: null", "device: 0", "seed: 1.5"])
def test_wrong_types_in_yaml(write, line):
    path = write(line)
    refused(lambda: read_yaml(path), path, line.split(":")[0], "expected", "got")


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("1E-4", 1e-4), ("1e4", 1e4), ("1.5e3", 1.5e3), (".5e-3", 5e-4), ("2.e-3", 2e-3),
    ("+1e+2", 100.0), ("0.0001", 1e-4), ("1", 1.0)])
def test_yaml_floats_that_pyyaml_reads_as_text(write, text, value):
    rate = read_yaml(write(f"learning_rate: {text}"))["learning_rate"]
    assert rate == value and type(rate) is float


def test_pyyaml_still_needs_that_trap():
    assert yaml.safe_load("1e-4") == "1e-4" and yaml.safe_load("no") is False


@pytest.mark.parametrize("text, value", [
    ("null", None), ("all", None), ("3", (3,)), ("0-2", (0, 1, 2)), ("'0,2,4-5'", (0, 2, 4, 5)),
    ("[64, 1, 64]", (1, 64)), ("0-0", (0,)), ("999", (999,))])
def test_blocks(write, text, value):
    assert read_yaml(write(f"lora_blocks: {text}"))["lora_blocks"] == value


def test_blocks_all_by_flag_beats_yaml(write):
    path = write("lora_blocks: 0-2")
    assert parse_train(["--config", path, "--blocks", "all"])[0].lora_blocks is None


def test_long_values_are_cut(write):
    path = write("lora_init: " + "x" * 5000)
    assert len(refused(lambda: read_yaml(path))) - len(path) < 200


# ------------------------------------------------------------------------------- wrong files

@pytest.mark.parametrize("key, near", [
    ("lora_rnak", "lora_rank"), ("rank", "lora_rank"), ("alpha", "lora_alpha"),
    ("learning-rate", "learning_rate"), ("max_steps", "max_train_steps"), ("Seed", "seed"),
    ("zzz", ""), ("3", ""), ("true", ""), ("'a\\nb'", "")])
def test_unknown_key_names_the_nearest(write, key, near):
    path = write(f"seed: 1\n{key}: 1\n")
    refused(lambda: read_yaml(path), path, "unknown key", f"nearest is {near}")


@pytest.mark.parametrize("content, word", [
    ("", "got NoneType"), ("# only comments\n", "got NoneType"), ("- seed\n", "got list"),
    ("seed", "got str"), ("seed: 1\nseed: 2\n", "'seed' stands twice"), ("seed: [1\n", "not valid YAML"),
    ("seed: 1\n  out: x\n", "not valid YAML"), ("\tseed: 1", "not valid YAML"),
    ("seed: !!python/object:os.system x", "not valid YAML"), ("seed: !!int x", "not valid YAML"),
    ("seed: !!bool x", "not valid YAML"), ("seed: !!timestamp x", "not valid YAML"),
    ("!!map [1]", "not valid YAML"), ("seed: !!int ''", "not valid YAML"),
    ("seed: 1\n---\nseed: 2\n", "not valid YAML"), ("? [a]\n: 1\n", "not valid YAML"),
    (b"seed: \xff\xfe", "not valid YAML"), (b"seed: \x00", "not valid YAML"),
    ("seed: " + "[" * 600, "not valid YAML")])
def test_what_is_no_settings_file(write, content, word):
    path = write(content)
    refused(lambda: read_yaml(path), path, word)


def test_missing_settings_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        refused(lambda path=path: parse_train(["--config", str(path)]), str(path), "cannot be read")


def test_duplicate_key_names_the_line(write):
    path = write("seed: 1\nout: a\nseed: 2\n")
    refused(lambda: read_yaml(path), "line 3")


# ----------------------------------------------------------------------------- command line

@pytest.mark.parametrize("argv", [
    ["--unknown", "1"], ["stray"], ["--rank"], ["--ran", "4"], ["--resume", "--overwrite"],
    ["--use-rslora", "true"], ["--target-modules"], ["--lora-rank", "4"]])
def test_argparse_errors_are_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("train.py: error: ") and err.count("\n") == 1


def test_help_names_every_flag_default_and_unit(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(["--help"])
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert stopped.value.code == 0 and text.isascii()  # any terminal can print it
    assert all(f"{flag} " in flat for flag in ISSUE_FLAGS)
    for name, (flags, _, _) in OTHER.items():
        field = FIELDS[name]
        assert flags[0] in flat and field.metadata["help"] in flat
        assert f"[{field.metadata['unit']}]" in flat and f"default {field.default}" in flat


def test_config_reads_no_weights_and_needs_no_torch():
    imported = {name for path in (module.__file__, checks.__file__)
                for line in Path(path).read_text().splitlines()
                if line.startswith(("import ", "from ")) for name in [line.split()[1].split(".")[0]]}
    assert imported == {"argparse", "collections", "dataclasses", "difflib", "math", "re",
                        "reprlib", "typing", "yaml", "pixcell_min"}
