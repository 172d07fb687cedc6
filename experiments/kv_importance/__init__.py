"""What each cached key and value causes, whether that can be foretold, and how much of the cache can go."""
