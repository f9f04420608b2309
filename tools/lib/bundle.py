"""A classifier and its policy as one folder: moved anywhere, it says the same; changed by a byte, it says nothing.

    BUNDLE/ model.safetensors config.json preprocessor_config.json provenance.json   backbone, adapters merged
            head.safetensors policy.json bundle.json README.md SHA256SUMS

    write(out, run / "best.pth", run / "policy.json")
    classifier, facts, policy = read_bundle("bundle")
    out = decided(policy, logits, ids, slices)

Nothing in it is signed: the sums tell of damage, and of changes by those who do not make the sums anew.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch

import data
from checkpoint import atomic_write, write_text
from model import is_view, load_backbone, read_facts, read_tensors
from tools.lib import classifiers, export, fused, fusion, metrics, policies, provenance, rules, tables
from tools.lib.cli import shown
from tools.lib.files import created_utc, read_json_file, write_json
from tools.lib.page import number

TOLERANCE = 1e-5  # of the logits of what was written and read again
REMEDY = "get the bundle anew, or make it again with tools/release.py --policy"
WRITTEN = (
    "model.safetensors config.json preprocessor_config.json provenance.json head.safetensors policy.json README.md"
)
WRITTEN, BESIDE = WRITTEN.split(), {"bundle.json", "SHA256SUMS"}
FIELDS = {**classifiers.FIELDS, "id": str, "weights_sha256": str, "split_sha256": tables.TEXT, "files": dict,
          "forced": tables.TEXT}  # fmt: skip
CARD = """# {name}

A classifier of {encoding} images into {classes}, with the policy that turns its numbers into decisions.

    python tools/predict.py --bundle {name} --images PICTURES --out said
    python tools/evaluate.py --bundle {name} --data DATA --out evaluation

Views: {layout}, {size} pixels. Policy: {policy}. Guarantee: {guarantee}. On {split} of its own data:
{worth}. These numbers chose it.
{forced}Numbers hold for pictures like those of its training. Not a medical device.
"""


# ----- reading


def plain_path(path):
    """Whether a path is one below the bundle: no way out of it, no way to the same file by another name."""
    return isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", path, re.ASCII) is not None


def refuse_damage(folder):
    """Every file is the one that bundle.json and SHA256SUMS name, and there is no other -> content of bundle.json."""
    facts = read_json_file(folder / "bundle.json", FIELDS, REMEDY, 1)
    files = facts["files"]
    if odd := [path for path in files if not plain_path(path)]:
        raise ValueError(f"{folder}/bundle.json names {shown(odd[0])}, which is no path inside the bundle; {REMEDY}")
    found = {os.path.relpath(os.path.join(at, name), folder) for at, folders, names in os.walk(folder)
             for name in [*names, *(f for f in folders if os.path.islink(os.path.join(at, f)))]}  # fmt: skip
    if many := sorted(path for path in found if re.search("policy", path, re.IGNORECASE) and path != "policy.json"):
        raise ValueError(f"{folder} holds a second policy, {shown(many[0])}; one policy is active, delete the other")
    if odd := sorted(found ^ {*files, *BESIDE} | {*WRITTEN} ^ {*files}):
        raise ValueError(f"{folder}: {shown(odd[0])} is missing, or belongs to no bundle; {REMEDY}")
    for path in sorted(found):
        if os.path.islink(folder / path):
            raise ValueError(f"{folder}/{path} is a link, so the bundle cannot be moved; {REMEDY}")
    sums = {path: data.file_sha256(data.regular(folder / path)) for path in sorted({*files, "bundle.json"})}
    if changed := [path for path, digest in files.items() if sums[path] != digest]:
        raise ValueError(f"{folder}/{changed[0]} is not the file that bundle.json describes; {REMEDY}")
    wanted = "".join(f"{digest}  {path}\n" for path, digest in sums.items())
    if data.regular(folder / "SHA256SUMS").read_bytes() != wanted.encode():
        raise ValueError(f"{folder}/SHA256SUMS does not describe these files; {REMEDY}")
    if facts["id"] != id_of(facts):
        raise ValueError(f"{folder}/bundle.json: id {shown(facts['id'])} is not that of its content; {REMEDY}")
    return facts


def id_of(facts):
    text = json.dumps({key: value for key, value in facts.items() if key not in ("id", "created_utc")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_bundle(folder):
    """-> (Classifier in eval mode, facts as of read_classifier, policy); anything damaged is one sentence."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--bundle {folder} is not a folder; name one that tools/release.py --policy made")
    facts = refuse_damage(folder)
    classifiers.check_classes(folder / "bundle.json", facts["classes"])
    if not is_view(facts["eval_view"]):
        raise ValueError(f"{folder}/bundle.json: eval_view is {shown(facts['eval_view'])}; {REMEDY}")
    policy = policies.read_policy(folder / "policy.json")
    for name in ("classes", "layout", "weights_sha256", "split_sha256"):
        if policy.get(name) != facts[name]:
            raise ValueError(f"{folder}: policy.json is for another {name} than bundle.json; {REMEDY}")
    try:
        rules.check_order([rules.read_step(step)[0] for step in policy["steps"]])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder}/policy.json: {shown(error, 300)}; {REMEDY}") from None
    head = classifiers.make_head(folder / "head.safetensors", read_tensors(folder / "head.safetensors"), facts)
    classifier = classifiers.build(folder, load_backbone(folder, quiet=True), head, facts)
    return classifier, {**facts, **read_facts(folder), "sha256": facts["weights_sha256"]}, policy


def decided(policy, table, slices=None):
    """rules.decide of a table; what is wrong with a policy that somebody else made is a sentence."""
    try:
        return rules.decide(policy, table.logits, table.ids, slices)
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"policy.json cannot be applied ({type(error).__name__}: {shown(error)}); {REMEDY}") from None


# ----- writing


def judged(ckpt, sha, policy):
    """(reasons against a bundle of this run, what it is worth on the split that chose it)."""
    run, against = Path(ckpt).parent, []
    done = run / "results.json"
    ended = read_json_file(done, {"weights": dict}, "train it again") if done.exists() else {}
    if ended.get("weights", {}).get("sha256") != sha:
        against.append(f"{done} does not say that a run ended with these weights: it failed, or goes on")
    split = "val_select" if (run / "predictions" / "val_select.npz").exists() else "val_calib"  # a refit saw val_select
    table = tables.read(run, split)
    if table.facts["weights_sha256"] != sha:
        raise ValueError(f"{tables.find(run, split)} is of other weights than {ckpt}; export it with tools/predict.py")
    table = table.take(np.flatnonzero(table.labels >= 0))
    if not len(table.ids):
        raise ValueError(f"{tables.find(run, split)} has no labels, so nothing says what these weights are worth")
    out = rules.decide(policy, table.logits, table.ids) if policy["column"] is None else None  # else facts are needed
    said = (out.probabilities if out else fusion.probabilities(table.logits)).argmax(1)
    values = {"n": len(said), "split": split, "accuracy": float((said == table.labels).mean())}
    values |= {
        "majority": float(np.bincount(table.labels).max() / len(said)),
        "mcc": float(metrics.mcc(table.labels, said)),
    }
    if len(np.unique(said)) == 1:
        against.append(f"all {len(said)} samples of {split} are called {shown(table.facts['classes'][said[0]])}")
    if values["accuracy"] <= values["majority"]:
        against.append(f"on {split} its accuracy {values['accuracy']:.3f} is not above {values['majority']:.3f}, that "
                       "of always saying the most frequent class")  # fmt: skip
    if out:
        seen = rules.measured(table.labels, out)
        values |= {"decided_share": seen["decided_share"], "decided": seen["decided"]}
        if not seen["decided_share"]:
            against.append(f"the policy decides none of the {len(said)} samples of {split}")
        mcc = seen["decided"]["mcc"] if policy["steps"][-1]["kind"] == "threshold" else None  # None: a class is missing
        if mcc is not None and mcc <= 0:
            against.append(f"with the policy's threshold the MCC on {split} is {mcc:.3f}")
    return against, values


def in_words(worth):
    """The numbers of judged() as a sentence."""
    words = (f"accuracy {worth['accuracy']:.3f} (always the most frequent class: {worth['majority']:.3f}), MCC "
             f"{worth['mcc']:.3f}, {worth['n']} samples")  # fmt: skip
    if "decided_share" in worth:
        words += f"; the policy decides {worth['decided_share']:.1%}"
    if decided := worth.get("decided"):
        words += f", with accuracy {number(decided['accuracy'])} and MCC {number(decided['mcc'])}"
    return words


def fill(folder, classifier, facts, policy_path, policy, worth, forced, name):
    """Everything but bundle.json and SHA256SUMS, then these."""
    export.write_weights(classifier.backbone, facts, folder)
    own = {name: tensor.contiguous() for name, tensor in classifier.head.state_dict().items()}
    packed = safetensors.torch.save(own, {"format": "pt"})
    atomic_write(folder / "head.safetensors", lambda f: f.write(packed))
    shutil.copyfile(policy_path, folder / "policy.json")
    write_json(folder / "provenance.json", export.provenance_file(facts, None), indent=None)
    words = {"name": name, "encoding": facts["encoding"], "classes": ", ".join(map(shown, facts["classes"]))}
    words |= {
        "layout": facts["layout"] or "the body",
        "size": facts["eval_view"]["size"],
        "split": worth["split"],
        "worth": in_words(worth),
        "policy": " ".join(step["method"] for step in policy["steps"]),
        "guarantee": shown(policy["guarantee"], 300),
    }
    words["forced"] = f"Made against the checks of release.py, because: {forced}\n" if forced else ""
    write_text(folder / "README.md", CARD.format(**words))
    kept = {key: facts[key] for key in (*classifiers.FIELDS, "fusion") if key in facts}
    kept["split_sha256"] = facts.get("split_sha256")
    kept |= {
        "version": 1,
        "weights_sha256": facts["sha256"],
        "forced": forced,
        "worth": worth,
        "created_utc": created_utc(),
    }
    kept["files"] = {path.name: data.file_sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / "bundle.json", {"id": id_of(kept), **kept})
    export.write_sums(folder)


def say(classifier, facts):
    """Logits of two random pictures."""
    count, side = len(classifiers.layout_of(facts["layout"])[1]), facts["eval_view"]["size"]
    views = torch.randn(2, count, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if "fusion" not in facts:
            return classifier(views.flatten(0, 1))
        unknown = SimpleNamespace(rows=SimpleNamespace(columns={}))  # nothing is known of them
        return classifier(views, fused.facts_at(unknown, range(2), classifier.fields)).logits


def write(out, ckpt, policy_path, forced=None):
    """Makes the folder `out`; forced: why, where a check speaks against it."""
    export.refuse_full(out)
    before = provenance.stamp(ckpt)
    classifier, facts = classifiers.read_classifier(ckpt)
    policy = policies.read_policy(policy_path)
    wanted = {"classes": facts["classes"], "layout": facts["layout"], "weights_sha256": facts["sha256"]}
    for key, value in {**wanted, "split_sha256": facts.get("split_sha256")}.items():
        if policy.get(key) != value:
            raise ValueError(f"{policy_path} was fitted with another {key} than {ckpt}; fit it on its predictions")
    against, worth = judged(ckpt, facts["sha256"], policy)
    if against and not forced:
        raise ValueError(f'no bundle of {ckpt}: {"; ".join(against)} (--force "why" makes it, and writes why into it)')
    with export.staged(out) as folder:
        fill(folder, classifier, facts, policy_path, policy, worth, forced if against else None, out.name)
        again, _, _ = read_bundle(folder)
        difference = (say(again, facts) - say(classifier, facts)).abs().max().item()
        if not difference <= TOLERANCE:
            raise ValueError(f"read again, the bundle differs by {difference:.2e} from {ckpt}: nothing written")
        provenance.refuse_change(ckpt, before)
    lines = [f"forced against: {text}" for text in against] + [f"on {worth['split']}: {in_words(worth)}"]
    print("\n".join([*lines, f"read again: logits differ by {difference:.1e}"]))
    return 0
