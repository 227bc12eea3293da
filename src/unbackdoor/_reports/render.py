"""From the numbers of a page to HTML. All text of models and data sets is escaped here, in one place."""

from typing import Any

from unbackdoor._reports.answers_page import AnswersPage
from unbackdoor._reports.audit_page import AuditPage
from unbackdoor._reports.page import Page
from unbackdoor._reports.sentences import percent
from unbackdoor._reports.stress_page import StressPage


def render(page: Page) -> str:
    """The page as one HTML file, which needs no network, no script and no other file."""
    return _filled("page.html.j2", page)


def render_answers(page: AnswersPage) -> str:
    """The page about a purified language model, as one HTML file of the same kind."""
    return _filled("answers.html.j2", page)


def render_stress(page: StressPage) -> str:
    """The page about a stress test, as one HTML file of the same kind."""
    return _filled("stress.html.j2", page)


def render_audit(page: AuditPage) -> str:
    """The page about an audit, as one HTML file of the same kind."""
    return _filled("audit.html.j2", page)


def _filled(template: str, page: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("unbackdoor._reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(page=page)
