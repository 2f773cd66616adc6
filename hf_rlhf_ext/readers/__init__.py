"""Readers: public preference and instruction data sets as rows of one schema, with a report of what was left out."""
