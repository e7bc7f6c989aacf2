"""Tiles on disk → RGB images of one size; which tiles make up the batch of any micro-step.

Reads a folder, splits it into training and held-out tiles, decodes ahead in threads. It knows no
network and remembers no position.
"""

import hashlib
import struct
import warnings
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("TIFF", "PNG", "JPEG", "WEBP", "BMP")  # else an EPS named .png would start Ghostscript
MAX_TILE_PIXELS = 2**26  # 8192 × 8192: a tile, not a slide and not a decompression bomb
PHOTOMETRIC = 262  # the TIFF tag; 0 means that white is zero
warnings.filterwarnings("ignore", module="PIL")  # an unreadable file is refused in one line
DECODE_AHEAD = 4  # tiles per thread that wait for whoever encodes them
# What Pillow lets out on broken files: the first five were seen on a million damaged ones.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError,
                 LookupError, ArithmeticError, EOFError, struct.error)


@dataclass(frozen=True)
class Tile:
    """An image file and its class: the name of its folder, or None in a folder without classes."""

    path: Path
    label: str | None = None


def find_tiles(folder) -> list[Tile]:
    """List the images of a folder, or of its direct sub-folders (classes), sorted by class, name.

    Endings: SUFFIXES in any case; names that start with a dot are ignored. Raises: ValueError if
    there is no such folder, no image, or images both beside and inside class folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected images, or class folders of images")
    inside = [Tile(path, sub.name) for sub in _visible(folder) if sub.is_dir()
              for path in _images(sub)]
    beside = [Tile(path) for path in _images(folder)]
    if inside and beside:
        raise ValueError(f"{folder}: holds both images ({beside[0].path.name}) and class folders "
                         f"({inside[0].label}); expected one of the two")
    if not inside and not beside:
        raise ValueError(f"{folder}: no image in it or in its direct sub-folders; "
                         f"expected files ending in {' '.join(SUFFIXES)}")
    return inside or beside


def _visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images(folder):
    # A link to nowhere is kept: it is an unreadable tile to be named, not a file to overlook.
    # A folder is no tile, nor is a pipe, which would be waited for without end.
    return [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES
            and (p.is_file() or not p.exists())]


def read_tile(path) -> Image.Image:
    """Read the first frame of a file as 8-bit RGB, turned as its EXIF orientation says.

    Transparency is laid on white (glass); 16-bit grey v becomes round(v / 257), 16-bit colour its
    high byte; CMYK becomes (1 − ink)·(1 − black); colour profiles are not applied.
    Raises: ValueError naming the file if it is missing, broken, 32-bit, or above MAX_TILE_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_TILE_PIXELS:
                raise ValueError(f"{image.width}×{image.height} is above {MAX_TILE_PIXELS} px")
            return _to_rgb(image)
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a tile ({reason})") from None


def _to_rgb(image):
    # Trap: convert("RGB") clips 16-bit grey at 255 instead of scaling it, and drops alpha unseen.
    white_is_zero = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float32)
        if white_is_zero:  # Pillow inverts such pixels itself when they have 8 bits, not with 16
            levels = 65535 - levels
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no stated range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_tile(image: Image.Image, size: int, how: str) -> Image.Image:
    """Bring an RGB image to size × size pixels. Raises: ValueError for another `how`.

    "resize": the centre square, bicubic with antialiasing; its scale in µm/px changes.
    "pad": scale kept; centre crop where larger, mirrored margins (edge not doubled) where smaller.
    """
    width, height = image.size
    if how == "resize":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.BICUBIC)
    if how == "pad":
        left, top = max(0, (width - size) // 2), max(0, (height - size) // 2)
        pixels = np.asarray(image)[top:top + size, left:left + size]
        margins = [((size - n) // 2, (size - n + 1) // 2) for n in pixels.shape[:2]]
        return Image.fromarray(np.pad(pixels, (*margins, (0, 0)), mode="reflect"))
    raise ValueError(f"tile fit must be resize or pad, got {how!r}")


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image → (3, H, W) float32 in [−1, 1]: pixel / 127.5 − 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().contiguous() / 127.5 - 1


def tensor_to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) clamped to [−1, 1] → RGB image, rounded to 256 levels. Raises: ValueError: NaN."""
    if pixels.isnan().any():
        raise ValueError("pixels hold NaN; decode in float32")
    levels = ((pixels.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def split_tiles(tiles, validation_fraction: float, seed: int) -> tuple[list[Tile], list[Tile]]:
    """(training tiles, validation tiles), apart by file, sorted by class and name, neither empty.

    A class of k tiles gives k · fraction, rounded down or up, to validation. Lots depend on seed,
    class and file name alone, not on the order of `tiles`. Raises: ValueError below 2 tiles.
    """
    if len(tiles) < 2:
        raise ValueError(f"got {len(tiles)} tile(s); expected at least 2, one for validation")
    classes = defaultdict(list)
    for tile in tiles:
        lot = hashlib.sha256(repr((seed, tile.label, tile.path.name)).encode()).digest()
        classes[tile.label].append((lot, tile))
    ranked = []  # by how far a tile lies beyond its class's due, k · fraction: largest remainders
    for members in classes.values():
        members.sort(key=lambda member: member[0])
        due = len(members) * validation_fraction
        ranked += [(max(0.0, i + 1 - due), *member) for i, member in enumerate(members)]
    ranked.sort(key=lambda entry: entry[:2])
    count = min(max(round(len(tiles) * validation_fraction), 1), len(tiles) - 1)
    held_out = {tile for _, _, tile in ranked[:count]}
    tiles = sorted(tiles, key=lambda tile: (tile.label or "", tile.path))
    return [t for t in tiles if t not in held_out], [t for t in tiles if t in held_out]


def spread(items: list, count: int) -> list:
    """At most `count` of a list, evenly spaced, in order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def load_tiles(tiles, size: int, how: str, strict: bool, report, workers: int = 1):
    """Yield (tile, RGB image of size × size) for every readable tile of the list, in order.

    `workers` threads decode ahead (Pillow lets go of Python's lock there). An unreadable tile is
    named to `report(line)` and skipped. Raises: ValueError at the first one if `strict`.
    """
    ahead, waiting = iter(tiles), deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            waiting.extend((tile, pool.submit(_load, tile, size, how)) for tile in
                           islice(ahead, workers * DECODE_AHEAD - len(waiting)))
            if not waiting:
                return
            tile, future = waiting.popleft()
            try:
                image = future.result()
            except ValueError as error:
                if strict:
                    raise
                report(f"skipped {error}")
            else:
                yield tile, image


def _load(tile, size, how):
    return fit_tile(read_tile(tile.path), size, how)


def batch_indices(num_tiles: int, batch_size: int, micro_step: int, seed: int) -> torch.Tensor:
    """The tiles of micro-batch `micro_step` (from 0): (batch_size,) int64 in [0, num_tiles).

    Each epoch is a permutation drawn from (seed, epoch) alone; batches are cut from the endless
    row of epochs: all have full size, and any can be computed again, so that resuming is exact.
    """
    start = micro_step * batch_size
    first, last = start // num_tiles, (start + batch_size - 1) // num_tiles
    row = torch.cat([_epoch_order(num_tiles, seed, epoch) for epoch in range(first, last + 1)])
    return row[start - first * num_tiles:][:batch_size]


def _epoch_order(num_tiles, seed, epoch):
    # Hashed, because with seed + epoch the epoch 1 of seed 0 would be the epoch 0 of seed 1.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(num_tiles, generator=generator)
