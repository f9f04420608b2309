"""DINOv3 vision transformer, projection head, adapters, classifier, and weights in every common layout.

Copyable: imports torch and safetensors only. Facts from the DINOv3 paper (arXiv:2508.10104) and its public code.
Letters: B images, N patches, R registers, D features, H heads, K prototypes, T packed tokens.
Tokens come in the order [cls | registers | patches]. One training step on images [B, 3, 224, 224] and labels [B]:

    vit = build_vit("vit_small")  # or load_backbone("weights.pth").train()
    head = torch.nn.Linear(vit.dim, 2)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-4)
    loss = torch.nn.functional.cross_entropy(head(vit(images).cls), labels)
    loss.backward()
    optimizer.step()

With names = add_adapters(vit, rank=16, alpha=32, norm="dora", targets="qv") before the optimizer, of the backbone only
these low-rank changes are trained (give it what requires_grad), and merge_adapters(vit) is a plain one afterwards.
"""

import hashlib
import inspect
import itertools
import json
import math
import numbers
import os
import re
import reprlib
import stat
import zipfile
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

ARCHS = {  # patch 16 and 4 registers unless overridden
    "vit_test": dict(dim=64, depth=2, heads=2, ffn_dim=128),
    "vit_tiny": dict(dim=192, depth=12, heads=3, ffn_dim=768),
    "vit_small": dict(dim=384, depth=12, heads=6, ffn_dim=1536),
    "vit_small_plus": dict(dim=384, depth=12, heads=6, ffn_dim=1536, gated=True),
    "vit_base": dict(dim=768, depth=12, heads=12, ffn_dim=3072),
    "vit_large": dict(dim=1024, depth=24, heads=16, ffn_dim=4096),
    "vit_huge_plus": dict(dim=1280, depth=32, heads=20, ffn_dim=5120, gated=True),
    "vit_giant": dict(dim=1408, depth=40, heads=16, ffn_dim=6144),
    "vit_7b": dict(dim=4096, depth=40, heads=32, ffn_dim=8192, gated=True, qkv_bias=False, local_cls_norm=True),
}


class Tokens(NamedTuple):
    """What a backbone says about images, after the final norm."""

    cls: Tensor  # [B, D]
    registers: Tensor  # [B, R, D]
    patches: Tensor  # [B, N, D], row-major


class RopeDraw(NamedTuple):
    """One training-time distortion of the patch coordinates: (coords + shift) * jitter * rescale."""

    shift: Tensor  # [2], y and x
    jitter: Tensor  # [2]
    rescale: Tensor  # [1]


def rope_table(height, width, head_dim, base=100.0, prefix=0, draw=None, device=None):
    """cos and sin [prefix + height * width, head_dim] of axial rotary positions, float32.

    Patch centres lie in (-1, 1) on each axis; theta = 2 pi coord / base^(4j / head_dim), y angles then x angles,
    twice. The first `prefix` tokens (cls, registers) have no position: cos 1, sin 0 leave them as they are.
    """
    y, x = (2 * (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 1 for n in (height, width))
    coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)  # [N, 2]
    if draw is not None:
        coords = (coords + draw.shift) * draw.jitter * draw.rescale
    theta = 2 * math.pi * coords[:, :, None] / rope_periods(head_dim, base, device)  # [N, 2, head_dim / 4]
    theta = torch.cat([theta.flatten(1)] * 2, 1)  # not tile, at which TensorRT stumbles
    theta = F.pad(theta, (0, 0, prefix, 0))  # angle 0 is the identity
    return theta.cos(), theta.sin()


def rope_periods(head_dim, base=100.0, device=None):
    return base ** (4 * torch.arange(head_dim // 4, device=device, dtype=torch.float32) / head_dim)


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + h/2) of the last axis, in float32 whatever x is."""
    half = x.shape[-1] // 2
    if x.device.type == "cuda":  # a compiled block of ViT-L takes 8.4 ms where the lines below take 8.7 (H200)
        (a, b), cos, sin = x.chunk(2, -1), cos[..., :half], sin[..., :half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    swapped = x.unflatten(-1, (2, half)).flip(-2).flatten(-2)  # 2.8 x torch.cat of the halves on a CPU, 2026-11
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return torch.addcmul(x * cos, swapped, signed).to(x.dtype)


def send(t, device):
    """A small tensor of the host on a device; from page-locked memory, so that nobody waits for the copy."""
    cuda = device is not None and torch.device(device).type == "cuda"
    return t.pin_memory().to(device, non_blocking=True) if cuda else t.to(device)


def draw_rope(generator, rescale=2.0, shift=0.0, jitter=1.0, device=None):
    """Draw one RopeDraw: shift U(-s, s), jitter and rescale log-uniform in [1/j, j] and [1/r, r]."""
    u = 2 * torch.rand(5, generator=generator) - 1
    logs = torch.tensor([math.log(jitter), math.log(jitter), math.log(rescale)])
    factors = send(torch.cat([u[:2] * shift, torch.exp(u[2:] * logs)]), device)
    return RopeDraw(factors[:2], factors[2:4], factors[4:])


def draw_keep(generator, depth, batches, rate, device=None):
    """Rows that pass each residual branch: per block (attention, ffn), per view group a LongTensor; None at rate 0."""
    if rate == 0:
        return None
    counts = [max(int(b * (1 - rate)), 1) for b in batches]
    rows = [torch.randperm(b, generator=generator)[:c] for _ in range(2 * depth) for b, c in zip(batches, counts)]
    rows = send(torch.cat(rows), device).split(counts * 2 * depth)  # one copy to the device, not hundreds
    groups = len(batches)
    branches = [rows[i : i + groups] for i in range(0, len(rows), groups)]
    return list(zip(branches[::2], branches[1::2]))


# Packed tokens: all view groups as one [T, D], `shapes` = [(images, tokens per image), ...] says how to cut it.


def pack(parts):
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unpack(x, shapes):
    """[T, D] -> one [B, tokens, D] per group."""
    return [part.unflatten(0, shape) for part, shape in zip(x.split([b * n for b, n in shapes]), shapes)]


def kept_tokens(x, shapes, images):
    """Stochastic depth keeps `images` of each group -> their tokens [n], the factor B / kept of each [n, 1], shapes."""
    index, scale, kept, start = [], [], [], 0
    for (b, n), i in zip(shapes, images):
        index.append((start + i[:, None] * n + torch.arange(n, device=x.device)).flatten())
        scale.append(torch.full((len(i) * n, 1), b / len(i), device=x.device))  # of bfloat16 1 / 0.7 would be 0.2% off
        kept.append((len(i), n))
        start += b * n
    return pack(index), pack(scale), kept


def add_branch(x, shapes, images, branch):
    """x + branch(x). With stochastic depth only the kept `images` of each group pass, scaled by B / kept."""
    if images is None:
        return x + branch(x, shapes).to(x.dtype)
    index, scale, kept = kept_tokens(x, shapes, images)
    update = branch(x.index_select(0, index), kept) * scale
    return x.index_add(0, index, update.to(x.dtype))


class Attention(nn.Module):
    """Self-attention inside each image, rotary positions on patches, no bias on keys."""

    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])  # with RoPE a key bias would change results
        return self.qkv(x, bias) if isinstance(self.qkv, Adapted) else F.linear(x, self.qkv.weight, bias)

    def split_heads(self, qkv, shape, rope):
        """[B * n, 3D] -> rotated q, k and v [B, H, n, D / H]."""
        # chunk, not unbind: the gradient of unbind is a stack, whose kernel took 0.43 ms a block of ViT-S on an H200,
        # most of it for integer divisions; the gradient of chunk needs a sixth of the instructions (counted)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in qkv.unflatten(0, shape).chunk(3, -1))  # [B, n, H, D / H]
        if v.is_cuda:  # attention keeps v, and a view of qkv all of it: a tenth of what a compiled block keeps
            v = v.clone(memory_format=torch.contiguous_format)
        rope = [t[:, None] for t in rope]
        return rotate(q, *rope).transpose(1, 2), rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, shapes, ropes, scale, rows=None):
        """rows: of the result alone, where others are not read."""
        parts = []
        qkv = self.project(x)
        for part, shape, rope in zip(qkv.split([b * n for b, n in shapes]), shapes, ropes):
            q, k, v = self.split_heads(part, shape, rope)
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
        return scale(self.proj, *(parts if rows is None else [pack(parts).index_select(0, rows)]))

    def cls_probabilities(self, x, shape, rope):
        """Softmax row of the cls token over all tokens, [B, H, 1 + R + N], float32."""
        q, k, _ = self.split_heads(self.project(x), shape, rope)
        scores = (q[:, :, :1].float() @ k.float().mT)[:, :, 0] * q.shape[-1] ** -0.5
        return scores.softmax(-1)


class MLP(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, x, scale):
        return scale(self.fc2, F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim)  # gate
        self.w2 = nn.Linear(dim, ffn_dim)
        self.w3 = nn.Linear(ffn_dim, dim)

    def forward(self, x, scale):
        return scale(self.w3, F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, dim, value):
        super().__init__()
        self.value = float(value)
        self.gamma = nn.Parameter(torch.full((dim,), self.value))

    def forward(self, linear, *parts):
        """linear(x) * gamma of all parts, packed.

        Training scales the weight, so that no pass over tokens is made and none kept for the gradient of gamma; and it
        multiplies part by part: a copy of attention's results, which attention keeps already, would be kept too.
        """
        if isinstance(linear, Adapted) or not torch.is_grad_enabled():
            return linear(pack(parts)) * self.gamma
        weight, bias = linear.weight * self.gamma[:, None], linear.bias * self.gamma
        return pack([F.linear(x, weight, bias) for x in parts])


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens; draws nothing itself, so recomputing it gives the same numbers."""

    def __init__(self, dim, heads, ffn_dim, gated, qkv_bias, norm_eps, layerscale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = (SwiGLU if gated else MLP)(dim, ffn_dim)
        self.ls2 = LayerScale(dim, layerscale)

    def forward(self, x, shapes, ropes, keep=(None, None), rows=None):
        if rows is not None:
            return self.forward_rows(x, shapes, ropes, keep, rows)
        x = add_branch(x, shapes, keep[0], lambda y, kept: self.attn(self.norm1(y), kept, ropes, self.ls1))
        return add_branch(x, shapes, keep[1], lambda y, kept: self.mlp(self.norm2(y), self.ls2))

    def forward_rows(self, x, shapes, ropes, keep, rows):
        """The same for some `rows` [R] of the result: all tokens are keys and values, and the rest is done for R.

        A dropped branch is computed and counts 0: which rows are dropped is known to the device alone.
        """
        tokens, kept, place, factors = x, shapes, rows, [1, 1]
        for k, images in enumerate(keep):
            if images is not None:
                index, scale, kept_shapes = kept_tokens(x, shapes, images)
                factors[k] = scale.new_zeros(len(x), 1).index_copy(0, index, scale).index_select(0, rows)
                if k == 0:
                    at = torch.arange(len(index), device=x.device)
                    place = rows.new_zeros(len(x)).index_copy(0, index, at).index_select(0, rows)
                    tokens, kept = x.index_select(0, index), kept_shapes
        x = x.index_select(0, rows)
        x = x + (factors[0] * self.attn(self.norm1(tokens), kept, ropes, self.ls1, place)).to(x.dtype)
        return x + (factors[1] * self.mlp(self.norm2(x), self.ls2)).to(x.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, in_chans, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images):
        chans, p = self.proj.in_channels, self.proj.stride[0]
        if images.ndim != 4 or images.shape[1] != chans:
            raise ValueError(f"images must be [B, {chans}, height, width], got {list(images.shape)}")
        for name, side in zip(("height", "width"), images.shape[2:]):
            if side % p or not side:
                raise ValueError(f"image {name} {side} is not a multiple of the patch size {p}")
        # the convolution as one matrix product, which tensor cores take: its own kernel ran without them on an H200
        rows, columns = (side // p for side in images.shape[2:])
        patches = images.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 1, 3, 5)
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.flatten(3).flatten(1, 2), weight, self.proj.bias)  # [B, N, D]


class VisionTransformer(nn.Module):
    def __init__(self, dim, depth, heads, ffn_dim, gated=False, qkv_bias=True, patch_size=16, in_chans=3, registers=4,
                 norm_eps=1e-5, layerscale=1e-5, rope_base=100.0, cls_norm=False, local_cls_norm=False,
                 checkpointing=False):  # fmt: skip
        super().__init__()
        if dim % (4 * heads):
            raise ValueError(f"dim {dim} must be a multiple of 4 * heads ({4 * heads}): RoPE turns pairs on two axes")
        self.dim, self.depth, self.heads, self.registers, self.patch_size = dim, depth, heads, registers, patch_size
        self.rope_base, self.checkpointing = rope_base, checkpointing
        self.stream = None  # dtype of the tokens between blocks; None: what the embedding gives, float32 under autocast
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        shape = (dim, heads, ffn_dim, gated, qkv_bias, norm_eps, layerscale)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.cls_norm = nn.LayerNorm(dim, norm_eps) if cls_norm else None  # cls and registers, if untied
        self.local_cls_norm = nn.LayerNorm(dim, norm_eps) if local_cls_norm else None  # theirs in local crops
        self.init_weights()

    def init_weights(self):
        """Linear normal(0.02), bias 0; conv uniform(1 / sqrt(fan in)); tokens normal(0.02), mask 0."""
        init_linears(self)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.value)
        bound = self.patch_embed.proj.weight[0].numel() ** -0.5
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.uniform_(self.patch_embed.proj.bias, -bound, bound)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)

    def embed(self, images, mask=None, draw=None):
        """Images [B, C, height, width] -> tokens [B, 1 + R + N, D] and their rope table."""
        x = self.patch_embed(images)
        cls = self.cls_token
        if mask is None:
            cls = cls + 0 * self.mask_token  # DDP wants every parameter in the graph
        else:
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        prefix = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in prefix), x], 1)  # len() would fix it in an export
        grid = [side // self.patch_size for side in images.shape[2:]]
        rope = rope_table(*grid, self.dim // self.heads, self.rope_base, 1 + self.registers, draw, x.device)
        return x, rope

    def run_block(self, block, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def prefix_norm(self, group):
        """The final norm of cls and registers in a view group."""
        return (self.local_cls_norm if group > 0 and self.training else None) or self.cls_norm or self.norm

    def to_tokens(self, x, shapes, norm=True):
        """Packed [T, D] -> one Tokens per group, through the final norms."""
        out = []
        for group, part in enumerate(unpack(x, shapes)):
            prefix, patches = part.split([1 + self.registers, part.shape[1] - 1 - self.registers], 1)
            if norm:
                prefix, patches = self.prefix_norm(group)(prefix), self.norm(patches)
            out.append(Tokens(prefix[:, 0], prefix[:, 1:], patches))
        return out

    def forward_crops(self, crops, masks=None, keep=None, rope=None):
        """One packed pass over view groups of different sizes: [[B, C, height, width], ...] -> [Tokens, ...].

        Token-wise work is done once on all groups together, attention per group. `masks`, `rope` (RopeDraw): one
        entry per group, or None; a lone mask belongs to the first group. `keep`: what draw_keep returns.
        """
        return self.to_tokens(*self.encode(crops, masks, keep, rope))

    def forward_read(self, crops, masks=None, keep=None, rope=None, at=None):
        """forward_crops for a few of its rows: ([cls [B, D] of each group], patches [M, D] of the first group).

        `at` [M]: positions in the first group's flattened [B * N] patches, None: all. The last block computes keys and
        values of all tokens, and the rest for these alone: 6% of a training step of ViT-S.
        """

        def rows(shapes):
            starts = itertools.accumulate((b * n for b, n in shapes), initial=0)
            cls = [start + n * torch.arange(b, device=crops[0].device) for start, (b, n) in zip(starts, shapes)]
            b, n = shapes[0]
            prefix, patches = 1 + self.registers, n - 1 - self.registers
            inside = torch.arange(b * patches, device=crops[0].device) if at is None else at
            return torch.cat([*cls, inside // patches * n + prefix + inside % patches])

        x, shapes = self.encode(crops, masks, keep, rope, rows)
        *cls, patches = x.split([*(b for b, _ in shapes), len(x) - sum(b for b, _ in shapes)])
        return [self.prefix_norm(group)(c) for group, c in enumerate(cls)], self.norm(patches)

    def encode(self, crops, masks=None, keep=None, rope=None, rows=None):
        """-> packed tokens after the last block and shapes; rows(shapes): positions of those that are read."""
        absent = [None] * len(crops)
        if isinstance(masks, Tensor):
            masks = [masks, *absent[1:]]
        groups = [self.embed(*group) for group in zip(crops, masks or absent, rope or absent)]
        shapes = [tuple(x.shape[:2]) for x, _ in groups]
        ropes = [r for _, r in groups]
        x = pack([x.flatten(0, 1) for x, _ in groups])
        narrow = self.stream is not None and torch.is_autocast_enabled(x.device.type)  # else products would mix dtypes
        x = x.to(self.stream) if narrow else x
        for i, block in enumerate(self.blocks):
            read = [rows(shapes)] if rows and i == self.depth - 1 else []
            x = self.run_block(block, x, shapes, ropes, keep[i] if keep else (None, None), *read)
        return x, shapes

    def forward(self, images, masks=None):
        """Images [B, C, height, width], masks [B, N] (True = hidden) -> Tokens."""
        return self.forward_crops([images], masks)[0]

    def walk(self, images):
        """Packed tokens before block 0, 1, ... and after the last, each with their shape and rope table."""
        x, rope = self.embed(images)
        shape, x = tuple(x.shape[:2]), x.flatten(0, 1)
        yield x, shape, rope
        for block in self.blocks:
            x = self.run_block(block, x, [shape], [rope])
            yield x, shape, rope

    def intermediate(self, images, layers, norm=True):
        """Tokens after the given blocks (a count from the end, or indices), through the final norms if `norm`."""
        layers = range(self.depth - layers, self.depth) if isinstance(layers, int) else layers
        layers = [self.layer_index(i) for i in layers]
        found = {}
        for after, (x, shape, _) in zip(range(-1, max(layers) + 1), self.walk(images)):
            if after in layers:
                found[after] = self.to_tokens(x, [shape], norm)[0]
        return [found[i] for i in layers]

    def cls_probabilities(self, images, layer=-1):
        """Attention of the cls token over all tokens in one block, [B, H, 1 + R + N]; each row sums to 1."""
        layer = self.layer_index(layer)
        x, shape, rope = next(itertools.islice(self.walk(images), layer, None))  # what goes into that block
        block = self.blocks[layer]
        return block.attn.cls_probabilities(block.norm1(x), shape, rope)

    def attention(self, images, layer=-1):
        """Attention of cls to the patches, [B, H, rows, columns]; the rest of its mass is on cls and registers."""
        grid = [side // self.patch_size for side in images.shape[2:]]
        return self.cls_probabilities(images, layer)[:, :, 1 + self.registers :].unflatten(-1, grid)

    def layer_index(self, layer):
        if not -self.depth <= layer < self.depth:
            raise ValueError(f"layer {layer} does not exist: this backbone has {self.depth} blocks")
        return layer % self.depth


def init_linears(module):
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


OPTIONS = {name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()}


def brief(value):
    """One short line, whatever the value."""
    return " ".join(reprlib.repr(value).split())[:120]


def some(names):
    """The first names in one line, whatever they are."""
    return ", ".join(" ".join(str(name)[:80].split()) for name in itertools.islice(names, 4))


def is_number(value, kind=numbers.Real, least=0, most=1e9):
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def all_options(arch, overrides):
    """Every keyword argument of VisionTransformer for a name in ARCHS; refuses what is unknown or no possible size."""
    if not isinstance(arch, str) or arch not in ARCHS:
        raise ValueError(f"unknown arch {brief(arch)}: known are {', '.join(ARCHS)}")
    if unknown := [name for name in overrides if name not in OPTIONS]:
        raise ValueError(f"unknown arch option {some(unknown)}: known are {', '.join(OPTIONS)}")
    for name, value in overrides.items():
        limits = numbers.Integral, int(name != "registers"), 1000 if name == "depth" else 1 << 20
        limits = {float: (numbers.Real,), bool: (numbers.Integral, 0, 1)}.get(type(OPTIONS[name]), limits)
        if not is_number(value, *limits) and (type(value), type(OPTIONS[name])) != (bool, bool):
            raise ValueError(f"arch option {name} is {brief(value)}: not a possible value")
    return {**OPTIONS, **ARCHS[arch], **overrides}


def build_vit(arch, **overrides):
    """VisionTransformer of a name in ARCHS; overrides are its keyword arguments."""
    vit = VisionTransformer(**all_options(arch, overrides))
    vit.arch = {"name": arch, "overrides": overrides}
    return vit


class ProjectionHead(nn.Module):
    """MLP to a bottleneck on the unit sphere, then prototypes: [..., D] -> logits [..., K]."""

    def __init__(self, in_dim, hidden_dim, bottleneck_dim, prototypes, layers=3):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (layers - 1) + [bottleneck_dim]
        linears = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
        with_gelu = [m for linear in linears for m in (linear, nn.GELU())][:-1]
        self.mlp = nn.Sequential(*with_gelu) if layers > 1 else linears[0]
        self.last_layer = nn.Linear(bottleneck_dim, prototypes, bias=False)
        self.init_weights()

    def init_weights(self):
        init_linears(self)

    def bottleneck(self, x):
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-12)

    def forward(self, x, score=None):
        """score(what goes into the last layer, its weight): what to return instead of logits."""
        x = self.bottleneck(x).to(self.last_layer.weight.dtype)
        return self.last_layer(x) if score is None else score(x, self.last_layer.weight)


class SSLOutput(NamedTuple):
    cls: list  # [B, D] of each view group
    patches: Tensor | None  # [B, N, D] of the first group, where asked for
    cls_logits: Tensor  # [images of all groups, K], group after group; or what `scores` make of them
    patch_logits: Tensor | None  # [M, K] at the given patches of the first group; or the same


class SSLModel(nn.Module):
    """Backbone and two heads; student and teacher alike. Its forward is the one entry for DDP and FSDP."""

    def __init__(self, backbone, dino_head, ibot_head):
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    def forward(self, crops, masks=None, at=None, keep=None, rope=None, patches=False, scores=(None, None)):
        """`at` [M]: positions in the first group's flattened [B * N] patches that go through the iBOT head.

        patches: all patches of the first group are read too. scores: what to make of either head's logits, losses as a
        rule: this forward is the only place where DDP and FSDP let weights be used.
        """
        none = at is None and not patches
        read = crops[0].new_zeros(0, dtype=torch.long) if none else None if patches else at
        cls, dense = self.backbone.forward_read(crops, masks, keep, rope, read)
        masked = None if at is None else dense.index_select(0, at) if patches else dense
        return SSLOutput(
            cls, dense.unflatten(0, (len(crops[0]), -1)) if patches else None,
            self.dino_head(torch.cat(cls), scores[0]), None if at is None else self.ibot_head(masked, scores[1]),
        )  # fmt: skip


# Adapters (LoRA, arXiv:2106.09685, and its kin) and the classifier that supervised runs train.


class Adapted(nn.Linear):
    """A linear layer whose frozen weight W acts as g * (W + scale * B A): B A of low rank, one factor g per row.

    lora, rslora: g = 1. dora (arXiv:2402.09353): g = magnitude / norm of the row of W + scale * B A, the norm taken as
    a constant by the gradient. doran (arXiv:2510.04331, without its auxiliary networks): g = magnitude / (norm +
    softplus(tau)). The rows come in equal `pieces`, of which the `chosen` ones have an A, B and tau each: q, k and v
    are three pieces of one layer. Only products of T tokens with thin matrices are added, never one with a dense B A.
    """

    def adapt(self, rank, scale, norm, init, pieces, chosen):
        self.scale, self.pieces, self.chosen = scale, pieces, chosen
        count, rows, new = len(chosen), self.out_features // pieces, self.weight.new_empty
        self.lora_a = nn.Parameter(new(count * rank, self.in_features).normal_(std=self.in_features**-0.5))
        self.lora_b = nn.Parameter(new(count * rows, rank).zero_())
        for w, a, b in self.adapters() if init == "pissa" else ():  # arXiv:2404.02948: B A is the principal part of W
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
            root = (s[:rank] / scale).sqrt()
            a.copy_(root[:, None] * vt[:rank])
            b.copy_(u[:, :rank] * root)
            w.sub_(scale * (b @ a))
        self.tau = nn.Parameter(new(count).fill_(-3.0)) if norm == "doran" else None  # softplus: 0.05
        self.magnitude = None
        if norm in ("dora", "doran"):
            self.magnitude = nn.Parameter(new(count * rows))
            if not self.weight.is_meta:
                self.magnitude.copy_(self.norms(self.changed()))

    def adapters(self):
        """(W [rows, in], A [rank, in], B [rows, rank]) of each chosen piece."""
        weights, count = self.weight.chunk(self.pieces), len(self.chosen)
        return zip([weights[i] for i in self.chosen], self.lora_a.chunk(count), self.lora_b.chunk(count))

    @torch.no_grad()
    def changed(self, dtype=None):
        """W + scale * B A of each chosen piece."""
        with torch.autocast(self.weight.device.type, enabled=False):
            parts = ((t.to(dtype or t.dtype) for t in part) for part in self.adapters())
            return [torch.addmm(w, b, a, alpha=self.scale) for w, a, b in parts]

    def norms(self, changed):
        """What the magnitude is divided by: [chosen rows]."""
        norms = torch.cat([v.norm(dim=1) for v in changed]).clamp(min=1e-12)  # a row of zeros stays one
        return norms if self.tau is None else norms + F.softplus(self.tau).repeat_interleave(len(changed[0]))

    def forward(self, x, bias=None):
        """x [T, in] -> [T, out]. At the start B = 0 and g = 1: what is added is 0, to the bit."""
        bias = self.bias if bias is None else bias
        parts = list(F.linear(x, self.weight, bias).chunk(self.pieces, -1))
        thin = F.linear(x, self.lora_a).chunk(len(self.chosen), -1)
        for i, h, b in zip(self.chosen, thin, self.lora_b.chunk(len(self.chosen))):
            parts[i] = torch.addmm(parts[i], h, b.mT, alpha=self.scale)
        if self.magnitude is not None:
            gains = (self.magnitude / self.norms(self.changed())).chunk(len(self.chosen))
            for i, g in zip(self.chosen, gains):  # g * (y - bias) + bias
                b = 0 if bias is None else (1 - g) * bias.chunk(self.pieces)[i]
                parts[i] = (parts[i] * g + b).to(parts[i].dtype)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def merged(self):
        """The one weight that does the same, computed in float64."""
        changed = self.changed(torch.float64)
        if self.magnitude is not None:
            gains = (self.magnitude.double() / self.norms(changed)).chunk(len(changed))
            changed = [g[:, None] * v for g, v in zip(gains, changed)]
        parts = list(self.weight.chunk(self.pieces))
        for i, v in zip(self.chosen, changed):
            parts[i] = v.to(self.weight.dtype)
        return torch.cat(parts)


ADAPTER_NORMS = ("lora", "rslora", "dora", "doran")
ADAPTER_PRESETS = {"qv": "q v", "qkv": "q k v", "all": "q k v proj mlp"}


def adapted_layers(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Adapted)}


@torch.no_grad()
def add_adapters(vit, rank, alpha, norm="lora", targets="all", init="zero", unfreeze=0, blocks=None):
    """Freeze a backbone but for low-rank adapters -> names of its trainable parameters. Draws from torch's generator.

    targets: a preset, or some of q k v proj mlp (mlp: fc1 fc2, or w1 w2 w3). unfreeze: the last n blocks are trained
    whole and have no adapters, and all norms are trained too (ExPLoRA, arXiv:2406.10973). blocks: a count from the end
    or indices; None: all that are not unfrozen. Base weights keep their names; vit.arch says how to build it again.
    """
    mlp = "w1 w2 w3" if isinstance(vit.blocks[0].mlp, SwiGLU) else "fc1 fc2"
    known = f"q k v proj {mlp}".split()
    given = ADAPTER_PRESETS.get(targets, targets) if isinstance(targets, str) else " ".join(targets)
    names = set(re.sub(r"\bmlp\b", mlp, given.replace(",", " ")).split())
    if not names or names - set(known):
        raise ValueError(f"adapter targets {brief(targets)}: this backbone has {', '.join(known)}; mlp is the last "
                         f"{len(known) - 4}, and presets are {', '.join(ADAPTER_PRESETS)}")  # fmt: skip
    if norm not in ADAPTER_NORMS or init not in ("zero", "pissa"):
        raise ValueError(f"adapter norm {brief(norm)}, init {brief(init)}: known are {', '.join(ADAPTER_NORMS)}; "
                         "zero, pissa")  # fmt: skip
    most = min(min(p.shape) for p in vit.blocks[0].mlp.parameters() if p.ndim == 2)
    if not is_number(rank, numbers.Integral, 1, most) or not is_number(alpha, least=1e-6):
        raise ValueError(f"adapter rank {brief(rank)}, alpha {brief(alpha)}: a rank is 1 to {most}, alpha above 0")
    if not is_number(unfreeze, numbers.Integral, 0, vit.depth - 1):
        raise ValueError(f"unfreeze {brief(unfreeze)}: 0 to {vit.depth - 1} of {vit.depth} blocks, adapters need one")
    first_whole = vit.depth - unfreeze
    blocks = first_whole if blocks is None else blocks
    blocks = list(range(first_whole - blocks, first_whole) if isinstance(blocks, int) else blocks)
    if not blocks or not all(is_number(i, numbers.Integral, 0, first_whole - 1) for i in blocks):
        raise ValueError(f"adapters in blocks {brief(blocks)}: choose of 0 to {first_whole - 1}, others are unfrozen")
    if adapted_layers(vit):
        raise ValueError("this backbone has adapters already; merge_adapters makes a plain one of it")
    places = {("attn." if name == "proj" else "mlp.") + name: (1, [0]) for name in known[3:] if name in names}
    if qkv := [i for i, name in enumerate("qkv") if name in names]:
        places["attn.qkv"] = 3, qkv
    vit.requires_grad_(False)
    for block in (vit.blocks[i] for i in blocks):
        for place, part in places.items():
            layer = block.get_submodule(place)
            layer.__class__ = Adapted
            layer.adapt(rank, alpha / rank ** (0.5 if norm == "rslora" else 1), norm, init, *part)
    whole = [*vit.blocks[first_whole:], *(m for m in vit.modules() if unfreeze and isinstance(m, nn.LayerNorm))]
    for module in whole:
        module.requires_grad_()
    vit.arch = {**vit.arch, "adapters": dict(rank=rank, alpha=alpha, norm=norm, targets=" ".join(sorted(names)),
                                             unfreeze=unfreeze, blocks=blocks)}  # fmt: skip
    return [name for name, p in vit.named_parameters() if p.requires_grad]


def merge_adapters(vit):
    """A plain backbone with equal outputs; the one given stays as it is."""
    state = vit.state_dict()
    if any(hasattr(p, "full_tensor") for p in state.values()):
        raise ValueError("merge_adapters: these weights are shards; save a checkpoint, load_backbone merges it")
    for name, layer in adapted_layers(vit).items():
        state[f"{name}.weight"] = layer.merged()
    with torch.device("meta"):
        plain = build_vit(vit.arch["name"], **vit.arch["overrides"])
    plain.load_state_dict({name: state[name].detach().clone() for name in plain.state_dict()}, assign=True)
    plain.checkpointing = vit.checkpointing
    return plain.train(vit.training)


def build_arch(arch):
    """What the field arch of a checkpoint describes: a backbone, with adapters where it had some."""
    vit = build_vit(arch["name"], **arch["overrides"])
    if "adapters" in arch:
        try:
            add_adapters(vit, **arch["adapters"])
        except TypeError as error:  # of a file that somebody else made
            raise ValueError(f"field arch says adapters {brief(arch['adapters'])}: {error}") from None
    return vit


def say_trained(module):
    """One line: how many parameters are trained, and of which kinds."""
    counts = {}
    for name, p in module.named_parameters():
        kind = name.rpartition(".")[2] if p.requires_grad else None
        counts[kind] = counts.get(kind, 0) + p.numel()
    total, frozen = sum(counts.values()), counts.pop(None, 0)
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in counts.items())
    return f"{total - frozen:,} of {total:,} parameters are trained ({1 - frozen / total:.2%}): {kinds or 'none'}"


class Head(nn.Module):
    """Dropout and one linear layer: features [B, dim] -> logits [B, classes]."""

    def __init__(self, dim, classes, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.last_layer = nn.Linear(dim, classes)
        init_linears(self)

    def forward(self, x, keep=None):
        """keep [B, dim]: True where a feature passes, drawn by the caller, so that a step can be run again."""
        if keep is None:
            x = F.dropout(x, self.dropout, self.training)
        else:
            x = x * keep / (1 - self.dropout)
        return self.last_layer(x)


class Classifier(nn.Module):
    """Backbone and head: images [B, C, height, width] -> logits [B, classes]. DDP and FSDP call forward.

    pool: cls, mean (of the patches; cls and registers are left out) or both, of each of the last `layers` blocks.
    """

    def __init__(self, backbone, head, pool="cls", layers=1):
        super().__init__()
        width = backbone.dim * layers * (2 if pool == "both" else 1)
        if pool not in ("cls", "mean", "both") or head.last_layer.in_features != width:
            raise ValueError(f"pool {brief(pool)} of {layers} layers: known are cls, mean and both, and the head is "
                             f"for {head.last_layer.in_features} features, not {width}")  # fmt: skip
        self.backbone, self.head, self.pool, self.layers = backbone, head, pool, layers
        unread = [backbone.local_cls_norm]  # DDP waits for the gradient of each trained parameter
        if backbone.cls_norm is not None and pool != "both":
            unread.append(backbone.norm if pool == "cls" else backbone.cls_norm)
        for module in unread:
            if module is not None:
                module.requires_grad_(False)

    def features(self, images):
        found = []
        for tokens in self.backbone.intermediate(images, self.layers):
            found += [tokens.cls] if self.pool != "mean" else []
            found += [tokens.patches.mean(1)] if self.pool != "cls" else []
        return torch.cat(found, -1)

    def forward(self, images, keep=None):
        return self.head(self.features(images), keep)

    def train(self, mode=True):
        """A frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and any(p.requires_grad for p in self.backbone.parameters()))
        return self


# Weights in and out. Our own layout is that of the original .pth but for register_tokens (there: storage_tokens),
# the RoPE periods (there: a buffer rounded to bfloat16; here: recomputed in float32, up to 4e-3 in the outputs) and
# the key-bias mask (there: a buffer).

HF_NAMES = {  # ours -> Hugging Face; block names are relative to the block
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "norm": "norm",
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.up_proj",
    "mlp.w3": "mlp.down_proj",
}


def rename(key, names, blocks, new_blocks):
    """`blocks.3.norm1.weight` -> `layer.3.norm1.weight`, by a table of names without the final weight/bias."""
    head, rest = "", key
    if key.startswith(blocks + ".") and key.count(".") > 1:
        _, index, rest = key.split(".", 2)
        head = f"{new_blocks}.{index}."
    if rest in names:
        return head + names[rest]
    stem, _, leaf = rest.rpartition(".")
    return f"{head}{names[stem]}.{leaf}" if stem in names else key


def state_to_hf(model):
    """Backbone -> (state dict, config) in the published Hugging Face DINOv3 layout."""
    if model.cls_norm is not None:
        raise ValueError(
            "the Hugging Face layout has one final norm: a backbone with cls_norm cannot be exported to it"
        )
    if model.local_cls_norm is not None:
        print("local_cls_norm is left out: the Hugging Face layout has no place for it (only training uses it)")
    state = {}
    model = merge_adapters(model) if adapted_layers(model) else model
    for key, value in model.state_dict().items():
        if ".attn.qkv." in key:
            index, leaf = key.split(".")[1], key.rsplit(".", 1)[1]
            for name, third in zip("qkv", value.chunk(3)):
                if (name, leaf) != ("k", "bias"):
                    state[f"layer.{index}.attention.{name}_proj.{leaf}"] = third.clone()
        elif not key.startswith("local_cls_norm."):
            state[rename(key, HF_NAMES, "blocks", "layer")] = value.clone()
    state["embeddings.mask_token"] = state["embeddings.mask_token"].reshape(1, 1, -1)
    block = model.blocks[0]
    gated, qkv_bias = isinstance(block.mlp, SwiGLU), block.attn.qkv.bias is not None
    config = {
        "architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit", "image_size": 224,
        "patch_size": model.patch_size, "num_channels": model.patch_embed.proj.in_channels, "hidden_size": model.dim,
        "intermediate_size": (block.mlp.w1 if gated else block.mlp.fc1).out_features,
        "num_hidden_layers": model.depth, "num_attention_heads": model.heads, "num_register_tokens": model.registers,
        "use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu", "layer_norm_eps": model.norm.eps,
        "layerscale_value": block.ls1.value, "rope_theta": model.rope_base,
        "query_bias": qkv_bias, "key_bias": False, "value_bias": qkv_bias, "proj_bias": True, "mlp_bias": True,
        "attention_dropout": 0.0, "drop_path_rate": 0.0, "initializer_range": 0.02,
        # null, not the library's default 2.0: that would distort positions of anyone who fine-tunes, unasked
        "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None,
    }  # fmt: skip
    return state, config


def state_from_hf(state, config):
    """Hugging Face DINOv3 state dict -> that of VisionTransformer; unknown keys keep their names."""
    if config.get("key_bias"):
        raise ValueError("config.json says key_bias: true; DINOv3 has no bias on keys, and neither has this backbone")
    ours = {v: k for k, v in HF_NAMES.items() if not k.startswith("mlp.")}
    mlp = ("w1", "w2", "w3") if any(".mlp.gate_proj." in key for key in state) else (None, "fc1", "fc2")
    for theirs, own in zip(("gate_proj", "up_proj", "down_proj"), mlp):
        ours[f"mlp.{theirs}"] = f"mlp.{own}"
    out = {}
    for key, value in state.items():
        name, (stem, _, leaf) = rename(key, ours, "layer", "blocks"), key.rpartition(".")
        if stem.endswith((".attention.k_proj", ".attention.v_proj")):
            if stem.endswith("k_proj") and leaf == "bias" and value.any():
                raise ValueError(f"{key} is a bias on keys: not a DINOv3 release")
            continue
        if stem.endswith(".attention.q_proj"):
            base = stem[: -len("q_proj")]
            k = torch.zeros_like(value) if leaf == "bias" else state.get(f"{base}k_proj.weight")
            v = state.get(f"{base}v_proj.{leaf}")
            if k is None or v is None:
                raise ValueError(f"{key} is there, but {base}k_proj.{leaf} or {base}v_proj.{leaf} is missing")
            name, value = f"blocks.{stem.split('.')[1]}.attn.qkv.{leaf}", torch.cat([value, k, v])
        if name in out:
            raise ValueError(f"{key} is there twice, under its own name and that of another layout")
        out[name] = value
    if "mask_token" in out:
        out["mask_token"] = out["mask_token"].reshape(1, -1)
    return out


TIMM_NAMES = {  # ours -> the Eva of timm, as in HF_NAMES
    "register_tokens": "reg_token",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}
TIMM_ARGUMENTS = {"dim": "embed_dim", "depth": "depth", "heads": "num_heads", "qkv_bias": "qkv_bias",
                  "patch_size": "patch_size", "in_chans": "in_chans", "registers": "num_reg_tokens",
                  "rope_base": "rope_temperature"}  # fmt: skip


def timm_arch(options):
    """Options of VisionTransformer -> (name, further arguments) for timm.create_model."""

    def differing(name):
        usual = all_options(name, {})
        return [key for key in (*TIMM_ARGUMENTS, "ffn_dim") if usual[key] != options[key]]

    alike = [name for name in ARCHS if name not in ("vit_test", "vit_giant")]  # timm has all but these
    alike = [name for name in alike if all_options(name, {})["gated"] == options["gated"]]
    name = min(alike, key=lambda name: len(differing(name)))
    arguments = {TIMM_ARGUMENTS[key]: options[key] for key in differing(name) if key in TIMM_ARGUMENTS}
    if {"dim", "ffn_dim"} & {*differing(name)}:
        arguments["mlp_ratio"] = options["ffn_dim"] / options["dim"]
        if options["gated"]:
            arguments["swiglu_align_to"] = 1
    return f"{name}_patch16_dinov3" + ("_qkvb" if all_options(name, {})["qkv_bias"] else ""), arguments


def state_to_timm(model):
    """Backbone -> (state dict, config) for timm.create_model; timm too computes RoPE periods in float32.

    mask_token and local_cls_norm stay behind: only pretraining uses them, and timm has no place for them.
    """
    model = merge_adapters(model) if adapted_layers(model) else model
    if model.cls_norm is not None or model.norm.eps != 1e-5:
        raise ValueError("timm's DINOv3 has one final norm and an eps of 1e-5: this backbone has others")
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            state |= {key.replace("qkv.bias", f"{name}_bias"): part.clone() for name, part in (("q", q), ("v", v))}
        elif key != "mask_token" and not key.startswith("local_cls_norm."):
            state[rename(key, TIMM_NAMES, "blocks", "blocks")] = value.clone()
    options = shape_facts(model.state_dict()) | dict(heads=model.heads, rope_base=model.rope_base)
    name, arguments = timm_arch(options)
    config = {"architecture": name, "num_classes": 0, "num_features": model.dim}
    return state, {**config, "model_args": {"global_pool": "token", **arguments}}


def state_from_timm(state):
    """State dict of timm's DINOv3 -> that of VisionTransformer, with a mask_token of zeros as at the start."""
    ours, out = {theirs: own for own, theirs in TIMM_NAMES.items()}, {}
    if "blocks.0.mlp.fc1_g.weight" not in state:
        ours.pop("mlp.fc2")
    for key, value in state.items():
        if key.endswith("attn.q_bias"):
            v = state.get(key.replace("q_bias", "v_bias"))
            if v is None:
                raise ValueError(f"{key} is there, but its v_bias is missing")
            out[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v])
        elif not key.endswith("attn.v_bias"):
            out[rename(key, ours, "blocks", "blocks")] = value
    return {"mask_token": torch.zeros(1, state["blocks.0.gamma_1"].shape[0]), **out}


def state_from_original(state):
    """Layout of the original .pth -> (state dict of VisionTransformer, RoPE periods or None)."""
    out = {}
    for key, value in state.items():
        if key.endswith(".qkv.bias") and key + "_mask" not in state and value.chunk(3)[1].any():
            raise ValueError(f"{key} has a bias on keys and no bias_mask to remove it: not a DINOv3 release")
        if not key.endswith((".bias_mask", "rope_embed.periods")):
            out["register_tokens" if key == "storage_tokens" else key] = value
    if "register_tokens" in state and "storage_tokens" in state:
        raise ValueError("register_tokens and storage_tokens are two names of one thing")
    return out, state.get("rope_embed.periods")


def shape_facts(state):
    """The options of VisionTransformer that show in the names and shapes of a state dict (our layout)."""
    required = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    missing = [key for key in required if key not in state]
    if missing:
        raise ValueError(f"not a DINOv3 ViT: {', '.join(missing)} is missing; found {some(state)} ...")
    gated = "blocks.0.mlp.w1.weight" in state
    up = "blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"
    if up not in state:
        raise ValueError("not a DINOv3 ViT: block 0 has neither mlp.fc1 nor the gated mlp.w1")
    for key, ndim in (("patch_embed.proj.weight", 4), (up, 2), ("register_tokens", 3)):
        if key in state and state[key].ndim != ndim:
            raise ValueError(f"{key} has shape {list(state[key].shape)[:8]}, expected {ndim} axes")
    dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    blocks = [re.match(r"blocks\.([0-9]{1,9})\.", key) for key in state]
    return dict(
        dim=dim,
        depth=1 + max(int(block[1]) for block in blocks if block),
        ffn_dim=len(state[up]),
        gated=gated,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        patch_size=patch_size,
        in_chans=in_chans,
        registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        cls_norm="cls_norm.weight" in state,
        local_cls_norm="local_cls_norm.weight" in state,
    )


def infer_arch(state, heads=None, periods=None):
    """{name, overrides} of the backbone that a state dict (our layout) belongs to, by its shapes."""
    found = shape_facts(state)
    dim = found["dim"]
    alike = [a for a in ARCHS.values() if all(a[k] == found[k] for k in ("dim", "depth", "ffn_dim"))]
    if heads is None and periods is not None:
        heads = dim // (4 * len(periods))
    elif heads is None:
        if len({a["heads"] for a in alike}) != 1:
            raise ValueError(
                f"the number of heads of a {found['depth']}-block, {dim}-wide ViT is not in the file and no known arch "
                "has this shape: put a config.json with num_attention_heads beside it"
            )
        heads = alike[0]["heads"]
    found["heads"] = heads

    def differences(name):
        return {k: v for k, v in found.items() if v != all_options(name, {})[k]}

    name = min(ARCHS, key=lambda name: len(differences(name)))
    return {"name": name, "overrides": differences(name)}


def check_arch(arch, state):
    """Refuse an arch {name, overrides} that these weights do not have, before anything of its size is made."""
    if not isinstance(arch, dict) or not isinstance(arch.get("overrides"), dict):
        raise ValueError(f"field arch is {brief(arch)}, expected name and overrides")
    says, found = all_options(arch.get("name"), arch["overrides"]), shape_facts(state)
    if wrong := [name for name in found if says[name] != found[name]]:
        name = wrong[0]
        raise ValueError(f"field arch says {name} {says[name]}, and the weights have {found[name]}")


# open_regular and read_zip stand in every leaf that opens such files, because each leaf copies alone.


def open_regular(path):
    """Open for reading what cannot make us wait: of a pipe, open() returns only when somebody writes to it."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a folder, pipe or device, not a regular file")
    return open(path, "rb")


def read_zip(f, path):
    """What torch.save wrote into the open file `path`; refuses files that torch.save does not write.

    torch maps a member by its offset and the length that the pickle claims, whatever the zip directory says: of a
    compressed, shortened or linked member it returns other numbers. The tensors stay on disk until they are used.
    """
    with zipfile.ZipFile(f) as archive:
        items = sorted(archive.infolist(), key=lambda item: item.header_offset)
        for item in items:
            if stat.S_IFMT(item.external_attr >> 16) not in (0, stat.S_IFREG) or item.external_attr & 0x10:
                raise zipfile.BadZipFile(f"{item.filename} marked as a folder or a link")
            if item.compress_type or item.flag_bits & ~0x808 or item.compress_size != item.file_size:
                raise zipfile.BadZipFile(f"{item.filename} is compressed, encrypted or shortened")
        if len({item.filename.lower() for item in items}) < len(items):  # torch looks names up without their case
            raise zipfile.BadZipFile("two members of one name")
        if archive.comment or sum(item.file_size for item in items) > f.seek(0, os.SEEK_END):
            raise zipfile.BadZipFile("members that overlap, or bytes after them")
        if bad := archive.testzip():  # reads every byte: torch.load alone does not notice a flipped bit
            raise zipfile.BadZipFile(f"wrong checksum in {bad}")
        pickles = [archive.read(item) for item in items if item.filename.lower().endswith(".pkl")]
        if code := re.search(rb"\n(bytearray|TypedStorage|\w*Tensor)\n", b"".join(pickles)):  # bytearray(10**12)
            raise zipfile.BadZipFile(f"a call of {code[1].decode()}, which takes memory that no member fills")
    storages = []  # mapped, so no tensor is read twice
    content = torch.load(path, lambda s, _: storages.append(s) or s, weights_only=True, mmap=True)
    held = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
    if [held[at] for at in sorted(held)] != [i.file_size for i in items if "/data/" in i.filename and i.file_size]:
        raise zipfile.BadZipFile("a tensor that is not as long as its member")
    return content


def check_sum(path):
    """Refuse a file that differs from the SHA256SUMS beside it, and weights that it leaves out but lists others."""
    sums, listed = path.with_name("SHA256SUMS"), {}
    if not sums.exists():
        return
    with open_regular(sums) as f:
        for line in f.read(1 << 24).decode(errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            listed[name[1:].removeprefix("./")] = digest.lower()  # the second character is a space or *
    if path.name not in listed:
        if path.suffix == ".safetensors" and any(name.endswith(".safetensors") for name in listed):
            raise ValueError("SHA256SUMS lists other weights and not these; add its line, or move the file")
        return
    digest = hashlib.sha256()
    with open_regular(path) as f:
        for piece in iter(lambda: f.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != listed[path.name]:
        raise ValueError("its sha256 is not that in SHA256SUMS; get both anew")


def read_json(path):
    """A dict in UTF-8 out of a small file."""
    try:
        check_sum(path)
        with open_regular(path) as f:
            content = json.loads(f.read(1 << 24).decode())
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not a dict")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged; get it anew: {' '.join(str(error).split())[:200]}") from None


def read_tensors(path):
    """A file's content by its first bytes: a dict of tensors (safetensors) or what torch.save wrote, safely."""
    path = Path(path)
    try:
        check_sum(path)
        with open_regular(path) as f:
            start = f.read(9)
            if start[8:] == b"{":
                return safetensors.torch.load_file(path)
            if start[:4] != b"PK\3\4":
                raise ValueError("neither safetensors nor the zip file that torch.save makes")
            content = read_zip(f, path)
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not a dict of tensors")
        for group in (content, *content.values()):
            tensors = [v for v in group.values() if isinstance(v, Tensor)] if isinstance(group, dict) else []
            stored = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]  # not those of "meta"
            held = sum({s.data_ptr(): s.nbytes() for s in stored}.values())
            if sum(t.nbytes for t in tensors) > held:  # a stride of 0 claims much: a copy would take it
                raise ValueError("tensors claim more bytes than the file holds")
        return content
    except Exception as error:  # noqa: BLE001 - each reader has its own many ways to say that bytes are wrong
        code = re.search(r"GLOBAL (\S+)", str(error))  # of torch's page only the fact: its advice is to trust the file
        reason = f"it needs code to load: {code[1][:100]}" if code else " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or not safetensors or a weights-only torch file: {reason}") from None


def read_hf_config(path):
    """config.json, if there is one, else {}; refuses numbers of a DINOv3 ViT that are none."""
    config = read_json(path) if path.exists() else {}
    if isinstance(config.get("architecture"), str) and "dinov3" in config["architecture"]:  # timm's
        given = config.get("model_args", {})
        names = {"num_heads": "num_attention_heads", "rope_temperature": "rope_theta"}
        config = {own: given[name] for name, own in names.items() if isinstance(given, dict) and name in given}
        config |= {"model_type": "dinov3_vit"}
    fields = {"num_attention_heads": numbers.Integral, "layer_norm_eps": numbers.Real, "rope_theta": numbers.Real}
    for field in fields.keys() & config if config.get("model_type") == "dinov3_vit" else ():
        if not is_number(config[field], fields[field], 1e-12):
            raise ValueError(f"{path}: {field} is {brief(config[field])}, expected a number above 0; get it anew")
    return config


def read_shards(path):
    """{file name: names of its tensors} by model.safetensors.index.json."""
    files, where = {}, read_json(path).get("weight_map")
    good = isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())
    if not good or not all(re.fullmatch(r"[\w. -]+\.safetensors", name) for name in where.values()):
        raise ValueError(f"{path}: weight_map is {brief(where)}, expected names of .safetensors files beside it")
    for key, name in where.items():
        files.setdefault(name, set()).add(key)
    return dict(sorted(files.items()))


def read_weights(path):
    """Path of a file or Hugging Face folder -> (its content, what config.json says or {})."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    folder = path if path.is_dir() else path.parent
    config = read_hf_config(folder / "config.json")
    kind = config.get("model_type")
    if kind != "dinov3_vit" and path.is_dir():
        hint = f"; its newest checkpoint is {path / 'last.pth'}" if (path / "last.pth").exists() else ""
        words = f"{folder} holds no config.json of a DINOv3 ViT (model_type {brief(kind)}, not 'dinov3_vit')"
        raise ValueError(words + hint)
    config = config if kind == "dinov3_vit" else {}  # a run's config.json describes flags, not an architecture
    if not path.is_dir():
        return read_tensors(path), config
    index = path / "model.safetensors.index.json"  # large models come in several files
    files = read_shards(index) if index.exists() else {"model.safetensors": None}
    missing = [name for name in files if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(f"{path} holds no {some(missing)}")
    content = {}
    for name, keys in files.items():
        part = read_tensors(path / name)
        if odd := set() if keys is None else part.keys() ^ keys:
            raise ValueError(f"{path / name} and the weight_map in {index} differ in {some(odd)}; get both anew")
        content |= part
    return content, config


def is_view(view):
    size, window, mm = view.get("size"), view.get("window", ()), view.get("neighbour_mm", 1)
    pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(is_number(v, least=-1e9) for v in window)
    return (window is None or pair) and is_number(size, numbers.Integral, 1, 1 << 16) and is_number(mm, least=1e-9)


FACTS = {  # what a field of a DINO-X checkpoint must be
    "step images": (int, is_number),
    "args teacher": (dict, lambda v: all(isinstance(key, str) for key in v)),
    "encoding": (str, bool),
    "eval_view": (dict, is_view),
    "trained_groups": ((list, tuple, type(None)), lambda v: all(isinstance(group, str) for group in v or ())),
    "index_sha256 split_sha256": ((str, type(None)), lambda v: True),
    "provenance": (dict, lambda v: is_provenance(v)),
}


def is_provenance(found):
    """{known: bool, seen: [{salt, groups, series, files}, ...]}: hashes of what weights were trained on."""
    seen = found.get("seen")
    good = isinstance(found.get("known"), bool) and isinstance(seen, list)
    if good and all(isinstance(entry, dict) for entry in seen):  # one list named a thousand times costs a file nothing
        lists = (part for entry in seen for part in entry.values() if isinstance(part, list))
        good = sum(map(len, lists)) < 1 << 24
    return good and all(
        isinstance(entry, dict) and isinstance(entry.get("salt"), str)
        and all(isinstance(entry.get(key, []), list) for key in ("groups", "series", "files"))
        and all(isinstance(text, str) for key in ("groups", "series", "files") for text in entry.get(key, []))
        for entry in seen
    )  # fmt: skip


def check_facts(path, content):
    """Refuse a DINO-X checkpoint of another version or with a field of a wrong type; the teacher must be there."""
    kind, version = content["format"], content.get("version")
    if not isinstance(kind, str) or type(version) is not int or (kind, version) != ("dinox", 1):
        raise ValueError(f"{path}: format {brief(kind)} version {brief(version)}, expected 'dinox' version 1")
    for name, (kind, right) in ((name, rule) for names, rule in FACTS.items() for name in names.split()):
        value = content.get(name)
        if (name in content or name == "teacher") and not (isinstance(value, kind) and right(value)):
            raise ValueError(f"{path}: field {name} is {brief(value)}; use another checkpoint of the same run")


def read_facts(path):
    """What weights say beside their tensors: of a DINO-X checkpoint trained_groups (None: unknown) and more, of a
    release {provenance}; {} of other weights."""
    path = Path(path)
    beside = (path if path.is_dir() else path.parent) / "provenance.json"
    if beside.exists() and (path.is_dir() or path.suffix == ".safetensors"):
        found = read_json(beside)
        if found.get("version") != 1 or not is_provenance(found):
            raise ValueError(f"{beside} is damaged, or of another version; get the release anew")
        return {"provenance": {"known": found["known"], "seen": found["seen"]}}
    content, _ = read_weights(path)
    if "format" not in content:
        return {}
    check_facts(path, content)
    return {k: v for k, v in content.items() if k not in ("student", "teacher", "gram", "optimizer")}


def check_tensors(path, state):
    """The dict itself, if it is one of names and floating-point tensors."""
    loose = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if loose or not state:
        raise ValueError(f"{path}: expected a dict of tensors, found {some(loose) or 'nothing'}")
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if odd := [k for k, v in state.items() if v.dtype not in floats and not k.endswith(".bias_mask")]:
        raise ValueError(f"{path}: {some(odd)} is of {state[odd[0]].dtype}, not of floating-point numbers")
    return state


def recognise(path, content, config):
    """Any known content -> (state dict of VisionTransformer, {name, overrides})."""
    if "format" in content:
        check_facts(path, content)
        state = {
            k[9:]: v for k, v in content["teacher"].items() if k.startswith("backbone.")
        }  # the EMA teacher is what is used
        check_arch(content.get("arch"), check_tensors(path, state))
        return state, content["arch"]
    if isinstance(content.get("teacher"), dict):  # the original code's evaluation export
        content = {k[9:]: v for k, v in content["teacher"].items() if isinstance(k, str) and k.startswith("backbone.")}
    check_tensors(path, content)
    if any(key.startswith(("stages.", "downsample_layers.")) for key in content):
        raise ValueError(f"{path} holds a ConvNeXt (stages.*): only the ViT backbones of DINOv3 can be loaded")
    if "embeddings.patch_embeddings.weight" in content or "blocks.0.gamma_1" in content:
        state = state_from_timm(content) if "blocks.0.gamma_1" in content else state_from_hf(content, config)
        arch = infer_arch(state, heads=config.get("num_attention_heads"))
        for theirs, own in (("layer_norm_eps", "norm_eps"), ("rope_theta", "rope_base")):
            if config.get(theirs, OPTIONS[own]) != OPTIONS[own]:
                arch["overrides"][own] = config[theirs]
        return state, arch
    if "patch_embed.proj.weight" in content and "blocks.0.attn.qkv.weight" in content:
        state, periods = state_from_original(content)
        arch = infer_arch(state, periods=periods)
        if periods is not None:
            ours = rope_periods(4 * len(periods))
            if not torch.allclose(periods.float().cpu(), ours, rtol=2**-7):  # files hold them rounded to bfloat16
                raise ValueError(f"{path}: RoPE periods {brief(periods.tolist())} are not those of base 100")
        return state, arch
    raise ValueError(
        f"{path}: unknown layout, first keys {some(content)}; expected a DINO-X checkpoint, a Hugging "
        "Face or timm DINOv3 ViT, or the original DINOv3 .pth"
    )


def load_backbone(path, allow_partial=False, quiet=False, **overrides):
    """Any DINOv3 ViT weights -> VisionTransformer in eval mode; see read_weights and recognise for what is known."""
    content, config = read_weights(path)
    try:
        state, arch = recognise(path, content, config)
        with torch.device("meta"):  # no time or memory for weights that are replaced at once
            vit = build_arch({**arch, "overrides": {**arch["overrides"], **overrides}})
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:  # torch, of odd shapes
        reason = " ".join(str(error).split())
        raise ValueError(reason if str(path) in reason else f"{path}: {reason[:400]}") from None
    own = vit.state_dict()
    matched, missing, unexpected = own.keys() & state, sorted(own.keys() - state), sorted(state.keys() - own)
    counts = f"{len(matched)} matched, {len(missing)} missing, {len(unexpected)} unexpected tensors"
    if not quiet:
        print(f"{path}: {arch['name']}, {counts}")
    for key in matched:
        if state[key].shape != own[key].shape:
            raise ValueError(f"{path}: {key} has shape {list(state[key].shape)[:8]}, expected {list(own[key].shape)}")
    too_few = sum(own[key].numel() for key in missing) > sum(own[key].numel() for key in matched)
    if too_few or (missing or unexpected) and ("adapters" in arch or not allow_partial):
        names = [f"missing {key}" for key in missing[:5]] + [f"unexpected {some([key])}" for key in unexpected[:5]]
        raise ValueError(f"{path}: {counts} ({', '.join(names)})")
    if missing:
        vit = vit.to_empty(device="cpu")
        vit.init_weights()
    vit.load_state_dict({k: state[k].float().clone() for k in matched}, strict=not missing, assign=True)
    return (merge_adapters(vit) if "adapters" in arch else vit).eval()
