"""Tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A plain HTML table with a line above it; every text is escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        style = "text-align:left;white-space:pre-wrap"
        return "<tr>" + "".join(f"<{tag} style='{style}'>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    above = f"<div><code>{html.escape(caption)}</code></div>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return f"{above}<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"
