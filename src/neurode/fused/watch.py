"""Whether everything that a walk over `f` read is still the same, without walking again.

The key of a vector field (`guards.py`) follows from what the walk reads alone: entries of dictionaries, items of lists, contents
of cells, globals by name, facts of tensors. So it is still the same where every one of them, read again, gives the very object
that it gave: all dictionaries at once in the native library, what else there is in one flat list, and facts of tensors. Where
anything differs, or cannot be listed, the walk decides.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from neurode._field import Field
from neurode.fused import guards
from neurode.fused.native import library
from neurode.fused.refusal import CannotLower

MOST_WATCHES = 64  # a field that falls out is walked over and comes back
MISSING = object()
NEXT = ctypes.cast(ctypes.pythonapi.PyDict_Next, ctypes.c_void_p).value


def parts_of(f: Any) -> tuple[Any, ...]:
    """What the identity of a vector field is: a function made again, with all of these as they were, is the same."""
    if type(f) is types.MethodType:
        return (f.__func__, f.__self__)
    if type(f) is not types.FunctionType or f.__kwdefaults__:
        return (f,)
    defaults, notes = f.__defaults__ or (), f.__dict__
    try:
        cells = [cell.cell_contents for cell in f.__closure__ or ()]
    except ValueError:  # a variable without a value yet
        return (f,)
    return (f.__code__, f.__globals__, len(defaults), *defaults, *cells, *notes, *notes.values())


def _may_die(x: Any) -> bool:
    """Whether a part is an object with a life of its own, which a watch must not prolong: a model."""
    lasting = types.FunctionType | types.ModuleType | types.CodeType | type | Tensor
    return not isinstance(x, lasting) and type(x).__weakrefoffset__ > 0 and hasattr(x, "__dict__")


class Watch:
    """What one walk read, by the way it is read again.

    Args:
        f: the vector field.
        parts: of it, see `parts_of`. Models among them are not kept alive.
        key: of the walk.

    Attributes:
        plans: whatever belongs to the field as it is now.
        latest: the plan of the latest call.
        able: whether all that was read could be listed.
    """

    def __init__(self, f: Any, parts: tuple[Any, ...], key: Any) -> None:
        self.key = key
        self.root = f if len(parts) > 1 and type(f) is types.FunctionType else None
        self.given = parts
        self.loose = {id(x) for x in parts if _may_die(x)}
        self.plans: dict[Any, Any] = {}
        self.latest: Any = None
        self.able = True
        self.objects: list[Any] = []  # beside the parts
        self.plain: list[int] = []  # places in `parts + objects` of what has attributes, all of them watched
        self.counted: list[
            tuple[int, list[str], list[str]]
        ] = []  # and where some are counters: the others, the counters
        self.dicts: list[Any] = []
        self.empty: list[Any] = []
        self.lists: list[Any] = []
        self.functions: list[types.FunctionType] = []
        self.cells: list[types.CellType] = []
        self.names: list[tuple[dict[str, Any], str]] = []
        self.attributes: list[tuple[Any, str]] = []
        self.tensors: list[Tensor] = []

    # ---- what the walk says that it reads

    def again(self, x: Any) -> None:
        """An object met a second time; a part that something else holds would be kept alive by its own watch."""
        self.able &= id(x) not in self.loose

    def unable(self) -> None:
        """Something that cannot be listed."""
        self.able = False

    def function(self, x: types.FunctionType) -> None:
        """Code, defaults, the contents of cells."""
        if x is self.root:
            return
        self.functions.append(x)
        self.cells += x.__closure__ or ()

    def container(self, x: Any) -> None:
        """A dictionary or list."""
        if not x:
            self.empty.append(x)
        elif isinstance(x, dict | types.MappingProxyType):
            self.able &= all(type(key) is str for key in x)
            self.dicts.append(x)
        else:
            self.able &= not isinstance(x, set)
            self.lists.append(x)

    def owner(self, x: Any, counters: Sequence[str]) -> None:
        """An object with attributes."""
        if id(x) in self.loose:
            place = next(i for i, part in enumerate(self.given) if part is x)
        else:
            place = len(self.given) + len(self.objects)
            self.objects.append(x)
        if counters:
            self.counted.append((place, [name for name in x.__dict__ if name not in counters], list(counters)))
        else:
            self.plain.append(place)

    # ---- reading

    def _rest(self, pool: Sequence[Any]) -> list[Any]:
        """What is not an entry of a dictionary that the native library reads, as it is now."""
        now: list[Any] = [*map(type, pool)]
        for i, names, counters in self.counted:
            state = pool[i].__dict__
            now += state
            now += [state.get(name, MISSING) for name in names]
            now += [type(state.get(name)) for name in counters]
        for d in self.others:
            now += d
            now += d.values()
        for f in self.functions:
            now += (f.__code__, f.__defaults__, f.__kwdefaults__)
        now += [cell.cell_contents for cell in self.cells]
        now += [d.get(name, MISSING) for d, name in self.names]
        now += [getattr(x, name) for x, name in self.attributes]
        for items in self.lists:
            now += items
            now.append(items)  # so that an item that goes from one list to the next is seen
        return now

    def settle(self, forget: Callable[[Any], Any]) -> None:
        """Note what there is; from now on `holds` says whether it still is.

        Args:
            forget: called when a part that is not kept alive dies.
        """
        self.attributes = list({(id(x), name): (x, name) for x, name in self.attributes}.values())
        within = {id(d): inside(d) for d in self.dicts}
        self.straight = [d for d in within.values() if d is not None]
        self.others = [d for d in self.dicts if within[id(d)] is None]
        pool = [*self.given, *self.objects]
        self._note_entries([pool[i].__dict__ for i in self.plain] + self.straight)
        self.values = self._rest(pool)
        self.facts = list(map(facts, self.tensors))
        self.alike: Any = None
        loose = [(i, x) for i, x in enumerate(self.given) if id(x) in self.loose]
        self.parts = tuple(x for x in self.given if id(x) not in self.loose)
        self.references = [(i, weakref.ref(x, forget)) for i, x in loose]
        self.given, self.root = (), None

    def _note_entries(self, dicts: list[dict[str, Any]]) -> None:
        """Every entry by the addresses of its key and value, which are kept alive so that no other object can get them."""
        self.entries = [x for d in dicts for entry in d.items() for x in entry]
        words = [word for d in dicts for entry in [*d.items(), ()] for word in (map(id, entry) if entry else (0, 0))]
        self.words = (ctypes.c_void_p * len(words))(*words)
        self.addresses = struct.Struct(f"{len(dicts)}P").pack
        self.same = library().nd_same

    def holds(self, parts: Sequence[Any]) -> bool:
        """Whether the field of these parts reaches what it reached."""
        if any(self.empty):
            return False
        for i, reference in self.references:
            if reference() is not parts[i]:
                return False
        pool = [*parts, *self.objects]
        try:
            if self.words:
                dicts = [pool[i].__dict__ for i in self.plain] + self.straight
                if not self.same(NEXT, self.addresses(*map(id, dicts)), len(dicts), self.words, len(self.words) // 2):
                    return False
            now = self._rest(pool)
        except (AttributeError, ValueError):  # something is gone
            return False
        return len(now) == len(self.values) and all(map(is_, now, self.values)) and self._same_tensors()

    def _same_tensors(self) -> bool:
        if not self.tensors or (self.alike is not None and self.alike(*self.tensors)):
            return True
        if list(map(facts, self.tensors)) != self.facts:
            return False
        self.alike = comparison(self.tensors)  # another mode may surround the call than did when it was made
        return True


def facts(x: Tensor) -> tuple[Any, ...]:
    """What a program takes for granted about a tensor from outside, but its numbers."""
    return type(x), x.dtype, x.shape, x.stride(), x.is_cpu, x.requires_grad, x.layout, x.is_neg()


def inside(x: Any) -> dict[str, Any] | None:
    """The dictionary whose own order is that of its entries: `x`, or that of a class; None where there is no such."""
    found = gc.get_referents(x) if type(x) is types.MappingProxyType else [x]
    return found[0] if len(found) == 1 and type(found[0]) is dict else None


def comparison(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """PyTorch's own look at the facts of tensors, ten times as fast as from Python; None where it has none to be relied on."""
    make = _trusted()
    return None if make is None else make(tensors)


@cache
def _trusted() -> Callable[[Sequence[Tensor]], Callable[..., bool]] | None:
    """It is what `torch.compile` guards its graphs by, and no public interface: taken only if it sees all that it must."""

    def make(tensors: Sequence[Tensor]) -> Callable[..., bool]:
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        kind: Any = torch._C._dynamo.guards.TensorGuards
        return kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check

    try:
        with torch.inference_mode(False), torch.no_grad():
            zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
            x, one = zeros(2, 3), zeros(1)
            look = make([one, x])
            same = lambda y: look(one, y)
            x.data = zeros(2, 3)
            right = same(x) and same(zeros(2, 3))
            others = [
                zeros(2, 3).double(), zeros(3, 2), zeros(3, 2).t(), zeros(6), torch._neg_view(zeros(2, 3)),
                zeros(2, 3).requires_grad_(), torch.nn.Parameter(x, False), zeros(2, 3).to("meta"),
            ]  # fmt: skip
            return make if right and not any(map(same, others)) else None
    except Exception:  # whatever another version of PyTorch makes of it
        return None


_lock = threading.Lock()
_watches: OrderedDict[tuple[int, ...], Watch | None] = OrderedDict()


def find(parts: Sequence[Any]) -> Watch | None:
    """The watch over the field of these parts, if there is one."""
    return _watches.get(tuple(map(id, parts)))


def start(field: Field, key: Any) -> Watch | None:
    """Watch a field from its second solve on.

    Args:
        field: met before with the key.
        key: of the walk that the watch is to stand for.

    Returns:
        The watch; None at the first solve, and where something cannot be watched so, or changed meanwhile.
    """
    parts = parts_of(field.f)
    name = tuple(map(id, parts))
    if name not in _watches:
        _note(name, None)
        return None
    present = _watches.get(name)
    if present is not None and present.key == key and present.holds(parts):
        return present
    made = Watch(field.f, parts, key)
    try:
        before, _ = guards.snapshot(field.f, field.all_args, watch=made)
        made.able &= all(x.is_cpu for x in made.tensors)
        if not made.able or before.key != key:
            return None
        made.settle(lambda _: _watches.pop(name, None))
        after, _ = guards.snapshot(field.f, field.all_args)
    except (CannotLower, AttributeError, ValueError):
        return None
    if after.key != key:
        return None
    _note(name, made)
    return made


def _note(name: tuple[int, ...], watch: Watch | None) -> None:
    with _lock:
        _watches.pop(name, None)
        _watches[name] = watch
        while len(_watches) > MOST_WATCHES:
            _watches.popitem(last=False)


def clear() -> None:
    """Forget all watches."""
    _watches.clear()
