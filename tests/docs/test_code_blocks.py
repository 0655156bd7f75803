"""Every code block of the pages and the README is executed, or says why it is not.

Python blocks of a page share one namespace. Commands of memjax run in this process: `train` only checks its settings,
or does a dry run where its output is shown; commands that read a run are executed. A `console` block must print what
it shows, where `...` matches anything. A block that cannot run is preceded by `<!-- not run: why -->` and counted in
NOT_RUN.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import pathlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator

import jax
import pytest
from markdown_it import MarkdownIt

from memjax import train
from memjax.config.load import load
from memjax.config.run import RunConfig
from memjax.data.sources.kinds import SOURCES
from memjax.data.sources.stream import RecordFiles
from memjax.memory.kinds import KINDS
from memjax.ops.row_formats import formats
from memjax.sharding.mesh import make_mesh
from memjax.training import finish
from memjax.training import main as training

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

WITH_RUN = [path for path in PAGES if "runs/quickstart" in path.read_text()]
"""Pages that need the run of the quick start."""

SLOW = [ROOT / "docs" / name for name in ("recipes.md", "upcycle.md", "your_model.md")]
"""Pages that take several seconds."""

NOT_RUN = {
    "checked.md": 2,
    "checkpoints.md": 3,
    "convert.md": 3,
    "data.md": 1,
    "device_memory.md": 2,
    "evaluation.md": 2,
    "extending.md": 5,
    "scaling.md": 1,
    "serve.md": 3,
    "several_gpus.md": 4,
    "tables.md": 1,
    "trust.md": 1,
    "upcycle.md": 1,
    "watching.md": 2,
}
"""The number of blocks of each page that are marked as not run."""

DIRECTIVES = {"{toctree}", "{include}", "{literalinclude}", "{eval-rst}"}
"""Fences that are not code blocks."""

RUN_SETTINGS = """
--model.dim 16 --model.num_layers 1 --model.num_heads 2 --model.ffn_dim 16 --model.vocab_size 259
--model.memory.layers 0 --model.memory.num_keys 8 --model.memory.top_k 2 --model.memory.key_dim 8
--model.memory.gate none --model.memory.qk_norm false --optim.table.optimizer sgd
--data.source text --data.tokenizer.kind byte --data.batch_size 8 --data.sequence_length 32
--optim.warmup_steps 1 --optim.table.warmup_steps 1 --train.steps 4 --eval.batches 1
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    language: str
    code: str
    line: int
    why_not: str | None
    """Why it is not run; None if it is."""


def blocks_of(text: str) -> list[Block]:
    found, why_not = [], None
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            mark = re.fullmatch(r"<!-- not run: (.+) -->", token.content.strip())
            why_not = mark and mark[1]
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split()[0] if token.info else ""
            if language not in DIRECTIVES:
                found.append(Block(language, token.content, token.map[0] + 1, why_not))
            why_not = None
    return found


class Page:
    """Executes the blocks of one page in the working folder."""

    def __init__(self, name: str):
        self.name = name
        self.namespace = {"__name__": "__main__"}

    def execute(self, block: Block) -> None:
        languages: dict[str, Callable[[Block], None]] = {
            "python": self._python,
            "bash": self._bash,
            "console": self._console,
            "yaml": self._yaml,
            "json": self._json,
        }
        assert block.language in languages, f"{self.name}:{block.line}: nobody knows how to run {block.language!r}"
        languages[block.language](block)

    def _python(self, block: Block) -> None:
        # Leading empty lines give errors the line numbers of the page.
        exec(compile("\n" * block.line + block.code, self.name, "exec"), self.namespace)

    def _bash(self, block: Block) -> None:
        for line in block.code.replace("\\\n", "").splitlines():
            for command in commands_in(line):
                code, printed = execute(command)
                assert code == 0, f"{self.name}:{block.line}: {shlex.join(command)} ended with {code}:\n{printed}"

    def _console(self, block: Block) -> None:
        for part in re.split(r"^\$ ", block.code.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
            line, _, expected = part.partition("\n")
            (command,) = commands_in(line)
            _, printed = execute(command, shown=True)
            pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
            printed = "\n".join(row.rstrip() for row in printed.strip().splitlines())
            assert re.fullmatch(pattern, printed, re.DOTALL), f"{self.name}:{block.line}: it prints\n{printed}"

    def _yaml(self, block: Block) -> None:
        name = re.match(r"# (\S+\.yaml)\n", block.code)
        assert name, f"{self.name}:{block.line}: the first line must be a comment with the file's name"
        path = pathlib.Path(name[1])
        path.write_text(block.code)
        load(RunConfig, path)

    def _json(self, block: Block) -> None:
        pathlib.Path("shown.jsonl").write_text(block.code)
        records = list(RecordFiles("shown.jsonl", "data.path"))
        assert len(records) == len(block.code.splitlines())
        assert all(records)


def commands_in(line: str) -> Iterator[list[str]]:
    """Splits a line at `&&` into commands, and drops environment variables set in front of them."""
    words = shlex.split(line, comments=True)
    for is_joint, group in itertools.groupby(words, lambda word: word == "&&"):
        if not is_joint:
            yield list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), group))


def execute(command: list[str], *, shown: bool = False) -> tuple[int, str]:
    """Returns the exit code and the output, and raises AssertionError for an unknown command.

    Where the output is not shown, `train` only checks its settings.
    """
    program, *arguments = command
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        if arguments[0] == "-m":
            return execute_module(arguments[1], arguments[2:], shown)
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} is not there"
        source = (ROOT / arguments[0]).read_text()
        # Some of its options may be those of a module beside it.
        beside = [path for path in (ROOT / arguments[0]).parent.glob("*.py") if f"\nimport {path.stem}\n" in source]
        source += "".join(path.read_text() for path in beside)
        missing = [word for word in arguments[1:] if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, f"{arguments[0]} has no {missing}"
        return 0, ""
    if program == "memjax":
        return execute_module(f"memjax.{arguments[0]}", arguments[1:], shown)
    if program == "pip" and arguments[0] == "install":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        target = arguments[-1]
        wanted = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
        assert wanted, f"pip install {target}"
        assert set((wanted[1] or "").split(",")) <= {"", *extras}, f"there is no extra {wanted[1]}"
        return 0, ""
    assert command == ["source", ".venv/bin/activate"], f"nobody knows how to run {shlex.join(command)}"
    return 0, ""


def execute_module(module: str, arguments: list[str], shown: bool) -> tuple[int, str]:
    if module == "venv":
        return 0, ""
    if module == "pytest":
        assert all((ROOT / word).exists() for word in arguments if "/" in word)
        return 0, ""
    if module == "sphinx":
        source, _ = arguments[-2:]
        assert (ROOT / source / "conf.py").is_file()
        return 0, ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = run_memjax(module, arguments, shown)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, printed.getvalue()


def run_memjax(module: str, arguments: list[str], shown: bool) -> int:
    if module in ("memjax.evaluate", "memjax.generate"):
        return importlib.import_module(module).main(arguments)
    if module == "memjax.train":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "train", lambda config, **_: training.check(config))
            if not shown:
                patch.setattr(training, "dry_run", lambda config, **_: 0)
            return train.main(arguments)
    # Any other command must at least have the options that are shown.
    helped = io.StringIO()
    conversion = arguments[:1] if module in ("memjax.convert", "memjax.patch") else []
    with contextlib.redirect_stdout(helped), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*conversion, "--help"])
    known = re.findall(r"^ +--([\w.]+)", helped.getvalue(), re.MULTILINE)
    unknown = [word for word in arguments if word.startswith("--") and word[2:].partition("=")[0] not in known]
    assert not unknown, f"{module} has no {unknown}"
    return 0


def make_run(folder: pathlib.Path) -> None:
    """Trains a few steps to the end, on text, which is quicker than biographies."""
    corpus = folder.with_name("corpus.txt")
    corpus.parent.mkdir()
    corpus.write_text("\n".join(f"line {number} of a small corpus" for number in range(50)))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(training, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(finish, "plot_run", lambda *_: [])  # no page uses the plots
        assert train.main([*RUN_SETTINGS.split(), "--data.path", str(corpus), "--run.dir", str(folder)]) == 0


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Removes what the pages have registered."""
    registries: list[dict] = [SOURCES, KINDS, formats._FORMATS]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> pathlib.Path:
    """A working folder with what the pages assume: the configs and a corpus."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps({"text": f"article {i}"}) + "\n" for i in range(9)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute_page(path: pathlib.Path) -> None:
    page = Page(path.name)
    for block in blocks_of(path.read_text()):
        if block.why_not is None:
            page.execute(block)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path in SLOW)) for path in PAGES if path not in WITH_RUN],
    ids=lambda path: path.stem,
)
def test_every_block_runs(path):
    execute_page(path)


# A single test, so that only one worker trains the run.
@pytest.mark.slow
def test_every_block_of_the_pages_that_use_a_run_runs(workplace):
    make_run(workplace / "runs" / "quickstart")
    assert {path.name for path in WITH_RUN} >= {"README.md", "quickstart.md", "checkpoints.md"}
    for path in WITH_RUN:
        execute_page(path)


def test_the_blocks_that_are_not_run_are_those_that_are_known():
    marked = collections.Counter(
        path.name for path in PAGES for block in blocks_of(path.read_text()) if block.why_not is not None
    )
    assert marked == NOT_RUN


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("```python\nassert 1 == 2, 'not so'\n```", "not so"),
        ("```bash\nrm -r runs\n```", "nobody knows how to run rm -r runs"),
        ("```bash\npython -m memjax.train --model.memory.num_kyes 8\n```", "did you mean 'model.memory.num_keys'"),
        ("```bash\npython -m memjax.train --optim.warmup_steps 1000\n```", "must be below train.steps"),
        ("```bash\npython -m memjax.doctor --fast\n```", "memjax.doctor has no"),
        ("```bash\npip install -e '.[cdua]'\n```", "there is no extra cdua"),
        ("```bash\npython experiments/bench/no.py\n```", "no.py is not there"),
        ("```console\n$ python -m memjax.train --train.steps no\nit works\n```", "it prints"),
        ("```yaml\nmodel: {}\n```", "the first line must be a comment"),
        ("```rust\nfn main() {}\n```", "nobody knows how to run 'rust'"),
        ("    indented = 1", "nobody knows how to run ''"),
    ],
)
def test_a_block_that_does_not_work_is_found(block, problem):
    (found,) = blocks_of(block)
    with pytest.raises((AssertionError, ValueError), match=re.escape(problem)):
        Page("page.md").execute(found)
