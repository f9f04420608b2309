"""From exported predictions of val_calib to one policy.json: pool, calibrator, and a threshold, exit, gate or sets.

    python tools/fit_policy.py --predictions runs/photos --out runs/photos/policy.json --method mean temperature mcc
    python tools/fit_policy.py --predictions runs/a runs/b --out policy.json --method weights auto raps:alpha=0.05

Each fitted step has its own part of the groups: two steps 50/50, three 40/30/30. With --by, calibrators and mondrian
are fitted for each value of a fact column.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

from tools.lib import failure, policies, rules
from tools.lib.cli import Parser, run, shown
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


def report(policy):
    """Lines for a person: each step, what is promised, what was seen on the samples of the fit."""
    for k, step in enumerate(policy["steps"], 1):
        fitted = step.get("fitted_on")
        where = f" on {fitted['n']} samples, by class {fitted['n_per_class']}" if fitted else ", not fitted"
        yield f"{k}. {step['kind']} {step['method']}{where}: {shown(json.dumps(step['parameters']), 200)}"
        for name, worth in step.get("choice", {}).items():
            yield f"   {name:12s} cross-fitted NLL {worth['nll']:.4f}, ECE {worth['ece']:.4f}, MCC {worth['mcc']:.4f}"
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
        return f"{errors.sum()} of {len(errors)} samples are wrong: too few to learn what foretells it"
    auroc = failure.compare(known.logits, known.labels, known.groups)
    return (f"being wrong is foretold with AUROC {auroc['predictor']:.3f} by six features of the views, "
            f"{auroc['largest_probability']:.3f} by the largest probability (cross-fitted)")  # fmt: skip


def main(argv=None):
    args = build_parser().parse_args(argv)
    table = policies.load(args.predictions, "val_calib")
    if (split := table.facts["split"]) != "val_calib":
        raise ValueError(f"{args.predictions[0]} holds {split}: policies are fitted on val_calib (of CT: --four-way)")
    root = args.data or Path(table.facts.get("data") or ".")
    slices = policies.column_of(args.labels, root, args.by, table.ids) if args.by else None
    policy = rules.fit_steps(table, args.method, slices, args.by)
    policy |= {name: table.facts[name] for name in ("weights_sha256", "split_sha256")}
    print("\n".join([*report(policy), foreseen(table)]))
    write_json(args.out, policy, indent=1)
    print(args.out)
    return 0


if __name__ == "__main__":
    run(main)
