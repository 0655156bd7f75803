"""Training: program, state, optimizers, the step and the loop around it."""
