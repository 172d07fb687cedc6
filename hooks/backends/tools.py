"""The other tools that a model may come in, each of which places visits in its own way."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError
from .bridge import Bridge, is_bridge
from .envoys import Traces, is_envoy


def tool_of(model: Any, remote: bool | str = False) -> Any:
    """What runs plans on a model of another tool's; None where we do.

    Raises:
        ModelError: `remote` is given for a model that is not nnsight's, or that nnsight would run here.
    """
    if is_envoy(model):
        return Traces(model, remote)
    if remote:
        raise ModelError(f"remote= is for a model of nnsight's, not for {type(model).__name__}")
    return Bridge(model) if is_bridge(model) else None
