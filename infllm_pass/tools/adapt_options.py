"""The options of ``infllm-pass adapt``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from infllm_pass.adaptation.config import AdaptationConfig, RotaryKind
from infllm_pass.adaptation.tasks import TRAINING_TASKS
from infllm_pass.evaluation.tasks import TASKS
from infllm_pass.tools.option_types import natural, positive


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add everything but the block selection and the form of the output.

    Args:
        parser: the command's.
    """
    own = AdaptationConfig()
    add = parser.add_argument
    add("model", metavar="MODEL", help="SmolLM2-135M-Instruct, or a model folder with weights and tokenizer")
    add("files", metavar="FILE", nargs="+", help="text files (.txt, .md, also .gz and .xz) and folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for everything that is written")
    add("--resume", action="store_true", help="go on from the last checkpoint in DIR, with the same options")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer (the model's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")

    group = parser.add_argument_group("training (defaults in brackets)")
    add = group.add_argument
    add("--scorer", choices=("tokens", "pooled", "dense"), default="tokens", help="(tokens; dense: the control)")
    lengths = " ".join(str(bucket.length) for bucket in own.buckets)
    add("--lengths", nargs="+", type=positive, metavar="N", help=f"tokens of the rows ({lengths})")
    add("--shares", nargs="+", type=float, metavar="X", help="of the steps that each length gets (equal)")
    add("--tokens-per-step", type=positive, metavar="N", help=f"({own.tokens_per_step})")
    add("--steps", type=positive, metavar="N", help=f"({own.steps})")
    add("--task-share", type=float, metavar="X", help=f"of the rows that hold a synthetic task ({own.task_share})")
    add("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TRAINING_TASKS)} (all)")
    add("--learning-rate", type=float, metavar="X", help=f"the highest ({own.learning_rate})")
    add("--warmup", type=natural, metavar="N", help=f"steps in which it rises ({own.warmup})")
    add("--weight-decay", type=float, metavar="X", help=f"({own.weight_decay})")
    add("--max-grad-norm", type=float, metavar="X", help=f"larger gradients are scaled, 0: never ({own.max_grad_norm})")
    add("--accumulation", type=positive, metavar="N", help="parts that a step is computed in (1)")
    add("--gradient-checkpointing", action="store_true", help="keep less in memory, compute more")
    add("--precision", choices=("bfloat16", "float32"), help="of the computation; weights are float32 (bfloat16)")
    add("--backend", choices=("inductor", "aot_eager", "eager"), help="of torch.compile (inductor)")
    add("--lora", type=natural, metavar="RANK", help="train adapters in place of the weights (PEFT)")
    add("--distill", type=float, metavar="WEIGHT", help="of the divergence from the model's own dense mode (0)")
    add("--extend-to", type=positive, metavar="N", help="positions that the rotary embedding is extended to")
    add("--extend-kind", choices=get_args(RotaryKind), help=f"({own.extend_kind})")
    add("--seed", type=natural, metavar="N", help="(0)")
    add("--workers", type=natural, metavar="N", help=f"processes that make rows ({own.workers})")

    group = parser.add_argument_group("checkpoints and evaluations (defaults in brackets)")
    add = group.add_argument
    add("--checkpoint-every", type=natural, metavar="N", help=f"steps, 0: none ({own.checkpoint_every})")
    add("--keep", type=positive, metavar="N", help=f"checkpoints, at least 2 ({own.keep})")
    add("--log-every", type=positive, metavar="N", help=f"steps ({own.log_every})")
    add("--evaluate-every", type=natural, metavar="N", help="steps, 0: before and after only (0)")
    add("--held-out", nargs="+", metavar="FILE", help="texts of evaluations (three of this installation)")
    add("--evaluation-tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)} (perplexity and two needles)")
    add("--evaluation-lengths", nargs="+", type=positive, metavar="N", help="tokens of a prompt (the longest rows')")
    add("--evaluation-samples", type=positive, metavar="N", help="of a task, length and depth (1)")
