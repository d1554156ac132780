"""Σ between a loss and its backward, while the statistics that own it stream on."""

from torch import Tensor


class LentCovariance:
    """Σ as one loss saw it.

    It is the buffer itself, so that Σ is not held twice, until that is about to change while the
    backward is still to come: then it is a copy from before.

    Attributes:
        awaited: whether the first backward is still to come.
    """

    __slots__ = ("__weakref__", "_covariance", "_version", "awaited")

    def __init__(self, covariance: Tensor) -> None:
        self._covariance, self._version = covariance, covariance._version
        self.awaited = True

    def is_now(self, covariance: Tensor) -> bool:
        """Whether this is `covariance` as it stands."""
        return self._covariance is covariance and self._version == covariance._version

    def replace(self, copy: Tensor) -> None:
        """From now on it is `copy`, which nobody changes."""
        self._covariance, self._version = copy, copy._version

    def read(self) -> Tensor:
        """The tensor. Raises RuntimeError if it was changed behind our back."""
        if self._covariance._version != self._version:
            raise RuntimeError(
                "covariance: expected Σ as the loss saw it, got one that was changed in place "
                "since; call backward before load_state_dict, and, where a graph is retained for a "
                "second backward, before the next update"
            )
        return self._covariance
