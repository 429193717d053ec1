"""What was the pretraining worth? Any run + a few labels -> test accuracy, against the same model from scratch.

    python finetune.py runs/mlm                                 the table, on the data that the run learned from
    python finetune.py runs/imdb --labels 10 100 --seeds 10     some rows, more draws
    python finetune.py runs/cifar --probe                       the linear probe alone: minutes instead of half an hour
    python finetune.py runs/mlm --data my_classes/              your own texts: a folder with a sub-folder per class
    python finetune.py runs/ae --data my_images.npy             your own images, labels in my_images.labels.npy
    python finetune.py runs/imdb --predict new.txt              label new text, or images, by the table's last model
    python finetune.py runs/imdb --features out.npy --data my_texts/         (N, d) float32, a row a text or an image

The columns share the draws of labels. Strengths are chosen by cross-validation, the rest on held-out examples:

    tf-idf        texts, what one would do instead: logistic regression on one- and two-word features of the same tokens
    pixels        images, what one would do instead: logistic regression; after train_ae.py also on principal components
    untrained     images: a probe of the encoder with random weights, for many a feature is good before any learning
    from scratch  the same model, not pretrained (texts: the blocks stay zero); rate, epochs (texts), crops (images)
    linear probe  logistic regression on the frozen features
    fine-tuned    starts at the probe, moves the encoder (texts: its embeddings alone), too; rate (or 0), epochs (texts)
"""

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from minissl import UserError, evaluation, figures, report, runs
from minissl.documents import load_texts
from minissl.files import progress, writable, write_atomically, write_checkpoint, write_csv
from minissl.finetuning import CLASSIFIER_FORMAT, ImageTask, TextTask, label_images, label_texts
from minissl.images import load_images
from minissl.training import at_least, choose_machine, read_settings, run_script


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    run: str  # the folder of a run
    labels: list[str] = field(default_factory=list)  # a class, a row each; default 10 100 500 all, images 10 50 500 all
    seeds: int = 5  # draws of labels; "all" is one draw, trained in two orders
    data: str = ""  # other data than the run's, by name or path
    data_dir: str = ""  # where archives and caches lie; as for the run, unless given
    limit: int = 0  # take this many examples of each split only, for a trial; 0: all
    probe: bool = False  # the linear probe's column alone, into probe.csv
    features: str = ""  # instead of the table: write the features to this .npy
    predict: str = ""  # instead of the table: label the texts of this file, or the images of this .npy
    no_flip: bool = False  # for pictures whose mirror image means something else; as for the run, unless given
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # for the encoder; the rest is small
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the encoder

    def __post_init__(self):
        at_least(self, 1, "seeds")
        at_least(self, 0, "limit")
        if self.features and self.predict:
            raise UserError("--features and --predict: give one of them")
        if self.features and (Path(self.features).suffix != ".npy" or not writable(Path(self.features).parent)):
            raise UserError(f"--features {self.features}: give a new .npy in a folder that one can write into")
        if not all(rows == "all" or rows.isdecimal() and int(rows) > 0 for rows in self.labels):
            raise UserError(f"--labels {' '.join(self.labels)}: must be whole numbers above 0, or all")


# ---------------------------------------------------------------- The table

def choose(column, task, size):
    """The option with which the column, on a few draws of labels, is best on held-out examples."""
    draws = [task.train[evaluation.draw_labels(task.labels[task.train], size, 1000 + seed)]
             for seed in range(1 if size is None else task.trials)]
    options = column.options(len(draws[0]))
    if len(options) == 1:
        return options[0]
    scores = []
    for option in options:
        found = [column.answers(column.fit(which, option, seed), task.held_out) for seed, which in enumerate(draws)]
        scores.append(np.mean([evaluation.accuracy(answers, task.labels[task.held_out]) for answers in found]))
    return options[int(np.argmax(scores))]


def one_row(settings, task, columns, row):
    """-> {column: (accuracies, seconds)}, a draw of labels an entry, and the last fitted model of the last column."""
    size, chosen, found = None if row == "all" else int(row), {}, {name: ([], []) for name in columns}
    print(f"{row} labels a class", flush=True)
    for name, column in columns.items():
        progress(f"{row} labels a class, {name}: choosing on held-out examples")
        chosen[name] = choose(column, task, size)
        if chosen[name]:
            print(f"  {name}: chose {chosen[name]}", flush=True)
    pool = task.train if size else np.concatenate([task.train, task.held_out])     # all means all: the choices are made
    for seed in range(settings.seeds if size else min(settings.seeds, 2)):
        which = pool[evaluation.draw_labels(task.labels[pool], size, seed)]
        for name, (accuracies, seconds) in found.items():
            progress(f"{row} labels a class, draw {seed + 1}: {name}")
            begin = time.perf_counter()
            fitted = columns[name].fit(which, chosen[name], seed)
            seconds.append(time.perf_counter() - begin)
            accuracies.append(evaluation.accuracy(columns[name].answers(fitted, task.test), task.labels[task.test]))
        print(f"  draw {seed + 1}: " + ", ".join(f"{name} {a[-1]:.1f}" for name, (a, _) in found.items()), flush=True)
    return found, fitted


def table(settings, task):
    """-> [(labels a class, {column: (accuracies, seconds)}, last fitted classifier)], a row an entry, and chance."""
    if not (len(task.train) and len(task.held_out) and len(task.test)):
        raise UserError("too few labelled examples to train on, to choose by and to test on: give 10 of each class")
    chance = 100 * float(torch.bincount(task.labels[task.test]).max()) / len(task.test)
    sizes = torch.bincount(task.labels[task.train], minlength=len(task.classes))
    least = int(sizes.min())
    reason = f"the smallest class, {task.classes[int(sizes.argmin())]}, has {least} to train on"
    print(f"{len(task.classes)} classes; labelled: {len(task.train):,} to draw from, {len(task.held_out):,} held out "
          f"for choices, {len(task.test):,} to test on, of which the commonest class is {chance:.1f} %")
    rows, results = settings.labels or task.rows, []
    too_large = [row for row in rows if row != "all" and int(row) > least]
    if too_large and settings.labels:
        raise UserError(f"--labels {' '.join(too_large)}: too many, {reason}")
    if too_large:
        print(f"left out: {' and '.join(too_large)} labels a class, for {reason}")
    columns = {"linear probe": task.probe} if settings.probe else task.columns()
    for row in [row for row in rows if row not in too_large]:
        try:
            results.append((row, *one_row(settings, task, columns, row)))
        except KeyboardInterrupt:
            if not results:
                raise
            print("stopped: the rows before this one are kept", flush=True)
            break
    return results, chance


def write_results(settings, checkpoint, name, classes, results, chance):
    """Print the table; in the run's folder finetune.csv, .svg (or probe.csv), classifier.pt, page. name: the data's."""
    folder, (_, _, classifier) = Path(settings.run), results[-1]
    path = folder / ("probe.csv" if settings.probe else "finetune.csv")
    write_csv(path, [dict(labels_a_class=row, method=method, seed=n, test_accuracy=round(accuracy, 2),
                          seconds=round(seconds, 1), data=name, step=checkpoint["step"]) for row, found, _ in results
                     for method, columns in found.items() for n, (accuracy, seconds) in enumerate(zip(*columns))])
    if not settings.probe:
        figure = figures.label_figure(path, xmlns="http://www.w3.org/2000/svg")
        write_atomically(folder / "finetune.svg", figure.encode())
        write_checkpoint(folder / "classifier.pt", dict(format=CLASSIFIER_FORMAT, step=checkpoint["step"],
                                                        classes=classes, model=classifier.state_dict()))
    print(f"\ntest accuracy in %, mean ± standard deviation over draws (chance {chance:.1f}); "
          f"in brackets seconds a draw")
    lines = figures.label_table(path)
    for line, (_, found, _) in zip(lines[1:], results):
        line[1:] = [f"{cell} ({np.mean(seconds):.0f})" for cell, (_, seconds) in zip(line[1:], found.values())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines))
    report.write_page(folder)


# ---------------------------------------------------------------- From the command line

def main():
    settings = read_settings(Settings, __doc__)
    model, checkpoint = runs.load_run(settings.run)
    trained, of_text = checkpoint["settings"], checkpoint["method"] == "mlm"
    with contextlib.redirect_stdout(sys.stderr if settings.predict else sys.stdout):   # its stdout: answers alone
        device, precision, cast, _ = choose_machine(settings)
    if settings.predict:
        label = label_texts if of_text else label_images
        return label(settings.run, settings.predict, checkpoint, model, cast, device)
    name, data_dir = settings.data or trained["data"], settings.data_dir or trained["data_dir"]
    kind, others, end = ("texts", ("shapes", "cifar10"), ".npy") if of_text else ("images", ("pydocs", "imdb"), ".txt")
    if name in others or name.endswith(end):
        raise UserError(f"--data {name}: the run in {settings.run} learned from {kind}; give it such data")
    if settings.features and Path(settings.features).resolve() == Path(name).resolve():
        raise UserError(f"--features {settings.features}: that is the data; give another name")
    if of_text:
        data = load_texts(name, data_dir, trained["vocabulary_size"], settings.limit, runs.tokenizer_of(checkpoint),
                          keep_all=bool(settings.features))
    else:
        data = load_images(name, data_dir, settings.limit, keep_all=bool(settings.features))
        runs.check_images(data, model, name)
    if settings.features:
        model.to(device)
        features = (evaluation.text_features(model, data, cast, device, progress) if of_text else
                    evaluation.image_features(model.encode, data, cast, device, progress))
        np.save(settings.features, features.numpy())
        return print("; ".join([f"{settings.features}: {len(features):,} × {features.shape[1]} features", *data.notes]))
    runs.check_split(data, checkpoint, name, settings.limit, kind)
    if len(data.classes) < 2:
        raise UserError(f"--data {name}: fine-tuning needs labels, of two classes at least: for texts a folder "
                        f"with a sub-folder per class, for images NAME.labels.npy beside NAME.npy")
    if not writable(Path(settings.run)):
        raise UserError(f"{settings.run}: one cannot write into it, and the table is kept there; copy the run")
    for note in data.notes:
        print(f"data: {note}")
    data = data.select(data.labels >= 0)
    task = TextTask(data, model, cast, device) if of_text else ImageTask(
        data, model, cast, device, precision, lambda seed: runs.new_model(checkpoint, seed),
        not (settings.no_flip or trained.get("no_flip")), trained.get("code"))
    write_results(settings, checkpoint, name, data.classes, *table(settings, task))


if __name__ == "__main__":
    run_script(main)
