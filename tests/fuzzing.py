"""The fault suite's tools: how many cases, seeded damage to files, odd values, and the judge.

A case is a sound world of files with one of them damaged, and a command. It must end, within
SECONDS and MEMORY, in success or in exit code 2 after one line that names what was read; a refusal
leaves every file as it was.
"""

import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
import zipfile
from pathlib import Path

import torch
from hypothesis import strategies as st

from pixcell_min.checks import one_line
from pixcell_min.runs import LOCK

# Cases of `pytest`; `pytest -m slow` runs SLOW times as many, the first ones among them or not.
CASES = {"bytes": 440, "safetensors": 150, "pickles": 120, "values": 150, "YAML": 120,
         "images": 1000, "arrays": 400, "feature caches": 120}
SLOW = 10
SECONDS, MEMORY = 20, 2**33  # of a case; MEMORY: bytes beside what the process has already

# Lines about what was computed, not read: no one file is to blame.
UNNAMED = ("decoded image is not finite", "embedding holds NaN", "can't allocate memory")

# ---------------------------------------------------------------- the judge


class Hang(BaseException):
    """A case took longer than SECONDS."""


@contextlib.contextmanager
def limits():
    """Within the block: at most SECONDS (else `Hang`) and MEMORY (else the system refuses)."""
    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(  # for what no signal interrupts
        3 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


class World:
    """A folder of sound files; a case damages some, and afterwards all is as before."""

    def __init__(self, root: Path):
        self.root = root
        self.sound = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.stamps = self._stamps()

    def _stamps(self):
        stamps = {}
        for folder, folders, files in os.walk(self.root):
            stamps |= {Path(folder, name): None for name in folders}
            stamps |= {path: _stamp(path) for path in (Path(folder, name) for name in files)}
        return stamps

    def _put(self, path, content):
        path.unlink(missing_ok=True)  # what an earlier case has read of it may still be mapped
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def restore(self) -> None:
        """Make the world sound again."""
        changed = {path for path, _ in self._stamps().items() ^ self.stamps.items()}
        for path in sorted(changed, reverse=True):  # a folder after what is in it
            if path in self.sound:
                self._put(path, self.sound[path])
                self.stamps[path] = _stamp(path)
            else:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def judge(self, damaged: dict[str, bytes], command, arguments) -> bool:
        """Run `command(arguments)` with these files damaged; → whether it succeeded.

        Asserts what this module's first lines say.
        """
        try:
            for name, content in damaged.items():
                self._put(self.root / name, content)
            before = self._stamps()
            code, lines = run(command, arguments, self.root)
            after = self._stamps()
            assert not [path for path in after if path.suffix == ".tmp"]
            # The lock is touched by who asks for it; a cache may have gained whole shards.
            changed = {str(path) for path, _ in after.items() ^ before.items()
                       if path.name != LOCK and "cache" not in path.parts}
            if code == 0:
                return True
            assert code == 2, (code, lines)
            errors = [line for line in lines if ": error: " in line]
            assert len(errors) == 1 and lines[-1] == errors[0], lines
            assert all(": note: " in line or ": error: " in line for line in lines), lines
            assert any(name.split("/")[0] in errors[0] for name in damaged) or any(
                words in errors[0] for words in UNNAMED), (errors, [*damaged])
            assert not changed, changed
            return False
        finally:
            self.restore()


def _stamp(path):
    stat = path.lstat()
    return stat.st_mtime_ns, stat.st_size


def run(command, arguments, root) -> tuple[int, list[str]]:
    """(exit code, lines on stderr) of a command in the folder `root`."""
    stderr = io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stderr(stderr), (
            contextlib.redirect_stdout(io.StringIO())), limits():
        try:
            code = command(arguments)
        except SystemExit as end:  # argparse's
            code = end.code
    return code, stderr.getvalue().splitlines()


def as_command(read):
    """A function that reads, as a command: it ends as the programs' `main` do."""
    def main(arguments):
        try:
            read(*arguments)
        except (ValueError, OSError) as error:
            print(f"read: error: {one_line(error)}", file=sys.stderr)
            return 2
        return 0
    return main


# ---------------------------------------------------------------- bytes

HEADS = (b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"\xff\xd8\xff\xe0", b"RIFF",
         b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x93NUMPY\x01\x00", b"\x80\x02", b"\x80\x05",
         b"\xef\xbb\xbf", b"\xff\xfe", b"{", b"[", b"\0" * 8, b"\xff" * 8, b"\x1f\x8b\x08",
         (2**63).to_bytes(8, "little"), (2**40).to_bytes(8, "little"), b"ustar\x0000")
EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (b"-1", b"0", b"65535", b"4294967296", b"9223372036854775807", b"9223372036854775808",
           b"1" * 5000, b"1e999", b"NaN", b"null", b"true", b'"x"', b"[]", b"{}", b".5")


def damage(content: bytes, random) -> bytes:
    """1 to 3 seeded faults: flips, cuts, runs put in, zeroed, moved, extremes, other heads."""
    for _ in range(random.randint(1, 3)):
        content = random.choice(FAULTS)(bytearray(content), random)
    return bytes(content)


def _place(content, random):
    """Half of the places lie near the ends, where headers and directories are."""
    edge = min(len(content), 300)
    return random.choice((random.randint(0, len(content)), random.randint(0, edge),
                          len(content) - random.randint(0, edge)))


def _flip(content, random):
    for _ in range(random.randint(1, 8) if content else 0):
        content[min(_place(content, random), len(content) - 1)] ^= 1 << random.randrange(8)
    return content


def _cut(content, random):
    return content[:_place(content, random)]


def _behead(content, random):
    return content[_place(content, random):]


def _insert(content, random):
    at, run = _place(content, random), random.randbytes(random.choice((1, 7, 8, 4096)))
    return content[:at] + run + content[at:]


def _zero(content, random):
    at, length = _place(content, random), random.choice((1, 8, 64, 4096))
    content[at:at + length] = bytes(len(content[at:at + length]))
    return content


def _extreme(content, random):
    at, size = _place(content, random), random.choice((2, 4, 8))
    number = random.choice(EXTREMES) % 256**size
    content[at:at + size] = number.to_bytes(size, random.choice(("little", "big")))
    return content


def _head(content, random):
    head = random.choice(HEADS)
    return head + content[random.choice((0, len(head))):]


def _number(content, random):
    """One of the numbers written out in the first 4 kB becomes another."""
    found = [*re.finditer(rb"-?\d+", content[:4096])]
    if not found:
        return content
    match = random.choice(found)
    return content[:match.start()] + random.choice(NUMBERS) + content[match.end():]


def _move(content, random):
    """A run is repeated elsewhere: doubled keys, chunks, entries."""
    start, at = _place(content, random), _place(content, random)
    return content[:at] + content[start:start + random.choice((8, 64, 4096))] + content[at:]


def _nothing(content, random):
    return random.choice((b"", b"\0", b"\n", b"\0" * 512, random.randbytes(512), b"\xff\xfe\0"))


FAULTS = (_flip, _flip, _cut, _cut, _behead, _insert, _zero, _extreme, _extreme, _head, _number,
          _number, _number, _move, _nothing)

# ---------------------------------------------------------------- tensors

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8,
          torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.complex64)
NAMES = ("", " ", "../../up", "/tmp/root", "a\nb", "a\0b", "ключ", "x" * 5000, "\u202e", "..",
         "lora_config", "__metadata__", "é" * 40, "-", "a/b", "C:\\x", "%s{0}")


def odd_tensors(tensors: dict, random) -> dict:
    """The same with one to three tensors of another name, dtype, shape or with odd numbers."""
    tensors = dict(tensors)
    for _ in range(random.randint(1, 3)):
        key = random.choice([*tensors])
        tensor = tensors[key].clone()
        fault = random.randrange(7)
        if fault == 0:
            tensors[random.choice(NAMES)] = tensors.pop(key)
        elif fault == 1:
            tensors[random.choice((*NAMES, *(key + end for end in (".", ".weight", "2"))))] = tensor
        elif fault == 2 and len(tensors) > 1:
            del tensors[key]
        elif fault == 3:
            tensors[key] = tensor.to(random.choice(DTYPES))
        elif fault == 4 and tensor.numel():
            tensors[key] = tensor.reshape(random.choice(
                ((-1,), (1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1])))
        elif fault == 5 and tensor.numel() and tensor.ndim:
            tensors[key] = random.choice(
                (tensor.flatten()[:1].reshape(()), tensor[:0], tensor.new_zeros((0, 0, 0)),
                 tensor.flatten()[:1], torch.cat([tensor.reshape(-1)] * 2), tensor[None, None, :1]))
        elif tensor.numel():
            value = random.choice((math.nan, math.inf, -math.inf, 3e38, -65504.0, 0.0))
            flat = tensor.float().flatten()
            flat[random.randrange(len(flat)):] = value
            tensors[key] = flat.reshape(tensor.shape).to(tensor.dtype)
    return tensors


def safetensors_bytes(header: dict, data: bytes) -> bytes:
    """A safetensors file of any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def odd_header(content: bytes, random) -> bytes:
    """A safetensors file whose header says something else, its length as it should be."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + size]), content[8 + size:]
    key = random.choice([*header])
    entry, fault = header[key], random.randrange(6)
    if key == "__metadata__":
        header[key] = random.choice((
            None, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {}, {**entry, "a": "\ud800"},
            {**entry, "base_hash": "\n"}, {**entry, "lora_config": "[" * 5000}))
    elif fault == 0:
        entry["dtype"] = random.choice(
            ("F64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "BOOL", "U64", "C64", "X", "", None, 1))
    elif fault == 1:
        entry["shape"] = random.choice(
            ([], [-1], [0], [2**63, 2], [2**32, 2**32], [1.5], ["x"], None, [[1]], [1] * 200, 7))
    elif fault == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            ([end, start], [start, end + 4], [start + 4, end], [0, 2**63], [-8, -4], [0], None,
             [start, end, end], ["0", "4"], [0, len(data)], [0, 0], [2**64 - 4, 2**64 - 1]))
    elif fault == 3:
        other = random.choice([name for name in header if name != "__metadata__"])
        entry["data_offsets"] = header[other]["data_offsets"]  # two tensors over one another
    elif fault == 4:
        header[random.choice(NAMES)] = header.pop(key)
    else:
        del entry[random.choice([*entry])]
    return safetensors_bytes(header, data)


# ---------------------------------------------------------------- pickles


class Evil:
    """Unpickled, it would write a file into the working folder."""

    def __reduce__(self):
        return open, ("executed", "w")


class EvilByName(Evil):
    """The same by a name that is looked up."""

    def __reduce__(self):
        return eval, ("open('executed', 'w').close()",)


def deep(depth):
    """Lists within lists."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


def odd_objects(sound) -> list:
    """What a file of torch.save may hold instead of `sound`."""
    values = [None, 1, "x", b"x", [], {}, (), deep(100), Evil(), EvilByName(), {"state_dict": {}},
              {"state_dict": []}, {"content": {}, "format": 3, "hash": "x"},
              {"format": torch.zeros(2)}, {"format": 3}, torch.zeros(3), torch.nn.Linear(2, 2),
              {"a": torch.zeros(2).to_sparse()}, {"a": torch.zeros(2, device="meta")},
              {"a": torch.nn.Parameter(torch.zeros(2))}, {1: torch.zeros(2)}, {"a": 2**70},
              {None: None}, {"a": {"b": torch.zeros(2)}}, {"a": math.nan}, {("a", "b"): 1},
              {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, {"a": Evil()},
              {"a": torch.zeros(2, dtype=torch.complex64)}, torch.Size([1]), torch.float32]
    if isinstance(sound, dict):
        values += [{**sound, "more": value} for value in values]
        values += [{**sound, random_key: value} for random_key in [*sound][:4] for value in values]
    return values


def torch_bytes(content, legacy=False) -> bytes:
    """A file of torch.save; legacy: as before version 1.6, no zip archive."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


DEEP = b"]" * 3000 + b"a" * 2999  # lists within lists, too deep for Python's own pickler


def odd_archive(content: bytes, random) -> bytes:
    """A torch.save archive packed anew: names that lead outside, damaged, missing, more members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at, fault = random.randrange(len(members)), random.randrange(6)
    name, inside = members[at]
    if fault == 0:
        members[at] = (random.choice((*NAMES[1:], "../" + name, "/" + name, name + "/", name.upper()
                                      )).replace("\0", ""), inside)
    elif fault == 1:
        del members[at]
    elif fault == 2:
        members[at] = (name, damage(inside, random))
    elif fault == 3:
        at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        members[at] = (members[at][0], random.choice((
            damage(members[at][1], random), pickle.dumps(deep(50), 2), pickle.dumps(Evil(), 2),
            b"\x80\x02" + DEEP + b".", b"\x80\x02}(X\x06\0\0\0formatK\x03X\x07\0\0\0content" + DEEP
            + b"X\x04\0\0\0hashX\x01\0\0\0xu.", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
            b"cos\nsystem\n(S'touch executed'\ntR.", b"\x80\x02cbuiltins\neval\n.")))
    elif fault == 4:
        members.append((random.choice((name, "../executed", "/tmp/executed", "x" * 3000)), b"x"))
    else:
        members = members[::-1]
    packed = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packed) as archive:
        for name, inside in members:
            archive.writestr(zipfile.ZipInfo(name), inside, packed)
    return file.getvalue()


# ---------------------------------------------------------------- JSON, YAML

ODD = (None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -2**63, 10**400, 0.5, 1.0, -1.5,
       1e-300, 1e308, math.nan, math.inf, -math.inf, "", " ", "x", "a\nb", "../../x", "/", "\0",
       "\ud800", "é", "0", "none", "x" * 3000, "(", "*", [], {}, [[]], [1], [1.0, 1.0, 1.0],
       [0.0, 0.0, 0.0], [None], [-1], [2**63] * 3, {"": ""}, {"a": {"b": [1]}}, ["x", "x"],
       [[1, 2]])
odd_values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=10), inner, max_size=3), max_leaves=5)


@st.composite
def altered(draw, document):
    """A JSON value with one to three of its entries, at any depth, replaced, left out or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(document, (dict, list)) or not document:
            return document
        place, keys = document, None
        while True:
            keys = sorted(place, key=str) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        fault = draw(st.integers(0, 9))
        if fault == 0:
            document = copy.deepcopy(draw(odd_values))
        elif fault == 1:
            del place[key]
        elif fault == 2 and isinstance(place, dict):
            name = draw(st.text(max_size=10) | st.sampled_from(NAMES))
            place[name] = copy.deepcopy(draw(odd_values))
        else:
            place[key] = copy.deepcopy(draw(odd_values))
    return document
