"""What a model wrote under a plan: tokens, text, and what was kept of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .audit import Audit
from .errors import SiteError, nearest
from .html import table
from .plan.inputs import Inputs
from .plan.sites import Key, Site, site
from .text import Text


@dataclass(frozen=True, eq=False)
class Generated:
    """What `Model.generate` gives back: R rows, which are those of the prompts unless several are returned of each.

    Indexed with a site, in either spelling, it gives what was kept there: ``out[site("z", layer=3)]`` is [R, C, H, D],
    as edited, along the C tokens of prompt and answer that the model was fed, 0 at padding (scores -inf); of a site
    that names heads, dimensions or positions a part, as of a tape. Positions are those of the plan: ``-1`` is the
    prompt's last token, ``"new"`` are those that were generated; the last of these was never fed, so there are S - 1.

    Attributes:
        prompts: what was given, padded on the left, P columns.
        sequences: int64 [R, P + S], prompts and what was generated, on the CPU.
        mask: bool [R, P + S], False at padding: before a prompt, and once a row has ended.
        rows: int64 [R], the prompt that each row goes on from.
        texts: what was generated, without special tokens; None without a tokenizer.
        logits: [R, S, V], those that each token was chosen from, as the model computed them (in float32), before
            temperature and the like; nan once a row has ended. None where they were not asked for.
        audit: what each intervention did.
        output: what `generate` of transformers returned.
        values: pairs of a site and what was kept there, [R, P + S - 1, ...].
        sizes: of the head and last axes of each kept site.
    """

    prompts: Inputs
    sequences: Tensor
    mask: Tensor
    rows: Tensor
    texts: tuple[str, ...] | None
    logits: Tensor | None
    audit: Audit
    output: Any
    values: tuple[tuple[Site, Tensor], ...] = ()
    sizes: Mapping[Key, dict[str, int]] | None = None

    @property
    def tokens(self) -> Tensor:
        """int64 [R, S], what was generated."""
        return self.sequences[:, self.prompts.width :]

    @property
    def lengths(self) -> Tensor:
        """int64 [R], how many tokens of each row were generated, with the one by which it ended."""
        return self.mask[:, self.prompts.width :].sum(1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, where: Site | str) -> Tensor:
        wanted = site(where)
        for kept, value in self.values:
            if kept == wanted:
                return value
            if kept.key == wanted.key:
                assert self.sizes is not None
                return self._text.layout(0, None, {}).resolve(wanted, self.sizes[wanted.key]).get(value)
        if wanted.name == "logits":
            raise SiteError("the logits of every step are `logits`, of a generation with logits=True")
        kept = [str(place) for place, _ in self.values]
        raise SiteError(f"{wanted} was not kept{nearest(str(wanted), kept)}; kept is {', '.join(kept) or 'nothing'}")

    @property
    def _text(self) -> Text:
        fed, prompts = self.mask[:, :-1], self.prompts
        lengths = prompts.mask.sum(1)[self.rows]
        return Text(fed, prompts.width, lengths, self.rows, len(prompts))

    def _repr_html_(self) -> str:
        did = self.audit._repr_html_() if len(self.audit) else ""
        told = self._told()
        return table(("prompt", "answer"), told, repr(self)) + did

    def _told(self) -> list[tuple[str, str]]:
        texts = self.texts
        if texts is None:
            texts = tuple(" ".join(map(str, row[m].tolist())) for row, m in zip(*self._answers(), strict=True))
        asked = ["".join(self.prompts.labels(row)) for row in range(len(self.prompts))]
        return [(asked[int(row)], text) for row, text in zip(self.rows, texts, strict=True)]

    def _answers(self) -> tuple[Tensor, Tensor]:
        return self.tokens, self.mask[:, self.prompts.width :]

    def __str__(self) -> str:
        return "\n".join(f"{asked!r} -> {text!r}" for asked, text in self._told())

    def __repr__(self) -> str:
        return f"Generated({len(self)} row{'s' * (len(self) != 1)}, {self.tokens.shape[1]} new tokens)"


def until_end(tokens: Tensor, ends: Sequence[int], pad: int | None) -> Tensor:
    """bool [R, S], which of the tokens [R, S] belong to a row's answer: all up to the first that ends it.

    Args:
        ends: ids of tokens that end a row.
        pad: what a row is filled up with that ended without one of these (by a text that stops it); None where no row
            ends so.
    """
    over = torch.isin(tokens, torch.tensor(list(ends), dtype=torch.int64)).long()
    real = over.cumsum(1) - over == 0
    if pad is None:
        return real
    filler = (tokens == pad).flip(1).long().cumprod(1).flip(1).bool()
    return real & (over.bool() | ~filler)
