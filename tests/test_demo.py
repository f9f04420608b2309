"""The demo: its commands are real, it kills what it says it kills, and it claims no more than was found."""

import importlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train_ssl
from tools import demo
from tools.lib import judge, settings, sheet

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
    commands = [c for stage in demo.plan("runs/demo", device, 1.0, 400, "data/ct_samples") for c in stage.commands]
    assert all(stage.commands for stage in demo.plan("runs/demo", device, 1.0, 400)[:-1])  # the report is made here
    names = [parse(command)[0] for command in commands]
    assert [name for name in names if not (ROOT / name).exists()] == []
    (launched,) = (command for command in commands if command.startswith("torchrun"))
    for broken in (commands[0] + " --no-such-flag 1", launched.replace("--nproc-per-node", "--no-such-flag")):
        with pytest.raises(SystemExit):
            parse(broken)


def test_the_trial_run_and_the_run_differ_in_length_alone():
    stages = {stage.name: stage for stage in demo.plan("runs/demo", "cpu", 1.0, 400)}
    trial, real = (vars(parse(stages[name].commands[0])[1]) for name in ("speed", "train"))
    may = "out steps time_limit log_every save_every eval_every".split()
    assert {key for key in real if real[key] != trial[key]} <= set(may)
    assert real["steps"] == 400 and settings.resolve(train_ssl.argparse.Namespace(**real), 1).micro_batch == 64


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


def test_the_last_step_is_that_of_whole_lines(tmp_path):
    write_lines(tmp_path, [{"step": s, "loss": v} for s, v in ((1, 5), (2, 4), (3, 9), (2, 4.5), (3, 3))])
    assert demo.last_step(tmp_path) == 3 and demo.last_step(tmp_path / "none") == 0
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "lo')  # being written
    assert demo.last_step(tmp_path) == 3


# how long


def quiet_seconds(slow=1.0):
    """Of the stages before training, on a machine that is so many times slower."""
    stages = demo.plan("", "cpu", demo.MINUTES["cpu"], 0)[: demo.NAMES.index("train")]
    return {stage.name: slow * stage.seconds for stage in stages}


STAGES = demo.plan("", "cpu", demo.MINUTES["cpu"], 0)
QUIET_REST = demo.STARTS_S + sum(stage.seconds for stage in STAGES[demo.NAMES.index("train") + 1 :])


@pytest.mark.parametrize("slow", [0.5, 1, 1.5, 2, 2.4])
def test_the_whole_takes_six_minutes_on_a_slow_machine_too(slow):
    """As long as the rest fits at all: 121 quiet seconds and the two starts of pretraining do below 2.5 times."""
    rate = 5 / max(slow, 1)  # updates a second
    notes = {"seconds": quiet_seconds(slow), "minutes": None, "updates_per_minute": 60 * rate}
    steps, seconds = demo.budget(STAGES, notes)
    whole = sum(notes["seconds"].values()) + seconds + max(slow, 1) * QUIET_REST
    assert whole == pytest.approx(demo.PROMISE_S) and demo.PROMISE_S < 360
    assert steps <= rate * seconds
    assert steps == 900 if slow <= 1 else demo.LEAST < steps < 900  # no more than three quiet minutes make


@pytest.mark.parametrize("slower", [1, 1.5, 2, 3])
def test_a_neighbour_who_comes_during_pretraining_shortens_its_second_half(slower):
    notes = {"seconds": quiet_seconds(), "minutes": None, "updates_per_minute": 300}
    steps, seconds = demo.budget(STAGES, notes)
    used = min(slower * steps / 2 / 5, seconds / 2)
    left = demo.budget_again(STAGES, notes, int(used * 5 / slower), used)
    rest = (1 + slower) / 2 * QUIET_REST
    assert sum(notes["seconds"].values()) + used + left + rest == pytest.approx(demo.PROMISE_S, abs=2)
    if slower == 1:
        assert left > steps / 2 / 5  # all updates fit


def test_the_least_is_made_whatever_is_left():
    notes = {"seconds": quiet_seconds(6), "minutes": None, "updates_per_minute": 60}
    assert demo.budget_again(STAGES, notes, demo.LEAST // 4, 50) == pytest.approx(150)  # 10 of 40 took 50 s
    assert demo.budget_again(STAGES, notes, 2 * demo.LEAST, 50) == 6
    notes["minutes"] = 3
    assert demo.budget_again(STAGES, notes, 100, 50) == 130


def test_one_slow_stage_is_not_the_pace_of_all():
    stages = STAGES[: demo.NAMES.index("train")]
    assert demo.pace(stages, quiet_seconds() | {"phantom": 160}) == 1
    assert demo.pace(stages, quiet_seconds(3)) == 3 and demo.pace(stages, {}) == 1


def test_a_machine_that_is_too_slow_makes_the_least_that_is_worth_looking_at():
    notes = {"seconds": quiet_seconds(6), "minutes": None, "updates_per_minute": 20}
    steps, seconds = demo.budget(STAGES, notes)
    assert steps == demo.LEAST and seconds == pytest.approx(60 * demo.LEAST / 20)


def test_minutes_that_are_asked_for_are_given_whatever_the_rest_takes():
    notes = {"seconds": quiet_seconds(6), "minutes": 10, "updates_per_minute": 50}
    steps, seconds = demo.budget(demo.plan("", "cpu", 10, 0), notes)
    assert steps == 500 and seconds == 600


def test_the_second_half_is_held_to_what_is_left(tmp_path, monkeypatch, capsys):
    now, commands = [1000.0], []

    def call_and_kill(command, run_dir, at_step, seconds):
        assert command == "train --steps 100" and (at_step, seconds) == (50, (90 + demo.STARTS_S) / 2)
        now[0] += 30
        write_lines(run_dir, [{"step": 50}])

    def budget_again(stages, notes, done, used):
        assert (stages, notes, done, used) == (STAGES, {}, 50, 30)
        return 60

    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(demo, "call_and_kill", call_and_kill)
    monkeypatch.setattr(demo, "budget_again", budget_again)
    monkeypatch.setattr(demo, "call", commands.append)
    demo.train("train --steps 100", tmp_path, 100, 90, STAGES, {})
    assert commands == ["train --steps 100 --time-limit 1.00"] and "1.0 minutes" in capsys.readouterr().out
    assert "time_limit" in train_ssl.HARMLESS  # else it would be another run


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
            demo.call_and_kill(command, tmp_path, 20, 60)
        assert b"frighten" in capfdbinary.readouterr().err  # now it matters
        return
    demo.call_and_kill(command, tmp_path, 20, 60)
    assert 20 <= demo.last_step(tmp_path) < 200  # looked at every 0.2 s
    printed = capfdbinary.readouterr()
    assert b"hello from stderr" in printed.err and b"frighten" not in printed.err
    assert b"kill -TERM" in printed.out and b"exit code 1" in printed.out


def test_training_is_killed_when_half_of_its_time_is_over(tmp_path, capfdbinary):
    (tmp_path / "pretend.py").write_text(PRETEND.format(saves=True))
    demo.call_and_kill(f"python {tmp_path}/pretend.py {tmp_path}", tmp_path, 10**6, 0)
    assert 1 <= demo.last_step(tmp_path) < 200  # once there is something to save
    assert b"kill -TERM" in capfdbinary.readouterr().out


def toy_plan(out, device, minutes, steps, real=None):
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
    monkeypatch.setattr(demo, "budget", lambda stages, notes: (10, 10))
    out = tmp_path / "demo"
    return lambda *flags: (demo.main(["--out", str(out), "--device", "cpu", *flags]), (out / "log").read_text())


def test_stages_run_in_order_alone_and_only_what_is_missing(toy, tmp_path, capfd):
    assert toy() == (0, "firstsecondthird")
    printed = capfd.readouterr().out
    places = [printed.index(text) for text in ("===== 1 of 3, first", "$ python -c", "1 of 3 stages, first done")]
    assert places == sorted(places) and "100%" in printed
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


@pytest.mark.slow
def test_bad_flags_are_one_line(tmp_path):
    for flags, word in ((["--minutes", "0"], "--minutes"), (["--stage", "tea"], "tea"), (["--device", "tpu"], "tpu")):
        done = subprocess.run([sys.executable, ROOT / "tools" / "demo.py", "--out", tmp_path / "x", *flags],
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


# what is claimed


def auc(value, low, high):
    return {"auc": {"value": value, "low": low, "high": high}}


def make_results(probe=(0.8, 0.7, 0.9), gain=(0.2, 0.1, 0.3, 0.01), code=0, resumed=(20,), steps=40):
    predictors = {"probe": auc(*probe), "random weights": auc(0.6, 0.5, 0.7), "size": auc(0.45, 0.3, 0.6),
                  "size + features": auc(0.5, 0.4, 0.6)}  # fmt: skip
    judged = {"samples": 60, "patients": 27, "predictors": predictors, "verdict": "In long."}
    judged["differences"] = {"probe - random weights": dict(zip(("value", "low", "high", "p"), gain))}
    judged["settings"] = {"size + features": ["size alone", 0.1, "size alone"]}
    losses = [{"step": s, "loss": 1.0, "dino": 5.5 - s / 40, "ibot": 2.8, "rankme": 9.0} for s in range(1, 41)]
    status = {"verdict": ["healthy", "starved", "one-hot"][code], "code": code, "step": 40, "findings": []}
    heat = ["Attention lights up: share 0.6 [0.5, 0.7].", "Similarity to its centre goes dark: less: auroc 0.2"]
    return demo.Results(losses, steps, math.log(256), status, judged, heat, list(resumed))


@pytest.mark.parametrize(
    "probe, gain, claim",
    [
        ((0.8, 0.7, 0.9), (0.2, 0.1, 0.3, 0.01), ": pretraining helps"),
        ((0.8, 0.7, 0.9), (0.2, -0.1, 0.5, 0.2), ": pretraining is not shown to help"),
        ((0.6, 0.45, 0.8), (0.2, 0.1, 0.3, 0.01), ": pretraining is not shown to help"),  # itself at chance
        ((0.5, 0.4, 0.6), (-0.2, -0.3, -0.1, 0.01), ": pretraining harms"),
    ],
)
def test_the_summary_claims_what_is_proven(probe, gain, claim):
    results = make_results(probe, gain)
    lines = dict(demo.summary(results))
    assert lines["random weights"].endswith(claim) and f"{gain[0]:.3f}" in lines["random weights"]
    assert "nothing about CT" in demo.HONEST
    assert lines["frozen probe"] == f"{probe[0]:.3f} ({probe[1]:.3f} to {probe[2]:.3f})"
    assert lines["cls loss"] == "5.47 -> 4.50; a net that knows nothing has 5.55"
    assert lines["heatmaps"] == "Similarity to its centre goes dark: less"  # the last of two lines of that name
    assert lines["size alone"] == "0.450 (0.300 to 0.600)"  # not compared: nothing is claimed


def test_the_summary_says_how_often_features_were_given_up():
    assert f"({judge.fits.ALONE} in 2 of 3 fits)" in dict(demo.summary(make_results()))["size + features"]


def test_the_summary_names_a_collapse_and_a_run_that_was_not_killed_or_had_little_time(monkeypatch):
    assert "one-hot" in dict(demo.summary(make_results(code=2)))["collapse"]
    assert "40 updates of 90: the machine became slower" in dict(demo.summary(make_results(steps=90)))["pretraining"]
    few = "40 updates, the least: this machine is slow or busy; killed, and resumed at no step"
    assert dict(demo.summary(make_results(resumed=())))["pretraining"] == few
    monkeypatch.setattr(demo, "LEAST", 30)
    assert dict(demo.summary(make_results()))["pretraining"] == "40 updates; killed, and resumed at 20"


def make_parts(out):
    """What the stages leave and the report reads."""
    results = make_results()
    events = [{"step": 0, "event": "started"}, {"step": 20, "event": "resumed from x"}]
    write_lines(out / "run", events + results.losses)
    parts = {
        "run/config.json": {"args": {"prototypes": 256, "steps": 40}},
        "run/monitor/status.json": results.status,
        "run/probe/results.json": {"test": results.judged},
        "run/heatmaps/heatmaps.json": {"verdict": results.heat},
    }
    for name, value in parts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(value))
    grey = Image.new("RGB", (600, 300), "#808080")
    pictures = ("run/monitor/step_00000009", "run/monitor/step_00000040", "run/heatmaps", "processed/_validation")
    names = ("sheet.png", "sheet.png", "heatmaps.png", "samples_all_0.png")
    for folder, name in zip(pictures, names):
        sheet.save(out / folder / name, grey)
    sheet.save(out / "sample.png", Image.new("RGB", (1500, 200), "#50c0ff"))
    return results


def test_the_report_is_made_of_what_the_programs_left(tmp_path, capsys):
    results = make_parts(tmp_path)
    assert demo.collect(tmp_path) == results
    notes = {"seconds": {"train": 90.0, "samples": 30.0}, "machine": "2 CPU cores"}
    demo.report_all(tmp_path, demo.plan("runs/demo", "cpu", 1.0, 40), notes)
    printed, html = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in ("2.0 minutes on 2 CPU cores", demo.HONEST, "pretraining helps", "cls loss"):
        assert text in printed and text in html
    assert html.count("data:image/png;base64,") == 3 and html.count("<svg") == 3
    assert 'href="run/monitor/step_00000040/sheet.png"' in html  # of the newest look
    assert "--stage" not in html and html.count("train_ssl.py") == 2 and 'class="warn"' not in html
    with Image.open(tmp_path / "report.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert picture.width == 1516  # as wide as the sheet of samples, with its margin
    near = [max(map(abs, (r - 0x50, g - 0xC0, b - 0xFF))) for r, g, b in colours]
    assert min(near) < 8, "the sheet of samples is not in the picture"
    sheet.save(tmp_path / "run" / "heatmaps" / "nodule_01.png", Image.new("RGB", (700, 900), "#ff2080"))
    demo.write_picture(results, tmp_path, notes)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1516 and picture.height > 1400
    assert (tmp_path / "report.png").stat().st_size < 300_000


def test_a_number_of_the_picture_stands_there_once(tmp_path, monkeypatch):
    results, said = make_parts(tmp_path), []
    monkeypatch.setattr(demo.sheet, "paragraphs", lambda lines, *more: said.extend(lines) or Image.new("RGB", (9, 9)))
    demo.write_picture(results, tmp_path, {"seconds": {"train": 90.0}, "machine": "2 CPU cores"})
    text = " ".join(said)
    assert "Probe minus random weights 0.200 (0.100 to 0.300), p = 0.01: pretraining helps." in text
    assert "0.800" not in text and "5.47" not in text  # AUCs and losses stand in the charts
    assert "killed, and resumed at 20. Monitor: healthy." in text and "Attention lights up." in text


def test_missing_parts_of_a_report_are_named(tmp_path):
    write_lines(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    with pytest.raises(FileNotFoundError, match="config.json does not exist; run all stages first"):
        demo.collect(tmp_path)


def test_the_pictures_in_the_readme_are_small():
    with Image.open(ROOT / "tools" / "demo.png") as image:
        assert image.width >= 1000
    assert (ROOT / "tools" / "demo.png").stat().st_size < 300_000


@pytest.mark.slow
def test_the_whole_demo_at_toy_sizes(tmp_path, monkeypatch, capfd):
    """All programs, by their commands; then every cheap stage alone again, most of them without a new process."""
    monkeypatch.setattr(demo, "PHANTOM", "--patients 20 --slices 12 --size 96 --workers 2")
    monkeypatch.setattr(demo, "RATIOS", "train=0.4,val_select=0.1,val_test=0.5")
    monkeypatch.setattr(demo, "LEARN", TOY_LEARN)
    monkeypatch.setattr(demo, "PROBE", "--protocol test --crop-mm 24 --bootstrap 100")
    monkeypatch.setattr(demo, "HEATMAPS", "--n 4 --size 96")
    monkeypatch.setattr(demo, "LEAST", 200)  # long enough to be caught half-way
    out = tmp_path / "demo"
    flags = ["--out", str(out), "--device", "cpu"]
    assert demo.main([*flags, "--minutes", "0.001"]) == 0
    printed = capfd.readouterr().out
    for name in demo.NAMES:
        assert f", {name}: " in printed and f" {name} done: " in printed
    results = demo.collect(out)
    last = results.status["step"]
    assert last == 200 or f"{last} updates of 200: the machine became slower" in printed
    assert len(results.resumed_at) == 1 and 0 < results.resumed_at[0] < last
    assert demo.HONEST in printed and "AUC" in printed and "collapse" in printed
    assert (tmp_path / "demo" / "processed" / "_splits" / "test_uses.jsonl").exists()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")  # "http" alone comes up in base64 by chance
    assert (out / "report.png").stat().st_size < 300_000 and demo.HONEST in page
    start, begun = demo.call, []

    def call(command):
        _, name, *flags = shlex.split(command)
        begun.append(name)
        if name == "train_probe.py":  # as many threads as before give the same numbers
            return start(command)
        return importlib.import_module(name.removesuffix(".py").replace("/", ".")).main(flags)

    monkeypatch.setattr(demo, "call", call)
    again = [name for name in demo.NAMES if name not in ("phantom", "speed", "train")]
    assert demo.main([*flags, "--stage", *again]) == 0
    assert len(begun) == 11 and demo.collect(out).judged["predictors"] == results.judged["predictors"]


def test_the_walk_of_photographs_ends_with_one_page(tmp_path, monkeypatch, capsys):
    ran = []

    def call(command):
        ran.append(parse(command)[0])
        if ran[-1] == "tools/pipeline.py":
            (tmp_path / "d" / "run" / "evaluation").mkdir(parents=True)
            (tmp_path / "d" / "run" / "evaluation" / "report.html").write_text("a page")
        return 0

    monkeypatch.setattr(demo, "call", call)
    assert demo.main(["--photos", "--out", str(tmp_path / "d"), "--device", "cpu"]) == 0
    assert ran == ["tools/pipeline.py", "tools/predict.py"] and (tmp_path / "d" / "report.html").read_text() == "a page"
    assert "drawings" in capsys.readouterr().out
    monkeypatch.setattr(demo, "call", lambda command: 2)
    with pytest.raises(ValueError, match="ended with exit code 2"):
        demo.main(["--photos", "--out", str(tmp_path / "d"), "--device", "cpu"])
    with pytest.raises(ValueError, match="stages of its own"):
        demo.main(["--photos", "--stage", "probe"])
