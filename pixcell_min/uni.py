"""UNI2-h, the frozen tile encoder: a timm vision transformer, tiles → tokens (B, S, E).

Each token speaks of one crop of a √S×√S grid; S is the base's. Includes its preprocessing. The same
code builds the small encoder of the embedded base, whose `config.json` carries `model_args`. For
the real UNI2-h these arguments are not in the file (timm does not fill them in from the hub), so
they stand here.
Source: Chen et al. 2024 (UNI); the architecture is timm's `vit_giant_patch14_224`.
"""

import math
import reprlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from pixcell_min.checkpoint import read_json
from pixcell_min.loading import build_on_meta, load_weights

ARCHITECTURE = "vit_giant_patch14_224"
UNI2H_ARGS = {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536,
              "init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "reg_tokens": 8}
MAX_SIZE, MAX_DEPTH = 2**16, 256  # of model_args; far above any released encoder's
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TileEncoder(nn.Module):
    """Preprocessing and vision transformer; frozen, evaluation mode, any number of tiles a call."""

    def __init__(self, model_args=None, mean=IMAGENET_MEAN, std=IMAGENET_STD, tokens=1):
        """`model_args`: sizes that differ from UNI2H_ARGS; other keys of timm's are not read.

        tokens: S, 1 for PixCell-256, 16 for PixCell-1024. Raises: ValueError if it is no square
        number, or for arguments timm refuses.
        """
        # Here: with torchvision it takes seconds and 200 MB, and cached features need no encoder.
        import timm
        from timm.layers import SwiGLUPacked

        super().__init__()
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"tokens of a tile must be a square number, got {tokens}")
        if not isinstance(model_args or {}, dict):
            raise ValueError(f"model_args must be a table of arguments, got {model_args!r}")
        # Keys beyond ours say nothing new: a network they would change has other tensors.
        args = UNI2H_ARGS | {k: v for k, v in (model_args or {}).items() if k in UNI2H_ARGS}
        largest = {"depth": MAX_DEPTH}
        if any(isinstance(v, (int, float)) and not abs(v) <= largest.get(k, MAX_SIZE)
               for k, v in args.items()):
            raise ValueError(f"model_args {reprlib.repr(args)}: expected a depth of {MAX_DEPTH} "
                             f"and other numbers of {MAX_SIZE} at most")
        try:
            self.vit = timm.create_model(
                ARCHITECTURE, pretrained=False, num_classes=0, no_embed_class=True,
                dynamic_img_size=True, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, **args)
        except (AssertionError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"model_args {reprlib.repr(args)}: timm refuses them "
                             f"({reprlib.repr(str(error))})") from None
        self.input_size, self.embedding_dim = args["img_size"], args["embed_dim"]
        self.mean, self.std, self.tokens = tuple(mean), tuple(std), tokens

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, tokens=1):
        """Read `config.json` and `model.safetensors` or `pytorch_model.bin`, strictly, and freeze.

        Raises: ValueError if a file is missing, is not this network, or holds anything but tensors.
        """
        config, path = read_encoder(folder)
        source, normalisation = path.with_name("config.json"), _normalisation(config, path.parent)
        encoder = build_on_meta(
            lambda: cls(config.get("model_args"), *normalisation, tokens).to(dtype), source)
        load_weights(encoder.vit, path)
        return encoder.requires_grad_(False).eval()

    def forward(self, images):
        """PIL image(s), or float tensor (3, H, W), (B, 3, H, W) in [0, 1] → embeddings (B, S, E).

        In the weights' dtype; differentiable for tensors. Crops in row order, each resized to the
        input size. Raises: ValueError for other inputs.
        """
        weight = self.vit.patch_embed.proj.weight
        crops = [self._crops(image) for image in self._as_list(images)]    # each (S, 3, size, size)
        pixels = torch.cat(crops).to(weight.device, weight.dtype)          # (B·S, 3, size, size)
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return rearrange(self.vit((pixels - mean) / std), "(b s) e -> b s e", b=len(crops))

    @staticmethod
    def _as_list(images):
        if isinstance(images, Image.Image) or (
                isinstance(images, torch.Tensor) and images.ndim == 3):
            images = [images]
        images = list(images)
        if not images:
            raise ValueError("no tile given; expected at least one PIL image or tensor")
        for image in images:
            is_tensor = isinstance(image, torch.Tensor)
            if not is_tensor and not isinstance(image, Image.Image):
                raise ValueError("expected PIL images or float tensors, "
                                 f"got {type(image).__name__}")
            if is_tensor and (
                    image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point()):
                raise ValueError("a tensor tile must be float (3, H, W) in [0, 1], "
                                 f"got {image.dtype} {tuple(image.shape)}")
        return images

    def _crops(self, image):
        """One tile → (S, 3, size, size) in [0, 1]; PIL resizes PIL tiles, as in UNI2-h itself."""
        size = self.input_size
        if isinstance(image, Image.Image):
            image = image.convert("RGB")
            boxes = crop_boxes(*image.size, self.tokens)
            # Cut, then resized: `resize(box=…)` would blend in pixels from beyond the crop.
            crops = [np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))
                     for box in boxes]
            return rearrange(torch.from_numpy(np.stack(crops)), "s h w c -> s c h w").float() / 255
        parts = [image[:, top:bottom, left:right]
                 for left, top, right, bottom in crop_boxes(*image.shape[:0:-1], self.tokens)]
        return F.interpolate(
            torch.stack(parts).float(), (size, size), mode="bilinear", antialias=True)


def read_encoder(folder) -> tuple[dict, Path]:
    """(configuration, weights file) of an encoder's folder.

    Raises: ValueError if one of the two is missing, or for another architecture.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("architecture", ARCHITECTURE) != ARCHITECTURE:
        raise ValueError(f"{folder / 'config.json'}: architecture {config['architecture']!r}, "
                         f"expected {ARCHITECTURE!r}")
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return config, folder / name
    raise ValueError(f"{folder}: no {' or '.join(WEIGHT_NAMES)}; put the encoder's weights there")


def _normalisation(config, folder):
    """(mean, std) of `pretrained_cfg`, ImageNet's where it names none."""
    pretrained = config.get("pretrained_cfg") or {}
    if not isinstance(pretrained, dict):
        raise ValueError(f"{folder / 'config.json'}: pretrained_cfg must be a table")
    values = [pretrained.get("mean", IMAGENET_MEAN), pretrained.get("std", IMAGENET_STD)]
    for value in values:
        if not isinstance(value, (list, tuple)) or len(value) != 3 or any(
                type(v) not in (int, float) for v in value):
            raise ValueError(f"{folder / 'config.json'}: mean and std must be three numbers, "
                             f"got {value!r}")
    return values


def crop_boxes(width, height, tokens):
    """(left, top, right, bottom) of `tokens` equal square crops that fill the centred square.

    A √S×√S grid in row order: 256 px each of a tile of 1024 px with 16 tokens. Up to √S − 1 pixels
    at the square's edges are left out. Raises: ValueError if crops would be smaller than a pixel.
    """
    count = math.isqrt(tokens)
    side = min(width, height) // count
    if not side:
        raise ValueError(f"a tile of {width}×{height} px is too small for {count}×{count} crops")
    left, top = (width - count * side) // 2, (height - count * side) // 2
    return [(x, y, x + side, y + side) for y in range(top, top + count * side, side)
            for x in range(left, left + count * side, side)]
