"""Turn a checkpoint into a folder for other people: the EMA teacher in the Hugging Face DINOv3 layout, with its papers.

In: a checkpoint of train_ssl.py and, with --probe, the results.json that train_probe.py wrote about it. Out: OUT/ with
model.safetensors, config.json, preprocessor_config.json, README.md (model card), LICENSE and SHA256SUMS. The folder
appears only when what is in it was loaded again and gives the teacher's outputs to 1e-5. No path of this machine and no
patient id gets in.

    python tools/release.py --ckpt runs/lidc/last.pth --data data/processed --probe runs/lidc/probe/results.json \\
        --out release/dinox-lidc-vit-small
    cd release/dinox-lidc-vit-small && sha256sum -c SHA256SUMS
"""

import json
import os
import re
import shutil
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from checkpoint import atomic_write, write_text
from data import MEAN, STD, file_sha256, open_source
from model import load_backbone, read_weights, state_to_hf
from tools.lib.cli import ROOT, Parser, run
from tools.lib.files import created_utc
from tools.lib.metrics import in_words

TOLERANCE = 1e-5  # of reloaded outputs, absolute; they are layer-normalised, so of order 1
# what a stranger may read of the flags: numbers, and of texts only these, which name choices and never files
WORDS = "arch aug schedule centering precision sizes".split()
# how the run was housed, not what it learned from
PLUMBING = (
    "workers log_every save_every keep_last keep_every eval_every time_limit grace skip_bad resume device compile "
    "fsdp checkpointing deterministic micro_batch"
).split()
METRICS = {  # of results.json
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "sensitivity_at_90": "sensitivity at 90% specificity",
    "mcc": "MCC",
    "brier": "Brier",
    "ece": "calibration error",
}
BORROWED = ("init", "gram_teacher")  # flags that bring in weights, which may be somebody else's
INPUTS = {
    "hu16-v1": """The three channels are the slices z-1, z, z+1 of one volume in HU, through one window:

```python
def to_image(hu):  # int16 HU [3, H, W] -> uint8 [H, W, 3]
    return (255 * np.clip((hu - ({low:g})) / {width}, 0, 1) + 0.5).astype(np.uint8).transpose(1, 2, 0)
```

{training}""",
    "rgb-v1": """The three channels are neighbouring slices of one volume, each through its own window (level/width in
HU): red = slice z-1, lung, -600/1500; green = slice z, soft tissue, 40/400; blue = slice z+1, bone, 300/1500. A code
is `floor(255 * clip((HU - (L - W/2)) / W, 0, 1) + 0.5)`:

```python
def to_image(hu):  # HU [3, H, W] -> uint8 [H, W, 3]
    level, width = np.array([[-600, 40, 300], [1500, 400, 1500]])[:, :, None, None]
    return (255 * np.clip((hu - (level - width / 2)) / width, 0, 1) + 0.5).astype(np.uint8).transpose(1, 2, 0)
```""",
    "photo": "Images are ordinary RGB pictures; the processor does the rest.",
}
WINDOWS = {  # of the views, by recipe
    "ct": "In training the window of each view varied around this one: its level by 10% of the width, its width by a "
    "factor of e^-0.2 to e^0.2.",
    "ct_any_window": "In training the windows varied between lung (-600/1500), soft tissue (40/400) and bone "
    "(300/1500; level/width).",
}
CARD = """---
license: {license}
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [dinov3, self-supervised{tags}]
---

# {name}

A DINOv3 vision transformer ({arch}, {millions:.1f} million parameters, patches of {patch} pixels) pretrained by
self-supervision on {what}: {images:,} images in {step:,} updates.
These are the weights of the EMA teacher, without projection heads. No label was used.

## Use

```python
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("PATH OR REPOSITORY").eval()
processor = AutoImageProcessor.from_pretrained("PATH OR REPOSITORY")
out = model(**processor(Image.fromarray(image), return_tensors="pt"))
out.pooler_output                         # cls [1, {dim}]
out.last_hidden_state[:, {prefix}:]             # patches [1, {patches}, {dim}], row by row
```

`model.load_backbone("PATH")` of DINO-X opens the folder too, without transformers.

{inputs}

Give a square picture: the processor resizes it to {size} x {size} pixels (bicubic) and normalises with the mean and
standard deviation of ImageNet. Sides that are other multiples of {patch} work as well.

## Data

{data}

| | |
|---|---|
| index sha256 | `{index_sha256}` |
| split sha256 | `{split_sha256}` |

{split}

## Training

Method: DINOv3 (arXiv:2508.10104): DINO, iBOT, KoLeo and Gram losses, Sinkhorn-Knopp centering, EMA teacher.
Started from {start}. Every flag that decides what was learned:

{recipe}

## Numbers

{numbers}

## Intended use

Research: frozen features, or a start for fine-tuning, on images like those above (same modality, region and windows).

## Limits

Not a medical device: not for diagnosis, triage or any decision about a patient. The features carry whatever
told the training images apart, scanner, dose and reconstruction included; nothing here shows that they hold on other
scanners, regions, ages or diseases. Numbers above come from the data named above and no other. {ruler}The ids of
the training groups are not in this folder: to keep a test honest, use the split whose sha256 is given above.

## Licence

{licence}

## Files

sha256 of `model.safetensors`: `{weights_sha256}`; of the checkpoint it comes from: `{checkpoint_sha256}`.
`sha256sum -c SHA256SUMS` checks every file. Made {created}. Reloaded and compared when made: largest difference of any
output {difference:.1e}.
"""


def read_facts(path):
    """Everything a checkpoint of ours says but its tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt {path} is no file; name a checkpoint such as runs/x/last.pth")
    if reason := checkpoint.broken(path):
        raise ValueError(f"--ckpt {path}: {reason}; only a checkpoint that train_ssl.py wrote can be released")
    content, _ = read_weights(path)
    keys = "step images args arch encoding eval_view trained_groups index_sha256 split_sha256".split()
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"--ckpt {path} lacks {', '.join(missing)}: release it with the code that trained it")
    return {key: content[key] for key in keys}


def secrets_of(facts, *paths):
    """Texts that must not be in the folder: ids of the training patients, and every path that is known here."""
    ids = {text for group in facts["trained_groups"] for text in (group, group.partition("/")[2]) if len(text) > 5}
    named = {value for value in facts["args"].values() if isinstance(value, str) and re.search(r"[/\\]", value)}
    named -= {facts["args"].get("sizes")}
    here = {str(Path(p).resolve()) for p in (Path.home(), ROOT, *paths)}
    return ids | {text for text in named | here if len(text) > 3}


def refuse_secrets(folder, secrets):
    """Look for every secret in every file of the folder, in the weights too; whole words only."""
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as f:  # of the weights the names and shapes; the rest is numbers
            content = f.read(int.from_bytes(f.read(8), "little")) if path.suffix == ".safetensors" else f.read()
        for text in sorted(secrets, key=len, reverse=True):  # no one pattern: 500,000 names take 4 s
            if text.encode() in content and re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w-])".encode(), content):
                raise ValueError(f"{path.name} would say {text!r}, a patient id or a path: rename what brings it")


def public_flags(args):
    """The flags that are numbers or name a choice; paths and whatever else is text stay behind."""
    kept = {}
    for name, value in sorted(args.items()):
        values = value if isinstance(value, (list, tuple)) else [value]
        if name not in PLUMBING and all(isinstance(v, (int, float)) or name in WORDS and v is not None for v in values):
            kept[name] = " ".join(map(str, values))
    return kept


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def datasets(facts, root):
    """What the teacher learned from, as a table: patients by dataset, with --data also series and slices."""
    photos = facts["encoding"] == "photo"  # their groups are names of files: only counted
    of = Counter("all" if photos else group.partition("/")[0] for group in facts["trained_groups"])
    if root is None:
        return table(["dataset", "groups" if photos else "patients"], sorted(of.items()))
    source = open_trained(facts, root)
    if photos:
        return table(["dataset", "groups", "images"], [["all", len(source.groups), len(source)]])
    names, series = source.rows.column("dataset"), source.rows.column("series")
    rows = [[name, of[name], len(set(series[names == name])), (names == name).sum()] for name in sorted(of)]
    return table(["dataset", "patients", "series", "slices"], rows)


def open_trained(facts, root):
    """The images the teacher learned from; refuses other data."""
    flags = facts["args"]
    source = open_source(root, None if flags["no_split"] else "train", flags["limit"], flags["z_stride"])
    for key in ("index_sha256", "split_sha256"):
        if facts[key] != getattr(source, key):
            raise ValueError(f"--data {root}: {key} is not that of the checkpoint; name the data it was trained on")
    return source


def licence_of(facts, path):
    """Text of the licence; weights that began as somebody else's need theirs."""
    begun = [f"--{name.replace('_', '-')}" for name in BORROWED if facts["args"].get(name)]
    if begun and path is None:
        raise ValueError(
            f"the run was given other weights ({', '.join(begun)}): name their licence with --license FILE"
        )
    path = path or ROOT / "LICENSE"
    if not path.is_file():
        raise FileNotFoundError(f"licence {path} does not exist; name a text with --license")
    return path.read_text()


def write_card(facts, config, name, texts):
    """The model card out of facts, architecture and the texts that main() put together."""
    photos, size = facts["encoding"] == "photo", facts["eval_view"]["size"]
    aug = "ct" if facts["args"]["aug"] == "auto" else facts["args"]["aug"]
    level, width = facts["eval_view"]["window"] or (0, 1)
    unsplit = "The run was made without a split: it saw all of the data, so no number on it is a held-out one."
    split = "Trained on the split `train` alone; the other splits hold patients it has never seen."
    begun = [f"`--{name.replace('_', '-')}`" for name in BORROWED if facts["args"].get(name)]
    start = f"other weights, given with {' and '.join(begun)}" if begun else "random weights"
    return CARD.format(
        name=name, tags="" if photos else ", computed-tomography, medical-imaging",
        license="mit" if texts["licence"].startswith("MIT License") else "other",
        arch=facts["arch"]["name"], patch=config["patch_size"], dim=config["hidden_size"],
        prefix=1 + config["num_register_tokens"], patches=(size // config["patch_size"]) ** 2, size=size,
        what="photographs" if photos else "CT slices with their two neighbours",
        images=facts["images"], step=facts["step"],
        inputs=INPUTS[facts["encoding"]].format(low=level - width / 2, width=width, training=WINDOWS.get(aug, "")),
        index_sha256=facts["index_sha256"], split_sha256=facts["split_sha256"] or "no split",
        split=unsplit if facts["split_sha256"] is None else split,
        ruler="" if photos else "A score on nodules means little unless it beats the nodule's size, so that baseline "
        "stands beside it. ",
        start=start, recipe=table(["flag", "value"], public_flags(facts["args"]).items()),
        **texts,
    )  # fmt: skip


def processor_config(size):
    """preprocessor_config.json: what eval_view does, in the words of the published DINOv3 models."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "resample": 3,  # bicubic
        "size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD), "data_format": "channels_first",
    }  # fmt: skip


def largest_difference(vit, folder, size):
    """Largest |difference| of any output between the teacher and what load_backbone makes of the folder."""
    size = -(-size // vit.patch_size) * vit.patch_size
    shape = 2, vit.patch_embed.proj.in_channels, size, size + vit.patch_size  # not square: sides could be swapped
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(vit(images), load_backbone(folder)(images))
        return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def write_weights(vit, facts, folder):
    """model.safetensors, config.json and preprocessor_config.json; returns the config."""
    state, config = state_to_hf(vit)
    config |= {"image_size": facts["eval_view"]["size"], "dtype": "float32"}
    packed = safetensors.torch.save(state, {"format": "pt"})
    atomic_write(folder / "model.safetensors", lambda f: f.write(packed))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    processor = processor_config(facts["eval_view"]["size"])
    write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    return config


def write_sums(folder):
    """SHA256SUMS of all other files, as sha256sum writes it."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    write_text(folder / "SHA256SUMS", "".join(f"{file_sha256(path)}  {path.name}\n" for path in files))


def fill(folder, ckpt, facts, name, texts):
    """Write everything into a folder that nobody sees yet; raises when what is there is not the teacher."""
    vit = load_backbone(ckpt)
    config = write_weights(vit, facts, folder)
    difference = largest_difference(vit, folder, facts["eval_view"]["size"])
    if not difference <= TOLERANCE:
        raise ValueError(f"reloaded, the export differs by {difference:.2e} from --ckpt {ckpt}: nothing released")
    print(f"reloaded: largest difference of any output {difference:.1e}")
    numbers = dict(difference=difference, millions=sum(p.numel() for p in vit.parameters()) / 1e6)
    numbers |= dict(weights_sha256=file_sha256(folder / "model.safetensors"), checkpoint_sha256=file_sha256(ckpt))
    write_text(folder / "LICENSE", texts["licence"])
    write_text(folder / "README.md", write_card(facts, config, name, texts | numbers))
    write_sums(folder)


def protocol_numbers(judged):
    """One protocol of results.json as Markdown: numbers, names of predictors, sentences; no list of patients."""
    found = [name for name in METRICS if name in judged["predictors"]["probe"]]
    rows = [[name, *(in_words(of[key]) for key in found)] for name, of in judged["predictors"].items()]
    gains = [[name, in_words(d), f"{d['p']:.2g}"] for name, d in judged["differences"].items()]
    parts = [f"**{judged['title']}.** {judged['samples']} samples of {judged['patients']} patients."]
    if seen := len(judged["seen_in_pretraining"]):
        parts.append(f"**The backbone has seen {seen} of these patients in pretraining: these numbers are too good.**")
    parts += [table(["", *(METRICS[key] for key in found)], rows), table(["difference of AUC", "", "p"], gains)]
    return "\n\n".join([*parts, judged["verdict"]])


def probe_numbers(path, ckpt):
    """The card's section of results, out of the results.json of train_probe.py; refuses those of other weights."""
    if path is None:
        return "No probe was run for this card."
    if not path.is_file():
        raise FileNotFoundError(f"--probe {path} does not exist; it is the results.json that train_probe.py writes")
    try:
        results = json.loads(path.read_text())
        digest, labels = results["weights"]["sha256"], results["labels"]["sha256"]
        parts = [protocol_numbers(results[name]) for name in ("test", "cv") if name in results]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--probe {path} is no results.json of this train_probe.py: {error!r}") from None
    if digest != file_sha256(ckpt):
        raise ValueError(f"--probe {path} is about other weights than --ckpt {ckpt}: run train_probe.py on these")
    head = (
        f"A frozen probe on labels (sha256 `{labels}`), each number with its 95% interval from resampling groups "
        "(patients), beside what needs no pretraining: random weights, raw pixels, and of nodules their size."
    )
    return "\n\n".join([head, *parts])


def push(folder, repo):
    """Upload to a private repository; opening it to the world stays a decision of a person."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, private=True, exist_ok=True)
    if not HfApi().repo_info(repo).private:
        raise ValueError(f"--push {repo} is public already: name a new repository, or upload {folder} by hand")
    HfApi().upload_folder(folder_path=str(folder), repo_id=repo, commit_message=f"Release of {folder.name}")
    print(f"uploaded to {repo}, which is private until you open it")


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="of train_ssl.py; its EMA teacher goes out")
    parser.add_argument("--out", required=True, type=Path, help="folder to make; its name titles the card")
    parser.add_argument("--probe", type=Path, help="results.json of train_probe.py about this checkpoint")
    parser.add_argument("--data", type=Path, help="what it was trained on: adds counts of series and slices")
    parser.add_argument("--license", type=Path, help="text for the weights; default: LICENSE of this repository")
    parser.add_argument(
        "--push", metavar="REPO", help="also upload to OWNER/NAME, new or private; needs huggingface_hub"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.push and find_spec("huggingface_hub") is None:
        raise ValueError("--push needs huggingface_hub: pip install huggingface_hub")
    if args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        raise FileExistsError(f"--out {args.out} exists and is not empty: name a new folder, or delete it first")
    facts = read_facts(args.ckpt)
    texts = dict(licence=licence_of(facts, args.license), data=datasets(facts, args.data), created=created_utc())
    texts |= dict(numbers=probe_numbers(args.probe, args.ckpt))
    staging = args.out.resolve().with_name(f".{args.out.name}.tmp")  # half a release never has its final name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        fill(staging, args.ckpt, facts, args.out.name, texts)
        refuse_secrets(staging, secrets_of(facts, args.ckpt.parent, args.out.parent))
        os.replace(staging, args.out)
        checkpoint.fsync_folder(staging.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for path in sorted(args.out.iterdir()):
        print(f"{args.out / path.name}: {path.stat().st_size:,} bytes")
    if args.push:
        push(args.out, args.push)
    return 0


if __name__ == "__main__":
    run(main)
