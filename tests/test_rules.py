"""Decisions: thresholds against brute force, promises against simulation, policies whose order cannot be wrong."""

import json
import math

import numpy as np
import pytest

from tools.lib import calibrate, choice, conformal, failure, metrics, rules, tables, thresholds


def table(seed=0, n=600, V=1, C=2, bend=2.0, noise=0.3):
    """Logits of a model that is too sure by `bend`, three samples a group."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(n, C)) * 1.4
    labels = (np.exp(calibrate.log_softmax(z)).cumsum(1) < random.random((n, 1))).sum(1).clip(0, C - 1)
    logits = z[:, None] * bend + random.normal(size=(n, V, C)) * noise
    facts = {"classes": [f"c{k}" for k in range(C)], "split": "val_calib", "layout": "tiles", "npz_sha256": "ab"}
    ids = np.array([f"{seed}/{i}.jpg" for i in range(n)])
    groups = np.array([f"{seed}/{i // 3}" for i in range(n)])
    return tables.Predictions(ids, groups, labels.astype(int), logits.astype(np.float32), facts)


# thresholds


def slow_counts(y, p, t):
    said = p >= t
    return (said & (y == 1)).sum(), (said & (y == 0)).sum(), (~said & (y == 1)).sum(), (~said & (y == 0)).sum()


def slow_value(name, tp, fp, fn, tn):
    if name == "mcc":
        below = math.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return (float(tp) * tn - float(fp) * fn) / below if below else 0.0
    return {
        "f1": 2 * tp / (2 * tp + fp + fn), "youden": tp / (tp + fn) - fp / (fp + tn), "cost": -(10.0 * fn + fp),
        "fnr": tn if fn <= 0.02 * (tp + fn) else -fn,
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", thresholds.CRITERIA)
@pytest.mark.parametrize("ties", [True, False])
def test_a_threshold_is_the_best_of_all(name, ties):
    for seed in range(8):
        random = np.random.default_rng(seed)
        y = np.arange(40) % 2
        p = 1 / (1 + np.exp(-random.normal(size=40) - y))
        p = np.round(p, 1) if ties else p
        found = thresholds.METHODS[name][0](np.stack([1 - p, p], 1), y)
        grid = np.concatenate([np.linspace(0, 1.05, 400), p, np.nextafter(p, 2)])
        best = max(slow_value(name, *slow_counts(y, p, t)) for t in grid)
        assert slow_value(name, *slow_counts(y, p, found["threshold"])) == pytest.approx(best) == found["value"]
        said = thresholds.METHODS[name][1](json.loads(json.dumps(found)), np.stack([1 - p, p], 1))
        assert (said == (p >= found["threshold"])).all()


def test_ties_go_to_the_middle_of_the_widest_plateau():
    y = np.array([0, 0, 0, 1, 1, 1])
    p = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    assert thresholds.METHODS["mcc"][0](np.stack([1 - p, p], 1), y)["threshold"] == pytest.approx(0.5)
    y = np.array([0, 1, 0, 1])  # 0.35 < t <= 0.9 and 0.1 < t <= 0.3 are as good
    p = np.array([0.1, 0.3, 0.35, 0.9])
    assert thresholds.METHODS["mcc"][0](np.stack([1 - p, p], 1), y)["threshold"] == pytest.approx((0.35 + 0.9) / 2)
    p = np.array([0.1, 0.6, 0.65, 0.9])  # now the lower one is the wider
    assert thresholds.METHODS["mcc"][0](np.stack([1 - p, p], 1), y)["threshold"] == pytest.approx((0.1 + 0.6) / 2)
    near = np.nextafter(0.5, 1)
    found = thresholds.METHODS["mcc"][0](np.array([[0.5, 0.5], [1 - near, near]]), np.array([0, 1]))
    assert found["threshold"] == near


def test_counts_of_large_tables_do_not_overflow():
    y = np.arange(200_000) % 2
    p = np.where(y == 1, 0.8, 0.2)
    found = thresholds.METHODS["mcc"][0](np.stack([1 - p, p], 1), y)
    assert found["value"] == pytest.approx(1) and found["threshold"] == pytest.approx(0.5)


def slow_exit(y, p, fnr):
    """Largest coverage of the rule as it is written."""
    best = 0.0
    for t in np.unique(np.concatenate([np.maximum(p, 1 - p), [0.5]])):
        out = (p >= t) | (1 - p >= t)
        positives = out & (y == 1)
        if positives.any() and (positives & (p < 0.5)).sum() / positives.sum() <= fnr:
            best = max(best, out.mean())
    return best


def test_an_exit_has_the_largest_coverage_whose_misses_are_few():
    for seed in range(20):
        random = np.random.default_rng(seed)
        y = random.integers(0, 2, 80)
        p = np.round(1 / (1 + np.exp(-random.normal(size=80) * 1.5 - (2 * y - 1))), 2)
        both = np.stack([1 - p, p], 1)
        found = thresholds.METHODS["exit"][0](both, y, fnr=0.1)
        said = thresholds.METHODS["exit"][1](json.loads(json.dumps(found)), both)
        assert (said >= 0).mean() == pytest.approx(slow_exit(y, p, 0.1)) == found["coverage"]
        if found["feasible"]:
            out = said >= 0
            assert ((y == 1) & (said == 0)).sum() <= 0.1 * (out & (y == 1)).sum() and found["guarantee"] == "none"


def test_what_cannot_be_reached_is_said_and_nothing_is_decided():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(2), 200)
    y = p.argmin(1)
    for name, option in (("exit", {}), ("gate", {}), ("exit", {"delta": 0.05}), ("gate", {"delta": 0.05})):
        found = thresholds.METHODS[name][0](p, y, **option)
        assert not found["feasible"] and found["guarantee"] == "none" and found["threshold"] is None
        assert (thresholds.METHODS[name][1](found, p) == -1).all()
    y = p.argmax(1)
    y[p.max(1) < 0.9] = random.integers(0, 2, (p.max(1) < 0.9).sum())
    found = thresholds.METHODS["gate"][0](p, y)  # sure enough, but for too few
    assert not found["feasible"] and 0 < found["coverage"] < 0.7 and found["error"] <= 0.01


def test_a_gate_keeps_its_error_and_covers_as_much_as_it_can():
    for seed in range(5):
        t = table(seed, C=3, bend=6.0)
        p = np.exp(calibrate.log_softmax(t.logits[:, 0].astype(float)))
        found = thresholds.METHODS["gate"][0](p, t.labels, error=0.2, coverage=0.3)
        said, wrong = thresholds.METHODS["gate"][1](found, p), p.argmax(1) != t.labels
        kept = said >= 0
        assert found["feasible"] and wrong[kept].mean() <= 0.2 and kept.mean() == found["coverage"]
        g = thresholds.gate_of(found, p)
        assert max((g >= c).mean() for c in np.unique(g) if wrong[g >= c].mean() <= 0.2) == pytest.approx(kept.mean())
        assert (said[kept] == p.argmax(1)[kept]).all()


def test_binomial_tails_are_sums():
    for n, k, p in ((10, 3, 0.2), (50, 0, 0.02), (400, 12, 0.05), (5, 5, 0.5)):
        slow = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert thresholds.binomial_cdf(k, n, p) == pytest.approx(slow)
    assert thresholds.binomial_cdf(1200, 100_000, 0.01) > 0.999


def check_promise(repeats, name, n=1500):
    """Share of fits whose true rate is above the promised one."""
    fit, apply = thresholds.METHODS[name]
    broken = promised = 0
    key = {"exit": "fnr", "gate": "error"}[name]
    for seed in range(repeats):
        t, u = table(seed, n, bend=1.0, noise=0.0), table(10_000 + seed, 20_000, bend=1.0, noise=0.0)
        p, q = (np.exp(calibrate.log_softmax(x.logits[:, 0].astype(float))) for x in (t, u))
        found = fit(p, t.labels, **{key: 0.1}, delta=0.1, coverage=0.0)
        if found["feasible"]:
            promised += 1
            assert "0.9" in found["guarantee"]
            said = apply(found, q)
            out = (said >= 0) & ((u.labels == 1) if name == "exit" else True)
            broken += (said != u.labels)[out].mean() > 0.1
    assert promised > repeats / 2
    assert broken / repeats <= 0.1 + 3.3 * math.sqrt(0.09 / repeats)


@pytest.mark.parametrize("name", ["exit", "gate"])
def test_a_promise_is_broken_no_more_often_than_it_says(name):
    check_promise(30, name)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["exit", "gate"])
def test_a_promise_is_broken_no_more_often_than_it_says_in_300_fits(name):
    check_promise(300, name)


@pytest.mark.parametrize("name", thresholds.METHODS)
def test_one_class_is_a_sentence(name):
    p = np.full((9, 2), 0.5)
    with pytest.raises(ValueError, match="all 9 labels are 1"):
        thresholds.METHODS[name][0](p, np.ones(9, int))
    if name != "gate":
        with pytest.raises(ValueError, match="3 classes"):
            thresholds.METHODS[name][0](np.full((9, 3), 1 / 3), np.arange(9) % 3)


# policies


SPECS = {
    "mean temperature mcc": 2, "topk:k=2 mcc": 1, "logsumexp beta exit:fnr=0.1": 2, "mean isotonic gate:error=0.2": 2,
    "weights temperature lac:alpha=0.2": 3, "mean raps:alpha=0.1,lam=0.1": 1, "max platt crc:alpha=0.1": 2,
    "mean mondrian": 1, "mean auto aps": 2, "certain histogram scrc:alpha=0.2": 2, "mean spline crcp:rate=0.1": 2,
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_policy_is_a_plain_list_that_decides_alike_after_a_round_trip(spec):
    t, new = table(0, 1500, V=3), table(1, 300, V=3)
    policy = rules.fit_steps(t, spec)
    fitted = [step["fitted_on"] for step in policy["steps"] if "fitted_on" in step]
    assert len(fitted) == SPECS[spec]
    assert [f["part"] for f in fitted] == [[k + 1, len(fitted)] for k in range(len(fitted))]
    assert sum(f["n"] for f in fitted) == 1500 and fitted[0]["predictions_sha256"] == "ab"
    assert sum(map(sum, (f["n_per_class"] for f in fitted))) == 1500
    again = json.loads(json.dumps(policy, sort_keys=True, allow_nan=False))
    out, same = rules.decide(policy, new.logits, new.ids), rules.decide(again, new.logits, new.ids)
    order = np.random.default_rng(0).permutation(300)
    moved = rules.decide(again, new.logits[order], new.ids[order])
    for a, b, c in zip(out, same, moved):
        assert (a == b).all()
        np.testing.assert_allclose(a[order], c, rtol=1e-12)  # torch rounds a pool by where a row stands
    assert out.probabilities.sum(1) == pytest.approx(1) and out.sets.shape == (300, 2) and out.decision.min() >= -1
    single = out.decision >= 0
    assert (out.sets[single].sum(1) == 1).all() and (out.sets.argmax(1)[single] == out.decision[single]).all()
    if policy["steps"][-1]["kind"] != "conformal":
        assert out.sets[~single].all()
    assert {"feasible", "guarantee", "metrics", "classes", "layout"} <= set(policy)
    mixed = t.take(np.random.default_rng(1).permutation(1500))
    assert rules.decide(rules.fit_steps(mixed, spec), new.logits, new.ids).decision.tolist() == out.decision.tolist()


def test_steps_are_fitted_on_what_came_before_on_other_groups():
    t = table(2, 3000, V=2)
    policy = rules.fit_steps(t, "mean temperature mcc")
    part = rules.part_of(t.groups, t.labels, 2)
    assert 0.45 < part.mean() < 0.55 and all(len(set(part[t.groups == g])) == 1 for g in t.groups[::60])
    z = t.logits.astype(np.float64).mean(1)
    fit, apply = calibrate.METHODS["temperature"]
    found = fit(z[part == 0], t.labels[part == 0])
    assert policy["steps"][1]["parameters"] == found
    p = apply(found, z[part == 1])
    assert policy["steps"][2]["parameters"] == thresholds.METHODS["mcc"][0](p, t.labels[part == 1])
    three = rules.part_of(t.groups, t.labels, 3)
    assert np.bincount(three) / 3000 == pytest.approx([0.4, 0.3, 0.3], abs=0.04)
    assert (rules.part_of(t.groups, t.labels, 1) == 0).all()


@pytest.mark.parametrize("count", [2, 3])
def test_few_groups_still_give_each_step_its_share_of_every_class(count):
    """To the group that lies across the border; a hash alone deals 16 groups 12 and 4, now and then."""
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, 7, 16)
        groups = np.repeat([f"scene {seed}.{g}" for g in range(16)], sizes)
        labels = np.repeat(np.arange(16) % 2, sizes)
        part = rules.part_of(groups, labels, count)
        assert all(len({*part[groups == name]}) == 1 for name in groups)
        for kind in (0, 1):
            dealt = np.bincount(part[labels == kind], minlength=count).cumsum()
            asked = (labels == kind).sum() * np.cumsum(rules.SHARES[count])
            assert np.abs(dealt - asked).max() <= sizes.max() + 1e-9


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_each_step_gets_its_share_of_a_class_of_few_groups(count, groups):
    """On average: if the only group of a class always went to one step, no other could keep a promise about it."""
    seen = np.zeros((3, count))
    for seed in range(400):
        labels = np.repeat([0, 1, 2], groups)
        part = rules.part_of([f"{seed}/{i}" for i in range(3 * groups)], labels, count)
        for kind in range(3):
            seen[kind] += np.bincount(part[labels == kind], minlength=count) / groups / 400
    np.testing.assert_allclose(seen, np.tile(rules.SHARES[count], (3, 1)), atol=0.08)  # 3 standard errors of one group


def test_six_classes_of_one_group_leave_no_step_without_samples():
    for seed in range(100):
        part = rules.part_of([f"{seed}/{i}" for i in range(6)], np.arange(6), 2)
        assert 2 <= part.sum() <= 4


def test_the_order_of_samples_changes_no_part():
    t = table(4, 300)
    order = np.random.default_rng(0).permutation(300)
    parts = rules.part_of(t.groups, t.labels, 3)
    assert (rules.part_of(t.groups[order], t.labels[order], 3) == parts[order]).all()


WRONG = [
    "mcc temperature", "mean mcc temperature", "temperature mean mcc", "mean temperature", "mean mcc exit", "",
    "temperature beta mcc", "mean max mcc", "mean lac mcc",
]  # fmt: skip


@pytest.mark.parametrize("spec", WRONG)
def test_a_threshold_before_a_later_calibrator_cannot_be_written(spec):
    t = table(3)
    with pytest.raises(ValueError, match="at most one aggregate, then at most one calibrate, then exactly one"):
        rules.fit_steps(t, spec)
    policy = rules.fit_steps(t, "mean temperature mcc")
    policy["steps"] = policy["steps"][::-1]
    with pytest.raises(ValueError, match="exactly one of threshold, exit, gate, conformal"):
        rules.decide(policy, t.logits)


def test_wrong_names_options_and_tables_are_sentences():
    t = table(4, V=2)
    for spec, text in {
        "mean softmaxx mcc": "there is no method softmaxx; known are mean",
        "mean mcc:y=2": "no option y",
        "mean:k=2 mcc": "unexpected keyword argument 'k'",
        "mcc": "2 views of each sample",
        "mean lac:lam=1": "lac has no option lam",
        "mean crc:lam=1": "unexpected keyword argument 'lam'",
        "mean temperature:x=1 mcc": "unexpected keyword argument 'x'",
    }.items():
        with pytest.raises(ValueError, match=text):
            rules.fit_steps(t, spec)
    with pytest.raises(ValueError, match="is of kind threshold, not calibrate"):
        rules.fit_steps(t, [{"kind": "calibrate", "method": "mcc"}])
    with pytest.raises(ValueError, match=r"threshold mcc, on 600 samples \(\[600, 0\] of each class\): all 600 labels"):
        rules.fit_steps(t._replace(labels=t.labels * 0), "mean mcc")
    policy = rules.fit_steps(t, "mean temperature mcc")
    for logits in (t.logits[:, :, :1], np.full_like(t.logits, np.nan)):
        with pytest.raises(ValueError, match="the policy needs finite ones"):
            rules.decide(policy, logits)
    with pytest.raises(ValueError, match="3 ids for 600 samples"):
        rules.decide(policy, t.logits, ids=[1, 2, 3])


def test_unlabelled_samples_are_left_out():
    t = table(5, 600)
    some = t._replace(labels=np.where(np.arange(600) < 300, t.labels, -1))
    assert rules.fit_steps(some, "temperature mcc") == rules.fit_steps(t.take(np.arange(300)), "temperature mcc")


def test_slices_reach_the_steps_and_are_asked_for():
    t = table(6, 2000)
    night = np.arange(2000) % 5 == 0
    t = t._replace(logits=np.where(night[:, None, None], t.logits * 3, t.logits).astype(np.float32))
    slices = np.where(night, "night", "day")
    policy = rules.fit_steps(t, "temperature mondrian:alpha=0.2", slices, "daytime")
    own = policy["steps"][1]["parameters"]["slices"]
    assert own["night"]["temperature"] > 2 * own["day"]["temperature"] and policy["column"] == "daytime"
    assert sorted(policy["steps"][2]["parameters"]["quantiles"]) == ["day", "night"]
    out = rules.decide(policy, t.logits, t.ids, slices)
    assert all(out.sets[s, t.labels[s]].mean() > 0.75 for s in (night, ~night))
    with pytest.raises(ValueError, match="give the slice"):
        rules.decide(policy, t.logits, t.ids)


def test_two_models_are_mixed_by_what_they_are_worth():
    good, bad = table(7, 1500, bend=1.0), table(7, 1500, bend=1.0, noise=5.0)
    both = good._replace(logits=np.concatenate([good.logits, bad.logits], 1))
    policy = rules.fit_steps(both, "weights temperature mcc")
    weights = policy["steps"][0]["parameters"]["weights"]
    assert weights[0] > 0.85 and sum(weights) == pytest.approx(1)


# which calibrator


def test_the_choice_is_cross_fitted_by_group_and_refuses_what_costs_decisions(monkeypatch):
    t = table(8, 900)
    z = t.logits[:, 0].astype(float)
    name, worth = choice.choose(z, t.labels, t.groups)
    assert (
        name in ("temperature", "vector", "platt", "beta", "dirichlet")
        and worth[name]["nll"] < worth["none"]["nll"] - 0.02
    )
    assert worth[name]["nll"] == min(w["nll"] for n, w in worth.items() if n != "none")
    fold = choice.folds_of(t.labels, t.groups, 5)
    assert all(len(set(fold[t.groups == g])) == 1 for g in t.groups) and np.bincount(fold).min() > 150
    p = choice.cross_fit("temperature", z, t.labels, fold)
    rest, fit = fold != 2, calibrate.METHODS["temperature"]
    assert (p[~rest] == fit[1](fit[0](z[rest], t.labels[rest]), z[~rest])).all()
    liar = (lambda z, y, s=None: {}, lambda f, z, s=None: np.eye(2)[np.arange(len(z)) % 2] * 0.98 + 0.01)
    monkeypatch.setitem(calibrate.METHODS, "platt", liar)
    monkeypatch.setattr(choice, "nll", lambda y, p: -5.0 if set(np.unique(p)) == {0.01, 0.99} else metrics.nll(y, p))
    assert choice.choose(z, t.labels, t.groups)[0] != "platt"


# the file of predictions


def test_a_table_comes_back_and_damage_is_a_sentence(tmp_path):
    t = table(9, 50, V=3, C=4)
    path = tables.write(tmp_path / "run" / "predictions", t)
    for where in (path, tmp_path / "run", tmp_path / "run" / "predictions"):
        back = tables.read(where)
        assert all((a == b).all() for a, b in zip(back[:4], t[:4])) and back.logits.dtype == np.float32
        assert back.facts["classes"] == t.facts["classes"] and len(back.facts["npz_sha256"]) == 64
    assert tables.write(tmp_path / "again", t).read_bytes() == path.read_bytes()
    with pytest.raises(FileNotFoundError, match="val_test.npz does not exist"):
        tables.read(tmp_path / "run", "val_test")
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that its .json describes"):
        tables.read(path)
    facts = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**facts, "classes": "a"}))
    with pytest.raises(ValueError, match="field 'classes'"):
        tables.read(path)


def test_a_wrong_table_is_a_sentence(tmp_path):
    t = table(10, 20)
    logits, labels, ids = t.logits.copy(), t.labels.copy(), t.ids.copy()
    logits[3] = np.nan
    labels[0], ids[1] = 2, ids[0]
    for wrong, text in [
        ({"logits": logits}, "NaN or infinite, first 10/3.jpg"),
        ({"labels": labels}, "labels from 0 to 2"),
        ({"ids": ids}, "names 10/0.jpg 2 times"),
        ({"ids": np.arange(20)}, "give texts"),
        ({"groups": t.groups[:3]}, "do not fit"),
        ({"logits": t.logits[:, 0]}, "do not fit"),
        ({"facts": {**t.facts, "classes": ["a"]}}, "two or more"),
        ({"facts": {**t.facts, "classes": list("abc")}}, "logits of 2 classes and names 3"),
    ]:
        with pytest.raises(ValueError, match=text):
            tables.write(tmp_path, t._replace(**wrong))
    assert not list(tmp_path.iterdir())


def test_the_csv_for_people(tmp_path):
    t = table(11, 4)._replace(labels=np.array([0, 1, -1, 0]), ids=np.array(["=a", "b", "c", "d"]))
    p = np.array([[0.25, 0.75]] * 4)
    tables.write_csv(tmp_path / "t.csv", t, p, np.array([1, -1, 0, 1]), p > [[0.3, 0.3]])
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "id,group,label,p_c0,p_c1,decision,set"
    assert lines[1] == "'=a,11/0,c0,0.25,0.75,c1,c1" and lines[2].endswith(",left,c1") and ",,0.25" in lines[3]


def test_a_hundred_thousand_rows_take_seconds():
    t = table(12, 100_000, V=2, C=3)
    policy = rules.fit_steps(t, "mean temperature raps:alpha=0.1")
    out = rules.decide(policy, t.logits, t.ids)
    assert abs(out.sets[np.arange(100_000), t.labels].mean() - 0.9) < 0.01
    assert conformal.METHODS["raps"][0] and metrics.worth(t.labels, out.probabilities)["ece"] < 0.02


# which decisions will be wrong


def test_the_failure_predictor_sees_what_the_largest_probability_cannot():
    """Samples whose views disagree are labelled at random: their mean may be as sure as that of others."""
    t = table(13, 3000, V=5, bend=1.0, noise=0.1)
    random = np.random.default_rng(0)
    torn = random.random(3000) < 0.4
    logits = t.logits.astype(float)
    swing = np.array([3.0, -3.0, 3.0, -3.0, 0.0])[None, :, None] * [[[1.0, -1.0]]]
    logits[torn] += swing
    labels = np.where(torn, random.integers(0, 2, 3000), (logits.mean(1)[:, 1] > logits.mean(1)[:, 0]).astype(int))
    flip = random.random(3000) < 0.05
    labels = np.where(flip, 1 - labels, labels)
    found = failure.compare(logits, labels, t.groups)
    assert found["predictor"] > found["largest_probability"] + 0.2 and found["predictor"] > 0.75
    one = json.loads(json.dumps(failure.fit(logits, labels), allow_nan=False))
    chance = failure.apply(one, logits)
    wrong = logits.mean(1).argmax(1) != labels
    assert chance.mean() == pytest.approx(wrong.mean(), abs=1e-3) and chance[torn].mean() > 3 * chance[~torn].mean()
    x = failure.features(logits[:7])
    for row, z in zip(x, logits[:7]):
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        mean = np.exp(z.mean(0)) / np.exp(z.mean(0)).sum()
        own = p[:, mean.argmax()]
        slow = [mean.max(), p.max(1).var(), -(mean * np.log(mean)).sum(), own.max() - own.mean(), own.std()]
        assert row == pytest.approx([*slow, -(p * np.log(p)).sum(1).mean()])
    single = logits[:, :1]
    assert failure.features(single)[:, [1, 3, 4]].max() < 1e-12
    assert np.isfinite(failure.compare(single, labels, t.groups)["predictor"])
    with pytest.raises(ValueError, match="0 of 3000 decisions are wrong"):
        failure.fit(logits, logits.mean(1).argmax(1))


def test_on_noise_alone_the_failure_predictor_claims_nothing():
    t = table(14, 1500, V=3)
    labels = np.random.default_rng(1).integers(0, 2, 1500)
    found = failure.compare(t.logits, labels, t.groups)
    assert 0.44 < found["predictor"] < 0.56
