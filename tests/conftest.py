"""What several test files share: a corpus, a finished tiny run, a way to run a script."""

import contextlib
import csv
import os
import random
import signal
import sys

import pytest
import torch


# The models here are tiny, so a second thread gains nothing. Beside another program it would
# only make both wait.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# ---------------------------------------------------------------- a corpus

NOUNS = {
    "sea": "ship harbour wave sailor anchor storm fish island".split(),
    "city": "street tower market tram bridge window crowd square".split(),
}
VERBS = {
    "sea": "sails drifts sinks floats waits turns".split(),
    "city": "rises opens closes shines sleeps grows".split(),
}


def story(topic, seed, sentences=None):
    """A text of 8 to 16 sentences, or of as many as asked for.

    A noun fixes its verb, so a masked word can be guessed from its neighbours.
    """
    nouns, verbs = NOUNS[topic], VERBS[topic]
    if sentences is None:
        sentences = 8 + seed % 9
    draw = random.Random(f"{topic} {seed}")
    lines = []
    for _ in range(sentences):
        n = draw.randrange(len(nouns))
        first = f"{nouns[n]} {verbs[n % len(verbs)]}"
        second = f"{nouns[n - 1]} {verbs[(n - 1) % len(verbs)]}"
        lines.append(f"The {first} and the {second}.")
    return " ".join(lines)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two classes of 100 short texts each, of many lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for topic in NOUNS:
        (folder / topic).mkdir()
        for n in range(100):
            path = folder / topic / f"{n:03}.txt"
            path.write_text(story(topic, n), encoding="utf-8")
    return folder


# ---------------------------------------------------------------- runs

TINY = (
    "--steps 90 --embedding-steps 30 --batch-size 8 --window 32 --width 32 --heads 2 "
    "--layers 1 --vocabulary-size 400 --pairs 100 --evaluate-every 30 "
    "--device cpu --precision float32"
).split()


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """The folder of one finished tiny run of train_mlm.py, for tests that only read it."""
    import train_mlm
    folder = tmp_path_factory.mktemp("runs")
    command = ["train_mlm.py", "--data", corpus, "--data-dir", folder / "data"]
    command += ["--run", folder / "mlm", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(part) for part in command])
        train_mlm.main()
    return folder / "mlm"


@pytest.fixture(scope="session", autouse=True)
def measure_the_machine_quickly():
    """A run measures the machine for a third of a second. Here one matrix product is enough."""
    from minissl.training import machine
    measure = machine.matrix_product_rate

    def measure_once(device, dtype, n=64, seconds=0):
        return measure(device, dtype, 64, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "matrix_product_rate", measure_once)
        yield


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run takes Ctrl-C and SIGTERM for itself. After each test pytest gets them back."""
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.getsignal(number)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(module, "--flag", value, ...) -> (exit code, what it printed).

    The script runs in this process.
    """
    from minissl.training import settings

    def run(module, *arguments):
        command = [module.__name__ + ".py", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        code = 0
        try:
            settings.run_script(module.main)
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


# ---------------------------------------------------------------- references

def slope(function, array, place, step=1e-5):
    """The derivative of function(array) by one of its numbers: a central difference."""
    up, down = array.copy(), array.copy()
    up[place] += step
    down[place] -= step
    return (function(up) - function(down)) / (2 * step)


def assert_residual_block(block, first, second, last_norm):
    """Fail unless a new block of width 8 is the identity, and later adds its two convolutions.

    first and second: its convolutions; last_norm: its last batch norm, whose scale starts at 0.
    """
    torch.manual_seed(0)
    x = torch.rand(2, 8, 6, 6)

    def normalized_over_the_batch(maps):
        mean = maps.mean((0, 2, 3), keepdim=True)
        variance = maps.var((0, 2, 3), correction=0, keepdim=True)
        return (maps - mean) / (variance + 1e-5).sqrt()

    assert torch.equal(block(x), x)
    for layer in (first, second):
        torch.testing.assert_close(layer(x), x)
        torch.nn.init.normal_(layer.weight)
    torch.nn.init.ones_(last_norm.weight)
    hidden = normalized_over_the_batch(first(x)).relu()
    added = normalized_over_the_batch(second(hidden))
    torch.testing.assert_close(block(x), (x + added).relu(), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- what a run leaves behind

def read_log(folder):
    """The rows of a run's metrics.csv, each a dict of strings."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def log_of(folder):
    """The rows of a run's metrics.csv without what the clock says."""
    rows = read_log(folder)
    for row in rows:
        del row["seconds"], row["rate_per_second"]
    return rows


def result_of(printed):
    """The figures of an example's last line, `result: name=value ...`, as strings."""
    last = printed.strip().splitlines()[-1]
    assert last.startswith("result: ")
    return dict(part.split("=") for part in last.removeprefix("result: ").split())


def assert_resumes_exactly(run_script, script, arguments, whole, printed, last_step):
    """Stop a run like that in the folder `whole`, and resume it: it must end the same.

    printed: the output of `whole`; last_step: where the other run stops. That one lies in
    the folder "run" beside `whole`.
    """
    from minissl.training.files import load_checkpoint
    run = whole.parent / "run"
    with stopped_at(last_step):
        code, _ = run_script(script, *arguments, "--run", run)
    assert code == 130
    code, resumed_printed = run_script(script, "--run", run, "--resume")
    assert code == 0, resumed_printed
    assert_equal_states(load_checkpoint(whole)["model"], load_checkpoint(run)["model"])
    assert log_of(whole) == log_of(run)
    assert result_of(resumed_printed) == result_of(printed)


def sparse(dense):
    """A dense matrix (N, D) as SparseRows. (tests/test_probes.py has another way, a loop.)"""
    from minissl.evaluation.probes import SparseRows
    rows, indices = dense.nonzero(as_tuple=True)
    ends = (dense != 0).sum(1).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    return SparseRows(indices, offsets, dense[rows, indices], dense.shape[1])


def assert_equal_states(one, other):
    """Fail unless both dicts hold the same tensors, bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@contextlib.contextmanager
def stopped_at(last_step):
    """Inside the block, every run stops after this step (from 0), as Ctrl-C does."""
    from minissl.training.run import Run
    end_step = Run.end_step

    def stop(self, step, losses, items):
        self.stopping = step == last_step
        end_step(self, step, losses, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end_step", stop)
        yield
