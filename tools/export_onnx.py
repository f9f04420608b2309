"""A backbone, or the classifier of a checkpoint or bundle, as an ONNX file that onnxruntime runs with equal numbers.

    python tools/export_onnx.py --weights bundles/photos --out photos.onnx --images data/photos
    python tools/export_onnx.py --weights runs/first/last.pth --out vit.onnx --dynamic

In: views [batch, 3, height, width] as data.render_views makes them, cut outside; the batch is free. Out: logits, or cls
and patches. Positions are constants of one --size, or computed for any with --dynamic. The graph holds no If, Loop or
Tile. What it says is compared with torch on random inputs, and on --images; a difference above 1e-4 writes nothing.
--int8 quantises the weights and keeps the file only if MCC on val_select of --data falls by 0.01 at most.
Needs onnx, onnxscript and onnxruntime.
"""

import contextlib
import json
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch

import model
from model import load_backbone, read_facts
from tools.lib import asking, bundle, classifiers, fused, fusion, judge, metrics
from tools.lib.cli import Parser, natural, run, shown
from tools.lib.files import write_json

OPSET = 18
TOLERANCE = 1e-4  # float32, of logits, or of features, which are layer-normalised
MCC_DROP = 0.01  # of int8
REFUSED = {"If", "Loop", "Scan", "Tile"}  # what other runtimes cannot build, or build slowly
REAL, REPEATS = 8, 10  # pictures that are compared, calls that are timed


class Exported(torch.nn.Module):
    """Logits of a classifier; of a backbone cls and patches."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        out = self.net(images)
        return (out,) if isinstance(out, torch.Tensor) else (out.cls, out.patches)


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--weights", required=True, type=Path, help="bundle, best.pth, or what load_backbone reads")
    parser.add_argument("--out", required=True, type=Path, help="the .onnx; beside it .json with what was measured")
    parser.add_argument("--size", type=natural, default=0, help="pixels per side of a view; 0: that of the weights")
    parser.add_argument("--dynamic", action="store_true", help="any height and width that are multiples of a patch")
    parser.add_argument("--images", nargs="+", help="photographs, or folders of them, to compare on too")
    parser.add_argument("--int8", action="store_true", help="also OUT.int8.onnx: weights in 8 bits, of classifiers")
    parser.add_argument("--data", type=Path, help="folder with the val_select on which int8 is judged")
    return parser


def read(path):
    """-> (Classifier or backbone, facts: layout, eval_view, encoding, sha256, and classes, of a backbone None)."""
    if (path / "bundle.json").exists():
        net, facts, _ = bundle.read_bundle(path)
    elif path.is_file() and "classes" in read_facts(path):
        net, facts = classifiers.read_classifier(path)
    else:
        net, facts = load_backbone(path), read_facts(path)
        encoding = facts.get("encoding", "photo")
        facts = {"encoding": encoding, "classes": None, "layout": "whole", "sha256": judge.weights_sha256(path),
                 "eval_view": judge.choose_view(facts, encoding, 0, net.patch_size)}  # fmt: skip
    if isinstance(net, fused.FusedClassifier):
        raise ValueError(f"--weights {path}: a trained fusion reads all views and facts at once, which is not exported")
    return net, facts


def positions(vit, size, dynamic):
    """Around an export: of a fixed size the RoPE table is a constant, which folding alone does for small ones."""
    if dynamic:
        return contextlib.nullcontext()
    grid = size // vit.patch_size
    table = model.rope_table(grid, grid, vit.dim // vit.heads, vit.rope_base, 1 + vit.registers)
    return mock.patch.object(model, "rope_table", lambda *_: table)


def export(module, facts, size, dynamic, out):
    """Writes the graph; refuses operations that other runtimes stumble at -> {operation: how many}."""
    import onnx

    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if dynamic else {}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says that torchvision is not there
    how = dict(dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"])
    how["output_names"] = ["cls", "patches"] if facts["classes"] is None else ["logits"]
    how["external_data"] = sum(p.nbytes for p in module.parameters()) > 1.5e9  # a protobuf holds 2 GB
    shapes = ({0: torch.export.Dim("batch"), **sides},)
    with positions(getattr(module.net, "backbone", module.net), size, dynamic):
        torch.onnx.export(module, (torch.zeros(3, 3, size, size),), str(out), dynamic_shapes=shapes, **how)
    graph = onnx.load(out, load_external_data=False)
    kinds = [node.op_type for part in (graph.graph, *graph.functions) for node in part.node]
    if bad := REFUSED & {*kinds}:
        raise ValueError(f"the graph holds {', '.join(sorted(bad))}, which it must not: export with another torch")
    said = {key: json.dumps(facts[key]) for key in ("classes", "layout", "eval_view", "encoding", "sha256")}
    onnx.helper.set_model_props(graph, said)
    onnx.save(graph, out)
    return {kind: kinds.count(kind) for kind in sorted({*kinds})}


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda views: opened.run(None, {"images": np.ascontiguousarray(views)})


@torch.inference_mode()
def compare(module, ask, size, dynamic, patch, real):
    """Largest difference to torch on random views of several batches (and sizes), and on real ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 3, size, size) for batch in (1, 2, 5)]
    shapes += [(2, 3, size + patch, size), (1, 3, size, size + 2 * patch)] if dynamic else []
    found = {"x".join(map(str, shape)): torch.randn(shape, generator=generator) for shape in shapes}
    for name, views in (found | ({"pictures": real} if real is not None else {})).items():
        pairs = zip(module(views), ask(views.numpy()))
        yield name, float(np.max([np.abs(ours.numpy() - theirs).max() for ours, theirs in pairs]))  # NaN stays NaN


@torch.inference_mode()
def milliseconds(module, ask, views):
    """{who: median of calls that take turns}, so that a busy machine slows both alike."""
    times, array = {"torch": [], "onnxruntime": []}, views.numpy()
    for _ in range(1 + REPEATS):  # the first fills caches
        for own, call in zip(times.values(), (lambda: module(views), lambda: ask(array))):
            start = time.perf_counter()
            call()
            own.append(1e3 * (time.perf_counter() - start))
    return {who: float(np.median(own[1:])) for who, own in times.items()}


def quantise(args, facts):
    """OUT.int8.onnx, if it costs little -> its numbers on val_select."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = args.out.with_suffix(".int8.onnx")
    source = asking.of_data(args.data, ["val_select"], facts)
    asked = asking.samples_of(source, facts)["val_select"]
    if not (known := asked.labels >= 0).any():
        raise ValueError(f"--data {args.data}: val_select has no labels, so int8 cannot be judged")
    logging.getLogger().setLevel(logging.ERROR)  # it recommends a step that changes nothing here
    quantize_dynamic(str(args.out), str(small), weight_type=QuantType.QInt8)
    mcc = {}
    for name, path in (("float32", args.out), ("int8", small)):
        ask, rows = session(path), asked.rows[known]
        logits = classifiers.each_view(lambda views: torch.from_numpy(ask(views.numpy())[0]), source, rows,  # noqa: B023
                                       facts["layout"], facts["eval_view"], "cpu", 32, 2, name)  # fmt: skip
        said = fusion.probabilities(logits).argmax(1)
        mcc[name] = float(metrics.mcc(asked.labels[known], said))
    kept = mcc["float32"] - mcc["int8"] <= MCC_DROP
    if not kept:
        small.unlink()
    return {"mcc": mcc, "samples": int(known.sum()), "kept": kept, "bytes": small.stat().st_size if kept else None}


def measured(args, net, facts, size, real):
    """Exports, compares and times -> for the .json; what is not equal to torch does not stay."""
    module = Exported(net).eval()
    patch = getattr(net, "backbone", net).patch_size
    try:
        kinds = export(module, facts, size, args.dynamic, args.out)
        ask = session(args.out)
        apart = dict(compare(module, ask, size, args.dynamic, patch, real))
        if not all(value <= TOLERANCE for value in apart.values()):
            raise ValueError(f"onnxruntime and torch differ by {apart}, allowed are {TOLERANCE}: nothing is written")
    except ValueError:
        args.out.unlink(missing_ok=True)
        raise
    views = torch.randn(8, 3, size, size)
    speed = {f"{who}, batch {n}": value for n in (1, 8) for who, value in milliseconds(module, ask, views[:n]).items()}
    return {"version": 1, "opset": OPSET, "dynamic": args.dynamic, "operations": kinds, "differences": apart,
            "milliseconds": speed, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "bytes": args.out.stat().st_size}  # fmt: skip


def main(argv=None):
    args = build_parser().parse_args(argv)
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ValueError(f"this needs {', '.join(missing)}: pip install onnx onnxscript onnxruntime")
    net, facts = read(args.weights)
    if args.int8 and (facts["classes"] is None or args.data is None):
        raise ValueError("--int8 needs a classifier and --data, on whose val_select it is judged")
    if args.images and facts["encoding"] != "photo":
        raise ValueError(f"--images are photographs, these weights are for {facts['encoding']}; leave --images away")
    size = args.size or facts["eval_view"]["size"]
    if size % getattr(net, "backbone", net).patch_size:
        patch = getattr(net, "backbone", net).patch_size
        raise ValueError(f"--size {size} is not a multiple of the patch size {patch}")
    facts["eval_view"] = {**facts["eval_view"], "size": size}
    source = asking.of_files(args.images) if args.images else None
    some = range(min(REAL, len(source))) if source else []
    how = facts["layout"], facts["eval_view"], "cpu"
    real = classifiers.views_of(source, some, *how).flatten(0, 1) if source else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    summary = measured(args, net, facts, size, real)
    summary |= {key: facts[key] for key in ("classes", "layout", "eval_view", "encoding")}
    summary |= {"weights_sha256": facts["sha256"]} | ({"int8": quantise(args, facts)} if args.int8 else {})
    write_json(args.out.with_suffix(".json"), summary)
    nodes, apart = sum(summary["operations"].values()), max(summary["differences"].values())
    print(f"{args.out}: opset {OPSET}, {nodes} nodes, none of {', '.join(sorted(REFUSED))}")
    print(f"largest difference to torch {apart:.1e}, on {', '.join(summary['differences'])}")
    print("; ".join(f"{name} {value:.1f} ms" for name, value in summary["milliseconds"].items()))
    if not (found := summary.get("int8")):
        return 0
    print(f"int8 {'kept' if found['kept'] else 'not kept'}: MCC {shown(found['mcc'])} on {found['samples']} samples")
    return 0 if found["kept"] else 1


if __name__ == "__main__":
    run(main)
