"""What a base can do before any adaptation: rebuild, retrieve, follow its condition.

    python benchmarks/base_quality.py --data ../shared/data/target_nct --out nano.json --sheet nano.png

On tiles the base has not seen (--data, or procedural ones of new seeds): the VAE's round trip; how
often the embedding of a turned, restained tile is nearest to that of its original; how near a
sample's embedding comes to its condition's, by guidance scale; and a sheet of samples to look at.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pixcell_min.base import load_pixcell_base, load_vae
from pixcell_min.batches import generator_for
from pixcell_min.checkpoint import write_text
from pixcell_min.data import find_tiles, fit_tile, image_to_tensor, read_tile, tensor_to_image
from pixcell_min.images import image_grid, save_png
from pixcell_min.tools.metrics import bootstrap, cosine_fidelity
from pixcell_min.tools.pretrain import dihedral, round_trip_psnr, stain_jitter, to_patches
from pixcell_min.tools.synthetic import TISSUES, render_tile

UNSEEN = 2 * 10**9  # procedural seeds that neither pretraining nor train.py uses
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
STEPS, SCHEDULER = 20, "dpmpp_2m"
SHEET_PIXELS = 128  # of a tile on the sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="weights/pixcell-nano")
    parser.add_argument("--data", type=Path, help="tiles never trained on; none: procedural ones")
    parser.add_argument("--guidance-tiles", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sheet", type=Path, help="PNG to write: tile | VAE | samples by guidance")
    options = parser.parse_args()
    pipeline, vae = load_pixcell_base(options.base, "cpu"), load_vae(options.base, "cpu")
    if options.data:
        tiles = find_tiles(options.data)
        names = [f"{tile.label}/{tile.path.name}" for tile in tiles]
        stored = [read_tile(tile.path) for tile in tiles]
        images = [fit_tile(image, 256, "resize") for image in stored]
    else:
        names = [f"{tissue} {i}" for i in range(6) for tissue in TISSUES]
        images = stored = [render_tile(UNSEEN + i, name.split()[0])
                           for i, name in enumerate(names)]
    with torch.no_grad():
        embeddings = pipeline.encoder(images)
    chosen = [i * len(images) // options.guidance_tiles for i in range(options.guidance_tiles)]
    guided, samples = guidance(pipeline, [names[i] for i in chosen], embeddings[chosen])
    result = {
        "base_hash": pipeline.base_hash, "data": str(options.data), "tiles": len(images),
        "vae_psnr_db": reconstruction(vae, images),
        "vae_psnr_db, tiles as stored": (reconstruction(vae, stored)
                                         if may_stay_as_stored(stored) else None),
        "retrieval": retrieval(pipeline.encoder, images, embeddings[:, 0]),
        "guidance": guided, "guidance_tiles": [names[i] for i in chosen], "steps": STEPS, "scheduler": SCHEDULER,
        "precision": str(pipeline.dtype or "float32"), "torch": torch.__version__,
        "machine": platform.platform()}
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if options.sheet:
        columns = [f"guidance {scale:g}" for scale in SCALES[:4:3] + SCALES[5:6]]
        rows = []
        for number, i in enumerate(chosen):
            pixels = image_to_tensor(images[i])[None].to(pipeline.device)
            with torch.no_grad():
                rebuilt = tensor_to_image(vae.decode(vae.encode(pixels)[0])[0])
            rows.append((images[i], rebuilt, *(samples[scale][number]
                                               for scale in SCALES[:4:3] + SCALES[5:6])))
        rows = [[image.resize((SHEET_PIXELS, SHEET_PIXELS), Image.Resampling.LANCZOS)
                 for image in row] for row in rows]
        save_png(options.sheet, image_grid(rows, ("real, unseen", "VAE", *columns)),
                 {"base_hash": pipeline.base_hash, "tiles": [names[i] for i in chosen],
                  "steps": STEPS, "scheduler": SCHEDULER})


def may_stay_as_stored(images) -> bool:
    """Whether a VAE of factor 8 takes them as they are, and all have one size."""
    sizes = {image.size for image in images}
    return len(sizes) == 1 and all(side % 8 == 0 for side in sizes.pop())


def reconstruction(vae, images) -> dict:
    """PSNR in dB of the VAE's round trip of images of one size, and of a linear code as large.

    Enlarging a tile smooths it, so that either does better on it than on the tile as stored.
    """
    each = [round_trip_psnr(vae, [image]) for image in images]
    return {"px": list(images[0].size), "of the mean squared error": round_trip_psnr(vae, images),
            "mean over tiles": float(np.mean(each)), "lowest": min(each),
            "tiles below 30": sum(its < 30 for its in each), "linear code": linear_psnr(images)}


def linear_psnr(images) -> float:
    """PSNR in dB of the best linear code of 8×8-px patches to 16 numbers, made for these images."""
    patches = to_patches(torch.stack([image_to_tensor(image) for image in images]))
    patches = patches.flatten(0, 2).double()
    variances = torch.linalg.eigvalsh(torch.cov(patches.T))  # of ±1, in rising order
    return 10 * math.log10(4 * len(variances) / variances[:-16].sum().item())


@torch.no_grad()
def retrieval(encoder, images, embeddings) -> dict:
    """Share of tiles whose turned and restained copy is nearest to them, among all; both views."""
    pixels = torch.stack([(image_to_tensor(image) + 1) / 2 for image in images])
    generator = generator_for(0, "retrieval")
    jittered = stain_jitter(pixels, generator)
    elements = torch.randint(1, 8, (len(pixels),), generator=generator)
    views = {"turned": pixels, "restained": jittered, "turned and restained": jittered}
    result = {"chance": 1 / len(images)}
    for name, view in views.items():
        if "turned" in name:
            view = torch.stack([dihedral(image, int(e)) for image, e in zip(view, elements)])
        found = torch.cat([encoder(tensor_to_image(2 * image - 1))[:, 0] for image in view])
        cosines = (torch.nn.functional.normalize(found, dim=1)
                   @ torch.nn.functional.normalize(embeddings, dim=1).T)
        result[name] = (cosines.argmax(1) == torch.arange(len(images))).float().mean().item()
    return result


@torch.no_grad()
def guidance(pipeline, names, embeddings):
    """(scale → mean cosine of sample and condition with its interval, images by scale)."""
    result, images = {}, {}
    conditions = embeddings[:, 0].double().numpy()
    for scale in tqdm(SCALES, "guidance scales"):
        images[scale] = [pipeline(condition, STEPS, scale, SCHEDULER, seed=i,
                                  progress=lambda steps: steps).images[0]
                         for i, condition in enumerate(embeddings)]
        drawn = pipeline.encoder(images[scale])[:, 0].double().numpy()
        cosines = cosine_fidelity(conditions, drawn)
        shuffled = np.mean([cosine_fidelity(np.roll(conditions, shift, 0), drawn).mean()
                            for shift in range(1, len(drawn))])
        low, high = bootstrap(lambda rows: cosines[rows].mean(), len(cosines))
        result[f"{scale:g}"] = {"cosine": cosines.mean(), "interval": [low, high],
                                "shuffled": float(shuffled)}
    return result, images


if __name__ == "__main__":
    main()
