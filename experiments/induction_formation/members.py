"""Members of an induction study, and the program that trains them together.

Source: Singh et al., "What needs to go right for an induction head?" (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.induction_formation.network import Output, Shape, forward, losses, rotary, stack_initial
from experiments.induction_formation.stacked import stack
from experiments.induction_formation.task import Batch, Task, draw, source
from experiments.induction_formation.treatments import Held, Treatment
from hooks import InputsError, ShapeError
from interp.training.ensemble import Params, Program


@dataclass(frozen=True)
class Member:
    """One run: where it starts, what it sees, what is held.

    Attributes:
        seed: of its parameters, and of its batches where `batches` gives no other.
        treatment: what it holds at every step; a `Treatment`, or any plan that `stacked.stack` can read.
        task: its classes and labels.
        batches: seed of its batches, so that initialisation and data can vary apart.
        table: which of the program's tables its exemplars are of.
    """

    seed: int = 0
    treatment: Held = field(default_factory=Treatment)
    task: Task = field(default_factory=Task)
    batches: int | None = None
    table: int = 0

    @property
    def data_seed(self) -> int:
        """The seed that its batches are drawn by."""
        return self.seed if self.batches is None else self.batches


@dataclass(frozen=True)
class Graft:
    """Layers taken from another checkpoint and not trained.

    Attributes:
        params: the other checkpoint's parameters, as `Ensemble.member` returns them.
        first: whether the embeddings and the first layer are taken, or the last layer and the read-out.
    """

    params: Params
    first: bool


LAST = ("q1", "kv1", "out1", "ln1", "ln_final", "read")


def program(
    table: Tensor,
    *,
    shape: Shape | None = None,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    grafts: dict[int, Graft] | None = None,
    labels: int = 0,
) -> Callable[[Sequence[Member]], Program]:
    """What `Ensemble` needs to train members of the induction study.

    Args:
        table: exemplars [n_exemplars, d_input], training classes first (see `Task`); or several tables of them,
            [tables, n_exemplars, d_input], of which each member names its own.
        shape: sizes of the network; by default the paper's, with the table's d_input.
        batch: sequences a step B.
        dtype: of parameters and arithmetic.
        grafts: by index of the member.
        labels: least number of rows for labels, so that parts of an ensemble have the whole's shapes.

    Raises:
        InputsError: no sequence in a batch.
        ShapeError: when it builds, a graft of no member, or of another shape.
        PlanError: when it builds, a treatment that the stacked program cannot express.
    """
    if batch < 1:
        raise InputsError(f"a batch has at least one sequence, got {batch}")
    shape = shape or Shape(d_input=table.shape[-1])

    def build(members: Sequence[Member]) -> Program:
        params = initial_params(members, shape, dtype, labels)
        constants = constants_of(members, table, shape, dtype, labels=labels)
        for index, graft in (grafts or {}).items():
            if index not in range(len(members)):
                raise ShapeError(f"a graft is for member {index}, and they are 0 .. {len(members) - 1}")
            for name, value in params.items():
                if (name.split(".")[0] not in LAST) == graft.first:
                    given = list(graft.params[name].shape) if name in graft.params else "nothing"
                    if given != list(value[index].shape):
                        raise ShapeError(f"graft: {name} is {list(value[index].shape)} here, the other has {given}")
                    value[index] = graft.params[name].to(dtype)
                    held = constants.setdefault(f"trained.{name}", torch.ones(len(members), dtype=torch.bool))
                    held[index] = False

        def loss(params: Params, constants: dict[str, Tensor], step: Tensor) -> Tensor:
            trained = {
                name: torch.where(_like(constants[f"trained.{name}"], value), value, value.detach())
                if f"trained.{name}" in constants
                else value
                for name, value in params.items()
            }
            drawn = draw(constants, step, batch)
            return losses(forward(trained, drawn, constants, shape).logits, drawn.answer).mean(1)

        return Program(params, constants, loss)

    return build


def initial_params(
    members: Sequence[Member], shape: Shape, dtype: torch.dtype = torch.float32, labels: int = 0
) -> Params:
    """Every member's parameters before training [M, ...], with at least so many rows for labels."""
    return stack_initial(shape, [m.task.n_labels for m in members], [m.seed for m in members], dtype, labels)


def constants_of(
    members: Sequence[Member],
    table: Tensor,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    treatments: Sequence[Held] | None = None,
    split: str = "train",
    labels: int = 0,
) -> dict[str, Tensor]:
    """Every constant that `network.forward` and `task.draw` read.

    Args:
        members: whose tasks and seeds they are.
        table: exemplars [n_exemplars, d_input], or several tables of them [tables, n_exemplars, d_input].
        shape: sizes of the network.
        dtype: of the arithmetic.
        treatments: one a member, instead of the members' own: a progress measure evaluates under one that was not held.
        split: which sequences are drawn, see `task.source`.
        labels: least number of rows for labels.

    Raises:
        ShapeError: a table without a row for every class, a member of a table that there is not, or treatments of
            another number than the members.
        PlanError: a treatment that the stacked program cannot express.
    """
    if treatments is not None and len(treatments) != len(members):
        raise ShapeError(f"{len(treatments)} treatments for {len(members)} members: one for each")
    tables = table if table.ndim == 3 else table[None]
    if tables.shape[1:] != (members[0].task.n_exemplars, shape.d_input):
        raise ShapeError(
            f"exemplars must be {[members[0].task.n_exemplars, shape.d_input]} (training classes, then held-out ones);"
            f" got {list(table.shape)}"
        )
    if absent := sorted({m.table for m in members} - set(range(len(tables)))):
        raise ShapeError(f"members name tables of exemplars {absent}; there are {len(tables)}, counted from 0")
    most = max(labels, *(member.task.n_labels for member in members))
    drawn = tables.shape[1] if split == "classes" else max(member.task.n_classes for member in members)
    missing = torch.tensor([[float(i >= m.task.n_labels) for i in range(most)] for m in members], dtype=dtype)
    return {
        "exemplars": tables[:, :drawn].flatten(0, 1).to(dtype),
        **({} if len(tables) == 1 else {"first_row": torch.tensor([m.table * drawn for m in members])}),
        "rotary": rotary(shape, dtype),
        "unused": torch.where(missing > 0, -torch.inf, 0.0)[..., None].to(dtype),
        **source([member.task for member in members], [member.data_seed for member in members], split),
        **stack([m.treatment for m in members] if treatments is None else treatments, shape.n_heads, dtype),
    }


def evaluate(
    params: Params, constants: dict[str, Tensor], shape: Shape, batch: Batch
) -> tuple[dict[str, Tensor], Output]:
    """Losses and accuracies of every member, and the forward pass they come from.

    Args:
        params: [M, ...].
        constants: of `constants_of`.
        shape: sizes of the network.
        batch: classes and labels [M, 2, B], target [M, B].

    Returns:
        ``loss``, ``accuracy``, ``probability`` of the answer, and ``context_loss``, ``context_accuracy`` among the two
        labels in context, each [M]; and the output.
    """
    with torch.no_grad():
        output = forward(params, batch, constants, shape)
    logits = output.logits
    per_row = losses(logits, batch.answer)
    right = torch.gather(logits, 1, batch.answer[:, None])[:, 0]
    wrong_label = torch.where(batch.target.bool(), batch.labels[:, 0], batch.labels[:, 1])
    wrong = torch.gather(logits, 1, wrong_label[:, None])[:, 0]
    found: dict[str, Any] = {
        "loss": per_row,
        "accuracy": (logits.argmax(1) == batch.answer).to(logits.dtype),
        "probability": (-per_row).exp(),
        "context_loss": torch.nn.functional.softplus(wrong - right),
        "context_accuracy": (right > wrong).to(logits.dtype),
    }
    return {name: value.mean(1) for name, value in found.items()}, output


def strengths(output: Output, batch: Batch) -> Tensor:
    """Induction strength of each last-layer head [M, H]: attention to the right label token minus to the wrong one."""
    difference = output.pattern[:, :, 1] - output.pattern[:, :, 3]
    return torch.where(batch.target.bool()[:, None], -difference, difference).mean(2)


def previous_token_strengths(output: Output) -> Tensor:
    """Attention of each first-layer head [M, H] from the label tokens to the exemplars before them, averaged."""
    return (output.first_pattern[:, :, 1, 0] + output.first_pattern[:, :, 3, 2]).mean(2) / 2


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (value.ndim - 1))
