"""Images: CIFAR-10 and the user's arrays, what is refused, and how they are split."""

import errno
import gzip
import io
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from minissl import UserError
from minissl.data import images
from minissl.data.shapes import SHAPES, shape_data
from minissl.data.splits import HELD_OUT, TEST, TRAIN


SPLITS = (TRAIN, HELD_OUT, TEST)


def noise(*shape):
    """Random uint8 images, all different."""
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def save(folder, array, labels=None):
    """a.npy in the folder, with a.labels.npy beside it -> its path as a string."""
    np.save(folder / "a.npy", array)
    if labels is not None:
        np.save(folder / "a.labels.npy", labels)
    return str(folder / "a.npy")


def sizes(data):
    """[[training, held-out and test images] of each class]"""
    return [[int(((data.labels == label) & (data.split == split)).sum()) for split in SPLITS]
            for label in range(len(data.classes))]


def refusal(*arguments, **options):
    """The sentence with which load_images refuses."""
    with pytest.raises(UserError) as caught:
        images.load_images(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------- Images of any source

def test_load_images_wraps_the_drawn_shapes():
    data = images.load_images("shapes", limit=20)
    pixels, labels, split = shape_data(20)
    assert torch.equal(data[:], pixels) and data.shape == (60, 3, 32, 32)
    assert (data.labels == labels).all() and (data.split == split).all()
    assert data.classes == SHAPES


def test_mean_and_std_are_of_the_whole_array():
    black = torch.zeros(12_000, 1, 8, 8, dtype=torch.uint8)
    white = torch.full((12_000, 1, 8, 8), 255, dtype=torch.uint8)
    half = pytest.approx([0.5], abs=1e-3)
    assert images.mean_and_std(torch.cat([black, white])) == dict(mean=half, std=half)


def test_the_std_of_a_constant_channel_is_not_0():
    pixels = torch.from_numpy(noise(50, 3, 8, 8))
    pixels[:, 1] = 7
    mean, std = images.mean_and_std(pixels).values()
    assert mean[1] == pytest.approx(7 / 255)
    assert 0 < std[1] < 0.01 < std[0]


def squares_of(pixels):
    """The 4C numbers of each square of 2 × 2 pixels, as rows, by loops."""
    rows = []
    for image in pixels.double().numpy() / 255:
        C, H, W = image.shape
        for top in range(0, H - 1, 2):
            for left in range(0, W - 1, 2):
                rows.append(image[:, top:top + 2, left:left + 2].reshape(4 * C))
    return np.array(rows)


@pytest.mark.parametrize("C, H, W", [(3, 8, 8), (1, 9, 11)])
def test_whitened_squares_are_uncorrelated(C, H, W):
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(40, C, H, W)).cumsum(2).cumsum(3)           # neighbours are alike
    pixels = torch.from_numpy(np.clip(128 + 15 * smooth, 0, 255).astype(np.uint8))
    mean, whitening = map(np.array, images.mean_and_whitening(pixels).values())
    assert mean == pytest.approx(pixels.double().mean((0, 2, 3)).numpy() / 255)
    white = (squares_of(pixels) - mean.repeat(4)) @ whitening.T
    centre = white.mean(0)
    second_moment = white.T @ white / len(white)
    assert np.abs(centre).max() < 0.3
    off_diagonal = second_moment - np.diag(np.diag(second_moment))
    assert np.abs(off_diagonal).max() < 0.02
    assert (np.diag(second_moment) > 0.9).all() and (np.diag(second_moment) < 1.01).all()
    lengths = np.linalg.norm(whitening, axis=1)
    assert (np.diff(lengths) >= 0).all()                     # the strongest component is first
    largest = whitening[np.arange(4 * C), np.abs(whitening).argmax(1)]
    assert (largest > 0).all()


def test_whitening_does_not_magnify_what_never_changes():
    pixels = torch.full((20, 3, 8, 8), 7, dtype=torch.uint8)
    whitening = np.array(images.mean_and_whitening(pixels)["whitening"])
    assert np.isfinite(whitening).all() and np.abs(whitening).max() <= 255.001


def test_the_selected_images_move_to_a_gpu_if_they_fit(monkeypatch):
    pixels = torch.arange(10).byte().view(10, 1, 1, 1).expand(10, 1, 8, 8)
    no_labels, split = np.full(10, -1), np.zeros(10, np.uint8)
    data = images.Images(pixels, torch.arange(10), no_labels, split, [])
    data = data.select(np.array([7, 2, 9]))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    enough = 2 * 3 * 64                                # bytes: they may take half of the memory
    for free, rows in (enough, 3), (enough - 2, 10):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        moved = data.to(torch.device("cuda"))
        assert len(moved.pixels) == rows
        assert moved[:].flatten(1)[:, 0].tolist() == [7, 2, 9]


def test_a_subset_can_be_of_labelled_images_alone():
    split = np.repeat(np.uint8(SPLITS), 10)
    labels = np.tile([-1, 4, -1, 2, 3], 6)
    pixels = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    data = images.Images(pixels, torch.arange(30), labels, split, list("abcde"))
    assert data.subset(HELD_OUT).rows.tolist() == list(range(10, 20))
    assert data.subset(HELD_OUT, labelled=True).rows.tolist() == [11, 13, 14, 16, 18, 19]
    assert data.subset(HELD_OUT, 2, labelled=True).rows.tolist() == [11, 19]
    assert data.subset(HELD_OUT, 2).rows.tolist() == [10, 19]


# ---------------------------------------------------------------- CIFAR-10, in made-up files

@pytest.fixture(scope="module")
def cifar():
    """File name -> (pixels (10000, 3072), labels (10000,)).

    Most pixels are 0, so the archive is small.
    """
    draw = np.random.default_rng(0)
    batches = {}
    for name in images.CIFAR10_FILES:
        pixels = np.zeros((10_000, 3072), np.uint8)
        pixels[:, :3] = draw.integers(0, 256, (10_000, 3))
        batches[name] = pixels, draw.integers(0, 10, 10_000).astype(np.uint8)
    return batches


@pytest.fixture(scope="module")
def cifar_archive(cifar, tmp_path_factory):
    """A folder with the packed files."""
    folder = tmp_path_factory.mktemp("packed")
    with gzip.open(folder / "cifar-10-binary.tar.gz", "wb", compresslevel=1) as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, batch in cifar.items():
                content = records(*batch)
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            readme = tarfile.TarInfo("cifar-10-batches-bin/readme.html")
            archive.addfile(readme)
    return folder


def records(pixels, labels):
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def unpack(cifar, folder):
    (folder / "cifar-10-batches-bin").mkdir()
    for name, batch in cifar.items():
        (folder / "cifar-10-batches-bin" / name).write_bytes(records(*batch))
    (folder / "cifar-10-batches-bin" / "readme.html").write_text("<html>")


def check_cifar(data, cifar):
    pixels = data[:].flatten(1).numpy()
    assert data.shape == (60_000, 3, 32, 32) and data.classes[9] == "truck"
    for n, (wanted, labels) in enumerate(cifar.values()):
        batch = slice(10_000 * n, 10_000 * (n + 1))
        assert (pixels[batch] == wanted).all() and (data.labels[batch] == labels).all()
    assert (data.split == np.repeat(SPLITS, [45_000, 5_000, 10_000])).all()


def test_cifar10_is_read_from_its_folder(cifar, tmp_path):
    unpack(cifar, tmp_path)
    check_cifar(images.load_images("cifar10", tmp_path), cifar)


def test_cifar10_is_read_from_its_archive(cifar, cifar_archive):
    check_cifar(images.load_images("cifar10", cifar_archive), cifar)


def test_cifar10_is_downloaded_where_it_is_missing(cifar, cifar_archive, tmp_path, monkeypatch):
    def download(url, path, md5):
        assert url.endswith("/cifar-10-binary.tar.gz") and md5 == images.CIFAR10_MD5
        path.write_bytes((cifar_archive / path.name).read_bytes())

    monkeypatch.setattr(images, "download", download)
    (tmp_path / "cifar-10-python.tar.gz").touch()      # the pickled version is not read
    check_cifar(images.load_images("cifar10", tmp_path), cifar)


@pytest.mark.parametrize("part", [0, 1e-7, 1e-5, 0.5, 1 - 1e-7])
def test_a_damaged_cifar10_archive_is_refused(part, cifar_archive, tmp_path):
    whole = (cifar_archive / "cifar-10-binary.tar.gz").read_bytes()
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(whole[:int(part * len(whole))])
    assert "cifar-10-binary.tar.gz" in refusal("cifar10", tmp_path)


def test_a_cifar10_folder_that_lacks_a_file_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").touch()
    folder = tmp_path / "cifar-10-batches-bin"
    assert refusal("cifar10", tmp_path) == (
        f"{folder} lacks data_batch_1.bin: delete {folder} and start again")


@pytest.mark.parametrize("content", [b"", b"x" * 3073, b"\x0a" * 10_000 * 3073],
                         ids=["empty", "too short", "label 10"])
def test_a_cifar10_file_of_another_form_is_refused(content, tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in images.CIFAR10_FILES:
        (tmp_path / "cifar-10-batches-bin" / name).write_bytes(content)
    assert "data_batch_1.bin is not a batch of CIFAR-10" in refusal("cifar10", tmp_path)


# ---------------------------------------------------------------- The user's own array

@pytest.mark.parametrize("shape", [(60, 28, 28), (60, 33, 47, 3), (60, 64, 64, 1)])
def test_own_images_come_back_as_they_are(shape, tmp_path):
    array, labels = noise(*shape), np.repeat([3, 7], 30)
    data = images.load_images(save(tmp_path, array))
    assert data.classes == [] and (data.labels == -1).all()
    data = images.load_images(save(tmp_path, array, labels))
    channels = 1 if len(shape) == 3 else shape[3]
    assert data[:].shape == (60, channels, *shape[1:3])
    assert (data[:].permute(0, 2, 3, 1).numpy().reshape(shape) == array).all()
    assert data.classes == ["3", "7"] and (data.labels == (labels == 7)).all()
    assert sizes(data) == [[21, 3, 6], [21, 3, 6]]
    assert data.notes == []


def test_a_features_row_is_a_row_of_the_array(tmp_path):
    array = noise(60, 8, 8)
    array[30:] = array[:30]                            # each image twice
    path = save(tmp_path, array)
    data = images.load_images(path)
    assert len(data) == 30 and data.notes == ["left out 30 copies of other images"]
    assert torch.equal(data[:][:, 0], torch.from_numpy(array[:30]))
    data = images.load_images(path, keep_all=True)
    assert torch.equal(data[:][:, 0], torch.from_numpy(array)) and data.notes == []
    data = images.load_images(path, keep_all=True, limit=40)
    assert torch.equal(data[:][:, 0], torch.from_numpy(array[:40]))
    data = images.load_images(save(tmp_path, array[:1]), keep_all=True)
    assert torch.equal(data[:][:, 0], torch.from_numpy(array[:1]))


def test_an_array_in_fortran_order_is_read(tmp_path):
    array = noise(60, 9, 11, 3)
    data = images.load_images(save(tmp_path, np.asfortranarray(array)))
    assert (data[:].permute(0, 2, 3, 1).numpy() == array).all()


def test_masks_of_0_and_1_are_taken_with_a_warning(tmp_path, capsys):
    masks = np.random.default_rng(0).integers(0, 2, (400, 8, 8)).astype(np.uint8)
    path = save(tmp_path, masks)
    assert images.load_images(path)[:].max() == 1
    assert capsys.readouterr().err == (
        f"warning: {path}: all values are 0 or 1 (of 255), so the images are black; "
        f"if 1 means white, save 255 * x\n")
    images.load_images(save(tmp_path, 255 * masks))
    masks[1, 0, 0] = 2                                 # not among the 100 that are looked at first
    images.load_images(save(tmp_path, masks))
    assert capsys.readouterr().err == ""


def test_images_of_0_alone_are_called_black(tmp_path, capsys):
    path = save(tmp_path, np.zeros((3, 8, 8), np.uint8))
    assert len(images.load_images(path, keep_all=True)) == 3
    assert capsys.readouterr().err == (
        f"warning: {path}: all values are 0 (of 255), so the images are black; "
        f"if they were floats from 0 to 1, save (255 * x).astype(np.uint8)\n")


def test_labels_need_not_be_read(tmp_path):
    path = save(tmp_path, noise(40, 8, 8), np.repeat([0, 1], 20))
    (tmp_path / "a.labels.npy").write_bytes(b"damaged")
    data = images.load_images(path, with_labels=False)
    assert data.classes == [] and (data.labels == -1).all()
    data = images.own_images(Path(path), keep_all=True, with_labels=False)
    assert data.classes == [] and len(data) == 40
    assert "a.labels.npy cannot be read" in refusal(path)


def test_an_ending_in_capital_letters_is_accepted(tmp_path):
    path = Path(save(tmp_path, noise(40, 8, 8), np.repeat([0, 1], 20)))
    path.rename(tmp_path / "a.NPY")
    assert images.load_images(tmp_path / "a.NPY").classes == ["0", "1"]


def test_unlabelled_images_shift_no_class(tmp_path):
    data = images.load_images(save(tmp_path, noise(60, 8, 8), np.tile([-1, 4, 9], 20)))
    assert data.classes == ["4", "9"]
    assert data.labels.tolist() == np.tile([-1, 0, 1], 20).tolist()


def test_a_limit_keeps_images_of_each_class(tmp_path):
    path = save(tmp_path, noise(200, 8, 8), np.repeat([0, 1], 100))
    assert sizes(images.load_images(path, limit=10)) == [[5, 5, 5], [5, 5, 5]]


def test_a_read_only_array_is_read_without_a_warning(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    path = save(folder, noise(40, 8, 8), np.repeat([0, 1], 20))
    content = Path(path).read_bytes()
    for name in folder.iterdir():
        name.chmod(0o444)
    folder.chmod(0o555)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = images.load_images(path)
            assert data[:].shape == (40, 1, 8, 8) and data.classes == ["0", "1"]
            images.mean_and_std(data)
    finally:
        folder.chmod(0o755)
    assert Path(path).read_bytes() == content


@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="only Linux says how much memory is not mapped from files")
def test_an_own_array_stays_on_the_disk(tmp_path):
    def memory():                                      # MB, without mapped files
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1000

    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8,
                                      shape=(20_000, 100, 100))                # 200 MB
    for n in range(0, 20_000, 1000):
        array[n:n + 1000] = np.random.default_rng(n).integers(0, 256, (1000, 100, 100), np.uint8)
    before = memory()
    pool = images.load_images(str(tmp_path / "a.npy")).subset(TRAIN).to(torch.device("cpu"))
    indices = torch.tensor([0, 17_000, 5])
    assert torch.equal(pool[indices], torch.from_numpy(array[indices.numpy()])[:, None])
    images.mean_and_std(pool.select(np.arange(100)))
    assert len(pool) == 18_000
    assert memory() - before < 60


# ---------------------------------------------------------------- Small classes and few images

def test_each_class_of_three_images_is_in_each_split(tmp_path):
    data = images.load_images(save(tmp_path, noise(500, 8, 8), np.repeat(np.arange(100), 5)))
    assert len(data) == 500 and data.notes == []
    assert all(min(counts) >= 1 and sum(counts) == 5 for counts in sizes(data))


def test_smaller_classes_are_for_training_and_named(tmp_path):
    labels = np.repeat([10, 11, 12, 13], [1, 2, 3, 30])
    data = images.load_images(save(tmp_path, noise(36, 8, 8), labels))
    assert sizes(data)[:3] == [[1, 0, 0], [2, 0, 0], [1, 1, 1]]
    assert data.notes == ["classes with fewer than three images have no test image: 10, 11"]


def test_many_small_classes_are_counted_in_one_note(tmp_path):
    labels = np.concatenate([np.arange(30), np.full(20, 30)])
    data = images.load_images(save(tmp_path, noise(50, 8, 8), labels))
    assert data.notes[0].endswith(": 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more")


def test_at_least_two_images_are_held_out_whatever_the_labels():
    draw = np.random.default_rng(0)
    for _ in range(300):
        n, classes = draw.integers(20, 60), draw.integers(1, 60)
        labels = draw.integers(-1, classes, n)
        split = images.hold_out_two(images.split_blocks(labels), labels)
        assert (split == HELD_OUT).sum() >= 2, labels
        for label in range(classes):
            counts = np.bincount(split[labels == label], minlength=3)
            if counts.sum() >= 3:
                assert counts.min() >= 1, labels
            else:
                assert counts[TEST] == 0, labels


@pytest.mark.parametrize("labels, moved", [
    (np.arange(20), [0, 1]),                           # of equal classes the first ones
    (np.repeat(np.arange(10), 2), [1, 3]),
    (np.array([0] * 3 + list(range(1, 18))), [1, 3]),  # the class of three is left alone
    (np.array([-1] * 4 + list(range(16))), [2, 3]),    # unlabelled ones first: there are more
], ids=["single", "pairs", "one of three", "unlabelled"])
def test_small_classes_lend_two_held_out_images(labels, moved, tmp_path):
    data = images.load_images(save(tmp_path, noise(20, 8, 8), labels))
    assert len(data) == 20
    assert np.flatnonzero(data.split == HELD_OUT).tolist() == moved


def test_copies_cost_no_class_a_split(tmp_path):
    array = noise(40, 8, 8)
    array[31:39] = array[39]                           # class 1 has 12 images, 4 of them differ
    labels = np.repeat([0, 1], [28, 12])
    data = images.load_images(save(tmp_path, array, labels))
    assert sizes(data)[1] == [2, 1, 1]
    assert len(np.unique(data[:].flatten(1).numpy(), axis=0)) == len(data) == 32


def test_one_copy_is_counted_in_the_singular(tmp_path):
    array = noise(40, 8, 8)
    array[1] = array[0]
    data = images.load_images(save(tmp_path, array))
    assert data.notes == ["left out 1 copy of other images"]


def test_of_copies_the_labelled_one_is_kept(tmp_path):
    array = noise(60, 8, 8)
    array[30:] = array[:30]
    data = images.load_images(save(tmp_path, array, np.repeat([-1, 5], 30)))
    assert len(data) == 30 and (data.labels == 0).all()


@pytest.mark.parametrize("labels", [None, np.repeat([0, 1], 20)])
def test_too_few_different_images_are_refused(labels, tmp_path):
    array = noise(40, 8, 8)
    array[19:] = array[19]
    assert len(images.load_images(save(tmp_path, array, labels))) == 20
    array[18:] = array[18]
    sentence = refusal(save(tmp_path, array, labels))
    assert sentence.endswith("a.npy: found 19 different images; expected at least 20")


# ---------------------------------------------------------------- What is refused

@pytest.mark.parametrize("array, found", [
    (np.arange(1280, dtype=np.uint16).reshape(20, 8, 8) + 2816,
     "uint16 of shape (20, 8, 8) with values from 2816 to 4095"),
    (np.linspace(-1000, 1040, 1280).astype(np.int16).reshape(20, 8, 8),
     "int16 of shape (20, 8, 8) with values from -1000 to 1040"),
    (noise(20, 8, 8).view(np.int8), "int8 of shape (20, 8, 8) with values from -128 to 127"),
    (np.full((20, 8, 8), 65535, np.int32),
     "int32 of shape (20, 8, 8) with values from 65535 to 65535"),
    (np.full((20, 8, 8), 65535, np.float32),
     "float32 of shape (20, 8, 8) with values from 65535 to 65535"),
    (np.ones((20, 8, 8), bool), "bool of shape (20, 8, 8) with values from True to True"),
    (np.linspace(-0.5, 1, 3840).reshape(20, 8, 8, 3),
     "float64 of shape (20, 8, 8, 3) with values from -0.5 to 1"),
    (np.where(np.eye(8), np.nan, 0.25)[None].astype(np.float16),
     "float16 of shape (1, 8, 8) with values from 0.25 to 0.25"),
    (np.full((20, 8, 8), np.nan), "float64 of shape (20, 8, 8) with values from nan to nan"),
    (np.array([0, np.inf]), "float64 of shape (2,) with values from 0 to inf"),
    (np.array(1.5), "float64 of shape () with values from 1.5 to 1.5"),
    (np.zeros((20, 8, 8), complex), "complex128 of shape (20, 8, 8)"),
    (np.array(["a.png"] * 20), "<U5 of shape (20,)"),
    (np.zeros((28, 28, 3), np.uint8), "uint8 of shape (28, 28, 3)"),           # one in colour
    (np.zeros((20, 3, 32, 32), np.uint8), "uint8 of shape (20, 3, 32, 32)"),   # channels first
    (np.zeros((20, 32, 32, 4), np.uint8), "uint8 of shape (20, 32, 32, 4)"),
    (np.zeros((20, 64), np.uint8), "uint8 of shape (20, 64)"),
    (np.zeros((20, 7, 32), np.uint8), "uint8 of shape (20, 7, 32)"),
    (np.zeros((20, 32, 7, 3), np.uint8), "uint8 of shape (20, 32, 7, 3)"),
])
def test_a_wrong_array_is_named_with_what_is_expected(array, found, tmp_path):
    path = save(tmp_path, array)
    assert refusal(path) == (
        f"--data {path}: found {found}; expected uint8 images (N, H, W, C) or (N, H, W) with "
        f'1 or 3 channels C, at least 8 × 8 pixels; see "Your own images" in README.md')


def test_too_few_images_are_counted(tmp_path):
    path = save(tmp_path, noise(3, 8, 8))
    assert refusal(path) == f"--data {path}: found 3 images; expected at least 20"
    path = save(tmp_path, noise(1, 8, 8))
    assert refusal(path) == f"--data {path}: found 1 image; expected at least 20"
    path = save(tmp_path, np.repeat(noise(1, 8, 8), 20, axis=0))
    assert refusal(path) == f"--data {path}: found 1 different image; expected at least 20"
    path = save(tmp_path, noise(0, 8, 8))
    assert refusal(path, keep_all=True).startswith((f"--data {path}: found 0 images", path))


@pytest.mark.parametrize("labels, found", [
    (np.zeros(19, int), "int64 of shape (19,)"),
    (np.zeros((20, 1), int), "int64 of shape (20, 1)"),
    (np.zeros(20), "float64 of shape (20,)"),
    (np.array(["cat"] * 20), "<U3 of shape (20,)"),
    (np.full(20, -2), "values from -2 to -2"),
    (np.arange(20) * 1000, "values from 0 to 19000"),
    (np.full(20, 2**64 - 1, np.uint64), f"values from {2**64 - 1} to {2**64 - 1}"),
])
def test_labels_that_do_not_fit_are_refused(labels, found, tmp_path):
    sentence = refusal(save(tmp_path, noise(20, 8, 8), labels))
    assert f"a.labels.npy: found {found}" in sentence
    assert sentence.endswith("; expected one whole number from 0 to 9999 for each of the "
                             "20 images, and -1 for an image without a label")


@pytest.mark.parametrize("name", ["a.txt", "photos", "photos.npy", "no_such_name"])
def test_a_path_that_is_no_array_is_refused(name, tmp_path):
    path = tmp_path / name
    if name.startswith("photos"):
        path.mkdir()
    pointer = 'a .npy file of uint8 images; see "Your own images" in README.md'
    assert refusal(path) == f"--data {path}: expected shapes, cifar10 or {pointer}"
    with pytest.raises(UserError) as caught:
        images.own_images(path, keep_all=True, flag="--predict")
    assert str(caught.value) == f"--predict {path}: expected {pointer}"


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "not_there.npy"
    assert refusal(path) == f"--data {path}: file not found; give the path of a .npy file"


def test_damaged_arrays_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((20, 8, 8), np.uint8))
    good = buffer.getvalue()
    huge = good.replace(b"(20, 8, 8)", b"(20" + b"0" * 16 + b",)")[:len(good)]
    objects = io.BytesIO()
    np.save(objects, np.array([{}] * 20))
    cut_header = b"\x93NUMPY\x01\x00v\x00{"
    open_brace = b"\x93NUMPY\x01\x00\x0a\x00{        \n"
    for content in b"", cut_header, open_brace, good[:-1], huge:
        (tmp_path / "a.npy").write_bytes(content)
        sentence = refusal(tmp_path / "a.npy")
        assert "a.npy cannot be read as a NumPy array" in sentence
        assert sentence.endswith(
            '): write it again with numpy.save; see "Your own images" in README.md')


def test_an_array_of_objects_is_refused_with_advice(tmp_path):
    different_sizes = np.empty(20, object)
    for n in range(20):
        different_sizes[n] = noise(8, 8 + n)
    path = tmp_path / "a.npy"
    np.save(path, different_sizes, allow_pickle=True)
    assert refusal(path) == (
        f"{path}: the array holds Python objects, not numbers: if the images have different "
        f"sizes, resize them to one size, and save them as uint8; {images.README}")
    np.save(tmp_path / "a.labels.npy", np.array(["cat"] * 20, object), allow_pickle=True)
    np.save(path, noise(20, 8, 8))
    assert refusal(path) == (
        f"{tmp_path / 'a.labels.npy'}: the array holds Python objects, not numbers: "
        f"save whole numbers, such as the classes' numbers; {images.README}")


def test_an_npz_archive_is_refused_with_advice(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, noise(20, 8, 8))
    assert refusal(tmp_path / "a.npy") == (
        f"{tmp_path / 'a.npy'}: this is an .npz or another zip archive, not a NumPy array: "
        f"save one array with numpy.save")


def test_an_array_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = save(tmp_path, noise(20, 8, 8))
    monkeypatch.setattr(np.lib.format, "open_memmap", refuse)      # root may read every file
    assert refusal(path) == f"{path}: permission denied; make it readable"
