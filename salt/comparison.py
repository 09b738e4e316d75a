"""What lets checkpoints stand side by side in a table: one view, one teacher, one space of targets,
one set of masks, and one per-position mean that R2 starts from.
"""

import torch

from salt.cache_format import agree_on
from salt.errors import InputError
from salt.views import View


class Table:
    """Checkpoints that are measured on the same clips and masks.

    loaded   {path: (Salt, Space, content)} as encoders.load_salt gives them
    space    'own', or the --target_norm that all are to be compared in
    masks    mask families to measure; []: those of the checkpoints
    Raises InputError where two of them cannot be compared in that way.
    """

    def __init__(self, loaded, space, masks):
        self.loaded, self.first_path = loaded, next(iter(loaded))
        self.first = loaded[self.first_path][2]
        self.view = View.from_dict(self.first["view"])
        self.teacher = self.first["teacher"]  # its identity
        self.predicts_latents = self.first["space"]["target"] == "latents"
        self.refuse_other_targets()
        self.compared_in = self.one_space(space)
        self.lines = []  # to be logged
        self.measured_from = self.first_path  # the checkpoint whose training clips R2 starts from
        self.space = self.reference_space(space)  # that all are measured in
        self.families = self.one_set_of_masks(masks)

    @property
    def name_of_space(self):
        return self.compared_in if self.predicts_latents else "pixels"

    def refuse_other_targets(self):
        """Views, teachers and patches that are not the first one's."""
        patch = self.first["encoder_config"]["patch"]
        for path, (_, own, saved) in self.loaded.items():
            difference = self.view.difference(View.from_dict(saved["view"]))
            if difference:
                raise InputError(
                    f"{path} was trained under another view than {self.first_path}: {difference};"
                    " evaluate them apart"
                )
            same_targets = own.target == self.first["space"]["target"] and (
                own.target == "pixels" or agree_on(saved["teacher"], self.teacher)
            )
            if saved["encoder_config"]["patch"] != patch or not same_targets:
                raise InputError(
                    f"{path} predicts other targets than {self.first_path} (another teacher or"
                    " patch, or pixels); evaluate them apart"
                )

    def one_space(self, space):
        """Errors in other units do not stand side by side."""
        if space != "own" and not self.predicts_latents:
            raise InputError(
                f"--space {space} is a space of latents, and {self.first_path} predicts pixels, "
                "which have one; leave it out"
            )
        trained_in = {path: own.normalise for path, (_, own, _) in self.loaded.items()}
        compared_in = trained_in[self.first_path] if space == "own" else space
        for path, trained in trained_in.items():
            if trained == compared_in or not self.predicts_latents:
                continue
            if space == "own":
                common = "layer_norm" if "layer_norm" in trained_in.values() else "none"
                raise InputError(
                    f"{path} was trained with --target_norm {trained}, {self.first_path} with "
                    f"{compared_in}: their errors have different units; compare them in one "
                    f"space, --space {common}, or evaluate them apart"
                )
            if trained == "layer_norm":
                raise InputError(
                    f"{path} predicts layer-normed latents, without each token's mean and scale: "
                    f"they cannot be brought to --space {space}; give --space layer_norm, or "
                    "leave it out of this table"
                )
        return compared_in

    def reference_space(self, space):
        """The Space of the first checkpoint that has the per-position mean all R2 start from."""
        reference = None
        others = []
        for path, (_, own, saved) in self.loaded.items():
            variance = (saved.get("stats") or {}).get("variance")
            offered = own.as_space(self.compared_in, variance) if self.predicts_latents else own
            if offered and not reference:
                reference, self.measured_from = offered, path
            elif offered and not (
                offered.agrees_with(reference) and torch.equal(offered.zero, reference.zero)
            ):
                others.append(path)
        if not reference:
            raise InputError(
                "no checkpoint has the per-position mean of its training set, which R2 starts "
                f"from, in --space {space}; add one trained with --target_norm {space}"
            )
        if others:
            self.lines.append(
                f"R2 of all is measured from the per-position mean in {self.measured_from};"
                f" {', '.join(others)} had other training clips"
            )
        return reference

    def one_set_of_masks(self, masks):
        families = list(dict.fromkeys(masks)) or self.first["settings"]["masks"]
        every = {path: saved["settings"]["masks"] for path, (_, _, saved) in self.loaded.items()}
        for path, predicted in every.items():
            lacking = [family for family in masks if family not in predicted]
            if lacking:
                raise InputError(
                    f"--masks {','.join(masks)}: {path} does not predict {', '.join(lacking)}"
                    f", only {', '.join(predicted)}"
                )
            if not masks and set(predicted) != set(families):
                common = [name for name in families if all(name in one for one in every.values())]
                advice = "evaluate them apart"
                if common:
                    advice = f"compare them on --masks {','.join(common)}"
                raise InputError(
                    f"{path} predicts the masks {', '.join(predicted)}, {self.first_path} "
                    f"{', '.join(families)}; {advice}"
                )
        return families

    def own_space(self, path):
        """The space that a checkpoint predicts in, where that is not the table's; else None."""
        own = self.loaded[path][1]
        return own if self.predicts_latents and not own.agrees_with(self.space) else None
