"""README.md and generation_config.json of an exported folder."""

from collections.abc import Sequence
from typing import Any

from memjax.config.model import ModelConfig
from memjax.config.run import RunConfig
from memjax.interop.huggingface.families import has_own_format

CARD = "README.md"


def generation_config(bos: int, ends: Sequence[int], pad: int) -> dict[str, Any]:
    """The generation_config.json of a model: greedy decoding until one of the end tokens."""
    return {"bos_token_id": bos, "eos_token_id": one_or_many(ends), "pad_token_id": pad, "do_sample": False}


def one_or_many(ids: Sequence[int]) -> int | list[int]:
    """The value of a field that holds a single id as a number and several as a list."""
    return ids[0] if len(ids) == 1 else list(ids)


def model_card(run: RunConfig, model: ModelConfig, *, step: int) -> str:
    """The README.md of an exported model, with the header that the Hugging Face Hub reads."""
    has_code = has_own_format(model)
    rows = {
        "Blocks": f"{model.num_layers}",
        "Width": f"{model.dim}",
        "Heads": f"{model.num_heads}, {model.kv_heads} of keys and values",
        "Vocabulary": f"{model.vocab_size:,}",
        **{f"Table `{name}`": f"{table.num_slots:,} rows of {table.width}" for name, table in model.tables.items()},
        "Trained on sequences of": f"{run.data.sequence_length:,} tokens",
        "Step": f"{step:,}",
    }
    return _CARD.format(
        tags="\n- custom_code" if has_code else "",
        kind=" with memory layers" if model.lookups else " with experts" if has_code else "",
        sizes="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        use=_WITH_CODE if has_code else _with_transformers(),
    )


def _with_transformers(arguments: str = "") -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{arguments})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{arguments})
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```"""


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- memjax{tags}
---

# A language model{kind}

Written by memjax.

| | |
|---|---|
{sizes}

## Use

{use}
"""

_WITH_CODE = f"""With transformers, which runs the model's code from this folder (`modeling_memjax.py`):

{_with_transformers(", trust_remote_code=True")}

With the further argument `table_device="cpu"`, the tables stay in main memory.

With memjax:

```bash
python -m memjax.convert from-hf FOLDER --out RUN
python -m memjax.generate RUN --prompt "The capital of France is"
```"""
