"""Damaged files of every kind that is read: success, or one line and exit code 2, nothing else."""

import contextlib
import datetime
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train
from conftest import ROOT, TINY_TRANSFORMER, write_base
from fuzzing import (CASES, SLOW, Evil, EvilByName, World, altered, as_command, damage, odd_archive,
                     odd_header, odd_objects, odd_tensors, run, torch_bytes)
from pixcell_min.adapter import load_adapter
from pixcell_min.base import load_pixcell_base
from pixcell_min.checkpoint import STATE_FORMAT, content_hash, file_hash, write_text
from pixcell_min.config import Config, to_yaml
from pixcell_min.data import find_tiles, fit_tile, image_to_tensor, read_tile
from pixcell_min.features import cached_images
from pixcell_min.formats import read_lora
from pixcell_min.images import save_png
from pixcell_min.precomputed import find_precomputed, read_precomputed
from pixcell_min.released import RELEASES
from pixcell_min.tools import audit, convert, doctor, evaluate, original
from test_original import backwards

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(  # Pillow remarks on much
    not Path("/proc/self/statm").exists(), reason="needs what Linux alone tells of memory")]
TIMES = [1, pytest.param(SLOW, marks=pytest.mark.slow)]


def write_original(path):
    original.write_base(path, "new", original.transformer.TransformerConfig.from_dict(
        TINY_TRANSFORMER))


def use_tile(path):
    image = read_tile(path)
    for how in ("resize", "pad"):
        assert fit_tile(image, 64, how).size == (64, 64)


def stub_features():
    """Features of the tiles by a stub instead of networks; the cache is `stub-cache`."""
    def encode(images):
        pixels = torch.stack([image_to_tensor(image) for image in images])
        small = torch.nn.functional.avg_pool2d(pixels, 16)
        return small, small.abs(), small.flatten(1)[:, None]

    return cached_images("stub-cache", find_tiles("tiles"), encode, base_hash="stub", size=64,
                         how="resize", dihedral=False, strict=True, report=print)


def use_arrays():
    return list(read_precomputed(
        find_precomputed("arrays"), (16, 8, 8), (1, 16), 1.5, 0.1, True, print))


def use_cache(arguments):
    """Whatever a cache holds, features are those that were encoded: never refused, never others."""
    expected, = arguments
    got = stub_features()
    every = torch.arange(len(got.mean))
    assert all(torch.equal(getattr(got, name)[every], tensor) for name, tensor in expected.items())
    return 0


def diagnose(arguments):
    """The doctor, for whom a base that cannot be run is no error."""
    code = doctor.main(arguments)
    return 0 if code == 1 else code


SAMPLE = ["--image", "tiles/TUM/1.png", "--steps", "1", "--out", "new", "--mixed-precision", "no"]
DRAW = (sample.main, [*SAMPLE, "--base", "base"])
DIAGNOSE = (diagnose, ["--base", "base", "--hash"])
DRAW_OF_RUN = (sample.main, [*SAMPLE, "--run", "run"])
AUDIT = (audit.main, ["--run", "run"])
TRAIN = ["--data", "tiles", "--base", "base", "--out", "run", "--cache", "cache"]
RESUME = (train.main, ["--resume", *TRAIN])
PREVIEW = (train.main, ["--dry-run", "--config", "config.yaml", *TRAIN])
EVALUATE = (evaluate.main, ["--data", "tiles", "--run", "run", "--out", "new", "--steps", "1",
                            "--arms", "base", "--count", "1"])
USE_ARRAYS = (as_command(use_arrays), [])
LICENCES = (as_command(lambda folder: audit.licences(Path(folder), {})), ["base"])
LICENCE = (LICENCES[0], ["pixcell-256"])
CHECK_DRAWN = (as_command(lambda: evaluate.check_folder(Path("drawn"), [], lambda arm: {})), [])


def to_native(source, *more):
    return convert.main, [source, "new.safetensors", "--format", "native", *more]


def combined(source):
    return sample.main, [*SAMPLE, "--base", "base", "--lora", f"{source}:0.5", "--lora", LORA]


WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG, STATE = "base/transformer/config.json", "run/states/step-00000002.pt"
TILE, DRAWN, LORA = "tiles/TUM/1.png", "drawn/base.png", "lora/native.safetensors"
# (file, (command, arguments) that reads it)
READERS = [
    *((f"base/{name}", DRAW) for name in (
        f"transformer/{WEIGHTS}", "transformer/config.json", "scheduler/scheduler_config.json",
        "vae/config.json", f"vae/{WEIGHTS}", "uni/config.json", "uni/pytorch_model.bin")),
    *((f"base/{name}", DIAGNOSE) for name in (
        "transformer/config.json", f"vae/{WEIGHTS}", "uni/pytorch_model.bin")),
    ("pixcell-256/download.json", DIAGNOSE),
    ("pixcell-256/LICENSE", LICENCE), ("base/README.md", LICENCES),
    (LORA, (convert.main, [LORA, "new", "--format", "peft"])),
    ("lora/diffusers.safetensors", to_native("lora/diffusers.safetensors")),
    ("lora/diffusers.safetensors", combined("lora/diffusers.safetensors")),
    ("lora/kohya.safetensors", to_native("lora/kohya.safetensors", "--base", "base")),
    ("lora/peft/adapter_model.safetensors", to_native("lora/peft")),
    ("lora/peft/adapter_config.json", to_native("lora/peft")),
    ("lora/peft/adapter_config.json", combined("lora/peft")),
    ("lora/authors.pth", to_native("lora/authors.pth", "--base", "base")),
    ("lora/authors.pth", combined("lora/authors.pth")),
    ("adapter.pth", (as_command(load_adapter), ["adapter.pth"])),
    ("adapter.pth", (sample.main, [*SAMPLE, "--base", "base", "--adapter", "adapter.pth"])),
    ("original.ckpt", (as_command(write_original), ["original.ckpt"])),
    *((f"run/{name}", DRAW_OF_RUN) for name in (
        "adapter.safetensors", "lora_weights.safetensors", "config.yaml")),
    *((f"run/{name}", RESUME) for name in ("config.yaml", "run.json", "metrics.jsonl")),
    *((f"run/{name}", AUDIT) for name in ("config.yaml", "run.json", "tiles.json")),
    ("run/tiles.json", EVALUATE), (STATE, RESUME), (STATE, AUDIT),
    (DRAWN, CHECK_DRAWN), (TILE, DRAW),
]


def make_world(root):
    """Base, tiles, a run of two steps, its LoRA in all formats, the authors' files: all sound."""
    base = write_base(root / "base")
    torch.save(safetensors.torch.load_file(base / "uni" / "model.safetensors"),
               base / "uni" / "pytorch_model.bin")
    (base / "uni" / "model.safetensors").unlink()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    generator = np.random.default_rng(0)
    for label in ("STR", "TUM"):
        (root / "tiles" / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
                root / "tiles" / label / f"{i}.png")
    commands = [
        (train.main, [*TRAIN, "--rank", "2", "--max-train-steps", "2", "--batch-size", "1",
                      "--gradient-accumulation-steps", "1", "--mixed-precision", "no",
                      "--sample-count", "0", "--learning-rate", "0.01", "--no-dihedral"]),
        *((convert.main, ["run/lora_weights.safetensors", f"lora/{name}", "--format", form])
          for name, form in (("native.safetensors", "native"), ("peft", "peft"), (
              "diffusers.safetensors", "diffusers"), ("kohya.safetensors", "kohya")))]
    for command, arguments in commands:
        code, lines = run(command, arguments, root)
        assert code == 0, lines
    (root / "run" / "states" / "step-00000000.pt").unlink()  # nothing to fall back on
    weights = load_pixcell_base(base, "cpu", "no").transformer.state_dict()
    lora = read_lora(root / "lora" / "native.safetensors")
    wrapped = {f"{layer}.{leaf}": f"{layer}.base_layer.{leaf}"
               for layer in lora.layers for leaf in ("weight", "bias")}
    torch.save({**{wrapped.get(key, key): value for key, value in weights.items()},
                **{key.replace(".weight", ".default.weight"): value
                   for key, value in lora.state.items()}}, root / "lora" / "authors.pth")
    torch.save(safetensors.torch.load_file(root / "run" / "adapter.safetensors"),
               root / "adapter.pth")
    torch.save(backwards(weights), root / "original.ckpt")
    save_png(root / "drawn" / "base.png", Image.new("RGB", (8, 8)), {"arm": "base", "seed": 1})
    (root / "arrays").mkdir()
    np.save(root / "arrays" / "a_sd3_vae.npy", generator.random((32, 8, 8)).astype(np.float16))
    np.save(root / "arrays" / "a_uni.npy", generator.random((1, 16)).astype(np.float16))
    write_text(root / "pixcell-256" / "LICENSE", "MIT\n")
    files = RELEASES["pixcell-256"].files
    for file in files:
        write_text(root / "pixcell-256" / file, file)
    write_text(root / "pixcell-256" / "download.json", json.dumps({"files": {file: {
        "size": len(file), "hash": file_hash(root / "pixcell-256" / file)} for file in files}}))
    with contextlib.chdir(root):
        stub_features()
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(make_world(tmp_path_factory.mktemp("world")))


def test_the_sound_world_is_accepted(world):
    for name, (command, arguments) in READERS:
        content = world.sound[world.root / name]
        assert world.judge({name: content}, command, arguments), (name, arguments)


def test_an_empty_licence_is_none(world):
    assert world.judge({"pixcell-256/LICENSE": b" \n"}, *LICENCE)


# ---------------------------------------------------------------- seeded damage


def odd_safetensors(content, random):
    if random.random() < 0.5:
        return odd_header(content, random)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:8 + size]).get("__metadata__")
    return safetensors.torch.save(odd_tensors(safetensors.torch.load(content), random), metadata)


def odd_pickle(content, random):
    fault = random.randrange(3)
    if fault == 0:
        return odd_archive(content, random)
    sound = torch.load(io.BytesIO(content), weights_only=True)
    odd = random.choice(odd_objects(sound)) if fault == 1 or not all(
        isinstance(value, torch.Tensor) for value in sound.values()) else odd_tensors(sound, random)
    return torch_bytes(odd, legacy=random.random() < 0.2)


def odd_array(content, random):
    """A .npy file of another shape, order, dtype, version, or with objects in it."""
    array = np.load(io.BytesIO(content))
    with np.errstate(all="ignore"):
        array = random.choice((
            array.astype(object), array.astype(random.choice(("f8", "i4", "?", ">f2", "c8", "U3"))),
            np.asfortranarray(array), array[..., None], array[:0], array.ravel(), array.T,
            array[0, 0], array * np.nan, array * np.float16(1e5), -abs(array) - 1, array[:, ::2],
            np.zeros(3, [("a", "f4")]), np.array(Evil()), np.array([Evil()] * 3)))
    file = io.BytesIO()
    np.lib.format.write_array(file, array, random.choice(((1, 0), (2, 0), (3, 0))))
    return file.getvalue() if random.random() < 0.8 else damage(file.getvalue(), random)


def encoded_images():
    """Tiles in the formats and modes that are read, and some that are not."""
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8))
    deep = Image.fromarray(generator.integers(0, 2**16, (40, 48), np.uint16))
    animation = {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}
    images = [(colour, "PNG", {}), (colour, "JPEG", {}), (colour, "TIFF", {}), (colour, "BMP", {}),
              (colour, "WEBP", {}), (colour.convert("CMYK"), "JPEG", {}), (deep, "PNG", {}),
              (colour.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"}), (deep, "TIFF", {}),
              (colour.convert("P"), "PNG", {"transparency": 3}), (colour.convert("LA"), "PNG", {}),
              (colour.convert("RGBA"), "WEBP", {"lossless": True}), (colour.convert("1"), "TIFF", {
                  "compression": "group4"}), (colour, "TIFF", {"compression": "jpeg"}),
              (colour, "TIFF", {"compression": "tiff_adobe_deflate", **animation}),
              (colour, "PNG", animation), (colour.convert("P"), "GIF", animation),
              (colour.resize((1, 1)), "PNG", {}), (colour.resize((1, 3000)), "TIFF", {}),
              (colour.resize((3000, 1)), "JPEG", {"progressive": True}),
              (colour.convert("F"), "TIFF", {}), (colour.convert("I"), "TIFF", {}),
              (colour, "JPEG", {"exif": exif(), "icc_profile": b"no profile"}),
              (colour, "JPEG2000", {}), (colour, "ICO", {}), (colour, "PPM", {})]
    for image, form, options in images:
        file = io.BytesIO()
        image.save(file, form, **options)
        yield file.getvalue()


def exif():
    data = Image.Exif()
    data[0x0112], data[0x9286] = 6, "x" * 100
    return data


def cases(kind, world):
    """[(name, case(seed))] of a kind of damage."""
    def of_files(endings, damage):
        return [case_of(damage, name, reader) for name, reader in READERS if name.endswith(endings)]

    def case_of(damage, name, reader):
        return (f"{name} {damage.__name__} {reader[1]}",
                partial(case, damage, name, world.sound[world.root / name], reader))

    def case(damage, name, content, reader, seed):
        return world.judge(
            {name: damage(content, random.Random(f"{name} {seed}"))}, *reader)

    if kind == "bytes":
        return of_files("", damage)
    if kind == "safetensors":
        return of_files(".safetensors", odd_safetensors)
    if kind == "pickles":
        return of_files((".pth", ".bin", ".ckpt", ".pt"), odd_pickle)
    if kind == "images":
        reader = as_command(use_tile), ["tile.png"]
        return [(f"image {i}", partial(case, damage, "tile.png", content, reader))
                for i, content in enumerate(encoded_images())]
    if kind == "arrays":
        return [case_of(how, name, USE_ARRAYS) for how in (damage, odd_array)
                for name in ("arrays/a_uni.npy", "arrays/a_sd3_vae.npy")]
    if kind == "feature caches":
        with contextlib.chdir(world.root):
            sound = stub_features()
            every = torch.arange(len(sound.mean))
            expected = {name: getattr(sound, name)[every]
                        for name in ("mean", "std", "embeddings")}
        shard, = world.root.glob("stub-cache/*/shard-*")
        return [case_of(how, str(path.relative_to(world.root)), (use_cache, [expected]))
                for how, path in ((damage, shard), (odd_safetensors, shard),
                                  (damage, shard.with_name("settings.json")))]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    "kind", ["bytes", "safetensors", "pickles", "images", "arrays", "feature caches"])
def test_damaged_files(world, kind, times):
    its, first = cases(kind, world), 0 if times == 1 else CASES[kind]
    for seed in range(first, CASES[kind] * times):
        name, case = its[seed % len(its)]
        try:
            case(seed)
        except BaseException as error:
            error.add_note(f"case {seed} of {name}")
            raise


# ---------------------------------------------------------------- odd values, by hypothesis


def document_of(content, name):
    """What a file says, as nested dicts and lists."""
    if name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        texts = json.loads(content[8:8 + size])["__metadata__"]
        return {key: json.loads(text) if text[0] == "{" else text for key, text in texts.items()}
    if name.endswith(".pt"):
        return torch.load(io.BytesIO(content), weights_only=True)["content"]
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines()]
    return json.loads(content)


def encodable(text):
    """The same without halves of surrogates, which no UTF-8 holds."""
    return text.encode(errors="replace").decode()


def content_of(document, name, sound) -> bytes:
    """The file that says so; tensors and format as they were."""
    if name.endswith(".safetensors"):
        if not isinstance(document, dict):
            document = {"lora_config": document}
        texts = {encodable(key): encodable(value if isinstance(value, str) else json.dumps(value))
                 for key, value in document.items()}
        return safetensors.torch.save(safetensors.torch.load(sound), texts)
    if name.endswith(".pt"):
        return torch_bytes(
            {"format": STATE_FORMAT, "hash": content_hash(document), "content": document})
    if name.endswith(".jsonl") and isinstance(document, list):
        return "".join(json.dumps(line) + "\n" for line in document).encode()
    return json.dumps(document).encode()


DOCUMENTS = [(name, reader) for name, reader in READERS
             if name.endswith((".json", ".jsonl", ".pt"))
             or name in (LORA, "lora/diffusers.safetensors")]


def by_hypothesis(kind, times):
    """The settings of a test of so many cases, the same ones each time."""
    return settings(max_examples=CASES[kind] * times, derandomize=True, database=None,
                    deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("times", TIMES)
def test_odd_values(world, times):
    counts = Counter()

    @by_hypothesis("values", times)
    @given(st.data())
    def check(data):
        name, reader = data.draw(st.sampled_from(DOCUMENTS), "file")
        sound = world.sound[world.root / name]
        document = data.draw(altered(document_of(sound, name)), "what it says")
        counts[world.judge({name: content_of(document, name, sound)}, *reader)] += 1

    check()
    assert sum(counts.values()) >= CASES["values"] * times and counts[True] and counts[False]


@pytest.mark.parametrize("times", TIMES)
def test_odd_settings(world, times):
    counts, sound = Counter(), yaml.safe_load(to_yaml(Config(
        lora_rank=2, batch_size=1, mixed_precision="no")))

    @by_hypothesis("YAML", times)
    @given(altered({**sound, "more": [datetime.date(2026, 1, 1), b"x", {1, 2}]}) | altered(sound))
    def check(document):
        text = yaml.safe_dump(document).encode(errors="replace")
        counts[world.judge({"config.yaml": text}, *PREVIEW)] += 1

    check()
    assert sum(counts.values()) >= CASES["YAML"] * times and counts[True] and counts[False]


# ---------------------------------------------------------------- known faults, one by one


def png(width, height, *chunks) -> bytes:
    """A PNG of that size without pixels; chunks: (kind, content) before them."""
    whole = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks,
             (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)
        for kind, content in whole)


def array_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


EVIL = {"legacy": torch_bytes({"a": Evil()}, legacy=True), "plain": pickle.dumps(Evil()),
        "zip": torch_bytes({"a": Evil()}), "by name": torch_bytes({"a": EvilByName()})}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
KNOWN = [
    *((f"code, {name}, {how}", file, content) for how, content in EVIL.items()
      for name, file in (("adapter", "adapter.pth"), ("encoder", "base/uni/pytorch_model.bin"),
                         ("LoRA", "lora/authors.pth"), ("ckpt", "original.ckpt"),
                         ("state", STATE))),
    ("code, array", "arrays/a_uni.npy", array_bytes(np.array([Evil()], object))),
    *((f"YAML {name}", "config.yaml", text if isinstance(text, bytes) else text.encode())
      for name, text in {
        "code": "data: !!python/object/apply:os.system ['touch executed']",
        "code by name": "data: !!python/name:os.system", "laughs": LAUGHS,
        "deep": "data: " + "[" * 20000, "deep keys": "? " * 20000, "deep flow": "{a: " * 5000,
        "doubled key": "seed: 1\nseed: 2", "not a number": "learning_rate: .nan",
        "endless number": "learning_rate: .inf", "long number": "seed: " + "9" * 5000,
        "date": "seed: 2026-01-01", "set": "blocks: !!set {1, 2}", "binary": "data: !!binary aGk=",
        "two documents": "seed: 1\n---\nseed: 2", "keys of lists": "? [a, b]\n: 1",
        "anchor": "seed: *nowhere", "list": "- seed", "text": "seed",
        "NUL": b"seed: 1\0", "UTF-16 without mark": "seed: 1".encode("utf-16-le"),
        "Latin-1": "out: é".encode("latin-1"), "tag": "seed: !!int x", "base 60": "seed: 1:99:x",
        "control": b"data: \x07", "tab": "data:\t\t- x: y: z"}.items()),
    *((f"JSON {name}", CONFIG, text) for name, text in {
        "deep lists": b"[" * 10**6, "deep objects": b'{"a":' * 10**5, "empty": b"", "NUL": b"\0",
        "list": b"[]", "number": b"1", "long number": b'{"num_layers": ' + b"9" * 5000 + b"}",
        "mark": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"), "two": b"{}{}"}.items()),
    ("header of 2^63 bytes", LORA, (2**63).to_bytes(8, "little") + b"{}"),
    ("header of 2^40 bytes", LORA, (2**40).to_bytes(8, "little") + b"{}"),
    ("header of no bytes", LORA, bytes(8)),
    ("PNG bomb", TILE, png(60000, 60000)), ("PNG line", TILE, png(2**31 - 1, 1)),
    ("PNG without area", TILE, png(0, 0)), ("bomb among the drawn", DRAWN, png(60000, 60000)),
    ("text bomb", TILE, png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27))))),
    ("drawn, a list", DRAWN, png(8, 8, (b"tEXt", b"pixcell_min\0[]"))),
    ("drawn, deep", DRAWN, png(8, 8, (b"tEXt", b"pixcell_min\0" + b"[" * 10**5))),
    ("drawn, another arm", DRAWN, png(8, 8, (b"tEXt", b'pixcell_min\0{"arm": ["base"]}'))),
]


@pytest.mark.parametrize("name, file, content", KNOWN, ids=[name for name, _, _ in KNOWN])
def test_known_faults_are_refused(world, name, file, content):
    readers = [*READERS, ("config.yaml", PREVIEW), ("arrays/a_uni.npy", USE_ARRAYS)]
    for reader in [reader for its, reader in readers if its == file]:
        told_only = reader is DIAGNOSE or (file, reader) == (STATE, AUDIT)  # in the report
        assert world.judge({file: content}, *reader) == told_only


ODD_NAMES = ("a\nb.png", "-rf.png", "--steps.png", "\u202egnp.png", "%s{x}.png", "é.png", " .png",
             os.fsdecode(b"\xff.png"), "a" * 200 + ".png", "$(touch executed).png", "a\rb.TIFF")


def test_odd_names_of_tiles(world):
    """Broken tiles of odd names, links in a ring or to nowhere, a folder and a pipe as tiles."""
    folder = world.root / "odd" / "TUM"
    for words in ("--strict-data", "--no-strict-data"):
        folder.mkdir(parents=True)
        for name in ODD_NAMES:
            (folder / name).write_bytes(os.fsencode(name))
        (folder / "ring.png").symlink_to("ring.png")
        (folder / "nowhere.png").symlink_to("/nowhere")
        (folder / "around").symlink_to(folder.parent)
        (folder / "folder.png").mkdir()
        os.mkfifo(folder / "pipe.png")
        code, lines = run(train.main, ["--data", "odd", "--base", "base", "--out", "new", "--cache",
                                       "new-cache", words], world.root)
        skipped = len(ODD_NAMES) + 2 if words == "--no-strict-data" else 0
        assert code == 2 and len(lines) == skipped + 1, lines
        assert all(line.startswith("skipped odd/TUM/") for line in lines[:-1])
        assert all(line.isprintable() for line in lines)
        assert not {"new", "executed"} & {*os.listdir(world.root)}
        world.restore()


def test_a_process_of_its_own_says_one_line(world):
    """What libraries write past Python's stderr, their warnings too, is seen only so."""
    whole = io.BytesIO()
    Image.new("RGB", (64, 64)).save(whole, "TIFF")
    path = world.root / "a\nb.tif"
    path.write_bytes(whole.getvalue()[:100])  # its table of contents is cut: Pillow warns of it
    ended = subprocess.run([sys.executable, ROOT / "sample.py", "--image", path, "--base", "base"],
                           cwd=world.root, capture_output=True, text=True)
    world.restore()
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("sample.py: error: ") and "a\\nb.tif" in ended.stderr
