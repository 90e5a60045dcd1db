"""Networks by role, the state, the step and its compiled program, checkpoints, previews."""
