"""Quality of sparse against dense attention: perplexity, needles and other tasks of long prompts.

`texts` are read, `samples` and `tasks` hide things in them, `scoring` runs a model on both, `results` and `statistics`
sum up, `plots` draws.
"""

from infllm_pass.evaluation.evaluate import default_config, evaluate
from infllm_pass.evaluation.results import Evaluation, PerplexityRow, TaskRow
from infllm_pass.evaluation.tasks import TASKS, TaskSettings
from infllm_pass.evaluation.texts import Text, read_texts, standard_texts

__all__ = [
    "TASKS",
    "Evaluation",
    "PerplexityRow",
    "TaskRow",
    "TaskSettings",
    "Text",
    "default_config",
    "evaluate",
    "read_texts",
    "standard_texts",
]
