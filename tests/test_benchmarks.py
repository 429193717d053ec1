"""The benchmarks that probe other libraries' features: our texts, our probe, plain errors.

No test here needs those libraries.
"""

import doctest
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune
from minissl.data.text_sources import load_texts
from minissl.data.texts import encode_texts
from minissl.evaluation.features import document_vectors, text_features
from minissl.evaluation.text_table import TextTask
from minissl.tokenizer import Tokenizer
from minissl.transformer import TextEncoder


FOLDER = Path(__file__).parent / "benchmarks"


def load_benchmark(name, monkeypatch):
    """The module of a benchmark, as on a machine without the other side's libraries."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])     # as python FILE has it
    for library in ("transformers", "tokenizers", "lightly", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)      # read_settings looks for its source here
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bert_features(monkeypatch):
    return load_benchmark("bert_features", monkeypatch)


@pytest.mark.parametrize("name", ["bert_features", "lightly_features"])
def test_a_missing_library_is_one_sentence(name, monkeypatch, run_script):
    module = load_benchmark(name, monkeypatch)
    code, printed = run_script(module)
    assert code == 2
    assert "pip install" in printed and printed.count("\n") == 1


def test_rate_and_minutes_follow_the_flags(bert_features, run_script):
    assert doctest.testmod(bert_features).failed == 0
    code, printed = run_script(bert_features, "--minutes", -1)
    assert code == 2 and "--minutes -1.0: must be at least 0" in printed


def test_windows_are_the_texts_end_to_end(bert_features):
    texts = encode_texts(["abcde", "fg", "hijk"], Tokenizer([]))
    expected = np.concatenate([texts[0], texts[1], texts[2]])
    assert len(expected) % 4 == 2                       # so two tokens are left over
    windows = bert_features.Windows(texts, 4, special_ids=[expected[1]])
    read = [windows[i]["input_ids"] for i in range(len(windows))]
    assert np.concatenate(read).tolist() == expected[:-2].tolist()
    masks = [windows[i]["special_tokens_mask"] for i in range(len(windows))]
    assert np.concatenate(masks).tolist() == (expected[:-2] == expected[1]).astype(int).tolist()


def test_features_are_the_mean_of_the_real_tokens(bert_features):
    """A stand-in for BERT whose last layer is a table: the mean is then easy to write down."""
    table = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))

    class StandIn(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=5, hidden_size=8)

        def bert(self, input_ids, attention_mask):
            shown = table[input_ids] + 100 * (1 - attention_mask[:, :, None])
            return SimpleNamespace(last_hidden_state=shown)

        def get_input_embeddings(self):
            return torch.nn.Embedding(300, 8)

    texts = encode_texts(["a", "three words here", "the longest text of all"], Tokenizer([]))
    features = document_vectors(bert_features.MeanOfTokens(StandIn()), texts, nullcontext())
    for i in range(len(texts)):
        expected = table[texts[i]].mean(0)
        assert torch.allclose(features[i], expected, atol=1e-6)


def test_the_probe_is_that_of_finetune(bert_features, corpus, tmp_path):
    texts = load_texts(str(corpus), tmp_path, 400)
    # With the true labels every accuracy is 100. With random ones each draw gives another one.
    texts = replace(texts, labels=np.random.default_rng(0).permutation(texts.labels))
    torch.manual_seed(0)
    model = TextEncoder(len(texts.tokenizer), torch.empty(0, dtype=torch.int64), width=8,
                        layers=1, heads=2, window=32, document_columns=8)
    machine = torch.device("cpu"), torch.float32, nullcontext()
    ours = TextTask(texts, model, machine, None)
    theirs = bert_features.ProbeTask(texts, text_features(model, texts, nullcontext()))
    settings = finetune.Settings(run="", labels=["5"], seeds=3, probe=True)
    tables = []
    for task in (ours, theirs):
        measurements, _ = finetune.measure_table(settings, task)
        tables.append([m["test_accuracy"] for m in measurements])
    assert tables[0] == tables[1]
    assert len(set(tables[0])) > 1
