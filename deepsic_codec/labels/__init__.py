"""Chunk attributes, label index and queries; nothing here imports torch, and a query decodes nothing."""
