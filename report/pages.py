"""The pages in build/: a small site of the executed notebooks, with an index. It needs no network and no server."""

import base64
import html
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
import mistune
import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

THEMES = {"light": "default", "dark": "github-dark"}  # of the code, by name in Pygments


class Renderer(IPythonRenderer):
    """Markdown of a notebook as HTML, with formulas as MathML and links between notebooks as links between pages."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return f'<div class="formula">{convert(body, display="block")}</div>'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if not re.match(r"[a-z]+:|/", url):
            url = re.sub(r"\.ipynb(?=#|$)", ".html", url)
            url = re.sub(r"^(\.\./)?README\.md(?=#|$)", "index.html", url)
        return super().link(text, url, title)


WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDED = """{% extends "index.html.j2" %}
{% block input_group %}
{% if cell.metadata.get("jupyter", {}).source_hidden %}
<details><summary>Show the code</summary>{{ super() }}</details>
{% else %}{{ super() }}{% endif %}
{% endblock %}"""


class Exporter(HTMLExporter):
    """The body of a notebook's page, without prompts, styles or scripts; the code of folded cells opens by a click."""

    def __init__(self, **traits):
        without = {"exclude_input_prompt": True, "exclude_output_prompt": True}
        super().__init__(template_name="basic", raw_template=FOLDED, **without, **traits)

    def default_filters(self):
        yield from super().default_filters()
        yield "markdown2html", lambda source: MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


@dataclass(frozen=True)
class Page:
    """One notebook as a page: file name without ending, title, number for the navigation, and what it says first."""

    name: str
    title: str
    lead: str
    notebook: NotebookNode
    note: str

    @property
    def short(self) -> str:
        """The title up to its colon: enough for the navigation."""
        return self.title.split(":")[0]


def read_page(path: Path, note: str) -> Page:
    """Return the page of a notebook; its title is the first heading, its lead the first paragraph below."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)  # a slider needs a kernel; the picture beside it stays
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^# +(.+)", text, re.MULTILINE)
    paragraphs = [part for part in re.split(r"\n\s*\n", text[title.end() if title else 0 :]) if part.strip()]
    lead = next((part for part in paragraphs if not part.lstrip().startswith(("#", "|", "!"))), "")
    return Page(path.stem, title[1] if title else path.stem, lead, notebook, note)


def build_site(root: Path, *, stored: bool = False) -> list[Path]:
    """Write the pages of all notebooks and their index into build/. Returns their paths, the index first.

    A notebook that was executed into build/ is shown as executed there, another one with the outputs that are stored
    in it; with `stored`, all are shown with their stored outputs.
    """
    target = root / "build"
    target.mkdir(exist_ok=True)
    pages = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        executed = target / path.name
        if executed.exists() and not stored:
            pages.append(read_page(executed, "The outputs are those of the run that made this page."))
        else:
            pages.append(read_page(path, "The outputs are those stored in the notebook."))
    style = (root / "report" / "style.css").read_text(encoding="utf-8")
    (target / "style.css").write_text(f"{style}\n{code_style()}\n", encoding="utf-8")
    report = root / "report" / "report.pdf"
    if report.exists():
        shutil.copy(report, target)

    loader = jinja2.FileSystemLoader(root / "report")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.j2")
    common = {"pages": pages, "report": report.exists()}

    def write(name: str, **content) -> Path:
        (target / f"{name}.html").write_text(template.render(here=name, **common, **content), encoding="utf-8")
        return target / f"{name}.html"

    first = pages[0] if pages else None
    written = [write("index", title="Experts on CIFAR-10", body=Markup(index_body(root, pages)), after=first)]
    exporter = Exporter()
    for index, page in enumerate(pages):
        body, _ = exporter.from_notebook_node(page.notebook)
        headings = BeautifulSoup(body, "html.parser").select("h2[id]")
        written.append(
            write(
                page.name,
                title=page.title,
                body=Markup(body),
                contents=[{"id": h["id"], "text": h.get_text().removesuffix("¶")} for h in headings],
                note=page.note,
                before=pages[index - 1] if index else None,
                after=pages[index + 1] if index + 1 < len(pages) else None,
            )
        )
    return written


def code_style() -> str:
    """Return the style sheet of highlighted code, for both themes."""
    rules = []
    for theme, style in THEMES.items():
        formatter = HtmlFormatter(style=style, nobackground=True)
        rules.append(formatter.get_style_defs(f'[data-theme="{theme}"] .highlight'))
    return "\n".join(rules)


def index_body(root: Path, pages: list[Page]) -> str:
    """Return the body of the index: the README's opening, the notebooks, its figure and its table of results."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    to_html = mistune.create_markdown(plugins=["table"])
    opening = re.split(r"\n\s*\n", readme)[1]
    parts = ["<h1>Experts on CIFAR-10</h1>", to_html(opening), "<h2>Notebooks</h2>", '<ul class="cards">']
    for page in pages:
        link = f'<a href="{page.name}.html">{html.escape(page.title)}</a>'
        parts.append(f"<li><h3>{link}</h3>{MarkdownWithMath(renderer=Renderer(escape=False)).render(page.lead)}</li>")
    parts += ["</ul>", "<h2>Results</h2>"]
    figure = root / "report" / "figures" / "accuracy_cost.png"
    if figure.exists():
        with Image.open(figure) as image:
            alt = html.escape(image.info["Description"])
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')
    table = r"<!-- results: .*?-->\n\n(.*?)\n\n<!-- end of results -->\n\n(.*?)\n\n"  # and the legend below it
    results = "\n\n".join(re.search(table, readme, re.DOTALL).groups())
    links = r"\[([^]]*)\]\((?!report/report.pdf)[^)]*\)"  # to records, which are not pages
    results = re.sub(links, r"\1", results).replace("report/report.pdf", "report.pdf")
    parts.append(f'<div class="results">{to_html(results)}</div>')
    return "\n".join(parts)
