"""Optimizers: one and two steps by hand, a bowl, two moons, and a resume to the bit."""

import copy
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
from tools.lib import optim

W, G1, G2 = [0.5, -2.0, 3.0], [0.1, -0.4, 0.0], [0.3, 0.2, -1.0]


def parameter(values=W):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def stepped(make, gradients=(G1, G2), before=None):
    """Weights after each of some steps with given gradients."""
    p = parameter()
    optimizer, found = make([p]), []
    for t, g in enumerate(gradients):
        p.grad = torch.tensor(g, dtype=torch.float64)
        if before:
            before(optimizer, p, t)
        optimizer.step()
        found.append(p.tolist())
    return found, optimizer, p


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-9)


# by hand: each number of the vector on its own


def test_ademamix_by_hand():
    lr, b1, b2, b3, alpha, warmup, wd = 0.1, 0.8, 0.9, 0.99, 3.0, 4, 0.01
    expected, m1, m2, v, w = [], [0] * 3, [0] * 3, [0] * 3, list(W)
    for t, g in ((1, G1), (2, G2)):
        share = t / warmup
        slow = math.exp(math.log(b1) * math.log(b3) / ((1 - share) * math.log(b3) + share * math.log(b1)))
        for i in range(3):
            m1[i] = b1 * m1[i] + (1 - b1) * g[i]
            m2[i] = slow * m2[i] + (1 - slow) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            up = m1[i] / (1 - b1**t) + alpha * share * m2[i]
            w[i] -= lr * (up / (math.sqrt(v[i] / (1 - b2**t)) + 1e-8) + wd * w[i])
        expected.append(list(w))
    found, _, _ = stepped(lambda ps: optim.AdEMAMix(ps, lr, (b1, b2, b3), alpha, warmup, weight_decay=wd))
    close(found, expected)
    late, _, _ = stepped(lambda ps: optim.AdEMAMix(ps, lr, (b1, b2, b3), alpha, 1, weight_decay=wd))
    never, _, _ = stepped(lambda ps: optim.AdEMAMix(ps, lr, (b1, b2, b3), alpha, 0, weight_decay=wd))
    close(late, never)
    plain, _, _ = stepped(lambda ps: optim.AdEMAMix(ps, lr, (b1, b2, b3), 0.0, 0, weight_decay=wd))
    adamw, _, _ = stepped(lambda ps: torch.optim.AdamW(ps, lr, (b1, b2), weight_decay=wd))
    close(plain, adamw)


def test_sophia_by_hand():
    lr, b1, b2, gamma, wd = 0.1, 0.8, 0.9, 0.5, 0.01
    hessians = [[2.0, 0.0, -1.0], [4.0, 0.01, 8.0]]
    expected, m, h, w = [], [0] * 3, [0] * 3, list(W)
    for g, seen in zip((G1, G2), hessians):
        for i in range(3):
            h[i] = b2 * h[i] + (1 - b2) * seen[i]
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            w[i] -= lr * wd * w[i]
            w[i] -= lr * max(-1, min(1, m[i] / max(gamma * h[i], 1e-12)))
        expected.append(list(w))

    def before(optimizer, p, t):
        optimizer.observe({p: torch.tensor(hessians[t], dtype=torch.float64)})

    found, _, _ = stepped(lambda ps: optim.Sophia(ps, lr, (b1, b2), gamma, weight_decay=wd), before=before)
    close(found, expected)


def test_estimates_of_the_hessian():
    w = parameter()
    h = torch.tensor([2.0, 3.0, -1.0], dtype=torch.float64)
    other = parameter([1.0])
    w.grad = h.clone()
    assert torch.equal(optim.gauss_newton([w, other], 5)[w], 5 * h**2) and len(optim.gauss_newton([w, other], 5)) == 1
    # the estimate by drawn labels is the Gauss-Newton diagonal of a softmax: x^2 p (1 - p), summed over samples / n
    torch.manual_seed(0)
    weight, x, total = torch.nn.Parameter(torch.randn(3, 2)), torch.randn(8, 2), torch.zeros(3, 2)
    for _ in range(1000):
        logits = x @ weight.T
        weight.grad = None
        F.cross_entropy(logits, torch.multinomial(logits.softmax(1), 1)[:, 0]).backward()
        total += optim.gauss_newton([weight], 8)[weight] / 1000
    p = (x @ weight.T).softmax(1).detach()
    torch.testing.assert_close(total, torch.einsum("nk,nd->kd", p * (1 - p), x**2) / 8, atol=0.03, rtol=0.1)


def test_schedulefree_by_hand():
    rates, b, b2, wd = (0.1, 0.05), 0.9, 0.99, 0.01
    expected, averages, v, z, x, y, weights, top = [], [], [0] * 3, list(W), list(W), list(W), 0, 0
    for t, (g, lr) in enumerate(zip((G1, G2), rates), 1):
        top = max(top, lr)
        weights += top**2
        c = top**2 / weights
        for i in range(3):
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            z[i] -= lr * (g[i] / (math.sqrt(v[i] / (1 - b2**t)) + 1e-8) + wd * y[i])
            x[i] = (1 - c) * x[i] + c * z[i]
            y[i] = (1 - b) * z[i] + b * x[i]
        expected.append(list(y))
        averages.append(list(x))

    def before(optimizer, p, t):
        optimizer.param_groups[0]["lr"] = rates[t]

    found, optimizer, p = stepped(lambda ps: optim.ScheduleFreeAdamW(ps, 9.0, (b, b2), weight_decay=wd), before=before)
    close(found, expected)
    kept = p.clone()
    optimizer.eval()
    close(p.tolist(), averages[-1])
    with pytest.raises(RuntimeError, match="the weights are the average; call train"):
        optimizer.step()
    for _ in range(3):
        optimizer.train()
        assert torch.equal(p, kept)  # to the bit, however often
        optimizer.eval()


def test_muon_by_hand():
    torch.manual_seed(0)
    g1, g2 = torch.randn(2, 6, 3, dtype=torch.float64)
    w = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    bias, last = parameter(), torch.nn.Parameter(w.detach().clone())
    groups = [{"params": [w, bias]}, {"params": [last], "last": True}]
    optimizer = optim.Muon(groups, lr=0.1, momentum=0.9, adam=0.5, weight_decay=0.02)
    both = [parameter(), torch.nn.Parameter(w.detach().clone())]
    adamw = torch.optim.AdamW(both, 0.05, (0.9, 0.95), weight_decay=0.02)
    expected, m = w.detach().clone(), torch.zeros(6, 3, dtype=torch.float64)
    for g in (g1, g2):
        m = 0.9 * m + 0.1 * g
        x = (0.1 * g + 0.9 * m).T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
        expected = expected * (1 - 0.1 * 0.02) - 0.1 * math.sqrt(2) * x.T
        w.grad, last.grad, bias.grad = g.clone(), g.clone(), g[0].clone()
        adamw.param_groups[0]["params"][0].grad, adamw.param_groups[0]["params"][1].grad = g[0].clone(), g.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(w.detach(), expected)
    torch.testing.assert_close([bias, last], adamw.param_groups[0]["params"])
    values = torch.linalg.svdvals(optim.orthogonal(torch.randn(64, 16)))
    assert values.min() > 0.6 and values.max() < 1.3, values
    assert torch.equal(optim.orthogonal(g1.float().T), optim.orthogonal(g1.float()).T)
    w.full_tensor = None  # what a shard has
    with pytest.raises(ValueError, match="Muon needs whole matrices.*without --fsdp"):
        optimizer.step()


def slope(p):
    """Gradient of a loss that is not symmetric."""
    return (p.detach() ** 3 - p.detach()).mul(0.3)


@pytest.mark.parametrize("kind", ["sam", "asam", "friendlysam"])
def test_sharpness_aware_steps_by_hand(kind):
    rho, lr, eta, sigma, lam = 0.2, 0.1, 0.01, 0.5, 0.8
    options = {"sam": {}, "asam": dict(eta=eta), "friendlysam": dict(sigma=sigma, lmbda=lam)}[kind]
    p = parameter()
    optimizer = optim.WRAPPERS[kind](torch.optim.SGD([p], lr), rho, **options)
    w, mean = torch.tensor(W, dtype=torch.float64), None
    for _ in range(3):
        g = slope(w)
        if kind == "sam":
            d, size = g, g.square().sum().sqrt()
        elif kind == "asam":
            scale = w.abs() + eta
            d, size = scale**2 * g, (scale * g).square().sum().sqrt()
        else:
            d, mean = (g, g) if mean is None else (g - sigma * (lam * mean + (1 - lam) * g), lam * mean + (1 - lam) * g)
            size = d.square().sum().sqrt()
        up = w + rho * d / size
        before = p.detach().clone()
        p.grad = slope(p)
        optimizer.climb()
        torch.testing.assert_close(p.detach(), up)
        if kind != "asam":
            assert math.isclose((p - before).norm().item(), rho, rel_tol=1e-9)
        p.grad = slope(p)
        optimizer.descend()
        assert torch.equal(p, before)
        optimizer.step()
        w = w - lr * slope(up)
        torch.testing.assert_close(p.detach(), w)

    def closure():
        p.grad = slope(p)
        return 7

    other = parameter()
    p.data.copy_(other.data)
    fresh = optim.WRAPPERS[kind](torch.optim.SGD([p], lr), rho, **options)
    p.grad = slope(p)
    assert fresh.step(closure) == 7
    other.grad = slope(other)
    optimizer = optim.WRAPPERS[kind](torch.optim.SGD([other], lr), rho, **options)
    optimizer.climb()
    other.grad = slope(other)
    optimizer.step()  # descends by itself
    assert torch.equal(p, other)


def test_a_bad_gradient_leaves_weights_and_means_as_they_were():
    p = parameter()
    optimizer = optim.FriendlySAM(torch.optim.AdamW([p], 0.1))
    for g in (G1, G2, [math.nan, 0, 0]):
        p.grad = torch.tensor(g, dtype=torch.float64)
        kept, state = p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))
        optimizer.climb()
        if g[0] != g[0]:
            assert p.isnan().all()
            optimizer.descend()  # and no step
            assert torch.equal(p, kept)
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items()) and "friendly" in state
        else:
            optimizer.step()


# all of them: fit, resume


def every():
    names = [(name, None) for name in optim.OPTIMIZERS] + [("adamw", wrapper) for wrapper in optim.WRAPPERS]
    return [*names, ("muon", "friendlysam")]


RATES = {"adamw": 0.03, "ademamix": 0.01, "sophia": 0.03, "schedulefree": 0.1, "muon": 0.03}


def make(name, wrapper, params, **options):
    base = optim.OPTIMIZERS[name](params, lr=RATES[name], **options)
    return optim.WRAPPERS[wrapper](base) if wrapper else base


def moons(n=128):
    torch.manual_seed(0)
    t = math.pi * torch.rand(n)
    x = torch.cat([torch.stack([t.cos(), t.sin()], 1), torch.stack([1 - t.cos(), 0.5 - t.sin()], 1)])
    return x + 0.1 * torch.randn(2 * n, 2), torch.arange(2).repeat_interleave(n)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def fit(net, optimizer, steps, start=0):
    """Updates of the whole protocol, each a function of its number alone -> loss of the weights that one would use."""
    x, y = moons()
    for t in range(start, start + steps):
        pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(t))[:64]

        def backward():
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[pick]), y[pick])
            loss.backward()
            return loss

        if isinstance(optimizer, optim.Sophia) and t % 10 == 0:
            seeded = torch.Generator().manual_seed(t)
            drawn = torch.multinomial(net(x[pick]).softmax(1), 1, generator=seeded)[:, 0]
            optimizer.zero_grad()
            F.cross_entropy(net(x[pick]), drawn).backward()
            optimizer.observe(optim.gauss_newton(net.parameters(), len(pick)))
        backward()
        optimizer.step(backward) if hasattr(optimizer, "climb") else optimizer.step()
    if isinstance(optimizer, optim.ScheduleFreeAdamW):
        optimizer.eval()
    with torch.no_grad():
        loss = F.cross_entropy(net(x), y).item()
    if isinstance(optimizer, optim.ScheduleFreeAdamW):
        optimizer.train()
    return loss


@pytest.mark.parametrize("name, wrapper", every())
def test_two_moons_are_learned_and_a_resume_is_exact(name, wrapper):
    net = network()
    optimizer = make(name, wrapper, net.parameters(), weight_decay=0.01)
    start = fit(net, optimizer, 0)
    fit(net, optimizer, 30)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    packed = copy.deepcopy(checkpoint.pack_optimizer(optimizer, net))
    assert set(packed) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    end = fit(net, optimizer, 30, start=30)
    assert end < 0.6 * start, (start, end)
    for how in ("state_dict", "by name"):
        other = network()
        other.load_state_dict(weights)
        resumed = make(name, wrapper, other.parameters(), weight_decay=0.01)
        if how == "state_dict":
            resumed.load_state_dict(copy.deepcopy(state))
        else:
            checkpoint.unpack_optimizer(resumed, other, copy.deepcopy(packed))
        assert fit(other, resumed, 30, start=30) == end
        for a, b in zip(net.parameters(), other.parameters()):
            assert torch.equal(a, b)
            assert resumed.state[b].keys() == optimizer.state[a].keys()
            assert all(torch.equal(resumed.state[b][k], v) for k, v in optimizer.state[a].items())


@pytest.mark.parametrize("name, wrapper", every())
def test_a_bowl_is_descended(name, wrapper):
    """Curvatures 1 and 30, in a matrix and a vector."""
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(4, 4))
    b = torch.nn.Parameter(torch.randn(4))
    steep = torch.tensor([1.0, 30, 1, 30])
    optimizer = make(name, wrapper, [a, b])
    losses = []
    for t in range(200):

        def backward():
            optimizer.zero_grad()
            loss = (steep * a.square()).sum() / 2 + (steep * b.square()).sum() / 2
            loss.backward()
            return loss

        if name == "sophia" and t % 10 == 0:
            optimizer.observe({a: steep.expand(4, 4), b: steep})
        losses.append(backward().item())
        optimizer.step(backward) if wrapper else optimizer.step()
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


# libraries, where they happen to be installed


def same_walk(own, other, steps=5, protocol=lambda optimizer, backward: optimizer.step()):
    """Both make the same steps on two moons."""
    x, y = moons()
    nets = [network(), network()]
    for net, build in zip(nets, (own, other)):
        optimizer = build(net)
        for _ in range(steps):

            def backward():
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            backward()
            protocol(optimizer, backward)
    for a, b in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_schedulefree_is_that_of_its_authors():
    schedulefree = pytest.importorskip("schedulefree")

    def theirs(net):
        optimizer = schedulefree.AdamWScheduleFree(net.parameters(), 0.02, weight_decay=0.1)
        optimizer.train()
        return optimizer

    same_walk(lambda net: optim.ScheduleFreeAdamW(net.parameters(), 0.02, weight_decay=0.1), theirs)


def test_muon_is_that_of_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9")
    torch.manual_seed(0)
    own = torch.nn.Parameter(torch.randn(12, 5))
    other = torch.nn.Parameter(own.detach().clone())
    optimizers = optim.Muon([own], 0.05, weight_decay=0.1), torch.optim.Muon([other], 0.05, weight_decay=0.1)
    for _ in range(3):
        own.grad = torch.randn(12, 5)
        other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(own, other, rtol=0.02, atol=3e-3)  # torch's iterations run in bfloat16


@pytest.mark.parametrize("kind", ["ademamix", "sam", "asam", "friendlysam", "sophia"])
def test_others_are_those_of_pytorch_optimizer(kind):
    po = pytest.importorskip("pytorch_optimizer")
    twice = dict(protocol=lambda optimizer, backward: optimizer.step(backward))
    sgd = torch.optim.SGD
    if kind == "ademamix":
        same_walk(
            lambda net: optim.AdEMAMix(net.parameters(), 0.01, warmup=4, weight_decay=0.1),
            lambda net: po.AdEMAMix(net.parameters(), 0.01, t_alpha_beta3=4, weight_decay=0.1, weight_decouple=True),
        )
    elif kind == "sam":
        same_walk(
            lambda net: optim.SAM(sgd(net.parameters(), 0.1), 0.1),
            lambda net: po.SAM(net.parameters(), sgd, 0.1, lr=0.1), **twice,
        )  # fmt: skip
    elif kind == "asam":
        same_walk(
            lambda net: optim.ASAM(sgd(net.parameters(), 0.1), 0.5, eta=0.0),
            lambda net: po.SAM(net.parameters(), sgd, 0.5, adaptive=True, lr=0.1), **twice,
        )  # fmt: skip
    elif kind == "friendlysam":
        same_walk(
            lambda net: optim.FriendlySAM(sgd(net.parameters(), 0.1), 0.1),
            lambda net: po.FriendlySAM(net.parameters(), sgd, 0.1, lr=0.1), **twice,
        )  # fmt: skip
    else:  # it clips to p and leaves gamma out: gamma = p, and our rate is p times theirs
        hessian = [torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in
                   enumerate(network().parameters())]  # fmt: skip

        def protocol(optimizer, backward):
            if isinstance(optimizer, optim.Sophia):
                optimizer.observe(dict(zip(optimizer.param_groups[0]["params"], hessian)))
                optimizer.step()
            else:
                optimizer.step(hessian=hessian)

        same_walk(
            lambda net: optim.Sophia(net.parameters(), 0.006, (0.96, 0.99), 0.1),
            lambda net: po.SophiaH(net.parameters(), 0.06, p=0.1), protocol=protocol,
        )  # fmt: skip


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shards_step_like_whole_tensors(one_process):
    """One rank of fully_shard: parameters are DTensors. Muon, which needs whole matrices, says so."""
    from torch.distributed.fsdp import fully_shard

    x, y = moons()
    for name, wrapper in every()[1:5] + [("adamw", "friendlysam")]:
        found = []
        for sharded in (False, True):
            net = network()
            if sharded:
                fully_shard(net)
            optimizer = make(name, wrapper, net.parameters(), weight_decay=0.01)

            def backward():
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()

            for _ in range(2):
                backward()
                if name == "sophia":
                    optimizer.observe(optim.gauss_newton(net.parameters(), len(x)))
                if sharded and name == "muon":
                    with pytest.raises(ValueError, match="these are shards"):
                        optimizer.step(backward) if wrapper else optimizer.step()
                else:
                    optimizer.step(backward) if wrapper else optimizer.step()
            found.append([p.full_tensor() if sharded else p for p in net.parameters()])
        if name != "muon":
            torch.testing.assert_close(*found)


# copied


USE = """
import importlib, torch
for module in PARTS:
    made = vars(importlib.import_module(module))
    torch.manual_seed(0)
    w, losses = torch.nn.Parameter(torch.randn(4, 3)), []
    for name in MADE[module]:
        wrapped = hasattr(made[name], "climb")
        optimizer = made[name](torch.optim.SGD([w], 0.1)) if wrapped else made[name]([w], lr=0.05)
        def closure():
            optimizer.zero_grad()
            loss = w.square().sum()
            loss.backward()
            losses.append(loss.item())
            return loss
        for _ in range(40):
            closure()
            if hasattr(optimizer, "observe"):
                optimizer.observe({w: torch.full_like(w, 2.0)})
            optimizer.step(closure) if wrapped else optimizer.step()
    assert losses[-1] < 0.5 * losses[0], (module, losses)
    print(module)
"""


@pytest.mark.slow
def test_a_hundred_lines_of_it_run_in_an_empty_folder(tmp_path):
    """Each optimizer with what it calls, cut out of the file; and the file as a whole."""
    needs = {"muon": [optim.orthogonal], "sophia": [optim.gauss_newton]}
    needs |= {"friendlysam": [optim.SAM], "asam": [optim.SAM]}
    own = {name: made for name, made in optim.OPTIMIZERS.items() if made.__module__ == optim.__name__} | optim.WRAPPERS
    names = {}
    for name, made in own.items():
        cut = [*([] if name in optim.WRAPPERS else [optim.Stepper]), *needs.get(name, []), made]
        text = "\n\n".join(["import math\nimport torch\n", *map(inspect.getsource, cut)])
        assert text.count("\n") <= 100
        (tmp_path / f"cut_{name}.py").write_text(text)
        names[f"cut_{name}"] = [made.__name__]
    (tmp_path / "optim.py").write_text(Path(optim.__file__).read_text())
    names["optim"] = [made.__name__ for made in own.values()]
    assert len(names) == 8
    script = USE.replace("PARTS", repr(list(names))).replace("MADE", repr(names))
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == list(names), done.stderr
