"""Features, and runs opened again: every example counts, whatever its size or its neighbours."""

import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import minissl
from minissl import UserError, tokenizer
from minissl.contrastive import SimCLR
from minissl.data.images import Images
from minissl.data.texts import Texts, encode_texts
from minissl.evaluation import features, load
from minissl.evaluation.features import image_features, text_features
from minissl.training.files import CHECKPOINT_FORMAT, write_checkpoint
from minissl.transformer import TextEncoder, norm


STORY = "the ship sails and the storm sinks the ship while the sailor waits at the harbour"


def learned_tokenizer():
    return tokenizer.train_tokenizer([STORY], 262)


def random_text_model(vocabulary_size, window=6):
    """A small encoder with random parameters: zeros would hide what they multiply."""
    torch.manual_seed(0)
    shape = dict(vocabulary_size=vocabulary_size, pairs=torch.tensor([], dtype=torch.int64),
                 width=8, layers=2, heads=2, window=window, document_columns=4)
    model = TextEncoder(**shape)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model, shape


def write_text_run(folder, **settings):
    """The folder of a run of train_mlm.py with random weights."""
    learned = learned_tokenizer()
    model, shape = random_text_model(len(learned), window=32)
    settings = dict(run=str(folder), masked_weight=1.0, embedding_steps=10) | settings
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / "checkpoint.pt", dict(
        format=CHECKPOINT_FORMAT, method="mlm", step=settings.pop("step", 30), data="",
        model=model.state_dict(), model_settings=shape, settings=settings,
        tokenizer=learned.to_json()))
    return folder


def write_image_run(folder, channels=3, no_flip=False):
    """The folder of a run of train_contrastive.py with random weights."""
    torch.manual_seed(0)
    shape = dict(mean=[0.5] * channels, whitening=torch.eye(4 * channels).tolist(), width=8)
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / "checkpoint.pt", dict(
        format=CHECKPOINT_FORMAT, method="simclr", step=30, data="",
        model=SimCLR(**shape).state_dict(), model_settings=shape,
        settings=dict(run=str(folder), no_flip=no_flip)))
    return folder


# ---------------------------------------------------------------- texts

def texts_of_lengths(lengths, vocabulary_size=12):
    """Random Texts of these lengths."""
    lengths = np.array(lengths)
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, vocabulary_size, lengths.sum()).astype(np.uint16)
    return Texts(tokens, np.cumsum(lengths) - lengths, lengths, np.full(len(lengths), -1),
                 np.zeros(len(lengths), np.uint8), [], None)


def test_features_of_texts_are_means_over_all_their_tokens():
    model, _ = random_text_model(12, window=6)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = texts_of_lengths([17, 6, 7, 1, 12, 29])
    order = np.array([3, 0, 5, 1, 2, 4])            # the texts need not follow each other
    found = features.document_vectors(model, texts.select(order), nullcontext())
    for row, n in enumerate(order):
        tokens = torch.from_numpy(texts[n])
        parts = -(-len(tokens) // 6)
        total = torch.zeros(4)
        for part in range(parts):
            first, end = len(tokens) * part // parts, len(tokens) * (part + 1) // parts
            total += model(tokens[None, first:end])[0, :, :4].sum(0).detach()
        torch.testing.assert_close(found[row], total / len(tokens), rtol=1e-4, atol=1e-5)
    normalized = text_features(model, texts.select(order), nullcontext())
    expected = found - found.mean(1, keepdim=True)
    expected = expected / expected.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(normalized, expected, rtol=1e-3, atol=1e-3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def fake_text_model(window, width=256):
    """Its features are the length of a sequence and the mean of its tokens."""
    def encode(tokens, lengths):
        batches.append(tokens.shape)
        return torch.stack([lengths, tokens.sum(1) / lengths], dim=1).float()
    batches = []
    return SimpleNamespace(window=window, document_columns=2, encode=encode, batches=batches,
                           token_embedding=SimpleNamespace(embedding_dim=width))


def test_the_gradient_is_that_of_one_document_at_a_time():
    model, _ = random_text_model(12, window=6)
    texts = texts_of_lengths([17, 6, 7, 1, 12, 29])
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def gradients(vectors):
        model.zero_grad()
        (vectors * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()
                if p.grad is not None}

    together = gradients(features.document_vectors(model, texts, nullcontext()))
    one_by_one = []
    for n in range(6):
        tokens = torch.from_numpy(texts[n])
        parts = -(-len(tokens) // 6)
        total = 0
        for part in range(parts):
            first, end = len(tokens) * part // parts, len(tokens) * (part + 1) // parts
            total = total + model(tokens[None, first:end])[0, :, :4].sum(0)
        one_by_one.append(total / len(tokens))
    expected = gradients(torch.stack(one_by_one))
    assert together.keys() == expected.keys()
    assert any("attention" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)


def test_a_training_step_reads_neighbouring_windows(monkeypatch):
    monkeypatch.setattr(features, "MOST_WINDOWS", 3)
    texts = texts_of_lengths([25, 100, 7])
    first_windows = set()
    for number in np.linspace(0, 0.999, 40):
        draws = torch.full((3,), number)
        windows, owner = features.windows_of(texts, 10, draws)
        assert owner.tolist() == [0, 0, 0, 1, 1, 1, 2]
        starts = windows.starts - texts.starts[owner]
        assert starts[:3].tolist() == [0, 8, 16] and starts[6] == 0
        assert np.diff(starts[3:6]).tolist() == [10, 10]
        first_windows.add(starts[3])
    assert first_windows == set(range(0, 71, 10))       # the last one ends at the end


@pytest.mark.parametrize("window", [1000, 20, 1])
def test_every_token_counts_whatever_the_window(window):
    texts = texts_of_lengths(np.arange(777) % 37 * 10 + 1)
    model = fake_text_model(window)
    found = features.document_vectors(model, texts, nullcontext())
    expected = [texts[n].mean() for n in range(777)]
    assert found[:, 1].tolist() == pytest.approx(expected, rel=1e-5)
    if window == 1000:
        assert len(model.batches) > 3
        assert found[:, 0].tolist() == texts.lengths.tolist()


def test_a_wide_text_encoder_gets_smaller_batches():
    texts = texts_of_lengths([100] * 1000)
    largest = {}
    for width in (64, 256, 1024):
        model = fake_text_model(100, width)
        text_features(model, texts, nullcontext())
        largest[width] = max(B * T for B, T in model.batches)
    assert largest == {64: 8_100, 256: 8_100, 1024: 2_000}


# ---------------------------------------------------------------- images

@pytest.mark.parametrize("batch", [1, 7, 60, 61, 100])
def test_every_image_counts_whatever_the_batch(batch):
    pixels = torch.randint(0, 256, (61, 1, 8, 8), dtype=torch.uint8)
    features = image_features(lambda x: x.flatten(1), pixels, nullcontext(), batch=batch)
    assert torch.equal(features, pixels.flatten(1).float() / 255)


def test_features_are_the_mean_over_image_and_mirror_image():
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)

    def square(x):
        return x.flatten(1) ** 2
    given = [image_features(square, each, nullcontext()) for each in (pixels, pixels.flip(3))]
    features = image_features(square, pixels, nullcontext(), mirror=True)
    torch.testing.assert_close(features, (given[0] + given[1]) / 2)


def test_a_batch_of_large_images_is_bounded_by_its_bytes():
    seen = []

    def encode(x):
        seen.append(len(x))
        return x.mean((2, 3))
    for size, expected in ((32, [250, 50]), (512, [5, 5, 2])):
        pixels = torch.zeros(300 if size == 32 else 12, 3, size, size, dtype=torch.uint8)
        rows = torch.arange(len(pixels))
        labels = np.full(len(pixels), -1)
        images = Images(pixels, rows, labels, np.zeros(len(pixels), np.uint8), [])
        for given in (pixels, images):
            seen.clear()
            image_features(encode, given, nullcontext())
            assert seen == expected


# ---------------------------------------------------------------- a run opened again

@pytest.mark.parametrize("no_flip", [False, True])
def test_load_encoder_mirrors_as_the_training_did(no_flip, tmp_path):
    run = write_image_run(tmp_path / "run", no_flip=no_flip)
    array = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    features = load.load_encoder(run)(array)
    of_mirror_images = load.load_encoder(run)(array[:, :, ::-1])
    assert torch.allclose(features, of_mirror_images, atol=1e-5) != no_flip



def test_load_encoder_takes_strings_from_a_list_or_a_generator(tmp_path):
    run = write_text_run(tmp_path / "run")
    encode = load.load_encoder(run)
    strings = ["the ship waits", STORY * 3, "a storm"]
    features = encode(strings)
    assert features.shape == (3, 4) and features.dtype == torch.float32
    assert torch.equal(encode(string for string in strings), features)
    model, checkpoint = load.load_run(run)
    texts = encode_texts(strings[:1], load.tokenizer_of(checkpoint, run))
    with torch.no_grad():
        vector = model.encode(torch.from_numpy(texts[0])[None], torch.tensor([len(texts[0])]))
    torch.testing.assert_close(features[:1], norm(vector), rtol=1e-4, atol=1e-5)


def test_minissl_offers_load_encoder_without_importing_torch():
    assert minissl.load_encoder is load.load_encoder
    command = "import minissl, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[1])


def test_a_string_that_is_no_list_is_refused(tmp_path):
    encode = load.load_encoder(write_text_run(tmp_path / "run"))
    for wrong in ("the ship sails", ["the ship sails", None], []):
        with pytest.raises(UserError):
            encode(wrong)


def test_load_encoder_takes_grey_and_colour_arrays(tmp_path):
    rng = np.random.default_rng(0)
    for channels, shape in ((3, (5, 16, 16, 3)), (1, (5, 16, 16))):
        array = rng.integers(0, 256, shape, np.uint8)
        encode = load.load_encoder(write_image_run(tmp_path / str(channels), channels))
        features = encode(array)
        assert features.shape == (5, 20 * 8 + 2048) and features.dtype == torch.float32
        torch.testing.assert_close(encode(array[2:3])[0], features[2], rtol=1e-4, atol=1e-5)


def test_a_read_only_array_causes_no_warning(tmp_path):
    array = np.zeros((2, 16, 16, 3), np.uint8)
    array.flags.writeable = False
    encode = load.load_encoder(write_image_run(tmp_path / "run"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(array)


@pytest.mark.parametrize("array, sentence", [
    (np.zeros((2, 16, 16, 3)), "found an array of float64 of shape"),
    (np.zeros((16, 16), np.uint8), r"of shape \(16, 16\); expected uint8"),
    (np.zeros((0, 16, 16, 3), np.uint8), "at least one image"),
    (np.zeros((2, 4, 4, 3), np.uint8), "found images of 4 × 4 × 3; expected at least 8 × 8"),
    (np.zeros((2, 16, 16), np.uint8), "found images of 16 × 16 × 1; the run was trained on"),
])
def test_other_arrays_are_refused_with_a_sentence(array, sentence, tmp_path):
    encode = load.load_encoder(write_image_run(tmp_path / "run"))
    with pytest.raises(UserError, match=sentence):
        encode(array)


def test_an_unknown_method_is_refused_with_a_sentence(tmp_path):
    checkpoint = dict(format=CHECKPOINT_FORMAT, method="jigsaw", script="puzzle.py")
    write_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    with pytest.raises(UserError, match="puzzle.py, with the method jigsaw.*puzzle.py says how"):
        load.load_run(tmp_path)


def test_runs_on_texts_are_told_from_runs_on_images(tmp_path):
    _, of_texts = load.load_run(write_text_run(tmp_path / "texts"))
    _, of_images = load.load_run(write_image_run(tmp_path / "images"))
    assert load.reads_texts(of_texts) and load.reads_texts({**of_texts, "method": "gpt"})
    assert not load.reads_texts(of_images)


def test_a_run_that_was_moved_is_named_by_its_new_folder(tmp_path):
    moved = write_text_run(tmp_path / "old").rename(tmp_path / "new")
    _, checkpoint = load.load_run(moved)
    del checkpoint["tokenizer"], checkpoint["settings"]
    with pytest.raises(UserError, match=f"^{moved / 'checkpoint.pt'} does not hold what it should"):
        load.tokenizer_of(checkpoint, moved)


def test_fill_prints_the_likeliest_words_for_each_mask(tmp_path, capsys):
    run = write_text_run(tmp_path / "run")
    load.fill(run, "the [MASK] sails and the[MASK]")
    first, second = capsys.readouterr().out.splitlines()
    model, checkpoint = load.load_run(run)
    words = load.tokenizer_of(checkpoint, run)
    before, between = words.encode("the ").tolist(), words.encode(" sails and the").tolist()
    tokens = [*before, tokenizer.MASK, *between, tokenizer.MASK]
    with torch.no_grad():
        x = model(torch.tensor([tokens]))[0, [len(before), len(tokens) - 1]]
        rows = model.token_logits(x).softmax(1)
    for n, (line, row) in enumerate(zip((first, second), rows), 1):
        best = int(row.argmax())
        assert line.startswith(f"[MASK] {n}: {words.decode([best])} {row[best]:.2f}, ")
        assert line.count(", ") >= 4


@pytest.mark.parametrize("settings, sentence", [
    (dict(masked_weight=0.0), "trained with --masked-weight 0"),
    (dict(step=10), "is at step 10, and it learns to fill in words after step 10"),
])
def test_fill_refuses_a_run_that_has_not_learned_to(settings, sentence, tmp_path):
    run = write_text_run(tmp_path / "run", **settings)
    with pytest.raises(UserError, match=sentence):
        load.fill(run, "the [MASK] sails")


def test_fill_refuses_images_and_texts_without_a_mask(tmp_path):
    with pytest.raises(UserError, match="was trained on images"):
        load.fill(write_image_run(tmp_path / "images"), "the [MASK] sails")
    with pytest.raises(UserError, match=r"found 0 \[MASK\]"):
        load.fill(write_text_run(tmp_path / "texts"), "the ship sails")
