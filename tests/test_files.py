"""Readers of our small files: a value of the promised types, or one sentence; tables that no spreadsheet runs."""

import csv
import io
import json
import math
import os

import numpy as np
import pytest

import data
from tools.lib import files

FIELDS = {"steps": int, "lr": float, "note": (str, type(None)), "seen": list}
GOOD = {"version": 1, "steps": 3, "lr": 1, "note": None, "seen": []}


def read(path, **more):
    return files.read_json_file(path, FIELDS, "run it again", **{"version": 1, **more})


def test_a_json_file_that_keeps_its_promises_is_read(tmp_path):
    path = tmp_path / "x.json"
    for text in (json.dumps(GOOD), "\ufeff" + json.dumps(GOOD), json.dumps({**GOOD, "more": [1]}, indent=2)):
        path.write_text(text, encoding="utf-8")
        assert read(path)["steps"] == 3
    path.write_text(json.dumps(GOOD | {"version": 7}))
    assert read(path, version=None)["version"] == 7


DAMAGED = {
    "empty": (b"", "is damaged, or no JSON"),
    "cut": (json.dumps(GOOD).encode()[:-9], "is damaged, or no JSON"),
    "not text": (b"\x80abc", "is not UTF-8 .byte 0"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "is not UTF-8 .byte 0"),
    "a list": (b"[1]", "holds a list, expected an object"),
    "a number": (b"3", "holds 3, expected an object"),
    "null": (b"null", "holds null, expected an object"),
    "nested": (b"[" * 100_000, "is damaged, or no JSON .nested too deeply"),
    "a number of 5000 digits": (b'{"steps": 1' + b"0" * 5000 + b"}", "is damaged, or no JSON|'lr'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    content, reason = DAMAGED[name]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json.* ?({reason}).*; run it again$") as caught:
        files.read_json_file(path, {} if "digits" not in name else {"lr": float}, "run it again")
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_no_file_is_said_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json does not exist; run it again"):
        read(tmp_path / "none.json")


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        for reader in (read, files.read_lines):
            with pytest.raises(OSError, match=f"{path.name} is a .*, not a file"):
                reader(path)


WRONG = {
    "missing": ({"steps": None}, "has no field 'steps'"),
    "bool is no int": ({"steps": True}, "field 'steps' is true, expected int"),
    "text": ({"steps": "3"}, "field 'steps' is \"3\", expected int"),
    "a fraction": ({"steps": 3.5}, "field 'steps' is 3.5, expected int"),
    "a huge int": ({"steps": 10**400}, "field 'steps' is 10*.*, expected int"),
    "a huge int for a float": ({"lr": 10**400}, "field 'lr' is 10*.*, expected float"),
    "one of two": ({"note": 3}, "field 'note' is 3, expected text or null"),
    "deep": ({"lr": {"a": [[]]}}, "field 'lr' is an object, expected float"),
    "long": ({"lr": "x" * 10**7}, "field 'lr' is \"xx.*, expected float"),
    "another version": ({"version": 2}, "version is 2, this code reads 1"),
    "no version": ({"version": None}, "version is null, this code reads 1"),
    "true is no version": ({"version": True}, "version is true, this code reads 1"),
    "escape": ({"lr": "\x1b[2J"}, "field 'lr' is .*, expected float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named_with_what_was_found(tmp_path, name):
    change, reason = WRONG[name]
    value = GOOD | change
    if name == "missing":
        del value["steps"]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"x.json.*{reason}; run it again$") as caught:
        read(path)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


# lines


def test_bad_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    assert files.read_lines(path) == ([], 0)
    good = [{"step": 1, "loss": math.inf}, {"step": 2, "event": "a\x85b\u2028c"}]
    bad = [b'{"step": 3, "lo', b"[1]", b"\x80", b"[" * 100_000, b'{"step": "4"}', b'{"step": true}', b'{"loss": 1}']
    lines = [json.dumps(good[0]).encode(), b"", *bad, json.dumps(good[1], ensure_ascii=False).encode()]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b'\n{"step": 9')
    assert files.read_lines(path, {"step": int}) == (good, len(bad) + 1)
    assert files.read_lines(path)[1] == 5  # without types: only what is no object


def test_json_has_null_where_a_number_is_missing(tmp_path):
    value = {"z": math.nan, "b": np.float64(0.5), "c": [np.int64(3), -math.inf, {"d": np.float32("nan")}], "e": (1,)}
    path = tmp_path / "new" / "x.json"
    files.write_json(path, value)
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"z": None, "b": 0.5, "c": [3, None, {"d": None}], "e": [1]}
    assert text.startswith('{\n "z": null,\n "b"') and text.endswith("}\n")  # keys as given
    files.write_json(path, value, indent=None)
    assert len(path.read_text().splitlines()) == 1


def test_what_a_resume_did_again_replaces_what_it_had_done():
    rows = [{"step": s, "loss": s} for s in (1, 2, 3, 4)] + [{"step": 2, "event": "resumed"}, {"step": 3, "loss": 30}]
    assert [row["loss"] for row in files.last_per_step(rows, "loss")] == [1, 2, 30]
    assert files.last_per_step(rows, "val_loss") == []


def test_an_appended_line_is_whole_after_one_that_was_cut(tmp_path):
    path = tmp_path / "x.jsonl"
    data.append_line(path, {"step": 1})
    with open(path, "ab") as f:
        f.write(b'{"step": 2')
    data.append_line(path, {"step": 3})
    assert files.read_lines(path) == ([{"step": 1}, {"step": 3}], 1)


# tables


def test_no_cell_is_a_formula_or_a_command_of_a_terminal():
    formulas = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "-2+3", "＝1", "\n=1"]
    plain = ["", "lidc/1.2.npy", "-1", "+2.5", "-1e-05", "-.5", "a=b", "a-b", "é", 'say "hi", twice', 3, -2.5, None]
    (row,) = csv.reader(io.StringIO(files.csv_text([formulas + plain])))
    assert [cell[0] for cell in row[: len(formulas)]] == ["'"] * len(formulas)
    assert row[len(formulas) :] == ["" if cell is None else str(cell) for cell in plain]
    text = files.csv_text([["a\x1b[2Jb", "c\x00d", "e\x9bf", "g\x7fh", "i\rj", "two\nlines"]])
    assert text == 'a\\x1b[2Jb,c\\x00d,e\\x9bf,g\\x7fh,i\\rj,"two\nlines"\n'


def test_ids_still_join():
    ids = ["=1.png", "-.png", "@x/1.png", "plain.png", "-1", "a\x1bb"]
    rows = list(csv.reader(io.StringIO(files.csv_text([[name, k] for k, name in enumerate(ids)]))))
    assert len({name for name, _ in rows}) == len(ids)
    of_cell = {name: int(k) for name, k in rows}
    assert [of_cell[files.csv_cell(name)] for name in ids] == list(range(len(ids)))
    again = list(csv.reader(io.StringIO(files.csv_text(rows))))
    assert again == rows  # a table that is read and written again stays the same
