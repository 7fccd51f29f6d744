"""The webhook receiver: signed deliveries start restores and searches."""
