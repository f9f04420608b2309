"""What a probe says is what its numbers prove: planted labels, planted gains, and words that follow them."""

import json

import numpy as np
import pytest
import torch
from test_metrics import probability, slow_auc

import data
from tools.lib import fits, metrics
from tools.lib import judge as m

torch.set_num_threads(1)

# planted labels: what only size knows, what only texture knows


def simulate(seed, kind, folds=1, patients=110, n_train=60):
    """Features that see size and texture through noise, labels planted on one of them -> judgement of held-out ones."""
    random = np.random.default_rng(seed)
    n = 2 * (patients + n_train)
    groups, sizes = np.array([f"p{i // 2}" for i in range(n)]), np.exp(random.normal(2.4, 0.4, n))
    size, texture = (np.log(sizes) - 2.4) / 0.4, random.normal(size=n)
    signal = size if kind == "size" else texture
    y = (signal + 0.7 * random.normal(size=n) > 0).astype(int)
    mix = random.normal(size=(2, 30))
    X = np.stack([size, texture], 1) @ mix + 1.5 * random.normal(size=(n, 30))
    test = (np.arange(n) >= 2 * n_train)[None]
    predictors = {"probe": (fits.logistic, [X]), "size": (fits.ruler, [np.log(sizes)[:, None]])}
    if folds > 1:
        fold = fits.group_folds(y, groups, folds, seed)
        test = np.stack([fold == k for k in range(folds)])
    p, _ = fits.held_out(predictors, y, groups, [(~test, test)])
    keep = test.any(0)
    p = {name: q[:, keep] for name, q in p.items()}
    return m.judge(y[keep], groups[keep], p, test[:, keep].argmax(0)[None], sizes[keep], repeats=400)


@pytest.mark.slow
@pytest.mark.parametrize("folds", [1, 5])
def test_a_label_of_size_alone_never_makes_the_backbone_better_than_the_ruler(folds):
    """20 seeds: probe minus size never proven above 0; size + features minus size contains 0 in at least 18."""
    results = [simulate(seed, "size", folds) for seed in range(20)]
    assert all(r["differences"]["probe - size"]["low"] <= 0 for r in results)
    both = [r["differences"]["size + features - size"] for r in results]
    assert sum(d["low"] <= 0 <= d["high"] for d in both) >= 18
    assert np.mean([r["predictors"]["size"]["auc"]["value"] for r in results]) > 0.85
    assert abs(np.mean([r["matched"]["size"]["value"] for r in results]) - 0.5) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("folds", [1, 5])
def test_a_label_of_texture_alone_leaves_the_ruler_at_chance_and_the_probe_above(folds):
    for seed in range(3):
        r = simulate(seed, "texture", folds)
        auc = {name: item["auc"]["value"] for name, item in r["predictors"].items()}
        assert abs(auc["size"] - 0.5) < 0.12 and auc["probe"] > 0.7
        assert r["differences"]["probe - size"]["low"] > 0 and r["differences"]["size + features - size"]["low"] > 0
        assert r["matched"]["probe"]["value"] > 0.7 and all(line["probe"]["value"] > 0.6 for line in r["terciles"])


# judgement


def planted(seed, n=200):
    """One repeat of predictions: the probe sees the label, the ruler and random weights do not."""
    random = np.random.default_rng(seed)
    labels, groups = random.permutation(np.arange(n) % 2), np.arange(n) // 2
    scores = {"probe": 2.0 * labels, "size": 0.0 * labels, "random weights": 0.0 * labels}
    p = {name: probability(score + random.normal(size=(3, n))) for name, score in scores.items()}
    return labels, groups, {name: np.stack([1 - q, q], -1) for name, q in p.items()}, random.uniform(5, 20, n)


def test_judgement_pairs_what_it_compares_and_says_it_in_words():
    labels, groups, predictions, sizes = planted(0)
    folds = np.zeros((3, len(labels)), int)
    result = m.judge(labels, groups, predictions, folds, sizes, repeats=300)
    probe = result["predictors"]["probe"]
    aucs = [slow_auc(labels, p[:, 1]) for p in predictions["probe"]]
    assert probe["auc"]["value"] == pytest.approx(np.mean(aucs))
    assert probe["auc"]["spread"] == pytest.approx(np.std(aucs))
    assert set(probe) == {"auc", "average_precision", "sensitivity_at_90", "accuracy", "mcc", "brier", "ece"}
    for item in probe.values():
        assert item["low"] <= item["value"] + 0.05 and item["high"] >= item["value"] - 0.05

    def both(index):
        pairs = zip(predictions["probe"], predictions["size"])
        return np.mean([np.subtract(*(metrics.auc(labels[index], p[index, 1]) for p in pair)) for pair in pairs])

    rows = [np.repeat(np.arange(len(row)), row) for w in metrics.draws(groups, 300, 0) for row in w]
    low, high = metrics.interval([both(index) for index in rows])
    gain = result["differences"]["probe - size"]
    assert (gain["low"], gain["high"]) == pytest.approx((low, high))
    assert gain["value"] == pytest.approx(both(np.arange(200)))
    assert gain["p"] < 0.01 and m.tone(result) == "good"
    text = m.verdict(result)
    assert "the backbone tells more than a ruler" in text and "pretraining helps" in text and "100 patients" in text
    assert m.compared(result, "probe", "size") in text and m.standing(result, "probe", "size") == 1
    assert sum(line["samples"] for line in result["terciles"]) == 200 and result["matched"]["pairs"] > 500
    for line, part in zip(result["terciles"], np.array_split(np.argsort(sizes), 3)):
        slow = np.mean([slow_auc(labels[part], p[part, 1]) for p in predictions["probe"]])
        assert line["probe"]["value"] == pytest.approx(slow, abs=0.02)


def test_a_probe_that_is_no_better_is_not_called_better():
    labels, groups, predictions, _ = planted(1)
    predictions["probe"] = predictions["size"][:, :, ::1].copy()
    result = m.judge(labels, groups, predictions, np.zeros((3, 200), int), repeats=300)
    assert "not shown to tell more than a ruler" in m.verdict(result) and m.tone(result) != "good"
    worse = {"low": 0.42, "high": 0.48, "value": 0.45}
    result["predictors"]["probe"]["auc"] = worse  # above a ruler that fails, but itself below chance
    result["differences"]["probe - size"] = {"value": 0.1, "low": 0.05, "high": 0.2, "p": 0.001}
    assert "not shown to tell more than a ruler" in m.verdict(result) and m.tone(result) != "good"


def judged(probe=(0.7, 0.6, 0.8), other=0.55, gain=(0.15, 0.05, 0.25, 0.01)):
    """A result as results.json holds it, with one comparison."""
    predictors = {"probe": dict(zip(("value", "low", "high"), probe)), "size": dict(value=other, low=0.4, high=0.7)}
    difference = dict(zip(("value", "low", "high", "p"), gain))
    return dict(samples=9, patients=7, predictors={name: {"auc": item} for name, item in predictors.items()},
                differences={"probe - size": difference})  # fmt: skip


@pytest.mark.parametrize("result, side, claim, tone", [
    (judged(), 1, "the backbone tells more than a ruler", "good"),
    (judged(gain=(0.15, -0.01, 0.25, 0.06)), 0, "not shown to tell more than a ruler", "warn"),
    (judged(gain=(0.15, 0.001, 0.25, 0.06)), 0, "not shown to tell more than a ruler", "warn"),  # p
    (judged(probe=(0.55, 0.45, 0.6)), 0, "not shown to tell more than a ruler", "warn"),  # itself at chance
    (judged(gain=(-0.2, -0.3, -0.1, 0.01)), -1, "the ruler is better", "bad"),
    (judged(gain=(0.15, None, None, None)), 0, "not shown to tell more than a ruler", "warn"),
    (judged(probe=(0.7, None, None)), 0, "not shown to tell more than a ruler", "warn"),
])  # fmt: skip
def test_proven_is_one_rule_for_sentence_and_tone(result, side, claim, tone):
    """Also of numbers that came back from JSON, where NaN is null."""
    result = json.loads(json.dumps(result))
    assert m.standing(result, "probe", "size") == side and m.tone(result) == tone
    sentence = m.compared(result, "probe", "size")
    assert sentence.endswith(claim) and sentence.startswith("probe minus size ") and sentence in m.verdict(result)
    assert m.standing(result, "probe", "raw pixels") is None and m.compared(result, "probe", "raw pixels") == ""


def test_a_gain_over_what_is_below_chance_is_called_too_large():
    sentence = m.compared(judged(other=0.45), "probe", "size")
    assert sentence.endswith("than a ruler (overstated: size itself is below chance, 0.5)")
    assert "overstated" not in m.compared(judged(other=0.45, gain=(-0.2, -0.3, -0.1, 0.01)), "probe", "size")


def test_caveats_stand_in_title_and_verdict():
    assert m.caveats([], 9, True, 0) == [] and m.titled("T", []) == "T"
    assert m.caveats([], 9, True, 0, 2) == ["2 other weights or policies looked at val_test before"]
    texts = m.caveats(["a", "b"], 9, False, 3)
    assert m.titled("T", texts) == (
        "T: backbone has seen these patients (2 of 9); what the backbone was pretrained on is unknown; near-duplicates "
        "cross the splits (3 sets)"
    )
    text = m.verdict(judged() | {"caveats": texts})
    assert text.endswith(
        ". Backbone has seen these patients (2 of 9). What the backbone was pretrained on is unknown. Near-duplicates "
        "cross the splits (3 sets)."
    )


def test_the_row_of_the_second_stage_says_how_often_it_was_size_alone():
    chosen = [fits.ALONE, fits.BOTH, fits.ALONE]
    result = {"settings": {"size + features": chosen, "probe": [1.0] * 3, "size": []}}
    assert m.row_name(result, "size + features") == "size + features (size alone in 2 of 3 fits)"
    assert m.row_name(result, "probe") == "probe" and m.row_name({}, "size + features") == "size + features"


def test_the_page_and_the_terminal_show_every_predictor(capsys):
    labels, groups, predictions, sizes = planted(3)
    result = m.judge(labels, groups, predictions, np.zeros((3, 200), int), sizes, repeats=50)
    predictions["size + features"] = predictions["size"]
    result["predictors"]["size + features"] = result["predictors"]["size"]
    result |= {"title": "T", "verdict": m.verdict(result), "settings": {"size + features": [fits.ALONE] * 3}}
    m.show(result)
    text, page = capsys.readouterr().out, str(m.section(result, labels, ["no", "yes"], predictions, sizes))
    page = page.replace("<br><small>", " ").replace("</small>", "")  # what is in brackets stands on a line of its own
    for where in (text, page):
        assert "size + features (size alone in 3 of 3 fits)" in where and "random weights" in where
    assert page.count("<svg") == 4 and "size-matched pairs" in page
    curve = {"shares": (0.5, 1.0), "auc": {"probe": [None, [0.7, 0.6, 0.8]], "size": [None, None]}}
    page = str(m.section(result | {"label_efficiency": curve}, labels, ["no", "yes"], predictions))
    assert "Label efficiency" in page and "Score and size" not in page


def test_an_auc_is_told_once():
    labels, groups, predictions, sizes = planted(3)
    predictions["size + features"] = predictions["size"]
    said = m.verdict(m.judge(labels, groups, predictions, np.zeros((3, 200), int), sizes, repeats=50))
    assert said.count("Size: ") == 1 and "Size + features minus size 0.000" in said


@pytest.mark.parametrize("classes", [2, 3])
def test_a_calibration_error_is_compared_with_what_so_few_samples_give_by_chance(classes):
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(classes), (3, 47))
    chance = m.calibration_by_chance(p)
    truths = [(random.random((47, 1)) > np.cumsum(p[0], 1)[:, :-1]).sum(1) for _ in range(400)]
    errors = [metrics.calibration_error(truth, p[0][:, 1] if classes == 2 else p[0]) for truth in truths]
    assert chance["mean"] == pytest.approx(np.mean(errors), rel=0.1)
    assert chance["mean"] > 0.1 and np.mean(np.array(errors) > chance["high"]) == pytest.approx(0.05, abs=0.04)
    many = m.calibration_by_chance(random.dirichlet(np.ones(classes), (1, 5000)), draws=20)
    assert many["high"] < 0.03  # it is the few samples that do it
    result = {"samples": 47, "calibration_by_chance": chance}
    for error, said in (
        (chance["high"] - 0.01, "is no more than that."),
        (chance["high"] + 0.01, "probabilities are off"),
    ):
        text = m.calibration(result | {"predictors": {"probe": {"ece": {"value": error}}}}, 9)
        assert said in text and "47 samples in 9 of 10 bins, 5 in each on average" in text


def test_label_efficiency_is_scored_on_rows_that_no_share_is_fitted_on():
    random = np.random.default_rng(0)
    y, groups = np.arange(120) % 2, np.array([f"p{i // 2}" for i in range(120)])
    X = random.normal(size=(120, 5)) + y[:, None]
    train = np.arange(120) < 80
    curve = m.label_efficiency({"probe": (fits.logistic, [X])}, y, groups, train, 2)
    assert curve["shares"] == m.FRACTIONS and curve["auc"]["probe"][-1][0] > 0.8
    other = np.where(train, y, 1 - y)
    flipped = m.label_efficiency({"probe": (fits.logistic, [X])}, other, groups, train, 2)
    assert flipped["auc"]["probe"][-1][0] == pytest.approx(1 - curve["auc"]["probe"][-1][0])


def test_constant_predictions_are_refused():
    p = np.full((2, 5, 2), 0.5)
    p[0] += np.arange(5)[:, None] / 100
    with pytest.raises(ValueError, match=r"constant \(repeat 1\)"):
        m.refuse_constant(p)
    m.refuse_constant(p[:1])


def test_weights_of_a_folder_are_those_of_its_file(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(b"x")
    assert m.weights_sha256(tmp_path / "one") == data.file_sha256(tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "more.safetensors").write_bytes(b"y")
    both = m.weights_sha256(tmp_path / "one")
    (tmp_path / "one" / "more.safetensors").write_bytes(b"z")
    assert m.weights_sha256(tmp_path / "one") != both
    look = m.used_by("p.py", tmp_path / "one" / "model.safetensors", tmp_path / "one" / "more.safetensors", "why")
    assert sorted(look) == sorted(data.USED_BY) and look["policy_sha256"] is None and look["program"] == "p.py"


def test_views_follow_the_checkpoint_where_it_knows_the_encoding():
    facts = {"encoding": "hu16-v1", "eval_view": {"size": 96, "window": [0, 400]}}
    assert m.choose_view(facts, "hu16-v1", 0, 16) == facts["eval_view"]
    assert m.choose_view(facts, "hu16-v1", 64, 16) == {"size": 64, "window": [0, 400]}
    assert m.choose_view(facts, "photo", 0, 16) == data.eval_view("photo") and facts["eval_view"]["size"] == 96
    with pytest.raises(ValueError, match="trained on hu16-v1, --data is rgb-v1"):
        m.choose_view(facts, "rgb-v1", 0, 16)
    with pytest.raises(ValueError, match="--size 40 is not a multiple of the patch size 16"):
        m.choose_view(facts, "hu16-v1", 40, 16)


def test_random_backbones_depend_on_the_seed_alone():
    arch = {"name": "vit_test", "overrides": {}}
    torch.manual_seed(5)
    (one,), before = m.random_backbones(arch, 0), torch.rand(1)
    torch.manual_seed(5)
    first, second = m.random_backbones(arch, 0, 2)
    assert torch.rand(1) == before  # the generator of whoever calls is left alone
    weights = [net.patch_embed.proj.weight for net in (one, first, second, *m.random_backbones(arch, 1))]
    assert torch.equal(weights[0], weights[1]) and not any(torch.equal(weights[0], w) for w in weights[2:])


def test_of_a_handful_of_groups_nothing_is_claimed():
    """Eight pictures of two scenes, each with both labels: every resample is perfect, and proves nothing."""
    labels, groups = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array(list("abababab"))
    scores = {
        "probe": [0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9],
        "random weights": [0.7, 0.2, 0.3, 0.8, 0.6, 0.4, 0.9, 0.5],
    }
    predictions = {name: np.stack([1 - np.array(values), values], 1)[None] for name, values in scores.items()}
    result = m.judge(labels, groups, predictions, np.zeros((1, 8), int), repeats=300)
    said = m.verdict(result)
    assert "AUC 1.000 (too few for an interval)" in said and "pretraining is not shown to help" in said
    assert m.tone(result) == "warn"
