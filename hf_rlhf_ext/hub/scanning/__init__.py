"""Parts of the leak scanner: findings and remedies, rules, the search in text, and the texts inside other files."""
