"""Do two sets of samples come from one place? Distances between them, and how often chance makes them as large.

    found = compare({"largest probability": (reference [N], current [M])}, groups, embeddings=(X [N, D], Y [M, D]))
    found["p"]                              # of all statistics together: below 0.01 in 1 of 100 without a shift
    found["statistics"]["psi largest probability"]      # {value, p}

Each p-value comes from dealing whole groups (scenes, patients) to the two sides anew, so that no distribution is
assumed and pictures of one scene count as one; the largest deviation among all statistics, each in units of its own
spread over the deals, makes one p-value of all of them (Westfall and Young's max T).
"""

import numpy as np

BINS = 10
MOST = 2000  # samples of each side behind the kernel of MMD: its matrix has their square
FEWEST = 8  # groups of each side


def bins_of(values, bins=BINS):
    """Place [N] of each value among equal parts of all of them; ties stay together."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


def shares(member, codes):
    """member [B, N] bool, codes [N] -> shares of each code among members and among the others [B, K] twice."""
    hot = (codes[:, None] == np.unique(codes)).astype(np.float32)
    inside, everywhere = member @ hot, hot.sum(0)
    n = member.sum(1, keepdims=True)
    return inside / n, (everywhere - inside) / (len(codes) - n)


def psi(member, codes):
    """Population stability index: sum of (p - q) log(p / q), half a sample added to each part."""
    n, m = member.sum(1, keepdims=True), (1 - member).sum(1, keepdims=True)
    p, q = shares(member, codes)
    k = p.shape[1]
    p, q = (p * n + 0.5) / (n + 0.5 * k), (q * m + 0.5) / (m + 0.5 * k)
    return ((p - q) * np.log(p / q)).sum(1)


def kolmogorov(member, values):
    """Largest distance between the two distribution functions; equal values are one step."""
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) > 0, True)
    inside = np.cumsum(member[:, order], 1)[:, last]
    total = np.arange(1, len(values) + 1)[last]
    n = member.sum(1, keepdims=True)
    return np.abs(inside / n - (total - inside) / (len(values) - n)).max(1)


def variation(member, codes):
    """Half the sum of differences of shares: how many samples would have to be another class."""
    p, q = shares(member, codes)
    return np.abs(p - q).sum(1) / 2


def mean_shift(member, x):
    """Distance of the two means, in units of the spread of all samples around theirs."""
    n = member.sum(1, keepdims=True)
    inside = member @ x
    apart = inside / n - (x.sum(0) - inside) / (len(x) - n)
    return np.linalg.norm(apart, axis=1) / max(np.sqrt(np.square(x - x.mean(0)).sum(1).mean()), 1e-12)


def mmd(member, kernel):
    """Squared maximum mean discrepancy, biased: u' K u with u = 1/n inside, -1/m outside."""
    n = member.sum(1, keepdims=True)
    u = member / n - (1 - member) / (len(kernel) - n)
    return np.einsum("bn,bn->b", u @ kernel, u)


def gaussian_kernel(x):
    """exp(-d^2 / 2 s^2) with s the median distance."""
    square = np.square(x).sum(1)
    square = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)
    middle = np.median(square[np.triu_indices(len(x), 1)])
    return np.exp(-square / max(2 * middle, 1e-12)).astype(np.float32)


def deal(groups, current, draws, rng):
    """[1 + draws, N] float32: which samples are current; the first row as it is, the others by groups dealt anew."""
    sides = np.array([f"{g}\x00{c}" for g, c in zip(groups, current)])  # a group on both sides is two
    names, place = np.unique(sides, return_inverse=True)
    side = np.zeros(len(names), np.float32)
    side[place[current]] = 1
    few = min(int(side.sum()), int(len(side) - side.sum()))
    if few < FEWEST:
        raise ValueError(f"{few} groups on one side: at least {FEWEST} are needed to tell a shift from chance")
    dealt = np.stack([side, *(rng.permutation(side) for _ in range(draws))])
    return dealt[:, place]


def compare(columns, groups, embeddings=None, classes=None, draws=999, seed=0):
    """columns {name: (reference [N], current [M])}, groups and said classes of both; embeddings: (rows [K, D], which
    of all N + M samples they belong to [K]) -> {p, statistics {name: {value, p}}, n, m}; p: the share of random deals
    that are at least as extreme in any statistic.
    """
    n, m = len(groups[0]), len(groups[1])
    rng, current = np.random.default_rng(seed), np.repeat([False, True], [n, m])
    member = deal(np.concatenate(groups), current, draws, rng)
    found = {}
    for name, pair in columns.items():
        values = np.concatenate(pair).astype(np.float64)
        if np.ptp(values) > 0:
            found[f"psi {name}"] = psi(member, bins_of(values))
            found[f"ks {name}"] = kolmogorov(member, values)
    if classes is not None and len(np.unique(np.concatenate(classes))) > 1:
        found["label shift"] = variation(member, np.concatenate(classes))
    if embeddings is not None:
        x, at = embeddings[0].astype(np.float32), np.asarray(embeddings[1])
        found["mean shift of embeddings"] = mean_shift(member[:, at], x)
        sides = np.flatnonzero(at < n), np.flatnonzero(at >= n)
        kept = np.sort(np.concatenate([rng.permutation(side)[:MOST] for side in sides]))
        found["mmd of embeddings"] = mmd(member[:, at[kept]], gaussian_kernel(x[kept]))
    if not found:
        raise ValueError("nothing differs from sample to sample: there is nothing to compare")
    # rounding: equal deals must count as equally extreme
    table = np.round(np.stack(list(found.values()), 1).astype(np.float64), 6)  # [1 + draws, K]
    alone = (table >= table[0]).mean(0)
    # not the least p-value: of many statistics, each has its own most extreme deal, and none could be rare enough
    largest = ((table - table.mean(0)) / np.maximum(table.std(0), 1e-9)).max(1)
    one = {name: {"value": float(table[0, k]), "p": float(alone[k])} for k, name in enumerate(found)}
    return {"p": float((largest >= largest[0] - 1e-9).mean()), "statistics": one, "n": n, "m": m}
