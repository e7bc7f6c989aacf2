"""PixCell-1024's layout end to end, at an eighth of its size: 128-px tiles of sixteen crops."""

import numpy as np
import pytest
import torch
from conftest import TINY_ENCODER, assert_same_weights, metrics, weights, write_base
from PIL import Image

import sample
import train
from pixcell_min.base import features_hash, load_encoder, load_pixcell_base
from pixcell_min.checkpoint import read_tensors
from pixcell_min.data import image_to_tensor, read_tile
from pixcell_min.features import encode_images
from pixcell_min.pipeline import PixCellPipeline, denoise
from pixcell_min.schedulers import build_scheduler
from pixcell_min.vae import AutoencoderKL

LAYOUT = {"sample_size": 16, "caption_num_tokens": 16, "interpolation_scale": 2}
SIDE = 128  # px
FUSED = 3  # grey levels of 255: W + s·B·A is rounded once, two products twice, over the steps


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "tiny-1024", **LAYOUT)


def write_tiles(folder, side=SIDE):
    """Six tiles, each of sixteen crops of another grey, under noise."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        greys = random.integers(0, 200, (4, 4)).repeat(side // 4, 0).repeat(side // 4, 1)
        pixels = greys[..., None] + random.integers(0, 56, (side, side, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def tiles(tmp_path):
    return write_tiles(tmp_path / "tiles")


@pytest.fixture
def arguments(base, tiles, tmp_path):
    return arguments_of(base, tiles, tmp_path)


def arguments_of(base, tiles, tmp_path):
    return ["--rank", "2", "--alpha", "4", "--base", str(base), "--data", str(tiles),
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--batch-size", "2",
            "--max-train-steps", "2", "--gradient-accumulation-steps", "1", "--no-dihedral",
            "--mixed-precision", "no", "--sample-count", "0", "--validation-fraction", "0.3",
            "--warmup-steps", "0", "--learning-rate", "0.05", "--save-every", "1",
            "--gradient-checkpointing"]


def test_tile_to_lora_to_image(arguments, base, tiles, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, "--sample-count", "1", "--guidance-scale", "1"]) == 0
    assert Image.open(run / "samples" / "grid.png").height > SIDE
    printed = capsys.readouterr().out
    assert "not adapted" not in printed  # with sixteen keys no query and no key is inert
    tensors = read_tensors(run / "lora_weights.safetensors")[0]
    assert sum("attn2.to_q" in key or "attn2.to_k" in key for key in tensors) == 2 * 2 * 2
    learned = {key for key, value in tensors.items() if "lora_B" in key and value.abs().max() > 0}
    assert len(learned) == 2 * 8  # two blocks: query, key, value and output of both attentions
    common = ["--image", str(tiles / "0.png"), "--run", str(run), "--steps", "2", "--device", "cpu",
              "--mixed-precision", "no", "--compare", "--out"]
    images = []
    for name, flags in (("active", []), ("merged", ["--fuse-lora"]), ("off", ["--lora-scale", "0"])):
        assert sample.main([*common, str(tmp_path / name), *flags]) == 0
        images.append(np.asarray(Image.open(tmp_path / name / "0_seed0.png")).astype(int))
    active, merged, off = images
    assert active.shape == (SIDE, SIDE, 3) and np.abs(active - merged).max() <= FUSED
    assert (active != off).any()


@pytest.mark.slow
def test_tiles_of_1024_pixels(tmp_path, monkeypatch):
    """The real size, a tiny network: sixteen crops of 256 px, checkpointing, decoding in parts."""
    base = write_base(tmp_path / "base", **{**LAYOUT, "sample_size": 128})
    tiles, parts = write_tiles(tmp_path / "tiles", 1024), []
    whole = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z: parts.append(z.shape) or whole(vae, z))
    assert train.main([*arguments_of(base, tiles, tmp_path), "--sample-count", "1"]) == 0
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)
    assert sample.main(["--image", str(tiles / "0.png"), "--run", str(tmp_path / "run"), "--steps", "2",
                        "--device", "cpu", "--mixed-precision", "no", "--out", str(tmp_path / "out")]) == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "0_seed0.png"))
    assert drawn.shape == (1024, 1024, 3) and drawn.std() > 0
    assert len(parts) > 3 and all(max(shape[2:]) <= 64 for shape in parts)  # three images, in parts


def test_the_second_run_reads_the_cache_and_learns_the_same(arguments, tmp_path, monkeypatch):
    assert train.main(arguments) == 0
    monkeypatch.setattr(train, "encode_images", lambda *_: pytest.fail("computed again"))
    assert train.main([*arguments, "--out", str(tmp_path / "again")]) == 0
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_checkpointing_and_a_stop_change_no_bit(arguments, tmp_path, monkeypatch):
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--no-gradient-checkpointing", "--out", str(tmp_path / "plain")]) == 0
    whole, original = weights(tmp_path / "run"), train.save_shared
    assert_same_weights(whole, weights(tmp_path / "plain"))

    def interrupt(*given):
        original(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_shared", interrupt)
    stopped = tmp_path / "stopped"
    assert train.main([*arguments, "--out", str(stopped)]) == 130
    monkeypatch.undo()
    assert {line["step"] for line in metrics(stopped)} == {0, 1}
    assert train.main(["--resume", "--out", str(stopped)]) == 0
    assert_same_weights(whole, weights(stopped))


def write_precomputed(folder, pipeline, paths, tokens=16):
    """The authors' two files of each tile: unscaled moments (32, 16, 16), embeddings (16, E)."""
    folder.mkdir()
    scale, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor
    for path in paths:
        mean, std, embedding = encode_images([read_tile(path)], pipeline.vae, pipeline.encoder)
        moments = torch.cat([mean / scale + shift, std / scale], 1)[0]
        np.save(folder / f"{path.stem}_sd3_vae.npy", moments.numpy())
        np.save(folder / f"{path.stem}_uni.npy", embedding[0, :tokens].numpy())


def test_precomputed_embeddings_must_be_sixteen(arguments, base, tiles, tmp_path, capsys):
    pipeline = load_pixcell_base(base, "cpu", "no")
    write_precomputed(tmp_path / "features", pipeline, sorted(tiles.glob("*.png")))
    data = arguments.index("--data")
    others = [*arguments[:data], *arguments[data + 2:], "--features", str(tmp_path / "features")]
    assert train.main(others) == 0
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)
    write_precomputed(tmp_path / "few", pipeline, sorted(tiles.glob("*.png")), tokens=1)
    others[-1] = str(tmp_path / "few")
    assert train.main([*others, "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("0_uni.npy: shape (1, 16), expected (16, 16) for this base")


def test_the_encoder_of_a_base_gives_the_tokens_it_takes(base, tiny_base, tiles):
    image = read_tile(tiles / "0.png")
    sixteen, one = load_encoder(base), load_encoder(tiny_base)
    embedding = sixteen(image)
    assert embedding.shape == (1, 16, TINY_ENCODER["embed_dim"]) and one(image).shape == (1, 1, 16)
    assert load_pixcell_base(base, "cpu").encoder(image).equal(embedding)


def test_a_cache_is_not_shared_by_bases_of_other_crops(base, tiny_base, tmp_path):
    # The same files of VAE and encoder, the same tile size: only the crops differ.
    four = write_base(tmp_path / "four", **{**LAYOUT, "caption_num_tokens": 4})
    one = write_base(tmp_path / "one", **{**LAYOUT, "caption_num_tokens": 1})
    for folder in (four, one):
        for part in ("vae", "uni"):
            for file in (base / part).iterdir():
                (folder / part / file.name).write_bytes(file.read_bytes())
    assert len({features_hash(folder) for folder in (base, four, one)}) == 3


@pytest.mark.parametrize("tokens", [1, 4, 15, 17])
def test_a_wrong_token_count_is_one_clear_line(base, tokens):
    pipeline = load_pixcell_base(base, "cpu", "no")
    with pytest.raises(ValueError, match=rf"^embedding must be \(B, 16, 16\), got \({tokens}, 16\)$"):
        pipeline(torch.zeros(tokens, 16))


def test_files_of_a_one_token_base_are_refused(arguments, tiny_base, base, tiles, tmp_path, capsys):
    assert train.main(arguments) == 0
    assert sample.main(["--image", str(tiles / "0.png"), "--run", str(tmp_path / "run"), "--base",
                        str(tiny_base), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "base" in error and not (tmp_path / "out").exists()


def test_every_token_moves_the_image_and_its_place_counts(base):
    pipeline = load_pixcell_base(base, "cpu", "no")
    tokens = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))

    def draw(condition):
        return denoise(pipeline.transformer, build_scheduler("ddim", pipeline.schedule), condition,
                       torch.Generator().manual_seed(0), num_inference_steps=2)

    expected = draw(tokens)
    for i in range(16):
        changed = tokens.clone()
        changed[:, i] += 1
        assert not torch.equal(draw(changed), expected), i
    # Attention does not see the order of its keys: without y_pos_embed this would be the same image.
    assert (draw(tokens.flip(1)) - expected).abs().max() > 1e-4
    pipeline.transformer.y_pos_embed.y_pos_embed.zero_()
    torch.testing.assert_close(draw(tokens.flip(1)), draw(tokens), atol=1e-5, rtol=0)


# The autoencoder at 1024 px

def test_large_tiles_are_encoded_one_by_one(monkeypatch):
    seen = []

    class VAE:
        def encode(self, pixels):
            seen.append(len(pixels))
            return pixels[:, :, ::8, ::8], pixels[:, :, ::8, ::8]

    images = [Image.fromarray(np.full((side, side, 3), i, np.uint8))
              for side in (520, 512) for i in range(4)]
    for group in (images[:4], images[4:]):
        mean = encode_images(group, VAE(), lambda its: torch.zeros(len(its), 16, 16))[0]
        assert torch.equal(mean, torch.stack([image_to_tensor(i) for i in group])[:, :, ::8, ::8])
    assert seen == [1, 1, 1, 1, 4]


def test_a_1024_px_image_is_decoded_in_parts(base, monkeypatch):
    pipeline: PixCellPipeline = load_pixcell_base(base, "cpu", "no")
    sizes, decode = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, latents: sizes.append(
        tuple(latents.shape[2:])) or decode(self, latents))
    image = pipeline.decode(torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(0)))
    assert image.size == (1024, 1024) and set(sizes) == {(64, 64)} and len(sizes) == 9
