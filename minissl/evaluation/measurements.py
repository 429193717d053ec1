"""The measurements of finetune.py: printed as a table, and kept in a .csv file.

A measurement is a dict of

    labels_a_class    such as "10", or "all"
    method            the column of the table
    seed              of the draw of labels and of the training
    test_accuracy     in %
    seconds           to fit this draw, without the choices
    data, limit       what was measured, as in the flags of these names
    step              of the pretraining
    checksum          of the examples, their split and their labels

With --no-flip, this flag stands behind the name of the data, because the features differ.

A row of the table has several, one for each draw. In the row "all" a column has two if its
training is random, and otherwise one.

Read next: ../../finetune.py, or load.py, which opens a run.
"""

import csv
import math

import numpy as np

from minissl import UserError
from minissl.evaluation import load
from minissl.training.files import read_csv, write_csv
from minissl.training.report import mean_and_spread


def print_table(measurements, chance):
    """Print the mean and the standard deviation over draws, and the mean seconds of a draw."""
    print(f"\ntest accuracy in %, mean ± std over draws of labels (row \"all\": over trainings); "
          f"chance {chance:.1f}\n"
          f"in brackets: seconds to fit one draw, without the work of the columns to the left")
    methods = list(dict.fromkeys(m["method"] for m in measurements))
    lines = [["labels a class", *methods]]
    for row in dict.fromkeys(m["labels_a_class"] for m in measurements):
        line = [row]
        for method in methods:
            draws = [m for m in measurements
                     if m["labels_a_class"] == row and m["method"] == method]
            accuracies = [draw["test_accuracy"] for draw in draws]
            seconds = np.mean([draw["seconds"] for draw in draws])
            line.append(f"{mean_and_spread(accuracies)} ({seconds:.0f})")
        lines.append(line)
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        print("  ".join(cells), flush=True)


SAME_CONDITION = ("data", "limit", "step", "checksum")
SAME_MEASUREMENT = ("labels_a_class", "method", *SAME_CONDITION)


def add_measurements(path, new, source):
    """Add measurements to a .csv file. Returns how many old rows were of other content.

    path: finetune.csv or probe.csv; source: a dict of data, limit, step and checksum, which
    every new measurement gets.
    """
    new = [measurement | source for measurement in new]
    old = read_measurements(path)       # another process may have added rows in the meantime
    changed = rename_other_data(old, source)
    write_csv(path, merge_measurements(old, new))
    return changed


def merge_measurements(old, new):
    """`old` without what `new` measured again, and `new`, as one list of dicts.

    A measurement is replaced if it agrees in all of SAME_MEASUREMENT. The rows of the condition
    of `new` stand at the end, sorted by labels a class.
    """
    measured_again = [values_of(row, SAME_MEASUREMENT) for row in new]
    condition = values_of(new[0], SAME_CONDITION)
    others, same = [], []
    for row in old:
        if values_of(row, SAME_CONDITION) != condition:
            others.append(row)
        elif values_of(row, SAME_MEASUREMENT) not in measured_again:
            same.append(row)
    return others + sorted(same + new, key=sort_key)


def rename_other_data(old, source):
    """Mark the old rows whose data has the name of `source`, but other content.

    The page and the figure know data by its name, so a marked row has "(other content, checksum
    ...)" behind the name. It loses this mark when the data has its old content again. Checksums
    can be compared only at the same --limit, so at another one the mark stays as it is.
    old: rows of finetune.csv, which are changed; source: a dict of data, limit and checksum.
    Returns the number of rows that are newly marked.
    """
    changed = 0
    for row in old:
        suffix = f" (other content, checksum {row['checksum'] or 'unknown'})"
        name = row["data"].removesuffix(suffix)
        if not load.is_same_source(name, source["data"]):
            continue
        was_other = name != row["data"]
        is_other = was_other
        if row["limit"] == str(source["limit"]):
            is_other = row["checksum"] != source["checksum"]
        row["data"] = source["data"]            # one spelling of a path
        if is_other:
            row["data"] += suffix
        if is_other and not was_other:
            changed += 1
    return changed


def values_of(row, names):
    """The values of a row as strings, because a .csv holds nothing else."""
    return [str(row[name]) for name in names]


def sort_key(row):
    """Where a row stands: its labels a class as a number. "all" is the last."""
    if row["labels_a_class"] == "all":
        return float("inf")
    return int(row["labels_a_class"])


def read_measurements(path):
    """The rows of finetune.csv or probe.csv; none if there is no such file.

    Raises UserError if the file is damaged, for example by a spreadsheet.
    """
    if not path.exists():
        return []
    line = 1
    try:
        rows = read_csv(path)
        for line, row in enumerate(rows, 2):    # noqa: B007, the error names the line
            row.setdefault("checksum", "")      # the first tables had no checksum
            check_measurement(row)
        return rows
    except (ValueError, KeyError, TypeError, csv.Error):
        raise UserError(f"{path} is damaged in line {line}: correct it or move it away, and "
                        f"start again") from None


def check_measurement(row):
    """Raise ValueError, KeyError or TypeError unless a row of the file is whole."""
    sort_key(row)
    values_of(row, SAME_MEASUREMENT)
    for name in ("seed", "limit", "step"):
        int(row[name])
    for name in ("test_accuracy", "seconds"):
        if not math.isfinite(float(row[name])):
            raise ValueError(name)
    if None in row or None in row.values():
        raise ValueError("too many values, or too few")
