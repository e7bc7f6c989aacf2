"""distributed.py: several processes make the run that one makes (gloo, CPU)."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, assert_same_weights, metrics, weights, write_base
from pixcell_min.distributed import Processes, joined
from pixcell_min.lora import lora_parameters
from pixcell_min.training import build_optimizer, optimizer_step
from test_train import random_batch, small_problem

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def parallel(*runs):
    """Exit codes and stderr of `parallel_runs.py`: each run (number of processes, flags)."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "parallel_runs.py", json.dumps(runs)],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr, done.stdout


def losses(run):
    return [(line["step"], line.get("loss", line.get("validation_loss"))) for line in metrics(run)]


def out(arguments, run, *more):
    at = arguments.index("--out")
    return [*arguments[:at], *arguments[at + 2:], *more, "--out", str(run)]


def assert_close_runs(first, second):
    """The same numbers but for the order of sums, over four steps of AdamW in float32."""
    for (step, a), (other, b) in zip(losses(first), losses(second), strict=True):
        assert step == other and a == pytest.approx(b, rel=1e-5)
    ours, theirs = weights(first), weights(second)
    for name in ours:
        for key in ours[name]:
            torch.testing.assert_close(ours[name][key], theirs[name][key], rtol=0, atol=2e-5)


def test_two_processes_make_the_run_of_one_and_either_resumes_the_other(arguments, tmp_path):
    more = ["--lora-dropout", "0.1", "--ema-decay", "0.9", "--validate-every", "2", "--save-every",
            "2", "--class-balanced", "--sample-count", "1"]
    whole, two, changed = tmp_path / "whole", tmp_path / "two", tmp_path / "changed"
    assert train.main(out(arguments, whole, *more)) == 0
    codes, errors, text = parallel(
        (2, out(arguments, two, *more)),
        (2, out(arguments, changed, *more)))
    assert codes == [[0, 0], [0, 0]], errors
    assert text.count("validation loss at step 4") == 2  # once a run: the first process speaks
    assert_close_runs(two, whole)
    assert_same_weights(weights(two), weights(changed))  # the same number of processes, the same bits
    assert (two / "samples/grid.png").is_file() and not list(two.rglob(".*.tmp"))
    assert json.loads((two / "run.json").read_text())["sessions"][0]["processes"] == 2
    # Taken back to step 2, then on with one process.
    (changed / "states/step-00000004.pt").unlink()
    assert train.main(["--resume", "--out", str(changed)]) == 0
    assert [its["processes"] for its in json.loads((changed / "run.json").read_text())["sessions"]] == [2, 1]
    assert_close_runs(changed, whole)
    # And from one process to two.
    (whole / "states/step-00000004.pt").unlink()
    codes, errors, _ = parallel((2, ["--resume", "--out", str(whole)]))
    assert codes == [[0, 0]], errors
    assert "processes 1 → 2" in errors
    assert_close_runs(changed, whole)


@pytest.mark.parametrize("target", ["one", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_torchrun_starts_it_and_a_signal_to_one_or_to_it_stops_both(target, arguments, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "train.py",
         *out(arguments, run, "--max-train-steps", "100000")], env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (log := run / "metrics.jsonl").exists() or log.read_text().count("\n") < 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"],
                                  capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]) if target == "one" else process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert errors.count("stopped by SIGTERM after step") == 1
    assert "go on with: " in errors and f'File "{ROOT}' not in errors  # no traceback of ours
    saved = sorted(run.glob("states/step-*.pt"))
    # All that was done is saved: the newest state is of the last step in the log.
    assert len(saved) == 2 and int(saved[-1].stem[5:]) == metrics(run)[-1]["step"] > 0


def test_gradients_are_those_of_one_process_on_the_same_batch_in_float64(tiny_base, tmp_path):
    codes, errors, _ = parallel((2, ["step", str(tiny_base), str(tmp_path)]))
    assert codes == [[0, 0]], errors
    alone = one_step(tiny_base, Processes())
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shared.keys() == alone.keys() and len(alone) > 10
        for name, value in alone.items():  # float64, sums in another order
            torch.testing.assert_close(shared[name], value, rtol=1e-9, atol=1e-15)
    assert alone["skipped"] == 0 and alone["norm"] > 0 and alone["overflowed"] == 1


def one_step(base, processes):
    """Gradients, loss and norm of a step of 4 micro-batches; whether a later, infinite one skips."""
    transformer, adapter, _ = small_problem(base, torch.float64)
    optimizer = build_optimizer(lora_parameters(transformer), adapter.parameters(), 0.0, 0.0, 0.0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def error_of(batch):  # diffusion_loss is float32
        epsilon = transformer(batch.latents, batch.timesteps, adapter(batch.embeddings))[:, :16]
        return (epsilon - batch.noise).square().mean((1, 2, 3)) * factor

    def step(factors):
        nonlocal factor
        for number in range(processes.rank, 4, processes.size):
            factor = factors[number]
            yield random_batch(2, number, torch.float64)

    factor, loss_of = 1.0, processes.parallel(error_of, parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    report = optimizer_step(loss_of, step([1.0] * 4), 8, optimizer, scaler, 1e9, processes)
    result = {f"gradient {i}": p.grad.clone() for i, p in enumerate(parameters)}
    # Infinite in a micro-batch of the second process alone: both skip, both lower the scale.
    overflow = optimizer_step(loss_of, step([1.0, 1.0, 1.0, torch.inf]), 8, optimizer, scaler, 1e9,
                              processes)
    return result | {name: torch.tensor(value, dtype=torch.float64) for name, value in {
        "loss": report.loss, "norm": report.grad_norm, "skipped": float(report.skipped),
        "overflowed": float(overflow.skipped), "scale": overflow.loss_scale}.items()}


def test_what_processes_cannot_share_is_one_line_in_each(arguments, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    other = write_base(tmp_path / "other", seed=1)  # as on another machine
    codes, errors, _ = parallel(
        (2, [*arguments, "--gradient-accumulation-steps", "3"]), (2, out(arguments, taken)),
        (2, [*arguments, "--second-base", str(other)]))
    assert codes == [[2, 2]] * 3 and "Traceback" not in errors
    # By the words before them, not by lines: two processes may write at once.
    lines = sorted(re.findall(r"train\.py: error: (.*?)(?=\n|train\.py: error: |\Z)", errors))
    assert [line.partition(";")[0].partition(" is ")[0] for line in lines] == [
        *["--gradient-accumulation-steps 3: cannot be shared evenly by 2 processes"] * 2,
        f"{taken}: exists", "another process of this run has ended",
        "process 0: another one differs", "process 1: base_hash"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, cuda, expected", [
    ("cpu", True, "cpu"), ("auto", False, "auto"), ("auto", True, "cuda:1"), ("cuda", True, "cuda:1")])
def test_each_process_takes_a_card_of_its_own(name, cuda, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert Processes(3, 1, 4).device(name) == expected
    assert Processes().device("cuda:0") == "cuda:0"
    with pytest.raises(ValueError, match="one card for 4 processes"):
        Processes(3, 1, 4).device("cuda:0")


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="no CUDA card; there are 1"), joined("auto"):
        pass


def test_half_of_torchruns_environment_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert train.main(arguments) == 2
    assert "WORLD_SIZE is 2 but RANK, " in capsys.readouterr().err


def test_alone_nothing_is_sent_or_wrapped():
    alone = Processes()
    assert alone.parallel(len, []) is len and alone.is_first
    assert (alone.mean(3.5), alone.highest(15), alone.from_first(lambda: "x")) == (3.5, 15, "x")
    with alone.apart(len), alone.one_first():
        pass
    alone.require_equal({"a": "b"})
