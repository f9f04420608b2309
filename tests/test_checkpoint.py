"""checkpoint.py: nothing that happens to the process, the disk or the bytes loses a run."""

import errno
import itertools
import math
import os
import pickle
import random
import re
import resource
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import Saver, latest, load, point_last, rotate, save, step_path, sweep, verify

ROOT = Path(__file__).resolve().parent.parent


def same(a, b):
    """Equal in type, in every bit of every number, and in the order of keys."""
    if isinstance(a, torch.Tensor):
        raw = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return type(b) is float and struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and a == b


def small(step=1):
    """Distinct values everywhere, so that no wrong byte is right by chance."""
    return {"step": step, "w": torch.arange(1.0, 7.0), "deep": {3: [torch.full((2,), 1.5).bfloat16(), "x", None, 0.1]}}


def fail(code):
    def function(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return function


# what goes in comes out


def trained():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("way", ["save", "Saver"])
def test_every_bit_comes_back(tmp_path, way):
    net, optimizer = trained()
    nan_payload = torch.tensor([0x7FC1, 0x0001, 0x8000 - 0x10000], dtype=torch.int16).view(torch.bfloat16)
    dtypes = (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
    state = {
        "step": 5,
        "tensors": [torch.arange(12).reshape(3, 4).t().to(dtype) for dtype in dtypes]
        + [nan_payload, torch.empty(0, 3), torch.tensor(2.5), torch.arange(10.0)[::3]],
        "floats": [math.nan, math.inf, -0.0, 5e-324, 0.1 + 0.2],
        "ints": (0, -1, 2**62, -(2**70), True, False),
        "text": {"µ/ß": "line\nline", "": None, "long": "x" * 70000},
        "nested": {1: {2: [(), [], {}, (None, [(1,)])]}},
        "student": net.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    path = step_path(tmp_path, 5)
    if way == "save":
        save(path, state)
    else:
        saver = Saver(tmp_path, keep_last=1, keep_every=0)
        saver.save(5, state)
        saver.wait()
        assert saver.error is None
    back = load(path)
    assert (back.pop("format"), back.pop("version")) == ("dinox", 1)
    assert same({**state, "student": dict(state["student"])}, {**back, "student": dict(back["student"])})
    assert set(back["optimizer"]["state"]) == {0, 1}

    # and training goes on from it to the same bits
    net2, optimizer2 = trained()
    net2.load_state_dict(back["student"])
    optimizer2.load_state_dict(back["optimizer"])
    for n, o in ((net, optimizer), (net2, optimizer2)):
        o.zero_grad()
        n(torch.ones(1, 3)).sum().backward()
        o.step()
    assert same(net.state_dict(), net2.state_dict()) and same(optimizer.state_dict(), optimizer2.state_dict())


def test_equal_states_give_equal_bytes_whatever_the_name(tmp_path):
    paths = [save(tmp_path / name, small()) for name in ("a.pth", "much_longer_name.pth")]
    saver = Saver(tmp_path, 1, 0)
    saver.save(1, small())
    saver.wait()
    a, b, c = (path.read_bytes() for path in (*paths, step_path(tmp_path, 1)))
    assert a == b == c


def test_the_callers_dict_is_not_changed(tmp_path):
    state = small()
    save(tmp_path / "a.pth", state)
    assert "format" not in state


# bytes that changed


def notice(path):
    try:
        verify(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.proof)])
def test_a_file_cut_at_any_length_is_noticed(tmp_path, step):
    path = save(tmp_path / "a.pth", small())
    content = path.read_bytes()
    for length in {*range(0, len(content), step), *range(len(content) - 100, len(content))}:
        path.write_bytes(content[:length])
        assert notice(path), length
    path.write_bytes(content)
    assert notice(path) is None


def flip_bits(path, offsets):
    """{(offset, bit)} that verify() lets pass; asserts that each of those loads to the same bits."""
    whole, content = load(path), path.read_bytes()
    passed = set()
    for offset, bit in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << bit
        path.write_bytes(damaged)
        if not notice(path):
            assert same(load(path), whole), f"bit {bit} of byte {offset} changes what is loaded, unnoticed"
            passed.add((offset, bit))
    path.write_bytes(content)
    return passed


def members(path):
    """Byte ranges that hold the pickle and the tensors, from the local headers (APPNOTE.TXT 4.3.7)."""
    content = path.read_bytes()
    for item in zipfile.ZipFile(path).infolist():
        name, extra = struct.unpack_from("<HH", content, item.header_offset + 26)
        start = item.header_offset + 30 + name + extra
        yield from range(start, start + item.file_size)


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_or_cannot_matter(tmp_path):
    path = save(tmp_path / "a.pth", small())
    content, covered = path.read_bytes(), set(members(path))
    assert content.index(struct.pack("<6f", *range(1, 7))) in covered  # the tensor lies where we think it does
    rng = random.Random(0)
    passed = flip_bits(path, [(offset, rng.randrange(8)) for offset in range(len(content))])
    # what passes is padding between members (torch aligns them to 64 bytes), time stamps and repeated header fields
    assert not {offset for offset, _ in passed} & covered
    assert len(covered) > 350 and len(passed) < 0.55 * len(content)


@pytest.mark.proof
def test_every_single_bit(tmp_path):
    path = save(tmp_path / "a.pth", small())
    passed = flip_bits(path, itertools.product(range(path.stat().st_size), range(8)))
    assert not {offset for offset, _ in passed} & set(members(path))


def test_a_member_marked_as_a_folder_is_noticed(tmp_path):
    # one bit of the directory, under no CRC; torch 2.13 loads such a tensor as uninitialised memory
    path = save(tmp_path / "a.pth", small())
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    assert zipfile.ZipFile(path).testzip() is None
    assert "archive/data/0" in notice(path)


# files of others


class Attack:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def rezip(path, **replaced):
    """The archive at `path` with members replaced by the given bytes, every CRC right."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, replaced.get(Path(name).stem, data))


def strangers(folder):
    victim = str(folder / "victim")
    yield "the file is empty", b""
    yield "text", b"hello\n" * 100
    yield "bare pickle", pickle.dumps(Attack(victim))
    path = folder / "made"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    yield "zip", path.read_bytes()
    torch.save({"format": "dinox", "version": 1, "w": Attack(victim)}, path)
    yield "needs code to load", path.read_bytes()
    torch.save({"format": "dinox", "version": 1, "w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    yield "legacy", path.read_bytes()
    torch.save([torch.ones(2)], path)
    yield "expected 'dinox'", path.read_bytes()
    torch.save({"format": "other", "version": 1}, path)
    yield "format 'other', expected 'dinox'", path.read_bytes()
    torch.save({"format": "dinox", "version": 2}, path)
    yield "version 2, this code reads version 1", path.read_bytes()
    torch.save({"format": "dinox"}, path)
    yield "version None, this code reads version 1", path.read_bytes()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    yield "TorchScript", path.read_bytes()
    rng = random.Random(0)
    rubbish = [rng.randbytes(rng.randrange(40)) for _ in range(100)]
    rubbish += [b"\x80\x02J\x01", b"\x80\x02ccollections\nOrderedDict\nK\x01R."]  # a cut number, a call without a tuple
    for data in rubbish:
        save(path, small())
        rezip(path, data=data)
        yield "rubbish pickle", path.read_bytes()


def test_a_strangers_file_is_refused_in_one_line_and_runs_nothing(tmp_path):
    path = tmp_path / "stranger.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: TorchScript is deprecated
        for what, content in strangers(tmp_path):
            path.write_bytes(content)
            with pytest.raises(ValueError) as caught:
                load(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and "\n" not in message and "older step_" in message, what
            assert len(message) < len(str(path)) + 250 and "weights_only` set" not in message, message
            assert what in message or " " not in what or what in ("bare pickle", "rubbish pickle"), message
    assert not (tmp_path / "victim").exists()
    assert latest(tmp_path) is None


def rezipped(path, change):
    """The archive at `path` written again by zipfile; `change(name, data)` gives other (ZipInfo, data) pairs."""
    with zipfile.ZipFile(path) as archive:
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            for item, other in change(name, data):
                archive.writestr(item, other)


def member(name, method=zipfile.ZIP_STORED, attributes=0o100600 << 16):
    item = zipfile.ZipInfo(name)
    item.compress_type, item.external_attr = method, attributes
    return item


def overlapped(path):
    """Adds a member inside the bytes of another one, as zip bombs that no limit of a ratio notices do."""
    inner, data = member("archive/inner"), bytes(50_000)
    inner.file_size = inner.compress_size = len(data)
    inner.CRC = zlib.crc32(data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member("archive/outer"), inner.FileHeader() + data)
        outer = archive.infolist()[-1]
        inner.header_offset = outer.header_offset + len(outer.FileHeader())
        archive.filelist.append(inner)
        archive.NameToInfo[inner.filename] = inner


def swapped(name):
    other = {"data/0": "data/1", "data/1": "data/0"}
    return name[:-6] + other.get(name[-6:], name[-6:])


def calling(name, data, code):
    """The first 1 in the pickle becomes a call."""
    return data.replace(b"K\x01", code, 1) if name.endswith("data.pkl") else data


ODD_ZIPS = {  # what is not from torch.save, though every CRC is right
    "deflated": lambda n, d: [(member(n, zipfile.ZIP_DEFLATED * n.endswith("data/0")), d)],
    "bzip2": lambda n, d: [(member(n, zipfile.ZIP_BZIP2), d)],
    "shortened": lambda n, d: [(member(n), d[:8] if n.endswith("data/0") else d)],
    "lengthened": lambda n, d: [(member(n), d + d if n.endswith("data/0") else d)],
    "swapped": lambda n, d: [(member(swapped(n)), d)],  # a tensor of 24 bytes and one of 4
    "link": lambda n, d: [(member(n, attributes=0o120777 << 16 if n.endswith("data/0") else 0), d)],
    "folder": lambda n, d: [(member(n, attributes=0x10 * n.endswith("data/0")), d)],
    "two of one name": lambda n, d: (
        [(member(n.replace("data/0", "DATA/0")), d[::-1])][: n.endswith("data/0")] + [(member(n), d)]
    ),
    "bytearray": lambda n, d: [(member(n), calling(n, d, b"c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R"))],
    "memory of no member": lambda n, d: [(member(n), calling(n, d, b"ctorch\nFloatTensor\nM\0\x10\x85R"))],
}


@pytest.mark.parametrize("odd", ODD_ZIPS)
def test_a_zip_that_torch_save_would_not_write_is_refused(tmp_path, odd):
    """Of most of these torch.load returns numbers, and other ones than were saved."""
    path = save(tmp_path / "a.pth", small())
    rezipped(path, lambda name, data: [(member(name), data)])
    assert same(load(path)["w"], small()["w"])  # zipfile's own way to write is no reason
    rezipped(path, ODD_ZIPS[odd])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(ValueError, match="older step_") as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: not a whole and safe")
    assert latest(tmp_path) is None


def test_members_that_overlap_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", small())
    overlapped(path)
    assert "overlap" in notice(path).lower()  # newer zipfile modules see it themselves


@pytest.mark.parametrize("before, after", [(b"#!/bin/sh\n", b""), (b"", b"comment")])
def test_bytes_around_the_zip_are_refused(tmp_path, before, after):
    path = save(tmp_path / "a.pth", small())
    content = bytearray(path.read_bytes())
    content[-2:] = len(after).to_bytes(2, "little")  # a zip may end with a comment of that length
    path.write_bytes(before + content + after)
    assert zipfile.is_zipfile(path) and notice(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path, zeros = save(tmp_path / "a.pth", small()), bytes(50_000_000)
    rezipped(path, lambda n, d: [(member(n, zipfile.ZIP_DEFLATED), zeros if n.endswith("data/0") else d)])
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: pytest.fail("unpacked"))
    assert "compressed" in notice(path)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    for name in ("student", "teacher", "centers"):
        with pytest.raises(ValueError, match=f"field {name} is .*expected a dict of tensors"):
            save(path, {name: {"w": torch.ones(1).expand(10**12)}})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="field centers"):
        save(path, {"centers": torch.ones(1).expand(10**8)})  # as a sequence it would be 10^8 tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KB
    assert not os.listdir(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, capfd):
    for path in (tmp_path / "pipe.pth", step_path(tmp_path, 1), tmp_path / "last.pth"):
        os.mkfifo(path)
        with pytest.raises(ValueError, match="not a regular file.*older step_") as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")
    assert latest(tmp_path) is None and capfd.readouterr().err.count("a folder, pipe or device") == 2
    with pytest.raises(ValueError, match="not a regular file"):
        load("/dev/zero")
    with pytest.raises(ValueError, match="not a regular file"):
        load(tmp_path)


# what the fields hold

ARCH = {"name": "vit_test", "overrides": {"layerscale": 1.0, "depth": 3, "gated": True}}
RIGHT = {
    "step": 5, "images": 2**40, "gram_refreshes": 0, "args": {"lr": 1e-3, "sizes": None}, "arch": ARCH,
    "encoding": "hu16-v1", "eval_view": {"size": 224, "window": [40, 400.0]}, "trained_groups": ["lidc/1", "lidc/2"],
    "index_sha256": "1" * 64, "split_sha256": None, "weights_sha256": None,
    "student": {"w": torch.ones(2)}, "teacher": {"w": torch.ones(2)},
    "gram": None, "centers": {}, "optimizer": {"w": {"step": torch.tensor(1.0)}},
}  # fmt: skip
BOMB = [0]
for _ in range(60):  # a few bytes of a file; written out, more than any disk
    BOMB = [BOMB, BOMB]
WRONG = {
    "step": ["5", -1, 1.0, None, True, 10**30, torch.tensor(5), [5]],
    "images": ["1", 2.5],
    "gram_refreshes": [None, "none"],
    "args": [["lr", 1], None, "lr", {1: 2}, {"lr": {}}, {"lr": [[1]]}, {"lr": BOMB}],
    "arch": [None, "vit_test", {}, {"overrides": {}}, {"name": "vit_test"}, {"name": 3, "overrides": {}}]
    + [{"name": "vit_test", "overrides": o} for o in ([], None, {"depth": 10**9}, {"dim": 10**12}, {"dim": "64"})]
    + [{"name": "vit_test", "overrides": {"layerscale": math.nan}}, {"name": "vit_test", "overrides": {7: 7}}]
    + [{"name": "vit_test", "overrides": {}, "adapters": a} for a in (None, [4], {1: 2}, {"blocks": BOMB})],
    "encoding": [None, 3, ["hu16-v1"]],
    "eval_view": [None, 224, {}, {"size": 224}, {"size": "224", "window": None}, {"size": 0, "window": None}]
    + [{"size": 10**9, "window": None}, {"size": 224, "window": "40"}, {"size": 224, "window": [40]}],
    "trained_groups": ["lidc/1", 7, {"lidc/1": 1}, ["lidc/1", 7], torch.ones(2)],
    "index_sha256": [7, ["1"]],
    "split_sha256": [False],
    "weights_sha256": [7],
    "student": [None, [], "w", {"w": 1}, {"w": [torch.ones(2)]}, {1: torch.ones(2)}, torch.ones(2)]
    + [{"w": torch.ones(2).to_sparse()}, {"w": torch.empty(2, device="meta")}],
    "teacher": [None, 3, {"w": None}],
    "gram": [7, "none", {"w": 1}],
    "centers": [None, [1.0]],
    "optimizer": [None, [], {1: {}}],
}


@pytest.mark.parametrize("field", RIGHT)
def test_a_field_of_a_wrong_type_is_named_with_its_value(tmp_path, field):
    path = save(tmp_path / "right.pth", RIGHT)
    assert load(path, fields=RIGHT).keys() == {"format", "version", *RIGHT}
    for wrong in WRONG[field]:
        torch.save({"format": "dinox", "version": 1, **RIGHT, field: wrong}, path)  # as another program would
        with pytest.raises(ValueError, match=f"field {field} is .*, expected .*; use an older step_") as caught:
            load(path)
        message = str(caught.value)
        assert type(caught.value) is ValueError and message.startswith(f"{path}: ") and "\n" not in message, wrong
        assert len(message) < len(str(path)) + 300, message
        with pytest.raises(ValueError, match=f"field {field} is"):  # nor is it saved
            save(tmp_path / "none.pth", {**RIGHT, field: wrong})


def test_what_a_field_may_be(tmp_path):
    """None as `trained_groups` says that nobody knows them; an absent field is missed only by those who ask for it."""
    gram = {"gram": {"w": torch.ones(2)}, "trained_groups": None, "eval_view": {"size": 64, "window": None}}
    path = save(tmp_path / "a.pth", {**RIGHT, **gram, "split_sha256": "2" * 64})
    assert load(path)["trained_groups"] is None
    save(path, {"step": 1})
    assert load(path)["step"] == 1
    with pytest.raises(ValueError, match="field teacher is missing; use an older"):
        load(path, fields=("step", "teacher"))


def test_odd_format_and_version_are_one_line(tmp_path):
    path = tmp_path / "a.pth"
    for format_, version in [(torch.ones(2), 1), (["dinox"], 1), ("x" * 10**6, 1), ("dinox", torch.ones(2)),
                             ("dinox", True), ("dinox", "1"), ("dinox", 10**300)]:  # fmt: skip
        torch.save({"format": format_, "version": version}, path)
        with pytest.raises(ValueError, match="format|version") as caught:
            load(path)
        assert len(str(caught.value)) < len(str(path)) + 300 and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        load(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "value, said",
    [(Path("/x"), "pathlib"), (lambda: 0, "lambda"), ((i for i in ()), "generator"), (Attack("x"), "mkdir")],
)
def test_a_state_that_could_not_be_loaded_is_refused_before_it_gets_the_name(tmp_path, value, said):
    path = save(tmp_path / "a.pth", small(1))
    with pytest.raises(ValueError, match=said):
        save(path, {**small(2), "args": {"out": value}})
    assert load(path)["step"] == 1 and os.listdir(tmp_path) == ["a.pth"]


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(Path(b).name) or replace(a, b))
    point_last(tmp_path, save(tmp_path / "a.pth", small()))
    assert calls == [False, "a.pth", True, "last.pth", True]


def test_a_write_that_went_wrong_is_noticed_before_it_gets_the_name(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pth", small(1))
    real = torch.save

    def flipping(state, f):
        real(state, f)
        f.seek(f.seek(0, os.SEEK_END) // 2)
        f.write(b"\xff" * 300)

    monkeypatch.setattr(torch, "save", flipping)
    with pytest.raises(ValueError, match="not a whole"):
        save(path, small(2))
    assert load(path)["step"] == 1 and os.listdir(tmp_path) == ["a.pth"]


# which file is the newest


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_latest_is_by_number_not_by_time_or_name(tmp_path):
    for step in (99_999_999, 100_000_000, 5, 40):
        save(step_path(tmp_path, step), small(step))
    for name in ("step_final.pth", "step_00000007.pth.bak", ".step_999999999.pth.1-ab.tmp", "final_step_999999999.pth"):
        save(tmp_path / name, small(999_999_999))
    os.utime(step_path(tmp_path, 5))
    assert latest(tmp_path) == step_path(tmp_path, 100_000_000)
    assert checkpoint.step_of(latest(tmp_path)) == 100_000_000 and checkpoint.step_of("last.pth") is None


def test_latest_falls_back_and_says_so_once(tmp_path, capfd):
    for step in (1, 2, 3):
        save(step_path(tmp_path, step), small(step))
    point_last(tmp_path, step_path(tmp_path, 1))
    assert latest(tmp_path) == step_path(tmp_path, 3) and capfd.readouterr() == ("", "")
    damage(step_path(tmp_path, 3))
    step_path(tmp_path, 4).mkdir()
    assert latest(tmp_path) == step_path(tmp_path, 2)
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    for line, step in zip(err.splitlines(), (4, 3)):
        assert line.startswith(f"{step_path(tmp_path, step)}: ") and line.endswith("; using step_00000002.pth")


def test_latest_takes_last_when_no_step_file_verifies(tmp_path, capfd):
    save(step_path(tmp_path, 1), small(1))
    save(tmp_path / "last.pth", small(1))
    damage(step_path(tmp_path, 1))
    assert latest(tmp_path) == tmp_path / "last.pth" and capfd.readouterr().err.endswith("using last.pth\n")
    damage(tmp_path / "last.pth")
    assert latest(tmp_path) is None and capfd.readouterr().err.count("no other verifies\n") == 2


def test_a_file_that_goes_away_meanwhile_is_not_called_broken(tmp_path, monkeypatch, capfd):
    """A reader lists the folder; before it opens the files, the run has saved two more and rotated."""
    real, paths = checkpoint.verify, [save(step_path(tmp_path, step), small(step)) for step in (1, 2)]

    def verify_late(path):
        if paths:
            paths.pop().unlink()
            paths.pop().unlink()
            for step in (3, 4):
                save(step_path(tmp_path, step), small(step))
        return real(path)

    monkeypatch.setattr(checkpoint, "verify", verify_late)
    assert latest(tmp_path) == step_path(tmp_path, 4) and capfd.readouterr() == ("", "")
    step_path(tmp_path, 5).symlink_to(tmp_path / "none")  # a name without a file does not go away
    assert latest(tmp_path) == step_path(tmp_path, 4) and "step_00000005" in capfd.readouterr().err


def test_rotation_beside_one_that_deletes_too(tmp_path, monkeypatch):
    paths = [save(step_path(tmp_path, step), small(step)) for step in (1, 2, 3)]
    point_last(tmp_path, paths[2])
    real = Path.samefile

    def late(self, other):
        self.unlink()
        return real(self, other)

    monkeypatch.setattr(Path, "samefile", late)
    rotate(tmp_path, 1, 0)
    assert checkpoint.step_files(tmp_path) == [paths[2]]


def test_neither_a_clock_nor_a_time_of_a_file_decides(tmp_path, monkeypatch):
    clock = itertools.count(2_000_000_000, -10_000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    saver = Saver(tmp_path, 2, 0)
    for step in (1, 2, 10**15):
        saver.save(step, small(step))
        saver.wait()
        os.utime(step_path(tmp_path, step), (2e9 - step % 10**9,) * 2)
    assert latest(tmp_path) == step_path(tmp_path, 10**15) and len(checkpoint.step_files(tmp_path)) == 2
    assert all(0 <= event["seconds"] < 60 and event["stall_s"] >= 0 for event in saver.events)


def test_an_empty_or_missing_folder_has_no_latest(tmp_path, capfd):
    assert latest(tmp_path) is None and latest(tmp_path / "none") is None
    assert capfd.readouterr() == ("", "")


# last.pth


def test_last_is_a_second_name_of_the_same_bytes(tmp_path):
    paths = [save(step_path(tmp_path, step), small(step)) for step in (1, 2)]
    for path in (*paths, paths[1]):  # the last one again: a rename between two names of one file does nothing
        point_last(tmp_path, path)
        assert (tmp_path / "last.pth").samefile(path)
    assert sorted(os.listdir(tmp_path)) == ["last.pth", paths[0].name, paths[1].name]
    save(paths[1], small(22))  # a step written again is a new file: last.pth keeps the old one until it is told
    assert load(tmp_path / "last.pth")["step"] == 2
    with pytest.raises(FileNotFoundError):
        point_last(tmp_path, step_path(tmp_path, 9))
    assert load(tmp_path / "last.pth")["step"] == 2 and len(os.listdir(tmp_path)) == 3


def test_last_never_goes_missing(tmp_path, monkeypatch):
    paths = [save(step_path(tmp_path, step), small(step)) for step in (1, 2)]
    point_last(tmp_path, paths[0])
    monkeypatch.setattr(os, "replace", fail(errno.EIO))
    with pytest.raises(OSError):
        point_last(tmp_path, paths[1])
    assert (tmp_path / "last.pth").samefile(paths[0]) and len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK])
def test_last_is_a_copy_where_links_fail(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", fail(code))
    paths = [save(step_path(tmp_path, step), small(step)) for step in (1, 2)]
    for path in paths:
        point_last(tmp_path, path)
        assert (tmp_path / "last.pth").read_bytes() == path.read_bytes()
        assert not (tmp_path / "last.pth").samefile(path)
    damage(paths[0])  # a copy is checked like any other write
    with pytest.raises(ValueError):
        point_last(tmp_path, paths[0])
    assert load(tmp_path / "last.pth")["step"] == 2 and len(os.listdir(tmp_path)) == 3


# rotation


@pytest.mark.slow
def test_rotation_by_brute_force(tmp_path, monkeypatch):
    def cheap_verify(path):
        if path.read_bytes() != b"good":
            raise ValueError("broken")

    monkeypatch.setattr(checkpoint, "verify", cheap_verify)
    steps, count = (5, 10, 15, 20, 100_000_000), itertools.count()
    cases = itertools.product(range(2 ** len(steps)), (1, 2, 3), (0, 10), (None, *steps))
    for broken, keep_last, keep_every, last in cases:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        good = [s for i, s in enumerate(steps) if not broken >> i & 1]
        for s in steps:
            step_path(folder, s).write_bytes(b"good" if s in good else b"bad")
        if last:
            os.link(step_path(folder, last), folder / "last.pth")
        deleted = rotate(folder, keep_last, keep_every)
        left = {checkpoint.step_of(p) for p in folder.glob("step_*")}

        recent = good[-keep_last:]
        expected = {
            s
            for s in steps
            if len(recent) < keep_last or s >= recent[0] or s == last or (keep_every and s % keep_every == 0)
        }
        assert left == expected, (good, keep_last, keep_every, last)
        assert {checkpoint.step_of(p) for p in deleted} == set(steps) - left
        assert not good or max(good) in left  # said again, without the formula


def test_rotation_reads_only_what_is_not_known_to_be_good(tmp_path, monkeypatch):
    paths = [save(step_path(tmp_path, step), small(step)) for step in (1, 2, 3)]
    monkeypatch.setattr(checkpoint, "verify", lambda path: pytest.fail(f"read {path}"))
    assert rotate(tmp_path, 2, 0, good=set(paths)) == [paths[0]]


def test_rotation_refuses_to_keep_nothing(tmp_path):
    path = save(step_path(tmp_path, 1), small())
    with pytest.raises(ValueError, match="keep_last"):
        rotate(tmp_path, 0, 0)
    assert path.exists()


def test_sweep_takes_only_leftovers_of_saves(tmp_path):
    keep = ["step_00000001.pth", "last.pth", "notes.tmp", ".other.json.1-ab.tmp", "metrics.jsonl"]
    stale = [f".step_00000002.pth.{os.getpid()}-0a.tmp", ".last.pth.1-0b.tmp", ".config.json.1-ab.tmp"]
    for name in keep + stale:
        (tmp_path / name).write_bytes(b"")
    assert sorted(p.name for p in sweep(tmp_path)) == sorted(stale)
    assert sorted(os.listdir(tmp_path)) == sorted(keep)


# weights and optimizer state by name


def shared(net, optimizer):
    return {"student": checkpoint.pack_weights(net), "optimizer": checkpoint.pack_optimizer(optimizer, net)}


def one_step(net, optimizer):
    optimizer.zero_grad()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {name: checkpoint.full(p).detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_and_optimizer_go_on_to_the_bit(tmp_path, sharded):
    """Also into another grouping, and into shards and out of them."""
    net, optimizer = trained()
    path = save(tmp_path / "a.pth", {"step": 3, **shared(net, optimizer)})
    expected = one_step(net, optimizer)
    torch.manual_seed(1)
    other = torch.nn.Linear(3, 2)
    if sharded:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        from torch.distributed.fsdp import fully_shard

        fully_shard(other)
    try:
        groups = [{"params": [other.bias]}, {"params": [other.weight]}]
        other_optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        state = load(path)
        checkpoint.unpack_weights(other, state["student"])
        checkpoint.unpack_optimizer(other_optimizer, other, state["optimizer"])
        assert same(shared(other, other_optimizer), {k: state[k] for k in ("student", "optimizer")})
        state["student"]["weight"].zero_()  # copied, not held
        state["optimizer"]["weight"]["exp_avg"].zero_()
        assert same(one_step(other, other_optimizer), expected)
    finally:
        if sharded:
            torch.distributed.destroy_process_group()


def test_weights_of_another_net_are_refused_by_name(tmp_path):
    net, optimizer = trained()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, checkpoint.pack_weights(net)
    for wrong in ({"weight": state["weight"]}, {**state, "more": torch.ones(1)}, {**state, "bias": torch.ones(1)}):
        with pytest.raises(ValueError, match="differ in (bias|more); was the architecture changed"):
            checkpoint.unpack_weights(net, wrong)  # a bias of one number would fill both
    assert same(dict(net.state_dict()), before)
    moments = checkpoint.pack_optimizer(optimizer, net)["bias"]
    for wrong in (7, [], {"step": 3}, {**moments, "exp_avg": torch.ones(1)}, {**moments, "exp_avg": None}):
        with pytest.raises(ValueError, match="the optimizer's bias; was the architecture changed"):
            checkpoint.unpack_optimizer(optimizer, net, {"bias": wrong})
    checkpoint.unpack_optimizer(torch.optim.AdamW(net.parameters()), net, {})  # before the first update there is none


def test_no_other_file_of_ours_is_named():
    source = (ROOT / "checkpoint.py").read_text()
    assert not re.search(r"\b\w+\.py\b|\btools/|--[a-z]", source)


# the background thread


def test_the_snapshot_is_of_the_moment_of_the_call(tmp_path, monkeypatch):
    gate, real = threading.Event(), checkpoint.save

    def slow(path, state):
        assert gate.wait(60)
        return real(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    w, args = torch.ones(1000), {"lr": [1.0], "seen": [1]}
    saver = Saver(tmp_path, 3, 0)
    saver.save(1, {"step": 0, "w": w, "args": args})
    w.fill_(7)
    args["lr"][0] = 2.0
    args["seen"].append(2)
    assert not os.listdir(tmp_path) and not saver.events
    gate.set()
    saver.wait()
    back = load(tmp_path / "last.pth")
    assert back["step"] == 1 and back["args"] == {"lr": [1.0], "seen": [1]} and torch.equal(back["w"], torch.ones(1000))
    (event,) = saver.events
    assert event["step"] == 1 and event["error"] is None and event["seconds"] > 0


def test_a_second_save_waits_and_the_wait_is_counted(tmp_path, monkeypatch):
    real, running, asked = checkpoint.save, [], threading.Event()

    def slow(path, state):
        running.append(threading.current_thread())
        assert sum(t.is_alive() for t in running) == 1
        assert asked.wait(60)  # so that the first is still at work when the second is asked for
        time.sleep(0.5)
        return real(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    saver = Saver(tmp_path, 3, 0)
    stalls = []
    for step in (1, 2):
        if step == 2:
            asked.set()
        saver.save(step, small(step))
        stalls.append(saver.stall_s)
    saver.wait()
    assert stalls[1] > 0.25
    assert [load(step_path(tmp_path, step))["step"] for step in (1, 2)] == [1, 2]
    assert [event["stall_s"] for event in saver.events] == stalls


def test_the_second_save_allocates_no_tensor(tmp_path, monkeypatch):
    saver, made, real = Saver(tmp_path, 3, 0), [], torch.empty

    def counting(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():  # the other one is in torch.load
            made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", counting)
    for step in (1, 2):
        saver.save(step, small(step))
        saver.wait()
    assert len(made) == 2  # the two tensors of the state, once
    saver.save(3, {**small(3), "w": torch.arange(9.0), "gram": {"w": torch.ones(2)}})
    saver.wait()
    assert len(made) == 4 and torch.equal(load(tmp_path / "last.pth")["w"], torch.arange(9.0))


def test_saver_keeps_what_it_should(tmp_path):
    saver = Saver(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        saver.save(step, small(step))
    saver.wait()
    assert [checkpoint.step_of(p) for p in checkpoint.step_files(tmp_path)] == [7, 6, 4]
    assert (tmp_path / "last.pth").samefile(step_path(tmp_path, 7))


def test_an_error_of_the_disk_names_the_file(tmp_path):
    def full(f):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: '.*/a.json'"):
        checkpoint.atomic_write(tmp_path / "a.json", full)
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(size):
    """The kernel cuts every write off at `size` bytes, as a full disk does (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def survives(tmp_path, saver, said):
    """The save of step 2 inside fails: it is told, and every file of step 1 is as before."""
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    yield
    saver.wait()
    assert said in saver.error and "step_00000002.pth" in saver.error and "\n" not in saver.error
    assert saver.events[-1]["step"] == 2 and saver.events[-1]["error"] == saver.error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert load(latest(tmp_path))["step"] == 1


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.99])
def test_a_disk_that_is_full_stops_nothing(tmp_path, share):
    saver = Saver(tmp_path, 3, 0)
    state = {"w": torch.randn(50_000)}
    saver.save(1, state)
    saver.wait()
    size = int(share * (tmp_path / "last.pth").stat().st_size)
    with survives(tmp_path, saver, os.strerror(errno.EFBIG)), largest_file(size):
        saver.save(2, state)
        saver.wait()
    saver.save(3, state)
    saver.wait()
    assert saver.error is None and load(tmp_path / "last.pth")["step"] == 3


def test_a_folder_that_is_read_only_stops_nothing(tmp_path, monkeypatch):
    # patched, because root may write whatever the mode says
    saver = Saver(tmp_path, 3, 0)
    saver.save(1, small())
    saver.wait()
    with survives(tmp_path, saver, os.strerror(errno.EROFS)), monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open", fail(errno.EROFS), raising=False)
        saver.save(2, small())
        saver.wait()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk_call_stops_nothing(tmp_path, monkeypatch, function):
    saver = Saver(tmp_path, 3, 0)
    saver.save(1, small())
    saver.wait()
    with survives(tmp_path, saver, os.strerror(errno.ENOSPC)), monkeypatch.context() as patch:
        patch.setattr(os, function, fail(errno.ENOSPC))
        saver.save(2, small())
        saver.wait()


def test_a_state_that_cannot_be_stored_is_told_not_raised(tmp_path):
    saver = Saver(tmp_path, 3, 0)
    saver.save(1, {"args": {"out": Path("runs/x")}})
    saver.wait()
    assert "needs code to load" in saver.error and os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_is_told_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "point_last", lambda *args: 1 / 0)
    saver = Saver(tmp_path, 3, 0)
    saver.save(1, small())
    saver.wait()
    assert "stderr" in saver.error and saver.events[-1]["error"] == saver.error


# kill -9

KILLER = """
import os, random, signal, sys, time
import torch
import checkpoint
torch.set_num_threads(1)
run, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng, inside, between = random.Random(seed), 0, 0

def train(start, done):
    saver = checkpoint.Saver(run, keep_last=2, keep_every=0)
    for step in range(start + 1, 1 << 30):
        saver.save(step, {"w": torch.full((1_000_000,), float(step)), "b": [step] * 3})
        saver.wait()
        assert saver.error is None, saver.error
        os.write(done, step.to_bytes(8, "little"))

for _ in range(kills):
    newest = checkpoint.latest(run)
    start = checkpoint.step_of(newest) if newest else 0
    reader, writer = os.pipe()
    worker = os.fork()  # of a process that has imported torch and started no thread: a new one takes seconds
    if not worker:
        train(start, writer)
    os.close(writer)
    told = os.read(reader, 8)
    time.sleep(rng.random() * 0.03)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    while piece := os.read(reader, 8):
        told = piece
    os.close(reader)
    told = int.from_bytes(told, "little")

    newest = checkpoint.latest(run)
    step = checkpoint.step_of(newest)
    assert step in (told, told + 1), (step, told)
    for path in (newest, run + "/last.pth"):
        state = checkpoint.load(path)
        assert state["step"] in (told, told + 1) and state["b"] == [state["step"]] * 3
        assert (state["w"] == state["step"]).all(), "two saves mixed"
    assert all(checkpoint.verify(path) is None for path in checkpoint.step_files(run))
    left = [name for name in os.listdir(run) if name.endswith(".tmp")]
    assert len(left) <= 1, left
    inside += bool(left)
    between += checkpoint.load(run + "/last.pth")["step"] != step
    checkpoint.sweep(run)
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]
print(inside, between, step)
"""


def kill(run, kills, seed):
    command = [sys.executable, "-c", KILLER, str(run), str(kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # latest() had nothing to fall back from: no kill left a broken file under a good name
    return map(int, done.stdout.split())


@pytest.mark.slow
def test_kill_at_any_moment_loses_at_most_the_save_under_way(tmp_path):
    inside, _, steps = kill(tmp_path, kills=40, seed=0)
    assert inside >= 4, f"only {inside} of 40 kills fell inside a save"  # 18 to 25 on a quiet machine
    assert steps >= 40


@pytest.mark.proof
def test_kill_a_thousand_times(tmp_path):
    inside, between, _ = kill(tmp_path, kills=1000, seed=1)
    assert inside >= 100 and between >= 1  # also between the step file and last.pth
