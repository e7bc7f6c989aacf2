"""A base model on disk → a loaded pipeline: where the weights lie, not what is done with them.

A base folder is laid out like a PixCell snapshot: `transformer/ vae/ scheduler/`, and `uni/` for
the encoder. A real snapshot brings only `vae/config.json` and no encoder; their weights are then
looked for beside it, in `sd3-vae/` (or `sd3-vae/vae/`) and `uni2-h/`.
"""

import os
from functools import lru_cache, partial
from pathlib import Path

import torch

from pixcell_min.checkpoint import file_hash, read_json
from pixcell_min.pipeline import PixCellPipeline
from pixcell_min.precision import choose_device, choose_dtype, hold_products_in
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.transformer import WEIGHTS_NAME as TRANSFORMER_WEIGHTS
from pixcell_min.transformer import PixCellTransformer
from pixcell_min.uni import WEIGHT_NAMES, TileEncoder
from pixcell_min.vae import WEIGHTS_NAME as VAE_WEIGHTS
from pixcell_min.vae import AutoencoderKL, VAEConfig

NANO = "weights/pixcell-nano"
REPOSITORY = Path(__file__).resolve().parent.parent


def find_base(path=None) -> Path:
    """The base folder: `path`, else $PIXCELL_BASE, else the embedded one.

    A relative path counts from here, then from the repository. Raises: ValueError if there is no
    such folder or it holds no `transformer/`.
    """
    path = Path(path or os.environ.get("PIXCELL_BASE") or NANO)
    for folder in (path, REPOSITORY / path):
        if (folder / "transformer").is_dir():
            return folder.absolute()  # the encoder is loaded later, perhaps from another folder
    raise ValueError(f"{path}: no base model; expected a folder with transformer/ vae/ scheduler/ "
                     "(see README: weights)")


def encoder_folder(base: Path) -> Path:
    """Folder of the tile encoder of `base`. Raises: ValueError naming where it was looked for."""
    return _first(
        base, (base / "uni", base.parent / "uni2-h"), "config.json", "tile encoder (UNI2-h)")


def vae_weights(base, advice: str = "") -> Path:
    """File of the VAE weights of `base`. Raises: ValueError naming where it was looked for."""
    base = find_base(base)
    beside = base.parent / "sd3-vae"
    folders = (base / "vae", beside, beside / "vae")
    return _first(base, folders, VAE_WEIGHTS, "VAE weights", advice) / VAE_WEIGHTS


def _first(base, folders, name, what, advice=""):
    for folder in folders:
        if (folder / name).is_file():
            return folder
    looked = ", ".join(str(folder / name) for folder in folders)
    raise ValueError(f"{base}: no {what}; looked for {looked} (see README: weights){advice}")


def load_pixcell_base(path=None, device="auto", mixed_precision="auto") -> PixCellPipeline:
    """Load a base (default: $PIXCELL_BASE, else pixcell-nano) as a pipeline, its weights frozen.

    device: auto, cpu, cuda…; mixed_precision: auto, no, fp16 or bf16, the autocast of the denoiser,
    in which the weights of its products are held. VAE and encoder are loaded when first used. Raises: ValueError if a file is missing, broken or
    does not fit.
    """
    base, device = find_base(path), choose_device(device)
    schedule = NoiseSchedule.from_config(read_json(base / "scheduler" / "scheduler_config.json"))
    transformer = PixCellTransformer.from_pretrained(base / "transformer").requires_grad_(False)
    hold_products_in(transformer, dtype := choose_dtype(mixed_precision, device))
    transformer.to(device)
    return PixCellPipeline(transformer, partial(load_vae, base, device),
                           partial(load_encoder, base, device), schedule,
                           base_hash=file_hash(base / "transformer" / TRANSFORMER_WEIGHTS),
                           device=device, dtype=dtype)


def load_vae(base=None, device="auto") -> AutoencoderKL:
    """The frozen autoencoder of a base folder, float32. Raises: ValueError: missing or broken."""
    base = find_base(base)
    vae = AutoencoderKL.from_pretrained(base / "vae", vae_weights(base))
    # Decoding is faster so; the encoder stays as it is, or cached features would change their bits.
    vae.decoder.to(memory_format=torch.channels_last)
    return vae.requires_grad_(False).to(choose_device(str(device)))


def read_vae_config(base=None) -> VAEConfig:
    """The autoencoder's sizes, latent scale and shift, without its weights. Raises: ValueError."""
    path = find_base(base) / "vae" / "config.json"
    return VAEConfig.from_dict(read_json(path), path)


def load_encoder(base=None, device="auto") -> TileEncoder:
    """The frozen tile encoder of a base folder, float32. Raises: ValueError: missing or broken."""
    return TileEncoder.from_pretrained(
        encoder_folder(find_base(base))).to(choose_device(str(device)))


def features_hash(base) -> str:
    """What latents and embeddings depend on: hashes of the VAE's and encoder's files, joined."""
    base = find_base(base)
    folder = encoder_folder(base)
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()),
                   folder / WEIGHT_NAMES[0])
    return "-".join(file_hash(path) for path in (vae_weights(base), base / "vae" / "config.json",
                                                 weights, folder / "config.json"))


@lru_cache(maxsize=1)
def _default_encoder(base):
    return load_encoder(base)


def uni2h_encoder(images):
    """Embed PIL image(s) or float tensor(s) with the default base's encoder → (B, S, E) float32.

    On the CPU, where `load_adapter` puts an adapter; a pipeline takes it to its own device.
    The default base is the one `load_pixcell_base()` loads: $PIXCELL_BASE or the embedded
    pixcell-nano, whose encoder is a small stand-in of the same class. Raises: ValueError as
    `TileEncoder.forward`.
    """
    return _default_encoder(find_base())(images).cpu()
