"""Classifiers on disk, what they say of pictures, and what they said as a prediction table.

    classifier, facts = read_classifier("runs/photos/best.pth")        # EMA weights, adapters merged, eval mode
    logits = logits_of(classifier, source, rows, facts["layout"], facts["eval_view"], device)     # [N, V, C]
    export(run / "predictions", ids, groups, labels, logits, facts_of(facts, source, "val_select"))

A picture's logits do not depend on the pictures beside it: batched and one by one agree to 1e-6.
"""

from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
from model import Classifier, Head, load_backbone
from tools.lib import fused, provenance, tables
from tools.lib.cli import shown
from tools.lib.features import CPU_VIEWS, ahead, rendered
from tools.lib.files import wrong_field
from tools.lib.fusion import probabilities
from tools.lib.progress import progress

FIELDS = {"classes": list, "pool": str, "layers": int, "layout": tables.TEXT, "eval_view": dict, "encoding": str}
TENSORS = ("student", "teacher", "gram", "optimizer")
ALIKE = 1e-6  # logits of all samples within this are the same


def read_classifier(path):
    """A supervised checkpoint -> (Classifier with its EMA weights in eval mode, all that it says beside tensors).

    facts: classes, pool, layers, layout, eval_view, encoding, ..., and sha256 of the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; name the best.pth of a run (a bundle has a flag of its own)")
    before = provenance.stamp(path)
    state = checkpoint.load(path)
    if "classes" not in state:
        raise ValueError(f"{path} is no classifier: it names no classes; train one with train_probe.py --tune")
    classes = state["classes"]
    if wrong := wrong_field(state, FIELDS):
        raise ValueError(f"{path} {wrong}; use another checkpoint of the same run")
    check_classes(path, classes)
    facts = {key: value for key, value in state.items() if key not in TENSORS}
    facts["sha256"] = data.file_sha256(path)
    own = {key.removeprefix("head."): value for key, value in state["teacher"].items() if key.startswith("head.")}
    classifier = build(path, load_backbone(path, quiet=True), make_head(path, own, facts), facts)
    provenance.refuse_change(path, before)
    return classifier, facts


def make_head(path, own, facts):
    """Tensors of a head by name -> Head, or what reads all views of a picture at once (--tune fusion)."""
    try:
        if "fusion" in facts:
            head = fused.build(len(own["centre"]), len(facts["classes"]), **facts["fusion"])
        else:
            head = Head(own["last_layer.weight"].shape[1], len(facts["classes"]))
        head.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in own.items()})
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        words = f"its head is not one of {len(facts['classes'])} classes ({shown(error, 200)})"
        raise ValueError(f"{path}: {words}; use another checkpoint of the same run") from None
    return head


def check_classes(path, classes):
    if not all(isinstance(c, str) for c in classes) or len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"{path}: classes {shown(classes)} must be two or more different names")


def build(path, backbone, head, facts):
    """Backbone and head as one; facts of a file, which may be wrong, become a sentence with its name."""
    if not 1 <= facts["layers"] <= backbone.depth:
        raise ValueError(f"{path}: layers is {facts['layers']}, its backbone has {backbone.depth}")
    if facts["eval_view"]["size"] % backbone.patch_size:
        raise ValueError(f"{path}: views of {facts['eval_view']['size']} pixels, patches of {backbone.patch_size}")
    try:
        if facts["layout"] is not None:
            data.find_layout(facts["layout"])
        if "fusion" in facts:
            whole = fused.FusedClassifier(backbone, head, facts["pool"], facts["layers"], facts["fusion"]["fields"])
        else:
            whole = Classifier(backbone, head, facts["pool"], facts["layers"])
        return whole.eval().requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ----- logits


def layout_of(text):
    """A layout as text -> (what data.read_view takes, flips [V]). None: the square of data.eval_boxes."""
    if text is None:
        return None, np.zeros(1, bool)
    layout = data.find_layout(text)
    return layout, data.view_boxes(np.ones((1, 2)), layout)[1]


def views_of(source, rows, layout, view, device):
    """Views [len(rows), V, 3, size, size] of some pictures."""
    layout, flips = layout_of(layout)
    return rendered((data.read_view(source, int(i), layout, view["size"]) for i in rows), view, device, flips)


def looked_at(source, rows, layout, view, device, batch, workers, name):
    """(some of the rows of a Source, their views [n, V, 3, size, size]) one after the other, with a bar of samples."""
    count = len(layout_of(layout)[1])
    parts = [rows[k : k + max(1, batch // count)] for k in range(0, len(rows), max(1, batch // count))]
    with progress(total=len(rows), desc=name, unit="sample") as bar:
        for part, views in zip(parts, ahead(lambda part: views_of(source, part, layout, view, device), parts, workers)):
            yield part, views
            bar.update(len(views))


@torch.inference_mode()
def each_view(function, source, rows, layout, view, device, batch, workers, name):
    """function(views) -> [views, ...] of every view of rows of a Source, as [N, V, ...] float32."""
    found, batch = [], batch if torch.device(device).type == "cuda" else min(batch, CPU_VIEWS)
    for _, views in looked_at(source, rows, layout, view, torch.device(device), batch, workers, name):
        values = torch.cat([function(some) for some in views.flatten(0, 1).split(batch)]).float()
        found.append(values.unflatten(0, views.shape[:2]).cpu().numpy())
    return np.concatenate(found)


def logits_of(classifier, source, rows, layout, view, device="cpu", batch=96, workers=2, name="predict"):
    """What a classifier says of each view of rows of a Source -> logits [N, V, C] float32; of a fused one V is 1.

    layout: text, or None; view: an eval_view; batch: views per forward; workers: threads that read and cut ahead.
    """
    how = source, rows, layout, view, device, batch, workers, name
    classifier = classifier.to(device).eval()
    if isinstance(classifier, fused.FusedClassifier) and classifier.head.prescore is not None:
        return np.concatenate([classifier.of_views(views, source, part) for part, views in looked_at(*how)])
    if isinstance(classifier, fused.FusedClassifier):
        return classifier.of_features(each_view(classifier.features, *how), source, rows)
    return each_view(classifier, *how)


# ----- tables


def facts_of(facts, source, split, labels_sha256=None):
    """Of the .json beside a prediction table. facts: of read_classifier; split: "none" without a contract."""
    known = None if source.index_sha256 is None else str(source.root)  # loose files have no folder
    return {"classes": facts["classes"], "split": split, "layout": facts["layout"],
            "eval_view": facts["eval_view"], "weights_sha256": facts["sha256"], "split_sha256": source.split_sha256,
            "data": known, "labels_sha256": labels_sha256}  # fmt: skip


def refuse_constant(ids, logits):
    """Weights that say the same of every sample have learned nothing."""
    if len(ids) > 1 and np.ptp(logits, 0).max() < ALIKE:
        raise ValueError(f"the logits of all {len(ids)} samples are the same ({logits[0, 0].tolist()}): the weights "
                         "tell nothing apart, so nothing is exported; train longer, or with another --lr")  # fmt: skip


def export(folder, ids, groups, labels, logits, facts, decided=None):
    """Writes folder/<split>.npz, .json and .csv -> path of the npz; refuses NaN, one class, constant logits.

    decided: rules.Decisions of a policy, for the CSV; without one its probabilities are the mean's.
    """
    table = tables.checked(f"the table of {facts['split']}", ids, groups, labels, logits, facts)
    refuse_constant(table.ids, table.logits)
    path = tables.write(folder, table)
    p, sets, decision = decided or (probabilities(table.logits), None, None)
    tables.write_csv(path.with_suffix(".csv"), table, p, decision, sets)
    return path
