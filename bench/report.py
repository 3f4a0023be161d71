"""The paper's evaluation and ours, side by side: one page in Markdown and in HTML, with pictures.

    python -m bench.report bench/results/nvidia-h200/sweeps

reads every sweep file of the folder, and what `bench.simulator.beyond` left beside it, and writes
report.md, report.html and plots/ there, and sweeps.json, the targets, for `bench.summary`. It says
which points of the grid were not measured; nothing is filled in for them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from bench import report_slo
from bench.record import command, commit
from bench.records import RecordError
from bench.report_baselines import ablation, merged
from bench.report_plots import draw
from bench.report_rows import rows_of
from bench.report_sections import Section, num_adapters, ranks, table_3
from bench.report_simulated import NAME, many_adapters, read_simulated, tensor_parallel
from bench.report_targets import targets
from bench.simulator.sweep_points import SIMULATED
from bench.sweep import read_all, write_tidy

SECTIONS = (
    num_adapters, table_3, ranks, ablation, report_slo.rate, report_slo.alpha, report_slo.cv,
    report_slo.abort, report_slo.policies, report_slo.policies_short, report_slo.clusters,
    report_slo.fairness, merged,
)  # fmt: skip

MARKDOWN = """\
# The paper's evaluation, and ours{{ ": SIMULATED" if is_simulated }}

{{ origin }}

Made by `python -m bench.report` from the records beside it (`*.jsonl`: every request;
`table.csv`: every point). Throughput is finished requests over wall time, drain included. Prompts
are random tokens; lengths are the paper's.
{% for section, has_plot in sections %}
## {{ section.title }}

{{ section.text }}
{% if has_plot %}
![{{ section.title }}](plots/{{ section.figure }}.png)
{% endif %}
{%- for table in section.tables if table.rows %}
| {{ table.header | join(" | ") }} |
| {{ table.header | map("dashes") | join(" | ") }} |
{% for row in table.rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- endfor %}
{%- if section.missing %}
<details><summary>Not measured ({{ section.missing | length }})</summary>
{% for key in section.missing %}
* `{{ key }}`
{%- endfor %}

</details>
{% endif %}
{%- endfor %}"""

HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>The paper's evaluation, and ours</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: 2px 10px; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
</style>
<h1>The paper's evaluation, and ours{{ ": SIMULATED" if is_simulated }}</h1>
<p>{{ origin }}</p>
<p>Made by <code>python -m bench.report</code> from the records beside it. Throughput is finished
requests over wall time, drain included. Prompts are random tokens; lengths are the paper's.</p>
{% for section, has_plot in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
{% if has_plot %}<img src="plots/{{ section.figure }}.png" alt="{{ section.title }}">{% endif %}
{% for table in section.tables if table.rows %}
<table><tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% if section.missing %}
<details><summary>Not measured ({{ section.missing | length }})</summary><ul>
{% for key in section.missing %}<li><code>{{ key }}</code></li>
{% endfor %}</ul></details>
{% endif %}
{% endfor %}
</html>
"""


def make_report(folder: Path, simulated: Path | None = None) -> dict[str, Any]:
    """Write the report of a folder of sweep files; the result that `bench.summary` collects.

    simulated: of `bench.simulator.beyond`; simulated-beyond.json beside the folder.

    Raises RecordError if a file cannot be read.
    """
    records = read_all(folder)
    rows = rows_of(records)
    points = read_simulated(simulated or folder.parent / NAME)
    made = [make(rows, records) for make in SECTIONS]
    made += [many_adapters(points), tensor_parallel(points)]
    sections: list[tuple[Section, bool]] = []
    for section in made:
        panels = () if section.is_empty else section.panels
        has_plot = draw(panels, folder / "plots" / f"{section.figure}.png")
        sections.append((section, has_plot))
    origin = origin_of(records)
    is_simulated = any(str(record["device"]).startswith(SIMULATED) for record in records)
    page = {"sections": sections, "origin": origin, "is_simulated": is_simulated}
    (folder / "report.md").write_text(_render(MARKDOWN, page, is_html=False).rstrip() + "\n")
    (folder / "report.html").write_text(_render(HTML, page, is_html=True))
    write_tidy(folder)
    devices = sorted({str(record["device"]) for record in records})
    return {
        "bench": "report",
        "device": ", ".join(devices) or "none",
        "commit": ", ".join(sorted({str(record["commit"]) for record in records})) or commit(),
        "command": command(),
        "targets": targets(rows),
    }


def origin_of(records: Sequence[dict[str, Any]]) -> str:
    """Which devices and commits the points are of."""
    if not records:
        return "No point has been measured."
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        name = (str(record["device"]), str(record["commit"]))
        counts[name] = counts.get(name, 0) + 1
    parts = [f"{n} points on {device} at {name}" for (device, name), n in counts.items()]
    return "; ".join(parts) + "."


def _render(template: str, page: dict[str, Any], *, is_html: bool) -> str:
    environment = jinja2.Environment(autoescape=is_html, undefined=jinja2.StrictUndefined)
    environment.filters["dashes"] = lambda name: "---"
    return environment.from_string(template).render(**page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="of sweep files")
    parser.add_argument("--targets", type=Path, help="where to write the targets; sweeps.json")
    parser.add_argument("--simulated", type=Path, help=f"of bench.simulator.beyond; ../{NAME}")
    args = parser.parse_args()
    try:
        result = make_report(args.folder, args.simulated)
    except (OSError, RecordError) as exc:
        raise SystemExit(f"bench.report: {exc}") from exc
    path = args.targets or args.folder / "sweeps.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.folder / 'report.md'}: {len(result['targets'])} targets measured")


if __name__ == "__main__":
    main()
