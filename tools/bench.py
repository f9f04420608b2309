"""How fast is each part of the work on this machine, and how near to its physical limits?

    python tools/bench.py step                                   # whole updates: images/s, MFU, share of each phase
    python tools/bench.py all --quick                            # everything at toy sizes
    python tools/bench.py all --json tools/bench_results/NAME.json
    python tools/bench.py show                                   # all numbers in tools/bench_results/*.json

Every point is a process of its own. What is compared takes turns within one process (a, b, c, a, b, c, ...), with the
matrix product or the copy that is its limit before and after each, so ratios hold on a busy machine where times do not.
"""

import contextlib
import dataclasses
import datetime
import functools
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
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import torch
from PIL import Image

import checkpoint
import data
import train_ssl
from model import ARCHS
from tools.lib import loop, parts, settings
from tools.lib.cli import ROOT, Parser, above_zero, positive, run
from tools.lib.files import write_json
from tools.lib.machine import describe
from tools.lib.progress import progress
from tools.lib.timing import CPU, Phases, alternate, as_row, copying, gemm, idle_share, peak_gb, ratio, share_of, took

RESULTS = ROOT / "tools" / "bench_results"
WAYS = (["", "accumulate 2", "accumulate 4"], ["", "compile"])  # apart: compiling may fail, and has weights of its own
SETTINGS = ("", "compile", "checkpointing", "compile checkpointing")  # what the sweep tries
PATIENCE_S = 3600  # a point that takes longer hangs


# ----- updates, by the functions of train_ssl.py


class Way(NamedTuple):
    """One way to do the update: a run at step 0, its endless updates, and the values of its last schedules."""

    run: train_ssl.Run
    upcoming: loop.Upcoming
    now: train_ssl.Now


def pieces(name):
    """Into how many micro-batches a way to do the update cuts the batch."""
    return int(name.split()[-1]) if "accumulate" in name else 1


def koleo_group(micro):
    """The largest group of at most 16 samples that divides a micro-batch; of a prime one all of it."""
    return max((n for n in range(2, 17) if micro % n == 0), default=micro)


def train_args(point, name):
    """The resolved flags of train_ssl.py for one way to do the update."""
    batch = int(point["flags"]["batch-size"])
    micro = batch // pieces(name)
    flags = {"micro-batch": micro, "koleo-group": koleo_group(micro), "data": point["data"]}
    flags |= {"gram-start": 0} if point.get("gram") else {"gram-weight": 0}
    words = [f"--{k}={v}" for k, v in (point["flags"] | flags).items()] + ["--no-split"]
    words += [f"--{word}" for word in name.split() if word in ("compile", "checkpointing")]
    return settings.resolve(train_ssl.build_parser().parse_args(words + shlex.split(point.get("more", ""))), 1)


def make_run(args, device):
    """A run at step 0, with its Gram teacher in use if it has one."""
    source = data.open_source(args.data)
    recipes = settings.make_recipes(args, source.encoding)
    made = train_ssl.build_run(args, None, source, recipes, 0, 1, device)
    train_ssl.refresh_gram(made, 0)
    return made


def make_way(made):
    args = made.args
    args.workers = args.workers if made.device.type == "cuda" else 0
    patch_size = made.student.backbone.patch_size
    batches = train_ssl.start_reading(args, made.source, made.recipes, range(10**6), patch_size, 0, 1, made.device)
    prepare = functools.partial(train_ssl.prepared, made)
    upcoming = loop.Upcoming(batches, args.batch_size // args.micro_batch, 10**6, made.device, prepare)
    return Way(made, upcoming, train_ssl.values_at(args.steps - 1, args))  # late: the weight of Gram is above 0


def update(way, clock=contextlib.nullcontext):
    """One whole update, reading included."""
    _, micro_batches = way.upcoming.take(clock)
    ahead = functools.partial(way.upcoming.ahead, clock)
    if train_ssl.one_update(way.run, micro_batches, way.now, ahead=ahead, clock=clock).bad:
        raise ValueError("loss or gradient is not finite: measure with other --flags")


def phase_shares(way, seconds):
    """{phase: share of the time} of updates in a row; what readers had queued is used up first."""
    device, phases = way.run.device, Phases(way.run.device)
    count, one = max(2, min(48, math.ceil(5 / seconds))), functools.partial(update, way, phases)
    took(one, device, count if device.type == "cuda" else 1)
    phases.marks.clear()
    whole = count * took(one, device, count)
    shares = {name: s / whole for name, s in phases.seconds().items()}
    return shares | {"other": 1 - sum(shares.values())}


def host_seconds(way, count):
    """Of the host for each update: with a card all but the one wait for it, else what prepares the update."""
    phases, start = Phases(CPU), time.perf_counter()
    for _ in range(count):
        update(way, phases)
    whole, seconds = time.perf_counter() - start, phases.seconds()
    busy = whole - seconds["wait"] if way.run.device.type == "cuda" else seconds["read"] + seconds["render"]
    return busy / count


def crops_gb(micro_batches):
    """Views of one update: what preparing ahead holds once more."""
    return sum(t.nbytes for m in micro_batches for t in m.crops if t is not None) / 1e9


def words_of_plain(way, seconds, more):
    """Adds to `more` what is measured of the plain way alone -> the same in words."""
    device, count = way.run.device, max(2, min(16, math.ceil(2 / seconds)))
    more |= dict(phases=phase_shares(way, seconds), host_ms=1e3 * host_seconds(way, count))
    words = [
        f"peak {more['peak_gb']:.3g} GB",
        f"host {'busy' if device.type == 'cuda' else 'prepares'} {more['host_ms']:.0f} ms",
    ]
    if device.type == "cuda":
        more |= dict(idle=idle_share(functools.partial(update, way), seconds, count))
        more["ahead_gb"] = crops_gb(way.upcoming.ready[0][1])
        words += [f"card idle {100 * more['idle']:.1f}%", f"crops ahead {more['ahead_gb']:.2g} GB"]
    phases = more["phases"]
    shares = [f"{k} {100 * phases[k]:.1f}%" for k in sorted(phases, key=phases.get, reverse=True)]
    return ", ".join(words) + "; " + ", ".join(shares)


def measure_step(point, device):
    """Ways to do one update in turns, the first of them with its phases and its memory."""
    plain, *others = point["ways"]
    first = make_run(train_args(point, plain), device)
    ways = {plain: make_way(first)}
    begun = {plain: took(functools.partial(update, ways[plain]), device)}  # compiles, makes the state of AdamW
    update(ways[plain])
    peak, batch = peak_gb(device), first.args.batch_size
    for name in others:
        args, same_nets = train_args(point, name), "accumulate" in name
        ways[name] = make_way(dataclasses.replace(first, args=args) if same_nets else make_run(args, device))
        begun[name] = took(functools.partial(update, ways[name]), device)
    updates = {name: functools.partial(update, way) for name, way in ways.items()}
    times, limits = alternate(updates, device, point["seconds"], gemm(device, first.args.precision))
    tflop = batch * loop.flops_per_image(first.student, first.recipes[0], first.args, first.gram is not None) / 1e12
    rows = []
    for name, seconds in times.items():
        more = dict(way=name, flags=point["flags"], seconds=seconds, limits=limits[name], tflop=tflop)
        note = f"{tflop / median(seconds):.3g} of {median(limits[name]):.3g} TFLOP/s"
        if name == plain:
            more["peak_gb"] = peak
            note += ", " + words_of_plain(ways[plain], median(seconds), more)
        else:
            more["gain"] = ratio(times[plain], seconds)
            note += f", {more['gain']:.2f} x the plain way"
        if "compile" in name:
            more["compile_s"] = begun[name] - median(seconds)
            note += f", compiled in {more['compile_s']:.0f} s"
        setting, share = f"{point['setting']} {name}".strip(), share_of(limits[name], tflop, seconds)
        rows.append(as_row(setting, batch / median(seconds), "images/s", share, "GEMM", note, **more))
    return rows


def measure_sweep(point, device):
    if device.type == "cpu" and sys.platform == "linux":  # an error of ours beats the kernel's choice of a victim
        free_kb = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * 1024 * int(free_kb)), hard))
    return measure_step(point, device)


def measure_save(point, device):
    """How long a save holds up the run; it is written behind it."""
    way = make_way(make_run(train_args(point, ""), device))
    update(way)  # makes the state of AdamW
    state, limit, stalls = train_ssl.pack_state(way.run, 1), copying(), []
    with tempfile.TemporaryDirectory() as folder:
        saver, limits, start = checkpoint.Saver(folder, 1, 0), [limit()], time.perf_counter()
        while len(stalls) < 4 or time.perf_counter() - start < 4 * point["seconds"]:  # most of it on the disk
            saver.save(len(stalls) + 1, state)
            stalls.append(saver.stall_s)
            saver.wait()
            limits.append(limit())
        if saver.error:
            raise OSError(saver.error)
        gb = checkpoint.step_path(folder, len(stalls)).stat().st_size / 1e9
    first, *later = stalls
    writes = [event["seconds"] for event in saver.events]
    note = f"{gb:.2f} GB; the first {1e3 * first:.0f} ms; written behind the run in {median(writes):.1f} s"
    share = share_of([(a + b) / 2 for a, b in itertools.pairwise(limits[1:])], 2 * gb, later)
    more = dict(seconds=stalls, writes=writes, limits=limits)
    return [as_row(point["setting"], 1e3 * median(later), "ms stall", share, "copy", note, **more)]


MEASURES = dict(
    step=measure_step, adapters=parts.measure_adapters, render=parts.measure_render, views=parts.measure_views,
    predict=parts.measure_predict, fusion=parts.measure_fusion, read=parts.measure_read, index=parts.measure_index,
    dicom=parts.measure_dicom, save=measure_save, sweep=measure_sweep,
)  # fmt: skip


# ----- points, processes, the report


def step_point(args, folder, flags, precision, ways, **more):
    """One grid point of updates; `flags` are those of train_ssl.py."""
    small = {"global-size": 96, "local-size": 48, "prototypes": 4096} if args.quick else {"prototypes": 65536}
    f = {"global-size": 224, "local-size": 96} | small | flags | {"precision": precision}
    setting = f"{f['arch']} batch {f['batch-size']} {precision}, 2x{f['global-size']} + 8x{f['local-size']}"
    setting += f", {f['prototypes']} prototypes" + ", Gram" * more.get("gram", False) + f" {args.flags}".rstrip()
    return dict(what="step", flags=f, ways=ways, data=folder, more=args.flags, setting=setting) | more


def precisions_of(cuda, cpuinfo="/proc/cpuinfo"):
    """What is worth measuring: a CPU without bf16 instructions imitates them, 5 times slower than fp32 (2026-11)."""
    with contextlib.suppress(OSError):  # avx512_bf16, amx_bf16, or ARM's bf16
        return ["bf16"] if cuda else ["fp32", "bf16"][: 1 + ("bf16" in Path(cpuinfo).read_text())]
    return ["fp32"]


def points_of(what, args, cuda, work):
    """The points of one part, as plain values."""
    hu16, rgb, photo = (f"{work}/{name}" for name in ("hu16", "rgb", "photo"))
    archs = args.arch or (["vit_tiny"] if args.quick else ["vit_small", "vit_base", "vit_large"][: 3 if cuda else 1])
    batches, precisions = args.batch_size or [64 if cuda else 4], args.precision or precisions_of(cuda)
    if what == "step":
        for arch, batch, precision in itertools.product(archs, batches, precisions):
            flags = {"arch": arch, "batch-size": batch}
            fitting = ([way for way in ways if batch % pieces(way) == 0] for ways in WAYS)
            fitting = fitting if args.way is None else [[args.way]]
            yield from (step_point(args, hu16, flags, precision, ways) for ways in fitting)
            if precision == precisions[0] and args.way is None:
                yield step_point(args, hu16, flags, precision, ["compile" * cuda], gram=True)
    elif what == "adapters":
        for arch, targets in itertools.product(archs, ("qv", "all")):
            batch, size = batches[0], 96 if args.quick else 224
            setting = f"{arch} batch {batch} of {size} pixels, rank 16 on {targets}"
            yield dict(arch=arch, batch=batch, size=size, rank=16, targets=targets, setting=setting)
    elif what == "render":
        for device, folder in itertools.product(["cpu", "cuda"][: 1 + cuda], (rgb, hu16)):
            place = "one CPU thread" if device == "cpu" else "GPU"
            yield dict(data=folder, device=device, setting=f"{Path(folder).name}, 2x224 + 8x96 of 512x512, {place}")
    elif what == "views":
        yield dict(data=f"{work}/large", setting="12 views of 224 from a 12-megapixel JPEG, one thread")
    elif what == "predict":
        size = 96 if args.quick else 224
        for arch in archs:
            setting = f"{arch}, a 12-megapixel JPEG in views of {size} pixels"
            yield dict(arch=arch, size=size, data=f"{work}/large", setting=setting)
    elif what == "fusion":
        size, batch = (96, 2) if args.quick else (224, 16 if cuda else 2)
        for arch in archs:
            yield dict(arch=arch, size=size, batch=batch, setting=f"{arch}, {batch} pictures in views of {size} pixels")
    elif what == "read":
        counts = [0, 1] if args.quick else sorted({0, 1, 2, os.cpu_count()})
        for folder, workers in itertools.product((rgb, hu16, photo), counts):
            yield dict(data=folder, workers=workers, setting=f"{Path(folder).name}, {workers} workers")
    elif what == "index":
        rows = 100_000 if args.quick else 10_000_000
        yield dict(rows=rows, setting=f"open {rows:,} rows")
    elif what == "dicom":
        yield dict(few=f"{work}/few", many=f"{work}/raw", setting="uncompressed 512x512")
    elif what == "save":
        flags = {"arch": archs[0], "batch-size": batches[0]}
        more = f"{args.flags} --workers 0"  # readers would take part
        yield step_point(args, hu16, flags, "fp32", [""], what="save", more=more)
    elif what == "sweep":
        seconds = 8 if args.seconds is None else args.seconds  # there are many points
        for arch, way in itertools.product(archs, SETTINGS[: 1 if args.quick else 4]):
            flags = {"arch": arch, "batch-size": 8 if cuda else 1}
            flags |= {} if args.quick else {"prototypes": 8192}  # what train_ssl.py takes by default
            yield step_point(args, hu16, flags, precisions[-1], [way], what="sweep", seconds=seconds)


def make_data(work, quick):
    """What the points read: phantom DICOM of 512x512 pixels, both encodings, JPEG photographs."""
    tool = [sys.executable, ROOT / "tools" / "make_phantom.py", "--size=512", "--slices=64"]
    for name, patients in (("few", 1), ("raw", 3 if quick else 9)):
        command = [*tool, f"--patients={patients}", f"--out={work / name}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for encoding in ("hu16", "rgb"):
        parts.preprocess(work / "raw", encoding, work / encoding)
    (work / "photo").mkdir()
    for i, file in enumerate(sorted((work / "rgb").rglob("*.png"))):
        Image.open(file).resize((640, 480)).save(work / "photo" / f"{i}.jpg", quality=90)
    command = [sys.executable, ROOT / "tools" / "make_roadwork.py", "--images=4", f"--out={work / 'large'}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


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
    device = loop.setup_distributed(point["device"])[2]
    try:
        return MEASURES[point["what"]](point, device)
    except (RuntimeError, MemoryError) as error:
        if not loop.is_out_of_memory(error):
            raise
        return [{"error": "does not fit in memory"}]


def measure_all(points, most):
    """All rows; a sweep doubles its micro-batch until one does not fit or `most` is reached."""
    rows, todo = [], deque(points)
    with progress(total=len(todo), unit="point") as bar:
        while todo:
            point = todo.popleft()
            bar.set_description(f"{point['what']}: {point['setting'][:50]}")
            measured = run_point(point)
            rows += measured
            bar.update()
            size = 2 * point["flags"]["batch-size"] if point["what"] == "sweep" else most + 1
            if size <= most and "error" not in measured[0]:
                setting = point["setting"].replace(f"batch {size // 2}", f"batch {size}")
                todo.appendleft(point | {"flags": point["flags"] | {"batch-size": size}, "setting": setting})
                bar.total += 1
    return rows


def advice(rows, images):
    """Of the sweep: the flags to use, and how long so many images take."""
    fits = [r for r in rows if r["what"] == "sweep" and "error" not in r]
    for arch in dict.fromkeys(r["flags"]["arch"] for r in fits):
        best = max((r for r in fits if r["flags"]["arch"] == arch), key=lambda r: r["share"])
        micro = int(best["flags"]["batch-size"])
        words = [f"--koleo-group {koleo_group(micro)}"] * (micro % 16 > 0)  # as it was measured
        words += [f"--{word}" for word in best["way"].split()]
        flags = " ".join([f"--arch {arch} --micro-batch {micro}", *words])
        yield f"{flags}: {best['value']:.3g} images/s, {images:.3g} images in {images / best['value'] / 86400:.3g} days"


def cells(row):
    if "error" in row:
        return [row["what"], row["setting"], row["error"], "", ""]
    share = f"{100 * row['share']:.0f}% of {row['limit']}" if row["share"] else ""
    value = f"{row['value']:.3g}" if row["value"] < 1000 else f"{row['value']:,.0f}"
    return [row["what"], row["setting"], f"{value} {row['unit']}", share, row["note"]]


def in_lines(report, markdown):
    """One report for people: where and when, then a line for each number."""
    m, quick = report["machine"], " (--quick: toy sizes)" * report["quick"]
    where = f"{m['cpu'] if m['device'] == 'cpu' else m['name']}, {m['threads']} threads, torch {m['torch']}"
    lines = [f"{where}, commit {report['commit']}, {report['date']}{quick}"]
    rows = [["what", "setting", "result", "share of the limit", "notes"], *map(cells, report["rows"])]
    if markdown:
        rows.insert(1, ["---"] * 5)
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        return [*lines, "", *("| " + " | ".join(row) + " |" for row in rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return lines + ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]


# fmt: off
def build_parser():
    p = Parser(__doc__)
    p.add_argument("what", choices=[*MEASURES, "all", "show"], help="show: print tools/bench_results/*.json")
    p.add_argument("--quick", action="store_true", help="toy sizes; under 10 minutes for all of it on 2 CPU cores")
    p.add_argument("--json", type=Path, help="also write every number here")
    p.add_argument("--markdown", action="store_true", help="print tables of Markdown, to copy rows into the README")
    p.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    p.add_argument("--arch", nargs="+", choices=list(ARCHS), help="of step, adapters and sweep; default: ViT-S, "
                   "on a GPU also B and L")
    p.add_argument("--batch-size", type=positive, nargs="+",
                   help="images per update of step and adapters, largest tried by sweep; default: 4, GPU 64")
    p.add_argument("--precision", nargs="+", choices=loop.PRECISIONS, help="of step; default: bf16 on a GPU, else "
                   "fp32, and bf16 if the CPU has it")
    p.add_argument("--way", choices=SETTINGS, help="of step: this one alone, and no Gram; default: several in turns")
    p.add_argument("--flags", default="", help="further flags of train_ssl.py, in one string")
    p.add_argument("--seconds", type=above_zero, help="turns of each way, 3 at least; step: twice; default 30, quick 8")
    p.add_argument("--images", type=above_zero, default=1e8, help="sweep prints the days that so many images take")
    p.add_argument("--point", help="internal: measure this one point (JSON) and print its rows")
    return p
# fmt: on


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.json:  # now, not after an hour
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return 0
    train_ssl.build_parser().parse_args(["--data", "x", *shlex.split(args.flags)])  # now, not at each point
    if args.what == "show":
        for file in sorted(RESULTS.glob("*.json")):
            print("\n".join(in_lines(json.loads(file.read_text()), args.markdown)) + "\n")
        return 0
    device = loop.setup_distributed(args.device)[2]
    usual = 8 if args.quick else 30
    cuda, seconds = device.type == "cuda", usual if args.seconds is None else args.seconds
    with tempfile.TemporaryDirectory() as work:
        points = [
            {"what": what, "device": device.type, "seconds": seconds * (1 + (what == "step"))} | point
            for what in (MEASURES if args.what == "all" else [args.what])
            for point in points_of(what, args, cuda, work)
        ]
        make_data(Path(work), args.quick)
        most = max(args.batch_size or [1024 if cuda else 2 if args.quick else 16])
        rows = measure_all(points, most)
    machine = describe(device) | {"threads": torch.get_num_threads()}
    now = datetime.datetime.now(datetime.timezone.utc)
    report = dict(version=1, date=f"{now:%Y-%m-%d}", commit=loop.git_commit(), command=sys.argv[1:], quick=args.quick)
    report |= dict(machine=machine, rows=rows)
    if args.json:
        write_json(args.json, report)
    print("\n".join([*in_lines(report, args.markdown), "", *advice(rows, args.images)]))
    return int(any("error" in row for row in rows if row["what"] != "sweep"))


if __name__ == "__main__":
    run(main)
