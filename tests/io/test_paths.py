import pathlib

import pytest

from memjax.io.paths import local_path


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert local_path("~/runs/a", "run.dir") == pathlib.Path("/home/ada/runs/a")
    assert local_path("runs/~a", "run.dir") == pathlib.Path("runs/~a")


@pytest.mark.parametrize("text", ["gs://bucket/run", "s3:/bucket", "https://host/x", "hdfs://a", "file:///tmp/x"])
def test_remote_addresses_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^run\.dir={text} must be a path on this machine"):
        local_path(text, "run.dir")


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_anything_but_a_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.dir="):
        local_path(text, "run.dir")


def test_a_name_with_a_colon_is_a_path() -> None:
    assert local_path("a:b/c", "run.dir") == pathlib.Path("a:b/c")
