"""All settings, as frozen dataclasses without JAX; and how YAML files and command lines are parsed into them."""
