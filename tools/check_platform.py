"""Is this machine fit to train on? Prints one table of attention kernels and the machine's measured rates.

    python tools/check_platform.py [--json platform.json]

Every kernel is run forward and backward on 512x512 scores and compared with float64 math. Kernels run in
a child process, so one that crashes or hangs is reported and the next is tried. The last line is `ok=true` (exit 0)
or `ok=false reason=...` (exit 1).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tools.lib.threads  # noqa: F401 - before torch

# isort: split
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tools.lib.cli import Parser, pick_device, run
from tools.lib.files import write_json
from tools.lib.machine import DTYPES, check_gemm, describe, seconds

BACKENDS = {
    "math": SDPBackend.MATH,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
CHECKS = [f"sdpa {backend} {dtype}" for backend in BACKENDS for dtype in DTYPES]
CHECKS += ["gemm fp32", "gemm bf16", "copy", "compile"]
PATIENCE_S = 120  # a kernel that has not answered by then hangs


def build_parser():
    parser = Parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto (CUDA/ROCm if there, else CPU), cpu, cuda, cuda:1")
    parser.add_argument("--json", metavar="PATH", help="also write everything here")
    parser.add_argument("--child", type=int, metavar="N", help="internal: run checks from number N on, as JSON lines")
    return parser


def attend(backend, inputs):
    """Output and the three input gradients of one attention; inputs are q, k, v and the output's gradient."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), inputs[3])]


def check_sdpa(device, backend, dtype):
    kind, tolerance = DTYPES[dtype]
    if device.type == "cpu" and backend in ("mem-efficient", "cudnn"):
        return {"works": False, "reason": "this torch has no such kernel for CPUs"}
    generator = torch.Generator().manual_seed(0)
    shape = 2, 6, 512, 64  # batch, heads, tokens, head dim
    inputs = [torch.randn(shape, generator=generator).to(kind) for _ in range(4)]
    exact = attend(SDPBackend.MATH, [x.double() for x in inputs])  # on the CPU: the reference, on the CPU in float64
    inputs = [x.to(device) for x in inputs]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = attend(BACKENDS[backend], inputs)
        except RuntimeError as error:  # torch says why a kernel refused in warnings, one per cause
            causes = [str(w.message).split(" (Triggered")[0] for w in caught]
            refused = [c for c in causes if "not used because" not in c and "runtime disabled" not in c]
            return {"works": False, "reason": (refused or [str(error)])[0].split("\n")[0]}
    error = max(((a.double().cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, exact))
    result = {
        "works": error < tolerance,
        "error": error,
        "ms": 1e3 * seconds(lambda: attend(BACKENDS[backend], inputs), device),
    }
    if not result["works"]:
        result["reason"] = f"wrong numbers: relative error {error:.1e}, allowed {tolerance:.0e}"
    return result


def picked(device, tokens=201):
    """The kernel that torch itself takes for a ViT on views of 224 pixels, by type."""
    found = {}
    for dtype, (kind, _) in DTYPES.items():
        x = torch.empty(2, 6, tokens, 64, dtype=kind, device=device, requires_grad=True)
        found[dtype] = SDPBackend(torch._fused_sdp_choice(x, x, x))
    names = {backend: name for name, backend in BACKENDS.items()}
    return ", ".join(f"{dtype} {names.get(backend, backend)}" for dtype, backend in found.items())


def check_copy(device):
    size = 1 << (30 if device.type == "cuda" else 28)  # bytes; far beyond any cache
    source = torch.ones(size, dtype=torch.uint8, device=device)  # written: untouched pages are not memory
    target = torch.empty_like(source)
    return {"works": True, "gb_s": 2 * size / seconds(lambda: target.copy_(source), device) / 1e9}  # read + write


def check_compile(device):
    def function(x):
        return torch.nn.functional.gelu(x).sum(-1)

    x = torch.randn(64, 64, device=device)
    start = time.perf_counter()
    try:
        got = torch.compile(function)(x)
    except Exception as error:  # noqa: BLE001 - the compiler may fail in any way; all of them are the answer asked for
        return {"works": False, "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    return {"works": torch.allclose(got, function(x), atol=1e-3), "seconds": time.perf_counter() - start}


def child(device, first):
    """Run CHECKS[first:], printing one JSON line each; the alarm's default action kills even a hung kernel call."""
    for name in CHECKS[first:]:
        if hasattr(signal, "alarm"):
            signal.alarm(PATIENCE_S)
        kind, *words = name.split()
        function = {"sdpa": check_sdpa, "gemm": check_gemm, "copy": check_copy, "compile": check_compile}[kind]
        print(json.dumps({"name": name, **function(device, *words)}), flush=True)


def run_checks(command):
    """All results by name; a child that dies is noted and a new one goes on behind the check that killed it."""
    results = {}
    while len(results) < len(CHECKS):
        with tempfile.TemporaryFile("w+") as complaints:
            words = [*command, str(len(results))]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=complaints, text=True)
            for line in process.stdout:
                result = json.loads(line)
                results[result.pop("name")] = result
                print(f"\r{len(results)}/{len(CHECKS)} checks", end="", file=sys.stderr, flush=True)
            process.wait()
            complaints.seek(0)
            last = complaints.read().strip().splitlines()[-1:]
        if len(results) == len(CHECKS):
            break
        reason = f"exit code {process.returncode}: {' '.join(last)}"
        if process.returncode < 0:
            reason = f"killed by {signal.Signals(-process.returncode).name}"
        if process.returncode == -signal.SIGALRM:
            reason = f"hangs: no answer in {PATIENCE_S} s"
        results[CHECKS[len(results)]] = {"works": False, "reason": reason}
    print("\r" + " " * 20 + "\r", end="", file=sys.stderr)
    return results


def advice(facts, results):
    """What to do about measured facts; empty on a machine that needs nothing."""
    lines = []
    rocm = facts["rocm"] is not None and facts["device"] != "cpu"
    fp32, bf16 = (results[f"gemm {d}"].get("tflops", 0) for d in ("fp32", "bf16"))
    if rocm and os.environ.get("TORCH_BLAS_PREFER_HIPBLASLT") != "1":
        lines.append(f"bf16 GEMM ran at {bf16:.1f} TFLOP/s: export TORCH_BLAS_PREFER_HIPBLASLT=1 and measure again")
    fast = [r for n, r in results.items() if n in ("sdpa mem-efficient bf16", "sdpa flash bf16") and r["works"]]
    if rocm and not fast and os.environ.get("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL") != "1":
        lines.append("only math attention works: export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 and run this again")
    if 0 < bf16 < fp32:
        rates = f"{bf16:.2f} against {fp32:.2f} TFLOP/s"
        lines.append(f"bf16 is slower than fp32 here ({rates}): train with --precision fp32")
    if facts["free_disk_gb"] < 20:
        lines.append(f"{facts['free_disk_gb']:.0f} GB of disk are free; LIDC-IDRI alone takes 125 GB as DICOM")
    return lines


def verdict(results):
    """Why training cannot work here, or None: one attention kernel and the matrix product must, in one type."""
    for dtype in ("bf16", "fp32"):
        attention = [b for b in BACKENDS if results[f"sdpa {b} {dtype}"]["works"]]
        if attention and results[f"gemm {dtype}"]["works"]:
            return None
    broken = [name for name in ("gemm bf16", "gemm fp32") if not results[name]["works"]]
    if broken:
        return f"{' and '.join(broken)} failed: {results[broken[-1]].get('reason', 'see the table')}"
    return f"no attention kernel works: {results['sdpa math fp32'].get('reason', 'see the table')}"


def print_report(facts, results):
    print(f"{'attention':14} {'dtype':6} {'works':6} {'error':>8} {'fwd+bwd ms':>11}  reason")
    for backend in BACKENDS:
        for dtype in DTYPES:
            r = results[f"sdpa {backend} {dtype}"]
            works = "yes" if r["works"] else "no"
            numbers = f"{r['error']:8.1e} {r['ms']:11.2f}" if "error" in r else " " * 20
            print(f"{backend:14} {dtype:6} {works:6} {numbers}  {r.get('reason', '')}".rstrip())
    print()
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.0f}" for k, v in value.items()) or "none readable"
        print(f"{key:18} {value:.1f}" if isinstance(value, float) else f"{key:18} {value}")
    rates = {"gemm fp32": ("tflops", "TFLOP/s"), "gemm bf16": ("tflops", "TFLOP/s"), "copy": ("gb_s", "GB/s")}
    for name, (key, unit) in (rates | {"compile": ("seconds", "s to the first result")}).items():
        r = results[name]
        print(f"{name:18} {r[key]:.2f} {unit}" if r["works"] else f"{name:18} no: {r.get('reason', 'wrong')}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    if args.child is not None:
        return child(device, args.child)

    facts, results = (describe(device), run_checks([sys.executable, __file__, "--device", str(device), "--child"]))
    facts["attention picked"] = picked(device)
    print_report(facts, results)
    lines = advice(facts, results)
    for line in lines:
        print(f"advice: {line}")
    reason = verdict(results)
    if args.json:
        report = dict(version=1, ok=reason is None, reason=reason, facts=facts, checks=results, advice=lines)
        write_json(args.json, report)
    print("ok=true" if reason is None else f"ok=false reason={reason}")
    return 0 if reason is None else 1


if __name__ == "__main__":
    run(main)
