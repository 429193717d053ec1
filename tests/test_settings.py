"""Flags from a dataclass, mistakes as sentences, and scripts that start anywhere."""

import importlib
import io
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from minissl import UserError
from minissl.training import files, settings


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Settings:
    steps: int = 10  # how many
    rate: float = 0.5  # how fast, in 100 % of something
    kind: Literal["a", "b"] = "a"  # one of two
    on: bool = False  # a switch
    data: str = "shapes"  # a name or a path
    answer: str = ""  # a file, or nothing
    rows: list[str] = field(default_factory=list)  # some names


def read(*flags, cls=Settings):
    return settings.read_settings(cls, "What it is.", list(flags))


# ---------------------------------------------------------------- flags

def test_flags_come_from_the_fields():
    assert read() == Settings()
    flags = "--steps 3 --rate 2 --kind b --on --data x --answer y --rows 1 all".split()
    assert read(*flags) == Settings(3, 2.0, "b", True, "x", "y", ["1", "all"])


def test_help_comes_from_the_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for part in (
        "What it is.", "how many (default 10)", "how fast, in 100 % of something",
        "{a,b}", "--answer ANSWER", "a switch",
    ):
        assert part in printed
    assert printed.count("(default") == 4             # not for a switch, "" and []


def test_a_class_without_source_has_flags_without_help(monkeypatch):
    def no_source(cls):
        raise OSError("could not get source code")        # a class typed into a notebook

    monkeypatch.setattr(settings.inspect, "getsource", no_source)
    assert read("--steps", "3") == Settings(3)


@pytest.mark.parametrize("flags, sentence", [
    (["--step", "3"], "unrecognized arguments: --step 3 (see --help)"),
    (["--steps", "x"], "--steps: 'x' is not a whole number (see --help)"),
    (["--steps", "1.5"], "--steps: '1.5' is not a whole number (see --help)"),
    (["--rate", "x"], "--rate: 'x' is not a number (see --help)"),
    (["--kind", "c"], "--kind: 'c' is not one of a, b (see --help)"),
    (["--steps"], "--steps: expected one argument (see --help)"),
    (["stray"], "unrecognized arguments: stray (see --help)"),
    (["--on=True"], "--on takes no value (see --help)"),
])
def test_a_wrong_flag_is_one_sentence_and_code_2(flags, sentence, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    with pytest.raises(SystemExit) as stop:
        settings.run_script(lambda: settings.read_settings(Settings, ""))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"script.py: {sentence}\n"


@pytest.mark.parametrize("text", [str(2**63), str(-2**63 - 1), "9" * 100])
def test_a_number_of_more_than_64_bits_is_refused(text):
    with pytest.raises(UserError, match=r"--steps: .*must be from -2\*\*63 to 2\*\*63 - 1"):
        read("--steps", text)
    assert read("--steps", str(2**63 - 1)).steps == 2**63 - 1
    assert read(f"--steps={-2**63}").steps == -2**63


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999"])
def test_a_number_that_is_not_finite_is_refused(text):
    with pytest.raises(UserError, match="--rate: .*must be a finite number"):
        read(f"--rate={text}")


@pytest.mark.parametrize("flag", ["--data", "--answer", "--rows"])
@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_an_empty_value_is_refused_for_every_text(flag, value):
    with pytest.raises(UserError, match=f"{flag}: the value is empty"):
        read(flag, value)
    with pytest.raises(UserError, match=f"{flag}: the value is empty"):
        read(f"{flag}={value}")


def test_a_stray_path_is_taken_for_data(tmp_path):
    stray = tmp_path / "my images.npy"
    stray.touch()
    with pytest.raises(UserError, match=f"did you mean --data {re.escape(str(stray))}\\?"):
        read(str(stray))
    with pytest.raises(UserError, match=r"^unrecognized arguments: \S+ \(see --help\)$"):
        read("runs/mlm", str(tmp_path), cls=OfARun)   # it has no --data
    with pytest.raises(UserError, match="^unrecognized arguments: long"):
        read("long" * 100)                            # too long for the name of a file


def test_a_tilde_is_the_home_in_every_text(monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, "home")
    found = read("--data=~/a.npy", "--answer", "a~b", "--rows", "~/b", "c")
    assert found.data == "home/a.npy"
    assert found.answer == "a~b"
    assert found.rows == ["home/b", "c"]
    assert read("~/run", cls=OfARun).folder == "home/run"


@dataclass
class OfARun:
    folder: str  # the folder of a run
    labels: list[str] = field(default_factory=list)  # some numbers


def test_an_empty_first_argument_is_refused():
    with pytest.raises(UserError, match="FOLDER: the value is empty"):
        read("", cls=OfARun)


def test_a_list_that_took_the_argument_is_explained():
    assert read("runs/mlm", "--labels", "5", "10", cls=OfARun).labels == ["5", "10"]
    with pytest.raises(UserError, match="FOLDER is missing: give it before all flags"):
        read("--labels", "5", "runs/mlm", cls=OfARun)


@pytest.mark.parametrize("require, words, beyond", [
    (settings.require_at_least, "at least", 3),
    (settings.require_at_most, "at most", 1),
])
def test_a_bound_refuses_what_lies_beyond_it_and_nan(require, words, beyond):
    some = SimpleNamespace(batch_size=2, rate=float("nan"))
    require(some, 2, "batch_size")
    with pytest.raises(UserError, match=f"--batch-size 2: must be {words} {beyond}"):
        require(some, beyond, "batch_size")
    with pytest.raises(UserError, match=f"--rate nan: must be {words} 0"):
        require(some, 0, "rate")


# ---------------------------------------------------------------- resuming

@dataclass
class InStages:
    run: str = "runs/none"  # the run's folder
    resume: bool = False  # continue it
    steps: int = 100  # in all
    first: int = -1  # steps of the first stage; below 0: a third
    width: int = 4  # must be even

    def __post_init__(self):
        if self.first < 0:
            self.first = self.steps // 3
        if self.first >= self.steps:
            raise UserError(f"--first {self.first}: must be below --steps {self.steps}")
        if self.width % 2:
            raise UserError(f"--width {self.width}: must be even")


@pytest.fixture
def resume(tmp_path):
    """resume(flags) -> settings, for a run of 60 steps that was stopped after some."""
    def resume_after(done, *flags):
        stored = vars(InStages(run="elsewhere", steps=60, width=8))
        state = dict(format=files.CHECKPOINT_FORMAT, step=done, settings=stored)
        files.write_checkpoint(tmp_path / "checkpoint.pt", state)
        return read("--run", str(tmp_path), "--resume", *flags, cls=InStages)
    return resume_after


def test_resuming_keeps_the_stored_settings(resume, tmp_path):
    assert resume(30) == InStages(str(tmp_path), True, steps=60, first=20, width=8)
    assert resume(60, "--steps", "90") == InStages(str(tmp_path), True, 90, 20, 8)


def test_fewer_steps_than_are_made_names_steps(resume, tmp_path):
    with pytest.raises(UserError) as caught:
        resume(60, "--steps", "15")
    assert str(caught.value) == (
        f"--steps 15: {tmp_path} has already made 60 steps; give at least 60"
    )


def test_a_stored_setting_is_not_blamed_for_a_given_one(resume):
    with pytest.raises(UserError, match="^--steps 15: does not fit the run in .*--first 20"):
        resume(5, "--steps", "15")
    with pytest.raises(UserError, match="^--width 3: must be even$"):
        resume(5, "--width", "3")


@pytest.mark.parametrize("state", [
    dict(step=5), dict(step="x", settings={}), dict(settings={}),
])
def test_a_checkpoint_without_settings_is_a_sentence(state, tmp_path):
    state = dict(format=files.CHECKPOINT_FORMAT, **state)
    files.write_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UserError, match="does not hold what it should"):
        read("--run", str(tmp_path), "--resume", cls=InStages)


# ---------------------------------------------------------------- starting and ending

def run_python(code, redirection):
    """Run a program that calls run_script(main), through a shell. -> code, out, err"""
    program = f"import sys\nfrom minissl.training.settings import run_script\n{code}"
    shell = f'set -o pipefail; "$0" -c "$1" {redirection}'
    command = ["bash", "-c", shell, sys.executable, program]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    return done.returncode, done.stdout, done.stderr


MANY_LINES = """
def main():
    for n in range(100_000):
        print("a line that nobody reads", n)
run_script(main)
"""
FEW_LINES = """
def main():
    print("a line that is still in the buffer when main ends")
run_script(main)
"""


HELP = """
def main():
    print("what argparse prints for --help")
    sys.exit(0)
run_script(main)
"""


def test_a_reader_that_leaves_ends_it_quietly():
    assert run_python(MANY_LINES, "| head -n 1") == (
        141, "a line that nobody reads 0\n", ""
    )
    assert run_python(FEW_LINES, "| true") == (141, "", "")
    assert run_python(HELP, "| true") == (0, "", "")


def test_output_without_room_is_a_sentence():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    exit_code, _, err = run_python(FEW_LINES, "> /dev/full")
    assert exit_code == 1 and err == (
        "-c: No space left on device; the disk is full: free some space, then start again\n"
    )


def test_scripts_run_with_closed_streams(tmp_path):
    code = f"""
from minissl.training.files import progress, write_atomically
def main():
    print("to nobody")
    progress("to nobody", end="\\n")
    write_atomically({str(tmp_path / "done")!r}, b"whole")
run_script(main)
"""
    exit_code, _, _ = run_python(code, "<&- >&- 2>&-")
    assert exit_code == 0 and (tmp_path / "done").read_bytes() == b"whole"


class NotebookStream(io.TextIOBase):
    """What notebooks put in place of stdout: no reconfigure, no fileno."""
    written = ""

    def write(self, text):
        self.written += text
        return len(text)


def test_scripts_run_in_a_notebook(monkeypatch):
    out, err = NotebookStream(), NotebookStream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        print("✓ 25.0 ± 7.1")
        files.progress("half")
        files.progress("done", end="\n")

    settings.run_script(main)
    assert out.written == "✓ 25.0 ± 7.1\n" and "done" in err.written


def test_a_missing_stream_is_replaced(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", closed)
    settings.run_script(lambda: print("to nobody"))
    assert sys.stdout.name == sys.stderr.name == os.devnull


# ---------------------------------------------------------------- what went wrong

def too_large():
    torch.empty(10**15)


def too_large_for_a_number():
    torch.empty(8 * (2**63 - 1))


def too_large_an_array():
    bytearray(2**62)


@pytest.fixture
def ended(monkeypatch, capsys):
    """ended(main, settings class) -> (exit code, the last sentence)

    run_script looks the flags up in the module of main, which is this file.
    """
    def run(main, cls=None):
        module = sys.modules[__name__]
        if cls is None:
            monkeypatch.delattr(module, "Settings")
        else:
            monkeypatch.setattr(module, "Settings", cls)
        with pytest.raises(SystemExit) as stop:
            settings.run_script(main)
        return stop.value.code, capsys.readouterr().err
    return run


@dataclass
class WithBatches:
    batch_size: int = 1
    limit: int = 0


@dataclass
class WithAModel:
    batch_size: int = 1
    width: int = 8


@dataclass
class WithoutBatches:
    limit: int = 0


@pytest.mark.parametrize("main", [too_large, too_large_for_a_number, too_large_an_array])
def test_too_little_memory_names_flags_that_exist(main, ended):
    code, said = ended(main, WithBatches)
    assert code == 1 and "not enough memory: try a lower --batch-size or fewer" in said
    code, said = ended(main, WithAModel)
    assert code == 1 and "try a lower --batch-size or a smaller model (--width)" in said
    code, said = ended(main, WithoutBatches)
    assert code == 1 and "not enough memory: try fewer examples (--limit" in said
    assert "batch" not in said
    code, said = ended(main)
    assert code == 1 and "not enough memory: try less data" in said


def test_other_overflows_are_mistakes_of_ours(ended):
    def main():
        math.exp(1000)
    with pytest.raises(OverflowError):
        settings.run_script(main)


@pytest.mark.parametrize("script", ["train_mlm", "train_ae", "train_contrastive", "finetune"])
def test_each_script_gets_its_own_memory_advice(script):
    module = importlib.import_module(script)
    flags = re.findall(r"--[\w-]+", settings.how_to_save_memory(module.main))
    existing = {settings.flag_name(f.name) for f in fields(module.Settings)}
    assert flags and set(flags) <= existing


def test_a_lost_process_promises_no_checkpoint(ended, monkeypatch):
    @dataclass
    class Resumable:
        resume: bool = False

    def lost():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(settings.distributed, "is_connection_error", lambda error: True)
    code, said = ended(lost, Resumable)
    assert code == 1 and "continues from the last checkpoint, if there is one" in said
    code, said = ended(lost, WithoutBatches)
    assert code == 1 and "another process has ended" in said and "--resume" not in said


def test_a_full_disk_says_how_to_go_on(ended):
    @dataclass
    class Resumable:
        resume: bool = False

    def main():
        raise OSError(28, "No space left on device", "x")

    _, said = ended(main, Resumable)
    assert "x: No space left on device; the disk is full: free some space, then" in said
    assert said.endswith("then continue with --resume\n")


class CompilerError(Exception):
    """As torch.compile raises it."""
    __module__ = "torch._dynamo.exc"


@pytest.mark.parametrize("error, code, sentence", [
    (UserError("a sentence"), 2, "a sentence"),
    (FileNotFoundError(2, "No such file or directory", "x"), 1, "x: No such file"),
    (OSError(28, "No space left on device"), 1, "No space left on device"),
    (OSError("words alone"), 1, "words alone"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
    (CompilerError("no C++ compiler"), 1, "torch cannot compile this model (no C++ compiler)"),
])
def test_exit_codes(error, code, sentence, ended):
    def main():
        raise error
    exit_code, said = ended(main, WithBatches)
    assert exit_code == code and sentence in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours")])
def test_our_own_mistakes_keep_their_traceback(error):
    def main():
        raise error
    with pytest.raises(type(error), match="ours"):
        settings.run_script(main)
