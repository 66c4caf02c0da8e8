"""torchdiffeq's names on neurode's solvers: `import neurode.torchdiffeq as torchdiffeq` is the whole migration.

Signatures, method names, option keys, defaults, shapes, warnings and callbacks are those of torchdiffeq 0.2.5; where the
results differ on purpose, `docs/torchdiffeq.md` says so.

References:
    R. T. Q. Chen (2018), torchdiffeq, https://github.com/rtqichen/torchdiffeq.

Example:
    >>> import torch
    >>> import neurode.torchdiffeq as torchdiffeq
    >>> y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
    >>> [round(v, 4) for v in y.flatten().tolist()]
    [1.0, 0.3679]
"""

from neurode.torchdiffeq._adjoint import odeint_adjoint
from neurode.torchdiffeq._dense import odeint_dense
from neurode.torchdiffeq._event import odeint_event
from neurode.torchdiffeq._odeint import odeint

__version__ = "0.2.5"  # the version whose contract this package keeps; programs compare it

__all__ = ["__version__", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
