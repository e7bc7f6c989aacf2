"""runs.py and the states of checkpoint.py: kills, signals, full disks, damage, other versions, records."""

import errno
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from conftest import ROOT, assert_same_weights, metrics, weights
from pixcell_min import checkpoint, runs, training
from pixcell_min.checkpoint import content_hash, file_hash, load_object, save_object


def resume(run, *more):
    return train.main(["--resume", "--out", str(run), *more])


def last_line(capsys):
    """The last line of stderr, the progress bar's apart."""
    return capsys.readouterr().err.splitlines()[-1]


def timeless(run):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(run)]


@pytest.fixture
def whole(arguments, tmp_path, cached={}):
    """What an uninterrupted run of 6 steps, saved every 2, ends with: weights and log."""
    if not cached:
        assert train.main([*arguments, *SIX, "--out", str(tmp_path / "whole")]) == 0
        cached["whole"] = weights(tmp_path / "whole"), timeless(tmp_path / "whole")
    return cached["whole"]


SIX = ["--max-train-steps", "6", "--save-every", "2", "--validate-every", "3"]


def at_step(step, act, monkeypatch):
    """Do something while that optimizer step runs."""
    original = train.rate_factor
    monkeypatch.setattr(train, "rate_factor", lambda now, *rest: (
        act() if now == step else None, original(now, *rest))[1])


def interrupt(*_):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------- SIGKILL

def killed_run(arguments, folder, kills, seed, steps):
    at = arguments.index("--out")
    flags = [*arguments[:at], *arguments[at + 2:], "--max-train-steps", str(steps), "--save-every",
             "1", "--validate-every", "5", "--lora-dropout", "0.1", "--no-dihedral",
             "--ema-decay", "0.9"]
    assert train.main([*flags, "--out", str(folder / "whole")]) == 0
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed_runs.py", str(kills), str(seed),
         str(folder / "killed"), *flags], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert_same_weights(weights(folder / "killed"), weights(folder / "whole"))
    assert timeless(folder / "killed") == timeless(folder / "whole")
    last = f"states/step-{steps:08d}.pt"
    assert load_object(folder / "killed" / last)["hash"] == load_object(folder / "whole" / last)["hash"]
    assert not list((folder / "killed").rglob(".*.tmp"))
    within_write, went_on = map(int, done.stdout.split())
    assert went_on >= kills // 2  # from a step whose moments and averages mattered
    return within_write


@pytest.fixture
def one_thread():
    """As in the killed processes: sums over threads may round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_killed_three_times_ends_bit_for_bit_as_if_it_had_not(arguments, tmp_path, one_thread):
    assert killed_run(arguments, tmp_path, kills=3, seed=1, steps=16) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_twenty_times_ends_bit_for_bit_as_if_it_had_not(
        seed, arguments, tmp_path, one_thread):
    assert killed_run(arguments, tmp_path, kills=20, seed=seed, steps=120) >= 5


@pytest.mark.parametrize("left", ["only the record", "no state yet", "only a temporary file"])
def test_a_kill_before_the_first_state_can_be_begun_again(left, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.abc.tmp").write_text("{")
    if left != "only a temporary file":
        (run / "run.json").write_text("{}")
    if left == "no state yet":
        (run / "tiles.json").write_text("{}")
    if left != "only a temporary file":
        assert train.main(arguments) == 2
        assert "replace it with --overwrite" in last_line(capsys)
    assert train.main([*arguments, *["--overwrite"] * (left != "only a temporary file")]) == 0
    assert not list(run.rglob(".*.tmp"))


def test_a_state_is_there_before_the_first_step_so_that_resume_always_works(
        arguments, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "validation_loss", interrupt)
        assert train.main([*arguments, *SIX]) == 130
    assert resume(tmp_path / "run") == 0
    assert_same_weights(weights(tmp_path / "run"), whole[0])
    assert timeless(tmp_path / "run") == whole[1]


@pytest.mark.parametrize("end", ["a kill", "a signal"])
def test_a_resume_from_step_0_validates_anew_and_stops_early_where_the_whole_run_did(
        end, arguments, tmp_path, monkeypatch):
    run, losses = tmp_path / "run", {0: 1.0}

    def loss(*_):  # the lowest before the first step
        return losses.get(len([line for line in metrics(run) if "loss" in line]), 2.0), [0.0] * 8

    monkeypatch.setattr(train, "validation_loss", loss)
    flags = [*arguments, "--validate-every", "1", "--early-stop", "2", "--save-every", "0"]
    assert train.main(flags) == 0
    whole = timeless(run)
    assert whole[-1]["step"] == 2
    with monkeypatch.context() as patch:
        if end == "a kill":
            at_step(0, interrupt, patch)
            assert train.main([*flags, "--overwrite"]) == 130
        else:
            patch.setattr(train, "validation_loss", lambda *_: (
                os.kill(os.getpid(), signal.SIGINT), loss())[1])
            assert train.main([*flags, "--overwrite"]) == 130
    assert [line["step"] for line in metrics(run)] == [0]
    assert runs.state_files(run)[0].name == "step-00000000.pt"
    assert resume(run) == 0
    assert timeless(run) == whole


def test_a_pair_of_different_steps_is_refused_and_mended_by_resume(
        arguments, tmp_path, whole, monkeypatch, capsys, tiles):
    save = runs.save_adapter

    def killed_between(adapter, path, header):
        if header["step"] == "4":
            raise KeyboardInterrupt
        save(adapter, path, header)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_adapter", killed_between)
        assert train.main([*arguments, *SIX]) == 130
    image = str(tiles / "TUM" / "TUM_0.png")
    assert sample.main(["--image", image, "--run", str(tmp_path / "run")]) == 2
    error = last_line(capsys)
    assert "of step 4, adapter.safetensors of step 2" in error and "--resume" in error
    with monkeypatch.context() as patch:  # mended when it starts, not only when it ends
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGUSR1), patch)
        patch.setattr(train, "fit", lambda *_: None)
        assert resume(tmp_path / "run") == 0
    assert runs.shared_files(tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert_same_weights(weights(tmp_path / "run"), whole[0])


# ------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
        number, arguments, tmp_path, whole, monkeypatch, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), number), patch)
        assert train.main([*arguments, *SIX]) == 128 + number
    run = tmp_path / "run"
    assert last_line(capsys) == (f"train.py: stopped by {number.name} after step 3, saved; go on "
                                 f"with: python train.py --resume --out {run}")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert runs.state_files(run)[0].name == "step-00000003.pt"
    assert resume(run) == 0
    assert_same_weights(weights(run), whole[0])
    assert timeless(run) == whole[1]


def test_a_second_signal_stops_at_once(arguments, tmp_path, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while (signal.getsignal(signal.SIGINT) is not signal.default_int_handler
               and time.monotonic() < deadline):
            time.sleep(0.01)  # until the first one is noted; two at once would be one
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    at_step(3, twice, monkeypatch)
    # Where the tests run in the background of a shell, they inherit an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert train.main([*arguments, *SIX]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"step 2 is kept: python train.py --resume --out {tmp_path / 'run'}" in last_line(
        capsys)


# ---------------------------------------------------------------- full disks, read-only folders

@pytest.mark.parametrize("full", ["for a state", "for a line of the log"])
def test_a_full_disk_is_one_line_and_the_last_good_state_goes_on(
        full, arguments, tmp_path, whole, monkeypatch, capsys):
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():  # the system refuses to write longer files, as it refuses on a full disk
        size = 20_000 if full == "for a state" else (run / "metrics.jsonl").stat().st_size + 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with monkeypatch.context() as patch:
            at_step(3, fill, patch)
            assert train.main([*arguments, *SIX]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = last_line(capsys)
    assert "cannot be written" in error and "step 2 is kept: python train.py" in error
    assert ("step-00000004.pt" if full == "for a state" else "metrics.jsonl") in error
    assert not list(run.rglob(".*.tmp"))
    assert_same_weights(weights(run), {name: checkpoint.read_tensors(run / name)[0] for name in (
        "lora_weights.safetensors", "adapter.safetensors")})
    assert resume(run) == 0
    assert_same_weights(weights(run), whole[0])
    assert timeless(run) == whole[1]


def test_a_folder_that_became_read_only_keeps_its_states(
        arguments, tmp_path, whole, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")
    with monkeypatch.context() as patch:
        at_step(3, lambda: patch.setattr(checkpoint.tempfile, "mkstemp", refuse), patch)
        assert train.main([*arguments, *SIX]) == 2
    error = last_line(capsys)
    assert "Read-only file system" in error and "step 2 is kept" in error
    assert resume(tmp_path / "run") == 0
    assert_same_weights(weights(tmp_path / "run"), whole[0])


def test_a_read_only_folder_is_refused_before_anything_is_loaded(
        arguments, tmp_path, monkeypatch, capsys):
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(train, "load_pixcell_base", None)
    monkeypatch.setattr(train, "lock", None)  # it opens a file in the folder
    if os.geteuid() == 0:  # root may write anywhere; the system's answer stands in
        monkeypatch.setattr(runs.os, "access", lambda path, mode: False)
    else:
        tmp_path.chmod(0o555)
    try:
        for flags, mend in (([*arguments, "--out", str(tmp_path / "new" / "run")], "choose another --out"), (
                ["--resume", "--out", str(tmp_path / "run")], "make it writable; what was saved in it stays")):
            assert train.main(flags) == 2
            assert f"is read-only; {mend}" in last_line(capsys)
    finally:
        tmp_path.chmod(0o755)


# ----------------------------------------------------------------------------- damaged states

def flip_a_bit(content):
    """Within a tensor, where torch.load does not see it."""
    tensor = torch.load(io.BytesIO(content), weights_only=True)["content"]["adapter"]["fc1.weight"]
    at = content.index(tensor.numpy().tobytes())
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    torch.load(io.BytesIO(flipped), weights_only=True)
    return flipped


DAMAGE = {"truncated": lambda content: content[:len(content) // 2], "empty": lambda content: b"",
          "a flipped bit": flip_a_bit}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_intact_state_is_taken_and_the_loss_is_said(
        damage, arguments, tmp_path, whole, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, *SIX]) == 0
    newest = run / "states" / "step-00000006.pt"
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    capsys.readouterr()
    assert resume(run) == 0
    note = next(line for line in capsys.readouterr().err.splitlines() if "lost" in line)
    assert note.startswith(f"train.py: note: {newest}: ")
    assert "2 steps are lost: going on from step-00000004.pt" in note
    assert_same_weights(weights(run), whole[0])
    assert timeless(run) == whole[1]


def test_a_state_of_another_code_version_is_passed_over_kept_and_refused_if_alone(
        arguments, tmp_path, whole, capsys):
    run, flags = tmp_path / "run", [*arguments, *SIX]
    assert train.main([*flags, "--save-every", "1"]) == 0
    newest, previous = runs.state_files(run)
    later = run / "states" / "step-00000099.pt"
    newest.rename(later)
    save_object(later, {**load_object(later), "format": checkpoint.STATE_FORMAT + 1})
    content = later.read_bytes()
    capsys.readouterr()
    assert resume(run, "--save-every", "2") == 0
    assert (f"saved by another version of this code, in format {checkpoint.STATE_FORMAT + 1}; this "
            f"one reads format {checkpoint.STATE_FORMAT}; 94 steps are lost") in capsys.readouterr().err
    assert_same_weights(weights(run), whole[0])
    # It neither counts in the rotation nor falls to it.
    assert [path.name for path in runs.state_files(run)] == [
        "step-00000099.pt", "step-00000006.pt", "step-00000005.pt"]
    assert later.read_bytes() == content
    for path in runs.state_files(run)[1:]:
        path.unlink()
    assert resume(run) == 2
    error = last_line(capsys)
    assert "another version of this code" in error and "start again with --overwrite" in error
    assert_same_weights(weights(run), whole[0])


def test_an_interrupted_run_names_the_step_that_a_resume_takes(arguments, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, *SIX]) == 0
    for name in ("step-00000006.pt", "step-00000004.pt"):
        (run / "states" / name).write_bytes(b"")
        monkeypatch.setattr(train, "load_features", interrupt)
        assert resume(run) == 130
        assert last_line(capsys) == "train.py: interrupted; " + (
            f"step 4 is kept: python train.py --resume --out {run}" if "6" in name else
            f"no state in {run} can be read: start again with --overwrite")


def test_older_states_go_and_the_previous_one_stays(arguments, tmp_path):
    assert train.main([*arguments, *SIX, "--save-every", "1"]) == 0
    names = [path.name for path in runs.state_files(tmp_path / "run")]
    assert names == ["step-00000006.pt", "step-00000005.pt"]
    assert train.main([*arguments, *SIX, "--save-every", "1", "--keep-states", "4",
                       "--overwrite"]) == 0
    assert len(runs.state_files(tmp_path / "run")) == 4


def test_the_previous_state_is_deleted_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_state(tmp_path, step, {"step": step}, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        checkpoint.save_state(tmp_path, 3, {"step": 3}, 2)
    content, path, failures = checkpoint.load_newest_state(tmp_path, {"step"})
    assert content == {"step": 2} and failures == [] and len(list(tmp_path.iterdir())) == 2


def test_the_content_hash_sees_every_value_and_its_place():
    content = {"a": [torch.arange(3.0), 1], "b": {"c": None, 3: (0.5, True)}}
    variants = [content, {**content, "a": [torch.tensor([0.0, 1.0, 2.5]), 1]},
                {**content, "a": [torch.arange(3.0)[None], 1]},
                {**content, "a": [torch.arange(3.0).half(), 1]}, {**content, "a": [torch.arange(3.0), 2]},
                {**content, "b": {"c": None, 4: (0.5, True)}}, {**content, "b": {"c": None, 3: (0.5,)}}]
    assert len({content_hash(variant) for variant in variants}) == len(variants)
    assert content_hash(content) == content_hash({"a": [torch.arange(3.0), 1],
                                                  "b": {"c": None, 3: (0.5, True)}})
    assert content_hash(torch.tensor(1.0)) != content_hash(torch.tensor([1.0]))


def test_the_log_is_json_whatever_is_measured(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    runs.log(tmp_path, None, training.Progress(step=1), {
        "loss": math.nan, "validation_bands": [math.inf, 0.5], "skipped": True})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "attempt": 0, "loss": None, "validation_bands": [None, 0.5],
                    "skipped": True}


def test_a_log_line_cut_short_is_dropped(arguments, tmp_path, whole):
    run = tmp_path / "run"
    assert train.main([*arguments, *SIX]) == 0
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "att')
    assert resume(run) == 0
    assert timeless(run) == whole[1]


# ----------------------------------------------------------------------- settings, commands, record

def test_a_resume_names_each_difference_and_refuses_those_that_change_the_result(
        arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, *SIX]) == 0
    capsys.readouterr()
    assert resume(run, "--seed", "7", "--learning-rate", "0.5", "--save-every", "3") == 2
    error = last_line(capsys)
    assert "seed 0 → 7" in error and "learning_rate 0.01 → 0.5" in error
    assert error.endswith("; other settings, of no effect on the result: save_every 2 → 3")
    assert resume(run, "--save-every", "3", "--keep-states", "3") == 0
    noted = capsys.readouterr().err
    assert "of no effect on the result: save_every 2 → 3; keep_states 2 → 3" in noted
    assert train.read_yaml(run / "config.yaml")["save_every"] == 3


def test_validate_every_is_free_on_resume_unless_it_decides_where_the_run_ends(
        arguments, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*arguments, "--max-train-steps", "1"]
    assert train.main(flags) == 0
    assert resume(run, "--validate-every", "1") == 0
    assert train.main([*flags, "--overwrite", "--early-stop", "9"]) == 0
    capsys.readouterr()
    assert resume(run, "--validate-every", "1") == 2
    assert "other settings: validate_every 100 → 1" in last_line(capsys)


def test_an_overwrite_that_cannot_hash_a_tile_loses_nothing(arguments, tmp_path, monkeypatch, capsys):
    run, hashed = tmp_path / "run", checkpoint.file_hash
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def gone(path):
        if str(path).endswith("TUM_3.png"):  # since it was read
            raise ValueError(f"{path}: cannot be read")
        return hashed(path)

    monkeypatch.setattr(checkpoint, "file_hash", gone)
    assert train.main([*arguments, "--overwrite", "--seed", "3"]) == 2
    assert "TUM_3.png: cannot be read" in last_line(capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("sessions", [
    [], ["x"], [{}], [{"versions": {}, "hashes": []}], {"versions": {}}, None])
def test_a_broken_record_is_one_line(sessions, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"sessions": sessions}))
    with pytest.raises(ValueError, match="run.json: expected"):
        runs.resume_run(tmp_path, {"versions": {}, "hashes": {"code": "a"}}, "", None, print)


def test_a_state_with_another_progress_is_one_line(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    path = runs.state_files(run)[0]
    saved = load_object(path)
    saved["content"]["progress"]["epoch"] = 1
    save_object(path, {**saved, "hash": content_hash(saved["content"])})
    capsys.readouterr()
    assert resume(run) == 2
    error = last_line(capsys)
    assert f"{path}: its progress is " in error and "expected step, attempt, skipped_in_a_row" in error


def test_a_setting_unknown_in_a_runs_file_is_one_line(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    settings = tmp_path / "settings.yaml"
    settings.write_text((run / "config.yaml").read_text())
    with open(run / "config.yaml", "a") as file:
        file.write("lora_rang: 3\n")
    for more in ([], ["--config", str(settings)]):
        assert resume(run, *more) == 2
        assert "config.yaml: unknown key 'lora_rang'" in last_line(capsys)


def test_out_of_memory_is_one_line_and_other_faults_keep_their_traceback(
        arguments, tmp_path, monkeypatch, capsys):
    def fail(error):
        def raise_it():
            raise error
        return raise_it

    with monkeypatch.context() as patch:
        at_step(3, fail(torch.OutOfMemoryError("CUDA out of memory. Tried")), patch)
        assert train.main([*arguments, *SIX]) == 2
    error = last_line(capsys)
    assert error.startswith("train.py: error: CUDA out of memory. Tried; free some, or start anew")
    assert error.endswith(
        f"; step 2 is kept: python train.py --resume --out {tmp_path / 'run'}")
    at_step(3, fail(RuntimeError("a fault of ours")), monkeypatch)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        resume(tmp_path / "run")


def test_a_second_process_is_kept_out_of_a_run_and_changes_nothing(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], 'w'); "
         "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()",
         run / ".lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        capsys.readouterr()
        for flags in ([*arguments, "--overwrite"], ["--resume", "--out", str(run)]):
            with pytest.MonkeyPatch.context() as patch:  # refused before anything is loaded
                patch.setattr(train, "load_pixcell_base", interrupt)
                assert train.main(flags) == 2
            assert last_line(capsys).startswith(
                f"train.py: error: {run}: another process trains in it; wait")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    finally:
        holder.communicate()
    assert resume(run) == 0


def test_a_run_that_another_process_made_meanwhile_is_not_replaced(
        arguments, tmp_path, monkeypatch, capsys):
    run, load = tmp_path / "run", train.load_features

    def load_while_another_trains(*inputs):
        run.mkdir()
        (run / "run.json").write_text("theirs")
        return load(*inputs)

    monkeypatch.setattr(train, "load_features", load_while_another_trains)
    assert train.main(arguments) == 2
    assert "exists; replace it with --overwrite" in last_line(capsys)
    assert (run / "run.json").read_text() == "theirs"


def test_the_same_command_again_says_how_to_go_on(arguments, tmp_path, capsys):
    run = tmp_path / "my run"
    flags = [*arguments, "--max-train-steps", "1", "--out", str(run)]
    assert train.main(flags) == 0
    assert train.main(flags) == 2
    assert f"go on with python train.py --resume --out '{run}', replace it with --overwrite" in (
        last_line(capsys))


def test_the_record_names_versions_seed_hashes_and_every_session(
        arguments, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert train.main([*arguments, *SIX, "--seed", "5"]) == 0
    session, = json.loads((run / "run.json").read_text())["sessions"]
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] or (
        session["versions"]["torch"] == torch.__version__)
    assert session["seed"] == 5 and session["from_step"] == 0 and session["precision"] == "None"
    base = Path(arguments[arguments.index("--base") + 1])
    assert session["hashes"]["base"] == file_hash(
        base / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {len(its) for its in session["hashes"].values()} == {64}
    assert "--seed 5" in session["command"] and session["threads"] == torch.get_num_threads()
    describe = runs.describe_session
    monkeypatch.setattr(train, "describe_session", lambda *inputs, **facts: {
        **(its := describe(*inputs, **facts)), "versions": {**its["versions"], "torch": "9.9"}})
    capsys.readouterr()
    assert resume(run) == 0
    assert f"torch {session['versions']['torch']} → 9.9" in capsys.readouterr().err
    first, second = json.loads((run / "run.json").read_text())["sessions"]
    assert first == session and second["from_step"] == 6


def test_the_code_hash_sees_a_changed_source(tmp_path):
    seen = set()
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "a.py").write_text(text)
        seen.add(runs.describe_session([], {}, [tmp_path / "a.py"])["hashes"]["code"])
    assert len(seen) == 2


# ------------------------------------------------------------------------------ --deterministic

def test_deterministic_gives_the_same_bytes_twice_and_refuses_what_could_not(
        arguments, tmp_path, one_thread, reset_determinism, monkeypatch):
    flags = [*arguments, "--deterministic", "--sample-count", "1", "--lora-dropout", "0.1"]
    other = tmp_path / "other"
    subprocess.run([sys.executable, ROOT / "train.py", *flags, "--out", other, "--cache",
                    tmp_path / "other cache"], check=True, capture_output=True,
                   env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"})
    seen = []
    at_step(0, lambda: seen.append(torch.are_deterministic_algorithms_enabled()), monkeypatch)
    assert train.main(flags) == 0
    assert seen == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for name in ("lora_weights.safetensors", "adapter.safetensors", "samples/grid.png",
                 "tiles.json"):
        assert (other / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    session, = json.loads((other / "run.json").read_text())["sessions"]
    assert session["deterministic"] is True
