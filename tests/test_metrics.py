"""Metrics: against scipy and scikit-image, brute force, known answers, and procedural tiles."""

import inspect
from statistics import NormalDist

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from pixcell_min.tools import metrics, synthetic
from pixcell_min.tools.metrics import (
    SCREEN_SAMPLES,
    STAIN_PIXELS,
    TISSUE_DENSITY,
    bootstrap,
    colour_shift,
    cosine_fidelity,
    frechet_distance,
    jackknife,
    kernel_distance,
    macenko,
    memorisation_screen,
    nearest_neighbours,
    nuclei_density,
    optical_density,
    precision_recall_density_coverage,
    reinhard,
    reinhard_transfer,
    rgb_to_lab,
    stain_densities,
    thin,
    tissue_mask,
    tissue_pixels,
    wasserstein1,
)

TISSUES = ("STR", "TUM", "NORM", "LYM")
WHITE = np.full((8, 8, 3), 255, np.uint8)
KEYS = ["lab_l", "lab_a", "lab_b", "lab_mean", "haematoxylin", "eosin", "macenko_angle_h",
        "macenko_max_h", "macenko_angle_e", "macenko_max_e", "reinhard_mean", "reinhard_std"]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def tiles(laboratory, seeds=range(2)):
    return [np.asarray(synthetic.render_tile(seed, tissue, laboratory, 128))
            for seed in seeds for tissue in TISSUES]


@pytest.fixture(scope="module")
def first():
    return tiles(synthetic.FIRST)


@pytest.fixture(scope="module")
def second():
    return tiles(synthetic.SECOND)


def pixels_of(density, vectors):
    """uint8 pixels (n, 3) of densities (n, 2) in OD, base 10, on glass of 255."""
    return np.rint(255 * 10.0 ** -(density @ vectors)).clip(0, 255).astype(np.uint8)


def degrees(a, b):
    return np.degrees(np.arccos((a * b).sum(-1).clip(-1, 1)))


# ---------------------------------------------------------------- tissue and colour spaces


def test_optical_density_is_base_ten_over_255_and_finite_at_black():
    levels = np.array([[255, 128, 0]], np.uint8)
    expected = [[0, np.log10(255 / 128), np.log10(255)]]
    np.testing.assert_allclose(optical_density(levels), expected, atol=1e-12)
    assert optical_density(levels).max() < 2.41 and optical_density(levels).dtype == np.float64


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8),
                                   np.zeros(3, np.uint8)])
@pytest.mark.parametrize("function", [optical_density, rgb_to_lab, nuclei_density])
def test_what_is_no_rgb_image_is_refused(function, image):
    with pytest.raises(ValueError, match="expected uint8 RGB"):
        function(image)


def test_greys_up_to_227_are_tissue():
    grey = np.repeat(np.array([[227, 228, 255]], np.uint8)[..., None], 3, -1)
    assert tissue_mask(grey).tolist() == [[True, False, False]] and TISSUE_DENSITY == 0.15


def test_procedural_glass_of_both_laboratories_is_background():
    for laboratory in synthetic.LABORATORIES.values():
        tile = np.asarray(synthetic.render_tile(3, "BACK", laboratory))
        assert tissue_mask(tile).mean() < 0.02


def test_thin_keeps_tissue_only_and_at_most_so_many_of_each_image(first):
    images = [first[0], WHITE, first[1]]
    thinned = thin(images, 50)
    assert [image.shape for image in thinned] == [(1, 50, 3), (1, 0, 3), (1, 50, 3)]
    assert all(tissue_mask(image).all() for image in thinned)
    np.testing.assert_array_equal(tissue_pixels(images, 50), tissue_pixels(thinned, 50))
    assert len(tissue_pixels(images)) == sum(tissue_mask(image).sum() for image in images)


def test_thin_takes_pixels_evenly_spaced_in_raster_order(first):
    pixels = tissue_pixels(first[:1])
    spaced = pixels[np.linspace(0, len(pixels) - 1, 20).astype(int)]
    assert (tissue_pixels(first[:1], 20) == spaced).all()


def test_background_alone_is_refused():
    with pytest.raises(ValueError, match="2 images hold background alone"):
        tissue_pixels([WHITE, WHITE])
    with pytest.raises(ValueError, match="background alone"):
        colour_shift([WHITE], [WHITE])


def test_lab_agrees_with_scikit_image(rng):
    color = pytest.importorskip("skimage.color")
    pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    # 0.01: skimage rounds the sRGB matrix to six digits
    np.testing.assert_allclose(rgb_to_lab(pixels), color.rgb2lab(pixels), atol=0.01)


def test_greys_have_no_colour_and_white_is_100():
    lab = rgb_to_lab(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1))
    assert np.abs(lab[:, 1:]).max() < 1e-9
    np.testing.assert_allclose(lab[[0, 255], 0], [0, 100], atol=1e-9)


def test_lab_comes_back_to_the_same_pixels(rng):
    pixels = rng.integers(0, 256, (2000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(metrics._lab_to_rgb(rgb_to_lab(pixels)), pixels)


def test_stain_densities_are_six_times_those_of_scikit_image(rng):
    color = pytest.importorskip("skimage.color")
    pixels = rng.integers(1, 256, (40, 50, 3), dtype=np.uint8)
    # skimage divides by log(1e-6), six decades, and cuts at zero
    np.testing.assert_allclose(
        stain_densities(pixels).clip(0), 6 * color.rgb2hed(pixels)[..., :2], atol=1e-6)


def test_stain_densities_recover_what_was_mixed(rng):
    density = rng.uniform(0, 0.8, (500, 2))
    got = stain_densities(pixels_of(density, metrics.RUIFROK[:2]))
    np.testing.assert_allclose(got, density, atol=0.03)  # grey levels are rounded


# ---------------------------------------------------------------- stain vectors


@pytest.mark.parametrize("laboratory", synthetic.LABORATORIES.values(), ids=lambda x: x.name)
@pytest.mark.parametrize("share", [0.04, 0.4])
def test_macenko_finds_two_known_stains(rng, laboratory, share):
    vectors = np.array([laboratory.haematoxylin, laboratory.eosin])
    density = rng.uniform(0.3, 0.9, (20000, 2))  # mixed everywhere but in `share` of each stain
    pure = rng.random(20000)
    density[pure < share, 1] = density[pure > 1 - share, 0] = 0
    got, maxima = macenko(pixels_of(density, vectors))
    assert degrees(got, vectors).max() < 2
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(maxima, np.percentile(density, 99, axis=0), atol=0.03)


def test_macenko_of_one_stain_gives_it_twice(rng):
    vector = np.array([synthetic.FIRST.haematoxylin])
    got, _ = macenko(pixels_of(rng.uniform(0.5, 1, (5000, 1)), vector))
    assert degrees(got, vector).max() < 2


def test_macenko_needs_enough_tissue():
    few = np.full((STAIN_PIXELS - 1, 3), 120, np.uint8)
    with pytest.raises(ValueError, match=f"got {len(few)} tissue pixels; needs >= 100"):
        macenko(np.concatenate([few, WHITE.reshape(-1, 3)]))


def test_reinhard_moves_tissue_to_the_given_statistics_and_leaves_glass(first, second):
    own, target = (reinhard(tissue_pixels(images)) for images in (first, second))
    moved = [reinhard_transfer(image, *target, *own) for image in first]
    tissue = np.concatenate([new[tissue_mask(old)]
                             for new, old in zip(moved, first, strict=True)])
    np.testing.assert_allclose(reinhard(tissue), target, atol=0.5)  # rounding, clipped colours
    for new, old in zip(moved, first, strict=True):
        assert new.dtype == np.uint8
        np.testing.assert_array_equal(new[~tissue_mask(old)], old[~tissue_mask(old)])
        np.testing.assert_array_equal(reinhard_transfer(old, *own, *own), old)
    with pytest.raises(ValueError, match="without spread"):
        reinhard_transfer(first[0], *target, own[0], np.zeros(3))


# ---------------------------------------------------------------- distances of colours


@pytest.mark.parametrize("sizes", [(50, 50), (30, 77), (1, 5)])
def test_wasserstein_agrees_with_scipy(rng, sizes):
    stats = pytest.importorskip("scipy.stats")
    a, b = rng.normal(0, 1, sizes[0]), rng.integers(0, 4, sizes[1])  # b has ties
    assert wasserstein1(a, b) == pytest.approx(stats.wasserstein_distance(a, b), abs=1e-12)
    assert wasserstein1(a, a + 3) == pytest.approx(3) and wasserstein1(b, b) == 0


def test_colour_shift_is_zero_to_itself_and_large_between_laboratories(first, second):
    nothing, part, shift = (colour_shift(first, other) for other in (first, first[4:], second))
    assert list(shift) == KEYS and all(type(value) is float for value in shift.values())
    assert max(nothing.values()) == 0
    assert shift["lab_mean"] > 2 * part["lab_mean"]
    assert shift["lab_mean"] == pytest.approx(
        (shift["lab_l"] + shift["lab_a"] + shift["lab_b"]) / 3)
    vectors = [np.array([x.haematoxylin, x.eosin]) for x in synthetic.LABORATORIES.values()]
    truth = degrees(*vectors)
    assert shift["macenko_angle_h"] == pytest.approx(truth[0], abs=6)
    assert shift["macenko_angle_e"] == pytest.approx(truth[1], abs=6)


def test_colour_shift_is_made_of_the_functions_beside_it(first, second):
    a, b = tissue_pixels(first, 4000), tissue_pixels(second, 4000)
    shift = colour_shift(first, second)
    (mean_a, std_a), (mean_b, std_b) = reinhard(a), reinhard(b)
    lab_a, lab_b, stain_a, stain_b = *map(rgb_to_lab, (a, b)), *map(stain_densities, (a, b))
    assert shift["lab_a"] == wasserstein1(lab_a[:, 1], lab_b[:, 1])
    assert shift["eosin"] == wasserstein1(stain_a[:, 1], stain_b[:, 1])
    assert shift["reinhard_mean"] == pytest.approx(np.sqrt(np.square(mean_a - mean_b).sum()))
    assert shift["reinhard_std"] == pytest.approx(np.sqrt(np.square(std_a - std_b).sum()))
    assert shift["macenko_max_h"] == pytest.approx(abs(macenko(a)[1][0] - macenko(b)[1][0]))


# ---------------------------------------------------------------- distances of features


@pytest.mark.parametrize("n, m, d", [(60, 50, 6), (12, 9, 20)])
def test_frechet_agrees_with_the_matrix_root(rng, n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = rng.normal(0, 1, (n, d)), rng.normal(0.5, 2, (m, d))
    # a ridge for the reference alone: sqrtm of a singular matrix is inexact
    covariances = [np.cov(x.T) + 1e-10 * np.eye(d) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * d)


def test_kernel_distance_agrees_with_three_loops(rng):
    a, b = rng.normal(0, 1, (7, 4)), rng.normal(0.3, 1, (9, 4))

    def k(x, y):
        return (float(x @ y) / 4 + 1) ** 3

    expected = (np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
                + np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
                - 2 * np.mean([k(x, y) for x in a for y in b]))
    assert kernel_distance(a, b) == pytest.approx(expected)
    pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b[:7]) if i != j]
    assert kernel_distance(a, b[:7], paired=True) - kernel_distance(a, b[:7]) == pytest.approx(
        2 * np.mean([k(x, y) for x in a for y in b[:7]]) - 2 * np.mean([k(*pair) for pair in pairs]))
    with pytest.raises(ValueError, match="got 7 and 9 samples; pairs need as many"):
        kernel_distance(a, b, paired=True)


def halves(rng):
    """Two sets of four classes, two of each, as the noise floor takes them."""
    classes = np.repeat(rng.normal(0, 1, (4, 3)), 2, 0)
    return [classes + 0.3 * rng.normal(0, 1, (8, 3)) for _ in range(2)]


def pairs(rng):
    """Samples and what was made from each; as a set it is distributed like them."""
    a = rng.normal(0, 1, (8, 3))
    return a, 0.9 * a + np.sqrt(1 - 0.9**2) * rng.normal(0, 1, (8, 3))


@pytest.mark.parametrize("draw, paired", [
    (lambda rng: rng.normal(0, 1, (2, 8, 3)), False), (halves, True), (pairs, True)])
def test_kernel_distance_has_no_bias(rng, draw, paired):
    draws = [kernel_distance(*draw(rng), paired=paired) for _ in range(400)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 20 and min(draws) < 0
    if paired:  # as it would be if the products of pairs were not left out
        draws = [kernel_distance(*draw(rng)) for _ in range(400)]
        assert np.mean(draws) < -8 * np.std(draws) / 20


@pytest.mark.parametrize("k", [1, 3])
def test_prdc_agrees_with_loops(rng, k):
    real, generated = rng.normal(0, 1, (20, 3)), rng.normal(0.8, 0.7, (15, 3))

    def radius(points, i):
        others = np.delete(points, i, 0)
        return sorted(np.linalg.norm(points[i] - x) for x in others)[k - 1]

    in_real = np.array([[np.linalg.norm(x - y) <= radius(real, i) for y in generated]
                        for i, x in enumerate(real)])
    in_generated = np.array([[np.linalg.norm(x - y) <= radius(generated, j)
                              for j, y in enumerate(generated)] for x in real])
    got = precision_recall_density_coverage(real, generated, k)
    assert got == pytest.approx({
        "precision": np.mean([in_real[:, j].any() for j in range(15)]),
        "recall": np.mean([in_generated[i].any() for i in range(20)]),
        "density": in_real.sum() / (k * 15),
        "coverage": np.mean([in_real[i].any() for i in range(20)])})
    assert 0 < got["precision"] < 1 and 0 < got["recall"] < 1 and 0 < got["coverage"] < 1


def test_cosines_and_neighbours_by_hand():
    a, b = np.array([[2.0, 0], [0, 1]]), np.array([[3.0, 3], [0, -1]])
    np.testing.assert_allclose(cosine_fidelity(a, b), [np.sqrt(0.5), -1])
    np.testing.assert_allclose(nearest_neighbours(a, b), [1 - np.sqrt(0.5)] * 2)
    np.testing.assert_allclose(nearest_neighbours(a, -a[:1]), [2, 1])


def test_the_screen_sees_copies_and_lets_fresh_samples_pass(rng):
    training, real, fresh = (rng.normal(0, 1, (n, 12)) for n in (200, 400, 400))
    copies = training[:40] + 0.01 * rng.normal(0, 1, (40, 12))
    seen, passed = (memorisation_screen(x, real, training) for x in (copies, fresh))
    assert seen["closer_share"] == 1 and seen["generated_median"] < 0.01 * seen["real_median"]
    assert 0 < passed["closer_share"] < 0.12
    assert passed["generated_median"] == pytest.approx(passed["real_median"], rel=0.1)


@pytest.mark.parametrize("function, rows, needs", [
    (frechet_distance, 1, 2), (kernel_distance, 1, 2),
    (precision_recall_density_coverage, 5, 6), (cosine_fidelity, 0, 1),
    (nearest_neighbours, 0, 1)])
def test_too_few_samples_are_named(function, rows, needs):
    good, few = np.ones((8, 4)), np.ones((rows, 4))
    for sets in ((good, few), (few, good)):
        with pytest.raises(ValueError, match=f"{function.__name__}: got {rows} samples; "
                                             f"needs >= {needs}"):
            function(*sets)


def test_the_screen_and_wasserstein_name_too_few():
    few = np.ones((SCREEN_SAMPLES - 1, 4))
    with pytest.raises(ValueError, match="got 19 samples; needs >= 20"):
        memorisation_screen(few, few, few)
    with pytest.raises(ValueError, match="got 0 and 3 numbers"):
        wasserstein1([], [1, 2, 3])


@pytest.mark.parametrize("features, line", [
    (np.full((8, 4), np.nan), "NaN"), (np.ones((8, 5)), "one d"), (np.ones(8), "one d"),
    (np.zeros((8, 4)), "all zero"), (np.ones((9, 4)), "one for each")])
def test_odd_features_are_refused(features, line):
    with pytest.raises(ValueError, match=line):
        cosine_fidelity(np.ones((8, 4)), features)


# ---------------------------------------------------------------- intervals


def test_bootstrap_covers_the_mean_about_as_often_as_it_says(rng):
    def covered(distinct):
        x = rng.normal(0, 1, 40)
        seed = int(rng.integers(1e6))
        low, high = bootstrap(lambda i: x[i].mean(), 40, 200, seed, 0.9, distinct)
        return low <= 0 <= high

    for distinct in (False, True):
        assert 0.82 < np.mean([covered(distinct) for _ in range(200)]) < 0.96


def test_bootstrap_draws_n_or_half_of_them_and_repeats_itself():
    drawn = []
    for distinct in (False, True):
        bootstrap(lambda i: drawn.append(i) or 0.0, 9, repeats=3, distinct=distinct)
    assert [len(i) for i in drawn] == [9] * 3 + [4] * 3
    assert all(len(set(i)) == 4 for i in drawn[3:]) and len(set(drawn[0])) < 9
    assert all(0 <= i.min() and i.max() < 9 for i in drawn)
    x = np.random.default_rng(0).normal(0, 1, 30)
    one, same, other = (bootstrap(lambda i: x[i].mean(), 30, seed=seed) for seed in (1, 1, 2))
    assert one == same != other and type(one[0]) is float


def test_bootstrap_of_an_array_gives_arrays():
    x = np.random.default_rng(0).normal(0, 1, (30, 2))
    low, high = bootstrap(lambda i: x[i].mean(0), 30)
    assert low.shape == high.shape == (2,)
    one = bootstrap(lambda i: x[i, 1].mean(), 30)
    assert (low[1], high[1]) == pytest.approx(one)


@pytest.mark.parametrize("options", [dict(n=1), dict(repeats=0), dict(level=1.0)])
def test_bootstrap_refuses(options):
    with pytest.raises(ValueError, match="needs n >= 2"):
        bootstrap(**{"statistic": np.mean, "n": 5, **options})


def test_jackknife_of_the_mean_is_the_normal_interval_and_of_an_array_arrays():
    x = np.random.default_rng(0).normal(0, 1, (30, 2))
    low, high = jackknife(lambda i: x[i].mean(0), 30, 0.9)
    reach = NormalDist().inv_cdf(0.95) * x.std(0, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose((low, high), (x.mean(0) - reach, x.mean(0) + reach), rtol=1e-12)
    one = jackknife(lambda i: x[i, 1].mean(), 30, 0.9)
    assert one == pytest.approx((low[1], high[1])) and type(one[0]) is float
    other = jackknife(lambda i: x[i, 1].mean(), 30, 0.9, centre=5.0)
    assert np.mean(other) == pytest.approx(5) and np.ptp(other) == pytest.approx(np.ptp(one))


def test_jackknife_does_not_shift_a_distance_as_the_bootstrap_does(rng):
    a, b = rng.normal(0, 1, (40, 5)), rng.normal(0.1, 1, (40, 5))

    def distance(i):
        return frechet_distance(a[i], b[i])

    assert np.mean(jackknife(distance, 40)) == pytest.approx(distance(np.arange(40)))
    assert np.mean(bootstrap(distance, 40)) > 1.3 * distance(np.arange(40))


@pytest.mark.parametrize("options", [dict(n=1), dict(level=0.0)])
def test_jackknife_refuses(options):
    with pytest.raises(ValueError, match="needs n >= 2"):
        jackknife(**{"statistic": np.mean, "n": 5, **options})


# ---------------------------------------------------------------- nuclei


class Counted(synthetic.Section):
    """A section that remembers where it drew nuclei: (points, density at their centre)."""

    drawn: list = []

    def nuclei(self, weight, spacing, tries, axes, *arguments, tone=1.3, **options):
        state = self.rng.bit_generator.state
        points = self.scatter(weight, spacing, tries)
        self.rng.bit_generator.state = state
        if tone >= 0.5 and min(axes) >= 5:  # neither ghosts nor nuclear dust
            Counted.drawn.append((points, tone))
        super().nuclei(weight, spacing, tries, axes, *arguments, tone=tone, **options)


def count(seed, tissue, monkeypatch):
    """Densities of a tile, and how many of its nuclei lie in it and are still to be seen."""
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "Section", Counted)
        Counted.drawn = []
        densities = synthetic.render_densities(seed, tissue)
    visible = 0
    for points, tone in Counted.drawn:  # later tissue may lie over a nucleus: ask its density
        inside = points[((points >= 1) & (points < 255)).all(1)].astype(int)
        visible += sum(densities[0, y - 1 : y + 2, x - 1 : x + 2].mean() >= tone / 2
                       for x, y in inside)
    return densities, visible


def test_nuclei_density_ranks_tiles_as_their_counts_do(monkeypatch):
    stats = pytest.importorskip("scipy.stats")
    counted = [(seed, *count(seed, tissue, monkeypatch))
               for seed in range(3) for tissue in synthetic.TISSUES]
    counts = [visible for _, _, visible in counted]
    assert max(counts) > 200 and min(counts) == 0
    got = [[nuclei_density(synthetic.stain(densities, laboratory, seed))
            for seed, densities, _ in counted]
           for laboratory in (synthetic.FIRST, synthetic.SECOND)]
    for values in got:
        assert stats.spearmanr(values, counts)[0] > 0.9
        # per 10,000 px: about the count itself, so the unit is right
        assert np.sum(values) * 6.5536 == pytest.approx(np.sum(counts), rel=0.35)
    assert stats.spearmanr(*got)[0] > 0.95


def test_an_empty_tile_has_no_nuclei():
    assert nuclei_density(WHITE.repeat(8, 0).repeat(8, 1)) == 0


def test_real_tiles_of_crowded_tissue_have_more_nuclei():
    folder = SHARED / "data" / "target_nct"
    if not folder.is_dir():
        pytest.skip(f"no real tiles in {folder}")
    density = {
        name: np.median([nuclei_density(np.asarray(Image.open(path).convert("RGB")))
                         for path in sorted((folder / name).iterdir())])
        for name in ("LYM", "TUM", "ADI", "MUC")}
    assert density["LYM"] > density["TUM"] > 1.5 * max(density["ADI"], density["MUC"]), density


def test_public_functions_that_raise_say_so():
    for name, function in inspect.getmembers(metrics, inspect.isfunction):
        if function.__module__ == metrics.__name__ and not name.startswith("_"):
            raises = "raise ValueError" in inspect.getsource(function)
            assert not raises or "Raises: ValueError" in function.__doc__, name
