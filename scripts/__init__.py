"""The commands of `dllm`, each a Hydra application."""
