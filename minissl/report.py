"""What people look at: a run's folder as one page that any browser opens without a server.

`write_page(folder)` reads what lies in the folder (config.json, metrics.csv, sentences.json, the pictures,
finetune.csv) and writes report.html beside it, self-contained: curves are inline SVG, no script, no request to
anywhere. It is rewritten at each evaluation; what is not there yet is left out.
"""

import base64
import csv
import html
import json
from pathlib import Path

from minissl.figures import curve, label_figure, label_table, short
from minissl.files import read_csv, write_atomically

PICTURES = {            # file name -> what it shows
    "views.png": "One batch as the model sees it: a column an image, its views one below the other.",
    "reconstructions.png": "Held-out images, what the encoder was given if that differs, what the decoder rebuilt.",
    "walks.png": "What the decoder makes of the way from one image's code to another's: the ends are real codes.",
    "neighbours.png": "First column: held-out images. Beside each the training images nearest to it in feature space. "
                      "A frame's colour is the class; light grey: no label.",
    "map.png": "Held-out features, their first two principal components, in the colours of those frames.",
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
img { image-rendering: pixelated; max-width: 100%; height: auto }
svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
blockquote { margin: 0 0 1rem; padding-left: .8rem; border-left: 3px solid var(--line); overflow-wrap: anywhere }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad) }
"""


def filled_in(passage, wanted, got):
    """A masked passage with, for each [MASK], what the model puts there and, where it differs, what stood there."""
    pieces = html.escape(passage).split("[MASK]")
    text = pieces[0]
    for piece, w, g in zip(pieces[1:], wanted, got):
        same = html.escape(g.strip() or g)
        text += (f' <span class="good">{same}</span>' if w == g else
                 f' <span class="bad">{same}</span> <s>{html.escape(w.strip() or w)}</s>') + piece
    return f"<blockquote>{text}</blockquote>"


def write_page(folder):
    """Write folder/report.html from what lies in the folder. A file that is damaged is said to be, on the page."""
    folder, title = Path(folder), html.escape(Path(folder).resolve().name)
    body = [f"<h1>{title}</h1>"]
    for name, part in [("config.json", origin), ("finetune.csv", worth), ("sentences.json", sentences),
                       *((name, picture) for name in PICTURES), ("metrics.csv", curves)]:
        try:
            body.append(part(folder / name) if (folder / name).exists() else "")
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error):
            body.append(f"<p>{name} cannot be read.</p>")
    page = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{title}</title><style>{STYLE}</style>'
            f'<body>{"".join(body)}</body></html>\n')
    write_atomically(folder / "report.html", page.encode("utf-8", "replace"))


def origin(path):
    """config.json -> who made the run, with what and with which settings."""
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = " ".join(f"<code>{html.escape(f'{k}={v}')}</code>" for k, v in found["settings"].items())
    return "<p><code>{}</code><br>last started {}, Python {}, torch {}</p>".format(
        *(html.escape(str(found[name])) for name in ("command", "started", "python", "torch"))) + (
        f"<details><summary>Settings</summary><p>{settings}</p></details>")


def worth(path):
    """finetune.csv -> the table."""
    head, *lines = label_table(path)
    first = read_csv(path)[0]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return ("<h2>What it is worth</h2><p>Test accuracy in %, mean ± standard deviation over draws of labels: "
            f"{html.escape(first['data'])}, after {int(first['step']):,} steps of pretraining.</p>"
            f'<div class="wide"><table><tr>{"".join(f"<th>{html.escape(c)}</th>" for c in head)}</tr>'
            f'{cells}</table></div>'
            f"<figure>{label_figure(path)}</figure>")


def sentences(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    about = ("<h2>Filling in held-out text</h2><p>Of the tokens that were to be guessed, the model's guess; "
             "where it differs, what stood there is struck through.</p>")
    return about * bool(found) + "".join(filled_in(*s) for s in found)


def picture(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<h2>{html.escape(path.stem.capitalize())}</h2><p>{html.escape(PICTURES[path.name])}</p><div class="wide">'
            f'<img alt="{html.escape(path.name)}" src="data:image/png;base64,{data}"></div>')


def curves(path):
    """metrics.csv -> a curve for each of its columns."""
    rows, figures = read_csv(path), []
    for name in rows[0]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name] not in ("", None)]
        if name not in ("step", "seconds") and points:
            figures.append(f"<figure>{curve(*zip(*points))}<figcaption><b>{html.escape(name.replace('_', ' '))}</b> "
                           f"now {short(points[-1][1])}</figcaption></figure>")
    return f'<h2>Learning</h2><div class="curves">{"".join(figures)}</div>'
