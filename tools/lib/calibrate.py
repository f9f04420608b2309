"""From logits to probabilities that come true as often as they say. Copyable: imports numpy and torch only.

    fit, apply = METHODS["temperature"]
    found = fit(logits, labels)          # logits [N, C], labels [N] 0..C-1 of val_calib -> plain dict, ready for JSON
    p = apply(found, logits)             # -> float64 [N, C]; rows sum to 1

slices [N]: values of a fact such as the weather; each value with 100 samples and every class has a fit of its own.
Binary methods judge class 1 of two classes; of more, each class against the rest, then rows are divided by their sum.
"""

import numpy as np
import torch
from torch.nn import functional as F

OWN_FIT = 100  # samples from which a slice is fitted alone
RIDGE = 1e-6  # keeps weights finite where the classes can be told apart without error


def check(logits, labels, absent_ok=False):
    """-> float64 [N, C], int [N]; refuses what cannot be calibrated."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape}, labels {labels.shape}: calibration needs [N, C] and [N], C above 1")
    if not np.isfinite(logits).all():
        raise ValueError(f"logits of {(~np.isfinite(logits)).any(1).sum()} samples are not finite; look at the model")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: classes are 0 to {logits.shape[1] - 1}")
    counts = np.bincount(labels.astype(int), minlength=logits.shape[1])
    if (counts > 0).sum() < 2:
        raise ValueError(f"all {len(labels)} labels are {counts.argmax()}: calibration needs samples of two classes")
    if counts.min() == 0 and not absent_ok:
        raise ValueError(f"no sample of class {counts.argmin()}: use temperature, or add samples of it")
    return logits, labels.astype(int)


def minimise(loss, start):
    """The parameters of a smooth loss, by L-BFGS in float64."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([w], 1, 300, None, 1e-9, 1e-12, line_search_fn="strong_wolfe")

    def closure():
        w.grad = None
        (value := loss(w)).backward()
        return value

    opt.step(closure)
    return w.detach().numpy()


def log_softmax(z):
    """Over the last axis."""
    return z - np.logaddexp.reduce(z, -1)[..., None]


def softmax(z):
    return np.exp(log_softmax(z))


def sigmoid(s):
    return np.exp(-np.logaddexp(0, -s))


def rows(x, weights):
    return (x[:, None] * weights).sum(2)  # x @ weights.T, but BLAS rounds a row by where it stands in the batch


COLDEST, HOTTEST = 0.1, 10.0


def fit_temperature(logits, labels):
    """p = softmax(z / T), T from 0.1 to 10 (Guo 2017); the loss is convex in 1 / T, so a clipped optimum is one."""
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    return {
        "temperature": float(1 / np.clip(minimise(lambda w: F.cross_entropy(z * w, y), 1.0), 1 / HOTTEST, 1 / COLDEST))
    }


def fit_vector(logits, labels):
    """p = softmax(a * z + b), a and b per class (Guo 2017)."""
    z, y, pull = torch.from_numpy(logits), torch.from_numpy(labels), torch.tensor([[1.0], [0.0]])
    loss = lambda w: F.cross_entropy(z * w[0] + w[1], y) + RIDGE * (w - pull).square().sum()  # noqa: E731
    a, b = minimise(loss, np.repeat(pull.numpy(), logits.shape[1], 1))
    return {"scale": a.tolist(), "bias": b.tolist()}


def fit_dirichlet(logits, labels, off_diagonal=0.01, bias=0.01):
    """p = softmax(W ln p + b); weights off the diagonal and b are kept small (ODIR; Kull 2019, arXiv:1910.12656)."""
    log_p, y, eye = torch.from_numpy(log_softmax(logits)), torch.from_numpy(labels), torch.eye(C := logits.shape[1])

    def loss(w):
        W, b = w[:, :C], w[:, C]
        odir = off_diagonal * (W * (1 - eye)).square().sum() / (C * (C - 1)) + bias * b.square().mean()
        return F.cross_entropy(log_p @ W.T + b, y) + odir + RIDGE * (W - eye).square().sum()

    w = minimise(loss, np.eye(C, C + 1))
    return {"weights": w[:, :C].tolist(), "bias": w[:, C].tolist()}


WHOLE = {  # name: (fit, found and logits -> logits)
    "temperature": (fit_temperature, lambda f, z: z / f["temperature"]),
    "vector": (fit_vector, lambda f, z: z * np.array(f["scale"]) + np.array(f["bias"])),
    "dirichlet": (fit_dirichlet, lambda f, z: rows(log_softmax(z), np.array(f["weights"])) + np.array(f["bias"])),
}


def logistic(features, targets):
    """Weights [F] of a logistic regression of targets 0..1 on features [N, F]."""
    x, t = torch.from_numpy(features), torch.from_numpy(targets)
    loss = lambda w: F.binary_cross_entropy_with_logits(x @ w, t) + RIDGE * w.square().sum()  # noqa: E731
    return minimise(loss, np.zeros(features.shape[1]))


def fit_platt(s, y):
    """sigmoid(a s + b) on targets (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) (Platt 1999)."""
    targets = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
    return dict(zip("ab", logistic(np.stack([s, np.ones_like(s)], 1), targets).tolist()))


def beta_features(s):
    """ln p, -ln(1 - p), 1."""
    return np.stack([-np.logaddexp(0, -s), np.logaddexp(0, s), np.ones_like(s)], 1)


def fit_beta(s, y):
    """logit q = a ln p - b ln(1 - p) + c, a and b >= 0 (Kull 2017): the best of all sets of terms that is valid."""
    x, found = beta_features(s), []
    for kept in ([0, 1, 2], [0, 2], [1, 2], [2]):
        w = np.zeros(3)
        w[kept] = logistic(x[:, kept], y.astype(np.float64))
        found += [(np.mean(np.logaddexp(0, x @ w) - y * (x @ w)), w.tolist())] if w[:2].min() >= 0 else []
    return dict(zip("abc", min(found)[1]))


def pav(x, y):
    """Isotonic regression -> blocks (mean x, mean y, number), means of y rising; equal x are pooled first."""
    x, place, n = np.unique(x, return_inverse=True, return_counts=True)
    blocks = []
    for a, b, m in zip(x, np.bincount(place, y) / n, n):
        while blocks and blocks[-1][1] >= b:
            a0, b0, m0 = blocks.pop()
            a, b, m = (a0 * m0 + a * m) / (m0 + m), (b0 * m0 + b * m) / (m0 + m), m0 + m
        blocks.append((a, b, m))
    return np.array(blocks).T


def fit_isotonic(s, y):
    """Straight lines between the centres of rising blocks (Zadrozny 2002); never nearer to 0 or 1 than 1 / (n + 2)."""
    x, q, _ = pav(sigmoid(s), y)
    return {"x": x.tolist(), "y": np.clip(q, 1 / (len(s) + 2), 1 - 1 / (len(s) + 2)).tolist()}


def shares(s, y, bins):
    """Bins of equal mass: borders, bin of each sample, share of y under Beta(1, 1), (k + 1) / (n + 2)."""
    values, place, n = np.unique(s, return_inverse=True, return_counts=True)
    bin_of = np.unique((np.cumsum(n) - n) * bins // len(s), return_inverse=True)[1]
    last, member = np.flatnonzero(np.diff(bin_of)), bin_of[place]
    return (values[last] + values[last + 1]) / 2, member, (np.bincount(member, y) + 1) / (np.bincount(member) + 2)


def fit_histogram(s, y):
    """The share of the class in 15 bins of equal mass (Zadrozny 2001)."""
    return dict(zip(("borders", "y"), (values.tolist() for values in shares(s, y, 15)[::2])))


def fit_spline(s, y):
    """A rising cubic (Fritsch 1980) through the log odds of 6 to 20 bins of equal mass."""
    _, member, share = shares(s, y, int(np.clip(len(s) // 50, 6, 20)))
    x, q, _ = pav((np.bincount(member, s) / np.bincount(member))[member], share[member])
    return {"x": x.tolist(), "y": (np.log(q) - np.log1p(-q)).tolist()}


def apply_spline(found, s):
    """Beyond the outer knots a straight line, no steeper than the model itself."""
    x, y = np.array(found["x"]), np.array(found["y"])
    if len(x) == 1:
        return np.full(len(s), sigmoid(y[0]))
    h, d = np.diff(x), np.diff(y) / np.diff(x)
    near, far = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    slope = np.concatenate([d[:1], (near + far) / (near / d[:-1] + far / d[1:]), d[-1:]])
    k = np.clip(np.searchsorted(x, s, side="right") - 1, 0, len(d) - 1)
    t = np.clip((s - x[k]) / h[k], 0, 1)
    inside = y[k] * (1 + 2 * t) * (1 - t) ** 2 + y[k + 1] * t**2 * (3 - 2 * t)
    inside += h[k] * t * (1 - t) * (slope[k] * (1 - t) - slope[k + 1] * t)
    return sigmoid(inside + np.minimum(s - x[0], 0) * min(d[0], 1) + np.maximum(s - x[-1], 0) * min(d[-1], 1))


ONE = {  # s [N]: log odds of a class, y [N]: is it this class? name: (fit(s, y), found and s -> probability)
    "platt": (fit_platt, lambda f, s: sigmoid(f["a"] * s + f["b"])),
    "beta": (fit_beta, lambda f, s: sigmoid(rows(beta_features(s), np.array([[f["a"], f["b"], f["c"]]]))[:, 0])),
    "isotonic": (fit_isotonic, lambda f, s: np.interp(sigmoid(s), f["x"], f["y"])),
    "histogram": (fit_histogram, lambda f, s: np.array(f["y"])[np.searchsorted(f["borders"], s)]),
    "spline": (fit_spline, apply_spline),
}


def against_rest(logits):
    """Log odds [N, C] of each class against all others; of two classes those of class 1 alone, [N, 1]."""
    odds = logits - np.stack([np.logaddexp.reduce(np.delete(logits, k, 1), 1) for k in range(logits.shape[1])], 1)
    return odds[:, 1:] if odds.shape[1] == 2 else odds


def fit_one(name, logits, labels):
    if name in WHOLE:
        return WHOLE[name][0](logits, labels)
    odds = against_rest(logits).T
    return {"classes": [ONE[name][0](s, labels == k) for k, s in enumerate(odds, logits.shape[1] - len(odds))]}


def apply_one(name, found, logits):
    if name in WHOLE:
        return softmax(WHOLE[name][1](found, logits))
    p = np.stack([ONE[name][1](one, s) for one, s in zip(found["classes"], against_rest(logits).T)], 1)
    return np.concatenate([1 - p, p], 1) if p.shape[1] == 1 else p / p.sum(1, keepdims=True)


def method(name):
    def fit(logits, labels, slices=None):
        logits, labels = check(logits, labels, absent_ok=name == "temperature")
        found, slices = fit_one(name, logits, labels), np.asarray(() if slices is None else slices).astype(str)
        for value in np.unique(slices).tolist():
            part = slices == value
            if part.sum() >= OWN_FIT and len(np.unique(labels[part])) == logits.shape[1]:
                found.setdefault("slices", {})[value] = fit_one(name, logits[part], labels[part])
        return found

    def apply(found, logits, slices=None):
        logits, own = np.asarray(logits, np.float64), found.get("slices", {})
        if own and slices is None:
            raise ValueError(f"this {name} was fitted for slices {', '.join(own)}: give the slice of each sample")
        p = apply_one(name, found, logits)
        for value, part in own.items():
            member = np.asarray(slices).astype(str) == value
            p[member] = apply_one(name, part, logits[member])
        return p

    return fit, apply


METHODS = {name: method(name) for name in "temperature vector platt beta isotonic histogram dirichlet spline".split()}
