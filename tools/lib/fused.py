"""A backbone and the trained fusion of its views as one classifier; what is known of a picture beside its views.

    net = FusedClassifier(vit, Fusion(vit.dim, 2, fields=sizes_of(fields)), "cls", 1, fields)
    out = net(views, facts_at(source, rows, fields))         # views [N, V, 3, side, side] -> fusion.Fused

fields: {name: "gps" (columns lat and lon), "text" (column text) or the known values of the column of that name}, of
labels.csv in the data folder. What a picture lacks there is missing, which Fusion knows how to read.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn

import data
from model import Classifier
from tools.lib.cli import shown
from tools.lib.files import to_number
from tools.lib.fusion import Fusion, hash_text

COLUMNS = {"gps": ("lat", "lon"), "text": ("text",)}  # where a field comes from, if not from the column of its name


def pooled(tokens, pool):
    return [tokens.cls] * (pool != "mean") + ([tokens.patches.mean(1)] if pool != "cls" else [])


class FusedClassifier(Classifier):
    """Its head is a Fusion, which reads all views of a picture."""

    def __init__(self, backbone, fusion, pool="cls", layers=1, fields=None):
        nn.Module.__init__(self)
        width = backbone.dim * layers * (2 if pool == "both" else 1)
        if len(fusion.centre) != width:
            raise ValueError(f"the fusion is for {len(fusion.centre)} features, {pool} of {layers} layers has {width}")
        self.backbone, self.head, self.pool, self.layers, self.fields = backbone, fusion, pool, layers, fields or {}

    def forward(self, views, facts=None, known=None, chunk=96):
        """chunk: views that pass the backbone at once."""
        first = []
        if self.head.prescore is not None and views.shape[1] > 1:
            tokens = self.backbone.intermediate(views[:, 0], self.layers)
            chosen = self.head.prescore.choose(tokens[-1].patches)[:, 1:]
            views = views[torch.arange(len(views), device=views.device)[:, None], chosen]
            first = [torch.cat([part for t in tokens for part in pooled(t, self.pool)], -1)[:, None]]
        x = torch.cat([self.features(some) for some in views.flatten(0, 1).split(chunk)])
        x = torch.cat([*first, x.unflatten(0, views.shape[:2])], 1)
        return self.head(x, facts, known)

    @torch.inference_mode()
    def of_views(self, views, source, rows):
        """Views of rows of a Source -> logits [N, 1, C], by what is known of them too."""
        facts = facts_at(source, rows, self.fields, views.device)
        return self(views, facts).logits[:, None].float().cpu().numpy()

    @torch.inference_mode()
    def of_features(self, x, source, rows):
        """Features [N, V, D] of rows of a Source -> logits [N, 1, C], by what is known of them too; numpy to numpy."""
        facts, device, found = facts_at(source, rows, self.fields), self.head.centre.device, []
        for at in torch.arange(len(x)).split(1024):
            some = facts and {name: value[at].to(device) for name, value in facts.items()}
            found.append(self.head(torch.from_numpy(x)[at].to(device), some).logits.float().cpu().numpy())
        return np.concatenate(found)[:, None]


def sizes_of(fields):
    """For Fusion: numbers of categories instead of their names."""
    return {name: kind if isinstance(kind, str) else len(kind) for name, kind in fields.items()} or None


def build(dim, classes, switches, fields):
    """Fusion of a checkpoint's plain values."""
    return Fusion(dim, classes, **switches, fields=sizes_of(fields))


def read_fields(source, names):
    """Names such as gps, weather -> fields, with the values that the training pictures have."""
    fields = {}
    for name in names:
        for column in COLUMNS.get(name, (name,)):
            if column not in source.rows.columns:
                there = [c for c in source.rows.columns if c not in ("path", "group", "series", "bytes", "label")]
                raise ValueError(f"labels.csv has no column {shown(column)} for {shown(name)}; its facts are "
                                 f"{', '.join(there) or 'none'}; gps needs lat and lon")  # fmt: skip
        values = sorted({text.strip() for text in source.rows.texts(name)} - {""}) if name not in COLUMNS else name
        if not len(values):
            raise ValueError(f"labels.csv: column {shown(name)} is empty for all pictures of train")
        fields[name] = values
    return fields


def texts_of(source, rows, column):
    """A column of some rows; texts that are not there are empty."""
    if column not in source.rows.columns:
        return [""] * len(rows)
    return [text.strip() for text in source.rows.take(np.asarray(rows)).texts(column)]


def degrees(text, most):
    value = to_number(text)
    return value if abs(value) <= most else math.nan


def facts_at(source, rows, fields, device="cpu"):
    """{field: tensor} of some rows, for Fusion; None without fields."""
    facts = {}
    for name, kind in fields.items():
        if kind == "gps":
            pairs = zip(texts_of(source, rows, "lat"), texts_of(source, rows, "lon"))
            facts[name] = torch.tensor([[degrees(lat, 90), degrees(lon, 180)] for lat, lon in pairs])
        elif kind == "text":
            facts[name] = hash_text(texts_of(source, rows, "text"))
        else:
            place = {value: k for k, value in enumerate(kind)}
            facts[name] = torch.tensor([place.get(text, -1) for text in texts_of(source, rows, name)])
    return {name: value.to(device) for name, value in facts.items()} or None


# ----- masks of objects


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
    folder, out = source.root / "_labels" / "masks", []
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; masks need pictures of codes there, as make_roadwork draws")
    for path in source.rows.texts("path"):
        with data.open_photo(source.root / path) as file:
            turn, size = data.turn_of(file)
        boxes, flips = data.view_boxes([size], layout)
        out.append(mask_shares((folder / path).with_suffix(".png"), boxes[:, 0], flips, grid, kinds))
    return torch.from_numpy(np.stack(out))
