"""Kill it, and feed it damaged files, many times, and count what happens.

    python tests/soak.py                                 30 kills a script, 2,000 files a kind
    python tests/soak.py --kills 2 --damage 50           a few minutes
    python tests/soak.py --kills 3 --damage 100 --plant torn-save
                                                         with a defect that must be found

**Kills.** Each training script runs once undisturbed. Then it runs again, is killed by SIGKILL
at random moments, and is resumed each time, until it ends. The last checkpoint must be equal bit
for bit, and metrics.csv must be the same but for what the clock says.

**Damage.** Files of each kind are truncated, flipped in some bits, overwritten with their own
parts, or written with a crafted mistake. Then the function that the scripts use reads them,
under a limit of memory. The outcomes:

    refused     one sentence (UserError)
    harmless    what was read is what the undamaged file holds, or a cache was made anew. An
                array of pixels has no checksum, so another array of uint8 is harmless too
    wrong       anything else: another exception, another result, more than 20 seconds

Wrong must be 0. The seed is printed. The exit code is 1 if anything was wrong.
"""

import argparse
import contextlib
import csv
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from minissl import UserError  # noqa: E402
from minissl.data import batches, images, text_sources, texts  # noqa: E402
from minissl.evaluation import load  # noqa: E402
from minissl.tokenizer import Tokenizer, normalise  # noqa: E402
from minissl.training import files, report  # noqa: E402


TINY = ["--device", "cpu", "--precision", "float32", "--save-every", "0.1"]
IMAGES = ["--limit", "300", "--steps", "150", "--batch-size", "32", "--width", "8",
          "--evaluate-every", "50"]
TEXTS = ["--steps", "300", "--embedding-steps", "100", "--batch-size", "8", "--window", "32",
         "--width", "64", "--heads", "2", "--layers", "1", "--vocabulary-size", "400",
         "--pairs", "100", "--evaluate-every", "100"]
VOCABULARY_SIZE = 400


def write_texts(folder):
    """Write two sub-folders of 100 texts of 60 invented words each."""
    draw = random.Random(0)
    words = []
    for begin in ("sa", "to", "mi", "ka", "re"):
        for end in ("lin", "dor", "ver", "nos"):
            words.append(begin + end)
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for n in range(100):
            text = " ".join(draw.choices(words, k=60))
            (folder / name / f"{n:03}.txt").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- kills

# Run a script with a defect in it. The arguments: two folders to import from, the defect, the
# script and its flags.
RUN_WITH_DEFECT = """
import runpy
import sys

sys.path[:0] = sys.argv[1:3]
import soak

soak.plant(sys.argv[3])
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script_command(script, run, flags, defect):
    """The command that starts a script into the folder `run`; defect as in `plant`, or ""."""
    command = [sys.executable]
    if defect:
        command += ["-c", RUN_WITH_DEFECT, str(ROOT / "tests"), str(ROOT), defect]
    return [*command, str(ROOT / script), "--run", str(run), *flags, *TINY]


def kills(folder, count, draw, defect=""):
    """Kill each script `count` times.

    folder: has texts/ and receives the runs; draw: a random.Random; defect as in `plant`.
    Returns a Counter: (script, "equal") and (script, "wrong") runs, and (script, "kills").
    """
    on_texts = ["--data", str(folder / "texts"), "--data-dir", str(folder), *TEXTS]
    scripts = {
        "train_contrastive.py": ["--method", "byol", *IMAGES],
        "train_ae.py": ["--masked", "0.5", *IMAGES],
        "train_mlm.py": on_texts,
    }
    outcomes = Counter()
    for script, flags in scripts.items():
        whole = folder / script / "whole"
        start = time.time()
        command = script_command(script, whole, flags, defect)
        subprocess.run(command, check=True, capture_output=True)
        length = time.time() - start
        attempt = 0
        while outcomes[script, "kills"] < count:
            run = folder / script / f"killed {attempt}"
            attempt += 1
            left = count - outcomes[script, "kills"]
            killed, code, printed = run_with_kills(script, run, flags, defect, left, length, draw)
            outcomes[script, "kills"] += killed
            if code == 0 and same_run(run, whole):
                outcomes[script, "equal"] += 1
            else:
                outcomes[script, "wrong"] += 1
                print(f"WRONG: {run}\n{printed}")
    return outcomes


def run_with_kills(script, run, flags, defect, most, length, draw):
    """Start a run, kill it at most `most` times, and resume it until it ends.

    length: the seconds of an undisturbed run.
    Returns the number of kills, the exit code, and what the last process printed.
    """
    killed = 0
    while True:
        resume = []
        if (run / "checkpoint.pt").exists():
            resume = ["--resume"]
        process = subprocess.Popen(
            script_command(script, run, [*flags, *resume], defect),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )
        seconds = None
        if killed < most:
            seconds = draw.uniform(0.3, 1) * length
        try:
            printed, _ = process.communicate(timeout=seconds)
            return killed, process.returncode, printed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1


def same_run(a, b):
    """Whether two runs have ended with the same weights, optimizers and log."""
    one, other = files.load_checkpoint(a), files.load_checkpoint(b)
    return (
        log_of(a) == log_of(b)
        and equal(one["model"], other["model"])
        and equal(one["optimizers"], other["optimizers"])
    )


def log_of(folder):
    """The rows of metrics.csv without what the clock says."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["rate_per_second"]
    return rows


def equal(a, b):
    """Whether two values are equal bit for bit: tensors, and dicts and lists of them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a is b or a == b


# ---------------------------------------------------------------- damage

def damaged(data, draw):
    """The bytes, damaged in one of the ways in which files break."""
    data = bytearray(data)
    kind = draw.choice(["cut", "flip", "splice", "zeros", "insert"])
    place = draw.randrange(len(data))
    if kind == "cut":
        return bytes(data[:place])
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 1, 8, 100])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    size = draw.choice([1, 8, 100, 4096])
    if kind == "splice":
        other = draw.randrange(len(data))
        part = data[other:other + size]
    elif kind == "zeros":
        part = bytes(size)
    else:
        part = draw.randbytes(min(size, 100))
    end = place if kind == "insert" else place + len(part)
    data[place:end] = part
    return bytes(data)


@dataclass
class Kind:
    """A kind of file that is damaged."""
    path: Path              # of a good one
    read: Callable          # () -> what must stay the same, or None if nothing must
    crafted: list           # bytes that somebody could have written on purpose


def kinds_of_files(folder):
    """{name: Kind}. folder: has texts/, and whole runs of train_ae.py and train_mlm.py."""
    ae = folder / "train_ae.py" / "whole"
    mlm = folder / "train_mlm.py" / "whole"
    text_folder, cache_folder = str(folder / "texts"), folder / "caches"
    text_sources.load_texts(text_folder, cache_folder, VOCABULARY_SIZE)
    cache = next((cache_folder / "cache").iterdir())
    archive = write_archive(folder / "imdb" / "aclImdb_v1.tar.gz")
    array = write_array(folder / "a.npy")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(files.load_checkpoint(mlm)["tokenizer"], encoding="utf-8")

    def read_checkpoint():
        model, checkpoint = load.load_run(ae)
        return model.state_dict(), checkpoint["settings"], checkpoint["optimizers"]

    def read_texts():
        loaded = text_sources.load_texts(text_folder, cache_folder, VOCABULARY_SIZE)
        tokens = [loaded[i].tolist() for i in range(len(loaded))]
        split, labels = loaded.split.tolist(), loaded.labels.tolist()
        return tokens, labels, split, loaded.tokenizer.to_json()

    def read_archive():
        return list(text_sources.read_imdb(archive))

    def read_array():
        read = images.own_images(array, keep_all=True)
        assert read[:].dtype == torch.uint8 and read[:].shape[1] in (1, 3)

    def check_tokenizer():
        check_round_trip(tokenizer)

    def write_page_of_images():
        report.write_page(ae)

    def write_page_of_texts():
        report.write_page(mlm)

    deep = b"[" * 100_000
    strange_config = dict(
        command="\ud800", started=1, python=2, torch=3, settings=dict(data="\ud800")
    )
    return {
        "checkpoint": Kind(ae / "checkpoint.pt", read_checkpoint, [
            b"", b"PK\x03\x04", b"\x80\x02}q\x00.",
        ]),
        "tokenizer": Kind(tokenizer, check_tokenizer, [
            b"", b"{}", b"[]", b"null", b'{"merges": [[9, 9]]}', deep,
        ]),
        "cache tokens": Kind(cache / "tokens.bin", read_texts, [b""]),
        "cache index": Kind(cache / "index.npz", read_texts, [b"", b"PK\x05\x06" + bytes(18)]),
        "archive": Kind(archive, read_archive, [b"", b"\x1f\x8b"]),
        "npy": Kind(array, read_array, [
            b"",
            npy_header("(99999999999999, 9, 9)"),
            npy_header("(-1, 9, 9)"),
            npy_header("(2, 9"),
            npy_header("(40, 9, 9)", "|O"),
        ]),
        "config": Kind(ae / "config.json", write_page_of_images, [
            b"", b"{}", b"[]", b'{"settings": 3}', deep, b"\xff\xfe",
            json.dumps(strange_config).encode(),
        ]),
        "log": Kind(ae / "metrics.csv", write_page_of_images, [
            b"", b"step\n", b"step,seconds\n1,nan\n2,inf\n", b"step,a\n1,1e400\n2,-1e400\n",
        ]),
        "sentences": Kind(mlm / "sentences.json", write_page_of_texts, [
            b"", b"{}", b"[]", b"[[1, 2, 3]]", b'[["a", [1], [2]]]',
        ]),
    }


def write_archive(path):
    """Write an archive like that of the IMDb reviews, with twelve texts of each class."""
    path.parent.mkdir(exist_ok=True)
    parts = ["train/pos", "train/neg", "train/unsup", "test/pos", "test/neg"]
    with tarfile.open(path, "w:gz") as tar:
        for part in parts:
            for n in range(12):
                text = f"{part.replace('/', ' ')} {n} some words".encode()
                member = tarfile.TarInfo(f"aclImdb/{part}/{n}_1.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
    return path


def write_array(path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 11, 3))
    np.save(path, pixels.astype(np.uint8))
    return path


def npy_header(shape, dtype="|u1"):
    """The bytes of a .npy file whose header says this shape and dtype."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    size = len(header).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + size + header + bytes(4000)


def check_round_trip(path):
    """A damaged tokenizer that is still one must give back every text.

    (Inside a run's folder, a checksum protects it.)
    """
    try:
        tokenizer = Tokenizer.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:         # as documented; where it is used it becomes a sentence
        raise UserError(str(error)) from None
    for text in ("salin dorver", "", "Ünïcode \x00 [MASK]"):
        decoded = tokenizer.decode(tokenizer.encode(text).tolist())
        wanted, got = normalise(text).split(), decoded.split()
        assert got == wanted, (got, wanted)


class TooLong(BaseException):
    """Not an Exception, so that no code that is tested catches it."""


def raise_too_long(number, frame):
    raise TooLong("more than 20 seconds")


def damage(folder, count, draw, only=None):
    """Damage `count` files of each kind, and read them.

    folder as for kinds_of_files; draw: a random.Random; only: the kinds, if not all.
    Returns a Counter of (kind, outcome).
    """
    signal.signal(signal.SIGALRM, raise_too_long)
    outcomes = Counter()
    for name, kind in kinds_of_files(folder).items():
        if only and name not in only:
            continue
        good, expected = kind.path.read_bytes(), kind.read()
        for n in range(count):
            if n < len(kind.crafted):
                kind.path.write_bytes(kind.crafted[n])
            else:
                kind.path.write_bytes(damaged(good, draw))
            outcome, reason = read_damaged(kind, expected)
            outcomes[name, outcome] += 1
            if outcome == "wrong":
                kept = folder / f"wrong {name} {n}"
                if kind.path.exists():
                    kept.write_bytes(kind.path.read_bytes())
                print(f"WRONG: {name}, number {n}: {reason}; kept as {kept}")
        kind.path.parent.mkdir(exist_ok=True)
        kind.path.write_bytes(good)
    return outcomes


def read_damaged(kind, expected):
    """The outcome of reading a damaged file, and the reason if it is wrong."""
    signal.alarm(20)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            read = kind.read()
    except UserError:
        return "refused", ""
    except (Exception, SystemExit, TooLong) as error:
        return "wrong", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    if expected is not None and not equal(read, expected):
        return "wrong", "another result"
    return "harmless", ""


# ---------------------------------------------------------------- planted defects

DEFECTS = ["trust-cache", "trust-checkpoint", "no-sentence", "torn-save", "forget-optimizer",
           "running-stream"]


def recorded_hash(path, algorithm="sha256"):
    """The checksum that the index of a cache has for tokens.bin, instead of the real one."""
    if path.name != "tokens.bin":
        return files.file_hash(path, algorithm)
    with np.load(path.with_name("index.npz")) as index:
        return json.loads(bytes(index["meta"]))["sha256"]


def find_no_damage(archive):
    """Instead of ZipFile.testzip."""
    return None


def write_in_two_halves(path, data):
    """Instead of write_atomically: into the file itself, with a pause in the middle."""
    data = bytes(data)
    half = len(data) // 2
    with open(path, "wb") as file:
        file.write(data[:half])
        file.flush()
        time.sleep(0.02)
        file.write(data[half:])


def load_no_state(optimizer, state):
    """Instead of Optimizer.load_state_dict."""


def plant(defect, patch=setattr):
    """Put a defect into minissl. patch(object, name, value) sets an attribute."""
    if defect == "trust-cache":
        patch(texts, "file_hash", recorded_hash)
    elif defect == "trust-checkpoint":
        patch(files.zipfile.ZipFile, "testzip", find_no_damage)
    elif defect == "no-sentence":
        patch(files, "UserError", ValueError)
    elif defect == "torn-save":
        patch(files, "write_atomically", write_in_two_halves)
    elif defect == "forget-optimizer":
        patch(torch.optim.Optimizer, "load_state_dict", load_no_state)
    elif defect == "running-stream":    # each draw follows the one before, whatever the step
        stream = torch.Generator().manual_seed(0)

        def generator(seed, purpose, step):
            return stream
        patch(batches, "generator", generator)
    elif defect:
        raise SystemExit(f"--plant {defect}: there is no such defect; "
                         f"there are {', '.join(DEFECTS)}")


# ---------------------------------------------------------------- all of it

def print_table(outcomes):
    names = ["kills", "equal", "refused", "harmless", "wrong"]
    print(" " * 22 + "".join(f"{name:>10}" for name in names))
    rows = dict.fromkeys(row for row, _ in outcomes)          # each once, in their order
    for row in rows:
        cells = [outcomes[row, name] or "" for name in names]
        print(f"{row:<22}" + "".join(f"{cell:>10}" for cell in cells))


def main(options):
    print(f"seed {options.seed}")
    limit = 16 * 2**30                  # bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak "))
    write_texts(folder / "texts")
    begin = time.time()
    outcomes = kills(folder, options.kills, draw, options.plant)
    plant(options.plant)
    outcomes += damage(folder, options.damage, draw)
    print_table(outcomes)
    wrong = sum(count for (_, outcome), count in outcomes.items() if outcome == "wrong")
    print(f"wrong: {wrong}; {time.time() - begin:,.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="of each script")
    parser.add_argument("--damage", type=int, default=2000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--plant", default="", help=f"one of: {', '.join(DEFECTS)}")
    sys.exit(main(parser.parse_args()))
