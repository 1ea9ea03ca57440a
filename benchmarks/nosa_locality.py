"""What queries keep of their blocks from token to token: token scores, pooled scores, and NOSA's selection.

NOSA's two tensors a layer (``examples/nosa.py``) are put beside the weights of a Llama and trained for some steps, the
weights fixed; then `infllm_pass.evaluate` looks at three selections of one budget on held-out texts. So short a
training shows what a query-agnostic share of the blocks keeps, not what a model that was trained for it loses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import note
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import infllm_pass
from infllm_pass import SparseAttentionConfig
from infllm_pass.adaptation.documents import read_documents
from infllm_pass.evaluation import TaskSettings, default_config, read_texts
from infllm_pass.evaluation.plots import draw_locality
from infllm_pass.lowering.export.atomic_file import written_whole
from infllm_pass.tools.output import add_format_options

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from nosa import NosaConfig, NosaForCausalLM  # noqa: E402

ADDED = ("self_attn.A", "self_attn.delta.weight")


def with_importance(plain: PreTrainedModel) -> NosaForCausalLM:
    """A Llama's weights in a NOSA model, whose scores are the same until it is trained."""
    own = ("model_type", "architectures", "transformers_version")
    fields = {name: value for name, value in plain.config.to_dict().items() if name not in own}
    model = NosaForCausalLM(NosaConfig(**fields))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    if unexpected or not all(name.endswith(ADDED) for name in missing):
        raise SystemExit(f"no plain Llama: {[*unexpected, *missing]}")
    model.tie_weights()
    return model


def train_importance(model: NosaForCausalLM, batches: Iterator[Tensor], steps: int) -> list[float]:
    """Train what was added, dense, by AdamW with a rate of 0.01; the losses."""
    added = [parameter for name, parameter in model.named_parameters() if name.endswith(ADDED)]
    model.requires_grad_(False)
    for parameter in added:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(added, lr=1e-2, weight_decay=0.0)
    losses = []
    for _, ids in zip(track(range(steps), "training"), batches, strict=False):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def random_batches(ids: Tensor, rows: int, length: int, device: str) -> Iterator[Tensor]:
    """Rows from random places of a text."""
    draw = torch.Generator().manual_seed(0)
    while True:
        places = torch.randint(len(ids) - length, (rows,), generator=draw)
        yield torch.stack([ids[place : place + length] for place in places]).long().to(device)


def selections(length: int) -> list[SparseAttentionConfig]:
    """Token scores, pooled scores, and pooled scores of which an eighth of the blocks is query-agnostic."""
    base = default_config(length).to_dict()
    agnostic = max(1, length // 1024)
    chosen = ({"scorer": "tokens"}, {"scorer": "pooled"}, {"scorer": "pooled", "agnostic_topk": agnostic})
    return [SparseAttentionConfig.from_dict(base | fields) for fields in chosen]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", metavar="MODEL", help="folder of a Llama with weights and tokenizer")
    options.add_argument("files", type=Path, nargs="+", metavar="FILE", help="texts to train on")
    options.add_argument("--held-out", type=Path, nargs="+", metavar="FILE", required=True, help="texts to look at")
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="for locality_nosa.json and .png")
    options.add_argument("--steps", type=int, default=20, metavar="N", help="(20)")
    options.add_argument("--rows", type=int, default=2, metavar="N", help="of a step (2)")
    options.add_argument("--row-length", type=int, default=512, metavar="N", help="tokens (512)")
    options.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a held-out text (2048)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_format_options(options)
    return options


def main() -> None:
    arguments = parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = with_importance(plain).to(arguments.device)
    ids = read_documents(arguments.files, tokenizer).ids
    batches = random_batches(ids, arguments.rows, arguments.row_length, arguments.device)
    losses = train_importance(model, batches, arguments.steps)
    found = infllm_pass.evaluate(
        model.eval(),
        tokenizer,
        selections(arguments.length),
        settings=TaskSettings(tasks=("perplexity",), lengths=(arguments.length,)),
        texts=read_texts([str(file) for file in arguments.held_out]),
    )
    trained: dict[str, Any] = {name: getattr(arguments, name) for name in ("steps", "rows", "row_length")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with written_whole(arguments.out / "locality_nosa.json") as file:
        file.write_text(json.dumps(found.to_dict() | {"training": trained | {"losses": losses}}, indent=2) + "\n")
    with written_whole(arguments.out / "locality_nosa.png") as file:
        file.write_bytes(draw_locality(found) or b"")
    note(arguments.format, str(found))
    note(arguments.format, f"written to {arguments.out}")


if __name__ == "__main__":
    main()
