"""Preference data: the comparison row, readers, tokenisation and collators."""
