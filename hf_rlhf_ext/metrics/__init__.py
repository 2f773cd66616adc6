"""Metric names and units, preference metrics and plots; imports nothing else of this library."""
