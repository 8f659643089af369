"""The space of pipelines: typed moves from any specs, without a template."""
