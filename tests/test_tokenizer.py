"""The tokenizer: the merges against a naive recount and a published example, and the round trip of hard strings."""

import pickle
import random
import time

import numpy as np
import pytest

from minissl.tokenizer import FIRST_BYTE, FIRST_MERGE, MASK, PAD, Tokenizer, normalise, split_pieces, train

SENNRICH = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3


def names(tokenizer):
    return [tokenizer.bytes_of[i].decode() for i in range(FIRST_MERGE, len(tokenizer))]


def random_words(seed, n=300):
    rng = random.Random(seed)
    return ["".join(rng.choices("aabbcé7'", k=rng.randint(1, 8))) for _ in range(n)]


def random_string(rng):
    """Half of the characters from all of Unicode, lone surrogates included, half from where it hurts."""
    hard = "aB7 _'\n\r\t\0[]\u00a0\u0301\u200d\u2028\u0130\u03a3\ud800\udfff"
    return "".join(rng.choice([chr(rng.randrange(0x110000)), rng.choice(hard)]) for _ in range(rng.randrange(30)))


HARD = ["", " ", " \t\n \u3000", " a ", "👩\u200d👩\u200d👧 a family 👍🏽", "a\0b \0 c", "שלום עולם، مرحبا",
        "line\r\n\r\nline\r", "e\u0301a\u0308\u0323 \u0301alone", "\ud800", "a\udfff\ud83d\ude00b",
        "__init__ snake_case _", "3.14159 1000000 ٣٤٥ ½ ²", "don't 'tis o'clock' ''", "[MASK]", "a [PAD] b [MASK]c",
        "ΣΊΣΥΦΟΣ İstanbul STRASSE ẞ",
        "!" * 100, "x" * 33, "1" * 9, "\u2028a\u0085b\x1cc", "漢字かな交じり文", "\ufeffbom \ufffd"]


# ---------------------------------------------------------------- learning the merges

def test_the_published_example_worked_by_hand():
    # Sennrich et al. 2016, algorithm 1. Their first merges are e s, es t, est </w>, l o, lo w. Ours stand for the same
    # words; only the mark of a word is a space before it, and of equal counts the smaller pair comes first:
    #   e s 9 (s t as often, but e < s), es t 9; then ␣l, l o, o w at 7: ␣l; o w (its numbers are below those of ␣l o);
    #   ␣l ow; then ␣n, n e, e w, w est at 6: ␣n; e w; ␣n ew; ␣new est; then 3: ␣w; d est; i dest; ␣w idest; then 2.
    tokenizer = train(SENNRICH, 1000)
    assert names(tokenizer) == ["es", "est", " l", "ow", " low", " n", "ew", " new", " newest",
                                " w", "dest", "idest", " widest", "er", " lower"]
    e, s, t = (FIRST_BYTE + ord(letter) for letter in "est")
    assert tokenizer.merges[:2] == [(e, s), (FIRST_MERGE, t)]
    lowest = tokenizer.encode("lowest")                                  # the paper's point: a new word of known parts
    assert [tokenizer.bytes_of[i] for i in lowest] == [b" low", b"est"]


@pytest.mark.parametrize("seed", range(4))
def test_train_and_encode_agree_with_counting_everything_again_at_each_step(seed):
    words = random_words(seed)
    pieces = [[FIRST_BYTE + byte for byte in piece.encode()] for word in words for piece in split_pieces(word)]
    merges = []
    for new in range(FIRST_MERGE, FIRST_MERGE + 60):
        counts = {}
        for piece in pieces:
            for i in range(len(piece) - 1):
                counts[piece[i], piece[i + 1]] = counts.get((piece[i], piece[i + 1]), 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))       # the most frequent, of equals the smallest
        assert counts[best] >= 2
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i:i + 2] = [new]
                i += 1
        merges.append(best)
    tokenizer = train(words, FIRST_MERGE + 60)
    assert tokenizer.merges == merges
    assert np.concatenate([tokenizer.encode(word) for word in words]).tolist() == sum(pieces, [])


def test_the_vocabulary_ends_with_the_text_and_has_a_minimum():
    assert len(train(SENNRICH, 60000)) == FIRST_MERGE + 15
    assert len(train(SENNRICH, FIRST_MERGE + 4)) == FIRST_MERGE + 4
    assert len(train(SENNRICH, 258)) == len(train([], 1000)) == FIRST_MERGE == 258
    with pytest.raises(ValueError, match="257.*258"):
        train(SENNRICH, 257)


def test_the_order_of_the_texts_does_not_matter():
    words = random_words(9)
    merges = train(words, 400).merges
    for seed in range(3):
        random.Random(seed).shuffle(words)
        assert train(words, 400).merges == merges
    assert train([" ".join(words)], 400).merges == merges                # nor how they are cut into texts


# ---------------------------------------------------------------- the round trip

def test_every_string_comes_back_normalised_and_none_gives_a_special_token():
    rng = random.Random(0)
    tokenizer = train(SENNRICH + HARD * 2, 600)
    for text in HARD + [random_string(rng) for _ in range(500)]:
        plain = normalise(text)
        assert normalise(plain) == plain
        for leading_space in (True, False):
            assert "".join(split_pieces(text, leading_space)) == (" " + plain if leading_space and plain else plain)
            ids = tokenizer.encode(text, leading_space)
            assert tokenizer.decode(ids) == plain and ids.dtype == np.uint16
            assert PAD not in ids and MASK not in ids                    # also for "[MASK]" and "[PAD]": they are text


def test_normalise_folds_case_and_white_space_and_nothing_else():
    assert normalise(" A\r\n\tFilm,\u00a0 BRILLIANT \n") == "a film, brilliant"
    assert normalise("\ud83dÉ_1\0’[MASK]") == "?é_1\0’[mask]"


def test_decode_shows_special_tokens_by_name_and_half_a_character_as_u_fffd():
    tokenizer = train([], 258)
    assert tokenizer.decode([PAD, MASK]) == "[PAD][MASK]"
    assert tokenizer.decode(tokenizer.encode("é")[:-1]) == "\ufffd"


def test_a_megabyte_of_one_letter_takes_no_longer_than_prose():
    start, text = time.perf_counter(), "a" * 10**6
    assert set(split_pieces(text)) == {" " + "a" * 32, "a" * 32}         # each piece is short, and worked out once
    tokenizer = train([text], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 2


def test_a_text_encodes_alike_whole_and_in_words_at_once_and_again():
    words = random_words(5)
    tokenizer = train(words[:100], 350)
    fresh = Tokenizer.from_json(tokenizer.to_json())                     # has met no word yet
    whole = fresh.encode(" ".join(words))
    assert np.array_equal(whole, np.concatenate([tokenizer.encode(word) for word in words]))
    assert np.array_equal(whole, fresh.encode(" ".join(words)))
    assert fresh.merges == tokenizer.merges and len(fresh) == len(tokenizer) and fresh.bytes_of == tokenizer.bytes_of


def test_token_numbers_are_uint16_as_long_as_they_fit():
    pairs = [(FIRST_BYTE + left, FIRST_BYTE + right) for left in range(256) for right in range(256)]
    for V, dtype in [(2**16, np.uint16), (2**16 + 1, np.int32)]:
        tokenizer = Tokenizer(pairs[:V - FIRST_MERGE])
        assert len(tokenizer) == V and tokenizer.encode("text").dtype == dtype


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", '"merges"', "{", '{"merges": [[7, 8]',
                                  '{"format": "another", "merges": []}',
                                  pytest.param("[" * 100000, id="too deep")])
def test_a_text_that_is_no_tokenizer_is_a_value_error(text):
    with pytest.raises(ValueError):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("merges", [
    "null", "3", '"ab"', '["ab"]', "[7]", "[[7]]", "[[7, 8, 9]]", "[[null, 7]]", '[["a", "b"]]', '[["7", "8"]]',
    "[[7.5, 8]]", "[[7, NaN]]", "[[7, Infinity]]", "[[7, 258]]", "[[-1, 7]]", "[[0, 7]]", "[[7, 1]]",
    "[[259, 7], [7, 8]]", "[[7, 8], [7, 8]]"])
def test_malformed_merges_are_a_value_error(merges):
    with pytest.raises(ValueError):
        Tokenizer.from_json(f'{{"format": "minissl byte-pair tokenizer", "merges": {merges}}}')


def test_a_tokenizer_goes_to_another_process():
    tokenizer = train(["the ship sails and the ship waits"] * 9, 300)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.merges == tokenizer.merges
    assert again.encode("the ship").tolist() == tokenizer.encode("the ship").tolist()
