"""What the site adds to docs/: pages of the repository outside it, notebooks, and references made from the code.

mkdocs calls `on_files` once and `on_page_markdown` for every page. Documents link to each other as they lie in the
repository, so that they work there too; here such links are led to the site's pages. Notebooks become Markdown by a few
lines of our own, because the plugins for that bring a whole notebook server.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import crossray
from pipeline import analyses, schema
from pipeline.config.faults import sections_in
from pipeline.config.run_file import RunConfig
from pipeline.planted.settings import BenchmarkConfig

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("infra/README.md", "infra/SCALING.md", "workloads/README.md"),
)
"""Documents of the repository that are pages too, below `repository/`."""
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_MAX_OUTPUT_LINES = 40
_PLAIN = "section"
"""Name of a section that is not one of several kinds."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {f"repository/{name}": (ROOT / name).read_text(encoding="utf-8") for name in OUTSIDE}
    pages |= {
        "reference/api.md": api_page(),
        "reference/run-file.md": sections_page(),
        "reference/tables.md": tables_page(),
    }
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        pages[f"tutorials/{path.stem}.md"] = notebook_page(path)
        files.remove(files.get_file_from_path(f"tutorials/{path.name}"))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead every link between files of the repository to the site's page; one to any other file becomes its name."""
    name = page.file.src_uri
    is_outside = name.startswith("repository/")
    own = ROOT / name.removeprefix("repository/") if is_outside else ROOT / "docs" / name
    depth = "../" * name.count("/")

    def led(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = (own.parent / target).resolve()
        inside = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if inside in OUTSIDE:
            return f"[{text}]({depth}repository/{inside}{anchor})"
        if inside == "README.md":
            return f"[{text}]({depth}README.md)"
        if inside.startswith("docs/") and path.suffix in (".md", ".ipynb"):
            return f"[{text}]({depth}{inside.removeprefix('docs/').replace('.ipynb', '.md')}{anchor})"
        if not path.exists():
            return link[0]  # an error of the build
        return f"{text} (`{inside}`)" if text != inside else f"`{inside}`"

    return _LINK.sub(led, markdown)


def notebook_page(path: Path) -> str:
    """A notebook as Markdown, with the outputs that are kept in it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join([*parts, f"This page is the notebook `docs/tutorials/{path.name}`."])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output of the cell above" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(output.get("text", data.get("text/plain", "")))
    lines = text.rstrip().splitlines()
    return "```text\n" + "\n".join(lines[:_MAX_OUTPUT_LINES]) + "\n```" if lines else ""


def api_page() -> str:
    """Every name of `import crossray`, from its docstring."""
    lines = ["# API", "", "Everything that `import crossray` shows.", ""]
    for name, home in crossray.SURFACE.items():
        module, colon, called = home.partition(":")
        target = module if colon and not called else f"{module}.{called or name}"
        lines += [f"::: {target}", "    options:", f"      heading: crossray.{name}", ""]
    return "\n".join(lines)


def sections_page() -> str:
    """Every key of run files and benchmark files, as documented at its field."""
    lines = ["# Run file", "", "Every key, its default and what it means. A file says only what differs.", ""]
    for title, kind in (("Run file", RunConfig), ("Benchmark file", BenchmarkConfig)):
        lines += [f"## {title}", ""]
        told: set[type[BaseModel]] = set()
        for key, section in _sections(kind, ""):
            if section not in told:
                told.add(section)
                lines += _section(section, key)
    return "\n".join(lines)


def _sections(kind: type[BaseModel], key: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and those below it, each with the key at which it stands first."""
    yield key, kind
    for name, field in kind.model_fields.items():
        for inner in sections_in(field.annotation):
            yield from _sections(inner, f"{key}.{name}".removeprefix("."))


def _section(section: type[BaseModel], key: str) -> Sequence[str]:
    of_kind = "" if _name(section) == _PLAIN else f" of kind {_name(section)}"
    lines = [f"### {key}{of_kind} {{ #{_anchor(section)} }}", ""] if key else []
    lines += [" ".join((section.__doc__ or "").split()), "", "| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        lines.append(f"| `{name}` | {_default(field)} | {_cell(field.description or '')} |")
    return [*lines, ""]


def _name(section: type[BaseModel]) -> str:
    kinds = get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()
    return str(kinds[0]) if kinds else _PLAIN


def _anchor(section: type[BaseModel]) -> str:
    return section.__qualname__.lower()


def _default(field: Any) -> str:
    inner = sections_in(field.annotation)
    if inner:
        names = [f"[{_name(one)}](#{_anchor(one)})" for one in inner]
        return ("" if field.is_required() else "optional: ") + " or ".join(dict.fromkeys(names))
    if field.default is PydanticUndefined:
        return "required" if field.is_required() else "empty"
    return f"`{json.dumps(field.default, default=str)}`"


def tables_page() -> str:
    """Every column of every table, from schema.py and the analyses that have tables of their own."""
    lines = [
        "# Tables",
        "",
        "Every table is Parquet; its metadata holds the order of the models, and what Delta_norm is.",
        "",
    ]
    for title, columns in sorted(_column_lists().items()):
        lines += [f"## {title}", "", "| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{column.name}` | {column.dtype} | {_cell(column.doc)} |" for column in columns]
        lines.append("")
    return "\n".join(lines)


def _column_lists() -> dict[str, tuple[schema.Column, ...]]:
    names = sorted(module.name for module in pkgutil.iter_modules(analyses.__path__))
    modules = [schema, *(importlib.import_module(f"{analyses.__name__}.{name}") for name in names)]
    return {
        name.removesuffix("_COLUMNS").replace("_", " ").lower(): value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_COLUMNS")
        and not name.startswith("_")
        and isinstance(value, tuple)
        and all(isinstance(one, schema.Column) for one in value)
    }


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
