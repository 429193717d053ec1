"""Nothing is lost: what becomes of a run when its machine fails it. tests/soak.py asks the same at random."""

import importlib
import os
import random
import shutil
import signal
from functools import partial

import forked
import pytest
import soak

from minissl import files, training

SCRIPTS = ["train_mlm", "train_ae", "train_contrastive"]


@pytest.fixture
def command(corpus, tmp_path):
    """command(script) -> (its module, the flags of a run of 12 steps that saves after each)"""
    def of(script):
        flags = "--steps 12 --save-every 0 --evaluate-every 6 --device cpu --precision float32".split()
        if script == "train_mlm":
            flags += ["--data", corpus, "--data-dir", tmp_path / "data"]
            flags += ("--embedding-steps 4 --batch-size 8 --window 32 --width 32 --heads 2 --layers 1 "
                      "--vocabulary-size 400 --pairs 100").split()
        else:
            flags += "--limit 64 --batch-size 16 --width 8".split()
        return importlib.import_module(script), ["--run", tmp_path / "run", *flags]
    return of


def full(descriptor):
    raise OSError(28, "No space left on device")


FAULTS = {"the disk is full": (1, "No space left on device"), "the folder is deleted": (1, "No such file or directory"),
          "a loss is not finite": (2, "the loss is not finite at step 7: start another run"),
          "the weights are not finite": (2, "the weights are not finite at step 7")}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fault_in_the_seventh_step_is_one_sentence_and_costs_no_step_that_was_saved(
        script, fault, command, run_script, tmp_path, monkeypatch):
    module, flags = command(script)
    save, log, run = training.Run.save, training.Run.log, tmp_path / "run"

    def faulty_save(self, step):
        if step == 7 and fault == "the disk is full":
            monkeypatch.setattr(os, "fsync", full)
        if step == 7 and fault == "the folder is deleted":
            shutil.rmtree(self.folder)
        if step == 7 and fault == "the weights are not finite":
            next(self.model.parameters()).data.fill_(float("inf"))
        if step == 7 and fault == "a loss is not finite":
            self.losses = [total * float("nan") for total in self.losses]
            log(self, step, dict(loss=None), {})
        save(self, step)

    monkeypatch.setattr(training.Run, "save", faulty_save)
    code, printed = run_script(module, *flags)
    wanted, sentence = FAULTS[fault]
    assert code == wanted and sentence in printed.splitlines()[-1] and "Traceback" not in printed, printed
    monkeypatch.undo()
    if fault == "the folder is deleted":
        return
    assert not list(run.glob("*.tmp")) and files.load_checkpoint(run)["step"] == 6
    code, printed = run_script(module, "--run", run, "--resume")
    assert code == 0 and "done:" in printed, printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_place_where_nothing_can_be_written_is_one_sentence_before_any_work(
        script, command, run_script, tmp_path, monkeypatch):
    module, flags = command(script)
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    (tmp_path / "locked").mkdir()
    writable = os.access                      # to root everything is, so the answer is given here
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and writable(path, mode))
    for place in "file", "locked":
        code, printed = run_script(module, *flags, "--run", tmp_path / place / "deep" / "run")
        assert code == 2 and f"{place} is no folder that one can write into" in printed, printed
        assert len(printed.splitlines()) == 1, printed
    assert not list((tmp_path / "locked").iterdir())


def die_in_the_fifth_save(moment):
    """Called in the process of a run, before its script."""
    write, saves = os.replace, []

    def replace(temporary, path):
        saves.extend([path] * str(path).endswith("checkpoint.pt"))
        if len(saves) == 5:
            if moment == "half written":
                os.truncate(temporary, os.path.getsize(temporary) // 2)
            if moment == "renamed":
                write(temporary, path)
            os.kill(os.getpid(), signal.SIGKILL)
        write(temporary, path)

    os.replace = replace


@pytest.mark.parametrize("script, moment", [("train_mlm", "half written"), ("train_ae", "written"),
                                            ("train_contrastive", "renamed")])
def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_bytes(script, moment, command, run_script, tmp_path):
    module, flags = command(script)
    assert run_script(module, *flags, "--run", tmp_path / "whole")[0] == 0
    killed = forked.start(tmp_path / "printed", module.__file__, *flags, before=partial(die_in_the_fifth_save, moment))
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "printed").read_text(encoding="utf-8")
    assert files.load_checkpoint(tmp_path / "run")["step"] == (5 if moment == "renamed" else 4)
    code, printed = run_script(module, "--run", tmp_path / "run", "--resume")
    assert code == 0 and soak.same_run(tmp_path / "run", tmp_path / "whole"), printed


# ---------------------------------------------------------------- a small part of the soak program

@pytest.fixture
def damaged(command, run_script, tmp_path):
    """damaged() -> what a few dozen damaged files of each kind came to"""
    for script in ("train_mlm", "train_ae"):
        module, flags = command(script)
        assert run_script(module, *flags, "--run", tmp_path / (script + ".py") / "whole")[0] == 0
    soak.write_texts(tmp_path / "texts")
    return lambda count, kinds=None: soak.damage(tmp_path, count, random.Random(0), kinds)


def test_damaged_files_are_refused_or_harmless(damaged):
    outcomes = damaged(20)
    assert len({kind for kind, _ in outcomes}) == 10 and sum(outcomes.values()) == 200, outcomes
    assert not any(outcome == "wrong" for _, outcome in outcomes), outcomes
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "refused") > 50, outcomes


def test_the_soak_program_finds_a_planted_defect(damaged, monkeypatch):
    soak.plant("trust-cache", monkeypatch.setattr)
    soak.plant("trust-checkpoint", monkeypatch.setattr)
    outcomes = damaged(20, ["checkpoint", "cache tokens"])
    assert outcomes["checkpoint", "wrong"] and outcomes["cache tokens", "wrong"], outcomes
