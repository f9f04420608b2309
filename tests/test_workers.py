"""Claims about processes that work through a list: order, errors, and ends; multiprocessing.Pool hangs in some."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_data import make_ct

from data import open_source
from tools import check_duplicates, make_phantom
from tools.lib.workers import parallel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def patience():
    """A hang is a failure, after 30 s."""

    def give_up(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def work(job):
    time.sleep(0.05 * (job == 0))
    if job == "fails":
        raise ValueError("no such luck")
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
    return job, os.getpid()


def set_name(name):
    os.environ["NAME_OF_WORKER"] = name


def name_of(job):
    return os.environ.get("NAME_OF_WORKER")


@pytest.mark.parametrize("workers, chunk", [(1, 1), (2, 1), (3, 4)])
def test_results_come_in_the_order_of_the_jobs(workers, chunk):
    jobs, processes = zip(*parallel(work, range(20), workers, chunk=chunk))
    assert jobs == tuple(range(20)) and (set(processes) == {os.getpid()}) == (workers == 1)


def test_each_process_is_prepared_and_this_one_is_not():
    start = functools.partial(set_name, "x")
    assert list(parallel(name_of, range(4), 1, start)) == ["x"] * 4 and name_of(0) is None


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_is_that_error(workers):
    with pytest.raises(ValueError, match="no such luck"):
        list(parallel(work, [1, "fails", 2], workers))


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
    with pytest.raises(OSError, match="a worker was killed, out of memory.* fewer --workers"):
        list(parallel(work, [1, "dies", 2], 2))


def die(job):
    return work("dies")


def test_programs_say_that_a_worker_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(check_duplicates, "look", die)
    monkeypatch.setattr(make_phantom, "write_patient", die)
    source = open_source(make_ct(tmp_path / "ct"))
    with pytest.raises(OSError, match="fewer --workers"):
        check_duplicates.look_at_all(source, range(len(source)), 2)
    with pytest.raises(OSError, match="fewer --workers"):
        make_phantom.main(["--out", str(tmp_path / "raw"), "--patients", "3", "--size", "64", "--workers", "2"])
    assert not (tmp_path / "raw" / "truth.csv").exists()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = (
        f"import os, sys, time\nsys.path[:0] = [{str(ROOT)!r}]\nfrom tools.lib.workers import parallel\n"
        "def slow(job):\n    open(job, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
        "list(parallel(slow, sys.argv[1:], 2))\n"
    )
    files = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, files)])
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{file.read_text()}/cwd").exists() for file in files):
        time.sleep(0.05)
