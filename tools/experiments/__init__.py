"""Grids of training runs with a measurement of each, and what comes of them: tables, curves, sheets."""
