"""Adapters and the classifier: identity, merging after training, gradients by hand, and who is trained."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_model import random_crops as crops
from test_model import small_vit

import model as m
import monitor
from tools.lib import optim

KINDS = [(norm, init) for norm in m.ADAPTER_NORMS for init in ("zero", "pissa")]


def adapted(norm="doran", targets="all", init="zero", perturb=0.1, **options):
    """A small backbone with adapters that are not at their start."""
    vit = small_vit(**{k: options.pop(k) for k in ("gated", "qkv_bias") if k in options})
    names = m.add_adapters(vit, 4, 8, norm, targets, init, **options)
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if name in names:
                p.add_(perturb * torch.randn_like(p))
    return vit


@torch.no_grad()  # training scales weights instead of results where there is no adapter
def everything(vit):
    """All tokens of a packed pass, and the rows that forward_read gives."""
    dense = [t for tokens in vit.forward_crops(crops()) for t in tokens]
    cls, patches = vit.forward_read(crops(), at=torch.tensor([0, 5, 11]))
    return [*dense, *cls, patches]


def apart(found, expected):
    """Largest relative distance of two lists of tensors."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected))


def train(vit, steps=3, lr=0.02):
    """A few updates towards random targets; every trained parameter moves."""
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in vit.parameters() if p.requires_grad], lr=lr)
    images, target = crops()[0], torch.randn(4, 64)
    for _ in range(steps):
        tokens = vit(images)
        loss = F.mse_loss(tokens.cls, target) + tokens.patches.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in vit.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


# identity and merging


@pytest.mark.parametrize("norm, init", KINDS)
def test_adapters_change_nothing_at_the_start(norm, init):
    for gated in (False, True):
        vit = small_vit(gated=gated, qkv_bias=not gated)
        with torch.no_grad():
            vit.blocks[0].attn.proj.weight[3] = 0  # a row of zeros has no direction
        expected = everything(vit)
        base = {name: p.detach().clone() for name, p in vit.named_parameters()}
        names = m.add_adapters(vit, 4, 8, norm, "q v proj mlp", init)
        largest = max((a - b).abs().max().item() for a, b in zip(everything(vit), expected))
        assert largest == 0.0 if init == "zero" else largest < 1e-5
        if init == "pissa":
            assert apart(everything(vit), expected) < 1e-6
            moved = vit.blocks[0].mlp.w1 if gated else vit.blocks[0].mlp.fc1
            singular = torch.linalg.svdvals(base["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"])
            torch.testing.assert_close(torch.linalg.svdvals(moved.weight)[: len(singular) - 4], singular[4:])
        assert set(base) == {name for name, _ in vit.named_parameters()} - set(names)
        assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"} | (
            {"magnitude"} if norm[:3] == "dor" else set()) | ({"tau"} if norm == "doran" else set())  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("norm, init", KINDS)
def test_merged_equals_unmerged_after_training_and_again(norm, init, tmp_path):
    vit = adapted(norm, init=init, unfreeze=1, blocks=[0])
    for again in range(2):
        train(vit)
        vit.eval()
        kept = copy.deepcopy(vit.state_dict())
        expected = everything(vit)
        plain = m.merge_adapters(vit)
        assert type(plain) is m.VisionTransformer and plain.arch == small_vit().arch
        assert type(plain.blocks[0].attn.qkv) is torch.nn.Linear and not m.adapted_layers(plain)
        assert plain.state_dict().keys() == small_vit().state_dict().keys()
        assert all(p.requires_grad for p in plain.parameters()) and not plain.training
        assert apart(everything(plain), expected) < 1e-6
        assert apart([plain.attention(crops()[0], 1)], [vit.attention(crops()[0], 1)]) < 1e-6
        second = m.merge_adapters(copy.deepcopy(vit))  # of a copy: the original stays as it is
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), second.parameters()))
        assert all(torch.equal(kept[name], value) for name, value in vit.state_dict().items())
        assert apart(everything(vit), expected) == 0
        if not again:  # adapters on what was merged, trained and merged once more
            start = apart(everything(small_vit()), expected)
            assert start > 0.1, "training changed too little to show anything"
            vit = plain
            m.add_adapters(vit, 3, 5, norm, "qv", init, unfreeze=1)


@pytest.mark.parametrize("norm", m.ADAPTER_NORMS)
def test_a_checkpoint_with_adapters_loads_merged(norm, tmp_path):
    vit = adapted(norm, "k v mlp").eval()
    path = tmp_path / "last.pth"
    state = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    content = dict(format="dinox", version=1, arch=vit.arch, teacher=state, student=state)
    torch.save(content, path)
    found = m.load_backbone(path, quiet=True)
    assert apart(everything(found), everything(vit)) < 1e-6
    assert found.arch == small_vit().arch and all(p.requires_grad for p in found.parameters())
    rebuilt = m.build_arch(vit.arch)
    rebuilt.load_state_dict(vit.state_dict())
    assert apart(everything(rebuilt.eval()), everything(vit)) == 0
    theirs, config = m.state_to_hf(vit)
    plain = m.build_vit("vit_test")
    plain.load_state_dict(m.state_from_hf(theirs, config))
    assert apart(everything(plain.eval()), everything(vit)) < 1e-6

    missing = dict(content, teacher={k: v for k, v in state.items() if k != "backbone.blocks.1.attn.qkv.lora_b"})
    torch.save(missing, path)
    with pytest.raises(ValueError, match=r"1 missing, .*missing blocks.1.attn.qkv.lora_b"):
        m.load_backbone(path, quiet=True, allow_partial=True)  # never half an adapter
    torch.save(dict(content, arch={k: v for k, v in vit.arch.items() if k != "adapters"}), path)
    with pytest.raises(ValueError, match="unexpected blocks.0.attn.qkv.lora_a"):
        m.load_backbone(path, quiet=True)
    for field, value in [("rank", 10**12), ("rank", "4"), ("blocks", 7.5), ("targets", 3), ("new", 1), ("alpha", None)]:
        torch.save(dict(content, arch={**vit.arch, "adapters": {**vit.arch["adapters"], field: value}}), path)
        with pytest.raises(ValueError, match="last.pth.*(adapter|adapters)"):
            m.load_backbone(path, quiet=True)


def test_the_monitor_builds_what_a_run_with_adapters_saved():
    vit = adapted("dora", "qv", unfreeze=1)
    heads = [m.ProjectionHead(64, 32, 16, 24) for _ in range(2)]
    student = m.SSLModel(vit, *heads).eval()
    sizes = dict(head_hidden=32, head_bottleneck=16, prototypes=24)
    state = {"args": sizes, "arch": vit.arch, "student": student.state_dict()}
    found = monitor.build(state, "student", torch.device("cpu"))
    assert apart(everything(found.backbone), everything(vit)) == 0


# gradients


def by_hand(layer, x, bias, gradient):
    """Output and gradients of x and the adapter's parameters, derived on paper; one piece after the other.

    y = g * (x V') + bias, V = W + s B A, g = magnitude / (|V| + softplus(tau)), |V| a constant.
    """
    count, rows = len(layer.chosen), layer.out_features // layer.pieces
    y = x @ layer.weight.T + bias
    found = {"x": gradient @ layer.weight}
    for k, piece in enumerate(layer.chosen):
        at, own = slice(piece * rows, (piece + 1) * rows), slice(k * rows, (k + 1) * rows)
        w, b = layer.weight[at], layer.lora_b[own]
        a = layer.lora_a[k * len(layer.lora_a) // count :][: len(layer.lora_a) // count]
        v = w + layer.scale * b @ a
        g, G = torch.ones(rows, dtype=x.dtype), gradient[:, at]
        if layer.magnitude is not None:
            divisor = v.square().sum(1).sqrt()
            if layer.tau is not None:
                divisor = divisor + torch.log1p(layer.tau[k].exp())
            g = layer.magnitude[own] / divisor
            of_g = (G * (x @ v.T)).sum(0)
            found.setdefault("magnitude", []).append(of_g / divisor)
            if layer.tau is not None:
                slope = torch.sigmoid(layer.tau[k])  # of softplus
                found.setdefault("tau", []).append((-of_g * g / divisor).sum()[None] * slope)
        y[:, at] = g * (x @ v.T) + bias[at]
        of_v = (G * g).T @ x
        found.setdefault("lora_b", []).append(layer.scale * of_v @ a.T)
        found.setdefault("lora_a", []).append(layer.scale * b.T @ of_v)
        found["x"] = found["x"] + (G * g) @ v - G @ w
    return y, {k: v if k == "x" else torch.cat(v) for k, v in found.items()}


@pytest.mark.parametrize("norm", m.ADAPTER_NORMS)
@pytest.mark.parametrize("place", ["attn.qkv", "mlp.fc2"])
def test_gradients_are_those_of_a_derivation_by_hand(norm, place):
    layer = adapted(norm, "q v mlp").blocks[1].get_submodule(place).double()
    x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(layer.out_features, dtype=torch.float64)
    gradient = torch.randn(5, layer.out_features, dtype=torch.float64)
    y = layer(x, bias)
    y.backward(gradient)
    found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters() if p.requires_grad}}
    with torch.no_grad():
        expected, gradients = by_hand(layer, x, bias, gradient)
        torch.testing.assert_close(y, expected)
    assert found.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(found[name], value, msg=lambda s: f"{name}: {s}")
        assert value.abs().max() > 1e-4
    for name in {"magnitude", "tau"} & found.keys():  # the norm does not depend on them: finite differences hold
        p, eps = getattr(layer, name), 1e-6
        with torch.no_grad():
            p[-1] += eps
            slope = ((layer(x, bias) - y) * gradient).sum() / eps
            p[-1] -= eps
        torch.testing.assert_close(found[name][-1], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", m.ADAPTER_NORMS)
@pytest.mark.parametrize("targets", ["qv", "k proj", "all"])
def test_gradients_of_a_whole_backbone_are_finite_differences(norm, targets):
    """Along random directions of one parameter at a time; the row norms stay, as the method says (arXiv:2402.09353)."""
    vit = adapted(norm, targets, unfreeze=1, gated=targets == "k proj").double()
    images, names = crops()[0].double(), ("lora_a", "lora_b", "magnitude", "tau", "norm1.weight", "mlp.w2.weight")

    def loss():
        tokens = vit(images)
        return tokens.cls.square().sum() + tokens.patches.pow(3).mean()

    loss().backward()
    for layer in m.adapted_layers(vit).values():
        kept = layer.changed()
        layer.changed = lambda dtype=None, kept=kept: kept
    checked = {name: p for name, p in vit.named_parameters() if p.requires_grad and name.endswith(names)}
    assert {name.rpartition(".")[2] for name in checked} >= {"lora_a", "lora_b"}
    for name, p in checked.items():
        direction, eps = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype), 1e-5
        with torch.no_grad():
            ends = [p.add_(step * direction) is p and loss() for step in (eps, -2 * eps)]
            p.add_(eps * direction)
        slope, expected = (p.grad * direction).sum(), (ends[0] - ends[1]) / (2 * eps)
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7, msg=lambda s: f"{name}: {s}")
        assert p.grad.abs().max() > 1e-6, name


def test_doran_without_tau_is_dora_and_a_large_tau_scales_lora():
    dora, doran = adapted("dora"), adapted("doran")
    layer, other = dora.blocks[0].attn.qkv, doran.blocks[0].attn.qkv
    x = torch.randn(5, 64)
    with torch.no_grad():
        for name in ("lora_a", "lora_b", "magnitude"):
            getattr(other, name).copy_(getattr(layer, name))
        other.tau.fill_(-torch.inf)
        assert torch.equal(layer(x), other(x))
        other.tau.fill_(1e6)
        other.magnitude.fill_(1e6)
        torch.testing.assert_close(other(x), F.linear(x, torch.cat(other.changed()), other.bias), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa", "dora"])
def test_outputs_and_gradients_are_those_of_peft(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = small_vit()
    m.add_adapters(ours, 4, 6, "lora" if kind == "pissa" else kind, "proj", "pissa" if kind == "pissa" else "zero")
    layer = ours.blocks[0].attn.proj
    theirs = torch.nn.ModuleDict({"proj": torch.nn.Linear(64, 64)})
    theirs.load_state_dict({f"proj.{k}": v for k, v in small_vit().blocks[0].attn.proj.state_dict().items()})
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["proj"], use_dora=kind == "dora", use_rslora=kind == "rslora",
        init_lora_weights="pissa" if kind == "pissa" else True,
    )  # fmt: skip
    net = peft.get_peft_model(theirs, config)
    other = net.base_model.model["proj"]
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    pairs = [(layer.lora_a, a), (layer.lora_b, b)]
    with torch.no_grad():
        if kind == "pissa":  # signs of singular vectors are free, the products are not
            torch.testing.assert_close(layer.lora_b @ layer.lora_a, b @ a, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(layer.weight, other.base_layer.weight, atol=1e-5, rtol=1e-4)
        if kind == "dora":
            magnitude = other.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(layer.magnitude, magnitude)
            pairs.append((layer.magnitude, magnitude))
        for mine, its in pairs:
            its.copy_(mine.add_(0.1 * torch.randn_like(mine)))
    x = torch.randn(7, 64)
    for output in (layer(x), other(x)):
        output.square().sum().backward()
    torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-5)
    for mine, its in pairs:
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-4, rtol=1e-4)


# who is trained


def test_the_optimizer_holds_exactly_what_is_trained():
    vit = small_vit()
    names = m.add_adapters(vit, 4, 8, "doran", "qv", unfreeze=1)
    net = m.Classifier(vit, m.Head(64, 3))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"backbone.{name}" for name in names} | {"head.last_layer.weight", "head.last_layer.bias"}
    expected = {name for name, _ in vit.named_parameters() if name.startswith("blocks.1.")}
    expected |= {f"blocks.0.norm{i}.{kind}" for i in "12" for kind in ("weight", "bias")} | {"norm.weight", "norm.bias"}
    expected |= {f"blocks.0.attn.qkv.{kind}" for kind in ("lora_a", "lora_b", "magnitude", "tau")}
    assert set(names) == expected
    groups = optim.param_groups(net, 0.9, 0.2)
    held = [p for group in groups for p in group["params"]]
    kept = {id(p) for name, p in net.named_parameters() if name in trained}
    assert len(held) == len(trained) and {id(p) for p in held} == kept
    plain = {id(p) for group in groups if group["wd_factor"] == 0 for p in group["params"]}
    layer = vit.blocks[0].attn.qkv
    assert {id(layer.magnitude), id(layer.tau)} <= plain and not {id(layer.lora_a), id(layer.lora_b)} & plain
    train(vit)  # checks that these move and no others
    counts = {"lora_a": 8 * 64, "lora_b": 128 * 4, "magnitude": 128, "tau": 2}
    said = m.say_trained(vit)
    assert all(f"{kind} {n:,}" in said for kind, n in counts.items()), said
    n = sum(p.numel() for name, p in vit.named_parameters() if name in names)
    assert said.startswith(f"{n:,} of {sum(p.numel() for p in vit.parameters()):,} parameters are trained")


def test_blocks_and_targets_are_those_named():
    def layers(**options):
        vit = m.build_vit("vit_test", depth=4, gated=options.pop("gated", False))
        m.add_adapters(vit, 2, 4, **options)
        return set(m.adapted_layers(vit)), vit

    assert layers(targets="qkv", blocks=2)[0] == {"blocks.2.attn.qkv", "blocks.3.attn.qkv"}
    assert layers(targets="qkv", blocks=1, unfreeze=1)[0] == {"blocks.2.attn.qkv"}
    assert layers(targets=["proj"], blocks=[0, 2])[0] == {"blocks.0.attn.proj", "blocks.2.attn.proj"}
    assert layers(targets="w3,w1", blocks=[1], gated=True)[0] == {"blocks.1.mlp.w1", "blocks.1.mlp.w3"}
    names, vit = layers(blocks=[1], gated=True)
    assert names == {f"blocks.1.{x}" for x in ("attn.qkv", "attn.proj", "mlp.w1", "mlp.w2", "mlp.w3")}
    assert vit.blocks[1].attn.qkv.chosen == [0, 1, 2]
    assert layers(targets="v q")[1].blocks[3].attn.qkv.chosen == [0, 2]
    assert layers(targets="k")[1].blocks[3].attn.qkv.lora_b.shape == (64, 2)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(targets="query"), "targets 'query': this backbone has q, k, v, proj, fc1, fc2; mlp .* qv, qkv, all"),
        (dict(targets="q w1"), "targets 'q w1'"),
        (dict(targets=""), "targets ''"),
        (dict(norm="vera"), "norm 'vera', init 'zero': known are lora, rslora, dora, doran; zero, pissa"),
        (dict(init="gauss"), "init 'gauss'"),
        (dict(rank=0), "rank 0, alpha 8: a rank is 1 to 64"),
        (dict(rank=65), "rank 65"),
        (dict(alpha=0), "alpha 0"),
        (dict(unfreeze=2), "unfreeze 2: 0 to 1 of 2 blocks"),
        (dict(blocks=[1], unfreeze=1), r"blocks \[1\]: choose of 0 to 0"),
        (dict(blocks=3), "choose of 0 to 1"),
        (dict(blocks=[-1]), "choose of 0 to 1"),
        (dict(blocks=[]), "choose of 0 to 1"),
    ],
)
def test_what_matches_nothing_is_refused_and_nothing_is_changed(options, sentence):
    vit = small_vit()
    with pytest.raises(ValueError, match=sentence):
        m.add_adapters(vit, **{**dict(rank=4, alpha=8), **options})
    assert not m.adapted_layers(vit) and all(p.requires_grad for p in vit.parameters()) and "adapters" not in vit.arch
    m.add_adapters(vit, 4, 8)
    with pytest.raises(ValueError, match="has adapters already"):
        m.add_adapters(vit, 4, 8)


# what else runs a block


def test_checkpointing_packing_and_autocast_change_nothing():
    vit = adapted("doran")
    keep = m.draw_keep(torch.Generator().manual_seed(3), vit.depth, [4, 6], 0.4)
    at = torch.arange(0, 32, 3)
    found = []
    for vit.checkpointing in (False, True):
        vit.zero_grad()
        dense = vit.forward_crops(crops(), keep=keep)
        cls, patches = vit.forward_read(crops(), keep=keep, at=at)
        torch.testing.assert_close(patches, dense[0].patches.flatten(0, 1)[at], atol=1e-5, rtol=1e-4)
        for a, tokens in zip(cls, dense):
            torch.testing.assert_close(a, tokens.cls, atol=1e-5, rtol=1e-4)
        (sum(c.square().sum() for c in cls) + patches.square().sum()).backward()
        found.append([p.grad.clone() for p in vit.parameters() if p.requires_grad])
    assert len(found[0]) == 32 and all(torch.equal(a, b) for a, b in zip(*found))
    layer, x = vit.blocks[0].mlp.fc1, torch.randn(9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        norms = layer.norms(layer.changed())  # in float32 all the same
        assert apart([layer(x).float()], [F.linear(x, layer.merged(), layer.bias)]) < 1e-2
    assert torch.equal(norms, layer.norms(layer.changed()))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_equal_eager(backend):
    """eager: the graph has no breaks."""
    vit, found = adapted("doran", "q v mlp"), []
    for compiled in (False, True):
        for block in vit.blocks[: 1 if backend == "eager" else 2] if compiled else ():
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        vit.zero_grad()
        tokens = vit(crops()[0])
        (tokens.cls.square().sum() + tokens.patches.square().sum()).backward()
        found.append([*tokens, *(p.grad for p in vit.parameters() if p.requires_grad)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# torch 2.8 sums gradients of fully_shard over gloo ranks (twice the average, measured); train_ssl.py refuses it there
WRAPPERS = ("ddp",) if torch.__version__.startswith("2.8") else ("ddp", "fsdp")


def classifier():
    return m.Classifier(adapted("doran", "q v proj", unfreeze=1), m.Head(128, 3), "both")  # one tau of proj, two ranks


def gradients_of_a_rank(rank, world, folder):
    """Gradients by each wrapper, as one process of `world` finds them."""
    from torch.distributed.fsdp import fully_shard

    if world > 1:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for kind in WRAPPERS:
        net = plain = classifier()
        if kind == "ddp":
            net = torch.nn.parallel.DistributedDataParallel(plain)
        else:
            for block in plain.backbone.blocks:
                fully_shard(block)
            fully_shard(plain)
        net(crops()[0][rank::world]).square().sum().backward()
        found = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
        if kind == "fsdp":
            found = {name: g.full_tensor() for name, g in found.items()}
            with pytest.raises(ValueError, match="these weights are shards"):
                m.merge_adapters(plain.backbone)
        if rank == 0:
            torch.save(found, f"{folder}/{kind}.pth")
        del net, plain
    dist.barrier()
    gc.collect()  # DDP sits in reference cycles; alive at exit, its threads abort the process
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ddp_and_fsdp_give_the_gradients_of_one_process(world, tmp_path, on_two_ranks):
    if world == 1:
        gradients_of_a_rank(0, 1, tmp_path)
    else:
        on_two_ranks(gradients_of_a_rank, world, tmp_path)
    net = classifier()
    for rank in range(world):
        (net(crops()[0][rank::world]).square().sum() / world).backward()
    expected = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    for kind in WRAPPERS:
        found = torch.load(tmp_path / f"{kind}.pth", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=lambda s: f"{kind} {name}: {s}")


# the classifier


def test_features_leave_registers_out():
    vit, images = small_vit().eval(), crops()[0]
    cls, _, patches = vit(images)
    for pool, expected in (("cls", cls), ("mean", patches.mean(1)), ("both", torch.cat([cls, patches.mean(1)], 1))):
        net = m.Classifier(vit, m.Head(expected.shape[1], 3), pool).eval()
        assert torch.equal(net.features(images), expected)
        assert torch.equal(net(images), F.linear(expected, net.head.last_layer.weight, net.head.last_layer.bias))
    first, last = vit.intermediate(images, 2)
    net = m.Classifier(vit, m.Head(256, 3), "both", layers=2)
    parts = [first.cls, first.patches.mean(1), last.cls, last.patches.mean(1)]
    assert torch.equal(net.features(images), torch.cat(parts, 1))
    for pool, dim in (("max", 64), ("cls", 63), ("both", 64)):
        with pytest.raises(ValueError, match=f"pool '{pool}' of 1 layers: known are cls, mean and both"):
            m.Classifier(vit, m.Head(dim, 3), pool)


def test_every_trained_parameter_has_a_gradient():
    for pool in ("cls", "mean", "both"):
        vit = small_vit(cls_norm=True, local_cls_norm=True)
        net = m.Classifier(vit, m.Head(128 if pool == "both" else 64, 3), pool).train()
        net(crops()[0]).square().sum().backward()
        without = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (pool, without)


def test_a_frozen_backbone_stays_in_eval_mode_and_dropout_can_be_given():
    vit = small_vit().requires_grad_(False)
    net = m.Classifier(vit, m.Head(64, 3, dropout=0.5)).train()
    assert net.head.training and not any(module.training for module in vit.modules())
    logits = net(crops()[0])
    assert logits.requires_grad and not net.features(crops()[0]).requires_grad
    keep = torch.rand(4, 64) < 0.5
    features = net.features(crops()[0])
    assert torch.equal(net(crops()[0], keep), net.head.last_layer(features * keep * 2))
    assert torch.equal(net.eval()(crops()[0]), net.head.last_layer(features))
    vit.norm.requires_grad_()
    assert all(module.training for module in net.train().modules())
    torch.manual_seed(0)
    shares = (net.head(torch.ones(1000, 64), torch.rand(1000, 64) < 0.5) - net.head.last_layer(torch.ones(64))).mean(0)
    assert shares.abs().max() < 0.05  # the mean is kept
