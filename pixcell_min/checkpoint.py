"""Files in, files out: strict reading of weights, atomic writing of everything.

Reads `config.json`, `.safetensors` and `.bin/.pth/.pt` (`weights_only=True`: tensors, never code),
memory-mapped; fills a module only when every name and shape agrees; writes a file whole or
not at all. Knows no network by name. It and `loading`, which stands on it, are all that the
leaf modules import: three loaders and two savers share one strict reader.
"""

import difflib
import hashlib
import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
# All that torch.load was seen to raise when files were cut or their bytes flipped.
BROKEN_PICKLE = (pickle.UnpicklingError, struct.error, zipfile.BadZipFile, AssertionError, EOFError,
                 AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
STATE_FORMAT = 4  # raise it whenever a state would be continued otherwise than it was begun
MAX_NAMED_KEYS = 3  # an error line names this many keys of each kind and counts the rest


def read_text(path) -> str:
    """Read a UTF-8 text file. Raises: ValueError if it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason})") from None


def read_json(path) -> dict:
    """Read a JSON object. Raises: ValueError if the file is missing, not JSON, or not an object."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_tensors(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a flat file of tensors: (name → CPU tensor in its stored dtype, header metadata).

    Raises: ValueError if it is missing, empty, truncated, holds pickled code, or is no flat dict of
    tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a .safetensors, .pth or .bin file")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    elif path.suffix in PICKLE_SUFFIXES:
        tensors, metadata = _read_pickle(path), {}
    else:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; "
                         "expected .safetensors, .pth, .pt or .bin")
    if not tensors:
        raise ValueError(f"{path}: holds no tensor")
    return tensors, metadata


def _read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); copy it again") from None


def _load_weights_only(path, mmap=False):
    with warnings.catch_warnings():  # torch remarks on foreign pickles; the error says it in a line
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, mmap=mmap, map_location="cpu", weights_only=True)


def _read_pickle(path):
    try:
        content = _load_weights_only(path, mmap=zipfile.is_zipfile(path))  # older ones are no zip
    except BROKEN_PICKLE as error:
        # torch's own text, of many lines, suggests weights_only=False: never repeat that advice.
        cause = ("pickled code" if "Unsupported" in str(error) or "weights_only" in str(error)
                 else "broken")
        raise ValueError(f"{path}: refused, not a plain file of tensors ({cause}); "
                         "expected weights only") from None
    if not isinstance(content, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor)
            and value.layout == torch.strided for key, value in content.items()):
        kind = type(content).__name__
        raise ValueError(f"{path}: expected a flat dict of dense tensors, got {kind}")
    return content


def load_strict(module: torch.nn.Module, tensors: dict[str, torch.Tensor], source) -> None:
    """Copy `tensors` into parameters and persistent buffers of `module`, each keeping its dtype.

    A module on the meta device takes the tensors themselves (no copy). Raises: ValueError naming
    missing and unexpected keys (with the nearest name), wrong shapes or non-floating tensors; the
    module is then untouched.
    """
    wanted = module.state_dict(keep_vars=True)
    missing, unexpected = (
        [k for k in wanted if k not in tensors], [k for k in tensors if k not in wanted])
    if missing or unexpected:
        near = (difflib.get_close_matches(unexpected[0], missing or list(wanted), n=1)
                if unexpected else [])
        hint = f"; {unexpected[0]!r} is nearest to {near[0]!r}" if near else ""
        raise ValueError(
            f"{source}: does not fit {type(module).__name__}: {_count(missing, 'missing')}, "
            f"{_count(unexpected, 'unexpected')}{hint}"
        )
    for key, value in tensors.items():
        if value.shape != wanted[key].shape:
            raise ValueError(
                f"{source}: {key} has shape {tuple(value.shape)}, "
                f"expected {tuple(wanted[key].shape)} for {type(module).__name__}"
            )
        if not value.is_floating_point():
            raise ValueError(f"{source}: {key} is {value.dtype}, expected a floating-point tensor")
    if any(value.is_meta for value in wanted.values()):
        module.load_state_dict({k: v.to(wanted[k].dtype) for k, v in tensors.items()}, assign=True)
        return
    with torch.no_grad():
        for key, value in tensors.items():
            wanted[key].copy_(value)


def _count(keys, what):
    rest = f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else ""
    return f"{len(keys)} {what}" + (f" ({', '.join(keys[:MAX_NAMED_KEYS])}{rest})" if keys else "")


def save_tensors(path, tensors: dict[str, torch.Tensor],
                 metadata: dict[str, str] | None = None) -> None:
    """Write a flat dict of tensors atomically.

    `.safetensors` takes the header metadata too, `.pth`, `.pt`, `.bin` tensors only.
    Raises: ValueError for another ending or when the folder cannot be written to.
    """
    path = Path(path)
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        def write(temporary):
            save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
            _sort_header(temporary)
        replace_file(path, write)
    elif path.suffix in PICKLE_SUFFIXES:
        replace_file(path, lambda temporary: torch.save(plain, temporary))
    else:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; expected .safetensors or .pth")


def _sort_header(path):
    """Order a safetensors file's header, whose metadata safetensors writes in random order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(size)), sort_keys=True, ensure_ascii=False,
                            separators=(",", ":")).encode()
        assert len(header) <= size, f"{path}: header grew"  # same texts: only their order changes
        file.seek(8)
        file.write(header.ljust(size))


def save_object(path, content) -> None:
    """Write nested dicts, lists, numbers, tensors (a run's state) atomically with `torch.save`."""
    replace_file(Path(path), lambda temporary: torch.save(content, temporary))


def load_object(path) -> dict:
    """Read a `save_object` file, `weights_only=True`. Raises: ValueError if missing or broken."""
    try:
        return _load_weights_only(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; nothing to resume from") from None
    except BROKEN_PICKLE:
        raise ValueError(
            f"{path}: truncated or not a saved run state; it cannot be resumed") from None


def state_files(folder) -> list[Path]:
    """The states that `save_state` wrote, the newest first."""
    return sorted(Path(folder).glob("step-*.pt"), reverse=True)


def state_step(path: Path) -> int:
    """The step that a state's file name tells."""
    return int(path.stem.removeprefix("step-"))


def save_state(folder, step: int, content: dict, keep: int) -> None:
    """Write a run's state atomically, then delete all but the `keep` newest up to it.

    Raises: ValueError, with the earlier states intact, if it cannot be written.
    """
    path = Path(folder) / f"step-{step:08d}.pt"
    save_object(path, {"format": STATE_FORMAT, "hash": content_hash(content), "content": content})
    # A later one that could not be read stays for whoever can, and counts for none of ours.
    for old in [file for file in state_files(folder) if file.name <= path.name][keep:]:
        old.unlink()


def load_newest_state(folder, keys: set | None) -> tuple[dict, Path, list]:
    """(content, its file, [(newer file, why it was passed over)]) of the newest intact state.

    Raises: ValueError if no state is intact, of this code's format and with these keys (None: any).
    """
    failures = []
    for path in state_files(folder):
        try:
            return _read_state(path, keys), path, failures
        except ValueError as error:
            failures.append((path, error))
    raise ValueError(f"{failures[0][1] if failures else folder}; no state here can be read: start "
                     "again with --overwrite")


def newest_intact(folder) -> Path | None:
    """The file of the newest state that can be read, whichever run's it is; None: there is none."""
    try:
        return load_newest_state(folder, None)[1]
    except ValueError:
        return None


def _read_state(path, keys):
    saved = load_object(path)
    if not isinstance(saved, dict) or type(saved.get("format")) is not int:
        raise ValueError(f"{path}: not the state of a run")
    if saved["format"] != STATE_FORMAT:
        raise ValueError(f"{path}: saved by another version of this code, in format "
                         f"{saved['format']}; this one reads format {STATE_FORMAT}")
    content = saved.get("content")
    try:
        sound = bool(content_hash(content) == saved.get("hash"))  # torch.load checks no checksum
    except BROKEN_PICKLE:  # no content of ours: nested too deeply, tensors of another layout
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged, its contents do not fit its checksum")
    if not isinstance(content, dict) or (keys and content.keys() != keys):
        raise ValueError(f"{path}: not the state of such a run; expected {sorted(keys or ())}")
    return content


def content_hash(content) -> str:
    """SHA-256 of nested dicts, lists, tensors, numbers and texts."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            digest.update(b"{")
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode() + b";")

    add(content)
    return digest.hexdigest()


def write_bytes(path, content: bytes) -> None:
    """Write a file atomically. Raises: ValueError if it cannot be written."""
    replace_file(Path(path), lambda temporary: Path(temporary).write_bytes(content))


def write_text(path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises: ValueError if it cannot be written."""
    write_bytes(path, text.encode())


def replace_file(path: Path, write) -> None:
    """Call `write(temporary)`, flush, rename: readers see old or new. Raises: ValueError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; a run's are meant to be shared
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch.save, disk full
        raise ValueError(
            f"{path}: cannot be written ({error}); free space or choose another folder") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _flush_folder(folder):
    """Make a rename in it outlast a power cut; folders can be opened for that on POSIX alone."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_hash(path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits. Raises: ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
