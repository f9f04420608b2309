"""Claims about the border of every program: whose mistake an error is, what reaches the terminal, signals."""

import argparse
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tools.lib import cli, loop

ROOT = Path(__file__).resolve().parent.parent


def in_our_file(body):
    """A function whose code seems to stand in a file of the repository."""
    scope = {"np": np}
    exec(compile(f"def f():\n    {body}\n", str(ROOT / "train_ssl.py"), "exec"), scope)
    return scope["f"]


@pytest.mark.parametrize(
    "body, code",
    [
        ("raise ValueError('use\\n--other')", 2),
        ("raise OSError('no such file: x')", 2),
        ("open('/nothing/there')", 2),
        ("np.zeros(3).reshape(2, 2)", None),  # raised by C code in our line: a bug, so its traceback stays
        ("int('x')", None),
        ("__import__('torch').cat([])", None),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_only_what_we_raise_is_a_users_mistake(body, code, capsys):
    if code is None:
        with pytest.raises((ValueError, RuntimeError)):
            cli.run(in_our_file(body))
        return
    with pytest.raises(SystemExit) as caught:
        cli.run(in_our_file(body))
    assert caught.value.code == code and len(capsys.readouterr().err.splitlines()) == 1


def test_a_library_inside_the_repository_is_not_ours():
    try:
        exec(compile("raise ValueError", str(ROOT / ".venv/lib/site-packages/x.py"), "exec"), {})
    except ValueError as error:
        assert not cli.is_ours(error)


def test_texts_of_files_do_not_steer_the_terminal(monkeypatch, capsys):
    assert cli.shown("P1\x1b[31m\r\n\u202e\udcff") == r"P1\x1b[31m\r\n\u202e\udcff"
    long = cli.shown("x" * 10**7)
    assert len(long) < 120 and "10000000 characters" in long
    assert cli.shown("Müller 肺") == "Müller 肺"
    with pytest.raises(SystemExit):
        cli.run(in_our_file("raise ValueError('label \\x1b]0;owned\\x07 ' + 'y' * 10**6)"))
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\x07" not in printed and len(printed) < 2500


@pytest.mark.parametrize("body, words", [
    ("open('/proc/self/stat/x')", "/proc/self/stat/x: Not a directory; a file stands where a folder is needed"),
    ("raise OSError(28, 'No space left on device', 'a/b')", "a/b: No space left on device; make room on that disk"),
    ("raise OSError(28, 'No space left on device')", "error: No space left on device; make room on that disk"),
    ("raise OSError('no folder x; make the split first')", "no folder x; make the split first (tools/make_splits.py)"),
])  # fmt: skip
def test_errors_of_the_system_say_what_to_do(capsys, body, words):
    with pytest.raises(SystemExit):
        cli.run(in_our_file(body))
    assert words in capsys.readouterr().err


def test_a_run_that_was_told_to_stop_keeps_its_own_exit_code():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with loop.Stop(0) as stop:
            assert stop.why() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.why() == "SIGTERM"
            os.kill(os.getpid(), signal.SIGTERM)  # while it saves
        os.kill(os.getpid(), signal.SIGTERM)  # while it ends
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    with loop.Stop(0):
        pass
    assert signal.getsignal(signal.SIGTERM) == before  # a run that ended by itself leaves nothing behind


def test_time_limit_and_dead_torchrun_are_reasons(monkeypatch):
    assert loop.Stop(1e-9).why() == "time limit"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = loop.Stop(0)
    assert stop.why() is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.why() == "torchrun died"


def test_a_second_program_on_a_folder_says_at_once_for_whom_it_waits(tmp_path, monkeypatch, capsys):
    holder = loop.lock(tmp_path)
    monkeypatch.setattr("tools.lib.loop.time.sleep", lambda s: None)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        loop.lock(tmp_path)
    said = f"{tmp_path} is in use by process {os.getpid()}; waiting up to 60 s for it to end\n"
    assert capsys.readouterr().err == said
    holder.close()


def test_programs_are_named_where_a_leaf_names_the_work(capsys):
    """Leaves know no other file, so that each can be copied alone."""
    for text, more in (("x; preprocess again", " (tools/preprocess_dicom.py)"), ("all is lost", ""),
                       ("run tools/make_splits.py: make the split again", "")):  # fmt: skip
        with pytest.raises(SystemExit):
            cli.run(in_our_file(f"raise ValueError({text!r})"))
        assert capsys.readouterr().err.endswith(f"error: {text}{more}\n")


@pytest.mark.parametrize(
    "interval, good, bad",
    [
        ("[0, 1)", ["0", "0.999", "-0"], ["1", "-1e-9", "nan", "inf"]),
        ("(0, 1]", ["1", "1e-30"], ["0", "1.0001", "-inf"]),
        ("(-inf, inf)", ["-1e300", "0"], ["nan", "inf", "-inf", "1e400"]),
        ("[2, 4]", ["2", "3", "4"], ["1", "5"]),
    ],
)
def test_an_interval_holds_what_its_brackets_say(interval, good, bad):
    parse = cli.within(interval, int if interval == "[2, 4]" else float)
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be .*, got"):
            parse(text)


@pytest.mark.parametrize(
    "words, hint",
    [
        ("--dat x", "there is no --dat; did you mean --data?"),  # and --data, which is required, is missing too
        ("--data x --batch_size 8", "there is no --batch_size; did you mean --batch-size?"),
        ("--data x --batchsize=8", "there is no --batchsize; did you mean --batch-size?"),
        ("--data x --qqqqqq", "there is no --qqqqqq; --help lists all"),
        ("--data x --batch-size -3", "--batch-size: must be at least 1, got -3"),
        ("--batch-size 3", "the following arguments are required: --data"),
    ],
)
def test_a_misspelt_flag_is_told_the_right_one(words, hint, capsys):
    parser = cli.Parser("x")
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=cli.positive)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words.split())
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"{hint}\n")


def row(x, gamma=2.0, betas=(0.9, 0.95), twice=False, name="sum", *, inner=1):
    """What a table of techniques holds."""


def test_a_technique_is_a_name_with_options():
    table = {"focal": row, "ce": lambda x: x}
    for text, expected in {
        "ce": ("ce", {}), "focal": ("focal", {}), "focal:gamma=3": ("focal", {"gamma": 3}),
        " focal : gamma = 0.5 , betas=[0, 1e-3],twice=true,name=mean": (
            "focal", {"gamma": 0.5, "betas": [0, 0.001], "twice": True, "name": "mean"}),
    }.items():  # fmt: skip
        assert cli.technique(text, table) == expected
    for text, sentence in {
        "focl": "there is no focl; did you mean focal. known are focal, ce",
        "": "there is no empty name; known are focal, ce",
        "ce:gamma=2": "ce has no option gamma; its options are none",
        "focal:gama=2": r"focal has no option gama; its .* gamma=2.0, betas=\(0.9, 0.95\), twice=False, name=sum$",
        "focal:inner=2": "has no option inner",
        "focal:x=2": "has no option x",
        "focal:gamma=true": "focal:gamma is True, expected a value like 2.0",
        "focal:gamma=NaN": "focal:gamma is nan",
        "focal:gamma": "focal:gamma is , expected",
        "focal:betas=[0.9]": r"focal:betas is \[0.9\]",
        "focal:betas=0.9": "focal:betas is 0.9",
        "focal:twice=1": "focal:twice is 1, expected a value like False",
        "focal:name=2": "focal:name is 2",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            cli.technique(text, table)
