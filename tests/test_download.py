"""Released weights from a hub on loopback: what is fetched, resumed, and what refusals say."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_ENCODER, write_base
from hub import Hub
from huggingface_hub import constants

from pixcell_min.base import find_base, load_pixcell_base
from pixcell_min.checkpoint import file_hash, read_tensors
from pixcell_min.released import RELEASES
from pixcell_min.tools import download

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PIXCELL, VAE, UNI = (RELEASES[name] for name in ("pixcell-256", "sd3-vae", "uni2-h"))


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """Small files in the layouts of the four repositories."""
    folder = write_base(tmp_path_factory.mktemp("released") / "base")
    tensors, _ = read_tensors(folder / "uni" / "model.safetensors")
    torch.save(tensors, folder / "uni" / "pytorch_model.bin")
    (folder / "uni" / "config.json").write_text(json.dumps(
        {"architecture": "vit_giant_patch14_224", "model_args": TINY_ENCODER}))
    return folder


@pytest.fixture
def hub(released, monkeypatch, tmp_path, nothing_downloaded):
    """A stand-in that holds all repositories, as huggingface_hub's endpoint; no token, no cache."""
    server = Hub()
    for name in ("pixcell-256", "pixcell-1024"):
        server.add(RELEASES[name].repository, released, PIXCELL.files)
    server.add(VAE.repository, released, VAE.files)
    server.add(UNI.repository, released / "uni", UNI.files)
    for repository in (PIXCELL.repository, VAE.repository, UNI.repository):  # what nobody asked for
        server.files[repository, "model_index.json"] = b"{}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PIXCELL_BASE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def refused(capsys, *arguments):
    """Exit code 2 and one line on stderr: that line."""
    try:
        code = download.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("download: error: ") and error.count("\n") == 1, error
    return error


def fetch(*names, to):
    assert download.main([*names, "--to", str(to)]) == 0


def transfers(hub):
    """[(file, Range)] of what was sent, without the questions before."""
    return [(name.split("@")[0], wanted) for method, name, wanted in hub.asked
            if method == "GET" and not name.startswith(tuple(
                release.repository + "/" + file for release in RELEASES.values()
                for file in release.files if file.endswith((".safetensors", ".bin"))))]


# The good path

@pytest.mark.parametrize("base", ["pixcell-256", "pixcell-1024"])
def test_three_downloads_make_a_base_that_loads(base, hub, released, tmp_path, capsys):
    weights = tmp_path / "weights"
    fetch(base, "sd3-vae", "uni2-h", to=weights)
    found = {path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert found == {f"{name}/{file}" for name in (base, "sd3-vae", "uni2-h")
                     for file in (*RELEASES[name].files, download.RECORD)}
    assert not any("PixCell" in name and RELEASES[base].repository not in name
                   for _, name, _ in hub.asked)
    pipeline, source = load_pixcell_base(weights / base), load_pixcell_base(released)
    for ours, theirs in ((pipeline.transformer, source.transformer), (pipeline.vae, source.vae),
                         (pipeline.encoder, source.encoder)):
        assert all(torch.equal(tensor, theirs.state_dict()[key])
                   for key, tensor in ours.state_dict().items())
    image = pipeline(torch.zeros(1, 1, 16), num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    printed = capsys.readouterr().out
    assert all(RELEASES[name].licence in printed for name in (base, "sd3-vae", "uni2-h"))


def test_all_files_are_of_the_revision_of_the_first(hub, tmp_path):
    fetch("pixcell-256", to=tmp_path)
    revisions = [name.split("@")[1] for method, name, _ in hub.asked if method == "HEAD"]
    assert revisions[0] == "main" and set(revisions[1:]) == {hub.commit}
    record = json.loads((tmp_path / "pixcell-256" / download.RECORD).read_text())
    assert record["revision"] == hub.commit and record["repository"] == PIXCELL.repository
    file = tmp_path / "pixcell-256" / WEIGHTS
    assert record["files"][WEIGHTS] == {"size": file.stat().st_size, "hash": file_hash(file)}


def test_a_second_call_transfers_nothing_and_mends_what_is_damaged(hub, tmp_path):
    fetch("pixcell-256", to=tmp_path)
    hub.asked.clear()
    fetch("pixcell-256", to=tmp_path)
    assert transfers(hub) == []
    file = tmp_path / "pixcell-256" / WEIGHTS
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fetch("pixcell-256", to=tmp_path)
    assert file.read_bytes() == good and transfers(hub) == [(WEIGHTS, None)]


def test_the_token_is_sent(hub, tmp_path, monkeypatch, capsys):
    hub.token = "hf_test"
    text = refused(capsys, "uni2-h", "--to", tmp_path)
    assert "no valid token (401)" in text and UNI.page in text and "HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    fetch("uni2-h", to=tmp_path)
    assert hub.leaked == []  # the store of large files is another host
    assert "hf_test" not in "".join(
        path.read_text() for path in tmp_path.rglob("*.json")) + capsys.readouterr().out


# Broken, spoiled, refused

def test_a_broken_transfer_goes_on_where_it_stopped(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what came of a chunk is lost
    content = hub.files[PIXCELL.repository, WEIGHTS]
    half = len(content) // 2048 * 1024
    hub.cut[WEIGHTS] = half
    text = refused(capsys, "pixcell-256", "--to", tmp_path)
    assert WEIGHTS in text and "the same command goes on where it stopped" in text
    assert logging.getLogger("huggingface_hub").level == logging.ERROR  # its own warnings are long
    folder = tmp_path / "pixcell-256" / "transformer"
    assert not (folder / "diffusion_pytorch_model.safetensors").exists()
    part, = folder.glob(".*.part")
    assert part.read_bytes() == content[:half]
    hub.cut.clear()
    hub.asked.clear()
    fetch("pixcell-256", to=tmp_path)
    assert transfers(hub) == [(WEIGHTS, f"bytes={half}-")]
    assert (tmp_path / "pixcell-256" / WEIGHTS).read_bytes() == content
    assert not list(folder.glob(".*.part"))


def test_parts_of_another_revision_and_too_long_ones_are_thrown_away(hub, tmp_path):
    content = hub.files[PIXCELL.repository, WEIGHTS]
    folder = tmp_path / "pixcell-256" / "transformer"
    folder.mkdir(parents=True)
    name = "diffusion_pytorch_model.safetensors"
    (folder / f".{name}.{'0' * 64}.part").write_bytes(b"old")
    (folder / f".{name}.{hashlib.sha256(content).hexdigest()}.part").write_bytes(content + b"more")
    fetch("pixcell-256", to=tmp_path)
    assert (folder / name).read_bytes() == content and not list(folder.glob(".*.part"))


def test_a_wrong_hash_leaves_nothing(hub, tmp_path, capsys):
    for file in (WEIGHTS, "vae/config.json"):  # SHA-256 of LFS, SHA-1 of git
        hub.spoil = {file}
        text = refused(capsys, "pixcell-256", "--to", tmp_path)
        assert f"{tmp_path / 'pixcell-256' / file}: wrong hash" in text
        assert not (tmp_path / "pixcell-256" / file).exists()
        assert not list(tmp_path.rglob("*.part"))
        shutil.rmtree(tmp_path / "pixcell-256")


def test_a_file_that_is_there_stays_when_its_replacement_fails(hub, tmp_path, capsys):
    file = tmp_path / "pixcell-256" / WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    hub.spoil = {WEIGHTS}
    refused(capsys, "pixcell-256", "--to", tmp_path)
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize("status, code, words", [
    (401, "GatedRepo", ["no valid token (401)", "ask for access at", UNI.page, "hf auth login"]),
    (403, "GatedRepo", ["gated (403)", f"ask for it at {UNI.page}"]),
    (403, "", ["forbidden (403)", "HF_TOKEN"]),
    (404, "RepoNotFound", ["no such repository or revision there (404)", UNI.page]),
    (404, "EntryNotFound", ["no such file there (404)", "config.json"]),
    (500, "", ["the hub answered 500", "try again later"]),
])
def test_refusals(hub, tmp_path, capsys, status, code, words):
    hub.refuse[UNI.repository] = (status, code)
    text = refused(capsys, "uni2-h", "--to", tmp_path)
    assert all(word in text for word in words), text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nobody_answers(hub, tmp_path, capsys):
    hub.shutdown()
    hub.server_close()
    text = refused(capsys, "uni2-h", "--to", tmp_path)
    assert "no connection to the hub" in text and "proxy" in text


def test_an_answer_that_is_no_hubs(hub, tmp_path, capsys, monkeypatch):
    hub.commit = ""
    assert "no hub gave it" in refused(capsys, "uni2-h", "--to", tmp_path)


def test_no_room(hub, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    text = refused(capsys, "pixcell-256", "--to", tmp_path)
    assert "GB are still to come" in text and "--to" in text


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written (Read-only file system)"),
    (errno.EACCES, "cannot be written (Permission denied)"), (errno.EIO, "the transfer broke")])
def test_a_disk_that_refuses(hub, tmp_path, capsys, monkeypatch, number, words):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(download, "http_get", refuse)
    assert words in refused(capsys, "pixcell-256", "--to", tmp_path)


def test_an_interrupted_call_keeps_what_came(hub, tmp_path, capsys, monkeypatch):
    def interrupted(url, file, **options):
        file.write(b"{")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(download, "http_get", interrupted)
        assert download.main(["pixcell-256", "--to", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = PIXCELL.files[0]
    assert not (tmp_path / "pixcell-256" / first).exists()
    hub.asked.clear()
    fetch("pixcell-256", to=tmp_path)
    assert transfers(hub)[0] == (f"{PIXCELL.repository}/{first}", "bytes=1-")


def test_a_folder_that_cannot_be_written(hub, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    text = refused(capsys, "uni2-h", "--to", tmp_path / "file")
    assert "cannot be written" in text and "choose another --to" in text


def test_unknown_names(capsys):
    text = refused(capsys, "pixcel-256")
    assert "unknown name 'pixcel-256'" in text and "did you mean pixcell-256?" in text
    assert "sd3-vae" in refused(capsys, "zzz") and "NAME" in refused(capsys)


# Without a network

def test_offline(hub, tmp_path, capsys, monkeypatch):
    fetch("uni2-h", to=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    fetch("uni2-h", to=tmp_path)
    file = tmp_path / "uni2-h" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes() + b" ")
    assert "its hash is not that of download.json" in refused(capsys, "uni2-h", "--to", tmp_path)
    file.unlink()
    text = refused(capsys, "uni2-h", "--to", tmp_path)
    assert "HF_HUB_OFFLINE is set and pytorch_model.bin not there" in text
    assert not hub.asked


def test_the_command_itself_with_endpoint_and_token_of_the_environment(hub, tmp_path):
    hub.token = "hf_test"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_test",
                   "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "pixcell_min.tools.download", "sd3-vae", "--to", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, = VAE.files
    assert (tmp_path / "sd3-vae" / file).read_bytes() == hub.files[VAE.repository, file]


# The hub's own cache

def cache(folder, repository, source, files):
    """Lay files out as huggingface_hub's cache does."""
    home = folder / f"models--{repository.replace('/', '--')}"
    for file in files:
        target = home / "snapshots" / "abc123" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, target)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    return home


def test_a_base_in_the_hub_cache(hub, released, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    home = cache(folder, PIXCELL.repository, released, PIXCELL.files)
    cache(folder, VAE.repository, released, VAE.files)
    cache(folder, UNI.repository, released / "uni", UNI.files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    for path in (PIXCELL.repository, home, home / "snapshots" / "abc123"):
        assert find_base(path) == home / "snapshots" / "abc123"
    pipeline = load_pixcell_base(PIXCELL.repository)
    assert pipeline.encoder.embedding_dim == 16 and pipeline.vae.downscale == 8
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    pipeline = load_pixcell_base(home)  # the cache in which it lies is the one that counts
    assert pipeline.encoder.embedding_dim == 16 and pipeline.vae.downscale == 8
    assert not hub.asked


@pytest.mark.parametrize("path", ["StonyBrook-CVLab/PixCell-256", "weights/pixcell-256",
                                  "some/models--StonyBrook-CVLab--PixCell-256"])
def test_nothing_is_fetched_by_itself(hub, path):
    with pytest.raises(ValueError) as error:
        load_pixcell_base(path)
    assert str(error.value).endswith("run python -m pixcell_min.tools.download pixcell-256")
    assert not hub.asked


def test_what_is_missing_names_its_command(hub, tmp_path):
    fetch("pixcell-256", to=tmp_path)
    pipeline = load_pixcell_base(tmp_path / "pixcell-256")
    for part, name in (("vae", "sd3-vae"), ("encoder", "uni2-h")):
        with pytest.raises(ValueError, match=f"run python -m pixcell_min.tools.download {name}"):
            getattr(pipeline, part)
