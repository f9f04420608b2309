"""What every training loop needs around its update: ranks, schedules, signals, the run's folder, the log, warnings.

Shared by the training programs; of the method only what an update costs and what its numbers say is known here.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from data import append_line, denormalise, regular
from model import check_arch
from tools.lib import limits, optim
from tools.lib.cli import pick_device, read_options, shown, technique

# Ranks, schedules, random numbers.


def setup_distributed(name):
    """(rank, world, device); without torchrun: one rank and no process group."""
    device = pick_device(name)
    if device == torch.device("cuda"):  # without a number: one card per rank of this machine
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


PRECISIONS = ("fp32", "bf16", "bf16-stream")  # weights are float32 in all of them


def set_precision(args, device):
    """What --precision auto and --deterministic mean on this device."""
    if args.precision == "auto":
        args.precision = "bf16" if device.type == "cuda" else "fp32"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def heads_of(model):
    """Of an SSLModel; a backbone alone has none."""
    return [getattr(model, name) for name in ("dino_head", "ibot_head") if hasattr(model, name)]


def shard(model, device):
    if device.type == "cpu" and torch.__version__.startswith("2.8"):
        raise ValueError(
            "--fsdp on CPU: torch 2.8 sums gradients over gloo ranks where it should average; use DDP or 2.13"
        )
    from torch.distributed.fsdp import fully_shard

    for module in (*getattr(model, "backbone", model).blocks, *heads_of(model)):
        fully_shard(module)
    return fully_shard(model, reshard_after_forward=True)  # the teacher has no backward that would do it


def on_device(args, model, nets, world, device, whole=False):
    """Compile, shard or move `nets` as the flags say -> `model`, one of them, as it is called: itself, or wrapped.

    whole: compile the last block and the heads too; elsewhere their number of rows changes, and each would be compiled.
    """
    for m in nets:
        getattr(m, "backbone", m).stream = torch.bfloat16 if args.precision == "bf16-stream" else None
    if args.compile:  # every size is a shape of its own: at the usual 8 torch goes on uncompiled
        torch._dynamo.config.recompile_limit = 64
        for block in (b for m in nets for b in getattr(m, "backbone", m).blocks[: None if whole else -1]):
            block.compile(dynamic=False)  # mixed --sizes: guessed dynamic shapes fail in the backward (torch 2.13, CPU)
        for head in (head for m in nets if whole for head in heads_of(m)):
            head.bottleneck = torch.compile(head.bottleneck, dynamic=False)
    for m in nets:
        if args.fsdp and world > 1:
            shard(m, device)  # from the CPU, part by part: no card ever holds a whole network
        else:
            m.to(device)
    return model if args.fsdp else wrapped(model, world, device)


def wrapped(model, world, device):
    """The model as it is called: itself, or wrapped where several ranks average its gradients."""
    if world == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def largest_over_ranks(values, device):
    """Element-wise maximum over ranks: the one transfer from the device in each update -> a function that waits for it.

    What is queued on the device after this call is not waited for.
    """
    tensors = (v if isinstance(v, torch.Tensor) else torch.full((), float(v), device=device) for v in values)
    t = torch.stack([v.float() for v in tensors])
    if dist.is_initialized():
        dist.all_reduce(t, dist.ReduceOp.MAX)
    if device.type != "cuda":
        return t.tolist
    host, arrived = torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True), torch.cuda.Event()
    arrived.record()

    def wait():
        arrived.synchronize()
        return host.tolist()

    return wait


@functools.cache
def copying(device):
    return torch.cuda.Stream(device)


def sent(t, device):
    """A page-locked tensor of the host on the device, copied while a card goes on with what is queued."""
    if device.type != "cuda":
        return t.to(device)
    now = torch.cuda.current_stream(device)
    with torch.cuda.stream(copying(device)):
        moved = t.to(device, non_blocking=True)
    now.wait_stream(copying(device))
    moved.record_stream(now)  # its memory is not given to the next copy before it was read
    return moved


def moment(device):
    """Now; on a card the moment when it has done all that is queued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin, end):
    """Of two moments; waits until a card has reached the second."""
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def over_ranks(function, rows, rank, world):
    """function(rows) -> array [rows, ...], of which each rank computes a part; all of it on all ranks."""
    if world == 1:
        return function(rows)
    mine = rows[rank::world]
    parts = [None] * world
    dist.all_gather_object(parts, function(mine) if len(mine) else None)
    whole = np.concatenate([part for part in parts if part is not None])
    return whole[np.argsort(np.concatenate([np.arange(len(rows))[r::world] for r in range(world)]))]


class Upcoming:
    """The next `left` updates of `micros` micro-batches each: read in order and made ready by prepare(read).

    On a card one of them ahead, while the card works on the one before; a CPU would only hold one more set of crops.
    It is queued behind that one. On a second stream, beside it, an update of ViT-S took 0.7% less (H200): noise.
    """

    def __init__(self, batches, micros, left, device, prepare):
        self.batches, self.micros, self.left, self.device, self.make_ready = batches, micros, left, device, prepare
        self.ready, self.reads = [], []  # reads: begin and end of each

    def waited(self):
        """Seconds of reading since the last call, without those in which a card had still work."""
        reads, self.reads = self.reads, []
        return sum(seconds_between(begin, end) for begin, end in reads)

    def prepare(self, clock):
        begin = moment(self.device)
        with clock("read"):
            read = [next(self.batches) for _ in range(self.micros)]
        self.reads.append((begin, moment(self.device)))
        self.left -= 1
        with clock("render"):
            self.ready.append((read, self.make_ready(read)))

    def take(self, clock=contextlib.nullcontext):
        """(micro-batches as read, the same made ready) of the next update."""
        if not self.ready:
            self.prepare(clock)
        return self.ready.pop()

    def ahead(self, clock=contextlib.nullcontext):
        if self.device.type == "cuda" and self.left:
            self.prepare(clock)


def divisor(flag, value, whole, of):
    """`value`, if it divides `whole`; else an error that names the nearest number that does."""
    if whole % value:
        nearest = min((m for m in range(1, whole + 1) if whole % m == 0), key=lambda m: abs(m - value))
        raise ValueError(f"{flag} {value} does not divide {of} ({whole}); nearest: {nearest}")
    return value


def schedule(step, start, peak, end, warmup=0, hold=0, cosine=0):
    """Linear start -> peak over `warmup` updates, `hold`, half a cosine peak -> end over `cosine` updates, then end."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    step -= warmup + hold
    if step < 0:
        return peak
    if step < cosine:
        return end + (peak - end) * (1 + math.cos(math.pi * step / max(cosine - 1, 1))) / 2
    return end


def build_optimizer(text, groups, flags=("lr", "weight_decay")):
    """muon:momentum=0.9, or with a wrapper before it sam:rho=0.1+muon (sam alone: around AdamW) -> optimizer.

    flags: numbers that have a flag of their own. Rates are set before each update.
    """
    *outer, inner = text.split("+")
    if read_options(inner)[0] in optim.WRAPPERS:
        outer, inner = [*outer, inner], "adamw"
    if len(outer) > 1:
        raise ValueError(f"--optimizer {text}: at most one of {', '.join(optim.WRAPPERS)}, then + and an optimizer")
    name, options = technique(inner, optim.OPTIMIZERS)
    if taken := set(flags) & options.keys():
        raise ValueError(f"--optimizer {text}: {min(taken)} has a flag of its own")
    more = {"fused": True} if name == "adamw" else {}
    try:
        optimizer = optim.OPTIMIZERS[name](groups, **{**more, **options, "lr": 0.0})
        for part in reversed(outer):
            name, options = technique(part, optim.WRAPPERS)
            optimizer = optim.WRAPPERS[name](optimizer, **options)
    except ValueError as error:
        raise ValueError(f"--optimizer {text}: {error}") from None
    return optimizer


def generator(*key):
    """A torch generator that is a function of its key."""
    state = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class Stop:
    """Why a run should stop after this update: a signal, its time limit, or torchrun died.

    A second Ctrl+C ends it at once. After a signal later ones change nothing, so that the run's own exit code stays.
    """

    def __init__(self, minutes):
        self.minutes, self.begun, self.signals = minutes, time.monotonic(), []
        # torchrun's workers must not outlive it; any other parent may go, as under nohup
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, (lambda *_: None) if self.signals else handler)

    def note(self, number, _):
        if self.signals and number == signal.SIGINT:
            os._exit(130)
        self.signals.append(signal.Signals(number).name)

    def why(self):
        """A word or two, or None: go on."""
        if self.signals:
            return self.signals[0]
        if self.parent and os.getppid() != self.parent:
            return "torchrun died"
        return "time limit" if self.minutes and time.monotonic() - self.begun > 60 * self.minutes else None


# The run's folder.


def circumstances(device, world):
    """What config.json says of code, versions and machine."""
    return {
        "git": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "world": world,
        "started_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def check_flags(args, saved, harmless):
    """Refuse a continuation whose flags mean another run; returns the harmless changes.

    A flag that is newer than the run had its default there.
    """
    changed, typed = {}, getattr(args, "given", dict.fromkeys(vars(args)))
    for name, value in json.loads(json.dumps(vars(args))).items():
        old = json.loads(json.dumps(saved.get(name, typed.get(name))))
        if old == value or name not in saved and name not in typed:
            continue
        if name not in harmless:
            longer = name == "steps" and "extend" in vars(args) and value > old
            hint = "use --extend N to go on" if longer else "use the old value, or another --out"
            raise ValueError(f"--{name.replace('_', '-')} was {old} in this run and is now {value}; {hint}")
        changed[name] = [old, value]
    return changed


RESUMED = "step args arch student teacher gram optimizer centers index_sha256 split_sha256".split()


def find_run(args, source, harmless, rank, world, fields=RESUMED):
    """(checkpoint to go on from or None, its plain values, harmless changes of flags); refuses what is another run."""
    out, newest = Path(args.out), [None, False]
    # to verify 100 GB takes a slow disk longer than the 10 minutes after which NCCL gives a collective up
    patient = dist.new_group(timeout=datetime.timedelta(hours=2), backend="gloo") if world > 1 else None
    if rank == 0:
        newest = [checkpoint.latest(out), bool(checkpoint.step_files(out)) or (out / "last.pth").exists()]
    if world > 1:
        dist.broadcast_object_list(newest, group=patient)
    path, any_there = newest
    if path is None and any_there:
        raise ValueError(
            f"{out} has checkpoints and none verifies (see above); put a good one there, or use another --out"
        )
    if path is None:
        return None, {}, {}
    if "resume" in args and args.resume == "never":
        raise ValueError(f"{out} holds {path.name} and --resume never was given; choose another --out")
    # latest() has just verified it; tensors stay on disk
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if missing := [name for name in fields if name not in state]:
        raise ValueError(f"{path}: field {missing[0]} is missing; use an older step_*.pth of the same run")
    try:  # before anything of its size is made
        weights = {k.removeprefix("backbone."): v for k, v in state["student"].items() if k.startswith("backbone.")}
        check_arch(state["arch"], weights)
        if state.get("gram_arch"):
            check_arch(state["gram_arch"], state["gram"])
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; use an older step_*.pth of the same run") from None
    facts = {key: value for key, value in state.items() if key not in ("student", "teacher", "gram", "optimizer")}
    changed = check_flags(args, facts["args"], harmless)
    for name in ("index_sha256", "split_sha256", "weights_sha256"):
        if facts.get(name) != getattr(source, name):
            raise ValueError(
                f"{args.data}: {name} differs from that of {path}; put the old data back, or use another --out"
            )
    return path, facts, changed


@dataclasses.dataclass
class Pace:
    """State at the last log line, from which the next one counts."""

    since: float
    done: int
    waited: float = 0.0  # seconds for data
    loss: float = math.inf  # of the line before

    def numbers(self, done, args, device, flops, world):
        """Speed since then and what is to come; flops: of the forward and backward of one image."""
        seconds, updates = time.perf_counter() - self.since, done - self.done
        rate = updates * args.batch_size / seconds
        tflops, peak = rate * flops / 1e12, device_peak(device)
        to_go = (args.steps + args.extend - done) * seconds / max(updates, 1)
        line = dict(images_s=rate, data_wait=self.waited / seconds, tflops=tflops, memory_gb=memory_gb(device),
                    seconds_to_go=to_go)  # fmt: skip
        return line | {"mfu": tflops / (peak * world)} if peak else line

    def begin(self, done, loss):
        self.since, self.done, self.waited, self.loss = time.perf_counter(), done, 0.0, loss


def smaller_micro_batch(args, world):
    """The largest micro-batch of at most half of this one that the same run may use, or None."""
    images = args.batch_size // world
    group = getattr(args, "koleo_group", 1)
    sizes = [m for m in range(group, args.micro_batch // 2 + 1, group) if images % m == 0]
    return sizes[-1] if sizes else None


def is_out_of_memory(error):
    """Of a card, of Python, or of torch on a CPU, which has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def out_of_memory(args, world, optimizer, step):
    """Free what a too large update took -> an error that names a command that goes on."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    fits = smaller_micro_batch(args, world)
    ways = [f"--micro-batch {fits}"] * bool(fits) + ["--checkpointing"] * hasattr(args, "checkpointing")
    how = ", or ".join(ways) or "a smaller --batch-size in another --out"
    return ValueError(f"out of memory at step {step}; the same command goes on from the newest checkpoint, with {how}")


def report_saves(log, saver, done, going_on):
    """Tell of saves that have ended."""
    while saver.events:
        e = saver.events.popleft()
        failed = "SAVE FAILED, training goes on" if going_on else "SAVE FAILED"
        text = f"{failed}: {e['error']}" if e["error"] else "saved"
        log.event(e["step"], text, at=done, save_s=e["seconds"], stall_s=e["stall_s"])


def open_run(args, source, harmless, rank, world, fields=RESUMED):
    """The run's folder, made and held by rank 0 -> (its lock or None, then what find_run says)."""
    out, locked = Path(args.out), None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name the folder of the run")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        locked = lock(out)
        checkpoint.sweep(out)
    return locked, *find_run(args, source, harmless, rank, world, fields)


def lock(out, patience_s=60):
    """Hold the run's folder until this process ends; waits for a dying worker, then refuses."""
    file = open(regular_or_new(out / ".lock"), "a+")  # noqa: SIM115 - stays open for the life of the run
    for second in range(patience_s):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.seek(0)
        owner = file.read(20)
        if second == 0 and patience_s > 1:
            print(f"{out} is in use by process {owner}; waiting up to {patience_s} s for it to end", file=sys.stderr)
        time.sleep(1)
    raise ValueError(f"{out} is in use by process {owner}; stop it, or choose another --out")


def regular_or_new(path):
    return regular(path) if path.exists() else path


def git_commit():
    """HEAD, with +dirty where files differ from it; None without git, or outside a repository."""

    def ask(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)

    with contextlib.suppress(FileNotFoundError):
        head = ask("rev-parse", "HEAD")
        if head.returncode == 0:
            return head.stdout.strip() + "+dirty" * bool(ask("status", "--porcelain").stdout.strip())
    return None


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense bf16, from the data sheets


def device_peak(device):
    """Dense bf16 TFLOP/s of a known card, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)


def forward_flops(vit, size, read=None):
    """Of one image; `read`: tokens for which the last block does more than keys, values and queries (None: all)."""
    patches = (size // vit.patch_size) ** 2
    tokens, weights = patches + 1 + vit.registers, sum(p.numel() for p in vit.blocks.parameters() if p.ndim == 2)
    attention, embedding = 2 * vit.depth * tokens**2 * vit.dim, patches * vit.patch_embed.proj.weight.numel()
    last = vit.blocks[-1]
    rowwise = sum(p.numel() for part in (last.attn.proj, last.mlp) for p in part.parameters() if p.ndim == 2)
    saved = 0 if read is None else (tokens - read) * rowwise
    return 2 * (tokens * weights - saved + attention + embedding)


def flops_per_image(student, recipe, args, with_gram):
    """Multiply-adds x 2 of one image in one update: student forward and backward, teacher forward, Gram forward."""
    vit, patches = student.backbone, (recipe.global_size // student.backbone.patch_size) ** 2
    masked = 2 * patches * args.mask_probability * sum(args.mask_ratio) / 2
    target = forward_flops(vit, recipe.global_size, 1 + masked / 2)
    big = forward_flops(vit, recipe.global_size, 1 + patches) if with_gram else target
    small = forward_flops(vit, recipe.local_size, 1)
    head = 2 * sum(p.numel() for p in student.dino_head.parameters())
    sizes = [(p.numel(), p.requires_grad) for p in vit.blocks.parameters() if p.ndim == 2]  # frozen: no gradient of it
    passes = 2 + sum(n for n, trained in sizes if trained) / sum(n for n, _ in sizes)
    learned = passes * (2 * big + recipe.local_crops * small) + 3 * head * (2 + recipe.local_crops + masked)
    targets = 2 * target + head * (2 + masked)
    return learned + targets + (2 * forward_flops(student.backbone, recipe.gram_size) if with_gram else 0)


def other_encoding(facts, encoding):
    """A sentence where weights (their facts) were trained on images of another kind, else None."""
    if (trained := facts.get("encoding", encoding)) == encoding:
        return None
    return f"note: the weights were trained on {shown(trained)}, these images are {encoding}: they may fit them badly"


def warnings_in_words(numbers, loss_before, rows, dim):
    """What the collapse numbers of one log line say, if anything."""
    most = min(rows, dim)
    if not math.isfinite(numbers["rankme"]):
        yield "diverged: the teacher's features are not finite"
    elif numbers["rankme"] < max(1.5, limits.FLAT * most) or numbers["cosine"] > limits.ALIKE:
        spans = f"{numbers['rankme']:.1f} of {most} dimensions"
        yield f"rank collapse: features span {spans}, mean cosine {numbers['cosine']:.3f}"
    if numbers["teacher_entropy"] < limits.ONE_HOT:
        yield f"one-hot collapse: teacher entropy is {numbers['teacher_entropy']:.4f} of ln K"
    elif numbers["teacher_entropy"] > limits.UNIFORM and numbers["kl"] < limits.AGREES:
        yield f"uniform collapse: teacher entropy is {numbers['teacher_entropy']:.4f} of ln K and the student agrees"
    if limits.spiked(numbers["loss"], loss_before):
        yield f"loss spike: {numbers['loss']:.3f} after {loss_before:.3f}"


def memory_gb(device):
    """Most memory taken on a card, or memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform != "linux":
        return 0.0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


SHOWN = """loss excess dino ibot koleo gram accuracy teacher_entropy rankme lr images_s val_loss val_top1 val_top5
val_mcc val_accuracy val_auc""".split()


class Log:
    """metrics.jsonl, TensorBoard and one readable line; on rank 0 only. A full disk is said aloud and stops nothing."""

    def __init__(self, out, start, total, quiet):
        self.quiet, self.path, self.done = quiet, out / "metrics.jsonl", start
        if quiet:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.tb = SummaryWriter(out / "tb", purge_step=start + 1)
        self.updates, self.since, self.told = 0, 0.0, False  # of this start; after the first of them; a line of numbers
        self.bar = tqdm(total=total, initial=start, unit="update", dynamic_ncols=True, smoothing=0.05, disable=None)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            tqdm.write(f"{self.path.parent}: the log cannot be written, which stops nothing: {error}", file=sys.stderr)

    def event(self, step, text, everywhere=False, **more):
        """everywhere: told by ranks that are otherwise quiet too, since one rank alone knows it."""
        if everywhere or not self.quiet:
            tqdm.write(f"step {step}: {text}")
            with self.writing():
                append_line(self.path, {"step": step, "event": text, **more})

    def numbers(self, step, line):
        if self.quiet:
            return
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        with self.writing():
            append_line(self.path, {"step": step, **line})
            for key, value in line.items():
                if isinstance(value, (int, float)):
                    self.tb.add_scalar(key, value, step)
        shown, self.told = [f"{key} {line[key]:.4g}" for key in SHOWN if key in line], self.updates > 0
        if self.bar.disable and line.get("seconds_to_go"):
            shown.append(f"about {tqdm.format_interval(line['seconds_to_go'])} to go")
        tqdm.write(f"step {step}: " + ", ".join(shown))

    def tick(self, crops=None):
        """One update is done; crops: pictures of what it saw, for TensorBoard."""
        if self.quiet:
            return
        self.bar.update()
        views = {} if crops is None else {"globals": crops.globals[:8], "locals": crops.locals[:16]}
        for name, images in views.items():
            with self.writing():
                self.tb.add_images(f"crops/{name}", denormalise(images).clamp(0, 1).float().cpu(), self.done)
        self.updates += 1
        if self.updates == 1:  # it took longer than others
            self.since = time.perf_counter()
        if self.updates == 3 and self.bar.disable and not self.told:  # no bar, and the first line may be minutes away
            seconds = (time.perf_counter() - self.since) / 2
            to_go = tqdm.format_interval((self.bar.total - self.done) * seconds)
            tqdm.write(f"step {self.done}: {seconds:.3g} s an update, about {to_go} to go")

    def close(self):
        if not self.quiet:
            self.bar.close()
            with self.writing():
                self.tb.close()
