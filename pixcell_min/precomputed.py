"""Latents and embeddings that PixCell's authors' extraction wrote, in place of images.

    <tile>_sd3_vae.npy  float16 (2C, H, W): the posterior's mean, then its std, of *unscaled* latents
    <tile>_uni.npy      float16 (S, E): UNI2-h embeddings, one for each crop of 256 px

in any depth of folders. The authors' training takes latents as (z − shift)·scale; here that is done
once: mean becomes (mean − shift)·scale, std becomes std·scale, which gives the same draws.
Reading needs neither VAE nor encoder. There are no dihedral variants: embeddings cannot be turned.
"""

from pathlib import Path

import numpy as np
import torch

from pixcell_min.data import Tile

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
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # a cut file shows at once
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a tile needs both {LATENTS} and "
                         f"{EMBEDDING}") from None
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path}: broken or not a NumPy array ({reason})") from None
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32):
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{path}: holds {kind}, expected float16 or float32")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: holds NaN or infinity")
    return array
