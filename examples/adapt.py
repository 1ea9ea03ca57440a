"""Adaptation: a small Llama goes on training with sparse attention, and what is saved brings its configuration along.

Trains on the help topics that come with Python, rows of 256 tokens dense and rows of 1024 sparse, on a CPU in less than
a minute; a run that was broken off goes on where it was. `infllm-pass adapt` does the same for models and texts of
yours: `infllm-pass adapt SmolLM2-135M-Instruct texts/ --out adapted`.

    pip install 'infllm-pass[hf,plot]'
    python examples/adapt.py [STEPS]
"""

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import infllm_pass
from infllm_pass import AdaptationConfig, Bucket, SparseAttentionConfig
from infllm_pass.evaluation import TaskSettings, Text

SPARSE = SparseAttentionConfig(kernel_size=16, kernel_stride=8, block_size=32, window_size=64, topk=6)
"""Eight blocks of 32 keys for each query: a quarter of a row of 1024."""


def write_texts(folder: Path) -> Text:
    """One file for each of Python's help topics but the longest ones, which are held out."""
    ranked = sorted(topics, key=lambda name: len(topics[name]))
    folder.mkdir()
    for name in ranked[:-3]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return Text("held out", "\n".join(topics[name] for name in ranked[-3:]))


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with 512 words, trained on the texts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>"], initial_alphabet=alphabet)
    inner.train([str(file) for file in sorted(folder.iterdir())], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def small_model(vocabulary: int) -> LlamaForCausalLM:
    """Two layers with random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0, **sizes)
    )


def main(steps: int = 60) -> infllm_pass.Adapted:
    """Adapt, load what was saved, and run it."""
    torch.manual_seed(0)
    config = AdaptationConfig(
        buckets=(Bucket(256, 0.5), Bucket(1024, 0.5)),
        tokens_per_step=2048,
        steps=steps,
        tasks=("single_needle",),
        sparse=SPARSE,
        learning_rate=3e-3,
        warmup=5,
        precision="float32",
        backend="eager",
        checkpoint_every=20,
        workers=0,
        evaluation=TaskSettings(tasks=("perplexity",), lengths=(1024,)),
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        held_out = write_texts(folder / "texts")
        tokenizer = tokenizer_of(folder / "texts")
        found = infllm_pass.adapt(
            small_model(len(tokenizer)),
            tokenizer,
            [folder / "texts"],
            folder / "out",
            config,
            held_out=[held_out],
            device="cpu",
        )
        loaded = AutoModelForCausalLM.from_pretrained(found.model)
    print(f"loss {found.losses[0].loss:.2f} at first, {found.losses[-1].loss:.2f} after {steps} steps")
    for step, evaluation in found.evaluations.items():
        values = ", ".join(f"{row['side']} {row['perplexity']:.1f}" for row in evaluation["perplexity"])
        print(f"perplexity of the text held out after {step} steps: {values}")
    sparse = infllm_pass.sparsify(torch.compile(loaded, backend="eager"))
    sparse(input_ids=torch.arange(512)[None], use_cache=False)
    print(infllm_pass.report(sparse))
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
