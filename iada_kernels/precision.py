"""What torch was allowed to do to products of float32.

`torch.set_float32_matmul_precision` sets what is read here, as torch.backends.….fp32_precision do;
the getter of its name raises where a program has used these.
"""

import torch


def allows_bfloat16() -> bool:
    """On CPUs: after "medium", or torch.backends.mkldnn.matmul.fp32_precision = "bf16"."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


def allows_tf32() -> bool:
    """On GPUs: after "high" or "medium", or torch.backends.cuda.matmul.fp32_precision = "tf32"."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


allows_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `dispatch`
