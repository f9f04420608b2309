"""How fast is each part of the work on this machine, and how near to its physical limits?

    python tools/bench.py step                                   # whole updates: images/s, MFU, share of each phase
    python tools/bench.py all --quick                            # everything at toy sizes
    python tools/bench.py all --json tools/bench_results/NAME.json
    python tools/bench.py show --markdown                        # the README's table, from tools/bench_results/*.json

Every point is a process of its own. What is compared takes turns within one process (a, b, c, a, b, c, ...), with the
matrix product or the copy that is its limit before and after each, so ratios hold on a busy machine where times do not.
Rates are medians over turns, ratios are means of their quotients without the two extremes: between runs on a shared
machine these moved less than medians of quotients (7% against 8%, 9 turns, nine runs in ten, 2026-11), and one turn in
which the machine stood still does not move them, as it moved quotients of sums (by 24%).
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import io
import itertools
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

import checkpoint
import data
from model import ARCHS, build_vit
from tools.lib.cli import ROOT, Parser, positive, run
from tools.lib.files import csv_text
from tools.lib.loop import flops_per_image, git_commit, memory_gb
from tools.lib.machine import DTYPES, check_gemm, describe, synchronize

RESULTS = ROOT / "tools" / "bench_results"
WHATS = "step render read dicom save probe sweep scale".split()
WAYS = (["", "per crop", "accumulate 2", "accumulate 4"], ["", "compile"])  # apart: compiling may fail, takes memory
SETTINGS = ("", "compile", "checkpointing", "compile checkpointing")  # what the sweep tries
CPU = torch.device("cpu")
PATIENCE_S = 3600  # a point that takes longer hangs


# ----- clocks


def took(function, device, calls=1):
    """Seconds per call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def alternate(ways, device, seconds, limit=lambda: 1.0, least=0.3):
    """{name: function} -> seconds per call and the limit beside it, both as {name: [one value per turn]}.

    `limit` gives a rate; that of a sample is the mean of those right before and right after. `seconds`: of all turns
    for each way, three turns at least. `least`: of a sample; quick functions are called several times in one.
    """
    for function in ways.values():  # compiles, fills caches
        function()
    calls = {name: max(1, math.ceil(least / max(took(f, device), 1e-6))) for name, f in ways.items()}
    times, limits = {name: [] for name in ways}, {name: [] for name in ways}
    start, before, turns = time.perf_counter(), limit(), 0
    while turns < 3 or time.perf_counter() - start < seconds * len(ways):
        for name, function in ways.items():
            times[name].append(took(function, device, calls[name]))
            after = limit()
            limits[name].append((before + after) / 2)
            before = after
        turns += 1
    return times, limits


def ratio(over, under):
    """Mean over turns, without the highest and the lowest."""
    return mean(sorted(a / b for a, b in zip(over, under))[1:-1])


def share(work, seconds, rates):
    """What `work` takes at the rates beside it, over what it took."""
    return ratio([work / r for r in rates], seconds)


def sampled(function, work, device):
    """A function that measures the rate of another, in samples of a tenth of a second."""
    function()  # fills caches and fresh pages
    calls = max(1, math.ceil(0.1 / took(function, device, 2)))
    return lambda: work / took(function, device, calls)


def gemm(device, precision="fp32"):
    """A function that measures TFLOP/s of a square product large enough to show the machine at its best."""
    n = check_gemm(device, precision)["size"]
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision][0])
    return sampled(functools.partial(torch.mm, a, a, out=torch.empty_like(a)), 2 * n**3 / 1e12, device)


def copying():
    """A function that measures GB/s of a copy in main memory, read and written."""
    source = torch.ones(1 << 28, dtype=torch.uint8)  # far beyond any cache
    return sampled(functools.partial(torch.empty_like(source).copy_, source), 2 * len(source) / 1e9, CPU)


class Phases:
    """Time of named calls, without waiting for the device: events on CUDA, the clock elsewhere."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def call(self, name, function, *args, **kwargs):
        start = self.mark()
        result = function(*args, **kwargs)
        self.marks.append((name, start, self.mark()))
        return result

    def seconds(self):
        """{name: seconds}, for after a synchronize."""
        sums = {}
        for name, start, end in self.marks:
            sums[name] = sums.get(name, 0) + (start.elapsed_time(end) / 1e3 if self.cuda else end - start)
        return sums


@contextlib.contextmanager
def watched(phases):
    """What train_ssl.py calls in an update, timed where it looks it up."""
    import train_ssl as t

    places = [("render", data, "render"), ("centering", t, "center"), ("backward", torch.autograd, "backward")]
    places += [("losses", t.losses, f"{name}_loss") for name in ("dino", "ibot", "koleo", "gram")]
    places += [("clip", t, "clip_gradients"), ("EMA", t, "update_teacher")]
    with contextlib.ExitStack() as stack:
        for name, owner, attribute in places:
            timed = functools.partial(phases.call, name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        yield


def row(setting, value, unit, of=None, limit="", note="", **more):
    """One line of the table: `of` is the share of the limit that is reached; `more` goes to the JSON file alone."""
    return dict(setting=setting, value=value, unit=unit, of=of, limit=limit, note=note, **more)


def peak_gb(device):
    """Most memory taken so far: of the card, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kB on Linux


# ----- step, sweep and image sizes: updates as train_ssl.py does them


def train_args(point, way):
    """The resolved flags of train_ssl.py for one way to do the update."""
    import train_ssl as t

    batch = int(point["flags"]["batch-size"])
    micro = batch // int(way.split()[-1]) if "accumulate" in way else batch
    flags = point["flags"] | {"micro-batch": micro, "koleo-group": math.gcd(16, micro), "data": point["data"]}
    flags |= {} if point.get("gram") else {"gram-weight": 0}
    words = [f"--{k}={v}" for k, v in flags.items()] + ["--no-split"] + ["--checkpointing"] * ("checkpointing" in way)
    return t.resolve(t.build_parser().parse_args(words + shlex.split(point.get("more", ""))), 1)


def per_crop(forward_crops, crops, masks=None, keep=None, rope=None):
    """VisionTransformer.forward_crops in one pass per crop of the batch instead of one for all."""
    b, out = len(crops[0]) // 2, []
    for i, group in enumerate(crops):
        mask = itertools.repeat(None) if masks is None or masks[i] is None else masks[i].split(b)
        draw = [rope[i]] if rope else None
        parts = [forward_crops([crop], [m], None, draw)[0] for crop, m in zip(group.split(b), mask)]
        out.append(type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts))))
    return out


def make_ways(point, device, phases):
    """{name: one way to do the update} on the same weights: modules are copied, parameters are not."""
    import train_ssl as t

    args, cuda, ways = train_args(point, point["ways"][0]), device.type == "cuda", {}
    student, teacher = (m.to(device) for m in t.build(args))
    gram = copy.deepcopy(teacher.backbone) if point.get("gram") else None
    groups = t.param_groups(student, args.layer_decay, args.patch_lr)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), fused=True)
    optimizer.step = functools.partial(phases.call, "AdamW", optimizer.step)
    source = data.open_source(point["data"])
    recipes = t.make_recipes(args, source.encoding)
    for name in point["ways"]:
        args = train_args(point, name)
        own = [m and copy.deepcopy(m, {id(p): p for p in m.parameters()}) for m in (student, teacher, gram)]
        own[0].backbone.checkpointing = args.checkpointing
        for module in own if "compile" in name.split() else ():
            for block in getattr(module, "backbone", module).blocks if module else ():
                block.compile()
        if name == "per crop":
            own[0].backbone.forward_crops = functools.partial(per_crop, own[0].backbone.forward_crops)
        for phase, module in zip(("student", "teacher", "Gram teacher"), own):
            if module:
                module.forward = functools.partial(phases.call, phase, module.forward)
        batches = data.make_loader(
            source, recipes, args.seed, range(10**6), args.batch_size, args.micro_batch, 0, 1,
            args.workers if cuda else 0, student.backbone.patch_size, t.masking(args), pin_memory=cuda,
        )  # fmt: skip
        ways[name] = SimpleNamespace(**dict(zip(("student", "teacher", "gram"), own)), args=args, device=device,
            source=source, recipes=recipes, optimizer=optimizer, batches=batches, phases=phases)  # fmt: skip
    return ways


def update(way):
    """One whole update: the lines of the training loop in train_ssl.py, its one wait for the device included."""
    import train_ssl as t

    a, n, depth = way.args, way.args.batch_size // way.args.micro_batch, way.student.backbone.depth
    now = t.values_at(a.steps - 1, a)  # late: the weight of Gram is above 0
    w = t.Weights(now.teacher_temp, a.student_temp, a.w_dino, a.w_ibot, a.w_koleo, now.gram, a.koleo_group,
                  a.centering, a.precision)  # fmt: skip
    read = [way.phases.call("read", next, way.batches) for _ in range(n)]
    micro = [
        t.with_draws(t.to_micro(batch, way.device, way.gram is not None), a, depth, batch.step, i)
        for i, batch in enumerate(read)
    ]
    way.optimizer.zero_grad(set_to_none=True)
    terms, _ = t.ssl_update(way.student, way.teacher, way.gram, micro, w, {})
    norms = t.clip_gradients(way.student, a.clip)
    finite = torch.stack([terms["loss"], *norms.values()]).isfinite().all()
    if t.largest_over_ranks([~finite], way.device)[0]:
        raise ValueError("loss or gradient is not finite: measure with other --flags")
    t.set_rates(way.optimizer, now)
    way.optimizer.step()
    t.update_teacher(way.teacher, way.student, now.ema)


def shares(way, seconds):
    """{phase: share of the time} of updates in a row; what readers had queued is used up first."""
    count, one = max(2, min(48, math.ceil(5 / seconds))), functools.partial(update, way)
    took(one, way.device, count if way.phases.cuda else 1)
    way.phases.marks.clear()
    whole = count * took(one, way.device, count)
    found = {name: s / whole for name, s in way.phases.seconds().items()}
    return found | {"other": 1 - sum(found.values())}


def measure_step(point, device):
    phases, plain, rows = Phases(device), point["ways"][0], []
    with watched(phases):
        ways = make_ways(point, device, phases)
        updates, way = {name: functools.partial(update, way) for name, way in ways.items()}, ways[plain]
        took(updates[plain], device, 2)  # the first one makes the state of AdamW
        peak = peak_gb(device)
        times, limits = alternate(updates, device, point["seconds"], gemm(device, way.args.precision))
        parts = shares(way, median(times[plain]))
    B, flops = way.args.batch_size, functools.partial(flops_per_image, way.student, way.recipes[0], way.args)
    tflop = B * flops(way.gram is not None) / 1e12
    for name, seconds in times.items():
        rates = limits[name]
        more = dict(way=name, flags=point["flags"], seconds=seconds, limits=rates, tflop=tflop, x=point.get("x"))
        note = f"{tflop / median(seconds):.3g} of {median(rates):.3g} TFLOP/s"
        if name == plain:
            more |= dict(peak_gb=peak, phases=parts, gram_flops=1 - B * flops(False) / tflop / 1e12)
            note += f" (Gram {100 * more['gram_flops']:.1f}% of them)" * (way.gram is not None)
            note += f", peak {peak:.3g} GB; "
            note += ", ".join(f"{k} {100 * parts[k]:.1f}%" for k in sorted(parts, key=parts.get, reverse=True))
        else:
            more["gain"] = ratio(times[plain], seconds)
            note += f", {more['gain']:.2f} x the plain way"
        of, setting = share(tflop, seconds, rates), f"{point['setting']} {name}".strip()
        rows.append(row(setting, B / median(seconds), "images/s", of, "GEMM", note, y=median(seconds) / B, **more))
    return rows


def measure_sweep(point, device):
    if device.type == "cpu" and sys.platform == "linux":  # an error of ours beats the kernel's choice of a victim
        free_kb = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * 1024 * int(free_kb)), hard))
    return measure_step(point, device)


# ----- the other parts


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


def product_flops(plan, views, out, device):
    """Of the two products that cut these views: on a CPU the bands of data.cut_each, else whole boxes."""
    boxes, flips, sigmas = (torch.as_tensor(a[views]).flatten(0, 1) for a in (plan.boxes, plan.flips, plan.sigmas))
    h, w = (boxes[:, 2:] - boxes[:, :2]).T
    y, x, rows = h, w, out  # columns of each axis matrix that `rows` of it are multiplied with
    if device.type == "cpu":
        axes = [(boxes[:, k], boxes[:, 2 + k], flips * k, sigmas, boxes[:, k].floor(), out) for k in (0, 1)]
        y, x = (torch.tensor([sum(b - a for a, b in bands) for bands in data.reach(*axis)]) for axis in axes)
        rows = data.BLOCK
    return 2 * 3 * rows * (y * w + x * out).sum().item()


def measure_render(point, device):
    torch.set_num_threads(1)
    source, B = data.open_source(point["data"]), 8 if device.type == "cpu" else 64
    ids = np.arange(B) * 7 % len(source)
    images = torch.stack([source.read(i) for i in ids])
    recipe = dataclasses.replace(data.RECIPES["ct"], field=(1.0, 1.0))  # from whole slices, as photographs are cut
    plan = data.place(data.plan(0, 0, range(B), recipe), [images.shape[2:]] * B)
    if images.dtype == torch.uint8:
        pictures = [[Image.fromarray(x.permute(1, 2, 0).numpy())] for x in images]
    else:
        pictures = [[Image.fromarray(plane) for plane in x.numpy().astype(np.float32)] for x in images]
    ways = {"ours": functools.partial(data.render, images.to(device), plan)}
    ways["Pillow"] = functools.partial(pillow_render, pictures, images.dtype, plan)
    times, limits = alternate(ways, device, point["seconds"], gemm(device))
    tflop = sum(product_flops(plan, views, size, device) for views, size in (
        (slice(0, 2), recipe.global_size), (slice(2, None), recipe.local_size))) / 1e12  # fmt: skip
    gain = ratio(times["Pillow"], times["ours"])
    of = {"ours": share(tflop, times["ours"], limits["ours"]), "Pillow": None}
    note = {"ours": f"{gain:.2f} x Pillow on one thread", "Pillow": "crop by crop, the same intensities"}
    return [
        row(f"{point['setting']}, {k}", B / median(s), "images/s", of[k], "GEMM", note[k], seconds=s, limits=limits[k])
        for k, s in times.items()
    ]


def first_batch(source, start, workers):
    """A loader that begins at update `start` and has given its first batch."""
    data.epoch_order.cache_clear()
    recipe = data.RECIPES["photo" if source.encoding == "photo" else "ct"]
    batches = data.make_loader(source, recipe, 0, range(start, start + 10**6), 16, workers=workers)
    next(batches)
    return batches


def measure_read(point, device):
    torch.set_num_threads(1)
    source, workers = data.open_source(point["data"]), point["workers"]
    firsts = {0: [], 10**6: []}
    for _, (step, times) in itertools.product(range(3), firsts.items()):
        start = time.perf_counter()
        batches = first_batch(source, step, workers)
        times.append(time.perf_counter() - start)
        del batches  # its workers end here, outside the clock
    batches, rate, ahead = first_batch(source, 0, workers), copying(), 1 + 2 * workers

    def read():
        deque(itertools.islice(batches, ahead), 0)

    def limit():
        rate()  # while readers fill their queue again
        found = rate()
        read()  # what they had read ahead
        return found

    (seconds,), (rates,) = (d.values() for d in alternate({"": read}, CPU, point["seconds"], limit))
    seconds, of = [s / ahead for s in seconds], None
    if source.encoding == "hu16-v1":  # every byte is read once and written once
        of = share(16 * 2 * source.read(0).nbytes / 1e9, seconds, rates)
    note = f"first batch of 16 after {median(firsts[0]):.2f} s, from step 1,000,000 {median(firsts[10**6]):.2f} s"
    more = dict(note=note, seconds=seconds, first_s=firsts, limits=rates)
    return [row(point["setting"], 16 / median(seconds), "slices/s", of, "copy", **more)]


def preprocess(raw, folder, encoding, number):
    from tools import preprocess_dicom

    words = f"--dataset phantom --workers 1 --format {encoding} --out {folder}/{next(number)} --raw".split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        preprocess_dicom.main([*words, raw])


def plain_read(raw):
    """Slices that pydicom opened and decoded, and no more."""
    from tools.make_phantom import read_volume

    return sum(len(read_volume(folder)[0]) for folder in sorted(Path(raw).glob("*/*/*")))


def measure_dicom(point, device):
    with tempfile.TemporaryDirectory() as folder:
        todo, number = functools.partial(preprocess, point["raw"], folder), itertools.count()
        ways = {name: functools.partial(todo, name, number) for name in ("rgb", "hu16")}
        ways["pydicom"] = functools.partial(plain_read, point["raw"])
        times, _ = alternate(ways, device, point["seconds"])
    count, rows = plain_read(point["raw"]), []
    for name in ("rgb", "hu16"):
        of, rate = ratio(times["pydicom"], times[name]), count / median(times[name])
        more = dict(limit="pydicom alone", note="one process", seconds=times[name])
        rows.append(row(f"{point['setting']} to {name}", rate, "slices/s", of, **more))
    return rows


def measure_save(point, device):
    import train_ssl as t

    (way,), limit, stalls = make_ways(point, device, Phases(device)).values(), copying(), []
    for p in way.student.parameters():
        p.grad = torch.zeros_like(p)
    way.optimizer.step()
    way.batches.close()  # its readers would take part
    nets = way.student, way.teacher, None
    state = t.pack_state(1, way.args, way.source, way.source.groups, way.recipes, *nets, way.optimizer, {})
    with tempfile.TemporaryDirectory() as folder:
        saver, rates, start = checkpoint.Saver(folder, 1, 0), [limit()], time.perf_counter()
        while len(stalls) < 4 or time.perf_counter() - start < 4 * point["seconds"]:  # most of it on the disk
            saver.save(len(stalls) + 1, state)
            stalls.append(saver.stall_s)
            saver.wait()
            rates.append(limit())
        if saver.error:
            raise OSError(saver.error)
        gb = checkpoint.step_path(folder, len(stalls)).stat().st_size / 1e9
    first, *later = stalls
    writes = [event["seconds"] for event in saver.events]
    note = f"{gb:.2f} GB; the first {1e3 * first:.0f} ms; written behind the run in {median(writes):.1f} s"
    of = share(2 * gb, later, [(a + b) / 2 for a, b in itertools.pairwise(rates[1:])])
    more = dict(seconds=stalls, writes=writes, limits=rates)
    return [row(point["setting"], 1e3 * median(later), "ms stall", of, "copy", note, **more)]


def measure_probe(point, device):
    import train_probe

    source, size = data.open_source(point["data"]), point["size"]
    rows = np.arange(point["samples"]) % len(source)
    table = train_probe.Table(rows.tolist(), rows, rows, [], rows, rows, None, None)
    recipe = train_probe.Recipe(data.eval_view(source.encoding, size), (), 32, 2)
    vit = build_vit(point["arch"]).eval().to(device)
    views = torch.randn(32, 3, size, size, device=device)
    ways = {"extract": functools.partial(train_probe.extract, vit, source, table, recipe, device, "probe")}
    ways["forward"] = torch.inference_mode()(functools.partial(vit, views))
    with contextlib.redirect_stderr(io.StringIO()):
        times, _ = alternate(ways, device, point["seconds"])
    of = len(rows) / 32 * ratio(times["forward"], times["extract"])
    rate = len(rows) / median(times["extract"])
    return [row(point["setting"], rate, "images/s", of, "the forward", "read, cut, forward, pooled", seconds=times)]


def write_index(folder, count):
    """An index of `count` rows over one small volume: 250 slices a series, two series a patient."""
    (folder / "_index").mkdir(parents=True)
    np.save(folder / "s.npy", np.random.default_rng(0).integers(-1000, 500, (252, 128, 128)).astype(np.int16))
    ids = (["s.npy", "hu16-v1", "toy", f"P{i // 500}", f"t{i // 250}", f"1.2.{i // 250}"] for i in range(count))
    rest = 2.5, 0.7, 0.7, 2.5, 128, 128, 0, 128, 0, 128
    rows = ([*ids_of, f"{ids_of[-1]}.{i % 250 + 1}", i % 250 + 1, *rest] for i, ids_of in enumerate(ids))
    text = csv_text(itertools.chain([data.INDEX_COLUMNS], rows))
    checkpoint.write_text(folder / "_index" / "index.csv", text)


def measure_index(point, device):
    """Time and memory until the first batch of an index is there, deep into the run."""
    before, start = memory_gb(torch.device("cpu")), time.perf_counter()
    first_batch(data.open_source(point["data"]), 10**6, 0)
    seconds, mb = time.perf_counter() - start, 1e3 * (memory_gb(torch.device("cpu")) - before)
    return [row(point["setting"], seconds, "s to a batch", note=f"{mb:.0f} MB", x=point["x"], y=seconds, mb=mb)]


def measure_start(point, device):
    """Seconds from the command to the end of the first update of train_ssl.py."""
    facts = {k: point[k] for k in ("data", "device")}
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--{k}={v}" for k, v in (point["flags"] | facts | {"out": folder}).items()]
        command = [sys.executable, "-u", ROOT / "train_ssl.py", "--no-split", "--log-every=1", "--steps=1", *words]
        command += ["--gram-start=1"]  # as the first of many updates: Gram anchoring begins later
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            line = next((line for line in process.stdout if line.startswith("step 1: loss")), None)
            seconds = time.perf_counter() - start
            process.communicate()
    if line is None:
        raise ValueError(f"train_ssl.py made no update; see for yourself: python train_ssl.py {' '.join(words)}")
    return [row(point["setting"], seconds, "s to the first update", note="from the command on")]


# ----- points, processes, tables


def step_point(args, data_folder, flags, precision, ways, **more):
    """One grid point of updates; `flags` are those of train_ssl.py."""
    small = {"global-size": 96, "local-size": 48, "prototypes": 4096} if args.quick else {"prototypes": 65536}
    f = {"global-size": 224, "local-size": 96} | small | flags | {"precision": precision}
    setting = f"{f['arch']} batch {f['batch-size']} {precision}, 2x{f['global-size']} + 8x{f['local-size']}"
    setting += f", {f['prototypes']} prototypes" + ", Gram" * more.get("gram", False) + f" {args.flags}".rstrip()
    return dict(what="step", flags=f, ways=ways, data=data_folder, more=args.flags, setting=setting) | more


def precisions_of(cuda, cpuinfo="/proc/cpuinfo"):
    """What is worth measuring: a CPU without bf16 instructions imitates them, 5 times slower than fp32 (2026-11)."""
    with contextlib.suppress(OSError):  # avx512_bf16, amx_bf16, or ARM's bf16
        return ["bf16"] if cuda else ["fp32", "bf16"][: 1 + ("bf16" in Path(cpuinfo).read_text())]
    return ["fp32"]


def points_of(what, args, cuda, work):
    """The points of one WHAT, as plain values."""
    hu16, rgb, photo = (f"{work}/{name}" for name in ("hu16", "rgb", "photo"))
    archs = args.arch or (["vit_tiny"] if args.quick else ["vit_small", "vit_base", "vit_large"][: 3 if cuda else 1])
    batches, precisions = args.batch_size or [64 if cuda else 4], args.precision or precisions_of(cuda)
    plain, side = {"arch": archs[0], "batch-size": batches[0]}, 96 if args.quick else 224
    if what == "step":
        for arch, batch, precision in itertools.product(archs, batches, precisions):
            flags = {"arch": arch, "batch-size": batch}
            yield from (step_point(args, hu16, flags, precision, ways) for ways in WAYS)
            if precision == precisions[0]:
                yield step_point(args, hu16, flags, precision, ["compile" * cuda], gram=True)
    elif what == "render":
        for device, folder in itertools.product(["cpu", "cuda"][: 1 + cuda], (rgb, hu16)):
            place = "one CPU thread" if device == "cpu" else "GPU"
            yield dict(data=folder, device=device, setting=f"{Path(folder).name}, 2x224 + 8x96 of 512x512, {place}")
    elif what == "read":
        counts = [0, 1] if args.quick else sorted({0, 1, 2, os.cpu_count()})
        for folder, workers in itertools.product((rgb, hu16, photo), counts):
            setting = f"{Path(folder).name}, {workers} workers"
            yield dict(data=folder, workers=workers, setting=setting)
    elif what == "dicom":
        yield dict(raw=f"{work}/raw", setting="uncompressed 512x512")
    elif what == "save":
        yield step_point(args, hu16, plain, "fp32", [""], what="save")
    elif what == "probe":
        setting = f"{archs[0]}, {side} pixels, fp32"
        yield dict(data=hu16, arch=archs[0], size=side, samples=64 if args.quick else 128, setting=setting)
    elif what == "sweep":
        seconds = 8 if args.seconds is None else args.seconds  # there are many points
        for arch, way in itertools.product(archs, SETTINGS[: 1 if args.quick else 4]):
            flags = {"arch": arch, "batch-size": 8 if cuda else 1}
            flags |= {} if args.quick else {"prototypes": 8192}  # what train_ssl.py takes by default
            yield step_point(args, hu16, flags, precisions[-1], [way], what="sweep", seconds=seconds)
    elif what == "scale":
        for count in (10**3, 10**4, 10**5) if args.quick else (10**3, 10**4, 10**5, 10**6):
            yield dict(kind="index", data=f"{work}/index_{count}", x=count, setting=f"{count} rows")
        for size in (side // 2, side, 2 * side):
            flags = plain | {"global-size": size, "local-size": size // 3 if args.quick else size * 3 // 7}
            yield step_point(args, hu16, flags, precisions[-1], [""], what="scale", kind="step", x=size**2)
        flags = step_point(args, hu16, plain, precisions[0], [""])["flags"]
        setting = f"{archs[0]} batch {batches[0]}, index of 250000 rows"
        yield dict(kind="start", data=f"{work}/index_250000", flags=flags, setting=setting)


def make_data(work, todo, quick):
    """What the points read: phantom DICOM of 512x512 pixels, both encodings, JPEG photographs, long indices."""
    tool = [sys.executable, ROOT / "tools" / "make_phantom.py", "--size=512", "--slices=16", f"--out={work}/raw"]
    subprocess.run([*tool, f"--patients={1 if quick else 4}"], check=True, stdout=subprocess.DEVNULL)
    for name in ("hu16", "rgb"):
        preprocess(f"{work}/raw", work, name, iter([name]))
    (work / "photo").mkdir()
    for i, file in enumerate(sorted((work / "rgb").rglob("*.png"))):
        Image.open(file).resize((640, 480)).save(work / "photo" / f"{i}.jpg", quality=90)
    for point in todo:
        if "index_" in point.get("data", ""):
            write_index(Path(point["data"]), int(point["data"].split("_")[-1]))


def run_point(point):
    """Its rows, measured in a process of its own; of one that dies, a row that says why."""
    command = [sys.executable, __file__, point["what"], "--point", json.dumps(point)]
    facts = {k: point[k] for k in ("what", "setting", "device")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return [facts | {"error": f"no answer in {PATIENCE_S} s"}]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return [facts | {"error": f"exit code {done.returncode}: {last[:200]}"}]
    return [facts | row for row in json.loads(done.stdout.splitlines()[-1])]


def measure(point):
    """Rows of one point, in this process."""
    from train_ssl import setup_distributed

    device = setup_distributed(point["device"])[2]
    try:
        return globals()[f"measure_{point.get('kind', point['what'])}"](point, device)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        return [{"error": "does not fit in memory"}]


def measure_all(points, most):
    """All rows; a sweep doubles its micro-batch until one does not fit or `most` is reached."""
    rows, todo = [], deque(points)
    with tqdm(total=len(todo), unit="point") as bar:
        while todo:
            point = todo.popleft()
            bar.set_description(f"{point['what']}: {point['setting'][:50]}")
            found = run_point(point)
            rows += found
            bar.update()
            size = 2 * point["flags"]["batch-size"] if point["what"] == "sweep" else most + 1
            if size <= most and "error" not in found[0]:
                setting = point["setting"].replace(f"batch {size // 2}", f"batch {size}")
                todo.appendleft(point | {"flags": point["flags"] | {"batch-size": size}, "setting": setting})
                bar.total += 1
    return rows


def exponents(rows):
    """Growth of time and memory, fitted on logarithms of everything measured (constant parts pull it down)."""
    rows = [r for r in rows if r["what"] == "scale" and r.get("x")]
    kinds = [("s to a batch", "y", "start-up time ~ index rows"), ("s to a batch", "mb", "its memory ~ index rows")]
    for unit, key, name in (*kinds, ("images/s", "y", "seconds per image ~ pixels")):
        xy = [(r["x"], max(r[key], 1e-3)) for r in rows if r["unit"] == unit]
        if len(xy) > 1:
            power = np.polyfit(*np.log(xy).T, 1)[0]
            yield dict(what="scale", device=rows[0]["device"], **row(name, power, "growth exponent"))


def advice(rows, images):
    """Of the sweep: the flags to use, and how long so many images take."""
    fits = [r for r in rows if r["what"] == "sweep" and "error" not in r]
    for arch in dict.fromkeys(r["flags"]["arch"] for r in fits):
        best = max((r for r in fits if r["flags"]["arch"] == arch), key=lambda r: r["of"])
        micro = int(best["flags"]["batch-size"])
        words = [f"--koleo-group {math.gcd(16, micro)}"] * (micro % 16 > 0)  # as it was measured
        words += [f"--{word}" for word in best["way"].split()]
        flags = " ".join([f"--arch {arch} --micro-batch {micro}", *words])
        yield f"{flags}: {best['value']:.3g} images/s, {images:.3g} images in {images / best['value'] / 86400:.3g} days"


def cells(row):
    if "error" in row:
        return [row["what"], row["setting"], row["error"], "", ""]
    of = f"{100 * row['of']:.0f}% of {row['limit']}" if row.get("of") else ""
    return [row["what"], row["setting"], f"{row['value']:.3g} {row['unit']}", of, row.get("note", "")]


def table(report, markdown, no_gpu):
    """The lines of one report: where and when, then a row for each number, and one for what no report has."""
    m, quick = report["machine"], " (--quick: toy sizes)" * report["quick"]
    where = f"{m['cpu'] if m['device'] == 'cpu' else m['name']}, {m['threads']} threads, torch {m['torch']}"
    lines = [f"{where}, commit {report['commit']}, {report['date']}{quick}"]
    rows = [["what", "setting", "result", "share of the limit", "notes"], *map(cells, report["rows"])]
    if no_gpu:
        rows.append(["step", "data-centre GPU", "not measured", "", ""])
    if markdown:
        rows.insert(1, ["---"] * 5)
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        return [*lines, "", *("| " + " | ".join(row) + " |" for row in rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return lines + ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]


def build_parser():
    p = Parser(__doc__)
    p.add_argument("what", choices=[*WHATS, "all", "show"], help="show: print tools/bench_results/*.json")
    p.add_argument("--quick", action="store_true", help="toy sizes; under 10 minutes for all of it on 2 CPU cores")
    p.add_argument("--json", type=Path, help="also write every number here")
    p.add_argument("--markdown", action="store_true", help="print the table as the README wants it")
    p.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    p.add_argument(
        "--arch", nargs="+", choices=list(ARCHS), help="of step and sweep; default: ViT-S, on a GPU also B and L"
    )
    p.add_argument("--batch-size", type=positive, nargs="+", help="of step, and the most of sweep; default: 4, GPU 64")
    p.add_argument(
        "--precision",
        nargs="+",
        choices=["fp32", "bf16"],
        help="of step; default: bf16 on a GPU, else fp32, and bf16 if the CPU has it",
    )
    p.add_argument("--flags", default="", help="further flags of train_ssl.py, in one string")
    p.add_argument("--seconds", type=float, help="turns of each way, 3 at least; step: twice; default: 30, --quick: 8")
    p.add_argument("--images", type=float, default=1e8, help="sweep prints the days that so many images take")
    p.add_argument("--point", help="internal: measure this one point (JSON) and print its rows")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.json and not args.json.parent.is_dir():  # now, not after an hour
        raise FileNotFoundError(f"--json {args.json}: {args.json.parent} is not a folder")
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return 0
    if args.what == "show":
        reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
        no_gpu = all(report["machine"]["device"] == "cpu" for report in reports)
        for report in reports:
            print("\n".join(table(report, args.markdown, no_gpu and report is reports[-1])) + "\n")
        return 0
    from train_ssl import setup_distributed

    device = setup_distributed(args.device)[2]
    usual = 8 if args.quick else 30
    cuda, seconds = device.type == "cuda", usual if args.seconds is None else args.seconds
    with tempfile.TemporaryDirectory() as work:
        points = [
            {"what": what, "device": device.type, "seconds": seconds * (1 + (what == "step"))} | point
            for what in (WHATS if args.what == "all" else [args.what])
            for point in points_of(what, args, cuda, work)
        ]
        make_data(Path(work), points, args.quick)
        most = max(args.batch_size or [1024 if cuda else 2 if args.quick else 16])
        rows = measure_all(points, most)
    rows += exponents(rows)
    machine = describe(device) | {"threads": torch.get_num_threads()}
    now = datetime.datetime.now(datetime.timezone.utc)
    report = dict(version=1, date=f"{now:%Y-%m-%d}", commit=git_commit(), command=sys.argv[1:], quick=args.quick)
    report |= dict(machine=machine, rows=rows)
    if args.json:
        checkpoint.write_text(args.json, json.dumps(report, indent=1))
    print("\n".join([*table(report, args.markdown, not cuda), "", *advice(rows, args.images)]))
    return int(any("error" in row for row in rows if row["what"] != "sweep"))


if __name__ == "__main__":
    run(main)
