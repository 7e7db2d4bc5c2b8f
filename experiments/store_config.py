"""Flags of vla-scripts/build_feature_store.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.join import FinetuneConfig
from prismatic.util.errors import UsageError
from prismatic.util.files import refuse_long_name
from prismatic.util.flags import check, limited
from rocket_align.teacher.store.layout import StoreDType


@dataclass
class StoreConfig(FinetuneConfig):
    """The flags of finetune.py, and the store's."""

    # Stored tokens a side, relative to the student's; at most the teacher's own
    grid_scale: float = limited(1.25, above=0)
    store_dtype: StoreDType = "int8"  # int8 (with a scale per token) | float16
    # Coefficients kept of a token's channels (principal directions); at most all
    components: int = limited(384, least=1)
    fit_frames: int = limited(128, least=1)  # Frames, evenly spread over the data, that the directions are fitted to
    verify: bool = False  # Read every record of a finished store and check it; builds nothing

    def validate_store(self) -> None:
        """Refuse wrong flags before anything is loaded.

        Raises:
            UsageError: one line that names the flag.
        """
        if not self.feature_store:
            raise UsageError("--feature_store: empty; accepted: the folder to write")
        refuse_long_name("--feature_store", self.feature_store)
        check(self)
        try:
            self.validate_alignment()
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not self.verify and not (self.aligns and self.teacher):
            raise UsageError(
                "--vggt_path: no teacher; accepted: --vggt_path or --teacher_path, with an aligning recipe"
            )
