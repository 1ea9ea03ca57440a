"""What PyTorch reads of Triton kernels is remembered in a context: by one thread, and no longer than the context."""

import contextlib
import threading

import pytest
import torch

from infllm_pass.compat.inductor import kernel_readers
from infllm_pass.lowering.inductor.mutation_cache import remembered_accesses

MODULE, (NAME,) = kernel_readers()


@pytest.fixture
def read(monkeypatch):
    """Calls PyTorch's reader, whatever stands in its place: for it, a count of how often it was called."""
    calls = []
    monkeypatch.setattr(MODULE, NAME, lambda kernel, arguments, _: calls.append(arguments) or len(calls))
    return lambda *arguments: getattr(MODULE, NAME)(*arguments)


def test_what_was_read_of_a_kernel_holds_for_the_same_types_and_numbers(read):
    half, single = (torch.empty(2, dtype=dtype) for dtype in (torch.float16, torch.float32))
    kernel, other = object(), object()
    with remembered_accesses():
        assert read(kernel, {"x": half, "SIZE": 1}, {}) == 1
        assert read(kernel, {"SIZE": 1, "x": torch.empty(5, dtype=torch.float16)}, {}) == 1
        for number, (asked, arguments, descriptors) in enumerate(
            [
                (kernel, {"x": single, "SIZE": 1}, {}),
                (kernel, {"x": half, "SIZE": 2}, {}),
                (kernel, {"x": half, "SIZE": True}, {}),
                (other, {"x": half, "SIZE": 1}, {}),
                (kernel, {"x": half, "SIZE": 1}, {"x": "a descriptor"}),
                (kernel, {"x": half, "SIZE": [1]}, {}),
                (kernel, {"x": half, "SIZE": [1]}, {}),
            ],
            start=2,
        ):
            assert read(asked, arguments, descriptors) == number


def test_nothing_is_remembered_outside_of_the_context(read):
    arguments = object(), {"SIZE": 1}, {}
    with remembered_accesses(), remembered_accesses():
        assert [read(*arguments), read(*arguments)] == [1, 1]
    assert [read(*arguments), read(*arguments)] == [2, 3]
    with contextlib.suppress(ZeroDivisionError), remembered_accesses():
        assert [read(*arguments), read(*arguments)] == [4, 4]
        raise ZeroDivisionError
    assert [read(*arguments), read(*arguments)] == [5, 6]


def test_an_inner_context_shares_what_the_outer_one_knows(read):
    arguments = object(), {"SIZE": 1}, {}
    with remembered_accesses():
        assert read(*arguments) == 1
        with remembered_accesses():
            assert read(*arguments) == 1
        assert read(*arguments) == 1


def test_threads_remember_each_their_own(read):
    """The first to enter leaves while the second is still within: neither sees what the other does."""
    steps, arguments, seen = threading.Barrier(2, timeout=60), (object(), {"SIZE": 1}, {}), {}

    def first():
        with remembered_accesses():
            steps.wait()  # both are within
            seen["first"] = {read(*arguments), read(*arguments)}
            steps.wait()
        steps.wait()  # the first has left
        seen["left"] = {read(*arguments), read(*arguments)}
        steps.wait()
        steps.wait()  # the second has left

    def second():
        with remembered_accesses():
            steps.wait()
            steps.wait()
            steps.wait()
            steps.wait()
            seen["second"] = {read(*arguments), read(*arguments)}
        steps.wait()

    threads = [threading.Thread(target=part) for part in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: len(results) for name, results in seen.items()} == {"first": 1, "left": 2, "second": 1}
    assert seen["first"] != seen["second"]
    assert len({read(*arguments), read(*arguments)}) == 2
