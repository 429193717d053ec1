"""Previews: neighbours, labels that are partly missing, and images that are large."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl import UserError, autoencoder, contrastive
from minissl.autoencoder import normalize_patches
from minissl.data.images import Images
from minissl.data.splits import HELD_OUT, TEST, TRAIN
from minissl.data.text_sources import load_texts
from minissl.evaluation import features, previews
from minissl.evaluation.previews import (
    AutoencoderPreview,
    ContrastivePreview,
    NeighbourPreview,
    TextPreview,
    preview_size,
)
from minissl.transformer import TextEncoder


CPU = torch.device("cpu")


def images_of(pixels, labels, split):
    return Images(pixels, torch.arange(len(pixels)), labels, split, list("abc"))


def random_pixels(n, seed=0, size=8):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, size, size), generator=draws).byte()


def flatten(x):
    return x.flatten(1).float()


def make_neighbours(data, folder, **options):
    return NeighbourPreview(data, folder, nullcontext(), CPU, **options)


def make_contrastive(data, folder):
    return ContrastivePreview(data, no_numbers, two_views, folder, nullcontext(), CPU)


def make_autoencoder(data, folder, corrupt=None, **options):
    return AutoencoderPreview(data, corrupt or unchanged, folder, nullcontext(), CPU, **options)


# ---------------------------------------------------------------- neighbours

@pytest.fixture
def copied_data():
    """12 training images, the same 12 in reverse order held out, and 12 others to test on."""
    pixels = random_pixels(36)
    labels = np.arange(36) % 3
    pixels[12:24] = pixels[:12].flip(0)
    labels[12:24] = labels[11::-1]
    split = np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), 12)
    return images_of(pixels, labels, split)


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to report.grid and report.scatter."""
    drawn = SimpleNamespace(rows=[], labels=[], points=None, point_labels=None)
    grid, scatter = previews.report.grid, previews.report.scatter

    def note_grid(rows, labels=None):
        drawn.rows, drawn.labels = rows, labels
        return grid(rows, labels)

    def note_scatter(points, labels):
        drawn.points, drawn.point_labels = points, labels
        return scatter(points, labels)

    monkeypatch.setattr(previews.report, "grid", note_grid)
    monkeypatch.setattr(previews.report, "scatter", note_scatter)
    return drawn


def test_beside_a_held_out_image_stands_its_nearest(copied_data, drawn, tmp_path):
    preview = make_neighbours(copied_data, tmp_path)
    assert preview(flatten) == 100
    assert len(drawn.rows) == 10
    for row in drawn.rows:
        assert torch.equal(row[0], row[1])                    # its copy among the training images
        assert not torch.equal(row[0], row[2])
    assert (tmp_path / "neighbours.png").exists()


def test_a_frame_shows_the_label_of_its_image(copied_data, drawn, tmp_path):
    make_neighbours(copied_data, tmp_path)(flatten)
    label_of = {}
    for n in range(24):
        label_of[copied_data[n].numpy().tobytes()] = copied_data.labels[n]
    for row, labels in zip(drawn.rows, drawn.labels):
        expected = [label_of[image.numpy().tobytes()] for image in row]
        assert list(labels) == expected


def test_the_map_shows_the_held_out_images(copied_data, drawn, tmp_path):
    make_neighbours(copied_data, tmp_path)(flatten)
    assert drawn.points.shape == (12, 2)
    assert drawn.point_labels.tolist() == copied_data.labels[12:24].tolist()
    assert (tmp_path / "map.png").exists()
    train = copied_data[:12].flatten(1).float() / 255
    held_out = copied_data[12:24].flatten(1).float() / 255
    queries = F.normalize(held_out - train.mean(0), dim=1)
    values, _ = torch.linalg.eigh(queries.T @ queries)        # from the smallest to the largest
    products = drawn.points.T @ drawn.points                  # the two principal components
    np.testing.assert_allclose(products, np.diag([values[-1], values[-2]]), atol=1e-4)


def test_the_features_of_neighbours_are_averaged_over_the_mirror_image(
    copied_data, tmp_path, monkeypatch
):
    compared = []

    def note_features(train, train_labels, queries, query_labels):
        compared.extend([train, queries])
        return 50

    monkeypatch.setattr(previews, "knn_accuracy", note_features)
    make_neighbours(copied_data, tmp_path, mirror=True)(flatten)
    for found, images in zip(compared, (copied_data[:12], copied_data[12:24])):
        x = images.float() / 255
        expected = (flatten(x) + flatten(x.flip(3))) / 2
        torch.testing.assert_close(found, expected)


def test_features_that_are_not_finite_end_the_run(copied_data, tmp_path):
    preview = make_neighbours(copied_data, tmp_path)
    with pytest.raises(UserError, match="the features are not finite in a preview"):
        preview(lambda x: flatten(x) / 0)


# ---------------------------------------------------------------- missing labels

def two_kinds(n, seed):
    """Dark and bright images by turns, and their labels 0 and 1."""
    pixels = random_pixels(n, seed) // 4
    pixels[1::2] += 150
    return pixels, np.arange(n) % 2


@pytest.fixture
def partly_labelled():
    """Of 100 training images ten have a label, of 40 held-out images four."""
    train_pixels, train_labels = two_kinds(100, seed=1)
    held_out_pixels, held_out_labels = two_kinds(40, seed=2)
    train_labels[10:] = -1
    held_out_labels[4:] = -1
    pixels = torch.cat([train_pixels, held_out_pixels])
    labels = np.append(train_labels, held_out_labels)
    split = np.repeat(np.uint8([TRAIN, HELD_OUT]), [100, 40])
    return images_of(pixels, labels, split)


def test_knn_uses_the_labelled_images_alone(partly_labelled, tmp_path, monkeypatch):
    compared = []

    def note_labels(train, train_labels, queries, query_labels):
        compared.append((len(train), list(train_labels), len(queries), list(query_labels)))
        return 66.666

    monkeypatch.setattr(previews, "knn_accuracy", note_labels)
    preview = make_neighbours(partly_labelled, tmp_path)
    assert preview(flatten) == 66.67
    assert compared == [(10, [0, 1] * 5, 4, [0, 1] * 2)]


def test_knn_of_partly_labelled_images_is_right(partly_labelled, tmp_path):
    preview = make_neighbours(partly_labelled, tmp_path)
    assert preview(flatten) == 100


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_without_labels_there_is_no_knn(split, partly_labelled, tmp_path):
    partly_labelled.labels[partly_labelled.split == split] = -1
    preview = make_neighbours(partly_labelled, tmp_path)
    assert preview(flatten) == ""


def test_labels_of_one_class_give_no_knn(partly_labelled, tmp_path, capsys):
    labels = partly_labelled.labels
    labels[labels >= 0] = 1
    preview = make_neighbours(partly_labelled, tmp_path)
    assert "one class only: b" in capsys.readouterr().out
    assert preview(flatten) == ""


def test_knn_of_many_images_half_of_them_labelled_is_right(tmp_path):
    """The previews look at 2,000 of 6,000 images, of which 3,000 have a label."""
    labels = np.arange(6000) % 3
    pixels = torch.zeros(6000, 1, 8, 8, dtype=torch.uint8)
    for label in range(3):
        pixels[labels == label, 0, label] = 200                       # a bright row for each class
    split = np.repeat(np.uint8([TRAIN, HELD_OUT]), [4500, 1500])
    given = np.where(np.arange(6000) % 4 < 2, labels, -1)
    data = Images(pixels, torch.arange(6000), given, split, ["a", "b", "c"])
    preview = make_neighbours(data, tmp_path)
    assert preview(lambda x: x.flatten(1)) == 100


@pytest.fixture
def labelled_texts(tmp_path):
    """30 texts in the folders sea and city."""
    for name in ("sea", "city"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for n in range(15):
            path = tmp_path / "texts" / name / f"{n:02}.txt"
            path.write_text(f"the {name} has number {n} and a few more words", encoding="utf-8")
    return load_texts(str(tmp_path / "texts"), tmp_path / "data", 300)


def text_preview(texts, folder, **options):
    return TextPreview(texts, 32, 0.2, folder, nullcontext(), CPU, **options)


def small_encoder(texts):
    torch.manual_seed(0)
    no_pairs = torch.zeros(0, dtype=torch.int64)
    return TextEncoder(len(texts.tokenizer), no_pairs, 32, 1, 2, 32, 16).eval()


def test_texts_of_one_class_give_no_knn(labelled_texts, tmp_path, capsys):
    model = small_encoder(labelled_texts)
    assert text_preview(labelled_texts, tmp_path)(model)["knn"] != ""
    assert "one class only" not in capsys.readouterr().out
    of_sea = labelled_texts.select(labelled_texts.labels == 1)
    preview = text_preview(of_sea, tmp_path)
    assert "one class only: sea" in capsys.readouterr().out
    assert preview(model)["knn"] == ""


def test_a_run_that_fills_nothing_in_has_no_masked_loss(labelled_texts, tmp_path, capsys):
    preview = text_preview(labelled_texts, tmp_path, fills_in=False)
    row = preview(small_encoder(labelled_texts))
    assert row["held_out"] == row["bits_per_byte"] == row["accuracy"] == ""
    assert 0 <= row["knn"] <= 100
    assert "wanted" not in capsys.readouterr().out
    assert not (tmp_path / "sentences.json").exists()


def test_no_preview_reads_a_test_text(labelled_texts, tmp_path, capsys):
    without = labelled_texts.select(labelled_texts.split != HELD_OUT)
    preview = text_preview(without, tmp_path)
    assert "no text is held out" in capsys.readouterr().out
    assert len(preview.tokens) == (without.split == TRAIN).sum() < len(without)


# ---------------------------------------------------------------- numbers

class FakeModel:
    """Its projections and codes are the means of rows. It rebuilds a darker image."""

    def __init__(self):
        self.seen = []                                        # bytes of float32 pixels

    def note(self, x):
        self.seen.append(4 * x.numel())

    def encode(self, x):
        self.note(x)
        return x.mean(2).flatten(1)

    def project(self, views):
        self.note(views)
        return views.mean(4).flatten(2)                       # (V, B, C · h)

    def __call__(self, x):
        self.note(x)
        return x - 0.25, x.mean(3).flatten(1)

    def decode(self, z):
        return torch.zeros(len(z), 1, 8, 8)


def no_numbers(count, purpose, step):
    return torch.zeros(count, 2, 11)


def two_views(images, numbers):
    """The images, and the images upside down."""
    x = images.float() / 255
    return torch.stack([x, x.flip(2)])


def unchanged(images, step):
    return images, torch.zeros_like(images[:, :1], dtype=torch.bool)


def darken(images, step):
    return 0.5 * images, torch.zeros_like(images[:, :1], dtype=torch.bool)


def test_the_contrastive_preview_measures_projections(copied_data, tmp_path):
    copied_data.pixels[12:24] = random_pixels(12, seed=1)     # not those to learn from
    model = FakeModel()
    row = make_contrastive(copied_data, tmp_path)(model)
    images = copied_data.subset(HELD_OUT)[:]
    z = model.project(two_views(images, None))
    assert row["alignment"] == pytest.approx(float(contrastive.alignment(z)), abs=1e-4)
    assert row["uniformity"] == pytest.approx(float(contrastive.uniformity(z[0])), abs=1e-4)
    rank = float(contrastive.effective_rank(z[0]))
    assert row["effective_rank"] == pytest.approx(rank, abs=0.01)
    assert 0 <= row["knn"] <= 100


def test_the_autoencoder_preview_measures_reconstructions(copied_data, tmp_path):
    row = make_autoencoder(copied_data, tmp_path, darken)(FakeModel())
    x = copied_data.subset(HELD_OUT)[:].float() / 255
    rebuilt, z = 0.5 * x - 0.25, (0.5 * x).mean(3).flatten(1)
    error = float((rebuilt - x).square().mean())
    assert row["held_out"] == pytest.approx(error, abs=1e-5)
    assert row["sparsity"] == pytest.approx(float(autoencoder.sparsity(z)), abs=1e-4)
    assert row["correlation"] == pytest.approx(float(autoencoder.correlation(z)), abs=1e-4)
    assert 0 <= row["knn"] <= 100
    assert (tmp_path / "reconstructions.png").exists() and (tmp_path / "walks.png").exists()


@pytest.fixture
def pictures(monkeypatch):
    """{name: rows} of the pictures of an AutoencoderPreview, which are not written."""
    pictures = {}

    def keep(self, name, rows):
        pictures[name] = rows

    monkeypatch.setattr(AutoencoderPreview, "_write_picture", keep)
    return pictures


def test_the_autoencoders_pictures_show_reconstructions_and_walks(
    copied_data, tmp_path, pictures
):
    class Model(FakeModel):
        def decode(self, z):
            """Images in a single grey, the mean of the code."""
            return z.mean(1)[:, None, None, None].expand(-1, 1, 8, 8)

    make_autoencoder(copied_data, tmp_path, darken)(Model())
    x = copied_data.subset(HELD_OUT)[:].float() / 255
    original, corrupted, shown = pictures["reconstructions.png"]
    torch.testing.assert_close(original, x)
    torch.testing.assert_close(corrupted, 0.5 * x)
    torch.testing.assert_close(shown, 0.5 * x - 0.25)
    grey = (0.5 * x).mean((1, 2, 3))                          # (12,) of the codes
    for walk in range(8):
        start, end = grey[walk], grey[walk - 1]
        found = pictures["walks.png"][walk, :, 0, 0, 0]       # (8,)
        expected = torch.stack([(1 - n / 7) * start + n / 7 * end for n in range(8)])
        torch.testing.assert_close(found, expected)


def test_the_mean_image_is_the_autoencoders_chance_level(copied_data, tmp_path):
    preview = make_autoencoder(copied_data, tmp_path)
    x = copied_data.subset(HELD_OUT)[:].double() / 255
    expected = float(x.var(0, correction=0).mean())
    assert preview.chance() == pytest.approx(expected, rel=1e-5)


def hide_the_left_half(images, step):
    hidden = torch.zeros_like(images[:, :1], dtype=torch.bool)
    hidden[..., :8] = True
    return images * ~hidden, hidden


@pytest.mark.parametrize("scale, expected", [(1.0, 0), (0.0, 1)])
def test_normalized_patches_are_pasted_back(scale, expected, tmp_path, pictures):
    """A model that knows the patches rebuilds the image; predicting 0 shows their means."""
    split = np.repeat(np.uint8([TRAIN, HELD_OUT]), 20)
    data = images_of(random_pixels(40, size=16), np.full(40, -1), split)
    x = data.subset(HELD_OUT)[:].float() / 255
    normalized, mean, _ = normalize_patches(x)

    class Model(FakeModel):
        def __call__(self, corrupted):
            rebuilt = scale * normalized
            rebuilt[..., 8:] = 5                              # visible: it does not count
            return rebuilt, corrupted.mean(3).flatten(1)

    preview = make_autoencoder(data, tmp_path, hide_the_left_half, targets="normalized")
    row = preview(Model())
    assert preview.chance() == 1
    assert row["held_out"] == pytest.approx(expected, abs=1e-5)
    original, _, shown = pictures["reconstructions.png"]
    assert torch.equal(shown[..., 8:], original[..., 8:])
    left = mean[:12].expand_as(original) + scale * (original - mean[:12])
    torch.testing.assert_close(shown[..., :8], left[..., :8])


# ---------------------------------------------------------------- large images

@pytest.fixture
def large_images():
    """80 training and 80 held-out images of 512 × 512, all the same, so they take no memory."""
    one = random_pixels(3, size=512).view(1, 3, 512, 512)
    split = np.repeat(np.uint8([TRAIN, HELD_OUT]), 80)
    return images_of(one.expand(160, -1, -1, -1), np.full(160, -1), split)


def test_a_preview_looks_at_fewer_large_images():
    assert preview_size((3, 32, 32)) == 512
    for side in (64, 128, 256, 512):
        bytes_of_one = 4 * 3 * side * side
        assert preview_size((3, side, side)) * bytes_of_one <= previews.PREVIEW_BYTES
    assert preview_size((3, 4096, 4096)) == 4                 # each takes more than that


@pytest.mark.parametrize("make, views", [(make_contrastive, 2), (make_autoencoder, 1)])
def test_no_batch_of_a_preview_exceeds_its_bytes(
    make, views, large_images, tmp_path, monkeypatch
):
    def no_picture(*arguments):
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(previews.report, "grid", no_picture)
    monkeypatch.setattr(previews.report, "scatter", no_picture)
    model = FakeModel()
    make(large_images, tmp_path)(model)
    whole, *batches = model.seen
    assert whole <= views * previews.PREVIEW_BYTES
    assert len(batches) == 2 * 16                             # 80 training and 80 held-out images
    assert max(batches) <= features.BYTES_A_BATCH
