"""What bert_features.py and lightly_features.py share: a timed training, and the table after it."""

import math
import time
from statistics import mean

import finetune
from minissl.evaluation.measurements import print_table


def endless(loader):
    """Yield batches, epoch after epoch."""
    while True:
        yield from loader


def train_for(minutes, loader, train_step, unit, chance):
    """Train until the minutes of wall time are over, and print the loss twenty times.

    train_step(batch, share): makes a step after this share of the time, and returns its loss and
    how many `unit`, such as "tokens", it has seen; chance: the loss of a model that knows nothing.
    Returns a dict of UNIT_per_second, steps, and loss, the mean of the last twentieth of the time.
    """
    seconds = 60 * minutes
    step, seen, losses, next_line = 0, 0, [], 0.05
    begin = time.perf_counter()
    for batch in endless(loader):
        now = time.perf_counter() - begin
        if losses and now >= next_line * seconds:
            loss = mean(losses)
            print(f"step {step:,}: loss {loss:.3f} (chance {chance:.2f}), "
                  f"{seen / now:,.0f} {unit} a second, "
                  f"{max(0, seconds - now) / 60:.1f} min left", flush=True)
            losses = []
            next_line = math.floor(20 * now / seconds + 1) / 20
        if step and now >= seconds:
            return {f"{unit}_per_second": round(seen / now), "steps": step,
                    "loss": round(loss, 3)}
        loss_of_step, count = train_step(batch, now / seconds)
        losses.append(loss_of_step)
        step += 1
        seen += count


def print_probe(task, limit, figures):
    """Print the table of `finetune.py RUN --probe`, and the line `result:` with the figures.

    task: what finetune.measure_table asks for; limit: that of the data; figures: a dict.
    """
    settings = finetune.Settings(run="", probe=True, limit=limit)
    measurements, chance = finetune.measure_table(settings, task)
    print_table(measurements, chance)
    for row in dict.fromkeys(m["labels_a_class"] for m in measurements):
        draws = [m["test_accuracy"] for m in measurements if m["labels_a_class"] == row]
        figures[f"labels_{row}"] = round(mean(draws), 1)
    print("result: " + " ".join(f"{name}={value}" for name, value in figures.items()))
