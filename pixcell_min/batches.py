"""What a micro-step sees: tiles, their variants and latents, noise, timesteps, condition dropout.

All randomness of micro-step k comes from a generator made of (seed, k), so a resumed run draws what
an uninterrupted one would have drawn, and so do several processes that share its micro-steps.
"""

import hashlib
from dataclasses import dataclass

import torch

from pixcell_min.data import batch_indices


@dataclass(frozen=True)
class Batch:
    """The drawn inputs of one micro-step, on the CPU, float32."""

    latents: torch.Tensor  # (B, C, H, W) clean
    embeddings: torch.Tensor  # (B, S, E)
    noise: torch.Tensor  # (B, C, H, W)
    timesteps: torch.Tensor  # (B,) int64 in [0, T)
    dropped: torch.Tensor  # (B,) bool: condition replaced by the null embedding

    def to(self, device):
        """The same batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def generator_for(seed: int, *key) -> torch.Generator:
    """A CPU generator that depends on (seed, key) alone, e.g. ("train", micro_step)."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def draw_batch(features, rows, schedule, condition_dropout: float, generator) -> Batch:
    """Draw variants, latents, noise, timesteps and condition dropout for feature rows (B,)."""
    rows = features.draw_variants(rows, generator)
    latents = features.sample_latents(rows, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(schedule.num_train_timesteps, (len(rows),), generator=generator)
    dropped = torch.rand(len(rows), generator=generator) < condition_dropout
    return Batch(latents, features.embeddings[rows], noise, timesteps, dropped)


def draw_micro_batches(features, rows, schedule, batch_size, count, condition_dropout, classes,
                       seed, device, rank: int, size: int, attempt: int):
    """Yield the `count` batches of an attempt at a step; each depends on seed and its number alone.

    rows: the unturned feature rows to train on; classes: of `group_by_class`, to draw all alike;
    process `rank` of `size` gets every size-th batch.
    """
    for micro_step in range(attempt * count + rank, (attempt + 1) * count, size):
        generator = generator_for(seed, "train", micro_step)
        # LoRA dropout draws from the global generator: seeded apart from the noise of the batch.
        torch.manual_seed(generator_for(seed, "dropout", micro_step).initial_seed())
        chosen = (balanced_indices(classes, batch_size, micro_step, seed) if classes
                  else batch_indices(len(rows), batch_size, micro_step, seed))
        yield draw_batch(features, rows[chosen], schedule, condition_dropout, generator).to(device)


def group_by_class(tiles) -> list[list[int]]:
    """Which of the tiles make up each class, by name. Raises: ValueError for a single class."""
    labels = [tile.label for tile in tiles]
    if len(set(labels)) < 2:
        raise ValueError("class-balanced sampling: expected training tiles in two class folders or "
                         f"more, got {len(set(labels))}; leave out --class-balanced")
    return [[i for i, its in enumerate(labels) if its == label] for label in sorted(set(labels))]


def balanced_indices(classes, batch_size: int, micro_step: int, seed: int) -> torch.Tensor:
    """As `batch_indices`, each class equally often: (batch_size,) int64.

    An endless row of permutations of the classes; each class has an endless row of its own tiles.
    """
    turns = batch_indices(len(classes), batch_size, micro_step, f"{seed}/classes").tolist()
    visits = [(micro_step * batch_size + i) // len(classes) for i in range(batch_size)]
    return torch.tensor([
        classes[turn][batch_indices(len(classes[turn]), 1, visit, f"{seed}/class {turn}")]
        for turn, visit in zip(turns, visits)])
