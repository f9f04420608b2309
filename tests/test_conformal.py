"""Prediction sets: scores against loops, and coverage of simulated data inside the exact band of chance."""

import json
import math

import numpy as np
import pytest

from tools.lib import conformal as c

ALPHA = 0.1


def simulate(random, n, C=4, sharp=1.6, shift=0.0):
    """Probabilities of a model that is too sure of itself, labels of the truth."""
    z = random.normal(size=(n, C)) * 1.3
    z[:, 1] += shift
    draw = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    labels = (draw(z).cumsum(1) < random.random((n, 1))).sum(1).clip(0, C - 1)
    return draw(z * sharp), labels


def band(cases, alpha=ALPHA, level=0.999, seed=0):
    """Interval of all hits of resplits of (n calibration, m test) samples: sums of beta-binomials, by simulation."""
    random, total = np.random.default_rng(seed), np.zeros(8000)
    for n, m in cases:
        k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
        total += random.binomial(m, random.beta(k, n + 1 - k, 8000)) if k <= n else m
    return np.quantile(total, [(1 - level) / 2, (1 + level) / 2])


def resplits(name, repeats, n=150, m=400, seed=0, **options):
    """Of each resplit: labels, sets and slices of its test samples, what was fitted."""
    random, (fit, apply) = np.random.default_rng(seed), c.METHODS[name]
    for _ in range(repeats):
        p, y = simulate(random, n + m)
        slices = np.where(random.random(n + m) < 0.4, "night", "day")
        ids = random.permutation(n + m)
        given = slices[:n] if options.get("by") == "slice" else None
        rest = {k: v for k, v in options.items() if k != "by"}
        found = fit(p[:n], y[:n], ALPHA, given, ids=ids[:n], **rest)
        found = json.loads(json.dumps(found, allow_nan=False, sort_keys=True))
        yield y[n:], apply(found, p[n:], ids[n:], slices[n:]), slices[n:], (y[:n], slices[:n])


def check_marginal(name, repeats, **options):
    hits, cases = 0, []
    for y, sets, _, (fitted, _) in resplits(name, repeats, **options):
        hits += sets[np.arange(len(y)), y].sum()
        cases.append((len(fitted), len(y)))
    low, high = band(cases)
    assert low <= hits <= high, (name, hits / sum(m for _, m in cases))


def check_parts(repeats, by):
    parts = {}
    for y, sets, slices, (fitted, fitted_slices) in resplits("mondrian", repeats, n=400, by=by):
        covered = sets[np.arange(len(y)), y]
        of, fitted_of = (slices, fitted_slices) if by == "slice" else (y, fitted)
        for part in np.unique(of):
            hits, cases = parts.setdefault(part, ([], []))
            hits.append(covered[of == part].sum())
            cases.append(((fitted_of == part).sum(), (of == part).sum()))
    assert len(parts) == (2 if by == "slice" else 4)
    for part, (hits, cases) in parts.items():
        low, high = band(cases)
        assert low <= sum(hits) <= high, part


VARIANTS = {
    "lac": {}, "aps": {}, "raps": {"lam": 0.05}, "saps": {}, "margin": {}, "rank": {},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_coverage_is_inside_the_band_of_chance(name):
    check_marginal(name, 60, **VARIANTS[name])


@pytest.mark.proof
@pytest.mark.parametrize("name", VARIANTS)
def test_coverage_is_inside_the_band_of_chance_in_500_resplits(name):
    check_marginal(name, 500, seed=1, **VARIANTS[name])


@pytest.mark.parametrize("by", ["class", "slice"])
def test_mondrian_covers_each_part(by):
    check_parts(60, by)


@pytest.mark.proof
@pytest.mark.parametrize("by", ["class", "slice"])
def test_mondrian_covers_each_part_in_500_resplits(by):
    check_parts(500, by)


def test_a_wrong_quantile_falls_out_of_the_band():
    """The band is narrow enough to see one rank of 150."""
    hits, cases = 0, []
    for y, sets, _, _ in resplits("lac", 60):
        hits += sets[np.arange(len(y)), y].sum()
        cases.append((150, len(y)))
    low, high = band(cases, alpha=ALPHA + 0.02)
    assert not low <= hits <= high


def test_without_empty_sets_and_without_randomisation_coverage_only_grows():
    random = np.random.default_rng(5)
    p, y = simulate(random, 3000)
    for name in c.SCORES:
        fit, apply = c.METHODS[name]
        plain, full = (fit(p[:500], y[:500], 0.3, allow_empty=empty) for empty in (True, False))
        assert (apply(full, p) >= apply(plain, p)).all() and apply(full, p).any(1).all()
        fixed = fit(p[:1500], y[:1500], ALPHA, randomized=False)
        assert apply(fixed, p[1500:])[np.arange(1500), y[1500:]].mean() > 0.87


# scores against their definitions


def slow_scores(name, p, u, lam, k_reg):
    out = np.zeros_like(p)
    for i, row in enumerate(p):
        for k, own in enumerate(row):
            mass, rank = row[row > own].sum(), 1 + (row > own).sum()
            out[i, k] = {
                "lac": 1 - own,
                "aps": mass + u[i] * own,
                "raps": mass + u[i] * own + lam * max(0, rank - k_reg),
                "saps": u[i] * row.max() if rank == 1 else row.max() + (rank - 2 + u[i]) * lam,
                "margin": max(row[j] for j in range(len(row)) if j != k) - own,
                "rank": rank - own,
            }[name]
    return out


@pytest.mark.parametrize("name", c.SCORES)
def test_scores_are_their_definitions_with_ties(name):
    random = np.random.default_rng(0)
    p = np.concatenate([np.round(random.dirichlet(np.ones(5), 40), 1) + 0.01, np.full((1, 5), 0.2)])
    p, u = p / p.sum(1, keepdims=True), random.random(41)
    options = {"raps": {"lam": 0.03, "k_reg": 2}, "saps": {"lam": 0.15}}.get(name, {})
    expected = slow_scores(name, p, u, options.get("lam", 0), options.get("k_reg", 1))
    np.testing.assert_allclose(c.SCORES[name](p, u[:, None], **options), expected, atol=1e-12)


def test_the_default_raps_is_not_aps():
    """torchcp's is: a penalty of 0."""
    p, y = simulate(np.random.default_rng(1), 400)
    raps, aps = (c.METHODS[name][0](p, y, ALPHA)["quantiles"]["all"] for name in ("raps", "aps"))
    assert raps > aps


def test_the_quantile_is_the_rank_of_the_definition():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100))
    for alpha, rank in ((0.1, 90), (0.05, 95), (0.01, 99), (0.3, 70), (0.33, 67)):
        assert c.quantile(scores, alpha) == rank
    assert c.quantile(scores, 0.009) is None and c.quantile(scores[:8], 0.1) is None and c.quantile(scores[:9], 0.1)
    assert c.quantile(scores, 0.1, np.full(99, 2.0), 2.0) == 90


def test_random_numbers_belong_to_ids():
    p, y = simulate(np.random.default_rng(2), 300)
    ids = [f"a/{i}.jpg" for i in range(300)]
    fit, apply = c.METHODS["aps"]
    found, order = fit(p, y, ALPHA, ids=ids), np.random.default_rng(3).permutation(300)
    sets = apply(found, p, ids)
    assert (apply(found, p[order], [ids[i] for i in order]) == sets[order]).all()
    assert (apply(found, p[:1], ids[:1]) == sets[:1]).all()
    assert (apply(found | {"seed": 1}, p, ids) != sets).any() and (apply(found, p) == apply(found, p)).all()
    u = c.uniform(p, ids, 0)
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.06 and abs(np.histogram(u, 4)[0] - 75).max() < 30


# what cannot be promised


def test_too_few_samples_give_full_sets_and_no_promise():
    p, y = simulate(np.random.default_rng(3), 60)
    for name in [*c.SCORES, "crcp"]:
        fit, apply = c.METHODS[name]
        found = json.loads(json.dumps(fit(p, y, 0.01), allow_nan=False))
        assert not found["feasible"] and found["guarantee"] == "none" and "99" in found["short"]
        assert apply(found, p).all()
        assert fit(p, y, 0.1)["feasible"] and "0.9" in fit(p, y, 0.1)["guarantee"]
    found = c.METHODS["mondrian"][0](p, np.where(np.arange(60) < 5, 3, y % 3), 0.1)
    assert not found["feasible"] and found["quantiles"]["3"] is None and found["quantiles"]["0"] is not None
    assert c.METHODS["mondrian"][1](found, p)[:, 3].all()
    assert (c.METHODS["mondrian"][1](found, p)[:, 0] == (1 - p[:, 0] <= found["quantiles"]["0"])).all()


def test_49_positives_are_what_2_percent_need():
    random = np.random.default_rng(4)
    p = random.dirichlet(np.ones(2), 200)
    for positives, feasible in ((48, False), (49, True)):
        found = c.METHODS["crc"][0](p, (np.arange(200) < positives).astype(int), 0.02)
        assert found["feasible"] == feasible and (found["guarantee"] == "none") != feasible
        assert (found["threshold"] == 0) != feasible and found["positives"] == positives
    assert found["threshold"] == p[:49, 1].min()
    sets = c.METHODS["crc"][1](c.METHODS["crc"][0](p, (np.arange(200) < 48).astype(int), 0.02), p)
    assert sets[:, 1].all()


@pytest.mark.parametrize("name", c.METHODS)
def test_what_is_no_table_of_probabilities_is_a_sentence(name):
    p, y = simulate(np.random.default_rng(5), 80)
    fit = c.METHODS[name][0]
    for wrong, text in (((p, y * 0 + 2), "all 80 labels are 2"), ((p * 3, y), "calibrate the logits first"),
                        ((p, y - 1), "classes are 0 to 3"), ((p[:9], y), "give"), ((p * np.nan, y), "rows of sum 1"),
                        ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            fit(*wrong, 0.1)
    with pytest.raises(ValueError, match="alpha is 1.5"):
        fit(p, y, 1.5)


def test_wrong_options_are_sentences():
    p, y = simulate(np.random.default_rng(6), 80)
    with pytest.raises(ValueError, match="lac has no option lam"):
        c.METHODS["lac"][0](p, y, 0.1, lam=1)
    with pytest.raises(ValueError, match="T fits on the test set"):
        c.METHODS["scrc"][0](p, y, 0.1, variant="T")
    with pytest.raises(ValueError, match="rate is 1"):
        c.METHODS["crcp"][0](p, y, 0.1, rate=1)
    found = c.METHODS["mondrian"][0](p, y, 0.1, np.arange(80) % 2)
    with pytest.raises(ValueError, match="give the slice"):
        c.METHODS["mondrian"][1](found, p)
    assert c.METHODS["mondrian"][1](found, p, slices=np.full(80, "new")).all()
    with pytest.raises(ValueError, match="80 samples: give one each"):
        c.METHODS["aps"][1](c.METHODS["aps"][0](p, y, 0.1), p, ids=[1, 2])


# a known shift


def check_shift(repeats):
    """Slices of 0.8 and 0.2 are met as 0.2 and 0.8; in the second the model knows nothing."""
    random, (fit, apply), hits, naive, n, m = np.random.default_rng(7), c.METHODS["lac"], 0, 0, 400, 400
    for _ in range(repeats):

        def draw(n, share, random=random):
            p, y = simulate(random, n)
            hard = random.random(n) < share
            y[hard] = random.integers(0, 4, hard.sum())
            return p, y, np.where(hard, "hard", "easy")

        (p, y, s), (q, z, t) = draw(n, 0.2), draw(m, 0.8)
        found = fit(p, y, ALPHA, s, shares={"easy": 0.2, "hard": 0.8})
        hits += apply(found, q, slices=t)[np.arange(m), z].sum()
        naive += apply(fit(p, y, ALPHA), q)[np.arange(m), z].sum()
    total, error = repeats * m, 3.3 * math.sqrt(0.09 / 60 / repeats + 0.09 / m / repeats)  # some 60 effective samples
    assert abs(hits / total - 0.9) < error + 1 / 60 and hits / total > 0.9 - error and naive / total < 0.82


def test_known_shares_of_slices_restore_coverage():
    check_shift(60)
    p, y = simulate(np.random.default_rng(8), 80)
    with pytest.raises(ValueError, match="slice b has no share"):
        c.METHODS["lac"][0](p, y, 0.1, np.array(["a", "b"] * 40), shares={"a": 1.0})


# risk control


def binary(random, n):
    p, y = simulate(random, n, C=2, shift=0.5)
    return p, y


def check_crc(repeats, alpha=0.05, n=300):
    random, (fit, apply), rates, least = np.random.default_rng(9), c.METHODS["crc"], [], []
    for _ in range(repeats):
        (p, y), (q, z) = binary(random, n), binary(random, 1000)
        found = json.loads(json.dumps(fit(p, y, alpha)))
        sets = apply(found, q)
        rates.append(1 - sets[z == 1, 1].mean())
        least.append(alpha - 1 / (found["positives"] + 1))
        assert sets.any(1).all() and (sets[:, 1] == (q[:, 1] >= found["threshold"])).all()
    error = 3.3 * np.std(rates) / math.sqrt(repeats)
    assert np.mean(least) - error < np.mean(rates) < alpha + error
    return np.mean(rates)


def test_crc_misses_no_more_positives_than_it_says():
    check_crc(60)


@pytest.mark.proof
def test_crc_misses_no_more_positives_than_it_says_in_500_resplits():
    assert check_crc(500) < 0.0515


def check_scrc(repeats, alpha=0.1, delta=0.1):
    random, (fit, apply), broken, deferred = np.random.default_rng(10), c.METHODS["scrc"], 0, []
    for _ in range(repeats):
        (p, y), (q, z) = binary(random, 1000), binary(random, 4000)
        found = json.loads(json.dumps(fit(p, y, alpha, coverage=0.8, delta=delta)))
        assert found["feasible"] and "probability 0.9" in found["guarantee"]
        sets, selected = apply(found, q), q.max(1) >= found["cut"]
        assert sets[~selected].all() and (p.max(1) >= found["cut"]).mean() == 0.8
        deferred.append(1 - selected.mean())
        broken += 1 - sets[selected & (z == 1), 1].mean() > alpha
    assert broken / repeats <= delta + 3.3 * math.sqrt(delta * (1 - delta) / repeats)
    assert np.mean(deferred) == pytest.approx(0.2, abs=0.01)


def test_scrc_breaks_its_bound_no_more_often_than_it_says():
    check_scrc(60)


@pytest.mark.proof
def test_scrc_breaks_its_bound_no_more_often_than_it_says_in_500_resplits():
    check_scrc(500)


def test_scrc_without_enough_positives_promises_nothing_and_misses_nothing():
    p, y = binary(np.random.default_rng(11), 300)
    found = c.METHODS["scrc"][0](p, y, 0.02)  # the slack alone is larger
    assert not found["feasible"] and found["guarantee"] == "none" and c.METHODS["scrc"][1](found, p)[:, 1].all()
    free = c.METHODS["scrc"][0](p, y, 0.05, delta=0)
    assert free["feasible"] and free["guarantee"] == "none" and free["slack"] == 0 and free["threshold"] > 0


# label noise


def check_noise(repeats, rate, n=1000, m=1000):
    random, sizes, hits = np.random.default_rng(12), np.zeros(2), np.zeros(2)
    for _ in range(repeats):
        (p, y), (q, z) = simulate(random, n, sharp=1.0), simulate(random, m, sharp=1.0)
        noisy = np.where(random.random(n) < rate, random.integers(0, 4, n), y)
        for k, found in enumerate((c.fit_crcp(p, noisy, ALPHA, rate=rate), c.METHODS["lac"][0](p, noisy, ALPHA))):
            sets = c.apply_sets(json.loads(json.dumps(found)), q)
            sizes[k] += sets.sum()
            hits[k] += sets[np.arange(m), z].sum()
    coverage, error = hits / repeats / m, 3.3 * math.sqrt(0.09 / repeats * (1 / m + 1.5 / n))
    assert 0.9 - error < coverage[0] < 0.9 + error + 0.01, coverage
    assert coverage[1] > coverage[0] + rate / 4 and sizes[0] < sizes[1] * (1 - rate / 2)


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_crcp_covers_clean_labels_with_smaller_sets(rate):
    check_noise(60, rate)


@pytest.mark.proof
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_crcp_covers_clean_labels_with_smaller_sets_in_500_resplits(rate):
    check_noise(500, rate)


def test_crcp_without_noise_is_lac():
    p, y = simulate(np.random.default_rng(13), 333)
    assert c.fit_crcp(p, y, ALPHA, rate=0)["quantiles"] == c.METHODS["lac"][0](p, y, ALPHA)["quantiles"]


def test_sets_agree_with_crepes_where_it_is_installed():
    crepes = pytest.importorskip("crepes")
    p, y = simulate(np.random.default_rng(15), 600)
    own = 1 - p[:300][np.arange(300), y[:300]]
    classifier = crepes.ConformalClassifier().fit(own)
    theirs = classifier.predict_set(1 - p[300:], confidence=0.9, smoothing=False)
    ours = c.apply_sets(c.METHODS["lac"][0](p[:300], y[:300], ALPHA), p[300:])
    assert (ours == theirs.astype(bool)).all()
