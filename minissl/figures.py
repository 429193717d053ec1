"""Pictures without a plotting package: PNGs by zlib, curves as inline SVG.

    write_png(path, grid([batch, batch]))     rows of images
    write_png(path, scatter(points, labels))  features in two dimensions
    curve(steps, values)                      one column of metrics.csv
    label_figure("runs/x/finetune.csv")       what a run is worth, over labels a class
"""

import csv
import html
import math
import struct
import zlib

import numpy as np

from minissl.files import write_atomically


# ---------------------------------------------------------------- pictures

def write_png(path, image):
    """image (H, W, 3) uint8, a NumPy array. A PNG is a signature and three chunks; zlib does the rest."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)     # 0: no row filter
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),                     # 8 bits, RGB
              (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    write_atomically(path, b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks))


def grid(rows, gap=2):
    """rows: a list of equally long image batches, each a tensor (N, C, H, W), uint8 or floats in [0, 1], C 1 or 3 ->
    (H', W', 3) uint8: a row a batch, small images enlarged to about 64 pixels."""
    lines = []
    for batch in rows:
        pixels = np.asarray((batch.clamp(0, 1) * 255).round().byte() if batch.dtype.is_floating_point else batch)
        pixels = np.repeat(pixels, 3 // pixels.shape[1], axis=1).transpose(0, 2, 3, 1)              # (N, H, W, 3)
        times = max(1, 64 // max(pixels.shape[1:3]))
        pixels = pixels.repeat(times, axis=1).repeat(times, axis=2)
        pixels = np.pad(pixels, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=128)
        lines.append(np.concatenate(list(pixels), axis=1))
    return np.concatenate(lines)[:-gap, :-gap]


COLOURS = np.uint8([[31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75],
                    [227, 119, 194], [127, 127, 127], [188, 189, 34], [23, 190, 207]])               # one a class


def scatter(points, labels, size=480):
    """points (N, 2), labels (N,) int -> (size, size, 3) uint8: a dot each, coloured by label."""
    canvas = np.full((size, size, 3), 250, np.uint8)
    low, high = np.percentile(points, [1, 99], axis=0)
    place = ((points - low) / (high - low + 1e-9)).clip(0, 1) * (size - 12) + 6
    for (x, y), label in zip(place.astype(int), labels):
        canvas[y - 2:y + 3, x - 2:x + 3] = COLOURS[label % len(COLOURS)]
    return canvas


# ---------------------------------------------------------------- curves and tables

def short(value):
    """At most six characters for an axis, or it is cut off.

    >>> short(4.2221), short(1277487), short(0.1084), short(0.08296)
    ('4.222', '1277k', '0.1084', '0.083')
    """
    digits = f"{value / 1000:.0f}k" if abs(value) >= 10000 else f"{value:.4g}"
    return digits if len(digits) <= 6 else f"{value:.2g}"


def curve(steps, values, width=300, height=140):
    """One curve as SVG: equal-length lists of numbers -> str, with the least and greatest value at the axis."""
    low, high = min(values), max(values)
    span, last = high - low or 1, max(steps) or 1
    points = " ".join(f"{45 + (width - 50) * step / last:.1f},{10 + (height - 30) * (high - value) / span:.1f}"
                      for step, value in zip(steps, values))
    dot = points.split()[-1].split(",")
    return (f'<svg viewBox="0 0 {width} {height}" role="img">'
            f'<path d="M45 10V{height - 20}H{width - 5}" fill="none" stroke="var(--line)"/>'
            f'<polyline points="{points}" fill="none" stroke="var(--curve)" stroke-width="1.8"/>'
            f'<circle cx="{dot[0]}" cy="{dot[1]}" r="3" fill="var(--curve)"/>'
            f'<text x="41" y="14" text-anchor="end">{short(high)}</text>'
            f'<text x="41" y="{height - 20}" text-anchor="end">{short(low)}</text>'
            f'<text x="{width - 5}" y="{height - 5}" text-anchor="end">step {last:,}</text></svg>')


def label_table(path):
    """finetune.csv -> rows of strings: labels a class, then mean ± deviation of each method."""
    cells = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cells.setdefault((row["labels_a_class"], row["method"]), []).append(float(row["test_accuracy"]))
    labels, methods = (list(dict.fromkeys(names)) for names in zip(*cells))
    return [["labels a class", *methods]] + [
        [label, *(f"{np.mean(cells[label, m]):.1f} ± {np.std(cells[label, m], ddof=len(cells[label, m]) > 1):.1f}"
                  for m in methods)]
        for label in labels]


METHOD_COLOURS = {"tf-idf": "#9aa5b1", "pixels": "#9aa5b1", "pixel PCA": "#c2a878", "untrained": "#b78fc9", "from scratch": "#d9822b",
                  "linear probe": "#1f6feb", "fine-tuned": "#1a7f37"}


def label_figure(path, width=640, height=300):
    """finetune.csv -> SVG: test accuracy over labels a class, a line a method, its spread as a bar."""
    head, *lines = label_table(path)
    values = [[tuple(map(float, cell.split(" ± "))) for cell in line[1:]] for line in lines]                  # [label][method]
    high = math.ceil(max(mean + spread for line in values for mean, spread in line) / 10) * 10
    low = min(high - 10, math.floor(min(mean - spread for line in values for mean, spread in line) / 10) * 10)
    x = lambda n: 50 + (width - 210) * (n + 0.5) / len(lines)
    y = lambda value: 20 + (height - 60) * (high - value) / (high - low)
    parts = [f'<line x1="50" x2="{width - 160}" y1="{y(v):.0f}" y2="{y(v):.0f}" stroke="#8884"/><text x="44" y="{y(v) + 4:.0f}" '
             f'text-anchor="end">{v}</text>' for v in range(low, high + 1, 10)]
    parts += [f'<text x="{x(n):.0f}" y="{height - 22}" text-anchor="middle">{html.escape(line[0])}</text>' for n, line in enumerate(lines)]
    parts.append(f'<text x="{x((len(lines) - 1) / 2):.0f}" y="{height - 5}" text-anchor="middle">labels a class</text>'
                 '<text x="50" y="12">test accuracy, %</text>')
    ends, place = sorted(range(len(head) - 1), key=lambda m: -values[-1][m][0]), -1e9
    for m in ends:
        colour, points = METHOD_COLOURS.get(head[m + 1], "#69788a"), [(x(n), *line[m]) for n, line in enumerate(values)]
        place = max(place + 15, y(points[-1][1]) + 4)                          # names must not cover each other
        parts.append(f'<polyline points="{" ".join(f"{px:.1f},{y(mean):.1f}" for px, mean, _ in points)}" fill="none" stroke="{colour}" '
                     f'stroke-width="2"/>' + "".join(
                         f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(mean - spread):.1f}" y2="{y(mean + spread):.1f}" stroke="{colour}"/>'
                         f'<circle cx="{px:.1f}" cy="{y(mean):.1f}" r="3" fill="{colour}"/>' for px, mean, spread in points)
                     + f'<text x="{width - 150}" y="{place:.0f}" style="fill:{colour}">{html.escape(head[m + 1])} {points[-1][1]:.1f}</text>')
    return (f'<svg viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" font-size="12" '
            f'fill="#69788a">{"".join(parts)}</svg>')
