"""What a request says about the answer's form, and what its caller calls the fields of the contract."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rest_bridge.errors import ApiError

_PARAM_NAMES = {
    "json_object": "response_format",
    "json_schema": "response_format",
    "prompts": "prompt",
    "inputs": "input",
    "encoding": "encoding_format",
    "template_arguments": "chat_template_kwargs",
}

_IMAGE = re.compile(r"(\bcontent\[\d+\])\.image\.(?:data|url)\b")
"""The sources of an image, which are one field of OpenAI's."""


@dataclass
class Options:
    """What a request says about the answer's form, apart from what the model is asked."""

    model: str
    stream: bool = False
    include_usage: bool = False
    choice_count: int = 1
    logprobs: bool = False
    single_input: bool = False
    """One prompt, which the caller need not have written as a list."""
    warnings: list[str] = field(default_factory=list)
    param_names: dict[str, str] = field(default_factory=lambda: dict(_PARAM_NAMES))
    """What the caller called the fields that have another name in the contract."""
    tools: list[str] = field(default_factory=list)
    """What the caller calls each tool of the contract."""
    schema_key: str = "parameters"
    """What the caller calls the schema of a tool's arguments."""

    def rename(self, error: ApiError) -> None:
        """Makes an error of the model server speak of the caller's field, not of the contract's."""
        path, name = error.param, self.param(error.param)
        if path is None or name is None:
            return
        # Sentences name a field with or without what it is in.
        said = rf"(?<![\w.])(?:request\.)?(?:sampling\.)?{re.escape(_bare(path))}(?!\w)"
        error.message = re.sub(said, lambda _: name, error.message)
        error.param = name

    def told(self, warnings: Iterable[str]) -> list[str]:
        """What the caller is told: of the request, and of the model server's warnings."""
        return [*self.warnings, *warnings]

    def param(self, path: str | None) -> str | None:
        """The caller's name for the field at `path` of the request message."""
        if path is None:
            return None
        path = _bare(path)
        tool = re.match(r"tools\[(\d+)\]", path)
        if tool is not None and int(tool[1]) < len(self.tools):
            rest = path[tool.end() :].replace("parameters_schema", self.schema_key)
            return self.tools[int(tool[1])] + rest
        head = re.match(r"\w+", path)
        if head is not None:
            path = self.param_names.get(head[0], head[0]) + path[head.end() :]
        if self.single_input:
            path = path.removesuffix("[0]")
        path = re.sub(r"(\.tool_calls\[\d+\])\.(?=arguments$|name$)", r"\1.function.", path)
        return _IMAGE.sub(r"\1.image_url.url", path)


def _bare(path: str) -> str:
    """A path without the messages that every request has its fields in."""
    return path.removeprefix("request.").removeprefix("sampling.")
