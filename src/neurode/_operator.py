"""A solve as one operator that `torch.compile` knows: opaque to the compiler, differentiable, and never stale.

What the compiled graph holds is a handle, the number of a request: the module `f` and the options, which are constants of the
graph guarded by the identity of `f`. Its parameters and buffers are inputs of the operator, so that gradients reach them. At
every call the operator runs `neurode.solve`, whose own guards look at `f` as it is then. Whatever else changes in `f` is
thus seen, and an adaptive solve, whose steps depend on values, is possible under `fullgraph=True`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurode._field import PerRow
from neurode._solution import RowStatus, Solution, Stats

PLAIN = (str, int, float, bool, type(None))
MOST_WAITING = 64  # solves whose backward pass is to come; an older one is solved again when it comes


@dataclass(frozen=True, eq=False)
class Request:
    """What a handle stands for.

    Attributes:
        module: the vector field, which whoever has the compiled model keeps alive, and a request does not.
        options: keywords of `neurode.solve` with constants for values: words, flags.
        integers, floats: names of those whose numbers the operator gets at every call.
        names: of the parameters and buffers of `f`, in the order in which the operator gets them.
        per_row: for each of `args` whether it belongs to rows.
        single: whether the state is one tensor; else a tuple.
    """

    module: weakref.ref[nn.Module]
    options: dict[str, Any]
    integers: tuple[str, ...]
    floats: tuple[str, ...]
    names: tuple[str, ...]
    per_row: tuple[bool, ...]
    single: bool

    @property
    def f(self) -> nn.Module:
        """The vector field.

        Raises:
            RuntimeError: it is no more; then neither is the model that was compiled.
        """
        f = self.module()
        if f is None:
            raise RuntimeError(
                "this compiled graph outlived the vector field that it solves; keep the compiled model instead."
            )
        return f

    def own(self) -> list[Tensor]:
        """The parameters and buffers of `f` as they are now."""
        f = self.f
        return [*f.parameters(), *f.buffers()]


@dataclass
class _Store:
    requests: dict[int, Request] = field(default_factory=dict)  # as long as their fields live
    handles: Any = field(default_factory=itertools.count)
    waiting: OrderedDict[int, Any] = field(default_factory=OrderedDict)
    tokens: Any = field(default_factory=lambda: itertools.count(1))
    lock: Any = field(default_factory=threading.Lock)
    swapping: Any = field(default_factory=threading.RLock)


_store = _Store()


def _request(f: nn.Module, keys: str, integers: str, floats: str, single: bool, rows: str, *values: Any) -> int:
    """Note a request; its number is a constant of the graph."""
    names = tuple(name for name, _ in itertools.chain(f.named_parameters(), f.named_buffers()))
    options = dict(zip(keys.split(), values, strict=True))
    per_row = tuple(c == "1" for c in rows)
    request = Request(weakref.ref(f), options, tuple(integers.split()), tuple(floats.split()), names, per_row, single)
    handle = next(_store.handles)
    _store.requests[handle] = request
    weakref.finalize(f, _store.requests.pop, handle, None)
    return handle


# Run once, when the graph is made. This is all that torch.compiler.assume_constant_result does after importing the compiler,
# which takes seconds and which an import of neurode must not wait for.
_request._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]


def suits(f: Any, y0: Any, t_span: Any, t_eval: Any, args: Any, options: dict[str, Any]) -> bool:
    """Whether a solve under `torch.compile` becomes the operator; else the compiler sees through the eager loop.

    It does where `f` is a module and everything else tensors or plain values.
    """
    if not isinstance(f, nn.Module) or options["engine"] == "eager" or options["gradient"] != "auto":
        return False
    leaves = [y0] if isinstance(y0, Tensor) else list(y0) if type(y0) is tuple else [None]
    if not all(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in leaves):
        return False
    if torch._C._functorch.get_dynamic_layer_stack_depth() > 0:  # vmap, grad and the like inside the compiled function
        return False
    if not all(isinstance(t, int | float | Tensor) for t in t_span) or not isinstance(t_eval, Tensor | None):
        return False
    if not all(isinstance(a, Tensor) or (isinstance(a, PerRow) and isinstance(a.value, Tensor)) for a in args):
        return False
    return all(type(value) in PLAIN for value in options.values())


def solve(f: Any, y0: Any, t_span: Any, t_eval: Any, args: Any, options: dict[str, Any]) -> Solution:
    """A solve as one node of the compiler's graph.

    Returns:
        A `Solution` whose `status` is a `RowStatus` (of one entry without rows), and whose counts are tensors.
    """
    id(f)  # a guard: another module in its place makes another graph
    single, leaves = isinstance(y0, Tensor), [y0] if isinstance(y0, Tensor) else list(y0)
    numbers = {name: v for name, v in options.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    integers = {name: v for name, v in numbers.items() if isinstance(v, int) and name != "batch_dim"}
    floats = {name: v for name, v in numbers.items() if isinstance(v, float)}
    kept = {k: v for k, v in options.items() if v is not None and k not in integers and k not in floats}
    flags = "".join(["1" if isinstance(a, PerRow) else "0" for a in args])
    handle = _request(f, " ".join(kept), " ".join(integers), " ".join(floats), single, flags, *kept.values())
    given = [*f.parameters(), *f.buffers()]
    data = [a.value if isinstance(a, PerRow) else a for a in args]
    times = [torch.as_tensor(t, dtype=torch.float64, device=leaves[0].device) for t in t_span]
    outputs = [] if t_eval is None else [t_eval]
    tensors = [*leaves, *given, *data, *times, *outputs]
    needs = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
    sizes = [len(leaves), len(given), len(data), len(outputs)]
    values = (list(integers.values()), list(floats.values()))
    made = torch.ops.neurode.solve(tensors, sizes, needs, *values, handle, options["batch_dim"] == 0)
    n = len(leaves)
    y1, ys, (codes, counts, t1, _) = made[:n], made[n : 2 * n], made[2 * n :]
    shaped = lambda x: x[0] if single else tuple(x)
    stats = Stats(
        num_calls=counts[0].max(),
        num_evaluations=counts[0],
        num_accepted=counts[1],
        num_rejected=counts[2],
        engine="auto, chosen at every call (one operator of a compiled graph)",
    )
    ts = t_eval if t_eval is not None else t1.unsqueeze(0)
    return Solution(ts=ts, ys=shaped(ys), y1=shaped(y1), status=RowStatus(codes), stats=stats, t1=t1)


def _call(
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    needs: Sequence[bool],
    integers: Sequence[int],
    floats: Sequence[float],
    handle: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Solve.

    Returns:
        The inputs as the solve knew them, and the outputs, with their graph where anything needs a gradient.
    """
    from neurode._solve import solve as solve_eagerly

    request = _store.requests[handle]
    inputs = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    own, first = request.own(), sizes[0]
    if all(x.data_ptr() == y.data_ptr() and x.shape == y.shape for x, y in zip(own, tensors[first:], strict=False)):
        inputs[first : first + len(own)] = own  # the usual case: the module's own parameters
        swapped: Any = contextlib.nullcontext()
    else:
        swapped = _parameters(request, inputs[first : first + len(own)])
    leaves, _, data, times, outputs = _split(inputs, sizes)
    args = tuple(PerRow(x) if per_row else x for x, per_row in zip(data, request.per_row, strict=True))
    y0 = leaves[0] if request.single else tuple(leaves)
    t_eval = outputs[0] if outputs else None
    numbers: dict[str, Any] = dict(zip(request.integers + request.floats, [*integers, *floats], strict=True))
    with _recording(any(needs)), swapped:
        found = solve_eagerly(request.f, y0, tuple(times), args=args, t_eval=t_eval, **numbers, **request.options)
    y1, ys = ([found.y1], [found.ys]) if request.single else (list(found.y1), list(found.ys))
    return inputs, [*y1, *ys, *_facts(found, y1[0])]


def _facts(found: Solution, y: Tensor) -> list[Tensor]:
    """Codes, counts and the end time as tensors."""
    as_tensor = lambda x: torch.as_tensor(x, dtype=torch.int64, device=y.device).reshape(-1)
    codes = found.status.codes if isinstance(found.status, RowStatus) else as_tensor(found.status.code)
    stats = found.stats
    counts = torch.stack([as_tensor(x) for x in (stats.num_evaluations, stats.num_accepted, stats.num_rejected)])
    return [codes.clone(), counts, found.t1.detach().clone()]


@contextlib.contextmanager
def _recording(on: bool) -> Iterator[None]:
    """Let PyTorch record inside an operator's body, which runs below the dispatcher's layer that does."""
    tls = torch._C
    excluded = tls._dispatch_tls_local_exclude_set()
    for key in (tls.DispatchKey.AutogradFunctionality, tls.DispatchKey.AutogradOther, tls.DispatchKey.ADInplaceOrView):
        excluded = excluded - tls.DispatchKeySet(key)
    with tls._ForceDispatchKeyGuard(tls._dispatch_tls_local_include_set(), excluded), torch.set_grad_enabled(on):
        yield


@contextlib.contextmanager
def _parameters(request: Request, given: Sequence[Tensor]) -> Iterator[None]:
    """The module with other tensors in place of its own (`torch.func.functional_call` around the compiled model)."""
    with _store.swapping:  # one thread at a time
        tensors = dict(zip(request.names, given, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(request.f, tensors, tie_weights=True):
            yield


def _split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[list[Tensor], ...]:
    """State, module, arguments, ends and output times."""
    parts, start = [], 0
    for size in (*sizes[:3], 2, sizes[3]):
        parts.append(list(tensors[start : start + size]))
        start += size
    return tuple(parts)


@torch.library.custom_op("neurode::solve", mutates_args=())
def _solve(
    tensors: list[Tensor],
    sizes: list[int],
    needs: list[bool],
    integers: list[int],
    floats: list[float],
    handle: int,
    rows: bool,
) -> list[Tensor]:
    """Run the request and keep its graph for the way back."""
    inputs, made = _call(tensors, sizes, needs, integers, floats, handle)
    token = next(_store.tokens)
    if any(needs):
        with _store.lock:
            _store.waiting[token] = (inputs, made)
            while len(_store.waiting) > MOST_WAITING:
                _store.waiting.popitem(last=False)
    return [*[x.detach().clone() for x in made], torch.tensor(token)]


@_solve.register_fake
def _(tensors: list[Tensor], sizes: list[int], *rest: Any) -> list[Tensor]:
    rows = rest[-1]
    leaves, _, _, _, outputs = _split(tensors, sizes)
    first, count = leaves[0], outputs[0].shape[0] if outputs else 1
    n = first.shape[0] if rows else 1
    facts = [first.new_empty(n, dtype=torch.int64), first.new_empty((3, n), dtype=torch.int64)]
    end = first.new_empty((n,) if rows else (), dtype=torch.float64)
    ys = [x.new_empty((count, *x.shape)) for x in leaves]
    return [*[torch.empty_like(x) for x in leaves], *ys, *facts, end, torch.empty((), dtype=torch.int64)]


@torch.library.custom_op("neurode::solve_backward", mutates_args=())
def _solve_backward(
    tensors: list[Tensor],
    grads: list[Tensor],
    token: Tensor,
    sizes: list[int],
    needs: list[bool],
    integers: list[int],
    floats: list[float],
    handle: int,
) -> list[Tensor]:
    """Gradients of the inputs that need one; zeros where there is none."""
    with _store.lock:
        kept = _store.waiting.pop(int(token), None)
    inputs, made = kept if kept is not None else _call(tensors, sizes, needs, integers, floats, handle)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    pairs = [(x, g) for x, g in zip(made, grads, strict=False) if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(wanted, found, strict=True)]


@_solve_backward.register_fake
def _(
    tensors: list[Tensor], grads: list[Tensor], token: Tensor, sizes: list[int], needs: list[bool], *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(tensors, needs, strict=True) if need]


def _keep(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    tensors, *ctx.rest, _ = inputs
    ctx.sizes, ctx.needs = ctx.rest[:2]
    ctx.save_for_backward(output[-1], *output[: 2 * ctx.sizes[0]], *tensors)


def _backward(ctx: Any, grads: list[Any]) -> Any:
    n = 2 * ctx.sizes[0]
    token, *kept = ctx.saved_tensors
    made, tensors = kept[:n], kept[n:]
    full = [torch.zeros_like(y) if g is None else g for g, y in zip(grads[:n], made, strict=True)]
    found = iter(torch.ops.neurode.solve_backward(tensors, full, token, *ctx.rest))
    return [next(found) if need else None for need in ctx.needs], *[None] * 6


_solve.register_autograd(_backward, setup_context=_keep)

__all__ = ["solve", "suits"]
