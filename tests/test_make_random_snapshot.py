"""tools/make_random_snapshot.py: names, shapes and files as released; finite; the same by seed."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY_ENCODER, TINY_TRANSFORMER, TINY_VAE
from safetensors import safe_open

from pixcell_min.base import load_encoder, load_pixcell_base
from pixcell_min.checkpoint import file_hash, read_tensors
from pixcell_min.tools import make_random_snapshot as module
from pixcell_min.tools.make_random_snapshot import (TRANSFORMERS, main, random_tensor,
                                                    write_snapshot)
from pixcell_min.transformer import FIXED, TransformerConfig
from pixcell_min.uni import TileEncoder
from pixcell_min.vae import AutoencoderKL, VAEConfig

DATA = Path(__file__).parent / "data"
WEIGHTS = ("tiny/transformer/diffusion_pytorch_model.safetensors",
           "sd3-vae/diffusion_pytorch_model.safetensors", "uni2-h/pytorch_model.bin")
TINY = (TransformerConfig.from_dict({**TINY_TRANSFORMER, "sample_size": 16, "caption_num_tokens": 16}),
        VAEConfig.from_dict(TINY_VAE), TINY_ENCODER)


def hashes(folder):
    return [file_hash(folder / name) for name in WEIGHTS]


@pytest.mark.parametrize("name, parameters", [("pixcell-256", 608_074_496), ("pixcell-1024", 608_122_112)])
def test_a_full_snapshot_has_the_released_names_shapes_and_sizes(
        tmp_path, name, parameters, monkeypatch, capsys):
    # Full-size files are 5.5 GB: all of them is checked here but the numbers.
    written = {}

    def note(like, dtype, seed, label, path):
        written[label if "model" not in label or label.endswith(".bin") else len(written)] = like
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(module, "write_safetensors", note)
    monkeypatch.setattr(module, "write_pickle", note)
    assert main([name, str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"random weights; use them with --base {tmp_path / name}\n"
    for like, released in zip(written.values(), (name, "sd3-vae", "uni2-h"), strict=True):
        rows = [row.split("\t") for row in (DATA / f"{released}.tsv").read_text().splitlines()[1:]]
        expected = {key: tuple(int(n) for n in shape.split(",")) for key, shape in rows}
        assert {key: tuple(tensor.shape) for key, tensor in like.items()} == expected
    assert sum(tensor.numel() for tensor in next(iter(written.values())).values()) == parameters
    config = json.loads((tmp_path / name / "transformer" / "config.json").read_text())
    assert FIXED.items() <= config.items() and TransformerConfig.from_dict(config) == TRANSFORMERS[name]
    assert "model_args" not in json.loads((tmp_path / "uni2-h" / "config.json").read_text())
    assert not list(tmp_path.glob("*/vae/*.safetensors"))  # a snapshot brings the config alone


def test_sizes_of_pixcell_1024():
    assert (TRANSFORMERS["pixcell-1024"].sample_size, TRANSFORMERS["pixcell-1024"].caption_num_tokens,
            TRANSFORMERS["pixcell-1024"].interpolation_scale) == (128, 16, 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_snapshot_loads_and_draws_something_finite(tmp_path, dtype):
    base = write_snapshot(tmp_path, "tiny", *TINY, dtype)
    assert base == tmp_path / "tiny"
    for name in WEIGHTS:
        assert {t.dtype for t in read_tensors(tmp_path / name)[0].values()} == {getattr(torch, dtype)}
    pipeline = load_pixcell_base(base, "cpu", "no")
    embedding = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    image = pipeline(embedding, num_inference_steps=2).images[0]
    assert image.size == (128, 128) and image.getextrema()[0][0] < image.getextrema()[0][1]
    encoded = load_encoder(base)([image, image.rotate(90)])
    assert encoded.shape == (2, 16, 16) and encoded.isfinite().all() and encoded.std() > 0.1
    assert {p.name for p in tmp_path.rglob(".*")} == set()  # no temporary file stays


def test_activations_keep_their_size_at_the_full_depth_of_uni2h(tmp_path):
    sizes = {**TINY_ENCODER, "depth": 24}
    write_snapshot(tmp_path, "tiny", *TINY[:2], sizes)
    encoder = TileEncoder.from_pretrained(tmp_path / "uni2-h")
    encoded = encoder(torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert encoded.isfinite().all() and 0.1 < encoded.std() < 10


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_snapshot(tmp_path / name, "tiny", *TINY, seed=seed)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert not set(hashes(tmp_path / "a")) & set(hashes(tmp_path / "c"))


def test_numbers_by_name_and_place():
    meta = torch.empty(300, 400, device="meta")
    drawn = random_tensor("w", meta, 0)
    assert drawn.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert not torch.equal(drawn, random_tensor("v", meta, 0))
    assert torch.equal(random_tensor("norm.weight", meta[0], 0), torch.ones(400))
    assert random_tensor("bias", meta[0], 0).std().item() == pytest.approx(0.02, rel=0.2)
    known = torch.rand(1, 16, 8)
    assert torch.equal(random_tensor("y_pos_embed", known, 0), known)


def test_formats_are_the_released_ones(tmp_path):
    write_snapshot(tmp_path, "tiny", *TINY)
    with safe_open(tmp_path / WEIGHTS[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / WEIGHTS[0]).read_bytes()[:8], "little") % 8 == 0
    with zipfile.ZipFile(tmp_path / WEIGHTS[2]) as archive:  # one record for each tensor, of its size
        records = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    sizes = [tensor.nbytes for tensor in read_tensors(tmp_path / WEIGHTS[2])[0].values()]
    assert sorted(records) == sorted(sizes)


def test_weights_that_are_there_are_kept(tmp_path, capsys):
    write_snapshot(tmp_path, "tiny", *TINY)
    before = hashes(tmp_path)
    config = tmp_path / "uni2-h" / "config.json"
    config.write_text("mine")
    write_snapshot(tmp_path, "other", *TINY, seed=1)
    assert hashes(tmp_path) == before and config.read_text() == "mine"
    kept = [f"kept: {tmp_path / name}" for name in WEIGHTS[1:]]
    assert capsys.readouterr().out.splitlines() == kept
    assert file_hash(tmp_path / WEIGHTS[0].replace("tiny", "other")) != before[0]


def test_a_stop_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    calls, original = [], module.random_tensor

    def stop(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(module, "random_tensor", stop)
    assert main(["pixcell-256", str(tmp_path)]) == 130
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"] * 3


@pytest.mark.parametrize("flags", [["pixcell-512"], ["pixcell-256", "--dtype", "int8"],
                                   ["pixcell-256", "--seed", "-1"]])
def test_wrong_words_are_one_line(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([flags[0], str(tmp_path), *flags[1:]])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["pixcell-256", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_vae_stays_finite(tmp_path):
    write_snapshot(tmp_path, "tiny", *TINY)
    folder = tmp_path / "tiny" / "vae"
    vae = AutoencoderKL.from_pretrained(folder, tmp_path / WEIGHTS[1])
    mean, logvar = vae.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert mean.isfinite().all() and logvar.isfinite().all() and vae.decode(mean).isfinite().all()
