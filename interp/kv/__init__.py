"""Causal importance of cached keys and values: what each causes, whether that can be foretold, how much can go."""

from interp.kv import policies
from interp.kv.effects import KVEffects, kv_effects
from interp.kv.eviction import Eviction
from interp.kv.policies import Policy, press
from interp.kv.prefill import follow, generate, prefill
from interp.kv.seam import attending
from interp.kv.sets import Cached, Greedy, Shapley, greedy, set_effects, shapley
from interp.kv.view import View

__all__ = [
    "Cached",
    "Eviction",
    "Greedy",
    "KVEffects",
    "Policy",
    "Shapley",
    "View",
    "attending",
    "follow",
    "generate",
    "greedy",
    "kv_effects",
    "policies",
    "prefill",
    "press",
    "set_effects",
    "shapley",
]
