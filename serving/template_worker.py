"""Renders chat templates in a process of its own, so that one that never ends can be killed.

Run as a script by `serving.chat_template`; imports nothing of this project. One JSON object a
line on stdin (`{"template", "values"}`), one a line on stdout (`{"text"}` or `{"error"}`).
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_MEMORY_BYTES = 1 << 30
MAX_TEXT = 16 << 20


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it shows its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Unlike Jinja's own filter, without HTML escapes: the text is for a model."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def environment() -> jinja2.Environment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def main() -> None:
    """Serve until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    env = environment()
    compiled: dict[str, jinja2.Template] = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["template"] not in compiled:
                compiled = {job["template"]: env.from_string(job["template"])}
            text = compiled[job["template"]].render(**job["values"])
            if len(text) > MAX_TEXT:
                raise ValueError(f"the text is longer than {MAX_TEXT} characters")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"needs more than {MAX_MEMORY_BYTES} bytes of memory"}
        except Exception as exc:  # whatever a template raises is its author's, and told as such
            answer = {"error": f"{type(exc).__name__}: {exc}"[:500]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
