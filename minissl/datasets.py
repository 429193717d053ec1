"""Text to learn from, in the form in which it is learned from: tokens, splits, batches.

Every text becomes a slice of one flat array of token numbers, on disk and memory-mapped, so a batch is a few
index operations and a corpus larger than memory reads like a small one:

    tokens   [ text 0 | text 1      | text 2 | ... ]     (total,) uint16
    starts     ^0       ^57           ^181               (N,)
    lengths    57       124           ...                (N,)
    labels     3        -1 (none)     0                  (N,)
    split      TRAIN    HELD_OUT      TEST               (N,)

HELD_OUT is for every choice (learning rates, epochs), TEST for the final figures alone. Held-out texts are
contiguous blocks (of docstrings, whole files), not random ones: neighbouring files are often about the same film or
by the same author, and a random draw would put such twins on both sides. A text that stands in two splits is dropped
from the less precious one.

Where the texts come from: documents.py. Read next: images.py.
"""

import hashlib
import itertools
import json
import mmap
import os
import shutil
import sys
import tempfile
import zlib
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.files import hash_of, progress
from minissl.tokenizer import PAD, Tokenizer, train
from minissl.training import Batches, generator

TRAIN, HELD_OUT, TEST = 0, 1, 2
SAMPLE_BYTES = 2**28      # the tokenizer learns from this much text: more changes no merge that matters
SAMPLE_TEXTS = 100_000    # word frequencies and frequent pairs are counted in at most this many
CACHE_FORMAT = 1          # part of every cache's key: raise it when what is stored changes its meaning


# ---------------------------------------------------------------- which examples are for what

def evenly(n, most):
    """Indices of at most this many of n, evenly spaced.

    >>> evenly(10, 4).tolist(), evenly(2, 4).tolist()
    ([0, 3, 6, 9], [0, 1])
    """
    return np.linspace(0, n - 1, min(most, n)).astype(int)


def fingerprint(data):
    """Eight hex digits from up to 1,000 of the examples, evenly spaced, and eight from which of them are for what."""
    checksum = 0
    for i in evenly(len(data), 1000):
        checksum = zlib.crc32(np.ascontiguousarray(data[int(i)]), checksum)
    return f"{checksum:08x}-{zlib.crc32(np.ascontiguousarray(data.split)):08x}"


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


def without_twins(hashes, parts, labels):
    """True for the texts to keep: every test text, and of any other text that occurs several times one copy, in
    the first of: test, held out, labelled, unlabelled."""
    order = np.lexsort((labels < 0, -parts.astype(int)))
    _, first = np.unique(hashes[order], return_index=True)
    keep = parts == TEST
    keep[order[first]] = True
    return keep


# ---------------------------------------------------------------- texts

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
        """Slices of the texts `which` (B,) as (B, T) int64 with PAD behind each end, and their lengths (B,). Whole
        texts, or `lengths` tokens from `offsets` on."""
        lengths = self.lengths[which] if lengths is None else lengths
        where = np.arange(lengths.max())
        index = (self.starts[which] + offsets)[:, None] + np.minimum(where, lengths[:, None] - 1)
        return np.where(where < lengths[:, None], self._read(index), PAD).astype(np.int64), lengths

    def flat(self, which):
        """The texts `which` end to end, a PAD after each: tokens (n,) int64 and owner (n,), the row in `which`."""
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


def texts_of(strings, tokenizer):
    """Texts, without labels, from a list of strings; UserError if one of them is empty."""
    if isinstance(strings, str):                     # a list of its characters, or so it would be taken
        raise UserError("one string where a list of strings was expected: put it into brackets")
    if not all(isinstance(text, str) for text in strings):
        raise UserError("a text must be a str: there is something else among them")
    encoded = [tokenizer.encode(text) for text in strings]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    if not len(lengths) or not lengths.all():
        raise UserError("there is no text, or one without any character in it: leave it out")
    return Texts(np.concatenate(encoded), np.cumsum(lengths) - lengths, lengths, np.full(len(lengths), -1),
                 np.zeros(len(lengths), np.uint8), [], tokenizer)


# ---------------------------------------------------------------- from documents to one array of tokens

def encode_documents(documents, cache, vocabulary_size, tokenizer):
    """Write `cache` from a stream of (text, label name or None, TRAIN | HELD_OUT | TEST | None); where the documents do
    not say their split, split_blocks does. One pass: only a sample of it is ever in memory."""
    notes = []
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
        sample.reverse()                             # each document is let go when the next is asked for
        documents = itertools.chain((sample.pop() for _ in range(len(sample))), documents)

    shutil.rmtree(cache, ignore_errors=True)         # a damaged one
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, prefix=cache.name + ".", ignore_cleanup_errors=True) as mine:
        names, parts, digest, folder = [], [], hashlib.sha256(), Path(mine) / cache.name
        folder.mkdir()                               # which others may read, unlike the one around it
        lengths, hashes = array("q"), array("q")     # lists would take four times the memory
        with open(folder / "tokens.bin", "wb") as file:
            for n, (text, name, part) in enumerate(documents):
                ids = tokenizer.encode(text)
                if len(ids):
                    file.write(data := ids.tobytes())
                    digest.update(data)              # on the way: the file may be large
                    lengths.append(len(ids))
                    names.append(name)
                    parts.append(part)
                    hashes.append(hash(data))
                if n % 2000 == 0:
                    progress(f"encoding: {n:,} texts")
        progress(f"encoding: {len(lengths):,} texts, {sum(lengths):,} tokens, vocabulary {len(tokenizer):,}", end="\n")
        if not names:
            raise UserError("the data holds no text at all: every file is empty; give at least a few sentences")
        lengths = np.array(lengths, np.int64)
        classes = sorted({name for name in names if name is not None})
        number = {name: i for i, name in enumerate(classes)} | {None: -1}
        labels = np.array([number[name] for name in names], np.int64)
        parts = split_blocks(labels) if parts[0] is None else np.array(parts, np.uint8)
        keep = without_twins(np.array(hashes), parts, labels)
        if not keep.all():
            notes.append(f"{(~keep).sum():,} texts dropped that stand elsewhere in the data, too")
        meta = dict(classes=classes, tokenizer=tokenizer.to_json(), notes=notes, sha256=digest.hexdigest())
        np.savez(folder / "index.npz", starts=(np.cumsum(lengths) - lengths)[keep], lengths=lengths[keep],
                 labels=labels[keep], split=parts[keep], meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
        try:
            os.replace(folder, cache)
        except OSError:
            if not cache.exists():                   # else another run has made the same meanwhile
                raise


def read_cache(cache):
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

class WholeTexts:
    """First stage: `size` whole texts, each token by a coin flip read or to be guessed, anew each time."""

    def __init__(self, texts, size, seed):
        self.texts, self.size, self.seed = texts, min(size, len(texts)), seed
        self.batches = Batches(len(texts), self.size, seed, "document order", equal=False)

    def __call__(self, step):
        """-> read (n,), unread (n,) with PAD for what the other has; owner (n,); how many documents."""
        tokens, owner = map(torch.from_numpy, self.texts.flat(self.batches(step).numpy()))
        coin = torch.rand(len(tokens), generator=generator(self.seed, "coin", step)) < 0.5
        return tokens.masked_fill(coin, PAD), tokens.masked_fill(~coin, PAD), owner, self.size


class Windows:
    """Second stage: one window of each text an epoch, at a random place. Windows of like length share a batch, so
    almost nothing is padding; a batch holds about batch_size · window tokens."""

    def __init__(self, texts, window, batch_size, seed, rest):
        if texts.lengths.sum() < batch_size * window:
            raise UserError(f"a step needs {batch_size * window:,} tokens (batch size × window), found "
                            f"{texts.lengths.sum():,}; give more text, or a lower --batch-size or --window")
        self.texts, self.seed = texts, seed
        # With the document term half of a short text stays outside the window, to be guessed.
        self.sizes = np.minimum(window, -(-texts.lengths // 2) if rest else texts.lengths)       # (N,)
        ends = np.append(0, np.cumsum(np.sort(self.sizes)))                                      # (N + 1,)
        self.borders = [0]                                                      # the same in every epoch
        while self.borders[-1] < len(texts):
            full = ends[self.borders[-1]] + batch_size * window
            self.borders.append(np.searchsorted(ends, full, side="right") - 1)
        self.batches, self.epoch = len(self.borders) - 1, None

    def __call__(self, step):
        """-> tokens (B, T), lengths (B,), and what their documents have outside the window: rest (n,), owner (n,)."""
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


def frequent_pairs(texts, most, least=20):
    """The `most` commonest pairs of neighbouring tokens, each seen `least` times at least, sorted: (P,) int64,
    left · V + right."""
    V, found = len(texts.tokenizer), [np.zeros(0, np.int64)]
    for which in texts.slices(4096):      # a pair and its count in one number, so that one sort brings like to like
        tokens, _ = texts.flat(which)
        both = (tokens[:-1] != PAD) & (tokens[1:] != PAD)
        kinds, counts = np.unique(tokens[:-1][both] * V + tokens[1:][both], return_counts=True)
        found.append(kinds << 24 | counts)
        if sum(map(len, found[1:])) > len(found[0]) + 2**20:
            found = [_together(found)]
    found = _together(found)
    kinds, counts = found >> 24, found & 2**24 - 1
    best = np.argsort(-counts, kind="stable")[:most]
    return torch.from_numpy(np.sort(kinds[best[counts[best] >= least]]))


def _together(found):
    """Arrays of pair · 2²⁴ + count -> one, sorted, in which each pair stands once."""
    found = np.sort(np.concatenate(found))
    first = np.flatnonzero(np.diff(found >> 24, prepend=-1))
    return (found[first] & -2**24) + np.add.reduceat(found & 2**24 - 1, first) if len(found) else found
