"""The policy's weights into the engine: every step, complete, versioned and summed."""
