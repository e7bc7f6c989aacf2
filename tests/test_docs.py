"""README and docs/: quoted code, named tests, links, commands, flags, figures, numbers are true."""

import argparse
import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fuzzing
from conftest import ROOT
from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.config import parse_train
from pixcell_min.features import SHARD_BYTES
from pixcell_min.lora import count_parameters, inject_lora
from pixcell_min.released import RELEASES
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.training import DEBIASED_MAX
from pixcell_min.transformer import PixCellTransformer, TransformerConfig
from pixcell_min.vae import AutoencoderKL, VAEConfig

GUIDE = ROOT / "docs" / "guide.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "parity.md",
         ROOT / "weights" / "README.md", ROOT / "weights" / "pixcell-nano" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# torchrun's, that of the script to which `parity` hands its flags on, and pytest's.
OTHERS_FLAGS = {"--nproc-per-node", "--write", "--cov"}
# Command lines that are no program of ours: the environment and the tests.
NOT_OURS = re.compile(r"python3 -m venv|\. \.venv/|pip install|pytest")
PROGRAMS = ["train", "sample", *(f"pixcell_min.tools.{name}" for name in (
    "audit", "convert", "doctor", "download", "evaluate", "make_random_snapshot", "original",
    "pretrain", "synthetic"))]

spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


# ---------------------------------------------------------------- code and tests that are quoted


def citations(text):
    """[(file, quoted lines)] of the guide: a python block belongs to the link before it."""
    found = []
    for match in FENCE.finditer(text):
        if match[1] == "python":
            before = text[:match.start()].rstrip().splitlines()[-1]
            links = re.findall(r"\]\(\.\./([\w/]+\.py)\)", before)
            assert links, f"a block without its file: {match[2]}"
            found.append((links[-1], match[2].splitlines()))
    return found


def stands_in(lines, source) -> bool:
    """Whether the lines are lines of the source, in its order, indented alike from the first on.

    They follow one another directly, but for "…" lines, which stand for any number of others.
    """
    source, at = source.splitlines(), 0
    for part in "\n".join(lines).split("…\n"):
        part = part.rstrip("\n")
        count = part.count("\n") + 1
        found = [i for i in range(at, len(source)) if
                 textwrap.dedent("\n".join(source[i:i + count])) == part]
        if not found:
            return False
        at = found[0] + count
    return True


def test_every_quoted_line_stands_in_the_named_file():
    quoted = citations(GUIDE.read_text())
    assert len(quoted) >= 20
    for file, lines in quoted:
        assert stands_in(lines, (ROOT / file).read_text()), (file, lines)


def test_a_quotation_that_is_off_by_a_word_an_order_or_a_line_is_seen():
    source = "def f(x):\n    y = x\n    z = y\n    return z\n"
    assert stands_in(["y = x", "z = y"], source) and stands_in(["y = x", "…", "return z"], source)
    for wrong in (["y = X"], ["z = y", "y = x"], ["y = x", "return z"], ["return z", "…", "y = x"],
                  ["y = x", "    z = y"]):
        assert not stands_in(wrong, source), wrong


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_named_test_exists(page):
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", page.read_text()):
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), name


def test_the_guide_names_a_test_and_a_line_for_each_step():
    steps = re.split(r"^## ", GUIDE.read_text().partition("\n## The steps")[2], flags=re.M)
    parts = [part for step in steps for part in re.split(r"^### ", step, flags=re.M)[1:]]
    assert len(parts) >= 15
    for part in parts:
        assert "```python" in part and "::test_" in part, part.splitlines()[0]


@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE],
                         ids=[name for name in NAMES if name != "docs/guide.md"])
def test_python_blocks_compile(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


# ---------------------------------------------------------------- links, files


def anchors(text):
    """The names that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_paths_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link
    folders = "pixcell_min|tests|benchmarks|docs|weights"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_the_file_guide_has_a_row_for_each_file_and_no_other():
    table = (ROOT / "README.md").read_text().partition("\n## Files\n")[2].partition("\n## ")[0]
    rows = {name for line in table.splitlines() if line.startswith("| `")
            for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "pixcell_min").rglob("*.py")
             if path.name != "__init__.py"}
    assert not files - rows
    assert [row for row in rows if not (ROOT / row).exists()] == []


def test_the_file_guide_names_every_script_and_helper_beside_the_package():
    table = (ROOT / "README.md").read_text().partition("\n## Files\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"\w+\.py", table))
    beside = [path.name for folder in ("tests", "benchmarks", "docs")
              for path in (ROOT / folder).glob("*.py")]
    assert {name for name in beside if not re.match(r"test_|conftest", name)} <= named
    assert [name for name in named if not [*ROOT.rglob(name)]] == []


# ---------------------------------------------------------------- commands


class Parsed(BaseException):
    """A command line was accepted; nothing else is done with it."""


def parse(program, words):
    """A program of ours parses a command line; → its parser. Raises: SystemExit if it refuses."""
    parsers, parse_args = [], argparse.ArgumentParser.parse_args

    def only_parse(parser, *arguments):
        parsers.append(parser)
        parse_args(parser, *arguments)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        importlib.import_module(program).main(words)
    return parsers[0]


def commands(text):
    """[(program, words)] of the `python …` commands of a shell block."""
    found = []
    for line in re.split(r"\n|&&", text.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        if words and not NOT_OURS.match(line.strip()):
            assert words[0] == "python", line
            module = words[1] == "-m"
            found.append((words[2] if module else words[1].removesuffix(".py"), words[2 + module:]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_accepted_by_their_programs(page):
    for block in blocks(page, "bash"):
        for program, words in commands(block):
            assert program in PROGRAMS, program
            try:
                parse(program, words)
            except SystemExit:
                pytest.fail(f"{program} refuses {' '.join(words)}")
            if program == "train" and "--resume" not in words:
                parse_train(words)  # the ranges of its values, too


def test_a_wrong_command_is_seen():
    (program, words), = commands("python train.py --rank 8 --no-such-flag  # a remark\n")
    with pytest.raises(SystemExit):
        parse(program, words)


@pytest.fixture(scope="module")
def flags():
    """Every flag of every program of ours."""
    needed = {"sample": ["--image", "x"],
              "pixcell_min.tools.convert": ["x", "y", "--format", "peft"],
              "pixcell_min.tools.download": ["sd3-vae"], "pixcell_min.tools.original": ["x", "y"],
              "pixcell_min.tools.evaluate": ["--data", "x", "--run", "y"],
              "pixcell_min.tools.make_random_snapshot": ["pixcell-256", "x"],
              "pixcell_min.tools.synthetic": ["--out", "x"]}
    return {flag for program in PROGRAMS
            for flag in parse(program, needed.get(program, []))._option_string_actions}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_flag_that_is_named_exists(page, flags):
    named = {flag for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
             for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert not named - flags - OTHERS_FLAGS


# ---------------------------------------------------------------- figures, numbers


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_committed_figure_is_what_its_script_draws(name):
    path = ROOT / "docs" / f"{name}.png"
    drawn, committed = figures.FIGURES[name](), Image.open(path)
    assert path.stat().st_size < 200_000 and drawn.size == committed.size
    # Not bit for bit: machines may round apart. LoRA's scale 10 % off, for one, makes 0.38.
    apart = np.abs(np.asarray(drawn, float) - np.asarray(committed.convert("RGB"), float))
    assert apart.mean() < 0.3  # grey levels


def test_the_toys_paths_end_in_its_data_and_cross_where_noise_is_drawn():
    for name in figures.SCHEDULER_NAMES:
        paths = figures.sampler_paths(name)
        crossing = bool((paths.diff(dim=1) < 0).any())  # they start in rising order
        assert crossing == (name in ("ddpm", "euler_ancestral"))
        ends = paths[-1]
        assert ends.shape == (figures.PATHS,)
        assert (ends.abs() - 1).abs().max() < 4 * figures.SPREAD
        assert ends.min() < 0 < ends.max()


def test_the_guides_numbers_are_those_of_the_code():
    text, sizes, vae = " ".join(GUIDE.read_text().split()), TransformerConfig(), VAEConfig()
    for quoted in (
            f"C latent channels ({sizes.in_channels}), H W latent size (pixels / {vae.downscale})",
            f"E width of an embedding ({sizes.caption_channels})",
            f"T train steps ({NoiseSchedule.linear().num_train_timesteps})",
            f"shift {vae.shift_factor}, scale {vae.scaling_factor}",
            f"min(1/√SNR, {DEBIASED_MAX:g})", f"the step, {figures.STEPS} in all",
            f"heaps of numbers at −1 and {figures.MODES[1]:g}"):
        assert quoted in text, quoted


def test_the_readmes_counts_of_damaged_files_are_those_of_the_suite():
    text = " ".join((ROOT / "README.md").read_text().split())
    quoted = {"bytes": "cases of flipped", "safetensors": "of tensors' names", "images": "of images",
              "pickles": "of pickles", "values": "of values in JSON", "YAML": "of settings in YAML",
              "arrays": "of arrays", "feature caches": "of feature caches"}
    assert quoted.keys() == fuzzing.CASES.keys()
    for number, words in ((sum(fuzzing.CASES.values()), "times (`pytest -m slow`: "),
                          (fuzzing.SLOW, "times as often"), (fuzzing.SECONDS, "s and "),
                          (fuzzing.MEMORY // 2**30, "GB, in success"),
                          *((count, quoted[kind]) for kind, count in fuzzing.CASES.items())):
        assert f" {number:,} {words}" in text, (number, words)


LABELS = {"base": "base", "adapter only": "adapter", "LoRA only": "lora",
          "**adapter + LoRA**": "both", "base, recoloured": "colour_only",
          "real–real floor": "real_real", "VAE round trip": "vae",
          "copies of training tiles": "copies"}
DECIMALS = {"colour W1": 2, "H angle °": 1, "E angle °": 1, "cosine": 3, "over shuffled": 3,
            "nuclei r": 2, "nearer than 5 %": 2, "KID": 3}
RESULTS = {path.stem: json.loads(path.read_text(encoding="utf-8"))
           for path in (ROOT / "benchmarks" / "results").glob("*.json")}
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def assert_quoted(*quoted):
    assert [words for words in quoted if words not in README] == []


def percents(its):
    """A median and its seeds, in per cent."""
    return f"{its['median']:.0f} % ({', '.join(f'{v:.0f}' for v in its['values'])})"


def row(label, results):
    """A line of the README's tables: each measure's median (lowest…highest) over the seeds."""
    cells = [f"{signed(its['median'], n)} ({signed(min(its['values']), n)}…{signed(max(its['values']), n)})"
             if (its := results["variants"]["default"]["columns"][LABELS[label]].get(name)) else "–"
             for name, n in DECIMALS.items()]
    return f"| {label} | {' | '.join(cells)} |"


def signed(value, decimals):
    """A number with a true minus sign, and none before a zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


SECTIONS = {  # in the README, above rows: where these come from
    "| *guidance 1* |": "nct_unguided", "| *guidance 1.5* |": "nct", "**Kather 2016**": "kather_unguided"}


def test_the_readmes_tables_of_adaptation_are_those_of_the_results():
    rows, name = [], None
    for line in (ROOT / "README.md").read_text().splitlines():
        name = next((its for words, its in SECTIONS.items() if line.startswith(words)), name)
        label = line.split("|")[1].strip() if line.count("|") == 10 else None
        if label in LABELS:
            rows.append(line)
            assert line == row(label, RESULTS[f"adaptation_{name}"])
    assert len(rows) == 15


def test_the_readmes_figures_of_mutants_are_those_of_the_report():
    modules = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))["modules"]
    counts = {name: "".join(unit["verdicts"] for unit in units.values())
              for name, units in modules.items()}
    every = "".join(counts.values())
    least = min(its.count("k") / len(its) for its in counts.values())
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(every):,} changes in all" in text
    assert (f"{100 * every.count('k') / len(every):.1f} % of the changes make one fail, in no module fewer than "
            f"{math.floor(100 * least)} %") in text


def test_the_readmes_figures_in_words_are_those_of_the_results():
    first, nano = RESULTS["first_run"], RESULTS["nano_nct"]
    losses = list(first["validation_loss"].values())
    enlarged, kept = nano["vae_psnr_db"], nano["vae_psnr_db, tiles as stored"]
    trainable, share, total = re.search(
        r"= ([\d,]+) parameters, ([\d.]+) % of ([\d,]+)", first["printed"][0]).groups()
    cosines = [f"{nano['guidance'][scale]['cosine']:.2f} at {scale}" for scale in ("1", "2", "9")]
    assert max(nano["guidance"], key=lambda scale: nano["guidance"][scale]["cosine"]) == "2"
    widest = max(abs(end - its["cosine"]) for its in nano["guidance"].values() for end in its["interval"])
    others = [its["shuffled"] for its in nano["guidance"].values()]
    left = [its["variants"]["default"]["colour, % of base"] 
            for its in (RESULTS[f"adaptation_{name}"] for name in SECTIONS.values())]
    bf16, fp16 = (RESULTS["precision"]["relative_to_float32"][name] for name in ("bf16", "fp16"))
    assert fp16["skipped"] == 0 and len(fp16["loss"]) == len(bf16["loss"])
    assert_quoted(
            f"over {len(bf16['loss'])} steps of the embedded base its losses",
            f"lie within {100 * bf16['largest']:.2f} % of float32's",
            f"float16's within {100 * fp16['largest']:.3f} % with no step skipped",
            f"{first['wall_seconds_of_train_py']:.0f} s in all",
            f"{first['tiles']} tiles and the grid",
            f"takes {RESULTS['first_run_nct']['wall_seconds_of_train_py']:.0f} s on these tiles",
            f"{first['seconds_per_optimizer_step']:.2f} s per optimizer step",
            f"loss {losses[0]:.4f} → {losses[-1]:.4f}",
            f"{trainable} of {total} parameters ({share} %)",
            f"{first['file_bytes']['lora_weights.safetensors'] / 1e6:.2f} MB (LoRA)",
            f"{first['file_bytes']['adapter.safetensors'] / 1e6:.2f} MB (adapter)",
            f"with {enlarged['of the mean squared error']:.1f} dB (the best linear code of as many numbers, 16 principal "
            f"components of 8×8 patches: {enlarged['linear code']:.1f}), as they are stored, {kept['px'][0]} px, with "
            f"{kept['of the mean squared error']:.1f} dB, or {kept['mean over tiles']:.1f} as the mean over tiles "
            f"(the code: {kept['linear code']:.1f}; the aim was 30)",
            f"cosine {', '.join(cosines)}, each ± {widest:.2f}; {len(nano['guidance_tiles'])} tiles; other tiles' conditions: "
            f"{min(others):.2f} to {max(others):.2f};".replace("-", "−"),
            *map(percents, left))


def test_the_embedded_bases_own_page_has_the_vaes_figures():
    text, nano = (ROOT / "weights/pixcell-nano/README.md").read_text(encoding="utf-8"), RESULTS["nano_nct"]
    enlarged, kept = ([f"{its[key]:.1f} dB" for key in (
        "of the mean squared error", "mean over tiles", "lowest", "linear code")]
        for its in (nano["vae_psnr_db"], nano["vae_psnr_db, tiles as stored"]))
    below = nano["vae_psnr_db, tiles as stored"]["tiles below 30"]
    row = "{} of the mean squared error, {} as a mean over tiles, lowest {}{}; the best linear code {} |"
    assert "enlarged to 256 px | " + row.format(*enlarged[:3], "", enlarged[3]) in text
    assert "as stored, 224 px | " + row.format(
        *kept[:3], f", {below} of {nano['tiles']} below 30", kept[3]) in text


def benchmark(name):
    """benchmarks/NAME.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module(name)


PLACES = [("colour W1", 2), ("H angle °", 1), ("E angle °", 1), ("cosine", 3), ("nuclei r", 2)]


def ranged(its, digits):
    """Median (lowest…highest) of the seeds."""
    low, high = min(its["values"]), max(its["values"])
    return f"{its['median']:.{digits}f} ({low:.{digits}f}…{high:.{digits}f})"


def both_batches(name):
    return [f"{name}, batch {n}" for n in (1, 4)]


LEVERS = {  # as the README calls them
    "LoRA's backward written by hand, training, batch 1 / 4": both_batches("backward of LoRA by hand"),
    "query, key, value and their three A by one product each, training, batch 1 / 4":
        both_batches("q, k, v and their LoRA stacked"),
    "query, key and value by one product, forward": ["one product for q, k, v"],
    "each attention projection casts its input for itself, training, batch 1 / 4":
        both_batches("each projection casts"),
    "attention by torch's fused kernel, training, batch 1 / 4": both_batches("fused attention kernel"),
    "residual stream in bf16, forward": ["residual stream in bf16, forward"],
    "frozen weights packed for oneDNN's operator, forward": ["weights packed, forward"],
    "float32 products at \"medium\" precision, by oneDNN, training": [
        "float32 products at medium precision"],
    "point-wise parts alone compiled, training": ["point-wise parts compiled, train"],
    "compiled blocks (`--compile`), training": ["compiled, train"],
    "compiled blocks, forward": ["compiled, forward"],
    "LoRA active instead of fused, forward": ["LoRA active, not fused, forward"],
    "VAE in its plain layout, encode / decode": [
        f"plain layout of the VAE, {part}" for part in ("encode", "decode")],
    "AdamW not fused, its step alone": ["AdamW not fused"]}
PARTS = {  # of memory.json, as the README calls them
    "torch, imported": "imported", "torch's compiler, which its optimizers import": "compiler",
    "the base's weights": "weights", "LoRA, its gradients, AdamW's moments": "trained",
    "kept for the backward": "kept", "the rest: short-lived, or freed but not given back": "rest", "peak": "peak"}
GRID_LABELS = {  # of variants that the README does not call by their names
    "default": "adapter + LoRA on all attention, rank 8, alpha 16",
    "self-attention alone": "LoRA on self-attention alone (`--attention attn1`)",
    "cross-attention alone": "LoRA on cross-attention alone (`--attention attn2`)",
    "LoRA trained alone": "LoRA trained alone (`--adapter-learning-rate 0`)",
    "adapter trained alone": "adapter trained alone (`--learning-rate 0`)",
    "adapter trained alone, 3e-3": "the same at `--adapter-learning-rate 3e-3`"}


def more_time(its):
    """Of a case of memory.json: a step's processor time when memory is given back at once, over the usual one."""
    return its["given back at once"]["cpu_seconds"] / its["usual"]["cpu_seconds"]


def test_the_readmes_words_on_memory_are_those_of_the_results():
    full = {name.removeprefix("full "): its for name, its in RESULTS["compare"].items()}
    cases = RESULTS["memory"]["cases"]

    def of_peer(*parts):  # of bf16's batches 1 and 4
        return [sum(cases[name]["usual"][part] for part in parts) / full[name]["peak_mb"]["peer"]
                for name in ("train-1-bf16", "train-4-bf16")]
    held, kept = of_peer(*[*PARTS.values()][:4]), of_peer(*[*PARTS.values()][:5])
    assert kept[0] < 0.75 and held[1] < 0.60 < kept[1]  # the aims
    assert all(parts["rest"] >= 0 for its in cases.values() for parts in its.values())
    load = full["load"]
    defaults = full["defaults-sample"]
    fixed = RESULTS["memory"]["cases"]["train-1-bf16"]["usual"]
    resident = fixed["imported"] + fixed["weights"]
    assert_quoted(f"holds {resident:,.0f} of its {defaults['peak_mb']['ours']:,.0f} MB in torch and weights, "
                  f"{resident / defaults['peak_mb']['peer']:.2f} of the peer's peak")
    least = (load["imported_mb"] + 2432) / load["peak_mb"]["peer"]
    assert 0.8 < least <= load["memory_ratio"]
    assert_quoted(f"{held[0]:.2f} and {held[1]:.2f} of the peer's peak, with what the backward needs "
                  f"{kept[0]:.2f} and {kept[1]:.2f}", f"and the file's 2,432 MB alone are {least:.2f}")


def test_the_readmes_words_on_a_gpu_are_those_of_the_results():
    rows = {name.removeprefix("full "): its for name, its in RESULTS["compare_h200"].items()}
    table = benchmark("compare").table(RESULTS["compare_h200"], "full")
    assert " ".join(table.split()) in README and {its["commit"] for its in rows.values()} == {"d09b0bd"}

    def between(names, value, digits=2, joint=" to "):
        values = [value(rows[name]) for name in names]
        return joint.join(f"{limit:.{digits}f}" for limit in (min(values), max(values)))

    def ratio(its):
        return its["ratio"]["median"]

    def alone(its):
        return its["work"]["ours"]["kernel_seconds"] / its["work"]["peer"]["kernel_seconds"]

    def rate(its):
        return its["work"]["ours"]["matrix_flop_per_second"] / 1e12

    compiled = [name for name in rows if "compiled" in name]
    eager = [name for name in rows if name not in compiled and name != "load"]
    half = [name for name in eager if not name.endswith("float32")]
    train = [name for name in eager if name.startswith("train")]
    sampling = [name for name in half if name.startswith("sample")]
    vae = [f"{part}-{word}" for word in ("bf16", "float32") for part in ("encode", "decode")]
    others, half_train = ([name for name in half if name not in vae],
                          [name for name in train if name in half])
    count = {name: its["work"]["ours"].get("kernels") for name, its in rows.items()}

    def waits(name):
        return (rows[name]["seconds"]["ours"] - rows[name]["work"]["ours"]["kernel_seconds"]) / count[name]
    assert_quoted(
        f"{len(rows)} of the {len(benchmark('compare').cases('cuda'))} cases",
        f"busy for {between(others, lambda its: 100 * its['busy']['ours'], 0)} % of ours' turns",
        f"host, {1e6 * min(map(waits, others)):.0f} to {1e6 * max(map(waits, others)):.0f} µs per kernel",
        f"starts {between(half_train, lambda its: its['work']['ours']['kernels'] / its['work']['peer']['kernels'])} of the peer's "
        f"kernels and takes {between(half_train, ratio)} of the time, where the GPU alone would take "
        f"{between(half_train, alone)}; sampling {between(sampling, ratio)}, alone {between(sampling, alone)}.",
        f"the ratios are {between(compiled, ratio)}",
        "in bf16 ({:.2f} and {:.2f})".format(*(ratio(rows[name]) for name in vae[:2])),
        "in float32 ({1:.2f}; the encoder {0:.2f})".format(*(ratio(rows[name]) for name in vae[2:])),
        "takes {:.2f} and {:.2f} times the memory".format(*(rows[n]["memory_ratio"] for n in vae[:2])),
        f"{between([n for n in rows if n not in vae[:2]], lambda its: its['memory_ratio'])} of it",
        f"loading ({ratio(rows['load']):.2f}), and UNI2-h as timm makes it ({ratio(rows['encoder-float32']):.2f})")
    assert not any("checkpointing" in name or name.startswith("defaults") for name in rows)
    assert [name for name in rows if name.startswith(("epoch", "sample-ddim"))] == [
        "sample-ddim-fp16", "epoch-bf16"]
    assert all(rate(rows[name]) == pytest.approx(51, abs=1) for name in eager if name not in half)
    assert all(720 < rate(rows[name]) < 795 for name in half)
    assert {name for name in rows if ratio(rows[name]) >= 1} == {
        *vae[:2], "decode-float32", "load", "encoder-float32"}
    inert = 2 * 28 * (1152**2 + 1152) * 2 / 1e6
    assert_quoted(f"({inert:.0f} MB less in half precision)")
    assert {name for name in rows if not count[name]} == {*compiled}
    assert {name for name, its in rows.items() if (its["matrix_share"]["ours"] or 0) > 1} == {*vae[2:]}


def test_the_readmes_other_tables_are_those_of_their_results():
    wanted = benchmark("compare").table(RESULTS["compare"], "full").splitlines()
    for its in RESULTS["guidance_interval"]["results"].values():
        pairs = [f"{its[arm][name]:.{n}f}" for name, n in (
            ("colour W1", 2), ("cosine", 3), ("nuclei r", 2)) for arm in ("base", "both")]
        wanted.append(f"| {its['rows']} | {' | '.join(pairs)} |")
    for grid in ("nct_grid", "kather_grid", "procedural_grid"):
        for name, variant in RESULTS[f"adaptation_{grid}"]["variants"].items():
            cells = [GRID_LABELS.get(name, name), ranged(variant["colour, % of base"], 0),
                     *(ranged(variant["columns"]["both"][name], n) for name, n in PLACES)]
            wanted.append(f"| {' | '.join(cells)} |")
            assert variant["seeds"] == 3
    for grid in ("kather_grid", "procedural_grid"):
        floor = RESULTS[f"adaptation_{grid}"]["variants"]["default"]["columns"]["real_real"]
        cells = [ranged(floor[name], n) if floor.get(name) else "–" for name, n in PLACES]
        wanted.append(f"| real–real floor | – | {' | '.join(cells)} |")
    for name, labels in (("nct_grid", ["base | –"]), ("kather_grid", ["base | –"]), ("procedural_grid", ["base | –"]),
                         ("procedural", ["base", "**adapter + LoRA**", "base, recoloured"])):
        its = RESULTS[f"adaptation_{name}"]["variants"]["default"]["columns"]
        wanted += [f"| {label} | {' | '.join(ranged(its[LABELS[label.removesuffix(' | –')]][name], n) for name, n in PLACES)} |"
                   for label in labels]
    variants = RESULTS["adaptation_procedural"]["variants"]
    assert [its["seeds"] for its in variants.values()] == [3] * 3
    for name in ("LoRA trained alone", "adapter trained alone"):
        its = variants[name]["columns"]["both"]
        wanted.append(f"| {name} | {' | '.join(ranged(its[what], n) for what, n in PLACES)} |")
    levers = RESULTS["levers"]
    for label, names in LEVERS.items():
        cells = [" / ".join(f"{levers[word][name]['ratio']['median']:.2f}" for name in names)
                 if names[0] in levers[word] else "–" for word in ("bf16", "float32")]
        wanted.append(f"| {label} | {' | '.join(cells)} |")
    measured = {name for word in ("bf16", "float32") for name, its in levers[word].items()
                if isinstance(its, dict) and "ratio" in its}
    assert measured == {name for names in LEVERS.values() for name in names}  # none is left out
    for label, work in {"training step": "training step", "guided forward": "forward",
                        "VAE encode": "VAE encode", "VAE decode": "VAE decode"}.items():
        shares = [levers[word][f"shares of a {work}"] for word in ("bf16", "float32")]
        cells = [f"{100 * a:.0f} / {100 * b:.0f}" for a, b in zip(*map(dict.values, shares))]
        wanted.append(f"| {label} | {' | '.join(cells)} |")
    memory = RESULTS["memory"]["cases"].values()
    cells = {label: [f"{its['usual'][part]:,.0f}" for its in memory] for label, part in PARTS.items()}
    cells["peak, if given back at once"] = [f"{its['given back at once']['peak']:,.0f}" for its in memory]
    cells["processor time then"] = [f"× {more_time(its):.1f}" for its in memory]
    wanted += [f"| {label} | {' | '.join(values)} |" for label, values in cells.items()]
    wanted += [f"| {name} | {its['seconds']:.3g} | {its['peak_mb'] / 1e3:.2f} |"
               for name, its in RESULTS["full_size_amd_epyc"]["measures"].items() if its]
    assert [row for row in wanted if row not in README] == [] and len(wanted) > 80


def test_the_readmes_words_on_adaptation_are_those_of_the_results():
    kather, procedural = (RESULTS[f"adaptation_{name}"] for name in ("kather_unguided", "procedural"))
    cosine = [kather["variants"]["default"]["columns"][arm]["cosine"]["values"]
              for arm in ("base", "both")]
    gains = [f"{after - before:.2f}" for before, after in zip(*cosine)]
    guided = RESULTS["adaptation_kather"]["variants"]["default"]["colour, % of base"]["median"]
    away = procedural["true_shift"]
    variants = RESULTS["adaptation_nct_grid"]["variants"]
    left = {name: its["colour, % of base"]["median"] for name, its in variants.items()}
    ranks = [name for name in left if name.startswith("rank") or name == "default"]
    spread = [max(its) - min(its) for name in ranks for its in [variants[name]["colour, % of base"]["values"]]]
    base, across = variants["default"]["columns"]["base"], variants["cross-attention alone"]["columns"]["both"]
    whole = RESULTS["adaptation_nct_unguided"]["variants"]["default"]["colour, % of base"]["median"]
    seeds = [variants[name]["colour, % of base"]["values"] for name in ranks]
    assert max(map(min, seeds)) < min(map(max, seeds))  # the rows' spreads have a value in common
    cosines = base["cosine"]["values"]
    assert all(min(cosines) <= its["columns"]["both"]["cosine"]["median"] <= max(cosines)
               for its in variants.values())
    assert {name: sum(low > 0 for _, low, _ in its["value, low, high"]["gain in cosine"])
            for name, its in procedural["variants"].items()} == {
        "default": 1, "LoRA trained alone": 0, "adapter trained alone": 0}
    turned = [procedural["variants"]["adapter trained alone"]["columns"]["both"][angle]["median"]
              / procedural["variants"]["default"]["columns"]["base"][angle]["median"]
              for angle in ("E angle °", "H angle °")]
    assert turned[0] < 0.6 and 0.9 < turned[1] < 1
    everywhere, within = (RESULTS["guidance_interval"]["results"][f"3, {name}"]["both"]
                          for name in ("everywhere", "0.4 to 3"))
    assert_quoted(
        f"by {', '.join(gains[:-1])} and {gains[-1]}, and no 95 %",
        f"leaves {guided:.0f} % of the",
        f"Colour left: {percents(procedural['variants']['default']['colour, % of base'])}",
        "LoRA trained alone leaves {}, hardly more than both; the adapter alone {}: it turns eosin's".format(*(
            percents(procedural["variants"][f"{part} trained alone"]["colour, % of base"])
            for part in ("LoRA", "adapter"))),
        "a little better ({:.2f} against {:.2f})".format(*(
            procedural["variants"]["adapter trained alone"]["columns"][arm]["nuclei r"]["median"]
            for arm in ("both", "base"))),
        f"lies {away['colour W1']:.2f} away in colour W1, {away['H angle °']:.1f}° and "
        f"{away['E angle °']:.1f}° in the angles",
        f"lie between {min(left[n] for n in ranks):.0f} and {max(left[n] for n in ranks):.0f} % of the "
        f"colour shift left, the least at alpha 32 (rank 4: {left['rank 4, alpha 32']:.0f}, rank 8: "
        f"{left['rank 8, alpha 32']:.0f})", f"up to {max(spread):.0f} points apart",
        f"The default's {left['default']:.0f} % is not the least of them",
        f"150 steps leave {left['default']:.0f} %, all 300 of them {whole:.0f} %",
        f"as little as both ({left['LoRA trained alone']:.0f} %); the adapter alone "
        f"{left['adapter trained alone']:.0f} %, at six times its rate {left['adapter trained alone, 3e-3']:.0f} %",
        f"({left['self-attention alone']:.0f} and {left['cross-attention alone']:.0f} %)",
        f"({across['H angle °']['median']:.1f}°, the base {base['H angle °']['median']:.1f}°)",
        f"({across['nuclei r']['median']:.2f} against {base['nuclei r']['median']:.2f})",
        f"({within['colour W1']:.2f} against {everywhere['colour W1']:.2f} everywhere)",
        f"(nuclei {within['nuclei r']:.2f} against {everywhere['nuclei r']:.2f})")


def test_the_readmes_intervals_of_the_gain_are_those_of_the_results():
    def over_base(name, what):  # of each seed: (value, low, high)
        return RESULTS[f"adaptation_{name}"]["variants"]["default"]["value, low, high"][what]

    def quoted(name, what):
        return ", ".join(f"{value:+.3f} ({low:.3f}…{high:.3f})"
                         for value, low, high in over_base(name, what)).replace("-", "−")
    gain, centred, colour = "gain in cosine", "gain in cosine, centred", "colour, % of base"
    assert [low > 0 for _, low, _ in over_base("nct_unguided", gain)] == [
        low > 0 for _, low, _ in over_base("nct_images", gain)] == [True, False, False]
    assert all(low > 0 for _, low, _ in over_base("kather_unguided", gain))
    assert [low > 0 for name in ("kather_unguided", "nct_images")
            for _, low, _ in over_base(name, centred)] == [False, True, False, True, False, False]
    assert [high < 40 for _, _, high in over_base("nct_images", colour)] == [False, True, False]
    images = RESULTS["adaptation_nct_images"]
    its, columns = images["variants"]["default"], images["variants"]["default"]["columns"]
    assert images["tiles"]["images_per_tile"] == 4 and its["seeds"] == 3
    before, after = (columns[arm]["nuclei r"] for arm in ("base", "both"))
    assert all(a < b for a, b in zip(before["values"], after["values"], strict=True))
    ranges = [", ".join(f"{low:.0f}…{high:.0f}" for _, low, high in over_base(name, colour)).replace("-", "−")
              for name in ("nct_unguided", "nct_images")]
    assert_quoted(
        f"From one image a tile one seed proves the gain in cosine: {quoted('nct_unguided', gain)}. From four",
        f"the same seed does: {quoted('nct_images', gain)}, less the tiles' mean embedding {quoted('nct_images', centred)}",
        f"embedding the gain is {quoted('kather_unguided', centred)}, proven in one seed",
        f"colour left: {percents(its['colour, % of base'])}",
        f"{before['median']:.2f} → {after['median']:.2f} in the median",
        f"the 95 % intervals are {ranges[0]}, from four images a tile {ranges[1]}, so one seed's")


def test_the_readmes_words_on_averaged_weights_are_those_of_the_results():
    last, averages = (RESULTS[f"adaptation_nct_{name}"] for name in ("unguided", "ema"))
    assert averages["settings"] == last["settings"] | {"ema": True} and not last["settings"]["ema"]
    assert averages["training_settings"]["ema_decay"] == 0.999
    last, averages = (its["variants"]["default"] for its in (last, averages))
    cosines, nuclei = ("{:.{n}f} (the last: {:.{n}f})".format(
        *(its["columns"]["both"][name]["median"] for its in (averages, last)), n=digits)
        for name, digits in (("cosine", 3), ("nuclei r", 2)))
    assert_quoted(f"they leave {percents(averages['colour, % of base'])} of the colour shift, a median cosine of {cosines} "
                  f"and nuclei of {nuclei}")


def test_what_the_readme_says_of_kathers_grid_is_so():
    variants = RESULTS["adaptation_kather_grid"]["variants"]
    assert {its["seeds"] for its in variants.values()} == {3} and variants.keys() == benchmark(
        "adaptation").VARIANTS.keys()
    adapters = ["adapter trained alone", "adapter trained alone, 3e-3"]
    across, alone = "cross-attention alone", "self-attention alone"
    inside = [name for name in variants if name not in [*adapters, across]]
    ranks = [name for name in inside if name.startswith("rank") or name == "default"]
    left = {name: its["colour, % of base"]["median"] for name, its in variants.items()}
    spread = [max(its) - min(its) for name in ranks for its in [variants[name]["colour, % of base"]["values"]]]

    def gains(names, what="gain in cosine"):  # of each row: each seed's (value, low, high)
        return [variants[name]["value, low, high"][what] for name in names]

    def nuclei(names, arm="both"):
        every = [value for name in names for value in variants[name]["columns"][arm]["nuclei r"]["values"]]
        return f"{min(every):.2f} to {max(every):.2f}"

    def rise(names):
        every = [value for its in gains(names) for value, _, _ in its]
        return f"by {min(every):.2f} to {max(every):.2f}"
    assert all(value > 0 for its in gains(variants) for value, _, _ in its)
    assert all(low > 0 for its in gains(inside) for _, low, _ in its)
    assert [sum(low > 0 for _, low, _ in its) for its in gains([across, *adapters])] == [1, 1, 1]
    centred = {name: sum(low > 0 for _, low, _ in its) for name, its in zip(
        variants, gains(variants, "gain in cosine, centred"))}
    assert centred.pop(alone) == 2 and set(centred.values()) == {0, 1}
    more = [after > before for before, after in zip(*(variants[name]["colour, % of base"]["values"]
                                                      for name in ("default", alone)))]
    assert more == [True, True, False]
    assert max(left, key=left.get) == adapters[0] and abs(left[across] - left["default"]) < 1
    assert_quoted(
        f"lie between {min(left[n] for n in ranks):.0f} and {max(left[n] for n in ranks):.0f} % of the colour "
        f"shift left; the seeds of a row up to {max(spread):.0f} points apart",
        f"among LoRA's places {rise(inside)}, each 95 % interval above 0",
        f"with LoRA on cross-attention alone {rise([across])} and with the adapter alone {rise(adapters)}, in each of these "
        "rows proven in one seed of three",
        f"self-attention alone in two seeds of three more ({percents(variants[alone]['colour, % of base'])})",
        f"the adapter alone most ({left[adapters[0]]:.0f} %, at 3e-3 {left[adapters[1]]:.0f} %)",
        f"{nuclei([*inside, across])} with LoRA, {nuclei(adapters)} with the adapter alone, "
        f"{nuclei(['default'], 'base')} for the base")


def test_what_the_readme_says_of_the_procedural_grid_is_so():
    grid, whole = (RESULTS[f"adaptation_{name}"]["variants"] for name in ("procedural_grid", "procedural"))
    parts = {"LoRA trained alone", "adapter trained alone", "adapter trained alone, 3e-3"}
    assert {its["seeds"] for its in grid.values()} == {3}
    assert grid.keys() == benchmark("adaptation").VARIANTS.keys() - parts and whole.keys() >= {*parts} - {
        "adapter trained alone, 3e-3"}
    left = {name: its["colour, % of base"] for name, its in grid.items()}
    across, alone = "cross-attention alone", "self-attention alone"
    ranks = [name for name in grid if name not in (across, alone)]
    medians = [left[name]["median"] for name in ranks]
    spread = max(max(left[name]["values"]) - min(left[name]["values"]) for name in ranks)
    base = grid["default"]["columns"]["base"]

    def fell(names):
        every = [[after / before for name in names for before, after in zip(
            base[angle]["values"], grid[name]["columns"]["both"][angle]["values"], strict=True)]
            for angle in ("H angle °", "E angle °")]
        return " and ".join(f"{min(its):.2f} to {max(its):.2f}" for its in every)
    gains = [(name, low, high) for name, its in grid.items()
             for _, low, high in its["value, low, high"]["gain in cosine"]]
    assert not any(low > 0 for _, low, _ in gains) and [name for name, _, high in gains if high < 0] == [across]
    more = max(its["columns"]["both"]["nuclei r"]["median"] for its in grid.values()) - base["nuclei r"]["median"]
    near = 100 * max(max(its["columns"]["both"]["nearer than 5 %"]["values"]) for its in grid.values())
    assert more < 0.015
    assert_quoted(
        f"matter least here: medians of {min(medians):.0f} to {max(medians):.0f} % of the colour shift left, the seeds of a "
        f"row up to {spread:.0f} points apart; 150 steps leave as much as 300 ({left['default']['median']:.0f} and "
        f"{whole['default']['colour, % of base']['median']:.0f} %)",
        f"to {fell(ranks)} of the base's with LoRA on all attention, to {fell([alone])} on self-attention alone, to "
        f"{fell([across])} on cross-attention alone",
        f"alone leaves {percents(left[alone])} and {percents(left[across])}",
        f"at most {near:.0f} % of the images of a row and seed lie nearer")


def test_what_the_readme_says_of_each_seed_is_so():
    def values(name, arm, what):
        return RESULTS[f"adaptation_{name}"]["variants"]["default"]["columns"][arm][what]["values"]

    def pairs(name, what, one="base", other="both"):
        return [*zip(values(name, one, what), values(name, other, what), strict=True)]
    for name in ("nct", "nct_unguided"):  # stain vectors
        assert all(after < before for what in ("H angle °", "E angle °") for before, after in pairs(name, what))
    turned = [after / before for name in ("nct", "nct_unguided") for before, after in pairs(name, "H angle °")]
    assert_quoted(f"haematoxylin's to {min(turned):.2f} to {max(turned):.2f} of the base's")
    rises = {(name, what): sum(after > before for before, after in pairs(name, what))
             for name in ("nct", "nct_unguided", "kather_unguided") for what in ("cosine", "nuclei r")}
    assert [*rises.values()] == [2, 1, 2, 3, 3, 3]
    for name, arms in (("nct_unguided", ["both"]), ("nct", ["adapter", "lora", "both"])):
        assert all(max(values(name, arm, "nearer than 5 %")) < 0.05 for arm in arms)
    near = [max(values(name, "both", "nearer than 5 %")) for name in ("kather", "kather_unguided")]
    assert_quoted(f"in its one seed, {100 * near[0]:.0f} % of the images lie nearer",
                  f"without guidance at most {100 * near[1]:.0f} %")
    floors = pairs("kather_unguided", "colour W1", "real_real")
    assert sorted(after - floor > 0.2 for floor, after in floors) == [False, False, True]
    eosin = pairs("kather_unguided", "E angle °", "real_real")
    assert all(after > floor for floor, after in eosin)
    assert all(after > before for before, after in pairs("kather_unguided", "E angle °"))
    assert sum(after > floor for floor, after in pairs("kather_unguided", "H angle °", "real_real")) == 1
    first, second, third = (after for _, after in eosin)
    assert_quoted(f"in every seed ({first:.1f}°, {second:.1f}° and {third:.1f}°), haematoxylin's in one "
                  f"({max(values('kather_unguided', 'both', 'H angle °')):.1f}°)")
    kid = {name: pairs(name, "KID") for name in ("nct_unguided", "kather_unguided", "nct")}
    assert all(after < before for name in ("nct_unguided", "kather_unguided") for before, after in kid[name])
    assert all(after > before for before, after in kid["nct"])  # at guidance 1.5
    falls, kathers, rises = (
        f"({', '.join(f'{signed(before, 3)} → {signed(after, 3)}' for before, after in its)})" for its in kid.values())
    recoloured = ", ".join(signed(value, 3) for value in values("nct_unguided", "colour_only", "KID"))
    assert all(after < before for before, after in pairs("kather_unguided", "KID", "colour_only"))
    assert_quoted(f"falls in every seed {falls}, about as far as by recolouring ({recoloured}); at 1.5 it rises in "
                  f"every seed {rises}", f"KID falls in every seed {kathers}, further than by recolouring")
    fell = sorted(after / before for what in ("H angle °", "E angle °")
                  for before, after in pairs("procedural", what))
    assert fell[-1] < 0.34 and fell[-2] < 0.22


def gigaflop(call):
    """Of matrix products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def test_the_losses_of_float16_and_bfloat16_lie_in_the_readmes_band():
    result = RESULTS["precision"]
    runs = result["relative_to_float32"]
    apart = {name: max(benchmark("precision").relative_distances(runs[name]["loss"], runs["float32"]["loss"]))
             for name in ("bf16", "fp16")}
    assert all(its <= result["band"] for its in apart.values()) and result["steps"] == 200
    assert len(runs["float32"]["loss"]) == 200 and runs["fp16"]["skipped"] == 0
    assert_quoted(f"over {result['steps']} steps of the embedded base",
                  f"within {100 * apart['bf16']:.2f} % of float32's", f"within {100 * apart['fp16']:.3f} %",
                  f"the band that we allow is {100 * result['band']:.1f} %")


STEP, PAIR = 484, 474  # GFLOP of a tile's training step and of a guided pair's forward
AIMS = {  # what the work is: (aim for its time, GFLOP that it cannot do without, aim for memory, cases)
    "training step, bf16, batch 1 / 4": ("0.48", (STEP, 4 * STEP), "0.75 / 0.60", ("train-1-bf16", "train-4-bf16")),
    "training step, float32, batch 1 / 4": (
        "0.74", (STEP, 4 * STEP), "0.72", ("train-1-float32", "train-4-float32")),
    "sampling, bf16, 20 / 50 steps": (
        "0.58", (20 * PAIR, 50 * PAIR), "0.85", ("sample-dpm-bf16", "sample-ddim-bf16")),
    "sampling, float32, 20 / 50 steps": (
        "0.75", (20 * PAIR, 50 * PAIR), "0.85", ("sample-dpm-float32", "sample-ddim-float32")),
    "VAE, bf16, encode / decode": ("0.45", (273, 622), "1.0", ("encode-bf16", "decode-bf16")),
    "epoch, bf16 / float32": ("0.30", (4 * STEP, 4 * STEP), "0.50", ("epoch-bf16", "epoch-float32")),
    "defaults: training step / sampling / epoch": (
        "0.21 / 0.16 / 0.11", (4 * STEP, 20 * PAIR, 4 * STEP), "0.48",
        ("defaults-train", "defaults-sample", "defaults-epoch")),
    "load": ("0.8", (), "0.8", ("load",)),
}


def aim_rows():
    """The README's rows: aim, reached and the least possible at the measured matrix rate; memory."""
    full = {name.removeprefix("full "): its for name, its in RESULTS["compare"].items()}
    for label, (time, work, memory, names) in AIMS.items():
        rates = [2 * RESULTS["levers"]["float32" if name.endswith("float32") else "bf16"][
            "matrix products, flop per second"] / 1e9 for name in names]
        least = [f"{gflop / rate / full[name]['seconds']['peer']:.2f}"
                 for gflop, rate, name in zip(work, rates, names)]
        yield "| " + " | ".join([
            label, time, " / ".join(f"{full[name]['ratio']['median']:.2f}" for name in names),
            " / ".join(least) or "–", memory,
            " / ".join(f"{full[name]['memory_ratio']:.2f}" for name in names)]) + " |"


def aims_reached():
    """Names of the cases that reached their aim in time, and in memory; an aim may hold for several."""
    found = [], []
    for time, _, memory, names in AIMS.values():
        for its, aims, key in zip(found, (time, memory), ("ratio", "memory_ratio"), strict=True):
            aims = [float(aim) for aim in aims.split(" / ")]
            for name, aim in zip(names, aims if len(aims) > 1 else aims * len(names), strict=True):
                reached = RESULTS["compare"][f"full {name}"][key]
                if (reached["median"] if key == "ratio" else reached) <= aim:
                    its.append(name)
    return found


def test_the_readmes_aims_are_beside_what_was_reached():
    assert [row for row in aim_rows() if row not in (ROOT / "README.md").read_text().splitlines()] == []
    time, memory = aims_reached()
    assert time == []
    assert_quoted(f"none is reached, of those in memory {len(memory)} of {sum(len(its[3]) for its in AIMS.values())}")


def test_the_readmes_words_on_missed_aims_are_those_of_the_results():
    seconds = {name.removeprefix("full "): its["seconds"] for name, its in RESULTS["compare"].items()}
    full = {name: its["ours"] for name, its in seconds.items()}
    levers = RESULTS["levers"]
    compiled = {side: [" and ".join(f"{seconds[f'{case}-{word}'][side] / seconds[f'{plain}-{word}'][side]:.2f}"
                                    for word in ("bf16", "float32"))
                       for case, plain in (("train-1-compiled", "train-1"),
                                           ("forward-compiled", "forward-unmerged"))]
                for side in ("peer", "ours")}
    assert_quoted("the peer's training step takes {} of the time in bf16 and float32, its forward {};".format(
        *compiled["peer"]) + " ours {}, {}.".format(*compiled["ours"]))
    spent = [levers[word]["shares of a training step"]["products and attention"] * full[f"train-1-{word}"]
             for word in ("float32", "bf16")]
    assert_quoted(
        f"in bf16 {full['epoch-bf16']:.2f} s, a step of the same four tiles at once {full['train-4-bf16']:.2f} s",
        f"take {spent[0]:.1f} s of a float32 step's {full['train-1-float32']:.2f} s, not 2.62 s, and "
        f"{spent[1]:.1f} s of a bf16 step's {full['train-1-bf16']:.2f} s, not 1.14 s")


def test_the_readmes_words_on_memorisation_in_the_grids_are_those_of_the_results():
    nct, kather = ([its["columns"]["both"]["nearer than 5 %"] for its in
                    RESULTS[f"adaptation_{name}_grid"]["variants"].values()] for name in ("nct", "kather"))
    highest = [100 * max(max(its["values"]) for its in grid) for grid in (nct, kather)]
    assert_quoted(f"In no row and seed do more than {highest[0]:.0f} % of the images",
                  f"in Kather's grid {highest[1]:.0f} % at most, in no row more than "
                  f"{100 * max(its['median'] for its in kather):.0f} % in the median")


def test_the_readmes_gigaflop_are_those_of_the_networks():
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
        encode = gigaflop(lambda: vae.encode(torch.empty(1, 3, 256, 256)))
        decode = gigaflop(lambda: vae.decode(torch.empty(1, 16, 32, 32)))

    def of_all_blocks(batch, work, adapted):
        inputs, counts = (torch.zeros(batch, 16, 32, 32), torch.zeros(batch), torch.zeros(batch, 1, 1536)), []
        for layers in (1, 2):  # bf16: its attention is plain products, which are counted
            model = PixCellTransformer(TransformerConfig(num_layers=layers)).requires_grad_(False)
            if adapted:
                inject_lora(model, 8, 16, exclude=model.inert_layers())
            with torch.autocast("cpu", torch.bfloat16):
                counts.append(gigaflop(lambda: work(model(*inputs))))
        return counts[0] + (TransformerConfig().num_layers - 1) * (counts[1] - counts[0])
    assert (round(encode), round(decode)) == AIMS["VAE, bf16, encode / decode"][1]
    assert round(of_all_blocks(2, lambda output: output, adapted=False)) == PAIR
    assert round(of_all_blocks(1, lambda output: output.float().sum().backward(), adapted=True)) == STEP


def test_the_readmes_words_on_cost_are_those_of_the_results():
    full = {name.removeprefix("full "): its for name, its in RESULTS["compare"].items()}
    seconds = {name: [f"{its['seconds'][side]:.2f}" for side in ("ours", "peer")]
               for name, its in full.items()}
    equal = [its["ratio"]["median"] for name, its in full.items()
             if not name.startswith(("defaults", "encoder", "load"))]
    training, sampling, vae = ([its["memory_ratio"] for name, its in full.items()
                                if name.startswith(kinds) and "compiled" not in name]
                               for kinds in ("train", "sample", ("encode-", "decode-")))
    grown, first = RESULTS["scaling_full"]["points"], full["load"]["first_seconds"]

    def growth(what, key):
        values = [point[key] for point in grown[what].values()]
        return values[-1] / values[0]
    assert all((its["difference"] or 0) <= 8.05e-6 for name, its in full.items() if name.endswith("float32"))
    plain = seconds["train-1-bf16"]

    step, forward = (" and ".join(f"{full[f'{case}-compiled-{word}']['ratio']['median']:.2f}" for word in ("bf16", "float32"))
                     for case in ("train-1", "forward"))
    bf16, float32 = RESULTS["levers"]["bf16"], RESULTS["levers"]["float32"]
    rates = [2 * its["matrix products, flop per second"] / 1e12 for its in (bf16, float32)]  # of two cores
    once = bf16["the same in all steps, share"]
    saved = [bf16[f"each projection casts, batch {n}"]["saved_mb"] for n in (1, 4)]
    features, resume = RESULTS["features"], RESULTS["resume"]
    seen, decoded = features["training_tiles_per_second"], features["decoded_tiles_per_second"]
    held = features["megabytes_not_page_cache_after_tiles"]
    assert {round(100 * (1 - its["ours"] / its["other"])) for its in saved} == {11}
    assert_quoted(
        f"(ratios {min(equal):.2f} to {max(equal):.2f} at equal precision) but UNI2-h's "
        f"({full['encoder-float32']['ratio']['median']:.2f}), which timm computes on both sides, and "
        f"loading's ({full['load']['ratio']['median']:.2f})",
        f"VAE's 273 and 622 GFLOP alone need {0.273 / rates[0]:.2f} s and {0.622 / rates[0]:.2f} s here "
        f"(`train.py` encodes in float32), a guided pair's {PAIR} GFLOP {PAIR / 1e3 / rates[0]:.2f} s",
        f"Training takes {min(training):.1f} to {max(training):.1f} of the memory, sampling "
        f"{min(sampling):.2f} to {max(sampling):.2f}, the VAE {min(vae):.2f} to {max(vae):.2f}",
        f"imported for it beside torch, in {first['ours']:.2f} s, theirs in {first['peer']:.2f} s",
        f"eight tiles take {growth('batch', 'cpu_seconds'):.1f} times the time of one and "
        f"{growth('batch', 'mb'):.1f} times the memory, rank 64 {growth('rank', 'cpu_seconds'):.1f} "
        f"times the time of rank 1 and {growth('rank', 'mb'):.1f} times the memory",
        f"the cells of 256 px, {growth('latent side', 'cpu_seconds'):.0f} times the time and "
        f"{growth('latent side', 'mb'):.1f} times the memory",
        f"a training step takes {step.replace(' and', ' of its time in bf16 and')} in float32, a forward with active LoRA {forward};",
        f"would save {100 * once['modulation and condition']:.1f} % of a forward, cross-attention's "
        f"output {100 * once['cross-attention']:.1f} %", "activations 11 % smaller",
        f"makes {rates[0] / 2:.3f} TFLOP/s of such products in bf16 and {rates[1] / 2:.3f} in float32",
        f"need {STEP / 1e3 / rates[0]:.2f} s and {STEP / 1e3 / rates[1]:.2f} s for the {STEP} GFLOP of a tile's",
        f"ours takes {plain[0]} s and {seconds['train-1-float32'][0]} s, the peer {plain[1]} s and "
        f"{seconds['train-1-float32'][1]} s",
        f"sees {seen['cached']} tiles a second, encoding each batch anew "
        f"{seen['encoded_at_each_step']} ({seen['ratio']:.1f} times less)",
        f"first pass makes {features['first_pass_tiles_per_second']['1 thread(s)']:.1f} tiles a second",
        f"opens 16 tiles in {1e3 * features['second_pass_seconds']:.0f} ms",
        f"decode {decoded['2 thread(s)']:,.0f} tiles a second, two processes {decoded['2 process(es)']:.0f}",
        f"{held['1000']} MB after 1,000 tiles and {held['20000']} MB after 20,000",
        f"A save takes {resume['save_seconds']} s, {100 * resume['share_of_time_saving']:.2f} % of the time",
        f"up again {resume['load_seconds']} s")


def test_the_readmes_words_on_the_embedded_base_beside_the_peer_are_those_of_the_results():
    nano = {name.removeprefix("nano "): its for name, its in RESULTS["compare_nano"].items()}
    assert list(nano) == list(benchmark("compare").cases())
    pair = {name: " and ".join(f"{nano[f'{name}-{word}']['ratio']['median']:.2f}" for word in ("bf16", "float32"))
            for name in ("train-4", "sample-dpm", "encode", "decode", "epoch", "forward")}
    encoder = nano.pop("encoder-float32")["memory_ratio"]
    memory = [its["memory_ratio"] for its in nano.values()]
    assert_quoted(
        f"takes {pair['train-4'].replace(' and', ' of its time in bf16 and')} in float32, 20 steps of "
        f"sampling {pair['sample-dpm']}, an encode {pair['encode']}, a decode {pair['decode']}, an epoch "
        f"{pair['epoch']}, at {min(memory):.2f} to {max(memory):.2f} of the memory (UNI2-h's stand-in: "
        f"{encoder:.2f}). A forward is no faster there ({pair['forward']})")


def test_the_readmes_sizes_follow_from_the_code():
    sizes, shape = TransformerConfig(), (32, 32)
    with torch.device("meta"):
        model = PixCellTransformer(sizes)
    inject_lora(model, 8, 16, exclude=model.inert_layers())
    (lora, inside), (adapter, _) = map(count_parameters, (model, EmbeddingAdapter(
        sizes.caption_channels)))
    megabytes = [4 * (2 * 16 * shape[0] * shape[1] * scale**2 + scale**2 * sizes.caption_channels)
                 / 1e6 for scale in (1, 4)]  # mean and deviation, and the tokens, in float32
    random = RESULTS["full_size_amd_epyc"]["file_bytes"]
    assert_quoted(
        f"of PixCell-256, LoRA and adapter are {100 * (lora + adapter) / (inside + adapter):.2f} %",
        f"in shards of about {SHARD_BYTES / 2**20:.0f} MB",
        f"{megabytes[0]:.2f} MB on disk with a base of 256 px, {8 * megabytes[0]:.1f} MB with its eight",
        f"1024 px {megabytes[1]:.1f} MB and {8 * megabytes[1]:.1f} MB",
        f"fetches about {sum(RELEASES[n].gigabytes for n in ('pixcell-256', 'uni2-h', 'sd3-vae')):.1f} GB",
        f"in the released layout ({sum(n for name, n in random.items() if '1024' not in name) / 1e9:.1f} GB;")
