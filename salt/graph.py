"""The passes of a step as one CUDA graph. A step of ViT-L launches 2,700 kernels, which takes the
host 75 ms and more beside the loader's threads: longer than a fast GPU needs for them.
"""

import torch

import model
from salt.errors import InputError
from salt.ranks import world

WARM_UP = 3  # steps before: blocks are compiled, kernels are loaded, AdamW has its moments


class Graph:
    """What `passes` does, which after some steps is recorded and then launched as a whole.

    passes      (loader.Batch) -> [(sums, features)]: forward and backward passes over its parts.
                Shapes are those of the first batch; nothing in it waits for the GPU
    salt        whose parameters get their gradients by it
    log         what is told where memory is short: all goes on without, then
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
        # copies of matrices keep parts of the last step's autograd graph, which is another stream's
        model.cast_matrices(self.salt, "fp32")
        graph = torch.cuda.CUDAGraph()
        try:
            # the loader's threads may ask for memory meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.found = self.passes(self.batch)
            self.gradients = [parameter.grad for parameter in self.parameters]
            self.graph = graph
        except torch.OutOfMemoryError:
            self.batch = self.found = None
            self.log("no CUDA graph, for which memory is short: steps go on without")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the step cannot be recorded as a CUDA graph ({reason}): --cuda_graph off does"
                " without"
            ) from error
        finally:
            for parameter in self.parameters:
                parameter.grad = None


def launched_as_one(passes, salt, s, place, log):
    """`passes`, as a Graph where train.py's settings `s` want one. auto: on one GPU, but with
    --deterministic, since the steps before the recording may differ in the last bits.
    """
    possible = place.type == "cuda" and world == 1
    if s.cuda_graph == "on" and not possible:
        raise InputError(
            f"--cuda_graph on is for one GPU, not for {world} ranks on {place.type}; leave it out"
        )
    if s.cuda_graph == "off" or not possible or s.cuda_graph == "auto" and s.deterministic:
        return passes
    log(f"forward and backward passes are one CUDA graph from step {WARM_UP + 1} on")
    return Graph(passes, salt, log)
