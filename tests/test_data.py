"""data.py: files of every kind → RGB, fitting, splitting, decoding ahead, the order of batches."""

import io
import os
import random
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_min import data
from pixcell_min.data import (Tile, batch_indices, find_tiles, fit_tile, image_to_tensor, load_tiles,
                              read_tile, split_tiles, tensor_to_image)

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real tiles; tests pass without them
JPEG_ERROR = 3  # levels: what quality 100 without chroma subsampling changes on flat colour
HIGH_BYTE_ERROR = 1  # levels: v >> 8 against round(v / 257)


def noise_image(height=12, width=12, seed=0):
    """A tile without any symmetry."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def write_png16(path, levels):
    """A 16-bit PNG, (H, W, 3) or (H, W, 4) uint16: Pillow cannot write these."""
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    write_chunks(path, [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def write_chunks(path, chunks):
    body = b"".join(struct.pack(">I", len(content)) + kind + content
                    + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_tiff_grey(path, levels, order="<", photometric=1, bits=16):
    """A one-strip grey TIFF, (H, W), in either byte order; photometric 0: white is zero."""
    pixels = levels.astype(f"{order}u{bits // 8}").tobytes()
    tags = [(256, levels.shape[1]), (257, levels.shape[0]), (258, bits), (259, 1), (262, photometric),
            (273, 8), (277, 1), (278, levels.shape[0]), (279, len(pixels))]
    directory = struct.pack(order + "H", len(tags))
    directory += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    path.write_bytes(head + pixels + directory + bytes(4))


@pytest.fixture
def folder(tmp_path):
    """Two classes of 3 and 2 readable tiles."""
    root = tmp_path / "tiles"
    for number, name in enumerate(["A/0.png", "A/1.tif", "A/2.bmp", "B/3.png", "B/4.webp"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed=number).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return root


# ------------------------------------------------------------------------------------ find

def test_find_class_folders_sorted_and_labelled(folder):
    (folder / "A" / "notes.txt").write_text("no image")
    (folder / "C_empty").mkdir()
    (folder / ".hidden").mkdir()
    noise_image().save(folder / ".hidden" / "x.png")
    (folder / "A" / "._0.png").write_bytes(b"macOS resource fork")
    found = find_tiles(str(folder))
    assert [(t.label, t.path.name) for t in found] == [
        ("A", "0.png"), ("A", "1.tif"), ("A", "2.bmp"), ("B", "3.png"), ("B", "4.webp")]


def test_find_flat_folder_any_ending_and_case(tmp_path):
    names = ["a.TIF", "b.tiff", "c.PNG", "d.jpg", "e.Jpeg", "f.webp", "g.bmp"]
    for name in [*names, "h.gif", "i.svs"]:
        (tmp_path / name).write_bytes(b"")
    assert find_tiles(tmp_path) == [Tile(tmp_path / name) for name in names]


def test_find_keeps_a_dangling_link_to_be_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert find_tiles(tmp_path) == [Tile(tmp_path / "a.png")]


def test_find_refuses(tmp_path, folder):
    noise_image().save(tmp_path / "file.png")
    (tmp_path / "empty" / "deep" / "deeper").mkdir(parents=True)
    noise_image().save(tmp_path / "empty" / "deep" / "deeper" / "x.png")
    noise_image().save(folder / "beside.png")
    for path, words in [(tmp_path / "none", "no such folder"), (tmp_path / "file.png", "no such folder"),
                        (tmp_path / "empty", "no image"), (folder, "both images (beside.png)")]:
        with pytest.raises(ValueError, match=".*") as caught:
            find_tiles(path)
        assert str(path) in str(caught.value) and words in str(caught.value)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ read

def test_read_rgb_keeps_every_pixel(folder):
    for tile in find_tiles(folder):
        expected = noise_image(seed=int(tile.path.stem))
        assert np.array_equal(read_tile(tile.path), expected), tile.path.name
        assert read_tile(tile.path).mode == "RGB"


@pytest.mark.parametrize("pixel, mode, expected", [
    (77, "L", (77, 77, 77)),
    (1, "1", (255, 255, 255)),
    ((10, 20, 30, 255), "RGBA", (10, 20, 30)),
    ((10, 20, 30, 0), "RGBA", (255, 255, 255)),
    ((0, 100, 200, 51), "RGBA", (204, 224, 244)),      # 255 + (c − 255)·51/255
    ((100, 51), "LA", (224, 224, 224)),
    ((10, 200, 30, 40), "CMYK", (207, 46, 190)),       # (255 − ink)·(255 − black)/255
    ((0, 0, 0, 255), "CMYK", (0, 0, 0)),
])
def test_read_modes(tmp_path, pixel, mode, expected):
    path = tmp_path / ("tile.tif" if mode == "CMYK" else "tile.png")
    Image.new(mode, (5, 4), pixel).save(path)
    tile = read_tile(path)
    assert (tile.mode, tile.size, tile.getpixel((2, 2))) == ("RGB", (5, 4), expected)


def test_read_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (16, 16), (10, 200, 30, 40)).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert np.abs(np.array(read_tile(tmp_path / "a.jpg"), int) - (207, 46, 190)).max() <= JPEG_ERROR


def test_read_palette_and_colour_key_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "keyed.png", transparency=0)
    colours = Image.new("RGB", (2, 1), (7, 8, 9))
    colours.putpixel((1, 0), (1, 2, 3))
    colours.save(tmp_path / "rgb.png", transparency=(7, 8, 9))
    pixels = {p.stem: [read_tile(p).getpixel((x, 0)) for x in (0, 1)] for p in tmp_path.iterdir()}
    assert pixels == {"plain": [(255, 0, 0), (0, 255, 0)], "keyed": [(255, 255, 255), (0, 255, 0)],
                      "rgb": [(255, 255, 255), (1, 2, 3)]}


def test_read_16_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1], [4, 128, 254, 255]])  # round(v / 257)
    Image.fromarray(levels).save(tmp_path / "a.png")
    write_tiff_grey(tmp_path / "little.tif", levels)
    write_tiff_grey(tmp_path / "big.tif", levels, order=">")
    write_tiff_grey(tmp_path / "inverse.tif", 65535 - levels, photometric=0)
    write_tiff_grey(tmp_path / "inverse8.tif", 255 - expected, photometric=0, bits=8)
    for path in tmp_path.iterdir():
        assert (np.array(read_tile(path)) == expected[..., None]).all(), path.name


def test_read_16_bit_colour(tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (6, 5, 3), np.uint16)
    write_png16(tmp_path / "rgb.png", levels)
    opaque = np.full((6, 5, 1), 65535, np.uint16)
    write_png16(tmp_path / "opaque.png", np.concatenate([levels, opaque], -1))
    write_png16(tmp_path / "clear.png", np.concatenate([levels, 0 * opaque], -1))
    for name in ("rgb.png", "opaque.png"):
        difference = np.abs(np.array(read_tile(tmp_path / name)) - levels / 257)
        assert difference.max() <= HIGH_BYTE_ERROR and np.array_equal(
            read_tile(tmp_path / name), levels >> 8)
    assert (np.array(read_tile(tmp_path / "clear.png")) == 255).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_read_obeys_exif_orientation(tmp_path, name):
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 16))  # dark on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise when shown: the left side comes to the top
    image.save(tmp_path / name, exif=exif)
    tile = read_tile(tmp_path / name)
    assert tile.size == (16, 32)
    assert max(tile.getpixel((8, 4))) < 20 and min(tile.getpixel((8, 28))) > 235


def test_read_takes_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert read_tile(tmp_path / "a.tif").getpixel((0, 0)) == (255, 0, 0)


def encoded(kind, **settings):
    stream = io.BytesIO()
    noise_image().save(stream, kind, **settings)
    return stream.getvalue()


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"not an image\nat all",
    "cut.png": encoded("PNG")[:-60],
    "cut.jpg": encoded("JPEG")[:-60],
    "cut.tif": encoded("TIFF")[:100],
    "cut.webp": encoded("WEBP")[:-60],
    "cut.bmp": encoded("BMP")[:-60],
    "flipped.png": encoded("PNG")[:60] + b"\xff\xff\xff\xff" + encoded("PNG")[64:],
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
}


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's own word on a cut TIFF
@pytest.mark.parametrize("name", [*BROKEN, "missing.png", "float.tif", "int.tif", "folder.png"])
def test_read_refuses_naming_the_file(tmp_path, name):
    path = tmp_path / name
    if name in BROKEN:
        path.write_bytes(BROKEN[name])
    elif name == "folder.png":
        path.mkdir()
    elif name != "missing.png":
        Image.new({"float.tif": "F", "int.tif": "I"}[name], (4, 4)).save(path)
    with pytest.raises(ValueError, match="cannot be read as a tile") as caught:
        read_tile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert ("32-bit" in str(caught.value)) == (name in ("float.tif", "int.tif"))


def test_read_never_starts_ghostscript(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(BROKEN["postscript.png"])
    assert Image.open(tmp_path / "a.png").format == "EPS"  # what Pillow would do by itself
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match="cannot identify"):
        read_tile(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side, accepted", [(8192, True), (8193, False), (10000, False), (60000, False)])
def test_read_refuses_bombs_before_decoding(tmp_path, side, accepted):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    write_chunks(tmp_path / "bomb.png", chunks)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_tile(tmp_path / "bomb.png")
    assert accepted == ("truncated" in str(caught.value))  # the accepted size fails in decoding only


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_read_survives_random_damage(tmp_path):
    """Whatever is flipped or cut: an image or a ValueError, no other exception."""
    chance, outcomes = random.Random(0), Counter()
    originals = [encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP")]
    for _ in range(200):
        content = bytearray(chance.choice(originals))
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)):]
        else:
            for _ in range(chance.randrange(1, 5)):
                content[chance.randrange(min(len(content), 120))] = chance.randrange(256)
        (tmp_path / "a.png").write_bytes(content)
        try:
            outcomes[read_tile(tmp_path / "a.png").mode] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert set(outcomes) == {"RGB", "refused"}


# ------------------------------------------------------------------------------------- fit

@pytest.mark.parametrize("how", ["resize", "pad"])
def test_fit_of_a_fitting_tile_changes_nothing(how):
    assert np.array_equal(fit_tile(noise_image(), 12, how), noise_image())


@pytest.mark.parametrize("how", ["resize", "pad"])
@pytest.mark.parametrize("size", [(7, 7), (8, 3), (3, 8), (1, 1), (40, 40), (41, 9), (16, 17)])
def test_fit_gives_the_size_and_keeps_flat_colour(how, size):
    fitted = fit_tile(Image.new("RGB", size, (12, 34, 56)), 16, how)
    assert fitted.size == (16, 16) and (np.array(fitted) == (12, 34, 56)).all()


def test_resize_takes_the_centre_square():
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert set(fit_tile(image, 16, "resize").get_flattened_data()) == {(0, 0, 255)}


def test_resize_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # picking single pixels would give black or white
    fitted = np.array(fit_tile(Image.fromarray(stripes), 64, "resize"))[:, 4:-4]
    assert 120 <= fitted.min() and fitted.max() <= 135


def test_pad_mirrors_without_doubling_the_edge():
    levels = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(np.repeat(levels[..., None], 3, -1))
    assert np.array(fit_tile(image, 7, "pad"))[..., 0].tolist() == [
        [10, 9, 10, 11, 12, 11, 10], [6, 5, 6, 7, 8, 7, 6], [2, 1, 2, 3, 4, 3, 2], [6, 5, 6, 7, 8, 7, 6],
        [10, 9, 10, 11, 12, 11, 10], [6, 5, 6, 7, 8, 7, 6], [2, 1, 2, 3, 4, 3, 2]]


def test_pad_keeps_the_scale():
    small, large = noise_image(224, 224), noise_image(300, 200)
    assert np.array_equal(np.array(fit_tile(small, 256, "pad"))[16:-16, 16:-16], small)
    assert np.array_equal(np.array(fit_tile(large, 256, "pad"))[:, 28:-28], np.array(large)[22:278])


def test_fit_refuses_another_way():
    with pytest.raises(ValueError, match="resize or pad, got 'stretch'"):
        fit_tile(noise_image(), 16, "stretch")


# --------------------------------------------------------------------------------- tensors

def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    levels[..., 1] = levels[::-1, :, 1]  # channels and axes must not be exchanged
    pixels = image_to_tensor(Image.fromarray(levels))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16) and pixels.is_contiguous()
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert pixels[1, 15, 0] == -1 and pixels[0, 15, 15] == 1
    assert np.array_equal(tensor_to_image(pixels), levels)


def test_tensor_to_image_rounds_and_clamps():
    values = torch.tensor([-7.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1 - 0.4 / 127.5, 9.0])
    image = tensor_to_image(values.expand(3, 1, 6).half().float().requires_grad_())
    assert [p[0] for p in image.get_flattened_data()] == [0, 0, 0, 1, 255, 255]
    assert image.mode == "RGB"


def test_tensor_to_image_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        tensor_to_image(torch.full((3, 2, 2), torch.nan))


# ----------------------------------------------------------------------------------- split

def made_tiles(**classes):
    return [Tile(Path(label, f"{i}.png"), label) for label, k in classes.items() for i in range(k)]


def test_split_is_a_partition_stratified_to_the_tile():
    chance = random.Random(0)
    for trial in range(80):
        sizes = [chance.choice([1, 2, chance.randrange(3, 40)]) for _ in range(chance.randrange(1, 12))]
        tiles = made_tiles(**{f"c{i}": size for i, size in enumerate(sizes)})
        if len(tiles) < 2:
            continue
        share = chance.choice([0.01, 0.1, 0.3, 0.5, 0.9])
        train, validation = split_tiles(tiles, share, trial)
        order = sorted(tiles, key=lambda tile: (tile.label, tile.path))
        assert train and validation and sorted(train + validation, key=order.index) == order
        for part in (train, validation):
            assert sorted(part, key=order.index) == part
        target = min(max(round(share * len(tiles)), 1), len(tiles) - 1)
        assert len(validation) == target
        for label, size in Counter(t.label for t in tiles).items():
            assert abs(sum(t.label == label for t in validation) - size * share) < 1


def test_split_depends_on_seed_class_and_name_only():
    tiles = made_tiles(A=20, B=30)
    train, validation = split_tiles(tiles, 0.2, 3)
    assert split_tiles(random.Random(1).sample(tiles, 50), 0.2, 3) == (train, validation)
    moved = [Tile(Path("/elsewhere") / t.path, t.label) for t in tiles]
    assert [t.path.name for t in split_tiles(moved, 0.2, 3)[1]] == [t.path.name for t in validation]
    assert split_tiles(tiles, 0.2, 4)[1] != validation
    held_out = split_tiles(made_tiles(A=20, B=20), 0.2, 3)[1]  # the same file names in both
    names = [[t.path.name for t in held_out if t.label == label] for label in "AB"]
    assert len(names[0]) == len(names[1]) == 4 and names[0] != names[1]


def test_split_without_classes_and_too_small():
    tiles = [Tile(Path(f"{i}.png")) for i in range(2)]
    train, validation = split_tiles(tiles, 0.01, 0)
    assert len(train) == len(validation) == 1
    with pytest.raises(ValueError, match="got 1 tile"):
        split_tiles(tiles[:1], 0.1, 0)


# ------------------------------------------------------------------------------------ load

@pytest.mark.parametrize("workers", [1, 3])
def test_load_names_and_skips(folder, workers):
    bad = folder / "A" / "1.tif"
    bad.write_bytes(b"broken")
    lines, tiles = [], find_tiles(folder)
    loaded = list(load_tiles(tiles, 16, "pad", False, lines.append, workers))
    assert [tile for tile, _ in loaded] == [t for t in tiles if t.path != bad]
    for tile, image in loaded:
        assert image.mode == "RGB" and np.array_equal(image, fit_tile(read_tile(tile.path), 16, "pad"))
    assert len(lines) == 1 and lines[0].startswith(f"skipped {bad}: cannot be read")


def test_load_strict_stops_at_the_first_in_the_order_of_the_list(folder):
    tiles, lines = find_tiles(folder), []
    list(load_tiles(tiles, 16, "pad", True, lines.append))
    assert lines == []
    for tile in tiles[1:]:
        tile.path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="1.tif"):
        list(load_tiles(tiles, 16, "pad", True, lines.append, 4))
    assert lines == []


def test_damaged_files_named_in_order(folder):
    """The skipped files come in the order of the list, so that two runs print the same lines."""
    tiles, lines = find_tiles(folder), []
    for tile in (tiles[3], tiles[0]):
        tile.path.write_bytes(b"broken")
    list(load_tiles(tiles, 12, "pad", False, lines.append, 3))
    assert [os.path.basename(line.split(":")[0]) for line in lines] == ["0.png", "3.png"]


def test_workers_decode_at_once_in_order_and_not_too_far_ahead(folder, monkeypatch):
    """Three tiles are decoded at the same time, or the barrier would break; results keep order."""
    barrier, started = threading.Barrier(3, timeout=30), []
    tiles = [Tile(folder / "A" / "0.png", str(i)) for i in range(300)]

    def meet(path):
        started.append(path)
        if len(started) <= 3:
            barrier.wait()
        return noise_image()

    monkeypatch.setattr(data, "read_tile", meet)
    loaded = load_tiles(tiles, 12, "pad", True, pytest.fail, 3)
    assert next(loaded)[0] == tiles[0] and len(started) <= 3 * data.DECODE_AHEAD
    assert [tile for tile, _ in loaded] == tiles[1:] and len(started) == 300


# --------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("num_tiles, batch_size", [(10, 4), (7, 7), (3, 8), (1, 3), (12, 5)])
def test_batches_are_full_and_every_tile_comes_once_an_epoch(num_tiles, batch_size):
    row = torch.cat([batch_indices(num_tiles, batch_size, m, seed=0) for m in range(num_tiles * 3)])
    assert len(row) == num_tiles * 3 * batch_size and row.dtype == torch.int64
    for epoch in row.reshape(-1, num_tiles):
        assert sorted(epoch.tolist()) == list(range(num_tiles))


def test_batches_depend_on_the_step_and_seed_alone():
    forward = [batch_indices(50, 8, m, seed=3).tolist() for m in range(40)]
    torch.manual_seed(1)
    assert [batch_indices(50, 8, m, seed=3).tolist() for m in reversed(range(40))] == forward[::-1]
    assert batch_indices(50, 8, 0, seed=4).tolist() != forward[0]


def test_epochs_differ_and_are_not_shifted_seeds():
    orders = [batch_indices(50, 50, epoch, seed).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


# ------------------------------------------------------------------------------- real data

@pytest.mark.skipif(not SHARED.exists(), reason="shared tiles are not on this machine")
@pytest.mark.parametrize("name, count, classes", [
    ("target_nct", 68, 7), ("target_kather2016", 100, 8), ("odd/dsb2018_rgba", 12, 1),
    ("open/tcga_histolab", 4, 1)])
def test_shared_tiles(name, count, classes):
    tiles = find_tiles(SHARED / name)
    assert len(tiles) == count and len({t.label for t in tiles}) == classes
    chosen = tiles[::8]
    for tile, image in load_tiles(chosen, 256, "resize", True, pytest.fail):
        assert image.mode == "RGB" and image.size == (256, 256)
        with Image.open(tile.path) as original:
            opaque = np.asarray(original)[..., :3]  # the RGBA ones are opaque throughout
        assert np.array_equal(read_tile(tile.path), opaque)
