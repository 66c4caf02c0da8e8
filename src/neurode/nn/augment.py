"""More dimensions for the state to move in: flows on the line and in the plane cannot cross, lifted ones need not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurode._errors import InputError


class Augment(nn.Module):
    """Append zeros to the features.

    Args:
        num_features: how many zeros to append, at least 1.

    References:
        E. Dupont, A. Doucet, Y. W. Teh (2019), Augmented neural ODEs, NeurIPS, arXiv:1904.01681.

    Example:
        >>> import torch
        >>> Augment(2)(torch.ones(1, 3))
        tensor([[1., 1., 1., 0., 0.]])
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if not isinstance(num_features, int) or num_features < 1:
            raise InputError(f"num_features={num_features!r}; an augmentation appends a whole number of at least 1.")
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., features)` to `(..., features + num_features)`."""
        return torch.cat([x, x.new_zeros(*x.shape[:-1], self.num_features)], -1)

    def remove(self, x: Tensor) -> Tensor:
        """Drop the appended features again."""
        return x[..., : -self.num_features]

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}"


class Lift(nn.Linear):
    """A learned linear map into more dimensions.

    Args:
        in_features: features of the data.
        out_features: features of the state.

    Example:
        >>> import torch
        >>> Lift(2, 6)(torch.ones(4, 2)).shape
        torch.Size([4, 6])
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
