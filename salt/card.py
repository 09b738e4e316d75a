"""The page that goes with an exported encoder: what it is, what it was trained on and by, what was
measured of it, and the lines that run it.
"""

import json
import os

from salt.errors import InputError

USES = {
    "videomae": """
    import av, torch
    from transformers import AutoModel, AutoVideoProcessor
    model = AutoModel.from_pretrained(FOLDER).eval()
    processor = AutoVideoProcessor.from_pretrained(FOLDER)
    frames = [frame.to_ndarray(format="rgb24") for frame in av.open("video.mp4").decode(video=0)]
    frames = [frames[i] for i in NUMBERS]
    with torch.no_grad():
        tokens = model(**processor(frames, return_tensors="pt")).last_hidden_state  # SHAPE
""",
    "safetensors": """
    from salt import load_encoder, video   # of SALT-VLA: transformers has no model of this kind
    encoder = load_encoder(FOLDER)
    tokens = encoder.encode(video.read_clip("video.mp4", encoder.view))  # SHAPE
""",
    "onnx": """
    import onnxruntime
    session = onnxruntime.InferenceSession(FOLDER + "/encoder.onnx")
    # uint8 [B, FRAMES, SIZE, SIZE, 3], RGB, as video.read_clip of SALT-VLA cuts them
    (tokens,) = session.run(None, {"clips": clips})  # SHAPE
""",
}
USES["vjepa2"] = USES["videomae"].replace(
    'model(**processor(frames, return_tensors="pt"))',
    'model(**processor(frames, return_tensors="pt"), skip_predictor=True)',
)


def card(name, kind, encoder, saved, probes, ema, teacher, licence, compared):
    """The page, in Markdown.

    kind     a key of USES
    saved    the checkpoint's content
    probes   {path: what a probe wrote there}
    ema      whether the encoder is the moving average
    teacher, licence   str or None, as the user calls them
    compared  lines on what other decoding makes of a video
    """
    head = ["---", "tags: [video, robotics, salt-vla]"]
    head += ["library_name: transformers"] if kind in ("videomae", "vjepa2") else []
    head += [f"license: {licence}"] if licence else []
    lines = [*head, "---", "", f"# {name}", "", *what_it_is(encoder, saved, teacher), ""]
    if not licence:
        lines += ["No licence was stated. Its teacher's may bind it, and its data's.", ""]
    lines += [
        "| | |",
        "|---|---|",
        *facts(encoder, saved, ema),
        "",
        "## Use it",
        *use(kind, encoder, name),
    ]
    if compared:
        lines += ["", *compared]
    if probes:
        lines += ["", "## Probes", "", "95 % intervals over held-out videos in brackets.", ""]
    for path, found in probes.items():
        lines += [f"{path}:", "", *probe_table(found, path), ""]
    return "\n".join(lines).rstrip() + "\n"


def what_it_is(encoder, saved, teacher):
    c, pixels = encoder.config, saved["space"]["target"] == "pixels"
    of = (
        "the pixels of masked tubelets" if pixels else "a frozen teacher's latents at masked places"
    )
    return [
        f"A video encoder of {c.depth} blocks, {c.dim} wide, trained to predict {of} of a clip"
        " (SALT, Li et al. 2025, arXiv 2509.24317) by SALT-VLA.",
        *([] if pixels else [f"Its teacher: {teacher or teacher_of(saved)}."]),
    ]


def teacher_of(saved):
    """As far as a checkpoint knows it, which has its weights' digest and its shape."""
    known = saved["teacher"] or {}
    shape = known.get("config", {})
    return f"{shape.get('dim', '?')} wide, SHA-256 of its weights {known.get('sha256', '?')[:16]}"


def facts(encoder, saved, ema):
    """Rows of a table."""
    c, s, view = encoder.config, saved["settings"], encoder.view
    last = saved["history"][-1] if saved["history"] else {}
    seen = saved["trained_on"]["ids"] if saved.get("trained_on") else ()
    step, batch = saved["step"], s["batch_size"]
    yield f"| clips | {c.frames} frames of {c.size} x {c.size}, {view.sampling} sampling |"
    yield f"| tokens | {' x '.join(map(str, c.grid))} (time, rows, columns) of {c.dim} |"
    yield f"| positions | {c.positions} |"
    yield f"| mean, std | {numbers(c.mean)}; {numbers(c.std)} of pixels in [0, 1] |"
    cache = f", cache {os.path.basename(os.path.normpath(s['cache']))}" if s.get("cache") else ""
    yield f"| training videos | {len(seen) or 'not known'}, split {s['split']}{cache} |"
    yield f"| steps | {step:,} of {batch} clips: {step * batch:,} clips seen |"
    names = "recipe masks loss target_norm context_loss lr weight_decay_end seed".split()
    yield f"| recipe | {', '.join(f'{name} {text(s[name])}' for name in names if name in s)} |"
    name = "val_r2_ema" if ema else "val_r2"
    if name in last:
        trained = saved["encoder_config"]
        shape = trained["frames"], trained["size"]
        at = "" if shape == (c.frames, c.size) else f", of clips of {shape[0]} frames of {shape[1]}"
        videos = last.get("val_videos", "held-out")
        yield f"| {videos} R2 at step {last['step']}{at} | {last[name]:.3f} |"


def numbers(values):
    return ", ".join(f"{value:g}" for value in values)


def text(value):
    return " + ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def use(kind, encoder, name):
    """Lines of code."""
    c = encoder.config
    if encoder.view.sampling == "uniform":
        picked = f"(int((i + 0.5) * len(frames) / {c.frames}) for i in range({c.frames}))"
    else:
        stride = encoder.view.stride
        first = f"(len(frames) - 1 - {(c.frames - 1) * stride}) // 2"
        last = "len(frames) - 1"
        picked = f"(min(max({first} + {stride} * i, 0), {last}) for i in range({c.frames}))"
    words = {
        "FOLDER": json.dumps(name),
        "NUMBERS": picked,
        "SHAPE": f"[B, {c.tokens}, {c.dim}]",
        "FRAMES": str(c.frames),
        "SIZE": str(c.size),
    }
    lines = USES[kind]
    for word, said in words.items():
        lines = lines.replace(word, said)
    return lines.rstrip().splitlines()


def probe_table(found, path):
    """The table that a probe's JSON file holds, a column a head; of eval_distill.py's, R2."""
    table = found.get("table") if isinstance(found, dict) else None
    if isinstance(found, dict) and isinstance(found.get("results"), list):
        columns = {"held-out R2": "r2", "from the best dumb predictor": "r2_over_best"}
        table = {
            os.path.basename(os.path.dirname(result["checkpoint"])): {
                title: {"R2": result[key], "ci95": result.get(f"{key}_ci95")}
                for title, key in columns.items()
            }
            for result in found["results"]
        }
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path} has no table: it is no file that a probe wrote with --out")
    columns = list(next(iter(table.values())))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for source, row in table.items():
        cells = [cell(row[column]) if column in row else "" for column in columns]
        yield f"| {source} | {' | '.join(cells)} |"


def cell(score):
    value = next(value for name, value in score.items() if name != "ci95")
    ends = score.get("ci95")
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
