"""What a classifier says of pictures: logits of each view as a table (npz, json), probabilities as a CSV for people.

    python tools/predict.py --ckpt runs/photos/best.pth --data data/photos --out runs/photos/predictions
    find . -name '*.jpg' | python tools/predict.py --ckpt runs/photos/best.pth --images - --out said

Of a folder with _splits its val_select and val_calib are exported, or --split; labels are copied where labels.csv or
--labels has them, and not needed. No score is computed, so predictions of val_test are no look at it: the look is that
of tools/evaluate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import data
from tools.lib import asking, broken, classifiers
from tools.lib.cli import Parser, pick_device, positive, run, shown


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="best.pth of train_probe.py --tune; EMA weights speak")
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
    broken.add_flag(parser)
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    return parser


def names_of(images):
    """--images as names; - stands for those on standard input."""
    names = []
    for name in images:
        names += [line for line in sys.stdin.read().splitlines() if line.strip()] if name == "-" else [name]
    return names


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.images and (args.split or args.labels):
        raise ValueError("--split and --labels belong to --data; files of --images have neither")
    classifier, facts = classifiers.read_classifier(args.ckpt)
    if args.layout:
        data.find_layout(args.layout)
        facts["layout"] = args.layout
    device, labels = pick_device(args.device), args.labels and data.find_table(args.data, args.labels)
    source = asking.of_files(names_of(args.images)) if args.images else asking.of_data(args.data, args.split, facts)
    source = broken.leave_out(source, args.skip_bad)
    for split, asked in asking.samples_of(source, facts, labels).items():
        logits = asking.answers(classifier, facts, source, asked, split, device, args.batch_size, args.workers)
        about = classifiers.facts_of(facts, source, split, asking.labels_sha256(source, labels))
        path = classifiers.export(args.out, asked.ids, asked.groups, asked.labels, logits, about)
        counts = f"{len(asked.ids):,} samples, {(asked.labels >= 0).sum():,} with a label, {logits.shape[1]} views each"
        print(f"{path} (.json, .csv): {counts}, classes {shown(facts['classes'])}")
    return 0


if __name__ == "__main__":
    run(main)
