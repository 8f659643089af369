"""Templates: model specs with holes, read, filled, counted, and found again in a spec."""
