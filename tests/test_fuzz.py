"""Damaged files of every format that a program reads: refused in one sentence, harmless, or recorded; nothing else.

Mutants are drawn from a seed. What can happen to one, and is counted:
    refused    one line of ours (exit code 2, or the monitor's 2 and 3)
    as before  the result of the whole file: the change did not matter, or was skipped and said
    changed    another result, of a text that is as whole as before (a digit or a letter): no reader can see that
    pixels     another result after a change inside pixel data: tools/write_manifest.py --verify sees it
    broken     a traceback, a hang, or a result without a word from a file that is not whole: must be 0
(DICOM files have a harness of their own in tests/test_preprocess.py.)
"""

import collections
import contextlib
import io
import json
import re
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_ct, make_photos, make_split

import checkpoint
import data
import monitor
import train_ssl
from model import load_backbone, read_facts
from tools import inspect_step, make_splits, release
from tools.lib import samples
from tools.lib.cli import is_ours

FLAGS = (
    "--arch vit_test --batch-size 8 --global-size 32 --local-size 16 --local-crops 2 --prototypes 32 --head-hidden 32 "
    "--head-bottleneck 16 --workers 0 --log-every 1 --save-every 2 --eval-every 2 --steps 4 --koleo-group 4 "
    "--device cpu --gram-weight 0"
).split()
ODD_VALUES = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    float("nan"),
    "",
    "x\x1b[31m",
    "../../etc",
    [],
    {},
    [[[]]],
    "y" * 10_000,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, labels, photographs, a run with looks, a release: everything that programs read back."""
    root = tmp_path_factory.mktemp("world")
    ct = make_ct(root / "ct", series=10)
    make_split(ct, {f"toy/P{i}": ("train", "train", "val_select", "val_test")[i % 4] for i in range(10)})
    sha = data.open_source(ct).index_sha256
    (ct / "_splits" / "duplicates.json").write_text(json.dumps({"version": 1, "index_sha256": sha, "groups": []}))
    (ct / "_labels").mkdir()
    rows = [f"n{i},toy/1.2.{i}.npy,2,20,20,{i % 2},toy/P{i - 1},6.0,7.0" for i in (1, 2, 3, 4)]
    (ct / "_labels" / "nodules.csv").write_text("\n".join([",".join(data.NODULE), *rows]) + "\n")
    make_ct(root / "rgb", "rgb-v1", series=2)
    make_photos(root / "photos")
    (root / "photos" / "labels.csv").write_text("path,label,group\nc0/0.png,cat,a\nc0/2.png,dog,b\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert train_ssl.main(["--data", str(ct), "--out", str(root / "run"), *FLAGS]) == 0
        look(root)
        out = ["--ckpt", str(root / "run" / "last.pth"), "--out", str(root / "release")]
        assert release.main(out) == 0
    return root


def look(root):
    """One look of the monitor -> its verdict, whatever that is."""
    flags = ["--ckpt", str(root / "run" / "last.pth"), "--slices", "8", "--images", "1", "--device", "cpu"]
    code = monitor.main(flags)
    status = json.loads((root / "run" / "monitor" / "status.json").read_text())
    return code, status["numbers"].get("effective_rank")


def outputs(vit):
    torch.manual_seed(0)
    with torch.no_grad():
        return vit(torch.randn(1, 3, 32, 32)).cls.sum().item()


def splits_again(root):
    copy = root / "again"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "ct", copy)
    (copy / "_splits" / "splits.json").unlink()
    make_splits.main(["--data", str(copy), "--ratios", "train=0.5,val_test=0.5"])
    return json.loads((copy / "_splits" / "splits.json").read_text())["groups"]


def slices(root, name):
    source = data.open_source(root / name)
    return [source.read(i).sum().item() for i in range(len(source))]


def table(root):
    source = data.open_source(root / "ct")
    found = samples.read_table(root / "ct" / "_labels" / "nodules.csv", source)
    return [str(part) for part in found]


# format: (file, what a program makes of it, kind of file)
FORMATS = {
    "index.csv": ("ct/_index/index.csv", lambda r: data.open_for(r / "ct", "fit").groups, "text"),
    "splits.json": ("ct/_splits/splits.json", lambda r: data.open_for(r / "ct", "fit").groups, "json"),
    "duplicates.json": ("ct/_splits/duplicates.json",
                        lambda r: (data.open_for(r / "ct", "fit").groups, splits_again(r)), "json"),
    "nodules.csv": ("ct/_labels/nodules.csv", table, "text"),
    "labels.csv": ("photos/labels.csv", lambda r: [str(row) for row in data.open_source(r / "photos").rows], "text"),
    "volume": ("ct/toy/1.2.0.npy", lambda r: slices(r, "ct"), "pixels"),
    "slice": ("rgb/toy/1.2.0/0001.png", lambda r: slices(r, "rgb"), "pixels"),
    "photograph": ("photos/c1/1.JPG", lambda r: slices(r, "photos"), "pixels"),
    "checkpoint": ("run/last.pth", lambda r: (outputs(load_backbone(r / "run" / "last.pth", quiet=True)),
                   str(read_facts(r / "run" / "last.pth"))), "zip"),
    "checkpoint, all of it": ("run/last.pth", lambda r: len(str(checkpoint.load(r / "run" / "last.pth"))), "zip"),
    "run config.json": ("run/config.json", lambda r: inspect_step.main(["--run", str(r / "run"), "--step", "2",
                        "--images", "1"]), "json"),
    "monitor, config.json": ("run/config.json", look, "json"),
    "metrics.jsonl": ("run/metrics.jsonl", look, "lines"),
    "history.jsonl": ("run/monitor/history.jsonl", look, "lines"),
    "first.npz": ("run/monitor/first.npz", look, "zip"),
    "images.json": ("run/monitor/images.json", look, "json"),
    "release config.json": ("release/config.json", lambda r: outputs(load_backbone(r / "release", quiet=True)), "json"),
    "release weights": ("release/model.safetensors",
                        lambda r: outputs(load_backbone(r / "release", quiet=True)), "sums"),
    "provenance.json": ("release/provenance.json", lambda r: str(read_facts(r / "release")), "json"),
}  # fmt: skip


def leaves(value, path=()):
    """Paths to every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:20]:
        yield from leaves(inner, (*path, key))


def swapped(value, random):
    """A JSON value with one value inside replaced by an odd one, or removed -> (text, what was done)."""
    value = json.loads(json.dumps(value))
    paths = list(leaves(value))
    path, odd = paths[random.integers(len(paths))], ODD_VALUES[random.integers(len(ODD_VALUES))]
    if not path:
        return json.dumps(odd), f"all of it is {str(odd)[:20]!r}"
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if random.random() < 0.3:
        del inner[path[-1]]
        return json.dumps(value), f"{path} removed"
    inner[path[-1]] = odd
    return json.dumps(value), f"{path} is {str(odd)[:20]!r}"


def rezipped(raw, random):
    """Members deflated, doubled, renamed, shortened or marked as a folder."""
    source, target, how = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO(), int(random.integers(5))
    chosen = int(random.integers(len(source.infolist())))
    with zipfile.ZipFile(target, "w") as archive:
        for i, item in enumerate(source.infolist()):
            content = source.read(item)
            mine = i == chosen
            name = item.filename + ("x" if mine and how == 2 else "")
            info = zipfile.ZipInfo(name, item.date_time)
            info.compress_type = zipfile.ZIP_DEFLATED if mine and how == 0 else zipfile.ZIP_STORED
            info.external_attr = 0x10 if mine and how == 4 else item.external_attr
            archive.writestr(info, content[: len(content) // 2] if mine and how == 3 else content)
            if mine and how == 1:
                archive.writestr(zipfile.ZipInfo(name, item.date_time), content)
    return target.getvalue(), ("deflated", "doubled", "renamed", "shortened", "a folder")[how]


def mutant(raw, kind, random):
    """-> (bytes, what was done, whether what is left may pass for a whole file)."""
    ways = ["flip", "cut", "empty", "rubbish", "insert"]
    more = {"json": ["swap"] * 6 + ["bom"], "lines": ["swap line"] * 4, "text": ["cell"] * 4, "zip": ["rezip"] * 3}
    ways += more.get(kind, [])
    way = ways[random.integers(len(ways))]
    at = int(random.integers(len(raw)))
    if way == "cut":
        return raw[:at], f"cut at {at}", kind in ("text", "lines")
    if way == "empty":
        return b"", way, kind == "lines"
    if way == "rubbish":
        return random.bytes(200), way, kind == "lines"
    if way == "insert":
        return raw[:at] + random.bytes(3) + raw[at:], f"3 bytes inserted at {at}", kind in ("text", "lines")
    if way == "bom":
        return b"\xef\xbb\xbf" + raw, way, True
    if way == "swap":
        text, what = swapped(json.loads(raw), random)
        return text.encode(), what, True
    if way == "swap line":
        lines = raw.splitlines()
        i = int(random.integers(len(lines)))
        text, what = swapped(json.loads(lines[i]), random)
        return b"\n".join([*lines[:i], text.encode(), *lines[i + 1 :]]) + b"\n", f"line {i}: {what}", True
    if way == "cell":
        lines = [line.split(",") for line in raw.decode().splitlines()]
        i = int(random.integers(len(lines)))
        j = int(random.integers(len(lines[i])))
        lines[i][j] = ["", "nan", "-1", "1e308", "x\x1b", "../x", "=1+1", "9" * 30, "y" * 1000][random.integers(9)]
        return "\n".join(map(",".join, lines)).encode() + b"\n", f"line {i + 1}, cell {j}: {lines[i][j][:10]!r}", True
    if way == "rezip":
        with contextlib.suppress(zipfile.BadZipFile):
            return *rezipped(raw, random), True
    flipped = bytearray(raw)
    flipped[at] ^= 1 << int(random.integers(8))
    return bytes(flipped), f"bit flipped in byte {at}", True


def outcome(root, action, truth, limit_s=60):
    """(name of what happened, its words)."""

    def late(*_):
        raise TimeoutError(f"no answer within {limit_s} s")

    out = io.StringIO()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_s)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            result = action(root)
    except (ValueError, OSError) as error:
        if isinstance(error, TimeoutError) or isinstance(error, ValueError) and not is_ours(error):
            return "broken", f"{type(error).__name__}: {str(error)[:200]}"
        return ("refused" if len(str(error)) < 2000 else "broken"), str(error)[:300]
    except BaseException as error:  # noqa: BLE001 - whatever escapes is what this test looks for
        return "broken", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    printed = out.getvalue()
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", printed):
        return "broken", f"a control character reached the terminal: {printed[:200]!r}"
    if isinstance(result, tuple) and result and result[0] == 3:
        return "refused", printed[-200:]
    return ("as before" if result == truth else "changed"), printed[-200:]


def survive(root, count, seed):
    """Mutants dealt over the formats -> counts {format: Counter}, and the broken ones."""
    random, counts, broken = np.random.default_rng(seed), collections.defaultdict(collections.Counter), []
    truths = {}
    for number in range(count):
        name = list(FORMATS)[number % len(FORMATS)]
        file, action, kind = FORMATS[name]
        path = root / file
        raw = path.read_bytes()
        history = {p: p.read_bytes() for p in (root / "run" / "monitor").glob("*.*") if p.is_file()}
        if name not in truths:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                truths[name] = action(root)
            for p, content in history.items():
                p.write_bytes(content)
        content, what, whole = mutant(raw, kind, random)
        path.unlink()  # last.pth has a second name, which stays whole
        path.write_bytes(content)
        result, words = outcome(root, action, truths[name])
        if result == "changed" and kind == "pixels":
            result = "pixels"
        if result == "changed" and (kind in ("zip", "sums") or not whole):
            result = "broken"
        counts[name][result] += 1
        if result == "broken":
            broken.append(f"{name}, mutant {number}: {what} -> {words}")
        for p, content in history.items():
            p.write_bytes(content)
        path.write_bytes(raw)
    return counts, broken


def report(counts):
    for name, found in counts.items():
        print(f"{name:24} " + ", ".join(f"{n} {what}" for what, n in sorted(found.items())))
    total = sum(counts.values(), collections.Counter())
    print(f"{'in all':24} " + ", ".join(f"{n} {what}" for what, n in sorted(total.items())))


@pytest.mark.slow
def test_60_damaged_files_are_refused_or_harmless(world):
    counts, broken = survive(world, 60, 0)
    report(counts)
    assert not broken, "\n".join(broken)


@pytest.mark.proof
def test_1000_damaged_files_are_refused_or_harmless(world):
    counts, broken = survive(world, 1000, 1)
    report(counts)
    assert not broken, "\n".join(broken)


def test_the_harness_notices_what_it_looks_for(world, monkeypatch):
    """A traceback, a hang, a result without a word: each counts as broken."""

    def slow(_):
        while True:
            pass

    assert outcome(world, lambda r: {}["x"], None)[0] == "broken"
    assert outcome(world, slow, None, limit_s=1)[0] == "broken"
    assert outcome(world, lambda r: print("\x1b]0;x\x07"), None)[0] == "broken"
    assert outcome(world, lambda r: np.zeros(3).reshape(2, 2), None)[0] == "broken"
    assert outcome(world, lambda r: data.open_source(r / "none"), None)[0] == "refused"
    assert outcome(world, lambda r: 1, 1)[0] == "as before" and outcome(world, lambda r: 2, 1)[0] == "changed"
    image = Image.open(world / "rgb" / "toy" / "1.2.0" / "0001.png")
    assert image.size == (48, 48)
