"""Neighbours at a distance go with the weights: into the checkpoint, and from there to whoever looks."""

import numpy as np
import pytest
import torch
from test_data import make_ct, write_index
from test_train import TINY

import checkpoint
import data
import model
import train_ssl
from tools.lib import judge, runs
from tools.lib.files import read_json_file

torch.set_num_threads(1)


def thin_ct(root):
    """Two series of 1 mm slices, each slice of one grey value that tells its z."""
    lines = []
    for name in ("a", "b"):
        (root / "t").mkdir(parents=True, exist_ok=True)
        np.save(
            root / "t" / f"{name}.npy",
            np.arange(12, dtype=np.int16)[:, None, None] * 50 + np.zeros((1, 48, 48), np.int16),
        )
        lines += [[f"t/{name}.npy", "hu16-v1", "t", name, "s", name, f"{name}.{z}", z, z, 1, 1, 1, 48, 48, 0, 48, 0, 48]
                  for z in range(1, 11)]  # fmt: skip
    write_index(root, lines)
    return root


def run(root, out, *more):
    flags = [*TINY, "--gram-weight", "0", "--steps", "2", "--no-split", *more]
    return train_ssl.main(["--data", str(root), "--out", str(out), *flags])


def test_the_distance_is_recorded_resumed_and_found_again(tmp_path):
    root, out = thin_ct(tmp_path / "ct"), tmp_path / "run"
    assert run(root, out, "--neighbour-mm", "3") == 0
    state = checkpoint.load(out / "last.pth")
    for view in (state["eval_view"], model.read_facts(out / "last.pth")["eval_view"]):
        assert view["neighbour_mm"] == 3
    with pytest.raises(ValueError, match="--neighbour-mm was 3.0 in this run and is now 0"):
        run(root, out)
    config = read_json_file(out / "config.json", {"args": dict}, "")
    again = runs.open_trained(root, config["args"], None, {})
    assert [int(c[0, 0]) // 50 for c in again.read(4)] == [2, 5, 8]
    facts = model.read_facts(out / "last.pth")
    assert judge.choose_view(facts, "hu16-v1", 0, 8)["neighbour_mm"] == judge.neighbour_mm(facts, "hu16-v1") == 3
    assert judge.neighbour_mm(facts, "photo") is None and judge.neighbour_mm({}, "hu16-v1") is None


def test_other_weights_say_nothing_and_damage_is_refused(tmp_path):
    root, out = thin_ct(tmp_path / "ct"), tmp_path / "run"
    assert run(root, out) == 0
    state = checkpoint.load(out / "last.pth")
    assert "neighbour_mm" not in state["eval_view"]
    for wrong in ("3", -1.0, float("nan")):
        with pytest.raises(ValueError, match="eval_view"):
            checkpoint.save(tmp_path / "bad.pth", state | {"eval_view": state["eval_view"] | {"neighbour_mm": wrong}})
            checkpoint.load(tmp_path / "bad.pth")


def test_slices_as_png_refuse_it(tmp_path):
    make_ct(tmp_path / "ct", "rgb-v1")
    with pytest.raises(ValueError, match="neighbours 3 mm away need whole volumes"):
        run(tmp_path / "ct", tmp_path / "run", "--neighbour-mm", "3")
    assert data.open_source(tmp_path / "ct").neighbour_mm is None
