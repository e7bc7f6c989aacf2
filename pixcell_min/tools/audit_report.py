"""What `audit` found, for people: lines of text; a heat map of the updates, drawn with Pillow."""

import re

from PIL import Image, ImageDraw, ImageFont

COLUMNS = [f"{attention}.{name}" for attention in ("attn1", "attn2")
           for name in ("to_q", "to_k", "to_v", "to_out.0")]
CELL_WIDTH, CELL_HEIGHT, MARGIN = 64, 22, 56  # px
EMPTY, LIGHT, DARK = (232, 232, 232), (247, 249, 253), (31, 79, 191)  # no update; 0; the largest


def text(result: dict) -> str:
    """All of it, section by section; numbers in module names are folded into *."""
    sections = [("Modules with parameters (* stands for each number)", modules_lines(result)),
                ("Totals", totals_lines(result))]
    if result["run"]:
        sections += [("LoRA, ΔW = scale·B·A", lora_lines(result)),
                     ("Adapter", adapter_lines(result))]
    sections += [("What attention's projections can do", effects_lines(result)),
                 ("Files", files_lines(result))]
    if result["run"]:
        sections.append(("Record", record_lines(result)))
    sections.append(("Licences, as the folders' own files state them", licence_lines(result)))
    if result["notes"]:
        sections.append(("Notes", result["notes"]))
    head = f"Audit of {result['run'] or 'a base alone'}, base {result['base']}"
    return "\n\n".join([head, *(f"{title}\n" + "\n".join(f"  {line}".rstrip() for line in lines)
                                for title, lines in sections)])


def table(rows) -> list[str]:
    """Rows of texts → lines with aligned columns; numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    numbers = [all(re.match(r"[\d.,]+( %|)$|–$", row[i]) for row in rows[1:])
               for i in range(len(widths))]
    return ["  ".join(cell.rjust(width) if right else cell.ljust(width)
                      for cell, width, right in zip(row, widths, numbers)).rstrip()
            for row in rows]


def modules_lines(result) -> list[str]:
    """One line for all modules whose names differ in their numbers alone."""
    folded = {}
    for row in result["modules"]:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["name"]) or "(itself)"
        key = row["part"], name, row["kind"], row["trainable"], row["dtype"]
        count, size = folded.get(key, (0, 0))
        folded[key] = count + 1, size + row["parameters"]
    return table([("part", "module", "kind", "count", "parameters", "state", "dtype"), *(
        (part, name, kind, str(count), f"{size:,}", "trained" if trainable else "frozen", dtype)
        for (part, name, kind, trainable, dtype), (count, size) in folded.items())])


def totals_lines(result) -> list[str]:
    """Parameters and trained ones, of each part and of what trains: transformer and adapter."""
    totals = result["totals"]
    lines = table([("part", "parameters", "trained", "in buffers"), *(
        (part, f"{its['parameters']:,}", f"{its['trainable']:,}", f"{its['buffers']:,}")
        for part, its in totals.items())])
    of = [totals[part] for part in ("transformer", "adapter") if part in totals]
    trained, every = (sum(its[key] for its in of) for key in ("trainable", "parameters"))
    return [*lines, f"trained: {trained:,} of {every:,} parameters of transformer and adapter, "
            f"{100 * trained / every:.2f} %"]


def lora_lines(result) -> list[str]:
    """A line per update, then what the columns mean."""
    lora = result["lora"]
    lines = table([("layer", "rank", "alpha", "scale", "|ΔW|", "|W|", "|ΔW|/|W|", "effective rank",
                    "A got gradients", "B"), *(
        (its["name"], str(its["rank"]), f"{its['alpha']:g}", f"{its['scaling']:.3g}",
         f"{its['norm']:.4f}", f"{its['base_norm']:.3f}", _percent(its["relative_norm"]),
         f"{its['effective_rank']:.2f}", *(_seen(its["gradient_seen"][part]) for part in "AB"))
        for its in lora["layers"])])
    lines += ["", "Norms are Frobenius norms. Effective rank: exp of the entropy of σ/Σσ, σ the",
              "singular values of ΔW (Roy & Vetterli 2007): 1 one direction, the rank all alike."]
    lines += [f"Gradients until step {result['state_step']}: seen where AdamW's second moment, an "
              "average of squared", "gradients, is above 0; dead where it is 0: no gradient ever "
              "arrived, nothing was learnt there.", "Whether what was learnt is good it does not "
              "tell. After one step A is dead: B, still zero, hid it."
              ] if result["state_step"] else ["Gradients: unknown, no state with a step is saved."]
    if result["settings"]["learning_rate"] == 0:
        lines.append("LoRA's rate was 0: it stands where it began.")
    return lines + ([f"Not adapted: {len(lora['inert'])} layers that cannot change the image, "
                     "attn2's to_q and to_k; see below."] if lora["inert"] else [])


def _percent(share):
    return "–" if share is None else f"{100 * share:.2f} %"


def _seen(share):
    if share is None:
        return "unknown"
    return "dead" if share == 0 else "seen" if share == 1 else f"seen, {100 * share:.1f} %"


def adapter_lines(result) -> list[str]:
    """How far it moves an embedding; norms and gradients of its tensors."""
    adapter = result["adapter"]
    what = {"random": "random embeddings, N(0, 1)", "held_out": "held-out tiles' embeddings"}
    lines = ["{embedding} → {hidden} → {embedding}; distance from the identity |adapter(x) − x| / "
             "|x|:".format(**adapter)]
    for name, its in adapter["distance"].items():
        lines.append(f"  mean {_percent(its['mean'])}, largest {_percent(its['max'])} over "
                     f"{its['n']} {what[name]}")
    if "held_out" not in adapter["distance"]:
        lines.append("  held-out tiles: none of them is here unchanged, or no encoder is")
    rate = result["settings"]["adapter_learning_rate"]
    return lines + table([("tensor", "norm", "gradients"), *(
        (name, f"{norm:.4f}", _seen(adapter["gradient_seen"][name]))
        for name, norm in adapter["norms"].items())]) + (
            ["its rate was 0: it stands where it began"] if rate == 0 else [])


def effects_lines(result) -> list[str]:
    """What noise on each projection changes, and why it is 0 for two of them."""
    effects = result["effects"]
    lines = table([("noise added to", "largest change of the output"), *(
        (name, "0 (exactly)" if value == 0 else _percent(value))
        for name, value in effects.items() if "." in name)])
    if result["tokens"] == 1:
        lines += ["One condition token: cross-attention's softmax runs over one key and is 1 for "
                  "every query,", "so attn2(h, c) = to_out(to_v(c)), whatever to_q and to_k hold. "
                  "LoRA there would never learn", "(a quarter of the updates on all attention); "
                  "they are neither computed nor adapted.",
                  f"Computed in full nevertheless, noise on to_q changes "
                  f"{effects['whole softmax']:.1g} of attn2's output in the first block,",
                  f"and the short cut differs from the full softmax by {effects['short cut']:.1g}."]
    else:
        lines.append(f"{result['tokens']} condition tokens: the softmax runs over as many keys, "
                     "and to_q and to_k take part.")
    return lines


def files_lines(result) -> list[str]:
    """Size, dtypes as stored and hash of each file."""
    return table([("bytes", "stored", "SHA-256", "file"), *(
        (f"{its['bytes']:,}", ", ".join(f"{n} × {dtype}" for dtype, n in its["stored"].items()),
         its["sha256"], its["path"]) for its in result["files"])])


def record_lines(result) -> list[str]:
    """What run.json and tiles.json say, the first and the last session in full."""
    tiles, lines = result["tiles"], []
    for session in result["sessions"]:
        lines.append(f"from step {session['from_step']}, {session['started']}, seed "
                     f"{session['seed']}, {session['precision']}: {session['command']}")
    last = result["sessions"][-1]
    lines += [f"{name}: {value}" for name, value in last["hashes"].items()]
    lines.append(", ".join(f"{name} {value}" for name, value in last["versions"].items()))
    return lines + [f"tiles: {tiles['training']} trained on, {tiles['validation']} held out, each "
                    "by path and SHA-256 in tiles.json"]


def licence_lines(result) -> list[str]:
    """What each folder says of itself; what holds for what was trained."""
    lines = [f"{its['of']}: {its['licence'] or 'none stated'} ({its['folder']})"
             for its in result["licences"]]
    lines.append("Where none is stated, weights/README.md says where the weights come from: read "
                 "the terms there.")
    return lines + (["LoRA and adapter derive from these and from the training tiles: read both "
                     "terms before you share them."] if result["run"] else [])


def heat_map(layers, blocks: int, title: str) -> Image.Image:
    """Relative norm of each update, a row per block, a column per projection of attention.

    layers: [{name, relative_norm}]; grey: no update there; the darkest is the largest one.
    """
    values = {}
    for layer in layers:
        found = re.search(r"\.(\d+)\.(attn[12]\..+)$", layer["name"])
        if found:
            values[int(found[1]), found[2]] = layer["relative_norm"] or 0.0
    scale, peak = 2, max(values.values(), default=0) or 1  # drawn larger, then shrunk
    width = MARGIN + CELL_WIDTH * len(COLUMNS) + 12
    height = 62 + CELL_HEIGHT * blocks + 44
    figure = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(figure)
    font, small = (ImageFont.load_default(size * scale) for size in (14, 11))
    draw.text((width * scale // 2, 16 * scale), title, "black", font, anchor="mm")
    for column, name in enumerate(COLUMNS):
        x = (MARGIN + CELL_WIDTH * column + CELL_WIDTH // 2) * scale
        for y, part in zip((38, 52), name.split(".", 1)):
            draw.text((x, y * scale), part, "black", small, anchor="mm")
        for block in range(blocks):
            value = values.get((block, name))
            left, top = MARGIN + CELL_WIDTH * column, 62 + CELL_HEIGHT * block
            colour = EMPTY if value is None else _shade(value / peak)
            draw.rectangle([scale * n for n in (left, top, left + CELL_WIDTH - 2,
                                                top + CELL_HEIGHT - 2)], colour)
            ink = "white" if value is not None and value > 0.55 * peak else "#333333"
            shown = "none" if value is None else f"{100 * value:.3g}"  # Pillow's font has no dash
            draw.text((x, (top + CELL_HEIGHT // 2 - 1) * scale), shown, ink, small, anchor="mm")
    for block in range(blocks):
        draw.text(((MARGIN - 8) * scale, (62 + CELL_HEIGHT * block + CELL_HEIGHT // 2) * scale),
                  f"block {block}", "black", small, anchor="rm")
    draw.text((width * scale // 2, (height - 22) * scale), "Frobenius norm of the update in % of "
              "the weight's; grey: no LoRA", "#555555", small, anchor="mm")
    return figure.resize((width, height), Image.Resampling.LANCZOS)


def _shade(share):
    """0 → LIGHT, 1 → DARK."""
    return tuple(round(light + share * (dark - light)) for light, dark in zip(LIGHT, DARK))
