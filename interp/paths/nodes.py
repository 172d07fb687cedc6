"""What writes to the residual stream of a transformer, what reads it, and the edges between them."""

from __future__ import annotations

from dataclasses import dataclass

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Writer:
    """What adds to the residual stream: the input (embeddings), a head or a whole attention layer, or an MLP.

    Attributes:
        kind: "input", "head", "attn" or "mlp".
        layer: the block; -1 for the input.
        head: the head, of a "head".
        time: when it writes, on the clock that `Reader.time` reads.
    """

    kind: str
    layer: int
    head: int | None
    time: int

    @property
    def name(self) -> str:
        """``input``, ``a3.h1``, ``a3`` or ``m3``."""
        return _name(self.kind, self.layer, self.head)


@dataclass(frozen=True)
class Reader:
    """What reads the residual stream.

    Attributes:
        kind: "q", "k" or "v" of a head, "attn" (a whole attention layer), "mlp" or "logits".
        layer: the block; L for the logits.
        head: the head; a key/value head for "k" and "v", unless the graph's are query heads.
        time: it sees the writers of an earlier `time`.
    """

    kind: str
    layer: int
    head: int | None
    time: int

    @property
    def name(self) -> str:
        """``a3.h1<q>``, ``a3``, ``m3`` or ``logits``."""
        if self.kind in QKV:
            return f"a{self.layer}.h{self.head}<{self.kind}>"
        return _name(self.kind, self.layer, self.head)

    @property
    def node(self) -> str:
        """The name of the node that it belongs to, as a writer is called: ``a3.h1``, ``a3``, ``m3`` or ``logits``.

        Of a key/value head that several query heads share, `Graph.nodes_of` has the nodes.
        """
        return _name("head" if self.kind in QKV else self.kind, self.layer, self.head)


def _name(kind: str, layer: int, head: int | None) -> str:
    if kind in ("input", "logits"):
        return kind
    return f"m{layer}" if kind == "mlp" else f"a{layer}" + ("" if head is None else f".h{head}")


@dataclass(frozen=True)
class Edge:
    """From a writer to a reader, at all positions or at those of a span."""

    writer: Writer
    reader: Reader
    span: str | None = None

    @property
    def name(self) -> str:
        """``a0.h1->a2.h3<q>``, or with a span ``a0.h1->a2.h3<q>@subject``."""
        return f"{self.writer.name}->{self.reader.name}" + ("" if self.span is None else f"@{self.span}")
