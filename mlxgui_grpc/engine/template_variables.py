"""Which variables a chat template reads."""

import re

from jinja2 import TemplateError, nodes
from jinja2.sandbox import SandboxedEnvironment

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""A tag that transformers adds to Jinja, for training."""


def variables_of(template: str) -> frozenset[str]:
    """The names that a template reads, its own among them; of what is no template, all words. Nothing is evaluated."""
    environment = SandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", template))
        return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")
    except (TemplateError, RecursionError):
        return frozenset(re.findall(r"\w+", template))
