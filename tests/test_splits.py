"""Splits: what is for training, for choices and for the test, and what is dropped."""

import numpy as np
import pytest

from minissl.data.splits import (
    HELD_OUT,
    TEST,
    TRAIN,
    drop_duplicates,
    fingerprint,
    incomplete_classes,
    small_classes,
    split_blocks,
)


def sizes(split):
    return np.bincount(split, minlength=3).tolist()


def test_a_class_is_split_in_blocks_of_seven_one_and_two_tenths():
    for n in range(10, 300):
        split = split_blocks(np.zeros(n, int))
        first_held_out, first_test = round(n * (0.9 - 0.2)), round(n * 0.8)
        assert split.tolist() == (
            [TRAIN] * first_held_out
            + [HELD_OUT] * (first_test - first_held_out)
            + [TEST] * (n - first_test)
        )


@pytest.mark.parametrize("n, expected", [
    (1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (5, [3, 1, 1]),
    (6, [4, 1, 1]), (7, [5, 1, 1]), (8, [5, 1, 2]), (9, [6, 1, 2]), (10, [7, 1, 2]),
])
def test_a_class_of_three_has_an_example_in_each_split(n, expected):
    split = split_blocks(np.full(n, 4))
    assert sizes(split) == expected
    assert (np.diff(split.astype(int)) >= 0).all()               # in blocks


def test_classes_are_split_each_by_itself_wherever_they_lie():
    labels = np.array([0, 1] * 10 + [2])
    split = split_blocks(labels)
    for label in (0, 1):
        assert split[labels == label].tolist() == [TRAIN] * 7 + [HELD_OUT] + [TEST] * 2
    assert split[-1] == TRAIN


def test_examples_without_a_label_are_never_tested():
    assert sizes(split_blocks(np.full(100, -1))) == [90, 10, 0]
    assert sizes(split_blocks(np.array([-1, -1]))) == [2, 0, 0]


def test_classes_of_one_or_two_examples_are_named():
    labels = np.array([0, 1, 1, 2, 2, 2, -1, -1])
    assert small_classes(labels, ["one", "two", "three"]) == ["one", "two"]
    assert small_classes(np.array([], int), []) == []


def test_a_class_that_cannot_be_trained_or_tested_is_named():
    split = np.array([TRAIN, HELD_OUT, TEST, HELD_OUT, TEST, TRAIN, TEST, TRAIN, HELD_OUT])
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3])
    names = ["whole", "no training", "no choices", "no test", "nothing"]
    assert incomplete_classes(split, labels, names) == ["no training", "no test", "nothing"]


def test_a_duplicate_is_kept_where_it_is_needed_most():
    split = np.array(
        [TRAIN, TEST, TEST, HELD_OUT, TRAIN, TRAIN, TRAIN, TRAIN, HELD_OUT], np.uint8
    )
    labels = np.array([-1, 0, 0, 0, -1, 0, 1, 0, -1])
    hashes = np.array([7, 7, 7, 8, 9, 9, 8, 6, 6], np.uint64)
    assert drop_duplicates(hashes, split, labels).tolist() == [
        False, True, True, True, False, True, False, False, True
    ]


def test_a_fingerprint_changes_with_each_example_and_the_split():
    class Examples(list):
        split = np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), [6, 2, 2])

    data = np.arange(20, dtype=np.uint8).reshape(10, 2)
    original = fingerprint(Examples(data))
    assert fingerprint(Examples(data.copy())) == original
    of_data, of_split = original.split("-")

    seen = {of_data}
    for n in range(10):
        changed = data.copy()
        changed[n] += 100
        first, second = fingerprint(Examples(changed)).split("-")
        assert second == of_split
        seen.add(first)
    assert len(seen) == 11

    other = Examples(data)
    other.split = other.split[::-1]
    first, second = fingerprint(other).split("-")
    assert first == of_data and second != of_split
