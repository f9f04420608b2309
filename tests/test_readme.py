"""The README tells the truth: every command is known to its program, and run here unless it is marked `# needs ...`."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_demo import ROOT, parse

README = (ROOT / "README.md").read_text()
OTHERS = ("pip", "pytest", "ruff", "bash", "export", "cd", ". ", "mail", "head=")  # how lines begin that are not ours
# small enough for a test; of a flag that is given twice the last counts
TOY = {
    "tools/make_phantom.py": "--patients 20 --slices 12 --size 96 --workers 1",
    "tools/preprocess_dicom.py": "--workers 1",
    "tools/validate_samples.py": "--n 2",
    "tools/check_duplicates.py": "--workers 1",
    "tools/make_roadwork.py": "--images 80 --size 144x192 --frames-per-scene 1 --object-share 0.01 0.05 --workers 1",
    "tools/make_splits.py": "--min-per-class 1",
    "train_ssl.py": "--arch vit_test --steps 4 --batch-size 8 --global-size 32 --local-size 16 --local-crops 2 "
    "--prototypes 32 --head-hidden 32 --head-bottleneck 16 --workers 0 --eval-every 0 --layerscale 0.1 --device cpu",
    "monitor.py": "--slices 8 --images 1 --device cpu",
    "train_probe.py": "--protocol test --bootstrap 50 --seeds 1 --crop-mm 32 --size 32 --device cpu --workers 1",
    "tools/nodule_heatmaps.py": "--n 4 --size 96 --device cpu",
    "tools/evaluate.py": "--bootstrap 20 --errors 2",
}
CHOSEN = "--size 32 --device cpu --workers 1"  # instead, where train_probe.py chooses on val_select or trains
TUNED = f"{CHOSEN} --steps 2 --batch-size 8"
BUNDLED = "--force toys"  # minutes of training would be needed to beat the majority
ELSEWHERE = {"tools/demo.py": "demo.main(", "tools/check_platform.py": "cp.main(", "tools/bench.py": "bench.main("}
REJECTS = {"tools/preprocess_dicom.py": (0, 1)}  # the phantom's scout views


def blocks():
    """[(language, lines)] of the README's code: fenced, or ("") indented by four spaces."""
    found, fenced, before = [], False, ""
    for line in README.splitlines():
        if line.startswith("```"):
            fenced = not fenced
            found += [(line[3:], [])] * fenced
        elif fenced:
            found[-1][1].append(line)
        elif line.startswith("    "):
            found += [("", [])] * (not before.startswith("    "))
            found[-1][1].append(line[4:])
        before = line
    return found


def lines_of_commands():
    """[(line without its comment, what it needs or "")] of all shell blocks."""
    for language, lines in blocks():
        if language or lines[0].startswith(("data/", "#!")) and not any("# needs" in line for line in lines):
            continue
        whole = next((line for line in lines if line.startswith("# needs")), "")
        for line in lines:
            command, _, needs = line.partition("      # needs ")
            if command and not command.startswith("#"):
                yield command, needs or whole


def ours(line):
    """Commands of a line that run a program of this repository, without what stands before and after them."""
    for part in re.split(r"\s*(?:&&|\|\|)\s*", line):
        part = re.sub(r"^(0 7 \* \* \* |srun \S+ )| > .*$", "", part).replace(".venv/bin/python", "python")
        if part.startswith(("python tools/", "python train_", "python monitor.py", "torchrun ")):
            yield part
        else:
            assert part.startswith(OTHERS), f"README: what is {part!r}?"


LINES = list(lines_of_commands())
COMMANDS = [(command, needs) for line, needs in LINES for command in ours(line)]


def test_there_is_something_to_check():
    assert len(COMMANDS) > 40 and sum(not needs for _, needs in COMMANDS) > 20
    assert {parse(command)[0] for command, _ in COMMANDS} >= {"train_ssl.py", "train_probe.py", "monitor.py"}
    tools = [p for p in (ROOT / "tools").glob("*.py") if "def build_parser" in p.read_text()]
    programs = {p.relative_to(ROOT).as_posix() for p in tools}
    assert sorted(name for name in programs if name not in README) == []


@pytest.mark.parametrize("command", sorted({command for command, _ in COMMANDS}))
def test_a_command_is_one_that_the_program_takes(command):
    name, _ = parse(command)
    assert (ROOT / name).exists()
    with pytest.raises(SystemExit):
        parse(command.replace(" -- ", " --no-such-flag -- ") if " -- " in command else f"{command} --no-such-flag")


def test_commands_inside_the_text_are_real_too():
    inline = re.findall(r"`((?:python|torchrun|pytest) [^`]+)`", README)
    assert len(inline) >= 8
    for command in inline:
        if command.startswith("pytest"):
            words = shlex.split(command)[1:]
            files = [ROOT / word for word in words if word.endswith(".py")]
            text = "".join(path.read_text() for path in files or (ROOT / "tests").glob("test_*.py"))
            if "-k" in words:
                for word in words[words.index("-k") + 1].split(" or "):
                    assert re.search(rf"def test_\w*{word}", text), f"{command}: no test has {word} in its name"
        else:
            parse(command)


def test_every_flag_in_the_text_exists():
    known = {"--nproc-per-node", "--check"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        if "\ndef build_parser(" in path.read_text():
            module = importlib.import_module(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
            known |= {flag for action in module.build_parser()._actions for flag in action.option_strings}
    text = "\n".join(line for line in README.splitlines() if not line.startswith("    "))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text.replace("--w-NAME", "")))
    assert len(named) > 20 and named <= known, named - known


def test_every_file_in_the_text_exists():
    named = {*re.findall(r"`((?:tools|tests)/[\w./-]*|\w+\.py)`", README), *re.findall(r"\]\(([\w/.]+)\)", README)}
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / name).exists() and not (ROOT / "tools" / name).exists()) == []
    for line, _ in LINES:
        for script in re.findall(r"bash (\S+)", line):
            assert (ROOT / script).exists(), script


def test_links_inside_the_page_lead_somewhere():
    heads = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.*)$", README, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= heads


def test_what_is_run_elsewhere_is_run_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name)
    assert [name for name, call in ELSEWHERE.items() if call not in tests] == []
    ci = (ROOT / ".ci" / "run").read_text()
    rest = {part for line, needs in LINES if not needs for part in line.split(" && ") if not list(ours(part))}
    for part in rest - {"pip install -r requirements.txt", "pytest"}:  # those two are what .ci/run takes from here
        assert part in ci, f"README: {part!r} is run by nothing"


def test_no_phantom_number_is_called_one_of_lidc():
    """A number beside LIDC is the size of the collection or somebody else's, and named as such."""
    for line in README.splitlines():
        if re.search(r"LIDC", line) and (found := re.findall(r"\b0\.\d{2,}\b", line)):
            assert set(found) <= {"0.945"}, line  # the ruler's, of others
    assert "not measured yet" in README and "nothing about CT" in README


def run_small(command):
    """A command of the README at toy size, in this process -> exit code."""
    name, _ = parse(command)
    small = TUNED if " --tune " in command else CHOSEN if "--protocol select" in command else TOY.get(name, "")
    small = BUNDLED if name == "tools/release.py" and "--policy" in command else small
    words = shlex.split(command[command.index(name) :])[1:] + shlex.split(small)
    if "--extend" in words:
        words += ["--extend", "2"]
    torch.set_num_threads(1)  # the monitor takes two
    return name, importlib.import_module(name.removesuffix(".py").replace("/", ".")).main(words)


@pytest.mark.slow
def test_every_command_that_needs_nothing_runs(tmp_path, monkeypatch, capsys):
    """In the order of the page, from an empty folder; then the Python examples on what it left."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for command, needs in COMMANDS:
        if needs or parse(command)[0] in ELSEWHERE:
            continue
        name, code = run_small(command)
        assert code in REJECTS.get(name, (0,)), f"{command}: exit code {code}\n{capsys.readouterr().out[-2000:]}"
        ran.append(command)
    assert len(ran) >= 18
    made = "monitor/report.html probe/report.html heatmaps/heatmaps.png".split()
    made = [f"runs/first/{name}" for name in made] + ["runs/frozen/evaluation/report.html", "said/images.csv"]
    for path in [*made, "release/first/model.safetensors"]:
        assert (tmp_path / path).stat().st_size > 0
    for language, lines in blocks():
        if language == "python" and not lines[0].startswith("# needs"):
            exec("\n".join(lines), {})  # noqa: S102 - the page's own examples
    assert "torch.Size([4, 4, 64]) torch.Size([4, 196, 64])" in capsys.readouterr().out


@pytest.mark.parametrize("language, lines", [b for b in blocks() if b[0] == "python"])
def test_python_examples_are_python(language, lines):
    compile("\n".join(lines), "README.md", "exec")
