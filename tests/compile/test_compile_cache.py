"""The compilation cache is written, also where JAX compiled something before it was set."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jinfer.compile.compile_cache import use_compilation_cache
from jinfer.compile.programs import Compiling, Program


@pytest.fixture(autouse=True)
def suite_cache() -> Iterator[str]:
    """Gives the rest of the suite its cache back."""
    folder = jax.config.jax_compilation_cache_dir
    yield folder
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def compile_with(number: float) -> None:
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    jax.jit(lambda a: jnp.sin(a) * number).lower(shape).compile()


def test_programs_are_kept_although_jax_compiled_before(tmp_path: Path) -> None:
    compile_with(1.25)
    use_compilation_cache(tmp_path / "deep" / "xla")
    compile_with(2.25)
    kept = [path.name for path in (tmp_path / "deep" / "xla").iterdir()]
    assert any("lambda" in name for name in kept)


def test_programs_are_kept_although_jax_went_without(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    compile_with(3.25)
    use_compilation_cache(tmp_path)
    compile_with(4.25)
    assert list(tmp_path.iterdir())


def test_the_users_own_folder_is_kept(suite_cache: str) -> None:
    settings = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[settings]
    jax.config.update(settings, 1.0)  # JAX's own
    use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == suite_cache
    assert jax.config.values[settings] == 0.0  # short programs are kept there as well
    jax.config.update(settings, before)


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match="compilation_cache must be a folder that can be made; got"
    ):
        use_compilation_cache(tmp_path / "file" / "xla")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled programs are not kept; got .*: Not a directory"):
        use_compilation_cache(None)


def test_the_default_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jinfer" / "xla")


def test_programs_read_from_it_are_counted(tmp_path: Path) -> None:
    use_compilation_cache(tmp_path)
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    program = Program(name="p", function=lambda a: jnp.cos(a) * 5.25, shapes=(shape,), donate=())
    num_hits = []
    for _ in range(2):
        with Compiling([program]) as compiling:
            _, report = compiling.result()
        num_hits.append(report.num_cache_hits)
        jax.clear_caches()
    assert num_hits == [0, 1]
    assert str(report).startswith("ready: 0 programs compiled and 1 from the cache, in ")
