"""Supervised objectives against slow loops over single numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

import losses

B, C = 7, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(hard=False):
    """Logits, targets, weights of classes in float64."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    targets = losses.target_rows(labels, C).double() if hard else torch.randn(B, C).softmax(-1).double()
    return 2 * torch.randn(B, C).double(), targets, torch.tensor([0.5, 1.0, 3.0]).double()


def softmax(row):
    top = max(row)
    parts = [math.exp(x - top) for x in row]
    return [x / sum(parts) for x in parts]


def entropy_of(logits, targets, weights, smoothing=0.0, gamma=0.0):
    """-sum w t (1 - p)^gamma log p of each image."""
    found = []
    for row, target in zip(logits.tolist(), targets.tolist()):
        target = [(1 - smoothing) * t + smoothing / C for t in target]
        found.append(-sum(w * t * (1 - p) ** gamma * math.log(p)
                          for w, t, p in zip(weights, target, softmax(row))))  # fmt: skip
    return found


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("hard", [False, True])
def test_cross_entropy_and_focal(hard):
    logits, targets, weights = batch(hard)
    for smoothing in (0.0, 0.1):
        for w in (None, weights):
            plain = [1.0] * C if w is None else w.tolist()
            for gamma in (0.0, 2.0, 0.5):
                expected = mean(entropy_of(logits, targets, plain, smoothing, gamma))
                found = losses.focal_loss(logits, targets, w, gamma=gamma, smoothing=smoothing)
                assert_close(found.item(), expected)
            expected = mean(entropy_of(logits, targets, plain, smoothing))
            assert_close(losses.soft_cross_entropy(logits, targets, w, smoothing=smoothing).item(), expected)
    if hard:
        assert_close(losses.soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets.argmax(1)))
        assert torch.equal(losses.target_rows(targets.argmax(1), C), targets.float())


def test_mixing_targets_is_mixing_losses():
    """Mixup: lambda L(a) + (1 - lambda) L(b) is the loss of the mixed row."""
    logits, a, weights = batch(hard=True)
    b = a.roll(1, 0)
    mixed = losses.soft_cross_entropy(logits, 0.3 * a + 0.7 * b, weights)
    parts = [losses.soft_cross_entropy(logits, t, weights) for t in (a, b)]
    assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])


def test_gatekeeper():
    logits, targets, weights = batch(hard=True)
    for w in (None, weights):
        plain = [1.0] * C if w is None else w.tolist()
        total, rights = 0.0, 0
        for row, target, ce in zip(logits.tolist(), targets.tolist(), entropy_of(logits, targets, plain)):
            p = softmax(row)
            if p.index(max(p)) == target.index(1.0):
                total, rights = total + 0.3 * ce, rights + 1
            else:
                total += 0.7 * sum(x * math.log(x * C) for x in p)
        assert 0 < rights < B
        assert_close(losses.gatekeeper_loss(logits, targets, w, alpha=0.3).item(), total / B)


def test_what_is_a_mean_over_images_adds_up_over_micro_batches():
    logits, targets, weights = (t[:6] if len(t) == B else t for t in batch())
    for name in ("ce", "focal", "gatekeeper"):
        loss = losses.OBJECTIVES[name]
        parts = [loss(logits[i : i + 2], targets[i : i + 2], weights) for i in (0, 2, 4)]
        assert_close(loss(logits, targets, weights), sum(parts) / 3)


def test_selective():
    logits, targets, weights = batch()
    gate, aux = torch.randn(B).double(), torch.randn(B, C).double()
    each = entropy_of(logits, targets, weights.tolist())
    g = [1 / (1 + math.exp(-x)) for x in gate.tolist()]
    for coverage in (0.1, 0.95):
        risk = sum(a * b for a, b in zip(g, each)) / sum(g) + 5 * max(0, coverage - mean(g)) ** 2
        for other in (None, aux):
            everything = mean(entropy_of(logits if other is None else other, targets, weights.tolist()))
            found = losses.selective_loss(logits, gate, targets, other, weights, coverage, penalty=5.0, alpha=0.4)
            assert_close(found.item(), 0.4 * risk + 0.6 * everything)


def test_supervised_contrast():
    features, labels = torch.randn(B, 5).double(), [0, 1, 0, 2, 1, 0, 3]  # 2 and 3 are alone
    targets = losses.target_rows(torch.tensor(labels), 4)
    z = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.tolist()]
    dot = [[sum(a * b for a, b in zip(u, v)) / 0.2 for v in z] for u in z]
    each = []
    for i in range(B):
        partners = [p for p in range(B) if p != i and labels[p] == labels[i]]
        if partners:
            below = math.log(sum(math.exp(dot[i][a]) for a in range(B) if a != i))
            each.append(-mean([dot[i][p] - below for p in partners]))
    assert len(each) == 5
    assert_close(losses.supcon_loss(features, targets, 0.2).item(), mean(each))
    for rows in (features[:1], features[3:4].repeat(1, 1), features[[3, 6]]):
        rows = rows.clone().requires_grad_()
        lone = losses.supcon_loss(rows, torch.eye(4)[: len(rows)])
        assert lone.item() == 0
        assert torch.autograd.grad(lone, rows)[0].abs().max() == 0


@pytest.mark.parametrize("alpha", [0.02, 0.25, 0.5])
def test_conformal_risk(alpha):
    logits = torch.randn(40, 2).double().requires_grad_()
    labels = (torch.rand(40) < 0.5).long()
    targets = losses.target_rows(labels, 2)
    score = [b - a for a, b in logits.tolist()]
    fitted = sorted(score[i] for i in range(0, 40, 2) if labels[i] == 1)
    alarms = [score[i] for i in range(1, 40, 2) if labels[i] == 0]
    n = len(fitted)
    # the largest threshold whose corrected share of misses is at most alpha
    good = [t for t in fitted if (sum(s < t for s in fitted) + 1) / (n + 1) <= alpha]
    threshold = max(good, default=fitted[0])
    expected = mean([1 / (1 + math.exp(-(s - threshold) / 0.3)) for s in alarms])
    ce = losses.soft_cross_entropy(logits, targets)
    found = losses.conformal_loss(logits, targets, alpha=alpha, temperature=0.3, share=2.0)
    assert_close((found - ce).item(), 2 * expected)
    slope = torch.autograd.grad(found - ce, logits)[0][:, 1]
    at = score.index(threshold)
    assert slope[at] < 0 and slope.abs().sum() > 0  # raising the threshold's image lowers false alarms
    assert set(slope.nonzero()[:, 0].tolist()) == {at} | {i for i in range(1, 40, 2) if labels[i] == 0}
    none = losses.target_rows(torch.zeros(40).long(), 2)
    assert_close(losses.conformal_loss(logits, none), losses.soft_cross_entropy(logits, none))


def test_soft_ranks_become_a_sort():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.9]).double()
    hard = losses.soft_ranks(scores, 1e-4)
    assert_close(hard, torch.eye(4).double()[[2, 3, 0, 1]])
    soft = losses.soft_ranks(scores, 0.7)
    assert_close(soft.sum(1), torch.ones(4).double())
    n, s = 4, scores.tolist()
    for k in range(n):
        row = [((n + 1 - 2 * (k + 1)) * s[i] - sum(abs(s[i] - other) for other in s)) / 0.7 for i in range(n)]
        assert_close(soft[k].tolist(), softmax(row))


def test_cascade():
    stages, positive = torch.randn(2, 6).double(), torch.tensor([1, 0, 0, 1, 0, 0])
    budgets, log_sigma = (4, 2), torch.tensor([0.1, -0.2, 0.3]).double()
    survive = []
    for scores, budget in zip(stages, budgets):
        p = losses.soft_ranks(scores, 0.5).tolist()
        survive.append([sum(p[k][i] for k in range(budget)) / sum(p[k][i] for k in range(6)) for i in range(6)])
    total = 0.0
    for t, values in enumerate([[a * b for a, b in zip(*survive)], *survive]):
        term = -sum(math.log(v) if y else math.log(1 - v) for v, y in zip(values, positive.tolist()))
        total += term / (2 * math.exp(log_sigma[t]) ** 2) + log_sigma[t].item()
    assert_close(losses.cascade_loss(stages, positive, budgets, log_sigma, tau=0.5).item(), total)
    # the sum over places is a constant for the gradient
    own = stages.clone().requires_grad_()
    sums = [losses.soft_ranks(scores, 2.0).sum(0) for scores in stages]
    kept = [losses.soft_ranks(scores, 2.0)[:budget].sum(0) / n for scores, n, budget in zip(own, sums, budgets)]
    terms = [F.binary_cross_entropy(v, positive.double(), reduction="sum") for v in (kept[0] * kept[1], *kept)]
    (expected,) = torch.autograd.grad(sum(term / 2 for term in terms), own)
    found = losses.cascade_loss(own, positive, budgets, torch.zeros(3), tau=2.0)
    assert_close(torch.autograd.grad(found, own)[0], expected)
    # a positive that is surely dropped, p about 1e-19, still has a slope
    sure = torch.tensor([[0.0, 30, 1, 2, 3, 4]]).requires_grad_()
    losses.cascade_loss(sure, torch.tensor([1, 0, 0, 0, 0, 0]), (2,), torch.zeros(2), tau=1.0).backward()
    assert sure.grad[0, 0] < -1 and sure.grad.isfinite().all()
    # the best order costs least
    best = positive.double() - 0.1 * torch.rand(6)
    given = positive, budgets, torch.zeros(3)
    costs = [losses.cascade_loss(torch.stack([s, s]), *given, tau=0.5) for s in (best, -best)]
    assert costs[0] < costs[1]
    # trained, the positives survive
    learned = torch.zeros(2, 6).normal_().requires_grad_()
    sigma = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([learned, sigma], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        losses.cascade_loss(learned, positive, budgets, sigma).backward()
        optimizer.step()
    assert set(learned[1].topk(2).indices.tolist()) == {0, 3}


def photographs(seed, n):
    """What two stages see of n pictures, 8% of them positive; 10% are look-alikes that outshine them in a thumbnail."""
    random = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=random) < 0.08).float()
    alike = (torch.rand(n, generator=random) < 0.1) & (y == 0)
    thumbnail, tiles = torch.randn(2, n, 2, generator=random)
    thumbnail += torch.stack([2 * y + 5 * alike, 0.3 * y], 1)
    tiles[:, 0] += 2 * y - alike.float()
    return thumbnail, tiles, y


def train_cascade(seed, as_a_whole, steps=300, n=100):
    """Recall on new pictures when 40% go on from the thumbnail and 10% from the tiles; two linear stages."""
    torch.manual_seed(seed)
    stages = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(2))
    log_sigma = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([*stages.parameters(), log_sigma], 0.03)
    *views, y = photographs(1000 + seed, 2000)
    random = torch.Generator().manual_seed(seed)

    def scores(views):
        return torch.stack([stage(view)[:, 0] for stage, view in zip(stages, views)])

    for step in range(steps):
        some = torch.randperm(len(y), generator=random)[:n]
        s = scores([view[some] for view in views])
        if as_a_whole and step >= steps // 3:
            even = (s - s.mean(1, keepdim=True)) / s.std(1, keepdim=True)
            loss = losses.cascade_loss(even, y[some], (40, 10), log_sigma)
        else:
            loss = F.binary_cross_entropy_with_logits(s, y[some].expand(2, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *views, y = photographs(9000 + seed, 4000)
    with torch.no_grad():
        kept = losses.survivors(scores(views), (1600, 400))
    assert kept.sum() == 400
    return kept[y > 0].float().mean().item()


def test_a_cascade_trained_as_a_whole_keeps_more_at_its_budget():
    """Thumbnail, then tiles: cross entropy fits each stage by itself, the look-alikes mislead the first."""
    gains = [train_cascade(seed, True) - train_cascade(seed, False) for seed in range(2)]
    assert min(gains) > 0 and mean(gains) > 0.02, gains


def test_survivors_of_a_cascade():
    stages = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 9, 9, 9]])
    assert losses.survivors(stages, (3, 2)).tolist() == [False, True, True, False, False, False]
    assert losses.survivors(stages, (3, 9)).tolist() == [True] * 3 + [False] * 3
    assert losses.survivors(stages[1:], (3,)).tolist() == [False] * 3 + [True] * 3


def test_curriculum():
    logits, targets, weights = batch(hard=True)
    each = sorted(entropy_of(logits, targets, weights.tolist()))
    for progress, count in ((0.0, 3), (0.25, 5), (0.5, 7), (1.0, 7)):  # 7 images x 0.4, 0.7, 1
        found = losses.curriculum_loss(logits, targets, weights, share=0.4, progress=progress)
        assert_close(found.item(), mean(each[:count]))
    assert_close(losses.curriculum_loss(logits, targets, smoothing=0.1),
                 losses.soft_cross_entropy(logits, targets, smoothing=0.1))  # fmt: skip
    whole = losses.soft_cross_entropy(logits, targets)
    assert_close(losses.curriculum_loss(logits, targets, until=0.0, progress=0.0), whole)
    x = logits.clone().requires_grad_()
    slope = torch.autograd.grad(losses.curriculum_loss(x, targets, share=0.4, progress=0.0), x)[0]
    assert (slope.abs().sum(1) > 0).sum() == 3  # what is hard does not pull yet


def test_a_students_targets_are_its_teachers():
    _, targets, _ = batch(hard=True)
    views = torch.randn(B, 4, C).double()
    rows = losses.distilled_rows(targets, views, temperature=2.0, share=0.3)
    for b in range(B):
        teacher = [softmax([x / 2 for x in view]) for view in views[b].tolist()]
        expected = [0.7 * t + 0.3 * mean([p[c] for p in teacher]) for c, t in enumerate(targets[b].tolist())]
        assert_close(rows[b].tolist(), expected)
    assert_close(rows.sum(1), torch.ones(B).double())
    assert torch.equal(losses.distilled_rows(targets, views, share=0.0), targets)
    # with share 1 the slope is that of the divergence from the teacher
    logits = torch.randn(B, C).double().requires_grad_()
    rows = losses.distilled_rows(targets, views, share=1.0)
    divergence = F.kl_div(logits.log_softmax(1), rows, reduction="batchmean")
    own = torch.autograd.grad(losses.soft_cross_entropy(logits, rows), logits)[0]
    assert_close(own, torch.autograd.grad(divergence, logits)[0])


def test_a_reversed_gradient():
    x = torch.randn(B, C).double().requires_grad_()
    y = losses.reversed_gradient(x, 0.7)
    assert torch.equal(y, x)
    (slope,) = torch.autograd.grad((y**3).sum(), x)
    assert_close(slope, -0.7 * 3 * x.detach() ** 2)
    assert losses.reversal_strength(0.0) == 0 and 0.9999 < losses.reversal_strength(1.0) < 1
    assert losses.reversal_strength(0.1) == pytest.approx(math.tanh(0.5))


def test_one_step_teaches_the_critic_and_unteaches_the_features():
    x, domain = torch.randn(40, 3), torch.arange(40) % 2
    features, critic = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def wrong():
        return F.cross_entropy(critic(losses.reversed_gradient(features(x), 1.0)), domain)

    before = wrong()
    before.backward()
    for part, worse in ((critic, False), (features, True)):
        kept = {name: p.detach().clone() for name, p in part.named_parameters()}
        with torch.no_grad():
            for p in part.parameters():
                p -= 0.05 * p.grad
            assert (wrong() > before) == worse
        part.load_state_dict(kept)


def test_gradients_by_finite_differences():
    logits, targets, weights = batch(hard=True)
    logits.requires_grad_()
    gate = torch.randn(B).double().requires_grad_()
    two = torch.randn(B, 2).double().requires_grad_()
    rows = losses.target_rows(torch.tensor([0, 1, 1, 0, 1, 0, 1]), 2)
    for name in ("ce", "focal", "gatekeeper"):
        assert gradcheck(lambda x, f=losses.OBJECTIVES[name]: f(x, targets, weights), (logits,))
    assert gradcheck(lambda x: losses.conformal_loss(x, rows, temperature=0.5), (two,))
    assert gradcheck(lambda x: losses.curriculum_loss(x, targets, weights, share=0.5, progress=0.1), (logits,))
    views = torch.randn(B, 2, C).double().requires_grad_()
    assert gradcheck(lambda v: losses.distilled_rows(targets, v, temperature=2.0), (views,))
    assert gradcheck(lambda x, g: losses.selective_loss(x, g, targets, coverage=0.9), (logits, gate))
    assert gradcheck(lambda x: losses.supcon_loss(x, targets, 0.3), (logits,))
    stages = torch.randn(2, 6).double().requires_grad_()
    sigma = torch.randn(3).double().requires_grad_()
    positive = torch.tensor([1, 0, 0, 1, 0, 0])

    def terms(s, survive_detached=False):
        return losses.soft_ranks(s[0], 0.5).square().sum()

    # the whole cascade loss divides by a detached sum, so only its parts are checked
    assert gradcheck(terms, (stages,))
    assert gradcheck(lambda g: losses.cascade_loss(stages.detach(), positive, (4, 2), g), (sigma,))


def test_low_precision_and_extreme_logits_stay_finite():
    logits, targets, _ = batch(hard=True)
    for scale in (1.0, 1e4):
        for name, loss in losses.OBJECTIVES.items():
            with torch.autocast("cpu", torch.bfloat16):
                x = (scale * logits[:, :2]).bfloat16().requires_grad_()
                value = loss(x, targets[:, :2].float())
            value.backward()
            assert value.dtype == torch.float32 and value.isfinite() and x.grad.isfinite().all(), (name, scale)
    x = logits.float().requires_grad_()
    for gamma in (0.5, 1.0, 2.0):  # 1 - p of a sure answer is 0, and 0 ** (gamma - 1) must not become a gradient
        losses.focal_loss(100 * x, targets.float(), gamma=gamma).backward()
        assert x.grad.isfinite().all()
