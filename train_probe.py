"""Labels and a backbone, frozen or trained (--tune) -> predictions and honest numbers: does it know more than a ruler?

    python train_probe.py --ckpt runs/lidc/last.pth --data data/processed --labels _labels/malignancy.csv \
        --out runs/lidc/probe
    python train_probe.py --ckpt runs/ssl/last.pth --data data/street --labels labels.csv --tune all --out runs/street

Nodule tables (tools/lidc_nodules.py) are cropped in millimetres around each nodule; any other table path,label[,group]
is judged on whole images. Frozen: fit on train, scored once on val_test; then 5 x 5 cross-validation over patients that
the backbone has not seen. Always beside the probe: nodule size, raw pixels, random weights, size + features.
Trained: train fits, val_select chooses, val_calib is exported for tools/fit_policy.py; the same command again resumes.
Letters: n samples, B images of an update, b of a micro-batch, D features, K classes.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import data
import losses
from model import Classifier, Head, build_arch, load_backbone, read_facts, say_trained
from tools.lib import augment, baseline, broken, cli, features, fuse, judge, loop, optim, page, protocols, supervise
from tools.lib.classifiers import logits_of
from tools.lib.cli import Parser, above_zero, natural, not_negative, positive, run, share, shown, within
from tools.lib.files import csv_text, json_text, write_json
from tools.lib.fusion import POOLS, Fused
from tools.lib.provenance import refuse_change, refuse_leak, stamp, trained_on
from tools.lib.samples import leave_out, open_samples, read_table

# ----- splits


def split_of(source, table, protocol):
    """Split of each sample by splits.json (checked against the index); cross-validation alone can do without: ""."""
    if protocol == "cv" and not data.split_path(source.root).exists():
        return np.full(len(table.ids), "")
    splits = data.split_names(source)[table.rows]
    for group in np.unique(table.groups):
        if len(set(splits[table.groups == group])) > 1:
            raise ValueError(f"group {shown(group)} lies in several splits; run tools/make_splits.py --labels")
    return splits


# ----- training: the update


class Micro(NamedTuple):
    """One micro-batch on the device."""

    views: torch.Tensor  # [b, 3, size, size], with --fusion [b, V, 3, size, size]
    targets: torch.Tensor  # [b, K] rows of probabilities
    keep: torch.Tensor | None  # [b, D] features that pass the head's dropout
    u: torch.Tensor  # [b] in 0..1, to draw a label with


class Weights(NamedTuple):
    """How the loss is made."""

    objective: Any  # function(logits, targets, progress)
    precision: str = "fp32"
    progress: float = 0.0  # of the run, for objectives that change with it


class Seen(NamedTuple):
    """What one update looked at; all of this rank."""

    logits: torch.Tensor  # [B, K]
    targets: torch.Tensor  # [B, K]


def supervised_update(model, micro_batches, w):
    """Terms of one update over its micro-batches, and (unless under no_grad) their gradients -> (terms, Seen).

    `model` is a Classifier (or its DDP wrapping). Losses are means over images, so micro-batches add up to the batch.
    """
    autocast = torch.autocast(micro_batches[0].views.device.type, torch.bfloat16, enabled=w.precision == "bf16")
    n, sums, seen = len(micro_batches), {}, []
    for i, m in enumerate(micro_batches):
        with contextlib.ExitStack() as stack:
            if i < n - 1 and hasattr(model, "no_sync"):
                stack.enter_context(model.no_sync())  # ranks average once, with the last micro-batch
            with autocast:
                said = model(m.views, m.keep)
                logits = (said.logits if isinstance(said, Fused) else said).float()  # [b, K]
            terms = {"loss": w.objective(logits, m.targets, w.progress)}  # <- change the objective here
            if torch.is_grad_enabled():
                (terms["loss"] / n).backward()
        terms["accuracy"] = (logits.argmax(-1) == m.targets.argmax(-1)).float().mean()
        for key, value in terms.items():
            sums[key] = sums.get(key, 0) + value.detach() / n
        seen.append(logits.detach())
    return sums, Seen(torch.cat(seen), torch.cat([m.targets for m in micro_batches]))


class Now(NamedTuple):
    """Values of all schedules for one update."""

    lr: float
    last_lr: float  # of the head
    weight_decay: float
    ema: float


def values_at(step, args):
    warmup = round(args.warmup * args.steps)
    factor = loop.schedule(step, 0.0, 1.0, 0.0, warmup, 0, args.steps - warmup)
    # the first updates would leave the average near where it began: 0.1 of it after 8 updates, not after 2,300
    return Now(args.lr[0] * factor, args.lr[1] * factor, args.weight_decay, min(args.ema, (1 + step) / (10 + step)))


class Update(NamedTuple):
    """What one_update says of itself."""

    terms: dict
    norms: dict  # of gradients before clipping
    bad: bool  # loss or gradient not finite, nothing was moved
    halt: bool  # a rank wants to stop


def gradients(run, micro_batches, limit, wish=False, ahead=lambda: None):
    """The update's terms, clipped gradients in place -> (terms, Seen, norms, bad, halt); ranks agree."""
    run.optimizer.zero_grad(set_to_none=True)
    terms, seen = supervised_update(run.net, micro_batches, run.weights)
    norms = optim.clip_gradients(run.student, limit)
    finite = torch.stack([terms["loss"], *norms.values()]).isfinite().all()
    flags = loop.largest_over_ranks([~finite, wish], run.device)
    ahead()
    bad, halt = flags()
    return terms, seen, norms, bool(bad), bool(halt)


def observe(run, micro_batches, seen):
    """Sophia's look at the curvature: squared gradients for labels drawn from what the model says; .grad stays."""
    trained = [p for p in run.student.parameters() if p.grad is not None]
    kept, sizes = [p.grad for p in trained], [len(m.views) for m in micro_batches]
    u = torch.cat([m.u for m in micro_batches])[:, None]
    labels = (seen.logits.softmax(-1).cumsum(-1) < u).sum(-1).clamp(max=seen.logits.shape[1] - 1)
    targets = losses.target_rows(labels, seen.logits.shape[1]).split(sizes)
    run.optimizer.zero_grad(set_to_none=True)
    drawn = [m._replace(targets=t) for m, t in zip(micro_batches, targets)]
    supervised_update(run.net, drawn, Weights(lambda z, t, _: losses.soft_cross_entropy(z, t), run.args.precision))
    estimates = optim.gauss_newton(trained, run.args.batch_size)
    if torch.stack([e.isfinite().all() for e in estimates.values()]).all():
        run.optimizer.observe(estimates)
    for p, grad in zip(trained, kept):
        p.grad = grad


def one_update(run, micro_batches, step, now, wish=lambda: False, ahead=lambda: None):
    """Prepared micro-batches and the schedules' values -> Update; moves student, teacher and optimizer.

    wish(): does this rank want to stop after it? ahead(): called while the device is busy, to prepare the next one.
    """
    optimizer, uphill = run.optimizer, hasattr(run.optimizer, "climb")
    run.weights = run.weights._replace(progress=step / run.args.steps)
    limit = math.inf if uphill else run.args.clip
    terms, seen, norms, bad, halt = gradients(run, micro_batches, limit, bool(wish()), ahead)
    if not bad and hasattr(optimizer, "observe") and step % 10 == 0:
        observe(run, micro_batches, seen)
    if not bad and uphill:  # SAM: the gradient of a point uphill, of the same pictures
        optimizer.climb()
        _, _, _, bad, _ = gradients(run, micro_batches, run.args.clip)
        optimizer.descend()
    if not bad:  # else weights, teacher, optimizer and its step counter stay as they were
        optim.set_rates(optimizer, now)
        optimizer.step()
        optim.update_teacher(run.teacher, run.student, now.ema)
    return Update(terms, norms, bad, halt)


# ----- training: the run

# May change between a run and its continuation; any other difference is refused.
HARMLESS = (
    "data labels out protocol workers device micro_batch save_every time_limit patience skip_bad allow_seen "
    "allow_duplicates deterministic dry_run crop_mm scales seeds bootstrap cache folds"
).split()
RUN_FACTS = """encoding eval_view classes pool layers layout labels_sha256 index_sha256 split_sha256 weights_sha256
trained_groups provenance""".split()
FIELDS = "step args arch student teacher optimizer classes best looked index_sha256 split_sha256 labels_sha256".split()


@dataclasses.dataclass
class Run:
    """One training run on this rank: its settings, and the state that an update moves and a checkpoint holds."""

    args: Any
    rank: int
    world: int
    device: torch.device
    train: tuple  # (Source, Table), a row of the one for each sample of the other
    select: tuple  # the same of val_select
    student: Classifier
    teacher: Classifier
    net: Any  # the student as it is called: itself, or wrapped for several ranks
    optimizer: Any
    weights: Weights
    facts: dict  # for the checkpoint: classes, pool, layers, layout, eval_view, hashes, what was trained on
    best: dict | None = None  # {step, value}: of val_select's MCC, the first where several are equal
    looked: int = -1  # the step of the last look at val_select


def part_of(source, table, splits, name, args, used_by=None):
    """The labelled images of one split -> (Source with one row for each sample, Table); one class is an error."""
    part = splits == name
    protocols.refuse_absent(table, splits, name)
    chosen, part = open_samples(source, table.take(part), splits[part], used_by, args.allow_duplicates)
    return chosen.take(part.rows), part._replace(rows=np.arange(len(part.rows)))


def build_classifier(args, vit, classes):
    """On the CPU, of a backbone that may have its adapters already; random numbers depend on the seed alone."""
    torch.manual_seed(args.seed)
    options = supervise.read_adapter(args.adapter)
    supervise.choose_trained(vit, *supervise.tune_kind(args.tune), options)
    _, dropout = supervise.read_head(args.head)
    pool = {"all": "both"}.get(args.features, args.features)
    head = Head(vit.dim * args.layers * (2 if pool == "both" else 1), classes, dropout)
    return supervise.joined(Classifier(vit, head, pool, args.layers), args.fusion)


def build_run(args, rank, world, device, train, select, vit, facts):
    classes = len(train[1].classes)
    student = build_classifier(args, vit, classes).to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    net = loop.wrapped(student, world, device)
    optimizer = loop.build_optimizer(args.optimizer, optim.param_groups(student, args.layer_decay, 1.0))
    weights = Weights(supervise.read_loss(args.loss, train[1].labels, classes), args.precision)
    return Run(args, rank, world, device, train, select, student, teacher, net, optimizer, weights, facts)


def pack_state(run, step):
    """Everything a continuation needs, and all that a classifier says of itself."""
    return {
        "images": step * run.args.batch_size,
        "args": vars(run.args),
        "arch": run.student.backbone.arch,
        "student": checkpoint.pack_weights(run.student),
        "teacher": checkpoint.pack_weights(run.teacher),
        "optimizer": checkpoint.pack_optimizer(run.optimizer, run.student),
        "best": run.best,
        "looked": run.looked,
        **run.facts,
    }


def unpack_state(run, path):
    state = checkpoint.load(path, FIELDS)
    checkpoint.unpack_weights(run.student, state["student"])
    checkpoint.unpack_weights(run.teacher, state["teacher"])
    checkpoint.unpack_optimizer(run.optimizer, run.student, state["optimizer"])
    run.best, run.looked = state["best"], state["looked"]


def look(run, log, done):
    """Score the averaged weights on val_select -> whether they are the best so far."""
    args, run.looked = run.args, done
    found = supervise.look(run.teacher, run.select, args, run.facts["eval_view"], run.device, run.rank, run.world)
    if found is None:
        log.event(done, "warning: logits of val_select are not finite, so this look counts for nothing")
        return False
    log.numbers(done, {f"val_{key}": value for key, value in found.items()})
    if found["classes_said"] == 1:
        log.event(done, "warning: all predictions of val_select are one class")
    better = run.best is None or found["mcc"] > run.best["value"]
    if better:
        run.best = {"step": done, "value": found["mcc"]}
    return better


def patience_is_over(best, done, args):
    return bool(args.patience and best and done - best["step"] >= args.patience * args.eval_every)


def make_ready(run, reads):
    """Micro-batches as read -> the same on the device, with all that is drawn for them."""
    args, (_, table), out = run.args, run.train, []
    (_, rate), head = supervise.read_head(args.head), run.student.head
    for read in reads:
        times = read.own // args.micro_batch
        ids = read.ids[: read.own : times]
        views, targets = augment.render(read, table.labels, len(table.classes), run.facts["eval_view"], run.device)
        views, targets = views.unflatten(0, (-1, times)), targets[::times]
        keep = supervise.passing(args.seed, read.step, ids, rate and head.last_layer.in_features, rate, run.device)
        u = data.send(torch.from_numpy(supervise.uniform(args.seed, read.step, ids)), run.device)
        out.append(Micro(views if args.fusion else views[:, 0], targets, keep, u))
    return out


def run_updates(run, batches, start, log, saver, stop):
    """Updates from start on, with what happens between them -> exit code, or None: all is done."""
    args, total = run.args, run.args.steps
    pace, bad_in_a_row = loop.Pace(time.perf_counter(), start), 0
    micros = args.batch_size // (run.world * args.micro_batch)
    upcoming = loop.Upcoming(batches, micros, total - start, run.device, functools.partial(make_ready, run))

    def save(done, best=False):
        state = pack_state(run, done)
        if run.rank == 0:
            saver.save(done, state, best)

    def owed(done):
        return run.looked < done and (done % args.eval_every == 0 or done == total)

    if owed(start):  # before the first update, or the run was stopped before it
        save(start, look(run, log, start))
    for step in range(start, total):
        if patience_is_over(run.best, step, args):
            break
        done = log.done = step + 1
        now = values_at(step, args)
        try:
            _, micro_batches = upcoming.take()
            update = one_update(run, micro_batches, step, now, stop.why, upcoming.ahead)
        except (RuntimeError, MemoryError) as error:
            if not loop.is_out_of_memory(error):
                raise
            raise loop.out_of_memory(args, run.world, run.optimizer, done) from None
        pace.waited += upcoming.waited()
        log.tick()
        bad_in_a_row = bad_in_a_row + 1 if update.bad else 0
        if update.bad:
            log.event(done, "skipped: loss or gradient is not finite")
        elif done % supervise.LOG_EVERY == 0 or done == total:
            supervise.log_line(log, pace, update, now, args, len(run.train[0]), run.device, run.world)
        if bad_in_a_row == 3:
            log.event(done, "stopped: three updates in a row were not finite; start another --out with a lower --lr")
            return 3
        if update.halt:  # the look that may be due is made by whoever goes on
            save(done)
            saver.wait()
            saved = f"saved at step {done}" if not saver.error else f"NOT saved: {saver.error}"
            log.event(done, f"interrupted, {saved}", why=stop.why() or "another rank")
            return 0
        better = owed(done) and look(run, log, done)
        if better or done % args.save_every == 0 or done == total or patience_is_over(run.best, done, args):
            save(done, better)
        loop.report_saves(log, saver, done, going_on=done < total)
    return None


# ----- the program


# fmt: off
def build_parser():
    p = Parser(__doc__)
    g = p.add_argument_group("run")
    g.add_argument("--ckpt", required=True, type=Path, help="weights that model.load_backbone reads")
    g.add_argument("--data", required=True, type=Path, help="processed CT folder, or folder of photographs")
    g.add_argument("--labels", required=True, type=Path, help="label table; also looked for inside --data")
    g.add_argument("--out", required=True, type=Path, help="folder for results.json, predictions and report; of a "
                   "training run, which the same command resumes")
    g.add_argument("--tune", default="none", help="what is trained. none: a frozen probe; head: linear "
                   "layer; adapters: low-rank changes (--adapter); last:N: the last N blocks; all; fusion: what pools "
                   "the features of all --views of a picture, in seconds, as in fusion:keep=8,metadata=gps+weather: "
                   f"{inspect.signature(fuse.fusion)}")
    g.add_argument("--protocol", choices=("all", "test", "cv", "select", "refit"), help="test: fit on train, score "
                   "once on val_test; cv: 5 x 5 folds over unseen patients; all: both, the default of a frozen probe; "
                   "select: choose on val_select and export val_select and val_calib (of nodules val_test too), the "
                   "default of training; refit (frozen): then fit once more on train and val_select")
    g.add_argument("--allow-seen", action="store_true", help="also judge patients of the pretraining, titled so")
    g.add_argument("--allow-duplicates", action="store_true", help="also if some cross the splits, titled so")
    g.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    g.add_argument("--workers", type=natural, default=2, help="threads or processes that read and cut ahead")
    broken.add_flag(g)

    g = p.add_argument_group("views")
    g.add_argument("--size", type=natural, default=0, help="pixels per side of a view; 0: that of the checkpoint")
    g.add_argument("--views", help="layout of data.LAYOUTS that training and predictions look at, such as whole, tiles "
                   "or tiles:overlap=0.2; an update sees one view of each picture. Default of training: whole")
    g.add_argument("--batch-size", type=positive, help="images per update, over all ranks (default: 64); of a frozen "
                   "probe views per forward (default: 96; on a CPU at most 32)")
    g.add_argument("--features", choices=("cls", "mean", "box", "all"), default="all", help="cls token, mean of "
                   "patches, patches inside the nodule's box, or all side by side")
    g.add_argument("--crop-mm", type=cli.millimetres, default="32,48,64", help="sides of the crops around a nodule")
    g.add_argument("--scales", choices=("average", "concat"), default="average", help="of the crops' features")

    g = p.add_argument_group("frozen probe")
    g.add_argument("--seeds", type=positive, default=3, help="repeats of the test protocol; random backbones")
    g.add_argument("--folds", type=Path, help="published folds for --protocol cv: a CSV series,fold, or LUNA16's "
                   "folder with subset0 to subset9; patients are kept whole")
    g.add_argument("--bootstrap", type=positive, default=2000, help="resamples of patients for each interval")
    g.add_argument("--cache", type=Path, help="folder of extracted features; default: features beside --out")

    g = p.add_argument_group("training (--tune)")
    g.add_argument("--epochs", type=above_zero, default=20.0, help="passes over the training images; --steps wins")
    g.add_argument("--steps", type=positive, help="updates instead")
    g.add_argument("--micro-batch", type=positive, help="images that fit a device; default: up to 32")
    g.add_argument("--seed", type=natural, default=0, help="of adapters, order, augmentation and dropout")
    g.add_argument("--weights", help="table path,weight of tools/sample_weights.py: how often each image is drawn")
    g.add_argument("--aug", default="light", help=f"augmentation: {', '.join(augment.ROWS)}, with numbers as in "
                   "light:rotate=10")
    g.add_argument("--adapter", default="lora", help="lora (arXiv:2106.09685), rslora, dora, doran, with options as in "
                   "dora:rank=16,alpha=32,targets=qkv,init=pissa,unfreeze=1")
    g.add_argument("--fusion", help="mil or mean, with numbers as in mil:depth=1: an update sees all --views (default: "
                   "tiles) of each picture, joined by tools/lib/fusion.py; its fit on frozen features is the start")
    g.add_argument("--layers", type=positive, default=1, help="last blocks whose features the head reads")
    g.add_argument("--head", default="probe", help="where it starts, and its dropout as in probe:dropout=0.1. probe: "
                   "logistic regression on the frozen features (LP-FT, arXiv:2202.10054); random")
    g.add_argument("--loss", default="ce:smoothing=0.1", help=f"{', '.join(losses.OBJECTIVES)}, with numbers as in "
                   "focal:gamma=2 or ce:weights=balanced; smoothing 0.1: arXiv:1512.00567")
    g.add_argument("--optimizer", default="adamw", help=f"{', '.join(optim.OPTIMIZERS)}, with a wrapper as in "
                   f"sam:rho=0.05+adamw ({', '.join(optim.WRAPPERS)})")
    g.add_argument("--lr", type=not_negative, nargs=2, metavar=("BACKBONE", "HEAD"), help="peaks, not rescaled by the "
                   "batch; default: " + "; ".join(f"{k} {a:g} {b:g}" for k, (a, b, _) in supervise.RATES.items()))
    g.add_argument("--layer-decay", type=within("(0, 1]"), help="rate factor per block, from the last; default: 1 of "
                   "adapters, else 0.75 (BEiT, arXiv:2106.08254)")
    g.add_argument("--warmup", type=share, default=0.1, help="share of the updates until the peak; then a cosine to 0")
    g.add_argument("--weight-decay", type=not_negative, default=0.01, help="of matrices")
    g.add_argument("--clip", type=above_zero, default=1.0, help="largest gradient norm of backbone and of head")
    g.add_argument("--ema", type=within("[0, 1)"), default=0.999, help="momentum of the averaged weights, which are "
                   "evaluated and exported; update t uses at most (1 + t) / (10 + t)")
    g.add_argument("--eval-every", type=natural, default=0, help="updates between looks at val_select; 0: each epoch")
    g.add_argument("--pool", default="mean", help=f"views -> one prediction in those looks: {', '.join(POOLS)}, as in "
                   "topk:k=3")
    g.add_argument("--patience", type=natural, default=10, help="looks without a better MCC that end the run; 0: never")
    g.add_argument("--save-every", type=positive, default=500, help="updates; better weights are saved at once")
    g.add_argument("--time-limit", type=not_negative, default=0, help="minutes until the run saves and exits; 0: none")
    g.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU")
    g.add_argument("--deterministic", default=False, action=argparse.BooleanOptionalAction, help="bit-identical on a "
                   "GPU too; slower")
    g.add_argument("--dry-run", action="store_true", help="one batch forward and backward; nothing is written")
    return p
# fmt: on


def read_labels(args, source):
    """-> (path of the table, Table, split of each sample)"""
    path = data.find_table(args.data, Path(args.labels))
    table = leave_out(read_table(path, source), source, args.skip_bad)
    print(f"{path}: {len(table.ids)} samples of {len(set(table.groups))} {table.unit}, by class "
          f"{shown(judge.balance(table), 400)}")  # fmt: skip
    splits = split_of(source, table, args.protocol)
    if "val_calib" not in splits and (args.tune != "none" or args.protocol in ("select", "refit")):
        print("val_calib has no labelled sample: tools/fit_policy.py will have nothing to fit on")
    return path, table, splits


def main(argv=None):
    args = build_parser().parse_args(argv)
    kind, _ = supervise.tune_kind(args.tune)
    supervise.refuse_unread(build_parser(), args, kind)
    if args.out.exists() and not args.out.is_dir():  # now, not after all is computed
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if kind == "none" and args.protocol in ("select", "refit"):
        source = data.open_source(args.data)
        return baseline.choose(args, source, *read_labels(args, source))
    if kind == "none":
        return probe(args)
    rank, world, device = loop.setup_distributed(args.device)
    try:
        return train(args, rank, world, device)
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP sits in reference cycles; alive at exit, its threads abort the process
            dist.destroy_process_group()


def probe(args):
    start = time.perf_counter()
    if args.views:
        raise ValueError("--views is for training (--tune) and for --protocol select; give one of them too")
    if args.folds and args.protocol == "test":
        raise ValueError("--folds are for cross-validation; give --protocol cv, or all")
    args.protocol, args.batch_size, args.workers = args.protocol or "all", args.batch_size or 96, max(args.workers, 1)

    # ----------------------------------------------------------------- labels, splits, leaks
    before = stamp(args.ckpt)
    source, facts = data.open_source(args.data), read_facts(args.ckpt)
    if foreign := loop.other_encoding(facts, source.encoding):
        print(foreign)
    path, table, splits = read_labels(args, source)
    plans, exposures, notes = protocols.plan_all(source, table, splits, facts, args.protocol, args.seeds,
                                                   args.allow_seen, args.folds)  # fmt: skip
    split_sha = data.file_sha256(data.split_path(source.root)) if splits[0] else None
    notes += [foreign] if foreign else []
    if "split_sha256" in facts and facts["split_sha256"] != split_sha:
        notes.append(f"the weights were trained under another split, or none: {table.unit} are compared one by one")

    # ----------------------------------------------------------------- features, fits, judgement
    vit = load_backbone(args.ckpt)
    view = judge.choose_view(facts, source.encoding, args.size, vit.patch_size)
    source.at_distance(view.get("neighbour_mm"))
    if args.features == "box" and table.centres is None:
        raise ValueError("--features box needs a nodule table, which names boxes")
    framing = features.Framing(view, args.crop_mm if table.centres is not None else (), args.batch_size, args.workers)
    device = cli.pick_device(args.device)
    used = np.any([keep for keep, _ in plans.values()], 0)
    look = judge.used_by("train_probe.py", args.ckpt, path, f"frozen probe, --protocol {args.protocol}")
    refuse_change(args.ckpt, before)
    chosen, part = open_samples(source, table.take(used), splits[used], look, args.allow_duplicates)
    with broken.named(chosen.take(part.rows)):
        cache = args.cache or args.out.parent / "features"
        predictors = features.predictors(vit, look["weights_sha256"], chosen, part, framing, device, args.seeds, cache,
                                         args.features, args.scales)  # fmt: skip
    outcomes = {
        name: protocols.judge_one(
            name, (keep[used], folds), part, predictors, exposures[name], chosen, args.bootstrap, args.seeds
        )
        for name, (keep, folds) in plans.items()
    }

    # ----------------------------------------------------------------- results.json, predictions.csv, report.html
    results = {name: result for name, (result, _, _) in outcomes.items()}
    summary = {
        "version": 1,
        "verdict": " ".join(f"{result['title']}. {result['verdict']}" for result in results.values()),
        **results,
        "notes": notes,
        "weights": {"file": args.ckpt.name, "sha256": look["weights_sha256"], "arch": vit.arch}
        | {key: facts.get(key) for key in ("step", "images", "encoding", "split_sha256")},
        "split_sha256": split_sha,
        "labels": {"file": path.name, "sha256": look["labels_sha256"], "classes": table.classes},
        "index_sha256": source.index_sha256,
        "recipe": framing._asdict() | {k: getattr(args, k) for k in ("scales", "features", "seeds", "bootstrap")},
        "git_commit": loop.git_commit(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(args.out / "results.json", summary)
    scores = {name: (plans[name][0], probe, plans[name][1]) for name, (_, _, probe) in outcomes.items()}
    checkpoint.write_text(args.out / "predictions.csv", csv_text(judge.prediction_rows(table, splits, scores)))
    keys = ("weights", "labels", "split_sha256", "recipe", "notes")
    facts = [[key, json_text(summary[key])] for key in keys if summary[key]]
    parts = [*(part for _, part, _ in outcomes.values()), page.section("Facts", page.table(["what", "value"], facts))]
    checkpoint.write_text(args.out / "report.html", page.page(f"Probe of {args.ckpt.name} on {path.name}", *parts))
    print("\n".join([*notes, *(str(args.out / n) for n in ("results.json", "predictions.csv", "report.html"))]))
    return 0


# ----- training: from flags to exports


def describe(args, source, table, splits, train, path, view, pool):
    """What a checkpoint says of its run, beside weights; refuses weights that have seen what is held out."""
    held_out = source.take(table.rows[splits != "train"])
    refuse_leak(read_facts(args.ckpt), held_out, "the held-out splits", args.allow_seen)
    return {
        "encoding": source.encoding,
        "eval_view": view,
        "classes": table.classes,
        "pool": pool,
        "layers": args.layers,
        "layout": args.views,
        "labels_sha256": data.file_sha256(path),
        **{key: getattr(train, key) for key in ("index_sha256", "split_sha256", "weights_sha256")},
        **trained_on((Path(args.ckpt),), train, None),
    }


def train(args, rank, world, device):
    vars(args).update({k: str(v) for k, v in vars(args).items() if isinstance(v, Path)})
    out, stop, (kind, _) = Path(args.out), loop.Stop(args.time_limit), supervise.tune_kind(args.tune)
    loop.set_precision(args, device)

    # ----------------------------------------------------------------- labels, splits
    source = data.open_source(args.data)
    labels, table, splits = read_labels(args, source)
    if table.centres is not None:
        raise ValueError(f"{labels} names nodules: those are for the frozen probe (--tune none)")
    parts = [part_of(source, table, splits, name, args) for name in ("train", "val_select")]
    if args.weights:
        parts[0] = data.weighed(parts[0][0], args.weights), parts[0][1]
    supervise.resolve(args, len(parts[0][0]), world)

    # ----------------------------------------------------------------- run folder, what to resume
    locked, path, known, changed = None, None, {}, {}
    if not args.dry_run:
        locked, path, known, changed = loop.open_run(args, parts[0][0], HARMLESS, rank, world, FIELDS)
    if path and known["labels_sha256"] != data.file_sha256(labels):
        raise ValueError(f"{labels} is not the table of {path}; put the old one back, or use another --out")
    for one in (source, *(part for part, _ in parts)):
        one.at_distance(judge.neighbour_mm(known or read_facts(args.ckpt), source.encoding))
    start, best, code = known.get("step", 0), known.get("best"), None
    if path and best and best["step"] == start and rank == 0 and not checkpoint.same_file(path, out / "best.pth"):
        checkpoint.point_last(out, path, "best.pth")  # a kill came between the file and its second name

    # ----------------------------------------------------------------- readers, model, updates
    with stop, broken.named(*(s for s, _ in parts if rank == 0)):
        if kind == "fusion" and not path:
            vit, weights = load_backbone(Path(args.ckpt)), judge.weights_sha256(Path(args.ckpt))
            view = judge.choose_view(read_facts(args.ckpt), source.encoding, args.size, vit.patch_size)
            pool = {"all": "both"}.get(args.features, args.features)
            facts = describe(args, source, table, splits, parts[0][0], labels, view, pool)
            fuse.train(vit, weights, parts, supervise.read_loss(args.loss, parts[0][1].labels, len(table.classes)),
                       facts, args, device)  # fmt: skip
        elif kind != "fusion" and (not path or start < args.steps and not patience_is_over(best, start, args)):
            vit = build_arch(known["arch"]) if path else load_backbone(Path(args.ckpt))  # <- change the backbone there
            view = judge.choose_view(known or read_facts(args.ckpt), source.encoding, args.size, vit.patch_size)
            pictures = augment.Pictures(parts[0][0], augment.find_row(args.aug), args.views, view["size"], args.seed,
                                        range(start, args.steps), args.batch_size, args.micro_batch, rank, world,
                                        bool(args.fusion))  # fmt: skip
            batches = data.read_ahead(pictures, args.workers, device.type == "cuda")
            run = build_run(args, rank, world, device, *parts, vit, {})
            run.facts = {key: known[key] for key in RUN_FACTS} if path else describe(
                args, source, table, splits, parts[0][0], labels, view, run.student.pool)  # fmt: skip
            run.facts |= supervise.read_fusion(args.fusion)
            code = dry_run(run, batches) if args.dry_run else updates(run, batches, path, changed, start, stop)
        if code is None and rank == 0:
            code = finish(args, source, table, splits, labels, device)
    if locked:
        locked.close()
    return code or 0


def dry_run(run, batches):
    micros = run.args.batch_size // (run.world * run.args.micro_batch)
    terms, _ = supervised_update(run.net, make_ready(run, [next(batches) for _ in range(micros)]), run.weights)
    print(say_trained(run.student))
    print("dry run:", ", ".join(f"{name} {float(value):.4f}" for name, value in terms.items()), "- nothing is written")
    return 0 if torch.isfinite(terms["loss"]) else 3


def updates(run, batches, path, changed, start, stop):
    """From the first or the resumed update to the last, with log and checkpoints -> exit code, None: all is done."""
    args, out = run.args, Path(run.args.out)
    log = loop.Log(out, start, args.steps, quiet=run.rank > 0)
    said = f"resumed from {path.name}" if path else "started"
    log.event(start, said, changed=changed, git=loop.git_commit(), world=run.world)
    if path:
        unpack_state(run, path)
    else:
        if run.rank == 0:
            config = {"version": 1, "args": vars(args), "arch": run.student.backbone.arch, "images": len(run.train[0]),
                      **run.facts, **loop.circumstances(run.device, run.world)}  # fmt: skip
            write_json(out / "config.json", config)
        log.event(0, say_trained(run.student))
        if supervise.read_head(args.head)[0] == "probe":
            log.event(0, supervise.start_head(run.student, (run.train, run.select), args, run.facts["eval_view"],
                                              run.device, run.rank, run.world))  # fmt: skip
        checkpoint.unpack_weights(run.teacher, checkpoint.pack_weights(run.student))
    run.student.train()
    saver = checkpoint.Saver(out, 2, 0)  # two checkpoints, beside the best
    try:
        code = run_updates(run, batches, start, log, saver, stop)
    finally:
        saver.wait()
        loop.report_saves(log, saver, log.done, going_on=False)
        log.close()
    return code if saver.error is None else 1  # a run whose end is not on disk has failed


def finish(args, source, table, splits, labels, device):
    """What the chosen weights say of val_select, val_calib and (--protocol test) val_test -> exit code."""
    out = Path(args.out)
    classifier, facts = supervise.read_best(out, FIELDS)
    used_by = judge.used_by("train_probe.py", out / "best.pth", labels, f"supervised training, --tune {args.tune}")
    wanted, found = ["val_select", "val_calib"] + ["val_test"] * (args.protocol == "test"), {}
    for split in (name for name in wanted if name in splits or name == "val_test"):
        chosen, part = part_of(source, table, splits, split, args, used_by if split == "val_test" else None)
        logits = logits_of(classifier, chosen, np.arange(len(chosen)), facts["layout"], facts["eval_view"], device,
                           workers=args.workers or 1, name=split)  # fmt: skip
        found[split] = chosen, part, logits
    supervise.conclude(args, found, facts, used_by["labels_sha256"], Path(labels).name)
    return 0


if __name__ == "__main__":
    run(main)
