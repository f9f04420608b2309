import copy
import gc
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import textwrap
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from test_checkpoint import ODD_ZIPS, member, overlapped, rezipped
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import model as m

GOLDEN = Path(__file__).parent / "golden"
CLOSE = dict(atol=2e-5, rtol=1e-4)
GRADIENT = dict(atol=1e-5, rtol=1e-3)


def golden(name):
    return safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")


def part(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture(params=["01_vit_mlp", "02_vit_swiglu"])
def reference(request, tmp_path):
    """(our backbone with the reference's weights, the golden tensors)"""
    tensors = golden(request.param)
    torch.save(part(tensors, "model."), tmp_path / "original.pth")
    eps = 1e-6 if "swiglu" in request.param else 1e-5  # not in a .pth; releases have 1e-5
    return m.load_backbone(tmp_path / "original.pth", norm_eps=eps), tensors


def small_vit(**overrides):
    torch.manual_seed(0)
    vit = m.build_vit("vit_test", layerscale=0.5, **overrides)  # LayerScale 1e-5 would hide the blocks from any test
    for p in vit.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.5, 0.5)  # biases and norms away from 0 and 1
    return vit


def random_crops(sizes=((4, 64, 32), (6, 32, 32))):
    torch.manual_seed(1)
    return [torch.randn(b, 3, h, w) for b, h, w in sizes]


# the reference's numbers


def test_rope_matches_the_reference():
    g = golden("00_rope")
    cos, sin = m.rope_table(4, 6, 16)
    torch.testing.assert_close(sin, g["base100.separate.4x6.sin"], **CLOSE)
    torch.testing.assert_close(cos, g["base100.separate.4x6.cos"], **CLOSE)
    for head_dim in (16, 24, 64):
        torch.testing.assert_close(m.rope_periods(head_dim), g[f"base100.periods_fp32.head_dim{head_dim}"])
    draw = m.RopeDraw(g["aug.shift_hw"], g["aug.jitter_hw"], g["aug.rescale"])
    cos, sin = m.rope_table(4, 6, g["aug.4x6.sin"].shape[1], draw=draw)
    torch.testing.assert_close(sin, g["aug.4x6.sin"], **CLOSE)
    torch.testing.assert_close(cos, g["aug.4x6.cos"], **CLOSE)


@pytest.mark.parametrize("mode", ["nomask", "mask"])
def test_backbone_matches_the_reference(reference, mode):
    vit, g = reference
    tokens = vit(g["input.image"], g["input.masks"] if mode == "mask" else None)
    torch.testing.assert_close(tokens.cls, g[f"out.{mode}.x_norm_clstoken"], **CLOSE)
    torch.testing.assert_close(tokens.registers, g[f"out.{mode}.x_storage_tokens"], **CLOSE)
    torch.testing.assert_close(tokens.patches, g[f"out.{mode}.x_norm_patchtokens"], **CLOSE)


def test_intermediate_matches_the_reference(reference):
    vit, g = reference
    for i, tokens in enumerate(vit.intermediate(g["input.image"], 2)):
        torch.testing.assert_close(tokens.patches, g[f"out.intermediate_n2_norm.{i}.patch"], **CLOSE)
        torch.testing.assert_close(tokens.cls, g[f"out.intermediate_n2_norm.{i}.cls"], **CLOSE)
        torch.testing.assert_close(tokens.registers, g[f"out.intermediate_n2_norm.{i}.storage"], **CLOSE)
    for i, tokens in zip((0, 2), vit.intermediate(g["input.image"], [0, 2], norm=False)):
        expected = g[f"out.intermediate_0_2_nonorm_reshaped.block{i}"]
        torch.testing.assert_close(tokens.patches.mT.unflatten(2, (4, 6)), expected, **CLOSE)


@pytest.mark.parametrize("layers", [1, 3])
def test_head_matches_the_reference(layers):
    g = part(golden("05_dino_head"), f"nlayers{layers}.")
    x = golden("05_dino_head")["input"].requires_grad_()
    head = m.ProjectionHead(48, 64, 16, 64, layers)
    head.load_state_dict(part(g, "head."))
    out = head(x)
    torch.testing.assert_close(head.bottleneck(x), g["bottleneck_normalized"], **CLOSE)
    torch.testing.assert_close(out, g["out"], **CLOSE)
    (out * torch.linspace(-1, 1, 640).reshape(10, 64)).sum().backward()
    torch.testing.assert_close(x.grad, g["grad_input"], **GRADIENT)


def test_stochastic_depth_block_matches_the_reference():
    g = golden("09_block_droppath")
    block = m.Block(48, 3, 96, False, True, 1e-5, 1.0)
    keys = [k for k in g if k.startswith(("block.", "model.", "weights."))]
    prefix = os.path.commonprefix(keys)
    state, _ = m.state_from_original(part(g, prefix))
    block.load_state_dict(state)
    inputs = [g["input.0"].requires_grad_(), g["input.1"].requires_grad_()]
    shapes = [tuple(x.shape[:2]) for x in inputs]
    ropes = []
    for i in range(2):  # the reference's tables cover patches only: 5 tokens without a position come first
        sin, cos = g[f"rope_sin.{i}"], g[f"rope_cos.{i}"]
        h = sin.shape[1]
        ropes.append((torch.cat([torch.ones(5, h), cos]), torch.cat([torch.zeros(5, h), sin])))
    packed = torch.cat([x.flatten(0, 1) for x in inputs])
    keep = tuple([g[f"kept_indices.{branch}.{i}"] for i in range(2)] for branch in ("attn", "ffn"))
    out = m.unpack(block(packed, shapes, ropes, keep), shapes)
    for i in range(2):
        torch.testing.assert_close(out[i], g[f"output.{i}"], **CLOSE)
    weights = [torch.linspace(-1, 1, o.numel()).reshape(o.shape) for o in out]
    sum((o * w).sum() for o, w in zip(out, weights)).backward()
    for i in range(2):
        torch.testing.assert_close(inputs[i].grad, g[f"grad_input.{i}"], **GRADIENT)
        plain = m.unpack(block(packed, shapes, ropes), shapes)[i]
        torch.testing.assert_close(plain, g[f"output_eval.{i}"], **CLOSE)


COUNTS = {
    "vit_small": 21_601_152, "vit_small_plus": 28_697_472, "vit_base": 85_669_632, "vit_large": 303_154_176,
    "vit_huge_plus": 840_633_600, "vit_7b": 6_716_043_264,
}  # fmt: skip


@pytest.mark.parametrize("arch", COUNTS)
def test_released_sizes_have_the_published_parameter_counts(arch):
    with torch.device("meta"):
        assert sum(p.numel() for p in m.build_vit(arch).parameters()) == COUNTS[arch]


# the packed pass, and everything that is passed in


@pytest.mark.parametrize("options", [{}, dict(gated=True, cls_norm=True, registers=0), dict(qkv_bias=False)])
def test_packed_crops_equal_separate_passes_in_value_and_gradient(options):
    vit, crops = small_vit(**options), random_crops()
    mask = torch.rand(4, 8) < 0.4

    def gradients(outputs):
        vit.zero_grad()
        sum((torch.cat([t.flatten() for t in o]) ** 2).sum() for o in outputs).backward()
        return [p.grad.clone() for p in vit.parameters()]

    packed = vit.forward_crops(crops, [mask, None])
    separate = [vit(crops[0], mask), vit(crops[1])]
    for a, b in zip(packed, separate):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    for x, y in zip(gradients(packed), gradients(separate)):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_local_cls_norm_is_used_by_later_groups_in_training_only():
    vit = small_vit(local_cls_norm=True)
    crops = random_crops()
    as_local, as_global = vit.train().forward_crops(crops)[1], vit.forward_crops(crops[1:])[0]
    assert not torch.allclose(as_local.cls, as_global.cls)
    assert torch.allclose(as_local.patches, as_global.patches, atol=1e-5)
    torch.testing.assert_close(vit.eval().forward_crops(crops)[1].cls, as_global.cls, atol=1e-5, rtol=1e-5)


def test_a_mask_hides_exactly_the_masked_patches():
    vit, (image, _) = small_vit(), random_crops()
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 2] = True
    changed = image.clone()
    changed[:, :, 16:32, 0:16] += 1  # patch 2 of a 4 x 2 grid
    torch.testing.assert_close(vit(image, mask), vit(changed, mask))
    assert not torch.allclose(vit(image).cls, vit(changed).cls)


def test_key_bias_has_no_effect_and_no_gradient():
    vit, (image, _) = small_vit(), random_crops()
    before = vit(image).patches
    bias = vit.blocks[0].attn.qkv.bias
    with torch.no_grad():
        bias[64:128] += 3
    torch.testing.assert_close(vit(image).patches, before)
    vit(image).patches.square().sum().backward()
    assert not bias.grad[64:128].any() and bias.grad[:64].any()


def unscaled(linear, *parts):
    return linear(torch.cat(parts))


def test_layerscale_by_way_of_the_weight_has_the_gradients_of_the_scaled_result_and_keeps_no_result():
    linear, scale, x = torch.nn.Linear(8, 6).double(), m.LayerScale(6, 0.3).double(), torch.randn(50, 8).double()
    torch.nn.init.normal_(scale.gamma)
    kept, wanted = [], [x.requires_grad_(), linear.weight, linear.bias, scale.gamma]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = scale(linear, x[:20], x[20:])
    assert {(20, 8), (30, 8)} <= {*kept} and not {(50, 6), (20, 6), (30, 6), (50, 8)} & {*kept}
    plain = linear(x) * scale.gamma
    torch.testing.assert_close(found, plain)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, plain))):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(scale(linear, x), plain)  # one view at a time: its tokens are fewer than the weights


def test_stochastic_depth_equals_a_loop_over_images_and_is_a_function_of_the_generator():
    vit, crops = small_vit(), random_crops()
    keep = m.draw_keep(torch.Generator().manual_seed(3), vit.depth, [4, 6], 0.4)
    again = m.draw_keep(torch.Generator().manual_seed(3), vit.depth, [4, 6], 0.4)
    assert all(torch.equal(a, b) for x, y in zip(keep, again) for s, t in zip(x, y) for a, b in zip(s, t))
    assert [len(rows) for rows in keep[0][0]] == [2, 3]  # int(4 * 0.6), int(6 * 0.6)
    out = vit.forward_crops(crops, keep=keep)
    for group, crop in enumerate(crops):
        for i in range(len(crop)):
            x, rope = vit.embed(crop[i : i + 1])
            shape, x = [tuple(x.shape[:2])], x[0]
            for block, rows in zip(vit.blocks, keep):
                branches = (
                    lambda y: block.ls1.gamma * block.attn(block.norm1(y), shape, [rope], unscaled),
                    lambda y: block.ls2.gamma * block.mlp(block.norm2(y), unscaled),
                )
                for kept, branch in zip(rows, branches):
                    if i in kept[group].tolist():
                        x = x + branch(x) * len(crop) / len(kept[group])
            torch.testing.assert_close(vit.norm(x)[0], out[group].cls[i], atol=1e-5, rtol=1e-4)
    assert m.draw_keep(torch.Generator(), 2, [4], 0.0) is None


def test_rope_draws_stay_in_their_ranges_and_change_the_output():
    draws = [m.draw_rope(torch.Generator().manual_seed(i), 2.0, 0.3, 1.5) for i in range(200)]
    assert all(d.shift.abs().max() <= 0.3 and 1 / 1.5 <= d.jitter.min() <= d.jitter.max() <= 1.5 for d in draws)
    rescale = torch.cat([d.rescale for d in draws])
    assert rescale.min() < 0.6 and rescale.max() > 1.7 and rescale.min() >= 0.5 and rescale.max() <= 2
    vit, crops = small_vit(), random_crops()
    one, two = (vit.forward_crops(crops, rope=[d, None]) for d in draws[:2])
    assert not torch.allclose(one[0].cls, two[0].cls) and torch.allclose(one[1].cls, two[1].cls)


def test_attention_is_the_softmax_that_sdpa_uses():
    vit, (image, _) = small_vit(), random_crops()
    rows = vit.cls_probabilities(image)
    torch.testing.assert_close(rows.sum(-1), torch.ones(4, 2))
    maps = vit.attention(image)
    assert maps.shape == (4, 2, 4, 2)
    torch.testing.assert_close(maps.flatten(2).sum(-1) + rows[:, :, :5].sum(-1), torch.ones(4, 2))
    x, rope = vit.embed(image)
    shape = tuple(x.shape[:2])
    x = vit.blocks[0](x.flatten(0, 1), [shape], [rope])
    block = vit.blocks[1]
    q, k, v = block.attn.split_heads(block.attn.project(block.norm1(x)), shape, rope)
    expected = scaled_dot_product_attention(q, k, v)[:, :, 0]
    torch.testing.assert_close((rows[:, :, None] @ v)[:, :, 0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vit.attention(image, 1), maps)
    assert not torch.allclose(vit.attention(image, 0), maps)


def test_init_covers_every_number():
    vit = m.build_vit("vit_test", gated=True, cls_norm=True, local_cls_norm=True)
    ssl = m.SSLModel(vit, m.ProjectionHead(64, 32, 16, 8), m.ProjectionHead(64, 32, 16, 8, layers=1))
    for t in ssl.state_dict().values():
        t.fill_(math.nan)
    for part_ in (vit, ssl.dino_head, ssl.ibot_head):
        part_.init_weights()
    assert not [k for k, t in ssl.state_dict().items() if t.isnan().any()]
    assert 0.018 < vit.blocks[0].attn.qkv.weight.std() < 0.022


def test_ssl_model_sends_cls_and_chosen_patches_through_the_heads():
    vit, crops = small_vit(), random_crops()
    ssl = m.SSLModel(vit, m.ProjectionHead(64, 32, 16, 24), m.ProjectionHead(64, 32, 16, 40))
    mask = torch.rand(4, 8) < 0.4
    out = ssl(crops, mask, at=mask.flatten().nonzero()[:, 0])
    tokens = vit.forward_crops(crops, mask)
    torch.testing.assert_close(out.cls_logits, torch.cat([ssl.dino_head(t.cls) for t in tokens]))
    torch.testing.assert_close(out.patch_logits, ssl.ibot_head(tokens[0].patches[mask]))
    for a, b in zip(out.cls, tokens):
        torch.testing.assert_close(a, b.cls)
    assert out.patches is None
    whole = ssl(crops, mask, patches=True)
    torch.testing.assert_close(whole.patches, tokens[0].patches)
    assert whole.patch_logits is None and ssl(crops).patch_logits is None


@pytest.mark.parametrize("options", [{}, dict(gated=True, local_cls_norm=True), dict(cls_norm=True, registers=0)])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("patches", [False, True])
def test_what_is_read_alone_equals_what_is_read_of_all(options, rate, patches):
    vit, crops, draw = small_vit(**options).train(), random_crops(), torch.Generator().manual_seed(5)
    mask = torch.rand(4, 8, generator=draw) < 0.4
    at = mask.flatten().nonzero()[:, 0]
    keep = m.draw_keep(draw, vit.depth, [4, 6], rate)
    rope = [m.draw_rope(draw, 2.0) for _ in range(2)]
    found = []
    for alone in (True, False):
        vit.zero_grad()
        if alone:
            cls, dense = vit.forward_read(crops, [mask, None], keep, rope, None if patches else at)
        else:
            tokens = vit.forward_crops(crops, [mask, None], keep, rope)
            cls, dense = [t.cls for t in tokens], tokens[0].patches.flatten(0, 1)
            dense = dense if patches else dense[at]
        weights = torch.randn(10 + len(dense), vit.dim, generator=torch.Generator().manual_seed(7))
        (torch.cat([*cls, dense]) * weights).sum().backward()
        gradients = {k: p.grad for k, p in vit.named_parameters() if p.grad is not None}
        found.append({"cls": torch.cat(cls), "dense": dense, **gradients})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4, msg=lambda s: f"{name}: {s}")  # noqa: B023


# precision, compilation, recomputation, many processes


def test_bf16_autocast_is_close():
    vit, (image, _) = small_vit(), random_crops()
    exact = vit(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = vit(image)
    for a, b in zip(exact, rough):
        assert (a - b.float()).norm() / a.norm() < 2e-2


def test_activation_checkpointing_changes_nothing():
    vit, crops = small_vit(), random_crops()
    keep = m.draw_keep(torch.Generator().manual_seed(3), vit.depth, [4, 6], 0.4)
    found = []
    for vit.checkpointing in (False, True):
        vit.zero_grad()
        sum(t.patches.square().sum() for t in vit.forward_crops(crops, keep=keep)).backward()
        found.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_patch_embedding_is_the_convolution_it_stores():
    vit = m.build_vit("vit_test", patch_size=4, in_chans=2)
    images = torch.randn(3, 2, 12, 20)
    expected = vit.patch_embed.proj(images).flatten(2).mT
    torch.testing.assert_close(vit.patch_embed(images), expected)


@pytest.mark.slow
def test_a_compiled_block_equals_eager():
    vit, crops = small_vit(), random_crops()
    keep = m.draw_keep(torch.Generator().manual_seed(3), vit.depth, [4, 6], 0.4)
    results = []
    for compiled in (False, True):
        if compiled:
            for block in vit.blocks:
                block.compile(fullgraph=True)
        vit.zero_grad()
        out = vit.forward_crops(crops, keep=keep)
        sum(t.patches.square().sum() for t in out).backward()
        results.append([*out[0], *out[1], *(p.grad.clone() for p in vit.blocks.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# torch 2.8 sums gradients of fully_shard over gloo ranks (twice the average, measured); train_ssl.py refuses it there
KINDS = ("ddp",) if torch.__version__.startswith("2.8") else ("ddp", "fsdp")


def distributed_worker(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    crops = [c[rank::2] for c in random_crops()]
    mask = (torch.arange(32).reshape(4, 8) % 3 == 0)[rank::2]
    for kind in KINDS:
        vit = small_vit(local_cls_norm=True)
        ssl = m.SSLModel(vit, m.ProjectionHead(64, 32, 16, 24), m.ProjectionHead(64, 32, 16, 40))
        if kind == "ddp":
            net = torch.nn.parallel.DistributedDataParallel(ssl)
        else:
            for module in (*vit.blocks, ssl.dino_head, ssl.ibot_head):
                fully_shard(module)
            net = fully_shard(ssl)
        loss_of(net(crops, mask, at=mask.flatten().nonzero()[:, 0])).backward()
        gradients = {k: p.grad for k, p in ssl.named_parameters()}
        if kind == "fsdp":
            gradients = {k: g.full_tensor() for k, g in gradients.items()}
        if rank == 0:
            torch.save(gradients, f"{folder}/{kind}.pth")
        del net
    dist.barrier()
    gc.collect()  # DDP sits in reference cycles; alive at exit, its threads abort the process
    dist.destroy_process_group()


def loss_of(out):
    return out.cls_logits.square().mean() + out.patch_logits.square().sum() / 10 + out.cls[1].square().mean()


@pytest.mark.slow
def test_two_processes_with_ddp_and_fsdp_give_the_gradients_of_one(tmp_path, on_two_ranks):
    on_two_ranks(distributed_worker, str(tmp_path))
    vit = small_vit(local_cls_norm=True)
    ssl = m.SSLModel(vit, m.ProjectionHead(64, 32, 16, 24), m.ProjectionHead(64, 32, 16, 40))
    mask = torch.arange(32).reshape(4, 8) % 3 == 0
    for rank in range(2):
        own = mask[rank::2]
        loss = loss_of(ssl([c[rank::2] for c in random_crops()], own, at=own.flatten().nonzero()[:, 0]))
        (loss / 2).backward()
    for kind in KINDS:
        found = torch.load(tmp_path / f"{kind}.pth", weights_only=True)
        for name, p in ssl.named_parameters():
            torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda s: f"{kind} {name}: {s}")


# weights in and out


def test_hugging_face_folder_gives_the_reference_outputs():
    g, image = golden("03_hf_vit_mlp_io"), golden("01_vit_mlp")
    vit = m.load_backbone(GOLDEN / "03_hf_vit_mlp")
    for prefix, mask in (("out.", None), ("out.masked.", image["input.masks"])):
        tokens = vit(image["input.image"], mask)
        everything = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
        torch.testing.assert_close(everything, g[prefix + "last_hidden_state"], **CLOSE)
        torch.testing.assert_close(tokens.cls, g[prefix + "pooler_output"], **CLOSE)


def test_hugging_face_round_trip_is_exact():
    published = safetensors.torch.load_file(GOLDEN / "03_hf_vit_mlp" / "model.safetensors")
    state, config = m.state_to_hf(m.load_backbone(GOLDEN / "03_hf_vit_mlp"))
    assert state.keys() == published.keys() and all(torch.equal(state[k], published[k]) for k in state)
    theirs = json.loads((GOLDEN / "03_hf_vit_mlp" / "config.json").read_text())
    different = {k for k in config if config[k] != theirs[k]}
    assert different == {"pos_embed_rescale"}  # ours is null on purpose
    for options in (dict(gated=True), dict(qkv_bias=False), dict(registers=0), dict(norm_eps=1e-6, rope_base=50.0)):
        vit = small_vit(**options)
        with torch.no_grad():
            for block in vit.blocks:
                if vit.blocks[0].attn.qkv.bias is not None:
                    block.attn.qkv.bias[64:128] = 0  # the layout has no bias on keys
        back = m.state_from_hf(*m.state_to_hf(vit))
        own = vit.state_dict()
        assert back.keys() == own.keys() and all(torch.equal(back[k], own[k]) for k in own)


def test_what_the_hugging_face_layout_cannot_say(capsys):
    with pytest.raises(ValueError, match="cls_norm"):
        m.state_to_hf(small_vit(cls_norm=True))
    state, _ = m.state_to_hf(small_vit(local_cls_norm=True))
    assert "local_cls_norm is left out" in capsys.readouterr().out
    assert not [k for k in state if "local" in k]


@pytest.mark.parametrize("layout", ["original", "hf", "hf_bare_file"])
@pytest.mark.parametrize("arch", COUNTS)
def test_published_layouts_of_all_sizes_are_recognised(arch, layout):
    with torch.device("meta"):
        vit = m.build_vit(arch)
        own = vit.state_dict()
        if layout == "original":
            content = {("storage_tokens" if k == "register_tokens" else k): v for k, v in own.items()}
            biases = [k for k in own if k.endswith("qkv.bias")]
            content |= {k + "_mask": own[k] for k in biases}
    if layout == "original":
        content["rope_embed.periods"] = m.rope_periods(vit.dim // vit.heads).bfloat16().float()
        config = {}
    else:
        content, config = m.state_to_hf(vit)
    _, found = m.recognise("file", content, config if layout == "hf" else {})
    dropped = {"local_cls_norm": False} if arch == "vit_7b" and layout != "original" else {}
    assert found == {"name": arch, "overrides": dropped}


def test_our_checkpoint_gives_the_teacher(tmp_path, capsys):
    teacher, student = small_vit(gated=True), small_vit(gated=True)
    torch.nn.init.normal_(student.cls_token)
    state = {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
    state["dino_head.last_layer.weight"] = torch.ones(2)
    torch.save({"format": "dinox", "version": 1, "arch": teacher.arch, "teacher": state,
                "student": {f"backbone.{k}": v for k, v in student.state_dict().items()}}, tmp_path / "x")  # fmt: skip
    loaded = m.load_backbone(tmp_path / "x")
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in loaded.state_dict().items())
    count = len(teacher.state_dict())
    assert f"vit_test, {count} matched, 0 missing, 0 unexpected tensors" in capsys.readouterr().out


def test_sharded_folder_loads(tmp_path):
    state, config = m.state_to_hf(small_vit())
    (tmp_path / "config.json").write_text(json.dumps(config))
    keys = sorted(state)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, names in shards.items():
        safetensors.torch.save_file({k: state[k] for k in names}, tmp_path / name)
    weight_map = {k: name for name, names in shards.items() for k in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = m.state_to_hf(m.load_backbone(tmp_path))[0]
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        m.load_backbone(tmp_path)


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as caught:
        m.load_backbone(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_weights_that_are_not_whole_are_refused_in_one_line(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    file = folder / "model.safetensors"
    good = safetensors.torch.load_file(file)

    def rewrite(change):
        state = dict(good)
        change(state)
        safetensors.torch.save_file(state, file)

    rewrite(lambda s: s.pop("layer.1.norm2.bias"))
    refused(folder, "missing blocks.1.norm2.bias")
    partial = m.load_backbone(folder, allow_partial=True)
    assert not partial.blocks[1].norm2.bias.any() and partial(torch.zeros(1, 3, 32, 32)).cls.isfinite().all()
    rewrite(lambda s: s.update({"layer.1.extra.weight": torch.ones(3)}))
    refused(folder, "unexpected layer.1.extra.weight")
    rewrite(lambda s: s.update({"layer.2.norm1.weight": torch.ones(7)}))
    refused(folder, r"blocks.2.norm1.weight has shape \[7\], expected \[48\]")
    refused(folder, "has shape", allow_partial=True)
    rewrite(lambda s: s.pop("layer.0.attention.v_proj.bias"))
    refused(folder, "v_proj.bias is missing")
    rewrite(lambda s: None)
    file.write_bytes(file.read_bytes()[:5000])
    refused(folder, "damaged")
    (folder / "config.json").unlink()
    file.write_bytes(b"")
    refused(file, "damaged")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        m.load_backbone(tmp_path / "nothing")


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(part(golden("01_vit_mlp"), "model."), path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    refused(path, "damaged")


def test_other_contents_are_named(tmp_path):
    path = tmp_path / "x.pth"
    state = part(golden("01_vit_mlp"), "model.")
    torch.save({"stages.0.layers.0.gamma": torch.ones(3), "norm.weight": torch.ones(3)}, path)
    refused(path, "ConvNeXt")
    torch.save({"conv1.weight": torch.ones(3)}, path)
    refused(path, "unknown layout, first keys conv1.weight")
    torch.save({"epoch": 3, **state}, path)
    refused(path, "found epoch")
    torch.save({**state, "rope_embed.periods": state["rope_embed.periods"] * 1.1}, path)
    refused(path, "not those of base 100")
    torch.save({k: v for k, v in state.items() if k != "rope_embed.periods"}, path)
    refused(path, "num_attention_heads")
    torch.save({k: v for k, v in state.items() if not k.endswith("bias_mask")}, path)
    refused(path, "bias on keys")
    torch.save({"w": torch.nn.Linear(2, 2)}, path)
    refused(path, "it needs code to load: torch.nn.modules.linear.Linear$")  # and nothing of torch's own advice
    torch.save(copy.deepcopy, path)  # a pickle that needs code to run
    refused(path, "weights-only")
    path.write_text("not a model at all")
    refused(path, "damaged")


# files that are odd: one line that names the file and what is wrong in it, never other numbers


@pytest.mark.parametrize("odd", ODD_ZIPS)
def test_a_zip_that_torch_save_would_not_write_is_refused(tmp_path, odd):
    path = tmp_path / "x.pth"
    torch.save(part(golden("01_vit_mlp"), "model."), path)
    whole = m.load_backbone(path).state_dict()
    rezipped(path, lambda name, data: [(member(name), data)])
    again = m.load_backbone(path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in whole.items())  # zipfile's own way to write is no reason
    torch.save({"x": 1, **part(golden("01_vit_mlp"), "model.")}, path)
    rezipped(path, ODD_ZIPS[odd])
    refused(path, re.escape(str(path)) + " is damaged")


def test_a_zip_with_overlapping_members_or_a_comment_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(part(golden("01_vit_mlp"), "model."), path)
    content = path.read_bytes()
    path.write_bytes(content[:-2] + (7).to_bytes(2, "little") + b"comment")
    assert zipfile.is_zipfile(path)
    refused(path, "is damaged")
    path.write_bytes(content)
    m.load_backbone(path)
    overlapped(path)
    refused(path, "(?i)is damaged.*overlap")


def test_what_claims_more_bytes_than_the_file_holds_is_refused_before_a_copy(tmp_path, monkeypatch):
    path, state = tmp_path / "x.pth", part(golden("01_vit_mlp"), "model.")
    wide = {k: v[..., :1].clone().expand(v.shape) if k.endswith("fc1.weight") else v for k, v in state.items()}
    many = state | {f"blocks.{i}.norm1.weight": state["blocks.0.mlp.fc1.weight"] for i in range(900)}
    monkeypatch.setattr(Tensor, "clone", lambda self: pytest.fail("copied"))
    for claims in ({**state, "cls_token": torch.ones(1).expand(10**12)}, wide, many):
        for content in (claims, {"teacher": {f"backbone.{k}": v for k, v in claims.items()}}):
            torch.save(content, path)
            refused(path, "tensors claim more bytes than the file holds")
    torch.save(state, path, _use_new_zipfile_serialization=False)  # takes the sizes that its pickle claims, has no CRC
    refused(path, "neither safetensors nor the zip file")


def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    for name in ("x.pth", "x.safetensors", "hf/config.json", "hf/model.safetensors.index.json", "hf/SHA256SUMS"):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        refused(folder if "hf/" in name else path, f"{folder if 'hf/' in name else path}.* not a regular file")
        path.unlink()
        shutil.copy(GOLDEN / "03_hf_vit_mlp" / "config.json", folder)
    refused("/dev/zero", "/dev/zero is damaged.* not a regular file")


def test_checksums_beside_the_weights_are_compared(tmp_path):
    """As `sha256sum` writes them, in its text and in its binary form."""
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    names, sums = ("config.json", "model.safetensors"), folder / "SHA256SUMS"
    digest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    whole = m.load_backbone(folder).state_dict()
    for form in ("{}  {}\n", "{} *{}\n", "{}  ./{}\n"):
        sums.write_text("".join(form.format(digest[name], name) for name in names))
        assert all(torch.equal(v, whole[k]) for k, v in m.load_backbone(folder).state_dict().items())
    for name in names:
        content = (folder / name).read_bytes()
        changed = bytearray(content)
        changed[-3] ^= 1 if name.endswith("s") else 0x20  # of the JSON a space
        (folder / name).write_bytes(changed)
        refused(folder, f"{name}.*its sha256 is not that in SHA256SUMS")
        (folder / name).write_bytes(content)
    sums.write_text(f"{digest['config.json']}  config.json\n{digest['model.safetensors']}  other.safetensors\n")
    refused(folder, "model.safetensors.*SHA256SUMS lists other weights and not these")
    sums.write_text(f"{'0' * 64}  unrelated.csv\n")
    m.load_backbone(folder)  # a list of other things


CONFIG = json.loads((GOLDEN / "03_hf_vit_mlp" / "config.json").read_text())
ODD_JSON = {
    "cut": json.dumps(CONFIG)[:99].encode(), "empty": b"", "BOM": b"\xef\xbb\xbf" + json.dumps(CONFIG).encode(),
    "UTF-16": json.dumps(CONFIG).encode("utf-16"), "Latin-1": b'{"a": "\xe4"}', "list": b"[{}]", "null": b"null",
    "deep": b"[" * 100_000, "long": b"9" * 10_000, "two": b"{}{}", "endless": b'{"a":"' + b" " * (1 << 24) + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_is_refused(tmp_path, name):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    for content in ODD_JSON.values():
        (folder / name).write_bytes(content)
        refused(folder, re.escape(str(folder / name)) + " is damaged; get it anew")
    shutil.copy(GOLDEN / "03_hf_vit_mlp" / "config.json", folder)


ODD_CONFIG = {
    "num_attention_heads": ["3", 0, -3, 3.0, None, True, [3], {}, math.nan, 10**30],
    "layer_norm_eps": ["1e-5", 0, -1.0, None, [], math.nan, math.inf, 10**400],
    "rope_theta": ["100", 0, None, math.inf],
    "model_type": [None, 3, ["dinov3_vit"], {"dinov3_vit": 1}, "x" * 10_000],
}


@pytest.mark.parametrize("field", ODD_CONFIG)
def test_a_field_of_config_json_of_a_wrong_type_is_named(tmp_path, field):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    for value in ODD_CONFIG[field]:
        (folder / "config.json").write_text(json.dumps({**CONFIG, field: value}))
        refused(folder, f"config.json.*{field}")


def test_the_map_of_several_files_stays_in_its_folder_and_agrees_with_them(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    shutil.copy(file, tmp_path / "out.safetensors")
    keys = list(safetensors.torch.load_file(file))
    right = dict.fromkeys(keys, file.name)

    def says(weight_map, match):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, match)

    for name in ("../out.safetensors", str(tmp_path / "out.safetensors"), "..\\out.safetensors", "config.json", "", 3):
        says(right | {keys[0]: name}, "index.json: weight_map is .* expected names of .safetensors files beside it")
    for odd in (None, [], {}, "model.safetensors", [file.name], {"a": None}, {"a": [file.name]}):
        says(odd, "index.json: weight_map is")
    says({k: right[k] for k in keys[1:]}, f"weight_map in .* differ in {keys[0]}")
    shutil.copy(file, folder / "b.safetensors")  # each tensor twice: which one is meant?
    says(right | {keys[0]: "b.safetensors"}, "weight_map in .* differ in")
    index.write_text(json.dumps({"weight_map": right}))
    m.load_backbone(folder)


def our_checkpoint(**fields):
    vit = small_vit()
    teacher = {f"backbone.{k}": v.detach() for k, v in vit.state_dict().items()}
    facts = dict(step=3, images=24, args={"lr": 1e-3}, encoding="hu16-v1", eval_view={"size": 64, "window": [40, 400]})
    facts |= dict(trained_groups=["lidc/1"], index_sha256="1" * 64, split_sha256=None)
    return {"format": "dinox", "version": 1, "arch": vit.arch, "teacher": teacher, **facts, **fields}


ODD_FACTS = {
    "step": ["3", -1, 2.5, None, True], "images": ["24"], "args": [["lr"], None, {3: 3}], "encoding": [None, 3],
    "eval_view": [None, 64, {}, {"size": 64}, {"size": "64", "window": None}, {"size": 64, "window": 7},
                  {"size": 0, "window": None}, {"size": 64, "window": "40"}, {"size": 64, "window": ["a", "b"]}],
    "trained_groups": ["lidc/1", 7, {"lidc/1": 1}, ["lidc/1", 7]], "split_sha256": [7], "index_sha256": [["1"]],
    "provenance": [None, [], {"known": 1, "seen": []}, {"known": True, "seen": [{"salt": "", "groups": [["x"]]}]},
                   {"known": True, "seen": [{"salt": "", "groups": ["x"] * 10**4}] * 2000}],
    "teacher": [None, [1], "w", {3: torch.ones(2)}, torch.ones(2)],
}  # fmt: skip


@pytest.mark.parametrize("field", ODD_FACTS)
def test_a_field_of_our_checkpoint_of_a_wrong_type_is_named(tmp_path, field):
    path = tmp_path / "x.pth"
    for value in ODD_FACTS[field]:
        torch.save(our_checkpoint(**{field: value}), path)
        refused(path, f"{path}: field {field} is .*; use another checkpoint of the same run")
        with pytest.raises(ValueError, match=f"field {field} is"):
            m.read_facts(path)


def test_facts_of_our_checkpoint(tmp_path):
    whole = our_checkpoint(trained_groups=None, eval_view={"size": 64, "window": None})
    torch.save(whole, tmp_path / "x.pth")
    facts = m.read_facts(tmp_path / "x.pth")
    assert facts == {k: v for k, v in whole.items() if k != "teacher"} and facts["trained_groups"] is None  # unknown
    for kind, version in [("dinox", True), ("dinox", 2), ("dinox", torch.ones(2)), (torch.ones(2), 1), (["dinox"], 1)]:
        torch.save(our_checkpoint(format=kind, version=version), tmp_path / "x.pth")
        refused(tmp_path / "x.pth", "format .* version .*, expected 'dinox' version 1")
    torch.save({k: v for k, v in whole.items() if k != "teacher"}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "field teacher is None")


def overrides(**options):
    return {"name": "vit_test", "overrides": {"layerscale": 0.5, **options}}


ODD_ARCHS = [None, [], "vit_test", {}, {"name": "vit_test"}, {"overrides": {}}, {"name": "vit_none", "overrides": {}}]
ODD_ARCHS += [{"name": ["vit_test"], "overrides": {}}, {"name": "vit_test", "overrides": ["dim"]}, overrides(more=1)]
ODD_ARCHS += [{"name": "vit_7b", "overrides": {}}, {"name": "vit_test", "overrides": {3: 3}}]
ODD_ARCHS += [overrides(**{name: value}) for name, values in {
    "depth": (10**9, 999, 3, 0, -1, "2", 2.0, None, math.nan), "dim": (10**12, 128, [64]), "heads": (0, -2, 5, "2"),
    "ffn_dim": (10**12, 64), "patch_size": (0, 10**9), "in_chans": (1, {}), "registers": (-4, 10**6, 0),
    "gated": ("yes", 2, True), "layerscale": ("x", math.nan, math.inf), "norm_eps": ([], -1), "rope_base": (10**400,),
}.items() for value in values]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_ARCHS, ids=str)
def test_an_arch_that_the_weights_do_not_have_is_refused_before_it_is_built(tmp_path, monkeypatch, odd):
    torch.save(our_checkpoint(arch=odd), tmp_path / "x.pth")
    if odd != overrides(heads=5):  # 64 is no multiple of 4 * 5: that the constructor itself says, first thing
        monkeypatch.setattr(m.VisionTransformer, "__init__", lambda *_, **__: pytest.fail("built"))
    refused(tmp_path / "x.pth", f"{tmp_path / 'x.pth'}: .*arch|multiple of 4")


@pytest.mark.parametrize("options", [dict(depth=10**9), dict(depth=1001), dict(dim=2**21), dict(gated=3)], ids=str)
def test_an_option_that_is_no_possible_size_is_refused_at_once(options):
    with pytest.raises(ValueError, match=f"arch option {[*options][0]} is .*: not a possible value"):
        m.build_vit("vit_test", **options)


def test_whole_numbers_are_numbers_too():
    vit = m.build_vit("vit_test", layerscale=1, norm_eps=1, rope_base=100)
    assert vit.blocks[0].ls1.gamma.dtype == torch.float32 and (vit.blocks[0].ls1.gamma == 1).all()
    assert vit(torch.zeros(1, 3, 32, 32)).cls.isfinite().all()
    assert json.dumps(m.state_to_hf(vit)[1]["layerscale_value"]) == "1.0"


def odd_weights():
    """(change of the original layout's state dict, what is said)."""
    yield {"blocks.99999999.norm1.weight": torch.ones(2)}, "depth is 100000000"
    yield {"blocks.1_0.norm1.weight": torch.ones(2), "blocks.x": torch.ones(1)}, "2 unexpected"
    yield {"patch_embed.proj.weight": torch.ones(48)}, r"patch_embed.proj.weight has shape \[48\], expected 4 axes"
    yield {"patch_embed.proj.weight": torch.ones(0, 3, 16, 16)}, "dim is 0"
    yield {"blocks.0.mlp.fc1.weight": torch.ones(())}, r"fc1.weight has shape \[\], expected 2 axes"
    yield {"storage_tokens": torch.ones(4)}, r"register_tokens has shape \[4\], expected 3 axes"
    yield {"register_tokens": torch.ones(1, 4, 48)}, "register_tokens and storage_tokens"
    yield {"blocks.9.attn.qkv.bias": torch.ones(1)}, ""
    for periods in (torch.ones(()), torch.ones(0), torch.ones(7), torch.ones(2, 2)):
        yield {"rope_embed.periods": periods}, ""
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield {"norm.weight": torch.ones(48).to(dtype)}, "norm.weight is of torch"
    yield {"norm.weight": torch.ones(48).to_sparse()}, ""
    yield {"norm.weight": torch.empty(48, device="meta")}, ""
    yield {"norm.weight": [1.0] * 48}, "found norm.weight"
    yield {3: torch.ones(3)}, "found 3"
    yield {"a\nb" * 1000: torch.ones(3)}, "unexpected a b"


@pytest.mark.parametrize("change, said", list(odd_weights()), ids=lambda value: str(value)[:40].split("\n")[0])
def test_odd_names_and_shapes_are_refused(tmp_path, change, said):
    path = tmp_path / "x.pth"
    torch.save(part(golden("01_vit_mlp"), "model.") | change, path)
    refused(path, f"{path}.*{said}")


@pytest.mark.parametrize(
    "name, shape, said",
    [("layer.1.attention.q_proj.weight", (3, 48), ""), ("layer.1.attention.k_proj.weight", (), ""),
     ("layer.0.attention.q_proj.bias", (), ""), ("layer.0.attention.k_proj.bias", (48,), "a bias on keys"),
     ("cls_token", (1, 1, 48), "there twice"), ("blocks.0.norm1.weight", (48,), "there twice"), ("layer", (1,), ""),
     ("layer.0", (1,), "unexpected layer.0"), ("x.attention.q_proj.weight", (2,), "is missing"),
     ("embeddings.mask_token", (0,), "")],
)  # fmt: skip
def test_odd_tensors_of_the_hugging_face_layout_are_refused(tmp_path, name, shape, said):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "03_hf_vit_mlp", folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**state, name: torch.ones(shape)}, folder / "model.safetensors")
    refused(folder, f"{folder}.*{said}")


def test_a_part_of_less_than_half_of_the_weights_is_no_part(tmp_path):
    """A patch embedding of one pixel costs a file 8 MB; blocks of that width, made for a part, would take 50 TB."""
    path, one = tmp_path / "x.pth", torch.ones(1 << 20)
    state = {"cls_token": one[None, None], "patch_embed.proj.weight": one[:, None, None, None].clone()}
    teacher = {"backbone.blocks.0.norm1.weight": one, "backbone.blocks.0.mlp.fc1.weight": one[:1].expand(1, 1 << 20)}
    teacher = {k: v.clone() for k, v in (teacher | {f"backbone.{k}": v for k, v in state.items()}).items()}
    options = dict(dim=1 << 20, depth=1, ffn_dim=1, in_chans=1, patch_size=1, registers=0, qkv_bias=False)
    torch.save(our_checkpoint(teacher=teacher, arch={"name": "vit_test", "overrides": options}), path)
    refused(path, "4 matched, .* missing", allow_partial=True)
    most = {k: v for k, v in our_checkpoint()["teacher"].items() if "norm2" not in k}
    torch.save(our_checkpoint(teacher=most), path)
    assert not m.load_backbone(path, allow_partial=True).blocks[1].norm2.bias.any()


def test_quiet_prints_nothing(capfd):
    loud = m.load_backbone(GOLDEN / "03_hf_vit_mlp").state_dict()
    assert capfd.readouterr().out.count("\n") == 1
    quiet = m.load_backbone(GOLDEN / "03_hf_vit_mlp", quiet=True).state_dict()
    assert capfd.readouterr() == ("", "") and all(torch.equal(quiet[k], v) for k, v in loud.items())


def test_the_example_in_the_docstring_trains():
    example = textwrap.dedent("\n".join(line for line in m.__doc__.splitlines() if line.startswith("    ")))
    assert 5 <= len(example.splitlines()) <= 10
    seen = {"torch": torch, "build_vit": lambda name: m.build_vit("vit_test"), "load_backbone": m.load_backbone}
    seen |= {"images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    torch.manual_seed(0)
    exec(example, seen)
    first = seen["loss"].item()
    loss = torch.nn.functional.cross_entropy(seen["head"](seen["vit"](seen["images"]).cls), seen["labels"])
    assert loss.item() < first


def test_no_other_file_of_ours_is_named():
    assert not re.search(r"\b\w+\.py\b|\btools/|--[a-z]", inspect.getsource(m))


def test_wrong_use_says_both_numbers():
    vit = small_vit()
    with pytest.raises(ValueError, match="width 40 is not a multiple of the patch size 16"):
        vit(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"\[B, 3, height, width\], got \[1, 1, 32, 32\]"):
        vit(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="layer 2 does not exist: this backbone has 2 blocks"):
        vit.attention(torch.zeros(1, 3, 32, 32), 2)
    with pytest.raises(ValueError, match="unknown arch 'vit_hug': known are vit_test"):
        m.build_vit("vit_hug")
    with pytest.raises(ValueError, match="unknown arch option depht"):
        m.build_vit("vit_test", depht=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        m.build_vit("vit_test", heads=5)
    assert m.build_vit("vit_test", in_chans=1, patch_size=8)(torch.zeros(1, 1, 24, 8)).patches.shape == (1, 3, 64)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_small", "vit_small_plus", "vit_base", "vit_large"])
def test_exports_open_in_transformers_with_the_same_outputs(arch, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (it is never required)")
    torch.manual_seed(0)
    vit = m.build_vit(arch, layerscale=0.3).eval()
    state, config = m.state_to_hf(vit)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = theirs.eval()(image), vit(image)
    torch.testing.assert_close(found.patches, expected.last_hidden_state[:, 5:], **CLOSE)
    torch.testing.assert_close(found.cls, expected.pooler_output, **CLOSE)


def test_narrow_tokens_are_of_autocast_alone():
    """A look at val_select computes in float32 whatever --precision says of training."""
    vit, images = m.build_vit("vit_test", layerscale=0.5).eval(), torch.randn(2, 3, 32, 32)
    expected = vit(images).cls
    vit.stream = torch.bfloat16
    assert torch.equal(vit(images).cls, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(vit(images).cls, expected) and (vit(images).cls - expected).abs().max() < 0.1
