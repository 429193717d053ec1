"""Several processes make the step of one: by gradient, and by the scripts themselves."""

import csv
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

import train_ae
import train_contrastive
import train_mlm
from minissl import UserError, files, processes, training

ROOT = Path(__file__).resolve().parents[1]


def torchrun(n, script, *arguments):
    """-> the running torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "--", script]
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, encoding="utf-8", stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def workers(n, log, script, *arguments):
    """-> n running processes in torchrun's environment, without its own seconds; they print into `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [forked.start(log, script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                         LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(n)]


def together(n, log, script, *arguments):
    """-> (exit codes, what was printed) of n processes that run to their end."""
    running = workers(n, log, script, *arguments)
    for process in running:
        process.join(120)
    return [process.exitcode for process in running], log.read_text(encoding="utf-8")


def test_loss_and_gradients_of_four_processes_are_those_of_one(tmp_path):
    codes, printed = together(4, tmp_path / "printed", ROOT / "tests" / "check_processes.py")
    assert not any(codes) and printed.count("running statistics") == 4, printed


IMAGES = "--limit 200 --steps 6 --batch-size 16 --width 8 --evaluate-every 3 --device cpu --precision float32".split()
TEXT = ("--steps 12 --embedding-steps 6 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 "
        "--vocabulary-size 400 --pairs 100 --evaluate-every 6 --device cpu --precision float32").split()


@pytest.mark.parametrize("script", [train_contrastive, train_mlm], ids=lambda script: script.__name__)
def test_a_script_learns_the_same_in_two_processes(script, corpus, run_script, tmp_path):
    flags = [*TEXT, "--data", corpus, "--data-dir", tmp_path] if script is train_mlm else IMAGES
    code, printed = run_script(script, "--run", tmp_path / "1", *flags)
    assert code == 0, printed
    codes, printed = together(2, tmp_path / "printed", script.__file__, "--run", tmp_path / "2", *flags)
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
    log = tmp_path / "printed"
    first, second = workers(2, log, train_ae.__file__, "--run", tmp_path / "run", *IMAGES, "--steps", 100_000)
    end = time.time() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and time.time() < end:
        time.sleep(0.1)
    second.kill()
    first.join(60)
    printed = log.read_text(encoding="utf-8")
    assert first.exitcode == 1 and "another process is gone" in printed.splitlines()[-1], printed
    assert "Traceback" not in printed, printed


def test_a_batch_that_does_not_split_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)
    assert len(processes.share(torch.zeros(16, 3))) == 8
    with pytest.raises(UserError, match="--batch-size 15: no multiple of the 2 processes"):
        training.Batches(100, 15, 0, "order")
    assert len(training.Batches(100, 15, 0, "order", equal=False)(0)) == 15   # of whole texts any number


@pytest.mark.parametrize("rank, order", [(0, ["block", "barrier"]), (1, ["barrier", "block"])])
def test_the_first_process_goes_through_before_the_others(rank, order, monkeypatch):
    done = []
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "RANK", rank)
    monkeypatch.setattr(processes.dist, "barrier", lambda: done.append("barrier"))
    with processes.first_alone():
        done.append("block")
    assert done == order


def test_one_process_that_stops_stops_all_and_a_gradient_that_none_has_stays_none(monkeypatch):
    here, there, nowhere = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    here.grad = torch.tensor([1.0, 2.0])
    other = torch.tensor([1.0, 1, 1, 0, 5, 6, 7, 8, 0, 0])           # it stops; what it has; its gradients
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda x: x.add_(other))
    assert processes.average_gradients([here, there, nowhere], stopping=False) is True
    assert here.grad.tolist() == [3, 4] and there.grad.tolist() == [3.5, 4] and nowhere.grad is None


def test_each_process_has_the_gpu_of_its_number_on_its_own_machine(monkeypatch):
    for name, value in dict(WORLD=8, RANK=5, LOCAL_WORLD=4, LOCAL_RANK=1).items():
        monkeypatch.setattr(processes, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)                   # join takes it away
    assert processes.join(torch.device("cuda")) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UserError, match="--nproc-per-node 4: each process takes a GPU, and this machine has 3"):
        processes.join(torch.device("cuda"))


def test_several_processes_do_not_choose_a_device_that_torch_cannot_sum_over(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert training.choose_device("auto")[0].type == "mps"
    monkeypatch.setattr(processes, "WORLD", 2)
    assert training.choose_device("auto")[0].type == "cpu"


@pytest.mark.parametrize("local", [0, 1])
def test_the_first_process_of_each_machine_says_what_is_wrong(local, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "RANK", 2)                        # the file lies on the other machine only
    monkeypatch.setattr(processes, "LOCAL_RANK", local)
    code, printed = run_script(train_ae, "--data", tmp_path / "a.npy", "--run", tmp_path / "run", "--device", "cpu")
    assert code == 2 and ("there is no such file" in printed) == (not local), printed


def test_the_losses_that_a_checkpoint_keeps_are_those_of_all_processes(monkeypatch):
    """Of the first process alone, they would be in the log of a resumed run what all of them had."""
    run = training.Run.__new__(training.Run)
    run.first_stage = 0
    run.settings = SimpleNamespace(steps=100, evaluate_every=100, save_every=1e9)
    run.counted, run.losses, run.items, run.flops, run.saved = 0, [], 0, 0, time.perf_counter()
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "sum_over", lambda x: x + others)
    run.count(1, 0, torch.tensor(2.0))
    others = torch.tensor([4.0])
    run.after(5, False, None, dict(loss=None))
    assert run.losses == [3.0]
    run.count(1, 0, torch.tensor(1.0))
    others = torch.tensor([3.0 + 5])                                 # what the mean of all was, and the other's own
    run.after(6, False, None, dict(loss=None))
    assert run.losses == [6.0] and run.counted == 2


def test_all_processes_take_the_precision_of_the_first(monkeypatch):
    monkeypatch.setattr(processes, "agree", lambda value: (torch.bfloat16, 7.0, "measured by the first"))
    settings = SimpleNamespace(device="cpu", precision="float32")
    _, precision, _, peak = training.choose_machine(settings)
    assert (precision, peak, settings.precision) == (torch.bfloat16, 7.0, "bfloat16")
