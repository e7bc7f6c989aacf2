"""benchmarks/compare.py on a GPU, without one: torch's fake tensors refuse what mixes devices.

A fake tensor has a shape, a dtype and the device "cuda", but no numbers. What needs numbers is done
for real, on the CPU (reading files, tables of samplers), or left out (backward, `item`).
"""

import contextlib
import json
import sys
from functools import partial
from types import SimpleNamespace

import diffusers
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from conftest import ROOT, case_of
from pixcell_min import base as base_module
from pixcell_min import embeddings, schedulers, transformer, uni, vae

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import sides  # noqa: E402


def apply(module, function, recurse=True):
    """nn.Module._apply with new parameters: torch's own fails to swap fake ones for the real."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, tensor in module._parameters.items():
        if tensor is not None:
            module._parameters[name] = torch.nn.Parameter(
                function(tensor.detach()), tensor.requires_grad)
    for name, tensor in module._buffers.items():
        if tensor is not None:
            module._buffers[name] = function(tensor)
    return module


def gradients_of_zero(optimizer, set_to_none=True):
    """What zero_grad and backward leave, but for the numbers."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)


@pytest.fixture
def gpu(monkeypatch):
    """Everything within is on fake devices, of which "cuda" is one."""
    real_apply = torch.nn.Module._apply

    def really(function, *arguments, **options):
        with unset_fake_temporarily(), monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "_apply", real_apply)
            return function(*arguments, **options)

    @contextlib.contextmanager
    def opened(path, framework):
        yield SimpleNamespace(get_tensor=safetensors.torch.load_file(path).get)

    for owner, name in [
            *((network, "from_pretrained") for network in (
                transformer.PixCellTransformer, vae.AutoencoderKL, uni.TileEncoder,
                diffusers.PixArtTransformer2DModel, diffusers.AutoencoderKL)),
            (schedulers, "build_scheduler"), (base_module, "read_schedule"),
            (safetensors.torch, "load_file"), (timm, "create_model")]:
        monkeypatch.setattr(owner, name, partial(really, getattr(owner, name)))
    for sampler in (schedulers.DDIM, schedulers.DPMSolverPP2M):
        monkeypatch.setattr(sampler, "steps", lambda self, count, steps=sampler.steps: really(
            steps, self, count))
    monkeypatch.setattr(safetensors, "safe_open", opened)
    monkeypatch.setattr(base_module, "choose_device", torch.device)
    monkeypatch.setattr(torch.nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)  # it would ask for a stream
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", gradients_of_zero)
    for scheduler in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps)
        monkeypatch.setattr(scheduler, "step", lambda self, output, t, latents: SimpleNamespace(
            prev_sample=latents + t * output))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    embeddings.sincos_grid.cache_clear()  # of tables without numbers


def set_timesteps(scheduler, count, device=None):
    """As diffusers': on the CPU where no device is named."""
    scheduler.timesteps = torch.arange(count, device=device)


KINDS = [{"kind": "train", "batch": 2}, {"kind": "train", "batch": 2, "checkpointing": True},
         {"kind": "forward", "batch": 2}, {"kind": "forward", "batch": 2, "merged": True},
         {"kind": "sample", "scheduler": "ddim", "steps": 3, "merged": True},
         {"kind": "sample", "scheduler": "dpmpp_2m", "steps": 3}, {"kind": "encode"},
         {"kind": "decode"}, {"kind": "encoder"}, {"kind": "load"}]
RUNS = [(side, {**kind, "precision": precision}) for side in ("OURS", "PEER") for kind in KINDS
        for precision in ("no", "fp16")]
RUNS += [("PEER", {"kind": "train", "batch": 2, "precision": "fp16 autocast"}),
         ("PEER", {"kind": "epoch", "batch": 2, "precision": "fp16"})]


@pytest.mark.parametrize(("side", "settings"), RUNS, ids=lambda its: its if isinstance(
    its, str) else " ".join(map(str, its.values())))
def test_a_side_computes_on_the_gpu_alone(compared_base, gpu, side, settings):
    case = case_of(compared_base, device="cuda", **settings)
    output = getattr(sides, side)[case["kind"]](case)()
    assert output and all(tensor.device.type == "cuda" for name, tensor in output.items()
                          if name != "loss")  # it is read at every step
    if case["kind"] == "train":  # GradScaler wants them so
        assert {tensor.dtype for tensor in output.values()} == {torch.float32}


def test_inputs_lie_on_the_device_before_a_turn_begins(compared_base):
    case = case_of(compared_base, device="meta", batch=2)
    inputs = [*sides.draw_inputs(case).values(), *sides.vae_inputs(case), sides.tile_of(case)]
    assert {tensor.device.type for tensor in inputs} == {"meta"}


def test_the_fake_gpu_refuses_what_a_real_one_would(gpu):
    on_gpu, on_cpu = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="device"):
        on_gpu @ on_cpu


@pytest.mark.parametrize(("precision", "enabled"), [
    ("no", False), ("bf16", False), ("fp16", True), ("fp16 autocast", True)])
def test_fp16_is_trained_with_a_grad_scaler_on_both_sides(compared_base, monkeypatch, precision, enabled):
    seen, real = [], torch.amp.GradScaler

    def scaler(device, enabled):
        seen.append(enabled)
        return real(device, enabled=enabled)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    case = case_of(compared_base, kind="train", batch=2, precision=precision)
    peer = sides.PEER["train"](case)()
    ours = sides.OURS["train"](case | {"precision": precision.removesuffix(" autocast")})()
    assert seen == [enabled, enabled]
    assert compare.largest_difference(ours, peer) < (0.1 if precision == "bf16" else 0.02)


def test_a_gpu_has_fp16_and_more_compiled_cases_and_the_cpu_neither():
    gpu, cpu = compare.cases("cuda"), compare.cases()
    assert compare.cases("cpu") == cpu and cpu.items() < gpu.items()
    assert not any("fp16" in name for name in cpu)
    for word in ("fp16", "bf16", "float32"):
        for batch in (1, 4):
            plain, compiled = (gpu[f"train-{batch}{way}-{word}"] for way in ("", "-compiled"))
            assert compiled == plain | {"compiled": True}
            assert plain["precision"] == {"float32": "no"}.get(word, word)
        assert gpu[f"sample-dpm-compiled-{word}"] == gpu[f"sample-dpm-{word}"] | {"compiled": True}
    for word in ("fp16", "bf16"):
        case = gpu[f"train-4-{word}-autocast"]
        assert (case["precision"], case["peer"]["precision"]) == (word, f"{word} autocast")
    assert not {"encode-fp16", "decode-fp16"} & gpu.keys()
    assert all(case["kind"] in sides.OURS.keys() & sides.PEER.keys() for case in gpu.values())
    for case in gpu.values():  # `auto` is ours alone
        assert (case | case.get("peer", {}))["precision"] in ("no", *sides.HALF)


@pytest.mark.parametrize(("held", "wanted"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_file_of_another_device_is_refused_in_a_line(tmp_path, capsys, held, wanted):
    out, text = tmp_path / "results.json", json.dumps({"tiny load": {"settings": {"device": held}}})
    out.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--size", "tiny", "--cases", "load", "--device", wanted, "--out", str(out),
                      "--work", str(tmp_path / "work")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and out.read_text() == text
    assert f"{out}: holds rows measured on {held}, no place for rows of {wanted}" in said
    assert [*tmp_path.iterdir()] == [out]


def test_a_gpu_that_is_not_there_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--device", "cuda", "--out", str(tmp_path / "results.json")])
    assert stopped.value.code == 2
    assert "--device cuda: torch finds no CUDA GPU here" in capsys.readouterr().err.splitlines()[-1]


class AnsweringSide:
    """In place of a process: the peer takes 2 s a turn, ours 1 s, both 1000 s of CPU time."""

    memory = {"imported_mb": 500.0}

    def __init__(self, side, case, context):
        self.seconds = {"ours": 1.0, "peer": 2.0}[side]

    def ask(self, order):
        return {"run": {"seconds": self.seconds, "cpu_seconds": 1e3, "peak_mb": 80 * self.seconds},
                "output": {"a": torch.ones(2)},
                "work": {"flop": 6e12, "matrix_flop_per_second": 1e13, "kernels": 7,
                         "kernel_seconds": 0.5}}[order]

    def close(self):
        pass


def measured(case, repeats):
    return compare.measure(
        case, *compare.start(case, None), repeats, SimpleNamespace(update=lambda: None))


def test_a_gpus_row_has_steps_per_second_and_share_of_the_matrix_rate(monkeypatch):
    monkeypatch.setattr(compare, "Side", AnsweringSide)
    row = measured({"kind": "train", "device": "cuda"}, 2)
    assert row["steps_per_second"] == {"ours": 1, "peer": 0.5}
    assert row["matrix_share"] == pytest.approx({"ours": 0.6, "peer": 0.3})
    assert row["busy"] == {"ours": 0.5, "peer": 0.25}
    assert row["memory_ratio"] == 0.5 and row["work"]["peer"]["flop"] == 6e12
    # CPU time says nothing of a GPU, and what importing took lies elsewhere.
    assert not {"cpu_ratio", "imported_mb", "memory_ratio_without_torch"} & row.keys()
    forward, on_cpu = (measured({"kind": "forward", "device": device}, 1)
                       for device in ("cuda", "cpu"))
    assert forward["steps_per_second"] == {"ours": None, "peer": None}
    assert on_cpu["cpu_ratio"]["median"] == 1 and "work" not in on_cpu
    load = compare.on_a_gpu({"kind": "load"}, {"ours": 1.0}, {
        "ours": {"flop": 0, "matrix_flop_per_second": 1e13, "kernel_seconds": 0.1}})
    assert load["matrix_share"] == {"ours": None}


def test_a_gpus_table_has_its_own_columns(monkeypatch):
    monkeypatch.setattr(compare, "Side", AnsweringSide)
    tables = {}
    for device in ("cuda", "cpu"):
        results = {f"tiny {kind}": measured({"kind": kind, "device": device}, 1) | {
            "settings": {"device": device}} for kind in ("train", "epoch")}
        tables[device] = compare.table(results | {"full load": {}}, "tiny").splitlines()
    assert tables["cuda"] == [
        "| case | peer s | ours s | ratio (min…max) | kernels alone | steps per s, peer / ours | "
        "matrix rate, peer / ours | busy, peer / ours | MB, peer / ours | memory ratio | difference |",
        "|" + "---|" * 11,
        "| train | 2 | 1 | 0.50 (0.50…0.50) | 1.00 | 0.5 / 1 | 30.0% / 60.0% | 25% / 50% | 160 / 80 "
        "| 0.50 | 0.0e+00 |",
        "| epoch | 2 | 1 | 0.50 (0.50…0.50) | 1.00 | – / – | 30.0% / 60.0% | 25% / 50% | 160 / 80 "
        "| 0.50 | – |"]
    assert tables["cpu"][0].count("|") == 10 and len(tables["cpu"]) == 4
    assert tables["cpu"][3] == ("| epoch | 2 | 1 | 0.50 (0.50…0.50) | 1.00 | 160 | 80 | 0.50 (1.24) "
                                "| – |")


def test_an_overflow_is_not_hidden_by_what_is_finite():
    fine, overflown = torch.ones(2), torch.tensor([1.0, torch.inf])
    for names in ("ab", "ba"):
        ours = dict(zip(names, (fine, overflown)))
        assert compare.largest_difference(ours, ours) != compare.largest_difference(ours, ours)


def test_work_is_all_products_of_a_run_once_more_where_they_are_computed_again(compared_base, monkeypatch):
    monkeypatch.setattr(sides, "matrix_rate", lambda device, dtype: (device, dtype))

    def compiler(graph, inputs):  # what counts products does not see those of a compiled program
        return lambda *its: (torch.zeros(2, 5),)
    product = torch.compile(lambda a, b: a @ b, backend=compiler)
    assert not product(torch.ones(2, 3), torch.ones(3, 5)).any()
    work = sides.work_of(lambda: product(torch.ones(2, 3), torch.ones(3, 5)),
                         {"kind": "forward", "device": "cpu", "precision": "bf16 autocast"})
    assert work == {"flop": 2 * 2 * 3 * 5, "matrix_flop_per_second": ("cpu", torch.bfloat16)}
    counted = []
    for checkpointing in (False, True):
        case = case_of(compared_base, kind="train", batch=2, checkpointing=checkpointing)
        for kinds in (sides.OURS, sides.PEER):
            work = sides.work_of(kinds["train"](case), case)
            assert work["matrix_flop_per_second"] == ("cpu", torch.float32)
            counted.append(work["flop"])
    ours, peer, ours_again, peer_again = counted
    given = {"kind": "sample", "device": "cpu", "precision": "no", "steps": 50}
    seen = []
    work = sides.work_of(lambda steps: [seen.append(torch.ones(2, 3) @ torch.ones(3, 5))
                                        for _ in range(steps)], given)
    assert len(seen) == sides.COUNTED_STEPS < 50 and work["flop"] == 50 * 2 * 2 * 3 * 5
    assert 0 < ours < peer and ours < ours_again and peer < peer_again


def test_the_matrix_rate_is_that_of_the_fastest_product_after_a_warm_up(monkeypatch):
    clock = iter([0, 1, 0, 9, 0, 1, 0, 4, 0, 2, 0, 8])
    monkeypatch.setattr(sides.time, "perf_counter", clock.__next__)
    assert sides.matrix_rate("cpu", torch.float32, side=8, repeats=3) == 2 * 8**3 / 2


def test_a_process_of_a_side_answers_its_orders(compared_base, monkeypatch):
    monkeypatch.setattr(sides, "matrix_rate", lambda device, dtype: 1.0)
    answers, orders = [], iter(["run", "output", "run", "work", "end"])
    sides.serve(SimpleNamespace(recv=orders.__next__, send=answers.append), "ours",
                case_of(compared_base, kind="forward", batch=2) | {
                    "threads": torch.get_num_threads()})
    _, run, output, _, work = answers
    assert run["peak_mb"] > 0 and output["output"].shape == (2, 32, 8, 8) and work["flop"] > 0


def test_an_epoch_hashes_its_tiles_and_not_the_base(compared_base, monkeypatch):
    calls, real = [], base_module.features_hash

    def counted(folder):
        calls.append(folder)
        return real(folder)
    monkeypatch.setattr(base_module, "features_hash", counted)
    run = sides.OURS["epoch"](case_of(compared_base, kind="epoch", batch=2))
    assert len(calls) == 1
    assert run()["loss"] > 0 < run()["loss"] and len(calls) == 1
