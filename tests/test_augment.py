"""Claims about supervised augmentation: what each value does, and that draws belong to (seed, step, sample)."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_data import photo

import data as d
from tools.lib import augment as a

IDS, SIZE = np.arange(8), 32


def views_of(row, images=None, seed=3, step=5, ids=IDS):
    images = torch.stack([photo(k, (60, 80)) for k in ids]) if images is None else images
    draws = a.draw(seed, step, ids, row)
    boxes, margins = a.place(draws, [images.shape[2:]] * len(images))
    flat = np.zeros((1, len(images)))
    cuts = d.cut(images, boxes[None], flat > 0, flat, a.cut_size(row, SIZE))[0] / 255
    return a.look(cuts.clamp(0, 1), draws, margins, SIZE), draws


PLAIN = a.ROWS["none"]
OTHER = dict(scale=0.3, ratio=2.0, flip=1.0, jitter=0.4, brightness=0.5, contrast=0.5, rotate=15.0, blur=1.0, erase=1.0,
             trivial=1)  # fmt: skip


def test_nothing_is_done_where_nothing_is_asked():
    images = torch.stack([photo(k, (60, 80)) for k in IDS])
    views, _ = views_of(PLAIN)
    whole = d.render_views(images, d.eval_view("photo", SIZE), d.view_boxes([(60, 80)] * 8, "whole")[0], [False])[0]
    torch.testing.assert_close(views, d.denormalise(whole), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", OTHER)
def test_every_value_changes_the_picture(name):
    before, _ = views_of(PLAIN)
    after, _ = views_of(PLAIN._replace(**{name: OTHER[name]}))
    changed = (before - after).abs().flatten(1).amax(1) > 0.01
    assert changed.float().mean() > 0.7, name  # a draw may be near nothing, an operation the identity
    assert after.min() >= 0 and after.max() <= 1 and after.shape == (8, 3, SIZE, SIZE)
    assert set(OTHER) | {"mixup", "cutmix"} == set(a.Row._fields) == set(a.LIMITS)


def test_draws_are_a_function_of_seed_step_and_sample():
    row = a.ROWS["strong"]
    views, draws = views_of(row)
    again, _ = views_of(row)
    assert torch.equal(views, again)
    alone, _ = views_of(row, torch.stack([photo(k, (60, 80)) for k in (6, 2)]), ids=np.array([6, 2]))
    torch.testing.assert_close(alone, views[[6, 2]], atol=1e-6, rtol=0)
    for seed, step in ((4, 5), (3, 6)):
        other, _ = views_of(row, seed=seed, step=step)
        assert (other - views).abs().flatten(1).amax(1).min() > 0.01
    assert sorted(draws.partner) == list(IDS)


def test_a_turned_view_is_the_turned_picture():
    """A picture of a linear slope, whose turned value is known at every place; the margin comes from the picture."""
    y, x = np.mgrid[:200, :200]
    slope = torch.from_numpy(np.stack([x / 2 + 20, y / 2 + 20, 0 * x + 50])).byte()[None].repeat(8, 1, 1, 1)
    row = PLAIN._replace(rotate=15.0, scale=0.25, ratio=1.0)
    views, draws = views_of(row, slope)
    boxes, margins = a.place(draws, [(200, 200)] * 8)
    at = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    for k in range(8):
        low, extent = boxes[k, :2], boxes[k, 2:] - boxes[k, :2]
        y0, x0 = low + margins[k, :2] * extent
        y1, x1 = low + margins[k, 2:] * extent
        angle = math.radians(15) * (2 * draws.u[k, 4] - 1)
        X = (x0 + x1) / 2 + (x1 - x0) / 2 * (math.cos(angle) * at[None] - math.sin(angle) * at[:, None])
        Y = (y0 + y1) / 2 + (y1 - y0) / 2 * (math.sin(angle) * at[None] + math.cos(angle) * at[:, None])
        inside = (boxes[k, 1] + 2 < X) & (boxes[k, 3] - 2 > X) & (boxes[k, 0] + 2 < Y) & (boxes[k, 2] - 2 > Y)
        assert inside.mean() > 0.8
        want = np.stack([(X - 0.5) / 2 + 20, (Y - 0.5) / 2 + 20])
        assert np.abs(255 * views[k, :2].numpy() - want)[:, inside].max() < 0.6  # codes; bytes were cut off below
        assert 99 < y1 - y0 <= 200 and y1 - y0 == pytest.approx(x1 - x0)


def test_operations_against_pillow_and_torch():
    image = photo(1, (40, 40))
    x, pil = image[None] / 255, Image.fromarray(image.permute(1, 2, 0).numpy())

    def codes(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    turned = a.moved(x, angle=math.pi / 2)
    torch.testing.assert_close(turned, torch.rot90(x, 1, (2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(a.stretched(x, 0)[0], codes(ImageOps.autocontrast(pil)), atol=1.01 / 255, rtol=0)
    posterize = a.TRIVIAL["posterize"][0](x, 0.5)[0]  # 3 bits fewer
    torch.testing.assert_close(posterize, codes(ImageOps.posterize(pil, 5)), atol=1e-6, rtol=0)
    solarize = a.TRIVIAL["solarize"][0](x, 127 / 255)[0]
    torch.testing.assert_close(solarize, codes(ImageOps.solarize(pil, 128)), atol=1e-6, rtol=0)
    flat = a.equalized(x, 0)[0]
    for before, after in zip(image.flatten(1), flat.flatten(1)):  # a value becomes the share of pixels up to it
        torch.testing.assert_close(after, (before[None] <= before[:, None]).float().mean(1))


def test_blur_and_erasing_against_their_definitions():
    x = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    seen = a.blurred(x, np.array([0.0, 1.0, 2.0]))
    assert torch.equal(seen[0], x[0])
    for k, sigma in ((1, 1.0), (2, 2.0)):
        g = torch.exp(-0.5 * (torch.arange(-6, 7) / sigma) ** 2)
        kernel = torch.outer(g, g) / g.sum() ** 2
        padded = torch.nn.functional.pad(x[k : k + 1], (6, 6, 6, 6), "replicate")
        want = torch.nn.functional.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)[0]
        torch.testing.assert_close(seen[k], want, atol=1e-5, rtol=0)
    gone = a.erased(torch.zeros(2, 3, 100, 100), np.array([0.0, 0.2]), np.array([[0.5, 0.2, 0.3]] * 2))
    assert gone[0].max() == 0
    assert (gone[1] == 0.5).float().mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
@pytest.mark.parametrize("step", range(6))
def test_mixed_targets_are_the_shares_of_the_pixels(way, step):
    """Picture k has the value k everywhere, so the mean of a mixed one tells what it is made of."""
    row = PLAIN._replace(**{way: 1.0})
    draws = a.draw(0, step, IDS, row)
    views = torch.arange(8.0)[:, None, None, None].expand(8, 3, 40, 40)
    targets = torch.eye(8)
    mixed, rows = a.mix(views, targets, draws)
    torch.testing.assert_close(rows.sum(1), torch.ones(8))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), rows @ torch.arange(8.0), atol=1e-4, rtol=1e-5)
    assert (mixed.flatten(1).amax(1) == mixed.flatten(1).amin(1)).all() == (way == "mixup")


def test_both_ways_of_mixing_take_turns_and_neither_leaves_all_as_it_is():
    row, ways = a.find_row("strong"), []
    for step in range(40):
        draws = a.draw(0, step, IDS, row)
        ways.append(a.use_cutmix(row, draws.batch))
    assert 8 < sum(ways) < 32
    views, targets = torch.rand(8, 3, 8, 8), torch.eye(8)
    same = a.mix(views, targets, a.draw(0, 0, IDS, PLAIN))
    assert same[0] is views and same[1] is targets


@pytest.mark.parametrize("text, words", [
    ("weak", "no 'weak'; known are none, crop"), ("light:zoom=2", "'zoom=2' is not one of"),
    ("light:rotate=90", "rotate 0 to 45"), ("light:flip=x", "'flip=x'"), ("crop:scale=nan", "'scale=nan'"),
])  # fmt: skip
def test_what_does_not_exist_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        a.find_row(text)
    assert a.find_row("light:rotate=10,erase=0.3")._asdict() == {
        **a.ROWS["light"]._asdict(),
        "rotate": 10,
        "erase": 0.3,
    }


def test_a_whole_number_of_a_row_may_become_a_fraction():
    assert a.find_row("light:rotate=7.5").rotate == 7.5
    with pytest.raises(ValueError, match="'trivial=0.5' is not one of"):
        a.find_row("light:trivial=0.5")
