"""From the numbers of a page to HTML. Whatever came with a model or data set is escaped here, once, for all of it."""

from importlib import resources

from unbackdoor._report._numbers import Page


def render(page: Page) -> str:
    """The page as one HTML file, which needs no network, no script and no other file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = _percent
    source = resources.files("unbackdoor._report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page)


def _percent(share: float) -> str:
    """A share in [0, 1] with one decimal; a narrow space that does not break before the sign."""
    return f"{100 * share:.1f}\u202f%"
