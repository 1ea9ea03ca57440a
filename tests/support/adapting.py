"""A small run of `infllm_pass.adapt`, on the CPU in seconds."""

from __future__ import annotations

from tests.support.tokenizers import byte_llama, byte_tokenizer

LENGTHS = (128, 512)

SPARSE = {"block_size": 16, "kernel_size": 8, "kernel_stride": 4, "window_size": 32, "topk": 4}


def long_rows():
    """Settings of a run whose rows are all long: one graph less to compile."""
    from infllm_pass.adaptation import Bucket

    return {"buckets": (Bucket(LENGTHS[1], 1.0),)}


def small_config(**changes):
    """Four steps of two lengths, the long one sparse, without tasks or Inductor."""
    from infllm_pass.adaptation import AdaptationConfig, Bucket
    from infllm_pass.config import SparseAttentionConfig
    from infllm_pass.evaluation import TaskSettings

    fields = {
        "buckets": tuple(Bucket(length, 0.5) for length in LENGTHS),
        "tokens_per_step": 512,
        "steps": 4,
        "task_share": 0.0,
        "sparse": SparseAttentionConfig(**SPARSE),
        "learning_rate": 1e-3,
        "warmup": 1,
        "precision": "float32",
        "backend": "eager",
        "checkpoint_every": 2,
        "log_every": 2,
        "workers": 0,
        "evaluation": TaskSettings(tasks=("perplexity",), lengths=(512,)),
    }
    return AdaptationConfig(**{**fields, **changes})


def write_texts(folder):
    """Three documents of some thousand bytes, and another one for evaluations."""
    folder.mkdir(parents=True)
    for name in ("a", "b", "c", "held"):
        lines = (f"Line {n} of {name} says {n * 7919 % 997}.\n" for n in range(200))
        (folder / f"{name}.txt").write_text("".join(lines))
    return [folder / f"{name}.txt" for name in "abc"]


def small_model(**changes):
    """A Llama of one layer with random weights, and its tokenizer."""
    return byte_llama(**{"num_hidden_layers": 1, **changes}), byte_tokenizer()
