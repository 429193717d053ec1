"""Measure whether pretraining helped: a run and a few labels -> a table of test accuracies.

    python finetune.py runs/mlm                             the table, on the run's own data
    python finetune.py runs/imdb --labels 10 100 --seeds 10     two rows, more draws of labels
    python finetune.py runs/cifar --probe                   the linear probe alone: minutes
    python finetune.py runs/mlm --data my_classes/          your texts: a sub-folder per class
    python finetune.py runs/ae --data my_images.npy         your images and my_images.labels.npy
    python finetune.py runs/imdb --predict new.txt          label new texts, or images of a .npy
    python finetune.py runs/imdb --features out.npy --data my_texts/    (N, d) float32

"Labels a class" says how many labelled examples of each class a row may use. They are drawn
several times, and all columns get the same draws. Where a column tries several learning rates or
crops, it chooses on held-out examples. Penalties are chosen by cross-validation among the drawn
labels. All other settings are fixed in the code. This script chooses nothing by a label of the test
set. It reads those labels for the accuracies, for the share of the commonest class, for the
checksum of the data, and to leave out a class without a test example. (Two limits were set when
test accuracies had been seen: MOST_CLASSES in ngrams.py and MOST_LABELS in self_training.py.)

Without --labels the rows are 10, 100, 500 and all for texts, and 10, 50, 500 and all for images.
The row "all" uses the labels of all training and held-out examples, so it needs no draw. Instead,
a column whose training is random is trained twice, with two seeds (with --seeds 1 once). The seed
decides the order of the examples, the crops or windows, and the first weights of "from scratch".
Each row is kept as soon as it is finished.

    n-grams       texts: logistic regression on n-grams, without any pretraining: tokens and
                  pairs weighted by tf-idf. With up to five classes, tokens, pairs and triples with
                  naive Bayes weights are also tried, and cross-validation chooses. Texts
                  without labels say which n-grams are frequent, and nothing else.
    pixels        images: logistic regression on pixels, without any pretraining
    pixel PCA     images, after train_ae.py: the same on as many principal components as the code
                  of the autoencoder has numbers
    untrained     images: a linear probe of the same encoder with random weights
    from scratch  the same model, trained on the labels alone
    linear probe  logistic regression on the features of the pretrained encoder
    self-trained  The probe guesses the classes of the training examples whose labels are not
                  used. Of images, a second probe learns from the guesses. Of texts, a classifier
                  of n-grams does, and its logits are added to those of the probe. No guesses
                  are used with more than 2,000 labels in all (images) or 5,000 (texts).
    fine-tuned    the probe and the whole encoder trained further on the labels. It stays the probe
                  (rate 0) unless another rate gains more than a standard error on held-out
                  examples. With more than 5,000 labels in all, texts are always fine-tuned, at
                  one fixed rate.
    all together  texts: the sum of probe and fine-tuned encoder, plus the n-grams of
                  "self-trained". With rate 0 this is "self-trained".

The table goes into finetune.csv (with --probe into probe.csv) and onto the page report.html of
the run's folder. New rows replace old rows of the same labels, data, limit and pretraining steps,
if images were mirrored in both or in neither. All other rows stay. If the content of the data has
changed (of much data, that of a sample), its old rows stay in a separate table.

The fine-tuned model of the row with the most labels goes into classifier.pt, for --predict,
without n-grams. If classifier.pt already holds a model of more labels of the same data, that one
is kept. A trial with --limit never replaces the model of a whole table of the same pretraining,
nor its figure finetune.svg.
"""

import contextlib
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minissl import UserError
from minissl.data.images import load_images, own_images
from minissl.data.splits import (
    HELD_OUT,
    TRAIN,
    evenly_spaced,
    fingerprint,
    incomplete_classes,
)
from minissl.data.text_sources import load_all_texts, load_texts, read_texts
from minissl.data.texts import encode_texts
from minissl.evaluation import load, probes
from minissl.evaluation.classifier import build_classifier, read_classifier, write_classifier
from minissl.evaluation.columns import MOST_POOL, plain_column
from minissl.evaluation.features import image_features, text_features
from minissl.evaluation.image_table import ImageTask
from minissl.evaluation.measurements import add_measurements, print_table, read_measurements
from minissl.evaluation.text_table import TextTask, WholeTextEncoder
from minissl.training import distributed, report
from minissl.training.files import (
    is_writable,
    progress,
    write_atomically,
    write_npy,
)
from minissl.training.machine import choose_machine, move_to_device
from minissl.training.settings import (
    flag_name,
    read_settings,
    require_at_least,
    run_script,
)
from minissl.training.wording import count_of, list_names


# ---------------------------------------------------------------- 1. settings

@dataclass
class Settings:
    run: str  # the folder of a run
    labels: list[str] = field(default_factory=list)  # labels a class, each a row; or all
    seeds: int = 5  # draws of labels for each row; the row "all" has none, and two trainings
    data: str = ""  # other data than the run's, by name or path
    data_dir: str = ""  # where archives and caches lie, if not where the run had them
    limit: int = 0  # for a trial: at most this many examples of each split; 0: all
    probe: bool = False  # the linear probe's column alone, into probe.csv
    features: str = ""  # instead of the table: write the features to this .npy, a new file
    overwrite: bool = False  # allow --features to replace a file
    predict: str = ""  # instead of the table: label the texts or images of this file
    no_flip: bool = False  # never mirror images (default: as in the pretraining)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # for the encoder
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the encoder

    def __post_init__(self):
        require_at_least(self, 1, "seeds")
        require_at_least(self, 0, "limit")
        if self.features and self.predict:
            raise UserError("--features and --predict exclude each other: give one of them")
        check_combination(self)
        if self.features:
            check_output(Path(self.features), self.overwrite)
        # The same row twice would count its draws twice, and the ± would be too small.
        rows = [row_name(row) for row in self.labels]
        self.labels = list(dict.fromkeys(rows))


# What each of these flags leaves unused. Without both of them the script measures a table.
UNUSED = {
    "predict": ("labels", "probe", "limit", "data", "data_dir", "no_flip", "overwrite"),
    "features": ("labels", "probe"),
}


def check_combination(settings):
    """Raise UserError if a flag was given that another one leaves unused.

    --seeds is not checked, because it has a value by default.
    """
    for name, unused in UNUSED.items():
        given = " and ".join(flag_name(other) for other in unused if getattr(settings, other))
        if getattr(settings, name) and given:
            flag = flag_name(name)
            raise UserError(f"{flag} does not use {given}: leave out {flag}, or {given}")
    if settings.overwrite and not settings.features:
        raise UserError("--overwrite is for --features alone: leave it out")


def row_name(row):
    """The name of a row that --labels asks for. Raises UserError if it is no number of labels.

    >>> row_name("010"), row_name("all")
    ('10', 'all')
    """
    if row == "all":
        return row
    if not (row.isdecimal() and int(row) > 0):
        raise UserError(f"--labels {row}: must be a whole number above 0, or all")
    return str(int(row))


def check_output(path, overwrite):
    """Raise UserError unless --features may write to this path."""
    if path.suffix != ".npy":
        raise UserError(f"--features {path}: must end in .npy")
    if path.name.endswith(".labels.npy"):
        raise UserError(f"--features {path}: a name in .labels.npy is for the labels of data; "
                        f"give another name")
    if path.is_dir():
        raise UserError(f"--features {path}: this is a folder; give the name of a file")
    if not path.parent.exists():
        raise UserError(f"--features {path}: the folder {path.parent} does not exist; create it")
    if not is_writable(path.parent):
        raise UserError(f"--features {path}: {path.parent} is not a writable folder; give another")
    if path.exists() and not overwrite:
        raise UserError(f"--features {path}: this file exists; give a new name, or --overwrite "
                        f"to replace it")


# ---------------------------------------------------------------- 2. data

def load_data(settings, checkpoint, limit, keep_all=False):
    """The Texts or Images that the settings name, or else those of the run.

    keep_all: for features, every example of a path in its order, without labels; see load_images
    and load_all_texts.
    """
    trained = checkpoint["settings"]
    name = settings.data or trained["data"]
    if not (settings.data or name in load.BUILT_IN or Path(name).exists()):
        raise UserError(f"the data of the run, {name}, was not found from here: start from the "
                        f"folder where you trained, or give --data with its new place")
    data_dir = settings.data_dir or trained["data_dir"]
    if load.reads_texts(checkpoint):
        if name in load.IMAGE_DATA or name.endswith(".npy"):
            raise UserError(f"--data {name}: the run was trained on texts; give texts")
        tokenizer = load.tokenizer_of(checkpoint, settings.run)
        if keep_all and name not in load.BUILT_IN:
            return load_all_texts(name, tokenizer, limit)
        return load_texts(name, data_dir, trained["vocabulary_size"], limit, tokenizer)
    if name in load.TEXT_DATA or name.endswith(".txt"):
        raise UserError(f"--data {name}: the run was trained on images; give images")
    return load_images(name, data_dir, limit, keep_all=keep_all, with_labels=not keep_all)


def checksum(data):
    """A text that changes when the examples, their split or their labels change.

    Of more than 1,000 examples, the content of a sample of 1,000 counts. The split and the labels
    of all count.
    """
    labels = np.ascontiguousarray(data.labels, np.int64)
    return f"{fingerprint(data)}-{zlib.crc32(labels):08x}"


def warn_of_another_split(settings, checkpoint, data):
    """See load.check_split. The comparison is made at the --limit of the pretraining."""
    trained = checkpoint["settings"]
    name = settings.data or trained["data"]
    limit = trained.get("limit", 0)
    if limit != settings.limit:
        if name == "shapes":                    # our own drawings are always split the same
            return
        data = load_data(settings, checkpoint, limit)
    kind = "texts" if load.reads_texts(checkpoint) else "images"
    load.check_split(data, checkpoint, name, kind)


def is_mirrored(settings, checkpoint):
    """Whether features are the mean over an image and its mirror image, and training mirrors."""
    return load.may_mirror(checkpoint) and not settings.no_flip


def keep_complete_classes(data, name, most=0):
    """The labelled examples of the classes that can be trained and tested, and unlabelled ones.

    Unlabelled examples come from the training split alone, and so many are kept that there are
    `most` training examples in all. With the default, 0, none is kept. Prints the names of the
    classes that are left out. Raises UserError if fewer than two are left, or if no labelled
    example is held out for the choices.
    """
    if len(data.classes) < 2:
        found = f"only: {data.classes[0]}" if data.classes else "no labels"
        raise UserError(f"--data {name}: the table needs two classes, but found {found}; "
                        f"for texts give a folder with a sub-folder per class, for images "
                        f"NAME.labels.npy beside NAME.npy")
    labelled = data.select(data.labels >= 0)
    left_out = incomplete_classes(labelled.split, labelled.labels, labelled.classes)
    kept = [label for label, c in enumerate(data.classes) if c not in left_out]
    advice = "give at least two classes of 10 or more examples, or a larger --limit"
    if not kept:
        raise UserError(f"--data {name}: no class has examples both to train on and to test on; "
                        f"{advice}")
    if len(kept) < 2:
        raise UserError(f"--data {name}: only the class {data.classes[kept[0]]} has examples both "
                        f"to train on and to test on; {advice}")
    is_kept = np.isin(data.labels, kept)
    if HELD_OUT not in data.split[is_kept]:
        raise UserError(f"--data {name}: no example with a label is held out, and settings are "
                        f"chosen on such examples; {advice}")
    if left_out:
        print(f"left out, because they have no example to train on or none to test on: "
              f"{list_names(left_out)}")
    room = max(0, most - int((data.split[is_kept] == TRAIN).sum()))
    unlabelled = np.flatnonzero((data.labels < 0) & (data.split == TRAIN))
    unlabelled = unlabelled[evenly_spaced(len(unlabelled), room)]
    selected = data.select(np.concatenate([np.flatnonzero(is_kept), unlabelled]))
    labels = np.searchsorted(kept, selected.labels)
    labels[selected.labels < 0] = -1
    return replace(selected, labels=labels, classes=[data.classes[label] for label in kept])


# ---------------------------------------------------------------- 3. the table

def draw_examples(task, labels_a_class, seed):
    """The indices of the examples whose labels may be used: so many of each class, or "all".

    They are drawn from the training examples. "all" takes all of these.
    """
    per_class = None if labels_a_class == "all" else int(labels_a_class)
    drawn = probes.draw_labels(task.labels[task.train], per_class, seed)
    return task.train[drawn]


def label_sets(task, labels_a_class, seeds):
    """For each repetition of a row, the indices of the examples whose labels it may use.

    The row "all" also takes the held-out examples, which nothing else needs any more. It takes
    the same examples twice, for two trainings, or once with --seeds 1.
    """
    if labels_a_class == "all":
        everything = np.concatenate([task.train, task.held_out])
        return [everything] * min(seeds, 2)
    return [draw_examples(task, labels_a_class, seed) for seed in range(seeds)]


def fit(column, option, indices, seed, fitted):
    """The model of a column, from these labels. fitted: {name: model} of columns to its left."""
    needed = {name: fitted[name] for name in column.needs}
    return column.fit(indices, option, seed, needed)


FIRST_CHOICE_SEED = 1000        # of the draws for choices. Those of the table begin at 0.


def choose_options(task, columns, labels_a_class, n, title):
    """{name of a column: its option}, for a row of n labels. Prints what was chosen.

    A column with several options tries each on a few draws of labels of its own from the training
    examples (in the row "all" on all of these), and the held-out examples decide.
    """
    options = {name: column.options(n) for name, column in columns.items()}
    to_choose = [name for name in columns if len(options[name]) > 1]
    needed = set()
    for name in to_choose:
        needed.update(columns[name].needs)
    draws = []                                  # [(indices, {name: model of a needed column})]
    if to_choose:
        for seed in range(1 if labels_a_class == "all" else task.choice_draws):
            indices = draw_examples(task, labels_a_class, FIRST_CHOICE_SEED + seed)
            fitted = {name: fit(columns[name], None, indices, seed, {}) for name in needed}
            draws.append((indices, fitted))
    chosen = {}
    for name, column in columns.items():
        chosen[name] = options[name][0]
        if name in to_choose:
            progress(f"{title}, {name}: choosing on held-out examples")
            chosen[name] = choose(column, options[name], task, draws)
            print(f"  {name}: chose {chosen[name]}", flush=True)
        elif chosen[name] is not None:
            print(f"  {name}: {chosen[name]}", flush=True)
    return chosen


def choose(column, options, task, draws):
    """The option that is best on held-out examples, after learning from a few draws of labels.

    A column that prefers its first option keeps it, unless the best one is ahead by more than
    the standard error of the difference (after the rule of Breiman et al. 1984, "Classification
    and regression trees", section 3.4.3). This error says how much depends on the choice of
    held-out examples, and not how much depends on the draw of labels.
    """
    scores = torch.stack([held_out_scores(column, task, option, draws) for option in options])
    best = int(scores.mean(1).argmax())
    lead = scores[best] - scores[0]                             # (H,)
    if column.prefers_first:
        # If the best is right about one more example and no other differs, lead and standard
        # error are equal. 1e-9 keeps rounding from deciding.
        is_ahead = len(lead) > 1 and lead.mean() > lead.std() / len(lead) ** 0.5 + 1e-9
        best = best if is_ahead else 0
    return options[best]


def held_out_scores(column, task, option, draws):
    """The share of the draws after which each held-out example is classified right, (H,)."""
    right = 0
    for seed, (indices, fitted) in enumerate(draws):
        model = fit(column, option, indices, seed, fitted)
        predictions = column.predict(model, task.held_out)
        right = right + (predictions == task.labels[task.held_out]).double()
    return right / len(draws)


def measure_row(settings, task, columns, labels_a_class):
    """One row of the table: (measurements, the model of the last repetition, number of labels).

    The model is that of the column "fine-tuned", or None if there is no such column. For the
    measurements see evaluation/measurements.py; `add_measurements` adds the condition.
    """
    title = "1 label a class" if labels_a_class == "1" else f"{labels_a_class} labels a class"
    print(title, flush=True)
    sets = label_sets(task, labels_a_class, settings.seeds)
    n = len(sets[0])
    chosen = choose_options(task, columns, labels_a_class, n, title)
    repetition = "training" if labels_a_class == "all" else "draw"
    measurements = []
    for seed, indices in enumerate(sets):
        # A second training has the same labels, so the models without randomness stay.
        is_second_training = labels_a_class == "all" and seed > 0
        if not is_second_training:
            fitted = {}
        shown = []
        for name, column in columns.items():
            if is_second_training and not column.is_random:
                continue
            progress(f"{title}, {repetition} {seed + 1}: {name}")
            begin = time.perf_counter()
            fitted[name] = fit(column, chosen[name], indices, seed, fitted)
            seconds = time.perf_counter() - begin
            predictions = column.predict(fitted[name], task.test)
            accuracy = probes.accuracy(predictions, task.labels[task.test])
            shown.append(f"{name} {accuracy:.1f}")
            measurements.append(dict(
                labels_a_class=labels_a_class, method=name, seed=seed,
                test_accuracy=round(accuracy, 2), seconds=round(seconds, 1)))
        if shown:
            print(f"  {repetition} {seed + 1}: {', '.join(shown)}", flush=True)
    return measurements, fitted.get("fine-tuned"), n


def measure_table(settings, task, keep=None):
    """All rows: (measurements, share of the commonest class in the test set, in %).

    keep(*what `measure_row` returns), if given, is called after each row, so that no crash loses
    a finished row. After Ctrl-C it prints the table of the complete rows, and raises
    KeyboardInterrupt.
    """
    commonest = 100 * float(torch.bincount(task.labels[task.test]).max()) / len(task.test)
    print(f"the table has {len(task.classes)} classes: {list_names(task.classes)}")
    print(f"labelled: {len(task.train):,} to draw from, {len(task.held_out):,} held out for "
          f"choices, {len(task.test):,} to test on (the commonest class: {commonest:.1f} %)")
    unlabelled = int((task.labels < 0).sum())
    if unlabelled:
        print(f"without a label: {unlabelled:,} for self-training")
    rows = possible_rows(settings, task)
    if settings.probe:
        columns = {"linear probe": plain_column(task.probe)}
    else:
        columns = task.columns()
    measurements = []
    for row in rows:
        try:
            measured, model, labels = measure_row(settings, task, columns, row)
        except KeyboardInterrupt:
            if not measurements:
                raise KeyboardInterrupt("interrupted before the first row was complete: nothing "
                                        "was written") from None
            print_table(measurements, commonest)
            raise KeyboardInterrupt(f"interrupted in the row {row}: the rows before it are "
                                    f"kept") from None
        measurements += measured
        if keep:
            keep(measured, model, labels)
    return measurements, commonest


def possible_rows(settings, task):
    """The rows for which every class has enough labels. Raises UserError if --labels has others."""
    sizes = torch.bincount(task.labels[task.train], minlength=len(task.classes))
    least = int(sizes.min())
    smallest = task.classes[int(sizes.argmin())]
    rows = settings.labels or task.default_labels
    too_large = [row for row in rows if row != "all" and int(row) > least]
    if too_large and settings.labels:
        raise UserError(f"--labels {' '.join(too_large)}: too many, because the smallest class, "
                        f"{smallest}, has {count_of(least, 'example')} to train on; "
                        f"give at most {least}")
    if too_large:
        print(f"left out: {' and '.join(too_large)} labels a class, because the smallest class, "
              f"{smallest}, has {count_of(least, 'example')} to train on")
    return [row for row in rows if row not in too_large]


# ---------------------------------------------------------------- 4. results

def keep_classifier(run, model, conditions):
    """Write classifier.pt, or print why the one that is there stays.

    One of another pretraining step is of no use any more, and is always replaced. Of the same
    step, a trial with --limit replaces only a trial, and a model of fewer labels does not replace
    one of more labels of the same data. conditions: see write_classifier.
    """
    try:
        old = read_classifier(run)
    except UserError:                           # there is none, or it is damaged
        old = None
    reason = None
    if old is not None and old["step"] == conditions["step"]:
        same_name = load.is_same_source(old["data"], conditions["data"])
        same_data = same_name and old["checksum"] == conditions["checksum"]
        if conditions["limit"] and not old["limit"]:
            reason = "this table is a trial with --limit"
        elif same_data and old["labels"] > conditions["labels"]:
            reason = (f"it was trained on {old['labels']:,} labels, and the new one on "
                      f"{conditions['labels']:,}")
    if reason:
        print(f"classifier.pt stays as it was, because {reason}: delete it to get the new one")
    else:
        write_classifier(run, model, conditions)


def make_table(settings, model, checkpoint, machine):
    """Measure and print the table.

    Writes finetune.csv, finetune.svg, classifier.pt and report.html; with --probe only probe.csv
    and report.html.
    """
    trained = checkpoint["settings"]
    folder = Path(settings.run)
    path = folder / ("probe.csv" if settings.probe else "finetune.csv")
    if not is_writable(folder):
        raise UserError(f"{folder} is read-only; copy the run to a writable folder")
    old = read_measurements(path)               # a damaged file is refused before measuring
    step = str(checkpoint["step"])
    has_whole = any(row["limit"] == "0" and row["step"] == step for row in old)

    name = settings.data or trained["data"]
    data = load_data(settings, checkpoint, settings.limit)
    is_text = load.reads_texts(checkpoint)
    if not is_text:
        load.check_images(data, model, name)
    warn_of_another_split(settings, checkpoint, data)
    for note in data.notes:
        print(f"data: {note}")
    data = keep_complete_classes(data, name, 0 if settings.probe else MOST_POOL)
    new_model = partial(load.new_model, checkpoint)
    if is_text:
        flip = None
        task = TextTask(data, model, machine, new_model)
    else:
        flip = is_mirrored(settings, checkpoint)
        task = ImageTask(data, model, machine, new_model, flip, trained.get("code"))
    source = dict(data=name, limit=settings.limit, step=checkpoint["step"],
                  checksum=checksum(data))
    mirrored = {True: "yes", False: "no", None: ""}[flip]
    shape = None if is_text else list(data.shape[1:])

    def keep(measurements, classifier, labels):
        """Write what a finished row has given."""
        rows, outdated = add_measurements(path, measurements, source | dict(mirrored=mirrored))
        if outdated:
            print(f"{path}: the content of {name} has changed, so "
                  f"{count_of(outdated, 'older result')} moved to a separate table")
        if not settings.probe:
            conditions = dict(source, classes=data.classes, shape=shape, labels=labels, flip=flip)
            keep_classifier(folder, classifier, conditions)
            if not (settings.limit and has_whole):
                figure = report.label_figure(rows, xmlns="http://www.w3.org/2000/svg")
                write_atomically(folder / "finetune.svg", figure.encode())
        report.write_page(folder)

    print_table(*measure_table(settings, task, keep))


# ---------------------------------------------------------------- 5. features and predictions

def write_features(settings, model, checkpoint, machine):
    """Write the features of every example, a row each, to the .npy that --features names."""
    name = settings.data or checkpoint["settings"]["data"]
    path = Path(settings.features)
    for source in (name, checkpoint["settings"]["data"]):
        if path.resolve() == Path(source).resolve():
            raise UserError(f"--features {path}: this is the data; give another name")
    data = load_data(settings, checkpoint, settings.limit, keep_all=True)
    if load.reads_texts(checkpoint):
        features = text_features(model, data, machine.autocast, machine.device, progress)
    else:
        load.check_images(data, model, name)
        mirror = is_mirrored(settings, checkpoint)
        features = image_features(
            model.encode, data, machine.autocast, machine.device, progress, mirror=mirror)
    write_npy(path, features.numpy())
    N, D = features.shape
    print("; ".join([f"{path}: {N:,} × {D} features", *data.notes]))


def predict_texts(settings, model, checkpoint, machine):
    """Print class, probability and text for each text of the file that --predict names."""
    path = Path(settings.predict)
    problem = None
    if not path.exists():
        problem = "file not found"
    elif path.is_dir():
        problem = "is a folder"
    elif path.suffix.lower() != ".txt":
        problem = "the run was trained on texts, and their file must end in .txt"
    if problem:
        raise UserError(f"--predict {path}: {problem}; give one .txt file, with a text on each "
                        f"line, or with blank lines between the texts")
    strings = list(read_texts(path))
    if not strings:
        raise UserError(f"--predict {path}: the file contains no text; give one with some")
    saved = read_classifier(settings.run)
    body = WholeTextEncoder(model, machine.autocast, machine.device)
    classifier = build_classifier(saved, body, checkpoint["step"], settings.run)
    texts = encode_texts(strings, load.tokenizer_of(checkpoint, settings.run))
    with torch.no_grad():
        logits = classifier(texts)
    print_predictions(logits, saved, [" ".join(text.split()) for text in strings])


def predict_images(settings, model, checkpoint, machine):
    """Print class, probability and index for each image of the .npy that --predict names."""
    path = Path(settings.predict)
    images = own_images(path, keep_all=True, flag="--predict", with_labels=False)
    saved = read_classifier(settings.run)
    load.check_images(images, model, f"--predict {path}")
    check_shape(images.shape[1:], saved["shape"], path)
    classifier = build_classifier(saved, model, checkpoint["step"], settings.run)
    logits = image_features(
        classifier.to(machine.device), images, machine.autocast, machine.device,
        mirror=saved["flip"])
    print_predictions(logits, saved, range(len(images)))


def check_shape(given, trained, path):
    """Raise UserError unless new images have the shape (C, H, W) that the classifier learned."""
    if tuple(given) != tuple(trained):
        C, H, W = given
        channels, height, width = trained
        raise UserError(f"--predict {path}: found images of {H} × {W} × {C}; the classifier was "
                        f"trained on {height} × {width} × {channels}: convert them")


def print_predictions(logits, saved, names):
    """A line for each example: class, probability, name, with tabs between them."""
    limit = f" (--limit {saved['limit']})" if saved["limit"] else ""
    print(f"classifier: trained on {saved['labels']:,} labels of {saved['data']}{limit}; "
          f"classes {list_names(saved['classes'])}", file=sys.stderr)
    for name, row in zip(names, logits.softmax(1)):
        print(f"{saved['classes'][int(row.argmax())]}\t{float(row.max()):.2f}\t{name}")


# ---------------------------------------------------------------- 6. from the command line

def main():
    settings = read_settings(Settings, __doc__)
    if distributed.WORLD_SIZE > 1:
        raise UserError(f"this script is one process, but WORLD_SIZE is {distributed.WORLD_SIZE}: "
                        f"start it without torchrun")
    model, checkpoint = load.load_run(settings.run)
    if settings.no_flip and load.reads_texts(checkpoint):
        raise UserError("--no-flip: the run was trained on texts, and only images are mirrored; "
                        "leave it out")
    output = sys.stdout
    if settings.predict:
        output = sys.stderr                     # stdout is for the predictions alone
    with contextlib.redirect_stdout(output):
        machine = choose_machine(settings)
    model = move_to_device(model, machine.device)
    if settings.features:
        write_features(settings, model, checkpoint, machine)
    elif not settings.predict:
        make_table(settings, model, checkpoint, machine)
    elif load.reads_texts(checkpoint):
        predict_texts(settings, model, checkpoint, machine)
    else:
        predict_images(settings, model, checkpoint, machine)


if __name__ == "__main__":
    run_script(main)
