"""Texts: the same tokens in every form, the cache, and the pairs of neighbours."""

import errno
import os
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import story

from minissl import UserError, tokenizer
from minissl.data import text_sources
from minissl.data import texts as texts_module
from minissl.data.splits import TRAIN
from minissl.data.text_sources import load_texts
from minissl.data.texts import Texts, add_counts, count_terms, encode_texts, frequent_pairs
from minissl.training import files as files_module
from minissl.transformer import TextEncoder


def strings(texts):
    return [texts.tokenizer.decode(texts[i].tolist()) for i in range(len(texts))]


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return str(folder)


# ---------------------------------------------------------------- The texts in memory

def test_padded_and_flat_hold_the_same_tokens(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    indices = np.array([5, 199, 0])
    padded, lengths = texts.padded(indices)
    flat, owner = texts.flat(indices)
    assert padded.dtype == flat.dtype == np.int64
    for row, i in enumerate(indices):
        text = texts[i].tolist()
        assert padded[row, :lengths[row]].tolist() == text
        assert not padded[row, lengths[row]:].any()
        assert flat[owner == row].tolist() == text + [0]


def test_padded_takes_slices_at_offsets(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    indices, offsets, lengths = np.array([7, 199, 3]), np.array([0, 5, 2]), np.array([4, 1, 9])
    padded, returned = texts.padded(indices, offsets, lengths)
    assert padded.shape == (3, 9) and returned.tolist() == [4, 1, 9]
    for row, (i, offset, length) in enumerate(zip(indices, offsets, lengths)):
        assert padded[row, :length].tolist() == texts[i][offset:offset + length].tolist()
        assert not padded[row, length:].any()


def test_long_texts_are_cut_into_equal_parts_without_loss(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400).select(np.array([5, 199, 0]))
    cut = texts.split_long(10)
    assert cut.lengths.max() <= 10 and cut.lengths.min() >= 5
    for label in (0, 1):
        parts = cut.select(cut.labels == label)
        whole = texts.select(texts.labels == label)
        assert np.concatenate([parts[i] for i in range(len(parts))]).tolist() == (
            np.concatenate([whole[i] for i in range(len(whole))]).tolist()
        )


def test_chunks_and_samples_are_of_the_texts_in_their_order(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    assert np.concatenate(texts.chunks(30)).tolist() == list(range(200))
    for size in (1, 30, 67, 101, 200, 300):
        sizes = [len(indices) for indices in texts.chunks(size)]
        assert max(sizes) < 2 * size and min(sizes) >= min(size, 200)
    sample = texts.sample(3)
    assert [sample[i].tolist() for i in range(3)] == [texts[i].tolist() for i in (0, 99, 199)]


def test_any_iterable_of_strings_is_encoded():
    words = ["the ship", "a sea"]
    learned = tokenizer.train_tokenizer(words, 300)
    for many in (words, tuple(words), iter(words), (word for word in words), np.array(words),
                 dict.fromkeys(words)):
        texts = encode_texts(many, learned)
        assert strings(texts) == words
        assert texts.labels.tolist() == [-1, -1] and texts.split.tolist() == [TRAIN, TRAIN]


@pytest.mark.parametrize("many, sentence", [
    ([], "got an empty one"), (iter([]), "got an empty one"), ("a text", "got one string"),
    (b"a text", "got one string"), (None, "got NoneType"), (3, "got int"),
    (["a", 3], "text 1: expected a string, got int"),
    (["a", b"b"], "text 1: expected a string, got bytes"), (["a", "b", " \n"], "text 2 has no"),
])
def test_what_is_no_list_of_texts_gets_a_sentence(many, sentence):
    with pytest.raises(UserError, match=sentence):
        encode_texts(many, tokenizer.train_tokenizer([], 258))


def test_a_part_of_a_book_fills_the_window_twice(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    book = texts.select([0])
    for length in (1024, 1025, 5000, 5001, 9000):
        book = replace(book, lengths=np.array([length]))
        for window in (10, 256, 600):
            parts = book.cut_long_texts(window).lengths
            assert parts.sum() == length and parts.max() <= max(1024, 4 * window)
            assert len(parts) == 1 or parts.min() >= 2 * window


# ---------------------------------------------------------------- Words and pairs of neighbours

def test_terms_are_counted_as_a_loop_does(corpus, tmp_path, monkeypatch):
    texts = load_texts(str(corpus), tmp_path, 300)
    pairs = frequent_pairs(texts, 50)
    model = TextEncoder(300, pairs, width=8, layers=0, heads=1)
    counts = Counter()
    for i in range(len(texts)):
        tokens = texts[i].tolist()
        counts.update(tokens)
        counts.update(300 + left * 300 + right for left, right in zip(tokens, tokens[1:]))
    keys = [*range(300), *(300 + pairs).tolist()]
    assert count_terms(texts, model).tolist() == [counts[key] for key in keys]
    monkeypatch.setattr(Texts, "chunks", lambda self, size: np.array_split(np.arange(200), 7))
    assert count_terms(texts, model).tolist() == [counts[key] for key in keys]


def test_pairs_are_counted_as_a_loop_does(corpus, tmp_path, monkeypatch):
    texts = load_texts(str(corpus), tmp_path, 300)
    counts = Counter()
    for i in range(len(texts)):
        tokens = texts[i].tolist()
        counts.update(left * 300 + right for left, right in zip(tokens, tokens[1:]))
    expected = sorted(key for key, count in counts.items() if count >= 20)

    def seven_chunks(self, size):
        return np.array_split(np.arange(len(self)), 7)

    assert frequent_pairs(texts, 10**6).tolist() == expected
    monkeypatch.setattr(Texts, "chunks", seven_chunks)
    assert frequent_pairs(texts, 10**6).tolist() == expected
    assert frequent_pairs(texts, 10**6, least=1).tolist() == sorted(counts)
    five = frequent_pairs(texts, 5).tolist()
    assert five == sorted(five)
    assert sorted(counts[key] for key in five) == sorted(counts.values())[-5:]


def test_counts_of_equal_keys_are_added():
    rng = np.random.default_rng(0)
    keys, counts, expected = np.zeros(0, np.int64), np.zeros(0, np.int64), Counter()
    for _ in range(20):
        more = np.unique(rng.integers(0, 99, 30))
        more_counts = rng.integers(1, 2**40, len(more))          # no float: they are exact
        keys, counts = add_counts(keys, counts, more, more_counts)
        expected.update(dict(zip(more.tolist(), more_counts.tolist())))
        assert dict(zip(keys.tolist(), counts.tolist())) == dict(expected)
        assert keys.tolist() == sorted(expected)


# ---------------------------------------------------------------- Learning the tokenizer

def test_texts_beyond_the_sample_are_encoded(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "SAMPLE_BYTES", 2000)
    expected = [story(topic, n).lower() for topic in ("city", "sea") for n in range(100)]
    assert strings(load_texts(str(corpus), tmp_path, 300)) == expected


def test_a_vocabulary_smaller_than_wanted_is_said(tmp_path):
    folder = write_files(tmp_path / "texts", {"a.txt": "la la la", "b.txt": "so so so"})
    sentence = "the text is too short for 400 subwords, so the vocabulary has 262"
    assert sentence in load_texts(folder, tmp_path, 400).notes
    assert not any("vocabulary" in note for note in load_texts(folder, tmp_path, 262).notes)


# ---------------------------------------------------------------- The cache

def test_the_cache_is_used_the_second_time(corpus, tmp_path, monkeypatch):
    first = load_texts(str(corpus), tmp_path, 400)
    monkeypatch.setattr(text_sources, "encode_documents", None)      # calling it would fail
    second = load_texts(str(corpus), tmp_path, 400)
    assert np.array_equal(first.tokens, second.tokens) and first.notes == second.notes


def test_an_edited_file_is_encoded_again(tmp_path):
    files = {f"a/{n}.txt": f"text number {n}" for n in range(10)}
    folder = write_files(tmp_path / "texts", files)
    assert "text number 3" in strings(load_texts(folder, tmp_path, 300))
    write_files(tmp_path / "texts", {"a/3.txt": "next number 4"})    # as many bytes as before
    assert "next number 4" in strings(load_texts(folder, tmp_path, 300))


@pytest.mark.parametrize("name", ["tokens.bin", "index.npz"])
def test_a_damaged_cache_is_made_anew(name, corpus, tmp_path, capsys):
    # A copy of the tokens, because the file that they are mapped from is about to be cut.
    first = np.array(load_texts(str(corpus), tmp_path, 400).tokens)
    cache, = (tmp_path / "cache").iterdir()
    whole = (cache / name).read_bytes()
    half, one_bit = whole[:len(whole) // 2], bytearray(whole)
    one_bit[99] ^= 4
    for damaged in (half, bytes(one_bit), b""):
        (cache / name).write_bytes(damaged)
        assert np.array_equal(load_texts(str(corpus), tmp_path, 400).tokens, first)
        assert capsys.readouterr().err.count("is damaged") == 1
        assert (cache / name).read_bytes() == whole
        assert list((tmp_path / "cache").iterdir()) == [cache]


def test_a_cache_is_for_one_vocabulary_tokenizer_and_folder(tmp_path):
    names = [f"a/{n}.txt" for n in range(10)] + [f"b/{n}.txt" for n in range(1, 10)]
    files = {name: f"text of number {n}" for n, name in enumerate(names)}
    folder = write_files(tmp_path / "texts", files)

    def load(vocabulary_size, learned=None):
        return load_texts(folder, tmp_path / "data", vocabulary_size, tokenizer=learned)

    assert len(load(264).tokenizer) == 264 and len(load(262).tokenizer) == 262
    another = tokenizer.train_tokenizer(["words of another text, of another text"], 264)
    assert load(264, another).tokenizer.merges == another.merges
    assert np.bincount(load(264).labels).tolist() == [10, 9]
    moved = tmp_path / "texts" / "a" / "9.txt"
    moved.rename(tmp_path / "texts" / "b" / "0.txt")     # the contents keep their order
    assert np.bincount(load(264).labels).tolist() == [9, 10]


@pytest.mark.parametrize("moment", ["before encoding", "after encoding"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_cache_that_appears_meanwhile_is_used(moment, damaged, corpus, tmp_path, monkeypatch):
    """Another run finishes the same cache at the worst moment, perhaps over a damaged one."""
    if damaged:
        load_texts(str(corpus), tmp_path, 400)
        cache, = (tmp_path / "cache").iterdir()
        (cache / "index.npz").write_bytes(b"")
    place = {"before encoding": (text_sources, "encode_documents"),
             "after encoding": (texts_module, "put_in_place")}[moment]
    original = getattr(*place)
    theirs = []

    def another_run_comes_first(*arguments):
        monkeypatch.setattr(*place, original)
        texts = load_texts(str(corpus), tmp_path, 400)           # it reads them from now on
        theirs.append((texts, os.stat(texts.tokens.filename).st_ino))
        original(*arguments)

    monkeypatch.setattr(*place, another_run_comes_first)
    assert len(load_texts(str(corpus), tmp_path, 400)) == 200
    cache, = (tmp_path / "cache").iterdir()
    (_, inode), = theirs
    assert (cache / "tokens.bin").stat().st_ino == inode          # the same file


def test_other_users_may_read_the_cache(corpus, tmp_path):
    load_texts(str(corpus), tmp_path / "data", 400)
    cache, = (tmp_path / "data" / "cache").iterdir()
    assert cache.stat().st_mode == (tmp_path / "data").stat().st_mode


def test_a_cache_that_cannot_be_replaced_gets_a_sentence(corpus, tmp_path, monkeypatch):
    load_texts(str(corpus), tmp_path, 400)
    cache, = (tmp_path / "cache").iterdir()
    (cache / "index.npz").write_bytes(b"")

    def refuse(*paths):
        raise PermissionError("another user's")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="neither be read nor replaced: delete it, or give"):
        load_texts(str(corpus), tmp_path, 400)


def test_a_data_dir_that_is_a_file_gets_a_sentence(corpus, tmp_path, capsys):
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(UserError) as caught:
        load_texts(str(corpus), path, 400)
    assert str(caught.value) == (
        f"--data-dir {path}: is not a writable folder; give another --data-dir"
    )
    with pytest.raises(UserError, match="empty.txt: is not a writable folder"):
        load_texts("imdb", path)
    assert "damaged" not in capsys.readouterr().err


def test_a_cache_in_a_read_only_folder_is_used(corpus, tmp_path, monkeypatch):
    first = load_texts(str(corpus), tmp_path, 400)
    monkeypatch.setattr(files_module, "is_writable", lambda path: False)
    assert np.array_equal(load_texts(str(corpus), tmp_path, 400).tokens, first.tokens)
    with pytest.raises(UserError, match="is not a writable folder; give another --data-dir"):
        load_texts(str(corpus), tmp_path, 300)


def test_a_full_disk_is_named(corpus, tmp_path, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")    # as file.write does

    monkeypatch.setattr(texts_module, "write_cache", no_space)
    with pytest.raises(OSError) as caught:
        load_texts(str(corpus), tmp_path, 400)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.startswith(str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unreadable_cache_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    def refuse(cache):
        raise PermissionError(errno.EACCES, "Permission denied", str(cache))

    monkeypatch.setattr(texts_module, "open_cache", refuse)
    assert texts_module.read_cache(tmp_path) is None
    assert capsys.readouterr().err == ""


def test_left_overs_of_killed_runs_go_after_a_day(corpus, tmp_path):
    """A killed run leaves NAME.xxxx/NAME/tokens.bin; another one may still be at work there."""
    load_texts(str(corpus), tmp_path, 400)
    cache, = (tmp_path / "cache").iterdir()
    yesterday = time.time() - 25 * 60 * 60
    folders = {}
    for name, file_is_old in (("old", True), ("at_work", False)):
        folder = cache.parent / f"{cache.name}.{name}"
        (folder / cache.name).mkdir(parents=True)
        tokens = folder / cache.name / "tokens.bin"
        tokens.write_bytes(b"12")
        for path in (tokens, folder / cache.name, folder):
            if file_is_old or path != tokens:
                os.utime(path, (yesterday, yesterday))
        folders[name] = folder
    for name in ("mine.old", cache.name):                         # these are nobody's left-overs
        (cache.parent / name).mkdir(exist_ok=True)
        os.utime(cache.parent / name, (yesterday, yesterday))
    load_texts(str(corpus), tmp_path, 300)
    assert not folders["old"].exists() and folders["at_work"].exists()
    assert cache.exists() and (cache.parent / "mine.old").exists()
