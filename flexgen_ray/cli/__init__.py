"""What can be typed? The `flexgen-ray` command, its options, and how it ends."""
