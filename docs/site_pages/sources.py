"""Links of pages to files of the repository, which become pages of the site."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_HREF = re.compile(r'(?<=href=")([^"#]+)(#[^"]*)?(?=")')
_IMAGES = {".gif", ".png", ".svg"}
_LANGUAGES = {
    ".css": "css", ".csv": "text", ".jinja": "jinja", ".js": "javascript", ".json": "json", ".py": "python",
    ".toml": "toml", ".yaml": "yaml", ".yml": "yaml",
}  # fmt: skip


def place_of(page: str) -> PurePosixPath:
    """Where the text of a page stands in the repository, from which its links start."""
    if page == "index.md":
        return PurePosixPath("README.md")
    if page.startswith("source/"):
        path = PurePosixPath(page).relative_to("source")
        return path if (ROOT / path).is_file() else path.with_suffix("")
    return PurePosixPath("docs", page)


def page_of(path: PurePosixPath, pages: Collection[str]) -> str | None:
    """The page, or the image, that a file or folder of the repository becomes; None if there is nothing of that name.

    Args:
        path: in the repository.
        pages: those there are, by their paths in docs/.
    """
    if path == PurePosixPath("README.md"):
        return "index.md"
    if path.parts[:1] == ("docs",):
        own = path.relative_to("docs").as_posix()
        # A folder is its own page, or the first of its pages.
        inside = sorted(
            page for page in pages if page.startswith(f"{own}/") and page.endswith((".md", ".py", ".ipynb"))
        )
        return next((page for page in (own, f"{own}.md", *inside) if page in pages), None)
    if not (ROOT / path).exists() or any(part.startswith(".") for part in path.parts):
        return None
    kept = path.suffix in {".md", *_IMAGES} and (ROOT / path).is_file()
    return f"source/{path}" if kept else f"source/{path}.md"


def links(page: str, text: str) -> Iterator[PurePosixPath]:
    """The places in the repository that the links of a page name, whether or not they exist."""
    for target, _ in _LINK.findall(text):
        if (path := _resolved(page, target)) is not None:
            yield path


def rewritten(page: str, text: str, pages: Collection[str]) -> str:
    """The text of a page with its links to the repository as links to pages; those to nothing stay as they are."""
    return _LINK.sub(lambda link: _moved(page, link, {name: name for name in pages}), text)


def rewritten_html(page: str, html: str, urls: Mapping[str, str]) -> str:
    """The same of a page that is HTML already, with the addresses of all pages."""
    return _HREF.sub(lambda link: _moved(page, link, urls), html)


def _moved(page: str, link: re.Match[str], urls: Mapping[str, str]) -> str:
    path = _resolved(page, link[1])
    found = None if path is None else page_of(path, urls)
    return link[0] if found is None else relpath(urls.get(found, found), PurePosixPath(page).parent) + (link[2] or "")


def reached(texts: Mapping[str, str], pages: Collection[str]) -> dict[str, PurePosixPath]:
    """The files and folders outside docs/ that pages link to, directly or through such pages, by their own page."""
    found: dict[str, PurePosixPath] = {}
    left = list(texts.items())
    while left:
        page, text = left.pop()
        for path in links(page, text):
            target = page_of(path, pages)
            if target is not None and target.startswith("source/") and target not in found:
                found[target] = path
                if target.endswith(".md"):
                    left.append((target, text_of(path)))
    return found


def text_of(path: PurePosixPath) -> str:
    """The page of a file or folder of the repository."""
    own = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    if own.is_dir():
        files = sorted(file.relative_to(own).as_posix() for file in own.rglob("*") if _shown(file))
        items = "\n".join(f"- [{name}]({path.name}/{name})" for name in files)
        return f"{hidden}# {path}/\n\n{items}\n"
    text = own.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{hidden}# {path}\n\n{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _shown(file: Path) -> bool:
    inside = file.relative_to(ROOT).parts
    return file.is_file() and not any(part.startswith((".", "__pycache__")) for part in inside)


def _resolved(page: str, target: str) -> PurePosixPath | None:
    if re.match(r"[a-z][a-z0-9+.-]*:|/", target):
        return None
    path = normpath((place_of(page).parent / target).as_posix())
    return None if path.startswith("..") else PurePosixPath(path)
