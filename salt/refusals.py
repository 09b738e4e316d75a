"""Settings that are refused, alone or together."""

import os

from salt.errors import InputError
from salt.files import prepare_folder
from salt.journal import trackers
from salt.ranks import pick_device, rank, world


def refuse(s):
    """What settings alone tell, before a log or a folder is made. s: train.py's settings."""
    name = s.run_name
    if name != os.path.basename(name) or not name or not name.isprintable():
        raise InputError(
            f"--run_name {name!a} must be a plain name, without slashes and control characters"
        )
    if name != name.strip() or "," in name:
        raise InputError(
            f"--run_name {name!r} must have no comma and no spaces around it: lists of runs are"
            " separated by commas"
        )
    if len(set(s.masks)) < len(s.masks):
        raise InputError(f"--masks {','.join(s.masks)} names a family twice")
    if rank == 0:
        trackers(s.wandb, s.tensorboard)
    if s.resume == "":
        raise InputError(
            "--resume is empty; give auto, a last.pth, or leave it out to start afresh"
        )
    if s.cuda_graph == "on" and (world > 1 or pick_device(s.device).type != "cuda"):
        raise InputError("--cuda_graph on is for one GPU, in one process; leave it out")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if world > 1 and restarts and s.resume != "auto":
        raise InputError(
            "torchrun --max_restarts starts this command again when a rank dies: give --resume"
            " auto, so that it goes on where it was"
        )
    if rank == 0:
        prepare_folder(s.run_logs, "--run_logs")
        prepare_folder(s.checkpoints, "--checkpoints")


def refuse_optimisation(s):
    """Settings that do not go together, of the step and its schedules."""
    if s.target == "pixels" and s.teacher:
        raise InputError("--target pixels needs no teacher; leave --teacher out")
    if s.lr_end > s.lr:
        raise InputError(
            f"--lr_end {s.lr_end} is above --lr {s.lr}: the rate would rise to it over the run;"
            " lower it"
        )
    if not all(0 <= beta < 1 for beta in s.betas):
        raise InputError(f"--betas are {s.betas}; each must be at least 0 and below 1")
    if s.target == "pixels" and (s.loss != "mse" or s.target_norm != "none"):
        raise InputError(
            "--target pixels is trained with the MSE on per-patch standardised pixels; leave --loss"
            " and --target_norm alone"
        )
    if not 0 < s.targets <= 1:
        raise InputError(f"--targets is {s.targets}; a share is above 0, and 1 at most")
    if s.ema >= 1:
        raise InputError(f"--ema is {s.ema}; a decay is at least 0 (off) and below 1")
    if s.fsdp and world == 1:
        raise InputError(
            "--fsdp splits the model over ranks; start with torchrun --nproc_per_node N"
        )
    if (s.accumulate > 1 or world > 1) and (s.vicreg_variance or s.vicreg_covariance):
        raise InputError(
            "VICReg's penalties are statistics of a whole batch, which --accumulate and several"
            " ranks take apart; leave one of the two out"
        )
    if s.batch_size % (world * s.accumulate):
        ranks_part = [f"{world} ranks"] * (world > 1)
        parts = " times ".join(ranks_part + [f"--accumulate {s.accumulate}"] * (s.accumulate > 1))
        raise InputError(
            f"{parts} {'do' if world > 1 else 'does'} not divide --batch_size {s.batch_size}; the"
            " parts of a batch have one size, so it must be a multiple of"
            f" {world * s.accumulate}"
        )
