"""Tiles → latents and embeddings, computed once, kept in shards on disk, read by memory-mapping.

A shard is a safetensors file with the rows of some tiles; its header holds their content hashes, a
key (all else that features depend on) and a checksum. Tiles are looked up by content hash: a tile
that was added or changed is computed, all others are found. Shards appear whole or not at all.
It knows no network: what encodes is an argument. Row of all tensors: tile · V + variant, V = 8
dihedral variants or 1. Everything is float32; ENCODE_BATCH images are encoded at a time, whatever
the training's batch size: cached equals uncached, bit for bit, on one device with as many threads.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from pixcell_min.checkpoint import file_hash, read_tensors, save_tensors, write_text
from pixcell_min.data import Tile, image_to_tensor, load_tiles

DIHEDRAL = (None, *Image.Transpose)  # the identity and Pillow's 7 turns and mirrorings
CACHE_VERSION = 3  # raise it whenever the same input would give other features
ENCODE_BATCH = 4  # images a call; networks may round differently in another: see CACHE_VERSION
ONE_BY_ONE_ABOVE = 512  # px: four tiles of 1024 px at once would take the VAE about 13 GB
SHARD_BYTES = 2**24  # a shard is written when it holds so much: what a kill can lose
ATTEMPTS = 3  # at tiles that others rewrite while they are encoded
LEFT_OVER = 3600.0  # seconds: an unfinished file of this age is no other run's, but a killed one's
NAMES = ("mean", "std", "embeddings")


class Rows:
    """One tensor spread over shards: `rows[index]` copies the rows of a (B,) or () int64 index."""

    def __init__(self, shards: list[torch.Tensor], places: list[tuple[int, int]]):
        """shards: (tiles of the shard, V, …); places: every tile's shard and position in it."""
        self.shards, self.places, self.variants = shards, places, shards[0].shape[1]
        self.shape = torch.Size([len(places) * self.variants, *shards[0].shape[2:]])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        picked = []
        for row in index.flatten().tolist():
            tile, variant = divmod(row, self.variants)
            shard, position = self.places[tile]
            picked.append(self.shards[shard][position, variant])
        return torch.stack(picked).reshape(*index.shape, *self.shape[1:])


@dataclass(frozen=True)
class Features:
    """What training reads, on the CPU: N tiles in V variants each; row = tile · V + variant."""

    mean: torch.Tensor | Rows  # (N·V, C, H, W) float32, scaled latents
    std: torch.Tensor | Rows  # (N·V, C, H, W) float32
    embeddings: torch.Tensor | Rows  # (N·V, S, E) float32
    tiles: list[Tile]  # N, the readable ones
    settings: dict = field(default_factory=dict)  # what they depend on beside the tiles' bytes
    contents: list[str] | tuple = ()  # N, the content hash of each tile

    @property
    def variants(self) -> int:
        """V: 8 with dihedral variants, else 1."""
        return len(self.mean) // len(self.tiles)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows of the three tensors."""
        return sum(4 * getattr(self, name).shape.numel() for name in NAMES)

    def rows(self, tiles) -> torch.Tensor:
        """The row of each tile's unturned variant, (len(tiles),) int64."""
        position = {tile: index for index, tile in enumerate(self.tiles)}
        return torch.tensor([position[tile] * self.variants for tile in tiles])

    def draw_variants(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Unturned rows (B,) → rows of variants drawn uniformly with `generator`, (B,) int64."""
        return rows + torch.randint(self.variants, rows.shape, generator=generator)

    def sample_latents(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw latents mean + std · noise with `generator` (CPU): rows (B,) → (B, C, H, W)."""
        mean = self.mean[rows]
        return mean + self.std[rows] * torch.randn(mean.shape, generator=generator)

    def fingerprint(self, tiles) -> str:
        """SHA-256 of all that these tiles' features depend on, in order, and of their labels."""
        content = dict(zip(self.tiles, self.contents, strict=True))
        return _key(self.settings, [(content[tile], tile.label) for tile in tiles])


@torch.no_grad()
def encode_images(images, vae, encoder, device="cpu"):
    """B RGB images → (mean, std (B, C, H, W), embeddings (B, S, E)), float32 on the CPU.

    `vae.encode(pixels (B, 3, H, W) in [−1, 1]) -> (mean, logvar)` of the scaled latents;
    `encoder(images) -> (B, S, E)`. Raises: ValueError if a result is not finite.
    """
    pixels = torch.stack([image_to_tensor(image) for image in images])
    at_once = 1 if max(pixels.shape[2:]) > ONE_BY_ONE_ABOVE else len(pixels)
    moments = [vae.encode(part.to(device)) for part in pixels.split(at_once)]
    mean, logvar = (torch.cat(parts) for parts in zip(*moments))
    outputs = mean, (0.5 * logvar.float()).exp(), encoder(images)
    if not all(output.isfinite().all() for output in outputs):
        raise ValueError("latents or embeddings are not finite; check the base's weights")
    return tuple(output.float().cpu() for output in outputs)


def encode_tiles(loaded, encode: Callable, batch_size: int, dihedral: bool = False):
    """(tile, RGB image) pairs → (some tiles, their rows of mean, std, embeddings), in order.

    `encode(list of images)` gives the three; at most `batch_size` images a call, filled across
    tiles. Parts end where a batch and a tile end, so that whoever goes on there fills the same
    batches as whoever had not stopped: networks may round differently in another batch.
    """
    turns = DIHEDRAL if dihedral else (None,)
    stream = ((tile, image if turn is None else image.transpose(turn))
              for tile, image in loaded for turn in turns)
    tiles, parts = [], []
    while batch := list(islice(stream, batch_size)):
        parts.append(encode([image for _, image in batch]))
        tiles += [tile for tile, _ in batch]
        if len(tiles) % len(turns) == 0:
            yield tiles[::len(turns)], tuple(torch.cat(c) for c in zip(*parts, strict=True))
            tiles, parts = [], []


def cached_images(cache_folder, tiles, encode: Callable, *, base_hash: str, size: int, how: str,
                  dihedral: bool, strict: bool, report: Callable, workers: int = 1,
                  device="cpu") -> Features:
    """`cached_features` of images: loaded by `load_tiles`, encoded by `encode_tiles`.

    base_hash: of VAE and encoder. device: where `encode` computes; another type has a cache of its
    own. Every call of `encode` gets ENCODE_BATCH images. Raises: ValueError as `cached_features`
    and `load_tiles`.
    """
    def encode_full(images):
        filled = images + images[-1:] * (ENCODE_BATCH - len(images))  # the last batch, too
        return tuple(output[:len(images)] for output in encode(filled))

    def compute(missing):
        bar = tqdm(missing, "encoding", unit="tile", disable=None)  # none where stderr is a file
        return encode_tiles(load_tiles(bar, size, how, strict, report, workers), encode_full,
                            ENCODE_BATCH, dihedral)

    return cached_features(
        cache_folder, tiles, compute, report=report, workers=workers,
        settings={"base": base_hash, "size": size, "tile_fit": how, "dihedral": dihedral,
                  "device": torch.device(device).type})


def cached_features(cache_folder, tiles, compute: Callable, *, settings: dict, report: Callable,
                    workers: int = 1, files_of: Callable = lambda tile: [tile.path]) -> Features:
    """Features of all readable tiles: out of the cache, or computed and put there.

    `compute(tiles)` yields parts as `encode_tiles` does and leaves out, naming them, what cannot
    be read. `settings`: all that features depend on beside the bytes of `files_of(tile)`. `workers`
    threads compute checksums. `report(line)` hears of damaged shards, changed and skipped tiles.
    Raises: ValueError if no tile can be read, computed ones cannot be written or be read back, or
    tiles were rewritten while they were computed, ATTEMPTS times.
    """
    key = _key(settings)
    folder = Path(cache_folder) / f"features-{key[:16]}"

    def content_of(tile):
        return _content(files_of(tile))

    with ThreadPoolExecutor(workers) as pool:
        for _ in range(ATTEMPTS):
            contents = dict(zip(tiles, pool.map(content_of, tiles)))
            wanted = set(contents.values()) - {None}
            entries, known_paths, damaged = _open_shards(
                sorted(folder.glob("shard-*")), key, wanted, pool)
            for error in damaged.values():
                report(f"{error}; its tiles are computed again")
            # By content, because two files of the same bytes are one entry; None: cannot be read.
            missing = list({contents[tile] or tile: tile for tile in tiles
                            if contents[tile] not in entries}.values())
            if not missing:
                break
            changed = sum(os.path.realpath(tile.path) in known_paths for tile in missing)
            found = sum(contents[tile] in entries for tile in tiles)
            if found or changed:
                report(f"features: {found} of {len(tiles)} tiles are in the cache; to compute: "
                       f"{len(missing)}, of which {changed} changed since")
            _make_folder(folder, settings, damaged)
            written, rewritten = _write_shards(folder, key, compute(missing), contents, content_of)
            opened, _, failed = _open_shards(written, key, wanted, pool)
            for error in failed.values():  # computing again would wear the disk, and no more
                raise ValueError(f"{error}, just after it was written; is the disk sound?")
            entries |= opened
            if not rewritten:
                break
            report(f"features: {len(rewritten)} tiles were rewritten while they were computed, "
                   f"{rewritten[0].path} the first; they are computed again")
        else:
            raise ValueError(f"{rewritten[0].path}: rewritten each time it was computed; "
                             "start again when its files are at rest")
    kept = [tile for tile in tiles if contents[tile] in entries]
    if not kept:
        raise ValueError(f"no readable tile: {len(tiles)} of {len(tiles)} files failed")
    if len(kept) < len(tiles):
        report(f"{len(tiles) - len(kept)} of {len(tiles)} tiles could not be read and were skipped")
    kept_contents = [contents[tile] for tile in kept]
    return _gather([entries[content] for content in kept_contents], kept, settings, kept_contents)


def _key(settings, *more):
    return hashlib.sha256(
        repr((CACHE_VERSION, sorted(settings.items()), *more)).encode()).hexdigest()


def _content(paths):
    """The content hash of a tile's files, or None if one cannot be read."""
    try:
        return "-".join(file_hash(path) for path in paths)
    except ValueError:
        return None


def _open_shards(paths, key, wanted, pool):
    """({content: (shard's tensors, position)}, all file paths of tiles, {damaged shard: error})."""
    entries, known_paths, damaged = {}, set(), {}
    for path, result in zip(paths, pool.map(lambda path: _read_shard(path, key, wanted), paths)):
        if isinstance(result, ValueError):
            damaged[path] = result
            continue
        tensors, contents, sources = result
        known_paths |= set(sources)
        entries |= {content: (tensors, i) for i, content in enumerate(contents)
                    if content in wanted}
    return entries, known_paths, damaged


def _read_shard(path, key, wanted):
    """(tensors, contents, paths of its tiles), or a ValueError: damaged. Unwanted ones unread."""
    try:
        tensors, header = read_tensors(path)
        contents, sources = (json.loads(header.get(name, "")) for name in ("contents", "paths"))
        if wanted & set(contents) and header.get("checksum") != _checksum(
                key, contents, sources, tensors):
            raise ValueError
    except (ValueError, TypeError, RecursionError) as error:
        known = str(error).startswith(str(path))
        return ValueError(str(error) if known else f"{path}: damaged, it fails its checksum")
    return tensors, contents, sources


def _checksum(key, contents, sources, tensors):
    digest = hashlib.sha256(repr((key, contents, sources)).encode())
    for name in NAMES:
        tensor = tensors.get(name, torch.empty(0))
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()


def _make_folder(folder, settings, damaged):
    """Before anything is computed: a folder that can be written, without what killed runs left."""
    write_text(folder / "settings.json", json.dumps(settings, indent=1))
    left = [p for p in folder.glob(".*.tmp") if time.time() - p.stat().st_mtime > LEFT_OVER]
    for path in [*damaged, *left]:
        path.unlink(missing_ok=True)


def _write_shards(folder, key, parts, contents, content_of):
    """Write computed parts as shards of about SHARD_BYTES; → (their paths, tiles left out).

    Left out is a tile whose bytes no longer are those of `contents`: it may have been read so.
    """
    written, rewritten, finished = [], [], []  # finished: (tiles, their rows of each tensor)

    def write():
        tiles = [tile for part_tiles, _ in finished for tile in part_tiles]
        columns = zip(*(part for _, part in finished), strict=True)
        names = [contents[tile] for tile in tiles]
        sources = [os.path.realpath(tile.path) for tile in tiles]
        tensors = {name: torch.cat(column) for name, column in zip(NAMES, columns, strict=True)}
        name = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
        written.append(folder / f"shard-{name}.safetensors")
        save_tensors(written[-1], tensors, {
            "contents": json.dumps(names), "paths": json.dumps(sources),
            "checksum": _checksum(key, names, sources, tensors)})
        finished.clear()

    try:
        for part_tiles, part in parts:
            same = [content_of(tile) == contents[tile] for tile in part_tiles]
            rewritten += [tile for tile, kept in zip(part_tiles, same, strict=True) if not kept]
            part = tuple(t.unflatten(0, (len(same), -1))[torch.tensor(same)] for t in part)
            kept_tiles = [tile for tile, kept in zip(part_tiles, same, strict=True) if kept]
            if kept_tiles:
                finished.append((kept_tiles, part))  # one step: Ctrl-C comes before or after it
            if sum(t.nbytes for _, part in finished for t in part) >= SHARD_BYTES:
                write()
    finally:  # Ctrl-C, too, or a tile that stops the run, keeps what is finished
        if finished:
            write()
    return written, rewritten


def _gather(entries, *its):
    """Features over the shards of these (tensors, position) entries; its: its further fields."""
    shards = list({id(tensors): tensors for tensors, _ in entries}.values())
    number = {id(tensors): i for i, tensors in enumerate(shards)}
    places = [(number[id(tensors)], position) for tensors, position in entries]
    return Features(*(Rows([shard[name] for shard in shards], places) for name in NAMES), *its)
