"""Pure tensor functions and frozen dataclasses: schedules, predictions, losses, samplers, guidance."""
