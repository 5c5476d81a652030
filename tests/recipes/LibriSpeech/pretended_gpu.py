"""A GPU that is not there: what waits for it, and what mixes it with the host."""

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class PretendedGPU(FakeTensorMode):
    """Tensors of the device "cuda" have shapes only; those of the CPU are as ever.

    A call that mixes the two as no GPU allows raises, as does one that needs a value that was never
    computed. `waits` lists the calls for which the host would wait for the GPU: copies from it
    (here they are of ones), copies to it that are not `non_blocking`, and indices that are on the
    host. The allocator, kernels and PyTorch's own waits within an operator are not looked at.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:  # which asks the driver
            return args[0].clone()
        leaves = tree_leaves((args, kwargs))
        there = [x for x in leaves if isinstance(x, FakeTensor)]
        to = kwargs.get("device")
        if not there and (to is None or torch.device(to).type == "cpu"):
            return func(*args, **kwargs)
        here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if there and to is not None and torch.device(to).type == "cpu":
            self.waits.append(f"{func} to the host")
            return torch.ones(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
        if copies and here and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.waits.append(f"{func} from the host")
        if func in (aten.index.Tensor, aten._index_put_impl_.default, aten.index_put_.default):
            self.waits += [f"{func} by indices of the host"] * bool(here)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def move(self, *owners):
        """Replace all tensors of modules by some of this GPU."""
        for module in (part for owner in owners for part in owner.modules()):
            for store in (module._parameters, module._buffers, vars(module)):
                for name, value in store.items():
                    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                        with self:
                            moved = torch.empty_like(value, device="cuda")
                        if isinstance(value, torch.nn.Parameter):
                            moved = torch.nn.Parameter(moved, value.requires_grad)
                        store[name] = moved
