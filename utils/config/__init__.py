"""A run's settings: the schema, and reading it from YAML."""
