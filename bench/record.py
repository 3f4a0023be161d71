"""What every benchmark result carries, and where it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def commit() -> str:
    """The commit of this tree, or "unknown" outside a repository."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def command() -> str:
    """The command that is running, as a user would type it; output paths are left out."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word in ("--out", "--commit", "--cache-dir", "--against", "--scratch"):
            skip = not skip
            continue
        words.append(word)
    module = getattr(sys.modules["__main__"].__spec__, "name", Path(sys.argv[0]).name)
    return " ".join(["python -m", module, *words])


def record(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as JSON, and write it to `out` if there is one."""
    text = json.dumps(result, indent=1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)
