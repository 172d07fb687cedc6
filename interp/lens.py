"""Where everyone starts: the logit lens, and direct logit attribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, InputsError, MetricError, Model, ModelError, Plan, PlanError, Site, linear_weight, nearest
from interp.answers import Tokens, token_ids
from interp.axes import Axis
from interp.evaluation import require_eval
from interp.lens_picture import MOST_POSITIONS, drawn, lens_figure
from interp.metrics import Metric, call
from interp.parts import bias_output, frozen_norm, head_outputs, post_norm
from interp.provenance import describe_run
from interp.results import Result
from interp.sweeps import assemble

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READOUT = ("ln_final_scale", "ln_final", "logits")


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer's residual stream would say, read out by the final norm and the unembedding (nostalgebraist
    2020).

    Attributes:
        logits: [P, B, T, V], one entry for each point, on the CPU.
        points: what was read out: ``"embed"`` (the residual before the first block), then the number of each block.
        inputs: the prompts.
        name: from a token id to its text (or a class to its label).
    """

    logits: Tensor
    points: tuple[str, ...]
    inputs: Inputs
    name: Callable[[int], str] = str

    def __repr__(self) -> str:
        return f"LogitLens({len(self.points)} points, {self.inputs!r})"

    def _repr_html_(self) -> str:
        """Return the likeliest token at each point and position of the first row, for notebooks."""
        return drawn(self)

    def figure(self, row: int = 0, last: int = MOST_POSITIONS) -> Figure:
        """Return a figure of the likeliest token at each point and position of a row.

        Args:
            row: which.
            last: how many positions, up to the end.
        """
        return lens_figure(self, row, last)

    def top(self, model: Model, k: int = 3, row: int = 0, pos: int | None = None) -> list[list[tuple[str, float]]]:
        """The k likeliest next tokens (or classes) at each point, with their probabilities, for one row and position.

        Args:
            model: what was read out.
            k: how many.
            row, pos: where; by default the position that the model's answer is read from, the last or a classifier's.
        """
        readout = model.architecture.readout
        pos = pos if pos is not None else -1 if readout is None else readout
        length = int(self.inputs.lengths[row])
        if not -length <= pos < length:
            raise InputsError(f"position {pos} is not in row {row}, which has {length} tokens")
        column = int(self.inputs.order[row, pos % length])
        chances, ids = self.logits[:, row, column].float().softmax(-1).topk(k, dim=-1)
        name = model.decode if model.tokenizer is not None or readout is not None else (lambda i: str(i[0]))
        return [
            [(name([i]), p) for i, p in zip(a, b, strict=True)]
            for a, b in zip(ids.tolist(), chances.tolist(), strict=True)
        ]


def logit_lens(model: Model, inputs: Inputs, metric: Metric | None = None) -> LogitLens | Result:
    """Read every layer's residual stream out as if it were the last; in a classifier at every position, which it reads
    at one.

    Args:
        model: a wrapped model.
        inputs: the prompts.
        metric: measure this on each point's logits instead of returning them; it may read logits only.

    Returns:
        A `LogitLens`, or with a metric a `Result` with an axis ``layer`` (``"embed"`` first), whose effects are the
        metric's
        values: what the lens reads, against a base of 0.

    Raises:
        ModelError: the model is in training mode.
        MetricError: the metric reads more than logits, or it is nan.
        PlanError: a plan that is held on the model edits what is read out.
    """
    check_readout(model, inputs)
    sites = [Site("resid_pre", 0), *(Site("resid_post", layer) for layer in range(model.n_layers))]
    run = model.run(inputs, capture=sites)
    arch = model.architecture
    points = ("embed", *(str(layer) for layer in range(model.n_layers)))
    if metric is None:
        with torch.no_grad(), model.suspended():
            logits = torch.stack([arch.logits(arch.norm(run.tape[place])).cpu() for place in sites])
        named = model.tokenizer is not None or arch.readout is not None
        return LogitLens(logits, points, inputs, (lambda i: model.decode([i])) if named else str)
    bound = metric.bind(model, inputs)
    if metric.reference is not None or any(r.name != "logits" for r in bound.reads):
        raise MetricError(f"the logit lens measures metrics of the logits alone, and {metric.name!r} reads more")
    values = np.zeros((1, len(sites) + 2, len(inputs)))
    with torch.no_grad(), model.suspended():
        for i, place in enumerate(sites):
            final = run.tape[place] if arch.readout is None else run.tape[place][:, arch.readout, None]
            logits = arch.logits(arch.norm(final))
            parts = [model.region(r, inputs).get(logits) for r in bound.reads]
            read = call(bound, metric.name, slice(0, len(inputs)), parts, f" in the cell layer={points[i]!r}")
            values[0, i + 2] = read.to("cpu", torch.float64).numpy()
    return _as_result(values, Axis("layer", points), metric.name, inputs, model, "logit lens")


def direct_logit_attribution(
    model: Model,
    inputs: Inputs,
    answer: Tokens,
    foil: Tokens | None = None,
    *,
    pos: int = -1,
    heads: bool = True,
    by: str = "component",
) -> Result:
    """Split the logit of the answer (minus the foil's) into what each component writes to the residual stream.

    The final norm's scale is held at its value, which makes the logits linear in the residual stream; the parts then
    add up to the whole, which is checked (Elhage et al. 2021; Wang et al. 2022). For single heads, so is the scale of a
    norm that stands after attention. Where a model soft-caps its logits, the whole is the logit before that.

    Args:
        model: a wrapped model.
        inputs: the prompts.
        answer, foil: as in `logit_diff`; without a foil, the logit of the answer.
        pos: the position read; a classifier's logits have one, 0 and -1.
        heads: split attention into its heads (and its output bias); else one part a layer.
        by: "component", or "head" for the heads alone, layer by layer.

    Returns:
        A `Result` with one axis ``component`` ("embed", "0.h3", "0.attn_bias", "0.mlp", ..., "norm_bias", and
        "unembed_bias" where there is one), or with axes ``layer`` and ``head``, in nats.

    Raises:
        ModelError: the parts do not add up, so the model is not what this describes; or it is in training mode.
        MetricError: a part is nan.
        PlanError: a plan that is held on the model edits what is read out.
    """
    if by not in ("component", "head") or (by == "head" and not heads):
        raise MetricError(
            f"by is 'component' or, with heads=True, 'head', not {by!r}{nearest(by, ['component', 'head'])}"
        )
    under = check_readout(model, inputs)
    if not isinstance(pos, int):
        raise MetricError(f"direct logit attribution reads one position, not pos={pos!r}")
    arch = model.architecture
    if arch.readout is not None:
        if pos not in (0, -1):
            raise MetricError(f"a classifier's logits have one position, 0 or -1, not pos={pos}")
        pos = arch.readout
    weight, bias = linear_weight(arch.unembed)
    good = token_ids(model, answer, len(inputs))
    direction, constant = _columns(weight, good), None if bias is None else _columns(bias, good)
    if foil is not None:
        bad = token_ids(model, foil, len(inputs))
        direction = direction - _columns(weight, bad)
        constant = None if bias is None or constant is None else constant - _columns(bias, bad)
    last = Site("resid_post", model.n_layers - 1, pos=pos)
    wanted = [Site("resid_pre", 0, pos=pos), last]
    for layer, block in enumerate(arch.blocks):
        wanted += [Site("attn_out", layer, pos=pos)] + ([Site("z", layer, pos=pos)] if heads else [])
        wanted += [Site("mlp_out", layer, pos=pos)] if block.mlp is not None else []
    tape = model.run(inputs, capture=wanted).tape
    with torch.no_grad(), model.suspended():
        final = tape[last][:, 0]
        frozen, towards = frozen_norm(arch.norm, final), direction.to(final.device)

        def onto(part: Tensor) -> Tensor:
            return (frozen(part) * towards).sum(-1)

        names, parts = ["embed"], [onto(tape[wanted[0]][:, 0])]
        for layer, block in enumerate(arch.blocks):
            out = tape[Site("attn_out", layer, pos=pos)][:, 0]
            if heads:
                z = tape[Site("z", layer, pos=pos)][:, 0]
                post = post_norm(block, z)
                each, bias = head_outputs(block, z, post), bias_output(block, z, post)
                names += [f"{layer}.h{h}" for h in range(block.attention.q.heads)]
                parts += [onto(each[:, h]) for h in range(block.attention.q.heads)]
                if bias is not None:
                    names.append(f"{layer}.attn_bias")
                    parts.append(onto(bias.expand_as(out)))
            else:
                names.append(f"{layer}.attn")
                parts.append(onto(out))
            if block.mlp is not None:
                names.append(f"{layer}.mlp")
                parts.append(onto(tape[Site("mlp_out", layer, pos=pos)][:, 0]))
        whole = (arch.norm(final) * towards).sum(-1)
        if isinstance(getattr(arch.norm, "bias", None), Tensor):
            names.append("norm_bias")
            parts.append(whole - onto(final))
        if constant is not None:
            names.append("unembed_bias")
            parts.append(constant.to(final.device))
            whole = whole + parts[-1]
        stacked = torch.stack(parts)
        gap = float((stacked.sum(0) - whole).abs().max())
        scale = float(stacked.abs().sum(0).max())
        if gap > 1e-3 * scale:
            why = "this model is not described by them"
            if len(under):
                why += ", or not under the plan that is held on it, which may edit the components and not their sum"
            raise ModelError(f"the components add up to another logit, {gap:.3g} off: {why}")
    values = np.zeros((1, len(names) + 2, len(inputs)))
    values[0, 2:] = stacked.to("cpu", torch.float64).numpy()
    name = "logit" if foil is None else "logit_diff"
    result = _as_result(values, Axis("component", tuple(names)), name, inputs, model, "direct logit attribution")
    return _by_head(result) if by == "head" else result


def _by_head(result: Result) -> Result:
    """The heads among the components, by layer and head; where layers have fewer heads, no row has the rest."""
    (axis,) = result.axes
    places = [(i, *map(int, name.split(".h"))) for i, name in enumerate(axis.values) if ".h" in name]
    layers, count = 1 + max(layer for _, layer, _ in places), 1 + max(head for _, _, head in places)
    effect, status = np.full((layers, count, len(result.rows)), np.nan), np.full((layers, count), 2, np.int8)
    for i, layer, head in places:
        effect[layer, head], status[layer, head] = result.effect[i], result.status[i]
    axes = (Axis("layer", tuple(range(layers))), Axis("head", tuple(range(count))))
    return replace(result, effect=effect, axes=axes, status=status)


def check_readout(model: Model, inputs: Inputs) -> Plan:
    """The plan that is held on a model whose residual stream is to be read out, empty where none is.

    Raises:
        ModelError: the model is in training mode.
        PlanError: it edits what the final norm or the unembedding gives.
    """
    require_eval(model, "a lens")
    held, _ = model.held_on(inputs)
    item = next((item for item in held if item.site.name in READOUT), None)
    if item is not None:
        raise PlanError(
            f"{item}, which is held on the model, edits what the final norm and the unembedding give, and here they "
            "are applied to parts of the residual stream: hold what comes before them, or use sweep()"
        )
    return held


def _columns(weight: Tensor, tokens: Tensor) -> Tensor:
    """The mean, over each row's tokens [B, n], of their part of the unembedding's weight [V, M] or bias [V]."""
    return weight.detach()[tokens.to(weight.device)].mean(1)


def _as_result(values: np.ndarray, axis: Axis, name: str, inputs: Inputs, model: Model, what: str) -> Result:
    measured = Metric(name, lambda model, inputs: None)  # type: ignore[arg-type, return-value]
    status = np.zeros(values.shape[1:], np.int8)
    result = assemble(values, status, (axis,), [None] * len(axis), [measured], False, None, inputs, model)
    result.config.update(describe_run(model, what, None, None, "", 0, inputs=inputs))
    return result
