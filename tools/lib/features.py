"""Features of a frozen backbone: extracted once, cached under the hash of (weights, images, framing).

Letters: n samples, b of them at once, S crop scales, P parts (cls, mean patch, patches in the nodule's box),
D features, N patches of a view.
"""

import functools
import hashlib
import json
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import data
from checkpoint import atomic_write
from tools.lib import fits, judge
from tools.lib.cli import shown
from tools.lib.progress import progress
from tools.lib.slices import slice_name

PARTS = {"cls": [0], "mean": [1], "box": [2]}  # what a backbone gives; all: side by side
PIXELS = 16  # side of the raw-pixel baseline
VALUES = 1 << 22  # pixel values that are padded and made float at once: 16 MB, however large the batch
CPU_VIEWS = 32  # per forward on a CPU: 96 of ViT-S take 0.37 GB more and the same 11.3 s of two cores (2026-11)


class Framing(NamedTuple):
    """How samples become views."""

    view: dict  # data.eval_view
    crop_mm: tuple  # () for whole images
    batch: int
    workers: int


def read_sample(source, table, k, framing, grid):
    """-> pixels around the crops [3, h, w], crops in them [S, 4], share of each patch in the nodule's box [S, N]."""
    i, size = int(table.rows[k]), framing.view["size"]
    if table.centres is None:
        return *data.read_view(source, i, None, size), np.zeros((1, grid**2), np.float32)
    spacing = np.array([source.rows.columns[f"spacing_{axis}"][i] for axis in "yx"])
    half = np.array(framing.crop_mm)[:, None] / 2 / spacing
    centre = table.centres[k]
    corners = np.concatenate([centre - half, centre + half], 1)
    boxes = data.eval_boxes([source.size(i)] * len(half), corners)  # [S, 4]
    cell = (boxes[:, 2:] - boxes[:, :2]) / grid
    at = boxes[:, None, :2] + (np.arange(grid) + 0.5)[:, None] * cell[:, None]  # [S, grid, 2]
    reach = np.maximum(table.sizes[k, 1] / 2 / spacing, cell / 2 + 1e-6)  # at least the patch that holds the centre
    near = np.abs(at - centre) <= reach[:, None]
    inside = (near[:, :, None, 0] & near[:, None, :, 1]).reshape(len(half), -1).astype(np.float32)
    return *data.read_view(source, i, boxes, size), inside / inside.sum(1, keepdims=True)


def rendered(samples, view, device, flips=None):
    """Pixels and boxes [S, 4] of n samples, one after the other -> views [n, S, 3, side, side]; flips [S]; None: none.

    Few enough at once are padded and rendered that memory depends on VALUES, not on the size of the pictures.
    """
    views, images, boxes = [], [], []

    def render():
        pixels, at = data.pad_to_one_size(images).to(device), np.stack(boxes, 1)  # [S, b, 4]
        mirrored = np.zeros(len(at), bool) if flips is None else flips
        views.append(data.render_views(pixels, view, at, mirrored).transpose(0, 1))
        images.clear(), boxes.clear()

    for pixels, at in samples:
        if images and (len(images) + 1) * max(p.numel() for p in (pixels, *images)) > VALUES:
            render()
        images.append(pixels)
        boxes.append(at)
    render()
    return torch.cat(views)


def make_views(source, table, members, framing, grid, device):
    """Views [b * S, 3, side, side] and patch weights [b * S, N] of some samples."""
    weights = []

    def samples():
        for k in members:
            pixels, crops, inside = read_sample(source, table, k, framing, grid)
            weights.append(inside)
            yield pixels, crops

    views = rendered(samples(), framing.view, device).flatten(0, 1)
    return views, torch.from_numpy(np.concatenate(weights)).to(device)


def ahead(function, items, workers):
    """function(item) in order, computed by threads while the caller works."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.inference_mode()
def extract(vit, source, table, framing, device, name):
    """-> features [n, S, P, D] float32 and raw pixels [n, S, 3 * 16 * 16], with a bar of samples."""
    vit, grid = vit.to(device), framing.view["size"] // vit.patch_size
    scales = max(len(framing.crop_mm), 1) if table.centres is not None else 1
    batch = framing.batch if torch.device(device).type == "cuda" else min(framing.batch, CPU_VIEWS)
    step = max(1, batch // scales)
    batches = [range(k, min(k + step, len(table.rows))) for k in range(0, len(table.rows), step)]
    features, pixels = [], []
    with progress(total=len(table.rows), desc=name, unit="sample") as bar:
        todo = functools.partial(make_views, source, table, framing=framing, grid=grid, device=device)
        for views, inside in ahead(todo, batches, framing.workers):
            tokens = vit(views)
            pooled = [tokens.cls, tokens.patches.mean(1)]
            pooled += [torch.einsum("bn,bnd->bd", inside, tokens.patches)] if table.centres is not None else []
            features.append(torch.stack(pooled, 1).unflatten(0, (-1, scales)).cpu().numpy())
            pixels.append(F.adaptive_avg_pool2d(views, PIXELS).flatten(1).unflatten(0, (-1, scales)).cpu().numpy())
            bar.update(len(views) // scales)
    return np.concatenate(features), np.concatenate(pixels)


def images_sha256(source, table, framing):
    """Of all that decides the views: index, slices, files by size and time of change, places, framing."""
    files = [source.path(int(i)) for i in table.rows]
    stats = {path: path.stat() for path in set(files)}
    facts = [source.index_sha256, framing.view, framing.crop_mm, source.encoding]
    facts += [[slice_name(source, int(i)), stats[f].st_size, stats[f].st_mtime_ns]
              for i, f in zip(table.rows, files)]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts).encode())
    for array in (table.centres, table.sizes):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cached(folder, weights, images, make):
    """(features, pixels) from folder/<hash>.npz, or made and kept there."""
    path = folder / f"{hashlib.sha256(f'{weights} {images} 2'.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                return file["features"], file["pixels"]
        except (*data.BROKEN, zipfile.BadZipFile):
            print(f"{path} is damaged: extracted again")
    features, pixels = make()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda f: np.savez(f, features=features, pixels=pixels))
    return features, pixels


def predictors(vit, weights_sha256, source, table, framing, device, seeds, cache, which, scales):
    """{predictor: (classifier, [X per repeat])} of a backbone and its baselines; extracts what the cache lacks.

    which: of PARTS, the features of the probe; scales: average or concat.
    """
    images = images_sha256(source, table, framing)

    def features_of(net, name, weights):
        todo = functools.partial(extract, net, source, table, framing, device, name)
        features, pixels = cached(cache, weights, images, todo)
        if bad := np.flatnonzero(~np.isfinite(features).all((1, 2, 3))).tolist():
            first = shown(table.ids[bad[0]])
            raise ValueError(f"{name}: features of {len(bad)} samples are NaN, first {first}; broken weights?")
        return features, pixels

    features, pixels = features_of(vit, "probe", weights_sha256)
    parts = PARTS.get(which, list(range(features.shape[2])))
    untrained = []
    for seed in range(seeds):
        name = f"random {json.dumps(vit.arch)} {seed}"
        untrained.append(features_of(*judge.random_backbones(vit.arch, seed), f"random {seed}", name)[0])
    X, *others = (fits.flatten(f, scales, parts) for f in (features, *untrained))
    return fits.predictors(X, others, pixels.reshape(len(pixels), -1).astype(np.float64), table.sizes)
