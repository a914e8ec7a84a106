"""The fault suite: real processes, real servers, faults at random instants; `scripts/faults` runs it."""
