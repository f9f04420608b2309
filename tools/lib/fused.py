"""A backbone and the trained fusion of its views as one classifier; what is known of a picture beside its pixels.

    net = FusedClassifier(vit, Fusion(vit.dim, 2, fields=sizes_of(fields)), "cls", 1, fields)
    out = net(views, facts_at(source, rows, fields))         # views [N, V, 3, side, side] -> fusion.Fused

fields: {name: "gps" (columns lat and lon), "text" (column text) or the known values of the column of that name}, of
labels.csv in the data folder. What a picture lacks there is missing, which Fusion knows how to read.
"""

import math

import numpy as np
import torch
from torch import nn

from model import Classifier
from tools.lib.cli import shown
from tools.lib.fusion import Fusion, hash_text

COLUMNS = {"gps": ("lat", "lon"), "text": ("text",)}  # where a field comes from, if not from the column of its name


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
        x = torch.cat([self.features(some) for some in views.flatten(0, 1).split(chunk)])
        return self.head(x.unflatten(0, views.shape[:2]), facts, known)

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
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if abs(value) <= most else math.nan


def facts_at(source, rows, fields):
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
    return facts or None
