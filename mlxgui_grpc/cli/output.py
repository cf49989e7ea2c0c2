"""How results are written: tables for people, JSON for programs, quantities in words."""

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

if TYPE_CHECKING:
    from rich.table import Table

GAP_CELLS = 2
"""Between the columns of a table."""
LEAST_CELLS = 10
"""What a column is narrowed to at most: no quantity is cut."""
LEAST_NAME_CELLS = 40
"""The same for the first one."""


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first line their names; on a terminal in colour and cut to its width."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.print(rich_table(columns, rows, console.width))
        return
    for line in plain_table(columns, rows):
        print(line)


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> "Table":
    """The same for a terminal of `width` cells; where it is narrow the columns to the right are left out."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    rows = [[printable(cell) for cell in row] for row in rows]
    wanted = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    table = Table(box=None, pad_edge=False, padding=(0, GAP_CELLS, 0, 0), header_style="bold")
    widths = column_widths(wanted, width)
    for column, column_width in zip(columns, widths, strict=False):
        table.add_column(column, overflow="ellipsis", no_wrap=True, width=column_width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[: len(widths)]))
    return table


def column_widths(wanted: Sequence[int], width: int) -> list[int]:
    """Cells for the columns that fit, the first among them, for it says what a row is about: the widest ones are
    narrowed, but none below what makes sense; sooner the last one goes."""
    least = [min(cells, LEAST_CELLS if index else LEAST_NAME_CELLS) for index, cells in enumerate(wanted)]
    count = len(wanted)
    while count > 1 and sum(least[:count]) + GAP_CELLS * (count - 1) > width:
        count -= 1
    widths = list(wanted[:count])
    while sum(widths) + GAP_CELLS * (count - 1) > width and widths > least[:count]:
        spare = [index for index in range(count) if widths[index] > least[index]]
        widths[max(spare, key=lambda index: (index > 0, widths[index]))] -= 1
    return widths


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, whatever their length."""
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """One `name  value` a line, without those that have no value."""
    present = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in present), default=0)
    for name, value in present:
        print(f"{name.ljust(width)}  {printable(value)}")


def printable(text: str) -> str:
    """Text of somebody else's on one line, without what a terminal would obey: that is shown as `\ufffd`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else " " if one.isspace() else "\ufffd" for one in text)


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON values under the contract's own field names.

    Unlike protobuf's own mapping: integers are numbers, spans are seconds, enum values are words (`loaded`),
    and fields that are not set are there, as null where the contract tells unset from zero.
    """
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and len(oneof.fields) > 1 and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            result[field.name] = dict(value)
        elif field.is_repeated:
            result[field.name] = [_json_value(field, item) for item in value]
        elif field.has_presence and not message.HasField(field.name):
            result[field.name] = None
        else:
            result[field.name] = _json_value(field, value)
    return result


def _json_value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.ToTimedelta().total_seconds()
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return to_json(value) if isinstance(value, Message) else value


def enum_word(enum: EnumDescriptor, number: int) -> str:
    """`loaded` for MODEL_STATE_LOADED; the number for a value that this version does not know."""
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    return str(value.name).removeprefix(prefix).lower()


def size(byte_count: float) -> str:
    """Bytes in the decimal units of disks and downloads: `3.7 MB`; nothing for 0."""
    if byte_count <= 0:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if byte_count < 999.5:
            return (
                f"{byte_count:.0f} {unit}" if unit == "B" or byte_count >= 100 else f"{byte_count:.1f} {unit}"
            )
        byte_count /= 1000
    return f"{byte_count:.1f} TB"


def memory(byte_count: float) -> str:
    """Bytes in the binary units in which memory is sold: `15.5 GB` of 2^30 bytes; `0` for nothing."""
    if byte_count <= 0:
        return "0"
    mebibytes = byte_count / 2**20
    return f"{mebibytes / 1024:.1f} GB" if mebibytes >= 999.5 else f"{max(mebibytes, 1):.0f} MB"


def span(seconds: float) -> str:
    """A span in its largest two units: `2 h 5 min`, `40 s`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" if whole >= 600 or not whole % 60 else f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d"


def moment(message: Message, field: str, now: datetime | None = None) -> str:
    """How far a Timestamp field is from now: `5 min ago`, `in 30 s`; nothing for an unset one."""
    if not message.HasField(field):
        return ""
    then: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"
