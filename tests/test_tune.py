"""Claims about supervised training (train_probe.py --tune): the update, resume, choice, guards, exports."""

import csv
import gc
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import be_rank, free_port
from PIL import Image
from test_train import latest_step, lines, same
from torch.nn import functional as F

import checkpoint
import data
import losses
import train_probe as t
from model import Classifier, Head, build_vit, load_backbone
from tools import predict
from tools.lib import augment, fits, loop, optim, supervise, tables
from tools.lib.classifiers import each_view, logits_of, read_classifier, views_of

ROOT = Path(__file__).resolve().parent.parent
TINY = "--labels labels.csv --size 32 --steps 12 --batch-size 8 --micro-batch 4 --eval-every 4 --workers 0 --device cpu"
SPLITS = ["train", "train", "train", "val_select", "val_calib", "val_test"]


def make_photos(root, n=72, labels=("no", "yes")):
    """Noise with a square that is orange (yes) or blue, in groups of two pictures; half of the groups are in train."""
    (root / "p").mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for i in range(n):
        pixels = random.normal(128, 40, (48, 64, 3))
        y, x = random.integers(0, 36), random.integers(0, 52)
        pixels[y : y + 12, x : x + 12] += (60 if i % 2 else -60) * np.array([1, 0.3, -1])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "p" / f"{i}.png")
        rows.append((f"p/{i}.png", labels[i % 2], f"g{i // 2:02}"))
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "group"), *rows])
    source = data.open_source(root)
    splits = {group: SPLITS[k % 6] for k, group in enumerate(source.groups)}
    contract = {"version": 1, "groups": splits, "index_sha256": source.index_sha256}
    (root / "_splits").mkdir()
    (root / "_splits" / "splits.json").write_text(json.dumps(contract))
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(build_vit("vit_test", layerscale=0.5).state_dict(), path)
    return path


def words(photos, start, out, *more):
    return ["--data", str(photos), "--ckpt", str(start), "--out", str(out), *TINY.split(), *more]


def tune(*given):
    return t.main(words(*given))


def weights(run):
    state = checkpoint.load(run / "last.pth")
    found = {f"{k}.{n}": v for k in ("student", "teacher") for n, v in state[k].items()}
    found |= {f"opt.{n}.{k}": v for n, s in state["optimizer"].items() for k, v in s.items()}
    return found | {key: state[key] for key in ("step", "best", "looked")}


# one update


def toy(seed=0):
    torch.manual_seed(seed)
    vit = build_vit("vit_test", layerscale=0.5)
    return Classifier(vit, Head(2 * vit.dim, 2, 0.2), "both")


def micro_batches(root, rank, world, micros, step=3, aug="strong", views="tiles:rows=1,cols=2"):
    """The real thing: pictures read, cut, augmented and mixed."""
    source = data.open_source(root)
    labels = np.arange(len(source)) % 2
    pictures = augment.Pictures(source, augment.find_row(aug), views, 32, 7, range(step, step + 1), 8,
                                8 // (world * micros), rank, world)  # fmt: skip
    out = []
    for k in range(micros):
        read = pictures[k]
        ids = read.ids[: read.own]
        images, targets = augment.render(read, labels, 2, data.eval_view("photo", 32), "cpu")
        keep, u = supervise.passing(7, step, ids, 128, 0.2, "cpu"), torch.from_numpy(supervise.uniform(7, step, ids))
        out.append(t.Micro(images, targets, keep, u))
    return out


def update(root, rank, world, micros, loss="ce:smoothing=0.1", net_of=lambda m: m):
    model = toy()
    objective = supervise.read_loss(loss, np.arange(8) % 2, 2)
    terms, _ = t.supervised_update(net_of(model), micro_batches(root, rank, world, micros), t.Weights(objective))
    return terms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def two_ranks(rank, folder, root):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for micros in (1, 2):
        terms, grads = update(Path(root), rank, 2, micros, net_of=torch.nn.parallel.DistributedDataParallel)
        for value in terms.values():
            dist.all_reduce(value)
        if rank == 0:
            torch.save([{k: v / 2 for k, v in terms.items()}, grads], f"{folder}/{micros}.pth")
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def test_any_cut_of_the_batch_gives_the_same_losses_and_gradients(photos, tmp_path, on_two_ranks):
    """With pictures mixed across micro-batches and ranks, dropout, and views of a layout."""
    terms, grads = update(photos, 0, 1, 1)
    assert len(grads) > 30 and max(g.abs().max() for g in grads.values()) > 1e-3
    on_two_ranks(two_ranks, str(tmp_path), str(photos))
    others = {"2 x 4": update(photos, 0, 1, 2), "8 x 1": update(photos, 0, 1, 8)}
    others |= {f"2 ranks, {m} each": torch.load(tmp_path / f"{m}.pth", weights_only=True) for m in (1, 2)}
    for name, (other_terms, other_grads) in others.items():
        for ours, theirs in ((terms, other_terms), (grads, other_grads)):
            assert ours.keys() == theirs.keys()
            for key in ours:
                told = f"{name} {key} {{}}".format
                torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=1e-6, msg=told)


def test_the_loss_of_an_update_is_that_of_its_pictures_one_by_one(photos):
    (micro,) = micro_batches(photos, 0, 1, 1)
    model = toy()
    terms, seen = t.supervised_update(model, [micro], t.Weights(supervise.read_loss("focal:gamma=2", [0, 1], 2)))
    one_by_one = []
    for k in range(8):
        logits = model(micro.views[k : k + 1], micro.keep[k : k + 1])[0]
        p = logits.softmax(-1)
        one_by_one.append(-(micro.targets[k] * (1 - p) ** 2 * p.log()).sum())
        torch.testing.assert_close(seen.logits[k], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["loss"], torch.stack(one_by_one).mean(), rtol=1e-5, atol=1e-6)
    assert 0 < micro.targets.max(1).values.min() < 1, "mixed targets"


def test_a_curriculum_begins_with_the_easy_pictures(photos):
    """The share of the run that is done reaches the objectives that ask for it; others do without."""
    (micro,) = micro_batches(photos, 0, 1, 1, aug="light")
    objective, model, found = supervise.read_loss("curriculum:share=0.25,until=1.0", [0, 1], 2), toy(), []
    for progress in (0.0, 0.5, 1.0):
        terms, seen = t.supervised_update(model, [micro], t.Weights(objective, progress=progress))
        each = (-(micro.targets * seen.logits.log_softmax(-1)).sum(-1)).sort().values
        torch.testing.assert_close(terms["loss"], each[: (2, 5, 8)[len(found)]].mean())
        found.append(float(terms["loss"]))
    assert found[0] < found[1] < found[2]


def test_what_is_drawn_depends_on_seed_step_and_id_alone(photos):
    whole, parts = micro_batches(photos, 0, 1, 1), micro_batches(photos, 0, 1, 4)
    second = micro_batches(photos, 1, 2, 2)
    for name in ("views", "targets", "keep", "u"):
        pieces = torch.cat([getattr(m, name) for m in parts])
        torch.testing.assert_close(pieces, getattr(whole[0], name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([getattr(m, name) for m in second]), pieces[4:], rtol=1e-5, atol=1e-5)
    later = micro_batches(photos, 0, 1, 1, step=4)
    assert not torch.equal(later[0].views, whole[0].views) and not torch.equal(later[0].keep, whole[0].keep)


def test_each_view_of_a_layout_is_cut_where_it_is(photos, tmp_path):
    """A picture that is dark on the left and bright on the right: its whole, its left half, its right half."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    source, row = data.open_source(tmp_path), augment.find_row("none")
    layout, one = data.find_layout("tiles:rows=1,cols=2,overlap=0"), augment.draw(0, 0, [0], row)
    for view, mean in enumerate((0.5, 0, 1)):
        image, box, margin = augment.read_cut(source, 0, one, layout, view, 32)
        read = augment.Read(0, 1, np.array([0]), image[None], box[None], margin[None], one, [])
        views, targets = augment.render(read, np.array([1]), 2, data.eval_view("photo", 32), "cpu")
        assert data.denormalise(views).mean().item() == pytest.approx(mean, abs=1e-4)
        assert targets.tolist() == [[0, 1]]
    pictures = augment.Pictures(data.open_source(photos), row, "tiles:rows=1,cols=2", 32, 0, range(40), 8, 8, 0, 1)
    widths = [box[3] - box[1] for step in range(40) for box in pictures[step].boxes.round()]
    assert 0.2 < np.mean(np.array(widths) == 64) < 0.5, "a third of the views are whole pictures"


# what is trained


@pytest.mark.parametrize(
    "kind, options, trained",
    [
        ("head", "lora", set()),
        ("last:1", "lora", {"blocks.1", "norm"}),
        ("all", "lora", None),
        ("adapters", "dora:rank=2", {"lora_a", "lora_b", "magnitude"}),
        ("adapters", "lora:rank=2,targets=q,v,unfreeze=1", {"lora_a", "lora_b", "blocks.1", "norm"}),
    ],
)
def test_the_optimizer_holds_exactly_what_is_trained(kind, options, trained):
    args = t.build_parser().parse_args(["--ckpt", "x", "--data", "x", "--labels", "x", "--out", "x", "--tune", kind,
                                        "--adapter", options])  # fmt: skip
    model = t.build_classifier(args, build_vit("vit_test"), 3)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.last_layer.weight", "head.last_layer.bias"} <= names
    backbone = {name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
    if trained is None:
        assert len(backbone) > 30
    else:
        assert all(any(part in name for part in trained) for name in backbone)
        assert all(any(part in name for name in backbone) for part in trained)
    held = [p for group in optim.param_groups(model, 0.7, 1.0) for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad} and len(held) == len(names)
    assert model.train().backbone.training == bool(backbone), "frozen parts stay in eval mode"


def test_an_optimizer_and_its_wrapper_are_named_in_one_text():
    groups = [dict(params=[torch.nn.Parameter(torch.ones(3))])]
    built = loop.build_optimizer("friendlysam:rho=0.1+muon:momentum=0.8", groups)
    assert isinstance(built, optim.FriendlySAM) and built.rho == 0.1 and isinstance(built.base, optim.Muon)
    assert built.base.param_groups[0]["momentum"] == 0.8
    assert isinstance(loop.build_optimizer("sam", groups).base, torch.optim.AdamW)
    for text, sentence in {"muon:lr=0.1": "lr has a flag of its own", "sam+sam": "at most one of sam, asam",
                           "adamv": "did you mean adamw"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            loop.build_optimizer(text, groups)


def test_sophia_looks_at_labels_drawn_from_its_own_predictions(photos):
    """observe() leaves the gradient alone, and its estimate is B times the squared gradient for those labels."""
    model, micros = toy(), micro_batches(photos, 0, 1, 2)
    run = t.Run(None, 0, 1, torch.device("cpu"), None, None, model, None, model, None, t.Weights(None), {})
    run.optimizer = loop.build_optimizer("sophia", optim.param_groups(model, 1.0, 1.0))
    run.args = t.build_parser().parse_args(["--ckpt", "x", "--data", "x", "--labels", "x", "--out", "x"])
    run.args.batch_size, run.args.precision = 8, "fp32"
    objective = supervise.read_loss("ce", [0, 1], 2)
    _, seen = t.supervised_update(model, micros, t.Weights(objective))
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    t.observe(run, micros, seen)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)
    p1, u = seen.logits.softmax(-1)[:, 0], torch.cat([m.u for m in micros])
    labels = losses.target_rows((u > p1).long(), 2)
    model.zero_grad()
    pieces = zip(micros, labels.split(4))
    t.supervised_update(model, [m._replace(targets=y) for m, y in pieces], t.Weights(objective))
    p = model.head.last_layer.weight
    expected = (1 - 0.99) * 8 * p.grad.square()
    torch.testing.assert_close(run.optimizer.state[p]["hessian"], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sam:rho=0.1", "friendlysam", "asam+muon", "sophia"])
def test_optimizers_that_look_twice_see_the_whole_batch_twice(photos, optimizer):
    """Two updates, in one piece and in four: the same weights, and others than those of AdamW alone."""
    after = {}
    for name, micros in ((optimizer, 1), (optimizer, 4), ("adamw", 1)):
        model = toy()
        run = t.Run(None, 0, 1, torch.device("cpu"), None, None, model, toy().requires_grad_(False), model, None,
                    t.Weights(supervise.read_loss("ce", np.arange(8) % 2, 2)), {})  # fmt: skip
        run.optimizer = loop.build_optimizer(name, optim.param_groups(model, 1.0, 1.0))
        run.args = t.build_parser().parse_args(["--ckpt", "x", "--data", "x", "--labels", "x", "--out", "x"])
        run.args.batch_size, run.args.precision, run.args.steps = 8, "fp32", 2
        for step in (0, 1):
            found = t.one_update(run, micro_batches(photos, 0, 1, micros, step), step, t.Now(1e-2, 1e-2, 0.0, 0.5))
            assert not found.bad
        after[name, micros] = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole, cut, plain = after.values()
    difference = (whole - cut).norm() / (whole - plain).norm()
    assert difference < 0.02, difference  # single weights whose gradient is 0 go either way


# the run


def stopped_at(step, monkeypatch):
    """Sends this process a SIGTERM in the update that ends with `step` updates done."""
    whole = t.one_update

    def update(run, micros, at, *rest):
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(run, micros, at, *rest)

    monkeypatch.setattr(t, "one_update", update)
    return lambda: monkeypatch.setattr(t, "one_update", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--tune adapters --adapter dora:rank=4,init=pissa --head probe:dropout=0.2 --aug strong",
        "--tune all --optimizer friendlysam --views tiles:rows=1,cols=2 --lr 1e-3 1e-3",
        "--tune last:1 --optimizer sophia --layers 2 --features cls --weights weights.csv",
        "--tune all --optimizer schedulefree --head random --features mean",
        "--tune all --fusion mil:depth=1 --views tiles:rows=1,cols=2 --lr 1e-3 1e-3",
    ],
)
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(photos, start, tmp_path, monkeypatch, flags):
    """Stopped where a look at val_select is due, which the continuation makes."""
    rows = csv.DictReader((photos / "labels.csv").read_text().splitlines())
    train = [row["path"] for row in rows if int(row["group"][1:]) % 6 < 3]
    (photos / "weights.csv").write_text("path,weight\n" + "".join(f"{path},{1 + len(path)}\n" for path in train))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert tune(photos, start, whole, *flags.split()) == 0
    restore = stopped_at(8, monkeypatch)
    assert tune(photos, start, run, *flags.split()) == 0
    assert checkpoint.load(run / "last.pth")["step"] == 8 and not (run / "results.json").exists()
    assert checkpoint.load(run / "last.pth")["looked"] == 4
    restore()
    gone = start.rename(start.with_suffix(".gone"))  # the run has its own weights by now
    try:
        assert tune(photos, start, run, *flags.split()) == 0
    finally:
        gone.rename(start)
    same(weights(whole), weights(run))
    looks = [[(line["step"], line["val_mcc"]) for line in lines(folder, "val_mcc")] for folder in (whole, run)]
    assert looks[0] == looks[1] and [step for step, _ in looks[1]] == [0, 4, 8, 12]
    best = [checkpoint.load(folder / "best.pth") for folder in (whole, run)]
    assert best[0]["step"] == best[1]["step"] == weights(run)["best"]["step"]
    same(best[0]["teacher"], best[1]["teacher"])
    for split in ("val_select", "val_calib"):
        ours, theirs = tables.read(run, split), tables.read(whole, split)
        assert np.array_equal(ours.logits, theirs.logits) and np.array_equal(ours.ids, theirs.ids)


def test_the_best_step_is_chosen_by_mcc_and_the_first_of_equals_wins(photos, start, tmp_path, monkeypatch):
    looks = iter([0.1, 0.5, 0.5, None, 0.4, 0.7])
    found = dict(accuracy=0.5, auc=0.5, loss=1.0, classes_said=2)
    monkeypatch.setattr(supervise, "look", lambda *_: None if (v := next(looks)) is None else {"mcc": v, **found})
    out = tmp_path / "run"
    flags = "--tune head --eval-every 2 --patience 3 --steps 14 --lr 0 1e-3".split()
    assert tune(photos, start, out, *flags) == 0
    state = checkpoint.load(out / "last.pth")
    assert state["best"] == {"step": 2, "value": 0.5} and state["step"] == 8  # three looks without a better one
    assert checkpoint.load(out / "best.pth")["step"] == 2
    table = tables.read(out, "val_select")
    classifier, facts = read_classifier(out / "best.pth")
    assert facts["step"] == 2 and table.facts["weights_sha256"] == data.file_sha256(out / "best.pth")
    before = (out / "last.pth").read_bytes()
    assert tune(photos, start, out, *flags) == 0  # finished: no further update, and no look (next(looks) would be 0.7)
    assert (out / "last.pth").read_bytes() == before and next(looks) == 0.7


def test_exports_are_the_averaged_weights_of_the_chosen_step_one_by_one(photos, start, tmp_path):
    out = tmp_path / "run"
    assert tune(photos, start, out, "--tune", "adapters", "--views", "tiles:rows=1,cols=2", "--ema", "0.9") == 0
    classifier, facts = read_classifier(out / "best.pth")
    state = checkpoint.load(out / "best.pth")
    torch.testing.assert_close(classifier.head.last_layer.weight, state["teacher"]["head.last_layer.weight"])
    for split, purpose in (("val_select", "select"), ("val_calib", "calibrate")):
        table, source = tables.read(out, split), data.open_for(photos, purpose)
        assert table.logits.shape == (12, 3, 2) and not (set(table.labels.tolist()) - {0, 1})
        assert table.facts["layout"] == "tiles:rows=1,cols=2" and table.facts["classes"] == ["no", "yes"]
        names = source.rows.texts("path")
        assert sorted(names) == sorted(table.ids.tolist())
        for name, group, logits in zip(table.ids, table.groups, table.logits):
            alone = logits_of(classifier, source, [names.index(name)], facts["layout"], facts["eval_view"])[0]
            np.testing.assert_allclose(alone, logits, atol=2e-5)
            assert group == f"g{int(name[2:-4]) // 2:02}"
    assert not (out / "predictions" / "val_test.npz").exists() and not (photos / "_splits" / "test_uses.jsonl").exists()
    load_backbone(out / "best.pth")


def test_fusion_is_trained_end_to_end_and_predicts_as_it_was_judged(photos, start, tmp_path):
    out, more = tmp_path / "run", "--tune all --fusion mil --views tiles:rows=1,cols=2 --lr 3e-3 3e-3 --ema 0.5"
    assert tune(photos, start, out, *more.split()) == 0
    begin, end = (read_classifier(out / f"step_{step:08}.pth")[0].state_dict() for step in (0, 12))
    trained = [name for name in begin if not torch.equal(begin[name], end[name])]
    assert any("backbone.blocks.0" in name for name in trained) and "head.attend.tanh.weight" in trained
    assert "head.centre" not in trained and (end["head.centre"] != 0).any()
    events = " ".join(line["event"] for line in lines(out, "event"))
    assert "the head starts as a fusion of frozen views: log loss" in events
    table = tables.read(out, "val_select")
    assert table.logits.shape == (12, 1, 2)
    words = ["--ckpt", str(out / "best.pth"), "--data", str(photos), "--split", "val_select", "--out"]
    assert predict.main([*words, str(tmp_path / "said"), "--device", "cpu"]) == 0
    said = tables.read(tmp_path / "said" / "val_select.npz")
    place = {name: k for k, name in enumerate(said.ids)}
    np.testing.assert_allclose(said.logits[[place[name] for name in table.ids]], table.logits, atol=2e-5)


def test_an_update_of_fusion_is_that_of_all_views(photos):
    """The loss of micro-batches of all views is that of pictures one by one, each with its three views."""
    torch.manual_seed(0)
    net = supervise.joined(toy(), "mil").train()
    source, labels, layout = data.open_source(photos), np.arange(72) % 2, "tiles:rows=1,cols=2"
    how = layout, 32, 7, range(3, 4), 8, 4, 0, 1
    view, plain = data.eval_view("photo", 32), augment.Pictures(source, augment.find_row("none"), *how, every=True)[0]
    wanted = views_of(source, plain.ids[::3], layout, view, "cpu").flatten(0, 1)
    torch.testing.assert_close(augment.render(plain, labels, 2, view, "cpu")[0], wanted, atol=0.02, rtol=0)
    pictures = augment.Pictures(source, augment.find_row("light"), *how, every=True)
    args = SimpleNamespace(head="probe", fusion="mil", micro_batch=4, seed=7)
    train = source, SimpleNamespace(labels=labels, classes=["no", "yes"])
    run = SimpleNamespace(args=args, train=train, student=net, device="cpu", facts={"eval_view": view})
    reads, alone = [pictures[0], pictures[1]], []
    found = t.make_ready(run, reads)
    for read, micro in zip(reads, found):
        assert read.own == 12 and micro.views.shape[:2] == (4, 3) and len(micro.u) == 4
        targets = F.one_hot(torch.tensor(labels[read.ids[::3]]), 2).float()
        alone += [losses.soft_cross_entropy(net(micro.views[k : k + 1]).logits, targets[k : k + 1]) for k in range(4)]
    torch.stack(alone).mean().backward()
    wanted = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    objective = supervise.read_loss("ce", labels, 2)
    terms, seen = t.supervised_update(net, found, t.Weights(objective))
    torch.testing.assert_close(terms["loss"], torch.stack(alone).mean())
    assert seen.logits.shape == (8, 2) and wanted["backbone.blocks.0.attn.proj.weight"].abs().max() > 0
    for name, p in net.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_the_head_starts_as_the_linear_probe(photos, start, tmp_path):
    """And a look at step 0 measures it, so that training is never chosen below the probe."""
    out = tmp_path / "run"
    assert tune(photos, start, out, "--tune", "head", "--steps", "1", "--lr", "0", "0") == 0
    vit, view = load_backbone(start), data.eval_view("photo", 32)
    found, labels = {}, {}
    for purpose in ("fit", "select"):
        source = data.open_for(photos, purpose)
        net = Classifier(vit, Head(128, 2), "both").eval()
        found[purpose] = each_view(net.features, source, np.arange(len(source)), "whole", view, "cpu", 8, 1, "x")[:, 0]
        labels[purpose] = np.array([int(name[2:-4]) % 2 for name in source.rows.texts("path")])
    X, y = np.concatenate(list(found.values())), np.concatenate(list(labels.values()))
    fit = np.arange(len(X)) < len(found["fit"])
    probe = fits.linear_probe(X, y, fit, ~fit, 2)
    (first, *_) = lines(out, "val_loss")
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(min(probe.losses), rel=1e-3)
    table = tables.read(out, "val_select")
    expected = X[~fit] @ probe.weight.T + probe.bias
    order = [data.open_for(photos, "select").rows.texts("path").index(name) for name in table.ids]
    np.testing.assert_allclose(table.logits[:, 0], expected[order], atol=2e-3, rtol=1e-3)


def test_training_learns(photos, start, tmp_path):
    """From a random backbone: a better loss on val_select than its linear probe's best, above chance by far."""
    out = tmp_path / "run"
    flags = "--tune all --steps 60 --lr 1e-3 1e-3 --aug none --ema 0.9 --eval-every 20 --head random --layer-decay 1"
    assert tune(photos, start, out, *flags.split()) == 0
    losses_ = [line["loss"] for line in lines(out, "loss")]
    assert losses_[-1] < 0.45, losses_
    assert json.loads((out / "results.json").read_text())["select"]["auc"] > 0.9


# guards


def test_a_run_of_nan_ends_with_code_3_and_exports_nothing(photos, start, tmp_path, monkeypatch):
    whole = t.supervised_update
    monkeypatch.setattr(
        t, "supervised_update", lambda *a: (lambda r: ({**r[0], "loss": r[0]["loss"] * torch.nan}, r[1]))(whole(*a))
    )
    out = tmp_path / "run"
    assert tune(photos, start, out, "--tune", "head") == 3
    events = [line["event"] for line in lines(out, "event")]
    assert sum(e.startswith("skipped") for e in events) == 3
    assert events[-1].startswith("stopped: three updates in a row")
    assert not (out / "predictions").exists() and not (out / "results.json").exists()
    state, initial = checkpoint.load(out / "last.pth"), checkpoint.load(out / "best.pth")
    assert state["step"] == 0
    same(state["student"], initial["student"])


def test_a_single_bad_update_is_skipped_and_the_run_goes_on(photos, start, tmp_path, monkeypatch):
    whole, calls = t.gradients, []

    def sometimes(*args):
        found = whole(*args)
        calls.append(1)
        return (*found[:3], len(calls) in (3, 4, 6), found[4])

    monkeypatch.setattr(t, "gradients", sometimes)
    out = tmp_path / "run"
    assert tune(photos, start, out, "--tune", "head") == 0
    state = checkpoint.load(out / "last.pth")
    assert state["step"] == 12 and {int(s["step"]) for s in state["optimizer"].values()} == {9}


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--tune some", "--tune some: use none, head, adapters, last:N"),
        ("--tune last", "--tune last: use none"),
        ("--tune last:3", "--tune last:3: this backbone has 2 blocks"),
        ("--tune head --protocol cv", "--protocol cv: --tune head knows select, and test"),
        ("--tune head --features box", "--features box: nodules are for the frozen probe"),
        ("--tune head --batch-size 99", "--batch-size 99 is more than the 36 images"),
        ("--tune head --micro-batch 3", "--micro-batch 3 does not divide"),
        ("--tune head --loss cd", "there is no cd"),
        ("--tune head --loss ce:weights=[1]", "weights are balanced, or 2 numbers"),
        ("--tune head --loss conformal", "--loss conformal compares the images of a batch"),
        ("--tune head --head some", "there is no some; .*known are probe, random"),
        ("--tune adapters --adapter lora:ranks=2", "lora has no option ranks"),
        ("--tune adapters --adapter lora:rank=4000", "adapter rank 4000"),
        ("--tune head --pool mode", "there is no mode"),
        ("--tune head --views diles", "layout 'diles'"),
        ("--tune head --aug dark", "--aug dark: no 'dark'"),
        ("--tune head --size 30", "--size 30 is not a multiple of the patch size 16"),
        ("--tune none --steps 3", "--steps is not read with --tune none: leave it out, or give --tune too"),
        ("--tune head --folds f.csv", "--folds is not read with --tune head: leave it out, or give --tune none too"),
        ("--tune all --fusion max", "there is no max; known are mil, mean"),
        ("--tune all --fusion mil:keep=3", "mil has no option keep"),
        ("--tune all --fusion mil --aug strong", "--aug strong mixes pictures"),
        ("--tune all --fusion mil --head random", "--fusion joins the views"),
        ("--tune fusion --fusion mil", "--fusion joins the views"),
    ],
)  # fmt: skip
def test_bad_flags_say_what_to_do(photos, start, tmp_path, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        tune(photos, start, tmp_path / "run", *flags.split())
    assert not list((tmp_path / "run").glob("step_*"))


def test_one_class_in_a_split_is_a_sentence(start, tmp_path):
    root = make_photos(tmp_path / "data")
    rows = list(csv.reader((root / "labels.csv").read_text().splitlines()))
    with open(root / "labels.csv", "w", newline="") as file:
        other = [[p, "no" if g[1:].isdigit() and int(g[1:]) % 6 == 3 else label, g] for p, label, g in rows]
        csv.writer(file).writerows(other)
    with pytest.raises(ValueError, match="one-class labels: val_select has no sample of class yes; make a split"):
        tune(root, start, tmp_path / "run", "--tune", "head")


def test_predictions_of_one_class_are_never_exported(photos, start, tmp_path):
    out = tmp_path / "run"
    flags = "--tune head --head random --steps 1 --lr 0 0 --loss ce".split()
    state = torch.load(start, weights_only=True)
    flat = tmp_path / "flat.pth"
    torch.save({k: v * 0.0 if k == "patch_embed.proj.weight" else v for k, v in state.items()}, flat)
    with pytest.raises(ValueError, match="call all 12 pictures of val_select (no|yes): nothing is exported"):
        tune(photos, flat, out, *flags)
    assert not (out / "predictions").exists() and not (out / "results.json").exists()
    assert any(line["event"].startswith("warning: all predictions") for line in lines(out, "event"))


def test_weights_that_have_seen_what_is_held_out_are_refused(photos, start, tmp_path):
    """A leak is planted: a first run trains on what a second split holds out."""
    assert tune(photos, start, tmp_path / "first", "--tune", "head", "--steps", "1") == 0
    contract = json.loads((photos / "_splits" / "splits.json").read_text())
    other = make_photos(tmp_path / "data")
    moved = {g: {"train": "val_calib", "val_calib": "train"}.get(s, s) for g, s in contract["groups"].items()}
    moved["g02"] = "train"
    (other / "_splits" / "splits.json").write_text(json.dumps({**contract, "groups": moved}))
    first = tmp_path / "first" / "best.pth"
    with pytest.raises(ValueError, match="leak: .* groups of the held-out splits were in the training"):
        tune(other, first, tmp_path / "second", "--tune", "head", "--steps", "1")
    assert tune(other, first, tmp_path / "third", "--tune", "head", "--steps", "1", "--allow-seen") == 0
    facts = checkpoint.load(tmp_path / "third" / "last.pth")
    assert set(facts["trained_groups"]) >= {g for g, s in contract["groups"].items() if s == "train"}
    assert facts["provenance"]["known"] is False, "where the first weights came from, nobody knows"


def test_val_test_is_looked_at_on_request_and_recorded(start, tmp_path):
    root, out = make_photos(tmp_path / "data"), tmp_path / "run"
    assert tune(root, start, out, "--tune", "head", "--steps", "2", "--bootstrap", "50") == 0
    assert not (root / "_splits" / "test_uses.jsonl").exists()
    assert tune(root, start, out, "--tune", "head", "--steps", "2", "--bootstrap", "50", "--protocol", "test") == 0
    (use,) = [json.loads(line) for line in (root / "_splits" / "test_uses.jsonl").read_text().splitlines()]
    assert use["program"] == "train_probe.py" and use["weights_sha256"] == data.file_sha256(out / "best.pth")
    results = json.loads((out / "results.json").read_text())
    assert results["test"]["samples"] == 12 and "the trained classifier has AUC" in results["verdict"]
    assert tables.read(out, "val_test").logits.shape == (12, 1, 2) and (out / "report.html").exists()


def test_a_dry_run_writes_nothing(photos, start, tmp_path, capsys):
    assert tune(photos, start, tmp_path / "run", "--tune", "all", "--dry-run") == 0
    assert "dry run: loss " in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_flag_that_is_newer_than_the_run_counts_as_its_default(photos, start, tmp_path):
    out, flags = tmp_path / "run", ["--tune", "head", "--steps", "2", "--eval-every", "1"]
    assert tune(photos, start, out, *flags) == 0
    path = out / "step_00000002.pth"
    state = torch.load(path, weights_only=True)
    del state["args"]["warmup"], state["args"]["pool"]
    torch.save(state, path)
    assert tune(photos, start, out, *flags) == 0
    assert tune(photos, start, out, *flags, "--warmup", "0.1", "--pool", "mean") == 0
    with pytest.raises(ValueError, match="--warmup was 0.1 in this run and is now 0.2"):
        tune(photos, start, out, *flags, "--warmup", "0.2")
    config = json.loads((out / "config.json").read_text())
    assert "given" not in config["args"] and config["args"]["warmup"] == 0.1


def test_val_calib_without_a_labelled_picture_is_said(photos, start, tmp_path, capsys):
    splits = json.loads(data.split_path(photos).read_text())["groups"]
    kept = [s for s in (photos / "labels.csv").read_text().split() if splits.get(s.split(",")[2]) != "val_calib"]
    (tmp_path / "some.csv").write_text("\n".join(kept))
    words = ["--tune", "head", "--steps", "1", "--labels", str(tmp_path / "some.csv")]
    assert tune(photos, start, tmp_path / "a", *words) == 0
    assert "val_calib has no labelled sample" in capsys.readouterr().out
    assert tune(photos, start, tmp_path / "b", *words[:4]) == 0
    assert "val_calib has no labelled sample" not in capsys.readouterr().out


def test_another_run_is_not_continued(photos, start, tmp_path):
    out = tmp_path / "run"
    assert tune(photos, start, out, "--tune", "head", "--steps", "1") == 0
    with pytest.raises(ValueError, match="--tune was head in this run and is now all"):
        tune(photos, start, out, "--tune", "all", "--steps", "1")
    text = (photos / "labels.csv").read_text()
    try:
        (photos / "labels.csv").write_text(text.replace("yes", "maybe"))
        with pytest.raises(ValueError, match="labels.csv is not the table of .*last.pth|not the table of .*step_"):
            tune(photos, start, out, "--tune", "head", "--steps", "1")
    finally:
        (photos / "labels.csv").write_text(text)


def test_best_is_linked_again_after_a_kill_between_the_file_and_its_name(photos, start, tmp_path):
    out = tmp_path / "run"
    assert tune(photos, start, out, "--tune", "head", "--steps", "1", "--lr", "0", "0") == 0
    best = checkpoint.load(out / "last.pth")["best"]["step"]
    (out / "best.pth").unlink()
    if best == 1:
        assert tune(photos, start, out, "--tune", "head", "--steps", "1", "--lr", "0", "0") == 0
        assert (out / "best.pth").samefile(out / "step_00000001.pth")
        return
    (out / "step_00000001.pth").unlink()
    checkpoint.point_last(out, out / "step_00000000.pth")
    assert tune(photos, start, out, "--tune", "head", "--steps", "1", "--lr", "0", "0") == 0
    assert (out / "best.pth").samefile(out / "step_00000000.pth")


# kills and ranks


KILLS = (
    "--tune adapters --adapter dora:rank=4 --head probe:dropout=0.2 --aug strong --save-every 1 --workers 1 --ema 0.9"
)


def survive(started, photos, start, tmp_path, kills, steps, seed=0):
    """Kill -9 at random moments, in saves too, then let it end: every bit is that of the unbroken run."""
    more = (*KILLS.split(), "--steps", str(steps), "--eval-every", "3", "--patience", "0")

    def begin(out):
        return started([ROOT / "train_probe.py", *words(photos, start, out, *more)])

    def whole(out):
        process = begin(out)
        process.join()
        assert process.exitcode == 0

    whole(tmp_path / "whole")
    random, run, done = np.random.default_rng(seed), tmp_path / "run", 0
    for k in range(kills):
        target = latest_step(run) + random.integers(1, steps // (kills + 1) + 1)
        process = begin(run)
        while process.is_alive() and not (latest_step(run) >= target and (k % 2 or list(run.glob(".*.pth.*.tmp")))):
            time.sleep(0.0005)  # its processes need the cores
        done += process.is_alive()
        process.kill()
        process.join()
    whole(run)
    same(weights(tmp_path / "whole"), weights(run))
    best = [checkpoint.load(tmp_path / name / "best.pth") for name in ("whole", "run")]
    assert best[0]["step"] == best[1]["step"] and not list(run.glob(".*.tmp"))
    same(best[0]["teacher"], best[1]["teacher"])
    for split in ("val_select", "val_calib"):
        ours, theirs = tables.read(run, split), tables.read(tmp_path / "whole", split)
        assert np.array_equal(ours.logits, theirs.logits)
    return done


@pytest.mark.slow
def test_three_kills_change_no_bit(started, photos, start, tmp_path):
    assert survive(started, photos, start, tmp_path, 3, 20) >= 2


@pytest.mark.proof
def test_twenty_kills_change_no_bit(started, photos, start, tmp_path):
    done = survive(started, photos, start, tmp_path, 20, 100, seed=1)
    print(f"{done} of 20 kills hit a living run")
    assert done >= 18


@pytest.mark.slow
def test_two_processes_train_and_choose_as_one(photos, start, tmp_path, on_two_ranks):
    more = "--tune all --aug strong --head probe:dropout=0.2 --lr 1e-3 1e-3 --layer-decay 1".split()
    assert tune(photos, start, tmp_path / "one", *more) == 0
    two = words(photos, start, tmp_path / "two", *more, "--micro-batch", "2")
    on_two_ranks(be_rank, free_port(), [ROOT / "train_probe.py", *two])
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one["best"]["step"] == two["best"]["step"] and one["best"]["value"] == pytest.approx(two["best"]["value"])
    for name, value in one.items():
        if name.startswith("teacher"):
            torch.testing.assert_close(two[name], value, rtol=1e-2, atol=2e-4, msg=lambda s, n=name: f"{n} {s}")
    ours, theirs = (tables.read(tmp_path / name, "val_calib") for name in ("one", "two"))
    assert np.array_equal(ours.ids, theirs.ids)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-2)


def test_a_folder_that_another_run_holds_is_refused(photos, start, tmp_path, monkeypatch):
    lock = loop.lock
    monkeypatch.setattr(loop, "lock", lambda out: lock(out, 1))
    (tmp_path / "run").mkdir()
    held = lock(tmp_path / "run")
    with pytest.raises(ValueError, match="is in use by process"):
        tune(photos, start, tmp_path / "run", "--tune", "head")
    held.close()
    assert tune(photos, start, tmp_path / "run", "--tune", "head") == 0
