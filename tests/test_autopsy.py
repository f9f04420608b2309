"""Why an update broke: planted causes are named, shares add up, the replay is the run's own update to the bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_train import TINY, folder, train  # noqa: F401 - folder is a fixture

import checkpoint
import data
import train_ssl as t
from tools import inspect_step
from tools.lib import autopsy

torch.set_num_threads(1)
RUN = ["--steps", "6", "--micro-batch", "4", "--gram-weight", "0", "--log-every", "1"]


@pytest.fixture
def run_of(folder, tmp_path):  # noqa: F811
    def make(*more):
        assert train(folder, tmp_path / "run", *RUN, *more) == 0
        return tmp_path / "run"

    return make


def why(folder, out, number, capsys):  # noqa: F811
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix in (".pth", ".json", ".jsonl")}
    capsys.readouterr()
    assert (
        t.main(["--data", str(folder), "--out", str(out), "--why", str(number), "--workers", "0", "--device", "cpu"])
        == 0
    )
    assert before == {p: p.read_bytes() for p in before}, "the run is only read"
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--drop-path", "0.3"], ["--gram-weight", "2", "--micro-batch", "8"],
                                  ["--centering", "softmax", "--rope-rescale", "1"]])  # fmt: skip
@pytest.mark.parametrize("number", [4, 5])
def test_a_healthy_update_is_replayed_to_the_bit_and_its_shares_add_up(run_of, folder, more, number, capsys):  # noqa: F811
    run = run_of(*more)
    found = why(folder, run, number, capsys)
    assert found["from"] == "step_00000004.pth" if number == 5 else found["from"] == "step_00000002.pth"
    assert found["replayed"] == (1 if number == 5 else 2)
    assert found["as_logged"] is True and found["as_saved"] is (True if number == 4 else None)
    shares = [image["share"] for image in found["images"]]
    assert len(shares) == 8 and sum(shares) == pytest.approx(1, abs=1e-3)
    assert sum(found["by_term"].values()) == pytest.approx(1, abs=1e-3)
    assert set(found["by_term"]) == {"dino", "ibot", "koleo", *(["gram"] if "2" in more and number > 3 else [])}
    squares = [value**2 for value in found["modules"].values()]
    assert sum(squares) ** 0.5 == pytest.approx(found["norm"], rel=1e-5) and "backbone.blocks.1" in found["modules"]
    assert found["cause"] == "none" and np.isfinite(found["swap"]["norm"])
    if "--drop-path" not in more:
        worst = found["images"][0]
        assert sum(worst["view_shares"]) == pytest.approx(worst["share"], abs=1e-4)


@pytest.mark.slow
def test_the_gradient_without_an_image_is_that_of_the_others(run_of, folder, capsys, monkeypatch):  # noqa: F811
    """Leave-one-out by subtraction against a backward in which that image's outputs get no derivative."""
    real, checked = autopsy.shares, []

    def shares(replay, micro_batches, leaves, total):
        found = real(replay, micro_batches, leaves, total)
        derivatives = [[None if x is None else x.grad for x in outs] for outs in leaves]
        for m, micro in enumerate(micro_batches):
            b = len(micro.masks) // 2
            for j in range(b):
                rest = [i for i in range(b) if i != j]
                parts = [
                    autopsy.rows_of(o, rest, b, len(o.crops.locals) // b)[0] if n == m else [None] * 4
                    for n, o in enumerate(micro_batches)
                ]
                each = zip(micro_batches, derivatives, parts)
                grads = [next(autopsy.pulled_back(replay, o, d, [part])) for o, d, part in each]
                grads = [sum(g) for g in zip(*grads)]
                assert found[0][len(checked)]["without"] == pytest.approx(autopsy.dot(grads, grads) ** 0.5, rel=1e-3)
                checked.append(j)
        return found

    monkeypatch.setattr(autopsy, "shares", shares)
    found = why(folder, run_of(), 6, capsys)
    assert len(checked) == 8
    assert [image["norm"] for image in found["images"]] == sorted((i["norm"] for i in found["images"]), reverse=True)


@pytest.mark.slow
def test_without_a_checkpoint_before_it_the_replay_begins_at_the_start(run_of, folder, capsys):  # noqa: F811
    run = run_of("--keep-last", "1")
    found = why(folder, run, 3, capsys)
    assert (found["from"], found["replayed"], found["as_logged"]) == ("the start", 3, True)


# ----- planted causes


def change(run, edit):
    """Every checkpoint of the run, changed and saved anew."""
    for path in checkpoint.step_files(run):
        state = checkpoint.load(path)
        edit(state)
        checkpoint.save(path, {key: value for key, value in state.items() if key not in ("format", "version")})


def batch_ids(run, folder, number):  # noqa: F811
    config = inspect_step.read_run_config(run)
    source = inspect_step.open_data(config, folder)
    return source, inspect_step.read_update(source, config, number, 8)


@pytest.mark.slow
def test_a_corrupted_weight_is_named(run_of, folder, capsys):  # noqa: F811
    run = run_of()

    def edit(state):
        state["student"]["backbone.blocks.1.mlp.fc1.weight"][7, 3] = 2e4

    change(run, edit)
    found = why(folder, run, 5, capsys)
    assert found["cause"] == "weight" and "student.backbone.blocks.1.mlp.fc1.weight[7, 3], is 2e+04" in found["verdict"]


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_named_before_all_else(run_of, folder, capsys):  # noqa: F811
    run = run_of()
    change(run, lambda state: state["teacher"]["ibot_head.last_layer.weight"].view(-1)[5].fill_(float("nan")))
    found = why(folder, run, 5, capsys)
    assert found["first"]["where"] == "the output of teacher.ibot_head.last_layer"
    assert (
        found["skipped"]
        and "teacher.ibot_head.last_layer.weight has 1 that is not finite, the first at [0, 5]" in found["verdict"]
    )


@pytest.mark.slow
def test_a_temperature_gone_to_0_is_named(run_of, folder, capsys):  # noqa: F811
    run = run_of()
    change(run, lambda state: state["args"].update(teacher_temp=[0.0, 0.0]))
    found = why(folder, run, 5, capsys)
    assert found["cause"] == "temperature" and "look at --teacher-temp" in found["verdict"]


def plant(source, i, values):
    """Write values over the three slices of a sample."""
    volume = np.load(source.path(i))
    z = int(source.rows[i]["z"])
    volume[z - 1 : z + 2] = values
    np.save(source.path(i), volume)


def test_a_constant_slice_is_named_with_its_hu(run_of, folder, capsys):  # noqa: F811
    run = run_of()
    source, batches = batch_ids(run, folder, 5)
    plant(source, batches[1].ids[2], -1024)
    found = why(folder, run, 5, capsys)
    assert found["guilty"] == [[1, 2]] and "image 3 of micro-batch 2" in found["verdict"]
    assert "a slice of -1024 HU throughout" in found["verdict"] and "in that place: loss" in found["verdict"]


@pytest.mark.slow
def test_copies_within_a_batch_are_named(run_of, folder, capsys):  # noqa: F811
    run = run_of("--w-koleo", "1")
    source, batches = batch_ids(run, folder, 5)
    noise = np.random.default_rng(0).integers(-1000, 1000, np.load(source.path(0)).shape[1:])
    for batch in batches:
        for i in batch.ids:
            plant(source, i, noise)
    found = why(folder, run, 5, capsys)
    assert found["cause"] == "copies" and "8 of 8 images are copies" in found["verdict"]


@pytest.mark.slow
def test_pixels_that_are_not_finite_name_image_and_view(run_of, folder, capsys, monkeypatch):  # noqa: F811
    run = run_of()
    source, batches = batch_ids(run, folder, 5)
    real, guilty = data.render, batches[0].images[1]

    def render(images, plan, *how):
        crops = real(images, plan, *how)
        for j, image in enumerate(images):
            if torch.equal(image, guilty):
                crops.locals[1 * len(images) + j, 0, 3, 3] = float("nan")
        return crops

    monkeypatch.setattr(data, "render", render)
    found = why(folder, run, 5, capsys)
    assert (
        found["guilty"] == [[0, 1]]
        and "image 2 of micro-batch 1, view 4: the pixels of local crop 2" in found["verdict"]
    )
    assert np.isfinite(found["swap"]["loss"]) and found["skipped"], "with another image it would have been fine"


def made(shares, **more):
    """What examine() knows of a batch whose images have these shares of the gradient."""
    same = dict(micro=0, flat=False, words="values from 0 to 9 HU")
    images = [same | dict(at=j, share=s, norm=abs(s), name=f"p#{j}") for j, s in enumerate(shares)]
    usual = dict(weights=[], first=None, temperature=0.07, finite=True, copies=[], by_term={"koleo": 0.1})
    return {**usual, **more, "images": sorted(images, key=lambda i: -i["norm"])}, images


def test_one_image_with_most_of_the_gradient_is_named_and_its_view_where_one_has_most_of_it():
    found, images = made([0.05] * 7 + [0.61] + [0.04] * 1)
    images[7]["view_shares"] = [0.02, 0.5, 0.05, 0.04]
    cause, guilty, words = autopsy.verdict(found, images)
    assert (cause, guilty) == ("image", [(0, 7)])
    assert words.startswith("image 8 of micro-batch 1, view 2: values from 0")
    assert "61% of the gradient, an even part is 11%" in words
    images[7]["view_shares"] = [0.2, 0.2, 0.1, 0.11]
    assert "view" not in autopsy.verdict(found, images)[2]
    assert autopsy.verdict(*made([0.12, 0.19] + [0.115] * 6))[0] == "none"


def test_copies_need_koleo_or_half_of_the_batch():
    pair, many = [[(0, 1), (0, 2), (0, 3)]], [[(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]]
    assert autopsy.verdict(*made([0.125] * 8, copies=pair))[0] == "none"
    assert autopsy.verdict(*made([0.125] * 8, copies=pair, by_term={"koleo": 0.9}))[0] == "copies"
    assert autopsy.verdict(*made([0.125] * 8, copies=many))[0] == "copies"


@pytest.mark.slow
def test_the_sheet_and_the_exit_code(run_of, folder, capsys, monkeypatch):  # noqa: F811
    """The whole way once, in two processes."""
    run = run_of()
    flags = ["--run", str(run), "--why", "5", "--images", "2", "--device", "cpu"]
    assert inspect_step.main(flags) == 0
    source, batches = batch_ids(run, folder, 5)
    plant(source, batches[1].ids[2], -1024)
    assert inspect_step.main(flags) == 1
    said = capsys.readouterr().out
    assert "a slice of -1024 HU throughout" in said and str(run / "inspect" / "why_00000005.png") in said
    assert json.loads((run / "inspect" / "why_00000005.json").read_text())["guilty"] == [[1, 2]]


def test_a_run_without_anything_is_a_sentence(tmp_path, folder):  # noqa: F811
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        t.main(["--data", str(folder), "--out", str(tmp_path), "--why", "5", "--device", "cpu"])
    assert autopsy.nearest(tmp_path, 5) == (None, {})
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("kind", ["weight", "temperature", "copies"])
def test_every_cause_is_drawn(run_of, folder, capsys, monkeypatch, tmp_path, kind):  # noqa: F811
    """Numbers that are not finite have no place in JSON: the sheet says so."""
    run = run_of()
    if kind == "weight":
        change(run, lambda state: state["teacher"]["ibot_head.last_layer.weight"].view(-1)[5].fill_(float("nan")))
    elif kind == "temperature":
        change(run, lambda state: state["args"].update(teacher_temp=[0.0, 0.0]))
    else:
        source, batches = batch_ids(run, folder, 5)
        for i in (i for batch in batches for i in batch.ids):
            plant(source, i, 77)
    monkeypatch.setattr(inspect_step, "ask", lambda args, config: why(folder, run, args.why, capsys))
    flags = ["--run", str(run), "--out", str(tmp_path / f"{kind}.png"), *"--why 5 --images 2 --device cpu".split()]
    assert inspect_step.main(flags) == 1
    said = capsys.readouterr().out
    assert "not finite" in said or kind == "copies"
    assert (tmp_path / f"{kind}.png").stat().st_size > 1000
