"""Adapters of public hierarchical VAEs, one package or module per family."""
