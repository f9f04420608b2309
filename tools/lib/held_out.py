"""Numbers of a self-supervised run on slices that it does not train on."""

import numpy as np
import torch
from torch.nn import functional as F

import data
import losses
from tools.lib import settings


def themselves(source, batch):
    """Which images [b] of a micro-batch are what their ids say, and no stand-ins for broken files."""
    broken = {path for path, _ in batch.bad}
    return np.array([str(source.path(i)) not in broken for i in batch.ids])


def view_pairs(teacher, globals_):
    """The teacher's unit cls features of both global crops of each image: [2b, 3, G, G] -> [2, b, D]."""
    (cls,) = teacher([globals_]).cls  # by its own forward: under --fsdp the backbone alone has no whole weights
    return F.normalize(cls.float(), dim=-1).unflatten(0, (2, -1))


@torch.no_grad()
def evaluate(run, source, w, update, to_micro, slices=256):
    """The losses of update(...) and view retrieval on held-out slices: the same slices, views and batches anywhere.

    to_micro(micro-batch as read, device, with_gram) -> one as update takes it.
    """
    args, student, teacher = run.args, run.student, run.teacher
    group = min(args.koleo_group, len(source))
    batch = min(max(64, group), len(source)) // group * group
    updates = max(min(slices, len(source)) // batch, 1)
    size = max(m for m in range(group, max(args.micro_batch, group) + 1, group) if batch % m == 0)
    held_out = source.take(np.sort(data.rng(0, "limit").permutation(len(source))[: updates * batch]))
    micros = data.make_loader(
        held_out, run.recipes[0], 0, range(updates), batch, size, masking=settings.masking(args),
        patch_size=student.backbone.patch_size, skip_bad=args.skip_bad,
    )  # fmt: skip
    terms, pairs, series = [], [], []
    student.eval()
    w = w._replace(koleo_group=group)
    for _ in range(updates):
        read = [next(micros) for _ in range(batch // size)]
        rendered = [to_micro(b, run.device, run.gram is not None) for b in read]
        terms.append(update(student, teacher, run.gram, rendered, w, dict(run.centers))[0])
        for b, micro in zip(read, rendered):
            whole = themselves(held_out, b)
            pairs.append(view_pairs(teacher, micro.crops.globals)[:, whole])
            series.append(torch.from_numpy(held_out.series[b.ids[whole]]).to(run.device))
    student.train()
    numbers = {key: torch.stack([t[key] for t in terms]).mean() for key in terms[0]}
    numbers |= losses.retrieval(*torch.cat(pairs, 1), torch.cat(series))  # does one view of a slice find the other?
    return {key: value.item() for key, value in numbers.items()} | {"slices": sum(map(len, series))}
