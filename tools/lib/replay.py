"""An update of a run once more, to the bit, by the functions of the trainer that made it; the run is only read."""

import argparse
import functools
from pathlib import Path

import numpy as np

from tools.lib import loop, settings
from tools.lib.autopsy import Replay, confirmed, examine, nearest
from tools.lib.files import json_text
from tools.lib.progress import progress
from tools.lib.runs import read_run_config
from tools.lib.slices import slice_name


def replay(ssl, args, device):
    """Print what update --why was made of, replayed from the nearest checkpoint; the run is only read -> exit code.

    ssl: train_ssl.py, whose functions make the update; programs are not imported here.
    """
    path, facts = nearest(args.out, args.why)
    flags = facts["args"] if path else read_run_config(Path(args.out))["args"]
    here = {name: getattr(args, name) for name in ("data", "out", "workers", "why", "device")}
    here |= dict(compile=False, fsdp=False, eval_every=0, allow_duplicates=True)
    args = argparse.Namespace(**{**vars(args), **flags, **here})
    loop.set_precision(args, device)
    source, _ = ssl.open_data(args)
    for name in ("index_sha256", "split_sha256", "weights_sha256") if path else ():
        if facts.get(name) != getattr(source, name):
            raise ValueError(f"{args.data}: {name} differs from that of {path}; name the run's data with --data")
    recipes, start = settings.make_recipes(args, source.encoding), facts.get("step", 0)
    backbone = ssl.build_backbone(args, facts.get("arch"))
    batches = ssl.start_reading(args, source, recipes, range(start, args.why), backbone.patch_size, 0, 1, device)
    run = ssl.build_run(args, backbone, source, recipes, 0, 1, device, facts.get("gram_arch"))
    if path:
        ssl.unpack_state(run, path)
    for step in progress(range(start, args.why), f"from {path.name if path else 'the start'}", unit="update"):
        now = ssl.values_at(step, args)
        ssl.refresh_gram(run, step)
        read = [next(batches) for _ in range(args.batch_size // args.micro_batch)]
        micro_batches = ssl.prepared(run, read)
        if step < args.why - 1:
            ssl.one_update(run, micro_batches, now)
    w = ssl.weights_of(now, args)
    update = Replay(run.student, run.teacher, run.gram, w, run.centers, ssl.ssl_update, source)
    found = examine(update, micro_batches, read, functools.partial(in_its_place, ssl, run, read))
    found |= {"step": args.why, "from": path.name if path else "the start", "replayed": args.why - start}
    found |= confirmed(args.out, args.why, ssl.one_update(run, micro_batches, now), run.student)
    print(json_text(found, None))
    return 0


def in_its_place(ssl, run, read, m, j):
    """The micro-batches of an update with another image in one place, drawn alike -> (micro-batches, its name)."""
    args, source, step = run.args, run.source, read[0].step
    taken = {int(i) for batch in read for i in batch.ids}
    other = next((int(i) for i in source.order(args.seed, step + 1, args.batch_size) if int(i) not in taken), None)
    if other is None:
        other = next((i for i in range(len(source)) if i not in taken), int(read[m].ids[j]))
    index = np.arange(len(source))
    index[read[m].ids[j]] = other
    swapped = source.take(index)
    swapped.order = source.order  # by the series of the images that were there
    patch = run.student.backbone.patch_size
    batches = ssl.start_reading(args, swapped, run.recipes, range(step, step + 1), patch, 0, 1, run.device)
    return ssl.prepared(run, [next(batches) for _ in read]), slice_name(source, other)
