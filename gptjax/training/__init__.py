"""Training: the step, the loop, the objective, optimizers and metrics."""
