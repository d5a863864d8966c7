"""The run config: schema, rules between keys, YAML with origins, loading."""
