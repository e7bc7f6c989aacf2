"""The network against recorded outputs of the released class, PixArt of diffusers, tensor lists."""

import math
from pathlib import Path

import pytest
import torch
from references import transformer_twins
from safetensors.torch import load_file

from pixcell_min.embeddings import TokenPositions
from pixcell_min.transformer import WEIGHTS_NAME, PixCellTransformer, TransformerConfig

DATA = Path(__file__).parent / "data"
GOLDEN = 2e-5  # outputs reach 2.8; recorded on another machine, whose sums have another order
TWIN = 1e-5  # same machine, outputs of order 1; one-token attention and the sums of tables differ
CONFIG_256 = TransformerConfig()
CONFIG_1024 = TransformerConfig(sample_size=128, caption_num_tokens=16, interpolation_scale=2)


def close(result, expected, bound=TWIN):
    torch.testing.assert_close(result, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("tokens", [1, 16])
def test_recorded_outputs_of_the_released_class(tokens):
    folder = DATA / "golden" / f"pixcell-tiny-{tokens}tok"
    case = load_file(folder / "io.safetensors")
    model = PixCellTransformer.from_pretrained(folder / "transformer")
    with torch.no_grad():
        output = model(latents=case["latents"], timesteps=case["timesteps"],
                       encoder_hidden_states=case["embeddings"])
    close(output, case["output"], GOLDEN)


def test_token_positions_equal_the_stored_ones_exactly():
    folder = DATA / "golden" / "pixcell-tiny-16tok" / "transformer"
    stored = load_file(folder / WEIGHTS_NAME)["y_pos_embed.y_pos_embed"]
    config = PixCellTransformer.from_pretrained(folder).config
    assert torch.equal(TokenPositions(config).y_pos_embed, stored)


@pytest.mark.parametrize("tokens", [1, 4, 16])
@pytest.mark.parametrize("sample_size, interpolation_scale, size", [
    (8, 0.5, (8, 8)),  # as trained
    (8, 1, (12, 12)), (8, 0.5, (4, 4)),  # other sizes, positions stretched
    (8, 0.5, (4, 10)), (8, 2, (14, 6)),  # not square
    (128, None, (6, 8)),  # the scale follows from sample_size: 2
])
def test_same_output_as_pixart(tokens, sample_size, interpolation_scale, size):
    ours, theirs = transformer_twins(tokens, sample_size, interpolation_scale)
    latents, embeddings = torch.randn(3, 16, *size), torch.randn(3, tokens, 20)
    timesteps = torch.tensor([0.0, 946.421, 17.5])  # fractional, as Euler-ancestral gives
    # PixArt has no token positions.
    given = embeddings + ours.y_pos_embed.y_pos_embed if tokens > 1 else embeddings
    with torch.no_grad():
        output = ours(latents, timesteps, embeddings)
        expected = theirs(latents, given, timestep=timesteps).sample
    close(output, expected)
    assert expected.std() > 0.1


def test_same_gradients_as_pixart():
    ours, theirs = transformer_twins(4, 8, 0.5)
    latents, embeddings = torch.randn(2, 16, 8, 8), torch.randn(2, 4, 20)
    timesteps, given = torch.tensor([10, 700]), embeddings + ours.y_pos_embed.y_pos_embed
    ours(latents, timesteps, embeddings).square().sum().backward()
    theirs(latents, given, timestep=timesteps).sample.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        assert (parameter.grad - gradient).abs().max() < TWIN * gradient.abs().max(), name


def tensor_list(name):
    """{tensor: shape} of a stored list."""
    rows = [line.split("\t") for line in (DATA / f"{name}.tsv").read_text().splitlines()[1:]]
    return {key: tuple(int(n) for n in shape.split(",")) for key, shape in rows}


@pytest.mark.parametrize("name, config, count", [
    ("pixcell-256", CONFIG_256, 604), ("pixcell-1024", CONFIG_1024, 605)])
def test_names_and_shapes_are_the_released_ones(name, config, count):
    with torch.device("meta"):
        model = PixCellTransformer(config)
    expected = tensor_list(name)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected
    assert len(expected) == count
    # The null embedding and the token positions are buffers, of 1536 numbers a token each.
    buffers = 1536 if name == "pixcell-256" else 2 * 16 * 1536
    assert sum(p.numel() for p in model.parameters()) == 608_072_960
    assert sum(math.prod(shape) for shape in expected.values()) == 608_072_960 + buffers
