"""The main job from end to end on a drawn chest: DICOM in, malignancy AUC out. No GPU, no data, no network needed.

Runs the programs of this repository by the commands that a user types, printed before each; pretraining is killed once
on purpose and resumes. Writes runs/demo/report.html and report.png. At most 6 minutes on 2 CPU cores: beside a
neighbour pretraining makes fewer updates, 40 at least, which fits as long as everything takes at most twice as long.

    python tools/demo.py
    python tools/demo.py --stage probe report      # these stages again, on what is there
    python tools/demo.py --real data/ct_samples      # two real chest CTs for the pictures, see tools/get_data.py
"""

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

from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import atomic_write, write_text
from tools.lib import judge, page, sheet
from tools.lib.cli import ROOT, Parser, above_zero, pick_device, run
from tools.lib.files import last_per_step, read_json_file, read_lines, write_json

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
HEATMAPS = "--n 12 --size 384"  # four times the pixels of training: 24 x 24 patches of 4 mm
PROMISE_S = 350  # of the whole demo: 6 minutes, less what no plan foresees
MINUTES = {"cpu": 3.0, "cuda": 1.0}  # of pretraining on a quiet machine; the rest takes 2 minutes on 2 CPU cores
STARTS_S = 12  # of the two starts of pretraining, on 2 quiet cores
LEAST = 40  # updates, on however slow a machine
HONEST = "A phantom is a drawing of a chest, not a patient: these numbers say that the code works, nothing about CT."
REAL = "Slice and lesion are of real chest CTs (pyradiomics, BSD-3), never trained on; all numbers are the phantom's."
BASELINES = {  # predictor: how it is called here, and what is compared with what
    "probe": ("frozen probe", ()),
    "random weights": ("random weights", ("probe", "random weights")),
    "size": ("size alone", ("probe", "size")),
    "raw pixels": ("raw pixels", ("probe", "raw pixels")),
    "size + features": ("size + features", ("size + features", "size")),
}


class Stage(NamedTuple):
    """One step of the way; `seconds` are those of 2 quiet cores."""

    name: str
    seconds: float
    about: str
    commands: list
    fine: tuple = (0,)  # exit codes that let the demo go on
    clears: tuple = ()  # what an earlier demo left and the commands would stumble over


def real_stage(out, real, device):
    """Real chest CTs for the pictures: samples, and do lesions light up?"""
    data, ckpt = f"{out}/real/processed", f"{out}/run/last.pth"
    return Stage("real", 40, "look at real chest CTs through the same eyes",
                 [f"python tools/preprocess_volumes.py --raw {real}/raw --out {data} --dataset samples --format hu16",
                  f"python tools/lesion_labels.py --masks {real}/masks --data {data}",
                  f"python tools/validate_samples.py --data {data} --n 1 --out {out}/real/sample.png",
                  f"python tools/nodule_heatmaps.py --ckpt {ckpt} --data {data} --split all --n 50 --size 384 "
                  f"--out {out}/real/heatmaps --device {device}"], clears=(f"{out}/real",))  # fmt: skip


def plan(out, device, minutes, steps, real=None):
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
        Stage("samples", 8, "look at random slices before training on them",
              [f"python tools/validate_samples.py --data {data} --n 4",
               f"python tools/validate_samples.py --data {data} --n 1 --out {out}/sample.png"]),
        Stage("duplicates", 5, "pictures that occur in more than one patient",
              [f"python tools/check_duplicates.py --data {data}"]),
        Stage("split", 2, "patients to train, choose and test on; duplicates stay together",
              [f"python tools/make_splits.py --data {data} --ratios {RATIOS} --force"]),
        Stage("speed", 16, "how many updates fit the time?",
              [f"python {train} --out {out}/speed --steps 100000 --time-limit 0.15 --log-every 1 --eval-every 0"],
              clears=(f"{out}/speed",)),
        Stage("train", 60 * minutes + STARTS_S, "pretrain; killed half-way on purpose, then the same command again",
              [f"torchrun --nproc-per-node=1 {train} --out {go} --steps {steps} --log-every {every} --save-every "
               f"{4 * every} --eval-every {20 * every}"], clears=(go,)),
        Stage("monitor", 12, "is it healthy, and what does it look at?",
              [f"python monitor.py --ckpt {ckpt} --images 1 --slices 64 --device {device}"], (0, 1, 2)),
        Stage("labels", 3, "what the four readers said about each nodule",
              [f"python tools/lidc_nodules.py --raw {raw} --data {data}"]),
        Stage("probe", 20, "malignant or benign, from frozen features, on patients never seen",
              [f"python train_probe.py --ckpt {ckpt} --data {data} --labels _labels/malignancy.csv --out {go}/probe "
               f"{PROBE} --device {device}"]),
        Stage("heatmaps", 12, "do nodules light up?",
              [f"python tools/nodule_heatmaps.py --ckpt {ckpt} --data {data} {HEATMAPS} --device {device}"]),
        *([real_stage(out, real, device)] if real else []),
        Stage("release", 4, "the teacher as a folder for other people",
              [f"python tools/release.py --ckpt {ckpt} --data {data} --probe {go}/probe/results.json --out "
               f"{out}/release"], clears=(f"{out}/release",)),
        Stage("report", 2, "all of it on one page", []),
    ]  # fmt: skip


NAMES = [stage.name for stage in plan("", "", 0, 0)]


# ----- how long pretraining may take


def pace(stages, seconds):
    """How many times longer than on a quiet machine a stage takes here: the median of those that ran, at least 1.

    Stages that keep all cores busy suffer most from a neighbour (2 cores, load 8: 6 times; most others 1.3 to 3).
    """
    ratios = [seconds[stage.name] / stage.seconds for stage in stages if stage.name in seconds]
    return max(1.0, statistics.median(ratios or [1.0]))


def room(stages, notes, slow, used=0):
    """Seconds for updates that are left, when everything else goes on `slow` times slower than on a quiet machine.

    notes["minutes"]: that the user asked for; None: what PROMISE_S leaves. used: by pretraining so far.
    """
    if notes["minutes"]:
        return 60 * notes["minutes"] - used
    k = NAMES.index("train")
    spent = sum(notes["seconds"].get(stage.name, 0) for stage in stages[:k])
    rest = STARTS_S + sum(stage.seconds for stage in stages[k + 1 :])
    return PROMISE_S - spent - used - slow * rest


def budget(stages, notes):
    """(updates to plan, seconds for them), by the speed and the seconds noted so far; LEAST updates in any case.

    What a quiet machine takes for pretraining is enough, also where there is room for more.
    """
    k, rate = NAMES.index("train"), notes.get("updates_per_minute", 0) / 60
    seconds = room(stages, notes, pace(stages[:k], notes["seconds"]))
    steps = max(LEAST, int(rate * min(stages[k].seconds - STARTS_S, seconds)) // 10 * 10)
    return steps, max(seconds, LEAST / rate if rate else 0)


def budget_again(stages, notes, done, used):
    """Seconds for the updates after `done`, which took `used` seconds.

    Where they were slower than the trial run, a neighbour is there, and the stages to come take longer too: about
    half of that, since they keep one core rather than two (updates 2.8 times, the rest 1.6 times slower, 2026-11).
    """
    slower = notes["updates_per_minute"] / 60 * used / max(done, 1)
    slow = pace(stages[: NAMES.index("train")], notes["seconds"]) * max(1, (1 + slower) / 2)
    least = (LEAST - done) * used / max(done, 1)
    return max(room(stages, notes, slow, used), least, 6)  # the run stops after an update, so it makes one at least


def updates_per_minute(speed_dir):
    """Median of the trial run, whose first half is warming up."""
    lines = last_per_step(read_lines(speed_dir / "metrics.jsonl", {"step": int})[0], "images_s")
    if not lines:
        raise ValueError(f"{speed_dir} logged no speed within its time limit: run tools/demo.py --stage speed again")
    batch = read_part(speed_dir / "config.json", {"args": dict})["args"]["batch_size"]
    return 60 / batch * statistics.median(line["images_s"] for line in lines[len(lines) // 2 :])


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
    return max((line["step"] for line in read_lines(run_dir / "metrics.jsonl", {"step": int})[0]), default=0)


def pass_on(stream, killed, kept):
    """Copy a program's errors to ours until it is killed: torchrun's messages about the kill look like a failure."""
    for chunk in iter(lambda: stream.read1(4096), b""):
        if killed.is_set():
            kept.append(chunk)
        else:
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()


def call_and_kill(command, run_dir, at_step, seconds):
    """Run a training command and end it with SIGTERM, as a scheduler does, at a step or when its time is up."""
    print(f"$ {command}", flush=True)
    end, killed, kept = time.monotonic() + seconds, threading.Event(), []
    process = subprocess.Popen(to_run(command), cwd=ROOT, stderr=subprocess.PIPE)
    reader = threading.Thread(target=pass_on, args=(process.stderr, killed, kept))
    reader.start()
    try:
        while process.poll() is None:
            step = last_step(run_dir)
            if step >= at_step or step and time.monotonic() > end:
                break
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
    print(f"it ended with exit code {code} and left {run_dir / 'last.pth'}", flush=True)


def train(command, run_dir, steps, seconds, stages, notes):
    """Pretraining in two halves, the second within what is left of the time -> exit code."""
    began = time.monotonic()
    call_and_kill(command, run_dir, steps // 2, (seconds + STARTS_S) / 2)
    minutes = budget_again(stages, notes, last_step(run_dir), time.monotonic() - began) / 60
    print(f"the same command goes on; it may take the {minutes:.1f} minutes that are left", flush=True)
    return call(f"{command} --time-limit {minutes:.2f}")


def perform(stage, out, train_now):
    """Run the commands of a stage; `train_now` runs that of pretraining."""
    for path in stage.clears:
        if (ROOT / path).exists():
            print(f"$ rm -r {path}", flush=True)
            shutil.rmtree(ROOT / path)
    for command in stage.commands:
        code = train_now(command) if stage.name == "train" else call(command)
        if code not in stage.fine:
            again = f"python tools/demo.py --out {shlex.quote(str(out))} --stage {stage.name}"
            raise ValueError(f"stage {stage.name} ended with exit code {code}, see above; it alone again: {again}")


# ----- what came out


class Results(NamedTuple):
    """What the stages wrote, read again."""

    losses: list  # lines of metrics.jsonl
    steps: int  # that were planned
    chance: float  # ln K: the cls loss of a net that knows nothing
    status: dict  # of the monitor
    judged: dict  # of the probe, protocol test
    heat: list  # sentences
    resumed_at: list  # steps


def read_part(path, fields):
    return read_json_file(path, fields, "run all stages first: python tools/demo.py")


def collect(out):
    run_dir = out / "run"
    config = read_part(run_dir / "config.json", {"args": dict})["args"]
    lines, skipped = read_lines(run_dir / "metrics.jsonl", {"step": int})
    if skipped:
        print(f"{run_dir / 'metrics.jsonl'}: {skipped} lines are damaged and were skipped")
    events = [line for line in lines if str(line.get("event")).startswith("resumed")]
    return Results(
        losses=last_per_step(lines, "loss"),
        steps=config["steps"],
        chance=math.log(config["prototypes"]),
        status=read_part(
            run_dir / "monitor" / "status.json", {"verdict": str, "code": int, "step": int, "findings": list}
        ),
        judged=read_part(run_dir / "probe" / "results.json", {"test": dict})["test"],
        heat=read_part(run_dir / "heatmaps" / "heatmaps.json", {"verdict": list})["verdict"],
        resumed_at=[line["step"] for line in events],
    )


def aucs(judged):
    """(title, AUC, an aside on how it came about, what it proves) of the probe and of what needs no pretraining."""
    for name, (title, pair) in BASELINES.items():
        if name in judged["predictors"]:
            aside = judge.row_name(judged, name).removeprefix(name)
            yield title, judged["predictors"][name]["auc"], aside, judge.compared(judged, *pair) if pair else ""


def what_lights_up(results):
    return [re.split(r": (?=share|auroc)", sentence)[0] for sentence in results.heat[:2]]


def summary(results):
    """The honest end as (what, text)."""
    first, last = results.losses[0], results.losses[-1]
    findings = "; ".join(finding["text"] for finding in results.status["findings"])
    resumed = " and ".join(map(str, results.resumed_at)) or "no step"
    updates = f"{results.status['step']} updates"
    if results.status["step"] < results.steps:
        updates += f" of {results.steps}: the machine became slower and time was up"
    elif results.steps <= LEAST:
        updates += ", the least: this machine is slow or busy"
    yield "pretraining", f"{updates}; killed, and resumed at {resumed}"
    yield "cls loss", f"{first['dino']:.2f} -> {last['dino']:.2f}; a net that knows nothing has {results.chance:.2f}"
    yield "patch loss", f"{first['ibot']:.2f} -> {last['ibot']:.2f}"
    yield "collapse", f"monitor says {results.status['verdict']}" + f": {findings}" * bool(findings)
    size = f"{results.judged['samples']} nodules of {results.judged['patients']} patients never seen"
    yield "malignancy", f"AUC of {size}, with 95% intervals"
    for title, auc, aside, proof in aucs(results.judged):
        yield title, judge.in_words(auc) + aside + f"; {proof}" * bool(proof)
    yield from (("heatmaps", sentence) for sentence in what_lights_up(results))


def took(notes):
    return f"{sum(notes['seconds'].values()) / 60:.1f} minutes on {notes['machine']}"


# ----- the page and the picture


def monitor_sheet(out):
    return max((out / "run" / "monitor").glob("step_*/sheet.png"))


def plots(results):
    """The course of pretraining."""
    losses, cuts = results.losses, [("x", step, "killed, resumed") for step in results.resumed_at]
    steps = [line["step"] for line in losses]
    chance = [("x", step, "") for step in results.resumed_at] + [("y", results.chance, "knows nothing")]
    for title, key, unit, marks in (
        ("cls loss", "dino", "nats", chance),
        ("patch loss", "ibot", "nats", cuts),
        ("rank of the teacher's features", "rankme", "dimensions", cuts),
    ):
        yield page.line_plot(title, {key: (steps, [line[key] for line in losses])}, "step", unit, marks)


def write_page(results, out, notes, stages):
    status, judged = results.status, results.judged
    pictures = {
        "What goes in": max((out / "processed" / "_validation").glob("samples_*.png")),
        "What the backbone looks at": monitor_sheet(out),
        "Do nodules light up?": out / "run" / "heatmaps" / "heatmaps.png",
    }
    if (out / "real" / "heatmaps").exists():
        pictures |= {"Real chest CT": out / "real" / "sample.png"}
        pictures |= {"Do lesions of real patients light up?": out / "real" / "heatmaps" / "heatmaps.png"}
    auc = f"Frozen probe: AUC {judge.in_words(judged['predictors']['probe']['auc'])}"
    commands = [
        (stage.name if k == 0 else "", notes["seconds"].get(stage.name) if k == 0 else "", command)
        for stage in stages
        for k, command in enumerate(stage.commands)
    ]
    html = page.page(
        f"DINO-X demo: {took(notes)}",
        HONEST,
        page.paragraph(f"Monitor: {status['verdict']}", ("good", "warn", "bad", "bad")[status["code"]]),
        page.paragraph(f"{auc}; {judge.compared(judged, 'probe', 'random weights')}", judge.tone(judged)),
        page.table(["what", "result"], summary(results)),
        page.row(*plots(results)),
        *(
            page.section(title, page.image(path, f"{path.name} (click for its full size)", str(path.relative_to(out))))
            for title, path in pictures.items()
        ),
        page.section("Every command", page.table(["stage", "seconds", "command"], commands)),
    )
    write_text(out / "report.html", html)


def charts(results, size):
    """What summary() says in numbers, drawn."""
    marks = [("y", results.chance, "cls loss of a net that knows nothing")]
    marks += [("x", step, "killed, resumed") for step in results.resumed_at]
    steps = [line["step"] for line in results.losses]
    losses = {f"{name} loss": (steps, [line[key] for line in results.losses])
              for name, key in (("cls", "dino"), ("patch", "ibot"))}  # fmt: skip
    yield sheet.plot("pretraining", losses, size, "updates", marks)
    judged = results.judged
    title = f"malignant or benign: AUC of {judged['samples']} nodules of {judged['patients']} patients never seen"
    rows = [(name, *(auc[key] for key in ("value", "low", "high"))) for name, auc, *_ in aucs(judged)]
    yield sheet.intervals(title, rows, size)


def write_picture(results, out, notes):
    """report.png: whole pictures as the programs wrote them (each with its margin), charts, and what they say."""
    real = out / "real" if (out / "real" / "heatmaps").exists() else None
    seen = ((real or out) / "sample.png", monitor_sheet(out))
    read = [Image.open(path).convert("RGB") for path in seen]
    width = read[0].width - 2 * sheet.GAP
    top = [sheet.heading(f"DINO-X demo: DICOM in, AUC out, {took(notes)}", width, size=22)]
    top.append(sheet.heading(HONEST, width, sheet.DIM, size=16))
    top += [sheet.heading(REAL, width, sheet.DIM, size=16)] * bool(real)
    half = (width - sheet.GAP) // 2
    summed = dict(summary(results))
    said = [f"{summed['pretraining'][0].upper()}{summed['pretraining'][1:]}. Monitor: {results.status['verdict']}."]
    said += [f"{proof[0].upper()}{proof[1:]}." for *_, proof in aucs(results.judged) if proof]
    said += [f"{sentence}." for sentence in what_lights_up(results)]
    bottom = [sheet.row(list(charts(results, (half, 280))))]
    nodule = [
        Image.open(path).convert("RGB")
        for path in sorted(((real or out / "run") / "heatmaps").glob("nodule_*.png"))[:1]
    ]
    nodule = [image.crop((sheet.GAP, sheet.GAP, image.width - sheet.GAP, image.height - sheet.GAP)) for image in nodule]
    words = sheet.paragraphs(said, width - sum(image.width + 2 * sheet.GAP for image in nodule), 17)
    bottom.append(sheet.row([*nodule, words], 2 * sheet.GAP))
    titles, bottom = (ImageOps.expand(sheet.stack(part), sheet.GAP, sheet.BACK) for part in (top, bottom))
    whole = sheet.stack([titles, *read, bottom], 0)
    for colours in (256, 128, 64):  # half of the bytes and less: the picture stands in a README
        few = whole.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        atomic_write(out / "report.png", lambda f, few=few: few.save(f, format="PNG", optimize=True))
        if (out / "report.png").stat().st_size < 300_000:
            break


def report_all(out, stages, notes):
    """Summary, report.html and report.png out of what the stages left."""
    results = collect(out)
    write_page(results, out, notes, stages)
    write_picture(results, out, notes)
    print(f"\nDINO-X demo, {took(notes)}\n{HONEST}")
    for what, text in summary(results):
        print(f"  {what:<17}{text}")
    for name in ("report.html", "report.png", "run/monitor/report.html", "run/probe/report.html", "release/README.md"):
        print(f"  {'see':<17}{out / name}")


# ----- the program


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    parser.add_argument("--minutes", type=above_zero, help="of pretraining, however long the rest takes; default: up "
                        f"to {MINUTES['cpu']:g}, on a GPU {MINUTES['cuda']:g}, 6 minutes in all")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="go on where an earlier demo stopped; default: start anew")
    parser.add_argument("--photos", action="store_true", help="photographs instead: to a bundle, in about 4 minutes")
    parser.add_argument("--real", type=Path, help="folder of tools/get_data.py ct-samples: real CTs for the pictures")
    parser.add_argument("--stage", nargs="+", choices=[*NAMES, "real"], metavar="NAME", help="only these stages")
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
    if not path.exists():
        return {"version": 1, "seconds": {}}
    return read_json_file(path, {"seconds": dict}, f"remove {out} and start anew", version=1)


def run_stage(k, device, folder, out, notes, real=None):
    """One stage, with what it adds to the notes."""
    usual, began = notes["minutes"] or MINUTES[device], time.perf_counter()
    steps, seconds = budget(plan(folder, device, usual, 0, real), notes)
    stages = plan(folder, device, usual, steps, real)
    stage = stages[k]
    print(f"\n===== {k + 1} of {len(stages)}, {stage.name}: {stage.about}", flush=True)
    if stage.name == "train":
        if "updates_per_minute" not in notes:
            raise ValueError("how many updates fit is not known yet: run tools/demo.py --stage speed first")
        print(f"{steps} updates are planned, in at most {seconds / 60:.1f} minutes", flush=True)
    perform(stage, out, lambda command: train(command, out / "run", steps, seconds, stages, notes))
    if stage.name == "speed":
        notes["updates_per_minute"] = updates_per_minute(out / "speed")
        print(f"{notes['updates_per_minute']:.0f} updates a minute")
    if stage.name == "report":
        report_all(out, stages, notes)
    notes["seconds"][stage.name] = round(time.perf_counter() - began, 1)
    write_json(out / "demo.json", notes)
    progress(stages[: k + 1], stages, sum(notes["seconds"].values()))


def photos(out, folder, device):
    """Streets drawn, split, learned from, decided on, tested once, bundled; then the bundle is used. -> exit code."""
    write_json(out / "demo.json", {"version": 1, "seconds": {}})  # tells a later demo that the folder is one
    for command in (
        f"python tools/pipeline.py --smoke --data {folder}/pictures --out {folder}/run --device {device}",
        f"python tools/predict.py --bundle {folder}/run/bundle --images {folder}/pictures/images --out {folder}/said "
        f"--device {device}",
    ):
        if code := call(command):
            raise ValueError(f"a stage ended with exit code {code}, see above; with --keep this demo goes on there")
    shutil.copy(out / "run" / "evaluation" / "report.html", out / "report.html")
    print(f"\n{out / 'report.html'}\nThe streets are drawings: their numbers say that the code works, no more.")
    return 0


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.photos:
        if args.stage or args.real or args.minutes:
            raise ValueError("--photos has stages of its own, in tools/pipeline.py: leave --stage, --real, --minutes")
        out = Path("runs/demo_photos").resolve() if args.out == parser.get_default("out") else args.out.resolve()
        prepare(out, fresh=not args.keep)
        folder = os.path.relpath(out, ROOT) if out.is_relative_to(ROOT) else shlex.quote(str(out))
        return photos(out, folder, pick_device(args.device))
    out, card = args.out.resolve(), pick_device(args.device)
    machine = f"{os.cpu_count()} CPU cores"
    if card.type == "cuda":
        import torch  # slow to import

        machine = torch.cuda.get_device_name(card)
    notes = prepare(out, fresh=not (args.keep or args.stage))
    notes |= {"machine": machine, "minutes": args.minutes or notes.get("minutes")}
    folder = os.path.relpath(out, ROOT) if out.is_relative_to(ROOT) else shlex.quote(str(out))
    real = shlex.quote(str(args.real.resolve())) if args.real else None
    if args.real and not (args.real / "masks").is_dir():
        again = f"python tools/get_data.py ct-samples --out {args.real}"
        raise FileNotFoundError(f"--real {args.real} has no masks; {again}")
    if "real" in (args.stage or ()) and not args.real:
        raise ValueError("--stage real needs --real FOLDER, of tools/get_data.py ct-samples")
    names = [stage.name for stage in plan("", "", 0, 0, real)]
    wanted = args.stage or [name for name in names if not (args.keep and name in notes["seconds"])]
    for k, name in enumerate(names):
        if name in wanted:
            run_stage(k, card.type, folder, out, notes, real)
    return 0


def progress(done, stages, seconds):
    """The bar of the whole way, after each stage."""
    parts, whole = (sum(stage.seconds for stage in some) for some in (done, stages))
    text = f"{len(done)} of {len(stages)} stages, {done[-1].name} done: {{percentage:3.0f}}%|{{bar:30}}| {{elapsed}}"
    print(tqdm.format_meter(parts, whole, seconds, ncols=110, bar_format=text + "<{remaining}"), flush=True)


if __name__ == "__main__":
    run(main)
