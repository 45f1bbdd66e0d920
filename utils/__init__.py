"""What a training run needs around the method: config, run folder, devices, inference, metrics."""

IGNORE = 255  # the label of pixels that count nowhere: void and padding
