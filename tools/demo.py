"""The main job from end to end on a drawn chest: DICOM in, malignancy AUC out. No GPU, no data, no network needed.

Runs the programs of this repository by the commands that a user types, printed before each; pretraining is killed once
on purpose and resumes. Writes runs/demo/report.html and report.png. At most 6 minutes on 2 CPU cores.

    python tools/demo.py
    python tools/demo.py --stage probe report      # these stages again, on what is there
"""

import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import atomic_write, write_text
from tools.lib.cli import ROOT, Parser, pick_device, run

PHANTOM = "--patients 60 --slices 32 --size 256"  # 2,112 slices, 0.3 GB as DICOM and as much again in HU
# Phantom patients cost nothing and the test needs many: 27 of them leave 47 rated by 3 readers or more.
RATIOS = "train=0.5,val_select=0.05,val_test=0.45"
# What learns within minutes on a CPU: small views of a small part of the body, few prototypes, sharp targets.
LEARN = (
    "--arch vit_test --global-size 96 --local-size 48 --local-crops 4 --field 0.02 0.1 --prototypes 256 "
    "--head-hidden 256 --head-bottleneck 64 --layerscale 1 --batch-size 64 --lr 1e-3 --layer-decay 1 --patch-lr 1 "
    "--freeze-last 0 --ema 0.99 1 --teacher-temp 0.02 0.02 --rope-rescale 1 --gram-weight 0"
)
PROBE = "--protocol test --crop-mm 24,32 --bootstrap 1000"  # mm of the crops that the views of LEARN come closest to
HEATMAPS = "--n 12 --size 192"  # twice the pixels of training: patches of 8 mm
MINUTES = {"cpu": 3.0, "cuda": 1.0}  # of pretraining; the rest takes 2 minutes on 2 CPU cores
LEAST = 40  # updates, on however slow a machine
HONEST = "A phantom is a drawing of a chest, not a patient: these numbers say that the code works, nothing about CT."
ROWS = {"probe": "frozen probe", "random weights": "random weights", "size": "size alone", "raw pixels": "raw pixels"}


class Stage(NamedTuple):
    """One step of the way; `seconds` on 2 quiet cores only shape the bar."""

    name: str
    seconds: float
    about: str
    commands: list
    fine: tuple = (0,)  # exit codes that let the demo go on
    clears: tuple = ()  # what an earlier demo left and the commands would stumble over


def plan(out, device, minutes, steps):
    """All stages in order; `steps` is known once the stage `speed` has been run."""
    raw, data, go, ckpt = f"{out}/raw", f"{out}/processed", f"{out}/run", f"{out}/run/last.pth"
    train = f"train_ssl.py --data {data} {LEARN} --device {device}"
    every = max(1, steps // 40)
    return [
        Stage("phantom", 16, "draw patients as DICOM files with the readings of four radiologists",
              [f"python tools/make_phantom.py --out {raw} {PHANTOM}"], clears=(raw, data)),
        Stage("preprocess", 10, "DICOM to exact HU; scout views are rejected, hence exit code 1",
              [f"python tools/preprocess_dicom.py --raw {raw} --out {data} --dataset phantom --format hu16"], (0, 1)),
        Stage("manifest", 2, "is every file still what the manifest says?",
              [f"python tools/write_manifest.py --data {data} --verify"]),
        Stage("samples", 5, "look at random slices before training on them",
              [f"python tools/validate_samples.py --data {data} --n 4"]),
        Stage("duplicates", 5, "pictures that occur in more than one patient",
              [f"python tools/check_duplicates.py --data {data}"]),
        Stage("split", 2, "patients to train, choose and test on",
              [f"python tools/make_splits.py --data {data} --ratios {RATIOS} --duplicates "
               f"{data}/_splits/duplicates.json --force"]),
        Stage("speed", 16, "how many updates fit the time?",
              [f"python {train} --out {out}/speed --steps 100000 --time-limit 0.15 --log-every 1 --eval-every 0"],
              clears=(f"{out}/speed",)),
        Stage("train", 60 * minutes + 12, "pretrain; killed half-way on purpose, then the same command again",
              [f"torchrun --nproc-per-node=1 {train} --out {go} --steps {steps} --log-every {every} --save-every "
               f"{4 * every} --eval-every {20 * every}"], clears=(go,)),
        Stage("monitor", 12, "is it healthy, and what does it look at?",
              [f"python monitor.py --ckpt {ckpt} --images 2 --slices 64 --device {device}"], (0, 1, 2)),
        Stage("labels", 3, "what the four readers said about each nodule",
              [f"python tools/lidc_nodules.py --raw {raw} --data {data}"]),
        Stage("probe", 20, "malignant or benign, from frozen features, on patients never seen",
              [f"python train_probe.py --ckpt {ckpt} --data {data} --labels _labels/malignancy.csv --out {go}/probe "
               f"{PROBE} --device {device}"]),
        Stage("heatmaps", 12, "do nodules light up?",
              [f"python tools/nodule_heatmaps.py --ckpt {ckpt} --data {data} {HEATMAPS} --device {device}"]),
        Stage("release", 4, "the teacher as a folder for other people",
              [f"python tools/release.py --ckpt {ckpt} --data {data} --probe {go}/probe/results.json --out "
               f"{out}/release"], clears=(f"{out}/release",)),
        Stage("report", 2, "all of it on one page", []),
    ]  # fmt: skip


NAMES = [stage.name for stage in plan("", "", 0, 0)]


# ----- running commands


def to_run(command):
    """The words of a command as this Python runs it, whatever the shell's path says."""
    words = shlex.split(command)
    here = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return here[words[0]] + words[1:]


def call(command):
    """Print and run one command -> exit code."""
    print(f"$ {command}", flush=True)
    return subprocess.run(to_run(command), cwd=ROOT).returncode


def last_step(run_dir):
    """Newest step in metrics.jsonl, 0 before the first line."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last one may be half written
    return max((json.loads(line)["step"] for line in lines), default=0)


def pass_on(stream, killed, kept):
    """Copy a program's errors to ours until it is killed: what torchrun says then looks like a failure and is none."""
    for chunk in iter(lambda: stream.read1(4096), b""):
        if killed.is_set():
            kept.append(chunk)
        else:
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()


def call_and_kill(command, run_dir, at_step):
    """Run a training command and end it with SIGTERM, as a scheduler does, once it has reached a step."""
    print(f"$ {command}", flush=True)
    process, killed, kept = subprocess.Popen(to_run(command), cwd=ROOT, stderr=subprocess.PIPE), threading.Event(), []
    reader = threading.Thread(target=pass_on, args=(process.stderr, killed, kept))
    reader.start()
    try:
        while process.poll() is None and last_step(run_dir) < at_step:
            time.sleep(0.2)
        if process.poll() is None:
            killed.set()
            print(f"\n$ kill -TERM {process.pid}      # on purpose, half-way", flush=True)
            process.terminate()
    finally:
        code = process.wait()
        reader.join()
    if not (run_dir / "last.pth").exists():
        sys.stderr.write(b"".join(kept).decode(errors="replace"))
        raise ValueError(f"the killed run left no checkpoint in {run_dir} (exit code {code}); see above")
    print(f"it ended with exit code {code} and left {run_dir / 'last.pth'}; the same command goes on:", flush=True)


def perform(stage, out, steps):
    for path in stage.clears:
        if (ROOT / path).exists():
            print(f"$ rm -r {path}", flush=True)
            shutil.rmtree(ROOT / path)
    for command in stage.commands:
        if stage.name == "train":
            call_and_kill(command, out / "run", steps // 2)
        code = call(command)
        if code not in stage.fine:
            again = f"python tools/demo.py --out {shlex.quote(str(out))} --stage {stage.name}"
            raise ValueError(f"stage {stage.name} ended with exit code {code}, see above; it alone again: {again}")


# ----- what was found


def read_json(path):
    return json.loads(path.read_text())


def read_lines(run_dir, key):
    """Lines of metrics.jsonl that hold `key`, one per step: the last, as a resumed run may repeat some."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for _, row in sorted({row["step"]: row for row in rows if key in row}.items())]


def updates_per_minute(speed_dir):
    """Median of the trial run, whose first half is warming up."""
    lines = read_lines(speed_dir, "images_s")
    if not lines:
        raise ValueError(f"{speed_dir} logged no speed within its time limit: run tools/demo.py --stage speed again")
    batch = read_json(speed_dir / "config.json")["args"]["batch_size"]
    return 60 / batch * statistics.median(line["images_s"] for line in lines[len(lines) // 2 :])


class Findings(NamedTuple):
    """What the stages wrote, read again."""

    losses: list  # lines of metrics.jsonl
    chance: float  # ln K: the cls loss of a net that knows nothing
    status: dict  # of the monitor
    judged: dict  # of the probe, protocol test
    heat: list  # sentences
    resumed_at: list  # steps


def collect(out):
    run_dir = out / "run"
    try:
        return Findings(
            losses=read_lines(run_dir, "loss"),
            chance=math.log(read_json(run_dir / "config.json")["args"]["prototypes"]),
            status=read_json(run_dir / "monitor" / "status.json"),
            judged=read_json(run_dir / "probe" / "results.json")["test"],
            heat=read_json(run_dir / "heatmaps" / "heatmaps.json")["verdict"],
            resumed_at=[row["step"] for row in read_lines(run_dir, "event") if row["event"].startswith("resumed")],
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing: run all stages first, python tools/demo.py") from None


def aucs(judged):
    """[(name, AUC with low and high)] of the predictors that belong together."""
    return [(name, judged["predictors"][name]["auc"]) for name in ROWS if name in judged["predictors"]]


def compared(judged, name):
    """How the probe stands to a baseline, in words; to beat one that fails is no merit."""
    d = judged["differences"].get(f"probe - {name}")
    if d is None or d["low"] is None:
        return ""
    proven = d["low"] > 0 and d["p"] < 0.05 and judged["predictors"]["probe"]["auc"]["low"] > 0.5
    said = "better" if proven else "worse" if d["high"] < 0 else "not shown to be better"
    if judged["predictors"][name]["auc"]["value"] < 0.5:
        said += ", by less than that: below 0.5 is chance"
    return f"; probe minus this {d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}): {said}"


def summary(found):
    """The honest end as (what, text)."""
    from tools.lib.metrics import in_words  # slow to import

    first, last = found.losses[0], found.losses[-1]
    said = "; ".join(f["text"] for f in found.status["findings"])
    yield "data", HONEST
    resumed = " and ".join(map(str, found.resumed_at)) or "no step"
    yield "pretraining", f"{last['step']} updates; killed, and resumed at {resumed}"
    yield "cls loss", f"{first['dino']:.2f} -> {last['dino']:.2f}; a net that knows nothing has {found.chance:.2f}"
    yield "patch loss", f"{first['ibot']:.2f} -> {last['ibot']:.2f}"
    yield "collapse", f"monitor says {found.status['verdict']}" + (f": {said}" if said else "")
    yield "AUC", f"{found.judged['samples']} nodules of {found.judged['patients']} patients never seen, 95% intervals"
    for name, item in aucs(found.judged):
        yield ROWS[name], in_words(item) + compared(found.judged, name)
    for sentence in found.heat[:2]:
        yield "heatmaps", re.split(r": (?=share|auroc)", sentence)[0]


# ----- the page and the picture


def tones(found):
    from tools.lib import metrics

    return ("good", "warn", "bad", "bad")[found.status["code"]], metrics.tone(found.judged)


def write_page(found, out, notes, commands):
    from tools.lib import page

    steps = [row["step"] for row in found.losses]
    curves = {name: (steps, [row[key] for row in found.losses]) for name, key in (("cls", "dino"), ("patch", "ibot"))}
    rank = {"rank": (steps, [row["rankme"] for row in found.losses])}
    cuts = [("x", step, "killed, resumed") for step in found.resumed_at]
    monitor, probe = tones(found)
    pictures = {
        "What goes in": next((out / "processed" / "_validation").glob("samples_*.png")),
        "What the backbone looks at": sorted((out / "run" / "monitor").glob("step_*/sheet.png"))[-1],
        "Do nodules light up?": out / "run" / "heatmaps" / "heatmaps.png",
    }
    page = page.page(
        f"DINO-X demo: {took(notes)}",
        page.paragraph(f"Monitor: {found.status['verdict']}", monitor),
        page.paragraph(found.judged["verdict"], probe),
        page.table(["what", "found"], summary(found)),
        page.row(
            page.line_plot("losses", curves, "step", marks=[*cuts, ("y", found.chance, "cls, knowing nothing")]),
            page.line_plot("rank of the teacher's features", rank, "step", "dimensions", cuts),
        ),
        *(page.section(title, page.image(path, path.name)) for title, path in pictures.items()),
        page.section("Every command", page.table(["stage", "seconds", "command"], [
            (name, notes["seconds"].get(name), command) for name, command in commands])),
    )  # fmt: skip
    write_text(out / "report.html", page)


def took(notes):
    return f"{sum(notes['seconds'].values()) / 60:.1f} minutes on {notes['machine']}"


WIDTH, TALL = 1240, 230  # pixels of the picture, and of its plots


def axes(title, low, high, size):
    """An empty plot -> (image, pen, function from (x in 0..1, y) to pixels)."""
    from PIL import Image, ImageDraw

    from tools.lib import sheet

    image = Image.new("RGB", size, "#1c2126")
    pen = ImageDraw.Draw(image)
    pen.text((10, 5), title, fill=sheet.INK, font=sheet.font(14))
    left, top, width, height = 44, 34, size[0] - 60, size[1] - 50
    return image, pen, lambda x, y: (left + x * width, top + (high - y) / (high - low) * height)


def dashed(pen, start, end, colour):
    for k in range(0, 40, 2):
        ends = [tuple(a + (b - a) * share / 39 for a, b in zip(start, end)) for share in (k, k + 1)]
        pen.line(ends, fill=colour)


def draw_losses(found, size):
    """Both losses over the updates, the kill, and the level of knowing nothing."""
    from tools.lib import sheet

    rows, last = found.losses, found.losses[-1]["step"]
    values = [found.chance, *(row[key] for row in rows for key in ("dino", "ibot"))]
    room = 0.1 * (max(values) - min(values))
    low, high = min(values) - room, max(values) + room
    image, pen, at = axes("losses over the updates", low, high, size)
    for step in found.resumed_at:
        dashed(pen, at(step / last, low), at(step / last, high), sheet.BAD)
        pen.text(at(step / last + 0.01, (high + low) / 2), "killed, resumed", fill=sheet.BAD, font=sheet.font(12))
    dashed(pen, at(0, found.chance), at(1, found.chance), sheet.DIM)
    for k, (key, name) in enumerate((("dino", "cls"), ("ibot", "patch"))):
        pen.line([at(row["step"] / last, row[key]) for row in rows], fill=sheet.COLOURS[k], width=2)
        text = f"{name} {rows[0][key]:.2f} to {rows[-1][key]:.2f}"
        pen.text((size[0] - 320 + 110 * k, 6), text, fill=sheet.COLOURS[k], font=sheet.font(12))
    pen.text((size[0] - 94, 6), f"chance {found.chance:.2f}", fill=sheet.DIM, font=sheet.font(12))
    for share in (0, 1):
        x, y = at(share, low)
        pen.text((x, y + 2), f"{share * last}", fill=sheet.DIM, font=sheet.font(11), anchor="ma")
    return image


def draw_aucs(found, size):
    """A dot with its 95% interval for the probe and for what needs no pretraining."""
    from tools.lib import sheet

    rows = aucs(found.judged)
    title = f"malignant or benign: AUC, {found.judged['samples']} nodules of patients never seen"
    image, pen, at = axes(title, -0.6, len(rows) - 0.2, size)
    for value in (0.25, 0.5, 0.75, 1.0):
        x = 0.28 + 0.7 * value
        dashed(pen, at(x, -0.6), at(x, len(rows) - 0.4), sheet.BAD if value == 0.5 else "#48525c")
        place = at(x, -0.6)
        pen.text((place[0], place[1] + 2), f"{value:g}", fill=sheet.DIM, font=sheet.font(11), anchor="ma")
    for k, (name, item) in enumerate(rows):
        y, colour = len(rows) - 1 - k, sheet.COLOURS[0] if k == 0 else sheet.INK
        x0, y0 = at(0.28 + 0.7 * item["value"], y)
        if item["low"] is not None:
            pen.line([at(0.28 + 0.7 * item[end], y) for end in ("low", "high")], fill=colour, width=2)
        pen.ellipse([x0 - 5, y0 - 5, x0 + 5, y0 + 5], fill=colour)
        pen.text((12, y0), f"{ROWS[name]}  {item['value']:.2f}", fill=colour, font=sheet.font(13), anchor="lm")
    return image


def write_picture(found, out, notes):
    """report.png: what goes in, what the backbone looks at, what came out."""
    from PIL import Image, ImageOps

    from data import open_source
    from tools import nodule_heatmaps, validate_samples
    from tools.lib import sheet

    source, frame = open_source(out / "processed", "val_test"), sheet.GAP
    sample = validate_samples.inspect_sample(source, len(source) // 2)[2]
    look = Image.open(sorted((out / "run" / "monitor").glob("step_*/sheet.png"))[-1]).convert("RGB")
    look = look.crop((frame, frame, look.width - frame, frame + sheet.TILE + 71))  # the first image, without its heads
    heat = Image.open(out / "run" / "heatmaps" / "heatmaps.png").convert("RGB")
    top = heat.height - frame - nodule_heatmaps.TILE - 66  # the last row: heading, two lines of text, tiles
    heat = heat.crop((frame, top, heat.width - frame, heat.height - frame))
    half = (WIDTH - frame) // 2
    parts = [
        sheet.heading(f"DINO-X demo: DICOM in, AUC out, {took(notes)}", WIDTH, size=20),
        sheet.heading(HONEST, WIDTH, sheet.DIM, size=14),
        *(sheet.fit(part, WIDTH) for part in (sample, look, heat)),
        sheet.row([draw_losses(found, (half, TALL)), draw_aucs(found, (half, TALL))]),
    ]
    framed = ImageOps.expand(sheet.stack(parts), frame, sheet.BACK)
    framed = framed.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # half of the bytes
    atomic_write(out / "report.png", lambda f: framed.save(f, format="PNG", optimize=True))


def report_all(out, stages, notes):
    """Summary, report.html and report.png out of what the stages left."""
    found = collect(out)
    commands = [(stage.name, command) for stage in stages for command in stage.commands]
    write_page(found, out, notes, commands)
    write_picture(found, out, notes)
    print(f"\nDINO-X demo, {took(notes)}")
    for what, text in summary(found):
        print(f"  {what:<15}{text}")
    for name in ("report.html", "report.png", "run/monitor/report.html", "run/probe/report.html", "release/README.md"):
        print(f"  {'see':<15}{out / name}")


# ----- the program


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    parser.add_argument("--minutes", type=float, help=f"of pretraining; default: {MINUTES['cpu']:g}, on a GPU "
                        f"{MINUTES['cuda']:g}")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="go on where an earlier demo stopped; default: start anew")
    parser.add_argument("--stage", nargs="+", choices=NAMES, help="only these, on what is there", metavar="NAME")
    return parser


def prepare(out, fresh):
    """-> notes of the earlier demo there; a folder that is not a demo's is left alone."""
    path = out / "demo.json"
    if out.exists() and any(out.iterdir()) and not path.exists():
        raise FileExistsError(f"--out {out} is not empty and holds no demo: name another folder")
    if fresh and out.exists():
        print(f"$ rm -r {out}      # of an earlier demo; --keep goes on with it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return read_json(path) if path.exists() else {"version": 1, "seconds": {}}


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} must be positive")
    out, card = args.out.resolve(), pick_device(args.device)
    device, machine = card.type, f"{os.cpu_count()} CPU cores"
    if device == "cuda":
        import torch  # slow to import

        machine = torch.cuda.get_device_name(card)
    notes = prepare(out, fresh=not (args.keep or args.stage))
    notes |= {"machine": machine, "minutes": args.minutes or notes.get("minutes", MINUTES[device])}
    shown = os.path.relpath(out, ROOT) if out.is_relative_to(ROOT) else shlex.quote(str(out))
    wanted = args.stage or [name for name in NAMES if not (args.keep and name in notes["seconds"])]
    for k, name in enumerate(NAMES):
        if name not in wanted:
            continue
        steps = max(LEAST, int(notes["minutes"] * notes.get("updates_per_minute", 0)) // 10 * 10)
        stages, began = plan(shown, device, notes["minutes"], steps), time.perf_counter()
        print(f"\n===== {k + 1} of {len(NAMES)}, {name}: {stages[k].about}", flush=True)
        if name == "train" and "updates_per_minute" not in notes:
            raise ValueError("how many updates fit is not known yet: run tools/demo.py --stage speed first")
        perform(stages[k], out, steps)
        if name == "speed":
            notes["updates_per_minute"] = updates_per_minute(out / "speed")
            print(f"{notes['updates_per_minute']:.0f} updates a minute; {notes['minutes']:g} minutes are given")
        if name == "report":
            report_all(out, stages, notes)
        notes["seconds"][name] = round(time.perf_counter() - began, 1)
        write_text(out / "demo.json", json.dumps(notes, indent=1))
        progress(stages[: k + 1], stages, sum(notes["seconds"].values()))
    return 0


def progress(done, stages, seconds):
    """The bar of the whole way, after each stage."""
    parts, whole = (sum(stage.seconds for stage in some) for some in (done, stages))
    text = f"{len(done)} of {len(stages)} stages, {done[-1].name} done: {{percentage:3.0f}}%|{{bar:30}}| {{elapsed}}"
    print(tqdm.format_meter(parts, whole, seconds, ncols=110, bar_format=text + "<{remaining}"), flush=True)


if __name__ == "__main__":
    run(main)
