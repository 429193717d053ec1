"""A subword tokenizer, trained from scratch: byte-pair encoding over UTF-8 bytes.

A model reads integers, so a text must become a sequence of entries of a fixed vocabulary. Whole words would
need an entry for every name and typing error; single bytes need no list at all but make sequences five times
longer. Byte-pair encoding stands between: start with the 256 bytes and, again and again, merge the pair of
neighbours that occurs most often in the training text. Frequent words end up as one token, rare words as a few,
and because the bytes themselves stay in the vocabulary, no text is ever "unknown".

    Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2): over bytes

Why this and not BERT's WordPiece: the training is one rule (the most frequent pair) instead of a likelihood
ratio, and there is no [UNK]. Differences from GPT-2: case and white space are folded (fewer forms of one word,
which is what a small vocabulary and a small model need), an apostrophe stays inside its word ("didn't" carries
a sentiment that "'t" does not), and a run of letters is cut after 32 characters, of digits after 4, of punctuation
after 8, so that a megabyte of one letter costs no more than a megabyte of prose.

    normalise   lower case; every run of white space becomes one space; a lone surrogate, which no UTF-8 can
                carry, becomes "?"
    round trip  decode(encode(text)) == normalise(text), for every string

Read next: datasets.py and documents.py, which encode whole collections with it.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import chain

import numpy as np

PAD, MASK = 0, 1                 # no text encodes to these two: "[MASK]" in a text is six ordinary characters
SPECIAL_TOKENS = ("[PAD]", "[MASK]")
FORMAT = "minissl byte-pair tokenizer"
FIRST_BYTE = len(SPECIAL_TOKENS)  # byte b is token FIRST_BYTE + b
FIRST_MERGE = FIRST_BYTE + 256    # merge number r makes token FIRST_MERGE + r

# Merges never cross the border of these pieces: a word with its leading space, a number, a run of punctuation.
PIECE = re.compile(r" ?(?:[^\W\d_]{1,32}(?:'[^\W\d_]{1,8})?|\d{1,4}|(?:[^\w\s]|_){1,8})")


def normalise(text):
    """Fold case and white space.

    >>> normalise("A  Film,\\nBRILLIANT")
    'a film, brilliant'
    """
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").lower().split())


def split_pieces(text, leading_space=True):
    """Normalise and cut into the pieces within which byte pairs merge.

    The first word gets a space before it like every other, so that it is the same token wherever it stands.

    >>> split_pieces("A film, I didn't")
    [' a', ' film', ',', ' i', " didn't"]
    """
    text = normalise(text)
    return PIECE.findall(" " + text if leading_space and text else text)


def merge(ids, pair, new_id):
    """Replace every occurrence of the pair, left to right.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 9)
    [9, 3, 9]
    """
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train(texts, vocabulary_size, report=None):
    """Learn the merges from an iterable of strings.

    Every distinct piece is stored once with its count, and an index from pairs to the pieces that contain them
    makes each merge touch only those: 98 MB of reviews take half a minute, not hours.

    Arguments: texts, an iterable of str; vocabulary_size, int, special tokens and bytes included; report, called with
    (merges made, merges wanted).
    Returns a Tokenizer, with fewer entries than asked for when the text has no more pairs that repeat.
    Ties go to the smaller pair, so the same texts give the same tokenizer, in any order (up to a million
    distinct pieces; beyond, the rarer half is dropped now and then).
    Raises ValueError if vocabulary_size has no room for the special tokens and the bytes.
    """
    if vocabulary_size < FIRST_MERGE:
        raise ValueError(f"vocabulary size {vocabulary_size}: {FIRST_MERGE} is the least "
                         f"({FIRST_BYTE} special tokens and 256 bytes)")
    counted = Counter()
    for text in texts:
        counted.update(split_pieces(text))
        if len(counted) > 2**20:                  # words without end: keep the frequent ones, and memory stays bounded
            counted = Counter(dict(counted.most_common(2**19)))
    pieces = [[FIRST_BYTE + byte for byte in piece.encode()] for piece in counted]
    counts = list(counted.values())

    pair_counts, where = Counter(), defaultdict(set)
    for index, (ids, count) in enumerate(zip(pieces, counts)):
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += count
            where[pair].add(index)

    # A heap of (−count, pair). A count can only have fallen since its entry was pushed (new pairs contain the new
    # token), so a stale entry shows itself when it comes to the top and is pushed back with its true count.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges, wanted = [], vocabulary_size - FIRST_MERGE
    while heap and len(merges) < wanted:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -count < 2:                            # from here on no pair repeats
            break
        new_id = FIRST_MERGE + len(merges)
        merges.append(pair)
        born = set()
        for index in where.pop(pair):
            old, count = pieces[index], counts[index]
            new = pieces[index] = merge(old, pair, new_id)
            for neighbours in zip(old, old[1:]):
                pair_counts[neighbours] -= count
            for neighbours in zip(new, new[1:]):
                pair_counts[neighbours] += count
                if new_id in neighbours:
                    where[neighbours].add(index)
                    born.add(neighbours)
        for neighbours in born:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
        if report and len(merges) % 100 == 0:
            report(len(merges), wanted)
    return Tokenizer(merges)


class Tokenizer:
    """The vocabulary and its merges. `len(tokenizer)` is the vocabulary size V."""

    def __init__(self, merges):
        """merges: list of (int, int), the r-th made of tokens below FIRST_MERGE + r. ValueError otherwise."""
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {}             # pair -> the token it merges into
        self.bytes_of = [name.encode() for name in SPECIAL_TOKENS] + [bytes([b]) for b in range(256)]
        for new_id, pair in enumerate(self.merges, FIRST_MERGE):
            earlier = [type(part) is int and FIRST_BYTE <= part < new_id for part in pair]
            if earlier != [True, True] or pair in self.rank:
                raise ValueError(f"merge {new_id - FIRST_MERGE}, {pair}: not two earlier tokens, once")
            self.rank[pair] = new_id
            self.bytes_of.append(self.bytes_of[pair[0]] + self.bytes_of[pair[1]])
        self.dtype = np.uint16 if len(self) <= 2**16 else np.int32
        self.known = lru_cache(2**20)(self._merged)      # text repeats its words; a bound on memory

    def __reduce__(self):                                # what is known need not travel to another process
        return Tokenizer, (self.merges,)

    def __len__(self):
        return FIRST_MERGE + len(self.merges)

    def encode(self, text, leading_space=True):
        """str -> (T,) array of token numbers, uint16 (int32 when V > 65,536). The empty text gives T = 0."""
        pieces = split_pieces(text, leading_space)
        return np.fromiter(chain.from_iterable(map(self.known, pieces)), self.dtype)

    def _merged(self, piece):
        ids = [FIRST_BYTE + byte for byte in piece.encode()]
        while len(ids) > 1:       # apply the earliest merge that fits, as in training
            pair = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, len(self)))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, self.rank[pair])
        return ids

    def decode(self, ids):
        """Any sequence of token numbers -> str. Bytes that are not UTF-8, as between two halves of a character,
        become U+FFFD; special tokens show as "[PAD]" and "[MASK]"."""
        text = b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")
        return text[1:] if text.startswith(" ") else text

    def to_json(self):
        return json.dumps({"format": FORMAT, "merges": self.merges})

    @classmethod
    def from_json(cls, text):
        """The inverse of to_json. ValueError when it is not such a text, or its merges are not well formed."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT or not isinstance(data["merges"], list):
                raise ValueError(f"not a {FORMAT}")
            return cls(data["merges"])
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a minissl tokenizer: {error!r}") from None
