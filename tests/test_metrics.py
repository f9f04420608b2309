"""Each number against a loop that spells out its definition; each interval against the truth of a simulation."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

from tools.lib import metrics as m


def make(seed, n=40, ties=True):
    """Labels and scores with many ties, counts of 0 to 3 as weights."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(n) % 2)
    scores = random.normal(size=n) + labels
    return labels, np.round(scores * 2) / 2 if ties else scores, random.integers(0, 4, n)


def repeated(weights, *arrays):
    """Weights as they are meant: each sample as often as its weight says."""
    return [np.repeat(a, weights, axis=0) for a in arrays]


def slow_auc(labels, scores, folds=None):
    wins, pairs = 0.0, 0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] == 1 and labels[j] == 0 and (folds is None or folds[i] == folds[j]):
                wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                pairs += 1
    return wins / pairs


def thresholds(labels, scores):
    for t in sorted(set(scores), reverse=True):
        said = scores >= t
        yield (said & (labels == 1)).sum(), (said & (labels == 0)).sum()


def slow_ap(labels, scores):
    total, before = 0.0, 0
    for tp, fp in thresholds(labels, scores):
        total += (tp - before) / (labels == 1).sum() * tp / (tp + fp)
        before = tp
    return total


def slow_sensitivity(labels, scores):
    negatives = (labels == 0).sum()
    return (
        max([tp for tp, fp in thresholds(labels, scores) if (negatives - fp) / negatives >= 0.9] + [0]) / labels.sum()
    )


def slow_mcc(labels, said):
    tp, tn = ((said == k) & (labels == k) for k in (1, 0))
    fp, fn = (said == 1) & (labels == 0), (said == 0) & (labels == 1)
    tp, tn, fp, fn = (int(x.sum()) for x in (tp, tn, fp, fn))
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def slow_ece(labels, p):
    total = 0.0
    for k in range(10):
        held = [i for i in range(len(p)) if (k / 10 <= p[i] < (k + 1) / 10) or (k == 9 and p[i] == 1)]
        if held:
            total += abs(np.mean(p[held]) - np.mean(labels[held])) * len(held) / len(p)
    return total


def probability(scores):
    return 1 / (1 + np.exp(-scores))


BINARY = {
    "auc": (m.auc, slow_auc),
    "average_precision": (m.average_precision, slow_ap),
    "sensitivity_at": (lambda y, s, weights=None: m.sensitivity_at(y, s, 0.9, weights), slow_sensitivity),
    "mcc": (lambda y, s, weights=None: m.mcc(y, s > 0, weights), lambda y, s: slow_mcc(y, (s > 0).astype(int))),
    "accuracy": (lambda y, s, weights=None: m.accuracy(y, s > 0, weights), lambda y, s: np.mean(y == (s > 0))),
    "brier": (
        lambda y, s, weights=None: m.brier(y, probability(s), weights),
        lambda y, s: sum((probability(a) - b) ** 2 for a, b in zip(s, y)) / len(y),
    ),
    "calibration_error": (
        lambda y, s, weights=None: m.calibration_error(y, probability(s), 10, weights),
        lambda y, s: slow_ece(y, probability(s)),
    ),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("ties", [True, False])
def test_a_metric_is_its_definition_with_ties_and_weights_one_by_one_and_many_at_once(name, ties):
    fast, slow = BINARY[name]
    for seed in range(6):
        labels, scores, weights = make(seed, ties=ties)
        assert fast(labels, scores) == pytest.approx(slow(labels, scores), abs=1e-12)
        rows = np.stack([weights, np.random.default_rng(seed).permutation(weights)])
        both = fast(labels, scores, weights=rows)
        for row, value in zip(rows, both):
            expected = slow(*repeated(row, labels, scores))
            assert value == pytest.approx(expected, abs=1e-12) == fast(labels, scores, weights=row)


def test_auc_within_folds_counts_pairs_of_one_fold_only():
    for seed in range(6):
        labels, scores, weights = make(seed)
        folds = np.random.default_rng(seed).integers(0, 4, len(labels))
        folds[labels == 1] = np.maximum(folds[labels == 1], 1)  # fold 0 holds one class
        assert m.auc(labels, scores, folds=folds) == pytest.approx(slow_auc(labels, scores, folds), abs=1e-12)
        expected = slow_auc(*repeated(weights, labels, scores, folds))
        assert m.auc(labels, scores, weights[None], folds)[0] == pytest.approx(expected, abs=1e-12)


def test_several_classes_are_means_over_one_against_the_rest_and_correlations_of_indicators():
    random = np.random.default_rng(0)
    labels, p = random.integers(0, 3, 60), random.dirichlet(np.ones(3), 60)
    p[np.arange(60), labels] += 0.3
    p /= p.sum(1, keepdims=True)
    weights, said = random.integers(0, 3, 60), p.argmax(1)
    for fast, slow in ((m.auc, slow_auc), (m.average_precision, slow_ap)):
        expected = np.mean([slow((labels == k).astype(int), p[:, k]) for k in range(3)])
        assert fast(labels, p) == pytest.approx(expected, abs=1e-12)
        y, q = repeated(weights, labels, p)
        expected = np.mean([slow((y == k).astype(int), q[:, k]) for k in range(3)])
        assert fast(labels, p, weights[None])[0] == pytest.approx(expected, abs=1e-12)

    def covariance(a, b):
        return sum(np.cov(a == k, b == k)[0, 1] for k in range(3))

    expected = covariance(labels, said) / math.sqrt(covariance(labels, labels) * covariance(said, said))
    assert m.mcc(labels, said) == pytest.approx(expected, abs=1e-12)
    errors = [sum((p[i, k] - (labels[i] == k)) ** 2 for k in range(3)) for i in range(60)]
    assert m.brier(labels, p) == pytest.approx(np.mean(errors), abs=1e-12)
    expected = slow_ece((said == labels).astype(int), p.max(1))
    assert m.calibration_error(labels, p) == pytest.approx(expected, abs=1e-12)


def test_curves_end_where_they_must_and_their_area_is_the_auc():
    labels, scores, _ = make(3)
    fpr, tpr = m.roc_curve(labels, scores)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert ((tpr[1:] + tpr[:-1]) / 2 * np.diff(fpr)).sum() == pytest.approx(slow_auc(labels, scores))
    recall, precision = m.precision_recall_curve(labels, scores)
    assert recall[-1] == 1 and precision[-1] == 0.5


def test_size_matched_pairs_match_a_double_loop():
    random = np.random.default_rng(1)
    labels, scores, weights = make(1)
    sizes, folds = np.exp(random.normal(2, 0.3, len(labels))), random.integers(0, 2, len(labels))

    def slow(labels, scores, sizes, folds=None):
        wins = pairs = 0
        for i in np.flatnonzero(labels == 1):
            for j in np.flatnonzero(labels == 0):
                if max(sizes[i], sizes[j]) / min(sizes[i], sizes[j]) <= 1.1 and (folds is None or folds[i] == folds[j]):
                    wins += (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
                    pairs += 1
        return wins / pairs

    assert m.matched_auc(labels, scores, sizes) == pytest.approx(slow(labels, scores, sizes), abs=1e-12)
    assert m.matched_auc(labels, scores, sizes, folds=folds) == pytest.approx(slow(labels, scores, sizes, folds))
    expected = slow(*repeated(weights, labels, scores, sizes))
    assert m.matched_auc(labels, scores, sizes, weights=weights[None])[0] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(m.matched_auc(np.array([0, 1]), np.array([0.1, 0.9]), np.array([1.0, 9.0])))
    assert 0.3 < m.matched_auc(labels, sizes, sizes) < 0.7  # the ruler is blind there
    with pytest.raises(ValueError, match="above 0"):
        m.matched_pairs(labels, sizes * 0)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
@pytest.mark.parametrize("metric", [m.auc, m.average_precision, m.sensitivity_at, m.accuracy, m.mcc, m.brier])
def test_one_class_and_nan_are_errors_never_a_number(metric, labels):
    with pytest.raises(ValueError, match="one class"):
        metric(labels, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="1 predictions are NaN"):
        metric([0, 1, 1], [0.1, np.nan, 0.3])
    with pytest.raises(ValueError, match="3 labels and 2 predictions"):
        metric(labels, [0.1, 0.2])


def test_a_missing_class_and_numbers_that_are_no_probabilities_are_errors():
    with pytest.raises(ValueError, match="no sample of class 2"):
        m.auc([0, 1, 1], np.full((3, 3), 1 / 3))
    with pytest.raises(ValueError, match="0 to 1"):
        m.calibration_error([0, 1], [0.5, 1.5])


def test_constant_scores_are_chance_and_perfect_ones_are_one():
    labels = np.arange(20) % 2
    assert m.auc(labels, np.zeros(20)) == 0.5 and m.auc(labels, labels) == 1 and m.auc(labels, -labels) == 0
    assert m.mcc(labels, np.ones(20)) == 0 and m.mcc(labels, labels) == 1
    assert m.sensitivity_at(labels, np.zeros(20)) == 0 and m.sensitivity_at(labels, labels) == 1


# the bootstrap


def test_resamples_take_whole_patients_and_both_ways_to_ask_agree():
    labels, scores, _ = make(5)
    groups = np.array([f"p{i // 3}" for i in range(len(labels))])
    drawn = np.concatenate(list(m.draws(groups, 50, 0)))
    for g in np.unique(groups):
        assert (drawn[:, groups == g] == drawn[:, groups == g][:, :1]).all()
    first = [np.flatnonzero(groups == g)[0] for g in np.unique(groups)]
    assert (drawn[:, first].sum(1) == len(first)).all()
    slow = m.bootstrap(lambda i: m.auc(labels[i], scores[i]), groups, 300, seed=3)
    values = m.resample(lambda w: m.auc(labels, scores, w), groups, 300, seed=3)
    assert slow == pytest.approx(m.interval(values)) and slow[0] < m.auc(labels, scores) < slow[1]
    assert slow != m.bootstrap(lambda i: m.auc(labels[i], scores[i]), groups, 300, seed=4)
    with pytest.raises(ValueError, match="one class"):
        m.bootstrap(lambda i: m.auc(labels[i] * 0, scores[i]), groups)


def test_two_patients_of_one_class_each_have_no_interval():
    labels, groups = np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"])
    assert np.isnan(m.bootstrap(lambda i: m.auc(labels[i], labels[i]), groups, 200)).all()  # half are one-class


def simulated(random, patients, effect):
    """Two nodules a patient that share a part of their score: labels, scores, groups."""
    groups = np.repeat(np.arange(patients), 2)
    labels = random.integers(0, 2, 2 * patients)
    scores = effect * labels + math.sqrt(0.5) * (
        random.normal(size=patients)[groups] + random.normal(size=2 * patients)
    )
    return labels, scores, groups


def test_intervals_cover_the_truth_as_often_as_they_say():
    """600 data sets of 100 patients; the standard error of the coverage is 0.9%."""
    random, effect, hits, widths = np.random.default_rng(0), 1.0, 0, {True: [], False: []}
    truth = 0.5 * (1 + math.erf(effect / 2))  # P(N(effect, 2) > 0): scores have unit variance in each class
    for _ in range(600):
        labels, scores, groups = simulated(random, 100, effect)
        low, high = m.interval(m.resample(lambda w, y=labels, s=scores: m.auc(y, s, w), groups, 400))
        hits += low <= truth <= high
        widths[True].append(high - low)
    assert 0.92 <= hits / 600 <= 0.98


def test_p_values_of_equal_scores_are_small_as_often_as_they_say():
    random, small = np.random.default_rng(1), 0
    for _ in range(300):
        labels, scores, groups = simulated(random, 100, 0.7)
        other = 0.7 * labels + random.normal(size=len(labels))
        drawn = [m.resample(lambda w, y=labels, s=s: m.auc(y, s, w), groups, 300) for s in (scores, other)]
        small += m.p_value(drawn[0] - drawn[1]) < 0.05
    assert 0.02 <= small / 300 <= 0.09
    assert m.p_value(np.ones(99)) == 0.02 and m.p_value(np.array([-1, 1])) == 1.0 and np.isnan(m.p_value([np.nan]))


def test_metrics_import_numpy_only():
    tree = ast.parse(Path(m.__file__).read_text())
    assert [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)] == ["numpy"]
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
