"""A wrapped model: what it offers, how it is run, and how a plan is held on it while the user runs it."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .audit import Audit
from .backends.forward import exposed_layers, hooked_pass
from .backends.sources import read_tapes
from .errors import InputsError, ModelError, PlanError
from .hold import PlanOf, held_on, hold, suspend
from .html import table
from .models import describe
from .models.architecture import Architecture
from .models.catalogue import SiteTable, site_sizes, site_table
from .models.checks import check_inputs, check_plan, check_site
from .plan.images import check_pixels
from .plan.inputs import Inputs
from .plan.labels import class_id, class_names
from .plan.plan import Intervention, Plan, World, as_plan
from .plan.prompts import decode_ids, encode_text, one_token, prepare
from .plan.sites import Site, sites_of
from .plan.tape import Tape
from .program import Edits


@dataclass(frozen=True, eq=False)
class Run:
    """What a run gives back.

    Attributes:
        logits: [B, T, V]; [B, 1, V] of a classifier.
        tape: the activations that were asked for.
        audit: what each intervention did.
    """

    logits: Tensor
    tape: Tape
    audit: Audit

    def _repr_html_(self) -> str:
        kept = table(("kept", "shape"), [(place, list(value.shape)) for place, value in self.tape.values])
        did = self.audit._repr_html_() if len(self.audit) else ""
        return f"<div><code>Run(logits {list(self.logits.shape)})</code></div>{did}{kept if len(self.tape) else ''}"

    def __repr__(self) -> str:
        return f"Run(logits {list(self.logits.shape)}, {self.tape}, {self.audit})"


class Model:
    """A transformer, wrapped but never changed: hooks stand on it only while a plan is applied.

    Attributes:
        module: the user's model.
        tokenizer: what turns prompts into ids, or None.
        architecture: where the model keeps its parts.
        sizes: sizes of the head and last axes of every site, by key.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, architecture: Architecture) -> None:
        self.module, self.tokenizer, self.architecture = module, tokenizer, architecture
        self.sizes = site_sizes(architecture)

    @property
    def n_layers(self) -> int:
        """Number of blocks L."""
        return len(self.architecture.blocks)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and with it everything else (models spread over devices are not supported)."""
        return next(self.architecture.embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return next(self.architecture.embed.parameters()).dtype

    def __repr__(self) -> str:
        arch, block = self.architecture, self.architecture.blocks[0]
        heads = f"{block.q.heads} heads" + (f" ({block.k.heads} key/value)" if block.k.heads != block.q.heads else "")
        out = f"vocabulary {arch.vocabulary}" if arch.readout is None else f"{arch.vocabulary} classes"
        return f"Model({arch.family}: {self.n_layers} layers, {heads}, width {arch.width}, {out})"

    def _repr_html_(self) -> str:
        return f"<div><code>{html.escape(repr(self))}</code></div>{self.sites()._repr_html_()}"

    def sites(self) -> SiteTable:
        """Every site that the model offers, with its shape; all are readable and writable."""
        return site_table(self.sizes, self.n_layers)

    def require(self, where: Site) -> None:
        """Check that the model has a site, and the heads and dimensions that it names.

        Raises:
            SiteError: it does not.
        """
        check_site(self, where)

    def check(self, plan: Plan) -> None:
        """Check that a plan fits this model: its sites, heads and dimensions, and the widths of its values.

        Raises:
            SiteError, ShapeError, PlanError, InputsError: it does not.
        """
        check_plan(self, plan)

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that inputs are of the kind that this model takes: images of its size, or ids of its vocabulary.

        Raises:
            InputsError: they are not.
        """
        check_inputs(self, inputs)

    def inputs(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]] | Tensor,
        mask: Tensor | None = None,
        *,
        padding: str = "right",
        row_ids: Tensor | None = None,
    ) -> Inputs:
        """Prepare prompts, or images for a model that takes those.

        Args:
            prompts: a text or several, which the tokenizer encodes with the special tokens that it adds by itself;
                lists of token ids of any lengths; or a tensor of ids [B, T]. For a vision model pixels [B, C, height,
                width], as its image processor makes them; a run brings them into the model's dtype.
            mask: [B, T], nonzero at real tokens, with a tensor of ids.
            padding: the side on which ragged rows are padded, ``"right"`` or ``"left"``.
            row_ids: int [B], what random interventions know the rows by; default 0 .. B-1.

        Raises:
            InputsError: no prompt or an empty one, ids outside the vocabulary, text without a tokenizer, images of
                another size, images where the model takes prompts, or prompts where it takes images.
        """
        images, vocabulary = self.architecture.images, self.architecture.vocabulary
        if images is not None:
            if mask is not None:
                raise InputsError("an image has no padding, so there is no mask to give")
            return Inputs.of_images(check_pixels(prompts, images), images.patch, row_ids)
        if isinstance(prompts, Tensor) and prompts.is_floating_point() and prompts.ndim > 2:
            raise InputsError(
                f"{self!r} is a language model: it takes texts or token ids, not pixels {list(prompts.shape)}"
            )
        decode = None if self.tokenizer is None else self.decode
        return prepare(prompts, mask, row_ids, padding, encode=self.encode, decode=decode, vocabulary=vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself.

        Raises:
            InputsError: there is no tokenizer.
        """
        return encode_text(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, in which a piece that begins a word keeps its space; of a classifier, labels of classes.

        Raises:
            InputsError: there is no tokenizer.
        """
        if self.architecture.readout is not None:
            return class_names(self.module, ids)
        return decode_ids(self.tokenizer, ids)

    def token(self, text: str) -> int:
        """The id of a text that is one token, or of a classifier's label.

        Raises:
            InputsError: it is not; the message shows its pieces.
        """
        if self.architecture.readout is not None:
            return class_id(self.module, text)
        return one_token(self.tokenizer, text)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the user's model, called as plainly as the inputs allow; [B, 1, V] of a classifier."""
        if pixels is not None:
            # In the model's dtype, as it would bring them into by itself.
            logits = _logits_of(self.module(pixel_values=pixels.to(self.device, self.dtype)))
            return logits if self.architecture.readout is None else logits.unsqueeze(1)
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if not bool(mask.all()):
            arguments |= {"attention_mask": mask.long().to(self.device), "position_ids": positions.to(self.device)}
        if hasattr(getattr(self.module, "config", None), "use_cache"):
            arguments["use_cache"] = False
        return _logits_of(self.module(**arguments))

    def run(
        self,
        inputs: Inputs | World,
        plan: Plan | Intervention | None = None,
        *,
        capture: Sequence[Site | str] | Site | str = (),
        grad: bool = False,
        seed: int = 0,
    ) -> Run:
        """Run inputs under a plan.

        Args:
            inputs: from `inputs()`, or a `World`, which brings its own plan.
            plan: what to do; None for a plain run.
            capture: sites to keep, whole or in part, in either spelling.
            grad: keep the autograd graph, also in what is captured.
            seed: seed of random interventions.

        Raises:
            UnfiredError: an intervention never fired.
        """
        if isinstance(inputs, World):
            if plan is not None:
                raise PlanError("a World brings its own plan")
            inputs, plan = inputs.inputs, inputs.plan
        if not isinstance(inputs, Inputs):
            raise InputsError(f"run() takes Inputs (from model.inputs), not {type(inputs).__name__}")
        self.check_inputs(inputs)
        own = as_plan(plan)
        self.check(own)
        held, record = self.held_on(inputs)
        world = World(inputs, held + own)
        sites = sites_of(capture)
        for place in sites:
            self.require(place)
        expose = exposed_layers([world], ())
        with self.suspended(), torch.enable_grad() if grad else torch.no_grad():
            edits = Edits(world, self.sizes, read_tapes(self, [world], seed, expose, graph=grad), seed)
            session, logits = hooked_pass(self, [edits], [sites], expose, graph=grad)
        audit = edits.audit.split(len(held), record)
        audit.require_fired()
        kept = tuple((place, session.kept[0][i]) for i, place in enumerate(sites))
        return Run(logits, Tape(inputs, kept, self.sizes), audit)

    def apply(self, plan: Plan | Intervention | PlanOf, *, seed: int = 0) -> AbstractContextManager[Audit]:
        """Hold a plan on the model while the user calls it: any forward, or a training step.

        Inside another one, and for `run` and sweeps inside, the outer plan comes first: together they are one plan.
        The model is as it was afterwards, whatever was raised inside. Gradients flow through the interventions. Where
        the plan reads this world unedited or under another plan, each call is made once more for it, with the same
        dropout.

        Args:
            plan: a plan; or a function from the `Inputs` of a call (ids, mask, positions) to a plan, for one whose
                positions or values depend on the batch.
            seed: seed of random interventions.

        Returns:
            A context manager that gives the audit, which grows with every forward pass (what gradient checkpointing
            computes again is not counted).

        Raises:
            UnfiredError: on leaving without an exception, where an intervention never fired.
            PlanError: a call that continues from a key/value cache, whose earlier tokens the plan has not seen.
        """
        return hold(self, plan, seed)

    @property
    def holds(self) -> bool:
        """Whether `apply` holds a plan on the model at the moment."""
        return held_on(self.module) is not None

    def held_on(self, inputs: Inputs) -> tuple[Plan, Audit]:
        """The plan that `apply` holds on the model at the moment, on these inputs, and its record; empty outside."""
        applied = held_on(self.module)
        return (Plan(), Audit()) if applied is None else applied.on(inputs)

    def suspended(self) -> AbstractContextManager[None]:
        """Take the hooks of all plans that are held off the model, and put them back."""
        return suspend(self.module)

    def unshareable(self) -> str:
        """Why the copy-on-write executor cannot be exact on this model as it is now; empty where it can."""
        if any(module.training for module in self.module.modules()):
            return "the model is in training mode"
        for name, module in self.module.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"there are hooks of yours on {name or 'the model'}"
            if "forward" in vars(module):
                return f"the forward of {name or 'the model'} is one of yours"
        devices = sorted({str(parameter.device) for parameter in self.module.parameters()})
        if len(devices) > 1:
            return f"the model is spread over {', '.join(devices)}"
        return ""


def wrap(
    model: nn.Module | Model, tokenizer: Any = None, *, adapter: Callable[[nn.Module], Architecture] | None = None
) -> Model:
    """Wrap a model of the user's, which stays as it is.

    Args:
        model: a GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2, Qwen 3 or Gemma 2 with a language-model head or a ViT with a
            classifier (of transformers), the project's own small transformer, or any module with an adapter.
        tokenizer: for prompts that are text, and for printing tokens.
        adapter: a function that says where the model keeps its parts, for a family that is not known. Of a model that
            is wrapped already, tokenizer and adapter replace what it has.

    Raises:
        ModelError: nobody knows the model's parts.
    """
    if isinstance(model, Model):
        if tokenizer is None and adapter is None:
            return model
        known = model.architecture if adapter is None else _described(model.module, adapter)
        return Model(model.module, model.tokenizer if tokenizer is None else tokenizer, known)
    if not isinstance(model, nn.Module):
        raise ModelError(f"wrap() takes a torch module, not {type(model).__name__}")
    return Model(model, tokenizer, _described(model, adapter or describe))


def _described(module: nn.Module, adapter: Callable[[nn.Module], Architecture]) -> Architecture:
    found = adapter(module)
    if not isinstance(found, Architecture):
        raise ModelError(f"an adapter returns an Architecture, this one a {type(found).__name__}")
    return found


def _logits_of(output: Any) -> Tensor:
    """The logits among what a model returns: alone, by name, or first in a tuple."""
    if isinstance(output, tuple):
        output = output[0]
    return output if isinstance(output, Tensor) else output.logits
