"""A block as a sequence of sublayers, each of which reads the residual stream and adds to it.

Parts are modules of the user's model, never copies of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .positions import Rotary
from .projections import Projection


@dataclass(frozen=True)
class Attention:
    """An attention layer, which owns its projections, its positions, its mask and its cap.

    Attributes:
        module: the layer; `q`, `k`, `v` and `out` are its projections.
        scaling: factor of q k.
        q_norm, k_norm: norms of single heads' queries and keys, before the rotary embedding.
        rotary: the angles by which the first R dimensions of a head are turned, or None where positions are learned.
        causal: whether a token attends to those before it and itself, or to all.
        window: width of a sliding window of keys, in tokens, the query's own included.
        softcap: c of c tanh(scores / c), which the scores go through before the softmax.
    """

    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    out: nn.Module
    scaling: float
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    rotary: Rotary | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Mlp:
    """A feed-forward layer: down(act(pre(x))), or down(act(pre(x)) * up(x)) where it is gated.

    Attributes:
        module: the layer, which is run as it is unless a site inside it is looked at.
        pre, up, act, down: its parts; width: F.
        whole: a function equal to the module's on tokens [N, M], in fewer passes over memory; None for the module.
    """

    module: nn.Module
    pre: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    up: nn.Module | None = None
    width: int = 0
    whole: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer makes of tokens [N, M]."""
        return self.module(x[None])[0] if self.whole is None else self.whole(x)

    def hidden(self, pre: Tensor, x: Tensor) -> Tensor:
        """What `down` reads [..., F], given `pre` of what the layer reads, and that."""
        return self.act(pre) if self.up is None else self.act(pre) * self.up(x)


@dataclass(frozen=True)
class Sublayer:
    """What stands around attention or an MLP: it adds ``post(fn(pre(x)))`` to the residual stream.

    Attributes:
        pre: the norm of what is read.
        fn: attention, or an MLP.
        post: the norm of what is added.
        drop: dropout outside `fn`, the last thing before what it returns is added; several sublayers may share one.
    """

    pre: nn.Module
    fn: Attention | Mlp
    post: nn.Module | None = None
    drop: nn.Module | None = None

    @property
    def end(self) -> nn.Module:
        """The module that returns what is added."""
        return next(end for end in (self.drop, self.post, self.fn.module) if end is not None)

    def added(self, out: Tensor) -> Tensor:
        """What is added to the stream, of what `fn` returns."""
        return out if self.post is None else self.post(out)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        module: the block.
        sublayers: attention, and an MLP unless the model has attention alone.
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
        """The sublayer around the MLP, where there is one."""
        return next((s for s in self.sublayers if isinstance(s.fn, Mlp)), None)

    @property
    def attention(self) -> Attention:
        """The attention layer."""
        fn = self.of_attention.fn
        assert isinstance(fn, Attention)
        return fn

    @property
    def mlp(self) -> Mlp | None:
        """The MLP, where there is one."""
        around = self.of_mlp
        return None if around is None else around.fn  # type: ignore[return-value]
