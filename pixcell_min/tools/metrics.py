"""How far apart two sets of H&E tiles are: colour, quality, fidelity, copies, nuclei.

It reads no file, runs no network and draws nothing; `evaluate` does. Images are uint8 arrays
(H, W, 3) RGB, a set is a list of them, features are float arrays (n, d), one row per image.
Colour is measured on tissue pixels alone. Optical density is OD = -log10(I / 255) per channel:
base 10, as in Ruifrok & Johnston 2001 and Macenko et al. 2009, with 255 as empty glass.
Every function computes in float64 and raises ValueError in one line for too few samples.
"""

from statistics import NormalDist

import numpy as np
import torch
from torch.nn.functional import conv2d, max_pool2d, pad

TISSUE_DENSITY = 0.15  # summed OD over R, G, B of tissue: greys up to 227
PIXELS_PER_IMAGE = 4000  # tissue pixels of an image that stand for its colours
STAIN_PIXELS = 100  # fewest tissue pixels for stain vectors and their 1 % tails
SCREEN_SAMPLES = 20  # fewest distances with a 5 % quantile of their own
NUCLEUS_SIGMA, SURROUND_SIGMA = 2.5, 8.0  # px of 0.5 µm: a nucleus is 6 to 25 px long
PEAK_SHARE, PEAK_NOISE = 0.15, 0.05  # lowest peak: share of the tile's red OD range, and OD
_LEVELS = np.arange(256) / 255
_OPTICAL_DENSITY = -np.log10(np.maximum(_LEVELS, 1 / 255))  # black counts as level 1
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)
_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375],  # rows X, Y, Z over linear R, G, B
                 [0.2126729, 0.7151522, 0.0721750],
                 [0.0193339, 0.1191920, 0.9503041]])
_WHITE = _XYZ.sum(1)  # D65 under the 2 degree observer, so that greys have a = b = 0
RUIFROK = np.array([[0.65, 0.70, 0.29],  # rows haematoxylin, eosin, DAB over R, G, B
                    [0.07, 0.99, 0.11],
                    [0.27, 0.57, 0.78]])


def _look_up(table, pixels):
    """Entries of a table (256,) for (..., 3) uint8 pixels, or a ValueError."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim < 2 or pixels.shape[-1] != 3:
        raise ValueError(f"metrics: got an image of {pixels.dtype} {pixels.shape}; "
                         "expected uint8 RGB (..., 3); convert it with PIL's convert('RGB')")
    return table[pixels]


def optical_density(pixels) -> np.ndarray:
    """Optical density -log10(I / 255) of (..., 3) uint8 pixels: float64, 0 to 2.41.

    Raises: ValueError, as do all functions of pixels here, if they are not uint8 RGB.
    """
    return _look_up(_OPTICAL_DENSITY, pixels)


def tissue_mask(image) -> np.ndarray:
    """Where an image (..., 3) is tissue: bool (...), summed OD of at least TISSUE_DENSITY."""
    return optical_density(image).sum(-1) >= TISSUE_DENSITY


def thin(images, per_image=PIXELS_PER_IMAGE) -> list[np.ndarray]:
    """Each image as (1, m, 3) uint8 of at most `per_image` of its tissue pixels, m >= 0.

    A thinned image is an image: measure colours on it again and again, as `bootstrap` does.
    The pixels are evenly spaced in raster order; per_image None keeps them all.
    """
    thinned = []
    for image in images:
        pixels = image[tissue_mask(image)]
        if per_image is not None and len(pixels) > per_image:
            pixels = pixels[np.linspace(0, len(pixels) - 1, per_image).astype(int)]
        thinned.append(pixels[None])
    return thinned


def tissue_pixels(images, per_image=None) -> np.ndarray:
    """Tissue pixels (n, 3) uint8 of all images, at most `per_image` of each; see `thin`.

    Raises: ValueError if no image has any.
    """
    pixels = [image[0] for image in thin(images, per_image)]
    if not sum(map(len, pixels)):
        raise ValueError(f"tissue_pixels: {len(pixels)} images hold background alone; "
                         f"expected pixels of summed optical density >= {TISSUE_DENSITY}")
    return np.concatenate(pixels)


def rgb_to_lab(pixels) -> np.ndarray:
    """CIELAB (..., 3) float64 of sRGB pixels (..., 3) uint8: L 0 to 100; D65, 2 degrees."""
    ratio = _look_up(_LINEAR, pixels) @ (_XYZ / _WHITE[:, None]).T
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _lab_to_rgb(lab):
    """Nearest sRGB pixels (..., 3) uint8 of CIELAB (..., 3); what lies outside is clipped."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    ratio = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    linear = (ratio * _WHITE @ np.linalg.inv(_XYZ).T).clip(0, 1)
    levels = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * levels).astype(np.uint8)


def stain_densities(pixels) -> np.ndarray:
    """Haematoxylin and eosin density (..., 2) of (..., 3) uint8 pixels, in OD; may be < 0.

    The fixed matrix of Ruifrok & Johnston 2001 (haematoxylin, eosin, DAB), inverted.
    """
    return optical_density(pixels) @ np.linalg.inv(RUIFROK)[:, :2]


def macenko(pixels) -> tuple[np.ndarray, np.ndarray]:
    """Stain vectors (2, 3) of unit length, haematoxylin first, and their 99th percentile (2,).

    Macenko et al. 2009: in the plane of the two largest singular vectors of the OD, the
    directions at the 1st and 99th percentile of the angle; densities (in OD) by least squares.
    Haematoxylin is the one that absorbs more red. With one stain alone the two coincide.
    Raises: ValueError for fewer than STAIN_PIXELS pixels of OD length >= TISSUE_DENSITY.
    """
    density = optical_density(pixels).reshape(-1, 3)
    density = density[np.linalg.norm(density, axis=1) >= TISSUE_DENSITY]
    if len(density) < STAIN_PIXELS:
        raise ValueError(f"macenko: got {len(density)} tissue pixels; needs >= {STAIN_PIXELS}")
    plane = np.linalg.eigh(density.T @ density)[1][:, :0:-1]  # (3, 2): largest first
    plane[:, 0] *= np.sign(plane[:, 0].sum())  # densities are positive: so is their main axis
    along, across = (density @ plane).T
    angles = np.percentile(np.arctan2(across, along), (1, 99))
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) @ plane.T
    vectors = vectors[np.argsort(-vectors[:, 0])]
    return vectors, np.percentile(density @ np.linalg.pinv(vectors), 99, axis=0)


def reinhard(pixels) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (3,), (3,) in CIELAB of pixels (n, 3): Reinhard et al. 2001."""
    lab = rgb_to_lab(pixels)
    return lab.mean(0), lab.std(0)


def reinhard_transfer(image, mean, std, own_mean, own_std) -> np.ndarray:
    """Give an image (H, W, 3) the CIELAB mean and deviation of another set: uint8 (H, W, 3).

    Reinhard et al. 2001, with CIELAB for their space; all four are (3,), as `reinhard` gives
    them. Background pixels stay as they are. Raises: ValueError if own_std has a zero.
    """
    if not np.all(np.asarray(own_std) > 0):
        raise ValueError(f"reinhard_transfer: own_std {own_std} has a channel without spread; "
                         "give the deviations of a tile with tissue")
    moved = _lab_to_rgb((rgb_to_lab(image) - own_mean) * np.divide(std, own_std) + mean)
    return np.where(tissue_mask(image)[..., None], moved, image)


def wasserstein1(a, b) -> float:
    """Exact Wasserstein-1 distance of two samples (n,), (m,): the area between their CDFs.

    Raises: ValueError if one is empty.
    """
    if not len(a) or not len(b):
        raise ValueError(
            f"wasserstein1: got {len(a)} and {len(b)} numbers; needs >= 1 each")
    values = np.concatenate([a, b]).astype(np.float64)
    order = np.argsort(values)
    jumps = np.repeat([len(b), -len(a)], [len(a), len(b)])[order]  # integers: no rounding
    return float(np.abs(np.cumsum(jumps)[:-1]) @ np.diff(values[order]) / (len(a) * len(b)))


def colour_shift(real_images, other_images) -> dict[str, float]:
    """Distances between the tissue colours of two sets; all 0 for a set and itself.

    lab_l, lab_a, lab_b and their mean lab_mean: Wasserstein-1 in CIELAB units;
    haematoxylin, eosin: Wasserstein-1 of the densities of `stain_densities`, in OD;
    macenko_angle_h, _e: degrees between the stain vectors; macenko_max_h, _e: difference of
    the 99th percentile densities, in OD; reinhard_mean, reinhard_std: Euclidean, in CIELAB.
    An image gives at most PIXELS_PER_IMAGE pixels. Raises: as `tissue_pixels` and `macenko`.
    """
    sets = [tissue_pixels(images, PIXELS_PER_IMAGE) for images in (real_images, other_images)]
    lab = [rgb_to_lab(pixels) for pixels in sets]
    stains = [stain_densities(pixels) for pixels in sets]
    (vectors, maxima), (other_vectors, other_maxima) = (macenko(pixels) for pixels in sets)
    shift = {f"lab_{name}": wasserstein1(*(values[:, i] for values in lab))
             for i, name in enumerate("lab")}
    shift["lab_mean"] = float(np.mean(list(shift.values())))
    for i, name in enumerate(("haematoxylin", "eosin")):
        shift[name] = wasserstein1(*(values[:, i] for values in stains))
    # the half chord, not the cosine: arccos loses all digits at small angles
    angles = 2 * np.arcsin(np.linalg.norm(vectors - other_vectors, axis=1) / 2)
    for i, name in enumerate("he"):
        shift[f"macenko_angle_{name}"] = float(np.degrees(angles[i]))
        shift[f"macenko_max_{name}"] = float(abs(maxima[i] - other_maxima[i]))
    shift["reinhard_mean"] = float(np.linalg.norm(lab[0].mean(0) - lab[1].mean(0)))
    shift["reinhard_std"] = float(np.linalg.norm(lab[0].std(0) - lab[1].std(0)))
    return shift


def _feature_sets(name, *sets, needs=1):
    """Feature sets as float64 (n, d) of one d, each with `needs` rows, or a ValueError."""
    sets = [np.asarray(features, np.float64) for features in sets]
    for features in sets:
        if features.ndim != 2 or features.shape[1] != sets[0].shape[-1]:
            raise ValueError(f"{name}: got features of shapes {[x.shape for x in sets]}; "
                             "expected (n, d) with one d")
        if len(features) < needs:
            raise ValueError(f"{name}: got {len(features)} samples; needs >= {needs}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: features hold NaN or infinity; expected finite numbers")
    return sets


def frechet_distance(a, b) -> float:
    """Squared Fréchet distance of Gaussians fitted to features; Heusel et al. 2017.

    |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of (n, d), (m, d), covariances over
    n - 1. It falls with n: compare equal n only. Raises: ValueError for fewer than 2 samples.
    """
    a, b = _feature_sets("frechet_distance", a, b, needs=2)
    # S = R^T R of the centred rows, so the trace of the root is the sum of the singular values
    # of R_a R_b^T: exact where n < d, and no matrix root.
    roots = [np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (a, b)]
    spread = sum(np.square(root).sum() for root in roots)
    overlap = np.linalg.norm(roots[0] @ roots[1].T, "nuc")
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * overlap)


def kernel_distance(a, b, paired=False) -> float:
    """Unbiased squared MMD (KID) of features (n, d), (m, d): may fall below 0.

    Bińkowski et al. 2018, kernel (x·y / d + 1)^3. With `paired`, where row i of b was made from
    row i of a, the products of pairs are left out, which would bias it downwards: the U-statistic
    of Gretton et al. 2012, lemma 6. Raises: ValueError below 2 samples, pairs of unequal numbers.
    """
    a, b = _feature_sets("kernel_distance", a, b, needs=2)
    if paired and len(a) != len(b):
        raise ValueError(f"kernel_distance: got {len(a)} and {len(b)} samples; pairs need as many")

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def of_others(x, y):
        gram = kernel(x, y)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    between = of_others(a, b) if paired else kernel(a, b).mean()
    return float(of_others(a, a) + of_others(b, b) - 2 * between)


def _distances(a, b):
    """Euclidean distances (n, m)."""
    square = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(square.clip(0))


def precision_recall_density_coverage(real, generated, k=5) -> dict[str, float]:
    """How features (n, d), (m, d) overlap by k-nearest-neighbour balls; Naeem et al. 2020.

    precision: generated in a ball of real ones; recall: real in a ball of generated ones;
    density: real balls per generated sample, over k (may exceed 1); coverage: real balls with
    a generated sample in them. Raises: ValueError for fewer than k + 1 samples.
    """
    name = "precision_recall_density_coverage"
    real, generated = _feature_sets(name, real, generated, needs=k + 1)

    def radii(x):
        return np.partition(_distances(x, x), k, axis=1)[:, k]  # the sample itself is number 0

    between = _distances(real, generated)
    in_real = between <= radii(real)[:, None]
    in_generated = between <= radii(generated)
    return {"precision": float(in_real.any(0).mean()),
            "recall": float(in_generated.any(1).mean()),
            "density": float(in_real.sum(0).mean() / k),
            "coverage": float(in_real.any(1).mean())}


def _unit_rows(name, *sets):
    """Feature sets with rows of length one."""
    sets = _feature_sets(name, *sets)
    for features in sets:
        if not np.linalg.norm(features, axis=1).all():
            raise ValueError(f"{name}: a feature row is all zero; a cosine needs a direction")
    return [features / np.linalg.norm(features, axis=1, keepdims=True) for features in sets]


def cosine_fidelity(conditions, generated) -> np.ndarray:
    """Cosines (n,) of the rows of (n, d) and (n, d), pair by pair.

    Raises: ValueError if the numbers of rows differ or a row is zero.
    """
    conditions, generated = _unit_rows("cosine_fidelity", conditions, generated)
    if len(conditions) != len(generated):
        raise ValueError(f"cosine_fidelity: got {len(conditions)} conditions and "
                         f"{len(generated)} generated; expected one for each")
    return (conditions * generated).sum(1)


def nearest_neighbours(queries, references) -> np.ndarray:
    """Cosine distance (n,), 0 to 2, of each row of (n, d) to the nearest of (m, d)."""
    queries, references = _unit_rows("nearest_neighbours", queries, references)
    return 1 - (queries @ references.T).max(1).clip(-1, 1)


def memorisation_screen(generated, held_out_real, training) -> dict[str, float]:
    """Are generated features nearer to training ones than unseen real ones are? All (n, d).

    generated_median, real_median: median of `nearest_neighbours` to training; closer_share:
    share of generated below the 5 % quantile of the real ones, 0.05 if alike. A screen, no
    guarantee. Raises: ValueError for fewer than SCREEN_SAMPLES held-out ones.
    """
    _feature_sets("memorisation_screen (held out)", held_out_real, needs=SCREEN_SAMPLES)
    real = nearest_neighbours(held_out_real, training)
    own = nearest_neighbours(generated, training)
    return {"generated_median": float(np.median(own)), "real_median": float(np.median(real)),
            "closer_share": float((own < np.quantile(real, 0.05)).mean())}


def _gaussian(image, sigma):
    """Blur (1, 1, H, W) by a Gaussian of `sigma` px; the border repeats."""
    reach = int(3 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=image.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    padded = pad(image, (reach,) * 4, mode="replicate")
    return conv2d(conv2d(padded, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))


def nuclei_density(image) -> float:
    """Nuclei per 10,000 px of an image (H, W, 3) at 0.5 µm/px: a rank, no exact count.

    Local maxima of a difference of Gaussians (one nucleus minus its surroundings) of the red
    OD, which haematoxylin makes and eosin hardly. A peak must rise above a share of the range
    of the tile's own stain, so that pale and dark stains count alike, and above the noise.
    """
    red = torch.from_numpy(optical_density(image)[..., 0])[None, None]
    smooth = _gaussian(red, NUCLEUS_SIGMA)
    blobs = smooth - _gaussian(red, SURROUND_SIGMA)
    low, high = np.percentile(smooth.numpy(), (10, 99))
    height = max(PEAK_NOISE, PEAK_SHARE * (high - low))
    peaks = (blobs == max_pool2d(blobs, 7, 1, 3)) & (blobs > height)  # one within 3 px
    return 1e4 * float(peaks.double().mean())


def bootstrap(statistic, n, repeats=200, seed=0, level=0.95, distinct=False):
    """Percentile interval (low, high) of `statistic` over resampled images; Efron 1979.

    statistic takes indices (n,) int drawn from 0 .. n - 1 with replacement and returns a
    number or an array of them; low and high have its shape. With `distinct` it gets n // 2
    different ones instead (delete-half jackknife, the same variance for a mean): for
    `kernel_distance`, which samples repeated in a set would raise. The generator is numpy's,
    seeded by `seed`. Raises: ValueError for n < 2, repeats < 1 or a level out of (0, 1).
    """
    if n < 2 or repeats < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap: got n {n}, repeats {repeats}, level {level}; "
                         "needs n >= 2, repeats >= 1, 0 < level < 1")
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.permutation(n)[: n // 2] if distinct else rng.integers(0, n, n))
             for _ in range(repeats)]
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def jackknife(statistic, n, level=0.95, centre=None):
    """Interval (low, high) of `statistic` around its own value; Quenouille 1956, Tukey 1958.

    statistic takes indices into 0 .. n - 1: all but one, n times, and all; its standard error is
    sqrt((n - 1) / n Σ (θ_i − mean θ)²), the interval symmetric and normal. For distances between
    sets: a resampled set is further from another than the set itself, so that `bootstrap` would
    shift them. centre: a value to put it around instead, of which `statistic` is a cheaper
    approximation. Raises: ValueError for n < 2 or a level out of (0, 1).
    """
    if n < 2 or not 0 < level < 1:
        raise ValueError(f"jackknife: got n {n}, level {level}; needs n >= 2, 0 < level < 1")
    every = np.arange(n)
    left_out = np.array([statistic(np.delete(every, i)) for i in range(n)])
    error = np.sqrt((n - 1) * left_out.var(0))
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    centre = np.asarray(statistic(every) if centre is None else centre)
    low, high = centre - reach, centre + reach
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)
