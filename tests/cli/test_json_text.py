"""JSON that every reader takes and every output can spell."""

import json
import math

import pytest

from jinfer.cli.json_text import json_text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "UTF8", "utf-16"])
@pytest.mark.parametrize("text", ["plain", "\xe9", "\U0001f600", "\ud800", 'a"\n\0'])
def test_every_encoding_can_spell_it(encoding: str, text: str) -> None:
    written = json_text({"text": text}, encoding=encoding)
    assert json.loads(written.encode(encoding).decode(encoding)) == {"text": text}
    assert written.isascii() or encoding.lower() in ("utf-8", "utf8")


def test_utf8_needs_no_escapes() -> None:
    assert json_text(["\xe9"], encoding="utf-8") == '["\xe9"]'


def test_numbers_that_json_lacks_are_null() -> None:
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf}, "d": 3}
    assert json_text(value, encoding="utf-8") == (
        '{"a": [null, [1.5, null]], "b": {"c": null}, "d": 3}'
    )
