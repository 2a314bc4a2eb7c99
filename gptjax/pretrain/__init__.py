"""Pre-training: from text, and perhaps from the parameters of another model, to a trained run."""
