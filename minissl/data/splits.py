"""Splits: which examples are for training, which for choices, and which for the test."""

import zlib

import numpy as np


TRAIN, HELD_OUT, TEST = 0, 1, 2
SMALLEST_CLASS = 3        # a class needs one example for each split


def evenly_spaced(n, most):
    """Return the indices of at most `most` of n examples, evenly spaced.

    >>> evenly_spaced(10, 4).tolist(), evenly_spaced(2, 4).tolist()
    ([0, 3, 6, 9], [0, 1])
    """
    return np.linspace(0, n - 1, min(most, n)).astype(int)


def limit_splits(split, most):
    """Return the indices of at most `most` examples of each split, evenly spaced, split by split.

    >>> limit_splits(np.array([TRAIN, TEST, TRAIN, TRAIN, HELD_OUT]), 2).tolist()
    [0, 3, 4, 1]
    """
    indices = []
    for part in (TRAIN, HELD_OUT, TEST):
        of_part = np.flatnonzero(split == part)
        indices.append(of_part[evenly_spaced(len(of_part), most)])
    return np.concatenate(indices)


def fingerprint(data):
    """Return 16 hex digits that identify data and its split.

    The first eight come from at most 1,000 evenly spaced examples, so a change elsewhere is not
    noticed. The last eight come from the split of all examples. So a change of the examples can
    be told from a change of the split. Labels count only through the split.
    """
    checksum = 0
    for i in evenly_spaced(len(data), 1000):
        example = np.ascontiguousarray(data[int(i)])
        checksum = zlib.crc32(example, checksum)
    checksum_of_split = zlib.crc32(np.ascontiguousarray(data.split))
    return f"{checksum:08x}-{checksum_of_split:08x}"


def split_blocks(labels):
    """Return the split (N,) uint8 of examples whose labels (N,) are given; -1 is no label.

    Of each class, in the order of the files, the last fifth is for the test and the tenth
    before it is held out. A class of at least three examples has at least one in each split.
    A class of one or two examples is for training only; see small_classes.
    Examples without a label cannot test anything. Only their last tenth is held out, to measure
    the loss on.

    >>> split_blocks(np.array([0] * 10 + [-1] * 10)).tolist()
    [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    >>> split_blocks(np.array([0, 0, 0, 1, 1])).tolist()
    [0, 1, 2, 0, 0]
    """
    split = np.full(len(labels), TRAIN, np.uint8)
    for label in np.unique(labels):
        examples = np.flatnonzero(labels == label)
        n = len(examples)
        if label < 0:
            split[examples[round(n * 0.9):]] = HELD_OUT
        elif n >= SMALLEST_CLASS:
            first_test = round(n * 0.8)
            first_held_out = min(round(n * 0.7), first_test - 1)
            split[examples[first_held_out:]] = HELD_OUT
            split[examples[first_test:]] = TEST
    return split


def small_classes(labels, classes):
    """Return the names of the classes that split_blocks cannot divide: fewer than three examples.

    Arguments: labels (N,), -1 for none; classes, label -> name.

    >>> small_classes(np.array([0, 0, 1, 1, 1, -1]), ["cat", "dog"])
    ['cat']
    """
    sizes = np.bincount(labels[labels >= 0], minlength=len(classes))
    return [name for name, size in zip(classes, sizes) if size < SMALLEST_CLASS]


def incomplete_classes(split, labels, classes):
    """Return the names of the classes without an example to train on, or to test on.

    Small classes are incomplete, and so is a class whose only test example was dropped. A
    class without a held-out example is complete: the choices are made on the others.

    Arguments: split (N,); labels (N,), -1 for none; classes, label -> name.

    >>> split = np.array([TRAIN, TEST, TRAIN, HELD_OUT])
    >>> incomplete_classes(split, np.array([0, 0, 1, 1]), ["cat", "dog"])
    ['dog']
    """
    names = []
    for label, name in enumerate(classes):
        present = split[labels == label]
        if TRAIN not in present or TEST not in present:
            names.append(name)
    return names


def drop_duplicates(hashes, split, labels):
    """Return a mask (N,) that is True for the examples to keep.

    Every test example is kept. Of any other example that occurs several times one copy is
    kept, in the first of: test, held out, training with a label, training without a label.
    So no example of the test is trained on.

    Arguments: hashes (N,), equal for equal examples; split (N,); labels (N,), -1 for none.

    >>> hashes = np.array([7, 7, 8, 8])
    >>> drop_duplicates(hashes, np.array([TRAIN, TEST, TRAIN, TRAIN]), np.array([0, 0, -1, 0]))
    array([False,  True, False,  True])
    """
    # Sort by split, TEST first, then by whether a label is missing. np.unique then returns the
    # first position of each hash in this order.
    order = np.lexsort((labels < 0, -split.astype(int)))
    _, first_positions = np.unique(hashes[order], return_index=True)
    keep = split == TEST
    keep[order[first_positions]] = True
    return keep
