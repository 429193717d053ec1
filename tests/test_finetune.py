"""finetune.py: what each column may see, what is chosen by what, and what happens to files.

The runs here have random weights, so no test needs a training script.
"""

import csv
import errno
import math
import shutil
import warnings
from contextlib import nullcontext
from functools import partial, partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finetune
from minissl import UserError, contrastive
from minissl.autoencoder import Autoencoder
from minissl.data import images, splits, text_sources, texts
from minissl.evaluation import (
    columns,
    features,
    image_table,
    load,
    measurements,
    ngrams,
    probes,
    text_table,
)
from minissl.evaluation.classifier import Classifier, read_classifier, write_classifier
from minissl.evaluation.columns import Column, LinearLearner, standardize
from minissl.evaluation.image_table import ImageOption, ImageTask
from minissl.evaluation.probes import LinearModel
from minissl.evaluation.text_table import TextOption, TextTask
from minissl.optim import Muon
from minissl.training import distributed, files, machine, report
from minissl.training.accuracies import by_condition
from minissl.transformer import TextEncoder


CPU = ["--device", "cpu", "--precision", "float32"]


# ---------------------------------------------------------------- runs

def write_run(folder, method, model, shape, data, settings, **more):
    """The folder of a run at step 90 with this model."""
    folder.mkdir(parents=True)
    files.write_checkpoint(folder / "checkpoint.pt", dict(
        format=files.CHECKPOINT_FORMAT, method=method, step=90, model=model.state_dict(),
        model_settings=shape, settings=dict(run=str(folder), limit=0) | settings,
        data=f"checksum {splits.fingerprint(data)}", **more))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def text_run(corpus, data_dir, tmp_path_factory):
    """A run on the corpus, of an encoder with random weights. Its blocks add a little."""
    data = text_sources.load_texts(str(corpus), data_dir, 400)
    torch.manual_seed(0)
    shape = dict(vocabulary_size=len(data.tokenizer), width=32, layers=1, heads=2, window=32,
                 pairs=texts.frequent_pairs(data, 100), document_columns=32)
    model = TextEncoder(**shape)
    nn.init.normal_(model.pair_embedding.weight[:-1], std=0.02)
    for matrix in (model.blocks[0].attention.output.weight, model.blocks[0].down.weight):
        nn.init.normal_(matrix, std=0.02)
    settings = dict(data=str(corpus), data_dir=str(data_dir), vocabulary_size=400)
    return write_run(tmp_path_factory.mktemp("runs") / "mlm", "mlm", model, shape, data, settings,
                     tokenizer=data.tokenizer.to_json())


def make_image_run(folder, method="simclr", name="shapes", limit=100):
    """A run of an encoder with random weights, on the images with this name."""
    data = images.load_images(name, limit=limit)
    settings = dict(data=name, data_dir="data", limit=limit)
    shape = dict(width=8, **images.mean_and_whitening(data))
    cls = contrastive.SimCLR
    if method == "autoencoder":
        cls = Autoencoder
        shape.update(images.mean_and_std(data))
        shape.update(size=list(data.shape[2:]), code=16)
        settings["code"] = 16
    torch.manual_seed(0)
    return write_run(folder, method, cls(**shape), shape, data, settings)


@pytest.fixture(scope="session")
def image_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image runs")
    for method in ("simclr", "autoencoder"):
        make_image_run(folder / method, method)
    return folder


@pytest.fixture
def run(text_run, tmp_path):
    """A copy of the run on texts, for a test that writes into it."""
    return shutil.copytree(text_run, tmp_path / "run")


@pytest.fixture
def image_run(image_runs, tmp_path):
    return shutil.copytree(image_runs / "simclr", tmp_path / "image run")


@pytest.fixture
def brief(monkeypatch):
    """Few options and a few steps are enough to see what depends on what."""
    train = ImageTask.train_classifier
    fit_probe = LinearLearner.fit

    def fit_briefly(self, indices):
        every, self.strengths = self.strengths, self.strengths[1::3]
        model = fit_probe(self, indices)
        self.strengths = every
        return model

    def train_briefly(*arguments, **options):
        return train(*arguments, **options, images_seen=64)
    monkeypatch.setattr(LinearLearner, "fit", fit_briefly)
    for name in ("TF_IDF_STRENGTHS", "NAIVE_BAYES_STRENGTHS"):
        monkeypatch.setattr(ngrams, name, getattr(ngrams, name)[1::3])
    monkeypatch.setattr(ImageTask, "train_classifier", train_briefly)
    def two_options(self, n):
        return [ImageOption(0.0, 0.5), ImageOption(0.002, 0.5, freeze_norm=True)]
    def two_text_options(self, n):
        return [TextOption(0.0, 0), TextOption(0.02, 2)]
    monkeypatch.setattr(TextTask, "scratch_options", two_text_options)
    monkeypatch.setattr(TextTask, "fine_tuning_options", two_text_options)
    monkeypatch.setattr(TextTask, "choice_draws", 1)
    monkeypatch.setattr(ImageTask, "scratch_options", two_options)
    monkeypatch.setattr(ImageTask, "fine_tuning_options", two_options)


@pytest.fixture
def rates(monkeypatch):
    """{optimizer: the learning rates of its steps}, of its first group. The steps do nothing."""
    rates = {Muon: [], torch.optim.Adam: []}
    for optimizer, seen in rates.items():
        def record(self, seen=seen):
            seen.append(self.param_groups[0]["lr"])
        monkeypatch.setattr(optimizer, "step", record)
    return rates


def read_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def equal(a, b):
    """Are two dicts of tensors equal?"""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- the table

def test_the_table_goes_into_csv_and_page(run, run_script, brief):
    code, printed = run_script(finetune, run, *CPU, "--labels", 10, "all", "--seeds", 2)
    assert code == 0, printed
    rows = read_rows(run / "finetune.csv")
    methods = ["n-grams", "from scratch", "linear probe", "self-trained", "all together",
               "fine-tuned"]
    assert {(row["labels_a_class"], row["method"]) for row in rows} == {
        (labels, method) for labels in ("10", "all") for method in methods}
    assert list(rows[0]) == ["labels_a_class", "method", "seed", "test_accuracy", "seconds",
                             "data", "limit", "step", "checksum", "mirrored"]
    assert {(row["limit"], row["step"], row["mirrored"]) for row in rows} == {("0", "90", "")}
    accuracies = [float(row["test_accuracy"]) for row in rows if row["method"] == "linear probe"]
    assert np.mean(accuracies) > 90     # the topics share almost no noun
    assert "fine-tuned" in (run / "report.html").read_text(encoding="utf-8")
    assert (run / "finetune.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "the table has 2 classes: city, sea" in printed
    last = printed.splitlines()[-1]
    # The three columns in which nothing is random have one measurement in the row "all".
    assert last.split()[0] == "all" and last.count("±") == 3
    of_all = [row["method"] for row in rows if row["labels_a_class"] == "all"]
    assert [of_all.count(method) for method in methods] == [1, 2, 1, 1, 2, 2]


def test_predict_labels_new_texts(run, run_script, brief, tmp_path):
    assert run_script(finetune, run, *CPU, "--labels", 10, "--seeds", 1)[0] == 0
    (tmp_path / "new.txt").write_text("the ship sails\nthe tower opens\n", encoding="utf-8")
    code, printed = run_script(finetune, run, *CPU, "--predict", tmp_path / "new.txt")
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    assert code == 0, printed
    assert [line[0] for line in lines] == ["sea", "city"]
    assert [line[2] for line in lines] == ["the ship sails", "the tower opens"]
    assert "trained on 20 labels of" in printed and "classes city, sea" in printed


def test_only_predictions_go_to_the_standard_output(
        run, run_script, brief, tmp_path, monkeypatch, capsys):
    assert run_script(finetune, run, *CPU, "--labels", 2, "--seeds", 1)[0] == 0
    (tmp_path / "new.txt").write_text("the ship sails\nthe tower opens\n", encoding="utf-8")
    command = ["finetune.py", run, *CPU, "--predict", tmp_path / "new.txt"]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    finetune.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("\t") for line in lines] == [2, 2]


def test_images_without_a_label_reach_the_table(tmp_path, run_script, brief):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    labels[:40] = -1
    np.save(tmp_path / "a.npy", rng.integers(0, 255, (200, 8, 8)).astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", labels)
    folder = make_image_run(tmp_path / "run", name=str(tmp_path / "a.npy"), limit=0)
    code, printed = run_script(finetune, folder, *CPU, "--labels", 2, "--seeds", 1)
    assert code == 0, printed
    assert "without a label: 36 for self-training" in printed         # four are held out


def test_the_probe_alone_leaves_the_table_as_it_is(run, run_script):
    for name in ("finetune.csv", "classifier.pt", "finetune.svg"):
        (run / name).write_text("as it was", encoding="utf-8")
    code, printed = run_script(finetune, run, *CPU, "--probe", "--labels", 2, 5, "--seeds", 2)
    assert code == 0, printed
    for name in ("finetune.csv", "classifier.pt", "finetune.svg"):
        assert (run / name).read_text(encoding="utf-8") == "as it was"
    found = [(row["labels_a_class"], row["method"]) for row in read_rows(run / "probe.csv")]
    assert found == [("2", "linear probe")] * 2 + [("5", "linear probe")] * 2
    page = (run / "report.html").read_text(encoding="utf-8")
    section = page.partition("<h2>Linear probe</h2>")[2]
    assert "over 2 draws of labels" in section and "<td>5</td>" in section


def test_ctrl_c_keeps_the_finished_rows(run, run_script, brief, monkeypatch):
    measure_row = finetune.measure_row

    def interrupted(settings, task, columns, row):
        if row == stop:
            raise KeyboardInterrupt
        return measure_row(settings, task, columns, row)
    monkeypatch.setattr(finetune, "measure_row", interrupted)
    flags = [*CPU, "--labels", 2, 5, "--seeds", 1]
    stop = "2"
    code, printed = run_script(finetune, run, *flags)
    assert code == 130 and "interrupted before the first row was complete: nothing" in printed
    assert not (run / "finetune.csv").exists()
    stop = "5"
    code, printed = run_script(finetune, run, *flags)
    assert code == 130 and "interrupted in the row 5: the rows before it are kept" in printed
    assert "in brackets: seconds of the fit alone" in printed      # above the table of this row
    assert {row["labels_a_class"] for row in read_rows(run / "finetune.csv")} == {"2"}
    assert (run / "classifier.pt").exists()


def test_a_crash_keeps_the_finished_rows(run, run_script, monkeypatch):
    measure_row = finetune.measure_row

    def crashes(settings, task, columns, row):
        if row == "5":
            raise MemoryError
        return measure_row(settings, task, columns, row)
    monkeypatch.setattr(finetune, "measure_row", crashes)
    code, _ = run_script(finetune, run, *CPU, "--probe", "--labels", 2, 5, "--seeds", 1)
    assert code == 1
    assert {row["labels_a_class"] for row in read_rows(run / "probe.csv")} == {"2"}


def test_a_full_disk_does_not_hide_the_finished_row(run, run_script, monkeypatch):
    def no_space(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(measurements, "write_csv", no_space)
    code, printed = run_script(finetune, run, *CPU, "--probe", "--labels", 2, "--seeds", 1)
    assert code == 1 and "No space left" in printed
    assert "draw 1: linear probe" in printed


def test_a_table_needs_a_writable_folder(run, run_script, monkeypatch):
    monkeypatch.setattr(finetune, "is_writable", lambda folder: False)
    code, printed = run_script(finetune, run, *CPU, "--labels", 2)
    assert code == 2 and "is read-only; copy the run to a writable" in printed.splitlines()[-1]
    assert "draw 1" not in printed


def test_all_means_all_but_the_test_set(run, run_script, monkeypatch):
    asked, fit = [], LinearLearner.fit

    def watched(self, indices):
        asked.append(tuple(indices))
        return fit(self, indices)
    monkeypatch.setattr(LinearLearner, "fit", watched)
    code, printed = run_script(finetune, run, *CPU, "--probe", "--labels", 2, "all", "--seeds", 3)
    assert code == 0, printed
    assert [len(indices) for indices in asked] == [4] * 3 + [160]
    assert len(set(asked[:3])) == 3             # each draw is another
    task = text_task(run)
    assert set(sum(asked[:3], ())) <= set(task.train)
    assert set(asked[3]) == set(task.train) | set(task.held_out)


def fit_option(indices, option, seed, fitted):
    """The model of a column in these tests: its option."""
    return option


def test_the_best_option_on_held_out_examples_is_chosen():
    labels = torch.tensor([0, 1] * 30)
    task = SimpleNamespace(labels=labels, held_out=np.arange(40, 50))
    right = dict(never=np.zeros(60, bool), held_out=np.arange(60) < 50, test=np.arange(60) >= 50)

    def predict(option, indices):
        is_right = torch.from_numpy(right[option][indices])
        return torch.where(is_right, labels[indices], 1 - labels[indices])
    column = Column(fit_option, predict)
    options = ["never", "held_out", "test"]
    for draws in (1, 2):
        assert finetune.choose(column, options, task, [(np.arange(4), {})] * draws) == "held_out"


@pytest.mark.parametrize("prefers_first, gained, lost, chosen", [
    (True, 1, 0, "first"),          # ahead by one of ten, with a standard error of 0.1
    (True, 2, 1, "first"),          # ahead by 0.1 of ten, with a standard error of 0.18
    (False, 2, 1, "other"),
    (True, 4, 0, "other"),          # ahead by 0.4, with a standard error of 0.16
])
def test_the_safe_option_yields_only_to_a_clear_lead(prefers_first, gained, lost, chosen):
    labels = torch.tensor([0, 1] * 10)
    task = SimpleNamespace(labels=labels, held_out=np.arange(10, 20))
    right = dict(first=np.arange(20) >= 15, other=np.arange(20) >= 15 - gained)
    right["other"][20 - lost:] = False

    def predict(option, indices):
        is_right = torch.from_numpy(right[option][indices])
        return torch.where(is_right, labels[indices], 1 - labels[indices])
    column = Column(fit_option, predict, prefers_first=prefers_first)
    draws = [(np.arange(6), {})]
    assert finetune.choose(column, ["first", "other"], task, draws) == chosen


def test_with_one_held_out_example_the_safe_option_stays():
    task = SimpleNamespace(labels=torch.tensor([1]), held_out=np.array([0]))

    def predict(option, indices):
        return torch.tensor([option])
    column = Column(fit_option, predict, prefers_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")          # of a standard deviation of one number
        assert finetune.choose(column, [0, 1], task, [(np.array([0]), {})]) == 0


def test_chance_is_the_share_of_the_commonest_test_class(capsys):
    labels = torch.tensor([0, 1] * 10 + [0, 1, 1, 1] * 2)
    probe = SimpleNamespace(fit=lambda indices: None,
                            predict=lambda model, indices: torch.ones(len(indices)))
    task = SimpleNamespace(labels=labels, train=np.arange(10), held_out=np.arange(10, 20),
                           test=np.arange(20, 28), classes=["a", "b"], probe=probe, choice_draws=1)
    settings = SimpleNamespace(labels=["2"], seeds=2, probe=True)
    counts = []

    def keep(measured, model, count):
        counts.append(count)
    rows, chance = finetune.measure_table(settings, task, keep)
    assert chance == 75 and counts == [4]
    assert [row["test_accuracy"] for row in rows] == [75, 75]
    assert "the commonest class: 75.0 %" in capsys.readouterr().out


@pytest.mark.parametrize("row, count", [("3", 2), ("all", 1)])
def test_choices_learn_from_training_examples_alone(row, count, monkeypatch):
    """From other draws than those of the table, and with no more than the needed columns."""
    seen = []

    def fit_probe(indices, option, seed, fitted):
        return f"a probe of {indices.tolist()}"

    def fit(indices, option, seed, fitted):
        raise AssertionError("no choice needs this column")

    def note(column, options, task, draws):
        seen.extend(draws)
        return options[0]
    monkeypatch.setattr(finetune, "choose", note)
    task = SimpleNamespace(labels=torch.tensor([0, 1] * 10), train=np.arange(12),
                           held_out=np.arange(12, 16), choice_draws=2)
    columns = {
        "unneeded": Column(fit, None),
        "probe": Column(fit_probe, None),
        "chosen": Column(fit, None, needs=("probe",), options=lambda n: [1, 2]),
    }
    finetune.choose_options(task, columns, row, 6, "a row")
    assert len(seen) == count
    for seed, (indices, fitted) in enumerate(seen):
        assert set(indices) <= set(task.train)
        assert fitted == {"probe": f"a probe of {indices.tolist()}"}
        if row != "all":
            assert set(indices) == set(finetune.draw_examples(task, row, 1000 + seed))


@pytest.mark.parametrize("row, seeds", [("2", [0, 1, 2]), ("all", [0, 1])])
def test_a_row_is_fitted_with_the_chosen_option_and_its_seed(row, seeds, monkeypatch):
    used = []

    def fit(indices, option, seed, fitted):
        used.append((option, seed))

    def predict(model, indices):
        return torch.zeros(len(indices))

    def choose_second(column, options, task, draws):
        return options[1]
    column = Column(fit, predict, options=lambda n: ["first", "second"])
    task = SimpleNamespace(labels=torch.tensor([0, 1] * 10), train=np.arange(10),
                           held_out=np.arange(10, 14), test=np.arange(14, 20), choice_draws=1)
    monkeypatch.setattr(finetune, "choose", choose_second)
    finetune.measure_row(SimpleNamespace(seeds=3), task, {"a column": column}, row)
    assert used == [("second", seed) for seed in seeds]


def test_default_rows_that_need_too_many_labels_are_left_out(capsys):
    labels = torch.tensor([0] * 3 + [1] * 60)
    task = SimpleNamespace(labels=labels, train=np.arange(63), classes=["a", "b"],
                           default_labels=["2", "10", "100", "all"])
    assert finetune.possible_rows(SimpleNamespace(labels=[]), task) == ["2", "all"]
    printed = capsys.readouterr().out
    assert "left out: 10 and 100 labels a class, because the smallest class, a" in printed


@pytest.mark.parametrize("n", [20, 5000])
def test_the_safe_option_of_few_labels_is_the_probe(n):
    assert TextTask.fine_tuning_options(None, n)[0].rate == 0
    options = ImageTask.fine_tuning_options(None, n)
    assert options[0].rate == 0
    assert all(option.freeze_norm for option in options)
    for option in ImageTask.fine_tuning_options(None, 5001):
        assert not option.freeze_norm


def test_a_row_is_planned_for_all_its_labels(monkeypatch):
    planned = []

    def options(n):
        planned.append(n)
        return [None]

    def predict(model, indices):
        return torch.zeros(len(indices))
    task = SimpleNamespace(labels=torch.tensor([0, 1] * 14), train=np.arange(10),
                           held_out=np.arange(10, 20), test=np.arange(20, 28))
    columns = dict(any=Column(fit_option, predict, options=options))
    settings = SimpleNamespace(seeds=2)
    for row in ("3", "all"):
        finetune.measure_row(settings, task, columns, row)
    assert planned == [6, 20]       # "all" includes the held-out examples


def test_a_column_sees_the_models_of_the_columns_that_it_needs():
    seen = []

    def fit(indices, option, seed, fitted):
        seen.append((tuple(indices), dict(fitted)))
        return tuple(indices)

    def predict(model, indices):
        return torch.zeros(len(indices))
    task = SimpleNamespace(labels=torch.tensor([0, 1] * 14), train=np.arange(10),
                           held_out=np.arange(10, 20), test=np.arange(20, 28))
    columns = dict(first=Column(fit, predict), second=Column(fit, predict),
                   third=Column(fit, predict, needs=("first",)))
    finetune.measure_row(SimpleNamespace(seeds=3), task, columns, "2")
    for first, second, third in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert first[1] == second[1] == {}
        assert third == (first[0], dict(first=first[0]))
    assert len({indices for indices, _ in seen}) == 3


def test_held_out_examples_of_incomplete_classes_are_not_enough():
    # The classes a and b have no held-out example, and c has no test example.
    labels = np.array([0, 1, 0, 1, 2, 2])
    split = np.array([splits.TRAIN] * 2 + [splits.TEST] * 2 + [splits.TRAIN, splits.HELD_OUT])
    pixels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    data = images.Images(pixels, torch.arange(6), labels, split, ["a", "b", "c"])
    with pytest.raises(UserError, match="no example with a label is held out"):
        finetune.keep_complete_classes(data, "x.npy")


def test_the_printed_table_has_means_and_spreads(capsys):
    rows = [dict(labels_a_class=labels, method=method, test_accuracy=accuracy, seconds=2.0)
            for labels, method, accuracy in (("10", "pixels", 20), ("10", "pixels", 30),
                                             ("10", "fine-tuned", 40), ("10", "fine-tuned", 40),
                                             ("all", "pixels", 50), ("all", "fine-tuned", 60))]
    measurements.print_table(rows, 25)
    _, _, head, *lines = capsys.readouterr().out.strip().splitlines()
    assert head.split() == ["labels", "a", "class", "pixels", "fine-tuned"]
    assert lines[0].split() == "10 25.0 ± 7.1 (2) 40.0 ± 0.0 (2)".split()
    assert lines[1].split() == "all 50.0 (2) 60.0 (2)".split()


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_permuting_the_test_labels_changes_no_choice(
        kind, run, image_run, run_script, brief, monkeypatch):
    folder, name = (run, "load_texts") if kind == "texts" else (image_run, "load_images")
    loader, measure = getattr(finetune, name), finetune.measure_row
    held_out_scores = finetune.held_out_scores
    models, seen = [], []                       # seen: the scores that the choices rest on

    def permuted(*arguments, **options):
        data = loader(*arguments, **options)
        test = np.flatnonzero(data.split == splits.TEST)
        data.labels = data.labels.copy()
        data.labels[test] = data.labels[test][::-1]
        return data

    def keep_model(*arguments):
        measurements, model, labels = measure(*arguments)
        models.append(model.state_dict())
        return measurements, model, labels

    def keep_scores(*arguments):
        scores = held_out_scores(*arguments)
        seen.append(scores.tolist())
        return scores
    monkeypatch.setattr(finetune, "measure_row", keep_model)
    monkeypatch.setattr(finetune, "held_out_scores", keep_scores)
    for load_data in (loader, permuted):
        monkeypatch.setattr(finetune, name, load_data)
        code, printed = run_script(finetune, folder, *CPU, "--labels", 3, "--seeds", 1,
                                   "--limit", 0 if kind == "texts" else 100)
        assert code == 0, printed
    half = len(seen) // 2
    assert half >= 3 and seen[:half] == seen[half:]
    assert equal(*models)


# ---------------------------------------------------------------- classes

def test_a_class_without_a_test_image_is_left_out():
    split = np.uint8([0, 0, 1, 2] * 3)
    labels = np.repeat([0, 1, 2], 4)
    labels[7] = -1                              # class 1 has no test image
    data = images.Images(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.arange(12), labels,
                         split, ["cat", "dog", "bird"])
    kept = finetune.keep_complete_classes(data, "a.npy")
    assert kept.classes == ["cat", "bird"]
    assert kept.labels.tolist() == [0] * 4 + [1] * 4
    assert kept.rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("most, expected", [(9, [1, 5]), (6, [1, 5]), (5, [1]), (4, []), (0, [])])
def test_unlabelled_images_of_the_training_split_fill_the_room(most, expected):
    split = np.uint8([0, 0, 0, 1, 2, 0, 0, 0, 1, 2, 1, 2])
    labels = np.array([0, -1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1])
    data = images.Images(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.arange(12), labels,
                         split, ["cat", "dog"])
    kept = finetune.keep_complete_classes(data, "a.npy", most)
    assert kept.rows.tolist() == [0, 2, 3, 4, 6, 7, 8, 9, *expected]
    assert kept.labels.tolist() == [0] * 4 + [1] * 4 + [-1] * len(expected)


def test_the_classes_left_out_are_printed(corpus, run, run_script, tmp_path):
    for name, source in dict(sea="sea", city="city").items():
        shutil.copytree(corpus / source, tmp_path / "texts" / name)
    (tmp_path / "texts" / "desert").mkdir()
    (tmp_path / "texts" / "desert" / "0.txt").write_text("A camel waits.", encoding="utf-8")
    code, printed = run_script(finetune, run, *CPU, "--data", tmp_path / "texts", "--probe",
                               "--data-dir", tmp_path, "--labels", 2, "--seeds", 1)
    assert code == 0, printed
    left_out = "left out, because they have no example to train on or none to test on: desert"
    assert left_out in printed and "the table has 2 classes: city, sea" in printed


def test_fewer_than_two_whole_classes_are_refused(run, run_script, tmp_path):
    for name in ("sea", "desert"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for n in range(2):
            path = tmp_path / "texts" / name / f"{n}.txt"
            path.write_text(f"The {name} number {n}.", encoding="utf-8")
    code, printed = run_script(finetune, run, *CPU, "--data", tmp_path / "texts", "--probe",
                               "--data-dir", tmp_path)
    assert code == 2 and "no class has examples both to train on" in printed


def test_messages_name_the_only_class(corpus, run, run_script, tmp_path):
    shutil.copytree(corpus / "sea", tmp_path / "texts" / "sea")
    flags = [run, *CPU, "--data", tmp_path / "texts", "--probe", "--data-dir", tmp_path]
    code, printed = run_script(finetune, *flags)
    assert code == 2 and "needs two classes, but found only: sea;" in printed, printed
    (tmp_path / "texts" / "city").mkdir()
    (tmp_path / "texts" / "city" / "0.txt").write_text("The tower.", encoding="utf-8")
    code, printed = run_script(finetune, *flags)
    assert code == 2 and "only the class sea has examples both" in printed, printed


def test_messages_say_1_example_and_1_label(run_script, run):
    labels = torch.tensor([0, 1, 1])
    task = SimpleNamespace(labels=labels, train=np.arange(3), classes=["a", "b"])
    with pytest.raises(UserError, match="a, has 1 example to train on; give at most 1"):
        finetune.possible_rows(SimpleNamespace(labels=["5"]), task)
    code, printed = run_script(finetune, run, *CPU, "--probe", "--labels", 1, "--seeds", 1)
    assert code == 0 and printed.count("1 label a class") == 1, printed


def test_many_class_names_are_shortened():
    names = [str(n) for n in range(100)]
    assert finetune.list_names(names) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 90 more"


# ---------------------------------------------------------------- a trial beside a result

CONDITION = dict(data="a.npy", limit=0, step=90, checksum="1", mirrored="yes")


def measurement(labels="10", method="pixels", accuracy=50.0, **changed):
    return dict(labels_a_class=labels, method=method, seed=0, test_accuracy=accuracy, seconds=1.0,
                **CONDITION | changed)


@pytest.mark.parametrize("change", [
    dict(labels="50"), dict(method="fine-tuned"), dict(data="b.npy"), dict(limit=12),
    dict(step=100), dict(checksum="2"), dict(mirrored="no")])
def test_rows_of_other_measurements_stay(change, tmp_path):
    path = tmp_path / "finetune.csv"
    files.write_csv(path, [measurement(), measurement(**change)])
    old = measurements.read_measurements(path)
    merged = measurements.merge_measurements(old, [measurement(accuracy=60.0)])
    found = {float(row["test_accuracy"]) for row in merged}
    assert len(merged) == 2 and found == {50, 60}


def test_merged_rows_are_sorted_and_the_newest_condition_is_last():
    old = [measurement("all"), measurement("10"), measurement("10", limit=12)]
    merged = measurements.merge_measurements(old, [measurement("500")])
    found = [(row["labels_a_class"], row["limit"]) for row in merged]
    assert found == [("10", 12), ("10", 0), ("500", 0), ("all", 0)]


def test_a_trial_does_not_replace_a_result(run, run_script, brief):
    assert run_script(finetune, run, *CPU, "--labels", 5, 10, "--seeds", 1)[0] == 0
    result = read_rows(run / "finetune.csv")
    classifier = (run / "classifier.pt").read_bytes()
    figure = (run / "finetune.svg").read_bytes()
    code, printed = run_script(finetune, run, *CPU, "--labels", 5, "--seeds", 1, "--limit", 40)
    assert code == 0, printed
    rows = read_rows(run / "finetune.csv")
    assert [row for row in rows if row["limit"] == "0"] == result
    assert {row["labels_a_class"] for row in rows if row["limit"] == "40"} == {"5"}
    assert (run / "classifier.pt").read_bytes() == classifier
    assert (run / "finetune.svg").read_bytes() == figure
    assert "classifier.pt stays as it was, because this table is a trial" in printed
    assert "--limit 40" in (run / "report.html").read_text(encoding="utf-8")


def test_the_figure_of_a_trial_shows_all_its_rows(run, run_script, brief):
    flags = [*CPU, "--labels", 5, 10, "--seeds", 1, "--limit", 40]
    code, printed = run_script(finetune, run, *flags)
    assert code == 0, printed
    rows = read_rows(run / "finetune.csv")
    figure = report.label_figure(rows, xmlns="http://www.w3.org/2000/svg")
    assert (run / "finetune.svg").read_text(encoding="utf-8") == figure
    assert ">5<" in figure and ">10<" in figure


def test_the_figure_shows_the_newest_condition_alone(run, run_script, brief):
    other = measurement("7", "pixels", data="other.npy")
    files.write_csv(run / "finetune.csv", [other])
    code, printed = run_script(finetune, run, *CPU, "--labels", 2, "--seeds", 1)
    assert code == 0, printed
    figure = (run / "finetune.svg").read_text(encoding="utf-8")
    assert "pixels" not in figure and "fine-tuned" in figure
    assert "other.npy" in (run / "report.html").read_text(encoding="utf-8")


def test_one_path_in_two_spellings_is_one_source(tmp_path):
    path = tmp_path / "finetune.csv"
    for labels, name in (("1", "./d/a.npy"), ("2", "b.npy"), ("3", "d/../d/a.npy")):
        shared = CONDITION | dict(data=name)
        _, outdated = measurements.add_measurements(path, [measurement(labels)], shared)
        assert outdated == 0
    names = [(row["labels_a_class"], row["data"]) for row in read_rows(path)]
    assert names == [("2", "b.npy"), ("1", "d/../d/a.npy"), ("3", "d/../d/a.npy")]
    assert load.is_same_source("imdb", "imdb") and not load.is_same_source("imdb", "./imdb")


def test_other_content_under_the_same_name_stays_apart(run_script, tmp_path):
    rng = np.random.default_rng(0)
    name = str(tmp_path / "a.npy")
    labels = np.arange(200) % 2
    np.save(name, rng.integers(0, 255, (200, 8, 8)).astype(np.uint8))
    folder = make_image_run(tmp_path / "run", name=name, limit=0)
    for row in (5, 10):
        np.save(tmp_path / "a.labels.npy", labels)
        code, printed = run_script(finetune, folder, *CPU, "--labels", row, "--seeds", 1,
                                   "--probe")
        assert code == 0, printed
        labels = 1 - labels         # the same images and the same split
    assert "has changed, so 1 older result moved to a separate table" in printed
    old, new = by_condition(read_rows(folder / "probe.csv"))
    assert old.data == new.data == name and old.checksum != new.checksum
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count(f"{name} of other content (checksum {old.checksum})") == 1
    assert page.count("of other content") == 1


def test_content_that_comes_back_finds_its_old_rows(tmp_path):
    path = tmp_path / "finetune.csv"
    for labels, accuracy, checksum, expected in (
            ("10", 50, "a", 0), ("10", 60, "b", 1), ("20", 61, "b", 0), ("10", 51, "a", 2)):
        shared = CONDITION | dict(checksum=checksum)
        rows, outdated = measurements.add_measurements(
            path, [measurement(labels, accuracy=accuracy)], shared)
        assert outdated == expected
        assert {row["checksum"] for row in rows} == {checksum}
    before = measurements.read_measurements(path)
    assert [row["test_accuracy"] for row in before] == ["60", "61", "51"]
    # What another --limit has measured says nothing about the content.
    shared = CONDITION | dict(checksum="c", limit=7)
    assert measurements.add_measurements(path, [measurement()], shared)[1] == 0
    assert measurements.read_measurements(path)[:3] == before


def test_a_csv_of_another_version_is_refused_and_named(run, run_script):
    row = measurement()
    del row["mirrored"]
    files.write_csv(run / "probe.csv", [row])
    before = (run / "probe.csv").read_bytes()
    code, printed = run_script(finetune, run, *CPU, "--labels", 2, "--probe")
    assert code == 2 and "draw 1" not in printed
    sentence = printed.splitlines()[-1]
    assert "probe.csv has no column mirrored" in sentence and "move it away" in sentence
    assert (run / "probe.csv").read_bytes() == before


def test_rows_that_came_while_measuring_are_kept(run, run_script, monkeypatch):
    measure = finetune.measure_table

    def measure_slowly(settings, task, keep):
        monkeypatch.setattr(finetune, "measure_table", measure)
        assert run_script(finetune, run, *CPU, "--probe", "--labels", 5, "--seeds", 1)[0] == 0
        return measure(settings, task, keep)
    monkeypatch.setattr(finetune, "measure_table", measure_slowly)
    code, printed = run_script(finetune, run, *CPU, "--probe", "--labels", 2, "--seeds", 1)
    assert code == 0, printed
    assert [row["labels_a_class"] for row in read_rows(run / "probe.csv")] == ["2", "5"]


def test_the_same_row_twice_is_measured_once():
    settings = finetune.Settings(run="r", labels=["1", "01", "all", "\u0661", "all", "2"])
    assert settings.labels == ["1", "all", "2"]


CONDITIONS = dict(step=90, classes=["a", "b"], shape=None, flip=None, data="a.txt", limit=0,
                  labels=100, checksum="1")


@pytest.mark.parametrize("change, replaced", [
    (dict(), True), (dict(labels=200), True), (dict(labels=20), False),
    (dict(labels=20, data="b.txt"), True), (dict(labels=20, step=100), True),
    (dict(labels=20, data="./a.txt"), False), (dict(labels=20, checksum="2"), True),
    (dict(labels=200, limit=12), False), (dict(labels=200, limit=12, step=100), True)])
def test_the_classifier_of_most_labels_is_kept(change, replaced, tmp_path):
    finetune.keep_classifier(tmp_path, nn.Linear(1, 1), CONDITIONS)
    before = files.file_hash(tmp_path / "classifier.pt")
    finetune.keep_classifier(tmp_path, nn.Linear(1, 1), CONDITIONS | change)
    assert (files.file_hash(tmp_path / "classifier.pt") != before) == replaced


def test_a_trial_replaces_a_trial(tmp_path):
    finetune.keep_classifier(tmp_path, nn.Linear(1, 1), CONDITIONS | dict(limit=12))
    finetune.keep_classifier(tmp_path, nn.Linear(1, 1), CONDITIONS | dict(limit=40, labels=101))
    assert read_classifier(tmp_path)["limit"] == 40


def test_a_classifier_without_a_checksum_is_replaced(tmp_path):
    old = CONDITIONS | dict(labels=200)
    del old["checksum"]
    write_classifier(tmp_path, nn.Linear(1, 1), old)
    finetune.keep_classifier(tmp_path, nn.Linear(1, 1), CONDITIONS)
    assert read_classifier(tmp_path)["labels"] == 100


HEAD = b"labels_a_class,method,seed,test_accuracy,seconds,data,limit,step,checksum,mirrored\n"


@pytest.mark.parametrize("content", [
    HEAD + b"ten,pixels,0,50.0,1.0,a,0,90,1,yes\n",
    HEAD + b'2,pixels,0,"100,0",1.0,a,0,90,1,yes\n',
    HEAD + b"2,pixels,0,100%,1.0,a,0,90,1,yes\n",
    HEAD + b"2,pixels,0,nan,1.0,a,0,90,1,yes\n",
    HEAD + b"2,pixels,0,500,1.0,a,0,90,1,yes\n",
    HEAD + b"2,pixels,0,50.0,1 s,a,0,90,1,yes\n",
    HEAD + b"2,pixels,0,50.0,nan,a,0,90,1,yes\n",
    HEAD + b"2,pixels,0.0,50.0,1.0,a,0,90,1,yes\n",
    HEAD + b"2,pixels,0,50.0,1.0,a,0,90,1\n",
    HEAD + b"2,pixels,0,50.0,1.0,a,0,90,1,yes,1\n",
])
def test_a_damaged_csv_is_refused_before_measuring(content, run, run_script):
    (run / "finetune.csv").write_bytes(content)
    code, printed = run_script(finetune, run, *CPU, "--labels", 2)
    assert code == 2 and "finetune.csv is damaged: correct its row 1" in printed.splitlines()[-1]
    assert "draw 1" not in printed


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 200_000])
def test_what_is_no_csv_is_refused_before_measuring(content, run, run_script):
    (run / "finetune.csv").write_bytes(content)
    code, printed = run_script(finetune, run, *CPU, "--labels", 2)
    assert code == 2 and "finetune.csv cannot be read as a table" in printed.splitlines()[-1]
    assert "draw 1" not in printed


# ---------------------------------------------------------------- has the test set been seen?

WARNING = "warning: the data or its split has changed since pretraining"


@pytest.mark.parametrize("limit", [0, 50])
def test_files_that_came_after_the_pretraining_are_warned_of(
        limit, run, corpus, run_script, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    checkpoint = files.load_checkpoint(run)
    checkpoint["settings"].update(data=str(tmp_path / "texts"), data_dir=str(tmp_path / "data"))
    files.write_checkpoint(run / "checkpoint.pt", checkpoint)
    flags = [run, *CPU, "--labels", 5, "--seeds", 1, "--probe", "--limit", limit]
    code, printed = run_script(finetune, *flags)
    assert code == 0 and WARNING not in printed, printed
    for n in range(10):                         # texts of the test set move into the training set
        path = tmp_path / "texts" / "sea" / f"z{n}.txt"
        path.write_text(f"New text number {n}.", encoding="utf-8")
    code, printed = run_script(finetune, *flags)
    assert code == 0 and WARNING in printed, printed


def test_labels_that_came_after_the_pretraining_are_warned_of(run_script, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.integers(0, 255, (200, 8, 8)).astype(np.uint8))
    path = str(tmp_path / "a.npy")

    def probe(run, *flags):
        code, printed = run_script(finetune, run, *CPU, "--labels", 5, "--seeds", 1, "--probe",
                                   *flags)
        assert code == 0, printed
        return printed
    unlabelled = make_image_run(tmp_path / "unlabelled", name=path, limit=0)
    np.save(tmp_path / "a.labels.npy", rng.integers(0, 2, 200))
    assert WARNING in probe(unlabelled) and WARNING in probe(unlabelled, "--limit", 15)
    labelled = make_image_run(tmp_path / "labelled", name=path, limit=0)
    assert WARNING not in probe(labelled) and WARNING not in probe(labelled, "--limit", 15)
    np.save(tmp_path / "a.labels.npy", np.arange(200) // 100)       # other ones, equally many
    assert WARNING in probe(labelled)
    for name in ("a", "a.labels"):                                  # the same under another name
        (tmp_path / f"{name}.npy").rename(tmp_path / f"{name.replace('a', 'b', 1)}.npy")
    assert WARNING in probe(labelled, "--data", tmp_path / "b.npy")


def test_other_data_gets_a_note_and_no_warning(run, corpus, run_script, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    (tmp_path / "texts" / "sea" / "0.txt").write_text("A new text.", encoding="utf-8")
    flags = [run, *CPU, "--labels", 5, "--seeds", 1, "--probe"]
    note = "note: make sure that the run was not trained on the test examples of"
    assert note not in run_script(finetune, *flags)[1]
    assert note not in run_script(finetune, *flags, "--data", corpus)[1]
    code, printed = run_script(finetune, *flags, "--data", tmp_path / "texts")
    assert code == 0 and f"{note} {tmp_path / 'texts'}" in printed


# ---------------------------------------------------------------- features

def test_features_are_written_one_row_a_text(run, corpus, run_script, tmp_path):
    code, printed = run_script(finetune, run, *CPU, "--features", tmp_path / "out.npy",
                               "--data", corpus, "--data-dir", tmp_path)
    assert code == 0, printed
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (200, 32) and found.dtype == np.float32
    paths = [corpus / "city" / f"{n:03}.txt" for n in (0, 7)]
    strings = [path.read_text(encoding="utf-8") for path in paths]
    np.testing.assert_allclose(load.load_encoder(run)(strings), found[[0, 7]], atol=1e-5)


def test_a_file_has_one_row_of_features_copies_included(
        run, corpus, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "LONGEST_FILE", 200)  # not for features
    monkeypatch.setattr(text_sources, "LONGEST_TEXT", 50)
    sources = {"b/1.txt": "city/000.txt", "a/2.txt": "sea/000.txt", "a/10.txt": "city/000.txt"}
    for name, source in sources.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((corpus / source).read_bytes())
    (tmp_path / "texts" / "a" / "11.txt").write_text(" \n", encoding="utf-8")
    code, printed = run_script(finetune, run, *CPU, "--features", tmp_path / "out.npy",
                               "--data", tmp_path / "texts")
    assert code == 0 and "1 empty" in printed, printed
    first, second, third = np.load(tmp_path / "out.npy")    # a/10, a/2, b/1
    assert np.array_equal(first, third) and not np.allclose(first, second, atol=1e-3)


def test_an_existing_file_is_replaced_only_by_overwrite(run, corpus, run_script, tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, np.arange(3))
    flags = [run, *CPU, "--features", path, "--limit", 5]
    code, printed = run_script(finetune, *flags)
    assert code == 2 and "this file exists; give a new name, or --overwrite" in printed
    assert np.load(path).tolist() == [0, 1, 2]
    code, printed = run_script(finetune, *flags, "--overwrite")
    assert code == 0 and len(np.load(path)) == 5, printed


def test_features_never_replace_the_data(image_run, run_script, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((5, 16, 16, 3), np.uint8))
    code, printed = run_script(finetune, image_run, *CPU, "--features", path, "--data", path,
                               "--overwrite")
    assert code == 2 and "this is the data" in printed.splitlines()[-1]
    assert np.load(path).dtype == np.uint8


def test_features_never_replace_labels_or_the_runs_data(run_script, tmp_path):
    name = str(tmp_path / "a.npy")
    np.save(name, np.random.default_rng(0).integers(0, 255, (40, 8, 8)).astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", np.arange(40) % 2)
    folder = make_image_run(tmp_path / "run", name=name, limit=0)
    before = files.file_hash(name), files.file_hash(tmp_path / "a.labels.npy")
    flags = [folder, *CPU, "--overwrite", "--features"]
    code, printed = run_script(finetune, *flags, tmp_path / "a.labels.npy")
    assert code == 2 and "is for the labels of data" in printed.splitlines()[-1]
    code, printed = run_script(finetune, *flags, name, "--data", "shapes")
    assert code == 2 and "this is the data" in printed.splitlines()[-1]
    assert before == (files.file_hash(name), files.file_hash(tmp_path / "a.labels.npy"))


def test_features_and_predictions_need_no_labels(image_run, run_script, tmp_path, brief):
    assert run_script(finetune, image_run, *CPU, "--labels", 2, "--seeds", 1,
                      "--limit", 100)[0] == 0
    np.save(tmp_path / "a.npy", np.full((4, 32, 32, 3), 200, np.uint8))
    np.save(tmp_path / "a.labels.npy", np.arange(9))                # of other images
    for flags in (["--predict", tmp_path / "a.npy"],
                  ["--data", tmp_path / "a.npy", "--features", tmp_path / "b.npy"]):
        code, printed = run_script(finetune, image_run, *CPU, *flags)
        assert code == 0, printed


def test_features_are_written_whole_or_not_at_all(run, run_script, tmp_path, monkeypatch):
    path = tmp_path / "out.npy"
    np.save(path, np.arange(3))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    code, printed = run_script(finetune, run, *CPU, "--features", path, "--limit", 5,
                               "--overwrite")
    assert code == 1 and np.load(path).tolist() == [0, 1, 2], printed
    assert [other.name for other in tmp_path.iterdir() if "out.npy" in other.name] == ["out.npy"]


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, sentence", [
    (["--labels", "1", "1000"], "--labels 1000: too many, because the smallest class"),
    (["--labels", "some"], "--labels some: must be a whole number above 0, or all"),
    (["--seeds", "0"], "--seeds 0: must be at least 1"),
    (["--limit", "-1"], "--limit -1: must be at least 0"),
    (["--predict", "not/there.txt"], "--predict not/there.txt: file not found"),
    (["--predict", "."], "--predict .: is a folder; give one .txt file, with a text on each line"),
    (["--predict", __file__], "their file must end in .txt; give one .txt file"),
    (["--predict", "a.txt", "--labels", "2"], "use --labels: leave out --predict, or --labels"),
    (["--predict", "a.txt", "--data", "b", "--limit", "5"], "use --limit and --data: leave out"),
    (["--features", "b.npy", "--labels", "2", "--probe"], "not use --labels and --probe: leave"),
    (["--overwrite"], "--overwrite is for --features alone: leave it out"),
    (["--no-flip"], "--no-flip: the run was trained on texts"),
    (["--labels", "0"], "--labels 0: must be a whole number above 0, or all"),
    (["--predict", "a.txt", "--features", "b.npy"], "give one of them"),
    (["--features", "not/there/b.npy"], "the folder not/there does not exist; create it"),
    (["--features", f"{__file__}/b.npy"], "is not a writable folder"),
    (["--features", "out.txt"], "must end in .npy"),
    (["--data", "not/there"], "not/there: file not found"),
    (["--data", "cifar10"], "the run was trained on texts; give texts"),
])
def test_a_mistake_is_one_sentence(flags, sentence, text_run, run_script):
    before = sorted(path.name for path in text_run.iterdir())
    code, printed = run_script(finetune, text_run, *CPU, *flags)
    assert code == 2 and sentence in printed.splitlines()[-1], printed
    assert "Traceback" not in printed and "draw 1" not in printed
    assert sorted(path.name for path in text_run.iterdir()) == before


def test_a_folder_cannot_hold_the_features(text_run, run_script, tmp_path):
    (tmp_path / "x.npy").mkdir()
    code, printed = run_script(finetune, text_run, "--features", tmp_path / "x.npy")
    assert code == 2 and "this is a folder; give the name of a file" in printed.splitlines()[-1]


def test_missing_data_of_the_run_is_not_blamed_on_a_flag(run, run_script):
    checkpoint = files.load_checkpoint(run)
    checkpoint["settings"].update(data="d/ok")
    files.write_checkpoint(run / "checkpoint.pt", checkpoint)
    code, printed = run_script(finetune, run, *CPU, "--labels", 2)
    last = printed.splitlines()[-1]
    assert code == 2 and "the data of the run, d/ok, was not found from here: start" in last


def test_a_left_over_local_rank_does_not_silence(text_run, run_script, monkeypatch):
    monkeypatch.setattr(distributed, "LOCAL_RANK", 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left over")
    code, printed = run_script(finetune, text_run, "--labels", "some")
    assert code == 2 and "--labels some: must be" in printed


def test_a_file_without_text_is_refused(text_run, run_script, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    code, printed = run_script(finetune, text_run, "--predict", tmp_path / "blank.txt")
    assert code == 2 and "contains no text" in printed.splitlines()[-1]


def test_several_processes_are_refused(text_run, run_script, monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    code, printed = run_script(finetune, text_run, *CPU, "--labels", 2)
    assert code == 2 and "WORLD_SIZE is 2: start it without torchrun" in printed


def test_a_folder_that_is_no_run_is_refused(tmp_path, run_script):
    assert run_script(finetune, tmp_path)[0] == 2
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    code, printed = run_script(finetune, tmp_path)
    assert code == 2 and "Traceback" not in printed


def test_predict_needs_a_classifier_of_this_step(run, run_script, brief, tmp_path):
    (tmp_path / "new.txt").write_text("the ship sails\n", encoding="utf-8")
    code, printed = run_script(finetune, run, *CPU, "--predict", tmp_path / "new.txt")
    assert code == 2 and f"; run: python finetune.py {run}" in printed.splitlines()[-1]
    assert run_script(finetune, run, *CPU, "--labels", 2, "--seeds", 1)[0] == 0
    checkpoint = files.load_checkpoint(run)
    files.write_checkpoint(run / "checkpoint.pt", checkpoint | dict(step=91))
    code, printed = run_script(finetune, run, *CPU, "--predict", tmp_path / "new.txt")
    assert code == 2 and "has been trained further since" in printed.splitlines()[-1]


def forget_the_labels(saved):
    del saved["labels"]


def add_a_class(saved):
    saved["classes"] = ["a", "b", "c"]


@pytest.mark.parametrize("change, sentence", [
    (forget_the_labels, "classifier.pt is damaged, it has no labels"),
    (add_a_class, "does not fit the run; delete it"),
])
def test_a_classifier_that_does_not_fit_is_refused(
        change, sentence, run, run_script, brief, tmp_path):
    (tmp_path / "new.txt").write_text("the ship sails\n", encoding="utf-8")
    assert run_script(finetune, run, *CPU, "--labels", 2, "--seeds", 1)[0] == 0
    saved = read_classifier(run)
    change(saved)
    files.write_checkpoint(run / "classifier.pt", saved)
    code, printed = run_script(finetune, run, *CPU, "--predict", tmp_path / "new.txt")
    assert code == 2 and sentence in printed.splitlines()[-1], printed
    assert "Traceback" not in printed


def test_a_blank_guess_is_shown_in_quotes(text_run):
    tokenizer = load.tokenizer_of(load.load_run(text_run)[1], text_run)
    shown = load.show_token(tokenizer.bytes_of.index(b"\n"), tokenizer)
    assert shown == r"'\n'"
    first = tokenizer.encode("ship").tolist()[0]
    assert load.show_token(first, tokenizer) == tokenizer.decode([first])


# ---------------------------------------------------------------- the columns of texts

MACHINE = machine.Machine(torch.device("cpu"), torch.float32, nullcontext())


def text_task(run, change=None):
    """The task of the run's own texts. change: a function that changes the model first."""
    model, checkpoint = load.load_run(run)
    if change:
        change(model)
    settings = checkpoint["settings"]
    data = text_sources.load_texts(settings["data"], settings["data_dir"],
                                   settings["vocabulary_size"],
                                   tokenizer=load.tokenizer_of(checkpoint, run))
    return TextTask(data, model, MACHINE, partial(load.new_model, checkpoint))


def test_ngrams_come_from_every_text_but_those_of_the_test(run, monkeypatch):
    task = text_task(run)
    task.texts.labels[task.train[5:]] = -1
    asked, make_ngrams = [], text_table.make_ngrams

    def watched(texts, counted):
        asked.append(set(counted))
        return make_ngrams(texts, counted)
    monkeypatch.setattr(text_table, "make_ngrams", watched)
    task.columns()
    assert asked == [set(range(len(task.texts))) - set(task.test)]


def fit_columns(task, indices, option):
    """{name of a column: (the column, its model)}: all have learned from these examples.

    option: of the column "fine-tuned". "From scratch" is left out.
    """
    columns, fitted = task.columns(), {}
    del columns["from scratch"]
    for name, column in columns.items():
        chosen = option if name == "fine-tuned" else None
        fitted[name] = column.fit(indices, chosen, 0, fitted)
    return {name: (column, fitted[name]) for name, column in columns.items()}


@pytest.mark.parametrize("name", ["from scratch", "fine-tuned"])
def test_training_on_labels_fits_them(name, text_run):
    task = text_task(text_run)
    indices, column = task.train[::10], task.columns()[name]
    fitted = {"linear probe": LinearModel(torch.zeros(33, 2), 0.0)}         # it knows nothing
    losses = []
    for steps in (0, 30):
        model = column.fit(indices, TextOption(0.02, steps), 0, fitted)
        logits = task.logits(model, indices)
        losses.append(float(F.cross_entropy(logits, task.labels[indices])))
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[1] < 0.1, losses


def test_the_rate_of_fine_tuning_texts_rises_and_falls(text_run, rates):
    task = text_task(text_run)
    indices = task.train[::10]
    fitted = {"linear probe": task.probe.fit(indices)}
    task.columns()["fine-tuned"].fit(indices, TextOption(0.01, 20), 0, fitted)
    expected = [0.01 * min(1, (step + 1) / 2) * (1 - step / 20) for step in range(20)]
    assert rates[Muon] == pytest.approx(expected)
    assert rates[torch.optim.Adam] == pytest.approx([0.3 * rate for rate in expected])


def test_from_scratch_texts_owe_nothing_to_pretraining(text_run):
    def randomise(model):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    fitted = []
    for change in (None, randomise):
        task = text_task(text_run, change)
        option = TextOption(0.03, 2)
        model = task.columns()["from scratch"].fit(task.train[::5], option, 0, {})
        fitted.append(model.state_dict())
    assert equal(*fitted)


def test_fine_tuning_texts_at_rate_0_is_the_probe(text_run):
    task = text_task(text_run)
    indices = task.train[::10]
    probe_model = task.probe.fit(indices)
    fitted = {"linear probe": probe_model}
    model = task.columns()["fine-tuned"].fit(indices, TextOption(0.0, 2), 0, fitted)
    with torch.no_grad():
        logits = model(task.texts.select(task.test))
    expected = probes.linear_logits(task.probe.x[task.test], probe_model.weights)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(task.logits(model, task.test), expected)


def test_each_text_is_read_once_for_two_columns(text_run, brief):
    task = text_task(text_run)
    columns = fit_columns(task, task.train[::10], TextOption(0.02, 2))
    tuned, model = columns["fine-tuned"]
    together, models = columns["all together"]
    read = []
    model.register_forward_hook(lambda module, inputs, logits: read.append(len(logits)))
    first = tuned.predict(model, task.test)
    together.predict(models, task.test)
    assert sum(read) == len(set(task.test) | set(task.reference))
    with torch.no_grad():
        assert torch.equal(first, model(task.texts.select(task.test)).argmax(1))


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_all_together_is_the_sum_of_three_standardized_answers(rate, text_run, brief):
    task = text_task(text_run)
    columns = fit_columns(task, task.train[::10], TextOption(rate, 2))
    _, tuned = columns["fine-tuned"]
    together, models = columns["all together"]
    self_trained, co_trained = columns["self-trained"]
    weights, (weighting, student) = co_trained.probe_model.weights, co_trained.student

    def standardized(logits):
        logits = logits - logits.mean(1, keepdims=True)
        return logits / logits[task.reference].std()
    x, z = task.co_training.n_grams.rows[weighting][np.arange(len(task.texts))], task.probe.x
    answers = [z @ weights[:-1] + weights[-1], task.logits(tuned, np.arange(len(task.texts))),
               x.to_dense() @ student[:-1] + student[-1]]
    probe, tuned, n_grams = [standardized(answer.detach().numpy()) for answer in answers]
    expected = standardized(probe + tuned) + n_grams
    found = task.logits_together(models, task.test).detach()
    np.testing.assert_allclose(found, expected[task.test], atol=1e-3)
    if rate == 0:
        assert torch.equal(together.predict(models, task.test),
                           self_trained.predict(co_trained, task.test))


def test_few_held_out_texts_are_joined_by_training_texts(text_run, monkeypatch):
    task = text_task(text_run)
    assert 0 < len(task.held_out) < 100
    assert set(task.held_out) < set(task.reference) <= set(task.held_out) | set(task.train)
    monkeypatch.setattr(text_table, "FEWEST_REFERENCES", len(task.held_out))
    assert np.array_equal(text_task(text_run).reference, task.held_out)


def test_n_grams_take_no_statistics_from_test_texts(text_run):
    task = text_task(text_run)
    task.columns()
    rows = task.co_training.n_grams.rows
    before = [rows[name][task.train].to_dense() for name in ("tf-idf", "naive Bayes")]
    words = task.texts.tokens.copy()
    for n in task.test:
        begin, end = task.texts.starts[n], task.texts.starts[n] + task.texts.lengths[n]
        words[begin:end] = words[begin]
    task.texts.tokens = words
    task.columns()
    rows = task.co_training.n_grams.rows
    assert torch.equal(rows["tf-idf"][task.train].to_dense(), before[0])
    assert torch.equal(rows["naive Bayes"][task.train].to_dense(), before[1])


# ---------------------------------------------------------------- the columns of images

def image_task(run, data=None, code=None, noise=0.0, autocast=None):
    """noise: the standard deviation of what is added to every pretrained weight."""
    model, checkpoint = load.load_run(run)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape)
    if data is None:
        data = images.load_images("shapes", limit=100)
    machine = torch.device("cpu"), torch.float32, autocast or nullcontext()
    new_model = partial(load.new_model, checkpoint)
    return ImageTask(data, model, machine, new_model, flip=True, code=code)


def two_classes(difference, sizes):
    """200 noisy images, the second class brighter by `difference`; sizes of the three splits."""
    labels = np.arange(200) % 2
    brightness = 60 + difference * labels[:, None, None, None]
    pixels = brightness + np.random.default_rng(0).normal(0, 20, (200, 3, 32, 32))
    pixels = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))
    split = np.repeat(np.uint8([0, 1, 2]), sizes)
    return images.Images(pixels, torch.arange(200), labels, split, ["dark", "light"])


def accuracy_of(column, task, indices):
    """The test accuracy of a column that is fitted on the labels of these examples."""
    model = column.fit(indices, None, 0, {"linear probe": task.probe.fit(indices)})
    return probes.accuracy(column.predict(model, task.test), task.labels[task.test])


def test_principal_components_are_where_images_vary_most(image_runs):
    task = image_task(image_runs / "simclr", two_classes(100, [120, 20, 60]), code=2)
    assert accuracy_of(task.columns()["pixel PCA"], task, task.train[:20]) == 100


def test_few_images_have_fewer_principal_components(image_runs):
    # 100 images span 99 directions. The next one is rounding error and would spoil the column.
    task = image_task(image_runs / "simclr", two_classes(10, [100, 20, 80]), code=128)
    assert accuracy_of(task.columns()["pixel PCA"], task, task.train) > 85


def test_features_are_standardized_by_training_images_alone(image_runs):
    task = image_task(image_runs / "simclr")
    found = task.features(task.model)[task.train]
    torch.testing.assert_close(task.mean, found.mean(0))
    std = found.std(0, correction=0)
    torch.testing.assert_close(task.std, torch.where(std < 1e-6, 1, std))


def test_a_constant_column_keeps_its_scale():
    x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.5, 2.0]])
    scaled, mean, std = standardize(x, [0, 1])
    assert scaled.tolist() == [[0, -1], [0, 1], [0.5, 0]]
    assert mean.tolist() == [0, 2] and std.tolist() == [1, 1]


def test_self_training_also_sees_images_without_labels(image_runs):
    model, checkpoint = load.load_run(image_runs / "simclr")
    data = two_classes(100, [120, 20, 60])
    data.labels[80:120] = -1
    task = ImageTask(data, model, MACHINE, partial(load.new_model, checkpoint), True, None)
    assert len(task.train) == 80 and len(task.pool) == 120
    assert accuracy_of(task.columns()["self-trained"], task, task.train[:20]) == 100


def test_self_training_has_a_largest_number_of_images(image_runs, monkeypatch):
    monkeypatch.setattr(columns, "MOST_POOL", 100)
    task = image_task(image_runs / "simclr", two_classes(100, [120, 20, 60]))
    assert len(task.train) == 120 and len(task.pool) == 100


@pytest.mark.parametrize("name", ["from scratch", "fine-tuned"])
def test_training_on_labels_of_images_fits_them(name, image_runs, monkeypatch):
    shorter = partialmethod(ImageTask.train_classifier, images_seen=2000)
    monkeypatch.setattr(ImageTask, "train_classifier", shorter)
    task = image_task(image_runs / "simclr", two_classes(100, [120, 20, 60]))
    indices = task.train
    D = len(task.mean)
    fitted = {"linear probe": LinearModel(torch.zeros(D + 1, 2), 0.0)}      # it knows nothing
    fit = task.fit_from_scratch if name == "from scratch" else task.fit_fine_tuned
    before = fit(indices, ImageOption(0.0, 0.5), 0, fitted)
    after = fit(indices, ImageOption(0.02, 0.5), 0, fitted)
    losses = []
    for model in (before, after):
        with torch.no_grad():
            logits = model(task.images[indices].float() / 255)
        losses.append(float(F.cross_entropy(logits, task.labels[indices])))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[1] < 0.4, losses


def test_untrained_features_owe_nothing_to_test_images(image_runs):
    data = two_classes(100, [120, 20, 60])
    task = image_task(image_runs / "simclr", data)
    expected = task.untrained_features(task.train)[task.train]
    changed = two_classes(100, [120, 20, 60])
    changed.pixels[changed.rows[torch.from_numpy(changed.split == splits.TEST)]] = 99
    other = image_task(image_runs / "simclr", changed)
    found = other.untrained_features(other.train)[other.train]
    torch.testing.assert_close(found, expected)


def test_the_rate_of_fine_tuning_rises_and_falls(image_runs, rates):
    task = image_task(image_runs / "simclr")
    indices = task.train[:32]
    fitted = {"linear probe": task.probe.fit(indices)}
    model = task.fit_fine_tuned(indices, ImageOption(0.0, 0.5), 0, fitted)
    task.train_classifier(model, indices, ImageOption(0.01, 0.5), 0, 0.0, images_seen=640)
    expected = [0.01 * min(1, (step + 1) / 2) * (1 - step / 20) for step in range(20)]
    assert rates[Muon] == pytest.approx(expected)
    assert rates[torch.optim.Adam] == pytest.approx([0.1 * rate for rate in expected])


def test_from_scratch_images_owe_nothing_to_pretraining(image_runs, brief):
    tasks = [image_task(image_runs / "simclr", noise=noise) for noise in (0.0, 0.1)]
    option = ImageOption(0.02, 0.5)
    fitted = [task.fit_from_scratch(task.train[:32], option, 3, {}).state_dict()
              for task in tasks]
    assert equal(*fitted)
    moved = [value for name, value in fitted[0].items()
             if name.startswith("body.encoder") and name.endswith("running_mean")]
    assert moved and all(value.abs().max() > 0 for value in moved)
    first, second = tasks[0].new_model(0), tasks[0].new_model(1)
    assert not equal(first.state_dict(), second.state_dict())


def test_a_probe_does_not_move_the_encoder(image_runs, brief):
    task = image_task(image_runs / "simclr")
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    columns = task.columns()
    indices = task.train[probes.draw_labels(task.labels[task.train], 5, 0)]
    fitted = {"linear probe": columns["linear probe"].fit(indices, None, 0, {})}
    columns["linear probe"].predict(fitted["linear probe"], task.test)
    option = ImageOption(0.002, 0.5, freeze_norm=True)
    tuned = columns["fine-tuned"].fit(indices, option, 0, fitted)
    assert equal(before, task.model.state_dict())
    stays = {name for name, _ in tuned.body.named_buffers()}        # batch norm, with few labels
    stays.add("projection_head.3.weight")                           # after the hidden layer
    for name, value in tuned.body.state_dict().items():
        assert torch.equal(value, before[name]) == (name in stays), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_fine_tuning_images_at_rate_0_is_the_probe(precision, image_runs, brief):
    autocast = torch.autocast("cpu", precision, enabled=precision == torch.bfloat16)
    task = image_task(image_runs / "simclr", autocast=autocast)
    indices = task.train[probes.draw_labels(task.labels[task.train], 3, 0)]
    tuned, probe_model = task.columns()["fine-tuned"], task.probe.fit(indices)
    option = ImageOption(0.0, 0.5, freeze_norm=True)
    model = tuned.fit(indices, option, 0, {"linear probe": probe_model})
    found = tuned.predict(model, task.test)
    assert torch.equal(found, task.probe.predict(probe_model, task.test))


def test_the_head_is_float32_so_that_classes_do_not_tie():
    class Rounded(nn.Module):
        """Its features are its input in bfloat16."""

        def encode(self, x):
            return x.bfloat16()
    weights = torch.tensor([[1.0, 1.001], [0.0, 0.0]])              # 1 feature, 2 classes
    classifier = Classifier(Rounded(), torch.zeros(1), torch.ones(1), weights)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(torch.ones(1, 1))
    assert logits.dtype == torch.float32 and logits.argmax(1) == 1


def test_images_are_not_mirrored_where_that_is_forbidden(
        image_run, run_script, monkeypatch, brief):
    flips, augment, read = set(), contrastive.augment, image_table.image_features

    def watched_augment(*arguments, **named):
        flips.add(named["flip"])
        return augment(*arguments, **named)

    def watched_features(*arguments, **named):
        flips.add(named["mirror"])
        return read(*arguments, **named)
    monkeypatch.setattr(contrastive, "augment", watched_augment)
    monkeypatch.setattr(image_table, "image_features", watched_features)
    for flags, expected in ([], {True}), (["--no-flip"], {False}):
        flips.clear()
        code, printed = run_script(finetune, image_run, *CPU, "--labels", 3, "--seeds", 1,
                                   "--limit", 100, *flags)
        assert code == 0 and flips == expected, printed
        assert read_classifier(image_run)["flip"] == (not flags)
    conditions = by_condition(read_rows(image_run / "finetune.csv"))
    assert [(each.data, each.limit, each.mirrored) for each in conditions] == [
        ("shapes", "100", "yes"), ("shapes", "100", "no"),
    ]


def test_a_run_without_mirroring_has_one_table(image_run, run_script):
    checkpoint = files.load_checkpoint(image_run)
    checkpoint["settings"]["no_flip"] = True
    files.write_checkpoint(image_run / "checkpoint.pt", checkpoint)
    for flags in ([], ["--no-flip"]):
        code, printed = run_script(finetune, image_run, *CPU, "--labels", 3, "--seeds", 1,
                                   "--limit", 100, "--probe", *flags)
        assert code == 0, printed
    row, = read_rows(image_run / "probe.csv")
    assert row["mirrored"] == "no"
    page = (image_run / "report.html").read_text(encoding="utf-8")
    assert "shapes, without mirror images, after 90 steps" in page


def test_written_features_are_mirrored_unless_forbidden(image_run, run_script, tmp_path):
    model, _ = load.load_run(image_run)
    pixels = images.load_images("shapes", limit=20, keep_all=True)
    for flags, mirror in ([], True), (["--no-flip"], False):
        path = tmp_path / f"{mirror}.npy"
        code, printed = run_script(finetune, image_run, *CPU, "--features", path, *flags,
                                   "--precision", "float32", "--limit", 20)
        assert code == 0, printed
        expected = features.image_features(model.encode, pixels, nullcontext(), mirror=mirror)
        np.testing.assert_allclose(np.load(path), expected, atol=1e-5)


def test_no_batch_of_large_images_exceeds_its_bytes(image_runs, monkeypatch, brief):
    monkeypatch.setattr(features, "BYTES_A_BATCH", 7 * 4 * 3 * 32 * 32)     # 7 images
    sizes, encode, augment = [], contrastive.SimCLR.encode, contrastive.augment

    def watched_encode(self, x):
        sizes.append(len(x))
        return encode(self, x)

    def watched_augment(x, *arguments, **named):
        sizes.append(len(x))
        return augment(x, *arguments, **named)
    monkeypatch.setattr(contrastive.SimCLR, "encode", watched_encode)
    monkeypatch.setattr(contrastive, "augment", watched_augment)
    task = image_task(image_runs / "simclr")
    task.columns()
    model = task.fit_from_scratch(task.train[:32], ImageOption(0.02, 0.5), 0, {})
    task.predict(model, task.test)
    assert max(sizes) == 7


# ---------------------------------------------------------------- new images

def save_test_images(path, select=slice(None)):
    data = images.load_images("shapes", limit=100).subset(splits.TEST)
    np.save(path, data[:][select].permute(0, 2, 3, 1).numpy())
    return data


def test_the_classifier_of_the_last_row_labels_new_images(
        image_run, run_script, tmp_path, brief, monkeypatch):
    measured, measure = [], finetune.measure_row

    def keep(*arguments):
        measured.append(measure(*arguments))
        return measured[-1]
    monkeypatch.setattr(finetune, "measure_row", keep)
    code, printed = run_script(finetune, image_run, *CPU, "--labels", 2, 5, "--seeds", 1,
                               "--limit", 100)
    assert code == 0, printed
    (_, first, _), (_, last, _) = measured
    saved = torch.load(image_run / "classifier.pt", weights_only=True)
    assert equal(saved["model"], last.state_dict())
    assert not equal(saved["model"], first.state_dict())
    assert saved["shape"] == [3, 32, 32] and saved["labels"] == 50 and saved["limit"] == 100
    assert saved["flip"]

    new = save_test_images(tmp_path / "new.npy")
    code, printed = run_script(finetune, image_run, *CPU, "--predict", tmp_path / "new.npy")
    with torch.no_grad():
        x = new[:].float() / 255
        probabilities = ((last(x) + last(x.flip(3))) / 2).softmax(1)
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    assert [line[2] for line in lines] == [str(n) for n in range(100)]
    assert [line[0] for line in lines] == [new.classes[i] for i in probabilities.argmax(1)]
    shown = [float(line[1]) for line in lines]
    np.testing.assert_allclose(shown, probabilities.amax(1), atol=0.011)


def test_images_of_another_size_are_not_labelled(image_run, run_script, tmp_path, brief):
    assert run_script(finetune, image_run, *CPU, "--labels", 2, "--seeds", 1,
                      "--limit", 100)[0] == 0
    for shape, found in (((4, 64, 64, 3), "64 × 64 × 3"), ((4, 32, 32), "32 × 32 × 1")):
        np.save(tmp_path / "new.npy", np.zeros(shape, np.uint8) + 200)
        code, printed = run_script(finetune, image_run, *CPU, "--predict", tmp_path / "new.npy")
        assert code == 2 and f"found images of {found}" in printed.splitlines()[-1], printed
        assert "trained on" in printed.splitlines()[-1] and "\t" not in printed


@pytest.fixture
def autoencoder_run(image_runs, tmp_path):
    return shutil.copytree(image_runs / "autoencoder", tmp_path / "run")


def test_features_of_copies_are_written(autoencoder_run, run_script, tmp_path):
    save_test_images(tmp_path / "new.npy", slice(20))
    array = np.load(tmp_path / "new.npy")
    np.save(tmp_path / "twice.npy", np.concatenate([array, array]))
    code, printed = run_script(finetune, autoencoder_run, *CPU, "--features",
                               tmp_path / "out.npy", "--data", tmp_path / "twice.npy")
    found = np.load(tmp_path / "out.npy")
    assert code == 0 and found.shape == (40, 160), printed
    np.testing.assert_allclose(load.load_encoder(autoencoder_run)(array), found[:20], atol=1e-4)


def test_an_autoencoder_has_pixel_pca_and_warns_of_dark_images(
        autoencoder_run, run_script, tmp_path, brief):
    code, printed = run_script(finetune, autoencoder_run, *CPU, "--labels", 3, "--seeds", 1,
                               "--limit", 100)
    assert code == 0 and "pixel PCA" in printed, printed
    save_test_images(tmp_path / "new.npy", slice(1))
    np.save(tmp_path / "one.npy", np.load(tmp_path / "new.npy") // 128)
    code, printed = run_script(finetune, autoencoder_run, *CPU, "--predict", tmp_path / "one.npy")
    assert code == 0 and printed.count("\t") == 2 and "warning: " in printed, printed
