"""Kill it, and feed it damaged files, many times; count what happens.

    python tests/soak.py                                        30 kills a script, 2,000 damaged files a kind
    python tests/soak.py --kills 2 --damage 50                  a few minutes
    python tests/soak.py --kills 3 --damage 100 --plant torn-save            with a defect planted: it must be found

Kills: each training script runs once undisturbed; then again with SIGKILL at random moments and --resume after each,
until it ends. The last checkpoint must be equal bit for bit, and metrics.csv the same, but for what the clock says.

Damage: files of each kind are truncated, flipped in some bits, spliced from their own parts, or written with a crafted
mistake, and then read by the function that the scripts use, under a limit of memory. Outcomes:

    refused     one sentence (UserError)
    harmless    what was read is what the undamaged file holds, or a cache was made anew, or, for an array of pixels,
                which carries no checksum, another array of uint8
    wrong       anything else: another exception, another result, more than 20 seconds

Wrong must be 0. The seed is printed, and the exit code is 1 if anything was wrong.
"""

import argparse
import contextlib
import csv
import io
import json
import pickle
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from minissl import UserError, datasets, documents, files, images, report, runs, training
from minissl.tokenizer import Tokenizer

TINY = "--device cpu --precision float32 --save-every 0.1".split()
IMAGES = "--limit 300 --steps 150 --batch-size 32 --width 8 --evaluate-every 50".split()
SCRIPTS = {"train_contrastive.py": ["--method", "byol", *IMAGES], "train_ae.py": ["--masked", "0.5", *IMAGES],
           "train_mlm.py": ("--steps 300 --embedding-steps 100 --batch-size 8 --window 32 --width 64 --heads 2 "
                            "--layers 1 --vocabulary-size 400 --pairs 100 --evaluate-every 100").split()}


def write_texts(folder):
    draw = random.Random(0)
    words = [a + b for a in ("sa", "to", "mi", "ka", "re") for b in ("lin", "dor", "ver", "nos")]
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for n in range(100):
            (folder / name / f"{n:03}.txt").write_text(" ".join(draw.choices(words, k=60)), encoding="utf-8")


# ---------------------------------------------------------------- kills

def kills(folder, count, draw, planted=""):
    """-> Counter of how many runs ended equal, how many wrong, and the kills that met a running training."""
    planting = (f"import runpy, sys; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]}; import soak; "
                f"soak.plant({planted!r}); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    python = [sys.executable, "-c", planting] if planted else [sys.executable]
    outcomes = Counter()
    for script, flags in SCRIPTS.items():
        flags = [*flags, *TINY] + (["--data", str(folder / "texts"), "--data-dir", str(folder)]
                                   if "mlm" in script else [])
        start = time.time()
        subprocess.run([*python, ROOT / script, "--run", folder / script / "whole", *flags], check=True,
                       capture_output=True)
        length = time.time() - start
        done, attempt = 0, 0
        while done < count:
            run = folder / script / f"killed {attempt}"
            attempt += 1
            while True:
                resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
                process = subprocess.Popen([*python, ROOT / script, "--run", run, *flags, *resume],
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
                try:
                    printed = process.communicate(timeout=draw.uniform(0.3, 1) * length if done < count else None)[0]
                    break                                              # it came to its end
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    done += 1
            same = process.returncode == 0 and same_run(run, folder / script / "whole")
            outcomes[script, "equal" if same else "wrong"] += 1
            if not same:
                print(f"WRONG: {run}\n{printed}")
        outcomes[script, "kills"] = done
    return outcomes


def same_run(a, b):
    one, other = (files.load_checkpoint(run) for run in (a, b))
    return (log_of(a) == log_of(b) and equal(one["model"], other["model"])
            and equal(one["optimizers"], other["optimizers"]))


def log_of(folder):
    """The rows of metrics.csv without what the clock says."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "rate_per_second", "share_of_peak")}
                for row in csv.DictReader(file)]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b or a is b


# ---------------------------------------------------------------- damage

def damaged(data, draw):
    """One of the ways in which files break."""
    data, kind = bytearray(data), draw.choice(["cut", "flip", "splice", "zeros", "insert"])
    place = draw.randrange(len(data))
    if kind == "cut":
        return bytes(data[:place])
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 1, 8, 100])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        size = draw.choice([1, 8, 100, 4096])
        other = draw.randrange(len(data))
        part = {"splice": data[other:other + size], "zeros": bytes(size),
                "insert": bytes(draw.randrange(256) for _ in range(min(size, 100)))}[kind]
        data[place:place + (0 if kind == "insert" else len(part))] = part
    return bytes(data)


def readers(folder):
    """{kind: (a good file's path, read() -> what to compare, crafted bytes)}; folder: texts/ and two finished runs."""
    ae, mlm = folder / "train_ae.py" / "whole", folder / "train_mlm.py" / "whole"
    archive = folder / "imdb" / "aclImdb_v1.tar.gz"
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for part, label in (("train", "pos"), ("train", "neg"), ("train", "unsup"), ("test", "pos"), ("test", "neg")):
            for n in range(12):
                member, text = (tarfile.TarInfo(f"aclImdb/{part}/{label}/{n}_1.txt"),
                                f"{part} {label} {n} some words".encode())
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
    np.save(folder / "a.npy", np.random.default_rng(0).integers(0, 256, (40, 9, 11, 3)).astype(np.uint8))
    documents.load_texts(str(folder / "texts"), folder / "caches", 400)
    cache = next((folder / "caches" / "cache").iterdir())
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(files.load_checkpoint(mlm)["tokenizer"], encoding="utf-8")

    def texts(data, data_dir):
        t = documents.load_texts(data, data_dir, 400)
        return [t[i].tolist() for i in range(len(t))], t.labels.tolist(), t.split.tolist(), t.tokenizer.to_json()

    def archive_texts():
        found = list(documents._read_imdb(archive))
        return found

    def pixels():
        found = images.own_images(folder / "a.npy", keep_all=True)
        assert found[:].dtype == torch.uint8 and found[:].shape[1] in (1, 3)
        return None    # pixels carry no checksum: any are as good

    def pickled():
        try:
            pixels, labels = images.read_cifar_pickle((folder / "data_batch_1").read_bytes())
        except ValueError as error:                        # as documented; where it is used it becomes the sentence
            raise UserError(str(error)) from None
        assert pixels.dtype == np.uint8 and labels.shape == pixels.shape[:1] and not (folder / "ran").exists()
        return None

    def page():
        report.write_page(ae)
        return None

    def state(run):
        model, checkpoint = runs.load_run(run)
        return model.state_dict(), checkpoint["settings"], checkpoint["optimizers"]

    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))

    def batch(data):
        return pickle.dumps({b"data": data, b"labels": [1] * 20, b"filenames": [b"a.png"] * 20}, protocol=2)
    (folder / "data_batch_1").write_bytes(batch(np.random.default_rng(0).integers(0, 256, (20, 3072)).astype(np.uint8)))

    return {"checkpoint": (ae / "checkpoint.pt", lambda: state(ae), [b"", b"PK\x03\x04", b"\x80\x02}q\x00."]),
            "tokenizer": (tokenizer, lambda: check_tokenizer(tokenizer),
                          [b"", b"{}", b"[]", b"null", b'{"merges": [[9, 9]]}', b"[" * 100_000]),
            "cache tokens": (cache / "tokens.bin", lambda: texts(str(folder / "texts"), folder / "caches"), [b""]),
            "cache index": (cache / "index.npz", lambda: texts(str(folder / "texts"), folder / "caches"),
                            [b"", b"PK\x05\x06" + bytes(18)]),
            "archive": (archive, archive_texts, [b"", b"\x1f\x8b"]),
            "npy": (folder / "a.npy", pixels, [b"", npy_header("(99999999999999, 9, 9)"), npy_header("(-1, 9, 9)"),
                                               npy_header("(2, 9"), npy_header("(40, 9, 9)", "|O")]),
            "pickle": (folder / "data_batch_1", pickled,
                       [b"", batch(Evil()), batch(np.array([Evil()], object)), batch([1])]),
            "config": (ae / "config.json", page, [
                b"", b"{}", b"[]", b'{"settings": 3}', b"[" * 100_000, b"\xff\xfe",
                b'{"command": "\\ud800", "started": 1, "python": 2, "torch": 3, "settings": {"data": "\\ud800"}}']),
            "log": (ae / "metrics.csv", page, [b"", b"step\n", b"step,seconds\n1,nan\n2,inf\n",
                                               b"step,a\n1,1e400\n2,-1e400\n"]),
            "sentences": (mlm / "sentences.json", lambda: report.write_page(mlm),
                          [b"", b"{}", b"[]", b"[[1, 2, 3]]", b'[["a", [1], [2]]]'])}


def check_tokenizer(path):
    """A damaged tokenizer that is still one must still give back every text. (Inside a run a checksum guards it.)"""
    try:
        tokenizer = Tokenizer.from_json(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:                        # as documented; where it is used it becomes the sentence
        raise UserError(str(error)) from None
    for text in ("salin dorver", "", "Ünïcode \x00 [MASK]"):
        plain = datasets_text(tokenizer, text)
        assert plain == datasets_text(None, text), (plain, text)
    return None


def datasets_text(tokenizer, text):
    return (" ".join(text.lower().split()) if tokenizer is None
            else " ".join(tokenizer.decode(tokenizer.encode(text).tolist()).split()))


def npy_header(shape, kind="|u1"):
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4000)


class TooLong(Exception):
    pass


def damage(folder, count, draw, only=None):
    """-> Counter of (kind, outcome). only: the kinds, if not all."""
    def alarm(*_):
        raise TooLong("more than 20 seconds")
    signal.signal(signal.SIGALRM, alarm)
    outcomes = Counter()
    for kind, (path, read, crafted) in readers(folder).items():
        if only and kind not in only:
            continue
        good, expected = path.read_bytes(), read()
        for n in range(count):
            path.write_bytes(crafted[n] if n < len(crafted) else damaged(good, draw))
            signal.alarm(20)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    found = read()
                outcome = "harmless" if expected is None or equal(found, expected) else "wrong"
                reason = "another result"
            except UserError:
                outcome = "refused"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome, reason = "wrong", f"{type(error).__name__}: {str(error)[:200]}"
            signal.alarm(0)
            outcomes[kind, outcome] += 1
            if outcome == "wrong":
                kept = folder / f"wrong {kind} {n}"
                kept.write_bytes(path.read_bytes() if path.exists() else b"")
                print(f"WRONG: {kind}, number {n}: {reason}; kept as {kept}")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(good)
    return outcomes


# ---------------------------------------------------------------- planted defects

def plant(defect, patch=setattr):
    """Make minissl wrong in one place."""
    if defect == "trust-cache":                        # read as it lies, whatever its checksum
        patch(datasets, "hash_of", lambda path, algorithm="sha256": (
            json.loads(bytes(np.load(Path(path).with_name("index.npz"))["meta"]))["sha256"]
            if Path(path).name == "tokens.bin" else files.hash_of(path, algorithm)))
    elif defect == "trust-checkpoint":                 # as torch.load does
        patch(files.zipfile.ZipFile, "testzip", lambda archive: None)
    elif defect == "no-sentence":                      # whatever torch says of a damaged file comes through
        patch(files, "UserError", ValueError)
    elif defect == "trust-pickle":                     # anything may be called
        def read(data):
            batch = pickle.loads(data, encoding="bytes")
            return batch[b"data"], np.array(batch[b"labels"])
        patch(images, "read_cifar_pickle", read)
    elif defect == "torn-save":                        # in place, half and half
        def write(path, data):
            data = bytes(data)
            with open(path, "wb") as file:
                file.write(data[:len(data) // 2])
                file.flush()
                time.sleep(0.02)
                file.write(data[len(data) // 2:])
        patch(files, "write_atomically", write)
    elif defect == "forget-optimizer":                 # weights and step alone go on
        patch(torch.optim.Optimizer, "load_state_dict", lambda self, state: None)
    elif defect == "running-stream":                   # draws follow one another instead of the step
        stream = torch.Generator().manual_seed(0)
        patch(training, "generator", lambda seed, purpose, step: stream)
    elif defect:
        raise SystemExit(f"--plant {defect}: {', '.join(DEFECTS)}")


DEFECTS = "trust-cache trust-checkpoint no-sentence trust-pickle torn-save forget-optimizer running-stream".split()


def main(o):
    print(f"seed {o.seed}")
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    draw, outcomes = random.Random(o.seed), Counter()
    folder = Path(tempfile.mkdtemp(prefix="soak "))
    write_texts(folder / "texts")
    begin = time.time()
    outcomes += kills(folder, o.kills, draw, o.plant)
    plant(o.plant)
    outcomes += damage(folder, o.damage, draw)
    names = ["kills", "equal", "refused", "harmless", "wrong"]
    print(f"{'':<22}" + "".join(f"{name:>10}" for name in names))
    for row in dict.fromkeys(row for row, _ in outcomes):
        print(f"{row:<22}" + "".join(f"{outcomes[row, name] or '':>10}" for name in names))
    wrong = sum(n for (_, name), n in outcomes.items() if name == "wrong")
    print(f"wrong: {wrong}; {time.time() - begin:,.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--damage", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--plant", default="", help=" or ".join(DEFECTS))
    sys.exit(main(parser.parse_args()))
