"""Draw the guide's figures: noise schedule, LoRA, the samplers' paths, attention to one token.

    python docs/figures.py

They are made by the functions that the guide explains, and stand beside it; a test says when one no
longer fits the code and must be drawn again.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from pixcell_min.base import NANO, load_vae
from pixcell_min.checkpoint import write_bytes
from pixcell_min.data import image_to_tensor, read_tile, tensor_to_image
from pixcell_min.embeddings import sincos_grid
from pixcell_min.images import curve_panel, image_grid, png_bytes
from pixcell_min.lora import LoRALinear
from pixcell_min.schedulers import SCHEDULER_NAMES, NoiseSchedule, build_scheduler
from pixcell_min.transformer import Attention

DOCS = Path(__file__).resolve().parent
TIMESTEPS = (0, 150, 300, 450, 700)  # at which the tile is shown
TILE = 112  # px at which it is shown
WIDE = 380  # px of a panel
MODES, SPREAD = (-1.0, 1.0), 0.1  # the toy's data: half N(−1, 0.1²), half N(1, 0.1²)
STEPS, PATHS = 20, 12
BLUE, ORANGE = "#1f5fbf", "#d95f02"


def noise_figure() -> Image.Image:
    """ᾱ and log₁₀ SNR over t; below, a tile whose latents were noised at five of them."""
    schedule = NoiseSchedule.linear()
    every, panels = torch.arange(schedule.num_train_timesteps), []
    for name, values in (("alphas_cumprod", schedule.alphas_cumprod),
                         ("log10 of the SNR", schedule.snr(every).log10())):
        title = f"{name} over t: {values[0]:.2g} to {values[-1]:.2g}"
        panels.append(curve_panel(title, {title: list(enumerate(values.tolist()))}, {title: BLUE},
                                  WIDE, 200, base=values.min().item()))
    captions = [f"t = {t}" for t in TIMESTEPS]
    return below(beside(panels), image_grid([noised_tile(schedule)], captions))


@torch.no_grad()
def noised_tile(schedule) -> list[Image.Image]:
    """docs/tile.png, encoded by the embedded VAE, noised at TIMESTEPS with one ε, decoded."""
    vae = load_vae(NANO, "cpu")
    mean, _ = vae.encode(image_to_tensor(read_tile(DOCS / "tile.png"))[None])  # (1, C, h, w)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    images = [tensor_to_image(vae.decode(schedule.add_noise(mean, noise, torch.tensor([t])))[0])
              for t in TIMESTEPS]
    return [image.resize((TILE, TILE), Image.Resampling.LANCZOS) for image in images]


def lora_figure() -> Image.Image:
    """A small layer as numbers: W, then s·B·A between its two factors, then the merged weight."""
    generator = torch.Generator().manual_seed(0)
    layer = LoRALinear(nn.Linear(48, 48), rank=4, alpha=8, generator=generator)
    with torch.no_grad():
        layer.base.weight.normal_(std=0.1, generator=generator)
        layer.lora_B.normal_(std=0.2, generator=generator)  # as if trained: it starts at 0
        before = layer.base.weight.clone()
        update = layer.scaling * layer.lora_B @ layer.lora_A
        layer.eval().merge()
    side, top, cell = 48 * 4, 70, 4
    places = {"W (out, in)": (20, top, before), "B (out, R)": (280, top, layer.lora_B),
              "s·B·A": (330, top, update), "W + s·B·A": (590, top, layer.base.weight)}
    figure = Image.new("RGB", (800, 290), "white")
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(15)
    for name, (left, upper, matrix) in places.items():
        picture = heat(matrix.detach(), 0.3, cell)
        figure.paste(picture, (left, upper))
        draw.text((left + picture.width // 2, top + side + 14), name, "black", font, anchor="mm")
    figure.paste(heat(layer.lora_A.detach(), 0.3, cell), (330, top - 28))
    draw.text((330 + side // 2, top - 42), "A (R, in)", "black", font, anchor="mm")
    for sign, left in (("+", 245), ("=", 556)):
        draw.text((left, top + side // 2), sign, "black", ImageFont.load_default(28), anchor="mm")
    return figure


def samplers_figure() -> Image.Image:
    """Paths of all four samplers from the same starts, with the best ε there is for the toy's data.

    Across: the step, 0 to STEPS; upwards: x / scale, which is what the network is given.
    """
    panels = []
    for name in SCHEDULER_NAMES:
        paths = sampler_paths(name)                                          # (STEPS + 1, PATHS)
        curves = {i: list(enumerate(path.tolist())) for i, path in enumerate(paths.T)}
        ink = {i: ORANGE if path[-1] > 0 else BLUE for i, path in enumerate(paths.T)}
        panels.append(curve_panel(name, curves, ink, WIDE, 230, base=paths.min().item()))
    return below(beside(panels[:2]), beside(panels[2:]))


def sampler_paths(name: str) -> torch.Tensor:
    """What the network is given at each row of a sampler's table, then the end: (rows + 1, n)."""
    sampler = build_scheduler(name, NoiseSchedule.linear())
    generator, x0, paths = torch.Generator().manual_seed(1), None, []
    start = torch.linspace(-1.6, 1.6, PATHS).reshape(-1, 1, 1, 1)
    latents = start * sampler.init_noise_sigma(STEPS)
    for row in sampler.steps(STEPS):
        paths.append(sampler.scale_model_input(latents, row))
        latents, x0 = sampler.step(best_epsilon(latents, row), latents, row, generator, x0)
    return torch.stack([*paths, latents]).flatten(1)


def best_epsilon(x, row):
    """E[ε | x] at x = alpha·x0 + sigma·ε for x0 of the toy's data; x and result (n, 1, 1, 1)."""
    variance = (row.alpha * SPREAD) ** 2 + row.sigma**2
    away = torch.stack([x - row.alpha * mode for mode in MODES])            # (modes, n, 1, 1, 1)
    weights = (-(away**2) / (2 * variance)).softmax(dim=0)
    return (weights * row.sigma * away / variance).sum(dim=0)


@torch.no_grad()
def attention_figure() -> Image.Image:
    """q·k/√d (above) and its softmax (below) of a 16×16 grid of queries: one token, then four."""
    torch.manual_seed(0)
    attention, tokens = Attention(64, 1), torch.randn(1, 4, 64)
    queries = attention.to_q(sincos_grid(16, 16, 64, 16, 1.0).float()[None])  # (1, N, D)
    rows = [[], []]
    for context in (tokens[:, :1], tokens):
        logits = queries @ attention.to_k(context).mT / 64**0.5              # (1, N, S)
        for row, values in zip(rows, (logits, logits.softmax(dim=-1))):
            row += [heat(one.reshape(16, 16), 1.0, 8) for one in values[0].T]
    return image_grid(rows, ("one token", *(f"four: token {i}" for i in (1, 2, 3, 4))))


def heat(matrix, limit: float, cell: int) -> Image.Image:
    """A matrix as cells of `cell` px: white at 0, orange up to `limit`, blue down to −`limit`."""
    ends = torch.tensor([[0x1f, 0x5f, 0xbf], [0xd9, 0x5f, 0x02]])            # blue, orange
    amount = (matrix / limit).clamp(-1, 1)[..., None]
    levels = 255 + amount.abs() * (ends[(amount[..., 0] > 0).long()] - 255)  # (rows, columns, 3)
    image = Image.fromarray(levels.round().to(torch.uint8).numpy())
    return image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST)


def beside(panels) -> Image.Image:
    """Two pictures of one size, side by side."""
    both = Image.new("RGB", (2 * panels[0].width, panels[0].height), "white")
    for i, panel in enumerate(panels):
        both.paste(panel, (i * panel.width, 0))
    return both


def below(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures, one under the other, centred on white."""
    both = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    both.paste(upper, ((both.width - upper.width) // 2, 0))
    both.paste(lower, ((both.width - lower.width) // 2, upper.height))
    return both


FIGURES = {"noise": noise_figure, "lora": lora_figure, "samplers": samplers_figure,
           "attention": attention_figure}


def main() -> int:
    """Write every figure beside this file."""
    for name, figure in FIGURES.items():
        write_bytes(DOCS / f"{name}.png", png_bytes(figure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
