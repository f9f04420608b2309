"""Draw the exact crops and masks that one update of a run saw, as one picture: a row per image.

In: a run folder (its config.json) and the data it was trained on. Out: RUN/inspect/step_00001234.png. A row holds the
slice with the boxes of all its views, the two global crops with their iBOT masks (hatched patches are hidden from the
student), the local crops, and the crops of the Gram teacher once the run uses one. --step N is the update that made
step N out of N - 1.

    python tools/inspect_step.py --run runs/lidc --step 1234 --images 8
    python tools/inspect_step.py --run runs/lidc --why 1234

--why replays the update from the nearest checkpoint (the run is only read), says in a sentence why it spiked, was
skipped or broke, and draws the images with the largest gradients; all numbers: RUN/inspect/why_00001234.json. Exit code
1 where a cause was found.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch

from data import denormalise, eval_view, look_windows, make_loader, place, render, select, weighed
from tools.lib import autopsy, sheet
from tools.lib.cli import ROOT, Parser, natural, pick_device, positive, run, within
from tools.lib.files import write_json
from tools.lib.runs import open_trained, read_recipes, read_run_config
from tools.lib.slices import slice_name

SIDE = 448  # pixels, about, of a slice and of a global crop; crops are enlarged by whole factors only


def open_data(config, root):
    """The images of the run, opened as train_ssl.py opens them; other data than the run's is refused."""
    args = config["args"]
    if root is None and not Path(args["data"]).is_dir():
        raise FileNotFoundError(f"{args['data']} is no folder here; the run's config.json names it: give --data")
    hashes = {key: config[key] for key in ("index_sha256", "split_sha256")}
    source = open_trained(root or args["data"], args, config["split"], hashes)
    return weighed(source, args["weights"]) if args.get("weights") else source


def read_update(source, config, step, count):
    """The micro-batches of the update that made `step`, as training read them, until they hold `count` images."""
    args = config["args"]
    # the run's own micro-batch: a broken file is replaced from within it, and marked in the picture
    loader = make_loader(
        source, read_recipes(config), args["seed"], range(step - 1, step), args["batch_size"], args["micro_batch"],
        patch_size=config["patch_size"], masking=config["masking"], skip_bad=args["batch_size"], fixed=args["overfit"],
    )  # fmt: skip
    batches = []
    for batch in loader:
        batches.append(batch)
        if sum(len(b.ids) for b in batches) >= count:
            break
    return batches


def zoom_of(size):
    return max(1, round(SIDE / size))


def slice_tile(source, batch, j):
    """A slice in grey, or a photograph as read, without the padding of its batch, and the boxes of all its views."""
    image, boxes = autopsy.whole(source, batch, j), batch.plan.boxes[:, j]
    height, width = np.ceil(boxes[:, 2:].max(0)).astype(int)
    if source.encoding != "photo":
        i, (height, width) = autopsy.shown_id(source, batch, j), image.shape[1:]
        boxes = place(select(batch.plan, [j]), [(height, width)], [source.body(i)]).boxes[:, 0]
    replaced = autopsy.shown_id(source, batch, j) != batch.ids[j]
    values = image[:, :height, :width] / 255
    if image.dtype == torch.int16:
        level, span = eval_view(source.encoding)["window"]
        values = (image[1, :height, :width] - level) / span + 0.5
    elif source.encoding != "photo":
        values = values.mean(0)
    factor = SIDE / max(height, width)
    picture = sheet.fit(sheet.picture(0.8 * values.clamp(0, 1)), SIDE)  # dimmed, for the boxes
    names = ["g1", "g2", *(str(v) for v in range(1, len(boxes) - 1))]
    named = [(box * factor, colour_of(v), name, 3 - (v > 1)) for v, (box, name) in enumerate(zip(boxes, names))]
    titles = ["BROKEN FILE: the stand-in" if replaced else "with the boxes of all views"]
    if source.encoding != "photo":
        picture = sheet.scale_bar(picture, source.rows[i]["spacing_x"] / factor)
        titles.append("in the views: R, G, B = slices z-1, z, z+1")
    return sheet.titled(sheet.outline(picture, named), titles)


def describe(source, batch, v, j):
    """What was drawn for view v of image j: extent and flip, then blur and window."""
    plan = batch.plan
    height, width = plan.boxes[v, j, 2:] - plan.boxes[v, j, :2]
    unit = "px"
    if source.encoding != "photo":
        row = source.rows[autopsy.shown_id(source, batch, j)]
        height, width, unit = height * row["spacing_y"], width * row["spacing_x"], "mm"
    name = f"global {v + 1}" if v < 2 else f"local {v - 1}"
    first = f"{name}: {height:.0f} x {width:.0f} {unit}{', flip' * bool(plan.flips[v, j])}"
    second = [f"blur {plan.sigmas[v, j]:.1f}"] * bool(plan.sigmas[v, j])
    if source.encoding == "hu16-v1":
        level, width = (x.item() for x in look_windows(plan.looks[v : v + 1, j], plan.recipe.windows))
        second.append(f"L {level:.0f} W {width:.0f}")
    if plan.solarized[v, j]:
        second.append("solarised")
    return [first, ", ".join(second)]


def draw_image(source, batch, j, patch_size, with_gram):
    """Of image j: the slice with its boxes and the globals, below them the locals, and the Gram teacher's crops."""
    crops = render(batch.images[j : j + 1], select(batch.plan, [j]))
    masks = batch.masks.unflatten(0, (2, -1))[:, j]  # [2, N]
    zoom, side = zoom_of(batch.plan.recipe.global_size), math.isqrt(masks.shape[1])
    tiles = [slice_tile(source, batch, j)]
    for v, (crop, mask) in enumerate(zip(denormalise(crops.globals), masks)):
        tile = sheet.hatch(sheet.picture(crop, zoom), mask.view(side, side), patch_size * zoom)
        lines = describe(source, batch, v, j)
        lines[1] += f"{', ' * bool(lines[1])}{int(mask.sum())} of {len(mask)} patches masked"
        tiles.append(sheet.titled(tile, lines, colour_of(v)))
    small = [
        sheet.titled(sheet.picture(crop, zoom), describe(source, batch, v, j), colour_of(v))
        for v, crop in enumerate(denormalise(crops.locals), 2)
    ]
    gram = []
    for v, crop in enumerate(denormalise(crops.gram) if with_gram and crops.gram is not None else ()):
        tile = sheet.picture(crop, zoom_of(crop.shape[1]))
        gram.append(sheet.titled(tile, [f"Gram teacher's global {v + 1}", "not blurred"], colour_of(v)))
    fit = (sheet.WIDTH + sheet.GAP) // (max([t.width for t in small], default=1) + sheet.GAP)  # locals in one row
    parts = np.array_split(np.arange(len(small)), max(1, math.ceil(len(small) / fit)))  # rows of about equal length
    rows = [tiles, *([small[k] for k in part] for part in parts), gram]
    return sheet.stack([sheet.row(some) for some in rows if some])


def colour_of(view):
    return sheet.COLOURS[view % len(sheet.COLOURS)]


def name_of(source, i):
    patient = "" if source.encoding == "photo" else f", patient {source.rows[i]['group']}"
    return f"sample {i}: {slice_name(source, i)}{patient}"


# ----- why an update was as it was


def ask(args, config):
    """What train_ssl.py says of the update, in a process of its own: programs are run, not imported."""
    words = {"--data": args.data or config["args"]["data"], "--out": args.run, "--why": args.why}
    words |= {"--device": pick_device(args.device), "--workers": args.workers}
    line = [sys.executable, str(ROOT / "train_ssl.py"), *(str(word) for pair in words.items() for word in pair)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # its reason is on stderr
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def told(value, form=".4g"):
    """A number of the replay, which JSON holds as null where it is not finite."""
    return "not finite" if value is None else format(value, form)


def numbers_of(image):
    """What the replay found of one image, in lines."""
    yield f"{image['words']}; drawn as {autopsy.called(image)}"
    if "share" in image:
        yield (f"{image['share']:.1%} of the gradient before the prototypes, alone {image['norm']:.4g}, of all others "
               f"{image['without']:.4g}; its targets' entropy {image['target_entropy']:.3f}, nearest image "
               f"{told(image['nearest'], '.4f')}")  # fmt: skip
        yield "cross entropy by view (2 global, then local): " + ", ".join(f"{v:.2f}" for v in image["views"])
    if "view_shares" in image:
        yield "share of the gradient by view: " + ", ".join(f"{v:.1%}" for v in image["view_shares"])


def numbers_of_all(found):
    """What the replay found of the whole update, in lines."""
    terms = ", ".join(f"{name} {told(value)}" for name, value in found["terms"].items())
    usual = "" if found["usual_loss"] is None else f"; median of the log {found['usual_loss']:.4g}"
    yield f"{terms}{usual}; gradient {told(found['norm'])}, teacher temperature {found['temperature']:g}"
    if "by_term" in found:
        yield "gradient by term: " + ", ".join(f"{name} {value:.0%}" for name, value in found["by_term"].items())
    yield "gradient by part: " + ", ".join(f"{name} {told(value, '.3g')}" for name, value in found["modules"].items())
    if found["first"]:
        yield f"first that is not finite: {found['first']['where']}"
    words = {True: "equal", False: "NOT equal (other data, code or machine?)", None: "nothing to compare with"}
    taken, same = "skipped" if found["skipped"] else "taken", (words[found[key]] for key in ("as_logged", "as_saved"))
    yield f"replayed {found['replayed']} updates from {found['from']}, this one {taken}"
    yield "loss here and in the log: {}; weights here and in the checkpoint of this step: {}".format(*same)


def draw_why(args, config, source, found):
    """The sheet: the sentence, numbers of the update, then the images with their views."""
    batches = read_update(source, config, args.why, config["args"]["batch_size"])
    worst = [(image["micro"], image["at"]) for image in found["images"]]
    places = list(dict.fromkeys([*map(tuple, found["guilty"]), *worst]))[: args.images]
    of, with_gram = dict(zip(worst, found["images"])), args.why > config["args"]["gram_start"]
    pictures = [(of[m, j], draw_image(source, batches[m], j, config["patch_size"], with_gram)) for m, j in places]
    width = max(picture.width for _, picture in pictures)
    colour = sheet.BAD if found["cause"] != "none" else sheet.INK
    parts = [sheet.heading(f"{args.run}, why was update {args.why} as it was?", width, size=20)]
    parts += [sheet.paragraphs([(found["verdict"], colour)], width, 17), sheet.paragraphs(numbers_of_all(found), width)]
    for image, picture in pictures:
        i = batches[image["micro"]].ids[image["at"]]
        parts += [sheet.heading(name_of(source, i), width), sheet.paragraphs(numbers_of(image), width), picture]
    return sheet.stack(parts)


def explain(args, config, source):
    """--why: ask, draw, write -> exit code."""
    found = ask(args, config)
    out = args.out or args.run / "inspect" / f"why_{args.why:08d}.png"
    write_json(out.with_suffix(".json"), {"version": 1, **found})
    sheet.save(out, draw_why(args, config, source, found))
    print(f"{args.run}, update {args.why}: {found['verdict']}")
    print("\n".join(numbers_of_all(found)))
    print(out)
    return int(found["cause"] != "none")


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=positive, help="draw the update that made this step, 1 or more")
    which.add_argument("--why", type=positive, help="replay that update and say why it spiked, was skipped or broke")
    parser.add_argument(
        "--images",
        type=within("[1, 64]", int),
        default=8,
        help="to draw, at most 64: the first of the batch, or with --why those with the largest part of the gradient",
    )
    parser.add_argument("--data", type=Path, help="where the run's data lies now; default: where it was")
    parser.add_argument("--out", type=Path, help="PNG to write; default: RUN/inspect/step_<step>.png, why_<step>.png")
    parser.add_argument("--device", default="auto", help="of --why: auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    parser.add_argument("--workers", type=natural, default=0, help="of --why: reading processes")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    config = read_run_config(args.run)
    flags = config["args"]
    source = open_data(config, args.data)
    if args.why:
        return explain(args, config, source)
    batches = read_update(source, config, args.step, args.images)
    with_gram = args.step > flags["gram_start"]  # before that, training renders no Gram crops
    picked = [(batch, j) for batch in batches for j in range(len(batch.ids))][: args.images]
    pictures = [
        (name_of(source, batch.ids[j]), draw_image(source, batch, j, config["patch_size"], with_gram))
        for batch, j in picked
    ]
    recipe, width = batches[0].plan.recipe, max(picture.width for _, picture in pictures)
    title = (
        f"{args.run}, step {args.step}: {len(pictures)} of {flags['batch_size']} images, seed {flags['seed']}, recipe"
        f" {recipe.kind} {recipe.global_size}/{recipe.local_size}, split {config['split'] or 'none'}"
    )
    if args.step > flags["steps"]:  # a run may have been extended later
        title += f"; NOT among the {flags['steps']} updates that this run was started with"
    parts = [sheet.heading(title, width, size=20)]
    for name, picture in pictures:
        parts += [sheet.heading(name, width), picture]
    out = args.out or args.run / "inspect" / f"step_{args.step:08d}.png"
    sheet.save(out, sheet.stack(parts))
    print(f"{title}; wrote {out}")
    return 0


if __name__ == "__main__":
    run(main)
