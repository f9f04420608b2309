"""The house rules that a machine can check: imports, flags that are read, a quick and harmless --help."""

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lib import cli

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {  # what each may import beside the standard library; never a file of ours
    "model.py": {"torch", "safetensors"},
    "data.py": {"torch", "numpy", "PIL", "pillow_heif"},  # the last is an optional extra
    "losses.py": {"torch"},
    "checkpoint.py": {"torch"},
}
PROGRAMS = {
    "train_ssl.py": {"torch", "numpy", "tqdm"},
    "train_probe.py": {"torch", "numpy", "tqdm", "PIL"},
    "monitor.py": {"torch", "numpy", "PIL"},
}
TOOLS = {"torch", "numpy", "pydicom", "PIL", "safetensors", "tqdm"}
COPIED = "metrics calibrate conformal fusion optim".split()  # of tools/lib: numpy and torch only, copied alone
TOP_LEVEL = sorted(LEAVES | PROGRAMS)
OURS = {Path(name).stem for name in TOP_LEVEL} | {"tools"}


def top_of(module):
    return module.split(".")[0]


@functools.lru_cache(2)  # tests of one file stand together, see each_file
def nodes(source):
    return list(ast.walk(ast.parse(source)))


def imported_programs(source, name):
    """Programs that a file imports anywhere, inside functions too; bench.py may import the trainers it measures."""
    programs = {p.stem for p in (ROOT / "tools").glob("*.py")} - {"__init__"}
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {n for n in names if n.count(".") == 1 and n.startswith("tools.") and n.split(".")[1] in programs}
        measured = name == "tools/bench.py"
        found |= {n for n in names if f"{n}.py" in PROGRAMS and not (measured and n.startswith("train_"))}
    return sorted(found)


def imports(path, everywhere=True):
    """Third-party and own modules of a file; everywhere=False leaves out optional extras inside functions."""
    found = nodes(path.read_text())
    inner = {n for f in found if isinstance(f, ast.FunctionDef) and not everywhere for n in ast.walk(f)}
    names = set()
    for node in found:
        if node in inner:
            continue
        if isinstance(node, ast.Import):
            names |= {top_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add(top_of(node.module))
    return names - set(sys.stdlib_module_names)


def existing(names):
    return [name for name in names if (ROOT / name).exists()]


def modules_of(folder):
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py")


def programs():
    """Everything a user can run: defines build_parser()."""
    return existing(PROGRAMS) + modules_of("tools")


# scope: pytest then runs what is asked of one file together, and it is parsed once
each_file = pytest.mark.parametrize("name", programs() + modules_of("tools/lib"), scope="module")


def test_top_level_python_files_are_the_house():
    assert {p.name for p in ROOT.glob("*.py")} <= set(TOP_LEVEL)


@pytest.mark.parametrize("name", existing(LEAVES))
def test_leaf_can_be_copied_alone(name):
    assert imports(ROOT / name) <= LEAVES[name]


IMPORTER = """
import importlib, os, sys
import torch  # once: it takes seconds
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.path[0] = name
        importlib.import_module(name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_leaves_import_in_an_empty_folder(tmp_path):
    names = [Path(name).stem for name in existing(LEAVES)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    words = [sys.executable, "-c", IMPORTER, *names]
    subprocess.run(words, cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"]})


@each_file
def test_every_other_file_imports_only_what_is_allowed(name):
    found = imports(ROOT / name, everywhere=False)
    assert found - OURS <= PROGRAMS.get(name, TOOLS)
    assert not imported_programs((ROOT / name).read_text(), name), "programs are run, not imported"


def test_an_imported_program_is_noticed_wherever_the_import_stands():
    planted = "def f():\n    from tools import make_splits\n    import tools.demo, train_ssl\n"
    assert imported_programs(planted, "tools/bench.py") == ["tools.demo", "tools.make_splits"]
    assert "train_ssl" in imported_programs(planted, "tools/lib/loop.py")


# may score on val_test; each look is recorded
TESTERS = ("train_probe.py", "tools/nodule_heatmaps.py", "tools/evaluate.py")


def doors(source):
    """Ways to images or splits in a file: calls that may open val_test, and files of _splits/ that are named."""
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            purpose = node.args[1] if len(node.args) > 1 else None
            harmless = isinstance(purpose, ast.Constant) and purpose.value in ("fit", "select", "calibrate")
            if name in ("split_names", "record_look") or name == "open_for" and not harmless:
                found.add(name)
        elif isinstance(node, ast.Constant) and node.value == "test_uses.jsonl":
            found.add(node.value)
    return found


@each_file
def test_val_test_has_one_door(name):
    # validate_samples draws pictures and refuses val_test; samples is for testers; asking exports, without a score
    some = ("tools/validate_samples.py", "tools/lib/samples.py", "tools/lib/asking.py")
    allowed = {"open_for", "split_names", "record_look"} if name in TESTERS else {"open_for"} if name in some else set()
    without_score = "tools/lib/asking.py", "tools/lib/baseline.py"  # the second exports what its probe says of nodules
    assert ("NO_SCORE" in (ROOT / name).read_text()) == (name in without_score)
    assert doors((ROOT / name).read_text()) <= allowed


def test_a_second_door_is_noticed():
    assert doors('def f(p):\n    return data.open_for("x", "test", {})') == {"open_for"}
    assert doors('def f(p):\n    return open_for("x", p)') == {"open_for"}
    assert doors("data.record_look(root, {})") == {"record_look"}
    assert doors('split_names(s); open_for("x", "fit")') == {"split_names"}
    assert doors('open(p / "test_uses.jsonl")') == {"test_uses.jsonl"}


@each_file
def test_json_files_are_written_in_one_way(name):
    """files.write_json: null where a number is NaN, a folder that is made, an atomic write."""
    for call in nodes((ROOT / name).read_text()):
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("write_text", "atomic_write"):
            found = ast.unparse(call)
            assert "json.dumps" not in found or ".jsonl" in found or name == "tools/lib/files.py", (name, call.lineno)


@each_file
def test_bars_are_drawn_for_people_only(name):
    """disable=None: where nobody watches (cron, a pipe), no bar fills the log."""
    for node in nodes((ROOT / name).read_text()):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("tqdm", "trange"):
            of_people = any(k.arg == "disable" and k.value.value is None for k in node.keywords)
            assert of_people or name == "tools/lib/progress.py", (name, node.lineno)


@pytest.mark.parametrize("name", modules_of("tools/lib"))
def test_a_module_does_not_run(name):
    text = (ROOT / name).read_text()
    assert "\nif __name__" not in text and "\ndef build_parser" not in text and "\nsys.path" not in text
    if Path(name).stem in COPIED:
        assert imports(ROOT / name) <= {"numpy", "torch"}


@pytest.mark.parametrize("name", programs())
def test_a_program_runs(name):
    text = (ROOT / name).read_text()
    assert "\ndef build_parser(" in text and 'if __name__ == "__main__":' in text


@pytest.mark.parametrize("name", programs())
def test_every_flag_is_read_and_explained(name):
    module = importlib.import_module(name[:-3].replace("/", "."))
    source = (ROOT / name).read_text()
    # the modules that a trainer imports read flags too
    modules = re.search(r"^from tools\.lib import (\([^)]*\)|.*)$", source, re.M)
    for lib in re.findall(r"\w+", modules[1]) if modules and name.startswith("train_") else ():
        source += (ROOT / "tools" / "lib" / f"{lib}.py").read_text()
    for action in module.build_parser()._actions:
        if action.dest == "help":
            continue
        assert re.search(rf"\bargs(\.|, \"){action.dest}\b", source), f"{name}: --{action.dest} is read nowhere"
        assert action.help, f"{name}: --{action.dest} has no help"
        assert action.type is not bool, f"{name}: type=bool makes 'False' true"


def processor_seconds(words, folder):
    """(seconds, what it printed): wall time of a shared machine says little."""
    process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE)
    out = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, out


@pytest.fixture(scope="module")
def import_seconds():
    """Of torch alone: 1.3 s when the machine is quiet."""
    return processor_seconds(["-c", "import torch"], ROOT)[0]


ALONE = ("train_ssl.py", "monitor.py", "tools/make_phantom.py")  # tried in a process of their own, others in this one


@pytest.mark.parametrize("name", ALONE)
def test_help_is_quick_and_touches_nothing(name, tmp_path, import_seconds):
    seconds, out = processor_seconds([ROOT / name, "--help"], tmp_path)
    assert out.startswith("usage:")
    assert seconds < max(3.0, 2 * import_seconds)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALONE[::2])
def test_an_unknown_flag_is_one_line_and_exit_code_2(name):
    done = subprocess.run([sys.executable, ROOT / name, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", programs())
def test_help_and_unknown_flags_at_the_border(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name[:-3].replace("/", "."))
    for flag, code in (("--help", 0), ("--no-such-flag", 2)):
        with pytest.raises(SystemExit) as ended:
            module.main([flag])
        printed = capsys.readouterr()
        assert ended.value.code == code
        assert printed.out.startswith("usage:") if code == 0 else len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", programs())
def test_a_program_that_computes_says_how_threads_wait_before_torch_loads_them(name):
    body = ast.parse((ROOT / name).read_text()).body
    names = [
        n.names[0].name if isinstance(n, ast.Import) else n.module
        for n in body
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    first = next(n for n in names if top_of(n) in {"torch", "safetensors", *OURS})
    assert first == "tools.lib.threads" or "torch" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "given, spins",
    [({}, "GOMP_SPINCOUNT = '1000'"), ({"GOMP_SPINCOUNT": "7"}, "= '7'"), ({"OMP_WAIT_POLICY": "active"}, "'ACTIVE'")],
)
def test_openmp_has_heard_it(given, spins):
    """OMP_DISPLAY_ENV lets the library print what it goes by, when it is loaded."""
    env = {"PATH": os.environ["PATH"], "OMP_DISPLAY_ENV": "VERBOSE", **given}
    lines = "import tools.lib.threads; assert 'torch' not in __import__('sys').modules; import torch"
    said = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in said.stderr:
        pytest.skip("another OpenMP than GNU's")
    assert spins in said.stderr and ("'1000'" in said.stderr) == (not given)


def test_gitignore_entries_are_anchored():
    lines = (ROOT / ".gitignore").read_text().split("\n")
    entries = [line for line in lines if line and not line.startswith("#")]
    loose = [e for e in entries if not e.startswith("/") and e not in ("__pycache__/", "*.pyc")]
    assert not loose, f"anchor with a leading slash: {loose}"


def test_readme_states_the_test_command_that_ci_runs():
    assert "\n    pip install -r requirements.txt && pytest\n" in (ROOT / "README.md").read_text()


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch):
    """And every program with --device asks the one helper that says it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.pick_device("auto").type == cli.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device cuda:1: this torch .* sees no such card; use --device cpu"):
        cli.pick_device("cuda:1")
    with pytest.raises(ValueError, match="--device gpu: not a device; use auto, cpu, cuda"):
        cli.pick_device("gpu")
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        text = path.read_text()
        passed_on = path.name in ("demo.py", "bench.py", "pipeline.py")  # to others, or train_ssl.py is asked
        if '"--device"' in text and not passed_on:
            asked = "pick_device(" in text or "setup_distributed(" in text
            assert asked and "cuda.is_available" not in text, path.name
