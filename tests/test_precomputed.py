"""precomputed.py: the authors' files are found, scaled as the VAE would, and refused in one line."""

import numpy as np
import pytest
import torch

from pixcell_min.base import load_pixcell_base
from pixcell_min.data import Tile
from pixcell_min.features import cached_features
from pixcell_min.precomputed import files_of, find_precomputed, read_precomputed

SCALE, SHIFT = 1.5305, 0.0609
SHAPES = (16, 4, 4), (2, 6)  # latents, embedding


def write(folder, name, seed=0, dtype=np.float16):
    """One tile's two files; → (latent moments, embedding)."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    moments = np.concatenate([chance.normal(size=(16, 4, 4)), chance.uniform(0, 1, (16, 4, 4))])
    embedding = chance.normal(size=(2, 6))
    arrays = moments.astype(dtype), embedding.astype(dtype)
    for ending, array in zip(("sd3_vae", "uni"), arrays):
        np.save(folder / f"{name}_{ending}.npy", array)
    return arrays


def read(folder, strict=False):
    lines = []
    parts = list(read_precomputed(find_precomputed(folder), *SHAPES, SCALE, SHIFT, strict, lines.append))
    return parts, lines


def test_files_are_found_at_any_depth_with_their_folder_as_class(tmp_path):
    for folder, name in ((".", "z"), ("brca/slide_2", "3_4"), ("brca/slide_1", "9_uni"), ("luad", "1")):
        write(tmp_path / folder, name)
    (tmp_path / "luad" / "1.jpeg").write_bytes(b"the image itself")
    tiles = find_precomputed(str(tmp_path))
    assert [(t.label, t.path.name) for t in tiles] == [
        (None, "z_sd3_vae.npy"), ("brca/slide_1", "9_uni_sd3_vae.npy"),
        ("brca/slide_2", "3_4_sd3_vae.npy"), ("luad", "1_sd3_vae.npy")]
    assert files_of(tiles[1])[1].name == "9_uni_uni.npy"
    assert all(path.is_file() for tile in tiles for path in files_of(tile))


def test_nothing_found(tmp_path):
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "no file in it ends in")):
        with pytest.raises(ValueError, match=words):
            find_precomputed(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_moments_are_split_scaled_and_widened(tmp_path, dtype):
    moments, embedding = write(tmp_path, "a", dtype=dtype)
    ((tiles, (mean, std, embeddings)),), lines = read(tmp_path)
    assert lines == [] and tiles == [Tile(tmp_path / "a_sd3_vae.npy")]
    assert (mean.shape, std.shape, embeddings.shape) == ((1, 16, 4, 4), (1, 16, 4, 4), (1, 2, 6))
    assert {mean.dtype, std.dtype, embeddings.dtype} == {torch.float32}
    exact = moments.astype(np.float64)
    np.testing.assert_allclose(mean[0], (exact[:16] - SHIFT) * SCALE, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std[0], exact[16:] * SCALE, rtol=1e-6)
    assert np.array_equal(embeddings[0], embedding.astype(np.float32))


def test_they_give_what_the_vae_itself_gives(tmp_path, tiny_base):
    """The authors' files hold moments as diffusers' posterior has them: before shift and scale."""
    vae = load_pixcell_base(tiny_base, "cpu", "no").vae
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, logvar = vae.encode(pixels)
        raw_mean, raw_logvar = vae.encoder(pixels).chunk(2, dim=1)
    moments = torch.cat([raw_mean, (0.5 * raw_logvar).exp()], dim=1)[0].numpy()
    write(tmp_path, "a")
    np.save(tmp_path / "a_sd3_vae.npy", moments)
    ((_, (read_mean, read_std, _)),), _ = read(tmp_path)
    torch.testing.assert_close(read_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read_std, (0.5 * logvar).exp(), rtol=1e-5, atol=1e-6)


def damaged(folder, kind):
    moments, embedding = write(folder, "a")
    latents, uni = folder / "a_sd3_vae.npy", folder / "a_uni.npy"
    if kind in ("no embedding", "no latents"):
        (uni if kind == "no embedding" else latents).unlink()
    elif kind == "cut":
        latents.write_bytes(latents.read_bytes()[:-10])
    elif kind == "no array":
        uni.write_bytes(b"PK\x03\x04 or anything")
    elif kind == "pickled":
        np.save(uni, np.array([{"code": 1}]), allow_pickle=True)
    elif kind == "integers":
        np.save(uni, embedding.astype(np.int32))
    elif kind == "NaN":
        embedding[1, 3] = np.nan
        np.save(uni, embedding)
    elif kind == "infinity":
        moments[20, 0, 0] = np.inf
        np.save(latents, moments)
    elif kind == "negative deviation":
        moments[20, 0, 0] = -1
        np.save(latents, moments)
    else:
        wrong = {"mean alone": (16, 4, 4), "latents of another size": (32, 8, 8),
                 "one token": (1, 6), "width": (2, 5), "flat": (12,)}[kind]
        np.save(latents if wrong[-1] in (4, 8) else uni, np.zeros(wrong, np.float16))


@pytest.mark.parametrize("kind, words", [
    ("no embedding", "a_uni.npy: no such file; a tile needs both"),
    ("no latents", "a_sd3_vae.npy: no such file; a tile needs both"),
    ("cut", "a_sd3_vae.npy: broken or not a NumPy array"),
    ("no array", "a_uni.npy: broken or not a NumPy array"),
    ("pickled", "a_uni.npy: broken or not a NumPy array"),
    ("integers", "a_uni.npy: holds int32, expected float16 or float32"),
    ("NaN", "a_uni.npy: holds NaN or infinity"),
    ("infinity", "a_sd3_vae.npy: holds NaN or infinity")])
def test_a_bad_tile_is_skipped_in_one_line_or_stops_a_strict_run(tmp_path, kind, words):
    write(tmp_path, "b", 1)
    damaged(tmp_path, kind)
    parts, lines = read(tmp_path)
    assert [tile.path.name for (tile,), _ in parts] == ["b_sd3_vae.npy"]
    assert len(lines) == 1 and words in lines[0] and "\n" not in lines[0]
    with pytest.raises(ValueError, match=words.split(":")[0]) as caught:
        read(tmp_path, strict=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, words", [
    ("mean alone", r"a_sd3_vae.npy: shape \(16, 4, 4\), expected \(32, 4, 4\)"),
    ("latents of another size", r"shape \(32, 8, 8\), expected \(32, 4, 4\)"),
    ("one token", r"a_uni.npy: shape \(1, 6\), expected \(2, 6\)"),
    ("width", r"shape \(2, 5\), expected"), ("flat", r"shape \(12,\), expected"),
    ("negative deviation", "negative deviations")])
def test_another_bases_files_stop_the_run_in_one_line(tmp_path, kind, words):
    damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_they_go_through_the_same_cache(tmp_path):
    """Read once; a change of either file is found; rows are those of the files."""
    for i in range(3):
        write(tmp_path / "files", str(i), i)
    tiles, lines, asked = find_precomputed(tmp_path / "files"), [], []

    def compute(missing):
        asked.append([tile.path.name[0] for tile in missing])
        return read_precomputed(missing, *SHAPES, SCALE, SHIFT, True, lines.append)

    def load():
        return cached_features(tmp_path / "cache", tiles, compute, settings={}, files_of=files_of,
                               report=lines.append)

    features = load()
    assert features.variants == 1 and features.tiles == tiles and features.mean.shape[0] == 3
    write(tmp_path / "other", "1", 9)
    (tmp_path / "files" / "1_uni.npy").write_bytes((tmp_path / "other" / "1_uni.npy").read_bytes())
    again = load()
    assert asked == [["0", "1", "2"], ["1"]] and "1 changed since" in lines[0]
    assert np.array_equal(again.embeddings[torch.tensor(1)],
                          np.load(tmp_path / "other" / "1_uni.npy").astype(np.float32))
