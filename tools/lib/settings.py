"""What the flags of a self-supervised run come to: its views and masks, and what a person should know of them."""

import dataclasses

import data
from model import read_facts
from tools.lib import loop


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
