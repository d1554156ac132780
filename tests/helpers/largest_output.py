"""How large the temporaries of an operation are."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestOutput(TorchDispatchMode):
    """Remembers the most elements that a tensor made inside had, views and expansions aside."""

    numel, maker = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                if min(tensor.numel(), held) > self.numel:
                    self.numel, self.maker = min(tensor.numel(), held), str(func)
        return out
