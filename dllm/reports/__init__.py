"""Reports on sweeps, and display of traces."""
