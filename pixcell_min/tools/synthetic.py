"""Procedural colorectal H&E tiles at 0.5 µm/px: known anatomy and known optics from seeds alone.

    python -m pixcell_min.tools.synthetic --out tiles/first --count 90 --laboratory first
    python -m pixcell_min.tools.synthetic --out tiles/second --count 90 --laboratory second

A tile is two density maps, haematoxylin h and eosin e, seen through a laboratory's optics
(Beer-Lambert; stain vectors as in Ruifrok & Johnston 2001), natural logarithm:
    OD = h·gain_h·H + e·gain_e·E + residual        H, E unit vectors over R, G, B
    RGB = background·exp(-OD), blurred, plus noise  0 to 255
The same seed under two laboratories is the same tissue in other colours: a known domain shift.
It imitates no patient, slide or data set, and is no substitute for real tissue.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixcell_min.checks import OneLineParser, integer, one_line

TISSUES: tuple[str, ...] = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
SIZES = (64, 1024)  # px: below, no gland fits; above, use several tiles
PROCEDURAL_TILES = 72  # 8 of each tissue
PROCEDURAL_SEED = 10**9  # the base's pretraining used lower ones: the same tissue in another stain
MARGIN = 16  # px around the tile in which cells may lie, so that the border cuts some
ACROSS = np.pi / 2  # from the gradient of a field to its contour: along a fibre, around a gland


@dataclass(frozen=True)
class Laboratory:
    """One stain and one scanner: everything that turns density maps into colours."""

    name: str
    haematoxylin: tuple[float, float, float]  # absorption over R, G, B; unit length
    eosin: tuple[float, float, float]  # absorption over R, G, B; unit length
    gains: tuple[float, float]  # concentration of haematoxylin, eosin
    background: tuple[float, float, float]  # RGB of empty glass, 0 to 255
    residual: float  # uniform optical density of glass and mounting
    spread: float  # standard deviation of the logarithm of the gains from tile to tile
    blur: float  # weight of each neighbour in the three-tap lens blur, 0 to 1/3
    noise: float  # standard deviation of the camera noise, in grey levels


def _unit(*vector):
    """Scale a vector over R, G, B to length one."""
    return tuple((np.array(vector) / np.linalg.norm(vector)).tolist())


FIRST = Laboratory(
    name="first",  # blue-violet nuclei, pink eosin
    haematoxylin=_unit(0.68, 0.66, 0.32),
    eosin=_unit(0.13, 0.91, 0.39),
    gains=(1.0, 1.0),
    background=(244.0, 243.0, 246.0),
    residual=0.01,
    spread=0.1,
    blur=0.10,
    noise=1.5,
)
SECOND = Laboratory(
    name="second",  # purple nuclei, orange-red eosin, yellowish glass, softer lens
    haematoxylin=_unit(0.46, 0.79, 0.40),
    eosin=_unit(0.13, 0.78, 0.61),
    gains=(1.2, 0.85),
    background=(250.0, 245.0, 236.0),
    residual=0.02,
    spread=0.1,
    blur=0.16,
    noise=2.5,
)
LABORATORIES = {laboratory.name: laboratory for laboratory in (FIRST, SECOND)}


def _step(values, width=1.5):
    """Soft threshold at zero: 0 below -width/2, 1 above width/2, a ramp between."""
    return np.clip(values / width + 0.5, 0.0, 1.0)


def _bump(values, width):
    """Bell of height 1 at zero and 0 beyond two widths; no exp, which would cost half the tile."""
    return np.square((1 - np.square(values * (0.5 / width))).clip(0))


def _slope(field, points):
    """Angle of the gradient of `field` (size, size) at points (n, 2)."""
    column, row = np.clip(points.astype(int), 2, field.shape[0] - 3).T
    down = field[row + 2, column] - field[row - 2, column]
    return np.arctan2(down, field[row, column + 2] - field[row, column - 2])


def _enlarge(grid, box, width, height):
    """Bicubic enlargement of the part `box` (left, top, right, bottom) of a grid of noise."""
    cubic = Image.Resampling.BICUBIC
    # 1.3 gives back about the variance that the interpolation takes away
    return 1.3 * np.asarray(Image.fromarray(grid).resize((width, height), cubic, box))


class Section:
    """A slice of tissue in the making: `h`, `e` (size, size) float32 and the generator drawing it.

    All lengths are px of 0.5 µm; points are (n, 2) as x, y; fields are (size, size).
    """

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        self.h, self.e = np.zeros((2, size, size), np.float32)

    def uniform(self, low, high):
        """One number for the whole tile: what makes two tiles of a tissue differ."""
        return float(self.rng.uniform(low, high))

    def fill(self, h, e, where=1.0):
        """Replace what lies under the mask `where` (0 to 1) by densities h, e >= 0."""
        self.h = self.h * (1 - where) + np.maximum(h, 0) * where
        self.e = self.e * (1 - where) + np.maximum(e, 0) * where

    def add(self, h, e):
        """Lay thin material over everything."""
        self.h, self.e = self.h + h, self.e + e

    # ------------------------------------------------------------ fields

    def noise(self, scale):
        """Isotropic noise of zero mean and about unit variance with features of `scale` px."""
        cells = self.size / scale
        grid = self.rng.standard_normal((int(cells) + 5,) * 2, dtype=np.float32)
        left, top = 1 + self.rng.random(2)
        return _enlarge(grid, (left, top, left + cells, top + cells), self.size, self.size)

    def turned_grid(self):
        """Pixel coordinates in a random orientation, and the function that turns points alike."""
        angle = self.uniform(0, np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        axis = np.arange(self.size, dtype=np.float32)

        def turn(x, y):
            return x * cos + y * sin, y * cos - x * sin

        return turn(axis[None, :], axis[:, None]), turn

    def flow(self, bend, scale):
        """Curved coordinates (along, across): fibres run where `across` is constant."""
        (along, across), _ = self.turned_grid()
        slow, fast, ripple = self.noise(scale), self.noise(scale / 3), self.noise(9)
        return along, across + bend * (slow + 0.15 * fast) + 0.7 * ripple

    def fibres(self, flow, width, length):
        """Noise drawn out along the flow: streaks `width` px thick and about `length` px long."""
        along, across = (field - field.min() for field in flow)
        long, wide = float(along.max()) + 2, float(across.max()) + 2
        shape = int(wide / width) + 4, int(long / length) + 4
        grid = self.rng.standard_normal(shape, dtype=np.float32)
        box = (1, 1, 1 + long / length, 1 + wide / width)
        texture = _enlarge(grid, box, int(long / 2) + 1, int(wide * 2))
        return texture[(across * 2).astype(np.int32), (along / 2).astype(np.int32)]

    def glands(self, spacing, stretch, bend, scale):
        """Distance to the nearest centre, and to the border with the next, in a bent space."""
        (along, across), turn = self.turned_grid()
        along = (along + bend * self.noise(scale)) / stretch
        across = across + bend * self.noise(scale)
        everywhere = np.ones((self.size, self.size), np.float32)
        centres = self.scatter(everywhere, spacing, 400, margin=int(spacing * stretch))
        first = np.full((self.size, self.size), 1e6, np.float32)
        second = first
        for x, y in centres.astype(np.float32):
            u, v = turn(x, y)
            distance = np.square(along - u / np.float32(stretch)) + np.square(across - v)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
        first = np.sqrt(first)
        return first, (np.sqrt(second) - first) / 2

    # ------------------------------------------------------------ cells

    def scatter(self, weight, spacing, tries, margin=MARGIN):
        """Points at least about `spacing` px apart, likelier where the field `weight` is 1.

        `tries` candidates are drawn per 256 px tile, in proportion to the area for other sizes.
        """
        tries = int(tries * ((self.size + 2 * margin) / (256 + 2 * margin)) ** 2)
        points = self.rng.uniform(-margin, self.size + margin, (tries, 2))
        column, row = np.clip(points.astype(int), 0, self.size - 1).T
        points = points[self.rng.random(tries) < weight[row, column]]
        reach = int(np.ceil(spacing))
        offset = np.arange(-reach, reach + 1)
        disc = offset[None, :] ** 2 + offset[:, None] ** 2 < spacing**2
        taken = np.zeros((self.size + 2 * (margin + reach) + 1,) * 2, bool)
        chosen = []
        for index, (left, top) in enumerate((points + margin).astype(int).tolist()):
            if not taken[top + reach, left + reach]:
                taken[top : top + 2 * reach + 1, left : left + 2 * reach + 1] |= disc
                chosen.append(index)
        return points[chosen]

    def ellipses(self, points, angles, long, short):
        """Draw ellipses of full axes `long`, `short` (n): maps of tone, dark rim and cover."""
        if len(points) == 0:
            return np.zeros((3, self.size, self.size), np.float32)
        half = int(np.ceil(0.55 * np.max(long))) + 2
        side = 2 * half + 1
        corners = np.floor(points).astype(int) - half
        per_cell = np.stack([*(points - corners).T, angles, long, short]).astype(np.float32)
        x, y, angles, long, short = per_cell[:, :, None, None]
        offset = np.arange(side, dtype=np.float32)
        dx, dy = offset[None, None, :] - x, offset[None, :, None] - y
        cos, sin = np.cos(angles), np.sin(angles)
        u, v = (dx * cos + dy * sin) * (2 / long), (dy * cos - dx * sin) * (2 / short)
        square = u * u + v * v
        draws = self.rng.standard_normal((3, len(points), 1, 1), dtype=np.float32)
        tone, dent, lean = draws.clip(-2, 2)
        # no nucleus is an ellipse: a third and a second harmonic of the angle, 5 % each
        bumps = 0.05 * u * (dent * (square - 4 * v * v) + lean * 2 * v) / (square + 0.3)
        inside = (1 - np.sqrt(square) * (1 + bumps)) * (np.sqrt(long * short) / 2)
        cover = _step(inside)
        body = cover * (1 + 0.12 * tone)
        patches = np.stack([body, body * _bump(inside - 1, 1.4), cover], 1)
        pad = 2 * MARGIN + half
        canvas = np.zeros((3, self.size + 2 * pad, self.size + 2 * pad), np.float32)
        for (left, top), patch in zip((corners + pad).tolist(), patches, strict=True):
            view = canvas[:, top : top + side, left : left + side]
            view *= 1 - patch[2]  # a later cell lies on top: outlines stay whole
            view += patch
        return canvas[:, pad:-pad, pad:-pad]

    def nuclei(self, weight, spacing, tries, axes, field=None, turn=0.0, jitter=0.25,
               tone=1.3, rim=0.4, chromatin=0.25, grain=2.2, nucleoli=0.0, vary=0.13):  # fmt: skip
        """Scatter nuclei of about `axes` px by `weight`, at random angles or along a slope.

        tone, rim and nucleoli are haematoxylin densities, chromatin the contrast of the
        clumps, vary the relative standard deviation of the axes.
        """
        points = self.scatter(weight, spacing, tries)
        count = len(points)
        angles = self.rng.uniform(0, np.pi, count)
        if field is not None:
            angles = _slope(field, points) + turn + self.rng.normal(0, jitter, count)
        sizes = np.array(axes) * self.rng.normal(1, vary, (count, 2)).clip(0.6, 1.45)
        long, short = sizes.max(1), sizes.min(1)
        body, edge, cover = self.ellipses(points, angles, long, short)
        clumps = 1 + chromatin * self.noise(grain)
        inner = np.maximum(tone * body * clumps, 0.15 * cover)
        self.h = self.h * (1 - cover) + inner + rim * edge
        self.e *= 1 - 0.5 * cover
        if nucleoli:
            shift = self.rng.normal(0, 0.12, (count, 2)).clip(-0.3, 0.3)
            centres = points + shift * short[:, None]
            dot = np.full(count, 4.0)
            self.h += nucleoli * self.ellipses(centres, angles, dot, dot)[0] * cover

    def erythrocytes(self, weight):
        """Scatter red blood cells: discs of about 12 px (6 µm, shrunken), eosin alone."""
        points = self.scatter(weight, 11, 300)
        width = self.rng.normal(12, 1, len(points)).clip(9, 15)
        body, edge, cover = self.ellipses(points, np.zeros(len(points)), width, 0.9 * width)
        self.fill(0.12, 0.0, cover)
        self.e += body + 0.4 * edge

    # ------------------------------------------------------------ tissues

    def collagen(self, bend, strength, gaps):
        """Fill with wavy connective tissue without cells; returns its flow."""
        flow = self.flow(bend, self.uniform(70, 120))
        fine, coarse = self.fibres(flow, 2.4, 16), self.fibres(flow, 7, 40)
        cloud, grain = self.noise(40), self.noise(2.2)
        solid = _step(0.9 * coarse + 0.5 * fine + 0.9 * cloud + 0.3 * grain + 2 - gaps, 1.4)
        e = strength * solid * (1 + 0.20 * fine + 0.16 * coarse + 0.12 * grain).clip(0.2)
        self.fill(0.12 * solid * (1 + 0.3 * fine + 0.4 * cloud).clip(0.2), e)
        return flow

    def adipose(self):
        """ADI: large empty cells with thin membranes, translucent folds and some septum."""
        flow = self.collagen(12, 0.55, 0.5)
        _, wall = self.glands(self.uniform(95, 190), self.uniform(1, 1.4), self.uniform(6, 14), 60)
        uneven = self.noise(40)
        septum = _step(self.uniform(-9, 3) + 6 * uneven - wall, 2.5)
        self.fill(0, 0, 1 - septum)
        width = 1.2 + 0.8 * np.abs(self.noise(25))
        membrane = _step(width - wall) * _step(uneven + 1.5, 0.6)
        streak = membrane * (1 + 0.3 * self.noise(5) + 0.4 * self.noise(18)).clip(0.2)
        self.add(0.32 * streak, 0.45 * streak)
        for reach in (8, 14):  # folds of membrane seen from above, with a darker border
            inside = np.minimum(reach + 14 * self.noise(90) - wall, 25 * self.noise(50) - 8)
            fold = _step(inside, 1.2) * (1 + 0.25 * self.fibres(flow, 6, 60)).clip(0)
            border = _bump(inside, 1.0)
            self.add(0.03 * fold + 0.06 * border, 0.12 * fold + 0.14 * border)
        self.nuclei(0.4 * membrane + 0.3 * septum, 26, 250, (17, 6), wall, ACROSS, tone=1.2)

    def background(self):
        """BACK: empty glass, slightly uneven, with a few specks of dust."""
        uneven = (1 + self.noise(self.size / 2)).clip(0)
        points = self.scatter(np.ones((self.size, self.size)), 20, self.rng.integers(0, 6))
        width = self.rng.uniform(2, 6, len(points))
        dust = self.ellipses(points, np.zeros(len(points)), width, width)[0]
        self.add(0.004 * uneven + 0.25 * dust, 0.006 * uneven + 0.15 * dust)

    def debris(self):
        """DEB: granular eosinophilic necrosis with ghosts, shrunken nuclei and nuclear dust."""
        cloud = self.noise(35) + 0.6 * self.noise(14)
        grain = 0.5 * self.noise(2.2) + 0.5 * self.noise(5)
        solid = _step(cloud + 0.3 * grain + self.uniform(0.6, 1.9), 1.0)
        e = self.uniform(0.45, 0.7) + 0.10 * cloud + 0.16 * grain
        self.fill(0.14 + 0.10 * self.noise(25) + 0.06 * grain, e, solid)
        ghosts, dust = _step(self.noise(40) - 0.3, 1), _step(self.noise(30), 1)
        self.nuclei(0.5 * solid, 15, 500, (14, 11), tone=0.35, rim=0.15, chromatin=0.5)
        self.nuclei(ghosts * solid, 9, 700, (8, 6.5), tone=1.5, rim=0.1)
        self.nuclei(dust * solid, 5, 900, (3.6, 3), tone=1.1, rim=0.0)

    def lymphoid(self):
        """LYM: sheets of small round dark nuclei with almost no cytoplasm."""
        dense, cloud = self.uniform(0.35, 1.0), self.noise(45)
        self.collagen(15, self.uniform(0.2, 0.4), 1.0)
        haze = _step(cloud + 0.6 * self.noise(10) + 2.2 * dense - 0.6)
        uneven = (1 + 0.15 * self.noise(3) + 0.25 * self.noise(8)).clip(0.2)
        self.fill(0.30 * dense * uneven, 0.36 * dense * uneven, 0.8 * haze)
        crowd = np.clip(dense + 0.35 * cloud, 0.05, 1)
        self.nuclei(0.06 * crowd, 24, 700, (19, 15), tone=0.65, rim=0.3, nucleoli=0.4)
        self.nuclei(crowd, 10.6, 5000 * dense, (12.8, 11.8), tone=1.35, rim=0.25, grain=2.8)

    def mucus(self):
        """MUC: pale lakes of mucin with wisps, a net, few cells and sometimes a strand."""
        flow = self.flow(self.uniform(15, 40), self.uniform(60, 110))
        wisps = 0.35 * _bump(self.noise(14) + 0.3 * self.noise(5), 0.18)
        for width, length, amount in ((5, 25, 0.35), (9, 40, 0.5), (16, 70, 0.6)):
            wisps = wisps + amount * _bump(self.fibres(flow, width, length), 0.25)
        cloud = self.noise(60) + 0.5 * self.noise(22)
        lake = _step(cloud + self.uniform(0.3, 2.0), 1.6)
        veil = lake * (1 + 0.3 * cloud + 0.25 * self.noise(2.5)).clip(0.1)
        wisps = wisps * (0.3 + 0.7 * lake)
        h, e = self.uniform(0.08, 0.24) * veil, self.uniform(0.06, 0.16) * veil
        self.fill(h + 0.18 * wisps, e + 0.2 * wisps)
        strand = _step(self.fibres(flow, 30, 130) - self.uniform(1.3, 2.2), 0.5)
        self.add(0.1 * strand, 0.4 * strand * (1 + 0.3 * self.fibres(flow, 2.5, 30)).clip(0))
        self.nuclei(0.01 + 0.5 * strand, 14, 500, (15, 9), flow[1], ACROSS, jitter=0.6, tone=1.0)

    def muscle(self):
        """MUS: coherent muscle bundles, cigar-shaped nuclei along them, thin clefts between."""
        flow = self.flow(self.uniform(4, 12), self.uniform(90, 150))
        fine, middle = self.fibres(flow, 2.2, 18), self.fibres(flow, 5, 40)
        coarse, grain = self.fibres(flow, 13, 90), self.noise(2.2)
        e = 1 + 0.13 * fine + 0.12 * middle + 0.08 * coarse + 0.07 * grain
        h = 1 + 0.25 * middle + 0.2 * self.noise(50)
        self.fill(self.uniform(0.15, 0.28) * h, self.uniform(0.65, 0.9) * e)
        cleft = self.fibres(flow, 5, 26) + 0.8 * self.noise(45) - self.uniform(1.6, 2.4)
        self.fill(0, 0, 0.93 * _step(cleft, 0.7))
        weight = np.full((self.size, self.size), self.uniform(0.15, 0.5))
        self.nuclei(weight, 20, 400, (25, 6.5), flow[1], ACROSS, jitter=0.1, tone=0.95, rim=0.25)

    def mucosa(self):
        """NORM: round crypts with lumen, goblet cells and basal nuclei in a cellular stroma."""
        self.collagen(15, self.uniform(0.35, 0.5), self.uniform(0.8, 2.0))
        first, wall = self.glands(self.uniform(110, 150), self.uniform(1, 1.6), 5, 45)
        depth = np.minimum(wall - self.uniform(4, 10), self.uniform(55, 72) - first)
        self.nuclei(_step(-depth - 8) * _step(self.noise(40), 2), 12, 900, (12.5, 10.5))
        self.nuclei(_step(-depth - 4), 22, 300, (20, 6), depth, ACROSS, tone=1.1)
        height = self.uniform(36, 46) + 3 * self.noise(25)
        gland, lumen = _step(depth), _step(depth - height, 3)
        cloud = 1 + 0.12 * self.noise(3) + 0.15 * self.noise(12)
        apical = 0.4 + _step(20 - depth, 60)  # basophilic below, paler towards the lumen
        h, e = self.uniform(0.35, 0.55) * cloud * apical, self.uniform(0.5, 0.65) * cloud
        self.fill(h, e, gland)
        self.e += 0.25 * _bump(depth, 1.5)  # basement membrane
        band = _step(depth - 20, 6) * _step(height + 2 - depth, 4)
        goblets = self.scatter(band, self.uniform(17, 23), 1500)
        sizes = np.sort(self.rng.normal((19, 26), 2.5, (len(goblets), 2)).clip(13, 34), 1).T
        _, edge, cover = self.ellipses(goblets, _slope(depth, goblets), sizes[1], sizes[0])
        mucin = self.uniform(0.05, 0.2) * (1 + 0.35 * self.noise(3))
        self.fill(mucin, 0.04, cover)
        self.add(0.22 * edge, 0.18 * edge)
        self.fill(0.01, 0.01, lumen)
        basal = _bump(depth - 9, 4) * gland
        self.nuclei(basal, 8.5, 3000, (16.5, 10), depth, tone=1.1, jitter=0.2)

    def stroma(self):
        """STR: wavy collagen with spindle nuclei, a few lymphocytes and stray red cells."""
        flow = self.collagen(self.uniform(7, 18), self.uniform(0.4, 0.65), self.uniform(-0.2, 1.5))
        weight = np.full((self.size, self.size), self.uniform(0.15, 0.6))
        self.nuclei(weight, 19, 350, (21, 6.5), flow[1], ACROSS, tone=1.05)
        self.nuclei(0.12 * _step(self.noise(40) - 0.6), 13, 500, (12.5, 11.5))
        if self.rng.random() < 0.3:
            self.erythrocytes(_step(self.noise(40) - 1.5, 0.5))

    def tumour(self):
        """TUM: crowded irregular glands, or solid sheets, of large coarse-grained nuclei."""
        self.collagen(15, self.uniform(0.45, 0.65), self.uniform(0, 0.8))
        spacing, stretch = self.uniform(120, 210), self.uniform(1, 1.8)
        _, wall = self.glands(spacing, stretch, self.uniform(6, 14), 50)
        depth = wall - self.uniform(3, 9) - 2 * self.noise(30)
        self.nuclei(0.5 * _step(-depth - 4), 14, 500, (18, 7), depth, ACROSS, tone=1.1)
        gland = _step(depth)
        cloud = 1 + 0.14 * self.noise(2.5) + 0.18 * self.noise(9)
        self.fill(self.uniform(0.25, 0.4) * cloud, self.uniform(0.45, 0.65) * cloud, gland)
        look = dict(tone=self.uniform(0.5, 0.85), rim=self.uniform(0.3, 0.55), chromatin=0.35,
                    grain=3.0, nucleoli=0.6, vary=0.2)  # fmt: skip
        if self.rng.random() < 0.4:
            self.nuclei(gland, self.uniform(15, 19), 2500, (20, 15), **look)
            return
        lumen = _step(depth - self.uniform(34, 52) - 7 * self.noise(22), 2.5)
        self.fill(0.01, 0.01, lumen)
        reach = self.uniform(20, 32) + 4 * self.noise(20)  # pseudostratified: several basal rows
        band = gland * _step(reach - depth, 8) * _step(depth - 4, 4) * (1 - lumen)
        self.nuclei(band, self.uniform(11, 13.5), 2500, (21, 11.5), depth, jitter=0.3, **look)


_RECIPES = dict(
    ADI=Section.adipose,
    BACK=Section.background,
    DEB=Section.debris,
    LYM=Section.lymphoid,
    MUC=Section.mucus,
    MUS=Section.muscle,
    NORM=Section.mucosa,
    STR=Section.stroma,
    TUM=Section.tumour,
)


def render_densities(seed: int, tissue: str, size: int = 256) -> np.ndarray:
    """Density maps (2, size, size) float32 >= 0, haematoxylin then eosin, of one tile.

    The generator is seeded by (seed, tissue) alone.
    Raises: ValueError for a tissue not in TISSUES or a size out of SIZES.
    """
    if tissue not in TISSUES:
        raise ValueError(f"render_densities: tissue {tissue!r}; expected one of {TISSUES}")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"render_densities: size {size} px; expected {SIZES[0]} to {SIZES[1]}")
    section = Section(np.random.default_rng([seed, TISSUES.index(tissue)]), size)
    _RECIPES[tissue](section)
    return np.stack([section.h, section.e]).astype(np.float32).clip(0)


def _blur(image, weight):
    """Three-tap blur over rows and columns of (size, size, 3); the border repeats."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (1 - 2 * weight) * padded[1:-1] + weight * (padded[:-2] + padded[2:])
    return (1 - 2 * weight) * rows[:, 1:-1] + weight * (rows[:, :-2] + rows[:, 2:])


def stain(densities: np.ndarray, laboratory: Laboratory, seed: int) -> np.ndarray:
    """Colours (size, size, 3) uint8 of densities (2, size, size); `seed` draws gains and noise."""
    rng = np.random.default_rng([seed, len(TISSUES)])  # not the generator of any tissue
    gains = np.array(laboratory.gains) * np.exp(laboratory.spread * rng.standard_normal(2))
    vectors = np.array([laboratory.haematoxylin, laboratory.eosin]) * gains[:, None]
    optical_density = np.tensordot(densities, vectors.astype(np.float32), (0, 0))
    glass = np.float32(laboratory.background) * np.float32(np.exp(-laboratory.residual))
    image = _blur(glass * np.exp(-optical_density), np.float32(laboratory.blur))
    image += np.float32(laboratory.noise) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(image).clip(0, 255).astype(np.uint8)


def render_tile(
    seed: int, tissue: str | None = None, laboratory: Laboratory = FIRST, size: int = 256
) -> Image.Image:
    """One RGB tile of size x size; without a tissue the seed draws one of TISSUES."""
    if tissue is None:
        tissue = TISSUES[np.random.default_rng(seed).integers(len(TISSUES))]
    return Image.fromarray(stain(render_densities(seed, tissue, size), laboratory, seed))


def write_dataset(
    folder: Path, count: int, laboratory: Laboratory, seed: int, size: int = 256
) -> None:
    """Write `count` tiles, tissues in turn, seeds counting up: <TISSUE>/<TISSUE>_<seed>.png.

    Raises: ValueError where the folder holds anything, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"write_dataset: {folder} is not an empty folder; name a new one")
    for index in tqdm(range(count), desc=f"synthetic {laboratory.name}", unit="tile"):
        tissue = TISSUES[index % len(TISSUES)]
        (folder / tissue).mkdir(parents=True, exist_ok=True)
        tile = render_tile(seed + index, tissue, laboratory, size)
        tile.save(folder / tissue / f"{tissue}_{seed + index}.png")


def drawn_once(folder: Path, count: int, laboratory: Laboratory, seed: int) -> Path:
    """`write_dataset` where the folder is not there yet; it appears when complete; → folder.

    Of two processes that draw it at once, the first to finish gives its tiles to both.
    """
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        write_dataset(partial, count, laboratory, seed)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)
    return folder


def second_laboratory(cache, count: int = PROCEDURAL_TILES) -> Path:
    """Folder of the tiles that train.py takes without --data, drawn once into `cache`."""
    return drawn_once(Path(cache) / f"procedural-second-{count}-{PROCEDURAL_SEED}", count, SECOND,
                      PROCEDURAL_SEED)


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    parser = OneLineParser(prog="synthetic", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--count", type=integer(1, 10**6), default=90, help="number of tiles")
    parser.add_argument("--laboratory", choices=tuple(LABORATORIES), default="first")
    parser.add_argument("--seed", type=integer(0, 2**31), default=0, help="of the first tile")
    parser.add_argument("--size", type=integer(*SIZES), default=256, help="px")
    options = parser.parse_args(argv)
    try:
        write_dataset(options.out, options.count, LABORATORIES[options.laboratory], options.seed,
                      options.size)
    except (ValueError, OSError) as error:
        print(f"synthetic: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
