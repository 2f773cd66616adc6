"""Model cards: their parts as text, and the text that its owner wrote into one."""
