"""Readers: load public preference and instruction datasets into one schema, with a report of every dropped row."""
