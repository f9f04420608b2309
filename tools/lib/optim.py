"""Parameter groups, gradient clipping and the moving average that both trainers use. Copyable: imports torch only."""

import torch


def multipliers(name, depth, layer_decay, patch_lr):
    """(lr factor, weight decay factor, is a last layer) of a parameter by its name: backbone.*, or a head."""
    part, _, name = name.partition(".")
    lr = 1.0
    if part == "backbone":
        layer = depth + 1 if "norm" in name.split(".")[0] else 0  # final norms; embeddings and tokens
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        lr = layer_decay ** (depth + 1 - layer) * (patch_lr if name.startswith("patch_embed") else 1.0)
    undecayed = name.endswith(("bias", "magnitude", "tau")) or "norm" in name or "gamma" in name
    return lr, 0.0 if undecayed else 1.0, "last_layer" in name


def param_groups(model, layer_decay, patch_lr):
    """AdamW groups of equal multipliers; every parameter that is trained is in exactly one."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(multipliers(name, model.backbone.depth, layer_decay, patch_lr), []).append(p)
    return [dict(params=ps, lr_factor=lr, wd_factor=wd, last=last) for (lr, wd, last), ps in groups.items()]


def set_rates(optimizer, now):
    for group in optimizer.param_groups:
        group["lr"] = (now.last_lr if group["last"] else now.lr) * group["lr_factor"]
        group["weight_decay"] = now.weight_decay * group["wd_factor"]


def clip_gradients(student, limit):
    """Clip each sub-module to `limit` on its own norm, as DINOv3 does -> norms before clipping."""
    norms = {}
    for name, module in student.named_children():
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
        norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
