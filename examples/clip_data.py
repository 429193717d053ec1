"""Images with captions for examples/clip.py: drawn shapes, or the user's own.

    load_pairs      images, captions and their tokens, for all splits
    Pairs.batch     what a step reads
    Pairs.shuffled  the same with the captions dealt out at random, a control

Of the drawn shapes, some combinations are never captioned: the pictures that show one, and
their captions, are left out of the training. They stay among the held-out and the test images.
"""

import random
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.data.images import Images, load_images
from minissl.data.shapes import (
    COLOURS,
    SHAPES,
    SIZES,
    name_traits,
    shape_data_and_tell,
    write_captions,
)
from minissl.data.splits import HELD_OUT, TEST, TRAIN, fingerprint
from minissl.data.texts import Texts, encode_texts
from minissl.tokenizer import normalise, train_tokenizer
from minissl.training.files import unreadable


VOCABULARY = 1024           # tokens at most: words of captions are few, and rare ones fall apart

# One combination for each class. For five classes the colour is left out in every size, and
# these make up about three quarters of the images that show such a combination.
NEVER_CAPTIONED = [
    ("any", "red", "star"),
    ("large", "blue", "ring"),
    ("any", "green", "circle"),
    ("small", "pink", "square"),
    ("any", "yellow", "cross"),
    ("large", "turquoise", "triangle"),
    ("any", "blue", "frame"),
    ("small", "green", "crescent"),
    ("any", "pink", "bar"),
    ("large", "red", "half disc"),
]


def is_never_captioned(traits):
    """Which rows of traits (n, 4), as of shapes.name_traits, show such a combination: (n,)."""
    shapes, colours, sizes, _ = np.asarray(traits).T
    found = np.zeros(len(traits), bool)
    for size, colour, shape in NEVER_CAPTIONED:
        same = (shapes == SHAPES.index(shape)) & (colours == COLOURS.index(colour))
        if size != "any":
            same = same & (sizes == SIZES.index(size))
        found = found | same
    return found


# ---------------------------------------------------------------- Pairs

@dataclass
class Pairs:
    """N images, each with a caption."""
    images: Images
    captions: np.ndarray             # (N,) of str
    texts: Texts                     # their tokens
    meaning: np.ndarray              # (N,) int64, equal for captions that say the same
    is_new: np.ndarray               # (N,) bool: shows a combination that is never captioned

    def __len__(self):
        return len(self.images)

    def select(self, indices):
        """The pairs at an index array or where a boolean mask is True."""
        return Pairs(
            self.images.select(indices),
            self.captions[indices],
            self.texts.select(indices),
            self.meaning[indices],
            self.is_new[indices],
        )

    def shuffled(self, order):
        """The same images, image n with the caption of image order[n]; order (N,)."""
        return replace(
            self,
            captions=self.captions[order],
            texts=self.texts.select(order),
            meaning=self.meaning[order],
        )

    def with_words_shuffled(self, seed):
        """The same pairs, with the words of each caption in a random order."""
        rng = random.Random(seed)
        captions = []
        for caption in self.captions:
            words = caption.split()
            rng.shuffle(words)
            captions.append(" ".join(words))
        texts = encode_texts(captions, self.texts.tokenizer)
        return replace(self, captions=np.array(captions, dtype=object), texts=texts)

    def batch(self, indices, window, device):
        """Images (B, C, H, W) in [0, 1], tokens (B, T) and lengths (B,), T at most `window`."""
        images = self.images[indices].to(device).float() / 255
        lengths = np.minimum(self.texts.lengths[indices], window)
        tokens, lengths = self.texts.padded(indices, lengths=lengths)
        return images, torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)

    def split(self):
        """The pairs to learn from, those for choices, and those for the test.

        Of own images without labels none are for the test, so those for choices serve twice
        (load_pairs notes it).
        """
        split = self.images.split
        train = self.select((split == TRAIN) & ~self.is_new)
        held_out = self.select(split == HELD_OUT)
        test = self.select(split == TEST)
        if has_no_test(split):
            test = held_out
        return train, held_out, test

    def describe(self):
        """A checksum, by which a run knows its images and their captions."""
        checksum = zlib.crc32("\n".join(self.captions).encode())
        return f"images {fingerprint(self.images)}, captions {checksum:08x}"


def has_no_test(split):
    """Whether too few pairs are for the test: a single one has nothing to be confused with."""
    return (split == TEST).sum() < 2


def load_pairs(data, limit=0, classes=()):
    """Pairs by name ("shapes"), or of the files NAME.npy and NAME.captions.txt.

    Arguments: limit, keep only this many of each split (0: all); classes, the names of the
    labels. The tokenizer learns from the training captions.
    Raises UserError if the files cannot be used.
    """
    if limit == 1:
        raise UserError("--limit 1: a single pair has nothing to be confused with; give at least "
                        "2, or 0 for all")
    if data == "shapes":
        if classes:
            raise UserError("--classes: drawn shapes have their names; leave it out")
        pixels, drawn, split = shape_data_and_tell(limit)
        labels = drawn.labels.numpy()
        images = Images(pixels, torch.arange(len(pixels)), labels, split, SHAPES)
        traits = name_traits(drawn)
        captions = np.array(write_captions(traits), dtype=object)
        _, meaning = np.unique(traits.numpy(), axis=0, return_inverse=True)
        is_new = is_never_captioned(traits)
        if not is_new[split == TEST].any():
            raise UserError(
                f"--limit {limit}: no test image shows a combination that is never captioned; "
                f"give a larger --limit"
            )
    else:
        path = Path(data)
        if path.suffix.lower() != ".npy":
            raise UserError(
                f"--data {data}: expected shapes, or a .npy file with NAME.captions.txt beside it"
            )
        images = load_images(data, limit=limit)
        captions = read_captions(path.with_name(path.stem + ".captions.txt"), len(images.pixels))
        captions = captions[images.rows.numpy()]
        _, meaning = np.unique([normalise(text) for text in captions], return_inverse=True)
        is_new = np.zeros(len(images), bool)
        notes = notes_on_labels(images, path, classes)
        images = replace(images, classes=name_classes(images.classes, classes))
        images = replace(images, notes=[*images.notes, *notes])
    to_read = captions[(images.split == TRAIN) & ~is_new]
    tokenizer = train_tokenizer(to_read.tolist(), VOCABULARY)
    return Pairs(images, captions, encode_texts(captions.tolist(), tokenizer), meaning, is_new)


def notes_on_labels(images, path, names):
    """What own images cannot be measured by, a list of sentences.

    names: the values of --classes.
    """
    notes = []
    if images.classes and not names:
        notes.append(
            f"no zero-shot accuracy, because the {len(images.classes)} classes of "
            f"{path.stem}.labels.npy have no names; give them with --classes"
        )
    if has_no_test(images.split):
        notes.append(
            "only images with labels can be for the test, and there are too few; so the held-out "
            "pairs are also the test"
        )
    return notes


def read_captions(path, n):
    """The captions (n,) of n images, one a line. Raises UserError if the file has others."""
    expected = f"expected a line for each of the {n:,} images, in UTF-8"
    if not path.exists():
        raise UserError(f"{path}: file not found; {expected}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except PermissionError:
        raise unreadable(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {expected}") from None
    if len(lines) != n:
        raise UserError(f"{path}: found {len(lines):,} lines; {expected}")
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"{path}: line {number} is empty; write a caption for each image")
    return np.array(lines, dtype=object)


def name_classes(labels, names):
    """The names of the classes; none if they have no names yet, because prompts need words.

    labels: the classes as NAME.labels.npy numbers them; names: the values of --classes.
    Raises UserError if the number of names differs from the number of classes.
    """
    if names and not labels:
        raise UserError("--classes needs NAME.labels.npy, with the class of each image")
    if names and len(names) != len(labels):
        raise UserError(
            f"--classes: found {len(names)} names; expected {len(labels)}, "
            f"one for each class of NAME.labels.npy, in the order of its numbers"
        )
    return list(names)
