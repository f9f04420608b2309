"""Progress is a bar for people, and in a file a line now and then."""

import ast
import sys
from pathlib import Path

from tools.lib import progress as p


def test_in_a_file_progress_is_lines_and_short_work_says_nothing(monkeypatch, capsys):
    assert list(p.progress(range(1000), "read", unit="file")) == list(range(1000))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(p, "EVERY_S", 0)
    with p.progress(total=3, desc="read", unit="file") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[-3:]] == [f"read {k} of 3" for k in (1, 2, 3)]
    assert all("file/s" in line and "\r" not in line and "|" not in line for line in lines[-2:])


def test_a_person_sees_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(p.progress(range(3), "read", mininterval=0)) == [0, 1, 2]
    assert "\rread: 100%|" in capsys.readouterr().err


def test_no_program_draws_a_bar_into_a_file():
    root = Path(p.__file__).resolve().parents[2]
    for path in [*root.glob("*.py"), *(root / "tools").rglob("*.py")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        bars = [n for n in calls if getattr(n.func, "id", "") == "tqdm" and path.name != "progress.py"]
        assert all(any(k.arg == "disable" for k in n.keywords) for n in bars), f"{path.name}: use tools.lib.progress"
