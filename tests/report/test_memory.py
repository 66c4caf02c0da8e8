"""Measured memory: what is counted, once, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurode.report.memory import peak_memory

KIB = 1024


def _floats(kib: int) -> Tensor:
    return torch.zeros(kib * KIB // 4, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


def test_storages_count_once_and_views_not_at_all() -> None:
    def run() -> list[Tensor]:
        x = _floats(8)
        views = [x[1:], x.view(2, -1), x.reshape(4, -1).T]
        return [views[0].sum()]

    assert peak_memory(run) == 8 * KIB  # the sum of 4 bytes is an output


def test_what_is_gone_does_not_count() -> None:
    def run() -> list[Tensor]:
        for _ in range(10):
            x = _floats(4)
            del x
        return []

    assert peak_memory(run) == 4 * KIB


def test_address_used_again_is_a_new_storage() -> None:
    def run() -> list[Tensor]:
        first = _floats(4)
        del first
        second, third = _floats(4), _floats(4)
        return [(second[0] + third[0]).detach()]

    assert 8 * KIB <= peak_memory(run) < 8 * KIB + 64


def test_outputs_parameters_and_their_gradients_do_not_count() -> None:
    weight = _floats(16).requires_grad_()

    def run() -> list[Tensor]:
        out = weight * 2
        out.backward(torch.ones(()).expand_as(out))
        return [out]

    assert peak_memory(run, excluding=[weight]) <= 16 * KIB + 64  # at most one temporary beside the results


def test_sees_what_a_custom_backward_keeps() -> None:
    """Saved-tensor hooks do not: the tensors hang at the context, not in `save_for_backward`."""

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = [x + k for k in range(5)]
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            scratch = [kept * grad for kept in ctx.kept]
            return scratch[0]

    start = _floats(4).requires_grad_()

    def run() -> list[Tensor]:
        y = Keeps.apply(start)
        y.backward()
        return [y]

    # Five kept, five made on the way back; of the latter the first becomes the gradient, which is a result.
    assert 9 * KIB * 4 <= peak_memory(run, excluding=[start]) <= 10 * KIB * 4 + 64


def test_tape_grows_and_a_loop_without_tape_does_not() -> None:
    start = _floats(4).requires_grad_()

    def deep(num: int) -> int:
        def run() -> list[Tensor]:
            y = start
            for _ in range(num):
                y = y.sin()
            loss = y.sum()
            loss.backward()
            return [loss]

        start.grad = None
        return peak_memory(run, excluding=[start])

    assert deep(40) - deep(20) == 20 * 4 * KIB
    with torch.no_grad():

        def run() -> list[Tensor]:
            y = start.detach()
            for _ in range(40):
                y = y.sin()
            return [y]

        assert peak_memory(run, excluding=[start]) <= 2 * 4 * KIB
