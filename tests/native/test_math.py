"""Maximum errors of the native elementary functions, over the whole range: zeros, denormals, infinities, NaN included.

References are x87 long doubles for float64 (64 bits of mantissa) and mpmath where NumPy has no function. The bounds here are
those of native/README.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

from neurode.fused.native import library
from neurode.fused.program import ARITY, Micro

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="needs a long double wider than float64"),
]
ONE = np.longdouble(1)
DTYPES = {"float32": np.float32, "float64": np.float64}


def native(op: Micro, *operands: np.ndarray) -> np.ndarray:
    """Apply one operation to arrays of one dtype."""
    n = -(-len(operands[0]) // 64) * 64
    dtype = operands[0].dtype
    buffers = [aligned(n, dtype) for _ in range(4)]
    for buffer, operand in zip(buffers[1:], operands, strict=False):
        buffer[: len(operand)] = operand
    pointers = [ctypes.c_void_p(b.ctypes.data) for b in buffers]
    library().nd_micro(ctypes.c_int64(dtype == np.float64), ctypes.c_int64(op), *pointers, ctypes.c_int64(n))
    return buffers[0][: len(operands[0])].copy()


def aligned(n: int, dtype: Any) -> np.ndarray:
    """Zeros at an address that is a multiple of 64."""
    raw = np.zeros(n * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n * np.dtype(dtype).itemsize].view(dtype)


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of the exact result; infinite where a special value is missed."""
    info = np.finfo(got.dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), np.longdouble(info.tiny))))
    unit = np.exp2(exponent - info.nmant)
    error = np.abs(got.astype(np.longdouble) - exact) / unit
    rounded = exact.astype(got.dtype)
    special = ~np.isfinite(rounded) | ~np.isfinite(got)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    near_overflow = np.isinf(got) & (np.abs(exact) > np.longdouble(info.max) * (1 - 4 * info.eps))
    return np.where(special, np.where(same | near_overflow, 0.0, np.inf), error)


def points(dtype: Any, n: int = 60_000) -> np.ndarray:
    """Random bit patterns, numbers of every moderate size, and the special values."""
    rng = np.random.default_rng(0)
    integer = np.int32 if dtype is np.float32 else np.int64
    info = np.finfo(dtype)
    patterns = rng.integers(np.iinfo(integer).min, np.iinfo(integer).max, n, dtype=integer).view(dtype)
    sizes = rng.choice([1e-6, 0.01, 0.1, 1, 3, 10, 50, 100, 700], n)
    special = [0.0, np.inf, np.nan, info.tiny, info.smallest_subnormal, 7 * info.smallest_subnormal, info.max, 1.0, 0.5]
    special += [2.0, 88.7, 103.0, 709.7, 745.0, 710.4]
    signed = np.array([*special, *(-x for x in special)], dtype)
    return np.concatenate([patterns, (rng.normal(size=n) * sizes).astype(dtype), signed])


def sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, ONE / (ONE + e), e / (ONE + e))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0) + np.log1p(np.exp(-np.abs(x)))


def by_mpmath(f: Callable[[Any], Any], at_infinity: tuple[float, float]) -> Callable[[np.ndarray], np.ndarray]:
    """A reference from a function of mpmath, with its limits at minus and plus infinity."""

    def exact(x: np.ndarray) -> np.ndarray:
        out = np.empty(len(x), np.longdouble)
        with mpmath.workprec(90):
            for i, v in enumerate(x.tolist()):
                if np.isnan(v) or np.isinf(v):
                    out[i] = np.nan if np.isnan(v) else at_infinity[v > 0]
                else:
                    out[i] = np.longdouble(mpmath.nstr(f(mpmath.mpf(v)), 24))
        return out

    return exact


def gelu(v: Any) -> Any:
    return v * (1 + mpmath.erf(v / mpmath.sqrt(2))) / 2


# operation: (exact, maximum error in ulp of float32, of float64)
FUNCTIONS: dict[Micro, tuple[Callable[[np.ndarray], np.ndarray], float, float]] = {
    Micro.EXP: (np.exp, 1.1, 1.0),
    Micro.EXP2: (np.exp2, 0.51, 1.1),
    Micro.EXPM1: (np.expm1, 0.51, 1.8),
    Micro.LOG: (np.log, 0.51, 1.0),
    Micro.LOG2: (np.log2, 0.51, 2.0),
    Micro.LOG1P: (np.log1p, 0.51, 1.0),
    Micro.TANH: (np.tanh, 2.0, 2.0),
    Micro.SIGMOID: (sigmoid, 2.6, 2.6),
    Micro.SOFTPLUS: (softplus, 0.51, 2.0),
    Micro.SIN: (np.sin, 0.51, 1.0),
    Micro.COS: (np.cos, 0.51, 1.0),
    Micro.TAN: (np.tan, 0.51, 2.5),
    Micro.ATAN: (np.arctan, 0.51, 1.0),
    Micro.SINH: (np.sinh, 0.51, 2.5),
    Micro.COSH: (np.cosh, 0.51, 2.5),
    Micro.SQRT: (np.sqrt, 0.51, 0.51),
    Micro.RSQRT: (lambda x: ONE / np.sqrt(x), 1.6, 1.6),
    Micro.RECIPROCAL: (lambda x: ONE / x, 0.51, 0.51),
    Micro.SILU: (lambda x: np.where(np.isneginf(x), np.nan, x * sigmoid(x)), 3.5, 3.5),
}
EXACT = {
    Micro.FLOOR: np.floor, Micro.CEIL: np.ceil, Micro.TRUNC: np.trunc, Micro.ROUND: np.round, Micro.NEG: np.negative,
    Micro.ABS: np.abs, Micro.COPY: np.positive, Micro.SIGN: np.sign, Micro.NOT: lambda x: (x == 0).astype(x.dtype),
    Micro.RELU: lambda x: np.where(x <= 0, 0, x),
}  # fmt: skip
TRIGONOMETRIC = (Micro.SIN, Micro.COS, Micro.TAN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FUNCTIONS, ids=lambda op: op.name.lower())
def test_error(op: Micro, dtype: str) -> None:
    exact, single, double = FUNCTIONS[op]
    x = points(DTYPES[dtype])
    if op in TRIGONOMETRIC:  # the reference reduces angles beyond 2^63 wrongly
        x = x[~(np.abs(x) > 2.0**60) | np.isinf(x)]
    if op is Micro.SILU:  # x sigmoid(x), and the sigmoid loses bits where it is denormal, as in PyTorch
        x = x[~(x < (-87 if dtype == "float32" else -708)) | np.isinf(x)]
    error = ulps(native(op, x), exact(x.astype(np.longdouble)))
    worst = int(np.argmax(error))
    assert error[worst] <= (single if dtype == "float32" else double), (x[worst], error[worst])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "op", [Micro.TANH, Micro.SIN, Micro.EXPM1, Micro.ATAN, Micro.ERF, Micro.SINH], ids=lambda op: op.name.lower()
)
def test_odd_functions_keep_the_sign_of_zero_and_denormals(op: Micro, dtype: str) -> None:
    info = np.finfo(DTYPES[dtype])
    x = np.array([0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal], DTYPES[dtype])
    got = native(op, x)
    assert np.array_equal(got[:2], [0, 0])
    assert np.array_equal(np.signbit(got), np.signbit(x))
    if op is not Micro.ERF:  # whose slope at 0 is 1.13: the denormal rounds to itself too, but not by necessity
        assert np.array_equal(got[2:], x[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("f", "op", "limits"), [(mpmath.erf, Micro.ERF, (-1.0, 1.0))], ids=["erf"])
def test_error_against_mpmath(f: Any, op: Micro, limits: tuple[float, float], dtype: str) -> None:
    x = points(DTYPES[dtype], 1500)
    x = np.concatenate([x[~(np.abs(x) > 1e30) | np.isinf(x)], np.linspace(-7, 7, 3001).astype(DTYPES[dtype])])
    error = ulps(native(op, x), by_mpmath(f, limits)(x))
    assert error.max() <= (0.51 if dtype == "float32" else 1.0), x[error.argmax()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype: str) -> None:
    """Relative to its size above -1; below, where 1 + erf cancels as in PyTorch, absolute."""
    x = np.linspace(-9, 9, 3001).astype(DTYPES[dtype])
    got, exact = native(Micro.GELU, x), by_mpmath(gelu, (0.0, np.inf))(x)
    assert ulps(got, exact)[x > -1].max() <= (0.51 if dtype == "float32" else 4.0)
    assert np.abs(got - exact)[x <= -1].max() <= np.finfo(np.float64).eps * 9 + np.finfo(DTYPES[dtype]).eps * 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EXACT, ids=lambda op: op.name.lower())
def test_exact(op: Micro, dtype: str) -> None:
    x = points(DTYPES[dtype])
    assert np.array_equal(native(op, x), EXACT[op](x), equal_nan=True)


def test_tanh_of_every_float_near_its_worst() -> None:
    """Every float32 in [2^-9, 16), where the bound of 2 ulp is nearly met: 109 million numbers, a sixteenth of them here."""
    worst = 0.0
    for exponent in range(-9, 4):
        bits = np.arange(0, 2**23, 16, dtype=np.int32) | np.int32((exponent + 127) << 23)
        x = bits.view(np.float32)
        worst = max(
            worst, float(ulps(native(Micro.TANH, x), np.tanh(x.astype(np.float64)).astype(np.longdouble)).max())
        )
    assert worst <= 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_pow(dtype: str) -> None:
    rng = np.random.default_rng(1)
    a = np.abs(rng.normal(size=20_000) * rng.choice([0.1, 1, 10, 1000], 20_000)).astype(DTYPES[dtype])
    b = (rng.normal(size=20_000) * rng.choice([1, 5], 20_000)).astype(DTYPES[dtype])
    exact = a.astype(np.longdouble) ** b.astype(np.longdouble)
    assert ulps(native(Micro.POW, a, b), exact).max() <= (0.51 if dtype == "float32" else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "f"),
    [
        (Micro.POW, np.power), (Micro.ATAN2, np.arctan2), (Micro.MAX, np.maximum), (Micro.MIN, np.minimum),
        (Micro.ADD, np.add), (Micro.DIV, np.divide), (Micro.LT, np.less), (Micro.LE, np.less_equal), (Micro.GT, np.greater),
        (Micro.GE, np.greater_equal), (Micro.EQ, np.equal), (Micro.NE, np.not_equal), (Micro.AND, np.logical_and),
        (Micro.OR, np.logical_or),
    ],
    ids=lambda v: v.name.lower() if isinstance(v, Micro) else "",
)  # fmt: skip
def test_special_values_of_two_operands(op: Micro, f: Any, dtype: str) -> None:
    special = np.array([0.0, -0.0, 1, -1, 2, -2, 0.5, -0.5, np.inf, -np.inf, np.nan, 3, -3], DTYPES[dtype])
    a, b = (x.ravel() for x in np.meshgrid(special, special))
    got, wanted = native(op, a, b), f(a, b).astype(DTYPES[dtype])
    assert np.allclose(got, wanted, rtol=4 * np.finfo(got.dtype).eps, atol=0, equal_nan=True)


def test_every_operation_has_a_place_here() -> None:
    """An operation that is added to the set gets a test."""
    tested = {
        *FUNCTIONS,
        *EXACT,
        Micro.ERF,
        Micro.GELU,
        Micro.POW,
        Micro.ATAN2,
        Micro.MAX,
        Micro.MIN,
        Micro.ADD,
        Micro.DIV,
    }
    tested |= {Micro.LT, Micro.LE, Micro.GT, Micro.GE, Micro.EQ, Micro.NE, Micro.AND, Micro.OR}
    arithmetic = {
        Micro.SUB,
        Micro.MUL,
        Micro.FMA,
        Micro.FNMA,
        Micro.WHERE,
        Micro.DTANH,
        Micro.DSIGMOID,
        Micro.DRELU,
        Micro.MOD,
    }
    assert tested | arithmetic == set(Micro)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "f"),
    [
        (Micro.SUB, lambda a, b, c: a - b), (Micro.MUL, lambda a, b, c: a * b), (Micro.FMA, lambda a, b, c: a * b + c),
        (Micro.FNMA, lambda a, b, c: c - a * b), (Micro.WHERE, lambda a, b, c: np.where(a != 0, b, c)),
        (Micro.DTANH, lambda a, b, c: a * (1 - b * b)), (Micro.DSIGMOID, lambda a, b, c: a * b * (1 - b)),
        (Micro.DRELU, lambda a, b, c: np.where(b <= c, 0, a)), (Micro.MOD, lambda a, b, c: np.mod(a, b)),
    ],
    ids=lambda v: v.name.lower() if isinstance(v, Micro) else "",
)  # fmt: skip
def test_arithmetic(op: Micro, f: Any, dtype: str) -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(-3, 4, 4096) + rng.choice([0, 0.25], 4096) for _ in range(3))
    b = np.where((op is Micro.MOD) & (b == 0), 1.5, b)
    got = native(op, *(x.astype(DTYPES[dtype]) for x in (a, b, c)[: ARITY[op]]))
    assert np.array_equal(got, f(a, b, c))
