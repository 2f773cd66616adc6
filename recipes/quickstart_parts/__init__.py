"""Parts of the quickstart: its texts and the simulated annotator (`data`), and its results (`report`)."""
