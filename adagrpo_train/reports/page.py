"""What all pages share: their templates, and words for numbers."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape


def render(template: str, **values: Any) -> str:
    """A page as HTML. Everything is escaped but what is Markup; a value that a template lacks is an error."""
    environment = Environment(
        loader=PackageLoader("adagrpo_train.reports", "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "short_commit": short_commit}
    return environment.get_template(template).render(**values)


def breakable(text: str) -> Markup:
    """The text, which may be broken after a slash or an underscore."""
    return Markup(str(escape(text)).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def duration(seconds: float) -> str:
    """In the unit that suits its length."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def short_commit(commits: str | None) -> str:
    """The first twelve digits of each, and what is said after them; "" of none."""
    parts = (commit.partition(" ") for commit in (commits or "").split(", "))
    return ", ".join(f"{digits[:12]} {rest}".strip() for digits, _, rest in parts)
