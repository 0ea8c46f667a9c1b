"""Looking at archives: what is in them, pictures of them, comparison with other codecs, and copying them out again."""
