"""What this machine is and how fast: facts that need no measuring, the rate of a matrix product, sensors."""

import contextlib
import json
import os
import platform
import re
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


def read_text(path):
    with contextlib.suppress(OSError, UnicodeDecodeError):  # sensors of sleeping devices cannot be read
        return path.read_text().strip()
    return ""


def sensors(root):
    """Readable temperatures, powers and fans of hwmon (amdgpu is one) and thermal zones -> {"name (C)": value}."""
    found = {}
    for path in sorted(root.glob("class/hwmon/hwmon*/*_*")) + sorted(root.glob("class/thermal/thermal_zone*/temp")):
        kind = re.fullmatch(r"(temp|power|fan)(\d*)(_input|_average|)", path.name)
        if kind and re.fullmatch(r"-?\d{1,15}", text := read_text(path)):
            label = read_text(path.parent / f"{kind[1]}{kind[2]}_label") or kind[1] + kind[2]
            owner = read_text(path.parent / ("name" if kind[3] else "type"))
            unit, scale = {"temp": ("C", 1e3), "power": ("W", 1e6), "fan": ("rpm", 1)}[kind[1]]
            found[f"{path.parent.name} {owner} {label} ({unit})"] = int(text) / scale
    return found


def ask(*command):
    """What a program prints; nothing where it is not installed, fails or hangs."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    return ""


def card_sensors():
    """The same from nvidia-smi and rocm-smi."""
    found, answers = {}, {}
    query = "--query-gpu=temperature.gpu,power.draw,fan.speed"
    for k, line in enumerate(ask("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()):
        answers[f"nvidia {k}"] = dict(zip(("temperature (C)", "power (W)", "fan (%)"), line.split(",")))
    with contextlib.suppress(ValueError, TypeError):
        answers |= json.loads(ask("rocm-smi", "--showtemp", "--showpower", "--showfan", "--json"))
    for card, values in answers.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            with contextlib.suppress(ValueError, TypeError):  # "N/A", "[Not Supported]"
                found |= {f"{card} {key}": float(value)} if key.endswith(("(C)", "(W)", "(%)")) else {}
    return found


def hottest(values):
    return max((value for name, value in values.items() if name.endswith("(C)")), default=None)


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
        "temperatures_c": {k: v for k, v in (sensors(Path("/sys")) | card_sensors()).items() if k.endswith("(C)")},
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
