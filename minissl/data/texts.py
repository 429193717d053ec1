"""Texts to learn from, in the form in which they are learned from: tokens, labels and splits.

Every text is a slice of one flat array of tokens. The array lies on the disk and is mapped into
memory, so a batch is a few index operations, and a corpus larger than memory is read like a
small one:

    tokens   [ text 0 | text 1      | text 2 | ... ]     (total,) uint16
    starts     ^0       ^57           ^181               (N,)
    lengths    57       124           ...                (N,)
    labels     3        -1 (none)     0                  (N,)
    split      TRAIN    HELD_OUT      TEST               (N,)

HELD_OUT is for every choice (learning rates, epochs) and TEST for the final figures alone.
Held-out texts are contiguous blocks in the order of the files (for docstrings, whole files),
not random ones: neighbouring files are often about the same film or by the same author, and a
random draw would put such twins on both sides. A text that occurs in two splits is kept in one
of them only; see splits.drop_duplicates.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.data.splits import (
    TEST,
    TRAIN,
    drop_duplicates,
    evenly_spaced,
    incomplete_classes,
    split_blocks,
)
from minissl.tokenizer import PAD, Tokenizer, train_tokenizer
from minissl.training.files import file_hash, progress
from minissl.training.wording import count_of, list_names
from minissl.transformer import MIN_COUNT


SAMPLE_BYTES = 2**28      # the tokenizer learns from the first 256 MB of text
SAMPLE_TEXTS = 100_000    # word frequencies and frequent pairs are counted in at most this many
CACHE_FORMAT = 3          # part of every cache's name: raise it when a cache changes its meaning

DAY = 24 * 60 * 60        # seconds
LEFT_OVER = re.compile(r".*-[0-9a-f]{16}\.\w+")      # a temporary folder of encode_documents


# ---------------------------------------------------------------- The texts in memory

@dataclass
class Texts:
    """N texts as slices of one array; see the drawing at the top of this file."""
    tokens: np.ndarray               # (total,) uint16, or int32 for a vocabulary above 65,536
    starts: np.ndarray               # (N,) int64
    lengths: np.ndarray              # (N,) int64, each at least 1
    labels: np.ndarray               # (N,) int64, -1 where there is none
    split: np.ndarray                # (N,) uint8: TRAIN, HELD_OUT or TEST
    classes: list                    # label -> name
    tokenizer: Tokenizer
    notes: list = field(default_factory=list)    # sentences on how the texts were made

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        """Return the tokens of text i, (T,) int64."""
        start = self.starts[i]
        end = start + self.lengths[i]
        return self.tokens[start:end].astype(np.int64)

    def select(self, indices):
        """Return the Texts at an index array or where a boolean mask is True.

        The tokens are shared, not copied.
        """
        return replace(
            self,
            starts=self.starts[indices],
            lengths=self.lengths[indices],
            labels=self.labels[indices],
            split=self.split[indices],
        )

    def sample(self, most):
        """Return at most `most` of the texts, evenly spaced."""
        return self.select(evenly_spaced(len(self), most))

    def chunks(self, size):
        """Return all indices as a list of arrays, to work piece by piece.

        Each array has from `size` to 2 · size − 1 indices, or fewer if there are not as many texts.
        """
        count = max(1, len(self) // size)
        return np.array_split(np.arange(len(self)), count)

    def padded(self, indices, offsets=0, lengths=None):
        """Return texts as the rows of a matrix, with PAD behind the end of each.

        Arguments: indices (B,); offsets, an int or (B,), the first token of each text to
        take; lengths (B,), how many tokens to take. Without lengths the texts are whole.
        Returns tokens (B, T) int64, where T is the largest length, and lengths (B,).
        """
        if lengths is None:
            lengths = self.lengths[indices]
        columns = np.arange(lengths.max())                              # (T,)
        inside = columns < lengths[:, None]                             # (B, T)
        # Behind its end each row reads its last token again; those become PAD.
        places = np.minimum(columns, lengths[:, None] - 1)              # (B, T)
        first = self.starts[indices] + offsets                          # (B,)
        tokens = self.tokens[first[:, None] + places]                   # (B, T)
        return np.where(inside, tokens, PAD).astype(np.int64), lengths

    def flat(self, indices):
        """Return texts end to end in one array, with one PAD after each.

        Arguments: indices (B,).
        Returns tokens (n,) int64 and owner (n,), the row 0 ... B - 1 of each token.
        """
        sizes = self.lengths[indices] + 1                               # (B,)
        ends = np.cumsum(sizes)                                         # (B,)
        owner = np.repeat(np.arange(len(indices)), sizes)               # (n,)
        row_starts = np.repeat(ends - sizes, sizes)                     # (n,)
        place = np.arange(sizes.sum()) - row_starts                     # (n,): 0, 1, ...
        positions = self.starts[indices][owner] + place                 # (n,)
        pads = ends - 1                                                 # (B,)
        positions[pads] -= 1          # behind the last text there may be no token to read
        tokens = self.tokens[positions].astype(np.int64)
        tokens[pads] = PAD
        return tokens, owner

    def split_long(self, longest):
        """Return Texts in which each text longer than `longest` is cut into nearly equal parts.

        The tokens, their order and the labels are the same.
        """
        parts = -(-self.lengths // longest)                             # (N,), rounded up
        owner = np.repeat(np.arange(len(self)), parts)                  # (N',)
        first_part = np.repeat(np.cumsum(parts) - parts, parts)         # (N',)
        part = np.arange(len(owner)) - first_part                       # (N',): 0, 1, ...
        start = self.lengths[owner] * part // parts[owner]
        end = self.lengths[owner] * (part + 1) // parts[owner]
        return replace(
            self.select(owner),
            starts=self.starts[owner] + start,
            lengths=end - start,
        )

    def cut_long_texts(self, window):
        """Return Texts in which each long text is cut into parts, for a training with this window.

        So the whole texts of a batch fit into memory. A part has at least 2 · window tokens, so
        half of it fills the window.
        """
        return self.split_long(max(1024, 4 * window))


def encode_texts(strings, tokenizer):
    """Return the Texts of any iterable of strings, without labels, all in the split TRAIN.

    Raises UserError if there are none, or if one of them is empty or is not a string.
    """
    if isinstance(strings, (str, bytes)):      # it would be taken as a list of its characters
        raise UserError("expected a list of strings, got one string: put it into brackets")
    if not isinstance(strings, Iterable):
        raise UserError(f"expected a list of strings, got {type(strings).__name__}")
    encoded = []
    for n, text in enumerate(strings):
        if not isinstance(text, str):
            raise UserError(f"text {n}: expected a string, got {type(text).__name__}")
        ids = tokenizer.encode(text)
        if not len(ids):
            raise UserError(f"text {n} has no characters but white space: leave it out")
        encoded.append(ids)
    if not encoded:
        raise UserError("expected a list of strings, got an empty one")
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    return Texts(
        tokens=np.concatenate(encoded),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        labels=np.full(len(lengths), -1),
        split=np.full(len(lengths), TRAIN, np.uint8),
        classes=[],
        tokenizer=tokenizer,
    )


# ---------------------------------------------------------------- Encoding a collection

def announce(data, texts):
    """Print how much text there is to learn from, and the notes on how it was made.

    data: the value of --data; texts: the training texts, a Texts. Returns their size in words,
    which is a part of what a run knows its data by.
    """
    size = f"{count_of(len(texts), 'text')} of {texts.lengths.sum():,} tokens"
    print(f"data: {data}, {size} to learn from, vocabulary {len(texts.tokenizer):,}")
    for note in texts.notes:
        print(f"data: {note}")
    return size


@dataclass
class Source:
    """A collection of texts that is not read yet; text_sources.py makes them.

    Either every document has a split, or none has. If none has, split_blocks makes it.
    """
    key: object             # its str changes when the content changes
    documents: Iterable     # of (text, label name or None, TRAIN | HELD_OUT | TEST | None)
    name: str = ""          # of the file or folder
    unit: str = ""          # how the texts were cut, such as "one a line"
    notes: list = field(default_factory=list)

    def describe(self, count):
        """Return ["my.txt: 300 texts, one a line"], or [] if nothing had to be guessed."""
        if not self.unit:
            return []
        return [f"{self.name}: {count_of(count, 'text')}, {self.unit}"]


def encode_documents(source, cache, vocabulary_size, tokenizer):
    """Encode the documents of a Source and write their tokens into the folder `cache`.

    The documents are read once. Of the user's files, only the sample that the tokenizer learns
    from is ever in memory. (IMDb and the docstrings are in memory as a whole, because they are
    sorted or counted before the first document comes.) The folder appears whole or not at all.

    Arguments: source, a Source; cache, a Path; vocabulary_size, of the tokenizer that is trained
    if `tokenizer` is None.
    Raises OSError, with the path in it, if the disk is full.
    """
    documents = source.documents
    notes = list(source.notes)
    if tokenizer is None:
        tokenizer, documents = learn_tokenizer(documents, vocabulary_size)
        if len(tokenizer) < vocabulary_size:
            notes.append(
                f"the text is too short for {vocabulary_size:,} subwords, "
                f"so the vocabulary has {len(tokenizer):,}"
            )
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(
        dir=cache.parent, prefix=cache.name + ".", ignore_cleanup_errors=True
    )
    with temporary as path:
        folder = Path(path) / cache.name     # others may read it, unlike the one around it
        folder.mkdir()
        try:
            write_cache(folder, documents, tokenizer, notes, source.describe)
        except OSError as error:
            if error.strerror is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(cache)) from None
        put_in_place(folder, cache)


def learn_tokenizer(documents, vocabulary_size):
    """Train a tokenizer on the first SAMPLE_BYTES of a stream, without its test texts.

    Returns the Tokenizer and a stream of all documents, those of the sample included.
    """
    sample, size = [], 0
    documents = iter(documents)
    for document in documents:
        sample.append(document)
        size += sys.getsizeof(document[0])
        if size > SAMPLE_BYTES:
            break
    texts = (text for text, _, split in sample if split != TEST)
    tokenizer = train_tokenizer(texts, vocabulary_size, report=show_merges)
    return tokenizer, chain(sample, documents)


def show_merges(done, wanted):
    progress(f"tokenizer: {done:,} of {wanted:,} merges")


# ---------------------------------------------------------------- The cache on the disk

def write_cache(folder, documents, tokenizer, notes, describe):
    """Write tokens.bin, all tokens end to end, and index.npz, everything else, into a folder.

    describe(count) returns the notes on how many texts there are, duplicates included.
    """
    names, splits = [], []
    lengths, hashes = array("q"), array("q")         # lists would take four times the memory
    digest = hashlib.sha256()
    with open(folder / "tokens.bin", "wb") as file:
        for n, (text, name, split) in enumerate(documents):
            ids = tokenizer.encode(text)
            if len(ids):
                data = ids.tobytes()
                file.write(data)
                digest.update(data)                  # here, because the file may be large
                hashes.append(hash(data))
                lengths.append(len(ids))
                names.append(name)
                splits.append(split)
            if n % 2000 == 0:
                progress(f"encoding: {n:,} texts")
    progress(
        f"encoding: {len(lengths):,} texts, {sum(lengths):,} tokens, "
        f"vocabulary {len(tokenizer):,}",
        end="\n",
    )
    if not names:
        raise UserError("the data holds no text: every file is empty; give a few sentences")

    classes = sorted({name for name in names if name is not None})
    label_of = {name: label for label, name in enumerate(classes)}
    label_of[None] = -1
    labels = np.array([label_of[name] for name in names], np.int64)
    # The split comes before the search for copies, other than in images.py. In a folder all texts
    # of a file are in one split, and IMDb and the docstrings have their own. So a class can lose
    # all its training texts to another split, and a note then names it.
    if splits[0] is None:
        split = split_blocks(labels)
    else:
        split = np.array(splits, np.uint8)

    notes = describe(len(names)) + notes
    keep = drop_duplicates(np.array(hashes), split, labels)
    dropped = len(keep) - keep.sum()
    if dropped:
        notes.append(f"left out {count_of(dropped, 'copy', 'copies')} of other texts")
    incomplete = incomplete_classes(split[keep], labels[keep], classes)
    if incomplete:
        notes.append(
            f"classes without a text to train on or without one to test on: "
            f"{list_names(incomplete)}"
        )

    lengths = np.array(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    meta = dict(
        classes=classes,
        tokenizer=tokenizer.to_json(),
        notes=notes,
        sha256=digest.hexdigest(),
    )
    np.savez(
        folder / "index.npz",
        starts=starts[keep],
        lengths=lengths[keep],
        labels=labels[keep],
        split=split[keep],
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )


def put_in_place(folder, cache):
    """Give a finished folder the name `cache`, or use the good cache that is there already.

    Another program may have encoded the same texts meanwhile. Its cache stays: someone may be
    reading it. The files of a damaged cache are replaced one by one, so that the cache never
    disappears.
    """
    try:
        os.replace(folder, cache)
        return
    except OSError:
        if not cache.exists():
            raise
    try:
        open_cache(cache)
    except Exception:
        try:
            for name in ("tokens.bin", "index.npz"):
                os.replace(folder / name, cache / name)
        except OSError:
            pass      # it is another user's; load_texts says that it cannot be replaced


def read_cache(cache):
    """Return the Texts of a cache folder; None if it is not there, not readable or damaged."""
    try:
        return open_cache(cache)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except Exception as error:       # a damaged zip fails in many ways: BadZipFile, KeyError, ...
        print(f"the cache {cache} is damaged ({error}); making it anew", file=sys.stderr)
        return None


def open_cache(cache):
    """Return the Texts of a cache folder. Raises an exception of any kind if it is damaged."""
    with np.load(cache / "index.npz") as index:      # a zip, whose checksums are verified
        meta = json.loads(bytes(index["meta"]))
        tokenizer = Tokenizer.from_json(meta["tokenizer"])
        if file_hash(cache / "tokens.bin") != meta["sha256"]:
            raise ValueError("tokens.bin has changed")
        return Texts(
            tokens=np.memmap(cache / "tokens.bin", tokenizer.dtype, "r"),
            starts=index["starts"],
            lengths=index["lengths"],
            labels=index["labels"],
            split=index["split"],
            classes=meta["classes"],
            tokenizer=tokenizer,
            notes=meta["notes"],
        )


def remove_left_overs(folder):
    """Remove the temporary folders of runs that were killed, if they are older than a day."""
    try:
        paths = list(folder.iterdir())
    except OSError:                                  # it is not there, or not readable
        return
    for path in paths:
        if not LEFT_OVER.fullmatch(path.name):
            continue
        try:
            newest = max(file.stat().st_mtime for file in [path, *path.rglob("*")])
        except OSError:
            continue                                 # another run has just removed it
        if time.time() - newest > DAY:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- Words and pairs of neighbours

def count_terms(texts, model):
    """Return how often each word and each pair of a TextEncoder occurs: (V + P,) float32."""
    counts = 0
    for indices in texts.chunks(4096):
        tokens, _ = texts.flat(indices)              # with a PAD behind each text
        document = torch.from_numpy(tokens)[None]    # (1, n)
        counts = counts + model.count_terms(document)[0]
    return counts


def frequent_pairs(texts, most, least=MIN_COUNT):
    """Return the most frequent pairs of neighbouring tokens as a sorted tensor (P,) int64.

    The pair (left, right) is the number left · V + right, its key. P is at most `most`, and
    each pair occurs at least `least` times.
    """
    V = len(texts.tokenizer)
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for indices in texts.chunks(4096):
        tokens, _ = texts.flat(indices)
        left, right = tokens[:-1], tokens[1:]
        inside = (left != PAD) & (right != PAD)
        chunk_keys, chunk_counts = np.unique(left[inside] * V + right[inside], return_counts=True)
        keys, counts = add_counts(keys, counts, chunk_keys, chunk_counts)

    order = np.argsort(-counts, kind="stable")[:most]          # of equal counts, the smaller key
    chosen = order[counts[order] >= least]
    return torch.from_numpy(np.sort(keys[chosen]))


def add_counts(keys, counts, more_keys, more_counts):
    """Return the sorted keys of two sorted arrays, and the sum of the counts of each key.

    >>> a = np.array
    >>> keys, counts = add_counts(a([2, 5]), a([1, 1]), a([5, 7]), a([3, 1]))
    >>> keys.tolist(), counts.tolist()
    ([2, 5, 7], [1, 4, 1])
    """
    # np.unique of both arrays together would be shorter. But it sorts all keys again, and takes
    # four to seven times as long.
    places = np.searchsorted(keys, more_keys)        # where each key is, or would be
    # The place of a key above all others is behind the end. There stands -1, which is no key.
    is_known = np.append(keys, -1)[places] == more_keys
    is_new = ~is_known
    counts = counts.copy()
    counts[places[is_known]] += more_counts[is_known]
    keys = np.insert(keys, places[is_new], more_keys[is_new])
    counts = np.insert(counts, places[is_new], more_counts[is_new])
    return keys, counts
