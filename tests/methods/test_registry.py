"""The names of the methods, and what is said about them."""

import re

import pytest

from neurode.methods import METHODS, format_table, get, table

EXPECTED = {
    *("euler", "midpoint", "heun", "ralston", "heun3", "ssprk3", "rk4", "rk4_38"),
    *("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8", "dop853"),
    *("verner6", "verner7", "verner9", "explicit_adams", "implicit_adams", "leapfrog", "yoshida4"),
}


def test_all_methods_are_there_under_their_own_names():
    assert set(METHODS) >= EXPECTED
    for name, method in METHODS.items():
        assert method.name == name
        assert get(name) is method
        assert get(method) is method


@pytest.mark.parametrize("name", METHODS)
def test_sources_name_an_author_and_a_year(name):
    assert re.search(r"[A-Z][a-z]+ \((17|18|19|20)\d\d\)", METHODS[name].source)


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_consistent(name):
    method = METHODS[name]
    assert method.num_evaluations_per_step >= 1
    assert 1 <= method.dense_order <= method.order
    assert method.adaptive == (method.order_error is not None)


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown method 'dopri55'\. Did you mean 'dopri5'.*verner9"):
        get("dopri55")


def test_names_are_case_sensitive_and_the_error_helps():
    with pytest.raises(ValueError, match="Did you mean 'rk4'"):
        get("Rk4")


@pytest.mark.parametrize("wrong", [4, None, object(), ["rk4"]])
def test_what_is_no_method_is_refused(wrong):
    with pytest.raises(ValueError, match="give a name such as 'dopri5'"):
        get(wrong)


def test_table_holds_the_facts():
    rows = {row["name"]: row for row in table()}
    assert list(rows) == list(METHODS)
    dopri5 = rows["dopri5"]
    assert dopri5["order"] == 5
    assert dopri5["error order"] == 4
    assert dopri5["stages"] == 7
    assert dopri5["evaluations per step"] == 6
    assert dopri5["FSAL"] is True
    assert dopri5["dense order"] == 4
    assert dopri5["adaptive"] is True
    assert "Prince" in dopri5["source"]


def test_printed_table_has_a_line_a_method():
    head, *lines = format_table().splitlines()
    assert head.split()[:3] == ["name", "kind", "order"]
    assert [line.split()[0] for line in lines] == list(METHODS)
    rk4 = next(line.split() for line in lines if line.startswith("rk4 "))
    assert rk4 == ["rk4", "explicit", "4", "-", "4", "4", "no", "3", "fixed"]
