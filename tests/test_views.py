"""Claims about views as boxes: what a layout covers, and what its views show."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_photos, photo

import data as d

SIZES = [(1, 1), (1, 40), (7, 3), (224, 224), (480, 640), (3024, 4032), (4032, 3024), (8000, 6000), (333, 5000)]
TEXTS = [*d.LAYOUTS, "tiles:rows=2,cols=5,overlap=0.2", "tiles_and_squares:rows=1,cols=4,flip=1", "centre:flip=1"]


@pytest.mark.parametrize("text", TEXTS)
def test_boxes_lie_inside_and_all_but_centre_cover_the_image(text):
    layout = d.find_layout(text)
    boxes, flips = d.view_boxes(SIZES, text)
    assert boxes.shape == (len(flips), len(SIZES), 4) and (boxes == boxes.round()).all()
    for b, (height, width) in enumerate(SIZES):
        y0, x0, y1, x1 = boxes[:, b].astype(int).T
        assert (y0 >= 0).all() and (y0 < y1).all() and (y1 <= height).all(), (text, height, width)
        assert (x0 >= 0).all() and (x0 < x1).all() and (x1 <= width).all(), (text, height, width)
        if layout.tiles:  # by the tiles alone, whatever the whole image covers
            tiles = slice(layout.whole, layout.whole + layout.rows * layout.cols)
            covered = np.zeros((height, width), bool)
            for top, left, bottom, right in zip(y0[tiles], x0[tiles], y1[tiles], x1[tiles]):
                covered[top:bottom, left:right] = True
            assert covered.all(), (text, height, width)


def test_counts_and_known_boxes():
    counts = {name: len(d.view_boxes([(300, 400)], name)[1]) for name in d.LAYOUTS}
    assert counts == {"whole": 1, "centre": 1, "tiles": 10, "tiles_and_squares": 12}
    boxes, flips = d.view_boxes([(300, 600)], "tiles:overlap=0.1,flip=1")
    assert boxes[0, 0].tolist() == [0, 0, 300, 600] and len(flips) == 20 and flips.sum() == 10
    assert boxes[1, 0].tolist() == [0, 0, 110, 220] and boxes[5, 0].tolist() == [90, 180, 210, 420]
    np.testing.assert_array_equal(boxes[:10], boxes[10:])
    (square,), _ = d.view_boxes([(300, 600)], "centre")
    np.testing.assert_array_equal(square, d.eval_boxes([(300, 600)]))
    right = d.view_boxes([(3024, 4032), (4032, 3024)], "tiles_and_squares")[0][-1]
    assert right.tolist() == [[0, 1008, 3024, 4032], [1008, 0, 4032, 3024]]
    one, _ = d.view_boxes([(301, 401)], "tiles:rows=1,cols=1,overlap=0")
    np.testing.assert_array_equal(one[0], one[1])  # a grid of one tile is the whole image


@pytest.mark.parametrize("overlap", [0.0, 0.15, 0.25, 0.4])
def test_even_tiles_share_what_was_asked_and_never_less(overlap):
    """An earlier system left the right 672 of 4032 columns unseen."""
    for length, n in itertools.product((7, 100, 3024, 4032, 4033), (2, 3, 5)):
        start, end = d.tile_edges(np.array([length]), n, d.LAYOUTS["tiles_and_squares"]._replace(overlap=overlap))
        tile = end[0] - start[0]
        assert start[0] == 0 and end[-1] == length and (end - start == tile).all()
        shared = (end[:-1] - start[1:]) / tile
        assert (shared >= overlap - 1 / tile).all(), (length, n)  # whole pixels
        assert (shared <= overlap + (n + 1) / tile).all(), (length, n)


@pytest.mark.parametrize("overlap", [0.0, 0.15, 0.2])
def test_grown_tiles_are_those_of_the_rule(overlap):
    start, end = d.tile_edges(np.array([900]), 3, d.LAYOUTS["tiles"]._replace(overlap=overlap))
    grow = 300 * overlap
    np.testing.assert_allclose(start[:, 0], [0, 300 - grow, 600 - grow])
    np.testing.assert_allclose(end[:, 0], [300 + grow, 600 + grow, 900])


@pytest.mark.parametrize("text, words", [
    ("tile", "no 'tile'; known are whole, centre"), ("tiles:rows=0", "'rows=0' is not one of rows 1 to 16"),
    ("tiles:overlap=0.5", "overlap 0 to 0.49"), ("tiles:zoom=2", "'zoom=2' is not one of"),
    ("tiles:rows=x", "'rows=x' is not"), ("tiles:rows", "'rows' is not"), ("tiles:overlap=nan", "'overlap=nan'"),
])  # fmt: skip
def test_a_layout_that_does_not_exist_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        d.find_layout(text)


def test_views_of_a_batch_are_those_of_each_image_and_the_flip_is_a_mirror(tmp_path):
    """In one call or one by one: equal to the bit, padding included."""
    for k, size in enumerate([(97, 131), (64, 200), (150, 80)]):
        Image.fromarray(photo(k, size).permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    source, view = d.open_source(tmp_path), d.eval_view("photo", 32)
    layout = d.find_layout("tiles_and_squares:flip=1")
    read = [d.read_view(source, i, layout, 32) for i in range(3)]
    boxes, flips = np.stack([b for _, b in read], 1), d.view_boxes([(9, 9)], layout)[1]
    together = d.render_views(d.pad_to_one_size([image for image, _ in read]), view, boxes, flips)
    assert together.shape == (24, 3, 3, 32, 32)
    for b, (image, at) in enumerate(read):
        alone = d.render_views(image[None], view, at[:, None], flips)[:, 0]
        assert torch.equal(together[:, b], alone)
        for v in range(12):
            one = d.render_eval(image[None], view, at[v : v + 1])[0]
            assert torch.equal(alone[v], one)
    torch.testing.assert_close(together[:12].flip(-1), together[12:], atol=1e-5, rtol=1e-5)


def test_a_view_is_what_pillow_makes_of_its_box(tmp_path):
    make_photos(tmp_path)
    source, view = d.open_source(tmp_path), d.eval_view("photo", 24)
    image, boxes = d.read_view(source, 0, d.find_layout("tiles"), 200)  # nothing to reduce: the very pixels
    views = d.denormalise(d.render_views(image[None], view, boxes[:, None], np.zeros(10, bool)))[:, 0]
    whole = Image.open(source.path(0)).convert("RGB")
    for (y0, x0, y1, x1), seen in zip(d.view_boxes([whole.size[::-1]], "tiles")[0][:, 0], views):
        for plane, channel in zip(whole.split(), seen):  # mode F: in bytes Pillow rounds twice
            want = plane.convert("F").crop((x0, y0, x1, y1)).resize((24, 24), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(255 * channel, np.clip(np.asarray(want), 0, 255), atol=0.02)


# drawing by weight


def weigh(root, rows):
    (root / "weights.csv").write_text("\n".join(["path,weight", *(f"{name},{w}" for name, w in rows)]) + "\n")
    return root / "weights.csv"


def test_images_are_drawn_with_replacement_as_often_as_they_weigh(tmp_path):
    source = d.open_source(make_photos(tmp_path, 6))
    names, weights = source.rows.texts("path"), np.array([0, 1, 2, 3, 4, 10])
    table = weigh(tmp_path, zip(names[::-1], weights[::-1]))  # in any order of rows
    drawn = d.weighed(source, table)
    ids = np.concatenate([drawn.order(7, step, 50) for step in range(200)])
    counts = np.bincount(ids, minlength=6)
    assert counts[0] == 0
    expected = 10_000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()  # five standard deviations
    np.testing.assert_array_equal(drawn.order(7, 3, 50), d.weighed(source, table).order(7, 3, 50))
    assert (drawn.order(8, 3, 50) != drawn.order(7, 3, 50)).any() and drawn.weights_sha256 == d.file_sha256(table)
    batch = next(d.make_loader(drawn, d.RECIPES["photo"], 7, range(3, 4), 8))
    np.testing.assert_array_equal(batch.ids, drawn.order(7, 3, 8))


@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[1:], "does not name 'c0/0.png'"), (lambda rows: [*rows, ("x.png", 1)], "names 'x.png'"),
    (lambda rows: [(n, -1) for n, _ in rows], "from 0 up"), (lambda rows: [(n, 0) for n, _ in rows], "not all 0"),
    (lambda rows: [(n, "nan") for n, _ in rows], "from 0 up"), (lambda rows: [(n, "x") for n, _ in rows], "a number"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    source = d.open_source(make_photos(tmp_path, 4))
    rows = [(name, 1) for name in source.rows.texts("path")]
    with pytest.raises(ValueError, match=words):
        d.weighed(source, weigh(tmp_path, change(rows)))
