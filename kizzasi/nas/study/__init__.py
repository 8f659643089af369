"""A study: who takes part, the journal, and the run from the first candidate to the result."""
