"""The example of images and captions: the loss is right, nothing leaks, and it learns."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import clip
import clip_baselines as baselines
import clip_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_resumes_exactly, read_log, result_of

import train_contrastive
from minissl import UserError
from minissl.data.batches import generator
from minissl.data.shapes import SHAPES
from minissl.data.splits import TRAIN
from minissl.evaluation import features
from minissl.optim import muon_and_adam
from minissl.training import distributed
from minissl.training.files import load_checkpoint


ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--steps 60 --batch-size 32 --width 8 --text-width 16 --layers 1 --size 16 "
    "--evaluate-every 30 --device cpu --precision float32"
).split()
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 60, 220)}


def unit_vectors(rows, columns=5, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draws, dtype=torch.float64)
    return F.normalize(x, dim=1)


# ---------------------------------------------------------------- the loss

def loss_by_loops(u, v, scale):
    """Both directions by loops in numpy: a softmax over captions, and one over images."""
    B = len(u)
    total = 0.0
    for b in range(B):
        to_captions = [math.exp(scale * np.dot(u[b], v[j])) for j in range(B)]
        to_images = [math.exp(scale * np.dot(u[j], v[b])) for j in range(B)]
        total -= math.log(to_captions[b] / sum(to_captions))
        total -= math.log(to_images[b] / sum(to_images))
    return total / (2 * B)


def test_the_loss_equals_a_loop():
    u, v = unit_vectors(6, seed=1), unit_vectors(6, seed=2)
    for scale in (1.0, 1 / 0.07, 100.0):
        expected = loss_by_loops(u.numpy(), v.numpy(), scale)
        assert float(clip.clip_loss(u, v, scale)) == pytest.approx(expected, rel=1e-12)


def test_the_gradient_equals_differences_of_the_loop():
    u, v = unit_vectors(4, seed=1).requires_grad_(), unit_vectors(4, seed=2).requires_grad_()
    t = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    clip.clip_loss(u, v, t.exp()).backward()
    step = 1e-6
    for tensor in (u, v, t):
        values, gradient = tensor.data.view(-1), tensor.grad.view(-1)
        for index in range(len(values)):
            losses = []
            for sign in (1, -1):
                values[index] += sign * step
                losses.append(loss_by_loops(u.data.numpy(), v.data.numpy(), math.exp(t.item())))
                values[index] -= sign * step
            difference = (losses[0] - losses[1]) / (2 * step)
            assert gradient[index].item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_the_loss_of_a_guess_is_ln_b():
    same = unit_vectors(1).expand(7, -1)
    assert float(clip.clip_loss(same, same, 100.0)) == pytest.approx(math.log(7))


def test_images_and_captions_are_treated_alike():
    u, v = unit_vectors(6, seed=1), unit_vectors(6, seed=2)
    assert clip.clip_loss(u, v, 9.0).item() == pytest.approx(clip.clip_loss(v, u, 9.0).item())
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    reordered = clip.clip_loss(u[order], v[order], 9.0)
    assert reordered.item() == pytest.approx(clip.clip_loss(u, v, 9.0).item())


def test_a_batch_of_one_is_refused(run_script, tmp_path):
    with pytest.raises(ValueError, match="needs 2 pairs"):
        clip.clip_loss(unit_vectors(1), unit_vectors(1), 1.0)
    code, printed = run_script(clip, "--batch-size", 1, "--run", tmp_path / "run")
    assert code == 2
    assert "--batch-size 1: must be at least 2" in printed


# ---------------------------------------------------------------- the floor

def test_the_floor_equals_a_calculation_by_hand():
    assert float(baselines.floor(np.array([0, 1, 2]))) == 0
    expected = (2 * math.log(2) + 3 * math.log(3) + 0) / 6
    assert float(baselines.floor(np.array([7, 7, 4, 4, 4, 1]))) == pytest.approx(expected)


def test_no_vectors_get_below_the_floor():
    meaning = torch.tensor([0, 0, 1, 1, 1, 2])
    floor = float(baselines.floor(meaning))
    best = torch.eye(3, dtype=torch.float64)[meaning]         # one direction for each meaning
    assert clip.clip_loss(best, best, 100.0).item() == pytest.approx(floor, abs=1e-9)
    for seed in range(50):
        u = unit_vectors(6, seed=seed)
        v = unit_vectors(3, seed=100 + seed)[meaning]         # equal captions, equal vectors
        near = F.normalize(v + 0.1 * u, dim=1)
        assert clip.clip_loss(near, v, 100.0).item() >= floor - 1e-9


def test_equal_captions_count_as_right_in_retrieval():
    meaning = np.array([5, 5, 8, 9])
    s = torch.tensor([
        [0.1, 0.8, 0.0, 0.0],         # the nearest caption is another one that says the same
        [0.1, 0.7, 0.0, 0.0],
        [0.0, 0.0, 0.2, 0.9],         # wrong
        [0.2, 0.9, 0.1, 0.8],         # wrong
    ])
    recall_of_captions, recall_of_images, chance = baselines.recall(s, meaning)
    assert recall_of_captions == 50
    assert recall_of_images == 25     # by columns: wrong, wrong, right, wrong
    assert chance == pytest.approx(100 * (2 + 2 + 1 + 1) / 16)


def test_the_measured_loss_is_that_of_the_training(own_pairs):
    pairs = clip_data.load_pairs(str(own_pairs)).select(np.arange(11))
    model, _, settings = small_model(pairs)
    model.t.data.fill_(1.5)
    machine = torch.device("cpu"), torch.float32, torch.autocast("cpu", enabled=False)
    measured = baselines.measure(model, pairs, settings, machine, clip.clip_loss)
    order = torch.randperm(11, generator=generator(0, "measured order", 0)).numpy()
    losses = []
    for begin in (0, 4):              # two batches of 4 are full
        images, tokens, lengths = pairs.batch(order[begin:begin + 4], 16, "cpu")
        with torch.no_grad():
            u, v = model.image_vectors(images), model.text_vectors(tokens, lengths)
        losses.append(loss_by_loops(u.double().numpy(), v.double().numpy(), math.exp(1.5)))
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


# ---------------------------------------------------------------- the temperature

def small_model(pairs):
    settings = clip.Settings(width=8, text_width=16, layers=1, size=16, batch_size=4, steps=10)
    model, _, optimizers = clip.make_model(settings, pairs, torch.device("cpu"), torch.float32)
    return model, optimizers, settings


def test_the_temperature_starts_at_7_hundredths_and_is_clamped(own_pairs):
    pairs = clip_data.load_pairs(str(own_pairs))
    model, optimizers, settings = small_model(pairs)
    assert model.t.exp().item() == pytest.approx(1 / 0.07)
    batch = pairs.batch(np.arange(4), 16, "cpu")
    before = model.t.item()
    clip.train_step(model, optimizers, batch, 5, settings, torch.autocast("cpu", enabled=False))
    assert model.t.item() != before                           # it is learned
    model.t.data.fill_(7)
    clip.train_step(model, optimizers, batch, 5, settings, torch.autocast("cpu", enabled=False))
    assert model.t.exp().item() == pytest.approx(100)


def test_vectors_have_length_one_and_padding_does_not_matter(own_pairs):
    pairs = clip_data.load_pairs(str(own_pairs))
    model, _, _ = small_model(pairs)
    for parameter in model.text_encoder.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    images, tokens, lengths = pairs.batch(np.arange(6), 16, "cpu")
    u, v = model.image_vectors(images), model.text_vectors(tokens, lengths)
    assert u.norm(dim=1).tolist() == pytest.approx([1] * 6, rel=1e-5)
    assert v.norm(dim=1).tolist() == pytest.approx([1] * 6, rel=1e-5)
    padded = model.text_vectors(F.pad(tokens, (0, 5)), lengths)
    torch.testing.assert_close(padded, v, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the drawn pairs

@pytest.fixture(scope="module")
def shape_pairs():
    return clip_data.load_pairs("shapes", limit=1000)


def words_of(caption):
    return set(caption.replace(",", "").replace("half disc", "half-disc").split())


def test_never_captioned_combinations_do_not_occur_in_training(shape_pairs):
    words = dict(small={"small", "little", "tiny"}, large={"large", "big", "huge"})
    train, held_out, test = shape_pairs.split()
    assert len(clip_data.NEVER_CAPTIONED) == len(SHAPES)
    for pairs, occurs in [(train, False), (held_out, True), (test, True)]:
        for size, colour, shape in clip_data.NEVER_CAPTIONED:
            found = 0
            for caption in pairs.captions:
                said = words_of(caption)
                is_size = size == "any" or bool(said & words[size])
                found += is_size and {colour, shape.replace(" ", "-")} <= said
            assert (found > 0) == occurs, (size, colour, shape)
            if size == "any" or occurs:
                continue
            other_sizes = 0           # the combination is captioned in these
            for caption in pairs.captions:
                other_sizes += {colour, shape.replace(" ", "-")} <= words_of(caption)
            assert other_sizes > 0, (size, colour, shape)
    assert not train.is_new.any() and test.is_new.any()
    split = shape_pairs.images.split
    removed = shape_pairs.select((split == TRAIN) & shape_pairs.is_new)
    assert len(train) + len(removed) == 1000
    assert not set(train.images.rows.tolist()) & set(removed.images.rows.tolist())


def test_every_word_of_the_prompts_is_learned(shape_pairs):
    train = shape_pairs.split()[0]
    known = set()
    for caption in train.captions:
        known |= set(caption.replace(",", "").split())
    for prompt in clip.Settings().prompts:
        for shape in SHAPES:
            assert set(prompt.replace("{class}", shape).split()) <= known


def test_shuffling_changes_the_captions_alone(shape_pairs):
    order = np.roll(np.arange(len(shape_pairs)), 1)
    shuffled = shape_pairs.shuffled(order)
    assert (shuffled.captions[1:] == shape_pairs.captions[:-1]).all()
    assert (shuffled.meaning[1:] == shape_pairs.meaning[:-1]).all()
    assert shuffled.texts[1].tolist() == shape_pairs.texts[0].tolist()
    assert shuffled.images is shape_pairs.images

    bag = shape_pairs.with_words_shuffled(seed=0)
    changed = 0
    for before, after in zip(shape_pairs.captions, bag.captions):
        assert sorted(before.split()) == sorted(after.split())
        changed += before != after
    assert changed > 0.99 * len(bag)
    assert (bag.meaning == shape_pairs.meaning).all()


# ---------------------------------------------------------------- own pairs

def write_pairs(folder, n=300, seed=0):
    """n images of a coloured half, left or right, with captions and the colour as label."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    labels = rng.integers(0, 3, n)
    is_left = rng.random(n) < 0.5
    images = rng.integers(0, 60, (n, 16, 16, 3))
    captions = []
    for i in range(n):
        columns = slice(0, 8) if is_left[i] else slice(8, 16)
        images[i, :, columns] += np.array(COLOURS[names[labels[i]]]) * 3 // 4
        side = "left" if is_left[i] else "right"
        patterns = [f"the {side} half is {names[labels[i]]}", f"{names[labels[i]]} on the {side}"]
        captions.append(patterns[i % 2])
    np.save(folder / "mine.npy", images.astype(np.uint8))
    np.save(folder / "mine.labels.npy", labels)
    (folder / "mine.captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder / "mine.npy"


@pytest.fixture
def own_pairs(tmp_path):
    return write_pairs(tmp_path)


def figures_of(printed):
    return {name: float(value) for name, value in result_of(printed).items()}


def test_captions_stay_with_their_images(own_pairs):
    images = np.load(own_pairs)
    images[10] = images[3]                                    # a copy, which is left out
    np.save(own_pairs, images)
    lines = (own_pairs.parent / "mine.captions.txt").read_text().splitlines()
    pairs = clip_data.load_pairs(str(own_pairs))
    assert len(pairs) == 299
    for part in pairs.split():
        for n in (0, 9, len(part) - 1):
            row = int(part.images.rows[n])
            assert part.captions[n] == lines[row]
            assert part.texts.tokenizer.decode(part.texts[n]) == lines[row]
            assert (part.images[n].permute(1, 2, 0).numpy() == images[row]).all()
    same = pairs.meaning[:, None] == pairs.meaning
    assert (same == (pairs.captions[:, None] == pairs.captions)).all()


def test_a_short_run_learns(own_pairs, run_script, tmp_path):
    run = tmp_path / "run"
    prompts = ["--classes", *COLOURS, "--prompts", "{class} on the left", "{class}"]
    code, printed = run_script(clip, "--data", own_pairs, "--run", run, *prompts, *SMALL)
    assert code == 0, printed
    assert f"(chance {math.log(32):.4g})" in printed
    assert "| nearest:" in printed
    rows = read_log(run)
    assert float(rows[-1]["loss"]) < 0.75 * math.log(32)
    assert float(rows[-1]["floor"]) > 0.5
    assert all(float(row["loss"]) > float(row["floor"]) for row in rows)
    result = figures_of(printed)
    assert result["zero_shot"] > 90                           # chance: 33
    assert result["recall"] > 40      # chance: 8; two wordings say the same, so at most 50 or so


def test_with_captions_shuffled_nothing_is_learned(own_pairs, run_script, tmp_path):
    path = tmp_path / "mine.captions.txt"
    lines = path.read_text().splitlines()
    order = np.random.default_rng(1).permutation(len(lines))
    path.write_text("\n".join(lines[i] for i in order))
    arguments = ["--data", own_pairs, "--run", tmp_path / "run", "--classes", *COLOURS]
    code, printed = run_script(clip, *arguments, "--prompts", "{class} on the left", *SMALL)
    assert code == 0, printed
    assert figures_of(printed)["zero_shot"] < 60               # chance: 33, with 60 test images
    assert figures_of(printed)["loss"] > math.log(32) - 0.2


def test_a_stopped_run_ends_at_the_same_bytes(own_pairs, run_script, tmp_path):
    data = ["--data", own_pairs]
    short = [*SMALL, "--steps", 40, "--evaluate-every", 20]
    code, printed = run_script(clip, *data, "--run", tmp_path / "whole", *short)
    assert code == 0, printed
    assert_resumes_exactly(
        run_script, clip, [*data, *short], tmp_path / "whole", printed, last_step=14
    )
    assert "zero_shot" not in figures_of(printed)              # the classes have no names

    (tmp_path / "mine.captions.txt").write_text("another caption\n" * 300)
    code, printed = run_script(clip, "--run", tmp_path / "run", "--resume")
    assert code == 2
    assert "give the same data" in printed


def test_without_labels_the_held_out_pairs_are_the_test(own_pairs, tmp_path):
    (tmp_path / "mine.labels.npy").unlink()
    pairs = clip_data.load_pairs(str(own_pairs))
    train, held_out, test = pairs.split()
    assert len(train) == 270 and len(held_out) == 30
    assert (test.images.rows == held_out.images.rows).all()
    [note] = pairs.images.notes
    assert "the held-out pairs are also the test" in note


def test_labels_without_names_are_noted(own_pairs):
    [note] = clip_data.load_pairs(str(own_pairs)).images.notes
    assert note.startswith("no zero-shot accuracy, because the 3 classes of mine.labels.npy have")
    assert clip_data.load_pairs(str(own_pairs), classes=list(COLOURS)).images.notes == []


def test_large_images_are_encoded_in_small_batches(own_pairs, monkeypatch):
    pairs = clip_data.load_pairs(str(own_pairs)).select(np.arange(30))
    model, _, _ = small_model(pairs)
    machine = torch.device("cpu"), torch.float32, torch.autocast("cpu", enabled=False)
    u, v = baselines.encode_pairs(model.eval(), pairs, machine)
    sizes, batch = [], pairs.batch

    def recorded(indices, *rest):
        sizes.append(len(indices))
        return batch(indices, *rest)

    monkeypatch.setattr(pairs, "batch", recorded)
    monkeypatch.setattr(features, "BYTES_A_BATCH", 10 * 4 * 3 * 16 * 16)
    small_u, small_v = baselines.encode_pairs(model, pairs, machine)
    assert sizes == [10, 10, 10]
    torch.testing.assert_close(small_u, u)
    torch.testing.assert_close(small_v, v)


@pytest.mark.parametrize("text, sentence", [
    (None, "mine.captions.txt: file not found; expected a line for each of the 300 images"),
    ("a red one\n" * 299, "mine.captions.txt: found 299 lines; expected a line for each"),
    ("a red one\n" * 7 + "  \n" + "a red one\n" * 292, "line 8 is empty; write a caption"),
    (b"\xff\xfe" * 300, "mine.captions.txt cannot be read"),
])
def test_wrong_captions_are_one_sentence(text, sentence, own_pairs, run_script, tmp_path):
    path = tmp_path / "mine.captions.txt"
    path.unlink()
    if text:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, printed = run_script(clip, "--data", own_pairs, "--run", tmp_path / "run", *SMALL)
    assert code == 2
    assert sentence in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, sentence", [
    (["--classes", "red", "green"], "--classes: found 2 names; expected 3"),
    (["--limit", 1], "--limit 1: a single pair has nothing to be confused with"),
    (["--data", "shapes", "--limit", 2], "--limit 2: no test image shows a combination that is"),
    (["--data", "shapes", "--classes", "star"], "--classes: drawn shapes have their names"),
    (["--data", "cifar10"], "--data cifar10: expected shapes, or a .npy file"),
    (["--prompts", "a thing"], "--prompts: write {class} where the name of the class belongs"),
    (["--text-width", "12"], "--text-width 12: must be a multiple of 8"),
])
def test_wrong_flags_are_one_sentence(flags, sentence, own_pairs, run_script, tmp_path):
    code, printed = run_script(clip, "--data", own_pairs, "--run", tmp_path / "run", *flags)
    assert code == 2
    assert sentence in printed


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="runs in one process"):
        clip.Settings()


# ---------------------------------------------------------------- the table

def test_simclr_is_that_of_train_contrastive_but_for_its_weight_decay(
    own_pairs, run_script, tmp_path, monkeypatch
):
    def with_more_decay(model, lr, weight_decay, precision):
        return muon_and_adam(model, lr, 0.2, precision)

    monkeypatch.setattr(train_contrastive, "muon_and_adam", with_more_decay)
    views = "--crop 0.5 --jitter 0.8 --hue 0.5 --grey 0.4".split()        # those of drawn shapes
    width = ["--width", 8, "--device", "cpu", "--precision", "float32"]
    run = ["--data", own_pairs, "--run", tmp_path / "run", "--steps", 5]
    code, printed = run_script(train_contrastive, *run, *views, *width)
    assert code == 0, printed
    expected = load_checkpoint(tmp_path / "run")["model"]
    train, _, _ = clip_data.load_pairs(str(own_pairs)).split()
    settings = clip.Settings(width=8, steps=4)                            # a quarter more: 5
    machine = torch.device("cpu"), torch.float32, torch.autocast("cpu", enabled=False)
    model = baselines.train_simclr(train.images, settings, machine)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_table_has_every_control(run_script, tmp_path):
    arguments = ["--limit", 200, "--draws", 2, "--run", tmp_path / "run", *SMALL, "--steps", 2]
    code, printed = run_script(clip, *arguments)
    assert code == 0, printed
    for row in ("CLIP, by prompts", "captions shuffled among images",
                "words shuffled within captions", "SimCLR, probe", "CLIP, probe"):
        assert row in printed
    result = figures_of(printed)
    for name in ("zero_shot", "never_captioned", "captions_shuffled", "words_shuffled",
                 "simclr_10_labels", "loss", "floor", "recall"):
        assert name in result
    assert 0 < result["floor"] < 0.2


def test_the_probe_does_not_learn_from_test_labels(shape_pairs):
    train, _, test = shape_pairs.split()
    known = train.images

    def mean_colour(x):
        return x.mean((2, 3))

    machine = torch.device("cpu"), torch.float32, torch.autocast("cpu", enabled=False)
    (per_class, of_all, _), *_ = baselines.probe(mean_colour, known, test, 2, machine)
    assert per_class == 10
    assert 3 < np.mean(of_all) < 20                           # chance: 10
    test.images.labels = np.zeros(len(test), int)
    _, of_zero, _ = baselines.probe(mean_colour, known, test, 2, machine)[0]
    assert of_zero != of_all


def test_a_mirrored_probe_does_not_tell_left_from_right(shape_pairs):
    train, _, test = shape_pairs.split()
    mirrored = replace(test.images, pixels=test.images.pixels.flip(3))

    def left_half(x):
        return x[..., :16].mean((2, 3))

    machine = torch.device("cpu"), torch.float32, torch.autocast("cpu", enabled=False)
    for mirror in (True, False):
        both = []
        for images in (test.images, mirrored):
            pairs = replace(test, images=images)
            both.append(baselines.probe(left_half, train.images, pairs, 2, machine, mirror))
        assert (both[0] == both[1]) == mirror


def test_the_example_starts_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "clip.py"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--prompts" in ended.stdout
