"""A training step as one CUDA graph: recorded once, then launched whole.

A narrow network's kernels take the GPU less time than Python takes to launch them one by one. The
graph holds forward, loss and backward of a batch; what follows (optimizer, schedule, checks) is
launched as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""``(x, labels) -> (loss, ...)``; gradients are those of the first result."""

# Runs before recording, in which libraries choose algorithms and kernels are compiled.
_WARM_UP = 3


class StepGraph:
    """Forward and backward of a batch, recorded at the first call and replayed at every other.

    Args:
        step: What is recorded: a function of the batch that waits for nothing on the GPU.
        model: Whose parameters get gradients, and whose buffers the warm-up must not change.
        record: Records a call and returns what replays it; none takes CUDA's own.

    """

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self._step, self._model = step, model
        self._record = record or _cuda_graph
        self._replay: Callable[[], None] | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._results: tuple[Tensor, ...] = ()
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """What the step gives for this batch; its gradients lie in ``.grad`` of the parameters.

        The tensors returned are written again by the next call. A batch of another shape than the
        first is computed as it comes, without the graph.

        Args:
            x: Input, as in the first call.
            labels: int64 [N].

        """
        if self._batch is not None and self._batch[0].shape != x.shape:
            return self._once(x, labels)
        if self._replay is None:
            self._begin(x, labels)
        assert self._replay is not None
        assert self._batch is not None
        for place, tensor in zip(self._batch, (x, labels), strict=True):
            place.copy_(tensor)
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._results

    def _once(self, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        for parameter in self._model.parameters():
            parameter.grad = None
        # Autocast would keep converted weights and give them to the graph, in which they are stale.
        kind = x.device.type
        with torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            results = self._step(x, labels)
        results[0].backward()  # type: ignore[no-untyped-call]
        return tuple(r.detach() for r in results)

    def _begin(self, x: Tensor, labels: Tensor) -> None:
        self._batch = (x.clone(), labels.clone())
        buffers = [(b, b.clone()) for b in self._model.buffers()]
        with _apart(x.device):
            for _ in range(_WARM_UP):
                self._once(*self._batch)
            for buffer, before in buffers:
                buffer.copy_(before)

        def run() -> None:
            assert self._batch is not None
            self._results = self._once(*self._batch)

        self._replay = self._record(run)
        self._gradients = [(p, p.grad) for p in self._model.parameters() if p.grad is not None]


def _cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins batches, go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """On a stream of its own, as recording asks of what precedes it, and drawing nothing random."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.random.fork_rng(devices=[device]), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def finite(*tensors: Tensor) -> Tensor:
    """Whether all values of all tensors are finite, as a 0-dim tensor that nobody waits for."""
    return torch.stack([torch.isfinite(t).all() for t in tensors]).all()
