"""The folder of a run: its log, its checkpoints, and how it resumes.

    run = Run(settings)                       check the folder, and change nothing yet
    first_step = run.begin(model, ...)        create it, or load the last checkpoint
    run.end_step(step, losses, items)         save, preview, log, stop: whatever is due
    run.finish()                              say where the results are

A step ends in this order: save, preview, row of metrics.csv, page, line on the terminal,
stop. If the process is killed before the save, `--resume` makes the steps since the last
save again, and drops their rows. If it is killed after the save, the checkpoint holds the
sums of the losses (`unlogged`), and `begin` writes the missing row. Only the columns of
time differ.

The folder holds config.json (settings and versions), metrics.csv (one row for each line
of the log), checkpoint.pt (all that `--resume` needs), pictures, and report.html.
"""

import csv
import json
import math
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from minissl import UserError
from minissl.training import distributed, report
from minissl.training.files import (
    CHECKPOINT_FORMAT,
    checkpoint_errors,
    is_writable,
    load_checkpoint,
    lock,
    nearest_existing,
    read_csv,
    unreadable,
    write_atomically,
    write_checkpoint,
    write_csv,
)
from minissl.training.settings import flag_name, name_of_script


# These settings may differ when a run is resumed. The data may lie elsewhere, because a
# checksum identifies it.
MAY_CHANGE = {
    "steps", "device", "resume", "run", "data", "data_dir", "evaluate_every", "save_every",
}


def launcher():
    """The beginning of the command that has started this process, as a list."""
    if distributed.WORLD_SIZE == 1:
        return ["python"]
    return ["torchrun", "--nproc-per-node", str(distributed.LOCAL_WORLD_SIZE), "--"]


def diverged(what, when, folder):
    """The error for a training that has become infinite or NaN.

    what: "loss is", "weights are" or "features are"; when: "at step 7".
    """
    return UserError(
        f"the {what} not finite {when}: start another run with a lower --learning-rate and "
        f"another --run; {folder} keeps its last good checkpoint, if there is one"
    )


def check_rows(rows):
    """Raise ValueError unless these are the rows of a run's log, as `read_csv` returns them."""
    if not rows:
        raise ValueError("it has no rows")
    for name in ("step", "seconds"):
        if name not in rows[0]:
            raise ValueError(f"it has no column {name}; saved by a spreadsheet?")
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {n} has too few values, or too many")
        int(row["step"])
        float(row["seconds"])
        for value in row.values():
            if value:                   # it is "" where nothing was measured
                float(value)


class Run:
    """A run's folder. Everything that a script does with time and files goes through it.

    Attributes: folder, a Path; checkpoint, the last checkpoint of the run that is
    resumed, or None for a new run.
    """

    def __init__(self, settings):
        """Check the folder that settings.run names, without changing anything.

        A mistake in the settings or the data must not leave a folder behind.
        Raises UserError if the folder cannot be used.
        """
        self.folder = Path(settings.run)
        self.settings = settings
        self.checkpoint = None
        self.rows = []                   # of metrics.csv
        self.stopping = False            # becomes True at Ctrl-C and at SIGTERM
        self.handlers = {}               # of these signals, as they were before `begin`
        if settings.resume:
            self.checkpoint = load_checkpoint(self.folder)
            self._check_settings(self.checkpoint["settings"])
            self.rows = self._read_rows()
        else:
            self._check_free()

    def _check_free(self):
        """A new run needs a folder that is writable and holds nothing of value."""
        folder = self.folder
        existing = nearest_existing(folder)
        if not is_writable(existing):
            raise UserError(
                f"--run {folder}: {existing} is not a writable folder; give another name"
            )
        if (folder / "checkpoint.pt").exists():
            raise UserError(
                f"{folder} already holds a run: give --resume to continue it, or another --run"
            )
        if not folder.exists():
            return
        # A run that was stopped before its first checkpoint leaves only these.
        early = {"lock", "config.json", "views.png"}
        names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
        if names - early:
            raise UserError(
                f"{folder} holds other files, such as {min(names - early)}: give another --run"
            )

    def _check_settings(self, old):
        new = asdict(self.settings)
        other = sorted(new.keys() ^ old.keys())         # settings that only one of both has
        script = self.checkpoint.get("script")
        if other and script != name_of_script():
            raise UserError(
                f"{self.folder} was made by {script or 'another script'}: resume it with that one"
            )
        if other:
            flags = " and ".join(flag_name(name) for name in other)
            raise UserError(
                f"the run in {self.folder} was started by another version of {script}, which "
                f"differs in {flags}: start another run"
            )
        for name, value in new.items():
            if name not in MAY_CHANGE and old[name] != value:
                raise UserError(
                    f"{flag_name(name)} {value}: the run in {self.folder} was started with "
                    f"{old[name]}, and this cannot change; leave the flag out, or start another "
                    f"run"
                )

    def _read_rows(self):
        """The rows of metrics.csv up to the checkpoint's step.

        Later rows are dropped: their steps are trained and logged again. The file is
        written whole or not at all, so a part of it is damage and not the work of a kill.
        """
        path = self.folder / "metrics.csv"
        if not path.exists():
            return []
        try:
            rows = read_csv(path)
            check_rows(rows)
            steps = [int(row["step"]) for row in rows]
        except PermissionError:
            raise unreadable(path) from None
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(
                f"{path} cannot be read as the log of a run ({error}); move it away to "
                f"continue with a new log: the checkpoint beside it is not affected"
            ) from None
        return [row for row, step in zip(rows, steps) if step <= self.checkpoint["step"]]

    # ---------------------------------------------------------------- the beginning

    def begin(
        self, model, optimizers, data, method, model_settings, chance, preview,
        log_every=50, first_stage=0, tokenizer=None,
    ):
        """Create the folder, or load the checkpoint into the model and the optimizers.

        Arguments:
            data: what distinguishes this data from other data, in words
            method: the name of the method, for finetune.py
            model_settings: the arguments that create the model
            chance: the names of the losses, each with its chance level or None
            preview: called with the model; returns further columns of the log
            log_every: steps between two lines of the log
            first_stage: how many steps belong to a first stage that runs at another speed,
                so that the minutes left are computed from steps of one kind
            tokenizer: the tokenizer of a text run, as JSON
        Returns the step to begin with.
        """
        self.model, self.optimizers = model, optimizers
        self.chance, self.preview = chance, preview
        self.log_every, self.first_stage = log_every, first_stage
        self.identity = dict(
            data=data, method=method, model_settings=model_settings, tokenizer=tokenizer
        )
        self.losses, self.counted = {}, 0       # sums since the last row, and of how many
        self.items = 0                          # images or tokens since the last row
        step = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if distributed.RANK == 0:
            lock(self.folder)
        if self.checkpoint:
            step = self._load(self.checkpoint)
        if distributed.RANK == 0:
            self._write_config()
        now = time.perf_counter()
        spent = float(self.rows[-1]["seconds"]) if self.rows else 0
        self.started = now - spent
        self.logged, self.logged_step = now, step
        self.saved = -math.inf                  # so the first step is saved
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._stop)
        if self.counted and self._is_logged(step):
            self._log(step)                     # it was killed after the save, before the row
        return step

    def _load(self, checkpoint):
        if checkpoint["data"] != self.identity["data"]:
            raise UserError(
                f"{self.folder} learned from {checkpoint['data']}, but the data is now "
                f"{self.identity['data']}: give the same data, with the same labels, or "
                f"start another run"
            )
        with checkpoint_errors(self.folder):
            step = int(checkpoint["step"])
            unlogged = checkpoint["unlogged"]
            logged_steps = {int(row["step"]) for row in self.rows}
            if step not in logged_steps:
                self.counted = int(unlogged["steps"])
                for name, total in unlogged["losses"].items():
                    self.losses[name] = torch.tensor(float(total))
            self.model.load_state_dict(checkpoint["model"])
            states = checkpoint["optimizers"]
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        print(f"resuming after step {step:,} of {self.settings.steps:,}")
        return step

    def _write_config(self):
        """What the run was made with. `command` and `started` are those of the last start."""
        config = dict(
            settings=asdict(self.settings),
            command=shlex.join([*launcher(), *sys.argv]),
            python=sys.version.split()[0],
            torch=torch.__version__,
            numpy=np.__version__,
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        text = json.dumps(config, indent=2)
        write_atomically(self.folder / "config.json", text.encode())

    def _stop(self, number, frame):
        self.stopping = True
        if distributed.WORLD_SIZE == 1:         # torchrun itself sends a second signal
            again = "send the signal again"
            if number == signal.SIGINT:
                again = "press Ctrl-C again"
            print(f"\nstopping after this step; {again} to stop at once", file=sys.stderr)
            signal.signal(number, signal.SIG_DFL)

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    # ---------------------------------------------------------------- after each step

    def end_step(self, step, losses, items):
        """Whatever is due after a step, in the order given at the top of the file.

        The state is saved before the model is evaluated, so a preview that fails (for
        lack of memory, perhaps) loses nothing.

        Arguments: step, from 0; losses, {name: scalar tensor}; items, how many images or
        tokens this process took, a number or a scalar tensor.
        Raises KeyboardInterrupt after a signal, once everything is saved. Whatever it raises,
        Ctrl-C is then again what it was before `begin`.
        """
        try:
            self._end_step(step, losses, items)
        except BaseException:
            self._restore_handlers()
            raise

    def _end_step(self, step, losses, items):
        stopping = self._count(losses, items)
        done = step + 1
        last = done == self.settings.steps
        is_logged = self._is_logged(done)
        since_save = time.perf_counter() - self.saved
        if is_logged:
            self._check_losses(done)
        if last or stopping or self._has_preview(done) or since_save > self.settings.save_every:
            self.save(done)
        if is_logged:
            self._log(done)
        if stopping and not last:
            flags = ["--run", str(self.folder), "--resume"]
            command = shlex.join([*launcher(), sys.argv[0], *flags])
            raise KeyboardInterrupt(
                f"stopped after step {done:,} and saved; continue with: {command}"
            )

    def _count(self, losses, items):
        """Add a step to the sums for the next row. Returns whether any process stops.

        With one process, nothing waits here for the device. Several processes have to
        agree in each step whether to stop.
        """
        values = torch.stack([value.detach().float() for value in losses.values()])
        stopping = self.stopping
        if distributed.WORLD_SIZE > 1:
            own = torch.tensor([float(stopping), float(items)])
            totals = distributed.all_reduce(torch.cat([values, own.to(values.device)]))
            values = totals[:-2] / distributed.WORLD_SIZE
            stopping = bool(totals[-2] > 0)
            items = totals[-1]
        for name, value in zip(losses, values):
            self.losses[name] = self.losses.get(name, 0) + value
        self.counted += 1
        self.items = self.items + items
        return stopping

    def _has_preview(self, done):
        every = self.settings.evaluate_every
        return done in (self.settings.steps, self.first_stage) or done % every == 0

    def _is_logged(self, done):
        return done == 1 or done % self.log_every == 0 or self._has_preview(done)

    def _check_losses(self, done):
        for total in self.losses.values():
            if not math.isfinite(float(total)):
                raise diverged("loss is", f"at step {done}", self.folder)

    def save(self, step):
        """Write all that a resumed run needs. Only the first process writes.

        Raises UserError for weights that are not finite: they never replace good ones.
        """
        if distributed.RANK > 0:
            return
        for parameter in self.model.parameters():
            if not parameter.isfinite().all():
                raise diverged("weights are", f"at step {step}", self.folder)
        losses = {name: float(total) for name, total in self.losses.items()}
        state = dict(
            format=CHECKPOINT_FORMAT,
            step=step,
            script=name_of_script(),
            settings=asdict(self.settings),
            model=self.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            unlogged=dict(steps=self.counted, losses=losses),
            **self.identity,
        )
        write_checkpoint(self.folder / "checkpoint.pt", state)
        self.saved = time.perf_counter()

    # ---------------------------------------------------------------- the log

    def _log(self, step):
        """Write a row of metrics.csv and a line on the terminal, with a preview if due."""
        seconds = time.perf_counter() - self.logged          # without the preview's time
        columns = {}
        if self._has_preview(step) and distributed.RANK == 0:
            columns = self.preview(self.model.eval())
            self.model.train()
        losses = {}
        for name, total in self.losses.items():
            losses[name] = float(f"{float(total) / self.counted:.6g}")
        rate = round(int(self.items) / seconds) if self.items else ""
        columns = dict(rate_per_second=rate, **columns)
        row = dict(step=step, seconds=round(time.perf_counter() - self.started, 1))
        for name in self.chance:
            row[name] = losses.get(name, "")
        self.rows.append(dict(row, **columns))
        if distributed.RANK == 0:
            write_csv(self.folder / "metrics.csv", self.rows)
            if self._has_preview(step):
                report.write_page(self.folder)
        self._print(step, losses, columns, seconds)
        self.losses, self.counted, self.items = {}, 0, 0
        self.logged, self.logged_step = time.perf_counter(), step

    def _print(self, step, losses, columns, seconds):
        steps = self.settings.steps
        parts = [f"step {step:,}/{steps:,}"]
        for name, value in losses.items():
            part = f"{name.replace('_', ' ')} {value:.4g}"
            if self.chance[name]:
                part += f" (chance {self.chance[name]:.4g})"
            parts.append(part)
        for name, value in columns.items():
            if value != "":
                parts.append(f"{name.replace('_', ' ')} {value:,}")
        # The steps of the first stage say nothing about the time of the later ones.
        in_first_stage = step <= self.first_stage
        end = self.first_stage if in_first_stage else steps
        if step > self.logged_step:             # a resumed run may begin with an old row
            each = seconds / (step - self.logged_step)
            left = f"{each * (end - step) / 60:.1f} min left"
            parts.append(left + " in the first stage" if in_first_stage else left)
        print("  ".join(parts), flush=True)

    def finish(self, measure="python finetune.py"):
        """Say where the results are, and what to do next. Ctrl-C is again what it was before.

        measure: the command that makes the table, without the name of the folder, or None.
        """
        self._restore_handlers()
        folder = shlex.quote(str(self.folder))
        page = self.folder / "report.html"
        if distributed.RANK == 0:
            report.write_page(self.folder)
        print(f"done: {page} shows what the model learned")
        if measure:
            print(f"next: {measure} {folder} measures whether pretraining helped")
