"""What `evaluate` found, for people: report.html in one file, two PNG figures, report.json, lines.

Drawn with Pillow, readable without JavaScript. It measures nothing but the histograms it draws.
"""

import base64
import json
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixcell_min.checkpoint import write_bytes, write_text
from pixcell_min.images import curve_panel, image_grid, png_bytes
from pixcell_min.tools import metrics

GRID_ROWS = 8  # tiles shown
PIXELS = 2000  # tissue pixels of an image in the histograms
COLUMNS = {"base": "base", "adapter": "adapter only", "lora": "LoRA only", "both": "adapter + LoRA",
           "real_real": "real–real floor", "vae": "VAE round trip",
           "colour_only": "base, recoloured", "copies": "copies of training tiles"}
ENCODERS = {"own": "the base's own encoder", "second": "second encoder"}
PANELS = ("L", "a", "b", "haematoxylin density", "eosin density")
INK = {"real": "#555555", "base": "#d95f02", "both": "#1f5fbf"}
# group → key → what the table calls it; ↓ lower is better, ↑ higher
COLOUR = {"lab_mean": "CIELAB Wasserstein-1, mean of L, a, b ↓", "lab_l": "… of L ↓",
          "lab_a": "… of a ↓", "lab_b": "… of b ↓",
          "haematoxylin": "haematoxylin density, Wasserstein-1 [OD] ↓",
          "eosin": "eosin density, Wasserstein-1 [OD] ↓",
          "macenko_angle_h": "Macenko haematoxylin vector [degrees] ↓",
          "macenko_angle_e": "Macenko eosin vector [degrees] ↓",
          "macenko_max_h": "Macenko haematoxylin, 99th percentile [OD] ↓",
          "macenko_max_e": "Macenko eosin, 99th percentile [OD] ↓",
          "reinhard_mean": "Reinhard mean, CIELAB distance ↓",
          "reinhard_std": "Reinhard deviation, CIELAB distance ↓"}
FEATURES = {"frechet": {"frechet_distance": "Fréchet distance ↓"},
            "kernel": {"kernel_distance": "KID, unbiased MMD² ↓"},
            "overlap": {"precision": "precision, k = 5 ↑", "recall": "recall ↑",
                        "density": "density ↑", "coverage": "coverage ↑"},
            "fidelity": {"cosine": "cosine to the condition ↑",
                         "shuffled": "… to other tiles' conditions (shuffled pairs)",
                         "margin": "cosine above shuffled pairs ↑"},
            "centred": {"cosine": "cosine less the tiles' mean embedding ↑",
                        "shuffled": "… shuffled pairs", "margin": "… above shuffled pairs ↑"},
            "memorisation": {"generated_median": "distance to the nearest training tile, median",
                             "real_median": "… of the real held-out tiles",
                             "closer_share": "share nearer than 95 % of real ones (0.05: alike)"}}
NUCLEI = {"pearson": "nuclei density, tile – image: Pearson ↑", "spearman": "… Spearman ↑"}
CAVEATS = (
    "Numbers of few tiles are noisy; compare a column with the real–real floor and mind the "
    "intervals (95 % over tiles: jackknife for distances between sets, else bootstrap; they know "
    "nothing of slides or patients).",
    "The floor compares halves of every class, so half the n: an upper bound for distances that "
    "fall with n, which KID does not. Fréchet distances fall with it most and mean nothing alone; "
    "below some hundreds of images read KID instead.",
    "Features of the base's own encoder are optimistic: it conditions the model. Where all tiles "
    "share a large part of the embedding, cosines are near 1: read the one less the mean.",
    "The memorisation screen is a screen, not a guarantee; its last column, training tiles after "
    "a VAE round trip, shows what copies would look like. Nuclei are counted by a simple rule that "
    "ranks tiles. Tiles are held out by file, not by patient.",
    "“Base, recoloured” is the base's images given the training tiles' mean colour: what "
    "colour alone buys.")
STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1320px;margin:2em auto;
padding:0 1em}h1{font-size:1.7em;margin-bottom:.2em}h2{font-size:1.2em;margin-top:2em}
img{max-width:100%;border:1px solid #ddd}.wide{overflow-x:auto}table{border-collapse:collapse;
font-size:13.5px;font-variant-numeric:tabular-nums}td,th{padding:.35em .7em;text-align:right;
border-bottom:1px solid #ddd;vertical-align:top;white-space:nowrap}td:first-child,
th:first-child{text-align:left;white-space:normal}small{color:#666;display:block}
.key li{font-size:1.1em;margin:.4em 0}code{font-size:.9em;word-break:break-all}"""


def write(folder, result: dict, images: dict) -> None:
    """Write grid.png, histograms.png, report.html, report.json, each whole or not at all.

    images: {column: list of (H, W, 3) uint8}, `real` and `vae` one a tile, arms a multiple of it.
    """
    grid, curves = (png_bytes(draw(images)) for draw in (grid_figure, histogram_figure))
    write_bytes(folder / "grid.png", grid)
    write_bytes(folder / "histograms.png", curves)
    write_text(folder / "report.html", page(result, grid, curves))
    write_text(folder / "report.json",
               json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# ---------------------------------------------------------------- figures


def grid_figure(images: dict) -> Image.Image:
    """real | VAE | arms, a row per tile, GRID_ROWS tiles at most, evenly spaced."""
    columns = [name for name in ("real", "vae", *list(COLUMNS)[:4]) if name in images]
    count = len(images["real"])
    shown = [i * count // min(count, GRID_ROWS) for i in range(min(count, GRID_ROWS))]
    rows = [[Image.fromarray(images[name][i * len(images[name]) // count]) for name in columns]
            for i in shown]
    return image_grid(rows, [{"real": "real, held out"}.get(name) or COLUMNS[name]
                             for name in columns])


def histogram_figure(images: dict) -> Image.Image:
    """Histograms of L, a, b, stain densities on tissue of real, base, both, as far as drawn."""
    values = {}
    for name in INK:
        pixels = np.concatenate([p[0] for p in metrics.thin(images.get(name, []), PIXELS)]
                                or [np.zeros((0, 3), np.uint8)])
        if len(pixels):  # a background-only set has no curve
            values[name] = np.concatenate(
                [metrics.rgb_to_lab(pixels), metrics.stain_densities(pixels)], 1)     # (n, 5)
    width, height = 380, 240
    figure = Image.new("RGB", (3 * width, 2 * height), "white")
    for i, title in enumerate(PANELS):
        panel = _panel(title, {name: its[:, i] for name, its in values.items()}, width, height)
        figure.paste(panel, (i % 3 * width, i // 3 * height))
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(16)
    for row, name in enumerate(values):
        top, left = height + 80 + 30 * row, 2 * width + 60
        draw.line((left, top, left + 40, top), INK[name], 4)
        draw.text((left + 52, top), COLUMNS.get(name, "real, held out"), "black", font, anchor="lm")
    if not values:
        draw.text((2 * width + 60, height + 80), "no tissue pixels", "black", font)
    return figure


def _panel(title, curves, width, height, bins=60):
    """One histogram of {name: values} over a common range."""
    low, high, lines = None, None, {}
    if curves:
        low, high = np.quantile(np.concatenate(list(curves.values())), (0.01, 0.99))
        high = max(high, low + 1e-6)
        centres = low + (np.arange(bins) + 0.5) * (high - low) / bins
        for name, its in curves.items():
            share = np.histogram(its, bins, (low, high))[0] / len(its)
            lines[name] = list(zip(centres.tolist(), share.tolist()))
    return curve_panel(title, lines, INK, width, height, low=low, high=high, base=0,
                       filled=("real",))


# ---------------------------------------------------------------- words


def _entry(result, column, group, key):
    entry = result["results"].get(column, {}).get(group, {})
    return None if key not in entry.get("values", {}) else (
        entry["values"][key], entry.get("intervals", {}).get(key), entry["n"])


def _text(value):
    return f"{value:.4f}" if 0.9 < abs(value) < 1 else f"{value:.3g}"


def _number(entry, unit=""):
    """"1.23 [1.1, 1.4] (n 32)" of (value, interval or None, n); "not measured" of None."""
    if entry is None:
        return "not measured"
    value, interval, n = entry
    between = f" [{_text(interval[0])}, {_text(interval[1])}]" if interval else ""
    return f"{_text(value)}{unit}{between} (n {n})"


def _encoders(result):
    return [name for name in ENCODERS if any(
        group.endswith(f":{name}") for groups in result["results"].values() for group in groups)]


def key_lines(result: dict) -> list[str]:
    """The few numbers that matter, a line each: colour, stains, fidelity, nuclei, files."""
    def shown(column, group, key):
        return _number(_entry(result, column, group, key))

    def gain(name, unit=""):
        entry = result["key"].get(name, {})
        return _number(entry.get("values") and (
            entry["values"]["value"], entry.get("intervals", {}).get("value"), entry["n"]), unit)

    lines = [f"Colour shift (CIELAB Wasserstein-1, real to drawn): base "
             f"{shown('base', 'colour', 'lab_mean')}, adapter + LoRA "
             f"{shown('both', 'colour', 'lab_mean')}; real–real floor "
             f"{shown('real_real', 'colour', 'lab_mean')}, base recoloured by mean and deviation "
             f"{shown('colour_only', 'colour', 'lab_mean')}.",
             f"Colour shift left over, of the base's: {gain('colour_percent', ' %')}.",
             "Macenko angles, haematoxylin and eosin, in degrees: base " + " and ".join(
                 shown("base", "colour", f"macenko_angle_{stain}") for stain in "he")
             + ", adapter + LoRA " + " and ".join(
                 shown("both", "colour", f"macenko_angle_{stain}") for stain in "he") + "."]
    for encoder in _encoders(result):
        for group, name, what in (("fidelity", "gain", ""),
                                  ("centred", "gain_centred", " less the mean embedding")):
            group = f"{group}:{encoder}"
            lines.append(f"Cosine to the condition{what} ({ENCODERS[encoder]}): base "
                         f"{shown('base', group, 'cosine')}, adapter + LoRA "
                         f"{shown('both', group, 'cosine')}, gain {gain(f'{name}:{encoder}')}; "
                         f"shuffled pairs {shown('both', group, 'shuffled')}, VAE round trip "
                         f"{shown('vae', group, 'cosine')}.")
    lines.append(f"Nuclei density, rank correlation of tile and image: base "
                 f"{shown('base', 'nuclei', 'spearman')}, adapter + LoRA "
                 f"{shown('both', 'nuclei', 'spearman')}.")
    lines.append("Files to share: " + ", ".join(
        f"{name} {size / 1e6:.2f} MB" for name, size in result["file_bytes"].items()) + ".")
    return lines


def summary(result: dict) -> list[str]:
    """What the terminal shows: the key numbers, then every note."""
    return key_lines(result) + [f"note: {note}" for note in result["notes"]]


def _table(result, rows):
    """rows: (group, key, label) → an HTML table, a column per arm and reference."""
    columns = list(result["results"])
    cells = []
    for group, key, label in rows:
        line = [f"<td>{escape(label)}</td>"]
        for column in columns:
            entry = _entry(result, column, group, key)
            if entry is None:
                line.append("<td>–</td>")
                continue
            value, interval, n = entry
            between = f"{_text(interval[0])} … {_text(interval[1])}, " if interval else ""
            line.append(f"<td>{_text(value)}<small>{between}n {n}</small></td>")
        cells.append(f"<tr>{''.join(line)}</tr>")
    head = "".join(f"<th>{escape(COLUMNS[column])}</th>" for column in columns)
    return f"<div class=wide><table><tr><th></th>{head}</tr>{''.join(cells)}</table></div>"


def _facts(table):
    return "".join(f"<tr><td>{escape(str(key))}</td><td><code>{escape(str(value))}</code></td></tr>"
                   for key, value in table.items())


def _picture(content, text):
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _listed(lines):
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def page(result: dict, grid: bytes, curves: bytes) -> str:
    """report.html: one file, figures inside; every text of a file name or error is escaped."""
    tiles, tables = result["tiles"], [
        ("Colour of tissue, against the real tiles",
         [("colour", key, label) for key, label in COLOUR.items()])]
    tables += [(f"Quality and fidelity in features of {ENCODERS[name]}",
                [(f"{group}:{name}", key, label) for group, keys in FEATURES.items()
                 for key, label in keys.items()]) for name in _encoders(result)]
    tables.append(("Nuclei", [("nuclei", key, label) for key, label in NUCLEI.items()]))
    classifier = result["colour_classifier"]
    told = "" if "values" not in classifier else (
        "Mean RGB alone tells the class of {accuracy:.0%} of the real tiles (nearest centroid, "
        "leave one out; always the largest class: {largest_class:.0%}; n {n})."
        .format(**classifier["values"], n=classifier["n"]))
    settings = {**result["settings"], "data": result["data"], "run": result["run"],
                **{f"{name} SHA-256": value for name, value in result["hashes"].items()},
                **result["versions"], **result["machine"], "date": result["date"],
                "training settings": ", ".join(
                    f"{key} {value}" for key, value in result["training_settings"].items())}
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>pixcell_min: evaluation of {escape(result['run'])}</title><style>{STYLE}</style>
<h1>What the run changes: {escape(result['run'])}</h1>
<p>{tiles['used']} tiles of {escape(result['data'])} that the run was not trained on, beside what
the frozen base, its adapter, its LoRA and both draw from their embeddings, with the same seeds.
Synthetic images: no evidence about a patient.</p>
<ul class=key>{_listed(key_lines(result))}</ul>
<h2>Images</h2>{_picture(grid, 'real tiles beside drawn ones')}
<h2>Colour and stain density of tissue pixels</h2>{_picture(curves, 'histograms')}
{''.join(f'<h2>{escape(title)}</h2>{_table(result, rows)}' for title, rows in tables)}
<p>{escape(told)}</p>
<h2>How to read this</h2><ul>{_listed(CAVEATS)}</ul>
<h2>Notes of this evaluation</h2><ul>{_listed(result['notes'] or ['none'])}</ul>
<p>Tiles: {tiles['found']} different ones found, {tiles['trained_on']} of them trained on,
{tiles['held_out']} held out, {tiles['used']} used, {tiles['images_per_tile']} image(s) each.</p>
<h2>Settings</h2><div class=wide><table>{_facts(settings)}</table></div></html>
"""
