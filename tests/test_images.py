"""Grids keep their pixels; PNG files carry their settings and depend on nothing else."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from pixcell_min.images import CAPTION_HEIGHT, GAP, image_grid, read_settings, save_png


def picture(seed, size=(32, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_grid_keeps_every_pixel_in_place():
    rows = [[picture(0), picture(1), picture(2)], [picture(3), picture(4), picture(5)]]
    grid = np.asarray(image_grid(rows, ("real", "base", "adapted")))
    assert grid.shape == (CAPTION_HEIGHT + 2 * 24 + GAP, 3 * 32 + 2 * GAP, 3)
    for row in range(2):
        for column in range(3):
            top, left = CAPTION_HEIGHT + row * (24 + GAP), column * (32 + GAP)
            assert (grid[top:top + 24, left:left + 32] == np.asarray(rows[row][column])).all()
    assert (grid[CAPTION_HEIGHT + 24:CAPTION_HEIGHT + 24 + GAP] == 255).all()  # between the rows
    assert (grid[CAPTION_HEIGHT:, 32:32 + GAP] == 255).all()


def test_each_column_has_its_caption():
    blank = Image.new("RGB", (64, 64), "white")
    grid = np.asarray(image_grid([[blank, blank]], ("real", "")))[:CAPTION_HEIGHT]
    assert grid[:, :64].min() < 128 and (grid[:, 64:] == 255).all()
    other = np.asarray(image_grid([[blank, blank]], ("base", "")))[:CAPTION_HEIGHT]
    assert (grid != other).any()


@pytest.mark.parametrize("rows", [[], [[]], [[picture(0)]], [[picture(0)] * 2, [picture(0)] * 3]])
def test_rows_must_match_captions(rows):
    with pytest.raises(ValueError, match="2 captions needs rows of 2 images"):
        image_grid(rows, ("real", "base"))


def test_png_is_lossless_and_carries_its_settings(tmp_path):
    settings, path = {"seed": 3, "scheduler": "ddim", "µ": [1.5, None]}, tmp_path / "new" / "a.png"
    save_png(path, picture(0), settings)
    with Image.open(path) as image:
        assert (np.asarray(image) == np.asarray(picture(0))).all() and image.mode == "RGB"
        assert json.loads(image.info["pixcell_min"]) == settings
    assert read_settings(path) == settings


def test_bytes_depend_on_pixels_and_settings_alone(tmp_path):
    first, second, other, pixels = (tmp_path / f"{name}.png"
                                    for name in ("first", "second", "other", "pixels"))
    save_png(first, picture(0), {"a": 1, "b": 2})
    save_png(second, picture(0), {"b": 2, "a": 1})
    save_png(other, picture(0), {"a": 1, "b": 3})
    save_png(pixels, picture(1), {"a": 1, "b": 2})
    contents = [path.read_bytes() for path in (first, second, other, pixels)]
    assert contents[0] == contents[1] and len(set(contents)) == 3


def test_a_png_without_settings_has_none(tmp_path):
    picture(0).save(tmp_path / "plain.png")
    assert read_settings(tmp_path / "plain.png") == {}


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")
    path = tmp_path / "a.png"
    save_png(path, picture(0), {"seed": 0})
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(ValueError, match="cannot be written"):
        save_png(path, picture(1), {"seed": 1})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
