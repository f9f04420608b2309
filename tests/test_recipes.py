"""Every recipe runs as it is typed, at toy size; every flag of train_ssl.py runs beside every other one."""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import be_rank, free_port
from test_data import make_ct, make_photos, make_split
from test_train import ended, latest_step, lines, same

import checkpoint
import train_ssl
from data import open_for
from tools import make_splits

ROOT = Path(__file__).resolve().parent.parent
# One thread for each process: two ranks, or two runs, share two cores. The first line of PATH is this environment.
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}

# Recipes: the shell scripts

STEPS, KILLED_FROM = 30, 10
TOY = (
    "--arch vit_test --global-size 32 --local-size 16 --local-crops 2 --prototypes 32 --head-hidden 32 "
    "--head-bottleneck 16 --batch-size 8 --micro-batch 4 --koleo-group 4 --eval-every 6 --save-every 2 --device cpu "
    f"--workers 1 --steps {STEPS}"
).split()
LATER = "--gram-start 0.3".split()  # update 9, then a refresh every 3: the default, 15, lies behind the kill
OWN = {  # what else differs from the recipe
    "pretrain": "--warmup 3 --layerscale 0.1".split(),  # compiled, as it is typed
    "gram": "--no-compile --warmup 3 --gram-refresh 8".split(),
    "highres": "--no-compile --warmup 3 --sizes 32/16,48/16".split(),
    "explora": "--no-compile --warmup 3".split(),
    "big_run": [*LATER, "--layerscale", "0.1"],
    "micro_run": LATER,
    "smoke_cpu": [],
}
NEEDS_WEIGHTS = ("gram", "highres", "explora")


def recipe(name, *words):
    return ["bash", str(ROOT / "tools" / "recipes" / f"{name}.sh"), *map(str, words)]


def options(words):
    """The names of the flags of train_ssl.py among these words."""
    return {a.dest for a in train_ssl.build_parser()._actions if set(a.option_strings) & set(words)}


STUB = """#!/bin/sh
{ printf '%s\\t' "$@"; echo; } >> "$CALLS"
[ -z "$SAVES" ] || touch "$SAVES"
call=$(wc -l < "$CALLS")
set -- $CODES
[ "$call" -le $# ] || exit 0
shift $((call - 1))
exit "$1"
"""


def dry(folder, words, codes="", **env):
    """(exit code, calls of python and torchrun, stderr) of a recipe whose calls run nothing and exit with `codes`."""
    for name in ("python", "torchrun"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    env = ENV | {"PATH": f"{folder}:{ENV['PATH']}", "CALLS": str(folder / "calls"), "CODES": codes, **env}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done.returncode, [call.split("\t")[:-1] for call in calls], done.stderr


def stated(folder, name):
    """The flags of train_ssl.py that a recipe gives."""
    given = [folder] if name == "smoke_cpu" else ["DATA", "WEIGHTS"] if name in NEEDS_WEIGHTS else ["DATA"]
    code, calls, errors = dry(folder, recipe(name, *given))
    assert code == 0, errors
    return calls[-1][calls[-1].index("train_ssl.py") + 1 :]


def test_every_recipe_is_run_here():
    scripts = {path.stem for path in (ROOT / "tools" / "recipes").glob("*.sh")}
    assert scripts - {"gpu_check"} == set(OWN)  # no test runs gpu_check whole: it measures


@pytest.mark.parametrize("name", OWN)
def test_flags_of_a_recipe_fit_together_at_its_own_size(tmp_path, name):
    """What is wrong with them would be said before the data folder, which is not there, is opened."""
    words = [*stated(tmp_path, name), "--data", str(tmp_path / "nothing"), "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        train_ssl.main(words)


@pytest.mark.parametrize("name", sorted(set(OWN) - {"smoke_cpu"}))
def test_a_recipe_asks_for_what_it_needs(tmp_path, name):
    code, calls, errors = dry(tmp_path, recipe(name))
    assert code == 1 and not calls and "1: processed folder" in errors
    if name in NEEDS_WEIGHTS:
        code, calls, errors = dry(tmp_path, recipe(name, "DATA"))
        assert code == 1 and not calls and "2: weights" in errors


def test_gpus_is_the_number_of_processes(tmp_path):
    for name in ("pretrain", "gram", "highres"):
        calls = dry(tmp_path, recipe(name, "DATA", "WEIGHTS"), GPUS="2")[1]
        assert "--nproc-per-node=2" in calls[0], name


def test_the_long_run_starts_again_only_where_that_helps(tmp_path):
    words = recipe("big_run", "DATA", "OUT", "--seed", "3")
    code, calls, errors = dry(tmp_path, words, "137 1 0", WAIT="0")
    assert code == 0 and len(calls) == 3 and calls[0] == calls[2] and calls[0][-2:] == ["--seed", "3"]
    assert "attempt 1 stopped with code 137; resuming in 0 s" in errors
    for last in (2, 3, 130):
        assert dry(tmp_path, words, f"1 {last}", WAIT="0")[0] == last
    code, calls, _ = dry(tmp_path, words, "1 " * 30, WAIT="0")
    assert code == 1 and len(calls) == 20
    # 2 is a mistake of the user's, or a disk that is gone for a minute: not where this very command has saved already
    run = tmp_path / "run"
    run.mkdir()
    words = recipe("big_run", "DATA", run)
    (run / "step_00000001.pth").touch()
    os.utime(run / "step_00000001.pth", (1e9, 1e9))  # of an earlier start
    assert dry(tmp_path, words, "1 2 0", WAIT="0")[0] == 2
    assert dry(tmp_path, words, "1 2 0", WAIT="0", SAVES=str(run / "step_00000002.pth"))[0] == 0


def tree(pid):
    """The process and all below it. Its process group is less: torchrun gives every worker a session of its own."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = [int(i) for p in Path(f"/proc/{pid}/task").glob("*/children") for i in p.read_text().split()]
        return [pid, *(below for child in children for below in tree(child))]
    return []


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Shop:
    """Runs recipes on one toy collection; the unbroken run of each is made once."""

    def __init__(self, root, fork):
        self.root, self.fork, self.data = root, fork, make_ct(root / "data", series=10)
        make_split(self.data, {f"toy/P{i}": "train" if i < 6 else "val_select" for i in range(9)})
        self.env = ENV | {"TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"), "PATIENTS": "8", "SIZE": "64", "WAIT": "1"}
        self.whole, self.started = {}, []

    def words(self, name, out, *more):
        given = [self.data, out]
        if name == "smoke_cpu":
            given = [out]
        elif name in NEEDS_WEIGHTS:
            before = {"gram": "pretrain", "highres": "gram", "explora": "pretrain"}[name]
            given = [self.data, self.unbroken(before) / "last.pth", out]
        return recipe(name, *given, *TOY, *OWN[name], *more)

    def start(self, name, out, *more):
        """The typed recipe, its output in OUT.log."""
        words = self.words(name, out, *more)
        with open(f"{out}.log", "a") as log:
            process = subprocess.Popen(words, env=self.env, stdout=log, stderr=log, start_new_session=True)
        self.started.append(process)
        return process

    def start_stated(self, name, out, work=None):
        """What the recipe (for the folder `work`) says to train_ssl.py, without shell and torchrun: a quick start."""
        code, calls, errors = dry(self.root, self.words(name, work or out))
        assert code == 0, errors
        flags = calls[-1][calls[-1].index("train_ssl.py") + 1 :]
        flags[flags.index("--out") + 1] = str(out)
        cache = {"TORCHINDUCTOR_CACHE_DIR": self.env["TORCHINDUCTOR_CACHE_DIR"]}
        self.started.append(self.fork([ROOT / "train_ssl.py", *flags], f"{out}.log", **cache))
        return self.started[-1]

    def folder(self, name, out):
        return out / "run" if name == "smoke_cpu" else out

    def begin(self, name, work=None):
        if name not in self.whole:
            self.whole[name] = self.start_stated(name, self.root / name, work)

    def unbroken(self, name):
        self.begin(name)
        assert wait(self.whole[name]) == 0, Path(f"{self.root / name}.log").read_text()[-2000:]
        return self.root / name


def wait(process, seconds=600):
    """The exit code of a process, however it was started; None: it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while ended(process) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return ended(process)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, started):
    shop = Shop(tmp_path_factory.mktemp("recipes"), started)
    yield shop
    for process in shop.started:
        kill(tree(process.pid) if ended(process) is None else [])


def flat(value, name=""):
    """{dotted name: tensor or plain value} of a checkpoint."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}").items()}


def resumed_at(run):
    """The update from which a run went on, once."""
    (event,) = [row["event"] for row in lines(run, "event") if row["event"].startswith("resumed from")]
    return checkpoint.step_of(event.split()[-1])


def looked_at(run):
    """Updates with numbers of val_select."""
    return {row["step"] for row in lines(run, "val_loss")}


TYPED_TWICE = ("pretrain", "big_run", "smoke_cpu")  # it compiles, goes on by itself, makes its own data


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_recipe_killed_and_typed_again_ends_with_the_same_bits(shop, name):
    out = shop.root / f"{name}-killed"
    run, log = shop.folder(name, out), Path(f"{out}.log")
    process = (shop.start if name in TYPED_TWICE else shop.start_stated)(name, out)
    deadline = time.monotonic() + 300
    while ended(process) is None and latest_step(run) < KILLED_FROM and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended(process) is None and latest_step(run) >= KILLED_FROM, log.read_text()[-2000:]
    if name == "big_run":  # a driver fault: python dies, and the script goes on by itself
        kill(tree(process.pid)[1:2])
    else:
        kill(tree(process.pid))
        wait(process)
        process = shop.start(name, out)
    shop.begin(name, out)  # meanwhile
    assert wait(process, 300) == 0, log.read_text()[-2000:]
    if name == "big_run":
        assert "attempt 1 stopped with code 137; resuming in 1 s" in log.read_text()

    whole = shop.unbroken(name)
    a, b = (flat(checkpoint.load(r / "last.pth")) for r in (whole, run))
    a.pop(".args.out"), b.pop(".args.out")
    same(a, b)
    assert sum(isinstance(v, torch.Tensor) for v in a.values()) > 100

    assert a[".step"] == STEPS and all(v.isfinite().all() for v in a.values() if isinstance(v, torch.Tensor))
    assert KILLED_FROM <= resumed_at(run) < STEPS
    assert not [row for row in lines(run, "event") if re.search("interrupted|skipped|FAILED", row["event"])]
    looks = set(range(6, STEPS + 1, 6))
    assert looked_at(whole) == looked_at(run) == looks
    assert all(math.isfinite(row["val_loss"]) for r in (whole, run) for row in lines(r, "val_loss"))
    with_gram = name not in ("pretrain", "smoke_cpu")
    assert (a[".gram_refreshes"] > 0) == with_gram and (".gram" in a) == (not with_gram)

    words = stated(shop.root, name)
    asked = vars(train_ssl.build_parser().parse_args(words))
    kept = options(words) - options([*TOY, *OWN[name]]) - {"data", "out", "init", "gram_teacher"}
    args = json.loads((run / "config.json").read_text())["args"]
    assert {k: args[k] for k in kept} == json.loads(json.dumps({k: asked[k] for k in kept}))
    assert args["batch_size"] > args["micro_batch"]


def victims(pid, how):
    """Of the processes shell, (torchrun,) trainer, reader: whom a kill takes."""
    pids = tree(pid)
    return {"all": pids, "below the shell": pids[1:2], "trainer": pids[-2:-1], "reader": pids[-1:]}[how]


@pytest.mark.proof
@pytest.mark.parametrize("name", sorted(set(OWN) - {"smoke_cpu"}))
def test_twenty_kills_of_a_recipe_change_no_bit(shop, name):
    long = "--no-compile --steps 90 --save-every 1".split()
    shop.env["WAIT"] = "0"
    run, random_ = shop.root / f"{name}-hunted", random.Random(name)
    whole = shop.start(name, shop.root / f"{name}-long", *long)
    assert whole.wait(600) == 0
    process, kills = None, []
    while len(kills) < 20:
        if process is None or process.poll() is not None:
            assert process is None or process.returncode, f"the run ended after {len(kills)} kills"
            process = shop.start(name, run, *long)
        target = latest_step(run) + random_.randint(1, 4)
        while process.poll() is None and latest_step(run) < target:
            time.sleep(random_.random() / 100)
        how = ("all", "below the shell", "trainer", "reader")[len(kills) % 4]
        before = victims(process.pid, how)
        below = tree(process.pid)
        kill(before)
        kills.append(how)
        if name != "big_run" or how == "all":  # that script goes on by itself
            process.wait(120)  # whoever is left ends without help
            deadline = time.monotonic() + 60
            while alive := [pid for pid in below if Path(f"/proc/{pid}/cwd").exists()]:
                assert time.monotonic() < deadline, alive
                time.sleep(0.05)
    kill(tree(process.pid))
    process.wait()
    assert shop.start(name, run, *long).wait(600) == 0, Path(f"{run}.log").read_text()[-2000:]
    a, b = (flat(checkpoint.load(r / "last.pth")) for r in (shop.root / f"{name}-long", run))
    a.pop(".args.out"), b.pop(".args.out")
    same(a, b)
    assert a[".step"] == 90 and set(range(6, 91, 6)) == looked_at(run)
    print(f"{name}: {len(kills)} kills, resumed {sum('resumed' in row['event'] for row in lines(run, 'event'))} times")


# All pairs of flags of train_ssl.py


DEFAULT, ON = "default", "on"
# A value is typed behind its flag; "default": the flag is left away; "on": it stands alone. {} are files of `kitchen`.
TABLE = {
    "data": ("{ct}", "{rgb}", "{photos}"),
    "out": ("{out}",),
    "resume": (DEFAULT, "never"),  # never: of the first start only
    "steps": ("12", "14"),
    "extend": (DEFAULT, "2"),
    "seed": (DEFAULT, "3"),
    "device": (DEFAULT, "cpu"),
    "precision": (DEFAULT, "fp32", "bf16", "bf16-stream"),
    "workers": (DEFAULT, "0", "2"),
    "log_every": (DEFAULT, "2"),
    "save_every": ("2", "3"),
    "keep_last": (DEFAULT, "1"),
    "keep_every": (DEFAULT, "4"),
    "eval_every": ("3", "5"),
    "time_limit": (DEFAULT, "30"),
    "grace": (DEFAULT, "4"),
    "skip_bad": (DEFAULT, "2"),
    "deterministic": (DEFAULT, ON),
    "compile": (DEFAULT,),  # minutes for each start: see ALONE
    "fsdp": (DEFAULT, ON),
    "checkpointing": (DEFAULT, ON),
    "allow_duplicates": (DEFAULT, ON),
    "no_split": (DEFAULT,),  # without a look at val_select: see ALONE
    "weights": (DEFAULT,),  # of photographs: see ALONE
    "limit": (DEFAULT, "24"),
    "overfit": (DEFAULT, ON),
    "z_stride": (DEFAULT, "2"),
    "neighbour_mm": (DEFAULT,),  # of exact HU alone: see ALONE
    "aug": (DEFAULT, "ct_any_window", "photo"),
    "global_size": ("32", "48"),
    "local_size": ("16", "32"),
    "local_crops": ("2", "3"),
    "sizes": (DEFAULT, "32/16,48/32"),
    "field": (DEFAULT, "0.3 0.8"),
    "global_scale": (DEFAULT, "0.5 1"),
    "local_scale": (DEFAULT, "0.1 0.4"),
    "mask_probability": (DEFAULT, "0", "1"),
    "mask_ratio": (DEFAULT, "0.3 0.8"),
    "arch": ("vit_test",),  # the next one takes half a minute: see ALONE
    "init": (DEFAULT, "{weights}"),
    "adapter_norm": (DEFAULT, "doran"),  # their numbers are in one row: see ALONE
    "adapter_rank": (DEFAULT,),
    "adapter_alpha": (DEFAULT,),
    "adapter_targets": (DEFAULT,),
    "adapter_init": (DEFAULT,),
    "unfreeze": (DEFAULT,),
    "prototypes": ("32", "48"),
    "head_hidden": ("32", "24"),
    "head_bottleneck": ("16", "24"),
    "prototype_norm": (DEFAULT, "0.08"),
    "drop_path": (DEFAULT, "0.3"),
    "layerscale": (DEFAULT, "0.1"),
    "rope_rescale": (DEFAULT, "1"),
    "w_dino": (DEFAULT, "0.5"),
    "w_ibot": (DEFAULT, "0"),
    "w_koleo": (DEFAULT, "0"),
    "koleo_group": ("2", "4"),
    "centering": (DEFAULT, "softmax", "none"),
    "student_temp": (DEFAULT, "0.2"),
    "teacher_temp": (DEFAULT, "0.02 0.03"),
    "teacher_temp_warmup": (DEFAULT, "5", "0"),
    "gram_start": (DEFAULT, "5", "0"),
    "gram_refresh": (DEFAULT, "3"),
    "gram_max_refreshes": (DEFAULT, "1"),
    "gram_scale": (DEFAULT, "1"),
    "gram_weight": (DEFAULT, "0.5"),
    "gram_ramp": (DEFAULT, "3"),
    "gram_teacher": (DEFAULT, "{weights}"),
    "batch_size": ("16", "8"),
    "micro_batch": ("4", "2"),
    "lr": (DEFAULT, "1e-3"),
    "lr_end": (DEFAULT, "1e-4"),
    "schedule": (DEFAULT, "constant", "decay"),
    "warmup": (DEFAULT, "0", "4"),
    "weight_decay": (DEFAULT, "0.1 0.1"),
    "layer_decay": (DEFAULT, "1"),
    "patch_lr": (DEFAULT, "1"),
    "freeze_last": (DEFAULT, "0", "4"),
    "optimizer": (DEFAULT, "muon:momentum=0.9"),
    "clip": (DEFAULT, "0.3"),
    "ema": (DEFAULT, "0.9 0.99"),
}
REFUSED = {  # two values that the program refuses to run together, and what it says
    (("data", "{photos}"), ("z_stride", "2")): "photographs have no slices",
    (("koleo_group", "4"), ("micro_batch", "2")): "--koleo-group 4 does not divide --micro-batch",
    (("adapter_norm", "doran"), ("init", DEFAULT)): "adapters change weights that exist; name them with --init",
    (("fsdp", ON), ("optimizer", "muon:momentum=0.9")): "--optimizer muon needs whole matrices",
}


def flag_words(row):
    actions = {a.dest: a.option_strings[0] for a in train_ssl.build_parser()._actions}
    for name, value in row.items():
        if value != DEFAULT:
            yield from (actions[name], *(value.split() if value != ON else ()))


def pairs_of(row):
    """All pairs of values in a row, each written in one way."""
    return set(itertools.combinations(sorted(row.items()), 2))


def all_pairs(table):
    lists = itertools.combinations([[(name, value) for value in table[name]] for name in sorted(table)], 2)
    return {pair for a, b in lists for pair in itertools.product(a, b)}


def covering(table, refused, seed=0, tries=4):
    """Rows (one value for each name) in which every pair of values that is not refused occurs; greedy."""
    rng, rows = random.Random(seed), []
    open_ = all_pairs(table) - set(refused)
    while open_:
        candidates = [grown(table, refused, open_, rng) for _ in range(tries)]
        rows.append(max(candidates, key=lambda row: len(pairs_of(row) & open_)))
        open_ -= pairs_of(rows[-1])
    return rows


def grown(table, refused, open_, rng):
    """A row from one open pair on: name by name, in random order, the value that closes most of the open pairs."""
    row = dict(rng.choice(sorted(open_)))
    names = [name for name in table if name not in row]
    rng.shuffle(names)
    for name in names:
        new = {value: [tuple(sorted([(name, value), item])) for item in row.items()] for value in table[name]}
        allowed = [value for value in table[name] if not refused.keys() & set(new[value])]
        most = {value: (len(open_ & set(new[value])), rng.random()) for value in allowed}
        row[name] = max(allowed, key=most.get)
    return {name: row[name] for name in table}


PAIRS = covering(TABLE, REFUSED)
SLOW = 6  # rows that .ci/run takes
# What would cost every row minutes, or its evaluation, is in one row each, with the defaults of these flags beside it.
ALONE = [
    {"compile": ON, "sizes": "32/16,48/32", "precision": DEFAULT},  # as highres.sh says, which runs uncompiled above
    {"no_split": ON},
    {"arch": "vit_tiny", "init": DEFAULT, "adapter_norm": DEFAULT},
    {"data": "{photos}", "weights": "{drawn}", **dict.fromkeys(("z_stride", "limit", "aug", "overfit"), DEFAULT)},
    {"drop_path": "0.9"},
    {"init": "{weights}", "adapter_norm": "rslora", "adapter_rank": "3", "adapter_alpha": "5", "unfreeze": "0"}
    | {"adapter_targets": "q,mlp", "adapter_init": "pissa", "optimizer": "ademamix:warmup=4"},
    {"w_dino": "0", "w_ibot": "0", "w_koleo": "0"},
    {"data": "{ct}", "neighbour_mm": "2.5", "aug": DEFAULT},
]
ROWS = PAIRS + [row | more for row, more in zip(PAIRS, ALONE)]


def test_the_table_names_every_flag():
    """A new flag gets a row here: a value that makes sense at toy size."""
    parser = train_ssl.build_parser()
    actions = {a.dest: a for a in parser._actions if not isinstance(a, argparse._HelpAction)}
    del actions["why"]  # replays an update and trains nothing: tests/test_autopsy.py
    assert TABLE.keys() == actions.keys()
    usual = parser.parse_args(["--data", "x"])
    for name, action in actions.items():
        values = {json.dumps(getattr(parser.parse_args(["--data", "x", *flag_words({name: v})]), name))
                  for v in {row[name] for row in ROWS}}  # fmt: skip
        assert values - {json.dumps(getattr(usual, name))}, f"{action.option_strings[0]} never differs from its default"
        assert len(values) > 1 or name in ("out", "data"), action.option_strings[0]


def test_every_pair_is_in_a_row():
    found = set().union(*map(pairs_of, PAIRS))
    assert all_pairs(TABLE) - found == set(REFUSED)
    few = set().union(*map(pairs_of, PAIRS[:SLOW]))
    print(f"{len(PAIRS)} rows, {len(found)} pairs, {len(few) / len(found):.0%} in {SLOW}")
    assert len(few) > 0.8 * len(found)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """{name: path} of what flags name: three collections, and the weights of two updates on one of them."""
    root = tmp_path_factory.mktemp("kitchen")
    groups = {f"toy/P{i}": "train" if i < 8 else "val_select" for i in range(11)}
    for name, encoding in (("ct", "hu16-v1"), ("rgb", "rgb-v1")):
        make_split(make_ct(root / name, encoding, series=12, slices=14), groups)
    ratios = ["--ratios", "train=0.5,val_select=0.3,val_test=0.2"]
    assert make_splits.main(["--data", str(make_photos(root / "photos", 64)), *ratios]) == 0
    files = {name: root / name for name in ("ct", "rgb", "photos")} | {"drawn": root / "photos" / "weights.csv"}
    rows = (f"{name},{1 + k % 3}\n" for k, name in enumerate(open_for(root / "photos", "fit").rows.texts("path")))
    files["drawn"].write_text("path,weight\n" + "".join(rows))
    words = [*flag_words({k: v[0] for k, v in TABLE.items()}), "--steps", "2"]
    assert train_ssl.main([w.format(out=root / "weights", **files) for w in words]) == 0
    return files | {"weights": root / "weights" / "last.pth"}


@pytest.mark.parametrize("pair", REFUSED)
def test_what_is_left_out_is_refused_in_one_sentence(kitchen, tmp_path, pair):
    row = {k: v[0] for k, v in TABLE.items()} | dict(pair)
    with pytest.raises((ValueError, OSError), match=re.escape(REFUSED[pair])):
        train_ssl.main([word.format(out=tmp_path, **kitchen) for word in flag_words(row)])


def rank_process(rank, port, words, log, signal_at):
    """What torchrun starts; signal_at: (update, signal) that this process gets once that update is saved."""
    real = os.replace

    def replace(source, target):
        real(source, target)
        if (checkpoint.step_of(target) or 0) >= signal_at[0]:
            os.replace = real
            if signal_at[1] == signal.SIGKILL:
                kill(tree(os.getpid())[1:])  # readers: who is gone cannot be asked for them
            os.kill(os.getpid(), signal_at[1])

    if signal_at:
        os.replace = replace
    be_rank(rank, port, [ROOT / "train_ssl.py", *words], log)


def on_two_ranks(context, words, log, signal_at=None):
    """Exit codes of both ranks; a rank whose fellow was killed is killed too."""
    port = free_port()
    given = [(rank, port, words, str(log), signal_at if rank == 0 else None) for rank in range(2)]
    ranks = [context.Process(target=rank_process, args=arguments) for arguments in given]
    for process in ranks:
        process.start()
    ranks[0].join(400)
    if ranks[0].exitcode != 0:
        kill([pid for process in ranks for pid in tree(process.pid)])
    ranks[1].join(60)
    return [process.exitcode for process in ranks]


@pytest.mark.proof
@pytest.mark.parametrize("number", [pytest.param(i, marks=[pytest.mark.slow] * (i < SLOW)) for i in range(len(ROWS))])
def test_flags_run_together_on_two_ranks(forked, kitchen, tmp_path, number):
    """Stopped behind the middle by SIGTERM or SIGKILL, then resumed: all updates, finite numbers."""
    row, out, log = ROWS[number], tmp_path / "run", tmp_path / "log"
    words = [word.format(out=out, **kitchen) for word in flag_words(row)]
    print("train_ssl.py", *words)
    total = int(row["steps"]) + (0 if row["extend"] == DEFAULT else int(row["extend"]))
    how = (signal.SIGTERM, signal.SIGKILL)[number % 2]
    codes = on_two_ranks(forked, words, log, (7, how))
    assert codes == [0, 0] if how == signal.SIGTERM else codes[0] == -how, f"{codes} {log.read_text()[-3000:]}"
    codes = on_two_ranks(forked, [*words, "--resume", "auto"], log)
    assert codes == [0, 0], f"{codes} {log.read_text()[-3000:]}"

    events = [line["event"] for line in lines(out, "event")]
    assert 7 <= resumed_at(out) < total
    assert not [e for e in events if re.search("skipped|FAILED|replaced", e)], events
    state = flat(checkpoint.load(out / "last.pth"))
    assert state[".step"] == total and state[".gram_refreshes"] > 0
    assert all(value.isfinite().all() for value in state.values() if isinstance(value, torch.Tensor))
    assert {v.item() for k, v in state.items() if re.fullmatch(r"\.optimizer\..*\.step", k)} == {total}
    numbers = [(k, v) for line in lines(out) for k, v in line.items() if isinstance(v, (int, float))]
    assert all(math.isfinite(value) for _, value in numbers), [n for n in numbers if not math.isfinite(n[1])]
    assert lines(out, "loss")[-1]["step"] == total and "gram" in lines(out, "loss")[-1]
    every = int(row["eval_every"])
    looks = {*range(every, total + 1, every), total} if row["no_split"] == DEFAULT else set()
    assert looked_at(out) | {resumed_at(out)} == looks | {resumed_at(out)}
