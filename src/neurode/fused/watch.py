"""Whether everything that a walk over `f` read is still the same, without walking again.

The key of a vector field (`guards.py`) follows from what the walk reads alone: entries of dictionaries, items of lists, contents
of cells, globals by name, facts of tensors. So it is still the same where every one of them, read again, gives the very object
that it gave: a few flat lists, compared by identity. Where anything differs, or cannot be listed, the walk decides.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from neurode._field import Field
from neurode.fused import guards
from neurode.fused.refusal import CannotLower

MOST_WATCHES = 64  # a field that falls out is walked over and comes back
MISSING = object()


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
        able: whether all that was read could be listed.
    """

    def __init__(self, f: Any, parts: tuple[Any, ...], key: Any) -> None:
        self.key = key
        self.root = f if len(parts) > 1 and type(f) is types.FunctionType else None
        self.given = parts
        self.loose = {id(x) for x in parts if _may_die(x)}
        self.plans: dict[Any, Any] = {}
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

    def read(self, parts: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """All of it as it is now: names of entries, the entries themselves, facts of tensors."""
        pool = [*parts, *self.objects]
        dicts = [pool[i].__dict__ for i in self.plain]
        dicts += self.dicts
        now = [x for d in dicts for x in d.values()]
        for i, names, counters in self.counted:
            state = pool[i].__dict__
            dicts.append(state)
            now.append(state)
            now += [state.get(name, MISSING) for name in names]
            now += [type(state.get(name)) for name in counters]
        now += map(type, pool)
        now += [x for f in self.functions for x in (f.__code__, f.__defaults__, f.__kwdefaults__)]
        now += [cell.cell_contents for cell in self.cells]
        now += [d.get(name, MISSING) for d, name in self.names]
        now += [getattr(x, name) for x, name in self.attributes]
        now += [x for items in self.lists for x in items]
        facts = [(x.dtype, x.shape, x.is_cpu, x.requires_grad, x.layout) for x in self.tensors]
        return [name for d in dicts for name in d], now, facts

    def settle(self, forget: Callable[[Any], Any]) -> None:
        """Note what there is; from now on `holds` says whether it still is.

        Args:
            forget: called when a part that is not kept alive dies.
        """
        self.keys, self.values, self.facts = self.read(self.given)
        loose = [(i, x) for i, x in enumerate(self.given) if id(x) in self.loose]
        self.parts = tuple(x for x in self.given if id(x) not in self.loose)
        self.references = [(i, weakref.ref(x, forget)) for i, x in loose]
        self.given, self.root = (), None

    def holds(self, parts: Sequence[Any]) -> bool:
        """Whether the field of these parts reaches what it reached."""
        if any(self.empty) or not all(ref() is parts[i] for i, ref in self.references):
            return False
        try:
            keys, values, facts = self.read(parts)
        except (AttributeError, ValueError):  # something is gone
            return False
        same = keys == self.keys and facts == self.facts and len(values) == len(self.values)
        return same and all(map(is_, values, self.values))


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
