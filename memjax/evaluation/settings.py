"""Settings of `python -m memjax.evaluate`. Nothing here imports JAX."""

import dataclasses

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
"""Settings that mean nothing without one of others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceSettings):
    """What to measure: a text, sets of questions or tasks of lm-eval. Where none of them is named, a run on biographies
    is asked for its facts; other runs read their validation data.
    """

    text: PathOrAddress[str] | None = None
    """A file to read, one document a line; .jsonl: one object a line. null: the facts, or the run's validation data."""
    text_key: str | None = None
    """JSONL field with a whole document; null takes the run's."""
    max_bytes: Positive[int] | None = None
    """Text to read, in bytes; null reads all."""
    sequence_length: Positive[int] | None = None
    """Tokens that the model sees at once; null takes the run's."""
    stride: Positive[int] | None = None
    """Tokens from one window on a long document to the next; null is half a window, so that tokens have a context."""
    people: Positive[int] | None = None
    """The most people to ask about, of those asked about in training and of the others; null asks about all."""
    questions: LocalPath[tuple[str, ...]] = ()
    """Question sets: .jsonl files (also with .gz, .xz, .zst or .bz2), folders of them, or globs. The fields determine
    the kind: question, answers; context, qas; or those that HumanEval and MBPP are published with. For multiple choice
    see tasks."""
    limit: Positive[int] | None = None
    """The most questions of each set, evenly spread over it; of each task the first. null asks all."""
    shots: NotNegative[int] | None = None
    """Solved examples in front of each question. null: none for question sets, the task's own number for tasks."""
    examples: LocalPath[tuple[str, ...]] = ()
    """Files that the examples are taken from, with the same names but for `_train`, `_dev` and the like. Without, they
    come from the set itself, and are never the question."""
    max_tokens: Positive[int] | None = None
    """The most tokens to write; null: 32 for an answer, 384 for a program."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How the tokens of answers and programs are sampled."""
    samples: Positive[int] = 1
    """Programs to write for each problem, for pass@10 and pass@100."""
    run_programs: bool = False
    """Run the programs that the model writes, in processes with limits, to see whether they are right. What keeps them
    from files and the network depends on the machine; what is missing is printed. Run them where nothing can be
    lost."""
    program_seconds: Positive[int] = 5
    """What such a program may compute; of the clock it gets three times as much."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval to do (pip install lm-eval). No network is used, so their data must be on this
    machine."""
    task_folder: LocalPath[str] | None = None
    """A folder with tasks of your own as YAML files, which then are the only ones known. Such files can name Python
    code that is run."""
    batch_size: Positive[int] = 64
    """Sequences at once."""
    zero_tables: bool = True
    """Measure again with the tables zeroed, to see how much they hold."""

    def problems(self) -> list[str | None]:
        """Everything that is wrong with the settings."""
        problems = super().problems()
        if self.memory_devices > 0 and self.batch_size % self.memory_devices:
            problems.append(f"batch_size={self.batch_size} must be a multiple of memory_devices={self.memory_devices}")
        if self.samples > 1 and self.sampling.temperature == 0:
            problems.append(f"samples={self.samples} would all be the same; set sampling.temperature, such as 0.8")
        if self.examples and not self.shots:
            problems.append(f"examples={show(self.examples)} are not used without shots; set shots to their number")
        return problems + self._misplaced()

    def _misplaced(self) -> list[str | None]:
        """Measurements that exclude each other, and settings of measurements that are not requested."""
        asked = [name for name in ("text", "questions", "tasks") if getattr(self, name)]
        problems: list[str | None] = [
            f"{name}={show(getattr(self, name))} cannot be done together with {asked[0]}; do one after the other"
            for name in asked[1:]
        ]
        for field in dataclasses.fields(self):
            owners, value = _USED_BY.get(field.name, ()), getattr(self, field.name)
            if owners and value != _default(field) and not set(owners) & set(asked):
                problems.append(
                    f"{field.name}={show(value)} is only for {' and '.join(owners)}; set that, or leave it out"
                )
        return problems


def _default(field: dataclasses.Field) -> object:
    return field.default_factory() if callable(field.default_factory) else field.default
