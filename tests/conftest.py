import os
import random
import sys

import pytest
import torch

# The models here are tiny: a second thread gains nothing, and beside another program the two wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

TOPICS = {"sea": ("ship harbour wave sailor anchor storm fish island", "sails drifts sinks floats waits turns"),
          "city": ("street tower market tram bridge window crowd square", "rises opens closes shines sleeps grows")}


def story(topic, seed, sentences=None):
    """8 to 16 sentences in which a noun fixes its verb, so that a masked word can be told from its neighbours."""
    nouns, verbs = (words.split() for words in TOPICS[topic])
    sentences = sentences or 8 + seed % 9
    draw = random.Random(f"{topic} {seed}")
    lines = []
    for _ in range(sentences):
        n = draw.randrange(len(nouns))
        lines.append(f"The {nouns[n]} {verbs[n % len(verbs)]} and the {nouns[n - 1]} {verbs[(n - 1) % len(verbs)]}.")
    return " ".join(lines)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with two classes of 100 short texts each, of many lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for topic in TOPICS:
        (folder / topic).mkdir()
        for n in range(100):
            (folder / topic / f"{n:03}.txt").write_text(story(topic, n), encoding="utf-8")
    return folder


TINY = ("--steps 90 --embedding-steps 30 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 "
        "--vocabulary-size 400 --pairs 100 --evaluate-every 30 --device cpu --precision float32").split()


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """One finished tiny run, for the tests that look at it or fine-tune it."""
    import train_mlm
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_mlm.py", "--data", str(corpus), "--data-dir", str(folder / "data"),
                                   "--run", str(folder / "mlm"), *TINY])
        train_mlm.main()
    return folder / "mlm"


@pytest.fixture(scope="session", autouse=True)
def a_hasty_stopwatch():
    """Each run measures the machine for a third of a second; here, where a hundred are started, for one product."""
    from minissl import training
    rate = training.matrix_product_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "matrix_product_rate", lambda device, dtype, *longer: rate(device, dtype, 64, 0))
        yield


@pytest.fixture
def run_script(monkeypatch, capsys):
    """run_script(module, "--flag", value, ...) -> (exit code, what it printed), in this process."""
    from minissl import training

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
        code = 0
        try:
            training.run_script(module.main)
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run
