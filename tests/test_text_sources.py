"""Where texts come from: what the loaders return, and what they say of odd files."""

import errno
import gzip
import hashlib
import io
import re
import tarfile

import numpy as np
import pytest
from conftest import story

from minissl import UserError, tokenizer
from minissl.data import text_sources
from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.data.text_sources import (
    load_all_texts,
    load_texts,
    read_imdb,
    read_pydocs,
    read_texts,
)
from minissl.training import files as files_module


def folder_of(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        path.write_bytes(data)
    return str(folder)


def strings(texts):
    return [texts.tokenizer.decode(texts[i].tolist()) for i in range(len(texts))]


def stripped(path, **arguments):
    return [text.strip() for text in read_texts(path, **arguments)]


# ---------------------------------------------------------------- A folder

def test_a_folder_is_split_in_blocks_and_every_text_is_whole(corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    assert texts.classes == ["city", "sea"] and texts.tokens.dtype == np.uint16
    assert np.bincount(texts.split).tolist() == [140, 20, 40]
    for label, topic in enumerate(texts.classes):
        of_class = texts.select(texts.labels == label)
        assert strings(of_class) == [story(topic, n).lower() for n in range(100)]
        assert of_class.split.tolist() == [TRAIN] * 70 + [HELD_OUT] * 10 + [TEST] * 20


def test_a_limit_keeps_some_of_each_class_in_each_split(corpus, tmp_path):
    whole = load_texts(str(corpus), tmp_path, 400)
    some = load_texts(str(corpus), tmp_path, 400, limit=10)
    for split in (TRAIN, HELD_OUT, TEST):
        assert np.bincount(some.labels[some.split == split]).tolist() == [5, 5]
    chosen = set(strings(some))
    assert [text for text in strings(whole) if text in chosen] == strings(some)


def test_the_tokenizer_never_sees_the_test_texts(tmp_path):
    files = {f"a/{n:02}.txt": f"common words number {n}" for n in range(10)}
    files["a/09.txt"] = "zyzzyva zyzzyva zyzzyva zyzzyva"          # a test text, by its place
    texts = load_texts(folder_of(tmp_path / "texts", files), tmp_path, 320)
    assert texts.split[strings(texts).index(files["a/09.txt"])] == TEST
    assert not any(b"zyz" in token for token in texts.tokenizer.bytes_of)


def test_no_text_stands_on_both_sides_of_a_split(tmp_path):
    files = {f"a/{n:02}.txt": f"common words number {n}" for n in range(10)}
    files |= {f"b/{n:02}.txt": f"other words {n}" for n in range(10)}
    files["a/08.txt"] = "twin text"                               # a test text
    files["b/00.txt"] = "twin text"                               # a training text
    texts = load_texts(folder_of(tmp_path / "texts", files), tmp_path, 320)
    splits = [int(texts.split[i]) for i, text in enumerate(strings(texts)) if text == "twin text"]
    assert splits == [TEST] and len(texts) == 19
    assert "left out 1 copy of other texts" in texts.notes


def test_hidden_and_empty_files_are_passed_over_and_counted(tmp_path, capsys):
    files = {
        "one.txt": "some words here", "two.TXT": "some more words", ".hidden.txt": "no",
        ".git/x.txt": "no", "empty.txt": "", "blank.txt": 70_000 * " " + "\n",
        "mark.txt": b"\xef\xbb\xbf", "wide.txt": "\u3000", "notes.md": "no",
    }
    (tmp_path / "nothing").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    texts = load_texts(folder_of(tmp_path, files), tmp_path.parent / "d1", 300)
    assert strings(texts) == ["some words here", "some more words"]
    printed = capsys.readouterr().err
    assert printed.startswith("passed over: ")
    counts = printed.removeprefix("passed over: ").splitlines()[0].split(", ")
    assert set(counts) == {
        "2 hidden", "4 empty", "1 not .txt", "1 empty folder", "1 link to a folder"
    }


def test_the_outermost_folder_of_a_file_is_its_class(tmp_path):
    files = {
        f"{name}/part {n % 3}/{n}.txt": f"{name} {n}\n\nand a paragraph"
        for name in "xy" for n in range(10)
    }
    texts = load_texts(folder_of(tmp_path / "texts", files), tmp_path, 300)
    assert texts.classes == ["x", "y"] and len(texts) == 20
    assert np.bincount(texts.split).tolist() == [14, 2, 4]
    assert texts.notes[:2] == ["folder texts: 20 texts, one a file", "classes: x, y"]


@pytest.mark.parametrize("names, named", [
    (["train/pos", "train/neg", "test/pos", "test/neg"], "test, train"),
    (["pos", "neg", "unsup"], "unsup"), (["a", "Valid"], "Valid"), (["dev", "train"], "dev, train"),
    (["val/x"], "val"),
])
def test_classes_that_are_named_like_splits_are_refused(names, named, tmp_path):
    files = {f"{name}/{n}.txt": f"{name} {n}" for name in names for n in range(5)}
    folder = folder_of(tmp_path / "texts", files)
    with pytest.raises(UserError, match=f"each sub-folder must be a class, but found {named};"):
        load_texts(folder, tmp_path, 300)
    learned = tokenizer.train_tokenizer([], 258)
    features = load_all_texts(folder, learned)                # needs no classes
    assert len(features) == len(files)


def class_sizes(texts):
    sizes = {}
    for label, name in enumerate(texts.classes):
        splits = texts.split[texts.labels == label]
        sizes[name] = np.bincount(splits, minlength=3).tolist()
    return sizes


def test_small_classes_are_for_training_and_named(tmp_path):
    sizes = {"one": 1, "two": 2, "three": 3, "ten": 10}
    files = {f"{name}/{n}.txt": f"{name} {n}" for name, size in sizes.items() for n in range(size)}
    texts = load_texts(folder_of(tmp_path / "texts", files), tmp_path, 262)
    assert class_sizes(texts) == {
        "one": [1, 0, 0], "two": [2, 0, 0], "three": [1, 1, 1], "ten": [7, 1, 2]
    }
    sentence = "classes without a text to train on or without one to test on: one, two"
    assert sentence in texts.notes


def test_a_class_that_lost_its_training_text_is_named(tmp_path):
    files = {f"{name}/{n}.txt": f"{name} {n}" for name in ("a", "b") for n in range(3)}
    files["a/0.txt"] = files["a/2.txt"]              # the training text is a copy of a test text
    texts = load_texts(folder_of(tmp_path / "texts", files), tmp_path, 262)
    assert class_sizes(texts) == {"a": [0, 1, 1], "b": [1, 1, 1]}
    assert texts.notes[-1] == "classes without a text to train on or without one to test on: a"


# ---------------------------------------------------------------- A file

LINE_ENDS = {"LF": "\n", "CR": "\r", "CR LF": "\r\n", "U+0085": "\u0085", "U+2028": "\u2028"}


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS.keys())
@pytest.mark.parametrize("start", ["", "blank line"])
def test_a_file_without_paragraphs_is_its_lines(end, start, tmp_path):
    lines = [f"line number {n}" for n in range(300)]
    text = (end + " " + end if start else "") + end.join(lines) + end + end
    (tmp_path / "my.txt").write_bytes(text.encode())
    assert stripped(tmp_path / "my.txt") == lines
    texts = load_texts(str(tmp_path / "my.txt"), tmp_path, 300)
    assert strings(texts) == lines and texts.notes[0] == "my.txt: 300 texts, one a line"


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS.keys())
def test_a_file_with_a_blank_line_inside_is_its_paragraphs(end, tmp_path):
    text = end.join(["", "one", "two", "", " ", "three", ""])
    (tmp_path / "my.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    texts = load_texts(str(tmp_path / "my.txt"), tmp_path, 262)
    assert strings(texts) == ["one two", "three"]
    assert texts.notes[0] == "my.txt: 2 texts, one a paragraph"


def test_features_of_a_file_say_how_it_was_cut(tmp_path):
    (tmp_path / "my.txt").write_text("the same line\n" * 2, encoding="utf-8")
    learned = tokenizer.train_tokenizer([], 258)
    texts = load_all_texts(tmp_path / "my.txt", learned)
    assert strings(texts) == ["the same line"] * 2
    assert texts.notes == ["my.txt: 2 texts, one a line"]


def test_a_limit_keeps_the_first_texts_of_a_file(tmp_path):
    (tmp_path / "my.txt").write_text("one line\nanother line\n", encoding="utf-8")
    learned = tokenizer.train_tokenizer([], 258)
    texts = load_all_texts(tmp_path / "my.txt", learned, limit=1)
    assert strings(texts) == ["one line"]


def test_a_limit_reads_no_further_than_it_must(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"one line\n" * 2**18 + b"\xff")   # an error in block three
    learned = tokenizer.train_tokenizer([], 258)
    assert len(load_all_texts(tmp_path / "my.txt", learned, limit=2)) == 2


def test_a_large_file_in_a_folder_becomes_several_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "LONGEST_FILE", 80)
    monkeypatch.setattr(text_sources, "LONGEST_TEXT", 20)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [f"line number {n:02}\n" for n in range(20)]     # 15 characters each
    (folder / "a.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "b.txt").write_text("short\n", encoding="utf-8")
    texts = load_texts(str(folder), tmp_path, 262)
    assert len(texts) > 3
    assert " ".join(strings(texts)) == " ".join("".join(lines).split("\n")) + "short"
    assert "from 2 files" in texts.notes[0]


def test_lines_are_cut_as_splitlines_does_in_blocks_of_any_size(tmp_path, monkeypatch):
    text = "a\r\nb\n\r\rcé\u2028 d\u0085\x0b\x0c\x1ce\r\n\r\nsix\u2029" * 3
    (tmp_path / "my.txt").write_bytes(text.encode())
    for size in range(4, 40):
        monkeypatch.setattr(text_sources, "BLOCK_BYTES", size)
        lines = list(text_sources.read_lines(tmp_path / "my.txt"))
        assert lines == text.splitlines(keepends=True)


def test_a_long_line_is_read_in_parts_without_loss(tmp_path):
    text = "añ€😀" * 1_000_000                          # 10 MB; blocks end inside characters
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    parts = list(read_texts(tmp_path / "long.txt"))
    assert "".join(parts) == text and len(parts) > 3
    assert max(map(len, parts)) <= 2 * text_sources.LONGEST_TEXT


def test_the_lines_of_a_very_large_file_are_joined(tmp_path, monkeypatch):
    path = tmp_path / "l.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)), encoding="utf-8")
    parts = list(read_texts(path, least=50))
    assert "".join(parts) == path.read_text(encoding="utf-8")
    assert all(50 <= len(part) < 60 for part in parts[:-1])
    assert len(load_texts(str(path), tmp_path / "data", 300)) == 100
    monkeypatch.setattr(text_sources, "LARGE_FILE", 200)
    texts = load_texts(str(path), tmp_path / "data", 300)
    assert len(texts) == 1 and strings(texts)[0].startswith("line 0 line 1 ")
    assert texts.notes[0] == "l.txt: 1 text, neighbouring lines joined to at least 2,048 characters"


def test_the_paragraphs_of_a_very_large_file_are_joined(tmp_path, monkeypatch):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"line {n}\nand more\n\n" for n in range(300)), encoding="utf-8")
    monkeypatch.setattr(text_sources, "LARGE_FILE", 200)
    texts = load_texts(str(path), tmp_path / "data", 300)
    assert all(text.endswith("and more") for text in strings(texts))
    assert texts.notes[0] == (
        "p.txt: 3 texts, neighbouring paragraphs joined to at least 2,048 characters"
    )


@pytest.mark.parametrize("name, content, sentence", [
    ("a.txt", b"", "a.txt: the file is empty or holds only white space; give one with some text"),
    ("a.txt", b" \n \n", "a.txt: the file is empty or holds only white space; give one with"),
    ("a.txt", b"good\nbad \xff here", "not UTF-8: byte 9 is 0xff; save it as UTF-8"),
    ("a.txt", b"\xef\xbb\xbfgood \xff", "not UTF-8: byte 8 is 0xff"),
    ("a.txt", b"x" * 2**20 + b"caf\xe9!", "not UTF-8: byte 1048579 is 0xe9"),
    ("a.txt", b"x" * (2**20 - 1) + b"\xc3(", "not UTF-8: byte 1048575 is 0xc3"),
    ("a.txt", b"cut off \xe2\x82", "not UTF-8: byte 8 is 0xe2"),
    ("a.txt", "text".encode("utf-16"), "not UTF-8: byte 0 is 0xff"),
    ("a.txt", "a text".encode("utf-16-le"), "byte 1 is NUL; save it as UTF-8"),
    ("a.txt", "a text".encode("utf-16-be"), "byte 0 is NUL"),
    ("a.txt", "a text".encode("utf-32-le"), "byte 1 is NUL"),
    ("a.txt", b"x" * (2**20 + 99) + b"\0", "byte 1048675 is NUL"),
    ("a.txt", gzip.compress(b"text"), "is a gzip archive, expected UTF-8 text"),
    ("a.csv", b"x", "expected a name that ends in .txt; if the file is plain text, rename it"),
])
def test_an_odd_file_gets_a_sentence_and_leaves_nothing(name, content, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_texts(str(path), tmp_path / "data", 300)
    assert "iconv" not in str(caught.value)     # it would turn UTF-16 into garbage
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data" / "cache").iterdir())


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="my_texts: file not found; --data takes pydocs, imdb"):
        load_texts(str(tmp_path / "my_texts"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected .*, found none; give another folder"):
        load_texts(str(tmp_path / "empty"), tmp_path)


@pytest.mark.parametrize("name", ["my.txt", "folder"])
def test_a_text_that_may_not_be_read_is_named(name, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder_of(tmp_path, {"my.txt": "some words", "folder/a.txt": "some words"})
    monkeypatch.setattr(text_sources, "is_blank", refuse)         # root may read every file
    monkeypatch.setattr(text_sources.os, "listdir", refuse)
    with pytest.raises(UserError, match=f"{name}: permission denied; make it readable"):
        load_texts(str(tmp_path / name), tmp_path)


def test_a_file_with_a_very_long_name_is_read(tmp_path):
    path = tmp_path / ("n" * 250 + ".txt")
    path.write_text("one\ntwo", encoding="utf-8")
    assert strings(load_texts(str(path), tmp_path / "data", 258)) == ["one", "two"]


# ---------------------------------------------------------------- imdb

def imdb_archive(path, cut=None):
    raw = io.BytesIO()
    kinds = [
        ("test", "neg"), ("test", "pos"), ("train", "neg"), ("train", "pos"), ("train", "unsup")
    ]
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for part, label in kinds:
            for n in range(20):
                text = f"{part} {label} review<br />number {n}".encode()
                info = tarfile.TarInfo(f"aclImdb/{part}/{label}/{n}_{n % 10}.txt")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw.getvalue()[:cut])


def test_imdb_holds_out_the_last_tenth_of_each_class(tmp_path):
    imdb_archive(tmp_path / "aclImdb_v1.tar.gz")
    texts = load_texts("imdb", tmp_path, 300)
    reviews = strings(texts)
    assert len(texts) == 100 and texts.classes == ["neg", "pos"]
    held_out = {review for review, split in zip(reviews, texts.split) if split == HELD_OUT}
    assert held_out == {
        f"train {label} review number {n}" for label in ("neg", "pos") for n in (18, 19)
    }
    for review, split, label in zip(reviews, texts.split, texts.labels):
        assert (split == TEST) == review.startswith("test")
        assert (label < 0) == ("unsup" in review)


def test_an_archive_that_lacks_a_class_of_imdb_is_refused(monkeypatch):
    members = []
    for label in ("pos", "neg"):
        match = text_sources.IMDB_NAME.fullmatch(f"aclImdb/train/{label}/0_9.txt")
        members.append((match, b"good"))
    monkeypatch.setattr(text_sources, "read_archive", lambda *arguments: members)
    with pytest.raises(UserError, match="does not hold the IMDb reviews"):
        list(read_imdb("archive"))


@pytest.mark.parametrize("cut", [0, 10, 400, -200, -60, -1])
def test_a_truncated_archive_gets_a_sentence(cut, tmp_path):
    imdb_archive(tmp_path / "aclImdb_v1.tar.gz", cut)
    with pytest.raises(UserError, match="aclImdb_v1.tar.gz"):
        load_texts("imdb", tmp_path, 300)


def test_a_download_with_another_checksum_is_removed(tmp_path):
    (tmp_path / "served").write_bytes(b"something else")
    url = (tmp_path / "served").as_uri()
    with pytest.raises(UserError, match="sent another file.*save it as"):
        files_module.download(url, tmp_path / "out", "0" * 32)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    md5 = hashlib.md5(b"something else").hexdigest()
    files_module.download(url, tmp_path / "out", md5)
    assert (tmp_path / "out").read_bytes() == b"something else"


# ---------------------------------------------------------------- pydocs

def python_file(path, docstrings):
    path.parent.mkdir(exist_ok=True)
    functions = [f'def f{i}():\n    """{text}"""' for i, text in enumerate(docstrings)]
    path.write_text("\n".join(functions), encoding="utf-8")
    return path


def test_docstrings_are_split_by_file(tmp_path):
    files = []
    for package in ("alpha", "beta"):
        for n in range(10):
            docstrings = [f"alpha and Beta.thing {n} {i}." for i in range(25)]
            path = python_file(tmp_path / package / f"m{n}.py", docstrings)
            files.append((path, (package, f"m{n}")))
    documents = list(read_pydocs(files))
    assert len(documents) == 500
    assert {label for _, label, _ in documents} == {"alpha", "beta"}
    splits_of_file = {}
    for text, label, split in documents:
        assert text.startswith("package and package.thing")       # no text names its label
        number = text.split()[3]
        splits_of_file.setdefault((label, number), set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of_file.values())
    shares = np.bincount([split for _, _, split in documents]) / 500
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.01)


def test_a_docstring_does_not_name_a_part_of_its_package(tmp_path):
    files = []
    for n in range(10):
        docstrings = [f"See nn.Linear{n} and torch.nn or np.sum {i}." for i in range(25)]
        path = python_file(tmp_path / f"m{n}.py", docstrings)
        files.append((path, ("torch", "nn", f"m{n}")))
    documents = list(read_pydocs(files))
    assert len(documents) == 250 and {label for _, label, _ in documents} == {"torch.nn"}
    pattern = re.compile(r"See package.Linear\d and package.package or package.sum \d+\.")
    assert all(pattern.fullmatch(text) for text, _, _ in documents)


def test_small_packages_have_no_label_and_are_for_training(tmp_path):
    files = []
    for package, count, size in (("few_files", 7, 40), ("few_docstrings", 8, 10)):
        for n in range(count):
            path = python_file(tmp_path / f"{package}{n}.py", [f"{n} {i}." for i in range(size)])
            files.append((path, (package, f"m{n}")))
    documents = list(read_pydocs(files))
    assert len(documents) == 360
    assert {(label, split) for _, label, split in documents} == {(None, TRAIN)}


def test_docstrings_of_modules_classes_and_coroutines_are_read(tmp_path):
    module = '"""m"""\nclass C:\n    """c"""\n    async def f(self):\n        """f"""'
    sources = ['print """Python 2"""', module]                    # the first is passed over
    files = []
    for n, source in enumerate(sources):
        path = tmp_path / f"{n}.py"
        path.write_text(source, encoding="utf-8")
        files.append((path, ("package", str(n))))
    assert [text for text, _, _ in read_pydocs(files)] == ["m", "c", "f"]
