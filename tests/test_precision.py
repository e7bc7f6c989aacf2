"""Which device and number format are chosen, and what autocast covers."""

import pytest
import torch

from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.lora import inject_lora, lora_layers, lora_parameters
from pixcell_min.precision import (
    DTYPES, autocast, choose_device, choose_dtype, hold_products_in, refusal,
)
from pixcell_min.schedulers import NoiseSchedule
from pixcell_min.training import Batch, diffusion_loss
from pixcell_min.transformer import PixCellTransformer, TransformerConfig


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two CUDA devices, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_device_on_a_machine_with_cuda(cuda):
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' is not available"):
        choose_device("cuda:2")


def test_device_on_a_machine_without(no_cuda):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps", "abacus", "cpu:x"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available here") as error:
            choose_device(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("amx, avx512, expected", [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, None)])
def test_auto_on_a_cpu_is_bf16_where_that_is_fast(monkeypatch, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_dtype("auto", torch.device("cpu")) == expected
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype("auto", torch.device("mps")) is None


def test_named_precisions():
    assert DTYPES == {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
    for name, dtype in DTYPES.items():
        assert choose_dtype(name, torch.device("cpu")) == dtype
    with pytest.raises(ValueError,
                       match="mixed_precision is 'fp8', expected auto, no, fp16 or bf16"):
        choose_dtype("fp8", torch.device("cpu"))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_autocast_covers_matrix_products_alone(dtype):
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), dtype):
        assert (a @ a).dtype == (dtype or torch.float32) and (a + a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_what_the_device_refuses_is_a_line_and_a_fault_of_ours_is_none():
    assert refusal(torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na total")).startswith(
        "CUDA out of memory. Tried to allocate 2.00 GiB; free some, or start anew with --gradient")
    assert refusal(MemoryError()).startswith("out of memory; free some")
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert "4000000000000000 bytes; free some" in refusal(raised.value)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(4).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)
    line = refusal(raised.value)
    assert line.startswith("put_ does not have a deterministic implementation")
    assert line.endswith("; start anew without --deterministic") and "\n" not in line
    assert refusal(RuntimeError("shape '[2]' is invalid for input of size 3")) is None


def gradients_of_a_step(tokens, dtype, held, checkpointing):
    """(loss, gradients of LoRA and adapter) under autocast; weights float32 or held in its dtype."""
    torch.manual_seed(0)
    network = PixCellTransformer(TransformerConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8,
        caption_channels=16, caption_num_tokens=tokens)).requires_grad_(False)
    if held:
        hold_products_in(network, dtype)
    inject_lora(network, 2, 4, exclude=network.inert_layers())
    for layer in lora_layers(network).values():
        torch.nn.init.normal_(layer.lora_B)
    adapter, network.gradient_checkpointing = EmbeddingAdapter(16), checkpointing
    network.set_float32_attention(dtype == torch.float16)
    batch = Batch(torch.randn(2, 16, 8, 8), torch.randn(2, tokens, 16), torch.randn(2, 16, 8, 8),
                  torch.tensor([10, 700]), torch.tensor([False, True]))
    loss = diffusion_loss(network, adapter, NoiseSchedule.linear(), batch, dtype)
    loss.sum().backward()
    trained = [*lora_parameters(network), *adapter.parameters()]
    assert all(p.dtype == torch.float32 for p in trained)
    return loss.detach(), *(p.grad for p in trained)


@pytest.mark.parametrize("tokens, checkpointing", [(1, False), (4, False), (1, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_held_weights_change_no_bit_of_a_step(dtype, tokens, checkpointing):
    """Autocast rounds the same weights at each use."""
    rounded, held = (gradients_of_a_step(tokens, dtype, held, checkpointing)
                     for held in (False, True))
    assert held[0].dtype == torch.float32 and held[1].abs().max() > 0
    for one, other in zip(rounded, held, strict=True):
        assert torch.equal(one, other)


def test_what_is_held_and_what_keeps_its_precision(tiny_base):
    network = PixCellTransformer.from_pretrained(tiny_base / "transformer")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    hold_products_in(network, None)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    hold_products_in(network.requires_grad_(False), torch.bfloat16)
    wide = [name for name, t in network.state_dict().items() if t.dtype == torch.float32]
    assert {name.rsplit(".")[-1] for name in wide} == {"scale_shift_table", "uncond_embedding"}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name] if name in wide else before[name].bfloat16())
    assert not any(p.requires_grad for p in network.parameters())
