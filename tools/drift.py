"""Are the pictures of today like those of the reference? Scores, classes, features and decisions, side by side.

    python tools/drift.py --reference runs/photos --current said/images.npz --policy runs/photos/policy.json --out drift
    python tools/drift.py --bundle bundle --reference runs/photos --current pictures/ --out drift

In: prediction tables (of tools/predict.py), or with --bundle or --ckpt folders of pictures, whose features are then
compared as well. Out: drift.json, report.html, metrics.prom. One p-value for all statistics together, from groups
dealt anew, so that 1 of 100 looks without a shift raises an alarm. Exit code 0 no shift found, 1 a shift that is small,
2 a shift, 3 could not look.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch

import data
from checkpoint import write_text
from tools.lib import asking, bundle, classifiers, fusion, page, policies, rules, shift, tables, watch
from tools.lib.cli import Parser, above_zero, natural, pick_device, positive, run, shown, unforeseen, within
from tools.lib.files import write_json
from tools.lib.slices import slice_name

WORDS = ("shift", "small shift", "no shift", "could not look")


def build_parser():
    parser = Parser(__doc__)
    # fmt: off
    parser.add_argument("--reference", required=True, type=Path, help="run with predictions of --split, or a table")
    parser.add_argument("--current", required=True, nargs="+", type=Path, help="tables, or with --bundle or "
                        "--ckpt folders of pictures; in the order of time")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--bundle", type=Path, help="classifier of the reference with its policy: is asked about "
                     "--current; what its backbone makes of the pictures of both is compared")
    who.add_argument("--ckpt", type=Path, help="the same without a policy: best.pth of train_probe.py --tune")
    parser.add_argument("--data", type=Path, help="pictures of the reference; default: as its table says")
    parser.add_argument("--policy", type=Path, help="policy.json: probabilities and decisions are those of its steps")
    parser.add_argument("--out", required=True, type=Path, help="folder for drift.json, report.html, metrics.prom")
    parser.add_argument("--split", default="val_calib", help="of the reference")
    parser.add_argument("--window", type=positive, default=200, help="pictures behind each point over time")
    parser.add_argument("--alpha", type=within("(0, 0.5]"), default=0.01, help="share of false alarms, all statistics "
                        "together")
    parser.add_argument("--max-psi", type=above_zero, default=0.25, help="a shift is small while all PSI are below ...")
    parser.add_argument("--max-ks", type=above_zero, default=0.2, help="... and all KS, class and mean shifts")
    parser.add_argument("--draws", type=within("[99, 1e6]", int), default=999, help="deals behind the p-values")
    parser.add_argument("--features-of", type=natural, default=1000, help="pictures of each side whose features are "
                        "compared; 0: none")
    parser.add_argument("--seed", type=natural, default=0, help="of the deals")
    parser.add_argument("--watch", type=Path, help="state of predict.py --watch, told of as well; default: one stream "
                        "of --current from its first picture on")
    parser.add_argument("--prom", type=Path, help="Prometheus text file; default: metrics.prom in --out")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    # fmt: on
    return parser


# ----- what is compared


def ask(classifier, facts, folder, device):
    """A folder of pictures -> its table, and how to read them."""
    source = asking.of_files([str(folder)])
    (asked,) = asking.samples_of(source, facts).values()
    return asking.answers(classifier, facts, source, asked, "images", None, device, 96, 2), (source, asked.rows)


@torch.inference_mode()
def features(classifier, source, rows, facts, device, name):
    """Mean cls token of the views of each picture, [n, D]."""
    look, backbone = (facts["layout"], facts["eval_view"], device, 96, 2, name), classifier.backbone.to(device).eval()
    return classifiers.each_view(lambda views: backbone(views).cls, source, rows, *look).mean(1)


def embed(args, classifier, facts, device, reference, asked):
    """Features of at most --features-of pictures of each side -> (rows [K, D], their places among all samples [K])."""
    root = args.data or Path(reference.facts.get("data") or ".")
    source = data.open_source(root)
    row_of = {slice_name(source, i): i for i in range(len(source))}
    there = np.array([k for k, name in enumerate(reference.ids.tolist()) if name in row_of], int)
    if not len(there):
        raise ValueError(f"{root} holds none of the {len(reference.ids)} pictures of the reference; name --data")
    kept = there[thinned(len(there), args.features_of, args.seed)]
    rows = np.array([row_of[name] for name in reference.ids[kept].tolist()])
    found, places, before = [features(classifier, source, rows, facts, device, "reference")], [kept], len(reference.ids)
    for table, (source, rows) in asked:
        kept = thinned(len(rows), max(1, args.features_of // len(asked)), args.seed)
        found.append(features(classifier, source, rows[kept], facts, device, "current"))
        places.append(before + kept)
        before += len(table.ids)
    return np.concatenate(found), np.concatenate(places)


def thinned(count, most, seed):
    return np.sort(data.rng(seed, "limit").permutation(count)[:most])


def together(all_tables, where):
    """Several tables as one, in their order; ids may come again."""
    first = all_tables[0]
    for path, other in zip(where, all_tables):
        for name in ("classes", "weights_sha256", "layout"):
            if other.facts.get(name) != first.facts.get(name):
                raise ValueError(f"{path}: {name} is not that of {where[0]}: only tables of one classifier compare")
    parts = {name: np.concatenate([getattr(t, name) for t in all_tables]) for name in tables.Predictions._fields[:4]}
    return tables.Predictions(**parts, facts=first.facts)


def decided(policy, table):
    """Probabilities [N, C] and decision [N] (-1: left to others, None without a policy)."""
    if policy is None:
        return fusion.probabilities(table.logits), None
    if policy["column"]:
        raise ValueError(f"the policy has fits for each {shown(policy['column'])}, which pictures without labels lack")
    out = rules.decide(policy, table.logits, table.ids)
    return out.probabilities, out.decision


def columns_of(table, p, decision):
    """{name: values [N]} that are compared one by one."""
    ordered, views = np.sort(p, 1), fusion.probabilities
    found = {"largest probability": ordered[:, -1]}
    if p.shape[1] > 2:  # of two classes the largest probability says both
        found["margin"] = ordered[:, -1] - ordered[:, -2]
        found["entropy"] = -(p * np.log(np.maximum(p, 1e-12))).sum(1)
    classes = table.facts["classes"]
    found |= {f"p of {name}": p[:, k] for k, name in enumerate(classes[:8]) if len(classes) > 2 or k == 1}
    if table.logits.shape[1] > 1:
        each = np.stack([views(table.logits[:, v : v + 1]) for v in range(table.logits.shape[1])], 1)
        found["spread of views"] = each.std(1).mean(1)
    return found if decision is None else found | {"decided": (decision >= 0).astype(float)}


# ----- over time


def over_time(p, decision, size):
    """Rows (last picture, share decided, mean largest probability, share of each class) of windows in order."""
    for start in range(0, len(p), size):
        here = slice(start, start + size)
        said = np.bincount(p[here].argmax(1), minlength=p.shape[1]) / len(p[here])
        decided = None if decision is None else float((decision[here] >= 0).mean())
        yield {"until": start + len(p[here]), "decided": decided, "largest": float(p[here].max(1).mean()),
               "said": said.tolist()}  # fmt: skip


def verdict(found, args):
    """(word, exit code, a sentence)."""
    limits = {"psi": args.max_psi, "mmd": np.inf}
    size = {name: s["value"] / limits.get(name.split()[0], args.max_ks) for name, s in found["statistics"].items()}
    far = sorted((pair for pair in found["statistics"].items() if size[pair[0]] > 1), key=lambda pair: -size[pair[0]])
    sure = sorted(found["statistics"].items(), key=lambda pair: (pair[1]["p"], -pair[1]["value"]))
    if found["p"] > args.alpha:
        return "no shift", 0, (f"No shift found: chance makes sets of pictures as different as these in "
                               f"{found['p']:.1%} of deals, an alarm needs {args.alpha:.1%}.")  # fmt: skip
    named = ", ".join(f"{name} {s['value']:.3g} (p {s['p']:.3g})" for name, s in (far or sure)[:4])
    text = f"All statistics together: p {found['p']:.3g}, an alarm needs {args.alpha:g}; {named}."
    if far:
        return "shift", 2, f"The pictures have shifted. {text} Look at them before the numbers are believed."
    return "small shift", 1, f"The pictures differ from the reference, by little. {text}"


def write_all(args, result, columns, rows, classes, wealth):
    write_json(args.out / "drift.json", result)
    tone = ("good", "warn", "bad", "bad")[result["code"]]
    numbers = [[name, s["value"], s["p"]] for name, s in result["statistics"].items()]
    parts = [
        page.paragraph(result["text"], tone),
        page.section("Statistics", page.table(["", "value", "p alone"], numbers)),
    ]
    plots = []
    for name, (reference, current) in columns.items():
        curves = {who: (np.sort(v)[np.linspace(0, len(v) - 1, 200).astype(int)], np.linspace(0, 1, 200))
                  for who, v in (("reference", reference), ("current", current))}  # fmt: skip
        plots.append(page.line_plot(name, curves, name, "share at most"))
    until = [row["until"] for row in rows]
    time_ = {"mean largest probability": (until, [row["largest"] for row in rows])}
    if rows[0]["decided"] is not None:
        time_["decided"] = (until, [row["decided"] for row in rows])
    marks = [("y", result["reference"]["decided"], "reference")] if result["reference"]["decided"] is not None else []
    plots.append(page.line_plot("Over time: mean largest probability", time_, "picture", "", marks))
    said = {name: (until, [row["said"][k] for row in rows]) for k, name in enumerate(classes[:6])}
    plots.append(page.line_plot("What was said", said, "picture", "share"))
    if wealth is not None:
        curve = page.thin(list(enumerate(wealth.tolist(), 1)))
        marks = [("y", 100, "lost")]
        plots.append(
            page.line_plot("Wealth against exchangeability", {"": tuple(zip(*curve))}, "picture", "", marks, log_y=True)
        )
    write_text(args.out / "report.html", page.page("Drift", *parts, page.section("Pictures", page.row(*plots))))


def watched(args, reference, p, current, q, policy):
    """The martingale: as predict.py left it, or over the current pictures in their order -> (state, wealth or None)."""
    if args.watch:
        return watch.read_watch(args.watch), None
    state = watch.begin(reference, p, policy)
    return state, watch.watch(state, current, q, None)


def write_prom(args, word, code, numbers):
    status = {"run": args.out.resolve().name, "code": code, "time": time.time(), "step": None, "verdict": word,
              "numbers": numbers, "pulse": {}, "sensors": {}}  # fmt: skip
    write_text(args.prom or args.out / "metrics.prom", page.prometheus(status, WORDS))


def metric(name):
    return "drift_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower())


# ----- the look


def gather(args):
    """-> reference and current tables, policy, features of both or None."""
    policy = policies.read_policy(args.policy) if args.policy else None
    reference = tables.read(args.reference, args.split)
    if not args.ckpt and not args.bundle:
        if folders := [path for path in args.current if path.is_dir() and not list(path.glob("*.npz"))]:
            raise ValueError(f"--current {folders[0]} holds no table; a folder of pictures needs --bundle or --ckpt")
        return reference, together([tables.read(one_table(path)) for path in args.current], args.current), policy, None
    if args.bundle and args.policy:
        raise ValueError("--policy and --bundle: the bundle has a policy of its own; leave --policy away")
    classifier, facts, *own = bundle.read_bundle(args.bundle) if args.bundle else classifiers.read_classifier(args.ckpt)
    if facts["sha256"] != reference.facts["weights_sha256"]:
        raise ValueError(f"{args.bundle or args.ckpt} is not what made {args.reference}; export the predictions again")
    device = pick_device(args.device)
    asked = [ask(classifier, facts, path, device) for path in args.current]
    current = together([table for table, _ in asked], args.current)
    rows = embed(args, classifier, facts, device, reference, asked) if args.features_of else None
    return reference, current, own[0] if own else policy, rows


def one_table(path):
    """The table of a folder that holds one, or the file itself."""
    found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(found) != 1:
        raise ValueError(f"--current {path} holds {len(found)} tables; name one of them")
    return found[0]


def look(args):
    reference, current, policy, embedded = gather(args)
    together([reference, current], [args.reference, args.current[0]])  # of one classifier
    (p, decision), (q, later) = decided(policy, reference), decided(policy, current)
    own, others = columns_of(reference, p, decision), columns_of(current, q, later)
    columns = {name: (own[name], others[name]) for name in own}
    groups = reference.groups, current.groups
    found = shift.compare(columns, groups, embedded, (p.argmax(1), q.argmax(1)), args.draws, args.seed)
    word, code, text = verdict(found, args)
    rows = list(over_time(q, later, args.window))
    own = next(over_time(p, decision, len(p)))
    state, wealth = watched(args, reference, p, current, q, policy)
    if state["lost"] and code == 0:
        word, code = "small shift", 1
    text = f"{text} In the order of the pictures: {watch.in_words(state)}."
    result = {"version": 1, "verdict": word, "code": code, "text": text, **found, "reference": own, "over_time": rows}
    result |= {"lost": state["lost"], "wealth": state["last"]}
    write_all(args, result, columns, rows, reference.facts["classes"], wealth)
    numbers = {metric(name): s["value"] for name, s in found["statistics"].items()}
    numbers |= {"drift_p": found["p"], "drift_pictures": len(q), "drift_decided": rows[-1]["decided"]}
    write_prom(args, word, code, numbers | watch.gauges(state))
    print(text)
    print(args.out / "report.html")
    return code


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        return look(args)
    except (ValueError, OSError) as error:
        print(f"could not look: {error}", file=sys.stderr)
        if args.prom or args.out.is_dir():
            write_prom(args, "could not look", 3, {})
        return 3


if __name__ == "__main__":
    sys.excepthook = unforeseen
    run(main)
