"""Recording a run's environment never stops it."""

import subprocess

from memjax.runs import environment


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert environment.environment()["commit"] is None


def test_the_commit_of_a_project_that_memjax_is_installed_in_is_not_its_own(tmp_path, monkeypatch):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    installed = tmp_path / "environment.py"
    installed.touch()
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert environment.environment()["commit"] is None
    for command in (["add", "."], [*identity, "commit", "-q", "-m", "ours"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment.environment()["commit"] == head.stdout.strip()
