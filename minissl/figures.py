"""Pictures without a plotting package: PNGs by zlib, curves as inline SVG.

    write_png(path, grid([batch, batch]))     rows of images
    write_png(path, scatter(points, labels))  features in two dimensions
    curve(steps, values)                      one column of metrics.csv
    label_figure("runs/x/finetune.csv")       what a run is worth, over labels a class
"""

import html
import math
import struct
import zlib

import numpy as np

from minissl.files import read_csv, write_atomically


# ---------------------------------------------------------------- pictures

def write_png(path, image):
    """image (H, W, 3) uint8, a NumPy array. A PNG is a signature and three chunks; zlib does the rest."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)     # 0: no row filter
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),                     # 8 bits, RGB
              (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    write_atomically(path, b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks))


COLOURS = np.uint8([[31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75],
                    [227, 119, 194], [20, 20, 20], [188, 189, 34], [23, 190, 207]])                  # one a class


def colours(labels):
    """labels (N,) int -> (N, 3) uint8; -1, none, is light grey, and the eleventh class looks like the first."""
    return np.where(labels[:, None] >= 0, COLOURS[labels % len(COLOURS)], np.uint8(200))


def grid(rows, labels=None, gap=2, frame=4):
    """rows: a list of equally long image batches, each a tensor (N, C, H, W), uint8 or floats in [0, 1], C 1 or 3 ->
    (H', W', 3) uint8: a row a batch, small images enlarged to about 64 pixels. labels, a list of (N,) int, frames each
    image in the colour of its class."""
    lines = []
    for n, batch in enumerate(rows):
        pixels = np.asarray((batch.clamp(0, 1) * 255).round().byte() if batch.dtype.is_floating_point else batch)
        pixels = np.repeat(pixels, 3 // pixels.shape[1], axis=1).transpose(0, 2, 3, 1)              # (N, H, W, 3)
        times = max(1, 64 // max(pixels.shape[1:3]))
        pixels = pixels.repeat(times, axis=1).repeat(times, axis=2)
        if labels is not None:
            H, W = pixels.shape[1:3]
            framed = colours(labels[n])[:, None, None].repeat(H + 2 * frame, axis=1).repeat(W + 2 * frame, axis=2)
            framed[:, frame:-frame, frame:-frame] = pixels
            pixels = framed
        pixels = np.pad(pixels, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=128)
        lines.append(np.concatenate(list(pixels), axis=1))
    return np.concatenate(lines)[:-gap, :-gap]


def scatter(points, labels, size=480):
    """points (N, 2), labels (N,) int -> (size, size, 3) uint8: a dot each, in the colour of its class."""
    canvas = np.full((size, size, 3), 250, np.uint8)
    low, high = np.percentile(points, [1, 99], axis=0)
    place = ((points - low) / (high - low + 1e-9)).clip(0, 1) * (size - 12) + 6
    for (x, y), colour in zip(place.astype(int), colours(labels)):
        canvas[y - 2:y + 3, x - 2:x + 3] = colour
    return canvas


# ---------------------------------------------------------------- curves and tables

def short(value):
    """At most six characters for an axis, or it is cut off.

    >>> short(4.2221), short(1277487), short(0.1084), short(0.08296)
    ('4.222', '1277k', '0.1084', '0.083')
    """
    digits = f"{value / 1000:.0f}k" if abs(value) >= 10000 else f"{value:.4g}"
    return digits if len(digits) <= 6 else f"{value:.2g}"


def element(name, content="", **attributes):
    """An SVG element; in the attributes' names _ stands for -.

    >>> element("text", 70, x=44, y=1 / 3, text_anchor="end")
    '<text x="44" y="0.3" text-anchor="end">70</text>'
    """
    shown = {key.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
             for key, value in attributes.items()}
    return f"<{name}" + "".join(f' {key}="{value}"' for key, value in shown.items()) + f">{content}</{name}>"


def curve(steps, values, width=300, height=140):
    """One curve as SVG: equal-length lists of numbers -> str, with the least and greatest value at the axis."""
    low, high = min(values), max(values)
    span, last = high - low or 1, max(steps) or 1
    points = [(45 + (width - 50) * step / last, 10 + (height - 30) * (high - value) / span)
              for step, value in zip(steps, values)]
    return element("svg", "".join([
        element("path", d=f"M45 10V{height - 20}H{width - 5}", fill="none", stroke="var(--line)"),
        element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), fill="none",
                stroke="var(--curve)", stroke_width=1.8),
        element("circle", cx=points[-1][0], cy=points[-1][1], r=3, fill="var(--curve)"),
        element("text", short(high), x=41, y=14, text_anchor="end"),
        element("text", short(low), x=41, y=height - 20, text_anchor="end"),
        element("text", f"step {last:,}", x=width - 5, y=height - 5, text_anchor="end"),
    ]), viewBox=f"0 0 {width} {height}", role="img")


def label_table(path):
    """finetune.csv -> rows of strings: labels a class, then mean ± deviation of each method."""
    cells = {}
    for row in read_csv(path):
        cells.setdefault((row["labels_a_class"], row["method"]), []).append(float(row["test_accuracy"]))
    labels, methods = (list(dict.fromkeys(names)) for names in zip(*cells))
    return [["labels a class", *methods]] + [
        [label, *(f"{np.mean(cells[label, m]):.1f} ± {np.std(cells[label, m], ddof=len(cells[label, m]) > 1):.1f}"
                  for m in methods)]
        for label in labels]


METHOD_COLOURS = {"tf-idf": "#9aa5b1", "pixels": "#9aa5b1", "pixel PCA": "#c2a878", "untrained": "#b78fc9",
                  "from scratch": "#d9822b", "linear probe": "#1f6feb", "fine-tuned": "#1a7f37"}


def label_figure(path, width=640, height=300, **attributes):
    """finetune.csv -> SVG: test accuracy over labels a class, a line a method, its spread as a bar. An SVG that is to
    be a file of its own needs the attribute xmlns."""
    (_, *methods), *lines = label_table(path)
    values = [[tuple(map(float, cell.split(" ± "))) for cell in line[1:]]
              for line in lines]                                                # [labels][method]: (mean, spread)
    high = min(100, math.ceil(max(mean + spread for line in values for mean, spread in line) / 10) * 10)
    low = min(high - 10, math.floor(min(mean - spread for line in values for mean, spread in line) / 10) * 10)
    x = lambda n: 50 + (width - 210) * (n + 0.5) / len(lines)
    y = lambda value: 20 + (height - 60) * (high - min(value, high)) / (high - low)
    parts = [element("text", "test accuracy, %", x=50, y=12),
             element("text", "labels a class", x=x((len(lines) - 1) / 2), y=height - 5, text_anchor="middle")]
    for value in range(low, high + 1, 10):
        parts += [element("line", x1=50, x2=width - 160, y1=y(value), y2=y(value), stroke="#8884"),
                  element("text", value, x=44, y=y(value) + 4, text_anchor="end")]
    for n, line in enumerate(lines):
        parts.append(element("text", html.escape(line[0]), x=x(n), y=height - 22, text_anchor="middle"))
    name_y = -math.inf
    for m in sorted(range(len(methods)), key=lambda m: -values[-1][m][0]):      # by their right ends, from above
        colour, points = METHOD_COLOURS.get(methods[m], "#69788a"), [(x(n), *line[m]) for n, line in enumerate(values)]
        parts.append(element("polyline", points=" ".join(f"{px:.1f},{y(mean):.1f}" for px, mean, _ in points),
                             fill="none", stroke=colour, stroke_width=2))
        for px, mean, spread in points:
            parts += [element("line", x1=px, x2=px, y1=y(mean - spread), y2=y(mean + spread), stroke=colour),
                      element("circle", cx=px, cy=y(mean), r=3, fill=colour)]
        name_y = max(name_y + 15, y(points[-1][1]) + 4)                         # names must not cover each other
        parts.append(element("text", f"{html.escape(methods[m])} {points[-1][1]:.1f}", x=width - 150, y=name_y,
                             style=f"fill:{colour}"))
    return element("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img", font_family="sans-serif",
                   font_size=12, fill="#69788a", **attributes)
