"""Downloads from a server that fails in every way, damaged files, and safe writing."""

import hashlib
import http.server
import io
import multiprocessing
import os
import re
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minissl import UserError
from minissl.training import files


DATA = bytes(range(256)) * 2000
MD5 = hashlib.md5(DATA).hexdigest()


# ---------------------------------------------------------------- downloads

@pytest.fixture
def server():
    """server(behaviour, ...) -> url. Each request meets the next behaviour, the last one
    forever; server.requests lists the byte with which each request begins."""
    running = []

    def start(*behaviours):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                behaviour = behaviours[min(len(requests), len(behaviours) - 1)]
                asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
                begin = int(asked[1]) if asked else 0
                requests.append(begin)
                if isinstance(behaviour, int):
                    self.send_error(behaviour)
                    return
                if behaviour == "all again":
                    begin = 0
                if begin >= len(DATA):
                    self.send_error(416)
                    return
                body = DATA[begin:]
                if behaviour == "other bytes":
                    body = b"x" * len(DATA)
                if behaviour == "html":
                    body = b"<html>please log in</html>"
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if behaviour == "cut":
                    body = body[:len(body) // 2]
                if behaviour == "stall":
                    self.wfile.write(body[:1000])
                    self.wfile.flush()
                    time.sleep(1.5)
                    return
                if behaviour == "slow":
                    time.sleep(0.5)
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        serve = running[-1].serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        start.requests = requests
        return f"http://127.0.0.1:{running[-1].server_port}/data.bin"

    yield start
    for one in running:
        one.shutdown()


@pytest.mark.parametrize("behaviours, requests", [
    (["good"], [0]),
    ([503, "good"], [0, 0]),
    ([429, 408, "good"], [0, 0, 0]),        # too many requests, and too slow a request
    (["cut", "good"], [0, 256_000]),
    (["cut", "cut", "good"], [0, 256_000, 384_000]),
    (["cut", "all again"], [0, 256_000]),
    (["stall", "good"], [0, 1000]),
])
def test_a_download_continues_where_it_broke(behaviours, requests, server, tmp_path):
    url, path = server(*behaviours), tmp_path / "data.bin"
    files.download(url, path, MD5, pauses=(0.01, 0.01), patience=0.5)
    assert path.read_bytes() == DATA and server.requests == requests
    assert [p.name for p in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("behaviours, sentence, requests", [
    ([404], "404", 1),
    ([503], "503", 3),
    (["html"], "the server sent another file", 1),
    (["other bytes"], "the server sent another file", 1),
    (["stall"], "timed out", 3),
])
def test_a_failed_download_says_what_to_put_where(
    behaviours, sentence, requests, server, tmp_path
):
    url, path = server(*behaviours), tmp_path / "data.bin"
    with pytest.raises(UserError) as caught:
        files.download(url, path, MD5, pauses=(0.01, 0.01), patience=0.3)
    said = str(caught.value)
    assert sentence in said and f"download {url} (" in said
    assert f"get the file in another way and save it as {path}" in said
    assert not path.exists() and len(server.requests) == requests


@pytest.mark.parametrize("left, requests", [
    (DATA[:5], [5]),
    (DATA, [len(DATA)]),
    (b"rubbish", [7, 0]),
    (DATA + b"too long", [len(DATA) + 8, 0]),
])
def test_an_earlier_part_is_used_only_if_it_is_right(left, requests, server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(left)
    files.download(server("good"), tmp_path / "data.bin", MD5, pauses=(0.01,))
    assert (tmp_path / "data.bin").read_bytes() == DATA and server.requests == requests


def test_a_download_to_a_full_disk_is_not_repeated(server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_fetch", full)
    with pytest.raises(OSError, match="No space left on device.*data.bin.part"):
        files.download("http://x", tmp_path / "data.bin", MD5, pauses=(60,))


def test_two_downloads_at_once_make_one_request(server, tmp_path, capsys):
    if files.fcntl is None:
        pytest.skip("this system has no locks")
    url, path = server("slow"), tmp_path / "data.bin"
    both = [
        threading.Thread(target=files.download, args=(url, path, MD5)) for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join(30)
    assert path.read_bytes() == DATA and server.requests == [0]
    assert "waiting for a download by another process" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["a file", "a file/below"])
def test_a_data_dir_that_cannot_be_used_is_a_sentence(folder, tmp_path):
    (tmp_path / "a file").touch()
    folder = tmp_path / folder
    with pytest.raises(UserError, match="--data-dir .*: is not a writable folder; give"):
        files.check_data_dir(folder)
    with pytest.raises(UserError, match="--data-dir .*: is not a writable folder; give"):
        files.download("http://x", folder / "data.bin", MD5, pauses=(60,))
    files.check_data_dir(tmp_path / "new" / "below")


# ---------------------------------------------------------------- archives

def test_an_archive_yields_wanted_regular_files_alone(tmp_path):
    def pack(*members):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
            for name, data, kind in members:
                member = tarfile.TarInfo(name)
                member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
                archive.addfile(member, io.BytesIO(data))
        wanted = re.compile(r"good/\d\.txt")
        found = files.read_archive(tmp_path / "a.tar.gz", wanted, 10, "url")
        return [(match[0], data) for match, data in found]

    assert pack(
        ("good/1.txt", b"one", tarfile.REGTYPE),
        ("../good/2.txt", b"out", tarfile.REGTYPE),
        ("/good/3.txt", b"root", tarfile.REGTYPE),
        ("good/4.txt", b"", tarfile.SYMTYPE),
        ("good/5.txt", b"", tarfile.LNKTYPE),
    ) == [("good/1.txt", b"one")]
    with pytest.raises(UserError, match="good/1.txt has 11 bytes"):
        pack(("good/1.txt", b"x" * 11, tarfile.REGTYPE))


@pytest.mark.parametrize("cut", [0, 10, -60, -4, -1])
def test_a_truncated_archive_is_a_sentence(cut, tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("1.txt")
        member.size = 3000
        archive.addfile(member, io.BytesIO(os.urandom(3000)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="damaged or incomplete.*delete it, so that URL is"):
        list(files.read_archive(path, re.compile("1.txt"), 5000, "URL"))


def test_a_checksum_is_of_the_whole_file(tmp_path):
    data = bytes(3 * 2**20) + b"the end"
    (tmp_path / "a").write_bytes(data)
    assert files.file_hash(tmp_path / "a", "md5") == hashlib.md5(data).hexdigest()


# ---------------------------------------------------------------- one run at a time

def test_a_second_lock_on_a_folder_is_refused(tmp_path, monkeypatch):
    files.lock(tmp_path)
    first = files._locked_file
    monkeypatch.setattr(files, "_locked_file", None)         # as in another process
    with pytest.raises(UserError, match="another process is training into"):
        files.lock(tmp_path)
    first.close()
    files.lock(tmp_path)


def test_a_file_system_without_locks_is_used(tmp_path, monkeypatch):
    if files.fcntl is None:
        pytest.skip("this system has no locks")

    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    files.lock(tmp_path)


# ---------------------------------------------------------------- writing

def full(descriptor):
    raise OSError(28, "No space left on device")


def write_bytes(path, n):
    files.write_atomically(path, bytes([n]) * 1000)


def write_npy(path, n):
    files.write_npy(path, np.full((10, 10), n))


def write_csv(path, n):
    files.write_csv(path, [dict(a=n)] * 10)


def write_checkpoint(path, n):
    files.write_checkpoint(path, dict(format="x", n=torch.full((10,), n)))


WRITERS = [write_bytes, write_npy, write_csv, write_checkpoint]


@pytest.mark.parametrize("write", WRITERS)
def test_a_write_that_fails_leaves_the_old_file_whole(write, tmp_path, monkeypatch):
    path = tmp_path / "name"
    write(path, 1)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*name'"):
        write(path, 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_has_its_name_only_when_it_is_whole(write, tmp_path, monkeypatch):
    path, seen = tmp_path / "name", []

    def look(descriptor):
        seen.append([p.name for p in tmp_path.iterdir()])

    monkeypatch.setattr(os, "fsync", look)
    write(path, 1)
    (temporary,), = seen
    assert re.fullmatch(r"name\.[0-9a-f]{16}\.tmp", temporary)
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


def test_an_array_comes_back_as_it_was_written(tmp_path):
    array = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    files.write_npy(tmp_path / "a.npy", array[:, ::-1])
    assert (np.load(tmp_path / "a.npy") == array[:, ::-1]).all()


def write_often(path, n):
    for _ in range(200):
        files.write_atomically(path, bytes([n]) * 5000)


def test_processes_that_write_one_file_do_not_collide(tmp_path):
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "fork")
    path = tmp_path / "report.html"
    writers = [context.Process(target=write_often, args=(path, n)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert path.read_bytes() in (b"\1" * 5000, b"\2" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_only_old_temporary_files_of_ours_are_removed(tmp_path):
    hour, code = 3600, "0123456789abcdef"
    ages = {
        f"a.csv.{code}.tmp": 25 * hour,               # the only one to remove
        f"a.csv.{code[::-1]}.tmp": 23 * hour,         # somebody may be writing it
        f"b.csv.{code}.tmp": 25 * hour,               # of another file
        "a.csv.tmp": 25 * hour,
        "a.csv.backup.tmp": 25 * hour,
        f"a.csv.{code}.tmp.txt": 25 * hour,
    }
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.write_csv(tmp_path / "a.csv", [dict(step=1)])
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {*ages, "a.csv"} - {f"a.csv.{code}.tmp"}


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("first_file", ["lock", "config.json"])
def test_a_run_without_checkpoint_is_told_from_no_run(first_file, tmp_path):
    with pytest.raises(UserError, match="file not found; give the folder of a run"):
        files.load_checkpoint(tmp_path)
    (tmp_path / first_file).touch()
    with pytest.raises(UserError, match="has no checkpoint yet: wait for its first one"):
        files.load_checkpoint(tmp_path)


@pytest.mark.parametrize("content, sentence", [
    (b"", "cannot be read as a checkpoint"),
    (b"rubbish", "cannot be read as a checkpoint"),
    (b"PK\x03\x04 not a zip", "cannot be read as a checkpoint"),
    ({"format": "another program's"}, "another version of minissl.*expected the format"),
    ([1, 2], "another version of minissl.*expected the format"),
])
def test_a_file_that_is_no_checkpoint_is_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"checkpoint.pt.*{sentence}.*give the folder"):
        files.load_checkpoint(tmp_path)


@pytest.mark.parametrize("first_file", ["lock", "config.json"])
def test_a_damaged_checkpoint_of_a_run_leads_out(first_file, tmp_path):
    (tmp_path / first_file).touch()
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="restore it from a copy, or start another run"):
        files.load_checkpoint(tmp_path)
    torch.save({"format": "another"}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="another version of minissl.*give the folder of a run"):
        files.load_checkpoint(tmp_path)


def test_a_file_without_permission_is_not_damaged(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    files.write_checkpoint(tmp_path / "checkpoint.pt", dict(format=files.CHECKPOINT_FORMAT))
    monkeypatch.setattr(files.zipfile, "ZipFile", refuse)
    with pytest.raises(UserError, match="checkpoint.pt: permission denied; make it readable"):
        files.load_checkpoint(tmp_path)
    monkeypatch.setattr(files.gzip, "open", refuse)
    with pytest.raises(UserError, match="a.tar.gz: permission denied; make it readable"):
        list(files.read_archive(tmp_path / "a.tar.gz", re.compile("x"), 1, "URL"))


def test_colours_in_an_error_are_left_out():
    error = RuntimeError("Weights \x1b[1mfile\x1b[0m\n" + 30 * "words ")
    shortened = files._shortened(error)
    assert shortened.startswith("Weights file words")
    assert shortened.endswith("words ...") and len(shortened) <= 100


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    state = {"format": files.CHECKPOINT_FORMAT, "model": Evil()}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        files.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_flipped_bit_in_a_checkpoint_is_seen(tmp_path):
    """torch.load does not look: one weight would be another, and nobody would know."""
    path = tmp_path / "checkpoint.pt"
    torch.save(dict(format=files.CHECKPOINT_FORMAT, model={"w": torch.ones(1000)}), path)
    good = path.read_bytes()
    begin = good.index(torch.ones(10).numpy().tobytes())
    for place in (begin, begin + 2001, begin + 3999):
        damaged = bytearray(good)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            files.load_checkpoint(tmp_path)


@pytest.mark.parametrize("error", [
    KeyError("model"), TypeError("x"), ValueError(), IndexError(), AttributeError("x"),
    RuntimeError("size\n  mismatch"),
])
def test_a_checkpoint_with_other_content_is_a_sentence(error):
    with pytest.raises(UserError, match="runs.x.checkpoint.pt does not hold what it should"):
        with files.checkpoint_errors(Path("runs/x")):
            raise error


def test_too_little_memory_is_not_blamed_on_the_checkpoint():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        with files.checkpoint_errors(Path("runs/x")):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
