"""The final number: what a policy's decisions are worth on val_test, in words, on a page and as files.

    python tools/evaluate.py --predictions runs/photos --policy runs/photos/policy.json --out runs/photos/evaluation
    python tools/evaluate.py --bundle bundles/photos --data data/photos --out bundles/evaluation

Each look at val_test is recorded in _splits/test_uses.jsonl of the data. A second look with another policy or other
weights is refused unless --again says why: the best of several looks is optimistic.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

import data
from checkpoint import write_text
from tools.lib import asking, bundle, classifiers, evaluation, metrics, page, policies, provenance, rules, tables
from tools.lib.cli import Parser, natural, pick_device, positive, run, shown
from tools.lib.files import csv_text, write_json

COMPARED = {  # in results.json: on the page
    "nll": "log loss", "brier": "Brier score", "ece": "calibration error (ECE)",
    "ece_mass": "the same, bins of equal size",
    "ece_classes": "the same, class by class", "ece_debiased": "the same, less what chance gives",
    "mce": "largest error of a bin (MCE)", "auc": "area under ROC (AUC)", "average_precision": "average precision",
    "aurc": "area under risk and coverage", "augrc": "generalised risk (AUGRC)",
}  # fmt: skip
LEFT = {
    "n": "samples", "cost_per_sample": "cost per sample of all",
    "accuracy_if_decided": "accuracy, had they been decided",
    "accuracy_if_others_are_right": "accuracy of all, if others are right",
}  # fmt: skip


def build_parser():
    parser = Parser(__doc__)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--predictions", nargs="+", type=Path, help="the runs of the policy, in the same order, with "
                     "predictions/val_test.npz; or such files")  # fmt: skip
    who.add_argument("--bundle", type=Path, help="folder of tools/release.py --policy: it is asked about --data")
    parser.add_argument("--policy", type=Path, help="policy.json of tools/fit_policy.py, for --predictions")
    parser.add_argument("--out", required=True, type=Path, help="folder for report.html, results.json and tables")
    parser.add_argument("--data", type=Path, help="data folder with _splits; default: the one named in the predictions")
    parser.add_argument("--labels", type=Path, help="label table with fact columns; also looked for in --data; "
                        "default with --bundle: its labels.csv")  # fmt: skip
    parser.add_argument("--slices", nargs="*", default=[], help="fact columns of --labels to report by")
    parser.add_argument("--split", default="val_test", help="another split is evaluated without a record")
    parser.add_argument("--again", help="why val_test is looked at with a second policy or other weights; recorded")
    parser.add_argument("--errors", type=natural, default=100, help="worst samples of each kind in errors.csv, 0: "
                        "none; with --bundle or --ckpt the first 12 of each are drawn, with views")  # fmt: skip
    parser.add_argument("--ckpt", type=Path, help="weights of the one run of --predictions, to draw errors with")
    parser.add_argument("--batch-size", type=positive, default=96, help="of --bundle: views per forward")
    parser.add_argument("--workers", type=positive, default=2, help="of --bundle: threads that read ahead")
    parser.add_argument("--device", default="auto", help="of --bundle: auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    parser.add_argument("--bootstrap", type=positive, default=1000, help="resamples of groups for each interval")
    return parser


def refuse_strangers(policy, table, path):
    """A policy belongs to the weights, classes and split that it was fitted on."""
    names = ["classes", "layout", "weights_sha256", "split_sha256"]
    for name in names if table.facts["split"] != "all" else names[:3]:  # other data, which have no split
        if name in policy and policy[name] != table.facts.get(name):
            raise ValueError(f"{path} was fitted with another {name} than these predictions; fit the policy again")


def open_look(args, table, root):
    """Records the look at val_test, before any number is computed."""
    if table.facts["split"] != "val_test":
        return 0
    splits = data.split_path(root)
    if not splits.exists():
        raise FileNotFoundError(f"{splits} does not exist; name the data folder of these predictions with --data")
    if data.file_sha256(splits) != table.facts["split_sha256"]:
        raise ValueError(f"{splits} is another split than that of the predictions; export them again")
    look = {"program": "evaluate.py", "weights_sha256": table.facts["weights_sha256"]}
    look |= {"policy_sha256": data.file_sha256(args.policy), "labels_sha256": table.facts.get("labels_sha256")}
    return data.record_look(root, {**look, "why": args.again or "final evaluation"}, once=not args.again)


def write_all(folder, table, out, before, policy, result):
    """results.json, confusion.json, predictions.csv, threshold_sweep.csv, report.html."""
    classes, y = table.facts["classes"], table.labels
    write_json(folder / "results.json", result, indent=1)
    confusion = {"version": 1, "classes": classes, "counts": result["decided"].get("confusion")}
    write_json(folder / "confusion.json", confusion)
    tables.write_csv(folder / "predictions.csv", table, out.probabilities, out.decision, out.sets)
    if len(classes) == 2 and len(np.unique(y)) == 2:
        write_text(folder / "threshold_sweep.csv", csv_text(evaluation.sweep_rows(y, out.probabilities)))
    parts = [result[part] for part in ("uncalibrated", "probabilities")]
    rows = [[words, *(part.get(name) for part in parts)] for name, words in COMPARED.items()]
    tone = "warn" if "not met" in result["verdict"] or not policy["feasible"] else "good"
    parts = [page.paragraph(result["verdict"], tone)]
    parts.append(page.section("Targets", page.table(["target", "bound", "value", ""], result["targets"])))
    parts.append(page.section("Probabilities", page.table(["", "before", "after calibration"], rows)))
    parts.append(page.section("Pictures", page.row(*evaluation.draw(y, out, before, policy))))
    steps = [[s["kind"], s["method"], s.get("fitted_on", {}).get("n"), shown(json.dumps(s["parameters"]), 300)]
             for s in policy["steps"]]  # fmt: skip
    parts.append(page.section("Policy", page.table(["step", "method", "fitted on samples", "parameters"], steps)))
    left = [[words, result["left"][name]] for name, words in LEFT.items()]
    parts.append(page.section("What is left to others", page.table(["", "value"], left)))
    for name, lines in result["slices"].items():
        keys = ("slice", "n", "accuracy", "mcc", "fnr", "gap", "flagged")
        parts.append(page.section(f"By {name}", page.table(keys, [[line[key] for key in keys] for line in lines])))
    write_text(folder / "report.html", page.page(f"Evaluation on {result['split']}", *parts))


def at_hand(args, root, split, classifier, facts):
    """What asks a classifier about labelled samples: (Classifier, facts, Source, asking.Samples, device), table."""
    source = asking.of_data(root, [split] if data.split_path(root).exists() else None, facts)
    labels = data.find_table(root, args.labels) if args.labels else None
    asked = asking.samples_of(source, facts, labels)
    split = split if split in asked else "all"
    return (classifier, facts, source, asked[split], pick_device(args.device)), split, labels


def ask_bundle(args):
    """-> (policy, predictions of the split, what is at hand); of a folder without a split, of all of it: no look."""
    if args.data is None or args.policy:
        raise ValueError("--bundle brings its policy, and --data names what to ask it about: give both, not --policy")
    classifier, facts, policy = bundle.read_bundle(args.bundle)
    args.policy, args.labels = args.bundle / "policy.json", args.labels or args.data / "labels.csv"
    if not (table := data.find_table(args.data, args.labels)).exists():
        raise FileNotFoundError(f"{table} does not exist: without labels there is nothing to score (tools/predict.py)")
    hand, split, labels = at_hand(args, args.data, args.split, classifier, facts)
    _, _, source, asked, device = hand
    provenance.refuse_leak(facts, source.take(asked.rows), "the labels")
    found = asking.answers(classifier, facts, source, asked, split, labels, device, args.batch_size, args.workers)
    return policy, found._replace(facts={**found.facts, "npz_sha256": None}), hand


def write_errors(args, table, out, hand, root):
    """errors.csv and, with weights at hand, sheets."""
    rows = list(evaluation.worst_rows(table, out, args.errors))
    write_text(args.out / "errors.csv", csv_text(rows))
    if args.ckpt:
        classifier, facts = classifiers.read_classifier(args.ckpt)
        if facts["sha256"] != table.facts["weights_sha256"]:
            raise ValueError(f"--ckpt {args.ckpt} is not what made these predictions; name the best.pth of their run")
        hand, *_ = at_hand(args, root, table.facts["split"], classifier, facts)
    if hand and hand[2].encoding == "photo":
        print("\n".join(map(str, evaluation.error_sheets(args.out, rows, hand))))


def main(argv=None):
    args = build_parser().parse_args(argv)
    hand = None
    if args.bundle:
        policy, table, hand = ask_bundle(args)
    elif args.policy is None:
        raise ValueError("--predictions needs --policy: name the policy.json that tools/fit_policy.py wrote")
    else:
        policy, table = policies.read_policy(args.policy), policies.load(args.predictions, args.split)
    root = args.data or Path(table.facts.get("data") or ".")
    refuse_strangers(policy, table, args.policy)
    table = table.take(np.flatnonzero(table.labels >= 0))
    if not len(table.ids):
        raise ValueError(f"{args.predictions[0]}: no sample has a label, so there is nothing to score")
    names = {*args.slices, policy["column"]} - {None}
    columns = {name: policies.column_of(args.labels, root, name, table.ids) for name in names}
    looks = open_look(args, table, root)
    out = rules.decide(policy, table.logits, table.ids, columns.get(policy["column"]))
    before, kept = evaluation.uncalibrated(policy, table.logits), out.decision >= 0
    sets = policy["steps"][-1]["kind"] == "conformal"
    result = evaluation.evaluate(table, out, before, sets, args.bootstrap)
    result["verdict"] = evaluation.verdict(result, policy, table.facts["split"], looks)
    print(result["verdict"])
    result |= {"version": 1, "split": table.facts["split"], "looks_before": looks, "targets": [*evaluation.met(result)]}
    result |= {"policy_sha256": data.file_sha256(args.policy), "predictions_sha256": table.facts["npz_sha256"]}
    given = table.labels[kept], out.decision[kept]
    result["slices"] = {
        name: metrics.slices(*given, columns[name][kept], len(table.facts["classes"])) if kept.any() else []
        for name in args.slices
    }
    write_all(args.out, table, out, before, policy, result)
    if args.errors:
        write_errors(args, table, out, hand, root)
    print(args.out / "report.html")
    return 0


if __name__ == "__main__":
    run(main)
