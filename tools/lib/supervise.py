"""Around the update of supervised training: what flags mean, what is drawn for an update, where the head starts, what
val_select says. The method itself is in train_probe.py, the reading of pictures in tools/lib/augment.py.

Letters: N pictures, b of a micro-batch, C classes, D features, V views.
"""

import functools
import inspect
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import data
import losses
from checkpoint import write_text
from model import ADAPTER_NORMS, adapted_layers, add_adapters
from tools.lib import augment, fits, fuse, fused, loop, metrics, page, protocols, provenance
from tools.lib.classifiers import each_view, export, facts_of, logits_of, read_classifier
from tools.lib.cli import shown, technique
from tools.lib.files import write_json
from tools.lib.fusion import POOLS, probabilities

LOG_EVERY = 50  # updates
# of --tune: peak learning rates of backbone and head, layer decay
RATES = {"head": (0.0, 1e-3, 1.0), "adapters": (5e-4, 1e-4, 1.0), "last": (1e-4, 1e-4, 0.75), "all": (1e-4, 1e-4, 0.75)}
RATES["fusion"] = 0.0, 1e-3, 1.0
HEADS = {"probe": lambda dropout=0.0: None, "random": lambda dropout=0.0: None}  # their options alone matter

# ----- flags in words


def tune_kind(text):
    """none, head, adapters, last:N, all, fusion:... -> (kind, N)"""
    kind, _, count = text.partition(":")
    if kind == "fusion":  # its options are those of fuse.fusion
        return kind, 0
    if kind not in ("none", "head", "adapters", "last", "all") or (kind == "last") != count.isdecimal():
        raise ValueError(f"--tune {shown(text)}: use none, head, adapters, last:N (the last N blocks), all or fusion")
    return kind, int(count or 0)


def refuse_unread(parser, args, kind):
    """Refuse flags that this run would not read; a seed is given to all runs of a comparison."""
    title, other = ("training (--tune)", "--tune") if kind == "none" else ("frozen probe", "--tune none")
    (group,) = (g for g in parser._action_groups if g.title == title)
    for action in group._group_actions:
        if action.dest in args.given and action.dest not in ("seed", "bootstrap"):
            raise ValueError(f"{action.option_strings[0]} is not read with --tune {args.tune}: leave it out, or give "
                             f"{other} too")  # fmt: skip


def adapter(rank=16, alpha=0.0, targets="all", init="zero", unfreeze=0):
    """Options of --adapter; alpha 0: chosen so that the low-rank part is scaled by 2."""


ADAPTERS = dict.fromkeys(ADAPTER_NORMS, adapter)


def read_adapter(text):
    """dora:rank=8 -> what model.add_adapters takes."""
    norm, given = technique(text, ADAPTERS)
    options = {name: p.default for name, p in inspect.signature(adapter).parameters.items()} | given
    power = 0.5 if norm == "rslora" else 1
    return {**options, "norm": norm, "alpha": options["alpha"] or 2 * options["rank"] ** power}


def read_head(text):
    """probe:dropout=0.1 -> (where the head starts, dropout)"""
    name, options = technique(text, HEADS)
    return name, options.get("dropout", 0.0)


def views_alone(width=0, pyramid=False, depth=0, heads=4, gated=True, hidden=0):
    """Options of --fusion: those of fuse.fusion that read views alone and add no loss."""


def read_fusion(text):
    """mil:depth=1 -> {"fusion": what fused.build takes, as checkpoints say it}; nothing without --fusion"""
    if not text:
        return {}
    technique(text, {"mil": views_alone, "mean": views_alone})
    switches, _ = fuse.read_options(f"fusion:pool={text.replace(':', ',')}")
    return {"fusion": {"switches": switches | {"weather": 0}, "fields": {}}}


def joined(classifier, text):
    """A Classifier as it is, or with --fusion one whose head reads all views of a picture."""
    if not text:
        return classifier
    net, width, classes = classifier, classifier.head.last_layer.in_features, classifier.head.last_layer.out_features
    return fused.FusedClassifier(net.backbone, fused.build(width, classes, **read_fusion(text)["fusion"]), net.pool,
                                 net.layers)  # fmt: skip


def read_loss(text, labels, classes):
    """focal:gamma=1,weights=balanced -> function(logits, targets, progress); balanced: classes count alike."""
    name, options = technique(text, losses.OBJECTIVES)
    weights = options.pop("weights", None)
    if weights == "balanced":
        counts = np.bincount(labels, minlength=classes)
        weights = (len(labels) / classes / counts).tolist()
    if weights is not None and not (isinstance(weights, list) and len(weights) == classes):
        raise ValueError(f"--loss {text}: weights are balanced, or {classes} numbers like [1,2], one for each class")
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    objective = functools.partial(losses.OBJECTIVES[name], weights=weights, **options)
    scheduled = "progress" in inspect.signature(objective).parameters
    return lambda z, targets, progress: objective(z, targets, **({"progress": progress} if scheduled else {}))


def choose_trained(vit, kind, count, options):
    """Let train what --tune names; adapters are drawn from torch's generator unless they are there already."""
    if kind == "adapters":
        if not adapted_layers(vit):
            add_adapters(vit, **options)
        return
    if kind == "last" and not 1 <= count <= vit.depth:
        raise ValueError(f"--tune last:{count}: this backbone has {vit.depth} blocks")
    vit.requires_grad_(kind == "all")
    last = [*vit.blocks[vit.depth - count :], vit.norm, vit.cls_norm] if kind == "last" else []
    for module in filter(None, last):
        module.requires_grad_()


# ----- what is drawn for an update


def resolve(args, images, world):
    """Fill in what depends on other flags, once and for the whole run; images: to train on."""
    kind, _ = tune_kind(args.tune)
    args.batch_size = args.batch_size or min(64, images // world * world)
    if args.batch_size > images:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {images} images to train on; use less")
    loop.divisor("the number of ranks", world, args.batch_size, "--batch-size")
    share = args.batch_size // world
    fitting = max(m for m in range(1, min(share, 32) + 1) if share % m == 0)
    args.micro_batch = loop.divisor("--micro-batch", args.micro_batch or fitting, share, "the images of a rank")
    args.steps = args.steps or max(1, round(args.epochs * images / args.batch_size))
    args.eval_every = args.eval_every or max(1, images // args.batch_size)
    *rates, decay = RATES[kind]
    args.lr = list(args.lr or rates)
    args.layer_decay = args.layer_decay or decay
    several = kind == "fusion" or args.fusion
    args.views, args.protocol = args.views or ("tiles" if several else "whole"), args.protocol or "select"
    if args.fusion and (kind == "fusion" or world > 1 or read_head(args.head) != ("probe", 0.0)):
        raise ValueError("--fusion joins the views of each picture: use one process, --tune head, last:N, adapters or "
                         "all, and no --head")  # fmt: skip
    if args.fusion and ((row := augment.find_row(args.aug)).mixup or row.cutmix):
        raise ValueError(f"--aug {args.aug} mixes pictures, of which --fusion shows all views; use light or none")
    if kind == "fusion" and (world > 1 or args.dry_run):
        raise ValueError("--tune fusion takes seconds: leave out --dry-run, and use one process")
    if args.protocol not in ("select", "test"):
        raise ValueError(f"--protocol {args.protocol}: --tune {args.tune} knows select, and test (val_test too)")
    if args.features == "box":
        raise ValueError("--features box: nodules are for the frozen probe; use cls, mean or all")
    loss = args.loss.partition(":")[0]
    if loss in ("conformal", "curriculum") and args.micro_batch < args.batch_size:
        raise ValueError(f"--loss {loss} compares the images of a batch: use one rank and --micro-batch "
                         f"{args.batch_size}, or another --loss")  # fmt: skip
    return args


def passing(seed, step, ids, dim, rate, device):
    """Which features [b, D] pass the dropout of the head, a function of (seed, step, id); None: all."""
    if not rate:
        return None
    keep = np.stack([data.rng(seed, "dropout", step, int(i)).random(dim) >= rate for i in ids])
    return data.send(torch.from_numpy(keep), device)


def uniform(seed, step, ids):
    """One number in 0..1 for each picture, to draw a label with."""
    return np.array([data.rng(seed, "label", step, int(i)).random() for i in ids], np.float32)


# ----- val_select, the linear probe before training, the log


def look(classifier, part, args, view, device, rank, world):
    """Score weights on val_select -> {mcc, accuracy, auc, loss, classes_said}; None: their logits are not finite."""
    (source, table), (name, options) = part, technique(args.pool, POOLS)

    def ask(rows):
        return logits_of(classifier, source, rows, args.views, view, device, workers=args.workers or 1, name="look")

    logits = loop.over_ranks(ask, np.arange(len(source)), rank, world)
    if not np.isfinite(logits).all():
        return None
    p = probabilities(logits, name, **options)
    found = metrics.all_metrics(table.labels, p)
    said = np.unique(metrics.decisions(metrics.score_of(p)))
    return {**{k: float(found[k]) for k in ("mcc", "accuracy", "auc")}, "loss": float(metrics.nll(table.labels, p)),
            "classes_said": len(said)}  # fmt: skip


def start_head(classifier, parts, args, view, device, rank, world):
    """LP-FT (arXiv:2202.10054): the head begins as the linear probe of the backbone as it is -> a line about it.

    parts: (Source, Table) of train, and of val_select, which chooses C. Each view of a picture has its label.
    """
    classifier, found, labels = classifier.eval(), [], []
    for source, table in parts:

        def ask(rows, source=source):
            look = args.views, view, device, 96, args.workers or 1, "features"
            return each_view(classifier.features, source, rows, *look)

        features = loop.over_ranks(ask, np.arange(len(source)), rank, world)  # [N, V, D]
        found.append(features)
        labels.append(table.labels)
    if args.fusion:
        sets = [fuse.Set(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in zip(found, labels)]
        objective = read_loss("ce", labels[0], len(parts[0][1].classes))
        _, story = fuse.fit(classifier.head, *sets, objective, args.seed)
        return f"the head starts as a fusion of frozen views: log loss on val_select {min(s[1] for s in story):.4f}"
    labels = [np.repeat(y, x.shape[1]) for x, y in zip(found, labels)]
    found = [x.reshape(-1, x.shape[-1]) for x in found]
    X, labels, train = np.concatenate(found), np.concatenate(labels), np.arange(sum(map(len, found))) < len(found[0])
    if not np.isfinite(X).all():
        raise ValueError(f"features of {(~np.isfinite(X)).any(1).sum()} views are NaN or infinite; broken weights?")
    last = classifier.head.last_layer
    probe = fits.linear_probe(X, labels, train, ~train, last.out_features)
    for p, value in ((last.weight, probe.weight), (last.bias, probe.bias)):
        value = torch.from_numpy(value).to(p)
        if world > 1:
            dist.broadcast(value, 0)
        with torch.no_grad():
            p.copy_(value)
    return f"the head starts as a linear probe: C {probe.C:.3g}, log loss on val_select {min(probe.losses):.4f}"


def log_line(log, pace, update, now, args, images, device, world):
    """Everything known about the last interval; the only place that reads losses from the device."""
    means = torch.stack(list(update.terms.values()))
    if world > 1:
        dist.all_reduce(means)
    done, seen = log.done, log.done * args.batch_size
    seconds, updates = time.perf_counter() - pace.since, done - pace.done
    line = {
        "images": seen,
        "epoch": seen / images,
        **dict(zip(update.terms, (means / world).tolist())),
        **now._asdict(),
    }
    line |= {f"grad_norm_{name}": float(norm) for name, norm in update.norms.items()}
    line |= dict(images_s=updates * args.batch_size / seconds, data_wait=pace.waited / seconds)
    line |= dict(memory_gb=loop.memory_gb(device), seconds_to_go=(args.steps - done) * seconds / updates)
    log.numbers(done, line)
    pace.begin(done, line["loss"])


# ----- the end of a run


def read_best(out, fields):
    """The chosen weights of a run -> (Classifier, facts), if they are what its newest checkpoint says they are."""
    best = checkpoint.load(out / "last.pth", fields)["best"]
    if best is None:
        raise ValueError(f"no look at val_select was finite: {out} has no weights to choose, nothing is exported")
    classifier, facts = read_classifier(out / "best.pth")
    if best["step"] != facts["step"]:
        raise ValueError(f"{out}/best.pth is of step {facts['step']}, the best was {best['step']}: a save has failed; "
                         "start another --out")  # fmt: skip
    return classifier, facts


def conclude(args, found, facts, labels_sha256, name):
    """Exports {split: (Source, Table, logits [N, V, C])} and writes results.json; one class everywhere is an error."""
    out, (pool, options) = Path(args.out), technique(args.pool, POOLS)
    p = {k: probabilities(logits, pool, **options) for k, (_, _, logits) in found.items()}
    said = np.unique(p["val_select"].argmax(1))
    if len(said) == 1:
        raise ValueError(f"the chosen weights call all {len(p['val_select'])} pictures of val_select "
                         f"{shown(facts['classes'][said[0]])}: nothing is exported; train longer, with another --lr, "
                         "or with --loss ce:weights=balanced")  # fmt: skip
    for split, (source, table, logits) in found.items():
        about = facts_of(facts, source, split, labels_sha256=labels_sha256)
        print(export(out / "predictions", table.ids, table.groups, table.labels, logits, about))
    select = metrics.worth(found["val_select"][1].labels, p["val_select"])
    results = {"version": 1, "verdict": f"Step {facts['step']} was chosen on {len(p['val_select'])} images of "
               "val_select: " + ", ".join(f"{key} {select[key]:.3f}" for key in ("mcc", "auc", "accuracy")) + ".",
               "select": select}  # fmt: skip
    if "val_test" in found:
        source, table, _ = found["val_test"]
        exposure = provenance.refuse_leak(facts, source, "val_test", args.allow_seen)
        by, predictions = np.zeros((1, len(table.ids)), int), {"probe": p["val_test"][None]}
        results["test"], part = protocols.judged("tuned", table, predictions, by, exposure, source, args.bootstrap,
                                                 what="trained classifier")  # fmt: skip
        results["verdict"] += f" {results['test']['title']}. {results['test']['verdict']}"
        write_text(out / "report.html", page.page(f"{out.name} on {name}", part))
    results |= {"weights": {"file": "best.pth", "step": facts["step"], "sha256": facts["sha256"]},
                "labels": {"file": name, "sha256": labels_sha256, "classes": facts["classes"]},
                "recipe": vars(args), "split_sha256": facts["split_sha256"],
                "git_commit": loop.git_commit()}  # fmt: skip
    write_json(out / "results.json", results)
    print(f"{results['verdict']}\n{out / 'results.json'}")
