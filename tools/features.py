"""Dense features of a whole CT volume as NIfTI in the patient's space: opens over the CT, enters nnU-Net as channels.

    python tools/features.py --ckpt runs/lidc/last.pth --volume ct.nii.gz --out pca.nii.gz
    python tools/features.py --ckpt runs/lidc/last.pth --volume dicom/ --point 41.5 -20 -310 --out like_this.nii.gz

In: weights; a volume of a processed folder (.npy), a folder of DICOM, or what SimpleITK reads. Out: float32 channels
on the grid of the volume, with its affine: directions of a PCA (deviation 1 each), cosine to the feature at a point,
or attention of cls as a multiple of an even share; beside it OUT.basis.npz, with which --basis draws another volume in
the same channels, and OUT.json. Memory: the volume and one slice of features; the channels wait in a file.
"""

import functools
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import numpy as np
import torch

from checkpoint import atomic_write
from data import regular
from model import load_backbone, read_facts
from tools.lib import dense, judge, provenance, sheet, space
from tools.lib.cli import Parser, above_zero, finite, pick_device, positive, run, within
from tools.lib.files import write_json
from tools.lib.progress import progress

SAMPLED = 24  # slices from which the directions of the PCA are learned
REMEDY = "write it anew with tools/features.py"


def build_parser():
    parser = Parser(__doc__)
    # fmt: off
    parser.add_argument("--ckpt", required=True, type=Path, help="weights: a checkpoint, a release, any DINOv3 ViT")
    parser.add_argument("--volume", required=True, type=Path, help="hu16 .npy of a processed folder, folder of DICOM, "
                        ".nii.gz, .mhd or .nrrd (the last three need SimpleITK)")
    parser.add_argument("--out", required=True, type=Path, help=".nii or .nii.gz")
    parser.add_argument("--channels", type=within("[1, 64]", int), default=3, help="directions of the PCA")
    parser.add_argument("--point", type=finite, nargs=3, help="x y z in mm: cosine to the feature there. LPS, as DICOM "
                        "and SimpleITK count; 3D Slicer shows RAS: the first two with the other sign")
    parser.add_argument("--attention", action="store_true", help="of cls in the last block, instead of a PCA")
    parser.add_argument("--basis", type=Path, help="OUT.basis.npz of another volume: the same directions, or the "
                        "feature at its --point, here")
    parser.add_argument("--per-channel", action="store_true", help="a file for each, OUT_0000.nii.gz ..., for nnU-Net")
    parser.add_argument("--patch-mm", type=above_zero, default=8.0, help="side of a patch in the patient")
    parser.add_argument("--tile", type=positive, default=28, help="patches along a side that are seen at once")
    parser.add_argument("--stride", type=positive, default=1, help="compute every n-th slice, blend those between")
    parser.add_argument("--every", type=positive, default=1, help="write means of n x n pixels of a slice")
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda")
    # fmt: on
    return parser


def check_flags(args):
    """-> the name of what is drawn."""
    if not str(args.out).endswith((".nii", ".nii.gz")):
        raise ValueError(f"--out {args.out}: end it in .nii.gz or .nii")
    given = [flag for flag in ("point", "attention", "basis") if getattr(args, flag)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} are two ways to make channels: give one")
    return given[0] if given else "pca"


def read_basis(path, dim):
    """{mean [D], axes [D, C], kind} of an earlier volume."""
    try:
        with np.load(regular(path), allow_pickle=False) as file:
            found = {name: file[name] for name in ("mean", "axes", "kind")}
    except FileNotFoundError:
        raise FileNotFoundError(f"--basis {path} does not exist; it lies beside what --out named") from None
    except (ValueError, OSError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--basis {path} is damaged ({str(error)[:80]}); {REMEDY}") from None
    if found["mean"].shape != (dim,) or found["axes"].shape[:1] != (dim,) or found["axes"].ndim != 2:
        raise ValueError(f"--basis {path} is of features of {found['mean'].shape}, these have {dim}; {REMEDY}")
    if not all(found[name].dtype.kind == "f" and np.isfinite(found[name]).all() for name in ("mean", "axes")):
        raise ValueError(f"--basis {path} holds numbers that are not finite; {REMEDY}")
    return found


def learn_basis(args, volume, grid, features):
    """Of the point, or of the patches of SAMPLED slices -> {mean, axes, kind}, facts for people."""
    if args.point:
        index = dense.index_of(volume, args.point)
        here = dense.at_point(features(int(round(index[2]))), volume, grid, args.point).numpy()
        axes = (here / max(np.linalg.norm(here), 1e-12))[:, None]
        facts = {"point_mm": args.point, "index": index.tolist()}
        return {"mean": np.zeros(len(here), np.float32), "axes": axes, "kind": np.array("point")}, facts
    chosen = np.unique(np.linspace(0, len(volume.hu) - 1, SAMPLED).round().astype(int)).tolist()
    rows = [features(z)[dense.is_inside(volume, z, grid)] for z in progress(chosen, "directions", unit="slice")]
    rows = torch.cat(rows).numpy()
    if len(rows) <= args.channels:
        raise ValueError(f"{args.volume}: {len(rows)} patches are not air; --patch-mm {args.patch_mm:g} is too large")
    mean, axes, shares = sheet.principal(rows.astype(np.float64), count=args.channels)
    facts = {"shares": shares.tolist(), "patches": len(rows)}
    return {"mean": mean.astype(np.float32), "axes": axes.astype(np.float32), "kind": np.array("pca")}, facts


def write_all(args, volume, of_slice, count):
    """Channels through a file of their own, so that memory holds one slice -> paths."""
    slices, height, width = volume.hu.shape
    shape = (count, slices, height // args.every, width // args.every)
    if not shape[2] or not shape[3]:
        raise ValueError(f"--every {args.every}: a slice has {height} x {width} pixels; use fewer")
    with tempfile.TemporaryFile(dir=args.out.parent) as file:
        channels = np.memmap(file, np.float32, "w+", shape=shape)
        work = dense.channels_of(slices, of_slice, args.stride)
        for z, found in progress(work, "features", total=slices, unit="slice"):
            channels[:, z] = found.numpy()
        stored, affine = space.as_stored(volume, channels, args.every)
        if not args.per_channel:
            return [space.write_nifti(args.out, stored, affine)]
        stem, end = named(args.out)
        return [space.write_nifti(f"{stem}_{c:04d}{end}", stored[c : c + 1], affine) for c in range(count)]


def named(path):
    """pca.nii.gz -> (pca, .nii.gz)"""
    end = ".nii.gz" if str(path).endswith(".gz") else ".nii"
    return str(path).removesuffix(end), end


def main(argv=None):
    args = build_parser().parse_args(argv)
    kind, device = check_flags(args), pick_device(args.device)
    stamp = provenance.stamp(args.ckpt)
    facts, vit = read_facts(args.ckpt), load_backbone(args.ckpt).to(device)
    encoding = facts.get("encoding", "hu16-v1")
    if encoding == "photo":
        print("note: these weights were trained on photographs; they see the wide window of three slices")
        encoding = "hu16-v1"
    known = facts if encoding == facts.get("encoding") else {}
    view = judge.choose_view(known, encoding, vit.patch_size, vit.patch_size)
    provenance.refuse_change(args.ckpt, stamp)
    volume = space.read(args.volume)
    if volume.note:
        print(f"note: {volume.note}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid = dense.grid_of(volume, args.patch_mm)
    ask = functools.partial(dense.slice_features, vit, view, volume, grid=grid, tile=args.tile, encoding=encoding)
    said = {"version": 1, "kind": kind, "volume": args.volume.name, "weights_sha256": judge.weights_sha256(args.ckpt)}
    stem = named(args.out)[0]
    if args.attention:
        found = write_all(
            args, volume, lambda z: dense.on_pixels(
                ask(z, look=functools.partial(dense.attention, vit)), grid, args.every), 1,
        )  # fmt: skip
    else:
        basis, more = (read_basis(args.basis, vit.dim), {}) if args.basis else learn_basis(args, volume, grid, ask)
        atomic_write(Path(f"{stem}.basis.npz"), lambda f: np.savez(f, **basis))
        mean, axes = (torch.from_numpy(basis[name]) for name in ("mean", "axes"))

        def of_slice(z):
            maps = ask(z)
            maps = torch.nn.functional.normalize(maps, dim=-1) if str(basis["kind"]) == "point" else maps
            return dense.on_pixels((maps - mean) @ axes, grid, args.every)

        found, said = write_all(args, volume, of_slice, axes.shape[1]), said | more
    said |= {"patch_mm": args.patch_mm, "grid": [grid.rows, grid.cols], "tile": args.tile, "stride": args.stride,
             "affine_lps": space.coarser(volume.affine, args.every).tolist()}  # fmt: skip
    write_json(Path(f"{stem}.json"), said)
    print(f"{len(volume.hu)} slices of {grid.rows} x {grid.cols} patches, {kind}; wrote {', '.join(map(str, found))}")
    return 0


if __name__ == "__main__":
    run(main)
