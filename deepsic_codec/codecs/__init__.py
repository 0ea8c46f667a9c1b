"""The codecs of both Zarr formats: chunk arrays to payloads and back, and the joining of chunks into batches."""
