"""Arms against a baseline: what is kept, what is refused, and that finished runs are not run again."""

import json
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from tools import compare
from tools.lib import arms, commands, metrics, tables
from tools.lib.cli import ROOT

# A trainer that takes no time: `--gain` more of its 120 groups right, and as many as its seed pleases.
TRAINER = """
    import argparse, hashlib, json, sys
    from pathlib import Path
    p = argparse.ArgumentParser()
    for name, kind in dict(out=Path, seed=int, gain=float, steps=int, fail=int, split=str, device=str).items():
        p.add_argument("--" + name, type=kind)
    args = p.parse_args()
    with open(Path(__file__).parent / "calls", "a") as f:
        print(args.out.parent.name, args.seed, args.steps, args.device, file=f)
    if args.fail == args.seed:
        sys.exit("no memory left")
    import numpy as np
    random, n = np.random.default_rng(args.seed), 240
    labels = np.arange(n) % 2
    easy = (np.random.default_rng(7).permutation(n) / n < 0.7 + (args.gain or 0)) ^ (random.random(n) < 0.02)
    logits = np.zeros((n, 2, 2), np.float32)
    logits[np.arange(n), :, np.where(easy, labels, 1 - labels)] = 1
    order = random.permutation(n)  # tables are joined by id
    ids, groups = np.array([f"{i}.jpg" for i in range(n)]), np.array([f"{i // 2}" for i in range(n)])
    path = args.out / "predictions" / "val_select.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, ids=ids[order], groups=groups[order], labels=labels[order], logits=logits[order])
    facts = dict(classes=["no", "yes"], split="val_select", layout="tiles", split_sha256=args.split or "s" * 64)
    facts |= dict(version=1, eval_view=None, weights_sha256=None)
    facts["npz_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(facts))
"""


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(textwrap.dedent(TRAINER))
    return path


def calls(trainer):
    path = trainer.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_arms_are_run_judged_and_not_run_again(tmp_path, trainer, capsys):
    more = tmp_path / "more.txt"
    more.write_text("# written by hand\nsame: --steps 7  # no change\n\nworse: --gain -0.2\n")
    words = ["--out", str(tmp_path / "ab"), "--arms", "better: --gain 0.15", str(more), "broken: --fail 1"]
    words += ["--devices", "cpu", "cpu", "--", str(trainer), "--steps", "5"]
    assert compare.main(words) == 1  # an arm failed
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "ab" / "summary.json").read_text())
    decisions = {name: row.get("decision") for name, row in summary["arms"].items()}
    assert decisions.pop("broken").startswith("failed: exit code 1: no memory left")
    assert decisions == {"base": None, "better": "keep", "same": "inconclusive", "worse": "reject"}
    better = summary["arms"]["better"]
    assert better["low"] < better["difference"] < better["high"] and better["difference"] == pytest.approx(0.3, abs=0.1)
    assert len(better["scores"]) == 3 and better["flags"] == ["--gain", "0.15"]
    assert summary["looks"] == 12 and summary["groups"] == 120
    assert "Best arm: better (--gain 0.15), chosen by its score among 12 looks at val_select" in said
    markdown = (tmp_path / "ab" / "table.md").read_text()
    assert len(markdown.splitlines()) == 7 and markdown in said and "| better | --gain 0.15 | 3 |" in markdown
    report = (tmp_path / "ab" / "report.html").read_text()
    assert "<svg" in report and "MCC minus base" in report
    assert len(calls(trainer)) == 15 and all(" cpu" in line for line in calls(trainer))
    assert "same 0 7 cpu" in calls(trainer), "the flag of an arm replaces that of the command"

    assert compare.main(words) == 1  # the same again: only the failed seed is tried
    assert "14 of 15 runs are there already" in capsys.readouterr().out
    assert calls(trainer)[15:] == ["broken 1 5 cpu"]
    again = json.loads((tmp_path / "ab" / "summary.json").read_text())
    assert again["arms"]["better"] == better
    with pytest.raises(ValueError, match=r"base/seed_0: it was made with --steps 5, now --steps 6; give another --out"):
        compare.main([*words[:-1], "6"])
    assert compare.main(["show", str(tmp_path / "ab")]) == 0
    assert markdown in capsys.readouterr().out


def test_what_cannot_be_compared_is_a_sentence(tmp_path, trainer):
    def run(*words, command=(str(trainer), "--steps", "5")):
        return compare.main(["--out", str(tmp_path / "x"), *words, "--", *command])

    for words, message in (
        (["--arms", "focal --loss focal"], "No such file|focal --loss focal"),
        (["--arms", "base: --gain 1"], "the name base is taken"),
        (["--arms", "a: --gain 1", "a: --gain 2"], "the name a is taken"),
        (["--arms", "a: gain"], "write a name and flags like 'focal: --loss focal:gamma=2'"),
        (["--arms", "a: --seed 3"], "a has --seed, which is set here"),
        ([], "give --arms"),
        (["--arms", "a: --gain 1", "--rungs", "2"], "--rungs belongs to --search"),
        (["--arms", "a: --gain 1", "--seeds", "1", "1"], "each seed once"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run(*words)
    with pytest.raises(FileNotFoundError, match="there is no program nothing.py"):
        run("--arms", "a: --gain 1", command=["nothing.py"])
    assert not calls(trainer)
    with pytest.raises(ValueError, match="the command as it is failed: exit code 1: no memory left"):
        run("--arms", "a: --gain 1", "--seeds", "0", command=[str(trainer), "--fail", "0"])
    with pytest.raises(ValueError, match="split_sha256 is other"):
        compare.main(["--out", str(tmp_path / "y"), "--seeds", "0", "--arms", "a: --split other", "--", str(trainer)])


def test_one_seed_keeps_nothing(tmp_path, trainer, capsys):
    words = ["--out", str(tmp_path / "ab"), "--seeds", "4", "--arms", "better: --gain 0.25", "--", str(trainer)]
    assert compare.main(words) == 0
    row = json.loads((tmp_path / "ab" / "summary.json").read_text())["arms"]["better"]
    assert row["decision"] == "inconclusive" and row["low"] > 0
    assert "nothing can be kept" in capsys.readouterr().out
    runs = [str(tmp_path / "ab" / name / "seed_4") for name in ("base", "better")]
    assert compare.main(["show", *runs]) == 0
    said = capsys.readouterr().out
    assert f"minus {runs[0]} {row['difference']:+.4f} (" in said and "another seed would give is not in them" in said


@pytest.mark.slow
def test_search_halves_and_says_how_often_it_looked(tmp_path, trainer, capsys):
    space = tmp_path / "space.txt"
    space.write_text("--gain choice -0.2 -0.1 0 0.2\n--fail uniform 50 60\n")
    trainer.write_text(trainer.read_text().replace("fail=int", "fail=float"))
    words = ["--out", str(tmp_path / "s"), "--search", str(space), "--trials", "4", "--rungs", "3", "--seeds", "0"]
    assert compare.main([*words, "--", str(trainer), "--steps", "40"]) == 0
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["looks"] == 4 + 2 + 1 + 1  # at the end base too
    assert len(summary["arms"]) == 2
    steps = [line.split()[2] for line in calls(trainer)]
    assert [steps.count(n) for n in ("10", "20", "40")] == [4, 2, 2]
    drawn = [arms.draw(arms.read_space(space), 0, k) for k in range(4)]
    best = max(float(flags[1]) for flags in drawn)
    kept = max((row for name, row in summary["arms"].items() if name != "base"), key=lambda row: row["mean"])
    assert float(kept["flags"][1]) == best, "the best of the space survives"
    assert "chosen by its score among 8 looks" in capsys.readouterr().out


def test_a_space_is_drawn_within_its_bounds(tmp_path):
    path = tmp_path / "space.txt"
    path.write_text("--lr log 1e-4 1e-2\n--dropout uniform 0 0.5\n--rank choice 4 8 16\n")
    space = arms.read_space(path)
    drawn = [arms.draw(space, 3, k) for k in range(200)]
    lr, dropout = (np.array([float(flags[k]) for flags in drawn]) for k in (1, 3))
    assert (lr >= 1e-4).all() and (lr <= 1e-2).all() and 0.35 < (lr < 1e-3).mean() < 0.65  # even in its logarithm
    assert (dropout >= 0).all() and (dropout <= 0.5).all() and {flags[5] for flags in drawn} == {"4", "8", "16"}
    assert drawn[:5] == [arms.draw(space, 3, k) for k in range(5)] != [arms.draw(space, 4, k) for k in range(5)]
    assert arms.draw(space, 3, 1) != arms.draw(space, 4, 0)
    for line in ("--lr log 0 1", "--lr log 1", "--lr between 1 2", "lr log 1 2", "--lr choice", "--lr log a b"):
        path.write_text(line)
        with pytest.raises(ValueError, match="space.txt, line 1"):
            arms.read_space(path)


def test_a_changed_flag_is_named():
    now = ["train.py", "--lr", "0.1", "--views", "a", "b"]
    assert (
        commands.changed(now, ["train.py", "--lr=0.2", "--views", "a", "b"])
        == "it was made with --lr 0.1, now --lr 0.2"
    )
    assert commands.changed(now, now[:3]) == "it was made with --views a b, now no --views"
    assert commands.changed(now[:3], now) == "it was made with no --views, now --views a b"


# ----- what is decided, on simulated tables


def simulate(seed, better, groups=4000, seeds=3, discordant=0.1, noise=0.0):
    """Labels, groups and probabilities {base, arm}: so many differ in being right; noise: of training, by seed."""
    random = np.random.default_rng(seed)
    labels, runs = random.integers(0, 2, groups), {"base": [], "arm": []}
    for _ in range(seeds):
        shift = better + random.normal() * noise
        base = random.random(groups) < 0.8
        share = np.clip(np.where(base, (discordant - shift) / 2 / 0.8, (discordant + shift) / 2 / 0.2), 0, 1)
        arm = base ^ (random.random(groups) < share)
        for name, right in (("base", base), ("arm", arm)):
            runs[name].append(np.eye(2)[np.where(right, labels, 1 - labels)] * 0.8 + 0.1)
    return labels, np.arange(groups).astype(str), runs


@pytest.mark.proof
def test_better_by_two_points_is_kept_and_equal_is_not():
    """4,000 groups, 3 seeds, 10% discordant."""
    decisions = {}
    for better in (0.02, 0.0):
        rows = [arms.judge(*simulate(seed, better), repeats=300)["arm"] for seed in range(20)]
        decisions[better] = [row["decision"] for row in rows]
    assert decisions[0.02].count("keep") >= 19 and decisions[0.0].count("keep") <= 1


@pytest.mark.proof
def test_how_often_equal_arms_are_kept():
    """Of 500 pairs each: no noise of training, half of what groups scatter, twice, eight times that."""
    for noise in (0.0, 0.005, 0.02, 0.08):
        rows = [arms.judge(*simulate(seed, 0.0, 1000, noise=noise), repeats=200)["arm"] for seed in range(500)]
        kept = np.mean([row["decision"] == "keep" for row in rows])
        print(f"noise {noise}: kept {kept:.3f}")
        assert kept <= 0.05


def test_gain_errs_as_rarely_as_promised():
    """Equal arms, three seeds, 400 draws each; groups scatter a run's score by 1, and 4 is 2 points of 4,000 groups."""
    of_groups, random = np.random.default_rng(1).normal(size=(300, 3)), np.random.default_rng(2)

    def kept(gain, noise):
        points = gain + random.normal(size=(400, 3)) * math.hypot(1, noise)
        return np.mean([arms.gain(p, p + of_groups, random, 2000)["p"] < arms.SURE for p in points])

    for noise in (0.0, 2.0, 8.0):
        assert kept(0.0, noise) < 0.05 + 2 * 0.011  # two deviations of 400 draws
    assert kept(4.0, 0.0) > 0.95


def test_the_gain_is_that_of_the_metric_and_the_scatter_that_of_both_sources():
    labels, groups, runs = simulate(0, 0.02, groups=600)
    for name, of in arms.METRICS.items():
        rows = arms.judge(labels, groups, runs, name, repeats=50)
        each = [of(labels, a) - of(labels, b) for a, b in zip(runs["arm"], runs["base"])]
        assert rows["arm"]["difference"] == pytest.approx(np.mean(each))
        assert rows["base"]["scores"] == pytest.approx([of(labels, p) for p in runs["base"]])
    assert rows["arm"]["scores"][0] == pytest.approx(metrics.auc(labels, runs["arm"][0][:, 1]))
    random, drawn = np.random.default_rng(0), np.random.default_rng(1).normal(0.1, 0.01, (4000, 3))
    calm = arms.gain(np.full(3, 0.1), drawn, random)
    width = 2 * 1.645 * 0.01 / math.sqrt(3)  # seeds that agree: that of three independent means
    assert calm["high"] - calm["low"] == pytest.approx(width, rel=0.05) and calm["p"] < 0.001
    even = arms.gain(np.array([0.09, 0.1, 0.11]), drawn, random)  # as much as so few groups explain: or is it luck?
    assert 1.2 * width < even["high"] - even["low"] < 2 * width
    wild = arms.gain(np.array([0.0, 0.1, 0.2]), drawn, random)
    spread = 2 * 2.92 * 0.1 / math.sqrt(3)  # t of two degrees of freedom, 95%
    assert wild["high"] - wild["low"] == pytest.approx(spread, rel=0.06) and wild["p"] > 0.05
    lost = arms.gain(np.full(3, -0.1), drawn, random)
    assert lost["p"] > 0.999 and lost["high"] < 0


def test_holm_counts_all_arms():
    labels, groups, runs = simulate(3, 0.02, groups=2000)
    more = {"base": runs["base"], **{f"arm{k}": runs["arm"] for k in range(4)}}
    one, four = (arms.judge(labels, groups, r, repeats=300) for r in (runs, more))
    assert four["arm0"]["p_holm"] == pytest.approx(4 * four["arm0"]["p"]) and one["arm"]["p_holm"] == one["arm"]["p"]
    searched = arms.judge(labels, groups, runs, repeats=300, questions=10)
    assert searched["arm"]["p_holm"] == pytest.approx(10 * searched["arm"]["p"])


def test_few_groups_give_no_interval(tmp_path, trainer):
    facts = {"classes": ["no", "yes"], "split": "val_select", "layout": None, "split_sha256": "s"}
    for k in range(2):
        logits = np.random.default_rng(k).normal(size=(14, 1, 2)).astype(np.float32)
        names = np.array([f"{i}" for i in range(14)])
        table = tables.Predictions(names, names, np.arange(14) % 2, logits, facts)
        table = table._replace(groups=np.array([f"{i // 2}" for i in range(14)]))
        tables.write(tmp_path / f"run{k}" / "predictions", table)
    args = compare.build_parser().parse_args(["show"])
    rows, found = compare.compare({f"run{k}": [tmp_path / f"run{k}"] for k in range(2)}, args)
    assert math.isnan(rows["run1"]["low"]) and found["groups"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_gone_on_with(tmp_path, trainer, number):
    """Ctrl+C ends the run in progress too; the same command makes what was not finished."""
    wait = """
    import time
    while len(open(Path(__file__).parent / "calls").readlines()) == 2 and not (Path(__file__).parent / "go").exists():
        time.sleep(0.02)
    import numpy as np
    """
    trainer.write_text(trainer.read_text().replace("import numpy as np\n", textwrap.dedent(wait), 1))
    words = [sys.executable, str(ROOT / "tools" / "compare.py"), "--out", str(tmp_path / "ab"), "--seeds", "0"]
    words += ["1", "--arms", "a: --gain 0.1", "--", str(trainer)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's jobs in the background ignore it
    )  # fmt: skip
    while len(calls(trainer)) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert f"interrupted: {tmp_path}/ab/base/seed_1\n" in said and "failed" not in said
    assert process.returncode == 130 and not (tmp_path / "ab" / "summary.json").exists()
    (tmp_path / "go").touch()  # a run that is left would go on now
    time.sleep(1)
    assert len(calls(trainer)) == 2 and not (tmp_path / "ab" / "base" / "seed_1" / "predictions").exists()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 4 runs are there already" in done.stdout, done.stderr
    assert len(calls(trainer)) == 2 + 3


def test_a_run_that_is_being_started_is_ended_too(tmp_path, trainer, monkeypatch):
    """The interrupt comes when the process is there and nobody knows it yet, which a loaded machine does."""
    children, Popen = [], subprocess.Popen

    def slow(*words, **how):
        children.append(Popen(*words, **how))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        return children[-1]

    trainer.write_text("import time\ntime.sleep(50)\n")
    monkeypatch.setattr(compare.subprocess, "Popen", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.main(["--out", str(tmp_path / "ab"), "--arms", "a: --gain 0.1", "--", str(trainer)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert [child.wait(timeout=60) for child in children] == [-signal.SIGTERM]
