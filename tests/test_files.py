"""Downloads from a server of our own that breaks in every way, and archives that are not what they say."""

import hashlib
import http.server
import io
import re
import tarfile
import threading
import time

import pytest

from minissl import UserError, files

DATA = bytes(range(256)) * 2000
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture
def server():
    """server(behaviour, ...) -> url; each request meets the next behaviour, the last one for ever."""
    running = []

    def start(*behaviours):
        class Handler(http.server.BaseHTTPRequestHandler):
            requests = []

            def do_GET(self):
                behaviour = behaviours[min(len(self.requests), len(behaviours) - 1)]
                begin = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
                self.requests.append(begin)
                if isinstance(behaviour, int):
                    return self.send_error(behaviour)
                begin = begin if behaviour != "all again" else 0
                if begin >= len(DATA):
                    return self.send_error(416)
                body = {"other bytes": b"x" * len(DATA),
                        "html": b"<html>please log in</html>"}.get(behaviour, DATA[begin:])
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
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass
        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.01,), daemon=True).start()
        start.requests = Handler.requests
        return f"http://127.0.0.1:{running[-1].server_port}/data.bin"

    yield start
    for one in running:
        one.shutdown()


@pytest.mark.parametrize("behaviours, requests", [
    (["good"], [0]), ([503, "good"], [0, 0]), (["cut", "good"], [0, 256_000]),
    (["cut", "cut", "good"], [0, 256_000, 384_000]), (["cut", "all again"], [0, 256_000]),
    (["stall", "good"], [0, 1000])])
def test_a_download_goes_on_where_it_broke(behaviours, requests, server, tmp_path):
    url = server(*behaviours)
    files.download(url, tmp_path / "data.bin", MD5, pauses=(0.01, 0.01), patience=0.5)
    assert (tmp_path / "data.bin").read_bytes() == DATA and server.requests == requests
    assert not (tmp_path / "data.bin.part").exists()


@pytest.mark.parametrize("behaviours, sentence, requests", [
    ([404], "404", 1), ([503], "503", 3), (["html"], "not the published file", 1),
    (["other bytes"], "not the published file", 1), (["stall"], "timed out", 3)])
def test_a_download_that_fails_says_what_to_put_where_and_leaves_no_file_of_that_name(behaviours, sentence, requests,
                                                                                      server, tmp_path):
    url = server(*behaviours)
    with pytest.raises(UserError) as caught:
        files.download(url, tmp_path / "data.bin", MD5, pauses=(0.01, 0.01), patience=0.3)
    assert sentence in str(caught.value) and f"download {url} (" in str(caught.value)
    assert f"get it in another way, put it at {tmp_path / 'data.bin'}" in str(caught.value)
    assert not (tmp_path / "data.bin").exists() and len(server.requests) == requests


@pytest.mark.parametrize("left, requests", [
    (DATA[:5], [5]), (DATA, [len(DATA)]), (b"rubbish", [7, 0]), (DATA + b"too long", [len(DATA) + 8, 0])])
def test_what_an_earlier_download_left_is_used_if_it_is_right_and_thrown_away_if_not(left, requests, server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(left)
    files.download(server("good"), tmp_path / "data.bin", MD5, pauses=(0.01,))
    assert (tmp_path / "data.bin").read_bytes() == DATA and server.requests == requests


def test_an_archive_yields_wanted_regular_files_only_and_none_that_is_too_large(tmp_path):
    def pack(*members):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
            for name, data, kind in members:
                member = tarfile.TarInfo(name)
                member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
                archive.addfile(member, io.BytesIO(data))
        found = files.read_archive(tmp_path / "a.tar.gz", re.compile(r"good/\d\.txt"), 10, "url")
        return [(match[0], data) for match, data in found]

    assert pack(("good/1.txt", b"one", tarfile.REGTYPE), ("../good/2.txt", b"out", tarfile.REGTYPE),
                ("/good/3.txt", b"root", tarfile.REGTYPE), ("good/4.txt", b"", tarfile.SYMTYPE),
                ("good/5.txt", b"", tarfile.LNKTYPE)) == [("good/1.txt", b"one")]
    with pytest.raises(UserError, match="good/1.txt has 11 bytes"):
        pack(("good/1.txt", b"x" * 11, tarfile.REGTYPE))


def test_a_checksum_is_of_the_whole_file(tmp_path):
    data = bytes(3 * 2**20) + b"the end"
    (tmp_path / "a").write_bytes(data)
    assert files.hash_of(tmp_path / "a", "md5") == hashlib.md5(data).hexdigest()


def test_a_second_lock_on_a_folder_is_refused(tmp_path, monkeypatch):
    files.lock(tmp_path)
    monkeypatch.setattr(files, "_held", None)    # as in another process; the patch keeps the first lock's file open
    with pytest.raises(UserError, match="another process is training into"):
        files.lock(tmp_path)


@pytest.mark.parametrize("first_file", ["lock", "config.json"])
def test_a_run_that_has_no_checkpoint_yet_is_told_from_a_folder_that_is_no_run(first_file, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        files.load_checkpoint(tmp_path)
    (tmp_path / first_file).touch()
    with pytest.raises(UserError, match="stopped before its first checkpoint"):
        files.load_checkpoint(tmp_path)
