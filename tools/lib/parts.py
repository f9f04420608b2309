"""Parts of the work that need no trainer, measured: rendering, views of photographs, adapters, predictions, fusion of
views, reading, the index, DICOM. Each takes a point, its plain values, and gives rows of the bench's report.
"""

import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from statistics import median

import numpy as np
import pydicom
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
from model import ADAPTER_NORMS, Classifier, Head, adapted_layers, add_adapters, build_vit
from tools.lib.classifiers import layout_of, logits_of
from tools.lib.cli import ROOT
from tools.lib.fused import FusedClassifier
from tools.lib.fusion import Fusion
from tools.lib.timing import CPU, alternate, as_row, copying, gemm, ratio, share_of, took


def pillow_render(pictures, dtype, plan):
    """data.render with Pillow cutting each crop; HU (mode F) cannot be blurred there."""
    groups = []
    for views, size in ((slice(0, 2), plan.recipe.global_size), (slice(2, None), plan.recipe.local_size)):
        boxes, flips, sigmas = (a[views] for a in (plan.boxes, plan.flips, plan.sigmas))
        out = np.empty((*flips.shape, 3, size, size), np.float32)
        for v, b in np.ndindex(flips.shape):
            y0, x0, y1, x1 = boxes[v, b].astype(int)
            for channel, picture in enumerate(pictures[b]):
                crop = picture.crop((x0, y0, x1, y1)).resize((size, size), Image.Resampling.BICUBIC)
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips[v, b] else crop
                if crop.mode == "F":
                    out[v, b, channel] = np.asarray(crop)
                else:
                    crop = crop.filter(ImageFilter.GaussianBlur(float(sigmas[v, b]))) if sigmas[v, b] else crop
                    out[v, b] = np.asarray(crop).transpose(2, 0, 1)
        groups.append(data.normalise(data.intensities(torch.from_numpy(out), dtype, plan, views).flatten(0, 1)))
    return data.Crops(*groups, None)


def measure_render(point, device):
    """Views of whole slices, in turns with Pillow; the products that run are counted as they run."""
    torch.set_num_threads(1)
    source, count = data.open_source(point["data"]), 8 if device.type == "cpu" else 64
    images = torch.stack([source.read(i) for i in np.arange(count) * 7 % len(source)])
    recipe = dataclasses.replace(data.RECIPES["ct"], field=(1.0, 1.0))  # from whole slices, as photographs are cut
    plan = data.place(data.plan(0, 0, range(count), recipe), [images.shape[2:]] * count)
    if images.dtype == torch.uint8:
        pictures = [[Image.fromarray(x.permute(1, 2, 0).numpy())] for x in images]
    else:
        pictures = [[Image.fromarray(plane) for plane in x.numpy().astype(np.float32)] for x in images]
    ways = {"ours": functools.partial(data.render, images.to(device), plan)}
    ways["Pillow"] = functools.partial(pillow_render, pictures, images.dtype, plan)
    if device.type != "cpu":
        ways["compiled"] = functools.partial(data.render, images.to(device), plan, True)
    with FlopCounterMode(display=False) as counter:
        ways["ours"]()
    times, limits = alternate(ways, device, point["seconds"], gemm(device))
    share = share_of(limits["ours"], counter.get_total_flops() / 1e12, times["ours"])
    note = f"{ratio(times['Pillow'], times['ours']):.2f} x Pillow, crop by crop on one thread"
    note += f"; compiled {ratio(times['ours'], times['compiled']):.2f} x as fast" if "compiled" in times else ""
    more = dict(seconds=times, limits=limits)
    return [as_row(point["setting"], count / median(times["ours"]), "images/s", share, "GEMM", note, **more)]


def pillow_views(path, boxes, size, draft):
    """The same boxes of a JPEG, one by one; draft: decoded no larger than the smallest box needs."""
    with Image.open(path) as file:
        width, height = file.size
        if draft:
            needed = max(size / (box[2] - box[0]) for box in boxes), max(size / (box[3] - box[1]) for box in boxes)
            file.draft("RGB", (math.ceil(width * needed[1]), math.ceil(height * needed[0])))
        image, y, x = file.convert("RGB"), file.height / height, file.width / width
        views = [image.resize((size, size), Image.Resampling.BICUBIC, (x0 * x, y0 * y, x1 * x, y1 * y))
                 for y0, x0, y1, x1 in boxes]  # fmt: skip
    return [np.asarray(view) for view in views]


def thin_products(layer, x, bias=None):
    """What adapters are measured against: a linear layer, and per chosen piece the two products of plain LoRA."""
    parts = list(F.linear(x, layer.weight, layer.bias if bias is None else bias).chunk(layer.pieces, -1))
    for i, a, b in zip(layer.chosen, *(t.chunk(len(layer.chosen)) for t in (layer.lora_a, layer.lora_b))):
        parts[i] = parts[i] + layer.scale * F.linear(F.linear(x, a), b)
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def adapted_update(point, way, device):
    """A function that does one supervised update of a classifier with the adapters of `way`."""
    vit = build_vit(point["arch"], layerscale=0.1)
    norm = "lora" if way == "thin" else way
    add_adapters(vit, point["rank"], point["rank"], norm, point["targets"])
    for layer in adapted_layers(vit).values() if way == "thin" else ():
        layer.forward = functools.partial(thin_products, layer)
    net = Classifier(vit, Head(vit.dim, 2)).to(device).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-4, fused=True)
    images = torch.randn(point["batch"], 3, point["size"], point["size"], device=device)
    labels = torch.arange(point["batch"], device=device) % 2

    def update():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return update


def measure_adapters(point, device):
    """Supervised updates with each kind of adapter in turns, beside LoRA written as two thin products."""
    updates = {way: adapted_update(point, way, device) for way in ("thin", *ADAPTER_NORMS)}
    times, _ = alternate(updates, device, point["seconds"])
    rows = []
    for name, seconds in times.items():
        more = dict(way=name, seconds=seconds, factor=ratio(seconds, times["thin"]))
        note = "" if name == "thin" else f"{more['factor']:.3f} x the time of LoRA as two thin products"
        setting = f"{point['setting']}, {'LoRA as two thin products' if name == 'thin' else name}"
        rows.append(as_row(setting, point["batch"] / median(seconds), "images/s", note=note, **more))
    return rows


def measure_views(point, device):
    """Twelve views of each JPEG of 12 megapixels from the file, in turns with Pillow."""
    torch.set_num_threads(1)
    source, view, layout = data.open_source(point["data"]), data.eval_view("photo"), data.LAYOUTS["tiles_and_squares"]
    boxes, flips = data.view_boxes([(3024, 4032)], layout)

    def ours():
        for i in range(len(source)):
            image, at = data.read_view(source, i, layout, view["size"], keep=1)  # what its smallest view needs
            data.render_views(image[None], view, at[:, None], flips)

    def pillow(draft):
        for i in range(len(source)):
            pillow_views(source.path(i), boxes[:, 0].tolist(), view["size"], draft)

    ways = {"ours": ours, "full": functools.partial(pillow, False), "draft": functools.partial(pillow, True)}
    times, _ = alternate(ways, CPU, point["seconds"])
    note = ", ".join(
        f"{ratio(times[name], times['ours']):.2f} x Pillow with a {name} decode" for name in ("full", "draft")
    )
    return [as_row(point["setting"], len(source) / median(times["ours"]), "images/s", note=note, seconds=times)]


def measure_predict(point, device):
    """A 12-megapixel JPEG from file to logits: one at a time (latency), and several (rate), for 1, 10 and 12 views."""
    source, view, rows = data.open_source(point["data"]), data.eval_view("photo", point["size"]), []
    vit = build_vit(point["arch"])
    net = Classifier(vit, Head(vit.dim, 2)).eval()
    for layout in ("whole", "tiles", "tiles_and_squares"):
        ask = functools.partial(logits_of, net, source, layout=layout, view=view, device=device)
        each, seconds = itertools.cycle(range(len(source))), point["seconds"] / 2
        one, _ = alternate({"one": lambda ask=ask, each=each: ask([next(each)], workers=1)}, device, seconds, least=0)
        many, _ = alternate({"all": lambda ask=ask: ask(range(len(source)))}, device, seconds, least=0)
        p50, p95 = (1e3 * float(np.quantile(one["one"], q)) for q in (0.5, 0.95))
        rate, count = len(source) / median(many["all"]), len(layout_of(layout)[1])
        note = f"median; p95 {p95:.0f} ms of {len(one['one'])}; {rate:.3g} pictures/s where several are asked about"
        more = dict(way=layout, seconds=one | many, p95=p95, rate=rate)
        rows.append(as_row(f"{point['setting']}, {count} views", p50, "ms", note=note, **more))
    return rows


FUSED = {  # views of a picture -> (how many there are, switches of Fusion)
    "1 view": (1, {}), "10 views": (10, {}), "12 views": (12, {}),
    "12 views, 8 kept after the backbone": (12, {"keep": 8}),
    "12 views, 7 chosen on the whole one before it": (12, {"prescore": 7}),
}  # fmt: skip


def measure_fusion(point, device):
    """Pictures through a backbone and the fusion of their views, in turns; what pruning saves, and where."""
    vit, size, ways, flops = build_vit(point["arch"]).to(device).eval(), point["size"], {}, {}
    for name, (count, switches) in FUSED.items():
        keep = switches.get("prescore", 0)
        switches = switches | ({"prescore": [vit.dim, keep, count, (size // vit.patch_size) ** 2]} if keep else {})
        net = FusedClassifier(vit, Fusion(vit.dim, 2, **switches)).to(device).eval()
        views = torch.randn(point["batch"], count, 3, size, size, device=device)
        if keep:
            torch.nn.init.ones_(net.head.prescore.regions)
        ways[name] = functools.partial(torch.inference_mode()(net), views)
        with FlopCounterMode(display=False) as counter:
            ways[name]()
        flops[name] = counter.get_total_flops() / point["batch"]
    times, rows = alternate(ways, device, point["seconds"])[0], []
    for name, seconds in times.items():
        factor, rate = ratio(seconds, times["1 view"]), point["batch"] / median(seconds)
        note = f"{flops[name] / 1e9:.3g} GFLOP a picture, {flops[name] / flops['1 view']:.2f} x those of 1 view; "
        note += f"{factor:.2f} x its time; {rate * FUSED[name][0]:.3g} views/s"
        more = dict(way=name, seconds=seconds, factor=factor, flops=flops[name])
        rows.append(as_row(f"{point['setting']}, {name}", rate, "pictures/s", note=note, **more))
    return rows


def measure_read(point, device):
    torch.set_num_threads(1)
    source, workers = data.open_source(point["data"]), point["workers"]
    recipe, ahead = data.RECIPES["photo" if source.encoding == "photo" else "ct"], 1 + 2 * workers
    batches = data.make_loader(source, recipe, 0, range(10**6), 16, workers=workers)
    next(batches)
    rate = copying()

    def read():
        deque(itertools.islice(batches, ahead), 0)

    def limit():
        rate()  # while readers fill their queue again
        gb_s = rate()
        read()  # what they had read ahead
        return gb_s

    (seconds,), (limits,) = (d.values() for d in alternate({"": read}, CPU, point["seconds"], limit))
    seconds, share = [s / ahead for s in seconds], None
    if source.encoding == "hu16-v1":  # every byte read and written once, also those that no view needs
        share = share_of(limits, 16 * 2 * source.read(0).nbytes / 1e9, seconds)
    return [as_row(point["setting"], 16 / median(seconds), "slices/s", share, "copy", seconds=seconds, limits=limits)]


def preprocess(raw, encoding, out=None):
    """The command; without `out` into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"--dataset phantom --workers 1 --format {encoding}".split() + ["--raw", raw, "--out", out or folder]
        command = [sys.executable, ROOT / "tools" / "preprocess_dicom.py", *words]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: the phantom's scout views are rejected
        raise ValueError(f"preprocess_dicom.py ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")


OPENING = """
import json, resource, sys, time
import data
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous")) / 1e3
start, before = time.perf_counter(), anonymous()
source = data.open_source(sys.argv[1])
opened = time.perf_counter() - start
source.order(0, 1, 256)
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps([opened, seconds, before, anonymous(), peak]))
"""


def write_index(root, rows):
    """A synthetic index: series of 50 slices, patients of 8 series."""
    (root / "_index").mkdir(parents=True)
    with open(root / "_index" / "index.csv", "w") as f:
        f.write(",".join(data.INDEX_COLUMNS) + "\n")
        for k in range(rows // 50):
            uid = f"1.2.840.113654.2.55.{10**20 + 7919 * k}"
            ids = f"nlst/{uid}.npy,hu16-v1,nlst,P{k // 8:06d},{uid}.1,{uid},{uid}"
            f.writelines(f"{ids}.{z},{z},{2.5 * z},0.7,0.7,2.5,512,512,10,500,5,505\n" for z in range(1, 51))


def measure_index(point, device):
    """A process that opens an index of many rows and orders an epoch; the first one, which reads the CSV, apart."""
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), point["rows"])
        found = []
        for _ in range(4):
            done = subprocess.run([sys.executable, "-c", OPENING, folder], capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise ValueError(f"opening the index failed: {done.stderr.strip()[-300:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    (first, *_), *later = found
    opened, seconds, before, after, peak = (median(values) for values in zip(*later))
    note = f"first time, from the CSV, {first:.1f} s; with the order of an epoch {seconds:.2f} s, "
    note += f"own memory {before:.0f} -> {after:.0f} MB, peak with shared pages {peak:.0f} MB"
    return [as_row(point["setting"], 1e3 * opened, "ms", note=note, seconds=[row[0] for row in later], all=found)]


def measure_dicom(point, device):
    """The command on few files and on many, in turns: the difference is work, what they share is Python starting."""
    files = {name: sorted(Path(point[name]).rglob("*.dcm")) for name in ("few", "many")}
    ways = {(e, name): functools.partial(preprocess, point[name], e) for e in ("rgb", "hu16") for name in files}
    ways["pydicom"] = lambda: [pydicom.dcmread(file).pixel_array for file in files["many"]]
    times, rows = {name: [] for name in ways}, []
    for _, (name, way) in itertools.product(range(3), ways.items()):
        times[name].append(took(way, CPU))
    alone = [s / len(files["many"]) for s in times["pydicom"]]
    for encoding in ("rgb", "hu16"):
        pairs = zip(times[encoding, "many"], times[encoding, "few"])
        seconds = [(many - few) / (len(files["many"]) - len(files["few"])) for many, few in pairs]
        setting, note = f"{point['setting']} to {encoding}", "one process, once it runs"
        share, more = ratio(alone, seconds), dict(seconds=seconds)
        rows.append(as_row(setting, 1 / median(seconds), "slices/s", share, "pydicom alone", note, **more))
    return rows
