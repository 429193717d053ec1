"""What was the pretraining worth? Any run + a few labels -> test accuracy, against the same model from scratch.

    python finetune.py runs/mlm                                 the table, on the data that the run learned from
    python finetune.py runs/imdb --labels 10 100 --seeds 10     some rows, more draws
    python finetune.py runs/mlm --data my_classes/              your own texts: a folder with a sub-folder per class
    python finetune.py runs/imdb --predict new.txt              label new text with the classifier the table ended with
    python finetune.py runs/imdb --features out.npy --data my_texts/         (N, d) float32, a row a text

The columns, all on the same draws of labels, and what each may choose (always on held-out training texts or by
cross-validation inside the draw; the test set is scored once, at the end):

    tf-idf        what a user would do instead: one- and two-word features over the same tokens, logistic regression;
                  strength by cross-validation
    from scratch  the same model without pretraining; rate and epochs on held-out texts
    linear probe  logistic regression on the frozen features; strength by cross-validation
    fine-tuned    starts from the probe, then moves the embeddings, too; rate (0 among them) and epochs on held-out texts

How a text encoder is fine-tuned here. The document vector is a mean of token vectors, and each token vector its
embedding plus what the blocks add from the context. Fine-tuning moves the embeddings, where what a label says about
a word belongs; the blocks' part is computed once and stays. Moving the blocks, too, takes a hundred times longer.
From scratch the blocks' last matrices are zero, so there the model is its embeddings.
"""

import csv
import io
import time
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minissl import UserError, evaluation, report, transformer
from minissl.datasets import HELD_OUT, TEST, TRAIN, load_texts, progress, read_texts, texts_of
from minissl.training import (at_least, autocast, choose_machine, generator, read_checkpoint, read_settings,
                              run_script, write_atomically)


# ---------------------------------------------------------------- Settings

@dataclass
class Settings:
    run: str  # the folder of a run
    labels: list[str] = field(default_factory=lambda: ["10", "100", "500", "all"])  # labels a class, a row each
    seeds: int = 5  # draws of labels; "all" is one draw, trained in two orders
    data: str = ""  # other data than the run's: pydocs, imdb, a folder with a sub-folder per class
    data_dir: str = ""  # where archives and caches lie; as for the run, unless given
    limit: int = 0  # take this many texts of each split only, for a trial; 0: all
    features: str = ""  # instead of the table: write the texts' features to this .npy
    predict: str = ""  # instead of the table: label the texts of this file
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # for the encoder; the rest is small
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the encoder

    def check(self):
        at_least(1, seeds=self.seeds)
        at_least(0, limit=self.limit)
        for rows in self.labels:
            if rows != "all" and not (rows.isdecimal() and int(rows) > 0):
                raise UserError(f"--labels {rows}: must be whole numbers above 0, or all")


# ---------------------------------------------------------------- The classifier

CLASSIFIER_FORMAT = "minissl classifier 1"


class TextClassifier(nn.Module):
    """Counts of words and pairs (B, V + N), and the blocks' part of the document vector (B, d) -> logits (B, C)."""

    def __init__(self, table, mean, deviation, classes):
        super().__init__()
        self.table = nn.Parameter(table.clone())                              # (V + N, d), the embeddings
        self.register_buffer("mean", mean)                                    # (d,) of the unlabelled pool, as is
        self.register_buffer("deviation", deviation)                          # (d,)
        self.head = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, counts, context, words):
        h = counts @ self.table / words + context                             # (B, d)
        return self.head((transformer.norm(h) - self.mean) / self.deviation)


def train_classifier(model, data, which, rate, unit, epochs, strength, seed):
    """Train all of `model` on the texts `which`: Adam, the rate linear to 0. The embeddings' rate is `rate` times `unit`,
    the spread of what they have to move (the vectors of the blocks can be a thousand times longer than theirs);
    `strength` is the head's L2 penalty, as in the probe."""
    if rate == 0:
        return model
    size = min(64, len(which))
    steps = max(1, epochs * len(which) // size)
    optimizer = torch.optim.Adam([dict(params=[model.table], lr=rate * unit),
                                  dict(params=model.head.parameters(), lr=min(0.3 * rate, 0.01))], betas=(0.9, 0.99))
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        epoch, batch = divmod(step, len(which) // size)
        order = torch.randperm(len(which), generator=generator(seed, "fine-tuning order", epoch)).numpy()
        chosen = which[order[batch * size:(batch + 1) * size]]
        logits = model(evaluation.rows(data.counts, chosen).to_dense(), data.context[chosen], data.words[chosen])
        loss = F.cross_entropy(logits, data.labels[chosen]) + strength / 2 * model.head.weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * (1 - step / steps)
        optimizer.step()
    return model


@torch.no_grad()
def score(model, data, which):
    """Test accuracy, or that on any other texts."""
    logits = model(evaluation.rows(data.counts, which), data.context[which], data.words[which])
    return evaluation.accuracy(logits.argmax(1), data.labels[which])


# ---------------------------------------------------------------- The texts as the columns need them

class Prepared:
    """Of N texts: counts (N, V + N') sparse, words (N, 1), features (N, d), context (N, d) = what the blocks add to the
    mean of embeddings, z (N, d) = normed and standardised features, labels (N,), and which are train, held_out, test."""

    def __init__(self, texts, model, cast, device):
        self.features = evaluation.text_features(partial(transformer.encode, model.to(device)), texts, cast, device,
                                                 progress=progress)
        model.cpu()
        owners, terms, V = [], [], model.token_embedding.num_embeddings
        for part in texts.slices(4096):
            tokens, owner = texts.flat(part)
            pairs = model.pair_ids(torch.from_numpy(tokens)).numpy()
            word, pair = tokens > 0, pairs < len(model.pairs)
            owners += [part[owner[word]], part[owner[pair]]]
            terms += [tokens[word], V + pairs[pair]]
        self.counts = evaluation.sparse_counts(np.concatenate(owners), np.concatenate(terms), len(texts),
                                               V + len(model.pairs))
        self.words = torch.from_numpy(texts.lengths).float()[:, None]
        self.table = model.term_table().detach()                              # (V + N', d)
        self.context = self.features - self.counts @ self.table / self.words
        self.labels, self.classes = torch.from_numpy(texts.labels), len(texts.classes)
        self.train, self.held_out, self.test = (np.flatnonzero(texts.split == s) for s in (TRAIN, HELD_OUT, TEST))
        normed = transformer.norm(self.features)
        pool = normed[self.train]
        self.mean, self.deviation = pool.mean(0), pool.std(0, correction=0).clamp(min=1e-6)
        self.z = (normed - self.mean) / self.deviation
        self.spread = float(self.features[self.train].std(0, correction=0).mean())

    def without_blocks(self):
        """The same for a model that has not been pretrained: its blocks add nothing, its vectors have no known scale."""
        other = copy(self)
        other.context, other.mean, other.deviation = 0 * self.context, 0 * self.mean, 0 * self.mean + 1
        return other


# ---------------------------------------------------------------- The columns: each fits on `which` and no other labels

SCRATCH_RATES, TUNED_RATES = (0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 0.003, 0.01, 0.03, 0.1)
PROBE_STRENGTHS, TF_IDF_STRENGTHS = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001), (1e-2, 1e-3, 1e-4, 3e-5, 1e-5)


def fit_probe(data, which):
    return evaluation.probe(data.z[which], data.labels[which], data.classes, PROBE_STRENGTHS)


def fit_from_scratch(data, which, rate, epochs, seed, start=None):
    """data: as made by `without_blocks`."""
    table = 0.1 * torch.randn(data.table.shape, generator=generator(seed, "from scratch", 0))
    classifier = TextClassifier(table, data.mean, data.deviation, data.classes)
    return train_classifier(classifier, data, which, rate, 0.1, epochs, 0, seed)


def fit_fine_tuned(data, which, rate, epochs, seed, start):
    """start: what fit_probe found on the same labels."""
    weights, strength = start
    classifier = TextClassifier(data.table, data.mean, data.deviation, data.classes)
    with torch.no_grad():
        classifier.head.weight.copy_(weights[:-1].T)
        classifier.head.bias.copy_(weights[-1])
    return train_classifier(classifier, data, which, rate, data.spread, epochs, strength, seed)


def linear_accuracy(x, data, which, strengths):
    """Logistic regression on the rows of x, fitted on `which`, scored on the test set."""
    weights, _ = evaluation.probe(evaluation.rows(x, which), data.labels[which], data.classes, strengths)
    logits = evaluation.predict(evaluation.rows(x, data.test), weights)
    return evaluation.accuracy(logits.argmax(1), data.labels[data.test])


def choose(fit, data, rates, size, begin=lambda data, which: None):
    """The (rate, epochs) with which `fit`, on up to three draws of labels, is best on held-out texts."""
    texts_drawn = len(data.train) if size is None else size * data.classes
    fewest = int(min(30, max(2, 4000 / texts_drawn)))
    options = [(rate, epochs) for rate in rates
               for epochs in ([fewest] if texts_drawn > 5000 or rate == 0 else [fewest, 3 * fewest])]
    draws = [data.train[evaluation.draw_labels(data.labels[data.train], size, 1000 + seed)]
             for seed in range(1 if size is None else 3)]
    starts = [begin(data, which) for which in draws]
    scores = [np.mean([score(fit(data, which, *option, seed, start), data, data.held_out)
                       for seed, (which, start) in enumerate(zip(draws, starts))]) for option in options]
    return options[int(np.argmax(scores))]


def table(settings, texts, data):
    """-> [(labels a class, {column: (accuracies, seconds)})], chance, and the last fine-tuned classifier."""
    if not (len(data.train) and len(data.held_out) and len(data.test)):
        raise UserError("too few labelled texts for a training, a held-out and a test set: give at least 10 of each class")
    known = np.concatenate([data.train, data.held_out])
    words = evaluation.tf_idf(evaluation.one_and_two_word_counts(texts, known), known)
    blank, results = data.without_blocks(), []
    chance = 100 * float(torch.bincount(data.labels[data.test]).max()) / len(data.test)
    least = int(torch.bincount(data.labels[data.train], minlength=data.classes).min())
    print(f"{data.classes} classes; labelled texts: {len(data.train):,} to draw from, {len(data.held_out):,} held out for "
          f"choices, {len(data.test):,} to test on, of which the commonest class is {chance:.1f} %")
    for row in settings.labels:
        size = None if row == "all" else int(row)
        if size is not None and size > least:
            if settings.labels == Settings("").labels:
                print(f"{row} labels a class: left out, the smallest class has {least} training texts")
                continue
            raise UserError(f"--labels {row}: there are no {row} labels a class, the smallest class has {least} training "
                            f"texts")
        begin = time.perf_counter()
        progress(f"{row} labels a class: choosing rates and epochs on held-out texts")
        scratch = choose(fit_from_scratch, blank, SCRATCH_RATES, size)
        tuned = choose(fit_fine_tuned, data, TUNED_RATES, size, fit_probe)
        print(f"{row} labels a class: rate and epochs from scratch {scratch}, fine-tuned {tuned}, "
              f"chosen in {time.perf_counter() - begin:.0f} s")
        pool = data.train if size else known                                  # all means all: the choices are made
        found = {name: ([], []) for name in ("tf-idf", "from scratch", "linear probe", "fine-tuned")}
        for seed in range(settings.seeds if size else min(settings.seeds, 2)):
            which = pool[evaluation.draw_labels(data.labels[pool], size, seed)]
            for name, (accuracies, seconds) in found.items():
                progress(f"{row} labels a class, draw {seed + 1}: {name}")
                begin = time.perf_counter()
                if name == "tf-idf":
                    accuracies.append(linear_accuracy(words, data, which, TF_IDF_STRENGTHS))
                elif name == "from scratch":
                    accuracies.append(score(fit_from_scratch(blank, which, *scratch, seed), blank, data.test))
                elif name == "linear probe":
                    accuracies.append(linear_accuracy(data.z, data, which, PROBE_STRENGTHS))
                else:
                    classifier = fit_fine_tuned(data, which, *tuned, seed, fit_probe(data, which))
                    accuracies.append(score(classifier, data, data.test))
                seconds.append(time.perf_counter() - begin)
            print(f"  draw {seed + 1}: " + ", ".join(f"{name} {a[-1]:.1f}" for name, (a, _) in found.items()), flush=True)
        results.append((row, found))
    if not results:
        raise UserError("no row is left: give more labelled texts or ask for fewer --labels")
    return results, chance, classifier


def write_results(settings, checkpoint, name, results, chance, classifier, classes):
    """Print the table; finetune.csv, classifier.pt and the page go into the run's folder. name: of the data."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["labels_a_class", "method", "seed", "test_accuracy", "seconds", "data"])
    for row, found in results:
        for method, (accuracies, seconds) in found.items():
            writer.writerows([row, method, n, round(a, 2), round(s, 1), name] for n, (a, s) in enumerate(zip(accuracies, seconds)))
    folder, state = Path(settings.run), io.BytesIO()
    write_atomically(folder / "finetune.csv", text.getvalue().encode())
    torch.save(dict(format=CLASSIFIER_FORMAT, step=checkpoint["step"], classes=classes, **classifier.state_dict()),
               state)
    write_atomically(folder / "classifier.pt", state.getbuffer())
    print(f"\ntest accuracy in %, mean ± standard deviation over draws (chance {chance:.1f}); in brackets seconds a draw")
    lines = report.label_table(folder / "finetune.csv")
    for line, (_, found) in zip(lines[1:], results):
        line[1:] = [f"{cell} ({np.mean(seconds):.0f})" for cell, (_, seconds) in zip(line[1:], found.values())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines))
    report.write_page(folder)


def label_new_texts(settings, checkpoint, model, tokenizer, cast, device):
    """Print label and text for each text of a file, with the classifier that the table ended with."""
    if not Path(settings.predict).is_file():
        raise UserError(f"--predict {settings.predict}: there is no such file; give a text a line or a paragraph")
    strings = list(read_texts(Path(settings.predict)))
    saved = read_checkpoint(Path(settings.run) / "classifier.pt", CLASSIFIER_FORMAT)
    if saved["step"] != checkpoint["step"]:
        raise UserError(f"{settings.run} has been trained further since its classifier was made: run finetune.py "
                        f"{settings.run} again")
    data = Prepared(texts_of(strings, tokenizer), model, cast, device)
    classifier = TextClassifier(saved["table"], saved["mean"], saved["deviation"], len(saved["classes"]))
    classifier.load_state_dict({name: saved[name] for name in classifier.state_dict()})
    with torch.no_grad():
        logits = classifier(data.counts, data.context, data.words)
    for text, row in zip(strings, logits.softmax(1)):
        print(f"{saved['classes'][int(row.argmax())]}\t{float(row.max()):.2f}\t{' '.join(text.split())}")


def main():
    settings = read_settings(Settings, __doc__, positional=("run",))
    settings.check()
    model, tokenizer, checkpoint = evaluation.load_text_run(settings.run)
    device, precision, _ = choose_machine(settings)
    cast = autocast(device, precision)
    if settings.predict:
        return label_new_texts(settings, checkpoint, model, tokenizer, cast, device)
    name = settings.data or checkpoint["settings"]["data"]
    texts = load_texts(name, settings.data_dir or checkpoint["settings"]["data_dir"],
                       checkpoint["settings"]["vocabulary_size"], settings.limit, tokenizer)
    if settings.features:
        encode = partial(transformer.encode, model.to(device))
        features = evaluation.text_features(encode, texts, cast, device, progress=progress)
        with open(settings.features, "wb") as file:
            np.save(file, features.numpy())
        return print(f"{settings.features}: {features.shape[0]:,} texts × {features.shape[1]} features"
                     + "".join(f"; {note}" for note in texts.notes))
    if len(texts.classes) < 2:
        raise UserError(f"--data {name}: fine-tuning needs labels, of two classes at least: a folder with a sub-folder per "
                        f"class")
    texts = texts.select(texts.labels >= 0)
    data = Prepared(texts, model, cast, device)
    write_results(settings, checkpoint, name, *table(settings, texts, data), texts.classes)


if __name__ == "__main__":
    run_script(main)
