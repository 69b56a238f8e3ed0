"""Memory layout: which weights, rows and bytes a stage keeps on each tier."""
