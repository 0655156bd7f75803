"""Runs training from config to summary, and the dry run."""

import contextlib
from collections.abc import Sequence

import jax

from memjax.config.dtype import DType
from memjax.config.run import RunConfig
from memjax.data.dataset import open_dataset
from memjax.data.sources.kinds import find_source
from memjax.errors import ConfigError
from memjax.io.console import fitted, say, warn
from memjax.io.paths import is_remote, readable_path
from memjax.memory.kinds import KINDS
from memjax.models import dot_product
from memjax.models.counts import count_parameters
from memjax.monitoring.progress import log_phase
from memjax.monitoring.units import aligned, billions, gigabytes
from memjax.ops import dispatch, host_memory
from memjax.ops.precision import resolve_dtype, truncated
from memjax.runs.folder import Claim, RunFolder
from memjax.sharding.mesh import make_mesh
from memjax.sharding.processes import is_first, process_zero_first
from memjax.training.ending import Preempted
from memjax.training.finish import describe_summary, finish
from memjax.training.hook import Periodic
from memjax.training.in_flight import NotFinite
from memjax.training.interrupt import catch_interrupts
from memjax.training.mirror import check_mirror, mirror
from memjax.training.plan import inputs
from memjax.training.plan import memory as memory_plan
from memjax.training.plan import row_grad_reduce as reduce_plan
from memjax.training.plan.report import describe, describe_fit
from memjax.training.plan.savings import explain_out_of_memory, is_out_of_memory
from memjax.training.plan.search import search
from memjax.training.program import TrainProgram
from memjax.training.start import check_start, check_trainable, log_schedule_changes
from memjax.training.step import abstract_batch, make_train_step
from memjax.training.trainer import Trainer


def dry_run(config: RunConfig, *, fit_to: tuple[int, int] | None = None) -> int:
    """Prints what a run would need, on any machine and for any mesh.

    If the mesh's accelerators are present, also compiles the step, which gives the exact number. With fit_to (bytes of
    a device, number of devices), prints settings with which the run fits there instead.

    Returns:
        0, or 7 if nothing fits.

    Raises:
        ConfigError, DataError, CheckpointError: data or tokenizer cannot be used; the plan has been printed.
    """
    code = 0
    if fit_to is None:
        _say_plan(config)
    else:
        found = search(config, device_bytes=fit_to[0], devices=fit_to[1])
        say(describe_fit(config, found, *fit_to))
        code = 0 if found else 7
    for row in inputs.describe(config):
        say(aligned([row]))
    return code


def _say_plan(config: RunConfig) -> None:
    program = TrainProgram.of(config)
    data_axis = config.mesh.data_axis(jax.device_count())
    say(describe(config, program.parts, data_axis=data_axis))
    say(memory_plan.describe(memory_plan.plan(config, data_axis=data_axis, program=program)))
    if collective := reduce_plan.describe(config, data_axis=data_axis):
        say(collective)
    if jax.default_backend() != "cpu" and jax.device_count() == data_axis * config.mesh.devices_per_replica:
        mesh = make_mesh(config)
        with jax.set_mesh(mesh):
            compiled = make_train_step(program, mesh).lower(program.abstract_state, abstract_batch(config)).compile()
        say(aligned([("compiled for these devices", f"{gigabytes(memory_plan.compiled_bytes(compiled))} on each")]))


def train(config: RunConfig, *, allow_changed: bool = False, hooks: Sequence[Periodic] = ()) -> int:
    """Trains, or resumes, or reports a finished run.

    Returns:
        The exit code: 0 done, 5 not finite, 7 out of memory, 75 stopped by a signal after saving.

    Raises:
        ConfigError, DataError, CheckpointError: as their names say.
    """
    check_trainable(config)
    check(config)
    folder = RunFolder.of(config)
    with contextlib.ExitStack() as stack:
        with process_zero_first("run.dir"):
            if is_first():
                stack.enter_context(folder.owned())
                if config.run.mirror:
                    check_mirror(folder.path, config.run.mirror)
            else:
                folder.check_shared()
        check_start(config)
        claim = folder.claim(config, allow_changed=allow_changed)
        if claim.finished is None:
            return _train(claim, hooks)
        say(f"{folder.path} is already finished; continue it with a larger --train.steps, or set another --run.dir.\n")
        say(describe_summary(claim.finished, folder))
        if config.run.mirror and is_first():
            mirror(folder.path, config.run.mirror)  # what could not be sent when the run ended
        return 0


def _train(claim: Claim, hooks: Sequence[Periodic]) -> int:
    config, folder = claim.config, claim.folder
    log_schedule_changes(claim)
    mesh = make_mesh(config)
    # Slow work with nothing to save comes first, while signals still end the process.
    log_phase("reading tokenizer and data")
    source = find_source(config.data.in_run(str(folder.path)))
    tokenizer = folder.tokenizer(config, source)
    with process_zero_first("data"):
        if is_first() and config.data.prepared is None and not folder.began():
            source.discard_outdated(tokenizer)
        dataset = open_dataset(source, tokenizer)
    alone = jax.process_count() == 1
    with catch_interrupts(at_once=alone, quiet=not is_first()) as interrupt, jax.set_mesh(mesh):
        record = lambda step: claim.record(step, tokenizer)
        trainer = Trainer(config, mesh, folder, dataset, interrupt, record=record, hooks=hooks)
        say(opening(config, trainer.program, mesh, folder))
        if (limit := _too_little(config, trainer.program, mesh)) is not None:
            warn(explain_out_of_memory(config, data_axis=mesh.shape["data"], limit=limit))
            return 7
        try:
            state = trainer.run()
        except NotFinite as error:
            warn(str(error))
            return 5
        except Preempted as error:
            say(str(error))
            return 75
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
            warn(explain_out_of_memory(config, data_axis=mesh.shape["data"], limit=limit))
            return 7
        summary = finish(trainer.program, state, mesh, folder, tokenizer)
        if config.run.mirror and is_first():
            mirror(folder.path, config.run.mirror)
    say("\n" + describe_summary(summary, folder))
    return 0


def _too_little(config: RunConfig, program: TrainProgram, mesh: jax.sharding.Mesh) -> int | None:
    """Available memory, if on CPUs the state alone needs more: the system would kill the process without a message."""
    free, local = host_memory.available_bytes(), mesh.local_devices
    if free is None or local[0].platform != "cpu":
        return None
    state = memory_plan.plan(config, data_axis=mesh.shape["data"], program=program).state
    return free if len(local) * sum(state.values()) > free else None


def check(config: RunConfig) -> None:
    """Raises ConfigError with all problems of the settings that only training uses."""
    problems = _unreadable(config) or ([problem] if (problem := find_source(config.data).problem) else [])
    schedules = {"optim": config.optim} | ({"optim.table": config.optim.table} if config.model.lookups else {})
    for name, schedule in schedules.items():
        if schedule.warmup_of(config.train.steps) >= config.train.steps:
            problems.append(
                f"{name}.warmup_steps={schedule.warmup_steps} must be below train.steps={config.train.steps}; "
                f"set --{name}.warmup_steps 0.1, a share of the steps"
            )
    if config.train.attention == "cudnn" and (reason := _why_no_cudnn(config)):
        problems.append(f"train.attention=cudnn cannot run: {reason}; set train.attention=auto")
    lookups = {f"model.{kind}.table_dtype": part.table_dtype for kind, part in config.model.lookup_sections.items()}
    dtypes = {"model.dtype": config.model.dtype, "model.param_dtype": config.model.param_dtype} | lookups
    problems += truncated(dtypes | {"optim.table.moment_dtype": config.optim.table.moment_dtype})
    if problems:
        raise ConfigError(problems)


def _unreadable(config: RunConfig) -> list[str]:
    """Problems of remote addresses in the settings, such as missing packages."""
    addresses = {
        "train.init_from": config.train.init_from,
        "data.path": config.data.path,
        "data.validation_path": config.data.validation_path,
    } | {f"data.mixture[{number}].path": part.path for number, part in enumerate(config.data.mixture)}
    problems = []
    for name, address in addresses.items():
        try:
            if address and is_remote(address):
                readable_path(address, name)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _why_no_cudnn(config: RunConfig) -> str | None:
    """The reason why cuDNN's attention cannot run; None if it can."""
    model = config.model
    return dot_product.why_not("cudnn", resolve_dtype(model.dtype), model.head_width, config.data.sequence_length)


def _attention(config: RunConfig) -> str:
    """The implementation of the attention that will run."""
    if config.attention != "auto":
        return config.attention
    reason = _why_no_cudnn(config)
    return ("chunked" if reason else "cudnn") + _because(reason, "cudnn")


def _kernels(operation: str, type_name: DType) -> str:
    """The implementation of an operation that will run for a type."""
    dtype = resolve_dtype(type_name)
    return dispatch.choose(operation, None, dtype) + _because(dispatch.why_not("triton", dtype), "triton")


def _because(reason: str | None, fastest: str) -> str:
    """Why the fastest implementation does not run; empty if it does, and on CPUs, where it is not expected."""
    return "" if reason is None or jax.default_backend() == "cpu" else f" ({fastest} cannot run: {reason})"


def opening(config: RunConfig, program: TrainProgram, mesh: jax.sharding.Mesh, folder: RunFolder) -> str:
    """The first lines of a run: model, memory, devices, kernels."""
    counts, model, experts = count_parameters(program.parts), config.model, config.model.experts
    data_axis = mesh.shape["data"]
    sizes = memory_plan.plan(config, data_axis=data_axis, program=program)
    in_experts = f"{billions(counts.experts)} in experts, " if experts else ""
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = [
        f"run        {folder.path}",
        f"model      {billions(counts.dense)} dense + {billions(counts.table)} table parameters, "
        f"{in_experts}{billions(counts.active)} active per token",
    ]
    if experts:
        layers = ", ".join(map(str, model.layers_of("experts")))
        choice = "experts choose" if experts.routing == "expert_choice" else f"{experts.top_k} by token"
        lines.append(f"experts    {experts.num_experts} in block {layers}; {choice}")
    for kind, lookup in model.lookup_sections.items():
        layers = ", ".join(map(str, lookup.layers))
        lines.append(f"{KINDS[kind].title.format(lookup.num_slots)}, {lookup.picks} read by block {layers}")
    lines += [
        f"devices    {mesh.size} x {mesh.devices.flat[0].device_kind} "
        f"({config.mesh.describe(data_axis)}{processes}), {gigabytes(sizes.total)} needed on each",
        f"data       {config.data.path or config.data.source}, {config.train.steps} steps of "
        f"{config.data.batch_size} x {config.data.sequence_length} tokens",
        f"attention  {_attention(config)}",
    ]
    # All operations of lookups have the same implementations, so one stands for all.
    chosen = {_kernels("embedding_bag", lookup.table_dtype) for lookup in model.lookups.values()}
    lines += [f"kernels    {name}" for name in sorted(chosen)]
    if experts:
        lines.append(f"kernels    {_kernels('grouped_matmul', model.dtype)} for experts")
    return fitted("\n".join(lines), 11)
