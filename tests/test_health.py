"""What a run logs about itself, and what it does about numbers that are not finite."""

import functools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
from salt import cache, cache_format, health, optimiser
from salt.checkpoint import load_checkpoint
from salt.loader import Batch
from salt.masks import sample_masks
from salt.score import Space
from tests.stages import SMALL, error_of, run


@pytest.mark.parametrize("count, dim, scale", [(500, 32, 1.0), (20, 64, 1e-3), (3000, 16, 30.0)])
def test_features_are_measured_as_by_their_singular_values(count, dim, scale):
    random = np.random.default_rng(count)
    x = (
        scale * random.normal(size=(count, 5)) @ random.normal(size=(5, dim))
        + scale * 0.3 * random.normal(size=(count, dim))
        + 7
    )
    parts = [
        health.moments(torch.from_numpy(part).float()[None])
        for part in np.array_split(x.astype(np.float32), 3)
    ]
    deviation, rank = health.collapse(sum(parts))
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    share = singular / singular.sum()
    assert deviation == pytest.approx(x.std(0).mean(), rel=1e-4)
    assert rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3) and rank <= min(
        count, dim
    )


def test_collapsed_features_are_seen():
    torch.manual_seed(0)
    one = torch.randn(1, 32)
    assert health.collapse(health.moments(one.expand(100, 32))) == (0, 0)
    assert health.collapse(health.moments(one * torch.randn(100, 1)))[1] == pytest.approx(
        1, abs=1e-3
    )
    assert health.collapse(health.moments(torch.randn(50000, 32)))[1] == pytest.approx(32, rel=1e-3)
    assert all(map(math.isnan, health.collapse(health.moments(torch.full((4, 8), math.nan)))))


def test_the_update_ratio_is_that_of_the_weights_before_and_after():
    torch.manual_seed(0)
    module = model.Block(16, 2, 32)
    groups = optimiser.parameter_groups(module, 0.3)
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
    matrices = groups[0]["params"]
    assert isinstance(health.update_ratio(optimizer), int)  # before the first step there is none
    for step in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) * (math.nan if step == 2 else 1)
        before = [parameter.detach().double() for parameter in matrices]
        optimiser.update(optimizer, list(module.parameters()), 1.0)
        changed, size = health.update_ratio(optimizer)
        expected = sum(
            (parameter.double() - old).square().sum() for parameter, old in zip(matrices, before)
        )
        assert changed.sqrt().item() == pytest.approx(expected.sqrt().item(), rel=1e-3) and (
            changed > 0
        ) == (step < 2)
        if step < 2:
            assert size.sqrt().item() == pytest.approx(
                sum(old.square().sum() for old in before).sqrt().item(), rel=1e-4
            )


def test_an_infinite_loss_with_finite_gradients_is_skipped_too():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [parameter], "decays": True}], lr=0.1, fused=True)
    parameter.grad = torch.ones(3)
    optimiser.update(optimizer, [parameter], 0, torch.tensor(math.inf))
    assert parameter.tolist() == [1, 1, 1]
    parameter.grad = torch.ones(3)
    optimiser.update(optimizer, [parameter], 0, torch.tensor(1.0))
    assert max(parameter.tolist()) < 1


@pytest.fixture
def salt_and_batch():
    torch.manual_seed(0)
    config = model.config_of_size("tiny", depth=1, frames=4, size=48)
    salt = model.build_salt(
        config,
        {
            "dim_in": 192,
            "dim_out": 24,
            "tokens": 18,
            "families": ["short", "long"],
            "dim": 32,
            "depth": 1,
            "heads": 2,
        },
    )
    masks = [sample_masks(torch.arange(3), 0, 0, family, (2, 3, 3)) for family in ("short", "long")]
    batch = Batch(
        torch.arange(3),
        torch.randint(0, 256, (3, 18, config.patch_dim), dtype=torch.uint8),
        torch.randn(3, 18, 24).half(),
        masks,
        np.arange(3),
    )
    return salt, Space("latents", "none", None, None, torch.zeros(18, 24)), batch


def test_a_diagnosis_names_what_is_not_finite(salt_and_batch):
    salt, space, batch = salt_and_batch

    def look():
        clips = SimpleNamespace(name=lambda record: ("abc"[record], 0))
        loss_of = functools.partial(model.salt_loss, salt, space=space)
        return health.diagnose(salt, space, clips, batch, loss_of)

    assert look() == {
        "weights": [],
        "targets": [],
        "clips": [],
        "gradients": [],
    } and "that step is finite" in health.in_words(look())
    assert all(parameter.grad is None for parameter in salt.parameters())
    batch.latents[1, batch.masks[1].target[1, 0]] = math.inf
    found = look()
    assert (
        found["targets"] == found["clips"] == ["b"]
        and found["gradients"]
        and not found["weights"]
        and "the targets of b are not finite" in health.in_words(found)
    )
    batch.latents[1] = 0
    with torch.no_grad():
        salt.predictor.proj.bias[3] = math.nan
    found = look()
    assert (
        found["weights"] == ["predictor.proj.bias"]
        and found["clips"] == ["a", "b", "c"]
        and not found["targets"]
    )
    assert "the weights themselves are not finite (predictor.proj.bias)" in health.in_words(found)
    assert "its norm: it overflows" in health.in_words(
        {"weights": [], "targets": [], "clips": [], "gradients": []}, 0.5
    )
    with torch.no_grad():
        salt.predictor.proj.bias[3] = 0
        salt.student.blocks[0].fc1.bias[0] = 3e38
        salt.student.blocks[0].fc2.weight[:, 0] = 3e38
    found = look()
    assert (
        not found["weights"]
        and found["clips"] == ["a", "b", "c"]
        and "the loss of a, b, c; the gradient of" in health.in_words(found)
    )


def poisoned(world, folder, records, name="latents"):
    """A copy of a cache whose records `records` are infinite, by a teacher, so to say."""
    shutil.copytree(world / name, folder / "poisoned")
    opened = cache.open_cache(world / name)
    metadata = json.loads((folder / "poisoned" / "metadata.json").read_text())
    del metadata["shards"][0]["latents"]["first"]
    (folder / "poisoned" / "metadata.json").write_text(
        json.dumps({**metadata, "checksum": cache_format.metadata_digest(metadata)})
    )
    latents = np.lib.format.open_memmap(folder / "poisoned" / "latents-00000.npy", mode="r+")
    for record in records:
        latents[record] = np.inf
    latents.flush()
    return [opened.ids[record] for record in records]


def test_steps_that_are_not_finite_are_skipped_and_counted(world, tmp_path):
    poisoned(world, tmp_path, [3])
    flags = [
        "--cache",
        "poisoned",
        "--val_cache",
        world / "held_out",
        *SMALL,
        *"--epochs 3 --run_name r".split(),
    ]
    said = run(tmp_path, "train", *flags)
    folder = next(tmp_path.glob("checkpoints/r_*"))
    saved = load_checkpoint(folder / "last.pth")
    lost = saved["losses"].isnan()
    assert (
        len(lost) == 12
        and 1 <= lost.sum() <= 3
        and said.count("is skipped: loss") == lost.sum()
        and f"was not finite: {lost.sum()}" in said
    )
    assert all(value.isfinite().all() for value in saved["student"].values())
    # valid JSON: no NaN
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-2]["skipped"] == lost.sum() and all(
        np.isfinite(row["val_r2"]) for row in rows if "val_r2" in row
    )
    assert saved["optimizer"]["state"][0]["step"] == 12 - lost.sum()


def test_many_of_them_in_a_row_end_the_run_with_a_diagnosis(world, tmp_path):
    names = poisoned(world, tmp_path, range(17))
    line = error_of(
        tmp_path,
        "train",
        "--cache",
        "poisoned",
        *SMALL,
        *"--epochs 9 --skip_limit 5 --run_name r".split(),
    )
    assert (
        "in 5 steps in a row, the last of them step 5 (loss inf, gradient norm" in line
        and "): the targets of" in line
        and "--verify" in line
    )
    found = json.loads(next(tmp_path.glob("checkpoints/r_*/diagnosis.json")).read_text())
    assert (
        found["step"] == 5
        and len(found["targets"]) == 4
        and set(found["targets"]) <= set(names)
        and found["weights"] == []
    )
    line = error_of(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        *SMALL,
        *"--epochs 9 --lr 1e30 --warmup 0 --grad_clip 0 --run_name lr".split(),
    )
    assert (
        "in 10 steps in a row, the last of them step 11 (loss" in line
        and "): not finite: the loss of" in line
        and "lower --lr" in line
    )
    log = next(tmp_path.glob("run_logs/lr_*.log")).read_text().splitlines()
    assert (
        log[-1] == "Process exiting."
        and log[-2] == "status: failed"
        and log[-3].endswith("was not finite: 10")
        and any(row.startswith("error: the loss or its gradient") for row in log)
    )
    saved = load_checkpoint(next(tmp_path.glob("checkpoints/lr_*/last.pth")))
    assert all(value.isfinite().all() for value in saved["student"].values())


def test_the_summary_leaves_out_what_was_skipped_since_the_last_line(world, tmp_path):
    """Steps that are not finite and a stop before their line is due."""
    run(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        *SMALL,
        *"""--log_every 100 --epochs 9 --lr 1e30 --warmup 0 --grad_clip 0 --skip_limit 3 --run_name
r""".split(),
        code=1,
    )
    log = next(tmp_path.glob("run_logs/r_*.log")).read_text()
    losses = [float(value) for value in re.findall(r"average loss ([\d.e+]+)", log)]
    assert "was not finite: 3" in log and losses and max(losses) < 1e3


def test_a_rate_that_would_rise_is_refused(world, tmp_path):
    assert "--lr_end 1e-05 is above --lr 2e-06" in error_of(
        tmp_path, "train", "--cache", world / "latents", *SMALL, "--lr", "2e-6"
    )


def test_a_graph_on_a_cpu_is_refused_before_anything_is_made(world, tmp_path):
    assert "--cuda_graph on is for one GPU, in one process" in error_of(
        tmp_path, "train", "--cache", world / "latents", *SMALL, "--cuda_graph", "on"
    )
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "run_logs").exists()


def test_unknown_kernels_are_refused(world, tmp_path):
    for name, value in (("SALT_OPS", "ref"), ("SALT_SIMD", "none")):
        assert f"{name} is '{value}' in the environment; it takes" in error_of(
            tmp_path, "train", "--cache", world / "latents", *SMALL, **{name: value}
        )


def test_trackers_get_what_metrics_get(world, tmp_path):
    """--wandb against a stand-in that notes its calls; --tensorboard against its reader."""
    pytest.importorskip("tensorboard")
    (tmp_path / "wandb.py").write_text(
        "import json\nclass init:\n    def __init__(self, **how): self.file = open('calls', 'a');"
        " print(json.dumps({**how, 'config': len(how['config'])}), file=self.file)\n    def"
        " log(self, entry, step): print(json.dumps([step, entry]), file=self.file, flush=True)\n   "
        " def finish(self): print('[\"finished\"]', file=self.file)\n"
    )
    # its entries hold a word, too
    held_out = ["--val_cache", world / "latents", "--training_videos"]
    flags = [
        "--cache",
        world / "latents",
        *held_out,
        *SMALL,
        *"--epochs 3 --run_name r --wandb project --tensorboard".split(),
    ]
    run(tmp_path, "train", *flags, PYTHONPATH=str(tmp_path))
    folder = next(tmp_path.glob("checkpoints/r_*"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert (
        first["project"] == "project"
        and first["name"] == first["id"] == folder.name
        and calls == [*([row["step"], row] for row in rows), ["finished"]]
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [
        (event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars("loss")
    ] == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(events.Scalars("val_r2")) == 4


def test_a_tracker_that_is_not_installed_is_one_line(world, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError")
    assert "--wandb needs Weights & Biases: pip install wandb" in error_of(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        *SMALL,
        "--wandb",
        "p",
        PYTHONPATH=str(tmp_path),
    )


def test_a_held_out_clip_that_is_not_finite_is_named(world, tmp_path):
    poisoned(world, tmp_path, [3], "held_out")
    name = cache.open_cache(tmp_path / "poisoned").ids[3]
    line = error_of(
        tmp_path,
        "train",
        "--cache",
        world / "latents",
        "--val_cache",
        "poisoned",
        *SMALL,
        "--max_steps",
        "2",
    )
    assert (
        "the targets of 1 held-out clips in a batch, of" in line
        and repr(name) in line
        and "--verify" in line
    )
    best = next(world.glob("checkpoints/student_*/best.pth"))
    assert repr(name) in error_of(
        tmp_path, "eval_distill", "--checkpoint", best, "--cache", "poisoned"
    )


def test_a_family_named_twice_and_names_that_a_list_cannot_hold(world, tmp_path):
    assert "--masks short,short names a family twice" in error_of(
        tmp_path, "train", "--cache", world / "latents", *SMALL, "--masks", "short,short"
    )
    for name in (" a", "a,b"):
        assert "must have no comma and no spaces around it" in error_of(
            tmp_path, "train", "--cache", world / "latents", *SMALL, f"--run_name={name}"
        )
