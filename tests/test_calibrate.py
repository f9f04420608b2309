"""Calibrators: planted miscalibration is undone, calibrated data stays, what cannot be fitted is one sentence."""

import itertools
import json

import numpy as np
import pytest

from tools.lib import calibrate as c
from tools.lib import fusion, metrics, rules


def planted(seed, n, C, bend):
    """Logits of a model and labels drawn from what `bend` makes of them: bend is what calibration must find."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(n, C)) * 1.5
    truth = c.log_softmax(bend(z))
    labels = (np.exp(truth).cumsum(1) < random.random((n, 1))).sum(1).clip(0, C - 1)
    return z, labels


def over_confident(z):
    return z / 3


def affine(z):
    return z / 2 + np.array([-0.5, 0.5])


def shifted(z):
    return z * np.linspace(0.5, 1.2, z.shape[1]) + np.linspace(-1, 1, z.shape[1])


def mixed(z):
    """Classes that are taken for their neighbours, one of them too often: only a matrix and a bias undo it."""
    turn = np.eye(z.shape[1]) * 0.6 + np.roll(np.eye(z.shape[1]), 1, 1) * 0.5
    return c.log_softmax(z) @ turn + np.linspace(-1, 1, z.shape[1])


def beta_bent(z):
    s = z[:, 1:] - z[:, :1]
    q = c.beta_features(s[:, 0]) @ np.array([0.3, 1.5, 0.8])
    return np.stack([q * 0, q], 1)


def stepped(z):
    s = z[:, 1] - z[:, 0]
    q = np.where(s < -1, -1.5, np.where(s < 1.5, 0.0, 1.0))
    return np.stack([q * 0, q], 1)


def curved(z):
    s = z[:, 1] - z[:, 0]
    return np.stack([s * 0, np.tanh(s) * 1.2 + 0.05 * s], 1)


PLANTED = {  # method: the distortion that it is made for, classes, share of the avoidable NLL that it must remove
    "temperature": (over_confident, 4, 0.95),
    "vector": (shifted, 3, 0.95),
    "dirichlet": (mixed, 3, 0.99),
    "platt": (affine, 2, 0.95),
    "beta": (beta_bent, 2, 0.95),
    "isotonic": (stepped, 2, 0.85),
    "histogram": (stepped, 2, 0.85),
    "spline": (curved, 2, 0.9),
}


def nll(z, y):
    return metrics.nll(y, np.exp(c.log_softmax(z)))


@pytest.mark.parametrize("name", c.METHODS)
def test_each_method_undoes_its_own_distortion_on_new_data(name):
    bend, C, share = PLANTED[name]
    z, y = planted(0, 4000, C, bend)
    fresh, truth = planted(1, 8000, C, bend)
    fit, apply = c.METHODS[name]
    p = apply(fit(z, y), fresh)
    before, best = nll(fresh, truth), nll(bend(fresh), truth)
    assert before - best > 0.02, "nothing was planted"
    assert before - metrics.nll(truth, p) > share * (before - best)
    assert metrics.calibration_errors(truth, p)["ece"] < 0.03
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-9)
    assert p.dtype == np.float64 and p.min() >= 0


@pytest.mark.parametrize("name", c.METHODS)
@pytest.mark.parametrize("C", [2, 3])
def test_calibrated_data_stays_as_it_is_and_a_round_trip_changes_nothing(name, C):
    z, y = planted(2, 6000, C, lambda z: z)
    fit, apply = c.METHODS[name]
    found = fit(z, y)
    p, q = apply(found, z), np.exp(c.log_softmax(z))
    assert np.abs(p - q).mean() < (0.02 if name in c.WHOLE or name in ("platt", "beta") else 0.04)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert (apply(again, z) == p).all()
    order = np.random.default_rng(0).permutation(len(z))
    np.testing.assert_allclose(apply(fit(z[order], y[order]), z), p, atol=1e-5)
    assert (apply(found, z[:100]) == p[:100]).all() and (apply(found, z[7:8]) == p[7:8]).all()
    if name == "temperature":
        assert (p.argmax(1) == z.argmax(1)).all() and 0.9 < found["temperature"] < 1.1


@pytest.mark.parametrize("name", c.METHODS)
def test_what_cannot_be_fitted_is_a_sentence(name):
    z, y = planted(3, 60, 3, lambda z: z)
    fit, _ = c.METHODS[name]
    with pytest.raises(ValueError, match="all 60 labels are 1"):
        fit(z, y * 0 + 1)
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        fit(z, y - 1)
    with pytest.raises(ValueError, match="1 samples are not finite"):
        fit(np.where(np.arange(60)[:, None] == 7, np.nan, z), y)
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        fit(z, y[:50])
    if name == "temperature":
        assert fit(z, y % 2)["temperature"] > 0
    else:
        with pytest.raises(ValueError, match="no sample of class 2: use temperature"):
            fit(z, y % 2)


@pytest.mark.parametrize("name", c.METHODS)
def test_hard_data_gives_finite_probabilities(name):
    """Classes without overlap, all scores tied, huge logits, two samples."""
    fit, apply = c.METHODS[name]
    y = np.arange(40) % 2
    for z in (np.stack([-5.0 * y, 5.0 * y], 1), np.zeros((40, 2)), np.stack([-90.0 * y, 90.0 * y], 1)):
        p = apply(json.loads(json.dumps(fit(z, y), allow_nan=False)), np.concatenate([z, [[100.0, -100], [-100, 100]]]))
        assert np.isfinite(p).all() and np.abs(p.sum(1) - 1).max() < 1e-9
    assert np.isfinite(apply(fit(z[:2], y[:2]), z)).all()


def test_temperature_and_platt_are_the_best_of_a_grid():
    z, y = planted(4, 500, 3, over_confident)
    found = c.METHODS["temperature"][0](z, y)["temperature"]
    grid = np.geomspace(0.1, 10, 2001)
    assert found == pytest.approx(grid[np.argmin([nll(z / t, y) for t in grid])], rel=0.01)
    z, y = planted(5, 300, 2, shifted)
    one = c.METHODS["platt"][0](z, y)["classes"][0]
    n = np.bincount(y)
    t = np.where(y == 1, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))
    s = z[:, 1] - z[:, 0]

    def loss(a, b):
        return np.mean(np.logaddexp(0, a * s + b) - t * (a * s + b))

    best = loss(one["a"], one["b"])
    assert all(best <= loss(one["a"] + da, one["b"] + db) for da in (-0.01, 0, 0.01) for db in (-0.01, 0, 0.01))


def slow_isotonic(x, y):
    """min over later, max over earlier means: the definition."""
    x, y = np.asarray(x), np.asarray(y, float)
    values = np.unique(x)
    mean = lambda i, j: y[(x >= values[i]) & (x <= values[j])].mean()  # noqa: E731
    n = len(values)
    fit = [max(min(mean(i, j) for j in range(k, n)) for i in range(k + 1)) for k in range(n)]
    return np.array(fit)[np.searchsorted(values, x)]


def test_pav_is_isotonic_regression_with_ties():
    random = np.random.default_rng(0)
    for _ in range(5):
        x, y = np.round(random.random(40), 1), random.integers(0, 2, 40)
        _, value, size = c.pav(x, y)
        block = np.repeat(value, size.astype(int))
        assert block == pytest.approx(slow_isotonic(x, y)[np.argsort(x)])
    z, labels = planted(6, 800, 2, stepped)
    p = c.METHODS["isotonic"][1](c.METHODS["isotonic"][0](z, labels), z)[:, 1]
    assert (np.diff(p[np.argsort(z[:, 1] - z[:, 0])]) >= 0).all()


@pytest.mark.parametrize("name", ["spline", "beta", "isotonic", "temperature"])
def test_monotone_methods_never_turn_an_order_round(name):
    random = np.random.default_rng(1)
    s = np.linspace(-12, 12, 2000)
    line = np.stack([s * 0, s], 1)
    for seed in range(5):
        z = random.normal(size=(400, 2)) * 2
        y = random.integers(0, 2, 400) if seed else (z[:, 1] < z[:, 0]).astype(int)  # also of a model that is no good
        p = c.METHODS[name][1](c.METHODS[name][0](z, y), line)[:, 1]
        assert (np.diff(p) >= -1e-12).all()


def test_beta_without_negative_weights_is_the_best_of_a_grid():
    z, y = planted(7, 400, 2, lambda z: np.stack([z[:, 0] * 0, np.where(z[:, 1] > z[:, 0], 1.0, -3 * z[:, 1])], 1))
    one = c.METHODS["beta"][0](z, y)["classes"][0]
    x = c.beta_features(z[:, 1] - z[:, 0])
    loss = lambda w: np.mean(np.logaddexp(0, x @ w) - y * (x @ w))  # noqa: E731
    best = loss(np.array([one[k] for k in "abc"]))
    assert min(one["a"], one["b"]) >= 0
    axes = np.linspace(0, 2, 9), np.linspace(0, 2, 9), np.linspace(-3, 3, 25)
    grid = [np.array(point) for point in itertools.product(*axes)]
    assert best <= min(map(loss, grid)) + 1e-6


def test_histogram_is_the_share_of_its_bin():
    z, y = planted(8, 300, 2, stepped)
    s = z[:, 1] - z[:, 0]
    p = c.METHODS["histogram"][1](c.METHODS["histogram"][0](z, y), z)[:, 1]
    rank = np.argsort(np.argsort(s))
    for b in range(15):
        held = rank * 15 // 300 == b
        assert p[held] == pytest.approx((y[held].sum() + 1) / (held.sum() + 2))


def test_slices_with_100_samples_have_their_own_fit_and_others_the_common_one():
    z, y = planted(9, 600, 2, over_confident)
    cold, truth = planted(10, 600, 2, lambda z: z * 2)
    few = np.array(["fog"] * 60 + ["day"] * 540 + ["night"] * 600)
    both, labels = np.concatenate([z, cold]), np.concatenate([y, truth])
    fit, apply = c.METHODS["temperature"]
    found = fit(both, labels, few)
    assert sorted(found["slices"]) == ["day", "night"]
    assert found["slices"]["day"]["temperature"] > 2 > 1 > found["slices"]["night"]["temperature"]
    p = apply(json.loads(json.dumps(found)), both, few)
    assert (p[:60] == apply(fit(both, labels), both[:60])).all()
    assert (p[600:] == apply(found["slices"]["night"], cold)).all()
    assert (apply(found, both, np.full(1200, "snow")) == apply(fit(both, labels), both)).all()
    with pytest.raises(ValueError, match="fitted for slices day, night"):
        apply(found, both)


def test_mixture_weights_are_the_best_of_the_simplex():
    z, y = planted(11, 2000, 3, lambda z: z)
    random = np.random.default_rng(0)
    p = np.exp(np.stack([c.log_softmax(z + random.normal(size=z.shape) * noise) for noise in (0.5, 1.0, 4.0)]))
    w = np.array(rules.fit_mixture(np.log(p).swapaxes(0, 1), y)["weights"])
    assert w.sum() == pytest.approx(1) and w.min() >= 0
    score = lambda w: metrics.nll(y, np.einsum("m,mnc->nc", w, p))  # noqa: E731
    grid = [np.array([a, b, 1 - a - b]) for a in np.linspace(0, 1, 21) for b in np.linspace(0, 1 - a, 21)]
    assert score(w) <= min(map(score, grid)) + 1e-6


# poolings


@pytest.mark.parametrize("name", fusion.POOLS)
def test_a_pool_of_one_view_is_that_view_and_rows_do_not_touch(name):
    random = np.random.default_rng(0)
    pool, z = fusion.POOLS[name], random.normal(size=(30, 6, 3)) * 3
    assert c.log_softmax(pool(z[:, :1])) == pytest.approx(c.log_softmax(z[:, 0]))
    assert pool(z[:, [0, 0, 0]]) == pytest.approx(pool(z[:, :1]))
    assert pool(z)[4:9] == pytest.approx(pool(z[4:9])) and pool(z).shape == (30, 3)
    order = [0, *(random.permutation(5) + 1)] if name == "whole_topk" else random.permutation(6)
    assert pool(z[:, order]) == pytest.approx(pool(z))
    tensor = fusion.torch.tensor(z, requires_grad=True)
    assert pool(tensor).detach().numpy() == pytest.approx(pool(z))
    pool(tensor).sum().backward()
    assert tensor.grad.isfinite().all()


def test_pools_by_hand():
    z = np.array([[[0.0, 4.0], [3.0, 0.0], [0.0, 1.0]]])
    pools, p = fusion.POOLS, np.exp(c.log_softmax(z[0]))
    assert pools["topk"](z, k=3) == pytest.approx(z.mean(1)) == pools["mean"](z)
    assert pools["topk"](z) == pytest.approx(z[:, :2].mean(1))
    assert pools["topk_positive"](z) == pytest.approx(z[:, [0, 2]].mean(1))
    assert pools["whole_topk"](z, k=1) == pytest.approx((z[:, 0] + z[:, 2]) / 2)
    assert pools["area"](z, areas=[4, 1, 1]) == pytest.approx(np.array([4, 1, 1]) / 6 @ z[0][None])
    with pytest.raises(ValueError, match="2 areas for 3 views"):
        pools["area"](z, areas=[1, 2])
    assert np.exp(pools["logsumexp"](z)) == pytest.approx(p.mean(0)[None])
    assert np.exp(pools["max"](z)) == pytest.approx(p.max(0)[None])
    entropy = -(p * np.log(p)).sum(1)
    assert pools["certain"](z) == pytest.approx((entropy**-2 / (entropy**-2).sum()) @ z[0][None])


def test_calibrators_agree_with_scikit_learn_where_it_is_installed():
    isotonic = pytest.importorskip("sklearn.isotonic")
    calibration = pytest.importorskip("sklearn.calibration")
    z, y = planted(12, 700, 2, shifted)
    s = z[:, 1] - z[:, 0]
    x, value, size = c.pav(c.sigmoid(s), y)
    theirs = isotonic.IsotonicRegression().fit(c.sigmoid(s), y).predict(np.sort(c.sigmoid(s)))
    assert np.repeat(value, size.astype(int)) == pytest.approx(theirs, abs=1e-7)
    a, b = calibration._sigmoid_calibration(s, y)  # Platt: sigmoid(-(a s + b))
    one = c.METHODS["platt"][0](z, y)["classes"][0]
    assert (one["a"], one["b"]) == pytest.approx((-a, -b), abs=1e-3)
