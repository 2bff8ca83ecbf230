"""JSON that every reader takes and every output can spell."""

import codecs
import json
import math
import sys
from typing import Any


def json_text(value: Any, *, encoding: str | None = None, indent: int | None = None) -> str:
    """The JSON of a value; NaN and infinities, which JSON does not have, become null.

    JSON is UTF-8, so another encoding gets ASCII with escapes. So does text that UTF-8 cannot
    encode: half of a surrogate pair.

    Args:
      value: dicts, lists, tuples, strings and numbers.
      encoding: of the output; None = standard output's.
      indent: columns per level; None = one line.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        is_spelt = False
    else:
        is_spelt = codecs.lookup(encoding or sys.stdout.encoding or "utf-8").name == "utf-8"
    if is_spelt:
        return text
    return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
