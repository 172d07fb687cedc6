"""Many training runs as one batched program: conditions and seeds are members, stacked on a leading axis.

Members share a program and differ in data alone: parameters, what is held, batches, learning rates. Nothing mixes
members, so each trains as it would alone, and Adam on stacked parameters is as many separate Adams.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hooks import Inputs, Members, ModelError, PlanError, ResultError, ShapeError, pair, wrap, write_all
from interp.training.replay import Replayed

SCHEMA, VERSION = "interp.ensemble", 1
Params = dict[str, Tensor]
MemberT = TypeVar("MemberT")


@dataclass(frozen=True, eq=False)
class Program:
    """What an ensemble trains.

    Attributes:
        params: trained tensors [members, ...].
        constants: tensors that the loss reads besides: what members share, and their data [members, ...].
        loss: ``loss(params, constants, step)``, a pure function that returns one loss a member [members]; `step` is an
            int64 tensor [], and batches are functions of it. A member's loss may depend on its own entries only.
    """

    params: Params
    constants: dict[str, Tensor]
    loss: Callable[[Params, dict[str, Tensor], Tensor], Tensor]


class Ensemble(Generic[MemberT]):
    """Train all members together; each as it would train alone, to float tolerance.

    Args:
        build: from the members to their `Program`.
        members: what differs: what is held, seeds, sizes; at least one.
        rate: Adam's learning rate, one for all or one a member.
        betas: Adam's decays.
        eps: added to Adam's denominator.
        compile: whether forward, backward and optimizer become one compiled graph; needs a C++ compiler on a CPU, and
            is replayed as a CUDA graph on a GPU.
        device: where to train.

    Raises:
        ModelError: no member, nothing to train, or a rate, decay or eps out of range.
        ShapeError: parameters without a leading axis of members, or as many rates as there are not members.
    """

    def __init__(
        self,
        build: Callable[[Sequence[MemberT]], Program],
        members: Sequence[MemberT],
        *,
        rate: float | Sequence[float] = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.members = tuple(members)
        count = len(self.members)
        if not count:
            raise ModelError("an ensemble needs at least one member")
        program = build(self.members)
        if not isinstance(program, Program) or not program.params:
            raise ModelError(f"build gives a Program with parameters to train, not {program!r}")
        for name, value in program.params.items():
            if value.ndim == 0 or value.shape[0] != count:
                raise ShapeError(
                    f"{name} must have a leading axis of {count} members; its shape is {list(value.shape)}"
                )
            if not value.is_floating_point():
                raise ModelError(f"{name} is {value.dtype}, which no gradient can change: it belongs to the constants")
        rates = [rate] * count if isinstance(rate, (int, float)) else list(rate)
        if len(rates) != count:
            raise ShapeError(f"give one rate, or one a member ({count}); got {len(rates)}")
        if not all(0 < one < math.inf for one in rates):
            raise ModelError(f"learning rates must be positive numbers, got {rates}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or not 0 <= eps < math.inf:
            raise ModelError(f"Adam takes two decays from 0 to less than 1 and eps >= 0, got {betas} and {eps}")
        self.loss = program.loss
        self.params = {name: value.detach().to(device, copy=True) for name, value in program.params.items()}
        self.constants = {name: value.to(device) for name, value in program.constants.items()}
        self.moments = {
            f"{which}.{name}": torch.zeros_like(value) for which in ("m", "v") for name, value in self.params.items()
        }
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.betas, self.eps = betas, eps
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        # On a CPU, what calls the kernels is C++ as well: with few members, Python takes as long as they do.
        options: dict[str, Any] = {"cpp_wrapper": not self._count.is_cuda}
        update = (
            torch.compile(self._plain_update, fullgraph=True, dynamic=False, options=options)
            if compile
            else self._plain_update
        )
        step = partial(update, self.params, self.moments, self.constants, self.rates, self._count)
        self._step = Replayed(step) if compile and self._count.is_cuda else step

    @property
    def step(self) -> int:
        """Updates done so far."""
        return int(self._count)

    def train(self, steps: int = 1) -> Tensor:
        """Take some steps and return the losses before each of them [steps, members].

        Raises:
            ModelError: a number of steps below 0.
            ShapeError: the program's loss is not one a member.
        """
        if steps < 0:
            raise ModelError(f"a number of steps is not negative, got {steps}")
        with torch.no_grad():
            found = [self._step().clone() for _ in range(steps)]
        return torch.stack(found) if found else torch.empty(0, len(self.members), device=self._count.device)

    def member(self, index: int) -> Params:
        """One member's parameters, copied."""
        return {name: value[index].clone() for name, value in self.params.items()}

    def take_over(self, other: Ensemble[Any], theirs: Sequence[int], mine: Sequence[int]) -> None:
        """Take some members' state and the number of updates from another ensemble: some of it can go on alone.

        Args:
            other: an ensemble of the same parameters.
            theirs, mine: indices of its members, and of the members here that they become.

        Raises:
            ShapeError: not one index for each, members that there are not, or parameters of other names or shapes.
        """
        for there, indices in ((range(len(other.members)), theirs), (range(len(self.members)), mine)):
            if not len(set(indices) & set(there)) == len(theirs) == len(mine):
                raise ShapeError(f"members {list(theirs)} cannot become {list(mine)}: one for each, of {there}")
        shapes, given = ({n: v.shape[1:] for n, v in e.params.items()}.items() for e in (self, other))
        if differing := {name for name, _ in shapes ^ given}:
            raise ShapeError(f"the two ensembles have other parameters: {sorted(differing)}")
        for name, value in {**self.params, **self.moments}.items():
            value[list(mine)] = (other.params | other.moments)[name][list(theirs)].to(value)
        self._count.fill_(other.step)

    def _plain_update(
        self, params: Params, moments: Params, constants: dict[str, Tensor], rates: Tensor, count: Tensor
    ) -> Tensor:
        def total(p: Params) -> tuple[Tensor, Tensor]:
            each = self.loss(p, constants, count)
            if each.shape != (len(self.members),):
                raise ShapeError(f"a program's loss is one a member [{len(self.members)}], got {list(each.shape)}")
            return each.sum(), each.detach()

        gradients, each = torch.func.grad(total, has_aux=True)(params)
        taken = (count + 1).to(torch.float64)
        first, second = 1 - self.betas[0] ** taken, 1 - self.betas[1] ** taken
        for name, value in params.items():
            g, m, v = gradients[name], moments[f"m.{name}"], moments[f"v.{name}"]
            m.copy_(m * self.betas[0] + g * (1 - self.betas[0]))
            v.copy_(v * self.betas[1] + g * g * (1 - self.betas[1]))
            size = (rates / first).to(value.dtype).view(-1, *[1] * (value.ndim - 1))
            root = second.sqrt().to(value.dtype)
            value.copy_(value - size * (m / (v.sqrt() / root + self.eps)))
        count.add_(1)
        return each

    def save(self, path: str | os.PathLike[str], note: Any = None) -> None:
        """Write `path`.safetensors (parameters, Adam's moments) and `path`.json (step, settings, and a note).

        Args:
            path: a `.json` or `.safetensors` suffix is stripped; missing folders are made.
            note: JSON data of the caller's own, which `load` returns.
        """
        tensors = {f"param.{name}": value for name, value in self.params.items()} | self.moments
        data = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
        record = {
            "schema": SCHEMA,
            "version": VERSION,
            "step": self.step,
            **self._settings(),
            "note": note,
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
        }
        json_path, tensors_path = pair(path)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_all({tensors_path: data, json_path: (json.dumps(record, indent=1) + "\n").encode()})

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Continue where `save` stopped: the next steps are those that an uninterrupted run would take, bit for bit.

        Returns:
            the note.

        Raises:
            ResultError: no checkpoint, one of another ensemble, or two files that do not belong together; the
                ensemble is then as it was.
        """
        json_path, tensors_path = pair(path)
        for file in (json_path, tensors_path):
            if not file.exists():
                raise ResultError(f"there is no checkpoint at {json_path.with_suffix('')}: {file.name} is missing")
        data = tensors_path.read_bytes()
        try:
            record = json.loads(json_path.read_text())
        except ValueError as error:
            raise ResultError(f"{json_path} is not JSON: {error}") from None
        if not isinstance(record, dict) or (record.get("schema"), record.get("version")) != (SCHEMA, VERSION):
            raise ResultError(f"{json_path} is not a checkpoint of an ensemble, or of another version")
        if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
            raise ResultError(f"{tensors_path} does not belong to {json_path}: its checksum differs")
        for name, value in json.loads(json.dumps(self._settings())).items():
            if record[name] != value:
                raise ResultError(f"{json_path} is of another ensemble: its {name} is {record[name]}, here {value}")
        tensors = safetensors.torch.load(data)
        for name, value in self.params.items():
            value.copy_(tensors[f"param.{name}"])
        for name, value in self.moments.items():
            value.copy_(tensors[name])
        self._count.fill_(record["step"])
        return record["note"]

    def _settings(self) -> dict[str, Any]:
        """What has to agree for a checkpoint to continue this ensemble."""
        return {
            "members": [repr(member) for member in self.members],
            "rates": self.rates.tolist(),
            "betas": list(self.betas),
            "eps": self.eps,
            "shapes": {name: [str(value.dtype), *value.shape] for name, value in self.params.items()},
        }


def from_modules(
    modules: Sequence[nn.Module],
    loss: Callable[[Callable[..., Any], dict[str, Tensor], Tensor], Tensor],
    data: dict[str, Tensor] | None = None,
    *,
    plans: Sequence[Any] | None = None,
    inputs: Inputs | None = None,
    adapter: Callable[[Any], Any] | None = None,
    seed: int | Sequence[int] = 0,
) -> Program:
    """A program for any PyTorch module, by `torch.func.vmap` over stacked parameters: the plain reference.

    Members may be trained under plans, each under its own, as within ``model.apply(plan)``. Those whose plans differ in
    values, vectors, strengths, positions or heads alone are one batch; there is one for each structure of plans. A
    world that a plan reads is run anew in every call, with the member's parameters, and gradients flow through it.

    Args:
        modules: one a member, of one architecture; buffers and training mode are those of the first. What they draw
            themselves (dropout) is of torch's own random state, which `Ensemble.save` does not keep.
        loss: ``loss(call, data, step)`` of one member, where ``call(*inputs)`` runs its module and `data` are its own
            entries; returns a scalar.
        data: tensors with a leading axis of members: values that are held, seeds, inputs.
        plans: a plan for each member, or None where it holds nothing.
        inputs: rows, positions and padding of what every call gets, with plans.
        adapter: as of `wrap`, for modules of a family that is not known, with plans.
        seed: of random interventions, one for all or one a member.

    Raises:
        ModelError: no module, modules of several architectures, or parameters that are frozen.
        ShapeError: data without a leading axis of members, or as many plans as there are not members.
        PlanError: a plan that cannot be held within a graph: one that depends on the batch, say; or no inputs to it.
    """
    if not modules:
        raise ModelError("an ensemble needs at least one member")
    template, every = modules[0], [dict(module.named_parameters()) for module in modules]
    for number, own in enumerate(every):
        if other := {n: p.shape for n, p in own.items()}.items() ^ {n: p.shape for n, p in every[0].items()}.items():
            raise ModelError(
                f"module {number} is of another architecture than the first: {sorted(n for n, _ in other)}"
            )
        if frozen := [name for name, value in own.items() if not value.requires_grad]:
            raise ModelError(f"a program trains every parameter, and of module {number} these are frozen: {frozen}")
    for name, value in (data or {}).items():
        if value.ndim == 0 or len(value) != len(modules):
            raise ShapeError(
                f"data {name!r} must have a leading axis of {len(modules)} members, not {list(value.shape)}"
            )
    params = {name: torch.stack([own[name].detach() for own in every]) for name in every[0]}
    if plans is not None:
        return _under_plans(modules, params, loss, dict(data or {}), plans, inputs, adapter, seed)

    def stacked(params: Params, constants: dict[str, Tensor], step: Tensor) -> Tensor:
        def one(own: Params, given: dict[str, Tensor]) -> Tensor:
            return loss(lambda *inputs: torch.func.functional_call(template, own, inputs), given, step)

        # Of torch's attention kernels, only the plain one can be batched over members.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(one, randomness="different")(params, constants)

    return Program(params, dict(data or {}), stacked)


def _under_plans(
    modules: Sequence[nn.Module],
    params: Params,
    loss: Callable[[Callable[..., Any], dict[str, Tensor], Tensor], Tensor],
    data: dict[str, Tensor],
    plans: Sequence[Any],
    inputs: Inputs | None,
    adapter: Callable[[Any], Any] | None,
    seed: int | Sequence[int],
) -> Program:
    """The program of members that hold plans: one batch for each structure of them."""
    if len(plans) != len(modules):
        raise ShapeError(f"give one plan a member ({len(modules)}), or None for it; got {len(plans)}")
    if inputs is None:
        raise PlanError("plans are resolved on rows and positions: give inputs= of the shape that every call gets")
    members = Members(wrap(modules[0], adapter=adapter), plans, inputs, seed)
    constants = dict(data)
    for number, group in enumerate(members.groups):
        constants |= {f"plan {number}.{n}": value for n, value in enumerate(group.tensors)}
        constants[f"plan {number}"] = group.index
    order = torch.cat([group.index for group in members.groups]).argsort()
    constants["plans"] = order

    def stacked(params: Params, constants: dict[str, Tensor], step: Tensor) -> Tensor:
        found = []
        for number, group in enumerate(members.groups):
            index = constants[f"plan {number}"]
            held = [constants[f"plan {number}.{n}"] for n in range(len(group.tensors))]

            def one(own: Params, given: dict[str, Tensor], held: Sequence[Tensor], group: Any = group) -> Tensor:
                return loss(lambda *inputs: group.call(own, held, inputs), given, step)

            own = {name: value.index_select(0, index) for name, value in params.items()}
            given = {name: constants[name].index_select(0, index) for name in data}
            batched = torch.func.vmap(one, in_dims=(0, 0, group.axes), randomness="different")
            found.append(batched(own, given, held))
        return torch.cat(found).index_select(0, constants["plans"])

    def plainly(params: Params, constants: dict[str, Tensor], step: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return stacked(params, constants, step)

    return Program(params, constants, plainly)
