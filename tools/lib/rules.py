"""A decision is an ordered list of fitted steps: aggregate, calibrate, then one of threshold, exit, gate, conformal.

    policy = fit_steps(table, ["mean", "temperature", "mcc"])              # table: tables.Predictions of val_calib
    policy = fit_steps(table, "topk:k=3 auto raps:alpha=0.05")             # the same as text
    out = decide(policy, logits, ids, slices)                              # predicting and evaluating call this

Each step is fitted on what the steps before it put out, on its own part of the groups (a share of each class). A policy
is a plain dict.
"""

import hashlib
import inspect
from typing import NamedTuple

import numpy as np

from tools.lib import calibrate, conformal, thresholds
from tools.lib.choice import areas_of, choose
from tools.lib.cli import read_options, shown
from tools.lib.fusion import POOLS
from tools.lib.metrics import rates

VERSION = 1
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in [0, 1), without what is before the point
SHARES = {1: [1.0], 2: [0.5, 0.5], 3: [0.4, 0.3, 0.3]}  # of val_calib, by the number of fitted steps
LAST = ("threshold", "exit", "gate", "conformal")
KIND_OF = {**dict.fromkeys([*POOLS, "weights", "best"], "aggregate"), **thresholds.KIND_OF}
KIND_OF |= {**dict.fromkeys([*calibrate.METHODS, "auto"], "calibrate"), **dict.fromkeys(conformal.METHODS, "conformal")}


class Decisions(NamedTuple):
    probabilities: np.ndarray  # [N, C] float64
    sets: np.ndarray  # [N, C] bool; of what is left to others: all classes
    decision: np.ndarray  # [N] class, or -1: left to others


# ----- what a policy is made of


def read_step(step):
    """raps:alpha=0.05,lam=0.1 as text, or {"kind", "method", ...options} -> (kind, method, options)."""
    if isinstance(step, str):
        method, options = read_options(step)
        step = {"method": method, **options}
    options = {key: value for key, value in step.items() if key not in ("kind", "method")}
    method, kind = step.get("method"), KIND_OF.get(step.get("method"))
    if kind is None:
        raise ValueError(f"there is no method {shown(method)}; known are {', '.join(KIND_OF)}")
    if step.get("kind", kind) != kind:
        raise ValueError(f"method {method} is of kind {kind}, not {shown(step['kind'])}")
    return kind, method, options


def check_order(kinds):
    """The list is the order: a threshold on scores that a later step changes cannot be written down."""
    wanted = [kind for kind in ("aggregate", "calibrate") if kind in kinds] + [k for k in kinds if k in LAST][:1]
    if kinds != wanted or not kinds or kinds[-1] not in LAST:
        raise ValueError(f"steps {', '.join(kinds) or 'none'}: at most one aggregate, then at most one calibrate, then "
                         f"exactly one of {', '.join(LAST)}")  # fmt: skip


def part_of(groups, labels, count):
    """Which fitted step each sample is for, 0..count-1: whole groups, class by class in the order of their hash.

    A group is of the class that most of its samples have. By the hash alone, few groups can leave a step hardly any
    samples of one class. Where in a class the dealing begins is drawn too, by another part of a hash: otherwise the
    only group of a class would always go to the same step.
    """
    names, place, sizes = np.unique(np.asarray(groups).astype(str), return_inverse=True, return_counts=True)
    votes = np.zeros((len(names), max(labels, default=0) + 1), int)
    np.add.at(votes, (place, labels), 1)
    hashes = [hashlib.sha256(f"part {name}".encode()).hexdigest() for name in names]
    order = np.argsort(hashes)
    kinds, part = votes.argmax(1), np.zeros(len(names), int)
    for kind in np.unique(kinds):
        mine = order[kinds[order] == kind]
        begin = (int(hashes[order[0]][-13:], 16) / 16**13 + GOLDEN * kind) % 1
        at = (np.cumsum(sizes[mine]) - begin * sizes[mine]) / sizes[mine].sum()  # of each group, among its class
        part[mine] = np.searchsorted(np.cumsum(SHARES[count])[:-1], at, side="right")
    return part[place]


# ----- one step: fitting and applying


def mixture(logits, weights):
    """Log of the weighted mean probability over views: [N, V, C] -> [N, C]."""
    p = calibrate.softmax(logits)
    return np.log(np.maximum(np.einsum("nvc,v->nc", p, weights), 1e-300))


def fit_mixture(logits, labels, rounds=500):
    """Weights of 0 or more with sum 1 that give the lowest NLL, by EM."""
    truth = np.maximum(calibrate.softmax(logits)[np.arange(len(labels)), :, labels].T, 1e-15)  # [V, N]
    weights = np.full(len(truth), 1 / len(truth))
    for _ in range(rounds):
        weights = weights * (truth / (weights @ truth)).mean(1)
    return {"weights": weights.tolist()}


def call(method, fit, *given, **options):
    """fit(*given, **options); an option that it does not have is a sentence."""
    try:
        inspect.signature(fit).bind(*given, **options)
    except TypeError as error:
        raise ValueError(f"{method}: {error}; it is {method}{inspect.signature(fit)}") from None
    return fit(*given, **options)


def fit_step(kind, method, options, x, labels, about):
    """-> {method, parameters, ...}; about: ids, groups, slices of these samples, layout."""
    if method == "weights":
        return {"method": method, "parameters": call(method, fit_mixture, x, labels, **options)}
    if kind == "aggregate":
        if method == "best":
            raise ValueError("best: the pool is chosen on val_select, by fit_policy.py, before the other steps")
        if method == "area" and "areas" not in options:
            options = {"areas": areas_of(about["layout"], x.shape[1])}
        call(method, POOLS[method], x[:1], **options)
        return {"method": method, "parameters": options}
    if kind == "calibrate":
        chosen, table = choose(x, labels, about["groups"], about["slices"]) if method == "auto" else (method, None)
        found = call(method, calibrate.METHODS[chosen][0], x, labels, about["slices"], **options)
        return {"method": chosen, "parameters": found} | ({"choice": table} if table else {})
    if kind != "conformal":
        return {"method": method, "parameters": call(method, thresholds.METHODS[method][0], x, labels, **options)}
    fit, options = conformal.METHODS[method][0], {"alpha": 0.1, "slices": about["slices"], **options}
    options |= {} if method in ("crc", "scrc") else {"ids": about["ids"]}
    return {"method": method, "parameters": call(method, fit, x, labels, **options)}


def apply_step(step, x, ids, slices):
    """[N, V, C] -> logits [N, C] -> probabilities [N, C] -> sets [N, C], or decision [N]."""
    kind, method, found = step["kind"], step["method"], step["parameters"]
    if method == "weights":
        return mixture(x, np.array(found["weights"]))
    if kind == "aggregate":
        return POOLS[method](x, **found)
    if kind == "calibrate":
        return calibrate.METHODS[method][1](found, x, slices)
    if kind == "conformal":
        return conformal.METHODS[method][1](found, x, ids, slices)
    return thresholds.METHODS[method][1](found, x)


def before_last(kinds, x):
    """Without a calibrator the softmax is believed."""
    return x if "calibrate" in kinds else calibrate.softmax(x)


# ----- all steps


def fit_steps(table, spec, slices=None, column=None):
    """-> policy. slices [N]: values of the fact `column`, for what is fitted by slice. The unlabelled are left out."""
    steps = [read_step(step) for step in (spec.split() if isinstance(spec, str) else spec)]
    check_order([kind for kind, _, _ in steps])
    if steps[0][0] != "aggregate":
        if table.logits.shape[1] > 1:
            raise ValueError(f"{table.logits.shape[1]} views of each sample: begin with a pool, such as mean")
        steps = [("aggregate", "mean", {}), *steps]
    kinds, known = [kind for kind, _, _ in steps], np.flatnonzero(table.labels >= 0)
    table, slices = table.take(known), None if slices is None else np.asarray(slices).astype(str)[known]
    fitted = [kind != "aggregate" or method == "weights" for kind, method, _ in steps]
    part, x, done = part_of(table.groups, table.labels, sum(fitted)), table.logits.astype(np.float64), []
    for number, (kind, method, options) in enumerate(steps):
        x = before_last(kinds, x) if kind in LAST else x
        n = sum(fitted[:number])
        mine = np.flatnonzero(part == n) if fitted[number] else np.arange(len(part))
        about = {
            "ids": table.ids[mine],
            "layout": table.facts.get("layout"),
            "groups": table.groups[mine],
            "slices": None if slices is None else slices[mine],
        }
        counts = np.bincount(table.labels[mine], minlength=len(table.facts["classes"])).tolist()
        try:
            step = {"kind": kind, **fit_step(kind, method, options, x[mine], table.labels[mine], about)}
        except ValueError as error:
            raise ValueError(f"{kind} {method}, on {len(mine)} samples ({counts} of each class): {error}") from None
        facts = {"predictions_sha256": table.facts.get("npz_sha256"), "part": [n + 1, sum(fitted)], "n": len(mine)}
        done.append(step | ({"fitted_on": facts | {"n_per_class": counts}} if fitted[number] else {}))
        if kind not in LAST:
            x = apply_step(step, x, table.ids, slices)
    policy = {"version": VERSION, "classes": table.facts["classes"], "layout": table.facts.get("layout")}
    policy |= {"column": column, "steps": done, **{k: done[-1]["parameters"][k] for k in ("feasible", "guarantee")}}
    out = decide(policy, table.logits[mine], table.ids[mine], about["slices"])
    return policy | {"metrics": measured(table.labels[mine], out)}


def decide(policy, logits, ids=None, slices=None):
    """Decisions of samples with logits [N, V, C] (or [N, C], of one view)."""
    x, kinds = np.asarray(logits, np.float64), [read_step(step)[0] for step in policy["steps"]]
    check_order(kinds)
    x = x[:, None] if x.ndim == 2 else x
    for name, values in (("ids", ids), ("slices", slices)):
        if values is not None and len(values) != len(x):
            raise ValueError(f"{len(values)} {name} for {len(x)} samples: give one each")
    if x.ndim != 3 or x.shape[2] != len(policy["classes"]) or not np.isfinite(x).all():
        raise ValueError(f"logits {x.shape}: the policy needs finite ones, [N, V, {len(policy['classes'])}]")
    for step in policy["steps"][:-1]:
        x = apply_step(step, x, ids, slices)
    p = before_last(kinds, x)
    out = apply_step(policy["steps"][-1], p, ids, slices)
    if kinds[-1] == "conformal":
        return Decisions(p, out, np.where(out.sum(1) == 1, out.argmax(1), -1))
    return Decisions(p, (out[:, None] == np.arange(p.shape[1])) | (out < 0)[:, None], out)


def measured(labels, out):
    """What decisions were worth where labels are known; of decided samples alone: `decided`."""
    kept, held = out.decision >= 0, out.sets[np.arange(len(labels)), labels]
    values = {"n": len(labels), "decided_share": float(kept.mean()), "in_set": float(held.mean())}
    values |= {"set_size": float(out.sets.sum(1).mean()), "empty_sets": float((~out.sets.any(1)).mean())}
    decided = rates(labels[kept], out.decision[kept], out.sets.shape[1]) if kept.any() else None
    return values | {"decided": decided}
