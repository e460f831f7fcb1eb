"""Reports on sweeps, and drawings of traces."""
