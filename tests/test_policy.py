"""From exported tables to policy.json and a report, as a user types it; looks at val_test, and who may look again."""

import hashlib
import json

import numpy as np
import pytest
from test_rules import table

from tools import evaluate, fit_policy
from tools.lib import choice, policies, rules, tables


class Run:
    """A data folder with a split, and a run with predictions of val_calib and val_test."""

    def __init__(self, folder, n=900, C=2, weights="w" * 64, V=2, **more):
        self.data, self.out = folder / "data", folder / f"run_{weights[0]}"
        (self.data / "_splits").mkdir(parents=True, exist_ok=True)
        split = self.data / "_splits" / "splits.json"
        split.write_text("{}")
        facts = {"weights_sha256": weights, "split_sha256": hashlib.sha256(b"{}").hexdigest(), "data": str(self.data)}
        for seed, name in ((0, "val_calib"), (1, "val_test")):
            t = table(seed, n, V=V, C=C, **more)
            tables.write(self.out / "predictions", t._replace(facts={**t.facts, **facts, "split": name}))
        self.policy = self.out / "policy.json"

    def fit(self, *words):
        return fit_policy.main(["--predictions", str(self.out), "--out", str(self.policy), "--method", *words])

    def evaluate(self, *words):
        words = ["--predictions", str(self.out), "--policy", str(self.policy), "--bootstrap", "100", *words]
        return evaluate.main([*words, "--out", str(self.out / "evaluation")])

    def looks(self):
        path = self.data / "_splits" / "test_uses.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    "method", ["mean temperature mcc", "logsumexp exit:fnr=0.1", "mean auto aps", "mean gate:error=0.2"]
)
def test_fit_and_evaluate_leave_what_they_say(tmp_path, capsys, method):
    run = Run(tmp_path)
    assert run.fit(*method.split()) == 0
    said = capsys.readouterr().out
    assert (
        "FNR and recall speak, is c1, the last by name" in said
        and "foretold with AUROC 0." in said
        and "guarantee: " in said
        and str(run.policy) in said
    )
    assert run.evaluate() == 0
    said, folder = capsys.readouterr().out, run.out / "evaluation"
    assert "samples of val_test" in said
    names = {"report.html", "results.json", "confusion.json", "predictions.csv", "threshold_sweep.csv", "errors.csv"}
    assert {p.name for p in folder.iterdir()} == names
    result = json.loads((folder / "results.json").read_text())
    assert result["verdict"] in said and result["decisions"]["n"] == 900 and len(result["targets"]) == 5
    rows = (folder / "predictions.csv").read_text().splitlines()
    assert len(rows) == 901 and rows[0] == "id,group,label,p_c0,p_c1,decision,set"
    policy, test = policies.read_policy(run.policy), tables.read(run.out, "val_test")
    out = rules.decide(policy, test.logits, test.ids)
    assert result["decisions"]["decided_share"] == pytest.approx((out.decision >= 0).mean())
    kept = out.decision >= 0
    assert result["decided"]["accuracy"] == pytest.approx((out.decision == test.labels)[kept].mean())
    assert json.loads((folder / "confusion.json").read_text())["counts"] == result["decided"]["confusion"]
    lines = [line.rsplit(",", 4) for line in (folder / "errors.csv").read_text().splitlines()[1:]]
    false_alarms = np.flatnonzero((out.decision == 1) & (test.labels == 0))
    worst = false_alarms[np.argsort(-out.probabilities[false_alarms, 1])][:100]
    found = [cells[0].rsplit(",", 1)[1] for cells in lines if cells[0].startswith('"c0, said c1"')]
    assert found == test.ids[worst].tolist()
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "Targets" in page and 'src="http' not in page
    positive = "The positive class is c1, the last by name."
    assert positive in said and positive in page and "false negatives among decided (of c1)" in page
    assert ("Set sizes" in page) == (len({*out.sets.sum(1).tolist()}) > 1)
    assert result["probabilities"]["nll"] < result["uncalibrated"]["nll"] or "exit" in method or "gate" in method


def test_a_temperature_at_the_end_of_its_range_is_named(tmp_path, capsys):
    run = Run(tmp_path)
    t = tables.read(run.out, "val_calib")
    sure = np.where(t.labels[:, None] == np.arange(2), 0.1, -0.1)[:, None].astype(np.float32)  # no mistake in it
    tables.write(run.out / "predictions", t._replace(logits=np.repeat(sure, t.logits.shape[1], 1)))
    run.fit("mean", "temperature", "mcc")
    assert "note: that is the end of its range: too few mistakes" in capsys.readouterr().out


def test_a_second_policy_on_val_test_needs_a_reason_and_every_look_is_kept(tmp_path, capsys):
    run = Run(tmp_path)
    run.fit("mean", "temperature", "mcc")
    run.evaluate()
    run.evaluate()  # the same again is no second opinion
    run.fit("mean", "beta", "f1")
    with pytest.raises(ValueError, match=r"another policy before .* say why: --again"):
        run.evaluate()
    assert len(run.looks()) == 2
    run.evaluate("--again", "the first had a bug")
    assert "which makes this optimistic: 1." in capsys.readouterr().out
    looks = run.looks()
    assert [look["why"] for look in looks] == ["final evaluation"] * 2 + ["the first had a bug"]
    assert len({look["policy_sha256"] for look in looks}) == 2 and looks[0]["program"] == "evaluate.py"
    other = Run(tmp_path, weights="v" * 64)
    other.fit("mean", "mcc")
    with pytest.raises(ValueError, match="other weights or another policy before"):
        other.evaluate()
    assert run.evaluate("--split", "val_calib") == 0 and len(run.looks()) == 3  # no final number, no look


def test_strangers_are_refused_before_a_look_is_taken(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path, weights="v" * 64)
    run.fit("mean", "temperature", "mcc")
    other.policy = run.policy
    with pytest.raises(ValueError, match="fitted with another weights_sha256"):
        other.evaluate()
    (run.data / "_splits" / "splits.json").write_text("{ }")
    with pytest.raises(ValueError, match="another split than that of the predictions"):
        run.evaluate()
    (run.data / "_splits" / "splits.json").unlink()
    with pytest.raises(FileNotFoundError, match="name the data folder"):
        run.evaluate()
    policy = json.loads(run.policy.read_text())
    for wrong, text in (
        ({"version": 2}, "version is 2"),
        ({"steps": [1]}, "step 1 lacks kind"),
        ({"classes": 3}, "classes"),
    ):
        run.policy.write_text(json.dumps({**policy, **wrong}))
        with pytest.raises(ValueError, match=text):
            run.evaluate()
    assert not run.looks()


def test_a_policy_is_fitted_on_val_calib_alone(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="holds val_test: policies are fitted on val_calib"):
        fit_policy.main(["--predictions", str(run.out / "predictions/val_test.npz"), "--out", str(run.policy)])
    assert not run.policy.exists()


def test_runs_are_joined_by_id(tmp_path):
    run, other = Run(tmp_path), Run(tmp_path, weights="v" * 64, noise=4.0)
    path = other.out / "predictions" / "val_calib.npz"
    t = tables.read(path)
    order = np.random.default_rng(0).permutation(len(t.ids))
    tables.write(path.parent, t.take(order))
    both = policies.load([run.out, other.out], "val_calib")
    assert (both.logits[:, 2:] == t.logits).all() and both.logits.shape == (900, 4, 2)
    assert both.facts["weights_sha256"] not in ("w" * 64, "v" * 64)
    words = ["--predictions", str(run.out), str(other.out), "--out", str(run.policy), "--method", "weights", "mcc"]
    assert fit_policy.main(words) == 0
    weights = json.loads(run.policy.read_text())["steps"][0]["parameters"]["weights"]
    assert sum(weights[:2]) > 0.8
    tables.write(path.parent, t._replace(facts={**t.facts, "classes": ["no", "yes"]}))
    with pytest.raises(ValueError, match="classes is .*no"):
        policies.load([run.out, other.out], "val_calib")
    tables.write(path.parent, t._replace(labels=1 - t.labels))
    with pytest.raises(ValueError, match="labels or groups are others"):
        policies.load([run.out, other.out], "val_calib")
    tables.write(path.parent, t.take(order[:-1]))
    with pytest.raises(ValueError, match="do not hold the same samples: 1 are in one"):
        policies.load([run.out, other.out], "val_calib")


def test_slices_come_from_the_label_table(tmp_path, capsys):
    run = Run(tmp_path)
    ids = [*tables.read(run.out, "val_calib").ids, *tables.read(run.out, "val_test").ids]
    lines = [f"{name},0,{'day' if k % 3 else 'night'}" for k, name in enumerate(ids)]
    (run.data / "labels.csv").write_text("\n".join(["path,label,daytime", *lines]))
    words = ["--predictions", str(run.out), "--out", str(run.policy), "--method", "mean", "temperature", "mondrian"]
    assert fit_policy.main([*words, "--by", "daytime", "--labels", "labels.csv"]) == 0
    policy = json.loads(run.policy.read_text())
    assert policy["column"] == "daytime" and sorted(policy["steps"][2]["parameters"]["quantiles"]) == ["day", "night"]
    with pytest.raises(ValueError, match="--labels FILE is needed"):
        run.evaluate()
    assert run.evaluate("--labels", "labels.csv", "--slices", "daytime") == 0
    result = json.loads((run.out / "evaluation" / "results.json").read_text())
    assert [row["slice"] for row in result["slices"]["daytime"]] == ["day", "night"]
    with pytest.raises(ValueError, match="no column weather; it has path, label, daytime"):
        fit_policy.main([*words, "--by", "weather", "--labels", "labels.csv"])


def test_one_class_and_several_classes_have_a_page_too(tmp_path):
    run = Run(tmp_path, C=4)
    run.fit("mean", "dirichlet", "lac:alpha=0.2")
    assert run.evaluate() == 0
    t = tables.read(run.out, "val_test")
    tables.write(run.out / "predictions", t._replace(labels=t.labels * 0))
    assert run.evaluate() == 0
    result = json.loads((run.out / "evaluation" / "results.json").read_text())
    assert result["probabilities"]["auc"] is None and result["decided"]["mcc"] is None
    assert "NaN" not in (run.out / "evaluation" / "results.json").read_text()
    tables.write(run.out / "predictions", t._replace(labels=t.labels * 0 - 1))
    with pytest.raises(ValueError, match="no sample has a label"):
        run.evaluate()


def give_select(run, seed, useful, V=5, n=400):
    """val_select of a run whose views but the last `useful` say nothing; val_calib is the same model's."""
    for number, name in ((seed, "val_select"), (seed + 1, "val_calib")):
        t = table(number, n, V=V)
        logits = t.logits.copy()
        logits[:, : V - useful] = np.random.default_rng(seed).normal(size=(n, V - useful, 2)) * 0.05
        facts = {**t.facts, "weights_sha256": "w" * 64, "split": name, "data": str(run.data), "layout": None}
        facts["split_sha256"] = hashlib.sha256(b"{}").hexdigest()
        tables.write(run.out / "predictions", t._replace(logits=logits, facts=facts))


def test_best_chooses_pool_views_and_run_on_val_select(tmp_path, capsys):
    runs = [Run(tmp_path, weights=letter * 64) for letter in "ab"]
    give_select(runs[0], 7, useful=0)
    give_select(runs[1], 7, useful=1)
    assert fit_policy.main(["--predictions", *(str(run.out) for run in runs), "--out", str(runs[0].policy), "--method",
                            "best:runs=1", "temperature", "mcc"]) == 0  # fmt: skip
    said, policy = capsys.readouterr().out, json.loads(runs[0].policy.read_text())
    first = policy["steps"][0]
    worth = first["choice"]
    name = f"{first['method']}{first['parameters'].get('k', '')} of run 2"
    assert first["kind"] == "aggregate" and name in worth and name in said
    assert worth[name]["mcc"] == max(w["mcc"] for w in worth.values()) > worth["mean of run 1"]["mcc"] + 0.2
    sha256 = tables.read(runs[1].out, "val_select").facts["npz_sha256"]
    assert first["chosen_on"] == {"split": "val_select", "n": 400, "predictions_sha256": sha256}
    assert [s["fitted_on"]["part"] for s in policy["steps"][1:]] == [[1, 2], [2, 2]]  # val_calib is not used up by it
    calib = tables.read(runs[1].out, "val_calib")
    out = rules.decide(policies.read_policy(runs[0].policy), calib.logits, calib.ids)
    assert (out.decision == calib.labels).mean() > 0.7
    with pytest.raises(ValueError, match="best has one option, runs=1"):
        runs[0].fit("best:k=3", "mcc")
    with pytest.raises(ValueError, match="chosen on val_select, by fit_policy"):
        rules.fit_steps(calib, "best mcc")
    (runs[1].out / "predictions" / "val_select.npz").unlink()
    with pytest.raises(FileNotFoundError, match="val_select.npz does not exist"):
        runs[1].fit("best", "mcc")


def test_area_takes_the_areas_of_the_layout(tmp_path):
    t = table(3, 300, V=10)
    step = rules.fit_steps(t, "area temperature mcc")["steps"][0]
    assert step["parameters"]["areas"] == pytest.approx([1] + [0.147, 0.166, 0.147, 0.166, 0.188, 0.166, 0.147, 0.166,
                                                              0.147], abs=0.002)  # fmt: skip
    with pytest.raises(ValueError, match="4 views, and the layout tiles has 10"):
        rules.fit_steps(table(3, 300, V=4), "area temperature mcc")


def test_of_pools_with_equal_mcc_the_one_with_the_lowest_log_loss_is_chosen():
    labels = np.arange(40) % 2
    logits = np.zeros((40, 3, 2), np.float32)
    logits[np.arange(40), 0, labels], logits[np.arange(40), 1:, labels] = 6.0, 0.5  # each pool gets all of them right
    t = table(0, 40, V=3)._replace(labels=labels, logits=logits)
    t = t._replace(facts={**t.facts, "layout": None})
    run, pool, options, worth = choice.choose_pool([t])
    assert run == 0 and all(w["mcc"] == 1 for w in worth.values()) and len(worth) > 8
    assert worth[f"{pool}{options.get('k', '')}"]["nll"] == min(w["nll"] for w in worth.values())
    assert pool not in ("mean", "area")
