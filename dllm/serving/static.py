"""The files of the page at `/`: its own, and the drawing that it shares with the player of a report."""

from __future__ import annotations

import json
from importlib import resources

from dllm.decoding.colours import RAMPS

_TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}  # fmt: skip
_SHARED = ("canvas.css", "canvas.js")
# The page asks its own server alone, and nothing that a model writes can become code.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def files() -> dict[str, tuple[bytes, str]]:
    """Content and media type by the path to serve it at: `/`, and `/page/NAME` for the others."""
    folder = resources.files("dllm.serving") / "page"
    own = {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}
    shared = {name: (resources.files("dllm.reports") / name).read_bytes() for name in _SHARED}
    ramps = {"ramps.js": f"// Colours from low to high.\nexport default {json.dumps(RAMPS)};\n".encode()}
    return {
        "/" if name == "index.html" else f"/page/{name}": (content, _TYPES[name.rpartition(".")[2]])
        for name, content in (own | shared | ramps).items()
    }
