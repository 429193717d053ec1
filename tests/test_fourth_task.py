"""How to add a pretext task: the README's steps, done."""

import numpy as np
import torch

import finetune
import fourth_task
from minissl import files, runs


def test_a_fourth_task_trains_resumes_and_is_probed_like_the_other_three(run_script, tmp_path, monkeypatch):
    """Images light above: who tells which way up they are has found the border, whose height is the class."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 150)
    images = (rng.integers(0, 60, (300, 16, 16))
              + 150 * (np.arange(16)[:, None] < np.where(labels, 10, 5)[:, None, None]))
    np.save(tmp_path / "a.npy", images.astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", labels)
    flags = ["--data", tmp_path / "a.npy", *"--batch-size 32 --width 8 --device cpu --precision float32".split()]
    code, printed = run_script(fourth_task, *flags, "--run", tmp_path / "whole", "--steps", 40)
    assert code == 0, printed
    loss = float(printed.split("loss ")[-1].split()[0])
    assert loss < 0.9 * np.log(4), printed
    code, printed = run_script(fourth_task, *flags, "--run", tmp_path / "run", "--steps", 40, "--save-every", 0)
    assert run_script(fourth_task, "--run", tmp_path / "run", "--resume")[0] == 0
    one, other = (files.load_checkpoint(tmp_path / name)["model"] for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    code, printed = run_script(finetune, tmp_path / "run", "--probe", "--labels", 5, "--seeds", 1)
    assert code == 0 and float(printed.split("linear probe ")[1].split()[0]) > 90, printed
    monkeypatch.setattr(fourth_task.RotationModel, "encode", lambda model, x: model.encoder(x)[:, :7])   # its own
    assert runs.load_encoder(tmp_path / "run")(images[:3].astype(np.uint8)).shape == (3, 7)
