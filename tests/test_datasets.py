"""What the loaders return, and what they say of odd files."""

import gzip
import hashlib
import io
import os
import re
import tarfile
from collections import Counter

import numpy as np
import pytest

from conftest import story
from minissl import UserError, datasets, documents, files, tokenizer
from minissl.datasets import HELD_OUT, TEST, TRAIN
from minissl.documents import load_texts


def folder_of(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(tmp_path)


def strings(texts):
    return [texts.tokenizer.decode(texts[i].tolist()) for i in range(len(texts))]


def test_a_folder_with_classes_is_split_in_blocks_and_every_text_comes_back_whole(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    assert texts.classes == ["city", "sea"] and texts.tokens.dtype == np.uint16
    assert np.bincount(texts.split).tolist() == [140, 20, 40]
    for label, topic in enumerate(texts.classes):
        mine = texts.select(texts.labels == label)
        assert strings(mine) == [story(topic, n).lower() for n in range(100)]
        assert mine.split.tolist() == [TRAIN] * 70 + [HELD_OUT] * 10 + [TEST] * 20


def test_a_limit_keeps_some_of_each_class_in_each_split_and_their_order(corpus, tmp_path):
    whole, some = load_texts(str(corpus), tmp_path, 400), load_texts(str(corpus), tmp_path, 400, limit=10)
    assert [np.bincount(some.labels[some.split == split]).tolist() for split in (TRAIN, HELD_OUT, TEST)] == [[5, 5]] * 3
    assert [s for s in strings(whole) if s in strings(some)] == strings(some)


def test_the_tokenizer_never_sees_the_test_texts_and_no_text_stands_on_both_sides(tmp_path):
    files = ({f"a/{n:02}.txt": f"common words number {n}" for n in range(10)}
             | {f"b/{n:02}.txt": f"other words {n}" for n in range(10)})
    files["a/09.txt"] = "zyzzyva zyzzyva zyzzyva zyzzyva"         # test texts, by their place
    files["a/08.txt"] = "twin text"
    files["b/00.txt"] = files["a/08.txt"]                         # among the training texts of class b
    texts = load_texts(folder_of(tmp_path / "t", files), tmp_path / "d", 320)
    assert not any("zyz" in token.decode("utf-8", "replace") for token in texts.tokenizer.bytes_of)
    where = [int(texts.split[i]) for i, s in enumerate(strings(texts)) if s == "twin text"]
    assert where == [TEST] and len(texts) == 19 and "1 texts dropped" in texts.notes[-1]


def test_a_twin_is_dropped_from_the_less_precious_split_and_test_texts_all_stay():
    split = np.array([TRAIN, TEST, TEST, HELD_OUT, TRAIN, TRAIN, TRAIN, TRAIN, HELD_OUT], np.uint8)
    labels = np.array([-1, 0, 0, 0, -1, 0, 1, 0, -1])
    hashes = np.array([7, 7, 7, 8, 9, 9, 8, 6, 6], np.uint64)
    assert datasets.without_twins(hashes, split, labels).tolist() == [
        False, True, True, True, False, True, False, False, True]


def test_hidden_and_empty_files_are_passed_over_and_counted(tmp_path, capsys):
    files = {"one.txt": "some words here", "two.txt": "some more words", ".hidden.txt": "no", ".git/x.txt": "no",
             "empty.txt": "", "blank.txt": 70_000 * " " + "\n", "mark.txt": b"\xef\xbb\xbf",
             "wide.txt": "\u3000", "notes.md": "no"}
    (tmp_path / "nothing").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    texts = load_texts(folder_of(tmp_path, files), tmp_path.parent / "d1", 300)
    assert strings(texts) == ["some words here", "some more words"]
    said = capsys.readouterr().err
    assert all(part in said for part in ("2 hidden", "4 empty", "1 not .txt", "1 empty folders", "1 links"))


def test_a_file_is_its_paragraphs_or_without_blank_lines_its_lines(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n\n \nthree\n", encoding="utf-8")
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\nthree")
    assert [" ".join(t.split()) for t in documents.read_texts(tmp_path / "p.txt")] == ["one two", "three"]
    assert [t.strip() for t in documents.read_texts(tmp_path / "l.txt")] == ["one", "two", "three"]


def test_a_line_of_megabytes_is_read_in_pieces_without_losing_a_character(tmp_path):
    text = "añ€😀" * 1_000_000                                    # 10 MB, no newline; blocks end inside characters
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces = list(documents.read_texts(tmp_path / "long.txt"))
    assert "".join(pieces) == text and len(pieces) > 3 and max(map(len, pieces)) <= 2 * documents.TEXT_BYTES


def test_the_lines_of_a_very_large_file_are_read_together(tmp_path, monkeypatch):
    (tmp_path / "l.txt").write_text("".join(f"line {n}\n" for n in range(100)), encoding="utf-8")
    pieces = list(documents.read_texts(tmp_path / "l.txt", least=50))
    assert ("".join(pieces) == (tmp_path / "l.txt").read_text(encoding="utf-8")
            and all(50 <= len(p) < 60 for p in pieces[:-1]))
    assert len(load_texts(str(tmp_path / "l.txt"), tmp_path / "data", 300)) == 100
    monkeypatch.setattr(documents, "SAMPLE_BYTES", 200)
    texts = load_texts(str(tmp_path / "l.txt"), tmp_path / "data", 300)
    assert len(texts) == 1 and strings(texts)[0].startswith("line 0 line 1 ")


def test_pairs_are_counted_as_a_loop_does_however_often_they_are_put_together(corpus, tmp_path, monkeypatch):
    texts = load_texts(str(corpus), tmp_path, 300)
    counts = Counter(pair for i in range(len(texts)) for pair in zip(texts[i].tolist(), texts[i].tolist()[1:]))
    wanted = sorted(a * 300 + b for (a, b), n in counts.items() if n >= 20)
    monkeypatch.setattr(datasets.Texts, "slices", lambda self, size: np.array_split(np.arange(len(self)), 7))
    assert datasets.frequent_pairs(texts, 10**6).tolist() == wanted
    often = {a * 300 + b: n for (a, b), n in counts.items()}
    some = datasets.frequent_pairs(texts, 5).tolist()              # the most frequent ones, by their numbers
    assert len(some) == 5 and some == sorted(some) and sorted(often[p] for p in some) == sorted(often.values())[-5:]
    found = [np.sort(np.random.default_rng(n).integers(0, 99, 50) << 24 | 1) for n in range(3)]
    assert datasets._together(found).tolist() == [
        pair << 24 | n for pair, n in sorted(Counter(int(x) >> 24 for part in found for x in part).items())]


@pytest.mark.parametrize("name, content, sentence", [
    ("a.txt", b"", "the file is empty"), ("a.txt", b" \n \n", "no text at all"),
    ("a.txt", b"good\nbad \xff here", "not UTF-8: byte 9"), ("a.txt", b"\xef\xbb\xbfgood \xff", "not UTF-8: byte 8"),
    ("a.txt", "text".encode("utf-16"), "iconv -f utf-16"), ("a.txt", gzip.compress(b"text"), "gzip"),
    ("a.txt", b"cut off \xe2\x82", "not UTF-8: byte 8"),
    ("a.csv", b"x", "must end in .txt")])
def test_an_odd_file_gets_a_sentence_and_leaves_nothing_behind(name, content, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_texts(str(path), tmp_path / "data", 300)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data" / "cache").iterdir())


def test_the_cache_is_used_and_a_damaged_one_is_made_anew(corpus, tmp_path, monkeypatch, capsys):
    first = np.array(load_texts(str(corpus), tmp_path, 400).tokens)       # a copy: the file itself is about to be cut
    monkeypatch.setattr(documents, "encode_documents", None)                # a second reading must not encode again
    assert np.array_equal(first, load_texts(str(corpus), tmp_path, 400).tokens)
    monkeypatch.undo()
    cache, = (tmp_path / "cache").iterdir()
    edited = folder_of(tmp_path / "copy", {f"a/{n}.txt": f"text number {n}" for n in range(10)})
    assert "text number 3" in strings(load_texts(edited, tmp_path / "other", 300))
    (tmp_path / "copy" / "a" / "3.txt").write_text("next number 4", encoding="utf-8")      # of the same size
    assert "next number 4" in strings(load_texts(edited, tmp_path / "other", 300))
    for name in ("tokens.bin", "index.npz"):
        whole = (cache / name).read_bytes()
        for damaged in (whole[:len(whole) // 2], whole[:99] + bytes([whole[99] ^ 4]) + whole[100:], b""):
            (cache / name).write_bytes(damaged)
            assert np.array_equal(load_texts(str(corpus), tmp_path, 400).tokens, first), (name, len(damaged))
            assert "is damaged" in capsys.readouterr().err
            assert (cache / name).read_bytes() == whole


def test_a_cache_is_for_one_vocabulary_one_tokenizer_and_these_names_of_files(tmp_path):
    names = [f"a/{n}.txt" for n in range(10)] + [f"b/{n}.txt" for n in range(1, 10)]
    place = folder_of(tmp_path / "texts", {name: f"text of number {n}" for n, name in enumerate(names)})
    load = lambda *more: load_texts(place, tmp_path / "data", *more)
    assert len(load(264).tokenizer) == 264 and len(load(262).tokenizer) == 262
    another = tokenizer.train(["words of another text, of another text"], 264)
    assert load(264, 0, another).tokenizer.merges == another.merges
    assert np.bincount(load(264).labels).tolist() == [10, 9]
    (tmp_path / "texts" / "a" / "9.txt").rename(tmp_path / "texts" / "b" / "0.txt")      # all contents, in their order
    assert np.bincount(load(264).labels).tolist() == [9, 10]


def test_of_two_runs_that_make_the_same_cache_at_once_the_second_takes_the_first_ones(corpus, tmp_path, monkeypatch):
    replace, encode = os.replace, documents.encode_documents

    def replace_after_another_run(*paths):
        monkeypatch.setattr(os, "replace", replace)
        encode(documents._own_texts(corpus)[1], paths[1], 400, None)
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_after_another_run)
    assert len(load_texts(str(corpus), tmp_path, 400)) == 200 and len(list((tmp_path / "cache").iterdir())) == 1


def test_another_user_may_read_the_cache_and_one_that_cannot_be_had_gets_a_sentence(corpus, tmp_path, monkeypatch):
    load_texts(str(corpus), tmp_path / "data", 400)
    cache, = (tmp_path / "data" / "cache").iterdir()
    assert cache.stat().st_mode == (tmp_path / "data").stat().st_mode
    monkeypatch.setattr(documents, "read_cache", lambda cache: None)
    with pytest.raises(UserError, match="neither be read nor replaced: delete it, or give another --data-dir"):
        load_texts(str(corpus), tmp_path / "data", 400)


def test_a_text_with_few_pairs_is_said_to_give_a_smaller_vocabulary(tmp_path):
    place = folder_of(tmp_path / "texts", {"a.txt": "la la la", "b.txt": "so so so"})
    assert load_texts(place, tmp_path, 400).notes == ["the text has pairs for a vocabulary of 262 only, not 400"]
    assert not load_texts(place, tmp_path, 262).notes


def test_texts_beyond_the_sample_of_the_tokenizer_are_encoded_too(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SAMPLE_BYTES", 2000)
    assert strings(load_texts(str(corpus), tmp_path, 300)) == [
        story(topic, n).lower() for topic in ("city", "sea") for n in range(100)]


def test_a_file_of_a_folder_is_one_text_and_the_outermost_folder_its_class(tmp_path):
    files = {f"{name}/part {n % 3}/{n}.txt": f"{name} {n}\n\nand a paragraph" for name in "xy" for n in range(10)}
    texts = load_texts(folder_of(tmp_path / "texts", files), tmp_path, 300)
    assert texts.classes == ["x", "y"] and len(texts) == 20 and np.bincount(texts.split).tolist() == [14, 2, 4]


def test_a_fingerprint_is_of_each_example_and_of_what_each_is_for():
    class Examples(list):
        split = np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), [6, 2, 2])

    data = np.arange(20, dtype=np.uint8).reshape(10, 2)
    changed = [data + 100 * (np.arange(10) == n)[:, None].astype(np.uint8) for n in range(10)]
    assert datasets.fingerprint(Examples(data)) == datasets.fingerprint(Examples(data.copy()))
    found = [datasets.fingerprint(Examples(one)) for one in (data, *changed)]
    assert len(set(found)) == 11 and len({one.split("-")[1] for one in found}) == 1
    other = Examples(data)
    other.split = other.split[::-1]
    examples, split = datasets.fingerprint(other).split("-")
    assert found[0].split("-")[0] == examples and found[0].split("-")[1] != split


def test_slices_padded_and_flat_hold_the_same_tokens(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    which = np.array([5, 199, 0])
    padded, lengths = texts.padded(which)
    flat, owner = texts.flat(which)
    for row, i in enumerate(which):
        assert padded[row, :lengths[row]].tolist() == texts[i].tolist() and not padded[row, lengths[row]:].any()
        assert flat[owner == row].tolist() == texts[i].tolist() + [0]
    cut = texts.select(which).cut(10)
    assert cut.lengths.max() <= 10 and cut.lengths.min() >= 5
    assert np.concatenate([cut[i] for i in range(len(cut))]).tolist() == flat[flat > 0].tolist()


def test_an_epoch_of_windows_shows_every_text_once_and_the_rest_is_what_is_outside(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    windows = datasets.Windows(texts, window=64, batch_size=4, seed=0, rest=True)
    seen = []
    for step in range(windows.batches):
        tokens, lengths, rest, owner = windows(step)
        assert lengths.sum() <= 4 * 64 and tokens.shape[1] == lengths.max() <= lengths.min() + 8    # of like length
        for row in range(len(tokens)):
            inside, outside = tokens[row, :lengths[row]].tolist(), rest[owner == row]
            start = int((outside == 0).nonzero()[0])              # the window's place is blanked
            outside = outside.tolist()[:-1]
            assert outside[start:start + len(inside)] == [0] * len(inside)
            seen.append(tuple(outside[:start] + inside + outside[start + len(inside):]))
    assert sorted(seen) == sorted(tuple(texts[i].tolist()) for i in range(len(texts)))
    first = windows(0)
    second = datasets.Windows(texts, 64, 4, seed=0, rest=True)(0)         # a function of seed and step alone
    assert all((a == b).all() for a, b in zip(first, second))


@pytest.mark.parametrize("rest", [True, False])
def test_windows_lie_anywhere_in_a_text_and_come_in_another_order_each_epoch(rest):
    """A text of 100 tokens that are all different, so that a window tells where it lies; and twenty short ones."""
    lengths = np.array([100] + [9] * 20)
    texts = datasets.Texts(np.arange(2, 2 + lengths.sum(), dtype=np.uint16), np.cumsum(lengths) - lengths, lengths,
                           lengths * 0, lengths * 0, [], None)
    windows = datasets.Windows(texts, 10, 2, seed=0, rest=rest)
    starts, orders = [], []
    for epoch in range(200):
        order = []
        for step in range(epoch * windows.batches, (epoch + 1) * windows.batches):
            tokens, sizes, _, _ = windows(step)
            order += tokens[:, 0].tolist()
            starts += [row[0] - 2 for row, size in zip(tokens.tolist(), sizes) if row[0] < 102]
        orders.append([sum(first - 2 >= texts.starts) for first in order])
    assert min(starts) == 0 and max(starts) == 90 and len(set(starts)) > 70           # 91 places, 200 draws
    assert all(len(set(order)) == 21 for order in orders) and len({tuple(order) for order in orders}) == 200
    assert len({order.index(1) for order in orders}) > 3                               # not always from short to long


def test_of_a_text_of_one_token_the_window_has_it_and_nothing_is_left_to_guess():
    one = np.ones(8, np.int64)
    texts = datasets.Texts(np.arange(2, 10, dtype=np.uint16), np.arange(8), one, one, one, [], None)
    tokens, lengths, rest, _ = datasets.Windows(texts, 4, 2, seed=0, rest=True)(0)
    assert sorted(tokens.flatten().tolist()) == list(range(2, 10)) and set(lengths.tolist()) == {1} and not rest.any()


def test_documents_read_and_unread_tokens_together_are_the_texts(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    documents = datasets.WholeTexts(texts, 16, seed=0)
    read, unread, owner, count = documents(3)
    assert count == 16 and not ((read > 0) & (unread > 0)).any()
    both = (read + unread).tolist()
    order = [texts[i].tolist() for i in range(len(texts))]
    assert all([t for t, o in zip(both, owner.tolist()) if o == row][:-1] in order for row in range(16))
    assert 0.4 < float((read > 0).sum()) / float(((read + unread) > 0).sum()) < 0.6


def test_of_a_document_another_half_is_read_each_time(corpus, tmp_path):
    documents = datasets.WholeTexts(load_texts(str(corpus), tmp_path, 400).select(np.arange(1)), 1, seed=0)
    halves = {tuple((documents(step)[0] > 0).tolist()) for step in range(4)}
    assert len(halves) == 4


# ---------------------------------------------------------------- archives and docstrings

def imdb_archive(path, cut=None):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for part in ("test", "train"):
            for label in ("neg", "pos", "unsup"):
                for n in range(20 if (part, label) != ("test", "unsup") else 0):
                    text = f"{part} {label} review<br />number {n}".encode()
                    info = tarfile.TarInfo(f"aclImdb/{part}/{label}/{n}_{n % 10}.txt")
                    info.size = len(text)
                    archive.addfile(info, io.BytesIO(text))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw.getvalue()[:cut])


def test_imdb_is_read_in_place_and_holds_out_the_last_tenth_of_each_training_class(tmp_path):
    imdb_archive(tmp_path / "aclImdb_v1.tar.gz")
    texts = load_texts("imdb", tmp_path, 300)
    said = strings(texts)
    assert len(texts) == 100 and texts.classes == ["neg", "pos"]
    assert {s for s, part in zip(said, texts.split) if part == HELD_OUT} == {
        f"train {label} review number {n}" for label in ("neg", "pos") for n in (18, 19)}
    assert all((part == TEST) == s.startswith("test") for s, part in zip(said, texts.split))
    assert all((label < 0) == ("unsup" in s) for s, label in zip(said, texts.labels))


def test_an_archive_that_lacks_a_class_of_imdb_is_refused(monkeypatch):
    found = [(documents.IMDB_NAME.fullmatch(f"aclImdb/train/{label}/0_9.txt"), b"good") for label in ("pos", "neg")]
    monkeypatch.setattr(documents, "read_archive", lambda *arguments: found)
    with pytest.raises(UserError, match="does not hold the IMDb reviews"):
        list(documents._read_imdb("archive"))


@pytest.mark.parametrize("cut", [0, 10, 400, -200, -60, -1])
def test_a_truncated_archive_gets_a_sentence(cut, tmp_path):
    imdb_archive(tmp_path / "aclImdb_v1.tar.gz", cut)
    with pytest.raises(UserError, match="aclImdb_v1.tar.gz"):
        load_texts("imdb", tmp_path, 300)


def test_a_download_with_another_checksum_is_refused_and_removed(tmp_path):
    (tmp_path / "served").write_bytes(b"something else")
    url = (tmp_path / "served").as_uri()
    with pytest.raises(UserError, match="not the published file.*put it at"):
        files.download(url, tmp_path / "out", "0" * 32)
    assert [p.name for p in tmp_path.iterdir()] == ["served"]
    files.download(url, tmp_path / "out", hashlib.md5(b"something else").hexdigest())
    assert (tmp_path / "out").read_bytes() == b"something else"


def test_docstrings_are_split_by_file_and_do_not_name_their_package(tmp_path):
    files = []
    for package in ("alpha", "beta"):
        for n in range(10):
            path = tmp_path / package / f"m{n}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(f'def f{i}():\n    """alpha and Beta.thing {n} {i}."""'
                                      for i in range(25)), encoding="utf-8")
            files.append((path, (package, f"m{n}")))
    found = list(documents._read_pydocs(files))
    assert len(found) == 500 and {label for _, label, _ in found} == {"alpha", "beta"}
    assert all(text.startswith("package and package.thing") for text, _, _ in found)
    parts = {}
    for text, label, part in found:
        parts.setdefault((label, text.split()[3]), set()).add(part)
    assert all(len(sides) == 1 for sides in parts.values())
    shares = np.bincount([part for _, _, part in found]) / 500
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.01)


def test_a_docstring_does_not_name_a_part_of_its_packages_name_either(tmp_path):
    files = []
    for n in range(10):
        path = tmp_path / f"m{n}.py"
        path.write_text("\n".join(f'def f{i}():\n    """See nn.Linear{n} and torch.nn or np.sum {i}."""'
                                  for i in range(25)), encoding="utf-8")
        files.append((path, ("torch", "nn", f"m{n}")))
    found = list(documents._read_pydocs(files))
    assert len(found) == 250 and {label for _, label, _ in found} == {"torch.nn"}
    assert all(re.fullmatch(r"See package.Linear\d and package.package or package.sum \d+\.", text)
               for text, _, _ in found)


def test_packages_of_few_files_or_few_docstrings_have_no_label_and_are_for_training_alone(tmp_path):
    files = []
    for package, count, size in ("few_files", 7, 40), ("few_docstrings", 8, 10):
        for n in range(count):
            path = tmp_path / f"{package}{n}.py"
            path.write_text("\n".join(f'def f{i}():\n    """{n} {i}."""' for i in range(size)), encoding="utf-8")
            files.append((path, (package, f"m{n}")))
    found = list(documents._read_pydocs(files))
    assert len(found) == 360 and {(label, part) for _, label, part in found} == {(None, TRAIN)}


def test_docstrings_of_modules_classes_and_coroutines_are_read_and_a_file_that_is_no_python_is_passed_over(tmp_path):
    sources = ['print """Python 2"""', '"""m"""\nclass C:\n    """c"""\n    async def f(self):\n        """f"""']
    for n, source in enumerate(sources):
        (tmp_path / f"{n}.py").write_text(source, encoding="utf-8")
    found = documents._read_pydocs([(tmp_path / f"{n}.py", ("package", str(n))) for n in range(2)])
    assert [text for text, _, _ in found] == ["m", "c", "f"]
