"""From exported predictions of val_calib to one policy.json: pool, calibrator, and a threshold, exit, gate or sets.

    python tools/fit_policy.py --predictions runs/photos --out runs/photos/policy.json --method mean temperature mcc
    python tools/fit_policy.py --predictions runs/a runs/b --out policy.json --method weights auto raps:alpha=0.05
    python tools/fit_policy.py --predictions runs/a runs/b --out policy.json --method best:runs=1 auto mcc

best: pool and number of views with the highest MCC on val_select; with runs=1 also the one run among several, such as
exports of the same weights with other overlaps. topk keeps the surest views: where any view may show the object, it
prefers views that are sure of nothing; topk_positive and whole_topk have no such bias.

Each fitted step has its own part of the groups of each class: two steps 50/50, three 40/30/30. With --by, calibrators
and mondrian are fitted for each value of a fact column.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

from tools.lib import calibrate, failure, policies, rules
from tools.lib.choice import choose_pool
from tools.lib.cli import Parser, read_options, run, shown
from tools.lib.files import write_json
from tools.lib.page import number


def build_parser():
    parser = Parser(__doc__)
    kinds = ("aggregate", "calibrate", "threshold", "exit", "gate", "conformal")
    rows = "; ".join(f"{kind}: {' '.join(name for name, k in rules.KIND_OF.items() if k == kind)}" for kind in kinds)
    # fmt: off
    parser.add_argument("--predictions", required=True, nargs="+", type=Path, help="runs with "
        "predictions/val_calib.npz, or such files; several are joined by id, their views side by side")
    parser.add_argument("--out", required=True, type=Path, help="policy.json")
    parser.add_argument("--method", nargs="+", default=["mean", "auto", "mcc"], help="none or one aggregate, "
        f"none or one calibrate, then one of the others, options as in raps:alpha=0.1,lam=0.05. {rows}")
    parser.add_argument("--by", help="fact column of --labels whose values get fits of their own")
    parser.add_argument("--labels", type=Path, help="label table with the column of --by; also looked for in --data")
    parser.add_argument("--data", type=Path, help="data folder; default: the one named in the predictions")
    # fmt: on
    return parser


AT_AN_END = {  # temperature: what that says
    calibrate.COLDEST: "too few mistakes to say how sure the weights should be",
    calibrate.HOTTEST: "the weights tell hardly more than chance here",
}


def report(policy):
    """Lines for a person: each step, what is promised, what was seen on the samples of the fit."""
    if len(policy["classes"]) == 2:
        yield f"the positive class, of which FNR and recall speak, is {shown(policy['classes'][1])}, the last by name"
    for k, step in enumerate(policy["steps"], 1):
        fitted = step.get("fitted_on")
        where = f" on {fitted['n']} samples, by class {fitted['n_per_class']}" if fitted else ", not fitted"
        yield f"{k}. {step['kind']} {step['method']}{where}: {shown(json.dumps(step['parameters']), 200)}"
        if (why := AT_AN_END.get(step["parameters"].get("temperature"))) is not None:
            yield f"   note: that is the end of its range: {why}"
        for name, worth in step.get("choice", {}).items():
            numbers = ", ".join(f"{key.upper()} {value:.4f}" for key, value in worth.items())
            yield f"   {name:14s} {'on val_select' if step['kind'] == 'aggregate' else 'cross-fitted'}: {numbers}"
    last = policy["steps"][-1]["parameters"]
    yield f"guarantee: {policy['guarantee']}"
    if not policy["feasible"]:
        yield f"not feasible: {last.get('short', 'no threshold keeps what was asked for')}"
    seen = policy["metrics"]
    decided = seen["decided"] or {}
    yield (f"on the {seen['n']} samples of the last fit: decided {seen['decided_share']:.1%}, of these accuracy "
           f"{number(decided.get('accuracy'))}, MCC {number(decided.get('mcc'))}, FNR {number(decided.get('fnr'))}; "
           f"sets of {seen['set_size']:.2f} classes hold the truth in {seen['in_set']:.1%}")  # fmt: skip


def foreseen(table):
    """Whether the views of a sample tell more of its being wrong than the largest probability does, in a line."""
    known = table.take(np.flatnonzero(table.labels >= 0))
    errors = failure.wrong(known.logits, known.labels)
    if min(errors.sum(), (~errors).sum()) < 20:
        return (f"{errors.sum()} of {len(errors)} samples are wrong, {(~errors).sum()} right: 20 of each are needed to "
                "learn what foretells it")  # fmt: skip
    auroc = failure.compare(known.logits, known.labels, known.groups)
    return (f"being wrong is foretold with AUROC {auroc['predictor']:.3f} by six features of the views, "
            f"{auroc['largest_probability']:.3f} by the largest probability (cross-fitted)")  # fmt: skip


def on_select(path):
    """The predictions of val_select beside those of val_calib."""
    return path.with_name("val_select.npz") if path.suffix == ".npz" else path


def first_step(paths, method):
    """best -> the runs it is about, the pool as a step, and what it was chosen by; another step: as it is."""
    name, options = read_options(method)
    if name != "best":
        return paths, method, {}
    if set(options) - {"runs"}:
        raise ValueError(f"{method}: best has one option, runs=1, which chooses among --predictions too")
    each = [[path] for path in paths] if options.get("runs") else [paths]
    found = [policies.load([on_select(path) for path in some], "val_select") for some in each]
    for table in found:
        if table.facts["split"] != "val_select" or set(table.ids) != set(found[0].ids):
            raise ValueError(f"best needs predictions of val_select, of the same samples in each run, not "
                             f"{table.facts['split']} of {len(table.ids)}; export them again")  # fmt: skip
    run, pool, options, worth = choose_pool(found)
    about = {"predictions_sha256": found[run].facts["npz_sha256"], "split": "val_select", "n": len(found[run].ids)}
    return each[run], {"method": pool, **options}, {"chosen_on": about, "choice": worth}


def main(argv=None):
    args = build_parser().parse_args(argv)
    paths, first, chosen = first_step(args.predictions, args.method[0])
    table = policies.load(paths, "val_calib")
    if (split := table.facts["split"]) != "val_calib":
        raise ValueError(f"{args.predictions[0]} holds {split}: policies are fitted on val_calib (of CT: --four-way)")
    root = args.data or Path(table.facts.get("data") or ".")
    slices = policies.column_of(args.labels, root, args.by, table.ids) if args.by else None
    policy = rules.fit_steps(table, [first, *args.method[1:]], slices, args.by)
    policy["steps"][0] |= chosen
    policy |= {name: table.facts[name] for name in ("weights_sha256", "split_sha256")}
    print("\n".join([*report(policy), foreseen(table)]))
    write_json(args.out, policy, indent=1)
    print(args.out)
    return 0


if __name__ == "__main__":
    run(main)
