"""Training of fusion.Fusion on features that a frozen backbone gives of views: seconds, once these are extracted.

    switches, more = read_options("fusion:keep=8,depth=1,metadata=gps+weather")
    model, story = fit(model, train, select, losses.soft_cross_entropy, seed=0)         # train, select: Set

Letters: N pictures, V views, D features, P patches of a view, F fields, M kinds of objects in masks.
"""

import copy
import functools
import inspect
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoint
import data
from model import Classifier, Head
from tools.lib import features, fused, loop, metrics
from tools.lib.classifiers import each_view, layout_of
from tools.lib.cli import technique
from tools.lib.files import write_json
from tools.lib.fusion import combined_loss
from tools.lib.progress import progress

PATCH_BYTES = 2**31  # of patch features that training on masks may hold in memory


def fusion(width=0, keep=0, pyramid=False, depth=0, heads=4, gated=True, experts=0, pool="mil", norm=True, hidden=0,
           consistency=False, metadata="", weather="", masks=0, drop=0.3):  # fmt: skip
    """Options of --tune fusion. The first ten and consistency: see fusion.Fusion. metadata: facts such as
    gps+weather+text, each left out with probability `drop` while training; weather: a column that an auxiliary head
    tells; masks: kinds of objects in _labels/masks that another tells patch by patch."""


def read_options(text):
    """fusion:keep=8 -> (switches of Fusion, other options)"""
    _, given = technique(text, {"fusion": fusion})
    options = {name: p.default for name, p in inspect.signature(fusion).parameters.items()} | given
    more = {name: options.pop(name) for name in ("metadata", "weather", "drop")}
    if not 0 <= more["drop"] < 1:
        raise ValueError(f"{text}: drop is {more['drop']}, expected a share from 0 to below 1")
    return options, more


class Set(NamedTuple):
    """All that training reads of one split."""

    views: Tensor  # [N, V, D]
    labels: Tensor  # [N]
    facts: dict | None = None  # of fused.facts_at
    weather: Tensor | None = None  # [N], -1: not known
    patches: Tensor | None = None  # [N, V, P, D]
    masks: Tensor | None = None  # [N, V, P, M]

    def each(self, function):
        """The same of every tensor that is there."""
        values = ({k: function(v) for k, v in x.items()} if isinstance(x, dict) else x for x in self)
        return Set(*(function(x) if isinstance(x, Tensor) else x for x in values))

    def take(self, rows):
        return self.each(lambda x: x[rows])

    def to(self, device):
        return self.each(lambda x: x.to(device))


# ----- what it reads


def mask_shares(path, boxes, flips, grid, kinds):
    """Share of each patch of each view that the objects of each kind cover, from a picture of codes: [V, P, M]."""
    if not path.exists():  # nothing is there to be seen
        return np.zeros((len(boxes), grid**2, kinds), np.float32)
    codes, shares = np.asarray(Image.open(path)), []
    for (y0, x0, y1, x1), flip in zip(boxes, flips):
        y, x = (np.linspace(a, b, grid + 1).round().astype(int) for a, b in ((y0, y1), (x0, x1)))
        for kind in range(1, kinds + 1):
            sums = np.pad((codes == kind).cumsum(0).cumsum(1), ((1, 0), (1, 0)))[np.ix_(y, x)]
            cells = np.diff(np.diff(sums, axis=0), axis=1) / np.maximum(np.outer(np.diff(y), np.diff(x)), 1)
            shares.append(cells[:, ::-1] if flip else cells)
    return np.stack(shares).reshape(len(boxes), kinds, -1).swapaxes(1, 2).astype(np.float32)


def read_masks(source, layout, grid, kinds):
    """[N, V, P, M] of all pictures of a source."""
    folder, (_, flips), out = source.root / "_labels" / "masks", layout_of(layout), []
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; masks need pictures of codes there, as make_roadwork draws")
    for path in source.rows.texts("path"):
        with Image.open(source.root / path) as file:
            turn, size = data.turn_of(file)
        boxes = data.view_boxes([size], layout or "centre")[0][:, 0]
        out.append(mask_shares((folder / path).with_suffix(".png"), boxes, flips, grid, kinds))
    return torch.from_numpy(np.stack(out))


def read_set(classifier, part, view, args, weights_sha256, fields, weather, switches, device, name):
    """Everything of one split: (Source, Table) -> Set; features from the cache where they are."""
    source, table = part
    framing = features.Framing(view | {"layout": args.views, "pool": classifier.pool, "layers": classifier.layers},
                               (), 0, 0)  # fmt: skip
    images, rows = features.images_sha256(source, table, framing), np.arange(len(source))
    cache = Path(args.cache) if args.cache else Path(args.out).parent / "features"

    def ask(what, function):
        found = each_view(function, source, rows, args.views, view, device, 96, args.workers or 1, f"{name}, {what}")
        return found, np.zeros(0)

    views, _ = features.cached(cache, weights_sha256, images, functools.partial(ask, "views", classifier.features))
    if (bad := ~np.isfinite(views).all((1, 2))).any():
        raise ValueError(f"features of {bad.sum()} pictures of {name} are NaN or infinite; broken weights?")
    facts = fused.facts_at(source, rows, {**fields, **weather})
    told = facts.pop(*weather) if weather else None
    patches = masks = None
    if switches["masks"]:
        grid = view["size"] // classifier.backbone.patch_size
        if classifier.layers > 1 or classifier.pool == "both":
            raise ValueError("masks: patches and views must have the same features: use --features mean, --layers 1")
        if (size := views.nbytes * grid**2) > PATCH_BYTES:
            raise ValueError(f"masks: patches of {len(views)} pictures take {size / 2**30:.1f} GB; use smaller --size")
        todo = functools.partial(ask, "patches", lambda x: classifier.backbone(x).patches.flatten(1))
        patches, _ = features.cached(cache, weights_sha256, images + " patches", todo)
        patches = torch.from_numpy(patches).unflatten(2, (grid**2, -1))
        masks = read_masks(source, args.views, grid, switches["masks"])
    found = Set(torch.from_numpy(views), torch.from_numpy(table.labels), facts or None, told, patches, masks)
    return found.to(device)


# ----- the fit


@torch.no_grad()
def look(model, part):
    """-> log loss and MCC on a Set, without touching the mode it leaves the model in."""
    logits = model.eval()(part.views, part.facts).logits
    said, labels = logits.argmax(1).cpu().numpy(), part.labels.cpu().numpy()
    return F.cross_entropy(logits, part.labels).item(), float(metrics.mcc(labels, said))


def fit(model, train, select, objective, seed, steps=400, batch=64, lr=1e-3, decay=0.01, every=20, patience=0,
        drop=0.3, order=None, say=None):  # fmt: skip
    """AdamW, warmed up over a tenth of the updates, then a cosine to 0 -> (model, [(step, log loss, mcc), ...]).

    The weights with the lowest log loss on val_select are kept: on some hundred pictures MCC takes few values. Rows
    (order(step), or drawn here) and what is left out of metadata are functions of (seed, step).
    """
    model.standardise(train.views)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=decay)
    story, best, fields, rises = [], None, len(train.facts or {}), max(1, steps // 10)
    for step in progress(range(steps), desc="fusion", unit="update"):
        random = np.random.default_rng((seed, step))
        rows = order(step) if order else random.choice(len(train.labels), min(batch, len(train.labels)), False)
        part = train.take(torch.from_numpy(rows))
        known = torch.from_numpy(random.random((len(rows), fields)) >= drop).to(part.labels.device) if fields else None
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / rises, (1 + math.cos(math.pi * step / steps)) / 2)
        out = model.train()(part.views, part.facts, known, part.patches)
        targets = F.one_hot(part.labels, out.logits.shape[1]).float()
        loss, _ = combined_loss(objective(out.logits, targets), out, part.weather, part.masks)
        if not loss.isfinite():
            raise ValueError(f"update {step + 1}: the loss is not finite; use a lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            story.append((step + 1, *look(model, select)))
            if best is None or story[-1][1] < best[1]:
                best = len(story), story[-1][1], copy.deepcopy(model.state_dict())
            if say:
                say(step + 1, {"loss": loss.item(), "val_loss": story[-1][1], "val_mcc": story[-1][2]})
            if patience and len(story) - best[0] >= patience:
                break
    model.load_state_dict(best[2])
    return model.eval(), story


def train(vit, weights_sha256, parts, objective, facts, args, device):
    """Fits the fusion of --tune on (Source, Table) of train and val_select; writes config.json, best.pth, last.pth.

    facts: what a checkpoint says of its run.
    """
    out, (switches, more), source, classes = Path(args.out), read_options(args.tune), parts[0][0], len(facts["classes"])
    fields = fused.read_fields(source, [name for name in more["metadata"].split("+") if name])
    told = fused.read_fields(source, [more["weather"]]) if more["weather"] else {}
    if set(told) & set(fields):
        raise ValueError(f"weather={more['weather']} is metadata already, so that telling it is trivial: choose one")
    width = vit.dim * args.layers * (2 if facts["pool"] == "both" else 1)
    classifier = Classifier(vit.to(device), Head(width, classes), facts["pool"], args.layers).eval()
    sets = [read_set(classifier, part, facts["eval_view"], args, weights_sha256, fields, told, switches, device, name)
            for part, name in zip(parts, ("train", "val_select"))]  # fmt: skip
    torch.manual_seed(args.seed)
    switches |= {"weather": len(told[more["weather"]]) if told else 0}
    model, log = fused.build(width, classes, switches, fields).to(device), loop.Log(out, 0, args.steps, quiet=False)
    state = {"args": vars(args), "arch": vit.arch, **facts, "fusion": {"switches": switches, "fields": fields}}
    write_json(out / "config.json", {"version": 1, **state, **loop.circumstances(device, 1)})
    model, story = fit(model, *sets, objective, args.seed, args.steps, args.batch_size, args.lr[1], args.weight_decay,
                       args.eval_every, args.patience, more["drop"], say=log.numbers,
                       order=lambda step: source.order(args.seed, step, args.batch_size))  # fmt: skip
    step, loss, mcc = min(story, key=lambda line: line[1])
    log.event(step, f"log loss {loss:.4f} and MCC {mcc:.3f} on val_select: the lowest loss")
    log.close()
    weights = checkpoint.pack_weights(fused.FusedClassifier(vit, model, facts["pool"], args.layers))
    state |= {"step": step, "images": step * args.batch_size, "student": weights, "teacher": weights, "optimizer": {},
              "best": {"step": step, "value": mcc}, "looked": step}  # fmt: skip
    path = checkpoint.save(checkpoint.step_path(out, step), state)
    for name in ("best.pth", "last.pth"):
        checkpoint.point_last(out, path, name)
