"""The plumbing: settings, randomness, schedule, Muon, saving."""

import csv
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

import finetune
from minissl import UserError, files, muon, report, runs, training


SMALL = "--limit 40 --batch-size 16 --width 8 --device cpu --precision float32".split()


@dataclass
class Settings:
    steps: int = 10  # how many
    rate: float = 0.5  # how fast, in 100 % of something
    kind: Literal["a", "b"] = "a"  # which
    on: bool = False  # a switch


def test_flags_and_their_help_come_from_the_dataclass_and_its_comments(capsys):
    assert training.read_settings(Settings, "", []) == Settings()
    assert training.read_settings(Settings, "", ["--steps", "3", "--kind", "b", "--on"]) == Settings(3, 0.5, "b", True)
    with pytest.raises(SystemExit) as stop:
        training.read_settings(Settings, "What it is.", ["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(part in said for part in ("What it is.", "how many (default 10)", "how fast, in 100 % of something",
                                         "{a,b}"))


@pytest.mark.parametrize("flags", [["--step", "3"], ["--steps", "x"], ["--kind", "c"], ["--steps"], ["stray"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, run_script):
    script = SimpleNamespace(__name__="script", main=lambda: training.read_settings(Settings, ""))
    code, printed = run_script(script, *flags)
    assert code == 2 and printed.count("\n") == 1 and printed.startswith("script.py: ")


def test_an_argument_that_a_flag_of_several_values_has_taken_is_missed_with_the_way_out():
    with pytest.raises(UserError, match="RUN is missing: give it before all flags"):
        training.read_settings(finetune.Settings, "", ["--labels", "5", "runs/mlm"])


def test_a_right_guess_is_marked_as_right_and_a_wrong_one_stands_beside_what_stood_there():
    shown = report.filled_in("a [MASK] b [MASK] c", [" x", " y"], [" x", " z"])
    assert ' <span class="good">x</span> b' in shown and '<span class="bad">z</span> <s>y</s> c' in shown


def test_what_a_text_holds_of_html_is_shown_and_not_obeyed():
    shown = report.filled_in("a <b> & [MASK] [MASK]", ["<i>", "<u>"], ["<i>", "<s>"])
    assert not re.search("<[biu]>", shown) and all(f"&lt;{name}&gt;" in shown for name in "bius")


def test_the_page_says_who_made_the_run_has_each_row_of_the_table_and_names_what_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "python x.py", "started": "today", "python": "3.99", '
                                          '"torch": "2.88", "settings": {}}', encoding="utf-8")
    (tmp_path / "finetune.csv").write_text("labels_a_class,method,seed,test_accuracy,seconds,data,step\n"
                                           "10,pixels,0,20,1,<x>,30\nall,pixels,0,40,1,<x>,30\n", encoding="utf-8")
    (tmp_path / "metrics.csv").write_text("step,seconds,loss\n1,1,x\n", encoding="utf-8")
    report.write_page(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "python x.py</code><br>last started today, Python 3.99, torch 2.88" in page
    assert page.count("<td>10</td><td>20.0 ± 0.0</td>") == page.count("<td>all</td><td>40.0 ± 0.0</td>") == 1
    assert "draws of labels: &lt;x&gt;, after 30 steps" in page
    assert page.count("cannot be read") == page.count("metrics.csv cannot be read") == 1


def test_an_evaluation_is_made_in_evaluation_mode_and_its_time_does_not_count_in_the_rate(tmp_path):
    run = object.__new__(training.Run)
    run.first_stage = 0
    run.settings, run.folder = SimpleNamespace(steps=9, evaluate_every=1, save_every=1e9), tmp_path
    run.model, run.logged, run.saved, run.losses, run.counted = torch.nn.Linear(1, 1), 5.0, 0.0, [torch.tensor(1.0)], 0

    def look(model):
        time.sleep(0.05)
        return dict(training=model.training)
    run.log = lambda step, chance, more: seen.append((step, more))
    seen = []
    run.after(2, False, look, {})
    assert 5.05 <= run.logged < 6 and run.model.training and seen == [(3, dict(training=False))]


def test_a_row_of_the_log_is_about_the_steps_since_the_row_before(tmp_path, monkeypatch, capsys):
    clock, run = [100.0], object.__new__(training.Run)
    run.first_stage = 0
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run.folder, run.settings, run.rows, run.logged_step = tmp_path, SimpleNamespace(steps=200), [], 20
    run.peak = 1e9
    run.items, run.flops, run.counted, run.losses, run.started, run.logged = 0, 0, 0, [], 100.0, 100.0
    for step, left in (40, "1.3 min left"), (80, "0.5 min left"):        # 160 steps in 80 s, 120 steps in 30 s
        clock[0] += 10
        run.count(1000, 3e9, torch.tensor(30.0))
        run.counted += 20
        run.log(step, dict(loss=None), {})
        row = run.rows[-1]
        assert (row["loss"], row["rate_per_second"], row["share_of_peak"]) == (1.5, 100, 0.3)
        assert left in capsys.readouterr().out
    assert [row["seconds"] for row in run.rows] == [10, 20]


def test_a_resumed_run_goes_on_from_its_checkpoint_in_its_log_and_in_the_time_left(run_script, tmp_path, monkeypatch):
    import train_ae
    flags = ["--run", tmp_path / "run", *SMALL]
    assert run_script(train_ae, *flags, "--steps", 2)[0] == 0
    with open(tmp_path / "run" / "metrics.csv", "r+", encoding="utf-8", newline="") as file:
        last = file.read().splitlines()[-1]
        file.write(re.sub(r"^2,[\d.]+", "3,9999.0", last) + "\n")         # logged, and killed before it was saved
    log, since = training.Run.log, []
    monkeypatch.setattr(training.Run, "log",
                        lambda self, step, *more: since.append(self.logged_step) or log(self, step, *more))
    assert run_script(train_ae, *flags, "--steps", 4, "--resume")[0] == 0 and since == [2]
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "4"] and float(rows[-1]["seconds"]) < 9999


def test_a_run_saves_its_first_and_its_last_step_and_between_them_by_the_clock(run_script, tmp_path, monkeypatch):
    import train_ae
    saved, write = [], training.write_checkpoint
    monkeypatch.setattr(training, "write_checkpoint",
                        lambda path, state: saved.append(state["step"]) or write(path, state))
    for seconds, steps in (1000, [1, 5]), (0, [1, 2, 3, 4, 5]):
        assert run_script(train_ae, "--run", tmp_path / f"run {seconds}", *SMALL, "--steps", 5,
                          "--save-every", seconds)[0] == 0
        assert saved == steps
        saved.clear()
    config = json.loads((tmp_path / "run 0" / "config.json").read_text(encoding="utf-8"))
    assert shlex.split(config["command"]) == ["python", *sys.argv]              # it can be pasted, spaces and all


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_behind_its_step_and_a_second_one_would_at_once(number, run_script, tmp_path, monkeypatch):
    import train_ae
    batch, before = training.Batches.__call__, signal.signal(number, lambda *_: None)

    def interrupted(self, step):
        if step == 3:
            signal.raise_signal(number)
        return batch(self, step)
    monkeypatch.setattr(training.Batches, "__call__", interrupted)
    try:
        code, printed = run_script(train_ae, "--run", tmp_path / "run", *SMALL, "--steps", 9, "--evaluate-every", 9)
        assert code == 130 and "once more ends it at once" in printed, printed
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert files.load_checkpoint(tmp_path / "run")["step"] == 4


def test_what_was_measured_once_stands_on_the_page_too(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,loss,knn\n50,1.0,2.5,\n100,2.0,2.25,61.5\n", encoding="utf-8")
    report.write_page(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>loss</b> now 2.25" in page and "<b>knn</b> now 61.5" in page


def test_draws_are_a_function_of_seed_purpose_and_step_and_of_nothing_else():
    draw = lambda *key: torch.rand(4, generator=training.generator(*key)).tolist()
    first = draw(0, "mask", 5)
    torch.rand(100)                                               # the global stream does not matter
    assert draw(0, "mask", 5) == first
    assert len({tuple(draw(*key)) for key in [(0, "mask", 5), (1, "mask", 5), (0, "coin", 5), (0, "mask", 6)]}) == 4


def test_the_rate_climbs_rests_and_falls_to_nothing_after_the_last_step():
    rates = [training.rate_at(step, 100, warmup=10, decay=0.5) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and rates[50] == 1 and rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02) and rates[100] == 0   # step 99 is the last; at 100 nothing would be left
    assert all(rate > 0 for rate in rates[:100])


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (8, 3, 3, 3)])
def test_muon_moves_a_matrix_by_its_nearest_orthogonal_one(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = gradient.clone()
    muon.Muon([parameter], lr=1.0).step()
    u, s, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    scale = max(1, u.shape[0] / v.shape[1]) ** 0.5
    moved = -parameter.detach().flatten(1) / scale
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.6 and values.max() < 1.3              # the polynomial aims at about 0.7 ... 1.2
    kept = u.T @ moved @ v.T                                      # in the singular vectors of the gradient: diagonal
    assert (kept - torch.diag(kept.diagonal())).abs().max() < 1e-3


def test_muon_decays_weights_by_the_rate_times_the_decay_and_not_through_the_momentum():
    parameter = torch.nn.Parameter(torch.full((3, 2), 4.0))
    optimizer = muon.Muon([parameter], lr=0.1, weight_decay=0.5)
    for expected in (4 * 0.95, 4 * 0.95**2):
        parameter.grad = torch.zeros(3, 2)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.full((3, 2), expected))


def test_muon_remembers_with_nesterov_momentum():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = muon.Muon([parameter], lr=0.0, momentum=0.5)
    for _ in range(3):
        parameter.grad = torch.eye(2)
        optimizer.step()
    assert optimizer.state[parameter]["momentum"].tolist() == [[1.75, 0], [0, 1.75]]
    row = torch.nn.Parameter(torch.zeros(1, 2))                   # of a single row only the direction counts
    optimizer = muon.Muon([row], lr=1.0, momentum=0.5)
    for gradient in ([1.0, 0.0], [0.0, 1.0]):
        before = row.detach().clone()
        row.grad = torch.tensor([gradient])
        optimizer.step()
    moved = before - row.detach()                                 # the gradient (0, 1) + half of the momentum (1/2, 1)
    assert float(moved[0, 0] / moved[0, 1]) == pytest.approx(0.25 / 1.5, rel=1e-4)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    files.write_atomically(path, b"good")

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        files.write_atomically(path, b"half")
    assert path.read_bytes() == b"good" and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 not a zip", None])
def test_a_file_that_is_no_checkpoint_gets_a_sentence(content, tmp_path):
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"format": "another program's"}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="checkpoint.pt"):
        files.load_checkpoint(tmp_path)


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"format": training.CHECKPOINT_FORMAT, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        files.load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_matrix_product_rate_is_positive_and_the_choice_of_precision_gives_its_reason():
    assert training.matrix_product_rate(torch.device("cpu"), torch.float32) > 0
    dtype, rate, reason = training.choose_precision("auto", torch.device("cpu"))
    assert dtype in (torch.float32, torch.bfloat16) and "measured" in reason
    with pytest.raises(UserError, match="finds no such device" if not torch.cuda.is_available() else "mps"):
        training.choose_device("cuda" if not torch.cuda.is_available() else "mps")


def test_a_multiplication_with_its_addition_counts_as_two_operations(monkeypatch):
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=itertools.count().__next__))     # a second each
    assert training.matrix_product_rate(torch.device("cpu"), torch.float32) == 2 * 64**3     # see a_hasty_stopwatch


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_forward_pass_has_the_precision_that_was_chosen(precision):
    with training.autocast(torch.device("cpu"), precision):
        assert torch.nn.Linear(4, 4)(torch.ones(2, 4)).dtype == precision


def test_two_processes_cannot_train_into_one_folder(run_script, tmp_path):
    import fcntl

    import train_ae
    flags = ["--run", tmp_path / "run",
             *"--limit 40 --batch-size 16 --width 8 --device cpu --precision float32".split()]
    code, printed = run_script(train_ae, *flags, "--steps", 1)
    assert code == 0
    with open(tmp_path / "run" / "lock", "w", encoding="utf-8") as other:
        files.lock(tmp_path)                                                       # this process lets go of its own
        fcntl.flock(other, fcntl.LOCK_EX)
        code, printed = run_script(train_ae, *flags, "--resume", "--steps", 2)
        assert code == 2 and "another process is training into" in printed
    code, printed = run_script(train_ae, *flags, "--resume", "--steps", 2)
    assert code == 0


@pytest.mark.parametrize("change", [
    lambda c: c.pop("method"), lambda c: c["model"].pop("mean"), lambda c: c["model_settings"].update(code="x"),
    lambda c: c["model"].update({"mean": torch.zeros(5, 1, 1)}), lambda c: c.update(model=[1, 2]),
    lambda c: c["model_settings"].update(more=1)])
def test_a_checkpoint_that_holds_something_else_gets_a_sentence(change, run_script, tmp_path):
    import train_ae
    code, printed = run_script(train_ae, "--run", tmp_path / "run",
                               *"--limit 40 --steps 1 --batch-size 16 --width 8 --device cpu".split())
    checkpoint = files.load_checkpoint(tmp_path / "run")
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    code, printed = run_script(finetune, tmp_path / "run")
    assert code == 2 and "does not hold what it should" in printed and "Traceback" not in printed


def test_a_checkpoint_of_a_method_that_is_not_registered_says_where_to_register_it(tmp_path):
    torch.save(dict(format=files.CHECKPOINT_FORMAT, method="jigsaw"), tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="method jigsaw, which is not among the MODELS of minissl/runs.py"):
        runs.load_run(tmp_path)


@pytest.mark.parametrize("change", [
    lambda text: text[:-9], lambda text: text + text.splitlines(True)[-1], lambda text: "\0" + text,
    lambda text: text.replace("1,", "x,", 1), lambda text: "\n".join(text.splitlines()[::-1])])
def test_a_log_that_is_not_as_the_run_left_it_stops_a_resumption_before_anything_is_lost(change, run_script, tmp_path):
    import train_ae
    flags = ["--run", tmp_path / "run",
             *"--limit 40 --batch-size 16 --width 8 --device cpu --precision float32".split()]
    assert run_script(train_ae, *flags, "--steps", 2)[0] == 0
    path = tmp_path / "run" / "metrics.csv"
    good = path.read_text(encoding="utf-8")
    path.write_text(change(good), encoding="utf-8")
    code, printed = run_script(train_ae, *flags, "--resume", "--steps", 3)
    assert (code == 2 and "is not as the run has left it" in printed
            and path.read_text(encoding="utf-8") == change(good)), printed
    path.unlink()                                                                  # as the sentence says
    assert run_script(train_ae, *flags, "--resume", "--steps", 3)[0] == 0


def test_too_little_memory_is_said(run_script, tmp_path, monkeypatch):
    import train_ae
    monkeypatch.setattr(train_ae, "load_images", lambda *arguments: torch.empty(10**15))
    code, printed = run_script(train_ae, "--run", tmp_path / "run")
    assert code == 1 and "too little memory" in printed.splitlines()[-1]


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_seen(tmp_path):
    """torch.load itself does not look: the weight would be another one, and nobody would know."""
    torch.save(dict(format=files.CHECKPOINT_FORMAT, model={"w": torch.ones(1000)}), tmp_path / "checkpoint.pt")
    good = (tmp_path / "checkpoint.pt").read_bytes()
    place = good.index(torch.ones(10).numpy().tobytes())
    for at in (place, place + 2001, place + 3999):
        (tmp_path / "checkpoint.pt").write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        with pytest.raises(UserError, match="damaged"):
            files.load_checkpoint(tmp_path)


def test_an_autoencoder_takes_images_of_its_own_size_only_another_encoder_all_that_are_not_too_small():
    autoencoder, contrastive = SimpleNamespace(channels=3, size=(32, 32)), SimpleNamespace(channels=3)
    for model, size in (autoencoder, (32, 32)), (contrastive, (32, 32)), (contrastive, (8, 50)):
        runs.check_images(torch.empty(1, 3, *size), model, "the array")
    for model, size, sentence in ((autoencoder, (32, 40), "32 × 40 × 3; the run learned from 32 × 32 × 3"),
                                  (contrastive, (7, 50), "7 × 50; at least 8 × 8")):
        with pytest.raises(UserError, match=sentence):
            runs.check_images(torch.empty(1, 3, *size), model, "the array")
