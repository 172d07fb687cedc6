"""A wrapped model: what it offers, how it is run, and how a plan is held on it while the user runs it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .audit import Audit
from .backends.gate import gate_of
from .backends.tools import tool_of
from .capturing import captured
from .compiled import Compiled
from .compiling import Graphs, Options
from .discovery import discover
from .errors import InputsError, ModelError, PlanError
from .forking import Begin, Branch, Combine
from .hold import fork, held, hold, holds_on, listing
from .holding import Holding, PlanOf
from .models import adapter_of
from .models.architecture import Architecture
from .models.catalogue import SiteInfo, SiteTable, site_table, why_missing
from .models.checks import check_inputs, check_pictures, check_plan, check_site
from .models.network import Network, without_wrapper
from .models.sight import inputs_with_images
from .plan.encoded import after_source, start_of
from .plan.images import check_pixels
from .plan.inputs import Inputs
from .plan.labels import class_id, class_names
from .plan.plan import Intervention, Plan, World, as_plan
from .plan.prompts import bos_of, decode_ids, encode_text, one_token, prepare
from .plan.region import Region, resolve
from .plan.sites import Site, sites_of
from .plan.tape import Tape
from .record import record
from .running import Run


class Model(Network):
    """A transformer, wrapped but never changed: hooks stand on it only while a plan is applied.

    Attributes:
        module: the user's model.
        tokenizer: what turns prompts into ids, or None.
        processor: what turns prompts and images into ids and pixels, or None.
        architecture: where the model keeps its parts.
        sizes: sizes of the head and last axes of every site, by key.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, adapter: Callable[[Any], Architecture], processor: Any = None
    ) -> None:
        super().__init__(module, adapter)
        self.tokenizer, self.processor = tokenizer, processor

    def _repr_html_(self) -> str:
        return f"<div><code>{html.escape(repr(self))}</code></div>{self.sites()._repr_html_()}"

    def sites(self) -> SiteTable:
        """Every site that the model offers, with its shape; all are readable and writable."""
        self.refresh()
        return site_table(self.sizes, self.n_layers)

    def why_not(self, name: str) -> str:
        """Why the model has no site of some kind, where there is more to say than that it has none."""
        return why_missing(self.architecture, name, 0)

    def require(self, where: Site) -> None:
        """Check that the model has a site, and the heads and dimensions that it names.

        Raises:
            SiteError: it does not.
        """
        check_site(self, where)

    def region(self, where: Site, inputs: Inputs) -> Region:
        """The entries of an activation that a site means on some inputs.

        Raises:
            SiteError, ShapeError: it does not fit them.
        """
        queries, keys = inputs.tokens_of(where)
        return resolve(where, queries, self.sizes[where.key], keys=None if keys is queries else keys)

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
        prompts: str | Sequence[str] | Sequence[Sequence[int]] | Mapping[str, Any] | Tensor,
        mask: Tensor | None = None,
        *,
        images: Any = None,
        padding: str = "right",
        row_ids: Tensor | None = None,
        bos: bool | None = None,
        decoded: str | Sequence[str] | Sequence[Sequence[int]] | None = None,
    ) -> Inputs:
        """Prepare prompts, or images for a model that takes those.

        Args:
            prompts: a text or several, which the tokenizer encodes with the special tokens that it adds by itself;
                lists of token ids of any lengths; or a tensor of ids [B, T]. For a vision model pixels [B, C, height,
                width], as its image processor makes them; a run brings them into the model's dtype. For a model with
                a vision tower also what its processor makes of texts and images, as a dict of tensors.
            mask: [B, T], nonzero at real tokens, with a tensor of ids.
            images: for each text its image (PIL's, an array or a tensor), several in a list, or None, where the
                model was wrapped with its processor; texts hold the token that stands for an image.
            padding: the side on which ragged rows are padded, ``"right"`` or ``"left"``.
            row_ids: int [B], what random interventions know the rows by; default 0 .. B-1.
            bos: of texts: True for exactly one BOS, False for none but what the text has (that of a chat template has
                one); by default what the tokenizer does, with a warning where that makes two.
            decoded: what a model that decodes what it encodes has decoded so far, a text or a list of ids a row, which
                follow its start token; by default nothing. Positions are those of the decoder, 0 is the start token.

        Raises:
            InputsError: no prompt or an empty one, ids outside the vocabulary, text without a tokenizer, images of
                another size, images where the model takes prompts, or prompts where it takes images.
        """
        self.refresh()
        arch, vocabulary = self.architecture, self.architecture.token_ids
        if images is not None or (arch.tower is not None and isinstance(prompts, Mapping)):
            if mask is not None:
                raise InputsError("a mask goes with a tensor of ids; what a processor makes has its own")
            labels = None if self.tokenizer is None else self.decode
            return inputs_with_images(arch, self.processor, prompts, images, padding, row_ids, labels)
        if arch.images is not None:
            if mask is not None:
                raise InputsError("an image has no padding, so there is no mask to give")
            return Inputs.of_images(check_pixels(prompts, arch.images), arch.images.patch, row_ids, arch.images.prefix)
        if isinstance(prompts, Tensor) and prompts.is_floating_point() and prompts.ndim > 2:
            raise InputsError(
                f"{self!r} is a language model: it takes texts or token ids, not pixels {list(prompts.shape)}"
            )
        decode = None if self.tokenizer is None else self.decode
        made = prepare(
            prompts, mask, row_ids, padding, encode=partial(encode_text, self.tokenizer, bos=bos), decode=decode,
            vocabulary=vocabulary, bos_id=bos_of(self.tokenizer),
        )  # fmt: skip
        check_pictures(arch.tower, made)
        if arch.encoder is None:
            if decoded is not None:
                raise InputsError(f"{self!r} encodes nothing, so there is nothing that it decodes of it: give one text")
            return made
        return after_source(made, decoded, start_of(self.module), padding, self.tokenizer, vocabulary)

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

    def run(
        self,
        inputs: Inputs | World,
        plan: Plan | Intervention | None = None,
        *,
        capture: Sequence[Site | SiteInfo | str] | Site | SiteInfo | str = (),
        grad: bool = False,
        seed: int = 0,
    ) -> Run:
        """Run inputs under a plan.

        Args:
            inputs: from `inputs()`, or a `World`, which brings its own plan.
            plan: what to do; None for a plain run.
            capture: sites to keep, whole or in part, in either spelling; a name without a layer or an entry of
                `sites()` means every layer, and ``"all"`` every site.
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
        sites = captured(self, capture)
        world = World(inputs, as_plan(plan))
        (outcome,) = record(
            self, [world], sites, executor="sequential", seed=seed, grad=grad, through_reads=grad, together=True
        )
        outcome.audit.require_fired()
        assert outcome.output is not None
        kept = tuple(zip(sites, outcome.values, strict=True))
        return Run(outcome.output, Tape(inputs, kept, self.sizes), outcome.audit, headless=self.architecture.headless)

    def apply(self, plan: Plan | Intervention | PlanOf, *, seed: int = 0) -> AbstractContextManager[Audit]:
        """Hold a plan on the model while the user calls it: any forward, `generate`, or a training step.

        Inside another one, and for `run` and sweeps inside, the outer plan comes first: together they are one plan.
        The model is as it was afterwards, whatever was raised inside. Gradients flow through the interventions. Where
        the plan reads this world unedited or under another plan, each call is made once more for it, with the same
        dropout.

        While a model decodes with a key/value cache, each token is edited once, when it is fed, and what is edited of
        its key and value stays in the cache; the result is that of running the whole text at every step. Positions
        mean tokens of the prompt: ``pos=-1`` is its last and stays so, a slice ends with it. ``pos="new"`` (or
        ``new(0, 5)``) means tokens that are generated, and no `pos`, or ``"all"``, both. Rows that beams and samples
        go on from one prompt are that prompt's row, for plans of rows and for random draws. The prompt of `generate`
        is all that it is given, in a chat with a cache the whole conversation so far. In a loop of your own it is what
        the first call feeds, and again all that stands there when a later call feeds several tokens; one token at a
        time is generated.

        Args:
            plan: a plan; or a function from the `Inputs` of a call (ids, mask, positions) to a plan, for one whose
                positions or values depend on the batch.
            seed: seed of random interventions.

        Returns:
            A context manager that gives the audit, which grows with every forward pass (what gradient checkpointing
            computes again is not counted).

        Raises:
            UnfiredError: on leaving without an exception, where an intervention never fired.
            PlanError: a call whose positions cannot be told, or that needs tokens which are not fed any more: those
                of a cache that was filled before, positions that a function mixes, the model as its own assistant.
        """
        self._require_here()
        return hold(self, plan, seed)

    def fork(
        self,
        *branches: Branch,
        combine: Combine,
        own: Branch | None = None,
        begin: Begin | None = None,
        seed: int = 0,
    ) -> AbstractContextManager[tuple[Audit, ...]]:
        """Hold several worlds on the model while the user calls it, whose logits become one; see `apply`.

        Every call is made once, with each row once for each world: the user's own first, then those of the branches.
        Each world has its own keys and values in the cache, and all are fed the tokens that the user, or `generate` in
        any of its modes, chooses from the logits that `combine` makes of theirs. All else that a call returns is the
        first world's. Runs inside (`run`, sweeps) are under the plan of the first world.

        Args:
            branches: the worlds beside the user's own.
            combine: from logits [W, B, T, V] and a `Moment` to logits [B, T, V].
            own: what is done in the user's own world; None for nothing.
            begin: told of the `Moment` of each call before it is made.
            seed: of random interventions.

        Returns:
            A context manager that gives the audit of each world.

        Raises:
            UnfiredError: on leaving without an exception, where an intervention never fired.
            PlanError: worlds within worlds, a cache that was filled before, labels, or what `apply` refuses.
        """
        self._require_here()
        if self.architecture.encoder is not None:
            raise ModelError("worlds are not held side by side on a model that decodes what it encodes: hold one plan")
        if self.architecture.headless:
            raise ModelError(f"worlds are combined by their logits, and there are none: {self.architecture.headless}")
        return fork(self, [own or Branch(), *branches], combine, seed, begin)

    def compile(
        self,
        plan: Plan | Intervention | None = None,
        *,
        capture: Sequence[Site | str] | Site | str = (),
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Make the model and a plan one graph of torch.compile (``fullgraph=True``), which runs as `run` does.

        What is tensors or numbers in a plan are inputs of the graph: other values, vectors, strengths, scales, seeds,
        positions and heads are the same graph, and so are other prompts and the worlds that are read. Another
        structure is another graph, made when it is first called: other sites, functions or kinds of index, as many
        positions, heads or rows as were not seen yet (see `dynamic`), a mask where there was none, gradients. A world
        that is read is a graph of its own; `graphs.count` says how many there are. The graph is of a twin of the model,
        which shares its parameters and buffers, so the model stays as it is, may be trained and held under other plans
        besides, and what is held on it comes first here, too. Numbers equal those of `run` to rounding; what a dropout
        draws is the compiler's::

            fast = model.compile(steer(place, vector, 4.0), capture=["blocks.10.hook_resid_post"])
            run = fast(inputs)
            run = fast(inputs, steer(place.at(pos=-1), other, 2.0))  # the graph is made anew: a position is an index
            run = fast(inputs, steer(place.at(pos=3), other, 1.0))  # the same graph

        Refused, with the reason: a model that no compiler can make one graph of, a module whose forward was replaced by
        an object, and functions that wait for the device. What a function of the user's captures besides tensors
        (numbers, say) is a constant of the graph, which is made anew when it changes.

        Args:
            plan: what is done where a call names no other plan.
            capture: sites to keep where a call names no others.
            backend: a compiler's name, or a function, as of `torch.compile`; ``"eager"`` and ``"aot_eager"`` make the
                graph alone.
            mode: of the compiler; with ``"reduce-overhead"`` a GPU replays CUDA graphs. Nothing that is not the call's
                own is written to.
            dynamic: whether sizes are unknowns of the graph; None: once a second size is seen.
            options: more of the compiler's.

        Raises:
            PlanError, SiteError: the plan or a site does not fit the model.
        """
        if self.tool is not None:
            raise ModelError(f"{self.tool.name} runs this model, and no compiler makes one graph of that: wrap a copy")
        self.refresh()
        if self.architecture.encoder is not None:
            raise ModelError("a model that decodes what it encodes is not compiled: use run()")
        if self.architecture.pooled:
            raise ModelError(
                f"{type(self.module).__name__} returns the logits of one token of each row, and a compiled model is to "
                "return those of all: use run()"
            )
        sites, todo = tuple(sites_of(capture)), as_plan(plan)
        check_plan(self, todo)
        for place in sites:
            check_site(self, place)
        return Compiled(
            self,
            Graphs(self, Options(backend, mode, dynamic, tuple((options or {}).items()))),
            todo,
            sites,
        )

    def _require_here(self) -> None:
        if getattr(self.tool, "remote", False):
            raise PlanError("a plan cannot be held on a model that runs elsewhere: run() and sweeps take it there")

    @property
    def holds(self) -> bool:
        """Whether `apply` holds a plan on the model at the moment."""
        return holds_on(self.module) is not None

    @property
    def held(self) -> tuple[Holding, ...]:
        """What is held on the model now, the outermost first: each plan, where it was applied, and what it did."""
        return listing(self.module)

    def held_on(self, inputs: Inputs) -> tuple[Plan, Audit]:
        """The plan that `apply` holds on the model, for a run on these inputs now, and its record; empty outside."""
        return held(self, inputs)

    def suspended(self) -> AbstractContextManager[None]:
        """Within it, calls and runs in this thread are as if none of the plans were held that are held now."""
        return gate_of(self.module).suspended()


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    adapter: Callable[[nn.Module], Architecture] | None = None,
    remote: bool | str = False,
) -> Model:
    """Wrap a model of the user's, which stays as it is.

    Args:
        model: of transformers, a language model of one of the families that are known or of one whose structure is
            (see the README), a BERT, or a ViT with a classifier; the project's own small transformer; or any module
            with an adapter; or one of these in a ``TransformerBridge`` of TransformerLens or in a model of nnsight's.
        tokenizer: for prompts that are text, and for printing tokens; or the processor of a model that sees, which has
            one within.
        adapter: a function that says where the model keeps its parts, for a family that is not known. Of a model that
            is wrapped already, tokenizer and adapter replace what it has. Of a model of peft's, `module` is the one
            that its layers were put into.
        remote: of a model of nnsight's, where its traces run: as nnsight's `trace` takes it.

    Raises:
        ModelError: nobody knows the model's parts, two layers are one module, or the model was compiled.
    """
    if isinstance(model, Model):
        if tokenizer is None and adapter is None:
            return model
        known = (model.processor or model.tokenizer) if tokenizer is None else tokenizer
        again = Model(model.module, *_reading(known, model.adapter if adapter is None else adapter))
        again.tool = model.tool
        return again
    tool = tool_of(model, remote)
    if tool is not None:
        known = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        wrapped = Model(tool.module, *_reading(known, adapter or tool.describe))
        wrapped.tool = tool
        return wrapped
    if not isinstance(model, nn.Module):
        raise ModelError(f"wrap() takes a torch module, not {type(model).__name__}")
    return Model(without_wrapper(model), *_reading(tokenizer, adapter or known_or_discovered))


def _reading(tokenizer: Any, adapter: Any) -> tuple[Any, Any, Any]:
    """A tokenizer, the adapter, and the processor that the tokenizer is a part of, if it was given in its place."""
    within = getattr(tokenizer, "tokenizer", None)
    return (tokenizer, adapter, None) if within is None else (within, adapter, tokenizer)


def known_or_discovered(module: nn.Module) -> Architecture:
    """The parts of a model, as its family's adapter says, or found out where nobody knows the family.

    Raises:
        ModelError: it cannot be described.
    """
    return (adapter_of(module) or discover)(module)
