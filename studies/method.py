"""Study 4: the whole method, four times as long as the other studies' runs. What are a teacher from
pixels and its student worth beside a teacher that has seen ImageNet and its students, and beside
untrained networks, by every probe? Does a student beat its teacher?

Hypotheses, fixed before the first run: a student knows about as much of states as its teacher,
within the interval, and of the direction of time more than EfficientNet, which sees single frames;
students of EfficientNet know more than those of pixels; twice the width adds little. The long run
was added, with its hypothesis, when the runs of seeds 1 and 2 were there, before its own first one.
"""

from studies import report, stall
from studies.world import Row

PANELS = (report.curves,)
CURVES = "width_384", "student_of_pixels", "light_long"
SHOWN = (*report.SHOWN, "surprise, own masks", "actions", "direction of time")
REFERENCE = {**stall.REFERENCE, "max_steps": 2000, "eval_every": 200}

ROWS = {
    "reference": Row("a student of EfficientNet: as good as its teacher", whole=True),
    "width_384": Row(
        "a student twice as wide: R2 up, states a little", {"size": "small"}, whole=True
    ),
    "student_of_pixels": Row(
        "a student of a teacher of its own shape, of as many steps from pixels: better than that"
        " teacher, worse than EfficientNet's student",
        latents="pixels_2000",
        whole=True,
    ),
    "light_long": Row(
        "--recipe light, ten times as long as the other studies' runs, on four times the videos: R2"
        " up by more than .02, states as good as the teacher's, the direction of time less",
        {
            "positions": "rope",
            "predictor_attention": "context",
            "max_steps": 5000,
            "eval_every": 500,
        },
        latents="net_new_videos",
        whole=True,
    ),
}
