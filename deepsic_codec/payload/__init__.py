"""The bytes of a chunk: header, sections, labels, arithmetic coder."""
