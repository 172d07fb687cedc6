"""Layers of one checkpoint inside another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hooks import Model, ModelError


@contextmanager
def graft(
    model: Model, donor: Model | nn.Module | Mapping[str, Tensor], *, upto: int | None = None, start: int | None = None
) -> Iterator[tuple[str, ...]]:
    """Run a model with some layers' weights taken from another checkpoint, and train only the rest.

    Inside, the parameters and buffers named below are the donor's, as constants: they get no gradient, an optimizer of
    the model's parameters leaves them alone (theirs stay without a gradient of their own), and the model's own come
    back on leaving, whatever was raised. ``upto=l`` takes the embeddings and blocks 0 .. l-1: all that comes before
    block l. ``start=l`` takes blocks l, l+1, ..., the final norm and the unembedding. An unembedding that shares its
    weight with the embedding is grafted only where the half that it is in is.

    Args:
        model: the model that is run.
        donor: a model of the same shape, or its state dict (as `Checkpoints` saves it), on the same device and of the
            same dtype.
        upto: the first block that stays the model's own.
        start: the first block that is the donor's.

    Yields:
        The names of the parameters and buffers that are the donor's.

    Raises:
        ModelError: neither or both halves, a block that is not there, or a donor that is no model, or lacks a name or a
            shape.
    """
    given = upto if start is None else start
    both = (upto is None) == (start is None)
    if both or not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= model.n_layers:
        raise ModelError(
            f"graft takes either upto= or start=, from 0 to {model.n_layers}; got upto={upto}, start={start}"
        )
    if isinstance(donor, Mapping):
        weights = dict(donor)
    elif not isinstance(donor, (Model, nn.Module)):
        raise ModelError(f"a donor is a model or its state dict, not a {type(donor).__name__}")
    else:
        module = donor.module if isinstance(donor, Model) else donor
        weights = module.state_dict(keep_vars=True)
    arch = model.architecture
    if upto is not None:
        parts = [arch.embed, *([arch.pos_embed] if arch.pos_embed is not None else [])]
        parts += [block.module for block in arch.blocks[:upto]]
    else:
        parts = [*(block.module for block in arch.blocks[start:]), arch.norm, arch.unembed]
    names = {id(m): name for name, m in model.module.named_modules()}
    swaps = []
    for part in parts:
        for m in part.modules():
            for table in (m._parameters, m._buffers):
                for key, own in table.items():
                    if own is not None and key not in m._non_persistent_buffers_set:
                        name = f"{names[id(m)]}.{key}".lstrip(".")
                        swaps.append((table, key, own, _taken(weights, name, own), name))
    try:
        for table, key, _, other, _ in swaps:
            table[key] = other
        yield tuple(name for *_, name in swaps)
    finally:
        for table, key, own, _, _ in swaps:
            table[key] = own


def _taken(weights: Mapping[str, Tensor], name: str, own: Tensor) -> Tensor:
    """A donor's tensor, as a constant.

    Raises:
        ModelError: it is missing, or of another shape, dtype or device.
    """
    other = weights.get(name)
    if other is None:
        raise ModelError(f"the donor has no {name!r}")
    if (other.shape, other.dtype, other.device) != (own.shape, own.dtype, own.device):
        raise ModelError(
            f"{name}: the donor's is {other.dtype} {list(other.shape)} on {other.device}, the model's {own.dtype} "
            f"{list(own.shape)} on {own.device}"
        )
    return other.detach()
