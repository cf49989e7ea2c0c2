"""Prompts as text or as token ids."""

from mlxgui.v1 import inference_pb2
from rest_bridge.errors import invalid
from rest_bridge.json_body import Fields, integer_value, text_value, type_name


def read_prompts(fields: Fields, key: str) -> list[inference_pb2.Prompt]:
    """A text, several texts, one list of token ids or several."""
    name = fields.name(key)
    match fields.raw(key):
        case None:
            fields.missing(key)
        case str() as text:
            return [inference_pb2.Prompt(text=text_value(text, name))]
        case []:
            raise invalid(f"`{name}` is empty.", name)
        case [str(), *_] as texts:
            return [
                inference_pb2.Prompt(text=text_value(text, f"{name}[{index}]"))
                for index, text in enumerate(texts)
            ]
        case [list(), *_] as prompts:
            return [_token_prompt(ids, f"{name}[{index}]") for index, ids in enumerate(prompts)]
        case list() as ids:
            return [_token_prompt(ids, name)]
        case other:
            raise invalid(f"`{name}` must be a string or an array, not {type_name(other)}.", name)


def _token_prompt(ids: object, name: str) -> inference_pb2.Prompt:
    if not isinstance(ids, list):
        raise invalid(f"`{name}` must be an array of token ids, not {type_name(ids)}.", name)
    if not ids:
        raise invalid(f"`{name}` is empty.", name)
    prompt = inference_pb2.Prompt()
    prompt.token_ids.ids.extend(integer_value(token, f"{name}[{index}]") for index, token in enumerate(ids))
    return prompt
