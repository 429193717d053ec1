"""The plumbing of the training scripts: settings, device, randomness, the run's folder.

Nothing here is about self-supervised learning. A reader of the scripts needs one idea from this file:

**Randomness is a function, not a state.** Every draw of step s comes from `generator(seed, purpose, s)`. So a
checkpoint is the weights, the optimizer's state and the step number, and that is all: a resumed run continues as if
nothing had happened, and an evaluation in the middle cannot disturb what follows.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import inspect
import json
import math
import re
import shlex
import signal
import sys
import time
import typing
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import numpy as np
import torch

from minissl import UserError, processes, report
from minissl.files import (CHECKPOINT_FORMAT, load_checkpoint, lock, read_csv, taken_from, writable, write_atomically,
                           write_checkpoint, write_csv)


# ---------------------------------------------------------------- from the command line to settings, and out again

def read_settings(cls, description, argv=None):
    """An instance of the dataclass `cls` from the command line.

    Each field is a flag, and the comment behind it in the source is its help, so the why stands in one place.
    A bool is a switch, a Literal a choice, a list takes several values; what has no default is no flag but the first
    argument. Raises UserError for a wrong flag or value.
    """
    why = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(cls), re.MULTILINE))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    def error(message):                               # argparse's own prints the usage, too
        message = re.sub(".*arguments are required: (.*)", r"\1 is missing: give it before all flags", message)
        raise UserError(f"{message}; --help lists what there is")
    parser.error = error
    for item in fields(cls):
        default = item.default_factory() if callable(item.default_factory) else item.default
        flag = item.name if default is MISSING else "--" + item.name.replace("_", "-")
        shown = "" if default is False or default in ("", [], MISSING) else f" (default {default})"
        options = dict(help=why[item.name].replace("%", "%%") + shown, default=default)
        kind = typing.get_origin(item.type) or item.type
        if kind is bool:
            options |= dict(action="store_true")
        elif kind is typing.Literal:
            options |= dict(choices=typing.get_args(item.type))
        elif kind is list:
            options |= dict(type=typing.get_args(item.type)[0], nargs="+", metavar=item.name.upper())
        else:
            options |= dict(type=kind, metavar=item.name.upper())
        parser.add_argument(flag, **options)
    arguments = parser.parse_args(argv)
    if getattr(arguments, "resume", False):           # what is not said again is as the run was started
        parser.set_defaults(**{k: v for k, v in load_checkpoint(arguments.run)["settings"].items()
                               if hasattr(arguments, k) and k != "run"})
        arguments = parser.parse_args(argv)
    return cls(**vars(arguments))


def run_script(main):
    """Run main(); what the user can mend becomes one sentence and exit code 2."""
    def end(sentence, code, each=True):               # each process says it, or the first of each machine
        if each or not processes.LOCAL_RANK:
            print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
        sys.exit(code)

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")          # a terminal that cannot show a character is no reason to stop
    try:
        main()
    except UserError as error:
        end(error, 2, each=False)
    except OSError as error:                          # no space, no permission, a folder gone: the system's own words
        end(error, 1)
    except KeyboardInterrupt as stop:
        end(str(stop) or "interrupted", 130, each=False)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            end("too little memory: try a lower --batch-size, or --limit", 1)
        if not processes.lost(error):
            raise
        end("another process is gone, so this one ends, too; --resume goes on", 1)
    finally:
        processes.leave()


def at_least(settings, minimum, *names):
    """at_least(settings, 1, "steps") raises the sentence if it is not."""
    for name in names:
        if not getattr(settings, name) >= minimum:    # so written, NaN fails too
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least {minimum}")


# ---------------------------------------------------------------- the machine

def choose_device(name):
    """"auto" takes CUDA, then MPS, then the CPU. -> (torch.device, the reason in words)."""
    mps = torch.backends.mps.is_available() and processes.WORLD == 1    # torch has no collectives on it
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: this torch finds no such device here; there is {' and '.join(there)}")
    if name != "auto":
        return torch.device(name), "as asked"
    return torch.device(there[0]), "found" if len(there) > 1 else f"no GPU found; {torch.get_num_threads()} threads"


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the system after every large tensor: each return
    costs a page fault per 4 kB at the next step. 4,500 -> 6,600 tokens/s in float32. Elsewhere: nothing happens."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-3, 2**25)      # M_MMAP_THRESHOLD, from the heap: 1 GB, an older glibc 32 MB
        mallopt(-1, 2**31 - 1)                        # M_TRIM_THRESHOLD: and give nothing back
    except (OSError, AttributeError, TypeError):
        pass


def choose_precision(name, device):
    """"auto" takes bfloat16 where it is measurably faster. -> (dtype, FLOP/s of a large matrix product, the reason).

    A CPU without bfloat16 units emulates it, slower than float32, so the question is put to the machine.
    """
    small = lambda dtype: matrix_product_rate(device, dtype, 256, 0.02)   # emulation is a hundred times slower
    wanted = [torch.float32 if name == "auto" else getattr(torch, name)]
    if name == "auto" and device.type != "mps" and small(torch.bfloat16) > 0.5 * small(torch.float32):
        wanted.append(torch.bfloat16)
    rates = {dtype: matrix_product_rate(device, dtype) for dtype in wanted}
    dtype = torch.bfloat16 if rates.get(torch.bfloat16, 0) > 1.3 * rates.get(torch.float32, 0) else torch.float32
    measured = ", ".join(f"{str(d)[6:]} {rate / 1e9:,.0f} GFLOP/s" for d, rate in rates.items())
    return dtype, rates[dtype], ("" if name == "auto" else "as asked; ") + "measured: " + measured


def matrix_product_rate(device, dtype, n=1536, seconds=0.3):
    """FLOP/s of an (n, n) matrix product, the best of what fits in the time: the machine's practical peak."""
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b                                             # the first one builds the kernel, longer than it runs
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()                          # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def count_flops(model, run):
    """FLOPs of the matrix products and convolutions in run(), with the model in evaluation mode: batch norm stays."""
    from torch.utils.flop_counter import FlopCounterMode        # here, for the import takes a second
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    model.train()
    return counter.get_total_flops()


def choose_machine(settings):
    """-> torch.device, dtype of the forward pass, its autocast context, FLOP/s of a large matrix product in that dtype.
    Device and dtype are printed with their reasons."""
    device, reason = choose_device(settings.device)
    device = processes.join(device)
    print(f"device: {device} ({reason})" + f", {processes.WORLD} processes" * (processes.WORLD > 1))
    if device.type == "cpu":
        keep_freed_memory()
    precision, peak, reason = processes.agree(choose_precision(settings.precision, device))
    print(f"precision: {str(precision)[6:]} ({reason})")
    settings.precision = str(precision)[6:]           # goes into the checkpoint: a resumed run does not measure again
    return device, precision, autocast(device, precision), peak


def autocast(device, precision):
    """A context for forward passes: in bfloat16 where that was chosen, else as is."""
    return contextlib.nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


# ---------------------------------------------------------------- randomness and rates, each a function of the step

def generator(seed, purpose, step):
    """The torch.Generator (CPU) for one purpose at one step; the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Batches:
    """Which of n examples step s takes, as a function of (seed, purpose, s): each epoch in an order of its own, of
    which the last n mod size are left for another epoch. equal: are the slices of several processes to be?"""

    def __init__(self, n, size, seed, purpose, equal=True):
        if n < size:
            raise UserError(f"--batch-size {size}: there are only {n:,} images to learn from; give more, or lower it")
        if equal and size % processes.WORLD:
            raise UserError(f"--batch-size {size}: no multiple of the {processes.WORLD} processes that are to share it")
        self.n, self.size, self.seed, self.purpose, self.epoch = n, size, seed, purpose, None

    def __call__(self, step):
        """-> (size,) int64"""
        epoch, batch = divmod(step, self.n // self.size)
        if epoch != self.epoch:
            self.order, self.epoch = torch.randperm(self.n, generator=generator(self.seed, self.purpose, epoch)), epoch
        return self.order[batch * self.size:(batch + 1) * self.size]


def rate_at(step, steps, warmup, decay=0.5):
    """Share of the peak learning rate: linear up over `warmup` steps, flat, linear to 0 over the last `decay` part.

    >>> [round(rate_at(s, 10, 2), 2) for s in range(10)]
    [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    """
    return min(1, (step + 1) / max(warmup, 1), (steps - step) / max(decay * steps, 1))


def take_step(optimizers, rate, times=None):
    """A step of each optimizer, at the rate times each group's own `times`, or this one; then no gradient is left."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * (group.get("times", 1) if times is None else times)
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- the run's folder

def diverged(what, when, folder):
    return UserError(f"the {what} not finite {when}: start another run, with a lower --learning-rate and another "
                     f"--run; {folder} keeps its last good checkpoint, if there is one")


# The settings that may differ when a run is resumed. Data may lie elsewhere: they are known by their checksum.
MAY_CHANGE = {"steps", "device", "resume", "run", "data", "data_dir", "fill", "evaluate_every", "save_every"}


class Run:
    """A folder with config.json, metrics.csv, checkpoint.pt; what a script does with time and files goes through it.

    checkpoint: None for a new run, or the last checkpoint of the run that is resumed.
    stopping: becomes True at Ctrl-C or SIGTERM; the loop looks at it once a step, saves and leaves.
    """

    def __init__(self, settings):
        """Look, and touch nothing yet: a mistake in the settings or the data must not leave a folder behind."""
        self.folder, self.settings, self.checkpoint = Path(settings.run), settings, None
        self.stopping, self.rows = False, []
        self.first_stage = getattr(settings, "embedding_steps", 0)    # its steps, of train_mlm.py alone
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if settings.resume:
            self.checkpoint = load_checkpoint(self.folder)
            self._compare(self.checkpoint["settings"])
            self.rows = self._read_rows()
        elif not writable(place):
            raise UserError(f"--run {self.folder}: {place} is no folder that one can write into; give another name")
        elif (self.folder / "checkpoint.pt").exists():      # without one a run may start anew: there is nothing to lose
            raise UserError(f"{self.folder} holds a run already: give --resume to go on with it, or another --run")
        elif (self.folder.exists() and not (self.folder / "config.json").exists()
              and {path.name for path in self.folder.iterdir()} - {"lock", "config.json.tmp"}):  # left by an early kill
            raise UserError(f"{self.folder} holds something that is no run: give --run another name")

    def begin(self, model, optimizers, peak, data, **more):
        """Open the folder; put the checkpoint's state, if there is one, into the model and the optimizers.
        data: what tells this data from other data, in words; more: for the checkpoints. -> the step to go on with."""
        self.model, self.optimizers, self.peak, self.data, self.more = model, optimizers, peak, data, more
        step, self.counted, self.losses = 0, 0, []
        self.folder.mkdir(parents=True, exist_ok=True)
        if not processes.RANK:
            lock(self.folder)
        if self.checkpoint:
            if self.checkpoint["data"] != data:
                raise UserError(f"{self.folder} learned from {self.checkpoint['data']}, and now finds {data}: give it "
                                f"the same data (with labels beside it if there were any), or start another run")
            with taken_from(self.folder):
                step, (counted, losses) = int(self.checkpoint["step"]), self.checkpoint["unlogged"]
                self.counted, self.losses = int(counted), [torch.tensor(float(loss)) for loss in losses]
                model.load_state_dict(self.checkpoint["model"])
                for optimizer, state in zip(optimizers, self.checkpoint["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
            print(f"resuming: {step:,} of {self.settings.steps:,} steps are made")
        config = dict(settings=asdict(self.settings), command=shlex.join(["python", *sys.argv]),
                      python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__,
                      started=time.strftime("%Y-%m-%d %H:%M:%S"))
        if not processes.RANK:
            write_atomically(self.folder / "config.json", json.dumps(config, indent=2).encode())
        self.saved, self.logged = -math.inf, time.perf_counter()    # the first step is saved: --resume works from there
        self.started = self.logged - (float(self.rows[-1]["seconds"]) if self.rows else 0)
        self.logged_step, self.items, self.flops = step, 0, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        return step

    def _stop(self, number, frame):
        self.stopping = True
        if processes.WORLD == 1:                      # torchrun sends a second signal behind the first
            print("\nstopping after this step; once more ends it at once", file=sys.stderr)
            signal.signal(number, signal.SIG_DFL)

    def _compare(self, old):
        if old.keys() != asdict(self.settings).keys():
            raise UserError(f"{self.folder} was made by another script or version of minissl: resume it with that")
        for name, value in asdict(self.settings).items():
            if name not in MAY_CHANGE and old[name] != value:
                raise UserError(f"--{name.replace('_', '-')} {value}: the run in {self.folder} was started with "
                                f"{old[name]}; resume with that, or start another run")
        if self.settings.steps < self.checkpoint["step"]:
            raise UserError(f"--steps {self.settings.steps}: {self.folder} has made {self.checkpoint['step']} already")

    def count(self, items, flops, *losses):
        """Add a step, or a part of one, to the log's next row. Losses stay on the device: no wait here."""
        self.items += items
        self.flops += flops
        self.losses = [a + b.detach() for a, b in zip(self.losses or [0.0] * len(losses), losses)]

    def after(self, step, stopping, look, chance, log_every=50):
        """What follows a step: now and then a row of the log, sometimes a look (model -> more columns) and the page;
        by the clock a checkpoint, which costs under 1 % of it; after a signal the end."""
        self.counted += 1
        totals = torch.stack([total.float() for total in self.losses])
        self.losses = list(processes.sum_over(totals) / processes.WORLD)    # alike in all: the first one's are saved
        done, last = step + 1, step + 1 == self.settings.steps
        time_to_look = last or done % self.settings.evaluate_every == 0 or done == self.first_stage
        if time_to_look or step == 0 or done % log_every == 0:
            begin, looking = time.perf_counter(), time_to_look and not processes.RANK
            result = look(self.model.eval()) if looking else {}
            self.model.train()
            self.logged += time.perf_counter() - begin                # a look does not count in the training rates
            self.log(done, chance, result)
            if looking:
                report.write_page(self.folder)
        if last or stopping or time.perf_counter() - self.saved > self.settings.save_every:
            self.save(done)
        if stopping and not last:
            raise KeyboardInterrupt(f"stopped at step {done:,} and saved; python {Path(sys.argv[0]).name} "
                                    f"--run {shlex.quote(str(self.folder))} --resume goes on")

    def done(self):
        """Say where to look, and what to do next."""
        name = shlex.quote(str(self.folder))
        print(f"done: {self.folder / 'report.html'} shows what it learned; python finetune.py {name} what it is worth")

    def log(self, step, chance, more):
        """Write a row of metrics.csv and a line on the terminal: the losses since the last row, each beside its chance
        level, if it has one, then `more`. A loss that is not finite ends the run."""
        seconds = time.perf_counter() - self.logged
        losses = {name: float(f"{float(total) / self.counted:.6g}") or ""      # "": is off
                  for name, total in zip(chance, self.losses)}
        if not all(math.isfinite(value or 0) for value in losses.values()):
            raise diverged("loss is", f"at step {step}", self.folder)
        share = round(self.flops / seconds / self.peak / processes.WORLD, 3) if self.flops else ""
        more = dict(rate_per_second=round(self.items / seconds), share_of_peak=share, **more)
        self.rows.append(dict(step=step, seconds=round(time.perf_counter() - self.started, 1), **losses, **more))
        if not processes.RANK:
            write_csv(self.folder / "metrics.csv", self.rows)
        shown = [f"{name.replace('_', ' ')} {value:.4g}" + (f" (chance {chance[name]:.4g})" if chance[name] else "")
                 for name, value in losses.items() if value != ""]
        shown += [f"{name.replace('_', ' ')} {value:,}" for name, value in more.items() if value != ""]
        early = step <= self.first_stage              # its steps say nothing about the later ones' time
        end = self.first_stage if early else self.settings.steps
        left = seconds / max(step - self.logged_step, 1) * (end - step) / 60
        shown.append(f"{left:.1f} min left" + " of the first stage" * early)
        print(f"step {step:,}/{self.settings.steps:,}", *shown, sep="  ", flush=True)
        self.items, self.flops, self.counted, self.losses = 0, 0, 0, []
        self.logged, self.logged_step = time.perf_counter(), step

    def _read_rows(self):
        """The rows of metrics.csv up to the checkpoint's step; what came after it is trained, and written, again."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return []
        try:
            rows = read_csv(path)
            steps, seconds = [int(row["step"]) for row in rows], [float(row["seconds"]) for row in rows]
            torn = any(None in (*row, *row.values()) for row in rows)
            if torn or steps != sorted(set(steps)) or seconds != sorted(seconds):
                raise ValueError("a line that is torn, doubled or out of order")
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path} is not as the run has left it ({error}); the checkpoint beside it is whole: "
                            f"mend the file, or delete it and go on with a log that begins here") from None
        return [row for row, step in zip(rows, steps) if step <= self.checkpoint["step"]]

    def save(self, step):
        """All that a resumed run needs, by the first process. A state that is not finite never replaces a good one."""
        if processes.RANK:
            return
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise diverged("weights are", f"at step {step}", self.folder)
        write_checkpoint(self.folder / "checkpoint.pt", dict(
            format=CHECKPOINT_FORMAT, step=step, data=self.data, settings=asdict(self.settings),
            model=self.model.state_dict(), optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            unlogged=[self.counted, [float(loss) for loss in self.losses]], **self.more))
        self.saved = time.perf_counter()
