"""The pages of the documentation, and the code that they show."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *NOTEBOOKS]
SHELL = "%%sh\n"
"""The first line of a cell with shell commands."""


def cells(notebook: Path) -> list[tuple[str, str]]:
    """The language and source of each cell: "markdown", "python" or "sh"."""
    found = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source, language = "".join(cell["source"]), "markdown"
        if cell["cell_type"] == "code":
            language = "sh" if source.startswith(SHELL) else "python"
        found.append((language, source.removeprefix(SHELL)))
    return found


def text(page: Path) -> str:
    """A page as Markdown, with the code of a notebook in blocks."""
    if page.suffix == ".md":
        return page.read_text()
    return "\n\n".join(
        source if language == "markdown" else f"```{language}\n{source}\n```"
        for language, source in cells(page)
    )


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
