"""Tokenises data ahead of training: `python -m memjax.prepare [CONFIG.yaml] [--section.key value ...]`."""

import sys
from collections.abc import Sequence

from memjax.command_line import ConfigError, Parsed, parse
from memjax.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 done, 2 wrong settings, 3 unusable data, 130 stopped by Ctrl-C.
    """
    arguments: Parsed[RunConfig] = parse(
        RunConfig,
        sys.argv[1:] if argv is None else argv,
        prog="python -m memjax.prepare",
        description=(
            "Tokenises the training and validation data of a run once, over all cores, into data.prepared (default: "
            "`prepared` in the run's folder). A training with the same settings reads it there and tokenises nothing. "
            "The same command begins an interrupted preparation again, and leaves a finished one alone."
        ),
    )
    # Only now: wrong settings should not wait for imports.
    from memjax.evaluation.command import exit_code

    try:
        return exit_code(lambda: _prepare(arguments.config))
    except KeyboardInterrupt:
        print("\nstopped; the same command begins the unfinished part again", file=sys.stderr)
        return 130


def _prepare(config: RunConfig) -> None:
    from memjax.data.corpus import training_corpora, validation_corpus
    from memjax.data.parts import describe, open_parts, prepared_folder
    from memjax.data.preparation import prepare
    from memjax.training.run_folder import RunFolder

    if config.data.source == "biographies":
        raise ConfigError(["data.source=biographies is generated as it is read; there is nothing to prepare"])
    data = config.data.in_run(config.run.dir)
    corpora = [*training_corpora(data), validation_corpus(data)]
    for corpus in filter(None, corpora):
        corpus.files()  # a missing file should not wait for a tokenizer to be trained
    tokenizer = RunFolder.of(config).tokenizer(config)
    for corpus in filter(None, corpora):
        prepare(corpus, tokenizer, prepared_folder(corpus, data), every_seconds=config.log.progress_seconds)
    print("\n".join(describe(open_parts(data, tokenizer)[0])))


if __name__ == "__main__":
    sys.exit(main())
