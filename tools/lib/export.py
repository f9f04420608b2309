"""A folder for other people: written where nobody sees it, then renamed; weights, provenance, SHA256SUMS.

with staged(Path("release/first")) as folder:
    write_weights(vit, facts, folder)
    write_sums(folder)
"""

import contextlib
import os
import shutil

import safetensors.torch

import checkpoint
from checkpoint import atomic_write, write_text
from data import MEAN, STD, file_sha256
from model import state_to_hf, state_to_timm
from tools.lib.cli import shown
from tools.lib.files import write_json
from tools.lib.provenance import claimed, provenance_of


def refuse_full(out):
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists and is not empty: name a new folder, or delete it first")


@contextlib.contextmanager
def staged(out):
    """An empty folder that gets the name `out` at the end, or is deleted: half a release never has its final name."""
    staging = out.resolve().with_name(f".{out.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        os.replace(staging, out)
        checkpoint.fsync_folder(staging.parent)
    except OSError as error:
        error.filename = error.filename or str(staging)  # "No space left on device" names no place
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for path in sorted(out.iterdir()):
        print(f"{shown(out / path.name, 400)}: {path.stat().st_size:,} bytes")


def processor_config(size):
    """preprocessor_config.json: what eval_view does, in the words of the published DINOv3 models."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "resample": 3,  # bicubic
        "size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD), "data_format": "channels_first",
    }  # fmt: skip


def timm_config(size, chans):
    """What timm is told of pictures."""
    return {"input_size": [chans, size, size], "fixed_input_size": False, "interpolation": "bicubic", "crop_pct": 1.0,
            "mean": list(MEAN), "std": list(STD), "num_classes": 0, "first_conv": "patch_embed.proj"}  # fmt: skip


def write_weights(vit, facts, folder, layout="hf"):
    """model.safetensors, config.json and, for transformers, preprocessor_config.json; returns the config."""
    size = facts["eval_view"]["size"]
    if layout == "hf":
        state, config = state_to_hf(vit)
        config |= {"image_size": size, "dtype": "float32"}
        write_json(folder / "preprocessor_config.json", processor_config(size), indent=2)
    else:
        state, config = state_to_timm(vit)
        config |= {"pretrained_cfg": timm_config(size, vit.patch_embed.proj.in_channels)}
    packed = safetensors.torch.save(state, {"format": "pt"})
    atomic_write(folder / "model.safetensors", lambda f: f.write(packed))
    write_json(folder / "config.json", config, indent=2)
    return config


def write_sums(folder):
    """SHA256SUMS of all other files, as sha256sum writes it."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    write_text(folder / "SHA256SUMS", "".join(f"{file_sha256(path)}  {path.name}\n" for path in files))


def provenance_file(facts, source):
    """{version, known, seen}: that of the checkpoint; of an older one made from its trained_groups.

    source: the images of the run, or None; adds hashes of series, and of photographs hashes of the bytes of each file.
    """
    found = claimed(facts)
    seen = found["seen"]
    if source is not None:
        seen = [*seen, provenance_of(source, files=source.encoding == "photo")]
    merged = {}
    for entry in seen:
        own = merged.setdefault(entry["salt"], {key: set() for key in ("groups", "series", "files")})
        for key, hashes in own.items():
            hashes.update(entry.get(key) or ())
    seen = [{"salt": salt} | {key: sorted(own) for key, own in sets.items()} for salt, sets in merged.items()]
    return {"version": 1, "known": found["known"], "seen": seen}
