"""Settings of `python -m memjax.evaluate`. Nothing here imports JAX."""

import dataclasses
from collections.abc import Iterator

from memjax.config.sampling import SamplingConfig
from memjax.config.schema import show
from memjax.config.section import LocalPath, NotNegative, PathOrAddress, Positive
from memjax.runs.settings import InferenceSettings

_OF_QUESTIONS = ("examples", "max_tokens", "sampling", "samples", "run_programs", "program_seconds")
_USED_BY = dict.fromkeys(_OF_QUESTIONS, ("questions",)) | {
    "limit": ("questions", "tasks"),
    "shots": ("questions", "tasks"),
    "task_folder": ("tasks",),
}
"""Settings that have an effect only together with one of the settings listed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceSettings):
    """What to measure: a text, question sets or lm-eval tasks. By default, a run on biographies is asked about its
    facts, and other runs are scored on their validation data.
    """

    text: PathOrAddress[str] | None = None
    """A file to read, one document per line; .jsonl: one object per line. null: the facts, or the validation data."""
    text_key: str | None = None
    """JSONL field with a whole document; null: as in the run."""
    max_bytes: Positive[int] | None = None
    """Bytes of text to read; null: all."""
    sequence_length: Positive[int] | None = None
    """Tokens per sequence; null: as in the run."""
    stride: Positive[int] | None = None
    """Tokens between window starts in a long document; null: half a window, so that all tokens have context."""
    people: Positive[int] | None = None
    """Most people to ask about, separately for those asked about in training and for the others; null: all."""
    questions: LocalPath[tuple[str, ...]] = ()
    """Question sets: .jsonl files (also with .gz, .xz, .zst or .bz2), folders of them, or globs. The fields determine
    the kind: question and answers; context and qas; or those of HumanEval and MBPP. For multiple choice, see tasks."""
    limit: Positive[int] | None = None
    """Most questions per set (spread evenly over it) or per task (the first ones); null: all."""
    shots: NotNegative[int] | None = None
    """Solved examples before each question; null: none for question sets, and each task's own number."""
    examples: LocalPath[tuple[str, ...]] = ()
    """Files with the examples, named like the sets apart from `_train`, `_dev` and the like. Without them, examples
    come from the set itself, and never include the question asked."""
    max_tokens: Positive[int] | None = None
    """Most tokens to generate; null: 32 for an answer, 384 for a program."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How the tokens of answers and programs are sampled."""
    samples: Positive[int] = 1
    """Programs to generate per problem, for pass@10 and pass@100."""
    run_programs: bool = False
    """Run the generated programs, in processes with resource limits, to test whether they are correct. How well files
    and the network are protected depends on the machine; missing protection is printed. Use a machine where nothing can
    be lost."""
    program_seconds: Positive[int] = 5
    """CPU seconds per program; its elapsed time may be three times as long."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval (pip install lm-eval). Their data must be on this machine, because the network is not used."""
    task_folder: LocalPath[str] | None = None
    """Folder with your own tasks as YAML files, which replace the built-in ones. Such files can run Python code."""
    batch_size: Positive[int] = 64
    """Sequences per batch."""
    zero_tables: bool = True
    """Measure again with zeroed tables, to see how much they hold."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.memory_devices > 0 and self.batch_size % self.memory_devices:
            yield f"batch_size={self.batch_size} must be a multiple of memory_devices={self.memory_devices}"
        if self.samples > 1 and self.sampling.temperature == 0:
            yield f"samples={self.samples} would all be the same; set sampling.temperature, such as 0.8"
        if self.examples and not self.shots:
            yield f"examples={show(self.examples)} are not used without shots; set shots to their number"
        yield from self._misplaced()

    def _misplaced(self) -> Iterator[str]:
        """Measurements that exclude each other, and settings of measurements that are not requested."""
        asked = [name for name in ("text", "questions", "tasks") if getattr(self, name)]
        for name in asked[1:]:
            yield f"{name}={show(getattr(self, name))} cannot be combined with {asked[0]}; measure one after the other"
        for field in dataclasses.fields(self):
            owners, value = _USED_BY.get(field.name, ()), getattr(self, field.name)
            if owners and value != _default(field) and not set(owners) & set(asked):
                yield f"{field.name}={show(value)} is only for {' and '.join(owners)}; set that, or leave it out"


def _default(field: dataclasses.Field) -> object:
    return field.default_factory() if callable(field.default_factory) else field.default
