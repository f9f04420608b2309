import json
import sys

import pytest
import torch

from tools import check_platform as cp


def working():
    return {
        name: {"works": True, "error": 1e-6, "ms": 1.0, "tflops": 1.0, "gb_s": 1.0, "seconds": 1.0}
        for name in cp.CHECKS
    }


def test_attention_is_compared_with_float64_not_with_itself(monkeypatch):
    cpu = torch.device("cpu")
    assert cp.check_sdpa(cpu, "math", "fp32")["works"]
    exact = cp.scaled_dot_product_attention

    def wrong(q, k, v):
        return exact(q, k, v) * (1.01 if q.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(cp, "scaled_dot_product_attention", wrong)
    result = cp.check_sdpa(cpu, "math", "fp32")
    assert not result["works"] and "wrong numbers" in result["reason"]


def test_a_kernel_that_kills_its_process_is_reported_and_the_rest_goes_on():
    script = (
        "import json, os, signal, sys\n"
        f"for name in {cp.CHECKS!r}[int(sys.argv[1]):]:\n"
        "    if name == 'sdpa flash bf16': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if name == 'gemm bf16': sys.exit('HIP error: no kernel image')\n"
        "    print(json.dumps({'name': name, 'works': True}), flush=True)\n"
    )
    results = cp.run_checks([sys.executable, "-c", script])
    assert list(results) == cp.CHECKS
    bad = {name: r["reason"] for name, r in results.items() if not r["works"]}
    assert bad == {"sdpa flash bf16": "killed by SIGSEGV", "gemm bf16": "exit code 1: HIP error: no kernel image"}


def test_verdict_needs_one_working_attention_and_product():
    results = working()
    assert cp.verdict(results) is None
    for backend in cp.BACKENDS:
        for dtype in cp.DTYPES:
            results[f"sdpa {backend} {dtype}"] = {"works": False, "reason": "broken driver"}
    assert "broken driver" in cp.verdict(results)


def test_advice_only_where_a_measured_fact_calls_for_it(monkeypatch):
    monkeypatch.delenv("TORCH_BLAS_PREFER_HIPBLASLT", raising=False)
    facts = {"rocm": None, "device": "cuda", "free_disk_gb": 1000}
    assert cp.advice(facts, working()) == []
    assert "TORCH_BLAS_PREFER_HIPBLASLT=1" in cp.advice(facts | {"rocm": "7.0"}, working())[0]
    slow = working() | {"gemm bf16": {"works": True, "tflops": 0.2}}
    assert "--precision fp32" in cp.advice(facts, slow)[0]


@pytest.mark.slow
def test_a_cpu_only_machine_is_ok_and_json_says_the_same(tmp_path, capsys):
    assert cp.main(["--device", "cpu", "--json", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "p.json").read_text())
    assert out.strip().splitlines()[-1] == "ok=true" and report["ok"]
    assert report["checks"]["sdpa math fp32"]["works"] and report["facts"]["cores"] >= 1
    assert f"{report['checks']['gemm fp32']['tflops']:.2f} TFLOP/s" in out


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="--device nonsense"):
        cp.main(["--device", "nonsense"])


def test_the_picked_kernel_is_torchs_choice():
    cpu = torch.device("cpu")
    assert set(cp.picked(cpu).split(", ")) <= {f"{d} {b}" for d in cp.DTYPES for b in cp.BACKENDS}
    with cp.sdpa_kernel(cp.BACKENDS["math"]):
        assert cp.picked(cpu) == "fp32 math, bf16 math, fp16 math"
