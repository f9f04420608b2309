"""Fits are exact and see nothing that they may not: Newton, loops and moved rows are the oracles."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.lib import fits as t
from tools.lib import metrics

torch.set_num_threads(1)

# classifiers


def newton(X, y, C, classes, steps=15):
    """Brute force: full Newton steps on 1/2 |w|^2 + C * sum of log losses, bias free -> probabilities of every row."""
    outputs = 1 if classes == 2 else classes
    d = X.shape[1]
    A = np.concatenate([X, np.ones((len(X), 1))], 1)

    def objective(theta):
        logits = torch.as_tensor(A) @ theta.view(d + 1, outputs)
        logits = torch.cat([torch.zeros_like(logits), logits], 1) if outputs == 1 else logits
        loss = -logits.log_softmax(1)[torch.arange(len(y)), torch.as_tensor(y)].sum()
        return C * loss + theta.view(d + 1, outputs)[:-1].square().sum() / 2

    theta = torch.zeros((d + 1) * outputs, dtype=torch.float64)
    for _ in range(steps):
        hessian = torch.autograd.functional.hessian(objective, theta)
        gradient = torch.autograd.functional.jacobian(objective, theta)
        theta = theta - torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]  # several biases: one is free
    logits = A @ theta.view(d + 1, outputs).numpy()
    logits = np.concatenate([np.zeros_like(logits), logits], 1) if outputs == 1 else logits
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("classes, d", [(2, 5), (2, 60), (3, 4)])
def test_logistic_regression_is_the_minimum_that_newton_finds(classes, d):
    """Also with more features than rows; scaled and shifted columns, a constant one, rows that are not fitted."""
    random = np.random.default_rng(0)
    X = random.normal(size=(48, d)) * random.uniform(0.1, 10, d) + random.normal(size=d)
    y = (X[:, 0] / X[:, 0].std() + random.normal(size=48) > 0).astype(int) + (random.random(48) < 0.3) * (classes - 2)
    X[:, -1] = 7.0
    masks = np.stack([random.random(48) < 0.7 for _ in range(2)])
    tensors = [torch.as_tensor(a) for a in (np.stack([X] * 2), masks, y)]
    found = t.logistic(*t.decompose(*tensors[:2]), tensors[1], tensors[2], classes).exp().numpy()
    for b, mask in enumerate(masks):
        scaled = (X - X[mask].mean(0)) / np.where(X[mask].std(0) > 1e-9, X[mask].std(0), np.inf)
        for c, C in list(enumerate(t.CS))[b::2]:
            p = newton(scaled[mask], y[mask], C, classes)
            np.testing.assert_allclose(found[c, b][mask], p, atol=5e-4)
    assert np.abs(found[0] - found[-1]).max() > 0.2


def test_neighbours_match_a_loop():
    random = np.random.default_rng(1)
    X, y = random.normal(size=(30, 6)), random.integers(0, 3, 30)
    mask = np.arange(30) < 20
    args = [torch.as_tensor(a) for a in (X[None], mask[None], y)]
    found = t.nearest(*t.decompose(*args[:2]), args[1], args[2], 3).exp()[:, 0]
    scaled = (X - X[mask].mean(0)) / X[mask].std(0)
    for i in range(20, 30):
        cosine = [scaled[i] @ scaled[j] / np.linalg.norm(scaled[i]) / np.linalg.norm(scaled[j]) for j in range(20)]
        order = np.argsort(cosine)[::-1]
        for k, p in zip(t.KS, found[:, i]):
            k = min(k, 20)
            votes = [(sum(y[order[:k]] == c) + np.mean(y[:20] == c)) / (k + 1) for c in range(3)]
            np.testing.assert_allclose(p, votes, atol=1e-9)


def grouped(seed, n=120, per=2, shift=1.5):
    """Features with one informative direction, labels, patients of `per` samples."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n)
    X = random.normal(size=(n, 12))
    X[:, 0] += shift * y
    return X, y, np.array([f"p{i // per}" for i in range(n)])


@pytest.mark.parametrize("seed", range(4))
def test_folds_keep_patients_whole_and_classes_even(seed):
    random = np.random.default_rng(seed)
    y, groups = random.integers(0, 2, 150), random.integers(0, 60, 150).astype(str)
    folds = t.group_folds(y, groups, 5, seed)
    assert all(len(set(folds[groups == g])) == 1 for g in groups) and set(folds) == set(range(5))
    for k in range(5):
        assert abs((y[folds == k] == 1).sum() - y.sum() / 5) <= 3 and abs((folds == k).sum() - 30) <= 5
    assert (folds != t.group_folds(y, groups, 5, seed + 1)).any()


def test_nothing_about_held_out_rows_reaches_a_fit_or_its_choice():
    X, y, groups = grouped(0)
    fold = t.group_folds(y, groups, 4, 0)
    masks = np.stack([fold != 0, fold != 1])
    before, chosen = t.choose(t.logistic, X, y, groups, masks, 3)
    other, moved = y.copy(), X.copy()
    other[fold == 0] = 1 - other[fold == 0]
    moved[fold == 0] += 100 * np.random.default_rng(1).normal(size=(sum(fold == 0), 12))
    after, chosen_after = t.choose(t.logistic, moved, other, groups, masks[:1], 3)
    assert chosen[0] == chosen_after[0]
    np.testing.assert_allclose(before[0][fold != 0], after[0][fold != 0], atol=1e-4)
    flipped, _ = t.choose(t.logistic, X, other, groups, masks[:1], 3)
    np.testing.assert_allclose(before[0], flipped[0], atol=1e-4)  # their own scores too do not know their labels


def test_training_rows_get_scores_of_folds_that_held_them_out():
    """On noise the fit itself ranks its rows far above chance; what a second stage sees must not."""
    X, y, groups = grouped(1, shift=0.0)
    X = np.concatenate([X, np.random.default_rng(0).normal(size=(120, 300))], 1)
    log_p, _ = t.choose(t.logistic, X, y, groups, np.ones((1, 120), bool), 0)
    args = [torch.as_tensor(a) for a in (X[None], np.ones((1, 120), bool), y)]
    fitted = t.logistic(*t.decompose(*args[:2]), args[1], args[2], 2)
    assert metrics.auc(y, fitted[-1, 0, :, 1].numpy()) > 0.95 and metrics.auc(y, log_p[0, :, 1]) < 0.65


def test_a_patient_cannot_be_on_both_sides_and_too_few_are_refused():
    y, groups = np.array([0, 0, 1, 1]), np.array(["a", "a", "a", "b"])
    with pytest.raises(ValueError, match="at least 2 of each class"):
        t.group_folds(y, groups, 2, 0)


def test_neighbours_serve_the_monitor_too():
    """Balanced accuracy of the ten nearest of other patients, weighted by exp(cosine / 0.07), as a loop finds it."""
    random = np.random.default_rng(3)
    y, groups = random.integers(0, 3, 40), random.integers(0, 12, 40)
    x = random.normal(size=(40, 8)) + 2 * np.eye(8)[y]
    features, apart = torch.as_tensor(x, dtype=torch.float32), groups[:, None] == groups
    truth = torch.nn.functional.one_hot(torch.as_tensor(y), 3).float()
    votes = t.neighbours(features, features, truth, [10, 100], apart, temperature=0.07)
    assert votes.shape == (2, 40, 3)
    cosine = x @ x.T / np.linalg.norm(x, axis=1) / np.linalg.norm(x, axis=1)[:, None]
    for i in range(40):
        others = [j for j in np.argsort(-cosine[i]) if groups[j] != groups[i]]
        for k, found in zip((10, 100), votes[:, i]):
            expected = sum(np.exp(cosine[i, j] / 0.07) * np.eye(3)[y[j]] for j in others[:k])
            np.testing.assert_allclose(found, expected, rtol=1e-3)
    counted = t.neighbours(features, features, truth, [100], apart)[0]
    np.testing.assert_array_equal(counted.sum(1), (~apart).sum(1))  # who may not vote does not, where all are near


def test_cross_validation_tests_every_row_once_per_repeat_or_says_that_it_cannot():
    _, y, groups = grouped(2)
    plans = t.plan_cv(y, groups, 2, 5)
    assert len(plans) == 5
    for fit, test in plans:
        assert test.shape == (5, 120) and (test.sum(0) == 1).all() and (fit == ~test).all()
        assert not any(set(groups[f]) & set(groups[h]) for f, h in zip(fit, test))
    assert (plans[0][1] != plans[1][1]).any()
    assert t.plan_cv(y, groups, 3, 5) is None  # nobody of the third class
    for carriers, enough in ((1, False), (2, False), (3, True)):  # of two, one alone would choose C
        few = (np.arange(20) < carriers).astype(int)
        assert bool(t.plan_cv(few, np.arange(20).astype(str), 2, 5)) == enough


@pytest.mark.parametrize("noise, kind", [(0.3, t.ALONE), (None, t.BOTH)])
def test_a_second_stage_says_what_it_rests_on(noise, kind):
    """A label of size alone falls back to size, with its very scores; a label of texture does not."""
    random = np.random.default_rng(0)
    n, groups = 200, np.array([f"p{i // 2}" for i in range(200)])
    size, texture = random.normal(size=(2, n))
    y = (size + noise * random.normal(size=n) > 0 if noise else texture > 0).astype(int)
    X = random.normal(size=(n, 10))
    X[:, 0] = X[:, 0] if noise else texture
    plans = [(np.arange(n) < 120)[None]] * 3
    predictors = {"probe": (t.logistic, [X]), "size": (t.ruler, [size[:, None]])}
    p, settings = t.held_out(predictors, y, groups, [(fit, ~fit) for fit in plans])
    assert settings["size + features"] == [kind] * 3 and settings["size"] == []
    assert np.isnan(p["probe"][:, :120]).all() and not np.isnan(p["probe"][:, 120:]).any()
    same = np.array_equal(p["size + features"], p["size"], equal_nan=True)
    assert same == (kind == t.ALONE)


def test_predictors_stand_on_the_same_rows_and_a_ruler_needs_sizes():
    features = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2)  # n, S, P, D
    np.testing.assert_allclose(t.flatten(features, "average", [0, 2]), features[:, :, [0, 2]].mean(1).reshape(2, 4))
    np.testing.assert_allclose(t.flatten(features, "concat", [1]), features[:, :, 1].reshape(2, 4))
    X, pixels, sizes = np.ones((2, 4)), np.zeros((2, 7)), np.array([[np.e, np.e**3]] * 2)
    assert list(t.predictors(X, [X], pixels)) == ["probe", "k-NN", "random weights", "raw pixels"]
    assert t.predictors(X, [X], pixels, sizes)["size"][1][0].tolist() == [[2.0], [2.0]]  # mean of the two logarithms


def test_fits_import_numpy_and_torch_only():
    tree = ast.parse(Path(t.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"typing", "numpy", "torch"}


def probe_data(classes, n=240, d=12):
    random = np.random.default_rng(classes)
    X = random.normal(size=(n, d)) * random.uniform(0.1, 30, d) + random.normal(size=d) * 50
    X[:, 3] = 7.0  # says nothing, and must not divide by 0
    score = (X - X.mean(0)) / X.std(0).clip(1e-3) @ random.normal(size=(d, classes))
    score += 3 * random.gumbel(size=(n, classes))
    return X, score.argmax(1), random.random(n) < 0.7


def slow_probe(X, labels, rows, classes, C):
    """The same by L-BFGS on autograd, in the plain space of standardised features."""
    mean, deviation = X[rows].mean(0), X[rows].std(0)
    Z = torch.tensor((X - mean) / np.where(deviation > 0, deviation, np.inf))
    outputs = 1 if classes == 2 else classes
    w, b = (torch.zeros(*shape, outputs, dtype=torch.float64, requires_grad=True) for shape in ((Z.shape[1],), ()))
    optimizer = torch.optim.LBFGS([w, b], 1, 5000, None, 1e-10, 1e-16, 50, "strong_wolfe")

    def logits():
        z = Z @ w + b
        return torch.nn.functional.pad(z, (1, 0)) if outputs == 1 else z

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits()[rows], torch.tensor(labels[rows]))
        loss = loss + w.square().sum() / (2 * C * rows.sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits().detach().log_softmax(1).numpy()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_linear_probe_is_exact_for_every_c_and_picks_the_best_on_the_other_split(classes):
    X, y, fit = probe_data(classes)
    found = t.linear_probe(X, y, fit, ~fit, classes)
    for k in (0, 24, 44) if classes == 2 else (24,):
        slow = slow_probe(X, y, fit, classes, t.PATH[k])[~fit]
        assert found.losses[k] == pytest.approx(-slow[np.arange(len(slow)), y[~fit]].mean(), abs=2e-4)
    assert t.PATH[np.argmin(found.losses)] == found.C and len(found.losses) == 45
    assert (t.PATH[0], t.PATH[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    logits = torch.tensor(X @ found.weight.T + found.bias)
    slow = slow_probe(X, y, fit, classes, found.C)
    np.testing.assert_allclose(logits.log_softmax(1).numpy(), slow, atol=2e-3)
    np.testing.assert_allclose(found.weight.sum(0), 0, atol=1e-12)  # centred, so no class is the reference
    assert (found.weight[:, 3] == 0).all()


def test_the_linear_probe_sees_its_rows_and_nothing_else():
    X, y, fit = probe_data(2)
    select, rest = ~fit & (np.arange(len(y)) % 2 == 0), ~fit & (np.arange(len(y)) % 2 == 1)
    changed = X.copy()
    changed[rest] = 1e6
    np.testing.assert_array_equal(*(t.linear_probe(x, y, fit, select, 2).weight for x in (X, changed)))
    both = fit | select
    ((weight, bias),) = t.linear_path(X, y, both, 2, [0.1])  # a refit with the C that was chosen, from nothing
    slow = slow_probe(X, y, both, 2, 0.1)
    np.testing.assert_allclose(torch.tensor(X @ weight.T + bias).log_softmax(1).numpy(), slow, atol=2e-3)


def test_a_split_without_a_class_is_refused():
    X, y, fit = probe_data(2)
    with pytest.raises(ValueError, match="the rows to fit on have no sample of class 1"):
        t.linear_probe(X, y, fit & (y == 0), ~fit, 2)
    with pytest.raises(ValueError, match="the rows that choose C have no sample of class 0"):
        t.linear_probe(X, y, fit, ~fit & (y == 1), 2)


def test_the_linear_probe_against_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model", reason="pip install scikit-learn")
    X, y, fit = probe_data(2)
    Z = (X - X[fit].mean(0)) / np.where(X[fit].std(0) > 0, X[fit].std(0), np.inf)
    found = t.linear_probe(X, y, fit, ~fit, 2)
    for k in (0, 20, 40):
        theirs = linear.LogisticRegression(C=t.PATH[k], tol=1e-12, max_iter=100_000).fit(Z[fit], y[fit])
        log_p = theirs.predict_log_proba(Z[~fit])
        assert found.losses[k] == pytest.approx(-log_p[np.arange(len(log_p)), y[~fit]].mean(), abs=2e-4)
