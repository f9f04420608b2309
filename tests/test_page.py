"""Pages and plots: everything is escaped, nothing comes from elsewhere, and curves are where their numbers are."""

import base64
import io
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from tools.lib import page

STEPS = list(range(0, 101, 10))


def png(colour, size=(40, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def sample_page(picture):
    lines = {"a&b": (STEPS, [s**2 for s in STEPS]), "c": ([0], [9])}
    plot = page.line_plot("<loss>", lines, "step", "y", [("y", 50, "limit<")])
    table = page.table(("name", "value"), [("<b>x</b>", 1.23456789), ("none", None), ("many", 12345678.0)])
    return page.page("Run <1>", "in & out", page.section("S", page.row(plot, page.image(picture, 'say "hi"')), table))


def test_a_page_is_whole_escaped_and_alone():
    page = sample_page(png("red"))
    assert page.startswith("<!DOCTYPE html>") and page.count("</html>") == 1
    texts = "Run &lt;1&gt;|in &amp; out|&lt;loss&gt;|a&amp;b|limit&lt;|&lt;b&gt;x&lt;/b&gt;|say &quot;hi"
    for text in texts.split("|"):
        assert text in page, text
    for foreign in ("<script", "http:", "https:", "@import", "url(", "<loss>", "<b>x"):
        assert foreign not in page, foreign
    assert set(re.findall(r'(?:src|href)="([^:"]*):', page)) == {"data"}
    body = page[page.index("<body") : page.index("</html>")]
    ET.fromstring(re.sub(r"<img ([^>]*)>", r"<img \1/>", body))  # all tags closed, all entities known
    assert all(cell in page for cell in ("<td>1.235</td>", "<td>-</td>", "<td>1.235e+07</td>"))


def test_pictures_are_inside_as_they_are(tmp_path):
    (tmp_path / "x.png").write_bytes(png("blue"))
    for source in (png("blue"), tmp_path / "x.png", str(tmp_path / "x.png")):
        found = re.search(r'src="data:image/png;base64,([^"]+)"', page.image(source))[1]
        assert base64.b64decode(found) == png("blue")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        page.image(tmp_path / "nowhere.png")


def polylines(svg):
    found = [p.get("points") for p in ET.fromstring(svg).iter("polyline")]
    return [np.array([[float(v) for v in pair.split(",")] for pair in points.split()]) for points in found]


def test_curves_are_affine_in_their_numbers():
    random = np.random.default_rng(0)
    x, y = np.sort(random.random(30)), random.normal(size=30)
    (points,) = polylines(page.line_plot("t", {"a": (x, y)}))
    inside = [page.LEFT, page.WIDTH - page.RIGHT, page.TOP, page.HEIGHT - page.BOTTOM]
    across = np.interp(x, page.limits(x, 0.02), inside[:2])
    up = np.interp(y, page.limits(y), inside[:1:-1])
    assert np.abs(points - np.stack([across, up], 1)).max() < 0.051  # drawn to a tenth
    (points,) = polylines(page.line_plot("t", {"a": (x, np.exp(9 * y))}, log_y=True))
    assert np.abs(points[:, 1] - up).max() < 0.051
    assert inside[0] <= points[:, 0].min() and points[:, 0].max() <= inside[1]
    assert inside[2] <= points[:, 1].min() and points[:, 1].max() <= inside[3]


def test_gaps_marks_dots_and_nothing_at_all():
    ys = [1, 2, math.nan, 4, 5, math.inf, 7]
    svg = page.line_plot("t", {"a": (range(7), ys)})
    assert [len(p) for p in polylines(svg)] == [2, 2] and svg.count("<circle") == 1  # the lone last point is a dot
    assert [len(p) for p in polylines(page.line_plot("t", {"a": (range(4), [-1, 1, 0, 10])}, log_y=True))] == []
    assert page.line_plot("t", {"a": (range(7), range(7))}, points=True).count("<circle") == 7
    mixed = page.line_plot("t", {"a": (range(7), range(7)), "diagonal": ([0, 6], [0, 6])}, points=["a"])
    assert mixed.count("<circle") == 7 and len(polylines(mixed)) == 1
    marked = page.line_plot("t", {"a": ([0, 1], [0, 1])}, marks=[("y", 9, "far"), ("x", 0.5, "here")])
    assert "far" in marked and marked.count("stroke-dasharray") == 2
    ends = [float(v) for v in re.findall(r'y1="(\S+)" x2="\S+" y2="\S+" stroke="#cb181d"', marked)]
    assert min(ends) >= page.TOP  # a mark beyond the curves widens the axis
    for empty in ({}, {"a": ([], [])}, {"a": ([1], [math.nan])}):
        assert "no data" in page.line_plot("t", empty, marks=[("y", 1, "m")])
    assert len(polylines(page.line_plot("t", {"a": ([0, 1, 2], [5, 5, 5])}))) == 1  # a level curve


@pytest.mark.parametrize(
    "ends", [(0, 1), (-3, 7), (0.99981, 0.99984), (1e5, 9e5), (2e-7, 9e-7), (-1e9, 1e9), (29.23, 29.24)]
)
def test_ticks_are_round_inside_and_told_apart(ends):
    ticks = page.ticks(*ends)
    assert 2 <= len(ticks) <= 8 and min(ticks) >= ends[0] - 1e-12 and max(ticks) <= ends[1] + 1e-12 * abs(ends[1])
    step = np.diff(ticks)
    assert np.allclose(step, step[0]) and f"{step[0]:.6e}"[0] in "125"
    texts = page.tick_texts(ticks)
    assert len(set(texts)) == len(texts) and all(len(t) <= 9 for t in texts)
    assert np.allclose([float(t) for t in texts], ticks, atol=step[0] / 10)


@pytest.mark.parametrize(
    "xs, ys",
    [
        ([1, 2], [1e308, -1e308]),
        ([2**62, 2**62 + 1], [1, 2]),
        ([0, 1], [1e20, 1e20 + 16384]),
        ([0, 1], [1.0, 1.0 + 2**-52]),
        ([2**53, 2**53 + 2], [0.7, 0.7 + 2**-53]),
        ([1, 2], [5e-324, 1e-323]),
        ([0, 10**15], [1e99, -1e99]),
        ([0, 1], [-math.inf, math.nan]),
    ],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_no_number_that_a_log_can_hold_breaks_a_plot(xs, ys, log_y):
    svg = page.line_plot("t", {"a": (xs, ys)}, log_y=log_y)
    ET.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg


def test_a_trend_needs_two_steps():
    rows = [{"step": 1, "a": 3.0}, {"step": 1, "a": 4.0}, {"step": 2, "b": 1.0}, {"step": 3, "b": None}]
    assert page.trend("t", rows, ("a", "b", "c")) is None and page.trend("t", [], ("a",)) is None
    assert "polyline" in page.trend("t", [*rows, {"step": 2, "a": 5.0}], ("a",))


def test_a_picture_links_to_its_file():
    html = page.image(png("red"), "now", 'a "b"/c.png')
    assert html.startswith('<figure><a href="a%20%22b%22/c.png"><img ') and "</a><figcaption>now" in html
    assert "<a " not in page.image(png("red"), "now")


def test_numbers_stand_beside_what_they_mean():
    table = page.explained("of it", {"slices": 24, "view_slices": 24, "loss": 1.5, "new": 2})
    assert "<td>slices</td><td>24</td><td>images behind these numbers</td>" in table
    assert "view_slices" not in table and "<td>new</td><td>2</td><td></td>" in table  # equal numbers stand there once
    assert "view_slices" in page.explained("of it", {"slices": 24, "view_slices": 12})
    assert page.explained("of it", {}) is None


def test_prometheus_labels_hold_no_quote_and_no_control_character():
    status = dict(run='a"b\\c\x1b[2J\n', code=0, time=1.0, step=3, numbers={}, pulse={}, verdict="healthy")
    text = page.prometheus(status | {"sensors": {'fan "1"\n': 3.0}}, ["healthy"])
    form = r'# TYPE \w+ gauge|\w+\{(\w+="[^"\\\x00-\x1f]*",?)+\} \S+'
    assert all(re.fullmatch(form, row) for row in text.splitlines())


def test_many_rows_are_thinned_to_few():
    rows = list(range(5000))
    few = page.thin(rows, 400)
    assert len(few) == 400 and few[0] == 0 and few[-1] == 4999 and sorted(set(few)) == few
    assert page.thin(rows[:7], 400) == rows[:7] and page.thin([]) == [] and page.thin(rows, 1) == [0]


def browser():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def screenshot(page, shot, height=900):
    """RGB pixels [H, W, 3] of a page in headless Chromium; a message on its console is a failure."""
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr".split()
    flags += [f"--window-size=1200,{height}", f"--user-data-dir={shot.parent / 'profile'}", f"--screenshot={shot}"]
    done = subprocess.run([browser(), *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    return np.asarray(Image.open(shot).convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.skipif(not browser(), reason="no headless Chromium here")
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    (tmp_path / "page.html").write_text(sample_page(png((250, 0, 250), (200, 100))))
    pixels = screenshot(tmp_path / "page.html", tmp_path / "shot.png")
    assert (np.abs(pixels - [250, 0, 250]).sum(2) == 0).sum() > 15_000  # the picture is there
    line = np.abs(pixels - [8, 104, 172]).sum(2) < 30
    assert line.sum() > 100  # and the curve
    (tmp_path / "bad.html").write_text("<script>console.error('planted')</script>")
    with pytest.raises(AssertionError, match="planted"):
        screenshot(tmp_path / "bad.html", tmp_path / "bad.png")
