"""The protocol between the trainer and the scorer process: bridge.proto, the limits, and the checks on both sides."""
