"""Where texts come from: the docstrings of this machine's Python, the IMDb reviews, or the reader's own files.

Each source is a key that changes when its content does, and a stream of documents, (text, label name or None, split or
None), that reads nothing before it is asked. `load_texts` encodes them once and keeps the tokens beside the data.
"""

import ast
import hashlib
import importlib.util
import math
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from minissl import UserError
from minissl.datasets import (CACHE_FORMAT, HELD_OUT, SAMPLE_BYTES, TEST, TRAIN, encode_documents, evenly, read_cache,
                              split_blocks, texts_of)
from minissl.files import download, hash_of, progress, read_archive

TEXT_BYTES = 2**20        # a longer paragraph or line of a file is read as several texts


def load_texts(data, data_dir="data", vocabulary_size=8192, limit=0, tokenizer=None, keep_all=False):
    """Texts by name ("pydocs", "imdb") or from a .txt file or a folder of them.

    Arguments: data, the name or path; data_dir, where archives and caches lie; vocabulary_size, of the tokenizer
    that is trained on the texts outside the test set, unless `tokenizer` is given; limit, keep about this many
    texts of each split, evenly spaced (0: all); keep_all, all texts of a path, doubled ones, too, files by their sorted
    paths (of them `limit` takes the first), without labels, for features: needs `tokenizer`.
    Returns Texts. Raises UserError with one sentence for anything the user can mend.
    """
    if data == "pydocs":
        key, documents = _pydocs_files()
    elif data == "imdb":
        key, documents = _imdb(Path(data_dir))
    else:
        key, documents = _own_texts(Path(data), keep_all)
        if keep_all:
            return texts_of([text for text, *_ in documents][:limit or None], tokenizer)
    for settings in (str(vocabulary_size), tokenizer.to_json() if tokenizer else ""):
        name = hashlib.sha256(f"{CACHE_FORMAT} {key} {settings}".encode()).hexdigest()[:16]
        cache = Path(data_dir) / "cache" / f"{Path(data).stem}-{name}"
        texts = read_cache(cache)
        if tokenizer is None or texts and texts.tokenizer.merges == tokenizer.merges:
            break                                    # else the data may be here, but encoded with another tokenizer
    if not texts:
        encode_documents(documents, cache, vocabulary_size, tokenizer)
        texts = read_cache(cache)
        if not texts:                                # it was there, another user's perhaps, and still is as it was
            raise UserError(f"{cache} can neither be read nor replaced: delete it, or give another --data-dir")
    if limit:
        index = [np.flatnonzero(texts.split == s) for s in (TRAIN, HELD_OUT, TEST)]
        index = [where[evenly(len(where), limit)] for where in index]
        texts = texts.select(np.sort(np.concatenate(index)))
    return texts


# ---------------------------------------------------------------- pydocs: the docstrings of the running Python

def _pydocs_files():
    stdlib, files = Path(sysconfig.get_paths()["stdlib"]), []
    packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]    # does not import
    for root, above in [(stdlib, stdlib), *((package, package.parent) for package in packages)]:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(above).with_suffix("").parts
            if not {"site-packages", "test", "tests", "lib2to3", "_vendor"} & set(parts):
                files.append((path, parts))
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in files]
    return listing, _read_pydocs(files)


def _read_pydocs(files):
    """(docstring, package, split) for every docstring of the files. The package ("asyncio", "torch.nn") is the
    label where it has at least 200 docstrings in at least 8 files. Whole files go to the test set, in the order
    of their hashes, until it has a fifth of their package's docstrings, then to the held-out set for a tenth. Each
    part of a labelled package's name, and numpy, np and torch, is replaced by "package" in every text: a docstring
    of torch.nn that says "nn" would give its label away."""
    found = defaultdict(dict)                                                   # package -> file -> its docstrings
    for n, (path, parts) in enumerate(files):
        if n % 100 == 0:
            progress(f"docstrings: {n:,} of {len(files):,} files")
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")      # what is odd in other people's sources is not our reader's news
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        label = ".".join(parts[:2] if parts[0] in ("numpy", "torch") else parts[:1])
        texts = [ast.get_docstring(node) for node in ast.walk(tree)
                 if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        if any(texts):
            found[label]["/".join(parts)] = [text for text in texts if text]
    size = {label: sum(map(len, files.values())) for label, files in found.items()}
    classes = {label for label, files in found.items() if size[label] >= 200 and len(files) >= 8}
    names = {name for label in classes for name in label.split(".")} | {"numpy", "np", "torch"}
    give_away = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, names)))})\b", re.IGNORECASE)
    for label, files in found.items():
        done = 0
        for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
            share = done / size[label] if label in classes else 1               # of this package, dealt out so far
            split = TEST if share < 0.2 else HELD_OUT if share < 0.3 else TRAIN
            done += len(files[name])
            for text in files[name]:
                yield give_away.sub("package", text), label if label in classes else None, split


# ---------------------------------------------------------------- imdb: 100,000 film reviews (Maas et al. 2011)

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
IMDB_NAME = re.compile(r"aclImdb/(train|test)/(pos|neg|unsup)/(\d+)_\d+\.txt")


def _imdb(data_dir):
    archive = data_dir / "aclImdb_v1.tar.gz"
    if not archive.exists():
        download(IMDB_URL, archive, IMDB_MD5)
    return hash_of(archive), _read_imdb(archive)


def _read_imdb(archive):
    """(review, "pos" | "neg" | None, split), straight from the archive: unpacking 100,000 small files takes longer
    than training. The last tenth of each training class, by number, is held out."""
    reviews = []
    for match, data in read_archive(archive, IMDB_NAME, TEXT_BYTES, IMDB_URL):
        text = data.decode("utf-8", "replace").replace("<br />", " ")
        reviews.append((match[1], match[2], int(match[3]), text))
        if len(reviews) % 2000 == 0:
            progress(f"imdb: {len(reviews):,} reviews read")
    sizes = Counter((part, name) for part, name, _, _ in reviews)
    if any(not sizes[part, name] for part in ("train", "test") for name in ("pos", "neg")):
        raise UserError(f"{archive} does not hold the IMDb reviews: expected aclImdb/train/pos/0_9.txt and the like")
    reviews.sort(key=lambda review: review[:3])
    rank = Counter()
    for part, name, _, text in reviews:
        rank[part, name] += 1
        late = rank[part, name] > 0.9 * sizes[part, name]
        split = TEST if part == "test" else HELD_OUT if late and name != "unsup" else TRAIN
        yield text, None if name == "unsup" else name, split


# ---------------------------------------------------------------- the reader's own files

def _own_texts(path, whole=False):
    """-> key, documents; whole: a file of a folder is one text, however long."""
    if not path.exists():
        raise UserError(f"--data {path}: there is nothing there; give pydocs, imdb, a .txt file or a folder of them")
    if path.is_file():
        if path.suffix != ".txt":
            raise UserError(f"--data {path}: a text file must end in .txt")
        if path.stat().st_size == 0:
            raise UserError(f"--data {path}: the file is empty")
        least = 2048 if path.stat().st_size > SAMPLE_BYTES else 0      # millions of lines are no millions of documents
        return f"{least} {_digest([path], path.parent)}", ((text, None, None) for text in read_texts(path, least))
    files, passed_over = [], Counter()
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            passed_over["hidden"] += file.is_file()
        elif file.is_dir():                           # a link's files are not listed here
            passed_over["links to folders"] += file.is_symlink()
            passed_over["empty folders"] += not any(file.iterdir())
        elif file.suffix != ".txt":
            passed_over["not .txt"] += 1
        elif _blank(file):
            passed_over["empty"] += 1
        else:
            files.append(file)
    if any(passed_over.values()):
        print("passed over: " + ", ".join(f"{n} {what}" for what, n in passed_over.items() if n), file=sys.stderr)
    if not files:
        raise UserError(f"--data {path}: no .txt file with anything in it")
    inside = [file.relative_to(path).parts for file in files]
    names = [parts[0] if len(parts) > 1 else None for parts in inside]          # the sub-folder is the class
    number = {name: n for n, name in enumerate(sorted({*names} - {None}))}
    split = split_blocks(np.array([number.get(name, -1) for name in names]))
    return _digest(files, path), ((text, name, part) for file, name, part in zip(files, names, split)
                                  for text in read_texts(file, least=math.inf if whole else 4 * TEXT_BYTES))


def _blank(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return not any(block.strip() for block in iter(lambda: file.read(2**16), ""))


def read_texts(path, least=0):
    """The texts of one UTF-8 file: its paragraphs, or its lines where no blank line separates paragraphs.

    Yields str, none longer than about the larger of TEXT_BYTES and `least`, however long the lines; with `least`
    neighbours are joined to at least so many characters. Raises UserError with the offset of bytes that are not UTF-8.
    """
    with open(path, "rb") as file:
        start = file.read(TEXT_BYTES)
    by_paragraph = re.search(rb"\n[ \t\r]*\n[ \t\r]*\S", start) is not None
    if start[:2] == b"\x1f\x8b":
        raise UserError(f"{path} is a gzip archive, not a text: unpack it first (gunzip)")
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        paragraph, size, line = [], 0, None
        while line != "":
            try:
                line = file.readline(TEXT_BYTES)
            except UnicodeDecodeError as error:       # in error.object, the bytes that were read last
                place = file.buffer.tell() - len(error.object) + error.start
                guess = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
                raise UserError(f"{path} is not UTF-8: byte {place} cannot be decoded; convert it from its own "
                                f"encoding, such as {guess}, first (iconv -f {guess} -t utf-8)") from None
            paragraph.append(line)
            size += len(line)
            if not line or size > max(TEXT_BYTES, least) or size >= least and not (by_paragraph and line.strip()):
                whole, paragraph, size = "".join(paragraph), [], 0
                if whole.strip():
                    yield whole


def _digest(files, root):
    """A hash of the files' names below root and of their contents."""
    lines = "\n".join(f"{os.path.relpath(path, root)} {hash_of(path)}" for path in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
