"""Causal importance of cached keys and values: what each causes, whether that can be foretold, how much can go."""

from interp.kv import policies
from interp.kv.effects import KVEffects, kv_effects
from interp.kv.eviction import Eviction
from interp.kv.heads import RetainingHeads
from interp.kv.judging import Judged, judge, scores_of
from interp.kv.labels import Example, examples
from interp.kv.policies import Policy, press
from interp.kv.prefill import follow, generate, prefill
from interp.kv.seam import attending
from interp.kv.sets import Cached, Greedy, Shapley, greedy, set_effects, shapley
from interp.kv.training import train_heads
from interp.kv.view import View

__all__ = [
    "Cached",
    "Eviction",
    "Example",
    "Greedy",
    "Judged",
    "KVEffects",
    "Policy",
    "RetainingHeads",
    "Shapley",
    "View",
    "attending",
    "examples",
    "follow",
    "generate",
    "greedy",
    "judge",
    "kv_effects",
    "policies",
    "prefill",
    "press",
    "scores_of",
    "set_effects",
    "shapley",
    "train_heads",
]
