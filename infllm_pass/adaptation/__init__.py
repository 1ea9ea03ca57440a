"""Adapting a dense model to sparse attention, and to longer texts, by some more training.

`documents` are read, `tasks` hide things in them, `rows` packs both, `rotary` extends a model's positions; `trainer` is
the loop, `distillation` another loss, `run_folder` what is resumed, and `adapt` all of it.
"""

from infllm_pass.adaptation.adapt import Adapted, adapt
from infllm_pass.adaptation.config import AdaptationConfig
from infllm_pass.adaptation.rows import Bucket

__all__ = ["AdaptationConfig", "Adapted", "Bucket", "adapt"]
