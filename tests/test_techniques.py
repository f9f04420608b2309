"""The list of techniques is about what is there: its files exist, and its values are read by their flags."""

import re
from pathlib import Path

import pytest
import torch

import data
import losses
from tools.lib import arms, augment, cli, loop, optim, rules, supervise

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "tools" / "recipes" / "TECHNIQUES.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| technique", "| ---"))]
ARMS = arms.read_arms([str(ROOT / "tools" / "recipes" / "arms.txt")])
CODE = re.findall("`([^`]+)`", "\n".join(ROWS)) + [" ".join(flags) for flags in ARMS.values()]


def values(flag):
    found = {m for text in CODE for m in re.findall(rf"{flag} ([^\s`]+)", text)}
    assert found, flag
    return sorted(found)


def test_each_file_is_there():
    names = {name for text in CODE for name in re.findall(r"(?:tools/(?:lib/)?)?\w+\.(?:py|sh)\b", text)}
    places = [ROOT, ROOT / "tools", ROOT / "tools" / "lib", ROOT / "tools" / "recipes", ROOT / "tests"]
    assert len(names) > 30
    assert not [name for name in names if not any((place / name).exists() for place in places)]


def test_each_row_says_where_it_is_or_why_not():
    for row in ROWS:
        _, technique, where, command, effect, _ = row.split("|")
        if "not there" in where or "refused" in where:
            assert not command.strip() and len(effect.split()) > 5, technique
        else:
            assert where.strip(), technique


def test_each_value_is_one_of_its_flag():
    for text in values("--loss"):
        supervise.read_loss(text, [0, 1], 2)
    for text in values("--optimizer"):
        loop.build_optimizer(text, [{"params": [torch.nn.Parameter(torch.ones(2, 2))]}])
    for text in values("--aug"):
        augment.find_row(text)
    for text in values("--adapter"):
        supervise.read_adapter(text)
    for text in values("--views"):
        data.find_layout(text)
    for text in values("--tune"):
        if not text.startswith("fusion"):
            supervise.tune_kind(text)
    for text in values("--head"):
        cli.technique(text, supervise.HEADS)
    methods = [m for text in CODE for m in re.findall(r"--method ([a-z0-9 :=._]+)", text)]
    for text in " ".join(methods).split():
        rules.read_step(text)


def test_every_row_of_the_tables_of_techniques_is_named():
    for names in (losses.OBJECTIVES, optim.OPTIMIZERS, data.LAYOUTS, augment.ROWS):
        for name in names:
            if name != "none":
                assert re.search(rf"\b{re.escape(name)}\b", TEXT, re.IGNORECASE), name
    with pytest.raises(ValueError):
        supervise.read_loss("no_such_loss", [0, 1], 2)
