"""The example of a further pretext task: it learns, resumes and is measured like the others."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rotation
import torch
from conftest import assert_equal_states, read_log, stopped_at

import finetune
from minissl.evaluation import load
from minissl.training.files import load_checkpoint


ROOT = Path(__file__).resolve().parents[1]
SMALL = "--batch-size 32 --width 8 --steps 40 --device cpu --precision float32".split()


@pytest.fixture
def bright_above(tmp_path):
    """A .npy of 300 images that are bright above and dark below, and their labels.

    Who can tell which way up they are has found the border, whose height is the class.
    """
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 150)
    height = np.where(labels == 1, 10, 5)
    row = np.arange(16)
    is_bright = row[None, :, None] < height[:, None, None]                # (300, 16, 1)
    images = rng.integers(0, 60, (300, 16, 16)) + 150 * is_bright
    np.save(tmp_path / "a.npy", images.astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", labels)
    return tmp_path / "a.npy"


# ---------------------------------------------------------------- the task

def test_images_are_turned_by_quarters_with_their_answers():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned, answers = rotation.turn(image.expand(2, 1, 2, 2))
    quarters = [
        [[1.0, 2.0], [3.0, 4.0]],
        [[2.0, 4.0], [1.0, 3.0]],
        [[4.0, 3.0], [2.0, 1.0]],
        [[3.0, 1.0], [4.0, 2.0]],
    ]
    assert answers.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for picture, k in zip(turned, answers.tolist()):
        assert picture[0].tolist() == quarters[k]


@torch.no_grad()
def test_the_loss_equals_a_loop():
    torch.manual_seed(0)
    model = rotation.RotationModel([0.5], torch.eye(4), width=8).eval()
    images = torch.rand(3, 1, 16, 16)
    loss, losses = rotation.rotation_loss(model, images)
    expected = 0.0
    for image in images:
        for k in range(4):
            logits = model(image[None].rot90(k, dims=(2, 3)))[0]
            probability = logits.exp()[k] / logits.exp().sum()
            expected -= math.log(float(probability)) / 12
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert losses == dict(loss=loss)


def test_the_loss_of_a_guess_is_ln_4():
    model = rotation.RotationModel([0.5], torch.eye(4), width=8)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    loss, _ = rotation.rotation_loss(model, torch.rand(3, 1, 16, 16))
    assert loss.item() == pytest.approx(math.log(4))


# ---------------------------------------------------------------- the script

def test_the_example_learns_and_is_probed(bright_above, run_script, tmp_path):
    run = tmp_path / "run"
    code, printed = run_script(rotation, "--data", bright_above, "--run", run, *SMALL)
    assert code == 0, printed
    assert "(chance 1.386)" in printed
    assert f"next: python rotation.py finetune {run}" in printed
    assert float(read_log(run)[-1]["loss"]) < 0.9 * math.log(4)
    code, printed = run_script(finetune, run, "--probe", "--labels", 5, "--seeds", 1)
    assert code == 0, printed
    accuracy = float(printed.split("linear probe ")[1].split()[0])
    assert accuracy > 90


def test_a_stopped_example_resumes_bit_for_bit(bright_above, run_script, tmp_path):
    data = ["--data", bright_above]
    assert run_script(rotation, *data, "--run", tmp_path / "whole", *SMALL)[0] == 0
    with stopped_at(20):
        code, printed = run_script(rotation, *data, "--run", tmp_path / "run", *SMALL)
    assert code == 130, printed
    assert run_script(rotation, "--run", tmp_path / "run", "--resume")[0] == 0
    whole, resumed = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "run")
    assert_equal_states(whole["model"], resumed["model"])


def test_load_encoder_uses_encode_of_the_class(
    bright_above, run_script, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    arguments = ["--data", bright_above, "--run", run, *SMALL, "--steps", 1]
    assert run_script(rotation, *arguments)[0] == 0

    def seven_columns(self, x):
        return self.encoder(x)[:, :7]

    monkeypatch.setattr(rotation.RotationModel, "encode", seven_columns)
    images = np.load(bright_above)[:3]
    assert load.load_encoder(run)(images).shape == (3, 7)


def test_no_time_between_two_checkpoints_is_negative(run_script):
    code, printed = run_script(rotation, "--save-every", -1)
    assert code == 2 and "--save-every -1.0: must be at least 0" in printed, printed


def test_images_that_are_not_square_are_refused(run_script, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 12), np.uint8)
    np.save(tmp_path / "a.npy", images)
    arguments = ["--data", tmp_path / "a.npy", "--run", tmp_path / "run", *SMALL]
    code, printed = run_script(rotation, *arguments)
    assert code == 2
    assert "images of 8 × 12 are not square; crop them" in printed
    assert not (tmp_path / "run").exists()


def test_the_file_starts_from_any_folder(bright_above, run_script, tmp_path):
    """With `finetune`, which has to know the class of the model."""
    run = tmp_path / "run"
    arguments = ["--data", bright_above, "--run", run, *SMALL, "--steps", 1]
    assert run_script(rotation, *arguments)[0] == 0
    script = ROOT / "examples" / "rotation.py"
    command = [sys.executable, script, "finetune", run, "--probe", "--labels", 5, "--seeds", 1]
    command = [str(part) for part in command]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "linear probe" in ended.stdout
