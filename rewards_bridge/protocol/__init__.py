"""What the trainer and the scorer process say to each other: bridge.proto, the limits, and the checks of both sides."""
