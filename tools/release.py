"""Turn a checkpoint into a folder for other people: the EMA teacher as transformers or timm reads it, with its papers.

In: a checkpoint of train_ssl.py and, with --probe, the results.json that train_probe.py wrote about it. Out: OUT/ with
model.safetensors, config.json, README.md (model card), provenance.json, LICENSE and SHA256SUMS; for transformers also
preprocessor_config.json. provenance.json holds salted hashes of what the weights were trained on, so that whoever
evaluates them can refuse a leak. The folder appears only when what is in it was loaded again and gives the teacher's
outputs to 1e-5. No path of this machine and no patient id in clear gets in.

    python tools/release.py --ckpt runs/lidc/last.pth --data data/processed --probe runs/lidc/probe/results.json \\
        --out release/dinox-lidc-vit-small
    cd release/dinox-lidc-vit-small && sha256sum -c SHA256SUMS
"""

import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import torch

import checkpoint
from checkpoint import write_text
from data import file_sha256
from model import load_backbone, read_weights
from tools.lib import bundle, export, runs
from tools.lib.cli import ROOT, Parser, run, shown
from tools.lib.export import provenance_file, write_sums, write_weights
from tools.lib.files import created_utc, read_json_file, write_json, wrong_field
from tools.lib.judge import UNKNOWN, in_words
from tools.lib.provenance import BORROWED, refuse_change, stamp

TOLERANCE = 1e-5  # of reloaded outputs, absolute; they are layer-normalised, so of order 1
# what a stranger may read of the flags: numbers, and of texts only these, which name choices and never files
WORDS = "arch aug schedule centering precision sizes optimizer adapter_norm adapter_targets adapter_init".split()
# flags of machine, disk and clock: they change nothing that was learned
PLUMBING = (
    "workers log_every save_every keep_last keep_every eval_every time_limit grace skip_bad resume device compile "
    "fsdp checkpointing deterministic micro_batch"
).split()
METRICS = {  # of results.json: name on the card, least and most
    "auc": ("AUC", 0, 1),
    "average_precision": ("average precision", 0, 1),
    "accuracy": ("accuracy", 0, 1),
    "sensitivity_at_90": ("sensitivity at 90% specificity", 0, 1),
    "mcc": ("MCC", -1, 1),
    "brier": ("Brier", 0, 2),
    "ece": ("calibration error", 0, 1),
}
LONGEST = 4000  # letters of a text from results.json
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
    "photo": "Images are ordinary RGB pictures.",
}
WINDOWS = {  # of the views, by recipe
    "ct": "In training the window of each view varied around this one: its level by 10% of the width, its width by a "
    "factor of e^-0.2 to e^0.2.",
    "ct_any_window": "In training the windows varied between lung (-600/1500), soft tissue (40/400) and bone "
    "(300/1500; level/width).",
}
USE = {
    "transformers": """```python
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("PATH OR REPOSITORY").eval()
processor = AutoImageProcessor.from_pretrained("PATH OR REPOSITORY")
out = model(**processor(Image.fromarray(image), return_tensors="pt"))
out.pooler_output                         # cls [1, {dim}]
out.last_hidden_state[:, {prefix}:]             # patches [1, {patches}, {dim}], row by row
```

`model.load_backbone("PATH")` of DINO-X opens the folder too, without transformers.""",
    "timm": """```python
import timm

model = timm.create_model("{architecture}", checkpoint_path="PATH/model.safetensors", {arguments}).eval()
tokens = model.forward_features(images)  # [B, {tokens}, {dim}]: cls, {registers} registers, patches
tokens[:, 0]                             # cls
tokens[:, {prefix}:]                            # patches, row by row
```

`timm.create_model("local-dir:PATH", pretrained=True)` does the same. timm computes the RoPE periods in float32, as this
model was trained (the original DINOv3 code rounds them to bfloat16, which moves outputs by up to 4e-3).
`model.load_backbone("PATH")` of DINO-X opens the folder too, without timm.""",
}
CARD = """---
license: {license}
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [dinov3, self-supervised{tags}]
---

# {name}

A DINOv3 vision transformer ({arch}, {millions:.1f} million parameters, patches of {patch} pixels) pretrained by
self-supervision on {what}: {images:,} images in {step:,} updates.
These are the weights of the EMA teacher, without projection heads. This run used no label.

## Use

{use}

{inputs}

Give a square picture of {size} x {size} pixels (resized bicubically), normalised with the mean and standard deviation
of ImageNet{by}. Sides that are other multiples of {patch} work as well.

## Data

{data}

| | |
|---|---|
| index sha256 | `{index_sha256}` |
| split sha256 | `{split_sha256}` |

{split} {lineage}

## Training

Method: DINOv3 (arXiv:2508.10104): DINO, iBOT, KoLeo and Gram losses, Sinkhorn-Knopp centering, EMA teacher.
Started from {start}. {look}Every flag that decides what was learned:

{recipe}

## Numbers

{numbers}

## Intended use

Research: frozen features, or a start for fine-tuning, on images like those above (same modality, region and windows).

## Limits

Not a medical device: not for diagnosis, triage or any decision about a patient. The features carry whatever
told the training images apart, scanner, dose and reconstruction included; nothing here shows that they hold on other
scanners, regions, ages or diseases. {origin}{ruler}The ids of the training groups are not in this folder, only their
hashes (`provenance.json`): to keep a test honest, use the split whose sha256 is given above.

## Licence

{licence}

## Files

sha256 of `model.safetensors`: `{weights_sha256}`; of the checkpoint it comes from: `{checkpoint_sha256}`.
`sha256sum -c SHA256SUMS` checks every file. Made {created}. Reloaded and compared when made: largest difference of any
output {difference:.1e}.
"""


def facts_for_card(path):
    """Everything a checkpoint of ours says but its tensors, checked as far as the card repeats it."""
    name = shown(path, 400)
    if not path.is_file():
        raise FileNotFoundError(f"--ckpt {name} is no file; name a checkpoint such as runs/x/last.pth")
    if reason := checkpoint.broken(path):
        raise ValueError(f"--ckpt {name}: {reason}; only a checkpoint that train_ssl.py wrote can be released")
    content, _ = read_weights(path)
    fields = dict(step=int, images=int, args=dict, arch=dict, encoding=str, eval_view=dict, index_sha256=str)
    fields |= dict(trained_groups=(list, tuple, type(None)), split_sha256=(str, type(None)))
    flags = dict(no_split=bool, limit=(int, type(None)), z_stride=int, aug=str)
    # a field that was never there is named apart: it is another version and no damage
    if missing := [key for key in fields if key not in content] or [key for key in flags if key not in content["args"]]:
        raise ValueError(f"--ckpt {name} lacks {', '.join(missing)}: release it with the code that trained it")
    wrong = wrong_field(content, fields) or wrong_field(content["args"], flags)
    sums = [content["index_sha256"], content["split_sha256"] or "0" * 64]
    if not wrong and not all(re.fullmatch("[0-9a-f]{64}", text) for text in sums):
        wrong = "index_sha256 or split_sha256 is no sha256"
    if not wrong and content["encoding"] not in INPUTS:
        wrong = f"encoding is {shown(content['encoding'])}, known are {', '.join(INPUTS)}"
    if not wrong and content["eval_view"]["size"] > runs.LARGEST_VIEW:
        wrong = f"eval_view is {content['eval_view']['size']} pixels wide, more than {runs.LARGEST_VIEW}"
    wrong = wrong or wrong_provenance(content.get("provenance"))
    if wrong:
        raise ValueError(f"--ckpt {name}: {wrong}; use another checkpoint of the same run")
    return {key: content.get(key) for key in (*fields, "provenance")}


# What the weights were trained on, as hashes: provenance.refuse_leak compares them with what is to be judged.


def wrong_provenance(found):
    """What is wrong with the provenance of a checkpoint, or None; nothing but hashes may be in it."""
    if found is None:
        return None
    if not isinstance(found, dict) or wrong_field(found, dict(known=bool, seen=list)):
        return "provenance needs known and seen"
    lists = "groups series files".split()
    for entry in found["seen"]:
        if not isinstance(entry, dict) or not {"salt", "groups"} <= entry.keys() <= {"salt", *lists}:
            return "an entry of provenance needs salt, groups, series and files, and nothing else"
        hashes = [text for key in lists for text in entry.get(key) or ()]
        if not all(isinstance(text, str) and re.fullmatch("[0-9a-f]{16}", text) for text in hashes):
            return "provenance holds what is no hash of 16 hex digits"
        if not isinstance(entry["salt"], str) or not re.fullmatch("[0-9a-f]{64}", entry["salt"]):
            return "a salt of provenance is no sha256"
    return None


def lineage(provenance):
    """The card's sentence about what the weights say they were trained on."""
    counts = {key: sum(len(entry[key]) for entry in provenance["seen"]) for key in ("groups", "series", "files")}
    text = ", ".join(f"{count:,} {key}" for key, count in counts.items() if count) or "nothing"
    if provenance["known"]:
        return (
            f"`provenance.json` holds salted hashes of everything that these weights were trained on ({text}), other "
            "weights that the run was given included. DINO-X compares them with what is judged and refuses a leak."
        )
    return (
        f"**{UNKNOWN[0].upper()}{UNKNOWN[1:]}**: the run was given weights that do not say what they had seen, so any "
        f"patient of a test may be among it. `provenance.json` holds salted hashes of what is known ({text})."
    )


def secrets_of(facts, *paths):
    """Texts that must not be in the folder: ids of the training patients, and every path that is known here."""
    ids = {text for group in facts["trained_groups"] or () for text in (group, group.partition("/")[2])}
    ids = {text for text in ids if len(text) > 5}
    # a group of photographs may be called "training": words of our own texts are in every release, and tell nothing
    ours = (Path(__file__), Path(export.__file__), ROOT / "LICENSE")
    ids -= set(re.findall(r"\w[\w-]*", "".join(path.read_text() for path in ours)))
    named = {value for value in facts["args"].values() if isinstance(value, str) and re.search(r"[/\\]", value)}
    named -= {facts["args"].get("sizes")}
    here = {str(Path(p).resolve()) for p in (Path.home(), ROOT, *paths)}
    return ids | {text for text in named | here if len(text) > 3}


def refuse_secrets(folder, secrets):
    """Look for every secret in every file of the folder, in the weights too; whole words only.

    Not in provenance.json: its texts are hashes, checked one by one, and 500,000 names in it would take hours.
    """
    for path in sorted(path for path in folder.iterdir() if path.name != "provenance.json"):
        with open(path, "rb") as f:  # of the weights the names and shapes; the rest is numbers
            content = f.read(int.from_bytes(f.read(8), "little")) if path.suffix == ".safetensors" else f.read()
        for text in sorted(secrets, key=len, reverse=True):  # no one pattern: 500,000 names take 4 s
            if text.encode() in content and re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w-])".encode(), content):
                secret = f"{shown(repr(text))}, a patient id or a path"
                raise ValueError(f"{path.name} would say {secret}: rename its source")


def public_flags(args):
    """The flags that are numbers or name a choice; paths and whatever else is text stay behind."""
    kept = {}
    for name, value in sorted(args.items()):
        values = value if isinstance(value, (list, tuple)) else [value]
        allowed = all(isinstance(v, (int, float)) or name in WORDS and isinstance(v, str) for v in values)
        if name not in PLUMBING and allowed and re.fullmatch("[a-z0-9_]{1,40}", name):
            kept[name] = shown(" ".join(map(str, values)))
    return kept


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def datasets(facts, source):
    """What the teacher learned from, as a table: patients by dataset, of a known source also series and slices."""
    photos = facts["encoding"] == "photo"  # their groups are names of files: only counted
    of = Counter("all" if photos else shown(g.partition("/")[0]) for g in facts["trained_groups"] or ())
    if not of:
        return "The checkpoint does not say what it was trained on."
    if source is None:
        return table(["dataset", "groups" if photos else "patients"], sorted(of.items()))
    if photos:
        return table(["dataset", "groups", "images"], [["all", len(source.groups), len(source)]])
    names, series = source.rows.column("dataset"), source.rows.column("series")
    rows = [[name, of[name], len(set(series[names == name])), (names == name).sum()] for name in sorted(of)]
    return table(["dataset", "patients", "series", "slices"], rows)


def open_images(facts, root):
    """The images that the run learned from, or None without --data; refuses other data."""
    if root is None:
        if facts["encoding"] == "photo":
            print("no --data: files are not hashed, so copies of these photographs will not be recognised as seen")
        return None
    trained = {key: facts[key] for key in ("encoding", "index_sha256", "split_sha256")}
    source = runs.open_trained(root, facts["args"], not facts["args"]["no_split"], trained)
    if others := set(source.groups) - set(facts["trained_groups"] or source.groups):
        raise ValueError(f"--data {root}: {len(others)} of its groups are not those of the run; name the run's data")
    return source


def licence_of(facts, path):
    """Text of the licence; weights that began as somebody else's need theirs."""
    begun = [f"--{name.replace('_', '-')}" for name in BORROWED if facts["args"].get(name)]
    if begun and path is None:
        given = ", ".join(begun)
        raise ValueError(f"the run was given other weights ({given}): name their licence with --license FILE")
    path = path or ROOT / "LICENSE"
    if not path.is_file():
        raise FileNotFoundError(f"licence {path} does not exist; name a text with --license")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"licence {path} is not UTF-8 text; save it as such") from None


def usage(vit, config, layout, size):
    """The card's code that opens the folder."""
    shapes = dict(dim=vit.dim, registers=vit.registers, prefix=1 + vit.registers)
    shapes |= dict(patches=(size // vit.patch_size) ** 2, tokens=1 + vit.registers + (size // vit.patch_size) ** 2)
    if layout == "hf":
        return dict(library="transformers", by=", which the processor does", use=USE["transformers"].format(**shapes))
    given = dict(num_classes=0, **config["model_args"])
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    words = USE["timm"].format(architecture=config["architecture"], arguments=arguments, **shapes)
    return dict(library="timm", by="", use=words)


def write_card(facts, vit, name, texts):
    """The model card out of facts, architecture and the texts that main() put together."""
    photos, size = facts["encoding"] == "photo", facts["eval_view"]["size"]
    aug = "ct" if facts["args"]["aug"] == "auto" else facts["args"]["aug"]
    level, width = facts["eval_view"]["window"] or (0, 1)
    training, mm = WINDOWS.get(aug, ""), facts["eval_view"].get("neighbour_mm")
    training += f" The outer channels are the slices nearest to {mm:g} mm below and above slice z." if mm else ""
    split = "The run fitted the groups of the split `train`; what else its weights have seen follows."
    if facts["split_sha256"] is None:
        split = "The run was made without a split: it saw all of the data, so no number on it is a held-out one."
    begun = [f"`--{name.replace('_', '-')}`" for name in BORROWED if facts["args"].get(name)]
    start = f"other weights, given with {' and '.join(begun)}" if begun else "random weights"
    return CARD.format(
        name=name, tags="" if photos else ", computed-tomography, medical-imaging",
        license="mit" if texts["licence"].startswith("MIT License") else "other",
        arch=facts["arch"]["name"], patch=vit.patch_size, size=size,
        what="photographs" if photos else "CT slices with their two neighbours",
        images=facts["images"], step=facts["step"],
        inputs=INPUTS[facts["encoding"]].format(low=level - width / 2, width=width, training=training),
        index_sha256=facts["index_sha256"], split_sha256=facts["split_sha256"] or "no split",
        split=split,
        ruler="" if photos else "A score on nodules means little unless it beats the nodule's size, so that baseline "
        "stands beside it. ",
        start=start, recipe=table(["flag", "value"], public_flags(facts["args"]).items()),
        **texts,
    )  # fmt: skip


def largest_difference(vit, folder, size):
    """Largest |difference| of any output between the teacher and what load_backbone makes of the folder."""
    size = -(-size // vit.patch_size) * vit.patch_size
    shape = 2, vit.patch_embed.proj.in_channels, size, size + vit.patch_size  # not square: sides could be swapped
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(vit(images), load_backbone(folder)(images))
        return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def fill(folder, ckpt, facts, name, texts, provenance, layout):
    """Write everything into a folder that nobody sees yet; raises when what is there is not the teacher."""
    vit = load_backbone(ckpt)
    config = write_weights(vit, facts, folder, layout)
    difference = largest_difference(vit, folder, facts["eval_view"]["size"])
    if not difference <= TOLERANCE:
        raise ValueError(f"reloaded, the export differs by {difference:.2e} from --ckpt {ckpt}: nothing released")
    print(f"reloaded: largest difference of any output {difference:.1e}")
    numbers = dict(difference=difference, millions=sum(p.numel() for p in vit.parameters()) / 1e6)
    numbers |= usage(vit, config, layout, facts["eval_view"]["size"])
    numbers |= dict(weights_sha256=file_sha256(folder / "model.safetensors"), checkpoint_sha256=file_sha256(ckpt))
    write_json(folder / "provenance.json", provenance, indent=None)
    write_text(folder / "LICENSE", texts["licence"])
    write_text(folder / "README.md", write_card(facts, vit, name, texts | numbers))
    write_sums(folder)


def last_look(ckpt):
    """What monitor.py last said of the run, as a sentence, or None."""
    path = ckpt.parent / "monitor" / "status.json"
    if not path.exists():
        return None
    status = read_json_file(path, {"verdict": str, "step": int}, "look again with monitor.py, or delete it", 1)
    if status["step"] < 0 or not re.fullmatch("[a-z -]{1,40}", status["verdict"]):  # it could not look, or is not ours
        return None
    return f"The last look of `monitor.py` at this run, after update {status['step']:,}: {status['verdict']}."


# Numbers of a probe. results.json may come from anywhere: what the card repeats must be possible.


def check_number(where, item, least, most):
    """{value, low, high} inside what the metric can be; low and high may be null together (too few patients)."""
    optional = (float, type(None))
    wrong = "is no object" if not isinstance(item, dict) else None
    if wrong := wrong or wrong_field(item, dict(value=float, low=optional, high=optional)):
        raise ValueError(f"{where} {wrong}")
    values = [item[key] for key in ("value", "low", "high") if item[key] is not None]
    if len(values) == 2 or not all(least - 1e-6 <= v <= most + 1e-6 for v in values):
        raise ValueError(f"{where} is {', '.join(f'{v:.6g}' for v in values)}: not all inside {least} to {most}")


def check_text(where, text):
    if not isinstance(text, str) or shown(text, LONGEST) != text:
        raise ValueError(f"{where} is {shown(repr(text))}: not a text of one line with at most {LONGEST} letters")


def check_protocol(where, judged):
    """One protocol of results.json, as far as protocol_numbers shows it."""
    if not isinstance(judged, dict):
        raise ValueError(f"{where} is no object")
    fields = dict(title=str, verdict=str, samples=int, patients=int, predictors=dict, differences=dict)
    if wrong := wrong_field(judged, fields | dict(seen_in_pretraining=list)):
        raise ValueError(f"{where} {wrong}")
    if not 1 <= judged["patients"] <= judged["samples"] <= 1e9:
        counts = f"{judged['samples']} samples of {judged['patients']} patients"
        raise ValueError(f"{where} has {shown(counts)}")
    for text in (judged["title"], judged["verdict"], *judged["predictors"], *judged["differences"]):
        check_text(f"{where}: a text", text)
    if not isinstance(judged["predictors"].get("probe"), dict):
        raise ValueError(f"{where} has no numbers of the probe")
    shared = METRICS.keys() & judged["predictors"]["probe"].keys()
    for name, of in judged["predictors"].items():
        for key in sorted(shared):
            item = of.get(key) if isinstance(of, dict) else None
            check_number(f"{where}: {key} of {name}", item, *METRICS[key][1:])
    for name, item in judged["differences"].items():
        check_number(f"{where}: {name}", item, -1, 1)
        if wrong := wrong_field(item, {"p": (float, type(None))}):
            raise ValueError(f"{where}: {name} {wrong}")
        if not 0 <= (item["p"] or 0) <= 1:
            raise ValueError(f"{where}: p of {name} is {item['p']:.6g}, not inside 0 to 1")


def protocol_numbers(judged, known):
    """One protocol of results.json as Markdown: numbers, names of predictors, sentences; no list of patients."""
    found = [name for name in METRICS if name in judged["predictors"]["probe"]]
    rows = [[name, *(in_words(of[key]) for key in found)] for name, of in judged["predictors"].items()]
    p_of = {name: "-" if d["p"] is None else f"{d['p']:.2g}" for name, d in judged["differences"].items()}
    gains = [[name, in_words(d), p_of[name]] for name, d in judged["differences"].items()]
    unit = "groups" if judged.get("unit") == "groups" else "patients"
    parts = [f"**{judged['title']}.** {judged['samples']} samples of {judged['patients']} {unit}."]
    if seen := len(judged["seen_in_pretraining"]):
        parts.append(f"**The backbone has seen {seen} of these {unit} in pretraining: these numbers are too good.**")
    elif not known or "unknown" in judged["title"]:
        parts.append(f"**{UNKNOWN[0].upper()}{UNKNOWN[1:]}: it may have met these {unit}.**")
    else:
        parts.append(f"The probe found none of these {unit} among those that the weights were trained on.")
    parts += [table(["", *(METRICS[key][0] for key in found)], rows), table(["difference of AUC", "", "p"], gains)]
    return "\n\n".join([*parts, judged["verdict"]])


def read_results(path, ckpt):
    """results.json of train_probe.py, checked; refuses that of other weights. None without --probe."""
    if path is None:
        return None
    remedy = "name the results.json that train_probe.py writes"
    try:
        results = read_json_file(path, {"weights": dict, "labels": dict}, remedy, version=1)
        digests = [results[key].get("sha256") for key in ("weights", "labels")]
        digests += [value for key in ("index_sha256", "split_sha256") if (value := results.get(key)) is not None]
        if not all(isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) for text in digests):
            raise ValueError("a sha256 of weights, labels, index or split is missing or none")
        protocols = [name for name in ("test", "cv") if name in results]
        if not protocols:
            raise ValueError("it holds neither test nor cv")
        for name in protocols:
            check_protocol(name, results[name])
    except ValueError as error:
        raise ValueError(f"--probe {path} is no results.json of this train_probe.py: {shown(error, 600)}") from None
    if digests[0] != file_sha256(ckpt):
        raise ValueError(f"--probe {path} is about other weights than --ckpt {ckpt}: run train_probe.py on these")
    return results


def probe_numbers(results, facts, known):
    """The card's section of results, and where its numbers come from; all from the probe's own facts."""
    if results is None:
        return dict(numbers="No probe was run for this card.", origin="")
    parts = [
        f"A frozen probe on labels (sha256 `{results['labels']['sha256']}`), each number with its 95% interval from "
        "resampling groups (patients), beside what needs no pretraining: random weights, raw pixels, and of nodules "
        "their size."
    ]
    origin = "Numbers above come from the data named above and no other. "
    index, split = results.get("index_sha256"), results.get("split_sha256")
    if index not in (None, facts["index_sha256"]):
        parts.append(f"It was run on other data than the training: index sha256 `{index}`.")
        origin = "Numbers above come from other data than the training. "
    elif split not in (None, facts["split_sha256"]):
        parts.append(f"It was run under another split than the training: split sha256 `{split}`.")
    parts += [protocol_numbers(results[name], known) for name in ("test", "cv") if name in results]
    return dict(numbers="\n\n".join(parts), origin=origin)


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
    parser.add_argument("--policy", type=Path, help="policy.json of tools/fit_policy.py: makes a bundle of a trained "
                        "classifier (best.pth) and this policy, for tools/predict.py --bundle")  # fmt: skip
    parser.add_argument("--force", metavar="WHY", help="make a bundle although a check speaks against it; recorded")
    parser.add_argument("--layout", choices=["hf", "timm"], default="hf", help="hf: for transformers; timm: for "
                        "timm.create_model")  # fmt: skip
    parser.add_argument("--probe", type=Path, help="results.json of train_probe.py about this checkpoint")
    parser.add_argument("--data", type=Path, help="what it was trained on: adds counts of series and slices")
    parser.add_argument("--license", type=Path, help="text for the weights; default: LICENSE of this repository")
    parser.add_argument("--push", metavar="REPO", help="also upload to OWNER/NAME, private; needs huggingface_hub")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.policy:
        if given := [name for name in ("probe", "data", "license", "push") if getattr(args, name)]:
            raise ValueError(f"--{given[0]} belongs to a release of a backbone, --policy makes a bundle")
        if args.layout != "hf":
            raise ValueError(f"--layout {args.layout} belongs to a release of a backbone; a bundle has its own")
        return bundle.write(args.out, args.ckpt, args.policy, args.force)
    if args.force:
        raise ValueError("--force is for bundles; give --policy too")
    if args.push and find_spec("huggingface_hub") is None:
        raise ValueError("--push needs huggingface_hub: pip install huggingface_hub")
    if shown(args.out.name) != args.out.name:
        raise ValueError(f"--out {shown(args.out, 400)}: its name titles the card; choose a short one of plain letters")
    export.refuse_full(args.out)
    before = stamp(args.ckpt)
    facts, results = facts_for_card(args.ckpt), read_results(args.probe, args.ckpt)
    texts, look = dict(licence=licence_of(facts, args.license), created=created_utc()), last_look(args.ckpt)
    texts["look"] = f"{look} " if look else ""
    print(look or f"no verdict about this run yet: python monitor.py --ckpt {shown(args.ckpt, 400)}")
    source = open_images(facts, args.data)
    provenance = provenance_file(facts, source)
    texts |= dict(data=datasets(facts, source), lineage=lineage(provenance))
    texts |= probe_numbers(results, facts, provenance["known"])
    if source is not None and source.crossing:
        crossing = f"{source.crossing} sets of duplicate pictures lie in several splits of this data"
        texts["lineage"] += f" {crossing}, so held-out numbers on it are too good."
    with export.staged(args.out) as staging:
        fill(staging, args.ckpt, facts, args.out.name, texts, provenance, args.layout)
        refuse_change(args.ckpt, before)
        refuse_secrets(staging, secrets_of(facts, args.ckpt.parent, args.out.parent))
    if args.push:
        push(args.out, args.push)
    return 0


if __name__ == "__main__":
    run(main)
