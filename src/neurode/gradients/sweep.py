"""The way back over the steps of a solve, one on the tape at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurode.gradients.checkpoints import Checkpoints
from neurode.gradients.inputs import Replayed, refuse_unlisted
from neurode.gradients.pull import pull
from neurode.gradients.record import State
from neurode.gradients.replay import Replay
from neurode.gradients.stages import StageField, add


class Sweep:
    """The backward pass.

    Args:
        replay: takes steps again.
        states: those that were kept.
        y0: where the solve began.
        grads: of the values of the outcome, by name; None where nothing came.
        failed: True, or `(rows, 1)`, where the final state was replaced by NaN.
        by_stages: whether one evaluation of `f` is alive at a time, in place of one step.

    Attributes:
        gy: gradient of the state reached, all rows.
        gpast: gradients of the derivatives that the method remembers there, or of a coupling's second state.
        totals: gradients of the inputs.
        steps: how many were gone back.
    """

    def __init__(
        self,
        replay: Any,
        states: Checkpoints,
        y0: Tensor,
        grads: dict[Any, Tensor | None],
        failed: Any,
        by_stages: bool,
    ) -> None:
        self.replay: Replay = replay
        self.states, self.grads = states, grads
        self.inputs: Replayed = replay.inputs
        self.times = replay.times
        self.inputs.field.num_calls = 0
        self.totals = [torch.zeros_like(x) for x in self.inputs.wanted]
        self.stages = StageField(self.inputs, self.totals) if by_stages else None
        self.gy = _start(grads.get("y1"), failed, y0)
        self.gpast: Sequence[Tensor] = [torch.zeros_like(y0)] if replay.coupled else []
        self.steps = 0
        self._mask_gone()

    def _mask_gone(self) -> None:
        """Rows that failed have no part in any gradient: not what they reached, nor what plays them in interpolants."""
        gone = self.replay.gone
        if gone is None:
            return
        for name, grad in self.grads.items():
            if grad is not None and (name == "ys" or name[0] == "piece"):
                self.grads[name] = torch.where(gone[:, None], 0.0, grad)

    def run(self) -> None:
        """Go back through all steps."""
        with self.inputs.outer():
            kept = self.states.for_another_pass()
            self.states.reverse(len(self.replay.strides), self._advance, self._back)
            self.states.kept = kept
        if self.replay.coupled:
            self.gy = self.gy + self.gpast[0]  # both states of a coupling start alike
        ys = self.grads.get("ys")
        if ys is not None:
            self.gy = self.gy + self.replay.at_start(ys)

    @torch.no_grad()
    def _advance(self, n: int, state: State) -> State:
        self.inputs.take(self.replay.lanes(n)[0])
        return self.replay.advance(n, state, self.inputs.field)

    def _back(self, n: int, kept: State) -> None:
        """Hand the gradient on to the state before a step."""
        rows, moved = self.replay.lanes(n)
        if moved is not None and self.replay.gone is not None and not bool(moved.any()):
            return  # only rows that failed took this step
        wide = None if moved is None else moved.unsqueeze(1)
        full = (self.gy, *self.gpast)
        here = full if rows is None else [g.index_select(0, rows) for g in full]
        gy, *self.gpast = here if wide is None else [torch.where(wide, g, 0.0) for g in here]
        state = self.replay.state(n, kept)
        if not self.replay.coupled and self.replay.is_plain(n):
            way = self._by_stages if self.stages is not None and self.replay.stepper.pull_back else self._plain
            new = [way(n, rows, state.y, gy)]
        else:
            new = self._on_tape(n, rows, state, gy)
        if wide is not None:  # rows that did not take the step keep theirs
            stay = [g + torch.where(wide, 0.0, old) for g, old in zip(new, here, strict=False)]
            new = [*stay, *new[len(here) :]]
        if rows is not None:
            new = [old.index_copy(0, rows, g) for g, old in zip(new, full, strict=True)]
        self.gy, *self.gpast = new
        self.steps += 1

    def _by_stages(self, n: int, rows: Tensor | None, y: Tensor, gy: Tensor) -> Tensor:
        """One evaluation of `f` on the tape at a time."""
        assert self.stages is not None
        self.inputs.take(rows)
        field, stages = self.inputs.field, self.stages
        interval = self.replay.interval(n, field.time_dtype)
        return self.replay.stepper.pull_back(field, interval, y, gy, lambda t, z, g: stages.vjp(t, z, g)[1])

    def _plain(self, n: int, rows: Tensor | None, y: Tensor, gy: Tensor) -> Tensor:
        """A step that only the next state comes out of: `_on_tape` without what there is to look for."""
        y = leaf(y)
        with torch.enable_grad():
            self.inputs.take(rows)
            field: Any = self.stages or self.inputs.field
            y1 = self.replay.stepper.step(field, self.replay.interval(n, field.time_dtype), y).y1
        return _or_zero(self._pull([(y1, gy)], [y], [])[0], y)

    def _on_tape(self, n: int, rows: Tensor | None, state: State, gy: Tensor) -> list[Tensor]:
        """The whole step on the tape, and its derivative: the gradients of what it starts from."""
        state = State(leaf(state.y), tuple(map(leaf, state.past)))
        with torch.enable_grad():
            self.inputs.take(rows)
            taken = self.replay.take(n, state, self.stages or self.inputs.field)
        pairs = [(taken.after, gy), *zip(taken.carry, self.gpast, strict=False)]
        pairs += [(value, self._cotangent(name, place)) for value, name, place in taken.outputs]
        starts = [taken.y, *taken.past]
        return [_or_zero(grad, x) for grad, x in zip(self._pull(pairs, starts, taken.times), starts, strict=True)]

    def _cotangent(self, name: Any, place: Any) -> Tensor | None:
        """What came to a part of a value."""
        grad = self.times.catches.total if name == "catches" else self.grads[name]
        return None if grad is None else grad[place]

    def _pull(self, pairs: list[Any], starts: list[Tensor], times: list[Any]) -> Sequence[Tensor | None]:
        """Pull cotangents back: those of times and inputs go to their sums.

        Args:
            pairs: values with their cotangents, None where nothing came.
            starts: leaves.
            times: leaves for times, as in `Taken.times`.

        Returns:
            The gradients of `starts`.
        """
        pairs = [(v, c) for v, c in pairs if c is not None and v.requires_grad]
        if not pairs:
            return [None] * len(starts)
        leaves = [*starts, *dict.fromkeys(t for t, _, _ in times)]
        values = [v for v, _ in pairs]
        refuse_unlisted(values, self.inputs.listed.union(map(id, leaves)))
        grads = pull(values, [c for _, c in pairs], [*leaves, *self.inputs.wanted])
        add(self.totals, grads[len(leaves) :])
        if times:
            found = dict(zip(leaves, grads, strict=False))
            for t, name, place in times:
                if found[t] is not None:
                    getattr(self.times, name).add(place, found[t])
        return grads[: len(starts)]


def leaf(x: Tensor) -> Tensor:
    """The same numbers, as where a graph begins."""
    return x.detach().requires_grad_()


def _or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _start(grad: Tensor | None, failed: Any, y0: Tensor) -> Tensor:
    """The gradient of the end state, without what came to a NaN that stands for a failure."""
    if grad is None or failed is True:
        return torch.zeros_like(y0)
    return torch.where(failed, 0.0, grad) if isinstance(failed, Tensor) else grad
