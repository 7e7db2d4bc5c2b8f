"""Write the injection into a checkout, and take it out again.

Every file is written to a temporary name and renamed. The record comes first and the script last on the way in, the
other way round on the way out: wherever a run is cut off, the script is whole, and `apply` or `revert` finishes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Literal

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write

SCRIPT = "vla-scripts/finetune.py"
JOIN = "vla-scripts/rocket_join.py"
PACKAGE = "vla-scripts/rocket_align"
STATE = ".rocket_align"
ORIGINAL, RECORD = f"{STATE}/finetune.py.original", f"{STATE}/files.json"

State = Literal["absent", "outdated", "applied"]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _own_files() -> dict[str, bytes]:
    """The files that go beside the script: the package, and the module that joins it to the script."""
    import rocket_align

    package = Path(str(rocket_align.__file__)).parent
    files = {f"{PACKAGE}/{path.relative_to(package).as_posix()}": path for path in package.rglob("*.py")}
    files[JOIN] = Path(__file__).with_name("rocket_join.py")
    return {name: path.read_bytes() for name, path in sorted(files.items())}


class Checkout:
    """A checkout of OpenVLA-OFT, and what an earlier injection wrote into it.

    Args:
        path: its top folder.

    Raises:
        UsageError: no such checkout, or files in the way that were written by hand or edited after an injection.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path)
        if not (self.root / SCRIPT).is_file():
            raise UsageError(f"{path}: no {SCRIPT}; accepted: the top folder of a checkout of OpenVLA-OFT")
        self._recorded = self._read_record()  # checksums that each file of ours may have
        self._refuse_foreign_files()

    def _content(self, name: str) -> bytes | None:
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def _read_record(self) -> dict[str, list[str]]:
        text = self._content(RECORD)
        if text is None:
            return {}
        try:
            record = {str(name): [str(digest) for digest in digests] for name, digests in json.loads(text).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(
                f"{self.root / RECORD}: not readable ({error}); remove {STATE} and restore with git"
            ) from error
        original = self._content(ORIGINAL)
        if original is None or not {SCRIPT, ORIGINAL} <= set(record) or _digest(original) not in record[ORIGINAL]:
            raise UsageError(
                f"{self.root / ORIGINAL}: missing or changed; remove {STATE} and restore the script with git"
            )
        return record

    def _is_ours(self, name: str) -> bool:
        content = self._content(name)
        return content is not None and _digest(content) in self._recorded.get(name, ())

    def _refuse_foreign_files(self) -> None:
        """Nothing that someone else wrote or changed may be overwritten or removed."""
        present = (path for path in (self.root / PACKAGE).rglob("*") if path.parent.name != "__pycache__")
        names = [path.relative_to(self.root).as_posix() for path in present if not path.is_dir()]
        for name in sorted({*names, *([JOIN] if (self.root / JOIN).exists() else [])}):
            if not self._is_ours(name):
                fault = "was edited after the injection" if name in self._recorded else "is not from an injection"
                raise UsageError(f"{self.root / name}: {fault}; accepted: no such file; move it away first")

    @cached_property
    def original(self) -> bytes:
        """The script without the alignment: what was kept of it, unless the script itself is without."""
        content = self._content(ORIGINAL if self._is_ours(SCRIPT) else SCRIPT)
        assert content is not None  # __init__ has seen both
        return content

    @cached_property
    def wanted(self) -> dict[str, bytes]:
        """Content of every file of an injection by this version of the project; the script is the last.

        Raises UsageError: the script lacks a place that the injection needs.
        """
        try:
            from patches.rewrite import PlaceNotFound, inject
        except ModuleNotFoundError as error:
            if error.name != "libcst":
                raise
            raise UsageError('the package libcst is missing; it comes with: pip install -e ".[patches]"') from error
        try:
            return {**_own_files(), SCRIPT: inject(self.original)}
        except PlaceNotFound as error:
            advice = f" (as it was before: {self.root / ORIGINAL})" if self._recorded else ""
            raise UsageError(
                f"{self.root / SCRIPT}: {error}; accepted: OpenVLA-OFT's script, at 213c5ff or like it{advice}"
            ) from error

    @property
    def state(self) -> State:
        """State of the injection: there or not, and as this version of the project writes it.

        Raises UsageError: it is not, and cannot be put there.
        """
        if all(self._content(name) == content for name, content in self.wanted.items()):
            extra = set(self._recorded) - {*self.wanted, ORIGINAL}
            return "outdated" if any(self._is_ours(name) for name in extra) else "applied"
        return "outdated" if self._is_ours(SCRIPT) else "absent"

    def _write(self, name: str, content: bytes) -> None:
        path = (self.root / name).resolve()
        mode = path.stat().st_mode if path.exists() else None
        atomic_write(path, content)
        if mode is not None:
            path.chmod(mode)

    def _write_record(self, record: dict[str, list[str]]) -> None:
        self._write(RECORD, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        self._recorded = record

    def apply(self) -> None:
        """Inject, or bring an older injection up to date; does nothing where that is done.

        Raises UsageError: as for `wanted`; nothing was written.
        """
        if self.state == "applied":
            return
        old = self._recorded
        new = {name: [_digest(content)] for name, content in {**self.wanted, ORIGINAL: self.original}.items()}
        self._write(ORIGINAL, self.original)
        # Until all is written, a file's old content counts as ours too.
        self._write_record({name: [*old.get(name, []), *new.get(name, [])] for name in {**old, **new}})
        for name in set(old) - set(new):
            (self.root / name).unlink(missing_ok=True)
        for name, content in self.wanted.items():
            self._write(name, content)
        self._write_record(new)

    def revert(self) -> bool:
        """Take the injection out, so that the script is what it was, byte for byte. Returns whether there was one.

        Raises UsageError: the script was edited after the injection; nothing was changed.
        """
        if not self._recorded:
            return False
        if self._is_ours(SCRIPT):
            self._write(SCRIPT, self.original)
        else:
            _ = self.wanted  # refuses a script that holds an injection which is not as written
        (self.root / JOIN).unlink(missing_ok=True)
        compiled = self.root / "vla-scripts" / "__pycache__"
        for path in compiled.glob("rocket_join.*.pyc"):
            path.unlink()
        if compiled.is_dir() and not any(compiled.iterdir()):
            compiled.rmdir()
        if (self.root / PACKAGE).exists():
            shutil.rmtree(self.root / PACKAGE)
        (self.root / RECORD).unlink()
        shutil.rmtree(self.root / STATE)
        self._recorded = {}
        return True
