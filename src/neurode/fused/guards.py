"""What a program depends on besides its inputs: everything that a function's result may follow from, as one comparable key.

A conservative walk over the Python state that a vector field reaches: code, defaults, closures, globals by the names that the
code uses, attributes of modules and objects, items of containers, hooks. Numbers and strings enter by value, tensors by
shape and by their place in the walk (their numbers are read at every solve), so that a replaced weight is simply read and a
changed float or flag meets another program. What cannot be watched is refused.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import sys
import sysconfig
import types
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from neurode._field import PerRow
from neurode.fused.refusal import CannotLower

if TYPE_CHECKING:
    from neurode.fused.watch import Watch

MOST_OBJECTS = 20_000  # more than this is not a vector field but an application
LARGEST_ARRAY = 65_536  # bytes of a NumPy array whose content is compared
FORBIDDEN_BUILTINS = {
    "print",
    "open",
    "input",
    "exec",
    "eval",
    "setattr",
    "delattr",
    "globals",
    "locals",
    "breakpoint",
    "next",
}
FORBIDDEN_MODULES = {
    "random",
    "time",
    "datetime",
    "secrets",
    "uuid",
    "logging",
    "threading",
    "multiprocessing",
    "socket",
}
PLAIN = (
    int,
    bool,
    str,
    bytes,
    complex,
    torch.dtype,
    torch.device,
    torch.Size,
    type(None),
    type(Ellipsis),
    range,
    slice,
)
MODULE_STATE = set(nn.Module().__dict__)
HELD = {"_parameters", "_buffers", "_modules"}
HOOKS = ("_backward_hooks", "_backward_pre_hooks")
IGNORED = {
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set", "_is_full_backward_hook", "_compiled_call_impl", "__annotations__", "__doc__",
    "_abc_impl",
}  # fmt: skip
_TORCH = str(torch.__path__[0])
_NEURODE = str(Path(__file__).resolve().parents[1])
_STDLIB = sysconfig.get_paths()["stdlib"]
# Attributes that every call of f raises by a constant and that nothing reads, with that constant.
_counters: dict[tuple[type, str], int] = {}


@dataclass
class Snapshot:
    """The state that a function reaches.

    Attributes:
        key: equal for two functions exactly where one program serves both.
        tensors: the tensors met, in the order of the walk.
        counters: of the call counters met: attribute dictionary, name, and what a call adds.
        keep: objects that the key refers to by identity.
        containers: contents of what may change, where a copy was asked for.
    """

    key: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    counters: list[tuple[dict[str, Any], str, int]] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    containers: list[tuple[Any, Any]] = field(default_factory=list)
    integers: dict[tuple[int, str], tuple[type, dict[str, Any], int]] = field(default_factory=dict)


def is_library(filename: str) -> bool:
    """Whether code comes with PyTorch, Python or neurode, and so does not change."""
    return filename.startswith((_TORCH, _NEURODE, "<frozen")) or (
        filename.startswith(_STDLIB) and "site-packages" not in filename
    )


@functools.lru_cache(maxsize=4096)
def of_library(kind: type) -> bool:
    """Whether a class comes with PyTorch, Python or neurode."""
    return is_library(getattr(sys.modules.get(kind.__module__), "__file__", None) or "<frozen")


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> tuple[str, ...]:
    """Global and attribute names that code, and the functions written inside it, use."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(names_of(constant)))
    return tuple(names)


@functools.lru_cache(maxsize=4096)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The global names that code loads."""
    found = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(globals_of(constant)))
    for i in dis.get_instructions(code):
        if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise CannotLower(f"f sets the global {i.argval!r}")
    return tuple(found)


class Walk:
    """One walk; see the module."""

    def __init__(self, copy: bool, watch: Watch | None = None) -> None:
        self.made, self.seen, self.copy, self.watch = Snapshot(), {}, copy, watch
        self.codes: list[types.CodeType] = []

    def visit(self, x: Any) -> Any:
        """The key of an object."""
        kind = type(x)
        if kind is float:
            return ("f", x) if x else ("f", repr(x)) if x == x else ("f", "nan")
        if kind in PLAIN:
            return (kind, x) if kind is not slice else (kind, self.visit((x.start, x.stop, x.step)))
        known = self.seen.get(id(x))
        if known is not None:
            if self.watch:
                self.watch.again(x)
            return ("again", known)
        number = len(self.seen)
        if number > MOST_OBJECTS:
            raise CannotLower(f"f reaches more than {MOST_OBJECTS} objects, too many to watch")
        self.seen[id(x)] = number
        self.made.keep.append(x)
        if isinstance(x, Tensor):
            return self._tensor(x)
        return self._object(x, kind)

    def _tensor(self, x: Tensor) -> Any:
        if type(x).__module__ not in ("torch", "torch.nn.parameter") or x.layout is not torch.strided:
            raise CannotLower(f"f reaches a {type(x).__name__} ({x.layout}); only ordinary dense tensors are lowered")
        if is_lazy(x):
            raise CannotLower("f reaches a parameter that has no shape yet (a lazy module before its first call)")
        self.made.tensors.append(x)
        if self.watch:
            self.watch.tensors.append(x)
        return ("tensor", type(x), x.dtype, tuple(x.shape), x.device, x.requires_grad, x.layout)

    def _object(self, x: Any, kind: type) -> Any:
        if kind is types.FunctionType:
            return self._function(x)
        if kind is types.MethodType:
            return ("method", self.visit(x.__func__), self.visit(x.__self__))
        if isinstance(x, functools.partial):
            return ("partial", self.visit(x.func), self.visit(x.args), self.visit(x.keywords))
        if isinstance(x, nn.Module):
            return self._module(x, kind)
        if kind in (list, tuple, deque):
            self._keep(x, list(x))
            return (kind, *map(self.visit, x))
        if kind in (dict, OrderedDict):
            self._keep(x, dict(x))
            return (kind, *[(self.visit(k), self.visit(v)) for k, v in x.items()])
        if kind in (set, frozenset):
            self._keep(x, set(x))
            return (kind, tuple(sorted(map(repr, map(self.visit, x)))))
        if kind is PerRow:
            leaves = torch.utils._pytree.tree_leaves(x.value)
            return ("per row", *[(v.dtype, tuple(v.shape[1:]), v.requires_grad) for v in leaves])
        if isinstance(x, types.ModuleType):
            return self._python_module(x)
        if isinstance(x, type):
            return ("class", id(x), self._class(x))
        if isinstance(x, enum.Enum):
            return ("enum", id(x))
        if kind in (
            types.BuiltinFunctionType,
            types.WrapperDescriptorType,
            types.MethodDescriptorType,
            types.GetSetDescriptorType,
        ):
            owner = getattr(x, "__self__", None)
            return (
                "builtin",
                id(x)
                if owner is None or isinstance(owner, types.ModuleType | type)
                else (x.__name__, self.visit(owner)),
            )
        if kind in (staticmethod, classmethod):
            return (kind, self.visit(x.__func__))
        if kind is property:
            return (kind, *map(self.visit, (x.fget, x.fset)))
        return self._instance(x, kind)

    def _keep(self, x: Any, content: Any) -> None:
        if self.watch and not isinstance(x, tuple | frozenset):
            self.watch.container(x)
        if self.copy and not isinstance(x, tuple | frozenset):
            self.made.containers.append((x, content))

    # ---- code

    def _function(self, x: types.FunctionType) -> Any:
        code = x.__code__
        if self.watch:
            self.watch.function(x)
        if is_library(code.co_filename):
            return ("library", id(code), self._cells(x))
        self.codes.append(code)
        found = [("function", id(code)), self.visit(x.__defaults__), self.visit(x.__kwdefaults__), self._cells(x)]
        for name in globals_of(code):
            if self.watch:
                self.watch.names.append((x.__globals__, name))
            if name in x.__globals__:
                found.append((name, self._global(x.__globals__[name], code)))
            elif name in FORBIDDEN_BUILTINS and hasattr(builtins, name):
                raise CannotLower(f"f calls {name}() ({code.co_filename}, line {code.co_firstlineno})")
        if x.__dict__:
            found.append(self.visit(x.__dict__))
        elif self.watch:
            self.watch.container(x.__dict__)
        return tuple(found)

    def _cells(self, x: types.FunctionType) -> Any:
        made = []
        for cell in x.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                made.append("empty")
                if self.watch:
                    self.watch.unable()
                continue
            if self.copy and type(content) in (int, float, bool, str, type(None)):
                self.made.containers.append((cell, content))
            made.append(self.visit(content))
        return tuple(made)

    def _global(self, value: Any, code: types.CodeType) -> Any:
        if isinstance(value, types.ModuleType):
            name = value.__name__.split(".")[0]
            if name in FORBIDDEN_MODULES:
                raise CannotLower(f"f uses the module {name} ({code.co_filename}, line {code.co_firstlineno})")
            if name == "os" and {"environ", "getenv"} & set(names_of(code)):
                raise CannotLower(f"f reads os.environ ({code.co_filename}, line {code.co_firstlineno})")
            if name == "numpy" and "random" in names_of(code):
                raise CannotLower(f"f uses numpy.random ({code.co_filename}, line {code.co_firstlineno})")
            filename = getattr(value, "__file__", None) or "<frozen"
            if is_library(filename) or name in ("torch", "numpy", "math"):
                return ("module", id(value))
            if self.watch:
                self.watch.names += [(value.__dict__, n) for n in names_of(code)]
            used = [n for n in names_of(code) if n in value.__dict__]
            return ("module", id(value), *[(n, self._global(value.__dict__[n], code)) for n in used])
        return self.visit(value)

    def _python_module(self, x: types.ModuleType) -> Any:
        if x.__name__.split(".")[0] in FORBIDDEN_MODULES:
            raise CannotLower(f"f uses the module {x.__name__}")
        return ("module", id(x))

    def _class(self, kind: type) -> Any:
        """The functions and plain values of a user's class and its bases."""
        made = []
        if self.watch:
            self.watch.attributes.append((kind, "__mro__"))
        for base in kind.__mro__:
            if base is object or of_library(base):
                continue
            known = self.seen.get(id(base) + 1)  # the class's content, apart from the class as a value
            if known is not None:
                made.append(("again", known))
                continue
            self.seen[id(base) + 1] = len(self.seen)
            self.made.keep.append(base)
            if self.watch:
                self.watch.container(vars(base))
            for name, value in vars(base).items():
                if name in IGNORED or (name.startswith("__") and not isinstance(value, types.FunctionType)):
                    continue
                if not isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
                    made.append((name, self.visit(value)))
        return tuple(made)

    # ---- objects

    def _module(self, x: nn.Module, kind: type) -> Any:
        if isinstance(x, torch.jit.ScriptModule):
            raise CannotLower("a scripted module")
        state = x.__dict__
        if any(state.get(name) for name in HOOKS):
            raise CannotLower("a module with backward hooks")
        found: list[Any] = [id(kind), id(kind.forward), state["training"]]
        if not of_library(kind):
            found.append(self._class(kind))
        if self.watch:
            self.watch.attributes.append((kind, "forward"))
            self._watch_owner(x, kind, state)
        for name, value in state.items():
            if name not in MODULE_STATE:
                if name not in IGNORED:
                    found += (name, self._attribute(kind, state, name, value))
            elif value and name in HELD:
                self._keep(value, dict(value))
                for key, part in value.items():
                    found += (name, key, None if part is None else self.visit(part))
            elif value and name not in IGNORED and name != "training":
                found += (name, self.visit(value))
            elif self.watch and name not in IGNORED and hasattr(value, "__len__"):
                self.watch.container(value)
        if self.copy:
            self.made.containers.append((state, dict(state)))
        return ("nn", *found)

    def _watch_owner(self, x: Any, kind: type, state: dict[str, Any]) -> None:
        assert self.watch is not None
        self.watch.owner(x, [name for name, value in state.items() if type(value) is int and (kind, name) in _counters])

    def _attribute(self, kind: type, state: dict[str, Any], name: str, value: Any) -> Any:
        if type(value) is int:
            if (kind, name) in _counters:
                self.made.counters.append((state, name, _counters[kind, name]))
                return "counter"
            if self.copy:
                self.made.integers[id(state), name] = (kind, state, value)
        return self.visit(value)

    def _instance(self, x: Any, kind: type) -> Any:
        if self.watch and (kind.__module__ == "numpy" or isinstance(x, list | tuple | dict)):
            self.watch.unable()
        if kind.__module__ == "numpy":
            if kind.__name__ == "ndarray" and x.nbytes <= LARGEST_ARRAY and x.dtype.kind in "biufc":
                return ("array", str(x.dtype), x.shape, x.tobytes())
            if hasattr(x, "dtype") and getattr(x, "ndim", 1) == 0:
                return ("number", str(x.dtype), x.item())
        state = getattr(x, "__dict__", None)
        slots = [s for base in kind.__mro__ for s in getattr(base, "__slots__", ())]
        if state is None and not slots:
            raise CannotLower(f"f reaches a {kind.__module__}.{kind.__name__}, which cannot be watched for changes")
        if self.watch:
            self._watch_instance(x, kind, state, slots)
        found: list[Any] = [id(kind), self._class(kind)]
        if state is not None:
            found += [(name, self._attribute(kind, state, name, value)) for name, value in state.items()]
        for name in slots:
            if hasattr(x, name) and name not in ("__dict__", "__weakref__"):
                found.append((name, self.visit(getattr(x, name))))
        if isinstance(x, list | tuple | dict):
            found.append(tuple(map(self.visit, x.items() if isinstance(x, dict) else x)))
        if self.copy and state is not None:
            self.made.containers.append((state, dict(state)))
        return ("object", *found)

    def _watch_instance(self, x: Any, kind: type, state: dict[str, Any] | None, slots: list[str]) -> None:
        assert self.watch is not None
        if state is None or set(slots) - {"__dict__", "__weakref__"}:
            self.watch.unable()
        else:
            self._watch_owner(x, kind, state)


def snapshot(
    f: Any, args: Any, copy: bool = False, watch: Watch | None = None
) -> tuple[Snapshot, list[types.CodeType]]:
    """Walk everything that `f` and its arguments reach.

    Args:
        f: the vector field.
        args: further arguments.
        copy: keep contents, so that `restore` can undo what a call changed.
        watch: told of all that is read, so that it can be read again without a walk.

    Raises:
        CannotLower: something cannot be watched.
    """
    walk = Walk(copy, watch)
    walk.made.key = (walk.visit(f), walk.visit(args))
    return walk.made, walk.codes


def restore(before: Snapshot) -> None:
    """Undo what calls of f changed in the containers and closures of a snapshot made with `copy=True`."""
    for place, content in before.containers:
        if isinstance(place, types.CellType):
            place.cell_contents = content
        elif isinstance(place, dict):
            if len(place) != len(content) or any(place.get(k, place) is not v for k, v in content.items()):
                place.clear()
                place.update(content)
        elif isinstance(place, set):
            place.clear()
            place.update(content)
        elif isinstance(place, list | deque) and (
            len(place) != len(content) or any(a is not b for a, b in zip(place, content, strict=True))
        ):
            place.clear()
            place.extend(content)


def find_counters(before: Snapshot, codes: list[types.CodeType], calls: int) -> dict[tuple[type, str], int]:
    """Attributes that every one of `calls` calls raised by a constant and that no code reads otherwise."""
    found = {}
    for (_, name), (kind, state, value) in before.integers.items():
        now = state.get(name)
        if type(now) is int and now != value and (now - value) % calls == 0 and only_raised(codes, name):
            found[kind, name] = (now - value) // calls
    return found


def only_raised(codes: list[types.CodeType], name: str) -> bool:
    """Whether code uses an attribute in `x.name += number` alone."""
    for code in codes:
        inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
        if not only_raised(inner, name):
            return False
        steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
        for i, step in enumerate(steps):
            if step.argval != name or step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                continue
            after = steps[i + 1 : i + 5]
            if len(after) < 4 or not isinstance(after[0].argval, int) or after[1].opname != "BINARY_OP":
                return False
            if after[1].argrepr != "+=" or after[3].opname != "STORE_ATTR" or after[3].argval != name:
                return False
    return True


def remember_counters(found: dict[tuple[type, str], int]) -> None:
    """From now on leave these attributes out of every key."""
    _counters.update(found)


def unusual_surroundings() -> str:
    """Why no program can serve here, whatever f is; empty where one can."""
    if any(map(_in_module, GLOBAL_HOOKS)):
        return "global module hooks are installed"
    if _autocast("cpu"):
        return "autocast is on"
    if _compiling() or _functorch() is not None:
        return "a transformation (torch.compile, torch.func) surrounds the solve"
    if _forward_ad._current_level >= 0:
        return "forward-mode differentiation surrounds the solve"
    if _dispatch_modes() or _function_modes():
        return "a torch function or dispatch mode is active"
    return ""


_in_module = vars(nn.modules.module).__getitem__
_autocast, _compiling, _forward_ad = torch.is_autocast_enabled, torch.compiler.is_compiling, torch.autograd.forward_ad
_functorch = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
