"""Metrics and baselines for clip.py.

    floor              what captions that say the same cost at least
    recall             how often the nearest caption, or image, is right
    zero_shot          which images are right by a prompt, without any label
    train_simclr       SimCLR on the same images, for as much time
    probe              logistic regression on features, from a few labels
    compare            the controls, the baselines, and the table
"""

import time

import numpy as np
import torch

from minissl import contrastive
from minissl.data.batches import Batches, generator
from minissl.data.images import mean_and_whitening
from minissl.data.splits import evenly_spaced
from minissl.data.texts import encode_texts
from minissl.evaluation import probes
from minissl.evaluation.columns import LinearLearner, standardize
from minissl.evaluation.features import image_features, images_a_batch
from minissl.optim import lr_schedule, muon_and_adam, step_optimizers
from minissl.training.accuracies import mean_and_spread
from minissl.training.files import progress
from minissl.training.machine import move_to_device


POOL = 1000                 # pairs among which retrieval searches
MOST_PROBED = 10_000        # training images whose labels a probe may draw
PROBE_LABELS = (10, 50)     # a class
# The default settings of train_contrastive.py
SIMCLR_VIEWS, SIMCLR_BATCH, SIMCLR_RATE = 4, 128, 0.02


# ---------------------------------------------------------------- measures

def floor(meaning):
    """The least loss of a batch that one can expect on unseen pairs, in nats: the mean of ln k.

    k captions of the batch say the same as the caption of an image, its own included. So
    the best softmax gives each of them 1/k. (A model that memorises which wording belongs to
    which training image can fall below this.) meaning (B,): equal if captions say the same.
    """
    meaning = torch.as_tensor(meaning)
    k = (meaning[:, None] == meaning).sum(1)                              # (B,)
    return k.double().log().mean()


def recall(s, meaning):
    """Recall at 1 in %, of similarities s (N, N), images × captions.

    The nearest caption of an image is right if it says the same as the image's own caption;
    the nearest image of a caption likewise. So it does not matter which of several equal
    captions comes first. meaning (N,): as for `floor`.
    Returns the recall of captions (each image searches one), of images (each caption searches
    one), and of a random choice.
    """
    meaning = torch.as_tensor(meaning)
    recall_of_captions = probes.accuracy(meaning[s.argmax(1)], meaning)
    recall_of_images = probes.accuracy(meaning[s.argmax(0)], meaning)
    chance = 100 * float((meaning[:, None] == meaning).double().mean())
    return recall_of_captions, recall_of_images, chance


@torch.no_grad()
def encode_pairs(model, pairs, machine):
    """The unit vectors u and v (N, size) of all pairs, on the CPU."""
    device, _, autocast = machine
    size = images_a_batch(pairs.images.shape[1:], 250)
    us, vs = [], []
    for indices in np.array_split(np.arange(len(pairs)), -(-len(pairs) // size)):
        images, tokens, lengths = pairs.batch(indices, model.text_encoder.window, device)
        with autocast:
            us.append(model.image_vectors(images).cpu())
            vs.append(model.text_vectors(tokens, lengths).cpu())
    return torch.cat(us), torch.cat(vs)


@torch.no_grad()
def zero_shot(model, u, pairs, prompt, machine):
    """Whether each of N images is classified correctly with this prompt: (N,) bool.

    The answer is the class whose sentence is nearest. u (N, size), of the images of pairs.
    """
    device, _, autocast = machine
    classes = pairs.images.classes
    texts = encode_texts([prompt.replace("{class}", name) for name in classes],
                         pairs.texts.tokenizer)
    lengths = np.minimum(texts.lengths, model.text_encoder.window)
    tokens, lengths = map(torch.from_numpy, texts.padded(np.arange(len(texts)), lengths=lengths))
    with autocast:
        v = model.text_vectors(tokens.to(device), lengths.to(device)).cpu()         # (C, size)
    answers = (u @ v.T).argmax(1).numpy()                                           # (N,)
    return answers == pairs.images.labels


def measure(model, pairs, settings, machine, compute_loss):
    """All measures of a model on these pairs, a dict.

    loss and floor are means over batches of settings.batch_size (the rest is left out, because
    the loss depends on the size). zero_shot and never_captioned are lists, with the accuracy
    of each prompt on all images and on those with a new combination.
    """
    model.eval()
    u, v = encode_pairs(model, pairs, machine)
    B = min(settings.batch_size, len(pairs))
    # In a random order, because own images may be sorted by class.
    order = torch.randperm(len(pairs), generator=generator(0, "measured order", 0)).numpy()
    losses, floors = [], []
    for begin in range(0, len(pairs) - B + 1, B):
        batch = order[begin:begin + B]
        losses.append(float(compute_loss(u[batch], v[batch], model.t.detach().exp().cpu())))
        floors.append(float(floor(pairs.meaning[batch])))
    pool = evenly_spaced(len(pairs), POOL)
    recall_of_captions, recall_of_images, chance = recall(
        u[pool] @ v[pool].T, pairs.meaning[pool])
    measured = dict(
        loss=np.mean(losses), floor=np.mean(floors), recall_of_captions=recall_of_captions,
        recall_of_images=recall_of_images, recall_by_chance=chance,
    )
    is_labelled = pairs.images.labels >= 0
    if pairs.images.classes and is_labelled.any():
        rights = [zero_shot(model, u, pairs, prompt, machine) for prompt in settings.prompts]
        measured["zero_shot"] = [100 * right[is_labelled].mean() for right in rights]
        if pairs.is_new.any():
            measured["never_captioned"] = [100 * right[pairs.is_new].mean() for right in rights]
    return measured


# ---------------------------------------------------------------- while it learns

def preview(model, pairs, settings, machine, compute_loss):
    """Print the nearest captions of three images. Returns columns of the log."""
    shown = pairs.select(evenly_spaced(len(pairs), 200))
    u, v = encode_pairs(model.eval(), shown, machine)
    nearest = (u @ v.T).argmax(1)
    for n in range(min(3, len(shown))):
        print(f"    image of: {shown.captions[n]} | nearest: {shown.captions[nearest[n]]}")

    measured = measure(model, pairs, settings, machine, compute_loss)
    columns = dict(held_out=round(measured["loss"], 4))
    columns["recall"] = round(measured["recall_of_captions"], 2)
    for name in ("zero_shot", "never_captioned"):
        if name in measured:
            columns[name] = round(np.mean(measured[name]), 2)
    return columns


# ---------------------------------------------------------------- baselines

def train_simclr(images, settings, machine):
    """SimCLR as train_contrastive.py trains it on drawn shapes: four views of 128 images a step.

    The weight decay is larger, because that is better in so short a training (EXPERIMENTS.md,
    "Does more weight decay help SimCLR?"). It makes a quarter more steps than CLIP, so that both
    trainings take about as long (`compare` prints both times).
    """
    device, precision, autocast = machine
    steps = settings.steps * 5 // 4
    torch.manual_seed(settings.seed)
    model = contrastive.SimCLR(width=settings.width, **mean_and_whitening(images))
    model = move_to_device(model, device)
    optimizers = muon_and_adam(model, SIMCLR_RATE, weight_decay=0.2, precision=precision)
    # In a trial with --limit there may be fewer images.
    batches = Batches(
        len(images), min(SIMCLR_BATCH, len(images)), settings.seed, "image order")
    for step in range(steps):
        batch = images[batches(step)].to(device)                          # (B, C, H, W)
        draw = generator(settings.seed, "view", step)
        numbers = torch.rand(len(batch), SIMCLR_VIEWS, 11, generator=draw).to(device)
        size = contrastive.view_shape(*batch.shape[2:])
        views = []
        for of_view in numbers.unbind(1):                                 # (B, 11)
            views.append(contrastive.augment(
                batch, size, of_view, **contrastive.VIEWS_OF_SHAPES))
        with autocast:
            projections = model(torch.stack(views))                       # (V, B, D)
        contrastive.info_nce(projections, temperature=0.15).backward()
        schedule = lr_schedule(step, steps, warmup=steps // 20, decay=1)
        step_optimizers(optimizers, SIMCLR_RATE * schedule)
        progress(f"SimCLR: {step + 1:,} of {steps:,} steps")
    return model.eval()


def probe(encode, known, test, draws, machine, mirror=False):
    """Logistic regression on features, from PROBE_LABELS labels of each class.

    The labels are those of the images `known`, and the penalty is chosen by cross-validation
    on the drawn labels. A number of labels that a class does not have is left out. mirror: the
    features are the mean over an image and its mirror image, as in finetune.py. Returns a list of
    (labels a class, accuracies on all test images, accuracies on those with a new combination),
    with a value for each draw.
    """
    device, _, autocast = machine
    features = []
    for images in (known, test.images):
        features.append(image_features(encode, images, autocast, device, mirror=mirror))
    x, _, _ = standardize(torch.cat(features), np.arange(len(known)))
    tested = np.arange(len(known), len(x))
    labels, classes = torch.from_numpy(known.labels), len(known.classes)
    learner = LinearLearner(x, labels, classes)
    fewest = labels.bincount(minlength=classes).min()
    measured = []
    for per_class in PROBE_LABELS:
        if per_class > fewest:
            continue
        of_all, of_new = [], []
        for draw in range(draws):
            drawn = probes.draw_labels(labels, per_class, draw)
            answers = learner.predict(learner.fit(drawn), tested).numpy()
            is_right = answers == test.images.labels
            of_all.append(100 * is_right.mean())
            of_new.append(100 * is_right[test.is_new].mean())
        measured.append((per_class, of_all, of_new))
    return measured


# ---------------------------------------------------------------- the report

def report(measured, B):
    """Print the measures of the test pairs. Returns the headline figures, a dict.

    measured: as from `measure`; B: the size of a batch.
    """
    print(f"test: {describe(measured, B)}")
    result = {name: round(measured[name], 3) for name in ("loss", "floor")}
    result["recall"] = round(measured["recall_of_captions"], 1)
    for name in ("zero_shot", "never_captioned"):
        if name in measured:
            result[name] = round(np.mean(measured[name]), 1)
            figures = mean_and_spread(measured[name])
            print(f"test: {name.replace('_', ' ')} {figures}, over the prompts")
    return result


def compare(model, measured, train_pairs, test, settings, machine, compute_loss, train):
    """Train the controls and SimCLR, and print the table. Returns their figures, a dict.

    measured: of the model on the test pairs; train(name, pairs, settings, machine): trains
    such a model on other pairs.
    """
    seed = settings.seed
    begin = time.perf_counter()
    order = torch.randperm(len(train_pairs), generator=generator(seed, "control", 0)).numpy()
    shuffled = train("captions shuffled", train_pairs.shuffled(order), settings, machine)
    shuffled_end = time.perf_counter()
    bag = train("words shuffled", train_pairs.with_words_shuffled(seed), settings, machine)
    bag_end = time.perf_counter()
    simclr = train_simclr(train_pairs.images, settings, machine)
    print(f"time: captions shuffled {shuffled_end - begin:.0f} s (CLIP takes as long), "
          f"words shuffled {bag_end - shuffled_end:.0f} s, "
          f"SimCLR {time.perf_counter() - bag_end:.0f} s")
    of_shuffled = measure(shuffled, test, settings, machine, compute_loss)
    test_bag = test.with_words_shuffled(seed + 1)
    of_bag = measure(bag, test_bag, settings, machine, compute_loss)
    print(f"words shuffled: {describe(of_bag, min(settings.batch_size, len(test)))}")

    rows = []
    for name, values in [
        ("CLIP, by prompts", measured),
        ("captions shuffled among images", of_shuffled),
        ("words shuffled within captions", of_bag),
    ]:
        rows.append((name, 0, values["zero_shot"], values["never_captioned"]))
    result = dict(
        captions_shuffled=round(np.mean(of_shuffled["zero_shot"]), 1),
        words_shuffled=round(np.mean(of_bag["zero_shot"]), 1),
    )
    known = train_pairs.images.select(evenly_spaced(len(train_pairs), MOST_PROBED))
    # SimCLR mirrors images while it trains, and CLIP does not.
    of_simclr = probe(simclr.encode, known, test, settings.draws, machine, mirror=True)
    of_clip = probe(model.encode, known, test, settings.draws, machine)
    for per_class, *values in of_simclr:
        rows.append(("SimCLR, probe", per_class, *values))
        result[f"simclr_{per_class}_labels"] = round(np.mean(values[0]), 1)
    for per_class, *values in of_clip:
        rows.append(("CLIP, probe", per_class, *values))
    print_table(rows)
    print("±: standard deviation over the prompts, each used alone; of probes, over the draws")
    print("SimCLR is read at three depths and averaged over the mirror image, as in finetune.py; "
          "CLIP's image encoder is read at its end")
    return result


def describe(measured, B):
    """Loss and recall in a sentence. B: the size of a batch."""
    return (
        f"loss {measured['loss']:.3f} (chance {np.log(B):.3f}, floor {measured['floor']:.3f}), "
        f"recall at 1 of captions {measured['recall_of_captions']:.1f}, "
        f"of images {measured['recall_of_images']:.1f} "
        f"(chance {measured['recall_by_chance']:.1f})"
    )


def print_table(rows):
    """rows: (name, labels a class, accuracies on all images, on never captioned ones)."""
    print(f"{'':32}{'labels a class':>14}{'all images':>14}{'never captioned':>17}")
    for name, per_class, of_all, of_new in rows:
        of_all, of_new = mean_and_spread(of_all), mean_and_spread(of_new)
        print(f"{name:32}{per_class:>14}{of_all:>14}{of_new:>17}")
