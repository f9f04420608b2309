"""Are the samples of a stream still exchangeable with those a conformal method was calibrated on?

The test may be read after every sample.

    state = begin(scores [N, S], ["largest probability", "p of yes"])        # of val_calib
    wealth = follow(state, scores [M, S], ids)          # after each sample; state is a plain dict, for JSON
    state["lost"]                                       # None, or {picture, id, when} where wealth reached 1 / delta

Each score becomes a conformal p-value among all samples so far, uniform and independent while they are exchangeable;
bettors against that play with capital 1. Fair games rarely make anyone rich: wealth reaches 1 / delta at any time ever
with probability at most delta (Ville). Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2nd ed.,
chapter 8; jumping between bets: arXiv:2102.10439. Capital is divided over starts at every BLOCK-th sample too, so
that what was lost on a long calm stream does not hide a change: the price is a factor, not the test.

Samples of one scene that follow each other are not exchangeable, whatever the scene: give one of each.
"""

import bisect
import hashlib

import numpy as np

VERSION = 1
JUMP = 0.01  # of a bettor's capital goes anew to all its bets after each sample
BLOCK = 250  # samples between two starts
SLOPES = (-2.0, -1.0, 0.0, 1.0, 2.0)  # 1 + slope * (p - 1/2)
POWERS = (0.3, 0.6)  # e * p^(e - 1), and of 1 - p: few samples that are very odd
BETS = len(SLOPES) + 2 * len(POWERS)


def bets(p):
    """What one unit on each bet becomes; each has mean 1 when p is uniform."""
    low, high = max(p, 1e-12), max(1 - p, 1e-12)
    powers = [e * x ** (e - 1) for x in (low, high) for e in POWERS]
    return np.array([1 + slope * (p - 0.5) for slope in SLOPES] + powers)


def chance(name, salt):
    """A number in (0, 1] that is a function of a sample's id: ties are broken the same way after a restart."""
    digest = hashlib.sha256(f"{salt} {name}".encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:7], "big") + 1) / 256**7


def begin(scores, names, delta=0.01):
    """State before the first sample; scores [N, S]: of the calibration samples, larger is odder."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] != len(names) or len(scores) < 10 or not np.isfinite(scores).all():
        what = f"scores {scores.shape} of {len(names)} names"
        raise ValueError(f"{what}: at least 10 finite calibration scores are needed")
    return {"version": VERSION, "names": list(names), "delta": delta, "seen": 0, "lost": None, "most": 1.0,
            "scores": np.sort(scores, 0).T.tolist(), "capital": [[] for _ in names], "last": None}  # fmt: skip


def share_of_start(k):
    """Of the capital, for start number k = 0, 1, ...; all of them together 1."""
    return 1 / ((k + 1) * (k + 2))


def rank_of(past, score, u):
    """Of a score among sorted past ones and itself; past is kept sorted."""
    below, upto = bisect.bisect_left(past, score), bisect.bisect_right(past, score)
    past.insert(upto, score)
    return (len(past) - 1 - upto + u * (upto - below + 1)) / len(past)


def follow(state, scores, ids, when=None):
    """Play on with samples in order -> wealth after each [M]; state is changed. when: text of the moment, for lost."""
    scores, out = np.asarray(scores, np.float64), []
    if scores.shape != (len(ids), len(state["names"])) or not np.isfinite(scores).all():
        raise ValueError(f"scores {scores.shape} for {len(ids)} samples and {len(state['names'])} names, or not finite")
    capital = [np.array(c, np.float64).reshape(-1, BETS) for c in state["capital"]]
    for row, name in zip(scores.tolist(), ids):
        starts, new = divmod(state["seen"], BLOCK)
        wealth = 0.0
        for s, past in enumerate(state["scores"]):
            if new == 0:
                capital[s] = np.vstack([capital[s], np.full(BETS, share_of_start(starts) / BETS)])
            c = capital[s]
            c += JUMP * (c.sum(1, keepdims=True) / BETS - c)
            p = rank_of(past, row[s], chance(name, f"{state['names'][s]} {state['seen']}"))
            c *= bets(p)
            waiting = 1 / (starts + 2)  # shares of the starts that are still to come
            wealth += (c.sum() + waiting) / len(capital)
        state["seen"] += 1
        state["most"] = max(state["most"], wealth)
        if state["lost"] is None and wealth >= 1 / state["delta"]:
            state["lost"] = {"picture": state["seen"], "id": str(name), "when": when}
        if wealth > 1e100:  # decided long ago; larger numbers would end as infinity
            capital = [c / wealth for c in capital]
        out.append(wealth)
    state["capital"] = [c.tolist() for c in capital]
    state["last"] = out[-1] if out else state["last"]
    return np.array(out)
