"""Tokenises data ahead of training: `python -m memjax.prepare [CONFIG.yaml] [--section.key value ...]`."""

from collections.abc import Sequence

from memjax.config.load import Parsed, parse
from memjax.config.run import RunConfig
from memjax.errors import ConfigError
from memjax.io.ctrl_c import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 done, 2 wrong settings, 3 unusable data, 130 stopped by a signal.
    """
    arguments: Parsed[RunConfig] = parse(
        RunConfig,
        argv,
        prog="python -m memjax.prepare",
        description=(
            "Tokenises the training and validation data of a run once, over all cores, into data.prepared (default: "
            "`prepared` in the run's folder). Training with the same settings then reads it from there. The "
            "same command repeats the unfinished part of an interrupted preparation, and leaves a finished one alone."
        ),
    )
    # Imported late, so that wrong settings are reported without waiting.
    from memjax.io.command import exit_code

    stopped = "stopped; the same command repeats the unfinished part"
    return exit_code(lambda: _prepare(arguments.config), interrupted=stopped)


def _prepare(config: RunConfig) -> None:
    from memjax.data.dataset import open_dataset
    from memjax.data.sources.kinds import Files, find_source
    from memjax.runs.folder import RunFolder, make_tokenizer

    source = find_source(config.data.in_run(config.run.dir))
    if not isinstance(source, Files):
        raise ConfigError(f"data.source={config.data.source} is generated as it is read; there is nothing to prepare")
    if source.problem:
        raise ConfigError(source.problem)
    for corpus in source.corpora:
        _ = corpus.files  # a missing file should not wait for a tokenizer to be trained
    run = RunFolder.of(config)
    # A tokenizer made here is not saved: the run will make the same one.
    tokenizer = run.saved_tokenizer() or make_tokenizer(config, source)
    if config.data.prepared is None and not run.began():
        source.discard_outdated(tokenizer)
    source.prepare(tokenizer, every_seconds=config.log.progress_seconds)
    print("\n".join(open_dataset(source, tokenizer).describe()))


if __name__ == "__main__":
    run_command(main)
