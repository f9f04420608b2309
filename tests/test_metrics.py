"""Each number against a loop that spells out its definition; each interval against the truth of a simulation."""

import ast
import json
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
    allowed = [tp for tp, fp in thresholds(labels, scores) if (negatives - fp) / negatives >= 0.9]
    return max([*allowed, 0]) / labels.sum()


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
    rows = [np.repeat(np.arange(len(labels)), row) for w in m.draws(groups, 300, 3) for row in w]
    slow = [m.auc(labels[i], scores[i]) for i in rows]  # each sample as often as it was drawn
    values = m.resample(lambda w: m.auc(labels, scores, w), groups, 300, seed=3)
    low, high = m.interval(values)
    assert values == pytest.approx(slow) and low < m.auc(labels, scores) < high
    assert (values != m.resample(lambda w: m.auc(labels, scores, w), groups, 300, seed=4)).any()


def test_two_patients_of_one_class_each_have_no_interval():
    labels, groups = np.array([0, 0, 1, 1]), np.array(["a", "a", "b", "b"])
    values = m.resample(lambda w: m.auc(labels, labels, w), groups, 200)
    assert 60 < np.isnan(values).sum() < 140 and np.isnan(m.interval(values)).all()  # half are one-class


def simulated(random, patients, effect):
    """Two nodules a patient that share a part of their score: labels, scores, groups."""
    groups = np.repeat(np.arange(patients), 2)
    labels = random.integers(0, 2, 2 * patients)
    noise = random.normal(size=patients)[groups] + random.normal(size=2 * patients)
    scores = effect * labels + math.sqrt(0.5) * noise
    return labels, scores, groups


@pytest.mark.slow
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


@pytest.mark.slow
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


# calibration in other bins, decisions, selection: each against its definition in loops


def slow_gaps(p, truth, bins):
    """[(share, |mean p - mean truth|, mean truth, n)] of bins given as lists of indices."""
    kept = [b for b in bins if len(b)]
    return [(len(b) / len(p), abs(np.mean(p[b]) - np.mean(truth[b])), np.mean(truth[b]), len(b)) for b in kept]


def test_calibration_errors_are_their_definitions():
    random = np.random.default_rng(4)
    labels, p = random.integers(0, 2, 200), np.round(random.random(200), 2)  # ties
    found = m.calibration_errors(labels, p)
    width = slow_gaps(p, labels, [np.flatnonzero(np.minimum(np.floor(p * 15), 14) == b) for b in range(15)])
    assert found["ece"] == pytest.approx(sum(share * gap for share, gap, _, _ in width))
    assert found["mce"] == pytest.approx(max(gap for _, gap, _, _ in width))
    first = np.array([(p < value).sum() for value in p])  # samples of one value share a bin
    mass = slow_gaps(p, labels, [np.flatnonzero(first * 15 // 200 == b) for b in range(15)])
    assert found["ece_mass"] == pytest.approx(sum(share * gap for share, gap, _, _ in mass))
    squared = sum(share * (gap**2 - hit * (1 - hit) / max(n - 1, 1)) for share, gap, hit, n in mass)
    assert found["ece_debiased"] == pytest.approx(math.sqrt(max(squared, 0)))
    q = 1 - p
    width0 = slow_gaps(q, 1 - labels, [np.flatnonzero(np.minimum(np.floor(q * 15), 14) == b) for b in range(15)])
    both = [sum(share * gap for share, gap, _, _ in gaps) for gaps in (width, width0)]
    assert found["ece_classes"] == pytest.approx(np.mean(both))
    assert m.calibration_errors([0, 1, 1, 1], [0.5] * 4)["mce"] == pytest.approx(0.25)


def test_of_a_perfect_model_the_debiased_error_alone_is_small():
    random = np.random.default_rng(5)
    plain, debiased = [], []
    for _ in range(50):
        p = random.random(300)
        found = m.calibration_errors(random.random(300) < p, p)
        plain.append(found["ece_mass"])
        debiased.append(found["ece_debiased"])
    assert np.mean(plain) > 0.06 and np.mean(debiased) < 0.04 and np.median(debiased) < 0.03


def test_nll_is_the_mean_log_of_the_truth():
    labels, scores, weights = make(1)
    p = probability(scores)
    expected = -np.mean([math.log(p[i] if labels[i] else 1 - p[i]) for i in range(len(p))])
    assert m.nll(labels, p) == pytest.approx(expected) == m.nll(labels, np.stack([1 - p, p], 1))
    y, q = repeated(weights, labels, p)
    assert m.nll(labels, p, weights) == pytest.approx(m.nll(y, q))
    assert m.nll([0, 1], [1.0, 1.0]) == pytest.approx(-math.log(1e-15) / 2)


def test_rates_count_by_hand_and_an_absent_class_is_none():
    found = m.rates([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0])
    assert found["confusion"] == [[4, 1], [1, 2]] and found["n"] == 8
    wanted = {"accuracy": 6 / 8, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "fnr": 1 / 3, "fpr": 1 / 5}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    slow = slow_mcc(np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0]))
    assert found["mcc"] == pytest.approx(slow)
    alone = m.rates([0, 0, 0], [0, 1, 0])
    assert alone["accuracy"] == pytest.approx(2 / 3) and alone["fpr"] == pytest.approx(1 / 3)
    assert [alone[name] for name in ("recall", "fnr", "f1", "mcc", "balanced_accuracy")] == [None] * 5
    silent = m.rates([0, 1], [0, 0])
    assert silent["precision"] is None and silent["recall"] == 0 == silent["f1"] and silent["mcc"] == 0
    with pytest.raises(ValueError, match="classes are 0 to 1"):
        m.rates([0, 1], [0, 2])


def test_rates_of_three_classes_are_means_over_classes():
    random = np.random.default_rng(8)
    labels, said = random.integers(0, 3, 90), random.integers(0, 3, 90)
    found = m.rates(labels, said, 3)
    each = [m.rates(labels == k, said == k) for k in range(3)]
    for name in ("precision", "recall", "f1", "fnr", "fpr"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in each])), name
    assert m.rates(labels % 2, said % 2, 3)["recall"] is None


def shuffled_orders(errors, confidence, statistic, repeats=4000):
    """Mean of a statistic of the ordered errors over random orders of what is tied."""
    random, values = np.random.default_rng(0), []
    for _ in range(repeats):
        order = np.lexsort((random.random(len(errors)), -confidence))
        values.append(statistic(errors[order].astype(float)))
    return np.mean(values)


@pytest.mark.parametrize("ties", [True, False])
def test_areas_under_risk_are_means_over_the_orders_of_ties(ties):
    random = np.random.default_rng(9)
    errors, confidence = random.random(25) < 0.3, random.random(25)
    confidence = np.round(confidence * 4) if ties else confidence
    n, repeats = len(errors), 4000 if ties else 1
    kept = lambda e: np.cumsum(e)  # noqa: E731
    expected = shuffled_orders(errors, confidence, lambda e: np.mean(kept(e) / np.arange(1, n + 1)), repeats)
    assert m.aurc(errors, confidence) == pytest.approx(expected, abs=0.004 if ties else 1e-12)
    expected = shuffled_orders(errors, confidence, lambda e: (kept(e) - e / 2).sum() / n**2, repeats)
    assert m.augrc(errors, confidence) == pytest.approx(expected, abs=0.002 if ties else 1e-12)
    accuracy = 1 - errors.mean()  # the closed form of Traub 2024, equation 6, where ties count half
    closed = (1 - slow_auc(1 - errors.astype(int), confidence)) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert m.augrc(errors, confidence) == pytest.approx(closed, abs=1e-12)


def test_selection_of_perfect_worst_and_constant_confidence():
    errors = np.arange(100) < 20
    orders = -errors.astype(float), errors.astype(float), np.ones(100)
    perfect, worst, constant = (m.selective(errors, c) for c in orders)
    assert perfect["augrc"] == perfect["augrc_best"] == pytest.approx(0.02) and perfect["aurc"] == perfect["aurc_best"]
    assert worst["augrc"] == pytest.approx(0.2 - 0.02) and constant["augrc"] == pytest.approx(0.1)
    assert perfect["coverage_at"]["0.01"] == 0.8 and worst["coverage_at"]["0.1"] == 0 == constant["coverage_at"]["0.1"]
    assert perfect["risk_at"]["0.7"] == 0 and constant["risk_at"]["0.5"] == pytest.approx(0.2)
    assert m.augrc(np.ones(7), np.arange(7)) == pytest.approx(0.5)


def test_coverage_at_a_risk_goes_on_behind_a_breach():
    """torch-uncertainty's CovAtxRisk counts from the wrong end; others stop where the risk is broken first."""
    errors = np.array([1] + [0] * 19 + [1] * 20)  # risk 1, 1/2, 1/3 .. 1/20, then up again
    confidence = -np.arange(40.0)
    found = m.selective(errors, confidence)["coverage_at"]
    slow = {r: max([i / 40 for i in range(1, 41) if errors[:i].mean() <= r] + [0]) for r in (0.01, 0.02, 0.05, 0.1)}
    assert found == pytest.approx({f"{r:g}": value for r, value in slow.items()}) and found["0.1"] == 0.525


def test_recall_at_a_precision_is_the_best_threshold():
    for seed in range(6):
        labels, scores, weights = make(seed)
        best = max([tp / labels.sum() for tp, fp in thresholds(labels, scores) if tp >= 0.9 * (tp + fp)] + [0])
        assert m.recall_at(labels, scores) == pytest.approx(best)
        slow = m.recall_at(*repeated(weights, labels, scores))
        assert m.recall_at(labels, scores, weights=weights) == pytest.approx(slow)


def test_slices_flag_what_falls_behind_and_never_what_is_small():
    labels = np.arange(100) % 2
    said, column = labels.copy(), np.array(["day"] * 70 + ["night"] * 25 + ["fog"] * 5)
    said[70:80] = 1 - said[70:80]
    said[95:98] = 1 - said[95:98]
    rows = m.slices(labels, said, column)
    assert [(r["slice"], r["n"], r["flagged"]) for r in rows] == [
        ("day", 70, False),
        ("night", 25, True),
        ("fog", 5, False),
    ]
    assert rows[1]["gap"] == pytest.approx(0.87 - 0.6)
    alone = m.slices(labels, said, labels, of="mcc")
    assert all(r["mcc"] is None and r["gap"] is None and not r["flagged"] for r in alone)


def test_worth_is_json_and_says_none_for_what_one_class_cannot_tell():
    random = np.random.default_rng(3)
    labels, scores, _ = make(2)
    p = np.stack([1 - probability(scores), probability(scores)], 1)
    full, index = m.worth(labels, p), random.permutation(len(labels))
    assert json.loads(json.dumps(full)) == full and None not in full.values()
    for name, value in m.worth(labels[index], p[index]).items():
        assert value == (full[name] if isinstance(value, (dict, list)) else pytest.approx(full[name])), f"{name}: order"
    alone = m.worth(labels * 0, p)
    assert [alone[n] for n in ("auc", "mcc", "nll", "ece", "recall")] == [None] * 5 and alone["accuracy"] is not None
    assert json.loads(json.dumps(alone, allow_nan=False))["augrc"] > 0
    three = m.worth(random.integers(0, 2, 30), random.dirichlet(np.ones(3), 30))
    assert three["auc"] is None and three["nll"] is not None


def test_strata_keep_the_number_of_groups_of_each_class():
    groups, labels = np.arange(30) // 2, (np.arange(30) < 8).astype(int)
    drawn = np.concatenate(list(m.draws(groups, 200, 0, strata=labels)))
    assert set(drawn[:, labels == 1].sum(1)) == {8.0} and set(drawn[:, labels == 0].sum(1)) == {22.0}
    free = np.concatenate(list(m.draws(groups, 200, 0)))
    assert len(set(free[:, labels == 1].sum(1))) > 3 and drawn.mean() == pytest.approx(1)
    spread = drawn[:, ::2].var(0)  # of a group that is drawn among k: 1 - 1 / k
    assert spread[:4].mean() == pytest.approx(3 / 4, abs=0.1) and spread[4:].mean() == pytest.approx(10 / 11, abs=0.1)


def test_holm_raises_p_values_step_by_step():
    assert m.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert m.holm([0.9, 0.5]) == pytest.approx([1.0, 1.0]) and len(m.holm([])) == 0


def test_metrics_agree_with_scikit_learn_where_it_is_installed():
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, scores, _ = make(11, 300)
    p, said = probability(scores), (scores > 0.4).astype(int)
    assert m.auc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores))
    assert m.average_precision(labels, scores) == pytest.approx(sklearn.average_precision_score(labels, scores))
    assert m.nll(labels, p) == pytest.approx(sklearn.log_loss(labels, p))
    found = m.rates(labels, said)
    for name, theirs in {"mcc": sklearn.matthews_corrcoef, "f1": sklearn.f1_score, "recall": sklearn.recall_score,
                         "precision": sklearn.precision_score, "balanced_accuracy": sklearn.balanced_accuracy_score,
                         }.items():  # fmt: skip
        assert found[name] == pytest.approx(theirs(labels, said)), name
    assert found["confusion"] == sklearn.confusion_matrix(labels, said).tolist()


def test_no_other_file_defines_what_metrics_exports():
    """One idea, one place; `check`, `ratio` and (of pictures) `resample` are words that others use for other things."""
    root = Path(m.__file__).resolve().parents[2]
    names = {n.name for n in ast.parse(Path(m.__file__).read_text()).body if isinstance(n, ast.FunctionDef)}
    for path in [*root.glob("*.py"), *(root / "tools").rglob("*.py")]:
        if path != Path(m.__file__).resolve():
            defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
            assert not defined & (names - {"check", "ratio", "resample"}), path
