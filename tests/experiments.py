"""What would happen if? Small trainings with one thing changed, several seeds each, in one table.

    python tests/experiments.py                          what there is
    python tests/experiments.py temperature --seeds 3    one question, or several names
    python tests/experiments.py collapse --arms "BYOL" "no predictor" --flags --steps 30

An arm is flags of the script, or a change of the code as you would make it in a fork. The
trainings are small: 10,000 images or 20,000 reviews, and about a minute each. So the differences
between the arms count, and the figures themselves do not.

Printed for each arm: the mean and the standard deviation, over pretraining seeds, of a linear
probe's test accuracy at 10, 100 and 500 labels a class, and of some columns of the last row of
the log. EXPERIMENTS.md has the results.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from planted_faults import ROOT, Edit, apply, copy_project


LABELS = ["10", "100", "500"]           # a class


@dataclass
class Arm:
    """One of the trainings that an experiment compares."""
    name: str
    flags: list = field(default_factory=list)       # of the script, after those of the command
    edits: list = field(default_factory=list)       # changes of the code


@dataclass
class Experiment:
    """A question, and the trainings that answer it."""
    name: str
    question: str
    command: list                       # script and flags that all arms share
    columns: list                       # of the log's last row, to be shown
    arms: list


# ---------------------------------------------------------------- the commands

IMAGES = ["--data", "cifar10", "--limit", "10000", "--width", "32", "--steps", "300",
          "--evaluate-every", "300"]
SIMCLR = ["train_contrastive.py", *IMAGES, "--views", "2", "--batch-size", "256"]
BYOL = [*SIMCLR, "--method", "byol"]
AUTOENCODER = ["train_ae.py", *IMAGES]

REVIEWS = ["train_mlm.py", "--data", "imdb", "--limit", "20000"]
BOTH_TERMS = [*REVIEWS, "--steps", "800", "--embedding-steps", "300", "--evaluate-every", "800"]
MASKED_ALONE = [*REVIEWS, "--steps", "500", "--embedding-steps", "0", "--document-weight", "0",
                "--evaluate-every", "500"]


# ---------------------------------------------------------------- the changes of the code

TRANSFORMER = "minissl/transformer.py"
CONTRASTIVE = "minissl/contrastive.py"

ADAMW = Edit(
    "minissl/optim.py", "muon_and_adam",
    right="Muon(matrices, lr, weight_decay=weight_decay, precision=precision)",
    wrong="torch.optim.AdamW([dict(params=matrices)], weight_decay=weight_decay)",
)
SELF_LEFT_IN = Edit(
    CONTRASTIVE, "info_nce",
    right='s.masked_fill(itself, float("-inf")).logsumexp(1)',
    wrong="s.logsumexp(1)",
)
SELF_SUBTRACTED = Edit(
    CONTRASTIVE, "info_nce",
    right='s.masked_fill(itself, float("-inf")).logsumexp(1)',
    wrong="(s.exp().sum(1) - s.detach().diagonal().exp()).log()",
)
NO_FINAL_NORM = Edit(
    CONTRASTIVE, "BYOL.__init__",
    right="self.projection_head.append(nn.BatchNorm1d(columns, affine=False))",
    wrong="pass",
)
NO_PREDICTOR = Edit(
    CONTRASTIVE, "BYOL.forward",
    right="self.predictor(projections.flatten(0, 1)).view_as(projections)",
    wrong="projections",
)
NO_STOP_GRADIENT = Edit(
    CONTRASTIVE, "byol_loss",
    right="targets.detach()",
    wrong="targets",
)
NO_TARGET = Edit(
    CONTRASTIVE, "BYOL.forward",
    right="self.project_by_target(views)",
    wrong="self.project(views)",
)
ALWAYS_MASK = Edit(
    TRANSFORMER, "mask_tokens",
    right="torch.where(kind < 0.8, MASK, hidden)",
    wrong="torch.where(kind < 2, MASK, hidden)",
)
NO_MASK = Edit(
    TRANSFORMER, "mask_tokens",
    right="torch.where(kind < 0.8, MASK, hidden)",
    wrong="original",
)
ALL_LOGITS = Edit(
    "train_mlm.py", "masked_and_document_loss",
    right="model.token_logits(h[is_masked])",
    wrong="model.token_logits(h)[is_masked]",
)


# ---------------------------------------------------------------- the experiments

REGULARIZERS = [Arm("none")]
for regularizer in ("sparse", "decorrelated"):
    for beta in ("0.001", "0.01", "0.1"):
        flags = ["--regularizer", regularizer, "--beta", beta]
        REGULARIZERS.append(Arm(f"{regularizer} {beta}", flags))

EXPERIMENTS = [
    Experiment("temperature", "which temperature suits InfoNCE", SIMCLR,
               ["effective_rank", "uniformity"], [
                   Arm("0.05", ["--temperature", "0.05"]),
                   Arm("0.15"),
                   Arm("0.5", ["--temperature", "0.5"]),
                   Arm("1.0", ["--temperature", "1"]),
               ]),
    Experiment("batch", "which batch size, at the same number of images", SIMCLR, ["seconds"], [
        Arm("64", ["--batch-size", "64", "--steps", "1200"]),
        Arm("256"),
        Arm("1024", ["--batch-size", "1024", "--steps", "75"]),
    ]),
    Experiment("views", "which part of the augmentation pays", SIMCLR, ["effective_rank"], [
        Arm("all"),
        Arm("no crop", ["--crop", "1"]),
        Arm("no colours", ["--jitter", "0", "--hue", "0", "--grey", "0"]),
        Arm("no grey", ["--grey", "0"]),
        Arm("no flip", ["--no-flip"]),
        Arm("whole size", ["--view-size", "32"]),
    ]),
    Experiment("budget", "more pretraining or more labels", SIMCLR, ["seconds"], [
        Arm("75 steps", ["--steps", "75"]),
        Arm("300"),
        Arm("1,200", ["--steps", "1200"]),
    ]),
    Experiment("muon", "Muon or AdamW, on the same tensors", SIMCLR, ["loss"], [
        Arm("Muon 0.02"),
        Arm("AdamW 0.001", ["--learning-rate", "0.001"], [ADAMW]),
        Arm("AdamW 0.003", ["--learning-rate", "0.003"], [ADAMW]),
    ]),
    Experiment("itself", "a view's similarity with itself left in the sum", SIMCLR, ["loss"], [
        Arm("left out"),
        Arm("left in", edits=[SELF_LEFT_IN]),
        Arm("subtracted, its gradient kept", edits=[SELF_SUBTRACTED]),
    ]),
    Experiment("collapse", "what keeps BYOL from collapsing", BYOL,
               ["loss", "effective_rank", "alignment"], [
                   Arm("BYOL"),
                   Arm("no norm after the projection", edits=[NO_FINAL_NORM]),
                   Arm("no predictor", edits=[NO_PREDICTOR]),
                   Arm("no target", edits=[NO_TARGET]),
                   Arm("no stop-gradient, no target", edits=[NO_STOP_GRADIENT, NO_TARGET]),
               ]),
    Experiment("corruption", "denoising and masking, or the plain autoencoder", AUTOENCODER,
               ["held_out"], [
                   Arm("plain"),
                   Arm("noise 0.2", ["--noise", "0.2"]),
                   Arm("masked 0.3", ["--masked", "0.3"]),
                   Arm("masked 0.6", ["--masked", "0.6"]),
               ]),
    Experiment("beta", "which R(z), and how much of it", AUTOENCODER,
               ["held_out", "sparsity", "correlation"], REGULARIZERS),
    Experiment("share", "which share of the tokens to mask", MASKED_ALONE,
               ["held_out", "accuracy"], [
                   Arm("0.15"),
                   Arm("0.3", ["--mask-share", "0.3"]),
                   Arm("0.5", ["--mask-share", "0.5"]),
               ]),
    Experiment("replacement", "what stands in place of a masked token", MASKED_ALONE,
               ["held_out", "accuracy"], [
                   Arm("80/10/10"),
                   Arm("always [MASK]", edits=[ALWAYS_MASK]),
                   Arm("the token itself", edits=[NO_MASK]),
               ]),
    Experiment("logits", "logits at all positions", MASKED_ALONE, ["seconds"], [
        Arm("masked positions"),
        Arm("all positions", edits=[ALL_LOGITS]),
    ]),
    Experiment("terms", "which loss teaches a text encoder", BOTH_TERMS, ["held_out"], [
        Arm("both"),
        Arm("masked loss alone", ["--document-weight", "0", "--embedding-steps", "0"]),
        Arm("document loss alone", ["--masked-weight", "0"]),
    ]),
]


# ---------------------------------------------------------------- training and measuring

def start(folder, *command):
    """Run a script of the code in a folder. Ends the program if the script fails."""
    command = [str(word) for word in command]
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def train_and_probe(code, command, run):
    """Train a run, then measure its features.

    Arguments: code, the folder of a copy of the project; command, of the training; run, the
    folder of the run.
    Returns the probe's accuracy for each of LABELS, and the last row of the log.
    """
    start(code, *command, "--run", run)
    start(code, "finetune.py", run, "--probe", "--labels", *LABELS, "--seeds", 3,
          "--limit", 10_000)
    draws = read_table(run / "probe.csv")
    accuracies = []
    for labels in LABELS:
        of_row = [float(draw["test_accuracy"]) for draw in draws
                  if draw["labels_a_class"] == labels]
        accuracies.append(np.mean(of_row))
    return accuracies, read_table(run / "metrics.csv")[-1]


def measure_arm(experiment, arm, options, folder, known):
    """The figures of an arm, a list for each seed.

    known: {what was trained: its results}, so that an arm of several questions is trained once.
    """
    code = copy_project(folder / "code")
    apply(code, arm.edits)
    titles = probe_titles() + experiment.columns
    figures = []
    for seed in range(options.seeds):
        command = [*experiment.command, *arm.flags, *options.flags, "--seed", seed]
        key = str((command, arm.edits))
        if key not in known:
            command += ["--data-dir", options.data_dir.resolve()]
            known[key] = train_and_probe(code, command, folder / f"run {seed}")
        accuracies, last = known[key]
        of_seed = [*accuracies]
        for column in experiment.columns:
            of_seed.append(float(last[column]))
        figures.append(of_seed)
        shown = [f"{title} {value:.4g}" for title, value in zip(titles, of_seed)]
        print(f"  {arm.name}, seed {seed}: {', '.join(shown)}", flush=True)
    return figures


def probe_titles():
    return [f"probe {labels}" for labels in LABELS]


def answer(experiment, options, known):
    """Train the arms of an experiment and print the table."""
    command = " ".join(["python", *experiment.command, *options.flags])
    print(f"{experiment.name}: {experiment.question}. {command}", flush=True)
    table = [["", *probe_titles(), *experiment.columns]]
    for arm in experiment.arms:
        if options.arms and arm.name not in options.arms:
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = measure_arm(experiment, arm, options, Path(folder), known)
        means = np.mean(figures, axis=0)
        stds = np.zeros(len(means))
        if len(figures) > 1:
            stds = np.std(figures, axis=0, ddof=1)
        cells = [f"{mean:.4g} ± {std:.2g}" for mean, std in zip(means, stds)]
        table.append([arm.name, *cells])
    print(f"mean ± std of {options.seeds} seeds")
    print_table(table)


def print_table(table):
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the experiments")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining runs of each arm")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these arms")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data",
                        help="the folder of the downloads")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="for a trial: all that follows goes to the training script")
    options = parser.parse_args()
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in options.names:
        if name not in by_name:
            parser.error(f"there is no experiment {name}; there are {', '.join(by_name)}")
    if not options.names:
        for experiment in EXPERIMENTS:
            arms = ", ".join(arm.name for arm in experiment.arms)
            print(f"{experiment.name:12}{experiment.question}: {arms}")
    known = {}
    for name in options.names:
        answer(by_name[name], options, known)


if __name__ == "__main__":
    main()
