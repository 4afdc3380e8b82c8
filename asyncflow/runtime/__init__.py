"""Where the parts of a pipeline run, and what happens when one of them ends."""
