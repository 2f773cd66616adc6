"""Preference data: the comparison row, conversion of TRL's rows, tokenization and collators."""
