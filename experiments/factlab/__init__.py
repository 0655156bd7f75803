"""Shared code of the experiments: facts as token arrays, fast training with memjax's step, many concurrent runs."""
