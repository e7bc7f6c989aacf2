"""The audit: what it counts and measures against plain torch, what it says, what it refuses."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

import train
from conftest import write_base
from pixcell_min.adapter import EmbeddingAdapter
from pixcell_min.checkpoint import file_hash, save_state
from pixcell_min.images import read_settings
from pixcell_min.lora import LoRALinear
from pixcell_min.tools import audit
from pixcell_min.tools.audit_report import DARK, EMPTY, heat_map
from pixcell_min.transformer import PixCellTransformer, TransformerConfig

RELATIVE = 1e-5  # float64 from float32 weights, against a singular value decomposition in float64


@pytest.fixture
def run(arguments, tmp_path):
    assert train.main(arguments) == 0
    return tmp_path / "run"


def of_run(run, capsys, *flags):
    """What --json prints of a run."""
    capsys.readouterr()
    assert audit.main(["--run", str(run), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def layer(rank=4, out=12, alpha=6.0):
    generator = torch.Generator().manual_seed(0)
    wrapped = LoRALinear(nn.Linear(20, out), rank, alpha, generator=generator)
    nn.init.normal_(wrapped.lora_B, generator=generator)
    return wrapped


# Updates

@pytest.mark.parametrize("rank, out, alpha", [(4, 12, 6.0), (1, 12, 2.0), (5, 5, 5.0)])
def test_norm_and_effective_rank_are_those_of_the_whole_matrix(rank, out, alpha):
    wrapped = layer(rank, out, alpha)
    with torch.no_grad():
        update = (alpha / rank * wrapped.lora_B.double() @ wrapped.lora_A.double())
    found = audit.update_of(wrapped)
    assert found["norm"] == pytest.approx(update.norm().item(), rel=RELATIVE)
    weight = wrapped.base.weight.double().norm().item()
    assert found["relative_norm"] == pytest.approx(update.norm().item() / weight, rel=RELATIVE)
    shares = torch.linalg.svdvals(update)[:rank]
    shares = shares / shares.sum()
    assert found["effective_rank"] == pytest.approx(
        (-(shares * shares.log()).sum()).exp().item(), rel=RELATIVE)
    assert 1 <= found["effective_rank"] <= rank + RELATIVE
    assert (found["rank"], found["alpha"], found["scaling"]) == (rank, alpha, alpha / rank)


def test_effective_rank_of_alike_of_one_and_of_no_direction():
    wrapped = layer()
    with torch.no_grad():
        wrapped.lora_A.copy_(torch.eye(4, 20)), wrapped.lora_B.copy_(3 * torch.eye(12, 4))
        assert audit.update_of(wrapped)["effective_rank"] == pytest.approx(4)
        wrapped.lora_B[:, 1:] = 0
        assert audit.update_of(wrapped)["effective_rank"] == pytest.approx(1)
        wrapped.lora_B.zero_()
    assert audit.update_of(wrapped)["effective_rank"] == audit.update_of(wrapped)["norm"] == 0


def test_singular_values_need_no_large_decomposition(monkeypatch):
    sizes, original = [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: sizes.append(m.shape) or original(m))
    audit.update_of(layer())
    assert sizes == [(4, 4)]


# A run

def test_every_parameter_is_counted_once_and_called_what_it_is(run, capsys):
    result = of_run(run, capsys)
    for part, totals in result["totals"].items():
        rows = [row for row in result["modules"] if row["part"] == part]
        assert sum(row["parameters"] for row in rows) == totals["parameters"] > 0
        assert sum(row["parameters"] for row in rows if row["trainable"]) == totals["trainable"]
        assert {row["dtype"] for row in rows} == {"float32"}
    assert list(result["totals"]) == ["transformer", "vae", "encoder", "adapter"]
    kinds = {row["kind"] for row in result["modules"] if row["trainable"]}
    assert kinds == {"LoRALinear", "Linear"}
    # As test_train.py: 1,536 of LoRA, 148 of the adapter; the null embedding is a buffer of 16.
    assert [result["totals"][part]["trainable"] for part in result["totals"]] == [1536, 0, 0, 148]
    assert result["totals"]["transformer"]["buffers"] == 16
    assert audit.main(["--run", str(run)]) == 0
    line = "1,684 of 59,252 parameters of transformer and adapter, 2.84 %"
    assert line in capsys.readouterr().out


def test_files_record_and_tiles(run, capsys, arguments):
    result = of_run(run, capsys)
    for file in result["files"]:
        assert file["sha256"] == file_hash(file["path"])
    named = {file["path"].rsplit("/", 1)[1]: file for file in result["files"]}
    assert {"lora_weights.safetensors", "adapter.safetensors", "step-00000004.pt"} < named.keys()
    assert named["lora_weights.safetensors"]["stored"] == {"float32": 24}
    record = json.loads((run / "run.json").read_text())["sessions"][0]
    assert result["sessions"][0]["hashes"] == record["hashes"]
    assert result["sessions"][0]["hashes"]["base"] == result["files"][0]["sha256"]
    assert result["tiles"] == {"training": 6, "validation": 2}
    assert result["adapter"]["distance"]["held_out"]["n"] == 2


def test_gradients_dead_and_seen(arguments, tmp_path, capsys):
    """After one step A is dead, for B was zero; after four nothing is. Not after a lost state."""
    for steps, share_of_a in ((1, {0.0}), (4, {1.0})):
        assert train.main([*arguments, "--max-train-steps", str(steps), "--overwrite"]) == 0
        result = of_run(tmp_path / "run", capsys)
        seen = [its["gradient_seen"] for its in result["lora"]["layers"]]
        assert result["state_step"] == steps and len(seen) == 12
        assert {its["A"] for its in seen} == share_of_a and {its["B"] for its in seen} == {1.0}
        assert set(result["adapter"]["gradient_seen"].values()) == ({0.0, 1.0} if steps == 1
                                                                    else {1.0})
        assert audit.main(["--run", str(tmp_path / "run")]) == 0
        assert ("  dead " in capsys.readouterr().out) == (steps == 1)
    shutil.rmtree(tmp_path / "run" / "states")
    result = of_run(tmp_path / "run", capsys)
    assert result["state_step"] is None and "gradients unknown" in result["notes"][0]
    assert {its["gradient_seen"]["A"] for its in result["lora"]["layers"]} == {None}


def test_a_foreign_state_tells_no_gradients(run, capsys):
    save_state(run / "states", 9, {"weight": torch.zeros(2)}, 1)
    result = of_run(run, capsys)
    assert result["state_step"] is None and "not the state of a run" in result["notes"][0]
    assert audit.main(["--run", str(run)]) == 0
    assert "Gradients: unknown" in capsys.readouterr().out


def test_a_held_out_tile_that_was_changed_is_left_out(run, capsys):
    tiles = json.loads((run / "tiles.json").read_text())["validation"]
    Image.new("RGB", (64, 64)).save(tiles[0]["path"])
    assert of_run(run, capsys)["adapter"]["distance"]["held_out"]["n"] == 1
    Image.new("RGB", (64, 64)).save(tiles[1]["path"])
    assert "held_out" not in of_run(run, capsys)["adapter"]["distance"]
    assert audit.main(["--run", str(run)]) == 0
    assert "held-out tiles: none" in capsys.readouterr().out


def test_averaged_weights_are_audited_on_demand(arguments, tmp_path, capsys):
    assert train.main([*arguments, "--ema-decay", "0.5"]) == 0
    norms = [of_run(tmp_path / "run", capsys, *flags)["lora"]["layers"][0]["norm"]
             for flags in ((), ("--ema",))]
    assert norms[0] != norms[1]


# Cross-attention with one token

@pytest.mark.parametrize("tokens", [1, 4])
def test_query_and_key_matter_for_several_tokens_alone(tokens):
    torch.manual_seed(0)
    transformer = PixCellTransformer(TransformerConfig(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, caption_channels=16,
        sample_size=8, caption_num_tokens=tokens)).eval()
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    effects = audit.measure_effects(transformer)
    assert [effects[name] == 0 for name in audit.PROJECTIONS] == [tokens == 1] * 2 + [False] * 3
    assert min(effects[name] for name in audit.PROJECTIONS[2:]) > 1e-3
    assert all(torch.equal(tensor, before[name])
               for name, tensor in transformer.state_dict().items())
    if tokens == 1:  # the softmax in full, not the network's short cut
        assert effects["whole softmax"] == 0 and effects["short cut"] < 1e-6
    else:
        assert not {"whole softmax", "short cut"} & effects.keys()


def test_the_whole_attention_depends_on_the_query_where_it_can():
    torch.manual_seed(0)
    attention = PixCellTransformer(TransformerConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, caption_channels=16,
        sample_size=8)).transformer_blocks[0].attn1
    h, context = torch.randn(1, 6, 24), torch.randn(1, 3, 24)
    weight = attention.to_q.weight
    whole = audit._whole_attention(attention, weight, h, context)
    torch.testing.assert_close(whole, attention(h, context))
    assert (audit._whole_attention(attention, -weight, h, context) - whole).abs().max() > 1e-4


# The adapter

def test_distance_from_the_identity():
    adapter, x = EmbeddingAdapter(16), torch.randn(3, 1, 16)
    new = audit.distance_from_identity(adapter, None)["distance"]
    assert new == {"random": {"n": audit.RANDOM_EMBEDDINGS, "mean": 0.0, "max": 0.0}}
    with torch.no_grad():
        adapter.fc2.bias.fill_(0.5)  # adds r·0.5 to each number, r the root mean square of x
    moved = audit.distance_from_identity(adapter, x)
    for its in moved["distance"].values():
        assert its["mean"] == pytest.approx(0.5) and its["max"] == pytest.approx(0.5)
    assert moved["norms"]["fc2.bias"] == 2 and (moved["embedding"], moved["hidden"]) == (16, 4)


# The figure

def test_the_figure_shades_by_block_and_projection(run, tmp_path, capsys):
    assert audit.main(["--run", str(run), "--figure", str(tmp_path / "heat.png")]) == 0
    assert read_settings(tmp_path / "heat.png")["lora_hash"] == file_hash(
        run / "lora_weights.safetensors")
    layers = [{"name": f"transformer_blocks.{block}.{name}", "relative_norm": value}
              for block, name, value in ((0, "attn1.to_q", 0.02), (1, "attn2.to_v", 0.08))]
    figure = heat_map(layers, 2, "title")
    corner = [(56 + 64 * column + 4, 62 + 22 * row + 3) for row, column in ((0, 0), (1, 6), (0, 4))]
    light, dark, none = (figure.getpixel(at) for at in corner)
    assert dark == DARK and none == EMPTY and light not in (DARK, EMPTY) and sum(light) > sum(dark)
    with Image.open(tmp_path / "heat.png") as image:
        assert image.size == figure.size


# A base alone, and bad input

def test_a_base_alone_without_its_gated_parts(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    shutil.rmtree(base / "uni")
    assert audit.main(["--base", str(base)]) == 0
    out = capsys.readouterr().out
    assert "a base alone" in out and "0 (exactly)" in out and "LoRA, ΔW" not in out
    assert "encoder not audited" in out and "no tile encoder" in out
    result = audit.audit(base)
    assert list(result["totals"]) == ["transformer", "vae"] and result["run"] is None


def test_licences_are_what_files_say(tmp_path):
    assert audit._stated(tmp_path) is None
    (tmp_path / "LICENSE").write_text("\nSome Licence 1.0\n\nand its terms\n")
    assert audit._stated(tmp_path) == "Some Licence 1.0"
    (tmp_path / "README.md").write_text("no header\nlicense: none of it\n")
    assert audit._stated(tmp_path) == "Some Licence 1.0"
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: of-a-model\ntags: [a]\n---\nlicense: not this\n")
    assert audit._stated(tmp_path) == "other, of-a-model"


BAD = {
    "no run": (["--run", "nowhere"], "config.yaml: cannot be read"),
    "no base": (["--base", "nowhere"], "no base model"),
    "figure of no run": (["--figure", "a.png"], "give --run"),
    "ema of no run": (["--ema"], "give --run"),
    "no averages": (["--run", "RUN", "--ema"], "--ema-decay"),
    "figure of another kind": (["--run", "RUN", "--figure", "a.jpg"], "ending in .png"),
    "broken LoRA": (["--run", "RUN"], "truncated or not a safetensors file"),
    "broken record": (["--run", "RUN"], "is not as train.py writes it"),
    "no session": (["--run", "RUN"], "is not as train.py writes it"),
    "broken versions": (["--run", "RUN"], "is not as train.py writes it"),
    "broken tiles": (["--run", "RUN"], "is not as train.py writes it"),
    "another base": (["--run", "RUN", "--base", "BASE"], "load the base it was trained on"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, run, tmp_path, capsys, monkeypatch):
    flags, expected = BAD[case]
    if case == "broken LoRA":
        content = (run / "lora_weights.safetensors").read_bytes()
        (run / "lora_weights.safetensors").write_bytes(content[:-100])
    elif case in ("broken record", "no session"):
        (run / "run.json").write_text(json.dumps({"sessions": [{}] * (case == "broken record")}))
    elif case == "broken versions":
        record = json.loads((run / "run.json").read_text())
        record["sessions"][0]["versions"] = "torch"
        (run / "run.json").write_text(json.dumps(record))
    elif case == "broken tiles":
        (run / "tiles.json").write_text('{"training": [], "validation": [{"path": 3}]}')
    elif case == "another base":
        write_base(tmp_path / "base", seed=5)
    flags = [{"RUN": str(run), "BASE": str(tmp_path / "base")}.get(flag, flag) for flag in flags]
    capsys.readouterr()
    try:
        code = audit.main(flags)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and expected in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
