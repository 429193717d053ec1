"""Images to learn from: drawn by our own code, a published data set, or the reader's own array.

All are uint8 (N, C, H, W); a batch is an index operation. What fits moves to the device once; the reader's own array
stays on the disk, mapped, so it may be larger than memory. HELD_OUT is for every choice (learning rates, epochs), TEST
for the final figures alone, as for texts in datasets.py.

Read next: evaluation.py.
"""

import io
import math
import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minissl import UserError
from minissl.datasets import HELD_OUT, TEST, TRAIN, evenly, fingerprint, split_blocks, without_twins
from minissl.files import download, progress, read_archive
from minissl.training import generator


@dataclass
class Images:
    """N images as rows of one array: to select some copies no pixel."""
    pixels: torch.Tensor             # (rows, C, H, W) uint8: in memory, on a device, or mapped from the disk
    rows: torch.Tensor               # (N,) int64: which of them
    labels: np.ndarray               # (N,) int64, -1 where there is none
    split: np.ndarray                # (N,) uint8: TRAIN, HELD_OUT or TEST
    classes: list                    # label number -> name
    notes: list = field(default_factory=list)   # sentences on what was found and what was passed over

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, which):
        """(n, C, H, W) uint8, for a slice or an index array."""
        return self.pixels[self.rows[which]]

    @property
    def shape(self):
        return len(self), *self.pixels.shape[1:]                                  # (N, C, H, W)

    def to(self, device):
        """The same on a GPU, if they take at most half of its free memory; else they stay, and each batch must move."""
        room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**32
        if device.type == "cpu" or math.prod(self.shape) > room:
            return self
        return replace(self, pixels=self[:].to(device), rows=torch.arange(len(self)))

    def select(self, which):
        """The images that a boolean mask or an index array picks."""
        return replace(self, rows=self.rows[torch.as_tensor(which)], labels=self.labels[which], split=self.split[which])

    def of(self, split, most=None):
        """The images of one split; at most this many, evenly spaced."""
        where = np.flatnonzero(self.split == split)
        return self.select(where if most is None else where[evenly(len(where), most)])


def load_images(data, data_dir="data", limit=0, keep_all=False):
    """Images by name ("shapes", "cifar10") or from NAME.npy; limit keeps this many of each split (0: all);
    keep_all, also images of NAME.npy that occur twice, however few, so that a row of features is a row of the array; of
    them `limit` takes the first.

    Raises UserError with one sentence for anything the user can mend.
    """
    if data == "shapes":
        found = shapes(limit)
    elif data == "cifar10":
        found = cifar10(Path(data_dir))
    else:
        found = own_images(Path(data), keep_all)
    if limit and keep_all:
        found = found.select(np.arange(min(limit, len(found))))
    elif limit:
        parts = [np.flatnonzero(found.split == split) for split in (TRAIN, HELD_OUT, TEST)]
        found = found.select(np.concatenate([part[evenly(len(part), limit)] for part in parts]))
    return found


def describe(images):
    """What tells these Images from others, in words, for a run to remember what it learned from."""
    n, C, H, W = images.of(TRAIN).shape
    return f"{n:,} images of {H} × {W} × {C}, checksum {fingerprint(images)}"


def mean_and_deviation(images):
    """images (N, C, H, W) uint8 -> dict(mean, deviation), a list (C,) each, of pixels in [0, 1]; from 10,000 images, or
    fewer if they are large."""
    some = min(len(images), 10_000, max(100, 2**26 // math.prod(images.shape[1:])))
    some = images[torch.linspace(0, len(images) - 1, some).long()].float() / 255
    deviation = some.std((0, 2, 3), correction=0).clamp(min=1e-3)
    return dict(mean=some.mean((0, 2, 3)).tolist(), deviation=deviation.tolist())


# ---------------------------------------------------------------- shapes: ten classes, drawn

SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "frame", "crescent", "bar", "half disc"]


def shapes(limit=0):
    """45,000 + 5,000 + 10,000 images of 32 × 32 in colour, always the same; or `limit` of each split, drawn alone.

    Place, size, rotation, colours, the background and what else lies in the picture vary freely, so the pixels do not
    give the class away: logistic regression on them stays under 35 % (tested; chance 10 %).
    """
    sizes = [min(limit or n, n) for n in (45_000, 5_000, 10_000)]
    drawn = []
    for split, n in zip((TRAIN, HELD_OUT, TEST), sizes):
        for begin in range(0, n, 1000):
            progress(f"shapes: {1000 * len(drawn):,} of {sum(sizes):,} drawn")
            drawn.append(draw_shapes(min(1000, n - begin), generator(0, f"shapes {split}", begin)))
    images, labels = map(torch.cat, zip(*drawn))
    split = np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), sizes)
    return Images(images, torch.arange(sum(sizes)), labels.numpy(), split, SHAPES)


def distance(shape, x, y):
    """Signed distance, nearly, from the points (x, y) to the outline of a shape of radius 1 about 0: below 0 inside."""
    r = torch.hypot(x, y)

    def box(width, height):
        return torch.maximum(x.abs() - width, y.abs() - height)

    def star(points, inner):                   # fold the plane into one of 2 · points equal sectors: there it is a line
        sector = math.pi / points
        angle = (torch.atan2(y, x) % (2 * sector) - sector).abs() - sector         # 0 at the tip … -sector at the notch
        dx, dy = 1 - inner * math.cos(sector), inner * math.sin(sector)             # along the edge, and across
        return ((r * angle.cos() - 1) * dy - r * angle.sin() * dx) / math.hypot(dx, dy)

    return {"circle": lambda: r - 0.8,
            "square": lambda: box(0.72, 0.72),
            "triangle": lambda: star(3, 0.5),
            "star": lambda: star(5, 0.42),
            "cross": lambda: torch.minimum(box(1, 0.28), box(0.28, 1)),
            "ring": lambda: (r - 0.65).abs() - 0.2,
            "frame": lambda: (box(0.58, 0.58)).abs() - 0.18,
            "crescent": lambda: torch.maximum(r - 0.95, 0.75 - torch.hypot(x - 0.45, y)),
            "bar": lambda: box(1, 0.27),
            "half disc": lambda: torch.maximum(r - 0.95, -x - 0.1)}[shape]()


def draw_shapes(n, generator, size=32):
    """n images (n, 3, size, size) uint8 and their labels (n,), every quantity drawn for each image on its own."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(len(SHAPES), (n,), generator=generator)
    column = torch.arange(size) + 0.5
    radius, turn = uniform(0.2, 0.42, 1, 1) * size, uniform(0, 2 * math.pi, 1, 1)
    x, y = (grid - radius - uniform(0, 1, 1, 1) * (size - 2 * radius)                # the whole shape stays inside
            for grid in (column.expand(size, size), column[:, None].expand(size, size)))
    along, across = (x * turn.cos() + y * turn.sin()) / radius, (y * turn.cos() - x * turn.sin()) / radius
    outline = torch.empty(n, size, size)
    for number, name in enumerate(SHAPES):
        here = labels == number
        outline[here] = distance(name, along[here], across[here])
    inside = (0.5 - outline * radius).clamp_(0, 1)[:, None]                           # anti-aliased over a pixel

    def tone(colour, strength):
        """colour (n, 3, 1, 1) with a soft texture: (n, 3, size, size)."""
        spots = colour + torch.randn(n, 3, 5, 5, generator=generator) * uniform(0, strength, 1, 1, 1)
        return F.interpolate(spots, size=(size, size), mode="bilinear", align_corners=True)

    ground = uniform(0.1, 0.9, 1, 1, 1)
    picture = tone(ground + uniform(-0.1, 0.1, 3, 1, 1), 0.08)
    angle = uniform(0, 2 * math.pi, 1, 1)
    wave = ((column * angle.cos() + column[:, None] * angle.sin()) * uniform(0.2, 1.2, 1, 1)).sin_()
    picture += (wave * uniform(0, 0.06, 1, 1))[:, None]                               # stripes behind
    colour = uniform(0, 1, 3, 1, 1)
    away = colour - ground                                                            # too alike: push the ink away
    colour += torch.where(away.abs().amax(1, keepdim=True) < 0.35, 0.5 * away.sign(), 0.0)
    ink = tone(colour, 0.08)
    for _ in range(3):                                                                # distractors: small spots
        spot = torch.hypot(column - uniform(0, size, 1, 1), column[:, None] - uniform(0, size, 1, 1))
        spot = (0.5 + uniform(0.5, 2.5, 1, 1) - spot).clamp_(0, 1)[:, None]
        picture.lerp_(uniform(0, 1, 3, 1, 1).expand_as(picture), spot.expand_as(picture))
    picture.lerp_(ink, inside.expand_as(picture))
    picture += 0.03 * torch.randn(picture.shape, generator=generator)
    return (picture.clamp_(0, 1) * 255).round_().to(torch.uint8), labels


# ---------------------------------------------------------------- cifar10 (Krizhevsky 2009)

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_PLACES = ["cifar-10-batches-bin", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"]
CIFAR10_NAME = re.compile(r"(?:\./)?(cifar-10-batches-(?:bin|py))/((?:data_batch_[1-5]|test_batch)(?:\.bin)?)")


def cifar10(data_dir):
    """The binary or the Python version, unpacked or packed, whichever lies in data_dir; else the former, downloaded.
    The last 5,000 training images are held out for choices."""
    places = [data_dir / name for name in CIFAR10_PLACES]
    where = next((place for place in places if place.exists()), places[2])
    if not where.exists():
        download(CIFAR10_URL, where, CIFAR10_MD5)
    if where.is_dir():
        files = {path.name: path.read_bytes() for path in where.glob("*_batch*") if path.is_file()}
    else:
        files = {name[2]: data for name, data in read_archive(where, CIFAR10_NAME, 2**25, CIFAR10_URL)}
    again = f"delete it, and get {CIFAR10_URL} again"           # what lies there is preferred to a new one beside it
    images, labels, end = [], [], ".bin" if "bin" in where.name else ""
    for name in [f"data_batch_{n}{end}" for n in range(1, 6)] + ["test_batch" + end]:
        if name not in files:
            raise UserError(f"{where} lacks {name}: {again}")
        try:
            if end:                                                                   # label, then 3 × 32 × 32 pixels
                records = np.frombuffer(files[name], np.uint8).reshape(-1, 3073)
                pixels, label = records[:, 1:], records[:, 0]
            else:
                pixels, label = read_cifar_pickle(files[name])
            if len(pixels) != 10_000 or label.max() > 9:
                raise ValueError(f"{len(pixels):,} images, labels up to {label.max()}")
        except ValueError as error:
            raise UserError(f"{where}, {name}: not a batch of CIFAR-10 ({error}): {again}") from None
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels.append(label.astype(np.int64))
    split = np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), [45_000, 5_000, 10_000])
    return Images(torch.from_numpy(np.concatenate(images)), torch.arange(60_000),
                  np.concatenate(labels), split, CIFAR10)


def read_cifar_pickle(data):
    """The bytes of a batch of CIFAR-10's Python version -> pixels (N, 3072) uint8, labels (N,) int64.

    A pickle may call anything that it names. This one can name four things only, and none is what it seems: they build
    bytes and the class below, which holds what stands in the file and does nothing. Raises ValueError.
    """
    class Held:
        def __init__(self, *arguments):
            pass

        def __setstate__(self, state):
            self.state = state

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}".endswith(("multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")):
                return Held
            if (module, name) == ("_codecs", "encode"):             # how Python 3 writes bytes for Python 2
                return lambda text, encoding: str(text).encode("latin1")
            raise ValueError(f"it wants to run {module}.{name}")

    try:
        batch = Unpickler(io.BytesIO(data), encoding="bytes").load()
        _, shape, _, _, content = batch[b"data"].state
        pixels, labels = np.frombuffer(content, np.uint8).reshape(shape), np.array(batch[b"labels"], np.int64)
        if pixels.ndim != 2 or pixels.shape[1] != 3072 or labels.shape != pixels.shape[:1] or labels.min() < 0:
            raise ValueError(f"an array of {pixels.shape} and labels of {labels.shape}")
        return pixels, labels
    except ValueError:
        raise
    except Exception as error:                       # a damaged pickle can fail in any way: IndexError, EOFError, ...
        raise ValueError(f"a damaged pickle: {type(error).__name__}") from None


# ---------------------------------------------------------------- the reader's own array

SMALLEST = 8        # pixels: the encoders halve height and width three times
RECIPE = ("load them with Pillow: np.save('NAME.npy', "
          "np.stack([np.asarray(Image.open(p).convert('RGB').resize((32, 32))) for p in paths]))")


def own_images(path, keep_all=False, flag="--data"):
    """NAME.npy, uint8 (N, H, W, C) or (N, H, W), and labels from NAME.labels.npy, if there. flag: who gave the path."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: a folder; minissl reads pictures as one array, {RECIPE}")
    if path.suffix != ".npy":
        raise UserError(f"{flag} {path}: give shapes, cifar10 or a .npy file of uint8 images (N, H, W, C) or (N, H, W)")
    if not path.exists():
        raise UserError(f"{flag} {path}: there is no such file; {flag} says where it lies")
    array = _load_array(path)
    found = f"{flag} {path}: {array.dtype} of shape {array.shape}"
    wanted = "expected uint8 (N, H, W, C) or (N, H, W), with 1 or 3 channels C"
    if array.dtype.kind not in "buif" or not array.ndim:
        raise UserError(f"{found}; {wanted}: {RECIPE}")
    if array.dtype != np.uint8:
        some = np.nan_to_num(array[:100])
        least, most = some.min(initial=0), some.max(initial=0)
        if array.dtype.kind == "f" and least < 0:
            how = "(a - a.min()) / (a.max() - a.min()) * 255"
        elif array.dtype == np.uint16 and most > 255:
            how = "a / a.max() * 255"
        elif array.dtype.kind == "f" and 1 < most < 16:
            how = "np.nan_to_num(a) / np.nanmax(a) * 255"
        else:
            how = "np.nan_to_num(a) * 255.0" if most <= 1 else "np.nan_to_num(a)"
        raise UserError(f"{found}; {wanted}: convert it with ({how}).clip(0, 255).round().astype(np.uint8)")
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        raise UserError(f"{found}: the channels stand first; {wanted}: convert it with a.transpose(0, 2, 3, 1)")
    one = array.ndim == 3 and array.shape[2] in (1, 3, 4)           # one in colour, for nothing else is so narrow
    if array.ndim not in (3, 4) or array.ndim == 4 and array.shape[3] not in (1, 3) or one:
        how = (": one image is a[None]" if one else
               ": one image is a[None], flat ones are a.reshape(-1, height, width)" if array.ndim == 2 else
               ": leave out what is no colour with a[..., :3]" if array.ndim == 4 and array.shape[3] == 4 else "")
        raise UserError(f"{found}; {wanted}{how}")
    if min(array.shape[1:3]) < SMALLEST:
        raise UserError(f"{found}: an image must be at least {SMALLEST} pixels high and wide; enlarge them")
    if len(array) < (fewest := 1 if keep_all else 20):
        raise UserError(f"{found}: too few images; give at least {fewest}")
    labels, label_path, classes = np.full(len(array), -1), path.with_name(path.stem + ".labels.npy"), []
    if label_path.exists():
        given = _load_array(label_path)
        if (given.shape != (len(array),) or given.dtype.kind not in "iu"
                or int(given.min()) < -1 or int(given.max()) > 9999):
            raise UserError(f"{label_path}: {given.dtype} of shape {given.shape}; expected one whole number "
                            f"from 0 to 9999 for each of the {len(array):,} images (-1: no label)")
        values = np.unique(given[given >= 0])
        classes = [str(value) for value in values]
        labels = np.where(given >= 0, np.searchsorted(values, given), -1).astype(np.int64)
    split, hashes = split_blocks(labels), np.array([hash(image.tobytes()) for image in array])
    keep = without_twins(hashes, split, labels) | keep_all
    if not keep_all and (split[keep] == HELD_OUT).sum() < 2:
        raise UserError(f"{found}: no two images are left to be held out; give 20 that differ, 10 of each class")
    pixels = torch.from_numpy(array).view(*array.shape[:3], -1).permute(0, 3, 1, 2)
    notes = [f"{(~keep).sum():,} images dropped that stand elsewhere in the data, too"] * (not keep.all())
    if array[evenly(len(array), 100)].max() <= 1:
        notes.append("all of it is nearly black, 0 or 1 where 255 is white: if 1 is meant to be white, save 255 * a")
    return Images(pixels, torch.arange(len(array)), labels, split, classes, notes).select(keep)


def _load_array(path):
    try:
        return np.lib.format.open_memmap(path, mode="c")            # mapped: what is not asked for is not read
    except Exception as error:              # a damaged header can fail in any way: TokenError, OverflowError, ...
        raise UserError(f"{path} cannot be read as a NumPy array ({str(error)[:100]})") from None
