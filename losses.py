"""The objectives of DINOv3 (arXiv:2508.10104) and of supervised runs as pure functions. Copyable: imports torch only.

Letters: B images, S, T student and teacher crops, K prototypes, M rows (masked tokens), N tokens, D features.

Every function leaves autocast and computes in float32 whatever it is given (float64 stays float64), keeps no
state and works without a process group. Matrix products follow torch.set_float32_matmul_precision: "high" (TF32)
rounds the similarities of KoLeo and Gram to about 1e-3.

Each loss is a mean over the images of one call (Gram over pairs of images with per_image=False). With equal
micro-batches on equal ranks the mean of the calls (each divided by the number of micro-batches, gradients averaged
by DDP) is therefore the loss of the batch.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

CHUNK = 2**25  # elements of a temporary of size [M, K]: 128 MiB in float32
CHUNK_CPU = 2**20  # there caches count: 1.8 x in sinkhorn_offsets, 1.1 x in the scores (one thread, 2026-11)


def exact(x):
    """Context: no autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def wide(x):
    """At least float32; float64 is kept, so that gradcheck means something."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def over_ranks(x, op, group):
    """All-reduce `x` in place ("SUM" or "MAX"); the identity without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group)
    return x


def expect(good, words, **tensors):
    """Refuse tensors of a wrong shape: what was expected, in words, and the shapes that came."""
    if not good:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{words}; got {shapes}")


def chunk_size(x):
    return min(CHUNK, CHUNK_CPU) if x.device.type == "cpu" else CHUNK


def rows_per_chunk(x):
    return max(1, chunk_size(x) // x.shape[-1])


def in_chunks(tensors):
    """Views of some rows each of tensors [m, K]; of one without rows none."""
    return (rows for x in tensors if len(x) for rows in x.split(rows_per_chunk(x)))


@functools.cache
def compile_once(function):
    """Sizes are fixed: left open, they ended in an error on a card (torch 2.11). The option stops the compiler from
    writing a float32 copy between two passes: 2.5 times the bytes of mass_of, 2.3 times those of score_chunk (counted).
    """
    return torch.compile(function, dynamic=False, options={"realize_reads_threshold": 8})


def by_chunk(function, count, most, compiled):
    """Yields (slice, the function for it): `count` rows, at most `most` at a time.

    compiled: the function as one pass over memory instead of one per operation. Each size is compiled anew, so there
    are only two sizes, and the few rows that are left go through the plain function.
    """
    start, fast = 0, compile_once(function) if compiled else function
    for size in (most, max(1, most // 8)) if compiled else (most,):
        while count - start >= size:
            yield slice(start, start + size), fast
            start += size
    if start < count or count == 0:
        yield slice(start, count), function


def rows_at(x, at):
    """x[:, at] of [C, r, K]; of one crop with the strides of these rows alone, which do not change with r: for others
    a compiled function would be compiled again, and after eight times no more."""
    return x[:, at] if len(x) > 1 else x[0, at][None]


# Targets. What centres a teacher's logits is one number per prototype, its offset: the targets are
# softmax(logits / temperature - offsets), formed where they are read, so that only the logits are ever of size [M, K].
# Offsets are kept as [2, K], a number and what rounding left of it: near 1e5 (logits of 1e4) one float32 would be off
# by 0.004, and the masses with it.


def in_parts(offsets, dtype):
    """[K] in float64 -> [2, K]"""
    return torch.stack([offsets.to(dtype), (offsets - offsets.to(dtype)).to(dtype)])


def shifted(logits, temperature, offsets):
    """logits / temperature - offsets as a new tensor, in at least float32: [..., K], [2, K] -> [..., K]."""
    x = logits / temperature if logits.dtype == offsets.dtype else logits.to(offsets.dtype).div_(temperature)
    return x.sub_(offsets[0]).sub_(offsets[1])


def mass_of(logits, temperature, offsets, normalised):
    """Log of the sum over rows [m, K] of exp(logits / temperature - offsets), as (maximum [K], sum relative to it [K]).

    normalised: each row to sum 1 first.
    """
    x = shifted(logits, temperature, offsets)
    x = x.log_softmax(1) if normalised else x
    top = x.amax(0)
    return top, x.sub_(top).exp_().sum(0)


def total_mass(parts, group):
    """Log of the sums of all chunks and ranks [K] in float64, and which of them are of any row."""
    top, mass = (torch.stack(values) for values in zip(*parts))
    peak = over_ranks(top.amax(0), "MAX", group)
    mass = over_ranks(torch.where(mass > 0, mass * (top - peak).exp(), 0).sum(0), "SUM", group)
    return peak.double() + mass.double().log(), mass > 0  # the maximum counts 1


@torch.no_grad()
def sinkhorn_offsets(logits, temperature, iterations=3, group=None, compiled=False):
    """Balanced soft assignment of all rows to prototypes (SwAV, arXiv:2006.09882, 3.1): [[m, K], ...] -> [2, K].

    Each iteration gives every prototype equal mass over the rows of all ranks, then every row mass 1. The factors 1/K
    and 1/(rows) of the textbook cancel when rows are normalised, so the number of rows is never needed; normalising
    rows is a softmax, so the last time it is left to who reads the targets. Each iteration reads the logits once. Ranks
    may hold different numbers of rows, or none. Log domain: finite as long as logits / temperature is, where exp()
    underflows whole rows at logit std 3.
    """
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    none = logits[0].new_full(logits[0].shape[1:], -torch.inf, dtype=dtype)
    offsets = torch.zeros_like(none, dtype=torch.float64)
    with exact(offsets):
        for i in range(iterations):
            now = in_parts(offsets, dtype)
            parts = [
                each(x[rows], temperature, now, i > 0)
                for x in logits
                if len(x)
                for rows, each in by_chunk(mass_of, len(x), rows_per_chunk(x), compiled)
            ]
            log_mass, any_row = total_mass(parts or [(none, torch.zeros_like(none))], group)
            offsets = torch.where(any_row, offsets + log_mass, offsets)
    return in_parts(offsets, dtype)


@torch.no_grad()
def probabilities(logits, temperature, offsets):
    """softmax(logits / temperature - offsets): [M, K], [2, K] -> [M, K] in at least float32, chunk by chunk."""
    with exact(logits):
        out = torch.empty_like(logits, dtype=offsets.dtype)
        for into, rows in zip(in_chunks([out]), in_chunks([logits])):
            torch.softmax(shifted(rows, temperature, offsets), 1, out=into)
        return out


def sinkhorn(logits, temperature, iterations=3, group=None):
    """The targets themselves: [M, K] -> [M, K], rows normalised. Pass all micro-batches of this rank, concatenated.

    Memory beside `logits`: the result in float32 and one chunk, 1.0 + 0.125 GiB at [4096, 65536].
    """
    expect(logits.dim() == 2, "sinkhorn: logits are [rows, prototypes]", logits=logits)
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations={iterations} must be at least 1")
    return probabilities(logits, temperature, sinkhorn_offsets([logits], temperature, iterations, group))


def center_offsets(center, temperature):
    """Of targets that are centred by a mean row alone (DINO, arXiv:2104.14294): [K] -> [2, K]."""
    return in_parts(wide(center).double() / temperature, wide(center).dtype)


@torch.no_grad()
def moved_center(logits, center, momentum=0.9, group=None):
    """The centre of the next update, moved to the mean row of all ranks: [[m, K], ...], [K] -> [K]."""
    with exact(center):
        center = wide(center)
        rows = center.new_full((1,), sum(map(len, logits)))  # ranks may differ
        total = sum(wide(x).sum(0) for x in in_chunks(logits)) + torch.zeros_like(center)
        sums = over_ranks(torch.cat([total, rows]), "SUM", group)  # [K + 1]
        moved = momentum * center + (1 - momentum) * sums[:-1] / sums[-1]
        return torch.where(sums[-1] > 0, moved, center)  # no rows on any rank: the centre stays


def softmax_center(logits, center, temperature, momentum=0.9, group=None):
    """Teacher targets for batches too small for Sinkhorn: [M, K], [K] -> [M, K], next [K].

    The targets use `center` as given; the returned one is for the next update.
    """
    good = logits.dim() == 2 and center.shape == logits.shape[1:]
    expect(good, "softmax_center: logits are [rows, prototypes], center [prototypes]", logits=logits, center=center)
    targets = probabilities(logits, temperature, center_offsets(center, temperature))
    return targets, moved_center([logits], center, momentum, group)


def cross_entropy(logits, probs, temperature):
    """-sum_k p log softmax(logits / temperature), per row: [..., K], [..., K] -> [...]; rows of p need not sum to 1."""
    return -(wide(probs) * F.log_softmax(wide(logits) / temperature, dim=-1)).sum(-1)


def entropy(probs):
    """Of each row, in nats: [M, K] -> [M]; chunked, so that nothing as large as `probs` is made."""
    return torch.cat([torch.special.entr(wide(p)).sum(1) for p in probs.split(rows_per_chunk(probs))])


def dino_loss(student, teacher_probs, temperature=0.1, ignore_diagonal=False):
    """Cross entropy of cls logits [S, B, K] against targets [T, B, K], mean over (student crop, teacher crop, image).

    ignore_diagonal leaves out equal crop indices: S*T - min(S, T) pairs remain.
    Cross entropy is linear in the targets, so those of one student crop are added up first: no tensor is larger
    than the inputs, and backward keeps one float32 copy of `student`.
    """
    good = student.dim() == teacher_probs.dim() == 3 and student.shape[1:] == teacher_probs.shape[1:]
    words = "dino_loss: logits and targets are [crops, images, prototypes] and differ in the number of crops alone"
    expect(good, words, student=student, teacher_probs=teacher_probs)
    S, T, B = len(student), len(teacher_probs), student.shape[1]
    pairs = S * T - min(S, T) if ignore_diagonal else S * T
    if pairs == 0:
        raise ValueError("dino_loss: ignore_diagonal with one student and one teacher crop leaves no pair of crops")
    with exact(student):
        teacher = wide(teacher_probs)
        everyone = teacher.sum(0)  # [B, K]
        total = 0
        for s, logits in enumerate(student):
            others = [t for t in range(T) if t != s]
            targets = teacher[others].sum(0) if ignore_diagonal else everyone  # [B, K]
            total = total + cross_entropy(logits, targets, temperature).sum()
        return total / (B * pairs)


def ibot_loss(student, teacher_probs, mask_weights, crops, temperature=0.1):
    """Cross entropy of masked tokens [M, K] against targets [M, K], weighted by [M] = 1 / (masked tokens of the crop).

    `crops` counts all global crops of this call (2B), masked or not, as in DINOv3: with half of them masked the
    loss is half the mean over masked crops. No masked token at all gives 0, connected to `student`.
    """
    good = student.dim() == 2 and student.shape == teacher_probs.shape and mask_weights.shape == student.shape[:1]
    words = "ibot_loss: logits and targets are [masked tokens, prototypes], alike, and mask_weights [masked tokens]"
    expect(good, words, student=student, teacher_probs=teacher_probs, mask_weights=mask_weights)
    with exact(student):
        rows = rows_per_chunk(student)  # spares three temporaries as large as `student`
        chunks = zip(student.split(rows), teacher_probs.split(rows), mask_weights.split(rows))
        return sum((wide(w) * cross_entropy(s, p, temperature)).sum() for s, p, w in chunks) / crops


# The same losses from what goes into the last layer. Student logits [C, R, K] exist for a few rows at a time: their
# gradient is computed in the forward pass, right after them, and backward only scales it.


class Targets(NamedTuple):
    """softmax(logits / temperature - offsets), not yet formed."""

    logits: torch.Tensor  # [..., K], as the teacher gave them
    temperature: float
    offsets: torch.Tensor  # [2, K]

    def probabilities(self):
        return probabilities(*self)


def centred(logits, centering, temperature, centers=None, key="", compiled=False):
    """Teacher logits of each micro-batch [[m, K], ...] -> Targets of each, centred by "sinkhorn", "softmax" or "none".

    softmax: by centers[key] [K], zeros at first, in whose place comes the centre of the next update.
    """
    if not isinstance(temperature, torch.Tensor):  # a number would be compiled anew
        temperature = logits[0].new_full((), temperature, dtype=torch.float32)
    if centering == "sinkhorn":
        offsets = sinkhorn_offsets(logits, temperature, compiled=compiled)
    else:
        zeros = logits[0].new_zeros(logits[0].shape[1], dtype=torch.float32)  # there may be no row
        center = (centers or {}).get(key, zeros)
        offsets = center_offsets(center, temperature)
        if centering == "softmax":
            centers[key] = moved_center(logits, center)
    return [Targets(each, temperature, offsets) for each in logits]


def target_rows_of(student, teacher):
    """Which targets [T, r, K] count for student crops [C, r, K]: [(crops, targets that broadcast, their sum), ...].

    T = 1: each row has its own, as masked tokens do. T = 2: the first two crops get each other's, all others both.
    """
    if len(teacher) == 1:
        return [(student, teacher, 1)]
    return [(student[:2], teacher.flip(0), 1), (student[2:], teacher.sum(0, keepdim=True), 2)]


def score_chunk(student, temperature, teacher, teacher_temperature, offsets, coefficients):
    """Student logits [C, r, K] against teacher logits [T, r, K] -> cross entropies [C, r], entropies of the targets
    [T, r]. In the student's place comes the gradient of the sum of coefficients [r] * cross entropies by them."""
    log_p = shifted(teacher, teacher_temperature, offsets).log_softmax(-1)
    p = log_p.exp()
    entropies = -log_p.mul_(p).sum(-1)
    grad, values = wide(student).div_(temperature), []
    scale = (coefficients / temperature)[:, None]
    for logits, targets, mass in target_rows_of(grad, p):
        log_q = logits.log_softmax(-1)
        values.append(-(targets * log_q).sum(-1))
        logits.copy_(log_q.exp_().mul_(mass).sub_(targets).mul_(scale))
    student.copy_(grad)
    return torch.cat(values), entropies


class LastLayerLoss(torch.autograd.Function):
    """sum of coefficients [R] * cross entropies [C, R] of x [C, R, D] through the weight [K, D] of a last layer.

    -> that sum; without gradient: the cross entropies, the entropies of the targets [T, R], and the logits of the
    first `kept` crops. Products are in the type of autocast where it is on, everything else in float32. In a chunk the
    gradient takes the place of the logits.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, coefficients, temperature, kept, needs_grad, compiled):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with exact(x):
            x_low, w_low = x.to(dtype), weight.to(dtype)
            grad_x, grad_w = torch.empty_like(x), None
            parts, logits = [], x.new_empty(kept, x.shape[1], len(weight), dtype=dtype)
            # a card adds each product to the gradient of the weight, in 67 us of an H200: few large ones
            most = CHUNK if kind == "cpu" else 4 * CHUNK
            rows, few = (max(1, size // (len(x) * len(weight))) for size in (most, chunk_size(x)))
            for start in range(0, max(1, x.shape[1]), rows):  # once, if there are no rows
                inputs, some_targets = x_low[:, start : start + rows], targets.logits[:, start : start + rows]
                student = inputs @ w_low.T  # [C, r, K]
                logits[:, start : start + rows] = student[:kept]
                for at, each in by_chunk(score_chunk, inputs.shape[1], few, compiled):
                    chunk = targets._replace(logits=rows_at(some_targets, at))
                    some = coefficients[start : start + rows][at]
                    parts.append(each(rows_at(student, at), temperature, *chunk, some))
                if needs_grad:
                    grad_x[:, start : start + rows] = student @ w_low
                    part = student.flatten(0, 1).T @ inputs.flatten(0, 1)
                    grad_w = part.to(weight.dtype) if grad_w is None else grad_w.add_(part)
            values, entropies = (torch.cat(v, 1) for v in zip(*parts))
            ctx.grads = grad_x, grad_w
        ctx.mark_non_differentiable(values, entropies, logits)
        return (values * coefficients).sum(), values, entropies, logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        grad_x, grad_w = ctx.grads
        ctx.grads = None  # scaled in place: a second backward is refused
        return grad_x.mul_(scale), grad_w.mul_(scale), *[None] * 6


class Scores(NamedTuple):
    """What a head and its loss say of a micro-batch."""

    terms: dict  # by name; the first is the loss, the others have no gradient
    entropy: torch.Tensor  # of the targets: the least that the loss can be
    logits: torch.Tensor | None  # [2B, K] of the global crops, for `health`


def dino_scores(targets, temperature, compiled, x, weight):
    """dino_loss of what goes into the last layer, over all pairs of a crop and another global one, each counting alike.

    x [(2 + S) * B, D] of two global crops of B images and S local ones, targets of the two global crops [2B, K].
    """
    B = len(targets.logits) // 2
    x, targets = x.unflatten(0, (-1, B)), targets._replace(logits=targets.logits.unflatten(0, (2, B)))  # [2 + S, B, D]
    pairs = 2 + 2 * (len(x) - 2)
    each = torch.full((B,), 1 / (B * pairs), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    grads = torch.is_grad_enabled()
    loss, values, entropies, logits = LastLayerLoss.apply(x, weight, targets, each, temperature, 2, grads, compiled)
    terms = {"dino": loss, "dino_global": values[:2].mean(), "dino_local": values[2:].mean() / 2}
    return Scores(terms, entropies.mean(), logits.flatten(0, 1))


def ibot_scores(targets, mask_weights, crops, temperature, compiled, x, weight):
    """ibot_loss of what goes into the last layer: x [M, D], targets of the same patches [M, K]."""
    x, targets = x[None], targets._replace(logits=targets.logits[None])  # [1, M, D], [1, M, K]
    each, grads = wide(mask_weights) / crops, torch.is_grad_enabled()
    loss, _, entropies, _ = LastLayerLoss.apply(x, weight, targets, each, temperature, 0, grads, compiled)
    return Scores({"ibot": loss}, (entropies[0] * each).sum(), None)


def koleo_loss(features, group=16):
    """-mean log distance to the nearest neighbour (arXiv:1806.03198): backbone cls tokens [B, D] of one crop.

    Neighbours are sought within `group` consecutive samples, so that the value does not depend on how samples are
    spread over micro-batches and ranks; they receive gradient too. `group` must divide B, which is that of this call
    (one micro-batch on one rank), and be at least 2; a group above B is B. A batch of one has no neighbour: 0,
    connected to `features`. Identical samples stay finite: the two gradients of a pair cancel, but a third copy
    gets one of about 1e8 / (B D |x|) per number, which only clipping tames.
    """
    expect(features.dim() == 2, "koleo_loss: features are [samples, dimensions]", features=features)
    B = len(features)
    if B > 1 and (group < 2 or B % min(group, B)):
        near = min((g for g in range(2, B + 1) if B % g == 0), key=lambda g: abs(g - group))
        raise ValueError(f"koleo_loss: group={group} must divide the {B} samples and be at least 2; nearest: {near}")
    with exact(features):
        if B <= 1:
            return wide(features).sum() * 0
        x = F.normalize(wide(features), dim=-1, eps=1e-8)
        x = x.unflatten(0, (-1, min(group, B)))  # [B / group, group, D]
        with torch.no_grad():
            similarity = x @ x.mT  # [B / group, group, group]
            similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = similarity.argmax(-1, keepdim=True)  # [B / group, group, 1]
        # Both eps are the reference's: identical samples are 1e-8 * sqrt(D) apart.
        distance = (x - torch.take_along_dim(x, nearest, dim=1) + 1e-8).norm(dim=-1)
        return -(distance + 1e-8).log().mean()


def resize_tokens(tokens, grid, new_grid):
    """Bicubic, corners not aligned, not antialiased (as DINOv3 does): [B, h*w, D] -> [B, new_h*new_w, D]."""
    maps = tokens.mT.unflatten(2, grid)  # [B, D, h, w]
    return F.interpolate(maps, size=new_grid, mode="bicubic", align_corners=False).flatten(2).mT


def gram_distance(student, teacher, per_image=True, negatives="keep"):
    """Mean squared difference of dot products of tokens [B, N, D], of one image or of the batch, as they are."""
    if not per_image:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)  # [B * N, D]
    of_student, of_teacher = student @ student.mT, teacher @ teacher.mT
    if negatives == "clip":
        of_student = of_student.clamp(min=0)
    if negatives in ("clip", "clip_teacher"):
        of_teacher = of_teacher.clamp(min=0)
    return F.mse_loss(of_student, of_teacher)


def gram_loss(student, teacher, per_image=True, negatives="keep", grids=None):
    """Distance of patch similarities (cosines) [B, N, D] to those of an earlier teacher (DINOv3, section 4).

    negatives: "keep"; "clip" sets negative cosines of both to 0; "clip_teacher" only the teacher's, so that a negative
    cosine of the student is pulled up to 0 (what the reference computes as remove_only_teacher_neg).
    grids = ((rows, cols) of the student, of the teacher): the teacher is resized to the student, then normalised.
    """
    if negatives not in ("keep", "clip", "clip_teacher"):
        raise ValueError(f'gram_loss: negatives={negatives!r}: choose "keep", "clip" or "clip_teacher"')
    with exact(student):
        student, teacher = wide(student), wide(teacher)
        if grids is not None and tuple(grids[0]) != tuple(grids[1]):
            teacher = resize_tokens(teacher, tuple(grids[1]), tuple(grids[0]))
        if student.shape[:2] != teacher.shape[:2]:
            words = "gram_loss: tokens are [images, patches, dimensions]; if their resolutions differ, give grids="
            words += "((rows, cols) of the student, (rows, cols) of the teacher)"
            expect(False, words, student=student, teacher=teacher)
        return gram_distance(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1), per_image, negatives)


def retrieval(a, b, series):
    """Does one view of a slice find the other? Unit features [N, D] of both views, series [N] -> shares of slices.

    Without the other slices of its series, which are near copies, and with them; chance is k / N.
    """
    similarity = a @ b.T  # [N, N]
    own = similarity.diagonal()[:, None]
    same = (series[:, None] == series) & ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    found = {}
    for name, values in (("", similarity.masked_fill(same, -2)), ("_with_series", similarity)):
        better = (values > own).sum(1)
        found |= {f"top{k}{name}": (better < k).float().mean() for k in (1, 5)}
    return found


def effective_rank(x, floor):
    """exp of the entropy of the singular values of [N, D]: 1 (a line or a point) to min(N, D). NaN for non-finite x."""
    values = torch.linalg.svdvals(x.nan_to_num(0, 0, 0))  # LAPACK raises on NaN; a log line should say NaN
    values = torch.where(values > floor, values, 0)
    rank = torch.special.entr(values / values.sum().clamp(min=torch.finfo(x.dtype).tiny)).sum().exp()
    return torch.where(x.isfinite().all(), rank, torch.nan)


@torch.no_grad()
def health(teacher_probs, student_logits, features, temperature=0.1):
    """Numbers that tell collapse from progress: targets [N, K], logits [N, K] of the same rows, cls features [., D].

    Uniform collapse: teacher_entropy 1. Peaked: teacher_entropy 0, marginal_entropy 0 (Sinkhorn hides the latter, the
    features do not). Dimensional: cosine 1, feature_std 0, ranks 1. Of the rows given, that is of one rank.
    Returns 0-d tensors; torch.stack(list(numbers.values())).tolist() reads them in one transfer.
    Cost: 3 ms for 8 rows, 25 ms for 64 (K 65536, D 384, 2 CPU cores), where a ViT-S step of 4 images takes 4.4 s.
    """
    with exact(features):
        p, x = wide(teacher_probs), wide(features)
        N, K, ln_K = len(x), p.shape[1], p.new_tensor(max(2, p.shape[1])).log()  # entropy of one prototype: 0
        marginal = p.mean(0)
        of_rows = entropy(p).mean()
        marginal_entropy = entropy(marginal[None])[0]
        unit = F.normalize(x, dim=-1)
        pair_sum = unit.sum(0).square().sum() - unit.square().sum()  # all cosines but the diagonal, in O(N D)
        # Below the floor is rounding, which would give the features of a collapsed model full rank.
        floor = 100 * torch.finfo(x.dtype).eps * x.norm()
        return {
            "teacher_entropy": of_rows / ln_K,  # mean over samples, 0 .. 1
            "marginal_entropy": marginal_entropy / ln_K,  # of the mean sample, 0 .. 1
            "perplexity": marginal_entropy.exp(),  # prototypes in use, 1 .. K
            "dead_prototypes": (marginal < 0.01 / K).to(p.dtype).mean(),  # fraction below 1% of an equal share
            "kl": cross_entropy(student_logits, p, temperature).mean() - of_rows,  # student from teacher, nats
            "cosine": pair_sum / max(N * (N - 1), 1),  # mean over pairs
            "feature_std": unit.std(0, correction=0).mean() * x.shape[1] ** 0.5,  # 1 when spread evenly
            "rankme": effective_rank(x, floor),  # arXiv:2210.02885
            "effective_rank": effective_rank(x - x.mean(0), floor),  # centred; Roy and Vetterli 2007
        }


# Supervised objectives. A target is a row of probabilities [B, C]: target_rows of labels, mixed ones, or a teacher's.
# `weights` [C] are of classes. ce, focal and gatekeeper are means over images, so micro-batches add up to a batch; the
# others compare the images of a call with each other, and how many these are changes the loss. Arguments
# behind * come from the trainer, not from --loss: progress is the share of the run that is done, 0 to 1.


def target_rows(labels, classes):
    """[B] -> [B, classes]"""
    return F.one_hot(labels, classes).float()


def soft_cross_entropy(logits, targets, weights=None, smoothing=0.0):
    """-sum_c w_c t_c log p_c; smoothing moves that share of each row to all classes alike. Not divided by weights."""
    with exact(logits):
        logits = wide(logits)
        weights = None if weights is None else weights.to(logits)
        return F.cross_entropy(logits, targets.to(logits), weights, label_smoothing=smoothing)


def focal_loss(logits, targets, weights=None, gamma=2.0, smoothing=0.0):
    """-sum_c w_c t_c (1 - p_c)^gamma log p_c (arXiv:1708.02002): what is sure already counts less."""
    with exact(logits):
        log_p = F.log_softmax(wide(logits), -1)
        targets = (1 - smoothing) * targets + smoothing / targets.shape[-1]
        weights = 1 if weights is None else weights.to(log_p)
        # 1 - p = -expm1(log p): exact where p is near 1, and its power has a finite slope there
        return -(weights * targets * (-torch.expm1(log_p)).clamp(min=1e-12) ** gamma * log_p).sum(-1).mean()


def gatekeeper_loss(logits, targets, weights=None, alpha=0.5):
    """Right answers get surer, wrong ones unsure (arXiv:2502.19335): alpha CE where right, (1 - alpha) KL(p | uniform).

    For fine-tuning a small model that defers to a larger one; a small alpha defers more.
    """
    with exact(logits):
        log_p = F.log_softmax(wide(logits), -1)
        right = log_p.argmax(-1) == targets.argmax(-1)
        each = -(targets * log_p * (1 if weights is None else weights.to(log_p))).sum(-1)
        kl = (log_p.exp() * log_p).sum(-1) + math.log(log_p.shape[-1])
        return torch.where(right, alpha * each, (1 - alpha) * kl).mean()


def selective_loss(logits, gate, targets, aux=None, weights=None, coverage=0.7, penalty=32.0, alpha=0.5):
    """SelectiveNet (arXiv:1901.09192): the risk of what `gate` [B] (logits) selects, which is to be `coverage`.

    aux [B, C]: logits of a head that answers everything; None: the same.
    """
    with exact(logits):
        log_p = F.log_softmax(wide(logits), -1)
        each = -(targets * log_p * (1 if weights is None else weights.to(log_p))).sum(-1)
        g = wide(gate).sigmoid()
        risk = (g * each).sum() / g.sum().clamp(min=1e-12) + penalty * (coverage - g.mean()).clamp(min=0) ** 2
        everything = soft_cross_entropy(logits if aux is None else aux, targets, weights)
        return alpha * risk + (1 - alpha) * everything


def supcon_loss(features, targets, temperature=0.07):
    """Features [B, D] of one class attract each other (arXiv:2004.11362).

    A pair counts t_i . t_j: 1 or 0 of plain labels. Images without a partner are left out; no pair at all gives 0.
    """
    with exact(features):
        z = F.normalize(wide(features), dim=-1)
        alone = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_p = (z @ z.mT / temperature).masked_fill(alone, -1e9).log_softmax(-1)
        pairs = (wide(targets) @ wide(targets).mT).masked_fill(alone, 0)
        partners = pairs.sum(-1)
        each = -(pairs * log_p).sum(-1) / partners.clamp(min=1e-12)
        return (each * (partners > 0)).sum() / (partners > 0).sum().clamp(min=1)


def conformal_loss(logits, targets, weights=None, alpha=0.02, temperature=0.1, share=1.0):
    """Cross entropy + share * false alarms at a threshold that misses at most alpha of class 1 (arXiv:2510.08748).

    Two classes. The even images of the call fit the threshold by conformal risk control, an order statistic of their
    positives through which the gradient flows; the negatives among the odd ones count, through a sigmoid. Fewer than
    1 / alpha - 1 positives: the lowest of them; none: cross entropy alone.
    """
    with exact(logits):
        score, positive = wide(logits[:, 1]) - wide(logits[:, 0]), targets[:, 1] > 0.5
        fitted, alarms = score[::2][positive[::2]].sort().values, score[1::2][~positive[1::2]]
        loss = soft_cross_entropy(logits, targets, weights)
        if not len(fitted) or not len(alarms):
            return loss
        threshold = fitted[max(0, math.floor(alpha * (len(fitted) + 1) - 1 + 1e-9))]  # so many may be missed
        return loss + share * ((alarms - threshold) / temperature).sigmoid().mean()


def soft_ranks(scores, tau):
    """NeuralSort (arXiv:1903.08850): [n] -> [n, n], row k says softly which one is the k-th largest."""
    n = len(scores)
    factors = n + 1 - 2 * torch.arange(1, n + 1, device=scores.device)
    distances = (scores[:, None] - scores).abs().sum(1)
    return ((factors[:, None] * scores - distances) / tau).softmax(-1)


def cascade_loss(stages, positive, budgets, log_sigma, tau=None):
    """LCRON (arXiv:2503.09492): positives [n] should survive all stages [T, n] of scores, of which t keeps budgets[t].

    log_sigma [1 + T], learned: the uncertainty of the end-to-end term and of each stage. tau, for scores of spread 1:
    None is n, since soft ranks sharpen with n (100 images, tau 20: recall at the budget fell from 0.7 to 0.3). Begin
    with cross entropy: from nothing one run of four stayed below it.
    """
    with exact(stages):
        tau = stages.shape[1] if tau is None else tau
        terms, kept, lost = [], 1, 0
        for scores, budget in zip(wide(stages), budgets):
            ranks = soft_ranks(scores, tau)
            mass = ranks.sum(0).detach()
            keep = ranks[:budget].sum(0) / mass
            lose = (ranks[budget:].sum(0) / mass).detach() + keep.detach() - keep  # 1 - keep, exact near 0
            kept, lost = kept * keep, lost + kept * lose
            terms.append((keep, lose))
        right = torch.stack([torch.where(positive.bool(), *pair) for pair in [(kept, lost), *terms]])  # [1 + T, n]
        terms = -right.clamp(min=1e-30).log().sum(-1)
        return (terms / (2 * (2 * log_sigma).exp()) + log_sigma).sum()


def survivors(stages, budgets):
    """Which of n items a cascade keeps, for recall at its budget: [T, n] of scores -> bool [n].

    Stage t keeps the budgets[t] highest of those that came to it.
    """
    kept = torch.arange(stages.shape[1], device=stages.device)
    for scores, budget in zip(stages, budgets):
        kept = kept[scores[kept].topk(min(budget, len(kept))).indices]
    return torch.zeros(stages.shape[1], dtype=torch.bool, device=stages.device).index_fill(0, kept, True)


def curriculum_loss(logits, targets, weights=None, share=0.5, until=0.5, smoothing=0.0, *, progress=1.0):
    """Cross entropy of the easiest images of the call, those with the least loss (arXiv:1904.03626, section 3.2).

    At progress 0 of the run they are this share of the images, at `until` and later all. until=0: no curriculum.
    """
    with exact(logits):
        each = F.log_softmax(wide(logits), -1) * (1 if weights is None else weights.to(wide(logits)))
        each = -(((1 - smoothing) * targets + smoothing / targets.shape[-1]) * each).sum(-1)
        share = 1.0 if progress >= until else share + (1 - share) * progress / until
        return each.topk(max(1, round(share * len(each))), largest=False).values.mean()


def distilled_rows(targets, views, temperature=1.0, share=0.5):
    """Targets [B, C] of a student of one view: (1 - share) own + share of a teacher's logits [B, V, C] of many views.

    The teacher's row is the mean over its views of softmax(logits / temperature) (arXiv:1503.02531).
    """
    return (1 - share) * targets + share * (wide(views) / temperature).softmax(-1).mean(1)


def reversed_gradient(x, strength):
    """x itself; its gradient changes sign (DANN, arXiv:1505.07818): what reads it learns, what made it unlearns."""
    return x.detach() + strength * (x.detach() - x)


def reversal_strength(progress):
    """How strongly to reverse at this share of the run: from 0 to nearly 1 (DANN's schedule)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


# name -> function of (logits, targets, weights, its numbers); selective, supcon and cascade read more than logits
OBJECTIVES = dict(ce=soft_cross_entropy, focal=focal_loss, gatekeeper=gatekeeper_loss, conformal=conformal_loss)
OBJECTIVES |= dict(curriculum=curriculum_loss)
