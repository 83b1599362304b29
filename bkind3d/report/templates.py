"""The templates of the pages."""

import jinja2


def template_of(name: str) -> jinja2.Template:
    """A file of this folder; a value that is not given is an error, and text cannot become markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bkind3d.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
