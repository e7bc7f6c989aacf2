"""Latents and embeddings that PixCell's authors' extraction wrote, in place of images.

    <tile>_sd3_vae.npy  float16 (2C, H, W): the posterior's mean, then std, of *unscaled* latents
    <tile>_uni.npy      float16 (S, E): UNI2-h embeddings, one for each crop of 256 px

in any depth of folders. The authors' training takes latents as (z − shift)·scale; here that is done
once: mean becomes (mean − shift)·scale, std becomes std·scale, which gives the same draws.
Reading needs neither VAE nor encoder. There are no dihedral variants: embeddings cannot be turned.
"""

from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from tqdm import tqdm

from pixcell_min.data import Tile
from pixcell_min.features import Features, cached_features

# What NumPy was seen to raise when headers were damaged.
BROKEN_ARRAY = (OSError, ValueError, OverflowError, TokenError)
LATENTS, EMBEDDING = "_sd3_vae.npy", "_uni.npy"


def find_precomputed(folder) -> list[Tile]:
    """One Tile per name with one or both files, sorted by class, name; path: of its latents.

    The class is the folder it lies in, relative to `folder`, or None there itself.
    Raises: ValueError if there is no such folder, or no such file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected files *{LATENTS} and *{EMBEDDING}")
    stems = {path.with_name(path.name.removesuffix(ending))
             for ending in (LATENTS, EMBEDDING) for path in folder.rglob(f"*{ending}")}
    if not stems:
        raise ValueError(f"{folder}: no file in it ends in {LATENTS} or {EMBEDDING}")
    tiles = [Tile(stem.with_name(stem.name + LATENTS),
                  None if stem.parent == folder else stem.parent.relative_to(folder).as_posix())
             for stem in stems]
    return sorted(tiles, key=lambda tile: (tile.label or "", tile.path))


def files_of(tile: Tile) -> list[Path]:
    """The two files of a tile: latents, embedding."""
    name = tile.path.name.removesuffix(LATENTS)
    return [tile.path, tile.path.with_name(name + EMBEDDING)]


def cached_precomputed(cache_folder, tiles, config, vae_config, *, strict: bool, report: Callable,
                       workers: int = 1) -> Features:
    """`cached_features` of the files, for a transformer and a VAE of these configs.

    Raises: ValueError as `cached_features` and `read_precomputed`.
    """
    latents = config.in_channels, config.sample_size, config.sample_size
    embedding = config.caption_num_tokens, config.caption_channels
    scale, shift = vae_config.scaling_factor, vae_config.shift_factor

    def compute(missing):
        bar = tqdm(missing, "reading", unit="tile", disable=None)  # none where stderr is a file
        return read_precomputed(bar, latents, embedding, scale, shift, strict, report)

    return cached_features(
        cache_folder, tiles, compute, report=report, workers=workers, files_of=files_of,
        settings={"latents": latents, "embedding": embedding, "scale": scale, "shift": shift})


def read_precomputed(tiles, latents_shape, embedding_shape, scale: float, shift: float,
                     strict: bool, report):
    """Yield ([tile], (mean, std (1, C, H, W), embeddings (1, S, E))), float32, latents scaled.

    latents_shape: (C, H, W); embedding_shape: (S, E). A tile whose file is missing, broken or not
    finite is named to `report(line)` and skipped. Raises: ValueError at the first such tile if
    `strict`, and for every wrong shape or negative std: such files are of another base or making.
    """
    channels, *size = latents_shape
    shapes = (2 * channels, *size), tuple(embedding_shape)
    for tile in tiles:
        arrays = []
        try:
            arrays = [_read(path) for path in files_of(tile)]
        except ValueError as error:
            if strict:
                raise
            report(f"skipped {error}")
            continue
        for path, array, shape in zip(files_of(tile), arrays, shapes):
            if array.shape != shape:
                raise ValueError(f"{path}: shape {array.shape}, expected {shape} for this base")
        moments, embedding = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
        mean, std = moments[None].chunk(2, dim=1)
        if (std < 0).any():
            raise ValueError(f"{tile.path}: negative deviations, so it is not mean, then std")
        yield [tile], ((mean - shift) * scale, std * scale, embedding[None])


def _read(path):
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # no pickles; a cut file shows at once
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a tile needs both {LATENTS} and "
                         f"{EMBEDDING}") from None
    except BROKEN_ARRAY as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path}: broken or not a NumPy array ({reason})") from None
    if array.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path}: holds {array.dtype}, expected float16 or float32")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: holds NaN or infinity")
    return array
