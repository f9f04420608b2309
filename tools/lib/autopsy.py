"""Why one update spiked, skipped or broke: which image, view, term, block, weight; what another image would have done.

    path, facts = nearest("runs/lidc", 1234)        # the checkpoint from which update 1234 is made again
    found = examine(replay, micro_batches, read, another)       # by train_ssl.py --why, for tools/inspect_step.py

The gradient of the whole batch is a sum over images: the loss is differentiated down to what goes into the prototypes
of each image, with targets as they were, and that is pulled back through the student image by image. An image's share
is the part of the batch's gradient along itself, so shares add up to 1. Prototypes themselves are left out of shares.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import checkpoint
import losses
from data import Unreadable
from model import SSLOutput
from tools.lib.files import last_per_step
from tools.lib.progress import progress
from tools.lib.runs import read_log
from tools.lib.slices import slice_name

LONE = 100  # a weight this many times as large as the others of its tensor was corrupted, or has diverged
COLD = 1e-3  # a temperature below divides logits into infinities and one-hot targets
PART = 0.2  # an image stands out from this share of the gradient on, or from four even shares where that is more
TERMS = {"cls": "koleo", "logits": "dino", "masked": "ibot", "patches": "gram"}  # by what the student puts out


class Replay(NamedTuple):
    """One update, as train_ssl.py makes it: networks before it, and its own functions."""

    student: Any
    teacher: Any
    gram: Any
    weights: Any  # train_ssl.Weights
    centers: dict
    update: Any  # ssl_update
    source: Any


def nearest(folder, number):
    """-> (newest checkpoint before update `number`, its values without tensors); (None, {}) if there is none."""
    folder = Path(folder)
    files = [path for path in checkpoint.step_files(folder) if checkpoint.step_of(path) < number]
    for path in [*files, folder / "last.pth"]:
        if path.exists() and checkpoint.broken(path) is None:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if state["step"] < number:
                return path, {k: v for k, v in state.items() if k not in ("student", "teacher", "gram", "optimizer")}
    return None, {}


# ----- weights and pixels


@torch.no_grad()
def odd_weights(nets):
    """Tensors with values that are not finite, or with one far beyond the others: {net, name, at, value, ...} each."""
    for net, module in nets.items():
        for name, p in module.named_parameters() if module is not None else ():
            flat = p.detach().float().flatten()
            bad = (~flat.isfinite()).nonzero().flatten()
            if len(bad):
                about = {"net": net, "name": name, "count": len(bad), "value": str(flat[bad[0]].item())}
                yield about | place(p, bad[0])
            elif len(flat) >= 16:
                k = flat.abs().argmax()
                usual = flat.double().square()
                usual = ((usual.sum() - usual[k]) / (len(flat) - 1)).clamp(min=0).sqrt().item()
                if flat[k].abs() > max(LONE * usual, 1):
                    about = {"net": net, "name": name, "count": 1, "value": f"{flat[k]:.3g}", "usual": usual}
                    yield about | place(p, k)


def place(p, k):
    return {"at": [int(i) for i in np.unravel_index(int(k), p.shape)]}


def shown_id(source, batch, j):
    """Of the image that is in this place: its own, or of a broken file that of the next good one, which stands in."""
    bad, n = dict(batch.bad), len(batch.ids)
    ids = (batch.ids[k % n] for k in range(j, j + n))  # of a volume one slice may be broken, another not
    return next((i for i in ids if str(source.path(i)) not in bad or readable(source, i)), batch.ids[j])


def readable(source, i):
    try:
        source.read(i)
    except Unreadable:
        return False
    return True


def whole(source, batch, j):
    """Image j of a micro-batch: all of a slice, of which training reads a part; a photograph as it was read."""
    return batch.images[j] if source.encoding == "photo" else source.read(shown_id(source, batch, j))


def pixels(source, batch, j):
    """What image j of a micro-batch consists of: its name, its values, its windows' input."""
    i, image = batch.ids[j], whole(source, batch, j)
    low, high = (int(v) for v in image.aminmax())
    unit = " HU" if source.encoding == "hu16-v1" else ""
    middle = image[1]
    flat = int(middle.min()) == int(middle.max())
    words = f"a slice of {int(middle.min())}{unit} throughout" if flat else f"values from {low} to {high}{unit}"
    return {"id": int(i), "name": slice_name(source, i), "low": low, "high": high, "flat": flat, "words": words}


def copies(source, read):
    """Groups of images of the batch with equal pixels: [[(micro, j), ...]]."""
    found = {}
    for m, batch in enumerate(read):
        for j in range(len(batch.ids)):
            key = hashlib.sha256(whole(source, batch, j).numpy().tobytes()).digest()
            found.setdefault(key, []).append((m, j))
    return [places for places in found.values() if len(places) > 1]


# ----- the gradient, image by image


class Leaves:
    """A student whose outputs are leaves: after backward, each holds the derivative of the loss by itself."""

    def __init__(self, student):
        self.student, self.outs, self.targets = student, [], []

    def __call__(self, crops, masks, at, keep, rope, patches, scores):
        with torch.no_grad():
            out = self.student(crops, masks, at, keep, rope, patches, (untouched, untouched))
        leaf = [None if t is None else t.detach().clone().requires_grad_() for t in flat_outs(out)]
        self.outs.append(leaf)
        self.targets.append(scores[0].args[0])  # of train_ssl's losses.dino_scores
        heads = self.student.dino_head, self.student.ibot_head
        said = [score(x, head.last_layer.weight.detach()) for score, x, head in zip(scores, leaf[1:3], heads)]
        return SSLOutput([leaf[0], *out.cls[1:]], leaf[3], *said)


def untouched(x, weight):
    """For SSLModel: what goes into the prototypes, instead of logits."""
    return x


def learned(student):
    """Parameters in front of the prototypes."""
    return [p for name, p in student.named_parameters() if p.requires_grad and "last_layer" not in name]


def flat_outs(out):
    """In the order of TERMS."""
    return [out.cls[0], out.cls_logits, out.patch_logits, out.patches]


def rows_of(micro, images, b, views):
    """Which rows of each output of the student belong to these images: cls, logits, masked, patches; and the crops'."""
    images = torch.as_tensor(images)
    big = torch.cat([images, b + images])
    small = torch.cat([v * b + images for v in range(views)]) if views else images[:0]
    masked = torch.isin(micro.at.cpu() // micro.masks.shape[1], big).nonzero().flatten()
    return [big, torch.cat([big, 2 * b + small]), masked, big], (big, small)


def only(micro, images, b):
    """The micro-batch of these images alone -> (Micro, rows of the whole one's outputs). Without stochastic depth."""
    views, n = len(micro.crops.locals) // b, micro.masks.shape[1]
    rows, (big, small) = rows_of(micro, images, b, views)
    at = micro.at.cpu()[rows[2]]
    new = torch.empty(2 * b, dtype=torch.long)
    new[big] = torch.arange(len(big))
    at = (new[at // n] * n + at % n).to(micro.at.device)
    gram = micro.crops.gram
    crops = type(micro.crops)(micro.crops.globals[big], micro.crops.locals[small], None if gram is None else gram[big])
    return micro._replace(crops=crops, masks=micro.masks[big], at=at), rows


def pulled_back(replay, micro, derivatives, parts):
    """Gradients [parameters] of the student for each part: for each output its rows, None for all of them."""
    params, device = learned(replay.student), micro.masks.device
    with torch.autocast(device.type, torch.bfloat16, enabled=replay.weights.precision == "bf16"):
        out = replay.student([micro.crops.globals, micro.crops.locals], [micro.masks, None], micro.at, micro.keep,
                             micro.rope, replay.gram is not None, (untouched, untouched))  # fmt: skip
    outs = flat_outs(out)
    for k, part in enumerate(parts):
        pairs = []
        for t, d, rows in zip(outs, derivatives, part):
            if t is None or d is None or rows is False:
                continue
            chosen = d if rows is None else torch.zeros_like(d).index_copy(0, rows.to(device), d[rows.to(device)])
            pairs.append((t, chosen))
        grads = torch.autograd.grad(
            [t for t, _ in pairs], params, [d for _, d in pairs], retain_graph=k < len(parts) - 1, allow_unused=True
        )
        yield [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params)]


def dot(a, b):
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b)).item()


def shares(replay, micro_batches, leaves, total):
    """(per image {share, norm, without} in the order of the batch, {term: share of the gradient})."""
    square, images, terms = dot(total, total), [], dict.fromkeys(TERMS.values(), 0.0)
    count = sum(len(m.masks) // 2 for m in micro_batches)
    with progress(total=count, desc="image by image", unit="image") as bar:
        for micro, outs in zip(micro_batches, leaves):
            b, derivatives = len(micro.masks) // 2, [None if t is None else t.grad for t in outs]
            alone = [
                [None if k == chosen else False for k in range(4)]
                for chosen, d in enumerate(derivatives)
                if d is not None
            ]
            names = [name for name, d in zip(TERMS.values(), derivatives) if d is not None]
            for name, grads in zip(names, pulled_back(replay, micro, derivatives, alone)):
                terms[name] += dot(grads, total) / square
            for grads in image_gradients(replay, micro, derivatives, b):
                along, own = dot(grads, total), dot(grads, grads)
                without = max(square - 2 * along + own, 0) ** 0.5
                images.append({"share": along / square, "norm": own**0.5, "without": without})
                bar.update()
    return images, {name: value for name, value in terms.items() if value}


def image_gradients(replay, micro, derivatives, b):
    if micro.keep is None:
        for j in range(b):
            small, rows = only(micro, [j], b)
            cut = [None if d is None else d[r.to(d.device)] for d, r in zip(derivatives, rows)]
            yield next(pulled_back(replay, small, cut, [[None] * 4]))
    else:  # stochastic depth scales by the whole micro-batch, which must then be seen as a whole
        views = len(micro.crops.locals) // b
        yield from pulled_back(replay, micro, derivatives, [rows_of(micro, [j], b, views)[0] for j in range(b)])


def view_shares(replay, micro, outs, j, total):
    """Shares of the gradient of image j by view: two global crops, then local ones. Without stochastic depth."""
    b, derivatives = len(micro.masks) // 2, [None if t is None else t.grad for t in outs]
    small, rows = only(micro, [j], b)
    cut = [None if d is None else d[r.to(d.device)] for d, r in zip(derivatives, rows)]
    crop, parts = small.at.cpu() // micro.masks.shape[1], []
    for v in range(2 + len(small.crops.locals)):
        here = torch.tensor([v])
        big = here if v < 2 else here[:0]
        parts.append([big, here, (crop == v).nonzero().flatten(), big])
    return [dot(grads, total) / dot(total, total) for grads in pulled_back(replay, small, cut, parts)]


@torch.no_grad()
def image_terms(replay, leaves):
    """Per image: cross entropy of each view, distance to the nearest image, its targets' entropy."""
    w, found, prototypes = replay.weights, [], replay.student.dino_head.last_layer.weight
    for (cls, x, *_), targets in zip(leaves.outs, leaves.targets):
        b, probabilities = len(cls) // 2, targets.probabilities()
        target, views = probabilities.unflatten(0, (2, b)), (x @ prototypes.T.to(x.dtype)).unflatten(0, (-1, b))
        wanted = [target[1], target[0], *[target.mean(0)] * (len(views) - 2)]
        ce = torch.stack([losses.cross_entropy(v, t, w.student_temp) for v, t in zip(views, wanted)], 1)  # [b, V]
        entropy = losses.entropy(probabilities).unflatten(0, (2, b)).mean(0)
        near = torch.stack([nearest_distance(c, w.koleo_group) for c in cls.chunk(2)]).amin(0)
        rows = zip(ce.tolist(), entropy.tolist(), near.tolist())
        found += [dict(zip(("views", "target_entropy", "nearest"), row)) for row in rows]
    return found


def nearest_distance(features, group):
    """[b]: of unit features, to the nearest other in the group of KoLeo."""
    x = torch.nn.functional.normalize(features.float(), dim=-1).unflatten(0, (-1, min(group, len(features))))
    apart = torch.cdist(x, x)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return apart.amin(-1).flatten()


def by_module(student):
    """Norm of the gradient by sub-module, of the backbone by block; before clipping."""
    squares = {}
    for name, p in student.named_parameters():
        if p.grad is not None:
            words = name.split(".")
            key = ".".join(words[:3] if words[1] == "blocks" else words[:2] if words[0] == "backbone" else words[:1])
            squares[key] = squares.get(key, 0.0) + p.grad.double().square().sum().item()
    return {name: value**0.5 for name, value in squares.items()}


# ----- what is not finite


def first_broken(replay, micro_batches):
    """The first tensor on the way through the update that is not finite, in words, and whose images it holds."""
    for m, micro in enumerate(micro_batches):
        b = len(micro.masks) // 2
        for kind, crops in (("global", micro.crops.globals), ("local", micro.crops.locals)):
            bad = (~crops.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                v, j = divmod(bad[0], b)
                return {
                    "where": f"the pixels of {kind} crop {v + 1}",
                    "image": [m, j],
                    "view": v + 2 * (kind == "local"),
                }
    for m, micro in enumerate(micro_batches):
        whole = ([micro.crops.globals, micro.crops.locals], [micro.masks, None], micro.at, micro.keep, micro.rope)
        for who, inputs in {"teacher": ([micro.crops.globals], None, micro.at), "student": whole}.items():
            if found := first_in_forward(getattr(replay, who), inputs, len(micro.masks) // 2, who):
                image = found.pop("image")
                return found | {"image": None if image is None else [m, image]}
    return None


@torch.no_grad()
def first_in_forward(net, inputs, b, who):
    found, handles = {}, []

    def watch(name):
        def hook(module, given, out):
            if not found and isinstance(out, torch.Tensor) and not out.isfinite().all():
                found.update(where=f"the output of {who}.{name}", image=None)

        return hook

    for name, module in net.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(watch(name)))
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        out = net(*inputs)
    if found:
        bad = (~out.cls[0].isfinite().all(1)).nonzero().flatten() % b
        alone = sorted(set(bad.tolist()))
        found["image"] = alone[0] if len(alone) == 1 else None
    return found


# ----- all of it


def examine(replay, micro_batches, read, another):
    """The update's numbers, image by image, and a sentence -> dict for JSON. another(m, j) -> micro-batches with
    another image in that place, drawn alike, and its name."""
    found = {"weights": list(odd_weights({"student": replay.student, "teacher": replay.teacher, "gram": replay.gram}))}
    found["copies"], found["temperature"] = copies(replay.source, read), replay.weights.teacher_temp
    images = [
        {"micro": m, "at": j, **pixels(replay.source, b, j)} for m, b in enumerate(read) for j in range(len(b.ids))
    ]
    replay.student.zero_grad(set_to_none=True)
    terms, _ = replay.update(replay.student, replay.teacher, replay.gram, micro_batches, replay.weights,
                                dict(replay.centers))  # fmt: skip
    found["terms"], found["modules"] = {k: v.item() for k, v in terms.items()}, by_module(replay.student)
    total = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in learned(replay.student)]
    found["norm"] = float(np.linalg.norm([*found["modules"].values()]))
    found["norm_before_prototypes"] = dot(total, total) ** 0.5
    found["finite"] = bool(np.isfinite([found["terms"]["loss"], found["norm"]]).all())
    replay.student.zero_grad(set_to_none=True)
    found["first"] = None if found["finite"] else first_broken(replay, micro_batches)
    if found["finite"] and found["norm_before_prototypes"] > 0:
        leaves = Leaves(replay.student)
        replay.update(leaves, replay.teacher, replay.gram, micro_batches, replay.weights, dict(replay.centers))
        parts, found["by_term"] = shares(replay, micro_batches, leaves.outs, total)
        for image, *more in zip(images, parts, image_terms(replay, leaves)):
            image.update({k: v for part in more for k, v in part.items()})
        worst = max(images, key=lambda image: image["norm"])
        if micro_batches[worst["micro"]].keep is None:
            micro, outs = micro_batches[worst["micro"]], leaves.outs[worst["micro"]]
            worst["view_shares"] = view_shares(replay, micro, outs, worst["at"], total)
    found["images"] = sorted(images, key=lambda image: -image.get("norm", 0))
    found["cause"], guilty, found["verdict"] = verdict(found, images)
    found["guilty"] = guilty
    place = guilty[0] if guilty else (found["images"][0]["micro"], found["images"][0]["at"])
    found["swap"] = swapped(replay, *another(*place))
    found["verdict"] += swap_in_words(found)
    return found


def swapped(replay, micro_batches, name):
    """The same update with another image in that place."""
    terms, _ = replay.update(replay.student, replay.teacher, replay.gram, micro_batches, replay.weights,
                             dict(replay.centers))  # fmt: skip
    norm = float(np.linalg.norm([*by_module(replay.student).values()]))
    replay.student.zero_grad(set_to_none=True)
    return {"name": name, "loss": terms["loss"].item(), "norm": norm}


def swap_in_words(found):
    swap = found["swap"]
    if not np.isfinite([swap["loss"], swap["norm"]]).all():
        return " With another image in that place the update is not finite either."
    was = f" instead of {found['terms']['loss']:.4g} and {found['norm']:.4g}" if found["finite"] else ""
    return f" With {swap['name']} in that place: loss {swap['loss']:.4g}, gradient {swap['norm']:.4g}{was}."


def confirmed(folder, number, update, student):
    """Is the replay what the run did? By its log, if it has a line of this update, and by its next checkpoint."""
    lines = [row for row in last_per_step(read_log(Path(folder) / "metrics.jsonl")[0], "loss") if row["step"] == number]
    logged, path = lines[-1]["loss"] if lines else None, checkpoint.step_path(folder, number)
    said = {"logged_loss": logged, "as_logged": None, "as_saved": None}
    if logged is not None:
        said["as_logged"] = float(f"{update.terms['loss'].item():.6g}") == logged
    if path.exists() and checkpoint.broken(path) is None:
        saved, own = checkpoint.load(path)["student"], student.state_dict()
        said["as_saved"] = all(torch.equal(own[name].cpu(), value) for name, value in saved.items())
    before = [row["loss"] for row in last_per_step(read_log(Path(folder) / "metrics.jsonl")[0], "loss")]
    return said | {"skipped": update.bad, "usual_loss": float(np.median(before)) if before else None}


def called(image):
    return f"image {image['at'] + 1} of micro-batch {image['micro'] + 1}"


def verdict(found, images):
    """(cause, places of the guilty images, a sentence); what was seen to be wrong comes before what is merely large."""
    of, first = {(image["micro"], image["at"]): image for image in images}, found["first"]
    if broken := [w for w in found["weights"] if "usual" not in w]:
        w = broken[0]
        text = f"{w['net']}.{w['name']} has {w['count']} that is not finite, the first at {w['at']} ({w['value']})"
        return "weight", [], f"{text}: the weights were broken before this update."
    if first and first["image"]:
        image, view = of[tuple(first["image"])], f", view {first['view'] + 1}" if "view" in first else ""
        text = f"{called(image)}{view}: {first['where']} is not finite; {image['words']} ({image['name']})."
        return "image", [tuple(first["image"])], text
    if found["temperature"] < COLD:
        text = f"the teacher's temperature is {found['temperature']:g}: targets are one-hot or not finite"
        return "temperature", [], f"{text}, whatever the images are; look at --teacher-temp."
    if found["weights"]:
        w = found["weights"][0]
        text = f"one weight, {w['net']}.{w['name']}{w['at']}, is {w['value']}, others are about {w['usual']:.2g}"
        return "weight", [], f"{text}: it was corrupted, or has diverged."
    if not found["finite"]:
        where = first["where"] if first else "the loss or its gradient"
        return "not finite", [], f"{where} is the first that is not finite, for several images at once."
    return copied(found, images) or large(found, images)


def copied(found, images):
    doubled, koleo = sum(map(len, found["copies"])), found.get("by_term", {}).get("koleo", 0)
    if not (doubled > 2 and koleo > 0.5 or 2 * doubled > len(images) > 2):
        return None
    place = found["copies"][0]
    pair = " and ".join(called({"micro": m, "at": j}) for m, j in place[:2])
    text = f"{doubled} of {len(images)} images are copies of others in this batch, such as {pair}"
    return "copies", place, f"{text}; KoLeo, which spreads neighbours apart, is {koleo:.0%} of the gradient."


def large(found, images):
    """The image with the largest part of the gradient, and one of a single value wherever it is."""
    worst, even = found["images"][0], 1 / len(images)
    flat = [image for image in found["images"] if image["flat"]]
    if worst.get("share", 0) < max(PART, 4 * even) and not flat:
        part = (
            f"the largest part of the gradient is {worst.get('share', 0):.0%} ({called(worst)}), an even one {even:.0%}"
        )
        return "none", [], f"no image, weight or temperature stands out: {part}."
    odd = worst if worst.get("share", 0) >= max(PART, 4 * even) else flat[0]
    of_views = odd.get("view_shares", [0])
    view = f", view {int(np.argmax(of_views)) + 1}" if max(of_views) > 0.5 * odd.get("share", 0) > 0 else ""
    part = f"{odd.get('share', 0):.0%} of the gradient, an even part is {even:.0%}"
    return "image", [(odd["micro"], odd["at"])], f"{called(odd)}{view}: {odd['words']} ({odd['name']}); {part}."
