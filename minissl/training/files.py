"""Files: what minissl reads from others, and what it writes to keep.

Three rules hold for everything here:

- A file is written whole or not at all. It is written under a temporary name, and gets
  its own name only when it is complete.
- A file that is read may be damaged or hostile until it has been checked. Whatever is
  wrong with it becomes one sentence (UserError).
- Several programs may run at once: temporary names are unique, and only one program at a
  time trains into a folder or downloads into it.
"""

import contextlib
import csv
import errno
import gzip
import hashlib
import http.client
import io
import os
import re
import secrets
import sys
import tarfile
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.training.errors import is_out_of_memory


try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None

CHECKPOINT_FORMAT = "minissl checkpoint 4"
DAY = 24 * 60 * 60                      # seconds


def progress(text, end=""):
    """Show the text on a line of the terminal that the next call overwrites.

    end="\\n" keeps the line. In a log file only the lines that are kept appear.
    """
    is_terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
    if end or is_terminal:
        print(f"\r{text:<79}", end=end or "\r", file=sys.stderr, flush=True)


def is_writable(path):
    """Whether the path is a folder in which files can be created."""
    return path.is_dir() and os.access(path, os.W_OK)


def nearest_existing(path):
    """The path itself if it exists, or else the nearest folder above it that does."""
    candidates = [path, *path.absolute().parents]
    return next(candidate for candidate in candidates if candidate.exists())


def check_data_dir(folder):
    """Raise UserError unless files can be created in the folder, which need not exist yet."""
    if not is_writable(nearest_existing(Path(folder))):
        raise UserError(
            f"--data-dir {folder}: is not a writable folder; give another --data-dir"
        )


def file_hash(path, algorithm="sha256"):
    """The checksum of a file's bytes, as hexadecimal digits."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        block = file.read(2**20)
        while block:
            digest.update(block)
            block = file.read(2**20)
    return digest.hexdigest()


def unreadable(path):
    """The error for a file that this user may not read. It need not be damaged."""
    return UserError(f"{path}: permission denied; make it readable")


# ---------------------------------------------------------------- downloads and archives

def download(url, path, md5, pauses=(1, 4, 16), patience=30):
    """Download url to path. The file gets this name only if its MD5 sum is right.

    A download that breaks off is continued from NAME.part, now or in a later run.
    If another process is downloading into the folder, wait for it and use its file.

    Arguments:
        pauses: seconds to wait before each further attempt
        patience: seconds without a byte until a connection counts as broken
    Raises UserError when all attempts have failed, and says which file to put where.
    Raises it also if the folder, which is that of --data-dir, is not writable.
    """
    check_data_dir(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _alone_in(path.parent, f"{path.name}: waiting for a download by another process"):
        if path.exists():
            return
        for pause in (*pauses, None):
            problem, is_final = _attempt(url, part, md5, patience)
            if problem is None:
                os.replace(part, path)
                progress(f"{path.name}: downloaded, and the checksum is right", end="\n")
                return
            if is_final or pause is None:
                raise UserError(
                    f"cannot download {url} ({problem}): "
                    f"get the file in another way and save it as {path}"
                )
            progress(f"{path.name}: {problem}; trying again in {pause} s", end="\n")
            time.sleep(pause)


@contextlib.contextmanager
def _alone_in(folder, message):
    """Run the block while no other process does so for this folder.

    The lock belongs to the open folder, so it leaves no file, and ends with the process.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(message, end="\n")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:                 # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _attempt(url, part, md5, patience):
    """Try once to complete the file `part`.

    Returns (None, False) if it is complete and right. Otherwise returns what is wrong,
    and whether another attempt would be useless.
    """
    begun = part.stat().st_size if part.exists() else 0
    try:
        _fetch(url, part, begun, patience)
    except urllib.error.HTTPError as error:
        is_final = error.code < 500 and error.code not in (408, 429)
        return error, is_final                        # not found, not allowed, and the like
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(error.errno, error.strerror, str(part)) from None
        return error, False
    checksum = file_hash(part, "md5")
    if checksum == md5:
        return None, False
    part.unlink()
    problem = f"the server sent another file: its MD5 sum is {checksum}, expected {md5}"
    # If the file began with an older part, that part may be wrong, and another attempt may help.
    return problem, begun == 0


def _fetch(url, part, begun, patience):
    """Append to `part` what follows its first `begun` bytes.

    A server that cannot continue sends everything, and `part` is written anew.
    """
    headers = {"Range": f"bytes={begun}-"} if begun else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=patience)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:
            return                      # nothing is missing, and the checksum will decide
        raise
    is_continued = answer.status == 206
    done = begun if is_continued else 0
    size = done + int(answer.headers.get("Content-Length") or 0)
    with answer, open(part, "ab" if is_continued else "wb") as file:
        # read1 returns what has arrived, so a connection that stalls loses nothing.
        block = answer.read1(2**18)
        while block:
            done += file.write(block)
            progress(f"{part.stem}: {done / 1e6:.1f} of {size / 1e6:.1f} MB")
            block = answer.read1(2**18)
    if done < size:
        raise OSError(f"the connection closed after {done:,} of {size:,} bytes")


def read_archive(path, wanted, largest, url):
    """Yield (match, bytes) for each wanted file of a .tar.gz, in the archive's order.

    Nothing is unpacked to the disk, and links are ignored.

    Arguments:
        wanted: a compiled pattern that must match the file's whole name
        largest: the number of bytes that a wanted file has at most
        url: where a good archive can be downloaded
    Raises UserError if the archive is damaged, or a wanted file is larger.
    """
    try:
        # gzip checks the length and the checksum at the end of the file. tarfile's own
        # mode "r|gz" does not notice when the end is missing.
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                match = wanted.fullmatch(member.name)
                if not match or not member.isfile():
                    continue
                if member.size > largest:
                    raise tarfile.TarError(f"{member.name} has {member.size:,} bytes")
                yield match, archive.extractfile(member).read()
            while stream.read(2**20):
                pass                    # to the end, where the checksum is
    except PermissionError:
        raise unreadable(path) from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path}: the archive is damaged or incomplete ({error}); "
            f"delete it, so that {url} is downloaded again"
        ) from None


# ---------------------------------------------------------------- one run at a time

_locked_file = None


def lock(folder):
    """Keep other processes from training into the folder until this process ends.

    The lock is the operating system's own, so it ends with the process, even with one
    that is killed. Where the system or the file system has no locks, nothing happens.
    A second call releases the first folder.

    Raises UserError if another process has locked the folder.
    """
    global _locked_file
    if fcntl is None:
        return
    if _locked_file:
        _locked_file.close()
    _locked_file = open(folder / "lock", "w", encoding="utf-8")
    try:
        fcntl.flock(_locked_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is training into {folder}: wait until it ends, or give "
            f"another --run"
        ) from None
    except OSError:                     # some network file systems have no locks
        pass


# ---------------------------------------------------------------- writing

def write_atomically(path, data):
    """Write the bytes to path so that it never holds a part of them.

    They go to a temporary file beside it, NAME.<16 random digits>.tmp, which is then
    renamed. After a crash the path holds the old bytes or the new ones. The name is
    unique, so two processes that write one path do not disturb each other.

    A process that is killed leaves its temporary file behind. The next write to the same
    path removes such files when they are older than a day: nobody is writing them.

    Raises OSError, with the path in it, if the bytes cannot be written.
    """
    path = Path(path)
    _remove_old_temporaries(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_old_temporaries(path):
    name = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):            # another process may remove them, too
        for other in path.parent.iterdir():
            if name.fullmatch(other.name) and other.stat().st_mtime < time.time() - DAY:
                other.unlink()


def write_npy(path, array):
    """Write a NumPy array as a .npy file, whole or not at all."""
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    write_atomically(path, data.getbuffer())


def write_csv(path, rows):
    """Write a list of dicts as a table. A value that a row lacks is left empty.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> write_csv(path, [dict(step=1, loss=0.5), dict(step=2, knn=60)])
    >>> path.read_text()
    'step,loss,knn\\n1,0.5,\\n2,,60\\n'
    """
    columns = {}                                  # a dict keeps the order, a set does not
    for row in rows:
        columns.update(dict.fromkeys(row))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8", "replace"))


def read_csv(path):
    """The table as a list of dicts of strings, one for each row.

    A value that is missing at the end of a row is None. Values that are too many are a
    list under the key None. The mark with which spreadsheets begin a file is skipped.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- checkpoints

def write_checkpoint(path, state):
    """Write a dict of tensors, numbers, strings, lists and dicts for `read_checkpoint`.

    state["format"] must say which format it has.
    """
    data = io.BytesIO()
    torch.save(state, data)
    write_atomically(path, data.getbuffer())


def load_checkpoint(folder):
    """The checkpoint of a run's folder; see `read_checkpoint`."""
    path = Path(folder) / "checkpoint.pt"
    is_run = any((path.parent / name).exists() for name in ("config.json", "lock"))
    if is_run and not path.exists():
        raise UserError(
            f"{path.parent} has no checkpoint yet: wait for its first one, or, if the run was "
            f"stopped, start it again without --resume"
        )
    remedy = "give the folder of a run that this version of minissl has made"
    if_damaged = remedy
    if is_run:
        if_damaged = "restore it from a copy, or start another run with another --run"
    return read_checkpoint(path, CHECKPOINT_FORMAT, remedy, if_damaged)


def read_checkpoint(path, format, remedy, if_damaged=None):
    """A dict of tensors, numbers, strings, lists and dicts, on the CPU.

    Code in the file is not run, and every checksum is compared.

    Raises UserError if there is no such file, or it is damaged, or its "format" is not
    the expected one. remedy: the end of these sentences, what the user can do.
    if_damaged: the same for a damaged file, if that differs.
    """
    if not path.exists():
        raise UserError(f"{path}: file not found; {remedy}")
    try:
        # torch.load does not compare the checksums: a flipped bit would go unnoticed.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise unreadable(path) from None
    except Exception as error:          # a damaged file can raise nearly anything
        raise UserError(
            f"{path} cannot be read as a checkpoint ({_shortened(error)}): "
            f"it is damaged, or another program wrote it; {if_damaged or remedy}"
        ) from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != format:
        raise UserError(
            f"{path} was written by another program or another version of minissl "
            f"(expected the format {format!r}); {remedy}"
        )
    return checkpoint


@contextlib.contextmanager
def checkpoint_errors(folder):
    """Around code that takes a checkpoint apart: errors in its content become UserError.

    A lack of memory says nothing about the content.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        path = Path(folder) / "checkpoint.pt"
        raise UserError(
            f"{path} does not hold what it should ({_shortened(error)}): it was changed, "
            f"or another version of minissl wrote it; restore it from a copy, or train "
            f"another run"
        ) from None


def _shortened(error):
    """The beginning of an error's message, or its type if there is no message."""
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    short = textwrap.shorten(without_colours, 100, placeholder=" ...")
    return short or type(error).__name__
