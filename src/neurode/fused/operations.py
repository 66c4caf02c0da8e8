"""What each core ATen operation that computes something means in the closed instruction set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from neurode.fused.program import Micro, Reduction
from neurode.fused.refusal import CannotLower
from neurode.fused.virtual import BINARY, SAMPLE_SHIFT, UNARY

Node = Any  # an fx.Node; PyTorch annotates its fields too widely to be of use
LONGEST_POWER = 8  # whole powers up to here are products
LONGEST_SCAN = 256  # a running sum is one addition an element


def table(low: Any) -> dict[str, Callable[[Node], Any]]:
    """Name of an operation -> a function from its node to ids, a list of them, or a total over samples."""
    entries: dict[str, Callable[[Node], Any]] = {}
    for name, micro in UNARY.items():
        entries[name] = _unary(low, micro)
    for name, micro in BINARY.items():
        entries[name] = _binary(low, micro)
    for group in (_arithmetic, _choices, _folds, _products, _placements):
        entries.update(group(low))
    return entries


def _unary(low: Any, micro: Micro) -> Callable[[Node], Tensor]:
    def handler(node: Node) -> Tensor:
        if micro is Micro.NOT:
            _only_booleans(node)
        return low.pointwise(micro, node.args[0])

    return handler


def _only_booleans(node: Node) -> None:
    value = node.meta.get("val")
    if str(node.target).startswith("aten.bitwise") and isinstance(value, Tensor) and value.dtype is not torch.bool:
        raise CannotLower(f"whole-number arithmetic ({node.target})")


def _binary(low: Any, micro: Micro) -> Callable[[Node], Tensor]:
    def handler(node: Node) -> Tensor:
        _only_booleans(node)
        a, b = node.args[0], node.args[1]
        if node.kwargs.get("rounding_mode") is not None:
            raise CannotLower(f"division that rounds ({node.target})")
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            b = low.pointwise(Micro.MUL, b, alpha)
        return low.pointwise(micro, a, b)

    return handler


def _arithmetic(low: Any) -> dict[str, Callable[[Node], Any]]:
    def power(node: Node) -> Tensor:
        base, exponent = node.args[0], node.args[1]
        if isinstance(exponent, fx.Node) or isinstance(base, int | float):
            return low.pointwise(Micro.POW, base, exponent)
        special = {0.5: Micro.SQRT, -0.5: Micro.RSQRT, -1.0: Micro.RECIPROCAL}
        if float(exponent) in special:
            return low.pointwise(special[float(exponent)], base)
        whole = abs(int(exponent))
        if exponent == 0:
            return torch.full_like(low.ids(base), low.one)
        if whole != abs(exponent) or whole > LONGEST_POWER:
            return low.pointwise(Micro.POW, base, exponent)
        made = _whole_power(low, low.ids(base), whole)
        return low.pointwise(Micro.RECIPROCAL, made) if exponent < 0 else made

    def rsub(node: Node) -> Tensor:
        b = node.args[0]
        alpha = node.kwargs.get("alpha", 1)
        return low.pointwise(Micro.SUB, node.args[1], b if alpha == 1 else low.pointwise(Micro.MUL, b, alpha))

    def erfc(node: Node) -> Tensor:
        return low.pointwise(Micro.SUB, 1.0, low.pointwise(Micro.ERF, node.args[0]))

    def softplus(node: Node) -> Tensor:
        beta = node.args[1] if len(node.args) > 1 else node.kwargs.get("beta", 1)
        threshold = node.args[2] if len(node.args) > 2 else node.kwargs.get("threshold", 20)
        x = low.ids(node.args[0])
        scaled = low.pointwise(Micro.MUL, x, float(beta))
        soft = low.pointwise(Micro.DIV, low.pointwise(Micro.SOFTPLUS, scaled), float(beta))
        return low.pointwise(Micro.WHERE, low.pointwise(Micro.GT, scaled, float(threshold)), x, soft)

    def square(node: Node) -> Tensor:
        return low.pointwise(Micro.MUL, node.args[0], node.args[0])

    def cast(node: Node) -> Tensor:
        value, source = node.meta["val"], node.args[0].meta["val"]
        if value.dtype not in (source.dtype, low.dtype, torch.bool) or (
            value.dtype is torch.bool and source.dtype is not torch.bool
        ):
            raise CannotLower(f"a cast from {source.dtype} to {value.dtype}")
        return low.ids(node.args[0])

    return {
        "pow": power, "rsub": rsub, "erfc": erfc, "softplus": softplus, "square": square,
        **dict.fromkeys(("_to_copy", "to", "convert_element_type"), cast),
    }  # fmt: skip


def _whole_power(low: Any, base: Tensor, n: int) -> Tensor:
    if n == 1:
        return base
    half = _whole_power(low, base, n // 2)
    made = low.pointwise(Micro.MUL, half, half)
    return low.pointwise(Micro.MUL, made, base) if n % 2 else made


def _choices(low: Any) -> dict[str, Callable[[Node], Any]]:
    def where(node: Node) -> Tensor:
        return low.pointwise(Micro.WHERE, *node.args)

    def clamp(node: Node) -> Tensor:
        made = low.ids(node.args[0])
        low_bound = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        high_bound = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
        if low_bound is not None:
            made = low.pointwise(Micro.MAX, made, low_bound)
        return made if high_bound is None else low.pointwise(Micro.MIN, made, high_bound)

    def threshold_backward(node: Node) -> Tensor:
        return low.pointwise(Micro.DRELU, *node.args)

    def masked_fill(node: Node) -> Tensor:
        return low.pointwise(Micro.WHERE, node.args[1], node.args[2], node.args[0])

    def clamp_min(node: Node) -> Tensor:
        return low.pointwise(Micro.MAX, node.args[0], node.args[1])

    def clamp_max(node: Node) -> Tensor:
        return low.pointwise(Micro.MIN, node.args[0], node.args[1])

    def isnan(node: Node) -> Tensor:
        return low.pointwise(Micro.NE, node.args[0], node.args[0])

    return {
        "where": where, "clamp": clamp, "threshold_backward": threshold_backward, "masked_fill": masked_fill,
        "clamp_min": clamp_min, "clamp_max": clamp_max, "isnan": isnan,
    }  # fmt: skip


def _dims(node: Node, ids: Tensor, position: int = 1) -> list[int]:
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if given is None or given == []:
        return list(range(ids.ndim))
    return list(given) if isinstance(given, list | tuple) else [given]


def _keep(node: Node, position: int = 2) -> bool:
    return bool(node.args[position] if len(node.args) > position else node.kwargs.get("keepdim", False))


def _folds(low: Any) -> dict[str, Callable[[Node], Any]]:
    def fold(kind: Reduction) -> Callable[[Node], Any]:
        def handler(node: Node) -> Any:
            ids = low.ids(node.args[0])
            return low.reduce(kind, ids, _dims(node, ids), _keep(node))

        return handler

    def extreme(kind: Reduction) -> Callable[[Node], Any]:
        def handler(node: Node) -> Any:
            ids = low.ids(node.args[0])
            made = low.reduce(kind, ids, _dims(node, ids), _keep(node))
            if str(node.target).endswith(".dim"):
                raise CannotLower(f"positions of extremes ({node.target}); use amax or amin")
            return made

        return handler

    def mean(node: Node) -> Tensor:
        ids = low.ids(node.args[0])
        dims = _dims(node, ids)
        return _mean(low, ids, dims, _keep(node))

    def var(node: Node) -> Tensor:
        ids = low.ids(node.args[0])
        dims = _dims(node, ids)
        correction = node.kwargs.get("correction", 1)
        count = math.prod(ids.shape[d] for d in dims)
        off = low.pointwise(Micro.SUB, ids, _mean(low, ids, dims, True))
        total = low.reduce(Reduction.SUM, low.pointwise(Micro.MUL, off, off), dims, _keep(node))
        return low.pointwise(Micro.MUL, total, 1.0 / (count - (1 if correction is None else correction)))

    def var_mean(node: Node) -> list[Tensor]:
        ids = low.ids(node.args[0])
        return [var(node), _mean(low, ids, _dims(node, ids), _keep(node))]

    def prod(node: Node) -> Tensor:
        ids = low.ids(node.args[0])
        return low.reduce(Reduction.PROD, ids, _dims(node, ids), _keep(node))

    def cumsum(node: Node) -> Tensor:
        parts = list(low.ids(node.args[0]).unbind(node.args[1]))
        if len(parts) > LONGEST_SCAN:
            raise CannotLower(f"a running sum over more than {LONGEST_SCAN} elements")
        return torch.stack(list(itertools.accumulate(parts, lambda a, b: low.pointwise(Micro.ADD, a, b))), node.args[1])

    return {
        "sum": fold(Reduction.SUM), "amax": extreme(Reduction.MAX), "amin": extreme(Reduction.MIN),
        "max": extreme(Reduction.MAX), "min": extreme(Reduction.MIN), "mean": mean, "var": var, "var_mean": var_mean,
        "prod": prod, "any": fold(Reduction.MAX), "all": fold(Reduction.MIN), "cumsum": cumsum,
    }  # fmt: skip


def _mean(low: Any, ids: Tensor, dims: list[int], keep: bool) -> Tensor:
    count = math.prod(ids.shape[d] for d in dims)
    total = low.reduce(Reduction.SUM, ids, dims, keep)
    if not isinstance(total, Tensor):
        raise CannotLower("a mean over rows of the batch")
    return low.pointwise(Micro.DIV, total, float(count))


def _products(low: Any) -> dict[str, Callable[[Node], Any]]:
    def mm(node: Node) -> Any:
        made = low.product(low.ids(node.args[0])[None], low.ids(node.args[1])[None], node in low.ends)
        return made[0] if isinstance(made, Tensor) else low._reshaped(made, tuple(node.meta["val"].shape))

    def bmm(node: Node) -> Any:
        return low.product(low.ids(node.args[0]), low.ids(node.args[1]), node in low.ends)

    def addmm(node: Node) -> Any:
        bias, x, z = node.args[:3]
        made = low.product(low.ids(x)[None], low.ids(z)[None], False)
        if not isinstance(made, Tensor):
            raise CannotLower("a product over rows of the batch with something added")
        made = made[0]
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if alpha != 1:
            made = low.pointwise(Micro.MUL, made, alpha)
        return low.pointwise(Micro.ADD, made, bias if beta == 1 else low.pointwise(Micro.MUL, bias, beta))

    def mv(node: Node) -> Any:
        made = low.product(low.ids(node.args[0])[None], low.ids(node.args[1])[None, :, None], node in low.ends)
        shape = tuple(node.meta["val"].shape)
        return made.reshape(shape) if isinstance(made, Tensor) else low._reshaped(made, shape)

    def dot(node: Node) -> Any:
        made = low.pointwise(Micro.MUL, node.args[0], node.args[1])
        return low.reduce(Reduction.SUM, made, [0], False)

    return {
        "mm": mm, "bmm": bmm, "addmm": addmm, "mv": mv, "dot": dot, "vdot": dot,
        "convolution": lambda node: Convolution(low, node.args[1:], node.args[0], node.args[1]).forward(node.args[2]),
        "convolution_backward": lambda node: _convolution_backward(low, node),
    }  # fmt: skip


class Convolution:
    """A convolution as one product over patches.

    Args:
        low: the lowering.
        args: weight, bias, stride, padding, dilation, transposed, output_padding, groups.
        x, weight: nodes.
    """

    def __init__(self, low: Any, args: Any, x: Any, weight: Any) -> None:
        _, _, self.stride, self.padding, self.dilation, transposed, _, self.groups = args
        if transposed:
            raise CannotLower("a transposed convolution")
        self.low, self.x, self.weight = low, low.ids(x), low.ids(weight)
        self.dims = self.x.ndim - 2
        kernel = self.weight.shape[2:]
        pads = [p for pad in reversed(self._wide(self.padding)) for p in (pad, pad)]
        self.padded = torch.constant_pad_nd(self.x, pads, low.zero)
        stride, dilation = self._wide(self.stride), self._wide(self.dilation)
        self.out = [
            (self.padded.shape[d + 2] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(self.dims)
        ]
        self.windows = [
            tuple(
                slice(k * dilation[d], k * dilation[d] + stride[d] * (self.out[d] - 1) + 1, stride[d])
                for d, k in enumerate(place)
            )
            for place in itertools.product(*map(range, kernel))
        ]

    def _wide(self, value: Any) -> list[int]:
        return list(value) if len(value) == self.dims else list(value) * self.dims

    def patches(self) -> list[Tensor]:
        """For each group `(batch * positions, channels * kernel)`."""
        stacked = torch.stack([self.padded[(slice(None), slice(None), *w)] for w in self.windows], 2)
        return [
            part.reshape(part.shape[0], part.shape[1] * part.shape[2], -1).permute(0, 2, 1).flatten(0, 1)
            for part in stacked.chunk(self.groups, 1)
        ]

    def kernels(self) -> list[Tensor]:
        """For each group `(channels * kernel, out channels)`."""
        return [w.reshape(w.shape[0], -1).t() for w in self.weight.chunk(self.groups, 0)]

    def forward(self, bias: Any) -> Tensor:
        """Ids of the result."""
        made = [
            self.low.product(x[None], w[None], False)[0] for x, w in zip(self.patches(), self.kernels(), strict=True)
        ]
        flat = torch.cat(made, 1)
        if bias is not None:
            flat = self.low.pointwise(Micro.ADD, flat, bias)
        return flat.reshape(self.x.shape[0], -1, flat.shape[1]).permute(0, 2, 1).reshape(len(self.x), -1, *self.out)

    def backward_input(self, g: Tensor) -> Tensor:
        """Ids of the cotangent of x."""
        parts = []
        for part, w in zip(g.chunk(self.groups, 1), self.kernels(), strict=True):
            flat = part.reshape(part.shape[0], part.shape[1], -1).permute(0, 2, 1).flatten(0, 1)
            back = self.low.product(flat[None], w.t()[None], False)[0]
            channels = w.shape[0] // len(self.windows)
            parts.append(back.reshape(part.shape[0], -1, channels, len(self.windows)))
        back = torch.cat(parts, 2).permute(0, 2, 3, 1).reshape(len(g), -1, len(self.windows), *self.out)
        layers = []
        for i, window in enumerate(self.windows):
            layer = torch.full_like(self.padded, self.low.zero)
            layer[(slice(None), slice(None), *window)] = back[:, :, i]
            layers.append(layer)
        total = add_layers(self.low, layers)
        for d, pad in enumerate(self._wide(self.padding)):
            total = total.narrow(d + 2, pad, self.x.shape[d + 2])
        return total

    def backward_weight(self, g: Tensor, late_only: bool) -> Any:
        """The gradient of the weight, a total over samples."""
        if self.groups != 1:
            raise CannotLower("the gradient of a convolution in groups")
        flat = g.reshape(g.shape[0], g.shape[1], -1).permute(0, 2, 1).flatten(0, 1)
        made = self.low.product(flat.t()[None], self.patches()[0][None], late_only)
        shape = tuple(self.weight.shape)
        return made[0].reshape(shape) if isinstance(made, Tensor) else self.low._reshaped(made, shape)


def _convolution_backward(low: Any, node: Node) -> list[Any]:
    g, x, weight, _, stride, padding, dilation, transposed, extra, groups, wanted = node.args
    made = Convolution(low, (None, None, stride, padding, dilation, transposed, extra, groups), x, weight)
    ids = low.ids(g)
    low.book.late = node in low.late
    return [
        made.backward_input(ids) if wanted[0] else None,
        made.backward_weight(ids, node in low.ends) if wanted[1] else None,
        low.reduce(Reduction.SUM, ids, [0, *range(2, ids.ndim)], False) if wanted[2] else None,
    ]


def add_layers(low: Any, layers: list[Tensor]) -> Tensor:
    """The sum of tensors of ids that are zero in most places."""
    stacked = torch.stack(layers).reshape(len(layers), -1)
    own = torch.stack([(x >> SAMPLE_SHIFT) for x in layers]).reshape(len(layers), -1)
    filled = stacked != low.zero
    order = torch.argsort((~filled).int(), dim=0, stable=True)
    depth = int(filled.sum(0).max()) if stacked.numel() else 0
    packed = stacked.gather(0, order)[: max(depth, 1)]
    del own
    made = low.reduce(Reduction.SUM, packed, [0], False)
    if not isinstance(made, Tensor):
        raise CannotLower("rows of the batch are coupled here")
    return made.reshape(layers[0].shape)


def _placements(low: Any) -> dict[str, Callable[[Node], Any]]:
    def pad(node: Node) -> Tensor:
        value = node.args[2] if len(node.args) > 2 else 0.0
        return torch.constant_pad_nd(low.ids(node.args[0]), list(node.args[1]), low.book.constant(float(value)))

    def index_put(node: Node) -> Tensor:
        ids, source = low.ids(node.args[0]), low.ids(node.args[2])
        places = [None if i is None else low.known(i) for i in node.args[1]]
        accumulate = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
        where = torch.arange(ids.numel()).reshape(ids.shape)[tuple(slice(None) if p is None else p for p in places)]
        source = source.expand(where.shape) if source.ndim <= where.ndim else source.reshape(where.shape)
        return _put(low, ids, where, source, bool(accumulate))

    def scatter(add: bool) -> Callable[[Node], Tensor]:
        def handler(node: Node) -> Tensor:
            ids, dim = low.ids(node.args[0]), node.args[1]
            index = low.known(node.args[2])
            source = low.ids(node.args[3])
            source = source.expand(index.shape) if source.ndim == 0 else source[tuple(map(slice, index.shape))]
            numbers = torch.arange(ids.numel()).reshape(ids.shape)
            grid = torch.meshgrid(*[torch.arange(n) for n in index.shape], indexing="ij")
            where = numbers[tuple(index if d == dim % ids.ndim else g for d, g in enumerate(grid))]
            return _put(low, ids, where, source, add)

        return handler

    def index_add(node: Node) -> Tensor:
        ids, dim = low.ids(node.args[0]), node.args[1]
        where = torch.arange(ids.numel()).reshape(ids.shape).index_select(dim, low.known(node.args[2]))
        alpha = node.kwargs.get("alpha", 1)
        source = low.ids(node.args[3]) if alpha == 1 else low.pointwise(Micro.MUL, node.args[3], alpha)
        return _put(low, ids, where, source, True)

    def fill(node: Node) -> Tensor:
        return low.ids(node.args[1]).expand(low.ids(node.args[0]).shape)

    return {
        "constant_pad_nd": pad, "index_put": index_put, "_unsafe_index_put": index_put, "scatter_add": scatter(True),
        "scatter": scatter(False), "index_add": index_add, "copy": fill, "fill": fill,
        "_unsafe_index": lambda node: low.ids(node.args[0])[
            tuple(slice(None) if i is None else low.known(i) for i in node.args[1])
        ],
    }  # fmt: skip


def _put(low: Any, ids: Tensor, where: Tensor, source: Tensor, add: bool) -> Tensor:
    """Write (or add) elements at flat positions."""
    where, source = where.reshape(-1), source.reshape(-1)
    if not add:
        made = ids.reshape(-1).clone()
        made[where] = source
        return made.reshape(ids.shape)
    layers, left = [ids.reshape(-1)], torch.arange(len(where))
    while len(left):
        layer = torch.full_like(layers[0], low.zero)
        targets = where[left]
        _, inverse = torch.unique(targets, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(left)).scatter_reduce_(
            0, inverse, torch.arange(len(left)), "amin"
        )
        layer[targets[first]] = source[left[first]]
        layers.append(layer)
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[first] = False
        left = left[rest]
    return add_layers(low, layers).reshape(ids.shape)
