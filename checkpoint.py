"""Atomic, verified, safe-to-load checkpoints. Copyable: imports torch and the standard library only.

A run folder holds step_00005000.pth, step_00010000.pth, ... and last.pth, a second name of the newest good one.
A kill, a full disk or a flipped bit costs at most the updates since the last save, never the run.
"""

import collections
import copy
import os
import pickle
import re
import secrets
import shutil
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import torch

FORMAT, VERSION = "dinox", 1
# everything that zipfile and torch.load were seen to raise on flipped bits, cut files and rubbish pickles
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError)
BROKEN += (ValueError, TypeError, LookupError, RuntimeError)


def fsync_folder(folder):
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(path):
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def atomic_write(path, writer):
    """Call `writer(file)` on a binary temporary file beside `path`, then rename it over `path`.

    After a crash at any moment `path` is either the whole old file or the whole new one.
    """
    path = Path(path)
    tmp = temporary(path)
    try:
        with open(tmp, "x+b") as f:
            writer(f)
            f.flush()
            os.fsync(f.fileno())  # before the rename: a journal may keep the new name and lose the bytes behind it
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)  # still there only when something above failed
    fsync_folder(path.parent)
    return path


def write_text(path, text):
    """atomic_write of a whole text in UTF-8."""
    return atomic_write(path, lambda f: f.write(text.encode()))


def check(f, path):
    """Raise ValueError with the reason unless the open file, whose name is `path`, is a whole checkpoint of ours."""
    try:
        with zipfile.ZipFile(f) as archive:
            bad = archive.testzip()  # reads every byte: torch.load alone does not notice a flipped bit
            folders = [item.filename for item in archive.infolist() if item.external_attr & 0x10]
        if bad:
            raise zipfile.BadZipFile(f"wrong checksum in {bad}")
        if folders:  # a flipped bit under no CRC: torch then skips the member and returns uninitialised memory
            raise zipfile.BadZipFile(f"{folders[0]} marked as a folder")
        # mapped, so no tensor is read twice; what load() could not open is refused here (torch has its own zip reader)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except BROKEN as error:
        # of torch's paragraph only the fact: its advice is to load without weights_only
        code = re.search(r"GLOBAL (\S+)", str(error))
        fact = f"needs code to load: {code[1]}" if code else re.split(r"(?<=\S)\. |\n", str(error))[0]
        raise ValueError(f"not a whole and safe checkpoint ({type(error).__name__}: {fact})") from error
    state = state if isinstance(state, dict) else {}
    if state.get("format") != FORMAT:
        raise ValueError(f"format {state.get('format')!r}, expected {FORMAT!r}")
    if state.get("version") != VERSION:
        raise ValueError(f"version {state.get('version')!r}, this code reads version {VERSION}")


def verify(path) -> None:
    """Raise ValueError with the reason unless zip directory, every CRC, format and version are right."""
    with open(path, "rb") as f:
        check(f, path)


def load(path, map_location="cpu") -> dict:
    """The state in a verified checkpoint; nothing in the file can run code."""
    with open(path, "rb") as f:  # opened once: a newer save under this name cannot slip in after the check
        try:
            check(f, path)
        except ValueError as error:
            remedy = "use an older step_*.pth of the same run, or the code that wrote this file"
            raise ValueError(f"{path}: {error}; {remedy}") from error
        f.seek(0)
        return torch.load(f, map_location=map_location, weights_only=True)


def checked_write(path, writer):
    """atomic_write whose bytes are verified before they get the name: later, the good file would be gone already."""

    def write(f):
        writer(f)
        f.flush()
        f.seek(0)
        check(f, f.name)

    return atomic_write(path, write)


def save(path, state) -> Path:
    """Write a dict of tensors and plain values; refuses what weights_only could not load again."""
    state = {"format": FORMAT, "version": VERSION, **state}

    def write(f):
        try:
            torch.save(state, f)  # not to a path: its name would go into the archive, and equal states would differ
        except RuntimeError as error:  # torch, closing its archive, covers "No space left" with "unexpected pos"
            raise error.__context__ or error from None
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"the state holds what no file can: {error}") from error

    return checked_write(path, write)


def step_path(run_dir, step):
    return Path(run_dir) / f"step_{step:08d}.pth"


def step_of(path):
    """Updates done, from the name of a step file; None for any other name."""
    match = re.fullmatch(r"step_([0-9]+)\.pth", Path(path).name)
    return int(match[1]) if match else None


def step_files(run_dir):
    """Newest first by number: times change when a run is copied, and names sort step_final last."""
    numbered = [path for path in Path(run_dir).glob("step_*.pth") if step_of(path) is not None]
    return sorted(numbered, key=step_of, reverse=True)


def broken(path):
    """The reason why `path` does not verify, or None."""
    try:
        return verify(path)
    except (ValueError, OSError) as error:
        return str(error)


def latest(run_dir) -> Path | None:
    """Newest checkpoint that verifies, or None; says on stderr which newer ones do not, and why."""
    last = Path(run_dir) / "last.pth"
    reasons, found = {}, None
    for path in step_files(run_dir) + [last] * last.exists():
        if reason := broken(path):
            reasons[path] = reason
        else:
            found = path
            break
    for path, reason in reasons.items():
        print(f"{path}: {reason}; {f'using {found.name}' if found else 'no other verifies'}", file=sys.stderr)
    return found


def point_last(run_dir, path):
    """Make last.pth a second name of `path` in one step.

    A hard link costs no disk, and the bytes stay when the step file goes; a symbolic one would dangle.
    """
    last = Path(run_dir) / "last.pth"
    link = temporary(last)
    try:
        os.link(path, link)
    except OSError:  # exFAT and some network folders have no hard links
        with open(path, "rb") as source:
            return checked_write(last, lambda f: shutil.copyfileobj(source, f, 1 << 20))
    try:
        os.replace(link, last)  # never unlink-then-link: a kill between the two would leave no last.pth
    finally:
        link.unlink(missing_ok=True)  # where both names already were one file, rename does nothing and leaves it
    fsync_folder(run_dir)
    return last


def rotate(run_dir, keep_last, keep_every, good=()):
    """Delete the step files older than the newest `keep_last` good ones; returns what was deleted.

    Kept anyway: multiples of `keep_every` (0: none) and the file that last.pth names. Broken files do not count
    as kept, so the newest good one always stays. `good`: paths known to verify, not read again.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    last = Path(run_dir) / "last.pth"
    kept, deleted = 0, []
    for path in step_files(run_dir):
        if kept < keep_last:
            kept += path in good or not broken(path)
        elif (keep_every and step_of(path) % keep_every == 0) or (last.exists() and last.samefile(path)):
            continue
        else:
            path.unlink(missing_ok=True)
            deleted.append(path)
    return deleted


def sweep(run_dir):
    """Delete what killed saves left behind; returns the paths. Call it under the run's lock.

    The lock, not the process id in the name, tells that the writer is dead: containers reuse small ids.
    """
    stale = [p for name in ("step_*.pth", "last.pth", "config.json") for p in Path(run_dir).glob(f".{name}.*.tmp")]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def to_host(value, buffers, key=()):
    """Deep copy of nested dicts, lists and tuples with every tensor in host memory.

    `buffers` {key: tensor} is filled, then reused: 2.4 GB took 6.5 s of page faults at first, 0.14 s later (2 CPU
    cores, torch 2.13). Page-locked for CUDA and ROCm, where the copy engine needs that; no speed measured there.
    """
    if isinstance(value, torch.Tensor):
        buffer = buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = buffers[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return buffer.copy_(value.detach())  # blocking: half a copy would be saved, with a right CRC
    if isinstance(value, dict):
        return {k: to_host(v, buffers, (*key, k)) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_host(v, buffers, (*key, i)) for i, v in enumerate(value))
    return copy.deepcopy(value)


class Saver:
    """save -> point_last -> rotate in one background thread: a full or read-only disk never stops the loop, a slow
    one only where the next save comes too soon.

    error: why the last save failed, None after a good one. stall_s: seconds the last save() call held its caller.
    events: a deque with one dict per ended save, for the loop to popleft() and log.
    """

    def __init__(self, run_dir, keep_last, keep_every):
        self.run_dir, self.keep_last, self.keep_every = Path(run_dir), keep_last, keep_every
        self.error, self.stall_s, self.events = None, 0.0, collections.deque()
        self._buffers, self._good, self._thread = {}, set(), None

    def save(self, step, state):
        """Snapshot `state` and return; the write goes on in the background. Waits first for a save under way."""
        start = time.perf_counter()
        self.wait()  # its thread reads the buffers that this snapshot reuses
        snapshot = to_host({**state, "step": step}, self._buffers)
        self.stall_s = time.perf_counter() - start
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, self.stall_s), name="saver")
        self._thread.start()  # not a daemon: the interpreter ends only after the file is whole

    def wait(self):
        """Until the save under way has ended; whether well, `error` tells."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, step, snapshot, stall_s):
        start, path = time.perf_counter(), step_path(self.run_dir, step)
        error = "unforeseen, its traceback is on stderr"  # stays where what is raised is neither of the two below
        try:
            save(path, snapshot)
            self._good.add(path)
            point_last(self.run_dir, path)
            self._good.difference_update(rotate(self.run_dir, self.keep_last, self.keep_every, self._good))
            error = None
        except (OSError, ValueError) as failure:
            error = " ".join(f"{path}: {failure}".split())
        finally:
            self.error = error
            seconds = time.perf_counter() - start
            self.events.append({"step": step, "error": error, "seconds": seconds, "stall_s": stall_s})
