"""What would happen if? Small trainings with one thing changed, several seeds each, in one table.

    python tests/experiments.py                                 what there is
    python tests/experiments.py temperature --seeds 3           one question; several names ask one after the other

An arm is flags, or a change in a copy of the code as a fork would make it: a file, what stands there, what is put
there. The sizes are small, so the differences count and the figures do not: 10,000 images or 20,000 reviews, about a
minute a run. Printed: for each arm the mean and standard deviation over pretraining seeds of a linear probe's test
accuracy at 10, 100 and 500 labels a class, and of some columns of the log's last row. What came out: EXPERIMENTS.md.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from planted_faults import ROOT, change, copy_of_the_code

T, C, V, M = "minissl/transformer.py", "minissl/contrastive.py", "train_contrastive.py", "train_mlm.py"

CONTRASTIVE = "train_contrastive.py --data cifar10 --limit 10000 --width 32 --steps 300 --evaluate-every 300".split()
BYOL = [*CONTRASTIVE, "--method", "byol"]
AUTOENCODER = "train_ae.py --data cifar10 --limit 10000 --width 32 --steps 300 --evaluate-every 300".split()
TEXT = ("train_mlm.py --data imdb --limit 20000 --steps 800 --embedding-steps 300 --evaluate-every 800").split()
MASKED = ("train_mlm.py --data imdb --limit 20000 --steps 500 --embedding-steps 0 --document-weight 0 "
          "--evaluate-every 500").split()

ADAMW = (V, "[Muon(matrices, settings.learning_rate, weight_decay=0.02, precision=precision),",
         "[torch.optim.AdamW([dict(params=matrices)], weight_decay=0.02),")
ALL_LOGITS = (M, "model.token_logits(hidden), ",
              "model.token_logits(x.flatten(0, 1))[(positions[here] - low).to(device)], ")

LABELS = ["10", "100", "500"]
EXPERIMENTS = {     # name: (the question, the command, columns of the log, {arm: flags and changes})
    "temperature": ("InfoNCE's temperature", CONTRASTIVE, ["effective_rank", "uniformity"],
                    {"0.05": ["--temperature", "0.05"], "0.15": [], "0.5": ["--temperature", "0.5"],
                     "1.0": ["--temperature", "1"]}),
    "batch": ("the batch, at the same number of images", CONTRASTIVE, ["seconds"],
              {"64": ["--batch-size", "64", "--steps", "1200"], "256": [],
               "1024": ["--batch-size", "1024", "--steps", "75"]}),
    "views": ("which part of the augmentation pays", CONTRASTIVE, ["effective_rank"],
              {"all": [], "no crop": ["--crop", "1"], "no colours": ["--jitter", "0", "--hue", "0", "--grey", "0"],
               "no grey": ["--grey", "0"], "no flip": ["--no-flip"], "whole size": ["--view-size", "32"]}),
    "budget": ("more pretraining against more labels", CONTRASTIVE, ["seconds"],
               {"75 steps": ["--steps", "75"], "300": [], "1,200": ["--steps", "1200"]}),
    "muon": ("Muon against AdamW on the same tensors", CONTRASTIVE, ["loss"],
             {"Muon 0.02": [], "AdamW 0.001": [ADAMW, "--learning-rate", "0.001"],
              "AdamW 0.003": [ADAMW, "--learning-rate", "0.003"]}),
    "itself": ("the similarity of a view with itself left in the sum", CONTRASTIVE, ["loss"],
               {"left out": [], "left in": [(C, 's.masked_fill(itself, float("-inf")).logsumexp(1)', "s.logsumexp(1)")],
                "subtracted, its gradient kept": [(C, 's.masked_fill(itself, float("-inf")).logsumexp(1)',
                                                   "(s.exp().sum(1) - s.detach().diagonal().exp()).log()")]}),
    "collapse": ("what keeps BYOL from collapsing", BYOL, ["loss", "effective_rank", "alignment"],
                 {"BYOL": [],
                  "no norm after the projection": [
                      (C, "            self.projection_head.append(nn.BatchNorm1d(columns, affine=False))\n",
                       "            pass\n")],
                  "no predictor": [(C, "return self.predictor(projections.flatten(0, 1)).view_as(projections)",
                                                "return projections")],
                  "no stop-gradient, no target": [
                      (C, "(prediction, target.detach())", "(prediction, target)"),
                      (C, "    @torch.no_grad()\n    def project_by_target(self, views):\n"
                          "        return self.target(views.flatten(0, 1)).unflatten(0, views.shape[:2])",
                       "    def project_by_target(self, views):\n        return self.project(views)")]}),
    "corruption": ("denoising and masking against the plain autoencoder", AUTOENCODER, ["held_out"],
                   {"plain": [], "noise 0.2": ["--noise", "0.2"], "masked 0.3": ["--masked", "0.3"],
                    "masked 0.6": ["--masked", "0.6"]}),
    "beta": ("each R(z), and how much of it", AUTOENCODER, ["held_out", "sparsity", "correlation"],
             {"none": [], **{f"{r} {b}": ["--regularizer", r, "--beta", b]
                             for r in ("sparse", "decorrelated") for b in ("0.001", "0.01", "0.1")}}),
    "share": ("the share of tokens masked", MASKED, ["held_out", "accuracy"],
              {"0.15": [], "0.3": ["--mask-share", "0.3"], "0.5": ["--mask-share", "0.5"]}),
    "replacement": ("what stands where a token was masked", MASKED, ["held_out", "accuracy"],
                    {"80/10/10": [], "always [MASK]": [(T, "kind < 0.8, MASK", "kind < 2, MASK")],
                     "the token itself": [
                         (T, "hidden = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, random, targets))",
                          "hidden = targets")]}),
    "logits": ("logits at all positions", MASKED, ["seconds"], {"masked positions": [], "all positions": [ALL_LOGITS]}),
    "terms": ("the document term", TEXT, ["held_out"],
              {"both": [], "masked loss alone": ["--document-weight", "0"],
               "document term alone": ["--masked-weight", "0"]}),
}


def ask(name, seeds, data_dir, work, known):
    """known: the results of runs so far, so that an arm of several questions is trained once."""
    question, command, columns, arms = EXPERIMENTS[name]
    print(f"{name}: {question}. python {' '.join(command)}; mean ± deviation of {seeds} seeds", flush=True)
    rows = [["", *(f"probe {n}" for n in LABELS), *columns]]
    for arm, changes in arms.items():
        copy = copy_of_the_code(work / f"code {len(rows)}")
        for item in changes:
            if isinstance(item, tuple):
                change(copy, f"{name}, {arm}", *item)
        flags, found = [item for item in changes if isinstance(item, str)], []
        for seed in range(seeds):
            same = *command, *changes, seed
            if same not in known:
                run = work / f"{name} {len(rows)} {seed}"
                start(copy, *command, *flags, "--run", run, "--seed", seed, "--data-dir", data_dir)
                start(copy, "finetune.py", run, "--probe", "--labels", *LABELS, "--seeds", 3, "--limit", 10_000)
                with open(run / "probe.csv", encoding="utf-8", newline="") as file:
                    draws = list(csv.DictReader(file))
                probes = [np.mean([float(row["test_accuracy"]) for row in draws if row["labels_a_class"] == n])
                          for n in LABELS]
                with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
                    known[same] = probes, list(csv.DictReader(file))[-1]
            probes, last = known[same]
            found.append([*probes, *(float(last[column]) for column in columns)])
            print(f"  {arm}, seed {seed}: "
                  + ", ".join(f"{title} {value:.4g}" for title, value in zip(rows[0][1:], found[-1])), flush=True)
        rows.append([arm, *(f"{m:.4g} ± {s:.2g}" for m, s in zip(np.mean(found, 0), np.std(found, 0, ddof=seeds > 1)))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows),
          flush=True)


def start(folder, *command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which of the experiments")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining runs an arm")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where archives lie")
    options, known = parser.parse_args(), {}
    for name in options.names or EXPERIMENTS:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name}")
        if not options.names:
            print(f"{name:12}{EXPERIMENTS[name][0]}: {', '.join(EXPERIMENTS[name][3])}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            ask(name, options.seeds, options.data_dir.resolve(), Path(folder), known)
