"""Images and labels: lists, sets, augmentation, queries, and the embedded demo set."""
