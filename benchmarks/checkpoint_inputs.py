"""Saves what a layer of SmolLM2-135M's attention receives for a text, for machines without the checkpoint.

``prefill.py --data checkpoint --checkpoint-file FILE`` reads it, repeated along the tokens where it is too short.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _data import SMOLLM2, checkpoint_data
from _gpu import positive_option
from safetensors.torch import save_file


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file", type=Path, help="a .safetensors file")
    options.add_argument("--length", type=positive_option, default=8192, metavar="N", help="tokens (8192)")
    arguments = options.parse_args()
    data = checkpoint_data(SMOLLM2, arguments.length, torch.device("cpu"), torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in zip("qkv", data, strict=True)}, arguments.file)


if __name__ == "__main__":
    main()
