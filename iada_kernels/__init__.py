"""Tensors in, tensors out: the computations under `iada`, one module a backend.

`reference` holds the definitions, `torch_ops` the torch backend, `contract` what every backend
takes and returns, `dispatch` the choice among them. This package never imports `iada`.
"""

from iada_kernels.dispatch import BACKENDS, SlowBackendWarning, select_backend

__all__ = ["BACKENDS", "SlowBackendWarning", "select_backend"]
