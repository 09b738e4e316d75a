"""export.py: folders that other code opens, and the page that says how."""

import json
import os
import re

import numpy as np
import pytest
import torch

from salt import encoders
from salt.card import use
from salt.checkpoint import load_checkpoint
from salt.video import read_clip
from salt.views import View, frame_numbers
from tests.stages import SMALL, error_of, run
from tests.test_data import write_video
from tests.test_model import pixel_values
from tests.test_use import textured, tiny_encoder

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
KINDS = {"videomae": "table", "vjepa2": "rope", "safetensors": "table3d"}


def torchvision_works():
    """transformers' processors of videos need it; a build for another torch raises as it loads."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A folder with a checkpoint of each kind of positions, a video, and what a probe wrote."""
    folder = tmp_path_factory.mktemp("trained")
    caches = ["--cache", world / "latents", "--val_cache", world / "held_out"]
    for positions in KINDS.values():
        flags = ["--positions", positions, "--run_name", positions, "--max_steps", 2]
        run(folder, "train", *caches, *SMALL, *flags)
        (path,) = folder.glob(f"checkpoints/{positions}_*/last.pth")
        path.rename(folder / f"{positions}.pth")
    write_video(folder / "video.mp4", list(textured(20, 60, 80)), bit_rate=4_000_000)
    score = {"R2": 0.25, "ci95": [0.1, 0.4]}
    table = {"table": {"student": {"grid, 30": score}, "pixels": {"grid, 30": {"R2": 0.5}}}}
    (folder / "states.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_each_kind(trained, kind):
    path, folder = trained / f"{KINDS[kind]}.pth", trained / f"auto-{kind}"
    flags = ["--probes", "states.json", "--licence", "mit", "--teacher_name", "a net of 1998"]
    said = run(trained, "export", "--checkpoint", path, folder, *flags)
    assert f": {kind}, README.md, config.json, model.safetensors" in said
    encoder, saved = encoders.load_encoder(path), load_checkpoint(path)
    again = encoders.load_encoder(folder)
    assert again.config == encoder.config and again.view == encoder.view
    state = encoder.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
    page = (folder / "README.md").read_text()
    r2 = saved["history"][-1]["val_r2"]
    for part in (
        "license: mit",
        "Its teacher: a net of 1998.",
        "| steps | 2 of 4 clips: 8 clips seen |",
        f"| held-out R2 at step 2 | {r2:.3f}",
        "| student | 0.250 [0.100, 0.400] |\n| pixels | 0.500 |",
        f"| training videos | {len(saved['trained_on']['ids'])}, split train, cache latents |",
    ):
        assert part in page, part
    if kind != "safetensors":
        theirs = transformers.AutoModel.from_pretrained(folder).eval()
        clip = torch.from_numpy(read_clip(trained / "video.mp4", encoder.view))
        pixels = pixel_values(clip[None], encoder.config.mean, encoder.config.std)
        with torch.no_grad():
            found = theirs(pixels).last_hidden_state[0]
        torch.testing.assert_close(found, encoder.encode(clip).detach(), rtol=1e-5, atol=1e-5)


def test_the_page_of_an_average_at_another_shape(world, tmp_path):
    caches = ["--cache", world / "latents", "--val_cache", world / "held_out"]
    flags = ["--positions", "rope", "--max_steps", 2, "--ema", 0.5, "--run_name", "a"]
    run(tmp_path, "train", *caches, *SMALL, *flags)
    (path,) = tmp_path.glob("checkpoints/a_*/last.pth")
    run(
        tmp_path,
        "eval_distill",
        "--checkpoint",
        path,
        "--cache",
        world / "held_out",
        "--out",
        "eval.json",
    )
    given = ["--probes", "eval.json", "--ema", "1", "--frames", 8]
    run(tmp_path, "export", "--checkpoint", path, "averaged", *given)
    last = load_checkpoint(path)["history"][-1]
    assert last["val_r2"] != last["val_r2_ema"]
    page = (tmp_path / "averaged" / "README.md").read_text()
    assert f"of clips of 4 frames of 48 | {last['val_r2_ema']:.3f} |" in page
    (result,) = json.loads((tmp_path / "eval.json").read_text())["results"]
    low, high = result["r2_ci95"]
    assert f"{result['r2']:.3f} [{low:.3f}, {high:.3f}]" in page


@pytest.mark.parametrize("view", [View(4, 48, 48), View(4, 48, 48, sampling="stride", stride=3)])
def test_the_page_takes_the_frames_that_a_view_takes(view):
    encoder = tiny_encoder(view)
    lines = [line.strip() for line in use("videomae", encoder, "x")]
    (line,) = [line for line in lines if line.startswith("frames = [frames[i]")]
    for count in (3, 20, 61):
        names = {"frames": list(range(count))}
        exec(line, names)
        assert names["frames"] == frame_numbers(count, view).tolist()


def lines_of(page):
    """The code of a card, on a video that is there."""
    block = page[page.index("## Use it") :].partition("\n\nMeasured")[0]
    return "\n".join(line[4:] for line in block.splitlines() if line.startswith("    "))


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_the_page_run(trained, kind, monkeypatch):
    if kind != "safetensors" and not torchvision_works():
        pytest.skip("transformers' video processors need torchvision")
    monkeypatch.chdir(trained)
    folder = f"lines-{kind}"
    run(trained, "export", "--checkpoint", f"{KINDS[kind]}.pth", folder)
    names = {}
    exec(lines_of((trained / folder / "README.md").read_text()), names)
    encoder = encoders.load_encoder(f"{KINDS[kind]}.pth")
    ours = encoder.encode(read_clip("video.mp4", encoder.view))
    theirs = names["tokens"].reshape(ours.shape)
    near = 1e-6 if kind == "safetensors" else 0.1  # another resizing
    assert (theirs - ours).norm() < near * ours.norm()


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_what_other_decoding_makes_of_a_video_is_measured(trained, kind):
    if not torchvision_works():
        flags = ["--checkpoint", f"{KINDS[kind]}.pth", "--video", "video.mp4", "compared"]
        told = error_of(trained, "export", *flags)
        assert "needs transformers and a torchvision" in told
        assert not (trained / "compared").exists() and not (trained / "compared.part").exists()
        return
    flags = ["--checkpoint", f"{KINDS[kind]}.pth", "--video", "video.mp4", f"compared-{kind}"]
    said = run(trained, "export", *flags)
    same, resized = (float(x) for x in re.findall(r"features (\S+) of their norm", said))
    assert same < 1e-5 < resized < 0.1


def test_onnx(trained, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(trained)
    for positions in ("table", "rope"):
        flags = ["--checkpoint", f"{positions}.pth", "--to", "onnx", f"onnx-{positions}"]
        said = run(trained, "export", *flags)
        assert "onnxruntime at a batch of 3" in said
        encoder = encoders.load_encoder(f"{positions}.pth")
        c = encoder.config
        session = onnxruntime.InferenceSession(f"onnx-{positions}/encoder.onnx")
        for count in (1, 2, 5):
            shape = (count, c.frames, c.size, c.size, 3)
            clips = np.random.default_rng(count).integers(0, 256, shape, np.uint8)
            (found,) = session.run(None, {"clips": clips})
            expected = encoder.encode(clips).detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            names = {"clips": clips}
            exec(lines_of(open(f"onnx-{positions}/README.md").read()), names)
            assert np.array_equal(names["tokens"], found)


def test_onnx_without_its_packages(trained):
    (trained / "without").mkdir()
    (trained / "without" / "onnxscript.py").write_text("raise ImportError")
    flags = ["--checkpoint", "table.pth", "--to", "onnx", "never"]
    told = error_of(trained, "export", *flags, PYTHONPATH=str(trained / "without"))
    assert "pip install onnx onnxscript onnxruntime" in told
    assert not (trained / "never").exists() and not (trained / "never.part").exists()


def test_rotary_positions_export_at_another_shape(trained):
    flags = ["--checkpoint", "rope.pth", "--frames", 8, "--resolution", 64, "other-shape"]
    run(trained, "export", *flags)
    theirs = transformers.AutoModel.from_pretrained(trained / "other-shape").eval()
    encoder = encoders.load_encoder(trained / "rope.pth").at(8, 64)
    clips = torch.randint(0, 256, (1, 8, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        pixels = pixel_values(clips, encoder.config.mean, encoder.config.std)
        found = theirs(pixels, skip_predictor=True).last_hidden_state
    torch.testing.assert_close(found, encoder.encode(clips), rtol=1e-5, atol=1e-5)


def test_a_videomae_is_fine_tuned(trained):
    run(trained, "export", "--checkpoint", "table.pth", "tuned")
    kind = transformers.VideoMAEForVideoClassification
    theirs, told = kind.from_pretrained(trained / "tuned", output_loading_info=True)
    assert all("classifier" in name or "fc_norm" in name for name in told["missing_keys"])
    encoder = encoders.load_encoder(trained / "table.pth")
    c = encoder.config
    clips = torch.randint(0, 256, (2, c.frames, c.size, c.size, 3), dtype=torch.uint8)
    pixels, labels = pixel_values(clips, c.mean, c.std), torch.tensor([0, 1])
    before = theirs(pixels, labels=labels).loss.item()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        theirs(pixels, labels=labels).loss.backward()
        optimizer.step()
    assert theirs(pixels, labels=labels).loss < 0.5 * before


def test_what_cannot_be_exported(trained):
    (trained / "held").mkdir(exist_ok=True)
    (trained / "no.json").write_text("[]")
    for flags, message in (
        (["--checkpoint", "table.pth"], "one folder to make"),
        (["--checkpoint", "table.pth", "held"], "is there already"),
        (["--checkpoint", "table.pth", "--to", "vjepa2", "x"], "which vjepa2 has not"),
        (
            ["--checkpoint", "table3d.pth", "--to", "videomae", "x"],
            "it can be safetensors or onnx",
        ),
        (["--checkpoint", "table.pth", "--frames", "8", "x"], "takes no clips of 8"),
        (["--checkpoint", "table.pth", "--probes", "gone.json", "x"], "cannot be read"),
        (["--checkpoint", "table.pth", "--probes", "no.json", "x"], "has no table"),
        (["x", "--checkpoint", "table.pth", "--ema"], "no moving average"),
        (["--checkpoint", "gone.pth", "x"], "gone.pth"),
    ):
        assert message in error_of(trained, "export", *flags)
    assert not {"x", "x.part"} & set(os.listdir(trained))
