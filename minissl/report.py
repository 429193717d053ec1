"""What people look at: a run's folder as one page that any browser opens without a server.

`write_page(folder)` reads what lies in the folder (config.json, metrics.csv, sentences.json, the pictures,
finetune.csv) and writes report.html beside it, self-contained: curves are inline SVG, no script, no request to
anywhere. It is rewritten at each evaluation; what is not there yet is left out.
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

from minissl.files import write_atomically

PICTURES = {            # file name -> what it shows
    "views.png": "One batch as the model sees it: a column an image, its views one below the other.",
    "reconstructions.png": "Held-out images, what the encoder was given where that differs, and what the decoder rebuilt.",
    "walks.png": "What the decoder makes of the way from one image's code to another's: the ends are real codes.",
    "neighbours.png": "The first column: held-out images. Beside each the training images nearest to it in feature space.",
    "map.png": "Features of held-out images, their first two principal components, coloured by class where there are labels.",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #69788a; --line: #d5dce4; --paper: #fff;
        --curve: #1f6feb; --good: #1a7f37; --bad: #b35900 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf1; --soft: #93a1b1; --line: #354050; --paper: #10161e;
                                              --curve: #6cb0ff; --good: #56d364; --bad: #f0a050 } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p, small { color: var(--soft) }
code { font: .85rem ui-monospace, monospace; overflow-wrap: anywhere }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-size: .85rem; color: var(--soft) } figcaption b { color: var(--ink) }
img { image-rendering: pixelated; max-width: 100%; height: auto } svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
blockquote { margin: 0 0 1rem; padding-left: .8rem; border-left: 3px solid var(--line); overflow-wrap: anywhere }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad) }
"""


# ---------------------------------------------------------------- pictures

def write_png(path, image):
    """image (H, W, 3) uint8, a NumPy array. A PNG is a signature and three chunks; zlib does the rest."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)     # 0: no row filter
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),                     # 8 bits, RGB
              (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    write_atomically(path, b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks))


def grid(rows, gap=2):
    """rows: a list of equally long image batches, each a tensor (N, C, H, W), uint8 or floats in [0, 1], C 1 or 3 ->
    (H', W', 3) uint8: a row a batch, small images enlarged to about 64 pixels."""
    lines = []
    for batch in rows:
        pixels = np.asarray(batch if batch.dtype.is_floating_point is False else (batch.clamp(0, 1) * 255).round().byte())
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
    """At most six characters for an axis.

    >>> short(4.2221), short(1277487), short(0.1084)
    ('4.222', '1277k', '0.1084')
    """
    return f"{value / 1000:.0f}k" if abs(value) >= 10000 else f"{value:.4g}"


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


def filled_in(passage, wanted, got):
    """A masked passage with, for each [MASK], what the model puts there and, where it differs, what stood there."""
    pieces = html.escape(passage).split("[MASK]")
    text = pieces[0]
    for piece, w, g in zip(pieces[1:], wanted, got):
        same = html.escape(g.strip() or g)
        text += (f' <span class="good">{same}</span>' if w == g else
                 f' <span class="bad">{same}</span> <s>{html.escape(w.strip() or w)}</s>') + piece
    return f"<blockquote>{text}</blockquote>"


def label_table(path):
    """finetune.csv -> rows of strings: labels a class, then mean ± deviation of each method."""
    cells, labels, methods = {}, [], []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["labels_a_class"], row["method"]
            labels += [key[0]] * (key[0] not in labels)
            methods += [key[1]] * (key[1] not in methods)
            cells.setdefault(key, []).append(float(row["test_accuracy"]))
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
                 f'<text x="50" y="12">test accuracy, %</text>')
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


def write_page(folder):
    """Write folder/report.html from what lies in the folder. A file that is damaged is said to be, on the page."""
    folder, body = Path(folder), [f"<h1>{html.escape(Path(folder).name)}</h1>"]
    for name, part in [("config.json", origin), ("finetune.csv", worth), ("sentences.json", sentences),
                       *((name, picture) for name in PICTURES), ("metrics.csv", curves), ("config.json", settings)]:
        try:
            body.append(part(folder / name) if (folder / name).exists() else "")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error):
            body.append(f"<p>{name} cannot be read.</p>")
    page = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{html.escape(folder.name)}</title><style>{STYLE}</style>'
            f'<body>{"".join(body)}</body></html>\n')
    write_atomically(folder / "report.html", page.encode("utf-8", "replace"))


def origin(path):
    """config.json -> who made the run, with what."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return "<p><code>{}</code><br>started {}, Python {}, torch {}</p>".format(
        *(html.escape(str(found[name])) for name in ("command", "started", "python", "torch")))


def settings(path):
    found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return "<h2>Settings</h2><p>" + " ".join(f"<code>{html.escape(f'{k}={v}')}</code>" for k, v in found.items()) + "</p>"


def worth(path):
    """finetune.csv -> the table."""
    head, *lines = label_table(path)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return ("<h2>What it is worth</h2><p>Test accuracy in %, mean ± standard deviation over draws of labels.</p>"
            f'<div class="wide"><table><tr>{"".join(f"<th>{html.escape(c)}</th>" for c in head)}</tr>{cells}</table></div>'
            f"<figure>{label_figure(path)}</figure>")


def sentences(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    return ("<h2>Filling in held-out text</h2><p>Of the tokens that were to be guessed, the model's guess; where it differs, "
            "what stood there is struck through.</p>" + "".join(filled_in(*s) for s in found))


def picture(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<h2>{html.escape(path.stem.capitalize())}</h2><p>{html.escape(PICTURES[path.name])}</p><div class="wide">'
            f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{data}"></div>')


def curves(path):
    """metrics.csv -> a curve for each of its columns."""
    with open(path, encoding="utf-8", newline="") as file:
        rows, figures = list(csv.DictReader(file)), []
    for name in rows[0]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name] not in ("", None)]
        if name not in ("step", "seconds") and len(points) > 1:
            figures.append(f"<figure>{curve(*zip(*points))}<figcaption><b>{html.escape(name.replace('_', ' '))}</b> "
                           f"now {short(points[-1][1])}</figcaption></figure>")
    return f'<h2>Learning</h2><div class="curves">{"".join(figures)}</div>'
