import copy
import gc
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
                for kept, branch in zip(rows, (lambda y: block.ls1(block.attn(block.norm1(y), shape, [rope])),
                                               lambda y: block.ls2(block.mlp(block.norm2(y))))):  # fmt: skip
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
    return out.cls_logits.square().mean() + out.patch_logits.square().sum() / 10 + out.tokens[1].cls.square().mean()


def test_two_processes_with_ddp_and_fsdp_give_the_gradients_of_one(tmp_path):
    mp.spawn(distributed_worker, (str(tmp_path),), 2)
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
    state = {f"backbone.{k}": v for k, v in teacher.state_dict().items()} | {
        "dino_head.last_layer.weight": torch.ones(2)
    }
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
    torch.save(copy.deepcopy, path)  # a pickle that needs code to run
    refused(path, "weights-only")
    path.write_text("not a model at all")
    refused(path, "damaged")


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
