"""All settings as frozen dataclasses, and their parsing from YAML files and command lines; imports no JAX."""
