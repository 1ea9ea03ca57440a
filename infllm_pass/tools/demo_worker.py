"""Measurements of the demo, each in a process of its own.

A process of its own gives every side its own peak memory and its own compile caches. Functions here send what
they are doing through a `Tell` and return plain data.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

import infllm_pass
from infllm_pass.calibration.record import Calibration
from infllm_pass.compat.dynamo import compile_seconds
from infllm_pass.compat.transformers import cache_name
from infllm_pass.config import SparseAttentionConfig
from infllm_pass.errors import InfLLMError, MeasurementError
from infllm_pass.evaluation.output_layer import output_pieces
from infllm_pass.evaluation.samples import Sample
from infllm_pass.evaluation.scoring import AnswerScore, answer_places, answer_scores
from infllm_pass.plan.length_guard import Branch
from infllm_pass.rewrite.report import Report
from infllm_pass.tools.checkpoint import SMOLLM2, load_model
from infllm_pass.tools.inspection import attention_inputs, attention_mass, recent_blocks
from infllm_pass.tools.plots import draw_selection

Tell = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and out of how much (0: not known)."""


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        ids: token ids of one text.
        sample: numbers hidden in a text of as many tokens, and questions for them.
        config: what a sparse side selects.
        device: "cpu" or "cuda".
        generate: tokens to generate, after a prompt that ends as many tokens before the text; 0: none.
        layer: the layer to draw.
        calibration: channels of token scores; None: those that are read off the graph.
    """

    ids: tuple[int, ...]
    sample: Sample
    config: SparseAttentionConfig
    device: str
    generate: int
    layer: int
    calibration: Calibration | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: float32 on a CPU, bfloat16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class SideResult:
    """What one side gave.

    Attributes:
        losses: negative log-likelihood of tokens 1, 2, ... of the text, in nats.
        top1: the likeliest next token after every token of the text.
        first_call_s: seconds of the first call, which compiles.
        compile_s: seconds of it that Dynamo and the compiler took.
        forward_s: seconds of a call without compilation.
        peak_bytes: highest memory in use so far: that of the process, or what was allocated on the GPU.
        report: what the pass did.
        generated: token ids that were generated.
        needles: the scores of the sample's answers.
    """

    losses: tuple[float, ...]
    top1: tuple[int, ...]
    first_call_s: float
    compile_s: float
    forward_s: float
    peak_bytes: int
    report: Report
    generated: tuple[int, ...]
    needles: tuple[AnswerScore, ...]


@dataclass(frozen=True)
class LayerPicture:
    """A layer's selection.

    Attributes:
        png: the picture, a PNG file.
        selected_mass: part of the dense attention that the visited blocks hold, mean over queries past the
            budget (all queries of a shorter text) and heads.
        recent_mass: the same for as many initial and most recent blocks.
    """

    png: bytes
    selected_mass: float
    recent_mass: float


def measure_side(job: Job, side: Branch, tell: Tell) -> SideResult:
    """Compile and run one side, and score the text with it."""
    return _measured(_load(job, tell), job, side, tell)


def measure_and_draw(job: Job, tell: Tell) -> tuple[SideResult, LayerPicture]:
    """Measure the sparse side, and draw what one layer of it visits."""
    model = _load(job, tell)
    return _measured(model, job, Branch.SPARSE, tell), _drawn(model, job, tell)


def _measured(model: Any, job: Job, side: Branch, tell: Tell) -> SideResult:
    """One side's figures."""
    sparse = infllm_pass.sparsify(torch.compile(model.model), job.config, calibration=_calibration(job, model))
    run: Any = sparse if side is Branch.SPARSE else infllm_pass.dense(sparse)
    ids = torch.tensor([job.ids], device=job.device)
    prefill = partial(run, input_ids=ids, use_cache=True)
    with torch.no_grad():
        tell("compiling it, then reading the text", 0, 0)
        first_call_s, out = _timed(job.device, prefill)
        compile_s = compile_seconds()
        forward_s = first_call_s - compile_s
        if job.device == "cuda":
            # Loading and tuning kernels is part of a GPU's first call and of no compile time.
            forward_s, out = _timed(job.device, prefill)
        peak = _peak_memory(job.device)
        losses, top1 = _score(model.lm_head, out.last_hidden_state[0], ids[0], tell)
        generated: tuple[int, ...] = ()
        if job.generate:
            generated = _continue(model, out[cache_name(model.model)], ids, top1, job.generate, tell)
        del out, prefill
        tell("looking for hidden numbers", 0, 0)
        needles = _find_needles(model.lm_head, run, job)
    return SideResult(
        losses=tuple(losses.tolist()),
        top1=tuple(top1.tolist()),
        first_call_s=first_call_s,
        compile_s=compile_s,
        forward_s=forward_s,
        peak_bytes=peak,
        report=infllm_pass.report(run) if side is Branch.SPARSE else Report(),
        generated=generated,
        needles=needles,
    )


def _calibration(job: Job, model: Any) -> Calibration | None:
    """The job's calibration, for the decoder alone.

    Raises:
        CalibrationError: it is that of another model.
    """
    if job.calibration is None:
        return None
    job.calibration.check_model(model)
    return job.calibration.for_part("model", model.model)


def _find_needles(head: torch.nn.Module, run: Any, job: Job) -> tuple[AnswerScore, ...]:
    """Scores of the sample's answers, all from one pass over the sample."""
    ids = torch.tensor([job.sample.ids], device=job.device)
    hidden = run(input_ids=ids, use_cache=True).last_hidden_state[0]
    places = answer_places(job.sample)
    return tuple(answer_scores(job.sample, head(hidden[places.to(job.device)]).float()))


def _load(job: Job, tell: Tell) -> Any:
    """The model on the job's device."""
    tell("loading the checkpoint", 0, 0)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars and the caller's would mix
        return load_model(job.dtype).to(job.device)


def _score(head: torch.nn.Linear, hidden: Tensor, ids: Tensor, tell: Tell) -> tuple[Tensor, Tensor]:
    """Losses ``[N - 1]`` and likeliest next tokens ``[N]`` from hidden states ``[N, d]``, chunk after chunk."""
    losses, top1 = [], []
    begin = 0
    for logits in output_pieces(head, hidden, head.out_features):  # [n, vocabulary]
        tell("scoring the text", begin, len(ids))
        top1.append(logits.argmax(-1))
        targets = ids[begin + 1 : begin + 1 + len(logits)]
        begin += len(logits)
        losses.append(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return torch.cat(losses), torch.cat(top1)


def _continue(model: Any, cache: Any, ids: Tensor, top1: Tensor, count: int, tell: Tell) -> tuple[int, ...]:
    """Greedy continuation of the text less its last `count` tokens.

    The prompt's keys and values come from the sparse prefill; new tokens are decoded by the original model,
    whose attention over them is dense.
    """
    start = ids.shape[1] - count
    cache.crop(-count)  # how many to remove
    given = {cache_name(model): cache}
    token = top1[start - 1].reshape(1, 1)
    generated = [int(token)]
    while len(generated) < count:
        tell("generating", len(generated), count)
        logits = model(input_ids=token, use_cache=True, logits_to_keep=1, **given).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        generated.append(int(token))
    return tuple(generated)


def _drawn(model: Any, job: Job, tell: Tell) -> LayerPicture:
    """Run the model uncompiled as far as one layer, and draw what that layer visits."""
    ids = torch.tensor([job.ids], device=job.device)
    tell(f"running it, uncompiled, as far as layer {job.layer}", 0, 0)
    site = attention_inputs(model.model, job.layer, input_ids=ids, use_cache=False, config=job.config)
    tell("comparing the visited blocks with dense attention", 0, 0)
    geometry = job.config.geometry
    recent = recent_blocks(geometry, len(job.ids), len(job.ids)).to(site.blocks.device).expand_as(site.blocks)
    masses = [
        attention_mass(site.q, site.k, blocks, block_size=geometry.block_size, scale=site.scale)
        for blocks in (site.blocks, recent)
    ]
    tell("drawing", 0, 0)
    png = draw_selection(site, *masses, title=f"{SMOLLM2.name}, layer {job.layer}")
    start = job.config.visited_tokens if job.config.visited_tokens < len(job.ids) else 0
    means = [float(mass[..., start:].mean()) for mass in masses]
    return LayerPicture(png, *means)


def _timed(device: str, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, work it left on a GPU included, and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def _peak_memory(device: str) -> int:
    """Highest memory so far in bytes: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_apart(function: Callable[..., Any], *args: Any, tell: Tell) -> Any:
    """Run ``function(*args, tell)`` in a fresh process with a compile cache of its own.

    Args:
        function: a function of a module, so that the new process can import it.
        args: picklable arguments.
        tell: called with what the function tells.

    Returns:
        What the function returned.

    Raises:
        InfLLMError: the function raised it.
        MeasurementError: the process ended without a result; its traceback, if it had one, is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="infllm-demo-", ignore_cleanup_errors=True) as cache:
        process = context.Process(target=_apart, args=(function, args, sender, cache))
        process.start()
        sender.close()
        try:
            return _receive(receiver, tell)
        except EOFError:
            process.join()
            raise MeasurementError(
                f"the process that ran {function.__name__} ended with exit code {process.exitcode} before it "
                "had measured anything (-9: the system ran out of memory)"
            ) from None
        except BaseException:
            process.terminate()
            raise
        finally:
            process.join()


def _receive(receiver: Connection, tell: Tell) -> Any:
    """The result that arrives after everything told; raises what the other process raised."""
    while True:
        kind, value = receiver.recv()
        if kind == "returned":
            return value
        if kind == "raised":
            raise value
        tell(*value)


def _apart(function: Callable[..., Any], args: tuple[Any, ...], sender: Connection, cache: str) -> None:
    """What the fresh process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is interrupted too, and ends this process
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    try:
        result = function(*args, lambda *told: sender.send(("told", told)))
    except InfLLMError as error:
        sender.send(("raised", error))
    else:
        sender.send(("returned", result))
