"""Planted shifts are found, no shift is not; the numbers of shift.py have slow oracles."""

import json

import numpy as np
import pytest
from PIL import Image
from test_baseline import bright_or_dark, fitted, photos, vit  # noqa: F401 - fixtures
from test_rules import table

from tools import drift, fit_policy
from tools.lib import rules, shift, tables, watch
from tools.lib.files import write_json


def sides(seed, n=150, m=120, move=0.0, stretch=1.0, group=3, D=4):
    """Two samples of a normal score and of features, in groups that share half of their spread."""
    rng = np.random.default_rng(seed)
    out, groups = [], []
    for k, (count, by) in enumerate(((n, (0.0, 1.0)), (m, (move, stretch)))):
        g = np.arange(count) // group
        x = rng.normal(size=(g.max() + 1, D))[g] + rng.normal(size=(count, D))
        out.append(x * by[1] + by[0])
        groups.append(np.array([f"{k}/{i}" for i in g]))
    return out, groups


def compared(seed, draws=199, embeddings=True, **how):
    (a, b), groups = sides(seed, **how)
    features = (np.concatenate([a, b]), np.arange(len(a) + len(b))) if embeddings else None
    return shift.compare({"score": (a[:, 0], b[:, 0])}, groups, features, (a[:, 1] > 0, b[:, 1] > 0), draws, seed)


# ----- the statistics


def test_statistics_have_slow_oracles():
    rng = np.random.default_rng(0)
    values, codes = rng.integers(0, 8, 60).astype(float), rng.integers(0, 4, 60)
    x = rng.normal(size=(60, 3))
    member = (rng.random((5, 60)) < 0.4).astype(np.float32)
    kernel = shift.gaussian_kernel(x)
    ks, psi, tv = (f(member, v) for f, v in ((shift.kolmogorov, values), (shift.psi, codes), (shift.variation, codes)))
    far, mean = shift.mmd(member, kernel), shift.mean_shift(member, x)
    spread = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    for b, inside in enumerate(member.astype(bool)):
        p, q = ([np.mean(values[side] <= t) for t in range(8)] for side in (inside, ~inside))
        assert ks[b] == pytest.approx(np.abs(np.subtract(p, q)).max(), abs=1e-5)
        p, q = (np.array([np.sum(codes[side] == c) for c in range(4)]) for side in (inside, ~inside))
        assert tv[b] == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2, abs=1e-5)
        p, q = ((k + 0.5) / (k.sum() + 2) for k in (p, q))
        assert psi[b] == pytest.approx(((p - q) * np.log(p / q)).sum(), abs=1e-5)
        block = [[kernel[np.ix_(s, t)].mean() for t in (inside, ~inside)] for s in (inside, ~inside)]
        assert far[b] == pytest.approx(block[0][0] + block[1][1] - 2 * block[0][1], abs=1e-5)
        assert mean[b] == pytest.approx(np.linalg.norm(x[inside].mean(0) - x[~inside].mean(0)) / spread, abs=1e-5)


def test_groups_are_dealt_as_wholes():
    groups, current = np.repeat(list("abcdefghijklmnopqrst"), 4), np.repeat([False, True], 40)
    dealt = shift.deal(groups, current, 50, np.random.default_rng(0))
    assert np.array_equal(dealt[0].astype(bool), current)
    assert (dealt.reshape(51, 20, 4).std(2) == 0).all() and (dealt.sum(1) == 40).all()
    with pytest.raises(ValueError, match="4 groups on one side: at least 8"):
        shift.deal(groups, np.repeat([False, True], [64, 16]), 9, np.random.default_rng(0))


def test_no_shift_raises_an_alarm_as_rarely_as_promised():
    """60 looks without a shift at 5%: 3 are expected, 8 or more have a chance of 0.8%."""
    assert sum(compared(seed, draws=99)["p"] <= 0.05 for seed in range(60)) < 8


@pytest.mark.proof
def test_false_alarms_of_1000_looks():
    """Groups of three; at 1% the bound of 1,000 looks is 10, more than 18 have a chance of 0.7%."""
    alarms = sum(compared(seed, draws=499)["p"] <= 0.01 for seed in range(1000))
    print(f"{alarms} alarms in 1000 looks without a shift, at 1%")
    assert alarms <= 18


@pytest.mark.parametrize("how", [dict(move=1.5), dict(stretch=3.0), dict(move=-1.5, group=1)])
def test_planted_shifts_are_found(how):
    found = compared(0, draws=999, **how)
    assert found["p"] <= 0.002 and min(s["p"] for s in found["statistics"].values()) == 0.001


def test_a_shift_of_the_features_alone_is_found():
    (a, b), groups = sides(3)
    b[:, 3] += 2.0
    features = np.concatenate([a, b]), np.arange(len(a) + len(b))
    found = shift.compare({"score": (a[:, 0], b[:, 0])}, groups, features, None, 499)
    assert found["p"] <= 0.004 < found["statistics"]["ks score"]["p"]
    assert found["statistics"]["mmd of embeddings"]["p"] <= 0.004


def test_pictures_of_one_scene_count_as_one():
    """A scene of 60 alike pictures looks like a shift to whoever counts pictures."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=120), np.concatenate([rng.normal(size=20), np.full(60, 1.5) + 0.01 * rng.normal(size=60)])
    scenes = [np.array([f"a{i}" for i in range(120)]), np.array([*(f"b{i}" for i in range(20)), *["scene"] * 60])]
    alone = [scenes[0], np.array([f"b{i}" for i in range(80)])]
    assert shift.compare({"score": (a, b)}, alone, draws=499)["p"] <= 0.01
    assert shift.compare({"score": (a, b)}, scenes, draws=499)["p"] > 0.01


# ----- the program


def saved(folder, name, found):
    tables.write(folder, found._replace(facts={**found.facts, "weights_sha256": "w" * 64, "split_sha256": "s" * 64,
                                               "split": name}))  # fmt: skip
    return folder / f"{name}.npz"


def look(tmp_path, current, *more):
    words = ["--reference", tmp_path / "val_calib.npz", "--current", *current, "--out", tmp_path / "out", *more]
    return drift.main([str(word) for word in words])


def shifted(found, by):
    found.logits[:, :, 1] += by
    return found


def test_no_shift_a_shift_and_what_they_leave_behind(tmp_path, capsys):
    saved(tmp_path, "val_calib", table(0, 600, V=2))
    same = saved(tmp_path, "same", table(1, 450, V=2))
    assert look(tmp_path, [same]) == 0
    assert "No shift found" in capsys.readouterr().out
    prom = (tmp_path / "out" / "metrics.prom").read_text()
    assert 'dinox_verdict{run="out",verdict="no shift"} 1' in prom and 'dinox_exit_code{run="out"} 0' in prom
    assert 'dinox_drift_exchangeable{run="out"} 1' in prom and 'dinox_drift_watched{run="out"} 450' in prom
    other = saved(tmp_path, "other", shifted(table(2, 450, V=2), 4.0))
    assert look(tmp_path, [other]) == 2
    said = capsys.readouterr().out
    assert "have shifted" in said and "exchangeability lost at picture" in said
    result = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert result["verdict"] == "shift" and result["lost"]["picture"] < 450 and result["n"] == 600
    assert {"psi p of c1", "ks largest probability", "label shift", "psi spread of views"} <= set(result["statistics"])
    assert [row["until"] for row in result["over_time"]] == [200, 400, 450]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Over time" in page and "Wealth against exchangeability" in page
    assert 'dinox_drift_exchangeable{run="out"} 0' in (tmp_path / "out" / "metrics.prom").read_text()


def test_a_small_shift_is_a_warning(tmp_path):
    saved(tmp_path, "val_calib", table(0, 1500))
    small = saved(tmp_path, "small", shifted(table(1, 1500), 1.2))
    assert look(tmp_path, [small], "--max-psi", "9", "--max-ks", "9") == 1


def test_months_are_one_stream_and_coverage_is_followed(tmp_path):
    saved(tmp_path, "val_calib", table(0, 900))
    words = ["--predictions", tmp_path / "val_calib.npz", "--out", tmp_path / "policy.json", "--method", "mean",
             "temperature", "gate:error=0.2"]  # fmt: skip
    assert fit_policy.main([str(w) for w in words]) == 0
    months = [saved(tmp_path, f"month_{k}", table(5 + k, 200)) for k in range(3)]
    assert look(tmp_path, months, "--policy", tmp_path / "policy.json", "--window", "100") == 0
    result = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert len(result["over_time"]) == 6 and 0 < result["over_time"][0]["decided"] < 1
    assert 0 < result["reference"]["decided"] < 1 and "psi decided" in result["statistics"]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda t: t._replace(facts={**t.facts, "weights_sha256": "v" * 64}), "weights_sha256 is not that of"),
        (lambda t: t._replace(facts={**t.facts, "classes": ["c0", "other"]}), "classes is not that of"),
        (lambda t: t.take(np.arange(6)), "groups on one side"),
    ],
)
def test_what_cannot_be_compared_is_exit_code_3(tmp_path, capsys, spoil, words):
    saved(tmp_path, "val_calib", table(0, 300))
    found = table(1, 300)
    found = spoil(found._replace(facts={**found.facts, "weights_sha256": "w" * 64}))
    tables.write(tmp_path, found._replace(facts={**found.facts, "split_sha256": "s", "split": "now"}))
    (tmp_path / "out").mkdir()
    assert look(tmp_path, [tmp_path / "now.npz"]) == 3
    assert words in capsys.readouterr().err
    assert 'verdict="could not look"} 1' in (tmp_path / "out" / "metrics.prom").read_text()
    assert look(tmp_path, [tmp_path / "nothing.npz"]) == 3


def test_folders_of_pictures_are_asked_about_and_their_features_compared(photos, vit, tmp_path):  # noqa: F811
    """Darker pictures than the reference's: with the classifier, its features tell."""
    fitted(photos, vit, tmp_path / "run")
    flags = ["--ckpt", str(tmp_path / "run" / "best.pth"), "--reference", str(tmp_path / "run"), "--draws", "199"]
    other = bright_or_dark(tmp_path / "other")
    for path in other.glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 3).save(path)
    code = drift.main([*flags, "--current", str(other), "--out", str(tmp_path / "out"), "--device", "cpu"])
    result = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert {"mmd of embeddings", "mean shift of embeddings"} <= set(result["statistics"]) and code == 2
    assert result["statistics"]["mmd of embeddings"]["p"] <= 0.01
    assert drift.main([*flags, "--current", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 3


# ----- the watch


def test_the_watch_survives_restarts_and_revokes_decisions(tmp_path):
    reference, calm, odd = table(0, 500), table(1, 300), shifted(table(2, 300), 3.0)
    for t in (reference, calm, odd):
        t.facts["weights_sha256"] = "w" * 64
    policy = {"guarantee": "90%"}

    def p_of(t):
        return np.exp(t.logits[:, 0] - np.logaddexp.reduce(t.logits[:, 0], 1)[:, None])

    state = watch.begin(reference, p_of(reference), policy)
    watch.watch(state, calm, p_of(calm), None)
    assert state["lost"] is None and watch.gauges(state)["drift_exchangeable"] == 1
    write_json(tmp_path / "watch.json", state)
    state = watch.read_watch(tmp_path / "watch.json")
    before = state["seen"]
    watch.watch(state, odd, p_of(odd), "2026-11-03")
    assert 300 < state["lost"]["picture"] < 400
    assert "(2026-11-03): the guarantee (90%) no longer holds" in watch.in_words(state)
    out = rules.Decisions(p_of(odd), np.eye(2, dtype=bool)[odd.labels], np.zeros(300, int))
    left = watch.revoked(out, state, before)
    first = state["lost"]["picture"] - before - 1
    assert (left.decision[:first] == 0).all() and (left.decision[first:] == -1).all() and left.sets[first:].all()
    with pytest.raises(ValueError, match="the watch is of weights"):
        watch.watch(state, odd._replace(facts={**odd.facts, "weights_sha256": "v" * 64}), p_of(odd), None)
    (tmp_path / "watch.json").write_text("{}")
    with pytest.raises(ValueError, match="watch.json"):
        watch.read_watch(tmp_path / "watch.json")
