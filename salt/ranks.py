"""Several processes under torchrun: who is who, which device is whose, and what they tell each
other.

With one process what they tell each other costs nothing. Collectives of tensors on a GPU go
through NCCL, all others (and what the hosts agree on) through gloo.
"""

import atexit
import contextlib
import itertools
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from salt import ops
from salt.errors import InputError


def pick_device(name):
    """torch.device of 'auto', 'cpu', 'cuda' or 'cuda:1'.

    Raises InputError where there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; it takes auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; use"
            " --device cpu, or check the driver and the torch build"
        )
    return device


NUMBERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
)


def read_environment():
    """(rank, world).

    Raises InputError where what torchrun sets is there in part, or is no number.
    """
    told = {name: os.environ[name] for name in (*NUMBERS, "MASTER_ADDR") if name in os.environ}
    wrong = [name for name in NUMBERS if not told.get(name, "1").isdecimal()]
    rank, world = (
        int(told.get(name, default)) if not wrong else 0
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    absent = (
        [name for name in (*NUMBERS[:5], "MASTER_ADDR") if name not in told] if world > 1 else []
    )
    if wrong or absent or not rank < world:
        raise InputError(
            f"the environment says {' '.join(f'{name}={value!r}' for name, value in told.items())},"
            " of which one is missing or"
            f" wrong{f' ({chr(44).join(wrong + absent)})' if wrong or absent else ''}; start with"
            " torchrun, which sets all of them, or unset them"
        )
    return rank, world


rank, world = read_environment()
restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun, of all ranks


def start(device, timeout=timedelta(minutes=30)):
    """Join the other processes. Returns the name of this one's device: `device` as it is given, or
    under torchrun its own GPU.

    Raises InputError where a machine has more ranks than GPUs.
    """
    if world == 1:
        return device
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.startswith("cuda:"):
        raise InputError(
            f"--device {device}: under torchrun each rank takes the GPU of its number; give"
            " --device cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    if device == "cuda" or device == "auto" and torch.cuda.is_available():
        # so that every rank of the machine says so, not the last ones
        if int(os.environ["LOCAL_WORLD_SIZE"]) > count:
            raise InputError(
                f"{os.environ['LOCAL_WORLD_SIZE']} ranks were started on a machine with {count}"
                " GPUs; lower --nproc_per_node, or give --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
        store=fresh_store(timeout),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    return device


def fresh_store(timeout):
    """torchrun's store, under a prefix of this start's own.

    torchrun (2.13) keeps one store over its restarts, and gloo would find the addresses that the
    dead ranks left there and wait for them: 1 restart in 7 hung.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not kept,
        timeout=timeout,
    )
    # a change of members counts as no restart, so starts with these are counted, too
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world}"
    return dist.PrefixStore(f"{attempt}/{(store.add(attempt, 1) - 1) // world}", store)


def compute_on(place, threads, deterministic):
    """Set torch up for training: threads of a CPU (None: torch's choice) and the memory it frees,
    and on a GPU whether each run gives the same bits. A teacher's products are set by
    teachers.teacher_latents.
    """
    if place.type == "cpu":
        ops.keep_freed_memory()
    elif place.index is not None:
        torch.cuda.set_device(place)  # what names no GPU means this one
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # a pass over all memory, for what nobody reads
        deterministic_module: Any = torch.utils.deterministic
        deterministic_module.fill_uninitialized_memory = False


def data_parallel(module, place):
    """module under DDP: each rank computes with its own copy, and gradients are averaged."""
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; older ones lack the new name
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.parallel.DistributedDataParallel(
            module,
            device_ids=[place] if place.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )


def sync_gradients(net, whether):
    """Whether the next backward pass of data_parallel's module averages the gradients: of several
    parts of a batch, the last. FSDP2 reduces each part; one process has nothing to do.
    """
    if isinstance(net, torch.nn.parallel.DistributedDataParallel):
        net.require_backward_grad_sync = whether


def in_turn(parts):
    """Lists of which each rank made every world-th entry, as the one list in its order."""
    turns = itertools.zip_longest(*gather(parts))
    return [part for turn in turns for part in turn if part]


def leave(code=0):
    """End this process.

    Under torchrun at once, when all ranks are here: threads of gloo have been seen to abort a
    process that takes itself down in the usual way.
    """
    if world == 1:
        sys.exit(code)
    dist.barrier()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def from_rank_0(work):
    """What work() returns on rank 0, on every rank.

    Where it fails there, rank 0 says why and the others end without a word.
    """
    if world == 1:
        return work()
    made = [None, False]
    if rank == 0:
        try:
            made[0] = work()
        # whatever it is, a signal's SystemExit too: the others wait for word; it goes on
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a rank that is gone
                dist.broadcast_object_list([None, True])
            raise
    dist.broadcast_object_list(made)
    if made[1]:
        # of rank 0's end: torchrun ends all ranks with the first, and rank 0 has still to say why
        with contextlib.suppress(RuntimeError):
            dist.broadcast_object_list(made)
        os._exit(1)
    return made[0]


def gather(value):
    """[value of rank 0, of rank 1, ...], on every rank.

    Values are pickled: plain types and numpy arrays.
    """
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def agree(*flags):
    """Each flag as a bool that is the same on every rank: whether any of them has it set.

    Hosts alone talk; no GPU waits.
    """
    if world == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return tuple(flags.bool().tolist())


def whole(state):
    """A state_dict whose sharded tensors (FSDP2) are gathered, one after another, into main memory;
    every rank must call it, rank 0 keeps them.
    """
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if rank == 0 else None
    return state


def split_like(optimizer, state):
    """An optimiser's whole state_dict with its moments split as the optimiser's parameters are
    (FSDP2).
    """
    from torch.distributed.tensor import distribute_tensor

    parameters, made = [p for group in optimizer.param_groups for p in group["params"]], {}
    for number, entry in state["state"].items():
        like = parameters[number]
        made[number] = {
            name: (
                distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
                if x.shape == like.shape and x.dim()
                else x
            )
            for name, x in entry.items()
        }
    return {**state, "state": made}


def shard(module, device):
    """Split a Salt over all ranks by FSDP2: each block, and what is outside of the blocks, is
    gathered while it runs. Weights are gathered in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in (*module.student.blocks, *module.predictor.blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh, reshard_after_forward=True)
