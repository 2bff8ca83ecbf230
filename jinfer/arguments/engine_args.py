"""`EngineArgs`: arguments of an engine that are collected before it is made, as in vLLM."""

from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from jinfer.arguments.keywords import EngineKeywords, full_signature
from jinfer.arguments.vllm import engine_config
from jinfer.config import EngineConfig
from jinfer.shipped import DEFAULT_MODEL


class EngineArgs:
    """Arguments of `LLM` or `AsyncLLM`, checked by name; give them to `from_engine_args`.

    Attributes have jinfer's names and may be changed. `vars` and `dataclasses.asdict` return them
    as keywords of `LLM`.

    Args:
      model: as in `LLM`.
      **engine_args: as in `LLM`; names of vLLM are translated.

    Raises:
      TypeError, NotImplementedError: as in `LLM`.
    """

    # So that dataclasses.asdict and dataclasses.replace take it.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]] = EngineConfig.__dataclass_fields__
    __signature__ = full_signature()

    def __init__(
        self, model: str | Path = DEFAULT_MODEL, **engine_args: Unpack[EngineKeywords]
    ) -> None:
        config = engine_config(model, engine_args)
        for field in fields(EngineConfig):
            setattr(self, field.name, getattr(config, field.name))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in vars(self).items() if name != "hf_token")
        return f"{type(self).__name__}({', '.join(shown)})"

    if TYPE_CHECKING:  # the fields of EngineConfig

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


class AsyncEngineArgs(EngineArgs):
    """As `EngineArgs`; vLLM has a name of its own for those of its asynchronous engine."""


def keywords_of(engine_args: Any) -> dict[str, Any]:
    """The keywords of `LLM` in an EngineArgs.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(engine_args, EngineArgs):
        raise TypeError(
            f"from_engine_args needs EngineArgs; got {type(engine_args).__name__}. "
            "Build them with jinfer.EngineArgs(...)."
        )
    return dict(vars(engine_args))
