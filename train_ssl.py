"""Pretrain a DINOv3 ViT on CT slices or photographs: DINO + iBOT + KoLeo, Gram anchoring, EMA teacher.

    torchrun --nproc-per-node=1 train_ssl.py --data data/processed --out runs/lidc

The same command again resumes. Everything random is a function of (seed, step), so a killed run ends with the same
weights as one that was never interrupted. Method: arXiv:2508.10104. Letters: B images of an update, b of a
micro-batch, K prototypes, M masked patches, N patches, D features.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

import checkpoint
import data
import losses
from model import (
    ADAPTER_NORMS,
    ARCHS,
    ProjectionHead,
    SSLModel,
    add_adapters,
    build_arch,
    build_vit,
    draw_keep,
    draw_rope,
    load_backbone,
    merge_adapters,
    say_trained,
)
from tools.lib import broken, loop, optim, provenance, recorded, replay, settings
from tools.lib.cli import Parser, above_zero, natural, not_negative, positive, run, share, within
from tools.lib.files import write_json
from tools.lib.held_out import evaluate as held_out_numbers

# ------------------------------------------------------------------ flags

# May change between a run and its continuation; any other difference is refused.
HARMLESS = (
    "data out resume workers log_every save_every keep_last keep_every eval_every time_limit extend skip_bad grace "
    "device micro_batch compile fsdp checkpointing deterministic allow_duplicates"
).split()


# fmt: off
def build_parser():
    p = Parser(__doc__)
    switch = argparse.BooleanOptionalAction
    g = p.add_argument_group("run")
    g.add_argument("--data", required=True, help="processed CT folder, or any folder of PNG/JPEG")
    g.add_argument("--out", default="runs/ssl", help="the run's folder; the same command resumes what is there")
    g.add_argument("--resume", choices=["auto", "never"], default="auto", help="never: refuse one with checkpoints")
    g.add_argument("--steps", type=positive, default=100_000, help="updates; all schedules end there")
    g.add_argument("--extend", type=natural, default=0, help="further updates at the final values of all schedules")
    g.add_argument("--seed", type=natural, default=0, help="of weights, order, crops, masks and stochastic depth")
    g.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    g.add_argument("--precision", choices=["auto", *loop.PRECISIONS], default="auto", help="auto: bf16 on a GPU; "
                   "bf16-stream: tokens between blocks too")
    g.add_argument("--workers", type=natural, default=min(8, max(1, (os.cpu_count() or 2) - 1)),
                   help="reading processes of each rank; 0: read in this process")
    g.add_argument("--log-every", type=positive, default=50, help="updates")
    g.add_argument("--save-every", type=positive, default=500, help="updates")
    g.add_argument("--keep-last", type=positive, default=3, help="checkpoints, besides those of --keep-every")
    g.add_argument("--keep-every", type=natural, default=0, help="updates; checkpoints at multiples stay; 0: none")
    g.add_argument("--eval-every", type=natural, default=1000, help="updates between looks at val_select; 0: never")
    g.add_argument("--time-limit", type=not_negative, default=0, help="minutes until the run saves and exits; 0: none")
    g.add_argument("--grace", type=not_negative, help="updates or share before the first warnings; default: --warmup")
    g.add_argument("--skip-bad", type=natural, default=0, help="broken files a rank may replace; one more ends the run")
    g.add_argument("--deterministic", default=False, action=switch, help="bit-identical on a GPU too; slower")
    g.add_argument("--compile", default=False, action=switch, help="torch.compile blocks and losses; update 1 takes "
                   "minutes, once: kept in $TORCHINDUCTOR_CACHE_DIR, by default ~/.cache/torchinductor. On one NVIDIA "
                   "card with --micro-batch equal to --batch-size the update is one CUDA graph too")
    g.add_argument("--fsdp", default=False, action=switch, help="shard weights over ranks, for what does not fit one")
    g.add_argument("--checkpointing", default=False, action=switch, help="recompute activations to save memory")

    g.add_argument("--why", type=positive, help="no training: replay this update of the run in --out, which is only "
                   "read, and print what it was made of; for tools/inspect_step.py --why")

    g = p.add_argument_group("data")
    g.add_argument("--no-split", action="store_true", help="train on everything, without a contract; recorded")
    g.add_argument("--allow-duplicates", action="store_true", help="train though duplicates.json names pictures that "
                   "lie in several splits; recorded")
    g.add_argument("--weights", help="table path,weight: photographs are drawn as often as they weigh")
    g.add_argument("--limit", type=positive, default=None, help="images to train on, a fixed random subset")
    g.add_argument("--overfit", action="store_true", help="repeat the first epoch, crops and masks too: can it learn?")
    g.add_argument("--z-stride", type=positive, default=1, help="every n-th slice; neighbours as in the full volume")
    g.add_argument("--neighbour-mm", type=not_negative, default=0, help="of hu16: the slices nearest to so many mm "
                   "above and below make the outer channels; 0: the next ones, however thick")
    g.add_argument("--aug", choices=["auto", *data.RECIPES], default="auto", help="views; auto: by encoding")
    g.add_argument("--global-size", type=positive, default=224, help="pixels")
    g.add_argument("--local-size", type=positive, default=96, help="pixels")
    g.add_argument("--local-crops", type=positive, default=8, help="per image")
    g.add_argument("--sizes", default=None, help="mixed sizes instead, one pair per update: 448/112,512/112")
    g.add_argument("--field", type=within("(0, 1]"), nargs=2, default=None, help="share of the body that "
                   "all views of an image are cut from; default: by --aug")
    g.add_argument("--global-scale", type=within("(0, 1]"), nargs=2, help="share of the field; default: by --aug")
    g.add_argument("--local-scale", type=within("(0, 1]"), nargs=2, help="share of the field; default: by --aug")
    g.add_argument("--mask-probability", type=share, default=0.5, help="share of global crops with iBOT masks")
    g.add_argument("--mask-ratio", type=share, nargs=2, default=(0.1, 0.5), help="share of patches hidden in those")

    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=list(ARCHS), default="vit_small", help="backbone")
    g.add_argument("--init", default=None, help="backbone weights to start from: what model.load_backbone reads")
    g.add_argument("--adapter-norm", choices=ADAPTER_NORMS, help="ExPLoRA (arXiv:2406.10973): of the weights of --init "
                   "train low-rank changes and --unfreeze; Gram anchors to those weights")
    g.add_argument("--adapter-rank", type=positive, help="default: 32")
    g.add_argument("--adapter-alpha", type=above_zero, help="changes count alpha / rank; default: the rank")
    g.add_argument("--adapter-targets", help="qv, qkv, all, or some of q k v proj mlp in one text; default: qv")
    g.add_argument("--adapter-init", choices=["zero", "pissa"], help="of the changes; default: zero")
    g.add_argument("--unfreeze", type=natural, help="last blocks trained whole, all norms with them; default: 1")
    g.add_argument("--prototypes", type=within("[2, 1e9]", int), default=8192,
                   help="of each head; more than 32 for each global crop of a batch make targets noisy")
    g.add_argument("--head-hidden", type=positive, default=2048, help="width of the heads")
    g.add_argument("--head-bottleneck", type=positive, default=256, help="dimension of the sphere before prototypes")
    g.add_argument("--prototype-norm", type=above_zero, default=1.0, help="length of prototypes at the start: 1 in "
                   "DINOv2, 0.02 * sqrt(bottleneck) in DINOv3")
    g.add_argument("--drop-path", type=within("[0, 1)"), default=0.0, help="share of images that skip a branch")
    g.add_argument("--layerscale", type=not_negative, default=1e-5, help="initial LayerScale")
    g.add_argument("--rope-rescale", type=within("[1, inf)"), default=2.0, help="largest zoom of positions; 1: none")

    g = p.add_argument_group("loss (updates or share: from 0 to 1 a share of --steps, above 1 updates)")
    g.add_argument("--w-dino", type=not_negative, default=1.0, help="weight of the cls cross entropy")
    g.add_argument("--w-ibot", type=not_negative, default=1.0, help="weight of the masked patch cross entropy")
    g.add_argument("--w-koleo", type=not_negative, default=0.1, help="weight of KoLeo for each of the two global crops")
    g.add_argument("--koleo-group", type=positive, help="samples to spread apart; default: 16")
    g.add_argument("--centering", choices=["sinkhorn", "softmax", "none"], default="sinkhorn", help="of targets")
    g.add_argument("--student-temp", type=above_zero, default=0.1, help="temperature")
    g.add_argument("--teacher-temp", type=above_zero, nargs=2, default=(0.04, 0.07), help="first and final temperature")
    g.add_argument("--teacher-temp-warmup", type=not_negative, default=0.1, help="updates or share")
    g.add_argument("--gram-start", type=not_negative, default=0.5, help="update or share; 1: never")
    g.add_argument("--gram-refresh", type=not_negative, default=0.1, help="updates or share between snapshots")
    g.add_argument("--gram-max-refreshes", type=natural, default=3, help="snapshots after the first")
    g.add_argument("--gram-scale", type=within("[1, 8]", int), default=2, help="Gram crops are so much larger")
    g.add_argument("--gram-weight", type=not_negative, default=2.0, help="final weight; 0: no Gram anchoring")
    g.add_argument("--gram-ramp", type=not_negative, default=0.01, help="updates or share until that weight")
    g.add_argument("--gram-teacher", default=None, help="weights of a fixed Gram teacher, used from --gram-start on")

    g = p.add_argument_group("optimizer (updates or share: as above)")
    g.add_argument("--batch-size", type=positive, default=128, help="images per update, over all ranks")
    g.add_argument("--micro-batch", type=positive, default=None, help="images that fit a device; default: up to 64")
    g.add_argument("--optimizer", default="adamw", help="adamw, ademamix, schedulefree or muon, with numbers as in "
                   "muon:momentum=0.9 or adamw:betas=[0.9,0.95]")
    g.add_argument("--lr", type=not_negative, default=None, help="peak, as used; default: of adamw 5e-4 * "
                   "sqrt(batch / 256), of others their own")
    g.add_argument("--lr-end", type=not_negative, default=1e-6, help="final")
    g.add_argument("--schedule", choices=["cosine", "constant", "decay"], default="cosine",
                   help="of the learning rate; decay: constant, then a cosine over the last fifth")
    g.add_argument("--warmup", type=not_negative, default=0.1, help="updates or share")
    g.add_argument("--weight-decay", type=not_negative, nargs=2, default=(0.04, 0.2), help="first and final")
    g.add_argument("--layer-decay", type=within("(0, 1]"), default=0.9, help="rate factor per block, from the last")
    g.add_argument("--patch-lr", type=not_negative, default=0.2, help="further factor of the patch embedding")
    g.add_argument("--freeze-last", type=not_negative, default=0.01, help="updates or share with fixed prototypes")
    g.add_argument("--clip", type=above_zero, default=3.0, help="largest gradient norm of backbone and of each head")
    g.add_argument("--ema", type=share, nargs=2, default=(0.992, 1.0), help="first and final momentum of the teacher")
    return p
# fmt: on


# ------------------------------------------------------------------ schedules


class Now(NamedTuple):
    """Values of all schedules for one update."""

    lr: float
    last_lr: float  # of the prototypes
    weight_decay: float
    ema: float
    teacher_temp: float
    gram: float


def values_at(step, args):
    steps, rest = args.steps, args.steps - args.warmup
    tail = {"cosine": rest, "constant": 0, "decay": rest // 5}[args.schedule]
    lr_end = args.lr if args.schedule == "constant" else args.lr_end
    lr = loop.schedule(step, 0.0, args.lr, lr_end, args.warmup, rest - tail, tail)
    return Now(
        lr=lr,
        last_lr=0.0 if step < args.freeze_last else lr,
        weight_decay=loop.schedule(step, 0, *args.weight_decay, cosine=steps),
        ema=loop.schedule(step, 0, *args.ema, cosine=steps),
        teacher_temp=loop.schedule(
            step, args.teacher_temp[0], *[args.teacher_temp[1]] * 2, warmup=args.teacher_temp_warmup
        ),
        gram=loop.schedule(step, 0.0, 0.0, args.gram_weight, hold=args.gram_start, cosine=args.gram_ramp),
    )


# ------------------------------------------------------------------ the update


class Micro(NamedTuple):
    """One micro-batch on the device."""

    crops: data.Crops
    masks: torch.Tensor  # [2b, N] bool
    at: torch.Tensor  # [M] positions of masked patches in [2b * N]; from the readers, so that no device is waited for
    keep: list | None = None  # rows that pass each residual branch
    rope: list | None = None  # one RopeDraw per view group


class Weights(NamedTuple):
    """How the terms are made and added in one update."""

    teacher_temp: float
    student_temp: float = 0.1
    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    gram: float = 0.0
    koleo_group: int = 16
    centering: str = "sinkhorn"
    precision: str = "fp32"
    compiled: bool = False


class Seen(NamedTuple):
    """What one update looked at, for the log; all of this rank."""

    cls: losses.Targets  # [2b, K] of the last micro-batch
    cls_logits: torch.Tensor  # [2b, K] the student's of the same
    features: torch.Tensor  # [B, D] the teacher's cls of the first crops
    target_entropy: torch.Tensor  # of DINO + iBOT, their lower bound; what is above it is the excess

    @property
    def cls_targets(self):
        return self.cls.probabilities()


def ssl_update(student, teacher, gram, micro_batches, w, centers=None, clock=contextlib.nullcontext):
    """Losses of one update over its micro-batches, and (unless under no_grad) their gradients -> (losses, Seen).

    `student` and `teacher` are SSLModels (or their DDP/FSDP wrapping), `gram` a backbone or None. `clock` is entered
    with the name of each part; by default it does nothing.
    """
    device = micro_batches[0].masks.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=w.precision != "fp32")

    # teacher first, for all micro-batches: targets are balanced over the whole batch
    with torch.no_grad(), autocast:
        with clock("teacher"):
            seen = [teacher([m.crops.globals], at=m.at) for m in micro_batches]
        with clock("centring"):
            how = w.centering, w.teacher_temp, centers
            cls_targets = losses.centred([s.cls_logits for s in seen], *how, "cls", w.compiled)  # [2b, K] each
            patch_targets = losses.centred([s.patch_logits for s in seen], *how, "patch", w.compiled)  # [M, K] each
        features = torch.cat([s.cls[0].chunk(2)[0] for s in seen]).float()  # [B, D]
        del seen

    n, sums, entropy = len(micro_batches), {}, 0.0
    for i, m in enumerate(micro_batches):
        b = len(m.masks) // 2
        of_crop = 1 / m.masks.sum(1).clamp(min=1)  # [2b]
        mask_weights = of_crop.index_select(0, m.at // m.masks.shape[1])  # [M]
        dino = functools.partial(losses.dino_scores, cls_targets[i], w.student_temp, w.compiled)
        ibot = functools.partial(losses.ibot_scores, patch_targets[i], mask_weights, 2 * b, w.student_temp, w.compiled)
        with contextlib.ExitStack() as stack:
            if i < n - 1 and hasattr(student, "no_sync"):
                stack.enter_context(student.no_sync())  # ranks average once, with the last micro-batch
            # student: masked globals and locals in one packed pass; DINO and iBOT come out of its heads
            with autocast, clock("student"):
                views = [m.crops.globals, m.crops.locals]
                out = student(views, [m.masks, None], m.at, m.keep, m.rope, gram is not None, (dino, ibot))
            if gram is not None:
                with autocast, torch.no_grad(), clock("gram"):
                    gram_tokens = gram(m.crops.globals if m.crops.gram is None else m.crops.gram).patches
            with clock("losses"):
                dino, ibot = out.cls_logits, out.patch_logits
                koleo = sum(losses.koleo_loss(c, w.koleo_group) for c in out.cls[0].chunk(2)) / 2
                terms = {**dino.terms, **ibot.terms, "koleo": koleo}
                if gram is not None:
                    tokens = out.patches
                    grids = [[math.isqrt(t.shape[1])] * 2 for t in (tokens, gram_tokens)]
                    terms["gram"] = losses.gram_loss(tokens, gram_tokens, grids=grids)
                # the sum; DINO counts each pair of crops alike, KoLeo counts twice  <- change the objective here
                terms["loss"] = w.dino * terms["dino"] + w.ibot * terms["ibot"] + 2 * w.koleo * terms["koleo"]
                if gram is not None:
                    terms["loss"] = terms["loss"] + w.gram * terms["gram"]
            if torch.is_grad_enabled():
                with clock("backward"):
                    (terms["loss"] / n).backward()
        with torch.no_grad():
            for key, value in terms.items():
                sums[key] = sums.get(key, 0) + value.detach() / n
            entropy += (w.dino * dino.entropy + w.ibot * ibot.entropy) / n
    return sums, Seen(cls_targets[-1], dino.logits, features, entropy)


def to_micro(batch, device, with_gram, compiled=False):
    """A micro-batch as read -> rendered on the device, undistorted and undropped (see with_draws)."""
    plan = batch.plan if with_gram else batch.plan._replace(recipe=dataclasses.replace(batch.plan.recipe, gram_size=0))
    images, masks, at = (loop.sent(t, device) for t in (batch.images, batch.masks, batch.at))
    return Micro(data.render(images, plan, compiled), masks, at)


def with_draws(micro, args, depth, step, number):
    """The micro-batch with training's draws: RoPE of the update, drop path of micro-batch `number` (over all ranks)."""
    device, draw = micro.masks.device, loop.generator(args.seed, data.STREAMS["rope"], step)
    rope = [draw_rope(draw, args.rope_rescale, device=device) for _ in range(2)] if args.rope_rescale > 1 else None
    rows = [len(micro.crops.globals), len(micro.crops.locals)]
    keep = draw_keep(
        loop.generator(args.seed, data.STREAMS["depth"], step, number), depth, rows, args.drop_path, device
    )
    return micro._replace(keep=keep, rope=rope)


@dataclasses.dataclass
class Run:
    """One run on this rank: its settings, and the state that an update moves and a checkpoint holds."""

    args: Any
    rank: int
    world: int
    device: torch.device
    source: data.Source
    recipes: list
    student: SSLModel
    teacher: SSLModel
    net: Any  # the student as it is called: itself, or wrapped for several ranks
    optimizer: torch.optim.Optimizer
    gram_net: Any = None  # the backbone that Gram anchoring may use
    gram: Any = None  # the same once it is in use
    update: Any = ssl_update  # or the same, recorded once and replayed
    centers: dict = dataclasses.field(default_factory=dict)  # of the targets, where they are centred by softmax
    trained: dict = dataclasses.field(default_factory=dict)  # trained_groups and provenance, for the checkpoint


class Update(NamedTuple):
    """What one_update says of itself."""

    terms: dict
    seen: Seen
    norms: dict  # of gradients before clipping
    bad: bool  # loss or gradient not finite, nothing was moved
    halt: bool  # a rank wants to stop
    crops: data.Crops  # of the first micro-batch


def weights_of(now, args):
    return Weights(now.teacher_temp, args.student_temp, args.w_dino, args.w_ibot, args.w_koleo, now.gram,
                   args.koleo_group, args.centering, args.precision, args.compile)  # fmt: skip


def prepared(run, read):
    """Micro-batches of one update as read -> rendered on the device, with training's draws; ranks number them on."""
    step, depth = read[0].step, run.student.backbone.depth
    with_gram = gram_snapshots(step, run.args) > 0
    return [
        with_draws(to_micro(batch, run.device, with_gram, run.args.compile), run.args, depth, step, number)
        for number, batch in enumerate(read, run.rank * len(read))
    ]


def one_update(run, micro_batches, now, wish=lambda: False, ahead=lambda: None, clock=contextlib.nullcontext):
    """Prepared micro-batches and the schedules' values -> Update; moves student, teacher, optimizer and centers.

    wish(): does this rank want to stop after it? All ranks learn it with the one transfer from the device.
    ahead(): called while the device is busy with this update, to prepare the next one.
    """
    args, optimizer, centers = run.args, run.optimizer, dict(run.centers)
    optimizer.zero_grad(set_to_none=True)
    terms, seen = run.update(run.net, run.teacher, run.gram, micro_batches, weights_of(now, args), centers, clock)
    with clock("clip"):
        norms = optim.clip_gradients(run.student, args.clip)
        finite = torch.stack([terms["loss"], *norms.values()]).isfinite().all()
    flags = loop.largest_over_ranks([~finite, bool(wish())], run.device)
    ahead()
    with clock("wait"):
        bad, halt = flags()
    if not bad:  # else weights, teacher, optimizer and its step counter stay as they were
        run.centers = centers
        with clock("optimizer"):
            optim.set_rates(optimizer, now)
            optimizer.step()
        with clock("ema"):
            optim.update_teacher(run.teacher, run.student, now.ema)
    return Update(terms, seen, norms, bool(bad), bool(halt), micro_batches[0].crops)


# ------------------------------------------------------------------ networks, folder, state


def build_backbone(args, arch=None):
    """On the CPU; weights depend on the seed and --init alone. arch: of a checkpoint."""
    torch.manual_seed(args.seed)
    if arch:  # weights follow from the file; that of --init may be gone by now
        backbone = build_arch(arch)
    elif args.init:
        backbone = load_backbone(args.init)
        if backbone.arch["name"] != args.arch:
            raise ValueError(f"--init {args.init} is a {backbone.arch['name']}; say --arch {backbone.arch['name']}")
        if args.adapter_norm:
            add_adapters(backbone, args.adapter_rank, args.adapter_alpha, args.adapter_norm, args.adapter_targets,
                         args.adapter_init, args.unfreeze)  # fmt: skip
    else:
        backbone = build_vit(args.arch, layerscale=args.layerscale)
    backbone.checkpointing = args.checkpointing
    return backbone


def build(args, backbone=None):
    """(student, teacher) on the CPU, equal."""
    backbone = backbone or build_backbone(args)
    heads = [ProjectionHead(backbone.dim, args.head_hidden, args.head_bottleneck, args.prototypes) for _ in range(2)]
    for head in heads:  # short ones leave targets near uniform, and small runs then stay at ln K: tools/recipes/LOG.md
        head.last_layer.weight.data = args.prototype_norm * F.normalize(head.last_layer.weight.data, dim=1)
    student = SSLModel(backbone, *heads).train()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    return student, teacher


def gram_is_given(args):
    """Whether Gram anchors to weights that never change: those of --gram-teacher, or the start of an ExPLoRA run."""
    return bool(args.gram_teacher or args.adapter_norm)


def gram_snapshots(step, args):
    """How many snapshots of the EMA teacher the Gram teacher has been by update `step`, its own included."""
    if args.gram_weight == 0 or step < args.gram_start:
        return 0
    return 1 + min((step - args.gram_start) // max(args.gram_refresh, 1), args.gram_max_refreshes)


def pack_state(run, step):
    """Everything a continuation needs; collective under --fsdp."""
    args, source = run.args, run.source
    gram_given = gram_is_given(args) and run.gram_net is not None
    return {
        "images": step * args.batch_size,
        "args": vars(args),
        "arch": run.student.backbone.arch,
        "encoding": source.encoding,
        "eval_view": data.eval_view(source.encoding, run.recipes[0].global_size, args.neighbour_mm),
        "student": checkpoint.pack_weights(run.student),
        "teacher": checkpoint.pack_weights(run.teacher),
        # weights that were given belong to the run from its first update on: their file may change or go
        "gram": checkpoint.pack_weights(run.gram_net) if run.gram is not None or gram_given else None,
        "gram_arch": run.gram_net.arch if gram_given else None,
        "gram_refreshes": max(gram_snapshots(step - 1, args) - 1, 0),
        "optimizer": checkpoint.pack_optimizer(run.optimizer, run.student),
        "centers": run.centers,
        **run.trained,
        "index_sha256": source.index_sha256,
        "split_sha256": source.split_sha256,
        "weights_sha256": source.weights_sha256,
    }


def unpack_state(run, path):
    """Put the state of a checkpoint where pack_state took it from."""
    state = checkpoint.load(path)
    checkpoint.unpack_weights(run.student, state["student"])
    checkpoint.unpack_weights(run.teacher, state["teacher"])
    checkpoint.unpack_optimizer(run.optimizer, run.student, state["optimizer"])
    run.centers = {k: v.to(run.device) for k, v in state["centers"].items()}
    if state["gram"] is not None:
        checkpoint.unpack_weights(run.gram_net, state["gram"])
        run.gram = run.gram_net if gram_snapshots(state["step"] - 1, run.args) else None


def write_config(run):
    args, source = run.args, run.source
    config = {
        "version": 1,
        "args": vars(args),
        "recipes": [dataclasses.asdict(r) for r in run.recipes],
        "masking": settings.masking(args),
        "patch_size": run.student.backbone.patch_size,
        "arch": run.student.backbone.arch,
        "encoding": source.encoding,
        "split": None if args.no_split else "train",
        "images": len(source),
        "groups": len(source.groups),
        "index_sha256": source.index_sha256,
        "split_sha256": source.split_sha256,
        **loop.circumstances(run.device, run.world),
    }
    path = Path(args.out) / "config.json"
    if path.exists():
        tqdm.write(f"{args.out}: an earlier start left no checkpoint, this one begins anew; see --save-every")
    write_json(path, config)


def log_line(run, log, update, now, pace):
    """Everything known about the last interval; the only place that reads losses from the device."""
    args, world, terms, seen, done = run.args, run.world, update.terms, update.seen, log.done
    means = torch.stack([*terms.values(), seen.target_entropy])
    if world > 1:
        dist.all_reduce(means)
    values = dict(zip([*terms, "target_entropy"], (means / world).tolist()))
    health = losses.health(seen.cls_targets, seen.cls_logits, seen.features, args.student_temp)
    values |= dict(zip(health, torch.stack(list(health.values())).tolist()))
    values["excess"] = args.w_dino * values["dino"] + args.w_ibot * values["ibot"] - values["target_entropy"]
    recipe = data.pick_recipe(run.recipes, args.seed, done - 1)
    flops = loop.flops_per_image(run.student, recipe, args, "gram" in terms)
    images = done * args.batch_size
    line = {"images": images, "epoch": images / len(run.source), **values, **now._asdict()}
    line |= {f"grad_norm_{name}": float(norm) for name, norm in update.norms.items()}
    log.numbers(done, line | pace.numbers(done, args, run.device, flops, world))
    if done > args.grace:
        for text in loop.warnings_in_words(values, pace.loss, *seen.features.shape):
            log.event(done, f"warning: {text}")
    pace.begin(done, values["loss"])


def log_evaluation(run, held_out, now, log):
    numbers = held_out_numbers(run, held_out, weights_of(now, run.args), ssl_update, to_micro)
    log.numbers(log.done, {f"val_{key}": value for key, value in numbers.items()})


def refresh_gram(run, step):
    """Anchor Gram anew where update `step` begins with a snapshot of the EMA teacher of this moment."""
    if gram_snapshots(step, run.args) > gram_snapshots(step - 1, run.args):
        if not gram_is_given(run.args):
            checkpoint.unpack_weights(run.gram_net, checkpoint.pack_weights(run.teacher.backbone, checkpoint.full))
        run.gram = run.gram_net


# ------------------------------------------------------------------ main


def main(argv=None):
    args = build_parser().parse_args(argv)
    rank, world, device = loop.setup_distributed(args.device)
    try:
        if args.why:
            return replay.replay(sys.modules[__name__], args, device)
        return train(settings.resolve(args, world), rank, world, device)
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP sits in reference cycles; alive at exit, its threads abort the process
            dist.destroy_process_group()


def open_data(args):
    """(images to train on, val_select or None): what is held out is read here for the log only."""
    if args.no_split:
        source = data.thin(data.open_source(args.data).at_distance(args.neighbour_mm), args.limit, args.z_stride)
        return data.weighed(source, args.weights) if args.weights else source, None
    everything = data.open_source(args.data).at_distance(args.neighbour_mm)
    more = dict(z_stride=args.z_stride, allow_duplicates=args.allow_duplicates)
    source = data.open_for(everything, "fit", limit=args.limit, **more)
    source = data.weighed(source, args.weights) if args.weights else source
    return source, data.open_for(everything, "select", **more) if args.eval_every else None


def start_reading(args, source, recipes, steps, patch_size, rank, world, device):
    """The micro-batches of these updates, as readers deliver them."""
    return data.make_loader(
        source, recipes, args.seed, steps, args.batch_size, args.micro_batch, rank, world, args.workers, patch_size,
        settings.masking(args), args.skip_bad, pin_memory=device.type == "cuda", fixed=args.overfit,
    )  # fmt: skip


def build_gram_net(args, backbone, arch):
    """The backbone that Gram anchoring may use, or None; arch: of a checkpoint that holds the weights of its own."""
    if not args.gram_weight:
        return None
    if arch:  # weights follow from the checkpoint; the file of --gram-teacher may be gone by now, or hold others
        net = build_vit(arch["name"], **arch["overrides"])
    else:
        net = load_backbone(args.gram_teacher) if args.gram_teacher else merge_adapters(backbone)
    return net.requires_grad_(False).eval()


def build_run(args, backbone, source, recipes, rank, world, device, gram_arch=None):
    """Networks on the device, compiled or sharded as asked, and the optimizer -> Run at step 0."""
    student, teacher = build(args, backbone)
    gram_net = build_gram_net(args, teacher.backbone, gram_arch)
    nets = [m for m in (student, teacher, gram_net) if m is not None]
    # a recording needs equal shapes in each update, so all masks of it in one call; softmax keeps centres in a dict
    fixed = world == 1 == len(recipes) and args.micro_batch == args.batch_size and args.centering != "softmax"
    fast = fixed and args.compile and device.type == "cuda" and not torch.version.hip
    net = loop.on_device(args, student, nets, world, device, whole=fast)
    groups = optim.param_groups(student, args.layer_decay, args.patch_lr)
    optimizer = loop.build_optimizer(args.optimizer, groups, settings.OWN_FLAGS)
    made = Run(args, rank, world, device, source, recipes, student, teacher, net, optimizer, gram_net)
    made.update = recorded.Recorded(ssl_update, student.parameters(), device) if fast else ssl_update
    return made


def train(args, rank, world, device):
    out, total, stop = Path(args.out), args.steps + args.extend, loop.Stop(args.time_limit)
    loop.set_precision(args, device)
    if device.type == "cuda":  # small tensors are left to this process; the cores are for readers
        torch.set_num_threads(1)
    source, held_out = open_data(args)
    recipes = settings.make_recipes(args, source.encoding)  # refuses bad sizes before anything is made
    if args.batch_size > len(source):
        raise ValueError(
            f"--batch-size {args.batch_size} is more than the {len(source)} images to train on, so an update would see "
            f"copies; use --batch-size {len(source)} or less, or more images"
        )

    # ------------------------------------------------------------------ run folder, what to resume
    locked, path, facts, changed = loop.open_run(args, source, HARMLESS, rank, world)
    start = facts.get("step", 0)
    if start >= total:
        if rank == 0:
            print(f"{out} is finished: {start} updates done; --extend N goes on")
        return 0
    if path:
        trained = {key: facts[key] for key in ("trained_groups", "provenance") if key in facts}
        if held_out:  # it may have begun with --eval-every 0, and so without val_select
            provenance.refuse_leak(facts, held_out, f"val_select (the weights are {path})")
    else:
        trained = provenance.trained_on((args.init, args.gram_teacher), source, held_out)

    # ------------------------------------------------------------------ readers, model
    backbone = build_backbone(args, facts.get("arch"))  # <- change the backbone there
    settings.check_sizes(recipes, backbone.patch_size)
    micros = args.batch_size // (world * args.micro_batch)
    # forks now: later, readers would keep a copy of all weights (1.5 s of ViT-S's start)
    batches = start_reading(args, source, recipes, range(start, total), backbone.patch_size, rank, world, device)
    run = build_run(args, backbone, source, recipes, rank, world, device, facts.get("gram_arch"))
    run.trained = trained
    if path:
        unpack_state(run, path)
    elif rank == 0:
        write_config(run)
    log = loop.Log(out, start, total, quiet=rank > 0)
    log.event(
        start, f"resumed from {path.name}" if path else "started", changed=changed, git=loop.git_commit(), world=world
    )
    for text in settings.choices_in_words(args, source.encoding, begun=start > 0) if rank == 0 else ():
        tqdm.write(text)
    if args.adapter_norm and rank == 0:
        tqdm.write(f"backbone: {say_trained(run.student.backbone)}")
    saver = checkpoint.Saver(out, args.keep_last, args.keep_every)
    sources = [s for s in (source, held_out) if s] if rank == 0 else []
    with stop, broken.named(*sources):
        try:
            code = run_updates(run, batches, micros, held_out, (start, total), (log, saver, stop))
        finally:
            saver.wait()
            loop.report_saves(log, saver, log.done, going_on=False)
            log.close()
            if locked:
                locked.close()
    return code or int(saver.error is not None)  # a run whose end is not on disk has failed


# ------------------------------------------------------------------ training loop: one step = one update


def run_updates(run, batches, micros, held_out, steps, tools):
    """Updates from start to total, with what happens between them -> exit code."""
    (start, total), (log, saver, stop), args = steps, tools, run.args
    pace, bad_in_a_row = loop.Pace(time.perf_counter(), start), 0
    upcoming = loop.Upcoming(batches, micros, total - start, run.device, functools.partial(prepared, run))
    for step in range(start, total):
        done = log.done = step + 1
        now = values_at(step, args)
        refresh_gram(run, step)
        try:
            read, micro_batches = upcoming.take()
            for file, why in (bad for batch in read for bad in batch.bad):
                log.event(done, f"replaced broken file {file}", everywhere=True, why=why)
            update = one_update(run, micro_batches, now, stop.why, upcoming.ahead)
        except (RuntimeError, MemoryError) as error:
            if not loop.is_out_of_memory(error):
                raise
            if run.rank == 0 and step > start and not args.fsdp:
                saver.save(step, pack_state(run, step))
            raise loop.out_of_memory(args, run.world, run.optimizer, done) from None
        pace.waited += upcoming.waited()
        log.tick(update.crops if done == start + 1 else None)
        bad_in_a_row = bad_in_a_row + 1 if update.bad else 0
        if update.bad:
            log.event(done, f"skipped: loss or gradient is not finite; see tools/inspect_step.py --why {done}")
        elif done % args.log_every == 0 or done == total:
            log_line(run, log, update, now, pace)
        if bad_in_a_row == 3:
            log.event(done, "stopped: three updates in a row were not finite; start another --out with a lower "
                      "--lr or --clip (--init keeps this backbone)")  # fmt: skip
            return 3
        looking = held_out and (done % args.eval_every == 0 or done == total)
        if looking and not update.halt:  # before the save: a kill between the two must not lose the look
            log_evaluation(run, held_out, now, log)
        if done % args.save_every == 0 or done == total or update.halt:
            state = pack_state(run, done)
            if run.rank == 0:
                saver.save(done, state)
        if update.halt:
            saver.wait()
            if looking:
                log_evaluation(run, held_out, now, log)
            saved = f"saved at step {done}" if not saver.error else f"NOT saved: {saver.error}"
            log.event(done, f"interrupted, {saved}", why=stop.why() or "another rank")
            return 0
        loop.report_saves(log, saver, done, going_on=done < total)
    return 0


if __name__ == "__main__":
    run(main)
