"""What leaves the house: the right weights in the right layout, numbers with their baselines, and nobody's name."""

import errno
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from test_data import make_ct, make_photos, make_split

import checkpoint
import data as d
from model import ARCHS, all_options, build_vit, load_backbone, read_facts, state_to_hf, state_to_timm, timm_arch
from tools import release
from tools.lib import provenance

torch.set_num_threads(1)
FILES = "LICENSE README.md SHA256SUMS config.json model.safetensors preprocessor_config.json provenance.json".split()
PATHS = dict(data="/home/anna/ct/processed", out="/mnt/disk7/runs/secret-run", comment="C:\\Users\\anna", host="box/7")
PATIENTS = [f"lidc/LIDC-IDRI-{k:04d}" for k in (78, 79, 80)] + ["nlst/100012"]
FLAGS = dict(arch="vit_test", lr=3e-4, batch_size=8, steps=3, schedule="cosine", sizes=None, teacher_temp=(0.04, 0.07))
FLAGS |= dict(no_split=False, limit=None, z_stride=1, init=None, gram_teacher=None, workers=13, device="cuda")
FLAGS |= dict(aug="auto")


def make_vit(seed=0, **overrides):
    torch.manual_seed(seed)
    return build_vit("vit_test", layerscale=0.3, **overrides).eval()


def save(path, encoding="hu16-v1", flags=(), vit=None, **more):
    """A checkpoint whose student is another net than its teacher."""
    vit = vit or make_vit()
    parts = {k: {f"backbone.{n}": v for n, v in net.state_dict().items()}
             for k, net in (("teacher", vit), ("student", make_vit(1)))}  # fmt: skip
    state = dict(step=3, images=24, args=FLAGS | PATHS | dict(flags), arch=vit.arch, encoding=encoding)
    state |= dict(eval_view=d.eval_view(encoding, 32), trained_groups=PATIENTS)
    return checkpoint.save(path, state | parts | dict(index_sha256="1" * 64, split_sha256="5" * 64) | more)


def number(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "spread": 0.01}


def save_results(path, ckpt, seen=(), **more):
    """A results.json as train_probe.py writes it, with all that must not leave."""
    predictors = {name: {"auc": number(auc), "brier": number(0.2)} for name, auc in
                  (("probe", 0.9), ("size", 0.845), ("raw pixels", 0.7), ("random weights", 0.75))}  # fmt: skip
    gain = {"value": 0.055, "low": -0.02, "high": 0.13, "p": 0.21}
    judged = dict(title="Fit on train, scored once on val_test", samples=40, patients=22, predictors=predictors)
    judged |= dict(differences={"probe - size": gain}, seen_in_pretraining=list(seen), verdict="Not above a ruler.")
    sha = d.file_sha256(ckpt)
    weights = dict(file=str(ckpt), sha256=sha)
    results = dict(version=1, verdict="all", test=judged, notes=[PATHS["data"]], weights=weights)
    results |= dict(index_sha256="1" * 64, split_sha256="5" * 64)
    path.write_text(json.dumps(results | dict(labels=dict(file="/home/anna/m.csv", sha256="a" * 64)) | more))
    return path


def hashes_in(out):
    return json.loads((out / "provenance.json").read_text())


def hashes(salt, names):
    return sorted(provenance.fingerprint(salt, provenance.plain_name(name)) for name in names)


@pytest.fixture
def ckpt(tmp_path):
    return save(tmp_path / "run" / "last.pth") if (tmp_path / "run").mkdir() is None else None


def export(ckpt, *flags, name="dinox-ct"):
    out = ckpt.parent.parent / "out" / name
    assert release.main(["--ckpt", str(ckpt), "--out", str(out), *map(str, flags)]) == 0
    return out


def refused(match, ckpt, *flags, error=ValueError, name="dinox-ct"):
    """The release ends with this message and leaves nothing behind."""
    with pytest.raises(error, match=match):
        export(ckpt, *flags, name=name)
    out = ckpt.parent.parent / "out"
    assert not out.exists() or not list(out.iterdir())


# what is in the folder


def test_the_folder_holds_the_teacher_and_its_sums_are_right(ckpt, capsys):
    out = export(ckpt)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [path.name for path in out.parent.iterdir()] == ["dinox-ct"]  # nothing half done beside it
    loaded, teacher, images = load_backbone(out), make_vit(), torch.randn(2, 3, 48, 64)
    for a, b in zip(loaded(images), teacher(images)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert (make_vit(1)(images).cls - loaded(images).cls).abs().max() > 0.1  # the student is not what left
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in FILES if n != "SHA256SUMS"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=out, check=True)
    assert "largest difference of any output 0.0e+00" in capsys.readouterr().out


def test_the_configs_say_what_transformers_needs(ckpt):
    out = export(ckpt)
    config, processor = (json.loads((out / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
    assert config["model_type"] == "dinov3_vit" and config["image_size"] == 32 and config["num_register_tokens"] == 4
    assert config["pos_embed_rescale"] is None and config["key_bias"] is False
    assert processor["size"] == {"height": 32, "width": 32} and processor["resample"] == 3
    assert processor["image_mean"] == list(d.MEAN) and processor["image_std"] == list(d.STD)


def test_equal_input_gives_equal_bytes(ckpt, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = export(ckpt)
    kept = {path.name: path.read_bytes() for path in first.iterdir()}
    shutil.rmtree(first)
    assert {path.name: path.read_bytes() for path in export(ckpt).iterdir()} == kept
    assert b"Made 2023-11-14T22:13:20Z." in kept["README.md"]


def test_card_and_terminal_say_what_monitor_last_said(ckpt, capsys):
    shutil.rmtree(export(ckpt))
    (ckpt.parent / "monitor").mkdir()
    for more in ({"step": -1}, {"verdict": "[fine](http://a.b)"}):  # it could not look; a stranger's words
        status = {"version": 1, "verdict": "rank collapse", "step": 1200}
        (ckpt.parent / "monitor" / "status.json").write_text(json.dumps(status | more))
        assert "The last look" not in (export(ckpt) / "README.md").read_text()
        shutil.rmtree(ckpt.parent.parent / "out")
    assert capsys.readouterr().out.count(f"no verdict about this run yet: python monitor.py --ckpt {ckpt}") == 3
    (ckpt.parent / "monitor" / "status.json").write_text(json.dumps(status))
    words = "The last look of `monitor.py` at this run, after update 1,200: rank collapse."
    assert words in (export(ckpt) / "README.md").read_text() and words in capsys.readouterr().out


# nothing of this machine, nobody's id


def test_no_path_and_no_patient_gets_in(ckpt, tmp_path):
    out = export(ckpt, "--probe", save_results(tmp_path / "results.json", ckpt, seen=PATIENTS[:2]))
    planted = [*PATHS.values(), "anna", "disk7", str(tmp_path), tmp_path.name, "last.pth", "IDRI", "100012", "workers"]
    for path in out.iterdir():
        content = path.read_bytes()
        assert not [text for text in planted if text.encode() in content], path.name
    card = (out / "README.md").read_text()
    assert "| lidc | 3 |" in card and "| nlst | 1 |" in card  # counted, not named
    assert "has seen 2 of these patients" in card


def test_an_id_or_a_path_that_would_get_in_all_the_same_is_refused(ckpt, tmp_path):
    text = tmp_path / "licence.txt"
    for secret in ("LIDC-IDRI-0079", "lidc/LIDC-IDRI-0079", PATHS["data"], str(ckpt.parent), PATHS["comment"]):
        text.write_text(f"Copyright by the friends of {secret}, all rights reserved")
        refused(f"LICENSE would say '{re.escape(repr(secret)[1:-1])}', a patient id or a path", ckpt, "--license", text)
    refused("README.md would say 'LIDC-IDRI-0080'", ckpt, name="LIDC-IDRI-0080")
    text.write_text("Copyright by LIDC-IDRI-00791 and xLIDC-IDRI-0079")  # other words than the id
    export(ckpt, "--license", text)


def test_names_inside_the_weights_are_looked_at_too(tmp_path):
    vit = build_vit("vit_test")
    state, _ = state_to_hf(vit)
    release.write_weights(vit, {"eval_view": {"size": 32}}, tmp_path)
    release.refuse_secrets(tmp_path, {"LIDC-IDRI-0079"})
    packed = safetensors.torch.save(state, {"from": "LIDC-IDRI-0079"})
    (tmp_path / "model.safetensors").write_bytes(packed)
    with pytest.raises(ValueError, match="model.safetensors would say 'LIDC-IDRI-0079'"):
        release.refuse_secrets(tmp_path, {"LIDC-IDRI-0079"})


def test_a_word_of_the_card_is_no_secret(tmp_path):
    (tmp_path / "run").mkdir()
    groups = ["images", "training", "pictures", "height", "software", "patients", "evaluates", "IMG_0001.jpg"]
    out = export(save(tmp_path / "run" / "last.pth", "photo", trained_groups=groups))
    assert b"IMG_0001" not in (out / "README.md").read_bytes()
    assert {"IMG_0001.jpg"} == {s for s in release.secrets_of(dict(trained_groups=groups, args={})) if "/" not in s}


def test_weights_that_change_while_they_are_read_are_refused(ckpt, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    new, real = save(tmp_path / "new" / "last.pth"), release.load_backbone

    def load_and_save(path):
        if path == ckpt:
            new.replace(ckpt)
        return real(path)

    monkeypatch.setattr(release, "load_backbone", load_and_save)
    refused(r"last\.pth changed while it was read", ckpt)


def test_groups_of_photographs_are_names_of_files_and_stay_behind(tmp_path):
    (tmp_path / "run").mkdir()
    ckpt = save(tmp_path / "run" / "last.pth", "photo", trained_groups=["holiday/anna.jpg", "holiday/ben.jpg"])
    card = (export(ckpt) / "README.md").read_text()
    assert "| all | 2 |" in card and "holiday" not in card and "photographs" in card and "def to_image" not in card


# what the weights were trained on, as hashes


def test_the_release_says_in_hashes_what_the_weights_have_seen(ckpt, tmp_path):
    out = export(ckpt)
    assert hashes_in(out) == {"version": 1, "known": True, "seen": [
        {"salt": "1" * 64, "groups": hashes("1" * 64, PATIENTS), "series": [], "files": []}]}  # fmt: skip
    card = (out / "README.md").read_text()
    assert "(4 groups)" in card and "unknown" not in card and "never seen" not in card
    own = {"salt": "1" * 64, "groups": ["0" * 16], "series": ["1" * 16], "files": []}
    earlier = {"salt": "2" * 64, "groups": ["3" * 16, "4" * 16]}  # of the weights that the run was given
    ckpt = save(tmp_path / "run" / "next.pth", provenance={"known": True, "seen": [own, earlier]},
                flags=dict(init="/home/anna/first"))  # fmt: skip
    out = export(ckpt, "--license", out / "LICENSE", name="next")
    assert hashes_in(out)["known"] and hashes_in(out)["seen"] == [own, earlier | {"series": [], "files": []}]
    assert "(3 groups, 1 series)" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "flags, groups", [(dict(init="x.pth"), PATIENTS), (dict(gram_teacher="x.pth"), PATIENTS), ({}, None)]
)
def test_weights_of_unknown_origin_stay_unknown(tmp_path, flags, groups):
    (tmp_path / "run").mkdir()
    (tmp_path / "licence").write_text("Theirs")
    ckpt = save(tmp_path / "run" / "last.pth", flags=flags, trained_groups=groups)
    results = save_results(tmp_path / "results.json", ckpt)
    out = export(ckpt, "--license", tmp_path / "licence", "--probe", results)
    card = (out / "README.md").read_text()
    assert hashes_in(out)["known"] is False
    assert sum(len(entry["groups"]) for entry in hashes_in(out)["seen"]) == len(groups or ())
    assert "**What the backbone was pretrained on is unknown**: " in card
    assert "**What the backbone was pretrained on is unknown: it may have met these patients.**" in card
    assert "found none of these patients" not in card


def test_a_release_does_not_launder_a_leak(tmp_path):
    """Trained under one split, released, judged under another: what it saw is refused, under new names too."""
    root = make_ct(tmp_path / "ct", series=8)
    make_split(root, {f"toy/P{k}": "train" if k < 5 else "val_test" for k in range(7)})
    source = d.open_for(root, "fit")
    (tmp_path / "run").mkdir()
    facts = dict(index_sha256=source.index_sha256, split_sha256=source.split_sha256, trained_groups=source.groups)
    out = export(save(tmp_path / "run" / "last.pth", **facts), "--data", root)
    assert len(hashes_in(out)["seen"][0]["series"]) == 6
    make_split(root, {f"toy/P{k}": "train" if k > 5 else "val_select" for k in range(7)})
    for found in ({"provenance": hashes_in(out)}, read_facts(out)):
        exposure = provenance.refuse_leak(found, d.open_for(root, "select"), "val_select", allow=True)
        assert exposure.groups == [f"toy/P{k}" for k in range(5)] and exposure.known
    index = root / "_index" / "index.csv"
    index.write_text(index.read_text().replace(",P", ",renamed"))
    make_split(root, {f"toy/renamed{k}": "val_select" for k in range(7)})
    with pytest.raises(ValueError, match="leak: 5 groups"):
        provenance.refuse_leak(read_facts(out), d.open_for(root, "select"), "val_select")


def test_copies_of_photographs_are_recognised_by_their_bytes(tmp_path, capsys):
    make_photos(tmp_path / "photos")
    photos = d.open_source(tmp_path / "photos")
    (tmp_path / "run").mkdir()
    facts = dict(index_sha256=photos.index_sha256, split_sha256=None, trained_groups=photos.groups)
    ckpt = save(tmp_path / "run" / "last.pth", "photo", flags=dict(no_split=True), **facts)
    assert hashes_in(export(ckpt))["seen"][0]["files"] == []
    assert "copies of these photographs will not be recognised" in capsys.readouterr().out
    out = export(ckpt, "--data", tmp_path / "photos", name="with-data")
    assert len(hashes_in(out)["seen"][0]["files"]) == 6 and "6 files" in (out / "README.md").read_text()
    (tmp_path / "copies").mkdir()
    shutil.copy(photos.path(2), tmp_path / "copies" / f"renamed{photos.path(2).suffix}")
    with pytest.raises(ValueError, match="leak: 1 groups of them"):
        provenance.refuse_leak({"provenance": hashes_in(out)}, d.open_source(tmp_path / "copies"), "them")


BAD_PROVENANCE = [[], {"known": 1, "seen": []}, {"known": True, "seen": {}}, {"known": True, "seen": [3]},
                  {"known": True, "seen": [{"salt": "1" * 64, "groups": ["lidc/LIDC-IDRI-0079"]}]},
                  {"known": True, "seen": [{"salt": "LIDC-IDRI-0079", "groups": []}]},
                  {"known": True, "seen": [{"salt": "1" * 64, "groups": [], "LIDC-IDRI-0079": []}]}]  # fmt: skip


@pytest.mark.parametrize("found", BAD_PROVENANCE)
def test_a_provenance_that_holds_more_than_hashes_is_refused(tmp_path, found):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pth"
    try:
        save(path, provenance=found)
    except ValueError:
        return  # a checkpoint cannot even be written so
    refused("provenance", path)


def test_other_data_than_that_of_the_run_is_refused(tmp_path):
    root = make_ct(tmp_path / "ct", series=8)
    make_split(root, {f"toy/P{k}": "train" if k < 5 else "val_test" for k in range(7)})
    source = d.open_for(root, "fit")
    (tmp_path / "run").mkdir()
    facts = dict(index_sha256=source.index_sha256, split_sha256=source.split_sha256)
    ckpt = save(tmp_path / "run" / "last.pth", trained_groups=source.groups[1:], **facts)
    refused("1 of its groups are not those of the run", ckpt, "--data", root)


# a wrong export never leaves


@pytest.mark.parametrize("fault", ["swapped", "halved"])
def test_an_export_that_is_not_the_teacher_is_refused(ckpt, monkeypatch, fault):
    def faulty(vit):
        state, config = state_to_hf(vit)
        if fault == "swapped":
            q, k = (f"layer.0.attention.{name}_proj.weight" for name in "qk")
            state[q], state[k] = state[k], state[q]
        else:
            state = {key: value.half() for key, value in state.items()}  # 4e-4 off: no error, only other numbers
        return state, config

    monkeypatch.setattr("tools.lib.export.state_to_hf", faulty)
    refused("reloaded, the export differs by .*: nothing released", ckpt)


def test_what_a_kill_left_behind_is_swept_and_what_is_there_is_kept(ckpt):
    stale = ckpt.parent.parent / "out" / ".dinox-ct.tmp"
    stale.mkdir(parents=True)
    (stale / "half.safetensors").write_text("x")
    out = export(ckpt)
    assert sorted(path.name for path in out.iterdir()) == FILES and not stale.exists()
    before = (out / "README.md").read_bytes()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        export(ckpt)
    assert (out / "README.md").read_bytes() == before


def test_a_full_disk_is_named(ckpt, monkeypatch):
    def no_room(path, writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tools.lib.export.atomic_write", no_room)
    refused(r"No space left on device: '.*out/\.dinox-ct\.tmp'", ckpt, error=OSError)


def test_wrong_input_is_named(ckpt, tmp_path):
    refused("is no file", tmp_path / "run" / "none.pth", error=FileNotFoundError)
    refused("is no file", tmp_path / "run", error=FileNotFoundError)
    (tmp_path / "run" / "cut.pth").write_bytes(ckpt.read_bytes()[:-1000])
    refused("not a whole and safe checkpoint", tmp_path / "run" / "cut.pth")
    torch.save(make_vit().state_dict(), tmp_path / "run" / "bare.pth")
    refused("expected 'dinox'; only a checkpoint", tmp_path / "run" / "bare.pth")
    old = {"step": 1, "args": {}, "arch": {"name": "vit_test", "overrides": {}}, "teacher": {}}
    checkpoint.save(tmp_path / "run" / "old.pth", old)
    refused("lacks images, encoding", tmp_path / "run" / "old.pth")
    refused("does not exist", ckpt, "--probe", tmp_path / "none.json", error=FileNotFoundError)
    refused("does not exist", ckpt, "--license", tmp_path / "none.txt", error=FileNotFoundError)


# the card


def test_the_card_says_data_recipe_hashes_and_limits(ckpt):
    out = export(ckpt)
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "license: mit" in front and "library_name: transformers" in front and "computed-tomography" in front
    assert "24 images in 3 updates" in card and "| lr | 0.0003 |" in card and "| teacher_temp | 0.04 0.07 |" in card
    assert "1" * 64 in card and "5" * 64 in card and d.file_sha256(out / "model.safetensors") in card
    assert d.file_sha256(ckpt) in card and "# dinox-ct\n" in card and "Not a medical device" in card
    assert "No probe was run" in card and (out / "LICENSE").read_text().strip() in card
    left = re.findall(r"(?<!\{)\{[a-z_]+\}(?!\})", card)
    assert not left  # every field of the template is filled


def test_the_card_of_a_run_without_a_split_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    ckpt = save(tmp_path / "run" / "last.pth", flags=dict(no_split=True), split_sha256=None)
    card = (export(ckpt) / "README.md").read_text()
    assert "made without a split" in card and "never seen" not in card and "`no split`" in card


@pytest.mark.parametrize("encoding", ["hu16-v1", "rgb-v1"])
def test_the_code_on_the_card_makes_what_the_backbone_saw(tmp_path, encoding):
    (tmp_path / "run").mkdir()
    card = (export(save(tmp_path / "run" / "last.pth", encoding)) / "README.md").read_text()
    (code,) = re.findall(r"```python\n(def to_image.*?)```", card, re.DOTALL)
    scope = {"np": np}
    exec(code, scope)
    hu = np.random.default_rng(0).integers(-1200, 1500, (3, 32, 32)).astype(np.int16)
    found = scope["to_image"](hu)
    windows = [(-150, 1500)] * 3 if encoding == "hu16-v1" else [d.WINDOWS_HU[name] for name in d.RGB_WINDOWS]
    np.testing.assert_array_equal(found, np.stack([d.window_codes(x, *w) for x, w in zip(hu, windows)], -1))
    assert found.dtype == np.uint8
    stored = torch.from_numpy(hu if encoding == "hu16-v1" else found.transpose(2, 0, 1))[None]
    seen = d.render_eval(stored, d.eval_view(encoding, 32))[0]  # at its own size: no resampling
    ours = d.normalise(torch.from_numpy(found.transpose(2, 0, 1))[None] / 255)[0]
    torch.testing.assert_close(seen, ours, rtol=0, atol=0.5 / 255 / min(d.STD) + 1e-5)  # the rounding to codes


def test_probe_numbers_come_with_intervals_baselines_and_their_own_weights(ckpt, tmp_path):
    results = save_results(tmp_path / "results.json", ckpt)
    card = (export(ckpt, "--probe", results) / "README.md").read_text()
    assert "| probe | 0.900 (0.800 to 1.000) | 0.200 (0.100 to 0.300) |" in card
    assert "| size | 0.845 (0.745 to 0.945) |" in card and "| random weights | 0.750" in card
    assert "| probe - size | 0.055 (-0.020 to 0.130) | 0.21 |" in card and "Not above a ruler." in card
    assert "40 samples of 22 patients" in card and "a" * 64 in card and "has seen" not in card
    other = save_results(tmp_path / "other.json", ckpt, weights=dict(sha256="0" * 64))
    shutil.rmtree(ckpt.parent.parent / "out")
    refused("is about other weights", ckpt, "--probe", other)
    for content in ("{", "[]", "{}", json.dumps({"weights": {"sha256": ""}, "labels": {"sha256": ""}, "test": {}})):
        other.write_text(content)
        refused("is no results.json of this train_probe.py", ckpt, "--probe", other)


def test_the_card_says_of_whom_the_numbers_are_as_the_probe_found_it(ckpt, tmp_path):
    card = (export(ckpt, name="no-probe") / "README.md").read_text()
    assert "never seen" not in card and "Numbers above" not in card
    card = (export(ckpt, "--probe", save_results(tmp_path / "a.json", ckpt), name="a") / "README.md").read_text()
    assert "The probe found none of these patients among those that the weights were trained on." in card
    assert "Numbers above come from the data named above and no other." in card and "never seen" not in card
    results = save_results(tmp_path / "b.json", ckpt, split_sha256="6" * 64)
    card = (export(ckpt, "--probe", results, name="b") / "README.md").read_text()
    assert f"run under another split than the training: split sha256 `{'6' * 64}`" in card
    results = save_results(tmp_path / "c.json", ckpt, index_sha256="7" * 64)
    card = (export(ckpt, "--probe", results, name="c") / "README.md").read_text()
    assert f"run on other data than the training: index sha256 `{'7' * 64}`" in card
    assert "Numbers above come from other data than the training." in card
    text = save_results(tmp_path / "d.json", ckpt).read_text()
    text = text.replace("Fit on train, ", f"{release.UNKNOWN}: fit on train, ")
    (tmp_path / "d.json").write_text(text)
    card = (export(ckpt, "--probe", tmp_path / "d.json", name="d") / "README.md").read_text()
    assert "it may have met these patients" in card and "found none of these" not in card


def put(where, value):
    """A change of results.json: `where` is a path of keys."""

    def change(results):
        for key in where[:-1]:
            results = results[key]
        results[where[-1]] = value

    return change


IMPOSSIBLE = {
    "no samples": (put(["test", "samples"], 0), "0 samples of 22 patients"),
    "fewer samples than patients": (put(["test", "samples"], 21), "21 samples of 22 patients"),
    "more samples than people": (put(["test", "samples"], 10**12), "1000000000000 samples"),
    "samples as text": (put(["test", "samples"], "40"), "'samples' is \"40\", expected int"),
    "samples as bool": (put(["test", "samples"], True), "'samples' is true, expected int"),
    "AUC above 1": (put(["test", "predictors", "probe", "auc", "value"], 1.7), "auc of probe is 1.7"),
    "AUC of nothing": (put(["test", "predictors", "probe", "auc"], None), "auc of probe is no object"),
    "AUC of a baseline": (put(["test", "predictors", "size", "auc", "value"], -0.2), "auc of size is -0.2"),
    "missing of a baseline": (put(["test", "predictors", "size"], {}), "auc of size is no object"),
    "interval as text": (put(["test", "predictors", "probe", "auc", "low"], "x" * 10**7), "field 'low' is \"xxx"),
    "huge": (put(["test", "predictors", "probe", "auc", "high"], 10**400), "field 'high' is 1000"),
    "NaN": (put(["test", "predictors", "probe", "auc", "value"], float("nan")), "auc of probe is nan"),
    "no probe": (put(["test", "predictors"], {}), "has no numbers of the probe"),
    "predictors as list": (put(["test", "predictors"], [1]), "'predictors' is a list"),
    "escape bytes": (put(["test", "verdict"], "fine\x1b[2J"), "a text is 'fine"),
    "two lines": (put(["test", "title"], "fine\n# More"), "a text is 'fine"),
    "a long text": (put(["test", "title"], "x" * 10**7), "a text is 'xxx"),
    "seen as number": (put(["test", "seen_in_pretraining"], 0), "'seen_in_pretraining' is 0, expected list"),
    "p above 1": (put(["test", "differences", "probe - size", "p"], 2), "p of probe - size is 2"),
    "difference above 1": (put(["test", "differences", "probe - size", "high"], 1.5), "probe - size is 0.055"),
    "test as text": (put(["test"], "good"), "test is no object"),
    "neither test nor cv": (lambda results: results.pop("test"), "neither test nor cv"),
    "another version": (put(["version"], 2), "version is 2, this code reads 1"),
    "a digest that is none": (put(["labels", "sha256"], "`; rm -rf"), "is missing or none"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_results_are_refused_in_one_sentence(ckpt, tmp_path, name):
    change, reason = IMPOSSIBLE[name]
    path = save_results(tmp_path / "results.json", ckpt)
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="is no results.json of this train_probe.py") as caught:
        export(ckpt, "--probe", path)
    said = str(caught.value)
    assert reason in said and len(said) < 1200 and said.isprintable()


def test_fields_of_a_checkpoint_that_the_card_repeats_are_checked(tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pth"
    for more, reason in (
        (dict(index_sha256="LIDC-IDRI-0079"), "is no sha256"),
        (dict(encoding="xyz\x1b[2J"), "encoding is"),
        (dict(flags=dict(limit="many")), "'limit' is \"many\", expected int or null"),
        (dict(flags=dict(no_split=1)), "'no_split' is 1, expected bool"),
        (dict(eval_view={"size": 60000, "window": None}), "eval_view is 60000 pixels wide"),
    ):
        refused(re.escape(reason), save(path, **more))
    card = (export(save(path, flags={"aug": "a\x1b[2Jb", "x\x1b": 3, "LIDC-IDRI-0079": 1})) / "README.md").read_text()
    assert "\x1b" not in card and "| aug | a\\x1b[2Jb |" in card


def test_a_licence_is_text_and_a_name_is_plain(ckpt, tmp_path, capsys):
    (tmp_path / "licence").write_bytes(b"caf\xe9")
    refused("is not UTF-8 text", ckpt, "--license", tmp_path / "licence")
    refused("its name titles the card", ckpt, name="a\x1b[2Jb")


def test_weights_that_began_as_others_need_a_licence(tmp_path):
    (tmp_path / "run").mkdir()
    ckpt = save(tmp_path / "run" / "last.pth", flags=dict(init="/home/anna/dinov3.pth"))
    refused("was given other weights .--init.: name their licence with --license", ckpt)
    text = tmp_path / "theirs.txt"
    text.write_text("Their licence\nNo warranty.\n")
    out = export(ckpt, "--license", text)
    card = (out / "README.md").read_text()
    assert (out / "LICENSE").read_text() == text.read_text() and "license: other" in card
    assert "Started from other weights, given with `--init`" in card and "dinov3.pth" not in card


def test_data_adds_counts_of_what_was_trained_on(tmp_path):
    root = make_ct(tmp_path / "ct", series=8)
    make_split(root, {f"toy/P{k}": "train" if k < 5 else "val_test" for k in range(7)})
    source = d.open_for(root, "fit")
    (tmp_path / "run").mkdir()
    facts = dict(index_sha256=source.index_sha256, split_sha256=source.split_sha256, trained_groups=source.groups)
    ckpt = save(tmp_path / "run" / "last.pth", **facts)
    card = (export(ckpt, "--data", root) / "README.md").read_text()
    assert "| toy | 5 | 6 | 24 |" in card  # patient 0 has two of the series, each with 4 inner slices
    shutil.rmtree(tmp_path / "out")
    make_split(root, {f"toy/P{k}": "train" if k < 4 else "val_test" for k in range(7)})
    refused("split_sha256 is not that of the run", ckpt, "--data", root)
    make_photos(tmp_path / "photos")
    photos = d.open_source(tmp_path / "photos")
    facts = dict(index_sha256=photos.index_sha256, split_sha256=None, trained_groups=photos.groups)
    ckpt = save(tmp_path / "run" / "photos.pth", "photo", flags=dict(no_split=True), **facts)
    assert "| all | 6 | 6 |" in (export(ckpt, "--data", tmp_path / "photos") / "README.md").read_text()


# upload


def test_push_needs_the_hub_before_anything_is_done(ckpt, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("--push needs huggingface_hub: pip install huggingface_hub", ckpt, "--push", "me/model")


def test_push_uploads_the_finished_folder_to_a_private_repository(ckpt, monkeypatch):
    calls = []

    class HfApi:
        def create_repo(self, repo, **kwargs):
            calls.append((repo, kwargs))

        def repo_info(self, repo):
            return SimpleNamespace(private=repo != "me/public")

        def upload_folder(self, folder_path, **kwargs):
            calls.append((sorted(path.name for path in release.Path(folder_path).iterdir()), kwargs))

    hub = ModuleType("huggingface_hub")
    hub.HfApi, hub.__spec__ = HfApi, release.find_spec("json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    export(ckpt, "--push", "me/model")
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1][0] == FILES and calls[1][1]["repo_id"] == "me/model"
    with pytest.raises(ValueError, match="--push me/public is public already"):
        export(ckpt, "--push", "me/public", name="another")
    assert len(calls) == 3  # nothing uploaded


# other people's code


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, {"gated": True, "qkv_bias": False}])
def test_the_folder_opens_in_transformers_with_the_same_outputs(tmp_path, overrides):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (it is never required)")
    (tmp_path / "run").mkdir()
    vit = make_vit(**overrides)
    out = export(save(tmp_path / "run" / "last.pth", vit=vit))
    theirs, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "DINOv3ViTModel" and not any(info.values()), info
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = theirs.eval()(images), vit(images)
    tokens = torch.cat([found.cls[:, None], found.registers, found.patches], 1)
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.cls, expected.pooler_output, rtol=0, atol=1e-5)


TIMM_SHAPES = [
    {}, {"gated": True, "qkv_bias": False, "ffn_dim": 100, "local_cls_norm": True},
    {"registers": 2, "patch_size": 8, "heads": 4, "rope_base": 50.0, "qkv_bias": False},
]  # fmt: skip


@pytest.mark.parametrize("overrides", TIMM_SHAPES)
def test_a_folder_for_timm_holds_the_teacher(tmp_path, overrides):
    (tmp_path / "run").mkdir()
    vit = make_vit(**overrides)
    out = export(save(tmp_path / "run" / "last.pth", vit=vit), "--layout", "timm")
    assert sorted(path.name for path in out.iterdir()) == [name for name in FILES if name != "preprocessor_config.json"]
    images = torch.randn(2, 3, 32, 64)
    for a, b in zip(load_backbone(out)(images), vit.eval()(images)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    state = safetensors.torch.load_file(out / "model.safetensors")
    assert {"reg_token", "blocks.1.gamma_1"} <= state.keys() and not [k for k in state if "mask" in k or "ls1" in k]
    assert ("blocks.0.attn.q_bias" in state) == vit.arch["overrides"].get("qkv_bias", True)
    assert config["pretrained_cfg"]["mean"] == list(d.MEAN) and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    card = (out / "README.md").read_text()
    assert f'timm.create_model("{config["architecture"]}", checkpoint_path=' in card and "library_name: timm" in card
    assert "transformers" not in card
    (out / "SHA256SUMS").unlink()
    for field, value in [("num_heads", 10**9), ("num_heads", 0), ("rope_temperature", "100")]:
        arguments = {**config["model_args"], field: value}
        (out / "config.json").write_text(json.dumps({**config, "model_args": arguments}))
        with pytest.raises(ValueError, match="config.json: .* expected a number|heads"):
            load_backbone(out)


def test_names_of_timm_are_those_of_the_published_sizes():
    found = {name: timm_arch(all_options(name, {})) for name in ARCHS}
    assert {name: theirs for name, (theirs, more) in found.items() if not more} == {
        **{name: f"{name}_patch16_dinov3_qkvb" for name in ARCHS if name not in ("vit_test", "vit_giant", "vit_7b")},
        "vit_7b": "vit_7b_patch16_dinov3",
    }
    assert found["vit_giant"] == (
        "vit_large_patch16_dinov3_qkvb",
        dict(embed_dim=1408, depth=40, mlp_ratio=6144 / 1408),
    )
    vit = make_vit(norm_eps=1e-6)
    with pytest.raises(ValueError, match="timm's DINOv3 has one final norm and an eps of 1e-5"):
        state_to_timm(vit)


@pytest.mark.parametrize("overrides", TIMM_SHAPES)
def test_the_folder_opens_in_timm_with_the_same_outputs(tmp_path, overrides):
    timm = pytest.importorskip("timm", reason="timm is not installed (it is never required)")
    (tmp_path / "run").mkdir()
    vit = make_vit(**overrides)
    out = export(save(tmp_path / "run" / "last.pth", vit=vit), "--layout", "timm")
    line = re.search(r"timm.create_model\(.*?\)\.eval", (out / "README.md").read_text(), re.S)[0]
    by_card = eval(line.removesuffix(".eval").replace("PATH", str(out)), {"timm": timm})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = vit.eval()(images)
        tokens = torch.cat([found.cls[:, None], found.registers, found.patches], 1)
        for theirs in (by_card, timm.create_model(f"local-dir:{out}", pretrained=True)):
            torch.testing.assert_close(theirs.eval().forward_features(images), tokens, rtol=0, atol=1e-5)
            torch.testing.assert_close(theirs(images), found.cls, rtol=0, atol=1e-5)


def test_weights_that_timm_saved_are_read(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (it is never required)")
    arguments = dict(depth=2, num_heads=6, global_pool="token")
    for name in ("vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"):
        theirs = timm.create_model(name, num_classes=0, **arguments).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.1 * torch.randn_like(p))
        folder = tmp_path / name
        folder.mkdir()
        safetensors.torch.save_file(theirs.state_dict(), folder / "model.safetensors")
        config = {"architecture": name, "num_classes": 0, "model_args": arguments}
        (folder / "config.json").write_text(json.dumps(config))
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(load_backbone(folder)(images).cls, theirs(images), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_numbers_of_a_real_probe_reach_the_card(tmp_path):
    from test_heatmaps import bright_vit, make_nodules

    import train_probe

    root = make_nodules(tmp_path / "data", count=40)
    table = root / "_labels" / "nodules.csv"
    header, *rows = table.read_text().splitlines()
    rows = [row.split(",") for row in rows]
    for k, row in enumerate(rows):
        row[5], row[7] = str(k % 2), str(8 + k % 7)
    table.write_text("\n".join([header, *map(",".join, rows), ""]))
    (tmp_path / "run").mkdir()
    ckpt = save(tmp_path / "run" / "last.pth", vit=bright_vit(), trained_groups=["toy/P0"])
    flags = f"--ckpt {ckpt} --data {root} --labels {table} --out {tmp_path / 'probe'} --bootstrap 50 --crop-mm 48"
    train_probe.main(flags.split())
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    card = (export(ckpt, "--probe", tmp_path / "probe" / "results.json") / "README.md").read_text()
    for name in ("probe", "size", "random weights", "raw pixels"):
        assert f"| {name} | {results['test']['predictors'][name]['auc']['value']:.3f} (" in card
    assert results["test"]["verdict"] in card and results["cv"]["title"] in card
