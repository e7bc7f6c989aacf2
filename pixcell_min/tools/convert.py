"""A LoRA file of one format → another, with a report of every key and the scale it is read with.

    python -m pixcell_min.tools.convert runs/lora/lora_weights.safetensors lora-peft --format peft
    python -m pixcell_min.tools.convert kohya.safetensors l.safetensors --format native --base DIR
"""

import sys
from pathlib import Path

from pixcell_min.base import find_base
from pixcell_min.checkpoint import file_hash
from pixcell_min.checks import OneLineParser, one_line, positive_float
from pixcell_min.exports import FORMATS, write_lora
from pixcell_min.formats import read_lora
from pixcell_min.transformer import WEIGHTS_NAME, PixCellTransformer


def convert(source, target, form, base=None, alpha=None, overwrite=False) -> list[str]:
    """Read `source`, write `target`; → the report's lines. Raises: ValueError as both do.

    base: folder of the base it was made for: names kohya's layers, checks shapes, and the hash or
    the base tensors that the file holds. alpha: for a file that names none.
    """
    model = None
    if base is not None:
        folder = find_base(base) / "transformer"
        model = PixCellTransformer.from_pretrained(folder)
    lora = read_lora(source, model, alpha)
    if model and lora.format == "authors":  # its base tensors were compared
        lora.header["base_hash"] = file_hash(folder / WEIGHTS_NAME)
    made_for = lora.header.get("base_hash")
    if model and made_for not in (None, loaded := file_hash(folder / WEIGHTS_NAME)):
        raise ValueError(f"{source}: LoRA of base {made_for}, {base} is {loaded}; name the base it "
                         "was trained on, or none")
    if Path(target).exists() and Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target}: is the file to be read; choose another name")
    written = write_lora(lora, target, form, overwrite)
    scales = sorted({lora.scaling(name) for name in lora.layers})
    lines = [f"{source}: {lora.format}, {len(lora.layers)} layers, scale "
             f"{', '.join(f'{scale:g}' for scale in scales)}"]
    if made_for is None:
        lines.append(f"note: {source} names no base_hash: that it fits a base is not checked")
    lines += [f"{key}  {shape}  scale {scale:g}" for key, shape, scale in written]
    return [*lines, f"{target}: {form}, {len(written)} tensors"]


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    parser = OneLineParser(prog="convert", description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="LoRA file, or folder of PEFT or diffusers")
    parser.add_argument("target", type=Path, help="new .safetensors file; for peft a new folder")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of the target")
    parser.add_argument("--base", help="base folder it was made for; kohya needs it")
    parser.add_argument("--alpha", type=positive_float,
                        help="of a file that names none [factor; scale is alpha / rank]")
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    options = parser.parse_args(argv)
    try:
        print("\n".join(convert(options.source, options.target, options.format, options.base,
                                options.alpha, options.overwrite)))
    except (ValueError, OSError) as error:
        print(f"convert: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"convert: interrupted; {options.target} was not written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
