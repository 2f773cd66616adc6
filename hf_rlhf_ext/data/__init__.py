"""Preference data: the comparison row, TRL rows that become it, tokenization and collators."""
