"""Pictures for people: a captioned grid of tiles, and PNG files that carry their settings."""

import io
import json

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from pixcell_min.checkpoint import write_bytes

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
    """The settings that `save_png` put into a file; {} where there are none."""
    with Image.open(path) as image:
        return json.loads(image.info.get("pixcell_min", "{}"))
