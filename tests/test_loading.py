"""loading.py: the right numbers in the right dtype, in no more memory than they need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pixcell_min import loading, transformer, uni, vae
from pixcell_min.checkpoint import file_hash, save_tensors
from pixcell_min.loading import groups, load_weights

FILES = ("w.safetensors", "w.bin")
LINEARS, WIDTH = 48, 1024  # 201 MB of float32
# In another process: MB by which memory had grown at its peak, after loading the file as bfloat16,
# after loading it as float32, and after reading all of the latter.
MEASURE = """
import json, re, sys, torch
from torch import nn
from pixcell_min import loading
loading.GROUP_BYTES = 2**24
def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3
path, linears, width, peaks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), []
before = memory("VmRSS")
for dtype in (torch.bfloat16, torch.float32):
    module = None
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(linears)))
    loading.load_weights(module.to(dtype), path)
    peaks.append(memory("VmHWM") - before)
sum(float(p.detach().sum()) for p in module.parameters())
print(json.dumps([*peaks, memory("VmHWM") - before]))
"""


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("kept", torch.zeros(2))


def small(dtype, device="meta"):
    with torch.device(device):
        return Small().to(dtype)


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    torch.manual_seed(0)
    module = small(torch.float32, "cpu")
    save_tensors(tmp_path / request.param, module.state_dict())
    return tmp_path / request.param, module.state_dict()


@pytest.mark.parametrize("group_bytes", [1, 300, 2**28])  # one tensor each, one and a bias, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_arrives_in_the_networks_dtype(file, dtype, group_bytes, monkeypatch):
    monkeypatch.setattr(loading, "GROUP_BYTES", group_bytes)
    path, expected = file
    module = small(dtype)
    load_weights(module, path)
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_in_the_networks_layout(tmp_path, dtype):
    torch.manual_seed(0)
    expected = nn.Conv2d(3, 4, 3).state_dict()
    save_tensors(tmp_path / "w.safetensors", expected)
    with torch.device("meta"):
        module = nn.Conv2d(3, 4, 3).to(dtype, memory_format=torch.channels_last)
    load_weights(module, tmp_path / "w.safetensors")
    assert module.weight.stride() == (27, 1, 9, 3)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype))


def test_an_order_that_differs_in_name_alone_is_not_copied(tmp_path, monkeypatch):
    """A 1×1 convolution has other strides in channels_last, and the same numbers in the same places."""
    save_tensors(tmp_path / "w.safetensors", nn.Conv2d(3, 4, 1).state_dict())
    with torch.device("meta"):
        module = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
    asked = []
    monkeypatch.setattr(loading, "groups", lambda names, *rest: asked.extend(names) or [])
    load_weights(module, tmp_path / "w.safetensors")
    assert asked == []


def test_a_wrong_shape_is_said_before_any_change_of_layout(tmp_path):
    save_tensors(tmp_path / "w.safetensors", {"weight": torch.ones(4, 27), "bias": torch.ones(4)})
    with torch.device("meta"):
        module = nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"weight.*\(4, 27\)"):
        load_weights(module, tmp_path / "w.safetensors")


def test_dtypes_may_differ_within_a_network(file):
    path, expected = file
    module = small(torch.float32)
    module.linears[1].to(torch.bfloat16)
    load_weights(module, path)
    for name, tensor in module.state_dict().items():
        dtype = torch.bfloat16 if "linears.1" in name else torch.float32
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype))


def test_layers_to_leave_stay_in_the_file_in_its_dtype(tmp_path, monkeypatch):
    module, path = small(torch.float16, "cpu"), tmp_path / "w.safetensors"
    save_tensors(path, module.state_dict())
    asked, converted = [], small(torch.bfloat16)
    monkeypatch.setattr(loading, "groups", lambda names, *rest: asked.extend(names) or groups(names, *rest))
    load_weights(converted, path, leave=["linears.1"])
    left = {"linears.1.weight", "linears.1.bias"}
    assert set(asked) == module.state_dict().keys() - left  # what is left is not even touched
    for name, tensor in converted.state_dict().items():
        dtype = torch.float16 if name in left else torch.bfloat16
        assert tensor.dtype == dtype and torch.equal(tensor, module.state_dict()[name].to(dtype))
    with pytest.raises(ValueError, match="1 missing .*linears.1.weight"):
        tensors = module.state_dict()
        del tensors["linears.1.weight"]
        save_tensors(path, tensors)
        load_weights(small(torch.bfloat16), path, leave=["linears.1"])


def test_weights_can_be_written_to_and_the_file_stays(file):
    path, expected = file
    before, module = file_hash(path), small(torch.float32)
    load_weights(module, path)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert file_hash(path) == before
    path.with_suffix(".new").write_bytes(b"another file")
    path.with_suffix(".new").replace(path)  # as an atomic writer does: the old one lives on
    assert torch.equal(module.kept, expected["kept"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_does_not_fit_is_named(tmp_path, dtype):
    whole = small(torch.float32, "cpu").state_dict()
    for changes, message in (({"kept": torch.zeros(2, dtype=torch.int64)}, "kept is torch.int64"),
                             ({"more": torch.zeros(1)}, "1 unexpected (more)"),
                             ({"kept": torch.zeros(3)}, r"kept has shape (3,), expected (2,)")):
        path = tmp_path / "w.safetensors"
        save_tensors(path, {**whole, **changes})
        module = small(dtype)
        with pytest.raises(ValueError) as error:
            load_weights(module, path)
        assert str(error.value).startswith(str(path)) and message in str(error.value)
        assert module.kept.is_meta


def test_old_pickles_that_cannot_be_mapped_are_read(tmp_path):
    expected = small(torch.float32, "cpu").state_dict()
    torch.save(expected, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    module = small(torch.bfloat16)
    load_weights(module, tmp_path / "old.bin")
    assert torch.equal(module.linears[2].weight, expected["linears.2.weight"].bfloat16())


def test_groups_by_hand():
    assert groups("abcde", [3, 3, 7, 1, 2], 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert groups("", [], 6) == []


@pytest.mark.parametrize("part", ["transformer", "vae", "uni"])
def test_networks_compute_no_random_start(tiny_base, part, monkeypatch):
    # Weights that are overwritten would take a file's size in memory once more, and time.
    module, network = {"transformer": (transformer, transformer.PixCellTransformer),
                       "vae": (vae, vae.AutoencoderKL), "uni": (uni, uni.TileEncoder)}[part]
    given = []
    monkeypatch.setattr(module, "load_weights", lambda model, path, *leave: given.extend(
        parameter.is_meta for parameter in model.parameters()) or load_weights(model, path, *leave))
    loaded = network.from_pretrained(tiny_base / part)
    assert given and all(given)
    tensors = [*loaded.parameters(), *loaded.buffers()]  # those that no file holds, too
    assert not any(tensor.is_meta for tensor in tensors)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak there")
@pytest.mark.parametrize("name", FILES)
def test_peak_memory(tmp_path, name):
    tensors = {f"{i}.weight": torch.ones(WIDTH, WIDTH) for i in range(LINEARS)}
    save_tensors(tmp_path / name, tensors)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    shares = [peak / size for peak in json.loads(subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / name), str(LINEARS), str(WIDTH)],
        check=True, capture_output=True, text=True).stdout)]
    assert shares[0] < 0.7  # half the file and a group of 1/16
    assert shares[1] < 0.7  # nothing more: not read yet
    assert shares[2] < 1.15
