"""The tokenizer: its merges against a naive recount and a published example, the round trip."""

import pickle
import random
import sys
import time
import unicodedata
from itertools import chain

import numpy as np
import pytest

from minissl.tokenizer import (
    FIRST_BYTE,
    FIRST_MERGE,
    MASK,
    PAD,
    PIECE,
    Tokenizer,
    normalise,
    split_pieces,
    train_tokenizer,
)


SENNRICH = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3


def names(tokenizer):
    return [tokenizer.bytes_of[i].decode() for i in range(FIRST_MERGE, len(tokenizer))]


def random_words(seed, n=300):
    rng = random.Random(seed)
    return ["".join(rng.choices("aabbcé7'", k=rng.randint(1, 8))) for _ in range(n)]


def random_string(rng):
    """Half of the characters from all of Unicode, surrogates included, half from where it hurts."""
    hard = "aB7 _'’\n\r\t\0[]\u00a0\u0301\u200d\u2028\u0130\u03a3\ud800\udfff"
    characters = []
    for _ in range(rng.randrange(30)):
        any_character = chr(rng.randrange(sys.maxunicode + 1))
        characters.append(rng.choice([any_character, rng.choice(hard)]))
    return "".join(characters)


HARD = [
    "", " ", " \t\n \u3000", " a ", "👩\u200d👩\u200d👧 a family 👍🏽", "a\0b \0 c",
    "שלום עולם، مرحبا", "line\r\n\r\nline\r", "e\u0301a\u0308\u0323 \u0301alone", "\ud800",
    "a\udfff\ud83d\ude00b", "__init__ snake_case _", "3.14159 1000000 ٣٤٥ ½ ²",
    "don't 'tis o'clock' ''", "[MASK]", "a [PAD] b [MASK]c", "ΣΊΣΥΦΟΣ İstanbul STRASSE ẞ",
    "!" * 100, "x" * 33, "1" * 9, "\u2028a\u0085b\x1cc", "漢字かな交じり文", "\ufeffbom \ufffd",
    "J\u030c",          # one character in lower case only
]

# Words without punctuation, in scripts whose letters combine with marks in different ways.
SCRIPTS = {
    "Latin, composed": "le café résumé naïve tiếng việt",
    "Latin, decomposed": unicodedata.normalize("NFD", "le café résumé naïve tiếng việt"),
    "Latin, typographic": "i didn’t know it wasn’t",
    "Greek": unicodedata.normalize("NFD", "Ελληνική γλώσσα Ἀθῆναι ΛΌΓΟΣ"),
    "Cyrillic": unicodedata.normalize("NFD", "Съешь ещё йогурт м’ята"),
    "Devanagari": "हिन्दी भाषा में लिखा हुआ पाठ",
    "Bengali": "বাংলা ভাষায় লেখা পাঠ্য",
    "Tamil": "தமிழ் மொழியில் எழுதப்பட்டது",
    "Malayalam": "മലയാളം ഭാഷ അവന്\u200d",
    "Thai": "ภาษาไทย ที่นี่ น้ำ",
    "Tibetan": "བོད་ཡིག".replace("་", " "),
    "Arabic, pointed": "كَتَبَ مُحَمَّدٌ رِسَالَةً",
    "Persian": "می\u200cخواهم کتاب\u200cها",
    "Hebrew, pointed": "שָׁלוֹם עֲלֵיכֶם",
    "Chinese": "自然 语言 处理",
    "Japanese": unicodedata.normalize("NFD", "ひらがな カタカナ がぎぐ"),
    "Korean": unicodedata.normalize("NFD", "한국어 문장"),
    "Brahmi, beyond U+FFFF": "𑀩𑁆𑀭𑀸𑀳𑁆𑀫𑀻",
}


# ---------------------------------------------------------------- Learning the merges

def test_the_published_example_worked_by_hand():
    # Sennrich et al. 2016, algorithm 1. Their first merges are e s, es t, est </w>, l o, lo w.
    # Ours stand for the same words. Only the mark of a word is a space before it, and of equal
    # counts the smaller pair comes first:
    #   9 times  e s (s t is as frequent, but e < s), then es t
    #   7 times  ␣l, l o, o w: first ␣l, then o w (smaller numbers than in ␣l o), then ␣l ow
    #   6 times  ␣n, n e, e w, w est: first ␣n, then e w, then ␣n ew, then ␣new est
    #   3 times  ␣w, then d est, then i dest, then ␣w idest
    #   2 times  e r, then ␣low er
    tokenizer = train_tokenizer(SENNRICH, 1000)
    assert names(tokenizer) == [
        "es", "est", " l", "ow", " low", " n", "ew", " new", " newest",
        " w", "dest", "idest", " widest", "er", " lower",
    ]
    e, s, t = (FIRST_BYTE + ord(letter) for letter in "est")
    assert tokenizer.merges[:2] == [(e, s), (FIRST_MERGE, t)]
    lowest = tokenizer.encode("lowest")          # the paper's point: a new word of known parts
    assert [tokenizer.bytes_of[i] for i in lowest] == [b" low", b"est"]


@pytest.mark.parametrize("seed", range(4))
def test_train_and_encode_agree_with_a_naive_recount(seed):
    words = random_words(seed)
    pieces = []
    for word in words:
        pieces += [[FIRST_BYTE + byte for byte in piece.encode()] for piece in split_pieces(word)]
    merges = []
    for new in range(FIRST_MERGE, FIRST_MERGE + 60):
        counts = {}
        for piece in pieces:
            for pair in zip(piece, piece[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        most = max(counts.values())
        best = min(pair for pair, count in counts.items() if count == most)
        assert most >= 2
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i:i + 2] = [new]
                i += 1
        merges.append(best)
    tokenizer = train_tokenizer(words, FIRST_MERGE + 60)
    assert tokenizer.merges == merges
    encoded = np.concatenate([tokenizer.encode(word) for word in words])
    assert encoded.tolist() == list(chain.from_iterable(pieces))


def test_the_vocabulary_ends_with_the_text_and_has_a_minimum():
    assert len(train_tokenizer(SENNRICH, 60000)) == FIRST_MERGE + 15
    assert len(train_tokenizer(SENNRICH, FIRST_MERGE + 4)) == FIRST_MERGE + 4
    assert FIRST_MERGE == 258
    assert len(train_tokenizer(SENNRICH, 258)) == len(train_tokenizer([], 1000)) == 258
    with pytest.raises(ValueError, match="257.*258"):
        train_tokenizer(SENNRICH, 257)


def test_the_order_of_the_texts_does_not_matter():
    words = random_words(9)
    merges = train_tokenizer(words, 400).merges
    for seed in range(3):
        random.Random(seed).shuffle(words)
        assert train_tokenizer(words, 400).merges == merges
    one_text = " ".join(words)                       # nor how they are cut into texts
    assert train_tokenizer([one_text], 400).merges == merges


# ---------------------------------------------------------------- The round trip

def test_every_string_comes_back_normalised():
    rng = random.Random(0)
    tokenizer = train_tokenizer(SENNRICH + HARD * 2, 600)
    for text in HARD + [random_string(rng) for _ in range(500)]:
        plain = normalise(text)
        assert normalise(plain) == plain
        for leading_space in (True, False):
            pieces = split_pieces(text, leading_space)
            assert "".join(pieces) == (" " + plain if leading_space and plain else plain)
            ids = tokenizer.encode(text, leading_space)
            assert tokenizer.decode(ids) == plain and ids.dtype == np.uint16
            assert PAD not in ids and MASK not in ids     # also for "[MASK]": that is text


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_word_is_one_piece_in_every_script(text):
    words = text.split()
    expected = unicodedata.normalize("NFC", text.lower()).replace("’", "'")
    assert normalise(text) == expected
    assert split_pieces(text) == [" " + word for word in expected.split()]
    untrained = train_tokenizer([], 258)
    assert untrained.decode(untrained.encode(text)) == expected
    trained = train_tokenizer([text] * 2, 2000)
    assert len(trained.encode(text)) == len(words)               # a token a word, as in English
    assert trained.decode(trained.encode(text)) == expected


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_composed_and_decomposed_text_give_equal_tokens(text):
    tokenizer = train_tokenizer([text] * 2, 400)
    tokens = tokenizer.encode(text).tolist()
    for form in ("NFC", "NFD"):
        assert tokenizer.encode(unicodedata.normalize(form, text)).tolist() == tokens


def test_both_apostrophes_stay_in_the_word_and_are_alike():
    assert split_pieces("I didn’t, “she’d said”") == (
        [" i", " didn't", ",", " “", "she'd", " said", "”"]
    )
    assert split_pieces("didn’t") == split_pieces("didn't") == [" didn't"]


def test_every_mark_of_unicode_belongs_to_its_word():
    marks = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me"):
            marks.append(chr(code))
    assert len(marks) > 2000
    for mark in marks:
        word = f"x{mark}y"
        assert PIECE.findall(word) == [word]
    assert PIECE.findall("❤\ufe0f 1\ufe0f\u20e3") == ["❤\ufe0f", " 1", "\ufe0f\u20e3"]


def test_normalise_is_settled_for_every_character():
    codes = [*range(0x32000), *range(0xE0000, 0xE1000)]          # the rest is not assigned
    characters = " ".join(map(chr, codes))
    plain = normalise(characters)
    assert normalise(plain) == plain
    assert "".join(split_pieces(characters)) == " " + plain


def test_normalise_folds_case_space_accents_and_apostrophes():
    assert normalise(" A\r\n\tFilm,\u00a0 BRILLIANT \n") == "a film, brilliant"
    assert normalise("\ud83dÉ_1\0’[MASK]") == "?é_1\0'[mask]"
    assert normalise("E\u0301 ½ ﬁ ‘x’ `") == "é ½ ﬁ ‘x' `"      # NFC and not NFKC


def test_decode_shows_special_tokens_and_half_a_character():
    tokenizer = train_tokenizer([], 258)
    assert tokenizer.decode([PAD, MASK]) == "[PAD][MASK]"
    assert tokenizer.decode(tokenizer.encode("é")[:-1]) == "\ufffd"


@pytest.mark.parametrize("letter", ["a", "é", "\u0301"])
def test_a_megabyte_of_one_letter_is_as_fast_as_prose(letter):
    start = time.perf_counter()
    text = letter * 10**6
    assert set(split_pieces(text)) == {" " + letter * 32, letter * 32}   # worked out once each
    tokenizer = train_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 2


def test_a_text_is_encoded_alike_whole_and_in_words():
    words = random_words(5)
    tokenizer = train_tokenizer(words[:100], 350)
    fresh = Tokenizer.from_json(tokenizer.to_json())             # has met no word yet
    whole = fresh.encode(" ".join(words))
    assert np.array_equal(whole, np.concatenate([tokenizer.encode(word) for word in words]))
    assert np.array_equal(whole, fresh.encode(" ".join(words)))
    assert fresh.merges == tokenizer.merges and len(fresh) == len(tokenizer)
    assert fresh.bytes_of == tokenizer.bytes_of


# ---------------------------------------------------------------- The Tokenizer as an object

def test_tokens_are_uint16_as_long_as_they_fit():
    bytes_ = range(FIRST_BYTE, FIRST_MERGE)
    pairs = [(left, right) for left in bytes_ for right in bytes_]
    for V, dtype in [(2**16, np.uint16), (2**16 + 1, np.int32)]:
        tokenizer = Tokenizer(pairs[:V - FIRST_MERGE])
        assert len(tokenizer) == V and tokenizer.encode("text").dtype == dtype


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "null", "3", '"merges"', "{", '{"merges": [[7, 8]',
    '{"format": "another", "merges": []}', pytest.param("[" * 100000, id="too deep"),
])
def test_a_text_that_is_no_tokenizer_is_a_value_error(text):
    with pytest.raises(ValueError):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("merges", [
    "null", "3", '"ab"', '["ab"]', "[7]", "[[7]]", "[[7, 8, 9]]", "[[null, 7]]", '[["a", "b"]]',
    '[["7", "8"]]', "[[7.5, 8]]", "[[7, NaN]]", "[[7, Infinity]]", "[[7, 258]]", "[[-1, 7]]",
    "[[0, 7]]", "[[7, 1]]", "[[259, 7], [7, 8]]", "[[7, 8], [7, 8]]",
])
def test_malformed_merges_are_a_value_error(merges):
    with pytest.raises(ValueError):
        Tokenizer.from_json(f'{{"format": "minissl byte-pair tokenizer", "merges": {merges}}}')


def test_a_tokenizer_goes_to_another_process():
    tokenizer = train_tokenizer(["the ship sails and the ship waits"] * 9, 300)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.merges == tokenizer.merges
    assert again.encode("the ship").tolist() == tokenizer.encode("the ship").tolist()
