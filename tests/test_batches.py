"""batches.py: what a micro-step draws, from which generator, and which process gets it."""

import dataclasses

import pytest
import torch

from pixcell_min import batches
from pixcell_min.batches import Batch, draw_batch, draw_micro_batches, generator_for
from pixcell_min.data import Tile, batch_indices
from pixcell_min.schedulers import NoiseSchedule

ROWS, SCHEDULE = torch.arange(8) + 3, NoiseSchedule.linear()


class Features:
    """Rows of numbers; the second variant of row r is row r + 100."""
    embeddings = torch.arange(200.0)[:, None, None]

    def draw_variants(self, rows, generator):
        return rows + 100 * torch.randint(2, rows.shape, generator=generator)

    def sample_latents(self, rows, generator):
        return rows[:, None, None, None] + torch.rand(len(rows), 16, 8, 8, generator=generator)


def micro_batches(attempt=0, size=1, rank=0, seed=0, batch_size=4, dropout=0.5, classes=None):
    return [*draw_micro_batches(Features(), ROWS, SCHEDULE, batch_size, 4, dropout, classes, seed, "cpu",
                                rank, size, attempt)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def test_each_step_draws_latents_noise_timesteps_and_dropout_anew():
    first, other = ([batch for attempt in (0, 1) for batch in micro_batches(attempt, seed=seed, batch_size=8)]
                    for seed in (0, 1))
    assert_same(first, micro_batches(0, batch_size=8) + micro_batches(1, batch_size=8))
    for name in ("latents", "noise", "timesteps", "dropped"):  # all pairs of steps, another seed too
        drawn = [getattr(batch, name) for batch in first + other]
        assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), name


def test_a_micro_steps_generators_are_made_of_its_seed_purpose_and_number():
    for number, batch in enumerate(draw_micro_batches(
            Features(), ROWS, SCHEDULE, 4, 2, 0.5, None, 7, "cpu", 0, 1, 3), 6):
        # LoRA's dropout draws from torch's own, which must not repeat the batch's noise.
        assert torch.initial_seed() == generator_for(7, "dropout", number).initial_seed()
        chosen = ROWS[batch_indices(8, 4, number, 7)]
        assert_same([batch], [draw_batch(Features(), chosen, SCHEDULE, 0.5, generator_for(7, "train", number))])
    keys = [(0, "train", 0), (0, "train", 1), (0, "dropout", 0), (1, "train", 0), (0, "lora")]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)
    assert generator_for(0, "train", 0).initial_seed() == 0xbca330dfe1b49acd  # or saved runs would go on otherwise


def test_a_batch_holds_variants_in_range_and_depends_on_its_generator_alone():
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(draw_batch(Features(), ROWS.repeat(50), SCHEDULE, 0.25, generator_for(0)))
    assert_same(draws[:1], draws[1:])
    batch, = draws[:1]
    rows = batch.embeddings[:, 0, 0].long()
    assert torch.equal(rows % 100, ROWS.repeat(50)) and {*(rows // 100).tolist()} == {0, 1}
    assert torch.equal(batch.latents.floor()[:, 0, 0, 0].long(), rows)  # of the same variants
    assert batch.noise.shape == batch.latents.shape == (400, 16, 8, 8) and abs(batch.noise.std() - 1) < 0.01
    assert batch.timesteps.min() >= 0 and 900 < batch.timesteps.max() < 1000 and batch.timesteps.dtype == torch.int64
    assert 0.15 < batch.dropped.float().mean() < 0.35 and batch.dropped.dtype == torch.bool
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.noise = None


def test_no_condition_is_dropped_unless_asked_for(monkeypatch):
    monkeypatch.setattr(batches.torch, "rand", lambda *shape, generator=None: torch.zeros(shape))
    features = Features()
    features.sample_latents = lambda rows, generator: torch.zeros(len(rows), 1, 1, 1)
    assert not draw_batch(features, ROWS, SCHEDULE, 0.0, generator_for(0)).dropped.any()
    assert draw_batch(features, ROWS, SCHEDULE, 0.1, generator_for(0)).dropped.all()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_micro_steps_of_one_in_turn(size):
    alone = micro_batches(attempt=2)
    for rank in range(size):
        assert_same(micro_batches(attempt=2, size=size, rank=rank), alone[rank::size])


def test_classes_are_drawn_alike_where_they_are_given():
    batch, *_ = micro_batches(classes=[[0], [1, 2, 3, 4, 5, 6, 7]], batch_size=8)
    assert (batch.embeddings[:, 0, 0] % 100 == 3).sum() == 4


def test_a_batch_moves_as_a_whole():
    moved = micro_batches()[0].to("meta")
    assert type(moved) is Batch and {t.device.type for t in vars(moved).values()} == {"meta"}


def test_balanced_draws_take_every_class_equally_often_and_every_tile_of_it():
    classes = [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9]]
    draws = torch.cat([batches.balanced_indices(classes, 4, step, 3) for step in range(42)]).tolist()
    for start in range(0, 168, 3):  # in each turn every class once
        assert sorted(sum(i in its for its in classes[:1]) + 2 * (i == 9)
                      for i in draws[start:start + 3]) == [0, 1, 2]
    large = [i for i in draws if i < 7]
    for start in range(0, 56, 7):  # each class in permutations of its own
        assert sorted(large[start:start + 7]) == classes[0]
    assert large[:7] != large[7:14] and len({tuple(large[i:i + 7]) for i in range(0, 56, 7)}) > 4
    again = [batches.balanced_indices(classes, 4, 5, seed).tolist() for seed in (3, 4)]
    assert again[0] == draws[20:24] != again[1]  # any batch alone, from the seed


def test_classes_and_the_tiles_of_each_have_orders_of_their_own():
    """Rows of permutations as `batch_indices` makes them, from seeds that saved runs depend on."""
    classes, drawn = [[0, 1, 2], [3, 4]], batches.balanced_indices([[0, 1, 2], [3, 4]], 4, 0, 5).tolist()
    turns = batch_indices(2, 4, 0, "5/classes").tolist()
    assert drawn == [classes[turn][batch_indices(len(classes[turn]), 1, i // 2, f"5/class {turn}")]
                     for i, turn in enumerate(turns)]


def test_tiles_are_grouped_by_class_in_the_order_of_names():
    tiles = [Tile("a", label) for label in ("TUM", "ADI", "TUM", "STR", "ADI")]
    assert batches.group_by_class(tiles) == [[1, 4], [3], [0, 2]]
    assert batches.group_by_class(tiles[:2]) == [[1], [0]]
    for single in (tiles[:1], [tiles[0], tiles[2]]):
        with pytest.raises(ValueError, match="in two class folders or more, got 1; leave out --class-balanced"):
            batches.group_by_class(single)
