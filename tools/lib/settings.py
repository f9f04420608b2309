"""What the flags of a self-supervised run come to: views, masks, adapters, optimizer, and what a person should know."""

import dataclasses
import inspect
import math

import torch

import data
from model import read_facts
from tools.lib import loop, optim
from tools.lib.cli import technique

# Sophia needs estimates of a Hessian, which ssl_update does not make. Of schedulefree the student stays what its
# gradients are taken at: the EMA teacher is the average that counts.
OPTIMIZERS = {name: made for name, made in optim.OPTIMIZERS.items() if name != "sophia"}
OWN_FLAGS = ("weight_decay",)  # what --optimizer cannot say
ADAPTERS = dict(adapter_rank=32, adapter_alpha=None, adapter_targets="qv", adapter_init="zero", unfreeze=1)


SHARES = "warmup teacher_temp_warmup gram_start gram_refresh gram_ramp freeze_last grace".split()


def check_together(args):
    """Checks between flags; the range of each alone is its argparse type."""
    for name in ("mask_ratio", "ema", "field", "global_scale", "local_scale"):
        low, high = getattr(args, name) or (0, 1)
        if low > high:
            raise ValueError(f"--{name.replace('_', '-')} {low:g} {high:g}: the smaller comes first")
    if args.koleo_group == 1 < args.micro_batch:
        raise ValueError("--koleo-group 1: a sample alone has no neighbour; use 2 or more")
    if not (args.w_dino or args.w_ibot or args.w_koleo or args.gram_weight):
        raise ValueError("--w-dino, --w-ibot, --w-koleo and --gram-weight are all 0: nothing would be learned")


def resolve(args, world):
    """Turn shares into updates and fill in what depends on the batch, once and for the whole run."""
    loop.divisor("the number of ranks", world, args.batch_size, "--batch-size")
    images = args.batch_size // world
    group = args.koleo_group or min(16, args.batch_size)
    sizes = [m for m in range(1, min(images, 64) + 1) if images % m == 0]
    fits = max([m for m in sizes if m % group == 0] or sizes)
    args.micro_batch = loop.divisor("--micro-batch", args.micro_batch or fits, images, "the images of a rank")
    args.koleo_group = loop.divisor("--koleo-group", group, args.micro_batch, "--micro-batch")
    args.grace = args.warmup if args.grace is None else args.grace
    for name in SHARES:
        value = getattr(args, name)
        setattr(args, name, int(value) if value > 1 else round(value * args.steps))
    if args.warmup > args.steps:
        raise ValueError(f"--warmup {args.warmup} is more than --steps {args.steps}: --lr would never be reached")
    args.gram_weight = 0.0 if args.gram_start >= args.steps else args.gram_weight  # never, --extend included
    check_together(args)
    fill_adapters(args)
    args.lr = peak_rate(args)
    return args


def fill_adapters(args):
    """Defaults of the flags of adapters where there are some; refuses them alone."""
    given = [name for name in ADAPTERS if getattr(args, name) is not None]
    if given and not args.adapter_norm:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to adapters: choose their --adapter-norm")
    if args.adapter_norm and not args.init:
        raise ValueError(
            f"--adapter-norm {args.adapter_norm}: adapters change weights that exist; name them with --init"
        )
    for name, value in ADAPTERS.items() if args.adapter_norm else ():
        value = args.adapter_rank if name == "adapter_alpha" else value
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))


def peak_rate(args):
    """--lr, or the lr written in --optimizer, or the optimizer's own: of adamw by the batch. Checks --optimizer."""
    try:
        name, options = technique(args.optimizer, OPTIMIZERS)
    except ValueError as error:
        raise ValueError(f"--optimizer {args.optimizer}: {error}") from None
    loop.build_optimizer(args.optimizer, [torch.nn.Parameter(torch.zeros(1))], OWN_FLAGS)  # refuses impossible numbers
    if options.get("lr", 0) < 0 or "lr" in options and args.lr is not None:
        raise ValueError(f"--optimizer {args.optimizer}: lr is at least 0, and said there or by --lr, not by both")
    if name == "muon" and args.fsdp:
        raise ValueError("--optimizer muon needs whole matrices and --fsdp shards them: leave one of the two out")
    usual = inspect.signature(OPTIMIZERS[name]).parameters["lr"].default
    usual = 5e-4 * math.sqrt(args.batch_size / 256) if name == "adamw" else usual
    return options.get("lr", usual) if args.lr is None else args.lr


def masking(args):
    return args.mask_probability, tuple(args.mask_ratio)


def make_recipes(args, encoding):
    kind = ("photo" if encoding == "photo" else "ct") if args.aug == "auto" else args.aug
    base = dataclasses.replace(data.RECIPES[kind], local_crops=args.local_crops)
    scales = {"field": args.field, "global_scale": args.global_scale, "local_scale": args.local_scale}
    base = dataclasses.replace(base, **{name: tuple(scale) for name, scale in scales.items() if scale})
    pairs = f"{args.global_size}/{args.local_size}" if args.sizes is None else args.sizes
    recipes = []
    for pair in pairs.split(","):
        try:
            size, local = map(int, pair.split("/"))
        except ValueError:
            raise ValueError(f"--sizes {args.sizes}: {pair!r} is not GLOBAL/LOCAL, as in 448/112") from None
        gram = args.gram_scale * size if args.gram_weight else 0
        recipes.append(dataclasses.replace(base, global_size=size, local_size=local, gram_size=gram))
    return recipes


def check_sizes(recipes, patch):
    """Refuse views that are no whole number of patches."""
    for size in sorted({size for r in recipes for size in (r.global_size, r.local_size)}):
        if size < patch or size % patch:
            nearest = max(1, round(size / patch)) * patch
            raise ValueError(
                f"views of {size} pixels (--global-size, --local-size, --sizes): not a multiple of the patch size "
                f"{patch}; nearest: {nearest}"
            )


def choices_in_words(args, encoding, begun):
    """Lines for people; begun: the file of --init is behind a run that goes on, and may have changed or gone."""
    rows = 2 * args.batch_size
    yield f"batch {args.batch_size} as {args.micro_batch} at a time, {args.prototypes} prototypes, lr {args.lr:.2e}"
    if args.centering == "sinkhorn" and args.prototypes > 32 * rows:
        yield (
            f"warning: Sinkhorn shares {rows} crops among {args.prototypes} prototypes, which makes targets noisy: use "
            f"--prototypes {32 * rows} or fewer, a larger batch, or --centering softmax"
        )
    facts = read_facts(args.init) if args.init and not begun else {}
    if foreign := loop.other_encoding(facts, encoding):
        yield foreign
    if args.aug != "auto" and (encoding == "photo") != (data.RECIPES[args.aug].kind == "photo"):
        yield f"note: --aug {args.aug} was made for other images than these, which are {encoding}"
    if args.no_split:
        yield "no split: this run may have seen any image, and nothing that evaluates it can claim otherwise"
