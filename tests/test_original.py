"""The authors' checkpoint names: every tensor of PixCell-256, the rows of fused layers, the folder written."""

import pickle

import pytest
import torch

from conftest import ROOT, TINY_TRANSFORMER
from pixcell_min.base import load_pixcell_base, read_vae_config
from pixcell_min.tools import original
from pixcell_min.tools.original import rename, write_base
from pixcell_min.transformer import PixCellTransformer, TransformerConfig


def released_shapes():
    rows = (ROOT / "tests" / "data" / "pixcell-256.tsv").read_text().splitlines()[1:]
    return {key: tuple(int(n) for n in shape.split(",")) for key, shape in (row.split("\t") for row in rows)}


def backwards(tensors):
    """Released names → PixArt's, written by hand here, so that a wrong row of the table is seen."""
    old = {}
    for key, tensor in tensors.items():
        for new, name in (
                ("transformer_blocks.", "blocks."), (".attn1.to_out.0.", ".attn.proj."),
                (".attn2.to_out.0.", ".cross_attn.proj."), (".attn2.to_q.", ".cross_attn.q_linear."),
                (".ff.net.0.proj.", ".mlp.fc1."), (".ff.net.2.", ".mlp.fc2."),
                ("adaln_single.emb.timestep_embedder.linear_1.", "t_embedder.mlp.0."),
                ("adaln_single.emb.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
                ("adaln_single.linear.", "t_block.1."), ("pos_embed.proj.", "x_embedder.proj."),
                ("caption_projection.linear_1.", "y_embedder.y_proj.fc1."),
                ("caption_projection.linear_2.", "y_embedder.y_proj.fc2."),
                ("caption_projection.uncond_embedding", "y_embedder.y_embedding"),
                ("proj_out.", "final_layer.linear.")):
            key = key.replace(new, name)
        key = "final_layer.scale_shift_table" if key == "scale_shift_table" else key
        old[key] = tensor
    fused = {}
    for key, tensor in old.items():
        stem, _, leaf = key.rpartition(".")
        if stem.endswith(".attn1.to_q"):
            place = stem.removesuffix("to_q")
            fused[key.replace("attn1.to_q", "attn.qkv")] = torch.cat(
                [old[f"{place}{name}.{leaf}"] for name in ("to_q", "to_k", "to_v")])
        elif stem.endswith(".attn2.to_k"):
            fused[key.replace("attn2.to_k", "cross_attn.kv_linear")] = torch.cat(
                [tensor, old[key.replace("to_k", "to_v")]])
        elif not stem.endswith((".attn1.to_k", ".attn1.to_v", ".attn2.to_v")):
            fused[key] = tensor
    return fused


def test_every_tensor_of_pixcell_256_is_found():
    shapes = released_shapes()
    old = backwards({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert len(old) == 604 - 28 * 2 * (2 + 1)  # qkv is one of three, kv one of two, each with a bias
    assert old["blocks.27.attn.qkv.weight"].shape == (3 * 1152, 1152)
    old["pos_embed"] = torch.empty(1, 256, 1152)  # recomputed, so left out
    assert {key: tuple(t.shape) for key, t in rename(old).items()} == shapes


def tiny():
    torch.manual_seed(0)
    return PixCellTransformer(TransformerConfig.from_dict(TINY_TRANSFORMER))


@pytest.mark.parametrize("nested", [False, True])
def test_the_folder_loads_with_the_same_bits(nested, tmp_path):
    model = tiny()
    old = backwards(model.state_dict())
    torch.save({"epoch": 3, "state_dict": old} if nested else old, tmp_path / "a.ckpt")
    write_base(tmp_path / "a.ckpt", tmp_path / "base", model.config)
    loaded = PixCellTransformer.from_pretrained(tmp_path / "base" / "transformer")
    assert loaded.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert read_vae_config(tmp_path / "base").block_out_channels == (128, 256, 512, 512)
    assert load_pixcell_base(tmp_path / "base", "cpu", "no").schedule.num_train_timesteps == 1000
    with pytest.raises(ValueError, match="exists"):
        write_base(tmp_path / "a.ckpt", tmp_path / "base", model.config)


@pytest.mark.parametrize("spoil, words", [
    (lambda s: s.update({"blocks.0.attn.key": torch.zeros(3)}), "'blocks.0.attn.key' is no name"),
    (lambda s: s.update({"attn.qkv.weight": torch.zeros(3)}), "'attn.qkv.weight' is no name"),
    (lambda s: s.pop("blocks.1.cross_attn.kv_linear.bias"), "2 missing (transformer_blocks.1.attn2.to_k.bias"),
    (lambda s: s.pop("final_layer.scale_shift_table"), "1 missing (scale_shift_table)"),
    (lambda s: s.update({"blocks.0.attn.qkv.bias": torch.zeros(95)}), "(95,) cannot be split into 3"),
    (lambda s: s.update({"blocks.0.attn.qkv.bias": torch.zeros(93)}), "shape (31,), expected (32,)"),
    (lambda s: s.update({"blocks.0.attn.qkv.bias": 3}), "expected a dict of tensors"),
])
def test_a_wrong_checkpoint_is_named_and_nothing_written(spoil, words, tmp_path):
    old = backwards(tiny().state_dict())
    spoil(old)
    torch.save(old, tmp_path / "a.ckpt")
    with pytest.raises(ValueError) as caught:
        write_base(tmp_path / "a.ckpt", tmp_path / "base", tiny().config)
    assert words in str(caught.value) and "a.ckpt" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


class Payload:
    """Pickles to a call of open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_command_line_refuses_in_one_line(tmp_path, capsys):
    torch.save({"state_dict": Payload(str(tmp_path / "pwned"))}, tmp_path / "code.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({}))
    whole = (tmp_path / "code.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[:len(whole) // 2])
    for name in ("code.ckpt", "old.ckpt", "half.ckpt", "nowhere.ckpt"):
        assert original.main([str(tmp_path / name), str(tmp_path / "base")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "base").exists()
