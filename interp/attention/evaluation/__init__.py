"""Benchmarks of hallucination: readers of the files that they publish, and their scores."""

from interp.attention.evaluation.items import Ask, Item, answer
from interp.attention.evaluation.mme import MmeScore, TaskScore, read_mme, score_mme, write_mme
from interp.attention.evaluation.pope import PopeScore, read_pope, score_pope
from interp.attention.evaluation.vlind import Instance, VlindScore, read_vlind, score_vlind

__all__ = [
    "Ask",
    "Instance",
    "Item",
    "MmeScore",
    "PopeScore",
    "TaskScore",
    "VlindScore",
    "answer",
    "read_mme",
    "read_pope",
    "read_vlind",
    "score_mme",
    "score_pope",
    "score_vlind",
    "write_mme",
]
