"""Model cards and uploads; imports nothing that trains."""
