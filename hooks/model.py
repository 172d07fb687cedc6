"""A wrapped model: what it offers, how it is run, and how a plan is held on it while the user runs it."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .adapters import describe
from .adapters.architecture import Architecture
from .applied import Applied, Held, PlanOf
from .audit import Audit
from .catalogue import SiteInfo, SiteTable, site_sizes
from .editing import Edits, check_reads
from .errors import InputsError, ModelError, PlanError, ShapeError, SiteError
from .html import table
from .images import check_pixels, require_size
from .inputs import Inputs, pad_rows
from .labels import class_id, class_names
from .plan import Intervention, Plan, World, as_plan
from .sites import DIM, HEAD, KINDS, POS, Index, Site, Span, site
from .tape import Tape
from .worlds import exposed_layers, hooked_pass, read_tapes

_HELD: WeakKeyDictionary[nn.Module, list[Applied]] = WeakKeyDictionary()
"""The plans that are held on each model at the moment, the outermost first."""


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
        found = []
        for name, kind in KINDS.items():
            keys = [key for key in self._places(name)]
            if not keys:
                continue
            size = self.sizes[Site(name, *keys[0][1:]).key]
            numbers = {"H": size.get(HEAD), "K": size.get(HEAD), "V": size.get(DIM), "M": size.get(DIM)}
            numbers |= {"D": size.get(DIM), "F": size.get(DIM)}
            letters = kind.letters.replace("T", str(size[POS])) if POS in size else kind.letters
            shape = tuple(size[POS] if c.isdigit() else c if c in "BTS" else numbers[c] for c in letters)
            hook = kind.hook if not kind.per_layer else f"blocks.{{}}.{kind.hook}"
            found.append(SiteInfo(name, hook, letters, shape, len(keys) if kind.per_layer else 0))  # type: ignore[arg-type]
        return SiteTable(found)

    def _places(self, name: str) -> list[tuple[str, int | None]]:
        if not KINDS[name].per_layer:
            return [(name, None)] if (name, -1, None) in self.sizes else []
        return [(name, layer) for layer in range(self.n_layers) if Site(name, layer).key in self.sizes]

    def require(self, where: Site) -> None:
        """Check that the model has a site, and the heads and dimensions that it names.

        Raises:
            SiteError: it does not.
        """
        if where.layer is not None and not -1 < where.layer < self.n_layers:
            raise SiteError(f"{where}: the model has layers 0 .. {self.n_layers - 1}")
        size = self.sizes.get(where.key)
        if size is None:
            names = [s.name for s in self.sites()]
            raise SiteError(f"{where}: this model has no site {where.name!r}; it has {', '.join(names)}")
        for axis in (HEAD, DIM):
            index: Index = getattr(where, axis)
            listed = index if isinstance(index, tuple) else (index,) if isinstance(index, int) else ()
            for i in listed:
                if not -size[axis] <= i < size[axis]:
                    raise SiteError(_no_such(where, axis, i, size[axis], self.architecture))

    def check(self, plan: Plan) -> None:
        """Check that a plan fits this model: its sites, heads and dimensions, and the widths of its values.

        Raises:
            SiteError, ShapeError, PlanError: it does not.
        """
        check_reads(plan, self.n_layers)
        for item in plan:
            self.require(item.site)
            for read in item.reads:
                if read.site is not None:
                    self.require(read.site)
                if isinstance(read.source, World):
                    self.check_inputs(read.source.inputs)
                    self.check(read.source.plan)
                elif isinstance(read.source, Plan):
                    self.check(read.source)
            self._check_values(item)

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that inputs are of the kind that this model takes, images of its size or token ids.

        Raises:
            InputsError: they are not.
        """
        images = self.architecture.images
        if (images is None) != (inputs.pixels is None):
            takes, given = ("token ids", "images") if images is None else ("images", "token ids")
            raise InputsError(f"{inputs!r} holds {given}, and {self!r} takes {takes}: prepare them with its inputs()")
        if images is not None and inputs.pixels is not None:
            require_size(inputs.pixels, images)

    def _check_values(self, item: Intervention) -> None:
        for read in item.reads:
            if isinstance(read.source, Tensor) and read.source.ndim == len(item.site.axes):
                for axis, n in zip(item.site.axes, read.source.shape, strict=True):
                    whole = self.sizes[item.site.key].get(axis)
                    if whole is not None and getattr(item.site, axis) is None and n != whole:
                        raise ShapeError(f"{item}: the source has {n} along {axis}, the site {whole}")
        where, size = item.site, self.sizes[item.site.key]
        last = size.get(DIM)
        if isinstance(where.dim, int):
            last = 1
        elif isinstance(where.dim, tuple):
            last = len(where.dim)
        elif isinstance(where.dim, Tensor):
            last = where.dim.shape[-1]
        elif isinstance(where.dim, Span) and last is not None:
            last = len(range(*slice(where.dim.start, where.dim.stop).indices(last)))
        for name, value in item.op.parameters().items():
            # Integers are positions or tokens, which are not laid out like the site.
            is_value = isinstance(value, Tensor) and value.ndim and value.is_floating_point()
            if is_value and last is not None and not isinstance(where.dim, int) and value.shape[-1] != last:
                raise ShapeError(f"{item}: {name} ends in {value.shape[-1]} entries, the site in {last}")

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
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, Inputs):
            raise InputsError("these are Inputs already")
        if self.architecture.images is not None:
            if mask is not None:
                raise InputsError("an image has no padding, so there is no mask to give")
            pixels = check_pixels(prompts, self.architecture.images)
            return Inputs.of_images(pixels, self.architecture.images.patch, row_ids)
        if isinstance(prompts, Tensor) and prompts.is_floating_point() and prompts.ndim > 2:
            raise InputsError(
                f"{self!r} is a language model: it takes texts or token ids, not pixels {list(prompts.shape)}"
            )
        if not isinstance(prompts, Tensor):
            listed = list(prompts)
            if not listed:
                raise InputsError("no prompt is given")
            if all(isinstance(p, int) for p in listed):
                listed = [listed]  # type: ignore[list-item]
            texts = [isinstance(p, str) for p in listed]
            if any(texts) and not all(texts):
                raise InputsError("prompts are texts or lists of token ids, not both in one list")
            if all(texts):
                listed = [self.encode(p) for p in listed]  # type: ignore[arg-type]
            odd = next((i for row in listed for i in row if isinstance(i, (bool, float, str))), None)
            if odd is not None:
                raise InputsError(f"token ids are integers, not {odd!r}")
            if mask is not None:
                raise InputsError("a mask goes with a tensor of ids; lists of ids are padded by themselves")
            empty = [i for i, row in enumerate(listed) if len(row) == 0]
            if empty:
                raise InputsError(f"rows {empty} have no token: an empty prompt cannot be run")
            prompts, mask = pad_rows(listed, padding)  # type: ignore[arg-type]
        elif padding not in ("left", "right"):
            raise InputsError(f"padding is 'left' or 'right', not {padding!r}")
        made = Inputs.of(prompts, mask, row_ids)
        # What stands at padding does not matter, but the embedding has to know it.
        made = replace(made, ids=made.ids.masked_fill(~made.mask, 0))
        real = made.ids[made.mask]
        if int(real.min()) < 0 or int(real.max()) >= self.architecture.vocabulary:
            bad = int(real.min()) if int(real.min()) < 0 else int(real.max())
            raise InputsError(f"token id {bad} is outside the vocabulary (0 .. {self.architecture.vocabulary - 1})")
        if self.tokenizer is None:
            return made
        rows = [row[m].tolist() for row, m in zip(made.ids, made.mask, strict=True)]
        return Inputs.of(made.ids, made.mask, row_ids, tuple(tuple(self.decode([i]) for i in row) for row in rows))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself."""
        if self.tokenizer is None:
            raise InputsError("a text needs a tokenizer: wrap(model, tokenizer), or give token ids")
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; a piece that begins a word keeps its space, whatever sign the tokenizer has for it. Of a
        classifier, the labels of classes.
        """
        if self.architecture.readout is not None:
            return class_names(self.module, ids)
        pieces = self.tokenizer.convert_ids_to_tokens(list(ids))
        return "".join(str(p) for p in pieces).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")

    def token(self, text: str) -> int:
        """The id of a text that is one token, or of a classifier's label.

        Raises:
            InputsError: it is not; the message shows its pieces.
        """
        if self.architecture.readout is not None:
            return class_id(self.module, text)
        if self.tokenizer is None:
            raise InputsError(f"{text!r} needs a tokenizer: wrap(model, tokenizer), or give a token id")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) == 1:
            return ids[0]
        pieces = [self.decode([i]) for i in ids]
        other = text.strip() if text != text.strip() else " " + text
        alternative = list(self.tokenizer(other, add_special_tokens=False)["input_ids"])
        hint = f"; {other!r} is one token here" if len(alternative) == 1 else ""
        raise InputsError(f"{text!r} is {len(ids)} tokens, {pieces}: an answer is one token{hint}")

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the user's model, called as plainly as the inputs allow; [B, 1, V] of a classifier."""
        if pixels is not None:
            # In the model's dtype, as it would bring them into by itself.
            output = self.module(pixel_values=pixels.to(self.device, self.dtype))
            logits = output if isinstance(output, Tensor) else output.logits
            return logits if self.architecture.readout is None else logits.unsqueeze(1)
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if not bool(mask.all()):
            arguments |= {"attention_mask": mask.long().to(self.device), "position_ids": positions.to(self.device)}
        if hasattr(getattr(self.module, "config", None), "use_cache"):
            arguments["use_cache"] = False
        output = self.module(**arguments)
        return output if isinstance(output, Tensor) else output.logits

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
        sites = [site(c) for c in ([capture] if isinstance(capture, (str, Site)) else capture)]
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

    @contextmanager
    def apply(self, plan: Plan | Intervention | PlanOf, *, seed: int = 0) -> Iterator[Audit]:
        """Hold a plan on the model while the user calls it: any forward, or a training step.

        Inside another one, and for `run` and sweeps inside, the outer plan comes first: together they are one plan.
        The model is as it was afterwards, whatever was raised inside. Gradients flow through the interventions. Where
        the plan reads this world unedited or under another plan, each call is made once more for it, with the same
        dropout.

        Args:
            plan: a plan; or a function from the `Inputs` of a call (ids, mask, positions) to a plan, for one whose
                positions or values depend on the batch.
            seed: seed of random interventions.

        Yields:
            The audit, which grows with every forward pass (what gradient checkpointing computes again is not counted).

        Raises:
            UnfiredError: on leaving without an exception, where an intervention never fired.
            PlanError: a call that continues from a key/value cache, whose earlier tokens the plan has not seen.
        """
        mine = Held.of(plan)
        if isinstance(mine.plan, Plan):
            self.check(mine.plan)
        outer = self._held[-1] if self._held else None
        # A plan inside another one is one plan, so that it sees what the outer one did, within a layer too.
        applied = Applied(self, (*(outer.held if outer else ()), mine), seed)
        if outer is not None:
            outer.remove()
        try:
            applied.install()
            self._held.append(applied)
            try:
                yield mine.audit
            finally:
                self._held.pop()
                applied.remove()
        finally:
            if outer is not None:
                outer.install()
        mine.require_fired()

    @property
    def _held(self) -> list[Applied]:
        # By module: two wrappers of one model hold their plans on the same one.
        return _HELD.setdefault(self.module, [])

    @property
    def holds(self) -> bool:
        """Whether `apply` holds a plan on the model at the moment."""
        return bool(self._held)

    def held_on(self, inputs: Inputs) -> tuple[Plan, Audit]:
        """The plan that `apply` holds on the model at the moment, on these inputs, and its record; empty outside."""
        return self._held[-1].on(inputs) if self._held else (Plan(), Audit())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Take the hooks of the plan that is held off the model, and put them back."""
        applied = self._held.pop() if self._held else None
        if applied is None:
            yield
            return
        applied.remove()
        try:
            yield
        finally:
            applied.install()
            self._held.append(applied)

    def unshareable(self) -> str:
        """Why the copy-on-write executor cannot be exact on this model as it is now; empty where it can."""
        if any(module.training for module in self.module.modules()):
            return "the model is in training mode"
        for name, module in self.module.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                return f"there are hooks of yours on {name or 'the model'}"
        return ""

    def bytes_per_token(self) -> int:
        """About how many bytes of activations one token takes in a pass that is not trained."""
        arch, block = self.architecture, self.architecture.blocks[0]
        numbers = 8 * arch.width + 3 * (block.q.heads + 2 * block.k.heads) * block.q.width
        if block.mlp is not None:
            numbers += 3 * block.mlp.width
        return numbers * self.dtype.itemsize


def wrap(
    model: nn.Module | Model, tokenizer: Any = None, *, adapter: Callable[[nn.Module], Architecture] | None = None
) -> Model:
    """Wrap a model of the user's, which stays as it is.

    Args:
        model: a GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2, Qwen 3 or Gemma 2 with a language-model head or a ViT with a
            classifier (of transformers), the project's own small transformer, or any module with an adapter.
        tokenizer: for prompts that are text, and for printing tokens.
        adapter: a function that says where the model keeps its parts, for a family that is not known.

    Raises:
        ModelError: nobody knows the model's parts.
    """
    if isinstance(model, Model):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"wrap() takes a torch module, not {type(model).__name__}")
    return Model(model, tokenizer, (adapter or describe)(model))


def _no_such(where: Site, axis: str, index: int, size: int, arch: Architecture) -> str:
    if axis == DIM:
        return f"{where}: the last axis has {size} entries, {index} is not among them"
    heads, groups = arch.blocks[0].q.heads, arch.blocks[0].k.heads
    text = f"{where}: there is no head {index}, the site has {size} (0 .. {size - 1})"
    if size == groups < heads and index < heads:
        text += (
            f"; this model has {heads} query heads but {groups} key/value heads, and {where.name} is per key/value head"
        )
        text += f": query head {index} reads key/value head {index * groups // heads}"
    return text
