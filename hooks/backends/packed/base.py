"""What worlds on one input share: the run without any plan, as far as they need it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...layout import Layout
from ...meter import Meter
from ...models.network import Network
from ...models.positions import Rotary
from ...plan.inputs import Inputs
from ...plan.plan import World
from ...plan.region import Region
from ...plan.sites import Key, Site, execution_order
from .attention import seen_by

COMPANIONS = {
    "q_input": ("attn_in", "q"),
    "k_input": ("attn_in", "k"),
    "v_input": ("attn_in", "v"),
    "scores": ("z", "rot_q", "rot_k", "v"),
    "pattern": ("z", "rot_q", "rot_k", "v"),
    "result": ("z",),
    "ln1_scale": ("ln1",),
    "ln2": ("resid_mid",),
    "ln2_scale": ("ln2", "resid_mid"),
    "ln_final_scale": ("ln_final",),
    "mlp_pre": ("mlp_in", "resid_mid"),
    "mlp_pre_linear": ("mlp_in", "resid_mid", "mlp_pre"),
    "mlp_post": ("mlp_in", "resid_mid"),
    "router": ("mlp_in", "resid_mid"),
    "expert_out": ("mlp_in", "resid_mid"),
    "mlp_in": ("resid_mid",),
    "mlp_out": ("resid_mid",),
    "pos_embed": ("embed",),
    "logits": ("ln_final",),
}
"""Sites whose base value an edit at another one needs besides its own."""
COPIES = frozenset({"q_input", "k_input", "v_input", "result"})
"""Sites that hold a copy of the residual stream for every head, of which the base's are kept only to be read."""
ATTENDED = ("rot_q", "rot_k", "v")
"""Sites whose base value worlds need that spread from token to token: what others ask with, and what they see."""
BESIDE = ("attn_out", "mlp_out")
"""The same in a parallel block, where attention may have changed tokens that the MLP has not, and the reverse."""


def record_keys(keys: Iterable[Key]) -> frozenset[Key]:
    """The sites of which the base's value is needed where worlds edit or keep `keys`."""
    keys = set(keys)
    more = {(name, layer, stack) for at, layer, stack in keys for name in COMPANIONS.get(at, ())}
    return frozenset(keys | more)


def first_spread(worlds: Iterable[World], inputs: Inputs, depth: int) -> int:
    """The first layer at which some world may differ from its base in some tokens and not in others."""
    first = depth
    known: set[Key] = set()
    for world in worlds:
        if world.inputs is not inputs:
            return 0
        for item in world.plan.interventions:
            site = item.site
            if site.key in known:
                continue
            whole = site.name == "embed" and not site.restricted and item.only is None and not item.op.still
            # Padding stays as it is, so rows with some are never edited whole.
            if not whole or inputs.padded:
                first = min(first, max(0, execution_order(site.key, depth)[0]))
                known.add(site.key)
    return first


@dataclass(eq=False)
class Base:
    """One batch of rows, its run without a plan, and what is read of the worlds that are run against it.

    Attributes:
        network: the model.
        whole: the inputs.
        window: the rows of them that are run.
        reads: the sites whose values are wanted of every world.
        exposed: layers whose attention is computed with its inside exposed, for every world alike.
        recorded: sites of which the base's value will be needed, besides those by which worlds spread.
        spread: the first layer at which worlds may differ from it in some tokens and not in others.
        trim: whether tokens that no read depends on may be dropped.
        values: the base's value [b * T, ...] of the sites that are recorded, by key.
        meter: counts the work.
    """

    network: Network
    whole: Inputs
    window: slice
    reads: Sequence[Site]
    exposed: frozenset[int]
    recorded: frozenset[Key]
    spread: int = 0
    trim: bool = True
    values: dict[Key, Tensor] = field(default_factory=dict)
    meter: Meter | None = None
    logits: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.arch, self.sizes, self.device = self.network.architecture, self.network.sizes, self.network.device
        depth = len(self.arch.blocks)
        self.inputs = self.whole.rows(self.window)
        self.whole_layout = Layout.of(self.whole)
        self.layout = self.whole_layout.window(self.window)
        self.stop = max((execution_order(r.key, depth)[0] for r in self.reads), default=-1)
        # The base goes on to whatever worlds may need of it, also where no read depends on that.
        self.last = max([self.stop, *(execution_order(key, depth)[0] for key in self.recorded)])
        self._angles: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        real = self.layout.queries.real
        self.needed = [real] * depth
        if self.trim and all(r.name == "logits" for r in self.reads) and self.reads:
            read = torch.zeros_like(real)
            for r in self.reads:
                region = self.region(r)
                marks = torch.ones_like(region.cols, dtype=torch.bool)
                if region.valid is not None:
                    marks = region.full_valid()[..., 0]
                read |= torch.zeros_like(real).scatter(1, self.unembedded(region), marks)
            # What is read depends on the tokens that attention sees from there, at every layer but the last.
            self.needed = [real & seen_by(read, self.causal)] * (depth - 1) + [read & real]

    @property
    def causal(self) -> bool:
        """Whether tokens see those before them alone, in every layer."""
        return all(block.attention.causal for block in self.arch.blocks)

    def keeps(self, key: Key) -> bool:
        """Whether worlds may need its value of a site."""
        name, layer, _ = key
        if key in self.recorded:
            return True
        if name == "resid_pre" or name == "resid_post":
            return self.spread <= (0 if name == "resid_pre" else layer + 1) < len(self.arch.blocks)
        if layer < self.spread:
            return False
        return name in ATTENDED or (name in BESIDE and self.arch.blocks[layer].parallel)

    def region(self, site: Site) -> Region:
        """A read resolved on these rows, as wide as on all of them."""
        make = self.whole_layout.resolve if site.restricted else self.whole_layout.entire
        return make(site, self.sizes[site.key]).rows(self.window)

    def unembedded(self, region: Region) -> Tensor:
        """int64 [b, n]: the columns of the final states that a part of the logits is made of."""
        return region.cols if self.arch.readout is None else torch.full_like(region.cols, self.arch.readout)

    def embedded(self, inputs: Inputs, chosen: Tensor) -> Tensor:
        """Embeddings [N, M] of the tokens of a batch that are chosen, bool [b, T]."""
        if self.arch.positioned:
            rows = chosen.any(1)
            ids, positions = inputs.ids[rows].to(self.device), inputs.positions[rows].to(self.device)
            whole = self.arch.embed(ids, position_ids=positions + self.arch.first_position)
            return whole[chosen[rows].to(self.device)]
        if inputs.pictures is not None:
            return self.with_features(inputs, chosen)
        if inputs.pixels is None:
            return self.arch.embedded(inputs.ids[chosen].to(self.device))
        rows = chosen.any(1)
        like = next(self.arch.embed.parameters())
        whole = (self.arch.look or self.arch.embed)(inputs.pixels[rows].to(self.device, like.dtype))
        return whole.flatten(0, 1).index_select(0, chosen[rows].flatten().nonzero().squeeze(1).to(self.device))

    def with_features(self, inputs: Inputs, chosen: Tensor) -> Tensor:
        """Embeddings [N, M] of the tokens of prompts with images, whose features stand in the place of some."""
        assert inputs.pictures is not None
        embedded = self.arch.embedded(inputs.ids[chosen].to(self.device))
        places = chosen & (inputs.pictures.image >= 0)
        rows = places.any(1)
        if not bool(rows.any()):
            return embedded
        seen = inputs.pictures.rows(rows)
        # Their features fill the places of these rows in order, and of those the chosen ones are taken.
        order = (seen.image >= 0).flatten().cumsum(0).reshape(seen.image.shape) - 1
        wanted = order[places[rows]].to(self.device)
        where = places[chosen].nonzero().flatten().to(self.device)
        features = self.network.features(inputs.ids[rows], inputs.mask[rows], seen)
        return embedded.index_copy(0, where, features.index_select(0, wanted).to(embedded.dtype))

    def angles(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [b * T, R] of all tokens of the layout, whichever of them a world computes again."""
        memo = (id(rotary), dtype)
        if memo not in self._angles:
            found = rotary(self.layout.queries.turned.to(self.device), dtype)
            shape = self.layout.queries.real.shape
            cos, sin = (x.expand(*shape, x.shape[-1]).flatten(0, 1) for x in found)
            self._angles[memo] = (cos, sin)
        return self._angles[memo]
