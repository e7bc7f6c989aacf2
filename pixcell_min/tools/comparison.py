"""Sets of images against real tiles: every column and group of numbers that `evaluate` reports.

A column is an arm or what stands beside it (real–real floor, VAE round trip, colour-only); a group
is a metric's numbers with n and intervals, or the reason why there are none. It draws no sample and
writes nothing.
"""

from collections import defaultdict
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pixcell_min.data import image_to_tensor
from pixcell_min.tools import metrics

FLOOR_SPLITS = 5  # random halves of the real tiles that make the noise floor
INTERVAL_PIXELS = 250  # of an image, when colours are measured again for an interval
SHARES = (1, 1, np.inf, 1)  # the most that precision, recall, density, coverage can be


def measure(result, seed, models, samples, drawn, training, training_images) -> dict:
    """Fill in result["results"]: column → group → values, intervals, n, or the reason for none.

    Columns: the arms and what stands beside them. → {column: images}, `real` first, of one length
    but for the arms, which have `images_per_tile` for each tile, in the tiles' order.
    """
    real = [np.array(sample.image) for sample in samples]
    pipeline, results = models.pipeline, {}
    round_trips = [round_trip(pipeline, sample.image) for sample in samples]
    images = {"real": real, "vae": round_trips, **drawn}
    reasons = {}
    if "base" in drawn:
        attempt(reasons, "colour", len(drawn["base"]),
                lambda: images.update(colour_only=recolour(drawn["base"], training_images)) or {})
    features = {column: {name: np.stack(embed(encoder, its)) for name, encoder in
                         models.encoders.items()}
                for column, its in tqdm(images.items(), "embedding", unit="set", disable=None)}
    for column, its in tqdm(images.items(), "measuring", unit="set", disable=None):
        if column == "real":
            results["real_real"] = noise_floor(samples, features["real"], seed)
            continue
        results[column] = compare(real, its, features["real"], features[column])
        results[column] |= compare_pairs(real, its, features["real"], features[column], training)
    if "colour_only" not in images and reasons:
        results["colour_only"] = reasons
    results["copies"] = control(models, features["real"], training, training_images)
    result["results"] = {column: results[column] for column in
                         (*drawn, "real_real", "vae", "colour_only", "copies")
                         if column in results}
    classified = {}
    attempt(classified, "colour_classifier", len(samples), lambda: classify_by_colour(samples))
    result |= classified
    result["key"] = key_numbers(images, features, len(real))
    for group in dict.fromkeys(group for its in results.values() for group in its):
        failed = defaultdict(list)
        for column, its in result["results"].items():
            if "reason" in its.get(group, {}):
                failed[its[group]["reason"]].append(column)
        result["notes"] += [f"{group} ({', '.join(columns)}): {reason}"
                            for reason, columns in failed.items()]
    return images


def attempt(results, group, n, values, intervals=None) -> None:
    """results[group] = n with values and intervals, as far as they can be had, else the reason.

    values() -> {name: number}; intervals(their array (k,)) -> their (low, high), arrays (k,).
    """
    entry = results[group] = {"n": n}
    try:
        found = values()
        if not np.isfinite(list(found.values())).all():
            raise ValueError(f"{group}: a value is not finite: {found}")
        entry["values"] = {key: float(value) for key, value in found.items()}
        if intervals:
            ends = np.stack(intervals(np.array(list(found.values()))), 1)
            entry["intervals"] = {key: its.tolist() for key, its in zip(found, ends, strict=True)}
    except ValueError as error:
        entry["reason"] = str(error)


def jackknife(statistic, n, most=np.inf):
    """For `attempt`: intervals around the values, of what lies between 0 and `most`."""
    return lambda values: np.clip(metrics.jackknife(statistic, n, centre=values), 0, most)


def compare(real, other, features, other_features, intervals=True) -> dict:
    """Two sets of images by colour and features; `other` has a multiple of `real`'s number.

    Distances of features grow with the inequality of numbers: there the first image of each tile.
    The first image of tile i is tile i's: drawn from it, or (but for an odd one) of its class.
    """
    results, n, count = {}, len(other), len(real)
    per_tile = n // max(count, 1)
    rows = rows_of(per_tile)
    thin, other_thin = (metrics.thin(images, INTERVAL_PIXELS) for images in (real, other))

    def colour(tiles):
        return np.array(list(metrics.colour_shift(
            [thin[i] for i in tiles], [other_thin[i] for i in rows(tiles)]).values()))

    attempt(results, "colour", n, lambda: metrics.colour_shift(real, other),
            intervals and jackknife(colour, count))
    for name, a in features.items():
        b = other_features[name][::max(per_tile, 1)]

        def kernel(tiles):
            return np.array([metrics.kernel_distance(a[tiles], b[tiles], paired=True)])

        def frechet(tiles):
            return np.array([metrics.frechet_distance(a[tiles], b[tiles])])

        def overlap(tiles):
            return np.array(list(metrics.precision_recall_density_coverage(
                a[tiles], b[tiles]).values()))

        attempt(results, f"frechet:{name}", len(b),
                lambda: {"frechet_distance": metrics.frechet_distance(a, b)},
                intervals and jackknife(frechet, count))
        attempt(results, f"kernel:{name}", len(b),
                lambda: {"kernel_distance": metrics.kernel_distance(a, b, paired=True)},
                intervals and (lambda _: metrics.bootstrap(kernel, count, distinct=True)))
        attempt(results, f"overlap:{name}", len(b),
                lambda: metrics.precision_recall_density_coverage(a, b),
                intervals and jackknife(overlap, count, SHARES))
    return results


def compare_pairs(real, other, features, other_features, training) -> dict:
    """Images against the tile each was drawn from, and against the training tiles."""
    results, n, count = {}, len(other), len(real)
    per_tile = n // count
    rows = rows_of(per_tile)
    for name, conditions in features.items():
        generated = other_features[name]
        for group, its in (("fidelity", (conditions, generated)),
                           ("centred", centred(conditions, generated))):
            cosines = cache(partial(tile_cosines, *its, per_tile))
            attempt(results, f"{group}:{name}", n,
                    lambda: dict(zip(("cosine", "shuffled", "margin"), cosines().mean(1))),
                    lambda _: metrics.bootstrap(lambda tiles: cosines()[:, tiles].mean(1), count))

        def screen(tiles):
            return metrics.memorisation_screen(generated[rows(tiles)], conditions[np.array(tiles)],
                                               np.stack(present(training[name])))

        attempt(results, f"memorisation:{name}", n, lambda: screen(range(count)), lambda _:
                metrics.bootstrap(lambda tiles: np.array(list(screen(tiles).values())), count))
    nuclei, drawn_nuclei = (np.array([metrics.nuclei_density(image) for image in images])
                            for images in (real, other))
    of_tile = np.repeat(nuclei, per_tile)
    attempt(results, "nuclei", n,
            lambda: dict(zip(("pearson", "spearman"),
                             correlations(*varied(of_tile, drawn_nuclei)))),
            lambda _: metrics.bootstrap(lambda tiles: correlations(
                of_tile[rows(tiles)], drawn_nuclei[rows(tiles)]), count))
    return results


def control(models, held_out, training, training_images) -> dict:
    """The memorisation screen of near copies, training tiles after a VAE round trip: all nearer.

    Without it a screen that says "no nearer" might be one that could not say otherwise.
    """
    results, copies = {}, [round_trip(models.pipeline, Image.fromarray(image))
                           for image in training_images]
    for name, encoder in models.encoders.items():
        attempt(results, f"memorisation:{name}", len(copies), lambda: metrics.memorisation_screen(
            np.stack(embed(encoder, copies)), held_out[name], np.stack(present(training[name]))))
    return results


def rows_of(per_tile):
    """Tile numbers (n,) → numbers of their images (n · per_tile,)."""
    return lambda tiles: (np.asarray(tiles)[:, None] * per_tile + np.arange(per_tile)).ravel()


def centred(conditions, generated):
    """Both less the conditions' mean: embeddings that share a large part have cosines near 1."""
    mean = conditions.mean(0)
    return conditions - mean, generated - mean


def tile_cosines(conditions, generated, per_tile):
    """(3, T): mean cosine of a tile's images to it, to the other tiles, and the difference."""
    if len(conditions) < 2:
        raise ValueError("cosine fidelity: got 1 tile; needs 2 to shuffle pairs")
    own, *others = (
        metrics.cosine_fidelity(np.repeat(np.roll(conditions, shift, 0), per_tile, 0), generated)
        .reshape(-1, per_tile).mean(1) for shift in range(len(conditions)))
    return np.stack([own, np.mean(others, 0), own - np.mean(others, 0)])


def varied(x, y):
    """Both as given. Raises: ValueError if one does not vary: no correlation then."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError(f"nuclei correlation: {len(x)} images of one density; needs variation")
    return x, y


def correlations(x, y):
    """(Pearson, Spearman) of (n,) and (n,); 0 where one does not vary, as resamples may not."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.zeros(2)
    ranks = []
    for values in (x, y):  # of equal ones the mean rank
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - counts / 2)[inverse])
    return np.array([np.corrcoef(x, y)[0, 1], np.corrcoef(*ranks)[0, 1]])


def noise_floor(samples, features, seed) -> dict:
    """`compare` of two random halves of the real tiles, mean of FLOOR_SPLITS splits.

    Each class is halved, as the drawn sets have the real tiles' classes too.
    """
    generator, half, parts = np.random.default_rng(seed), len(samples) // 2, []
    real = [np.array(sample.image) for sample in samples]
    labels = np.array([str(sample.tile.label) for sample in samples])
    for _ in range(FLOOR_SPLITS):
        order = generator.permutation(len(real))
        order = order[np.argsort(labels[order], kind="stable")]
        a, b = order[:2 * half:2], order[1:2 * half:2]
        parts.append(compare([real[i] for i in a], [real[i] for i in b],
                             *({name: rows[side] for name, rows in features.items()}
                               for side in (a, b)), intervals=False))
    floor = {}
    for group, first in parts[0].items():
        failed = next((part[group] for part in parts if "reason" in part[group]), None)
        floor[group] = failed or {"n": half, "values": {
            key: float(np.mean([part[group]["values"][key] for part in parts]))
            for key in first["values"]}}
    return floor


def present(training):
    """What was given. Raises: ValueError if it is empty."""
    if not training:
        raise ValueError("no training tile of the run lies unchanged where tiles.json says")
    return training


def recolour(images, training_images):
    """The colour-only baseline: images with the training tiles' CIELAB mean and deviation."""
    own, target = (metrics.reinhard(metrics.tissue_pixels(its, metrics.PIXELS_PER_IMAGE))
                   for its in (images, present(training_images)))
    return [metrics.reinhard_transfer(image, *target, *own) for image in images]


def classify_by_colour(samples) -> dict:
    """How well mean RGB alone tells the real tiles' classes: nearest centroid, leave one out."""
    labels = np.array([str(sample.tile.label) for sample in samples])
    means = np.array([np.array(sample.image).mean((0, 1)) for sample in samples])
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2 or counts.min() < 2:
        raise ValueError(f"colour classifier: got classes of {counts.tolist()} tiles; needs two "
                         "classes or more, of two tiles or more each")
    others, hits = ~np.eye(len(labels), dtype=bool), 0
    for i, label in enumerate(labels):
        centroids = [means[(labels == name) & others[i]].mean(0) for name in names]
        hits += names[np.linalg.norm(centroids - means[i], axis=1).argmin()] == label
    return {"accuracy": hits / len(labels), "largest_class": counts.max() / len(labels)}


def key_numbers(images, features, count) -> dict:
    """What both change against base: lab_mean in % of base's, gain in cosine; with intervals."""
    key, n = {}, len(images.get("both", ()))
    if not {"base", "both"} <= images.keys():
        return key
    rows = rows_of(n // count)
    thin = {name: metrics.thin(images[name], INTERVAL_PIXELS) for name in ("real", "base", "both")}

    def percent(tiles, images=thin):
        base, both = (metrics.colour_shift([images["real"][i] for i in tiles],
                                           [images[name][i] for i in rows(tiles)])["lab_mean"]
                      for name in ("base", "both"))
        return np.array([100 * both / base])

    attempt(key, "colour_percent", n, lambda: {"value": percent(range(count), images)[0]},
            jackknife(percent, count))
    for name, conditions in features["real"].items():
        for group, prepare in (("gain", lambda *its: its), ("gain_centred", centred)):
            gains = cache(lambda: np.subtract(*(  # used within this round of the loop only
                tile_cosines(*prepare(conditions, features[arm][name]), n // count)[0]
                for arm in ("both", "base"))))
            attempt(key, f"{group}:{name}", n, lambda: {"value": gains().mean()}, lambda _:
                    metrics.bootstrap(lambda tiles: gains()[tiles].mean(keepdims=True), count))
    return key


@torch.no_grad()
def embed(encoder, images) -> list[np.ndarray]:
    """Images (H, W, 3) uint8 → embeddings (E,) float64, the mean over an image's tokens."""
    return [encoder(Image.fromarray(image))[0].mean(0).double().cpu().numpy() for image in images]


@torch.no_grad()
def round_trip(pipeline, image) -> np.ndarray:
    """What the VAE makes of a tile, uint8 (H, W, 3): no generation can be nearer to it."""
    pixels = image_to_tensor(image)[None].to(pipeline.device)
    return np.array(pipeline.decode(pipeline.vae.encode(pixels)[0]))
