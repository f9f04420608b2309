"""Is a technique worth having? Arms x seeds of one command, judged on val_select against the command as it is.

    python tools/compare.py --out runs/compare/losses --seeds 0 1 2 \
        --arms "focal: --loss focal:gamma=2" "sam: --optimizer sam" more.txt \
        -- train_probe.py --ckpt runs/photos/last.pth --data data/photos --labels labels.csv --tune lora --steps 200
    python tools/compare.py --out runs/compare/search --search space.txt --trials 12 --rungs 3 -- train_probe.py ...
    python tools/compare.py show runs/a runs/b          # existing runs side by side; or a folder of a comparison

After -- stands the command that you would type; --out, --seed, the flags of an arm (they replace those of the command)
and with --devices --device are added. The same command again goes on: what is finished is not run again. Only
predictions/val_select.npz is read. Written: summary.json, table.md (for tools/recipes/LOG.md), report.html.

--search draws arms from lines like '--lr log 1e-4 1e-2', '--dropout uniform 0 0.5', '--rank choice 4 8 16'; with
--rungs the better half of them goes on to twice as many --steps, until the steps of the command.
"""

import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

from checkpoint import write_text
from tools.lib import arms as arms_of
from tools.lib import judge, loop, page, policies, tables
from tools.lib.cli import Parser, finite, natural, positive, run, shown
from tools.lib.commands import changed, program, replaced
from tools.lib.files import read_json_file, write_json
from tools.lib.fusion import POOLS, probabilities
from tools.lib.progress import progress

OURS = "--out --seed --device --devices".split()  # of the command: set here


def build_parser():
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("words", nargs="+", metavar="-- COMMAND", help="after --, the command that trains, as you would "
                   "type it; or the word show and runs or comparisons to set side by side")
    p.add_argument("--out", type=Path, help="folder of the comparison: a folder for each arm, one in it for each seed")
    p.add_argument("--arms", nargs="+", default=[], metavar="NAME: FLAGS", help="'focal: --loss focal:gamma=2', or "
                   "files with a line like this for each arm")
    p.add_argument("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="each arm is run with each of them")
    p.add_argument("--devices", nargs="+", default=[], help="run on these in parallel, one run on each at a time; a "
                   "device that is named twice gets two")
    p.add_argument("--search", type=Path, help="file with a space, a flag a line, from which arms are drawn")
    p.add_argument("--trials", type=positive, default=8, help="arms drawn by --search")
    p.add_argument("--rungs", type=positive, default=1, help="of --search: rounds of which each keeps the better half")
    p.add_argument("--search-seed", type=natural, default=0, help="another one draws other arms")
    p.add_argument("--metric", choices=arms_of.METRICS, default="mcc", help="what is compared")
    p.add_argument("--pool", choices=POOLS, default="mean", help="how views become one row")
    p.add_argument("--worth", type=finite, default=0.0, help="reject also what is shown to gain less than this")
    p.add_argument("--bootstrap", type=positive, default=1000, help="resamples of groups")
    # fmt: on
    return p


# ----- running


def value_of(words, flag):
    """The value of --steps in a command."""
    if flag not in words[:-1] or not words[words.index(flag) + 1].isdigit():
        raise ValueError(f"--rungs needs a command with {flag} N: earlier rungs have fewer")
    return int(words[words.index(flag) + 1])


def record(folder):
    """What is told of a finished run, beside its folder; None where it is not finished."""
    path = folder.parent / f"{folder.name}.json"
    if not path.exists():
        return None
    fields = {"command": list, "seconds": float, "commit": (str, type(None))}
    return read_json_file(path, fields, f"delete it and {folder}, and the run is made again", 1)


def check_finished(jobs):
    """{folder: command} -> folders of finished runs; one that was made with other flags is named."""
    done = {}
    for folder, command in jobs.items():
        if found := record(folder):
            if found["command"] != command:
                raise ValueError(f"{folder}: {changed(found['command'], command)}; give another --out, or "
                                 "delete this folder and its .json")  # fmt: skip
            tables.read(folder, "val_select")
            done[folder] = found
    return done


class Failed(Exception):
    """A run that ended without predictions."""


def run_one(folder, command, device, start):
    """Trains one arm with one seed; its output goes to <folder>.log. start: Popen, as far as runs are still wanted."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log, begin = folder.parent / f"{folder.name}.log", time.time()
    words = [*program(command), "--out", str(folder), *([f"--device={device}"] if device else [])]
    with open(log, "ab") as file:
        code = start(words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).wait()
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise Failed(f"exit code {code}: {shown(' '.join(last), 300)} ({log})")
    try:
        tables.read(folder, "val_select")
    except (OSError, ValueError) as error:
        raise Failed(f"ended without predictions: {shown(error, 300)} ({log})") from None
    found = {"version": 1, "command": command, "seconds": time.time() - begin, "device": device}
    write_json(folder.parent / f"{folder.name}.json", {**found, "commit": loop.git_commit()})


def run_all(jobs, devices):
    """Runs what is not finished -> {folder: why it failed}. Ctrl+C ends the runs too, which save and can go on."""
    done, failed, started, free = check_finished(jobs), {}, [], queue.Queue()
    waiting = [folder for folder in jobs if folder not in done]
    if done:
        print(f"{len(done)} of {len(jobs)} runs are there already")
    for device in devices or [None]:
        free.put(device)
    stop, lock = threading.Event(), threading.Lock()

    def start(words, **how):
        with lock:  # a run is either started and known, or never started: Ctrl+C must miss none
            if stop.is_set():
                raise Failed("interrupted")
            started.append(subprocess.Popen(words, **how))
            return started[-1]

    def work(folder):
        if stop.is_set():
            return
        device = free.get()
        try:
            run_one(folder, jobs[folder], device, start)
            print(f"done: {folder}", flush=True)
        except Failed as error:
            failed[folder] = str(error)
            print(f"interrupted: {folder}" if stop.is_set() else f"failed: {folder}: {error}", flush=True)
        finally:
            free.put(device)
            bar.update()

    with progress(total=len(waiting), desc="runs", unit="run") as bar, ThreadPoolExecutor(free.qsize()) as pool:
        try:
            for future in [pool.submit(work, folder) for folder in waiting]:
                future.result()
        except BaseException:
            with lock:
                stop.set()
            for process in started:
                process.terminate()  # nothing where it has ended
            raise
    return failed


# ----- judging


def load(folders):
    """Tables of val_select of several runs, all in the order of the first, labelled samples alone."""
    first = tables.read(folders[0], "val_select")
    every = [first, *(policies.aligned(tables.read(f, "val_select"), f, first, folders[0]) for f in folders[1:])]
    known = np.flatnonzero(first.labels >= 0)
    labels = first.labels[known]
    if len(known) == 0 or len(np.unique(labels)) < 2:
        raise ValueError(f"{folders[0]}: val_select has labels of {len(np.unique(labels))} classes; two are needed")
    return [table.take(known) for table in every]


def compare(folders, args, questions=0, repeats=None):
    """{arm: [run of each seed]} -> rows of arms.judge, and facts; repeats: instead of --bootstrap."""
    loaded = load([folder for each in folders.values() for folder in each])
    p, seeds = [probabilities(table.logits, args.pool) for table in loaded], len([*folders.values()][0])
    p = {name: p[k * seeds : (k + 1) * seeds] for k, name in enumerate(folders)}
    first, few = loaded[0], len(np.unique(loaded[0].groups)) < judge.FEWEST
    repeats = repeats or args.bootstrap
    rows = arms_of.judge(first.labels, first.groups, p, args.metric, repeats, args.worth, questions, few=few)
    facts = {"n": len(first.labels), "groups": len(np.unique(first.groups)), "classes": first.facts["classes"]}
    return rows, facts | {"split_sha256": first.facts["split_sha256"]}


def climb(args, jobs_of, trials):
    """Successive halving: {arm: flags} -> those that reach the steps of the command, their failures, and the looks."""
    full, looks, failed = value_of(args.words, "--steps") if args.rungs > 1 else 0, 0, {}
    for rung in range(args.rungs - 1, 0, -1):
        steps = max(1, full // 2**rung)
        budget = ["--steps", str(steps)]
        jobs = {name: jobs_of(name, [*flags, *budget], f"steps_{steps}/") for name, flags in trials.items()}
        ends = run_all({folder: words for each in jobs.values() for folder, words in each.items()}, args.devices)
        whole = {name: [*each] for name, each in jobs.items() if not {*each} & {*ends}}
        failed |= {name: f"failed: {ends[f]}" for name, each in jobs.items() for f in each if f in ends}
        if not whole:
            raise ValueError(f"all arms failed at {steps} steps, first: {shown([*ends.values()][0], 300)}")
        scores = {name: row["mean"] for name, row in compare(whole, args, repeats=1)[0].items()}
        looks += sum(map(len, whole.values()))
        best = sorted(scores, key=lambda name: -scores[name])[: max(1, (len(trials) + 1) // 2)]
        print(f"{steps} steps: {len(best)} of {len(trials)} arms go on; best {best[0]} with {scores[best[0]]:.4f}")
        trials = {name: flags for name, flags in trials.items() if name in best}
    return trials, failed, looks


# ----- telling


COLUMNS = ("arm", "flags", "seeds", "{}", "minus base (90%)", "p (Holm)", "time", "decision")


def table_rows(summary):
    """Cells of the table, the baseline first, then the best arm first."""
    rows = summary["arms"]
    for name in sorted(rows, key=lambda name: (name != arms_of.BASE, -rows[name].get("difference", -9.0))):
        row, cells = rows[name], ["-"] * 5
        if "scores" in row:
            spread = f" ({min(row['scores']):.3f} to {max(row['scores']):.3f})" if len(row["scores"]) > 1 else ""
            cells = [f"{row['mean']:.3f}{spread}", "", "", f"{row['seconds']:.0f} s", ""]
        if "difference" in row:
            known = judge.exists(row["low"])
            ends = f"{row['low']:+.3f} to {row['high']:+.3f}" if known else "too few for an interval"
            cells[1:3] = f"{row['difference']:+.3f} ({ends})", f"{row['p_holm']:.3g}"
            cells[3] += f", {row['seconds'] / rows[arms_of.BASE]['seconds']:.2f} x"
        cells[4] = row.get("decision", "")
        yield [name, " ".join(row["flags"]), len(row.get("scores", ())), *cells]


def markdown(summary):
    def cell(value):
        return shown(value, 300).replace("|", "\\|")

    header = [text.format(summary["metric"].upper()) for text in COLUMNS]
    lines = [header, ["---"] * len(header), *table_rows(summary)]
    yield from ("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def in_words(summary):
    rows = {name: row for name, row in summary["arms"].items() if "difference" in row}
    said = f"{summary['n']} samples in {summary['groups']} groups of val_select, {len(summary['seeds'])} seeds. "
    for decision in ("keep", "reject", "inconclusive"):
        names = [name for name, row in rows.items() if row["decision"] == decision]
        said += f"{decision}: {', '.join(names) or 'none'}. "
    best = max(rows, key=lambda name: rows[name]["mean"], default=None)
    if best:
        said += (f"Best arm: {best} ({' '.join(rows[best]['flags'])}), chosen by its score among {summary['looks']} "
                 "looks at val_select, so its number is optimistic.")  # fmt: skip
    return said if len(summary["seeds"]) > 1 else said + " One seed says nothing of others: nothing can be kept."


def plot(summary):
    """Intervals of the differences; row k of the table is the k-th from below."""
    rows = [(k, r) for k, r in enumerate(summary["arms"].values()) if judge.exists(r.get("low"))]
    base, ends = summary["arms"][arms_of.BASE]["scores"], [(r["low"], r["high"], np.nan) for _, r in rows]
    bars = np.ravel(ends), np.ravel([(k, k, np.nan) for k, _ in rows])
    each = [(score - zero, k) for k, r in rows for score, zero in zip(r["scores"], base)]
    curves = {"90%": bars, "seeds": tuple(zip(*each)) or ((), ()), "mean": ([r["difference"] for _, r in rows],
              [k for k, _ in rows])}  # fmt: skip
    name = summary["metric"].upper()
    return page.line_plot(f"{name} minus base", curves, name, "arm", [("x", 0, "base")], points=("seeds", "mean"))


def write_all(out, summary):
    write_json(out / "summary.json", summary)
    write_text(out / "table.md", "\n".join(markdown(summary)) + "\n")
    header = [text.format(summary["metric"].upper()) for text in COLUMNS]
    order = [[k, *cells] for k, cells in enumerate(table_rows(summary))]
    arms = {cells[1]: summary["arms"][cells[1]] for cells in order}
    parts = [in_words(summary), page.table(["", *header], order), plot({**summary, "arms": arms})]
    parts.append(f"Command: {' '.join(summary['command'])}")
    write_text(out / "report.html", page.page("Comparison", *parts))


# ----- existing runs


def show(paths, args):
    """A comparison: its table. Runs: their scores and what each has more than the first, over groups alone."""
    paths = [Path(path) for path in paths]
    for path in [path for path in paths if (path / "summary.json").exists()]:
        fields = {"metric": str, "arms": dict, "n": int, "groups": int, "seeds": list, "looks": int}
        summary = read_json_file(path / "summary.json", fields, "run the comparison again", 1)
        print(f"{path}: {in_words(summary)}", *markdown(summary), sep="\n")
    if runs := [path for path in paths if not (path / "summary.json").exists()]:
        rows, facts = compare({str(path): [path] for path in runs}, args)
        print(f"{facts['n']} samples in {facts['groups']} groups of val_select. Intervals are over groups: what "
              "another seed would give is not in them.")  # fmt: skip
        for name, row in rows.items():
            more = f", minus {runs[0]} {row['difference']:+.4f}" if "difference" in row else ""
            more += f" ({row['low']:+.4f} to {row['high']:+.4f})" if more and np.isfinite(row["low"]) else ""
            print(f"{args.metric} {row['mean']:.4f}  {shown(name)}{more}")
    return 0


def check(args):
    """Refuses what cannot be compared -> {arm: flags}."""
    if not args.out:
        raise ValueError("--out is needed: the folder of the comparison")
    if bool(args.arms) == bool(args.search):
        raise ValueError("give --arms 'NAME: FLAGS' ..., or --search FILE to draw them")
    if len({*args.seeds}) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: each seed once")
    arms = arms_of.read_arms(args.arms)
    if args.search:
        space = arms_of.read_space(args.search)
        arms = {f"trial_{k:02d}": arms_of.draw(space, args.search_seed, k) for k in range(args.trials)}
    elif args.rungs > 1:
        raise ValueError("--rungs belongs to --search")
    for where, words in {"the command": args.words, **arms}.items():
        if ours := [word for word in words if word.partition("=")[0] in OURS]:
            raise ValueError(f"{where} has {ours[0]}, which is set here by --out, --seeds and --devices")
    program(args.words)
    return arms


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.words[0] == "show":
        return show(args.words[1:], args)
    arms = check(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl+C: the runs end too

    def jobs_of(name, flags, rung=""):
        words = replaced(args.words, flags)
        return {args.out / f"{rung}{name}" / f"seed_{s}": [*words, "--seed", str(s)] for s in args.seeds}

    args.out.mkdir(parents=True, exist_ok=True)
    held = loop.lock(args.out)  # noqa: F841 - two comparisons in one folder would run everything twice
    trials, failed, looks = climb(args, jobs_of, arms)
    jobs = {name: jobs_of(name, flags) for name, flags in {arms_of.BASE: [], **trials}.items()}
    ends = run_all({folder: words for each in jobs.values() for folder, words in each.items()}, args.devices)
    failed |= {name: f"failed: {ends[f]}" for name, each in jobs.items() for f in each if f in ends}
    if arms_of.BASE in failed:
        raise ValueError(f"the command as it is {failed[arms_of.BASE]}; without it there is nothing to compare with")
    whole = {name: [*each] for name, each in jobs.items() if name not in failed}
    rows, facts = compare(whole, args, questions=len(arms))
    looks += sum(map(len, whole.values()))
    for name, each in whole.items():
        rows[name]["seconds"] = float(np.median([record(folder)["seconds"] for folder in each]))
    rows |= {name: {"decision": shown(why, 200)} for name, why in failed.items()}
    rows = {name: {"flags": {arms_of.BASE: [], **arms}[name], **row} for name, row in rows.items()}
    summary = {"version": 1, "metric": args.metric, "pool": args.pool, "command": args.words, "seeds": args.seeds}
    summary |= {**facts, "looks": looks, "commit": loop.git_commit(), "worth": args.worth, "arms": rows}
    write_all(args.out, summary)
    print("\n".join([in_words(summary), *markdown(summary), str(args.out / "report.html")]))
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
