"""Memory layers as Flax NNX modules: a table of values, and layers that look rows up by product keys."""
