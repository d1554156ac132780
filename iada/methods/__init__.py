"""What a training step does: one class a family of methods, all with the calls of `Method`."""
