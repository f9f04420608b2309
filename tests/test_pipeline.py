"""Stages as a table: order, what is done, what is run again, what stops the line; and all of them at toy size."""

import graphlib
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tools import pipeline
from tools.lib import files

# Writes what --out names: its own words, and the bytes of the files that it reads.
COPY = """
import pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(pathlib.Path(__file__).parent / "calls", "a") as f:
    print(flags["--name"], file=f)
if "--fail" in flags:
    sys.exit(f"nan in the loss\\n" if flags["--fail"] == "2" else int(flags["--fail"]))
out = pathlib.Path(flags["--out"])
out.parent.mkdir(exist_ok=True)
if flags.get("--write") != "no":
    read = [pathlib.Path(p).read_text() for p in flags["--in"].split(",") if p]
    out.write_text(flags.get("--text", "") + "".join(read))
"""


@pytest.fixture
def line(tmp_path, monkeypatch):
    """a and b from labels.csv, c from both."""
    (tmp_path / "copy.py").write_text(COPY)
    data = tmp_path / "data"
    data.mkdir()
    (data / "labels.csv").write_text("path,label\n")
    (data / "one.png").write_bytes(b"picture")

    def stage(out, name, after, reads, more=()):
        made = out / name / "made.txt"
        words = [str(tmp_path / "copy.py"), "--name", name, "--out", str(made), "--in", ",".join(map(str, reads))]
        inputs = [*reads, *more]
        return pipeline.Stage(name, after, words, inputs, [made], made.parent)

    def stages(args):
        labels = data / "labels.csv"
        made = {name: args.out / name / "made.txt" for name in "ab"}
        return [
            stage(args.out, "c", ("a", "b"), list(made.values())),
            stage(args.out, "a", (), [labels], ["images"]),
            stage(args.out, "b", (), [labels]),
        ]

    monkeypatch.setattr(pipeline, "stages", stages)

    class Line:
        out = tmp_path / "out"

        def run(self, *words):
            return pipeline.main(["--data", str(data), "--out", str(self.out), *words])

        def calls(self):
            path = tmp_path / "calls"
            found = path.read_text().split() if path.exists() else []
            path.unlink(missing_ok=True)
            return found

        def made(self, name):
            return self.out / name / "made.txt"

        def manifest(self, name):
            return self.out / "stages" / name / "manifest.json"

    found = Line()
    found.data = data
    return found


def test_what_is_done_is_not_done_again(line, capsys):
    assert line.run() == 0 and sorted(line.calls()[:2]) == ["a", "b"]
    manifest = json.loads(line.manifest("c").read_text())
    assert {"stage", "command", "git", "inputs", "outputs", "splits", "seconds"} <= set(manifest)
    assert manifest["outputs"] == {str(line.made("c")): pipeline.file_sha256(line.made("c"))}
    assert line.run() == 0 and line.calls() == []
    said = capsys.readouterr().out
    assert "a: done before" in said and "3 of 3 stages are done" in said


def test_a_change_of_files_flags_or_pictures_runs_what_depends_on_it(line, capsys):
    line.run()
    line.calls()
    line.made("b").write_text("tampered")
    assert line.run() == 0 and line.calls() == ["b"]  # c reads what it read before
    assert "made.txt, which it made, is another file than it was" in capsys.readouterr().out
    assert line.made("b").read_text() == "path,label\n"
    assert (line.out / "b.replaced" / "made.txt").read_text() == "tampered"
    assert line.run("--flags", "b: --text more") == 0 and line.calls() == ["b", "c"]
    assert "no --text, now --text more" in capsys.readouterr().out
    (line.data / "two.png").write_bytes(b"")
    assert line.run("--flags", "b: --text more") == 0 and line.calls() == ["a"]
    (line.data / "labels.csv").write_text("path,label\none.png,yes\n")
    assert line.run("--flags", "b: --text more") == 0 and sorted(line.calls()) == ["a", "b", "c"]
    line.manifest("a").write_text("{")
    with pytest.raises(ValueError, match="is damaged, or no JSON .*; delete it, and the stage is run again"):
        line.run()


def test_a_stage_that_fails_stops_the_line_and_leaves_no_manifest(line, capsys):
    line.run()
    line.calls()
    with pytest.raises(ValueError, match="stage b ended with exit code 1; .*log.txt"):
        line.run("--flags", "b: --fail 2")
    assert line.calls() == ["b"] and not line.manifest("b").exists()
    assert "nan in the loss" in capsys.readouterr().out
    assert "nan in the loss" in line.manifest("b").with_name("log.txt").read_text()
    with pytest.raises(ValueError, match="ended with exit code 3; its words"):
        line.run("--flags", "b: --fail 3")
    with pytest.raises(ValueError, match="stage b ended well and did not write .*made.txt"):
        line.run("--flags", "b: --write no")
    assert line.calls() == ["b", "b"]
    assert line.run() == 0 and line.calls() == ["b"]  # c is as it was, byte for byte


def test_an_exit_code_of_1_can_be_accepted(line):
    with pytest.raises(ValueError, match="look at it, then go on with --accept b"):
        line.run("--flags", "b: --fail 1")
    with pytest.raises(ValueError, match="did not write"):  # accepted, and yet it must have written its files
        line.run("--flags", "b: --fail 1", "--accept", "b")


def test_only_and_from(line, capsys):
    with pytest.raises(ValueError, match="stage a has not been done"):
        line.run("--only", "c")
    line.run("--only", "a", "b")
    assert sorted(line.calls()) == ["a", "b"]
    assert line.run("--from", "c") == 0 and line.calls() == ["c"]
    line.made("a").write_text("tampered")
    assert line.run("--only", "c") == 0 and line.calls() == ["c"]  # a is taken as it is
    with pytest.raises(ValueError, match="there is no stage d; there are"):
        line.run("--from", "d")
    with pytest.raises(ValueError, match="--flags d: there is no such stage"):
        line.run("--flags", "d: --steps 3")
    capsys.readouterr()
    assert line.run("--dry-run") == 0 and line.calls() == []
    assert capsys.readouterr().out.splitlines()[-1].startswith("python ")


def test_the_order_is_that_of_the_dependencies(line):
    args = pipeline.build_parser().parse_args(["--data", str(line.data), "--out", str(line.out)])
    table = pipeline.stages(args)
    assert [stage.name for stage in pipeline.in_order(table)][-1] == "c"
    circle = [table[1]._replace(after=("c",)), *table[::2]]
    with pytest.raises(graphlib.CycleError):
        pipeline.in_order(circle)


def test_the_real_table(tmp_path):
    """Each file that a stage reads is made by a stage that it comes after, or lies in --data."""
    for words in ([], ["--smoke"], ["--ckpt", "weights.pth", "--again", "labels were corrected"]):
        args = pipeline.build_parser().parse_args(["--data", str(tmp_path / "d"), "--out", str(tmp_path / "o"), *words])
        made, place = {}, {}
        table = pipeline.in_order(pipeline.with_flags(pipeline.stages(args), [], args.smoke))
        for k, stage in enumerate(table):
            assert all(name in place for name in stage.after)
            before = set(stage.after)
            while more := {name for s in table if s.name in before for name in s.after} - before:
                before |= more
            for item in stage.inputs:
                if item in made:
                    assert made[item] in before, (stage.name, item)
                else:
                    assert item == "images" or item == tmp_path / "d" / "labels.csv", (stage.name, item)
            made |= dict.fromkeys(stage.outputs, stage.name)
            place[stage.name] = k
            assert (pipeline.program(stage.words)[0], len(stage.words) > 2) == (sys.executable, True)
        names = [stage.name for stage in table]
        assert names[-9:] == "import duplicates split explora baseline predictions policy evaluate bundle".split()


@pytest.fixture
def quick_starts(started, tmp_path, monkeypatch):
    """Stages are forked from a process that has imported torch, which is half of their time at toy size."""

    def popen(words, stdout, stderr):
        assert (words[0], stdout, stderr) == (sys.executable, subprocess.PIPE, subprocess.STDOUT)
        log = tmp_path / "said"
        log.write_bytes(b"")
        process = started(words[1:], log)
        process.join()
        return SimpleNamespace(stdout=log.read_bytes().splitlines(keepends=True), wait=lambda: process.exitcode)

    names = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(pipeline, "subprocess", names)


@pytest.mark.slow
def test_smoke(tmp_path, capsys, quick_starts):
    """All stages; what they learned; done before; a byte of the weights changed."""
    words = ["--smoke", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    begin = time.time()
    assert pipeline.main(words) == 0
    print(f"{time.time() - begin:.0f} s")
    results = files.read_json_file(tmp_path / "run" / "evaluation" / "results.json", {"decided": dict}, "")
    assert results["decided"]["mcc"] > 0.3
    assert {"bundle.json", "SHA256SUMS", "policy.json"} <= {p.name for p in (tmp_path / "run" / "bundle").iterdir()}
    capsys.readouterr()
    assert pipeline.main(words) == 0
    assert capsys.readouterr().out.count("done before") == 10
