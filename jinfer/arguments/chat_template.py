"""The argument `chat_template`: a file, a template, or the name of one of the checkpoint's."""

from pathlib import Path

from jinfer.errors import shown


def read_chat_template(given: str | Path | None) -> str | None:
    """The content of a file, or the text itself.

    Text with a "{" is a template. Other text is a file if it looks like one or is one, and else
    the name of one of the checkpoint's templates.

    Raises:
      ValueError: the file cannot be read.
    """
    if given is None:
        return None
    path = Path(given).expanduser()
    if isinstance(given, str):
        names_a_file = path.suffix != "" or "/" in given
        if "{" in given or not (names_a_file or path.is_file()):
            return given
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(
            f"chat_template must be a file, a template or a template's name; got "
            f"chat_template={shown(str(given))} ({why}). Correct the path."
        ) from None
