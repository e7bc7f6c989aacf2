"""What only a CUDA GPU can show: `pytest -m gpu` on a machine with one; elsewhere all are skipped.

All other tests run on the CPU wherever they are (`conftest.py` hides the GPU from them).
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample
import train
from conftest import assert_same_weights, metrics, weights
from pixcell_min.base import load_pixcell_base
from pixcell_min.tools import doctor, evaluate

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")]
# Of the largest value of a result; TF32, which torch lets convolutions use, has 10 bits as float16.
BOUNDS = {"no": 2e-5, "fp16": 5e-3, "bf16": 4e-2}
TF32 = 5e-3


def error(result, expected):
    return ((result.cpu().float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("width", [64, 72])  # of a head: pixcell-nano's, PixCell's
@pytest.mark.parametrize("backend", [
    None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], ids=str)
def test_fused_attention_keeps_its_products_in_float32(backend, width):
    """So that in fp16 a GPU needs no attention in float32: q·k may pass 65504 here, too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (scale * torch.randn(2, 4, 256, width, generator=generator) for scale in (150, 150, 1))
    given = [x.half().cuda().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in given]
    products = exact[0] @ exact[1].transpose(-1, -2)
    assert products.max() > 2 * 65504
    expected = (products * width**-0.5).softmax(-1) @ exact[2]
    if backend is None:
        result = F.scaled_dot_product_attention(*given)
    else:
        with sdpa_kernel(backend):
            result = F.scaled_dot_product_attention(*given)
    assert result.dtype == torch.float16 and result.isfinite().all()
    assert error(result.detach(), expected.detach().cpu().float()) < 5e-3
    result.float().sum().backward(), expected.sum().backward()
    for ours, theirs in zip(given, exact):
        assert ours.grad.isfinite().all()
        if ours is given[2]:  # those of q and k are differences of nearly equal numbers here
            assert error(ours.grad, theirs.grad.cpu().float()) < 2e-2


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_embedded_base_gives_the_cpus_numbers(precision):
    cpu, gpu = load_pixcell_base(device="cpu", mixed_precision="no"), load_pixcell_base(
        device="cuda", mixed_precision=precision)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 16, 32, 32, generator=generator)
    tokens, t = torch.randn(3, 1, 288, generator=generator), torch.tensor([20, 500, 990])
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = cpu.transformer(latents, t, tokens)
        with torch.autocast("cuda", gpu.dtype, enabled=gpu.dtype is not None):
            result = gpu.transformer(latents.cuda(), t.cuda(), tokens.cuda())
    assert error(result, expected) < BOUNDS[precision]


def test_vae_and_encoder_give_the_cpus_numbers():
    cpu, gpu = (load_pixcell_base(device=device, mixed_precision="no") for device in ("cpu", "cuda"))
    tile = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for bound, exact in ((TF32, False), (2e-5, True)):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
                pairs = [(gpu.vae.encode(2 * tile.cuda() - 1)[0], cpu.vae.encode(2 * tile - 1)[0]),
                         (gpu.vae.decode(latents.cuda()), cpu.vae.decode(latents)),
                         (gpu.encoder(tile[0].cuda()), cpu.encoder(tile[0]))]
            assert max(error(*pair) for pair in pairs) < bound


def test_an_image_is_the_cpus_but_for_rounding():
    images = []
    for device in ("cpu", "cuda"):
        pipeline = load_pixcell_base(device=device, mixed_precision="no")
        embedding = torch.randn(1, 288, generator=torch.Generator().manual_seed(3))
        images.append(torch.tensor(list(pipeline(
            embedding, num_inference_steps=10, seed=1).images[0].tobytes())).float())
    difference = (images[0] - images[1]).abs()
    assert difference.mean() < 0.5 and images[0].std() > 5


@pytest.mark.parametrize("precision", ["auto", "bf16", "no"])
def test_training_is_resumed_bit_for_bit(
        precision, arguments, tmp_path, monkeypatch, reset_determinism):
    flags = [*arguments, "--device", "cuda", "--mixed-precision", precision, "--deterministic",
             "--save-every", "2"]
    assert train.main(flags) == 0
    whole, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    scales = [line["loss_scale"] for line in lines if "loss" in line]
    assert (max(scales) > 1) == (precision == "auto")  # which is fp16: GradScaler scales there alone
    assert all(x.isfinite().all() for tensors in whole.values() for x in tensors.values())
    shutil.rmtree(tmp_path / "run")
    original = train.rate_factor

    def stop_at(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, *rest)
    monkeypatch.setattr(train, "rate_factor", stop_at)
    assert train.main(flags) == 130
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert_same_weights(weights(tmp_path / "run"), whole)


@pytest.mark.parametrize("more", [["--compile"], ["--gradient-checkpointing"], ["--batch-size", "1"]])
def test_other_ways_to_train_end_well(more, arguments, tmp_path):
    assert train.main([*arguments, "--device", "cuda", "--mixed-precision", "fp16", *more]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]


def test_a_run_is_sampled_and_evaluated(arguments, tmp_path, tiles):
    run, out = tmp_path / "run", tmp_path / "drawn"
    assert train.main([*arguments, "--device", "cuda", "--mixed-precision", "fp16"]) == 0
    drawn = []
    for _ in range(2):
        assert sample.main(["--run", str(run), "--image", str(next(tiles.rglob("*.png"))), "--out",
                            str(out), "--device", "cuda", "--steps", "4"]) == 0
        drawn += [path.read_bytes() for path in out.glob("*.png")]
        shutil.rmtree(out)
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    assert evaluate.main(["--data", str(tiles), "--run", str(run), "--device", "cuda", "--steps",
                          "2"]) == 0
    assert torch.cuda.get_device_name() in (run / "evaluation" / "report.json").read_text()


def test_too_little_memory_is_one_line(arguments, capsys):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)  # 8 MB of 80 GB
    try:
        assert train.main([*arguments, "--device", "cuda", "--batch-size", "512"]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "CUDA out of memory" in capsys.readouterr().err.splitlines()[-1]


def test_doctor_names_the_gpu(capsys):
    doctor.main([])
    assert torch.cuda.get_device_name() in capsys.readouterr().out
