"""A subword tokenizer, trained from scratch: byte-pair encoding over UTF-8 bytes.

A model reads integers, so a text must become a sequence of entries of a fixed vocabulary.
Whole words would need an entry for every name and every typing error. Single bytes need only
256 entries, but they make sequences several times as long. Byte-pair encoding lies between the
two. Start with the 256 bytes. Then find the pair of neighbours that occurs most often in the
training text, make it a new token, and repeat (spaces are left out here):

    "low low lower"       l o w    l o w    l o w e r
    merge l, o            lo w     lo w     lo w e r
    merge lo, w           low      low      low e r

Frequent words end as one token and rare words as a few. Because the bytes themselves stay in
the vocabulary, no text is ever "unknown".

    Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword
        Units", arXiv 1508.07909: the method
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2):
        bytes instead of characters

Why not BERT's WordPiece: byte-pair encoding is trained by one rule, the most frequent pair,
instead of a ratio of likelihoods, and it needs no [UNK] token.

Differences from GPT-2:

- Upper case, white space and the two apostrophes ' and ’ are folded, so a word has fewer
  forms. A small vocabulary and a small model need that.
- An apostrophe stays inside its word, with up to 8 letters behind it: "didn't" carries a
  sentiment that "'t" does not. (So the French "l'intelligence" is cut after "l'intellig".)
- A combining mark belongs to its word. Many scripts write vowels as marks: without this rule
  the Hindi word हिन्दी would fall into six pieces.
- A run of letters is cut after 32 characters, of digits after 4, of punctuation after 8. So a
  megabyte of one letter costs no more than a megabyte of prose.

What is lost and what is kept, in every writing system:

    normalise   makes a text lower case, composes each letter with its accents where Unicode
                has one character for both (NFC), turns ’ into ' and every run of white space
                into one space; a lone surrogate, which UTF-8 cannot represent, becomes "?"
    round trip  decode(encode(text)) == normalise(text), for every string

data/texts.py and data/text_sources.py encode whole collections with it.
"""

import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import chain

import numpy as np


# No text is encoded to these two tokens: "[MASK]" in a text is six ordinary characters.
PAD, MASK = 0, 1
SPECIAL_TOKENS = ("[PAD]", "[MASK]")

FIRST_BYTE = len(SPECIAL_TOKENS)  # byte b is token FIRST_BYTE + b
FIRST_MERGE = FIRST_BYTE + 256    # merge number r makes token FIRST_MERGE + r

FORMAT = "minissl byte-pair tokenizer"


# ---------------------------------------------------------------- From a text to pieces

def combining_marks():
    """Return a string of all characters that combine with a letter, for a pattern.

    Python's re has no name for them. They are Unicode's categories Mn, Mc and Me, and the two
    joiners U+200C and U+200D, which Unicode counts as part of a word (UTS #18, Annex C).
    """
    # All marks lie below U+20000, except for the variation selectors at U+E0100.
    codes = [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]
    marks = [chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M")]
    return "".join(marks) + "\u200c\u200d"


def piece_pattern(letter):
    """Return the pattern of one piece: no merge crosses the border of a piece.

    A piece may begin with one space. `letter` is the pattern of one letter.
    """
    word = rf"{letter}{{1,32}}(?:'{letter}{{1,8}})?"      # film, didn't
    number = r"\d{1,4}"                                   # 1999
    punctuation = r"(?:[^\w\s]|_){1,8}"                   # ...
    return re.compile(rf" ?(?:{word}|{number}|{punctuation})")


# In Python's re, [^\W\d_] is a letter of any alphabet. The condition (?![\x00-\x7f]), "the next
# character is not ASCII", saves looking through the long list of marks at the end of most words.
# Most English texts are pure ASCII, and for them [a-z] is enough and twice as fast.
LETTER_OR_MARK = rf"(?:[^\W\d_]|(?![\x00-\x7f])[{combining_marks()}])"
PIECE = piece_pattern(LETTER_OR_MARK)
ASCII_PIECE = piece_pattern("[a-z]")


def normalise(text):
    """Return the text in lower case and in NFC, with single spaces between its words.

    >>> normalise("A  Film,\\nBRILLIANT")
    'a film, brilliant'
    >>> normalise("It’s a cafe\\u0301") == "it's a café"
    True
    """
    without_surrogates = text.encode("utf-8", "replace").decode("utf-8")
    composed = unicodedata.normalize("NFC", without_surrogates.lower())
    words = composed.replace("’", "'").split()
    return " ".join(words)


def split_pieces(text, leading_space=True):
    """Return the normalised text as a list of pieces; merges happen inside a piece only.

    The first word gets a space before it, like every other word. So a word is the same token
    wherever it stands. leading_space=False leaves that space out.

    >>> split_pieces("A film, I didn't")
    [' a', ' film', ',', ' i', " didn't"]
    >>> split_pieces("हिन्दी 1999")
    [' हिन्दी', ' 1999']
    """
    text = normalise(text)
    if text and leading_space:
        text = " " + text
    pattern = ASCII_PIECE if text.isascii() else PIECE
    return pattern.findall(text)


# ---------------------------------------------------------------- Learning the merges

def merge(ids, pair, new_id):
    """Return the list ids with every occurrence of the pair replaced, from left to right.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 9)
    [9, 3, 9]
    """
    merged = []
    i = 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def count_pieces(texts):
    """Return a Counter of the distinct pieces of an iterable of strings.

    Beyond a million distinct pieces the rarer half is dropped, which bounds the memory.

    >>> count_pieces(["a film", "a boat"])
    Counter({' a': 2, ' film': 1, ' boat': 1})
    """
    counted = Counter()
    for text in texts:
        counted.update(split_pieces(text))
        if len(counted) > 2**20:
            counted = Counter(dict(counted.most_common(2**19)))
    return counted


def train_tokenizer(texts, vocabulary_size, report=None):
    """Learn the merges from an iterable of strings and return a Tokenizer.

    Counting all pairs again after each merge is too slow. Here every distinct piece is stored
    once with its count, and an index from each pair to its pieces lets a merge touch only
    those. (EXPERIMENTS.md, "How long do the small parts take?", has the time.)

    Arguments: texts, an iterable of str; vocabulary_size, int, which counts the special
    tokens and the bytes as well; report, a function that is called with (merges made, merges
    wanted) after every 100 merges.
    The Tokenizer has fewer entries than vocabulary_size when no more pairs occur twice.
    Of pairs that are equally frequent the smaller one is merged first. So the order of the texts
    does not matter (up to the million distinct pieces of count_pieces).
    Raises ValueError if vocabulary_size is too small for the special tokens and the bytes.
    """
    if vocabulary_size < FIRST_MERGE:
        raise ValueError(
            f"vocabulary size {vocabulary_size}: must be at least {FIRST_MERGE} "
            f"({FIRST_BYTE} special tokens and 256 bytes)"
        )
    counted = count_pieces(texts)
    pieces = [[FIRST_BYTE + byte for byte in piece.encode()] for piece in counted]
    counts = list(counted.values())

    pair_counts = Counter()
    pieces_with = defaultdict(set)            # pair -> the pieces that contain it, or once did
    for index, ids in enumerate(pieces):
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += counts[index]
            pieces_with[pair].add(index)

    # A heap gives the most frequent pair at once: its entries are (-count, pair). An entry can
    # be out of date. Its true count can only be lower, because a merge adds occurrences only
    # to pairs that contain the new token. So it is enough to check the entry that comes out
    # first, and to push it back with its true count.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    wanted = vocabulary_size - FIRST_MERGE
    while heap and len(merges) < wanted:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != pair_counts[pair]:
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if pair_counts[pair] < 2:             # from here on no pair occurs twice
            break

        new_id = FIRST_MERGE + len(merges)
        merges.append(pair)
        new_pairs = set()
        for index in pieces_with.pop(pair):
            old_ids = pieces[index]
            new_ids = merge(old_ids, pair, new_id)
            pieces[index] = new_ids
            for neighbours in zip(old_ids, old_ids[1:]):
                pair_counts[neighbours] -= counts[index]
            for neighbours in zip(new_ids, new_ids[1:]):
                pair_counts[neighbours] += counts[index]
                if new_id in neighbours:
                    pieces_with[neighbours].add(index)
                    new_pairs.add(neighbours)
        for new_pair in new_pairs:
            heapq.heappush(heap, (-pair_counts[new_pair], new_pair))

        if report and len(merges) % 100 == 0:
            report(len(merges), wanted)
    return Tokenizer(merges)


# ---------------------------------------------------------------- Applying the merges

def is_mergeable(pair, new_id):
    """True if the pair is two ordinary tokens that are older than new_id.

    >>> is_mergeable((2, 258), 259), is_mergeable((2, 259), 259), is_mergeable((0, 2), 259)
    (True, False, False)
    """
    if len(pair) != 2:
        return False
    return all(type(token) is int and FIRST_BYTE <= token < new_id for token in pair)


class Tokenizer:
    """A vocabulary and its merges. len(tokenizer) is the vocabulary size V.

    tokenizer.merges    list of (left token, right token), in the order they were learned
    tokenizer.bytes_of  list of bytes: what each token stands for
    tokenizer.dtype     the smallest integer type that holds every token
    """

    def __init__(self, merges):
        """merges: pairs of int; number r may use the tokens below FIRST_MERGE + r.

        Raises ValueError if a pair uses another token or occurs twice.
        """
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {}                        # pair -> the token that it is merged into
        self.bytes_of = [name.encode() for name in SPECIAL_TOKENS]
        self.bytes_of += [bytes([byte]) for byte in range(256)]
        for new_id, pair in enumerate(self.merges, FIRST_MERGE):
            if not is_mergeable(pair, new_id) or pair in self.rank:
                raise ValueError(
                    f"merge {new_id - FIRST_MERGE}, {pair}: expected two earlier tokens that "
                    f"were not merged before"
                )
            left, right = pair
            self.rank[pair] = new_id
            self.bytes_of.append(self.bytes_of[left] + self.bytes_of[right])
        self.dtype = np.uint16 if len(self) <= 2**16 else np.int32
        # A text repeats its words, so most pieces are looked up and not worked out again. The
        # cache holds a million pieces at most.
        self.encode_piece_cached = lru_cache(2**20)(self.encode_piece)

    def __reduce__(self):
        """For pickle: the merges are enough to build the same tokenizer again."""
        return Tokenizer, (self.merges,)

    def __len__(self):
        return FIRST_MERGE + len(self.merges)

    def encode(self, text, leading_space=True):
        """Return the tokens of a string: (T,) uint16, or int32 when V > 65,536.

        The empty text has T = 0. For leading_space see split_pieces.
        """
        pieces = split_pieces(text, leading_space)
        ids_of_pieces = map(self.encode_piece_cached, pieces)
        return np.fromiter(chain.from_iterable(ids_of_pieces), self.dtype)

    def encode_piece(self, piece):
        """Return the tokens of one piece as a list, by the merges in the order of training."""
        ids = [FIRST_BYTE + byte for byte in piece.encode()]
        while len(ids) > 1:
            earliest = min(zip(ids, ids[1:]), key=self.rank_of)
            if earliest not in self.rank:
                break
            ids = merge(ids, earliest, self.rank[earliest])
        return ids

    def rank_of(self, pair):
        """Return the token that a pair is merged into; a number above all if it never is."""
        return self.rank.get(pair, len(self))

    def decode(self, ids):
        """Return the string of any sequence of tokens.

        Bytes that are not UTF-8, such as half of a character, become U+FFFD. The special
        tokens show as "[PAD]" and "[MASK]".
        """
        text = b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ")

    def to_json(self):
        """Return the tokenizer as a string, for a file."""
        return json.dumps({"format": FORMAT, "merges": self.merges})

    @classmethod
    def from_json(cls, text):
        """Return the Tokenizer of a string that to_json made.

        Raises ValueError if it is another text or its merges are not well formed.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT or not isinstance(data["merges"], list):
                raise ValueError(f"not a {FORMAT}")
            return cls(data["merges"])
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a {FORMAT}: {error!r}") from None
