"""A training step that a GPU replays as one recorded graph, so that launching kernels costs the host nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """Call a step plainly a few times, then record it once and replay it.

    The step must be the same work on the same tensors each time: it reads and writes them in place, and waits for
    nothing on the host. What it returns is overwritten by the next call.

    Args:
        step: a function without arguments, on CUDA tensors.
        plain: calls before recording, in which it compiles and libraries make their workspaces.
    """

    def __init__(self, step: Callable[[], Tensor], plain: int = 3) -> None:
        self.step, self.plain = step, plain
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None

    def __call__(self) -> Tensor:
        """Do the step, and return what it returns."""
        if self.plain > 0:
            self.plain -= 1
            # Recording happens on a stream of its own, and so must what it relies on.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                output = self.step()
            torch.cuda.current_stream().wait_stream(side)
            return output
        if self.graph is None or self.output is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # this runs nothing; the replay below does
                self.output = self.step()
            self.graph = graph
        self.graph.replay()
        return self.output
