"""Training of fusion.Fusion on features that a frozen backbone gives of views: seconds, once these are extracted.

    switches, more = read_options("fusion:keep=8,depth=1,metadata=gps+weather")
    model, story = fit(model, train, select, losses.soft_cross_entropy, seed=0)         # train, select: Set

Letters: N pictures, V views, D features, P patches of a view, F fields, M kinds of objects in masks.
"""

import argparse
import copy
import inspect
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoint
import data
from model import Classifier, Head
from tools.lib import features, fused, loop, metrics, samples
from tools.lib.classifiers import each_view
from tools.lib.cli import shown, technique
from tools.lib.files import write_json
from tools.lib.fusion import Prescore, combined_loss
from tools.lib.progress import progress

PATCH_BYTES = 2**31  # of patch features that training on masks may hold in memory


def fusion(width=0, keep=0, pyramid=False, depth=0, heads=4, gated=True, experts=0, pool="mil", hidden=0,
           consistency=False, metadata="", weather="", masks=0, drop=0.3, prescore=0):  # fmt: skip
    """Options of --tune fusion. The first nine and consistency: see fusion.Fusion. metadata: facts such as
    gps+weather+text, each left out with probability `drop` while training; weather: a column that an auxiliary head
    tells; masks: kinds of objects in _labels/masks that another tells patch by patch; prescore: so many views pass the
    backbone beside the whole one, which chooses them."""


def read_options(text):
    """fusion:keep=8 -> (switches of Fusion, other options)"""
    _, given = technique(text, {"fusion": fusion})
    defaults = {name: p.default for name, p in inspect.signature(fusion).parameters.items()}
    for name, value in given.items():
        least = int(name == "heads")
        if type(defaults[name]) is int and not (type(value) is int and least <= value <= 4096):
            raise ValueError(f"{text}: {name} is {shown(value)}, expected a whole number from {least} to 4096")
    options = defaults | given
    more = {name: options.pop(name) for name in ("metadata", "weather", "drop", "prescore")}
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


class Reading(NamedTuple):
    """How features of one split come about, or from the cache."""

    classifier: Classifier
    source: data.Source
    table: samples.Table  # a row for each image of the source
    args: argparse.Namespace
    view: dict
    weights_sha256: str
    device: torch.device
    name: str  # of the split

    def get(self, what, function, layout):
        """function(views) of all views of a layout, [N, V, ...]"""
        net, args = self.classifier, self.args
        framing = self.view | {"layout": layout, "pool": net.pool, "layers": net.layers, "what": what}
        images = features.images_sha256(self.source, self.table, features.Framing(framing, (), 0, 0))
        cache = Path(args.cache) if args.cache else Path(args.out).parent / "features"

        def ask():
            rows, name = np.arange(len(self.source)), f"{self.name}, {what}"
            found = each_view(function, self.source, rows, layout, self.view, self.device, 96, args.workers or 1, name)
            return found, np.zeros(0)

        found, _ = features.cached(cache, self.weights_sha256, images, ask)
        if (bad := ~np.isfinite(found).all((1, 2))).any():
            raise ValueError(f"features of {bad.sum()} pictures of {self.name} are not finite; broken weights?")
        return torch.from_numpy(found).to(self.device)

    def patches(self, layout):
        """[N, V, P, D]"""
        vit = self.classifier.backbone
        found = self.get("patches", lambda x: vit(x).patches.flatten(1), layout)
        return found.unflatten(2, (-1, vit.dim))


def read_set(reading, fields, weather, masks):
    """Everything that training reads of one split -> Set."""
    net, source, layout = reading.classifier, reading.source, reading.args.views
    views = reading.get("views", net.features, layout)
    facts = fused.facts_at(source, np.arange(len(source)), {**fields, **weather})
    told, patches, truth = facts.pop(*weather) if weather else None, None, None
    if masks:
        grid = reading.view["size"] // net.backbone.patch_size
        if net.layers > 1 or net.pool == "both":
            raise ValueError("masks: patches and views must have the same features: use --features mean, --layers 1")
        if (size := views.nbytes * grid**2) > PATCH_BYTES:
            raise ValueError(
                f"masks: patches of {len(views)} pictures take {size / 2**30:.1f} GB; use a smaller --size"
            )
        patches, truth = reading.patches(layout), fused.read_masks(source, layout, grid, masks)
    return Set(views, torch.from_numpy(reading.table.labels), facts or None, told, patches, truth).to(reading.device)


# ----- the fit


@torch.no_grad()
def look(model, part):
    """-> log loss and MCC on a Set; the model is in eval mode afterwards."""
    logits = model.eval()(part.views, part.facts).logits
    said, labels = logits.argmax(1).cpu().numpy(), part.labels.cpu().numpy()
    return F.cross_entropy(logits, part.labels).item(), float(metrics.mcc(labels, said))


def fit(model, train, select, objective, seed, steps=400, batch=64, lr=1e-3, decay=0.01, every=20, patience=0,
        drop=0.3, order=None, say=None):  # fmt: skip
    """AdamW, warmed up over a tenth of the updates, then a cosine to 0 -> (model, [(step, log loss, mcc), ...]).

    The weights with the lowest log loss on val_select are kept: on some hundred pictures MCC takes few values. Rows
    (order(step), or drawn here), what is left out of metadata and what pruning tries are functions of (seed, step).
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
        torch.manual_seed(int(random.integers(2**62)))  # for the noise of pruning
        out = model.train()(part.views, part.facts, known, part.patches)
        targets = F.one_hot(part.labels, out.logits.shape[1]).float()
        loss, _ = combined_loss(objective(out.logits, targets, step / steps), out, part.weather, part.masks)
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


def cover(layout, side):
    """[V, P] 1 where a view of a picture of 3 to 4 holds the middle of one of the whole view's side x side patches."""
    boxes = data.view_boxes([(3000, 4000)], layout)[0][:, 0] / [3000, 4000, 3000, 4000]
    middles = (np.arange(side) + 0.5) / side
    rows, cols = ((boxes[:, k, None] <= middles) & (middles < boxes[:, k + 2, None]) for k in (0, 1))
    return torch.from_numpy((rows[:, :, None] & cols[:, None]).reshape(len(boxes), -1)).float()


def fit_prescore(scorer, model, part, patches, seed, steps=200, lr=3e-3):
    """Scores learn which views the trained attention looks at, from patches [N, P, D] of the whole view alone."""
    with torch.no_grad():
        wanted = model.eval()(part.views, part.facts).weights[:, 1:]
        wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-9)
    optimizer = torch.optim.AdamW(scorer.scores.parameters(), lr)
    for step in range(steps):
        rows = torch.from_numpy(np.random.default_rng((seed, step, 1)).integers(len(patches), size=64))
        loss = F.cross_entropy(scorer(patches[rows])[:, 1:], wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def add_prescore(model, readings, sets, keep, args, log, step):
    """Gives a trained fusion its Prescore -> what that is made with; logs what it costs on val_select."""
    if not data.find_layout(args.views).whole or not 0 < keep < sets[0].views.shape[1] - 1:
        raise ValueError(
            f"prescore={keep}: --views {args.views} must begin with the whole and have more views than that"
        )
    patches = [reading.patches("whole")[:, 0] for reading in readings]  # [N, P, D]
    made = [patches[0].shape[2], keep, sets[0].views.shape[1], patches[0].shape[1]]
    scorer = Prescore(*made).to(patches[0].device)
    with torch.no_grad():
        scorer.regions.copy_(cover(args.views, math.isqrt(made[3])))
    fit_prescore(scorer, model, sets[0], patches[0], args.seed)
    with torch.no_grad():
        at = scorer.choose(patches[1])
    select = sets[1]._replace(views=sets[1].views[torch.arange(len(at), device=at.device)[:, None], at])
    (loss, mcc), (full, best) = look(model, select), look(model, sets[1])
    words = f"{keep + 1} of {made[2]} views, chosen on the whole one: MCC {mcc:.3f} instead of {best:.3f}, log loss "
    log.event(step, words + f"{loss:.4f} instead of {full:.4f} on val_select")
    model.prescore = scorer
    return made


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
    net = Classifier(vit.to(device), Head(width, classes), facts["pool"], args.layers).eval()
    readings = [Reading(net, *part, args, facts["eval_view"], weights_sha256, device, name)
                for part, name in zip(parts, ("train", "val_select"))]  # fmt: skip
    sets = [read_set(reading, fields, told, switches["masks"]) for reading in readings]
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
    if more["prescore"]:
        switches["prescore"] = add_prescore(model, readings, sets, more["prescore"], args, log, step)
    log.close()
    weights = checkpoint.pack_weights(fused.FusedClassifier(vit, model, facts["pool"], args.layers))
    state |= {"step": step, "images": step * args.batch_size, "student": weights, "teacher": weights, "optimizer": {},
              "best": {"step": step, "value": mcc}, "looked": step}  # fmt: skip
    path = checkpoint.save(checkpoint.step_path(out, step), state)
    for name in ("best.pth", "last.pth"):
        checkpoint.point_last(out, path, name)
