"""Where texts come from: the docstrings of this Python, the IMDb reviews, or your own files.

Each source is a Source: a key that changes when the content does, and a stream of documents
that reads nothing before it is asked. `load_texts` encodes the documents once and keeps their
tokens in a cache; see texts.py.
"""

import ast
import codecs
import hashlib
import importlib.util
import math
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from minissl import UserError
from minissl.data.splits import (
    HELD_OUT,
    TEST,
    TRAIN,
    limit_splits,
    split_blocks,
)
from minissl.data.texts import (
    CACHE_FORMAT,
    Source,
    encode_documents,
    encode_texts,
    read_cache,
    remove_left_overs,
)
from minissl.training.files import (
    check_data_dir,
    download,
    file_hash,
    progress,
    read_archive,
    unreadable,
)
from minissl.training.wording import count_of, list_names


BLOCK_BYTES = 2**20       # a file is read in blocks of this size
LONGEST_TEXT = 2**20      # characters; a longer paragraph or line is read as several texts
LONGEST_FILE = 2**22      # characters; a longer file of a folder is read as several texts
LARGEST_REVIEW = 2**20    # bytes; a larger one in the archive of IMDb is damage

# In a single file above LARGE_FILE bytes, neighbouring lines or paragraphs are joined to texts of
# at least SHORTEST_JOINED characters: millions of lines are not millions of documents.
LARGE_FILE = 2**28
SHORTEST_JOINED = 2048

# Each sub-folder is a class, unless it has one of these names. Such a sub-folder is probably a
# part of the split, as in the unpacked IMDb archive.
NOT_CLASSES = {
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
    "unsup", "unlabeled", "unlabelled",
}


def load_texts(data, data_dir="data", vocabulary_size=8192, limit=0, tokenizer=None):
    """Return Texts by name ("pydocs", "imdb") or from a .txt file or a folder of them.

    Arguments:
    data             the name or the path
    data_dir         the folder of archives and caches
    vocabulary_size  of the tokenizer that is trained, without the test texts
    limit            keep at most this many texts of each split, evenly spaced (0: all)
    tokenizer        use this one instead of training one
    Raises UserError with one sentence for anything that the user can mend.
    """
    if data == "pydocs":
        source = pydocs_source()
    elif data == "imdb":
        source = imdb_source(Path(data_dir))
    else:
        source = path_source(Path(data))
    texts = load_cached(source, Path(data).stem, Path(data_dir), vocabulary_size, tokenizer)
    if limit:
        texts = texts.select(np.sort(limit_splits(texts.split, limit)))
    return texts


def load_all_texts(path, tokenizer, limit=0):
    """Return all texts of a .txt file or a folder, for features: no split, no labels, no cache.

    Duplicates stay. The texts have the order of the file, or of the sorted paths. limit: the first
    so many (0: all).
    """
    source = path_source(Path(path), whole_files=True)
    strings = (text for text, _, _ in source.documents)
    texts = encode_texts(islice(strings, limit or None), tokenizer)
    texts.notes += source.describe(len(texts))
    return texts


def load_cached(source, stem, data_dir, vocabulary_size, tokenizer):
    """Return the Texts of a source from the cache; encode them first if they are not there."""
    remove_left_overs(data_dir / "cache")
    cache = cache_path(source, stem, data_dir, str(vocabulary_size))
    texts = read_cache(cache)
    if tokenizer and not (texts and texts.tokenizer.merges == tokenizer.merges):
        # The data may be here, but encoded with another tokenizer.
        cache = cache_path(source, stem, data_dir, tokenizer.to_json())
        texts = read_cache(cache)
    if texts:
        return texts
    check_data_dir(data_dir)
    encode_documents(source, cache, vocabulary_size, tokenizer)
    texts = read_cache(cache)
    if not texts:                   # it is another user's, perhaps, and still damaged
        raise UserError(
            f"{cache} can neither be read nor replaced: delete it, or give another --data-dir"
        )
    return texts


def cache_path(source, stem, data_dir, settings):
    """Return the folder of a cache, with a hash of all that the tokens depend on in its name."""
    key = f"{CACHE_FORMAT} {source.key} {settings}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return data_dir / "cache" / f"{stem[:40]}-{name}"


# ---------------------------------------------------------------- pydocs

def pydocs_source():
    """Return the Source of the docstrings of the standard library, numpy and torch."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    roots = [(stdlib, stdlib)]          # (folder to search, folder from which the names begin)
    for name in ("numpy", "torch"):
        package = Path(importlib.util.find_spec(name).origin).parent     # this does not import it
        roots.append((package, package.parent))

    not_ours = {"site-packages", "test", "tests", "lib2to3", "_vendor"}
    files = []
    for folder, above in roots:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(above).with_suffix("").parts
            if not not_ours & set(parts):
                files.append((path, parts))
    key = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in files]
    return Source(key, read_pydocs(files))


def read_pydocs(files):
    """Yield (docstring, package or None, split) for every docstring of the files.

    Arguments: files, a list of (path, parts of the module's name).

    The package ("asyncio", "torch.nn") is the label if it has at least 200 docstrings in at
    least 8 files. The files of such a package are dealt out whole, in the order of the hashes of
    their names. A file goes to the test set while those before it hold less than a fifth of the
    docstrings, to the held-out set while they hold less than three tenths, and else to training.

    A docstring of torch.nn that says "nn" would give its label away. So each part of a labelled
    package's name, and numpy, np and torch, is replaced by "package" in every text.
    """
    docstrings = defaultdict(dict)                   # package -> file -> its docstrings
    for n, (path, parts) in enumerate(files):
        if n % 100 == 0:
            progress(f"docstrings: {n:,} of {len(files):,} files")
        depth = 2 if parts[0] in ("numpy", "torch") else 1
        package = ".".join(parts[:depth])
        texts = docstrings_of_file(path)
        if texts:
            docstrings[package]["/".join(parts)] = texts

    sizes = {}                                       # package -> how many docstrings
    for package, by_file in docstrings.items():
        sizes[package] = sum(len(texts) for texts in by_file.values())
    classes = {
        package for package, by_file in docstrings.items()
        if sizes[package] >= 200 and len(by_file) >= 8
    }
    names = {"numpy", "np", "torch"}
    for package in classes:
        names.update(package.split("."))
    any_name = "|".join(sorted(map(re.escape, names)))
    give_away = re.compile(rf"\b(?:{any_name})\b", re.IGNORECASE)

    for package, by_file in docstrings.items():
        label = package if package in classes else None
        done = 0
        for name in sorted(by_file, key=hash_of_name):
            share = done / sizes[package]            # of this package, dealt out so far
            if label is None:
                split = TRAIN
            elif share < 0.2:
                split = TEST
            elif share < 0.3:
                split = HELD_OUT
            else:
                split = TRAIN
            done += len(by_file[name])
            for text in by_file[name]:
                yield give_away.sub("package", text), label, split


def docstrings_of_file(path):
    """Return the docstrings of a Python file; none if it is not this Python's language."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # what is odd in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    texts = [ast.get_docstring(node) for node in nodes]
    return [text for text in texts if text]


def hash_of_name(name):
    return hashlib.sha256(name.encode()).digest()


# ---------------------------------------------------------------- imdb

# 100,000 film reviews: Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis".
IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
IMDB_NAME = re.compile(r"aclImdb/(train|test)/(pos|neg|unsup)/(\d+)_\d+\.txt")


def imdb_source(data_dir):
    """Return the Source of the IMDb reviews, whose archive is downloaded if it is not there."""
    archive = data_dir / "aclImdb_v1.tar.gz"
    if not archive.exists():
        download(IMDB_URL, archive, IMDB_MD5)
    return Source(file_hash(archive), read_imdb(archive))


def read_imdb(archive):
    """Yield (review, "pos" | "neg" | None, split) for each review.

    The archive is read as it is, so no 100,000 small files are written. The last tenth of each
    training class, by number, is held out.
    """
    reviews = []
    for match, data in read_archive(archive, IMDB_NAME, LARGEST_REVIEW, IMDB_URL):
        text = data.decode("utf-8", "replace").replace("<br />", " ")
        part, name, number = match[1], match[2], int(match[3])
        reviews.append((part, name, number, text))
        if len(reviews) % 2000 == 0:
            progress(f"imdb: {len(reviews):,} reviews read")

    sizes = Counter((part, name) for part, name, _, _ in reviews)
    for labelled in (("train", "pos"), ("train", "neg"), ("test", "pos"), ("test", "neg")):
        if not sizes[labelled]:
            raise UserError(
                f"{archive} does not hold the IMDb reviews: expected aclImdb/train/pos/0_9.txt "
                f"and the like; delete it, and it is downloaded again"
            )

    reviews.sort(key=part_name_and_number)
    seen = Counter()
    for part, name, _, text in reviews:
        seen[part, name] += 1
        in_last_tenth = seen[part, name] > 0.9 * sizes[part, name]
        if part == "test":
            split = TEST
        elif in_last_tenth and name != "unsup":
            split = HELD_OUT
        else:
            split = TRAIN
        label = None if name == "unsup" else name
        yield text, label, split


def part_name_and_number(review):
    return review[:3]


# ---------------------------------------------------------------- Your own files

def path_source(path, whole_files=False):
    """Return the Source of a .txt file or of a folder of them.

    A file of a folder is one text, or several if it is longer than LONGEST_FILE; with whole_files
    it is one text however long it is. A single file is cut into texts by read_texts.
    """
    try:
        if path.is_file():
            return file_source(path)
        if path.exists():
            return folder_source(path, whole_files)
    except PermissionError as error:
        raise unreadable(error.filename) from None
    raise UserError(
        f"{path}: file not found; --data takes pydocs, imdb, a .txt file or a folder of them"
    )


def file_source(path):
    if path.suffix.lower() != ".txt":
        raise UserError(
            f"{path}: expected a name that ends in .txt; if the file is plain text, rename it"
        )
    if is_blank(path):
        raise UserError(
            f"{path}: the file is empty or holds only white space; give one with some text"
        )
    kind = "paragraph" if has_paragraphs(path) else "line"
    least, unit = 0, f"one a {kind}"
    if path.stat().st_size > LARGE_FILE:
        least = SHORTEST_JOINED
        unit = f"neighbouring {kind}s joined to at least {least:,} characters"
    key = f"{least} {hash_of_files([path], path.parent)}"
    documents = ((text, None, None) for text in read_texts(path, least))
    return Source(key, documents, path.name, unit)


def folder_source(folder, whole_files):
    files = text_files(folder)
    names = []                                       # of the outermost sub-folder, the class
    for file in files:
        parts = file.relative_to(folder).parts
        names.append(parts[0] if len(parts) > 1 else None)
    classes = sorted(set(names) - {None})
    label_of = {name: label for label, name in enumerate(classes)}
    label_of[None] = -1
    labels = np.array([label_of[name] for name in names])
    notes = []
    if not whole_files:                              # else there are no labels
        check_class_names(folder, classes)
        if classes:
            notes.append(f"classes: {list_names(classes)}")
    least = math.inf if whole_files else LONGEST_FILE
    documents = read_files(files, names, split_blocks(labels), least)
    is_cut = any(file.stat().st_size > least for file in files)
    unit = "one a file"
    if is_cut:
        unit = f"from {count_of(len(files), 'file')}"
    name = f"folder {folder.resolve().name}"
    return Source(hash_of_files(files, folder), documents, name, unit, notes)


def check_class_names(folder, classes):
    """Raise UserError if sub-folders are named like splits, as in the unpacked IMDb archive."""
    suspicious = [name for name in classes if name.lower() in NOT_CLASSES]
    if suspicious:
        raise UserError(
            f"{folder}: each sub-folder must be a class, but found {list_names(suspicious)}; "
            f"give a folder whose sub-folders are classes"
        )


def text_files(folder):
    """Return the .txt files of a folder in sorted order; print what was passed over."""
    files, passed_over = [], Counter()
    os.listdir(folder)              # raises PermissionError, where rglob would list nothing
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden:
            if path.is_file():
                passed_over["hidden"] += 1
        elif path.is_dir():
            if path.is_symlink():                    # rglob does not list the files of a link
                passed_over["link to a folder"] += 1
            if not any(path.iterdir()):
                passed_over["empty folder"] += 1
        elif path.suffix.lower() != ".txt":
            passed_over["not .txt"] += 1
        elif is_blank(path):
            passed_over["empty"] += 1
        else:
            files.append(path)
    if passed_over:
        plurals = {"link to a folder": "links to folders", "empty folder": "empty folders"}
        kinds = []
        for kind, count in passed_over.items():
            kinds.append(count_of(count, kind, plurals.get(kind, kind)))
        print(f"passed over: {', '.join(kinds)}", file=sys.stderr)
    if not files:
        raise UserError(
            f"{folder}: expected .txt files with text in them, found none; give another folder"
        )
    return files


def is_blank(path):
    """True if a file has nothing but white space in it."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for block in iter(partial(file.read, 2**16), ""):
            if block.strip():
                return False
    return True


def hash_of_files(files, root):
    """Return a hash of the files' names below root and of their contents."""
    lines = [f"{os.path.relpath(path, root)} {file_hash(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def read_files(files, names, split, least):
    """Yield (text, name, split) for the files of a folder."""
    for file, name, part in zip(files, names, split):
        for text in read_texts(file, least):
            yield text, name, part


# ---------------------------------------------------------------- One file

def read_texts(path, least=0):
    """Yield the texts of a UTF-8 file: its paragraphs if it has any, otherwise its lines.

    Arguments: path; least, join neighbours until they have at least so many characters.
    A text has at most about `least` + LONGEST_TEXT characters. A longer paragraph or line becomes
    several texts, so the memory is bounded.
    Raises UserError as read_blocks does.
    """
    by_paragraph = has_paragraphs(path)
    longest = least + LONGEST_TEXT
    parts, size = [], 0
    for line in read_lines(path):
        parts.append(line)
        size += len(line)
        is_end = not by_paragraph or not line.strip()
        if size > longest or (size >= least and is_end):
            text = "".join(parts)
            parts, size = [], 0
            if text.strip():
                yield text
    text = "".join(parts)
    if text.strip():
        yield text


def has_paragraphs(path):
    """True if a blank line lies between two other lines in the first block of a file."""
    with open(path, "rb") as file:
        start = file.read(BLOCK_BYTES).decode("utf-8-sig", "ignore")
    lines = start.strip().splitlines()
    return any(not line.strip() for line in lines)


def read_lines(path):
    """Yield the lines of a UTF-8 file, with their ends, as str.splitlines cuts them.

    A line may end in LF, CR, CR LF, or one of Unicode's own line ends. A line of more than
    LONGEST_TEXT characters comes in parts.
    """
    rest = ""
    for block in read_blocks(path):
        lines = (rest + block).splitlines(keepends=True)
        rest = lines.pop()          # it may go on in the next block, as may CR LF
        for line in lines:
            yield from cut_long_line(line)
        while len(rest) > LONGEST_TEXT:
            yield rest[:LONGEST_TEXT]
            rest = rest[LONGEST_TEXT:]
    if rest:
        yield rest


def cut_long_line(line):
    starts = range(0, len(line), LONGEST_TEXT)
    return [line[start:start + LONGEST_TEXT] for start in starts]


def read_blocks(path):
    """Yield the characters of a UTF-8 file, a string for each block of it, none empty.

    Raises UserError, with the offset of the byte, if the file is not UTF-8 or has a NUL.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        is_last = False
        while not is_last:
            data = file.read(BLOCK_BYTES)
            is_last = not data
            if file.tell() == len(data) and data.startswith(b"\x1f\x8b"):
                raise UserError(f"{path} is a gzip archive, expected UTF-8 text: unpack it first")
            try:
                block = decoder.decode(data, final=is_last)
            except UnicodeDecodeError as error:      # its object ends where the file was read to
                offset = file.tell() - len(error.object) + error.start
                byte = error.object[error.start]
                raise UserError(
                    f"{path} is not UTF-8: byte {offset} is 0x{byte:02x}; save it as UTF-8"
                ) from None
            if 0 in data:
                offset = file.tell() - len(data) + data.index(0)
                raise UserError(
                    f"{path} is not a text in UTF-8: byte {offset} is NUL; save it as UTF-8"
                )
            if block:
                yield block
