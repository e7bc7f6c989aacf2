"""Strict reading, atomic writing: each promise and each refusal of checkpoint.py."""

import hashlib
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pixcell_min import checkpoint
from pixcell_min.checkpoint import (
    file_hash, load_object, load_strict, read_json, read_tensors, save_object, save_tensors,
    write_bytes, write_text,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3),
           "b": torch.tensor([1.5, -2.0], dtype=torch.float16)}
SUFFIXES = [".safetensors", ".pth", ".pt", ".bin"]


def refusal(call, *arguments):
    """The text of the ValueError, which must be one line that starts with the file's name."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text and text.startswith(str(arguments[0])), text
    return text


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(t, others[k]) and t.dtype == others[k].dtype for k, t in tensors.items())


# Reading JSON

def test_json_object(tmp_path):
    (tmp_path / "c.json").write_text('{"a": [1, null], "µ": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "c.json") == {"a": [1, None], "µ": "é"}


@pytest.mark.parametrize("content, message", [
    (b"", "not valid JSON"), (b'{"a": 1', "not valid JSON"), (b"\xff\xfe\x00", "not a UTF-8 text file"),
    (b"[1]", "got list"), (b"3", "got int"),
])
def test_json_refusals(tmp_path, content, message):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    assert message in refusal(read_json, path)


def test_json_missing_or_a_folder(tmp_path):
    assert "cannot be read (No such file" in refusal(read_json, tmp_path / "none.json")
    assert "cannot be read (Is a directory" in refusal(read_json, tmp_path)


# Reading tensors

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_come_back_with_their_dtypes(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    save_tensors(path, TENSORS, {"base_hash": "xyz"})
    tensors, metadata = read_tensors(path)
    assert same(tensors, TENSORS) and all(t.device.type == "cpu" for t in tensors.values())
    assert metadata == ({"format": "pt", "base_hash": "xyz"} if suffix == ".safetensors" else {})


def test_the_same_tensors_and_header_give_the_same_bytes(tmp_path):
    header = {"base_hash": "é\u2028\t\"\\", **{f"key {i}": str(i) for i in range(9)}}
    contents = set()
    for i in range(5):
        save_tensors(tmp_path / f"{i}.safetensors", TENSORS, header)
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(contents) == 1
    tensors, metadata = read_tensors(tmp_path / "0.safetensors")
    assert same(tensors, TENSORS) and metadata == {"format": "pt", **header}


def test_safetensors_without_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors")
    assert read_tensors(tmp_path / "t.safetensors")[1] == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_refused_at_any_length(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    save_tensors(path, TENSORS)
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 40, len(content) // 2, len(content) - 30, len(content) - 1}:
        path.write_bytes(content[:length])
        text = refusal(read_tensors, path)
        assert ("truncated" if suffix == ".safetensors" else "refused") in text
        assert "weights_only=False" not in text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_something_else_is_refused(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    for content in (b"<!DOCTYPE html><html>404</html>" * 9,
                    b"version https://git-lfs.github.com/spec/v1\n", bytes(64),
                    b"\x80\x02}q\x00(X", pickle.dumps([1, 2])):
        path.write_bytes(content)
        refusal(read_tensors, path)


def test_old_pickles_of_tensors_are_read_and_refused_when_cut(tmp_path):
    path = tmp_path / "old.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert same(read_tensors(path)[0], TENSORS)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        refusal(read_tensors, path)


def test_flipped_bytes_are_refused_in_one_line_or_harmless(tmp_path):
    path, random = tmp_path / "old.bin", torch.Generator().manual_seed(0)
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    content, refused = path.read_bytes(), 0
    for _ in range(150):
        at, value = (torch.randint(n, (), generator=random).item() for n in (len(content), 256))
        path.write_bytes(content[:at] + bytes([value]) + content[at + 1:])
        try:
            read_tensors(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def test_missing_files_folders_and_unknown_endings(tmp_path):
    assert "no such file" in refusal(read_tensors, tmp_path / "none.safetensors")
    (tmp_path / "folder.pth").mkdir()
    assert "no such file" in refusal(read_tensors, tmp_path / "folder.pth")
    (tmp_path / "w.ckpt").write_bytes(b"x")
    assert "unknown ending '.ckpt'" in refusal(read_tensors, tmp_path / "w.ckpt")


@pytest.mark.parametrize("content", [
    [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, {"a": 1.0}, {0: torch.zeros(1)},
    torch.zeros(2), {"a": torch.zeros(2).to_sparse()},
])
def test_what_is_no_flat_dict_of_tensors_is_refused(tmp_path, content):
    path = tmp_path / "t.pth"
    torch.save(content, path)
    assert "expected a flat dict of dense tensors" in refusal(read_tensors, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_a_tensor_is_refused(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    save_tensors(path, {})
    assert "holds no tensor" in refusal(read_tensors, path)


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("save", [
    torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)),
    lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
])
@pytest.mark.parametrize("read", [read_tensors, load_object])
def test_pickled_code_is_refused_and_not_run(tmp_path, save, read):
    marker, path = tmp_path / "ran", tmp_path / "adapter.pth"
    save({"a": Payload(marker)}, path)
    text = refusal(read, path)
    assert not marker.exists() and "weights_only" not in text
    assert read is load_object or "pickled code" in text
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the content was dangerous


# Filling a module

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("recomputed", torch.zeros(2), persistent=False)


def filling(**changes):
    tensors = {"linear.weight": torch.rand(2, 3), "linear.bias": torch.rand(2),
               "kept": torch.rand(2)} | changes
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_is_filled_and_keeps_its_dtype(device, dtype, stored):
    with torch.device(device):
        module = Small().to(dtype)
    tensors = {key: value.to(stored) for key, value in filling().items()}
    load_strict(module, tensors, "here")
    assert same(module.state_dict(), {key: value.to(dtype) for key, value in tensors.items()})
    assert isinstance(module.linear.weight, nn.Parameter) and module.linear.weight.requires_grad


@pytest.mark.parametrize("changes, message", [
    ({"kept": None}, "1 missing (kept), 0 unexpected"),
    ({"recomputed": torch.zeros(2)}, "0 missing, 1 unexpected (recomputed)"),
    ({"linear.bias": None, "linear.bais": torch.zeros(2)},
     "'linear.bais' is nearest to 'linear.bias'"),
    ({"linear.weight": torch.zeros(3, 2)}, "linear.weight has shape (3, 2), expected (2, 3)"),
    ({"linear.weight": torch.zeros(2, 3, dtype=torch.int8)}, "linear.weight is torch.int8"),
    ({f"x{i}": torch.zeros(1) for i in range(9)}, "9 unexpected (x0, x1, x2 and 6 more)"),
    ({"linear.weight": None, "linear.bias": None, "kept": None},
     "3 missing (kept, linear.weight, linear.bias)"),
])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_does_not_fit_is_named_and_nothing_is_touched(changes, message, device):
    with torch.device(device):
        module = Small()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_strict(module, filling(**changes), "here.bin")
    text = str(error.value)
    assert message in text and text.startswith("here.bin: ") and "\n" not in text
    after = module.state_dict()
    assert all(t.is_meta for t in after.values()) if device == "meta" else same(after, before)


# Writing

WRITERS = {
    "t.safetensors": lambda path: save_tensors(path, TENSORS),
    "t.pth": lambda path: save_tensors(path, TENSORS),
    "state.pt": lambda path: save_object(path, {"step": 1}),
    "n.txt": lambda path: write_text(path, "new"),
    "n.png": lambda path: write_bytes(path, b"new"),
}


def no_space(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name, failing):
    path = tmp_path / name
    path.write_bytes(b"old")
    monkeypatch.setattr(os, failing, no_space)
    assert "cannot be written" in refusal(WRITERS[name], path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error",
                         [RuntimeError("enforce fail at inline_container.cc"),
                          OSError(28, "No space left")])
def test_a_disk_that_fills_while_writing_leaves_the_old_file(tmp_path, monkeypatch, error):
    def half(content, file):
        Path(file).write_bytes(b"half")
        raise error
    path = tmp_path / "state.pt"
    save_object(path, {"step": 1})
    monkeypatch.setattr(torch, "save", half)
    assert "cannot be written" in refusal(save_object, path, {"step": 2})
    assert load_object(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    path = tmp_path / "n.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_place_of_the_folder_or_a_folder_in_place_of_the_file(tmp_path, name):
    (tmp_path / "taken").write_text("a file")
    assert "cannot be written" in refusal(WRITERS[name], tmp_path / "taken" / name)
    (tmp_path / name).mkdir()
    assert "cannot be written" in refusal(WRITERS[name], tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["taken", name])


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch, name):
    order, fsync, replace = [], os.fsync, os.replace

    def flush(handle):
        order.append(("flushed", os.fstat(handle).st_ino))
        fsync(handle)

    def rename(old, new):
        order.append(("renamed", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    path = tmp_path / "new" / "folder" / name
    WRITERS[name](path)
    assert order == [("flushed", path.stat().st_ino), ("renamed", path.stat().st_ino),
                     ("flushed", path.parent.stat().st_ino)]  # the rename itself, at last
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_the_temporary_file_lies_in_the_same_folder(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda *names: seen.append(names) or os.rename(*names))
    write_text(tmp_path / "n.txt", "new")
    temporary, path = map(Path, seen[0])
    assert path == tmp_path / "n.txt" and temporary.parent == tmp_path
    assert temporary.name.startswith(".") and temporary.suffix == ".tmp"


def test_texts_and_bytes(tmp_path):
    write_text(tmp_path / "n.txt", "µm · é\n")
    assert (tmp_path / "n.txt").read_bytes() == "µm · é\n".encode()
    write_bytes(tmp_path / "n.txt", b"\x00\xff")
    assert (tmp_path / "n.txt").read_bytes() == b"\x00\xff"


def test_tensors_are_saved_from_any_view(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    save_tensors(tmp_path / "t.safetensors", {"turned": base.T, "part": base[1:, ::2]})
    assert same(load_file(tmp_path / "t.safetensors"),
                {"turned": base.detach().T, "part": base.detach()[1:, ::2]})
    with pytest.raises(ValueError, match="unknown ending '.npz'"):
        save_tensors(tmp_path / "t.npz", TENSORS)
    assert not (tmp_path / "t.npz").exists()


def test_state_of_a_run(tmp_path):
    state = {"step": 3, "rates": [0.1, None],
             "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    save_object(tmp_path / "state.pt", state)
    loaded = load_object(tmp_path / "state.pt")
    assert torch.equal(loaded["optimizer"]["state"][0].pop("exp_avg"), torch.ones(2))
    assert loaded == {"step": 3, "rates": [0.1, None], "optimizer": {"state": {0: {}}}}


def test_a_broken_or_missing_state_cannot_be_resumed(tmp_path):
    path = tmp_path / "state.pt"
    assert "nothing to resume from" in refusal(load_object, path)
    save_object(path, {"step": 3, "weights": torch.ones(99)})
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "cannot be resumed" in refusal(load_object, path)


def test_hash(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert file_hash(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert "cannot be read" in refusal(file_hash, tmp_path / "none")
    assert "cannot be read" in refusal(file_hash, tmp_path)


def test_nothing_here_loads_code():
    source = Path(checkpoint.__file__).read_text()
    safe = 'map_location="cpu", weights_only=True)'
    assert source.count("torch.load(") == source.count(safe) == 1
    assert "pickle.load" not in source
