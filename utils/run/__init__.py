"""The run folder: stages, resuming, comparison with what is there, logs."""
