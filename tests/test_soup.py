"""A soup is the mean of merged weights, and of runs that differ in training alone."""

import pytest
import torch
from test_classifiers import ADAPTERS, make_classifier

import checkpoint
from model import merge_adapters
from tools import soup
from tools.lib.classifiers import read_classifier


def other(path, copy, seed):
    """The same run, trained otherwise."""
    state = checkpoint.load(path)
    torch.manual_seed(seed)
    state["teacher"] = {
        name: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in state["teacher"].items()
    }
    checkpoint.save(copy, state)


@pytest.mark.parametrize("adapters", [None, ADAPTERS])
def test_a_soup_is_the_mean_of_its_runs(tmp_path, adapters):
    net = make_classifier(tmp_path / "a.pth", adapters=adapters)
    paths = [tmp_path / "a.pth"] + [tmp_path / f"{k}.pth" for k in range(2)]
    for k in range(2):
        other(paths[0], paths[1 + k], k)
    assert soup.main(["--ckpt", *map(str, paths), "--out", str(tmp_path / "soup")]) == 0
    found, facts = read_classifier(tmp_path / "soup" / "best.pth")
    parts = [read_classifier(path)[0].state_dict() for path in paths]
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, sum(part[name] for part in parts) / 3, rtol=1e-5, atol=1e-6)
    plain = merge_adapters(net.backbone).state_dict() if adapters else net.backbone.state_dict()
    assert any((found.backbone.state_dict()[n] - plain[n]).abs().max() > 1e-3 for n in plain)
    assert facts["args"]["soup"] == [str(path) for path in paths] and facts["classes"] == ["no", "yes"]
    with pytest.raises(FileExistsError, match="name a new --out"):
        soup.main(["--ckpt", *map(str, paths), "--out", str(tmp_path / "soup")])


def test_what_does_not_mix_is_refused(tmp_path, monkeypatch):
    make_classifier(tmp_path / "a.pth")
    make_classifier(tmp_path / "b.pth", layout="whole")
    make_classifier(tmp_path / "c.pth", split_sha256="s" * 64)
    make_classifier(tmp_path / "d.pth", pool="cls")

    def of_other_facts(path):
        net, facts = read_classifier(tmp_path / "a.pth")
        return net, facts | {"fusion": {"fields": {"weather": [path.stem]}}}

    for name, words in (("b", "differ in layout"), ("c", "differ in split_sha256"), ("d", "differ in pool")):
        with pytest.raises(ValueError, match=words):
            soup.main(["--ckpt", str(tmp_path / "a.pth"), str(tmp_path / f"{name}.pth"), "--out", str(tmp_path / "s")])
    with pytest.raises(ValueError, match="differ in fusion"), monkeypatch.context() as patched:
        patched.setattr(soup, "read_classifier", of_other_facts)
        soup.mean_state([tmp_path / "a.pth", tmp_path / "e.pth"])
    with pytest.raises(ValueError, match="two different checkpoints"):
        soup.main(["--ckpt", str(tmp_path / "a.pth"), str(tmp_path / "a.pth"), "--out", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()
