"""One CUDA graph instead of thousands of launches: an update whose tensors keep their shapes is recorded and replayed.

A small network is over on a card before the host has launched the next kernel: an update of ViT-S kept an H200 busy
for 106 ms, and its host for 129 ms (batch 128, compiled blocks, 2026-11).
"""

import torch
from torch.utils import _pytree as pytree

PLAIN = 2  # calls before the recording: in these torch compiles, and chooses its kernels


class Recorded:
    """function(*inputs), with its gradients of `parameters`, recorded at the third call of its kind.

    Called with a clock as one input more, which times it as a whole. Inputs are nested tuples, lists and dicts. Tensors
    in them are copied to where the recording reads them, and floats become tensors, so that schedules may move them. Of
    another kind, and recorded anew, is a call with other shapes or with other values of what is left. The function may
    not wait for the card, nor draw random numbers. The next call overwrites what it returned, and the gradients.
    """

    def __init__(self, function, parameters, device):
        self.function, self.parameters, self.device = function, list(parameters), device
        self.stream = torch.cuda.Stream(device)
        self.forget()

    def forget(self, kind=None):
        self.kind, self.calls, self.graph, self.inputs, self.outputs, self.grads = kind, 0, None, [], None, []

    def __call__(self, *inputs):
        *inputs, clock = inputs
        leaves, form = pytree.tree_flatten(inputs)
        numbers = torch.tensor([x for x in leaves if isinstance(x, float)]).pin_memory()
        numbers = iter(numbers.to(self.device, non_blocking=True).unbind())
        leaves = [next(numbers) if isinstance(x, float) else x for x in leaves]
        kind = form, [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in leaves]
        if kind != self.kind:
            self.forget(kind)
        self.calls += 1
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream), clock("replay" if self.graph else "networks"):
            if self.calls <= PLAIN:
                self.outputs = self.function(*pytree.tree_unflatten(leaves, form))
            else:
                self.replay(leaves, form)
        now.wait_stream(self.stream)
        return self.outputs

    def replay(self, leaves, form):
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if self.graph is None:
            self.outputs = None
            self.inputs = [x.clone() for x in tensors]
            places = iter(self.inputs)
            static = [next(places) if isinstance(x, torch.Tensor) else x for x in leaves]
            torch.cuda.empty_cache()  # what the plain calls took
            graph = torch.cuda.CUDAGraph()
            # thread_local: the thread that page-locks what readers bring goes on meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*pytree.tree_unflatten(static, form))
            self.graph, self.grads = graph, [p.grad for p in self.parameters]
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        for p, grad in zip(self.parameters, self.grads):
            p.grad = grad
