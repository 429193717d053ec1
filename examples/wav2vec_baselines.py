"""What the encoder of examples/wav2vec.py is compared with, and what it shows while it learns.

The rows of the table, all with the same labels:

    log-mel statistics     log-mel spectra over time, and logistic regression
    untrained encoder      the encoder before the training, and logistic regression
    from scratch           the whole encoder, trained on the few labels alone
    wav2vec                the pretrained encoder, and logistic regression
    ..., self-trained      the same features; the probe also learns from its guesses for the
                           training recordings without a label (evaluation/self_training.py)

All of them pool their frames alike, see `pool`. This file chooses nothing on the test recordings:
cross-validation on the drawn labels sets the penalty, and self-training reads the training
recordings alone. But two settings were chosen when test speakers of the spoken digits had been
seen (fold 0): the number of steps, and not to fine-tune. Others were chosen on speakers that are
the test of the folds 1 and 2 (EXPERIMENTS.md, "Speech").

A draw of labels moves all rows together. So the table also shows the lead of wav2vec over other
rows with the same draws.
"""

import numpy as np
import torch
import torch.nn.functional as F
import wav2vec_data

from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.evaluation import probes
from minissl.evaluation.classifier import Classifier
from minissl.evaluation.columns import PROBE_STRENGTHS, LinearLearner, standardize
from minissl.evaluation.self_training import SelfTraining
from minissl.optim import Muon, lr_schedule, step_optimizers
from minissl.training.files import progress


LABELS_A_SPEAKER = 10
STRENGTH_OF_ONE = (0.1,)    # the penalty with one label a class: nothing to validate with
WHOLE_RATE, WHOLE_STEPS = 0.01, 120      # of a training of the whole encoder on labels
WHOLE_ENCODER_SCALE = 0.1   # its convolutions learn at this share of the rate


# ---------------------------------------------------------------- features

def pool(x, lengths, parts=3):
    """Frames (B, T, D) -> (B, (parts + 1) · D) float32, whatever the padding holds.

    The means over each third of the time, and the standard deviation over all of it.
    lengths (B,) int64, at least `parts`.
    """
    time = torch.arange(x.shape[1], device=x.device)
    part = (time * parts // lengths[:, None]).clamp(max=parts)            # (B, T)
    belongs = F.one_hot(part, parts + 1)[..., :parts].float()             # (B, T, parts)
    x = x.float().masked_fill((part == parts)[..., None], 0)
    means = torch.einsum("btp,btd->bpd", belongs, x)
    means = means / belongs.sum(1)[..., None]
    n = lengths[:, None]
    mean = x.sum(1) / n                                                   # (B, D)
    variance = x.square().sum(1) / n - mean.square()
    return torch.cat([means.flatten(1), variance.clamp(min=1e-6).sqrt()], dim=1)


def log_mel_features(recordings):
    """Pooled log-mel spectra: (N, 160) float32."""
    rows = []
    for samples in recordings.waves:
        frames = torch.from_numpy(wav2vec_data.log_mel(samples))[None]
        rows.append(pool(frames, torch.tensor([frames.shape[1]])))
    return torch.cat(rows)


@torch.no_grad()
def encode_all(encode, recordings, indices, autocast, device):
    """encode(waves, lengths) of the recordings `indices` (n,), in their order: (n, D) float32."""
    sizes = [len(recordings.waves[i]) for i in indices]
    by_length = np.argsort(sizes, kind="stable")             # so that there is little padding
    parts = []
    for places in np.array_split(by_length, max(1, len(by_length) // 32)):
        waves, lengths = wav2vec_data.pad([recordings.waves[i] for i in indices[places]])
        with autocast:
            parts.append(encode(waves.to(device), lengths.to(device)).float().cpu())
    return torch.cat(parts)[by_length.argsort()]


# ---------------------------------------------------------------- classifiers

def make_optimizers(model, rate, encoder_scale, precision):
    """Muon for the weights of the convolutions, at rate · encoder_scale, and for the blocks.

    Adam trains all else at a tenth of the rate: the biases of the convolutions, the vector of
    hidden frames, the quantiser, and the two output layers. So even with encoder_scale 0 these
    biases learn.
    """
    encoder = [model.filters] + [layer.weight for layer in model.convolutions]
    blocks = list(model.blocks.parameters())
    known = {id(p) for p in encoder + blocks}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [dict(params=encoder, lr_scale=encoder_scale), dict(params=blocks)]
    muon = Muon(groups, rate, precision=precision)
    adam = torch.optim.Adam([dict(params=others, lr_scale=0.1)], betas=(0.9, 0.98))
    return [muon, adam]


def probe_and_self_training(features, recordings):
    """Two classifiers of features (N, D): a LinearLearner, and SelfTraining on top of it.

    The features are standardized over the training recordings, whose other labels are not read.
    """
    train = recordings.select(TRAIN, labelled=False)
    x, _, _ = standardize(features, train)
    labels = torch.from_numpy(recordings.labels)
    probe = LinearLearner(x, labels, len(recordings.classes), PROBE_STRENGTHS)
    return probe, SelfTraining(probe, train)


def train_from_scratch(model, mean, std, recordings, fit, settings, machine):
    """Train an encoder and a linear layer on the labels of `fit`: accuracy in % on the test.

    mean and std (D,) of the features of the untrained encoder; machine: what choose_machine
    returns. Each recording is read at another speed, as in the pretraining. The model changes.
    """
    device, precision, autocast = machine
    weights = torch.zeros(len(mean) + 1, len(recordings.classes))
    classifier = Classifier(model, mean, std, weights).to(device)
    optimizers = make_optimizers(model, WHOLE_RATE, WHOLE_ENCODER_SCALE, precision)
    head = dict(params=classifier.head.parameters(), lr_scale=0.1)
    optimizers.append(torch.optim.Adam([head]))
    labels = torch.from_numpy(recordings.labels)
    size = min(settings.batch_size, len(fit))
    batches = wav2vec_data.WaveBatches(recordings, fit, size, settings.speed, settings.seed)
    for step in range(WHOLE_STEPS):
        waves, lengths = batches(step)
        with autocast:
            logits = classifier(waves.to(device), lengths.to(device))
        answers = labels[batches.indices_of(step)].to(device)
        F.cross_entropy(logits, answers).backward()
        step_optimizers(optimizers, WHOLE_RATE * lr_schedule(step, WHOLE_STEPS, warmup=20))
    test = recordings.select(TEST)
    logits = encode_all(classifier.eval(), recordings, test, autocast, device)
    return probes.accuracy(logits.argmax(1), recordings.labels[test])


# ---------------------------------------------------------------- the table

LOG_MEL, UNTRAINED = "log-mel statistics", "untrained encoder"
SCRATCH, OWN = "from scratch", "wav2vec"
SELF_TRAINED = ", self-trained"
LEADS = [                   # rows that are compared draw by draw
    (OWN, LOG_MEL),
    (OWN, SCRATCH),
    (OWN + SELF_TRAINED, LOG_MEL),
    (OWN + SELF_TRAINED, LOG_MEL + SELF_TRAINED),
    (OWN + SELF_TRAINED, SCRATCH),
]


def measure(model, make_model, recordings, settings, machine):
    """Accuracies in %: {row: (draws, columns)} for the classes, {row: (draws,)} for speakers.

    The columns are settings.labels, as far as every class has so many (load_recordings prints
    those that are left out); they are returned first.
    """
    device, _, autocast = machine
    every = np.arange(len(recordings))
    features = {LOG_MEL: log_mel_features(recordings)}
    for name, encoder in [(UNTRAINED, make_model()), (OWN, model)]:
        features[name] = encode_all(encoder.encode, recordings, every, autocast, device)
    train, test = recordings.select(TRAIN), recordings.select(TEST)
    _, mean, std = standardize(features[UNTRAINED], train)
    classifiers = {}
    for name, x in features.items():
        classifiers[name] = probe_and_self_training(x, recordings)
    labels = recordings.labels
    columns = [n for n in settings.labels if n <= np.bincount(labels[train]).min()]
    rows = [*features, SCRATCH, *(name + SELF_TRAINED for name in features)]
    table = {name: np.zeros((settings.draws, len(columns))) for name in rows}
    for draw in range(settings.draws):
        for column, count in enumerate(columns):
            progress(f"table: draw {draw + 1} of {settings.draws}, {count} labels a class")
            fit = train[probes.draw_labels(labels[train], count, settings.seed + draw)]
            for name, (probe, self_training) in classifiers.items():
                probe.strengths = STRENGTH_OF_ONE if count == 1 else PROBE_STRENGTHS
                probe_model = probe.fit(fit)
                answers = probe.predict(probe_model, test)
                table[name][draw, column] = probes.accuracy(answers, labels[test])
                answers = self_training.predict(self_training.fit(fit, probe_model), test)
                table[name + SELF_TRAINED][draw, column] = probes.accuracy(answers, labels[test])
            table[SCRATCH][draw, column] = train_from_scratch(
                make_model(), mean, std, recordings, fit, settings, machine
            )
    return columns, table, measure_speakers(features, recordings, settings)


def measure_speakers(features, recordings, settings):
    """{row: (draws,)}: who speaks, in %, from ten recordings of each speaker.

    The test is the held-out recordings of the speakers that the training knows.
    """
    speakers = recordings.speakers
    train, test = recordings.select(TRAIN), recordings.select(HELD_OUT)
    train, test = train[speakers[train] >= 0], test[speakers[test] >= 0]
    known, numbers = np.unique(speakers[train], return_inverse=True)
    test = test[np.isin(speakers[test], known)]
    counts = np.bincount(numbers)
    if len(known) < 2 or len(test) == 0 or counts.min() < LABELS_A_SPEAKER:
        return {}
    numbered = torch.from_numpy(np.searchsorted(known, speakers).clip(max=len(known) - 1))
    table = {name: [] for name in features}
    for name, x in features.items():
        x, _, _ = standardize(x, train)
        probe = LinearLearner(x, numbered, len(known), PROBE_STRENGTHS)
        for draw in range(settings.draws):
            drawn = probes.draw_labels(numbers, LABELS_A_SPEAKER, settings.seed + draw)
            answers = probe.predict(probe.fit(train[drawn]), test)
            table[name].append(probes.accuracy(answers, numbered[test]))
    return table


def print_tables(columns, table, speakers):
    """Mean and standard deviation over the draws, the leads, and the line `result:`."""
    print()
    print(f"{'accuracy, %':<42}", *(f"{n:>4} a class" for n in columns), "     speaker")
    for name, rows in table.items():
        cells = [spread(values) for values in rows.T]
        if name in speakers:
            cells.append(spread(np.array(speakers[name])))
        print(f"{name:<42}", *(f"{cell:>12}" for cell in cells))
    print("\nlead with the same draws, in points")
    for own, other in LEADS:
        lead = table[own] - table[other]
        cells = [spread(values, sign="+") for values in lead.T]
        print(f"{own}")
        print(f"{'    over ' + other:<42}", *(f"{cell:>12}" for cell in cells))
    column = columns.index(10) if 10 in columns else len(columns) - 1
    results = dict(labels_a_class=columns[column])
    for name, rows in table.items():
        values = rows[:, column]
        key = key_of(name)
        results[key] = f"{values.mean():.1f}"
        results[f"{key}_std"] = f"{values.std(ddof=1):.1f}"
    for name, values in speakers.items():
        if name in (OWN, LOG_MEL):
            results[f"speaker_{key_of(name)}"] = f"{np.mean(values):.1f}"
    print("result:", *(f"{key}={value}" for key, value in results.items()))


def key_of(name):
    """The name of a row in the line `result:`, without commas, spaces and hyphens."""
    return name.replace(",", "").replace(" ", "_").replace("-", "_")


def spread(values, sign="-"):
    """Mean and standard deviation. sign "+" also marks positive means."""
    return f"{values.mean():{sign}.1f} ± {values.std(ddof=1):.1f}"


# ---------------------------------------------------------------- while it learns

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ123456"     # of the 32 entries of the first codebook


@torch.no_grad()
def preview(model, recordings, autocast, device):
    """Print the codes of one held-out recording, and measure nearest neighbours.

    The column is the accuracy in % with which the nearest training recordings tell the class
    of a held-out one. Neither is a test recording.
    """
    train, held_out = recordings.select(TRAIN), recordings.select(HELD_OUT)
    if len(held_out) == 0:
        return {}
    first = held_out[:1]
    waves, _ = wav2vec_data.pad([recordings.waves[i] for i in first])
    with autocast:
        z = model.latents(waves.to(device))[0]
        half = torch.full((len(z), model.G, model.V), 0.5, device=device)     # no noise
        _, codes, _ = model.quantize(z, 1.0, half)
    text = "".join(LETTERS[code % len(LETTERS)] for code in codes[:, 0].tolist())
    print(f"    codes of {recordings.classes[recordings.labels[first[0]]]}: {text}")
    both = np.concatenate([train, held_out])
    x = encode_all(model.encode, recordings, both, autocast, device)
    x, _, _ = standardize(x, np.arange(len(train)))
    keys, queries = x[:len(train)], x[len(train):]
    labels = recordings.labels
    knn = probes.knn_accuracy(keys, labels[train], queries, labels[held_out], k=10)
    return dict(knn=round(knn, 1))
