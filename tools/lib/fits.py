"""Fits on few samples: folds of whole patients, logistic regression, neighbours, a ruler; many fits at once.

Imports numpy and torch only. X [n, d] are the features of n samples, labels 0..K-1, groups their
patients. A fit is given by a mask [n] of the rows that it may see, a test by a mask of those that it predicts.

    folds = group_folds(labels, groups, 5, seed=0)
    tests = np.stack([folds == k for k in range(5)])
    p, settings = held_out({"probe": (logistic, [X])}, labels, groups, [(~tests, tests)])     # p["probe"] [1, n, K]

Letters: n samples, d features, K classes, B fits at once (folds), R repeats (seeds), r axes of the training rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

FOLDS, INNER = 5, 3  # INNER: folds of training patients that choose C or k
PATH = 10.0 ** np.linspace(-6, 5, 45)  # of linear_probe, as in the published evaluations of DINOv2
CS = 10.0 ** np.arange(-5, 1)  # of |w|^2 / 2 + C * sum of losses, features standardised; 10 would double the time
KS = np.array([1, 3, 5, 10, 20, 50])


# ----- folds


def group_folds(labels, groups, folds, seed):
    """Fold of each sample [n]: whole groups, classes spread evenly, large groups first."""
    names, member = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), labels.max() + 1))
    np.add.at(counts, (member, labels), 1)
    carriers = (counts > 0).sum(0)
    if (fewest := carriers[np.unique(labels)].min()) < 2 or folds < 2:
        raise ValueError(f"a class has {fewest:.0f} patient or group: cross-validation needs at least 2 of each class")
    order = np.random.default_rng((seed, len(labels))).permutation(len(names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    load, fold = np.zeros((folds, counts.shape[1])), np.zeros(len(names), int)
    share = counts / np.maximum(counts.sum(0), 1)
    for g in order:
        fold[g] = np.lexsort((load.sum(1), load @ share[g]))[0]
        load[fold[g]] += share[g]
    return fold[member]


def fold_count(labels, groups, most=FOLDS):
    """As many as the rarest class has patients, at most `most`."""
    return min(most, *(len(np.unique(groups[labels == k])) for k in np.unique(labels)))


def plan_cv(labels, groups, classes, repeats):
    """Per repeat a draw of up to FOLDS stratified folds of whole patients: (fit masks [B, n], test masks [B, n]).

    None where a class has too few patients.
    """
    plans, count = [], fold_count(labels, groups) if set(labels.tolist()) == set(range(classes)) else 0
    for r in range(repeats if count > 1 else 0):
        folds = group_folds(labels, groups, count, 100 + r)
        tests = np.stack([folds == k for k in range(count)])
        if min(fold_count(labels[~test], groups[~test]) for test in tests) > 1:
            plans.append((~tests, tests))
    return plans if len(plans) == repeats else None


# ----- classifiers: many fits at once  <- change the head here


class Rotated(NamedTuple):
    """Features standardised by some rows, and the axes of the span of these rows."""

    scaled: torch.Tensor  # [n, d] of all rows
    axes: torch.Tensor  # [d, r]; scaled @ axes are the rotated features
    s2: torch.Tensor  # [r] sums of squares along them
    keep: torch.Tensor  # [r] bool: axes along which the rows differ
    mean: torch.Tensor  # [d]
    divisor: torch.Tensor  # [d]; infinite where all rows agree


def rotate(X, mask):
    """Exact for ridge-penalised fits, whose solution lies in the span of the training rows."""
    deviation, mean = torch.std_mean(X[mask], 0, correction=0)
    divisor = torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, torch.inf)
    scaled = (X - mean) / divisor
    train = scaled[mask]
    if X.shape[1] <= len(train):
        s2, axes = torch.linalg.eigh(train.T @ train)
    else:
        s2, axes = torch.linalg.eigh(train @ train.T)
        axes = train.T @ (axes / s2.clamp(min=1e-300).sqrt())
    return Rotated(scaled, axes, s2, s2 > 1e-9 * s2.max().clamp(min=1e-9), mean, divisor)


def decompose(Xs, masks):
    """Standardise by each mask's rows and rotate to the axes of their span: Z [B, n, r], variances s2 [B, r].

    Xs: one [n, d] per mask.
    """
    pieces = []
    for X, mask in zip(Xs, masks):
        found = rotate(X, mask)
        pieces.append(((found.scaled @ found.axes)[:, found.keep], found.s2[found.keep]))
    width = max(len(s2) for _, s2 in pieces)
    padded = [[F.pad(part, (0, width - len(s2))) for part in (Z, s2)] for Z, s2 in pieces]
    return tuple(torch.stack(parts) for parts in zip(*padded))


@torch.no_grad()
def logistic(Z, s2, masks, labels, classes, iterations=300):
    """Log-probabilities [C, B, n, K] for every C, by one L-BFGS over all fits, scaled so that Hessians are near 1.

    Minimises mean log loss over the mask's rows + |w|^2 / (2 C rows); the bias is free.
    """
    count, outputs = masks.sum(1), 1 if classes == 2 else classes
    weight = (masks / count[:, None])[:, :, None, None]
    ridge = 1 / (torch.as_tensor(CS) * count[:, None])[:, None, :, None]  # [B, 1, C, 1]
    scale = ((s2 / count[:, None] / 4)[:, :, None, None] + ridge).rsqrt()  # [B, r, C, 1]
    v, bias = Z.new_zeros(*scale.shape[:3], outputs), Z.new_zeros(len(Z), 1, len(CS), outputs)
    truth = F.one_hot(labels, classes).to(Z)[:, None]  # [n, 1, K]

    def log_probabilities():
        logits = (Z @ (v * scale).flatten(2)).unflatten(2, v.shape[2:]) + 2 * bias  # [B, n, C, outputs]
        return (F.pad(logits, (1, 0)) if outputs == 1 else logits).log_softmax(-1)

    def closure():
        log_p, w = log_probabilities(), v * scale
        residual = ((log_p.exp() - truth) * weight)[..., -outputs:]
        v.grad = ((Z.mT @ residual.flatten(2)).view_as(w) + ridge * w) * scale  # by hand: half the time of autograd
        bias.grad = 2 * residual.sum(1, keepdim=True)
        return (ridge * w.square()).sum() / 2 - (log_p * truth * weight).sum()

    # gradients of 1e-6 leave probabilities within 1e-5 of the exact ones (C = 1: 1e-4), after 70 iterations, not 190
    optimizer = torch.optim.LBFGS([v, bias], 1, iterations, None, 1e-6, 1e-14, 20, "strong_wolfe")
    optimizer.step(closure)
    return log_probabilities().permute(2, 0, 1, 3)


def neighbours(queries, keys, truth, ks, apart=None, temperature=None):
    """Votes [len(ks), n, K] of the k nearest keys [m, D] by cosine for each query [n, D] and each k of ks.

    truth [m, K]: what a key votes for. apart [n, m]: pairs that must not vote, such as slices of one patient.
    temperature: a vote weighs exp(cosine / temperature); None: 1.
    """
    cosine = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T
    if apart is not None:
        cosine = cosine.masked_fill(torch.as_tensor(apart), -torch.inf)
    near = cosine.topk(min(max(ks), len(keys)), 1)
    weight = near.values.isfinite().to(cosine) if temperature is None else (near.values / temperature).exp()
    votes = (truth[near.indices] * weight[..., None]).cumsum(1)  # [n, most, K]
    return torch.stack([votes[:, min(k, votes.shape[1]) - 1] for k in ks])


def nearest(Z, s2, masks, labels, classes):
    """Log-probabilities [k, B, n, K] per k: neighbours among the mask's rows vote, and so does their prior."""
    truth, most = F.one_hot(labels, classes).to(Z), int(masks.sum(1).min())
    ks = [min(k, most) for k in KS.tolist()]
    votes = torch.stack([neighbours(z, z[mask], truth[mask], ks) for z, mask in zip(Z, masks)], 1)  # [k, B, n, K]
    prior = (masks.to(Z) @ truth / masks.sum(1, keepdim=True))[:, None]
    return ((votes + prior) / (torch.tensor(ks)[:, None, None, None] + 1)).log()


# ----- one linear probe, exact in float64, chosen on a split of its own


class Linear(NamedTuple):
    """logits = X @ weight.T + bias, of features as they are."""

    weight: np.ndarray  # [K, d]
    bias: np.ndarray  # [K]
    C: float
    losses: list  # mean log loss on the rows that chose, one per C of PATH


def newton(Z, s2, truth, w, bias, C, steps=50, inner=200):
    """Minimise mean log loss + |w|^2 / (2 C n) by Newton steps with conjugate gradients, beginning at w [r, o], bias.

    truth [n, o]; o = 1: log odds of class 1, else one column per class. Ends when a step would gain less than 1e-10.
    """
    n, one = len(Z), truth.shape[1] == 1
    ridge = 1 / (C * n)

    def forward(w, bias):
        logits = Z @ w + bias
        if one:
            return logits.sigmoid(), (F.softplus(logits) - truth * logits).mean() + ridge * w.square().sum() / 2
        log_p = logits.log_softmax(1)
        return log_p.exp(), -(log_p * truth).sum(1).mean() + ridge * w.square().sum() / 2

    p, value = forward(w, bias)
    for _ in range(steps):
        slope = (p - truth) / n
        gradient = torch.cat([Z.T @ slope + ridge * w, slope.sum(0, keepdim=True)])  # the bias is the last row
        curve = (p * (1 - p)).mean(0).clamp(min=1e-12)
        scale = torch.cat([(s2 / n)[:, None] * curve + ridge, curve[None]])

        def product(v, p=p):
            u = Z @ v[:-1] + v[-1]
            u = (p * (1 - p) * u if one else p * (u - (p * u).sum(1, keepdim=True))) / n
            return torch.cat([Z.T @ u + ridge * v[:-1], u.sum(0, keepdim=True)])

        step = conjugate_gradients(product, -gradient, scale, inner)
        gain = -(gradient * step).sum()
        if gain < 1e-10:
            break
        size = 1.0
        while True:
            moved = w + size * step[:-1], bias + size * step[-1]
            p, new = forward(*moved)
            if new <= value - 1e-4 * size * gain or size < 1e-6:
                break
            size /= 2
        (w, bias), value = moved, new
    return w, bias


def conjugate_gradients(product, target, scale, most):
    """Solve product(x) = target, with the diagonal `scale` as preconditioner, to 1% of the target."""
    x, r = torch.zeros_like(target), target.clone()
    z = r / scale
    d, rz = z.clone(), (r * z).sum()
    enough = 1e-4 * rz
    for _ in range(most):
        if rz <= enough:
            break
        h = product(d)
        a = rz / (d * h).sum()
        x += a * d
        r -= a * h
        z = r / scale
        before, rz = rz, (r * z).sum()
        d = z + rz / before * d
    return x


@torch.no_grad()
def linear_path(X, labels, rows, classes, cs):
    """(weight [K, d], bias [K]) of centred classes for each C, fitted on rows [n]; each begins at the one before."""
    X, rows, outputs = torch.as_tensor(X, dtype=torch.float64), torch.as_tensor(rows), 1 if classes == 2 else classes
    truth = F.one_hot(torch.as_tensor(labels)[rows], classes).double()[:, -outputs:]
    found = rotate(X, rows)
    Z, s2 = (found.scaled[rows] @ found.axes)[:, found.keep], found.s2[found.keep]
    w, bias = Z.new_zeros(Z.shape[1], outputs), Z.new_zeros(outputs)
    for C in cs:
        w, bias = newton(Z, s2, truth, w, bias, C)
        weight = F.pad((found.axes[:, found.keep] @ w / found.divisor[:, None]).T, (0, 0, classes - outputs, 0))
        offset = F.pad(bias, (classes - outputs, 0)) - weight @ found.mean
        yield (weight - weight.mean(0)).numpy(), (offset - offset.mean()).numpy()


def linear_probe(X, labels, fit, select, classes):
    """Logistic regression on the rows `fit` [n] for every C of PATH; the C of the least log loss on `select` [n] wins.

    Features are standardised inside.
    """
    for words, rows in (("to fit on", fit), ("that choose C", select)):
        if absent := set(range(classes)) - set(labels[rows].tolist()):
            raise ValueError(f"the rows {words} have no sample of class {min(absent)}; make a split that has")
    best, losses, truth = None, [], torch.as_tensor(labels[select])
    for weight, bias in linear_path(X, labels, fit, classes, PATH):
        losses.append(F.cross_entropy(torch.as_tensor(X[select] @ weight.T + bias), truth).item())
        best = (weight, bias) if losses[-1] == min(losses) else best
    return Linear(*best, float(PATH[int(np.argmin(losses))]), losses)


SETTINGS = {logistic: CS, nearest: KS}  # what `choose` chooses from


def choose(classifier, X, labels, groups, masks, seed):
    """Fit on each mask's rows with the C or k of the least log loss in patient-grouped inner folds of these rows alone.

    X [n, d], or [B, n, d] for one per mask -> log-probabilities [B, n, K] of all rows, those of the mask's own rows
    from the inner fold that left them out (what a second stage may be fitted on), and the chosen C or k [B].
    """
    owner, left_out = [], []
    for b, mask in enumerate(masks):
        inner = group_folds(labels[mask], groups[mask], fold_count(labels[mask], groups[mask], INNER), seed)
        for fold in range(inner.max() + 1):
            owner.append(b)
            left_out.append(np.flatnonzero(mask)[inner == fold])
    fits = np.concatenate([masks, masks[owner]])
    for fit, rows in zip(fits[len(masks) :], left_out):
        fit[rows] = False
    X = torch.as_tensor(X).expand(len(masks), -1, -1) if np.ndim(X) == 2 else torch.as_tensor(X)
    fits, order = torch.as_tensor(fits), [*range(len(masks)), *owner]
    rotated = decompose([X[b] for b in order], fits)
    log_p = classifier(*rotated, fits, torch.as_tensor(labels), int(labels.max()) + 1).numpy()
    loss = np.zeros((len(log_p), len(masks)))
    for j, (b, rows) in enumerate(zip(owner, left_out), len(masks)):
        loss[:, b] -= log_p[:, j, rows, labels[rows]].sum(1)
    best = loss.argmin(0)
    result = log_p[best, np.arange(len(masks))]
    for j, (b, rows) in enumerate(zip(owner, left_out), len(masks)):
        result[b, rows] = log_p[best[b], j, rows]
    return result, SETTINGS[classifier][best].tolist()


def ruler(X, labels, fit):
    """Log-probabilities [B, n, K] of one number, at the weakest penalty: there is nothing to choose.

    With several folds it is fitted on all rows, to its advantage: on four of five folds a useless number leans away
    from the fifth (AUC 0.40, 0.33 to 0.46, on 163 nodules whose label had nothing to do with size).
    """
    mask = torch.as_tensor(fit if len(fit) == 1 else np.ones_like(fit[:1]))
    fitted = logistic(*decompose(torch.as_tensor(X)[None], mask), mask, torch.as_tensor(labels), int(labels.max()) + 1)
    return fitted[-1].numpy().repeat(len(fit), 0)


# ----- a second stage, and all predictors on all folds

ALONE, BOTH = "size alone", "size and features"  # what the second stage rests on


def add_features(probe, ruled, size, labels, groups, fit, seed):
    """A second logistic regression, on size and the probe's log-odds -> log-probabilities [B, n, K], ALONE or BOTH [B].

    probe, ruled [B, n, K]: log-probabilities of probe and size; the probe's of training rows come from inner folds.
    Where on these the gain over size alone is not above one standard error over patients, it is size alone: of 60
    labels of size and noise the interval of the gain then misses 0 in 2.
    """
    odds = probe[..., 1:] - probe[..., :1]
    size = size[None].repeat(len(fit), 0)
    alone, both = (choose(logistic, X, labels, groups, fit, seed)[0] for X in (size, np.concatenate([size, odds], 2)))
    kinds = []
    for b, rows in enumerate(map(np.flatnonzero, fit)):
        _, patient = np.unique(groups[rows], return_inverse=True)
        gain = np.bincount(patient, both[b, rows, labels[rows]] - alone[b, rows, labels[rows]])
        kinds.append(BOTH if gain.sum() > gain.std() * len(gain) ** 0.5 else ALONE)
        if kinds[-1] == ALONE:
            both[b] = ruled[b]
    return both, kinds


def held_out(predictors, labels, groups, plans):
    """{name: probabilities [R, n, K]}, NaN where never tested, and {name: what was chosen, fit by fit: C, k, BOTH ...}.

    plans: per repeat (fit masks [B, n], test masks [B, n]). predictors: {name: (classifier, [X, ...])}, X of repeat r
    is Xs[r % len]. With "size" there is "size + features" too.
    """
    out, settings = {}, {}
    for r, (fit, test) in enumerate(plans):
        fitted = {}
        for name, (classifier, Xs) in predictors.items():
            X = Xs[r % len(Xs)]
            if classifier is ruler:
                fitted[name] = ruler(X, labels, fit), []
            else:
                fitted[name] = choose(classifier, X, labels, groups, fit, r)
        if "size" in fitted:
            size = predictors["size"][1][0]
            pair = fitted["probe"][0], fitted["size"][0]
            fitted["size + features"] = add_features(*pair, size, labels, groups, fit, r)
        for name, (log_p, chosen) in fitted.items():
            p = np.full(log_p.shape[1:], np.nan)
            for one, rows in zip(log_p, test):
                p[rows] = np.exp(one[rows])
            out.setdefault(name, []).append(p)
            settings.setdefault(name, []).extend(chosen)
    return {name: np.stack(parts) for name, parts in out.items()}, settings


# ----- the probe and what stands beside it  <- change the probe task here


def flatten(features, scales, parts):
    """[n, S, P, D] -> [n, d] float64: scales averaged or side by side, chosen parts side by side."""
    chosen = features[:, :, parts].astype(np.float64)
    return (chosen.mean(1) if scales == "average" else chosen).reshape(len(features), -1)


def predictors(X, untrained, pixels, sizes=None):
    """{name: (classifier, [X per repeat])}: the probe on X, the same on features of random nets, pixels, and a ruler.

    sizes [n, 2]: diameter and box in mm, of nodules.
    """
    rows = {
        "probe": (logistic, [X]),
        "k-NN": (nearest, [X]),
        "random weights": (logistic, untrained),
        "raw pixels": (logistic, [pixels]),
    }
    if sizes is not None:
        diameter, box = np.log(sizes).T[:, :, None]
        rulers = {"size": (diameter + box) / 2, "diameter": diameter, "box": box}
        rows |= {name: (ruler, [X]) for name, X in rulers.items()}
    return rows
