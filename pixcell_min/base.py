"""A base model on disk → a loaded pipeline: where the weights lie, not what is done with them.

A base folder is laid out like a PixCell snapshot: `transformer/ vae/ scheduler/`, and `uni/` for
the encoder. A real snapshot brings only `vae/config.json` and no encoder; their weights are then
looked for beside it, in `sd3-vae/` (or `sd3-vae/vae/`) and `uni2-h/`, then under the repository's
`weights/`, then in the hub's cache. Nothing is ever fetched from here.
"""

import hashlib
import os
from functools import lru_cache, partial
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from pixcell_min.checkpoint import file_hash, read_json
from pixcell_min.loading import move
from pixcell_min.pipeline import PixCellPipeline
from pixcell_min.precision import choose_device, choose_dtype, decoding_dtype, hold_products_in
from pixcell_min.released import RELEASES, VAE_FILE, how_to_get, release_of
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.transformer import WEIGHTS_NAME as TRANSFORMER_WEIGHTS
from pixcell_min.transformer import PixCellTransformer, TransformerConfig
from pixcell_min.uni import TileEncoder, read_encoder
from pixcell_min.vae import WEIGHTS_NAME as VAE_WEIGHTS
from pixcell_min.vae import AutoencoderKL, VAEConfig

NANO = "weights/pixcell-nano"
REPOSITORY = Path(__file__).resolve().parent.parent


def find_base(path=None) -> Path:
    """The base folder: `path`, else $PIXCELL_BASE, else the embedded one.

    `path` is a folder (a relative one counts from here, then from the repository), or what
    huggingface_hub has in its cache: a name (`owner/name`) or a folder `models--owner--name`, whose
    main revision is taken. Raises: ValueError if there is none with a `transformer/` on this disk.
    """
    path = Path(path or os.environ.get("PIXCELL_BASE") or NANO)
    for folder in (path, REPOSITORY / path, *_snapshot(path)):
        if (folder / "transformer").is_dir():
            return folder.absolute()  # the encoder is loaded later, perhaps from another folder
    name = release_of(path)
    command = f"; run {how_to_get(name)}" if name else ""
    raise ValueError(f"{path}: no base model; expected a folder with transformer/ vae/ scheduler/, "
                     f"or a name in the hub's cache (see README: weights){command}")


def _snapshot(path):
    """[the cached snapshot that `path` names], or []."""
    if path.name.startswith("models--"):
        repository, cache = path.name.removeprefix("models--").replace("--", "/", 1), path.parent
    else:
        repository, cache = path.as_posix(), None
    return [folder.parent for folder in _cached(repository, "transformer/config.json", cache)]


def _cached(repository, file, cache=None):
    """[folder of a file in the hub's cache (None: huggingface_hub's own)], or []; asks nobody."""
    try:
        found = try_to_load_from_cache(repository, file, cache_dir=cache)
    except HFValidationError:  # an ordinary path, no name on the hub
        return []
    return [Path(found).parent] if isinstance(found, str) else []


def _cache_of(base):
    """The hub cache in which a base lies; None: it lies elsewhere."""
    inside = len(base.parents) > 2 and base.parents[1].name.startswith("models--")
    return base.parents[2] if inside else None


def encoder_folder(base: Path) -> Path:
    """Folder of the tile encoder of `base`. Raises: ValueError naming where it was looked for."""
    folders = (base / "uni", base.parent / "uni2-h", REPOSITORY / "weights" / "uni2-h",
               *_cached(RELEASES["uni2-h"].repository, "config.json", _cache_of(base)))
    return _first(base, folders, "config.json", "tile encoder (UNI2-h)", "uni2-h")


def vae_weights(base, advice: str = "") -> Path:
    """File of the VAE weights of `base`. Raises: ValueError naming where it was looked for."""
    base = find_base(base)
    beside = [folder / part for folder in (base.parent, REPOSITORY / "weights")
              for part in ("sd3-vae", "sd3-vae/vae")]
    folders = (base / "vae", *beside,
               *_cached(RELEASES["sd3-vae"].repository, VAE_FILE, _cache_of(base)))
    return _first(base, folders, VAE_WEIGHTS, "VAE weights", "sd3-vae", advice) / VAE_WEIGHTS


def _first(base, folders, name, what, release, advice=""):
    for folder in folders:
        if (folder / name).is_file():
            return folder
    looked = ", ".join(dict.fromkeys(str(folder / name) for folder in folders))
    raise ValueError(f"{base}: no {what}; looked for {looked} (see README: weights); "
                     f"run {how_to_get(release)}{advice}")


def load_pixcell_base(path=None, device="auto", mixed_precision="auto") -> PixCellPipeline:
    """Load a base (default: $PIXCELL_BASE, else pixcell-nano) as a pipeline, its weights frozen.

    device: auto, cpu, cuda…; mixed_precision: auto, no, fp16 or bf16, the autocast of the denoiser,
    in which the weights of its products are held. Inert layers stay in the file, so on the CPU:
    leave them out when LoRA is to be trained. VAE and encoder are loaded when first used.
    Raises: ValueError if a file is missing, broken or does not fit.
    """
    base, device = find_base(path), choose_device(device)
    schedule = read_schedule(base)
    dtype = choose_dtype(mixed_precision, device)
    transformer = PixCellTransformer.from_pretrained(
        base / "transformer", prepare=lambda network: hold_products_in(network, dtype),
        leave_inert=True)
    move(transformer.requires_grad_(False), device, leave=transformer.inert_layers())
    return PixCellPipeline(transformer, partial(load_vae, base, device, decoding_dtype(dtype)),
                           partial(load_encoder, base, device), schedule,
                           base_hash=file_hash(base / "transformer" / TRANSFORMER_WEIGHTS),
                           device=device, dtype=dtype)


def read_schedule(base) -> NoiseSchedule:
    """The noise levels of a base folder. Raises: ValueError: missing, or not done here."""
    path = find_base(base) / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    try:
        return NoiseSchedule.from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_vae(base=None, device="auto", decoder_dtype=None) -> AutoencoderKL:
    """The frozen autoencoder of a base folder; float32, but for the decoder's products.

    decoder_dtype: of autocast around the decoder, or None. Raises: ValueError: missing or broken.
    """
    def prepare(vae):
        if device.type == "cpu":  # the faster one there; CUDA's group norm takes the other alone
            vae.to(memory_format=torch.channels_last)
        hold_products_in(vae.decoder, decoder_dtype)

    base, device = find_base(base), choose_device(str(device))
    vae = AutoencoderKL.from_pretrained(base / "vae", vae_weights(base), prepare=prepare)
    return vae.requires_grad_(False).to(device)


def read_vae_config(base=None) -> VAEConfig:
    """The autoencoder's sizes, latent scale and shift, without its weights. Raises: ValueError."""
    path = find_base(base) / "vae" / "config.json"
    return VAEConfig.from_dict(read_json(path), path)


def load_encoder(base=None, device="auto") -> TileEncoder:
    """The frozen tile encoder of a base folder, float32, giving as many tokens as the base takes.

    Raises: ValueError: missing or broken.
    """
    base = find_base(base)
    return TileEncoder.from_pretrained(
        encoder_folder(base), tokens=_num_tokens(base)).to(choose_device(str(device)))


def _num_tokens(base):
    path = base / "transformer" / "config.json"
    return TransformerConfig.from_dict(read_json(path), path).caption_num_tokens


def feature_files(base) -> list[Path]:
    """What latents and embeddings depend on: weights and config of the VAE, then of the encoder."""
    base = find_base(base)
    _, weights = read_encoder(encoder_folder(base))
    return [vae_weights(base), base / "vae" / "config.json", weights,
            weights.with_name("config.json")]


def features_hash(base) -> str:
    """Hashes of `feature_files`, joined, and S if above 1.

    Two bases may share the files and yet cut tiles into other crops. Raises: ValueError.
    """
    tokens = _num_tokens(find_base(base))
    crops = [f"{tokens}tokens"] if tokens > 1 else []
    return "-".join([*map(file_hash, feature_files(base)), *crops])


def settings_hash(base) -> str:
    """SHA-256 of the two files that say a base's sizes and its noise. Raises: ValueError."""
    files = "transformer/config.json", "scheduler/scheduler_config.json"
    hashes = "".join(file_hash(find_base(base) / name) for name in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


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
