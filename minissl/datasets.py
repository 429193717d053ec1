"""Text to learn from: what is already on the machine, a published data set, or the reader's own files.

Every text becomes a slice of one flat array of token numbers, on disk and memory-mapped, so a batch is a few
index operations and a corpus larger than memory reads like a small one:

    tokens   [ text 0 | text 1      | text 2 | ... ]     (total,) uint16
    starts     ^0       ^57           ^181               (N,)
    lengths    57       124           ...                (N,)
    labels     3        -1 (none)     0                  (N,)
    split      TRAIN    HELD_OUT      TEST               (N,)

What is HELD_OUT makes every choice (learning rates, epochs), TEST only the final figures. Held-out texts are
contiguous blocks, not random ones: neighbouring files are often about the same film or by the same author, and a
random draw would put such twins on both sides. A text that stands in two splits is dropped from the less
precious one.

Read next: finetune.py.
"""

import ast
import codecs
import hashlib
import importlib.util
import itertools
import json
import mmap
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.files import download, hash_of, progress, read_archive
from minissl.tokenizer import PAD, Tokenizer, train
from minissl.training import Batches, generator

TRAIN, HELD_OUT, TEST = 0, 1, 2
SAMPLE_BYTES = 2**28      # the tokenizer learns from this much text: more changes no merge that matters
TEXT_BYTES = 2**20        # a longer paragraph or line of a file is read as several texts
SAMPLE_TEXTS = 100_000    # word frequencies and frequent pairs are counted in at most this many
CACHE_FORMAT = 1          # part of every cache's key: raise it when what is stored changes its meaning


# ---------------------------------------------------------------- what every loader returns

def evenly(n, most):
    """Indices of at most this many of n, evenly spaced.

    >>> evenly(10, 4).tolist(), evenly(2, 4).tolist()
    ([0, 3, 6, 9], [0, 1])
    """
    return np.linspace(0, n - 1, min(most, n)).astype(int)


def fingerprint(data, most=1000):
    """Eight hex digits from up to so many of the examples, evenly spaced: of other data they are others."""
    checksum = 0
    for i in evenly(len(data), most):
        checksum = zlib.crc32(np.ascontiguousarray(data[int(i)]), checksum)
    return f"{checksum:08x}"


@dataclass
class Texts:
    """N texts as slices of one array; see the drawing above."""
    tokens: np.ndarray               # (total,) uint16, or int32 for a vocabulary above 65,536
    starts: np.ndarray               # (N,) int64
    lengths: np.ndarray              # (N,) int64, each at least 1
    labels: np.ndarray               # (N,) int64, -1 where there is none
    split: np.ndarray                # (N,) uint8: TRAIN, HELD_OUT or TEST
    classes: list                    # label number -> name
    tokenizer: Tokenizer
    notes: list = field(default_factory=list)   # sentences on what was found and what was passed over

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        """Text i as its tokens, (T,) int64."""
        return self.tokens[self.starts[i]:self.starts[i] + self.lengths[i]].astype(np.int64)

    def select(self, which):
        """The texts that a boolean mask or an index array picks, over the same tokens."""
        return replace(self, **{name: getattr(self, name)[which] for name in ("starts", "lengths", "labels", "split")})

    def spaced(self, most):
        """At most this many of the texts, evenly spaced."""
        return self.select(evenly(len(self), most))

    def padded(self, which, offsets=0, lengths=None):
        """Slices of the texts `which` (B,) as (B, T) int64 with PAD behind each end, and their lengths (B,). Whole texts,
        or `lengths` tokens from `offsets` on."""
        lengths = self.lengths[which] if lengths is None else lengths
        where = np.arange(lengths.max())
        index = (self.starts[which] + offsets)[:, None] + np.minimum(where, lengths[:, None] - 1)
        return np.where(where < lengths[:, None], self._read(index), PAD).astype(np.int64), lengths

    def flat(self, which):
        """The texts `which` one behind the other, a PAD after each: tokens (n,) int64 and owner (n,), the row in `which`."""
        size = self.lengths[which] + 1
        owner = np.repeat(np.arange(len(which)), size)
        last = np.cumsum(size) - 1
        index = self.starts[which][owner] + np.arange(size.sum()) - np.repeat(last + 1 - size, size)
        index[last] -= 1                                                        # it may lie beyond the last text
        tokens = self._read(index).astype(np.int64)
        tokens[last] = PAD
        return tokens, owner

    def _read(self, index):
        """The tokens at `index`. Pages of a mapped file that were read count as this process's memory until others need
        it; given back at once, a corpus of any size costs none."""
        tokens, mapped = self.tokens[index], getattr(self.tokens, "_mmap", None)
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)
        return np.asarray(tokens)

    def slices(self, size):
        """All indices in slices of about `size`, for what is done piece by piece."""
        return np.array_split(np.arange(len(self)), max(1, len(self) // size))

    def cut(self, longest):
        """The same tokens with every text longer than `longest` cut into nearly equal parts."""
        parts = -(-self.lengths // longest)                                     # (N,), rounded up
        owner = np.repeat(np.arange(len(self)), parts)                          # (N',)
        part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        first = self.lengths[owner] * part // parts[owner]
        last = self.lengths[owner] * (part + 1) // parts[owner]
        return replace(self.select(owner), starts=self.starts[owner] + first, lengths=last - first)


def load_texts(data, data_dir="data", vocabulary_size=8192, limit=0, tokenizer=None):
    """Texts by name ("pydocs", "imdb") or from a .txt file or a folder of them.

    Arguments: data, the name or path; data_dir, where archives and caches lie; vocabulary_size, of the tokenizer
    that is trained on the texts outside the test set, unless `tokenizer` is given; limit, keep about this many
    texts of each split, evenly spaced (0: all).
    Returns Texts. Raises UserError with one sentence for anything the user can mend.
    """
    if data == "pydocs":
        key, documents, split = _pydocs_files()
    elif data == "imdb":
        key, documents, split = _imdb(Path(data_dir))
    else:
        key, documents, split = _own_texts(Path(data))
    for settings in (str(vocabulary_size), tokenizer.to_json() if tokenizer else ""):
        name = hashlib.sha256(f"{CACHE_FORMAT} {key} {settings}".encode()).hexdigest()[:16]
        cache = Path(data_dir) / "cache" / f"{Path(data).stem}-{name}"
        texts = _read_cache(cache)
        if tokenizer is None or texts and texts.tokenizer.merges == tokenizer.merges:
            break                                    # else the data may be here, but encoded with another tokenizer
    if not texts:
        _encode(documents(), split, cache, vocabulary_size, tokenizer)
        texts = _read_cache(cache)
    if limit:
        index = [np.flatnonzero(texts.split == s) for s in (TRAIN, HELD_OUT, TEST)]
        index = [where[evenly(len(where), limit)] for where in index]
        texts = texts.select(np.sort(np.concatenate(index)))
    return texts


def texts_of(strings, tokenizer):
    """Texts, without labels, from a list of strings; UserError if one of them is empty."""
    encoded = [tokenizer.encode(text) for text in strings]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    if not len(lengths) or not lengths.all():
        raise UserError("there is a text without any character in it: leave it out")
    return Texts(np.concatenate(encoded), np.cumsum(lengths) - lengths, lengths, np.full(len(lengths), -1),
                 np.zeros(len(lengths), np.uint8), [], tokenizer)


# ---------------------------------------------------------------- from documents to one array of tokens

def _encode(documents, split, cache, vocabulary_size, tokenizer):
    """Write `cache` from an iterable of (text, label name or None, TRAIN | HELD_OUT | TEST | None); where the
    document does not say its split, `split(labels)` does. One pass: of a stream, only a sample is ever in memory."""
    notes, documents = [], iter(documents)
    if tokenizer is None:
        sample, size = [], 0
        for document in documents:
            sample.append(document)
            size += sys.getsizeof(document[0])
            if size > SAMPLE_BYTES:
                break
        tokenizer = train((text for text, _, part in sample if part != TEST), vocabulary_size,
                          report=lambda done, wanted: progress(f"tokenizer: {done:,} of {wanted:,} merges"))
        if len(tokenizer) < vocabulary_size:
            notes.append(f"the text has pairs for a vocabulary of {len(tokenizer):,} only, not {vocabulary_size:,}")
        documents = itertools.chain(_emptied(sample), documents)

    cache.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache.parent, prefix=cache.name + "."))
    try:
        names, parts, digest = [], [], hashlib.sha256()
        lengths, hashes = array("q"), array("Q")     # lists would take four times the memory
        with open(folder / "tokens.bin", "wb") as file:
            for n, (text, name, part) in enumerate(documents):
                ids = tokenizer.encode(text)
                if len(ids):
                    file.write(ids.tobytes())
                    digest.update(ids.tobytes())
                    lengths.append(len(ids))
                    names.append(name)
                    parts.append(part)
                    hashes.append(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little"))
                if n % 2000 == 0:
                    progress(f"encoding: {n:,} texts")
        progress(f"encoding: {len(lengths):,} texts, {sum(lengths):,} tokens, vocabulary {len(tokenizer):,}", end="\n")
        if not names:
            raise UserError("the data holds no text at all: every file is empty; give at least a few sentences")
        lengths = np.array(lengths, np.int64)
        classes = sorted({name for name in names if name is not None})
        number = {name: i for i, name in enumerate(classes)} | {None: -1}
        labels = np.array([number[name] for name in names], np.int64)
        parts = split(labels) if parts[0] is None else np.array(parts, np.uint8)
        keep = without_twins(np.array(hashes, np.uint64), parts, labels)
        if not keep.all():
            notes.append(f"{(~keep).sum():,} texts dropped that stand elsewhere in the data, too")
        meta = dict(classes=classes, tokenizer=tokenizer.to_json(), notes=notes, sha256=digest.hexdigest())
        np.savez(folder / "index.npz", starts=(np.cumsum(lengths) - lengths)[keep], lengths=lengths[keep],
                 labels=labels[keep], split=parts[keep], meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
        shutil.rmtree(cache, ignore_errors=True)     # a damaged one
        os.replace(folder, cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _emptied(items):
    """The items of a list, each let go when the next is asked for."""
    items.reverse()
    while items:
        yield items.pop()


def without_twins(hashes, parts, labels):
    """True for the texts to keep: every test text, and of any other text that occurs several times one copy, in
    the first of: test, held out, labelled, unlabelled."""
    order = np.lexsort((labels < 0, -parts.astype(int)))
    _, first = np.unique(hashes[order], return_index=True)
    keep = parts == TEST
    keep[order[first]] = True
    return keep


def _read_cache(cache):
    """The Texts of a cache folder, or None if it is not there or damaged; a damaged one is made anew."""
    try:
        with np.load(cache / "index.npz") as index:         # a zip: each member carries a checksum, and it is checked
            meta = json.loads(bytes(index["meta"]))
            tokenizer = Tokenizer.from_json(meta["tokenizer"])
            if hash_of(cache / "tokens.bin") != meta["sha256"]:
                raise ValueError("tokens.bin has changed")
            tokens = np.memmap(cache / "tokens.bin", tokenizer.dtype, "r")
            return Texts(tokens, *(index[name] for name in ("starts", "lengths", "labels", "split")),
                         meta["classes"], tokenizer, meta["notes"])
    except FileNotFoundError:
        return None
    except Exception as error:              # a damaged zip can fail in any way: BadZipFile, NotImplementedError, ...
        print(f"the cache {cache} is damaged ({error}); making it anew", file=sys.stderr)
        return None


# ---------------------------------------------------------------- batches, each a function of (seed, step)

class Documents:
    """First stage: `size` whole texts, each token by a coin flip read or to be guessed, anew each time."""

    def __init__(self, texts, size, seed):
        self.texts, self.size, self.seed = texts, min(size, len(texts)), seed
        self.batches = Batches(len(texts), self.size, seed, "document order")

    def __call__(self, step):
        """-> read (n,), unread (n,) with PAD for what the other has; owner (n,); how many documents."""
        tokens, owner = map(torch.from_numpy, self.texts.flat(self.batches(step).numpy()))
        coin = torch.rand(len(tokens), generator=generator(self.seed, "coin", step)) < 0.5
        return tokens.masked_fill(coin, PAD), tokens.masked_fill(~coin, PAD), owner, self.size


class Windows:
    """Second stage: one window of each text an epoch, at a random place. Windows of like length share a batch, so
    almost nothing is padding; a batch holds about batch_size · window tokens."""

    def __init__(self, texts, window, batch_size, seed, rest):
        self.texts, self.seed = texts, seed
        # With the document term half of a short text stays outside the window, to be guessed.
        self.sizes = np.minimum(window, -(-texts.lengths // 2) if rest else texts.lengths)       # (N,)
        ends = np.cumsum(np.sort(self.sizes))
        self.borders = [0]                                                      # the same in every epoch
        while self.borders[-1] < len(texts):
            done = ends[self.borders[-1] - 1] if self.borders[-1] else 0
            fits = np.searchsorted(ends, done + batch_size * window, side="right")
            self.borders.append(max(int(fits), self.borders[-1] + 1))
        self.batches, self.epoch = len(self.borders) - 1, None

    def __call__(self, step):
        """-> tokens (B, T), lengths (B,), and of the same documents everything outside the window: rest (n,), owner (n,)."""
        epoch, batch = divmod(step, self.batches)
        if epoch != self.epoch:
            draw = torch.rand(3, len(self.texts), generator=generator(self.seed, "windows", epoch)).double().numpy()
            self.order = np.argsort(self.sizes + draw[0])                       # by length, ties at random
            self.offsets = (draw[1] * (self.texts.lengths - self.sizes + 1)).astype(np.int64)
            self.turn = np.argsort(draw[2][:self.batches])
            self.epoch = epoch
        batch = self.turn[batch]
        which = self.order[self.borders[batch]:self.borders[batch + 1]]
        offsets, sizes = self.offsets[which], self.sizes[which]
        tokens, lengths = self.texts.padded(which, offsets, sizes)
        rest, owner = self.texts.flat(which)
        place = np.arange(len(rest)) - np.searchsorted(owner, owner)            # of each token in its document
        rest[(place >= offsets[owner]) & (place < (offsets + sizes)[owner])] = PAD
        return map(torch.from_numpy, (tokens, lengths, rest, owner))


def frequent_pairs(texts, vocabulary_size, most):
    """The pairs of neighbouring tokens seen most often (and 20 times), sorted: (N,) int64, left · V + right."""
    found = [np.zeros(0, np.int64)]
    for which in texts.slices(4096):                 # a pair and its count in one number, so that one sort brings like to like
        tokens, _ = texts.flat(which)
        both = (tokens[:-1] != PAD) & (tokens[1:] != PAD)
        kinds, counts = np.unique(tokens[:-1][both] * vocabulary_size + tokens[1:][both], return_counts=True)
        found.append(kinds << 24 | counts)
        if sum(map(len, found[1:])) > len(found[0]) + 2**20:
            found = [_together(found)]
    found = _together(found)
    kinds, counts = found >> 24, found & 2**24 - 1
    best = np.argsort(-counts, kind="stable")[:most]
    return torch.from_numpy(np.sort(kinds[best[counts[best] >= 20]]))


def _together(found):
    """Arrays of pair · 2²⁴ + count -> one, sorted, in which each pair stands once."""
    found = np.sort(np.concatenate(found))
    first = np.flatnonzero(np.diff(found >> 24, prepend=-1))
    return (found[first] & -2**24) + np.add.reduceat(found & 2**24 - 1, first) if len(found) else found


# ---------------------------------------------------------------- pydocs: the docstrings of the running Python

def _pydocs_files():
    roots = {"": Path(sysconfig.get_paths()["stdlib"])}
    for name in ("numpy", "torch"):
        roots[name] = Path(importlib.util.find_spec(name).origin).parent     # finds, does not import
    files = []
    for package, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = ((package,) if package else ()) + path.relative_to(root).with_suffix("").parts
            if not {"site-packages", "test", "tests", "lib2to3", "_vendor"} & set(parts):
                files.append((path, parts))
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in files]
    return listing, lambda: _read_pydocs(files), None


def _read_pydocs(files):
    """(docstring, package, split) for every docstring of the files. The package ("asyncio", "torch.nn") is the
    label where it has at least 200 docstrings in at least 8 files. Whole files go to the test set, in the order
    of their hashes, until it has a fifth of their package's docstrings, then to the held-out set for a tenth. The
    names of all labelled packages are replaced by "package" in every text: a docstring of torch.nn that says
    "torch.nn" would give its label away."""
    found = defaultdict(dict)                                                   # package -> file -> its docstrings
    for n, (path, parts) in enumerate(files):
        if n % 100 == 0:
            progress(f"docstrings: {n:,} of {len(files):,} files")
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")          # what is odd in other people's sources is not our reader's news
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
    return hash_of(archive), lambda: _read_imdb(archive), None


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

def _own_texts(path):
    if not path.exists():
        raise UserError(f"--data {path}: there is nothing there; give pydocs, imdb, a .txt file or a folder of them")
    if path.is_file():
        if path.suffix != ".txt":
            raise UserError(f"--data {path}: a text file must end in .txt")
        if path.stat().st_size == 0:
            raise UserError(f"--data {path}: the file is empty")
        least = 2048 if path.stat().st_size > SAMPLE_BYTES else 0              # millions of lines are no millions of documents
        return (f"{least} {_digest([path], path.parent)}", lambda: ((text, None, None) for text in read_texts(path, least)),
                split_blocks)
    files, passed_over = [], Counter()
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            passed_over["hidden"] += file.is_file()
        elif file.is_dir():
            passed_over["empty folders"] += not any(file.iterdir())
        elif file.suffix != ".txt":
            passed_over["not .txt"] += 1
        elif file.stat().st_size == 0:
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
    return _digest(files, path), lambda: ((text, name, part) for file, name, part in zip(files, names, split)
                                          for text in read_texts(file, least=4 * TEXT_BYTES)), None


def split_blocks(labels):
    """The end of each class, in the order of the files: a fifth for the test, a tenth held out before it. Without
    labels there is nothing to test; a tenth is held out for the loss."""
    split = np.zeros(len(labels), np.uint8)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        n, test = len(where), 0.2 if label >= 0 else 0
        split[where[round(n * (0.9 - test)):]] = HELD_OUT
        split[where[round(n * (1 - test)):]] = TEST
    return split


def read_texts(path, least=0):
    """The texts of one UTF-8 file: its paragraphs, or its lines where no blank line separates paragraphs.

    Yields str, none longer than about TEXT_BYTES, however long the lines; with `least` neighbours are joined to texts of
    at least so many characters. Raises UserError at bytes that are not UTF-8, with their offset.
    """
    with open(path, "rb") as file:
        start = file.read(TEXT_BYTES)
        by_paragraph = re.search(rb"\n[ \t\r]*\n[ \t\r]*\S", start) is not None
        if start[:2] == b"\x1f\x8b":
            raise UserError(f"{path} is a gzip archive, not a text: unpack it first (gunzip)")
        file.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)
        decoder, offset, paragraph, size = codecs.getincrementaldecoder("utf-8")(), file.tell(), [], 0
        for line in itertools.chain(iter(lambda: file.readline(TEXT_BYTES), b""), [None]):
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(line or b"", final=line is None)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: byte {offset - pending + error.start} cannot be decoded; "
                                f"convert it first (iconv -f latin1 -t utf-8)") from None
            offset += len(line or b"")
            paragraph.append(text)
            size += len(text)
            if line is None or size > max(TEXT_BYTES, least) or size >= least and (not by_paragraph or not text.strip()):
                whole, paragraph, size = "".join(paragraph), [], 0
                if whole.strip():
                    yield whole


def _digest(files, root):
    """A hash of the files' names below root and of their contents."""
    lines = "\n".join(f"{os.path.relpath(path, root)} {hash_of(path)}" for path in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
