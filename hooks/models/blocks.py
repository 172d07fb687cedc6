"""A block as a sequence of sublayers, each of which reads the residual stream and adds to it.

Parts are modules of the user's model, never copies of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .experts import Experts
from .positions import Rotary
from .projections import Outputs, Projection

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """An attention layer, which owns its projections, its positions, its mask and its cap.

    Attributes:
        module: the layer; `q`, `k`, `v` and `out` are its projections.
        scaling: factor of q k.
        q_norm, k_norm: what queries and keys [..., heads, D] go through before the rotary embedding.
        rotary: the angles by which the first R dimensions of a head are turned, or None where positions are learned.
        causal: whether a token attends to those before it and itself, or to all.
        window: width of a sliding window of keys, in tokens, the query's own included.
        softcap: c of c tanh(scores / c), which the scores go through before the softmax.
        sinks: name of the module's parameter [H], a score that queries of each head have besides those of their keys.
        biased: whether its attention function is given a bias of the scores by itself (``position_bias``).
        opaque: why nobody can look between the projections and z; empty where sites are there.
    """

    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    out: nn.Module
    scaling: float
    q_norm: Map | None = None
    k_norm: Map | None = None
    rotary: Rotary | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: str | None = None
    biased: bool = False
    opaque: str = ""

    @property
    def sink(self) -> Tensor | None:
        """The sinks [H], as they are now."""
        return None if self.sinks is None else getattr(self.module, self.sinks)


@dataclass(frozen=True)
class Mlp:
    """A feed-forward layer: down(act(pre(x))), or down(act(pre(x)) * up(x)) where it is gated.

    Attributes:
        module: the layer, which is run as it is unless a site inside it is looked at; or what reads its input, where
            the parts belong to no layer of their own.
        pre, up, act, down: its parts; width: F.
        whole: a function equal to the module's on tokens [N, M], in fewer passes over memory; None for the module.
    """

    module: nn.Module
    pre: nn.Module | Outputs
    down: nn.Module
    act: Map
    up: nn.Module | Outputs | None = None
    width: int = 0
    whole: Map | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer makes of tokens [N, M]."""
        return self.module(x[None])[0] if self.whole is None else self.whole(x)

    @property
    def matrices(self) -> int:
        """How many matrices [M, F] it multiplies a token by."""
        return 2 + (self.up is not None)


Feed = Mlp | Experts


@dataclass(frozen=True)
class Sublayer:
    """What stands around attention or a feed-forward layer: x becomes ``post_add(x + scale * post(fn(pre(x))))``.

    Attributes:
        pre: the norm of what is read; None where the residual stream is read as it is.
        fn: attention, an MLP, or a mixture of experts.
        post: the norm of what is added.
        drop: dropout outside `fn`, the last thing before what it returns is added; several sublayers may share one.
        post_add: the norm of the residual stream after the addition.
        scale: factor of what is added.
        ends: the module that returns what is added, where it is not the last of those above.
    """

    pre: nn.Module | None
    fn: Attention | Feed
    post: nn.Module | None = None
    drop: nn.Module | None = None
    post_add: nn.Module | None = None
    scale: float = 1.0
    ends: nn.Module | None = None

    @property
    def end(self) -> nn.Module:
        """The module that returns what is added, but for the scale."""
        return next(end for end in (self.ends, self.drop, self.post, self.fn.module) if end is not None)

    def read(self, x: Tensor) -> Tensor:
        """What `fn` is called on, of the residual stream."""
        return x if self.pre is None else self.pre(x)

    def added(self, out: Tensor) -> Tensor:
        """What is added to the stream, of what `fn` returns."""
        out = out if self.post is None else self.post(out)
        return out if self.scale == 1.0 else out * self.scale

    def summed(self, stream: Tensor) -> Tensor:
        """The residual stream after the addition."""
        return stream if self.post_add is None else self.post_add(stream)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        module: the block.
        sublayers: attention, and a feed-forward layer unless the model has attention alone.
        parallel: whether all of them read the residual before the block (attention is computed first, there is no
            residual between them); else each reads what the one before has added to.
    """

    module: nn.Module
    sublayers: tuple[Sublayer, ...]
    parallel: bool = False

    @property
    def of_attention(self) -> Sublayer:
        """The sublayer around attention."""
        return next(s for s in self.sublayers if isinstance(s.fn, Attention))

    @property
    def of_mlp(self) -> Sublayer | None:
        """The sublayer around the feed-forward layer, where there is one."""
        return next((s for s in self.sublayers if not isinstance(s.fn, Attention)), None)

    @property
    def shares_norm(self) -> bool:
        """Whether attention and the feed-forward layer read the output of one norm."""
        around = self.of_mlp
        return around is not None and around.pre is not None and around.pre is self.of_attention.pre

    @property
    def attention(self) -> Attention:
        """The attention layer."""
        fn = self.of_attention.fn
        assert isinstance(fn, Attention)
        return fn

    @property
    def mlp(self) -> Feed | None:
        """The MLP, or the mixture of experts in its place, where there is one."""
        around = self.of_mlp
        return None if around is None else around.fn  # type: ignore[return-value]
