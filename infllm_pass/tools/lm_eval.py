"""Sparsified models in EleutherAI's lm_eval: its model ``infllm``, and its command line with that model known.

    infllm-pass lm-eval run --model infllm --model_args pretrained=./model,scorer=tokens,topk=18 --tasks ruler_vt

`HFLM(pretrained=sparsified)` runs a sparsified model too; this one makes it from the arguments of the command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

import infllm_pass
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import ConfigError, MissingDependencyError
from infllm_pass.frontend.api import sparsified_config
from infllm_pass.tools.checkpoint import SMOLLM2, find_checkpoint

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependencyError("lm_eval", "lm-eval", "running lm_eval") from error

FIELDS = tuple(field.name for field in fields(SparseAttentionConfig))
"""Arguments that go into the configuration."""


@register_model("infllm")
class InfLLM(HFLM):  # type: ignore[misc,unused-ignore]
    """A causal language model of transformers with switchable attention, for requests of every kind that lm_eval makes.

    Args:
        pretrained: a model folder, ``SmolLM2-135M-Instruct`` for the public checkpoint, or a model of transformers; one
            that was sparsified already runs as it is.
        compile_backend: what ``torch.compile`` hands the graphs to. "eager" traces and does not compile: requests have
            many lengths.
        arguments: fields of `SparseAttentionConfig`, such as ``scorer`` or ``dense_len``, and arguments of ``HFLM``.

    Raises:
        ConfigError: a field of the configuration is invalid, or one is given for a sparsified model.
        NoAttentionSiteError: when the model first runs: nothing in it became switchable.
    """

    def __init__(self, pretrained: Any, *, compile_backend: str = "eager", **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in FIELDS if name in arguments}
        self._compile_backend = compile_backend
        by_name = isinstance(pretrained, str)
        if by_name:
            self._sparse_config = SparseAttentionConfig(**given)
            if pretrained == SMOLLM2.name:
                file = find_checkpoint()
                pretrained, arguments["gguf_file"] = str(file.parent), file.name
        else:
            pretrained, self._sparse_config = self._given(pretrained, given)
        super().__init__(pretrained=pretrained, **arguments)
        if by_name:
            self._model: Any = self._sparsified(self.model, self._sparse_config)

    def _given(self, model: Any, fields_given: dict[str, Any]) -> tuple[Any, SparseAttentionConfig]:
        """A model that was handed over, sparsified if it was not, and its configuration."""
        own = sparsified_config(model)
        if own is None:
            config = SparseAttentionConfig(**fields_given)
            return self._sparsified(model, config), config
        if fields_given:
            name, value = next(iter(fields_given.items()))
            raise ConfigError(name, value, "no field of the configuration, since the model is sparsified already")
        return model, own

    def _sparsified(self, model: Any, config: SparseAttentionConfig) -> Any:
        compiled = torch.compile(model, backend=self._compile_backend)
        return infllm_pass.sparsify(compiled, config, strict=True)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside the results: also the configuration, and on which side the compiled graphs run."""
        branches = [branch for graph in infllm_pass.report(self.model).graphs for branch in graph.branches]
        return {
            **super().get_model_info(),
            "infllm_config": self._sparse_config.to_dict(),
            "infllm_graphs": {side: branches.count(side) for side in ("dense", "sparse")},
        }


def main(arguments: Sequence[str]) -> int:
    """Run lm_eval's command line.

    Args:
        arguments: its arguments, such as ``run --model infllm …``.

    Returns:
        The exit code.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
