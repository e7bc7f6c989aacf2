"""Pictures for people: grids of tiles, curves, and PNG files that carry their settings."""

import io
import json

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pixcell_min.checkpoint import write_bytes
from pixcell_min.data import DECODE_ERRORS

CAPTION_HEIGHT = 20  # px
GAP = 4  # px between tiles


def image_grid(rows, captions) -> Image.Image:
    """Rows of equally many RGB images → one picture, a caption above each column.

    Images keep their pixels. Raises: ValueError if a row has another length than `captions`.
    """
    if not rows or any(len(row) != len(captions) for row in rows):
        raise ValueError(f"a grid of {len(captions)} captions needs rows of {len(captions)} images")
    width, height = (
        max(image.size[axis] for row in rows for image in row) + GAP for axis in (0, 1))
    grid = Image.new(
        "RGB", (width * len(captions) - GAP, height * len(rows) - GAP + CAPTION_HEIGHT), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for column, caption in enumerate(captions):
        draw.text((column * width + width // 2, CAPTION_HEIGHT // 2), caption, "black", font,
                  anchor="mm")
        for row, images in enumerate(rows):
            grid.paste(images[column], (column * width, row * height + CAPTION_HEIGHT))
    return grid


def curve_panel(title, curves, ink, width, height, *, low=None, high=None, base=None, filled=(),
                legend=False) -> Image.Image:
    """Lines {name: [(x, y), …]} over a common range of x, in colours {name: ink}, as a picture.

    low, high: the x of its left and right end (default: of the points); base: the y of its lower
    edge (default: the lowest; then the y at both edges are written); filled: names of areas.
    """
    scale = 2  # drawn larger, then shrunk
    panel = Image.new("RGB", (width * scale, height * scale), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(14 * scale)
    left, top, right, bottom = (scale * x for x in (24, 34, width - 20, height - 30))
    draw.text(((left + right) // 2, top // 2), title, "black", font, anchor="mm")
    draw.line((left, bottom, right, bottom), "#999999", scale)
    if curves:
        xs, ys = zip(*(point for points in curves.values() for point in points))
        low, high = min(xs) if low is None else low, max(xs) if high is None else high
        edge, peak = min(ys) if base is None else base, max(ys)
        wide, tall = (high - low) or 1, (peak - edge) or 1
        for name, points in curves.items():
            points = [(left + (x - low) / wide * (right - left),
                       bottom - (y - edge) / tall * (bottom - top)) for x, y in points]
            if name in filled:
                draw.polygon([(points[0][0], bottom), *points, (points[-1][0], bottom)], "#e4e4e4")
            draw.line(points, ink[name], 2 * scale, joint="curve")
        for x, value, anchor in ((left, low, "lt"), (right, high, "rt")):
            text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
            draw.text((x, bottom + 5 * scale), text, "#555555", font, anchor=anchor)
        if base is None:
            for y, value, anchor in ((top, peak, "lt"), (bottom, edge, "lb")):
                draw.text((left, y), f"{value:.3g}", "#555555", font, anchor=anchor)
        for row, name in enumerate(curves if legend else ()):
            y = top + (8 + 18 * row) * scale
            draw.line((right - 30 * scale, y, right, y), ink[name], 3 * scale)
            draw.text((right - 36 * scale, y), name, "black", font, anchor="rm")
    return panel.resize((width, height), Image.Resampling.LANCZOS)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file's content, made small."""
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def save_png(path, image: Image.Image, settings: dict) -> None:
    """Write a PNG whose text chunk `pixcell_min` holds `settings` as JSON, whole or not at all.

    The bytes depend on pixels and settings alone. Raises: ValueError if it cannot be written.
    """
    chunk = PngInfo()
    chunk.add_text("pixcell_min", json.dumps(settings, sort_keys=True))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=chunk)
    write_bytes(path, content.getvalue())


def read_settings(path) -> dict:
    """The settings that `save_png` put into a file; {} where there are none. Raises: ValueError."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            settings = json.loads(image.info.get("pixcell_min", "{}"))
    except (*DECODE_ERRORS, RecursionError) as error:
        raise ValueError(f"{path}: no PNG with settings ({error})") from None
    return settings if isinstance(settings, dict) else {}
