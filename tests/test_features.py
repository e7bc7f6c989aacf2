"""features.py: encoding, the cache of shards and all that can befall it, gathering rows."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixcell_min
from pixcell_min import features as module
from pixcell_min.base import load_pixcell_base
from pixcell_min.checkpoint import read_tensors
from pixcell_min.data import Tile, find_tiles, image_to_tensor, load_tiles, read_tile
from pixcell_min.features import (DIHEDRAL, ENCODE_BATCH, Features, Rows, cached_features,
                                  cached_images, encode_images, encode_tiles)

ROOT = Path(pixcell_min.__file__).parent.parent
MAX_GROWTH = 300  # MB of memory that is not page cache, from 1,000 to 20,000 tiles


def noise_image(height=12, width=12, seed=0):
    """A tile without any symmetry."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


class StubVAE:
    """Latents that show which pixels came in: means of 4×4 patches; std exactly 0.2."""

    def encode(self, pixels):
        assert pixels.dtype == torch.float32 and pixels.abs().max() <= 1
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        return mean, torch.full_like(mean, 2 * np.log(0.2))


class StubEncoder:
    """Embeddings that show which images came in: the top left pixel; counts its calls."""

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        return torch.tensor([[image.getpixel((0, 0))] for image in images], dtype=torch.float64)


def encode_all(images, vae, encoder, batch_size, dihedral=False):
    """(mean, std, embeddings) of a list of images, straight through."""
    parts = encode_tiles(enumerate(images), lambda batch: encode_images(batch, vae, encoder),
                         batch_size, dihedral)
    return tuple(torch.cat(column) for column in zip(*(part for _, part in parts)))


# ---------------------------------------------------------------------------------- encode

def test_encode_values_dtype_and_batches():
    images, encoder = [noise_image(seed=s) for s in range(5)], StubEncoder()
    mean, std, embeddings = encode_all(images, StubVAE(), encoder, 2)
    assert encoder.batches == [2, 2, 1]
    assert mean.shape == std.shape == (5, 3, 3, 3) and embeddings.shape == (5, 1, 3)
    assert {mean.dtype, std.dtype, embeddings.dtype} == {torch.float32}
    for row, image in enumerate(images):
        assert torch.equal(mean[row], StubVAE().encode(image_to_tensor(image)[None])[0][0])
        assert embeddings[row, 0].tolist() == list(image.getpixel((0, 0)))
    torch.testing.assert_close(std, torch.full_like(std, 0.2))


def test_encode_dihedral_rows_show_the_same_turn_to_both():
    images = [noise_image(seed=s) for s in range(2)]
    mean, _, embeddings = encode_all(images, StubVAE(), StubEncoder(), 3, dihedral=True)
    assert len(mean) == 16 and DIHEDRAL[0] is None
    for tile in range(2):
        rows = range(tile * 8, tile * 8 + 8)
        assert torch.equal(mean[rows[0]], encode_all([images[tile]], StubVAE(), StubEncoder(), 1)[0][0])
        assert len({tuple(mean[row].flatten().tolist()) for row in rows}) == 8
        # the eight of the group: turned latents, mirrored or not
        turned = [torch.rot90(m, k, (1, 2)) for m in (mean[rows[0]], mean[rows[0]].flip(2)) for k in range(4)]
        for row, turn in zip(rows, DIHEDRAL, strict=True):
            # tolerance: a pooled sum is taken in another order when the tile is turned
            assert any(torch.allclose(mean[row], t, atol=1e-6) for t in turned)
            seen = images[tile] if turn is None else images[tile].transpose(turn)
            assert embeddings[row, 0].tolist() == list(seen.getpixel((0, 0)))
            assert torch.equal(mean[row], StubVAE().encode(image_to_tensor(seen)[None])[0][0])


def test_encode_makes_no_graph_yet_serves_one():
    class Trainable(StubVAE):
        def encode(self, pixels):
            return super().encode(pixels * torch.ones(1, requires_grad=True))

    mean, _, _ = encode_images([noise_image()], Trainable(), StubEncoder())
    assert not mean.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (weight * mean).sum().backward()
    assert torch.allclose(weight.grad, mean.sum())


@pytest.mark.parametrize("batch_size, dihedral, ends", [
    (2, False, [2, 4, 6, 7]), (4, True, [1, 2, 3, 4, 5, 6, 7]), (3, True, [3, 6, 7]),
    (16, True, [2, 4, 6, 7])])
def test_parts_end_where_a_batch_and_a_tile_end(batch_size, dihedral, ends):
    """So a run that goes on behind any part fills the batches that an unbroken run would fill."""
    encoder, seen, tiles = StubEncoder(), [], []
    images = [noise_image(seed=s) for s in range(7)]
    for part_tiles, part in encode_tiles(
            enumerate(images), lambda batch: encode_images(batch, StubVAE(), encoder), batch_size,
            dihedral):
        tiles += part_tiles
        seen.append(len(tiles))
        assert len(part[0]) == len(part_tiles) * (8 if dihedral else 1)
        assert all(size == batch_size for size in encoder.batches) or len(tiles) == 7
    assert seen == ends and tiles == list(range(7))


def test_encode_holds_no_more_than_a_batch():
    alive, seen = [], []

    def images():
        for i in range(6):
            alive.append(None)
            yield i, noise_image()

    def encode(batch):
        assert len(alive) <= 2 * (1 + len(seen))
        seen.append(len(batch))
        return encode_images(batch, StubVAE(), StubEncoder())

    assert len(list(encode_tiles(images(), encode, 2))) == 3 and seen == [2, 2, 2]


@pytest.mark.parametrize("where", ["mean", "logvar", "embedding"])
def test_encode_refuses_what_is_not_finite(where):
    class Broken(StubVAE):
        def encode(self, pixels):
            mean, logvar = super().encode(pixels)
            factor, term = {"mean": torch.nan}.get(where, 1), {"logvar": 1e5}.get(where, 0)
            return mean * factor, logvar + term

    def encoder(images):
        return torch.full((len(images), 1, 3), torch.inf if where == "embedding" else 0.0)

    with pytest.raises(ValueError, match="not finite"):
        encode_images([noise_image()], Broken(), encoder)


# ----------------------------------------------------------------------------------- cache

class Cache:
    """`cached_features` with settings that a test changes one at a time."""

    def __init__(self, folder, tiles):
        self.folder, self.tiles, self.lines = folder, tiles, []

    def __call__(self, tiles=None, *, dihedral=False, strict=False, batch_size=2, workers=2,
                 size=12, how="pad", base="base"):
        """(features, number of tiles encoded)"""
        encoder = StubEncoder()

        def compute(missing):
            return encode_tiles(
                load_tiles(missing, size, how, strict, self.lines.append, workers),
                lambda images: encode_images(images, StubVAE(), encoder), batch_size, dihedral)

        features = cached_features(
            self.folder, tiles or self.tiles, compute, report=self.lines.append, workers=workers,
            settings={"base": base, "size": size, "tile_fit": how, "dihedral": dihedral})
        return features, sum(encoder.batches) // (8 if dihedral else 1)

    def files(self):
        return sorted(self.folder.rglob("shard-*"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two classes of 3 and 2 readable tiles; every batch of two tiles makes a shard."""
    root = tmp_path / "tiles"
    for number, name in enumerate(["A/0.png", "A/1.tif", "A/2.bmp", "B/3.png", "B/4.webp"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed=number).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    return Cache(tmp_path / "deep" / "cache", find_tiles(root))


def assert_same(first, second):
    rows = torch.arange(len(first.mean))
    for name in module.NAMES:
        assert torch.equal(getattr(first, name)[rows], getattr(second, name)[rows]), name
    assert first.tiles == second.tiles


@pytest.mark.parametrize("dihedral", [False, True])
def test_cache_computes_once(cache, dihedral):
    first, count = cache(dihedral=dihedral)
    second, count_again = cache(dihedral=dihedral)
    assert (count, count_again) == (5, 0) and cache.lines == []
    assert_same(first, second)
    assert second.variants == (8 if dihedral else 1) and second.tiles == cache.tiles
    direct = encode_all([read_tile(t.path) for t in cache.tiles], StubVAE(), StubEncoder(), 64,
                        dihedral=dihedral)
    assert_same(first, Features(*direct, tiles=cache.tiles))
    assert all(getattr(first, n).shape == d.shape for n, d in zip(module.NAMES, direct))
    assert len(cache.files()) == (5 if dihedral else 3)
    left = {path.name for path in cache.folder.rglob("*") if path.is_file()}
    assert left == {"settings.json", *(path.name for path in cache.files())}  # nothing temporary
    assert first.nbytes == sum(d.nbytes for d in direct)


def test_shards_are_read_by_mapping(cache):
    features, _ = cache()
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in cache.files())
    assert all(shard.data_ptr() for shard in features.mean.shards)


def test_a_change_of_settings_makes_a_cache_of_its_own(cache):
    cache()
    for change in ({"base": "other"}, {"size": 16}, {"how": "resize"}, {"dihedral": True}):
        assert cache(**change)[1] == 5, change
        assert cache(**change)[1] == 0, change
    for same in ({"batch_size": 5}, {"strict": True}, {"workers": 1}, {"tiles": cache.tiles[::-1]},
                 {"tiles": cache.tiles[2:4]}):
        assert cache(**same)[1] == 0, same
    assert cache.lines == []
    settings = [json.loads(p.read_text()) for p in cache.folder.glob("features-*/settings.json")]
    assert {"base": "other", "size": 12, "tile_fit": "pad", "dihedral": False} in settings
    assert len(settings) == 5


def images_cached(cache, folder, tiles=None, *, vae=None, encoder=None, size=12, dihedral=False,
                  **options):
    """`cached_images` as train.py calls it."""
    return cached_images(
        cache.folder / folder, tiles or cache.tiles,
        lambda images: encode_images(images, vae or StubVAE(), encoder or StubEncoder()),
        base_hash="base", size=size, how="pad", dihedral=dihedral, strict=True,
        report=cache.lines.append, **options)


@pytest.mark.parametrize("dihedral", [False, True])
def test_images_are_encoded_in_full_batches_of_one_size(cache, dihedral):
    encoder = StubEncoder()
    features = images_cached(cache, "a", encoder=encoder, dihedral=dihedral)
    assert encoder.batches == [ENCODE_BATCH] * (10 if dihedral else 2) and ENCODE_BATCH == 4
    direct = encode_all([read_tile(t.path) for t in cache.tiles], StubVAE(), StubEncoder(), 64,
                        dihedral=dihedral)
    assert_same(features, Features(*direct, tiles=cache.tiles))


@pytest.mark.parametrize("dihedral", [False, True])
def test_features_have_the_same_bits_whatever_was_encoded_beside_them(cache, tiny_base, dihedral):
    """Real networks: five tiles at once, in another order, and one by one with others added."""
    pipeline = load_pixcell_base(tiny_base, "cpu", "no")
    options = {"vae": pipeline.vae, "encoder": pipeline.encoder, "size": 64, "dihedral": dihedral}
    whole = images_cached(cache, "whole", **options)
    images_cached(cache, "turned", cache.tiles[::-1], **options)
    for count in (1, 3):
        images_cached(cache, "grown", cache.tiles[:count], **options)
    for folder in ("turned", "grown"):
        assert_same(whole, images_cached(cache, folder, **options))


def test_another_type_of_device_has_a_cache_of_its_own(cache):
    for device, folders in (("cpu", 1), (torch.device("cpu"), 1), ("cuda", 2), ("cuda:1", 2)):
        images_cached(cache, "a", device=device)
        assert len(list((cache.folder / "a").glob("features-*"))) == folders, device


def test_a_subset_and_another_order_give_the_rows_of_their_tiles(cache):
    whole, _ = cache()
    for tiles in (cache.tiles[::-1], cache.tiles[3:], [cache.tiles[i] for i in (4, 0, 2)]):
        part, _ = cache(tiles=tiles)
        assert part.tiles == tiles
        assert torch.equal(part.mean[torch.arange(len(tiles))], whole.mean[whole.rows(tiles)])


def test_added_tiles_alone_are_computed(cache):
    before, _ = cache()
    path = cache.tiles[0].path.with_name("new.png")
    noise_image(seed=50).save(path)
    tiles = [*cache.tiles[:2], Tile(path, "A"), *cache.tiles[2:]]
    features, count = cache(tiles)
    assert count == 1 and features.tiles == tiles
    assert cache.lines == [
        "features: 5 of 6 tiles are in the cache; to compute: 1, of which 0 changed since"]
    rows = features.rows(cache.tiles)
    assert torch.equal(features.mean[rows], before.mean[torch.arange(5)])
    assert features.embeddings[torch.tensor(2)][0].tolist() == list(
        noise_image(seed=50).getpixel((0, 0)))


def test_changed_tiles_are_found_counted_and_computed(cache):
    cache()
    for index in (1, 4):
        path = cache.tiles[index].path
        options = {"lossless": True} if path.suffix == ".webp" else {}
        noise_image(seed=90 + index).save(path, **options)
    features, count = cache()
    assert count == 2 and cache.lines == [
        "features: 3 of 5 tiles are in the cache; to compute: 2, of which 2 changed since"]
    for index, seed in enumerate((0, 91, 2, 3, 94)):
        assert features.embeddings[torch.tensor(index)][0].tolist() == list(
            noise_image(seed=seed).getpixel((0, 0)))
    assert cache()[1] == 0


@pytest.mark.parametrize("dihedral", [False, True])
@pytest.mark.parametrize("index", [1, 4])
def test_a_tile_rewritten_while_others_are_encoded_is_not_stored_under_its_old_bytes(
        cache, monkeypatch, index, dihedral):
    """A copy of its old bytes, for which it was to stand (of equals the last is read), stays."""
    path = cache.tiles[index].path
    copy = Tile(path.with_name(f"copy_{path.name}"), cache.tiles[index].label)
    copy.path.write_bytes(path.read_bytes())
    options = {"lossless": True} if path.suffix == ".webp" else {}
    tiles, original, calls = [copy, *cache.tiles], encode_images, []

    def encode(*args):
        calls.append(1)
        if len(calls) == 1:
            noise_image(seed=70).save(path, **options)
        return original(*args)

    monkeypatch.setitem(globals(), "encode_images", encode)
    features, _ = cache(tiles, workers=1, dihedral=dihedral)
    seeds = [index] + [70 if i == index else i for i in range(5)]
    expected = [list(noise_image(seed=seed).getpixel((0, 0))) for seed in seeds]
    assert features.tiles == tiles
    assert features.embeddings[features.rows(tiles)][:, 0].tolist() == expected
    again, count = cache(tiles, dihedral=dihedral)
    assert count == 0 and again.embeddings[again.rows(tiles)][:, 0].tolist() == expected


def test_a_rewritten_tile_is_named_and_computed_again(cache, monkeypatch):
    path, original, calls = cache.tiles[0].path, encode_images, []

    def encode(*args):
        calls.append(1)
        if len(calls) == 1:
            noise_image(seed=70).save(path)
        return original(*args)

    monkeypatch.setitem(globals(), "encode_images", encode)
    assert cache(strict=True)[1] == 6
    assert cache.lines == [
        f"features: 1 tiles were rewritten while they were computed, {path} the first; "
        "they are computed again",
        "features: 4 of 5 tiles are in the cache; to compute: 1, of which 0 changed since"]


def test_a_tile_that_is_rewritten_all_the_time_is_one_line(cache, monkeypatch):
    path, original, calls = cache.tiles[0].path, encode_images, []

    def encode(*args):
        calls.append(1)
        noise_image(seed=70 + len(calls)).save(path)
        return original(*args)

    monkeypatch.setitem(globals(), "encode_images", encode)
    with pytest.raises(ValueError, match="0.png: rewritten each time it was computed") as caught:
        cache()
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert cache()[1] == 1  # what was at rest is kept


def test_a_renamed_file_and_a_copy_are_found(cache):
    cache()
    tile = cache.tiles[0]
    renamed = Tile(tile.path.rename(tile.path.with_name("0_renamed.png")), "A")
    copy = Tile(tile.path.with_name("copy.png"), "A")
    copy.path.write_bytes(renamed.path.read_bytes())
    features, count = cache([renamed, copy, *cache.tiles[1:]])
    assert count == 0 and features.tiles[:2] == [renamed, copy] and cache.lines == []
    assert torch.equal(features.mean[torch.tensor(0)], features.mean[torch.tensor(1)])


@pytest.mark.parametrize("damage", [
    "cut", "flip", "empty", "other key", "no header", "flipped header", "tensor missing"])
def test_a_damaged_shard_is_found_named_and_rebuilt(cache, damage):
    first, _ = cache()
    path = cache.files()[0]
    tiles_of_the_shard = len(read_tensors(path)[0]["mean"])
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "flipped header":
        content[content.index(b"checksum") + 14] ^= 1
    elif damage == "other key":
        cache(base="other")
        content = next(p for p in cache.files() if p.name == path.name and p != path).read_bytes()
    elif damage == "no header":
        content = bytearray(b"\2" + bytes(7) + b"{}")
    elif damage == "tensor missing":
        content = content.replace(b'"std"', b'"stp"')
    path.unlink()  # `first` still maps the old bytes
    path.write_bytes(content[:-40] if damage == "cut" else b"" if damage == "empty" else content)
    again, count = cache()
    assert count == tiles_of_the_shard and len(cache.lines) == 2
    assert str(path) in cache.lines[0] and "its tiles are computed again" in cache.lines[0]
    assert not any("\n" in line for line in cache.lines) and " 0 changed since" in cache.lines[1]
    assert_same(first, again)
    assert cache()[1] == 0 and len(cache.lines) == 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("torn", [slice(-40), slice(0), slice(60, None)])
def test_a_shard_that_cannot_be_read_back_stops_the_run_in_one_line(
        cache, monkeypatch, strict, torn):
    """A disk that loses what it took: no tile is dropped as if it were unreadable itself."""
    original = module.save_tensors

    def lose(path, *args):
        original(path, *args)
        if not lost:
            lost.append(path)
            path.write_bytes(path.read_bytes()[torn])

    lost = []
    monkeypatch.setattr(module, "save_tensors", lose)
    with pytest.raises(ValueError, match="just after it was written") as caught:
        cache(strict=strict)
    assert str(lost[0]) in str(caught.value) and "\n" not in str(caught.value)
    assert cache.lines == []
    features, count = cache(strict=strict)
    assert count == 2 and features.tiles == cache.tiles  # the others were kept


def test_unreadable_tiles_are_named_each_time_and_keep_no_others(cache):
    bad = cache.tiles[1]
    bad.path.write_bytes(b"broken")
    kept = [t for t in cache.tiles if t != bad]
    first, count = cache()
    assert first.tiles == kept and count == 4
    assert str(bad.path) in cache.lines[0]
    assert cache.lines[1] == "1 of 5 tiles could not be read and were skipped"
    second, count = cache()
    assert count == 0 and str(bad.path) in cache.lines[-2]
    assert_same(first, second)
    with pytest.raises(ValueError, match="1.tif"):
        cache(strict=True)


def test_a_dangling_link_is_skipped_until_it_can_be_read(cache):
    kept, there = cache.tiles[0].path, cache.tiles[0].path.with_name("away.png")
    there.write_bytes(kept.read_bytes())
    kept.unlink()
    kept.symlink_to("nowhere.png")
    assert cache()[0].tiles == cache.tiles[1:]
    kept.unlink()
    kept.symlink_to(there)
    features, count = cache()
    assert count == 1 and features.tiles == cache.tiles


def test_nothing_readable_is_an_error_and_leaves_no_shard(cache):
    for tile in cache.tiles:
        tile.path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable tile: 5 of 5 files failed"):
        cache()
    assert cache.files() == []


def test_an_impossible_folder_is_said_before_anything_is_computed(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    cache.folder = tmp_path / "file" / "cache"
    monkeypatch.setattr(module, "encode_images", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match="cannot be written") as caught:
        cache()
    assert "\n" not in str(caught.value)


def test_a_read_only_cache_serves_what_it_has(cache, monkeypatch):
    first, _ = cache()
    for name in ("write_text", "save_tensors"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("written"))
    assert_same(first, cache()[0])


def test_a_full_disk_is_one_line_and_finished_shards_stay(cache, monkeypatch):
    """A limit on file size stands in for the full disk: the write itself fails, as there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, calls = encode_images, []

    def fill_the_disk(*args):
        calls.append(1)
        if len(calls) == 3:  # two shards of two tiles are written
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        return original(*args)

    monkeypatch.setitem(globals(), "encode_images", fill_the_disk)
    try:
        with pytest.raises(ValueError, match="cannot be written.*free space") as caught:
            cache()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and len(cache.files()) == 2
    assert not [path for path in cache.folder.rglob("*") if path.suffix == ".tmp"]
    assert cache()[1] == 1  # the rest


def test_an_interrupt_keeps_every_finished_tile(cache, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 2**30)
    original, calls = module.encode_images, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setitem(globals(), "encode_images", stop)
    with pytest.raises(KeyboardInterrupt):
        cache()
    monkeypatch.undo()
    assert cache()[1] == 1


def interrupted_at(line, action):
    """Whether Ctrl-C at the line-th line that `_write_shards` runs came before it had ended."""
    left = line

    def count(frame, event, _):
        nonlocal left
        left -= event == "line"
        if left == 0:
            left -= 1
            raise KeyboardInterrupt
        return count

    def enter(frame, event, _):
        return count if frame.f_code is module._write_shards.__code__ else None

    before = sys.gettrace()  # of pytest --cov
    sys.settrace(enter)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_leaves_whole_shards(cache, tmp_path, monkeypatch):
    """Of the loop that gathers and writes; two parts make a shard."""
    whole, _ = cache()
    monkeypatch.setattr(module, "SHARD_BYTES", 4 * 4 * (2 * 27 + 3))
    for line in range(1, 200):
        cache.folder = tmp_path / f"line{line}"
        if not interrupted_at(line, cache):
            break
        left = sum(len(read_tensors(path)[0]["mean"]) for path in cache.files())
        features, count = cache()
        assert_same(features, whole)
        assert count == 5 - left
    assert line > 20 and not any("damaged" in line for line in cache.lines)


def test_unfinished_files_of_killed_runs_are_removed_when_old(cache):
    cache(cache.tiles[:2])
    folder = cache.files()[0].parent
    for name, age in ((".shard-1.safetensors.a.tmp", 2 * module.LEFT_OVER), (".b.tmp", 0)):
        (folder / name).write_bytes(b"torn")
        os.utime(folder / name, (time.time() - age,) * 2)
    cache()
    assert sorted(path.name for path in folder.glob(".*")) == [".b.tmp"]


KILLED = """
import sys, torch
sys.path.insert(0, "tests")
from test_features import cache_of_a_base
torch.set_num_threads(int(sys.argv[4]))
cache_of_a_base(*sys.argv[1:4])
"""


def cache_of_a_base(base, folder, cache):
    """(features, images encoded), real networks; 24 images are 3 tiles in batches of 3: a shard."""
    module.SHARD_BYTES = 1
    pipeline, batches = load_pixcell_base(base, "cpu", "no"), []

    def encode(images):
        batches.append(len(images))
        return encode_images(images, pipeline.vae, pipeline.encoder)

    def compute(tiles):
        return encode_tiles(load_tiles(tiles, 64, "pad", True, print, 2), encode, 3, dihedral=True)

    features = cached_features(cache, find_tiles(folder), compute, settings={}, report=print)
    return features, sum(batches)


def test_a_killed_run_goes_on_from_its_shards_and_ends_with_the_same_bits(
        tiny_base, tmp_path, monkeypatch):
    """SIGKILL, twice, at a random moment; batches of 3 do not fit the 8 variants."""
    monkeypatch.setattr(module, "SHARD_BYTES", 1)  # to be put back afterwards
    (tmp_path / "tiles").mkdir()
    for i in range(60):
        noise_image(64, 64, seed=i).save(tmp_path / "tiles" / f"{i:02}.png")
    arguments = [tiny_base, tmp_path / "tiles", tmp_path / "killed"]
    chance = random.Random(0)
    for wanted in (2, 5):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments, str(torch.get_num_threads())], cwd=ROOT,
            stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
        while run.poll() is None and len(list(tmp_path.glob("killed/*/shard-*"))) < wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        run.kill()
        assert run.wait() == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/*/shard-*")}
    assert 5 <= len(written) < 20
    features, count = cache_of_a_base(*arguments)
    assert count == 24 * (20 - len(written))
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    whole, count = cache_of_a_base(*arguments[:2], tmp_path / "whole")
    assert count == 480
    assert_same(features, whole)


# -------------------------------------------------------------------------------- features

def made_features(variants, num_tiles=3):
    count = num_tiles * variants
    mean = torch.arange(count * 8.0).reshape(count, 2, 2, 2)
    tiles = [Tile(Path(f"{i}.png")) for i in range(num_tiles)]
    return Features(mean, torch.rand(mean.shape), torch.rand(count, 1, 4), tiles)


def test_rows_over_shards_are_rows_of_the_whole():
    whole = torch.rand(15, 2, 3)  # 5 tiles in 3 variants
    parts = whole.unflatten(0, (5, 3))
    shards, places = [parts[[4, 1]], parts[[0]], parts[[3, 2]]], [(1, 0), (0, 1), (2, 1), (2, 0), (0, 0)]
    rows = Rows(shards, places)
    assert rows.shape == whole.shape and len(rows) == 15
    for index in (torch.tensor([14, 0, 7, 7]), torch.tensor(4), torch.arange(15), torch.tensor([[1], [2]])):
        assert torch.equal(rows[index], whole[index])
    rows[torch.tensor([3])].zero_()
    assert torch.equal(rows[torch.arange(15)], whole)  # what is handed out is a copy
    with pytest.raises(IndexError):
        rows[torch.tensor([15])]


def test_features_rows_and_variants():
    features = made_features(8)
    rows = features.rows([features.tiles[2], features.tiles[0]])
    assert rows.tolist() == [16, 0] and rows.dtype == torch.int64
    drawn = features.draw_variants(rows.repeat(400), torch.Generator().manual_seed(0))
    counts = Counter(drawn.tolist())
    assert set(counts) == {*range(8), *range(16, 24)}
    assert min(counts.values()) > 25 and max(counts.values()) < 80  # 50 expected, 4 sigma
    again = features.draw_variants(rows.repeat(400), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    single = made_features(1)
    assert torch.equal(single.draw_variants(torch.arange(3), torch.Generator()), torch.arange(3))


def test_sample_latents_is_mean_plus_std_times_noise():
    features, rows = made_features(1), torch.tensor([2, 0, 2])
    drawn = features.sample_latents(rows, torch.Generator().manual_seed(5))
    noise = torch.randn((3, 2, 2, 2), generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, features.mean[rows] + features.std[rows] * noise)
    assert not torch.equal(drawn[0], drawn[2])


def test_the_fingerprint_changes_with_all_that_features_depend_on():
    tiles = [Tile(Path(f"{i}.png"), "TUM") for i in range(3)]

    def fingerprint(chosen=tiles, base="a", contents=("0", "1", "2"), tiles=tiles):
        tensors = [torch.zeros(3, 1)] * 3
        return Features(*tensors, tiles, {"base": base}, list(contents)).fingerprint(chosen)

    relabelled = [Tile(Path("0.png"), "STR"), *tiles[1:]]
    prints = [fingerprint(), fingerprint(tiles[::-1]), fingerprint(tiles[:2]), fingerprint(base="b"),
              fingerprint(contents=("0", "1", "x")), fingerprint(relabelled, tiles=relabelled)]
    assert len(set(prints)) == len(prints) and fingerprint() == prints[0]
    assert fingerprint(tiles[:2]) == fingerprint(tiles[:2], contents=("0", "1", "x"))  # of these alone


def test_the_readmes_bytes_per_tile_are_those_of_both_bases():
    def megabytes(pixels, variants):
        shapes = (16, pixels // 8, pixels // 8), (16, pixels // 8, pixels // 8), (
            (pixels // 256) ** 2, 1536)
        tensors = [torch.empty(variants, *shape, device="meta") for shape in shapes]
        return Features(*tensors, tiles=[Tile(Path("0.png"))]).nbytes / 1e6

    assert (" ".join((ROOT / "README.md").read_text().split())).count(
        f"{megabytes(256, 1):.2f} MB on disk with a base of 256 px, {megabytes(256, 8):.1f} MB with its "
        f"eight turns and mirrorings (`--dihedral`, the default); with a base of 1024 px "
        f"{megabytes(1024, 1):.1f} MB and {megabytes(1024, 8):.1f} MB") == 1


# ---------------------------------------------------------------------------------- memory

def growth(few, many):
    """MB that are not page cache, gained from `few` tiles to `many` in one process."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "features.py", "--memory-of", str(few), str(many)],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    used = json.loads(done.stdout)
    return used[str(many)] - used[str(few)]


def test_memory_does_not_hold_the_features():
    """600 tiles are 82 MB of features."""
    assert growth(300, 900) < 40


@pytest.mark.slow
def test_memory_is_flat_from_1000_to_20000_tiles():
    assert growth(1000, 20000) <= MAX_GROWTH
