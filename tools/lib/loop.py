"""What a training run leaves behind for people: metrics.jsonl, TensorBoard, a readable line, warnings in words.

Shared by the training programs; nothing here changes a number of the method.
"""

import contextlib
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from data import Recipe, denormalise


def lock(out, patience_s=60):
    """Hold the run's folder until this process ends; waits for a dying worker, then refuses."""
    file = open(out / ".lock", "a+")  # noqa: SIM115 - stays open for the life of the run
    for _ in range(patience_s):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        time.sleep(1)
    file.seek(0)
    raise ValueError(f"{out} is in use by process {file.read()}; stop it, or choose another --out")


def git_commit():
    """HEAD, with +dirty where files differ from it; None without git, or outside a repository."""

    def ask(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)

    with contextlib.suppress(FileNotFoundError):
        head = ask("rev-parse", "HEAD")
        if head.returncode == 0:
            return head.stdout.strip() + "+dirty" * bool(ask("status", "--porcelain").stdout.strip())
    return None


def append_line(path, line):
    """One write of one line, so that readers never see half of it; a line that a full disk cut is ended first."""
    with open(path, "ab+") as f:
        f.seek(max(f.seek(0, os.SEEK_END) - 1, 0))
        cut = f.read(1) not in (b"", b"\n")
        f.write(b"\n" * cut + json.dumps(line).encode() + b"\n")


PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense bf16, from the data sheets


def device_peak(device):
    """Dense bf16 TFLOP/s of a known card, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)


def forward_flops(vit, size):
    patches = (size // vit.patch_size) ** 2
    tokens, weights = patches + 1 + vit.registers, sum(p.numel() for p in vit.blocks.parameters() if p.ndim == 2)
    attention, embedding = 2 * vit.depth * tokens**2 * vit.dim, patches * vit.patch_embed.proj.weight.numel()
    return 2 * (tokens * weights + attention + embedding)


def flops_per_image(student, recipe, args, with_gram):
    """Multiply-adds x 2 of one image in one update: student forward and backward, teacher forward, Gram forward."""
    big, small = (forward_flops(student.backbone, s) for s in (recipe.global_size, recipe.local_size))
    patches = (recipe.global_size // student.backbone.patch_size) ** 2
    masked = 2 * patches * args.mask_probability * sum(args.mask_ratio) / 2
    head = 2 * sum(p.numel() for p in student.dino_head.parameters())
    learned = 3 * (2 * big + recipe.local_crops * small + head * (2 + recipe.local_crops + masked))
    targets = 2 * big + head * (2 + masked)
    return learned + targets + (2 * forward_flops(student.backbone, recipe.gram_size) if with_gram else 0)


def warnings_in_words(numbers, loss_before, rows, dim):
    """What the collapse numbers of one log line say, if anything."""
    most = min(rows, dim)
    if not math.isfinite(numbers["rankme"]):
        yield "diverged: the teacher's features are not finite"
    elif numbers["rankme"] < max(1.5, 0.05 * most) or numbers["cosine"] > 0.99:
        spans = f"{numbers['rankme']:.1f} of {most} dimensions"
        yield f"rank collapse: features span {spans}, mean cosine {numbers['cosine']:.3f}"
    if numbers["teacher_entropy"] < 0.02:
        yield f"one-hot collapse: teacher entropy is {numbers['teacher_entropy']:.4f} of ln K"
    elif numbers["teacher_entropy"] > 0.995 and numbers["kl"] < 0.05:
        yield f"uniform collapse: teacher entropy is {numbers['teacher_entropy']:.4f} of ln K and the student agrees"
    if numbers["loss"] > 1.5 * loss_before:
        yield f"loss spike: {numbers['loss']:.3f} after {loss_before:.3f}"


def memory_gb(device):
    """Most memory taken on a card, or memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform != "linux":
        return 0.0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


SHOWN = "loss excess dino ibot koleo gram teacher_entropy rankme lr images_s val_loss val_top1 val_top5".split()


class Log:
    """metrics.jsonl, TensorBoard and one readable line; on rank 0 only. A full disk is said aloud and stops nothing."""

    def __init__(self, out, start, total, quiet):
        self.quiet, self.path = quiet, out / "metrics.jsonl"
        if quiet:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.tb = SummaryWriter(out / "tb", purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="update", dynamic_ncols=True, smoothing=0.05)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            tqdm.write(f"{self.path.parent}: the log cannot be written, training goes on: {error}", file=sys.stderr)

    def event(self, step, text, **more):
        if not self.quiet:
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
        shown = [f"{key} {line[key]:.4g}" for key in SHOWN if key in line]
        tqdm.write(f"step {step}: " + ", ".join(shown))

    def crops(self, step, crops):
        if not self.quiet:
            for name, views in (("globals", crops.globals[:8]), ("locals", crops.locals[:16])):
                with self.writing():
                    self.tb.add_images(f"crops/{name}", denormalise(views).clamp(0, 1).float().cpu(), step)

    def close(self):
        if not self.quiet:
            self.bar.close()
            with self.writing():
                self.tb.close()


# Reading a run back.

NEEDED = "args recipes masking patch_size split index_sha256 split_sha256".split()
FLAGS = "data seed steps batch_size micro_batch limit z_stride overfit gram_start".split()


def read_config(folder):
    """config.json of a run, checked."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --run names a folder that train_ssl.py wrote")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    config = config if isinstance(config, dict) else {}
    missing = [key for key in NEEDED if key not in config] or [key for key in FLAGS if key not in config["args"]]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: use the code that trained this run")
    return config


def read_recipes(config):
    """Recipes as stored -> Recipe objects; JSON made lists of their tuples."""
    names = {f.name for f in fields(Recipe)}
    if odd := set().union(*(recipe.keys() ^ names for recipe in config["recipes"])):
        raise ValueError(f"the recipe of this run differs from ours in {sorted(odd)}: use the code that trained it")
    return [Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in config["recipes"]]
