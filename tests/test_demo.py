"""The demo: its commands are real, it kills what it says it kills, and it claims no more than was found."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_ssl
from tools import demo

ROOT = Path(__file__).resolve().parent.parent
TOY_LEARN = (
    "--arch vit_test --global-size 32 --local-size 16 --local-crops 2 --prototypes 32 --head-hidden 32 "
    "--head-bottleneck 16 --batch-size 16 --layerscale 0.1 --gram-weight 0 --workers 1"
)


def parse(command):
    """The arguments of `python PROGRAM ...` or `torchrun ... PROGRAM ...`, by the program's own parser -> (name, args).

    A word that a parser does not know ends in SystemExit with its one line.
    """
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launcher = get_args_parser().parse_args(words[1:])
        words = ["python", launcher.training_script, *launcher.training_script_args]
    assert words[0] == "python", command
    program = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
    return words[1], program.build_parser().parse_args(words[2:])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_command_of_the_plan_is_one_that_the_programs_take(device):
    commands = [c for stage in demo.plan("runs/demo", device, 1.0, 400) for c in stage.commands]
    assert len(commands) == len(demo.NAMES) - 1  # the report is made here
    names = [parse(command)[0] for command in commands]
    assert [name for name in names if not (ROOT / name).exists()] == []
    for broken in (commands[0] + " --no-such-flag 1", commands[7].replace("--nproc-per-node", "--no-such-flag")):
        with pytest.raises(SystemExit):
            parse(broken)


def test_the_trial_run_and_the_run_differ_in_length_alone():
    stages = {stage.name: stage for stage in demo.plan("runs/demo", "cpu", 1.0, 400)}
    trial, real = (vars(parse(stages[name].commands[0])[1]) for name in ("speed", "train"))
    may = "out steps time_limit log_every save_every eval_every".split()
    assert {key for key in real if real[key] != trial[key]} <= set(may)
    assert real["steps"] == 400 and train_ssl.resolve(train_ssl.argparse.Namespace(**real), 1).micro_batch == 64


def write_lines(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_updates_per_minute_come_from_the_later_half(tmp_path):
    rates = [1, 2, 3, 100, 120, 110, 130]  # the first half is warming up
    write_lines(tmp_path, [{"step": k, "images_s": rate} for k, rate in enumerate(rates)])
    (tmp_path / "config.json").write_text(json.dumps({"args": {"batch_size": 50}}))
    assert demo.updates_per_minute(tmp_path) == pytest.approx(115 * 60 / 50)
    write_lines(tmp_path, [{"step": 0, "event": "started"}])
    with pytest.raises(ValueError, match="--stage speed"):
        demo.updates_per_minute(tmp_path)


def test_lines_that_a_resumed_run_repeats_count_once(tmp_path):
    write_lines(tmp_path, [{"step": s, "loss": v} for s, v in ((1, 5), (2, 4), (3, 9), (2, 4.5), (3, 3))])
    assert [row["loss"] for row in demo.read_lines(tmp_path, "loss")] == [5, 4.5, 3]
    assert demo.last_step(tmp_path) == 3 and demo.last_step(tmp_path / "none") == 0
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "lo')  # being written
    assert demo.last_step(tmp_path) == 3


# running

PRETEND = """
import json, signal, sys, time
from pathlib import Path

def stop(number, frame):
    if {saves}:
        (run / "last.pth").write_text("saved")
    raise RuntimeError("a traceback that would frighten")

signal.signal(signal.SIGTERM, stop)
run = Path(sys.argv[1])
print("hello from stderr", file=sys.stderr, flush=True)
for step in range(1, 1000):
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(dict(step=step)) + chr(10))
    time.sleep(0.02)
"""


@pytest.mark.parametrize("saves", [True, False])
def test_training_is_killed_at_the_step_and_not_before(tmp_path, capfdbinary, saves):
    (tmp_path / "pretend.py").write_text(PRETEND.format(saves=saves))
    command = f"python {tmp_path}/pretend.py {tmp_path}"
    if not saves:
        with pytest.raises(ValueError, match="left no checkpoint"):
            demo.call_and_kill(command, tmp_path, 20)
        assert b"frighten" in capfdbinary.readouterr().err  # now it matters
        return
    demo.call_and_kill(command, tmp_path, 20)
    assert 20 <= demo.last_step(tmp_path) < 200  # looked at every 0.2 s
    said = capfdbinary.readouterr()
    assert b"hello from stderr" in said.err and b"frighten" not in said.err
    assert b"kill -TERM" in said.out and b"exit code 1" in said.out


def toy_plan(out, device, minutes, steps):
    """Three stages that leave their name; `second` ends with code 1, which is fine there."""
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    return [
        demo.Stage(name, 1, "toy", [f"python -c {shlex.quote(script)} {out}/log {name} {code}"], fine)
        for name, code, fine in (("first", 0, (0,)), ("second", 1, (0, 1)), ("third", 0, (0,)))
    ]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "plan", toy_plan)
    monkeypatch.setattr(demo, "NAMES", ["first", "second", "third"])
    out = tmp_path / "demo"
    return lambda *flags: (demo.main(["--out", str(out), "--device", "cpu", *flags]), (out / "log").read_text())


def test_stages_run_in_order_alone_and_only_what_is_missing(toy, tmp_path, capfd):
    assert toy() == (0, "firstsecondthird")
    said = capfd.readouterr().out
    assert said.index("===== 1 of 3, first") < said.index("$ python -c") < said.index("1 of 3 stages, first done")
    assert "100%" in said
    assert toy("--stage", "second") == (0, "firstsecondthirdsecond")
    assert toy("--keep")[1] == "firstsecondthirdsecond"  # all are there
    notes = json.loads((tmp_path / "demo" / "demo.json").read_text())
    del notes["seconds"]["third"]
    (tmp_path / "demo" / "demo.json").write_text(json.dumps(notes))
    assert toy("--keep")[1].endswith("secondthird")
    assert toy() == (0, "firstsecondthird")  # anew


def test_a_stage_that_fails_ends_the_demo_and_names_itself(toy, monkeypatch):
    broken = [stage._replace(fine=(0,)) for stage in toy_plan("OUT", "", 0, 0)]
    monkeypatch.setattr(demo, "plan", lambda out, *_: [s._replace(commands=[c.replace("OUT", out) for c in s.commands])
                                                       for s in broken])  # fmt: skip
    with pytest.raises(ValueError, match="stage second ended with exit code 1.*--stage second"):
        toy()


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="holds no demo"):
        demo.main(["--out", str(tmp_path), "--device", "cpu"])
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_bad_flags_are_one_line(tmp_path):
    for flags, said in ((["--minutes", "0"], "--minutes"), (["--stage", "tea"], "tea"), (["--device", "tpu"], "tpu")):
        done = subprocess.run([sys.executable, ROOT / "tools" / "demo.py", "--out", tmp_path / "x", *flags],
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


# what is said


def auc(value, low, high):
    return {"auc": {"value": value, "low": low, "high": high}}


def findings(probe=(0.8, 0.7, 0.9), gain=(0.2, 0.1, 0.3, 0.01), code=0, resumed=(20,)):
    predictors = {"probe": auc(*probe), "random weights": auc(0.6, 0.5, 0.7), "size": auc(0.45, 0.3, 0.6)}
    judged = {"samples": 60, "patients": 27, "predictors": predictors, "verdict": "In long."}
    judged["differences"] = {"probe - random weights": dict(zip(("value", "low", "high", "p"), gain))}
    losses = [{"step": s, "dino": 5.5 - s / 40, "ibot": 2.8, "rankme": 9.0} for s in range(1, 41)]
    status = {"verdict": ["healthy", "starved", "one-hot"][code], "code": code, "findings": []}
    heat = ["Attention lights up: share 0.6 [0.5, 0.7].", "Similarity to its centre goes dark: less: auroc 0.2"]
    return demo.Findings(losses, 5.545, status, judged, heat, list(resumed))


@pytest.mark.parametrize(
    "probe, gain, said",
    [
        ((0.8, 0.7, 0.9), (0.2, 0.1, 0.3, 0.01), ": better"),
        ((0.8, 0.7, 0.9), (0.2, -0.1, 0.5, 0.2), "not shown to be better"),
        ((0.6, 0.45, 0.8), (0.2, 0.1, 0.3, 0.01), "not shown to be better"),  # beats what fails, and is chance itself
        ((0.5, 0.4, 0.6), (-0.2, -0.3, -0.1, 0.01), ": worse"),
    ],
)
def test_the_summary_claims_what_is_proven(probe, gain, said):
    lines = dict(demo.summary(findings(probe, gain)))
    assert lines["random weights"].endswith(said) and f"{gain[0]:+.3f}" in lines["random weights"]
    assert lines["data"] == demo.HONEST and "nothing about CT" in demo.HONEST
    assert lines["frozen probe"].startswith(f"{probe[0]:.3f} ({probe[1]:.3f} to ")
    assert lines["cls loss"].startswith("5.47 -> 4.50") and "5.5" in lines["cls loss"]
    assert lines["heatmaps"] == "Similarity to its centre goes dark: less"  # the last of two lines of that name


def test_a_baseline_below_chance_is_no_measure():
    found = findings()
    found.judged["differences"]["probe - size"] = dict(value=0.35, low=0.2, high=0.5, p=0.001)  # size: AUC 0.45
    assert dict(demo.summary(found))["size alone"].endswith(": better, by less than that: below 0.5 is chance")


def test_the_summary_names_a_collapse_and_a_run_that_was_not_killed():
    assert "one-hot" in dict(demo.summary(findings(code=2)))["collapse"]
    assert "no step" in dict(demo.summary(findings(resumed=())))["pretraining"]


def test_missing_parts_of_a_report_are_named(tmp_path):
    write_lines(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    with pytest.raises(FileNotFoundError, match="config.json is missing: run all stages"):
        demo.collect(tmp_path)


def test_dots_stand_where_the_numbers_are():
    """AUC 0.5 lies on the line of 0.5, and a higher one to the right by its share of the axis."""
    found = findings(probe=(0.5, 0.4, 0.6))
    size, orange = (616, 230), (255, 160, 48)  # sheet.COLOURS[0], the probe's
    places = {}
    for value in (0.5, 0.75, 1.0):
        found.judged["predictors"]["probe"]["auc"] = {"value": value, "low": value, "high": value}
        pixels = np.asarray(demo.draw_aucs(found, size))[:, 200:]  # right of the names
        _, x = np.nonzero((pixels == orange).all(-1))
        places[value] = x.mean() + 200
    assert places[0.75] - places[0.5] == pytest.approx(0.25 * 0.7 * (616 - 60), abs=1)
    assert places[1.0] - places[0.5] == pytest.approx(0.5 * 0.7 * (616 - 60), abs=1)
    reds = np.nonzero((np.asarray(demo.draw_aucs(found, size)) == (255, 106, 90)).all(-1))[1]  # the line of 0.5
    assert reds.mean() == pytest.approx(places[0.5], abs=1.5)


def test_the_pictures_in_the_readme_are_small():
    with Image.open(ROOT / "tools" / "demo.png") as image:
        assert image.width >= 1000
    assert (ROOT / "tools" / "demo.png").stat().st_size < 300_000


@pytest.mark.slow
def test_the_whole_demo_at_toy_sizes(tmp_path, monkeypatch, capfd):
    """All programs, by their commands; then every cheap stage alone again. About 4 minutes on one core."""
    monkeypatch.setattr(demo, "PHANTOM", "--patients 20 --slices 12 --size 96 --workers 2")
    monkeypatch.setattr(demo, "RATIOS", "train=0.4,val_select=0.1,val_test=0.5")
    monkeypatch.setattr(demo, "LEARN", TOY_LEARN)
    monkeypatch.setattr(demo, "PROBE", "--protocol test --crop-mm 24 --bootstrap 100")
    monkeypatch.setattr(demo, "HEATMAPS", "--n 4 --size 96")
    monkeypatch.setattr(demo, "LEAST", 200)  # long enough to be caught half-way
    out = tmp_path / "demo"
    flags = ["--out", str(out), "--device", "cpu"]
    assert demo.main([*flags, "--minutes", "0.001"]) == 0
    said = capfd.readouterr().out
    for name in demo.NAMES:
        assert f", {name}: " in said and f" {name} done: " in said
    found = demo.collect(out)
    assert [row["step"] for row in found.losses][-1] == 200 and len(found.resumed_at) == 1
    assert 0 < found.resumed_at[0] < 200
    assert demo.HONEST in said and "AUC" in said and "collapse" in said
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")  # "http" alone comes up in base64 by chance
    assert (out / "report.png").stat().st_size < 300_000 and demo.HONEST in page
    again = [name for name in demo.NAMES if name not in ("phantom", "speed", "train")]
    assert demo.main([*flags, "--stage", *again]) == 0
    assert demo.collect(out).judged["predictors"] == found.judged["predictors"]
