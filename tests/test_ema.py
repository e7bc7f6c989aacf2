"""ema.py, and the averaged pair of a run: beside the weights, never instead of them."""

import json

import pytest
import torch

import sample
import train
from conftest import assert_same_weights, metrics, weights
from pixcell_min.adapter import load_adapter
from pixcell_min.checkpoint import read_tensors
from pixcell_min.ema import averaged, update_averages
from pixcell_min.tools import evaluate
from test_training import fp16_flags, overflow_at

PAIR = ("lora_weights_ema.safetensors", "adapter_ema.safetensors")


def test_an_average_follows_its_formula():
    weight, average = torch.nn.Parameter(torch.tensor([0.0])), torch.tensor([0.0])
    expected = 0.0
    for step in range(1, 200):
        weight.data += 1
        update_averages([average], [weight], 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() - average.item() == pytest.approx(9, rel=1e-3)  # d / (1 − d) steps behind


def test_within_the_block_parameters_are_averages_and_afterwards_their_own_bits():
    weight, average = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
    storage = weight.data_ptr()
    with pytest.raises(RuntimeError), averaged([weight], [average]):
        assert weight.tolist() == [0, 0]
        raise RuntimeError
    assert weight.tolist() == [1, 1] and weight.data_ptr() == storage and average.tolist() == [0, 0]


def pair(run):
    return {name: read_tensors(run / name)[0] for name in PAIR}


def test_averages_are_a_second_pair_and_leave_the_weights_alone(arguments, tmp_path, tiles):
    run = tmp_path / "run"
    assert train.main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / PAIR[0]).exists()
    assert train.main([*arguments, "--ema-decay", "0.5", "--save-every", "1"]) == 0
    assert_same_weights(weights(run), weights(tmp_path / "plain"))
    averages = pair(run)
    for name, raw in zip(PAIR, ("lora_weights.safetensors", "adapter.safetensors")):
        own, header = read_tensors(run / raw)
        assert averages[name].keys() == own.keys()
        assert any(not torch.equal(own[key], averages[name][key]) for key in own)
        assert read_tensors(run / name)[1] == {**header, "averaged": "true"}
    line = metrics(run)[-1]
    assert line["validation_loss_ema"] != line["validation_loss"]
    # A normal pair: sampled from, and measured, by the same programs.
    image = ["--image", str(tiles / "TUM" / "TUM_0.png"), "--run", str(run), "--steps", "2"]
    drawn = []
    for extra in ([], ["--ema"], ["--lora", str(run / PAIR[0]), "--adapter", str(run / PAIR[1])]):
        assert sample.main([*image, *extra, "--mixed-precision", "no", "--out",
                            str(tmp_path / f"s{len(drawn)}")]) == 0
        drawn.append((tmp_path / f"s{len(drawn)}" / "TUM_0_seed0.png").read_bytes())
    assert drawn[0] != drawn[1] == drawn[2]
    options = evaluate.parse_evaluate(["--data", "d", "--run", str(run), "--ema"])
    assert options.out == run / "evaluation_ema"
    models = evaluate.load_models(options, vars(train.Config(base=train_base(arguments))))
    assert torch.equal(models.adapter.fc2.weight, load_adapter(run / PAIR[1]).fc2.weight)


def train_base(arguments):
    return arguments[arguments.index("--base") + 1]


def test_averages_survive_an_interrupt_and_pass_over_skipped_steps(
        arguments, tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = [*fp16_flags(arguments, 2.0**8, monkeypatch), "--ema-decay", "0.9", "--save-every", "2"]
    updates, update = [], train.update_averages
    monkeypatch.setattr(train, "update_averages", lambda *inputs: (
        updates.append(inputs[-1]), update(*inputs)))
    with monkeypatch.context() as patch:
        overflow_at(patch, 1)
        assert train.main(flags) == 0
    whole = pair(run)
    assert updates == [1, 2, 3, 4]
    factor = train.rate_factor

    def stop_at(step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return factor(step, *rest)

    with monkeypatch.context() as patch:
        overflow_at(patch, 1)
        patch.setattr(train, "rate_factor", stop_at)
        assert train.main([*flags, "--overwrite"]) == 130
    with monkeypatch.context() as patch:
        overflow_at(patch, 1)
        assert train.main(["--resume", "--out", str(run)]) == 0
    assert_same_weights(pair(run), whole)


def test_ema_without_averages_or_run_is_one_line(arguments, tmp_path, tiles, capsys):
    assert train.main([*arguments, "--max-train-steps", "1"]) == 0
    capsys.readouterr()
    image = ["--image", str(tiles / "TUM" / "TUM_0.png"), "--ema"]
    assert sample.main([*image, "--run", str(tmp_path / "run")]) == 2
    assert "train.py --ema-decay 0.999" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        sample.main(image)
    assert stop.value.code == 2 and "give --run" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # of which nothing would be left to choose
        sample.main([*image, "--run", str(tmp_path / "run"), "--lora", "a", "--adapter", "b"])
    assert "not both --lora and --adapter" in capsys.readouterr().err
    assert evaluate.main(["--data", str(tiles), "--run", str(tmp_path / "run"), "--ema"]) == 2
    assert json.loads((tmp_path / "run" / "tiles.json").read_text())  # untouched
