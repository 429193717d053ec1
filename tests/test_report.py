"""Pictures, curves, the table and the page: what they show, by reading them back."""

import html
import json
import re
import struct
import zlib

import numpy as np
import pytest
import torch

from minissl.training import accuracies, files, report


# ---------------------------------------------------------------- PNG pictures

def read_png(data):
    """The published format, read by hand."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(data):
        size, kind = struct.unpack(">I4s", data[position:position + 8])
        body = data[position + 8:position + 8 + size]
        check, = struct.unpack(">I", data[position + 8 + size:position + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        position += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 2) and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
    rows = rows.reshape(height, 1 + 3 * width)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


def random_image(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


def test_a_png_holds_the_pixels_it_was_given(tmp_path):
    image = random_image(5, 7)
    report.write_png(str(tmp_path / "a.png"), image)
    assert (read_png((tmp_path / "a.png").read_bytes()) == image).all()


def test_a_png_of_more_than_a_megabyte_is_halved(tmp_path):
    for size, width in ((500, 500), (700, 350), (1400, 350)):
        image = random_image(size, size + 1)
        report.write_png(tmp_path / "a.png", image)
        assert (tmp_path / "a.png").stat().st_size <= 1_000_000
        shown = read_png((tmp_path / "a.png").read_bytes())
        assert shown.shape[0] == width
    first_block = image[:4, :4].reshape(16, 3).mean(0)           # halved twice
    assert abs(shown[0, 0] - first_block).max() <= 1


def test_shrinking_averages_blocks_and_their_remains():
    image = np.arange(5 * 7).reshape(1, 5, 7, 1) * 3 % 251
    image = np.concatenate([image, image + 1, image + 2], axis=3).astype(np.uint8)
    shown = report.shrink(image, 3)
    assert shown.shape == (1, 2, 3, 3) and shown.dtype == np.uint8
    for y, x in np.ndindex(2, 3):
        block = image[0, 3 * y:3 * y + 3, 3 * x:3 * x + 3]
        assert abs(shown[0, y, x] - block.reshape(-1, 3).mean(0)).max() <= 0.5 + 1e-4


def test_a_grid_enlarges_small_images_and_shows_grey():
    rows = [torch.rand(4, 1, 8, 8), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)]
    picture = report.grid(rows, gap=2)
    assert picture.shape == (2 * 64 + 2, 4 * 64 + 3 * 2, 3) and picture.dtype == np.uint8
    pixel = picture[66 + 8 * 3, 66 + 8 * 5]                      # image 1 of row 1, (3, 5)
    assert (pixel == int(rows[1][1, 0, 3, 5])).all()


def test_a_grid_clips_floats_and_keeps_middle_sizes():
    row = torch.tensor([-0.3, 0.0, 0.5, 1.0, 1.3]).view(5, 1, 1, 1).expand(5, 1, 70, 70)
    picture = report.grid([row], gap=2)
    assert picture.shape == (70, 5 * 70 + 4 * 2, 3)
    assert picture[9, 9::72, 1].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("size, shown", [
    ((127, 127), (127, 127)), ((128, 128), (64, 64)), ((512, 512), (64, 64)),
    ((200, 100), (67, 34)), ((8, 5000), (1, 65)), ((191, 130), (96, 65)),
])
def test_a_grid_shrinks_large_images(size, shown):
    images = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    picture = report.grid([images], gap=2)
    H, W = shown
    assert picture.shape == (H, 3 * W + 2 * 2, 3) and max(H, W) < 128
    factor = max(size) // 64 if max(size) > 127 else 1
    block = images[1, :, :factor, :factor].double().mean((1, 2)).numpy()
    assert abs(picture[0, W + 2] - block).max() <= 0.5 + 1e-3


def test_a_frame_has_its_class_colour_and_covers_nothing():
    rows = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    labels = [np.array([1, 12, -1]), np.array([9, 0, 1])]
    picture = report.grid(list(rows), labels, gap=2, frame=4)
    assert picture.shape == (2 * 72 + 2, 3 * 72 + 2 * 2, 3)
    light_grey = np.uint8([200] * 3)
    wanted = [
        [report.COLOURS[1], report.COLOURS[2], light_grey],
        report.COLOURS[[9, 0, 1]],
    ]
    outside = np.ones((72, 72), bool)
    outside[4:-4, 4:-4] = False
    for y, x in np.ndindex(2, 3):
        image = picture[y * 74:, x * 74:][:72, :72]
        assert (image[4:-4:2, 4:-4:2] == rows[y, x].permute(1, 2, 0).numpy()).all()
        assert (image[outside] == wanted[y][x]).all()


def test_a_map_has_right_places_and_colours():
    points = np.array([[0, 0], [1, 0], [0, 1000]])
    picture = report.scatter(points, np.array([0, 1, 12]), size=480)
    for (x, y), label in {(6, 6): 0, (474, 6): 1, (6, 474): 2}.items():
        assert (picture[y, x] == report.COLOURS[label]).all()
    assert (picture[474, 474] == 250).all()


# ---------------------------------------------------------------- SVG curves

def test_a_curve_is_high_where_the_value_is():
    drawn = report.curve([0, 50, 100], [3.0, 1.0, 2.0], width=300, height=140)
    pairs = re.search(r'points="([^"]+)"', drawn)[1].split()
    places = [tuple(map(float, pair.split(","))) for pair in pairs]
    # From the axis to the right edge, with the greatest value on top.
    assert places == [(45, 10), (170, 120), (295, 65)]
    assert ">3<" in drawn and ">1<" in drawn and ">step 100<" in drawn


def test_a_curve_of_one_point_can_be_drawn():
    assert 'points="295.0,10.0"' in report.curve([5], [3.0])
    assert 'points="45.0,10.0"' in report.curve([0], [3.0])


# ---------------------------------------------------------------- the table

CONDITION = dict(data="x", limit=0, step=30, checksum="1", mirrored="yes")


def measurement(labels, method, accuracy, **changed):
    return dict(labels_a_class=labels, method=method, seed=0, test_accuracy=accuracy, seconds=1,
                **CONDITION | changed)


def test_the_table_shows_mean_and_sample_deviation():
    rows = [
        measurement("10", "pixels", 20), measurement("10", "pixels", 30),
        measurement("all", "pixels", 40), measurement("all", "fine-tuned", 60),
    ]
    assert accuracies.table_of(rows, accuracies.mean_and_spread_of) == [
        ["labels a class", "pixels", "fine-tuned"],
        ["10", "25.0 ± 7.1", ""], ["all", "40.0", "60.0"],
    ]


def heights_of_circles(figure):
    return [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', figure)]


def test_the_figure_is_as_high_as_the_accuracy():
    rows = [
        measurement("10", "pixels", 20), measurement("10", "pixels", 30),
        measurement("10", "fine-tuned", 50),
        measurement("all", "pixels", 40), measurement("all", "fine-tuned", 60),
    ]
    figure = report.label_figure(rows, height=300)
    tuned_10, tuned_all, pixels_10, pixels_all = heights_of_circles(figure)
    ten_points = tuned_10 - tuned_all         # fine-tuned comes first: it ends higher
    assert ten_points > 10
    assert pixels_10 - tuned_10 == pytest.approx(2.5 * ten_points, abs=0.2)
    assert pixels_10 - pixels_all == pytest.approx(1.5 * ten_points, abs=0.2)
    for name in ("pixels 40.0", "fine-tuned 60.0", ">10<", ">all<"):
        assert name in figure


def test_a_bar_reaches_one_deviation_up_and_down():
    rows = [
        measurement("10", "pixels", 20), measurement("10", "pixels", 30),
        measurement("10", "fine-tuned", 50),
        measurement("all", "pixels", 60), measurement("all", "fine-tuned", 60),
    ]
    figure = report.label_figure(rows)
    vertical = r'<line x1="([\d.]+)" x2="\1" y1="([\d.]+)" y2="([\d.]+)"'
    _, low, high = map(float, re.findall(vertical, figure)[0])
    pixels, _, tuned, _ = heights_of_circles(figure)      # 25 ± 7.1 at 10 labels, and 50
    assert low - pixels == pytest.approx(pixels - high, abs=0.2)
    assert low - pixels == pytest.approx(7.1 / 25 * (pixels - tuned), abs=0.2)
    names = [float(y) for y in re.findall(r'y="([\d.]+)" style="fill', figure)]
    assert len(names) == 2 and names[1] - names[0] >= 12  # no name covers another


def test_no_accuracy_is_above_100():
    rows = [measurement("10", "pixels", 100), measurement("10", "pixels", 95)]
    figure = report.label_figure(rows)                    # 97.5 ± 3.5
    assert ">100<" in figure and ">90<" in figure and ">110<" not in figure
    ends = [float(y) for y in re.findall(r'y2="([-\d.]+)"', figure)]
    assert min(ends) == 20                                # the line of 100 %


def test_the_figure_has_no_point_for_an_empty_cell():
    rows = [
        measurement("10", "pixels", 20), measurement("all", "pixels", 40),
        measurement("all", "fine-tuned", 60),
    ]
    assert len(heights_of_circles(report.label_figure(rows))) == 3


SEVERAL = [
    measurement("10", "pixels", 20), measurement("10", "pixels", 30),
    measurement("all", "pixels", 40), measurement("all", "fine-tuned", 60),
    measurement("1", "pixels", 90, limit=12),
    measurement("10", "pixels", 80, data="<y>", mirrored=""),
    measurement("10", "pixels", 70, step=1500),
    measurement("10", "pixels", 50, mirrored="no"),
]


def test_rows_of_different_conditions_are_not_mixed():
    groups = accuracies.by_condition(SEVERAL)
    assert list(groups) == [
        ("x", "0", "30", "1", "yes"), ("x", "12", "30", "1", "yes"), ("<y>", "0", "30", "1", ""),
        ("x", "0", "1500", "1", "yes"), ("x", "0", "30", "1", "no"),
    ]
    assert [len(rows) for rows in groups.values()] == [4, 1, 1, 1, 1]


# ---------------------------------------------------------------- the page

CONFIG = dict(
    command="python x.py", started="today", python="3.99", torch="2.88", settings={},
)


@pytest.fixture
def page(tmp_path):
    """page({name: content}) -> report.html of a folder with these files

    A content is a text, or the rows of a .csv.
    """
    def make(contents=()):
        for name, content in dict(contents).items():
            if isinstance(content, list):
                files.write_csv(tmp_path / name, content)
            else:
                (tmp_path / name).write_text(content, encoding="utf-8")
        report.write_page(tmp_path)
        return (tmp_path / "report.html").read_text(encoding="utf-8")
    return make


def test_a_right_guess_is_told_from_a_wrong_one():
    shown = report.filled_in("a [MASK] b [MASK] c", [" x", " y"], [" x", " z"])
    assert ' <span class="good">x</span> b' in shown
    assert '<span class="bad">z</span> <s>y</s> c' in shown


def test_html_in_a_text_is_shown_and_not_obeyed():
    shown = report.filled_in("a <b> & [MASK] [MASK]", ["<i>", "<u>"], ["<i>", "<s>"])
    assert not re.search("<[biu]>", shown)
    assert all(f"&lt;{name}&gt;" in shown for name in "bius")


def test_html_in_names_and_settings_is_not_obeyed(page):
    config = dict(CONFIG, command="<q>", settings=dict(data="<i>"))
    shown = page({
        "config.json": json.dumps(config),
        "finetune.csv": [
            measurement("<i>", "<u>", 20, data="<s>", limit="<q>", checksum="<u>"),
            measurement("10", "pixels", 20, data="<s>", limit="<q>"),
        ],
        "metrics.csv": "step,<q>\n1,2\n",
    })
    assert "(checksum &lt;u&gt;)" in shown
    assert "cannot be read" not in shown
    assert not re.search("<[iusq]>", shown)


def test_the_page_names_the_run_and_its_results(page):
    shown = page({
        "config.json": json.dumps(CONFIG),
        "finetune.csv": [
            measurement("10", "pixels", 20, data="<x>"),
            measurement("all", "pixels", 40, data="<x>"),
        ],
    })
    origin = "python x.py</code><br>last started today, Python 3.99, torch 2.88"
    assert origin in shown
    assert shown.count("<td>10</td><td>20.0</td>") == 1
    assert shown.count("<td>all</td><td>40.0</td>") == 1
    assert "&lt;x&gt;, after 30 steps of pretraining.</p>" in shown
    assert "cannot be read" not in shown


WHOLE = measurement("10", "pixels", 50)
WITHOUT_MIRRORED = {name: value for name, value in WHOLE.items() if name != "mirrored"}


@pytest.mark.parametrize("name, content", [
    ("config.json", "{"),
    ("config.json", "[" * 100_000),
    ("metrics.csv", "step,seconds,loss\n1,1,x\n"),
    ("metrics.csv", f"step,loss\n-1{'0' * 400},1\n1,2\n"),
    ("sentences.json", "3"),
    ("finetune.csv", [WITHOUT_MIRRORED]),
    ("finetune.csv", [WHOLE | dict(step="x")]),
    ("finetune.csv", [WHOLE | dict(test_accuracy="inf")]),
    ("finetune.csv", [WHOLE | dict(test_accuracy="nan")]),
    ("finetune.csv", [WHOLE | dict(test_accuracy=-1e300)]),
    ("finetune.csv", "labels_a_class\n10\n"),
    ("probe.csv", [WHOLE | dict(test_accuracy="")]),
])
def test_the_page_says_what_to_do_with_a_damaged_file(name, content, page, tmp_path):
    report.write_png(tmp_path / "map.png", random_image(64, 64))
    shown = page({name: content})
    sentence = (
        f"<p>{name} cannot be read: it is damaged, or another version of minissl wrote it. "
        f"Correct it, or move it away.</p>"
    )
    assert shown.count("cannot be read") == shown.count(sentence) == 1
    assert "<h2>Map of the features</h2>" in shown            # the other sections are there


def test_the_page_names_a_file_that_it_may_not_read(page, tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    shown = page()
    assert "metrics.csv cannot be read (Is a directory): make it readable, or move it" in shown


START = "Test accuracy in %, mean ± standard deviation over"


def sentences_above_tables(shown):
    return re.findall("<p>(Test accuracy.*?)</p>", html.unescape(shown))


def test_the_page_has_a_table_for_each_condition(page):
    shown = page({"finetune.csv": SEVERAL})
    assert shown.count("<h2>Results</h2>") == 1 and shown.count("<table>") == 5
    assert sentences_above_tables(shown) == [
        f'{START} 2 draws of labels (row "all": over 1 training): '
        f"x, after 30 steps of pretraining.",
        f"{START} 1 draw of labels: x, after 30 steps of pretraining. "
        f"This is a trial with --limit 12: it used a part of the data.",
        f"{START} 1 draw of labels: <y>, after 30 steps of pretraining.",
        f"{START} 1 draw of labels: x, after 1,500 steps of pretraining.",
        f"{START} 1 draw of labels: x, without mirror images, after 30 steps of pretraining.",
    ]


def test_other_content_of_the_same_data_has_a_separate_table(page):
    shown = page({"finetune.csv": [
        measurement("10", "pixels", 20, checksum="a"),
        measurement("10", "pixels", 30, checksum="a", step=60),
        measurement("10", "pixels", 40, checksum="b", limit=12),
        measurement("10", "pixels", 50, checksum="b", data="y"),
        measurement("10", "pixels", 60, checksum="c"),
    ]})
    found = [sentence.removeprefix(f"{START} 1 draw of labels: ")
             for sentence in sentences_above_tables(shown)]
    assert found[0] == "x of other content (checksum a), after 30 steps of pretraining."
    assert found[1] == "x of other content (checksum a), after 60 steps of pretraining."
    assert found[4] == "x, after 30 steps of pretraining."
    assert shown.count("of other content") == 2


def test_the_row_all_counts_trainings_and_no_draws(page):
    all_alone = [measurement("all", "pixels", 40)]
    all_alone += [measurement("all", "fine-tuned", 60)] * 2
    draws = [measurement("10", method, 20) for method in ("pixels", "fine-tuned")] * 5
    first, second = sentences_above_tables(page({
        "finetune.csv": draws + all_alone, "probe.csv": all_alone,
    }))
    assert f'{START} 5 draws of labels (row "all": over 1 to 2 trainings): x,' in first
    assert f"{START} 1 to 2 trainings with all labels: x," in second


def test_the_linear_probe_has_a_section(page):
    shown = page({"probe.csv": [measurement("10", "linear probe", 61)]})
    assert "<h2>Results</h2>" not in shown
    section = shown.partition("<h2>Linear probe</h2>")[2]
    assert "<td>10</td><td>61.0</td>" in section and "linear probe 61.0" in section


def test_a_column_that_is_often_empty_has_a_curve(page):
    shown = page({"metrics.csv": "step,seconds,loss,knn\n50,1.0,2.5,\n100,2.0,2.25,61.5\n"})
    assert "<b>loss</b> now 2.25" in shown and "<b>knn</b> now 61.5" in shown
    assert "<b>seconds" not in shown


def test_the_page_needs_nothing_but_itself(page, tmp_path):
    for name in report.PICTURES:
        report.write_png(tmp_path / name, random_image(64, 64))
    shown = page({
        "config.json": json.dumps(CONFIG),
        "metrics.csv": "step,loss\n1,2\n2,1\n",
        "finetune.csv": [measurement("10", "pixels", 20)],
        "probe.csv": [measurement("10", "linear probe", 20)],
        "sentences.json": json.dumps([["a [MASK]", [" b"], [" c"]]]),
    })
    assert "cannot be read" not in shown
    titles = re.findall("<h2>(.*?)</h2>", shown)
    assert titles == [
        "Results", "Linear probe", "Masked words, filled in",
        *(title for title, _ in report.PICTURES.values()), "Learning curves",
    ]
    text = re.sub('base64,[^"]*', "", shown)
    assert "http" not in text and "url(" not in text and "<script" not in text
    assert text.count('src="data:image/png;') == text.count("src=") == len(report.PICTURES)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_page_of_large_images_stays_small(page, tmp_path):
    images = torch.randint(0, 256, (9, 3, 512, 512), dtype=torch.uint8)
    labels = np.zeros(9, int)
    grid = report.grid([images] * 10, [labels] * 10)         # as neighbours.png
    for name in report.PICTURES:
        report.write_png(tmp_path / name, grid)
        assert (tmp_path / name).stat().st_size <= 1_000_000
    assert len(page()) < 7_000_000                           # five pictures of noise
