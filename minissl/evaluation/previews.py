"""Previews: what a training script shows while it trains.

A preview is called with the model in evaluation mode. It looks at held-out examples, and at
the training examples nearest to them. It writes pictures or sentences into the folder of the
run, and returns further columns of the log. It learns nothing, and no random number of the
training depends on it.

Labels are used here for marks in the pictures and for one number of the log, the accuracy of
the nearest neighbours.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F

from minissl import autoencoder, contrastive, transformer
from minissl.data.batches import generator
from minissl.data.splits import HELD_OUT, TRAIN
from minissl.evaluation.features import image_features, text_features
from minissl.evaluation.probes import accuracy, knn_accuracy
from minissl.tokenizer import MASK
from minissl.training import distributed, report
from minissl.training.files import write_atomically
from minissl.training.run import diverged


# ---------------------------------------------------------------- images

PREVIEW_BYTES = 2**26       # of float pixels: what a preview holds at once


def preview_size(image_shape, most=512):
    """How many images of a shape (C, H, W) a preview looks at.

    It is 512 for small images, and fewer for large ones, so that they take at most 64 MiB
    (but never fewer than four).

    >>> preview_size((3, 32, 32)), preview_size((3, 512, 512))
    (512, 21)
    """
    bytes_of_one = 4 * math.prod(image_shape)
    return max(4, min(most, PREVIEW_BYTES // bytes_of_one))


def has_two_classes(examples):
    """Whether the labels of the examples, Images or Texts, are of two classes or more.

    Among labels of one class every neighbour is right. Prints a note if there is only one.
    """
    classes = np.unique(examples.labels[examples.labels >= 0])
    if len(classes) == 1:
        c = int(classes[0])
        name = examples.classes[c] if examples.classes else f"class {c}"
        print(f"data: the previews found one class only: {name}; "
              f"knn needs two classes, so it is left out")
    return len(classes) > 1


class NeighbourPreview:
    """The nearest neighbours of held-out images among training images.

    Writes neighbours.png and map.png.

    Arguments: data, Images; folder, of the run; autocast, the context of forward passes;
    device; mirror, whether features are averaged over the mirror image.
    """

    def __init__(self, data, folder, autocast, device, mirror=False):
        self.folder, self.autocast, self.device = folder, autocast, device
        self.mirror = mirror
        self.train_images = data.subset(TRAIN, 2000)
        self.held_out = data.subset(HELD_OUT, 500)
        self.labelled_train = data.subset(TRAIN, 2000, labelled=True)
        self.labelled_held_out = data.subset(HELD_OUT, 500, labelled=True)
        self.has_classes = has_two_classes(self.labelled_train)

    def __call__(self, encode):
        """-> the accuracy of the nearest neighbours in %, or "" if it cannot be computed.

        That is so if no held-out image has a label, or if the training images have fewer than
        two classes.
        """
        train = self._features(encode, self.train_images)
        queries = self._features(encode, self.held_out)
        self._write_pictures(train, queries)

        known, asked = self.labelled_train, self.labelled_held_out
        if not self.has_classes or len(asked) == 0:
            return ""
        if not torch.equal(known.rows, self.train_images.rows):     # some have no label
            train = self._features(encode, known)
        if not torch.equal(asked.rows, self.held_out.rows):
            queries = self._features(encode, asked)
        percent = knn_accuracy(train, known.labels, queries, asked.labels)
        return round(percent, 2)

    def _features(self, encode, images):
        features = image_features(
            encode, images, self.autocast, self.device, mirror=self.mirror
        )
        if not features.isfinite().all():
            raise diverged("features are", "in a preview", self.folder)
        return features

    def _write_pictures(self, train, queries):
        centre = train.mean(0)
        train = F.normalize(train - centre, dim=1)
        queries = F.normalize(queries - centre, dim=1)
        similarity = queries[:10] @ train.T
        nearest = similarity.topk(min(8, len(train))).indices             # (10, 8)
        rows, labels = [], []
        for n, indices in enumerate(nearest):
            image = self.held_out[n:n + 1]
            rows.append(torch.cat([image, self.train_images[indices]]))
            neighbour_labels = self.train_images.labels[indices.numpy()]
            labels.append(np.append(self.held_out.labels[n], neighbour_labels))
        report.write_png(self.folder / "neighbours.png", report.grid(rows, labels))

        _, _, directions = torch.linalg.svd(queries, full_matrices=False)
        points = queries @ directions[:2].T                               # (Q, 2)
        picture = report.scatter(points.numpy(), self.held_out.labels)
        report.write_png(self.folder / "map.png", picture)


class ContrastivePreview:
    """What InfoNCE and BYOL do not show: do the projections collapse, are neighbours alike?

    Writes views.png and the pictures of NeighbourPreview.

    Arguments: data, Images; random_numbers and make_views, the functions of the training
    script; folder, autocast, device and mirror as for NeighbourPreview.
    """

    def __init__(
        self, data, random_numbers, make_views, folder, autocast, device, mirror=False
    ):
        self.folder, self.autocast, self.device = folder, autocast, device
        images = data.subset(HELD_OUT, preview_size(data.shape[1:]))
        numbers = random_numbers(len(images), "preview", 0)
        # Two of the views are enough for the picture and the measures.
        self.views = make_views(images[:], numbers[:, :2])                # (2, B, C, h, w)
        self.neighbours = NeighbourPreview(data, folder, autocast, device, mirror)

    def write_views(self):
        """Show in views.png what the model sees: two views of each of twelve images."""
        if distributed.RANK == 0:
            rows = [views[:12] for views in self.views]
            report.write_png(self.folder / "views.png", report.grid(rows))

    @torch.no_grad()
    def __call__(self, model):
        with self.autocast:
            z = model.project(self.views.to(self.device)).float().cpu()   # (2, B, D)
        return dict(
            alignment=round(float(contrastive.alignment(z)), 4),
            uniformity=round(float(contrastive.uniformity(z[0])), 4),
            effective_rank=round(float(contrastive.effective_rank(z[0])), 2),
            knn=self.neighbours(model.encode),
        )


class AutoencoderPreview:
    """Reconstructions of held-out images, and walks from one image's code to another's.

    Writes reconstructions.png, walks.png and the pictures of NeighbourPreview.

    The model of normalized patches says nothing about the mean and the std of a patch, and
    nothing about visible patches. The third row of reconstructions.png takes these from the
    original image. In walks.png each patch has the mean 0.5 and the std 0.2.

    Arguments: data, Images; corrupt(images, step), the corruption of the training script;
    folder, autocast, device and mirror as for NeighbourPreview; targets, "pixels" or
    "normalized".
    """

    def __init__(
        self, data, corrupt, folder, autocast, device, mirror=False, targets="pixels"
    ):
        self.folder, self.autocast = folder, autocast
        self.normalized = targets == "normalized"
        images = data.subset(HELD_OUT, preview_size(data.shape[1:]))
        self.images = images[:].to(device).float() / 255                  # (B, C, H, W)
        self.corrupted, self.hidden = corrupt(self.images, "preview")
        self.neighbours = NeighbourPreview(data, folder, autocast, device, mirror)

    def chance(self):
        """The squared error of an autoencoder that always shows the mean image.

        With normalized patches it is that of one that always says 0: 1, or a little less if some
        patches are flat.
        """
        if self.normalized:
            targets, _, _ = autoencoder.normalize_patches(self.images)
            return float(targets.square().mean())
        return float((self.images - self.images.mean(0)).square().mean())

    @torch.no_grad()
    def __call__(self, model):
        with self.autocast:
            rebuilt, z = model(self.corrupted)
            start, end = z[:8].float(), z.roll(1, 0)[:8].float()
            walks = []
            for n in range(8):
                walks.append(model.decode(start.lerp(end, n / 7)))        # (8, C, H, W)
        walks = torch.stack(walks, dim=1)                                 # a row for each walk
        error, shown = self._error_and_picture(rebuilt.float(), z)
        if self.normalized:
            walks = 0.5 + 0.2 * walks
        rows = [self.images[:12], self.corrupted[:12], shown[:12]]
        if torch.equal(self.images, self.corrupted):
            rows = [self.images[:12], shown[:12]]
        self._write_picture("reconstructions.png", rows)
        self._write_picture("walks.png", walks)
        return dict(
            held_out=round(float(error), 5),
            sparsity=round(float(autoencoder.sparsity(z.float())), 4),
            correlation=round(float(autoencoder.correlation(z.float())), 4),
            knn=self.neighbours(model.encode),
        )

    def _error_and_picture(self, rebuilt, z):
        """The squared error of the reconstructions (B, C, H, W), and how to show them."""
        if not self.normalized:
            _, error, _ = autoencoder.autoencoder_loss(self.images, rebuilt, z)
            return error, rebuilt
        targets, mean, std = autoencoder.normalize_patches(self.images)
        _, error, _ = autoencoder.autoencoder_loss(targets, rebuilt, z, hidden=self.hidden)
        return error, torch.where(self.hidden, rebuilt * std + mean, self.images)

    def _write_picture(self, name, rows):
        rows = [row.float().cpu() for row in rows]
        report.write_png(self.folder / name, report.grid(rows))


# ---------------------------------------------------------------- texts

class TextPreview:
    """The masked loss of held-out texts, and what the model fills in.

    Prints up to two passages and writes up to six into sentences.json.

    Arguments: texts, Texts with all splits; window, the longest sequence; mask_share;
    folder, of the run; autocast, the context of forward passes; device; fills_in, whether the
    run learns to fill in masked words. Otherwise only the nearest neighbours are looked at.
    """

    def __init__(
        self, texts, window, mask_share, folder, autocast, device, fills_in=True
    ):
        self.folder, self.autocast, self.device = folder, autocast, device
        self.tokenizer = texts.tokenizer
        held_out = texts.select(texts.split == HELD_OUT)
        if len(held_out) == 0:
            print(
                "warning: no text is held out (there are too few, or all are copies of others), "
                "so the held-out loss below comes from training texts"
            )
            held_out = texts.select(texts.split == TRAIN)
        held_out = held_out.split_long(window).sample(512)
        tokens, lengths = held_out.padded(np.arange(len(held_out)))
        self.tokens, self.lengths = torch.from_numpy(tokens), torch.from_numpy(lengths)
        self.inputs, self.targets = transformer.mask_tokens(
            self.tokens, self.lengths, len(texts.tokenizer), mask_share,
            generator(0, "held-out masks", 0),
        )
        if not fills_in:
            self.targets.fill_(transformer.IGNORE_INDEX)
        self.is_masked = self.targets != transformer.IGNORE_INDEX         # (B, T)
        self.masked_targets = self.targets[self.is_masked]                # (M,)
        self.bytes = 0
        for token in self.masked_targets.tolist():
            self.bytes += len(self.tokenizer.bytes_of[token])
        self.labelled_train = self._labelled(texts, TRAIN, 1000)
        self.labelled_held_out = self._labelled(texts, HELD_OUT, 500)
        self.has_classes = has_two_classes(self.labelled_train)

    @staticmethod
    def _labelled(texts, split, most):
        is_labelled = (texts.split == split) & (texts.labels >= 0)
        return texts.select(is_labelled).sample(most)

    @torch.no_grad()
    def __call__(self, model):
        if len(self.masked_targets) == 0:            # then there is nothing to average
            return dict(held_out="", bits_per_byte="", accuracy="", knn=self._knn(model))
        loss, guesses = self._predict(model)
        bits = loss / math.log(2) * len(guesses)
        self._show(guesses)
        return dict(
            held_out=round(loss, 4),
            bits_per_byte=round(bits / self.bytes, 4),
            accuracy=round(accuracy(guesses, self.masked_targets), 2),
            knn=self._knn(model),
        )

    def _predict(self, model):
        """The mean masked loss in nats, and the likeliest token at each position, (M,)."""
        vectors = []
        pieces = zip(self.inputs.split(64), self.lengths.split(64), self.is_masked.split(64))
        loss, guesses = 0.0, []
        with self.autocast:
            for inputs, lengths, is_masked in pieces:
                x = model(inputs.to(self.device), lengths.to(self.device))
                vectors.append(x[is_masked.to(self.device)])
            vectors = torch.cat(vectors)                                  # (M, D)
            # The logits of all positions at once would take a third of a GB.
            for x, targets in zip(vectors.split(1024), self.masked_targets.split(1024)):
                logits = model.token_logits(x).float().cpu()
                count = len(self.masked_targets)
                part = transformer.masked_language_model_loss(logits, targets, count)
                loss += part.item()
                guesses.append(logits.argmax(1))
        return loss, torch.cat(guesses)

    def _knn(self, model):
        train, held_out = self.labelled_train, self.labelled_held_out
        if not self.has_classes or len(held_out) == 0:
            return ""
        features = text_features(model, train, self.autocast, self.device)
        queries = text_features(model, held_out, self.autocast, self.device)
        return round(knn_accuracy(features, train.labels, queries, held_out.labels), 2)

    def _show(self, guesses):
        passages = self.passages(guesses)
        for text, wanted, got in passages[:2]:
            print(f"    {text}")
            print(f"    wanted {', '.join(wanted)} | got {', '.join(got)}", flush=True)
        write_atomically(self.folder / "sentences.json", json.dumps(passages).encode())

    def passages(self, guesses, show=6, length=24):
        """[(the text that the model reads, the original tokens, the model's tokens), ...]

        Tokens are those behind a [MASK]. (Of the tokens that `mask_tokens` chooses, a tenth is
        left as it is and a tenth is replaced at random. These stay in the text.) The passages
        are the beginnings of up to `show` texts with at least `length` tokens, some of them a
        [MASK]. If there are enough, they are seven texts apart.
        """
        guessed = torch.full_like(self.tokens, 0)
        guessed[self.is_masked] = guesses
        is_hidden = self.is_masked & (self.inputs == MASK)                # (B, T)
        long_enough = self.lengths >= length
        is_asked = is_hidden[:, :length].any(1)
        rows = (is_asked & long_enough).nonzero().flatten()
        passages = []
        apart = max(1, min(7, len(rows) // show))
        for row in rows[::apart][:show]:
            hidden = is_hidden[row, :length]
            text = self.inputs[row, :length]
            wanted = self.tokens[row, :length][hidden]
            got = guessed[row, :length][hidden]
            passages.append((
                self.tokenizer.decode(text.tolist()),
                [self.tokenizer.decode([token]) for token in wanted.tolist()],
                [self.tokenizer.decode([token]) for token in got.tolist()],
            ))
        return passages
