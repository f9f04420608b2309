"""Fair timing: ways in turns, with what limits them measured beside each; rows of the bench's report.

Rates are medians over turns, ratios are means of their quotients without the two extremes: between runs on a shared
machine these moved less than medians of quotients (7% against 8%, 9 turns, nine runs in ten, 2026-11), and one turn in
which the machine stood still does not move them, as it moved quotients of sums (by 24%).
"""

import contextlib
import functools
import math
import resource
import time
from statistics import mean

import torch

from tools.lib import loop
from tools.lib.machine import DTYPES, check_gemm, synchronize

CPU = torch.device("cpu")


def took(function, device, calls=1):
    """Seconds per call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def alternate(ways, device, seconds, limit=lambda: 1.0, least=0.3):
    """{name: function} -> seconds per call and the limit beside it, both as {name: [one value per turn]}.

    `limit` gives a rate; that of a sample is the mean of those right before and right after. `seconds`: of all turns
    for each way, three turns at least. `least`: of a sample; quick functions are called several times in one.
    """
    for function in ways.values():  # compiles, fills caches
        function()
    calls = {name: max(1, math.ceil(least / max(took(f, device), 1e-6))) for name, f in ways.items()}
    times, limits = {name: [] for name in ways}, {name: [] for name in ways}
    start, before, turns = time.perf_counter(), limit(), 0
    while turns < 3 or time.perf_counter() - start < seconds * len(ways):
        for name, function in ways.items():
            times[name].append(took(function, device, calls[name]))
            after = limit()
            limits[name].append((before + after) / 2)
            before = after
        turns += 1
    return times, limits


def ratio(over, under):
    """Mean over turns, without the highest and the lowest."""
    return mean(sorted(a / b for a, b in zip(over, under))[1:-1])


def share_of(limits, work, seconds):
    """What `work` would take at the limits measured beside it, over what it took."""
    return ratio([work / rate for rate in limits], seconds)


def sampled(function, work, device):
    """A function that measures the rate of another, in samples of a tenth of a second."""
    function()  # fills caches and fresh pages
    calls = max(1, math.ceil(0.1 / took(function, device, 2)))
    return lambda: work / took(function, device, calls)


def gemm(device, precision="fp32"):
    """A function that measures TFLOP/s of a square product large enough to show the machine at its best."""
    precision = precision.removesuffix("-stream")
    n = check_gemm(device, precision)["size"]
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision][0])
    return sampled(functools.partial(torch.mm, a, a, out=torch.empty_like(a)), 2 * n**3 / 1e12, device)


def copying():
    """A function that measures GB/s of a copy in main memory, read and written."""
    source = torch.ones(1 << 28, dtype=torch.uint8)  # far beyond any cache
    return sampled(functools.partial(torch.empty_like(source).copy_, source), 2 * len(source) / 1e9, CPU)


class Phases:
    """A clock for train_ssl.one_update: `with phases("student"): ...` notes seconds by name.

    On CUDA by events, so that the host does not wait for the card; elsewhere by the clock on the wall.
    """

    def __init__(self, device):
        self.device, self.marks = device, []

    @contextlib.contextmanager
    def __call__(self, name):
        start = loop.moment(self.device)
        yield
        self.marks.append((name, start, loop.moment(self.device)))

    def seconds(self):
        """{name: seconds}, for after a synchronize."""
        sums = {}
        for name, start, end in self.marks:
            sums[name] = sums.get(name, 0) + loop.seconds_between(start, end)
        return sums


def as_row(setting, value, unit, share=None, limit="", note="", **more):
    """One line of the report: `share` of the limit that is reached; `more` goes to the JSON file alone."""
    return dict(setting=setting, value=value, unit=unit, share=share, limit=limit, note=note, **more)


def peak_gb(device):
    """Most memory taken so far: of the card, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # kB on Linux


def busy_seconds(spans):
    """Length of the union of (begin, end) in seconds: kernels of several streams may run at once."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def idle_share(function, seconds, count):
    """Share of the time in which the card does nothing, while `function` is called in a row and takes `seconds` each.

    What the card is busy is taken from torch's profiler, the time from calls without it, because it slows the host.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            function()
        torch.cuda.synchronize()
    work = [e for e in profile.events() if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    return 1 - busy_seconds((e.time_range.start / 1e6, e.time_range.end / 1e6) for e in work) / (count * seconds)
