"""What a classifier made of the views of a picture, to look at: tiles on the photograph, attention inside each tile.

part, rows = drawn(classifier, facts, source, row, title, label)
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageDraw

import data
from tools.lib import fused, sheet
from tools.lib.classifiers import layout_of, views_of

WIDE, SIDE = 760, 190  # pixels: the photograph, a view


class Look(NamedTuple):
    """What is drawn of one picture."""

    views: torch.Tensor  # [V, 3, size, size]
    attention: np.ndarray  # [V, rows, columns], mean of heads of the last block
    alone: np.ndarray  # [V, C] probabilities of each view alone
    together: np.ndarray  # [C] of all views
    weights: np.ndarray  # [V], sum 1
    kept: np.ndarray  # [V] bool


@torch.inference_mode()
def look(classifier, facts, source, i, device):
    views = views_of(source, [i], facts["layout"], facts["eval_view"], device)[0]
    classifier = classifier.to(device).eval()
    attention, V = classifier.backbone.attention(views).mean(1).cpu().numpy(), len(views)
    if not isinstance(classifier, fused.FusedClassifier):
        logits = classifier(views)
        even = np.full(V, 1 / V)
        return Look(views.cpu(), attention, logits.softmax(1).cpu().numpy(),
                    logits.mean(0).softmax(0).cpu().numpy(), even, even > 0)  # fmt: skip
    x, known = classifier.features(views), fused.facts_at(source, [i], classifier.fields, device)
    each = known and {name: value.expand(V, *value.shape[1:]) for name, value in known.items()}
    at = torch.arange(V, device=x.device)
    if classifier.head.prescore is not None:  # the others are drawn, and were not looked at
        at = classifier.head.prescore.choose(classifier.backbone(views[:1]).patches)[0]
    out, alone, weights = classifier.head(x[None, at], known), classifier.head(x[:, None], each).logits, np.zeros(V)
    weights[at.cpu().numpy()] = out.weights[0].cpu().numpy()
    kept = np.isin(np.arange(V), at[out.kept[0]].cpu().numpy())
    together = out.logits[0].softmax(0).cpu().numpy()
    return Look(views.cpu(), attention, alone.softmax(1).cpu().numpy(), together, weights, kept)


def photograph(source, i, seen, boxes, size):
    """The picture with its views, the weightier the brighter; those that pruning dropped in grey."""
    image = sheet.fit(sheet.picture(data.read_view(source, i, data.find_layout("whole"), WIDE)[0].numpy()), WIDE)
    scale = np.tile([image.height, image.width] / np.array(size), 2)
    frames, words, large = [], [], 0
    for v in np.argsort(seen.weights):  # the weightiest last, on top
        inset = 3 * (v % 4)  # edges that views share stay apart
        y0, x0, y1, x1 = box = boxes[v] * scale + [inset, inset, -inset, -inset]
        colour = sheet.COLOURS[v % len(sheet.COLOURS)] if seen.kept[v] else sheet.DIM
        strong = seen.weights[v] >= 1 / len(boxes)
        frames.append((box, colour, "", 4 if strong and seen.kept[v] else 1))
        text = f"{v}: {seen.weights[v]:.2f} of {seen.alone[v, -1]:.2f}" if seen.kept[v] else f"{v} dropped"
        if (y1 - y0) * (x1 - x0) > image.height * image.width / 4:  # the whole and squares: one line each, below
            words.append((12, image.height - 26 - 20 * large, text, colour, "la"))
            large += 1
        else:
            words.append(((x0 + x1) / 2, (y0 + y1) / 2, text, colour, "mm"))
    image = sheet.outline(image, frames)
    for x, y, text, colour, anchor in words:
        ImageDraw.Draw(image).text((x, y), text, colour, sheet.font(15), anchor, stroke_width=2, stroke_fill="black")
    return image


HEADER = ["id", "view", "y0", "x0", "y1", "x1", "mirrored", "kept", "weight", "alone"]


def drawn(classifier, facts, source, i, title, label, device="cpu"):
    """One picture of a Source -> part of a sheet, rows of HEADER (alone: of the last class); label: the true one"""
    seen = look(classifier, facts, source, i, device)
    layout, flips = layout_of(facts["layout"])
    with data.open_photo(source.path(i)) as file:
        size = data.turn_of(file)[1]
    boxes = data.eval_boxes([size]) if layout is None else data.view_boxes([size], layout)[0][:, 0]
    columns = zip(boxes.astype(int).tolist(), flips, seen.kept, seen.weights, seen.alone[:, -1])
    rows = [[title, v, *box, int(f), int(k), f"{w:.6g}", f"{p:.6g}"] for v, (box, f, k, w, p) in enumerate(columns)]
    name, tiles = facts["classes"][-1], []
    for v in range(len(seen.views)):
        base = sheet.picture(data.denormalise(seen.views[v][None])[0].numpy())
        both = sheet.row([sheet.fit(base, SIDE), sheet.attention_over(base, seen.attention[v], SIDE)], gap=2)
        words = f"{v}{', mirrored' * bool(flips[v])}: weight {seen.weights[v]:.2f}, alone {seen.alone[v, -1]:.2f}"
        tiles.append(sheet.titled(both, [words if seen.kept[v] else f"{words}, dropped"]))
    said = facts["classes"][seen.together.argmax()]
    wrong = label is not None and said != label
    words = f"before any policy: {said}, {name} with {seen.together[-1]:.2f}" + f"; it is {label}" * bool(label)
    lines = [(words, sheet.BAD if wrong else sheet.INK)]
    lines += [("On the picture: view, its weight, what it says alone. Right: each view, and the attention of the last "
               "block in it. alone: what it says without the others.", sheet.DIM)]  # fmt: skip
    left = sheet.stack([photograph(source, i, seen, boxes, size), sheet.paragraphs(lines, WIDE, 15)])
    grid = sheet.stack([sheet.row(tiles[k : k + 3]) for k in range(0, len(tiles), 3)])
    both = sheet.row([left, grid])
    return sheet.stack([sheet.heading(title, both.width), both]), rows
