"""What several tests share: processes that have imported torch, one phantom collection, a short healthy run on it."""

import atexit
import json
import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

import train_ssl
from tools import make_phantom, make_splits, preprocess_dicom

# A small run that learns: what the 2-core checks, the monitor's and the probe's slow tests start from.
HEALTHY = (
    "--arch vit_test --global-size 64 --local-size 32 --local-crops 4 --prototypes 256 --head-hidden 256 "
    "--head-bottleneck 64 --layerscale 1 --batch-size 64 --lr 1e-3 --layer-decay 1 --patch-lr 1 --freeze-last 0 "
    "--ema 0.99 1 --teacher-temp 0.04 0.04 --rope-rescale 1 --gram-weight 0 --device cpu --workers 1 --log-every 10"
).split()


@pytest.fixture(scope="session")
def forked():
    """A context whose processes are forked from one that has imported torch: that takes longer than a toy run."""
    root, context = Path(__file__).parent.parent, multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train_ssl", "train_probe", "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.fsdp"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PATH", f"{Path(sys.executable).parent}", prepend=":")
        patch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")
        forkserver.ensure_running()
    return context


def be_program(words, log=os.devnull, env=None):
    """In a forked process: what `python PROGRAM ...` does, without seconds of imports; its output goes to `log`."""
    os.environ |= env or {}
    multiprocessing.set_start_method("fork", force=True)  # of readers, as in a process that was not forked itself
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1), os.dup2(number, 2)
    sys.argv = [str(word) for word in words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out


def be_rank(rank, port, words, log=os.devnull):
    """As torchrun starts two processes; port: free_port()."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    be_program(words, log)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="session")
def started(forked):
    """Starts a program, given its path and flags, in a process of its own."""

    def start(words, log=os.devnull, **env):
        process = forked.Process(target=be_program, args=(words, str(log), env))
        process.start()
        return process

    return start


@pytest.fixture
def on_two_ranks(forked):
    """Runs function(rank, *arguments) in two processes."""

    def run(function, *arguments):
        ranks = [forked.Process(target=function, args=(rank, *arguments)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0, 0]

    return run


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """Processed phantom patients (hu16-v1), split half for training; the raw folder lies beside."""
    root = tmp_path_factory.mktemp("collection")
    raw, processed = str(root / "raw"), str(root / "processed")
    assert make_phantom.main(["--out", raw, "--patients", "24", "--size", "128", "--slices", "24"]) == 0
    flags = ["--raw", raw, "--out", processed, "--dataset", "phantom", "--format", "hu16", "--workers", "2"]
    assert preprocess_dicom.main(flags) == 1  # scout views are rejected, the rest is usable
    assert make_splits.main(["--data", processed, "--ratios", "train=0.5,val_select=0.1,val_test=0.4"]) == 0
    return root / "processed"


@pytest.fixture(scope="session")
def healthy_run(collection, tmp_path_factory):
    """Run folder of 200 healthy updates, with 5 checkpoints: a minute on 2 cores."""
    out = tmp_path_factory.mktemp("runs") / "healthy"
    flags = ["--steps", "200", "--warmup", "50", "--eval-every", "100", "--save-every", "40", "--keep-last", "5"]
    assert train_ssl.main(["--data", str(collection), "--out", str(out), *HEALTHY, *flags]) == 0
    return out


@pytest.fixture(scope="session")
def healthy_lines(healthy_run):
    return [json.loads(line) for line in (healthy_run / "metrics.jsonl").read_text().splitlines()]
