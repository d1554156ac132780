"""Throughput and memory of `iada.fused_loss` against what people have today; see README.md."""
