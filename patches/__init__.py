"""Put `rocket_align` into a checkout of moojink/openvla-oft, check it, take it out again.

    python -m patches apply PATH    # may be repeated; brings an older injection up to date
    python -m patches check PATH    # 0: injected and intact, 1: not injected (or outdated), 2: cannot be
    python -m patches revert PATH   # every file as it was, byte for byte

What changes in PATH:
    vla-scripts/finetune.py      about twenty lines, found and rewritten in the syntax tree (`rewrite`)
    vla-scripts/rocket_join.py   new: what those lines call (a copy of the module here of that name)
    vla-scripts/rocket_align/    new: a copy of the package. Upstream pins older torch and transformers than this
                                 project needs and both have a package `prismatic`, so this project cannot be installed
                                 beside it; `rocket_align` alone runs there, and a script's own folder is always
                                 importable.
    .rocket_align/               new: the script as it was, and the checksums of what was written
"""
