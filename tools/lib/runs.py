"""A run as it lies on disk, read with care: its checkpoint, recipe, log and earlier looks; its pulse.

    state, size = read_checkpoint(run / "last.pth")
    rows, skipped = read_log(run / "metrics.jsonl")
    beat = pulse(rows, seconds_since_it_grew, state["args"])

Files of a run may be damaged. What is needed and is not of the promised types ends in one sentence; rows of a log are
skipped and counted.
"""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np

import checkpoint
import data
from model import is_provenance
from tools.lib.cli import shown
from tools.lib.files import is_a, last_per_step, read_json_file, read_lines, wrong_field
from tools.lib.limits import spiked

LARGEST_VIEW = 4096  # pixels per side
LARGEST = 1e39  # float32 holds nothing beyond: a larger finite number in a file is damage


def is_number(value):
    """A float or int that a run can have logged; NaN and infinity are such."""
    return is_a(value, float) and not LARGEST < abs(value) < math.inf


def read_checkpoint(path):
    """(state, bytes) of the file as it is when opened: its name may go to a newer save, or go away, meanwhile."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; has the run saved one yet (--save-every)?")
    with open(path, "rb") as f:
        same = Path(f"/proc/self/fd/{f.fileno()}")  # Linux: this very file, whatever happens to its name
        before = os.fstat(f.fileno())
        try:
            state = checkpoint.load(same if same.exists() else path)
            if "classes" in state:
                raise ValueError(f"{path} is of a supervised run (train_probe.py --tune), which has its looks at "
                                 "val_select in metrics.jsonl; this program is for runs of train_ssl.py")  # fmt: skip
            if missing := [name for name in STATE if name not in state]:
                raise ValueError(f"{path}: field {missing[0]} is missing; use an older step_*.pth of the same run")
        except checkpoint.BROKEN as error:
            why = str(error).replace(str(same), str(path))
            changed = f"{path} changed while it was read ({type(error).__name__}: {why})"
            raise ValueError(why if str(path) in why else changed) from None
        after = os.fstat(f.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} was overwritten in place while it was read; copy to another name, then rename")
    check_state(path, state)
    return {key: value for key, value in state.items() if key not in ("optimizer", "gram")}, after.st_size


STATE = "step args arch encoding eval_view student teacher centers".split()  # must be there; load() knows their types
FLAGS = dict.fromkeys("steps extend grace log_every batch_size teacher_temp_warmup student_temp".split(), float)
FLAGS |= dict.fromkeys("local_size head_hidden head_bottleneck prototypes".split(), int)
FLAGS |= dict(data=str, no_split=bool, centering=str, teacher_temp=(list, tuple))


def check_state(path, state):
    """Refuse a whole checkpoint that train_ssl.py did not write."""
    wrong = wrong_field(state["args"], FLAGS)
    if not wrong:
        temperatures, view = state["args"]["teacher_temp"], state["eval_view"]
        if len(temperatures) != 2 or not all(map(is_number, temperatures)):
            wrong = "flag teacher_temp is not two numbers"
        elif not 0 < view["size"] <= LARGEST_VIEW:
            wrong = f"eval_view is {view['size']} pixels wide, expected 1 to {LARGEST_VIEW}"
        elif state["encoding"] == "hu16-v1" and not view["window"]:
            wrong = "eval_view has no window for hu16-v1"
        elif not isinstance(seen := state.get("provenance", {}), dict) or seen and not is_provenance(seen):
            wrong = "provenance is not known, and seen with a salt and hashes for each data set"
    if wrong:
        raise ValueError(f"{path}: {wrong}; use another checkpoint of the same run, or the code that wrote it")


CONFIG = dict(args=dict, recipes=list, masking=list, patch_size=int, split=(str, type(None)), index_sha256=str,
              split_sha256=(str, type(None)))  # fmt: skip
CONFIG_FLAGS = dict.fromkeys("seed steps batch_size micro_batch z_stride gram_start".split(), int)
CONFIG_FLAGS |= dict(data=str, limit=(int, type(None)), overfit=bool)
OTHER_CODE = "use the code that trained this run, or put its own config.json back"


def read_run_config(folder):
    """config.json of a run, checked."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --run names a folder that train_ssl.py wrote")
    config = read_json_file(path, CONFIG, OTHER_CODE)
    counts = [config["patch_size"], *(config["args"].get(key) for key in ("batch_size", "micro_batch", "z_stride"))]
    wrong = wrong_field(config["args"], CONFIG_FLAGS)
    good = same_kind(config["masking"], (0.5, (0.1, 0.5))) and same_kind(counts, (1, 1, 1, 1)) and all(counts)
    if not wrong and not good:
        wrong = f"masking is {config['masking']}, patch size, batch, micro-batch and stride are {counts}"
    if wrong:
        raise ValueError(f"{path}: {shown(wrong, 200)}; {OTHER_CODE}")
    read_recipes(config, path)
    return config


def same_kind(value, like):
    """Whether a stored value can stand where `like` does: of its length, its types and a possible size."""
    if isinstance(like, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(like) and all(map(same_kind, value, like))
    return is_a(value, type(like)) and (isinstance(value, str) or 0 <= value <= LARGEST_VIEW)


def read_recipes(config, path="config.json"):
    """Recipes as stored -> Recipe objects; JSON made lists of their tuples."""
    usual, recipes = data.RECIPES["ct"], config["recipes"]
    if not recipes or not all(isinstance(recipe, dict) for recipe in recipes):
        raise ValueError(f"{path}: recipes is no list of objects; {OTHER_CODE}")
    for recipe in recipes:
        if odd := recipe.keys() ^ {f.name for f in dataclasses.fields(data.Recipe)}:
            odd = shown(sorted(odd), 200)
            raise ValueError(f"{path}: the recipe of this run differs from ours in {odd}; {OTHER_CODE}")
        for name, value in recipe.items():
            if not same_kind(value, getattr(usual, name)):
                raise ValueError(f"{path}: {name} of a recipe is {shown(value)}; {OTHER_CODE}")
        if not recipe["global_size"] > 0 or not recipe["local_size"] > 0 or recipe["kind"] not in ("ct", "photo"):
            raise ValueError(f"{path}: a recipe of kind {shown(recipe['kind'])} or of size 0; {OTHER_CODE}")
    return [data.Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.items()}) for recipe in recipes]


def open_trained(root, args, split, trained):
    """The images that a run with these flags learned from, as train_ssl.py opened them; other data is refused.

    split: None where it had none; trained: {fact: value} of the run, which must be those of the data.
    """
    kept = args["limit"], args["z_stride"]
    if split:  # duplicates across splits concern who judges, and the file may be younger than the run
        source = data.open_for(root, "fit", None, *kept, allow_duplicates=True)
    else:
        source = data.thin(data.open_source(root), *kept)
    source.at_distance(args.get("neighbour_mm"))  # runs of before have none
    for key, value in trained.items():
        if value != getattr(source, key):
            raise ValueError(f"{root}: {key} is not that of the run; put its data back, or name them with --data")
    return source


def recipe_of(folder, state):
    """How the run cuts its views; without config.json (a copied checkpoint) the default recipe."""
    if (path := folder / "config.json").exists():
        return read_recipes(read_json_file(path, {"recipes": list}, OTHER_CODE), path)[0]
    base = data.RECIPES["photo" if state["encoding"] == "photo" else "ct"]
    return dataclasses.replace(base, global_size=state["eval_view"]["size"], local_size=state["args"]["local_size"])


def read_log(path):
    """Rows of metrics.jsonl: events, and lines of numbers -> (rows, how many lines were skipped)."""
    rows, skipped = read_lines(path, {"step": int})
    good = [
        row for row in rows
        if (isinstance(row["event"], str) if "event" in row else all(map(is_number, row.values())))
    ]  # fmt: skip
    return good, skipped + len(rows) - len(good)


def read_history(path):
    """Earlier looks -> (rows, how many lines were skipped)."""
    rows, skipped = read_lines(path, dict(step=int, numbers=dict, pulse=dict, warming=bool, sensors=dict))
    good = []
    for row in rows:
        values = [v for v in (*row["numbers"].values(), row["pulse"].get("images_s")) if v is not None]
        if all(map(is_number, [*values, *row["sensors"].values()])):
            good.append(row)
    return good, skipped + len(rows) - len(good)


def middle(rows, key):
    """Median of what is a finite number, else None."""
    values = [v for r in rows if isinstance(v := r.get(key), (int, float)) and math.isfinite(v)]
    return float(np.median(values)) if values else None


def course(rows):
    """Where DINO + iBOT goes after the warm-up: KoLeo may be negative, and Gram joins late."""
    points = [(r["step"], r.get("dino", math.nan) + r.get("ibot", 0)) for r in rows]
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 5:
        return {}
    steps, values = np.array(points).T
    smooth = np.array([np.median(values[k : k + 5]) for k in range(len(values) - 4)])
    late = slice(-max(5, len(values) // 4), None)
    slope = np.polyfit(steps[late], values[late], 1)[0]
    return {"rise": float(smooth[-1] / max(smooth.min(), 1e-9) - 1), "slope_per_1000": float(1000 * slope)}


def pulse(lines, age_s, args):
    """What metrics.jsonl says of a run with these flags; its last line is age_s old -> dict, empty without a line.

    Before the first numbers it is the age and what the last events say.
    """
    rows, events = last_per_step(lines, "loss"), [r for r in lines if "event" in r]
    said = [e["event"].replace("SAVE FAILED, training goes on", "SAVE FAILED") for e in events]  # it may have ended
    saves = [text for text in said if text.startswith(("saved", "SAVE FAILED"))]
    found = {"age_s": age_s, "finished": False, "last_event": said[-1] if said else None}
    found["failed_save"] = saves[-1] if saves and saves[-1] != "saved" else None
    if not rows:
        return found if events else {}
    last, recent = rows[-1], rows[-20:]
    found |= {key: last.get(key) for key in ("loss", "dino", "ibot", "excess", "lr")}
    found |= {key: middle(rows[-5:], key) for key in "teacher_entropy kl rankme images_s data_wait memory_gb".split()}
    found |= course([r for r in rows if r["step"] > args["grace"]])
    found |= {"last_step": last["step"], "finished": last["step"] >= args["steps"] + args["extend"]}
    found["log_interval_s"] = args["log_every"] * args["batch_size"] / (found["images_s"] or math.inf)
    found["eta_h"] = max(last.get("seconds_to_go", 0) - age_s, 0) / 3600
    found["nonfinite_loss"] = int(not math.isfinite(last["loss"]))
    usual = [middle(rows[max(0, k - 10) : k], "loss") or math.inf for k in range(1, len(rows))]
    spikes = [r["step"] for r, u in list(zip(rows[1:], usual))[-20:] if spiked(r["loss"], u)]
    since = last["step"] - 20 * args["log_every"]
    skips = [e["step"] for e in events if e["event"].startswith("skipped: loss") and e["step"] > since]
    found |= {"spikes": len(spikes), "skipped": len(skips), "odd_step": max(spikes + skips, default=None)}
    for name, key in (("images_s_change", "images_s"), ("memory_change", "memory_gb")):  # shares, since the start
        was, now = middle(rows[1:21], key), middle(recent, key)
        found[name] = now / was - 1 if was and now else None
    return found
