"""What torch was allowed to do to products of float32, by whichever of its settings."""

import pytest

from tests.helpers.forks import forked

SETTINGS = {  # (products on CPUs as bfloat16, on GPUs as TF32)
    "": (False, False),
    "torch.set_float32_matmul_precision('high')": (False, True),
    "torch.set_float32_matmul_precision('medium')": (True, True),
    "torch.backends.cuda.matmul.allow_tf32 = True": (False, True),
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": (False, True),
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": (True, False),
    "torch.backends.fp32_precision = 'tf32'": (False, True),
    "torch.backends.fp32_precision = 'bf16'": (True, False),
    "torch.backends.fp32_precision = 'ieee'": (False, False),
}
CODE = """
import sys
import torch
import iada
from iada_kernels.precision import allows_bfloat16, allows_tf32
exec(sys.argv[1])
features, weight, sigma = torch.randn(7, 5), torch.randn(4, 5), torch.eye(5).repeat(4, 1, 1)
loss = iada.fused_loss(features, weight, None, torch.arange(7) % 4, covariance=sigma)
print(allows_bfloat16(), allows_tf32(), bool(loss.isfinite()))
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting):
    """Those of torch's backends too, behind which the getter of the older one raises."""
    done = forked("-c", CODE, setting)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(each) for each in (*SETTINGS[setting], True)]
