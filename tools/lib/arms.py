"""Arms of a comparison: flags with a name, drawn from a space or written by hand, and what each is worth.

    arms = read_arms(["focal: --loss focal:gamma=2", "arms.txt"])          # {"focal": ["--loss", "focal:gamma=2"]}
    rows = judge(labels, groups, {"base": [logits of seed 0, ...], "focal": [...]}, "mcc")

The first of the arms is the baseline that all others share.
"""

import functools
from pathlib import Path

import numpy as np

from tools.lib import commands, metrics
from tools.lib.cli import shown
from tools.lib.files import to_number

BASE = "base"
SURE = 0.04  # of all arms together (Holm)
LEVEL = 0.9  # of intervals: 5% on each side


# ----- arms and spaces as a person writes them


def lines_of(path):
    """(where, text) of the lines of a file that say something; # begins a comment."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; write one line for each") from None
    rows = [(f"{path}, line {k}", line.partition("#")[0].strip()) for k, line in enumerate(lines, 1)]
    return [row for row in rows if row[1]]


def read_arms(texts):
    """{name: flags} of texts 'name: --flag value', or of files with one such line for each arm."""
    arms = {}
    for where, text in [row for given in texts for row in ([("--arms", given)] if ": " in given else lines_of(given))]:
        name, flags = commands.named(where, text)
        if name == BASE or name in arms:
            raise ValueError(f"{where}: the name {name} is taken; give each arm its own, base is the command alone")
        arms[name] = flags
    return arms


def read_space(path):
    """[(flag, kind, values)] of lines '--lr log 1e-4 1e-2', '--dropout uniform 0 0.5', '--rank choice 4 8 16'."""
    space = []
    for where, text in lines_of(path):
        flag, kind, *values = [*text.split(), ""][: max(2, len(text.split()))]
        good = flag.startswith("--") and kind in ("log", "uniform", "choice") and values
        if good and kind != "choice":
            values = [to_number(value) for value in values]
            good = len(values) == 2 and values[0] < values[1] and (kind == "uniform" or values[0] > 0)
        if not good:
            raise ValueError(f"{where}: {shown(text)!r}: write '--lr log 1e-4 1e-2', '--dropout uniform 0 0.5' or "
                             "'--rank choice 4 8 16'")  # fmt: skip
        space.append((flag, kind, values))
    if not space:
        raise ValueError(f"{path} names no flag to search over")
    return space


def draw(space, seed, trial):
    """Flags of a trial, a function of (seed, trial) alone: more trials move none."""
    random, flags = np.random.default_rng((seed, trial)), []
    for flag, kind, values in space:
        if kind == "choice":
            value = values[random.integers(len(values))]
        else:
            low, high = np.log(values) if kind == "log" else values
            value = random.uniform(low, high)
            value = f"{np.exp(value) if kind == 'log' else value:.3g}"
        flags += [flag, value]
    return flags


# ----- what they are worth


METRICS = {
    "mcc": lambda labels, p, weights=None: metrics.mcc(labels, p.argmax(1), weights),
    "accuracy": lambda labels, p, weights=None: metrics.accuracy(labels, p.argmax(1), weights),
    "auc": lambda labels, p, weights=None: metrics.auc(labels, metrics.score_of(p), weights),
}


def gain(points, drawn, random, draws=20_000):
    """Is a mean over S seeds above 0? points [S], drawn [R, S] of resampled groups -> {difference, low, high, p}.

    p is the chance of such a gain where there is none, one-sided; low and high leave 5% on each side, so p < 0.05 where
    low is above 0. Two chances meet: another draw of groups (the scatter of the resampled means), and other seeds. How
    far those scatter is known badly from S of them, so their variance is drawn too: from all that could have given the
    one seen (chi-squared with S - 1), less what so few groups explain. One seed says nothing of others: p is 1.
    """
    S, mean = len(points), float(np.mean(points))
    if S < 2 or not np.isfinite(drawn).all():
        low, high = metrics.interval(drawn.mean(1), LEVEL)
        return {"difference": mean, "low": float(low), "high": float(high), "p": 1.0, "spread": None}
    seen, explained = np.var(points, ddof=1), (drawn - drawn.mean(0)).var(1, ddof=1).mean()
    of_seeds = np.maximum(0, seen * (S - 1) / random.chisquare(S - 1, draws) - explained) / S
    likely = mean + random.normal(size=draws) * np.sqrt(drawn.mean(1).var() + of_seeds)
    low, high = metrics.interval(likely, LEVEL)
    p = (1 + np.sum(likely <= 0)) / (1 + draws)
    return {"difference": mean, "low": float(low), "high": float(high), "p": float(p), "spread": float(np.sqrt(seen))}


def decide(row, worth):
    """keep: proven better, with all arms in mind; reject: no gain above `worth` is left possible.

    SURE is 0.04: equal arms of three seeds whose seeds scatter further than groups have p < 0.05 in up to 6% of
    simulations, p < 0.04 in up to 4.4%, and at most 1 of 20 may be kept.
    """
    return "keep" if row["p_holm"] < SURE else "reject" if row["high"] < worth else "inconclusive"


def judge(labels, groups, arms, metric="mcc", repeats=1000, worth=0.0, questions=0, seed=0, few=False):
    """{arm: {scores, mean, and for all but the first difference, low, high, p, p_holm, spread, decision}}.

    arms {name: probabilities [N, C] of each seed}, the same seeds in all; the resampled groups are the same for all.
    questions: how many arms there were, where some were given up before (Holm counts them too). few: too few groups
    for an interval.
    """
    score, runs = functools.partial(METRICS[metric], labels), [p for each in arms.values() for p in each]
    values = np.array([score(p) for p in runs]).reshape(len(arms), -1)
    drawn = metrics.resample(lambda w: np.stack([score(p, w) for p in runs], 1), groups, repeats, seed, strata=labels)
    drawn = np.full((repeats, *values.shape), np.nan) if few else drawn.reshape(len(drawn), *values.shape)
    rows = {name: {"scores": own.tolist(), "mean": float(own.mean())} for name, own in zip(arms, values)}
    for k, name in enumerate([*arms][1:], 1):
        rows[name] |= gain(values[k] - values[0], drawn[:, k] - drawn[:, 0], np.random.default_rng(seed))
    others = [*arms][1:]
    p = [rows[name]["p"] for name in others] + [1.0] * max(0, questions - len(others))
    for name, raised in zip(others, metrics.holm(p)):
        rows[name]["p_holm"] = float(raised)
        rows[name]["decision"] = decide(rows[name], worth)
    return rows
