"""The measurements of finetune.py: printed as a table, and kept in a .csv file.

A measurement is a dict of

    labels_a_class    such as "10", or "all"
    method            the column of the table
    seed              of the draw of labels and of the training
    test_accuracy     in %
    seconds           to fit this draw, without the choices
    data, limit, step, checksum, mirrored
                      the condition, see Condition in training/accuracies.py

A row of the table has several, one for each draw. In the row "all" a column has two if its
training is random, and otherwise one. The file has a table for each condition.
"""

import csv
import math

import numpy as np

from minissl import UserError
from minissl.evaluation import load
from minissl.training.accuracies import (
    Condition,
    accuracies_of,
    by_condition,
    condition_of,
    mean_and_spread_of,
    of_same_data,
    table_of,
)
from minissl.training.files import read_csv, write_csv


COLUMNS = ("labels_a_class", "method", "seed", "test_accuracy", "seconds", *Condition._fields)


# ---------------------------------------------------------------- printed

def print_table(measurements, commonest):
    """Print the mean and the standard deviation over draws, and the mean seconds of a draw."""
    print(f"\ntest accuracy in %, mean ± std over draws of labels (row \"all\": over trainings); "
          f"commonest class {commonest:.1f}\n"
          f"in brackets: seconds of the fit alone, without the columns to the left, and without "
          f"encoding, choices and predictions")
    table = table_of(measurements, accuracy_and_seconds)
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        print("  ".join(cells), flush=True)


def accuracy_and_seconds(draws):
    """The text in a cell of the printed table."""
    seconds = np.mean([draw["seconds"] for draw in draws])
    return f"{mean_and_spread_of(draws)} ({seconds:.0f})"


# ---------------------------------------------------------------- kept in a file

def add_measurements(path, new, shared):
    """Add measurements to finetune.csv or probe.csv, and replace those that they repeat.

    new: measurements that lack the fields of Condition; shared: these fields, a dict.
    Returns all rows of this condition, and how many rows are outdated by it: those of the
    content that the data had before.
    """
    new = [measurement | shared for measurement in new]
    condition = condition_of(shared)
    old = read_measurements(path)       # another process may have added rows in the meantime
    for row in old:
        if load.is_same_source(row["data"], condition.data):
            row["data"] = condition.data        # one spelling of a path
    outdated = count_outdated(old, condition)
    rows = merge_measurements(old, new)
    write_csv(path, rows)
    return by_condition(rows)[condition], outdated


def count_outdated(old, condition):
    """How many old rows are of the newest content in the file, if `condition` has another.

    0 if the newest rows already have this content, as from the second row of a table on. (Data
    can also return to a content that has older rows.)
    """
    comparable = of_same_data([condition_of(row) for row in old], condition)
    if not comparable:
        return 0
    newest = comparable[-1].checksum
    if newest == condition.checksum:
        return 0
    return sum(other.checksum == newest for other in comparable)


def merge_measurements(old, new):
    """`old` without what `new` measured again, and `new`, as one list of dicts.

    A measurement is replaced if labels a class, method and condition agree. The rows of the
    condition of `new` stand at the end, sorted by labels a class.
    """
    condition = condition_of(new[0])
    measured_again = {(row["labels_a_class"], row["method"]) for row in new}
    others, same = [], []
    for row in old:
        if condition_of(row) != condition:
            others.append(row)
        elif (row["labels_a_class"], row["method"]) not in measured_again:
            same.append(row)
    return others + sorted(same + new, key=sort_key)


def sort_key(row):
    """Where a row stands: its labels a class as a number. "all" is the last."""
    if row["labels_a_class"] == "all":
        return float("inf")
    return int(row["labels_a_class"])


def read_measurements(path):
    """The rows of finetune.csv or probe.csv; none if there is no such file.

    Raises UserError if the file is damaged, for example by a spreadsheet, or if another
    version of minissl wrote it.
    """
    if not path.exists():
        return []
    try:
        rows = read_csv(path)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): move it away, and start "
                        f"again") from None
    missing = [name for name in COLUMNS if rows and name not in rows[0]]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}: it is damaged, or another version of "
                        f"minissl wrote it; move it away, and start again")
    for n, row in enumerate(rows, 1):
        try:
            check_measurement(row)
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged: correct its row {n} (behind the names of the "
                            f"columns) or move the file away, and start again") from None
    return rows


def check_measurement(row):
    """Raise ValueError or TypeError unless a row of the file is whole."""
    if None in row or None in row.values():
        raise ValueError("too many values, or too few")
    sort_key(row)                       # this and the next raise ValueError
    accuracies_of([row])
    for name in ("seed", "limit", "step"):
        int(row[name])
    if not math.isfinite(float(row["seconds"])):
        raise ValueError("seconds")
