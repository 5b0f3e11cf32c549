"""The pages in build/: what they are made of, and how they look to a browser."""

import itertools
import shutil
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages import build_site
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
WIDTHS, THEMES = (390, 1100), ("light", "dark")


def copy_project(target):
    """Copy what a site is made of, except the notebooks."""
    shutil.copytree(ROOT / "report", target / "report", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    shutil.copy(ROOT / "README.md", target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of this project, from the outputs that are stored in its notebooks."""
    root = tmp_path_factory.mktemp("project")
    copy_project(root)
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    build_site(root, stored=True)
    return root / "build"


@pytest.fixture
def toy(tmp_path):
    """A project without notebooks; returns a function that adds one and returns the folder of the site."""
    copy_project(tmp_path)
    (tmp_path / "notebooks").mkdir()

    def add(*cells, name="01_toy"):
        nbformat.write(new_notebook(cells=list(cells)), tmp_path / "notebooks" / f"{name}.ipynb")
        build_site(tmp_path)
        return tmp_path / "build"

    add.root = tmp_path
    return add


# --- Without a browser ---


LINKS = {"02_next.ipynb#A-heading": "02_next.html#A-heading", "./02_next.ipynb": "./02_next.html", "#here": "#here"}
LINKS |= {"../README.md#results": "index.html#results", "https://example.org/a.ipynb": "https://example.org/a.ipynb"}


def test_links_between_notebooks_become_links_between_pages(toy):
    page = toy(new_markdown_cell("\n\n".join(f"[text]({url})" for url in LINKS))) / "01_toy.html"
    text = page.read_text(encoding="utf-8")
    assert not [leads_to for leads_to in LINKS.values() if f'href="{leads_to}"' not in text]


def test_formulas_need_no_script(site):
    for page in site.glob("0*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<math" in text and not [word for word in ("$$", "https://cdn", "<script src") if word in text]


def test_an_executed_notebook_is_shown_as_executed(toy):
    cell = new_code_cell("1", execution_count=1, outputs=[new_output("stream", text="of old")])
    page = toy(new_markdown_cell("# 1. A title: more\n\nThe lead."), cell) / "01_toy.html"
    read = lambda: page.read_text(encoding="utf-8")  # noqa: E731
    assert "of old" in read()
    cell.outputs[0].text = "of new"
    nbformat.write(new_notebook(cells=[cell]), toy.root / "build" / "01_toy.ipynb")
    build_site(toy.root)
    assert "of new" in read() and "of old" not in read()
    build_site(toy.root, stored=True)
    assert "of old" in read() and "<title>1. A title: more</title>" in read()
    index = (toy.root / "build" / "index.html").read_text(encoding="utf-8")
    assert '<a href="01_toy.html">1. A title: more</a>' in index and "The lead." in index


def test_folded_code_opens_by_a_click(toy):
    folded = new_code_cell("drawing", metadata={"jupyter": {"source_hidden": True}})
    page = toy(new_markdown_cell("# 1. A title"), new_code_cell("lesson"), folded) / "01_toy.html"
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    assert [details.pre.get_text().strip() for details in soup.select(".cell details")] == ["drawing"]
    assert "lesson" in soup.get_text()


# --- In a browser ---


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; where there is none, the tests that need it are skipped, with a warning."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        warnings.warn("No Chromium is installed: the pages were NOT looked at in a browser", stacklevel=1)
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


def faults(browser, site):
    """What is wrong with the pages of a site, in words: each page in each theme, on a phone and on a desk."""
    problems, links = [], set()
    for theme, width in itertools.product(THEMES, WIDTHS):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on("requestfailed", lambda request: problems.append(f"not loaded: {request.url}"))
        for path in sorted(site.glob("*.html")):
            page.goto(path.as_uri())
            results = "[...document.querySelectorAll('.index table')].some(t => t.scrollWidth > t.clientWidth)"
            scroll = page.evaluate("document.documentElement.scrollWidth")
            if scroll > width or page.evaluate(results):
                problems.append(f"{path.name}: {scroll} px wide at {width} px")
            for alt, size in page.evaluate("[...document.images].map(i => [i.alt.trim(), i.naturalWidth])"):
                if not alt or "No description" in alt or not size:
                    problems.append(f"{path.name}: a figure without alternative text, or not shown: {alt}")
            links.update((path.name, link) for link in page.evaluate("[...document.links].map(a => a.href)"))
        context.close()
    page, anchors = browser.new_page(), {}
    for path in site.resolve().glob("*"):
        page.goto(path.as_uri()) if path.suffix == ".html" else None
        anchors[path] = {"", *page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")}
    page.close()
    for name, url in ((name, urlsplit(link)) for name, link in sorted(links)):
        found = anchors.get(Path(unquote(url.path)), ())
        if url.scheme == "file" and url.fragment not in found and unquote(url.fragment) not in found:
            problems.append(f"{name}: no such page or heading: {url.path}#{url.fragment}")
    return problems


def test_the_site_is_sound(browser, site):
    assert faults(browser, site) == []


def test_the_navigation_leads_through_all_pages(browser, site):
    page = browser.new_page()
    page.goto((site / "index.html").as_uri())
    seen = []
    while page.locator("a[rel=next]").count():
        with page.expect_navigation():  # a click on a link to a file returns before the next page is there
            page.locator("a[rel=next]").click()
        seen.append(Path(urlsplit(page.url).path).name)
    assert seen == sorted(path.name for path in site.glob("0*.html"))
    with page.expect_navigation():
        page.locator("header .home").click()
    assert page.url.endswith("/index.html")
    assert all(page.locator(f"header nav a[href='{name}']").count() == 1 for name in seen)
    page.close()


@pytest.mark.parametrize("theme", THEMES)
def test_both_themes(browser, site, theme):
    context = browser.new_context(color_scheme=theme)
    page, dark = context.new_page(), theme == "dark"
    page.goto((site / "01_baseline.html").as_uri())
    for expected in (dark, not dark):  # as the system has it, then as the button says, which the next page remembers
        for kind, bright in (("backgroundColor", not expected), ("color", expected)):
            style = f"getComputedStyle(document.body).{kind}.match(/\\d+/g).slice(0, 3).map(Number)"
            assert (sum(page.evaluate(style)) > 380) is bright
        page.locator("header button").click()
        page.goto((site / "index.html").as_uri())
    page.goto((site / "01_baseline.html").as_uri())
    looks = page.eval_on_selector_all("main img", "all => all.map(i => [i.alt, getComputedStyle(i).filter])")
    inverted = {("invert" in look, "mage" in alt or "icture" in alt) for alt, look in looks}
    assert looks and inverted <= {(dark, False), (False, True)}
    page.locator("main img").first.click()
    assert page.locator("dialog[open] img").count() == 1
    context.close()
