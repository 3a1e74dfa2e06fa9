"""Speed and memory, measured on this machine beside its own limits and beside what others use."""
