"""Jobs: their states, where they are kept, and who starts them."""
