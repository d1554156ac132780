"""The run around a method: data order, schedules, logs, checkpoints, resume."""
