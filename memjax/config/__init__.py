"""Every setting, as frozen dataclasses that need no JAX; and how files and command lines become them."""
