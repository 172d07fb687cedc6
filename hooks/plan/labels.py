"""The names that a classifier's config has for its classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import InputsError, nearest


def class_id(module: nn.Module, label: str) -> int:
    """The id of a class by its label.

    Raises:
        InputsError: no class has it, or several have.
    """
    config = getattr(module, "config", None)
    known: dict[str, int] = getattr(config, "label2id", None) or {}
    named = sorted(int(i) for i, name in (getattr(config, "id2label", None) or {}).items() if name == label)
    if len(named) > 1:
        raise InputsError(f"{label!r} names several classes, {named}: give the id of one")
    if label in known:
        return int(known[label])
    some = ", ".join(map(repr, list(known)[:8])) + (", ..." if len(known) > 8 else "")
    raise InputsError(f"{label!r} is no label of this model{nearest(label, known)}; it has {some or 'only ids'}")


def class_names(module: nn.Module, ids: Sequence[int]) -> str:
    """The labels of classes, or their ids where the config has no names."""
    names = getattr(getattr(module, "config", None), "id2label", None) or {}
    return ", ".join(str(names.get(i, i)) for i in ids)
