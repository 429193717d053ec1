"""The graphs of examples/graph.py: which modules of this Python import which, or your own.

    graph = module_graph()                    the standard library, numpy and torch
    graph = own_graph(Path("links.csv"))      two columns, a link in each line
    splits = [LinkSplit(graph, seed, n) for n in range(3)]

A link has no direction here. It is stored once, with the smaller node first.
"""

import ast
import csv
import gc
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.data.batches import generator
from minissl.evaluation.ngrams import tf_idf
from minissl.evaluation.probes import SparseRows
from minissl.training.files import progress


MOST_NODES = 20_000         # LinkSplit keeps a table of all pairs
FEWEST_LINKS = 50           # a tenth of them is the test
SMALLEST_CLASS = 40         # 20 labels to learn from, and as many for the test
WORDS = 2000                # the most frequent ones are the features


def load_graph(data):
    """The Graph of "modules", or of a .csv file."""
    if data == "modules":
        return module_graph()
    path = Path(data)
    if path.suffix != ".csv":
        raise UserError(f"--data {data}: expected modules, or a .csv file with two columns")
    return own_graph(path)


@dataclass
class Graph:
    names: list             # of the N nodes
    links: torch.Tensor     # (E, 2) int64, each link once, the smaller node first
    labels: np.ndarray      # (N,) int64, -1 for a node whose class is unknown or too small
    classes: list           # label -> name
    texts: list             # the docstrings of each node; empty for your own links
    notes: list = field(default_factory=list)

    def describe(self):
        """What distinguishes this graph from others, in words."""
        content = "\n".join(self.names).encode() + self.links.numpy().tobytes()
        content += "\n".join(self.texts).encode("utf-8", "replace")
        return (
            f"a graph of {len(self.names):,} nodes and {len(self.links):,} links, "
            f"checksum {zlib.crc32(content):08x}"
        )


def make_graph(pairs, label_of, text_of=None):
    """A Graph of named pairs. Doubled pairs, reversed pairs and loops are dropped.

    Arguments: pairs, of two names each; label_of {name: class}; text_of {name: text}.
    A node without any link is left out.
    """
    unordered = {tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]}
    names = sorted({name for pair in unordered for name in pair})
    number = {name: n for n, name in enumerate(names)}
    links = sorted((number[first], number[second]) for first, second in unordered)

    sizes = Counter(label_of[name] for name in names if name in label_of)
    classes = sorted(label for label, size in sizes.items() if size >= SMALLEST_CLASS)
    class_number = {label: c for c, label in enumerate(classes)}
    labels = [class_number.get(label_of.get(name), -1) for name in names]
    texts = [text_of.get(name, "") for name in names] if text_of else []
    links = torch.tensor(links, dtype=torch.int64).reshape(-1, 2)
    return Graph(names, links, np.array(labels, np.int64), classes, texts)


# ---------------------------------------------------------------- the modules of this Python

def module_graph():
    """Who imports whom in the standard library, numpy and torch. Nothing is imported.

    The class of a module is its package: "asyncio", "torch.nn". Its text is all of its
    docstrings.
    """
    files = module_files()
    pairs, text_of, label_of = [], {}, {}
    gc.disable()                        # a syntax tree is large; this halves the time
    try:
        for n, (name, path) in enumerate(files.items()):
            if n % 100 == 0:
                progress(f"imports: {n:,} of {len(files):,} files")
            is_package = path.name == "__init__.py"
            imported, docstrings = read_module(path.read_bytes(), name, is_package)
            known = {known_module(module, files) for module in imported} - {None}
            pairs += [(name, module) for module in known]
            text_of[name] = "\n".join(docstrings)
            label_of[name] = package_of(name)
    finally:
        gc.enable()
    graph = make_graph(pairs, label_of, text_of)
    graph.texts = hide_names(graph.texts, graph.classes)
    return graph


def module_files():
    """{name of the module: its file}, without tests."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    roots = [(stdlib, stdlib)]                       # (folder, where the names begin)
    for name in ("numpy", "torch"):
        package = Path(importlib.util.find_spec(name).origin).parent     # imports nothing
        roots.append((package, package.parent))
    not_ours = {
        "site-packages", "test", "tests", "idle_test", "testing", "lib2to3", "_vendor",
    }
    files = {}
    for folder, above in roots:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(above).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if parts and not not_ours & set(parts):
                files[".".join(parts)] = path
    return files


def package_of(name):
    """
    >>> package_of("asyncio.tasks"), package_of("torch.nn.modules.linear")
    ('asyncio', 'torch.nn')
    """
    parts = name.split(".")
    depth = 2 if parts[0] in ("numpy", "torch") else 1
    return ".".join(parts[:depth])


def known_module(name, files):
    """The module itself, or the innermost package around the name; None if there is none.

    >>> known_module("os.path.join", {"os": "os.py"})
    'os'
    """
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def read_module(source, name, is_package):
    """The names that a module imports, and its docstrings: two lists of strings.

    `from a import b` gives "a.b", whether b is a module or something in a.

    >>> read_module(b"import os.path\\nfrom . import tasks", "asyncio.queues", False)
    (['os.path', 'asyncio.tasks'], [])
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # what is odd in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return [], []
    imported, docstrings = [], []
    for node in statements(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(node, name, is_package)
            imported += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                docstrings.append(docstring)
    return imported, docstrings


def statements(node):
    """Yield a syntax tree and all statements in it. Expressions hold no import."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from statements(child)


def absolute_name(node, name, is_package):
    """The module after `from`. A dot is the package of the module, each further one above."""
    if node.level == 0:
        return node.module
    parts = name.split(".")
    drop = node.level - 1 if is_package else node.level
    parts = parts[:max(0, len(parts) - drop)]
    if node.module:
        parts.append(node.module)
    return ".".join(parts)


def hide_names(texts, classes):
    """Remove the names of the classes from the texts, or words would give the class away.

    A name is also found beside a _, and without the _ at its beginning: "Dynamo" is hidden for
    the class torch._dynamo.
    """
    words = {"numpy", "np", "torch"}
    for name in classes:
        words.update(part.strip("_") for part in name.split("."))
    any_word = "|".join(sorted(map(re.escape, words)))
    pattern = re.compile(rf"(?<![a-z0-9])(?:{any_word})(?![a-z0-9])", re.IGNORECASE)
    return [pattern.sub(" ", text) for text in texts]


# ---------------------------------------------------------------- your own links

def own_graph(path):
    """A Graph from a .csv file with a link in each line: two names.

    NAME.labels.csv beside it may give classes: a name and its class in each line. A first
    line whose names occur nowhere else is taken for a heading.
    Raises UserError if the files do not look like this.
    """
    rows = read_pairs(path)
    counts = Counter(name for row in rows for name in row)
    notes = []
    if len(rows) > 1 and all(counts[name] == 1 for name in rows[0]):
        notes.append(f"the first line, {','.join(rows[0])}, is taken for a heading")
        rows = rows[1:]
    label_path = path.with_name(path.stem + ".labels.csv")
    label_of = dict(read_pairs(label_path)) if label_path.exists() else {}
    graph = make_graph(rows, label_of)
    notes.append(
        "own links have no words: features are the degree and random vectors, so even the row "
        "\"encoder without links\" knows the degrees"
    )
    graph.notes = notes
    dropped = len(rows) - len(graph.links)
    if dropped:
        graph.notes.append(f"{dropped:,} doubled links, reversed links or loops are dropped")
    strangers = len(label_of.keys() - set(graph.names))
    if strangers:
        graph.notes.append(f"{strangers:,} lines of {label_path.name} name no node of a link")
    if label_of and not graph.classes:
        graph.notes.append(f"no class has {SMALLEST_CLASS} nodes, so no class is predicted")
    return graph


def read_pairs(path):
    """The rows of a CSV file with two columns: [[str, str], ...]. Empty lines are skipped."""
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [list(map(str.strip, row)) for row in csv.reader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error}); save it so") from None
    for n, row in enumerate(rows):
        if any(row) and (len(row) != 2 or not all(row)):
            raise UserError(
                f"{path}: line {n + 1} has {len(row)} columns, some of them empty perhaps; "
                f"expected two names, separated by a comma"
            )
    return [row for row in rows if any(row)]


# ---------------------------------------------------------------- features

def node_features(graph, settings, split):
    """What the encoder knows of each node before it sees a link: (N, F) float32."""
    if settings.features == "words" and graph.texts:
        return word_features(graph.texts)
    return structure_features(split.train, split.nodes, settings.seed)


def word_features(texts):
    """tf-idf of the most frequent words: (N, F) float32, every row of length 1 or 0."""
    counts = [Counter(re.findall("[a-z]{2,}", text.lower())) for text in texts]
    documents = Counter(word for count in counts for word in count)
    vocabulary = [word for word, n in documents.most_common(WORDS) if n >= 3]
    column = {word: n for n, word in enumerate(vocabulary)}
    indices, values, offsets = [], [], [0]
    for count in counts:
        known = [word for word in count if word in column]
        indices += [column[word] for word in known]
        values += [count[word] for word in known]
        offsets.append(len(indices))
    rows = SparseRows(
        torch.tensor(indices, dtype=torch.int64), torch.tensor(offsets),
        torch.tensor(values, dtype=torch.float32), len(vocabulary),
    )
    return tf_idf(rows, np.arange(len(texts))).to_dense()


def structure_features(train_links, nodes, seed):
    """Features without words: log(1 + degree), and a random vector: (N, 257) float32.

    The degree counts training links alone, but all of them: also those that a step hides from
    the encoder and asks for. The largest value is scaled to 1. With these features even the
    encoder without links knows the degrees.
    """
    degree = torch.bincount(train_links.flatten(), minlength=nodes)
    degree = degree.float().log1p()
    draws = generator(seed, "random features", 0)
    random = torch.randn(nodes, 256, generator=draws) / 16           # of length about 1
    return torch.cat([degree[:, None] / degree.max(), random], dim=1)


# ---------------------------------------------------------------- splits

class LinkSplit:
    """The links for training, for choices and for the test, and as many non-links.

    A tenth of the links is for choices and a tenth for the test. The rest is `train`. Each
    of `choices` and `test` is (links, non_links), both (E/10, 2) int64. No non-link is a
    link of any part, and none occurs twice.

    Arguments: graph; seed and number, for the random draws.
    Raises UserError if the graph is too small, too large, or nearly complete.
    """

    def __init__(self, graph, seed, number):
        N, E = len(graph.names), len(graph.links)
        check_size(N, E)
        draws = generator(seed, "link split", number)
        links = graph.links[torch.randperm(E, generator=draws)]
        tenth = E // 10
        self.nodes = N
        self.train = links[2 * tenth:]
        non_links = draw_evaluation_non_links(graph.links, N, 2 * tenth, draws)
        self.choices = links[:tenth], non_links[:tenth]
        self.test = links[tenth:2 * tenth], non_links[tenth:]
        self.is_known = pair_table(self.train, N)

    def draw_step(self, hidden_share, draws):
        """What a training step shows to the encoder, and what it asks for.

        Returns seen (S, 2), links that the encoder sees; asked (M, 2), training links
        that are hidden from it; and non_links (M, 2). These avoid the training links
        only: to avoid the held-out links as well, the training would have to know them.
        """
        order = torch.randperm(len(self.train), generator=draws)
        count = max(1, round(hidden_share * len(order)))
        seen, asked = self.train[order[count:]], self.train[order[:count]]
        if hidden_share == 0:                        # as in the paper: all are seen and asked
            seen = asked = self.train
        some_more = 2 * len(asked) + 20              # because links among them are dropped
        pairs = torch.randint(self.nodes, (some_more, 2), generator=draws)
        is_known = self.is_known[pairs[:, 0], pairs[:, 1]]
        return seen, asked, pairs[~is_known][:len(asked)]


def check_size(nodes, links):
    if links < FEWEST_LINKS:
        raise UserError(f"--data: there are {links} links; give at least {FEWEST_LINKS}")
    if nodes > MOST_NODES:
        raise UserError(
            f"--data: {nodes:,} nodes are too many for tables of all pairs; "
            f"give at most {MOST_NODES:,}"
        )
    non_links = nodes * (nodes - 1) // 2 - links
    if non_links < links:
        raise UserError(
            f"--data: {links:,} of the {links + non_links:,} pairs of nodes are links; "
            f"give a sparser graph, in which most pairs are none"
        )


def pair_table(links, nodes):
    """True at (i, j) and (j, i) for each link, and on the diagonal: (N, N) bool."""
    table = torch.eye(nodes, dtype=torch.bool)
    table[links[:, 0], links[:, 1]] = True
    table[links[:, 1], links[:, 0]] = True
    return table


def draw_evaluation_non_links(links, nodes, count, draws):
    """`count` pairs, none of them a link, a loop, or drawn twice: (count, 2) int64."""
    taken = pair_table(links, nodes)
    drawn = []
    while len(drawn) < count:
        first, second = torch.randint(nodes, (2,), generator=draws).tolist()
        if not taken[first, second]:
            taken[first, second] = taken[second, first] = True
            drawn.append([first, second])
    return torch.tensor(drawn)
