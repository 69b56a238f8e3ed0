"""What lies where? Which weights, rows and bytes a stage keeps on each tier."""
