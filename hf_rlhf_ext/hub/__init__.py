"""Model cards, dataset cards and uploads to the Hub. Does not import the trainers of this library."""
