"""The codec: parameters, both Zarr formats, the way of a chunk to its payload and back."""
