"""Names of models become folders, or one clear sentence; nothing here touches the network."""

import os
import subprocess
import sys
from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub import errors

from jinfer.errors import CheckpointError
from jinfer.weights import hub
from jinfer.weights.hub import resolve_model


@pytest.fixture
def download(monkeypatch):
    """Replaces the download by a function that returns or raises what the test sets."""
    calls = []

    def answer_with(answer):
        def snapshot_download(name, **options):
            calls.append((name, options))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer_with


def http_error(kind):
    """The hub's own error, made without the HTTP library that its version happens to use."""
    return kind.__new__(kind, "404 from the hub")


def test_folder_is_itself(tmp_path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


def test_existing_folder_wins_over_the_hub(tmp_path, monkeypatch, download) -> None:
    calls = download(RuntimeError("not to be called"))
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name").is_dir()
    assert not calls


def test_hub_name_is_downloaded(tmp_path, download) -> None:
    calls = download(str(tmp_path))
    assert resolve_model("org/name-1.5_B") == tmp_path
    assert calls[0][0] == "org/name-1.5_B"


def test_revision_folder_and_token_reach_the_hub(tmp_path, download) -> None:
    calls = download(str(tmp_path))
    resolve_model("org/name", revision="v2", download_dir=tmp_path, token="secret")
    options = calls[0][1]
    assert (options["revision"], options["cache_dir"], options["token"]) == (
        "v2",
        tmp_path,
        "secret",
    )


def test_a_revision_of_a_folder_is_refused(tmp_path) -> None:
    assert resolve_model(tmp_path, revision="main") == tmp_path
    with pytest.raises(CheckpointError, match="belongs to a hub name; got revision='v2' with the"):
        resolve_model(tmp_path, revision="v2")


def test_a_revision_that_the_hub_lacks(download) -> None:
    download(http_error(errors.RevisionNotFoundError))
    with pytest.raises(CheckpointError, match="has no revision 'v2'. Check the name of the branch"):
        resolve_model("org/name", revision="v2")


def test_only_safe_and_needed_files_are_asked_for() -> None:
    def asked(name):
        wanted = any(fnmatch(name, pattern) for pattern in hub.WANTED_FILES)
        return wanted and not any(fnmatch(name, pattern) for pattern in hub.UNWANTED_FILES)

    for name in (
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ):
        assert asked(name), name
    for name in (
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.safetensors",
        "modeling_custom.py",
    ):
        assert not asked(name), name


@pytest.mark.parametrize("name", [None, "", "  "])
def test_no_name(name) -> None:
    with pytest.raises(CheckpointError, match=f"got model={name!r}. Name one"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["gpt2", "./absent", "/absent/model", "a/b/c", "org/na me"])
def test_neither_a_folder_nor_a_hub_name(name) -> None:
    with pytest.raises(CheckpointError, match=f"got model='{name}', which is not a folder here"):
        resolve_model(name)


def test_absent_path_is_not_taken_for_a_hub_name(tmp_path, monkeypatch, download) -> None:
    calls = download(RuntimeError("not to be called"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="which is not a folder here"):
        resolve_model(tmp_path.relative_to(tmp_path) / "org" / "name")
    assert not calls


def test_file_is_refused(tmp_path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="model.gguf', which is a file"):
        resolve_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.RepositoryNotFoundError), "is not on the hub. Check the name"),
        (http_error(errors.GatedRepoError), "is gated. Accept its terms"),
        (
            errors.LocalEntryNotFoundError("long\ntext"),
            "is not in the local cache, and the hub cannot",
        ),
        (errors.OfflineModeIsEnabled("offline"), "is not in the local cache, and the hub cannot"),
        (errors.HFValidationError("bad name"), "could not be downloaded: bad name. Try again"),
        (OSError("disk full\nmore"), "could not be downloaded: disk full. Try again"),
        (ConnectionError(), "could not be downloaded: ConnectionError. Try again"),
    ],
)
def test_failures_are_one_sentence(download, error, message) -> None:
    download(error)
    with pytest.raises(CheckpointError, match=f"got model='org/name', which {message}") as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


def test_offline_in_earnest(tmp_path) -> None:
    code = "from jinfer.weights.hub import resolve_model; resolve_model('org/name')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "which is not in the local cache, and the hub cannot be reached" in result.stderr


def test_hub_library_is_imported_only_when_needed(tmp_path) -> None:
    code = (
        "import sys; from jinfer.weights.hub import resolve_model; "
        f"resolve_model({str(tmp_path)!r}); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
