"""From a vector field as its user wrote it to one functional graph of f and its vector-Jacobian product.

A `Recorder` notes what PyTorch's dispatcher sees while `f` and `torch.autograd.grad` through it run on a few rows, so that
`detach`, `no_grad`, custom autograd functions and gradients taken inside `f` mean what they mean in PyTorch. Everything is
recorded for two numbers of rows: what differs between the two depends on the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from neurode._field import Field, PerRow, is_per_row, take_rows
from neurode._state import Layout
from neurode.fused.recorder import Recorder, aten
from neurode.fused.refusal import CannotLower, FieldRaises, in_brief

KEPT_WHOLE = {"tanh_backward", "sigmoid_backward", "threshold_backward", "t", "transpose"}  # lowered as they are
ALSO_DECOMPOSED = (
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm",
    "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward", "native_batch_norm",
    "native_batch_norm_backward", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "gelu",
    "gelu_backward", "elu", "elu_backward", "leaky_relu", "leaky_relu_backward", "hardtanh", "hardtanh_backward",
    "hardsigmoid", "hardsigmoid_backward", "hardswish", "hardswish_backward", "mish", "mish_backward", "silu",
    "silu_backward", "softshrink", "hardshrink", "softplus_backward", "log_sigmoid_forward", "log_sigmoid_backward",
    "linalg_vector_norm", "norm", "_weight_norm_interface", "_weight_norm_interface_backward", "logaddexp", "lerp",
    "addcmul", "addcdiv", "addmv", "addr", "baddbmm", "logsumexp", "select_backward", "slice_backward",
    "_prelu_kernel", "_prelu_kernel_backward", "rsub", "frac", "xlogy", "sinc", "hypot", "trace", "tril", "triu",
    "unfold_backward", "diagonal_backward", "masked_fill", "nan_to_num", "std", "std_mean", "glu", "glu_backward",
    "linalg_cross", "renorm", "roll", "rot90", "stack", "deg2rad", "rad2deg", "heaviside", "dot", "vdot",
)  # fmt: skip
PROBE_ROWS = (2, 3)


@dataclass(frozen=True)
class Traced:
    """One recorded graph.

    Attributes:
        graph: placeholders t, y, (per-row data...), then with gradients the cotangent of dy/dt. Outputs dy/dt and with
            gradients those of y, t, each per-row leaf and each tensor of `wanted`.
        constants: tensors that entered from outside, by the target of their `get_attr` nodes.
        numbers: tensors from outside of which Python read a value.
        rows: number of rows it was recorded for; 0 where the state is one system.
        num_rowdata: how many per-row leaves there are.
        wanted: tensors from outside whose gradients the graph returns.
        gradients: whether it was recorded with gradients.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    numbers: tuple[Tensor, ...]
    rows: int
    num_rowdata: int
    wanted: tuple[Tensor, ...]
    gradients: bool


_TABLE: dict[Any, Any] = {}


def decompositions() -> dict[Any, Any]:
    """PyTorch's table of core operations, less the few that are one instruction here."""
    if not _TABLE:
        from torch._decomp import core_aten_decompositions, get_decompositions

        _TABLE.update(core_aten_decompositions())
        _TABLE.update(get_decompositions([getattr(aten, name) for name in ALSO_DECOMPOSED]))
        for op in [op for op in _TABLE if str(op).split(".")[1] in KEPT_WHOLE]:
            del _TABLE[op]
    return _TABLE


def row_layout(layout: Layout) -> Layout | None:
    """The layout of one row of a state whose first dimension is taken for rows; None where there is no such dimension."""
    if layout.batched:
        return layout
    sizes = {shape[0] if shape else 0 for shape in layout.shapes}
    if len(sizes) != 1 or sizes.pop() < 2:
        return None
    return Layout(layout.spec, tuple(shape[1:] for shape in layout.shapes), layout.dtype, layout.device, True)


class Probe:
    """The vector field as it is recorded: on `rows` rows of stand-in values.

    Args:
        field: the vector field on the inner state.
        shape: of an inner state.
        split: whether dimension 0 of the state is taken for rows that do not depend on each other.
        generator: a source of stand-in values.
        places: whether to record lines of the user's code, which takes most of the time.
    """

    def __init__(
        self, field: Field, shape: Sequence[int], split: bool, generator: torch.Generator, places: bool = False
    ) -> None:
        self.places = places
        self.field, self.shape, self.split, self.generator = field, tuple(shape), split, generator
        layout = row_layout(field.layout) if split else field.layout
        if layout is None:
            raise CannotLower("the state has no first dimension that could count rows")
        self.layout = layout
        leaves = pytree.tree_leaves(field.all_args, is_leaf=is_per_row)
        self.rowdata = [x for node in leaves if is_per_row(node) for x in pytree.tree_leaves(node.value)]

    def _state(self, rows: int) -> Tensor:
        shape = (rows, sum(self.layout.sizes)) if self.split else self.shape
        return self._random(shape, self.layout.dtype)

    def values(self, rows: int) -> list[Tensor]:
        """Stand-ins for t, y and the per-row data."""
        data = [self._random((rows, *x.shape[1:]), x.dtype) for x in self.rowdata]
        t = self._random((rows,) if self.field.layout.batched else (), self.field.time_dtype)
        return [t, self._state(rows), *data]

    def cotangent(self, rows: int) -> Tensor:
        """A stand-in for the cotangent of dy/dt."""
        return self._state(rows)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            raise CannotLower(f"neurode.per_row data of dtype {dtype}: only floating point rows are lowered")
        return torch.rand(shape, dtype=dtype, generator=self.generator) + 0.25

    def call(self, t: Tensor, y: Tensor, *data: Tensor) -> Tensor:
        """Evaluate the field on stand-ins."""
        values = iter(data)

        def fill(node: Any) -> Any:
            return PerRow(pytree.tree_map(lambda _: next(values), node.value)) if is_per_row(node) else node

        field = self.field
        args = pytree.tree_map(fill, field.all_args, is_leaf=is_per_row) if data else field.all_args
        if self.layout is field.layout:
            return Field(field.f, field.layout, args, field.has_aux)(t, y)
        dy = field.f(t, self.layout.unpack(y), *take_rows(args, None))
        return self.layout.derivative(dy[0] if field.has_aux else dy, y)


@contextmanager
def recording() -> Iterator[None]:
    """Settings under which operations are recorded in a form that can be lowered."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def record(probe: Probe, rows: int, gradients: bool) -> Traced:
    """Record f, and with `gradients` its vector-Jacobian product with respect to t, y, per-row data and every tensor from
    outside that requires grad.

    Raises:
        CannotLower: f does what cannot be recorded.
        FieldRaises: f raises.
    """
    recorder = Recorder(decompositions(), probe.places)
    recorder.until(_run.__code__)
    try:
        with recording(), torch.enable_grad():
            wanted = _run(probe, rows, gradients, recorder)
    except CannotLower:
        raise
    except Exception as error:
        if "leaf Variable that requires grad is being used in an in-place" in str(error):
            raise CannotLower("f changes t, y or args in place. Return a new tensor: type -y, not y.neg_()") from error
        raise FieldRaises(in_brief(error)) from error
    constants, numbers = recorder.constants, tuple(recorder.numbers)
    return Traced(
        recorder.graph, constants, numbers, rows if probe.split else 0, len(probe.rowdata), tuple(wanted), gradients
    )


def _run(probe: Probe, rows: int, gradients: bool, recorder: Recorder) -> list[Tensor]:
    """Run what is to be recorded.

    Returns:
        The tensors from outside that it has gradients of.
    """
    inputs = [value.requires_grad_() for value in probe.values(rows)]
    for name, value in zip(["t", "y", *(f"data_{i}" for i in range(len(inputs) - 2))], inputs, strict=True):
        recorder.input(name, value)
    if not gradients:
        with recorder:
            dy = probe.call(*inputs)
        recorder.output([dy])
        return []
    g = probe.cotangent(rows)
    recorder.input("g", g)
    with recorder:
        dy = probe.call(*inputs)
    wanted = [x for x in recorder.reached(dy) if x.requires_grad]
    refuse_counted_twice(wanted)
    t, y, *data = inputs
    of = (y, t, *data, *wanted)
    with recorder:
        found = torch.autograd.grad(dy, of, g, allow_unused=True) if dy.requires_grad else [None] * len(of)
    recorder.output([dy, *found])
    return wanted


def refuse_counted_twice(tensors: Sequence[Tensor]) -> None:
    """Refuse a tensor that f uses and that another one was computed from: recorded, its gradient would hold both parts."""
    places = {_edge(x): x for x in tensors}
    for x in tensors:
        if x.grad_fn is None:
            continue
        stack, seen = [edge for edge in x.grad_fn.next_functions if edge[0] is not None], set()
        while stack:
            edge = stack.pop()
            if edge in places:
                raise CannotLower("f uses a tensor and also another one that was computed from it, outside f")
            if edge[0] in seen:
                continue
            seen.add(edge[0])
            stack += [e for e in edge[0].next_functions if e[0] is not None]  # pyrefly: ignore[missing-attribute]


def _edge(x: Tensor) -> Any:
    """Where gradients of a tensor arrive in the graph of operations."""
    edge = torch.autograd.graph.get_gradient_edge(x)
    return edge.node, edge.output_nr


def outside(traced: Traced) -> list[Tensor]:
    """The tensors that enter a graph from outside: parameters, buffers, closures, globals (constants of f too)."""
    found: dict[int, Tensor] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = traced.constants[node.target]
            found.setdefault(id(value), value)
    return list(found.values())


def same_shape(first: Traced, second: Traced) -> set[str]:
    """Compare the recordings for two numbers of rows.

    Returns:
        Names of the nodes (in either) whose shape counts rows.

    Raises:
        CannotLower: f does different things for different numbers of rows.
    """
    one, two = list(first.graph.nodes), list(second.graph.nodes)
    if [str(n.target) for n in one if n.op == "call_function"] != [
        str(n.target) for n in two if n.op == "call_function"
    ] or len(one) != len(two):
        raise CannotLower("f does different operations for different numbers of rows")
    sized = set()
    for a, b in zip(one, two, strict=True):
        if _shapes(a) != _shapes(b):
            sized |= {a.name, b.name}
    return sized


def _shapes(node: fx.Node) -> Any:
    return pytree.tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else None, node.meta.get("val"))


def place(node: fx.Node) -> str:
    """The line of the user's code that a node came from, or an empty string."""
    return node.meta.get("place", "")
