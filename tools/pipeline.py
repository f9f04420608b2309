"""From a folder of photographs to a bundle: the programs of this repository, by the commands you would type.

    python tools/pipeline.py --data data/roadwork --out runs/roadwork --ckpt dinov3-vits16 --arch vit_small
    python tools/pipeline.py --smoke --data data/toy --out runs/toy          # draws its own pictures

import -> duplicates -> split -> explora -> baseline -> predictions -> policy -> evaluate -> bundle. With --ckpt the
pretraining goes on by adapters (ExPLoRA), without it starts anew. A stage is done when its manifest, written last to
OUT/stages/STAGE/manifest.json, names this command and the files that are there, byte for byte; else it is run (again,
what it had made is put aside as FOLDER.replaced). A command that fails stops the line; the same command goes on.
"""

import graphlib
import hashlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
from data import PHOTO_ENDINGS, file_sha256
from tools.lib.cli import Parser, run, shown
from tools.lib.commands import changed, named, program, replaced
from tools.lib.files import read_json_file, walk_files, write_json
from tools.lib.loop import git_commit

DRAWN = "--images 500 --frames-per-scene 1 --size 96x128 --object-share 0.05 0.1 --easy"  # of --smoke
SMOKE = {  # flags of --smoke that replace those of the stages
    "split": "--ratios train=0.6,val_select=0.1,val_calib=0.15,val_test=0.15",
    "explora": "--arch vit_test --global-size 64 --local-size 32 --local-crops 2 --prototypes 128 --head-hidden 64 "
    "--head-bottleneck 32 --layerscale 1 --batch-size 32 --steps 20 --warmup 5 --gram-weight 0 --save-every 20 "
    "--eval-every 0",
    "baseline": "--tune all --size 64 --aug crop --batch-size 32 --steps 200 --eval-every 100 --lr 2e-3 2e-3 "
    "--layer-decay 1",
    "evaluate": "--bootstrap 200",
}


class Stage(NamedTuple):
    name: str
    after: tuple  # stages whose files it reads
    words: list  # its command
    inputs: list  # files; "images": the pictures of --data, by name and size
    outputs: list  # files
    folder: Path | None = None  # of its own, put aside before the stage is run again
    splits: tuple = ()  # of which it reads pictures or predictions


def stages(args):
    """All of them, in the order in which they are written in the docstring."""
    d, out, device = args.data, args.out, ["--device", args.device]
    labels, splits, copies = d / "labels.csv", d / "_splits" / "splits.json", d / "_splits" / "duplicates.json"
    weights, best, said = out / "explora" / "last.pth", out / "baseline" / "best.pth", out / "predictions"
    policy, look, bundle = out / "policy" / "policy.json", out / "evaluation", out / "bundle"
    init = ["--init", str(args.ckpt), "--adapter-norm", "lora", "--adapter-rank", "32", "--unfreeze", "1"]
    sheet, predicted = out / "import" / "samples.png", [said / f"{name}.npz" for name in ("val_calib", "val_test")]
    again = ["--again", args.again] if args.again else []
    # fmt: off
    table = [
        Stage("import", (), ["tools/validate_samples.py", "--data", d, "--n", "10", "--out", sheet],
              [labels, "images"], [sheet]),
        Stage("duplicates", ("import",), ["tools/check_duplicates.py", "--data", d], ["images"], [copies]),
        Stage("split", ("duplicates",), ["tools/make_splits.py", "--data", d], [labels, copies], [splits]),
        Stage("explora", ("split",), ["train_ssl.py", "--data", d, "--out", weights.parent, "--arch", args.arch,
              *(init if args.ckpt else []), *device], [splits], [weights], weights.parent, ("train", "val_select")),
        Stage("baseline", ("split", "explora"), ["train_probe.py", "--ckpt", weights, "--data", d, "--labels",
              "labels.csv", "--tune", "adapters", "--out", best.parent, *device],
              [weights, splits, labels], [best, best.parent / "predictions" / "val_select.npz"], best.parent,
              ("train", "val_select", "val_calib")),
        Stage("predictions", ("baseline",), ["tools/predict.py", "--ckpt", best, "--data", d, "--split", "val_calib",
              "val_test", "--out", said, *device], [best, splits], predicted, said, ("val_calib", "val_test")),
        Stage("policy", ("predictions",), ["tools/fit_policy.py", "--predictions", predicted[0], "--out", policy],
              predicted[:1], [policy], policy.parent, ("val_calib",)),
        Stage("evaluate", ("predictions", "policy"), ["tools/evaluate.py", "--predictions", predicted[1], "--policy",
              policy, "--data", d, "--out", look, *again], [policy, predicted[1]], [look / "results.json"], look,
              ("val_test",)),
        Stage("bundle", ("baseline", "policy", "evaluate"), ["tools/release.py", "--ckpt", best, "--policy", policy,
              "--out", bundle], [best, policy, look / "results.json"], [bundle / "SHA256SUMS", bundle / "bundle.json"],
              bundle),
    ]
    # fmt: on
    if args.smoke:
        words = ["tools/make_roadwork.py", "--out", d, *DRAWN.split()]
        table[0] = table[0]._replace(after=("draw",))
        table.insert(0, Stage("draw", (), words, [], [labels]))
    return table


def with_flags(table, texts, smoke):
    """The table with flags of --smoke, then of --flags 'STAGE: ...', in the place of its own."""
    given = {name: text.split() for name, text in SMOKE.items()} if smoke else {}
    for text in texts:
        name, flags = named("--flags", text)
        if name not in {stage.name for stage in table}:
            stages = " ".join(stage.name for stage in table)
            raise ValueError(f"--flags {shown(name)}: there is no such stage; there are {stages}")
        given[name] = replaced(given.get(name, []), flags)
    return [s._replace(words=replaced([*map(str, s.words)], given.get(s.name, []))) for s in table]


def in_order(table):
    """Stages after those that they depend on; a circle is an error of graphlib."""
    by_name = {stage.name: stage for stage in table}
    return [by_name[name] for name in graphlib.TopologicalSorter({s.name: s.after for s in table}).static_order()]


# ----- is it done?


def sha256_of(item, data):
    """Of a file, or of the names and sizes of all pictures below --data; None: not there."""
    if item != "images":
        return file_sha256(item) if item.is_file() else None
    found = [(str(Path(path).relative_to(data)), size) for path, size in walk_files(data)]
    found = [row for row in found if row[0].lower().endswith(PHOTO_ENDINGS) and not row[0].startswith("_")]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def hashes(items, data):
    return {str(item): sha256_of(item, data) for item in items}


FIELDS = {"command": list, "inputs": dict, "outputs": dict, "seconds": float}


def place_of(args, stage):
    return args.out / "stages" / stage.name / "manifest.json"


def why_run(args, stage):
    """None: the stage is done; else why it is run."""
    path = place_of(args, stage)
    if not path.exists():
        return "not done yet"
    found = read_json_file(path, FIELDS, "delete it, and the stage is run again", 1)
    if found["command"] != stage.words:
        return changed(found["command"], stage.words)
    for does, before, items in (("reads", found["inputs"], stage.inputs), ("made", found["outputs"], stage.outputs)):
        now = hashes(items, args.data)
        if odd := [name for name in now if now[name] != before.get(name)]:
            return f"{odd[0]}, which it {does}, is another file than it was"
    return None


# ----- running


def put_aside(stage):
    """What a finished stage had made goes to FOLDER.replaced, so that it is made anew and never continued."""
    if stage.folder and stage.folder.exists():
        aside = stage.folder.with_name(f"{stage.folder.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        stage.folder.rename(aside)


def work(args, stage):
    """Runs the command, its words go to the terminal and to log.txt; the manifest comes last."""
    path, begin = place_of(args, stage), time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        put_aside(stage)
        path.unlink()
    before = hashes(stage.inputs, args.data)
    if lacking := [name for name, sha in before.items() if sha is None]:
        raise FileNotFoundError(f"stage {stage.name} reads {lacking[0]}, which is not there")
    with open(path.with_name("log.txt"), "ab") as log:
        process = subprocess.Popen(program(stage.words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            for line in process.stdout:
                log.write(line)
                print("  " + line.decode(errors="replace").rstrip(), flush=True)
        except BaseException:
            process.terminate()  # a trainer saves first
            process.wait()
            raise
        code = process.wait()
    if code == 1 and stage.name in args.accept:
        print(f"{stage.name}: exit code 1 (something deserves a look) is accepted")
    elif code:
        look = f"; look at it, then go on with --accept {stage.name}" if code == 1 else ""
        raise ValueError(f"stage {stage.name} ended with exit code {code}{look}; its words: {log.name}")
    made = hashes(stage.outputs, args.data)
    if lacking := [name for name, sha in made.items() if sha is None]:
        raise ValueError(f"stage {stage.name} ended well and did not write {lacking[0]}")
    write_json(path, {"version": 1, "stage": stage.name, "command": stage.words, "git": git_commit(), "inputs": before,
                      "outputs": made, "splits": stage.splits, "seconds": time.time() - begin})  # fmt: skip


def chosen(args, table):
    """The stages that --only and --from leave; those before them must be done once, and are taken as they are."""
    names = [stage.name for stage in table]
    if unknown := {*args.only, *([args.begin] if args.begin else []), *args.accept} - {*names}:
        raise ValueError(f"there is no stage {shown(min(unknown))}; there are {' '.join(names)}")
    some = args.only or names[names.index(args.begin) if args.begin else 0 :]
    for stage in table:
        needed = stage.name not in some and any(stage.name in s.after for s in table if s.name in some)
        if needed and not place_of(args, stage).exists():
            raise ValueError(f"stage {stage.name} has not been done, and what follows reads its files; run it first")
    return [stage for stage in table if stage.name in some]


def build_parser():
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--data", type=Path, required=True, help="folder of photographs with labels.csv "
                   "(tools/import_photos.py)")
    p.add_argument("--out", type=Path, required=True, help="folder for all that the stages make")
    p.add_argument("--ckpt", type=Path, help="weights to begin with, of the --arch; without: pretraining from nothing")
    p.add_argument("--arch", default="vit_small", help="backbone")
    p.add_argument("--device", default="auto", help="of stages that compute: auto (CUDA/ROCm if there), cpu, cuda")
    p.add_argument("--flags", nargs="+", default=[], metavar="STAGE: FLAGS", help="for a stage, in the place of its "
                   "own, as in 'baseline: --tune all --epochs 5'")
    p.add_argument("--only", nargs="+", default=[], help="run these stages alone")
    p.add_argument("--from", dest="begin", help="begin with this stage")
    p.add_argument("--accept", nargs="+", default=[], help="stages whose exit code 1 (deserves a look) stops nothing")
    p.add_argument("--again", help="why val_test is looked at once more, for tools/evaluate.py; recorded")
    p.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    p.add_argument("--smoke", action="store_true", help="all stages at toy size, on pictures drawn into --data")
    # fmt: on
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.smoke and args.ckpt:
        raise ValueError("--smoke starts from nothing; leave --ckpt out")
    if args.smoke and args.device == "auto":
        args.device = "cpu"
    if not args.smoke and not (args.data / "labels.csv").exists():
        raise FileNotFoundError(f"{args.data / 'labels.csv'} does not exist; tools/import_photos.py writes it")
    table = chosen(args, in_order(with_flags(stages(args), args.flags, args.smoke)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl+C: the stage ends too
    for stage in table:
        command = f"python {' '.join(stage.words)}"
        if args.dry_run:
            print(command)
        elif why := why_run(args, stage):
            print(f"{stage.name}: {why}\n  {command}", flush=True)
            work(args, stage)
        else:
            print(f"{stage.name}: done before", flush=True)
    if not args.dry_run:
        print(f"{len(table)} of {len(table)} stages are done: {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
