"""Several processes make the step of one: by gradient, and by the scripts themselves."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import read_log
from torch import nn

import train_ae
import train_contrastive
import train_mlm
from minissl import UserError
from minissl.data.batches import Batches, WholeTexts
from minissl.data.texts import encode_texts
from minissl.tokenizer import train_tokenizer
from minissl.training import distributed, machine, settings
from minissl.training.files import load_checkpoint
from minissl.training.run import Run


ROOT = Path(__file__).resolve().parents[1]

IMAGES = (
    "--limit 200 --steps 6 --batch-size 16 --width 8 --evaluate-every 3 "
    "--device cpu --precision float32"
).split()
TEXT = (
    "--steps 12 --embedding-steps 6 --batch-size 8 --window 32 --width 32 --heads 2 "
    "--layers 1 --vocabulary-size 400 --pairs 100 --evaluate-every 6 "
    "--device cpu --precision float32"
).split()


# ---------------------------------------------------------------- real processes

def start_workers(n, log, script, *arguments):
    """Start n processes in torchrun's environment, but faster. They print into `log`."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    workers = []
    for rank in range(n):
        environment = dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n),
            LOCAL_WORLD_SIZE=str(n),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        workers.append(forked.start(log, script, *arguments, **environment))
    return workers


def run_workers(n, log, script, *arguments):
    """Run n processes to their end. Returns their exit codes and what they printed."""
    workers = start_workers(n, log, script, *arguments)
    for worker in workers:
        worker.join(120)
    codes = [worker.exitcode for worker in workers]
    return codes, log.read_text(encoding="utf-8")


def wait_for(path):
    end = time.time() + 60
    while not path.exists() and time.time() < end:
        time.sleep(0.1)
    assert path.exists()


@pytest.mark.parametrize("n", [2, 4])
def test_loss_and_gradients_of_n_processes_are_those_of_one(n, tmp_path):
    # See check_distributed.py. Among its batches are three windows and a single window,
    # which leaves all processes but one without any.
    codes, printed = run_workers(n, tmp_path / "printed", ROOT / "tests/check_distributed.py")
    assert codes == n * [0], printed
    for name in ("simclr", "byol", "autoencoder", "whole texts", "3 windows", "1 windows"):
        assert f"{name}: loss" in printed, printed


def assert_nearly_equal_models(one, other):
    for name, value in one.items():
        if value.is_floating_point():
            difference = (value - other[name]).norm()
            assert difference <= 0.03 * value.norm() + 1e-3, name


@pytest.mark.parametrize("script, loss", [(train_contrastive, "loss"), (train_mlm, "document")])
def test_a_script_learns_the_same_in_two_processes(script, loss, corpus, run_script, tmp_path):
    flags = IMAGES
    if script is train_mlm:
        flags = [*TEXT, "--data", corpus, "--data-dir", tmp_path]
    code, printed = run_script(script, "--run", tmp_path / "1", *flags)
    assert code == 0, printed
    log = tmp_path / "printed"
    codes, printed = run_workers(2, log, script.__file__, "--run", tmp_path / "2", *flags)
    assert codes == [0, 0], printed
    assert printed.count("done:") == 1               # one process writes

    one, two = load_checkpoint(tmp_path / "1"), load_checkpoint(tmp_path / "2")
    assert_nearly_equal_models(one["model"], two["model"])
    losses_of_one = [float(row[loss]) for row in read_log(tmp_path / "1")]
    losses_of_two = [float(row[loss]) for row in read_log(tmp_path / "2")]
    assert losses_of_one == pytest.approx(losses_of_two, rel=2e-3)


def test_ctrl_c_saves_once_and_one_process_continues(run_script, tmp_path):
    flags = ["--run", tmp_path / "run", *IMAGES, "--steps", 100_000]
    flags += ["--evaluate-every", 100_000]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", 2, "--", "train_ae.py", *flags]
    running = subprocess.Popen(
        [str(part) for part in torchrun],
        cwd=ROOT, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    wait_for(tmp_path / "run" / "metrics.csv")
    running.send_signal(signal.SIGINT)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode != 0, printed
    step = load_checkpoint(tmp_path / "run")["step"]
    assert printed.count("stopped after step") == 1, printed
    assert f"stopped after step {step:,} and saved" in printed, printed

    code, printed = run_script(train_ae, *flags, "--steps", step + 2, "--resume")
    assert code == 0, printed
    assert f"step {step + 2:,}/" in printed


def test_when_a_process_dies_the_other_ends_with_a_sentence(tmp_path):
    log = tmp_path / "printed"
    flags = ["--run", tmp_path / "run", *IMAGES, "--steps", 100_000]
    first, second = start_workers(2, log, train_ae.__file__, *flags)
    wait_for(tmp_path / "run" / "metrics.csv")
    second.kill()
    first.join(60)
    printed = log.read_text(encoding="utf-8")
    assert first.exitcode == 1, printed
    assert "another process has ended" in printed.splitlines()[-1], printed
    assert "Traceback" not in printed, printed


def test_more_processes_than_texts_end_before_the_first_step(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("The ship sails and the storm sinks the ship. " * 9, encoding="utf-8")
    log, flags = tmp_path / "printed", ["--data", text, "--data-dir", tmp_path / "data"]
    flags += ["--run", tmp_path / "run", *TEXT, "--batch-size", 1, "--vocabulary-size", 300]
    codes, printed = run_workers(2, log, train_mlm.__file__, *flags)
    assert codes == [2, 2], printed
    assert printed.count("too little text: found 1 text for 2 processes") == 1, printed
    assert "--resume" not in printed                 # there is no checkpoint to resume from
    assert not (tmp_path / "run").exists()


def test_a_left_over_WORLD_SIZE_ends_a_script_with_a_sentence(tmp_path):
    log = tmp_path / "printed"
    flags = ["--run", tmp_path / "run", *IMAGES]
    process = forked.start(log, train_ae.__file__, *flags, WORLD_SIZE="2")
    process.join(60)
    printed = log.read_text(encoding="utf-8")
    assert process.exitcode == 2, printed
    assert "WORLD_SIZE=2 is set in the environment" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_waiting_is_announced_and_ended_by_ctrl_c(tmp_path):
    # All variables are left over, and nobody else comes.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    left_over = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    left_over.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log, flags = tmp_path / "printed", ["--run", tmp_path / "run", *IMAGES]
    process = forked.start(log, train_ae.__file__, *flags, **left_over)
    end = time.time() + 60
    while "waiting" not in read_if_there(log) and time.time() < end:
        time.sleep(0.1)
    time.sleep(1)                                    # until torch waits
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert log.read_text(encoding="utf-8").startswith(
        "waiting for 1 other process, because WORLD_SIZE=2 is set; if you did not use torchrun"
    )


def read_if_there(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


# ---------------------------------------------------------------- the environment

TORCHRUN = dict(
    RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2",
    MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
)


def test_the_variables_of_torchrun_are_read():
    assert distributed.read_environment(TORCHRUN) == [3, 4, 1, 2]


@pytest.mark.parametrize("environment", [{}, dict(WORLD_SIZE=""), dict(RANK="1")])
def test_without_WORLD_SIZE_there_is_one_process(environment):
    assert distributed.read_environment(environment) == [0, 1, 0, 1]


@pytest.mark.parametrize("change, sentence", [
    (dict(RANK=None), "WORLD_SIZE=4 is set in the environment, but RANK is not set"),
    (dict(LOCAL_RANK=""), "WORLD_SIZE=4 is set .*, but LOCAL_RANK is not set"),
    (dict(LOCAL_WORLD_SIZE="two"), "but LOCAL_WORLD_SIZE is 'two'"),
    (dict(WORLD_SIZE="-1"), "WORLD_SIZE=-1 in the environment is not a number of processes"),
    (dict(MASTER_ADDR=None), "WORLD_SIZE=4 is set .*, but MASTER_ADDR is not set"),
    (dict(MASTER_PORT=None), "WORLD_SIZE=4 is set .*, but MASTER_PORT is not set"),
    (dict(MASTER_PORT="abc"), "WORLD_SIZE=4 is set .*, but MASTER_PORT is 'abc'"),
    (dict(MASTER_PORT="65536"), "WORLD_SIZE=4 is set .*, but MASTER_PORT is '65536'"),
    (dict(RANK="4"), "RANK=4 in the environment does not fit WORLD_SIZE=4"),
    (dict(RANK="0", WORLD_SIZE="0"), "RANK=0 in the environment does not fit WORLD_SIZE=0"),
])
def test_left_over_variables_get_a_sentence_that_names_them(change, sentence):
    environment = {}
    for name, value in {**TORCHRUN, **change}.items():
        if value is not None:
            environment[name] = value
    with pytest.raises(UserError, match=sentence) as error:
        distributed.read_environment(environment)
    assert "start the script with torchrun, or unset" in str(error.value)


# ---------------------------------------------------------------- shares of a batch

def be_one_of(n, monkeypatch, rank=0):
    """Let the functions believe that this is one of n processes."""
    monkeypatch.setattr(distributed, "WORLD_SIZE", n)
    monkeypatch.setattr(distributed, "RANK", rank)


@pytest.mark.parametrize("rows, sizes", [(16, [8, 8]), (3, [2, 1]), (1, [1, 0])])
def test_shares_are_dealt_out_in_order(rows, sizes, monkeypatch):
    tokens, lengths = torch.arange(3 * rows).view(rows, 3), torch.arange(rows)
    shares = []
    for rank in (0, 1):
        be_one_of(2, monkeypatch, rank)
        own_tokens, own_lengths = distributed.shard(tokens, lengths)
        assert torch.equal(own_tokens, tokens[own_lengths])          # the same rows of both
        shares.append(own_lengths)
    assert [len(share) for share in shares] == sizes
    assert torch.equal(torch.cat(shares), lengths)


def test_a_batch_of_images_must_be_divisible(monkeypatch):
    be_one_of(2, monkeypatch)
    Batches(100, 16, 0, "order")
    with pytest.raises(UserError, match="--batch-size 15: must be divisible by the 2 processes"):
        Batches(100, 15, 0, "order")
    assert len(Batches(100, 15, 0, "order", equal_shares=False)(0)) == 15


def test_more_processes_than_texts_get_a_sentence(monkeypatch):
    paragraph = "The ship sails and the storm sinks the ship."
    one_text = encode_texts([paragraph], train_tokenizer([paragraph], 262))
    assert len(WholeTexts(one_text, 8, 0)(0)) == 2   # a single process reads one text
    be_one_of(2, monkeypatch)
    sentence = "too little text: found 1 text for 2 processes; give more text"
    with pytest.raises(UserError, match=sentence):
        WholeTexts(one_text, 8, 0)


# ---------------------------------------------------------------- one after the other

@pytest.mark.parametrize("rank, expected", [(0, ["block", "barrier"]), (1, ["barrier", "block"])])
def test_the_first_process_goes_before_the_others(rank, expected, monkeypatch):
    order = []
    be_one_of(2, monkeypatch, rank)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: order.append("barrier"))
    with distributed.main_process_first():
        order.append("block")
    assert order == expected


@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_first_process_of_each_machine_says_what_is_wrong(local_rank, monkeypatch, capsys):
    # On two machines the file may exist on one of them only.
    monkeypatch.setattr(distributed, "RANK", 2)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_RANK", local_rank)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")         # torchrun's default
    with pytest.raises(SystemExit) as end:
        settings.end_script(2, "a.npy: file not found", once=True)
    assert end.value.code == 2
    assert ("a.npy" in capsys.readouterr().err) == (local_rank == 0)


def test_a_left_over_LOCAL_RANK_does_not_silence(run_script, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 1)
    flags = ["--data", tmp_path / "a.npy", "--run", tmp_path / "run", "--device", "cpu"]
    code, printed = run_script(train_ae, *flags)
    assert code == 2
    assert "a.npy" in printed
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert not distributed.is_silent()                        # nothing has started another
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    assert distributed.is_silent()


# ---------------------------------------------------------------- gradients and losses

def add_from_another_process(values, monkeypatch):
    """Let the next sums over two processes add `values`, which the other one sends."""
    def all_reduce(x):
        x.add_(torch.tensor(values))
    be_one_of(2, monkeypatch)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)


def test_a_gradient_that_no_process_has_stays_none(monkeypatch):
    model = nn.Module()
    model.of_this = nn.Parameter(torch.zeros(2))
    model.of_the_other = nn.Parameter(torch.zeros(2))
    model.of_none = nn.Parameter(torch.zeros(2))
    model.of_this.grad = torch.tensor([1.0, 2.0])
    used, gradients = [1.0, 1, 0], [5.0, 6, 7, 8, 0, 0]
    add_from_another_process([*used, *gradients], monkeypatch)
    distributed.average_gradients(model)
    assert model.of_this.grad.tolist() == [3, 4]
    assert model.of_the_other.grad.tolist() == [3.5, 4]
    assert model.of_none.grad is None


@dataclass
class Settings:
    run: str
    resume: bool = False
    steps: int = 100
    evaluate_every: int = 100
    save_every: float = 0


def begin_run(folder):
    run = Run(Settings(run=str(folder)))
    run.begin(
        nn.Linear(1, 1), [], data="", method="", model_settings={},
        chance=dict(loss=None), preview=dict,
    )
    return run


def test_a_checkpoint_keeps_the_losses_of_all_processes(monkeypatch, tmp_path):
    # With the losses of the first process alone, the log of a resumed run would differ.
    run = begin_run(tmp_path / "run")
    add_from_another_process([4.0, 0, 9], monkeypatch)     # its loss, that it goes on, its items
    run.end_step(0, dict(loss=torch.tensor(2.0)), items=5)
    assert run.rows[0]["loss"] == 3
    run.end_step(1, dict(loss=torch.tensor(2.0)), items=5)
    assert run.items == 5 + 9
    unlogged = load_checkpoint(tmp_path / "run")["unlogged"]
    assert unlogged == dict(steps=1, losses=dict(loss=3.0))


def test_one_process_that_stops_stops_all(monkeypatch, tmp_path):
    run = begin_run(tmp_path / "run")
    add_from_another_process([4.0, 1, 9], monkeypatch)     # it has received a signal
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1 and saved"):
        run.end_step(0, dict(loss=torch.tensor(2.0)), items=5)
    assert load_checkpoint(tmp_path / "run")["step"] == 1


# ---------------------------------------------------------------- devices

def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    for name, value in dict(WORLD_SIZE=8, RANK=5, LOCAL_WORLD_SIZE=4, LOCAL_RANK=1).items():
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "stdout", sys.stdout)         # join takes it away
    assert distributed.join(torch.device("cuda")) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    sentence = "--nproc-per-node 4: this machine has 3 GPUs, and each process needs one"
    with pytest.raises(UserError, match=sentence):
        distributed.join(torch.device("cuda"))


def test_several_processes_do_not_choose_mps(monkeypatch):
    # torch cannot sum over processes there.
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose_device("auto")[0].type == "mps"
    be_one_of(2, monkeypatch)
    assert machine.choose_device("auto")[0].type == "cpu"


def test_all_processes_take_the_precision_of_the_first(monkeypatch):
    def broadcast(value):
        return torch.bfloat16, "measured by the first"
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    settings = SimpleNamespace(device="cpu", precision="float32")
    _, precision, _ = machine.choose_machine(settings)
    assert precision == torch.bfloat16
    assert settings.precision == "bfloat16"
