"""Accuracies that finetune.py measured, grouped and averaged for a table or a figure.

    for condition, rows in by_condition(rows).items():    a table for each condition
        table_of(rows, mean_and_spread_of)                rows of strings

A row is a dict, as evaluation/measurements.py describes it. Its values may be strings,
because a .csv file holds nothing else.
"""

from typing import NamedTuple

import numpy as np


class Condition(NamedTuple):
    """What the rows of one table have in common, as strings.

    data, limit       as in the flags of finetune.py
    step              of the pretraining
    checksum          of the examples, their split and their labels
    mirrored          whether features are averaged over the mirror image: yes or no; of
                      texts, nothing
    """
    data: str
    limit: str
    step: str
    checksum: str
    mirrored: str


def condition_of(row):
    return Condition(*(str(row[name]) for name in Condition._fields))


def by_condition(rows):
    """{condition: its rows}, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(condition_of(row), []).append(row)
    return groups


def of_same_data(conditions, condition):
    """Those of the conditions with which this one has its data and its limit in common.

    Their checksums are equal if the content of the data is. At another limit it is another
    part of the data, so these checksums say nothing.
    """
    return [
        other for other in conditions
        if (other.data, other.limit) == (condition.data, condition.limit)
    ]


def by_cell(rows):
    """{(labels a class, method): its rows}, one for each draw of labels."""
    cells = {}
    for row in rows:
        cells.setdefault((row["labels_a_class"], row["method"]), []).append(row)
    return cells


def labels_and_methods(cells):
    """The labels a class and the methods of `by_cell`, each once, in their order."""
    labels = list(dict.fromkeys(label for label, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    return labels, methods


def accuracies_of(rows):
    """The test accuracy of each row, in %. Raises ValueError if one is not in 0 to 100."""
    accuracies = [float(row["test_accuracy"]) for row in rows]
    for accuracy in accuracies:
        if not 0 <= accuracy <= 100:
            raise ValueError(f"a test accuracy of {accuracy} %")
    return accuracies


def mean_and_std(values):
    """The mean, and the sample standard deviation. A single value has none: None.

    >>> mean, std = mean_and_std([20, 30])
    >>> print(f"{mean:.1f} {std:.1f}")
    25.0 7.1
    """
    if len(values) == 1:
        return values[0], None
    return np.mean(values), np.std(values, ddof=1)


def mean_and_spread(values):
    """
    >>> mean_and_spread([20, 30]), mean_and_spread([40])
    ('25.0 ± 7.1', '40.0')
    """
    mean, std = mean_and_std(values)
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def mean_and_spread_of(rows):
    """The text in a cell of a table."""
    return mean_and_spread(accuracies_of(rows))


def table_of(rows, show):
    """The rows of one condition as a table: a list of lists of strings.

    Its first line holds the names of the columns: labels a class, then the methods.
    show(rows of a cell) returns the text of the cell. A cell that has no row is empty.
    """
    cells = by_cell(rows)
    labels, methods = labels_and_methods(cells)
    table = [["labels a class", *methods]]
    for label in labels:
        line = [label]
        for method in methods:
            cell = cells.get((label, method))
            line.append(show(cell) if cell else "")
        table.append(line)
    return table
