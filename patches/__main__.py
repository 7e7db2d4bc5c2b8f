"""Command line of the injection: `python -m patches apply|check|revert PATH`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# Started inside a checkout of OpenVLA-OFT, Python would take that one's `prismatic`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from patches.checkout import SCRIPT, Checkout
from prismatic.util.cli import CommandParser, exit_code

SAID = {
    "apply": {
        "absent": "alignment injected",
        "outdated": "alignment brought up to date",
        "applied": "alignment was there already",
    },
    "check": {
        "absent": f"no alignment; every place it needs is in {SCRIPT}",
        "outdated": "an alignment that is incomplete or of another version; `apply` brings it up to date",
        "applied": "alignment injected and intact",
    },
}


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 `check` found none or an outdated one, 2 the checkout or the command line is wrong."""
    parser = CommandParser(
        prog="python -m patches", description="Put rocket_align into a checkout of moojink/openvla-oft, or take it out."
    )
    parser.add_argument(
        "command", choices=(*SAID, "revert"), help="apply (may be repeated), check (exit code 0: there) or revert"
    )
    parser.add_argument("path", help="top folder of the checkout")
    arguments = parser.parse_args(argv)
    checkout = Checkout(arguments.path)
    if arguments.command == "revert":
        print(f"{checkout.root}: {'alignment taken out' if checkout.revert() else 'there was no alignment'}")
        return 0
    state = checkout.state
    if arguments.command == "apply":
        checkout.apply()
    print(f"{checkout.root}: {SAID[arguments.command][state]}")
    return 0 if arguments.command == "apply" or state == "applied" else 1


if __name__ == "__main__":
    sys.exit(main())
