"""The store that all tests share is closed where a test replaces code that is traced."""

import jax
import pytest

from jinfer.compile import program_key
from jinfer.models.decoder import Decoder
from jinfer.startup import load
from jinfer.step.attention import ATTENTION


def test_replaced_code_closes_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    if program_key.sources_digest() != program_key._SOURCES:
        pytest.skip("the sources were edited meanwhile, which closes the store too")
    devices = jax.devices()[:1]
    assert load.open_store(devices) is not None
    for place, name in (("jinfer.sampling.sampler", "sample"), (Decoder, "hidden")):
        with monkeypatch.context() as patch:
            target = (f"{place}.{name}",) if isinstance(place, str) else (place, name)
            patch.setattr(*target, lambda *_: None)
            assert load.open_store(devices) is None
    with monkeypatch.context() as patch:
        patch.setitem(ATTENTION, "xla", lambda *_: None)
        assert load.open_store(devices) is None
    assert load.open_store(devices) is not None
