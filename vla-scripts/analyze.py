"""Analyses of fine-tuned checkpoints: each writes a JSON file and a picture into --out_dir.

    python vla-scripts/analyze.py cka --checkpoint runs/rocket--50005_chkpt --out_dir analysis
    python vla-scripts/analyze.py gradients --checkpoint runs/rocket--5000_chkpt,runs/naive--5000_chkpt

    cka         CKA of student states and teacher blocks, matched one to one (Figure 8)
    gradients   cosines between the gradients of the pairs' losses and of the action loss (Figures 1, 13, 14)
    projectors  similarity of the pairs' projectors, weights and outputs (Figure 7)
    cone        mean cosine between tokens, layer by layer and behind the projectors (Figure 4)
    depth       depth read out of every teacher layer, against the simulator's (Figure 2)
    static      share of the targets that a token's place explains alone, with and without augmentation
    theorem     both sides of the bound on gradient coherence
    readout     depth and camera pose read out of a policy's own tokens by a probe that knows each token's place
    reach       where the hand closes for the first time in LIBERO, beside the object it is to pick up

Models are built as finetune.py builds them, with the flags that the checkpoint's run recorded; flags
given here win. A checkpoint may also be a base model. `analyze.py COMMAND --help` lists the flags of a command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis import config as flags
from prismatic.util.cli import run
from prismatic.util.errors import unknown_name
from prismatic.util.files import refuse_no_folder

COMMANDS: dict[str, type] = {
    "cka": flags.CkaConfig,
    "gradients": flags.GradientsConfig,
    "projectors": flags.ProjectorsConfig,
    "cone": flags.ConeConfig,
    "depth": flags.DepthConfig,
    "static": flags.StaticConfig,
    "theorem": flags.TheoremConfig,
    "reach": flags.ReachConfig,
    "readout": flags.ReadoutConfig,
}
# The module of experiments.analysis with the function of the command's name, where that is not the module's too.
MODULES = {"projectors": "cosines", "cone": "cosines", "theorem": "gradients"}


def main(argv: Sequence[str]) -> NoReturn:
    """Run the command named by the first argument."""
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    if command not in COMMANDS:
        print(f"error: {unknown_name('command', command, COMMANDS)}", file=sys.stderr)
        sys.exit(2)

    def analyze(config: flags.AnalysisConfig) -> int:
        refuse_no_folder("--out_dir", config.out_dir)
        # Imported when the flags are right: torch, transformers or the simulator.
        module = importlib.import_module(f"experiments.analysis.{MODULES.get(command, command)}")
        return getattr(module, command)(config)

    run(COMMANDS[command], analyze, argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
