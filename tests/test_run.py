"""The folder of a run: what is saved and when, the log, signals, and how a run resumes."""

import json
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_equal_states, log_of, read_log
from torch import nn

import finetune
import train_ae
from minissl import UserError
from minissl.data.batches import generator
from minissl.training import distributed, files
from minissl.training import run as run_module
from minissl.training.files import load_checkpoint, write_checkpoint
from minissl.training.run import Run


IMAGES = "--limit 40 --batch-size 16 --width 8 --device cpu --precision float32".split()


@dataclass
class Settings:
    run: str
    resume: bool = False
    steps: int = 6
    evaluate_every: int = 3
    save_every: float = 1e9         # never by the clock
    learning_rate: float = 0.1

    def __post_init__(self):
        self.run = str(self.run)        # the tests give a Path


def no_columns(model):
    return {}


def train(settings, preview=no_columns, before_end=None, log_every=50, data="numbers"):
    """Learn to add two numbers, with all that a script does. Returns the model.

    before_end(run, step), if given, is called before each end_step.
    """
    run = Run(settings)
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    first_step = run.begin(
        model, [optimizer], data=data, method="sum", model_settings={},
        chance=dict(loss=2.0), preview=preview, log_every=log_every,
    )
    for step in range(first_step, settings.steps):
        x = torch.randn(8, 2, generator=generator(0, "numbers", step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if before_end:
            before_end(run, step)
        run.end_step(step, dict(loss=loss), items=8)
    run.finish()
    return model


# ---------------------------------------------------------------- saving

@pytest.fixture
def saved_steps(monkeypatch):
    """The steps at which a checkpoint is written, as a list that grows."""
    steps = []

    def write_and_note(path, state):
        steps.append(state["step"])
        write_checkpoint(path, state)

    monkeypatch.setattr(run_module, "write_checkpoint", write_and_note)
    return steps


@pytest.mark.parametrize("save_every, expected", [
    (1e9, [1, 3, 6]),               # the first, each before its preview, and the last
    (0, [1, 2, 3, 4, 5, 6]),        # the clock has always run out
])
def test_a_run_saves_by_the_clock_and_at_previews(
    save_every, expected, saved_steps, tmp_path
):
    train(Settings(tmp_path / "run", save_every=save_every))
    assert saved_steps == expected


class PreviewWithoutMemory:
    """Fails at the given call."""

    def __init__(self, failing_call):
        self.calls, self.failing_call = 0, failing_call

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.failing_call:
            raise MemoryError
        return dict(found=7)


@pytest.mark.parametrize("failing_call, step", [(1, 3), (2, 6)])
def test_the_state_is_saved_before_a_preview(failing_call, step, tmp_path):
    """After a resumption, the log has the row of that step once, with its preview."""
    folder = tmp_path / "run"
    with pytest.raises(MemoryError):
        train(Settings(folder), PreviewWithoutMemory(failing_call))
    assert load_checkpoint(folder)["step"] == step
    assert str(step) not in [row["step"] for row in read_log(folder)]

    model = train(Settings(folder, resume=True), PreviewWithoutMemory(None))
    undisturbed = train(Settings(tmp_path / "whole"), PreviewWithoutMemory(None))
    assert_equal_states(model.state_dict(), undisturbed.state_dict())
    rows = read_log(folder)
    assert [row["step"] for row in rows] == ["1", "3", "6"]
    assert [row["found"] for row in rows] == ["", "7", "7"]
    assert log_of(folder) == log_of(tmp_path / "whole")


@pytest.mark.parametrize("fail_at", [3, 6])
def test_a_script_whose_preview_fails_resumes(fail_at, run_script, tmp_path, monkeypatch):
    """The same, from the command line."""
    flags = ["--run", tmp_path / "run", *IMAGES]
    preview = train_ae.previews.AutoencoderPreview.__call__
    calls = []

    def fail_once(self, model):
        calls.append(model)
        if 3 * len(calls) == fail_at:
            raise MemoryError
        return preview(self, model)

    monkeypatch.setattr(train_ae.previews.AutoencoderPreview, "__call__", fail_once)
    code, printed = run_script(train_ae, *flags, "--steps", 6, "--evaluate-every", 3)
    assert code == 1
    assert "not enough memory" in printed
    assert load_checkpoint(tmp_path / "run")["step"] == fail_at
    code, printed = run_script(train_ae, "--run", tmp_path / "run", "--resume")
    assert code == 0, printed
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["1", "3", "6"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    def spoil(run, step):
        if step == 3:
            run.losses["loss"] = torch.tensor(float("nan"))

    with pytest.raises(UserError, match="the loss is not finite at step 6"):
        train(Settings(tmp_path / "run"), before_end=spoil)
    assert load_checkpoint(tmp_path / "run")["step"] == 3     # the last good one


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(value, tmp_path):
    def spoil(run, step):
        if step == 5:
            run.model.bias.data.fill_(value)

    with pytest.raises(UserError, match="the weights are not finite at step 6"):
        train(Settings(tmp_path / "run"), before_end=spoil)
    assert load_checkpoint(tmp_path / "run")["step"] == 3


def test_config_holds_a_command_that_can_be_pasted(tmp_path, monkeypatch):
    folder = tmp_path / "a name with spaces"
    monkeypatch.setattr(sys, "argv", ["train.py", "--run", str(folder)])
    settings = Settings(str(folder))
    train(settings)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert shlex.split(config["command"]) == ["python", "train.py", "--run", str(folder)]
    assert config["settings"]["steps"] == 6
    assert config["torch"] == torch.__version__


# ---------------------------------------------------------------- the log

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still. clock.now is the time in seconds."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    clock.strftime = run_module.time.strftime
    monkeypatch.setattr(run_module, "time", clock)
    return clock


def test_a_row_is_about_the_steps_since_the_last_row(clock, tmp_path, capsys):
    """39 steps of 0.5 s, then 40 steps of 0.25 s, each with 8 numbers."""
    run = Run(Settings(tmp_path / "run", steps=200, evaluate_every=1000))
    run.begin(
        nn.Linear(1, 1), [], data="", method="", model_settings={}, chance=dict(loss=None),
        preview=no_columns, log_every=40,
    )
    printed = {}
    for step in range(80):
        clock.now += 0.5 if step < 40 else 0.25
        run.end_step(step, dict(loss=torch.tensor(float(step))), items=8)
        printed[step + 1] = capsys.readouterr().out
    _, second, third = run.rows
    assert [row["step"] for row in run.rows] == [1, 40, 80]
    assert [row["seconds"] for row in run.rows] == [0.5, 20, 30]
    assert second["loss"] == sum(range(1, 40)) / 39
    assert third["loss"] == sum(range(40, 80)) / 40
    assert second["rate_per_second"] == 8 / 0.5
    assert third["rate_per_second"] == 8 / 0.25
    assert "1.3 min left" in printed[40]                      # 160 steps in 80 s
    assert "0.5 min left" in printed[80]                      # 120 steps in 30 s
    assert printed[41] == ""


def test_a_preview_is_in_evaluation_mode_and_not_in_the_rate(clock, tmp_path):
    modes = []

    def slow_preview(model):
        clock.now += 100
        modes.append(model.training)
        return dict(knn=50)

    def take_a_second(run, step):
        modes.append(run.model.training)
        clock.now += 1

    train(Settings(tmp_path / "run"), slow_preview, take_a_second)
    assert modes == [True, True, True, False, True, True, True, False]
    rows = read_log(tmp_path / "run")
    assert [row["rate_per_second"] for row in rows] == ["8", "8", "8"]
    assert [row["knn"] for row in rows] == ["", "50", "50"]


def test_a_loss_stands_beside_its_chance_level(tmp_path, capsys):
    train(Settings(tmp_path / "run"))
    assert "(chance 2)" in capsys.readouterr().out


# ---------------------------------------------------------------- resuming

def stop_at(step_to_stop):
    def stop(run, step):
        run.stopping = step == step_to_stop                   # as a signal does
    return stop


@pytest.mark.parametrize("done", [1, 2, 3])      # with a row, without one, with a preview
def test_a_stopped_run_ends_like_an_undisturbed_one(done, tmp_path):
    """Its log has each row once, with the losses of all steps since the row before."""
    whole = train(Settings(tmp_path / "whole"))
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {done} and saved"):
        train(Settings(folder), before_end=stop_at(done - 1))
    resumed = train(Settings(folder, resume=True))
    assert_equal_states(resumed.state_dict(), whole.state_dict())
    assert log_of(folder) == log_of(tmp_path / "whole")


def test_rows_behind_the_checkpoint_are_dropped(tmp_path):
    """Killed after a row was logged and before it was saved: the step is made again."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(Settings(folder), before_end=stop_at(1))
    log = (folder / "metrics.csv").read_text(encoding="utf-8")
    row_of_step_1 = log.splitlines()[1]
    later = re.sub(r"^1,[\d.]+", "3,9999.0", row_of_step_1)
    (folder / "metrics.csv").write_text(f"{log}{later}\n", encoding="utf-8")
    train(Settings(folder, resume=True))
    rows = read_log(folder)
    assert [row["step"] for row in rows] == ["1", "3", "6"]
    assert float(rows[-1]["seconds"]) < 9999


def test_the_clock_of_a_resumed_run_goes_on(clock, tmp_path, capsys):
    def take_a_second(run, step):
        clock.now += 1
        run.stopping = step == 2

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(Settings(folder), before_end=take_a_second)
    clock.now += 1000                                         # a night in between
    capsys.readouterr()
    settings = Settings(folder, resume=True, steps=63, evaluate_every=30)
    train(settings, before_end=take_a_second)
    assert [row["seconds"] for row in read_log(folder)][:3] == ["1.0", "3.0", "30.0"]
    first_line = capsys.readouterr().out.splitlines()[1]
    assert first_line.startswith("step 30/63")
    assert "0.6 min left" in first_line                       # 33 steps of a second


def test_another_data_set_is_refused(tmp_path):
    train(Settings(tmp_path / "run"))
    with pytest.raises(UserError, match="learned from numbers, but the data is now others"):
        train(Settings(tmp_path / "run", resume=True, steps=7), data="others")


@pytest.mark.parametrize("part, damaged_part", [
    ("step,", "\0step,"),
    ("seconds", "hours"),
    ("\n1,", "\nx,"),                                         # not a number
    ("\n6,", "\n6\n6,"),                                      # a line that is torn
    ("\n3,", "\n3,1,2,3,4,5,6,7,8\n3,"),                      # a line that is too long
    (".", ".x."),                                             # not a number elsewhere
    ("step,seconds", "step;seconds"),
])
def test_a_log_that_cannot_be_read_stops_a_resumption(part, damaged_part, tmp_path):
    settings = Settings(tmp_path / "run", resume=True, steps=7)
    train(Settings(tmp_path / "run"))
    path = tmp_path / "run" / "metrics.csv"
    damaged = path.read_text(encoding="utf-8").replace(part, damaged_part, 1)
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read as the log of a run"):
        train(settings)
    assert path.read_text(encoding="utf-8") == damaged        # nothing is lost
    path.unlink()                                             # as the sentence says
    train(settings)
    assert read_log(tmp_path / "run")[-1]["step"] == "7"


@pytest.mark.parametrize("content, sentence", [
    ("", "it has no rows"),
    ("step,seconds,loss\n", "it has no rows"),
    ("step;seconds;loss\n1;0.1;2\n", "it has no column step; saved by a spreadsheet"),
    ("step,seconds,loss\n1,0.1\n", "row 1 has too few values"),
])
def test_a_log_with_missing_values_is_damaged(content, sentence, tmp_path):
    train(Settings(tmp_path / "run"))
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{sentence}.*; move it away to continue"):
        train(Settings(tmp_path / "run", resume=True, steps=7))
    assert path.read_text(encoding="utf-8") == content


def test_a_log_that_a_spreadsheet_has_saved_is_read(tmp_path):
    train(Settings(tmp_path / "run"))
    path = tmp_path / "run" / "metrics.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    train(Settings(tmp_path / "run", resume=True, steps=7))
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["1", "3", "6", "7"]


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("number, advice", [
    (signal.SIGINT, "press Ctrl-C again to stop at once"),
    (signal.SIGTERM, "send the signal again to stop at once"),
])
def test_a_signal_stops_a_run_after_its_step(number, advice, tmp_path, capsys):
    before, after_the_signal = signal.getsignal(number), []

    def interrupt(run, step):
        if step == 1:
            signal.raise_signal(number)
            after_the_signal.append(signal.getsignal(number))

    with pytest.raises(KeyboardInterrupt) as stop:
        train(Settings(tmp_path / "run"), before_end=interrupt)
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert f"--run {tmp_path / 'run'} --resume" in str(stop.value)
    assert advice in capsys.readouterr().err
    assert after_the_signal == [signal.SIG_DFL]               # so a second one ends at once
    assert signal.getsignal(number) == before                 # in a notebook, for example


def test_after_the_last_step_ctrl_c_is_what_it_was(tmp_path):
    """A table that follows the training can then be stopped at once."""
    before = signal.getsignal(signal.SIGINT)
    during = []
    train(Settings(tmp_path / "run"),
          before_end=lambda run, step: during.append(signal.getsignal(signal.SIGINT)))
    assert before not in during
    assert signal.getsignal(signal.SIGINT) == before


def test_a_stopped_script_ends_with_code_130(run_script, tmp_path, monkeypatch):
    end_step = Run.end_step

    def interrupt(self, step, losses, items):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        end_step(self, step, losses, items)

    monkeypatch.setattr(Run, "end_step", interrupt)
    flags = ["--run", tmp_path / "run", *IMAGES, "--steps", 9, "--evaluate-every", 9]
    code, printed = run_script(train_ae, *flags)
    assert code == 130
    assert "stopped after step 4 and saved; continue with: python train_ae.py" in printed
    assert load_checkpoint(tmp_path / "run")["step"] == 4


# ---------------------------------------------------------------- the folder

def test_two_processes_cannot_train_into_one_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    train(Settings(folder))
    files.lock(tmp_path)                                      # this process leaves the run
    with open(folder / "lock", "w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training into"):
            train(Settings(folder, resume=True, steps=7))
    train(Settings(folder, resume=True, steps=7))


def remove_method(checkpoint):
    del checkpoint["method"]


def remove_a_weight(checkpoint):
    del checkpoint["model"]["mean"]


def resize_a_weight(checkpoint):
    checkpoint["model"]["mean"] = torch.zeros(5, 1, 1)


def replace_all_weights(checkpoint):
    checkpoint["model"] = [1, 2]


def change_a_model_setting(checkpoint):
    checkpoint["model_settings"]["code"] = "x"


def add_a_model_setting(checkpoint):
    checkpoint["model_settings"]["more"] = 1


@pytest.fixture(scope="module")
def image_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run of images") / "run"
    with pytest.MonkeyPatch.context() as patch:
        command = ["train_ae.py", "--run", str(folder), *IMAGES, "--steps", "1"]
        patch.setattr(sys, "argv", command)
        train_ae.main()
    return folder / "checkpoint.pt"


@pytest.mark.parametrize("change", [
    remove_method, remove_a_weight, resize_a_weight, replace_all_weights,
    change_a_model_setting, add_a_model_setting,
])
def test_a_checkpoint_with_other_content_is_a_sentence(
    change, image_checkpoint, run_script, tmp_path
):
    checkpoint = load_checkpoint(image_checkpoint.parent)
    change(checkpoint)
    write_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    code, printed = run_script(finetune, tmp_path)
    assert code == 2
    assert "does not hold what it should" in printed
    assert "Traceback" not in printed


def test_the_advice_starts_as_many_processes_as_before(monkeypatch):
    assert run_module.launcher() == ["python"]
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 2)
    assert run_module.launcher() == ["torchrun", "--nproc-per-node", "2", "--"]
