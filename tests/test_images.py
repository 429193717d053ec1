"""Where images come from, what is refused, and the pictures that we write."""

import gzip
import io
import pickle
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from minissl import UserError, evaluation, figures, images, training
from minissl.datasets import HELD_OUT, TEST, TRAIN


# ---------------------------------------------------------------- shapes

def test_shapes_are_the_same_each_time_and_all_different():
    a, b = images.load_images("shapes", limit=40), images.load_images("shapes", limit=40)
    assert torch.equal(a[:], b[:]) and (a.labels == b.labels).all()
    assert a[:].shape == (120, 3, 32, 32) and a[:].dtype == torch.uint8
    assert [int((a.split == s).sum()) for s in (TRAIN, HELD_OUT, TEST)] == [40, 40, 40]
    assert len({image.numpy().tobytes() for image in a[:]}) == 120
    assert set(a.labels) == set(range(10))


def test_no_thousand_of_shapes_is_drawn_twice(monkeypatch):
    seeds = []
    monkeypatch.setattr(images, "draw_shapes", lambda n, generator: (
        seeds.append(generator.initial_seed()) or torch.zeros(n, 3, 2, 2).byte(), torch.zeros(n).long()))
    assert images.shapes().shape == (60_000, 3, 2, 2) and len(set(seeds)) == len(seeds) == 60


def test_the_distance_is_negative_inside_and_its_outline_is_where_geometry_has_it():
    def at(shape, x, y):
        return float(images.distance(shape, torch.tensor([x]), torch.tensor([y]))[0])
    for shape in images.SHAPES:
        inside = {"ring": (0.65, 0.0), "frame": (0.58, 0.0), "crescent": (-0.6, 0.0)}.get(shape, (0.0, 0.0))
        assert at(shape, *inside) < 0 < at(shape, 1.5, 1.5), shape
    assert at("circle", 0.3, 0.0) == pytest.approx(-0.5)
    assert at("square", 0.0, 0.72) == pytest.approx(0) and at("cross", 0.9, 0.28) == pytest.approx(0, abs=1e-6)
    for angle in np.arange(6) * np.pi / 3:    # of a triangle, three corners at 1, three edges at 1/2
        r = 1.0 if round(angle * 3 / np.pi) % 2 == 0 else 0.5
        assert abs(at("triangle", r * np.cos(angle), r * np.sin(angle))) < 1e-5
    assert at("ring", 0.0, 0.0) > 0 and at("frame", 0.0, 0.0) > 0


def test_a_shape_is_turned_and_not_sheared_and_lies_inside_the_picture(monkeypatch):
    seen = []
    monkeypatch.setattr(images, "distance", lambda shape, *place: seen.append(place) or place[0])
    images.draw_shapes(100, training.generator(0, "test", 0))
    along, across = map(torch.cat, zip(*seen))                     # (100, 32, 32), in units of the radius
    u, v = (torch.stack([z[:, 0, 1] - z[:, 0, 0], z[:, 1, 0] - z[:, 0, 0]]) for z in (along, across))
    torch.testing.assert_close(v, torch.stack([-u[1], u[0]]), rtol=0, atol=1e-5)
    radius, far = 1 / u.norm(dim=0), torch.hypot(along, across)
    far[:, 1:-1, 1:-1] = 99
    assert 6 < radius.min() < radius.max() < 14
    assert (far.amin((1, 2)) * radius > radius - 0.51).all()       # a pixel's middle is half a pixel from the border


def test_a_shape_stands_out_from_its_ground(monkeypatch):
    left = torch.where(torch.arange(32) < 16, -9.0, 9.0)           # in each picture the left half is the shape
    monkeypatch.setattr(images, "distance", lambda shape, x, y: left.expand_as(x))
    halves = images.draw_shapes(500, training.generator(0, "test", 0))[0].float().split(16, dim=3)
    ink, ground = (half.flatten(2).median(2).values / 255 for half in halves)                         # (500, 3)
    assert ((ink - ground).abs().amax(1) > 0.25).float().mean() > 0.97


def test_pixels_do_not_give_the_shape_away():
    data = images.load_images("shapes", limit=1500)
    x = data[:].flatten(1).float() / 255 - 0.5
    train, test = np.flatnonzero(data.split == TRAIN), np.flatnonzero(data.split == TEST)
    weights = evaluation.logistic_regression(x[train], data.labels[train], 10, 0.3)
    found = evaluation.accuracy(evaluation.predict(x[test], weights).argmax(1), data.labels[test])
    assert found < 35


def test_batches_are_a_function_of_the_step_and_each_epoch_sees_every_image_once():
    a, b = training.Batches(12, 4, seed=0, purpose="order"), training.Batches(12, 4, seed=0, purpose="order")
    steps = [a(s) for s in range(6)]
    assert torch.equal(b(4), steps[4]) and torch.equal(b(1), steps[1])             # in any order
    assert sorted(torch.cat(steps[:3]).tolist()) == sorted(torch.cat(steps[3:]).tolist()) == list(range(12))
    assert not torch.equal(torch.cat(steps[:3]), torch.cat(steps[3:]))
    with pytest.raises(UserError, match="--batch-size 13: there are only 12 images"):
        training.Batches(12, 13, 0, "order")


# ---------------------------------------------------------------- CIFAR-10, in small files of the same form

@pytest.fixture(scope="module")
def cifar():
    """The pixels and labels of six batches; pixel 0 counts the images."""
    rng, batches = np.random.default_rng(0), {}
    for name in ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]:
        pixels = np.zeros((10_000, 3072), np.uint8)
        pixels[:, :3] = rng.integers(0, 256, (10_000, 3))
        batches[name] = pixels, rng.integers(0, 10, 10_000).astype(np.uint8)
    return batches


def binary(pixels, labels):
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def pickled(pixels, labels):
    return pickle.dumps({b"batch_label": b"x", b"data": pixels, b"labels": labels.tolist(),
                         b"filenames": [b"a.png"]}, protocol=2)


def pack(path, folder, files):
    with gzip.open(path, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar10_is_read_packed_and_unpacked(version, cifar, tmp_path):
    folder, write, end = {"binary": ("cifar-10-batches-bin", binary, ".bin"),
                          "python": ("cifar-10-batches-py", pickled, "")}[version]
    files = {name + end: write(*batch) for name, batch in cifar.items()} | {"readme.html": b"<html>"}
    (tmp_path / "unpacked" / folder).mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "unpacked" / folder / name).write_bytes(data)
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "packed" / f"cifar-10-{version}.tar.gz", folder, files)
    for place in ("unpacked", "packed"):
        data = images.load_images("cifar10", tmp_path / place)
        found = data[:].flatten(1).numpy()
        assert (data.shape == (60_000, 3, 32, 32)
                and [int((data.split == s).sum()) for s in (0, 1, 2)] == [45_000, 5_000, 10_000])
        for n, (pixels, labels) in enumerate(cifar.values()):
            assert (data.labels[10_000 * n:10_000 * (n + 1)] == labels).all()
            assert (found[10_000 * n:10_000 * (n + 1)] == pixels).all()
        assert (data.split == np.repeat([TRAIN, HELD_OUT, TEST], [45_000, 5_000, 10_000])).all()
    whole = (tmp_path / "packed" / f"cifar-10-{version}.tar.gz").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "packed" / f"cifar-10-{version}.tar.gz").write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a whole archive"):
            images.load_images("cifar10", tmp_path / "packed")


def test_an_unpacked_cifar10_that_lacks_a_file_is_said_to(tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").touch()
    with pytest.raises(UserError, match="lacks data_batch_1.bin: delete it, and get"):
        images.load_images("cifar10", tmp_path)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file has run')",))


@pytest.mark.parametrize("data", [pickle.dumps({b"data": Evil(), b"labels": [1]}, 2), pickle.dumps([1, 2], 2),
                                  b"", b"\x80\x04.", b"garbage",
                                  pickle.dumps({b"data": np.array([Evil()], object), b"labels": [1]}, 2),
                                  pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, 2),
                                  pickle.dumps({b"data": np.zeros((1, 5), np.uint8), b"labels": [1]}, 2)])
def test_a_pickle_can_build_nothing_and_run_nothing(data):
    with pytest.raises(ValueError):
        images.read_cifar_pickle(data)


# ---------------------------------------------------------------- the reader's own

@pytest.mark.parametrize("shape", [(60, 28, 28), (60, 33, 47, 3), (60, 64, 64, 1)])
def test_own_images_come_back_as_they_are(shape, tmp_path):
    rng = np.random.default_rng(0)
    array, labels = rng.integers(0, 256, shape).astype(np.uint8), np.repeat([3, 7], 30)
    np.save(tmp_path / "a.npy", array)
    data = images.load_images(str(tmp_path / "a.npy"))
    assert data.classes == [] and (data.labels == -1).all()
    np.save(tmp_path / "a.labels.npy", labels)
    data = images.load_images(str(tmp_path / "a.npy"))
    C = 1 if len(shape) == 3 else shape[3]
    assert data[:].shape == (60, C, *shape[1:3]) and data.classes == ["3", "7"]
    assert (data[:].permute(0, 2, 3, 1).numpy().reshape(shape) == array).all() and (data.labels == (labels == 7)).all()
    assert [int(((data.split == s) & (data.labels == 0)).sum()) for s in (TRAIN, HELD_OUT, TEST)] == [21, 3, 6]
    np.save(tmp_path / "a.npy", np.concatenate([array[:30], array[:30]]))         # each image twice
    assert len(images.load_images(str(tmp_path / "a.npy"))) < 60
    assert len(images.load_images(str(tmp_path / "a.npy"), keep_all=True)) == 60
    some = images.load_images(str(tmp_path / "a.npy"), keep_all=True, limit=30)[:]
    assert (some.permute(0, 2, 3, 1).numpy().reshape(30, *shape[1:]) == array[:30]).all()     # row by row the array


def test_zeros_and_ones_are_taken_as_they_are_with_a_word_about_it(tmp_path):
    masks = np.random.default_rng(0).integers(0, 2, (40, 8, 8)).astype(np.uint8)
    for factor, notes in (1, 1), (255, 0):
        np.save(tmp_path / "a.npy", factor * masks)
        found = images.load_images(str(tmp_path / "a.npy"), "data")
        assert found[:].max() == factor and sum("nearly black" in note for note in found.notes) == notes


def test_mean_and_deviation_are_of_images_from_the_whole_array():
    pixels = torch.cat([torch.zeros(12_000, 1, 8, 8), torch.full((12_000, 1, 8, 8), 255)]).byte()
    assert images.mean_and_deviation(pixels) == dict(mean=pytest.approx([0.5], abs=1e-3),
                                                     deviation=pytest.approx([0.5], abs=1e-3))


def test_a_channel_that_does_not_vary_has_a_deviation_to_divide_by():
    pixels = torch.randint(0, 256, (50, 3, 8, 8), generator=training.generator(0, "test", 0)).byte()
    pixels[:, 1] = 7
    mean, deviation = images.mean_and_deviation(pixels).values()
    assert mean[1] == pytest.approx(7 / 255) and 0 < deviation[1] < 0.01 < deviation[0]


def test_what_moves_to_a_gpu_is_what_was_selected_if_it_takes_no_more_than_half_of_the_room(monkeypatch):
    pixels = torch.arange(10).byte().view(10, 1, 1, 1).expand(10, 1, 8, 8)
    data = images.Images(pixels, torch.arange(10), np.full(10, -1), np.zeros(10), []).select(np.array([7, 2, 9]))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    for room, rows in (2 * 3 * 64, 3), (2 * 3 * 64 - 2, 10):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, 10**9))
        moved = data.to(torch.device("cuda"))
        assert len(moved.pixels) == rows and moved[:].flatten(1)[:, 0].tolist() == [7, 2, 9]


def test_images_without_a_label_among_labelled_ones_shift_no_class(tmp_path):
    labels = np.tile([-1, 4, 9], 20)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8)).astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", labels)
    data = images.load_images(str(tmp_path / "a.npy"))
    assert data.classes == ["4", "9"] and data.labels.tolist() == np.tile([-1, 0, 1], 20).tolist()


def test_a_limit_keeps_images_of_each_class_of_a_sorted_array(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (200, 8, 8)).astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", np.repeat([0, 1], 100))
    some = images.load_images(str(tmp_path / "a.npy"), limit=10)
    assert [np.bincount(some.labels[some.split == split]).tolist() for split in (TRAIN, HELD_OUT, TEST)] == [[5, 5]] * 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="Linux says what of a process's memory is mapped files")
def test_an_own_array_stays_on_the_disk_and_only_what_a_batch_takes_is_in_memory(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=(20_000, 100, 100))  # 200 MB
    for n in range(0, 20_000, 1000):
        array[n:n + 1000] = np.random.default_rng(n).integers(0, 256, (1000, 100, 100), np.uint8)
    own = lambda: int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
    before = own()
    pool = images.load_images(str(tmp_path / "a.npy")).of(TRAIN).to(torch.device("cpu"))
    which = torch.tensor([0, 17_000, 5])
    assert torch.equal(pool[which], torch.from_numpy(array[which.numpy()])[:, None])
    images.mean_and_deviation(pool.select(np.arange(100)))
    assert len(pool) == 18_000 and own() - before < 60            # MB


@pytest.mark.parametrize("array, sentence", [
    (np.full((20, 8, 8), 4095, np.uint16), r"uint16.*; expected uint8.*\(a / a.max\(\) \* 255\)"),
    (np.full((20, 8, 8), 255, np.uint16), r"uint16.*\(np.nan_to_num\(a\)\).clip\(0, 255\)"),
    (np.array(["a.png"] * 20), "<U5 of shape.*Pillow"), (np.array(1.0), r"float64 of shape \(\).*Pillow"),
    (np.ones((20, 8, 8), bool), r"bool.*\* 255.0\).*astype\(np.uint8\)"),
    (np.random.default_rng(0).random((20, 8, 8, 3)), r"float64.*\* 255.0\)"),
    (np.full((20, 8, 8), 1.4), r"float64.*\(np.nan_to_num\(a\) / np.nanmax\(a\) \* 255\)"),
    (np.zeros((28, 28, 3), np.uint8), r"shape \(28, 28, 3\).*: one image is a\[None\]"),
    (np.full((20, 8, 8), -1.0), r"float64.*a - a.min"), (np.ones((20, 8, 8), np.int64), r"int64.*\* 255"),
    (np.full((20, 8, 8), np.nan, np.float32), "float32.*nan_to_num"),
    (np.zeros((20, 3, 32, 32), np.uint8), "channels stand first.*transpose"),
    (np.zeros((20, 32, 32, 4), np.uint8), "with 1 or 3 channels C: .*a\\[..., :3\\]"),
    (np.zeros((20, 64), np.uint8), "expected uint8.*: one image is a\\[None\\]"),
    (np.zeros((20, 7, 32), np.uint8), "at least 8 pixels"), (np.zeros((30, 8, 8), np.uint8), "left to be held out"),
    (np.zeros((3, 8, 8), np.uint8), "too few images; give at least 20"),
    (np.array([{}] * 20), "cannot be read as a NumPy array")])
def test_an_array_of_the_wrong_kind_is_refused_with_the_way_to_mend_it(array, sentence, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError) as caught:
        images.load_images(str(tmp_path / "a.npy"))
    assert re.search(sentence.replace("(20", r"\(20").replace("8);", r"8\);"), str(caught.value)), caught.value
    _, _, how = str(caught.value).partition("convert it with ")
    with np.errstate(all="ignore"):                                # of all that is alike no range can be made
        assert not how or eval(how, dict(np=np, a=array)).dtype == np.uint8


@pytest.mark.parametrize("labels", [np.zeros(19, int), np.zeros((20, 1), int), np.zeros(20), np.full(20, -2),
                                    np.full(20, 10**6)])
def test_labels_that_do_not_fit_are_refused(labels, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8))
    np.save(tmp_path / "a.labels.npy", labels)
    with pytest.raises(UserError, match="one whole number from 0 to 9999"):
        images.load_images(str(tmp_path / "a.npy"))


def test_files_that_are_no_arrays_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    good = io.BytesIO()
    np.save(good, np.zeros((20, 8, 8), np.uint8))
    huge = good.getvalue().replace(b"(20, 8, 8)", b"(20" + b"0" * 16 + b",)")[:len(good.getvalue())]
    for name, data, sentence in (("a.txt", b"x", "give shapes, cifar10 or a .npy"), ("b.npy", b"", "cannot be read"),
                                 ("c.npy", b"\x93NUMPY\x01\x00v\x00{", "cannot be read"),
                                 ("d.npy", good.getvalue()[:-1], "cannot be read"), ("e.npy", huge, "cannot be read")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            images.load_images(str(tmp_path / name))
    for name, sentence in (("not_there.npy", "no such file; --data says where it lies"), ("folder", "np.stack")):
        with pytest.raises(UserError, match=sentence):
            images.load_images(str(tmp_path / name))


# ---------------------------------------------------------------- pictures

def read_png(data):
    """The published format, read by hand."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body, check = data[at + 8:at + 8 + size], struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0]
        assert check == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 2) and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


def test_a_png_holds_the_pixels_it_was_given(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    figures.write_png(str(tmp_path / "a.png"), image)
    assert (read_png((tmp_path / "a.png").read_bytes()) == image).all()


def test_a_grid_enlarges_small_images_and_shows_one_channel_as_grey():
    rows = [torch.rand(4, 1, 8, 8), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)]
    picture = figures.grid(rows, gap=2)
    assert picture.shape == (2 * 64 + 2, 4 * 64 + 3 * 2, 3) and picture.dtype == np.uint8
    assert (picture[66 + 8 * 3, 66 + 8 * 5] == int(rows[1][1, 0, 3, 5])).all()     # image 1 of row 1, pixel (3, 5)


def test_a_grid_shows_floats_from_0_to_1_cuts_off_what_lies_beyond_and_does_not_shrink_large_images():
    row = torch.tensor([-0.3, 0.0, 0.5, 1.0, 1.3]).view(5, 1, 1, 1).expand(5, 1, 70, 70)
    picture = figures.grid([row], gap=2)
    assert picture.shape == (70, 5 * 70 + 4 * 2, 3) and picture[9, 9::72, 1].tolist() == [0, 0, 128, 255, 255]


def test_a_frame_has_the_colour_of_its_class_and_covers_nothing():
    rows = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    picture = figures.grid(list(rows), [np.array([1, 12, -1]), np.array([9, 0, 1])], gap=2, frame=4)
    assert picture.shape == (2 * 72 + 2, 3 * 72 + 2 * 2, 3)
    wanted = [[figures.COLOURS[1], figures.COLOURS[2], np.uint8([200] * 3)], figures.COLOURS[[9, 0, 1]]]
    for y, x in np.ndindex(2, 3):
        image = picture[y * 74:, x * 74:][:72, :72]
        assert (image[4:-4:2, 4:-4:2] == rows[y, x].permute(1, 2, 0).numpy()).all()
        outside = np.ones((72, 72), bool)
        outside[4:-4, 4:-4] = False
        assert (image[outside] == wanted[y][x]).all()


def test_a_point_of_the_map_stands_right_as_its_first_number_and_down_as_its_second_in_the_colour_of_its_class():
    picture = figures.scatter(np.array([[0, 0], [1, 0], [0, 1000]]), np.array([0, 1, 12]), size=480)
    for (x, y), label in {(6, 6): 0, (474, 6): 1, (6, 474): 2}.items():
        assert (picture[y, x] == figures.COLOURS[label]).all()
    assert (picture[474, 474] == 250).all()


def test_the_table_shows_mean_and_sample_deviation(tmp_path):
    (tmp_path / "finetune.csv").write_text("labels_a_class,method,seed,test_accuracy,seconds,data\n"
                                           "10,pixels,0,20,1,x\n10,pixels,1,30,1,x\nall,pixels,0,40,1,x\n",
                                           encoding="utf-8")
    assert figures.label_table(tmp_path / "finetune.csv") == [
        ["labels a class", "pixels"], ["10", "25.0 ± 7.1"], ["all", "40.0 ± 0.0"]]


def test_a_curve_is_high_where_the_value_is_and_ends_at_its_last_step():
    drawn = figures.curve([0, 50, 100], [3.0, 1.0, 2.0], width=300, height=140)
    places = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', drawn)[1].split()]
    assert places == [(45, 10), (170, 120), (295, 65)]    # from the axis to the right edge; the greatest value on top
    assert ">3<" in drawn and ">1<" in drawn and ">step 100<" in drawn


def test_the_figure_shows_each_method_at_each_number_of_labels_as_high_as_its_accuracy(tmp_path):
    (tmp_path / "finetune.csv").write_text("labels_a_class,method,seed,test_accuracy,seconds,data\n"
                                           "10,pixels,0,20,1,x\n10,pixels,1,30,1,x\n10,fine-tuned,0,50,1,x\n"
                                           "all,pixels,0,40,1,x\nall,fine-tuned,0,60,1,x\n", encoding="utf-8")
    figure = figures.label_figure(tmp_path / "finetune.csv", height=300)
    # fine-tuned first: it ends higher
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', figure)]
    step = heights[0] - heights[1]    # 10 points
    assert (step > 10 and heights[2] - heights[0] == pytest.approx(2.5 * step, abs=0.2)
            and heights[2] - heights[3] == pytest.approx(1.5 * step, abs=0.2))
    assert all(name in figure for name in ("pixels 40.0", "fine-tuned 60.0", ">10<", ">all<"))


def test_a_bar_of_the_figure_reaches_one_deviation_up_and_down_and_no_name_covers_another(tmp_path):
    (tmp_path / "finetune.csv").write_text("labels_a_class,method,seed,test_accuracy,seconds,data\n"
                                           "10,pixels,0,20,1,x\n10,pixels,1,30,1,x\n10,fine-tuned,0,50,1,x\n"
                                           "all,pixels,0,60,1,x\nall,fine-tuned,0,60,1,x\n", encoding="utf-8")
    figure = figures.label_figure(tmp_path / "finetune.csv")
    bars = [list(map(float, ends)) for ends in re.findall(r'<line x1="([\d.]+)" x2="\1" y1="([\d.]+)" y2="([\d.]+)"',
                                                          figure)]
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', figure)]
    (_, low, high), at = bars[0], heights[0]                       # pixels at 10 labels: 25 ± 7.1; fine-tuned 50
    assert low - at == pytest.approx(at - high, abs=0.2) == pytest.approx(7.1 / 25 * (at - heights[2]), abs=0.2)
    names = [float(y) for y in re.findall(r'y="([\d.]+)" style="fill', figure)]
    assert len(names) == 2 and names[1] - names[0] >= 12


def test_no_accuracy_is_above_100(tmp_path):
    (tmp_path / "finetune.csv").write_text("labels_a_class,method,seed,test_accuracy,seconds,data\n"
                                           "10,pixels,0,100,1,x\n10,pixels,1,95,1,x\n", encoding="utf-8")
    figure = figures.label_figure(tmp_path / "finetune.csv")       # 97.5 ± 3.5
    assert ">100<" in figure and ">90<" in figure and ">110<" not in figure and 'y2="20.0"' in figure
