"""Jinja environment of chat templates: sandboxed, with the blocks and functions of transformers.

- A template comes from elsewhere, so it runs in jinja2's immutable sandbox.
- `{% generation %}` blocks put two characters around what they render, which the caller chooses.
- There is no `strftime_now`: data must not depend on the day it is made. Published templates take a
  fixed date then.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from k2train.errors import DataError

HAS_BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = "k2train_marks"
"""Name of the two characters among a template's variables."""


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: what a response says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = jinja2.nodes.Name(MARKS, "load")
        call = self.call_method("_marked", [marks])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, marks: Any, caller: Any) -> str:
        if not isinstance(marks, str) or len(marks) != 2:
            return str(caller())
        return f"{marks[0]}{caller()}{marks[1]}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what HTML would read.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str, name: str) -> jinja2.Template:
    """Compile a template. Raises DataError, with `name` and the line."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{name}:{error.lineno}: no Jinja template ({error.message})") from None
    # What a deeply nested template raises.
    except (RecursionError, MemoryError, OverflowError) as error:
        raise DataError(f"{name}: no usable Jinja template ({type(error).__name__})") from None


def rendered(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    prompt: bool,
) -> str:
    """Render messages, with `prompt` up to where the next response begins. Raises DataError."""
    try:
        return template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
            **variables,
        )
    # A template is a program: it may raise anything.
    except Exception as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"the template does not render ({told})") from None
