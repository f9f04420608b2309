"""The bench measures what train_ssl.py does, in fair turns, and says so when a point dies."""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_classifiers import pictures
from test_data import make_ct
from test_train import golden_step, same, weights

import checkpoint
import data
import losses
import model
import train_ssl as t
from tools import bench
from tools.lib import loop, optim, parts, settings, timing
from tools.lib.cli import ROOT

CPU = torch.device("cpu")
TOY = {
    "arch": "vit_test", "batch-size": 4, "global-size": 32, "local-size": 16, "local-crops": 2, "prototypes": 32,
    "head-hidden": 32, "head-bottleneck": 16, "precision": "fp32", "layerscale": 0.1, "lr": 1e-2, "warmup": 0,
    "freeze-last": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    return make_ct(tmp_path / "data")


def toy_point(folder, *ways, **more):
    return dict(what="step", setting="toy", data=str(folder), flags=TOY, ways=ways or [""], seconds=0, **more)


class Clock:
    """Time that only passes when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    return clock


# turns


def test_ways_take_turns_and_a_machine_that_slows_down_changes_no_ratio(clock):
    order, load = [], [1.0]

    def work(name, seconds):
        order.append(name)
        clock.now += seconds * load[0]

    def limit():
        order.append("l")
        load[0] *= 3 if order.count("l") == 5 else 1  # a neighbour moves in
        return 100 / load[0]

    ways = {"fast": lambda: work("f", 1), "slow": lambda: work("s", 2)}
    times, limits = bench.alternate(ways, CPU, 10, limit)
    assert "".join(order) == "fs" * 2 + "l" + "flsl" * 4  # warm, count, turns until 2 x 10 s are over
    assert times == {"fast": [1, 1, 3, 3], "slow": [2, 2, 6, 6]}
    assert limits["slow"][0] == 100 and limits["slow"][1] == pytest.approx((100 + 100 / 3) / 2)  # before, after
    assert bench.ratio(times["slow"], times["fast"]) == 2
    assert bench.share_of([100, 100, 100 / 3, 100 / 3], 10, times["fast"]) == pytest.approx(0.1)
    assert bench.ratio([2, 4, 6, 60, 2], [1, 2, 2, 2, 4]) == pytest.approx(7 / 3)  # one turn in which a neighbour woke


def test_quick_calls_are_repeated_until_a_sample_is_long_enough(clock):
    def work():
        clock.now += 0.01

    times, _ = bench.alternate({"": work}, CPU, 0, least=0.5)
    assert times[""] == pytest.approx([0.01] * 3) and clock.now == pytest.approx(0.01 * (2 + 3 * 50))
    rate = timing.sampled(work, 3.0, CPU)
    start = clock.now
    assert rate() == pytest.approx(300) and clock.now - start == pytest.approx(0.1)


def test_limits_are_rates_of_this_machine():
    flops, bytes_s = bench.gemm(CPU)(), bench.copying()()
    assert 1e-3 < flops < 50 and 0.1 < bytes_s < 2000  # TFLOP/s and GB/s of anything with a CPU


def test_on_cuda_events_are_used_and_a_sample_waits_for_the_device(clock, monkeypatch):
    waits = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, other):
            assert other in waits, "read before a synchronize"
            return 1e3 * (other.at - self.at)  # ms

    def work():
        clock.now += 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    cuda = torch.device("cuda")
    phases = bench.Phases(cuda)

    def timed(name):
        with phases(name):
            work()

    assert bench.took(lambda: timed("one"), cuda, 3) == 2 and len(waits) == 2
    timed("two")
    assert phases.seconds() == {"one": 6, "two": 2} and bench.peak_gb(cuda) == 3
    assert 0.05 < bench.peak_gb(CPU) < 100


# updates


@pytest.mark.slow
@pytest.mark.parametrize("gram", [False, True])
def test_the_update_is_that_of_train_ssl_to_the_bit(folder, tmp_path, gram):
    flags = TOY | {"steps": 1, "micro-batch": 2, "koleo-group": 2, "gram-start": 0}
    words = [f"--{k}={v}" for k, v in flags.items()] + ["--gram-weight=0"] * (not gram)
    words += f"--data {folder} --out {tmp_path / 'run'} --no-split --workers 0 --eval-every 0 --device cpu".split()
    assert t.main(words) == 0
    trained = {k: v for k, v in weights(tmp_path / "run").items() if k.startswith(("student", "teacher"))}
    args = bench.train_args(toy_point(folder, gram=gram, more="--steps 1"), "accumulate 2")
    way = bench.make_way(bench.make_run(args, CPU))
    assert (way.run.gram is not None) == gram and way.now.gram == 2 * gram
    before = checkpoint.pack_weights(way.run.student, torch.clone)
    bench.update(way)
    ours = {f"student.{k}": v for k, v in checkpoint.pack_weights(way.run.student).items()}
    same(ours | {f"teacher.{k}": v for k, v in checkpoint.pack_weights(way.run.teacher).items()}, trained)
    assert any(not torch.equal(v, ours[f"student.{k}"]) for k, v in before.items())


def test_what_is_compiled_outlives_the_run_and_tmp(tmp_path):
    """In a process of its own: torch sets the variable itself as soon as its compiler is imported."""
    code = "import train_ssl, torch._dynamo, os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "torchinductor"), done.stderr


@torch._dynamo.config.patch(recompile_limit=8)  # beyond which torch goes on uncompiled; monkeypatch would delete it
def test_a_way_is_what_its_name_says(folder, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: compiled.append(block))
    plain = bench.make_run(bench.train_args(toy_point(folder), ""), CPU)
    assert plain.args.micro_batch == 4 and not plain.student.backbone.checkpointing and not compiled
    args = bench.train_args(toy_point(folder), "accumulate 4")
    assert args.micro_batch == args.koleo_group == 1 and args.batch_size == 4
    fast = bench.make_run(bench.train_args(toy_point(folder), "compile checkpointing"), CPU)
    assert fast.student.backbone.checkpointing and {*compiled} >= {*fast.student.backbone.blocks[:-1]}
    assert torch._dynamo.config.recompile_limit >= 64  # four --sizes, three networks, with and without gradients


def test_an_update_that_is_not_finite_is_no_measurement(folder):
    way = bench.make_way(bench.make_run(bench.train_args(toy_point(folder), ""), CPU))
    next(way.run.student.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite: measure with other --flags"):
        bench.update(way)


@pytest.mark.slow
def test_rows_of_a_step_hold_rate_limit_and_phases(folder, monkeypatch):
    slow, losses_of, offered, counts = optim.update_teacher, t.ssl_update, set(), []

    def ema(*args):
        time.sleep(1)
        slow(*args)

    def counting(student, teacher, gram, micro_batches, *more):
        counts.append(len(micro_batches))
        return losses_of(student, teacher, gram, micro_batches, *more)

    @contextlib.contextmanager
    def listening(phases, name, timed=bench.Phases.__call__):
        offered.add(name)
        with timed(phases, name):
            yield

    monkeypatch.setattr(optim, "update_teacher", ema)
    monkeypatch.setattr(t, "ssl_update", counting)
    monkeypatch.setattr(bench.Phases, "__call__", listening)
    monkeypatch.setattr(bench, "gemm", lambda device, precision: lambda: 0.5)
    monkeypatch.setattr(bench.math, "ceil", lambda x: 1)  # one call per sample
    plain, split = bench.measure_step(toy_point(folder, "", "accumulate 4", gram=True), CPU)
    assert max(plain["phases"], key=plain["phases"].get) == "ema" and sum(plain["phases"].values()) == pytest.approx(1)
    assert 0 < plain["phases"]["other"] < 0.3 < plain["phases"]["ema"]
    assert 0 < plain["host_ms"] < 1e3 * plain["seconds"][0] and "idle" not in plain and "compile_s" not in plain
    assert set(plain["phases"]) == offered | {"other"} and {"read", "render", "gram", "backward"} < offered
    seconds = sorted(plain["seconds"])
    assert plain["value"] == pytest.approx(4 / seconds[1]) and min(seconds) > 1 and len(seconds) == 3
    assert plain["share"] == pytest.approx(plain["tflop"] / np.median(seconds) / 0.5)
    assert set(counts) == {1, 4}  # micro-batches of an update
    assert split["gain"] == pytest.approx(bench.ratio(plain["seconds"], split["seconds"]))
    json.dumps([plain, split])


@pytest.mark.slow
def test_a_child_prints_rows_and_one_that_dies_is_a_row_that_says_why(folder, monkeypatch):
    point = dict(what="read", setting="toy", device="cpu", data=str(folder), workers=0, seconds=0)
    (row,) = bench.run_point(point)
    assert row["what"] == "read" and row["unit"] == "slices/s" and row["value"] > 0
    (row,) = bench.run_point(point | {"data": str(folder / "nowhere")})
    assert "exit code 2" in row["error"] and "nowhere is not a folder" in row["error"] and row["setting"] == "toy"
    monkeypatch.setattr(bench, "PATIENCE_S", 0.01)
    assert bench.run_point(point)[0]["error"] == "no answer in 0.01 s"


class Card:
    """A simulated one: time passes on it for kernels that are asked for, and on the host for everything else."""

    def __init__(self, kernels):
        self.events = [self.event(*kernel) for kernel in kernels]

    def event(self, begin, end, kind="CUDA", **more):
        span = types.SimpleNamespace(start=1e6 * begin, end=1e6 * end)
        return types.SimpleNamespace(device_type=types.SimpleNamespace(name=kind), time_range=span, **more)

    def profile(self, **_):
        return contextlib.nullcontext(types.SimpleNamespace(events=lambda: self.events))


def test_a_card_is_idle_where_no_kernel_of_any_stream_runs(monkeypatch):
    card = Card([(0.5, 1), (0, 0.2), (0.9, 1.4), (0.95, 1.0), (1.1, 1.2)])  # two streams: 0.2 and 0.9 seconds
    card.events += [card.event(0, 9, "CPU"), card.event(0, 9, is_user_annotation=True)]
    calls = []
    monkeypatch.setattr(torch.profiler, "profile", card.profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.idle_share(lambda: calls.append(1), 1.1, 2) == pytest.approx(1 - 1.1 / 2.2) and len(calls) == 2
    assert timing.busy_seconds([]) == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_time_of_the_host_is_all_but_the_wait_for_a_card(kind, clock, monkeypatch):
    """The host takes 20 ms to prepare and 40 ms to ask for work, and waits 80 ms for the card."""
    watch = clock

    def one_update(run, micro_batches, now, ahead, clock):
        with clock("student"):
            watch.now += 0.04
        with clock("wait"):
            watch.now += 0.08
        return types.SimpleNamespace(bad=False)

    def take(clock):
        with clock("read"), clock("render"):
            watch.now += 0.01
        return None, None

    monkeypatch.setattr(t, "one_update", one_update)
    upcoming = types.SimpleNamespace(take=take, ahead=lambda clock: None)
    run = types.SimpleNamespace(device=torch.device(kind))
    took = bench.host_seconds(bench.Way(run, upcoming, None), 3)
    low = 0.02 if kind == "cpu" else 0.05  # read and render are one and the same here
    assert took == pytest.approx(low)


def test_views_of_one_update_are_counted():
    crops = data.Crops(torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 2, 2), None)
    assert bench.crops_gb([t.Micro(crops, None, None)] * 2) == pytest.approx(2 * 4 * (96 + 60) / 1e9)


def test_out_of_memory_is_an_answer_and_other_errors_are_not(monkeypatch):
    def fail(error):
        def measure(point, device):
            raise error

        monkeypatch.setitem(bench.MEASURES, "step", measure)
        return bench.measure(dict(what="step", device="cpu"))

    refused = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(refused), MemoryError()):
        assert fail(error) == [{"error": "does not fit in memory"}]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fail(RuntimeError("mat1 and mat2 shapes"))


def test_a_sweep_doubles_until_it_does_not_fit_and_names_the_best_flags(monkeypatch):
    seen = []

    def run_point(point):
        size, way = point["flags"]["batch-size"], point["ways"][0]
        seen.append((way, size))
        facts = dict(what="sweep", setting=point["setting"], device="cpu")
        if size > (16 if way else 4):
            return [facts | {"error": "does not fit in memory"}]
        value = size - (size == 16) * 10.0
        return [facts | bench.as_row("x", value, "images/s", value / 100, way=way, flags=point["flags"])]

    monkeypatch.setattr(bench, "run_point", run_point)
    args = bench.build_parser().parse_args(["sweep", "--arch", "vit_test", "--precision", "fp32"])
    points = [p for p in bench.points_of("sweep", args, False, "") if p["ways"][0] in ("", "checkpointing")]
    rows = bench.measure_all(points, 16)
    assert seen == [("", 1), ("", 2), ("", 4), ("", 8)] + [("checkpointing", s) for s in (1, 2, 4, 8, 16)]
    assert "batch 8 fp32" in rows[3]["setting"]
    (line,) = bench.advice(rows, 8 * 86400 * 5)
    flags, rest = line.split(": ")
    assert flags == "--arch vit_test --micro-batch 8 --koleo-group 8 --checkpointing" and rest.startswith("8 images/s")
    assert line.endswith("in 5 days")
    words = ["--data", "x", "--batch-size", "128", *flags.split()]
    assert settings.resolve(t.build_parser().parse_args(words), 1).micro_batch == 8  # training takes what is advised


def test_bf16_is_measured_only_where_the_cpu_has_it(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("flags : avx2 fma")
    assert bench.precisions_of(False, info) == ["fp32"] == bench.precisions_of(False, tmp_path / "none")
    info.write_text("flags : avx512f avx512_bf16")
    assert bench.precisions_of(False, info) == ["fp32", "bf16"] and bench.precisions_of(True, info) == ["bf16"]


# golden numbers with every speed flag on


@pytest.mark.parametrize(
    "flag", ["checkpointing", "chunked", "bf16", "bf16-stream", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_the_golden_step_holds_with_every_speed_flag(flag, monkeypatch):
    student, teacher, gram, micro, g, meta = golden_step()
    w = t.Weights(teacher_temp=meta["teacher_temp"], gram=2.0, koleo_group=4)
    loss, gradient = 1e-4, dict(rtol=1e-3, atol=1e-5)
    if flag == "compile":
        w, flags = w._replace(compiled=True), argparse.Namespace(compile=True, precision="fp32", fsdp=False)
        loop.on_device(flags, student, (student, teacher, gram), 1, torch.device("cpu"), whole=True)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        student.ibot_head.bottleneck(torch.randn(3, student.backbone.dim))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1  # else it stayed as it was
    student.backbone.checkpointing = flag == "checkpointing"
    if flag == "chunked":
        monkeypatch.setattr(losses, "CHUNK", 100)  # one or two rows at a time
    if flag.startswith("bf16"):  # 8 bits of mantissa: 2**-9 for each rounding, and a few in a row
        w, loss, gradient = w._replace(precision=flag), 2e-2, None
        for vit in (student.backbone, teacher.backbone, gram):
            vit.stream = torch.bfloat16 if flag == "bf16-stream" else None
    sums, _ = t.ssl_update(student, teacher, gram, [micro], w)
    assert sums["loss"].item() == pytest.approx(meta["total_loss"], rel=loss)
    expected = {k[5:]: v for k, v in g.items() if k.startswith("grad.backbone.blocks.") and "bias_mask" not in k}
    assert expected
    own = dict(student.named_parameters())
    for name, value in expected.items():
        if gradient:
            torch.testing.assert_close(own[name].grad, value, **gradient, msg=lambda s: f"{name}: {s}")
        elif value.norm() > 1e-4:
            assert torch.cosine_similarity(own[name].grad.flatten(), value.flatten(), 0) > 0.98, name


# the other parts


@pytest.mark.parametrize("encoding", ["rgb-v1", "hu16-v1"])
def test_pillow_does_the_same_job(tmp_path, encoding):
    source = data.open_source(make_ct(tmp_path, encoding, series=2, size=64))
    smooth = torch.linspace(0, 250, 64)[None, None, :, None] + torch.linspace(0, 5, 64)
    images = smooth.expand(2, 3, 64, 64).to(source.read(0).dtype)
    recipe = data.Recipe("ct", global_size=32, local_size=16, local_crops=2, blur=(0, 0, 0))
    plan = data.place(data.plan(0, 0, range(2), recipe), [(64, 64)] * 2)
    if encoding == "rgb-v1":
        pictures = [[Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())] for x in images]
    else:
        pictures = [[Image.fromarray(c) for c in x.float().numpy()] for x in images]
    ours, theirs = data.render(images, plan), parts.pillow_render(pictures, images.dtype, plan)
    for a, b in zip(ours[:2], theirs[:2]):  # 8 bits: Pillow rounds each of two passes to a code; contrast up to 1.2
        limit = 1.3 / 255 / min(data.STD) if encoding == "rgb-v1" else 1e-4
        assert (a - b).abs().max() < limit and a.std() > 0.1


@pytest.mark.slow
def test_every_other_part_runs_on_a_toy_and_gives_numbers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "gemm", lambda device: lambda: 0.05)
    monkeypatch.setattr(parts, "copying", lambda: lambda: 10.0)
    monkeypatch.setattr(parts, "alternate", functools.partial(timing.alternate, least=0))
    point = dict(setting="toy", data=str(folder), seconds=0)
    (render,) = parts.measure_render(point, CPU)
    assert 0 < render["share"] < 5 and "x Pillow" in render["note"]
    assert render["value"] == pytest.approx(8 / np.median(render["seconds"]["ours"]))
    (read,) = parts.measure_read(point | {"workers": 1}, CPU)
    gb_s = 16 * 2 * 3 * 48 * 48 * 2 / 1e9 / np.median(read["seconds"])
    assert read["share"] == pytest.approx(gb_s / 10) and read["value"] == pytest.approx(16 / np.median(read["seconds"]))
    (save,) = bench.measure_save(toy_point(folder), CPU)
    assert 0 < save["value"] < 1e4 and len(save["seconds"]) == len(save["writes"]) == 4
    json.dumps([render, read, save])


def test_adapters_take_turns_with_lora_as_two_thin_products(monkeypatch):
    monkeypatch.setattr(parts, "alternate", functools.partial(timing.alternate, least=0))
    point = dict(setting="toy", arch="vit_test", batch=2, size=32, rank=4, targets="all", seconds=0)
    rows = parts.measure_adapters(json.loads(json.dumps(point)), CPU)
    assert [row["way"] for row in rows] == ["thin", *model.ADAPTER_NORMS] and rows[0]["factor"] == 1
    assert all(f"{row['factor']:.3f} x the time of LoRA" in row["note"] for row in rows[1:])
    json.dumps(rows)
    vit = model.build_vit("vit_test")
    model.add_adapters(vit, 4, 8, "lora", "q v mlp")
    for layer in model.adapted_layers(vit).values():  # the other way is the same arithmetic
        torch.nn.init.normal_(layer.lora_b)
        x = torch.randn(5, layer.in_features)
        found = [torch.autograd.grad(y.square().sum(), [layer.lora_a, layer.lora_b])
                 for y in (layer(x), parts.thin_products(layer, x))]  # fmt: skip
        torch.testing.assert_close(layer(x), parts.thin_products(layer, x))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_pruning_after_the_backbone_saves_nothing_of_it_and_choosing_before_it_does(monkeypatch):
    monkeypatch.setattr(parts, "alternate", functools.partial(timing.alternate, least=0))
    point = dict(setting="toy", arch="vit_test", batch=2, size=32, seconds=0)
    rows = {row["way"]: row for row in parts.measure_fusion(json.loads(json.dumps(point)), CPU)}
    assert list(rows) == list(parts.FUSED) and all(row["value"] > 0 for row in rows.values())
    one, ten, twelve, after, before = (row["flops"] / rows["1 view"]["flops"] for row in rows.values())
    assert one == 1 and ten == pytest.approx(10, rel=0.01) and twelve == pytest.approx(12, rel=0.01)
    assert after >= twelve and before == pytest.approx(8, rel=0.02)
    json.dumps(list(rows.values()))


@pytest.mark.parametrize("workers", [0, 2])
def test_slices_per_second_are_those_of_reading_not_of_what_was_read_ahead(folder, clock, monkeypatch, workers):
    def make_loader(*_, **__):
        while True:
            clock.now += 0.1
            yield

    monkeypatch.setattr(bench.data, "make_loader", make_loader)
    monkeypatch.setattr(parts, "copying", lambda: lambda: 10.0)
    (read,) = parts.measure_read(dict(setting="toy", data=str(folder), seconds=0, workers=workers), CPU)
    assert read["value"] == pytest.approx(16 / 0.1)


def test_slices_per_second_of_preprocessing_leave_out_what_starting_takes(tmp_path, clock, monkeypatch):
    for name, count in (("few", 3), ("many", 13)):
        (tmp_path / name / "series").mkdir(parents=True)
        for k in range(count):
            (tmp_path / name / "series" / f"{k}.dcm").touch()

    def preprocess(raw, encoding):
        clock.now += 7 + (0.5 if encoding == "rgb" else 0.25) * len(list(Path(raw).rglob("*.dcm")))

    class Slice:
        @property
        def pixel_array(self):
            clock.now += 0.05

    monkeypatch.setattr(parts, "preprocess", preprocess)
    monkeypatch.setattr(parts.pydicom, "dcmread", lambda file: Slice())
    point = dict(setting="toy", few=str(tmp_path / "few"), many=str(tmp_path / "many"), seconds=0)
    rgb, hu16 = parts.measure_dicom(point, CPU)
    assert rgb["value"] == pytest.approx(2) and hu16["value"] == pytest.approx(4)
    assert rgb["share"] == pytest.approx(0.1) and hu16["share"] == pytest.approx(0.2)


@pytest.mark.slow
def test_preprocessing_that_fails_is_an_error_with_its_words(tmp_path):
    with pytest.raises(ValueError, match="exit code 2: .*nowhere"):
        parts.preprocess(str(tmp_path / "nowhere"), "rgb")


# points and tables


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_every_point_can_be_measured(folder, cuda, quick):
    args = bench.build_parser().parse_args(["all"] + ["--quick"] * quick)
    assert {*bench.MEASURES, "all", "show"} == set(bench.build_parser()._actions[1].choices)
    for what in bench.MEASURES:
        points = list(bench.points_of(what, args, cuda, str(folder)))
        assert points
        for point in points:
            point = json.loads(json.dumps(dict(what=what) | point))
            assert point["what"] in bench.MEASURES and point["setting"]
            for way in point.get("ways", ()):
                a = bench.train_args(point, way)
                usual = 8192 if point["what"] == "sweep" else 65536  # of training by default; of the published recipe
                assert a.prototypes == (4096 if quick else usual) and a.drop_path == 0 and a.local_crops == 8
                assert a.global_size % 16 == a.local_size % 16 == 0
                assert bool(a.gram_weight) == point.get("gram", False)
    steps = [(p["flags"]["arch"], p["flags"]["precision"]) for p in bench.points_of("step", args, cuda, "")]
    assert ("vit_large", "bf16") in steps if cuda and not quick else ("vit_tiny" if quick else "vit_small") in steps[0]


@pytest.mark.parametrize("batch, ways", [(1, [""]), (2, ["", "accumulate 2"]), (6, ["", "accumulate 2"]),
                                         (8, ["", "accumulate 2", "accumulate 4"])])  # fmt: skip
def test_a_batch_is_cut_only_into_equal_parts(folder, batch, ways):
    args = bench.build_parser().parse_args(["step", "--quick", "--batch-size", str(batch)])
    point = next(bench.points_of("step", args, False, str(folder)))
    assert point["ways"] == ways
    for way in ways:
        found = bench.train_args(point, way)
        assert found.micro_batch * bench.pieces(way) == found.batch_size == batch


def test_groups_of_koleo_divide_any_micro_batch():
    assert [bench.koleo_group(n) for n in (1, 2, 3, 6, 16, 17, 24, 34, 64, 100)] == [1, 2, 3, 6, 16, 17, 12, 2, 16, 10]


def test_the_saved_results_can_be_shown(capsys):
    assert list(bench.RESULTS.glob("*.json")) and bench.main(["show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for what in bench.MEASURES:
        assert any(line.startswith(f"{what} ") for line in lines), what
    known = {*bench.MEASURES, "what"}
    assert all(line.split()[0] in known or "threads" in line for line in lines if line), "rows that nothing measures"


def test_a_report_is_readable_in_both_forms(monkeypatch, tmp_path, capsys):
    rows = [dict(what="step", device="cpu", **bench.as_row("vit | test", 1.234, "images/s", 0.756, "GEMM", "fast"))]
    rows += [dict(what="step", device="cpu", setting="vit_giant", error="does not fit in memory")]
    rows += [dict(what="read", device="cpu", **bench.as_row("hu16", 1118.8, "slices/s"))]
    machine = dict(device="cpu", cpu="Toy 3000", name="toy", torch="2.13", threads=2)
    report = dict(version=1, date="2026-11-21", commit="abc", quick=True, machine=machine, rows=rows)
    (tmp_path / "cpu.json").write_text(json.dumps(report))
    (tmp_path / "more.json").write_text(json.dumps(report | {"machine": machine | {"device": "cuda", "name": "H200"}}))
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert bench.main(["show", "--markdown"]) == 0
    cpu, gpu = capsys.readouterr().out.split("H200")
    assert "Toy 3000, 2 threads, torch 2.13, commit abc, 2026-11-21 (--quick: toy sizes)" in cpu
    assert "| read | hu16 | 1,119 slices/s |  |  |" in cpu
    assert "1.23 images/s | 76% of GEMM | fast |" in cpu and "vit_giant | does not fit in memory" in cpu
    widths = {line.replace(r"\|", "").count("|") for line in cpu.splitlines() if line.startswith("|")}
    assert widths == {6}
    assert bench.main(["show"]) == 0 and "|" not in capsys.readouterr().out.replace("vit | test", "")


def test_all_of_a_part_from_the_command_to_the_file(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(bench, "make_data", lambda work, quick: made.append(quick))
    monkeypatch.setattr(bench, "run_point", lambda p: [
        {k: p[k] for k in ("what", "setting", "device")} | bench.as_row(p["setting"], 2, "slices/s")])  # fmt: skip
    assert bench.main(["read", "--quick", "--device", "cpu", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert made == [True] and report["machine"]["threads"] and report["version"] == 1 and len(report["rows"]) == 6
    assert capsys.readouterr().out.count("2 slices/s") == 6
    monkeypatch.setattr(bench, "run_point", lambda p: [dict(what="read", setting="x", device="cpu", error="killed")])
    assert bench.main(["read", "--quick", "--device", "cpu"]) == 1
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda"):
            bench.main(["read", "--device", "cuda"])


@pytest.mark.proof
def test_the_real_thing_end_to_end(tmp_path, capsys):
    for what in ("dicom", "render"):
        assert bench.main([what, "--quick", "--seconds", "1", "--json", str(tmp_path / f"{what}.json")]) == 0
    printed = capsys.readouterr().out
    assert "to hu16" in printed and "x Pillow" in printed


@pytest.mark.slow
def test_the_index_of_the_bench_opens_from_its_columns(monkeypatch):
    """From the second time on faster than from the CSV; memory is that of the process itself."""
    (row,) = parts.measure_index({"rows": 100_000, "setting": "open"}, CPU)
    (first, *_), *later = row["all"]
    assert len(later) == 3 and max(opened for opened, *_ in later) < first / 3
    assert row["value"] == pytest.approx(1e3 * sorted(opened for opened, *_ in later)[1])
    for opened, seconds, before, after, peak in row["all"]:
        assert 0 < opened <= seconds and 0 < before <= after + 1 and after < peak + 1


def test_predict_tells_latency_and_rate_of_each_layout(tmp_path, monkeypatch):
    pictures(tmp_path / "photos", 3)
    point = dict(arch="vit_test", size=32, data=str(tmp_path / "photos"), seconds=0.2, setting="s")
    asked, ask = {}, parts.logits_of

    def counting(net, source, idx, layout, **how):  # views that the model saw of one picture, for each layout
        hook = net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        sizes = asked.setdefault(layout, []) if len(idx) == 1 else []
        done = ask(net, source, idx, layout=layout, **how)
        hook.remove()
        return done

    monkeypatch.setattr(parts, "logits_of", counting)
    rows = parts.measure_predict(json.loads(json.dumps(point)), CPU)
    assert [row["setting"] for row in rows] == ["s, 1 views", "s, 10 views", "s, 12 views"]
    for row in rows:
        assert 0 < row["value"] <= row["p95"] and row["unit"] == "ms" and len(row["seconds"]["one"]) >= 3
        assert row["rate"] == pytest.approx(3 / np.median(row["seconds"]["all"]))
    assert {name: {*sizes} for name, sizes in asked.items()} == {"whole": {1}, "tiles": {10}, "tiles_and_squares": {12}}
