"""Several views of one picture, or several models, become one row of logits. Copyable: imports numpy and torch only.

    logits = POOLS["topk"](table, k=3)          # [N, V, C] -> [N, C]; numpy gives numpy, torch gives torch
    fused = Fusion(384, 2, keep=8)(views)       # features [N, V, D] -> Fused: the trained way

Each row is a function of its own views alone; with one view each pool gives the softmax of that view. N samples,
V views, k of them kept, C classes, D features, W width inside, P patches. In `log p` a view counts as much as any
other, however large its logits are.
"""

import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def either(pool):
    """Lets a pool of torch tensors also take numpy arrays, in float64."""

    @functools.wraps(pool)
    def wrapped(logits, **options):
        if not isinstance(logits, torch.Tensor):
            return pool(torch.as_tensor(np.asarray(logits, np.float64)), **options).numpy()
        return pool(logits, **options)

    return wrapped


def mean_logits(logits):
    """Mean of the logits: the geometric mean of the probabilities."""
    return logits.mean(1)


def largest(logits):
    """Of each class the view that believes most in it."""
    return F.log_softmax(logits, -1).amax(1)


def logsumexp(logits):
    """Log of the mean probability: one sure view moves it more than it moves `mean`."""
    return F.log_softmax(logits, -1).logsumexp(1) - np.log(logits.shape[1])


def mean_of(logits, score, k):
    """Mean of the k views [N, V] with the highest score; fewer views than k: of all."""
    top = score.topk(min(k, score.shape[1]), 1).indices
    return logits.gather(1, top[..., None].expand(-1, -1, logits.shape[2])).mean(1)


def topk(logits, k=2):
    """Mean of the k surest views. Where any view may show the object, this prefers views that are sure of nothing."""
    return mean_of(logits, logits.softmax(-1).amax(-1), k)


def topk_positive(logits, k=2, positive=1):
    """Mean of the k views that believe most in the positive class."""
    return mean_of(logits, logits.softmax(-1)[..., positive], k)


def whole_topk(logits, k=2, positive=1):
    """The first view (the whole picture) and the mean of the k others that believe most in the positive class."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return (logits[:, 0] + topk_positive(logits[:, 1:], k, positive)) / 2


def certain(logits, sharpness=2.0):
    """Mean weighted by certainty: entropy of the view to the power of -sharpness."""
    entropy = -(logits.softmax(-1) * F.log_softmax(logits, -1)).sum(-1)
    weights = ((entropy + 1e-10).log() * -sharpness).softmax(1)
    return (weights[..., None] * logits).sum(1)


def area(logits, areas=None):
    """Mean weighted by the area of the views: areas [V], in any unit; None: all alike."""
    areas = [1.0] * logits.shape[1] if areas is None else areas
    if len(areas) != logits.shape[1]:
        raise ValueError(f"area: {len(areas)} areas for {logits.shape[1]} views; give one each")
    weights = torch.as_tensor(areas, dtype=logits.dtype, device=logits.device)
    return torch.einsum("nvc,v->nc", logits, weights / weights.sum())


POOLS = {
    name: either(pool)
    for name, pool in {
        "mean": mean_logits, "topk": topk, "topk_positive": topk_positive, "whole_topk": whole_topk, "max": largest,
        "logsumexp": logsumexp, "certain": certain, "area": area,
    }.items()
}  # fmt: skip


def probabilities(logits, pool="mean", **options):
    """What views [N, V, C] say together, numpy to numpy: [N, C]."""
    return torch.as_tensor(POOLS[pool](np.asarray(logits, np.float64), **options)).softmax(-1).numpy()


# ----- the trained way: twelve components, each of which can be off


class Fused(NamedTuple):
    """What Fusion says."""

    logits: Tensor  # [N, C]
    features: Tensor  # [N, W] of the picture, before metadata
    view_features: Tensor  # [N, k, W]
    kept: Tensor  # [N, k] which views, rising
    weights: Tensor  # [N, V] of the views in the features: sum 1, 0 of what is not kept
    auxiliary: dict  # what is on: views [N, k, C], weather [N, A], masks [N, V, P, M]; scalars ratio, balance


def mlp(dim, out, hidden):
    """hidden 0: one linear layer."""
    if not hidden:
        return nn.Linear(dim, out)
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, out))


class Prune(nn.Module):
    """Keeps the k views with the highest scores. The choice is hard, its gradient that of sigmoids.

    A view that is never kept would never show what it is worth: training adds Gumbel noise, and scores have deviation
    1 within a picture, so that the noise always matters and no sigmoid saturates.
    """

    def __init__(self, dim, keep, hidden=64):
        super().__init__()
        self.keep, self.scores = keep, mlp(dim, 1, hidden)
        nn.init.normal_(self.scores[-1].weight, std=0.01)  # at first the noise chooses

    def forward(self, x):
        """[N, V, W] -> kept [N, k]; choice [N, V], 1 or 0; ratio: how far the mean sigmoid is from k / V, squared."""
        scores = F.layer_norm(self.scores(x)[..., 0], x.shape[1:2])
        tried = scores - torch.empty_like(scores).exponential_().log() if self.training else scores
        kept, soft = tried.topk(self.keep, 1).indices.sort(1).values, scores.sigmoid()
        hard = torch.zeros_like(soft).scatter(1, kept, 1.0)
        return kept, hard + (soft - soft.detach()), (soft.mean() - self.keep / x.shape[1]) ** 2


class Prescore(nn.Module):
    """Tells from the whole view alone which of the others are worth the backbone: the best patch that each covers.

    Pruning comes after the backbone and saves nothing of it; this saves the views that are not looked at.
    """

    def __init__(self, dim, keep, views, patches, hidden=64):
        super().__init__()
        self.keep, self.scores = keep, mlp(dim, 1, hidden)
        self.regions = nn.Parameter(torch.zeros(views, patches), requires_grad=False)  # 1 where a view covers a patch

    def forward(self, patches):
        """[N, P, D] of the whole view -> scores [N, V] of all views; the first, the whole, is always looked at."""
        scores = self.scores(F.layer_norm(patches, patches.shape[-1:]))[..., 0][:, None]  # [N, 1, P]
        return scores.masked_fill(self.regions == 0, -torch.inf).amax(-1)

    def choose(self, patches):
        """-> [N, keep + 1] of the views to look at, rising"""
        scores = self(patches)
        scores[:, 0] = torch.inf
        return scores.topk(self.keep + 1, 1).indices.sort(1).values


class Pyramid(nn.Module):
    """Each view at full, half and a quarter of the width, put together again and added to it."""

    def __init__(self, dim):
        super().__init__()
        self.two, self.four = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim // 4)
        self.join, self.norm = nn.Linear(dim + dim // 2 + dim // 4, dim), nn.RMSNorm(dim, 1e-6)

    def forward(self, x):
        half = F.silu(self.two(x))
        return self.norm(x + self.join(torch.cat([x, half, F.silu(self.four(half))], -1)))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.out(F.silu(self.gate(x)) * self.value(x))


class Experts(nn.Module):
    """Each view goes to the `active` experts that the router prefers, mixed by its renormalised probabilities."""

    def __init__(self, dim, hidden, experts, active=2):
        super().__init__()
        self.active, self.router = min(active, experts), nn.Linear(dim, experts)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(experts))

    def forward(self, x):
        """-> [N, k, W] and the balance loss E * sum_e share_e * probability_e: 1 where all experts are used alike."""
        p = self.router(x).softmax(-1)  # [N, k, E]
        top, index = p.topk(self.active, -1)
        weights = torch.zeros_like(p).scatter(-1, index, top / top.sum(-1, keepdim=True))
        out = sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        share = (weights > 0).to(p).mean((0, 1)) / self.active
        return out, len(self.experts) * (share * p.mean((0, 1))).sum()


class ViewBlock(nn.Module):
    """Views attend to each other; what each gets passes a gate of its own (arXiv:2505.06708), before the projection."""

    def __init__(self, dim, heads, gated=True, experts=0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads, self.norm1, self.norm2 = heads, nn.RMSNorm(dim, 1e-6), nn.RMSNorm(dim, 1e-6)
        self.qkv, self.proj, self.gate = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), None
        if gated:
            self.gate = nn.Linear(dim, dim)
        self.ffn = Experts(dim, 2 * dim, experts) if experts else SwiGLU(dim, 2 * dim)

    def attend(self, x, seen=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, k, W / heads]
        mask = None if seen is None else seen[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())

    def forward(self, x, seen=None):
        """seen [N, k] bool: views that others may look at -> x [N, k, W], balance loss (0 without experts)"""
        x = x + self.attend(self.norm1(x), seen)
        out = self.ffn(self.norm2(x))
        out, balance = out if isinstance(out, tuple) else (out, 0.0)
        return x + out, balance


class Attend(nn.Module):
    """Gated attention (Ilse, arXiv:1802.04712): views [N, k, W] -> logarithms of their weights [N, k]."""

    def __init__(self, dim, hidden=64):
        super().__init__()
        self.tanh, self.sigmoid = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, 1, bias=False)  # a bias would be the same for all views
        nn.init.normal_(self.out.weight, std=0.01)  # near the mean at first, so that no view is chosen by chance

    def forward(self, x):
        return self.out(self.tanh(x).tanh() * self.sigmoid(x).sigmoid())[..., 0]


# ----- facts of a picture beside its pixels

WAVES, TEXT, EMBEDDED = 32, 384, 64  # frequencies per coordinate, numbers of a text, numbers of a field


def hash_text(texts):
    """[N, TEXT] of texts: each word adds 1 or -1 at a place that its hash gives; length 1; no words: all 0."""
    out = torch.zeros(len(texts), TEXT)
    for row, text in zip(out, texts):
        for word in re.findall(r"\w+", str(text).lower()):
            digest = hashlib.sha256(word.encode()).digest()
            row[int.from_bytes(digest[:4], "big") % TEXT] += 1 - 2 * (digest[4] % 2)
    return F.normalize(out, dim=1)


def waves(degrees):
    """Latitude and longitude [N, 2] in degrees -> [N, 4 * WAVES]: sines and cosines, 1 to 2^12 waves around the world.

    The finest is 10 km long; finer ones would be noise of the place where one happened to stand.
    """
    scaled = degrees / torch.tensor([90.0, 180.0], device=degrees.device)
    angles = torch.pi * scaled[..., None] * 2 ** torch.linspace(0, 12, WAVES, device=degrees.device)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


class Metadata(nn.Module):
    """Facts -> [N, size]. fields {name: "gps", "text" or a number of categories}; a missing one is a learned vector.

    Missing is: gps [N, 2] with NaN, a category [N] below 0, a text [N, TEXT] of zeros, and what the caller drops.
    """

    def __init__(self, fields):
        super().__init__()
        if not fields:
            raise ValueError("metadata needs fields: {name: gps, text or a number of categories}")
        self.fields, layers, sizes = dict(fields), [], []
        for kind in self.fields.values():
            known = {"gps": nn.Identity, "text": lambda: nn.Linear(TEXT, EMBEDDED)}
            layers.append(known[kind]() if kind in known else nn.Embedding(kind, EMBEDDED))
            sizes.append(4 * WAVES if kind == "gps" else EMBEDDED)
        self.layers, self.size = nn.ModuleList(layers), sum(sizes)
        self.null = nn.ParameterList(0.02 * torch.randn(size) for size in sizes)

    def forward(self, facts, known=None):
        """known [N, fields]: False where a field counts as missing, so that training sees that too."""
        out = []
        for i, ((name, kind), layer, null) in enumerate(zip(self.fields.items(), self.layers, self.null)):
            x = facts[name]
            if kind == "gps":
                here, value = x.isfinite().all(1), layer(waves(x.float().nan_to_num(0, 0, 0)))
            elif kind == "text":
                here, value = (x != 0).any(1), layer(x.float())
            else:
                here, value = (x >= 0) & (x < kind), layer(x.clamp(0, kind - 1))
            here = here if known is None else here & known[:, i]
            out.append(torch.where(here[:, None], value, null))
        return torch.cat(out, 1)


class Fusion(nn.Module):
    """Views of a picture and what is known of it -> logits. By default: gated attention over the views, a linear layer.

    width: projection to it (0: none). keep: views left by pruning (0: all). pyramid. depth: blocks of attention
    between views, of `heads`, with an output gate if `gated`, with `experts` (0: one plain SwiGLU). pool: mil
    or mean. fields: metadata. consistency: a classifier shared by all views. weather: classes that are told from the
    picture before metadata. masks: classes told for each patch. hidden: of the heads. prescore: what Prescore is made
    with; the caller, who has the backbone, uses it.
    """

    def __init__(self, dim, classes, width=0, keep=0, pyramid=False, depth=0, heads=4, gated=True, experts=0,
                 pool="mil", fields=None, consistency=False, weather=0, masks=0, hidden=0,
                 prescore=()):  # fmt: skip
        super().__init__()
        W = width or dim
        self.centre = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(dim), requires_grad=False)
        self.project = nn.Linear(dim, W) if width else nn.Identity()
        self.prune = Prune(W, keep) if keep else None
        self.pyramid = Pyramid(W) if pyramid else nn.Identity()
        self.blocks = nn.ModuleList(ViewBlock(W, heads, gated, experts) for _ in range(depth))
        if pool not in ("mil", "mean"):
            raise ValueError(f"pool {pool!r} of Fusion: known are mil, mean")
        self.norm, self.attend = nn.RMSNorm(W, 1e-6), Attend(W) if pool == "mil" else None
        self.metadata = Metadata(fields) if fields else None
        self.join = nn.Linear(W + self.metadata.size, W) if fields else None
        self.head = mlp(W, classes, hidden)
        self.view_head = mlp(W, classes, hidden) if consistency else None
        self.weather_head = mlp(W, weather, hidden) if weather else None
        self.mask_head = mlp(W, masks, hidden) if masks else None
        self.prescore = Prescore(*prescore) if prescore else None

    @torch.no_grad()
    def standardise(self, views):
        """Features of the training views [..., D] get mean 0 and deviation 1; kept with the weights."""
        views = views.flatten(0, -2).double()
        self.centre.copy_(views.mean(0))
        self.spread.copy_(views.std(0, correction=0).clamp(min=1e-6))

    def forward(self, views, facts=None, known=None, patches=None):
        """views [N, V, D]; facts and known: see Metadata; patches [N, V, P, D] of the same space -> Fused."""
        more, N, V = {}, *views.shape[:2]
        x = self.project((views - self.centre) / self.spread)
        if self.mask_head is not None and patches is not None:
            more["masks"] = self.mask_head(self.project((patches - self.centre) / self.spread))
        kept, seen, choice = torch.arange(V, device=x.device).expand(N, V), None, None
        if self.prune is not None and self.prune.keep < V:
            kept, choice, more["ratio"] = self.prune(x)
            seen = choice.detach() > 0.5
            if not self.training:  # training carries all views along, unseen, so that each score has a gradient
                x, seen, choice = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), None, None
        x = self.pyramid(x)
        for block in self.blocks:
            x, balance = block(x, seen)
            more["balance"] = more.get("balance", 0.0) + balance / len(self.blocks)
        x = self.norm(x)
        scores = x.new_zeros(x.shape[:2]) if self.attend is None else self.attend(x)
        weights = scores.softmax(1)
        if choice is not None:
            weights = weights * choice
            weights = weights / weights.sum(1, keepdim=True)
        features = (weights[..., None] * x).sum(1)
        if choice is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        if self.view_head is not None:
            more["views"] = self.view_head(x)
        if self.weather_head is not None:
            more["weather"] = self.weather_head(features)
        joined = features
        if self.metadata is not None:
            joined = features + F.silu(self.join(torch.cat([features, self.metadata(facts, known)], 1)))
        if choice is None:
            weights = weights.new_zeros(N, V).scatter(1, kept, weights)
        return Fused(self.head(joined), features, x, kept, weights, more)


# ----- its loss

SHARES = {"main": 0.40, "views": 0.25, "weather": 0.15, "masks": 0.20}  # renormalised over the terms that are there
ASIDE = {"ratio": 1.0, "balance": 0.01}  # added to it, as DynamicViT and mixtures of experts do


def view_consistency(logits):
    """Mean KL of the mean view (which stands still) from each view, of logits [N, k, C]."""
    log_p = F.log_softmax(logits, -1)
    mean = log_p.exp().mean(1, keepdim=True).detach()
    return (mean * (mean.clamp(min=1e-30).log() - log_p)).sum(-1).mean()


def mask_loss(logits, masks):
    """Binary cross entropy + Dice of [N, V, P, M]; masks: share of the patch, NaN: not known. None: none is known."""
    known = masks.isfinite()
    if not known.any():
        return None
    truth, p = masks.nan_to_num(), torch.where(known, logits.sigmoid(), 0)
    bce = F.binary_cross_entropy_with_logits(logits[known], truth[known])
    both, each = (2 * (p * truth).sum((0, 1, 2)), (p + truth).sum((0, 1, 2)))
    return bce + (1 - (both + 1) / (each + 1)).mean()


def combined_loss(main, out, weather=None, masks=None, shares=SHARES):
    """-> loss, {term: value}. main: the loss of out.logits; weather [N], -1: not known; masks as in mask_loss.

    A term that the batch has nothing for does not count, and the others take over its share.
    """
    terms, more = {"main": main}, out.auxiliary
    if "views" in more:
        terms["views"] = view_consistency(more["views"])
    if "weather" in more and weather is not None and (weather >= 0).any():
        terms["weather"] = F.cross_entropy(more["weather"], weather, ignore_index=-1)
    if "masks" in more and masks is not None and (found := mask_loss(more["masks"], masks)) is not None:
        terms["masks"] = found
    loss = sum(shares[name] * term for name, term in terms.items()) / sum(shares[name] for name in terms)
    aside = {name: more[name] for name in ASIDE if isinstance(more.get(name), Tensor)}
    return loss + sum(ASIDE[name] * value for name, value in aside.items()), {**terms, **aside}
