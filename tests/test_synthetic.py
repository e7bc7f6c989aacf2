"""Synthetic tiles: reproducible, optically exact, and anatomically what their names say."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pixcell_min.tools import synthetic
from pixcell_min.tools.synthetic import (
    FIRST,
    LABORATORIES,
    SECOND,
    SIZES,
    TISSUES,
    main,
    render_densities,
    render_tile,
    stain,
    write_dataset,
)

GREY_ROUNDING = 0.5 + 1e-3  # grey levels: uint8 keeps half a level, float32 adds little


def clean(laboratory):
    """The same colours without lens, camera and day-to-day variation."""
    return dataclasses.replace(laboratory, spread=0.0, blur=0.0, noise=0.0)


@pytest.fixture(scope="module")
def densities():
    """Three tiles of every tissue, (3, 2, 256, 256)."""
    return {
        tissue: np.stack([render_densities(seed, tissue) for seed in range(3)])
        for tissue in TISSUES
    }


@pytest.mark.parametrize("tissue", TISSUES)
def test_densities_are_float32_finite_and_not_negative(tissue, densities):
    assert densities[tissue].dtype == np.float32
    assert densities[tissue].shape == (3, 2, 256, 256)
    assert np.isfinite(densities[tissue]).all() and densities[tissue].min() >= 0


@pytest.mark.parametrize("tissue", TISSUES)
def test_the_seed_decides_every_byte(tissue):
    first, again, other = (render_tile(seed, tissue, size=128).tobytes() for seed in (7, 7, 8))
    assert first == again and first != other


def test_the_tissue_is_drawn_by_the_seed():
    drawn = {seed: render_tile(seed, size=64).tobytes() for seed in range(20)}
    for seed, tile in drawn.items():
        matches = [
            tissue for tissue in TISSUES if render_tile(seed, tissue, size=64).tobytes() == tile
        ]
        assert len(matches) == 1
        drawn[seed] = matches[0]
    assert len(set(drawn.values())) >= 5


@pytest.mark.parametrize("size", [SIZES[0], 97, 256])
def test_tile_is_rgb_of_the_asked_size(size):
    for tissue in TISSUES:
        tile = render_tile(0, tissue, size=size)
        assert (tile.mode, tile.size) == ("RGB", (size, size))


@pytest.mark.parametrize("laboratory", LABORATORIES.values(), ids=LABORATORIES)
def test_stain_vectors_have_unit_length_and_keep_apart(laboratory):
    haematoxylin, eosin = np.array(laboratory.haematoxylin), np.array(laboratory.eosin)
    assert np.linalg.norm([haematoxylin, eosin], axis=1) == pytest.approx([1, 1])
    assert haematoxylin[0] > eosin[0] + 0.2  # red is what tells haematoxylin from eosin
    assert haematoxylin @ eosin < 0.95


@pytest.mark.parametrize("laboratory", LABORATORIES.values(), ids=LABORATORIES)
def test_beer_lambert_gives_the_densities_back(laboratory, densities):
    truth = densities["NORM"][0].reshape(2, -1)
    image = stain(densities["NORM"][0], clean(laboratory), seed=0).reshape(-1, 3).astype(float)
    optical_density = np.log(np.array(laboratory.background) / image) - laboratory.residual
    vectors = (
        np.array([laboratory.haematoxylin, laboratory.eosin]) * np.array(laboratory.gains)[:, None]
    )
    found = np.linalg.lstsq(vectors.T, optical_density.T, rcond=None)[0]
    # rounding by half a grey level moves -ln by at most 0.5 / grey in each of three channels
    gain = np.linalg.norm(np.linalg.pinv(vectors.T), 2)
    tolerance = gain * np.linalg.norm(GREY_ROUNDING / (image - GREY_ROUNDING), axis=1)
    assert (np.abs(found - truth) <= tolerance).all()
    assert np.abs(found - truth).mean() < 0.01


@pytest.mark.parametrize("laboratory", LABORATORIES.values(), ids=LABORATORIES)
def test_empty_glass_has_the_colour_of_background_and_residual(laboratory):
    image = stain(np.zeros((2, 64, 64), np.float32), clean(laboratory), seed=0)
    expected = np.array(laboratory.background) * np.exp(-laboratory.residual)
    assert np.abs(image - expected).max() <= GREY_ROUNDING


def test_blur_keeps_the_mean_and_softens_edges():
    board = np.indices((64, 64)).sum(0) % 2 * np.float32(0.2)
    densities = np.stack([board, board])
    sharp = stain(densities, clean(FIRST), 0).astype(float)
    soft = stain(densities, dataclasses.replace(clean(FIRST), blur=0.1), 0).astype(float)
    assert soft.std() < 0.5 * sharp.std()
    assert soft.mean() == pytest.approx(sharp.mean(), abs=0.5)


def test_noise_and_spread_have_the_stated_size():
    empty, grey = np.zeros((2, 256, 256), np.float32), np.full((2, 8, 8), 0.5, np.float32)
    noisy = stain(empty, dataclasses.replace(clean(FIRST), noise=2.5, background=(128.0,) * 3), 0)
    assert noisy.std() == pytest.approx(2.5, rel=0.05)
    varied = dataclasses.replace(clean(FIRST), spread=0.1)
    eosin = varied.eosin[2] * 0.5, varied.haematoxylin[2] * 0.5
    blue = [np.log(stain(grey, varied, seed)[..., 2].mean()) for seed in range(300)]
    assert np.std(blue) == pytest.approx(0.1 * np.hypot(*eosin), rel=0.15)


@pytest.mark.parametrize("tissue", ["LYM", "NORM", "STR", "TUM"])
def test_two_laboratories_show_the_same_tissue_in_other_colours(tissue):
    before = np.asarray(render_tile(3, tissue, FIRST)).astype(float)
    after = np.asarray(render_tile(3, tissue, SECOND)).astype(float)
    green = [image[..., 1].ravel() for image in (before, after)]  # both stains absorb green
    assert np.corrcoef(green)[0, 1] > 0.95
    ratio = [image[..., 2].mean() / image[..., 0].mean() for image in (before, after)]
    assert (
        ratio[0] > ratio[1] + 0.1
    )  # the second is redder: a shift well above tile-to-tile spread


def test_every_tissue_has_its_own_composition(densities):
    h, e = ({tissue: maps[:, i].mean() for tissue, maps in densities.items()} for i in (0, 1))
    dark = {tissue: (maps[:, 0] > 0.8).mean() for tissue, maps in densities.items()}
    assert h["LYM"] > h["TUM"] > h["STR"] and h["NORM"] > h["STR"]
    assert dark["LYM"] > 0.3 > dark["NORM"] > 0.1 > dark["STR"] > 0.02 > dark["MUC"]
    assert e["MUS"] > e["STR"] > e["MUC"] > e["ADI"]
    assert e["MUS"] / h["MUS"] > 2 > e["LYM"] / h["LYM"]
    assert dark["BACK"] < 0.001 and max(h["BACK"], e["BACK"]) < 0.02


def test_background_is_nearly_white_and_fat_mostly_empty():
    for laboratory in (FIRST, SECOND):
        for seed in range(3):
            image = np.asarray(render_tile(seed, "BACK", laboratory)).astype(int)
            assert image.mean() > 230 and np.ptp(image.mean((0, 1))) < 20
            assert (image.min(2) > 215).mean() > 0.99
    empty = [(render_densities(seed, "ADI").sum(0) < 0.05).mean() for seed in range(6)]
    assert np.mean(empty) > 0.5


def test_fibres_of_muscle_have_a_direction_and_lymphoid_tissue_has_none():
    def coherence(tissue, seed):
        down, right = np.gradient(render_densities(seed, tissue)[0])
        tensor = np.array([[right * right, right * down], [right * down, down * down]]).mean(
            (2, 3)
        )
        low, high = np.linalg.eigvalsh(tensor)
        return (high - low) / (high + low)

    assert np.mean([coherence("MUS", seed) for seed in range(4)]) > 0.4
    assert np.mean([coherence("LYM", seed) for seed in range(4)]) < 0.2


def test_nuclei_have_the_asked_size_and_keep_their_distance():
    section = synthetic.Section(np.random.default_rng(0), 256)
    points = section.scatter(np.ones((256, 256)), 14, 2000)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2)[~np.eye(len(points), dtype=bool)]
    assert len(points) > 200
    assert gaps.min() > 14 - np.sqrt(2)  # the occupancy map counts whole pixels
    cover = section.ellipses(
        np.array([[128.0, 100.0]]), np.zeros(1), np.array([20.0]), np.array([10.0])
    )[2]
    assert cover.sum() == pytest.approx(np.pi * 5 * 10, rel=0.08)
    rows, columns = np.nonzero(cover > 0.5)
    assert np.ptp(columns) + 1 == pytest.approx(20, abs=2.5) and columns.mean() == pytest.approx(
        128, abs=1
    )
    assert np.ptp(rows) + 1 == pytest.approx(10, abs=2.5) and rows.mean() == pytest.approx(
        100, abs=1
    )


@pytest.mark.parametrize("tissue", ["LYM", "STR"])
def test_the_density_of_nuclei_does_not_depend_on_the_size(tissue):
    small = np.mean([(render_densities(seed, tissue)[0] > 0.7).mean() for seed in range(12)])
    large = np.mean([(render_densities(seed, tissue, 512)[0] > 0.7).mean() for seed in range(12)])
    assert large == pytest.approx(small, rel=0.3)  # tiles of a tissue differ, by design


def test_scatter_follows_its_weight():
    weight = np.zeros((256, 256))
    weight[:, :128] = 1
    points = synthetic.Section(np.random.default_rng(0), 256).scatter(weight, 8, 1000)
    assert len(points) > 100 and points[:, 0].max() < 128


@pytest.mark.parametrize(
    "tissue, size", [("XXX", 256), ("TUM", SIZES[0] - 1), ("TUM", SIZES[1] + 1)]
)
def test_wrong_tissue_or_size_is_refused_in_one_line(tissue, size):
    with pytest.raises(ValueError, match="expected") as caught:
        render_densities(0, tissue, size)
    assert "\n" not in str(caught.value)


def test_dataset_has_class_folders_and_one_tile_per_seed(tmp_path):
    write_dataset(tmp_path / "set", 11, SECOND, seed=5, size=64)
    files = sorted(
        path.relative_to(tmp_path / "set").as_posix() for path in tmp_path.rglob("*.png")
    )
    tissues = [TISSUES[i % len(TISSUES)] for i in range(11)]
    assert files == sorted(f"{tissue}/{tissue}_{5 + i}.png" for i, tissue in enumerate(tissues))
    with Image.open(tmp_path / "set/LYM/LYM_8.png") as tile:
        assert tile.tobytes() == render_tile(8, "LYM", SECOND, 64).tobytes()


def test_command_line_writes_what_it_is_asked(tmp_path):
    out = tmp_path / "set"
    main(
        [
            "--out",
            str(out),
            "--count",
            "2",
            "--laboratory",
            "second",
            "--seed",
            "3",
            "--size",
            "64",
        ]
    )
    with Image.open(out / "BACK/BACK_4.png") as tile:
        assert tile.tobytes() == render_tile(4, "BACK", SECOND, 64).tobytes()
    assert len(list(out.rglob("*.png"))) == 2


@pytest.mark.parametrize(
    "flags",
    [["--count", "0"], ["--seed", "-1"], ["--size", "63"], ["--size", "1025"], ["--out", "."],
     ["--no-such-flag"]],
)
def test_command_line_refuses_in_one_line_with_status_2(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["--out", "new", *flags])
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("synthetic: error: ") and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_of_two_processes_that_draw_the_same_folder_the_first_to_finish_wins(tmp_path, monkeypatch):
    folder, write = tmp_path / "tiles", synthetic.write_dataset

    def write_while_another_finishes(*inputs):
        write(*inputs)
        folder.mkdir()
        (folder / "theirs.png").write_bytes(b"theirs")

    monkeypatch.setattr(synthetic, "write_dataset", write_while_another_finishes)
    assert synthetic.drawn_once(folder, 1, synthetic.SECOND, 0) == folder
    assert [path.name for path in folder.iterdir()] == ["theirs.png"]
    assert list(tmp_path.iterdir()) == [folder]
