"""Find pictures that occur in more than one group (patient), so that no copy of a training picture is tested on.

Reads a processed CT folder or a folder tree of photographs; writes DATA/_splits/duplicates.json, whose groups
make_splits.py then keeps together. Exit code 1 if a duplicate crosses the splits that are there, 0 otherwise.

    python tools/check_duplicates.py --data data/processed --workers 16
"""

import functools
import hashlib
import os
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Unreadable, read_splits, split_path
from tools.lib import broken
from tools.lib.cli import Parser, positive, run, shown, within
from tools.lib.files import write_json
from tools.lib.groups import join, open_data
from tools.lib.progress import progress
from tools.lib.slices import slice_name
from tools.lib.workers import parallel

VERSION = 1
SIDE = 32  # of the thumbnail that is hashed and compared
FLAT_STD = 2.0  # codes of 255: below it the hash is noise (air above the head, blank pages)
# The hash alone would join strangers, since all chests look alike at 8x8: 200 simulated ones had 20,193 slice pairs of
# different patients within 3 bits, all with thumbnails below r = 0.998. JPEG quality 10, half size or noise of 10 codes
# leave r above 0.9994. Photographs differ more and are edited more.
ALIKE_CT, ALIKE_PHOTO = 0.999, 0.98
BITS = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)  # numpy 1.26 has no bitwise_count


def ready(source):
    """In a worker: keep the source, take photographs of any size."""
    global SOURCE
    SOURCE = source
    Image.MAX_IMAGE_PIXELS = None


def look(i):
    """(sha256 of the pixels of image i, "" if it has one colour; grey thumbnail [32,32]; why it cannot be read)."""
    try:
        pixels = SOURCE.read(i).numpy()  # [3,H,W]
    except Unreadable as error:
        return "", np.zeros((SIDE, SIDE), np.uint8), str(error)
    if pixels.dtype == np.int16:
        codes = (pixels[1].astype(np.float32).clip(-1000, 1000) + 1000) * (255 / 2000)  # air to dense bone
        grey = Image.fromarray(codes.astype(np.uint8))
    else:
        grey = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    constant = (pixels == pixels[:, :1, :1]).all()
    return "" if constant else digest, np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR)), ""


def look_at_all(source, order, workers):
    """(digests, thumbnails [N,32,32], {position: why it cannot be read}) of the images in `order`."""
    digests, thumbs, bad = [], np.empty((len(order), SIDE, SIDE), np.uint8), {}
    found = parallel(look, order, workers, functools.partial(ready, source), chunk=16)
    for i, (digest, thumb, why) in enumerate(progress(found, "read", len(order), unit="image")):
        digests.append(digest)
        thumbs[i] = thumb
        bad |= {i: why} if why else {}
    return digests, thumbs, bad


def phash(thumbs):
    """[N,32,32] -> [N] uint64: which of the 8x8 lowest DCT-II frequencies exceed their median."""
    k, x = np.mgrid[:8, :SIDE]
    dct = np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE))  # [8,32]
    out = np.empty(len(thumbs), np.uint64)
    for start in range(0, len(thumbs), 10_000):
        coefs = (dct @ thumbs[start : start + 10_000].astype(np.float64) @ dct.T).reshape(-1, 64)
        bits = coefs > np.median(coefs, axis=1, keepdims=True)
        out[start : start + 10_000] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return out


def hamming(a, b):
    """Bits that differ between two uint64 arrays."""
    return BITS[(a ^ b).view(np.uint16)].reshape(-1, 4).sum(1)


def near_pairs(hashes, owners, distance):
    """Yield [P,2] arrays that hold every pair of different owners within `distance` bits once.

    Pigeonhole: `distance` flipped bits leave at least 3 of distance + 3 bands untouched, so sorting by every choice
    of 3 bands (about 32 bits: few others come along) brings each pair together. 250,000 random hashes take 1 s.
    """
    bands = np.array_split(np.arange(64), distance + 3)
    masks = [np.uint64(sum(1 << int(bit) for band in chosen for bit in band)) for chosen in combinations(bands, 3)]
    for table, mask in enumerate(progress(masks, desc="compare", unit="table")):
        order = np.argsort(hashes & mask, kind="stable")
        key = (hashes & mask)[order]
        left, step = np.arange(len(key)), 0
        while len(left):  # runs of equal keys: neighbours at step 1, 2, ... until the longest run ends
            step += 1
            left = left[left + step < len(key)]
            left = left[key[left] == key[left + step]]
            a, b = order[left], order[left + step]
            new = (owners[a] != owners[b]) & (hamming(hashes[a], hashes[b]) <= distance)
            for earlier in masks[:table]:
                new &= (hashes[a] ^ hashes[b]) & earlier != 0
            yield np.stack([np.minimum(a, b), np.maximum(a, b)], 1)[new]


def correlation(a, b):
    """[P,32,32] twice -> [P]: Pearson's r of two thumbnails."""
    a, b = (t.reshape(-1, SIDE * SIDE).astype(np.float32) for t in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def exact_pairs(digests, owners):
    """[P,2]: of the slices with one digest, the first with the first of each other owner; constant ones left out."""
    first = defaultdict(dict)  # digest -> {owner: slice}
    for i, (digest, owner) in enumerate(zip(digests, owners.tolist())):
        first[digest].setdefault(owner, i)
    first.pop("", None)
    slices = [list(by_owner.values()) for by_owner in first.values()]
    return np.array([(s[0], other) for s in slices for other in s[1:]], np.int64).reshape(-1, 2)


def look_alikes(digests, thumbs, owners, distance, least):
    """(near but unequal pairs [P,2] of different owners with r >= least; number of slices too flat to hash).

    Neighbours in a series, and in a patient, are near copies by nature: only pairs across owners count.
    """
    textured = np.flatnonzero(thumbs.reshape(len(thumbs), -1).std(1) >= FLAT_STD)
    found = []
    for near in near_pairs(phash(thumbs[textured]), owners[textured], distance):
        for pairs in np.array_split(textured[near], len(near) // 10_000 + 1):
            alike = correlation(thumbs[pairs[:, 0]], thumbs[pairs[:, 1]]) >= least
            found += [(a, b) for a, b in pairs[alike].tolist() if digests[a] != digests[b]]
    return np.array(sorted(found), np.int64).reshape(-1, 2), len(thumbs) - len(textured)


def conflicts(labels, digests, near):
    """Pairs (a, b) of equal or nearly equal pictures that carry different labels; of equal ones each with the first."""
    first, found = {}, []
    for i, (digest, label) in enumerate(zip(digests, labels)):
        if digest and label and labels[j := first.setdefault(digest, i)] != label:
            found.append((j, i))
    return found + [(a, b) for a, b in near.tolist() if labels[a] and labels[b] and labels[a] != labels[b]]


def say(title, members):
    """Print a list of groups, at most six."""
    print(title, *map(shown, members[:6]), *["..."][: len(members) > 6])


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="processed CT folder, or folder tree of photographs")
    p.add_argument("--distance", type=within("[0, 8]", int), default=3, help="bits of a hash; 9 would match strangers")
    p.add_argument("--workers", type=positive, default=os.cpu_count(), help="reading processes")
    broken.add_flag(p)
    p.add_argument("--max-pairs", type=positive, default=1000, help="pairs listed in the file; all count and join")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    source = open_data(args.data)
    splits, again = split_path(args.data), "make it again with tools/make_splits.py --force"
    split_of = read_splits(splits, again)["groups"] if splits.exists() else {}
    rows = source.rows
    z = rows.columns.get("z", np.zeros(len(rows), int))
    order = np.lexsort((z, rows.columns["path"])).tolist()  # the answer does not depend on the index's order
    group = rows.column("group")[order]
    names, owners = np.unique(group, return_inverse=True)

    digests, thumbs, bad = look_at_all(source, order, args.workers)
    broken.check(bad, len(order), len(order), args.skip_bad)  # those left out have no contrast: they match nothing
    exact = exact_pairs(digests, owners)
    least = ALIKE_PHOTO if source.encoding == "photo" else ALIKE_CT
    near, flat = look_alikes(digests, thumbs, owners, args.distance, least)
    pairs = np.concatenate([exact, near])
    linked = group[pairs].tolist()
    sets = join({name for members in linked for name in members}, linked)
    crossing = [members for members in sets if len({split_of[name] for name in members if name in split_of}) > 1]
    label = [text.strip() for text in rows.texts("label")] if source.encoding == "photo" else [""] * len(order)
    label = [label[i] for i in order]
    odd = conflicts(label, digests, near)
    copies = Counter(digests)
    counts = {
        "slices": len(source),
        "groups": len(names),
        "constant": digests.count(""),  # one colour: matched by nothing
        "broken": len(bad),  # counted as constant too
        "flat": flat,  # too little contrast to hash: matched exactly only
        "exact_sets": sum(n > 1 for digest, n in copies.items() if digest),  # of slices, in one group or several
        "exact_pairs": len(exact),
        "near_pairs": len(near),
        "joined_groups": sum(len(members) for members in sets),
        "crossing": len(crossing),
        "conflicting": len(odd),
    }
    listed = pairs[: args.max_pairs]
    title = {i: slice_name(source, order[i]) for i in set(listed.ravel().tolist())}
    distances = hamming(phash(thumbs[listed[:, 0]]), phash(thumbs[listed[:, 1]])).tolist()
    payload = {
        "version": VERSION,
        "index_sha256": source.index_sha256,
        "distance": args.distance,
        "correlation": least,
        "counts": counts,
        "groups": sets,
        "conflicts": [
            {"a": slice_name(source, order[a]), "b": slice_name(source, order[b]), "labels": [label[a], label[b]]}
            for a, b in odd
        ],
        "pairs": [{"a": title[a], "b": title[b], "distance": d} for (a, b), d in zip(listed.tolist(), distances)],
    }
    path = split_path(args.data, "duplicates.json")
    write_json(path, payload)
    words = {"slices": "images"} if source.encoding == "photo" else {}
    print("wrote", path, *(f"{words.get(key, key)}={n}" for key, n in counts.items()))
    for pair in payload["conflicts"][:10]:
        a, b, (one, other) = *(shown(pair[key]) for key in "ab"), map(shown, pair["labels"])
        print(f"TWO LABELS of one picture: {a} is {one}, {b} is {other}")
    for members in sets[:10]:
        say("same pictures in", members)
    for members in crossing[:10]:
        say("CROSSES SPLITS:", members)
    if split_of and (unknown := set(names.tolist()) - set(split_of)):
        print(f"note: {splits} does not know {len(unknown)} groups, e.g. {shown(min(unknown))}; make it again")
    if crossing:
        again = f"python tools/make_splits.py --data {args.data} --force"
        print(f"make the split again, with the --ratios and --labels of before: {again}")
    return 1 if crossing else 0


if __name__ == "__main__":
    run(main)
