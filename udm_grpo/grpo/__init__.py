"""The UDM-GRPO advantages, training states, loss and update."""
