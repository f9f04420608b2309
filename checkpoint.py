"""Atomic, verified, safe-to-load checkpoints. Copyable: imports torch and the standard library only.

A run folder holds step_00005000.pth, step_00010000.pth, ... and last.pth, a second name of the newest good one.
A kill, a full disk or a flipped bit costs at most the updates since the last save, never the run.
"""

import collections
import copy
import os
import pickle
import re
import reprlib
import secrets
import shutil
import stat
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed

FORMAT, VERSION = "dinox", 1
# everything that zipfile and torch.load were seen to raise on flipped bits, cut files and rubbish pickles
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError)
BROKEN += (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError)
BROKEN += (MemoryError,)


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
    except OSError as error:
        error.filename = error.filename or str(path)  # "No space left on device" alone names no place
        raise
    finally:
        tmp.unlink(missing_ok=True)  # still there only when something above failed
    fsync_folder(path.parent)
    return path


def write_text(path, text):
    """atomic_write of a whole text in UTF-8."""
    return atomic_write(path, lambda f: f.write(text.encode()))


# Reading. open_regular and read_zip stand in every leaf that opens such files, because each leaf copies alone.


def open_regular(path):
    """Open for reading what cannot make us wait: of a pipe, open() returns only when somebody writes to it."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a folder, pipe or device, not a regular file")
    return open(path, "rb")


def read_zip(f, path):
    """What torch.save wrote into the open file `path`; refuses files that torch.save does not write.

    torch maps a member by its offset and the length that the pickle claims, whatever the zip directory says: of a
    compressed, shortened or linked member it returns other numbers. The tensors stay on disk until they are used.
    """
    with zipfile.ZipFile(f) as archive:
        items = sorted(archive.infolist(), key=lambda item: item.header_offset)
        for item in items:
            if stat.S_IFMT(item.external_attr >> 16) not in (0, stat.S_IFREG) or item.external_attr & 0x10:
                raise zipfile.BadZipFile(f"{item.filename} marked as a folder or a link")
            if item.compress_type or item.flag_bits & ~0x808 or item.compress_size != item.file_size:
                raise zipfile.BadZipFile(f"{item.filename} is compressed, encrypted or shortened")
        if len({item.filename.lower() for item in items}) < len(items):  # torch looks names up without their case
            raise zipfile.BadZipFile("two members of one name")
        if archive.comment or sum(item.file_size for item in items) > f.seek(0, os.SEEK_END):
            raise zipfile.BadZipFile("members that overlap, or bytes after them")
        if bad := archive.testzip():  # reads every byte: torch.load alone does not notice a flipped bit
            raise zipfile.BadZipFile(f"wrong checksum in {bad}")
        pickles = [archive.read(item) for item in items if item.filename.lower().endswith(".pkl")]
        if code := re.search(rb"\n(bytearray|TypedStorage|\w*Tensor)\n", b"".join(pickles)):  # bytearray(10**12)
            raise zipfile.BadZipFile(f"a call of {code[1].decode()}, which takes memory that no member fills")
    storages = []  # mapped, so no tensor is read twice
    content = torch.load(path, lambda s, _: storages.append(s) or s, weights_only=True, mmap=True)
    held = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
    if [held[at] for at in sorted(held)] != [i.file_size for i in items if "/data/" in i.filename and i.file_size]:
        raise zipfile.BadZipFile("a tensor that is not as long as its member")
    return content


def brief(value):
    """One short line, whatever the value."""
    return " ".join(reprlib.repr(value).split())[:120]


def is_count(value):
    return type(value) is int and 0 <= value < 2**63


def is_text(value):
    return isinstance(value, str)


def is_size(value):
    """A number of at most a million; NaN is refused."""
    return isinstance(value, (int, float)) and abs(value) <= 1 << 20


def is_plain(value):
    """A tensor of bytes that the file holds: one with stride 0 claims more, and a copy would allocate them."""
    return value.device.type == "cpu" and not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()


def is_dict(value, of=lambda _: True):
    return isinstance(value, dict) and all(is_text(k) and of(v) for k, v in value.items())


def is_list(value, of):
    return isinstance(value, (list, tuple)) and all(map(of, value))


def is_flag(value):
    """What argparse makes: no nested lists, which a small file can make longer than any memory."""
    plain = (int, float, str, type(None))
    return isinstance(value, plain) or is_list(value, lambda v: isinstance(v, plain)) and len(value) <= 1000


def is_arch(value):
    adapters = value.get("adapters", {"rank": 1})  # rank, alpha, norm, targets, unfreeze, blocks
    return is_text(value["name"]) and is_dict(value["overrides"], is_size) and is_dict(adapters, is_flag)


def is_view(value):
    size, window, mm = value["size"], value["window"], value.get("neighbour_mm", 1)
    known = is_count(size) and 0 < size <= 1 << 16 and isinstance(mm, (int, float)) and 0 < mm < 1000
    return known and (window is None or is_list(window, is_size) and len(window) == 2)


FIELDS = {  # what a field must be if it is present; a check that raises counts as false
    "step images gram_refreshes": (is_count, "a count"),
    "args": (lambda v: is_dict(v, is_flag), "flags, each a plain value or a short list of such"),
    "optimizer": (is_dict, "a dict by name"),
    "arch": (is_arch, "a name and overrides, numbers up to a million"),
    "gram_arch": (lambda v: v is None or is_arch(v), "None, or a name and overrides as in arch"),
    "encoding": (is_text, "a text"),
    "eval_view": (is_view, "a size in pixels and a window of two numbers or None"),
    "trained_groups": (lambda v: v is None or is_list(v, is_text), "texts, or None: unknown"),
    "index_sha256 split_sha256 weights_sha256": (lambda v: v is None or is_text(v), "a text or None"),
    "student teacher centers": (lambda v: is_dict(v, is_plain), "a dict of tensors"),
    "classes": (lambda v: is_list(v, is_text) and len(v) > 1, "two or more names"),
    "pool layout labels_sha256": (lambda v: v is None or is_text(v), "a text or None"),
    "layers": (is_count, "a count"),
    "best": (lambda v: v is None or is_count(v["step"]) and is_size(v["value"]), "a step and a value, or None"),
    "looked": (lambda v: type(v) is int and -1 <= v < 2**63, "a step, or -1"),
    "gram": (lambda v: v is None or is_dict(v, is_plain), "a dict of tensors or None"),
}


def wrong_field(state):
    """What is wrong with the first field that is not what FIELDS says, or None."""
    for name, (right, words) in ((name, rule) for names, rule in FIELDS.items() for name in names.split()):
        try:
            good = name not in state or right(state[name])
        except BROKEN:
            good = False
        if not good:
            return f"field {name} is {brief(state[name])}, expected {words}"
    return None


def check(f, path):
    """Raise ValueError with the reason unless the open file, whose name is `path`, is a whole checkpoint of ours."""
    if not os.fstat(f.fileno()).st_size:
        raise ValueError("not a whole and safe checkpoint: the file is empty")
    try:
        state = read_zip(f, path)  # what load() could not open is refused here (torch has its own zip reader)
        state = state if isinstance(state, dict) else {}
    except BROKEN as error:
        # of torch's paragraph only the fact: its advice is to load without weights_only
        code = re.search(r"GLOBAL (\S+)", str(error))
        fact = f"needs code to load: {code[1]}" if code else re.split(r"(?<=\S)\. |\n", str(error))[0]
        raise ValueError(f"not a whole and safe checkpoint ({type(error).__name__}: {fact})") from error
    kind, version = state.get("format"), state.get("version")
    if kind != FORMAT:
        raise ValueError(f"format {brief(kind)}, expected {FORMAT!r}")
    if not is_count(version) or version != VERSION:
        raise ValueError(f"version {brief(version)}, this code reads version {VERSION}")
    if wrong := wrong_field(state):
        raise ValueError(wrong)


def verify(path) -> None:
    """Raise ValueError with the reason unless zip directory, every CRC, format, version and fields are right."""
    with open_regular(path) as f:
        check(f, path)


def load(path, fields=()) -> dict:
    """The state in a verified checkpoint; nothing in the file can run code. `fields`: names that must be there."""
    try:
        with open_regular(path) as f:  # opened once: a newer save under this name cannot slip in after the check
            check(f, path)
            f.seek(0)
            state = torch.load(f, map_location="cpu", weights_only=True)
        if missing := [name for name in fields if name not in state]:
            raise ValueError(f"field {missing[0]} is missing")
        return state
    except ValueError as error:
        remedy = "use an older step_*.pth of the same run, or the code that wrote this file"
        raise ValueError(f"{path}: {error}; {remedy}") from error


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
    reasons, found, gone = {}, None, False
    for path in step_files(run_dir) + [last] * last.exists():
        reason = broken(path)
        if reason is None:
            found = path
            break
        if os.path.lexists(path):
            reasons[path] = reason
        else:
            gone = True  # the run has rotated it away since it was listed: not broken
    if gone and found is None:
        return latest(run_dir)  # newer ones must have come
    for path, reason in reasons.items():
        print(f"{path}: {reason}; {f'using {found.name}' if found else 'no other verifies'}", file=sys.stderr)
    return found


def same_file(path, other):
    try:
        return path.samefile(other)
    except FileNotFoundError:  # or deleted a moment ago
        return False


def point_last(run_dir, path, name="last.pth"):
    """Make last.pth (or best.pth) a second name of `path` in one step.

    A hard link costs no disk, and the bytes stay when the step file goes; a symbolic one would dangle.
    """
    last = Path(run_dir) / name
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
        elif (keep_every and step_of(path) % keep_every == 0) or same_file(path, last):
            continue
        else:
            path.unlink(missing_ok=True)
            deleted.append(path)
    return deleted


def sweep(run_dir):
    """Delete what killed saves left behind; returns the paths. Call it under the run's lock.

    The lock, not the process id in the name, tells that the writer is dead: containers reuse small ids.
    """
    stale = [
        p
        for name in ("step_*.pth", "last.pth", "best.pth", "config.json")
        for p in Path(run_dir).glob(f".{name}.*.tmp")
    ]
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

    def save(self, step, state, best=False):
        """Snapshot `state` and return; the write goes on in the background. Waits first for a save under way.

        best: best.pth becomes a name of it too, which rotation keeps.
        """
        start = time.perf_counter()
        self.wait()  # its thread reads the buffers that this snapshot reuses
        snapshot = to_host({**state, "step": step}, self._buffers)
        self.stall_s = time.perf_counter() - start
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, self.stall_s, best), name="saver")
        self._thread.start()  # not a daemon: the interpreter ends only after the file is whole

    def wait(self):
        """Until the save under way has ended; whether well, `error` tells."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, step, snapshot, stall_s, best):
        start, path = time.perf_counter(), step_path(self.run_dir, step)
        error = "unforeseen, its traceback is on stderr"  # stays where what is raised is neither of the two below
        try:
            save(path, snapshot)
            self._good.add(path)
            for name in ["best.pth"] * best + ["last.pth"]:
                point_last(self.run_dir, path, name)
            self._good.difference_update(rotate(self.run_dir, self.keep_last, self.keep_every, self._good))
            error = None
        except (OSError, ValueError) as failure:
            error = " ".join(f"{path}: {failure}".split())
        finally:
            self.error = error
            seconds = time.perf_counter() - start
            self.events.append({"step": step, "error": error, "seconds": seconds, "stall_s": stall_s})


# Weights and optimizer state by parameter name, so that neither grouping nor sharding matters to the file. Sharded
# parameters (DTensor of fully_shard) are told by their full_tensor and device_mesh; with them these are collective.


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def like(p, t):
    """A whole tensor placed as the parameter `p` is: on its device, and in its shards if it is sharded."""
    if not hasattr(p, "device_mesh"):
        return t.to(p.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)


def for_file(t):
    """A whole tensor; of shards on rank 0 alone and on the host, since a card may not hold it."""
    if not hasattr(t, "full_tensor"):
        return t
    whole = t.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else None


def pack_weights(module, whole=for_file):
    return {name: whole(p.detach()) for name, p in module.named_parameters()}


@torch.no_grad()
def unpack_weights(module, state):
    own = dict(module.named_parameters())
    if odd := own.keys() ^ state.keys() or {name for name, p in own.items() if p.shape != state[name].shape}:
        names = ", ".join(sorted(map(str, odd))[:3])
        raise ValueError(f"checkpoint and model differ in {names}; was the architecture changed?")
    for name, p in own.items():
        p.copy_(like(p, state[name]))


def pack_optimizer(optimizer, model):
    """State of AdamW and its kin."""
    return {
        name: {k: for_file(v) for k, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def unpack_optimizer(optimizer, model, state):
    for name, p in model.named_parameters():
        parts = state.get(name, {})
        if not isinstance(parts, dict) or not all(
            isinstance(v, torch.Tensor) and (k == "step" or v.shape == p.shape) for k, v in parts.items()
        ):
            raise ValueError(f"checkpoint and model differ in the optimizer's {name}; was the architecture changed?")
        if name in state:
            optimizer.state[p] = {k: v.to(p.device) if k == "step" else like(p, v).clone() for k, v in parts.items()}
