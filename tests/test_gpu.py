"""What a card must get right, each also asked of the CPU, so that the questions themselves are known to work.

The first part of tools/recipes/gpu_check.sh. Without a card its half is skipped, and says so.
"""

import argparse
import contextlib
import functools

import numpy as np
import pytest
import torch
from test_train import golden_step

import data
import losses
import train_ssl as t
from tools.lib import loop, recorded

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: not measured on a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_CARD)]
COMPILED = [("cpu", False)]  # compiled on a CPU: test_bench and test_losses
COMPILED += [pytest.param("cuda", compiled, marks=NO_CARD) for compiled in (False, True)]


def moved(micro, device):
    crops = data.Crops(*(None if c is None else c.to(device) for c in micro.crops))
    return micro._replace(crops=crops, masks=micro.masks.to(device), at=micro.at.to(device))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-stream"])
@pytest.mark.parametrize("device, compiled", COMPILED)
def test_the_golden_step(device, compiled, precision):
    """Losses and gradients of the published method: float32 to rounding; of bfloat16 8 bits, several in a row."""
    student, teacher, gram, micro, g, meta = golden_step()
    flags = argparse.Namespace(compile=compiled, precision=precision, fsdp=False)
    loop.on_device(flags, student, (student, teacher, gram), 1, torch.device(device), whole=True)
    w = t.Weights(meta["teacher_temp"], gram=2.0, koleo_group=4, precision=precision, compiled=compiled)
    sums, _ = t.ssl_update(student, teacher, gram, [moved(micro, device)], w)
    exact = precision == "fp32"
    assert sums["loss"].item() == pytest.approx(meta["total_loss"], rel=1e-5 if exact else 2e-2)
    expected = {k[5:]: v for k, v in g.items() if k.startswith("grad.backbone.blocks.") and "bias_mask" not in k}
    own = {name: p.grad.cpu() for name, p in student.named_parameters()}
    assert expected
    for name, value in expected.items():
        if exact:
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5, msg=lambda s: f"{name}: {s}")
        elif value.norm() > 1e-4:
            assert torch.cosine_similarity(own[name].flatten(), value.flatten(), 0) > 0.98, name


@pytest.mark.parametrize("dtype, most", [(torch.int16, 0.5), (torch.uint8, 0.05)])  # HU; 8-bit codes
@pytest.mark.parametrize("device", DEVICES)
def test_views_are_those_of_a_cpu(device, dtype, most):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 250, (3, 3, 96, 80), generator=generator).to(dtype)
    boxes = np.random.default_rng(0).uniform(0, 30, (4, 3, 4)) + [0, 0, 40, 40]
    flips, sigmas = np.arange(12).reshape(4, 3) % 2 == 0, np.linspace(0, 2, 12).reshape(4, 3)
    expected = data.cut_each(images, *flat(boxes, flips, sigmas), 32)
    taps = functools.partial(data.cut_by_taps, each=data.compile_once if device == "cuda" else lambda f: f)
    for product in (data.cut_batched, taps):  # compiled on a CPU: test_data
        got = product(images.to(device), *flat(boxes, flips, sigmas), 32)
        assert (got.cpu() - expected).abs().max() < most
    plan = data.place(data.plan(0, 0, range(3), data.RECIPES["ct"]), [(96, 80)] * 3)
    for compiled in (False, True):
        for ours, theirs in zip(data.render(images.to(device), plan, compiled)[:2], data.render(images, plan)[:2]):
            assert (ours.cpu() - theirs).abs().max() < 2e-3  # of numbers whose standard deviation is 1


def flat(boxes, flips, sigmas):
    """As cut() gives them on."""
    boxes, sigmas = (torch.as_tensor(a, dtype=torch.float32) for a in (boxes, sigmas))
    return boxes.flatten(0, 1), torch.as_tensor(flips).flatten(), sigmas.flatten()


@pytest.mark.parametrize("device, compiled", COMPILED)
def test_targets_of_65536_prototypes(device, compiled):
    logits = 0.5 * torch.randn(40, 65536, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = losses.sinkhorn(logits.double(), 0.05)
    parts = [part.to(device) for part in logits.split(17)]
    offsets = losses.sinkhorn_offsets(parts, torch.full((), 0.05, device=device), compiled=compiled)
    got = torch.cat([losses.Targets(part, 0.05, offsets).probabilities() for part in parts])
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=1e-8)


@NO_CARD
@pytest.mark.parametrize("precision", ["fp32", "bf16-stream"])
def test_a_recorded_update_is_the_plain_one(monkeypatch, precision):
    """Six updates with other crops and temperatures each, of which the last four are replays of a CUDA graph.

    To the bit only where kernels are deterministic: a run that is killed with --compile --deterministic, whose first
    updates after that are plain again, is the second part of tools/recipes/gpu_check.sh.
    """
    ends = []
    for plain in (2, 100):
        monkeypatch.setattr(recorded, "PLAIN", plain)
        student, teacher, gram, micro, g, meta = golden_step()
        for net in (student, teacher, gram):
            net.to("cuda")
            getattr(net, "backbone", net).stream = torch.bfloat16 if precision == "bf16-stream" else None
        update, losses_seen = recorded.Recorded(t.ssl_update, student.parameters(), torch.device("cuda")), []
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(6):
            optimizer.zero_grad(set_to_none=True)
            w = t.Weights(0.04 + 0.01 * step, gram=2.0 + step, koleo_group=4, precision=precision)
            here = moved(micro, "cuda")
            crops = data.Crops(*(None if c is None else c.roll(step, 0) for c in here.crops))
            micros = [here._replace(crops=crops)]
            terms, seen = update(student, teacher, gram, micros, w, {}, contextlib.nullcontext)
            losses_seen.append(torch.stack([*terms.values(), seen.target_entropy]).clone())
            optimizer.step()
        assert (update.graph is not None) == (plain == 2)
        ends.append([torch.stack(losses_seen), *(p.detach().clone() for p in student.parameters())])
    assert len({x.item() for x in ends[0][0][:, 0]}) == 6
    for ours, theirs in zip(*ends):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
