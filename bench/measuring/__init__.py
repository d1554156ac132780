"""Shapes, clocks, memory and pictures that the measurements share."""
