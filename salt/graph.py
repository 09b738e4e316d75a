"""The passes of a step as one CUDA graph. A step of ViT-L launches 2,700 kernels, which takes the
host 75 ms and more beside the loader's threads: longer than a fast GPU needs for them.
"""

import torch

import model
from salt.errors import InputError
from salt.ranks import world

WARM_UP = 3  # steps before: blocks are compiled, kernels are loaded, AdamW has its moments
# what short memory is called
SHORT_OF_MEMORY = "outofmemory", "out of memory", "alloc_failed", "memory allocation"


class Graph:
    """What `passes` does, which after some steps is recorded and then launched as a whole.

    passes  (loader.Batch) -> [(sums, features)]: forward and backward passes over its parts. Shapes
            are those of the first batch; nothing in it waits for the GPU
    salt    whose parameters get their gradients by it, on one GPU
    log     what is told where memory is short: all goes on without a graph, then

    Memory that a step needs stays the graph's between steps: evaluations take theirs beside it.
    Raises InputError where a step cannot be recorded: something in it waits for the GPU.
    """

    def __init__(self, passes, salt, log):
        self.passes = passes
        self.salt = salt
        self.parameters = list(salt.parameters())
        self.log = log
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch):
        """As `passes`. What is returned, and the gradients, stay until the next call."""
        if self.seen == WARM_UP:
            self.record(batch)
        self.seen += 1
        if self.graph is None:
            return self.passes(batch)
        for here, given in zip(self.batch.tensors(), batch.tensors(), strict=True):
            here.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.found

    def record(self, batch):
        self.batch = batch.map(torch.clone)
        self.forget_the_last_step()
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, self.parameters[0].device):
                self.found = self.passes(self.batch)
            self.gradients = [parameter.grad for parameter in self.parameters]
            self.graph = graph
        except RuntimeError as error:
            self.batch = self.found = None
            self.forget_the_last_step()
            reason = " ".join(str(error).split())[:200]
            # the recording's own end may fail after it, and hide it
            said = "".join(f"{type(x).__name__} {x}" for x in (error, error.__context__)).lower()
            if not any(words in said for words in SHORT_OF_MEMORY):
                raise InputError(
                    f"the step cannot be recorded as a CUDA graph ({reason}): --cuda_graph off"
                    " does without"
                ) from error
            self.log("no CUDA graph, for which memory is short: steps go on without")
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    def forget_the_last_step(self):
        """Copies of matrices, and features, hold on to its memory, and to parts of its autograd
        graph, which were another stream's.
        """
        model.cast_matrices(self.salt, "fp32")
        self.salt.features = None


def recording(graph, device):
    """While in it, what is launched on `device` goes into the CUDA graph; the loader's threads may
    ask for memory meanwhile.
    """
    stream = torch.cuda.Stream(device)  # by default it is the first GPU's
    return torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")


def launched_as_one(passes, salt, s, place, log):
    """`passes`, as a Graph where train.py's settings `s` want one. auto: on one GPU, except with
    --deterministic, since steps before the recording may differ from others in the last bits.
    """
    possible = place.type == "cuda" and world == 1
    if s.cuda_graph == "off" or not possible or s.cuda_graph == "auto" and s.deterministic:
        return passes
    log(f"forward and backward passes become one CUDA graph after {WARM_UP} steps")
    return Graph(passes, salt, log)
