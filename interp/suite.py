"""Whether what is said of a model is true of it: every site, executor and identity, and decoding, on a few tokens.

An adapter that is written for a new family is held to the same as those that ship with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hooks import (
    HEAD,
    KINDS,
    Inputs,
    InputsError,
    InterpError,
    Model,
    Plan,
    Site,
    World,
    choose,
    patch,
    run_worlds,
)
from interp.checks import Check, Conformance
from interp.paths import check_additive
from interp.trial import Trial

EXECUTORS = ("sequential", "batched", "shared")
LENGTHS = (7, 5)
"""Tokens of the two rows that are run, the shorter one padded."""


def conformance(model: Model, inputs: Inputs | None = None, *, seed: int = 0) -> Conformance:
    """Try all that a wrapped model offers, and compare each with the model itself.

    For every kind of site: that it is read with the shape that it announces, that putting back what was read changes
    nothing, and that an edit changes the logits. That the executors agree on all of these. That the stream is the sum
    of what is added to it, attention what its pattern makes of the values, and the logits what the unembedding makes of
    the last states. That padding changes nothing, and that a plan that is held while the model decodes with a cache
    does what it does without one. Whether the graph of paths describes the model.

    Args:
        model: a wrapped model in eval mode; tiny ones take seconds.
        inputs: two rows or more, of different lengths; by default random tokens (or images).
        seed: of these and of the edits.

    Returns:
        The report, which is true if everything held, and prints itself.
    """
    suite = _Suite(model, _inputs(model, seed) if inputs is None else inputs, seed)
    checks: list[Check] = []
    for part in (suite.sites, suite.executors, suite.identities, suite.padding, suite.generation, suite.paths):
        checks += part()
    return Conformance(model.architecture.family, tuple(checks))


def _inputs(model: Model, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    images = model.architecture.images
    if images is not None:
        return model.inputs(torch.randn(2, images.channels, images.height, images.width, generator=generator))
    config: Any = getattr(model.module, "config", None)
    told = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    special = {one for value in told for one in (value if isinstance(value, (list, tuple)) else [value])}
    usable = torch.tensor([i for i in range(model.architecture.token_ids) if i not in special])
    rows = [usable[torch.randint(len(usable), (n,), generator=generator)].tolist() for n in LENGTHS]
    if model.architecture.encoder is not None:
        return model.inputs(rows, decoded=[row[: len(row) - 3] for row in reversed(rows)])
    return model.inputs(rows, padding="left" if model.architecture.pools_last else "right")


class _Suite(Trial):
    # -- sites

    def sites(self) -> list[Check]:
        """Each kind of site is read, put back without effect, and edited with one."""
        model, found = self.model, []
        _, self.plain = self.returned()
        for place in self.places:
            found.append(self.tried("sites", str(place), lambda place=place: self.site(place)))
        offered = {s.name for s in model.sites()}
        for name in KINDS:
            reason = "" if name in offered else model.why_not(name)
            if reason:
                found.append(Check("sites", name, None, reason))
        return found

    def site(self, place: Site) -> Check:
        model, name = self.model, str(place)
        run, read = self.returned(capture=[place])
        value = self.values[place] = run.tape[place]
        wanted = [model.sizes[place.key].get(axis, None) for axis in place.axes]
        if any(n is not None and n != size for n, size in zip(wanted, value.shape, strict=True)):
            return Check("sites", name, False, f"its shape is {list(value.shape)}, announced {wanted}")
        assert self.plain is not None
        if (gap := self.near(read, self.plain)) > self.allowed:
            return Check("sites", name, False, f"reading it changes the logits by {gap:.1e}")
        _, same = self.returned(patch(place, World(self.inputs)))
        if (gap := self.near(same, self.plain)) > self.allowed:
            return Check("sites", name, False, f"putting back what was read changes the logits by {gap:.1e}")
        if not place.axes.count(HEAD) and place.name == "router" and model.sizes[place.key]["dim"] < 2:
            return Check("sites", name, True)
        _, edited = self.returned(self.edit(place))
        gap = self.near(edited, self.plain)
        return Check("sites", name, gap > 0, "" if gap > 0 else "an edit of it changes nothing that is returned")

    # -- executors

    def executors(self) -> list[Check]:
        """The executors read the same everywhere, and make the same of an edit of every kind."""
        model, x = self.model, self.inputs
        places = [place for place in self.places if place in self.values and place.name != "pooled"]
        worlds = [World(x), *(World(x, Plan((self.edit(place),))) for place in places)]
        reads = [self.ends[0], *places]
        choice = choose(model, worlds)
        found, base = [], None
        for executor in EXECUTORS:
            if executor == "shared" and choice.executor != "shared":
                found.append(Check("executors", executor, None, choice.reason.partition(": ")[2]))
                continue

            def what(executor: str = executor) -> Check:
                nonlocal base
                got: list[Sequence[Tensor]] = [()] * len(worlds)
                for index, world in ((0, worlds[:1]), (1, worlds[1:])):
                    wanted = reads if index == 0 else self.ends[:1]
                    for outcome in run_worlds(model, world, wanted, executor=executor):
                        got[index + outcome.index] = outcome.values
                if base is None:
                    base = got
                for number, (one, two) in enumerate(zip(got, base, strict=True)):
                    for place, a, b in zip(reads, one, two, strict=False):
                        gap = self.near(self.seen(place, a), self.seen(place, b))
                        if not gap <= self.allowed:
                            told = f"{place}{f' under {worlds[number].plan}' if number else ''} differs by {gap:.1e}"
                            return Check("executors", executor, False, told)
                return Check("executors", executor, True)

            found.append(self.tried("executors", executor, what))
        return found

    def seen(self, place: Site, value: Tensor) -> Tensor:
        """The entries of a site that are of real tokens."""
        if value.shape[1] == 1 and place.name in ("logits", "pooled"):
            return value
        mask, keys = (columns.real.to(value.device) for columns in self.inputs.tokens_of(place))
        if place.name in ("scores", "pattern"):
            return torch.where(mask[:, None, :, None] & keys[:, None, None, :], value, 0)
        return value[mask]

    # -- identities

    def identities(self) -> list[Check]:
        """What the parts of a model are to one another."""
        found = []
        for layer in self.layers:
            for name, what in (("stream", self.stream), ("heads", self.heads), ("attention", self.attention),
                               ("experts", self.mixture)):  # fmt: skip
                check = self.tried("identities", f"{name} of layer {layer}", lambda what=what, at=layer: what(at))
                found.append(check)
        found.append(self.tried("identities", "logits", self.unembedding))
        return [check for check in found if check.detail != "-"]

    def get(self, name: str, layer: int | None = None) -> Tensor:
        return self.values[Site(name, layer)]

    @torch.no_grad()
    def stream(self, layer: int) -> Check:
        block, name = self.model.architecture.blocks[layer], f"stream of layer {layer}"
        x = self.get("resid_pre", layer) + self.get("attn_out", layer)
        if self.model.architecture.cross is not None:
            x = x + self.values[Site("attn_out", layer, "cross")]
        if block.parallel or block.mlp is None:
            x = x if block.mlp is None else x + self.get("mlp_out", layer)
        else:
            x = block.of_attention.summed(x)
            if (gap := self.near(x, self.get("resid_mid", layer))) > self.allowed:
                return Check("identities", name, False, f"resid_mid is not what was added so far ({gap:.1e})")
            x = block.sublayers[-1].summed(x + self.get("mlp_out", layer))
        return self.compared("identities", name, x, self.get("resid_post", layer))

    @torch.no_grad()
    def heads(self, layer: int) -> Check:
        block, name = self.model.architecture.blocks[layer], f"heads of layer {layer}"
        z = self.get("z", layer)
        return self.compared(
            "identities",
            name,
            block.of_attention.added(block.attention.out(z.flatten(-2))),
            self.get("attn_out", layer),
        )

    @torch.no_grad()
    def attention(self, layer: int) -> Check:
        block, name = self.model.architecture.blocks[layer], f"attention of layer {layer}"
        if block.attention.opaque:
            return Check("identities", name, None, "-")
        pattern, v = self.get("pattern", layer), self.get("v", layer)
        share = block.attention.q.heads // block.attention.k.heads
        z = torch.einsum("bhts,bshd->bthd", pattern, v.repeat_interleave(share, 2))
        sums = pattern.sum(-1)
        most = float(sums.max())
        whole = block.attention.sinks is not None or float((sums - 1).abs()[:, :, -1].min()) <= self.allowed
        if most > 1 + self.allowed or not whole:
            return Check("identities", name, False, f"a pattern sums to {most:.3f}")
        return self.compared("identities", name, self.seen_tokens(z), self.seen_tokens(self.get("z", layer)))

    def seen_tokens(self, value: Tensor) -> Tensor:
        return value[self.inputs.mask.to(value.device)]

    @torch.no_grad()
    def mixture(self, layer: int) -> Check:
        block, name = self.model.architecture.blocks[layer], f"experts of layer {layer}"
        if Site("expert_out", layer).key not in self.model.sizes or block.mlp is None:
            return Check("identities", name, None, "-")
        around, parts = block.of_mlp, self.get("expert_out", layer)
        assert around is not None
        x, mlp = around.read(self.get("mlp_in", layer)).flatten(0, 1), block.mlp
        out = around.added(mlp.joined(parts.flatten(0, 1), x))  # type: ignore[union-attr]
        out = out.view_as(self.get("mlp_out", layer))
        return self.compared("identities", name, self.seen_tokens(out), self.seen_tokens(self.get("mlp_out", layer)))

    @torch.no_grad()
    def unembedding(self) -> Check:
        arch = self.model.architecture
        last = Site("resid_post", self.model.n_layers - 1)
        if arch.headless:
            return Check("identities", "logits", None, "-")
        states = self.get("ln_final") if Site("ln_final") in self.values else self.values[last]
        states = states if arch.readout is None else states[:, arch.readout : arch.readout + 1]
        return self.compared("identities", "logits", self.real(arch.logits(states)), self.real(self.get("logits")))

    # -- padding and decoding

    def padding(self) -> list[Check]:
        """What a row gives does not depend on the padding beside it, on either side."""
        x = self.inputs
        if x.pixels is not None:
            return []
        rows, after = self.rows(x), None if x.source is None else self.rows(x.source)
        told = [self.again([row], None if after is None else after[r : r + 1]) for r, row in enumerate(rows)]
        alone = [self.model.run(one).output[0] for one in told]

        def beside(side: str) -> Check:
            padded = self.again(rows, after, side)
            try:
                logits = self.model.run(padded).output
            except InputsError as error:
                return Check("identities", f"{side} padding", None, str(error))
            mine = torch.cat([logits[r][padded.mask[r].to(logits.device)] for r in range(len(rows))])
            return self.compared("identities", f"{side} padding", mine, torch.cat(alone))

        if self.model.architecture.readout is not None:
            return []
        return [self.tried("identities", f"{side} padding", lambda s=side: beside(s)) for side in ("left", "right")]

    @staticmethod
    def rows(x: Inputs) -> list[list[int]]:
        """The real tokens of each row."""
        return [x.ids[row][x.mask[row]].tolist() for row in range(len(x))]

    def again(self, rows: list[list[int]], after: list[list[int]] | None, side: str = "right") -> Inputs:
        """Inputs of rows, which are decoded of others where those are encoded."""
        if after is None:
            return self.model.inputs(rows, padding=side)
        return self.model.inputs(after, decoded=[row[1:] for row in rows], padding=side)

    def generation(self) -> list[Check]:
        """A plan that is held while the model decodes with a cache does what it does where there is none."""
        module: Any = self.model.module
        causal = all(block.attention.causal for block in self.model.architecture.blocks)
        can = getattr(module, "can_generate", None)
        if not callable(can) or not can() or not causal or self.inputs.pixels is not None:
            return [Check("generation", "greedy, with a cache", None, "the model does not generate")]

        def what() -> Check:
            layer = self.layers[len(self.layers) // 2]
            rows = self.rows(self.inputs if self.inputs.source is None else self.inputs.source)
            pads = [max(map(len, rows)) - len(row) for row in rows]
            ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)])
            edits = [self.edit(Site("v", layer)), self.edit(Site("resid_post", layer))]
            if self.inputs.source is not None:
                # The prompt of a decoder is its start token, so what it does with all tokens is edited.
                edits = [replace(one, site=one.site.at(pos=None)) for one in edits]
                edits += [self.edit(Site("resid_post", layer, "encoder")), self.edit(Site("v", layer, "cross"))]
            plan = Plan(tuple(edits))
            call = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0,
                       "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
            said = []
            for use_cache in (True, False):
                with torch.no_grad(), self.model.apply(plan):
                    said.append(torch.stack(module.generate(**call, **options, use_cache=use_cache).logits))
            with torch.no_grad():
                free = torch.stack(module.generate(**call, **options).logits)
            if not self.near(free[0], said[0][0]) > 0:
                return Check("generation", "greedy, with a cache", False, "what is held changes nothing")
            return self.compared("generation", "greedy, with a cache", said[0], said[1])

        return [self.tried("generation", "greedy, with a cache", what)]

    def paths(self) -> list[Check]:
        """Whether the residual stream is the sum of what the graph of paths has for writers."""
        if self.model.architecture.headless:
            return [Check("paths", "a graph of writers and readers", None, "it ends with logits, and there is no head")]
        try:
            check_additive(self.model, self.inputs, tolerance=self.allowed)
        except InterpError as error:
            return [Check("paths", "a graph of writers and readers", None, str(error))]
        return [Check("paths", "a graph of writers and readers", True)]
