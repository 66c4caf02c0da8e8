"""Programs by what they depend on: found again where nothing changed, built and checked against PyTorch where something did."""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from neurode._field import Field
from neurode.fused import guards, watch
from neurode.fused.build import FieldProgram, build, evaluate_graph
from neurode.fused.capture import PROBE_ROWS, Probe
from neurode.fused.native import Machine, pointer
from neurode.fused.refusal import CannotLower

MOST_PROGRAMS = 512  # kept in all, and
MOST_A_CODE = 32  # for one function or class whose values change: then its solves run on eager
KNOWN_BY_ID = (type, FunctionType, CodeType, ModuleType)
# What rounding may leave between two orders of the same operations, relative to the largest element.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}


@dataclass(eq=False)
class Entry:
    """One program, ready to run, or why there is none.

    Attributes:
        made: the lowered field.
        machine: it, in the native library.
        places: positions of its tensors from outside among those of a snapshot.
        baked: of the tensors whose numbers became part of the program, the position in a snapshot and the numbers.
        refusal: the reason where the field cannot be lowered, and its class.
    """

    made: FieldProgram | None = None
    machine: Machine | None = None
    places: tuple[int, ...] = ()
    baked: tuple[tuple[int, Tensor], ...] = ()
    refusal: tuple[str, type[CannotLower]] = ("", CannotLower)
    keep: Any = None


@dataclass(frozen=True, eq=False)
class Bound:
    """A program and what it meets in this solve.

    Attributes:
        entry: the program.
        tensors: those that it reads.
        counters: what it raises.
        baked: tensors whose numbers are part of it, with these numbers.
        key: of the walk over the field.
    """

    entry: Entry
    tensors: tuple[Tensor, ...]
    counters: tuple[tuple[dict[str, Any], str, int], ...]
    baked: tuple[tuple[Tensor, Tensor], ...]
    key: Any

    def count(self, calls: int) -> None:
        """Raise the call counters of f as that many calls would have."""
        for state, name, by in self.counters:
            state[name] += by * calls


_entries: OrderedDict[Any, Entry] = OrderedDict()
_by_code: dict[int, int] = {}
_warned: set[int] = set()
_lock = threading.RLock()


def find(field: Field, y: Tensor, splits: tuple[bool, ...], wanted: bool, want_t: bool) -> Bound:
    """The program for a vector field as it is now.

    Args:
        field: on the inner state.
        y: an inner state.
        splits: whether to take dimension 0 of the state for independent rows; of two answers the second where the first
            cannot serve.
        wanted: whether an input of the solve requires grad; with one, or with a tensor that f reaches and that does,
            there is a vector-Jacobian product, as long as gradients are on.
        want_t: with the cotangent of t.

    Raises:
        CannotLower: with the reason.
    """
    reason = guards.unusual_surroundings()
    if reason:
        raise CannotLower(reason)
    with _lock:
        seen, _ = guards.snapshot(field.f, field.all_args)
        gradients = torch.is_grad_enabled() and (wanted or any(x.requires_grad for x in seen.tensors))
        entry = Entry()
        for split in splits:
            key = _key(seen, field, y, split, gradients, want_t)
            known = _entries.get(key)
            if known is None or not _still_baked(known, seen):
                seen, entry = _make(field, y, split, gradients, want_t)
            else:
                entry = known
                _entries.move_to_end(key)
            if entry.made is not None:
                break
    if entry.made is None:
        reason, kind = entry.refusal
        raise kind(reason)
    tensors = tuple(seen.tensors[i] for i in entry.places)
    baked = tuple((seen.tensors[place], content) for place, content in entry.baked)
    return Bound(entry, tensors, tuple(seen.counters), baked, seen.key)


def _key(seen: guards.Snapshot, field: Field, y: Tensor, split: bool, gradients: bool, want_t: bool) -> Any:
    layout = field.layout
    shape = (layout.spec, layout.shapes if not split or layout.batched else tuple(s[1:] for s in layout.shapes))
    return (
        seen.key,
        shape,
        layout.batched,
        y.dtype,
        y.device,
        field.has_aux,
        split,
        gradients,
        want_t,
        torch.get_default_dtype(),
    )


def _still_baked(entry: Entry, seen: guards.Snapshot) -> bool:
    # Not by the version: `.data` and NumPy write without raising it.
    return all(torch.equal(seen.tensors[place], content) for place, content in entry.baked)


def _root(f: Any) -> int:
    while hasattr(f, "func") or hasattr(f, "__func__"):
        f = f.func if hasattr(f, "func") else f.__func__
    return id(f.__code__ if isinstance(f, FunctionType) else type(f))


def _make(field: Field, y: Tensor, split: bool, gradients: bool, want_t: bool) -> tuple[guards.Snapshot, Entry]:
    """Build an entry and keep it; refusals are kept too."""
    root = _root(field.f)
    before, codes = guards.snapshot(field.f, field.all_args, copy=True)
    if _by_code.get(root, 0) >= MOST_A_CODE and not isinstance(field.f, torch.nn.Module):
        if root not in _warned:
            _warned.add(root)
            warnings.warn(
                f"neurode: f was captured {MOST_A_CODE} times because values that it reads keep changing; pass them as"
                " tensors in args=. Its solves run on the eager engine.",
                stacklevel=2,
            )
        raise CannotLower(f"values that f reads changed more than {MOST_A_CODE} times; pass them as tensors in args=")
    contents = _contents(before)
    entry = Entry()
    steps: dict[tuple[type, str], int] = {}
    try:
        entry.made = build(field, y, split, gradients, want_t)
        steps = _side_effects(field, before, codes, contents)
        places = {id(x): i for i, x in enumerate(before.tensors)}
        if any(id(x) not in places for x in entry.made.outside):
            raise CannotLower("f uses a tensor that it reaches in a way that cannot be watched")
        entry.places = tuple(places[id(x)] for x in entry.made.outside)
        entry.baked = tuple((entry.places[i], entry.made.outside[i].detach().clone()) for i in entry.made.baked)
        entry.machine = Machine(entry.made.program, y.dtype is torch.float64)
        verify(field, y, entry.made, entry.machine)
    except CannotLower as error:
        entry = Entry(refusal=(str(error), type(error)))
        steps = {}
    finally:
        guards.restore(before)
        _restore_tensors(contents)
    if steps:
        guards.remember_counters(steps)
    seen, _ = guards.snapshot(field.f, field.all_args)
    # What the key knows by identity; not functions, whose cells would keep alive the models that they close over.
    entry.keep = [x.__code__ if isinstance(x, FunctionType) else x for x in before.keep if isinstance(x, KNOWN_BY_ID)]
    _entries[_key(seen, field, y, split, gradients, want_t)] = entry
    _by_code[root] = _by_code.get(root, 0) + 1
    while len(_entries) > MOST_PROGRAMS:
        _entries.popitem(last=False)
    return seen, entry


def _changed(x: Tensor, content: Tensor, version: int) -> bool:
    """Fused batch norms write their statistics without raising the version."""
    return x._version != version or not torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(content))


def evaluate(field: Field, t: Tensor, y: Tensor) -> None:
    """One evaluation on the real state that leaves nothing behind: an f that fails on any engine raises its own error."""
    with undone(field):
        field.of(field.f)(t, y)


@contextmanager
def undone(field: Field) -> Iterator[None]:
    """Calls of f that leave nothing behind, as far as what f reaches can be watched.

    Raises:
        CannotLower: it cannot.
    """
    before, _ = guards.snapshot(field.f, field.all_args, copy=True)
    contents = _contents(before)
    try:
        yield
    finally:
        guards.restore(before)
        _restore_tensors(contents)


def _contents(seen: guards.Snapshot) -> list[tuple[Tensor, Tensor, int]]:
    return [(x, x.detach().clone(), x._version) for x in seen.tensors]


def _restore_tensors(contents: list[tuple[Tensor, Tensor, int]]) -> None:
    with torch.no_grad():
        for x, content, version in contents:
            if _changed(x, content, version):
                x.copy_(content)


def _side_effects(field: Field, before: guards.Snapshot, codes: Any, contents: Any) -> dict[tuple[type, str], int]:
    """Refuse a field whose calls changed something; a call counter is allowed.

    Returns:
        Call counters, with what each call adds.
    """
    if any(_changed(*content) for content in contents):
        raise CannotLower("f changes a tensor from outside in place (a buffer?)")
    after, _ = guards.snapshot(field.f, field.all_args)
    if after.key == before.key:
        return {}
    calls = len(PROBE_ROWS)
    found = guards.find_counters(before, codes, calls)
    if found:
        for (_, name), (kind, state, value) in before.integers.items():
            if (kind, name) in found:
                state[name] = value
        again, _ = guards.snapshot(field.f, field.all_args)
        if again.key == before.key:
            return found
    raise CannotLower("a call of f changes Python state (an attribute, a list, a variable) that is not a call counter")


def verify(field: Field, y: Tensor, made: FieldProgram, machine: Machine) -> None:
    """Compare a program with PyTorch: with f on fresh values, and with its recording on fresh parameters too.

    Raises:
        CannotLower: they differ.
    """
    generator = torch.Generator().manual_seed(90125)
    for rows in PROBE_ROWS[::-1]:
        probe = Probe(field, y.shape, made.split, generator)
        values = probe.values(rows)
        with torch.no_grad():
            expected = _quiet(probe, values)
        _agree(expected, machine_eval(machine, made, made.outside, values, rows), "dy/dt", y.dtype)
    strange = [_stand_in(x, i in made.baked, generator) for i, x in enumerate(made.outside)]
    values = probe.values(rows := PROBE_ROWS[0])
    if made.gradients:
        values = [*values, probe.cotangent(rows)]
    expected_all = evaluate_graph(made, strange, values)
    _agree(expected_all[0], machine_eval(machine, made, strange, values, rows), "dy/dt", y.dtype)
    if made.gradients:
        _verify_gradients(machine, made, strange, values, rows, expected_all)


def _quiet(probe: Probe, values: list[Tensor]) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return probe.call(*[v.clone().requires_grad_() for v in values]).detach()


def _stand_in(x: Tensor, baked: bool, generator: torch.Generator) -> Tensor:
    if baked or not x.is_floating_point():
        return x.detach()
    noise = torch.rand(x.shape, dtype=x.dtype, generator=generator)
    if x.ndim < 2:
        return noise * 0.8 + 0.1  # positive: it may be a variance or a rate
    # Products keep the size of their operands (Glorot & Bengio 2010): nothing saturates and hides an error in rounding.
    return (2 * noise - 1) * math.sqrt(3 * x.shape[0] / x.numel())


def _lanes(made: FieldProgram, values: list[Tensor], rows: int) -> tuple[int, Tensor, Tensor, Tensor | None]:
    t, y, *rest = values
    lanes = rows if made.split else 1
    data = rest[: made.num_data]
    flat = torch.cat([x.reshape(lanes, -1) for x in data], 1).contiguous() if data else None
    return lanes, t.double().expand(lanes).contiguous(), y.reshape(lanes, -1).contiguous(), flat


def machine_eval(machine: Machine, made: FieldProgram, tensors: Any, values: list[Tensor], rows: int) -> Tensor:
    """dy/dt of the native program."""
    lanes, t, y, data = _lanes(made, values, rows)
    u, out = made.before(tensors), torch.empty_like(y)
    machine.library.nd_eval(machine.handle, *map(pointer, (u,)), lanes, *map(pointer, (t, y, data, out)))
    return out


def _verify_gradients(
    machine: Machine, made: FieldProgram, tensors: Any, values: Any, rows: int, expected: Any
) -> None:
    lanes, t, y, data = _lanes(made, values, rows)
    program, u = made.program, made.before(tensors)
    g = values[-1].reshape(lanes, -1).contiguous()
    grad_y, grad_t = torch.zeros_like(y), torch.zeros(lanes, dtype=y.dtype)
    grad_data = None if data is None else torch.zeros_like(data)
    accumulators = torch.zeros(max(program.num_accumulators, 1), dtype=y.dtype)
    outputs = (g, grad_y, grad_t, grad_data, accumulators)
    machine.library.nd_vjp(machine.handle, pointer(u), lanes, *map(pointer, (t, y, data, *outputs)))
    _agree(expected[1], grad_y if program.grad_y else None, "the gradient of y", y.dtype)
    if program.grad_t is not None:
        _agree(
            expected[2],
            grad_t if expected[2] is None or expected[2].ndim else grad_t.sum(),
            "the gradient of t",
            y.dtype,
        )
    theirs = expected[3 + made.num_data :]
    for a, b in zip(theirs, made.after(accumulators, tensors), strict=True):
        _agree(a, b, "a gradient of parameters", y.dtype)


def _agree(theirs: Tensor | None, mine: Tensor | None, what: str, dtype: torch.dtype) -> None:
    if theirs is None or mine is None:
        other = mine if theirs is None else theirs
        if other is not None and bool(other.any()):
            raise CannotLower(f"the program and PyTorch disagree about {what}: one of them has none")
        return
    theirs, mine = theirs.detach().double().reshape(-1), mine.detach().double().reshape(-1)
    finite = torch.isfinite(theirs)
    scale = theirs[finite].abs().max().clamp_min(1e-2) if bool(finite.any()) else torch.tensor(1.0)
    same = (theirs - mine).abs() <= TOLERANCE[dtype] * scale
    same |= (theirs == mine) | (torch.isnan(theirs) & torch.isnan(mine))
    if not bool(same.all()):
        raise CannotLower(f"the program and PyTorch disagree about {what}; please report this field")


def clear() -> None:
    """Forget all programs."""
    watch.clear()
    with _lock:
        _entries.clear()
        _by_code.clear()
        _warned.clear()
        guards._counters.clear()


__all__ = ["Bound", "Entry", "clear", "find", "verify"]
