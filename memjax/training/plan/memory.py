"""Predicts the memory that a training step needs per device, from shapes alone.

The prediction is of the bytes in use at the peak of a step, which is the same on all devices. It is the state, which
lives from step to step, plus the largest of three moments: the end of the forward pass (all that is kept for the
backward pass, and logits), the end of the backward pass (all gradients, and the activations of one block), and the
update of the tables. It is meant for GPUs: it was compared with the buffers of steps that XLA compiled for one. On a
CPU, XLA fuses and schedules differently, and a step takes up to three times as much in addition to its state.

XLA can also plan for a GPU that is absent: with only the library of jax-cuda13-pjrt (no CUDA, no cuDNN),
`get_topology_desc("", "cuda", topology="1x1x1", target_config=...)` of `jax.experimental.topologies` compiled steps for
an H200 on a CPU (JAX 0.10.2). Two layers of 373m_dense took 22 s on two busy cores and came to 3.43 GB, here 3.39; four
layers of 373m_memory_plus_1m, in the operations' XLA form and with XLA's fallback for sorting, 48 s and 9.97 GB, here
9.08. `--dry_run` does not do so: it would take a library of 380 MB and a description of the GPU that JAX does not ship,
and kernels are chosen for the device that is present. If the mesh's accelerators are present, it compiles the step.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from memjax.config.run import RunConfig
from memjax.memory.gradient_norm import columns_per_square
from memjax.memory.kinds import KINDS, TokenBytes
from memjax.models import dot_product, loss
from memjax.monitoring.units import aligned, gigabytes
from memjax.ops.precision import accumulator, resolve_dtype
from memjax.sharding.mesh import abstract_mesh, of_parameters
from memjax.training.plan.row_grad_reduce import PlannedReduce, plan_reduce
from memjax.training.program import TrainProgram

_GAPS = 0.06
"""Gaps between the buffers of a compiled step, as a share of the temporary bytes; 0 to 0.11 was observed."""

_SEARCH_BYTES = 1 << 28
"""Bytes of half scores of one chunk of tokens in the search, forward and backward."""

Bytes = dict[str, int]
"""Bytes by purpose."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes per device at the peak of a step."""

    state: Bytes
    """Bytes that live from step to step."""
    moment: str
    """The moment at which the peak occurs."""
    temporary: Bytes
    """Bytes that live only at that moment."""

    @property
    def total(self) -> int:
        return sum(self.state.values()) + sum(self.temporary.values())


def plan(config: RunConfig, *, data_axis: int, program: TrainProgram | None = None) -> Plan:
    """The plan of a run with data_axis devices along `data`; nothing is allocated, and no device is needed.

    The program may be that of a config with another batch or mesh (but the same mesh.dense): the shapes of its state,
    which take long to compute, are the same.
    """
    return _Planner(config, program or TrainProgram.of(config), data_axis).plan()


def describe(found: Plan) -> str:
    """The plan as a table."""
    rows = [("bytes per device", f"{gigabytes(found.total)} at the peak of a step: {found.moment}")]
    rows += [(f"  {name}", gigabytes(count)) for name, count in (found.state | found.temporary).items() if count]
    return aligned(rows)


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes per device that a compiled step needs, which `plan` predicts."""
    sizes: Any = compiled.memory_analysis()
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + new


class _Planner:
    def __init__(self, config: RunConfig, program: TrainProgram, data_axis: int):
        self.config, self.program, self.model = config, program, config.model
        self.mesh, self.tensor, self.data_axis = abstract_mesh(config.mesh, data_axis), config.mesh.tensor, data_axis
        self.rows = -(-config.data.batch_size // (config.train.grad_accum_steps * data_axis * config.mesh.memory))
        """Sequences of a micro-batch per device."""
        self.tokens = self.rows * config.data.sequence_length
        self.dtype = resolve_dtype(config.model.dtype)
        self.width = self.dtype.itemsize
        self.wide = accumulator(self.dtype).itemsize
        self.abstract, self.shardings = program.abstract_state, program.shardings(self.mesh)
        gathered = of_parameters(self.mesh, self.abstract.params, fully_sharded=False)
        self.gathered_bytes = _bytes(self.abstract.params, gathered)
        """Bytes of dense parameters per device if they were not sharded over data and memory."""
        params, places = dict(self.abstract.params), dict(gathered)
        blocks = zip(dict(params.pop("blocks")).values(), dict(places.pop("blocks")).values(), strict=True)
        self.block_sizes = [_elements(*block) for block in blocks]
        self.outside = _elements(params, places)
        """Number of dense parameters outside the blocks: embedding, last norm, output matrix."""
        self.outside_bytes = _bytes(params, places)

    def plan(self) -> Plan:
        """The plan for the largest of the three moments."""
        kept, working = self.kept(), self.working()
        moments = {
            "the loss": self.copies() | kept | self.accumulated() | self.logits(),
            "the end of the backward pass": self.copies() | self.gradients() | {"one block at work": working},
            "the update": self.gradients() | self.row_update(),
        }
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        temporary = moments[moment]
        gaps = int(_GAPS * sum(temporary.values()))
        return Plan(self.state(), moment, temporary | {"gaps between buffers": gaps})

    def state(self) -> Bytes:
        state, shardings = self.abstract, self.shardings
        return {
            "dense parameters": _bytes(state.params, shardings.params),
            "their optimizer": _bytes(state.opt_state, shardings.opt_state),
            "their moving average": _bytes(state.ema, shardings.ema),
            "tables": _bytes(state.tables, shardings.tables),
            "optimizer of the tables": _bytes(state.table_state, shardings.table_state),
            "read counters": _bytes(state.reads, shardings.reads),
        }

    def copies(self) -> Bytes:
        """Gathered copies of parameters, in the type of the activations.

        Parameters gathered for the blocks live until the backward pass with remat "none", otherwise while two blocks
        run.
        """
        if self.is_split:
            is_gathered_again = self.config.train.remat != "none"
            blocks = 2 * max(self.block_sizes) if is_gathered_again else sum(self.block_sizes)
            return {"gathered parameters": self.outside_bytes + blocks * self.width}
        casts = self.param_width != self.width
        return {"parameters as activations": sum(self.block_sizes) * self.width if casts else 0}

    def kept(self) -> Bytes:
        """Activations kept for the backward pass."""
        dim, blocks, remat = self.model.dim, self.model.num_layers, self.config.train.remat
        attention, feed_forward, lookups = self.attention(), self.feed_forward(), sum(map(self.mixer, self.lookups))
        experts = self.experts()
        if remat == "block":
            attention, feed_forward = dim * self.width, 0
            lookups, experts = sum(lookup.read for lookup in self.lookups), self.routing()
        elif remat == "dots":
            dots = dim + self.query_and_keys + dim
            attention, feed_forward = dots * self.width, 2 * self.ffn_dim * self.width
            lookups = sum(lookup.read + lookup.products for lookup in self.lookups)
            experts = self.routing()
        return {
            "activations, attention": blocks * attention * self.tokens,
            "activations, feed-forward": len(self.model.layers_of("dense")) * feed_forward * self.tokens,
            "activations, experts": len(self.model.layers_of("experts")) * experts * self.tokens,
            "activations, memory": lookups * self.tokens,
            "mask of documents": self.mask() if remat == "none" else 0,
        }

    def working(self) -> int:
        """The activations of the one block whose backward pass is running."""
        remat = self.config.train.remat != "none"
        mixer = max([self.feed_forward(), self.experts(), *map(self.mixer, self.lookups)])
        again = (self.attention() + mixer) * self.tokens if remat else 0
        # The cotangents of its widest activations.
        expert = self.expert_rows() * self.model.expert_dim
        widest = int(max(2 * self.ffn_dim, 4 * self.model.dim, 2 * expert)) * self.width * self.tokens
        search = min(
            _SEARCH_BYTES, max((lookup.scores * self.tokens * self.wide for lookup in self.lookups), default=0)
        )
        return again + widest + self.scores() + self.mask() + search

    def attention(self) -> int:
        """Bytes per token: residual stream, its norm, queries, keys, values and output.

        With the fused kernel, also the softmax's sums; with chunks of queries, also their copies of queries and keys.
        """
        extra = self.model.num_heads // self.tensor * self.wide if self.is_fused else self.query_and_keys * self.width
        return (3 * self.model.dim + self.query_and_keys) * self.width + extra + self.kept_scores()

    @property
    def query_and_keys(self) -> int:
        return (self.model.num_heads + 2 * self.model.kv_heads) // self.tensor * self.model.head_width

    @property
    def ffn_dim(self) -> int:
        return self.model.ffn_dim // self.tensor

    @property
    def is_fused(self) -> bool:
        """Whether attention keeps no scores, like cuDNN's; with a 16-bit type, a GPU is assumed."""
        wanted = self.config.attention
        return wanted == "cudnn" or (wanted == "auto" and self.width == 2)

    def score_bytes(self) -> int:
        return self.tokens * self.config.data.sequence_length * self.model.num_heads // self.tensor * self.wide

    def scores(self) -> int:
        """Bytes of attention scores held at once."""
        return 0 if self.is_fused else 2 * min(self.score_bytes(), dot_product.SCORE_BYTES)

    def mask(self) -> int:
        """Bytes of the mask that the kernel needs if rows hold documents; all blocks share it."""
        is_taken = self.is_fused and self.config.data.rows_hold_documents
        return self.tokens * self.config.data.sequence_length * self.width if is_taken else 0

    def kept_scores(self) -> int:
        """Bytes per token of softmax weights that are kept, which is only if all scores may be held at once."""
        if self.is_fused or self.score_bytes() > dot_product.SCORE_BYTES:
            return 0
        return self.score_bytes() // self.tokens

    def feed_forward(self) -> int:
        """Bytes per token: residual stream, its norm, both projections and their product."""
        return (2 * self.model.dim + 3 * self.ffn_dim) * self.width

    def expert_rows(self) -> float:
        """Average number of experts that process a token in training."""
        experts = self.model.experts
        if experts is None:
            return 0.0
        return experts.capacity_factor if experts.routing == "expert_choice" else float(experts.top_k)

    def experts(self) -> int:
        """Bytes per token: residual stream, its norm, and for each expert input, projections, product and output."""
        if self.model.experts is None:
            return 0
        rows = self.expert_rows() * (2 * self.model.dim + 3 * self.model.expert_dim)
        return int(2 * self.model.dim + rows) * self.width + self.routing()

    def routing(self) -> int:
        """Bytes per token: logits, and two copies of the routing."""
        experts = self.model.experts
        return int(experts.num_experts * self.wide + self.expert_rows() * 8) if experts else 0

    @property
    def lookups(self) -> list[TokenBytes]:
        """Bytes per token of each lookup."""
        return [
            KINDS[kind].token_bytes(section, self.model.dim, self.width, resolve_dtype(section.table_dtype).itemsize)
            for kind, section in self.model.lookup_sections.items()
            for _ in section.layers
        ]

    def mixer(self, lookup: TokenBytes) -> int:
        """Bytes per token: residual stream, its norm, and the lookup."""
        return 2 * self.model.dim * self.width + lookup.activations + lookup.read

    def logits(self) -> Bytes:
        """Logits of a chunk, their gradient, and the gradient of the output matrix."""
        vocab, dim = self.model.vocab_size // self.tensor, self.model.dim
        chunks = loss.chunk_count(self.tokens, vocab, self.dtype, 1)
        chunk = -(-self.tokens // min(chunks, self.config.data.sequence_length))
        return {
            "logits": chunk * vocab * (self.wide + self.width),
            "last hidden states": 3 * self.tokens * dim * self.width,
            "output matrix's gradient": vocab * dim * self.wide,
        }

    def gradients(self) -> Bytes:
        """Gradients of all dense parameters, and the row gradients of the tables."""
        dense = self.outside * self.param_width + sum(self.block_sizes) * self.width
        if self.is_split:
            dense = dense * self.state()["dense parameters"] // self.gathered_bytes
            dense += max(self.block_sizes) * self.width
        whole = self.state()["tables"] if self.config.optim.table.is_dense else 0
        return self.accumulated() | self.row_gradients() | {"gradients": dense, "gradients of the tables": whole}

    def accumulated(self) -> Bytes:
        """Gradients accumulated over micro-batches."""
        if self.config.train.grad_accum_steps == 1:
            return {}
        return {"accumulated gradients": self.state()["dense parameters"]} | self.row_gradients()

    def row_gradients(self) -> Bytes:
        """Index and weight of every pick, and the vectors that they multiply.

        They are those of all micro-batches, or those of one and the sum of all.
        """
        planned = self.collective
        if planned is None:
            return {}
        row_bytes = sum(lookup.gradient for lookup in self.lookups) * self.tokens
        if not planned.sums:
            return {"row gradients": row_bytes * self.config.train.grad_accum_steps}
        tables = self.model.tables.values()
        summed = sum(
            table.num_slots
            * (table.width // self.config.mesh.memory * accumulator(resolve_dtype(table.dtype)).itemsize + 1)
            for table in tables
        )
        return {"row gradients": row_bytes, "summed row gradients": summed}

    def row_update(self) -> Bytes:
        """Picks sorted by row with the vectors that they multiply, and the memory in which they are summed."""
        planned = self.collective
        if planned is None:
            return {}
        held = planned.bytes[planned.chosen]
        # A sum over micro-batches is already counted in `row_gradients`.
        return {
            "dense row gradient": 0 if planned.sums else held.gradient,
            "sorted picks": held.picks,
            "norm of the tables' gradients": self.squares() if self.config.optim.clip_tables else 0,
        }

    def squares(self) -> int:
        """Bytes of the sums of squares of the rows' gradients, from which their norm is computed."""
        shards = self.config.mesh.memory
        return sum(
            table.num_slots
            * (table.width // shards // columns_per_square(table.width, shards))
            * accumulator(resolve_dtype(table.dtype)).itemsize
            for table in self.model.tables.values()
        )

    @functools.cached_property
    def collective(self) -> PlannedReduce | None:
        """How row gradients are summed and cross the `data` axis."""
        return plan_reduce(self.config, data_axis=self.data_axis)

    @property
    def param_width(self) -> int:
        return jnp.dtype(self.model.param_dtype).itemsize

    @property
    def is_split(self) -> bool:
        """Whether dense parameters are sharded over data and memory."""
        return self.state()["dense parameters"] < self.gathered_bytes


def _bytes(tree: Any, shardings: Any) -> int:
    """Bytes per device of arrays that are given as shapes."""
    return sum(count * dtype.itemsize for count, dtype in _pieces(tree, shardings))


def _elements(tree: Any, shardings: Any) -> int:
    return sum(count for count, _ in _pieces(tree, shardings))


def _pieces(tree: Any, shardings: Any) -> Iterator[tuple[int, jnp.dtype]]:
    """Number of elements of each array on one device, and its type."""
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        yield math.prod(place.shard_shape(leaf.shape)), leaf.dtype
