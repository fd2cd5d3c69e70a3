"""Record-level differential privacy: entropy, accounting, DP-SGD engines."""
