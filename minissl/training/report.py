"""What people look at: pictures, curves, the table, and the page of a run.

    write_png(path, grid([batch, batch]))     rows of images
    write_png(path, scatter(points, labels))  features in two dimensions
    curve(steps, values)                      one column of metrics.csv
    label_figure(rows)                        accuracy over the number of labels
    write_page("runs/x")                      everything in the folder, as report.html

No plotting package is needed: a PNG is three chunks around zlib, and a curve is a line
of SVG. The page is one file that any browser opens. It holds its pictures, and makes no
request to anywhere. It is written again after each preview and after each row of
finetune.py, from whatever lies in the folder by then.

Pictures stay small whatever the size of the user's images. `grid` shows each image with
at most 127 pixels on its longer side, and `write_png` halves a picture until its file
has at most one megabyte.
"""

import base64
import csv
import html
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from minissl.training.accuracies import (
    accuracies_of,
    by_cell,
    by_condition,
    labels_and_methods,
    mean_and_spread_of,
    mean_and_std,
    of_same_data,
    table_of,
)
from minissl.training.files import read_csv, write_atomically
from minissl.training.wording import count_of


# ---------------------------------------------------------------- PNG pictures

LARGEST_PNG = 1_000_000                 # bytes
TILE = 64                               # pixels: about the size of an image in a grid

# One colour for each class. The eleventh class has the colour of the first.
COLOURS = np.uint8([
    [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189],
    [140, 86, 75], [227, 119, 194], [20, 20, 20], [188, 189, 34], [23, 190, 207],
])
NO_LABEL = np.uint8([200, 200, 200])    # light grey


def write_png(path, image):
    """Write an image (H, W, 3) uint8, a NumPy array, as a PNG file.

    While the file would have more than LARGEST_PNG bytes, the image is halved.
    """
    data = encode_png(image)
    while len(data) > LARGEST_PNG:
        image = shrink(image, 2)
        data = encode_png(image)
    write_atomically(path, data)


def encode_png(image):
    """The bytes of a PNG: a signature and three chunks. image (H, W, 3) uint8."""
    height, width, _ = image.shape
    no_filter = np.zeros((height, 1), np.uint8)       # each row begins with its filter
    rows = np.concatenate([no_filter, image.reshape(height, -1)], axis=1)
    bits, rgb = 8, 2
    header = struct.pack(">IIBBBBB", width, height, bits, rgb, 0, 0, 0)
    return b"".join([
        b"\x89PNG\r\n\x1a\n",
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(rows.tobytes())),
        png_chunk(b"IEND", b""),
    ])


def png_chunk(kind, data):
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def shrink(images, factor):
    """Replace each block of factor × factor pixels by its mean.

    images (..., H, W, 3) uint8 -> (..., ⌈H / factor⌉, ⌈W / factor⌉, 3) uint8. The blocks
    at the right and the lower edge may be smaller.
    """
    for axis in (-3, -2):
        size = images.shape[axis]
        starts = np.arange(0, size, factor)
        sums = np.add.reduceat(images, starts, axis=axis, dtype=np.float32)
        counts = np.minimum(factor, size - starts)
        shape = [1] * images.ndim
        shape[axis] = len(starts)
        images = sums / counts.reshape(shape)
    return images.round().astype(np.uint8)


def colours(labels):
    """The colour of each label: (N,) int -> (N, 3) uint8. A label -1 means none."""
    has_label = labels[:, None] >= 0
    return np.where(has_label, COLOURS[labels % len(COLOURS)], NO_LABEL)


def grid(rows, labels=None, gap=2, frame=4):
    """Images in rows, one below the other, as a picture (H', W', 3) uint8.

    Arguments:
        rows: a list of batches of equal length, each a tensor (N, C, H, W) with C = 1
            or 3, on the CPU, uint8 or floats in [0, 1]
        labels: a list of (N,) int. Each image then has a frame in its class's colour.
        gap, frame: their widths in pixels
    """
    lines = []
    for n, batch in enumerate(rows):
        images = resize(to_rgb(batch))
        if labels is not None:
            images = add_frames(images, colours(labels[n]), frame)
        images = np.pad(images, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=128)
        lines.append(np.concatenate(list(images), axis=1))
    return np.concatenate(lines)[:-gap, :-gap]


def to_rgb(batch):
    """A tensor (N, C, H, W), uint8 or floats in [0, 1] -> an array (N, H, W, 3) uint8."""
    if batch.dtype.is_floating_point:
        batch = (batch.clamp(0, 1) * 255).round().byte()
    images = np.asarray(batch).transpose(0, 2, 3, 1)
    if images.shape[3] == 1:
        images = np.repeat(images, 3, axis=3)
    return images


def resize(images):
    """Enlarge or shrink (N, H, W, 3) by a whole factor, for the eye.

    The longer side becomes at most TILE pixels for small images, and TILE to 2 TILE - 1
    for large ones.
    """
    longer = max(images.shape[1:3])
    if longer >= 2 * TILE:
        return shrink(images, longer // TILE)
    factor = max(1, TILE // longer)
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def add_frames(images, frame_colours, frame):
    """Put a frame around each image: (N, H, W, 3), (N, 3) -> (N, H + 2f, W + 2f, 3)."""
    N, H, W, _ = images.shape
    framed = np.empty((N, H + 2 * frame, W + 2 * frame, 3), np.uint8)
    framed[:] = frame_colours[:, None, None]
    framed[:, frame:-frame, frame:-frame] = images
    return framed


def scatter(points, labels, size=480):
    """A map of points (N, 2), each a dot in the colour of its label (N,).

    Returns a picture (size, size, 3) uint8. The first number goes to the right, the
    second one down. The outermost hundredth of the points on each side lies at the edge.
    """
    canvas = np.full((size, size, 3), 250, np.uint8)
    low, high = np.percentile(points, [1, 99], axis=0)
    fraction = ((points - low) / (high - low + 1e-9)).clip(0, 1)
    centres = (fraction * (size - 12) + 6).astype(int)
    for (x, y), colour in zip(centres, colours(labels)):
        canvas[y - 2:y + 3, x - 2:x + 3] = colour
    return canvas


# ---------------------------------------------------------------- SVG curves

def short(value):
    """A positive number in at most six characters, which is the room beside an axis.

    >>> short(4.2221), short(1277487), short(0.1084), short(0.08296), short(0.00012345)
    ('4.222', '1277k', '0.1084', '0.083', '1e-04')
    """
    if abs(value) >= 10000:
        return f"{value / 1000:.0f}k"
    for digits in (f"{value:.4g}", f"{value:.2g}"):
        if len(digits) <= 6:
            return digits
    return f"{value:.0e}"


def element(name, content="", **attributes):
    """An SVG element. In the names of the attributes, _ stands for -.

    >>> element("text", 70, x=44, y=1 / 3, text_anchor="end")
    '<text x="44" y="0.3" text-anchor="end">70</text>'
    """
    shown = ""
    for key, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.1f}"
        shown += f' {key.replace("_", "-")}="{value}"'
    return f"<{name}{shown}>{content}</{name}>"


def polyline(points, colour, stroke_width):
    """A line through the points, a list of (x, y)."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element(
        "polyline", points=places, fill="none", stroke=colour, stroke_width=stroke_width
    )


def curve(steps, values, width=300, height=140):
    """One curve as SVG, with its smallest and largest value beside the axis.

    steps, values: lists of numbers, of equal length.
    """
    low, high = min(values), max(values)
    left, right, top, bottom = 45, width - 5, 10, height - 20
    span = (high - low) or 1
    last = max(steps) or 1
    points = []
    for step, value in zip(steps, values):
        x = left + (right - left) * step / last
        y = top + (bottom - top) * (high - value) / span
        points.append((x, y))
    x, y = points[-1]
    axes = f"M{left} {top}V{bottom}H{right}"
    parts = [
        element("path", d=axes, fill="none", stroke="var(--line)"),
        polyline(points, "var(--curve)", 1.8),
        element("circle", cx=x, cy=y, r=3, fill="var(--curve)"),
        element("text", short(high), x=left - 4, y=top + 4, text_anchor="end"),
        element("text", short(low), x=left - 4, y=bottom, text_anchor="end"),
        element("text", f"step {last:,}", x=right, y=height - 5, text_anchor="end"),
    ]
    return element("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img")


# ---------------------------------------------------------------- the figure

METHOD_COLOURS = {
    "n-grams": "#9aa5b1",
    "pixels": "#9aa5b1",
    "pixel PCA": "#c2a878",
    "untrained": "#b78fc9",
    "from scratch": "#d9822b",
    "linear probe": "#1f6feb",
    "self-trained": "#d1477a",
    "fine-tuned": "#1a7f37",
    "all together": "#0b8f8f",
}
OTHER_METHOD = "#69788a"


def label_figure(rows, width=640, height=300, **attributes):
    """Measurements as SVG: a line for each method, test accuracy over labels a class.

    A bar at each point reaches one standard deviation up and down. An SVG that is to be
    a separate file needs xmlns among the attributes. rows: of one condition, see
    accuracies.py.
    """
    cells = by_cell(rows)
    labels, methods = labels_and_methods(cells)
    left, right, top, bottom = 50, width - 160, 20, height - 40

    points_of = {method: [] for method in methods}    # [(row, mean, std), ...]
    lowest, highest = [], []
    for n, label in enumerate(labels):
        for method in methods:
            if (label, method) not in cells:
                continue
            mean, std = mean_and_std(accuracies_of(cells[label, method]))
            std = std or 0              # the bar of a single draw has no length
            points_of[method].append((n, mean, std))
            lowest.append(mean - std)
            highest.append(mean + std)
    high = min(100, math.ceil(max(highest) / 10) * 10)
    low = min(high - 10, math.floor(min(lowest) / 10) * 10)

    def x_of(n):
        return left + (right - left) * (n + 0.5) / len(labels)

    def y_of(accuracy):
        return top + (bottom - top) * (high - min(accuracy, high)) / (high - low)

    middle = x_of((len(labels) - 1) / 2)
    parts = [
        element("text", "test accuracy, %", x=left, y=12),
        element("text", "labels a class", x=middle, y=height - 5, text_anchor="middle"),
    ]
    for accuracy in range(low, high + 1, 10):
        y = y_of(accuracy)
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, stroke="#8884"))
        parts.append(element("text", accuracy, x=left - 6, y=y + 4, text_anchor="end"))
    for n, label in enumerate(labels):
        label = html.escape(label)
        parts.append(element("text", label, x=x_of(n), y=height - 22, text_anchor="middle"))

    def last_mean(method):
        return points_of[method][-1][1]

    # The names stand at the right ends of the lines, from above, and not on each other.
    name_y = -math.inf
    for method in sorted(methods, key=last_mean, reverse=True):
        colour = METHOD_COLOURS.get(method, OTHER_METHOD)
        points = [(x_of(n), y_of(mean)) for n, mean, _ in points_of[method]]
        parts.append(polyline(points, colour, 2))
        for n, mean, std in points_of[method]:
            x, ends = x_of(n), dict(y1=y_of(mean - std), y2=y_of(mean + std))
            parts.append(element("line", x1=x, x2=x, **ends, stroke=colour))
            parts.append(element("circle", cx=x, cy=y_of(mean), r=3, fill=colour))
        name = f"{html.escape(method)} {last_mean(method):.1f}"
        name_y = max(name_y + 15, y_of(last_mean(method)) + 4)
        style = f"fill:{colour}"
        parts.append(element("text", name, x=right + 10, y=name_y, style=style))
    return element(
        "svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img",
        font_family="sans-serif", font_size=12, fill=OTHER_METHOD, **attributes,
    )


# ---------------------------------------------------------------- the page

# For each file of measurements its title.
RESULTS = {"finetune.csv": "Results", "probe.csv": "Linear probe"}

# For each picture of the folder its title and its caption, in the order of the page.
PICTURES = {
    "views.png": (
        "Views",
        "Held-out images, each in two random views, as the model sees its training images. "
        "Each column is one image.",
    ),
    "reconstructions.png": (
        "Reconstructions",
        "Held-out images above, and what the decoder rebuilds below. If the encoder was "
        "given something else, such as images with patches cut out, that is the row between. "
        "With --targets normalized, the patches that the encoder saw are those of the original, "
        "and so are brightness and contrast of the others.",
    ),
    "walks.png": (
        "From one image to another",
        "Each row goes from the code of one image to the code of another in equal steps, "
        "and shows what the decoder makes of each step. Only the two ends are real codes. With "
        "--targets normalized, all patches have the same brightness and contrast.",
    ),
    "neighbours.png": (
        "Nearest neighbours",
        "The first column shows held-out images. Beside each are the training images that "
        "are nearest to it in feature space. The colour of a frame is the class; light grey "
        "means that there is no label.",
    ),
    "map.png": (
        "Map of the features",
        "The features of held-out images, reduced to their first two principal components. "
        "The colours are those of the frames above.",
    ),
}

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2733; --soft: #69788a; --line: #d5dce4; --paper: #fff;
  --curve: #1f6feb; --good: #1a7f37; --bad: #b35900;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4eaf1; --soft: #93a1b1; --line: #354050; --paper: #10161e;
    --curve: #6cb0ff; --good: #56d364; --bad: #f0a050;
  }
}
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p, small { color: var(--soft); overflow-wrap: anywhere }
code { font: .85rem ui-monospace, monospace; overflow-wrap: anywhere }
.curves {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
}
figure { margin: 0 }
figcaption { font-size: .85rem; color: var(--soft) }
figcaption b { color: var(--ink) }
img { image-rendering: pixelated; max-width: 100%; height: auto }
svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th {
  padding: .3rem .8rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap;
}
blockquote {
  margin: 0 0 1rem; padding-left: .8rem; border-left: 3px solid var(--line);
  overflow-wrap: anywhere;
}
.good { color: var(--good); font-weight: 600 }
.bad { color: var(--bad) }
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<body>
{body}
</body>
</html>
"""


def write_page(folder):
    """Write folder/report.html from the files in the folder.

    A file that does not exist is left out. For a file that cannot be read, the page says
    what to do.
    """
    folder = Path(folder)
    sections = [
        ("config.json", origin),
        *((name, results) for name in RESULTS),
        ("sentences.json", sentences),
        *((name, picture) for name in PICTURES),
        ("metrics.csv", curves),
    ]
    title = html.escape(folder.resolve().name)
    body = [f"<h1>{title}</h1>"]
    for name, section in sections:
        path = folder / name
        if not path.exists():
            continue
        try:
            body.append(section(path))
        except OSError as error:
            body.append(
                f"<p>{name} cannot be read ({error.strerror}): make it readable, or move it "
                f"away.</p>"
            )
        except (
            ValueError, TypeError, LookupError, AttributeError, RecursionError,
            ArithmeticError, csv.Error,
        ):
            body.append(
                f"<p>{name} cannot be read: it is damaged, or another version of minissl "
                f"wrote it. Correct it, or move it away.</p>"
            )
    page = PAGE.format(title=title, style=STYLE, body="\n".join(body))
    write_atomically(folder / "report.html", page.encode("utf-8", "replace"))


def origin(path):
    """config.json: the command, the versions and the settings of the run."""
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("command", "started", "python", "torch")
    command, started, python, torch = (html.escape(str(config[name])) for name in names)
    settings = []
    for name, value in config["settings"].items():
        settings.append(f"<code>{html.escape(f'{name}={value}')}</code>")
    return (
        f"<p><code>{command}</code><br>"
        f"last started {started}, Python {python}, torch {torch}</p>\n"
        f"<details><summary>Settings</summary><p>{' '.join(settings)}</p></details>"
    )


def results(path):
    """finetune.csv or probe.csv: a table and a figure for each condition."""
    rows_of = by_condition(read_csv(path))
    parts = [f"<h2>{RESULTS[path.name]}</h2>"]
    for condition, rows in rows_of.items():
        head, *lines = table_of(rows, mean_and_spread_of)
        table = [table_row("th", head)]
        table += [table_row("td", line) for line in lines]
        sentence = f"{describe_draws(rows)}: {describe_condition(condition, list(rows_of))}."
        parts += [
            f"<p>{html.escape(sentence)}</p>",
            f'<div class="wide"><table>{"".join(table)}</table></div>',
            f"<figure>{label_figure(rows)}</figure>",
        ]
    return "\n".join(parts)


def table_row(tag, cells):
    cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{cells}</tr>"


def describe_draws(rows):
    """The first part of the sentence above a table: over what mean and deviation are taken."""
    draws, trainings = [], []
    for (label, _), cell in by_cell(rows).items():
        counts = trainings if label == "all" else draws
        counts.append(len(cell))
    start = "Test accuracy in %, mean ± standard deviation over"
    if not draws:
        return f"{start} {from_to(trainings, 'training')} with all labels"
    sentence = f"{start} {from_to(draws, 'draw')} of labels"
    if trainings:
        sentence += f' (row "all": over {from_to(trainings, "training")})'
    return sentence


def from_to(counts, noun):
    """
    >>> from_to([1, 2, 2], "draw"), from_to([1, 1], "draw")
    ('1 to 2 draws', '1 draw')
    """
    fewest, most = min(counts), max(counts)
    up_to = count_of(most, noun)
    return up_to if fewest == most else f"{fewest} to {up_to}"


def describe_condition(condition, conditions):
    """The second part of the sentence: on which data, after which step.

    conditions: all of the file, the newest at the end. If the data has had other content
    since, the sentence says so.
    """
    sentence = condition.data
    newest = of_same_data(conditions, condition)[-1]
    if condition.checksum != newest.checksum:
        sentence += f" of other content (checksum {condition.checksum})"
    if condition.mirrored == "no":
        sentence += ", without mirror images"
    sentence += f", after {int(condition.step):,} steps of pretraining"
    if condition.limit != "0":
        limit = condition.limit
        sentence += f". This is a trial with --limit {limit}: it used a part of the data"
    return sentence


def sentences(path):
    """sentences.json: [[passage, original tokens, guesses], ...] from the last preview."""
    passages = json.loads(path.read_text(encoding="utf-8"))
    if not passages:
        return ""
    parts = [
        "<h2>Masked words, filled in</h2>",
        "<p>Held-out passages, as the model reads them: a few tokens are replaced at random. A "
        "green token was hidden, and the model guessed it. An orange token is a wrong guess; the "
        "original token follows, struck through.</p>",
    ]
    for passage, wanted, got in passages:
        parts.append(filled_in(passage, wanted, got))
    return "\n".join(parts)


def filled_in(passage, wanted, got):
    """A passage as HTML, with the model's guess in place of each [MASK].

    wanted, got: the original tokens and the guesses. A wrong guess is followed by the
    original token.
    """
    first, *others = html.escape(passage).split("[MASK]")
    text = first
    for piece, original, guess in zip(others, wanted, got):
        shown = html.escape(guess.strip() or guess)
        if guess == original:
            text += f' <span class="good">{shown}</span>'
        else:
            original = html.escape(original.strip() or original)
            text += f' <span class="bad">{shown}</span> <s>{original}</s>'
        text += piece
    return f"<blockquote>{text}</blockquote>"


def picture(path):
    """One of PICTURES, with its bytes in the page."""
    title, caption = PICTURES[path.name]
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    return f'<h2>{title}</h2>\n<p>{caption}</p>\n<div class="wide">{image}</div>'


def curves(path):
    """metrics.csv: a curve for each of its columns."""
    rows = read_csv(path)
    figures = []
    for name in rows[0]:
        measured = [row for row in rows if row[name] not in ("", None)]
        if name in ("step", "seconds") or not measured:
            continue
        steps = [int(row["step"]) for row in measured]
        values = [float(row[name]) for row in measured]
        caption = f"<b>{html.escape(name.replace('_', ' '))}</b> now {short(values[-1])}"
        drawn = curve(steps, values)
        figures.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
    return f'<h2>Learning curves</h2>\n<div class="curves">{"".join(figures)}</div>'
