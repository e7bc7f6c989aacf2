"""The embedding adapter: identity at the start, equation, scale, gradients, files and refusals."""

import math
import os

import pytest
import torch
from torch import nn

from pixcell_min.adapter import EmbeddingAdapter, load_adapter, save_adapter
from pixcell_min.checkpoint import read_tensors, save_tensors

FLOAT32_ROUNDING = 1e-6  # of the largest value
EMBEDDING = 24


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(embedding_dim=EMBEDDING, **options):
    """An adapter that is no longer the identity."""
    adapter = EmbeddingAdapter(embedding_dim, generator=generator(), **options)
    for seed, parameter in enumerate(adapter.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=generator(seed + 1))
    return adapter


def embeddings(*shape):
    return torch.randn(*shape, EMBEDDING, generator=generator(9))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_new_adapter_is_exactly_the_identity(scale, dtype):
    x = (embeddings(4, 1) * scale).to(dtype)
    out = EmbeddingAdapter(EMBEDDING)(x)
    assert out.dtype == dtype and torch.equal(out, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(EmbeddingAdapter(EMBEDDING)(x), x)


def test_equation():
    adapter, x = trained(), embeddings(5)
    size = (x**2).mean(1, keepdim=True) ** 0.5
    low = nn.functional.gelu(x / size @ adapter.fc1.weight.T + adapter.fc1.bias)
    expected = x + size * (low @ adapter.fc2.weight.T) + size * adapter.fc2.bias
    torch.testing.assert_close(adapter(x), expected)
    assert (adapter(x) - x).abs().max() > 0.1


def test_sizes():
    adapter = EmbeddingAdapter(1536)
    shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    assert shapes == {"fc1.weight": (384, 1536), "fc1.bias": (384,), "fc2.weight": (1536, 384), "fc2.bias": (1536,)}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())
    assert EmbeddingAdapter(24, 10).fc1.out_features == 10
    # With LoRA of rank 8 on the live layers of PixCell-256 (FACTS) it stays under 1 % of the network.
    assert (sum(p.numel() for p in adapter.parameters()) + 3_096_576) / 608_072_960 < 0.0071


def test_start_depends_on_the_generator_alone():
    def draw(global_seed, seed):
        torch.manual_seed(global_seed)
        adapter = EmbeddingAdapter(400, 300, generator=generator(seed))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=generator(global_seed)))  # global stream untouched
        assert not adapter.fc1.bias.any()
        return adapter.fc1.weight

    weight = draw(0, 5)
    assert torch.equal(weight, draw(1, 5)) and not torch.equal(weight, draw(0, 6))
    assert 0.999 / math.sqrt(400) < weight.abs().max() <= 1 / math.sqrt(400)  # U(±1/√E)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1), (2, 3, 4)])
def test_any_leading_shape(shape):
    adapter, x = trained(), embeddings(*shape)
    out = adapter(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out.reshape(-1, EMBEDDING), adapter(x.reshape(-1, EMBEDDING)))


def test_embeddings_do_not_mix():
    adapter, x = trained(), embeddings(2, 3)
    changed = x.clone()
    changed[1, 2] += 1
    same = (adapter(changed) == adapter(x)).all(-1)
    assert same.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("scale", [2.0**-10, 1e-3, 0.7, 300.0])
def test_scaling_the_embedding_scales_the_result(scale):
    adapter, x = trained(), embeddings(5)
    error = (adapter(scale * x) - scale * adapter(x)).abs().max() / (scale * adapter(x)).abs().max()
    assert error < FLOAT32_ROUNDING


def test_an_embedding_of_zeros_is_harmless():
    adapter, x = trained(), torch.zeros(2, EMBEDDING, requires_grad=True)
    out = adapter(x)
    out.sum().backward()
    assert out.abs().max() < 1e-9 and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_gradcheck():
    adapter = trained().double()
    x = embeddings(2).double().requires_grad_()
    names, parameters = zip(*adapter.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_first_gradients_reach_the_last_layer_and_training_works():
    adapter, x = EmbeddingAdapter(EMBEDDING, generator=generator()), embeddings(64)
    target = x + 0.5 + torch.tanh(x[:, :1]) * x.new_ones(EMBEDDING)  # a shift, and one non-linear direction
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (adapter(x) - target).square().mean()
        loss.backward()
        if not losses:
            assert adapter.fc2.weight.grad.any() and not adapter.fc1.weight.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_parameters_are_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        adapter = EmbeddingAdapter(8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_and_autocast(dtype):
    adapter, x = trained(), embeddings(5)
    assert torch.equal(adapter(x.to(dtype)),
                       x.to(dtype) + (adapter(x.to(dtype).float()) - x.to(dtype).float()).to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        out = adapter(x)
    assert out.dtype == torch.float32
    assert (out - adapter(x)).abs().max() < 2**-6 * adapter(x).abs().max()  # bf16 products of 24 and 6 terms
    out.sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("shape", [(3, EMBEDDING - 1), (EMBEDDING, 1), ()])
def test_another_width_is_refused(shape):
    with pytest.raises(ValueError, match=r"takes embeddings \(…, 24\), got \("):
        EmbeddingAdapter(EMBEDDING)(torch.zeros(shape))


@pytest.mark.parametrize("sizes", [(0,), (3,), (8, 0), (-4, 2)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        EmbeddingAdapter(*sizes)


# files


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("hidden", [None, 5])
def test_file_round_trip(ending, hidden, tmp_path):
    adapter, x = trained(hidden_dim=hidden).train(), embeddings(3)
    path = tmp_path / f"adapter.{ending}"
    save_adapter(adapter, path, {"base_hash": "abc"})
    loaded = load_adapter(path)
    assert torch.equal(loaded(x), adapter(x)) and not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    tensors, metadata = read_tensors(path)
    assert set(tensors) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert metadata.get("base_hash") == ("abc" if ending == "safetensors" else None)
    assert ending == "safetensors" or torch.load(path, weights_only=True).keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_in_a_file_become_float32(dtype, tmp_path):
    torch.save({key: value.to(dtype) for key, value in trained().state_dict().items()}, tmp_path / "adapter.pth")
    assert {p.dtype for p in load_adapter(tmp_path / "adapter.pth").parameters()} == {torch.float32}


class Code:
    """A pickle that would make a folder when opened."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def refuse(path, *words):
    with pytest.raises(ValueError) as caught:
        load_adapter(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (str(path), *words)), message


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "adapter.pth", tmp_path / "executed"
    torch.save({**trained().state_dict(), "more": Code(str(trace))}, path)
    refuse(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it does hold code
    assert trace.exists()
    torch.save(trained(), path)  # a whole module is code, too
    refuse(path)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_truncated_empty_and_missing_files_are_refused(ending, tmp_path):
    path = tmp_path / f"adapter.{ending}"
    refuse(path)
    save_adapter(trained(), path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 10, 0):
        path.write_bytes(whole[:length])
        refuse(path)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("fc2.bias"), ["fc2.bias"]),
    (lambda s: s.pop("fc1.weight"), ["fc1.weight"]),
    (lambda s: s.update(extra=torch.zeros(1)), ["extra"]),
    (lambda s: s.update({"fc3.weight": s.pop("fc2.weight")}), ["fc2.weight", "fc3.weight"]),
    (lambda s: s.update({"fc1.weight": torch.zeros(24)}), ["fc1.weight"]),
    (lambda s: s.update({"fc1.weight": torch.zeros(0, 24)}), ["fc1.weight"]),
    (lambda s: s.update({"fc2.weight": torch.zeros(24, 7)}), ["fc2.weight", "(24, 7)", "(24, 6)"]),
    (lambda s: s.update({"fc1.weight": torch.zeros(6, 23)}), ["has shape (24", "expected (23"]),
    (lambda s: s.update({"fc2.bias": torch.full((24,), math.nan)}), ["NaN"]),
    (lambda s: s.update({"fc1.bias": torch.zeros(6).long()}), ["fc1.bias", "floating"]),
])
def test_files_of_something_else_are_refused(change, words, ending, tmp_path):
    state = trained().state_dict()
    change(state)
    path = tmp_path / f"adapter.{ending}"
    save_tensors(path, state)
    refuse(path, *words)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ending"):
        save_adapter(trained(), tmp_path / "adapter.txt")
    refuse(tmp_path / "adapter.txt")


def test_adapter_of_another_base_is_refused(tmp_path):
    adapter = EmbeddingAdapter(8)
    save_adapter(adapter, tmp_path / "a.safetensors", {"base_hash": "aaa"})
    load_adapter(tmp_path / "a.safetensors")
    load_adapter(tmp_path / "a.safetensors", "aaa")
    with pytest.raises(ValueError, match="adapter of base aaa, the loaded base is bbb"):
        load_adapter(tmp_path / "a.safetensors", "bbb")
    save_adapter(adapter, tmp_path / "a.pth", {"base_hash": "aaa"})
    load_adapter(tmp_path / "a.pth", "bbb")  # a .pth keeps no header: nothing to compare
