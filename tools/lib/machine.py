"""What this machine is and how fast: facts that need no measuring, the rate of a matrix product, temperatures."""

import contextlib
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

# largest error relative to the largest value: a few units of the type's own rounding, summed over 512 keys
DTYPES = {"fp32": (torch.float32, 1e-3), "bf16": (torch.bfloat16, 4e-2), "fp16": (torch.float16, 5e-3)}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device, least=0.1):
    """Median time of one call; repeats until `least` seconds are spent, after one call to warm up."""
    function()
    times = []
    while sum(times) < least or len(times) < 3:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def check_gemm(device, dtype):
    """Rate of a square product, doubled in size until one takes 50 ms, so that any machine is measured at its best."""
    n = 512
    while True:
        a = torch.randn(n, n, device=device, dtype=DTYPES[dtype][0])
        took = seconds(lambda a=a: a @ a, device)
        if took > 0.05 or n >= 16384:
            return {"works": True, "tflops": 2 * n**3 / took / 1e12, "size": n}
        n *= 2


def temperatures():
    """{sensor: degrees C} of every readable kernel sensor (CPU, disks, AMD cards) and of NVIDIA cards."""
    found = {}
    for file in sorted(Path("/sys/class/hwmon").glob("hwmon*/temp*_input")):
        with contextlib.suppress(OSError, ValueError):  # sensors of sleeping devices refuse to be read
            name = (file.parent / "name").read_text().strip()
            found[f"{name}/{file.name[:-6]}"] = int(file.read_text()) / 1000
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=index,temperature.gpu", "--format=csv,noheader,nounits"]
        for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
            index, degrees = line.split(",")
            found[f"nvidia/{index}"] = float(degrees)
    return found


def describe(device):
    """Facts about the machine that need no measuring."""
    facts = {
        "device": str(device),
        "name": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_disk_gb": shutil.disk_usage(".").free / 1e9,
        "temperatures_c": temperatures(),
    }
    with contextlib.suppress(ValueError, OSError):  # not every system tells
        facts["memory_gb"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    with contextlib.suppress(OSError):
        models = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
        facts["cpu"] = models[0].split(":")[1].strip() if models else facts["name"]
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"name": card.name, "device_memory_gb": total / 1e9, "device_free_gb": free / 1e9}
        if torch.version.hip:
            facts["arch"] = card.gcnArchName  # Strix Halo is gfx1151; its marketing name varies by laptop
        else:
            facts["arch"] = f"sm_{card.major}{card.minor}"
    return facts
