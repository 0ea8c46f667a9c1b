"""Writing and reading many chunks as one batch. No Dask in here: `deepsic_codec.dask` puts these parts into tasks."""
