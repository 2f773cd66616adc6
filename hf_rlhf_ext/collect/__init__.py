"""Collecting judgments: sampling of completions, a store, a web page on which people judge, and the export."""
