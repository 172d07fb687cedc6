"""A wrapped model: what it offers, how it is run, and how a plan is held on it while the user runs it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from .asked import asked, parted
from .audit import Audit
from .backends.gate import gate_of
from .capturing import captured
from .compiled import Compiled
from .compiling import Graphs, Options
from .errors import InputsError, ModelError, PlanError
from .forking import Begin, Branch, Combine
from .generated import Generated
from .generation import generate
from .hold import fork, held, hold, holds_on, listing
from .holding import Holding, PlanOf
from .models.catalogue import SiteInfo, SiteTable, has_none, site_table, why_missing
from .models.checks import check_inputs, check_plan, check_site
from .plan.inputs import Inputs
from .plan.plan import Intervention, Plan, World, as_plan
from .plan.region import Region, resolve
from .plan.sites import Site, sites_of
from .plan.tape import Tape
from .reader import Reader
from .record import record
from .running import Run


class Model(Reader):
    """A transformer, wrapped but never changed: hooks stand on it only while a plan is applied.

    Attributes:
        module: the user's model.
        tokenizer: what turns prompts into ids, or None.
        processor: what turns prompts and images into ids and pixels, or None.
        architecture: where the model keeps its parts.
        sizes: sizes of the head and last axes of every site, by key.
    """

    def _repr_html_(self) -> str:
        return f"<div><code>{html.escape(repr(self))}</code></div>{self.sites()._repr_html_()}"

    def sites(self) -> SiteTable:
        """Every site that the model offers, with its shape; all are readable and writable."""
        self.refresh()
        return site_table(self.sizes, self.n_layers)

    def why_not(self, name: str) -> str:
        """Why the model has no site of some kind, where it might have; empty where nothing of the kind is there."""
        return "" if has_none(self.architecture, name) else why_missing(self.architecture, name, 0)

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
        inputs, plan = asked(inputs, plan, "run()")
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

    def generate(
        self,
        prompts: Any,
        plan: Plan | Intervention | PlanOf | None = None,
        *,
        capture: Sequence[Site | SiteInfo | str] | Site | SiteInfo | str = (),
        logits: bool = False,
        seed: int = 0,
        mask: Tensor | None = None,
        images: Any = None,
        bos: bool | None = None,
        **options: Any,
    ) -> Generated:
        """Generate under a plan, by the model's own `generate`; what a plan means meanwhile is said of `apply`.

            out = model.generate("The sky is", steer, max_new_tokens=8, capture="blocks.3.hook_resid_post")
            out.texts, out.tokens, out["blocks.3.hook_resid_post"]

        Args:
            prompts: a text or several, or token ids, as of `inputs`, which are padded on the left; or `Inputs` that
                are; or a `World`, which brings its own plan.
            plan: what is held meanwhile; None for nothing. Or a function from the `Inputs` of each call to a plan.
            capture: sites to keep of every token that is fed, as edited.
            logits: whether to keep those of every step.
            seed: of random interventions. What sampling draws is torch's: ``torch.manual_seed``.
            mask, images, bos: of the prompts, as of `inputs`.
            options: of `generate` of transformers: ``max_new_tokens``, ``do_sample``, ``num_beams``, ...

        Raises:
            ModelError: the model does not generate.
            InputsError: prompts padded on the right, or an option that says what the prompt is.
            PlanError: a cache that cannot be made here, continuous batching, or a way of decoding that goes on from
                other texts than the prompts.
            UnfiredError: an intervention never fired.
        """
        self._require_here()
        prompts, plan = parted(prompts, plan)
        if not isinstance(prompts, Inputs):
            prompts = self.inputs(prompts, mask, images=images, padding="left", bos=bos)
        elif mask is not None or images is not None or bos is not None:
            raise InputsError("these are Inputs already, which have their mask and images")
        self.refresh()
        return generate(self, prompts, plan, capture, logits, seed, self.tokenizer, options)

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
