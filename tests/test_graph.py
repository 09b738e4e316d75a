"""Steps that are recorded and launched as one, with a stand-in for the GPU's graph: it runs again
what was recorded, into the same memory. The real one: tests/test_gpu.py.
"""

import contextlib
import types

import pytest
import torch

from salt import graph
from salt.loader import Batch
from salt.masks import Masks


class Again:
    """Stands in for torch.cuda.CUDAGraph."""

    def replay(self):
        self.run()


@pytest.fixture
def recorded(monkeypatch):
    """A Graph of a small network's passes, and what they were called with."""
    net = torch.nn.Linear(3, 1)
    net.features = None
    calls, failures = [], []

    def passes(batch):
        calls.append(batch)
        if failures and len(calls) > graph.WARM_UP:
            raise failures.pop()
        net.features = batch.patches.float()
        loss = net(net.features).square().sum()
        loss.backward()
        return [(loss.detach()[None], net.features)]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Again)
    monkeypatch.setattr(graph, "recording", lambda made, device: contextlib.nullcontext())
    said = []
    steps = graph.Graph(passes, net, said.append)

    def run():
        """The recorded passes, anew, into the memory that they went to."""
        for parameter in net.parameters():
            parameter.grad = None
        made = passes(steps.batch)
        for (sums, features), (new_sums, new_features) in zip(steps.found, made, strict=True):
            sums.copy_(new_sums)
            features.copy_(new_features)
        for gradient, parameter in zip(steps.gradients, net.parameters(), strict=True):
            gradient.copy_(parameter.grad)
            parameter.grad = None

    monkeypatch.setattr(Again, "run", staticmethod(run), raising=False)
    return types.SimpleNamespace(steps=steps, net=net, said=said, calls=calls, failures=failures)


def a_batch(number):
    generator = torch.Generator().manual_seed(number)
    index = torch.zeros(2, 1, dtype=torch.int64)
    patches = torch.randint(0, 9, (2, 3), dtype=torch.uint8, generator=generator)
    return Batch(torch.arange(2), patches, None, [Masks(index, index, "short")])


def step(recorded, number):
    """One step, whose gradients the optimiser dropped before: (batch, sums, features)."""
    for parameter in recorded.net.parameters():
        parameter.grad = None
    batch = a_batch(number)
    ((sums, features),) = recorded.steps(batch)
    return batch, sums, features


def test_each_step_has_its_own_inputs_gradients_and_features(recorded):
    parameters = list(recorded.net.parameters())
    for number in range(graph.WARM_UP + 4):
        batch, sums, features = step(recorded, number)
        x = batch.patches.float()
        loss = recorded.net(x).square().sum()
        assert torch.equal(features, x) and torch.allclose(sums[0], loss)
        for parameter, expected in zip(parameters, torch.autograd.grad(loss, parameters)):
            assert torch.allclose(parameter.grad, expected)
        assert (recorded.steps.graph is not None) == (number >= graph.WARM_UP)
    held = recorded.steps.batch.patches
    assert all(call.patches is held for call in recorded.calls[graph.WARM_UP :])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")], ids=str
)
def test_where_memory_is_short_steps_go_on_without(recorded, error):
    recorded.failures.append(error)
    for number in range(graph.WARM_UP + 3):
        batch, _, features = step(recorded, number)
        assert torch.equal(features, batch.patches.float())
        assert recorded.net.weight.grad is not None
    assert recorded.steps.graph is None and len(recorded.said) == 1
    assert len(recorded.calls) == graph.WARM_UP + 4  # one of them in vain


def test_a_step_that_waits_ends_in_a_line(recorded):
    recorded.failures.append(RuntimeError("operation not permitted when stream is capturing"))
    for number in range(graph.WARM_UP):
        step(recorded, number)
    with pytest.raises(graph.InputError, match="not permitted.*--cuda_graph off"):
        step(recorded, 9)
    assert recorded.net.weight.grad is None and recorded.net.features is None


@pytest.mark.parametrize(
    "wanted, device, deterministic, ranks, is_graph",
    [
        ("auto", "cuda", False, 1, True),
        ("auto", "cuda", True, 1, False),
        ("on", "cuda", True, 1, True),
        ("off", "cuda", False, 1, False),
        ("auto", "cuda", False, 2, False),
        ("auto", "cpu", False, 1, False),
    ],
)
def test_who_gets_a_graph(monkeypatch, wanted, device, deterministic, ranks, is_graph):
    monkeypatch.setattr(graph, "world", ranks)
    s = types.SimpleNamespace(cuda_graph=wanted, deterministic=deterministic)
    said, net = [], torch.nn.Linear(1, 1)
    found = graph.launched_as_one(print, net, s, torch.device(device), said.append)
    assert isinstance(found, graph.Graph) == bool(said) == is_graph
    assert is_graph or found is print
