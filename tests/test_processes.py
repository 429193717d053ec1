"""Several processes make the step of one: by gradient, and by the scripts themselves."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_ae
import train_contrastive
import train_mlm
from minissl import UserError, files, processes, training

ROOT = Path(__file__).resolve().parents[1]


def torchrun(n, script, *arguments):
    """-> the running torchrun."""
    return start(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, "--", script, *arguments])


def start(command, **environment):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | environment)


def workers(n, script, *arguments):
    """-> n running processes in torchrun's environment, without the seconds that it takes itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start([script, *arguments], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port)) for rank in range(n)]


def together(n, script, *arguments):
    """-> (exit codes, what was printed) of n processes that run to their end."""
    running = workers(n, script, *arguments)
    printed = "".join(process.communicate(timeout=120)[0] for process in running)
    return [process.returncode for process in running], printed


def test_loss_and_gradients_of_four_processes_are_those_of_one():
    codes, printed = together(4, "tests/check_processes.py")
    assert not any(codes) and printed.count("running statistics") == 4, printed


IMAGES = "--limit 200 --steps 6 --batch-size 16 --width 8 --evaluate-every 3 --device cpu --precision float32".split()
TEXT = ("--steps 12 --embedding-steps 6 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 --vocabulary-size 400 --pairs 100 "
        "--evaluate-every 6 --device cpu --precision float32").split()


@pytest.mark.parametrize("script", [train_contrastive, train_mlm], ids=lambda script: script.__name__)
def test_a_script_learns_the_same_in_two_processes(script, corpus, run_script, tmp_path):
    flags = [*TEXT, "--data", corpus, "--data-dir", tmp_path] if script is train_mlm else IMAGES
    code, printed = run_script(script, "--run", tmp_path / "1", *flags)
    assert code == 0, printed
    codes, printed = together(2, script.__file__, "--run", tmp_path / "2", *flags)
    assert codes == [0, 0], printed
    assert printed.count("done:") == 1                             # one process writes
    one, two = (files.load_checkpoint(tmp_path / str(n))["model"] for n in (1, 2))
    for name in one:
        if one[name].is_floating_point():
            assert (one[name] - two[name]).norm() <= 0.03 * one[name].norm() + 1e-3, name
    rows = [list(csv.DictReader(open(tmp_path / str(n) / "metrics.csv", encoding="utf-8"))) for n in (1, 2)]
    loss = "loss" if script is train_contrastive else "document"
    assert [float(r[loss]) for r in rows[0]] == pytest.approx([float(r[loss]) for r in rows[1]], rel=2e-3)


def test_ctrl_c_saves_once_and_another_number_of_processes_goes_on(run_script, tmp_path):
    flags = ["--run", tmp_path / "run", *IMAGES, "--steps", 100_000, "--evaluate-every", 100_000]
    running = torchrun(2, "train_ae.py", *flags)
    end = time.time() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and time.time() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    printed = running.communicate(timeout=60)[0]
    assert running.returncode != 0 and printed.count("and saved") == 1, printed
    step = files.load_checkpoint(tmp_path / "run")["step"]
    assert step >= 1
    code, printed = run_script(train_ae, *flags, "--steps", step + 2, "--resume")
    assert code == 0 and f"step {step + 2:,}/" in printed, printed


def test_when_a_process_dies_the_others_end_with_a_sentence(tmp_path):
    first, second = workers(2, "train_ae.py", "--run", tmp_path / "run", *IMAGES, "--steps", 100_000)
    end = time.time() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and time.time() < end:
        time.sleep(0.1)
    second.kill()
    printed = first.communicate(timeout=60)[0]
    assert first.returncode == 1 and "another process is gone" in printed.splitlines()[-1] and "Traceback" not in printed, printed


def test_a_batch_that_does_not_split_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)
    assert len(processes.share(torch.zeros(16, 3))) == 8
    with pytest.raises(UserError, match="--batch-size 15: no multiple of the 2 processes"):
        training.Batches(100, 15, 0, "order")
