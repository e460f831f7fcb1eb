"""Hydra's config groups; each YAML mirrors a constructor, which is authoritative."""
