"""Arrays as stores hold them: where they are, their chunks and shards, and models beside them."""
