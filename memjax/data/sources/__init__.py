"""Where records come from: files, and generated people."""
