"""pixcell_min beside diffusers + peft + timm: time, memory and difference, in one run.

    python benchmarks/compare.py --size full --out benchmarks/results/compare.json
    python benchmarks/compare.py --size nano --cases train-1 sample --repeats 9 --out nano.json
    python benchmarks/compare.py --size full --device cuda --ahead 8 --out gpu.json

Each side of a case lives in a process of its own (`sides.py`), with the same weights, inputs,
threads and precision; the two take turns, ours, peer, ours, peer…, while the other one waits. The
first turn warms up and gives the difference of the results; then come --repeats timed ones. A
ratio is ours / peer of neighbouring turns, so that other work on the machine strikes both.
Full-size networks have random weights and are written once under --work. What is in the result file
with the same settings is not measured again. Linux alone tells the peak memory of a process.

On a GPU, which wants a file of its own, there is fp16, too, trained with GradScaler; memory is what
tensors take on the GPU; and each side is told its optimizer steps per second and its share of the
rate at which the GPU multiplies large matrices in the case's precision. There is no fp16 row of the
VAE: ours computes it in float32 then. Float32 convolutions are torch's default, TF32, on both sides.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sides import WEIGHTS, config_of, serve  # noqa: E402  (what else is imported here, both sides hold)

NANO = ROOT / "weights" / "pixcell-nano"
VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "use_quant_conv": False,
       "use_post_quant_conv": False, "mid_block_add_attention": True, "in_channels": 3,
       "out_channels": 3, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SIZES = {  # transformer, VAE, encoder: what differs from PixCell-256, SD 3.5's VAE and UNI2-h
    "full": ({}, {}, {}),
    "mid": ({"num_layers": 4}, {"block_out_channels": [64, 128, 256, 256]}, {"depth": 4}),
    "tiny": ({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8,
              "caption_channels": 16},
             {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2},
             {"img_size": 28, "depth": 1, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 4.0,
              "reg_tokens": 2}),
}
TILES = 4  # of an epoch
SPAWN = multiprocessing.get_context("spawn")
IMPORTED = ["sides", "torch._dynamo", "peft", "timm", "pixcell_min.base", "pixcell_min.training",
            "diffusers", "diffusers.models.transformers.pixart_transformer_2d"]  # with --ahead
WORDS = {"fp16": "fp16", "bf16": "bf16", "no": "float32"}  # of precisions, in names of cases


def cases(device="cpu") -> dict[str, dict]:
    """{name: case}; `peer` in a case: settings of the peer's side that differ from ours.

    A GPU has fp16, too, and more cases with compiled blocks: there they may pay.
    """
    found, gpu = {}, device == "cuda"
    precisions = [*WORDS] if gpu else ["bf16", "no"]
    sampling = {"kind": "sample", "scheduler": "dpmpp_2m", "steps": 20}
    for precision in precisions:
        word, own = WORDS[precision], {"precision": precision}
        for batch in (1, 4, 16) if gpu and precision != "no" else (1, 4):
            found[f"train-{batch}-{word}"] = {"kind": "train", "batch": batch, **own}
        found[f"forward-{word}"] = {"kind": "forward", "batch": 2, "merged": True, **own}
        found[f"sample-dpm-{word}"] = {**sampling, "merged": True, **own}
        found[f"sample-ddim-{word}"] = {"kind": "sample", "scheduler": "ddim", "steps": 50,
                                        "merged": True, **own}
        # Ours encodes tiles in float32 alone, and neither encodes nor decodes latents in fp16.
        for kind in {"fp16": (), "bf16": ("encode", "decode"),
                     "no": ("encode", "decode", "encoder")}[precision]:
            found[f"{kind}-{word}"] = {"kind": kind, **own}
        found[f"epoch-{word}"] = {"kind": "epoch", "batch": 2, **own}
        found[f"train-4-checkpointing-{word}"] = {
            "kind": "train", "batch": 4, "checkpointing": True, **own}
        for batch in (1, 4) if gpu else (1,):
            found[f"train-{batch}-compiled-{word}"] = {
                "kind": "train", "batch": batch, "compiled": True, **own}
        if gpu:
            found[f"sample-dpm-compiled-{word}"] = {
                **sampling, "merged": True, "compiled": True, **own}
        found[f"forward-compiled-{word}"] = {"kind": "forward", "batch": 2, "compiled": True, **own}
        found[f"forward-unmerged-{word}"] = {"kind": "forward", "batch": 2, **own}
    found["load"] = {"kind": "load", "precision": "no"}
    for precision in precisions[:-1]:
        for batch in (1, 4):
            found[f"train-{batch}-{precision}-autocast"] = {
                "kind": "train", "batch": batch, "precision": precision,
                "peer": {"precision": f"{precision} autocast"}}
    defaults = {"precision": "auto", "peer": {"precision": "no"}}
    found["defaults-train"] = {"kind": "train", "batch": 4, **defaults}
    found["defaults-sample"] = {**sampling, **defaults}
    found["defaults-epoch"] = {"kind": "epoch", "batch": 2, **defaults}
    return found


class Side:
    """A process that serves one side of a case; built when made, gone after `close`."""

    def __init__(self, side, case, context=SPAWN):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, case), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is seen here
        self.memory = self.connection.recv()

    def ask(self, order):
        """The answer to "run", "output" or "work". Raises: EOFError if the process has died."""
        self.connection.send(order)
        return self.connection.recv()

    def close(self):
        self.connection.send("end")
        self.process.join()


def start(case: dict, context) -> tuple[dict, dict]:
    """(both sides of a case, the first turn of each); context: of multiprocessing."""
    if case["kind"] == "epoch":  # the features that later passes read, in a process that ends
        first = Side("ours", case | {"kind": "first pass"}, context)
        first.ask("run"), first.close()
    sides = {name: Side(name, case | its, context)
             for name, its in (("ours", {}), ("peer", case.get("peer", {})))}
    return sides, {name: side.ask("run") for name, side in sides.items()}


def measure(case: dict, sides: dict, first_turns: dict, repeats: int, bar) -> dict:
    """Both sides of a case in turns: seconds, ratios, peak memory, largest difference."""
    turns = {name: [turn] for name, turn in first_turns.items()}
    # Each side of an epoch draws noise of its own.
    difference = None if case["kind"] == "epoch" else largest_difference(
        *(side.ask("output") for side in sides.values()))
    for _ in range(repeats):
        for name, side in sides.items():
            turns[name].append(side.ask("run"))
        bar.update()
    gpu = case["device"] == "cuda"
    work = {name: side.ask("work") for name, side in sides.items()} if gpu else {}
    for side in sides.values():
        side.close()
    first = {name: its[0]["seconds"] for name, its in turns.items()}  # of "load" imports, too
    seconds, worked = ({name: [turn[what] for turn in its[1:]] for name, its in turns.items()}
                       for what in ("seconds", "cpu_seconds"))
    peak = {name: max(turn["peak_mb"] for turn in its) for name, its in turns.items()}
    imported = statistics.mean(side.memory["imported_mb"] for side in sides.values())
    medians = {name: statistics.median(its) for name, its in seconds.items()}
    result = {
        "seconds": medians, "first_seconds": first, "ratio": ratios_of(seconds),
        "peak_mb": peak, "memory_ratio": peak["ours"] / peak["peer"], "difference": difference}
    if gpu:
        return result | on_a_gpu(case, medians, work)
    return result | {
        "cpu_ratio": ratios_of(worked), "imported_mb": imported,
        "memory_ratio_without_torch": (peak["ours"] - imported) / (peak["peer"] - imported)}


def on_a_gpu(case: dict, seconds: dict, work: dict) -> dict:
    """What a GPU's row tells of each side, from its seconds and `work_of`.

    steps_per_second: of the optimizer, None where a run is no training step; matrix_share: FLOP per
    second over the device's rate of products, None where a run has none; busy: the share of a
    turn's time that its kernels take; for the rest the GPU waits.
    """
    steps = {name: 1 / its if case["kind"] == "train" else None for name, its in seconds.items()}
    share = {name: its["flop"] / seconds[name] / its["matrix_flop_per_second"] or None
             for name, its in work.items()}
    busy = {name: its["kernel_seconds"] / seconds[name] for name, its in work.items()}
    return {"steps_per_second": steps, "matrix_share": share, "busy": busy, "work": work}


def ratios_of(seconds: dict) -> dict:
    """Median, lowest and highest of ours / peer over the turns."""
    ratios = [own / other for own, other in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def largest_difference(ours: dict, peer: dict) -> float:
    """Largest distance of a result, of all of ours, in parts of the peer's largest value of it.

    Gradients that the peer alone has (LoRA where it cannot act) are not compared. NaN if one is.
    """
    return torch.stack([(ours[name] - peer[name]).abs().max() / peer[name].abs().max()
                        for name in ours]).max().item()  # Python's max may pass over NaN


def write_networks(folder: Path, size: str) -> None:
    """The three networks of a size, float32, as a base folder; the first as diffusers' PixArt, too."""
    from diffusers import PixArtTransformer2DModel

    from pixcell_min.checkpoint import read_json, read_tensors, save_tensors, write_text
    from pixcell_min.transformer import PixCellTransformer, TransformerConfig
    from pixcell_min.uni import TileEncoder
    from pixcell_min.vae import AutoencoderKL, VAEConfig
    torch.manual_seed(0)
    files = {"transformer": WEIGHTS, "vae": WEIGHTS, "uni": "model.safetensors"}
    if size == "nano":
        configs = {part: read_json(NANO / part / "config.json") for part in files}
        tensors = {part: read_tensors(NANO / part / name)[0] for part, name in files.items()}
    else:
        transformer, vae, encoder = SIZES[size]
        configs = {"transformer": vars(TransformerConfig(**transformer)),
                   "vae": vars(VAEConfig()) | VAE | vae, "uni": {"model_args": encoder}}
        made = {"transformer": PixCellTransformer(TransformerConfig(**transformer)),
                "vae": AutoencoderKL(VAEConfig.from_dict(
                    configs["vae"] | {"block_out_channels": [*configs["vae"]["block_out_channels"]]})),
                "uni": TileEncoder(encoder).vit}
        tensors = {part: network.state_dict() for part, network in made.items()}
    for part, name in files.items():
        write_text(folder / part / "config.json", json.dumps(configs[part]))
        save_tensors(folder / part / name, {key: t.float() for key, t in tensors[part].items()})
    write_text(folder / "scheduler" / "scheduler_config.json",
               (NANO / "scheduler" / "scheduler_config.json").read_text())
    shared = ("num_layers", "num_attention_heads", "attention_head_dim", "caption_channels",
              "sample_size", "interpolation_scale", "in_channels", "out_channels", "patch_size")
    config = {name: configs["transformer"][name] for name in shared}
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(
            cross_attention_dim=config["num_attention_heads"] * config["attention_head_dim"],
            use_additional_conditions=False, **config)
    pixart.save_config(folder / "pixart")
    (folder / "pixart" / WEIGHTS).symlink_to(folder / "transformer" / WEIGHTS)


def write_tiles(folder: Path, side: int) -> None:
    """TILES different PNG tiles."""
    from PIL import Image
    image = Image.open(ROOT / "docs" / "tile.png").convert("RGB").resize((side, side))
    folder.mkdir(parents=True)
    for i in range(TILES):
        image.putpixel((0, 0), (i, 0, 0))
        image.save(folder / f"{i}.png")


def prepare(work: Path, size: str) -> Path:
    """Folder of the networks and tiles of a size, written at the first call."""
    base = (work / size).resolve()
    if not (base / "pixart" / WEIGHTS).exists():  # written last
        write_networks(base, size)
    if not (base / "tiles").exists():
        write_tiles(base / "tiles", 8 * config_of({"base": base})["sample_size"])
    return base


def main(argv=None) -> None:
    from first_run import commit, machine
    from pixcell_min.checkpoint import write_text
    from pixcell_min.checks import positive_int
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("nano", *SIZES), default="nano")
    parser.add_argument("--cases", nargs="+", default=[""], help="names, or their beginnings")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ahead", type=positive_int, default=1,
                        help="cases started side by side, to be timed one by one: for a GPU with "
                        "many cores beside it; first_seconds and the CPU's memory then say little")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="for networks, kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write and to go on from")
    args = parser.parse_args(argv)
    found = cases(args.device)
    chosen = [name for name in found if name.startswith(tuple(args.cases))]
    if not chosen:
        parser.error(f"no such case; there are {', '.join(found)}")
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if others := {its["settings"]["device"] for its in results.values()} - {args.device}:
        parser.error(f"{args.out}: holds rows measured on {', '.join(others)}, no place for rows of "
                     f"{args.device}; give another --out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    base = prepare(args.work, args.size)
    common = {"threads": args.threads, "device": args.device}
    settings = {name: found[name] | common | {"repeats": args.repeats} for name in chosen}
    chosen = [name for name in chosen
              if results.get(f"{args.size} {name}", {}).get("settings") != settings[name]]
    paths = {"base": str(base), "tiles": str(base / "tiles")}
    # Alone, a side imports for itself, so that its memory is its own; many are forked from one
    # process that has imported all.
    context = SPAWN if args.ahead == 1 else multiprocessing.get_context("forkserver")
    if args.ahead > 1:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA, once asked, could not be forked
        context.set_forkserver_preload(IMPORTED)
    with (tqdm(total=len(chosen) * args.repeats, unit="turn", disable=None) as bar,
          ThreadPoolExecutor(args.ahead) as pool):
        for begin in range(0, len(chosen), args.ahead):
            names = chosen[begin:begin + args.ahead]
            # Epochs share no cache: one may be started while another fills its own.
            made = [found[name] | common | paths | {"cache": str(base / f"cache-{name}")}
                    for name in names]
            bar.set_description(f"starting {', '.join(names)}")
            for name, case, started in zip(names, made, [*pool.map(
                    partial(start, context=context), made)], strict=True):
                bar.set_description(name)
                results[f"{args.size} {name}"] = measure(case, *started, args.repeats, bar) | {
                    "settings": settings[name], "commit": commit(), "machine": machine()}
                write_text(args.out, json.dumps(results, indent=1) + "\n")
    print(table(results, args.size))


def table(results: dict, size: str) -> str:
    """Markdown: the cases of a size, of which there is one at least."""
    rows = [columns(key.split(" ", 1)[1], its) for key, its in results.items()
            if key.split(" ")[0] == size]
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + [f"| {' | '.join(row.values())} |" for row in rows])


def columns(name: str, its: dict) -> dict[str, str]:
    """{column: cell} of a case: a GPU's or a CPU's."""
    def cell(value, form):
        return "–" if value is None else format(value, form)

    seconds, ratio, peak = its["seconds"], its["ratio"], its["peak_mb"]
    found = {"case": name, "peer s": f"{seconds['peer']:.3g}", "ours s": f"{seconds['ours']:.3g}",
             "ratio (min…max)": f"{ratio['median']:.2f} ({ratio['min']:.2f}…{ratio['max']:.2f})"}
    memory = {f"{side} MB": f"{peak[side]:.0f}" for side in ("peer", "ours")}
    difference = {"difference": cell(its["difference"], ".1e")}
    if its["settings"]["device"] == "cuda":
        kernels = [its["work"][side].get("kernel_seconds") for side in ("ours", "peer")]
        alone = None if None in kernels else kernels[0] / kernels[1]
        return found | {"kernels alone": cell(alone, ".2f")} | {
            f"{what}, peer / ours": " / ".join(cell(its[key][side], form) for side in ("peer", "ours"))
            for what, key, form in (
                ("steps per s", "steps_per_second", ".3g"), ("matrix rate", "matrix_share", ".1%"),
                ("busy", "busy", ".0%"), ("MB", "peak_mb", ".0f"))} | {
            "memory ratio": f"{its['memory_ratio']:.2f}"} | difference
    return found | {"of CPU time": f"{its['cpu_ratio']['median']:.2f}"} | memory | {
        "memory ratio (without torch)":
            f"{its['memory_ratio']:.2f} ({its['memory_ratio_without_torch']:.2f})"} | difference


if __name__ == "__main__":
    main()
