"""Hydra's configuration groups; each YAML mirrors a constructor, which is the truth."""
