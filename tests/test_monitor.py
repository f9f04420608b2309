"""The monitor: planted failures get their word and exit code, healthy runs do not, and its numbers have oracles."""

import base64
import collections
import copy
import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_ct, make_photos, make_split
from test_page import browser, screenshot
from torch.nn import functional as F

import checkpoint
import data
import losses
import monitor as m
import train_ssl as t
from model import build_vit
from tools.lib import cli, held_out, loop, machine, optim, provenance, runs, settings, sheet
from tools.lib.files import read_lines

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--arch vit_test --batch-size 8 --global-size 64 --local-size 32 --local-crops 2 --prototypes 32 --head-hidden 32 "
    "--head-bottleneck 16 --steps 1000 --log-every 10 --device cpu --layerscale 1"
).split()


def line(step, **more):
    """A line of metrics.jsonl as a healthy run writes it."""
    values = dict(loss=5.0, dino=3.0 - step / 1e4, ibot=1.5, excess=0.5, teacher_entropy=0.6, kl=0.3, rankme=30.0)
    values |= dict(lr=1e-3, images_s=50.0, data_wait=0.02, memory_gb=2.0, seconds_to_go=3600.0)
    return {"step": step, **values, **more}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """State of a run whose targets and features are spread, on 24 val_select slices of 6 patients."""
    root = make_ct(tmp_path_factory.mktemp("data"), series=12, size=64)
    make_split(root, {f"toy/P{i}": "train" if i < 5 else "val_select" for i in range(11)})
    args = settings.resolve(t.build_parser().parse_args(["--data", str(root), "--out", str(root), *FLAGS]), 1)
    student, teacher = t.build(args)
    for model in (student, teacher):
        model.dino_head.last_layer.weight.data *= 30  # sharp enough to be neither uniform nor one-hot
        for block in model.backbone.blocks:
            block.mlp.fc2.weight.data *= 4  # of random blocks: lets tokens differ as those of a trained one do
    source = data.open_for(root, "fit")
    optimizer = torch.optim.AdamW(optim.param_groups(student, 0.9, 0.2), lr=0.0)
    recipes = settings.make_recipes(args, source.encoding)
    seen = {"known": True, "seen": [provenance.provenance_of(source)]}
    seen = {"trained_groups": source.groups, "provenance": seen}
    cpu = torch.device("cpu")
    run = t.Run(args, 0, 1, cpu, source, recipes, student, teacher, student, optimizer, trained=seen)
    t.write_config(run)
    return t.pack_state(run, 500) | {"step": 500}


class Toy:
    """A run folder on disk that a test may spoil before it looks."""

    def __init__(self, folder, state):
        self.folder, self.state = folder, copy.deepcopy(state)
        self.lines = [{"step": 0, "event": "started"}, *(line(step) for step in range(10, 501, 10))]
        self.lines.append({"step": 500, "event": "saved", "at": 500})
        self.out, self.age_s, self.sysfs = folder / "monitor", 5, folder / "sys"

    def write(self):
        self.folder.mkdir(exist_ok=True)
        checkpoint.save(self.folder / "last.pth", self.state)
        shutil.copy(Path(self.state["args"]["data"]) / "config.json", self.folder)
        log = self.folder / "metrics.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in self.lines))
        os.utime(log, (time.time() - self.age_s,) * 2)
        return self

    def look(self, *more):
        flags = ["--ckpt", self.folder / "last.pth", "--threads", 1, "--images", 1, "--sysfs", self.sysfs, *more]
        return m.main([str(flag) for flag in flags])

    def status(self):
        return json.loads((self.out / "status.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def toy(tmp_path, healthy):
    return Toy(tmp_path / "lidc", healthy)


@pytest.fixture(scope="module")
def seen_once(tmp_path_factory, healthy):
    once = Toy(tmp_path_factory.mktemp("seen") / "lidc", healthy).write()
    assert once.look() == 0
    return once.folder


@pytest.fixture
def looked(toy, seen_once):
    """The toy after one look."""
    shutil.copytree(seen_once, toy.folder)
    return toy


@pytest.fixture
def undrawn(monkeypatch):
    """Looks without pictures, whose drawing takes half of the time."""
    monkeypatch.setattr(m, "draw", lambda *_: {})


# verdicts


def test_a_healthy_run_is_healthy_and_untouched(toy, capsys):
    toy.write()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in toy.folder.iterdir()}
    assert toy.look() == 0
    assert capsys.readouterr().out.startswith("lidc step 500: healthy\n")
    status = toy.status()
    assert (status["verdict"], status["code"], status["findings"], status["step"]) == ("healthy", 0, [], 500)
    assert status["numbers"]["slices"] == 24 and status["pulse"]["eta_h"] == pytest.approx(1, abs=0.01)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in toy.folder.iterdir() if p.is_file()}
    assert after == before
    found = {p.relative_to(toy.out).as_posix() for p in toy.out.rglob("*.*") if p.is_file()}
    now = {f"step_00000500/{name}.png" for name in ("sheet", "image_1", "strip_1")}
    names = "status.json history.jsonl report.html metrics.prom images.json first.npz .lock".split()
    assert found == {*now, *names}


def scale(state, who, name, factor):
    state[who][name] = state[who][name] * factor


def constant(toy):
    scale(toy.state, "teacher", "backbone.norm.weight", 0)


def rank_two(toy):
    keep = torch.zeros(64)
    keep[[3, 40]] = 1
    scale(toy.state, "teacher", "backbone.norm.weight", keep)


def one_hot(toy):
    scale(toy.state, "teacher", "dino_head.last_layer.weight", 1000)


def uniform(toy):
    scale(toy.state, "teacher", "dino_head.last_layer.weight", 0)


def nan_weights(toy):
    toy.state["teacher"]["backbone.blocks.1.attn.qkv.weight"][5, 7] = math.nan


def infinite_features(toy):
    scale(toy.state, "teacher", "backbone.norm.weight", 3e38)


def logged(last=5, **values):
    """A plant: the last lines of the log say so."""

    def change(toy):
        rows = [row for row in toy.lines if "loss" in row]
        for row in rows[-last:]:
            row |= values

    return change


def event(text):
    return lambda toy: toy.lines.append({"step": 500, "event": text})


def skipped(toy):
    toy.lines += [{"step": s, "event": "skipped: loss or gradient is not finite"} for s in (480, 490, 495)]


def spikes(toy):
    for row in [row for row in toy.lines if "loss" in row][-16::4]:
        row["loss"] = 9.0


def stale(toy):
    toy.age_s = 16 * 60


def hot(toy):
    sensor = toy.sysfs / "class" / "hwmon" / "hwmon0"
    sensor.mkdir(parents=True)
    (sensor / "name").write_text("amdgpu\n")
    (sensor / "temp1_input").write_text("99000\n")


PLANTED = {
    "constant features": (constant, "rank collapse", 2, "deviation of embeddings: 0 < 0.005 (--min-std)"),
    "rank-2 features": (rank_two, "rank collapse", 2, r"rank of embeddings: [12]\.\d+ < 3 \(--min-rank\)"),
    "one-hot teacher": (one_hot, "one-hot", 2, r"teacher entropy / ln K: \S+ < 0.02 \(--min-entropy\)"),
    "uniform teacher": (uniform, "uniform", 2, "teacher entropy / ln K: 1 > 0.995 (--max-entropy)"),
    "one-hot in the log": (logged(teacher_entropy=0.01), "one-hot", 2, "logged teacher entropy / ln K: 0.01 < 0.02"),
    "uniform in the log": (logged(teacher_entropy=0.999, kl=0.01), "uniform", 2, "ln K: 0.999 > 0.995"),
    "NaN weights": (nan_weights, "diverging", 2, "share of what is not finite"),
    "infinite features": (infinite_features, "diverging", 2, "share of what is not finite: "),
    "NaN loss": (logged(last=1, loss=math.nan), "diverging", 2, "last loss not finite: 1 > 0"),
    "skipped updates": (skipped, "diverging", 2, "updates skipped lately: 3 > 2 (--max-skips)"),
    "rising loss": (logged(dino=4.5), "diverging", 2, r"rise of DINO \+ iBOT: 0\.3\d* > 0.25 \(--max-rise\)"),
    "spikes": (spikes, "diverging", 1, "loss spikes lately: 4 > 3 (--max-spikes)"),
    "stale metrics": (stale, "stalled", 2, "minutes since metrics.jsonl grew: 16 > 15"),
    "slow data": (logged(data_wait=0.6), "starved", 1, "share of time waiting for data: 0.6 > 0.3 (--max-wait)"),
    "full disk in a save": (event("SAVE FAILED, training goes on: [Errno 28] No space left on device"), "disk full", 2,
                            r"the last save to .* failed: \[Errno 28\] No space"),
    "failing save": (event("SAVE FAILED, training goes on: read-only"), "not saving", 2, "failed: read-only"),
    "heat": (hot, "hot", 1, "degrees C of the hottest sensor: 99 > 95 (--max-temp)"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_gets_its_word_and_code(toy, undrawn, capsys, name):
    change, word, code, text = PLANTED[name]
    change(toy)
    assert toy.write().look() == code
    said = capsys.readouterr().out
    assert said.startswith(f"lidc step 500: {word}\n"), said
    assert text in said or re.search(text, said), said
    status = toy.status()
    assert (status["verdict"], status["code"]) == (word, code)
    assert f'dinox_verdict{{run="lidc",verdict="{word}"}} 1' in (toy.out / "metrics.prom").read_text()
    assert f">{word}, exit code {code}, " in (toy.out / "report.html").read_text()


def test_a_disk_that_will_be_full_is_said_before(toy, capsys, monkeypatch):
    toy.write()
    usage = collections.namedtuple("usage", "total used free")
    size = (toy.folder / "last.pth").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, int(1.5 * size)))
    assert toy.look() == 2
    assert "disk full: checkpoints that fit: 1.5 < 2 (--min-saves)" in capsys.readouterr().out


def test_warm_up_excuses_what_must_be_learned_but_not_what_is_broken(toy, undrawn):
    toy.state["args"] = toy.state["args"] | {"grace": 500}
    uniform(toy)
    rank_two(toy)
    logged(teacher_entropy=0.01, data_wait=0.9, dino=9.0)(toy)
    assert toy.write().look() == 0 and toy.status()["verdict"] == "warming up"
    stale(toy)
    assert toy.write().look() == 2 and toy.status()["verdict"] == "stalled"
    toy.age_s = 0
    nan_weights(toy)
    assert toy.write().look() == 2 and toy.status()["verdict"] == "diverging"


def test_a_run_that_hangs_before_its_first_numbers_is_stalled(toy, undrawn):
    toy.lines = [{"step": 0, "event": "started"}, {"step": 5, "event": "SAVE FAILED, training goes on: no disk"}]
    assert toy.write().look() == 2 and [f["word"] for f in toy.status()["findings"]] == ["not saving"]
    toy.age_s = 16 * 60
    assert toy.write().look() == 2 and [f["word"] for f in toy.status()["findings"]] == ["not saving", "stalled"]


def test_a_finished_run_is_not_stalled_and_an_old_log_is_only_judged_by_its_interval(toy, undrawn):
    stale(toy)
    toy.lines.append(line(1000))
    assert toy.write().look() == 0 and toy.status()["pulse"]["finished"]
    toy.lines.pop()
    logged(images_s=0.5)(toy)  # 10 updates of 8 images take 160 s: ten such intervals are the limit
    assert toy.write().look() == 0
    toy.age_s = 27 * 60
    assert toy.write().look() == 2


def test_several_findings_are_all_told_and_the_worst_comes_first(toy, undrawn, capsys):
    hot(toy)
    constant(toy)
    stale(toy)
    toy.write().look()
    words = [f["word"] for f in toy.status()["findings"]]
    assert words == sorted(words, key=m.WORDS.index) and words[0] == "rank collapse"
    assert {"stalled", "hot"} <= set(words) and toy.status()["code"] == 2
    assert capsys.readouterr().out.count("\n  ") == len(words)


def past(patch_rank, temperature=50.0, images_s=50.0):
    pulse = {"images_s": images_s}
    return {"step": 100, "numbers": {"patch_rank": patch_rank}, "pulse": pulse, "warming": False, "time": 0.0,
            "sensors": {"cpu temp (C)": temperature}}  # fmt: skip


@pytest.mark.slow
def test_dense_features_are_judged_against_the_best_look(toy, undrawn):
    toy.out.mkdir(parents=True)
    toy.write().look()
    rank = toy.status()["numbers"]["patch_rank"]
    for factor, code in ((1.9, 0), (2.1, 1)):
        cut = json.dumps(past(factor * rank)) + '\n{"step": 4'  # by a full disk
        (toy.out / "history.jsonl").write_text(cut)
        assert toy.look() == code
        assert toy.status()["verdict"] == ("healthy", "dense features decaying")[code]
    assert len((toy.out / "history.jsonl").read_text().splitlines()) == 2
    assert toy.look("--max-cls-patch", -1) == 1 and "cosine of cls and patches" in str(toy.status()["findings"])


@pytest.mark.slow
def test_heat_while_images_per_second_fall_is_throttling(toy, undrawn):
    hot(toy)
    (toy.sysfs / "class/hwmon/hwmon0/temp1_input").write_text("80000")
    toy.write()
    toy.out.mkdir()
    for temperature, rate, code in ((70, 60, 1), (78, 60, 0), (70, 52, 0)):
        history = [past(1, temperature, rate)] * 3
        (toy.out / "history.jsonl").write_text("".join(json.dumps(h) + "\n" for h in history))
        assert toy.look() == code, (temperature, rate)
        assert ("throttling? 80 C, the median was 70" in str(toy.status()["findings"])) == bool(code)


# could not look


def test_what_cannot_be_read_is_code_3_with_the_reason(toy, capsys):
    toy.write()
    path, whole = toy.folder / "last.pth", (toy.folder / "last.pth").read_bytes()

    def blind(reason, *more):
        assert toy.look(*more) == 3
        said = capsys.readouterr()
        assert said.err.startswith("could not look: ") and reason in said.err and len(said.err.splitlines()) == 1
        assert toy.status()["code"] == 3 and toy.status()["verdict"] == "could not look"
        assert 'dinox_exit_code{run="lidc"} 3' in (toy.out / "metrics.prom").read_text()

    path.write_bytes(whole[: len(whole) // 2])
    blind(f"{path}: not a whole and safe checkpoint")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    blind("wrong checksum")
    path.write_bytes(b"")
    blind("not a whole and safe checkpoint")
    path.unlink()
    blind("has the run saved one yet")
    path.write_bytes(whole)
    root = Path(toy.state["args"]["data"])
    blind("is not a folder", "--data", toy.folder / "nowhere")
    blind("is none of the 24 slices", "--image", "toy/1.2.0.npy#2", "--out", toy.out)  # a training slice
    moved = shutil.copytree(root, toy.folder / "data")
    make_split(moved, {f"toy/P{i}": "val_select" if i < 5 else "train" for i in range(11)})
    blind("the run trained on toy/P0", "--data", moved)
    make_split(moved, {f"toy/P{i}": "train" for i in range(11)})
    blind("has no image in val_select", "--data", moved)
    (moved / "_splits" / "splits.json").unlink()
    blind("make_splits.py", "--data", moved)
    assert not (toy.folder / "nowhere").exists()
    assert m.main(["--ckpt", str(toy.folder / "no" / "last.pth")]) == 3 and not (toy.folder / "no").exists()
    if not torch.cuda.is_available():
        assert toy.look("--device", "cuda") == 3 and "sees no such card" in capsys.readouterr().err


def test_a_run_without_a_split_may_look_at_anything(toy, undrawn, tmp_path):
    moved = shutil.copytree(toy.state["args"]["data"], tmp_path / "data")
    shutil.rmtree(moved / "_splits")
    toy.state["args"] = toy.state["args"] | {"no_split": True}
    assert toy.write().look("--data", moved, "--slices", 16) == 0
    assert toy.status()["numbers"]["slices"] == 16


def test_a_second_monitor_does_not_look_and_disturbs_nothing(looked, capsys):
    before = {p: p.read_bytes() for p in looked.out.rglob("*") if p.is_file()}
    with loop.lock(looked.out, 1):
        assert looked.look() == 3
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    after = {p: p.read_bytes() for p in looked.out.rglob("*") if p.is_file()}
    assert after == before
    assert looked.look() == 0  # the lock went with its holder


def test_a_look_after_a_killed_look_is_a_look(toy, undrawn):
    toy.write()
    toy.out.mkdir()
    (toy.out / ".lock").write_text("4194304")
    (toy.out / ".status.json.1-ab.tmp").write_text("{")
    assert toy.look() == 0


# small files that are damaged: one sentence, or counted and left out; never a traceback


def said_once(capsys, text):
    said = capsys.readouterr()
    assert text in said.out + said.err, said
    assert "Traceback" not in said.err and "allow_pickle" not in said.out + said.err
    return said


@pytest.mark.slow
def test_damaged_lines_of_the_history_are_skipped_counted_and_gone(toy, undrawn, capsys):
    toy.write().look()
    good = past(1.0)
    bad = ["{", "[1]", '{"step": 4}', json.dumps(good | {"step": "4"}), json.dumps(good | {"numbers": [1]})]
    bad += [json.dumps(good | {"numbers": {"patch_rank": "9"}}), json.dumps(good | {"sensors": {"a (C)": "hot"}})]
    bad += [json.dumps(good | {"pulse": {"images_s": [1]}}), json.dumps(good | {"numbers": {"patch_rank": 10**400}})]
    bad += ["[" * 10**5, '{"step": 1' + "0" * 400 + "}", json.dumps(good | {"numbers": {"rankme": 1e300}})]
    (toy.out / "history.jsonl").write_text("\n".join([*bad, json.dumps(good), ""]))
    capsys.readouterr()
    assert toy.look() == 0
    said_once(capsys, f"note: {len(bad)} damaged lines of {toy.out / 'history.jsonl'} were skipped")
    assert [json.loads(row)["step"] for row in (toy.out / "history.jsonl").read_text().splitlines()] == [100, 500]
    assert toy.look() == 0 and "note: " not in capsys.readouterr().out


def npz(**change):
    """first.npz of the toy, 16 patches of 128 features and 16 x 16 in the finer view, with other members."""
    arrays = dict(colours=np.zeros((1, 16, 16, 3), "f2"), grams=np.zeros((1, 16, 16), "f2"), dim=np.array(128))
    arrays |= dict(step=np.array(7))
    file = io.BytesIO()
    np.savez(file, **{name: value for name, value in (arrays | change).items() if value is not None})
    return file.getvalue()


def zipped(compression=zipfile.ZIP_STORED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def header(shape, dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue()


def bomb():
    """30 kB that become 30 MB of zeros, and with more zeros as many as one likes."""
    zeros = header((1, 1000, 2500, 3)) + bytes(30_000_000)
    small = {name: header(shape) + bytes(4 * math.prod(shape)) for name, shape in
             (("grams", (1, 16, 16)), ("dim", ()), ("step", ()))}  # fmt: skip
    return zipped(zipfile.ZIP_DEFLATED, colours=zeros, **small)


LONG_HEADER = b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535  # numpy would advise to load it unsafely
DAMAGED_FIRST = {
    "empty": b"", "text": b"hello", "cut": npz()[:-300], "a pickle": b"\x80\x04N.", "one array": npz()[:200],
    "an object": npz(colours=np.array([{}], object)), "a text": npz(dim=np.array("a")),
    "NaN": npz(colours=np.full((1, 16, 16, 3), np.nan)), "complex": npz(colours=np.zeros((1, 16, 16, 3), complex)),
    "two colours": npz(colours=np.zeros((1, 16, 16, 2))), "flat": npz(grams=np.zeros(16)),
    "of two and of one image": npz(colours=np.zeros((2, 16, 16, 3))),
    "not square": npz(grams=np.zeros((1, 16, 17))), "no step": npz(step=None), "more": npz(more=np.zeros(1)),
    "a step of its own": npz(step=np.array(-5)), "steps": npz(step=np.arange(2)), "a bomb": bomb(),
    "a claim": zipped(colours=header((1, 10**6, 10**6, 3)), grams=header((1, 16, 16)), dim=header(()), step=header(())),
    "a long header": zipped(**dict.fromkeys(sheet.FIRST, LONG_HEADER)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_FIRST)
def test_a_damaged_first_npz_is_a_reason_and_not_numpys(tmp_path, name):
    (tmp_path / "first.npz").write_bytes(DAMAGED_FIRST[name])
    with pytest.raises(ValueError, match=".") as caught:
        sheet.read_first(tmp_path / "first.npz")
    assert "allow_pickle" not in str(caught.value) and len(str(caught.value)) <= 200
    (tmp_path / "first.npz").write_bytes(npz())
    assert sheet.read_first(tmp_path / "first.npz")["step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut", "an object", "a bomb"])
def test_a_damaged_first_look_is_made_anew_and_said(toy, capsys, name):
    toy.write()
    toy.out.mkdir()
    (toy.out / "first.npz").write_bytes(DAMAGED_FIRST[name])
    assert toy.look() == 0
    said_once(capsys, f"note: {toy.out / 'first.npz'} is damaged (")
    with np.load(toy.out / "first.npz") as file:
        assert file["step"] == 500
    assert toy.look() == 0 and "note: " not in capsys.readouterr().out
    assert toy.status()["numbers"]["gram_drift"] < 1e-3


IMAGES = ["", "[1]", "{}", "\x80", "[" * 10**5, '{"version": 2, "images": ["a"]}']
IMAGES += [f'{{"version": 1, "images": {value}}}' for value in ("3", "[3]", "[]")]


def test_no_array_is_read_before_its_size_is_known(tmp_path, monkeypatch):
    (tmp_path / "first.npz").write_bytes(DAMAGED_FIRST["a claim"])
    monkeypatch.setattr(np, "frombuffer", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ValueError, match="colours is not as long as its numbers"):
        sheet.read_first(tmp_path / "first.npz")


def test_a_damaged_list_of_images_is_one_sentence(toy, capsys):
    toy.write()
    toy.out.mkdir()
    for text in IMAGES:
        (toy.out / "images.json").write_text(text, encoding="latin-1")
        assert toy.look() == 3
        said = said_once(capsys, f"could not look: {toy.out / 'images.json'}").err
        assert len(said.splitlines()) == 1 and "remove it, and the test images are chosen anew" in said


def test_odd_rows_of_the_log_are_skipped_and_counted(toy, undrawn, capsys):
    toy.lines += [line(501, loss="5.0"), line(502, dino=[1, [2]]), line(503, ibot=10**400), line(504, kl=True)]
    toy.lines += [{"step": "505", "loss": 1.0}, {"loss": 1.0}, {"step": 506, "event": 7}, line(507, images_s=1e300)]
    toy.lines += [{"step": 10**400, "loss": 1.0}, [1], "text", line(509, teacher_entropy={"a": 1})]
    assert toy.write().look() == 0
    said_once(capsys, f"note: 12 damaged lines of {toy.folder / 'metrics.jsonl'} were skipped")
    assert toy.status()["pulse"]["last_step"] == 500


RECIPES = [f'{{"recipes": {value}}}' for value in ("[]", "[3]", '{"kind": "ct"}', '[{"kind": "ct"}]')]


def test_a_damaged_config_of_the_run_is_one_sentence(toy, capsys):
    toy.write()
    for text in ["", "[]", "{}", "\x80", "[" * 10**5, *RECIPES]:
        (toy.folder / "config.json").write_text(text, encoding="latin-1")
        assert toy.look() == 3
        assert len(said_once(capsys, "could not look: ").err.splitlines()) == 1


ODD_RECIPE = [("global_size", "64"), ("global_size", 10**9), ("local_crops", [2]), ("field", 3), ("field", ["a", "b"])]


def test_a_recipe_of_odd_types_is_one_sentence(healthy):
    usual = json.loads((Path(healthy["args"]["data"]) / "config.json").read_text())
    assert runs.read_recipes(usual)
    for key, value in [*ODD_RECIPE, ("ratio", [1.0]), ("windows", 3), ("blur", None)]:
        config = {"recipes": [usual["recipes"][0] | {key: value}]}
        with pytest.raises(ValueError, match=f"config.json: {key} of a recipe is [^\n]*; use the code that trained"):
            runs.read_recipes(config)


def change(*where, to):
    """A plant: a field of the checkpoint is another."""

    def apply(state):
        for key in where[:-1]:
            state = state[key]
        state[where[-1]] = to

    return apply


ODD_STATES = {
    "no args": lambda state: state.pop("args"), "no centers": lambda state: state.pop("centers"),
    "no teacher": lambda state: state.pop("teacher"), "no flag": lambda state: state["args"].pop("prototypes"),
    "step as text": change("step", to="500"), "args as list": change("args", to=[1]),
    "data as number": change("args", "data", to=3), "no_split as text": change("args", "no_split", to="False"),
    "one temperature": change("args", "teacher_temp", to=[0.04]),
    "temperatures as text": change("args", "teacher_temp", to=["a", "b"]),
    "huge heads": change("args", "prototypes", to=10**400), "other heads": change("args", "prototypes", to=31),
    "view of no size": change("eval_view", "size", to=0), "a huge view": change("eval_view", "size", to=60_000),
    "no window": change("eval_view", "window", to=None), "odd view": change("eval_view", to=3),
    "unknown arch": change("arch", "name", to="vit_none"),
    "unknown option": change("arch", "overrides", to={"dept": 3}),
    "odd arch": change("arch", "overrides", to={"depth": "many"}),
    "another arch": change("arch", "overrides", to={"depth": 3}),
    "provenance as number": change("provenance", to=3), "no known": change("provenance", to={"seen": []}),
    "no salt": change("provenance", "seen", to=[{"groups": []}]),
    "odd hashes": change("provenance", "seen", 0, "groups", to=[[]]),
    "no hashes": change("provenance", "seen", 0, "series", to=3),
    "grace as text": change("args", "grace", to="0.1"), "a weight missing": lambda state: state["teacher"].popitem(),
    "a weight too many": change("student", "more\x1b[2J", to=torch.zeros(1)),
    "no tensor": change("teacher", "backbone.cls_token", to=3),
}  # fmt: skip


def test_a_checkpoint_of_odd_fields_is_one_sentence(toy, healthy, capsys):
    toy.write()
    for name, spoil in ODD_STATES.items():
        state = {"format": "dinox", "version": 1} | copy.deepcopy(healthy)
        spoil(state)
        torch.save(state, toy.folder / "last.pth")  # checkpoint.save would refuse
        assert toy.look() == 3, name
        said = said_once(capsys, "could not look: ").err
        assert len(said.splitlines()) == 1 and len(said) < 1200 and said.strip().isprintable(), (name, said)


@pytest.mark.slow
def test_odd_places_in_a_table_of_labels_are_one_sentence(toy, tmp_path, capsys):
    header = "id,path,z,y,x,label,group,diameter_mm,box_mm".split(",")
    rows = [[s, f"toy/1.2.{s}.npy", 2, 30, 20, s % 2, "g", 5, 8] for s in range(6, 12)]
    toy.write()
    for column, value in ((2, "two"), (2, "9" * 5000), (3, "y" * 50_000), (4, "nan"), (4, "1e999"), (3, "")):
        odd = [[value if k == column else cell for k, cell in enumerate(row)] for row in rows[:1]] + rows[1:]
        write_table(tmp_path / "odd.csv", header, odd)
        assert toy.look("--labels", tmp_path / "odd.csv") == 3
        said = said_once(capsys, "expected pixels; write it anew").err
        assert len(said.splitlines()) == 1 and len(said) < 600
    write_table(tmp_path / "long.csv", header, [[*row[:5], f"{row[5]}{'x' * 100_000}", *row[6:]] for row in rows])
    assert toy.look("--labels", tmp_path / "long.csv") == 0 and toy.status()["numbers"]["knn_slices"] == 6


def test_pictures_of_earlier_looks_that_are_damaged_are_left_out_of_the_strips(looked, capsys):
    (looked.out / "step_00000500" / "image_1.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    (looked.out / "step_other").mkdir()
    shutil.copy(looked.out / "step_00000500" / "sheet.png", looked.out / "step_other" / "image_1.png")
    (looked.out / "step_00000400").mkdir()
    now = looked.out / "step_00000500" / "sheet.png"  # of another size than image_1
    shutil.copy(now, looked.out / "step_00000400" / "image_1.png")
    looked.state["step"] = 600
    looked.write()
    capsys.readouterr()
    assert looked.look() == 0
    said_once(capsys, "note: 2 pictures of earlier looks cannot be read")


# what a newcomer meets


@pytest.mark.parametrize("name", ["notes.md", ""])
def test_nothing_is_written_beside_what_is_no_run(tmp_path, capsys, name):
    (tmp_path / "notes.md").write_text("# notes")
    assert m.main(["--ckpt", str(tmp_path / name)]) == 3
    assert "is no checkpoint of a run; name its folder, or its last.pth" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_the_folder_of_a_run_is_enough(toy, capsys):
    toy.write()
    assert m.main(["--ckpt", str(toy.folder), "--threads", "1", "--images", "1", "--sysfs", str(toy.sysfs)]) == 0
    assert toy.status()["step"] == 500
    (toy.folder / "last.pth").unlink()
    assert m.main(["--ckpt", str(toy.folder)]) == 3
    assert f"no checkpoint at {toy.folder / 'last.pth'}; has the run saved one yet" in capsys.readouterr().err
    assert m.main(["--ckpt", str(toy.folder.with_name("other"))]) == 3
    said = capsys.readouterr().err
    assert "does not exist; name the folder of a run" in said and not (toy.folder.parent / "monitor").exists()


def test_of_a_run_that_was_copied_from_elsewhere_the_data_is_asked_for(toy, undrawn, capsys):
    root = toy.write().state["args"]["data"]
    toy.state["args"] = toy.state["args"] | {"data": "/mnt/elsewhere/processed"}
    checkpoint.save(toy.folder / "last.pth", toy.state)
    assert toy.look() == 3
    said = capsys.readouterr().err
    assert "/mnt/elsewhere/processed is no folder here; the run's flags name it: give --data" in said
    assert toy.look("--data", root) == 0


def history(toy):
    return [json.loads(row) for row in (toy.out / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_second_look_at_a_step_takes_the_place_of_the_first(toy, capsys):
    toy.write()
    for _ in range(3):
        assert toy.look("--slices", 24) == 0
    assert [h["step"] for h in history(toy)] == [500]
    page = (toy.out / "report.html").read_text()
    assert "rank of embeddings" not in page and "First look" not in page  # one point is no chart
    assert toy.look("--slices", 12) == 0  # another setting: a point of its own, which no chart joins
    assert [h["numbers"]["slices"] for h in history(toy)] == [24, 12]
    assert "note: 1 looks with other --slices, --labels or images are not compared" in capsys.readouterr().out
    toy.state["step"] = 600
    assert toy.write().look("--slices", 24) == 0
    page = (toy.out / "report.html").read_text()
    assert "rank of embeddings" in page
    svg = next(part for part in page.split("<svg")[1:] if "rank of embeddings" in part)
    assert [len(points.split()) for points in re.findall(r'polyline points="([^"]+)"', svg)] == [2, 2]


@pytest.mark.slow
def test_a_look_with_other_slices_is_not_the_best_to_compare_with(toy):
    toy.write().look("--slices", 24)
    row = history(toy)[0]
    row["numbers"]["patch_rank"] *= 9
    (toy.out / "history.jsonl").write_text(json.dumps(row) + "\n")
    toy.state["step"] = 600
    toy.write()
    assert toy.look("--slices", 12) == 0
    assert toy.look("--slices", 24) == 1 and toy.status()["verdict"] == "dense features decaying"


def test_a_finished_run_says_so_and_nothing_goes_on(toy, capsys):
    toy.lines += [line(1000), {"step": 1000, "event": "SAVE FAILED, training goes on: disk: read-only"}]
    toy.write().look()
    said = capsys.readouterr().out
    assert "note: the run is finished: 1000 of 1,000 updates are done" in said
    assert "goes on" not in said + (toy.out / "report.html").read_text() + (toy.out / "status.json").read_text()
    assert f"the last save to {toy.folder} failed: disk: read-only" in said


def test_a_first_report_has_no_empty_parts_and_explains_each_number(looked):
    page = (looked.out / "report.html").read_text()
    for absent in ("First look to now", "rank of embeddings", "3 directions", "sensor</th>", "view_slices"):
        assert absent not in page, absent
    assert page.count("data:image/png") == 1 and '<a href="step_00000500/sheet.png"><img' in page
    assert (looked.out / "step_00000500" / "sheet.png").is_file()
    cells = re.findall(r"<tr><td>(\w+)</td><td>[^<]*</td><td>([^<]*)</td></tr>", page)
    assert len(cells) > 40 and all(len(words.split()) > 1 for _, words in cells), cells
    told = looked.status()["numbers"].keys() | looked.status()["pulse"].keys()
    assert {key for key, _ in cells} == told - {"view_slices"}
    assert "DINO loss" in page and "How to read the pictures" in page  # the log has many points


@pytest.mark.slow
def test_features_are_drawn_at_four_times_the_resolution_of_training(toy, monkeypatch):
    drawn, real = [], sheet.maps

    def maps(title, windows, base, body, dense, *more):
        drawn.append(dense)
        return real(title, windows, base, body, dense, *more)

    monkeypatch.setattr(sheet, "maps", maps)
    toy.write().look()
    fine, coarse = drawn[0]  # of images of 64 pixels
    assert fine.similarity.shape == (16, 16) and coarse.similarity.shape == (4, 4)
    assert fine.attention.shape[1:] == (16, 16) and fine.along.shape == (16, 16, 3)
    assert fine.similarity[fine.point] == pytest.approx(1, abs=1e-5)
    assert coarse.point == tuple(k // 4 for k in fine.point)
    for most, shapes in ((8, [(8, 8), (4, 4)]), (7, [(4, 4)]), (2, [(4, 4)])):  # large images: finer only where it fits
        monkeypatch.setattr(m, "MOST", most)
        toy.look("--out", toy.folder / str(most))
        assert [one.similarity.shape for one in drawn[-1]] == shapes


def test_colours_follow_what_is_told_apart_and_not_how_features_are_turned():
    """Of the same patches, in features that are turned: the same colours. Of others: no colours in common."""
    random = np.random.default_rng(0)
    patches = random.normal(size=(800, 12)) * np.array([9, 7, 5, *[0.5] * 9])
    first = sheet.principal(patches).along(patches)
    turned = patches @ np.linalg.qr(random.normal(size=(12, 12)))[0] + 4
    again, alone = (sheet.principal(turned, like).along(turned) for like in (first, None))
    assert np.abs(again - first).max() < 1e-6 < 0.5 < np.abs(alone - first).max()
    other = random.normal(size=(800, 12)) * np.array([9, 7, 5, *[0.5] * 9])
    kept = (sheet.principal(other, first).along(other) * first).sum() / (3 * 800)
    assert 0 <= kept < 0.15


def test_a_number_and_its_limit_are_told_apart():
    assert m.told_apart(15.2, 15, 2) == "15.2" and m.told_apart(16.02, 15, 2) == "16"
    assert m.told_apart(0.99500001, 0.995) == "0.99500001" and m.told_apart(0.999, 0.995) == "0.999"


# the terminal, disks and clocks


def test_escape_bytes_of_names_do_not_reach_the_terminal(toy, undrawn, capsys):
    toy.folder = toy.folder.with_name("li\x1b[2Jdc")
    toy.out = toy.folder / "monitor"
    toy.write().look()
    toy.look("--image", "a\x1b[2Jb" * 10**5, "--out", toy.folder / "second")
    stale(toy)
    event("a\x1b[2Jb")(toy)
    toy.write().look()
    toy.look("--data", "/no\x1b[2Jwhere")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "li\\x1b[2Jdc step 500" in said.out and len(said.err) < 3000
    for name in ("metrics.prom", "report.html"):
        assert "\x1b" not in (toy.out / name).read_text()


def test_only_the_disk_of_the_run_is_called_full(toy, capsys, monkeypatch):
    toy.write()

    def no_room(path, writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "atomic_write", no_room)
    assert toy.look() == 2
    said = capsys.readouterr()
    assert said.out.startswith("lidc step 500: healthy")
    assert "disk full: [Errno 28] No space left on device" in said.err and str(toy.out) in said.err
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == toy.folder.stat().st_dev:
        pytest.skip("no second disk here")
    folder = other / f"monitor-{os.getpid()}"
    try:
        assert toy.look("--out", folder) == 3
        said = capsys.readouterr().err
        assert said.startswith("could not look: [Errno 28] No space left") and str(folder) in said
        assert "the disk of the run is another one" in said
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_clocks_that_jump_are_said_and_judged_as_now(toy, undrawn, capsys):
    toy.age_s = -3 * 3600
    assert toy.write().look() == 0
    said = capsys.readouterr().out
    assert "metrics.jsonl is dated 180 minutes ahead of this machine's clock: no stall can be seen" in said
    beat = toy.status()["pulse"]
    assert beat["age_s"] == 0 and beat["eta_h"] == pytest.approx(1)


# the one door


def test_the_monitor_sees_leaks_by_hash_and_duplicates_that_cross(toy, undrawn, capsys):
    root = Path(toy.state["args"]["data"])
    moved = shutil.copytree(root, toy.folder.with_name("data"))
    source = data.open_source(moved)
    sets = {"version": 1, "index_sha256": source.index_sha256, "groups": [["toy/P0", "toy/P9"], ["toy/P1", "toy/P2"]]}
    (moved / "_splits" / "duplicates.json").write_text(json.dumps(sets))
    assert toy.write().look("--data", moved) == 0
    assert "note: 1 sets of duplicates lie in several splits" in capsys.readouterr().out
    seen = provenance.provenance_of(data.open_for(moved, "select", allow_duplicates=True))
    toy.state["provenance"] = {"known": True, "seen": [seen]}  # by hash alone: their names are not in trained_groups
    assert toy.write().look() == 3
    assert "leak: " in (said := capsys.readouterr().err) and "the run trained on toy/P10 (6 groups in all)" in said
    toy.state["provenance"] = {"known": False, "seen": []}
    assert toy.write().look() == 0
    assert "note: what the weights that the run began with were trained on is unknown" in capsys.readouterr().out


# the checkpoint, once


def marked(state, step):
    """A state whose every weight says which save it belongs to."""
    who = {name: torch.full_like(value, float(step)) for name, value in state["teacher"].items()}
    return {**state, "teacher": who, "student": who, "step": step}


def replace_forever(path, files, stop, in_place=False):
    while not stop.is_set():
        for file in files:
            if in_place:
                shutil.copyfile(file, path)
            else:
                link = path.with_name(".link")
                os.link(file, link)
                os.replace(link, path)


def read_while_replaced(tmp_path, state, times, in_place):
    files = [checkpoint.save(tmp_path / f"{k}.pth", marked(state, k)) for k in (1, 2)]
    path, stop, seen, refused = tmp_path / "last.pth", threading.Event(), set(), 0
    shutil.copyfile(files[0], path)
    writer = threading.Thread(target=replace_forever, args=(path, files, stop, in_place))
    writer.start()
    try:
        for _ in range(times):
            try:
                found, _ = runs.read_checkpoint(path)
            except ValueError:
                refused += 1
                continue
            values = {v.item() for v in torch.cat([x.flatten() for x in found["teacher"].values()]).unique()}
            assert values == {float(found["step"])}, "half of one save and half of another"
            seen.add(found["step"])
    finally:
        stop.set()
        writer.join()
    return seen, refused


def test_a_checkpoint_replaced_while_it_is_read_is_one_of_the_two(tmp_path, healthy):
    seen, refused = read_while_replaced(tmp_path, healthy, 10, in_place=False)
    assert seen <= {1, 2} and refused == 0


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_checkpoint_replaced_100_times(tmp_path, healthy, in_place):
    seen, refused = read_while_replaced(tmp_path, healthy, 100, in_place)
    assert (seen == {1, 2} and refused == 0) if not in_place else refused > 0


def test_a_name_that_goes_to_a_broken_or_no_file_in_mid_read_changes_nothing(tmp_path, healthy, monkeypatch):
    path = checkpoint.save(tmp_path / "last.pth", marked(healthy, 7))
    real = checkpoint.check
    for spoil in (lambda: path.unlink(), lambda: os.replace(tmp_path / "bad", path)):
        checkpoint.save(path, marked(healthy, 7))
        (tmp_path / "bad").write_bytes(b"PK rubbish")

        def check(f, name, spoil=spoil):
            spoil()
            real(f, name)

        monkeypatch.setattr(checkpoint, "check", check)
        state, _ = runs.read_checkpoint(path)
        monkeypatch.setattr(checkpoint, "check", real)
        assert state["step"] == 7


def test_a_file_that_is_written_to_in_place_is_refused(tmp_path, healthy, monkeypatch):
    path, real = checkpoint.save(tmp_path / "last.pth", marked(healthy, 7)), checkpoint.load

    def load(name, **more):
        state = real(name, **more)
        os.utime(path)  # what any write to this very file does
        return state

    monkeypatch.setattr(checkpoint, "load", load)
    with pytest.raises(ValueError, match="last.pth was overwritten in place while it was read; copy to another name"):
        runs.read_checkpoint(path)


# numbers


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(3)
    return build_vit("vit_test", layerscale=1.0).eval().requires_grad_(False)


def test_one_pass_shows_what_the_models_own_methods_show(vit):
    images = torch.randn(2, 3, 64, 96)
    seen, tokens = m.look_through(vit, images), vit(images)
    for ours, own in zip(seen.tokens, tokens):
        torch.testing.assert_close(ours, own)
    torch.testing.assert_close(seen.attention, vit.attention(images))
    raw = vit.intermediate(images, 1, norm=False)[0].patches
    torch.testing.assert_close(seen.norms, raw.norm(dim=-1))


def models(healthy):
    return [m.build(healthy, who, torch.device("cpu")) for who in ("student", "teacher")]


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropy(probs):
    return (-(probs * probs.log()).nan_to_num(0).sum(1).mean() / math.log(probs.shape[1])).item()


def effective_rank(x):
    values = torch.linalg.svdvals(x - x.mean(0))
    p = values / values.sum()
    return math.exp(-(p * p.log()).nan_to_num(0).sum())


def test_the_snapshot_matches_slow_definitions(healthy):
    student, teacher = models(healthy)
    images, crops, series = noise(20, 3, 64, 64), noise(24, 3, 64, 64, seed=2), torch.tensor([0, 0, 1, 1, 2, 2] * 2)
    chunks, parts = [(part, None) for part in images.split(8)], list(zip(crops.split(12), series.split(6)))
    found = m.snapshot(student, teacher, chunks, parts, temperature=0.05)
    tokens = teacher.backbone(images)
    unit = F.normalize(tokens.cls, dim=-1)
    pairs = [(i, j) for i in range(20) for j in range(i)]
    powers = [math.exp(-2 * (unit[i] - unit[j]).square().sum().item()) for i, j in pairs]
    assert found["uniformity"] == pytest.approx(math.log(sum(powers) / len(powers)), rel=1e-4)
    assert found["cosine"] == pytest.approx(np.mean([(unit[i] @ unit[j]).item() for i, j in pairs]), rel=1e-4)
    assert found["feature_std"] == pytest.approx(8 * unit.numpy().std(0).mean(), rel=1e-4)
    assert found["effective_rank"] == pytest.approx(effective_rank(tokens.cls), rel=1e-3)
    assert found["patch_rank"] == pytest.approx(effective_rank(tokens.patches[:, ::2].flatten(0, 1)), rel=1e-3)
    cosines = [F.cosine_similarity(c, p, 0).item() for c, own in zip(tokens.cls, tokens.patches) for p in own]
    assert found["cls_patch_cosine"] == pytest.approx(np.mean(cosines), rel=1e-3, abs=1e-5)
    assert (found["slices"], found["view_slices"], found["nonfinite"]) == (20, 12, 0)

    logits = teacher.dino_head(teacher.backbone(crops).cls)
    probs = losses.sinkhorn(logits, 0.05)
    assert found["teacher_entropy"] == pytest.approx(entropy(probs), rel=1e-4)
    assert found["sharp_entropy"] == pytest.approx(entropy(F.softmax((logits - logits.mean(0)) / 0.05, 1)), rel=1e-4)
    log_q = F.log_softmax(student.dino_head(student.backbone(crops[:12]).cls) / 0.1, 1)  # of every fourth part
    kl = (probs[:12] * (probs[:12].log() - log_q)).nan_to_num(0).sum(1).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    plain = m.snapshot(student, teacher, chunks, parts, centering="none", temperature=0.05)
    assert plain["teacher_entropy"] == pytest.approx(entropy(F.softmax(logits / 0.05, 1)), rel=1e-4)


def test_patches_of_many_times_the_usual_norm_are_counted(healthy, monkeypatch):
    teacher, real = models(healthy)[1], m.look_through

    def with_outliers(vit, images):
        seen = real(vit, images)
        seen.norms[:, 3] *= 10
        return seen

    assert m.of_slices(teacher.backbone, [(noise(8, 3, 64, 64), None)])["norm_outliers"].sum() == 0
    monkeypatch.setattr(m, "look_through", with_outliers)
    found = m.of_slices(teacher.backbone, [(noise(8, 3, 64, 64), None)])["norm_outliers"]
    assert found.tolist() == [1 / 16] * 8


def test_attention_is_weighed_against_body_and_lung(healthy, monkeypatch):
    hu = torch.full((1, 3, 64, 64), -1000, dtype=torch.int16)
    hu[:, :, :, 16:] = 40
    hu[:, :, 16:48, 32:] = -800
    inside = m.tissue(hu, "hu16-v1", np.array([[0, 0, 64, 64.0]]), 4)
    for mask, found in zip((hu[0, 1] != -1000, hu[0, 1] == -800), inside[0]):
        resized = Image.fromarray(mask.numpy().astype(np.float32)).resize((4, 4), Image.Resampling.BICUBIC)
        assert np.abs(np.clip(resized, 0, 1) - found.numpy()).max() < 1e-4
    body = np.array([[0, 1, 1, 1]] * 4, float)
    lung = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], float)
    codes = torch.stack([torch.from_numpy(data.window_codes(hu[0, 0], -600, 1500))] * 3)[None]
    assert torch.equal(m.tissue(codes, "rgb-v1", np.array([[0, 0, 64, 64.0]]), 4), inside)
    assert m.tissue(codes, "photo", None, 4) is None
    student, teacher = models(healthy)
    real = m.look_through
    crops = [(noise(16, 3, 64, 64), torch.arange(8))]
    weights = torch.arange(16.0).view(1, 1, 4, 4).expand(8, 2, 4, 4)
    monkeypatch.setattr(m, "look_through", lambda vit, x: real(vit, x)._replace(attention=weights))
    exact = torch.from_numpy(np.stack([body, lung])).float()[None].expand(8, 2, 4, 4)
    found = m.snapshot(student, teacher, [(noise(8, 3, 64, 64), exact)], crops)
    assert found["attention_body"] == pytest.approx((120 - 0 - 4 - 8 - 12) / 120)
    assert found["attention_lung"] == pytest.approx((6 + 7 + 10 + 11) / 120)
    assert (found["area_body"], found["area_lung"]) == (0.75, 0.25)


def test_retrieval_is_that_of_the_training_log(healthy):
    source = data.open_for(healthy["args"]["data"], "select")
    recipe = settings.make_recipes(t.build_parser().parse_args(["--data", "x", *FLAGS]), source.encoding)[0]
    recipe = dataclasses.replace(recipe, gram_size=0)
    rows = m.of_views(*models(healthy), m.training_views(source, recipe, 16))
    found = losses.retrieval(*rows["pairs"].unbind(1), rows["series"])
    pairs, series = [], []
    for batch in data.make_loader(source, recipe, 0, range(3), 8):
        pairs.append(held_out.view_pairs(models(healthy)[1], data.render(batch.images, batch.plan).globals).detach())
        series.append(torch.from_numpy(source.series[batch.ids]))
    assert found == losses.retrieval(*torch.cat(pairs, 1), torch.cat(series))
    many = F.normalize(noise(30, 2, 4), dim=-1)
    kin = torch.arange(30) // 3
    ranks = [
        sum((many[i, 0] @ many[j, 1]) > (many[i, 0] @ many[i, 1]) for j in range(30) if kin[j] != kin[i])
        for i in range(30)
    ]
    assert losses.retrieval(*many.unbind(1), kin)["top5"] == pytest.approx(np.mean([r < 5 for r in ranks]))


def test_neighbours_never_come_from_the_own_patient():
    random = np.random.default_rng(0)
    groups, labels = np.arange(40) // 4, [str(g % 2) for g in np.arange(40) // 4]
    own = random.normal(size=(10, 16))[groups]  # each patient looks like itself alone
    by_label = np.array([[1.0, 0], [0, 1]]).repeat(8, 1)[np.array(labels, int)]
    noise = random.normal(size=(40, 16))
    assert m.knn(torch.from_numpy(by_label + 0.1 * noise).float(), labels, groups) == 1
    assert m.knn(torch.from_numpy(10 * own + 0.1 * noise).float(), labels, groups) < 0.75
    cls = torch.from_numpy(noise).float()
    unit, right = F.normalize(cls, dim=-1), {"0": [], "1": []}
    for i in range(40):
        others = sorted(((unit[i] @ unit[j]).item(), labels[j]) for j in range(40) if groups[j] != groups[i])[-10:]
        votes = collections.Counter()
        for cosine, label in others:
            votes[label] += math.exp(cosine / 0.07)
        right[labels[i]].append(votes.most_common(1)[0][0] == labels[i])
    assert m.knn(cls, labels, groups) == pytest.approx(np.mean([np.mean(r) for r in right.values()]))


def write_table(path, header, rows):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


@pytest.mark.slow
def test_labels_are_read_by_header_and_only_of_slices_that_may_be_looked_at(toy, tmp_path, capsys, monkeypatch):
    header = "id,path,z,y,x,label,group,diameter_mm,box_mm".split(",")
    rows = [[s, f"toy/1.2.{s}.npy", 2, 30, 20, s % 2, "g", 5, 8] for s in range(12)]  # series 6 .. 11 are val_select
    write_table(tmp_path / "nodules.csv", header, rows)
    asked, real = [], data.eval_boxes

    def eval_boxes(sizes, regions=None):
        asked.append(regions)
        return real(sizes, regions)

    monkeypatch.setattr(data, "eval_boxes", eval_boxes)
    assert toy.write().look("--labels", tmp_path / "nodules.csv") == 0
    numbers = toy.status()["numbers"]
    assert numbers["knn_slices"] == 6 and numbers["knn_chance"] == 0.5 and 0 <= numbers["knn"] <= 1
    boxes = np.concatenate([r for r in asked if r is not None])
    half = 25 / 0.7  # spacing of the toy series in mm
    assert np.allclose(boxes, [[30 - half, 20 - half, 30 + half, 20 + half]] * 6)
    write_table(tmp_path / "odd.csv", ["name", "class"], [])
    assert toy.look("--labels", tmp_path / "odd.csv") == 3 and "expected path,label[,g" in capsys.readouterr().err
    write_table(tmp_path / "blank.csv", header, [[*row[:5], row[5] if row[0] != 6 else " ", *row[6:]] for row in rows])
    assert toy.look("--labels", tmp_path / "blank.csv") == 0 and toy.status()["numbers"]["knn_slices"] == 5
    write_table(tmp_path / "one.csv", header, [[*row[:5], 1, *row[6:]] for row in rows])
    assert toy.look("--labels", tmp_path / "one.csv") == 0 and "knn" not in toy.status()["numbers"]  # one class
    write_table(tmp_path / "spaced.csv", header, [[*row[:5], "1" + " " * row[5], *row[6:]] for row in rows])
    assert toy.look("--labels", tmp_path / "spaced.csv") == 0 and "knn" not in toy.status()["numbers"]  # still one
    opened = data.open_for

    def narrow(*args, **more):
        source = opened(*args, **more)
        source.rows.columns["spacing_x"] = source.rows.columns["spacing_x"] * 2
        return source

    monkeypatch.setattr(data, "open_for", narrow)
    asked.clear()
    assert toy.look("--labels", tmp_path / "nodules.csv") == 0
    boxes = np.concatenate([r for r in asked if r is not None])
    assert np.allclose(boxes, [[30 - half, 20 - half / 2, 30 + half, 20 + half / 2]] * 6)  # 50 mm along both axes


# pictures


@pytest.mark.slow
def test_day_1_and_day_15_show_the_same_images_in_the_same_colours(toy):
    toy.write()
    assert toy.look("--images", 2, "--seed", 5) == 0
    chosen = json.loads((toy.out / "images.json").read_text())["images"]
    assert len(chosen) == 2 and len({name.split("#")[0] for name in chosen}) == 2  # of different series
    kept = (toy.out / "first.npz").read_bytes()
    numbers = toy.status()["numbers"]
    assert numbers["gram_drift"] < 1e-3 and numbers["colours_kept"] == pytest.approx(1, abs=1e-3)
    random = torch.Generator().manual_seed(0)
    for name, value in toy.state["teacher"].items():
        toy.state["teacher"][name] = value + 0.05 * torch.randn(value.shape, generator=random)
    toy.state["step"] = 600
    assert toy.write().look("--images", 3, "--seed", 6) == 0
    assert json.loads((toy.out / "images.json").read_text())["images"] == chosen
    with np.load(toy.out / "first.npz") as file, np.load(io.BytesIO(kept)) as old:
        assert all(np.array_equal(file[key], old[key]) for key in old)
    numbers = toy.status()["numbers"]
    assert numbers["gram_drift"] > 0.01 and numbers["colours_kept"] < 0.999
    one, two = (Image.open(toy.out / f"step_00000{step}/strip_1.png").width for step in (500, 600))
    assert two > one or two == 480 + 2 * sheet.GAP
    assert "PCA" in (toy.out / "report.html").read_text()
    with pytest.raises(SystemExit):
        m.main(["--ckpt", "x", "--images", "0"])


def test_named_images_are_shown_and_remembered(toy, capsys):
    toy.write()
    assert toy.look("--image", "toy/1.2.8.npy#2", "--image", "toy/1.2.9.npy:3") == 0  # : as it was written once
    assert json.loads((toy.out / "images.json").read_text())["images"] == ["toy/1.2.8.npy#2", "toy/1.2.9.npy#3"]
    assert toy.look("--image", "toy/1.2.8.npy#3") == 3
    assert "remembers toy/1.2.8.npy#2, toy/1.2.9.npy#3; leave --image away" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["rgb", "photo"])
def test_other_encodings_are_looked_at_too(toy, tmp_path, kind):
    if kind == "photo":
        root = make_photos(tmp_path / "photos", 8)
        write_table(root / "labels.csv", ["path", "label"], [[p, p[:2]] for p in data.photo_paths(root)])
        split = {g: "val_select" if k else "train" for k, g in enumerate(data.photo_paths(root))}
        contract = {"version": 1, "groups": split, "index_sha256": data.open_source(root).index_sha256}
        (root / "_splits").mkdir()
        (root / "_splits" / "splits.json").write_text(json.dumps(contract))
    else:
        root = make_ct(tmp_path / "rgb", "rgb-v1", series=12, size=64)
        make_split(root, {f"toy/P{i}": "train" if i < 5 else "val_select" for i in range(11)})
    encoding = data.open_source(root).encoding
    toy.state |= {"encoding": encoding, "eval_view": data.eval_view(encoding, 64), "trained_groups": []}
    assert toy.write().look("--data", root, "--min-rank", 1) == 0
    numbers = toy.status()["numbers"]
    assert ("attention_body" in numbers) == (kind == "rgb") and ("knn" in numbers) == (kind == "photo")


def test_another_model_in_the_same_folder_is_refused(looked, capsys):
    looked.state["eval_view"] = looked.state["eval_view"] | {"size": 32}
    assert looked.write().look() == 3 and "first.npz is of another model or image size" in capsys.readouterr().err


def test_three_directions_are_the_principal_ones_and_colours_follow_them():
    random = np.random.default_rng(0)
    patches = random.normal(size=(500, 6)) * [9, 1, 7, 0.5, 5, 0.1] + 3
    basis = sheet.principal(patches)
    centred = torch.from_numpy(patches - patches.mean(0))
    values, expected = torch.linalg.svd(centred, full_matrices=False)[1:]
    axes = basis.axes / np.linalg.norm(basis.axes, axis=0)
    assert np.abs(np.abs((axes * expected[:3].numpy().T).sum(0)) - 1).max() < 1e-6
    assert (np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0) > 0).all()
    assert basis.shares.sum() == pytest.approx((values[:3].square().sum() / values.square().sum()).item())
    along = basis.along(patches)
    assert along.mean(0) == pytest.approx(0, abs=1e-9) and along.std(0) == pytest.approx(1)
    rows = along[:400].reshape(20, 20, 3)
    drawn = np.asarray(sheet.coloured(rows, np.ones((20, 20)), 20, smooth=False)).astype(int)
    expected = 255 / (1 + np.exp(-2 * rows))
    assert np.abs(drawn - expected).max() < 1 and not np.asarray(sheet.coloured(rows, np.zeros((20, 20)), 20)).any()
    flat = sheet.principal(np.ones((20, 6)))
    assert np.abs(flat.along(np.ones((20, 6)) + 1e-9)).max() < 0.1  # rounding is not made bright


def test_the_body_has_no_holes_and_no_table():
    body, lung = np.zeros((2, 40, 40))
    body[4:30, 6:34] = 1
    body[10:20, 10:16] = lung[10:20, 10:16] = 1
    body[12:14, 12:14] = lung[12:14, 12:14] = 0  # air in the lung
    body[36, :] = 1  # the table
    filled, within = sheet.foreground(np.stack([body, lung]), (8, 12, 60, 68), (0, 0, 80, 80))
    expected = np.zeros((40, 40))
    expected[4:30, 6:34] = 1
    assert (filled == expected).all() and within.sum() == lung.sum() and not within[12:14, 12:14].any()
    body[36, :] = 0
    moved, _ = sheet.foreground(np.stack([body, lung])[:, 4:24, 4:24], (8, 12, 60, 68), (8, 8, 48, 48))
    assert moved.sum() == 20 * 18  # of a view that begins at (8, 8): the box is where it was


def test_the_marked_patch_is_the_most_structured_of_the_lung():
    grey, inside = np.full((96, 96), 0.7, np.float32), np.zeros((2, 96, 96))  # without structure: rounding is none
    random = np.random.default_rng(0)

    def patch(r, c):
        return slice(16 * r, 16 * r + 16), slice(16 * c, 16 * c + 16)

    for (r, c), amount in (((0, 0), 9.0), ((1, 4), 4.0), ((2, 1), 3.0), ((3, 3), 2.0)):
        grey[patch(r, c)] = 50 + amount * random.normal(size=(16, 16))
    assert sheet.marked_patch(grey, np.zeros_like(inside), (6, 6)) == (0, 0)
    inside[0, 16:] = 1
    assert sheet.marked_patch(grey, inside, (6, 6)) == (1, 4)
    inside[1][patch(2, 1)] = 1
    assert sheet.marked_patch(grey, inside, (6, 6)) == (2, 1)
    inside[1, 32:80, 16:80] = 1  # (2, 1) is at its rim
    assert sheet.marked_patch(grey, inside, (6, 6)) == (3, 3)


def test_maps_are_drawn_where_they_belong():
    values = np.zeros((4, 4))
    values[1, 2] = 1
    ramp = sheet.heat(np.linspace(0, 1, 50)[None])[0].astype(int).sum(1)
    assert (np.diff(ramp) > 0).all() and tuple(sheet.heat(values)[1, 2]) == sheet.HEAT[-1]
    base = Image.new("RGB", (64, 64))
    drawn = np.asarray(sheet.attention_over(base, values, 64, smooth=False)).astype(int).sum(2)
    assert (drawn[16:32, 32:48] > 300).all() and drawn.sum() == drawn[16:32, 32:48].sum()
    drawn = np.asarray(sheet.attention_over(base, values, 64)).astype(int).sum(2)  # the same place without an edge
    middle = [(at * drawn).sum() / drawn.sum() for at in np.indices(drawn.shape)]
    assert middle == pytest.approx([23.5, 39.5], abs=0.5) and np.abs(np.diff(drawn, axis=0)).max() < 150
    crossed = np.asarray(sheet.similarity_over(base, np.zeros((4, 4)), (1, 2), 64)).astype(int).sum(2)
    ys, xs = np.nonzero(crossed)
    assert 22 < ys.mean() < 26 and 38 < xs.mean() < 42


# the pulse and the machine


ARGS = dict(steps=1000, extend=0, grace=100, log_every=10, batch_size=8)


def test_the_pulse_reads_a_log_with_restarts_and_halves(tmp_path):
    rows = [line(s) for s in (10, 20, 30, 40)] + [{"step": 20, "event": "resumed from step_00000020.pth"}]
    rows += [line(30, loss=7.0), {"step": 30, "val_loss": 1.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "loss": 5.')
    found = runs.pulse(runs.read_log(path)[0], 3.0, ARGS)
    assert found["last_step"] == 30 and found["loss"] == 7.0 and found["age_s"] == 3.0 and not found["finished"]
    assert found["log_interval_s"] == pytest.approx(10 * 8 / 50) and found["last_event"].startswith("resumed")
    assert runs.pulse([], 3.0, ARGS) == {} and runs.read_log(tmp_path / "none") == ([], 0)
    young = runs.pulse([{"step": 0, "event": "started"}, {"step": 5, "event": "saved"}], 3.0, ARGS)
    assert young == {"age_s": 3.0, "finished": False, "last_event": "saved", "failed_save": None}


def test_trends_in_the_log():
    rows = [line(s, dino=3 - s / 1000, images_s=50 - s / 50, memory_gb=2 + s / 1000) for s in range(10, 1001, 10)]
    found = runs.pulse(rows, 0.0, ARGS)
    assert found["slope_per_1000"] == pytest.approx(-1, abs=1e-6) and found["rise"] == pytest.approx(0)
    assert found["images_s_change"] == pytest.approx(31.9 / 47.7 - 1, abs=0.01)
    assert found["memory_change"] == pytest.approx(2.905 / 2.115 - 1, abs=0.01) and found["finished"]
    early = [line(s, dino=9.0) for s in range(10, 101, 10)] + [line(s, dino=1.0) for s in range(110, 201, 10)]
    assert runs.pulse(early, 0.0, ARGS)["rise"] == 0  # the fall out of warm-up is no rise, and warm-up sets no best
    blip = [line(s, dino=9.0 if s == 500 else 3.0) for s in range(10, 1001, 10)]
    assert runs.pulse(blip, 0.0, ARGS)["rise"] == pytest.approx(0)
    broken = [line(s, dino=math.nan if s % 50 == 0 else 3.0) for s in range(10, 1001, 10)]
    assert runs.pulse(broken, 0.0, ARGS)["rise"] == pytest.approx(0)
    bare = [{"step": s, "loss": 1.0} for s in range(10, 200, 10)]  # what else a line holds is not taken for granted
    found = runs.pulse(bare, 0.0, ARGS)
    assert found["images_s"] is None and found["log_interval_s"] == 0  # then --stall-minutes alone decides
    assert found["images_s_change"] is None


def test_sensors_are_read_in_their_units_and_silent_ones_left_out(tmp_path, monkeypatch):
    chip, zone = tmp_path / "class/hwmon/hwmon3", tmp_path / "class/thermal/thermal_zone0"
    for folder in (chip, zone, chip / "temp4_input", chip.with_name("hwmon4")):
        folder.mkdir(parents=True)  # temp4_input, a folder, cannot be read
    files = {"name": "amdgpu\n", "temp1_input": "61500\n", "temp1_label": "edge\n", "temp1_crit": "100000\n"}
    files |= {"power1_average": "95000000\n", "fan1_input": "1200\n", "temp2_input": "\n", "temp3_input": "N/A\n"}
    for name, text in files.items():
        (chip / name).write_text(text)
    (zone / "temp").write_text("-4000")
    (zone / "type").write_text("acpitz")
    found = machine.sensors(tmp_path)
    assert found == {"hwmon3 amdgpu edge (C)": 61.5, "hwmon3 amdgpu power1 (W)": 95.0, "hwmon3 amdgpu fan1 (rpm)": 1200,
                     "thermal_zone0 acpitz temp (C)": -4.0}  # fmt: skip
    assert machine.hottest(found) == 61.5 and machine.hottest({}) is None and machine.sensors(tmp_path / "none") == {}
    programs = tmp_path / "bin"
    programs.mkdir()
    rocm = {"card0": {"Temperature (Sensor edge) (C)": "44.0", "Average Graphics Package Power (W)": "N/A"}}
    for name, text in (("nvidia-smi", "71, 300.5, [N/A]\n72, 301.0, 40"), ("rocm-smi", json.dumps(rocm))):
        (programs / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert machine.card_sensors() == {
        "nvidia 0 temperature (C)": 71.0, "nvidia 0 power (W)": 300.5, "nvidia 1 temperature (C)": 72.0,
        "nvidia 1 power (W)": 301.0, "nvidia 1 fan (%)": 40.0, "card0 Temperature (Sensor edge) (C)": 44.0,
    }  # fmt: skip
    (programs / "rocm-smi").write_text("#!/bin/sh\necho ERROR; exit 1\n")
    assert "card0 Temperature (Sensor edge) (C)" not in machine.card_sensors()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho '[N/A], [N/A], [N/A]'\n")  # a card that tells nothing
    found = machine.describe(torch.device("cpu"))["temperatures_c"]
    assert all(key.endswith("(C)") and isinstance(value, float) for key, value in found.items())


def test_metrics_prom_is_what_prometheus_parses(toy, undrawn):
    hot(toy)
    toy.folder = toy.folder.with_name('li"dc')
    toy.out = toy.folder / "monitor"
    toy.write().look("--prom", toy.folder / "x.prom")
    text = (toy.folder / "x.prom").read_text()
    sample = re.compile(r'[a-zA-Z_:][\w:]*\{(\w+="[^"\\\n]*",?)+\} (-?\d+(\.\d+)?(e[+-]\d+)?|nan)')
    values, typed = [row for row in text.splitlines() if row[0] != "#"], re.findall(r"# TYPE (\w+) gauge", text)
    assert all(sample.fullmatch(row) for row in values), [row for row in values if not sample.fullmatch(row)]
    assert len(set(typed)) == len(typed) and {row.split("{")[0] for row in values} == set(typed)
    assert len({row.rsplit(" ", 1)[0] for row in values}) == len(values) and text.endswith("\n")
    assert 'dinox_sensor{run="li_dc",sensor="hwmon0 amdgpu temp1 (C)"} 99' in text


@pytest.mark.slow
@pytest.mark.skipif(not browser(), reason="no headless Chromium here")
def test_the_report_opens_in_a_browser_with_every_picture(toy, tmp_path):
    toy.write().look()
    toy.state["step"] = 600
    toy.write().look()
    page = (toy.out / "report.html").read_text()
    pictures = [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    files = [toy.out / f"step_00000{name}.png" for name in ("600/strip_1", "600/sheet", "500/sheet")]
    assert pictures == [path.read_bytes() for path in files]
    pixels = screenshot(toy.out / "report.html", tmp_path / "shot.png", 5000)
    dark = (np.abs(pixels - [20, 23, 26]).sum(2) < 12).sum()  # the ground of our sheets
    assert dark > 100_000


# from cron


def flags_of(toy):
    return ["--ckpt", toy.folder / "last.pth", "--threads", "1", "--images", "1", "--sysfs", toy.sysfs]


@pytest.mark.slow
def test_from_cron_with_an_empty_environment(toy):
    toy.write()
    bare = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": "/usr/bin:/bin"})
    process = subprocess.Popen([sys.executable, "monitor.py", *flags_of(toy)], cwd=ROOT, text=True, **bare)
    nice = None
    while process.poll() is None:
        found = re.search(r"\) \S (?:\S+ ){15}(\S+) ", Path(f"/proc/{process.pid}/stat").read_text())
        nice = found[1] if found and found[1] != "0" else nice
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 0 and out.startswith("lidc step 500: healthy"), (out, err)
    assert err == "" and nice == "19"


def test_a_bug_is_code_3_not_a_warning():
    assert m.unforeseen is cli.unforeseen
    code = "import sys; from tools.lib import cli; sys.excepthook = cli.unforeseen; 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and "ZeroDivisionError" in done.stderr


def test_a_bug_does_not_leave_an_older_verdict_standing(looked, monkeypatch):
    assert looked.status()["verdict"] == "healthy"
    monkeypatch.setattr(m, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        looked.look()
    assert looked.status()["verdict"] == "could not look"


@pytest.mark.slow
def test_two_monitors_at_once(toy, started, tmp_path):
    toy.write()
    logs = [tmp_path / f"log{k}" for k in range(2)]
    both = [started([ROOT / "monitor.py", *flags_of(toy)], log) for log in logs]
    for process in both:
        process.join()
    said, codes = [log.read_text() for log in logs], sorted(process.exitcode for process in both)
    assert codes in ([0, 3], [0, 0]), said  # [0, 0]: one after the other
    if codes == [0, 3]:
        assert any("is in use by process" in text for text in said)
    assert toy.status()["verdict"] == "healthy"
    history, skipped = read_lines(toy.out / "history.jsonl")
    assert len(history) == 1 and skipped == 0  # one point per step


# flags with which a phantom run leaves ln K within 40 updates (17 s on one core)
LEARNS = (
    "--arch vit_test --batch-size 32 --global-size 64 --local-size 32 --local-crops 2 --prototypes 128 "
    "--head-hidden 128 --head-bottleneck 64 --layerscale 1 --log-every 10 --eval-every 0 --lr 2e-3 --ema 0.98 1 "
    "--gram-weight 0 --w-koleo 0.02 --teacher-temp 0.01 0.02 --rope-rescale 1 --steps 200 --workers 0 --device cpu "
    "--keep-last 99"
).split()


def assert_no_alarm(run, out):
    """A look at each checkpoint; the first look is the oldest, as it would be in life."""
    for path in sorted(run.glob("step_*.pth")):
        assert m.main(["--ckpt", str(path), "--out", str(out), "--threads", "1", "--sysfs", str(out.parent)]) == 0, path
    words = [row["verdict"] for row in read_lines(out / "history.jsonl")[0]]
    assert set(words) <= {"healthy", "warming up"} and words[-3:] == ["healthy"] * 3
    return len(words)


@pytest.mark.slow
def test_a_run_that_learns_raises_no_false_alarm(healthy_run, tmp_path):
    assert assert_no_alarm(healthy_run, tmp_path / "monitor") == 5


@pytest.mark.proof
def test_twenty_looks_at_a_run_that_learns_raise_no_false_alarm(tmp_path):
    commands = [
        ["make_phantom.py", "--out", "raw", "--patients", "12", "--size", "128", "--workers", "1"],
        ["preprocess_dicom.py", "--raw", "raw", "--out", "ct", "--dataset", "p", "--format", "hu16", "--workers", "1"],
        ["make_splits.py", "--data", "ct", "--ratios", "train=0.6,val_select=0.3,val_test=0.1"],
    ]
    for name, *more in commands:
        done = subprocess.run([sys.executable, ROOT / "tools" / name, *more], cwd=tmp_path, capture_output=True)
        assert done.returncode <= (name == "preprocess_dicom.py"), done.stderr  # 1: scouts were left out
    out = str(tmp_path / "run")
    assert t.main(["--data", str(tmp_path / "ct"), "--out", out, *LEARNS, "--save-every", "10"]) == 0
    assert assert_no_alarm(tmp_path / "run", tmp_path / "run" / "monitor") == 20


def test_the_report_names_the_command_after_a_spike_and_after_a_skip():
    args = {"steps": 100, "extend": 0, "grace": 0, "log_every": 10, "batch_size": 8}
    calm = [{"step": 10 * k, "loss": 5.0, "dino": 3.0, "ibot": 2.0, "images_s": 9.0} for k in range(1, 7)]
    spike = {**calm[0], "step": 70, "loss": 9.0}
    skip = {"step": 63, "event": "skipped: loss or gradient is not finite; see tools/inspect_step.py --why 63"}
    assert runs.pulse(calm, 0, args)["odd_step"] is None
    assert runs.pulse([*calm, skip], 0, args)["odd_step"] == 63
    found = runs.pulse([*calm, skip, spike], 0, args)
    assert (found["odd_step"], found["spikes"], found["skipped"]) == (70, 1, 1)


def test_the_note_after_a_skip_is_a_command(tmp_path):
    lines = [{"step": 10, "loss": 5.0}, {"step": 13, "event": "skipped: loss or gradient is not finite"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args, notes = {"steps": 100, "extend": 0, "grace": 0, "log_every": 10, "batch_size": 8}, []
    m.take_pulse(tmp_path, {"args": args}, 1000, notes)
    assert f"python tools/inspect_step.py --run {tmp_path} --why 13 says why" in notes[0]
