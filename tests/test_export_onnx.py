"""tools/export_onnx.py: onnxruntime says what torch says, at three sizes and any batch; the graph is plain."""

import json

import numpy as np
import pytest
import torch
from test_baseline import fitted, photos, vit  # noqa: F401 - fixtures
from test_classifiers import make_classifier, pictures

import model
from tools import export_onnx

REASON = "pip install onnx onnxscript onnxruntime"
pytestmark = pytest.mark.slow  # the exporter takes 20 s of a busy core


@pytest.fixture(autouse=True)
def packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=REASON)


def export(weights, out, *words):
    assert export_onnx.main(list(map(str, ["--weights", weights, "--out", out, *words]))) == 0
    return json.loads(out.with_suffix(".json").read_text())


def test_a_classifier_of_a_fixed_size_has_positions_as_constants(tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    adapters = dict(rank=2, alpha=4, targets="qv")
    # positions of smaller views are folded anyway
    net = make_classifier(tmp_path / "best.pth", ("a", "b", "c"), layers=2, adapters=adapters, size=288)
    root = pictures(tmp_path / "photos", 3)
    found = export(tmp_path / "best.pth", tmp_path / "m.onnx", "--images", root)
    assert found["differences"].keys() == {"1x3x288x288", "2x3x288x288", "5x3x288x288", "pictures"}
    assert max(found["differences"].values()) < 1e-4 and not {"If", "Tile", "Cos", "Sin"} & found["operations"].keys()
    graph = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(graph)
    said = {p.key: json.loads(p.value) for p in graph.metadata_props}
    assert said["classes"] == ["a", "b", "c"] and said["eval_view"]["size"] == 288
    assert graph.opset_import[0].version == 18
    views = torch.randn(7, 3, 288, 288)
    (logits,) = ort.InferenceSession(tmp_path / "m.onnx").run(["logits"], {"images": views.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, net(views).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_a_backbone_of_any_size(tmp_path, gated):
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    vit = model.build_vit("vit_test", layerscale=0.5, gated=gated).eval()  # noqa: F811
    state, config = model.state_to_hf(vit)
    torch.save(state, tmp_path / "w.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = export(tmp_path / "w.pth", tmp_path / "v.onnx", "--dynamic", "--size", 64)
    assert not {"If", "Tile", "Loop"} & found["operations"].keys() and found["operations"]["Cos"] == 1
    ask = ort.InferenceSession(tmp_path / "v.onnx")
    for shape in ((1, 3, 32, 32), (4, 3, 96, 48), (2, 3, 224, 224)):
        views = torch.randn(shape)
        cls, patches = ask.run(["cls", "patches"], {"images": views.numpy()})
        with torch.no_grad():
            tokens = vit(views)
        np.testing.assert_allclose(cls, tokens.cls.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(patches, tokens.patches.numpy(), rtol=0, atol=1e-4)


def test_int8_is_kept_if_it_costs_little(photos, vit, tmp_path, monkeypatch, capsys):  # noqa: F811
    fitted(photos, vit, tmp_path / "run")
    words = ["--int8", "--data", photos]
    found = export(tmp_path / "run" / "best.pth", tmp_path / "m.onnx", *words)["int8"]
    assert found["kept"] and found["bytes"] < (tmp_path / "m.onnx").stat().st_size and found["samples"] == 18
    monkeypatch.setattr(export_onnx, "MCC_DROP", -2.0)
    words = ["--weights", tmp_path / "run" / "best.pth", "--out", tmp_path / "m.onnx", *words]
    assert export_onnx.main(list(map(str, words))) == 1
    assert "int8 not kept" in capsys.readouterr().out and not (tmp_path / "m.int8.onnx").exists()


def test_a_graph_that_says_something_else_is_not_kept(tmp_path, monkeypatch):
    make_classifier(tmp_path / "best.pth")
    monkeypatch.setattr(export_onnx, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="onnxruntime and torch differ by"):
        export(tmp_path / "best.pth", tmp_path / "m.onnx")
    monkeypatch.setattr(export_onnx, "REFUSED", {"Gemm"})
    with pytest.raises(ValueError, match="the graph holds Gemm"):
        export(tmp_path / "best.pth", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
