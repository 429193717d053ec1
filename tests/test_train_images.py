"""The two image scripts and finetune.py on their runs, from the command line to the files."""

import csv
import re
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune
import train_ae
import train_contrastive
from minissl import (UserError, autoencoder, contrastive, datasets, evaluation, figures, files, images, runs as opened,
                     training)
from minissl.finetuning import ImageTask
from minissl.muon import Muon
from soak import log_of

SCRIPTS = {"simclr": (train_contrastive, ["--method", "simclr"]), "byol": (train_contrastive, ["--method", "byol"]),
           "ae": (train_ae, ["--masked", 0.5, "--regularizer", "decorrelated", "--beta", 0.1])}
TINY = "--limit 400 --steps 12 --batch-size 16 --width 8 --evaluate-every 4 --device cpu --precision float32".split()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A finished tiny run of each method."""
    folder = tmp_path_factory.mktemp("image runs")
    for name, (script, flags) in SCRIPTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [script.__name__ + ".py", "--run", str(folder / name), *map(str, flags), *TINY])
            script.main()
    return folder


@pytest.fixture
def brief(monkeypatch):
    """A few steps, and a probe of one strength, are enough to see what depends on what."""
    train = ImageTask.train_classifier
    monkeypatch.setattr(ImageTask, "train_classifier",
                        lambda *arguments, **options: train(*arguments, **options, images_seen=64))
    monkeypatch.setattr(evaluation, "probe", lambda x, labels, classes, strengths: (
        evaluation.logistic_regression(x, labels, classes, strengths[1]), strengths[1]))


def test_a_resumed_run_keeps_the_precision_that_was_chosen_and_its_clock_goes_on(run_script, tmp_path, monkeypatch):
    def choose(best):
        return lambda name, device: ((best, 1e9, "measured") if name == "auto"
                                     else (getattr(torch, name), 1e9, "as asked"))
    monkeypatch.setattr(training, "choose_precision", choose(torch.float32))
    assert run_script(train_ae, "--run", tmp_path / "run", *TINY, "--steps", 1, "--precision", "auto")[0] == 0
    log = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8")
    (tmp_path / "run" / "metrics.csv").write_text(re.sub(r"(?m)^1,[\d.]+,", "1,1000.0,", log), encoding="utf-8")
    monkeypatch.setattr(training, "choose_precision", choose(torch.bfloat16))
    for steps in (2, 3):
        code, printed = run_script(train_ae, "--run", tmp_path / "run", "--resume", "--steps", steps)
        assert code == 0 and "precision: float32 (as asked" in printed, printed
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        assert all(float(row["seconds"]) >= 1000 for row in csv.DictReader(file))


def test_what_changes_the_learning_may_not_change_on_resume(runs, run_script):
    for flag, value in (("--learning-rate", 0.5), ("--seed", 3), ("--batch-size", 8), ("--limit", 300),
                        ("--precision", "bfloat16"), ("--noise", 0.5)):
        code, printed = run_script(train_ae, "--run", runs / "ae", "--resume", flag, value)
        assert (code == 2 and f"{flag} {value}: the run" in printed
                and "was started with" in printed.splitlines()[-1]), printed


@pytest.mark.parametrize("name, flags", [("simclr", ["--views", 3]), ("byol", []), ("ae", [])])
def test_chance_is_the_loss_of_an_encoder_that_has_learned_nothing(name, flags, run_script, tmp_path):
    code, printed = run_script(SCRIPTS[name][0], "--run", tmp_path / "run", *SCRIPTS[name][1], *TINY, "--steps", 1,
                               *flags)
    held_out = images.load_images("shapes", limit=400).of(datasets.HELD_OUT)[:].double() / 255
    # all views alike; the mean image
    chance = {"simclr": np.log(3 * 16 - 1), "byol": 2, "ae": float(held_out.var(0, correction=0).mean())}[name]
    assert code == 0 and f"(chance {chance:.4g})" in printed, printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_draw_of_a_run_is_used_twice(name, run_script, tmp_path, monkeypatch):
    made, generator = [], training.generator
    for module in (SCRIPTS[name][0], training):
        monkeypatch.setattr(module, "generator", lambda *key: made.append(key) or generator(*key))
    assert run_script(SCRIPTS[name][0], "--run", tmp_path / "run", *SCRIPTS[name][1], *TINY)[0] == 0
    purposes = {"image order", "corruption"} if name == "ae" else {"image order", "view 0", "view 1", "look"}
    assert {purpose for _, purpose, _ in made} == purposes and len(set(made)) == len(made) > 12


@pytest.mark.parametrize("name", SCRIPTS)
def test_rates_fall_to_nothing_and_byols_target_slows_down_to_a_stop(name, run_script, tmp_path, monkeypatch):
    rates, targets = {Muon: [], torch.optim.Adam: []}, []
    for optimizer in rates:
        monkeypatch.setattr(optimizer, "step",
                            lambda self, optimizer=optimizer: rates[optimizer].append(self.param_groups[0]["lr"]))
    monkeypatch.setattr(contrastive.ContrastiveModel, "update_target", lambda self, rate: targets.append(rate))
    assert run_script(SCRIPTS[name][0], "--run", tmp_path / "run", *SCRIPTS[name][1], *TINY, "--steps", 40,
                      "--limit", 100, "--evaluate-every", 40)[0] == 0
    # two steps of warm-up
    assert rates[Muon] == pytest.approx([0.02 * min((step + 1) / 2, 1 - step / 40) for step in range(40)])
    assert rates[torch.optim.Adam] == pytest.approx([0.1 * rate for rate in rates[Muon]])
    assert targets == pytest.approx([1 - 0.02 * (1 + np.cos(np.pi * step / 40)) / 2 for step in range(40)]
                                    if name == "byol" else [])


def image_task(run, data=None, code=None, noise=0.0):
    """noise: the deviation of what is added to every pretrained weight."""
    model, checkpoint = opened.load_run(run)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn(parameter.shape)
    return ImageTask(data or images.load_images("shapes", limit=100), model, nullcontext(), torch.device("cpu"),
                     torch.float32, lambda seed: opened.new_model(checkpoint, seed), flip=True, code=code)


def test_the_principal_components_are_those_along_which_the_images_vary_most(runs):
    labels = np.arange(200) % 2
    pixels = 60 + 100 * labels[:, None, None, None] + np.random.default_rng(0).normal(0, 20, (200, 3, 32, 32))
    data = images.Images(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.arange(200), labels,
                         np.repeat(np.uint8([0, 1, 2]), [120, 20, 60]), ["dark", "light"])
    task = image_task(runs / "ae", data, code=2)
    column = task.columns()["pixel PCA"]
    assert evaluation.accuracy(column.answers(column.fit(task.train[:20]), task.test), task.labels[task.test]) == 100


def test_of_few_images_there_are_fewer_principal_components_than_numbers_in_a_code(runs):
    labels = np.arange(200) % 2
    pixels = 100 + np.random.default_rng(0).normal(0, 20, (200, 3, 32, 32)) + 10 * labels[:, None, None, None]
    data = images.Images(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), torch.arange(200), labels,
                         np.repeat(np.uint8([0, 1, 2]), [100, 20, 80]), ["dark", "light"])
    task = image_task(runs / "ae", data, code=128)
    column = task.columns()["pixel PCA"]         # 100 images span 99 directions: the next is of rounding
    assert evaluation.accuracy(column.answers(column.fit(task.train), task.test), task.labels[task.test]) > 85


def test_features_are_standardised_by_the_training_images_alone(runs):
    task = image_task(runs / "simclr")
    features = task.features(task.model)[task.train]
    torch.testing.assert_close(task.mean, features.mean(0))
    torch.testing.assert_close(task.deviation, features.std(0, correction=0).clamp(min=1e-6))


def test_the_rate_of_fine_tuning_climbs_for_a_tenth_of_the_steps_and_falls_to_nothing(runs, monkeypatch):
    rates = {Muon: [], torch.optim.Adam: []}
    for optimizer in rates:
        monkeypatch.setattr(optimizer, "step",
                            lambda self, optimizer=optimizer: rates[optimizer].append(self.param_groups[0]["lr"]))
    task = image_task(runs / "simclr")
    task.train_classifier(task.fit_fine_tuned(task.train[:32], (0.0, 0.5), 0), task.train[:32], (0.01, 0.5), 0, 0.0,
                          True, images_seen=640)
    assert rates[Muon] == pytest.approx([0.01 * min(1, (step + 1) / 2) * (1 - step / 20) for step in range(20)])
    assert rates[torch.optim.Adam] == pytest.approx([0.1 * rate for rate in rates[Muon]])


def test_an_image_encoder_from_scratch_owes_nothing_to_the_pretrained_weights(runs, brief):
    tasks = [image_task(runs / "simclr", noise=noise) for noise in (0.0, 0.1)]
    fitted = [task.fit_from_scratch(task.train[:32], (0.02, 0.5), 3).state_dict() for task in tasks]
    assert equal(*fitted)
    assert all(buffer.abs().max() > 0 for key, buffer in fitted[0].items()
               if key.startswith("body.encoder") and key.endswith("running_mean"))
    assert not equal(tasks[0].new_model(0).state_dict(), tasks[0].new_model(1).state_dict())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_gradient_of_a_step_is_that_of_the_formula(name, run_script, tmp_path, monkeypatch):
    script, flags = SCRIPTS[name]
    module, cls = (autoencoder, "Autoencoder") if name == "ae" else (contrastive, "ContrastiveModel")
    made, model_of = [], getattr(module, cls)

    def random_model(*arguments, **options):    # scales that start at zero would hide what they multiply
        model = model_of(*arguments, **options)
        for n, parameter in enumerate(model.parameters()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=training.generator(0, "test", n))
        made.append((deepcopy(model), model))
        return model

    monkeypatch.setattr(module, cls, random_model)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: None)    # the step's gradients are kept
    flags = [*flags, *TINY, "--steps", 1,
             *([] if name == "ae" else ["--crop", 0.3, "--jitter", 0.5, "--hue", 0.2, "--grey", 0.5]),
             *(["--temperature", 0.3, "--views", 3] if name == "simclr" else [])]
    code, printed = run_script(script, "--run", tmp_path / "run", *flags)
    assert code == 0, printed
    (model, trained), pool = made[0], images.load_images("shapes", limit=400).of(datasets.TRAIN)
    batch, draw = (pool[training.Batches(400, 16, 0, "image order")(0)],
                   lambda purpose: training.generator(0, purpose, 0))
    if name == "ae":    # half of the 16 patches of 8 × 8 are the mean colour
        x = batch.float() / 255
        hidden = torch.rand(16, 16, generator=draw("corruption")).argsort(1).argsort(1) < 8
        hidden = hidden.view(16, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        rebuilt, z = model(torch.where(hidden, x.mean((0, 2, 3), keepdim=True), x))
        off_diagonal = torch.cov(z.T) * (1 - torch.eye(z.shape[1]))
        loss = (x - rebuilt).square().mean() + 0.1 * off_diagonal.square().sum() / z.shape[1]
    else:
        V = 3 if name == "simclr" else 2
        views = torch.stack([contrastive.augment(batch, (24, 24), torch.rand(16, 12, generator=draw(f"view {v}")),
                                                 0.3, 0.5, 0.2, 0.5) for v in range(V)])
        z, loss = model.project(views), 0.0
        if name == "simclr":
            z = z / z.norm(dim=2, keepdim=True)
            for v in range(V):
                for b in range(16):
                    others = (torch.stack([z[w, c] for w in range(V) for c in range(16) if (w, c) != (v, b)])
                              @ z[v, b] / 0.3)
                    for w in range(V):
                        if w != v:
                            loss = loss + (others.logsumexp(0) - z[w, b] @ z[v, b] / 0.3) / (V * 16 * (V - 1))
        else:
            with torch.no_grad():
                targets = model.target(views.flatten(0, 1)).view_as(z)
            q = model.predictor(z.flatten(0, 1)).view_as(z)
            for v in range(2):
                unit = q[v] / q[v].norm(dim=1, keepdim=True) - targets[1 - v] / targets[1 - v].norm(dim=1, keepdim=True)
                loss = loss + unit.square().sum(1).mean() / 2
    loss.backward()
    found = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for key, gradient in found.items():
        wanted = dict(model.named_parameters())[key].grad
        torch.testing.assert_close(gradient, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()),
                                   msg=lambda text: f"{key}: {text}")


def states(folder):
    return files.load_checkpoint(folder)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_log_pictures_and_page(name, runs):
    with open(runs / name / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "4", "8", "12"] and all(row["knn"] for row in rows[1:])
    pictures = {path.name for path in (runs / name).glob("*.png")}
    assert pictures == {"neighbours.png", "map.png"} | (
        {"reconstructions.png", "walks.png"} if name == "ae" else {"views.png"})
    page = (runs / name / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == len(pictures) and "http" not in re.sub("base64,[^\"]*", "", page)


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_seed_same_bytes_and_a_stopped_run_goes_on_as_if_it_had_not(name, runs, run_script, tmp_path, monkeypatch):
    script, flags = SCRIPTS[name]
    stop_at = iter([False] * 4 + [True] + [False] * 100)          # Ctrl-C in the fifth step
    monkeypatch.setattr("minissl.training.Run.stopping",
                        property(lambda self: next(stop_at), lambda self, value: None), raising=False)
    code, printed = run_script(script, "--run", tmp_path / "run", *flags, *TINY)
    assert code == 130 and files.load_checkpoint(tmp_path / "run")["step"] == 5, printed
    code, printed = run_script(script, "--run", tmp_path / "run", "--resume")
    assert code == 0, printed
    assert equal(states(tmp_path / "run"), states(runs / name))
    assert log_of(tmp_path / "run") == log_of(runs / name)    # the losses too: no step's is counted twice or left out
    code, _ = run_script(script, "--run", tmp_path / "other", *flags, *TINY, "--seed", 1)
    assert not equal(states(tmp_path / "other"), states(runs / name))


def test_a_run_does_not_go_on_with_other_images_of_the_same_number_and_size(run_script, tmp_path):
    flags = ["--data", tmp_path / "a.npy", "--run", tmp_path / "run", *TINY]
    # of two held out, pictures, too
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (20, 16, 16), np.uint8))
    assert run_script(train_ae, *flags, "--steps", 1)[0] == 0
    np.save(tmp_path / "a.npy", np.random.default_rng(1).integers(0, 256, (20, 16, 16), np.uint8))
    code, printed = run_script(train_ae, *flags, "--resume", "--steps", 2)
    assert code == 2 and "the same data" in printed, printed


@pytest.mark.parametrize("name", ["simclr", "ae"])
def test_evaluation_does_not_change_training(name, runs, run_script, tmp_path):
    script, flags = SCRIPTS[name]
    code, printed = run_script(script, "--run", tmp_path / "run", *flags, *TINY, "--evaluate-every", 100)
    assert code == 0 and equal(states(tmp_path / "run"), states(runs / name)), printed


@pytest.mark.parametrize("name", ["simclr", "ae"])
def test_a_short_training_raises_the_probe_above_the_random_encoder(name, run_script, tmp_path, brief):
    """On two textures that pixels averaged over the image do not tell apart."""
    rng = np.random.default_rng(0)
    stripes = (np.sin(np.arange(16) * 1.6 + rng.uniform(0, 6, (600, 1))) * 60 + 128)[:, None, :].repeat(16, 1)
    labels = rng.integers(0, 2, 600)
    pictures = (np.where(labels[:, None, None] == 0, stripes, stripes.transpose(0, 2, 1))
                + rng.normal(0, 60, stripes.shape))
    np.save(tmp_path / "a.npy", pictures.clip(0, 255).astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", labels)
    script = SCRIPTS[name][0]
    code, printed = run_script(script, "--run", tmp_path / "run", "--data", tmp_path / "a.npy", "--steps", 60,
                               "--batch-size", 32, "--width", 8, "--device", "cpu", "--precision", "float32")
    assert code == 0, printed
    code, printed = run_script(finetune, tmp_path / "run", "--labels", 5, "--seeds", 3)
    assert code == 0, printed
    with open(tmp_path / "run" / "finetune.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    mean = {m: np.mean([float(r["test_accuracy"]) for r in rows if r["method"] == m])
            for m in {r["method"] for r in rows}}
    assert set(mean) == {"pixels", "untrained", "from scratch", "linear probe", "fine-tuned"} | (
        {"pixel PCA"} if name == "ae" else set())
    assert mean["linear probe"] > mean["untrained"] + 5, mean


def test_a_probe_moves_neither_parameters_nor_buffers_of_the_encoder(runs, brief):
    model, checkpoint = opened.load_run(runs / "simclr")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = images.load_images("shapes", limit=200)
    task = ImageTask(data, model, nullcontext(), torch.device("cpu"), torch.float32,
                     lambda seed: opened.new_model(checkpoint, seed), flip=True, code=None)
    columns = task.columns()
    which = task.train[evaluation.draw_labels(task.labels[task.train], 5, 0)]
    columns["linear probe"].answers(columns["linear probe"].fit(which, None, 0), task.test)
    tuned = columns["fine-tuned"].fit(which, (0.002, 0.5), 0)
    assert equal(before, model.state_dict())
    buffers = {k for k, v in tuned.body.named_buffers()}
    for k, v in tuned.body.state_dict().items():    # few labels: batch norm stays, weights move
        assert torch.equal(v, before[k]) == (k in buffers or "projection_head" in k), k
    still = columns["fine-tuned"].fit(which, (0.0, 0.5), 0)                        # rate 0 is the probe itself
    probe = columns["linear probe"]
    assert (columns["fine-tuned"].answers(still, task.test)
            == probe.answers(probe.fit(which, None, 0), task.test)).all()


def test_what_must_not_be_mirrored_is_not_mirrored_while_fine_tuning_either(runs, run_script, monkeypatch, brief):
    flips, augment = set(), contrastive.augment
    monkeypatch.setattr(contrastive, "augment",
                        lambda *arguments, **named: flips.add(named["flip"]) or augment(*arguments, **named))
    for flags, wanted in ([], {True}), (["--no-flip"], {False}):
        assert run_script(finetune, runs / "byol", "--labels", 3, "--seeds", 1, "--limit", 100, *flags)[0] == 0
        assert flips == wanted
        flips.clear()


def test_beside_each_held_out_image_stands_the_training_image_that_is_nearest(tmp_path, monkeypatch):
    pixels = torch.randint(0, 256, (36, 1, 8, 8), generator=training.generator(0, "test", 0)).byte()
    labels = np.arange(36) % 3
    pixels[12:24], labels[12:24] = pixels[:12].flip(0), labels[11::-1]    # held-out images: training images, reversed
    data = images.Images(pixels, torch.arange(36), labels, np.repeat(np.uint8([0, 1, 2]), 12), list("abc"))
    shown, frames, dots, grid, scatter = [], [], [], figures.grid, figures.scatter
    monkeypatch.setattr(figures, "grid",
                        lambda rows, labels: shown.extend(rows) or frames.extend(labels) or grid(rows, labels))
    monkeypatch.setattr(figures, "scatter",
                        lambda points, labels: dots.append((points, labels)) or scatter(points, labels))
    assert evaluation.Neighbours(data, "cpu")(lambda x: x.flatten(1).float(), nullcontext(), tmp_path) == 100
    assert len(shown) == 10 and all(torch.equal(row[0], row[1]) and not torch.equal(row[0], row[2]) for row in shown)
    label_of = {image.numpy().tobytes(): label for image, label in zip(pixels[:24], data.labels)}
    assert all([label_of[image.numpy().tobytes()] for image in row] == list(frame) for row, frame in zip(shown, frames))
    assert dots[0][0].shape == (12, 2) and dots[0][1].tolist() == data.labels[12:24].tolist()


@pytest.mark.parametrize("batch", [1, 7, 60, 61, 100])
def test_every_image_is_counted_whatever_the_batch(batch):
    images = torch.randint(0, 256, (61, 1, 8, 8), dtype=torch.uint8)
    features = evaluation.image_features(lambda x: x.flatten(1), images, nullcontext(), batch=batch)
    assert torch.equal(features, images.flatten(1).float() / 255)


def test_permuting_the_test_labels_changes_no_choice_and_no_weight(runs, run_script, brief, monkeypatch):
    made, load = [], images.load_images
    monkeypatch.setattr(finetune, "write_results", lambda settings, checkpoint, name, classes, results, chance:
                        made.append(results[-1][-1].state_dict()))

    def permuted(*arguments, **options):
        data = load(*arguments, **options)
        test = np.flatnonzero(data.split == datasets.TEST)
        data.labels[test] = data.labels[test][::-1].copy()
        return data
    for loader in (load, permuted):
        monkeypatch.setattr(finetune, "load_images", loader)
        code, printed = run_script(finetune, runs / "simclr", "--labels", 3, "--seeds", 1, "--limit", 100)
        assert code == 0, printed
    assert equal(*made)


def test_the_classifier_of_the_last_row_is_saved_and_labels_new_images(runs, run_script, tmp_path, brief, monkeypatch):
    made, table = [], finetune.table
    monkeypatch.setattr(finetune, "table", lambda *arguments: made.append(table(*arguments)) or made[-1])
    assert run_script(finetune, runs / "simclr", "--labels", 2, 5, "--seeds", 1, "--limit", 100,
                      "--precision", "float32")[0] == 0
    (_, _, first), (_, _, last) = made[0][0]
    saved = torch.load(runs / "simclr" / "classifier.pt", weights_only=True)["model"]
    assert equal(saved, last.state_dict()) and not equal(saved, first.state_dict())
    new = images.load_images("shapes", limit=100).of(datasets.TEST)
    np.save(tmp_path / "new.npy", new[:].permute(0, 2, 3, 1).numpy())
    code, printed = run_script(finetune, runs / "simclr", "--predict", tmp_path / "new.npy", "--precision", "float32")
    with torch.no_grad():
        wanted = last(new[:].float() / 255).softmax(1)
    lines = [line.split("\t") for line in printed.splitlines() if line.count("\t") == 2]
    assert [line[2] for line in lines] == [str(n) for n in range(100)]
    assert [line[0] for line in lines] == [images.SHAPES[i] for i in wanted.argmax(1)]
    np.testing.assert_allclose([float(line[1]) for line in lines], wanted.amax(1), atol=0.011)


def test_predictions_and_features_of_new_images(runs, run_script, tmp_path, brief):
    code, printed = run_script(finetune, runs / "ae", "--labels", 3, "--seeds", 1, "--limit", 100)
    assert code == 0 and "pixel PCA" in printed, printed
    array = images.load_images("shapes", limit=20)[:].permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "new.npy", np.concatenate([array, array]))
    code, printed = run_script(finetune, runs / "ae", "--predict", tmp_path / "new.npy")
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    assert code == 0 and len(lines) == 120 and [line[:2] for line in lines[:60]] == [line[:2] for line in lines[60:]]
    code, printed = run_script(finetune, runs / "ae", "--features", tmp_path / "out.npy",
                               "--data", tmp_path / "new.npy", "--precision", "float32")
    features = np.load(tmp_path / "out.npy")
    assert code == 0 and features.shape == (120, 64)
    np.testing.assert_allclose(opened.load_encoder(runs / "ae")(array[:7]), features[:7], atol=1e-4)
    np.save(tmp_path / "one.npy", array[:1])
    code, one = run_script(finetune, runs / "ae", "--predict", tmp_path / "one.npy")
    assert code == 0 and "\t".join(lines[0][:1]) in one and one.count("\t") == 2
    np.save(tmp_path / "dark.npy", array // 128)
    code, printed = run_script(finetune, runs / "ae", "--predict", tmp_path / "dark.npy")
    assert code == 0 and "mind: all of it is nearly black" in printed, printed
    np.save(tmp_path / "grey.npy", array[..., 0])
    code, printed = run_script(finetune, runs / "ae", "--features", tmp_path / "out.npy",
                               "--data", tmp_path / "grey.npy")
    assert code == 2 and "images of 32 × 32 × 1; the run learned from 32 × 32 × 3" in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_that_diverges_before_a_look_ends_with_a_sentence(name, run_script, tmp_path):
    script, flags = SCRIPTS[name]
    code, printed = run_script(script, "--run", tmp_path / "run", *flags, *TINY, "--learning-rate", 1e30)
    assert code == 2 and "not finite" in printed.splitlines()[-1] and "Traceback" not in printed, printed


def test_a_run_that_was_moved_to_the_default_place_goes_on_there(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script(train_ae, "--run", "runs/old", *TINY, "--steps", 1)[0] == 0
    Path("runs/old").rename("runs/ae")
    code, printed = run_script(train_ae, "--resume", "--steps", 2)
    assert code == 0 and files.load_checkpoint("runs/ae")["step"] == 2 and not Path("runs/old").exists(), printed


def test_a_run_that_was_killed_before_its_first_checkpoint_is_started_again(runs, run_script, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_bytes(b"")    # the first file of a run: killed there, it can start, too
    run = training.Run(SimpleNamespace(run=tmp_path / "run", resume=False))
    assert run.checkpoint is None
    (tmp_path / "run" / "config.json").write_bytes((runs / "ae" / "config.json").read_bytes())
    script, flags = SCRIPTS["ae"]
    code, printed = run_script(script, "--run", tmp_path / "run", "--resume")
    assert code == 2 and "start it again, without --resume" in printed.splitlines()[-1], printed
    code, printed = run_script(script, "--run", tmp_path / "run", *flags, *TINY)
    assert code == 0 and equal(states(tmp_path / "run"), states(runs / "ae")), printed


def test_an_array_that_is_not_uint8_is_refused_by_the_encoder_of_a_run(runs):
    encode = opened.load_encoder(runs / "ae")
    for array in (np.zeros((2, 32, 32, 3), np.float32), np.zeros((32, 32), np.uint8),
                  np.zeros((0, 32, 32, 3), np.uint8)):
        with pytest.raises(UserError, match=r"expected uint8 \(N, H, W, C\)"):
            encode(array)


def test_labels_that_came_after_the_pretraining_are_warned_of(run_script, tmp_path, brief):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.integers(0, 255, (200, 8, 8)).astype(np.uint8))
    flags = ["--run", tmp_path / "run", "--data", tmp_path / "a.npy", "--view-size", 8, *TINY, "--limit", 0]
    assert run_script(train_contrastive, *flags)[0] == 0
    np.save(tmp_path / "a.labels.npy", rng.integers(0, 2, 200))
    code, printed = run_script(finetune, tmp_path / "run", "--labels", 5, "--seeds", 1, "--probe")
    assert code == 0 and "so test images may be among them" in printed, printed
    assert run_script(train_contrastive, *flags, "--run", tmp_path / "other")[0] == 0
    code, printed = run_script(finetune, tmp_path / "other", "--labels", 5, "--seeds", 1, "--probe")
    assert code == 0 and "mind:" not in printed, printed
    np.save(tmp_path / "a.labels.npy", np.arange(200) // 100)              # as many to train on, but other ones
    code, printed = run_script(finetune, tmp_path / "other", "--labels", 5, "--seeds", 1, "--probe")
    assert code == 0 and "so test images may be among them" in printed, printed
    code, printed = run_script(train_contrastive, "--run", tmp_path / "other", "--resume", "--steps", 100)
    assert code == 2 and "give it the same data" in printed.splitlines()[-1], printed
    for name in "a", "a.labels":                                           # the same under another name
        (tmp_path / f"{name}.npy").rename(tmp_path / f"{name.replace('a', 'b', 1)}.npy")
    code, printed = run_script(finetune, tmp_path / "other", "--data", tmp_path / "b.npy", "--labels", 5, "--seeds", 1,
                               "--probe")
    assert code == 0 and "so test images may be among them" in printed, printed
    (tmp_path / "b.npy").rename(tmp_path / "a.npy")
    code, printed = run_script(finetune, tmp_path / "run", "--features", tmp_path / "a.npy")
    assert (code == 2 and "that is the data" in printed.splitlines()[-1]
            and np.load(tmp_path / "a.npy").dtype == np.uint8)


def test_the_encoder_of_a_run_takes_a_view_with_turned_channels(runs):
    encode, array = opened.load_encoder(runs / "ae"), np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    assert torch.equal(encode(array[..., ::-1]), encode(array[..., ::-1].copy()))


def test_masking_an_image_of_one_patch_is_refused(run_script, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8))
    code, printed = run_script(train_ae, "--run", tmp_path / "run", "--data", tmp_path / "a.npy",
                               "--masked", 0.6, *TINY)
    assert code == 2 and "are one patch of 8 × 8" in printed.splitlines()[-1] and not (tmp_path / "run").exists()


def test_a_run_is_resumed_by_the_script_that_made_it_and_no_other(runs, run_script):
    code, printed = run_script(train_ae, "--run", runs / "simclr", "--resume")
    assert code == 2 and "was made by another script" in printed.splitlines()[-1], printed


@pytest.mark.parametrize("script, flags, sentence", [
    (train_contrastive, ["--batch-size", 1], "--batch-size 1: must be at least 2"),
    (train_contrastive, ["--views", 1], "--views 1"), (train_contrastive, ["--temperature", 0], "--temperature 0.0"),
    (train_contrastive, ["--crop", 2], "must be at most 1"),
    (train_contrastive, ["--batch-size", 500, "--limit", 400], "there are only 400 images"),
    (train_contrastive, ["--data", "no_such_name"], "give shapes, cifar10 or a .npy"),
    (train_contrastive, ["--method", "dino"], "invalid choice"),
    (train_contrastive, ["--method", "byol", "--temperature", 0.2], "--method byol has neither --temperature nor"),
    (train_ae, ["--beta", -1], "--beta -1.0"), (train_ae, ["--beta", 1], "give both or neither"),
    (train_ae, ["--masked", 1], "at most 0.95"),
    (train_ae, ["--data", "not_there.npy"], "there is no such file")])
def test_a_mistake_is_one_sentence_and_leaves_no_folder(script, flags, sentence, run_script, tmp_path):
    code, printed = run_script(script, "--run", tmp_path / "run", *flags)
    assert code == 2 and sentence in printed.splitlines()[-1] and "Traceback" not in printed
    assert not (tmp_path / "run").exists()
