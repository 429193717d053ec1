"""The two scripts that learn from images: their steps against formulas, and whole small runs."""

import csv
import itertools
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_equal_states, log_of, read_log, stopped_at

import finetune
import train_ae
import train_contrastive
from minissl import UserError, autoencoder, contrastive
from minissl.data import batches
from minissl.data.batches import Batches, generator
from minissl.data.images import load_images
from minissl.data.splits import HELD_OUT, TRAIN
from minissl.evaluation import load
from minissl.evaluation.image_table import ImageTask
from minissl.optim import Muon
from minissl.training import machine
from minissl.training.files import load_checkpoint, write_checkpoint


CORRUPTED = ["--masked", 0.5, "--regularizer", "decorrelated", "--beta", 0.1]
SCRIPTS = {                                      # name: (script, flags)
    "simclr": (train_contrastive, ["--method", "simclr"]),
    "byol": (train_contrastive, ["--method", "byol"]),
    "ae": (train_ae, CORRUPTED),
}
TINY = (
    "--limit 400 --steps 12 --batch-size 16 --width 8 --evaluate-every 4 "
    "--device cpu --precision float32"
).split()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A finished tiny run of each method, in a folder with its name, to be read only."""
    folder = tmp_path_factory.mktemp("image runs")
    for name, (script, flags) in SCRIPTS.items():
        command = [script.__name__ + ".py", "--run", folder / name, *flags, *TINY]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [str(part) for part in command])
            script.main()
    return folder


@pytest.fixture
def train(run_script, tmp_path):
    """train(name, folder_name, flags...) -> the run's folder and what was printed."""
    def train_tiny(name, folder_name, *flags):
        script, usual = SCRIPTS[name]
        folder = tmp_path / folder_name
        code, printed = run_script(script, "--run", folder, *usual, *TINY, *flags)
        assert code == 0, printed
        return folder, printed
    return train_tiny


def last_line(printed):
    return printed.splitlines()[-1]


# ---------------------------------------------------------------- the gradient of a step

@pytest.fixture
def first_step(train, monkeypatch):
    """first_step(name, flags...) -> a copy of the model before the first step, and the
    gradients that the script hands to its optimizers, {parameter: gradient}."""
    def run(name, *flags):
        module, cls = {
            "simclr": (contrastive, "SimCLR"),
            "byol": (contrastive, "BYOL"),
            "ae": (autoencoder, "Autoencoder"),
        }[name]
        make = getattr(module, cls)
        seen = SimpleNamespace(before=None, model=None)
        gradients = {}

        def make_random(**options):
            """Random everywhere: a scale that starts at 0 would hide what it multiplies."""
            model = make(**options)
            for n, parameter in enumerate(model.parameters()):
                draws = generator(0, "test", n)
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
            seen.before, seen.model = deepcopy(model), model
            return model

        def keep_gradients(optimizers, lr):
            for key, parameter in seen.model.named_parameters():
                if parameter.grad is not None:
                    gradients[key] = parameter.grad.clone()

        monkeypatch.setattr(module, cls, make_random)
        monkeypatch.setattr(SCRIPTS[name][0], "step_optimizers", keep_gradients)
        train(name, "run", "--steps", 1, *flags)
        return seen.before, gradients
    return run


def first_batch():
    """The images of the first step of a run with the flags TINY: (16, 3, 32, 32) uint8."""
    images = load_images("shapes", limit=400).subset(TRAIN)
    indices = Batches(400, 16, 0, "image order")(0)
    return images[indices]


def first_views(V, side=24, flip=True):
    """V views of the first batch, with the settings of VIEW_FLAGS."""
    changes = dict(crop=0.3, jitter=0.5, hue=0.2, grey=0.5, flip=flip)
    numbers = torch.rand(16, V, 11, generator=generator(0, "view", 0))
    views = []
    for v in range(V):
        views.append(contrastive.augment(first_batch(), (side, side), numbers[:, v], **changes))
    return torch.stack(views)                                 # (V, 16, 3, side, side)


VIEW_FLAGS = ["--crop", 0.3, "--jitter", 0.5, "--hue", 0.2, "--grey", 0.5]


def assert_gradients_of(loss, model, gradients):
    """Fail unless the loss has these gradients, for all parameters that are trained."""
    loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    for key, parameter in trained.items():
        largest = float(parameter.grad.abs().max())
        assert largest > 0, key
        torch.testing.assert_close(
            gradients[key], parameter.grad, rtol=2e-3, atol=2e-3 * largest
        )


def test_the_step_of_simclr_is_its_formula(first_step):
    """Three views, an anchor at a time."""
    flags = ["--temperature", 0.3, "--views", 3]
    model, gradients = first_step("simclr", *VIEW_FLAGS, *flags)
    z = model.project(first_views(3))
    z = (z / z.norm(dim=2, keepdim=True)).flatten(0, 1)       # (3 · 16, D)
    loss = 0.0
    for anchor in range(48):
        s = z @ z[anchor] / 0.3
        others = torch.cat([s[:anchor], s[anchor + 1:]])
        for positive in range(anchor % 16, 48, 16):           # the views of the same image
            if positive != anchor:
                loss = loss + (others.logsumexp(0) - s[positive]) / (48 * 2)
    assert_gradients_of(loss, model, gradients)


def test_the_step_of_byol_is_its_formula(first_step):
    """Three small views without mirror images, each predicted from both of the others."""
    flags = ["--views", 3, "--view-size", 16, "--no-flip"]
    model, gradients = first_step("byol", *VIEW_FLAGS, *flags)
    views = first_views(3, side=16, flip=False)
    q = model.predictor(model.project(views).flatten(0, 1)).view(3, 16, -1)
    with torch.no_grad():
        z = model.target(views.flatten(0, 1)).view(3, 16, -1)
    q = q / q.norm(dim=2, keepdim=True)
    z = z / z.norm(dim=2, keepdim=True)
    loss = 0.0
    for view, other in itertools.permutations(range(3), 2):
        distance = (q[view] - z[other]).square().sum(1)       # (16,)
        loss = loss + distance.mean() / 6
    assert_gradients_of(loss, model, gradients)


def test_the_step_of_the_autoencoder_is_its_formula(first_step):
    """Half of the 16 patches of each image have the mean colour. β is 0.1."""
    model, gradients = first_step("ae")
    x = first_batch().float() / 255
    draws = torch.rand(16, 16, generator=generator(0, "corruption", 0))
    hidden = draws.argsort(1).argsort(1) < 8                  # (16 images, 16 patches)
    hidden = hidden.view(16, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    mean_colour = x.mean((0, 2, 3), keepdim=True)
    rebuilt, z = model(torch.where(hidden, mean_colour, x))
    off_diagonal = torch.cov(z.T) * (1 - torch.eye(128))
    loss = (x - rebuilt).square().mean() + 0.1 * off_diagonal.square().sum() / 128
    assert_gradients_of(loss, model, gradients)


def test_the_step_on_normalized_patches_is_its_formula(first_step):
    """The loss of the 8 hidden patches of each image, a patch at a time."""
    flags = ["--masked", 0.5, "--targets", "normalized", "--beta", 0, "--regularizer", "none"]
    model, gradients = first_step("ae", *flags)
    x = first_batch().float() / 255
    draws = torch.rand(16, 16, generator=generator(0, "corruption", 0))
    hidden = draws.argsort(1).argsort(1) < 8                  # (16 images, 16 patches)
    corrupted = x.clone()
    for b, n in hidden.nonzero().tolist():
        patch_of(corrupted[b], n)[:] = x.mean((0, 2, 3))[:, None, None]
    rebuilt, _ = model(corrupted)
    loss = 0.0
    for b, n in hidden.nonzero().tolist():
        patch = patch_of(x[b], n)
        target = (patch - patch.mean()) / patch.var(correction=0).clamp(min=1e-6).sqrt()
        error = (patch_of(rebuilt[b], n) - target).square().mean()
        loss = loss + error / (16 * 8)
    assert_gradients_of(loss, model, gradients)


def test_the_step_with_noise_and_masks_is_its_formula(first_step):
    """The noise comes first: patches are cut out of the noisy images."""
    flags = ["--noise", 0.2, "--masked", 0.5, "--beta", 0, "--regularizer", "none"]
    model, gradients = first_step("ae", *flags)
    x = first_batch().float() / 255
    draws = generator(0, "corruption", 0)
    noisy = x + 0.2 * torch.randn(x.shape, generator=draws)
    hidden = torch.rand(16, 16, generator=draws).argsort(1).argsort(1) < 8
    corrupted = noisy.clone()
    for b, n in hidden.nonzero().tolist():
        patch_of(corrupted[b], n)[:] = noisy.mean((0, 2, 3))[:, None, None]
    rebuilt, _ = model(corrupted)
    assert_gradients_of((x - rebuilt).square().mean(), model, gradients)


def patch_of(image, n):
    """The nth of the 16 patches of an image (C, 32, 32): (C, 8, 8)."""
    top, left = 8 * (n // 4), 8 * (n % 4)
    return image[:, top:top + 8, left:left + 8]


def test_the_losses_are_logged_by_their_names():
    """Each loss function returns what is trained on, and what is written into the log."""
    torch.manual_seed(0)
    views = torch.rand(2, 4, 3, 16, 16)
    settings = SimpleNamespace(
        temperature=0.3, similarity="dot", beta=0.5, regularizer="sparse", targets="pixels"
    )
    simclr = contrastive.SimCLR([0.5] * 3, torch.eye(12), width=8)
    loss, losses = train_contrastive.simclr_loss(simclr, views, settings)
    torch.testing.assert_close(loss, contrastive.info_nce(simclr(views), 0.3, "dot"))
    assert losses == dict(loss=loss)

    byol = contrastive.BYOL([0.5] * 3, torch.eye(12), width=8)
    loss, losses = train_contrastive.byol_loss(byol, views, settings)
    assert losses == dict(loss=loss)

    model = autoencoder.Autoencoder((16, 16), [0.5] * 3, [0.2] * 3, torch.eye(12), code=8, width=8)
    loss, losses = train_ae.compute_loss(model, views[0], views[1], None, settings)
    expected = losses["squared_error"] + 0.5 * losses["regularizer"]
    torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------- what a step depends on

def test_chance_is_the_loss_without_any_learning(train):
    _, printed = train("simclr", "simclr", "--steps", 1, "--views", 3)
    assert f"(chance {np.log(3 * 16 - 1):.4g})" in printed    # all views alike
    _, printed = train("byol", "byol", "--steps", 1)
    assert "(chance 2)" in printed                            # unrelated vectors
    _, printed = train("ae", "ae", "--steps", 1)
    held_out = load_images("shapes", limit=400).subset(HELD_OUT)[:].double() / 255
    error_of_the_mean_image = float(held_out.var(0, correction=0).mean())
    assert f"(chance {error_of_the_mean_image:.4g})" in printed
    _, printed = train("ae", "normalized", "--steps", 1, "--targets", "normalized")
    patches = held_out.view(-1, 3, 4, 8, 4, 8)                # of 8 × 8 pixels
    variance = patches.var((1, 3, 5), correction=0)
    has_pattern = float((variance > 1e-6).double().mean())
    assert f"(chance {has_pattern:.4g})" in printed           # the variance of a patch is 1 or 0


PURPOSES_OF_TWO_VIEWS = {"image order", "view", "preview"}


@pytest.mark.parametrize("name, flags, purposes", [
    ("simclr", ["--views", 2], PURPOSES_OF_TWO_VIEWS),
    ("byol", ["--views", 2], PURPOSES_OF_TWO_VIEWS),
    ("ae", [], {"image order", "corruption"}),
])
def test_no_draw_of_a_run_is_used_twice(name, flags, purposes, train, monkeypatch):
    keys = []

    def record(*key):
        keys.append(key)
        return generator(*key)

    for module in (SCRIPTS[name][0], batches):
        monkeypatch.setattr(module, "generator", record)
    train(name, "run", *flags)
    assert {purpose for _, purpose, _ in keys} == purposes
    assert len(set(keys)) == len(keys) > 12


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_rate_rises_for_a_twentieth_and_falls_to_0(name, train, monkeypatch):
    rates = {Muon: [], torch.optim.Adam: []}

    def record(self):
        rates[type(self)].append(self.param_groups[0]["lr"])

    for optimizer in rates:
        monkeypatch.setattr(optimizer, "step", record)
    train(name, "run", "--steps", 40, "--limit", 100, "--evaluate-every", 40)
    expected = [0.02 * min((step + 1) / 2, 1 - step / 40) for step in range(40)]
    assert rates[Muon] == pytest.approx(expected)
    assert rates[torch.optim.Adam] == pytest.approx([0.1 * rate for rate in expected])


@pytest.mark.parametrize("name, expected", [("simclr", 0.02), ("byol", 0.2), ("ae", 0.02)])
def test_the_matrices_decay_as_the_method_needs(name, expected, train, monkeypatch):
    decays = []

    def record(self):
        decays.append(self.param_groups[0]["weight_decay"])

    monkeypatch.setattr(Muon, "step", record)
    train(name, "run", "--steps", 1, "--limit", 100, "--evaluate-every", 1)
    assert decays == [expected]


def test_byols_target_slows_down_to_a_stop(train, monkeypatch):
    calls, rates = [], []

    def record_step(optimizers, lr):
        calls.append("step")

    def record_rate(self, rate):
        calls.append("target")
        rates.append(rate)

    monkeypatch.setattr(train_contrastive, "step_optimizers", record_step)
    monkeypatch.setattr(contrastive.BYOL, "update_target", record_rate)
    train("byol", "run", "--steps", 40, "--limit", 100, "--evaluate-every", 40)
    assert calls == ["step", "target"] * 40                   # it follows each step
    expected = [1 - 0.1 * (1 + np.cos(np.pi * step / 40)) / 2 for step in range(40)]
    assert rates == pytest.approx(expected)


def test_the_default_views_suit_the_data():
    of_shapes = train_contrastive.Settings(data="shapes")
    for name, value in contrastive.VIEWS_OF_SHAPES.items():
        assert getattr(of_shapes, name) == value
    of_photographs = train_contrastive.Settings(data="cifar10", hue=0.3)
    assert of_photographs.crop == contrastive.VIEWS_OF_PHOTOGRAPHS["crop"]
    assert of_photographs.hue == 0.3
    assert contrastive.VIEWS_OF_SHAPES["crop"] > contrastive.VIEWS_OF_PHOTOGRAPHS["crop"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_weight_depends_on_held_out_or_test_images(name, runs, train, monkeypatch):
    def load_changed(*arguments):
        data = load_images(*arguments)
        data.pixels = data.pixels.clone()
        others = torch.from_numpy(data.split != TRAIN)
        data.pixels[data.rows[others]] = 77
        return data

    monkeypatch.setattr(SCRIPTS[name][0], "load_images", load_changed)
    other, _ = train(name, "run")
    expected = load_checkpoint(runs / name)["model"]
    assert_equal_states(load_checkpoint(other)["model"], expected)


@pytest.mark.parametrize("name", ["simclr", "ae"])
def test_previews_do_not_change_what_is_learned(name, runs, train):
    other, _ = train(name, "run", "--evaluate-every", 100)
    expected = load_checkpoint(runs / name)["model"]
    assert_equal_states(load_checkpoint(other)["model"], expected)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_that_diverges_ends_with_a_sentence(name, run_script, tmp_path):
    script, flags = SCRIPTS[name]
    flags = ["--run", tmp_path / "run", *flags, *TINY, "--learning-rate", 1e30]
    code, printed = run_script(script, *flags)
    assert code == 2
    assert "not finite" in last_line(printed)
    assert "Traceback" not in printed


# ---------------------------------------------------------------- what a run leaves behind

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_log_pictures_and_page(name, runs):
    rows = read_log(runs / name)
    assert [row["step"] for row in rows] == ["1", "4", "8", "12"]
    assert all(row["knn"] for row in rows[1:])
    pictures = {path.name for path in (runs / name).glob("*.png")}
    own = {"reconstructions.png", "walks.png"} if name == "ae" else {"views.png"}
    assert pictures == {"neighbours.png", "map.png"} | own
    page = (runs / name / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == len(pictures)
    without_pictures = re.sub('base64,[^"]*', "", page)
    assert "http" not in without_pictures


@pytest.fixture
def brief(monkeypatch):
    """The fine-tuned columns take a few steps only."""
    train_classifier = ImageTask.train_classifier

    def train_briefly(*arguments, **options):
        return train_classifier(*arguments, **options, images_seen=64)

    monkeypatch.setattr(ImageTask, "train_classifier", train_briefly)


def two_textures(path):
    """600 images of stripes, across or upright. Their mean colours do not tell them apart."""
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(16) * 1.6 + rng.uniform(0, 6, (600, 1)))
    upright = np.repeat((60 * wave + 128)[:, None, :], 16, axis=1)        # (600, 16, 16)
    labels = rng.integers(0, 2, 600)
    across = upright.transpose(0, 2, 1)
    images = np.where(labels[:, None, None] == 0, upright, across)
    images = images + rng.normal(0, 60, images.shape)
    np.save(path, images.clip(0, 255).astype(np.uint8))
    np.save(path.with_suffix(".labels.npy"), labels)


@pytest.mark.parametrize("name", ["simclr", "ae"])
def test_a_short_training_beats_the_untrained_encoder(name, run_script, tmp_path, brief):
    two_textures(tmp_path / "a.npy")
    run = tmp_path / "run"
    small = "--steps 60 --batch-size 32 --width 8 --device cpu --precision float32".split()
    script, _ = SCRIPTS[name]
    code, printed = run_script(script, "--run", run, "--data", tmp_path / "a.npy", *small)
    assert code == 0, printed
    code, printed = run_script(finetune, run, "--labels", 5, "--seeds", 3)
    assert code == 0, printed
    accuracies = {}
    with open(run / "finetune.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            of_method = accuracies.setdefault(row["method"], [])
            of_method.append(float(row["test_accuracy"]))
    mean = {method: np.mean(values) for method, values in accuracies.items()}
    columns = {"pixels", "untrained", "from scratch", "linear probe", "self-trained",
               "fine-tuned"}
    if name == "ae":
        columns.add("pixel PCA")
    assert mean.keys() == columns
    assert mean["linear probe"] > mean["untrained"] + 5, mean


def test_the_encoder_takes_an_array_with_turned_channels(runs):
    """NumPy's array[..., ::-1] has strides that torch refuses."""
    encode = load.load_encoder(runs / "ae")
    array = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    turned = array[..., ::-1]
    assert torch.equal(encode(turned), encode(turned.copy()))


def test_an_autoencoder_takes_images_of_its_size_alone():
    model = SimpleNamespace(channels=3, size=(32, 32))
    load.check_images(torch.empty(1, 3, 32, 32), model, "the array")
    sentence = "found images of 32 × 40 × 3; the run was trained on images of 32 × 32 × 3"
    with pytest.raises(UserError, match=sentence):
        load.check_images(torch.empty(1, 3, 32, 40), model, "the array")


def test_other_encoders_take_images_of_any_size():
    model = SimpleNamespace(channels=3)
    load.check_images(torch.empty(1, 3, 32, 32), model, "the array")
    load.check_images(torch.empty(1, 3, 8, 50), model, "the array")
    sentence = "found images of 7 × 50 × 3; expected at least 8 × 8"
    with pytest.raises(UserError, match=sentence):
        load.check_images(torch.empty(1, 3, 7, 50), model, "the array")
    sentence = "found images of 8 × 50 × 1; the run was trained on images with 3 channels:"
    with pytest.raises(UserError, match=sentence):
        load.check_images(torch.empty(1, 1, 8, 50), model, "the array")


# ---------------------------------------------------------------- resuming

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stopped_run_ends_like_an_undisturbed_one(name, runs, run_script, tmp_path):
    script, flags = SCRIPTS[name]
    with stopped_at(4):
        code, printed = run_script(script, "--run", tmp_path / "run", *flags, *TINY)
    assert code == 130, printed
    assert load_checkpoint(tmp_path / "run")["step"] == 5
    code, printed = run_script(script, "--run", tmp_path / "run", "--resume")
    assert code == 0, printed
    expected = load_checkpoint(runs / name)["model"]
    assert_equal_states(load_checkpoint(tmp_path / "run")["model"], expected)
    assert log_of(tmp_path / "run") == log_of(runs / name)    # no loss is missing or twice


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_seed_gives_another_model(name, runs, train):
    other, _ = train(name, "other", "--seed", 1)
    model, expected = load_checkpoint(other)["model"], load_checkpoint(runs / name)["model"]
    differs = [key for key in expected if not torch.equal(model[key], expected[key])]
    assert len(differs) > 0.5 * len(expected)                 # not mean, std and counters


def test_a_resumed_run_keeps_its_precision(run_script, tmp_path, monkeypatch):
    """It was measured when the run began. Another measurement would change the results."""
    best = torch.float32

    def choose(name, device):
        if name == "auto":
            return best, "measured"
        return getattr(torch, name), "as the run began"

    monkeypatch.setattr(machine, "choose_precision", choose)
    run = ["--run", tmp_path / "run"]
    flags = [*TINY, "--steps", 1, "--precision", "auto"]
    code, printed = run_script(train_ae, *run, *flags)
    assert code == 0 and "precision: float32 (measured)" in printed
    best = torch.bfloat16
    for steps in (2, 3):
        code, printed = run_script(train_ae, *run, "--resume", "--steps", steps)
        assert code == 0 and "precision: float32 (as the run began)" in printed


@pytest.mark.parametrize("flag, value", [
    ("--learning-rate", 0.5), ("--seed", 3), ("--batch-size", 8), ("--limit", 300),
    ("--precision", "bfloat16"), ("--noise", 0.5),
])
def test_what_changes_the_learning_cannot_change(flag, value, runs, run_script):
    code, printed = run_script(train_ae, "--run", runs / "ae", "--resume", flag, value)
    assert code == 2
    assert f"{flag} {value}: the run" in last_line(printed)
    assert "was started with" in last_line(printed)


def random_images(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 16, 16), np.uint8)


@pytest.mark.parametrize("change", ["other images", "labels"])
def test_a_run_does_not_resume_on_other_data(change, run_script, tmp_path):
    """Other images of the same number and size, or labels, which change the split."""
    flags = ["--data", tmp_path / "a.npy", "--run", tmp_path / "run", *TINY]
    np.save(tmp_path / "a.npy", random_images(0))
    assert run_script(train_ae, *flags, "--steps", 1)[0] == 0
    if change == "labels":
        np.save(tmp_path / "a.labels.npy", np.arange(40) % 2)
    else:
        np.save(tmp_path / "a.npy", random_images(1))
    code, printed = run_script(train_ae, *flags, "--resume", "--steps", 2)
    assert code == 2
    assert "give the same data" in last_line(printed)


def test_a_moved_run_continues_where_it_lies(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_script(train_ae, "--run", "runs/old", *TINY, "--steps", 1)[0] == 0
    Path("runs/old").rename("runs/ae")                        # the default place
    code, printed = run_script(train_ae, "--resume", "--steps", 2)
    assert code == 0, printed
    assert load_checkpoint("runs/ae")["step"] == 2
    assert not Path("runs/old").exists()


def test_a_run_with_an_older_default_continues(run_script, tmp_path):
    """The default of --target-rate has changed since. SimCLR does not use it, and giving the
    flag is refused."""
    run = ["--run", tmp_path / "run"]
    assert run_script(train_contrastive, *run, *TINY, "--steps", 1)[0] == 0
    checkpoint = load_checkpoint(tmp_path / "run")
    checkpoint["settings"]["target_rate"] = 0.98
    write_checkpoint(tmp_path / "run" / "checkpoint.pt", checkpoint)
    code, printed = run_script(train_contrastive, *run, "--resume", "--steps", 2)
    assert code == 0, printed


def test_a_run_is_resumed_by_its_own_script_alone(runs, run_script):
    code, printed = run_script(train_ae, "--run", runs / "simclr", "--resume")
    assert code == 2
    assert "was made by train_contrastive.py: resume it with" in last_line(printed)
    code, printed = run_script(train_contrastive, "--run", runs / "ae", "--resume")
    assert code == 2
    assert "was made by train_ae.py: resume it with" in last_line(printed)


def test_a_run_does_not_begin_beside_the_table_of_another(tmp_path, run_script):
    """Its rows and its classifier would look like those of the new run."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "finetune.csv"):
        (run / name).write_text("of a run whose checkpoint was deleted", encoding="utf-8")
    code, printed = run_script(train_contrastive, "--run", run, *TINY)
    assert code == 2
    assert f"{run} holds other files, such as finetune.csv: give another --run" in printed


@pytest.mark.parametrize("left", ["lock", "config.json"])
def test_a_run_killed_before_its_first_checkpoint_restarts(
    left, runs, run_script, tmp_path
):
    """left: the last file that it had written."""
    run = ["--run", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_bytes((runs / "ae" / left).read_bytes())
    code, printed = run_script(train_ae, *run, "--resume")
    assert code == 2
    assert "start it again without --resume" in last_line(printed)
    code, printed = run_script(train_ae, *run, *CORRUPTED, *TINY)
    assert code == 0, printed
    expected = load_checkpoint(runs / "ae")["model"]
    assert_equal_states(load_checkpoint(tmp_path / "run")["model"], expected)


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("script, flags, sentence", [
    (train_contrastive, ["--batch-size", 1], "--batch-size 1: must be at least 2"),
    (train_contrastive, ["--views", 1], "--views 1: must be at least 2"),
    (train_contrastive, ["--temperature", 0], "--temperature 0.0: must be above 0"),
    (train_contrastive, ["--crop", 2], "--crop 2.0: must be at most 1"),
    (train_contrastive, ["--view-size", 7], "--view-size 7: must be even, and at"),
    (train_contrastive, ["--view-size", 15], "--view-size 15: must be even, and at"),
    (train_contrastive, ["--batch-size", 500, "--limit", 400], "found only 400 examples"),
    (train_contrastive, ["--data", "no_such_name"], "expected shapes, cifar10 or a .npy"),
    (train_contrastive, ["--method", "dino"], "'dino' is not one of simclr, byol"),
    (train_contrastive, ["--method", "byol", "--temperature", 0.2], "--method byol has none"),
    (train_contrastive, ["--target-rate", 0.8], "--target-rate: leave it out, --method simclr"),
    (train_contrastive, ["--hue", 0.6], "--hue 0.6: must be at most 0.5"),
    (train_contrastive, ["--save-every", -1], "--save-every -1.0: must be at least 0"),
    (train_ae, ["--save-every", -1], "--save-every -1.0: must be at least 0"),
    (train_ae, ["--beta", -1], "--beta -1.0: must be at least 0"),
    (train_ae, ["--beta", 1], "give both or neither"),
    (train_ae, ["--masked", 1], "--masked 1.0: must be at most 0.95"),
    (train_ae, ["--targets", "normalized"], "give --masked, for example 0.6"),
    (train_ae, ["--data", "not_there.npy"], "--data not_there.npy: file not found"),
])
def test_a_mistake_is_a_sentence_and_leaves_no_folder(
    script, flags, sentence, run_script, tmp_path
):
    code, printed = run_script(script, "--run", tmp_path / "run", *flags)
    assert code == 2
    assert sentence in last_line(printed)
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_masking_an_image_of_one_patch_is_refused(run_script, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "a.npy", images)
    flags = ["--run", tmp_path / "run", "--data", tmp_path / "a.npy", *TINY, "--masked", 0.6]
    code, printed = run_script(train_ae, *flags)
    assert code == 2
    assert "images of 8 × 8 have a single patch" in last_line(printed)
    assert not (tmp_path / "run").exists()
