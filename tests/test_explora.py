"""Continued pretraining by adapters (ExPLoRA), and other optimizers than AdamW: who moves, what is saved, any kill."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import be_rank, free_port
from test_adapters import apart, everything
from test_data import make_photos, make_split
from test_heatmaps import QUICK, make_nodules
from test_train import TINY, command, folder, lines, same, survive, train, weights  # noqa: F401 - a fixture

import checkpoint
import model as m
import monitor
import train_probe
import train_ssl as t
from tools import inspect_step, nodule_heatmaps, release
from tools.lib import loop, optim, settings
from tools.lib.cli import is_ours

ADAPTERS = "--adapter-norm doran --adapter-rank 4 --adapter-targets all --warmup 0".split()


@pytest.fixture
def init(folder, tmp_path):  # noqa: F811
    """Weights to begin with: those of two updates."""
    assert train(folder, tmp_path / "first", "--steps", "2", "--gram-weight", "0") == 0
    return str(tmp_path / "first" / "last.pth")


def read(run):
    return checkpoint.load(run / "last.pth")


def of_backbone(state):
    return {name.removeprefix("backbone."): p for name, p in state.items() if name.startswith("backbone.")}


def rebuilt(state, who):
    vit = m.build_arch(state["arch"])
    vit.load_state_dict(of_backbone(state[who]))
    return vit.eval()


# who moves


@pytest.mark.slow
@pytest.mark.parametrize("norm, start", [("lora", "zero"), ("rslora", "pissa"), ("dora", "zero"), ("doran", "zero")])
def test_adapters_norms_and_the_last_block_move_and_nothing_else(folder, init, tmp_path, norm, start):  # noqa: F811
    more = f"--adapter-norm {norm} --adapter-init {start} --adapter-rank 4 --unfreeze 1 --ema 0.5 0.5 --warmup 0"
    gram = "--gram-start 0 --gram-refresh 1 --lr 3e-3 --schedule constant".split()
    assert train(folder, tmp_path / "run", "--init", init, "--steps", "3", *more.split(), *gram) == 0
    state, base = read(tmp_path / "run"), m.load_backbone(init, quiet=True)
    assert state["arch"]["adapters"]["norm"] == norm and state["arch"]["name"] == "vit_test"
    start_of, student, teacher = base.state_dict(), of_backbone(state["student"]), of_backbone(state["teacher"])
    parts = ["lora_a", "lora_b"] + ["magnitude"] * (norm[:3] == "dor") + ["tau"] * (norm == "doran")
    added = {f"blocks.0.attn.qkv.{part}" for part in parts}  # the last of two blocks is trained whole
    assert student.keys() == teacher.keys() == start_of.keys() | added
    trained = {name for name in student if name in added or name.startswith("blocks.1.") or "norm" in name}
    for name in start_of:
        moved = not torch.equal(student[name], start_of[name])
        assert moved == (name in trained or (start == "pissa" and name == "blocks.0.attn.qkv.weight")), name
        assert torch.equal(student[name], teacher[name]) == (name not in trained), name
    heads = {name for name in state["student"] if not name.startswith("backbone.")}
    assert state["optimizer"].keys() == heads | {f"backbone.{name}" for name in trained}
    # Gram anchors to the start, whatever --gram-refresh says
    assert "adapters" not in state["gram_arch"] and state["gram"].keys() == start_of.keys()
    assert max((state["gram"][name] - p).abs().max().item() for name, p in start_of.items()) < 1e-6
    losses = [row["gram"] for row in lines(tmp_path / "run", "loss") if "gram" in row]
    assert losses and losses[-1] > 0
    # what is used is one plain backbone that does the same
    merged = m.load_backbone(tmp_path / "run" / "last.pth", quiet=True)
    assert not m.adapted_layers(merged) and merged.arch == base.arch
    assert apart(everything(merged), everything(rebuilt(state, "teacher"))) < 1e-6
    assert apart(everything(merged), everything(base)) > 1e-4
    assert apart(everything(rebuilt(state, "student")), everything(merged)) > 1e-5


def test_the_teacher_is_the_moving_average_of_the_adapters(folder, init, tmp_path):  # noqa: F811
    flags = ["--init", init, *ADAPTERS, "--ema", "0.75", "0.75", "--save-every", "1", "--keep-last", "9"]
    assert train(folder, tmp_path / "run", "--steps", "3", *flags) == 0
    one, two = (checkpoint.load(tmp_path / "run" / f"step_{step:08d}.pth") for step in (1, 2))
    names = [name for name in two["teacher"] if name.endswith(("lora_a", "lora_b", "magnitude", "tau"))]
    assert len(names) == 16
    for name in names:
        expected = 0.75 * one["teacher"][name] + 0.25 * two["student"][name]
        torch.testing.assert_close(two["teacher"][name], expected)
        assert not torch.equal(two["teacher"][name], two["student"][name]), name


def test_a_frozen_weight_costs_no_pass_backward(folder, init):  # noqa: F811
    """The log's TFLOP/s count what is computed."""
    words = ["--data", str(folder), "--init", init, "--arch", "vit_test", "--batch-size", "8", "--local-crops", "2"]
    counts = []
    for more in ([], ADAPTERS, [*ADAPTERS, "--unfreeze", "0"]):
        args = settings.resolve(t.build_parser().parse_args([*words, *more]), 1)
        student, _ = t.build(args)
        recipe = settings.make_recipes(args, "hu16-v1")[0]
        counts.append(loop.flops_per_image(student, recipe, args, False))
    assert counts[0] > counts[1] > counts[2] > 0.6 * counts[0]


# saved, killed, resumed


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--drop-path 0.3", "--adapter-norm lora --adapter-init pissa --micro-batch 4"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(folder, init, tmp_path, monkeypatch, more):  # noqa: F811
    flags = ["--init", init, "--steps", "9", *ADAPTERS, *more.split()]
    assert train(folder, tmp_path / "whole", *flags) == 0
    real, count = t.one_update, []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) in (2, 6):  # before and after Gram anchoring begins
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(t, "one_update", interrupted)
    kept = Path(init).read_bytes()
    for expected in (2, 6, 9):
        assert train(folder, tmp_path / "parts", *flags) == 0
        assert read(tmp_path / "parts")["step"] == expected
        Path(init).write_bytes(b"no weights any more")  # the run holds its own
    Path(init).write_bytes(kept)
    same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    with pytest.raises(ValueError, match="--adapter-rank was 4 in this run and is now 5"):
        train(folder, tmp_path / "parts", *flags, "--extend", "1", "--adapter-rank", "5")


def test_accumulation_changes_no_loss(folder, init, tmp_path):  # noqa: F811
    found = []
    for micro in ("8", "4"):
        flags = ["--init", init, *ADAPTERS, "--micro-batch", micro, "--log-every", "1", "--gram-start", "0"]
        assert train(folder, tmp_path / micro, "--steps", "3", *flags) == 0
        found.append([(row["loss"], row["grad_norm_backbone"]) for row in lines(tmp_path / micro, "loss")])
    np.testing.assert_allclose(*found, rtol=1e-3)


KILLED = [
    "--steps", "24", "--save-every", "1", "--drop-path", "0.2", "--workers", "1", "--eval-every", "7",
]  # fmt: skip


@pytest.mark.slow
def test_three_kills_change_no_bit(started, folder, init, tmp_path):  # noqa: F811
    plan = ["at random", "in a save", "agent"]
    counts, _ = survive(started, folder, tmp_path, plan, seed=2, kills=(*KILLED, "--init", init, *ADAPTERS))
    assert sum(v for how, v in counts.items() if how) == 3, counts


@pytest.mark.proof
@pytest.mark.parametrize("optimizer", ["muon", "ademamix:warmup=20", "schedulefree"])
def test_a_kill_changes_no_bit_whatever_the_optimizer(started, folder, tmp_path, optimizer):  # noqa: F811
    counts, _ = survive(started, folder, tmp_path, ["at random"], seed=3, kills=(*KILLED, "--optimizer", optimizer))
    assert counts == {"at random": 1}


@pytest.mark.parametrize("way", ["--checkpointing", *(pytest.param(way, marks=pytest.mark.slow) for way in (
    "two ranks", "two ranks --fsdp --eval-every 2", "--compile"))])  # fmt: skip
def test_ranks_shards_and_compiled_blocks_train_the_same_adapters(
    folder, init, tmp_path, way, on_two_ranks, monkeypatch  # noqa: F811
):  # fmt: skip
    """Compiled: as far as the graphs of forward and backward; test_adapters.py hands such blocks to a compiler."""
    if "--fsdp" in way and torch.__version__.startswith("2.8"):
        pytest.skip("train_ssl.py refuses it on the CPUs of torch 2.8")
    flags = ["--steps", "4", "--init", init, *ADAPTERS, "--gram-start", "0"]
    assert train(folder, tmp_path / "one", *flags) == 0
    more, compiled, compile_ = way.removeprefix("two ranks").split(), [], torch.nn.Module.compile
    if way.startswith("two"):
        on_two_ranks(be_rank, free_port(), command(folder, tmp_path / "other", *flags, *more, launcher=()))
    else:
        monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compiled.append(block) or compile_(
            block, backend="aot_eager", **how))  # fmt: skip
        assert train(folder, tmp_path / "other", *flags, *more) == 0
    assert bool(compiled) == (way == "--compile")
    one, other = (weights(tmp_path / name) for name in ("one", "other"))
    losses, others = ([row["loss"] for row in lines(tmp_path / name, "loss")] for name in ("one", "other"))
    assert others == pytest.approx(losses, rel=1e-4) and other.keys() == one.keys()
    assert max((other[k] - v).abs().max().item() for k, v in one.items() if k.startswith("teacher")) < 2e-5
    assert torch.equal(*(found["student.backbone.blocks.0.mlp.fc1.weight"] for found in (one, other)))


# what does not fit


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--adapter-norm lora", "--adapter-norm lora: adapters change weights that exist; name them with --init"),
        ("--adapter-rank 4", "--adapter-rank belongs to adapters: choose their --adapter-norm"),
        ("--init INIT --unfreeze 1", "--unfreeze belongs to adapters: choose their --adapter-norm"),
        ("--init INIT --adapter-norm lora --adapter-rank 65", "adapter rank 65, alpha 65.*a rank is 1 to 64"),
        ("--init INIT --adapter-norm lora --unfreeze 2", "unfreeze 2: 0 to 1 of 2 blocks, adapters need one"),
        ("--init INIT --adapter-norm lora --adapter-targets query", "targets 'query': this backbone has q, k, v"),
        ("--init INIT --adapter-norm lora --arch vit_tiny", "is a vit_test; say --arch vit_test"),
        ("--optimizer mouon", "--optimizer mouon: there is no mouon; did you mean muon"),
        ("--optimizer sophia", "there is no sophia; .*known are adamw, ademamix, schedulefree, muon"),
        ("--optimizer muon:beta=1", "muon has no option beta; its options are lr=0.02, momentum=0.95"),
        ("--optimizer muon:momentum=1", "betas and momentum must be at least 0 and below 1"),
        ("--optimizer muon:eps=-1", "numbers must be at least 0, got {'eps': -1"),
        ("--optimizer adamw:betas=[0.9,2]", "--optimizer adamw:betas.*Invalid beta parameter"),
        ("--optimizer muon:lr=-0.1", "lr is at least 0"),
        ("--optimizer muon:lr=0.1 --lr 0.1", "or by --lr, not by both"),
        ("--optimizer muon:weight_decay=0.1", "weight_decay has a flag of its own"),
        ("--optimizer muon --fsdp", "needs whole matrices and --fsdp shards them"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(folder, tmp_path, request, flags, sentence):  # noqa: F811
    words = flags.split()
    if "INIT" in words:
        words[words.index("INIT")] = request.getfixturevalue("init")
    argv = ["--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "2", "--arch", "vit_test"]
    with pytest.raises(ValueError, match=sentence) as found:
        t.main([*argv, "--batch-size", "8", "--device", "cpu", "--workers", "0", *words])
    assert is_ours(found.value) and not list((tmp_path / "run").glob("*.pth"))


def test_labels_are_never_read(tmp_path, monkeypatch):
    root = make_photos(tmp_path / "photos", 12)
    opened, real = [], open

    def watched(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", watched)
    monkeypatch.setattr("io.open", watched)
    assert not list(root.rglob("*.csv"))
    assert train(root, tmp_path / "first", "--no-split", "--steps", "1") == 0
    more = ["--init", str(tmp_path / "first" / "last.pth"), *ADAPTERS]
    assert train(root, tmp_path / "run", "--no-split", "--steps", "2", *more) == 0
    assert read(tmp_path / "run")["encoding"] == "photo" and opened
    assert not [name for name in opened if "label" in Path(name).name]


# what reads such a checkpoint


@pytest.mark.slow
def test_every_program_reads_a_run_with_adapters(tmp_path, capsys):
    root = make_nodules(tmp_path / "data", count=40)
    make_split(root, {f"toy/P{k}": ["train", "val_test", "val_select"][k % 3] for k in range(20)})
    table = root / "_labels" / "malignancy.csv"
    header, *rows = (root / "_labels" / "nodules.csv").read_text().splitlines()
    rows = [row.split(",") for row in rows]
    for k, row in enumerate(rows):
        row[5], row[7] = str(k % 2), str(8 + k % 7)
    table.write_text("\n".join([header, *map(",".join, rows), ""]))
    size = ["--global-size", "64", "--batch-size", "8"]
    assert train(root, tmp_path / "first", "--steps", "1", *size) == 0
    run, flags = tmp_path / "run", ["--init", str(tmp_path / "first" / "last.pth"), *ADAPTERS, "--lr", "3e-2"]
    assert train(root, run, "--steps", "3", *size, *flags) == 0
    last = run / "last.pth"
    (tmp_path / "licence").write_text("MIT License")
    assert release.main(["--ckpt", str(last), "--out", str(tmp_path / "out" / "x"), "--license",
                         str(tmp_path / "licence")]) == 0  # fmt: skip
    merged = m.load_backbone(tmp_path / "out" / "x", quiet=True)
    assert apart(everything(merged), everything(rebuilt(read(run), "teacher"))) < 1e-6
    card = (tmp_path / "out" / "x" / "README.md").read_text()
    for row in ("| adapter_norm | doran |", "| adapter_targets | all |", "| optimizer | adamw |"):
        assert row in card
    assert "lora_a" not in (tmp_path / "out" / "x" / "model.safetensors").read_bytes()[:20000].decode(errors="replace")

    assert monitor.main(["--ckpt", str(last), "--threads", "1", "--images", "1", "--sysfs", str(tmp_path)]) in (0, 1, 2)
    status = json.loads((run / "monitor" / "status.json").read_text())
    assert status["step"] == 3
    assert inspect_step.main(["--run", str(run), "--step", "2", "--out", str(tmp_path / "views.png")]) == 0
    why = ["--run", str(run), "--why", "3"]
    assert inspect_step.main(why) in (0, 1)  # it deserves a look, or not: here that it can be replayed
    said = json.loads((run / "inspect" / "why_00000003.json").read_text())
    assert said["as_saved"] is True and said["from"] != "the start", said
    found = []
    for ckpt in (last, tmp_path / "out" / "x"):
        out = tmp_path / f"probe{len(found)}"
        words = f"--ckpt {ckpt} --data {root} --out {out}".split()
        more = f"--labels {table} --bootstrap 50 --crop-mm 48 --size 64 --device cpu"
        assert train_probe.main([*words, *more.split()]) == 0
        assert nodule_heatmaps.main([*words, *QUICK]) == 0
        probe = json.loads((out / "results.json").read_text())["test"]["predictors"]["probe"]["auc"]["value"]
        found.append((probe, json.loads((out / "heatmaps.json").read_text())))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and math.isfinite(found[0][0])
    assert "adapters" not in found[0][1]["arch"]


# optimizers


def test_muon_walks_by_layer_decay_and_leaves_the_prototypes_to_adamw():
    torch.manual_seed(0)
    student = m.SSLModel(m.build_vit("vit_test"), *(m.ProjectionHead(64, 32, 16, 24) for _ in range(2)))
    groups = optim.param_groups(student, 0.5, 0.2)
    words = "--data x --optimizer muon --batch-size 8 --steps 9".split()
    args = settings.resolve(t.build_parser().parse_args(words), 1)
    assert args.lr == 0.02 and args.optimizer == "muon"
    optimizer = loop.build_optimizer(args.optimizer, groups, settings.OWN_FLAGS)
    optim.set_rates(optimizer, t.Now(0.1, 0.1, 0.0, 0.9, 0.06, 0.0))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    after = dict(student.named_parameters())
    sizes = {name: (after[name] - p).norm().item() for name, p in before.items()}
    first, last = (sizes[f"backbone.blocks.{i}.mlp.fc1.weight"] for i in (0, 1))
    assert last / first == pytest.approx(2, rel=0.1)  # one block apart: a factor of 0.5
    p = after["backbone.blocks.1.mlp.fc1.weight"] - before["backbone.blocks.1.mlp.fc1.weight"]
    rate = 0.1 * 0.5 * 2**0.5  # of that block, with Muon's factor of shape
    values = torch.linalg.svdvals(p.detach()) / rate
    assert values.min() > 0.6 and values.max() < 1.3
    for name in ("dino_head.last_layer.weight", "backbone.mask_token", "backbone.norm.weight"):
        p, factor = after[name] - before[name], 0.1 * 0.015
        assert p.abs().max() <= factor * 1.01, name  # the first step of AdamW is a sign


UNRATED = [word for word in TINY if word not in ("--lr", "1e-3")]
UNRATED += "--steps 6 --gram-weight 0 --log-every 1 --save-every 3 --warmup 1 --schedule constant".split()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon:lr=0.01", "ademamix:warmup=4", "schedulefree", "adamw:betas=[0.8,0.95]"])
def test_every_optimizer_trains_and_resumes_to_the_bit(folder, tmp_path, monkeypatch, optimizer):  # noqa: F811
    flags = ["--data", str(folder), *UNRATED, "--optimizer", optimizer, "--out"]
    assert t.main([*flags, str(tmp_path / "whole")]) == 0
    real, count = t.one_update, []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(t, "one_update", interrupted)
    for expected in (2, 6):
        assert t.main([*flags, str(tmp_path / "parts")]) == 0
        assert read(tmp_path / "parts")["step"] == expected
    same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    state = read(tmp_path / "parts")["optimizer"]
    kept = {"muon": {"exp_avg", "step"}, "ademamix": {"exp_avg", "exp_avg_slow", "exp_avg_sq", "step"},
            "schedulefree": {"z", "x", "exp_avg_sq", "step"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}  # fmt: skip
    assert state["backbone.blocks.0.mlp.fc1.weight"].keys() == kept[optimizer.partition(":")[0]]
    rates = [row["lr"] for row in lines(tmp_path / "whole", "loss")]
    expected = {"muon": 0.01, "ademamix": 1e-3, "schedulefree": 2.5e-3, "adamw": 5e-4 * (8 / 256) ** 0.5}
    assert max(rates) == pytest.approx(expected[optimizer.partition(":")[0]], rel=0.2)
