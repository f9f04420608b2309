"""Bundles: moved, they say the same; changed in any byte, they say nothing; a run that is worth nothing makes none."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_baseline import fitted, photos, vit  # noqa: F401 - fixtures
from test_classifiers import make_classifier, pictures
from test_rules import table

import data
import train_probe
from tools import drift, evaluate, fit_policy, predict, release
from tools.lib import bundle, evaluation, fused, rules, tables
from tools.lib.classifiers import read_classifier


@pytest.fixture(scope="module")
def run(photos, vit, tmp_path_factory):  # noqa: F811
    """A frozen baseline with its policy."""
    out = tmp_path_factory.mktemp("runs") / "photos"
    fitted(photos, vit, out)
    words = ["--predictions", str(out), "--out", str(out / "policy.json"), "--method", "mean", "temperature", "mcc"]
    assert fit_policy.main(words) == 0
    return out


def make(run, out, *words):
    flags = ["--ckpt", run / "best.pth", "--policy", run / "policy.json", "--out", out, *words]
    assert release.main(list(map(str, flags))) == 0
    return out


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return make(run, tmp_path_factory.mktemp("bundles") / "first")


def ask(folder, out, *words):
    assert predict.main(list(map(str, ["--bundle", folder, "--out", out, *words]))) == 0


def csv_of(path):
    return {line.split(",")[0]: line.split(",")[3:] for line in path.read_text().splitlines()[1:]}


def test_predict_says_what_evaluate_says_after_the_folder_was_moved(photos, made, run, tmp_path, capsys):  # noqa: F811
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    moved = tmp_path / "elsewhere" / "b"
    shutil.copytree(made, moved)
    words = ["--bundle", moved, "--data", root, "--out", tmp_path / "evaluation", "--bootstrap", 20]
    assert evaluate.main(list(map(str, words))) == 0
    ask(moved, tmp_path / "folder", "--images", root)
    ask(moved, tmp_path / "split", "--data", root, "--split", "val_test")
    printed = capsys.readouterr().out
    evaluated = csv_of(tmp_path / "evaluation" / "predictions.csv")
    assert len(evaluated) == 12
    for out, name in (("folder", "images.csv"), ("split", "val_test.csv")):
        said = csv_of(tmp_path / out / name)
        for key, cells in evaluated.items():
            assert [float(cell) for cell in said[key][:2]] == pytest.approx([float(c) for c in cells[:2]], abs=2e-6)
            assert said[key][2:] == cells[2:]  # decision and set
        counts = [sum(cells[2] == word for cells in said.values()) for word in ("bright", "dark", "")]
        assert sum(counts) >= 12 and min(counts[:2]) > 0
        assert f"decided: {counts[0]} bright, {counts[1]} dark, {counts[2]} left to others\n" in printed
    looks = [json.loads(line) for line in data.split_path(root, "test_uses.jsonl").read_text().splitlines()]
    assert len(looks) == 1 and looks[0]["policy_sha256"] == data.file_sha256(run / "policy.json")
    words = ["--ckpt", run / "best.pth", "--data", root, "--split", "val_test", "--out", tmp_path / "ckpt"]
    assert predict.main(list(map(str, words))) == 0
    a, b = (tables.read(tmp_path / out, "val_test") for out in ("split", "ckpt"))
    np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=1e-6)
    words = ["--predictions", tmp_path / "ckpt" / "val_test.npz", "--policy", run / "policy.json", "--bootstrap", 20]
    assert evaluate.main(list(map(str, [*words, "--out", tmp_path / "again"]))) == 0  # the same look: no reason needed
    first, second = (json.loads((tmp_path / f / "results.json").read_text()) for f in ("evaluation", "again"))
    assert first["decided"] == second["decided"] and first["decided"]["accuracy"] > 0.6


def test_errors_are_drawn_with_their_views(photos, made, run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluation, "DRAWN", 2)
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    words = ["--bundle", made, "--data", root, "--out", tmp_path / "e", "--bootstrap", 20, "--split", "val_calib"]
    assert evaluate.main(list(map(str, words))) == 0
    kinds = {line.split('",')[0].strip('"') for line in (tmp_path / "e" / "errors.csv").read_text().splitlines()[1:]}
    sheets = sorted((tmp_path / "e").glob("errors_*.png"))
    assert kinds and len(sheets) == len(kinds)
    views = [line.split(",") for line in (tmp_path / "e" / "errors_views.csv").read_text().splitlines()]
    assert views[0][:2] == ["id", "view"] and views[1][0].endswith(".png") and len(views) > len(sheets)
    with Image.open(sheets[0]) as image:
        assert image.width > 700 and image.height > 300
    words = ["--ckpt", run / "best.pth", "--data", root, "--split", "val_calib", "--out", tmp_path / "run"]
    assert predict.main(list(map(str, words))) == 0
    words = ["--predictions", tmp_path / "run" / "val_calib.npz", "--policy", run / "policy.json", "--bootstrap", 20]
    words += ["--split", "val_calib", "--out", tmp_path / "again", "--ckpt"]
    assert evaluate.main(list(map(str, [*words, run / "best.pth"]))) == 0
    assert [p.name for p in sorted((tmp_path / "again").glob("errors_*.png"))] == [p.name for p in sheets]
    make_classifier(tmp_path / "other.pth", ("bright", "dark"))
    with pytest.raises(ValueError, match="is not what made these predictions"):
        evaluate.main(list(map(str, [*words, tmp_path / "other.pth"])))


def test_pictures_elsewhere_are_evaluated_without_a_look_if_they_were_not_trained_on(photos, made, tmp_path):  # noqa: F811
    root = tmp_path / "other"
    (root / "new").mkdir(parents=True)
    lines = (photos / "labels.csv").read_text().splitlines()
    for line in lines[1:41]:
        shutil.copyfile(photos / line.split(",")[0], root / "new" / line.split(",")[0])
    (root / "labels.csv").write_text("\n".join([lines[0], *(f"new/{line}" for line in lines[1:41])]))
    words = list(map(str, ["--bundle", made, "--data", root, "--out", tmp_path / "evaluation", "--bootstrap", 20]))
    assert evaluate.main(words) == 0
    result = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert result["split"] == "all" and result["decisions"]["n"] == 40 and not (root / "_splits").exists()
    (root / "new").rename(root / "old")
    for line in lines[1:41]:
        (root / "old" / line.split(",")[0]).rename(root / line.split(",")[0])
    (root / "labels.csv").write_text("\n".join(lines[:41]))
    with pytest.raises(ValueError, match="leak: .* of the labels were in the training of these weights"):
        evaluate.main(words)
    (root / "labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match="without labels there is nothing to score"):
        evaluate.main(words)


def test_what_is_in_the_folder(made, monkeypatch):
    names = {path.name for path in made.iterdir()}
    assert names == {*bundle.WRITTEN, "bundle.json", "SHA256SUMS"}
    facts = json.loads((made / "bundle.json").read_text())
    assert facts["classes"] == ["bright", "dark"] and facts["layout"] == "whole" and facts["forced"] is None
    assert set(facts["files"]) == set(bundle.WRITTEN) and len(facts["id"]) == 16
    text = (made / "README.md").read_text()
    assert "mean temperature mcc" in text and "val_select" in text and "bright, dark" in text
    everything = "".join(path.read_text() for path in made.iterdir() if path.suffix != ".safetensors")
    assert "/tmp" not in everything and ".png" not in everything
    monkeypatch.chdir(made)
    assert os.system("sha256sum -c --quiet SHA256SUMS") == 0


def changed(made, tmp_path, **more):
    folder = tmp_path / "b"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    facts = json.loads((folder / "bundle.json").read_text()) | more
    facts["files"] |= {name: data.file_sha256(folder / name) for name in facts["files"] if (folder / name).exists()}
    return folder, facts


def resum(folder, facts):
    """As somebody would who makes the sums anew."""
    facts["id"] = bundle.id_of(facts)
    (folder / "bundle.json").write_text(json.dumps(facts))
    names = sorted({*facts["files"], "bundle.json"})
    lines = [f"{data.file_sha256(folder / name)}  {name}\n" for name in names if (folder / name).is_file()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def refused(folder, text):
    with pytest.raises((ValueError, OSError), match=text):
        bundle.read_bundle(folder)


def test_what_is_damaged_or_leads_out_of_the_folder_is_refused(made, tmp_path):
    for name in (*bundle.WRITTEN, "bundle.json", "SHA256SUMS"):
        folder, _ = changed(made, tmp_path)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        refused(folder, re.escape(str(folder)))
        (folder / name).unlink()
        refused(folder, "is missing|does not exist")
    for odd in ("/etc/passwd", "../policy.json", "a/../policy.json", "./policy.json", "a\\b", "", ".hidden"):
        folder, facts = changed(made, tmp_path)
        facts["files"][odd] = "0" * 64
        resum(folder, facts)
        refused(folder, "no path inside the bundle")
    for name in ("policy2.json", "old/policy.json", "Policy.json"):
        folder, _ = changed(made, tmp_path)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "policy.json", folder / name)
        refused(folder, "holds a second policy")
    folder, _ = changed(made, tmp_path)
    (folder / "notes.txt").write_text("x")
    refused(folder, "notes.txt is missing, or belongs to no bundle")
    folder, _ = changed(made, tmp_path)
    (folder / "policy.json").rename(tmp_path / "elsewhere.json")
    (folder / "policy.json").symlink_to(tmp_path / "elsewhere.json")
    refused(folder, "policy.json is a link")
    refused(tmp_path / "none", "is not a folder")


def test_what_does_not_fit_together_is_refused_even_with_right_sums(made, tmp_path):
    for more, text in (
        ({"classes": ["dark", "bright"]}, "policy.json is for another classes"),
        ({"layout": "tiles"}, "policy.json is for another layout"),
        ({"weights_sha256": "0" * 64}, "another weights_sha256"),
        ({"eval_view": {"size": "32", "window": None}}, "eval_view is"),
        ({"eval_view": {"size": 33, "window": None}}, "33 pixels"),
        ({"pool": "cls"}, "features, not"),
        ({"layers": 50}, "layers is 50"),
        ({"version": 2}, "version is 2"),
        ({"encoding": 3}, "field 'encoding'"),
    ):
        folder, facts = changed(made, tmp_path, **more)
        resum(folder, facts)
        refused(folder, text)
    steps = json.loads((made / "policy.json").read_text())["steps"]
    for policy, text in (
        ({"steps": [*steps, steps[-1]]}, "exactly one of"),
        ({"steps": steps[:-1]}, "exactly one of"),
        ({"steps": [{**steps[-1], "method": "none"}]}, "there is no method none"),
        ({"version": 9}, "version is 9"),
    ):
        folder, facts = changed(made, tmp_path)
        content = json.loads((folder / "policy.json").read_text()) | policy
        (folder / "policy.json").write_text(json.dumps(content))
        facts["files"]["policy.json"] = data.file_sha256(folder / "policy.json")
        resum(folder, facts)
        refused(folder, text)


def test_an_id_that_is_not_that_of_its_content_is_refused(made, tmp_path):
    folder, facts = changed(made, tmp_path, forced="somebody's reason")
    right = facts["id"]
    resum(folder, facts)
    assert bundle.read_bundle(folder)[1]["id"] != right
    (folder / "bundle.json").write_text(json.dumps({**facts, "id": right}))
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "bundle.json" not in line]
    own = f"{data.file_sha256(folder / 'bundle.json')}  bundle.json\n"
    (folder / "SHA256SUMS").write_text("".join(sorted([*kept, own], key=lambda line: line.split()[1])))
    refused(folder, f"id {right} is not that of its content")


def mutate(folder, random):
    """One random change of one file: a byte, a cut, bytes from elsewhere, a deletion, a JSON value."""
    path = folder / random.choice(sorted(p.name for p in folder.iterdir()))
    content, kind = bytearray(path.read_bytes()), random.integers(5)
    if kind == 0:
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    elif kind == 1:
        del content[random.integers(len(content)) :]
    elif kind == 2:
        at = random.integers(len(content))
        content[at : at + 4] = random.bytes(random.integers(1, 9))
    elif kind == 3 or path.suffix != ".json":
        return path.unlink()
    else:
        value = json.loads(content)
        key = random.choice(sorted(value))
        value[key] = random.choice(np.array([None, 1, -1.5, "x", [], {}, [[]], "../x"], dtype=object))
        content = json.dumps(value).encode()
    return path.write_bytes(content)


def try_mutants(made, photos, tmp_path, count, seed):  # noqa: F811
    """-> how many of `count` damaged bundles are refused in a sentence; all others must say what the sound one says.

    Every second one has its sums made anew, so that only its content can give it away.
    """
    words = ["--images", str(photos / "0.png"), str(photos / "1.png"), "--out", str(tmp_path / "said")]
    ask(made, tmp_path / "right", *words[:3])
    right, refusals = tables.read(tmp_path / "right" / "images.npz"), 0
    for k in range(count):
        random = np.random.default_rng((seed, k))
        folder, facts = changed(made, tmp_path)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        mutate(folder, random)
        if k % 2 and (folder / "bundle.json").exists():
            try:
                facts = json.loads((folder / "bundle.json").read_text())
                facts["files"] = {name: data.file_sha256(folder / name) for name in facts["files"]}
                resum(folder, facts)
            except (ValueError, TypeError, OSError, KeyError, AttributeError):
                pass
        if {path.name: path.read_bytes() for path in folder.iterdir()} == before:
            continue
        try:
            assert predict.main(["--bundle", str(folder), *words]) == 0
        except (ValueError, OSError) as error:
            assert str(folder) in str(error) or "policy.json" in str(error) or "logits" in str(error), error
            refusals += 1
            continue
        assert k % 2, "a change that the sums tell was accepted"
    return refusals, right


def test_mutated_bundles_are_refused_in_a_sentence(made, photos, tmp_path):  # noqa: F811
    refusals, _ = try_mutants(made, photos, tmp_path, 30, 0)
    assert refusals >= 20


@pytest.mark.proof
def test_two_hundred_mutated_bundles(made, photos, tmp_path):  # noqa: F811
    refusals, _ = try_mutants(made, photos, tmp_path, 200, 1)
    assert refusals >= 140


def no_bundle(run, out, text, *words):
    with pytest.raises((ValueError, OSError), match=text):
        make(run, out, *words)
    assert not out.exists()


@pytest.fixture
def other(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def rewrite(run, split, **more):
    t = tables.read(run, split)
    tables.write(run / "predictions", t._replace(**more))


def test_a_run_that_is_worth_nothing_makes_no_bundle(other, tmp_path):
    out, t = tmp_path / "b", tables.read(other, "val_select")
    rewrite(other, "val_select", logits=t.logits * 0.01 + np.float32([0, 9]))
    no_bundle(other, out, "all 18 samples of val_select are called dark.*--force")
    rewrite(other, "val_select", logits=-t.logits)
    no_bundle(other, out, "on val_select its accuracy 0.* is not above 0.*always saying the most frequent")
    rewrite(other, "val_select", logits=t.logits)
    policy = json.loads((other / "policy.json").read_text())
    policy["steps"][-1]["parameters"]["threshold"] = 1.0  # nothing is dark, whatever the weights say
    (other / "policy.json").write_text(json.dumps(policy))
    no_bundle(other, out, "with the policy's threshold the MCC on val_select is 0.000")
    make(other, out, "--force", "a demonstration of failure")
    facts = json.loads((out / "bundle.json").read_text())
    assert (
        facts["forced"] == "a demonstration of failure"
        and "demonstration of failure" in (out / "README.md").read_text()
    )


def test_the_card_says_what_the_policy_decides(other, tmp_path, capsys):
    """Not what the most likely class is: with a threshold of its own these are two numbers."""
    policy, t = json.loads((other / "policy.json").read_text()), tables.read(other, "val_select")
    p = rules.decide(policy, t.logits, t.ids).probabilities[:, 1]
    plain, right = ((p > 0.5) == t.labels).mean(), lambda threshold: ((p >= threshold) == t.labels).mean()
    threshold = next(float(u) for u in np.sort(p)[:0:-1] if right(u) not in (plain, 0.5))
    policy["steps"][-1]["parameters"]["threshold"] = threshold
    (other / "policy.json").write_text(json.dumps(policy))
    make(other, tmp_path / "b")
    words = f"the policy decides 100.0%, with accuracy {right(threshold):.4g} and MCC"
    assert words in capsys.readouterr().out and words in (tmp_path / "b" / "README.md").read_text()
    assert plain == json.loads((tmp_path / "b" / "bundle.json").read_text())["worth"]["accuracy"]


@pytest.mark.parametrize("last", ["exit:fnr=0.1", "gate:error=0.3", "lac:alpha=0.2"])
def test_the_card_of_every_kind_of_policy_says_how_much_is_decided(other, tmp_path, last):
    words = ["--predictions", str(other), "--out", str(other / "policy.json"), "--method", "mean", last]
    assert fit_policy.main(words) == 0
    policy, t = json.loads((other / "policy.json").read_text()), tables.read(other, "val_select")
    share = (rules.decide(policy, t.logits, t.ids).decision >= 0).mean()
    make(other, tmp_path / "b")
    assert f"the policy decides {share:.1%}, with accuracy" in (tmp_path / "b" / "README.md").read_text()
    if "exit" in last:  # decides one picture, of one class: no reason against it. None at all is one
        p = rules.decide(policy, t.logits, t.ids).probabilities.max(1)
        for threshold in (float(p.max()), None):
            policy["steps"][-1]["parameters"]["threshold"] = threshold
            (other / "policy.json").write_text(json.dumps(policy))
            if threshold:
                make(other, tmp_path / "one")
                assert "the policy decides 5.6%, with accuracy" in (tmp_path / "one" / "README.md").read_text()
        no_bundle(other, tmp_path / "none", "the policy decides none of the 18 samples of val_select")
        make(other, tmp_path / "none", "--force", "to see")
        assert "the policy decides 0.0%." in (tmp_path / "none" / "README.md").read_text()


def test_a_run_that_did_not_end_and_strangers_make_no_bundle(other, tmp_path):
    out = tmp_path / "b"
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "weights": {"sha256": "0" * 64}}))
    no_bundle(other, out, "does not say that a run ended with these weights")
    (other / "results.json").unlink()
    no_bundle(other, out, "does not say that a run ended with these weights")
    (other / "results.json").write_text(json.dumps(results))
    policy = json.loads((other / "policy.json").read_text())
    for name in ("weights_sha256", "layout", "classes", "split_sha256"):
        (other / "policy.json").write_text(json.dumps({**policy, name: ["a", "b"] if name == "classes" else "x"}))
        no_bundle(other, out, f"was fitted with another {name}")
    (other / "policy.json").write_text(json.dumps(policy))
    t = tables.read(other, "val_select")
    rewrite(other, "val_select", facts={**t.facts, "weights_sha256": "0" * 64})
    no_bundle(other, out, "is of other weights than")
    (other / "predictions" / "val_select.npz").unlink()
    make(other, tmp_path / "calib")  # a refit has only val_calib
    assert json.loads((tmp_path / "calib" / "bundle.json").read_text())["worth"]["split"] == "val_calib"
    no_bundle(other, tmp_path / "calib2", "--probe belongs to a release", "--probe", "x")
    no_bundle(other, tmp_path / "calib2", "--layout timm belongs to a release", "--layout", "timm")


def filled(folder, classifier, facts):
    """A bundle of any weights, with a policy that was fitted on drawn logits."""
    policy = rules.fit_steps(table(0, 200, V=1, C=2), "mean mcc")
    policy |= {"classes": facts["classes"], "layout": facts["layout"], "weights_sha256": facts["sha256"]}
    (folder.parent / "policy.json").write_text(json.dumps({**policy, "split_sha256": facts.get("split_sha256")}))
    folder.mkdir()
    worth = dict(n=1, split="val_select", accuracy=1.0, majority=0.5, mcc=1.0)
    bundle.fill(folder, classifier, facts, folder.parent / "policy.json", policy, worth, None, folder.name)
    return bundle.read_bundle(folder)


def test_adapters_are_merged_in_a_bundle(tmp_path):
    adapters = dict(rank=2, alpha=4, norm="dora", targets="qv")
    net = make_classifier(tmp_path / "best.pth", ("bright", "dark"), adapters=adapters, layout="whole")
    found, facts, _ = filled(tmp_path / "b", *read_classifier(tmp_path / "best.pth"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(images), net(images), rtol=0, atol=1e-5)
    assert not any("lora" in name for name, _ in found.named_parameters()) and facts["provenance"]["known"]


def test_a_trained_fusion_of_views_is_bundled_with_its_metadata(tmp_path):
    make_classifier(tmp_path / "best.pth", layout="tiles:rows=2,cols=2")
    net, facts = read_classifier(tmp_path / "best.pth")
    facts["fusion"] = {"switches": {"keep": 3, "depth": 1}, "fields": {"weather": ["dry", "wet"]}}
    torch.manual_seed(0)
    head = fused.build(128, 2, **facts["fusion"])
    whole = fused.FusedClassifier(net.backbone, head, "both", 1, facts["fusion"]["fields"]).eval()
    found, again, _ = filled(tmp_path / "b", whole, facts)
    assert again["fusion"] == facts["fusion"]
    torch.testing.assert_close(bundle.say(found, again), bundle.say(whole, facts), rtol=0, atol=1e-6)
    root = pictures(tmp_path / "photos", 4)
    lines = [f"{k}.jpg,{('no', 'yes')[k % 2]},{('dry', 'wet')[k // 2]}" for k in range(4)]
    (root / "labels.csv").write_text("\n".join(["path,label,weather", *lines]))
    ask(tmp_path / "b", tmp_path / "said", "--data", root)
    said = tables.read(tmp_path / "said" / "all.npz")
    assert said.logits.shape == (4, 1, 2)
    (root / "labels.csv").write_text("\n".join(["path,label,weather", *(line[:-3] + "dry" for line in lines)]))
    ask(tmp_path / "b", tmp_path / "dry", "--data", root)
    difference = np.abs(tables.read(tmp_path / "dry" / "all.npz").logits - said.logits).max((1, 2))
    assert difference[:2].max() < 1e-6 < difference[2:].min()


def test_the_watch_goes_on_from_call_to_call_and_revokes(photos, made, run, tmp_path, capsys):  # noqa: F811
    """Pictures like those of calibration keep the guarantee; a stream of bright ones alone does not."""
    words = ["--images", photos, "--watch", tmp_path / "watch.json"]
    with pytest.raises(ValueError, match="begin it with --calibration"):
        ask(made, tmp_path / "a", *words)
    ask(made, tmp_path / "a", *words, "--calibration", run)
    assert "no sign against exchangeability in 120 pictures" in capsys.readouterr().out
    odd = tmp_path / "odd"
    odd.mkdir()
    bright = [line.split(",")[0] for line in (photos / "labels.csv").read_text().splitlines() if ",bright" in line]
    for k, name in enumerate(bright):
        shutil.copy(photos / name, odd / f"{k}_{name.replace('/', '_')}")
    ask(made, tmp_path / "b", "--images", odd, "--watch", tmp_path / "watch.json", "--if-lost", "abstain")
    said = capsys.readouterr().out
    state = json.loads((tmp_path / "watch.json").read_text())
    assert state["seen"] == 120 + len(bright) and state["lost"]["picture"] > 120 and "guarantee: void" in said
    rows = list(csv_of(tmp_path / "b" / "images.csv").values())
    assert [row[2] for row in rows][-1] == "left" and rows[0][2] != "left"
    with pytest.raises(ValueError, match="--watch needs --bundle"):
        predict.main(["--ckpt", str(run / "best.pth"), "--images", str(odd), "--out", str(tmp_path), "--watch", "x"])


@pytest.mark.slow  # two short trainings
@pytest.mark.parametrize("tune", ["head", "adapters"])
def test_a_trained_run_becomes_a_bundle(photos, vit, tmp_path, tune):  # noqa: F811
    run, words = tmp_path / "run", ["--ckpt", vit[0], "--data", photos, "--labels", "labels.csv", "--tune", tune]
    words += ["--out", run, "--size", 32, "--steps", 12, "--batch-size", 16, "--device", "cpu", "--workers", 0]
    assert train_probe.main(list(map(str, words))) == 0
    words = ["--predictions", run, "--out", run / "policy.json", "--method", "mean", "temperature", "mcc"]
    assert fit_policy.main(list(map(str, words))) == 0
    folder = make(run, tmp_path / "b")
    ask(folder, tmp_path / "said", "--data", photos, "--split", "val_calib")
    said, own = tables.read(tmp_path / "said", "val_calib"), tables.read(run, "val_calib")
    order = [said.ids.tolist().index(name) for name in own.ids]
    np.testing.assert_allclose(said.logits[order], own.logits, rtol=0, atol=1e-5)


def test_drift_asks_a_bundle_and_tells_of_its_watch(photos, made, run, tmp_path, capsys):  # noqa: F811
    ask(made, tmp_path / "a", "--images", photos, "--watch", tmp_path / "watch.json", "--calibration", run)
    words = ["--bundle", made, "--reference", run, "--current", photos, "--out", tmp_path / "drift", "--draws", 199,
             "--device", "cpu"]  # fmt: skip
    assert drift.main(list(map(str, [*words, "--watch", tmp_path / "watch.json"]))) in (0, 1, 2)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "drift" / "drift.json").read_text())
    assert "no sign against exchangeability in 120 pictures" in said and result["m"] == 120 and result["n"] == 18
    assert "mmd of embeddings" in result["statistics"] and result["reference"]["decided"] == 1
    assert 'dinox_drift_watched{run="drift"} 120' in (tmp_path / "drift" / "metrics.prom").read_text()
    assert drift.main(list(map(str, [*words, "--policy", run / "policy.json"]))) == 3
    assert "leave --policy away" in capsys.readouterr().err
