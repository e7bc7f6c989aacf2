"""data.py: files of every kind → RGB, fitting, splitting, the feature cache, the order of batches."""

import io
import os
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_min import data
from pixcell_min.data import (
    DIHEDRAL, Features, Tile, batch_indices, cached_features, encode_tiles, find_tiles, fit_tile,
    image_to_tensor, load_tiles, read_tile, split_tiles, tensor_to_image)

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

def test_load_names_counts_and_skips(folder):
    bad = folder / "A" / "1.tif"
    bad.write_bytes(b"broken")
    lines, tiles = [], find_tiles(folder)
    loaded = list(load_tiles(tiles, 16, "pad", False, lines.append))
    assert [tile for tile, _ in loaded] == [t for t in tiles if t.path != bad]
    assert all(image.size == (16, 16) and image.mode == "RGB" for _, image in loaded)
    assert len(lines) == 2 and str(bad) in lines[0] and lines[1].startswith("1 of 5 tiles")


def test_load_strict_stops_and_nothing_readable_raises(folder):
    tiles, lines = find_tiles(folder), []
    list(load_tiles(tiles, 16, "pad", True, lines.append))
    assert lines == []
    for tile in tiles[1:]:
        tile.path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="1.tif"):
        list(load_tiles(tiles, 16, "pad", True, lines.append))
    assert lines == []
    with pytest.raises(ValueError, match="no readable tile: 4 of 4"):
        list(load_tiles(tiles[1:], 16, "pad", False, lines.append))


def test_damaged_files_named_in_order(folder):
    """The skipped files come in the order of the list, so that two runs print the same lines."""
    tiles, lines = find_tiles(folder), []
    for tile in (tiles[3], tiles[0]):
        tile.path.write_bytes(b"broken")
    list(load_tiles(tiles, 12, "pad", False, lines.append))
    assert [os.path.basename(line.split(":")[0]) for line in lines[:2]] == ["0.png", "3.png"]


# ---------------------------------------------------------------------------------- encode

def test_encode_values_dtype_and_batches():
    images, encoder = [noise_image(seed=s) for s in range(5)], StubEncoder()
    mean, std, embeddings = encode_tiles(iter(images), StubVAE(), encoder, batch_size=2)
    assert encoder.batches == [2, 2, 1]
    assert mean.shape == std.shape == (5, 3, 3, 3) and embeddings.shape == (5, 1, 3)
    assert {mean.dtype, std.dtype, embeddings.dtype} == {torch.float32}
    for row, image in enumerate(images):
        assert torch.equal(mean[row], StubVAE().encode(image_to_tensor(image)[None])[0][0])
        assert embeddings[row, 0].tolist() == list(image.getpixel((0, 0)))
    torch.testing.assert_close(std, torch.full_like(std, 0.2))


def test_encode_dihedral_rows_show_the_same_turn_to_both():
    images = [noise_image(seed=s) for s in range(2)]
    mean, _, embeddings = encode_tiles(images, StubVAE(), StubEncoder(), 3, dihedral=True)
    assert len(mean) == 16 and DIHEDRAL[0] is None
    for tile in range(2):
        rows = range(tile * 8, tile * 8 + 8)
        assert torch.equal(mean[rows[0]], encode_tiles([images[tile]], StubVAE(), StubEncoder(), 1)[0][0])
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

    mean, _, _ = encode_tiles([noise_image()], Trainable(), StubEncoder(), 1)
    assert not mean.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (weight * mean).sum().backward()
    assert torch.allclose(weight.grad, mean.sum())


def test_encode_holds_no_more_than_a_batch():
    alive = []

    def images():
        for _ in range(6):
            alive.append(None)
            yield noise_image()

    class Watching(StubVAE):
        def encode(self, pixels):
            assert len(alive) <= 2 * (1 + len(seen))
            seen.append(len(pixels))
            return super().encode(pixels)

    seen = []
    encode_tiles(images(), Watching(), StubEncoder(), 2)
    assert seen == [2, 2, 2]


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
        encode_tiles([noise_image()], Broken(), encoder, 1)


# ----------------------------------------------------------------------------------- cache

class Cache:
    """`cached_features` with settings that a test changes one at a time."""

    def __init__(self, folder, tiles):
        self.folder, self.tiles, self.lines = folder, tiles, []

    def __call__(self, tiles=None, **changes):
        """(features, was anything encoded)"""
        encoder = StubEncoder()
        settings = {"base_hash": "base", "size": 12, "how": "pad", "dihedral": False, "strict": False,
                    "batch_size": 2, "device": "cpu", "report": self.lines.append, **changes}
        features = cached_features(self.folder, tiles or self.tiles, StubVAE(), encoder, **settings)
        return features, bool(encoder.batches)

    def files(self):
        return sorted(self.folder.iterdir())


@pytest.fixture
def cache(tmp_path, folder):
    return Cache(tmp_path / "deep" / "cache", find_tiles(folder))


def assert_same(first, second):
    for name in ("mean", "std", "embeddings"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.tiles == second.tiles


@pytest.mark.parametrize("dihedral", [False, True])
def test_cache_computes_once(cache, dihedral):
    first, encoded_first = cache(dihedral=dihedral)
    second, encoded_second = cache(dihedral=dihedral)
    assert encoded_first and not encoded_second and cache.lines == []
    assert_same(first, second)
    assert second.variants == (8 if dihedral else 1) and second.tiles == cache.tiles
    direct = encode_tiles([read_tile(t.path) for t in cache.tiles], StubVAE(), StubEncoder(), 64,
                          dihedral=dihedral)
    assert_same(first, Features(*direct, tiles=cache.tiles))
    assert [p.suffix for p in cache.files()] == [".safetensors"]  # no temporary file is left


def test_cache_key_changes_with_every_setting_and_with_contents(cache):
    cache()
    for change in ({"base_hash": "other"}, {"size": 16}, {"how": "resize"}, {"dihedral": True},
                   {"tiles": cache.tiles[:4]}, {"tiles": cache.tiles[::-1]}):
        assert cache(**change)[1], change
        assert not cache(**change)[1], change
    for same in ({"batch_size": 5}, {"strict": True}):
        assert not cache(**same)[1], same
    noise_image(seed=99).save(cache.tiles[0].path)
    changed, computed = cache()
    assert computed and changed.embeddings[0, 0].tolist() == list(noise_image(seed=99).getpixel((0, 0)))
    assert len(cache.files()) == 8


def test_cache_follows_a_renamed_file(cache):
    cache()
    tile = cache.tiles[0]
    renamed = Tile(tile.path.rename(tile.path.with_name("0_renamed.png")), "A")
    features, computed = cache([renamed, *cache.tiles[1:]])
    assert not computed and features.tiles[0] == renamed


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other key", "no header"])
def test_cache_replaces_a_broken_file(cache, damage):
    first, _ = cache()
    path, = cache.files()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "other key":
        cache(base_hash="other")
        content = next(p for p in cache.files() if p != path).read_bytes()
    elif damage == "no header":
        content = struct.pack("<Q", 2) + b"{}"
    path.write_bytes(content[:-40] if damage == "cut" else b"" if damage == "empty" else content)
    again, computed = cache()
    assert computed and len(cache.lines) == 1 and str(path) in cache.lines[0]
    assert "computed again" in cache.lines[0] and "\n" not in cache.lines[0]
    assert_same(first, again)
    assert not cache()[1]


def test_cache_remembers_unreadable_tiles(cache):
    bad = cache.tiles[1]
    bad.path.write_bytes(b"broken")
    kept = [t for t in cache.tiles if t != bad]
    first, _ = cache()
    assert first.tiles == kept and len(cache.lines) == 2
    second, computed = cache()
    assert not computed and len(cache.lines) == 3 and str(bad.path) in cache.lines[2]
    assert_same(first, second)
    with pytest.raises(ValueError, match="1.tif"):
        cache(strict=True)


def test_cache_takes_in_a_tile_that_can_be_read_by_now(cache, monkeypatch):
    read = data.read_tile

    def failing(path):
        if path.name == "3.png":
            raise ValueError(f"{path}: network folder away")
        return read(path)

    monkeypatch.setattr(data, "read_tile", failing)
    assert len(cache()[0].tiles) == 4
    monkeypatch.setattr(data, "read_tile", read)
    features, computed = cache()
    assert computed and features.tiles == cache.tiles and not cache()[1]


def test_cache_handles_a_dangling_link(cache):
    cache.tiles[0].path.unlink()
    cache.tiles[0].path.symlink_to("nowhere.png")
    assert cache()[0].tiles == cache.tiles[1:]
    assert not cache()[1]


def test_cache_leaves_nothing_after_a_failure(cache, tmp_path):
    for tile in cache.tiles:
        tile.path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable tile"):
        cache()
    assert not cache.folder.exists() or cache.files() == []


def test_cache_in_an_impossible_folder(cache, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache.folder = tmp_path / "file" / "cache"
    with pytest.raises(ValueError, match="cannot be written"):
        cache()


def test_progress_bar_counts_tiles(cache, monkeypatch):
    bars = []

    def bar(tiles, *args, **settings):
        bars.append((list(tiles), settings["unit"]))
        return tiles

    monkeypatch.setattr(data, "tqdm", bar)
    cache(dihedral=True)
    assert bars == [(cache.tiles, "tile")]


# -------------------------------------------------------------------------------- features

def made_features(variants, num_tiles=3):
    count = num_tiles * variants
    mean = torch.arange(count * 8.0).reshape(count, 2, 2, 2)
    tiles = [Tile(Path(f"{i}.png")) for i in range(num_tiles)]
    return Features(mean, torch.rand(mean.shape), torch.zeros(count, 1, 4), tiles)


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
