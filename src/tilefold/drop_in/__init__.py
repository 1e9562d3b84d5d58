"""Other people's signatures, with exactly their meaning."""
