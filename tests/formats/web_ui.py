"""How AUTOMATIC1111's web UI reads the `parameters` of a picture (modules/infotext_utils.py)."""

from __future__ import annotations

import json
import re

_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LEAST_FIELDS = 3
_NEGATIVE = "Negative prompt: "


def parse_parameters(text: str) -> dict[str, str]:
    """`Prompt`, `Negative prompt` and the fields of a `parameters` text; the inverse of `format_parameters`."""
    lines = text.strip().split("\n")
    fields = _FIELD.findall(lines[-1])
    if len(fields) >= _LEAST_FIELDS:
        lines.pop()
    else:
        fields = []
    at = next((i for i, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[at:]).strip().removeprefix(_NEGATIVE)
    return {"Prompt": "\n".join(lines[:at]), "Negative prompt": negative} | {k: _unquoted(v) for k, v in fields}


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text)) if text[:1] == text[-1:] == '"' else text
    except ValueError:
        return text
