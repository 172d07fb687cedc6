"""Plans held through training: clamps, probes, the measures of how heads form, and the loops that they hang on.

from interp import training

monitor = training.Monitor(model, [training.Clamp(training.previous_token(0, 0))], log="run.jsonl")
"""

from interp.training.callbacks import Callback, Checkpoints, Clamp, PhaseChange, Probe, at_strength, probe, save_weights
from interp.training.ensemble import Ensemble, Program
from interp.training.graft import graft
from interp.training.heads import (
    ablate_heads,
    all_but,
    attention_from,
    copy_to_logits,
    forbid_previous,
    graft_residual,
    induction_pattern,
    match_pattern,
    preserving,
    previous_token,
    residual_from,
    temperature,
)
from interp.training.measures import (
    attention,
    copying,
    heads_alone,
    heads_without,
    induction_strength,
    prefix_matching,
    previous_token_strength,
    repeated_tokens,
    under,
)
from interp.training.monitor import Monitor
from interp.training.phase import PhaseTimes, phase_change, phase_times
from interp.training.records import JsonLines
from interp.training.targets import induction_targets, match_targets
from interp.training.trainers import lightning_callback, trainer_callback
from interp.training.untouched import untouched

__all__ = [
    "Callback",
    "Checkpoints",
    "Clamp",
    "Ensemble",
    "JsonLines",
    "Monitor",
    "PhaseChange",
    "PhaseTimes",
    "Probe",
    "Program",
    "ablate_heads",
    "all_but",
    "at_strength",
    "attention",
    "attention_from",
    "copy_to_logits",
    "copying",
    "forbid_previous",
    "graft",
    "graft_residual",
    "heads_alone",
    "heads_without",
    "induction_pattern",
    "induction_strength",
    "induction_targets",
    "lightning_callback",
    "match_pattern",
    "match_targets",
    "phase_change",
    "phase_times",
    "prefix_matching",
    "preserving",
    "previous_token",
    "previous_token_strength",
    "probe",
    "repeated_tokens",
    "residual_from",
    "save_weights",
    "temperature",
    "trainer_callback",
    "under",
    "untouched",
]
