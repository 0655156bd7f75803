"""Renamed settings, for reading files written by earlier versions."""

import copy
from typing import Any

RENAMED = {
    "mesh.row_exchange": "row_grad_reduce",
    "model.expert_lookup": "peer",
    "model.experts.balance_weight": "aux_loss_weight",
    "model.experts.capacity": "capacity_factor",
    "model.experts.z_weight": "z_loss_weight",
    "model.head_norm": "qk_norm",
    "model.memory.share": "shared_table",
    "model.peer.share": "shared_table",
    "optim.clip": "max_grad_norm",
    "processes.silence_timeout": "heartbeat_timeout",
    "train.accumulate": "grad_accum_steps",
}
"""New name within the same section, by full old name; sections come before their settings."""

RENAMED_VALUES: dict[str, dict[str | bool, str]] = {
    "mesh.row_grad_reduce": {"factored": "all_gather", "dense": "all_reduce"},
    "model.memory.placement": {"beside": "parallel"},
    "model.qk_norm": {False: "none", True: "per_head"},
}
"""For each setting, the new values by old value."""


def new_name(name: str) -> str:
    """The current name of a setting or section; the same name if it was not renamed."""
    for old, new in RENAMED.items():
        if f"{name}.".startswith(f"{old}."):
            name = f"{old.rpartition('.')[0]}.{new}{name.removeprefix(old)}"
    return name


def new_value(setting: str, value: Any) -> str | None:
    """The current value for an old value of a setting; None if it was not renamed."""
    return next((new for old, new in RENAMED_VALUES.get(setting, {}).items() if str(old) == str(value)), None)


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run of an earlier version, with current names and values."""
    config = copy.deepcopy(config)
    for old, new in RENAMED.items():
        section, name = _section(config, old)
        if name in section:
            section[new] = section.pop(name)
    for setting, values in RENAMED_VALUES.items():
        section, name = _section(config, setting)
        if isinstance(value := section.get(name), str | bool):
            section[name] = values.get(value, value)
    return config


def _section(config: dict[str, Any], setting: str) -> tuple[dict[str, Any], str]:
    """The section that contains a setting (empty if absent), and the setting's name within it."""
    *path, name = setting.split(".")
    section: Any = config
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), name
