"""What a classifier says of pictures: logits of each view as a table (npz, json), decisions as a CSV for people.

    python tools/predict.py --ckpt runs/photos/best.pth --data data/photos --out runs/photos/predictions
    find . -name '*.jpg' | python tools/predict.py --bundle bundles/photos --images - --out said

Of a folder with _splits its val_select and val_calib are exported, or --split; labels are copied where labels.csv or
--labels has them, and not needed. No score is computed, so predictions of val_test are no look at it: the look is that
of tools/evaluate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np

import data
from checkpoint import write_text
from tools.lib import asking, broken, bundle, classifiers, sheet, tables, view_sheet, watch
from tools.lib.cli import Parser, pick_device, positive, run, shown
from tools.lib.files import created_utc, csv_text, write_json
from tools.lib.progress import progress


def build_parser():
    parser = Parser(__doc__)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--ckpt", type=Path, help="best.pth of train_probe.py --tune or --protocol select; EMA weights")
    who.add_argument("--bundle", type=Path, help="folder of tools/release.py --policy: its policy decides, in the CSV")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="data folder, with or without _splits")
    where.add_argument("--images", nargs="+", help="files, folders, or - for names on standard input, one a line")
    parser.add_argument("--out", required=True, type=Path, help="folder for SPLIT.npz, .json and .csv")
    parser.add_argument("--split", nargs="+", choices=list(data.PURPOSES.values()), help="splits of --data to export; "
                        "default: val_select and val_calib")  # fmt: skip
    parser.add_argument("--labels", type=Path, help="label table of --data: its samples alone, with its labels")
    parser.add_argument("--layout", help=f"other views than in training: {', '.join(data.LAYOUTS)}, as tiles:flip=1")
    parser.add_argument("--batch-size", type=positive, default=96, help="views per forward; on a CPU at most 32")
    parser.add_argument("--workers", type=positive, default=2, help="threads that read and cut ahead")
    parser.add_argument("--draw", nargs="+", default=[], metavar="ID", help="photographs whose views SPLIT_views.png "
                        "shows: place, weight, what each says alone, attention inside")  # fmt: skip
    # fmt: off
    parser.add_argument("--watch", type=Path, help="with --bundle: state of a test whether pictures are still such as "
                        "those the policy was fitted on; goes on from call to call, and tools/drift.py tells of it")
    parser.add_argument("--calibration", type=Path, help="where --watch is new: run or table with the val_calib of the "
                        "policy")
    parser.add_argument("--if-lost", choices=["say", "abstain"], default="say", help="once --watch finds that they are "
                        "not: only say that the guarantee is void, or leave these pictures to others too")
    # fmt: on
    broken.add_flag(parser)
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    return parser


def names_of(images):
    """--images as names; - stands for those on standard input."""
    names = []
    for name in images:
        names += [line for line in sys.stdin.read().splitlines() if line.strip()] if name == "-" else [name]
    return names


def draw(args, classifier, facts, source, asked, path, device):
    """SPLIT_views.png and .csv beside SPLIT.npz of those --draw names that are in this split; gives the others."""
    at, parts, table = {name: k for k, name in enumerate(asked.ids)}, [], [view_sheet.HEADER]
    for k in progress([at[name] for name in args.draw if name in at], desc="views", unit="picture"):
        label = facts["classes"][asked.labels[k]] if asked.labels[k] >= 0 else None
        part, rows = view_sheet.drawn(classifier, facts, source, int(asked.rows[k]), asked.ids[k], label, device)
        parts.append(part)
        table += rows
    if parts:
        write_text(path.with_name(f"{path.stem}_views.csv"), csv_text(table))
        print(f"{sheet.save(path.with_name(f'{path.stem}_views.png'), sheet.stack(parts, gap=18))} (.csv)")
    return [name for name in args.draw if name not in at]


def watched(args, policy, table, out):
    """The decisions, after the watch went on with these pictures; its state is saved and its sentence said."""
    if args.watch.exists():
        state = watch.read_watch(args.watch)
    elif args.calibration:
        reference = tables.read(args.calibration)
        state = watch.begin(reference, bundle.decided(policy, reference).probabilities, policy)
    else:
        raise ValueError(f"--watch {args.watch} is not there yet: begin it with --calibration RUN, of the policy")
    before = state["seen"]
    watch.watch(state, table, out.probabilities, created_utc()[:10])
    write_json(args.watch, state, None)
    print(watch.in_words(state) + ("; guarantee: void" if state["lost"] else ""))
    return watch.revoked(out, state, before) if args.if_lost == "abstain" else out


def counted(decision, classes):
    names = [*classes, "left to others"]  # -1 is the last one
    counts = np.bincount(decision % len(names), minlength=len(names)).tolist()
    return "decided: " + ", ".join(f"{count:,} {shown(name)}" for name, count in zip(names, counts))


def main(argv=None):
    args = build_parser().parse_args(argv)
    if (args.calibration or args.if_lost != "say") and not args.watch:
        raise ValueError("--calibration and --if-lost belong to --watch; give it too")
    if args.watch and not args.bundle:
        raise ValueError("--watch needs --bundle: without a policy nothing is promised")
    if args.images and (args.split or args.labels):
        raise ValueError("--split and --labels belong to --data; files of --images have neither")
    if args.bundle:
        classifier, facts, policy = bundle.read_bundle(args.bundle)
    else:
        (classifier, facts), policy = classifiers.read_classifier(args.ckpt), None
    if args.layout:
        if policy:
            raise ValueError(f"--layout {args.layout}: the policy of the bundle is for {facts['layout']}")
        data.find_layout(args.layout)
        facts["layout"] = args.layout
    device, labels = pick_device(args.device), args.labels and data.find_table(args.data, args.labels)
    source = asking.of_files(names_of(args.images)) if args.images else asking.of_data(args.data, args.split, facts)
    if args.draw and source.encoding != "photo":
        raise ValueError(f"--draw is for photographs; {args.data} holds slices of CT")
    source = broken.leave_out(source, args.skip_bad)
    for split, asked in asking.samples_of(source, facts, labels).items():
        how = labels, device, args.batch_size, args.workers
        table = asking.answers(classifier, facts, source, asked, split, *how)
        slices = asking.column(source, asked, policy, labels) if policy else None
        out = bundle.decided(policy, table, slices) if policy else None
        out = watched(args, policy, table, out) if args.watch else out
        path = classifiers.export(args.out, *table, out)
        views, known = table.logits.shape[1], (table.labels >= 0).sum()
        print(f"{path} (.json, .csv): {len(table.ids):,} samples, {known:,} with a label, {views} views each, classes "
              f"{shown(facts['classes'])}")  # fmt: skip
        if policy:
            print(counted(out.decision, facts["classes"]))
        args.draw = draw(args, classifier, facts, source, asked, path, device)
    if args.draw:
        raise ValueError(f"--draw {shown(args.draw[0])} is none of these samples: an id of the CSV is asked for")
    return 0


if __name__ == "__main__":
    run(main)
