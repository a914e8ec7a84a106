"""The bench: measures this package through its public API, side by side with what people would use instead."""
