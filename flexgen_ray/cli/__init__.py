"""The `flexgen-ray` command: its options, and its exit statuses."""
