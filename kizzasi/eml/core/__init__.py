"""eml-core's face: its trees, models, benchmark, events and JSON, to the digit where asked."""
