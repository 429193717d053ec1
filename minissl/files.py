"""Files: everything that minissl reads from others or writes for good goes through here, each way written once.

Written files appear whole or not at all; what is read is taken for damaged or hostile until it has been checked, and
whatever is wrong with it becomes one sentence (UserError).
"""

import contextlib
import csv
import gzip
import hashlib
import http.client
import io
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import torch

from minissl import UserError

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None

CHECKPOINT_FORMAT = "minissl checkpoint 2"


def progress(text, end=""):
    """One line on the terminal that renews itself; in a log only what ends it."""
    if end or sys.stderr.isatty():
        print(f"\r{text:<79}", end=end or "\r", file=sys.stderr, flush=True)


def hash_of(path, algorithm="sha256"):
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, md5, pauses=(1, 4, 16), patience=30):
    """Fetch url to path, by way of path.part, and check it before it gets its name.

    What broke off goes on where it stopped, if the server can; after each failure a longer pause (seconds). patience:
    seconds without a byte until a connection counts as broken. Raises UserError with what to put where by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for pause in (*pauses, None):
        begun = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, begun, patience)
            found = hash_of(part, "md5")
            if found == md5:
                os.replace(part, path)
                return progress(f"{path.name}: downloaded, checksum as published", end="\n")
            part.unlink()
            error = f"what came is not the published file: MD5 {found}, expected {md5}"
            if not begun:                             # whole and wrong: to ask again would not help
                pause = None
        except (OSError, http.client.HTTPException) as problem:
            error = problem
            if isinstance(problem, urllib.error.HTTPError) and problem.code < 500:
                pause = None                          # not there, not allowed
        if pause is None:
            raise UserError(f"cannot download {url} ({error}): get it in another way, put it at {path}") from None
        progress(f"{path.name}: {error}; trying again in {pause} s", end="\n")
        time.sleep(pause)


def _fetch(url, part, begun, patience):
    """Append to `part` what is missing behind its first `begun` bytes, or write it anew if the server sends all."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(request, timeout=patience)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:               # nothing is missing; the checksum decides
            return
        raise
    with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        done = begun if answer.status == 206 else 0
        size = done + int(answer.headers.get("Content-Length") or 0)
        while block := answer.read1(2**18):               # what is there, for a stall must not lose it
            done += file.write(block)
            progress(f"{part.stem}: {done / 1e6:.1f} of {size / 1e6:.1f} MB")
    if done < size:
        raise OSError(f"the connection closed after {done:,} of {size:,} bytes")


def read_archive(path, wanted, largest, url):
    """Yield (match, bytes) for each regular file of a .tar.gz whose name `wanted`, a compiled pattern, matches fully.

    In the order of the archive and without unpacking it. Raises UserError if the archive is damaged, or if such a
    file has more than `largest` bytes; url: where a whole one can be had.
    """
    try:
        # gzip checks length and checksum at the end, tarfile's own "r|gz" takes what it gets of a truncated file.
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                match = wanted.fullmatch(member.name)
                if match and member.isfile():
                    if member.size > largest:
                        raise tarfile.TarError(f"{member.name} has {member.size:,} bytes")
                    yield match, members.extractfile(member).read()
            while stream.read(2**20):
                pass                                                            # to the end, where the checksum stands
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is not a whole archive ({error}): delete it, to have {url} downloaded again") from None


_held = None


def lock(folder):
    """Keep other processes from training into the folder as long as this one lives, or until it locks another.
    (By the system's own lock, which ends with the process however that ends; without one, nothing is locked.)"""
    global _held
    if fcntl is None:
        return
    if _held:
        _held.close()
    _held = open(folder / "lock", "w", encoding="utf-8")
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training into {folder}: wait for its end, or give another --run") from None


def writable(path):
    """Is it a folder that one can write into?"""
    return path.is_dir() and os.access(path, os.W_OK)


def write_atomically(path, data):
    """To a temporary file, flushed, renamed: after a crash the path holds the old bytes or the new, never a part."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_csv(path, rows):
    """rows: dicts; the first line is their keys, and a row that lacks one has nothing there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8", "replace"))


def read_csv(path):
    """-> a list of dicts of strings, a row an entry. What is missing in a line is None, what is too much at None."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_checkpoint(path, state):
    """state: a dict of tensors, numbers, strings, lists and dicts, with its "format"; see read_checkpoint."""
    data = io.BytesIO()
    torch.save(state, data)
    write_atomically(path, data.getbuffer())


def load_checkpoint(folder):
    """The checkpoint of a run's folder; see read_checkpoint."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists() and any((path.parent / name).exists() for name in ("config.json", "lock")):
        raise UserError(f"{path.parent} was stopped before its first checkpoint: start it again, without --resume")
    return read_checkpoint(path, CHECKPOINT_FORMAT, "give the folder of a run that a script of this version made")


@contextlib.contextmanager
def taken_from(folder):
    """Around what is taken out of a folder's checkpoint: UserError if it is ours and holds something else."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{Path(folder) / 'checkpoint.pt'} does not hold what it should ({reason}): it is another "
                        f"program's or has been changed; start another run") from None


def read_checkpoint(path, format, remedy):
    """A dict of tensors, numbers, strings, lists and dicts, on the CPU, that says of itself that it has this format.

    Raises UserError where there is none, with the remedy, or it is damaged, or another program's, or another version's.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file; {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:    # torch.load does not look at the checksums: a flipped bit would pass
            if broken := archive.testzip():
                raise ValueError(f"the checksum of {broken} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:              # a damaged pickle can fail in any way: IndexError, UnicodeDecodeError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): damaged or another program's") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != format:
        raise UserError(f"{path} is of another program or version of minissl (expected: {format}); {remedy}")
    return checkpoint
