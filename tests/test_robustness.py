"""Nothing is lost: what becomes of a run when its machine fails.

tests/soak.py asks the same at random.
"""

import importlib
import os
import random
import shutil
import signal
from functools import partial

import forked
import pytest
import soak

from minissl.training import files
from minissl.training.run import Run


SCRIPTS = ["train_mlm", "train_ae", "train_contrastive"]
NAN = float("nan")
INFINITE = float("inf")


@pytest.fixture
def command(corpus, tmp_path):
    """command(script) -> its module, and the flags of a run of 12 steps that saves each."""
    common = "--steps 12 --save-every 0 --evaluate-every 6 --device cpu --precision float32"
    text = (
        "--embedding-steps 4 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 "
        "--vocabulary-size 400 --pairs 100"
    )
    images = "--limit 64 --batch-size 16 --width 8"

    def flags_of(script):
        flags = ["--run", tmp_path / "run", *common.split()]
        if script == "train_mlm":
            flags += ["--data", corpus, "--data-dir", tmp_path / "data", *text.split()]
        else:
            flags += images.split()
        return importlib.import_module(script), flags

    return flags_of


def full(descriptor):
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- faults in a step

FAULTS = {                               # -> the exit code and the end of the output
    "the disk is full": (1, "checkpoint.pt: No space left on device"),
    "the folder is deleted": (1, "checkpoint.pt: No such file or directory"),
    "a loss is not finite": (2, "the loss is not finite at step 7: start another run"),
    "the weights are not finite": (2, "the weights are not finite at step 7"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fault_in_a_step_costs_no_saved_step(
    script, fault, command, run_script, tmp_path, monkeypatch
):
    module, flags = command(script)
    end_step, folder = Run.end_step, tmp_path / "run"

    def end_step_with_fault(self, step, losses, items):
        if step == 6:                    # the seventh step
            if fault == "the disk is full":
                monkeypatch.setattr(os, "fsync", full)
            if fault == "the folder is deleted":
                shutil.rmtree(self.folder)
            if fault == "the weights are not finite":
                next(self.model.parameters()).data.fill_(INFINITE)
            if fault == "a loss is not finite":
                losses = {name: loss * NAN for name, loss in losses.items()}
                self.log_every = 7
        return end_step(self, step, losses, items)

    monkeypatch.setattr(Run, "end_step", end_step_with_fault)
    code, printed = run_script(module, *flags)
    expected_code, sentence = FAULTS[fault]
    assert code == expected_code and "Traceback" not in printed, printed
    assert sentence in printed.splitlines()[-1], printed
    monkeypatch.undo()
    if fault == "the folder is deleted":
        return
    assert not list(folder.glob("*.tmp"))
    assert files.load_checkpoint(folder)["step"] == 6
    code, printed = run_script(module, "--run", folder, "--resume")
    assert code == 0 and "done:" in printed, printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unwritable_place_is_refused_before_any_work(
    script, command, run_script, tmp_path, monkeypatch
):
    module, flags = command(script)
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    (tmp_path / "locked").mkdir()
    access = os.access

    def access_of_a_user(path, mode):    # the superuser may write everywhere
        return "locked" not in str(path) and access(path, mode)

    monkeypatch.setattr(os, "access", access_of_a_user)
    for place in ("file", "locked"):
        run = tmp_path / place / "deep" / "run"
        code, printed = run_script(module, *flags, "--run", run)
        assert code == 2 and f"{place} is not a writable folder" in printed, printed
        assert len(printed.splitlines()) == 1, printed
    assert not list((tmp_path / "locked").iterdir())


# ---------------------------------------------------------------- kills

def die_in_the_fifth_save(moment):
    """Let this process be killed there. To be called before its script runs."""
    replace, saves = os.replace, []

    def replace_or_die(temporary, path):
        if str(path).endswith("checkpoint.pt"):
            saves.append(path)
        if len(saves) == 5:
            if moment == "half written":
                os.truncate(temporary, os.path.getsize(temporary) // 2)
            if moment == "renamed":
                replace(temporary, path)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)

    os.replace = replace_or_die


@pytest.mark.parametrize("script, moment", [
    ("train_mlm", "half written"), ("train_ae", "written"), ("train_contrastive", "renamed"),
])
def test_a_run_killed_in_a_save_resumes_bit_for_bit(
    script, moment, command, run_script, tmp_path
):
    module, flags = command(script)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert run_script(module, *flags, "--run", whole)[0] == 0
    log = tmp_path / "printed"
    die = partial(die_in_the_fifth_save, moment)
    killed = forked.start(log, module.__file__, *flags, before=die)
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, log.read_text(encoding="utf-8")
    saved = 5 if moment == "renamed" else 4
    assert files.load_checkpoint(run)["step"] == saved
    code, printed = run_script(module, "--run", run, "--resume")
    assert code == 0 and soak.same_run(run, whole), printed


# ---------------------------------------------------------------- damaged files

@pytest.fixture
def damaged(command, run_script, tmp_path):
    """damaged(count) -> what became of so many damaged files of each kind"""
    for script in ("train_mlm", "train_ae"):
        module, flags = command(script)
        run = tmp_path / f"{script}.py" / "whole"
        assert run_script(module, *flags, "--run", run)[0] == 0
    soak.write_texts(tmp_path / "texts")

    def damage(count, kinds=None):
        return soak.damage(tmp_path, count, random.Random(0), kinds)

    return damage


def test_damaged_files_are_refused_or_harmless(damaged):
    outcomes = damaged(20)
    kinds = {kind for kind, _ in outcomes}
    assert len(kinds) >= 9 and sum(outcomes.values()) == 20 * len(kinds), outcomes
    assert not any(outcome == "wrong" for _, outcome in outcomes), outcomes
    refused = sum(n for (_, outcome), n in outcomes.items() if outcome == "refused")
    assert refused > 50, outcomes


def test_the_soak_program_finds_a_planted_defect(damaged, monkeypatch):
    soak.plant("trust-cache", monkeypatch.setattr)
    soak.plant("trust-checkpoint", monkeypatch.setattr)
    outcomes = damaged(20, ["checkpoint", "cache tokens"])
    assert outcomes["checkpoint", "wrong"] and outcomes["cache tokens", "wrong"], outcomes
