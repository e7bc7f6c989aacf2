"""Released weights from the Hugging Face hub → `weights/`, in the layout that the loader reads.

    python -m pixcell_min.tools.download pixcell-256 uni2-h sd3-vae
    HF_TOKEN=hf_… python -m pixcell_min.tools.download sd3-vae --to /data/weights

Only the files of `released.RELEASES`, each under a `.part` name until its hash agrees with the
hub's; a broken transfer goes on where it stopped. Token, endpoint, proxies and offline mode are
huggingface_hub's. Its own `hf_hub_download` is not used: since version 2 it keeps no partial file,
and it checks sizes, not hashes. Accepts no terms for anybody, publishes nothing.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (GatedRepoError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled,
                                    RemoteEntryNotFoundError)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.logging import set_verbosity_error

from pixcell_min.base import REPOSITORY
from pixcell_min.checkpoint import file_hash, read_json, write_text
from pixcell_min.checks import OneLineParser, one_line
from pixcell_min.released import RELEASES, Release

RECORD = "download.json"  # beside the files: repository, revision, size and hash of each
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def parse_download(argv=None):
    """Command line → options. Raises: SystemExit(2) after one line for a wrong name or flag."""
    parser = OneLineParser(prog="download", description="Fetch released weights into weights/.")
    parser.add_argument("names", nargs="+", metavar="NAME",
                        help=f"one or more of {', '.join(RELEASES)}")
    parser.add_argument("--to", type=Path, default=REPOSITORY / "weights", metavar="DIR",
                        help="folder to make NAME/ in; default: the repository's weights/")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in RELEASES:
            near = get_close_matches(name.lower(), RELEASES, n=1, cutoff=0.3)
            parser.error(f"unknown name {name!r}; expected one of {', '.join(RELEASES)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    return options


def main(argv=None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after a one-line error."""
    options = parse_download(argv)
    set_verbosity_error()  # huggingface_hub's warnings of several lines; the error says it in one
    try:
        for name in options.names:
            print(f"{name}: licence: {RELEASES[name].licence}; {RELEASES[name].page}", flush=True)
            fetch(RELEASES[name], options.to / name)
            print(f"{name}: whole, in {options.to / name}")
    except (ValueError, OSError) as error:
        print(f"download: error: {one_line(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("download: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def fetch(release: Release, folder: Path) -> None:
    """Bring the files of a release into `folder`, all of one revision, and write RECORD.

    A file that is there with the hub's hash is kept, any other is fetched beside it and replaces it
    once whole. In offline mode what is there is checked against RECORD. Raises: ValueError, one
    line that says what, where and how to mend it.
    """
    revision, record = "main", {}
    for file in release.files:
        with plain_errors(release, file):
            url = hf_hub_url(release.repository, file, revision=revision)
            try:
                asked = get_hf_file_metadata(url)
            except OfflineModeIsEnabled:
                return check_offline(release, folder)
            if not asked.commit_hash or not asked.size or not re.fullmatch(
                    r"[0-9a-f]{40}|[0-9a-f]{64}", asked.etag or ""):
                raise ValueError(f"{release.repository}/{file}: the answer names no revision, size "
                                 "or hash, so no hub gave it; look at HF_ENDPOINT and proxies")
            revision = asked.commit_hash  # of the first file: the others may not be newer
            target = folder / file
            if not (target.is_file() and blob_hash(target, asked.etag) == asked.etag):
                url = hf_hub_url(release.repository, file, revision=revision)
                transfer(url, target, asked.size, asked.etag)
            record[file] = {"size": asked.size, "hash": asked.etag}
    write_text(folder / RECORD, json.dumps({
        "repository": release.repository, "revision": revision, "files": record}, indent=1) + "\n")


def transfer(url: str, target: Path, size: int, expected_hash: str) -> None:
    """Fetch `url` to a `.part` file beside `target`, from where an earlier try ended; rename.

    Raises: ValueError if the disk has no room or the hash differs, what huggingface_hub raises if
    the transfer breaks; `target` is then as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{expected_hash}.part")
    for old in target.parent.glob(f".{target.name}.*.part"):
        if old != part or old.stat().st_size > size:  # of an earlier revision, or no part of this
            old.unlink()
    with open(part, "ab") as file:
        done = file.tell()
        free = shutil.disk_usage(target.parent).free
        if free < size - done:
            raise ValueError(f"{target.parent}: {(size - done) / 1e9:.2f} GB are still to come, "
                             f"{free / 1e9:.2f} GB are free; free space or choose another --to")
        http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=size,
                 displayed_filename=target.name)
        file.flush()
        os.fsync(file.fileno())
    if (got := blob_hash(part, expected_hash)) != expected_hash:
        part.unlink()
        raise ValueError(f"{target}: wrong hash, got {got[:12]}…, the hub says "
                         f"{expected_hash[:12]}…; what came was deleted, run the command again")
    os.replace(part, target)


def blob_hash(path: Path, like: str) -> str:
    """SHA-256 of a file, or, if `like` has the 40 digits of git, git's SHA-1 of it as a blob."""
    if len(like) == 64:
        return file_hash(path)
    content = path.read_bytes()  # git keeps no large files
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_offline(release: Release, folder: Path) -> None:
    """Offline: are all files there, with the hashes of RECORD? Raises: ValueError: not so."""
    missing = [file for file in (*release.files, RECORD) if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: HF_HUB_OFFLINE is set and {', '.join(missing)} not there; "
                         "unset it, or copy the folder from a machine that has it")
    if broken := damaged(folder):
        raise ValueError(f"{folder / broken[0]}: its hash is not that of {RECORD}; unset "
                         "HF_HUB_OFFLINE and run the same command again")


def damaged(folder: Path) -> list[str]:
    """The files whose hash is not that of RECORD (which must be there). Raises: ValueError."""
    files = read_json(folder / RECORD).get("files")
    try:
        return [file for file, entry in files.items()
                if blob_hash(folder / file, entry["hash"]) != entry["hash"]]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{folder / RECORD}: not the record of a download; delete it") from None


@contextmanager
def plain_errors(release: Release, file: str):
    """What huggingface_hub and the system raise within → ValueError, one line, how to mend it."""
    what = f"{release.repository}/{file}"
    again = "the same command goes on where it stopped"
    try:
        yield
    except HfHubHTTPError as error:  # GatedRepoError and others are kinds of it
        raise ValueError(f"{what}: {refusal(release, error)}") from None
    except HTTPError as error:
        raise ValueError(f"{what}: no connection to the hub, or it broke ({error}); look at "
                         f"network, proxy and HF_ENDPOINT; {again}") from None
    except OSError as error:
        place = error.filename or what
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{place}: the disk is full; free space ({again}) or choose another "
                             "--to") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ValueError(f"{place}: cannot be written ({error.strerror}); choose another "
                             "--to") from None
        raise ValueError(f"{what}: the transfer broke ({error}); {again}") from None


def refusal(release: Release, error: HfHubHTTPError) -> str:
    """What an HTTP refusal of the hub means, and what to do."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError) and status != 401:
        return (f"gated ({status}): this account has no access yet; ask for it at {release.page}, "
                "then run the same command again")
    if status == 401:
        gate = f"ask for access at {release.page}, then " if release.gated else ""
        return f"no valid token (401): {gate}{LOGIN}"
    if status == 403:
        return f"forbidden (403): this token may not read it; look at its rights, or {LOGIN}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"no such file there (404): its authors have moved it; look at {release.page}"
    if status == 404:
        return (f"no such repository or revision there (404); look at {release.page}, "
                "and at HF_ENDPOINT if it is set")
    return f"the hub answered {status}; try again later, the same command goes on where it stopped"


if __name__ == "__main__":
    sys.exit(main())
