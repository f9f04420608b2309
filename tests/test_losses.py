"""The objectives against recorded vectors, slow loops, invariances and planted collapses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
from losses import dino_loss, gram_loss, health, ibot_loss, koleo_loss, sinkhorn, softmax_center

GOLDEN = Path(__file__).parent / "golden"
VALUE = {"atol": 2e-5, "rtol": 1e-4}  # the tolerances that golden/README.md suggests
GRAD = {"atol": 1e-5, "rtol": 1e-3}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "04_losses.safetensors")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def value_and_grad(loss, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, x)[0]


def probabilities(*shape, dtype=torch.float32):
    return torch.softmax(2 * torch.randn(shape, dtype=dtype), -1)


# Recorded vectors.


@pytest.mark.parametrize("temperature, iterations", [(0.04, 1), (0.04, 3), (0.07, 1), (0.07, 3)])
def test_sinkhorn_of_cls_tokens_matches_golden(golden, temperature, iterations):
    got = sinkhorn(golden["dino.teacher_logits"], temperature, iterations)
    assert_close(got, golden[f"dino.sinkhorn_temp{temperature}_it{iterations}"], **VALUE)


@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_sinkhorn_of_masked_tokens_matches_golden(golden, temperature):
    got = sinkhorn(golden["ibot.teacher_logits"], temperature)
    assert_close(got, golden[f"ibot.sinkhorn_temp{temperature}_it3"], **VALUE)


def test_softmax_center_matches_golden(golden):
    for name in ("dino", "ibot"):
        logits, center = golden[f"{name}.teacher_logits"], golden[f"{name}.center_before"].flatten()
        before, moved = softmax_center(logits, center, 0.07)
        after, _ = softmax_center(logits, moved, 0.07)
        if name == "dino":
            assert_close(before, golden["dino.softmax_center_temp0.07_before_update"], **VALUE)
        assert_close(moved, golden[f"{name}.center_after"].flatten(), **VALUE)
        assert_close(after, golden[f"{name}.softmax_center_temp0.07_after_update"].view_as(after), **VALUE)


@pytest.mark.parametrize(
    "name, crops, diagonal",
    [("global_ignore_diag", "global", True), ("global_all", "global", False), ("local", "local", False)],
)
def test_dino_matches_golden(golden, name, crops, diagonal):
    student, probs = golden[f"dino.student_{crops}"], golden["dino.teacher_probs"]
    loss, grad = value_and_grad(dino_loss, student, probs, 0.1, ignore_diagonal=diagonal)
    assert_close(loss, golden[f"dino.{name}.loss"], **VALUE)
    assert_close(grad, golden[f"dino.{name}.grad_student"], **GRAD)


def test_ibot_matches_golden(golden):
    probs, weights = golden["ibot.sinkhorn_temp0.07_it3"], golden["ibot.masks_weight"]
    loss, grad = value_and_grad(ibot_loss, golden["ibot.student_logits"], probs, weights, crops=8)
    assert_close(loss, golden["ibot.loss"], **VALUE)
    assert_close(grad, golden["ibot.grad_student"], **GRAD)


@pytest.mark.parametrize("name", ["local", "distributed_topk1"])
def test_koleo_matches_golden(golden, name):
    loss, grad = value_and_grad(koleo_loss, golden["koleo.input"])
    assert_close(loss, golden[f"koleo.{name}.loss"], **VALUE)
    assert_close(grad, golden[f"koleo.{name}.grad"], **GRAD)


@pytest.mark.parametrize("scope", ["img", "batch"])
@pytest.mark.parametrize(
    "name, negatives",
    [
        ("norm.keep", "keep"),
        ("norm.remove_neg", "clip"),
        ("norm.remove_only_teacher_neg", "clip_teacher"),
        ("nonorm.keep", "keep"),
    ],
)
def test_gram_matches_golden(golden, name, negatives, scope):
    of_tokens = losses.gram_distance if name.startswith("nonorm") else gram_loss
    student, teacher = golden["gram.student"], golden["gram.teacher"]
    loss, grad = value_and_grad(of_tokens, student, teacher, scope == "img", negatives)
    assert_close(loss, golden[f"gram.{name}.{scope}.loss"], **VALUE)
    assert_close(grad, golden[f"gram.{name}.{scope}.grad_student"], **GRAD)


def head(x, weights, name):
    """The recorded projection head of `name`, from its parameters."""
    for layer in (0, 2, 4):
        x = F.linear(x, weights[f"student.{name}.mlp.{layer}.weight"], weights[f"student.{name}.mlp.{layer}.bias"])
        x = F.gelu(x) if layer < 4 else F.normalize(x, dim=-1)
    return F.linear(x, weights[f"student.{name}.last_layer.weight"])


def test_losses_of_a_whole_step_match_golden():
    """From the recorded tokens, through the heads; the gradient of the norm that made them checks every loss."""
    step = load_file(GOLDEN / "08_full_step_a.safetensors")
    weights = load_file(GOLDEN / "08_full_step_a_weights.safetensors")
    recorded = json.loads((GOLDEN / "08_full_step_a.json").read_text())
    of_heads = {k: v.requires_grad_() for k, v in weights.items() if k.startswith("student.") and "_head." in k}
    names = ["mid.student_global.cls_pre_head", "mid.student_local.cls_pre_head", "mid.gram.student_patches"]
    big, small, patches = tokens = [step[name].requires_grad_() for name in names]
    masked = patches.flatten(0, 1)[step["batch.mask_indices_list"]]

    probs = sinkhorn(step["mid.teacher.cls_after_head"].flatten(0, 1), 0.06).unflatten(0, (2, 4))
    assert_close(probs, step["mid.teacher.cls_centered"], **VALUE)
    patch_probs = step["mid.teacher.masked_patch_centered"]
    got = {
        "dino_global_crops_loss": dino_loss(head(big, weights, "dino_head"), probs, ignore_diagonal=True),
        "dino_local_crops_loss": dino_loss(head(small, weights, "dino_head"), probs),
        "ibot_loss": ibot_loss(head(masked, weights, "ibot_head"), patch_probs, step["batch.masks_weight"], 8),
        "koleo_loss": (koleo_loss(big[0]) + koleo_loss(big[1])) / 2,
        "gram_loss": gram_loss(patches, step["mid.gram.teacher_patches"]),
    }
    for name, loss in got.items():
        assert_close(loss.item(), recorded["metrics"][name], **VALUE, msg=lambda text, name=name: f"{name}: {text}")
    dino_global, dino_local, ibot, koleo, gram = got.values()
    total = dino_local * 6 / 8 + dino_global * 2 / 8 + ibot + 0.1 * 2 * koleo + 2.0 * gram
    assert_close(total.detach(), step["out.total_loss"], **VALUE)

    total.backward()
    for name, parameter in of_heads.items():
        name = name.removeprefix("student.")
        assert_close(parameter.grad.norm().item(), recorded["grad_norm_per_param"][name], **GRAD)
        if f"grad.{name}" in step:
            assert_close(parameter.grad, step[f"grad.{name}"], **GRAD)
    scale, shift = weights["student.backbone.norm.weight"], weights["student.backbone.norm.bias"]
    assert_close(sum(t.grad.flatten(0, 1).sum(0) for t in tokens), step["grad.backbone.norm.bias"], **GRAD)
    to_scale = sum((t.grad * (t.detach() - shift) / scale).flatten(0, 1).sum(0) for t in tokens)
    assert_close(to_scale, step["grad.backbone.norm.weight"], **GRAD)


# Sinkhorn.


def slow_sinkhorn(logits, temperature, iterations):
    """The textbook, one number at a time, in float64."""
    q = [[math.exp(v / temperature) for v in row] for row in logits.double().tolist()]
    for _ in range(iterations):
        for k in range(len(q[0])):
            mass = sum(row[k] for row in q)
            for row in q:
                row[k] /= mass * len(q[0])
        for row in q:
            mass = sum(row)
            row[:] = [v / (mass * len(q)) for v in row]
    return torch.tensor(q) * len(q)


def test_sinkhorn_matches_a_slow_loop(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 15)  # three rows at a time
    logits = torch.randn(7, 5)
    before = logits.clone()
    for iterations in (1, 3):
        assert_close(sinkhorn(logits, 0.3, iterations), slow_sinkhorn(logits, 0.3, iterations).float())
    assert torch.equal(logits, before)


def test_sinkhorn_balances_rows_and_prototypes():
    probs = sinkhorn(torch.randn(64, 16).double(), 0.2, iterations=200)
    assert_close(probs.sum(1), torch.ones(64).double())
    assert_close(probs.sum(0), torch.full((16,), 64 / 16).double())


def test_sinkhorn_balances_over_all_rows_it_gets():
    logits = torch.randn(12, 8)
    apart = torch.cat([sinkhorn(part, 0.1) for part in logits.split(4)])
    assert (sinkhorn(logits, 0.1) - apart).abs().max() > 0.05


def test_sinkhorn_does_not_see_a_common_offset_of_1e4():
    logits = (torch.randn(32, 16) * 64).round() / 64  # so that logits, offset and temperature are exact in float32
    assert_close(sinkhorn(logits + 1e4, 1 / 16), sinkhorn(logits, 1 / 16), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "logits",
    [
        1e4 * torch.randn(16, 32),
        torch.linspace(-1e4, 1e4, 48).view(6, 8),
        3 * torch.randn(256, 32),  # exp(logits / 0.04 - max) underflows whole rows here
        torch.ones(5, 8),
        torch.randn(1, 8),
        torch.randn(4, 1),
        torch.randn(6, 8).bfloat16(),
        torch.randn(0, 8),
    ],
    ids=["1e4", "ramp", "std3", "identical", "one-row", "K1", "bf16", "no-rows"],
)
def test_sinkhorn_is_finite_and_rows_sum_to_one(logits):
    probs = sinkhorn(logits, 0.04)
    assert probs.dtype == torch.float32 and probs.shape == logits.shape
    assert_close(probs.sum(1), torch.ones(len(logits)), atol=1e-5, rtol=0)
    assert (probs >= 0).all()


class Allocations(TorchDispatchMode):
    """Every storage that an operation returned, kept alive so that addresses are not reused."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return out

    def numels(self):
        return [storage.nbytes() // 4 for storage in self.storages.values()]  # float32


def test_sinkhorn_works_on_one_copy(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 64 * 4)
    logits = torch.randn(64, 64)
    with Allocations() as memory:
        sinkhorn(logits, 0.1)
    large = [n for n in memory.numels() if n > 64 * 16]  # 16 chunks leave one row each
    assert sorted(large) == [64 * 64] * 2  # views of what was given, and the result


def test_targets_of_micro_batches_are_those_of_the_batch():
    logits, centers = torch.randn(9, 6), {"a": torch.randn(6)}
    before = centers["a"].clone()
    expected = {
        "sinkhorn": sinkhorn(logits, 0.07),
        "none": torch.softmax(logits / 0.07, 1),
        "softmax": softmax_center(logits, before, 0.07)[0],
    }
    for centering, probs in expected.items():
        kept = centers if centering == "softmax" else None
        parts = losses.centred(logits.split([4, 0, 5]), centering, 0.07, kept, "a")
        assert [len(p.logits) for p in parts] == [4, 0, 5]
        assert_close(torch.cat([p.probabilities() for p in parts]), probs)
    assert_close(centers["a"], softmax_center(logits, before, 0.07)[1])


# From what goes into the last layer.


def head_inputs(images=3, local=2, masked=7, dim=6, K=10, dtype=torch.float32):
    """Student inputs of both heads, a last layer, teacher logits of cls tokens and of masked patches, mask weights."""
    wanted = ((2 + local) * images, dim), (masked, dim), (K, dim), (2 * images, K), (masked, K)
    cls, patches, weight, *logits = (torch.randn(shape, dtype=dtype) for shape in wanted)
    return [t.requires_grad_() for t in (cls, patches, weight)], logits, torch.rand(masked, dtype=dtype)


def plain_losses(inputs, logits, mask_weights, images=3, weights=(1.0, 1.0)):
    """Losses by the functions that take whole logits and targets, of one backward pass -> values and gradients."""
    cls, patches, weight = inputs
    big, small = F.linear(cls, weight).split([2 * images, len(cls) - 2 * images])
    probs = sinkhorn(logits[0], 0.06).unflatten(0, (2, images))
    local = small.unflatten(0, (-1, images))
    own = dino_loss(big.unflatten(0, (2, images)), probs, ignore_diagonal=True)
    others = dino_loss(local, probs)
    dino = (2 * own + 2 * len(local) * others) / (2 + 2 * len(local))
    targets = sinkhorn(logits[1], 0.06)
    ibot = ibot_loss(F.linear(patches, weight), targets, mask_weights, 2 * images)
    grads = torch.autograd.grad(weights[0] * dino + weights[1] * ibot, inputs)
    entropies = (
        losses.entropy(probs.flatten(0, 1)).mean(),
        (losses.entropy(targets) * mask_weights).sum() / (2 * images),
    )
    return (dino, own, others, ibot, *entropies), grads


@pytest.mark.parametrize("count, most", [(0, 8), (1, 8), (7, 8), (8, 8), (45, 16), (100, 51), (3, 1)])
def test_compiled_chunks_hold_every_row_once_and_have_two_sizes(monkeypatch, count, most):
    """What is compiled for one size is compiled anew for every other: rows that vary are left to the plain function."""
    monkeypatch.setattr(losses, "compile_once", lambda function: "fast")
    for compiled in (False, True):
        parts = list(losses.by_chunk("plain", count, most, compiled))
        rows = [row for at, _ in parts for row in range(count)[at]]
        assert rows == list(range(count)) and parts
        sizes = {at.stop - at.start for at, function in parts if function == "fast"}
        assert sizes <= ({most, max(1, most // 8)} if compiled else set())
        left = sum(at.stop - at.start for at, function in parts if function == "plain")
        assert left < (max(1, most // 8) if compiled else count + 1)


def scored_losses(inputs, logits, mask_weights, images=3, weights=(1.0, 1.0), compiled=False):
    cls, patches, weight = inputs
    cls_targets, patch_targets = (
        losses.Targets(t, 0.06, losses.sinkhorn_offsets(t.split(4), 0.06, compiled=compiled)) for t in logits
    )
    dino = losses.dino_scores(cls_targets, 0.1, compiled, cls, weight)
    ibot = losses.ibot_scores(patch_targets, mask_weights, 2 * images, 0.1, compiled, patches, weight)
    assert_close(dino.logits, F.linear(cls[: 2 * images], weight).detach())
    loss = weights[0] * dino.terms["dino"] + weights[1] * ibot.terms["ibot"]
    grads = torch.autograd.grad(loss, inputs) if loss.requires_grad else None
    return (*dino.terms.values(), *ibot.terms.values(), dino.entropy, ibot.entropy), grads


@pytest.mark.parametrize("chunk, chunk_cpu", [(2**25, 2**20), (2**25, 40), (70, 40), (1, 1)])
def test_scores_equal_the_plain_losses_in_value_and_gradient(monkeypatch, chunk, chunk_cpu):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    monkeypatch.setattr(losses, "CHUNK_CPU", chunk_cpu)
    for dtype in (torch.float32, torch.float64):
        given = head_inputs(dtype=dtype)
        for got, expected in zip(scored_losses(*given, weights=(0.7, 2.0)), plain_losses(*given, weights=(0.7, 2.0))):
            for a, b in zip(got, expected):
                assert_close(a, b)


def test_scores_of_any_number_of_masked_patches_are_compiled_twice(monkeypatch):
    """Once for each size of a chunk: their numbers differ between micro-batches, and after eight torch gives up."""
    graphs, compiling = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiling(f, dynamic=how["dynamic"], backend=backend))
    K = 64
    monkeypatch.setattr(losses, "CHUNK", 64 * K)
    monkeypatch.setattr(losses, "CHUNK_CPU", 16 * K)
    losses.compile_once.cache_clear()
    torch._dynamo.reset()
    weight = torch.randn(K, 8, requires_grad=True)
    for masked in (64, 130, 137, 150, 171, 190, 201, 77):
        targets = losses.Targets(torch.randn(masked, K), torch.tensor(0.07), torch.zeros(2, K))
        x = torch.randn(masked, 8, requires_grad=True)
        losses.ibot_scores(targets, torch.ones(masked), 10, 0.1, True, x, weight).terms["ibot"].backward()
    losses.compile_once.cache_clear()
    assert len(graphs) == 2


@pytest.mark.proof
def test_compiled_scores_equal_the_plain_losses():
    for masked in (7, 9, 8):  # the number of masked patches differs from one micro-batch to the next
        given = head_inputs(masked=masked)
        for got, expected in zip(scored_losses(*given, compiled=True), plain_losses(*given)):
            for a, b in zip(got, expected):
                assert_close(a, b)


def test_scores_without_gradient_or_masked_patches():
    given = head_inputs(masked=0)
    values, grads = scored_losses(*given)
    assert values[3] == values[5] == 0 and all(g.isfinite().all() for g in grads)
    assert_close(grads, plain_losses(*given)[1])
    with torch.no_grad():
        again, none = scored_losses(*given)
    assert none is None and all(torch.equal(a, b) for a, b in zip(values, again))


def test_scores_are_finite_for_logits_of_1e4():
    inputs, logits, mask_weights = head_inputs()
    inputs[2].data *= 1e4
    given = inputs, [1e4 * t for t in logits], mask_weights
    for got, expected in zip(scored_losses(*given), plain_losses(*given)):
        for a, b in zip(got, expected):
            assert a.isfinite().all()
            assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scores_under_autocast_multiply_in_bfloat16_alone():
    given = head_inputs(K=64)
    low = given[0], [t.bfloat16() for t in given[1]], given[2]
    with torch.autocast("cpu", torch.bfloat16):
        cls, patches, weight = low[0]
        targets = losses.Targets(low[1][0], 0.06, losses.sinkhorn_offsets([low[1][0]], 0.06))
        dino = losses.dino_scores(targets, 0.1, False, cls, weight)
        logits = F.linear(cls, weight)
    assert dino.logits.dtype == torch.bfloat16 and dino.terms["dino"].dtype == torch.float32
    probs = sinkhorn(low[1][0], 0.06).unflatten(0, (2, 3))  # what autocast gives the plain losses
    big, small = logits.split([6, 6])
    expected = dino_loss(big.unflatten(0, (2, 3)), probs, ignore_diagonal=True) * 2
    expected = (expected + 4 * dino_loss(small.unflatten(0, (2, 3)), probs)) / 6
    assert_close(dino.terms["dino"], expected)
    ours, plain = (torch.autograd.grad(loss, (cls, weight)) for loss in (dino.terms["dino"], expected))
    for a, b in zip(ours, plain):
        assert a.dtype == torch.float32
        assert_close(a, b, rtol=2**-6, atol=2**-8 * b.abs().max().item())


def test_scores_make_nothing_as_large_as_the_logits_in_float32(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 8 * 512)
    M, K = 256, 512
    x, weight = torch.randn(M, 4).requires_grad_(), torch.randn(K, 4).requires_grad_()
    logits, mask_weights = torch.randn(M, K).bfloat16(), torch.ones(M)
    with Allocations() as memory, torch.autocast("cpu", torch.bfloat16):
        targets = losses.Targets(logits, 0.06, losses.sinkhorn_offsets([logits], 0.06))
        losses.ibot_scores(targets, mask_weights, 8, 0.1, False, x, weight).terms["ibot"].backward()
    large = [n for n in memory.numels() if n >= M * K / 4]
    assert large == [M * K // 2]  # the teacher's logits, two of them in the room of a float32


# Two processes against one.


SPLITS = [(5, 3), (1, 7), (8, 0)]  # rows per rank


def two_rank_logits():
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.linspace(-1e4, 1e4, 48).view(8, 6)]


def on_one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    out = {}
    for split in SPLITS:
        for i, logits in enumerate(two_rank_logits()):
            rows = logits.split(split)[rank]
            out["sinkhorn", split, i] = sinkhorn(rows, 0.07)
            out["alone", split, i] = sinkhorn(rows, 0.07, group=alone)
            out["center", split, i] = softmax_center(rows, torch.ones(6), 0.07)[1]
    out["no rows", "center"] = softmax_center(torch.empty(0, 6), torch.ones(6), 0.07)[1]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_uneven_rows_equal_one(tmp_path, on_two_ranks):
    on_two_ranks(on_one_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for split in SPLITS:
        for i, logits in enumerate(two_rank_logits()):
            whole = torch.cat([rank["sinkhorn", split, i] for rank in ranks])
            assert_close(whole, sinkhorn(logits, 0.07), atol=1e-6, rtol=1e-4)
            for rank, rows in zip(ranks, logits.split(split)):
                assert_close(rank["alone", split, i], sinkhorn(rows, 0.07))
                assert_close(rank["center", split, i], softmax_center(logits, torch.ones(6), 0.07)[1])
    assert all(torch.equal(rank["no rows", "center"], torch.ones(6)) for rank in ranks)


# Slow loops.


@pytest.mark.parametrize("S, T, diagonal", [(2, 2, True), (5, 2, False), (3, 2, True), (2, 3, True), (1, 1, False)])
@pytest.mark.parametrize("sum_of_row", [1.0, 0.7])
def test_dino_matches_a_double_loop_in_value_and_gradient(S, T, diagonal, sum_of_row):
    student, probs = torch.randn(S, 4, 9), probabilities(T, 4, 9) * sum_of_row

    def slow(student):
        terms = [
            -(probs[t, b] * torch.log_softmax(student[s, b] / 0.1, -1)).sum()
            for s in range(S)
            for t in range(T)
            for b in range(4)
            if not (diagonal and s == t)
        ]
        return sum(terms) / len(terms)

    assert_close(value_and_grad(dino_loss, student, probs, 0.1, diagonal), value_and_grad(slow, student))


def test_dino_without_a_pair_is_an_error():
    with pytest.raises(ValueError, match="no pair"):
        dino_loss(torch.randn(1, 4, 9), probabilities(1, 4, 9), ignore_diagonal=True)


def test_dino_holds_nothing_larger_than_its_inputs():
    S, T, B, K = 5, 4, 3, 64
    student, probs = torch.randn(S, B, K, requires_grad=True), probabilities(T, B, K)
    with Allocations() as memory:
        dino_loss(student, probs).backward()
    assert max(memory.numels()) == S * B * K
    with Allocations() as memory:
        dino_loss(student, probs, ignore_diagonal=True).backward()
    assert max(memory.numels()) == S * B * K


def test_ibot_matches_a_loop_over_crops(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 30)  # two rows at a time
    masked = [3, 0, 1, 5]  # tokens per crop; the second crop is not masked
    student, probs = torch.randn(9, 15), probabilities(9, 15)
    weights = torch.cat([torch.full((n,), 1 / max(n, 1)) for n in masked])

    def slow(student):
        crops = [
            [-(p * torch.log_softmax(s / 0.2, -1)).sum() for s, p in zip(of_crop, of_teacher)]
            for of_crop, of_teacher in zip(student.split(masked), probs.split(masked))
        ]
        return sum(sum(tokens) / len(tokens) for tokens in crops if tokens) / 4

    assert_close(value_and_grad(ibot_loss, student, probs, weights, 4, 0.2), value_and_grad(slow, student))


def test_ibot_with_no_or_one_masked_token():
    for tokens in (0, 1):
        student, probs = torch.randn(tokens, 8), probabilities(tokens, 8)
        loss, grad = value_and_grad(ibot_loss, student, probs, torch.ones(tokens), 2)
        assert loss.isfinite() and (loss > 0) == (tokens > 0)
        assert grad.shape == student.shape and grad.isfinite().all()


@pytest.mark.parametrize("B, group", [(8, 4), (8, 2), (6, 16), (6, 6)])
def test_koleo_matches_a_double_loop(B, group):
    features = torch.randn(B, 5)

    def slow(features):
        total = 0
        for i in range(B):
            of_group = [j for j in range(B) if j // group == i // group and j != i]
            x = [f / f.norm() for f in features]
            nearest = max(of_group, key=lambda j: (x[i] @ x[j]).item())
            total = total - (x[i] - x[nearest]).norm().log()
        return total / B

    assert_close(value_and_grad(koleo_loss, features, group), value_and_grad(slow, features), **GRAD)


@pytest.mark.parametrize("B, group, nearest", [(24, 16, 12), (17, 16, 17), (8, 3, 2), (8, 1, 2)])
def test_koleo_refuses_groups_that_do_not_divide_and_names_the_nearest(B, group, nearest):
    with pytest.raises(ValueError, match=f"group={group} .* {B} samples .* nearest: {nearest}$"):
        koleo_loss(torch.randn(B, 4), group)
    koleo_loss(torch.randn(B, 4), nearest)


@pytest.mark.parametrize("copies", [2, 3, 8])
def test_koleo_is_finite_with_identical_samples(copies):
    features = torch.randn(8, 5)
    features[:copies] = features[0]
    loss, grad = value_and_grad(koleo_loss, features)
    assert loss.isfinite() and grad.isfinite().all()
    if copies == 8:
        assert_close(loss.item(), -math.log(1e-8 * (math.sqrt(5) + 1)), rtol=1e-6, atol=0)
    if copies == 2:
        # The pull of one twin and the push of the other cancel, the rest keeps its gradient.
        assert grad.abs().max() < 10 and grad[2:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: losses.sinkhorn(z(2, 4, 8), 0.1), "sinkhorn: logits are [rows, prototypes]; got logits [2, 4, 8]"),
        (lambda z: losses.sinkhorn(z(4, 8), 0.1, 0), "iterations=0 must be at least 1"),
        (lambda z: losses.softmax_center(z(4, 8), z(9), 0.1), "got logits [4, 8], center [9]"),
        (lambda z: losses.dino_loss(z(8, 4, 16), z(2, 5, 16)), "got student [8, 4, 16], teacher_probs [2, 5, 16]"),
        (lambda z: losses.dino_loss(z(8, 16), z(8, 16)), "[crops, images, prototypes]"),
        (lambda z: losses.ibot_loss(z(6, 16), z(6, 16), z(5), 4), "mask_weights [masked tokens]; got student [6, 16]"),
        (lambda z: losses.ibot_loss(z(6, 16), z(7, 16), z(6), 4), "student [6, 16], teacher_probs [7, 16]"),
        (lambda z: losses.koleo_loss(z(2, 4, 8)), "features are [samples, dimensions]; got features [2, 4, 8]"),
        (lambda z: losses.gram_loss(z(2, 9, 8), z(2, 4, 8)), "got student [2, 9, 8], teacher [2, 4, 8]"),
    ],
)
def test_wrong_shapes_are_named_in_words_and_numbers(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call(torch.zeros)


def test_koleo_of_one_sample_is_zero_and_connected():
    loss, grad = value_and_grad(koleo_loss, torch.randn(1, 5))
    assert loss == 0 and torch.equal(grad, torch.zeros(1, 5))


@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
@pytest.mark.parametrize("per_image", [True, False])
def test_gram_matches_a_double_loop(negatives, per_image):
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def slow(student):
        terms = []
        for b in range(2):
            for other in [b] if per_image else range(2):
                for i in range(3):
                    for j in range(3):
                        of_student = F.cosine_similarity(student[b, i], student[other, j], dim=0)
                        of_teacher = F.cosine_similarity(teacher[b, i], teacher[other, j], dim=0)
                        if negatives == "clip":
                            of_student = of_student.clamp(min=0)
                        if negatives != "keep":
                            of_teacher = of_teacher.clamp(min=0)
                        terms.append((of_student - of_teacher) ** 2)
        return sum(terms) / len(terms)

    got = value_and_grad(gram_loss, student, teacher, per_image, negatives)
    assert_close(got, value_and_grad(slow, student), atol=1e-6, rtol=1e-4)


def cubic_matrix(n, m):
    """[m, n] weights of Keys' cubic (a = -0.75) from n to m points, border repeated, not antialiased."""
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        centre = (i + 0.5) * n / m - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), n - 1)] += near if d <= 1 else far
    return matrix


def test_gram_resizes_the_teacher_to_the_grid_of_the_student():
    student, teacher = torch.randn(2, 4 * 2, 5).double(), torch.randn(2, 6 * 3, 5).double()
    rows, cols = cubic_matrix(6, 4), cubic_matrix(3, 2)
    resized = torch.einsum("yh,xw,bhwd->byxd", rows, cols, teacher.unflatten(1, (6, 3))).flatten(1, 2)
    got = gram_loss(student, teacher, grids=((4, 2), (6, 3)))
    assert_close(got, gram_loss(student, resized))
    assert_close(gram_loss(student, resized, grids=((4, 2), (4, 2))), gram_loss(student, resized))


def test_gram_refuses_unknown_words_and_sizes():
    tokens = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="clip_teacher"):
        gram_loss(tokens, tokens, negatives="drop")
    with pytest.raises(ValueError, match="grids="):
        gram_loss(tokens, torch.randn(2, 9, 3))


# Invariances and edges.


def test_mean_over_micro_batches_is_the_loss_of_the_batch():
    student, probs = torch.randn(3, 8, 6), probabilities(2, 8, 6)
    parts = [dino_loss(s, p) for s, p in zip(student.split(4, 1), probs.split(4, 1))]
    assert_close(sum(parts) / 2, dino_loss(student, probs))

    tokens, targets, weights = torch.randn(7, 6), probabilities(7, 6), torch.rand(7)
    parts = [ibot_loss(*part, crops=4) for part in zip(tokens.split(5), targets.split(5), weights.split(5))]
    assert_close(sum(parts) / 2, ibot_loss(tokens, targets, weights, crops=8))

    features = torch.randn(8, 5)
    assert_close(sum(koleo_loss(part, 4) for part in features.split(4)) / 2, koleo_loss(features, 4))

    patches, earlier = torch.randn(8, 4, 5), torch.randn(8, 4, 5)
    parts = [gram_loss(s, t) for s, t in zip(patches.split(4), earlier.split(4))]
    assert_close(sum(parts) / 2, gram_loss(patches, earlier))


def waves(*shape, dtype):
    return torch.arange(math.prod(shape)).double().square().sin().view(shape).to(dtype)


CALLS = {  # a loss of one tensor, for any dtype
    "dino": lambda x: dino_loss(x, torch.ones(2, 4, 6, dtype=x.dtype) / 6),
    "dino_diagonal": lambda x: dino_loss(x, torch.eye(6, dtype=x.dtype)[:2, None].expand(2, 4, 6), 0.1, True),
    "ibot": lambda x: ibot_loss(x[0], torch.eye(6, dtype=x.dtype)[:4], torch.ones(4, dtype=x.dtype) / 3, 4),
    "koleo": lambda x: koleo_loss(x.flatten(0, 1), 4),
    "gram": lambda x: gram_loss(x, waves(2, 4, 6, dtype=x.dtype)),
    "gram_clip": lambda x: gram_loss(x, waves(2, 4, 6, dtype=x.dtype), per_image=False, negatives="clip"),
    "gram_grids": lambda x: gram_loss(x, waves(2, 16, 6, dtype=x.dtype), grids=((2, 2), (4, 4))),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck_in_float64(name):
    assert gradcheck(CALLS[name], torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_under_autocast_computes_in_float32(name):
    def in_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return CALLS[name](x)

    x = torch.randn(2, 4, 6).bfloat16()
    loss, grad = value_and_grad(CALLS[name], x.float())
    assert_close(value_and_grad(in_autocast, x.float()), (loss, grad), rtol=0, atol=0)
    half, half_grad = value_and_grad(in_autocast, x)  # CALLS rounds its constants, too
    assert half.dtype == torch.float32 and half_grad.dtype == torch.bfloat16
    assert_close((half, half_grad.float()), (loss, grad), atol=0.01, rtol=0.02)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edge", ["identical", "zero", "1e4", "1e-4"])
def test_no_nan_at_the_edges(name, dtype, edge):
    x = torch.randn(2, 4, 6)
    x = {"identical": torch.ones_like(x), "zero": 0 * x, "1e4": 1e4 * x, "1e-4": 1e-4 * x}[edge]
    loss, grad = value_and_grad(CALLS[name], x.to(dtype))
    assert loss.isfinite() and grad.isfinite().all()


def test_one_prototype_gives_zero():
    assert dino_loss(torch.randn(2, 4, 1), torch.ones(2, 4, 1)) == 0
    assert ibot_loss(torch.randn(3, 1), torch.ones(3, 1), torch.ones(3), 2) == 0


# Health.


def numbers_of(probs=None, logits=None, features=None):
    probs = probabilities(16, 8) if probs is None else probs
    logits = torch.zeros_like(probs) if logits is None else logits
    features = torch.randn(16, 4) if features is None else features
    return {name: value.item() for name, value in health(probs, logits, features).items()}


def test_health_of_a_healthy_run():
    logits = torch.randn(64, 8)
    got = numbers_of(torch.softmax(logits / 0.1, -1), logits, torch.randn(4096, 16))
    assert 0 < got["teacher_entropy"] < 0.5 and got["marginal_entropy"] > 0.9
    assert got["perplexity"] > 7 and got["dead_prototypes"] == 0 and abs(got["kl"]) < 1e-5
    assert abs(got["cosine"]) < 0.01 and got["feature_std"] == pytest.approx(1, abs=0.01)
    assert got["rankme"] > 15.9 and got["effective_rank"] > 15.9


def test_health_matches_slow_formulas():
    probs, logits, features = probabilities(6, 5), torch.randn(6, 5), torch.randn(6, 3) + 1
    got = numbers_of(probs, logits, features)
    log_q = torch.log_softmax(logits / 0.1, -1)
    assert got["teacher_entropy"] == pytest.approx(-(probs * probs.log()).sum().item() / 6 / math.log(5))
    marginal = probs.mean(0)
    entropy = -(marginal * marginal.log()).sum().item()
    assert got["marginal_entropy"] == pytest.approx(entropy / math.log(5))
    assert got["perplexity"] == pytest.approx(math.exp(entropy))
    assert got["kl"] == pytest.approx((probs * (probs.log() - log_q)).sum().item() / 6, rel=1e-5)
    cosines = [F.cosine_similarity(features[i], features[j], 0) for i in range(6) for j in range(6) if i != j]
    assert got["cosine"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-4)
    for name, x in (("rankme", features), ("effective_rank", features - features.mean(0))):
        p = torch.linalg.eigvalsh((x.T @ x).double()).sqrt()
        p = p / p.sum()
        assert got[name] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_health_sees_constant_features(size):
    rounding = 1 + 1e-7 * torch.randn(100, 48)
    got = numbers_of(features=size * torch.randn(1, 48) * rounding)
    assert got["cosine"] == pytest.approx(1, abs=1e-5) and got["feature_std"] < 1e-4
    assert got["rankme"] == pytest.approx(1, abs=1e-3) and got["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_health_sees_features_on_a_line_and_a_small_but_real_spread():
    assert numbers_of(features=torch.randn(64, 1) * torch.randn(48) + 1)["effective_rank"] == pytest.approx(1, abs=0.01)
    assert numbers_of(features=1e-3 * torch.randn(512, 8) + 1)["effective_rank"] > 7.5


def test_health_sees_uniform_and_peaked_targets():
    uniform = numbers_of(probs=torch.full((16, 8), 1 / 8))
    assert [uniform[k] for k in ("teacher_entropy", "marginal_entropy")] == pytest.approx([1, 1])
    assert uniform["perplexity"] == pytest.approx(8) and uniform["kl"] == pytest.approx(0, abs=1e-6)
    peaked = numbers_of(probs=torch.eye(8)[torch.zeros(16).long()])
    assert peaked["teacher_entropy"] == peaked["marginal_entropy"] == 0
    assert peaked["perplexity"] == 1 and peaked["dead_prototypes"] == 7 / 8
    spread = numbers_of(probs=torch.eye(8).repeat(2, 1))
    assert spread["teacher_entropy"] == 0 and spread["marginal_entropy"] == pytest.approx(1)


def test_health_is_finite_at_the_edges_and_nan_only_for_nan():
    for got in (
        numbers_of(probs=torch.ones(4, 1)),
        numbers_of(features=torch.zeros(4, 3)),
        numbers_of(features=torch.randn(1, 3)),
        numbers_of(probabilities(16, 8).bfloat16(), 1e4 * torch.randn(16, 8), torch.randn(16, 4).bfloat16()),
    ):
        assert all(math.isfinite(value) for value in got.values()), got
    got = numbers_of(features=torch.full((4, 3), torch.nan))
    assert math.isnan(got["rankme"]) and math.isnan(got["cosine"]) and math.isfinite(got["kl"])
