"""Images: our own drawings, CIFAR-10, or the user's array.

All images are uint8 (N, C, H, W), and a batch is one index operation. The user's array stays on
the disk, mapped into memory, so it may be larger than memory. Images in HELD_OUT are for every
choice (learning rates, epochs). Images in TEST are for the final figures alone.
"""

import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minissl import UserError
from minissl.data.shapes import SHAPES, shape_data
from minissl.data.splits import (
    HELD_OUT,
    TEST,
    TRAIN,
    drop_duplicates,
    evenly_spaced,
    fingerprint,
    limit_splits,
    small_classes,
    split_blocks,
)
from minissl.training.files import download, read_archive, unreadable
from minissl.training.wording import count_of, list_names


@dataclass
class Images:
    """N images, each a row of an array. A selection of images copies no pixel."""
    pixels: torch.Tensor             # (rows, C, H, W) uint8, in memory or mapped
    rows: torch.Tensor               # (N,) int64, the row of each image in `pixels`
    labels: np.ndarray               # (N,) int64, -1 for an image without a label
    split: np.ndarray                # (N,) uint8: TRAIN, HELD_OUT or TEST
    classes: list                    # the name of each label
    notes: list = field(default_factory=list)       # sentences about the data, to be printed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        """The uint8 pixels: (n, C, H, W) of a slice or an array of indices, (C, H, W) of one."""
        return self.pixels[self.rows[indices]]

    @property
    def shape(self):
        """(N, C, H, W)"""
        return len(self), *self.pixels.shape[1:]

    def to(self, device):
        """The same images on a GPU if they fit; otherwise unchanged, and each batch has to
        move. They may take half of the free memory of a CUDA device, and 4 GiB elsewhere.
        """
        if device.type == "cpu":
            return self
        room = 2**32
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            room = free // 2
        if math.prod(self.shape) > room:
            return self
        return replace(self, pixels=self[:].to(device), rows=torch.arange(len(self)))

    def select(self, indices):
        """The images that an array of indices, or a boolean mask (N,), picks."""
        rows = self.rows[torch.as_tensor(indices)]
        return replace(self, rows=rows, labels=self.labels[indices], split=self.split[indices])

    def subset(self, split, most=None, labelled=False):
        """The images of one split: at most `most` of them, evenly spaced.

        labelled: only images that have a label.
        """
        chosen = self.split == split
        if labelled:
            chosen = chosen & (self.labels >= 0)
        indices = np.flatnonzero(chosen)
        if most is not None:
            indices = indices[evenly_spaced(len(indices), most)]
        return self.select(indices)


def load_images(data, data_dir="data", limit=0, keep_all=False, with_labels=True):
    """Images by name ("shapes", "cifar10") or from a file NAME.npy.

    limit: keep only this many images of each split (0: all).
    keep_all: keep the rows of NAME.npy as they are, copies included and however few there are;
    `limit` then keeps the first rows. So row n of the features belongs to row n of the array.
    with_labels: read NAME.labels.npy. If False, the images of NAME.npy have no labels.

    Raises UserError if the data cannot be used; its sentence says why.
    """
    if data == "shapes":
        pixels, shapes, split = shape_data(limit)
        images = Images(pixels, torch.arange(len(pixels)), shapes, split, SHAPES)
    elif data == "cifar10":
        images = cifar10(Path(data_dir))
    else:
        images = own_images(Path(data), keep_all, with_labels=with_labels)
    if not limit:
        return images
    if keep_all:
        return images.select(np.arange(min(limit, len(images))))
    return images.select(limit_splits(images.split, limit))


def describe(images):
    """The number and size of the training images, and a checksum, by which a run knows its data.

    The checksum is that of all images and their split.
    """
    n, C, H, W = images.subset(TRAIN).shape
    return f"{count_of(n, 'image')} of {H} × {W} × {C}, checksum {fingerprint(images)}"


def sample_of_pixels(images):
    """The pixels of some images, scaled to [0, 1]: (n, C, H, W) float32.

    images: (N, C, H, W) uint8. They are 10,000 evenly spaced images, or fewer (at least 100) if
    these are larger than 64 MiB.
    """
    affordable = max(100, 2**26 // math.prod(images.shape[1:]))
    indices = evenly_spaced(len(images), min(10_000, affordable))
    return images[indices].cpu().float() / 255      # MPS has neither float64 nor eigh


def mean_and_std(images):
    """The mean and the standard deviation of each channel, of pixels scaled to [0, 1].

    images: (N, C, H, W) uint8, of which a sample counts. Returns dict(mean, std), each a list
    of C numbers.
    """
    pixels = sample_of_pixels(images)
    mean = pixels.mean((0, 2, 3))
    std = pixels.std((0, 2, 3), correction=0)
    std = std.clamp(min=1e-3)                          # models divide by it: it must not be 0
    return dict(mean=mean.tolist(), std=std.tolist())


def mean_and_whitening(images):
    """The mean of each channel, and the matrix that whitens squares of 2 × 2 pixels.

    Neighbouring pixels are nearly equal, and so are the three colours: most of what 4C numbers
    of a square say is its brightness. Multiplied by `whitening`, the 4C numbers of a square
    (minus the mean) are uncorrelated, and brightness, edges and colours count the same (PCA
    whitening). Each row is a principal component of the squares, the strongest first, divided by
    √(v + 255⁻²), where v is its variance. So its output has the variance v / (v + 255⁻²), which
    is nearly 1. A component that is weaker than one step of brightness, 1/255, is mostly rounding
    noise, and 255⁻² keeps it small.

    images: (N, C, H, W) uint8, of which a sample counts. Returns dict(mean, whitening): C
    numbers, and 4C lists of 4C numbers, in the order of F.pixel_unshuffle.
    """
    pixels = sample_of_pixels(images)
    mean = pixels.mean((0, 2, 3))
    H, W = pixels.shape[2:]
    pixels = pixels[:, :, :H // 2 * 2, :W // 2 * 2] - mean[:, None, None]
    squares = F.pixel_unshuffle(pixels, 2)                    # (n, 4C, H/2, W/2)
    squares = squares.transpose(0, 1).flatten(1)              # (4C, n · H/2 · W/2)
    covariance = (squares @ squares.T / squares.shape[1]).double()
    variance, components = torch.linalg.eigh(covariance)      # (4C,), from weak to strong
    rows = components.T / (variance.clamp(min=0) + 255**-2).sqrt()[:, None]
    rows = rows.flip(0)
    # A component and its negative are equally good: let the largest number be positive.
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return dict(mean=mean.tolist(), whitening=(rows * largest.sign()).tolist())


# ---------------------------------------------------------------- CIFAR-10

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer",
                   "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_MEMBER = re.compile(r"(?:\./)?cifar-10-batches-bin/((?:data_batch_[1-5]|test_batch)\.bin)")


def cifar10(data_dir):
    """CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of 32 × 32 pixels in ten classes.

    Reads the folder cifar-10-batches-bin in data_dir, or the archive cifar-10-binary.tar.gz
    there, which is downloaded if neither exists. The last 5,000 of the 50,000 training images
    are held out.

    Raises UserError if the files are not those of CIFAR-10.
    """
    folder = data_dir / "cifar-10-batches-bin"
    archive = data_dir / "cifar-10-binary.tar.gz"
    if folder.is_dir():
        source = folder
        files = {path.name: path.read_bytes() for path in folder.glob("*_batch*.bin")}
    else:
        source = archive
        if not archive.exists():
            download(CIFAR10_URL, archive, CIFAR10_MD5)
        members = read_archive(archive, CIFAR10_MEMBER, 2**25, CIFAR10_URL)
        files = {match[1]: content for match, content in members}
    pixels, labels = [], []
    for name in CIFAR10_FILES:
        if name not in files:
            raise UserError(f"{source} lacks {name}: delete {source} and start again")
        batch = _read_cifar_batch(files[name])
        if batch is None:
            raise UserError(f"{source}: {name} is not a batch of CIFAR-10; "
                            f"delete {source} and start again")
        pixels.append(batch[0])
        labels.append(batch[1])
    split = np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), [45_000, 5_000, 10_000])
    pixels = torch.from_numpy(np.concatenate(pixels))
    labels = np.concatenate(labels)
    return Images(pixels, torch.arange(len(pixels)), labels, split, CIFAR10_CLASSES)


def _read_cifar_batch(content):
    """pixels (10000, 3, 32, 32) uint8 and labels (10000,) int64; None if the file is damaged.

    content: 10,000 records of one byte for the label, then 32 × 32 bytes for each of red, green
    and blue, row by row.
    """
    if len(content) != 10_000 * 3073:
        return None
    records = np.frombuffer(content, np.uint8).reshape(10_000, 3073)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        return None
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


# ---------------------------------------------------------------- The user's own images

SMALLEST = 8        # pixels: the encoders halve height and width three times
FEWEST = 20         # different images: below that too few can be held out for the previews
README = 'see "Your own images" in README.md'
EXPECTED = (f"expected uint8 images (N, H, W, C) or (N, H, W) with 1 or 3 channels C, "
            f"at least {SMALLEST} × {SMALLEST} pixels; {README}")


def own_images(path, keep_all=False, flag="--data", with_labels=True):
    """Images from NAME.npy, uint8 (N, H, W, C) or (N, H, W), with labels from NAME.labels.npy.

    The file with the labels, N whole numbers, may be missing. If an image occurs several times,
    one copy is kept.

    keep_all: keep every image, and accept any number of them. flag: the command-line flag that
    gave the path, for messages. with_labels: False leaves NAME.labels.npy unread.

    Raises UserError if an array is of another form.
    """
    if path.is_dir() or path.suffix.lower() != ".npy":
        names = "shapes, cifar10 or " if flag == "--data" else ""
        raise UserError(f"{flag} {path}: expected {names}a .npy file of uint8 images; {README}")
    if not path.exists():
        raise UserError(f"{flag} {path}: file not found; give the path of a .npy file")
    name = f"{flag} {path}"
    remedy = "if the images have different sizes, resize them to one size, and save them as uint8"
    array = _map_array(path, remedy)
    _check_images(array, name)
    fewest = 1 if keep_all else FEWEST
    if len(array) < fewest:
        found = count_of(len(array), "image")
        raise UserError(f"{name}: found {found}; expected at least {fewest}")
    if with_labels:
        labels, classes = _read_labels(path.with_name(path.stem + ".labels.npy"), len(array))
    else:
        labels, classes = np.full(len(array), -1), []
    _warn_if_black(array, path)
    notes = []
    pixels = torch.from_numpy(array)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    pixels = pixels.permute(0, 3, 1, 2)                # (N, H, W, C) -> (N, C, H, W)
    if keep_all:
        rows = torch.arange(len(array))
        return Images(pixels, rows, labels, split_blocks(labels), classes, notes)

    # Copies are left out before the images are split; otherwise a class could lose its training
    # images to another split.
    hashes = np.array([hash(image.tobytes()) for image in array])
    undivided = np.full(len(array), TRAIN, np.uint8)
    kept = np.flatnonzero(drop_duplicates(hashes, undivided, labels))
    if len(kept) < fewest:
        found = count_of(len(kept), "different image")
        raise UserError(f"{name}: found {found}; expected at least {fewest}")
    dropped = len(array) - len(kept)
    if dropped:
        notes.append(f"left out {count_of(dropped, 'copy', 'copies')} of other images")
    labels = labels[kept]
    split = hold_out_two(split_blocks(labels), labels)
    small = small_classes(labels, classes)
    if small:
        notes.append("classes with fewer than three images have no test image: "
                     + list_names(small))
    return Images(pixels, torch.from_numpy(kept), labels, split, classes, notes)


def hold_out_two(split, labels):
    """The split (N,) with at least two held-out images, which the previews need.

    split_blocks holds out fewer where nearly all classes are small. Then training images become
    held-out ones, one at a time: each is the last training image of the largest class that has
    no test image. Images without a label count as one class. labels: (N,) int64.

    >>> hold_out_two(np.zeros(5, np.uint8), np.array([0, 0, 1, 2, 2])).tolist()
    [0, 1, 0, 0, 1]
    """
    split = split.copy()
    tested = labels[split == TEST]                     # classes that keep their training images
    while (split == HELD_OUT).sum() < 2:
        movable = (split == TRAIN) & ~np.isin(labels, tested)
        values, counts = np.unique(labels[movable], return_counts=True)
        largest = values[counts.argmax()]
        last = np.flatnonzero(movable & (labels == largest))[-1]
        split[last] = HELD_OUT
    return split


def _map_array(path, remedy):
    """The array of a .npy file, mapped: only the parts that are read take memory.

    remedy: what the user can do if the array holds Python objects.

    Mode "c" allows writes into memory but not into the file. It makes the array writable for
    torch, which warns of read-only arrays, and it works for a file that is read-only.
    """
    try:
        return np.lib.format.open_memmap(path, mode="c")
    except PermissionError:
        raise unreadable(path) from None
    except Exception as error:      # a damaged header raises OverflowError, TokenError and others
        reason = str(error)[:100]
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        raise UserError(f"{path}: this is an .npz or another zip archive, not a NumPy array: "
                        f"save one array with numpy.save")
    if "Python objects" in reason:
        raise UserError(f"{path}: the array holds Python objects, not numbers: {remedy}; {README}")
    raise UserError(f"{path} cannot be read as a NumPy array ({reason}): "
                    f"write it again with numpy.save; {README}")


def _check_images(array, name):
    """Raise UserError unless the array holds images that the encoders can read."""
    if array.dtype != np.uint8:
        values = _value_range(array)
        raise UserError(f"{name}: found {array.dtype} of shape {array.shape}{values}; "
                        f"{EXPECTED}")
    without_channels = array.ndim == 3
    with_channels = array.ndim == 4 and array.shape[3] in (1, 3)
    large_enough = min(array.shape[1:3], default=0) >= SMALLEST
    if not (without_channels or with_channels) or not large_enough:
        raise UserError(f"{name}: found {array.dtype} of shape {array.shape}; {EXPECTED}")


def _value_range(array):
    """The range of values in words, such as " with values from 0 to 4095"; "" of no numbers."""
    if array.dtype.kind not in "buif" or not array.size:
        return ""
    least = np.fmin.reduce(array, axis=None)           # ignores NaN, and copies nothing
    most = np.fmax.reduce(array, axis=None)
    if array.dtype.kind == "f":
        return f" with values from {least:g} to {most:g}"
    return f" with values from {least} to {most}"


def _read_labels(path, n):
    """labels (n,) int64, -1 where there is none, and the class names, from NAME.labels.npy."""
    if not path.exists():
        return np.full(n, -1), []
    given = _map_array(path, "save whole numbers, such as the classes' numbers")
    expected = (f"expected one whole number from 0 to 9999 for each of the {n:,} images, "
                f"and -1 for an image without a label")
    if given.shape != (n,) or given.dtype.kind not in "iu":
        raise UserError(f"{path}: found {given.dtype} of shape {given.shape}; {expected}")
    least, most = int(given.min()), int(given.max())
    if least < -1 or most > 9999:
        raise UserError(f"{path}: found values from {least} to {most}; {expected}")
    given = np.asarray(given, np.int64)
    values = np.unique(given[given >= 0])
    labels = np.searchsorted(values, given)
    labels[given < 0] = -1
    return labels, [str(value) for value in values]


def _warn_if_black(array, path):
    """Print a warning if all values are 0 or 1, as of masks, or of floats that were cast."""
    sample = array[evenly_spaced(len(array), 100)]
    if sample.max() > 1 or array.max() > 1:            # the whole array only if the sample is dark
        return
    if array.max() == 0:
        problem = ("all values are 0 (of 255), so the images are black; "
                   "if they were floats from 0 to 1, save (255 * x).astype(np.uint8)")
    else:
        problem = ("all values are 0 or 1 (of 255), so the images are black; "
                   "if 1 means white, save 255 * x")
    print(f"warning: {path}: {problem}", file=sys.stderr)
