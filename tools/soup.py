"""A model soup (arXiv:2203.05482): the mean of the EMA weights of several runs from one start, as one classifier.

    python tools/soup.py --ckpt runs/ab/base/seed_*/best.pth --out runs/soup
    python tools/predict.py --ckpt runs/soup/best.pth --data data/photos --out runs/soup/predictions

Adapters are merged first. The runs must share backbone, head, classes, views and split. The logits of several models
side by side, an ensemble, need no program of their own: tools/fit_policy.py --predictions runs/a runs/b.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import torch

from tools.lib import baseline
from tools.lib.classifiers import read_classifier
from tools.lib.cli import Parser, run, shown

SHARED = "classes fusion pool layers layout eval_view encoding split_sha256 labels_sha256 trained_groups".split()


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, nargs="+", type=Path, help="best.pth of several runs from one start")
    parser.add_argument("--out", required=True, type=Path, help="folder for best.pth")
    return parser


def mean_state(paths):
    """-> (Classifier with the mean weights, facts of the first); what the runs do not share is named."""
    net, facts, total = None, None, None
    for path in paths:
        other, told = read_classifier(path)
        state = {name: value.double() for name, value in other.state_dict().items()}
        if net is None:
            net, facts, total = other, told, state
            continue
        if odd := [name for name in SHARED if told.get(name) != facts.get(name)]:
            both = f"{shown(told.get(odd[0]), 100)} and {shown(facts.get(odd[0]), 100)}"
            raise ValueError(f"{path} and {paths[0]} differ in {odd[0]}: {both}; a soup is of runs of one recipe")
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in total.items()}:
            raise ValueError(f"{path} and {paths[0]} are of different backbones or heads; a soup has one")
        for name, value in state.items():
            total[name] += value
    net.load_state_dict({n: (v / len(paths)).to(net.state_dict()[n].dtype) for n, v in total.items()})
    return net, facts


def main(argv=None):
    args = build_parser().parse_args(argv)
    if len({path.resolve() for path in args.ckpt}) < 2:
        raise ValueError("--ckpt needs two different checkpoints or more")
    if (path := args.out / "best.pth").exists():
        raise FileExistsError(f"{path} is there; name a new --out")
    with torch.inference_mode():
        net, facts = mean_state(args.ckpt)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {name: value for name, value in facts.items() if name not in ("sha256", "best", "looked")}
    facts |= {"arch": net.backbone.arch, "args": {**facts["args"], "soup": [str(path) for path in args.ckpt]}}
    baseline.save(path, net, facts)
    print(f"{path}: the mean of {len(args.ckpt)} runs; ask it with tools/predict.py, before it is trusted")
    return 0


if __name__ == "__main__":
    run(main)
