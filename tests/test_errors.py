"""Bad input, each with an error of its own that says what was given and what to type."""

from __future__ import annotations

import pytest
import torch

import neurode

GROW = lambda t, y: y
Y = torch.ones(3, dtype=torch.float64)


def late_nan(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(t > 0.5, torch.nan, -y)


# what is wrong: (arguments of solve, what differs; the exception; words that the message must hold)
TABLE = {
    "t_span of one number": (dict(t_span=1.0), neurode.InputError, ["t_span is 1.0", "(0.0, 1.0)"]),
    "t_span of one element": (dict(t_span=(1.0,)), neurode.InputError, ["t_span is (1.0,)"]),
    "t_span of many times": (dict(t_span=torch.linspace(0, 1, 10)), neurode.InputError, ["10 times", "t_eval=t"]),
    "t_span with nan": (dict(t_span=(0.0, float("nan"))), neurode.InputError, ["t1 is nan", "finite"]),
    "t_span of text": (dict(t_span=(0.0, "end")), neurode.InputError, ["t1 is 'end'"]),
    "t1 of three rows": (dict(t_span=(0.0, torch.ones(3))), neurode.InputError, ["t1 has shape (3,)", "batch_dim=0"]),
    "nan state": (dict(y0=torch.tensor([1.0, float("nan")])), neurode.InputError, ["y0 holds NaN"]),
    "nan in rows": (
        dict(y0=torch.tensor([[1.0], [float("nan")]]), batch_dim=0), neurode.InputError, ["y0 holds NaN", "rows 1"],
    ),
    "empty state": (dict(y0=torch.ones(0)), neurode.InputError, ["no elements", "(0,)"]),
    "state without leaves": (dict(y0={}), neurode.InputError, ["without tensors"]),
    "integer state": (dict(y0=torch.ones(3, dtype=torch.int64)), neurode.InputError, ["torch.int64", "y0.to("]),
    "text as a state": (dict(y0="one"), neurode.InputError, ["str"]),
    "leaves of two dtypes": (
        dict(y0=(Y, Y.float())), neurode.InputError, ["torch.float32", "torch.float64"],
    ),
    "rows that differ": (dict(y0=(torch.ones(2, 1), torch.ones(3, 1)), batch_dim=0), neurode.InputError, ["(2, 1), (3, 1)"]),
    "f returns another shape": (dict(f=lambda t, y: y[None]), neurode.FieldError, ["(1, 3)", "(3,)"]),
    "f returns another dtype": (
        dict(f=lambda t, y: y.double(), y0=Y.float()), neurode.FieldError, ["torch.float64", "torch.float32"],
    ),
    "f returns integers": (dict(f=lambda t, y: y.long()), neurode.FieldError, ["torch.int64", "Return dy.to(torch.float64)"]),
    "f returns another device": (dict(f=lambda t, y: y.to("meta")), neurode.FieldError, ["meta", "cpu"]),
    "f returns a number": (dict(f=lambda t, y: 1.0), neurode.FieldError, ["float", "tensor of shape (3,)"]),
    "f returns another structure": (dict(f=lambda t, y: (y,)), neurode.FieldError, ["tuple"]),
    "f is no function": (dict(f=3), neurode.InputError, ["f is of type int"]),
    "unknown method": (dict(method="dopri55"), neurode.UnknownOptionError, ["'dopri55'", "Did you mean 'dopri5'?"]),
    "method of another kind": (dict(method=5), neurode.InputError, ["'dopri5'"]),
    "steps with an adaptive method": (dict(steps=20), neurode.InputError, ["steps=20", "'dopri5'", "rk4"]),
    "fixed method without steps": (dict(method="rk4"), neurode.InputError, ["exactly one of", "steps=20"]),
    "fixed method with two grids": (dict(method="rk4", steps=2, step_size=0.1), neurode.InputError, ["steps and step_size"]),
    "no steps": (dict(method="rk4", steps=0), neurode.InputError, ["steps=0"]),
    "half a step": (dict(method="rk4", steps=2.5), neurode.InputError, ["steps=2.5"]),
    "negative step size": (dict(method="rk4", step_size=-0.1), neurode.InputError, ["step_size=-0.1", "positive"]),
    "grid that does not end at t1": (dict(method="rk4", grid=torch.linspace(0, 2, 5)), neurode.InputError, ["grid runs", "2"]),
    "grid that turns back": (dict(method="rk4", grid=[0.0, 0.7, 0.4, 1.0]), neurode.InputError, ["strictly"]),
    "negative tolerance": (dict(rtol=-1e-3), neurode.InputError, ["rtol is -0.001", "negative"]),
    "infinite tolerance": (dict(atol=float("inf")), neurode.InputError, ["atol is inf"]),
    "tolerance below the dtype": (dict(y0=Y.float(), rtol=1e-9), neurode.InputError, ["rtol=1e-09", "y0.double()"]),
    "tolerance of a shape that could mean two": (
        dict(y0=torch.ones(3, 3), batch_dim=0, rtol=torch.full((3,), 1e-3)), neurode.InputError, ["rtol.reshape(-1, 1)"],
    ),
    "tolerance that does not broadcast": (dict(rtol=torch.full((2,), 1e-3)), neurode.InputError, ["(2,)", "(3,)"]),
    "no tolerance at all": (dict(rtol=0, atol=0.0), neurode.InputError, ["both 0", "rtol=1e-6"]),
    "f without time": (dict(f=lambda y: -y), neurode.InputError, ["f(t, y)", "takes (y)", "lambda t, y: f(y)"]),
    "f without args": (dict(args=(2.0,)), neurode.InputError, ["f(t, y, args[0])", "takes (t, y)"]),
    "f that wants args": (dict(f=lambda t, y, k: k * y), neurode.InputError, ["takes (t, y, k)", "args=(...)"]),
    "unknown keyword": (dict(tolerance=1e-3), neurode.UnknownOptionError, ["'tolerance'", "Did you mean 'rtol'?"]),
    "keyword of another library": (dict(saveat=[1.0]), neurode.UnknownOptionError, ["Did you mean 't_eval'?"]),
    "keyword with a slip": (dict(max_step_=1), neurode.UnknownOptionError, ["Did you mean 'max_step"]),
    "t_eval outside": (dict(t_eval=[0.5, 1.5]), neurode.InputError, ["1.5", "(0, 1)"]),
    "t_eval unsorted": (dict(t_eval=[0.5, 0.2]), neurode.InputError, ["not sorted"]),
    "t_eval of a word": (dict(t_eval="all"), neurode.InputError, ["'all'", "'steps'"]),
    "t_eval of two dimensions": (dict(t_eval=torch.zeros(2, 2)), neurode.InputError, ["(2, 2)", "(time,)"]),
    "batch_dim of 1": (dict(batch_dim=1), neurode.InputError, ["batch_dim=1"]),
    "unknown engine": (dict(engine="warp"), neurode.InputError, ["engine='warp'"]),
    "unknown gradient": (dict(gradient="autogrd"), neurode.UnknownOptionError, ["Did you mean 'autograd'?"]),
    "unknown norm": (dict(norm="l7"), neurode.InputError, ["norm='l7'"]),
    "unknown on_failure": (dict(on_failure="ignore"), neurode.InputError, ["on_failure='ignore'"]),
    "args that is no tuple": (dict(args=torch.ones(1)), neurode.InputError, ["args=(value,)"]),
    "per_row without rows": (
        dict(args=(neurode.per_row(Y),), f=lambda t, y, k: y), neurode.InputError, ["needs batch_dim=0"],
    ),
    "per_row of other rows": (
        dict(args=(neurode.per_row(torch.ones(5)),), f=lambda t, y, k: y, y0=torch.ones(3, 1), batch_dim=0),
        neurode.InputError, ["3 rows", "(5,)"],
    ),
    "an event that is no Event": (dict(events=[lambda t, y: y[0]]), neurode.InputError, ["neurode.Event"]),
    "too many steps": (dict(max_steps=3, rtol=1e-12, atol=1e-12), neurode.SolveError, ["max_steps", "t = "]),
    "nan from f in the middle": (dict(f=late_nan), neurode.SolveError, ["NaN", "t = 0.5"]),
    "nan from f in the middle of a grid": (
        dict(f=late_nan, method="rk4", steps=10), neurode.SolveError, ["by t = 1, the end of the fixed grid", "NaN"],
    ),
    "nan from f in the middle of a row": (
        dict(f=late_nan, y0=torch.ones(4, 1), batch_dim=0, t_span=(0.0, torch.tensor([0.2, 1.0, 0.3, 1.0]))),
        neurode.SolveError, ["2 of 4 rows", "rows 1, 3", "t = 0.5", "on_failure='nan'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_has_its_own_error(case: str) -> None:
    changes, error, words = TABLE[case]
    arguments = {"f": GROW, "y0": Y, "t_span": (0.0, 1.0), "method": "dopri5", **changes}
    with pytest.raises(error) as raised:
        neurode.solve(arguments.pop("f"), arguments.pop("y0"), arguments.pop("t_span"), **arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_messages_differ() -> None:
    """No two kinds of mistake share a message."""
    seen = {}
    for case, (changes, error, _) in TABLE.items():
        arguments = {"f": GROW, "y0": Y, "t_span": (0.0, 1.0), "method": "dopri5", **changes}
        with pytest.raises(error) as raised:
            neurode.solve(arguments.pop("f"), arguments.pop("y0"), arguments.pop("t_span"), **arguments)
        assert seen.setdefault(str(raised.value), case) == case


def test_families() -> None:
    """Users catch them as the Python errors that they are."""
    assert issubclass(neurode.InputError, ValueError)
    assert issubclass(neurode.FieldError, ValueError)
    assert issubclass(neurode.UnknownOptionError, TypeError)
    assert issubclass(neurode.SolveError, RuntimeError)


def test_failure_carries_the_solution() -> None:
    with pytest.raises(neurode.SolveError) as raised:
        neurode.solve(late_nan, Y, (0.0, 1.0), method="dopri5", t_eval=[0.0, 0.25, 0.75])
    solution = raised.value.solution
    assert solution.status is neurode.Status.NON_FINITE
    assert torch.isfinite(solution.ys[:2]).all() and torch.isnan(solution.ys[2]).all()
    assert torch.isnan(solution.y1).all()
    assert abs(float(solution.t1) - 0.5) < 1e-6


def test_nan_on_request() -> None:
    solution = neurode.solve(late_nan, Y, (0.0, 1.0), method="dopri5", on_failure="nan")
    assert not solution.success and torch.isnan(solution.y1).all()


FIXED, CHOSEN = dict(method="rk4", steps=3), dict(method="dopri5")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(FIXED, max_step=0.1), "max_step= is for methods that choose their steps"),
        (dict(FIXED, first_step=0.1), "first_step= is for"),
        (dict(FIXED, controller=neurode.PID()), "controller= is for"),
        (dict(FIXED, step_at=[0.5]), "step_at= is for"),
        (dict(FIXED, jump_at=[0.5]), "no point of the grid"),
        (dict(CHOSEN, max_step=0.0), "must be a positive length"),
        (dict(CHOSEN, first_step=-0.1), "must be a positive length"),
        (dict(CHOSEN, first_step=float("nan")), "must be a positive length"),
        (dict(CHOSEN, min_step="a"), "must be a length of time"),
        (dict(CHOSEN, min_step=1.0, max_step=0.5), "is above max_step"),
        (dict(CHOSEN, step_at=[float("nan")]), "must be finite"),
        (dict(CHOSEN, controller="pi"), r"neurode\.PID\.pi\(\)"),
        (dict(CHOSEN, events=None), r"events=\[neurode\.Event"),
        (dict(CHOSEN, events=[neurode.Event(lambda t, y: y[0])], max_events=0), "max_events=0"),
        (dict(CHOSEN, norm=lambda y: y), r"norm returned the shape \(2,\)"),
        (dict(CHOSEN, save="mean"), "save is of type str"),
        (dict(CHOSEN, save=lambda t, y: None), "returned a NoneType"),
        (dict(CHOSEN, t_eval=[0.1, float("nan")]), "NaN or infinite times"),
        (dict(method="rk4", step_size="a"), "must be a positive number"),
    ],
)
def test_options_that_can_do_nothing_say_so(options, says):
    with pytest.raises(neurode.InputError, match=says):
        neurode.solve(lambda t, y: -y, torch.ones(2), (0, 1), **options)


def test_a_norm_of_rows_returns_one_value_a_row():
    with pytest.raises(neurode.InputError, match=r"one value a row, of shape \(3,\)"):
        neurode.solve(
            lambda t, y: -y, torch.ones(3, 2), (0, 1), batch_dim=0, method="dopri5", norm=lambda y: y.abs().max()
        )


@pytest.mark.parametrize("options", [FIXED, CHOSEN])
def test_an_f_that_changes_y_is_refused_and_a_sparse_state_too(options):
    y0 = torch.ones(2)
    with pytest.raises(neurode.FieldError, match="changed y in place"):
        neurode.solve(lambda t, y: y.mul_(-1), y0, (0, 1), **options)
    assert torch.equal(y0, torch.ones(2))
    with pytest.raises(neurode.FieldError, match="changed y in place"):
        neurode.solve(lambda t, y: (y[0].neg_(), y[1]), (torch.ones(2), torch.ones(2)), (0, 1), **options)
    with pytest.raises(neurode.InputError, match="to_dense"):
        neurode.solve(lambda t, y: -y, torch.eye(2).to_sparse(), (0, 1), **options)


def test_numpy_integers_and_the_meta_device():
    import numpy as np

    assert (
        neurode.solve(lambda t, y: -y, torch.ones(2), (0, 1), method="rk4", steps=np.int64(3)).stats.num_accepted == 3
    )
    shape = neurode.solve(lambda t, y: -y, torch.ones(4, 2, device="meta"), (0, 1), **FIXED).y1
    assert shape.is_meta and shape.shape == (4, 2)
