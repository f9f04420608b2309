"""Parameter groups, gradient clipping, the moving average and optimizers of both trainers. Copyable: torch only."""

import math

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
    """Moves what is trained; the rest is equal in both."""
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters()) if s.requires_grad]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - momentum)


# Optimizers. Each reads lr and weight_decay (decoupled) from its groups at every step, and
# keeps per parameter tensors of its shape and "step", so that checkpoint.pack_optimizer resumes it to the bit.


class Stepper(torch.optim.Optimizer):
    """A loop over parameters; update(parameter, gradient, number of the update, group) says what one step does."""

    counters = 1  # numbers in "step"; the first counts updates

    def __init__(self, params, defaults):
        below_one = [*defaults.get("betas", ()), defaults.get("momentum", 0.0)]
        if not all(0 <= beta < 1 for beta in below_one):
            raise ValueError(f"betas and momentum must be at least 0 and below 1, got {below_one}")
        if wrong := {k: v for k, v in defaults.items() if isinstance(v, (int, float)) and v < 0}:
            raise ValueError(f"numbers must be at least 0, got {wrong}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    step = self.state[p].get("step", torch.zeros(self.counters, dtype=torch.float64))
                    self.state[p]["step"] = step = step.cpu()  # reading it waits for no card
                    step[0] += 1
                    self.update(p, p.grad, int(step[0]), group)
        return loss

    def buffer(self, p, name, start=torch.zeros_like):
        if name not in self.state[p]:
            self.state[p][name] = start(p)
        return self.state[p][name]

    def adam_divisor(self, p, grad, t, group):
        beta = group["betas"][1]
        v = self.buffer(p, "exp_avg_sq").mul_(beta).addcmul_(grad, grad, value=1 - beta)
        return (v / (1 - beta**t)).sqrt_().add_(group["eps"])


class AdEMAMix(Stepper):
    """AdamW with a second, slow mean of gradients (arXiv:2409.03137); `warmup` updates raise alpha and its beta."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, warmup=0, eps=1e-8, weight_decay=0.0):
        defaults = dict(lr=lr, betas=betas, alpha=alpha, warmup=warmup, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    def update(self, p, grad, t, group):
        fast, _, slow = group["betas"]
        share = min(1.0, t / group["warmup"]) if group["warmup"] else 1.0
        slow = math.exp(1 / ((1 - share) / math.log(fast) + share / math.log(slow)))  # half-life grows linearly
        m1 = self.buffer(p, "exp_avg").lerp_(grad, 1 - fast)
        m2 = self.buffer(p, "exp_avg_slow").lerp_(grad, 1 - slow)
        move = (m1 / (1 - fast**t) + share * group["alpha"] * m2) / self.adam_divisor(p, grad, t, group)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * move)


class Sophia(Stepper):
    """Mean gradient over a diagonal Hessian, each number clipped to 1 (arXiv:2305.14342).

    Before the first and about every tenth step give observe() an estimate by gauss_newton().
    """

    def __init__(self, params, lr=2e-4, betas=(0.965, 0.99), gamma=0.01, eps=1e-12, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def observe(self, estimates):
        for group in self.param_groups:
            for p in estimates.keys() & set(group["params"]):
                self.buffer(p, "hessian").lerp_(estimates[p], 1 - group["betas"][1])

    def update(self, p, grad, t, group):
        m = self.buffer(p, "exp_avg").lerp_(grad, 1 - group["betas"][0])
        move = m / (group["gamma"] * self.buffer(p, "hessian")).clamp_(min=group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * move.clamp_(-1, 1))


def gauss_newton(params, n):
    """n * gradient^2, after backward of the mean cross entropy of n samples with labels drawn from their softmax."""
    return {p: n * p.grad.square() for p in params if p.grad is not None}


class ScheduleFreeAdamW(Stepper):
    """AdamW without a decaying rate (arXiv:2405.15682): gradients are taken between a fast z and its average x.

    Weights are (1 - beta) z + beta x while training, and x between eval() and train(). Call train() after loading.
    """

    counters = 3  # updates, sum of the weights of the average, largest rate so far
    averaged = False

    def __init__(self, params, lr=2.5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def update(self, p, grad, t, group):
        if self.averaged:
            raise RuntimeError("ScheduleFreeAdamW: the weights are the average; call train() before the next step")
        z, x, step = self.buffer(p, "z", torch.clone), self.buffer(p, "x", torch.clone), self.state[p]["step"]
        step[2] = max(step[2], group["lr"])
        step[1] += step[2] ** 2
        z.sub_(group["lr"] * (grad / self.adam_divisor(p, grad, t, group) + group["weight_decay"] * p))
        x.lerp_(z, float(step[2] ** 2 / step[1]) if step[1] else 0.0)
        p.copy_(z.lerp(x, group["betas"][0]))

    @torch.no_grad()
    def eval(self, averaged=True):
        self.averaged = averaged
        for group in self.param_groups:
            for p in (p for p in group["params"] if p in self.state):
                z, x = self.state[p]["z"], self.state[p]["x"]
                p.copy_(x if averaged else z.lerp(x, group["betas"][0]))

    def train(self):
        self.eval(averaged=False)


def orthogonal(x, iterations=5):
    """A matrix with the singular vectors of x and singular values near 1, by Muon's Newton-Schulz polynomial."""
    y = x.bfloat16() if x.is_cuda else x
    y = y.mT if len(x) > x.shape[1] else y
    y = y / (y.norm() + 1e-7)
    for _ in range(iterations):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.mT if len(x) > x.shape[1] else y).to(x.dtype)


class Muon(Stepper):
    """Orthogonal momentum (kellerjordan.github.io/posts/muon) for matrices; AdamW at lr * adam for everything else:
    vectors, tokens, the patch embedding, and groups marked `last` (output layers)."""

    def __init__(self, params, lr=0.02, momentum=0.95, adam=0.015, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        defaults = dict(lr=lr, momentum=momentum, adam=adam, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    def update(self, p, grad, t, group):
        if hasattr(p, "full_tensor"):
            raise ValueError("Muon needs whole matrices, and these are shards: train without --fsdp, or with adamw")
        lr, beta, m = group["lr"], group["betas"][0], self.buffer(p, "exp_avg")
        if p.ndim == 2 and min(p.shape) > 1 and not group.get("last"):
            ahead = grad.lerp(m.lerp_(grad, 1 - group["momentum"]), group["momentum"])  # Nesterov
            move = max(1, len(p) / p.shape[1]) ** 0.5 * orthogonal(ahead)
        else:
            lr *= group["adam"]
            move = m.lerp_(grad, 1 - beta) / (1 - beta**t) / self.adam_divisor(p, grad, t, group)
        p.mul_(1 - lr * group["weight_decay"]).sub_(lr * move)


class SAM:
    """Sharpness-aware minimisation around any optimizer (arXiv:2010.01412): steps by the gradient of a point uphill.

    backward; climb(); zero_grad(); backward anew, of the whole batch; descend(); step(). Or step(closure): the closure
    does the second backward. A step that is left out needs its descend() too.
    """

    def __init__(self, base, rho=0.05):
        self.base, self.rho, self.kept, self.means = base, rho, {}, {}

    def __getattr__(self, name):
        if name == "base":  # a copy in the making
            raise AttributeError(name)
        return getattr(self.base, name)

    def direction(self, p):
        """(what the norm is taken of, what is walked)"""
        return p.grad, p.grad

    @torch.no_grad()
    def climb(self):
        trained = [p for group in self.base.param_groups for p in group["params"] if p.grad is not None]
        measured, walked = zip(*(self.direction(p) for p in trained))
        norm = torch.nn.utils.get_total_norm(measured)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.kept = {p: p.clone() for p in trained}
        for p, d in zip(trained, walked):
            p.add_(self.rho / (norm + 1e-12) * d)

    @torch.no_grad()
    def descend(self):
        for p, w in self.kept.items():
            p.copy_(w)  # to the bit
        self.kept = {}

    def step(self, closure=None):
        loss = None
        if closure:
            self.climb()
            self.base.zero_grad()
            loss = closure()
        self.descend()
        self.base.step()
        for p, mean in self.means.items():  # not earlier: torch's optimizers make their state where there is none
            self.base.state[p]["friendly"] = mean
        return loss


class ASAM(SAM):
    """SAM in units of each weight (arXiv:2102.11600)."""

    def __init__(self, base, rho=0.5, eta=0.01):
        super().__init__(base, rho)
        self.eta = eta

    def direction(self, p):
        size = p.abs() + self.eta
        return size * p.grad, size * size * p.grad


class FriendlySAM(SAM):
    """SAM along what is new in a gradient: less sigma * the running mean (arXiv:2403.12350); along it all at first."""

    def __init__(self, base, rho=0.05, sigma=1.0, lmbda=0.9):
        super().__init__(base, rho)
        self.sigma, self.lmbda = sigma, lmbda

    def direction(self, p):
        mean = self.base.state[p].get("friendly") if p in self.base.state else None
        self.means[p] = p.grad.clone() if mean is None else mean.lerp(p.grad, 1 - self.lmbda)
        d = p.grad if mean is None else p.grad - self.sigma * self.means[p]
        return d, d


OPTIMIZERS = dict(adamw=torch.optim.AdamW, ademamix=AdEMAMix, sophia=Sophia, schedulefree=ScheduleFreeAdamW, muon=Muon)
WRAPPERS = dict(sam=SAM, asam=ASAM, friendlysam=FriendlySAM)  # of any of them
