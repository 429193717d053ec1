"""The graph example: its loss, its splits without leaks, its measures, and a whole run."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import graph
import graph_baselines as baselines
import graph_data
import numpy as np
import pytest
import torch
from conftest import assert_resumes_exactly, read_log, result_of

from minissl import UserError
from minissl.training import distributed


ROOT = Path(__file__).resolve().parents[1]
SMALL = "--steps 60 --evaluate-every 30 --width 16 --size 8 --splits 2 --draws 1 --device cpu"
SMALL = SMALL.split()


def random_links(nodes=12, links=20, seed=0):
    """(links, 2) int64, each once, the smaller node first."""
    pairs = list(itertools.combinations(range(nodes), 2))
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:links]
    return torch.tensor([pairs[i] for i in chosen])


def random_graph(nodes=60, links=300):
    names = [f"n{i:03}" for i in range(nodes)]
    pairs = random_links(nodes, links).tolist()
    return graph_data.make_graph([(names[i], names[j]) for i, j in pairs], {})


def as_set(pairs):
    """The pairs without their direction: {(smaller, larger)}"""
    return {(min(pair), max(pair)) for pair in pairs.tolist()}


# ---------------------------------------------------------------- the model and the loss

def normalised_adjacency(links, nodes):
    """D^−½ (A + I) D^−½, by loops in numpy."""
    A = np.eye(nodes)
    for i, j in links.tolist():
        A[i, j] = A[j, i] = 1
    degree = A.sum(1)
    for i in range(nodes):
        for j in range(nodes):
            A[i, j] /= math.sqrt(degree[i] * degree[j])
    return A


def loss_by_loops(x, W0, W1, b, A, links, non_links):
    """L of the docstring of graph.py, pair by pair."""
    z = A @ np.maximum(A @ x @ W0, 0) @ W1
    of_links, of_non_links = [], []
    for i, j in links.tolist():
        s = sum(z[i, k] * z[j, k] for k in range(z.shape[1])) + b
        of_links.append(-math.log(1 / (1 + math.exp(-s))))
    for i, j in non_links.tolist():
        s = sum(z[i, k] * z[j, k] for k in range(z.shape[1])) + b
        of_non_links.append(-math.log(1 - 1 / (1 + math.exp(-s))))
    return np.mean(of_links) / 2 + np.mean(of_non_links) / 2


def test_convolve_is_the_normalised_adjacency():
    links = random_links()
    A = normalised_adjacency(links, 12)
    result = graph.convolve(torch.eye(12, dtype=torch.float64), links)
    np.testing.assert_allclose(result.numpy(), A, atol=1e-12)


def test_convolve_without_links_changes_nothing():
    x = torch.randn(5, 3)
    assert torch.equal(graph.convolve(x, torch.empty(0, 2, dtype=torch.int64)), x)


def test_the_order_of_nodes_does_not_matter():
    torch.manual_seed(0)
    model = graph.GraphAutoencoder(4, 6, 3).double()
    x, links = torch.randn(12, 4, dtype=torch.float64), random_links()
    order = torch.randperm(12)
    place = order.argsort()
    z = model.encode(x, links)
    moved = model.encode(x[order], place[links])
    torch.testing.assert_close(moved, z[order])


def test_the_loss_equals_loops_by_value_and_gradient():
    torch.manual_seed(0)
    model = graph.GraphAutoencoder(4, 6, 3).double()
    with torch.no_grad():
        model.b.fill_(0.3)
    x = torch.randn(12, 4, dtype=torch.float64)
    seen, asked = random_links(12, 20), random_links(12, 9, seed=1)
    non_links = random_links(12, 7, seed=2)
    loss = model(x, seen, asked, non_links)
    loss.backward()

    numbers = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    A = normalised_adjacency(seen, 12)

    def by_loops():
        W0, W1, b = numbers["W0"], numbers["W1"], numbers["b"][0]
        return loss_by_loops(x.numpy(), W0, W1, b, A, asked, non_links)

    assert float(loss.detach()) == pytest.approx(by_loops(), rel=1e-10)
    for name, parameter in model.named_parameters():
        values = numbers[name]
        for place in np.ndindex(values.shape):
            before = values[place]
            values[place] = before + 1e-5
            above = by_loops()
            values[place] = before - 1e-5
            below = by_loops()
            values[place] = before
            slope = (above - below) / 2e-5
            assert float(parameter.grad[place]) == pytest.approx(slope, abs=1e-8), name


def test_the_loss_is_ln_2_for_codes_of_zero():
    model = graph.GraphAutoencoder(4, 6, 3)
    torch.nn.init.zeros_(model.W1)
    loss = model(torch.randn(12, 4), random_links(), random_links(12, 9), random_links(12, 5))
    assert loss.item() == pytest.approx(math.log(2))


def test_a_known_loss_by_hand():
    """One link with σ = 3/4 and one non-link with σ = 1/5: −½ (ln 3/4 + ln 4/5)."""
    loss = graph.link_loss(torch.tensor([math.log(3)]), torch.tensor([-math.log(4)]))
    assert float(loss) == pytest.approx(-math.log(0.75 * 0.8) / 2)


# ---------------------------------------------------------------- splits without leaks

@pytest.fixture
def split():
    return graph_data.LinkSplit(random_graph(), seed=0, number=0)


def test_every_link_is_in_one_part_whatever_its_direction(split):
    """(x, y) in training and (y, x) in the test would give the test away."""
    parts = [as_set(part) for part in (split.train, split.choices[0], split.test[0])]
    assert [len(part) for part in parts] == [240, 30, 30]
    for one, other in itertools.combinations(parts, 2):
        assert not one & other
    assert set.union(*parts) == as_set(random_graph().links)


def test_reversed_and_doubled_links_are_one_link():
    """Or a test link would be in the training as well."""
    pairs = [("a", "b"), ("b", "a"), ("a", "b"), ("c", "c"), ("c", "b")]
    made = graph_data.make_graph(pairs, {})
    assert made.names == ["a", "b", "c"]
    assert made.links.tolist() == [[0, 1], [1, 2]]


def test_no_link_of_any_part_is_among_the_non_links(split):
    links = as_set(random_graph().links)
    choices, test = as_set(split.choices[1]), as_set(split.test[1])
    assert len(split.choices[1]) == len(split.test[1]) == 30
    assert len(choices) == len(test) == 30                    # none is doubled
    assert not choices & test
    assert not links & (choices | test)
    assert all(i != j for i, j in choices | test)


def test_the_non_links_of_the_test_are_fixed(split):
    again = graph_data.LinkSplit(random_graph(), seed=0, number=0)
    other = graph_data.LinkSplit(random_graph(), seed=0, number=1)
    assert torch.equal(again.test[1], split.test[1])
    assert not torch.equal(other.test[0], split.test[0])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_step_asks_only_for_links_that_are_hidden(split, share):
    draws = torch.Generator().manual_seed(0)
    seen, asked, non_links = split.draw_step(share, draws)
    assert len(asked) == round(share * 240)
    assert as_set(seen) | as_set(asked) == as_set(split.train)
    assert not as_set(seen) & as_set(asked)
    assert len(non_links) == len(asked)
    assert not as_set(non_links) & as_set(split.train)
    assert (non_links[:, 0] != non_links[:, 1]).all()


def test_training_cannot_tell_held_out_links_from_non_links():
    """Drawn non-links avoid training links only: they hit test links as often as others."""
    split = graph_data.LinkSplit(random_graph(20, 60), seed=0, number=0)
    draws = torch.Generator().manual_seed(0)
    drawn = [split.draw_step(0.5, draws)[2] for _ in range(2000)]
    pairs = [(min(pair), max(pair)) for pair in torch.cat(drawn).tolist()]
    held_out = as_set(split.test[0]) | as_set(split.choices[0])
    expected = len(held_out) / (20 * 19 / 2 - len(split.train))
    share = sum(pair in held_out for pair in pairs) / len(pairs)
    assert share == pytest.approx(expected, rel=0.1)


def test_held_out_links_change_no_code_and_no_feature(split):
    """The encoder and its features are functions of the training links."""
    features = graph_data.structure_features(split.train, 60, seed=0)
    degree = np.zeros(60)
    for i, j in split.train.tolist():
        degree[i] += 1
        degree[j] += 1
    expected = np.log1p(degree) / np.log1p(degree).max()
    np.testing.assert_allclose(features[:, 0], expected, rtol=1e-6)
    assert int(split.is_known.sum()) == 2 * 240 + 60


# ---------------------------------------------------------------- measures and baselines

def draws_with_ties():
    rng = np.random.default_rng(0)
    return rng.integers(3, 9, 40).astype(float), rng.integers(0, 7, 55).astype(float)


def test_auc_equals_a_loop_over_pairs():
    links, non_links = draws_with_ties()
    wins = 0.0
    for a in links:
        for b in non_links:
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
    assert baselines.auc(links, non_links) == pytest.approx(100 * wins / (40 * 55))


def test_average_precision_equals_a_loop():
    links, non_links = draws_with_ties()
    total = 0.0
    for a in links:
        true = sum(1 for b in links if b >= a)
        false = sum(1 for b in non_links if b >= a)
        total += true / (true + false) / len(links)
    assert baselines.average_precision(links, non_links) == pytest.approx(100 * total)


def test_equal_scores_are_chance():
    assert baselines.auc(np.ones(8), np.ones(8)) == 50
    assert baselines.average_precision(np.ones(8), np.ones(8)) == 50


def test_measures_of_a_perfect_and_a_reversed_order():
    assert baselines.auc([3, 4], [1, 2]) == 100
    assert baselines.average_precision([3, 4], [1, 2]) == 100
    assert baselines.auc([1, 2], [3, 4]) == 0


def test_common_neighbours_and_degrees_equal_loops(split):
    neighbours = {i: set() for i in range(60)}
    for i, j in split.train.tolist():
        neighbours[i].add(j)
        neighbours[j].add(i)
    pairs = torch.cat(split.test)
    shared = [len(neighbours[i] & neighbours[j]) for i, j in pairs.tolist()]
    products = [len(neighbours[i]) * len(neighbours[j]) for i, j in pairs.tolist()]
    assert baselines.common_neighbours(split)(pairs).tolist() == shared
    assert baselines.degree_product(split)(pairs).tolist() == products


@pytest.mark.parametrize("power", [1, 2])
def test_all_eigenvectors_give_the_matrix(split, power):
    """Also its negative eigenvalues: their terms are subtracted."""
    score = baselines.spectral_embedding(split, sizes=[60], powers=[power])
    A = normalised_adjacency(split.train, 60)
    assert np.linalg.eigvalsh(A).min() < -0.1
    expected = np.linalg.matrix_power(A, power)
    pairs = torch.cat(split.test)
    scores = score(pairs).numpy()
    np.testing.assert_allclose(scores, expected[pairs[:, 0], pairs[:, 1]], atol=1e-5)


def test_a_spectral_embedding_that_is_left_out_is_named(split, monkeypatch, capsys):
    assert "spectral embedding" in baselines.measure_links({}, [split])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(baselines, "MOST_NODES_OF_SPECTRUM", 59)
    assert "spectral embedding" not in baselines.measure_links({}, [split])
    assert "left out: 60 nodes are more than 59" in capsys.readouterr().out


def test_the_spectral_embedding_is_chosen_without_the_test(split):
    pairs = torch.cat(split.test)
    before = baselines.spectral_embedding(split)(pairs)
    split.test = split.test[1], split.test[0]
    assert torch.equal(baselines.spectral_embedding(split)(pairs), before)


def test_labels_propagate_inside_two_groups():
    """Two rings with one label each: every node gets the label of its ring."""
    pairs = [(i, (i + 1) % 30) for i in range(30)]
    pairs += [(30 + i, 30 + (i + 1) % 30) for i in range(30)]
    names = [f"n{i:02}" for i in range(60)]
    made = graph_data.make_graph([(names[i], names[j]) for i, j in pairs], {})
    split = graph_data.LinkSplit(made, seed=0, number=0)
    split.train = made.links
    labels = np.repeat([0, 1], 30)
    answers = baselines.propagate(split, graph.convolve, labels, np.array([3, 40]), 0.9)
    assert (answers == labels).all()


def test_a_preview_names_no_link_of_training_or_test(split):
    z = torch.randn(60, 4)
    for node in range(60):
        partners = baselines.likeliest_partners(z, split, node)
        pairs = {(min(node, n), max(node, n)) for n in partners}
        assert len(pairs) == 5
        assert not pairs & (as_set(split.train) | as_set(split.test[0]))
        assert node not in partners


def test_the_best_baseline_is_not_our_own():
    table = {
        "graph autoencoder": [[90, 0], [94, 0]],
        "features alone": [[80, 0], [82, 0]],
        "common neighbours": [[85, 0], [87, 0]],
    }
    name, mean, lead = baselines.best_baseline(table, column=0)
    assert (name, mean, lead.tolist()) == ("common_neighbours", 86, [5, 7])


# ---------------------------------------------------------------- the modules of this Python

def test_imports_are_read_without_importing():
    source = b'''"""About x."""
import os.path, json as j
from . import tasks
from ..b.c import d
def f():
    """Inside."""
    try:
        from numpy import linalg
    except ImportError:
        import re
'''
    imported, docstrings = graph_data.read_module(source, "a.pack.x", is_package=False)
    expected = ["os.path", "json", "a.pack.tasks", "a.b.c.d", "numpy.linalg", "re"]
    assert sorted(imported) == sorted(expected)
    assert docstrings == ["About x.", "Inside."]
    imported, _ = graph_data.read_module(b"from .y import z", "a.pack", is_package=True)
    assert imported == ["a.pack.y.z"]
    assert graph_data.read_module(b"print 1", "old", False) == ([], [])


def test_the_graph_of_this_python_has_its_imports(monkeypatch):
    every_file = graph_data.module_files()
    files = {}
    for name, path in every_file.items():
        if name.startswith(("asyncio", "json")) or name in ("socket", "re"):
            files[name] = path
    monkeypatch.setattr(graph_data, "module_files", lambda: files)
    made = graph_data.module_graph()
    linked = {(made.names[i], made.names[j]) for i, j in made.links.tolist()}
    assert ("asyncio.base_events", "socket") in linked
    assert ("json", "json.decoder") in linked
    assert len(made.texts) == len(made.names)
    assert not any("test" in name.split(".") for name in every_file)


def test_words_of_class_names_are_hidden():
    texts = ["torch.nn layers; Asyncio, annoy", "Dynamo and __torch_function__, dynamos"]
    hidden = graph_data.hide_names(texts, ["asyncio", "torch.nn", "torch._dynamo"])
    assert hidden[0].split() == [".", "layers;", ",", "annoy"]
    assert hidden[1].split() == ["and", "__", "_function__,", "dynamos"]


def test_word_features_have_length_one():
    texts = ["a common word", "common word", "common thing", "", "word word common"]
    x = graph_data.word_features(texts)
    assert x.shape == (5, 2)                                  # "common" and "word"
    assert x.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 0, 1])


# ---------------------------------------------------------------- the script

@pytest.fixture
def own_links(tmp_path):
    """links.csv of two groups of 50 nodes with many links inside, and their classes."""
    rng = np.random.default_rng(0)
    lines = ["from,to"]
    while len(lines) < 900:
        i, j = rng.integers(0, 100, 2)
        is_inside = (i < 50) == (j < 50)
        if is_inside or rng.random() < 0.1:
            lines.append(f"n{i},n{j}")
    (tmp_path / "links.csv").write_text("\n".join(lines), encoding="utf-8")
    labels = [f"n{i},{'left' if i < 50 else 'right'}" for i in range(100)]
    labels.append("stranger,left")
    (tmp_path / "links.labels.csv").write_text("\n".join(labels), encoding="utf-8")
    return tmp_path / "links.csv"


def test_a_short_run_learns(own_links, run_script, tmp_path):
    run = tmp_path / "run"
    code, printed = run_script(graph, "--data", own_links, "--run", run, *SMALL)
    assert code == 0, printed
    assert "the first line, from,to, is taken for a heading" in printed
    assert "1 lines of links.labels.csv name no node of a link" in printed
    assert "(chance 0.6931)" in printed
    assert "likeliest missing links of n" in printed
    assert float(read_log(run)[-1]["loss"]) < 0.9 * math.log(2)
    assert float(read_log(run)[-1]["validation_auc"]) > 65
    assert float(result_of(printed)["class_20_labels"]) > 80
    for row in ("spectral embedding", "untrained encoder", "label propagation"):
        assert row in printed


def test_shuffled_links_cannot_be_predicted(run_script, tmp_path):
    """A leak would show here: of random links nobody can know the held-out ones.

    An encoder that sees the test links reaches an AUC of 72 with these settings.
    """
    pairs = random_links(150, 900).tolist()
    text = "\n".join(f"n{i},n{j}" for i, j in pairs)
    (tmp_path / "links.csv").write_text(text, encoding="utf-8")
    larger = "--steps 200 --splits 3 --width 32 --size 16".split()
    arguments = ["--data", tmp_path / "links.csv", "--run", tmp_path / "run", *SMALL, *larger]
    code, printed = run_script(graph, *arguments)
    assert code == 0, printed
    assert 40 < float(result_of(printed)["auc"]) < 62


def test_a_stopped_run_ends_at_the_same_bytes(own_links, run_script, tmp_path):
    data = ["--data", own_links]
    code, printed = run_script(graph, *data, "--run", tmp_path / "whole", *SMALL)
    assert code == 0, printed
    assert_resumes_exactly(
        run_script, graph, [*data, *SMALL], tmp_path / "whole", printed, last_step=20
    )


@pytest.mark.parametrize("text, sentence", [
    ("a,b\nc\n", "line 2 has 1 columns"),
    ("a,b\nb,c\n", "there are 2 links; give at least 50"),
    ("a,\n", "line 1 has 2 columns, some of them empty"),
    (None, "file not found"),
])
def test_wrong_links_are_one_sentence(text, sentence, run_script, tmp_path):
    path = tmp_path / "links.csv"
    if text:
        path.write_text(text, encoding="utf-8")
    code, printed = run_script(graph, "--data", path, "--run", tmp_path / "run", *SMALL)
    assert code == 2
    assert sentence in printed
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_before_the_run(monkeypatch):
    with pytest.raises(UserError, match="--save-every -1.0: must be at least 0"):
        graph.Settings(save_every=-1.0)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="runs in one process"):
        graph.Settings()


def test_a_graph_of_nearly_all_pairs_is_refused():
    with pytest.raises(UserError, match="give a sparser graph"):
        graph_data.LinkSplit(random_graph(20, 120), seed=0, number=0)


def test_the_example_starts_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "graph.py"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--hide" in ended.stdout
